"""The Krylov space of posterior draws bounds the variance from both sides; the draws say where between."""

import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from estimators import FineTune, Gaussian, LastLayerLaplace, LinearizedLaplace, LinearResponse, PosteriorDraws, RegVar
from estimators.curvature.krylov.block_cg import block_cg
from estimators.curvature.krylov.krylov_space import KrylovSpace
from estimators.curvature.krylov.stored_rows import StoredRows
from estimators.curvature.krylov.whitening import PriorWhitening
from estimators.errors import NotConvergedWarning, OptionError, UnsupportedError
from estimators.regvar import a_norm_error, monte_carlo
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.monte_carlo import ClippedMonteCarlo, InterpolatedBounds, MonteCarloVariance
from estimators.regvar.regularizers import posterior_draws
from estimators.regvar.solvers import linear_response

OPTIONS = ("prior_precision", "regularizer", "solver")
DELTAS = {"one": 1.7, "by name": {"0.*": 0.6, "*bias": 4.0, "*": 2.5}}


def problem(kind="classification", width=12):
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double().eval()
    x = 2 * randn(53, 6)
    y = randn(53, 3) if kind == "regression" else torch.randint(0, 3, (53,), generator=generator)
    loader = [(x[start : start + 20], y[start : start + 20]) for start in (0, 20, 40)]
    return model, Gaussian(0.6) if kind == "regression" else kind, loader, 1.5 * randn(7, 6)


def fitted(
    delta, *, n_draws=2, solver=None, dtype=torch.float64, kind="classification", variance_estimate="bounds", **options
):
    model, likelihood, loader, x = problem(kind)
    model, loader = model.to(dtype), [(a.to(dtype), b.to(dtype) if b.is_floating_point() else b) for a, b in loader]
    regvar = RegVar(
        model,
        likelihood,
        prior_precision=delta,
        regularizer=PosteriorDraws(n_draws, variance_estimate=variance_estimate, **options),
        solver=solver or LinearResponse(),
    )
    return regvar.fit(loader), x.to(dtype)


def exact(delta, kind="classification"):
    model, likelihood, loader, _ = problem(kind)
    return LinearizedLaplace(model, likelihood, prior_precision=delta, inverse="cholesky").fit(loader)


def smallest(matrix):
    return float(torch.linalg.eigvalsh(matrix).min())


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)
@pytest.mark.parametrize("block", ["auto", None])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_both_bounds_hold_as_matrices_and_close_as_the_space_grows(kind, delta, block, iterations):
    solver = LinearResponse(max_iter=iterations)
    estimator, x = fitted(delta, kind=kind, solver=solver, rao_blackwell=block)
    truth = exact(delta, kind).covariance(x)
    lower, upper = estimator.variance_estimate_.bounds.covariance(x)
    assert smallest(truth - lower) > -1e-10
    assert smallest(upper - truth) > -1e-10
    assert float((upper - lower).diagonal(dim1=1, dim2=2).sum()) > 1e-3
    if iterations > 1:
        less, _ = fitted(delta, kind=kind, solver=LinearResponse(max_iter=1), rao_blackwell=block)
        low, high = less.variance_estimate_.bounds.covariance(x)
        assert smallest(lower - low) > -1e-10
        assert smallest(high - upper) > -1e-10


def test_the_estimator_gives_its_bounds_and_says_when_it_has_none():
    estimator, x = fitted(1.7)
    lower, upper = estimator.variance_bounds(x)
    variance = exact(1.7).variance(x)
    assert bool((lower < variance).all())
    assert bool((variance < upper).all())
    plain, x = fitted(1.7, variance_estimate="monte_carlo")
    with pytest.raises(UnsupportedError, match='variance_estimate="bounds"'):
        plain.variance_bounds(x)


@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)
def test_the_bounds_are_galerkin_with_the_last_layer_and_nystroem(delta):
    estimator, x = fitted(delta, solver=LinearResponse(max_iter=3))
    bounds, objective = estimator.variance_estimate_.bounds, estimator.refit_objective_
    p, prior = objective.theta.numel(), objective.prior.precision
    precision = objective.product(torch.eye(p, dtype=torch.float64))
    basis = (bounds.space.scale * bounds.space.basis)[: bounds.space.rank]
    both = torch.cat([basis, torch.eye(p, dtype=torch.float64)[bounds.block.mask]])
    galerkin = both.T @ torch.linalg.solve(both @ precision @ both.T, both)
    data = precision - prior.diag()
    seen = data @ basis.T @ torch.linalg.solve(basis @ data @ basis.T, basis @ data)
    jacobian = estimator.network_.jacobian(x)
    lower, upper = bounds.covariance(x)
    assert torch.allclose(lower, jacobian @ galerkin @ jacobian.transpose(1, 2), rtol=1e-8, atol=1e-12)
    assert torch.allclose(
        upper, jacobian @ torch.linalg.inv(seen + prior.diag()) @ jacobian.transpose(1, 2), rtol=1e-8, atol=1e-12
    )


@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_space_that_is_exhausted_gives_the_exact_variance(delta, dtype):
    estimator, x = fitted(delta, n_draws=40, dtype=dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    assert torch.allclose(estimator.variance(x).double(), exact(delta).variance(x.double()), rtol=tolerance)
    assert torch.allclose(estimator.covariance(x).double(), exact(delta).covariance(x.double()), rtol=tolerance,
                          atol=tolerance)  # fmt: skip


def test_the_variance_lies_between_the_bounds_above_the_last_layer_and_is_the_diagonal_of_the_covariance():
    estimator, x = fitted(1.7, n_draws=4, solver=LinearResponse(max_iter=2))
    model, likelihood, loader, _ = problem()
    variance, (lower, upper) = estimator.variance(x), estimator.variance_estimate_.bounds.variance(x)
    assert bool(((lower < variance) & (variance < upper)).all())
    assert bool((variance > LastLayerLaplace(model, likelihood, prior_precision=1.7).fit(loader).variance(x)).all())
    assert torch.allclose(variance, estimator.covariance(x).diagonal(dim1=1, dim2=2))
    assert torch.allclose(variance, torch.cat([estimator.variance(part) for part in x.split(2)]), rtol=1e-12)


def test_the_shape_is_sharper_than_the_draws_and_the_level_is_theirs():
    truth = exact(1.7)
    errors = {}
    for variance_estimate in ("bounds", "monte_carlo"):
        found = []
        for seed in range(30):
            estimator, x = fitted(1.7, n_draws=4, seed=seed, variance_estimate=variance_estimate)
            found.append(estimator.variance(x) / truth.variance(x) - 1)
        errors[variance_estimate] = torch.stack(found)
    rms = {variance_estimate: float(e.square().mean().sqrt()) for variance_estimate, e in errors.items()}
    assert rms["bounds"] < 0.3 * rms["monte_carlo"]
    a_seed = errors["bounds"].mean((1, 2))
    assert float(a_seed.mean()) == pytest.approx(0, abs=4 * float(a_seed.std()) / math.sqrt(30))


def test_without_a_tolerance_draws_stop_at_nine_products_each_and_with_one_they_reach_it():
    short, _ = fitted(1.7, n_draws=3)
    assert short.fit_report_.solver.iterations == 6
    # one for the start; with ξ and the block, nine; the two forwards of a product are shared by the three draws
    assert short.fit_report_.solver.passes == pytest.approx(7 * (1 + 2 / 3 / 3))
    thorough, _ = fitted(1.7, n_draws=3, solver=LinearResponse(tol=1e-11))
    assert thorough.fit_report_.solver.iterations > 6
    assert thorough.fit_report_.solver.residual <= 1e-11


@pytest.mark.parametrize("width", [12, 120])
def test_auto_interpolates_for_large_networks_unless_rao_blackwell_is_none(width):
    model, likelihood, loader, _ = problem(width=width)
    kinds = []
    for block in ("auto", None):
        parts = {"regularizer": PosteriorDraws(3, rao_blackwell=block), "solver": LinearResponse()}
        estimator = RegVar(model, likelihood, prior_precision=1.7, **parts).fit(loader)
        kinds.append(hasattr(estimator.variance_estimate_, "bounds"))
        if not kinds[-1]:
            assert estimator.fit_report_.solver.residual <= 1e-10
    assert kinds == [width == 120, False]


@pytest.mark.parametrize("delta", [*DELTAS.values(), {"*bias": 0.0, "*": 1.7}], ids=[*DELTAS, "some without"])
def test_the_a_norm_error_of_block_cg_costs_no_product(delta):
    options = {"solver": LinearResponse(max_iter=3)}
    if delta not in DELTAS.values():  # no bounds without a prior
        options = {"solver": LinearResponse(tol=0.5), "variance_estimate": "monte_carlo", "kind": "regression"}
    estimator, _ = fitted(delta, n_draws=3, **options)
    objective = estimator.refit_objective_
    perturbation, _ = estimator.regularizer.build_problem(objective)
    solution = estimator.solver.solve(objective, perturbation)
    precision, u = objective.prior.precision, solution.displacement
    measured = SampleANormErrors.of(perturbation, precision, u, objective.product(u) - perturbation.gradient)
    assert torch.allclose(solution.a_norm_errors.terms, measured.terms, rtol=1e-9, atol=1e-10)


def test_the_standard_error_is_that_of_the_level():
    weights, errors = [], []
    for seed in range(20):
        estimator, x = fitted(1.7, n_draws=8, seed=seed, solver=LinearResponse(max_iter=3))
        weights.append(estimator.variance_estimate_.interpolation.weight)
        errors.append(estimator.variance_estimate_.interpolation.standard_error)
    lower, upper = estimator.variance_estimate_.bounds.variance(x)
    assert torch.allclose(estimator.standard_error(x), errors[-1] * (upper - lower))
    spread = torch.tensor(weights).std()
    assert 0.4 < float(spread) / (sum(errors) / len(errors)) < 1.6


def test_the_order_of_the_variances_is_the_exact_one_long_before_the_draws_have_it():
    truth = exact(1.7)
    estimator, x = fitted(1.7, n_draws=4, solver=LinearResponse(max_iter=5))
    draws, _ = fitted(1.7, n_draws=4, solver=LinearResponse(), variance_estimate="monte_carlo")
    correlation = [
        spearmanr(found.variance(x).flatten(), truth.variance(x).flatten()).statistic for found in (estimator, draws)
    ]
    assert correlation[0] > 0.97 > correlation[1]


@pytest.mark.parametrize(
    ("delta", "solver"), [(1.7, FineTune()), ({"*bias": 0.0, "*": 1.7}, LinearResponse())], ids=["solver", "prior"]
)
def test_bounds_that_nobody_can_give_are_rejected_with_the_remedy(delta, solver):
    with pytest.raises(OptionError, match=r'LinearResponse\(\), or variance_estimate="monte_carlo"'):
        fitted(delta, solver=solver, kind="regression")


def test_round_off_of_a_low_rank_matrix_is_left_to_the_prior():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 60, generator=generator, dtype=torch.float64)
    matrix = rows.T @ rows + torch.eye(60, dtype=torch.float64)
    right = torch.randn(4, 60, generator=generator, dtype=torch.float64)
    solved = block_cg(lambda v: v @ matrix, right, tol=1e-12)
    delta = torch.ones(60, dtype=torch.float64)
    space = KrylovSpace.of(solved, PriorWhitening.of(delta), delta)
    taken = space.basis.T @ space.reduction.T @ space.reduction @ space.basis
    wanted = torch.eye(60, dtype=torch.float64) - torch.linalg.inv(matrix)
    assert math.isclose(float((taken - wanted).abs().max()), 0, abs_tol=1e-10)


@pytest.mark.parametrize("block", ["auto", None])
def test_the_weight_of_many_outputs_comes_from_random_combinations_and_costs_no_more(block, monkeypatch):
    solver = LinearResponse(max_iter=1)
    options = {"n_draws": 16, "solver": solver, "rao_blackwell": block}
    every, _ = fitted(1.7, **options)
    monkeypatch.setattr(monte_carlo, "_MAX_OUTPUTS", 2)  # of three
    some, _ = fitted(1.7, **options)
    interpolation, expected = some.variance_estimate_.interpolation, every.variance_estimate_.interpolation
    assert interpolation.weight != expected.weight
    assert 0.02 < expected.weight < 0.98
    assert abs(interpolation.weight - expected.weight) < 0.15
    assert some.fit_report_.passes["variance estimate"] < 1.2 * every.fit_report_.passes["variance estimate"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_a_space_kept_in_half_the_memory_changes_little(dtype, tolerance, tmp_path):
    whole, x = fitted(1.7, n_draws=4, dtype=torch.float32)
    solver = LinearResponse(basis_dtype=dtype)
    half, _ = fitted(1.7, n_draws=4, dtype=torch.float32, solver=solver)
    change = (half.variance(x) / whole.variance(x) - 1).abs().max()
    assert 0 < float(change) < tolerance
    stored = half.variance_estimate_.bounds.space.stored
    assert stored.values.dtype == dtype
    assert stored.values.nbytes == whole.variance_estimate_.bounds.space.basis.nbytes / 2
    half.save(tmp_path / "fit.safetensors")
    model, likelihood, _, _ = problem()
    regularizer = PosteriorDraws(4, variance_estimate="bounds")
    again = RegVar(model.float(), likelihood, prior_precision=1.7, regularizer=regularizer, solver=solver)
    assert torch.equal(again.load(tmp_path / "fit.safetensors").variance(x), half.variance(x))


def test_rows_of_tiny_numbers_do_not_vanish_in_float16():
    rows = torch.tensor([[1e-9, -3e-9, 2e-12], [0.0, 0.0, 0.0], [7.0, 1e-3, 5e4]], dtype=torch.float64)
    kept = StoredRows.of(rows, torch.float16).rows
    assert kept.dtype == torch.float64
    assert torch.allclose(kept, rows, rtol=1e-3, atol=1e-7 * 5e4)
    assert torch.allclose(kept[0], rows[0], rtol=1e-3, atol=1e-7 * 3e-9)
    assert StoredRows.of(rows, None).rows is rows


def test_another_dtype_for_the_basis_is_rejected():
    with pytest.raises(OptionError, match="basis_dtype"):
        LinearResponse(basis_dtype=torch.int8)


def test_the_a_norm_error_has_a_certain_bound():
    """Where chance has made the estimate larger than that."""
    estimator, _ = fitted(1.7, solver=LinearResponse(max_iter=2), n_draws=3)
    objective = estimator.refit_objective_
    perturbation, _ = estimator.regularizer.build_problem(objective)
    u = estimator.variance_estimate_.displacement
    remainder = perturbation.gradient - objective.product(u)
    error = estimator.fit_report_.a_norm_error
    truth = torch.linalg.solve(objective.product(torch.eye(u.shape[1]).double()), remainder.T).T
    dimension = error.per_parameter * float((perturbation.gradient != 0).any(0).sum()) / error.per_dimension
    true = float((remainder * truth).sum(1).mean()) / dimension  # rᵀA⁻¹r
    assert true < error.bound < 20 * true


@pytest.mark.parametrize(
    ("delta", "unit", "same"), [((2, 2, 2), 2, True), ((2, 0.5, 4), 1, False), ((2, 0, 4), 0, True)], ids=str
)
def test_a_single_prior_precision_needs_no_other_coordinates(delta, unit, same):
    delta, v, seen = torch.tensor(delta, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64), []
    coordinates = PriorWhitening.of(delta)
    assert coordinates.unit == unit
    image = coordinates.product(lambda v: seen.append(v) or delta * v)(v)
    assert [found is v for found in (coordinates.whiten_rhs(v), coordinates.whiten(v), seen[0])] == [same] * 3
    if unit:
        assert torch.allclose(image, unit * v)


SIGMA = 0.2


def steep(n_draws=4, **options):
    """Draws for data so many and so sure that six products leave them far from their end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        hidden = (nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh())
        model = nn.Sequential(*hidden, nn.Linear(40, 3)).double().eval()
        x = 2 * torch.randn(90, 6, dtype=torch.float64)
    loader = [(part, torch.zeros(len(part), 3).double()) for part in x.split(40)]
    options = {"regularizer": PosteriorDraws(n_draws), "solver": LinearResponse(), **options}
    return RegVar(model, Gaussian(SIGMA), prior_precision=1.3, **options).fit(loader), x[:9] + 0.3


def test_draws_that_have_not_converged_continue_up_to_four_times_as_long(monkeypatch):
    monkeypatch.setattr(linear_response, "_MAX_EXTENSION", 1)
    monkeypatch.setattr(a_norm_error, "CONVERGED", math.inf)  # of the warning
    usual, _ = steep()
    iterations, far = usual.fit_report_.solver.iterations, usual.a_norm_error_
    assert far > linear_response.CONVERGED
    monkeypatch.setattr(linear_response, "_MAX_EXTENSION", 4)
    longer, _ = steep()
    assert longer.fit_report_.solver.iterations <= 4 * iterations
    assert longer.fit_report_.solver.iterations > iterations
    assert (
        longer.a_norm_error_ < linear_response._TARGET_ERROR or longer.fit_report_.solver.iterations == 4 * iterations
    )
    assert longer.a_norm_error_ < far / 2
    # as long as its space can be kept
    rows = 4 * longer.network_.n_parameters * 8
    monkeypatch.setattr(linear_response, "_MAX_SPACE_BYTES", (iterations + 2) * rows)
    assert steep()[0].fit_report_.solver.iterations == iterations + 2
    # and as the user says
    solver = LinearResponse(max_iter=iterations + 1)
    assert steep(solver=solver)[0].fit_report_.solver.iterations == iterations + 1
    monkeypatch.setattr(linear_response, "CONVERGED", 2 * far)
    assert steep()[0].fit_report_.solver.iterations == iterations


def test_if_the_bounds_are_loose_the_monte_carlo_estimate_is_clipped_to_them(monkeypatch):
    monkeypatch.setattr(monte_carlo, "_LOOSE_RATIO", 1.5)
    monkeypatch.setattr(posterior_draws, "_SMALL_NETWORK", 10)
    with pytest.warns(NotConvergedWarning, match="tol=1e-2 if that is the solver already"):
        estimator, x = fitted(1.7, n_draws=4, solver=LinearResponse(max_iter=2), variance_estimate="auto")
    between, _ = fitted(1.7, n_draws=4, solver=LinearResponse(max_iter=2), variance_estimate="bounds")
    parts = (
        getattr(between.variance_estimate_, name) for name in ("network", "displacement", "block", "rao_blackwell")
    )
    plain = MonteCarloVariance(*parts)
    assert type(estimator.variance_estimate_) is ClippedMonteCarlo
    assert type(between.variance_estimate_) is InterpolatedBounds
    lower, upper = between.variance_bounds(x)
    assert estimator.variance_estimate_.interpolation.bound_ratio > 1.5
    drawn, variance = plain.variance(x), estimator.variance(x)
    inside = (lower <= drawn) & (drawn <= upper)
    assert 0 < int(inside.sum()) < inside.numel()
    assert torch.allclose(variance, torch.where(drawn < lower, lower, torch.where(drawn > upper, upper, drawn)))
    covariance, drawn_covariance = estimator.covariance(x), plain.covariance(x)
    assert torch.allclose(covariance.diagonal(dim1=1, dim2=2), variance)
    root = (variance / drawn).sqrt()
    assert torch.allclose(covariance / (root[:, :, None] * root[:, None]), drawn_covariance)
    assert torch.allclose(estimator.standard_error(x), plain.standard_error(x))
    rows = torch.cat([x for x, _ in problem()[2]])
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:16]  # of all batches
    low, high = between.variance_bounds(rows[chosen])
    assert estimator.variance_estimate_.interpolation.bound_ratio == pytest.approx(float((high / low).median()))
    total = between.variance_estimate_.compose(lambda f: f.sum()[None])
    sums = plain.compose(lambda f: f.sum()[None]).variance(x).clamp(*total.bounds.variance(x))
    assert torch.allclose(estimator.variance_estimate_.compose(lambda f: f.sum()[None]).variance(x), sums)
    model, likelihood, loader, _ = problem()
    restored = RegVar(model, likelihood, **{name: getattr(estimator, name) for name in OPTIONS})
    restored.load_state_dict(estimator.state_dict())
    assert type(restored.attach_data(loader).variance_estimate_) is ClippedMonteCarlo
    assert torch.equal(restored.variance(x), variance)


@pytest.mark.parametrize("batch_size", [7, 64, 300])
def test_the_weight_between_the_bounds_is_estimated_at_rows_of_every_class(batch_size):
    """A loader that is sorted by class: the first tenth of its rows are of one class."""
    model = nn.Sequential(nn.Linear(2, 3)).double().eval()
    y = torch.arange(3).repeat_interleave(100)
    x = torch.stack([torch.arange(300.0), y.float()], 1).double()
    loader = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    objective = LinearizedLaplace(model, "classification").fit(loader).objective_
    chosen = torch.cat(monte_carlo._some_rows(objective))
    again = torch.cat(monte_carlo._some_rows(objective))
    assert torch.equal(chosen, again)
    assert chosen.shape == (30, 2)
    assert len(chosen[:, 0].unique()) == 30
    assert torch.equal(chosen, x[chosen[:, 0].long()])
    assert chosen[:, 1].long().bincount().min() >= 5
