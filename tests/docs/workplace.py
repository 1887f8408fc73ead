"""The folder in which a page is run: what its reader has, and stand-ins for what only the network has."""

import re
import shutil
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules import PretrainModule
from lightning_igpt.palette import Palette
from lightning_igpt.trainer import make_trainer
from lightning_igpt.weights import save_pretrained
from tests.docs import toys
from tests.image_files import noise, rows
from tests.modules.helpers import quiet_trainer
from tests.studies import study

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Uploads:
    """In place of huggingface_hub's HfApi: takes what it is given and asks nobody."""

    def __init__(self, **options):
        pass

    def create_repo(self, *args, **options):
        pass

    def upload_folder(self, *, folder_path, **options):
        assert (Path(folder_path) / "model.safetensors").exists()
        return types.SimpleNamespace(commit_url="https://huggingface.co/me/cats/commit/0")


def images(folder):
    """``photos`` of two classes, and ``snapshots`` of all kinds with a broken one among them."""
    for number in range(32):
        path = folder / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((24, 20), 60 + number).convert("RGB").save(path)
    (folder / "snapshots").mkdir()
    for number, mode in enumerate(["RGB", "L", "RGBA", "I;16", "P", "CMYK"] * 5):
        image = Image.effect_noise((40 + 7 * number, 90 - 2 * number), 60).convert(mode)
        image.save(folder / "snapshots" / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}")
    (folder / "snapshots" / "broken.jpg").write_bytes(b"<html>404</html>")


def weights(target, config=None):
    """A network of 32 pixels in transformers' layout, which a run folder's name may stand for too."""
    config = config or ImageGPTConfig(**toys.BLOCKS, vocab_size=512, image_size=32)
    save_pretrained(target, ImageGPT(config), Palette.load("openai"))


def batches():
    return DataLoader(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), batch_size=4)


def checkpoint(target):
    """What two steps of the recipe digits_tiny_pretrain leave."""
    network = toys.small_network("igpt_tiny", "gray:16") | {"image_size": 8}
    trainer = quiet_trainer(target.parent, max_steps=2, enable_checkpointing=False)
    trainer.fit(PretrainModule(network, "gray:16"), batches())
    trainer.save_checkpoint(target)


def mask(target):
    Image.fromarray(np.uint8(np.indices((32, 32))[1] > 20) * 255).save(target)


def run(target):
    """A run folder with a checkpoint and numbers that were logged."""
    network = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=16, image_size=8)
    trainer = make_trainer(
        max_steps=2, default_root_dir=target, accelerator="cpu", enable_progress_bar=False, log_every_n_steps=1
    )
    trainer.fit(PretrainModule(network, "gray:16"), batches())


def quickstart(target):
    """As much of what the quickstart leaves as other commands read."""
    run(target / "pretrain")
    checkpoint(target / "pretrain.ckpt")


# What pages take for granted, and who makes it where no line of the page has made it before.
BROUGHT = {
    "igpt-quickstart": quickstart,
    "FOLDER": lambda target: shutil.copytree("photos", target),
    "final.ckpt": checkpoint,
    "mask.png": mask,
    "photo.jpg": lambda target: Image.effect_noise((40, 30), 60).convert("RGB").save(target),
    "runs/mine": weights,
    "runs/imagenet32_s_pretrain": weights,
    "runs/digits_tiny_probe": run,
    "runs/study": study,
}


WRITTEN = re.compile(r"""(?:default_root_dir|--out|save_checkpoint|save_pretrained)[=("' ]+([\w./-]+)""")


def bring(text):
    """Put what a line or block names there, if the reader is meant to have it and the line does not write it."""
    written = {*WRITTEN.findall(text), *re.findall(r"igpt convert \S+ (\S+)", text)}
    for name, make in BROUGHT.items():
        path, named = Path(name), rf"(?<![\w/.-]){re.escape(name)}(?!\w)"
        if re.search(named, text) and name not in written and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)


def on_the_hub(folder):
    """Datasets of 10 classes, train and test: one with CIFAR-10's names of columns, one with everyone's."""
    for name, column in {"cifar10": "img", "any": "image"}.items():
        (folder / name).mkdir()
        for split, n in {"train": 40, "test": 10}.items():
            pictures, labels = [noise((20, 18), seed=i) for i in range(n)], [i % 10 for i in range(n)]
            made = rows(pictures, labels, [f"class {i}" for i in range(10)]).rename_column("image", "_")
            made.rename_column("_", column).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    return folder


def opener(load, hub):
    """``datasets.load_dataset`` that finds one of these datasets under every hub id."""

    def load_dataset(path, name=None, *, revision=None, **options):
        if Path(path).exists() or not HUB_ID.fullmatch(str(path)):
            return load(path, name, revision=revision, **options)
        return load(str(hub / ("cifar10" if "cifar10" in path else "any")), **options)

    return load_dataset
