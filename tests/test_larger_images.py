"""docs/how-to/larger-images.md: its table is what planning reckons, its recipes and advice fit."""

from dataclasses import replace

import pytest

from lightning_igpt.callbacks.recompute import decide
from lightning_igpt.config import PRESETS
from lightning_igpt.planning import (
    ACTIVATION_BYTES,
    PAPER,
    RECOMPUTE,
    Run,
    find_device,
    forward_flops_per_token,
    largest_batch,
    training_bytes,
    usual_mfu,
)
from tests.docs.pages import PAGES, table
from tests.test_recipes import header, images_per_step, network_of, read

PAGE = "docs/how-to/larger-images.md"
ROWS = table(PAGE, r"[SML], \d+ px")
SMALL_GPU, LARGE_GPU = find_device("rtx4090"), find_device("h100")


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_row_of_the_table(row):
    size, side = row[0].removesuffix(" px").split(", ")
    config = replace(PRESETS[f"igpt_{size.lower()}"], image_size=int(side))
    totals = [[sum(training_bytes(config, n, recompute=how).values()) for n in (1, 2)] for how in RECOMPUTE]
    attention = 2 * config.n_layer * config.n_embd * (config.n_positions + 1) / forward_flops_per_token(config)
    run = Run(config, PAPER, LARGE_GPU, mfu=usual_mfu(config))
    assert row[1:] == [
        f"{config.n_positions:,}",
        f"{100 * attention:.0f} %",
        " / ".join(f"{(two - one) / 2**30:.2f}" for one, two in totals),
        *(
            " / ".join(str(largest_batch(config, device.usable, recompute=how)) for how in RECOMPUTE)
            for device in (SMALL_GPU, LARGE_GPU)
        ),
        f"{run.seconds / 3600:,.0f}",
    ]


def test_the_table_has_three_networks_at_three_sizes_and_its_text_the_numbers_behind_it():
    assert [row[0] for row in ROWS] == [f"{size}, {side} px" for size in "SML" for side in (32, 48, 64)]
    assert [SMALL_GPU.memory, LARGE_GPU.memory] == [24 * 2**30, 80 * 2**30]
    shares = [usual_mfu(PRESETS[f"igpt_{size}"]) for size in "sml"]
    said = "at {:.0%} (S), {:.0%} (M) or {:.0%} (L)".format(*shares).replace("%", " %")
    assert said in " ".join(PAGES[PAGE].split())
    config = replace(PRESETS["igpt_l"], n_layer=1000)
    per_unit = 1000 * config.n_embd * config.n_positions
    kept = [training_bytes(config, 1, recompute=how)["activations"] / per_unit for how in RECOMPUTE]
    assert [round(value) for value in kept] == [
        int(row[1].split(":")[0]) for row in table(PAGE, "`(none|select|full).*")
    ]
    assert f"{ACTIVATION_BYTES['bf16-mixed']} bytes per token" in PAGES[PAGE]
    compiled = training_bytes(config, 1, compiled=True)["activations"] / per_unit
    assert f"({compiled:.0f} compiled)" in PAGES[PAGE]


@pytest.mark.parametrize("name", ["imagenet48_s_pretrain", "imagenet64_s_pretrain", "imagenet64_m_pretrain"])
def test_the_recipes_for_one_gpu(name):
    recipe = read(name)
    config, batch_size = network_of(recipe), recipe["data"]["init_args"]["batch_size"]
    size, side = name.split("_")[1], int(name[8:10])
    assert config == replace(PRESETS[f"igpt_{size}"], image_size=side) and f"`{name}`" in PAGES[PAGE]
    trainer = recipe["trainer"]
    assert images_per_step(recipe) == PAPER.batch_size and trainer["max_steps"] == PAPER.steps
    assert trainer["devices"] == 1 and trainer["val_check_interval"] == 10_000 * trainer["accumulate_grad_batches"]
    assert batch_size * trainer["limit_val_batches"] == 10_240
    assert decide(config, batch_size, LARGE_GPU.usable).how == "none"
    assert 2 * batch_size > largest_batch(config, LARGE_GPU.usable)
    assert decide(config, batch_size, SMALL_GPU.usable).how == "selective"  # the header: a smaller GPU does too
    hours = Run(config, PAPER, LARGE_GPU, mfu=usual_mfu(config)).seconds / 3600
    said = f"{hours:,.0f} hours of one H100 at {100 * usual_mfu(config):.0f} % of its peak"
    assert said in " ".join(header(name))
