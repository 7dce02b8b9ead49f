"""Block conjugate gradients: the solution, its basis, restarts, and matrices that cannot be solved."""

import pytest
import torch

from estimators.curvature.dense.cholesky import DensePrecision
from estimators.curvature.dense.dual import DualPrecision
from estimators.curvature.krylov.block_cg import block_cg
from estimators.curvature.krylov.block_lanczos import krylov_basis
from estimators.curvature.krylov.cg_precision import CGPrecision
from estimators.curvature.krylov.extreme_eigenvalues import check_positive_definite
from estimators.errors import ConvergenceError, IndefiniteHessianError, UnsupportedError
from estimators.numerics.reductions import combine_, dots, inner, orthonormalise_

P = 40


def orthogonal(seed=0):
    return torch.linalg.qr(torch.randn(P, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def matrix(spectrum):
    basis = orthogonal()
    return basis @ spectrum.diag() @ basis.T


SPECTRA = {
    "well conditioned": torch.linspace(1, 5, P, dtype=torch.float64),
    "ill conditioned": torch.logspace(0, 6, P, dtype=torch.float64),
    "a few large, as a GGN": torch.cat([torch.full((P - 6,), 2.5), torch.logspace(1, 4, 6)]).double(),
    "the identity": torch.ones(P, dtype=torch.float64),
}
spectra = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())


def vectors(k, seed=1):
    return torch.randn(k, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product_of(a):
    return lambda v: v @ a


@spectra
@pytest.mark.parametrize("k", [1, 3, 7, P, P + 5])
def test_the_solution_is_that_of_a_dense_solve(spectrum, k):
    a, b = matrix(spectrum), vectors(k)
    solved = block_cg(product_of(a), b, tol=1e-11)
    exact = torch.linalg.solve(a, b.T).T
    assert float((solved.solution - exact).norm() / exact.norm()) < 1e-8
    assert bool((solved.residuals <= 1e-11).all())


@spectra
def test_the_residuals_reported_are_the_true_ones(spectrum):
    a, b = matrix(spectrum), vectors(4)
    solved = block_cg(product_of(a), b, tol=1e-5)
    true = (b - solved.solution @ a).norm(dim=1) / b.norm(dim=1)
    assert torch.allclose(solved.residuals, true, rtol=1e-3, atol=1e-10)


@spectra
def test_the_basis_is_orthonormal_and_projects_the_matrix(spectrum):
    a = matrix(spectrum)
    solved = block_cg(product_of(a), vectors(3), tol=1e-11)
    w = solved.basis[: len(solved.projected)]
    assert torch.allclose(w @ w.T, torch.eye(len(w), dtype=torch.float64), atol=1e-10)
    assert torch.allclose(solved.projected, w @ a @ w.T, atol=1e-10 * float(spectrum.max()))


def test_the_solution_is_the_galerkin_solution_on_the_basis():
    a, b, start = matrix(SPECTRA["well conditioned"]), vectors(3), vectors(3, seed=2)
    solved = block_cg(product_of(a), b, start=start, tol=1e-3)
    w = solved.basis[: len(solved.projected)]
    galerkin = start + torch.linalg.solve(w @ a @ w.T, w @ (b - start @ a).T).T @ w
    assert len(w) < P
    assert torch.allclose(solved.solution, galerkin, atol=1e-10)


@spectra
def test_a_start_leads_to_the_same_solution(spectrum):
    a, b, start = matrix(spectrum), vectors(3), vectors(3, seed=2)
    kept = start.clone()
    solved = block_cg(product_of(a), b, start=start, tol=1e-11)
    exact = torch.linalg.solve(a, b.T).T
    assert float((solved.solution - exact).norm() / exact.norm()) < 1e-8
    assert torch.equal(start, kept)


def test_the_solution_as_a_start_needs_no_iteration():
    a, b = matrix(SPECTRA["well conditioned"]), vectors(3)
    exact = torch.linalg.solve(a, b.T).T
    solved = block_cg(product_of(a), b, start=exact, tol=1e-9)
    assert solved.iterations == 0
    assert solved.products == 3
    assert torch.allclose(solved.solution, exact, rtol=1e-12)


@pytest.mark.parametrize("rows", [[0, 0, 1], [0, 0, 0]], ids=["a repeated one", "all alike"])
def test_right_hand_sides_that_depend_on_each_other_are_solved_alike(rows):
    a, b = matrix(SPECTRA["well conditioned"]), vectors(2)[rows]
    solved = block_cg(product_of(a), b, tol=1e-11).solution
    assert torch.allclose(solved, torch.linalg.solve(a, b.T).T, atol=1e-9)


def test_a_right_hand_side_of_zero_has_the_solution_zero():
    a, b = matrix(SPECTRA["well conditioned"]), vectors(3)
    b[1] = 0
    solved = block_cg(product_of(a), b, tol=1e-11)
    assert torch.allclose(solved.solution, torch.linalg.solve(a, b.T).T, atol=1e-9)
    nothing = block_cg(product_of(a), torch.zeros(2, P, dtype=torch.float64))
    assert torch.equal(nothing.solution, torch.zeros(2, P, dtype=torch.float64))
    assert nothing.products == 0


def test_right_hand_sides_of_very_different_scale_all_reach_their_own_tolerance():
    a = matrix(SPECTRA["ill conditioned"])
    b = vectors(3) * torch.tensor([[1e8], [1.0], [1e-4]], dtype=torch.float64)
    solved = block_cg(product_of(a), b, tol=1e-8)
    assert bool(((b - solved.solution @ a).norm(dim=1) <= 2e-8 * b.norm(dim=1)).all())


def test_products_are_counted_by_columns():
    a, calls = matrix(SPECTRA["well conditioned"]), []

    def product(v):
        calls.append(len(v))
        return v @ a

    solved = block_cg(product, vectors(3), start=vectors(3, seed=2), tol=1e-11)
    assert solved.products == sum(calls)
    assert solved.iterations == len(calls) - 1


def test_distinct_eigenvalues_bound_the_number_of_iterations():
    spectrum = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64).repeat_interleave(20)[:P]
    assert block_cg(product_of(matrix(spectrum)), vectors(2), tol=1e-10).iterations <= 3


def test_a_block_converges_in_fewer_iterations_than_a_single_vector():
    a = matrix(SPECTRA["a few large, as a GGN"])
    alone = block_cg(product_of(a), vectors(1), tol=1e-10).iterations
    assert block_cg(product_of(a), vectors(4), tol=1e-10).iterations < alone


@pytest.mark.parametrize("bound", [3, 6, 12, 30])
def test_a_bounded_basis_restarts_and_ends_at_the_same_solution(bound, monkeypatch):
    monkeypatch.setattr("estimators.curvature.krylov.block_lanczos._BASIS_BYTES", bound * P * 8)
    a, b = matrix(SPECTRA["well conditioned"]), vectors(3)
    solved = block_cg(product_of(a), b, tol=1e-11)
    exact = torch.linalg.solve(a, b.T).T
    assert float((solved.solution - exact).norm() / exact.norm()) < 1e-9
    assert len(solved.projected) <= bound + 3
    assert solved.iterations > 1


def test_a_bounded_basis_keeps_what_it_has_solved_for(monkeypatch):
    a, b = matrix(SPECTRA["a few large, as a GGN"]), vectors(2)
    free = block_cg(product_of(a), b, tol=1e-8)
    monkeypatch.setattr("estimators.curvature.krylov.block_lanczos._BASIS_BYTES", 8 * P * 8)
    bounded = block_cg(product_of(a), b, tol=1e-8)
    assert bounded.iterations <= 2 * free.iterations
    w, next_block = bounded.basis.split([len(bounded.projected), len(bounded.basis) - len(bounded.projected)])
    rest = w @ a - bounded.projected @ w - bounded.coupling.T @ next_block  # A Wᵀ = Wᵀ T + Qᵀ B still
    assert float(rest.norm() / (w @ a).norm()) < 1e-9


@pytest.mark.parametrize("a_norm_tol", [1e-1, 1e-3, 1e-6])
def test_an_energy_tolerance_bounds_the_error_of_the_quadratic_form(a_norm_tol):
    a, b = matrix(SPECTRA["well conditioned"]), vectors(3)  # A ⪰ I
    solved = block_cg(product_of(a), b, tol=1e-12, a_norm_tol=a_norm_tol)
    exact = (b * torch.linalg.solve(a, b.T).T).sum(1)
    error = 1 - (b * solved.solution).sum(1) / exact
    assert bool((error >= -1e-10).all())
    assert bool((error <= a_norm_tol).all())
    assert solved.iterations < block_cg(product_of(a), b, tol=1e-12).iterations


def test_too_few_iterations_are_an_error_that_says_how_far_they_came():
    a = matrix(SPECTRA["ill conditioned"])
    with pytest.raises(ConvergenceError, match=r"at most 1e-10 within 4 iterations.*after 4.*max_iter"):
        block_cg(product_of(a), vectors(2), tol=1e-10, max_iter=4)


def test_a_tolerance_below_round_off_ends_with_an_error_and_not_in_an_endless_loop():
    a = matrix(SPECTRA["ill conditioned"])
    try:
        residuals = block_cg(product_of(a), vectors(2), tol=1e-18, max_iter=60).residuals
    except ConvergenceError:
        return
    assert bool((residuals <= 1e-18).all())


@pytest.mark.parametrize("smallest", [-0.5, -1e-3])
def test_an_indefinite_matrix_is_recognised(smallest):
    spectrum = SPECTRA["well conditioned"].clone()
    spectrum[3] = smallest
    with pytest.raises(IndefiniteHessianError, match="indefinite") as caught:
        block_cg(product_of(matrix(spectrum)), vectors(3), tol=1e-10)
    assert smallest <= caught.value.smallest < 0


@pytest.mark.parametrize("k", [1, 4, P])
@spectra
def test_the_whole_krylov_space_has_the_whole_spectrum(k, spectrum):
    basis, projected = krylov_basis(product_of(matrix(spectrum)), vectors(k), size=P)
    ritz, distinct = torch.linalg.eigvalsh(projected), spectrum.unique()
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-9)
    assert float(ritz[0]) == pytest.approx(float(distinct[0]), rel=1e-6)
    assert float(ritz[-1]) == pytest.approx(float(distinct[-1]), rel=1e-9)


def test_ritz_values_lie_within_the_spectrum():
    spectrum = SPECTRA["ill conditioned"]
    smallest = []
    for size in (4, 12, 24):
        basis, projected = krylov_basis(product_of(matrix(spectrum)), vectors(2), size=size)
        ritz = torch.linalg.eigvalsh(projected)
        assert len(basis) >= size
        assert float(ritz[0]) >= float(spectrum[0]) * (1 - 1e-9)
        assert float(ritz[-1]) <= float(spectrum[-1]) * (1 + 1e-12)
        smallest.append(float(ritz[0]))
    assert smallest == sorted(smallest, reverse=True)


@pytest.mark.parametrize("smallest", [-1e-3, 0.0, 1e-11])
def test_a_singular_or_indefinite_matrix_is_rejected_by_its_products(smallest):
    spectrum = SPECTRA["well conditioned"].clone()
    spectrum[3] = smallest
    with pytest.raises(IndefiniteHessianError) as caught:
        check_positive_definite(product_of(matrix(spectrum)), vectors(1)[0])
    assert caught.value.smallest == pytest.approx(smallest, abs=1e-12)
    assert caught.value.largest == pytest.approx(5.0)


@spectra
def test_a_definite_matrix_is_let_through(spectrum):
    check_positive_definite(product_of(matrix(spectrum)), vectors(1)[0])


def rows_and_prior():
    rows = torch.randn(12, P, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    prior = torch.rand(P, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5
    return rows, prior, rows.T @ rows + prior.diag()


def precisions():
    rows, prior, a = rows_and_prior()
    return {
        "dense": DensePrecision(a),
        "dual": DualPrecision(prior, rows),
        "cg": CGPrecision(product_of(a), tol=1e-12),
    }


@pytest.mark.parametrize("name", precisions())
def test_every_precision_has_the_same_inverse(name):
    a, precision = rows_and_prior()[2], precisions()[name]
    b, jacobian = vectors(5), vectors(6).reshape(2, 3, P)
    assert torch.allclose(precision.solve(b), torch.linalg.solve(a, b.T).T, atol=1e-10)
    exact = jacobian @ torch.linalg.inv(a) @ jacobian.transpose(1, 2)
    assert torch.allclose(precision.covariance(jacobian), exact, atol=1e-10)
    assert torch.allclose(precision.variance(jacobian), exact.diagonal(dim1=1, dim2=2), atol=1e-10)


@pytest.mark.parametrize("name", ["dense", "dual"])
def test_factored_precisions_have_the_determinant(name):
    assert torch.allclose(precisions()[name].log_det(), torch.logdet(rows_and_prior()[2]), rtol=1e-12)


def test_products_have_no_determinant():
    with pytest.raises(UnsupportedError, match="cholesky"):
        precisions()["cg"].log_det()


def test_draws_from_the_factor_have_the_inverse_as_covariance():
    a = rows_and_prior()[2]
    draws = DensePrecision(a).sample(40_000, torch.Generator().manual_seed(0))
    exact = torch.linalg.inv(a)
    assert torch.allclose(draws.T.cov(), exact, atol=6 * float(exact.abs().max()) / 200)


def test_a_matrix_that_only_round_off_makes_indefinite_is_factored_in_double_precision():
    spectrum = torch.cat([torch.full((P - 1,), 1e-3), torch.tensor([3e4])]).double()
    a = matrix(spectrum)
    rounded = a.float()
    factor = DensePrecision(rounded).cholesky
    assert factor.dtype == torch.float32
    assert torch.allclose(factor @ factor.T, rounded, atol=1e-2)


def test_a_dense_indefinite_matrix_is_rejected_with_its_ends():
    spectrum = SPECTRA["well conditioned"].clone()
    spectrum[0] = -0.25
    with pytest.raises(IndefiniteHessianError, match="an indefinite one") as caught:
        DensePrecision(matrix(spectrum))
    assert (caught.value.smallest, caught.value.largest) == pytest.approx((-0.25, 5.0))


def test_long_rows_in_single_precision_are_orthonormal_to_seven_digits():
    """LAPACK's norms of rows of millions of entries err by 1e-4 and more: too much for the smallest eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 4_000_000, generator=generator) * torch.rand(4_000_000, generator=generator).pow(4)
    basis, factor = orthonormalise_(rows.clone(), torch.tensor(1e-6))
    assert float((inner(basis, basis) - torch.eye(3)).abs().max()) < 2e-6
    assert float((rows - factor.T.float() @ basis).norm() / rows.norm()) < 2e-5
    parts = [part.double() for part in rows.split(500_000, dim=1)]
    exact = torch.stack([part @ part.T for part in parts]).sum(0)
    assert float((inner(rows, rows) / exact - 1).abs().max()) < 2e-6
    assert float((dots(rows, rows) / exact.diagonal() - 1).abs().max()) < 2e-6
    assert float((dots(rows, rows[0]) - exact[:, 0]).abs().max() / exact[0, 0]) < 2e-6


@pytest.mark.parametrize("n", [7, 3, 70_000])
def test_rows_are_made_orthonormal_in_their_place_and_those_that_depend_on_others_are_dropped(n):
    rows = torch.randn(5, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[3] = rows[0] - 2 * rows[2]
    before = rows.clone()
    basis, factor = orthonormalise_(rows, torch.tensor(1e-10))
    assert basis.data_ptr() == rows.data_ptr()
    assert basis.shape == (min(n, 4), n)
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis)).double(), atol=1e-10)
    assert torch.allclose(factor.T @ basis, before, atol=1e-10)


def test_directions_near_round_off_are_orthonormal_too():
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(300, 30, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(40, 30, generator=generator, dtype=torch.float64))
    before = (u * torch.logspace(3, -13, 30, dtype=torch.float64)) @ v.T
    basis, factor = orthonormalise_(before.clone(), torch.tensor(1e-12))
    assert 25 <= len(basis) < 30
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis)).double(), atol=1e-13)
    assert torch.allclose(factor.T @ basis, before, atol=1e-12)


def test_a_block_of_nothing_has_no_basis():
    basis, factor = orthonormalise_(torch.zeros(3, 50), torch.tensor(0.0))
    assert (basis.shape, factor.shape) == ((0, 50), (0, 3))


def test_rows_are_combined_in_their_place():
    rows = torch.randn(4, 90_000, generator=torch.Generator().manual_seed(0))
    coefficients = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = (coefficients @ rows.double()).float()
    found = combine_(rows, coefficients)
    assert found.data_ptr() == rows.data_ptr()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("start", [None, "given"])
def test_after_its_iterations_it_asks_with_what_it_has_whether_to_go_on(start):
    a, b, seen = matrix(SPECTRA["ill conditioned"]), vectors(2), []
    start = vectors(2, seed=4) if start else None

    def until_the_fifth(solved):
        assert torch.allclose(b - solved.solution @ a, solved.remainder, rtol=1e-6, atol=1e-8 * float(a.norm()))
        assert torch.allclose(solved.residuals, solved.remainder.norm(dim=1) / b.norm(dim=1))
        seen.append(solved.iterations)
        return solved.iterations < 5

    solved = block_cg(product_of(a), b, start=start, max_iter=3, must_converge=False, should_continue=until_the_fifth)
    assert seen == [3, 4, 5]
    assert solved.iterations == 5
    plain = block_cg(product_of(a), b, start=start, max_iter=5, must_converge=False)
    assert torch.equal(solved.solution, plain.solution)
