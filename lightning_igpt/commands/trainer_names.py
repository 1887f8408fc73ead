"""Names of Lightning's that a run is given as text: accelerator, strategy and precision, and which of them is meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from lightning_igpt.spelling import there_is_no

PRECISIONS = (
    *("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"),
    *("transformer-engine", "transformer-engine-float16", "16", "32", "64", "bf16"),
)


def check_names(trainer: Mapping[str, Any]) -> None:
    """Insist that there are such an accelerator, strategy and precision.

    Those that somebody has registered with Lightning are known; what is no text, such as a class with its options, is
    left alone.

    Args:
        trainer: Its options, by name.

    Raises:
        ValueError: There is none of that name; the message tells the closest, and all.
    """
    known = {
        "accelerator": ["auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators())],
        "strategy": ["auto", "fsdp2", *StrategyRegistry.available_strategies()],
        "precision": PRECISIONS,
    }
    for name, names in known.items():
        given = trainer.get(name)
        plain = given.lower() if isinstance(given, str) and name == "strategy" else given  # as Lightning takes it
        if isinstance(given, str) and plain not in names:
            rest = f"It is one of {', '.join(names)}"
            raise ValueError(f"trainer.{name}: {there_is_no(name, given, names, rest)}")
