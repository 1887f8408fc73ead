"""Small images and datasets whose every pixel is known."""

import io

import datasets
import numpy as np
from PIL import Image


def picture(value=0, size=(4, 4)):
    """One colour; ``size`` is (width, height)."""
    return Image.new("RGB", size, (value % 256, (value * 7) % 256, value // 256))


def noise(size=(12, 9), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def rows(images, labels=None, names=("a", "b")):
    """An in-memory Dataset of PNG files."""
    columns = {"image": [{"bytes": encoded(image), "path": None} for image in images]}
    features = {"image": datasets.Image()}
    if labels is not None:
        columns["label"] = list(labels)
        features["label"] = datasets.ClassLabel(names=list(names))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def tiny(n=26, size=(4, 4)):
    """n images; the first channel of image i is i."""
    return rows([picture(i, size) for i in range(n)], [i % 2 for i in range(n)])


def save_images(folder, names):
    """Write one small image per relative path."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / name)
    return folder
