"""What the modules share: a network with its palette, evaluations, checkpoints that describe themselves, settings."""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_igpt import __version__
from lightning_igpt.bases import LightningModule, is_model_parallel
from lightning_igpt.checkpointing import make_plain, run_of
from lightning_igpt.config import ImageGPTConfig, Objective, plain
from lightning_igpt.decoding import is_sharded
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules import resume
from lightning_igpt.modules.batches import Batch, Keys, check_keys, read_batch
from lightning_igpt.modules.resume import is_evaluating, trainer_of
from lightning_igpt.palette import Palette
from lightning_igpt.private import current_datamodule
from lightning_igpt.weights import load_pretrained
from lightning_igpt.weights.checkpoint import STAMP
from lightning_igpt.weights.native import COLORS, check_tokens_per_pixel

MODULES = tuple(f"lightning_igpt.modules.{name}" for name in ("pretrain", "finetune", "probe"))
# For self.log: a metric is the same on every process already, and its name says which loader's it is.
COMPLETE: dict[str, Any] = {"sync_dist": True, "add_dataloader_idx": False}
log = logging.getLogger(__name__)

NetworkLike = ImageGPTConfig | str | dict[str, Any] | None
PaletteLike = str | Palette | list[list[float]] | None
# A network with its palette, the origin of its weights in words that may be published, their file or folder, and the
# filter that made images small for them.
Built = tuple[ImageGPT, Palette, str | None, Path | None, str | None]


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
        check_tokens_per_pixel(colors, config)
        if len(colors) != config.vocab_size:
            cure = f"set vocab_size={len(colors)}, or fit a palette by palette fit --n_colors {config.vocab_size}"
            text = f"the palette has {len(colors)} colors but the network's vocab_size is {config.vocab_size}"
            raise ValueError(f"{text}; {cure}")
        return ImageGPT(config), colors, None, None, None
    with torch.device("cpu"):
        loaded = load_pretrained(pretrained, palette=palette)
    if isinstance(network, Mapping):  # it may name only the fields that differ
        network = {**loaded.config.to_dict(), **network}
    config = ImageGPTConfig.resolve(loaded.config if network is None else network)
    wanted = _changed(config, objective=objective, image_size=image_size)
    fixed = replace(wanted, dropout=loaded.config.dropout)
    if image_size is not None or isinstance(network, (ImageGPTConfig, Mapping)):  # a preset's size is no request
        fixed = replace(fixed, image_size=loaded.config.image_size)
    if fixed != loaded.config:
        cure = "leave out network and objective to take the loaded network's"
        raise ValueError(f"pretrained={pretrained!r} is a network of {_differences(loaded.config, fixed)}; {cure}")
    loaded = loaded.adapted(wanted)
    log.info("weights and palette from %s", loaded.origin)
    return loaded.network, loaded.palette, loaded.lineage, loaded.path, loaded.card.resize


class IGPTModule(LightningModule):
    """A LightningModule that has a network with its palette, and whose checkpoints describe themselves."""

    total_steps: int | None = None  # optimizer steps of the run, where no Trainer knows them
    label_places: Tensor | None = None  # the class of each of the data's labels, where these are others
    trained_classes: list[str] | None = None
    batch_keys: Keys
    validated_at: int | None = None  # the step whose validation a checkpoint may report
    lasting: ClassVar[dict[str, Any]] = {}  # settings that a continued run keeps, as they were before being options
    random_states = data_name = None
    batches_seen = 0

    def register(self, built: Built, *names: str, keys: Keys, **others: Any) -> None:
        """Attach network and palette; keep attributes and values as hyperparameters, so that checkpoints open alone."""
        self.metrics: dict[int, dict[str, Any]] = {}  # of each loader in the evaluation that runs
        self.batch_keys = check_keys(keys)
        self.network, self.palette, self.origin, self.origin_path, self.resize_filter = built
        side, colors = self.config.image_size, self.palette.to_list()
        self.example = self.example_input_array = torch.zeros(1, 3, side, side, dtype=torch.uint8, device="cpu")
        self.register_buffer(COLORS, torch.tensor(colors, dtype=torch.float32, device="cpu"))  # (K, 3)
        named = {"network": self.config.to_dict(), "palette": self.palette.spec, "keys": self.batch_keys}
        named |= {name: getattr(self, name) for name in names} | others
        frame = inspect.currentframe()
        while frame is not None and frame.f_back is not None:  # else Lightning compares arguments, which may be arrays
            frame = frame.f_back
        self.save_hyperparameters(named, frame=frame)

    @property
    def config(self) -> ImageGPTConfig:
        """The network's shape; data modules read ``image_size`` here."""
        return self.network.config

    @property
    def hparams_initial(self) -> Any:
        """For loggers; Lightning stops where a data module has another value of a name."""
        mine, data = super().hparams_initial, getattr(trainer_of(self), "datamodule", None)
        silent = type(data).__module__.startswith("lightning_igpt.")  # a user's subclass may log its own
        theirs = {} if data is None or silent else data.hparams_initial
        for name in mine.keys() & theirs.keys():
            mine[f"model/{name}"] = mine.pop(name)
        return mine

    def read(self, batch: Any) -> Batch:
        """A batch as the network reads it."""
        return read_batch(batch, self.palette, self.config, self.batch_keys)

    def tokens_of(self, batch: Any) -> Tensor:
        """The tokens of a batch, int64 (B, T); callbacks read batches through this."""
        return self.read(batch).tokens

    def configure_model(self) -> None:
        shard_network(self)

    def on_fit_start(self) -> None:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        kinds = {kind.__name__ for callback in callbacks for kind in type(callback).__mro__}  # of both packages
        if kinds & {"BatchSizeFinder", "LearningRateFinder"}:  # they have run, and changed the steps or the rate
            self.trainer.strategy.setup_optimizers(self.trainer)

    def on_train_start(self) -> None:
        resume.start_training(self)

    def new_metrics(self) -> dict[str, Any]:
        """What counts in an evaluation, for each loader."""
        raise NotImplementedError

    def log_metrics(self, stage: str) -> None:
        """Log what an evaluation, ``val`` or ``test``, has counted."""
        raise NotImplementedError

    def begin_evaluation(self) -> None:
        """Start counting for every loader of an evaluation; counts of an interrupted evaluation are dropped."""
        self.metrics = {}
        if (trainer := trainer_of(self)) is not None:
            sizes = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
            for loader in range(len(sizes)):  # on all processes alike, also where one has no batch
                self.metrics_of(loader)

    def metrics_of(self, loader: int) -> dict[str, Any]:
        """The metrics of a loader in the evaluation that runs."""
        if loader not in self.metrics:
            with torch.inference_mode(False), torch.device("cpu"):  # tensors of inference mode cannot be updated later
                self.metrics[loader] = {name: metric.to(self.device) for name, metric in self.new_metrics().items()}
        return self.metrics[loader]

    def end_evaluation(self) -> list[tuple[dict[str, Any], str]]:
        """The metrics of each loader, with the ending that its names get as in Lightning; forgets them."""
        trainer, kept, self.metrics = trainer_of(self), self.metrics, {}
        if trainer is not None and trainer.validating:
            self.validated_at = trainer.global_step  # the numbers must not describe later weights
        return [(kept[loader], f"/dataloader_idx_{loader}" if len(kept) > 1 else "") for loader in sorted(kept)]

    def warn_if_untrained(self, weight: Tensor) -> None:
        """Warn where ``validate``, ``test`` or ``predict`` get weights that start at zero and still are."""
        if is_evaluating(self) and not weight.any():
            log.warning("these are random weights: no pretrained=, no ckpt_path, and no training before this")

    def on_validation_epoch_end(self) -> None:
        self.log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self.log_metrics("test")

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise ValueError where a run of this module cannot continue from a checkpoint; names both values."""
        mine, other = type(self).__name__, checkpoint.get(STAMP)
        if other is None:
            raise ValueError(f"this checkpoint was not written by {mine}; to start from its weights, use pretrained=")
        if not isinstance(other, Mapping) or not {"class", "network", "palette_sha256"} <= other.keys():
            raise ValueError("this checkpoint is damaged: its metadata is incomplete")
        if other["class"] not in [kind.__name__ for kind in type(self).__mro__]:
            what = f"this checkpoint is a {other['class']}'s and the model is a {mine}"
            raise ValueError(f"{what}; to start from its weights, use pretrained=")
        config = ImageGPTConfig.resolve(other["network"])
        if config != self.config:
            raise ValueError(f"the checkpoint holds a network of {_differences(config, self.config)}")
        if (theirs := other["palette_sha256"]) != self.palette.sha256:
            text = f"the checkpoint uses the palette {theirs[:12]}, but the palette given is {self.palette.sha256[:12]}"
            raise ValueError(f"{text}; leave out palette to take the right one")
        for name, before in ({} if is_evaluating(self) else self.lasting).items():
            mine, saved = getattr(self, name), checkpoint.get("hyper_parameters", {}).get(name, before)
            if mine != saved:
                what = f"{name} is {mine}, but the run to continue has {saved}; keep {saved}, or start a new run from"
                raise ValueError(f"{what} its weights with pretrained=")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer, step = trainer_of(self), self.validated_at
        metrics: dict[str, float] = {}
        if trainer is not None and step is not None:
            logged = trainer.callback_metrics.items()
            metrics = {"step": step} | {name: float(value) for name, value in logged if name.startswith("val/")}
        checkpoint["state_dict"][COLORS] = self.palette.colors  # exact, whereas bfloat16 rounds the buffer
        described = {"network": self.config.to_dict(), "palette": self.palette.spec}
        if settings := checkpoint.get("hyper_parameters"):
            settings |= described  # what a subclass that calls save_hyperparameters was given; and rates set later
            settings |= {name: getattr(self, name) for name in ("lr", "weight_decay")}
            if settings.get("pretrained"):
                settings["pretrained"] = described  # its file may be gone
        checkpoint[STAMP] = {
            "class": next(kind.__name__ for kind in type(self).__mro__ if kind.__module__ in MODULES),
            "version": __version__,
            "network": self.config.to_dict(),
            "palette_sha256": self.palette.sha256,
            "steps": int(checkpoint.get("global_step", 0)),
            "data": self.data_name,
            "resize": self.resize_filter,
            "classes": self.trained_classes,
            "origin": self.origin,
            "validation": metrics,
            "run": None if trainer is None else run_of(trainer),
        }
        resume.save_random_states(self, checkpoint)
        make_plain(checkpoint)  # here, too, for trainers that write by Lightning's own means

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        stamp, self.origin_path = checkpoint[STAMP], None
        self.data_name, self.origin, self.resize_filter = (stamp.get(name) for name in ("data", "origin", "resize"))
        resume.load_run_state(self, checkpoint)


def check_example(module: Any, trainer: Trainer) -> None:
    """Drop the example input where a user's hook or ``forward`` may expect whole batches; summaries call them."""
    users = [type(user) for user in (module, current_datamodule(trainer)) if user is not None]
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    modules = {getattr(kind, hook).__module__ for kind in users for hook in hooks}
    changed = modules - {"lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks"}
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


def check_settings(
    *, above_zero: dict[str, Any], betas: tuple[float, ...] = (0, 0), **not_below_zero: float | None
) -> None:
    """Raise ValueError where a number is out of its range; None is in each."""
    if len(betas) != 2 or not all(not isinstance(beta, str) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas is {betas}; it must be two numbers from 0 to below 1")
    for name, value in (above_zero | not_below_zero).items():
        if isinstance(value, str) or not (value is None or value > 0 or (value == 0 and name in not_below_zero)):
            raise ValueError(f"{name} is {value!r}; it must be {'0 or more' if name in not_below_zero else 'above 0'}")


def check_masks(config: ImageGPTConfig, ratio: float, mask_inputs: bool = True, n_masks: int = 1) -> None:
    """Raise ValueError where BERT would hide nothing or everything, or use masks that it does not have."""
    if isinstance(ratio, str) or not 0 < ratio < 1:
        raise ValueError(f"mask_ratio is {ratio}; it must lie between 0 and 1, or in pretraining be uniform")
    check_settings(above_zero={"n_masks": n_masks})
    if config.objective == "bert" and not mask_inputs and n_masks > 1:
        raise ValueError(f"mask_inputs=False uses no mask, but n_masks is {n_masks}; set n_masks=1 or mask_inputs=True")


def _changed(config: ImageGPTConfig, **fields: Any) -> ImageGPTConfig:
    """The config with those fields replaced that are not None."""
    return replace(config, **{name: value for name, value in fields.items() if value is not None})


def _differences(actual: ImageGPTConfig, wanted: ImageGPTConfig) -> str:
    theirs, mine = actual.to_dict(), wanted.to_dict()
    return ", ".join(f"{key} {theirs[key]} (asked for: {mine[key]})" for key in theirs if theirs[key] != mine[key])
