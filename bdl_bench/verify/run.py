"""The `bdl-bench verify` command: verify RegVar on trained networks, and write a table, a figure and every number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bdl_bench.problem.problem import Problem, rows
from bdl_bench.verify.case import VerificationCase
from bdl_bench.verify.lambda_sweep import LAMS
from bdl_bench.verify.plot import sweep_figure, to_bytes
from bdl_bench.verify.table import to_json, to_markdown
from bdl_bench.verify.verification import Check, Verification, verify
from estimators.data.batch import Batch
from estimators.errors import OptionError
from estimators.models.checks import check_model
from estimators.models.last_linear import last_linear_names
from estimators.models.subsets import SubsetSpec, matching_names
from estimators.numerics.pytrees import PyTree, concatenate, plain_inputs, select_rows
from estimators.persistence.atomic import write_bytes, write_text
from estimators.training.training import train_map

__all__ = ["VerifyResult", "verify_problems", "write_result"]


@dataclass(frozen=True)
class VerifyResult:
    """The verifications of a run, one per network, and the directory with their table, figure and numbers."""

    verifications: tuple[Verification, ...]
    out: Path

    @property
    def passed(self) -> bool:
        """Whether every error is within its bound."""
        return not any(verification.failures() for verification in self.verifications)


def verify_problems(
    problems: Mapping[str, Problem],
    *,
    out: Path,
    curvature: str = "ggn",
    subset_of_weights: SubsetSpec = "all",
    lams: Sequence[float] = LAMS,
    n_queries: int = 8,
    listener: Callable[[str], None] = lambda name: None,  # noqa: ARG005
) -> VerifyResult:
    """Verify RegVar on the trained network of each problem, at the first rows of its test loader, and write the result.

    Each network is copied. The copy is in float64, and is trained if the problem has a recipe. The listener is called
    with the name of each problem before it is verified.

    Raises:
        OptionError: for another curvature than "ggn" or "hessian", or fewer than one query.
        TooLargeError: if the dense reference does not fit into memory.
    """
    if curvature not in ("ggn", "hessian"):
        raise OptionError('curvature "ggn" or "hessian"', received=repr(curvature), remedy='use "ggn".')
    if n_queries < 1:
        raise OptionError("n_queries >= 1", received=str(n_queries), remedy="8 are enough to see a disagreement.")
    verifications = []
    for name, problem in problems.items():
        listener(name)
        case, notes = _case(problem, n_queries)
        check = Check(curvature, subset_of_weights, _names(case, subset_of_weights))
        verifications.append(replace(verify(case, check, name=name, lams=lams), notes=tuple(notes)))
    return write_result(verifications, out)


def write_result(verifications: Sequence[Verification], out: Path) -> VerifyResult:
    """Write verify.json, verify.md, lambda_sweep.png and lambda_sweep.svg into `out`, each completely or not at all."""
    figure = sweep_figure(verifications)
    for form in ("png", "svg"):
        write_bytes(out / f"lambda_sweep.{form}", to_bytes(figure, form))
    write_text(out / "verify.md", to_markdown(verifications) + "\n![error against λ](lambda_sweep.svg)\n")
    write_text(out / "verify.json", to_json(verifications))
    return VerifyResult(tuple(verifications), out)


def _case(problem: Problem, n_queries: int) -> tuple[VerificationCase, list[str]]:
    """Return the problem in float64 on the CPU, and notes on what was changed."""
    model, notes = copy.deepcopy(problem.model).cpu(), []
    if problem.trains_model:
        assert problem.recipe is not None
        train_map(
            model, problem.likelihood, problem.train, prior_precision=problem.prior_precision, recipe=problem.recipe
        )
        notes.append(f"trained here by {problem.recipe!r}")
    found = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()} - {"float64"})
    if found:
        notes.append(f"the network is in {', '.join(found)}; everything was measured on a copy in float64")
    model = model.double().eval()
    check_model(model)
    batches = [_in_float64((batch.x, batch.y)) for batch in rows(problem.train)]
    x, _ = _in_float64((_queries(problem, n_queries), torch.zeros(1)))
    return VerificationCase(model, problem.likelihood, problem.prior_precision, batches, x), notes


def _queries(problem: Problem, n_queries: int) -> PyTree:
    """Return the first rows of the test loader, with their shared tensors; DataError if these differ by batch."""
    n_rows, batches = 0, list[Batch]()
    for batch in rows(problem.test):
        batches.append(batch.mark_shared(problem.layout))
        n_rows += len(batch)
        if n_rows >= n_queries:
            break
    return plain_inputs(select_rows(concatenate([batch.x for batch in batches]), slice(0, n_queries)))


def _in_float64(batch: tuple[PyTree, Tensor]) -> tuple[PyTree, Tensor]:
    """Return floating tensors in float64 on the CPU; token indices and labels keep their dtype."""

    def cast(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor.double() if tensor.is_floating_point() else tensor

    double: tuple[PyTree, Tensor] = pytree.tree_map_only(Tensor, cast, batch)
    return double


def _names(case: VerificationCase, subset: SubsetSpec) -> list[str]:
    if subset == "last_layer":
        return last_linear_names(case.model, case.batches[0][0])
    return matching_names(case.model, subset)
