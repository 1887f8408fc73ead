"""Sharded training (FSDP2) computes what one device computes, and its checkpoints are one file that loads anywhere."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_igpt.callbacks import CompletionGrid, OnlineProbe
from lightning_igpt.decoding import is_sharded
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule
from lightning_igpt.sampling import complete, inpaint
from lightning_igpt.strategies import FullyShardedStrategy
from lightning_igpt.weights import load_pretrained
from tests.modules.helpers import BERT, TINY, quiet_trainer
from tests.processes import Losses, Shared, batches, in_processes, whole
from tests.sharding import process_group  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # of weights, after steps of Adam at a rate of 0.01


def pretrain(**options):
    return PretrainModule(TINY, "gray:8", lr=0.01, warmup_steps=1, **options)


def finetune(**options):
    options = {"layer_decay": 0.8, "weight_decay": 0.1, "lr": 0.01} | options
    return FineTuneModule(None, 3, network=TINY, palette="gray:8", **options)


def classify(**options):
    return finetune(generative_weight=0, **options)


def trainer(folder, *, sharded=True, devices=1, precision="32-true", callbacks=(), **options):
    return quiet_trainer(
        folder, strategy=FullyShardedStrategy(devices) if sharded else "auto", devices=devices, precision=precision,
        callbacks=list(callbacks), use_distributed_sampler=False,
        **{"max_epochs": 1, "enable_checkpointing": False} | options,
    )  # fmt: skip


def train(make, folder, count=6, on_meta=False, ckpt_path=None, **options):
    """(losses, weights, metrics) of a fit, and its module."""
    losses = Losses()
    runner = trainer(folder, callbacks=[losses, *options.pop("callbacks", [])], **options)
    torch.manual_seed(0)
    with runner.init_module(empty_init=on_meta):
        module = make()
    assert module.network.wte.weight.is_meta == on_meta
    torch.manual_seed(0 if on_meta else 1)
    runner.fit(module, Continued(batches(module.config, count)), ckpt_path=ckpt_path)
    return (losses.all, whole(module), runner.callback_metrics), module


def assert_same_run(mine, other):
    """The losses, weights and validations of two runs."""
    assert mine[0] == pytest.approx(other[0], rel=1e-6, abs=1e-6)
    assert mine[1].keys() == other[1].keys()
    for name, weight in mine[1].items():
        torch.testing.assert_close(weight, other[1][name], **CLOSE)
    metrics = [{name: float(run[2][name]) for name in run[2] if name.startswith("val/")} for run in (mine, other)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


ACCUMULATED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "count": 10}
RUNS = [(pretrain, {}), (pretrain, ACCUMULATED), (finetune, {}), (classify, {})]


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize(("make", "options"), RUNS, ids=["pretrain", "accumulated", "finetune", "classify"])
def test_two_processes_that_share_a_network_equal_one(tmp_path, make, options, on_meta):
    """Also with weights that are drawn when the network is shared; evaluation and a second fit come after it."""
    expected, twin = train(make, tmp_path, sharded=False, **options)
    trainer(tmp_path, sharded=False).fit(twin, Shared(batches(TINY, 2)))

    def work(rank):
        mine, module = train(make, tmp_path, devices=2, on_meta=on_meta, **options)
        assert_same_run(expected, mine)
        assert all(isinstance(parameter, DTensor) for parameter in module.network.h.parameters())
        assert [is_sharded(block) for block in module.network.h] == [True, True]
        runner = trainer(tmp_path, devices=2)
        runner.test(module, Shared(batches(TINY, 1)), verbose=False)
        runner.fit(module, Shared(batches(TINY, 2)))
        assert_same_run(([], whole(twin), {}), ([], whole(module), {}))

    assert in_processes(work) == [0, 0]


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Continued(Shared):
    """A loader that continues at the optimizer step, as those of this package's data modules do."""

    def train_dataloader(self):
        return DataLoader(super().train_dataloader().dataset, batch_size=None, sampler=self)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        step = self.trainer.global_step
        yield from [*range(step, len(self)), *range(step)]


@pytest.mark.parametrize("make", [pretrain, finetune, classify])
def test_checkpoints_cross_strategies(tmp_path, make):
    """One file, which one device, DDP and processes that share a network save and continue alike."""
    kinds = {"one": {"sharded": False}, "two": {"devices": 2}}

    def run(kind, **options):
        return train(make, tmp_path, **kinds[kind], **options)[0]

    expected = run("one", callbacks=[SaveAt(3, tmp_path / "one.ckpt")])
    rest = (expected[0][3:], *expected[1:])

    def work(rank):
        run("two", callbacks=[SaveAt(3, tmp_path / "two.ckpt")])
        for source in ("one", "two"):
            assert_same_run(rest, run("two", ckpt_path=tmp_path / f"{source}.ckpt"))

    assert in_processes(work) == [0, 0]
    assert_same_run(rest, run("one", ckpt_path=tmp_path / "two.ckpt"))
    one, two = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("one", "two"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    loaded = load_pretrained(tmp_path / "two.ckpt").network
    assert torch.equal(loaded.wte.weight, two["state_dict"]["network.wte.weight"])


def test_tensor_parallelism_is_refused(tmp_path):
    def work(rank):
        with pytest.raises(ValueError, match=r"tensor_parallel_size=2.*data_parallel_size=2"):
            runner = quiet_trainer(tmp_path, devices=2, strategy=ModelParallelStrategy(), max_steps=1)
            runner.fit(pretrain(), Shared(batches(TINY, 1)))

    assert in_processes(work) == [0, 0]


class TestMethods:
    """What is called on a sharded network besides its forward."""

    @pytest.fixture
    def networks(self, tmp_path, process_group, request):  # noqa: F811
        config = getattr(request, "param", TINY)
        made = []
        for sharded in (False, True):
            torch.manual_seed(0)
            module = PretrainModule(config, "gray:8")
            torch.nn.init.normal_(module.network.lm_head.weight)
            trainer(tmp_path, sharded=sharded).validate(module, Shared(batches(config, 1)), verbose=False)
            made.append(module.network)
        return made

    def test_features(self, networks):
        plain, sharded = networks
        tokens = batches(TINY, 1)[0]["tokens"]
        for layers in ([0, 1, 2], [1], [2, 0], [0]):
            torch.testing.assert_close(sharded.features(tokens, layers), plain.features(tokens, layers))
            assert all(isinstance(parameter, DTensor) for parameter in sharded.h.parameters())

    def test_completions(self, networks):
        _, sharded = networks
        prompt = batches(TINY, 1)[0]["tokens"][:2, :8]
        drawn = [complete(one, prompt, n_samples=2, generator=torch.Generator().manual_seed(3)) for one in networks]
        assert torch.equal(*drawn)
        with pytest.raises(ValueError, match="needs whole weights"):
            complete(sharded, prompt, precision="int8")

    @pytest.mark.parametrize("networks", [BERT], indirect=True)
    def test_inpainting(self, networks):
        tokens = batches(BERT, 1)[0]["tokens"]
        known = torch.arange(16).expand_as(tokens) < 8
        drawn = [inpaint(one, tokens, known, generator=torch.Generator().manual_seed(3)) for one in networks]
        assert torch.equal(*drawn)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(tmp_path, process_group, precision):  # noqa: F811
    options = {"precision": precision, "gradient_clip_val": 1000.0}
    expected, _ = train(finetune, tmp_path, sharded=False, **options)
    mine, module = train(finetune, tmp_path, **options)
    assert mine[0] == pytest.approx(expected[0], rel=2e-3)
    dtype = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}


def test_callbacks(tmp_path, process_group):  # noqa: F811
    chosen = [CompletionGrid(2, 1), OnlineProbe(num_classes=3)]
    (_, _, metrics), _ = train(pretrain, tmp_path, count=4, logger=True, callbacks=chosen)
    assert len(list(tmp_path.rglob("completions/*.png"))) == 1
    assert metrics["online_probe/layer_1/accuracy"] > 0


def test_what_cannot_be_sharded_says_so(tmp_path, process_group):  # noqa: F811
    data = Shared(batches(TINY, 1))
    with pytest.raises(ValueError, match=r"not sharded; use strategy='ddp'"):
        trainer(tmp_path).fit(ProbeModule(network=TINY, palette="gray:8", num_classes=3), data)
    with pytest.raises(ValueError, match="weights cannot be averaged"):
        trainer(tmp_path, callbacks=[EMAWeightAveraging(decay=0.5)]).fit(pretrain(), data)
