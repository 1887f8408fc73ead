"""What the modules share: a network with its palette, the description in their checkpoints, settings, classes."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.hooks import DataHooks
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_igpt import __version__
from lightning_igpt.bases import is_model_parallel
from lightning_igpt.checkpointing import make_plain, run_of
from lightning_igpt.config import ImageGPTConfig, Objective, plain
from lightning_igpt.decoding import is_sharded
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules.resume import is_evaluating, is_own, load_run_state, save_random_states, trainer_of
from lightning_igpt.palette import Palette
from lightning_igpt.private import current_datamodule
from lightning_igpt.weights import load_pretrained
from lightning_igpt.weights.checkpoint import STAMP
from lightning_igpt.weights.native import COLORS

MODULES = tuple(f"lightning_igpt.modules.{name}" for name in ("pretrain", "finetune", "probe"))
# For self.log: a metric is the same on every process already, and its name says which loader's it is.
COMPLETE: dict[str, Any] = {"sync_dist": True, "add_dataloader_idx": False}
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
    """Make or load the network and its palette; ValueError where the arguments contradict each other or the weights.

    Loaded weights keep their shape; only ``image_size`` (positions are interpolated) and ``dropout`` may differ.
    """
    network, palette, pretrained = plain(network), plain(palette), plain(pretrained)
    if isinstance(pretrained, Mapping):  # of a subclass's checkpoint: the weights follow
        network, palette, pretrained = pretrained["network"], pretrained["palette"], None
    if pretrained is None:
        config = ImageGPTConfig.resolve("igpt_s" if network is None else network)
        config = _changed(config, objective=objective, image_size=image_size)
        colors = Palette.load("openai" if palette is None else palette)
        if len(colors) != config.vocab_size:
            raise ValueError(
                f"the palette has {len(colors)} colors but the network's vocab_size is {config.vocab_size}; "
                f"set vocab_size={len(colors)}, or fit a palette by palette fit --n_colors {config.vocab_size}"
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


def register(module: Any, built: Built, *names: str, **others: Any) -> None:
    """Attach network and palette; keep these attributes and values as hyperparameters, in place of the weights' source.

    They are plain values, so that a checkpoint opens by itself.
    """
    module.metrics, module.batches_seen, module.validated_at, module.random_states = {}, 0, None, None
    module.data_name = module.trained_classes = module.label_places = None
    side = built.network.config.image_size
    module.example = module.example_input_array = torch.zeros(1, 3, side, side, dtype=torch.uint8, device="cpu")
    module.network, module.palette, module.origin, module.origin_path = built
    colors = torch.tensor(built.palette.to_list(), dtype=torch.float32, device="cpu")  # (K, 3)
    module.register_buffer(COLORS, colors)
    named = {"network": built.network.config.to_dict(), "palette": built.palette.spec}
    module.save_hyperparameters(named | {name: getattr(module, name) for name in names} | others)


def hparams_to_log(module: Any, mine: dict[str, Any]) -> dict[str, Any]:
    """A module's hyperparameters for loggers; Lightning stops where a data module has another value of a name."""
    data = getattr(trainer_of(module), "datamodule", None)
    theirs = {} if data is None or is_own(data) else data.hparams_initial
    for name in mine.keys() & theirs.keys():
        mine[f"model/{name}"] = mine.pop(name)
    return mine


def check_example(module: Any, trainer: Trainer) -> None:
    """Drop the example input where a user's hook or ``forward`` may expect whole batches; summaries call them."""
    users = [type(one) for one in (module, current_datamodule(trainer)) if one is not None]
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    changed = any(getattr(kind, hook) is not getattr(DataHooks, hook) for kind in users for hook in hooks)
    if module.example_input_array is module.example and (changed or type(module).forward.__module__ not in MODULES):
        module.example_input_array = None


def shard_network(module: Any) -> None:
    """Shard a module's network under ModelParallelStrategy; call it from ``configure_model``.

    The units are blocks, the rest of the network, and a classifier's head. Weights on the meta device, where
    ``trainer.init_module(empty_init=True)`` leaves them, are drawn by the first process as on one device.
    """
    trainer, network = trainer_of(module), module.network
    if trainer is None:  # load_from_checkpoint configures the model, too
        return
    check_example(module, trainer)
    strategy = trainer.strategy
    if not is_model_parallel(strategy):
        if is_sharded(network):
            name = type(strategy).__name__
            raise ValueError(f"{name} cannot train a sharded network: load its checkpoint into a new module")
        return
    _check_strategy(trainer, module.device_mesh)
    module.example_input_array = None  # a summary's forward pass would leave gathered weights behind
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
        sizes = f"data_parallel_size={data * tensor}, tensor_parallel_size=1"
        raise ValueError(f"the strategy has tensor_parallel_size={tensor}, but layers are not divided: set {sizes}")
    if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError("weights cannot be averaged while they are sharded; leave out WeightAveraging, or use DDP")


def _share_out(network: ImageGPT, strategy: Any) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    dtype = network.wte.weight.dtype
    network.to_empty(device=strategy.root_device)
    weights = ImageGPT(network.config).to(dtype).state_dict() if strategy.is_global_zero else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, weights, options=options)


def mean() -> MeanMetric:
    """Torchmetrics' mean, summed in float32: in bf16-true a sum in bfloat16 would stop growing at 256 images."""
    return MeanMetric().set_dtype(torch.float32)  # type: ignore[return-value]


def begin_evaluation(module: Any) -> None:
    """Start counting for every loader of an evaluation, without what is left of an earlier one that broke off."""
    module.metrics = {}
    trainer = trainer_of(module)
    if trainer is not None:
        sizes = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        for loader in range(len(sizes)):  # on all processes alike, also where one has no batch
            metrics_of(module, loader)


def metrics_of(module: Any, loader: int) -> dict[str, Any]:
    """The metrics of a loader in the evaluation that runs, by ``module.new_metrics()``."""
    if loader not in module.metrics:
        with torch.inference_mode(False), torch.device("cpu"):  # tensors of inference mode cannot be updated later
            module.metrics[loader] = {name: one.to(module.device) for name, one in module.new_metrics().items()}
    return module.metrics[loader]  # type: ignore[no-any-return]


def end_evaluation(module: Any) -> list[tuple[dict[str, Any], str]]:
    """The metrics of each loader, with the ending that its names get as in Lightning; forgets them."""
    trainer, kept, module.metrics = trainer_of(module), module.metrics, {}
    if trainer is not None and trainer.validating:
        module.validated_at = trainer.global_step  # the numbers must not describe later weights
    return [(kept[loader], f"/dataloader_idx_{loader}" if len(kept) > 1 else "") for loader in sorted(kept)]


def save(module: Any, checkpoint: dict[str, Any]) -> None:
    """Describe a checkpoint in itself; keep random states and the exact palette, whose buffer bfloat16 rounds."""
    trainer = trainer_of(module)
    step, metrics = module.validated_at if trainer is not None else None, {}
    if step is not None:
        logged = module.trainer.callback_metrics.items()
        metrics = {"step": step} | {name: float(value) for name, value in logged if name.startswith("val/")}
    checkpoint["state_dict"][COLORS] = module.palette.colors
    described = {"network": module.config.to_dict(), "palette": module.palette.spec}
    if settings := checkpoint.get("hyper_parameters"):
        settings |= described  # a subclass that calls save_hyperparameters stores what it was given
        if settings.get("pretrained"):
            settings["pretrained"] = described  # its file may be gone
    checkpoint[STAMP] = {
        "class": next(kind.__name__ for kind in type(module).__mro__ if kind.__module__ in MODULES),
        "version": __version__,
        "network": module.config.to_dict(),
        "palette_sha256": module.palette.sha256,
        "steps": int(checkpoint.get("global_step", 0)),
        "data": module.data_name,
        "classes": module.trained_classes,
        "origin": module.origin,
        "validation": metrics,
        "run": None if trainer is None else run_of(trainer),
    }
    save_random_states(module, checkpoint)
    make_plain(checkpoint)  # here, too, for trainers that write by Lightning's own means


def check_stamp(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Raise ValueError unless a checkpoint is one of this class with this network and palette; names both values."""
    mine, other = type(module).__name__, checkpoint.get(STAMP)
    if other is None:
        raise ValueError(f"this checkpoint was not written by {mine}; to start from its weights, use pretrained=")
    if not isinstance(other, Mapping) or not {"class", "network", "palette_sha256"} <= other.keys():
        raise ValueError("this checkpoint is damaged: its description of itself is incomplete")
    if other["class"] not in [kind.__name__ for kind in type(module).__mro__]:
        what = f"this checkpoint is a {other['class']}'s and the model is a {mine}"
        raise ValueError(f"{what}; to start from its weights, use pretrained=")
    config = ImageGPTConfig.resolve(other["network"])
    if config != module.config:
        raise ValueError(f"the checkpoint holds a network of {_differences(config, module.config)}")
    if other["palette_sha256"] != module.palette.sha256:
        raise ValueError(
            f"the checkpoint uses the palette {other['palette_sha256'][:12]}, but the palette given is "
            f"{module.palette.sha256[:12]}; leave out palette to take the right one"
        )


def check_same(module: Any, checkpoint: Mapping[str, Any], name: str, before: Any) -> None:
    """Raise ValueError where a run to continue has another value of a setting; ``before`` there was one."""
    mine, saved = getattr(module, name), checkpoint.get("hyper_parameters", {}).get(name, before)
    if mine != saved and not is_evaluating(module):
        raise ValueError(
            f"{name} is {mine}, but the run to continue has {saved}; keep {saved}, or start a new run from its weights "
            "with pretrained="
        )


def load(module: Any, checkpoint: dict[str, Any]) -> None:
    """Check a checkpoint and prepare it for the module; for on_load_checkpoint."""
    module.check_checkpoint(checkpoint)
    module.data_name = checkpoint[STAMP].get("data")
    if "origin" in checkpoint[STAMP]:  # older ones do not say where their weights came from
        module.origin, module.origin_path = checkpoint[STAMP]["origin"], None
    load_run_state(module, checkpoint)


def warn_if_untrained(module: Any, weight: Tensor) -> None:
    """Warn where ``validate``, ``test`` or ``predict`` get weights that start at zero and still are."""
    if is_evaluating(module) and not weight.any():
        log.warning("these are random weights: no pretrained=, no ckpt_path, and no training before this")


def check_settings(*, above_zero: dict[str, Any], **not_below_zero: float | None) -> None:
    """Raise ValueError where a number is out of its range; None is in each."""
    for name, value in (above_zero | not_below_zero).items():
        if value is not None and not (value > 0 or (value == 0 and name in not_below_zero)):
            raise ValueError(f"{name} is {value}; it must be {'0 or more' if name in not_below_zero else 'above 0'}")


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ValueError unless they are Adam's."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas}; it must be two numbers from 0 to below 1")


def check_masks(config: ImageGPTConfig, ratio: float, mask_inputs: bool = True, n_masks: int = 1) -> None:
    """Raise ValueError where BERT would hide nothing or everything, or use masks that it does not have."""
    if not 0 < ratio < 1:
        raise ValueError(f"mask_ratio is {ratio}; it must lie between 0 and 1")
    check_settings(above_zero={"n_masks": n_masks})
    if config.objective == "bert" and not mask_inputs and n_masks > 1:
        raise ValueError(f"mask_inputs=False uses no mask, but n_masks is {n_masks}; set n_masks=1 or mask_inputs=True")


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
