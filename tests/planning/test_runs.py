from dataclasses import replace

import pytest

from lightning_igpt.config import PRESETS
from lightning_igpt.planning import (
    DEVICES,
    Run,
    Schedule,
    cache_bytes,
    decode_seconds,
    find_device,
    forward_flops_per_token,
    paper_flops,
    paper_schedule,
    paper_size,
    parameter_count,
    token_bytes,
    train_flops_per_token,
    usual_mfu,
)
from lightning_igpt.planning.runs import IMAGENET, V100_DAYS, V100_FLOPS
from tests.networks import SMALL
from tests.planning.printed import shows

H100 = DEVICES["h100"]
GIB = 2**30


def config_of(name, side=32):
    return replace(PRESETS[f"igpt_{name}"], image_size=side)


def paper_run(name, side=32, **options):
    config = config_of(name, side)
    return Run(config, paper_schedule(config), H100, mfu=usual_mfu(config), **options)


# Size, side; millions of parameters, GFLOP per token forward and in training, share of attention in percent, floor in
# images per second, MFU in percent at best, floor forward.
@pytest.mark.parametrize(
    ("name", "side", "printed"),
    [
        ("s", 32, "76.6 0.177 0.530 14 1,474 36 4,421"),
        ("s", 48, "77.2 0.208 0.625 27 556 39 1,668"),
        ("s", 64, "78.1 0.252 0.757 40 258 43 774"),
        ("m", 32, "455.2 0.983 2.948 8 265 49 795"),
        ("m", 48, "456.5 1.077 3.231 16 107 50 322"),
        ("m", 64, "458.3 1.209 3.627 25 54 52 162"),
        ("l", 32, "1362 2.871 8.612 5 90.7 56 272"),
        ("l", 48, "1364 3.059 9.178 11 37.8 57 113"),
        ("l", 64, "1367 3.324 9.971 18 19.6 58 59"),
        ("xl", 32, "6801 13.97 41.91 3 18.6 65 56"),
        ("xl", 48, "6805 14.44 43.33 6 8.0 66 24"),
        ("xl", 64, "6811 15.10 45.31 10 4.3 66 13"),
    ],
)
def test_the_table_of_floors(name, side, printed):
    config, run = config_of(name, side), paper_run(name, side)
    attention = 2 * config.n_layer * config.n_embd * (config.n_positions + 1)
    found = [
        parameter_count(config) / 1e6,
        forward_flops_per_token(config) / 1e9,
        train_flops_per_token(config) / 1e9,
        100 * attention / forward_flops_per_token(config),
        run.schedule.images / run.floor_device_seconds,
        100 * run.ceiling_mfu,
        run.forward_images_per_second,
    ]
    assert all(shows(value, text) for value, text in zip(found, printed.split(), strict=True)), found


# Size, side; FLOPs, device-hours at the floor and at the usual MFU, and the time on 8 devices.
@pytest.mark.parametrize(
    ("name", "side", "flops", "floor", "stated", "of_eight", "unit"),
    [
        ("s", 32, 6.95e19, "24", "59", "7.4", 3600),
        ("m", 32, 3.86e20, "134", "241", "30", 3600),
        ("l", 32, 1.13e21, "392", "634", "3.3", 86400),
        ("l", 48, 2.71e21, "940", "1,520", "7.9", 86400),
        ("xl", 64, 2.38e22, "8,250", "13,340", "69", 86400),
    ],
)
def test_the_papers_schedule(name, side, flops, floor, stated, of_eight, unit):
    run = paper_run(name, side, devices=8)
    assert run.flops == pytest.approx(flops, rel=0.005)
    assert shows(run.floor_device_seconds / 3600, floor)
    assert shows(run.device_seconds / 3600, stated)
    assert abs(run.seconds / unit - float(of_eight)) < (0.05 if "." in of_eight else 0.6)
    assert run.schedule.images / IMAGENET == pytest.approx(100, abs=0.2)


def test_the_small_network_on_a_slow_cpu_takes_years():
    cpu = replace(H100, tflops_16=0.65, measured_16=None)
    run = Run(config_of("s"), Schedule(128, 1_000_000), cpu)
    assert shows(run.floor_device_seconds / 365.25 / 86400, "3.4")


def test_openais_run_of_the_large_network():
    assert pytest.approx(2.7e22, rel=0.01) == V100_DAYS * 86400 * V100_FLOPS
    assert 0.04 < paper_run("l").flops / (V100_DAYS * 86400 * V100_FLOPS) < 0.10
    assert [paper_size(config_of(name)) for name in ("tiny", "s", "m", "l", "xl")] == [None, "S", "M", "L", "XL"]


def test_the_papers_flops():
    """Of the size at the paper's resolution, whatever the run's."""
    for name, side in (("s", 32), ("m", 32), ("l", 32), ("xl", 64)):
        assert paper_flops(config_of(name, 48)) == paper_run(name, side).flops
    assert paper_run("s", 64).flops / paper_flops(config_of("s", 64)) == pytest.approx(5.7, abs=0.05)
    bert = replace(config_of("s"), objective="bert")
    assert paper_flops(bert) == replace(paper_run("s"), config=bert).flops
    assert paper_flops(SMALL) is None


def test_a_cpu_without_bfloat16_is_told_what_it_can_train_in():
    cpu = replace(DEVICES["t4"], name="this CPU (2 threads)", torch_name="")
    with pytest.raises(ValueError, match=r"^this CPU \(2 threads\) is no faster in bfloat16; take precision 32-true$"):
        Run(SMALL, Schedule(1, 1), cpu)


# Size; tokens per second of 1, 16, 64 and 256 images decoded together, where printed.
@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("s", "16,979 86,616 108,959 116,470"),
        ("m", "3,053 22,695 33,456 37,955"),
        ("l", "1,045 9,347 15,505 18,562"),
        ("xl", "215 2,445 5,086"),
    ],
)
def test_the_table_of_decoding(name, printed):
    for size, text in zip((1, 16, 64, 256), printed.split(), strict=False):
        assert shows(size / decode_seconds(config_of(name), H100, size), text)


@pytest.mark.parametrize(
    ("name", "printed"), [("s", "48 108 192"), ("m", "144 324 576"), ("l", "288 648 1152"), ("xl", "720 1620 2880")]
)
def test_keys_and_values(name, printed):
    for side, text in zip((32, 48, 64), printed.split(), strict=True):
        assert cache_bytes(config_of(name, side)) == int(text) * 2**20
    assert cache_bytes(config_of("s"), 3, 4) == 6 * cache_bytes(config_of("s"))


def test_decoding_of_many_images_is_bound_by_arithmetic_where_memory_is_fast():
    fast = replace(H100, measured_bandwidth=1e18)
    flops = 2 * (12 * 24 * 512**2 + 512**2) + 4 * 24 * 512 * 512
    assert decode_seconds(config_of("s"), fast, 100) == pytest.approx(100 * flops / 800e12)


def test_data_and_files():
    assert shows(token_bytes(config_of("s")) / 1e9, "2.6")
    run = paper_run("s")
    assert run.images_per_second == pytest.approx(run.schedule.images / run.seconds)
    assert 550 < run.images_per_second < 650 and 1 < run.decoding_cores < 2
    assert 140 < paper_run("m").images_per_second < 160 and 50 < paper_run("l").images_per_second < 60
    assert paper_run("s", devices=4).images_per_second == pytest.approx(4 * run.images_per_second)


def test_time_follows_precision():
    run = paper_run("s")
    full = replace(run, precision="32-true")
    assert full.device_seconds == pytest.approx(run.device_seconds * 989.4 / 494.7)  # TF32
    old = replace(run, device=find_device("v100"), precision="32-true")
    assert old.device_seconds == pytest.approx(run.device_seconds * 989.4 / 15.7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mfu": 45}, "mfu is 45; it is a share above 0 and up to 1, such as 0.45"),
        ({"mfu": 0}, "mfu is 0"),
        ({"devices": 0}, "devices is 0; it must be at least 1"),
        ({"schedule": Schedule(0, 1)}, "batch_size is 0"),
        ({"schedule": Schedule(1, 0)}, "steps is 0"),
        ({"device": DEVICES["t4"]}, "a T4 has no bfloat16; take precision 16-mixed or 32-true"),
        ({"precision": "64-true"}, "precision is '64-true'"),
    ],
)
def test_wrong_runs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Run(**{"config": SMALL, "schedule": Schedule(1, 1), "device": H100} | change)
