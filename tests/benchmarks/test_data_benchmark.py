import json

import datasets
import pytest
import torch

from lightning_igpt.benchmarks import data


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    yield
    torch.set_num_threads(threads)


SIDES = {"bare decoding", "data module", "data module, tokens", "transformers, tokens"}


def test_the_last_line_is_json_with_every_measurement(capsys):
    sizes = ["--seconds", "0.001", "--repeats", "2", "--images", "32", "--batch-size", "8"]
    data.main(sizes)
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert set(result) == {
        *("benchmark", "ratio_vs_peer", "fraction_of_limit", "device", "threads", "cores", "versions"),
        *("unit", "batch", "size", *data.SHARE),
    }
    assert set(result["versions"]) == {"python", "torch", "datasets", "PIL", "numpy"} and result["threads"] == 1
    rates = {name: row["median"] for name, row in result["PNG 32x32"].items()}
    ratio = rates["data module, tokens"] / rates["transformers, tokens"]
    assert result["batch"] == 8 and result["ratio_vs_peer"] == pytest.approx(ratio, rel=1e-3)
    assert result["fraction_of_limit"] == result["PNG 32x32"]["data module"]["to_bare"]
    for kind in data.SHARE:
        assert set(result[kind]) == (SIDES | {"token cache", "streaming"} if kind == data.SMALL else SIDES)
        for row in result[kind].values():
            assert 0 < row["min"] <= row["median"] <= row["max"] and row["to_bare"] > 0
        assert f"\n{kind}" in printed


@pytest.mark.parametrize("kind", data.SHARE)
def test_the_data_module_reads_what_bare_decoding_reads(kind, tmp_path):
    files = data.make_files(kind, 8)
    path = data.write_parquet(files, tmp_path / "a.parquet")
    images = next(data.batches(path, batch_size=8))["image"].permute(0, 2, 3, 1).numpy()
    bare = sorted(data.square(file).tobytes() for file in files)
    assert len(set(bare)) == 8 and sorted(pixels.tobytes() for pixels in images) == bare


@pytest.mark.parametrize("option", ["seconds", "images", "repeats"])
def test_nothing_to_measure_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        data.main([f"--{option}", "0"])
    message = capsys.readouterr().err
    assert f"--{option} is 0" in message or f"argument --{option}: 0 must be 1 or more" in message
