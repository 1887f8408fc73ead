import contextlib
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_igpt.data import PretrainDataModule
from lightning_igpt.modules import FineTuneModule, PretrainModule
from lightning_igpt.objectives import draw_mask, masked_pixel_loss, next_pixel_loss
from lightning_igpt.palette import Palette
from lightning_igpt.weights import load_pretrained
from lightning_igpt.weights.checkpoint import STAMP
from tests.modules.helpers import BERT, TINY, labelled_images, loader, quiet_trainer


def module(config=TINY, **options):
    torch.manual_seed(0)
    return PretrainModule(config, "gray:8", **options)


def test_a_plain_trainer_with_a_plain_loader_of_bytes_trains(tmp_path):
    plain = DataLoader(labelled_images()[0], batch_size=8)
    trainer = quiet_trainer(tmp_path, max_steps=60)
    trainer.fit(module(lr=0.01), plain, plain)
    nats = trainer.callback_metrics["val/nats_per_pixel"].item()
    assert nats < 0.7 * math.log(8)
    assert trainer.callback_metrics["val/bits_per_pixel"].item() == pytest.approx(nats / math.log(2))


@pytest.mark.parametrize("config", [TINY, BERT])
def test_the_training_loss_is_the_objective(config):
    model = module(config, seed=7).train()
    model.log = lambda *args, **kwargs: None
    torch.nn.init.normal_(model.network.lm_head.weight)
    images, _ = labelled_images(4)
    samples = torch.tensor([3, 1, 4, 1])
    loss = model.training_step({"image": images, "sample": samples}, 0)
    tokens = Palette.load("gray:8").quantize(images)
    if config is TINY:
        expected = next_pixel_loss(model.network(tokens), tokens)
    else:
        masked = draw_mask(samples, 16, seed=7)
        expected = masked_pixel_loss(model.network(tokens, masked=masked), tokens, masked)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("config", [TINY, BERT])
def test_validation_does_not_depend_on_batching(tmp_path, config):
    """A mean over images, not over batches, and the same masks every time."""
    model = module(config)
    torch.nn.init.normal_(model.network.lm_head.weight)
    images, _ = labelled_images(13)
    found = []
    for batch_size in (13, 4):
        rows = [{"image": image, "sample": torch.tensor(i)} for i, image in enumerate(images)]
        data = DataLoader(rows, batch_size=batch_size)
        found.append(quiet_trainer(tmp_path).validate(model, data, verbose=False)[0]["val/nats_per_pixel"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_masks_differ_between_steps_and_repeat_between_validations(tmp_path):
    model, seen = module(BERT), []
    model.network.register_forward_pre_hook(
        lambda network, args, kwargs: seen.append((network.training, kwargs["masked"].clone())), with_kwargs=True
    )
    data = loader(8)  # its batches carry no sample numbers
    quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(model, data, data)
    training = [masked for mode, masked in seen if mode]
    validation = [masked for mode, masked in seen if not mode]
    assert len(training) == len(validation) == 2
    assert not torch.equal(training[0], training[1])
    assert not torch.equal(training[0][0], training[0][1])
    assert torch.equal(validation[0], validation[1])


def test_a_checkpoint_needs_nothing_else_and_opens_safely(tmp_path):
    palette_file = tmp_path / "mine.npy"
    colors = torch.rand(8, 3, generator=torch.manual_seed(0)) * 2 - 1
    Palette(colors).save(palette_file)
    model = PretrainModule(TINY, str(palette_file), lr=0.02)
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(model, loader())
    path = trainer.checkpoint_callback.best_model_path
    palette_file.unlink()
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["lightning_igpt"]["palette_sha256"] == model.palette.sha256
    again = PretrainModule.load_from_checkpoint(path)
    assert again.lr == 0.02 and again.config == TINY and again.palette == Palette(colors)
    for mine, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    assert not [key for key in checkpoint["state_dict"] if checkpoint["state_dict"][key].numel() > 2**20]


def test_pretrained_starts_from_the_weights_and_palette(tmp_path):
    model = module()
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(model, loader())
    path = trainer.checkpoint_callback.best_model_path
    warm = PretrainModule(pretrained=path)
    assert warm.config == TINY and warm.palette == model.palette
    assert torch.equal(warm.network.wte.weight, model.network.wte.weight)
    with pytest.raises(ValueError, match=r"n_embd 16 \(asked for: 96\)"):
        PretrainModule("igpt_tiny", pretrained=path)
    with pytest.raises(ValueError, match="uses the palette"):
        PretrainModule(pretrained=path, palette=Palette(-Palette.load("gray:8").colors.flip(0) * 0.9))


@pytest.mark.parametrize("config", [TINY, BERT])
def test_predict_keeps_the_upper_half(tmp_path, config):
    model, data = module(config), loader(8)
    found = torch.cat(quiet_trainer(tmp_path).predict(model, data))
    truth = model.palette.dequantize(model.palette.quantize(labelled_images(8)[0]))
    assert found.shape == truth.shape and found.dtype == torch.uint8
    assert torch.equal(found[:, :, :2], truth[:, :, :2])
    assert torch.equal(found, torch.cat(quiet_trainer(tmp_path).predict(model, data)))


def test_training_in_bfloat16_leaves_the_palette_and_float32_behind(tmp_path):
    """bf16-true rounds every buffer; a rounded palette would give half a percent of the pixels another token."""
    colors = torch.rand(8, 3, generator=torch.manual_seed(0)) * 2 - 1
    model = PretrainModule(TINY, Palette(colors))
    trainer = quiet_trainer(tmp_path, max_steps=1, precision="bf16-true")
    trainer.fit(model, loader())
    loaded = load_pretrained(trainer.checkpoint_callback.best_model_path)
    assert loaded.palette == Palette(colors)
    assert {parameter.dtype for parameter in loaded.network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({"max_epochs": 2}, 8),
        pytest.param({"max_epochs": 2, "limit_train_batches": 3}, 6, marks=pytest.mark.slow),
        pytest.param({"max_epochs": 2, "limit_train_batches": 0.5}, 4, marks=pytest.mark.slow),
        ({"max_epochs": 2, "max_steps": 5}, 5),
        ({"max_steps": 5}, 5),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 6),
    ],
)
def test_the_cosine_ends_with_the_run(tmp_path, options, end):
    model, rates = module(lr=1.0, warmup_steps=1), []
    model.on_train_batch_end = lambda *args: rates.append(model.optimizers().param_groups[0]["lr"])
    size = 324 if "accumulate_grad_batches" in options else 323  # 3 or 4 optimizer steps in an epoch
    data = PretrainDataModule("digits", batch_size=size, image_size=4, val_fraction=0.1)
    trainer = quiet_trainer(tmp_path, limit_val_batches=0, **options)
    trainer.fit(model, data)
    assert trainer.global_step == end
    assert rates[-1] == pytest.approx(0, abs=1e-6) and rates[-2] > 0


def rates_of(folder, steps, ckpt_path=None, **options):
    """The rate of each optimizer step of a run, and its weights; checkpoints of steps 12 and 20."""
    torch.manual_seed(0)
    model, rates = module(lr=0.5, **options), []
    model.on_train_batch_start = lambda *args: rates.append(model.optimizers().param_groups[0]["lr"])
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1, save_on_train_epoch_end=False)
    trainer = quiet_trainer(folder, max_steps=steps, limit_val_batches=0, callbacks=saver)
    trainer.fit(model, loader(), ckpt_path=ckpt_path)
    return rates, model.state_dict()


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_run_at_a_constant_rate_can_be_continued_for_longer(schedule, tmp_path, caplog):
    options = {"schedule": schedule, "warmup_steps": 2}
    rates_of(tmp_path / "short", 20, **options)
    whole, weights = rates_of(tmp_path / "long", 40, **options)
    rates, again = rates_of(tmp_path / "more", 40, tmp_path / "short" / "step=16.ckpt", **options)
    assert rates == whole[16:] and all(torch.equal(value, again[name]) for name, value in weights.items())
    assert "learning rate rises" not in caplog.text
    if schedule == "wsd":  # at the end of its decay
        rates, _ = rates_of(tmp_path / "late", 40, tmp_path / "short" / "step=20.ckpt", **options)
        assert rates == whole[20:] and "rises from 0 to 0.5 as the run continues; if the checkpoint is" in caplog.text


def test_the_default_warm_up_does_not_begin_again_in_a_longer_run(tmp_path):
    rates, _ = rates_of(tmp_path / "short", 20, schedule="constant")
    assert rates == [0.25, *[0.5] * 19]
    rates, _ = rates_of(tmp_path / "more", 400, tmp_path / "short" / "step=20.ckpt", schedule="wsd")  # a tenth is 40
    assert rates[:300] == [0.5] * 300 and rates[-1] < 0.01
    rates, _ = rates_of(
        tmp_path / "slower", 30, tmp_path / "short" / "step=4.ckpt", schedule="constant", warmup_steps=8
    )
    assert rates[:5] == [0.5 * step / 8 for step in (5, 6, 7, 8, 8)]  # but it is as asked for now


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "1e-3"}, "lr is '1e-3'; it must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"warmup_steps": -5}, "warmup_steps is -5"),
        ({"betas": (0.9,)}, r"betas is \(0.9,\)"),
        ({"schedule": "linear"}, "schedule is 'linear'; it must be cosine, constant or wsd"),
        ({"decay_fraction": 1.0}, "decay_fraction is 1.0; it must lie between 0 and 1"),
        ({"mask_ratio": 7.0}, "mask_ratio is 7.0; it must lie between 0 and 1"),
        ({"mask_ratio": "unifrom"}, "mask_ratio is unifrom; it must lie between 0 and 1, or in pretraining be uniform"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        module(BERT, **options)


def test_random_weights_are_told_of_and_others_are_not(tmp_path, caplog):
    trainer, trained, data = quiet_trainer(tmp_path, max_steps=1), module(), loader()
    trainer.validate(trained, data, verbose=False)
    assert caplog.text.count("random weights") == 1
    trainer.fit(trained, data)
    trainer.test(trained, data, verbose=False)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    for other in (PretrainModule.load_from_checkpoint(path), PretrainModule(pretrained=str(path))):
        quiet_trainer(tmp_path).validate(other, data, verbose=False)
    quiet_trainer(tmp_path).validate(module(), data, ckpt_path=path, verbose=False)
    assert caplog.text.count("random weights") == 1


@pytest.mark.parametrize("inside", [False, True])
def test_means_are_exact_in_bfloat16(tmp_path, inside):
    """The head is zero, so each image costs ln 8; in bfloat16 a sum of ones stands still at 256."""
    trainer = quiet_trainer(tmp_path, precision="bf16-true")
    with trainer.init_module() if inside else contextlib.nullcontext():
        model = module()
    (found,) = trainer.validate(model, loader(300, batch_size=1), verbose=False)
    assert found["val/nats_per_pixel"] == pytest.approx(math.log(8), rel=1e-5)


def trained(folder, module, **options):
    """The checkpoint that a step more leaves."""
    trainer = quiet_trainer(folder, max_steps=options.pop("max_steps", 1), enable_checkpointing=False)
    trainer.fit(module, loader(), **options)
    path = folder / "x.ckpt"
    trainer.save_checkpoint(path)
    return path


def stamped(path):
    return torch.load(path, weights_only=True)[STAMP]["origin"]


def test_the_chain_is_kept_without_folders(tmp_path):
    module = PretrainModule(TINY, "gray:8")
    assert module.origin is module.origin_path is None
    first = trained(tmp_path / "first", module)
    assert stamped(first) is None and load_pretrained(first).card.origin is None
    second = trained(tmp_path / "second", PretrainModule(pretrained=str(first)))
    assert stamped(second) == "x.ckpt (1 step)"
    tuned = FineTuneModule(str(tmp_path / "second"), 3)
    assert tuned.origin == "x.ckpt (1 step), trained from x.ckpt (1 step)" and tuned.origin_path == second
    third = trained(tmp_path / "third", tuned)
    assert stamped(third) == tuned.origin and str(tmp_path) not in repr(torch.load(third, weights_only=True)[STAMP])


def test_a_resumed_run_keeps_the_origin_that_it_is_not_told(tmp_path):
    first = trained(tmp_path / "first", PretrainModule(TINY, "gray:8"))
    second = trained(tmp_path / "second", PretrainModule(pretrained=str(first)))
    again = trained(tmp_path / "third", PretrainModule(TINY, "gray:8"), max_steps=2, ckpt_path=second)
    assert stamped(again) == "x.ckpt (1 step)"
    assert PretrainModule.load_from_checkpoint(again).origin == "x.ckpt (1 step)"
