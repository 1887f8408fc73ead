import json

import pytest

from lightning_igpt.benchmarks import data

SIDES = {"bare decoding", "data module", "datasets + DataLoader", "data module, tokens", "transformers, tokens"}
SMALL_SIDES = {"token cache", "streaming"}


def test_the_last_line_is_json_with_every_measurement(capsys):
    sizes = ["--seconds", "0.001", "--repeats", "2", "--images", "32", "--batch-size", "8"]
    data.main(sizes)
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert set(result) == {
        *("benchmark", "ratio_vs_peer", "fraction_of_limit", "device", "threads", "cores", "versions"),
        *("unit", "batch", "size", *data.KINDS),
    }
    assert set(result["versions"]) == {"python", "torch", "datasets", "PIL", "numpy"} and result["threads"] == 1
    rates = {name: row["median"] for name, row in result["PNG 32x32"].items()}
    ratio = rates["data module, tokens"] / rates["transformers, tokens"]
    assert result["batch"] == 8 and result["ratio_vs_peer"] == pytest.approx(ratio, rel=1e-3)
    assert result["fraction_of_limit"] == result["PNG 32x32"]["data module"]["to_bare"]
    for kind in data.KINDS:
        wanted = SIDES | SMALL_SIDES if kind == "PNG 32x32" else SIDES
        assert set(result[kind]) == wanted
        for row in result[kind].values():
            assert 0 < row["min"] <= row["median"] <= row["max"] and row["to_bare"] > 0
        assert f"\n{kind}" in printed


@pytest.mark.parametrize("kind", data.KINDS.values(), ids=data.KINDS)
def test_the_data_module_reads_what_bare_decoding_reads(kind, tmp_path):
    files = data.make_files(kind, 8)
    with data._everything_in(tmp_path):
        path = data.write_parquet(files, tmp_path / "a.parquet")
        images = next(data._batches(path, batch_size=8))["image"].permute(0, 2, 3, 1).numpy()
    bare = sorted(data.bare_pixels(file).tobytes() for file in files)
    assert len(set(bare)) == 8 and sorted(pixels.tobytes() for pixels in images) == bare


@pytest.mark.parametrize("option", ["seconds", "images", "repeats"])
def test_nothing_to_measure_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        data.main([f"--{option}", "0"])
    assert f"--{option} is 0" in capsys.readouterr().err
