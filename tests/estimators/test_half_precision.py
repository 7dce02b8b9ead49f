"""Weights in bfloat16, float16, several dtypes or complex numbers: right to the rounding of the weights themselves."""

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import nn

from estimators import (
    Gaussian,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    Pointwise,
    PosteriorDraws,
    RegVar,
)
from estimators.errors import DataError, ModelError

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
KINDS = {"regression": Gaussian(0.6), "classification": "classification", "binary": "binary"}


class Mlp(nn.Sequential):
    """No cast of its own."""

    def __init__(self):
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def in_float64(self):
        return copy.deepcopy(self).double()


class FloatLogits(nn.Module):
    """A forward that names the dtype of its weights, and returns logits in float32."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = torch.tanh(self.body(x.to(BF16))) + torch.zeros(6, dtype=BF16, device=x.device)
        return self.head(hidden.bfloat16()).float()

    def in_float64(self):
        twin = copy.deepcopy(self).double()
        return nn.Sequential(twin.body, nn.Tanh(), twin.head)


class Adapted(nn.Module):
    """A frozen base in bfloat16 under an adapter and a head in float32, with the casts that adapter libraries make."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 6).to(BF16).requires_grad_(requires_grad=False)
        self.down, self.up, self.head = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        result = self.base(x.to(self.base.weight.dtype))
        adapted = self.up(self.down(x.to(self.down.weight.dtype)))
        return self.head(torch.tanh(result + adapted.to(result.dtype)).to(torch.float32))

    def in_float64(self):
        twin = copy.deepcopy(self).double()

        class Plain(nn.Module):
            def __init__(self):
                super().__init__()
                self.base, self.down, self.up, self.head = twin.base, twin.down, twin.up, twin.head

            def forward(self, x):
                return self.head(torch.tanh(self.base(x) + self.up(self.down(x))))

        return Plain()


class Doubled(nn.Module):
    """Weights in float32, outputs in float64."""

    def __init__(self):
        super().__init__()
        self.body = Mlp()

    def forward(self, x):
        return self.body(x).double()

    def in_float64(self):
        return self.body.in_float64()


NETWORKS = {  # the network, the dtype of its inputs, and of its outputs
    "bfloat16": (lambda: Mlp().to(BF16), BF16, BF16),
    "float16": (lambda: Mlp().to(F16), F16, F16),
    "bfloat16 with float32 logits": (lambda: FloatLogits().to(BF16), BF16, F32),
    "adapters on a frozen bfloat16 base": (Adapted, F32, F32),
    "float32 with float64 outputs": (Doubled, F32, F64),
}
networks = pytest.mark.parametrize("name", NETWORKS)
ROUNDING = {BF16: 2**-8, F16: 2**-11, F32: 1e-3, F64: 1e-3}  # of the result; else of the solver's tolerance


def problem(name, kind):
    """The network, its twin in float64, and rows and queries for both."""
    make, inputs, outputs = NETWORKS[name]
    generator = torch.Generator().manual_seed(5)
    x, queries = (torch.randn(n, 4, generator=generator).to(inputs) for n in (23, 6))
    y = torch.randint(0, 3, (23,), generator=generator)
    if kind != "classification":
        y = torch.randint(0, 2, (23, 3), generator=generator).to(outputs)
    model = make().eval()
    return model, model.in_float64().eval(), x, y, queries


def wide(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def loader(x, y):
    return list(zip(x.split(7), y.split(7), strict=True))


ESTIMATORS = {
    "cholesky": lambda m, likelihood: LinearizedLaplace(m, likelihood, prior_precision=1.7, inverse="cholesky"),
    "dual": lambda m, likelihood: LinearizedLaplace(m, likelihood, prior_precision=1.7, inverse="dual"),
    "cg": lambda m, likelihood: LinearizedLaplace(m, likelihood, prior_precision=1.7, inverse="cg"),
    "kron": lambda m, likelihood: LinearizedLaplace(m, likelihood, prior_precision=1.7, hessian_structure="kron"),
    "last layer": lambda m, likelihood: LastLayerLaplace(m, likelihood, prior_precision=1.7),
    "pointwise": lambda m, likelihood: RegVar(
        m, likelihood, prior_precision=1.7, regularizer=Pointwise(), solver=LinearResponse()
    ),
}


def estimators_and_networks():
    """Every estimator with every network, and either with every likelihood; the rest is nightly."""
    for (i, estimator), (j, name), (k, kind) in product(*map(enumerate, (ESTIMATORS, NETWORKS, KINDS))):
        marks = () if k == (i + j) % len(KINDS) else pytest.mark.verification
        yield pytest.param(estimator, name, kind, marks=marks, id=f"{estimator}-{name}-{kind}")


@pytest.mark.parametrize(("estimator", "name", "kind"), list(estimators_and_networks()))
def test_variances_are_those_of_the_same_weights_in_float64(estimator, name, kind, untouched):
    model, twin, x, y, queries = problem(name, kind)
    make, outputs = ESTIMATORS[estimator], NETWORKS[name][2]
    with untouched(model):
        found = make(model, KINDS[kind]).fit(loader(x, y)).variance(queries)
    exact = make(twin, KINDS[kind]).fit(loader(wide(x), wide(y))).variance(wide(queries))
    assert found.dtype == outputs
    assert torch.allclose(found.double(), exact, rtol=ROUNDING[outputs] + 1e-3, atol=0)


@networks
def test_everything_returned_has_the_dtype_of_the_outputs(name):
    model, _, x, y, queries = problem(name, "classification")
    outputs = NETWORKS[name][2]
    assert model(queries).dtype == outputs
    fitted = LinearizedLaplace(model, "classification", inverse="cholesky").fit(loader(x, y))
    prediction = fitted.predict(queries)
    values = [fitted.covariance(queries), fitted.sample(queries, 2), prediction.mean, prediction.probs]
    assert {value.dtype for value in [*values, fitted.variance(queries, of=lambda f: f[:1])]} == {outputs}


@networks
@pytest.mark.parametrize("estimator", ["last layer", "cholesky", "draws"])
def test_a_saved_fit_is_loaded_by_the_same_weights(name, estimator, tmp_path):
    model, _, x, y, queries = problem(name, "classification")
    draws = {"regularizer": PosteriorDraws(n_draws=3), "solver": LinearResponse()}
    make = ESTIMATORS.get(estimator, lambda m, likelihood: RegVar(m, likelihood, prior_precision=1.7, **draws))
    fitted = make(model, "classification").fit(loader(x, y))
    fitted.save(tmp_path / "fit.safetensors")
    loaded = make(model, "classification").load(tmp_path / "fit.safetensors")
    assert torch.equal(loaded.variance(queries), fitted.variance(queries))


@networks
def test_a_pickled_fit_has_the_same_variances(name):
    model, _, x, y, queries = problem(name, "classification")
    fitted = ESTIMATORS["cg"](model, "classification").fit(loader(x, y))
    arrived = pickle.loads(pickle.dumps(fitted))
    assert torch.equal(arrived.variance(queries), fitted.variance(queries))


class KeepsItsState(Mlp):
    """Pickles of it are made by its own methods, and count how often it has been set."""

    times_set = 0

    def __reduce__(self):
        return self.maker(), (), self.__dict__

    def maker(self):
        return KeepsItsState

    def __setstate__(self, state):
        super().__setstate__(state)
        self.times_set += 1


class MakesItsClass(KeepsItsState):
    def maker(self):
        return type(self)


@pytest.mark.parametrize("kind", [KeepsItsState, MakesItsClass])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda fitted: pickle.loads(pickle.dumps(fitted))])
def test_a_converted_network_with_pickles_of_its_own_keeps_them(copied, kind):
    _, _, x, y, queries = problem("bfloat16", "classification")
    fitted = ESTIMATORS["cg"](kind().to(BF16).eval(), "classification").fit(loader(x, y))
    arrived = copied(fitted)
    assert torch.equal(arrived.variance(queries), fitted.variance(queries))
    assert arrived.model.times_set == fitted.model.times_set + 1


def test_adapters_alone_are_in_theta():
    model, _, x, y, _ = problem("adapters on a frozen bfloat16 base", "classification")
    fitted = LinearizedLaplace(model, "classification").fit(loader(x, y))
    assert list(fitted.network_.subset.shapes) == ["down.weight", "up.weight", "head.weight", "head.bias"]
    assert fitted.theta_.dtype == F32


def test_inputs_of_a_wider_dtype_than_the_weights_are_rejected():
    model, _, x, y, _ = problem("bfloat16", "classification")
    with pytest.raises(DataError, match=r"of the dtype of the model, torch\.bfloat16"):
        LinearizedLaplace(model, "classification").fit(loader(x.double(), y))


def test_weights_in_a_dtype_that_has_no_arithmetic_are_rejected():
    model = Mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match=r"float8_e4m3fn.*Try: model\.to\(torch\.float32\)"):
        LinearizedLaplace(model, "classification").fit(loader(torch.randn(4, 4), torch.zeros(4, dtype=torch.long)))


def test_complex_outputs_are_rejected():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return torch.fft.fft(self.layer(x))

    with pytest.raises(ModelError, match="real outputs"):
        LinearizedLaplace(Complex(), "regression").fit(loader(torch.randn(4, 4), torch.randn(4, 2)))


class Spectral(nn.Module):
    """A Fourier layer: complex weights by frequency, behind a real one so that pairs begin at an odd place."""

    def __init__(self):
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.ones(1)), nn.Parameter(torch.randn(1, 3, 2, dtype=torch.cfloat))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        spectrum = torch.fft.rfft(x)
        mixed = torch.einsum("bcm,com->bom", spectrum[..., :2], self.weight)
        waves = torch.fft.irfft(torch.cat([mixed, torch.zeros_like(mixed[..., :1]).expand(-1, -1, 2)], -1), n=6)
        return self.head(torch.tanh(self.scale * waves).mean(-1))


def spectral():
    model = Spectral().double().eval()
    model.weight = nn.Parameter(model.weight.detach().cdouble())
    generator = torch.Generator().manual_seed(5)
    x, queries = (torch.randn(n, 1, 6, generator=generator, dtype=F64) for n in (17, 5))
    return model, x, torch.randn(17, 2, generator=generator, dtype=F64), queries


def jacobian_of_pairs(model, x):
    """Rows of ∂f/∂(real, imaginary) by plain autograd on the module itself."""
    rows = []
    for output in model(x).flatten():
        slopes = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([(torch.view_as_real(s) if s.is_complex() else s).flatten() for s in slopes]))
    return torch.stack(rows).view(len(x), 2, -1)


ROUTES = {
    **{inverse: {"inverse": inverse} for inverse in ("cholesky", "dual", "matrix_free_dual", "cg", "auto")},
    "diag": {"hessian_structure": "diag"},
}


@pytest.mark.parametrize("route", ROUTES)
def test_complex_weights_are_pairs_of_reals(route, untouched):
    model, x, y, queries = spectral()
    with untouched(model):
        fitted = LinearizedLaplace(model, Gaussian(0.6), prior_precision=1.7, **ROUTES[route]).fit(loader(x, y))
    rows = jacobian_of_pairs(model, x).flatten(0, 1)
    precision = rows.T @ rows / 0.36 + 1.7 * torch.eye(rows.shape[1], dtype=F64)
    precision = precision.diagonal().diag() if route == "diag" else precision
    jacobian = jacobian_of_pairs(model, queries)
    exact = jacobian @ torch.linalg.inv(precision) @ jacobian.transpose(1, 2)
    assert torch.allclose(fitted.covariance(queries), exact, rtol=1e-8, atol=1e-12)


def test_complex_weights_solve_for_regvar_and_have_a_prior_by_name():
    model, x, y, queries = spectral()
    delta = {"weight": 3.1, "*": 1.7}
    options = {"prior_precision": delta}
    laplace = LinearizedLaplace(model, Gaussian(0.6), inverse="cholesky", **options).fit(loader(x, y))
    pointwise = RegVar(model, Gaussian(0.6), regularizer=Pointwise(), solver=LinearResponse(), **options)
    assert torch.allclose(pointwise.fit(loader(x, y)).variance(queries), laplace.variance(queries), rtol=1e-8)
