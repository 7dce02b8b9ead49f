"""After any exception, Ctrl-C among them, and after a fit that ends well, the model is as it was."""

import copy

import pytest
import torch
from torch import nn

from estimators import FineTune, LastLayerLaplace, LinearizedLaplace, LinearResponse, NewtonRefit, RegVar


def mlp(outputs=3, *extra):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *extra, nn.Linear(5, outputs)).double().eval()


def rows(outputs=3, n=20):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, (torch.arange(n) % outputs)


def batches():
    x, y = rows()
    return list(zip(x.split(6), y.split(6), strict=True))


class Interrupting(list):
    """A loader that fails in its `n`-th pass, after `kept` batches."""

    def __init__(self, batches, n, error, *, kept=1):
        super().__init__(batches)
        self.left, self.error, self.kept = n, error, kept

    def __iter__(self):
        self.left -= 1
        for i, batch in enumerate(super().__iter__()):
            if self.left == 0 and i == self.kept:
                raise self.error
            yield batch


@pytest.mark.parametrize("estimator", [LinearizedLaplace, LastLayerLaplace, RegVar])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(("n", "kept"), [(1, 0), (2, 1)])
def test_a_loader_that_fails_in_any_pass_leaves_everything_as_it_was(n, kept, error, estimator, untouched):
    model = mlp(3, nn.BatchNorm1d(5))
    with untouched(model), pytest.raises(error):
        estimator(model, "classification").fit(Interrupting(batches(), n, error("stop"), kept=kept))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    "make",
    [
        LinearizedLaplace,
        lambda *a: LinearizedLaplace(*a, inverse="cholesky", curvature="hessian", prior_precision=90.0),
        lambda *a: LinearizedLaplace(*a, inverse="cg"),
        LastLayerLaplace,
        lambda *a: RegVar(*a, solver=FineTune()),
    ],
    ids=["ggn", "hessian", "cg", "last layer", "fine tune"],
)
def test_a_loader_that_is_read_again_may_fail_in_any_later_pass(n, make, untouched, monkeypatch):
    monkeypatch.setattr("estimators.data.training_data._CACHE_BYTES", 1)
    model = mlp()
    loader = Interrupting(batches(), n, KeyboardInterrupt())
    with untouched(model):
        try:
            make(model, "classification").fit(loader)
        except KeyboardInterrupt:
            assert loader.left == 0


class InterruptedForward(nn.Module):
    """A network of several kinds of layer whose k-th call is interrupted; calls are counted outside of the module."""

    def __init__(self, calls):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh())
        self.head = nn.Linear(5, 3)
        self.calls = (calls,)
        self.double().eval()

    def __deepcopy__(self, memo):
        copied = InterruptedForward.__new__(InterruptedForward)
        memo[id(self)] = copied
        for key, value in vars(self).items():
            copied.__dict__[key] = value if key == "calls" else copy.deepcopy(value, memo)
        return copied

    def forward(self, x):
        next(self.calls[0])
        return self.head(self.body(x))


def interrupted_after(k, error):
    for _ in range(k):
        yield
    raise error


FITS = {
    "laplace": {"make": LinearizedLaplace},
    "hessian": {"make": LinearizedLaplace, "curvature": "hessian", "prior_precision": 90.0},
    "laplace of the last layer": {"make": LinearizedLaplace, "subset_of_weights": "last_layer"},
    "full": {"make": LastLayerLaplace},
    "kron": {"make": LastLayerLaplace, "hessian_structure": "kron"},
    "fine tune": {"make": RegVar, "solver": FineTune()},
    "linear response": {"make": RegVar, "solver": LinearResponse()},
    "newton": {"make": RegVar, "solver": NewtonRefit()},
}


@pytest.mark.parametrize("case", FITS)
@pytest.mark.parametrize("k", [0, 1, 2, 4, 7, 10, 12, 20, 40])
def test_ctrl_c_inside_of_the_network_leaves_everything_as_it_was(k, case, untouched):
    options = dict(FITS[case])
    model = InterruptedForward(interrupted_after(k, KeyboardInterrupt()))
    estimator = options.pop("make")(model, "classification", **options)
    with untouched(model):
        try:
            estimator.fit(batches())
        except KeyboardInterrupt:
            assert not hasattr(estimator, "objective_")


@pytest.mark.parametrize("case", FITS)
def test_a_fit_and_its_questions_leave_everything_as_it_was(case, untouched):
    options = dict(FITS[case])
    model = InterruptedForward(iter(lambda: None, 0))
    x, _ = rows()
    with untouched(model):
        estimator = options.pop("make")(model, "classification", **options).fit(batches())
        estimator.variance(x)
        estimator.covariance(x)
        estimator.sample(x, 2)
        estimator.predict(x)


@pytest.mark.parametrize("plain", [True, False])
def test_gradients_that_the_user_has_accumulated_stay(plain, untouched):
    model = mlp() if plain else InterruptedForward(iter(lambda: None, 0))
    model(rows()[0]).sum().backward()
    kept = [p.grad.clone() for p in model.parameters()]
    with untouched(model):
        estimator = LinearizedLaplace(model, "classification").fit(batches())
    assert estimator.jacobian_backend_ == "torch.func"
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))


def test_hooks_of_the_user_stay_and_are_not_doubled(untouched):
    model, seen = mlp(), []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    with untouched(model):
        LastLayerLaplace(model, "classification").fit(batches())
    before = len(seen)
    model(rows()[0])
    assert len(seen) == before + 1
    handle.remove()
