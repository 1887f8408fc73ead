"""How fast training goes: images and tokens per second, and the share of the device's peak that the network uses.

The clock is read when Lightning logs, and the device is never waited for: it may lag a step behind the host, at the end
of a window of many steps as at its start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.planning import device_called, forward_flops_per_token


class Throughput(Callback):
    """Log how fast training goes.

    Logs ``throughput/images_per_second`` and ``throughput/tokens_per_second`` of all processes together, and
    ``throughput/mfu``, model FLOPs utilisation: the operations that the network's mathematics takes, as a share of what
    the device could do at its peak. They are counted as in ``lightning_igpt.planning``: forward and backward pass, of
    attention the causal half; for a frozen network under a probe, the forward pass up to the deepest layer probed. What
    other callbacks compute beside it takes time and counts for nothing.

    Each is the mean since the last time Lightning logged (``log_every_n_steps``). Waiting for images counts;
    validation, saving checkpoints, and the first batch, which compiles and warms up, do not. Idle beside modules
    without an ImageGPT.

    Args:
        peak_tflops: Peak of one device in 10^12 operations per second, at the precision of the run and for dense
            matrices. Default: known at 16 and 32 bits for the devices of ``lightning-igpt plan``; where it is
            not known, ``throughput/mfu`` is left out.

    Raises:
        ValueError: ``peak_tflops`` is not above 0.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"peak_tflops is {peak_tflops}; it must be above 0")
        self.peak_tflops = peak_tflops
        self._watch = Stopwatch()
        self._flops: int | None = None  # per image; None beside a module that is not for this callback

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch, self._images, self._warm = Stopwatch(), 0, False
        self._flops = flops_per_image(pl_module)
        device = trainer.strategy.root_device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_tflops(name, str(trainer.precision)) if self.peak_tflops is None else self.peak_tflops
        self._peak = None if peak is None else peak * 1e12

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock again where validation or a checkpoint has stopped it."""
        if self._flops is not None and self._warm:
            self._watch.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; log if it is time."""
        if self._flops is None:
            return
        if self._warm:
            self._images += batch_size_of(batch)
            if _is_logged(trainer):
                self._log(trainer, pl_module)
        else:
            self._warm = True
            self._watch.start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch.stop()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the clock; there is nothing to save."""
        self._watch.stop()

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._flops is not None
        seconds, images = self._watch.lap(), self._images
        self._images = 0
        if not (seconds > 0 and images):
            return
        rate = images / seconds  # of this process
        rates = {"images_per_second": rate * trainer.world_size}
        if self._peak is not None:
            rates["mfu"] = rate * self._flops / self._peak
        # Tensors on the host: numbers would be sent to the device, and the progress bar would wait for them there.
        for name, value in rates.items():
            pl_module.log(f"throughput/{name}", torch.tensor(value), prog_bar=True, on_step=True, on_epoch=False)
        config: Any = pl_module.config
        tokens = torch.tensor(rates["images_per_second"] * config.n_positions)
        pl_module.log("throughput/tokens_per_second", tokens, on_step=True, on_epoch=False)


class Stopwatch:
    """Seconds between starts and stops; starting or stopping twice changes nothing."""

    def __init__(self) -> None:
        self._before = 0.0  # seconds up to the last stop
        self._since: float | None = None  # the last start; None while it rests

    def start(self) -> None:
        """Run."""
        if self._since is None:
            self._since = perf_counter()

    def stop(self) -> None:
        """Rest."""
        if self._since is not None:
            self._before += perf_counter() - self._since
            self._since = None

    def lap(self) -> float:
        """The seconds so far; they count from zero again, running or at rest as before."""
        seconds, self._before = self._before, 0.0
        if self._since is not None:
            now = perf_counter()
            seconds += now - self._since
            self._since = now
        return seconds


def batch_size_of(batch: Any) -> int:
    """Number of images in a batch: the length of its first tensor, in any form that the modules accept; else 0."""
    parts = [batch]
    if isinstance(batch, Mapping):
        parts = [batch[key] for key in ("tokens", "image") if key in batch]
    elif isinstance(batch, Sequence):
        parts = list(batch[:1])
    return next((len(part) for part in parts if isinstance(part, Tensor) and part.ndim), 0)


def flops_per_image(module: Any) -> int | None:
    """Operations of training per image on one of this package's modules, as it would be trained now; else None.

    Args:
        module: Has ``config`` and ``network``, and ``layers`` where its network is frozen and probed.
    """
    config: Any = getattr(module, "config", None)
    network: Any = getattr(module, "network", None)
    if not (isinstance(config, ImageGPTConfig) and hasattr(network, "lm_head")):
        return None
    head = 2 * config.vocab_size * config.n_embd
    blocks = forward_flops_per_token(config) - head
    if is_frozen(network):
        deepest = int(max(getattr(module, "layers", [config.n_layer])))
        return config.n_positions * blocks * deepest // config.n_layer
    return 3 * config.n_positions * (blocks + (0 if is_frozen(network.lm_head) else head))


def is_frozen(part: nn.Module) -> bool:
    """Whether no parameter of it is trained."""
    return not any(parameter.requires_grad for parameter in part.parameters())


def peak_tflops(name: str, precision: str) -> float | None:
    """Peak of a device in TFLOP/s for dense matrices.

    Args:
        name: What torch calls the device, such as "NVIDIA H100 80GB HBM3".
        precision: Lightning's name of a precision. Products of 32 bits are TF32 where torch is allowed to use it.

    Returns:
        None where it is not known, as for a part of a device (MIG).
    """
    device = device_called(name)
    if device is None:
        return None
    if "16" in precision:
        return device.tflops_16
    if not precision.startswith("32"):
        return None
    allowed = torch.get_float32_matmul_precision() != "highest"
    return (device.tflops_tf32 if allowed else None) or device.tflops_32


def _is_logged(trainer: Trainer) -> bool:
    """Whether the loggers hear of this batch; not where it stops the run, as it may then hold a probe's whole fit."""
    if trainer.should_stop or trainer.fit_loop._should_accumulate():
        return False
    return bool(trainer._logger_connector.should_update_logs)
