"""The time of the linear probe of all layers, compared with scikit-learn's ``LogisticRegression``.

Both minimize the same objective by L-BFGS from zero, to the same bound on the gradient, on the same standardized
float32 features; their accuracies on held-out rows must agree within 0.002.

The features are synthetic and slow to fit as real ones are: every layer has class-dependent means in a space whose
variances fall as 1 / rank, rotated at random (so that all features are correlated), with scales over some orders of
magnitude before they are standardized. Middle layers separate the classes best, as in Image GPT.

Layers are made one after the other; each side's time is that of all layers together. A third side is one evaluation of
loss and gradient. The limit is its: 4 N D C operations at the speed of a large matrix product or, if that takes longer,
one pass over the features at the speed of memory.
"""

import math
import statistics
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lightning_igpt.benchmarks import harness
from lightning_igpt.benchmarks.harness import Comparison, Turns
from lightning_igpt.features import LogisticLoss, fit_logistic

C, TOLERANCE, MAX_ITER = 1.0, 1e-4, 1000
OPTIONS: Any = {"c": C, "standardize": False, "tolerance": TOLERANCE, "max_iter": MAX_ITER}
HELD_OUT = 5  # rows to fit for each row held out
EQUAL = 0.002  # accuracy
EVALUATIONS = 3  # of loss and gradient, timed together
SIZES = {"rows": 50_000, "width": 512, "layers": 25, "classes": 10}
OURS, PEER, EVALUATION = "lightning_igpt", "scikit-learn", "one loss and gradient"


def make_layer(layer: int, options: Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardized features (N, D) and labels (N,) to fit, and to measure on."""
    generator = torch.Generator().manual_seed(layer)
    width, rows = options.width, options.rows + options.rows // HELD_OUT
    middle = math.sin(math.pi * layer / max(options.layers - 1, 1)) if options.layers > 1 else 0.5
    means = torch.randn(options.classes, width, generator=generator)
    means *= (1.9 + 0.6 * middle) / width**0.5
    labels = torch.randint(options.classes, (rows,), generator=generator)
    deviations = torch.arange(1, width + 1).rsqrt()
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    scales = torch.randn(width, generator=generator).mul_(1.5).exp_()
    x = torch.randn(rows, width, generator=generator).add_(means[labels]) @ (deviations[:, None] * turn * scales)
    x = (x - x[: options.rows].mean(0)) / x[: options.rows].std(0, correction=0)
    return x[: options.rows].clone(), labels[: options.rows], x[options.rows :].clone(), labels[options.rows :]


def fit_theirs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,)."""
    model = LogisticRegression(C=C, tol=TOLERANCE, max_iter=MAX_ITER).fit(x.numpy(), y.numpy())
    return torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()


def accuracy(classifier: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    """Share of rows that are classified correctly."""
    weight, bias = (part.cpu() for part in classifier)
    return float(((x @ weight.T + bias).argmax(1) == y).float().mean())


def measure_layer(layer: int, options: Namespace) -> tuple[dict[str, Turns], dict[str, float]]:
    """Turns of all sides on one layer, and the accuracies."""
    x, y, x_held, y_held = make_layer(layer, options)
    placed, labels = x.to(options.device), y.to(options.device)
    loss, point = LogisticLoss(placed, labels, c=C), placed.new_zeros(options.classes, x.shape[1] + 1)
    fits: dict[str, tuple[Tensor, Tensor]] = {}
    sides = {
        OURS: lambda: fits.update({OURS: fit_logistic(placed, labels, options.classes, **OPTIONS)}),
        PEER: lambda: fits.update({PEER: fit_theirs(x, y)}),
        EVALUATION: lambda: [loss(point) for _ in range(EVALUATIONS)],
    }
    turns = harness.in_turns(sides, options.repeats, options.device, warm_up=0)
    turns[EVALUATION] = turns[EVALUATION].times(1 / EVALUATIONS)
    reached = {name: accuracy(classifier, x_held, y_held) for name, classifier in fits.items()}
    words = f"layer {layer}: " + ", ".join(f"{name} {reached[name]:.4f} in {turns[name].median:.2f} s" for name in fits)
    print(words, flush=True)
    harness.require(abs(reached[OURS] - reached[PEER]) <= EQUAL, f"accuracy on held-out rows, {words}")
    return turns, reached


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, compare, print."""
    own = {name: (default, name) for name, default in SIZES.items()}
    options = harness.parse("probe", __doc__, words, repeats=(1, "repetitions of each side"), **own)
    if options.classes < 2 or options.rows < 10 * options.classes:
        sizes = f"--rows {options.rows} --classes {options.classes}"
        raise SystemExit(f"{sizes}: use 2 or more classes, 10 rows for each")
    layers, reached = zip(*(measure_layer(layer, options) for layer in range(options.layers)), strict=True)
    sums = {name: map(sum, zip(*(turns[name].seconds for turns in layers), strict=True)) for name in layers[0]}
    rows = {name: Turns(tuple(seconds)) for name, seconds in sums.items()}
    limits, numbers = harness.machine_limits(options.device), options.rows * options.width * options.layers
    least = max(4 * numbers * options.classes / limits.flops_per_second, 4 * numbers / limits.bytes_per_second)
    comparison = Comparison(rows, OURS, PEER, {EVALUATION: least}, options.rows * options.layers, "rows")
    comparison.print_table(f"{options.layers} x {options.rows:,} x {options.width}, {options.classes} classes")
    means = {name: statistics.mean(values[name] for values in reached) for name in (OURS, PEER)}
    comparison.print_result(options, sklearn, accuracy=means)


if __name__ == "__main__":
    main()
