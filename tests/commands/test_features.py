import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from lightning_igpt.__main__ import main
from lightning_igpt.commands import features as verb
from lightning_igpt.commands import images
from lightning_igpt.commands.images import read_images
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.data.embedded import load_digits
from lightning_igpt.palette import Palette
from lightning_igpt.weights import save_pretrained
from tests.image_files import save_images
from tests.networks import random_network

AUTOREGRESSIVE, BERT = (
    ImageGPTConfig(n_layer=4, n_head=2, n_embd=16, vocab_size=16, image_size=8, objective=objective)
    for objective in ("autoregressive", "bert")
)
PALETTE = Palette.load("gray:16")


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(verb, "ROWS", 8)


def run(folder, out, *words, config=AUTOREGRESSIVE, source="digits"):
    save_pretrained(folder / "network", random_network(config), PALETTE)
    needed = ["--pretrained", str(folder / "network"), "--source", source, "--out", str(out)]
    return main(["features", *needed, "--batch_size", "3", *words])


def expected(config, layer, pool, n):
    """Of the first n images, by the network's own parts."""
    network, tokens = random_network(config), PALETTE.quantize(read_images("digits", 8, limit=n)[0])
    kept, norm = [], network.ln_f if layer == 4 else network.h[layer].ln_1
    handle = norm.register_forward_hook(lambda _, inputs, output: kept.append(output))
    with torch.no_grad():
        network(tokens, **({"masked": torch.zeros_like(tokens, dtype=torch.bool)} if config is BERT else {}))
    handle.remove()
    return kept[0].mean(1) if pool == "mean" else kept[0][:, -1]


@pytest.mark.parametrize(("config", "pool"), [(AUTOREGRESSIVE, "mean"), (AUTOREGRESSIVE, "last"), (BERT, "mean")])
def test_a_row_for_each_image_and_a_list_for_each_layer(tmp_path, config, pool):
    words = ("--layers", "1-2", "4", "--pool", pool, "--limit", "20")
    assert run(tmp_path, tmp_path / "x.parquet", *words, config=config) == 0
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)] == [8, 8, 4]
    assert not (tmp_path / "x.parquet.part").exists()
    rows = datasets.Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["row", "image", "label", "layer_1", "layer_2", "layer_4"]
    assert rows.features["layer_1"].length == 16 and rows.features["layer_1"].feature.dtype == "float32"
    assert rows["image"][:] == read_images("digits", 8, limit=20)[1] and rows["row"][:] == [*range(20)]
    assert rows["label"][:] == load_digits()["test"]["label"][:20]
    for layer in (1, 2, 4):
        made = rows.with_format("numpy")[f"layer_{layer}"][:]
        np.testing.assert_allclose(made, expected(config, layer, pool, 20), rtol=1e-4, atol=1e-5)
    LogisticRegression().fit(made, rows["label"][:])


def test_an_interrupted_run_continues(tmp_path, monkeypatch, capsys):
    out, decode, seen = tmp_path / "x.parquet", images.decode, []

    def counted(value, stop=None):
        seen.append(value)
        if len(seen) == stop:
            raise KeyboardInterrupt
        return decode(value)

    monkeypatch.setattr(images, "decode", lambda value: counted(value, stop=18))
    assert run(tmp_path, out, "--limit", "20") == 130
    assert not out.exists() and len([*(tmp_path / "x.parquet.part").iterdir()]) == 2
    for words in (("--layers", "1"), ("--pool", "last")):
        with pytest.raises(SystemExit, match=r"of an interrupted run with other settings, .* instead of .*; delete it"):
            run(tmp_path, out, "--limit", "20", *words)
    seen.clear()
    monkeypatch.setattr(images, "decode", counted)
    assert run(tmp_path, out, "--limit", "20") == 0
    assert len(seen) == 4
    assert run(tmp_path, tmp_path / "whole.parquet", "--limit", "20") == 0
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "whole.parquet"), check_metadata=True)


def test_images_without_labels(tmp_path, capsys):
    photos = save_images(tmp_path / "photos", ["a.png", "b.png"])
    assert run(tmp_path, tmp_path / "x.parquet", source=str(photos)) == 0
    assert pq.read_schema(tmp_path / "x.parquet").names == ["row", "image", "layer_2"]
    assert "without labels" in capsys.readouterr().out
    (photos / "b.png").write_bytes(b"<html>")
    with pytest.raises(SystemExit, match=r"photos/b\.png: the file is not an image.* repair or remove it"):
        run(tmp_path, tmp_path / "x.parquet", source=str(photos))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layers", "4-2"], "invalid all|N-N value: '4-2'"),
        (["--layers", "3-5"], "a list of one or more from 0 to 4"),
        (["--out", "x.csv"], "it must be a .parquet file"),
    ],
)
def test_mistakes(tmp_path, words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, tmp_path / "x.parquet", *words)
    assert said in f"{stop.value.code} {capsys.readouterr().err}" and not (tmp_path / "x.parquet").exists()
