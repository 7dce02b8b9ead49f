"""Laplace approximation of Gaussian processes with given kernel matrices: mode, evidence, and moments at queries.

Notation of Rasmussen and Williams (2006), chapter 3: latent functions f (N, C), K the prior covariance, W the Hessian
of −log p(y | f). At the mode f̂ = m + K a with a = ∇ log p(y | f̂).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.errors import ConvergenceError
from estimators.likelihoods import Likelihood

__all__ = ["IndependentOutputs", "find_mode", "newton_dense"]

_MAX_ITER = 100
"""Newton steps; some ten are usual."""
_EXACT, _ACCEPTED = 2 / 3, 1 / 2
"""Powers of the machine epsilon. Steps end if a and ∇ log p differ by less than the first, relative to
1 + max|∇ log p|, or by less than the second if a step no longer halves the difference."""
_HALVINGS = 30
"""Halvings of a step that decreases the posterior density."""

TimesKernel = Callable[[Tensor], Tensor]
Step = Callable[[Tensor], Tensor]


def find_mode(
    likelihood: Likelihood, y: Tensor, mean: Tensor, times_kernel: TimesKernel, step: Step, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mode of the posterior of f by damped Newton steps (Rasmussen and Williams 2006, algorithm 3.3).

    Args:
        likelihood: log-concave, of the N rows.
        y: targets of N rows.
        mean: m (N, C), the prior mean.
        times_kernel: a (N, C) → K a (N, C).
        step: f (N, C) → a (N, C) after a full Newton step from f.
        start: an a (N, C) to start at, if its posterior density is higher than that of a = 0.

    Returns:
        a and f̂ (N, C).

    Raises:
        ConvergenceError: if the steps do not converge.
    """

    def density(a: Tensor) -> float:
        latent = times_kernel(a)
        return float(-0.5 * (a * latent).sum() - likelihood.nll(mean + latent, y).sum())

    def residual(a: Tensor, f: Tensor) -> float:
        gradient = -likelihood.nll_gradient(f, y)
        return float((gradient - a).abs().max() / (1 + gradient.abs().max()))

    eps = torch.finfo(mean.dtype).eps
    a, before = torch.zeros_like(mean), math.inf
    if start is not None and density(start) > density(a):
        a = start
    for _ in range(_MAX_ITER):
        f = mean + times_kernel(a)
        now = residual(a, f)
        if now <= eps**_EXACT or (now <= eps**_ACCEPTED and now > 0.5 * before):
            return a, f
        change, size, reached = step(f) - a, 1.0, density(a)
        for _ in range(_HALVINGS):
            if density(a + size * change) >= reached - eps**_EXACT * (1 + abs(reached)):
                break
            size /= 2
        a, before = a + size * change, now
    raise ConvergenceError(
        f"the mode of the latent functions within {_MAX_ITER} Newton steps",
        received=f"a relative residual of {before:.2g}",
        remedy="a smaller amplitude or prior variance, or scaled inputs.",
    )


def newton_dense(likelihood: Likelihood, kernel: Tensor, mean: Tensor, y: Tensor, f: Tensor) -> Tensor:
    """Return a (N, C) after a Newton step from f, for a prior covariance that couples the outputs.

        a = b − S (I + SᵀKS)⁻¹ SᵀK b,   b = W(f − m) + ∇ log p,   W = S Sᵀ

    Args:
        likelihood: of the N rows.
        kernel: K (N·C, N·C).
        mean: m (N, C).
        y: targets of N rows.
        f: (N, C).
    """
    n, c = f.shape
    root = likelihood.hessian_sqrt(f)  # S of each row, (N, C, C)
    half = torch.einsum("nci,ncmd->nimd", root, kernel.reshape(n, c, n, c))  # SᵀK
    inner = torch.einsum("nimd,mdj->nimj", half, root).reshape(n * c, n * c)
    inner.diagonal().add_(1.0)
    b = likelihood.hessian_product(f, f - mean) - likelihood.nll_gradient(f, y)
    right = half.reshape(n * c, n * c) @ b.reshape(-1, 1)
    solved = torch.cholesky_solve(right, _cholesky(inner)).reshape(n, c)
    step: Tensor = b - torch.einsum("nci,ni->nc", root, solved)
    return step


@dataclass(frozen=True)
class IndependentOutputs:
    """W at some f, for C outputs that are independent a priori and share one kernel matrix (algorithm 3.3).

        E_c = D_c^½ B_c⁻¹ D_c^½,   B_c = I + D_c^½ K D_c^½ = L_c L_cᵀ
        (K + W⁻¹)⁻¹ = diag(E) − E R (Σ_c E_c)⁻¹ Rᵀ E   for classes, W = D − Π Πᵀ, D = diag π; diag(E) else, W = D

    Attributes:
        kernel: K (N, N).
        root: D^½ (C, N).
        cholesky: L (C, N, N).
        coupling: the Cholesky factor of Σ_c E_c (N, N) for classes, else None.
    """

    kernel: Tensor
    root: Tensor
    cholesky: Tensor
    coupling: Tensor | None

    @classmethod
    def at(cls, likelihood: Likelihood, kernel: Tensor, f: Tensor) -> IndependentOutputs:
        """Factor W at f (N, C)."""
        classes = likelihood.kind == "classification"
        root = (f.softmax(-1) if classes else likelihood.hessian_diagonal(f)).sqrt().T
        identity = torch.eye(len(f), dtype=f.dtype, device=f.device)
        cholesky = torch.stack([_cholesky(identity + r[:, None] * kernel * r) for r in root])
        if not classes:
            return cls(kernel, root, cholesky, None)
        blocks = (r[:, None] * torch.cholesky_inverse(c) * r for r, c in zip(root, cholesky, strict=True))  # E_c
        return cls(kernel, root, cholesky, _cholesky(sum(blocks, torch.zeros_like(kernel))))

    @property
    def half_log_det(self) -> Tensor:
        """½ log |I + K W| = ½ Σ_c log |B_c|, for classes + ½ log |Σ_c E_c|, a scalar."""
        log_det = self.cholesky.diagonal(dim1=1, dim2=2).log().sum()
        return log_det if self.coupling is None else log_det + self.coupling.diagonal().log().sum()

    def newton(self, likelihood: Likelihood, y: Tensor, f: Tensor, mean: Tensor) -> Tensor:
        """Return a (N, C) after a Newton step from the f of this W, with m (C,)."""
        b = likelihood.hessian_product(f, f - mean) - likelihood.nll_gradient(f, y)
        return b - self._solve(self.kernel @ b)

    def gaussian_mode(self, y: Tensor, mean: Tensor) -> Tensor:
        """Return a = (K + diag σ²)⁻¹ (y − m) (N, C) for Gaussian noise, with m (C,)."""
        return self._solve(y - mean)

    def _solve(self, v: Tensor) -> Tensor:
        """Return (K + W⁻¹)⁻¹ v (N, C)."""
        found = self._times_e(v.T[:, :, None])[:, :, 0].T
        if self.coupling is None:
            return found
        shared = torch.cholesky_solve(found.sum(1, keepdim=True), self.coupling)  # (N, 1)
        return found - self._times_e(shared.expand(len(self.root), -1, -1))[:, :, 0].T

    def _times_e(self, v: Tensor) -> Tensor:
        """Return E_c v_c (C, N, M) for v (C, N, M)."""
        root = self.root[:, :, None]
        return root * torch.cholesky_solve(root * v, self.cholesky)

    def evidence(self, likelihood: Likelihood, y: Tensor, a: Tensor, f: Tensor) -> Tensor:
        """Return log q(y), the Laplace approximation of the log marginal likelihood, in nats (equation 3.32)."""
        fit = -0.5 * (a * (self.kernel @ a)).sum() - likelihood.nll(f, y).sum()
        return fit - self.half_log_det

    def gaussian_evidence(self, likelihood: Likelihood, y: Tensor, a: Tensor, mean: Tensor) -> Tensor:
        """Return log p(y) for Gaussian noise, in nats: `evidence` without the difference y − f̂, which may cancel."""
        constant = likelihood.nll(y, y).sum()  # log σ + ½ log 2π of each target
        return -0.5 * ((y - mean) * a).sum() - constant - self.half_log_det

    def reduction(self, cross: Tensor) -> Tensor:
        """Return k*ᵀ(K + W⁻¹)⁻¹k*, by which the data reduce the prior covariance at M rows, (M, C, M, C).

        Args:
            cross: K(X, x) (N, M).
        """
        white, coupled = self._white(cross), self._coupled(cross)
        joint = torch.diag_embed((white.mT @ white).permute(1, 2, 0)).permute(0, 2, 1, 3)
        return joint if coupled is None else joint - torch.einsum("cnm,dnk->mckd", coupled, coupled)

    def row_reduction(self, cross: Tensor) -> Tensor:
        """Return the blocks of `reduction` of each row with itself, (M, C, C)."""
        coupled = self._coupled(cross)
        blocks = torch.diag_embed(self._white(cross).square().sum(1).T)
        return blocks if coupled is None else blocks - torch.einsum("cnm,dnm->mcd", coupled, coupled)

    def _white(self, cross: Tensor) -> Tensor:
        """Return L_c⁻¹ D_c^½ k*, (C, N, M)."""
        white: Tensor = torch.linalg.solve_triangular(self.cholesky, self.root[:, :, None] * cross, upper=False)
        return white

    def _coupled(self, cross: Tensor) -> Tensor | None:
        """Return M⁻¹ E_c k* with M Mᵀ = Σ_c E_c, (C, N, M); None for outputs that stay independent."""
        if self.coupling is None:
            return None
        along = self._times_e(cross.expand(len(self.root), -1, -1))
        solved: Tensor = torch.linalg.solve_triangular(self.coupling, along, upper=False)
        return solved


def _cholesky(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor (N, N). Raises ConvergenceError for a matrix that round-off made indefinite."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise ConvergenceError(
            "a covariance of the training rows that is positive definite in this precision",
            received=f"one whose leading minor of order {int(info)} is not, with prior variances up to "
            f"{float(matrix.detach().diagonal().max()):.2g} times those of the noise",
            remedy="a larger sigma_noise, a smaller amplitude, or a shorter lengthscale.",
        )
    return factor
