import math
from dataclasses import replace

import pytest
import safetensors
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_igpt.config import EMBEDDED
from lightning_igpt.data import PretrainDataModule
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule
from lightning_igpt.palette import Palette
from lightning_igpt.weights import ASSETS, load_pretrained
from lightning_igpt.weights.native import interpolate_positions
from tests.modules.helpers import TINY, loader, quiet_trainer
from tests.networks import random_network


@pytest.fixture
def checkpoint(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(PretrainModule(TINY, "gray:8"), loader())
    return trainer.checkpoint_callback.best_model_path


def test_a_checkpoint_gives_network_and_palette(checkpoint):
    loaded = load_pretrained(checkpoint)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert loaded.config == TINY and loaded.palette.spec == "gray:8" and checkpoint in loaded.origin
    for name, value in loaded.network.state_dict().items():
        assert torch.equal(value, state[f"network.{name}"])
    assert all(parameter.requires_grad for parameter in loaded.network.parameters())


def test_the_loaded_network_does_not_hang_on_to_the_file(checkpoint):
    loaded = load_pretrained(checkpoint)
    before = loaded.network.wte.weight.clone()
    with open(checkpoint, "r+b") as file:
        file.write(b"\0" * 100_000)
    assert torch.equal(loaded.network.wte.weight, before)


def stamped(path, step, nats=None, monitor=None, measured_at=None, kind="PretrainModule", started=9.0):
    """A checkpoint of a run at one step, with what its validation gave; its first token embedding tells them apart."""
    network = random_network(TINY)
    with torch.no_grad():
        network.wte.weight[0, 0] = step
    palette = Palette.load("gray:8")
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    metric = "val/nats_per_pixel" if kind == "PretrainModule" else "val/accuracy"
    validation = {} if nats is None else {"step": measured_at or step, metric: nats}
    best = {"monitor": "val/x", "best_model_path": str(monitor)} if monitor else {"monitor": None}
    stamp = {"class": kind, "network": TINY.to_dict(), "palette_sha256": palette.sha256, "steps": step}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "state_dict": state | {"palette_colors": palette.colors},
            "lightning_igpt": stamp | {"validation": validation, "run": {"started": started}},
            "callbacks": {"ModelCheckpoint": best},
        },
        path,
    )


def step_of(loaded):
    return int(loaded.network.wte.weight[0, 0])


def test_a_run_folder_gives_the_best_that_a_checkpoint_callback_kept(tmp_path):
    stamped(tmp_path / "a" / "10.ckpt", 10, nats=3.0)
    stamped(tmp_path / "a" / "20.ckpt", 20, nats=2.0, monitor="elsewhere/before/10.ckpt")  # the run was moved
    loaded = load_pretrained(tmp_path)
    assert step_of(loaded) == 10 and "the best in val/x of" in loaded.origin and "10.ckpt" in loaded.origin


@pytest.mark.parametrize("name", ["{}.ckpt", "step={0}-val/nats={0}.ckpt"])  # metrics' names make folders
@pytest.mark.parametrize("kind", ["PretrainModule", "FineTuneModule"])
def test_a_run_folder_gives_the_best_by_its_own_validation(tmp_path, kind, name):
    values = {10: 2.5, 20: 2.0, 30: 2.2} if kind == "PretrainModule" else {10: 0.5, 20: 0.7, 30: 0.6}
    for step, value in values.items():
        stamped(tmp_path / "a" / name.format(step), step, nats=value, kind=kind)
    better = values[20] * (0.1 if kind == "PretrainModule" else 1.4)
    stamped(tmp_path / "other_run" / "50.ckpt", 50, nats=better, kind=kind, started=8.0)
    loaded = load_pretrained(tmp_path)
    assert step_of(loaded) == 20 and "the best in val/" in loaded.origin
    stamped(tmp_path / "a" / "40.ckpt", 40, nats=better, measured_at=30, kind=kind)
    assert step_of(load_pretrained(tmp_path)) == 20  # what step 30 measured says nothing of the weights of step 40


def test_the_best_of_a_run_whose_checkpoint_names_have_a_slash(tmp_path):
    class Mine(PretrainModule):  # by what was measured, not by the name of the class
        pass

    saver = ModelCheckpoint(filename="{step}-{val/nats_per_pixel:.3f}", save_top_k=-1, every_n_train_steps=1)
    options = {"val_check_interval": 1, "check_val_every_n_epoch": None, "callbacks": [saver], "max_steps": 6}
    data = PretrainDataModule("digits", batch_size=64, image_size=4)
    quiet_trainer(tmp_path, **options).fit(Mine(TINY, "gray:8", lr=3.0, warmup_steps=0), data)
    cards = [load_pretrained(path).card for path in tmp_path.rglob("*-val/*.ckpt")]
    measured = {card.measured_at: card.nats_per_pixel for card in cards if card.measured_at}
    assert load_pretrained(tmp_path).card.steps == min(measured, key=measured.get) != 6 == len(cards)


def test_a_later_checkpoint_may_tell_of_an_earlier_ones_validation(tmp_path):
    """Saved before the validation of their step, as every_n_train_steps does."""
    for step, measured_at, nats in [(10, 5, 4.0), (20, 10, 2.0), (30, 20, 3.0)]:
        stamped(tmp_path / f"{step}.ckpt", step, nats=nats, measured_at=measured_at)
    assert step_of(load_pretrained(tmp_path)) == 10


def test_what_cannot_be_read_is_passed_over(tmp_path, caplog):
    stamped(tmp_path / "10.ckpt", 10)
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "10.ckpt").read_bytes()[:5000])
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "gone.ckpt").symlink_to(tmp_path / "nowhere")
    loaded = load_pretrained(tmp_path)
    assert step_of(loaded) == 10
    assert "cut.ckpt is skipped" in caplog.text and "foreign.ckpt is skipped" in caplog.text
    (tmp_path / "10.ckpt").unlink()
    with pytest.raises(ValueError, match=r"(cut|foreign)\.ckpt"):
        load_pretrained(tmp_path)


def test_checkpoints_tell_steps_data_and_what_was_measured(tmp_path):
    data = PretrainDataModule("digits", batch_size=64, image_size=4)
    trainer = quiet_trainer(tmp_path, max_steps=3, val_check_interval=2, check_val_every_n_epoch=None)
    trainer.fit(PretrainModule(TINY, "gray:8"), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    card = load_pretrained(tmp_path / "last.ckpt").card
    assert (card.steps, card.data, card.measured_at) == (3, "digits", 2)
    assert card.nats_per_pixel == pytest.approx(trainer.callback_metrics["val/nats_per_pixel"].item())


def test_averaged_weights_are_taken_and_said_to_be(tmp_path):
    module, average = PretrainModule(TINY, "gray:8", lr=0.05, warmup_steps=0), EMAWeightAveraging(decay=0.5)
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[average])
    trainer.fit(module, loader())
    raw = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    loaded = load_pretrained(trainer.checkpoint_callback.best_model_path)
    assert "averaged weights" in loaded.origin
    name = "network.lm_head.weight"
    assert torch.equal(loaded.network.lm_head.weight, raw["state_dict"][name])
    assert not torch.equal(raw["state_dict"][name], raw["current_model_state"][name])


def test_another_image_size_interpolates_positions_and_says_so(checkpoint, caplog):
    loaded = load_pretrained(checkpoint)
    with caplog.at_level("INFO", "lightning_igpt"):
        larger = load_pretrained(checkpoint, image_size=8)
    assert "interpolated from 4 x 4 to 8 x 8" in larger.origin and larger.origin in caplog.text
    assert larger.config == replace(TINY, image_size=8)
    assert torch.equal(larger.network.wpe.weight, interpolate_positions(loaded.network.wpe.weight, 8))
    assert larger.card.nats_per_pixel is None and larger.card.steps == loaded.card.steps  # measured at the old size
    assert torch.equal(larger.network.h[0].mlp.c_fc.weight, loaded.network.h[0].mlp.c_fc.weight)
    for module in (PretrainModule, FineTuneModule, ProbeModule):
        built = module(pretrained=checkpoint, image_size=8)
        assert torch.equal(built.network.wpe.weight, larger.network.wpe.weight)
    assert PretrainModule({"image_size": 8, "dropout": 0.1}, pretrained=checkpoint).config.dropout == 0.1
    assert PretrainModule(TINY, "gray:8", image_size=8).config.image_size == 8
    with pytest.raises(ValueError, match=r"n_layer 2 \(asked for: 3\)"):
        PretrainModule({"n_layer": 3}, pretrained=checkpoint)
    with pytest.raises(ValueError, match=r"image_size 4 \(asked for: 32\)"):
        PretrainModule("igpt_s", pretrained=checkpoint)


@pytest.mark.parametrize(("name", "most"), [("photos", 6_000_000), ("emoji", 3_000_000)])
def test_embedded_networks_are_small_in_float16_and_trained(name, most):
    loaded, file = load_pretrained(name), ASSETS / name / "model.safetensors"
    assert file.stat().st_size < most
    with safetensors.safe_open(file, "pt") as tensors:
        assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {torch.float16}  # noqa: SIM118
    assert {value.dtype for value in loaded.network.parameters()} == {torch.float32}
    assert loaded.lineage.startswith(f"{name} (") and loaded.card.nats_per_pixel < 0.8 * math.log(len(loaded.palette))
    assert ProbeModule(pretrained=name).config == loaded.config


def test_an_embedded_name_gives_way_to_weights_but_not_to_photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    assert load_pretrained("photos").origin == f"photos, the embedded network of {EMBEDDED['photos']}"
    with pytest.raises(FileNotFoundError, match=r"photos holds neither"):
        load_pretrained("./photos")
    stamped(tmp_path / "photos" / "run" / "10.ckpt", 10)
    assert step_of(load_pretrained("photos")) == 10


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("https://example.org/model.ckpt", ValueError, "not fetched from URLs"),
        ("http:/example.org/model", ValueError, "not fetched from URLs"),
        ("s3://bucket/model.ckpt", ValueError, "not fetched from URLs"),
        ({"n_layer": 1}, ValueError, "what describes a network without weights is for network="),
        ("nowhere.ckpt", FileNotFoundError, "does not exist"),
        ("", ValueError, "name a file, a folder, a hub id or an embedded network"),
        ("foto", FileNotFoundError, r"foto does not exist; .* or an embedded network \(photos, emoji, emoji_bert\)"),
        ("runs/nowhere.ckpt", FileNotFoundError, "does not exist"),
    ],
)
def test_wrong_sources_say_so(tmp_path, monkeypatch, source, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        load_pretrained(source)


def test_folders_without_a_checkpoint_say_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither config\.json .* nor a \.ckpt"):
        load_pretrained(tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(ValueError, match=r"is a folder of shards as FSDP writes it"):
        load_pretrained(tmp_path)


def test_an_unreachable_hub_id_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="owner/nothing is neither a path here nor an accessible hub repo"):
        load_pretrained("owner/nothing")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "/nowhere"), OSError(28, "No space left")])
def test_errors_of_the_cache_name_the_variable_to_set(tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(type(error), match=rf"weights of me/cats .*: {error.strerror}; .* are kept in .*; set HF_HOME"):
        load_pretrained("me/cats")
    monkeypatch.setattr("lightning_igpt.weights.checkpoint.read_torch", fail)
    (tmp_path / "mine.ckpt").touch()
    with pytest.raises(type(error), match=rf"the weights of .*mine.ckpt could not be read: {error.strerror}"):
        load_pretrained(tmp_path / "mine.ckpt")


def test_a_changed_palette_or_a_missing_part_is_noticed(tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    bad = tmp_path / "bad.ckpt"
    torch.save({**content, "state_dict": {**content["state_dict"], "palette_colors": torch.rand(8, 3)}}, bad)
    with pytest.raises(ValueError, match=r"damaged: its colors have the hash"):
        load_pretrained(bad)
    for part in ("state_dict", "lightning_igpt"):
        torch.save({**content, part: {}}, bad)
        with pytest.raises(ValueError, match=r"bad\.ckpt is damaged: (its palette|missing or wrong in its metadata)"):
            load_pretrained(bad)


def test_a_smooth_table_of_positions_is_sampled_at_the_new_pixels():
    """A ramp over rows and columns stays one: two dimensions, raster order, pixel centers."""

    def ramp(side):
        centers = (torch.arange(side) + 0.5) / side
        return torch.stack([centers.repeat_interleave(side), centers.repeat(side)], 1)  # (S * S, 2): row, column

    for old, new in [(8, 12), (12, 8), (8, 16)]:
        inner = torch.zeros(new, new, dtype=torch.bool)
        inner[3:-3, 3:-3] = True  # the border has no neighbors to go by
        difference = (interpolate_positions(ramp(old), new) - ramp(new)).abs()[inner.flatten()]
        assert difference.max() < 0.01  # torch's kernel bends a ramp by half a hundredth; a pixel is 0.06 to 0.125
