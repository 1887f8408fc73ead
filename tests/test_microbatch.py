import copy
import re
import time

import pytest
import torch
from lightning_igpt.commands.launch_batch import Recipe
from lightning_igpt.commands.microbatch import fit_options

from lightning_igpt.__main__ import main
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.microbatch import (
    GIB,
    MemoryMeter,
    MicroBatch,
    divisors,
    find_micro_batch,
    last_that_fits,
    place_of,
    readable,
)
from lightning_igpt.modules import PretrainModule
from lightning_igpt.planning import parameter_count, training_bytes

SHAPE = ImageGPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=8, image_size=8)


def module(**options):
    torch.manual_seed(0)
    return PretrainModule(ImageGPTConfig(**SHAPE.to_dict() | options), "gray:8")


def find(made, batch_size, memory_bytes, **options):
    return find_micro_batch(
        made, batch_size, device="cpu", precision="32-true", memory_bytes=memory_bytes, safety=1.0, **options
    )


@pytest.mark.parametrize("n", range(1, 9))
def test_the_search_is_right_for_every_answer_and_guess(n):
    sizes = [2**power for power in range(n)]
    for answer in range(-1, n):
        for guess in range(-2, n + 2):
            asked = []

            def fits(size, asked=asked, answer=answer):
                asked.append(size)
                return sizes.index(size) <= answer

            found = last_that_fits(sizes, fits, guess)
            assert found == (None if answer < 0 else sizes[answer])
            assert len(set(asked)) == len(asked)
            if guess == answer:
                assert len(asked) <= 2


def test_divisors():
    assert [divisors(n) for n in (1, 12, 13)] == [[1], [1, 2, 3, 4, 6, 12], [1, 13]]


def test_the_meter_counts_storages_once_and_only_while_they_live():
    held, ignored = torch.zeros(10), torch.zeros(100)
    with MemoryMeter(held=[held, held[:5]], ignored=[ignored]) as meter:
        assert meter.live == 40
        one = held + 1
        views = [one[2:], one.view(2, 5), ignored[3:]]
        assert meter.live == 80
        two = torch.cat([one, one])
        del one
        assert meter.live == 160  # a view holds it
        del views
        assert meter.live == 120
        two.add_(1)
        del two
        assert (meter.live, meter.peak) == (40, 160)


def test_the_largest_that_fits_is_found():
    made = module(n_layer=1)
    steps = {size: find(made, size, GIB).bytes for size in (1, 2, 4)}
    assert steps[1] < steps[2] < steps[4]
    for memory in (steps[4], 2 * steps[4]):
        found = find(made, 12, memory)
        assert found.batch_size * found.accumulate_grad_batches == 12
        assert found.bytes == found.tried[found.batch_size] <= memory
        larger = [peak for size, peak in found.tried.items() if size > found.batch_size]
        assert larger and min(larger) > memory
    half = find(made, 12, memory, devices=2)
    assert half.batch_size * half.accumulate_grad_batches == 6 and half.batch_size <= found.batch_size


def test_a_smaller_batch_accumulates_gradients():
    made = module()
    alone, whole = (find(made, size, GIB).bytes for size in (1, 2))
    found = find(made, 2, whole - 1)
    assert (found.batch_size, found.accumulate_grad_batches) == (1, 2)
    assert alone <= found.bytes < whole


@pytest.mark.parametrize("options", [{"objective": "bert"}, {"dropout": 0.2}], ids=["bert", "dropout"])
def test_other_networks(options):
    found = find(module(**options), 4, GIB, recompute="selective")
    assert found == MicroBatch(4, 1, found.bytes, {4: found.bytes})


def test_what_it_measures_is_about_what_planning_reckons():
    made = module()
    for how in ("none", "selective", "full"):
        measured = find(made, 16, GIB, recompute=how).bytes
        reckoned = sum(training_bytes(made.config, 16, "32-true", recompute=how).values())
        assert 0.6 * reckoned < measured < 1.3 * reckoned
    assert find(made, 1, GIB).bytes > 16 * parameter_count(made.config)


def test_recomputing_makes_room():
    made = module(n_layer=6)
    memory = find(made, 2, GIB).bytes
    found = [find(made, 8, memory, recompute=how).batch_size for how in ("none", "full")]
    assert found[0] < found[1]
    assert {block.recompute for block in made.network.blocks()} == {"none"}


def test_it_leaves_module_gradients_optimiser_and_random_numbers_alone():
    """Against a twin that was never tried: both train on, with dropout, to the same bits."""
    twins = []
    for tried in (True, False):
        made = module(dropout=0.2)
        optimizer = torch.optim.AdamW(made.parameters(), lr=0.01)

        def step(made=made, optimizer=optimizer):
            logits = made.network(torch.randint(8, (2, 64)))
            logits.square().mean().backward()
            optimizer.step()

        step()
        before = copy.deepcopy(made.state_dict())
        if tried:
            find(made, 4, GIB, recompute="full")
            assert all(map(torch.equal, before.values(), made.state_dict().values()))
            assert made.training and made._trainer is None
        step()
        twins.append([*made.state_dict().values(), *(p.grad for p in made.parameters()), torch.get_rng_state()])
        twins[-1] += [value for state in optimizer.state.values() for value in state.values()]
    assert all(map(torch.equal, *twins))


def test_wrong_arguments_name_the_cure():
    made = module()
    with pytest.raises(ValueError, match="12 images cannot be shared by 5 devices"):
        find(made, 12, GIB, devices=5)
    with pytest.raises(
        ValueError,
        match=r"one image at a time takes [\d.]+ MiB, and 0\.98 KiB may be used: recompute='full' \(--recompute full\)",
    ):
        find(made, 12, 1000)
    with pytest.raises(ValueError, match=r"a cpu device does not say .* used up: give memory_bytes \(--memory-gib\)"):
        find_micro_batch(made, 12, device="cpu")
    with pytest.raises(ValueError, match="precision is '64-true'; it must be one of bf16-mixed, 32-true"):
        find_micro_batch(made, 12, device="cpu", precision="64-true", memory_bytes=GIB)
    with pytest.raises(ValueError, match="recompute is 'some'"):
        find(made, 12, GIB, recompute="some")
    with pytest.raises(ValueError, match=r"memory_bytes \(--memory-gib\) is 0"):
        find(made, 12, 0)
    for wrong in (0, 10.5, True):
        with pytest.raises(ValueError, match=f"batch_size is {wrong}; it must be a whole number from 1 on"):
            find(made, wrong, GIB)
    with pytest.raises(ValueError, match="devices is 0;"):
        find(made, 12, GIB, devices=0)


@pytest.mark.parametrize("name", ["gpu", "meta", "mps", ""])
def test_it_tries_on_a_cpu_or_a_gpu_of_cuda(name):
    with pytest.raises(ValueError, match=f"device is '{name}'; it must be cpu, cuda or auto"):
        find_micro_batch(module(), 12, device=name, memory_bytes=GIB)


def test_a_gpu_that_is_not_there():
    if not torch.cuda.is_available():
        assert place_of("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="device is 'cuda', and torch finds no CUDA GPU here: take cpu"):
            find_micro_batch(module(), 12, device="cuda", memory_bytes=GIB)
    else:
        with pytest.raises(ValueError, match="device is 'cuda:99', and the last of"):
            place_of("cuda:99")


def test_little_memory_is_told_in_small_units():
    sizes = (3 * GIB, GIB // 8, GIB // 100, 2**20, 1000, 1)
    assert [readable(size) for size in sizes] == [
        "3.00 GiB",
        "0.12 GiB",
        "10.24 MiB",
        "1.00 MiB",
        "0.98 KiB",
        "0.00 KiB",
    ]


RECIPE = """
model:
  class_path: PretrainModule
  init_args:
    network: {n_layer: 2, n_head: 2, n_embd: 32, vocab_size: 8, image_size: 8}
    palette: gray:8
data: {class_path: PretrainDataModule, init_args: {source: digits, batch_size: 4}}
trainer: {devices: 2, accumulate_grad_batches: 3, max_steps: 10, val_check_interval: 30, limit_val_batches: 5}
"""


def test_the_verb_prints_options_that_keep_the_step(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    words = ["microbatch", "--config", str(tmp_path / "mine.yaml"), "--device", "cpu", "--precision", "32-true"]
    assert main([*words, "--memory_gib", "1", "--recompute", "full"]) == 0
    *sizes, last = capsys.readouterr().out.splitlines()
    assert [line.split(" images")[0].strip() for line in sizes] == ["12"]
    assert last == (
        "for fit: --data.init_args.batch_size 12 --trainer.accumulate_grad_batches 1 "
        "--trainer.val_check_interval 10 --trainer.limit_val_batches 2 --trainer.precision 32-true "
        "--trainer.recompute full"
    )
    assert main([*words, "--memory_gib", "0.0015", "--devices", "1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    options = dict(zip(last[2::2], last[3::2], strict=True))
    size = int(options["--data.init_args.batch_size"])
    assert size < 24 and size * int(options["--trainer.accumulate_grad_batches"]) == 24
    assert options["--trainer.devices"] == "1"
    assert int(options["--trainer.val_check_interval"]) == 10 * 24 // size


BATCH_AND_ACCUMULATE = ("data.init_args.batch_size", "trainer.accumulate_grad_batches")


def recipe(folder, trainer, *, batch_size=4, data=None, model=None):
    """A recipe's file."""
    data = data or f"{{class_path: PretrainDataModule, init_args: {{source: digits, batch_size: {batch_size}}}}}"
    network = "{n_layer: 1, n_head: 2, n_embd: 8, vocab_size: 8, image_size: 4}"
    model = model or f"{{class_path: PretrainModule, init_args: {{network: {network}, palette: gray:8}}}}"
    (folder / "recipe.yaml").write_text(f"model: {model}\ndata: {data}\ntrainer: {{max_steps: 9, {trainer}}}\n")
    return str(folder / "recipe.yaml")


def options_for_fit(capsys, file, *words):
    """What the verb prints, by name."""
    assert main(["microbatch", "--config", file, "--device", "cpu", "--memory-gib", "1", *words]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[:2] == ["for", "fit:"]
    return {name.removeprefix("--"): value for name, value in zip(last[2::2], last[3::2], strict=True)}


def test_numbers_that_count_batches_follow(tmp_path):
    found = MicroBatch(2, 64, 0)
    counts = "val_check_interval: 40_000, limit_val_batches: 320, limit_train_batches: 50_000"
    file = recipe(tmp_path, f"devices: 8, accumulate_grad_batches: 4, {counts}")
    assert fit_options(Recipe(file), found, 1) == {
        "data.init_args.batch_size": 2,
        "trainer.accumulate_grad_batches": 64,
        "trainer.val_check_interval": 640_000,
        "trainer.limit_train_batches": 800_000,
        "trainer.limit_val_batches": 5120,
    }
    shares = "val_check_interval: 0.5, limit_val_batches: 1.0"  # of an epoch, whatever the batch
    file = recipe(tmp_path, f"devices: 8, accumulate_grad_batches: 4, {shares}")
    assert set(fit_options(Recipe(file), found, 1)) == {"data.init_args.batch_size", "trainer.accumulate_grad_batches"}


@pytest.mark.parametrize("devices", [1, 2, 4, 16])
def test_validation_sees_the_images_it_did_and_comes_before_the_epoch_ends(tmp_path, capsys, devices):
    counts = "limit_val_batches: 6, limit_train_batches: 32, val_check_interval: 32"
    file = recipe(tmp_path, f"devices: 1, accumulate_grad_batches: 4, {counts}", batch_size=16)
    options = options_for_fit(capsys, file, "--devices", str(devices))
    size, accumulate = (int(options[name]) for name in BATCH_AND_ACCUMULATE)
    assert size * devices * accumulate == 64
    validated, trained = (int(options[f"trainer.limit_{which}_batches"]) for which in ("val", "train"))
    assert validated * size * devices in (96, 128)  # a whole number of batches, with 64 images in each
    assert trained * size * devices == 32 * 16
    assert int(options["trainer.val_check_interval"]) == 32 * accumulate // 4 <= trained


@pytest.mark.parametrize("words", [[], ["--devices", "2"], ["--devices", "4"], ["--devices", "1"]], ids=" ".join)
def test_a_recipe_of_two_machines_keeps_its_step(tmp_path, capsys, words):
    options = options_for_fit(capsys, recipe(tmp_path, "devices: 2, num_nodes: 2", batch_size=16), *words)
    devices, nodes = (int(options.get(f"trainer.{name}", 2)) for name in ("devices", "num_nodes"))
    size, accumulate = (int(options[name]) for name in BATCH_AND_ACCUMULATE)
    assert size * accumulate * devices * nodes == 64
    assert devices * nodes == (int(words[1]) if words else 4)
    assert ("trainer.devices" in options) == bool(words)


@pytest.mark.parametrize("named", ["'0,1'", "[0, 1]", "[4, 7]", "2", "'2'"])
def test_devices_by_number_are_counted(tmp_path, capsys, named):
    file = recipe(tmp_path, f"devices: {named}, recompute: none", batch_size=8)
    kept = dict(zip(BATCH_AND_ACCUMULATE, ("8", "1"), strict=True))
    assert options_for_fit(capsys, file) == options_for_fit(capsys, file, "--devices", "2") == kept
    alone = options_for_fit(capsys, file, "--devices", "1")
    assert alone == {"trainer.devices": "1"} | kept | {"data.init_args.batch_size": "16"}


def test_a_recipe_without_devices_is_for_one(tmp_path, capsys):
    for named in ("devices: auto", "devices: -1", "logger: false"):
        options = options_for_fit(capsys, recipe(tmp_path, named))
        assert (options["trainer.devices"], options["data.init_args.batch_size"]) == ("1", "4")


def test_precision_recompute_and_compile_are_the_recipes_unless_told(tmp_path, capsys, monkeypatch):
    asked = []

    def watched(*args, **options):
        asked.append({name: options[name] for name in ("precision", "recompute", "compiled")})
        return find_micro_batch(*args, **options | {"compiled": False})  # compiling takes long

    monkeypatch.setattr("lightning_igpt.commands.microbatch.find_micro_batch", watched)
    told = {"precision": "32-true", "recompute": "full", "compiled": True}
    file = recipe(tmp_path, "devices: 1, precision: 32, recompute: full, compile: true")
    assert set(options_for_fit(capsys, file)) == set(BATCH_AND_ACCUMULATE)
    assert asked.pop() == told
    same = ["--precision", "32-true", "--recompute", "full", "--compile"]
    assert set(options_for_fit(capsys, file, *same)) == set(BATCH_AND_ACCUMULATE)
    assert asked.pop() == told
    others = options_for_fit(
        capsys, file, "--precision", "bf16-mixed", "--recompute", "selective", "--compile", "false"
    )
    assert asked.pop() == {"precision": "bf16-mixed", "recompute": "selective", "compiled": False}
    differing = {"trainer.precision": "bf16-mixed", "trainer.recompute": "selective", "trainer.compile": "false"}
    assert differing.items() <= others.items()

    file = recipe(tmp_path, "devices: 1, compile: auto, recompute: auto")
    assert {name for name in options_for_fit(capsys, file) if name.startswith("trainer.")} == {
        "trainer.accumulate_grad_batches",
        "trainer.recompute",  # none was tried, and auto might take another
    }
    assert asked.pop() == {"precision": None, "recompute": "none", "compiled": False}
    options = options_for_fit(capsys, file, "--precision", "32-true", "--compile")
    assert (options["trainer.precision"], options["trainer.compile"]) == ("32-true", "true")


def refusal(file, *words):
    with pytest.raises(SystemExit) as stopped:
        main(["microbatch", "--config", file, *words])
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


ON_CPU = ["--device", "cpu", "--memory-gib", "1"]


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ("strategy: fsdp2", "has trainer.strategy fsdp2, which spreads the network over the devices"),
        ("strategy: {class_path: lightning.pytorch.strategies.ModelParallelStrategy}", "ModelParallelStrategy, which"),
        ("strategy: deepspeed_stage_2", "name another strategy, such as ddp"),
        ("precision: 16-mixed", "trainer.precision is '16-mixed', and microbatch tries bf16-mixed and 32-true: give"),
        ("recompute: some", "trainer.recompute is 'some'; it must be one of auto, none, selective, full"),
        ("compile: 1", "trainer.compile is 1; it must be one of auto, true, false"),
        ("accumulate_grad_batches: 0", "trainer.accumulate_grad_batches is 0; it must be at least 1"),
        ("devices: two", "trainer.devices is 'two'; it must be a whole number"),
    ],
)
def test_a_trainer_that_is_not_tried(tmp_path, trainer, said):
    assert said in refusal(recipe(tmp_path, trainer), *ON_CPU)


def test_a_strategy_that_copies_the_network_is_tried(tmp_path, capsys):
    for strategy in ("auto", "ddp", "{class_path: lightning.pytorch.strategies.DDPStrategy}"):
        assert options_for_fit(capsys, recipe(tmp_path, f"devices: 2, strategy: {strategy}"))


def test_wrong_options_are_named_as_the_command_line_has_them(tmp_path):
    assert "data.init_args.batch_size is 10.5; it must be a whole number" in refusal(
        recipe(tmp_path, "devices: 2", batch_size=10.5), *ON_CPU
    )
    file = recipe(tmp_path, "devices: 2")
    for words, said in (
        (["--device", "cpu"], "(--memory-gib)"),
        (["--device", "cpu", "--memory-gib", "0"], "--memory-gib is 0.0; it must be a number above 0"),
        (["--device", "cpu", "--memory-gib", ".nan"], "--memory-gib is nan"),
        (["--device", "cpu", "--memory-gib", "1e-6"], "KiB may be used"),
        (["--device", "gpu"], "device is 'gpu'; it must be cpu, cuda or auto"),
        (["--device", "meta"], "device is 'meta'"),
        ([*ON_CPU, "--devices", "0"], "--devices is 0"),
        ([*ON_CPU, "--devices", "3"], "cannot be shared by 3 devices"),
    ):
        assert said in refusal(file, *words)
    if not torch.cuda.is_available():
        assert "torch finds no CUDA GPU here" in refusal(file, "--device", "cuda")


def test_a_large_network_is_not_built_for_a_wrong_number():
    started = time.monotonic()
    assert "take 2 or 4 devices" in refusal("imagenet64_xl_pretrain", *ON_CPU, "--devices", "3")
    assert "device is 'meta'" in refusal("imagenet64_xl_pretrain", "--device", "meta")
    assert "--memory-gib" in refusal("imagenet64_xl_pretrain", "--device", "cpu")
    assert time.monotonic() - started < 5


def test_module_and_data_may_be_plain_names(tmp_path, capsys, monkeypatch):
    def made(**options):
        assert options == {"defer_init": False}
        return PretrainModule(SHAPE, "gray:8")  # the default is iGPT-S

    made.__name__ = "PretrainModule"
    monkeypatch.setattr("lightning_igpt.commands.microbatch.PretrainModule", made)
    file = recipe(tmp_path, "devices: 1", model="PretrainModule", data="PretrainDataModule")
    options = options_for_fit(capsys, file)
    assert int(options["data.init_args.batch_size"]) == 128  # the data modules' default


def test_the_verb_wants_a_recipe_that_pretrains(tmp_path):
    ours = "{class_path: PretrainDataModule}"
    for options, said in (
        ({"model": "{class_path: ProbeModule}", "data": ours}, "does not pretrain: its model is ProbeModule"),
        ({"model": "ProbeModule", "data": ours}, "does not pretrain: its model is ProbeModule"),
        ({"data": "{class_path: ProbeDataModule}"}, "does not pretrain: its data are ProbeDataModule"),
        ({"data": "{class_path: other.Images}"}, "has no batch_size to go by"),
    ):
        assert re.search(said, refusal(recipe(tmp_path, "devices: 1", **options), *ON_CPU))


@pytest.mark.gpu
def test_on_a_gpu_the_found_size_trains_and_too_little_memory_is_no_error():
    made = module(n_layer=4, n_embd=256, image_size=32)
    images = 2**20
    found = find_micro_batch(made, images, device="cuda", recompute="selective")
    assert 1 < found.batch_size < images and None in found.tried.values()
    total = torch.cuda.get_device_properties(0).total_memory
    assert 0.3 * total < found.bytes <= 0.95 * total
    assert torch.cuda.memory_allocated() < 0.01 * total  # nothing stays there
    eighth = find_micro_batch(made, images, device="cuda", recompute="selective", memory_bytes=total // 8)
    assert eighth.batch_size in (found.batch_size // 16, found.batch_size // 8, found.batch_size // 4)
