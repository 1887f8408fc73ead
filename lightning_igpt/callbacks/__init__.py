"""Sideshows of training, as Lightning callbacks."""

from lightning_igpt.callbacks.classification import ClassificationReport
from lightning_igpt.callbacks.compile import CompileBlocks
from lightning_igpt.callbacks.completions import CompletionGrid, captions, completion_rows
from lightning_igpt.callbacks.disk_check import DiskCheck
from lightning_igpt.callbacks.finite_guard import FiniteGuard
from lightning_igpt.callbacks.layer_curve import LayerCurve
from lightning_igpt.callbacks.online_probe import OnlineProbe
from lightning_igpt.callbacks.preempt import Preempt
from lightning_igpt.callbacks.recompute import Recompute
from lightning_igpt.callbacks.run_record import RunRecord
from lightning_igpt.callbacks.same_checkpoint import SameCheckpoint
from lightning_igpt.callbacks.tensorboard_overview import TensorBoardOverview
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
    "SameCheckpoint",
    "TensorBoardOverview",
    "Throughput",
    "captions",
    "completion_rows",
]
