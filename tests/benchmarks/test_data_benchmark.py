import json
import mmap

import pytest

from lightning_igpt.benchmarks import data

SIDES = {"bare decoding", "data module", "datasets + DataLoader", "data module, tokens", "transformers, tokens"}
SMALL_SIDES = {"pixel cache in memory", "token cache on disk", "streaming"}


def test_the_last_line_is_json_with_every_measurement(monkeypatch, capsys):
    monkeypatch.setattr(data, "memory_growth", data._growth)  # in this process: to start another takes long
    sizes = ["--seconds", "0.001", "--repeats", "2", "--images", "32", "--rows", "64", "--batch-size", "8"]
    data.main([*sizes, "--precision", "32-true"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert set(result) == {
        *("benchmark", "ratio_vs_peer", "fraction_of_limit", "device", "threads", "cores", "versions"),
        *("unit", "batch", "size", "memory_growth_mib", *data.KINDS),
    }
    assert set(result["versions"]) == {"python", "torch", "datasets", "PIL", "numpy"} and result["threads"] == 1
    rates = {name: row["median"] for name, row in result["PNG 32x32"].items()}
    ratio = rates["data module, tokens"] / rates["transformers, tokens"]
    assert result["batch"] == 8 and result["ratio_vs_peer"] == pytest.approx(ratio, rel=1e-3)
    assert result["fraction_of_limit"] == result["PNG 32x32"]["data module"]["to_bare"]
    assert "--precision has no bearing" in printed and "--batch-size has" not in printed
    for kind in data.KINDS:
        wanted = SIDES | SMALL_SIDES if kind == "PNG 32x32" else SIDES
        assert set(result[kind]) == wanted
        for row in result[kind].values():
            assert 0 < row["min"] <= row["median"] <= row["max"] and row["to_bare"] > 0
        assert f"\n{kind}" in printed
    assert isinstance(result["memory_growth_mib"], float)


@pytest.mark.parametrize("kind", data.KINDS.values(), ids=data.KINDS)
def test_the_data_module_reads_what_bare_decoding_reads(kind, tmp_path):
    files = data.make_files(kind, 8)
    with data._everything_in(tmp_path):
        path = data.write_parquet(files, tmp_path / "a.parquet")
        images = next(data._batches(path, batch_size=8, cache="none"))["image"].permute(0, 2, 3, 1).numpy()
    bare = sorted(data.bare_pixels(file).tobytes() for file in files)
    assert len(set(bare)) == 8 and sorted(pixels.tobytes() for pixels in images) == bare


def test_memory_that_is_kept_shows(tmp_path, monkeypatch):
    path = data.write_parquet(data.make_files(data.KINDS[data.SMALL], 256), tmp_path / "a.parquet")
    assert data._growth(path, 1024, 64) < 4
    kept, read = [], data.data_module

    def keep(*args, **options):
        for count in read(*args, **options):
            # Pages of its own: what this process freed before may hold a lot without any growth.
            kept.append(mmap.mmap(-1, 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            kept[-1].write(bytes(2**20))
            yield count

    monkeypatch.setattr(data, "data_module", keep)
    assert data._growth(path, 1024, 64) > 12


@pytest.mark.parametrize("option", ["seconds", "images", "rows", "repeats", "batch-size"])
def test_nothing_to_measure_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        data.main([f"--{option}", "0"])
    message = capsys.readouterr().err
    assert f"--{option} is 0" in message or f"argument --{option}: 0 must be 1 or more" in message
