"""Lightning callbacks: pictures and probes during training, speed, memory, safety, records."""

from lightning_igpt.callbacks.classification import ClassificationReport
from lightning_igpt.callbacks.compile import CompileBlocks
from lightning_igpt.callbacks.completions import CompletionGrid, captions, completion_rows
from lightning_igpt.callbacks.finite_guard import DiskCheck, FiniteGuard
from lightning_igpt.callbacks.layer_curve import LayerCurve
from lightning_igpt.callbacks.online_probe import OnlineProbe
from lightning_igpt.callbacks.preempt import Preempt
from lightning_igpt.callbacks.recompute import Recompute
from lightning_igpt.callbacks.run_record import RunRecord
from lightning_igpt.callbacks.throughput import Throughput

__all__ = [
    "ClassificationReport",
    "CompileBlocks",
    "CompletionGrid",
    "DiskCheck",
    "FiniteGuard",
    "LayerCurve",
    "OnlineProbe",
    "Preempt",
    "Recompute",
    "RunRecord",
    "Throughput",
    "captions",
    "completion_rows",
]
