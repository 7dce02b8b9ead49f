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
    likelihood: Likelihood, y: Tensor, mean: Tensor, times_kernel: TimesKernel, step: Step
) -> tuple[Tensor, Tensor]:
    """Return the mode of the posterior of f by damped Newton steps (Rasmussen and Williams 2006, algorithm 3.3).

    Args:
        likelihood: log-concave, of the N rows.
        y: targets of N rows.
        mean: m (N, C), the prior mean.
        times_kernel: a (N, C) → K a (N, C).
        step: f (N, C) → a (N, C) after a full Newton step from f.

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
    root = torch.block_diag(*likelihood.hessian_sqrt(f))  # S, (N·C, N·C)
    inner = root.T @ kernel @ root
    inner.diagonal().add_(1.0)
    b = (likelihood.hessian_product(f, f - mean) - likelihood.nll_gradient(f, y)).flatten()
    solved = torch.cholesky_solve((root.T @ (kernel @ b))[:, None], torch.linalg.cholesky(inner))[:, 0]
    return (b - root @ solved).reshape(n, c)


@dataclass(frozen=True)
class IndependentOutputs:
    """W at some f, for C outputs that are independent a priori and share one kernel matrix (algorithm 3.3).

        E_c = D_c^½ (I + D_c^½ K D_c^½)⁻¹ D_c^½ = V_cᵀ V_c
        (K + W⁻¹)⁻¹ = diag(E) − E R (Σ_c E_c)⁻¹ Rᵀ E   for classes, W = D − Π Πᵀ, D = diag π; diag(E) else, W = D

    Attributes:
        kernel: K (N, N).
        whitened: V (C, N, N).
        coupling: the Cholesky factor of Σ_c E_c (N, N) for classes, else None.
        half_log_det: ½ log |I + K W| = ½ Σ_c log |I + D_c^½ K D_c^½| (+ ½ log |Σ_c E_c| for classes), a scalar.
    """

    kernel: Tensor
    whitened: Tensor
    coupling: Tensor | None
    half_log_det: Tensor

    @classmethod
    def at(cls, likelihood: Likelihood, kernel: Tensor, f: Tensor) -> IndependentOutputs:
        """Factor W at f (N, C)."""
        classes = likelihood.kind == "classification"
        root = (f.softmax(-1) if classes else likelihood.hessian_diagonal(f)).sqrt().T  # D^½, (C, N)
        identity = torch.eye(len(f), dtype=f.dtype, device=f.device)
        cholesky = torch.linalg.cholesky(identity + root[:, :, None] * kernel * root[:, None, :])
        whitened = torch.linalg.solve_triangular(cholesky, torch.diag_embed(root), upper=False)
        log_det = cholesky.diagonal(dim1=1, dim2=2).log().sum()
        if not classes:
            return cls(kernel, whitened, None, log_det)
        coupling = torch.linalg.cholesky((whitened.mT @ whitened).sum(0))
        return cls(kernel, whitened, coupling, log_det + coupling.diagonal().log().sum())

    def newton(self, likelihood: Likelihood, y: Tensor, f: Tensor, mean: Tensor) -> Tensor:
        """Return a (N, C) after a Newton step from the f of this W, with m (C,)."""
        b = likelihood.hessian_product(f, f - mean) - likelihood.nll_gradient(f, y)
        return b - self._solve(self.kernel @ b)

    def _solve(self, v: Tensor) -> Tensor:
        """Return (K + W⁻¹)⁻¹ v (N, C)."""
        found = self._times_e(v)
        if self.coupling is None:
            return found
        shared = torch.cholesky_solve(found.sum(1, keepdim=True), self.coupling)
        return found - self._times_e(shared.expand_as(v))

    def _times_e(self, v: Tensor) -> Tensor:
        """Return E_c v_c for each column c, (N, C)."""
        columns = v.T[:, :, None]
        return (self.whitened.mT @ (self.whitened @ columns))[:, :, 0].T

    def evidence(self, likelihood: Likelihood, y: Tensor, a: Tensor, f: Tensor) -> Tensor:
        """Return log q(y), the Laplace approximation of the log marginal likelihood, in nats (equation 3.32)."""
        fit = -0.5 * (a * (self.kernel @ a)).sum() - likelihood.nll(f, y).sum()
        return fit - self.half_log_det

    def reduction(self, cross: Tensor) -> Tensor:
        """Return k*ᵀ(K + W⁻¹)⁻¹k*, by which the data reduce the prior covariance at M rows, (M, C, M, C).

        Args:
            cross: K(X, x) (N, M).
        """
        white = self.whitened @ cross  # V_c k*, (C, N, M)
        blocks = white.mT @ white  # (C, M, M)
        joint = torch.diag_embed(blocks.permute(1, 2, 0)).permute(0, 2, 1, 3)
        coupled = self._coupled(white)
        return joint if coupled is None else joint - torch.einsum("cnm,dnk->mckd", coupled, coupled)

    def row_reduction(self, cross: Tensor) -> Tensor:
        """Return the blocks of `reduction` of each row with itself, (M, C, C)."""
        white = self.whitened @ cross
        blocks = torch.diag_embed(white.square().sum(1).T)
        coupled = self._coupled(white)
        return blocks if coupled is None else blocks - torch.einsum("cnm,dnm->mcd", coupled, coupled)

    def _coupled(self, white: Tensor) -> Tensor | None:
        """Return L⁻¹ E_c k* with L Lᵀ = Σ_c E_c, (C, N, M); None for outputs that stay independent."""
        if self.coupling is None:
            return None
        solved: Tensor = torch.linalg.solve_triangular(self.coupling, self.whitened.mT @ white, upper=False)
        return solved
