"""How fast training runs: images and tokens per second, and the share of the device's peak that the network uses.

Nothing here waits for the device, as Lightning's ThroughputMonitor does in every step.
"""

import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.planning import ACTIVATION_BYTES, device_called, forward_flops_per_token


class Throughput(Callback):
    """Log ``throughput/images_per_second``, ``throughput/tokens_per_second`` and ``throughput/mfu``.

    The rates are those of all processes; mfu (model FLOPs utilization) is the network's operations as a share of the
    device's peak. Each is the mean since Lightning's last log, including the time spent waiting for images, without
    validation, checkpoints and the first batch, which compiles and warms up. Idle for modules without an ImageGPT.

    Args:
        peak_tflops: Peak of one device in 10^12 operations per second, for dense matrices at the run's precision.
            Default: that of the devices in ``planning``; where it is not known, ``throughput/mfu`` is left out.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"peak_tflops is {peak_tflops}; it must be above 0")
        self.peak_tflops = peak_tflops
        self._flops: int | None = None  # per image; None for other modules
        self._since: float | None = None  # when the clock was started; None while it is paused

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds, self._images, self._step = 0.0, 0, trainer.global_step
        self._since, self._is_warm = None, False
        self._flops, root, precision = flops_per_image(pl_module), trainer.strategy.root_device, str(trainer.precision)
        device = device_called(torch.cuda.get_device_name(root)) if root.type == "cuda" else None
        known = device.peak(precision) if device is not None and precision in ACTIVATION_BYTES else None
        self._peak = known if self.peak_tflops is None else self.peak_tflops * 1e12

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._is_warm and self._since is None:
            self._since = perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._flops is None:
            return
        done = trainer.global_step if pl_module.automatic_optimization else batch_idx + 1
        stepped, self._step = done != self._step, done
        if not self._is_warm:
            self._is_warm, self._since = True, perf_counter()
            return
        self._images += batch_size_of(batch)
        # A batch that ends the run may hold a probe's whole fit.
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not stepped or trainer.should_stop or not every or done % every:
            return
        self._pause()
        rate = self._images / max(self._seconds, 1e-9)  # of this process
        self._since, self._seconds, self._images = perf_counter(), 0.0, 0
        whole = rate * trainer.world_size
        rates = {"images_per_second": whole, "tokens_per_second": whole * pl_module.config.n_positions}
        if self._peak is not None:
            rates["mfu"] = rate * (self._flops or 0) / self._peak
        # Tensors on the host: numbers would be sent to the device, and the progress bar would wait for them there.
        for name, value in rates.items():
            on_bar = name != "tokens_per_second"
            pl_module.log(f"throughput/{name}", torch.tensor(value), prog_bar=on_bar, on_step=True, on_epoch=False)

    def _pause(self, *_: Any, **__: Any) -> None:
        if self._since is not None:
            self._seconds, self._since = self._seconds + perf_counter() - self._since, None

    on_validation_start = on_save_checkpoint = _pause


def batch_size_of(batch: Any) -> int:
    """Number of images in a batch, in any form that the modules accept: the length of its first tensor; else 0."""
    parts = [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, Mapping) else batch
    return next((len(part) for part in parts if isinstance(part, Tensor) and part.ndim), 0)


def flops_per_image(module: Any) -> int | None:
    """Operations of training per image on one of this package's modules; None for others.

    Forward and backward pass, of attention the causal half; of a frozen network the forward pass up to the deepest
    of the module's ``layers``.
    """
    config, network = getattr(module, "config", None), getattr(module, "network", None)
    if not (isinstance(config, ImageGPTConfig) and isinstance(network, ImageGPT)):
        return None
    head = 2 * config.vocab_size * config.n_embd
    blocks = forward_flops_per_token(config) - head
    if is_frozen(network):
        deepest = int(max(getattr(module, "layers", [config.n_layer])))
        return config.n_positions * blocks * deepest // config.n_layer
    return 3 * config.n_positions * (blocks + (0 if is_frozen(network.lm_head) else head))


def run_flops(trainer: Trainer, module: Any) -> float | None:
    """Operations of a whole run on one device, whatever part of it a resumed run does; None if the end is not known."""
    size, steps, flops = images_at_once(trainer), trainer.estimated_stepping_batches, flops_per_image(module)
    if size is None or flops is None or not 0 < steps < math.inf:
        return None
    return float(steps) * trainer.accumulate_grad_batches * size * flops


def images_at_once(trainer: Trainer) -> int | None:
    """Images that one device computes at once; None where neither loader nor data module says."""
    if isinstance(size := getattr(trainer.train_dataloader, "batch_size", None), int):
        return size
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)  # images per optimizer step
    return max(1, size // (trainer.world_size * trainer.accumulate_grad_batches)) if isinstance(size, int) else None


def is_frozen(part: nn.Module) -> bool:
    """Whether no parameter of it is trained."""
    return not any(parameter.requires_grad for parameter in part.parameters())
