"""docs/how-to/larger-images.md: its table is what planning reckons, its recipes and advice fit."""

from dataclasses import replace

import pytest
from lightning_igpt.planning.devices import find_device
from lightning_igpt.planning.runs import PAPER, Run, usual_mfu

from lightning_igpt.callbacks.recompute import decide
from lightning_igpt.config import PRESETS
from lightning_igpt.planning import RECOMPUTE, forward_flops_per_token, largest_batch, training_bytes
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
        f"{run.device_seconds / 3600:,.0f}",
    ]


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
    hours = Run(config, PAPER, LARGE_GPU, mfu=usual_mfu(config)).device_seconds / 3600
    said = f"{hours:,.0f} hours of one H100 at {100 * usual_mfu(config):.0f} % of its peak"
    assert said in " ".join(header(name))
