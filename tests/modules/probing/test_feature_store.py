import tempfile

import pytest
import torch

from lightning_igpt.modules.probing.feature_store import FeatureStore


def fill(store, n_batches=3):
    generator = torch.manual_seed(0)
    features = torch.randn(n_batches * 5, 4, 7, generator=generator)
    for i, part in enumerate(features.split(5)):
        store.add(part, torch.full((5,), i), torch.arange(i * 5, i * 5 + 5))
    return features


@pytest.mark.parametrize(("max_bytes", "on_disk"), [(15 * 4 * 7 * 4, False), (15 * 4 * 7 * 4 - 1, True), (0, True)])
def test_columns_come_back_in_order_from_memory_and_files(max_bytes, on_disk):
    store = FeatureStore(max_bytes)
    features = fill(store)
    assert store.on_disk is on_disk and len(store) == 15
    for index in range(4):
        column = store.column(index)
        assert column.is_contiguous() and torch.equal(column, features[:, index])
    assert store.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert store.numbers.tolist() == list(range(15))


@pytest.mark.parametrize("max_bytes", [10**6, 0])
def test_closing_forgets_and_begins_anew(max_bytes):
    store = FeatureStore(max_bytes)
    features = fill(store)
    column = store.column(2)
    store.close()
    assert len(store) == 0 and not store.on_disk
    assert torch.equal(column, features[:, 2])  # a map outlives its file
    fill(store)
    assert torch.equal(store.column(1), features[:, 1])


def test_other_types_become_float32_also_in_inference():
    with torch.inference_mode():
        store = FeatureStore(0)
        store.add(torch.ones(2, 1, 3, dtype=torch.bfloat16), torch.tensor([0, 1]), torch.tensor([0, 1]))
        assert store.column(0).dtype == torch.float32


def test_files_have_no_names(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = FeatureStore(0)
    fill(store)
    assert store.on_disk and not list(tmp_path.iterdir())


def test_a_full_disk_is_named(monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(OSError, match=r"560 bytes so far, do not fit into .* TMPDIR .*No space left"):
        fill(FeatureStore(0))
