"""Weights in and out: load_pretrained reads every format this package knows, save_pretrained and push_to_hub write."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.decoding import is_sharded
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Colors, Palette
from lightning_igpt.progress import working
from lightning_igpt.weights import checkpoint, huggingface, native, openai
from lightning_igpt.weights.card import ModelCard, render
from lightning_igpt.weights.complete import standing
from lightning_igpt.weights.files import check_head
from lightning_igpt.weights.positions import adapt_network
from lightning_igpt.weights.shards import is_shards

__all__ = ["ModelCard", "Pretrained", "load_pretrained", "push_to_hub", "save_pretrained"]

log = logging.getLogger(__name__)

FILES = (".ckpt", ".npz", ".safetensors")
HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Pretrained:
    """A network with the palette whose colours its tokens are.

    Attributes:
        network: The network, on the CPU, in float32.
        palette: Its palette.
        origin: Where both came from, in words.
        head: Weight of a fine-tuned network's class head, float32 (C, D), which reads the mean over positions of
            ``network.hidden``; None where there is none.
        class_names: Names of its classes, where they are known.
        card: What is known of the training.
        path: The file or folder that was read; None for what came from the hub.
    """

    network: ImageGPT
    palette: Palette
    origin: str
    head: Tensor | None = None
    class_names: list[str] | None = None
    card: ModelCard = field(default_factory=ModelCard)
    path: Path | None = None

    @property
    def config(self) -> ImageGPTConfig:
        """The network's shape."""
        return self.network.config

    @property
    def lineage(self) -> str:
        """Where the weights came from and what those were trained from, without the folders that files lie in."""
        words, card = self.origin if self.path is None else self.path.absolute().name, self.card
        facts = [] if card.steps is None else [f"{card.steps:,} step{'' if card.steps == 1 else 's'}"]
        facts += [] if card.data is None else [f"on {card.data}"]
        words += f" ({' '.join(facts)})" if facts else ""
        return words + (f", trained from {card.origin}" if card.origin else "")

    def adapted(self, config: ImageGPTConfig) -> Pretrained:
        """The same weights for another ``image_size`` or ``dropout``, and ``origin`` saying so."""
        if config == self.config:
            return self
        origin, card, old, new = self.origin, self.card, self.config.image_size, config.image_size
        if new != old:
            origin += f", positions interpolated from {old} x {old} to {new} x {new}"
            card = card.for_another_size()
        return replace(self, network=adapt_network(self.network, config), origin=origin, card=card)


def load_pretrained(
    source: str | Path, *, palette: Palette | str | Path | Colors | None = None, image_size: int | None = None
) -> Pretrained:
    """Load a network and its palette, in little more memory than the network takes. No file can make code run.

    What is loaded is compared with the checksums of its file, which all have that this package writes.

    Args:
        source: A ``.ckpt`` file of this package's modules, or the folder that a sharded run saves in its place (where
            Lightning's WeightAveraging wrote it, the averaged weights are taken); a run folder that holds such (the
            best is taken); a folder in the layout of transformers' ImageGPT, or a hub id of one, ``owner/name`` or
            ``owner/name@revision``; the prefix of an OpenAI TensorFlow checkpoint (its palette is ``openai``); an
            ``.npz`` or ``.safetensors`` file that ``lightning-igpt convert`` wrote. ``origin`` of the result says what
            was taken.
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
        hint = "" if isinstance(source, str | Path) else "; what describes a network without weights is for network="
        raise ValueError(f"the source of weights is {source!r}; name a file, a folder or a hub id{hint}")
    given = None if palette is None else Palette.load(palette)
    try:
        with working("reading weights"):
            loaded = _load(source, given)
    except (FileNotFoundError, PermissionError, ModuleNotFoundError, MemoryError):
        raise
    except ValueError as error:
        if Path(source).name in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error
    except Exception as error:  # what reads a damaged file may raise nearly anything
        raise ValueError(f"{source} is damaged or no Image GPT: {type(error).__name__}: {error}") from error
    if given is not None and given != loaded.palette:
        raise ValueError(
            f"{source} uses the palette {loaded.palette.sha256[:12]} ({len(loaded.palette)} colors), but the palette "
            f"given is {given.sha256[:12]} ({len(given)} colors); leave out palette to use the stored one"
        )
    if image_size is None:
        return loaded
    adapted = loaded.adapted(replace(loaded.config, image_size=image_size))
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
    """Write a folder as transformers and the hub read it: config, weights, palette and a model card.

    Its files are config.json, model.safetensors, preprocessor_config.json and README.md.

    Args:
        folder: Where to; made if it does not exist.
        network: The network. One with the BERT objective is written too, and comes back exactly through
            load_pretrained, but transformers cannot run it: it has no mode without the causal mask, and the network
            has no ``sos``.
        palette: Its palette.
        card: What is known of the training: a ModelCard, or its fields by name.
        head: Weight (C, D) of a class head, as in ``FineTuneModule.head.weight``: the folder is then one of
            transformers' ImageGPTForImageClassification, with the colour head in a file beside it.
        class_names: Names of its C classes.

    Raises:
        TypeError: ``network`` is no ImageGPT.
        ValueError: Palette and network disagree on the number of colours, or head and class_names on that of classes.
        FileExistsError: The folder holds other things, such as a run, that would be overwritten.
    """
    folder, known, palette = Path(folder).expanduser(), ModelCard.resolve(card), Palette.load(palette)
    network = getattr(network, "_orig_mod", network)  # what torch.compile wraps
    if not isinstance(network, ImageGPT):
        raise TypeError(f"network is a {type(network).__name__}; give the ImageGPT itself, as in module.network")
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError("the network is on the meta device: it has no weights to save")
    if is_sharded(network):
        raise ValueError(
            "this network is sharded, so that no process holds it: save a checkpoint with the trainer, and write the "
            "folder from that (load_pretrained, or lightning-igpt convert)"
        )
    if class_names is not None and head is None:
        raise ValueError("class_names are given without the head that they name; give head= too")
    names = None
    if head is not None:
        head = check_head(head, network.config.n_embd, "head")
        names = huggingface.labels(head, class_names)
    text = render(known, network.config, palette, names)
    huggingface.save_folder(folder, network, palette, head, names, known.known())
    (folder / "README.md").write_text(text, encoding="utf-8", errors="replace")


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
    """Write what save_pretrained writes into a repository of the Hugging Face hub, made if it does not exist.

    Args:
        repository: ``owner/name``.
        network: As in save_pretrained.
        palette: As in save_pretrained.
        card: As in save_pretrained.
        head: As in save_pretrained.
        class_names: As in save_pretrained.
        private: Whether a new repository is private.
        token: Access token. Default: the one of ``hf auth login``.

    Returns:
        The address of the commit.

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
    place = Path(standing(path))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError(f"{text}: weights are not fetched from addresses; download the file and name its path")
    if openai.is_checkpoint(str(path)):
        return Pretrained(*openai.load_checkpoint(str(path), palette), f"OpenAI checkpoint {text}", path=path)
    if path.is_file():
        return _load_file(path, palette)
    if is_shards(place):
        return _from_checkpoint(path, "")
    if place.is_dir():
        return _load_folder(path, palette)
    hub = HUB_ID.fullmatch(text)
    if hub and path.suffix not in (*FILES, ".pt", ".bin"):
        return _from_folder(_download(hub["name"], hub["revision"]), f"hub repository {text}", palette)
    raise FileNotFoundError(
        f"{text} does not exist; name a .ckpt file, a run folder, a Hugging Face folder or a hub id"
    )


def _load_file(path: Path, palette: Palette | None) -> Pretrained:
    if path.suffix == ".npz":
        return Pretrained(*openai.load_archive(path, palette), f"archive {path}", path=path)
    if path.suffix == ".safetensors":
        network, palette, head, header = native.load_file(path)
        card, names = ModelCard.read(header.get("card")), header.get("class_names")
        names = huggingface.labels(head, names) if head is not None and names is not None else None
        return Pretrained(network, palette, f"file {path}", head, names, card, path)
    return _from_checkpoint(path, "")


def _load_folder(folder: Path, palette: Palette | None) -> Pretrained:
    if (folder / huggingface.CONFIG).exists():
        return replace(_from_folder(folder, f"Hugging Face folder {folder}", palette), path=folder)
    return _from_checkpoint(*checkpoint.best_checkpoint(folder))


def _from_checkpoint(path: Path, why: str) -> Pretrained:
    content = checkpoint.load_checkpoint(path)
    origin = f"checkpoint {path}" + (f", {why}" if why else "")
    origin += " (averaged weights)" if content.averaged else ""
    return Pretrained(content.network, content.palette, origin, content.head, content.class_names, content.card, path)


def _from_folder(folder: Path, origin: str, palette: Palette | None) -> Pretrained:
    content = huggingface.load_folder(folder, palette)
    card = ModelCard.read(content.card)
    return Pretrained(content.network, content.palette, origin, content.head, content.class_names, card)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(huggingface.DOWNLOADS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{repository} is neither a path here nor a hub repository that can be reached{at}: {error}"
        ) from error
