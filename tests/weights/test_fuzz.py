"""Damaged files of every format: a clear error that names the file, or a network of finite numbers."""

import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
# (what load_pretrained or Palette.load takes, the file that is damaged)
CASES = [
    ("pretrain.ckpt", "pretrain.ckpt"),
    ("finetune.ckpt", "finetune.ckpt"),
    ("x.safetensors", "x.safetensors"),
    ("folder", "config.json"),
    ("folder", "preprocessor_config.json"),
    ("folder", "model.safetensors"),
    ("classifier", "config.json"),
    ("classifier", "model.safetensors"),
    ("classifier", "lm_head.safetensors"),
    ("pickled", "pytorch_model.bin"),
    ("p.npy", "p.npy"),
]
IDS = [f"{source}-{name}" if source != name else source for source, name in CASES]


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
    PALETTE.save(root / "p.npy")
    return root


def load(source):
    if source.suffix == ".npy":
        return [Palette.load(source)]
    loaded = load_pretrained(source)
    values = [*loaded.network.state_dict().values(), *([] if loaded.head is None else [loaded.head])]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in values)
    return [loaded.palette]


places = st.one_of(  # half of them in the headers and directories, which lie at the ends
    st.floats(0, 1).map(lambda share: lambda size: int(share * size)),
    st.integers(0, 600).map(lambda count: lambda size: count),
    st.integers(1, 600).map(lambda count: lambda size: size - count),
)
blocks = st.one_of(st.binary(min_size=1, max_size=9), st.integers(1, 4096).map(bytes))
flip = st.tuples(st.just("flip"), st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=2))
damages = st.one_of(
    flip,
    flip,
    st.tuples(st.just("cut"), places),
    st.tuples(st.just("drop"), places, st.integers(1, 100)),
    st.tuples(st.just("overwrite"), places, blocks),
    st.tuples(st.just("insert"), places, blocks),
    st.tuples(st.just("append"), blocks),
)


def damaged(content, damage):
    content, size = bytearray(content), len(content)
    kind, *rest = damage
    at = min(max(rest[0](size), 0), size - 1) if callable(rest[0]) else 0
    if kind == "flip":
        for place, bit in rest[0]:
            content[min(max(place(size), 0), size - 1)] ^= 1 << bit
    elif kind == "cut":
        del content[at:]
    elif kind == "drop":
        del content[at : at + rest[1]]
    elif kind == "overwrite":
        content[at : at + len(rest[1])] = rest[1][: size - at]
    elif kind == "insert":
        content[at:at] = rest[1]
    else:
        content += rest[0]
    return bytes(content)


def check(source, name, content, expected):
    """Load a damaged copy; whether that gave an error."""
    path = source / name if source.is_dir() else source
    whole = path.read_bytes()
    try:
        path.write_bytes(content)
        found = load(source)
    except (ValueError, FileNotFoundError) as error:
        assert name in str(error), error
        assert len(str(error)) < 8000
        return True
    finally:
        path.write_bytes(whole)
    assert found == expected
    return False


def fuzz(files, folder, source, name):
    source = files / source
    copy = folder / source.name
    shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    expected, whole = load(copy), (copy / name if copy.is_dir() else copy).read_bytes()
    errors = []

    @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(damages)
    def run(damage):
        content = damaged(whole, damage)
        errors.append(check(copy, name, content, expected) if content != whole else None)

    run()
    return errors


@pytest.mark.parametrize(("source", "name"), CASES, ids=IDS)
def test_damage_is_named_or_harmless(files, tmp_path, source, name):
    assert True in fuzz(files, tmp_path, source, name)
