import copy

import pytest
import torch

from lightning_igpt.__main__ import main
from lightning_igpt.commands.microbatch import fit_options
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.microbatch import GIB, MemoryMeter, MicroBatch, divisors, find_micro_batch, last_that_fits
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
        ValueError, match=r"one image at a time takes 0\.00 GiB, and 0\.00 GiB may be used: recompute='full'"
    ):
        find(made, 12, 1000)
    with pytest.raises(ValueError, match="a cpu device does not say when its memory is used up: give memory_bytes"):
        find_micro_batch(made, 12, device="cpu")
    with pytest.raises(ValueError, match="precision is '64-true'; it must be one of bf16-mixed, 32-true"):
        find_micro_batch(made, 12, device="cpu", precision="64-true", memory_bytes=GIB)
    with pytest.raises(ValueError, match="recompute is 'some'"):
        find(made, 12, GIB, recompute="some")
    with pytest.raises(ValueError, match="memory_bytes is 0"):
        find(made, 12, 0)


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
        "--trainer.val_check_interval 10 --trainer.limit_val_batches 2 --trainer.recompute full"
    )
    assert main([*words, "--memory_gib", "0.0015", "--devices", "1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    options = dict(zip(last[2::2], last[3::2], strict=True))
    size = int(options["--data.init_args.batch_size"])
    assert size < 24 and size * int(options["--trainer.accumulate_grad_batches"]) == 24
    assert options["--trainer.devices"] == "1"
    assert int(options["--trainer.val_check_interval"]) == 10 * 24 // size


def test_numbers_that_count_batches_follow():
    found = MicroBatch(2, 64, 0)
    assert fit_options(found, {"val_check_interval": 40_000, "limit_val_batches": 320}, 4, 4) == {
        "data.init_args.batch_size": 2,
        "trainer.accumulate_grad_batches": 64,
        "trainer.val_check_interval": 640_000,
        "trainer.limit_val_batches": 640,
    }
    shares = {"val_check_interval": 0.5, "limit_val_batches": 1.0}  # of an epoch, whatever the batch
    assert set(fit_options(found, shares, 4, 4)) == {"data.init_args.batch_size", "trainer.accumulate_grad_batches"}


def test_the_verb_wants_a_recipe_that_pretrains(tmp_path):
    for text, said in (
        ("model: {class_path: ProbeModule}\ndata: {}", "does not pretrain: its model is ProbeModule"),
        ("model: {class_path: PretrainModule}\ndata: {}", "names no data.init_args.batch_size"),
    ):
        (tmp_path / "other.yaml").write_text(text)
        with pytest.raises(SystemExit, match=said):
            main(["microbatch", "--config", str(tmp_path / "other.yaml")])


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
