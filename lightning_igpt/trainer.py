"""A ``lightning.Trainer`` with the choices made that suit Image GPT; every one of them can be overridden."""

import re
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO, LayerSync, MixedPrecision, Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info

from lightning_igpt import callbacks as ours
from lightning_igpt.callbacks.loggers import STEADY
from lightning_igpt.callbacks.preempt import ends_here
from lightning_igpt.callbacks.throughput import is_frozen
from lightning_igpt.checkpointing import AtomicCheckpointIO, SteadyCheckpoint
from lightning_igpt.config import ImageGPTConfig, plain
from lightning_igpt.private import multiplies_bfloat16
from lightning_igpt.strategies import Chosen, choose_strategy, kind_of_device

Plugin: TypeAlias = CheckpointIO | Precision | ClusterEnvironment | LayerSync
# Each idle where it has nothing to do.
ALWAYS = ("LayerCurve", "ClassificationReport", "RunRecord", "Throughput", "DiskCheck", "FiniteGuard", "Preempt")
ENDS = {"max": "accuracy", "min": "(loss|cross_entropy|nats_per_pixel(_bound)?|bits_per_pixel|bits_per_dim)"}
PRODUCTS = {
    "highest": "",  # in full, as torch does by itself
    "high": "float32 products as TF32 where the device has it",
    "medium": "float32 products as TF32 or bfloat16 where the device has them",
}


def make_trainer(
    *,
    max_steps: int = -1,
    max_epochs: int | None = None,
    precision: str | int | None = None,
    compile: bool | Literal["auto"] = "auto",
    matmul_precision: Literal["highest", "high", "medium"] | None = None,
    recompute: Literal["auto", "none", "selective", "full"] = "auto",
    accelerator: str = "auto",
    devices: list[int] | str | int = "auto",
    val_check_interval: int | float | None = None,
    checkpoint_every: int | None = None,
    monitor: str | None = None,
    mode: Literal["min", "max"] | None = None,
    callbacks: list[Callback] | Callback | None = None,
    plugins: Plugin | str | list[Plugin | str] | None = None,
    strategy: Strategy | str = "auto",
    module: LightningModule | None = None,
    data: LightningDataModule | None = None,
    **kwargs: Any,
) -> Trainer:
    """A plain Trainer with settings that suit the device, checkpoints that survive a crash, and useful intervals.

    When training starts, the log names the strategy and the choices for speed, with reasons.

    Args:
        max_steps: Optimizer steps of the run. Pretraining counts in steps, as the paper does.
        max_epochs: Passes over the data; for probing (1) and fine-tuning.
        precision: Lightning's name of a precision. Default: bf16-mixed where the network trains faster, else 32-true.
        compile: Compile the network's blocks for training; auto compiles if the run is long enough to gain from it.
        matmul_precision: Precision of float32 products in the whole process while this trainer runs: highest; high,
            which is TF32 (10 of 23 bits) and faster on GPUs that have it; medium, which may use bfloat16. Default: high
            if fit trains a network in float32 on such a GPU, else torch's setting.
        recompute: Activation checkpointing: a block keeps only its input (full), or its input and the output of
            attention (selective), and recomputes the rest in the backward pass. auto does so only if training would not
            fit otherwise.
        accelerator: ``cpu``, ``gpu``, ... or ``auto``.
        devices: Number or list of devices, or ``auto``.
        val_check_interval: Batches between validations (int), or a fraction of an epoch (float). Default: 10
            validations in a run counted in steps, unless check_val_every_n_epoch is above 1; else one per epoch. A run
            that would end without a validation validates after its last step.
        checkpoint_every: Optimizer steps between checkpoints; a checkpoint follows a validation that is due. Default: a
            tenth of a run counted in steps, at most 1000 steps; else an epoch.
        monitor: Also keep the checkpoint that is best in this metric, such as val/accuracy or val/nats_per_pixel.
        mode: Whether the least (min) or the largest (max) value of monitor is best. Default: max for names that end in
            accuracy; min for loss, cross_entropy, nats_per_pixel (or _bound), bits_per_pixel and bits_per_dim.
        callbacks: Added to ModelCheckpoint, LearningRate, LayerCurve, ClassificationReport, RunRecord,
            Throughput, CompileBlocks, Recompute, DiskCheck, FiniteGuard, Preempt and Progress. A callback of such a
            class replaces ours, as do any progress bar and LearningRateMonitor.
        plugins: Lightning plugins; a CheckpointIO among them replaces ours.
        strategy: Default: DDP on several devices, or FSDP2 if network and optimizer do not fit on each device.
            ``fsdp2`` selects FSDP2; other names are Lightning's, with its settings.
        module: The module to train. With it and data, strategy and recompute follow from the memory that the network
            takes; without them, it is assumed to fit on one device.
        data: The data module to train on.
        **kwargs: Other options of Trainer.

    Raises:
        ValueError: Neither max_steps nor max_epochs is given, an option has an unknown value, or mode is missing.
    """
    callbacks, plugins, devices = plain(callbacks), plain(plugins), plain(devices)
    kwargs = _with_short_names({name: plain(value) for name, value in kwargs.items()})
    chosen = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
    parts: list[Any] = list(plugins) if isinstance(plugins, (list, tuple)) else [] if plugins is None else [plugins]
    # The command line passes every option of Trainer, those not given as None or Trainer's own default.
    if max_steps < 1 and max_epochs is None and not kwargs.get("fast_dev_run") and not kwargs.get("max_time"):
        raise ValueError("how long to train? Give max_steps (pretraining) or max_epochs (probing, fine-tuning)")
    steps = max_steps if max_steps > 0 and max_epochs is None else None  # of a run counted in steps
    val_check_interval = _interval(val_check_interval, checkpoint_every, steps, chosen, kwargs)
    config, network = getattr(module, "config", None), getattr(module, "network", torch.nn.Identity())
    given = bool(precision) or _has_precision([*parts, getattr(strategy, "precision_plugin", None)])
    precision = precision if given else best_precision(accelerator, config)[0]
    parallel = choose_strategy(
        strategy or "auto",
        accelerator=accelerator,
        devices=devices,
        num_nodes=int(kwargs.get("num_nodes") or 1),
        precision=str(precision),
        config=config if isinstance(config, ImageGPTConfig) and not is_frozen(network) else None,
        batch_size=getattr(data, "batch_size", None),
        accumulate=kwargs.get("accumulate_grad_batches", 1),
    )
    savers = [] if monitor is None and mode is None else [ModelCheckpoint(monitor=monitor, mode=_mode(monitor, mode))]
    _fill(chosen, [*savers, *_checkpoints(steps, checkpoint_every)], kwargs)
    _add(chosen, ours.CompileBlocks(compile), ours.Recompute(recompute))  # in this order: compiled, blocks keep less
    trainer = Trainer(
        max_steps=max_steps,
        max_epochs=-1 if steps else max_epochs,
        precision=precision,  # type: ignore[arg-type]
        accelerator=accelerator,
        devices=devices,
        strategy=parallel.strategy,
        val_check_interval=val_check_interval,
        callbacks=[*chosen, _LastValidation(), _Speed(parallel, None if given else accelerator, matmul_precision)],
        plugins=parts if any(hasattr(one, "save_checkpoint") for one in parts) else [*parts, AtomicCheckpointIO()],
        **kwargs,
    )
    _make_steady(trainer.loggers)
    return trainer


def _with_short_names(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Lightning's default logger without its folder "lightning_logs": TensorBoard's names of runs are short."""
    root, given = kwargs.get("default_root_dir"), kwargs.get("logger")
    if root and given in (None, True) and not kwargs.get("barebones"):
        kwargs["logger"] = TensorBoardLogger(root, name="", version=SLURMEnvironment.job_id())
    return kwargs


def _has_precision(plugins: list[Any]) -> bool:
    return any(isinstance(plugin, Precision) and type(plugin) is not Precision for plugin in plugins)


def _make_steady(loggers: list[Any]) -> None:
    for logger in loggers:
        logger.__class__ = STEADY.get(type(logger), type(logger))


def _interval(
    given: float | None, every: int | None, steps: int | None, chosen: list[Callback], kwargs: dict[str, Any]
) -> Any:
    """Batches or fraction of an epoch between validations."""
    accumulate = kwargs.get("accumulate_grad_batches", 1)
    numbers = {"val_check_interval": given, "check_val_every_n_epoch": kwargs.get("check_val_every_n_epoch")}
    for name, number in {"accumulate_grad_batches": accumulate, "checkpoint_every": every, **numbers}.items():
        if (isinstance(number, int) and number < 1) or (number is accumulate and not isinstance(number, int)):
            raise ValueError(f"{name} is {number!r}; it must be a whole number from 1 on")
    if steps is None or kwargs.get("check_val_every_n_epoch", 1) not in (None, 1) or isinstance(given, float):
        return given
    kwargs["check_val_every_n_epoch"] = None  # steps, not passes over the data, are the clock
    schedules = [one.scheduling for one in chosen if isinstance(one, theirs.GradientAccumulationScheduler)]
    most = max([accumulate, *chain.from_iterable(schedule.values() for schedule in schedules)])
    return given or -(-steps * most // 10)


def _mode(monitor: str | None, mode: str | None) -> Any:
    """Whether the least or the largest value of a metric is best."""
    name = re.sub(r"/dataloader_idx_\d+$", "", monitor or "neg")
    if mode is None and "neg" not in name:
        mode = next((word for word, ends in ENDS.items() if re.search(rf"(?<![a-z]){ends}$", name)), None)
    if monitor is None or mode not in ("min", "max"):
        raise ValueError(f"monitor is {monitor!r} and mode {mode!r}; monitor a metric, and set mode to min or max")
    return mode


def best_precision(accelerator: str = "auto", config: Any = None) -> tuple[str, str]:
    """bf16-mixed where the device trains a network of ``config`` faster in it, else 32-true; and why.

    A CPU needs AMX or AVX512-BF16, and products that outweigh the casts, of width 128 or 1,024 tokens. CPU time of a
    step in float32 relative to bf16-mixed, of 6 layers of these widths, on one thread with AVX512-BF16 (Zen 4)::

        tokens   64     96     128    192    256
            64   0.65   0.81   1.04   1.29   1.51
           256   0.99   1.10   1.26   1.47   1.62
         1,024   1.21   1.20   1.37   1.36   1.52

    With two threads it is 0.90 at 256 tokens x width 96, there and with AMX, where it is 1.23 at width 256.
    """
    kind = kind_of_device(accelerator)
    if kind == "unknown":
        return "32-true", "on this device nothing faster was tested"
    name, wanted = {"cuda": ("GPU", "bfloat16"), "cpu": ("CPU", "AMX or AVX512-BF16")}[kind]
    fast = multiplies_bfloat16(kind)
    small = isinstance(config, ImageGPTConfig) and config.n_embd < 128 and config.n_positions < 1024
    if fast and kind == "cpu" and small:
        return "32-true", f"faster on a CPU at width {config.n_embd} with {config.n_positions} tokens"
    return "bf16-mixed" if fast else "32-true", f"this {name} has {'' if fast else 'no '}{wanted}"


class _LastValidation(Callback):
    """Validates after the last step of a run that has not validated before."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated, self._interval = False, trainer.check_val_every_n_epoch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not self._validated and ends_here(trainer):
            trainer.check_val_every_n_epoch, trainer.val_check_batch = None, 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.check_val_every_n_epoch = self._interval


class _Speed(Callback):
    """Sets precision, if none was given, and how float32 matrices are multiplied; logs what was chosen for speed."""

    def __init__(self, parallel: Chosen, accelerator: str | None, matmul: str | None) -> None:
        if matmul not in (None, *PRODUCTS):
            raise ValueError(f"matmul_precision is {matmul!r}; it must be one of {', '.join(PRODUCTS)}")
        self.parallel, self.matmul = parallel.reason, matmul
        self.accelerator = accelerator  # None where a precision was given
        self._earlier: str | None = None

    def set_precision(self, trainer: Trainer, module: Any) -> str:
        """Let the trainer compute in the precision that suits the module's network; return which it is, and why."""
        why = "as given"
        if self.accelerator is not None:
            name, why = best_precision(self.accelerator, getattr(module, "config", None))
            if name != trainer.precision:  # the trainer was made without this module, for a CPU
                plugin = MixedPrecision("bf16-mixed", "cpu") if name == "bf16-mixed" else Precision()
                trainer.strategy.precision_plugin = plugin
        return f"precision {trainer.precision} ({why})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.set_precision(trainer, pl_module)
        self._earlier, wanted = torch.get_float32_matmul_precision(), self.matmul
        in_float32 = stage == "fit" and str(trainer.precision).startswith("32")
        if wanted is None and in_float32 and not is_frozen(getattr(pl_module, "network", pl_module)):
            # Not for probes, which fit to a tolerance below its rounding, nor where torch was set otherwise.
            wanted = "high" if self._earlier == "highest" and _has_tf32(trainer.strategy.root_device) else None
        torch.set_float32_matmul_precision(wanted or self._earlier)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (strategy, precision), kinds = choices(trainer, pl_module), (ours.Recompute, ours.CompileBlocks)
        again, compiles = ([str(one.decision) for one in _of(kind, trainer)] for kind in kinds)
        products = PRODUCTS[torch.get_float32_matmul_precision()]
        for parts in ([strategy, *again], [precision], [*compiles, *filter(None, [products])]):
            rank_zero_info(", ".join(parts))

    def teardown(self, *_: Any, **__: Any) -> None:
        if self._earlier is not None:
            torch.set_float32_matmul_precision(self._earlier)
            self._earlier = None

    on_exception = teardown


def choices(trainer: Trainer, module: Any) -> list[str]:
    """Strategy and precision in which a trainer that ``make_trainer`` made runs a module, and why."""
    name = f"strategy {type(trainer.strategy).__name__}"
    return [s for one in _of(_Speed, trainer) for s in (f"{name} ({one.parallel})", one.set_precision(trainer, module))]


def _of(kind: type[Callback], trainer: Trainer) -> list[Any]:
    return [one for one in trainer.callbacks if isinstance(one, kind)]  # type: ignore[attr-defined]


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _fill(chosen: list[Callback], savers: list[ModelCheckpoint], kwargs: dict[str, Any]) -> None:
    """Append the default callbacks; of savers those of a metric alone where the user brings one."""
    barebones = kwargs.get("barebones", False)  # which allows neither checkpoints nor logs
    if kwargs.get("enable_progress_bar", not barebones) is not False:
        _add(chosen, ours.Progress(), of=theirs.ProgressBar)
    if barebones:
        return
    if kwargs.get("enable_checkpointing") is not False:
        has_own = any(isinstance(one, ModelCheckpoint) for one in chosen)
        chosen += [one for one in savers if one.monitor or not has_own]
    if kwargs.get("logger") is not False:
        _add(chosen, ours.LearningRate(), of=(ours.LearningRate, theirs.LearningRateMonitor))
    _add(chosen, *(getattr(ours, name)() for name in ALWAYS))


def _add(chosen: list[Callback], *defaults: Callback, of: Any = None) -> None:
    """Append callbacks of whose class, or of classes ``of``, there is none."""
    chosen += [new for new in defaults if not any(isinstance(old, of or type(new)) for old in chosen)]


def _checkpoints(max_steps: int | None, every: int | None) -> list[ModelCheckpoint]:
    # The best may be long ago, and saving by steps alone would lose what comes after the last multiple.
    final = ModelCheckpoint(filename="final", save_on_train_epoch_end=True)  # final-v1 after another run's
    if max_steps is None and every is None:
        return [final]
    every = every or min(1000, max(1, (max_steps or 10_000) // 10))
    return [final, SteadyCheckpoint(filename="{step}", every_n_train_steps=every)]
