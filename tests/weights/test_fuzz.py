"""Damaged files of every format: a clear error that names the file, or a network of finite numbers."""

import random
import shutil

import pytest
import torch

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.modules import FineTuneModule, PretrainModule
from lightning_igpt.palette import Palette
from lightning_igpt.weights import load_pretrained, native, save_pretrained
from lightning_igpt.weights.huggingface import to_state_dict
from tests.modules.helpers import loader, quiet_trainer
from tests.networks import random_network

SMALLEST = ImageGPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=8, image_size=4)
PALETTE = Palette(torch.rand(8, 3, generator=torch.manual_seed(3)) * 2 - 1)
EXAMPLES = 25
CASES = [  # what load_pretrained takes, and the file that is damaged
    "pretrain.ckpt",
    "finetune.ckpt",
    "x.safetensors",
    "folder/config.json",
    "folder/preprocessor_config.json",
    "folder/model.safetensors",
    "classifier/model.safetensors",
    "classifier/lm_head.safetensors",
    "pickled/pytorch_model.bin",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One network in each format."""
    root = tmp_path_factory.mktemp("files")
    for kind, module in (
        ("pretrain", PretrainModule(SMALLEST, PALETTE.to_list())),
        ("finetune", FineTuneModule(num_classes=3, network=SMALLEST, palette=PALETTE.to_list())),
    ):
        trainer = quiet_trainer(root / "run", max_steps=1, enable_checkpointing=False)
        trainer.fit(module, loader(8))
        trainer.save_checkpoint(root / f"{kind}.ckpt")
    network, head = random_network(SMALLEST), torch.randn(3, 8, generator=torch.manual_seed(1))
    native.save_file(root / "x.safetensors", network, PALETTE, head, ["a", "b", "c"], {"steps": 3})
    for name, head_of in (("folder", None), ("classifier", head), ("pickled", None)):
        save_pretrained(root / name, network, PALETTE, head=head_of)
    (root / "pickled" / "model.safetensors").unlink()
    torch.save(to_state_dict(network), root / "pickled" / "pytorch_model.bin")
    return root


def damaged(content, rng):
    """Flip, cut, drop, overwrite, insert or append; mostly near the ends, where headers and directories are."""
    content, size = bytearray(content), len(content)
    at = rng.choice([rng.randrange(size), min(rng.randrange(600), size - 1), max(size - 1 - rng.randrange(600), 0)])
    block = rng.choice([rng.randbytes(rng.randint(1, 9)), bytes(rng.randint(1, 4096))])
    kind = rng.randrange(7)
    if kind < 2:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del content[at:]
    elif kind == 3:
        del content[at : at + rng.randint(1, 100)]
    elif kind == 4:
        content[at : at + len(block)] = block[: size - at]
    elif kind == 5:
        content[at:at] = block
    else:
        content += block
    return bytes(content)


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named_or_harmless(files, tmp_path, case):
    source, _, name = case.partition("/")
    copy, rng, errors = tmp_path / source, random.Random(case), 0
    shutil.copytree(files / source, copy) if name else shutil.copy(files / source, copy)
    path = copy / name if name else copy
    whole = path.read_bytes()
    for _ in range(EXAMPLES):
        path.write_bytes(damaged(whole, rng))
        try:
            loaded = load_pretrained(copy)
        except (ValueError, FileNotFoundError) as error:
            assert str(copy) in str(error), error
            assert len(str(error)) < 8000
            errors += 1
        else:
            assert all(value.isfinite().all() for value in loaded.network.state_dict().values())
    assert errors
