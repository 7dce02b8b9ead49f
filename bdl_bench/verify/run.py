"""`bdl-bench verify`: a proof on one's own model, or on a pairwise_cover of the zoo; a table, a figure, and files of both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bdl_bench.problem.problem import Problem, rows
from bdl_bench.verify.cases import Case, pairwise_cover
from bdl_bench.verify.checks import Check, Verification, verify
from bdl_bench.verify.lambda_sweep import LAMS
from bdl_bench.verify.plot import ladder_figure, to_bytes
from bdl_bench.verify.subject import VerificationCase
from bdl_bench.verify.table import to_json, to_markdown
from estimators.data.batch import Batch
from estimators.errors import OptionError
from estimators.models.checks import check_model
from estimators.models.last_linear import last_linear_names
from estimators.models.subsets import SubsetSpec, matching_names
from estimators.numerics.pytrees import PyTree, concatenate, plain_inputs, select_rows
from estimators.persistence.atomic import write_bytes, write_text
from estimators.training.training import train_map

__all__ = ["VerifyResult", "verify_problem", "verify_test_problems", "write_result"]

Listener = Callable[[str], None]


@dataclass(frozen=True)
class VerifyResult:
    """The proofs, and the directory with verify.json, verify.md, ladder.png and ladder.svg."""

    proofs: tuple[Verification, ...]
    out: Path

    @property
    def holds(self) -> bool:
        """Whether every bound holds."""
        return not any(proof.failures() for proof in self.proofs)


def verify_problem(
    problem: Problem,
    *,
    out: Path,
    name: str = "your model",
    curvature: str = "ggn",
    subset_of_weights: SubsetSpec = "all",
    lams: Sequence[float] = LAMS,
    n_queries: int = 8,
) -> VerifyResult:
    """Prove RegVar on a problem's trained network, at the first `n_queries` rows of its test loader.

    The network is copied; the copy is trained where the problem has a recipe, and is in float64.
    Errors: OptionError, TooLargeError (the reference is dense), and those of the estimators' `fit`.
    """
    if curvature not in ("ggn", "hessian"):
        raise OptionError('curvature "ggn" or "hessian"', received=repr(curvature), remedy='use "ggn".')
    if n_queries < 1:
        raise OptionError("n_queries >= 1", received=str(n_queries), remedy="8 are enough to see a disagreement.")
    subject, notes = _subject(problem, n_queries)
    claim = Check(curvature, subset_of_weights, _names(subject, subset_of_weights))
    proof = verify(subject, claim, name=name, lams=lams)
    return write_result([replace(proof, notes=tuple(notes))], out)


def verify_test_problems(
    *, out: Path, listener: Listener | None = None, cases: Iterable[Case] | None = None
) -> VerifyResult:
    """Prove a pairwise_cover of the zoo: each pair of architecture, likelihood, training, curvature and weights once.

    The error of posterior draws is split into its parts where the GGN of all weights is proved.
    """
    proofs = []
    for case in pairwise_cover() if cases is None else cases:
        if listener is not None:
            listener(str(case))
        claim = Check(case.curvature, case.subset_of_weights, case.names)
        name = f"{case.architecture}, {case.likelihood}, {case.training}"
        proofs.append(verify(case.problem, claim, name=name, split=(case.curvature, case.subset) == ("ggn", "all")))
    return write_result(proofs, out)


def write_result(proofs: Sequence[Verification], out: Path) -> VerifyResult:
    """Write verify.json, verify.md, ladder.png and ladder.svg into `out`, each whole or not at all."""
    figure = ladder_figure(proofs)
    for form in ("png", "svg"):
        write_bytes(out / f"ladder.{form}", to_bytes(figure, form))
    write_text(out / "verify.md", to_markdown(proofs) + "\n![error against λ](ladder.svg)\n")
    write_text(out / "verify.json", to_json(proofs))
    return VerifyResult(tuple(proofs), out)


def _subject(problem: Problem, n_queries: int) -> tuple[VerificationCase, list[str]]:
    """The problem in float64 on the CPU, and what was done to it, in words."""
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
    batches = [_in_double((batch.x, batch.y)) for batch in rows(problem.train)]
    x, _ = _in_double((_queries(problem, n_queries), torch.zeros(1)))
    return VerificationCase(model, problem.likelihood, problem.prior_precision, batches, x), notes


def _queries(problem: Problem, n_queries: int) -> PyTree:
    """The first rows of the test loader, with what they share. Errors: DataError if they do not share the same."""
    taken, batches = 0, list[Batch]()
    for batch in rows(problem.test):
        batches.append(batch.marked(problem.layout))
        taken += len(batch)
        if taken >= n_queries:
            break
    return plain_inputs(select_rows(concatenate([batch.x for batch in batches]), slice(0, n_queries)))


def _in_double(batch: tuple[PyTree, Tensor]) -> tuple[PyTree, Tensor]:
    """Floating tensors in float64, on the CPU; token indices and labels as they are."""

    def cast(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor.double() if tensor.is_floating_point() else tensor

    double: tuple[PyTree, Tensor] = pytree.tree_map_only(Tensor, cast, batch)
    return double


def _names(subject: VerificationCase, subset: SubsetSpec) -> list[str]:
    if subset == "last_layer":
        return last_linear_names(subject.model, subject.batches[0][0])
    return matching_names(subject.model, subset)
