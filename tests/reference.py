"""Dense formulas of every regularizer of RegVar (the table of docs/math.md, section 4), from a covariance over points.

Nothing here comes from `estimators`: J and A are those of the dense reference.
"""

import torch

from bdl_bench.verify.reference import DenseReference

__all__ = [
    "DenseReference",
    "draws_variance",
    "joint_covariance",
    "mean_absolute_variance",
    "parameter_probes_variance",
    "pointwise_variance_of",
    "signed_probes_variance",
]


def joint_covariance(reference, left, right, curvature):
    """J(left) A⁻¹ J(right)ᵀ, (M, C, M', C')."""
    a, b = reference.jacobian(left), reference.jacobian(right)
    inverse = torch.linalg.inv(reference.precision(curvature))
    return torch.einsum("mcp,pq,ndq->mcnd", a, inverse, b)


def pointwise_variance_of(reference, x, curvature, slope):
    """diag(G Σ Gᵀ), slope G (M, D, C)."""
    return torch.einsum("mdc,mce,mde->md", slope, reference.covariance(x, curvature), slope)


def mean_absolute_variance(reference, x, train, curvature):
    """|1/(NC) Σₙ,c′ sign f_c′(xₙ) Σ(x, xₙ)_cc′|, (M, C)."""
    signs = reference.outputs(train).sign()
    crossed = joint_covariance(reference, x, train, curvature)
    return (torch.einsum("mcnd,nd->mc", crossed, signs) / signs.numel()).abs()


def signed_probes_variance(reference, x, curvature, signs):
    """Mean over k of s_k ∘ (Σ s_k), Σ over the whole query set; signs (K, M, C)."""
    joint = joint_covariance(reference, x, x, curvature)
    return (signs * torch.einsum("mcnd,knd->kmc", joint, signs)).mean(0)


def parameter_probes_variance(reference, x, curvature, u):
    """Mean over k of (J A⁻¹u_k) ∘ (J u_k); u (K, P)."""
    jacobian = reference.jacobian(x)
    solved = torch.linalg.solve(reference.precision(curvature), u.T).T
    return torch.einsum("mcp,kp,mcq,kq->mc", jacobian, solved, jacobian, u) / len(u)


def draws_variance(reference, x, xi):
    """Mean over k of (J A⁻¹ξ_k)² with the GGN; xi (K, P)."""
    solved = torch.linalg.solve(reference.precision("ggn"), xi.T).T
    return torch.einsum("mcp,kp->kmc", reference.jacobian(x), solved).square().mean(0)
