import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lightning_igpt.features import fit_logistic


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
