"""Lightning callbacks: pictures and probes during training, speed, memory, safety, records."""

from lightning_igpt.callbacks.classification import ClassificationReport as ClassificationReport
from lightning_igpt.callbacks.compile import CompileBlocks as CompileBlocks
from lightning_igpt.callbacks.completions import CompletionGrid as CompletionGrid
from lightning_igpt.callbacks.finite_guard import DiskCheck as DiskCheck
from lightning_igpt.callbacks.finite_guard import FiniteGuard as FiniteGuard
from lightning_igpt.callbacks.layer_curve import LayerCurve as LayerCurve
from lightning_igpt.callbacks.metrics_file import LearningRate as LearningRate
from lightning_igpt.callbacks.online_probe import OnlineProbe as OnlineProbe
from lightning_igpt.callbacks.preempt import Preempt as Preempt
from lightning_igpt.callbacks.progress import Progress as Progress
from lightning_igpt.callbacks.recompute import Recompute as Recompute
from lightning_igpt.callbacks.run_record import RunRecord as RunRecord
from lightning_igpt.callbacks.throughput import Throughput as Throughput
