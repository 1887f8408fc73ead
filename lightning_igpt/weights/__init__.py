"""Weights in and out: load_pretrained reads every format this package knows, save_pretrained and push_to_hub write."""

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_igpt.config import EMBEDDED
from lightning_igpt.decoding import is_sharded
from lightning_igpt.files import write_text
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Colors, Palette
from lightning_igpt.private import uncompiled
from lightning_igpt.weights import checkpoint, huggingface, native, openai
from lightning_igpt.weights.card import ModelCard, render
from lightning_igpt.weights.native import Pretrained, check_head, labels
from lightning_igpt.weights.safety import SHARDS

__all__ = ["ModelCard", "Pretrained", "load_pretrained", "push_to_hub", "save_pretrained"]

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
FILES = (".ckpt", ".npz", ".safetensors", ".pt", ".bin")  # endings that no hub id has
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def load_pretrained(
    source: str | Path, *, palette: Palette | str | Path | Colors | None = None, image_size: int | None = None
) -> Pretrained:
    """Load a network and its palette. No file can make code run.

    Args:
        source: A ``.ckpt`` file of this package's modules (where Lightning's WeightAveraging wrote it, with the
            averaged weights); a run folder that holds such files (the best is loaded); a folder in the layout of
            transformers' ImageGPT, or a hub id of one, ``owner/name`` or ``owner/name@revision``; the prefix of an
            OpenAI TensorFlow checkpoint (its palette is ``openai``); a ``.safetensors`` file that
            ``lightning-igpt convert`` wrote; or the name of a network that comes with this package, ``photos`` or
            ``emoji``. A file or folder of that name that holds weights takes precedence. ``origin`` of the result says
            what was loaded.
        palette: The network's palette, in any form that ``Palette.load`` takes. Needed for sources that hold none, such
            as what transformers' ``model.save_pretrained`` writes without a processor; a network of 512 colors is then
            assumed to use OpenAI's. Where the source holds a palette, it must be this one.
        image_size: Side of the images that the network shall read. Where it is not the network's own, the table of
            positions is interpolated in two dimensions.

    Raises:
        FileNotFoundError: There is no such file, folder or hub repository.
        ValueError: What is there is no Image GPT, is damaged, would have to run code to be opened, has no palette, or
            has another palette than the one given.
        ModuleNotFoundError: A TensorFlow checkpoint, and TensorFlow is not installed.
    """
    if not isinstance(source, str | Path) or not str(source):
        what = f"the source of weights is {source!r}; name a file, a folder, a hub id or an embedded network"
        raise ValueError(f"{what} (what describes a network without weights is for network=)")
    given = None if palette is None else Palette.load(palette)
    try:
        loaded = _load(source, given)
    except Exception as error:  # what reads a damaged file may raise nearly anything
        if isinstance(error, OSError) and error.errno:  # the system's words name no purpose
            why = f"the weights of {source} could not be read: {error.strerror}"
            raise OSError(error.errno, why, error.filename) from error
        named = isinstance(error, ValueError) and Path(source).name in str(error)
        if named or isinstance(error, (OSError, ModuleNotFoundError, MemoryError)):
            raise
        raise ValueError(f"{source} is damaged or no Image GPT: {type(error).__name__}: {error}") from error
    if given is not None and given != loaded.palette:
        stored, other = (f"{one.sha256[:12]} ({len(one)} colors)" for one in (loaded.palette, given))
        text = f"{source} uses the palette {stored}, but the palette given is {other}"
        raise ValueError(f"{text}; leave out palette to use the stored one")
    adapted = loaded if image_size is None else loaded.adapted(replace(loaded.config, image_size=image_size))
    if adapted is not loaded:
        log.info("%s", adapted.origin)
    return adapted


def save_pretrained(
    folder: str | Path,
    network: ImageGPT,
    palette: Palette,
    *,
    card: ModelCard | Mapping[str, Any] | None = None,
    head: Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json and README.md, as transformers and the hub do.

    Args:
        folder: Where to; made if it does not exist.
        network: The network. A BERT network comes back exactly through load_pretrained, but transformers cannot run
            it: it has no mode without the causal mask.
        palette: Its palette.
        card: What is known of the training: a ModelCard, or its fields by name.
        head: Weight (C, D) of a class head, as in ``FineTuneModule.head.weight``: the folder is then one of
            transformers' ImageGPTForImageClassification, with the color head in lm_head.safetensors.
        class_names: Names of its C classes.

    Raises:
        TypeError: ``network`` is no ImageGPT.
        ValueError: Palette and network disagree on the number of colors, or head and class_names on that of classes.
        FileExistsError: The folder holds other things, such as a run, that would be overwritten.
    """
    folder, known, palette = Path(folder).expanduser(), ModelCard.resolve(card), Palette.load(palette)
    network = uncompiled(network)
    if not isinstance(network, ImageGPT):
        raise TypeError(f"network is a {type(network).__name__}; give the ImageGPT itself, as in module.network")
    if is_sharded(network):
        raise ValueError("no process holds all of this sharded network: save a checkpoint with the trainer")
    if class_names is not None and head is None:
        raise ValueError("class_names are given without the head that they name; give head= too")
    head = None if head is None else check_head(head, network.config.n_embd, "head")
    names = None if head is None else labels(head, class_names)
    text = render(known, network.config, palette, names)
    huggingface.save_folder(folder, network, palette, head, names, known.known())
    write_text(folder / "README.md", text)


def push_to_hub(
    repository: str,
    network: ImageGPT,
    palette: Palette,
    *,
    card: ModelCard | Mapping[str, Any] | None = None,
    head: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Write what save_pretrained writes into a repository of the Hugging Face hub, and return the commit's address.

    ``repository`` is ``owner/name`` and is made, private or not, if it does not exist; ``token`` defaults to that of
    ``hf auth login``. The other arguments are those of save_pretrained.

    Raises:
        ValueError: ``repository`` is no hub id.
        huggingface_hub.errors.HfHubHTTPError: The hub refused.
    """
    from huggingface_hub import HfApi

    if HUB_ID.fullmatch(repository) is None or "@" in repository:
        raise ValueError(f"repository is {repository!r}; it must be 'owner/name'")
    api = HfApi(token=token, library_name="lightning_igpt")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, network, palette, card=card, head=head, class_names=class_names)
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload Image GPT weights")
    return str(commit.commit_url)


def _load(source: str | Path, palette: Palette | None) -> Pretrained:
    text, path = str(source), Path(source).expanduser()
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError(f"{text}: weights are not fetched from URLs; download the file and name its path")
    if Path(f"{path}.index").exists():
        return openai.load_checkpoint(path, palette)
    if path.is_file() and path.suffix == ".npz":
        raise ValueError(f"{path}: only version 0.1 reads .npz archives; convert it there --to safetensors")
    if path.is_file():
        return native.load_file(path) if path.suffix == ".safetensors" else checkpoint.load_checkpoint(path)
    if (path / ".metadata").exists():
        raise ValueError(f"{path} is {SHARDS}")
    if (path / huggingface.CONFIG).exists():
        return huggingface.load_folder(path, palette)
    if text in EMBEDDED and not checkpoint.checkpoints_in(path):  # a folder of images may have such a name
        loaded = huggingface.load_folder(ASSETS / text, palette)
        return replace(loaded, origin=f"{text}, the embedded network of {EMBEDDED[text]}")
    if path.is_dir():
        best, why = checkpoint.best_checkpoint(path)
        loaded = checkpoint.load_checkpoint(best)
        return replace(loaded, origin=f"{loaded.origin}, {why}")
    hub = HUB_ID.fullmatch(text)
    if hub and path.suffix not in FILES:
        loaded = huggingface.load_folder(_download(hub["name"], hub["revision"]), palette)
        return replace(loaded, origin=f"hub repository {text}", path=None)
    kinds = f"a run folder, a Hugging Face folder, a hub id, or an embedded network ({', '.join(EMBEDDED)})"
    raise FileNotFoundError(f"{text} does not exist; name a .ckpt file, {kinds}")


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(huggingface.DOWNLOADS)))
    except OSError as error:  # the hub's own errors are of this kind
        where = f"{repository}@{revision}" if revision else repository
        if error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
            cache = f"downloads are kept in {HF_HUB_CACHE}; set HF_HOME to a folder with room that can be written"
            raise OSError(error.errno, f"{error.strerror}; {cache}", error.filename) from error
        raise FileNotFoundError(f"{where} is neither a path here nor an accessible hub repository: {error}") from error
