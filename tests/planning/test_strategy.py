import itertools
from dataclasses import replace

import pytest

from lightning_igpt.config import PRESETS
from lightning_igpt.planning import DEVICES, choose, instead, largest_batch, training_bytes
from lightning_igpt.planning.strategy import largest_divisor

USABLE = DEVICES["h100"].usable
ORDER = [
    ("ddp", "none"),
    ("fsdp", "none"),
    ("ddp", "selective"),
    ("fsdp", "selective"),
    ("ddp", "full"),
    ("fsdp", "full"),
]
CASES = list(itertools.product(("s", "l", "xl"), (1, 2, 12, 64, 1000), (1, 8), (False, True)))


def needed(config, batch_size, devices, strategy, recompute, compiled):
    options = {"devices": devices, "sharded": strategy == "fsdp", "recompute": recompute, "compiled": compiled}
    return sum(training_bytes(config, batch_size, **options).values())


def test_the_first_that_fits_is_chosen_or_the_smallest():
    seen = set()
    for name, batch_size, devices, compiled in CASES:
        config = PRESETS[f"igpt_{name}"]
        order = ORDER if devices > 1 else [("single", how) for _, how in ORDER[::2]]
        options = {key: needed(config, batch_size, devices, *key, compiled) for key in order}
        fitting = [key for key in order if options[key] <= USABLE]
        wanted = fitting[0] if fitting else min(order, key=options.__getitem__)
        found = choose(config, batch_size, devices, USABLE, "bf16-mixed", compiled)
        assert (found.strategy, found.recompute) == wanted
        assert (found.bytes, found.fits) == (options[wanted], bool(fitting))
        assert f"{found.bytes / 2**30:.1f}" in found.reason and "74.0" in found.reason
        seen.add((found.strategy, found.recompute, found.fits))
    assert len(seen) >= 8


def test_what_does_not_fit_says_how_it_would():
    found = choose(PRESETS["igpt_xl"], 128, 8, USABLE)
    assert found.reason == (
        "129.6 GiB are needed and 74.0 can be used: 66 images fit at once, so take 64 and accumulate_grad_batches 2"
    )
    assert choose(PRESETS["igpt_xl"], 64, 8, USABLE).fits
    alone = choose(PRESETS["igpt_xl"], 1, 1, USABLE)
    assert (
        not alone.fits and "not even one image fits: take more or larger devices, or FSDP over several" in alone.reason
    )
    prime = choose(PRESETS["igpt_s"], 997, 1, USABLE)
    assert "so take 1 and accumulate_grad_batches 997" in prime.reason


@pytest.mark.parametrize(("name", "batch_size", "devices", "compiled"), CASES)
def test_accumulating_comes_before_computing_again(name, batch_size, devices, compiled):
    config = PRESETS[f"igpt_{name}"]
    found = instead(config, batch_size, devices, USABLE, compiled=compiled)
    parts = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    choices = {n: choose(config, batch_size // n, devices, USABLE, compiled=compiled) for n in parts}
    plain = [n for n in parts if choices[n].fits and choices[n].recompute == "none"]
    fitting = [n for n in parts if choices[n].fits]
    best = (plain or fitting or [1])[0]
    assert found == (None if best == 1 else (best, choices[best]))


def test_the_largest_divisor_equals_that_of_a_search():
    for number, most in itertools.product(range(1, 80), range(1, 90)):
        assert largest_divisor(number, most) == max(size for size in range(1, most + 1) if number % size == 0)


@pytest.mark.parametrize("batch_size", [10**12, 999_999_999_989])  # the latter is prime
def test_huge_batches_are_answered_at_once(batch_size):
    config = PRESETS["igpt_s"]
    parts, part = instead(config, batch_size, 1, USABLE)
    assert part.fits and part.recompute == "none" and batch_size % parts == 0
    most = largest_batch(config, USABLE, recompute="full")
    assert f"{most} images fit at once" in choose(config, batch_size, 1, USABLE).reason


def test_with_dropout_selective_is_full():
    config = replace(PRESETS["igpt_l"], dropout=0.1)
    assert training_bytes(config, 4, recompute="selective") == training_bytes(config, 4, recompute="full")
    for batch_size in range(1, 200, 7):
        assert choose(config, batch_size, 8, USABLE).recompute != "selective"
    assert any(choose(PRESETS["igpt_l"], size, 8, USABLE).recompute == "selective" for size in range(1, 200, 7))


def test_a_strategy_that_was_told_is_the_only_one():
    config = PRESETS["igpt_s"]
    assert choose(config, 2, 8, USABLE).strategy == "ddp"
    assert choose(config, 2, 8, USABLE, only="fsdp").strategy == "fsdp"
    xl = choose(PRESETS["igpt_xl"], 1, 8, USABLE, only="ddp")
    assert (xl.strategy, xl.fits) == ("ddp", False)
    assert choose(config, 2, 1, USABLE, only="fsdp").strategy == "single"
    assert instead(PRESETS["igpt_xl"], 64, 8, USABLE, only="fsdp")[1].strategy == "fsdp"
    assert instead(PRESETS["igpt_xl"], 64, 8, USABLE, only="ddp") is None
