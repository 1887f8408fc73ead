import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lightning_igpt import features
from lightning_igpt.features import LogisticLoss, choose_c, fit_logistic, split_rows


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    x, y = data.data.astype(np.float32) / 16, data.target
    return x[:1200], y[:1200], x[1200:], y[1200:]


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_equals_scikit_learn(digits, standardize, c):
    x, y, x_test, y_test = digits
    weight, bias = fit_logistic(
        torch.from_numpy(x), torch.from_numpy(y), 10, c=c, standardize=standardize, tolerance=1e-6
    )
    logits = x_test @ weight.numpy().T + bias.numpy()
    scaler = StandardScaler(with_mean=standardize, with_std=standardize).fit(x)
    theirs = LogisticRegression(C=c, max_iter=5000, tol=1e-7).fit(scaler.transform(x), y)
    expected = theirs.predict_proba(scaler.transform(x_test))
    found = torch.from_numpy(logits).softmax(-1).numpy()
    assert np.abs(found - expected).max() < 0.01
    assert (found.argmax(1) == y_test).mean() == pytest.approx(
        theirs.score(scaler.transform(x_test), y_test), abs=0.002
    )


@pytest.mark.parametrize("standardize", [False, True])
def test_c_is_chosen_as_scikit_learn_would_on_the_same_rows(digits, standardize):
    x, y, *_ = digits
    x, y = x[:600, 16:36], y[:600]  # a part of each picture, so that strengths differ
    grid = [0.0001, 0.01, 1.0, 100.0]
    kept, held = (part.numpy() for part in split_rows(600, 1))
    scaler = StandardScaler(with_mean=standardize, with_std=standardize).fit(x[kept])
    scores = [
        LogisticRegression(C=c, max_iter=5000, tol=1e-7)
        .fit(scaler.transform(x[kept]), y[kept])
        .score(scaler.transform(x[held]), y[held])
        for c in grid
    ]
    assert len(set(scores)) > 2
    expected = grid[int(np.argmax(scores))]  # the first, which is the strongest penalty, among equals
    shuffled = [grid[i] for i in (2, 0, 3, 1)]
    options = {"grid": shuffled, "standardize": standardize, "seed": 1, "tolerance": 1e-5, "max_iter": 5000}
    assert choose_c(torch.from_numpy(x), torch.from_numpy(y), 10, **options) == expected


@pytest.mark.parametrize("rows", [1, 7, 30, 100])
def test_loss_and_gradient_are_those_of_autograd(monkeypatch, rows):
    monkeypatch.setattr(features, "CACHED", rows * 5)  # rows at a time
    generator = torch.Generator().manual_seed(0)
    x, point = torch.randn(30, 5, generator=generator), torch.randn(4, 6, generator=generator)
    y = torch.randint(4, (30,), generator=generator)
    loss, gradient = LogisticLoss(x, y, c=0.3)(point)
    weight, bias = (part.double().requires_grad_() for part in (point[:, :-1], point[:, -1]))
    expected = F.cross_entropy(x.double() @ weight.T + bias, y) + weight.square().sum() / (2 * 0.3 * 30)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), torch.cat([weight.grad, bias.grad[:, None]], 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("widest", [0, 4096])
def test_correlated_features_of_any_scale_reach_the_minimum(monkeypatch, widest):
    """With and without a first guess of the curvature; the gradient is that of float64."""
    monkeypatch.setattr(features, "WIDEST", widest)
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (400,), generator=generator)
    x = torch.randn(400, 30, generator=generator) @ torch.randn(30, 30, generator=generator)
    x[:, 0] += y
    x = (x - x.mean(0)) * torch.logspace(-0.5, 0.5, 30)
    weight, bias = fit_logistic(x, y, 3, standardize=False, tolerance=1e-4)
    weight, bias = weight.double().requires_grad_(), bias.double().requires_grad_()
    (F.cross_entropy(x.double() @ weight.T + bias, y) + weight.square().sum() / 800).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1.1e-4
