import json

import pytest
import torch

from lightning_igpt.benchmarks import train_step
from lightning_igpt.config import ImageGPTConfig

WORDS = ["--preset", "igpt_tiny", "--batch-size", "2", "--repeats", "2", "--device", "cpu"]
KEYS = {"benchmark", "ratio_vs_peer", "fraction_of_limit", "device", "threads", "cores", "versions", "sides"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    config = ImageGPTConfig(n_layer=3, n_head=2, n_embd=16, image_size=4)
    monkeypatch.setattr(train_step, "PRESETS", {"igpt_tiny": config})


def test_the_last_line_is_json_with_every_side(capsys):
    train_step.main([*WORDS, "--layers", "2", "--precision", "32-true"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) >= KEYS
    assert set(result["sides"]) == {train_step.OURS, train_step.PEER}
    assert result["layers"] == 2 and result["losses_off"] < 1e-4
    assert result["tokens_per_second"] > 0 and result["fraction_of_limit"] > 0


def test_another_loss_is_refused(monkeypatch):
    right = train_step.next_pixel_loss
    monkeypatch.setattr(train_step, "next_pixel_loss", lambda logits, tokens: 1.01 * right(logits, tokens))
    with pytest.raises(RuntimeError, match=r"disagree.*losses"):
        train_step.main(WORDS)


def test_both_sides_train_alike():
    """Ten steps on the same pictures: the peer is trained with our optimiser's settings, and without dropout."""
    config = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, image_size=4)
    tokens = torch.randint(512, (2, 16), generator=torch.manual_seed(0))
    steps = train_step.make_steps(config, tokens, "32-true", compiled=False)
    losses = {name: torch.stack([step() for _ in range(10)]) for name, step in steps.items()}
    assert losses[train_step.OURS][-1] < losses[train_step.OURS][0] - 0.005
    torch.testing.assert_close(losses[train_step.OURS], losses[train_step.PEER], rtol=5e-4, atol=0)
