"""Refits and linear response: the same displacement by three routes, and typed errors where a route fails."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from estimators import (
    FineTune,
    Gaussian,
    LinearizedLaplace,
    LinearResponse,
    MeanAbsolute,
    NewtonRefit,
    ParameterProbes,
    Pointwise,
    PosteriorDraws,
    RegVar,
    SignedProbes,
)
from estimators.errors import (
    ConvergenceError,
    IndefiniteHessianError,
    LambdaTooLargeError,
    NotFittedError,
    OptionError,
    UnsupportedError,
)
from estimators.regvar.solvers.newton_refit import conjugate_gradients
from estimators.training import Recipe, converge_map, train_map


def problem(kind="classification", dtype=torch.float64):
    generator = torch.Generator().manual_seed(11)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype).eval()
    x = torch.randn(23, 4, generator=generator, dtype=dtype)
    labels = torch.randint(0, 3, (23,), generator=generator)
    y = torch.randn(23, 3, generator=generator, dtype=dtype) if kind == "regression" else labels
    likelihood = Gaussian(0.7) if kind == "regression" else kind
    query = torch.randn(5, 4, generator=generator, dtype=dtype)
    return model, likelihood, DataLoader(TensorDataset(x, y), batch_size=6), query


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


REGULARIZERS = [Pointwise(), MeanAbsolute(), SignedProbes(4), ParameterProbes(4), PosteriorDraws(4)]


def runs_by_default(i, j, k, *, long):
    """Whether a regularizer i, a curvature j and a difference k are in the pairwise cover, with either kind of refit.

    Newton and long refits have the two curvatures, and the two differences, of a regularizer between them.
    """
    of_newton = (i % 2, i // 2 % 2)
    wanted = (1 - of_newton[0], 1 - of_newton[1]) if long else of_newton
    only_ggn = isinstance(REGULARIZERS[i], PosteriorDraws)
    return (j, k) == (0 if only_ggn else wanted[0], wanted[1])


def newton_refits():
    """With `long_refits`, every pair of regularizer, curvature and difference; the rest is nightly."""
    orders = [("forward", 1), ("central", 2)]
    for i, regularizer in enumerate(REGULARIZERS):
        for j, curvature in enumerate(["ggn", "hessian"]):
            if isinstance(regularizer, PosteriorDraws) and curvature == "hessian":
                continue  # raises, tested elsewhere
            for k, (difference, order) in enumerate(orders):
                marks = () if runs_by_default(i, j, k, long=False) else (pytest.mark.verification,)
                name = f"{difference}-{curvature}-{regularizer!r}"
                yield pytest.param(regularizer, curvature, difference, order, marks=marks, id=name)


@pytest.mark.parametrize(("regularizer", "curvature", "difference", "order"), list(newton_refits()))
def test_newton_refits_tend_to_the_linear_response(regularizer, curvature, difference, order):
    model, likelihood, loader, x = problem()
    x = x[:2]
    delta = 2.3 if curvature == "ggn" else 40.0
    parts = {"prior_precision": delta, "curvature": curvature, "regularizer": regularizer}
    limit = RegVar(model, likelihood, solver=LinearResponse(), **parts).fit(loader).variance(x)
    errors = []
    for lam in (2e-2, 1e-2):
        solver = NewtonRefit(lam, difference)
        errors.append(relative(RegVar(model, likelihood, solver=solver, **parts).fit(loader).variance(x), limit))
    assert errors[1] < 0.02
    if errors[0] > 1e-7:  # a quadratic refit has no order
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def long_refits():
    """With `newton_refits`, every pair of regularizer, curvature and difference; the rest is nightly."""
    for i, regularizer in enumerate(REGULARIZERS):
        for j, curvature in enumerate(["ggn", "hessian"]):
            if isinstance(regularizer, PosteriorDraws) and curvature == "hessian":
                continue  # raises, tested elsewhere
            for k, difference in enumerate(["forward", "central"]):
                marks = () if runs_by_default(i, j, k, long=True) else (pytest.mark.verification,)
                name = f"{difference}-{curvature}-{regularizer!r}"
                yield pytest.param(regularizer, curvature, difference, marks=marks, id=name)


@pytest.mark.parametrize(("regularizer", "curvature", "difference"), list(long_refits()))
def test_long_minibatch_refits_tend_to_the_linear_response(regularizer, curvature, difference):
    model, likelihood, loader, x = problem()
    delta = 2.3 if curvature == "ggn" else 40.0
    parts = {"prior_precision": delta, "curvature": curvature, "regularizer": regularizer}
    limit = RegVar(model, likelihood, solver=LinearResponse(), **parts).fit(loader).variance(x)
    recipe = Recipe(epochs=60, batch_size=8, optimizer="sgd", lr="auto", momentum=0.5)
    refit = RegVar(model, likelihood, solver=FineTune(1e-4, difference, recipe), **parts).fit(loader)
    assert relative(refit.variance(x), limit) < 0.01


def test_newton_refits_without_a_preconditioner_end_at_the_same_displacement():
    model, likelihood, loader, x = problem()
    x = x[:2]
    a, b = (
        RegVar(model, likelihood, regularizer=Pointwise(), solver=NewtonRefit(1e-2, preconditioner=p)).fit(loader)
        for p in ("auto", None)
    )
    assert relative(a.covariance(x), b.covariance(x)) < 1e-7


@pytest.mark.parametrize("regularizer", [Pointwise(), PosteriorDraws(5)], ids=repr)
def test_a_loop_over_copies_equals_one_vectorised_call(regularizer):
    model, likelihood, loader, x = problem()
    recipe = Recipe(epochs=3, batch_size=8, optimizer="sgd", lr="auto")
    variances = [
        RegVar(model, likelihood, regularizer=regularizer, solver=FineTune(1e-3, recipe=recipe, vmap_chunk_size=n))
        .fit(loader)
        .variance(x)
        for n in (1, 2, 100)
    ]
    assert relative(variances[0], variances[2]) < 1e-9
    assert relative(variances[1], variances[2]) < 1e-9


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_the_seed_of_fine_tune_orders_the_batches():
    model, likelihood, loader, x = problem()
    recipe = Recipe(epochs=2, batch_size=8, optimizer="sgd", lr="auto")
    first, again, other = (
        RegVar(model, likelihood, solver=FineTune(1e-3, recipe=recipe, seed=seed)).fit(loader).variance(x)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_fine_tune_is_near_exact_draws_in_both_precisions(dtype):
    model, likelihood, loader, x = problem(dtype=dtype)
    refits = RegVar(model, likelihood, solver=FineTune()).fit(loader)
    exact = RegVar(model, likelihood, solver=LinearResponse()).fit(loader)
    assert refits.variance(x).dtype == dtype
    assert relative(refits.variance(x), exact.variance(x)) < 0.1
    assert refits.fit_report_.solver.nonlinearity < 0.2


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_centred_refits_are_right_where_the_network_is_not_stationary(kind, difference):
    model, likelihood, loader, x = problem(kind)
    fitted = RegVar(
        model, likelihood, prior_precision=2.3, regularizer=Pointwise(), solver=NewtonRefit(1e-6, difference)
    ).fit(loader)
    assert fitted.relative_gradient_ > 1
    exact = LinearizedLaplace(model, likelihood, prior_precision=2.3).fit(loader).covariance(x)
    assert relative(fitted.covariance(x), exact) < 1e-5


def trained(loader, likelihood, model, delta):
    recipe = Recipe(epochs=300, batch_size=23, lr=0.02)
    model = train_map(model, likelihood, loader, prior_precision=delta, recipe=recipe)
    assert converge_map(model, likelihood, loader, prior_precision=delta).reached
    return model


def test_the_papers_own_refit_drifts_off_a_point_that_is_not_stationary():
    model, likelihood, loader, x = problem("regression")
    parts = {"prior_precision": 1.5, "curvature": "hessian", "regularizer": Pointwise()}
    model = trained(loader, likelihood, copy.deepcopy(model), 1.5)
    exact = LinearizedLaplace(model, likelihood, prior_precision=1.5, curvature="hessian").fit(loader).covariance(x)
    solver = NewtonRefit(1e-3, "central")
    near = RegVar(model, likelihood, centred=False, solver=solver, **parts).fit(loader)
    assert near.relative_gradient_ < 1e-3
    assert relative(near.covariance(x), exact) < 1e-3
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    exact = LinearizedLaplace(model, likelihood, prior_precision=1.5, curvature="hessian").fit(loader).covariance(x)
    off = RegVar(model, likelihood, centred=False, solver=solver, **parts).fit(loader)
    centred = RegVar(model, likelihood, solver=solver, **parts).fit(loader)
    assert relative(off.covariance(x), exact) > 0.05
    assert relative(centred.covariance(x), exact) < 0.01


def test_pointwise_of_a_functional_is_the_delta_method():
    model, likelihood, loader, x = problem()

    def margin(f):
        return f[0] - f[1:].logsumexp(0)

    laplace = LinearizedLaplace(model, likelihood).fit(loader).variance(x, of=margin)
    for solver, tolerance in ((LinearResponse(), 1e-9), (NewtonRefit(1e-5), 1e-6)):
        fitted = RegVar(model, likelihood, regularizer=Pointwise(of=margin), solver=solver).fit(loader)
        assert fitted.variance(x).shape == (5, 1)
        assert relative(fitted.variance(x), laplace) < tolerance
    plain = RegVar(model, likelihood, regularizer=Pointwise(), solver=LinearResponse()).fit(loader)
    assert relative(plain.variance(x, of=margin), laplace) < 1e-9


def test_pointwise_solves_in_pieces_that_fit_into_memory(monkeypatch):
    model, likelihood, loader, x = problem()
    fitted = RegVar(model, likelihood, regularizer=Pointwise(), solver=LinearResponse()).fit(loader)
    whole = fitted.covariance(x)
    monkeypatch.setattr(Pointwise, "rows_per_solve", lambda *_: 2)
    assert relative(fitted.covariance(x), whole) < 1e-9
    assert fitted.fit_report_.solver.n_perturbations == 3  # the last piece: one row of three outputs


def test_signed_probes_alone_speak_of_the_set_of_queries():
    model, likelihood, loader, x = problem()
    for regularizer in REGULARIZERS:
        fitted = RegVar(model, likelihood, regularizer=regularizer, solver=LinearResponse()).fit(loader)
        params = torch.cat([fitted.variance(part) for part in x.split(2)])
        assert (relative(params, fitted.variance(x)) > 1e-6) == fitted.batch_dependent


def test_what_a_regularizer_cannot_say_raises():
    model, likelihood, loader, x = problem()
    says = {
        "covariance": (Pointwise, PosteriorDraws),
        "standard_error": (SignedProbes, ParameterProbes, PosteriorDraws),
    }
    for regularizer in REGULARIZERS:
        fitted = RegVar(model, likelihood, regularizer=regularizer, solver=LinearResponse()).fit(loader)
        for method, able in says.items():
            if isinstance(regularizer, able):
                assert bool(torch.isfinite(getattr(fitted, method)(x)).all())
            else:
                with pytest.raises(UnsupportedError):
                    getattr(fitted, method)(x)
        if not isinstance(regularizer, PosteriorDraws):
            with pytest.raises(UnsupportedError):
                fitted.sample(x, 2)
            with pytest.raises(UnsupportedError):
                _ = fitted.a_norm_error_


def test_a_lambda_too_large_is_rejected_with_a_smaller_one():
    model, likelihood, loader, x = problem()
    refit = RegVar(model, likelihood, regularizer=Pointwise(), solver=NewtonRefit(100.0)).fit(loader)
    with pytest.raises((LambdaTooLargeError, ConvergenceError), match=r"lam=100.*smaller lam"):
        refit.variance(x[:1])
    with pytest.raises(LambdaTooLargeError, match=r"at lam=10\. Try"):
        RegVar(model, likelihood, solver=FineTune(lam=10.0)).fit(loader)


def test_a_refit_that_did_not_converge_raises():
    model, likelihood, loader, x = problem()
    refit = RegVar(model, likelihood, regularizer=Pointwise(), solver=NewtonRefit(0.5, max_iter=1)).fit(loader)
    with pytest.raises(ConvergenceError, match="1 Newton steps"):
        refit.variance(x)
    response = RegVar(model, likelihood, regularizer=MeanAbsolute(), solver=LinearResponse(max_iter=2))
    with pytest.raises(ConvergenceError, match="max_iter"):
        response.fit(loader)


def test_a_refit_that_diverges_raises():
    model, likelihood, loader, _ = problem()
    recipe = Recipe(epochs=200, batch_size=4, optimizer="sgd", lr=1e3)
    with pytest.raises(ConvergenceError, match="smaller lr"):
        RegVar(model, likelihood, solver=FineTune(1e-3, recipe=recipe)).fit(loader)


@pytest.mark.parametrize("regularizer", [Pointwise(), ParameterProbes(4)], ids=repr)
@pytest.mark.parametrize("solver", [LinearResponse(), NewtonRefit(), FineTune()], ids=repr)
def test_an_indefinite_hessian_is_rejected_in_fit(regularizer, solver):
    model, likelihood, loader, _ = problem("regression")
    refit = RegVar(model, likelihood, prior_precision=0.01, curvature="hessian", regularizer=regularizer, solver=solver)
    with pytest.raises(IndefiniteHessianError, match=r"smallest eigenvalue -.*ggn"):
        refit.fit(loader)


@pytest.mark.parametrize(
    "options",
    [
        {"centred": False},
        {"centred": False, "curvature": "hessian", "regularizer": Pointwise(), "solver": LinearResponse()},
        {"curvature": "fisher"},
        {"regularizer": PosteriorDraws},
        {"solver": "cg"},
    ],
    ids=str,
)
def test_parts_that_do_not_go_together_are_rejected_in_the_constructor(options):
    model, likelihood, _, _ = problem()
    with pytest.raises(OptionError, match="Try"):
        RegVar(model, likelihood, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NewtonRefit(0.0),
        lambda: NewtonRefit("auto"),
        lambda: NewtonRefit(difference="backward"),
        lambda: FineTune(-1.0),
        lambda: FineTune(difference="both"),
        lambda: FineTune(difference="control"),
        lambda: FineTune(vmap_chunk_size=0),
        lambda: FineTune(recipe=Recipe(optimizer="adam", lr="auto")),
        lambda: SignedProbes(0),
        lambda: ParameterProbes(-3),
    ],
)
def test_bad_options_of_solvers_and_regularizers_are_rejected(make):
    with pytest.raises(OptionError, match="Received"):
        make()


@pytest.mark.parametrize("name", ["fit_report_", "a_norm_error_", "rao_blackwell_", "relative_gradient_"])
def test_fitted_attributes_before_fit_say_so(name):
    model, likelihood, _, _ = problem()
    with pytest.raises((NotFittedError, AttributeError)):
        getattr(RegVar(model, likelihood), name)


def test_inner_conjugate_gradients_solve_each_system_with_its_own_matrix():
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
    matrices = roots @ roots.mT + torch.eye(8, dtype=torch.float64)
    rhs = torch.randn(3, 8, generator=generator, dtype=torch.float64)

    def product(v):
        return torch.einsum("apq,aq->ap", matrices, v)

    solved = conjugate_gradients(product, rhs, precondition=None, tol=1e-12, max_iter=50)
    assert torch.allclose(solved.solution, torch.linalg.solve(matrices, rhs), atol=1e-9)
    matrices[1] -= 30 * torch.eye(8, dtype=torch.float64)
    indefinite = conjugate_gradients(product, rhs, precondition=None, tol=1e-12, max_iter=50)
    assert indefinite.negative_curvature.tolist() == [False, True, False]
    assert bool(torch.isfinite(indefinite.solution).all())


@pytest.mark.parametrize("solver", [LinearResponse(), NewtonRefit(), FineTune()], ids=repr)
def test_a_singular_ggn_without_a_prior_is_rejected_in_fit(solver):
    model, likelihood, loader, _ = problem()
    delta = {"2.bias": 0.0, "*": 2.0}  # adding a constant to all logits changes nothing
    with pytest.raises(IndefiniteHessianError, match="singular"):
        RegVar(model, likelihood, prior_precision=delta, solver=solver).fit(loader)
