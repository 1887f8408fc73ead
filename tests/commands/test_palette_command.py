import numpy as np
import pytest
from PIL import Image

from lightning_igpt.__main__ import main
from lightning_igpt.commands.palette import fit, show
from lightning_igpt.images import BadImageError
from lightning_igpt.palette import Palette

COLORS = [(10, 20, 30), (200, 100, 50), (0, 255, 0), (255, 255, 255)]


@pytest.fixture
def folder(tmp_path):
    """Four images of one color each and of different sizes."""
    for number, color in enumerate(COLORS):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4 + number, 5), color).save(path)
    return tmp_path / "images"


def test_fit_to_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "new" / "p.npy"
    assert main(["palette", "fit", str(folder), str(out), "--n_colors", "4"]) == 0
    palette = Palette.load(out)
    assert sorted(map(tuple, palette.rgb.tolist())) == sorted(COLORS)
    said = capsys.readouterr().out
    assert palette.sha256 in said and "K 4" in said and "RMSE 0.00 of 255 per channel on 4 images" in said
    with Image.open(out.with_suffix(".png")) as picture:
        shown = {color for _, color in picture.convert("RGB").getcolors()}
    assert set(COLORS) <= shown


def test_nothing_is_overwritten_by_chance(folder, tmp_path, capsys):
    out = tmp_path / "p.npy"
    fit(str(folder), str(out), 2)
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match=r"p\.npy exists; pass --overwrite true"):
        fit(str(folder), str(out), 3)
    assert out.read_bytes() == before
    out.unlink()
    with pytest.raises(FileExistsError, match=r"p\.png exists"):
        fit(str(folder), str(out), 3)
    fit(str(folder), str(out), 3, overwrite=True)
    assert len(Palette.load(out)) == 3
    pixels = np.concatenate([np.array(Image.open(path)).reshape(-1, 3) for path in sorted(folder.iterdir())])
    nearest = np.square(pixels[:, None].astype(float) - Palette.load(out).rgb.numpy()).sum(-1).min(1)
    assert f"RMSE {np.sqrt(nearest.mean() / 3):.2f} of 255" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("p.bin", {}, r"must be a \.npy file"),
        ("p.npy", {"split": "trian"}, "no split 'trian'; it has train"),
        ("p.npy", {"n_colors": 5}, "4 distinct colors, fewer than n_colors 5"),
    ],
)
def test_mistakes_are_explained(folder, tmp_path, out, options, message):
    with pytest.raises(ValueError, match=message):
        fit(str(folder), str(tmp_path / out), **options)
    assert not list(tmp_path.glob("p.*"))


def test_a_bad_image_is_named(folder, tmp_path):
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"images/1\.png: "):
        fit(str(folder), str(tmp_path / "p.npy"), 2)


def test_show(tmp_path, capsys):
    show("gray:16", str(tmp_path / "new" / "sheet.png"))
    said = capsys.readouterr().out
    assert "K 16" in said and Palette.load("gray:16").sha256 in said and "values -1.00000 to 1.00000" in said
    with Image.open(tmp_path / "new" / "sheet.png") as picture:
        assert {(x, x, x) for x in range(0, 256, 17)} <= {color for _, color in picture.getcolors()}
