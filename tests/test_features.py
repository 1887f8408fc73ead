import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lightning_igpt.features import choose_c, fit_logistic, split_rows, usable_grid


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


def test_a_constant_feature_does_no_harm(digits):
    x, y, *_ = digits
    assert (x[:, 0] == 0).all()
    weight, bias = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), 10)
    assert weight.isfinite().all() and bias.isfinite().all()
    assert weight[:, 0].abs().max() == 0


def test_a_class_without_examples_is_never_predicted():
    x = torch.tensor([[0.0], [1.0], [0.1], [0.9]])
    weight, bias = fit_logistic(x, torch.tensor([0, 2, 0, 2]), 3, c=100.0)
    assert (x @ weight.T + bias).argmax(1).tolist() == [0, 2, 0, 2]


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


def test_a_tenth_of_the_rows_is_held_out():
    kept, held = split_rows(205, 3)
    assert len(held) == 20 and sorted(torch.cat([kept, held]).tolist()) == list(range(205))
    assert held.tolist() == split_rows(205, 3)[1].tolist() != split_rows(205, 4)[1].tolist()


def test_too_few_rows_leave_no_choice(caplog):
    assert usable_grid([0.1, 10.0], 200) == [0.1, 10.0] and not caplog.messages
    x, y = torch.randn(199, 2), torch.arange(199) % 2
    assert choose_c(x, y, 2, grid=[0.001, 0.3, 10.0]) == 0.3
    assert "199 training images leave 19 to choose c on, fewer than 20: c is 0.3" in caplog.text
