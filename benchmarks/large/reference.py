"""The independent reference: curvlinops' GGN in float64 and scipy's conjugate gradients, per right-hand side.

From zero, conjugate gradients take hundreds or thousands of products. The initial guess is the function-space solution
in float64. curvlinops measures its residual, and conjugate gradients reduce it below the tolerance.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.large.models import MODELS, N_QUERIES, PRIOR_PRECISION
from estimators import LinearizedLaplace
from estimators.models.outputs import output_tensor
from estimators.numerics.pytrees import PyTree, n_rows, select_rows, with_floats

__all__ = ["reference_record"]

_TOLERANCE = 1e-6


class _Logits(nn.Module):
    """A model that returns its outputs as a tensor, also if it takes a dict of inputs or returns an object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: PyTree) -> Tensor:
        """Return outputs (B, C), by an attention kernel that has forward-mode derivatives."""
        with sdpa_kernel(SDPBackend.MATH):
            return output_tensor(self.model(**x) if isinstance(x, dict) else self.model(x))


def reference_record(name: str) -> dict[str, Any]:
    """Return J_c A⁻¹ J_cᵀ at each query for its predicted class c, by CG at a relative residual of 1e-6."""
    from curvlinops import GGNLinearOperator

    torch.backends.mha.set_fastpath_enabled(False)
    subject = MODELS[name]()
    model = _Logits(subject.model).double().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    loader = [(with_floats(x, torch.float64), y) for x, y in subject.loader]
    loss = nn.CrossEntropyLoss(reduction="sum")
    options: dict[str, Any] = {"batch_size_fn": n_rows, "check_deterministic": False}
    ggn = GGNLinearOperator(model, loss, parameters, loader, **options).to_scipy(dtype=np.float64)
    products = 0

    def product(v: Any) -> Any:  # noqa: ANN401
        nonlocal products
        products += 1
        return ggn @ v + PRIOR_PRECISION * v

    start = time.perf_counter()
    guess = LinearizedLaplace(
        subject.model, "classification", prior_precision=PRIOR_PRECISION, inverse="matrix_free_dual"
    )
    guess.fit(loader)
    guessed = time.perf_counter() - start
    precision = LinearOperator(ggn.shape, matvec=product, dtype=np.float64)
    classes, variances, residuals = [], [], []
    for i in range(N_QUERIES):
        f = model(with_floats(select_rows(subject.queries, slice(i, i + 1)), torch.float64))[0]
        c = int(f.argmax())
        slopes = torch.autograd.grad(f[c], parameters)
        slope = torch.cat([slope.flatten() for slope in slopes])
        row, first = slope.numpy(), guess.precision_.solve(slope[None])[0].numpy()
        residuals.append(float(np.linalg.norm(row - product(first)) / np.linalg.norm(row)))
        solved, failed = cg(precision, row, first, rtol=_TOLERANCE, maxiter=2000)
        classes.append(c)
        variances.append(float("nan") if failed else float(row @ solved))
    return {
        "seconds": time.perf_counter() - start,
        "guess_seconds": guessed,
        "guess_residuals": residuals,
        "products": products,
        "classes": classes,
        "variance": variances,
    }
