"""What the modules share: a network with its palette, the description in their checkpoints, settings, classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lightning_igpt import __version__
from lightning_igpt.config import ImageGPTConfig, Objective
from lightning_igpt.decoding import is_sharded
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules.resume import is_evaluating, trainer_of
from lightning_igpt.palette import Palette
from lightning_igpt.private import current_datamodule
from lightning_igpt.weights import load_pretrained
from lightning_igpt.weights.checkpoint import STAMP
from lightning_igpt.weights.native import COLORS

log = logging.getLogger(__name__)

NetworkLike = ImageGPTConfig | str | dict[str, Any] | None
PaletteLike = str | Palette | list[list[float]] | None


class Built(NamedTuple):
    """A network with its palette, and where its weights came from: both None where they are random."""

    network: ImageGPT
    palette: Palette
    origin: str | None = None  # in words that may be published
    origin_path: Path | None = None  # the file or folder; None for the hub, too


def build_network(
    network: NetworkLike,
    palette: PaletteLike,
    pretrained: str | None,
    objective: Objective | None = None,
    image_size: int | None = None,
) -> Built:
    """Make or load the network and its palette from a module's arguments.

    Loaded weights keep their shape; only ``image_size`` (positions are interpolated) and ``dropout`` may differ. Under
    ``trainer.init_module(empty_init=True)`` of a sharded strategy a network that is not loaded stays on the meta
    device until :func:`shard_network`.

    Raises:
        ValueError: The arguments contradict each other or the loaded weights.
    """
    if pretrained is None:
        config = ImageGPTConfig.resolve("igpt_s" if network is None else network)
        config = _changed(config, objective=objective, image_size=image_size)
        colors = Palette.load("openai" if palette is None else palette)
        if len(colors) != config.vocab_size:
            raise ValueError(
                f"the palette has {len(colors)} colors but the network's vocab_size is {config.vocab_size}; "
                f"set vocab_size={len(colors)}, or fit a palette of {config.vocab_size} colors "
                f"(lightning-igpt palette fit --n_colors {config.vocab_size})"
            )
        return Built(ImageGPT(config), colors)
    with torch.device("cpu"):
        loaded = load_pretrained(pretrained, palette=palette)
    wanted = _changed(_wanted(network, loaded.config), objective=objective, image_size=image_size)
    fixed = replace(wanted, dropout=loaded.config.dropout)
    if image_size is not None or isinstance(network, (ImageGPTConfig, Mapping)):  # a preset's size is no request
        fixed = replace(fixed, image_size=loaded.config.image_size)
    if fixed != loaded.config:
        raise ValueError(
            f"pretrained={pretrained!r} is a network of {_differences(loaded.config, fixed)}; "
            "leave out network and objective to take the loaded network's"
        )
    loaded = loaded.adapted(wanted)
    log.info("weights and palette from %s", loaded.origin)
    return Built(loaded.network, loaded.palette, loaded.lineage, loaded.path)


def register(module: Any, built: Built, **hyperparameters: Any) -> None:
    """Attach network and palette; keep hyperparameters as plain values, so that a checkpoint opens by itself.

    The network's config takes the place of ``network`` and ``pretrained``: a checkpoint holds the weights.
    """
    module.network, module.palette, module.origin, module.origin_path = built
    colors = torch.tensor(built.palette.to_list(), dtype=torch.float32, device="cpu")  # (K, 3)
    module.register_buffer(COLORS, colors)
    named = {"network": built.network.config.to_dict(), "palette": built.palette.spec}
    module.save_hyperparameters(named | hyperparameters)


def shard_network(module: Any) -> None:
    """Shard a module's network under ModelParallelStrategy; call it from ``configure_model``.

    A unit, which is gathered and freed at once, is a block, the rest of the network, or a classifier's head. Weights on
    the meta device are drawn by the first process as they would be on one device, and shared out.

    Raises:
        ValueError: The strategy asks for tensor parallelism, or another strategy gets a sharded network.
    """
    trainer, network = trainer_of(module), module.network
    if trainer is None:  # load_from_checkpoint configures the model, too
        return
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        if is_sharded(network):
            raise ValueError(
                f"this module's network is sharded, which {type(strategy).__name__} cannot train: load its checkpoint "
                "into a new module"
            )
        return
    _check_strategy(trainer, module.device_mesh)
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False  # FSDP2 keeps its buffers, and those made in inference mode cannot be trained
    if is_sharded(network):  # Lightning configures a model at each fit and evaluation
        for part in filter(is_sharded, module.modules()):
            part.reshard()  # after an evaluation the rest of the network is still gathered
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    options: dict[str, Any] = {"mesh": module.device_mesh["data_parallel"], "mp_policy": policy}
    for block in network.blocks():
        fully_shard(block.ln_1, **options)  # ImageGPT.features calls it before the block
        fully_shard(block, **options)
    for unit in (network, *(child for name, child in module.named_children() if name == "head")):
        fully_shard(unit, **options)
    for method in ("hidden", "features"):
        register_fsdp_forward_method(network, method)
    if network.wte.weight.is_meta:
        _share_out(network, strategy)


def _check_strategy(trainer: Trainer, mesh: Any) -> None:
    data, tensor = mesh["data_parallel"].size(), mesh["tensor_parallel"].size()
    if tensor > 1:
        raise ValueError(
            f"the strategy has tensor_parallel_size={tensor}, but layers are not divided: use strategy='fsdp2', or "
            f"ModelParallelStrategy(data_parallel_size={data * tensor}, tensor_parallel_size=1)"
        )
    if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "weights cannot be averaged while they are sharded, since torch cannot copy such a network; leave out "
            "WeightAveraging (EMAWeightAveraging), or train with strategy='ddp'"
        )


def _share_out(network: ImageGPT, strategy: ModelParallelStrategy) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    dtype = network.wte.weight.dtype
    network.to_empty(device=strategy.root_device)
    weights = ImageGPT(network.config).to(dtype).state_dict() if strategy.is_global_zero else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, weights, options=options)


class Mean(MeanMetric):
    """torchmetrics' mean, summed in float32: in bf16-true a sum in bfloat16 would stop growing at 256 images."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        if self.mean_value.dtype != torch.float32:  # module.to(dtype), or Trainer.init_module
            self.set_dtype(torch.float32)
        super().update(*args, **kwargs)


def metrics_by_stage(make: Callable[[], Metric]) -> nn.ModuleDict:
    """A metric for ``val`` and one for ``test``, with values even where a network is made on the meta device."""
    with torch.device("cpu"):
        return nn.ModuleDict({stage: make() for stage in ("val", "test")})


def stamp(module: Any, checkpoint: dict[str, Any]) -> None:
    """Describe a checkpoint in itself, and keep the exact palette: training in bfloat16 rounds the module's buffer."""
    trainer = trainer_of(module)
    step = module.validated_at if trainer is not None else None
    metrics = {} if step is None else {"step": step, **_validation_metrics(module.trainer)}
    checkpoint["state_dict"][COLORS] = module.palette.colors
    checkpoint[STAMP] = {
        "class": type(module).__name__,
        "version": __version__,
        "network": module.config.to_dict(),
        "palette_sha256": module.palette.sha256,
        "steps": int(checkpoint.get("global_step", 0)),
        "data": None if trainer is None else _data_name(trainer),
        "origin": module.origin,
        "validation": metrics,
    }


def note_validation(module: Any) -> None:
    """Remember the step of a validation, whose numbers must not describe later weights; for on_validation_epoch_end."""
    if not module.trainer.sanity_checking:
        module.validated_at = module.trainer.global_step


def _validation_metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def _data_name(trainer: Trainer) -> str | None:
    """The data's name without the path to it, which must not be published with the weights."""
    data = current_datamodule(trainer)
    source = None if data is None else data.hparams.get("source")
    if not isinstance(source, str):
        return None
    return Path(source).name if Path(source).exists() or Path(source).is_absolute() else source


def check_stamp(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint is one of this class with this network and palette.

    Raises:
        ValueError: It was written by another class, network or palette; the message names both and the cure.
    """
    mine, other = type(module).__name__, checkpoint.get(STAMP)
    if other is None:
        raise ValueError(f"this checkpoint was not written by {mine}; to start from its weights, use pretrained=")
    if not isinstance(other, Mapping) or not {"class", "network", "palette_sha256"} <= other.keys():
        raise ValueError("this checkpoint is damaged: its description of itself is incomplete")
    if other["class"] != mine:
        raise ValueError(
            f"ckpt_path continues the same run, but this checkpoint is a {other['class']}'s and the model is a {mine}; "
            f"to start from its weights, use pretrained="
        )
    config = ImageGPTConfig.resolve(other["network"])
    if config != module.config:
        raise ValueError(f"the checkpoint holds a network of {_differences(config, module.config)}")
    if other["palette_sha256"] != module.palette.sha256:
        raise ValueError(
            f"the checkpoint uses the palette {other['palette_sha256'][:12]}, but the palette given is "
            f"{module.palette.sha256[:12]}; leave out palette to take the right one"
        )


def take_origin(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Where a loaded checkpoint's weights came from; older checkpoints do not say."""
    if "origin" in checkpoint[STAMP]:
        module.origin, module.origin_path = checkpoint[STAMP]["origin"], None


def warn_if_untrained(module: Any, weight: Tensor) -> None:
    """Warn where ``validate``, ``test`` or ``predict`` get weights that start at zero and still are."""
    if is_evaluating(module) and not weight.any():
        log.warning("these are random weights: no pretrained=, no ckpt_path, and no training before this")


def check_settings(*, above_zero: Mapping[str, float], not_below_zero: Mapping[str, float]) -> None:
    """Raise ValueError where a number is out of its range."""
    for name, value in above_zero.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    for name, value in not_below_zero.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")


def check_optimizer(lr: float, betas: tuple[float, float], weight_decay: float, warmup_steps: int | None) -> None:
    """Raise ValueError where a setting of Adam or its schedule is out of range."""
    rest = {"weight_decay": weight_decay, "warmup_steps": warmup_steps or 0}
    check_settings(above_zero={"lr": lr}, not_below_zero=rest)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas}; it must be two numbers from 0 to below 1")


def check_mask_ratio(ratio: float) -> None:
    """Raise ValueError where BERT would hide nothing or everything."""
    if not 0 < ratio < 1:
        raise ValueError(f"mask_ratio is {ratio}; it must lie between 0 and 1")


def check_class_names(names: Any, num_classes: int | None) -> None:
    """Raise ValueError unless names are a list of different texts, one per class."""
    if names is None:
        return
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names is {names!r}; it must be a list of texts")
    if len(set(names)) != len(names) or len(names) != (num_classes or len(names)):
        raise ValueError(
            f"class_names has {len(names)} names, {len(set(names))} of them different; there are "
            f"{num_classes or 'as many'} classes, and each needs a name of its own"
        )


def classes_of_data(trainer: Trainer) -> tuple[int | None, list[str] | None]:
    """(number, names) of the classes of the data module that is in use now, if it is one of this package's."""
    data = current_datamodule(trainer)
    return (data.num_classes, data.class_names) if hasattr(data, "needs_labels") else (None, None)


def adopt_class_names(module: Any) -> None:
    """Take the data's class names where the module has none, and compare the numbers of classes.

    Raises:
        ValueError: The data has more classes than the module.
    """
    count, names = classes_of_data(module.trainer)
    if count is not None and count > module.num_classes:
        raise ValueError(
            f"the data has {count} classes but num_classes is {module.num_classes}; set num_classes={count}"
        )
    if count is not None and count < module.num_classes:
        log.warning("num_classes is %d but the data has only %d classes", module.num_classes, count)
    if module.class_names is None and names is not None:
        rest = (f"LABEL_{number}" for number in range(len(names), module.num_classes))  # classes that the data lacks
        module.class_names = module.hparams["class_names"] = [*names, *rest]


def _wanted(network: NetworkLike, loaded: ImageGPTConfig) -> ImageGPTConfig:
    """What ``network`` asks of loaded weights: a mapping may name only the fields that differ."""
    if network is None:
        return loaded
    return ImageGPTConfig.resolve({**loaded.to_dict(), **network} if isinstance(network, Mapping) else network)


def _changed(config: ImageGPTConfig, **fields: Any) -> ImageGPTConfig:
    """The config with those fields replaced that are not None."""
    return replace(config, **{name: value for name, value in fields.items() if value is not None})


def _differences(actual: ImageGPTConfig, wanted: ImageGPTConfig) -> str:
    theirs, mine = actual.to_dict(), wanted.to_dict()
    return ", ".join(f"{key} {theirs[key]} (asked for: {mine[key]})" for key in theirs if theirs[key] != mine[key])
