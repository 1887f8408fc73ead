"""Logistic regression on the features of ``ImageGPT.features``: the paper's linear probe (sections 2.4 and 3.4)."""

import logging
import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

HISTORY = 10  # pairs that L-BFGS keeps, as in scikit-learn
TRIES = 20  # lengths of one step
FAR = 10  # times the tolerance; a gradient above that is worth a warning
ROUNDING = 1e-6  # of the loss
CACHED = 2**18  # numbers per core that fit in its cache, 1 MiB
WIDEST = 4096  # features; with more, an estimate of the curvature would cost more than it saves
SAMPLE = 8  # rows per feature from which the curvature is estimated
RIDGE = 1e-4  # of each feature's own curvature; far above the rounding of a sum of products in float32
C_GRID = (0.001, 0.01, 0.1, 1.0, 10.0)  # this project's; the paper states no strength
SELECT_PART = 10  # one row in ten is held out to choose c
SELECT_LEAST = 20  # rows; with fewer, a single image would decide


@torch.no_grad()
def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    c: float = 1.0,
    standardize: bool = True,
    max_iter: int = 1000,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS: weight (C, D) and bias (C,) for raw ``features``, float (N, D).

    The objective is scikit-learn's: mean cross-entropy + |weight|^2 / (2 c N); the bias is not penalized. It stops
    when no entry of the gradient exceeds ``tolerance``. ``standardize`` scales each feature to mean 0 and variance 1
    first; weight and bias include the scaling. Labels are int64 (N,); ValueError where features are not finite.
    """
    features, mean, scale = _scaled(features, standardize)
    start = features.new_zeros(num_classes, features.shape[1] + 1)
    weight, bias = _parts(_minimize(features, labels, start, c=c, max_iter=max_iter, tolerance=tolerance))
    weight = weight / scale
    return weight, bias - (weight * mean).sum(1)  # not a matrix product, which autocast would round


@torch.no_grad()
def choose_c(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    grid: Sequence[float] = C_GRID,
    standardize: bool = True,
    max_iter: int = 1000,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> float:
    """The value of c that classifies a held-out tenth of the rows best; of equally good values the smallest.

    With too few rows ``usable_grid`` leaves one value. The other arguments and errors are those of fit_logistic.
    """
    grid = usable_grid(grid, len(features))
    if len(grid) == 1:
        return grid[0]
    kept, held = split_rows(len(features), seed)
    x, mean, scale = _scaled(features[kept.to(features.device)], standardize)
    x_held = (features[held.to(features.device)].float() - mean) / scale
    y, y_held = labels[kept.to(labels.device)], labels[held.to(labels.device)]
    best, most_correct, point = 0.0, -1, x.new_zeros(num_classes, x.shape[1] + 1)
    for c in sorted(grid):  # from strong to weak penalty; each fit starts from the previous solution
        point = _minimize(x, y, point, c=c, max_iter=max_iter, tolerance=tolerance)
        weight, bias = _parts(point)
        correct = int(((x_held @ weight.T + bias).argmax(1) == y_held).sum())
        log.debug("c=%g: %d of %d held-out images correct", c, correct, len(held))
        if correct > most_correct:
            best, most_correct = c, correct
    return best


def usable_grid(grid: Sequence[float], n_rows: int) -> Sequence[float]:
    """The grid; with a warning only its value nearest to 1, where fewer than SELECT_LEAST rows would be held out."""
    n_held = n_rows // SELECT_PART
    if len(grid) == 1 or n_held >= SELECT_LEAST:
        return grid
    nearest = min(grid, key=lambda c: abs(math.log(c)))
    text = f"{n_rows} training images leave {n_held} to choose c on, fewer than {SELECT_LEAST}: c is {nearest:g}"
    log.warning("%s, the value of the grid nearest to 1; set c= to use another", text)
    return (nearest,)


def split_rows(n_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the rows to fit and of the tenth (rounded down) held out; int64 on the CPU, ascending."""
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
    n_held = n_rows // SELECT_PART
    return order[n_held:].sort().values, order[:n_held].sort().values


def _scaled(features: Tensor, standardize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(features (N, D), mean (D,), scale (D,)), all float32; mean 0 and scale 1 without ``standardize``."""
    features = features.float()
    if not standardize:
        return features, features.new_zeros(features.shape[1]), features.new_ones(features.shape[1])
    mean, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where(scale > 1e-7, scale, 1)  # a constant feature stays zero instead of becoming noise
    return (features - mean).div_(scale), mean, scale


def _minimize(features: Tensor, labels: Tensor, start: Tensor, *, c: float, max_iter: int, tolerance: float) -> Tensor:
    """The minimum (C, D + 1), its last column the bias, by L-BFGS from a starting point of that shape."""
    with torch.autocast(features.device.type, enabled=False):
        objective, point = LogisticLoss(features, labels, c=c), start
        loss, gradient = objective(point)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} before the first step; features must be finite numbers")
        memory = _Memory(_inverse_hessian(features, len(point), penalty=objective.penalty), gradient)
        for _ in range(max_iter):
            left = float(gradient.abs().max())
            if left <= tolerance:
                break
            step = _search(objective, point, loss, gradient, memory.direction(gradient))
            if step is None:  # only rounding is left
                if left > FAR * tolerance:
                    text = "the fit ends at a gradient of %.1e, not %.1e: no step lowers the loss"
                    log.warning(text, left, tolerance)
                break
            memory.add(step[0] - point, step[2] - gradient)
            point, loss, gradient = step
        return point


def _parts(point: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) of a point (C, D + 1)."""
    return point[:, :-1].contiguous(), point[:, -1].contiguous()


class LogisticLoss:
    """The objective of ``fit_logistic`` and its gradient in one pass over float32 features (N, D)."""

    def __init__(self, features: Tensor, labels: Tensor, *, c: float) -> None:
        self.features, self.penalty = features, 1 / (c * len(features))
        labels = labels.to(features.device)
        # On a CPU, as many rows at a time as stay in the cores' caches from the first product to the second.
        cached = CACHED * torch.get_num_threads() // features.shape[1]
        rows = max(cached, 1) if features.device.type == "cpu" else len(features)
        self._parts = list(zip(torch.split(features, rows), torch.split(labels[None], rows, 1), strict=True))
        self._minus = features.new_full((1, rows), -1.0)

    def __call__(self, point: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient (C, D + 1) at a point (C, D + 1), whose last column is the bias."""
        weight, bias = _parts(point)
        by_weight, by_bias, chosen = torch.zeros_like(weight), torch.zeros_like(bias), []
        for x, y in self._parts:
            # Classes first: a softmax over rows of so few values would take longer than the products.
            log_p = torch.addmm(bias, x, weight.T).T.contiguous().log_softmax(0)  # (C, n)
            chosen.append(log_p.gather(0, y))
            error = log_p.exp_().scatter_add_(0, y, self._minus[:, : len(x)])
            by_weight.addmm_(error, x)
            by_bias += error.sum(1)
        likelihoods = torch.cat(chosen, 1)  # (1, N)
        n = likelihoods.numel()
        wide = torch.float32 if point.device.type == "mps" else torch.float64
        loss = -likelihoods.sum(dtype=wide) / n + 0.5 * self.penalty * weight.square().sum()
        gradient = torch.cat([by_weight.div_(n).add_(weight, alpha=self.penalty), by_bias[:, None].div_(n)], 1)
        return float(loss), gradient


class _Memory:
    """L-BFGS's knowledge of the curvature: a first estimate and the last HISTORY steps."""

    def __init__(self, factor: Tensor | None, gradient: Tensor) -> None:
        # Without an estimate the first step has length 1 at most: the gradient's own length has another unit.
        length = float(gradient.norm()) if factor is None else 1.0
        self._factor, self._scale = factor, 1 / max(length, 1.0)
        self._pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=HISTORY)

    def add(self, step: Tensor, change: Tensor) -> None:
        """Record the change of the gradient along a step."""
        product = _dot(step, change)
        if product > 0:
            self._pairs.append((step, change, product))
            self._scale = product / _dot(change, self._estimate(change))

    def direction(self, gradient: Tensor) -> Tensor:
        """The step to try (Nocedal's two loops)."""
        direction, shares = -gradient, []
        for step, change, product in reversed(self._pairs):
            shares.append(_dot(step, direction) / product)
            direction = direction - shares[-1] * change
        direction = self._scale * self._estimate(direction)
        for (step, change, product), share in zip(self._pairs, reversed(shares), strict=True):
            direction = direction + (share - _dot(change, direction) / product) * step
        return direction

    def _estimate(self, vector: Tensor) -> Tensor:
        return vector if self._factor is None else vector @ self._factor.T @ self._factor


def _search(
    objective: LogisticLoss, point: Tensor, loss: float, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, float, Tensor] | None:
    """(point, loss, gradient) after a step that lowers the loss enough, or None if no step length does."""
    slope, length = _dot(gradient, direction), 1.0
    if not slope < 0:
        return None
    for _ in range(TRIES):
        new = point + length * direction
        new_loss, new_gradient = objective(new)
        gain = new_loss - loss
        if gain <= 1e-4 * length * slope:
            return new, new_loss, new_gradient
        if gain <= ROUNDING * loss and abs(_dot(new_gradient, direction)) <= 0.9 * -slope:
            return new, new_loss, new_gradient  # too small a change for the loss, but not for the gradient
        least = -slope * length**2 / (2 * (gain - slope * length))  # minimum of the parabola through the known values
        length = min(max(least, 0.1 * length), 0.5 * length) if math.isfinite(least) else 0.1 * length
    return None


def _inverse_hessian(features: Tensor, num_classes: int, *, penalty: float) -> Tensor | None:
    """F (D + 1, D + 1) such that F.T @ F approximates the inverse Hessian of each class at zero weights.

    There the Hessian is the covariance of the features over C, plus the penalty. Features of a network are so
    correlated that L-BFGS alone needs hundreds of steps to learn it. A sample of the rows suffices; None where
    there are too many features or too few rows for the estimate to save time.
    """
    width = features.shape[1]
    if width > WIDEST or len(features) < width:
        return None
    x = features[:: max(len(features) // (SAMPLE * width), 1)]
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)  # the bias
    hessian = (x.T @ x).div_(num_classes * len(x))
    hessian = hessian.to("cpu" if x.device.type == "mps" else x.device).double()
    diagonal = hessian.diagonal()
    diagonal *= 1 + RIDGE
    diagonal[:-1] += penalty
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return None
    unit = torch.eye(width + 1, dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, unit, upper=False)
    return inverse.to(features)


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
