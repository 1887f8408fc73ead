"""Adam, warm-up and cosine as in the paper (sections 3.4 and A.1), and methods that are not in it."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_igpt.private import multiplies_bfloat16


def make_adam(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    below: Sequence[Iterable[nn.Parameter]] = (),
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """Adam with decoupled weight decay on matrices only; gains, biases and the start vector are never decayed.

    The paper has betas 0.9 and 0.95, since 0.999 gave loss spikes, and no decay. The k-th layer of ``below``, counted
    from 1 and down to the input, trains at ``lr * layer_decay**k`` (ELECTRA, Clark et al., 2020; exponents as in BEiT,
    Bao et al., 2022). Every group stores what a resumed run needs: ``lr_scale``, its rate divided by ``lr``, and
    ``decayed``, whether weight decay applies to it.
    """
    groups: list[dict[str, Any]] = []
    for depth, layer in enumerate([parameters, *below]):
        trained = [parameter for parameter in layer if parameter.requires_grad]
        scale = layer_decay**depth
        for decayed in (True, False):
            chosen = [parameter for parameter in trained if (parameter.ndim >= 2) == decayed]
            marks = {"weight_decay": weight_decay * decayed, "lr_scale": scale, "decayed": decayed}
            groups += [{"params": chosen, "lr": lr * scale} | marks] if chosen else []
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


class _NoBfloat16(TorchFunctionMode):  # Muon's products in bfloat16 take up to 90 % of a step on a CPU that emulates it
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].float() if func is Tensor.bfloat16 else func(*args, **(kwargs or {}))


class MuonAdam(torch.optim.Optimizer):
    """torch's Muon for some matrices and the Adam of :func:`make_adam` for the other parameters, in one optimizer.

    Lightning's automatic optimization supports a single optimizer. Muon (Jordan et al., 2024) steps along the
    orthogonalized momentum of a matrix. The step is scaled to Adam's usual size, a root mean square of 0.2 of the
    learning rate per entry (Liu et al., 2025), so that both share one rate. Betas are Adam's; Muon's momentum is 0.95.

    The ``packed`` parts of a matrix, such as the 3 of queries, keys and values, are orthogonalized separately:
    together, the part with the largest gradients would leave little of the step to the others. ValueError where no
    matrix is to be trained, one is sharded, or its rows cannot be divided among its parts.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        packed: Mapping[nn.Parameter, int] | None = None,
    ) -> None:
        by_parts: dict[int, list[nn.Parameter]] = {}
        for matrix in matrices:
            parts = (packed or {}).get(matrix, 1)
            _check_matrix(matrix, parts)
            if matrix.requires_grad:
                by_parts.setdefault(parts, []).append(matrix)
        if not by_parts:
            raise ValueError("there is no matrix for Muon: all are frozen or wrapped by a strategy; use adam")
        marks = {"lr_scale": 1.0, "decayed": True}
        groups = [{"params": chosen, "parts": parts} | marks for parts, chosen in sorted(by_parts.items())]
        # This optimizer shares the groups of these two, which fill in their defaults.
        self._muon = torch.optim.Muon(groups, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adam = make_adam(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
        super().__init__([*self._muon.param_groups, *self._adam.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both; returns the loss of ``closure``, if given."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        # load_state_dict replaces groups and state.
        self._adam.param_groups = [group for group in self.param_groups if "parts" not in group]
        self._adam.state = self.state
        self._adam.step()
        self._muon.param_groups = [self._unpacked(group) for group in self.param_groups if "parts" in group]
        native = multiplies_bfloat16(self.param_groups[0]["params"][0].device)
        with contextlib.nullcontext() if native else _NoBfloat16():
            self._muon.step()  # type: ignore[no-untyped-call]
        self._muon.param_groups.clear()  # groups and state would keep the gradients alive
        self._muon.state.clear()
        return loss

    def _unpacked(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group for Muon in which every part is a matrix of its own, as a view."""
        pieces: list[Tensor] = []
        for matrix in group["params"]:
            if matrix.grad is None:
                continue
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix.grad)
            views = (whole.chunk(group["parts"]) for whole in (matrix.detach(), matrix.grad, state["momentum_buffer"]))
            for piece, gradient, momentum in zip(*views, strict=True):
                piece.grad = gradient
                self._muon.state[piece] = {"momentum_buffer": momentum}
                pieces.append(piece)
        return self._muon.defaults | group | {"params": pieces}  # a state saved by another torch may lack settings


def _check_matrix(matrix: nn.Parameter, parts: int) -> None:
    if matrix.ndim != 2 or not isinstance(matrix, nn.Parameter) or hasattr(matrix, "full_tensor"):  # a DTensor
        text = f"Muon needs whole matrices, not a {type(matrix).__name__} of shape {tuple(matrix.shape)}"
        raise ValueError(f"{text}; use adam, or a strategy that does not shard the weights, such as ddp")
    if len(matrix) % parts:
        raise ValueError(f"a matrix of {len(matrix)} rows cannot be split into {parts} matrices of equal height")


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    """torch's LambdaLR for the groups of its start; groups added later, as by BackboneFinetuning, keep their rates.

    With ``warmup_steps``, ``factor`` is what follows a linear warm-up. A checkpoint keeps their number, so that a run
    that continues for longer warms up as it began, though the default depends on the run's length.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float], *, warmup_steps: int | None = None
    ) -> None:
        def warmed(step: int) -> float:
            return min(factor(step), (step + 1) / max(1, self.warmup_steps))

        if warmup_steps is not None:
            self.warmup_steps = warmup_steps
        super().__init__(optimizer, factor if warmup_steps is None else warmed)

    def get_lr(self) -> list[float | Tensor]:  # noqa: D102 - torch's
        return [*super().get_lr(), *(group["lr"] for group in self.optimizer.param_groups[len(self.base_lrs) :])]


def warmup_cosine(optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int) -> Schedule:
    """Rise linearly over ``warmup_steps``, at most all, then fall along a cosine to zero at ``total_steps``."""
    if warmup_steps > total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}, more than the run's {total_steps}; lower it or train longer")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return Schedule(optimizer, factor)


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, decay_fraction: float = 0.0
) -> Schedule:
    """``cosine``, ``constant``, or ``wsd``: warm-up, constant, and to zero in the last ``decay_fraction`` of the run.

    The rate of wsd falls as 1 - sqrt(x), where x is the share of the decay that is done. For language models, Hägele et
    al. (2024, arXiv 2405.18392) report that a constant rate with a decay at the end matches a cosine of the same
    length. ValueError where warm-up and decay are longer than the run.
    """
    if name == "cosine":
        return warmup_cosine(optimizer, warmup_steps=warmup_steps, total_steps=total_steps)
    if name == "constant":
        return Schedule(optimizer, lambda step: 1.0, warmup_steps=warmup_steps)
    decay = max(1, round(decay_fraction * total_steps))
    start = total_steps - decay
    if warmup_steps > start:
        what = f"warmup_steps is {warmup_steps} and the decay has {decay} steps, but the run only {total_steps}"
        raise ValueError(f"{what}; lower warmup_steps or decay_fraction, or train longer")
    return Schedule(optimizer, lambda n: 1 - min(1.0, max(0, n - start) / decay) ** 0.5, warmup_steps=warmup_steps)


def default_warmup(total_steps: int, steps_per_epoch: int | None) -> int:
    """Warm-up steps: one epoch as in the paper, at most a tenth of the run (the paper's runs last 100 epochs)."""
    return max(1, min(total_steps // 10, total_steps if steps_per_epoch is None else steps_per_epoch))
