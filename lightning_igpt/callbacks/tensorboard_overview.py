"""What TensorBoard shows beside curves: charts by unit, the palette, training images, settings beside results.

Not here: completions, layer curves, confusions and worst images, which the callbacks that draw them log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from lightning_igpt.callbacks.provenance import plain
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import heading, image_grid, stack, swatch

Charts: TypeAlias = dict[str, dict[str, list[Any]]]  # as SummaryWriter.add_custom_scalars takes them
Scalar: TypeAlias = float | str

# Regular expressions for tags, by unit and chart. An empty chart looks like a mistake, hence one table for each kind.
_DENSITY: dict[str, dict[str, list[str]]] = {
    "nats per pixel": {"training, validation, test": ["(train|val|test)/nats_per_pixel"]},
    "bits per pixel": {"validation, test": ["(val|test)/bits_per_pixel"]},
}
_CLASSES = {
    "accuracy": {"validation, test": ["(val|test)/accuracy"]},
    "cross-entropy in nats": {"training, validation, test": ["(train|val|test)/cross_entropy"]},
    "nats per pixel": {"training": ["train/nats_per_pixel"]},
}
_LAYERS = {"accuracy": {"validation, test": ["(val|test)/accuracy"]}}
_ONLINE = {"accuracy": {"probe beside training": [r"online_probe/layer_\d+/accuracy"]}}
_SPEED = {
    "images per second": {"of all devices together": ["throughput/images_per_second"]},
    "learning rate": {"at each step": ["lr-.*"]},
}
# The first run that TensorBoard finds decides on the columns of all, so each names what any of them may have.
METRICS = ("val/nats_per_pixel", "test/nats_per_pixel", "val/accuracy", "test/accuracy")
_NUMBERS = ("lr", "batch_size", "network/n_layer", "network/n_embd", "network/image_size")
_TEXTS = ("source", "pretrained", "palette", "optimizer", "schedule")
_PLUMBING = {  # settings that say where images come from and how fast, not what is learnt
    *("cache", "cache_dir", "num_workers", "max_feature_bytes", "on_bad_image", "max_bad_share", "shuffle_buffer"),
    *("revision", "config_name", "image_column", "label_column", "train_split", "val_split", "test_split"),
}
_LONGEST = 60  # characters of a text


class TensorBoardOverview(Callback):
    """Give TensorBoard more than curves: charts by unit, the palette, training images, settings beside results.

    When training starts, every TensorBoard logger of the trainer gets a layout for the tab Custom Scalars with a chart
    for each unit, the colours of the palette (``palette``), and the settings of module and data with the names of the
    metrics to show beside them in the tab HParams; at the first batch a few training images, as they are and in the
    colours of the palette (``training_images``). A test or validation without training gets the settings only.

    Training is the same with it and without it, bit for bit. Idle beside other loggers and other modules.

    Args:
        n_images: Training images; 0 leaves them out.

    Raises:
        ValueError: ``n_images`` is below 0.
    """

    def __init__(self, n_images: int = 8) -> None:
        if n_images < 0:
            raise ValueError(f"n_images is {n_images}; it must be 0 or more")
        self.n_images = n_images
        self._awaits_images = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            self._add_settings(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the layout and the settings, before Lightning adds settings of its own, which would win."""
        self._add_settings(trainer, pl_module)
        names = [type(one).__name__ for one in trainer.callbacks]  # type: ignore[attr-defined]
        for writer in writers(trainer, pl_module):
            writer.add_custom_scalars(charts(pl_module, online="OnlineProbe" in names))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._awaits_images = self.n_images > 0
        palette: Any = pl_module.palette if hasattr(pl_module, "palette") else None
        for writer in writers(trainer, pl_module):
            writer.add_image("palette", swatch(palette.rgb), trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw some of the first batch."""
        if not self._awaits_images:
            return
        self._awaits_images = False
        for writer in writers(trainer, pl_module):
            tokens = pl_module.tokens_of(batch)[: self.n_images]  # type: ignore[operator]
            grid = beside_the_palette(images_of(batch), pl_module.palette, tokens)  # type: ignore[arg-type]
            writer.add_image("training_images", grid, trainer.global_step)

    def _add_settings(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for writer in writers(trainer, pl_module):
            file = writer._get_file_writer()
            for summary in settings_summaries(settings(pl_module, getattr(trainer, "datamodule", None))):
                file.add_summary(summary)


def writers(trainer: Trainer, module: Any) -> Iterator[Any]:
    """The writers of TensorBoard's loggers, on the first process and beside this package's modules."""
    ours = isinstance(getattr(module, "config", None), ImageGPTConfig) and hasattr(module, "tokens_of")
    if ours and isinstance(getattr(module, "palette", None), Palette) and trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                yield logger.experiment


def charts(module: Any, *, online: bool = False) -> Charts:
    """A layout with the charts that a module fills.

    Args:
        module: One of this package's.
        online: Whether a probe trains beside it.
    """
    kind = (
        _LAYERS if hasattr(module, "accuracy_by_layer") else _CLASSES if "num_classes" in module.hparams else _DENSITY
    )
    parts = [kind, _SPEED, _ONLINE if online else {}]
    return {
        unit: {name: ["Multiline", tags] for name, tags in found.items()}
        for part in parts
        for unit, found in part.items()
    }


def settings(module: Any, data: Any = None) -> dict[str, Scalar]:
    """Settings of module and data as numbers and short texts; those without a value are left out.

    Args:
        module: A LightningModule.
        data: Its data module, if there is one.

    Returns:
        Values by name, nested names joined by slashes. Secrets are masked; lists of colours and class
        names, and what only says where images come from, such as columns and caches, are left out.
    """
    found = {**dict(getattr(data, "hparams", {})), **dict(module.hparams)}
    left_out = _PLUMBING | {name for name in ("palette", "class_names") if not isinstance(found.get(name), str)}
    kept = {str(name): value for name, value in found.items() if name not in left_out and str(name)[:1] != "_"}
    return dict(_flat("", plain(kept)))


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}/", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value
        elif value is not None:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            yield prefix + name, text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def settings_summaries(values: Mapping[str, Scalar]) -> list[Any]:
    """What TensorBoard's tab HParams reads: names of settings and metrics, and the settings of this run.

    The metrics' values are those of the curves of the same names.
    """
    columns = dict.fromkeys(_NUMBERS, 0.0) | dict.fromkeys(_TEXTS, "") | dict(values)
    write: Any = hparams  # not typed in torch
    names, _, _ = write(columns, dict.fromkeys(METRICS, 0.0))
    _, start, _ = write(dict(values), {})
    _put_first(names.value[0].metadata.plugin_data)
    return [names, start]


def _put_first(data: Any) -> None:
    """Mark the settings to compare by: TensorBoard shows few others unless asked, and those by the alphabet."""
    found = HParamsPluginData.FromString(data.content)
    for info in found.experiment.hparam_infos:
        if info.name in _NUMBERS and "differs" in info.DESCRIPTOR.fields_by_name:  # as of TensorBoard 2.15
            info.differs = True
    data.content = found.SerializeToString()


def images_of(batch: Any) -> Tensor | None:
    """The images of a batch in any form that the modules accept, (B,1 or 3,S,S); None where it holds tokens."""
    if isinstance(batch, Mapping):
        found = None if "tokens" in batch else batch.get("image")
    else:
        found = batch[0] if isinstance(batch, Sequence) else batch
    return found if isinstance(found, Tensor) else None


def beside_the_palette(images: Tensor | None, palette: Palette, tokens: Tensor) -> Tensor:
    """Images as they are, where there are such, above the same in the colours of a palette.

    Args:
        images: uint8 or float in [0,1], (B,1 or 3,S,S); as many are drawn as there are rows of tokens.
        palette: The palette.
        tokens: int64 (N,T), N at most B.

    Returns:
        uint8 (3,h,w).
    """
    rows, text = [palette.dequantize(tokens).cpu()], "in the colours of the palette"
    if images is not None:
        shown = images[: len(tokens)].detach().cpu().expand(-1, 3, -1, -1)
        if shown.is_floating_point():
            shown = (255 * shown.float()).round().clamp(0, 255).to(torch.uint8)
        rows, text = [shown, *rows], f"above as they are, below {text}"
    return stack([heading(text), image_grid(rows)])
