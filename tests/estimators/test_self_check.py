"""Every comparison of the self-check is seen to fail when what it compares is broken on purpose, also in one row."""

import copy
import warnings
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import nn
from trust_networks.gradient_rules import Reverse

from estimators import (
    FineTune,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    NewtonRefit,
    Pointwise,
    PosteriorDraws,
    RegVar,
)
from estimators.curvature.last_layer.features import FeatureHook
from estimators.errors import DerivativeRouteWarning, ModelError, NoLastLayerError, UnsupportedError
from estimators.models import Network
from estimators.models.disagreement import Disagreement
from estimators.models.function_checks import check_displaced_outputs
from estimators.models.input_kinds import MOST_KINDS, InputKinds
from estimators.models.kinks import RoundOff, kink_explains
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.models.network import _Pulls
from estimators.models.user_module import UserModule

DELTA, N, BATCH = 1.7, 23, 9
MARK = 7.0  # the first feature of the one row in which derivatives are broken


class Plain(nn.Module):
    """A custom forward; 3 outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.a(x)))


def network(kind=Plain):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return kind().double().eval()


def rows(marked=17):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    x[marked, 0] = MARK
    return list(zip(x.split(BATCH), torch.randint(0, 3, (N,), generator=generator).split(BATCH), strict=True))


QUERIES = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def jacobian(model, x):
    parameters = list(model.parameters())
    f = model(x)
    gradients = [torch.autograd.grad(value, parameters, retain_graph=True) for value in f.flatten()]
    return f.detach(), torch.stack([torch.cat([g.flatten() for g in one]) for one in gradients]).view(*f.shape, -1)


def exact(model):
    """diag J A⁻¹ Jᵀ of the softmax likelihood, by plain autograd."""
    total = 0.0
    for x, _ in rows():
        f, j = jacobian(model, x)
        p = f.softmax(-1)
        lam = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        total = total + torch.einsum("ncp,ncd,ndq->pq", j, lam, j)
    total = total + DELTA * torch.eye(len(total), dtype=torch.float64)
    j = jacobian(model, QUERIES)[1]
    return torch.einsum("mcp,pq,mcq->mc", j, torch.linalg.inv(total), j)


def has_mark(x):
    return bool((x[:, 0] == MARK).any())


def broken(function, place=1):
    """A method whose result is 1 % too large where its inputs hold the marked row."""

    def call(*arguments, **keywords):
        found = function(*arguments, **keywords)
        return 1.01 * found if has_mark(arguments[place]) else found

    return call


def laplace(model, **options):
    return LinearizedLaplace(model, "classification", prior_precision=DELTA, **options)


def pointwise(model, solver=None):
    solver = LinearResponse(tol=1e-12) if solver is None else solver
    return RegVar(model, "classification", prior_precision=DELTA, regularizer=Pointwise(), solver=solver)


@pytest.mark.parametrize(("error", "agrees"), [(0.0, True), (1e-9, True), (2e-9, False), (float("nan"), False)])
def test_a_derivative_agrees_up_to_round_off_and_never_if_it_is_not_finite(error, agrees):
    assert Disagreement(error, None).within(1e-9) is agrees


@pytest.mark.parametrize("inverse", ["cholesky", "dual"])
def test_rows_of_j_that_are_wrong_in_one_row_are_replaced(inverse, monkeypatch):
    monkeypatch.setattr(Network, "_vectorised_rows", broken(Network._vectorised_rows))
    with pytest.warns(DerivativeRouteWarning, match="rows of J.*differs from plain autograd by.*one row at a time"):
        estimator = laplace(network(), inverse=inverse).fit(rows())
    torch.testing.assert_close(estimator.variance(QUERIES), exact(network()))
    assert estimator.jacobian_backend_ == "autograd"
    assert estimator.fit_report_.derivatives.routes["rows of J"].startswith("plain autograd")


def test_forward_mode_that_is_wrong_in_one_row_gives_way_to_two_reverse_passes(monkeypatch):
    monkeypatch.setattr(Network, "_forward_mode", broken(Network._forward_mode))
    estimator = pointwise(network()).fit(rows())
    with pytest.warns(DerivativeRouteWarning, match="J v: forward mode differs.*two reverse passes instead"):
        found = estimator.variance(QUERIES)
    torch.testing.assert_close(found, exact(network()))


def test_forward_mode_is_compared_at_every_batch_of_a_fit(monkeypatch):
    monkeypatch.setattr(Network, "_forward_mode", broken(Network._forward_mode))
    draws = PosteriorDraws(4, rao_blackwell=None)
    options = {"prior_precision": DELTA, "solver": LinearResponse(tol=1e-12)}
    with pytest.warns(DerivativeRouteWarning, match="J v: forward mode differs"):
        found = RegVar(network(), "classification", regularizer=draws, **options).fit(rows())
    monkeypatch.undo()
    expected = RegVar(network(), "classification", regularizer=draws, **options).fit(rows())
    torch.testing.assert_close(found.variance(QUERIES), expected.variance(QUERIES))
    assert found.fit_report_.derivatives.rows["J v"] >= N


def test_backward_passes_that_are_wrong_in_one_row_give_way_to_autograd(monkeypatch):
    plain = _Pulls.__call__
    monkeypatch.setattr(_Pulls, "__call__", lambda self, u: (1.01 if has_mark(self._x) else 1.0) * plain(self, u))
    with pytest.warns(DerivativeRouteWarning, match="Jᵀ u: torch.func differs.*plain autograd instead"):
        estimator = pointwise(network()).fit(rows())
    torch.testing.assert_close(estimator.variance(QUERIES), exact(network()))


def test_hessian_products_that_are_wrong_in_one_row_give_way_to_autograd(monkeypatch):
    model = network()
    options = {"prior_precision": 40.0, "curvature": "hessian", "inverse": "cholesky"}
    expected = LinearizedLaplace(model, "classification", **options).fit(rows()).variance(QUERIES)
    monkeypatch.setattr(Network, "_forward_over_reverse", broken(Network._forward_over_reverse))
    with pytest.warns(DerivativeRouteWarning, match="Hessian products.*plain autograd, twice"):
        estimator = LinearizedLaplace(model, "classification", **options).fit(rows())
    torch.testing.assert_close(estimator.variance(QUERIES), expected)


def scaled_factors(monkeypatch):
    plain = LayerwiseJacobian._joined

    def joined(self, inputs, gradients, cotangents):
        return plain(self, inputs, [1.01 * b for b in gradients], cotangents)

    monkeypatch.setattr(LayerwiseJacobian, "_joined", joined)


def test_factors_of_layers_that_are_wrong_are_an_error_where_nothing_else_will_do(monkeypatch):
    scaled_factors(monkeypatch)
    with pytest.raises(UnsupportedError, match="factors of layers whose gradient differs from plain autograd by"):
        laplace(network(), hessian_structure="kron").fit(rows())


def test_factors_of_layers_that_are_wrong_give_way_to_rows(monkeypatch):
    model = network(lambda: nn.Sequential(nn.Linear(4, 80), nn.Tanh(), nn.Linear(80, 3)))
    expected = exact(model)
    assert laplace(model, inverse="cholesky").fit(rows()).jacobian_backend_ == "layers"
    scaled_factors(monkeypatch)
    for inverse in ("cholesky", "dual"):
        estimator = laplace(model, inverse=inverse).fit(rows())
        assert estimator.jacobian_backend_ != "layers"
        torch.testing.assert_close(estimator.variance(QUERIES), expected)
        assert "factors of layers" in " ".join(estimator.fit_report_.derivatives.disagreements)


def test_features_of_the_last_layer_that_are_wrong_are_an_error(monkeypatch):
    plain = FeatureHook.at_positions.fget
    monkeypatch.setattr(FeatureHook, "at_positions", property(lambda self: 1.01 * plain(self)))
    with pytest.raises(NoLastLayerError, match="differs from plain autograd"):
        LastLayerLaplace(network(), "classification", prior_precision=DELTA).fit(rows())


class Switched(Plain):
    """Outputs that the last layer does not make in the marked row."""

    def forward(self, x):
        f = super().forward(x)
        return torch.where(x[:, :1] == MARK, 0.3 * f, f)


def test_a_last_layer_that_does_not_end_the_network_in_one_row_is_an_error():
    with pytest.raises(NoLastLayerError, match="rows whose outputs differ"):
        LastLayerLaplace(network(Switched), "classification", prior_precision=DELTA).fit(rows())
    draws = RegVar(network(Switched), "classification", prior_precision=DELTA, solver=LinearResponse()).fit(rows())
    assert draws.rao_blackwell_.startswith("none")


class OtherWhenCopied(Plain):
    """A copy of it is another function."""

    factor = 1.0

    def __deepcopy__(self, memo):
        other = copy._reconstruct(self, memo, *self.__reduce_ex__(4)[:2], deepcopy=copy.deepcopy, state=None)
        nn.Module.__init__(other)
        for name, child in self.named_children():
            setattr(other, name, copy.deepcopy(child, memo))
        other.factor = 1.01
        return other

    def forward(self, x):
        return self.factor * super().forward(x)


def test_a_copy_that_is_another_function_is_not_used():
    model = network(OtherWhenCopied)
    model.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator = laplace(model, inverse="cholesky").fit(rows())
    torch.testing.assert_close(estimator.variance(QUERIES), exact(model))
    assert any("outputs: those of a copy of the module" in str(w.message) for w in caught)


class Centred(Plain):
    def forward(self, x):
        f = super().forward(x)
        return f - 0.1 * f.mean(0)


class CentredSlopes(Plain):
    """The values of a row do not depend on the others, its gradient does."""

    def forward(self, x):
        f = super().forward(x)
        coupled = f.mean(0, keepdim=True)
        return f + coupled - coupled.detach()


@pytest.mark.parametrize("make", [laplace, pointwise])
def test_rows_that_depend_on_each_other_are_an_error(make):
    with pytest.raises(ModelError, match="do not depend on the other rows"):
        make(network(Centred)).fit(rows())


def test_batches_of_one_row_are_compared_in_pairs():
    single = [(x[i : i + 1], y[i : i + 1]) for x, y in rows() for i in range(len(x))]
    with pytest.raises(ModelError, match="do not depend on the other rows"):
        laplace(network(Centred)).fit(single)


def test_gradients_that_depend_on_the_other_rows_are_an_error():
    with (
        pytest.raises(ModelError, match="gradient at a row does not depend on the other rows"),
        pytest.warns(DerivativeRouteWarning),
    ):
        laplace(network(CentredSlopes), inverse="cholesky").fit(rows())


class FrozenInside(Plain):
    def forward(self, x):
        with torch.no_grad():
            h = torch.tanh(self.a(x))
        return self.head(h)


@pytest.mark.filterwarnings("ignore::estimators.errors.DerivativeRouteWarning")
@pytest.mark.parametrize("solver", [NewtonRefit(), FineTune()])
def test_weights_that_move_the_outputs_without_a_gradient_cannot_be_displaced(solver):
    regularizer = Pointwise() if isinstance(solver, NewtonRefit) else PosteriorDraws()
    options = {"prior_precision": DELTA, "regularizer": regularizer, "solver": solver}
    with pytest.raises(ModelError, match=r"weights that can be displaced.*LinearResponse"):
        RegVar(network(FrozenInside), "classification", **options).fit(rows()).variance(QUERIES)


class Kinked(Plain):
    """A unit whose weights weight decay has made 0, so that every row is on the kink of its ReLU."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.a.weight[0], self.a.bias[0] = 0.0, 0.0

    def forward(self, x):
        return self.head(torch.relu(self.a(x)))


def test_weights_on_the_kink_of_a_unit_without_weights_can_be_displaced():
    solver = NewtonRefit(1e-4, difference="forward")
    RegVar(network(Kinked), "classification", regularizer=Pointwise(), solver=solver).fit(rows()).variance(QUERIES)


@pytest.mark.parametrize("distance", [3e-7, 3e-6])
def test_a_row_beside_the_kink_of_a_relu_does_not_stop_a_refit(distance):
    model = network(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    x = rows()[0][0]
    with torch.no_grad():  # the first row is that far from the kink of every unit
        model[0].bias -= model[0](x[:1])[0] - distance
    check_displaced_outputs(Network(model, list(dict(model.named_parameters()))), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 2e5])
def test_weights_of_very_different_sizes_are_displaced_in_their_own_size(size, dtype):
    """As of a regression on house prices: steps in the size of the last layer are large ones elsewhere."""
    model = network(Plain).to(dtype)
    with torch.no_grad():
        model.head.weight.mul_(size)
        model.head.bias.add_(1).mul_(size)
    names, x = list(dict(model.named_parameters())), rows()[0][0].to(dtype)
    check_displaced_outputs(Network(model, names), x, refits=True)


@pytest.mark.parametrize("std", [1.0, 1e4, 1e6])
def test_a_trainable_scale_of_the_inputs_is_displaced_in_its_own_size(std):
    class Scaled(Plain):
        def __init__(self):
            super().__init__()
            self.inverse = nn.Parameter(torch.full((4,), 1 / std))

        def forward(self, x):
            return super().forward(x * self.inverse)

    model = network(Scaled)
    check_displaced_outputs(Network(model, list(dict(model.named_parameters()))), std * rows()[0][0], refits=True)


class Sorted(Plain):
    """Two of seven rows have equal units, so that a small change of the weights exchanges them."""

    def forward(self, x):
        return self.head(torch.tanh(self.a(x)).sort(1).values)


def test_a_refit_at_ties_of_several_rows_is_an_error_and_other_weights_can_be_sampled():
    model, x = network(Sorted), rows()[0][0].clone()
    x[:2] = 0.0
    with torch.no_grad():
        model.a.bias[1] = model.a.bias[0]
    names = list(dict(model.named_parameters()))
    check_displaced_outputs(Network(model, names), x)
    with pytest.raises(ModelError, match=r"of the rows at a kink"):
        check_displaced_outputs(Network(model, names), x, refits=True)


class Detached(Plain):
    def forward(self, x):
        return super().forward(x).detach()


class InfiniteSlope(Plain):
    def forward(self, x):
        return super().forward(x) + torch.sqrt(self.a(x[:, :1].expand(-1, 4) * 0).square().sum(1, keepdim=True) * 0)


@pytest.mark.parametrize("make", [laplace, pointwise])
def test_outputs_without_a_gradient_are_an_error(make):
    with pytest.raises(ModelError, match="gradient of exactly 0 at every row"):
        make(network(Detached)).fit(rows()).variance(QUERIES)


@pytest.mark.parametrize("make", [laplace, pointwise])
def test_a_gradient_that_is_not_finite_names_the_parameter(make):
    with pytest.raises(ModelError, match=r"NaN or Inf in the gradient of a\.weight"):
        make(network(InfiniteSlope)).fit(rows()).variance(QUERIES)


def test_a_right_network_has_no_disagreement_and_every_row_compared():
    estimator = laplace(network(), inverse="cholesky").fit(rows())
    report = estimator.fit_report_.derivatives
    assert report.disagreements == []
    assert report.rows == {"outputs": N, "rows of J": N}
    assert max(report.largest_error.values()) < 1e-12


def test_all_kinds_of_products_share_one_gradient_of_each_batch(monkeypatch):
    differentiated = []
    vjp = UserModule.vjp
    monkeypatch.setattr(
        UserModule, "vjp", lambda own, x, u, *names: differentiated.append(len(x)) or vjp(own, x, u, *names)
    )
    fitted = RegVar(network(), "classification", solver=LinearResponse(), regularizer=PosteriorDraws(4)).fit(rows())
    compared = fitted.fit_report_.derivatives.rows
    assert all(compared[kind] >= N for kind in ("J v", "Jᵀ u", "last layer"))
    new_kinds = sum(compared[kind] - N for kind in ("J v", "Jᵀ u", "last layer"))
    assert sum(differentiated) <= N + new_kinds + BATCH


def test_a_query_of_another_kind_is_compared_too(monkeypatch):
    estimator = laplace(network(), inverse="cholesky").fit(rows())
    estimator.variance(QUERIES)
    plain = Network._vectorised_rows
    monkeypatch.setattr(Network, "_vectorised_rows", lambda self, x: (1.01 if len(x) == 3 else 1.0) * plain(self, x))
    with pytest.warns(DerivativeRouteWarning):
        found = estimator.variance(QUERIES[:3])
    torch.testing.assert_close(found, exact(network())[:3])


def test_remembered_kinds_of_queries_are_bounded_and_compared_again():
    kinds = InputKinds()
    assert kinds.add("J v", torch.zeros(1, 4))
    assert not kinds.add("J v", torch.ones(1, 4))
    assert all(kinds.add("J v", torch.zeros(n, 1)) for n in range(MOST_KINDS))
    assert kinds.add("J v", torch.zeros(1, 4))
    assert len(kinds._kinds["J v"]) == MOST_KINDS
    assert kinds.add("rows of J", torch.zeros(MOST_KINDS - 1, 1))


def test_passes_through_the_weights_as_stored_are_counted():
    def self_check_rows(model):
        net, x = (
            Network(model, [name for name, _ in model.named_parameters()]),
            QUERIES.to(next(model.parameters()).dtype),
        )
        net.jacobian(x)
        return net.pass_counter.phases["self-check"]

    plain, half = self_check_rows(network().float()), self_check_rows(network().bfloat16())
    assert half.forward == 2 * plain.forward > 0
    assert half.backward == 2 * plain.backward > 0


class Counting(Plain):
    """Counts its calls, keeps an activation and hands it to a dict that a hook closes over."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.last, self.seen = None, {}
        self.a.register_forward_hook(lambda _, __, output: self.seen.__setitem__("hidden", output))

    def forward(self, x):
        self.calls += 1
        self.last = torch.tanh(self.a(x))
        return self.head(torch.tanh(self.seen["hidden"]))


@pytest.mark.filterwarnings("ignore::estimators.errors.DerivativeRouteWarning")
@pytest.mark.parametrize("make", [laplace, pointwise])
def test_what_a_forward_leaves_behind_is_as_before(make):
    model = network(Counting)
    model(QUERIES)
    before, hidden = copy.copy(vars(model)), model.seen["hidden"]
    found = make(model).fit(rows()).variance(QUERIES)
    assert float(model.calls) == 1.0
    assert model.last is before["last"]
    assert model.seen["hidden"] is hidden
    torch.testing.assert_close(found, exact(model))


def test_a_forward_that_writes_into_its_inputs_leaves_those_of_the_caller_alone():
    class Writes(Plain):
        def forward(self, x):
            x.sub_(0.5)
            return super().forward(x)

    model, loader, queries = network(Writes), rows(), QUERIES.clone()
    kept = [x.clone() for x, _ in loader]
    found = laplace(model).fit(loader).variance(queries)
    assert all(torch.equal(a, b) for a, (b, _) in zip(kept, loader, strict=True))
    assert torch.equal(queries, QUERIES)
    shifted = [(x - 0.5, y) for x, y in rows()]
    expected = laplace(network()).fit(shifted).variance(QUERIES - 0.5)
    torch.testing.assert_close(found, expected)


def test_a_gradient_of_rows_that_cancel_is_no_disagreement():
    """With outputs of 0 and one label of each class, the gradient of the bias is a sum that is 0 up to round-off."""
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1.2, -0.3, 0.4]))
    probs = model.bias.softmax(0).detach()
    counted = Network(model, ["bias"])
    x = torch.randn(9, 4)
    u = probs - torch.eye(3)[torch.multinomial(probs, 9, replacement=True, generator=torch.Generator().manual_seed(0))]
    u = u - u.mean(0)
    exact = u.sum(0)
    assert 0 < float(exact.abs().max()) < 1e-6
    assert counted.gradient_error(x, u, exact + 1e-7).within(counted.check.tolerance())
    assert not counted.gradient_error(x, u, exact + 1e-1).within(counted.check.tolerance())
    assert not counted.gradient_error(x, u.abs(), 1.01 * u.abs().sum(0)).within(counted.check.tolerance())


class Larger(nn.Module):
    """The larger of two features, as a maximum pooling takes it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(torch.maximum(self.a(x), self.b(x))))


class Jumping(Larger):
    """Which feature is larger decides on the sign of the output: no kink, but a jump."""

    def forward(self, x):
        larger = torch.where(self.a(x) > self.b(x), 1.0, -1.0).to(x.dtype)
        return self.head(torch.tanh(torch.maximum(self.a(x), self.b(x)))) * larger[:, :1]


def at_a_tie(kind, dtype):
    """A network, and 40 inputs of which row 2 has equal features of unit 0."""
    model = network(kind).to(dtype)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        d = (model.a.weight - model.b.weight)[0].double()
        x[2] -= (d @ x[2] + (model.a.bias - model.b.bias)[0].double()) / (d @ d) * d
        assert abs(float((model.a(x.to(dtype)) - model.b(x.to(dtype)))[2, 0])) < 10 * torch.finfo(dtype).eps
    found = Network(model, ["a.weight", "a.bias", "b.weight", "b.bias", "head.weight", "head.bias"])
    return found, x.to(dtype)


def on_the_other_side(found, jacobian):
    """J with the entries of unit 0 of both features exchanged at row 2."""
    other, slices = jacobian.clone(), found.subset.slices
    for name, n in (("weight", 4), ("bias", 1)):
        a, b = (slice(slices[f"{part}.{name}"].start, slices[f"{part}.{name}"].start + n) for part in "ab")
        other[2, :, a], other[2, :, b] = jacobian[2, :, b], jacobian[2, :, a]
    return other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_derivative_on_the_other_side_of_a_tie_is_no_disagreement(dtype, monkeypatch):
    """The pooling of images has such ties: which number is the largest depends on the last digit of a convolution."""
    found, x = at_a_tie(Larger, dtype)
    plain = found._plain_rows(x)
    other = on_the_other_side(found, plain)
    assert float((other - plain).sum((0, 1)).norm() / plain.sum((0, 1)).norm()) > 5 * found.check.tolerance()
    monkeypatch.setattr(Network, "_vectorised_rows", lambda self, x: other)  # noqa: ARG005
    assert torch.equal(found.jacobian(x), other)
    assert not found.check.report.disagreements


FAULTS = [
    "another row",
    "every row",
    "at the tie and elsewhere",
    "a jump",
    "large at the tie",
    "nan at the tie",
    "alone",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_derivative_is_seen_beside_a_tie(fault, monkeypatch):
    found, x = at_a_tie(Jumping if fault == "a jump" else Larger, torch.float64)
    if fault == "alone":  # nothing else has been compared
        x = x[2:3].expand(3, -1)
    plain = found._plain_rows(x)
    wrong = plain.clone() if fault in ("another row", "every row") else on_the_other_side(found, plain)
    if fault == "every row":
        wrong *= 0.8
    elif "elsewhere" in fault or "another" in fault:
        wrong[7] *= 1.1
    elif "at the tie" in fault:
        wrong[2] *= 1000 if "large" in fault else float("nan")
    monkeypatch.setattr(Network, "_vectorised_rows", lambda self, x: wrong)  # noqa: ARG005
    # By round-off a row alone may lie on the other side of a jump than among all rows, which no route can mend.
    used, may_fail = None, suppress(ModelError) if fault == "a jump" else nullcontext()
    with pytest.warns(DerivativeRouteWarning, match="rows of J"), may_fail:
        used = found.jacobian(x)
    assert used is None or torch.equal(used, plain)


def test_forward_mode_that_is_wrong_at_every_row_is_seen_where_each_row_has_a_kink(monkeypatch):
    """Distances from centres that are rows of the data, as prototypes are initialised."""

    class Distances(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres, self.head = nn.Parameter(QUERIES.clone()), nn.Linear(4, 2).double()

        def forward(self, x):
            return self.head((x[:, None] - self.centres).square().sum(-1).clamp(min=1e-30).sqrt())

    found = Network(Distances().eval(), ["centres", "head.weight", "head.bias"])
    right = Network._forward_mode
    monkeypatch.setattr(Network, "_forward_mode", lambda self, x, vectors: 0.8 * right(self, x, vectors))
    vectors = torch.randn(2, found.n_parameters, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([QUERIES, torch.randn(9, 4, generator=torch.Generator().manual_seed(8)).double()])
    with pytest.warns(DerivativeRouteWarning, match="J v"):
        products = found.jvp(x, vectors)
    expected = torch.einsum("bcp,kp->kbc", found._plain_rows(x), vectors)
    torch.testing.assert_close(products, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
@pytest.mark.parametrize(("likelihood", "c"), [("binary", 1), ("classification", 3)])
def test_hessian_products_of_saturated_classes_are_no_disagreement(likelihood, c, size, dtype):
    """All classes certain and right: Λ = p − p² is round-off, or exactly 0, and differs between routes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, c)).to(dtype)
    with torch.no_grad():
        model[2].weight.mul_(size / model[2].weight.abs().max())
    x = torch.randn(23, 4, dtype=dtype)
    f = model(x).detach()
    y = (f > 0).to(dtype) if c == 1 else f.argmax(1)
    loader = [(x[:9], y[:9]), (x[9:18], y[9:18]), (x[18:], y[18:])]
    kept = {"prior_precision": 3.0, "curvature": "hessian", "inverse": "cg"}
    laplace = LinearizedLaplace(model, likelihood, subset_of_weights="last_layer", **kept).fit(loader)
    dense = LinearizedLaplace(
        copy.deepcopy(model).double(), likelihood, subset_of_weights="last_layer", **{**kept, "inverse": "cholesky"}
    ).fit([(a.double(), b if c > 1 else b.double()) for a, b in loader])
    rtol = 1e-8 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(laplace.variance(x).double(), dense.variance(x.double()), rtol=rtol, atol=0)


def test_hessian_products_with_vectors_that_change_no_output_are_no_disagreement():
    """The last vectors of a Krylov space are orthogonal to all rows of J up to round-off."""
    checked = network(lambda: nn.Linear(4, 3))
    x = torch.randn(9, 4, dtype=torch.float64)
    x[:, 2:] = x[:, :2] @ torch.randn(2, 2, dtype=torch.float64)  # of 4 features 2 are independent
    null = torch.linalg.svd(x)[2][2]  # x null = 0 up to round-off
    v = torch.cat([torch.outer(torch.tensor([0.3, -1.0, 2.0]).double(), null).flatten(), torch.zeros(3).double()])
    y = torch.arange(9) % 3
    found = Network(checked, ["weight", "bias"]).hessian_product(
        x, lambda f: nn.functional.cross_entropy(f, y, reduction="sum"), v[None]
    )
    assert 0 < float(found.norm()) < 1e-14


@pytest.mark.parametrize(("factor", "seen"), [(1.0, True), (1e-5, True), (1e-10, True), (1e-14, False)])
def test_a_wrong_hessian_product_is_seen_unless_it_is_round_off(factor, seen):
    """Also of confident classes, Λ = 1e-10: it is known to four digits."""
    check = Network(nn.Linear(4, 3).double(), ["bias"]).check
    expected, usual = factor * torch.tensor([1.0, -2.0, 1.0]).double(), torch.ones(3).double()

    def accepted(product, route=usual, plain=usual):
        return check.curvature_error(product, expected, lambda: (route, plain)).within(check.tolerance())

    assert accepted(expected * 1.5) != seen
    assert not accepted(expected * 1.5, route=1.5 * usual)
    assert not accepted(expected + 1)
    assert not accepted(expected + 1, plain=usual * torch.inf)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("logit", [1.0, 12.0, 16.0, 40.0])
def test_a_wrong_forward_mode_is_seen_at_confident_classes(logit, dtype):
    class Confident(Plain):
        def forward(self, x):
            f = super().forward(x)[:, :1]
            return Reverse.apply(logit * f / f.detach().abs())

    model, x = network(Confident).to(dtype), rows()[0][0].to(dtype)
    y = (model(x) > 0).to(dtype)
    f = model(x).detach()
    wrong = Network(model, ["head.weight"])
    with pytest.warns(DerivativeRouteWarning, match="forward over reverse mode differs from plain autograd"):
        found = wrong.hessian_product(
            x,
            lambda f: nn.functional.binary_cross_entropy_with_logits(f, y, reduction="sum"),
            torch.eye(15)[:2].to(dtype),
        )
    assert float(f.abs().max()) == pytest.approx(logit)
    assert "plain autograd, twice" in wrong.check.report.routes.values()
    assert found.shape == (2, 15)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_factor_of_zeros_is_displaced_beside_large_outputs(offset):
    """LoRA before training: B = 0, and only B has a gradient."""

    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.a = nn.Linear(4, 3), nn.Parameter(torch.randn(2, 4))
            self.b, self.none = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.empty(0))

        def forward(self, x):
            return self.w(x) + x @ self.a.T @ self.b.T + offset + self.none.sum()

    for seed in range(6):
        torch.manual_seed(seed)
        check_displaced_outputs(Network(LowRank(), ["a", "b", "none"]), torch.randn(7, 4), refits=True)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1.0), (torch.float64, 10.0), (torch.float64, 1.0)])
def test_a_bias_of_zeros_that_cannot_be_displaced_is_an_error(dtype, size):
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            bias = self.b.bias + (self.b.bias.round() - self.b.bias).detach()  # straight-through
            return nn.functional.linear(torch.tanh(self.a(x)), self.b.weight, bias)

    for seed in range(4):
        torch.manual_seed(seed)
        model = Rounded().to(dtype)
        with torch.no_grad():
            model.b.weight.mul_(size)
            model.a.bias.zero_()
            model.b.bias.zero_()
        with pytest.raises(ModelError, match="weights that can be displaced"):
            check_displaced_outputs(Network(model, list(dict(model.named_parameters()))), torch.randn(7, 4).to(dtype))


class InPairs(Larger):
    """A module that takes no single row."""

    def forward(self, x):
        assert len(x) > 1, "two rows or more"
        return super().forward(x)


@pytest.mark.parametrize(("kind", "explained"), [(Larger, True), (InPairs, False)])
def test_a_kink_at_a_row_that_the_module_does_not_take_alone_explains_nothing(kind, explained):
    found, x = at_a_tie(kind, torch.float64)
    round_off = RoundOff(found.check.tolerance(), units=4, jump=0.1 * found.check.tolerance())
    assert kink_explains(1e-3, found.check.reference, x[2:3], found.check.random, round_off) == explained
