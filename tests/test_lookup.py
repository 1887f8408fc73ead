import logging

import numpy as np
import pytest

from lightning_igpt import lookup
from lightning_igpt.lookup import N_COLORS, build_table, cached_table
from lightning_igpt.palette import Palette

RNG = np.random.default_rng(0)
LEVELS = np.arange(256) / 127.5 - 1
STAND_IN = np.arange(N_COLORS, dtype=np.int32).astype(np.int16)


def grid(n):
    """A cube of n^3 evenly spaced colors: many exact ties."""
    steps = np.linspace(-1, 1, n)
    return np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)


def sphere(n):
    points = RNG.normal(size=(n, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


PALETTES = {
    "openai": Palette.load("openai").colors.numpy(),
    "two": [[-1, -1, -1], [1, 1, 1]],
    "gray:8": Palette.load("gray:8").colors.numpy(),
    "gray:64": Palette.load("gray:64").colors.numpy(),
    "random": RNG.uniform(-1, 1, (512, 3)),
    "grid": grid(6)[RNG.permutation(216)],
    "a cluster": RNG.uniform(-0.01, 0.01, (300, 3)),
    "a sphere": sphere(300),
    "many": RNG.uniform(-1, 1, (2000, 3)),
}


def brute_force(colors, codes):
    """The rule, color by color."""
    centers = colors.astype(np.float64)
    result = []
    for part in np.array_split(codes, len(codes) * len(colors) // 4_000_000 + 1):
        red, green, blue = (LEVELS[part >> shift & 255][:, None] for shift in (16, 8, 0))
        red, green, blue = red - centers[:, 0], green - centers[:, 1], blue - centers[:, 2]
        result.append(np.argmin((red**2 + green**2) + blue**2, axis=1))
    return np.concatenate(result)


@pytest.mark.parametrize("name", PALETTES)
def test_table_equals_brute_force(name):
    colors = np.asarray(PALETTES[name], dtype=np.float32)
    table = build_table(colors)
    own = np.rint(127.5 * (colors.astype(np.float64) + 1)).astype(np.int64) @ (1 << 16, 1 << 8, 1)
    n_random = min(20_000, 5_000_000 // len(colors))
    codes = np.concatenate([own, RNG.integers(0, N_COLORS, n_random)])
    assert table.dtype == np.int16
    assert table.shape == (N_COLORS,)
    assert np.array_equal(table[codes], brute_force(colors, codes))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_IGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def palette():
    return np.array([[-0.3, 0.1, 0.2], [0.4, 0.1, -0.6]], dtype=np.float32)


@pytest.fixture
def builds(monkeypatch):
    """A list that grows with every build; what is built is a stand-in."""
    done = []

    def build(colors):
        done.append(colors)
        return STAND_IN.copy()

    monkeypatch.setattr(lookup, "build_table", build)
    return done


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_table_is_built_once_and_then_read(folder, palette, builds, caplog):
    assert np.array_equal(cached_table(palette, "name"), STAND_IN)
    assert np.array_equal(cached_table(palette, "name"), STAND_IN)
    assert len(builds) == 1 and builds[0] is palette and not caplog.records
    (file,) = files_in(folder)
    assert np.array_equal(np.load(file), STAND_IN)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:1000] + bytes([content[1000] ^ 1]) + content[1001:],
        lambda content: content[:5_000_001],
        lambda content: content + b"\0\0",
        lambda content: b"",
        lambda content: b"text",
    ],
    ids=["flipped bit", "truncated", "too long", "empty", "another file"],
)
def test_a_damaged_file_is_replaced(folder, palette, builds, caplog, damage):
    cached_table(palette, "name")
    (file,) = files_in(folder)
    intact = file.read_bytes()
    file.write_bytes(damage(intact))
    assert np.array_equal(cached_table(palette, "name"), STAND_IN)
    assert len(builds) == 2 and "damaged" in caplog.text
    assert file.read_bytes() == intact and files_in(folder) == [file]


def test_an_unusable_folder_is_only_a_warning(tmp_path, monkeypatch, palette, builds, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LIGHTNING_IGPT_CACHE", str(tmp_path / "file"))
    assert np.array_equal(cached_table(palette, "name"), STAND_IN)
    assert len(builds) == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "LIGHTNING_IGPT_CACHE" in caplog.text
