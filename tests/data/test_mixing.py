from collections import Counter

import datasets
import pytest
import torch

from lightning_igpt.data import FineTuneDataModule, PretrainDataModule, tokenize
from lightning_igpt.data.order import MIX_BLOCK, MixedOrder, mix_quotas
from lightning_igpt.palette import Palette
from tests.image_files import picture, rows, save_images, tiny


def order(sizes=(7, 50), weights=(3, 1), **options):
    return MixedOrder(sizes, weights, **{"global_batch": 10, "length": 10, "seed": 4, **options})


def test_every_thousand_draws_have_the_shares_exactly():
    mixed = order()
    drawn = [row for number in range(300) for row, _ in mixed.batch(number)]
    for start in range(0, 3000, MIX_BLOCK):
        assert sum(row < 7 for row in drawn[start : start + MIX_BLOCK]) == 750


def test_a_source_is_read_in_permutations():
    mixed = order()
    drawn = [row for number in range(300) for row, _ in mixed.batch(number)]
    for first, size in ((0, 7), (7, 50)):
        own = [row for row in drawn if first <= row < first + size]
        passes = [own[start : start + size] for start in range(0, len(own) - size, size)]
        assert all(sorted(one) == list(range(first, first + size)) for one in passes) and passes[0] != passes[1]


def test_a_batch_is_a_function_of_its_number():
    wanted = [order().batch(number) for number in range(250)]
    mixed = order()
    for number in (249, 3, 100, 101, 0, 199):  # also across the ends of blocks and passes
        assert mixed.batch(number) == wanted[number]
    assert len({sample for batch in wanted for _, sample in batch}) == 2500
    assert [order(seed=5).batch(number) for number in range(250)] != wanted


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_the_batches_of_one(world_size):
    ranks = [order(rank=rank, world_size=world_size) for rank in range(world_size)]
    for number in (0, 7, 99, 100):
        assert [draw for rank in ranks for draw in rank.batch(number)] == order().batch(number)


def test_quotas_are_the_nearest_whole_numbers():
    assert mix_quotas([0.7, 0.3]) == [700, 300] and mix_quotas([1, 1, 1]) == [334, 333, 333]
    for weights, message in (([1, 0], "above 0"), ([1, float("nan")], "above 0"), ([1, 1e-6], "a thousandth")):
        with pytest.raises(ValueError, match=message):
            mix_quotas(weights)


def ready(cls, *sources, **options):
    data = cls(list(sources), **{"batch_size": 10, "image_size": 4, **options})
    data.setup()
    return data


def values(loader, n_batches=None):
    batches = list(zip(range(n_batches or 10**6), loader, strict=False))
    return torch.cat([batch["image"][:, 0, 0, 0] for _, batch in batches]).tolist()


def other(n=40, start=100):
    return rows([picture(start + i) for i in range(n)]).rename_column("image", "photo")


def test_shares_of_images_and_validation_of_the_first():
    data = ready(PretrainDataModule, tiny(30), other(), source_weights=[1, 3])
    drawn, held_out = values(data.train_dataloader()), set(values(data.val_dataloader()))
    assert held_out < set(range(30)) and not held_out & set(drawn)
    assert Counter(value >= 100 for value in drawn)[True] in range(35, 61)  # of 60 draws
    assert "label" not in next(iter(data.train_dataloader())) and data.class_names is None


def test_without_weights_every_image_comes_once_a_pass():
    data = ready(PretrainDataModule, tiny(30), other(43), val_fraction=0.1)
    drawn = values(data.train_dataloader())
    assert len(drawn) == 70 == len(set(drawn))


def test_a_bad_image_is_named_by_its_own_source(tmp_path):
    folder = save_images(tmp_path / "web", ["1.png", "2.png", "3.png"])
    (folder / "2.png").write_bytes(b"<html>")
    data = ready(PretrainDataModule, tiny(30), str(folder), val_fraction=0, on_bad_image="skip", max_bad_share=1.0)
    values(data.train_dataloader())
    assert list(data.bad_images) == [f"{folder}, split 'train', row 1 ({folder / '2.png'})"]


def test_a_mix_of_streams_holds_out_of_the_first_alone():
    streams = tiny(30).to_iterable_dataset(3), other(20).to_iterable_dataset(2)
    data = ready(PretrainDataModule, *streams, source_weights=[1, 1], val_fraction=0.3, shuffle_buffer=5)
    drawn, held_out = set(values(data.train_dataloader(), 60)), set(values(data.val_dataloader()))
    assert held_out and held_out | drawn == set(range(30)) | set(range(100, 120)) and not held_out & drawn


def test_shares_of_a_mix_of_streams():
    streams = tiny(30).to_iterable_dataset(3), other(20).to_iterable_dataset(2)
    data = ready(PretrainDataModule, *streams, source_weights=[0.8, 0.2], val_fraction=0)
    count = Counter(value >= 100 for value in values(data.train_dataloader(), 200))
    assert 0.15 < count[True] / 2000 < 0.25


def test_mixes_that_make_no_sense():
    for sources, message in (
        ((tiny(30), tokenize(tiny(9), "gray:4", size=4)), "cannot be mixed"),
        ((tokenize(tiny(9), "gray:8", size=4), tokenize(tiny(9), "gray:4", size=4)), "cannot be mixed"),
        ((tiny(30), other().to_iterable_dataset()), "some sources of the mix are streams"),
        ((tiny(30), tiny(30)), "in the mix twice"),
    ):
        with pytest.raises(ValueError, match=message):
            ready(PretrainDataModule, *sources)
    with pytest.raises(ValueError, match="no common labels"):
        ready(FineTuneDataModule, tiny(30), tiny(30))
    with pytest.raises(ValueError, match="empty list"):
        PretrainDataModule([])


def test_tokens_are_mixed_too():
    data = ready(PretrainDataModule, tokenize(tiny(30), "gray:4", size=4), tokenize(tiny(9), "gray:4", size=4))
    assert next(iter(data.train_dataloader()))["tokens"].shape == (10, 16)


def test_every_row_of_a_token_stream_has_the_palette():
    palettes = [Palette.load(spec) for spec in ("gray:4", "gray:8")]
    both = [tiny(9).map(one.transform(size=4), batched=True, remove_columns=["image"]) for one in palettes]
    stream = datasets.concatenate_datasets([one.to_iterable_dataset() for one in both])
    data = PretrainDataModule(stream, batch_size=4, image_size=4, val_fraction=0)
    data.setup()
    with pytest.raises(ValueError, match="tokens of several palettes"):
        for _, _ in zip(range(9), data.train_dataloader(), strict=False):
            pass
