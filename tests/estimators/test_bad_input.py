"""Bad input: a typed error with what was received and what to try, and a model left as it was."""

from math import inf, nan
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from estimators import (
    Gaussian,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    MeanAbsolute,
    NewtonRefit,
    Pointwise,
    RegVar,
)
from estimators.baselines.map import MAP
from estimators.errors import DataError, EstimatorError, ModelError, NotFittedError, OptionError

ESTIMATORS = {
    "laplace": LinearizedLaplace,
    "last layer": LastLayerLaplace,
    "draws": RegVar,
    "pointwise": lambda *a, **k: RegVar(*a, regularizer=Pointwise(), solver=LinearResponse(), **k),
    "mean absolute": lambda *a, **k: RegVar(*a, regularizer=MeanAbsolute(), solver=NewtonRefit(), **k),
    "map": MAP,
}
every = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())


def mlp(outputs=3, *extra):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *extra, nn.Linear(5, outputs)).double().eval()


def rows(outputs=3, n=20):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, (torch.arange(n) % outputs)


def spoiled(where, value, at=3):
    """A regression with `value` at one place of x, y or a parameter."""

    def make():
        model, (x, _) = mlp(2), rows()
        y = torch.randn(20, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        tensors = {"x": x, "y": y, **dict(model.named_parameters())}
        tensors[where].detach().view(-1)[at] = value
        return model, "regression", x, y

    return make


def with_targets(likelihood, y, outputs=3):
    return lambda: (mlp(outputs), likelihood, rows()[0], y)


def with_model(model, *, x=None, y=None):
    def make():
        found = model()
        return found, "classification", rows()[0] if x is None else x, rows()[1] if y is None else y

    return make


class Returns(nn.Module):
    """A network that ends as `ending` says."""

    def __init__(self, ending):
        super().__init__()
        self.inner, self.ending = mlp(), ending
        self.eval()

    def forward(self, x):
        return self.ending(self.inner(x))


def half_single():
    model = mlp()
    model[0].float()
    return model


def half_elsewhere():
    model = mlp()
    model[0].to("meta")
    return model


def in_train_mode(*layers):
    return lambda: mlp(3, *layers).train()


def partly_in_train_mode():
    model = mlp(3, nn.Dropout(0.25))
    model[2].train()
    return model


def exploding():
    model = mlp()
    with torch.no_grad():
        model[2].weight.fill_(1e308)
    return model


F64 = torch.float64
# name: (problem, error, what the message says was received, what it says to try)
ROWS = {
    "NaN in the weights": (
        spoiled("0.weight", nan), ModelError, r"NaN or Inf in '0\.weight'", "train"),
    "Inf in the weights": (
        spoiled("2.weight", inf), ModelError, r"NaN or Inf in '2\.weight'", "train"),
    "NaN in x": (spoiled("x", nan), DataError, "NaN or Inf in the inputs", "clean"),
    "Inf in x": (spoiled("x", -inf), DataError, "NaN or Inf in the inputs", "clean"),
    "NaN in y": (spoiled("y", nan), DataError, "NaN or Inf", "clean"),
    "NaN in the last batch alone": (spoiled("x", nan, at=19 * 4), DataError, "NaN", "clean"),
    "outputs beyond the range of floats": (with_model(exploding), DataError, "NaN or Inf", "scale of x"),
    "y of shape (N,) against outputs (N, 1)": (
        with_targets("regression", torch.zeros(20, dtype=F64), 1), DataError, r"\(6,\)", r"unsqueeze\(-1\)"),
    "y of shape (N, 1) against outputs (N, 2)": (
        with_targets("regression", torch.zeros(20, 1, dtype=F64), 2), DataError, r"\(6, 1\)", "reshape"),
    "binary y of shape (N,)": (with_targets("binary", torch.zeros(20), 1), DataError, r"\(6,\)", r"unsqueeze\(-1\)"),
    "class index C": (with_targets("classification", torch.arange(20) % 4), DataError, "0 to 3", "renumber"),
    "class index -1": (with_targets("classification", torch.arange(20) % 4 - 1), DataError, "-1 to 2", "renumber"),
    "float targets for classification": (
        with_targets("classification", torch.zeros(20)), DataError, r"torch\.float32", r"y\.long\(\)"),
    "one-hot targets for classification": (
        with_targets("classification", torch.eye(3).long()[torch.arange(20) % 3]), DataError, r"\(6, 3\)", "argmax"),
    "labels outside of {0, 1} for binary": (
        with_targets("binary", torch.full((20, 3), 2)), DataError, "a label 2", "map the labels"),
    "labels beyond 1 for binary": (
        with_targets("binary", torch.full((20, 3), 1.5)), DataError, r"a label 1\.5", "map the labels"),
    "soft targets that are counts": (
        with_targets("classification", torch.full((20, 3), 2.0)), DataError, "sums from 6 to 6", r"y / y\.sum"),
    "soft targets that are logits": (
        with_targets("classification", torch.tensor([[2.0, -0.5, -0.5]]).expand(20, 3)), DataError, r"-0\.5",
        "softmax"),
    "NaN among several targets": (
        with_targets("regression", torch.tensor([[0.0, nan, 0.0]], dtype=F64).expand(20, 3)), DataError,
        "NaN or Inf in row 0, in batch 0", r"-999.*given\(y\)"),
    "masked logits": (
        with_model(lambda: Returns(lambda f: f.masked_fill(torch.tensor([True, False, False]), -inf))), DataError,
        "-Inf in row 0, as logits of masked classes", r"masked_fill\(mask, -1e4\)"),
    "targets of another dtype": (
        with_targets("regression", torch.zeros(20, 3)), DataError, r"torch\.float32", r"y\.to\(outputs\.dtype\)"),
    "inputs of another dtype": (
        with_model(mlp, x=rows()[0].float()), DataError, r"torch\.float32", r"x\.to\(torch\.float64\)"),
    "inputs on another device": (with_model(mlp, x=rows()[0].to("meta")), DataError, "on meta", "one device"),
    "targets on another device": (with_model(mlp, y=rows()[1].to("meta")), DataError, "meta", "one device"),
    "weights of two dtypes": (
        with_model(half_single), ModelError, r"torch\.float32, torch\.float64", r"model\.to"),
    "weights on two devices": (
        with_model(half_elsewhere), ModelError, "float64 on cpu, torch.float64 on meta", r"model\.to"),
    "x with too many features": (
        with_model(mlp, x=torch.zeros(20, 6, dtype=F64)), DataError, r"\(6, 6\)", "feature size"),
    "fewer targets than rows": (
        lambda: (mlp(), "classification", [rows()[0]], [rows()[1][:19]]), DataError, r"\(19,\)", "loader"),
    "a tuple as output": (
        with_model(lambda: Returns(lambda f: (f, f))), ModelError, "type tuple", "forward picks the tensor"),
    "a dict as output": (with_model(lambda: Returns(lambda f: {"f": f})), ModelError, "type dict", "forward picks"),
    "logits that are no tensor": (
        with_model(lambda: Returns(lambda f: SimpleNamespace(logits=f.tolist()))), ModelError, "SimpleNamespace",
        "wrap"),
    "outputs of shape (B,)": (with_model(lambda: Returns(lambda f: f[:, 0])), ModelError, r"\(6,\)", "unsqueeze"),
    "one label for outputs of shape (B, T, C)": (
        with_model(lambda: mlp(3, nn.Unflatten(1, (1, 5)))), DataError, r"shape \(6,\)", "one index"),
    "dropout in train mode": (
        with_model(in_train_mode(nn.Dropout(0.25))), ModelError, r"'2' \(Dropout\) in train mode", r"model\.eval\(\)"),
    "one dropout in train mode": (with_model(partly_in_train_mode), ModelError, r"dropout 0\.25", r"model\.eval\(\)"),
    "batch statistics in train mode": (
        with_model(in_train_mode(nn.BatchNorm1d(5))), ModelError, r"'2' \(BatchNorm1d\) in train", r"model\.eval\(\)"),
    "batches that are none": (
        lambda: (mlp(), "classification", torch.zeros(2, 3, 4), None), DataError, "Tensor", "yields pairs"),
}  # fmt: skip


def loader_of(x, y):
    if y is None:
        return list(x)
    if isinstance(x, list):
        return list(zip(x, y, strict=True))
    return list(zip(x.split(6), y.split(6), strict=True))


@every
@pytest.mark.parametrize("row", ROWS)
def test_bad_input_of_fit_is_rejected_with_the_remedy_and_changes_nothing(row, estimator, untouched):
    make, error, received, remedy = ROWS[row]
    model, likelihood, x, y = make()
    unfitted = estimator(model, likelihood)
    with untouched(model), pytest.raises(error, match=rf"(?s)Expected .*Received .*{received}.*Try: .*{remedy}"):
        unfitted.fit(loader_of(x, y))
    with pytest.raises(NotFittedError):
        unfitted.variance(rows()[0])


@every
def test_an_empty_loader_is_rejected(estimator, untouched):
    model = mlp()
    with untouched(model), pytest.raises(DataError, match=r"at least one row.*empty.*Try: "):
        estimator(model, "classification").fit([])


@every
@pytest.mark.parametrize("bad", [0.0, -2.0, float("nan")])
def test_a_prior_precision_that_is_not_positive_is_rejected_by_the_constructor(estimator, bad, untouched):
    model = mlp()
    with untouched(model), pytest.raises(OptionError, match=f"prior_precision > 0.*Received {bad}.*Try: "):
        estimator(model, "classification", prior_precision=bad)


@pytest.mark.parametrize("bad", [0.0, -2.0])
def test_a_noise_that_is_not_positive_is_rejected(bad):
    with pytest.raises(OptionError, match=f"sigma_noise > 0.*Received {bad}.*Try: "):
        Gaussian(sigma_noise=bad)


@every
@pytest.mark.parametrize("call", ["variance", "covariance", "predict", "sample"])
def test_a_question_before_fit_says_to_fit(estimator, call, untouched):
    model = mlp()
    arguments = (rows()[0], 3) if call == "sample" else (rows()[0],)
    with untouched(model), pytest.raises(NotFittedError, match=r"Received one that is not fitted.*fit\(train_loader\)"):
        getattr(estimator(model, "classification"), call)(*arguments)


@every
@pytest.mark.parametrize("attribute", ["theta_", "n_data_", "network_"])
def test_a_learned_attribute_before_fit_says_to_fit(estimator, attribute):
    with pytest.raises(NotFittedError, match=r"fit\(train_loader\)"):
        getattr(estimator(mlp(), "classification"), attribute)


@pytest.mark.parametrize("estimator", [LinearizedLaplace, LastLayerLaplace])
def test_the_evidence_before_fit_says_to_fit(estimator):
    with pytest.raises(NotFittedError, match=r"fit\(train_loader\)"):
        estimator(mlp(), "classification").log_marginal_likelihood()


QUERIES = {
    "too many features": (torch.zeros(3, 5, dtype=F64), r"\(3, 5\)", "feature size"),
    "too few features": (torch.zeros(3, 1, dtype=F64), r"\(3, 1\)", "feature size"),
    "another dtype": (torch.zeros(3, 4), r"torch\.float32", r"x\.to\(torch\.float64\)"),
    "another device": (torch.zeros(3, 4, dtype=F64, device="meta"), "on meta", "one device"),
    "NaN": (torch.full((3, 4), float("nan"), dtype=F64), "NaN or Inf in the inputs", "clean"),
    "no tensor": ("a string", "str", "tensors"),
    "a list of numbers": ([1.0, 2.0], "list", "tensors"),
    "no rows": (torch.zeros(0, 4, dtype=F64), "none", "leave"),
    "the wrong keywords": ({"pixels": torch.zeros(3, 4, dtype=F64)}, "pixels", "compare"),
}


@pytest.fixture(scope="module")
def fitted():
    x, y = rows()
    recipe_free = {name: make for name, make in ESTIMATORS.items() if name != "draws"}
    made = {name: make(mlp(), "classification").fit(loader_of(x, y)) for name, make in recipe_free.items()}
    made["draws"] = RegVar(mlp(), "classification", solver=LinearResponse()).fit(loader_of(x, y))
    return made


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("query", QUERIES)
def test_a_query_that_does_not_fit_the_network_is_rejected(name, query, fitted, untouched):
    x, received, remedy = QUERIES[query]
    estimator = fitted[name]
    with (
        untouched(estimator.model),
        pytest.raises(DataError, match=rf"Expected .*Received .*{received}.*Try: .*{remedy}"),
    ):
        estimator.variance(x)


@pytest.mark.parametrize("estimator", [LinearizedLaplace, RegVar], ids=["laplace", "draws"])
def test_a_subset_without_a_parameter_is_rejected(estimator, untouched):
    model = mlp()
    with untouched(model), pytest.raises(OptionError, match=r"Received 'head\.\*', which matches none.*0\.weight"):
        estimator(model, "classification", subset_of_weights="head.*").fit(loader_of(*rows()))


ENDINGS = {
    "no linear layer": lambda: nn.Sequential(nn.Conv1d(4, 3, 1), nn.Flatten()).double().eval(),
    "a layer after the last linear one": lambda: nn.Sequential(*mlp(), nn.Tanh()).double().eval(),
    "a frozen last layer": lambda: nn.Sequential(*mlp()[:2], mlp()[2].requires_grad_(requires_grad=False)),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("estimator", "options"),
    [(LastLayerLaplace, {}), (LinearizedLaplace, {"subset_of_weights": "last_layer"}),
     (RegVar, {"subset_of_weights": "last_layer"})],
    ids=["last layer", "laplace", "draws"],
)  # fmt: skip
def test_a_model_without_a_trainable_last_linear_layer_is_rejected(ending, estimator, options, untouched):
    model = ENDINGS[ending]()
    x, y = rows()
    x = x[..., None] if ending == "no linear layer" else x
    with untouched(model), pytest.raises(ModelError, match=r"Expected .*Received .*Try: "):
        estimator(model, "classification", **options).fit(loader_of(x, y))


def test_every_typed_error_has_one_base():
    with pytest.raises(EstimatorError) as caught:
        LinearizedLaplace(mlp(), "classification").variance(rows()[0])
    assert caught.value.expected
    assert caught.value.received
    assert caught.value.remedy


LOADER_ROLES = {
    "training": lambda estimator, loader: estimator.fit(loader),
    "validation": lambda estimator, loader: estimator.fit([rows()], val_loader=loader),
    "attached": lambda estimator, loader: estimator.fit([rows()]).attach_data(loader),
}


@pytest.mark.parametrize("loader", [3, object()], ids=["a number", "an object"])
@pytest.mark.parametrize("role", LOADER_ROLES)
def test_a_loader_that_cannot_be_iterated_raises_a_data_error(role, loader):
    estimator = LinearizedLaplace(mlp(), "classification")
    with pytest.raises(DataError, match="Expected a loader of batches"):
        LOADER_ROLES[role](estimator, loader)
