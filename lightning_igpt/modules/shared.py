"""What the three modules do alike: build a network with its palette, and stamp and check checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_igpt import __version__
from lightning_igpt.config import ImageGPTConfig, Objective
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules.batches import Batch
from lightning_igpt.modules.deferred import DeferredGPT
from lightning_igpt.objectives import draw_mask
from lightning_igpt.palette import Palette
from lightning_igpt.weights import load_pretrained
from lightning_igpt.weights.checkpoint import STAMP
from lightning_igpt.weights.native import COLORS

log = logging.getLogger(__name__)

MAX_PROCESSES = 65_536  # keeps the sample numbers of different processes apart

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
    defer_init: bool = False,
) -> Built:
    """Make or load the network and its palette from a module's arguments.

    Loaded weights keep their shape; only ``image_size`` (positions are interpolated) and ``dropout`` may differ.

    Raises:
        ValueError: The arguments contradict each other or the loaded weights.
    """
    if pretrained is None:
        config = ImageGPTConfig.resolve("igpt_s" if network is None else network)
        config = _changed(config, objective=objective, image_size=image_size)
        colors = Palette.load("openai" if palette is None else palette)
        check_colors(colors, config)
        return Built((DeferredGPT if defer_init else ImageGPT)(config), colors)
    loaded = load_pretrained(pretrained, palette=palette)
    wanted = _changed(_wanted(network, loaded.config), objective=objective, image_size=image_size)
    fixed = replace(wanted, dropout=loaded.config.dropout)
    if image_size is not None or isinstance(network, (ImageGPTConfig, Mapping)):  # a preset's size is not a wish
        fixed = replace(fixed, image_size=loaded.config.image_size)
    if fixed != loaded.config:
        raise ValueError(
            f"pretrained={pretrained!r} is a network of {_differences(loaded.config, fixed)}; "
            "leave out network and objective to take the loaded network's"
        )
    loaded = loaded.adapted(wanted)
    log.info("weights and palette from %s", loaded.origin)
    return Built(loaded.network, loaded.palette, loaded.lineage, loaded.path)


def check_colors(palette: Palette, config: ImageGPTConfig) -> None:
    """Raise unless the palette has as many colours as the network has classes."""
    if len(palette) != config.vocab_size:
        raise ValueError(
            f"the palette has {len(palette)} colours but the network's vocab_size is {config.vocab_size}; "
            f"set vocab_size={len(palette)}, or fit a palette of {config.vocab_size} colours "
            f"(lightning-igpt palette fit --n_colors {config.vocab_size})"
        )


def check_palette(palette: Palette, sha256: str, owner: str) -> None:
    """Raise unless the palette is the one with this hash: another one gives every token another colour."""
    if palette.sha256 != sha256:
        raise ValueError(
            f"{owner} uses the palette {sha256[:12]}, but the palette given is {palette.sha256[:12]}; "
            "leave out palette to take the right one"
        )


def register(module: LightningModule, network: ImageGPT, palette: Palette, **hyperparameters: Any) -> None:
    """Attach the palette and keep hyperparameters as plain values, so that a checkpoint needs nothing else to open.

    The network's config takes the place of ``network`` and ``pretrained``: a checkpoint holds the weights.
    """
    module.register_buffer(COLORS, torch.tensor(palette.to_list(), dtype=torch.float32))  # (K, 3)
    module.save_hyperparameters({"network": network.config.to_dict(), "palette": palette.spec, **hyperparameters})


def stamp(module: LightningModule, config: ImageGPTConfig, palette: Palette, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint what it is, and the palette as it is: training in bfloat16 rounds the module's buffer."""
    checkpoint["state_dict"][COLORS] = palette.colors
    checkpoint[STAMP] = {
        "class": type(module).__name__,
        "version": __version__,
        "network": config.to_dict(),
        "palette_sha256": palette.sha256,
        "steps": int(checkpoint.get("global_step", 0)),
        "data": _data_name(module),
        "origin": getattr(module, "origin", None),
        "validation": _validation(module),
    }


def note_validation(module: Any) -> None:
    """Remember the step at which validation ended; call it from ``on_validation_epoch_end``.

    A checkpoint may be written before the validation of its step, and must not pass older numbers off as its own.
    """
    if not module.trainer.sanity_checking:
        module.validated_at = module.trainer.global_step


def _validation(module: Any) -> dict[str, float]:
    step = getattr(module, "validated_at", None)
    if step is None:
        return {}
    metrics = module.trainer.callback_metrics.items()
    return {"step": step, **{name: float(value) for name, value in metrics if name.startswith("val/")}}


def _data_name(module: Any) -> str | None:
    """The data's name without the path to it, which is nobody's business where weights are published."""
    data = getattr(getattr(module, "_trainer", None), "datamodule", None)
    source = data.hparams.get("source") if data is not None else None
    if not isinstance(source, str):
        return None
    return Path(source).name if Path(source).exists() or Path(source).is_absolute() else source


def check_stamp(
    module: LightningModule, config: ImageGPTConfig, palette: Palette, checkpoint: Mapping[str, Any]
) -> None:
    """Raise where a checkpoint is not one of this module with this network and palette.

    Raises:
        ValueError: It was written by another class, network or palette; the message names both and the cure.
    """
    mine, found = type(module).__name__, checkpoint.get(STAMP)
    if found is None:
        raise ValueError(f"this checkpoint was not written by {mine}; to start from its weights, use pretrained=")
    if not isinstance(found, Mapping) or not {"class", "network", "palette_sha256"} <= found.keys():
        raise ValueError("this checkpoint is damaged: its own description is no longer there")
    if found["class"] != mine:
        raise ValueError(
            f"ckpt_path continues the same run, but this checkpoint is a {found['class']}'s and the model is a {mine}; "
            f"to start from its weights, use pretrained="
        )
    other = ImageGPTConfig.resolve(found["network"])
    if other != config:
        raise ValueError(f"the checkpoint holds a network of {_differences(other, config)}")
    check_palette(palette, found["palette_sha256"], "the checkpoint")


def keep_rates(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Let a resumed run train with the module's learning rate, betas and weight decay, not the checkpoint's.

    Lightning restores the optimiser with the settings that it was saved with, whatever recipe and flags say. Groups
    keep the scale of their rate, which layer-wise decay gave them.
    """
    rates: list[float] = []
    for state in checkpoint.get("optimizer_states", []):
        groups = [group for group in state["param_groups"] if "initial_lr" in group and {"betas", "parts"} & set(group)]
        for number, group in enumerate(groups):
            group["initial_lr"] = module.lr * group.get("lr_scale", 1.0)
            if "betas" in group:  # Muon's groups, which have parts, are without
                group["betas"] = module.betas
            if group.get("decayed", number == 0):  # without the mark it is an older checkpoint's, matrices first
                group["weight_decay"] = module.weight_decay
        rates += [group["initial_lr"] for group in groups]
    for state in checkpoint.get("lr_schedulers", []):
        if "base_lrs" in state:  # a sharded checkpoint keeps its groups elsewhere, so scale what is there
            old = state["base_lrs"]
            state["base_lrs"] = rates if len(rates) == len(old) else [module.lr * (rate / max(old)) for rate in old]


def follow_schedule(trainer: Trainer) -> None:
    """Set each learning rate to what its schedule says now; a restored one may come from a shorter run's schedule."""
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            parts = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, base, factor in parts:
                group["lr"] = base * factor(schedule.last_epoch)


def check_settings(*, above_zero: Mapping[str, float], not_below_zero: Mapping[str, float]) -> None:
    """Raise where a number is out of its range.

    Raises:
        ValueError: Names the setting and its value.
    """
    for name, value in above_zero.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    for name, value in not_below_zero.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")


def check_optimizer(lr: float, betas: tuple[float, float], weight_decay: float, warmup_steps: int | None) -> None:
    """Raise where a setting of Adam or its schedule makes no sense."""
    rest = {"weight_decay": weight_decay, "warmup_steps": warmup_steps or 0}
    check_settings(above_zero={"lr": lr}, not_below_zero=rest)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas}; it must be two numbers from 0 to below 1")


def check_mask_ratio(ratio: float) -> None:
    """Raise where BERT would hide nothing or everything."""
    if not 0 < ratio < 1:
        raise ValueError(f"mask_ratio is {ratio}; it must lie between 0 and 1")


def mask_for(module: Any, batch: Batch, batch_idx: int, number: int = 0) -> Tensor | None:
    """BERT's mask (B, T) of a batch, the same whenever the same sample comes; None for autoregressive networks.

    Args:
        module: One of this package's modules: its ``config``, ``seed`` and ``mask_ratio`` are used.
        batch: The batch. Where its loader gives no sample numbers, they are made of batch, process and row.
        batch_idx: Lightning's number of the batch.
        number: Which of several masks of the same sample.
    """
    if module.config.objective == "autoregressive":
        return None
    samples = sample_numbers(module, batch, batch_idx)
    seed = module.seed + 1_000_003 * number  # far from the seeds that people choose
    return draw_mask(samples, module.config.n_positions, seed=seed, ratio=module.mask_ratio)


def evaluation_masks(module: Any, batch: Batch, batch_idx: int) -> list[Tensor | None]:
    """The masks under which a BERT network is evaluated: ``n_masks`` of them, or one that hides nothing.

    The paper hides pixels in evaluation too, and lets five masks vote (section 4.6). ``[None]`` for autoregressive
    networks.

    Args:
        module: A ProbeModule or FineTuneModule: beside what mask_for uses, its ``mask_inputs`` and ``n_masks``.
        batch: The batch.
        batch_idx: Lightning's number of the batch.
    """
    if module.config.objective == "autoregressive":
        return [None]
    if not module.mask_inputs:
        return [torch.zeros_like(batch.tokens, dtype=torch.bool)]
    return [mask_for(module, batch, batch_idx, number) for number in range(module.n_masks)]


def sample_numbers(module: Any, batch: Batch, batch_idx: int) -> Tensor:
    """The number of each sample, int64 (B,): the loader's, or made of batch, process and row."""
    if batch.samples is not None:
        return batch.samples
    trainer = getattr(module, "_trainer", None)
    count = trainer.fit_loop.total_batch_idx + 1 if module.training and trainer is not None else batch_idx
    size = len(batch.tokens)
    first = (count * MAX_PROCESSES + module.global_rank) * size
    return torch.arange(first, first + size, device=batch.tokens.device)


def check_class_names(names: Any, num_classes: int | None) -> None:
    """Raise where names cannot be those of the classes, before anything is trained.

    Raises:
        ValueError: They are no list of different texts, one per class.
    """
    if names is None:
        return
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names is {names!r}; it must be a list of texts")
    if len(set(names)) != len(names) or len(names) != (num_classes or len(names)):
        raise ValueError(
            f"class_names has {len(names)} names, {len(set(names))} of them different; there are "
            f"{num_classes or 'as many'} classes, and each needs a name of its own"
        )


def adopt_class_names(module: Any, num_classes: int) -> None:
    """Take class names, and check the number of classes, from a data module that knows them.

    Raises:
        ValueError: The data has another number of classes than the module.
    """
    data = getattr(module.trainer, "datamodule", None)
    found, names = getattr(data, "num_classes", None), getattr(data, "class_names", None)
    if found is not None and found > num_classes:
        raise ValueError(f"the data has {found} classes but num_classes is {num_classes}; set num_classes={found}")
    if found is not None and found < num_classes:
        log.warning("num_classes is %d but the data has only %d classes", num_classes, found)
    if module.class_names is None and names is not None:
        rest = (f"LABEL_{number}" for number in range(len(names), num_classes))  # classes that the data lacks
        module.class_names = [*names, *rest]
        module.hparams["class_names"] = module.class_names


def total_steps(trainer: Trainer) -> tuple[int, int | None]:
    """(optimiser steps of the run, optimiser steps per data epoch if the data module knows its size)."""
    batches = getattr(getattr(trainer, "datamodule", None), "batches_per_epoch", None)
    if batches is None:
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("a cosine needs to know where the run ends: give the trainer max_steps or max_epochs")
        return int(total), None
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    # Lightning steps on an accumulation window that the end of an epoch cuts short, too.
    per_epoch = max(1, -(-batches // trainer.accumulate_grad_batches))
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        ends.append(per_epoch * trainer.max_epochs)
    if not ends:
        raise ValueError("a cosine needs to know where the run ends: give the trainer max_steps or max_epochs")
    return min(ends), per_epoch


def _wanted(network: NetworkLike, loaded: ImageGPTConfig) -> ImageGPTConfig:
    """What ``network`` asks for beside loaded weights: a mapping may name only the fields that shall differ."""
    if network is None:
        return loaded
    return ImageGPTConfig.resolve({**loaded.to_dict(), **network} if isinstance(network, Mapping) else network)


def _changed(config: ImageGPTConfig, **fields: Any) -> ImageGPTConfig:
    """The config with those fields replaced that are not None."""
    return replace(config, **{name: value for name, value in fields.items() if value is not None})


def _differences(found: ImageGPTConfig, wanted: ImageGPTConfig) -> str:
    theirs, mine = found.to_dict(), wanted.to_dict()
    return ", ".join(f"{key} {theirs[key]} (asked for: {mine[key]})" for key in theirs if theirs[key] != mine[key])
