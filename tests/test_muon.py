"""Muon for the matrices in the blocks: torch's own step on each, Adam's on all else, and one optimiser to Lightning."""

import copy
import re

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import lightning_igpt as igpt
from lightning_igpt import optim
from lightning_igpt.checkpointing import find_checkpoint
from lightning_igpt.optim import MuonAdam, make_adam
from tests.modules.helpers import BERT, TINY, loader, quiet_trainer
from tests.sharding import FullySharded, process_group, trainer
from tests.test_resume import ENDLESS, NETWORK, SOURCE, Recorder, assert_resumes, fit

__all__ = ["process_group"]
OPTIONS = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.3}


def parameter(*shape, seed=0):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def torchs_muon(matrices):
    return torch.optim.Muon(matrices, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")


def step(parameters, *optimizers, numbers=range(4)):
    for number in numbers:
        for one in parameters:
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(number))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (number + 1)
            optimizer.step()


def module(config=TINY, **options):
    torch.manual_seed(0)
    return igpt.PretrainModule(config, "gray:8", **{"optimizer": "muon"} | options)


def test_a_step_is_that_of_torchs_muon_on_matrices_and_of_adam_on_all_else(monkeypatch):
    monkeypatch.setattr(optim, "multiplies_bfloat16", lambda device: True)
    mine = [parameter(6, 4), parameter(4, 6), parameter(5, 4), parameter(4)]
    twins = copy.deepcopy(mine)
    step(mine, MuonAdam(mine[:2], mine[2:], **OPTIONS))
    step(twins, torchs_muon(twins[:2]), make_adam(twins[2:], **OPTIONS))
    assert all(map(torch.equal, mine, twins))


def test_where_bfloat16_would_be_emulated_products_are_computed_in_float32(monkeypatch):
    monkeypatch.setattr(optim, "multiplies_bfloat16", lambda device: False)
    matrix, (a, b, c) = parameter(4, 6), (3.4445, -4.775, 2.0315)
    start = matrix.detach().double()
    step([matrix], MuonAdam([matrix], [parameter(2)], **OPTIONS), numbers=[0])
    x = matrix.grad.double() / matrix.grad.double().norm()
    for _ in range(5):
        x = a * x + (b * (square := x @ x.T) + c * square @ square) @ x
    assert (matrix - start * (1 - 0.02 * 0.3) + 0.02 * 0.2 * 6**0.5 * x).abs().max() < 1e-6


def test_packed_matrices_step_as_if_they_were_apart(monkeypatch):
    monkeypatch.setattr(optim, "multiplies_bfloat16", lambda device: True)
    packed = parameter(12, 4)
    apart = [torch.nn.Parameter(part.clone()) for part in packed.detach().chunk(3)]
    optimizer, muon = MuonAdam([packed], [parameter(2)], packed={packed: 3}, **OPTIONS), torchs_muon(apart)
    for number in range(4):
        step([packed], optimizer, numbers=[number])
        for part, gradient in zip(apart, packed.grad.chunk(3), strict=True):
            part.grad = gradient
        muon.step()
        muon.param_groups[0]["lr"] = 0.02 / (number + 2)
    assert torch.equal(packed, torch.cat(apart))
    momentum = torch.cat([muon.state[part]["momentum_buffer"] for part in apart])
    assert torch.equal(optimizer.state[packed]["momentum_buffer"], momentum)


@pytest.mark.parametrize("config", [TINY, BERT, {**TINY.to_dict(), "bias": True}])
def test_every_parameter_has_one_place(config):
    model = module(config, weight_decay=0.3)
    model.trainer = quiet_trainer(".", max_steps=10)
    optimizer = model.configure_optimizers()["optimizer"]
    name_of = {one: name for name, one in model.network.named_parameters()}
    single, packed, *adams = [[name_of[one] for one in group["params"]] for group in optimizer.param_groups]
    assert sorted([*single, *packed, *adams[0], *adams[1]]) == sorted(name_of.values())
    assert all(re.fullmatch(r"h\.\d\.(attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight", name) for name in single)
    assert packed == ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"] and len(single) == 6
    assert [group.get("parts") for group in optimizer.param_groups] == [1, 3, None, None]
    assert [group["decayed"] for group in optimizer.param_groups] == [True, True, True, False]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.3, 0.0]
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0}


def pretraining():
    options = {"optimizer": "muon", "weight_decay": 0.1, "seed": 3, "warmup_steps": 2}
    made = igpt.PretrainModule(NETWORK | {"dropout": 0.1}, "gray:4", **options)
    return made, igpt.PretrainDataModule(SOURCE, batch_size=4, seed=5)


def test_a_resumed_run_equals_its_twin_bit_for_bit(tmp_path):
    """From files that weights_only=True opens."""
    whole = fit(pretraining, ENDLESS, save_to=tmp_path)
    for place in ("step-1", "validation-3", "step-5"):
        assert_resumes(pretraining, ENDLESS, whole, tmp_path / f"{place}.ckpt")


def test_training_is_as_without_averaged_weights_and_a_resumed_run_as_its_twin(tmp_path):
    """With Lightning's EMAWeightAveraging."""
    plain, *_ = fit(pretraining, ENDLESS)
    whole, weights, _ = fit(pretraining, ENDLESS, callbacks=[EMAWeightAveraging(decay=0.5), Recorder(tmp_path)])
    assert whole.losses == plain.losses and whole.validations.keys() == plain.validations.keys()
    assert whole.validations != plain.validations
    for place in ("step-2", "step-3", "validation-3"):
        options = {"ckpt": tmp_path / f"{place}.ckpt", "callbacks": [EMAWeightAveraging(decay=0.5)]}
        again, found, _ = fit(pretraining, ENDLESS, **options)
        assert again.validations[6] == whole.validations[6]
        assert all(torch.equal(value, found[name]) for name, value in weights.items()), place


def test_a_resumed_run_follows_new_settings(tmp_path):
    quiet_trainer(tmp_path, max_steps=2).fit(module(), loader())
    changes = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.2, "warmup_steps": 1}
    resumed = module(**changes)
    rates = []
    resumed.on_train_batch_start = lambda *_: rates.append([g["lr"] for g in resumed.optimizers().param_groups])
    quiet_trainer(tmp_path, max_steps=4).fit(resumed, loader(), ckpt_path=find_checkpoint(tmp_path))
    assert rates == [pytest.approx([0.75 * 0.01] * 4), pytest.approx([0.25 * 0.01] * 4)]
    for mine, other in zip(resumed.optimizers().param_groups, resumed._optimizer().param_groups, strict=True):
        assert all(mine[key] == other[key] for key in other.keys() - {"params", "lr"})


def test_matrices_that_are_sharded_are_refused(tmp_path, process_group):
    with pytest.raises(ValueError, match=r"Muon needs whole matrices, not a .*; use adam, or a strategy"):
        trainer(tmp_path, "fsdp2").fit(FullySharded(TINY, "gray:8", optimizer="muon"), loader())
