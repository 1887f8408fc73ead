"""Makes the dataset ``emoji``: ``python docs/make_emoji.py PACKAGE lightning_igpt/assets/emoji_data.parquet``.

PACKAGE is the unpacked package emoji-datasource-google (github.com/iamcal/emoji-data), 16.0.0 for the file that ships.
The script prints the images of both splits by class, the nearest pairs across them, and the largest groups.
"""

import argparse
import io
import json
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE, NEAR = 32, 20.0  # pixels; root mean square difference of two images over pixels and channels, of 255
SALT = 34  # of 0 to 59 that whose test split has shares nearest to a fifth, of all images and of every class
CLASSES = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities",
    "Objects", "Symbols", "Flags",
)  # fmt: skip
TONES = {
    "1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark",
}  # fmt: skip
MARKS = {"FE0F", "200D", "2640", "2642", "27A1", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}  # joiners, gender, direction, hair
PERSONS = {  # man and woman, blond and bearded are the person of their age; then pairs with code points of their own
    "1F468": "1F9D1", "1F469": "1F9D1", "1F471": "1F9D1", "1F9D4": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2",
    "1F474": "1F9D3", "1F475": "1F9D3",
    "1F478": "1F934", "1F936": "1F385", "1F57A": "1F483", "1FAC3": "1F930", "1FAC4": "1F930",
    "1F9D1-1F384": "1F385", "1F9D1-1F37C": "1F931",
}  # fmt: skip
SHADE = r"\b(red|orange|yellow|green|blue|purple|brown|black|white|light|gr[ae]y|pink|large|medium|small)\b"


def base_of(emoji, unified):
    """What an emoji shares with its variants: code points of no tone, gender, direction or hair, or a common word."""
    name = emoji["name"].lower()
    if emoji["subcategory"] in ("family", "keycap"):
        return emoji["subcategory"]
    if name.startswith("clock face"):
        return "clock face"
    if (plain := " ".join(re.sub(SHADE, "", name).split())) != name:
        return plain
    points = [PERSONS.get(point, point) for point in unified.split("-") if point not in MARKS.union(TONES)]
    return PERSONS.get("-".join(points), "-".join(points)) or unified


def image_of(path):
    """RGB (32, 32, 3) over white; 64 steps of each channel, which no eye sees, take a third off the file."""
    image = Image.open(path).convert("RGBA")
    over = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert over.size == (2 * SIDE, 2 * SIDE), path
    return np.rint(np.rint(np.asarray(over.reduce(2)) * (63 / 255)) * (255 / 63)).astype(np.uint8)


def read(package):
    """Rows in the order of Unicode's charts, variants of an emoji after it."""
    rows = []
    for emoji in sorted(json.loads((package / "emoji.json").read_text("utf-8")), key=lambda one: one["sort_order"]):
        for variant in (emoji, *emoji.get("skin_variations", {}).values()):
            if emoji["category"] in CLASSES and variant["has_img_google"]:
                points = variant["unified"].split("-")
                tones = [TONES[point] for point in points if point in TONES]
                rows.append(
                    {
                        "image": image_of(package / "img" / "google" / "64" / variant["image"]),
                        "label": CLASSES.index(emoji["category"]),
                        "name": ", ".join([emoji["name"].lower(), *tones]),
                        "emoji": "".join(chr(int(point, 16)) for point in points),
                        "base": base_of(emoji, variant["unified"]),
                    }
                )
    return rows


def distances(images):
    """Root mean square difference of every two images, where one of them may be turned or mirrored."""
    n, flat = len(images), images.reshape(len(images), -1).astype(np.float32)
    least = np.full((n, n), np.inf, np.float32)
    for turns in range(4):
        for turned in (np.rot90(images, turns, (1, 2)), np.rot90(images, turns, (1, 2))[:, :, ::-1]):
            other = turned.reshape(n, -1).astype(np.float32)
            squares = (flat**2).sum(1)[:, None] + (other**2).sum(1) - 2 * flat @ other.T
            least = np.minimum(least, squares)
    return np.sqrt(np.maximum(least, 0) / flat.shape[1])


def variants(rows, apart):
    """For every row the first name of its group, which rows of one base and rows nearer than NEAR connect."""
    first, numbers = list(range(len(rows))), {}

    def root(row):
        while first[row] != row:
            row = first[row]
        return row

    same = [(number, numbers.setdefault(row["base"], number)) for number, row in enumerate(rows)]
    for a, b in [*same, *zip(*np.nonzero(np.triu(apart < NEAR)), strict=True)]:
        low, high = sorted((root(int(a)), root(int(b))))
        first[high] = low
    return [rows[root(number)]["name"] for number in range(len(rows))]


def bmp(image):
    """A file of plain bytes, so that Parquet's compression sees what images share."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "BMP")
    return file.getvalue()


def main(package, out):
    rows = read(package)
    apart = distances(np.stack([row["image"] for row in rows]))
    groups = variants(rows, apart)
    test = np.array([zlib.crc32(f"{SALT}{group}".encode()) % 5 == 0 for group in groups])
    columns = {name: [row[name] for row in rows] for name in ("label", "name", "emoji")}
    columns |= {"image": [bmp(row["image"]) for row in rows], "variants_of": groups, "test": test}
    order = np.argsort([zlib.crc32(row["emoji"].encode()) for row in rows])  # the first rows are of all classes
    about = {"classes": "\n".join(CLASSES), "script": "docs/make_emoji.py"}
    about["source"] = f"emoji-datasource-google {json.loads((package / 'package.json').read_text('utf-8'))['version']}"
    about["license"] = "Noto Color Emoji, Google LLC, Apache License 2.0: LICENSE.emoji_data.md"
    pq.write_table(
        pa.table(columns).take(order).replace_schema_metadata(about), out, compression="zstd", compression_level=22,
        data_page_size=1 << 30, use_dictionary=["name", "variants_of"], write_statistics=False,
    )  # fmt: skip
    for name, split in (("train", ~test), ("test", test)):
        counts = Counter(CLASSES[row["label"]] for row, there in zip(rows, split, strict=True) if there)
        print(f"{name}: {sum(counts.values())} images of {len(set(np.array(groups)[split]))} groups,", dict(counts))
    across = np.where(test[:, None] & ~test, apart, np.inf)
    for place in np.argsort(across, axis=None)[:10]:
        a, b = np.unravel_index(place, across.shape)
        print(f"{across[a, b]:.2f}: {rows[a]['name']} (test), {rows[b]['name']} (train)")
    print("largest groups:", Counter(groups).most_common(8))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("out", type=Path)
    main(**vars(parser.parse_args()))
