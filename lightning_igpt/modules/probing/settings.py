"""What ``ProbeModule`` refuses: settings that contradict each other, and checkpoints of another probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_igpt.config import Objective
from lightning_igpt.modules.shared import check_settings


def choose_layers(layers: Any, n_layer: int) -> list[int]:
    """The layer numbers that ``layers`` stands for.

    Raises:
        ValueError: It is neither ``all`` nor a list of numbers from 0 to ``n_layer``.
    """
    if layers != "all" and not isinstance(layers, (list, tuple, range)):
        raise ValueError(f"layers is {layers!r}; it must be 'all' or a list of layer numbers")
    chosen = list(range(n_layer + 1)) if layers == "all" else list(layers)
    if not chosen or not all(0 <= layer <= n_layer for layer in chosen):
        raise ValueError(f"layers is {layers}; name one or more from 0 to {n_layer}, or 'all'")
    return chosen


def check_fit(
    solver: str, grid: Sequence[float], *, max_iter: float, lr: float, weight_decay: float, max_feature_bytes: float
) -> None:
    """Raise where a setting of a solver makes no sense."""
    if solver not in ("lbfgs", "sgd"):
        raise ValueError(f"solver is {solver!r}; it must be 'lbfgs' or 'sgd'")
    if not grid:
        raise ValueError("c is an empty list; give one value or several to choose from")
    for c in grid:
        check_settings(above_zero={"c": c}, not_below_zero={})
    rest = {"weight_decay": weight_decay, "max_feature_bytes": max_feature_bytes}
    check_settings(above_zero={"max_iter": max_iter, "lr": lr}, not_below_zero=rest)


def check_votes(objective: Objective, mask_inputs: bool, n_masks: int) -> None:
    """Raise where masks are to vote although there are none."""
    check_settings(above_zero={"n_masks": n_masks}, not_below_zero={})
    if objective == "bert" and not mask_inputs and n_masks > 1:
        raise ValueError(f"mask_inputs=False uses no mask, but n_masks is {n_masks}; set n_masks=1 or mask_inputs=True")


def check_concat(concat: int | None, n_layers: int, solver: str) -> None:
    """Raise where so many layers cannot be fitted together."""
    if concat is None:
        return
    if concat < 1 or concat % 2 == 0:
        raise ValueError(f"concat is {concat}; it must be an odd number, as the layers are centred on the best")
    if concat > n_layers:
        raise ValueError(
            f"concat is {concat}, but only {n_layers} layers are probed; lower it, or name more in layers="
        )
    if solver == "sgd":
        raise ValueError(f"concat={concat} needs the features that solver='sgd' does not keep; use solver='lbfgs'")


def check_same_probe(mine: Mapping[str, Any], saved: Mapping[str, Any], n_layer: int) -> None:
    """Raise where a checkpoint's hyperparameters tell of other classifiers than the module's."""
    for name, old in (("layers", "all"), ("solver", "lbfgs"), ("concat", None)):  # what was before there were others
        theirs, ours = saved.get(name, old), mine[name]
        if name == "layers":
            theirs, ours = choose_layers(theirs, n_layer), choose_layers(ours, n_layer)
        if theirs != ours:
            raise ValueError(f"the checkpoint's probe has {name}={theirs}, this one {name}={ours}; make them equal")
