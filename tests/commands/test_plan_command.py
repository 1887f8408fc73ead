"""``lightning-igpt plan``: its numbers are those of ``lightning_igpt.planning``."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lightning_igpt.__main__ import main
from lightning_igpt.commands import cpu
from lightning_igpt.commands import plan as verb
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.planning import (
    RECOMPUTE,
    Schedule,
    checkpoint_bytes,
    find_device,
    largest_batch,
    parameter_count,
    train_flops_per_token,
    training_bytes,
)


def planned(capsys, *words):
    assert main(["plan", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_table_holds_the_numbers_of_planning(capsys):
    text = planned(capsys, "--network", "igpt_l", "--devices", 8, "--device_kind", "a100-40", "--steps", 1000)
    config, usable = PRESETS["igpt_l"], find_device("a100-40").usable
    per_token = train_flops_per_token(config)
    assert f"{parameter_count(config):,} parameters" in text and "1,024 tokens" in text
    assert f"{per_token:.3e} per token, {per_token * 1024 * 128:.3e} per step of 128 images" in text
    assert f"{per_token * 1024 * 128 * 1000:.3e} in 1,000 steps" in text
    for name, sharded in (("DDP", False), ("FSDP", True)):
        for recompute in RECOMPUTE:
            options = {"devices": 8, "sharded": sharded, "recompute": recompute}
            row = re.search(rf"^  {name} {recompute} +(\S+) GiB +(\S+) GiB +(\S+) eager, (\S+) compiled$", text, re.M)
            for compiled, size, most in ((False, row[1], row[3]), (True, row[2], row[4])):
                options["compiled"] = compiled
                assert size == f"{sum(training_bytes(config, 16, **options).values()) / 2**30:.2f}"
                assert most == f"{largest_batch(config, usable, **options):,}"
    assert f"{checkpoint_bytes(config) / 1e9:,.3g} GB" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_time_is_flops_by_the_share_of_the_peak(capsys):
    run = replace(verb.make_run(PRESETS["igpt_s"], Schedule(128, 1000), find_device("h100"), devices=2), mfu=0.4)
    assert run.seconds == pytest.approx(run.flops / (2 * 0.4 * 989.4e12))
    text = planned(capsys, "--steps", 1000, "--devices", 2, "--mfu", 0.4)
    assert f"time at 40% MFU   {verb.hours(run.seconds)}, " in text
    assert f"{128_000 / run.seconds:,.4g} images/s" in text
    tiny = verb.make_run(PRESETS["igpt_tiny"], Schedule(128, 1000), find_device("h100"))
    assert tiny.mfu == tiny.ceiling_mfu < 0.33  # no more is assumed than can be


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.5, "0.5 s"), (90, "1.5 minutes"), (3600, "1 hour"), (10**6, "11.6 days"), (10**11, "3,170 years")],
)
def test_times_have_a_suitable_unit(seconds, text):
    assert verb.hours(seconds) == text


def test_options(capsys):
    text = planned(capsys, "--image_size", 48, "--objective", "bert", "--batch_size", 64, "--devices", 4,
                   "--accumulate_grad_batches", 2, "--precision", "16", "--device_kind", "t4")  # fmt: skip
    assert "48 x 48 = 2,304 tokens" in text and "igpt_s, bert" in text and "sampling" not in text
    assert "micro-batch 8)" in text and "16-mixed" in text and "4 x T4" in text
    assert "32-true" in planned(capsys, "--device_kind", "v100")


@pytest.mark.parametrize(("objective", "precision"), [("autoregressive", "32-true"), ("bert", "bf16-mixed")])
def test_this_cpu_is_timed_in_training_steps(objective, precision, capsys, monkeypatch):
    """Those of such a network, or of a smaller one; random numbers of the caller stay as they are."""
    config = ImageGPTConfig(2, 1, 8, vocab_size=4, image_size=16, objective=objective)
    seen, hidden = [], ImageGPT.hidden

    def spied(network, tokens, **options):
        seen.append((network.config.n_layer, *tokens.shape, torch.is_autocast_enabled("cpu")))
        return hidden(network, tokens, **options)

    monkeypatch.setattr(ImageGPT, "hidden", spied)
    monkeypatch.setattr("timeit.repeat", lambda step, number, repeat: [step() or s for s in range(repeat)])
    state, step = torch.get_rng_state(), train_flops_per_token(config) * 256 * 6
    for least, timed in ((step, (2, 6, 256)), (step / 4, (2, 1, 256)), (step / 11, (1, 1, 256)), (0, (1, 1, 64))):
        monkeypatch.setattr(cpu, "TRIAL", least)
        speed = cpu.train_speed(config, 6, precision)
        assert seen[-1] == (*timed, precision == "bf16-mixed")
        small = replace(config, n_layer=timed[0], image_size=int(timed[2] ** 0.5))
        operations = train_flops_per_token(small) * timed[1] * timed[2]
        assert speed == operations / 4 and torch.equal(torch.get_rng_state(), state)  # the median of 2 to 6 seconds
    monkeypatch.setattr(cpu, "train_speed", lambda *args: 2e9)
    seconds = train_flops_per_token(PRESETS["igpt_s"]) * 128 * 1024 * 10**6 / 2e9
    text = planned(capsys, "--device_kind", "cpu")
    assert f"time              {verb.hours(seconds)}, " in text and "MFU" not in text and "floor" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network", "igpt_xxl"], "no preset 'igpt_xxl'"),
        (["--device_kind", "h10"], "no device 'h10'"),
        (["--mfu", "45"], "mfu is 45; it is a share above 0 and up to 1"),
        (["--batch_size", "100", "--devices", "64"], "batch_size 100 is no multiple of devices 64 x .*take 64"),
        (["--image_size", "-1"], "image_size is -1"),
        (["--device_kind", "v100", "--precision", "bf16-mixed"], "V100 has no"),
    ],
)
def test_wrong_options_are_named(words, message):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert re.search(message, str(stop.value.code))


def test_planning_loads_neither_torch_nor_matplotlib():
    check = (
        "import sys; from lightning_igpt.__main__ import main; main(['plan', '--network', 'igpt_l'])\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)
