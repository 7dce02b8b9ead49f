"""Training jobs: the network of each (task, seed), trained once and kept for every method."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch

from bdl_bench.problem.problem import Problem
from bdl_bench.records.content_digests import content_digest
from bdl_bench.records.problem_digest import problem_digest, row_set_digests
from bdl_bench.records.record import Convergence, Training, content_key, slug
from bdl_bench.records.versions import source_digest
from bdl_bench.runner.executors import Content
from bdl_bench.runner.starting_point import starting_point
from bdl_bench.tasks import Task, resolve_task
from estimators.errors import NonDeterministicError, NotConvergedWarning, StateError, UnsupportedError
from estimators.runtime.rng import seeded
from estimators.training.converge import TOLERANCE, converge_map
from estimators.training.training import train_map

__all__ = [
    "KnownTraining",
    "TrainedModel",
    "TrainingJob",
    "TrainingResult",
    "checkpoint_path",
    "known_training",
    "load_checkpoint",
    "load_problem",
    "train_network",
]


class KnownTraining(NamedTuple):
    """Content key, training seconds and convergence of a checkpoint on disk."""

    key: str
    seconds: float
    convergence: Convergence | None = None


@dataclass(frozen=True)
class TrainingJob:
    """One (task, seed) to train; `known` describes the checkpoint on disk, if any.

    `converged`: whether training is continued by full-batch L-BFGS to a stationary point of L; `plugins` are loaded
    where it runs.
    """

    task: str
    seed: int
    device: str
    known: KnownTraining | None = None
    converged: bool = False
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainedModel:
    """A (task, seed) whose network is trained, with the content key of the network and its data.

    `cached`: whether the checkpoint was on disk already; `weights`: where they are read, None if the problem brings a
    trained network; `rows`: a digest of the rows of each set, by its name; `code`: of the code that makes the problem.
    """

    task: str
    seed: int
    key: str
    training: Training
    cached: bool
    weights: Content | None = field(default=None, compare=False, repr=False)
    rows: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    code: str = ""


@dataclass(frozen=True)
class TrainingResult:
    """A trained model, and the bytes of its checkpoint, which are None if it is on disk already or there is none."""

    model: TrainedModel
    content: bytes | None = None


def train_network(job: TrainingJob) -> TrainingResult:
    """Train the network of a (task, seed) by its recipe, unless the known checkpoint has the same key."""
    task = resolve_task(job.task)
    problem = _kept_problem(task, job.seed)
    code = content_key(packages=source_digest(), factory=content_digest(task.make, include_values=False))
    data = problem_digest(problem)
    converged = {"converged_to": TOLERANCE} if job.converged else {}
    key = content_key(task=task.name, seed=job.seed, problem=data, code=code, device=job.device, **converged)
    rows = row_set_digests(problem)
    content, cached = None, True
    if not problem.trains_model:
        _check_not_converged(job)
        training = Training(seconds=None, recipe=None)
    else:
        start, known = starting_point(problem), job.known
        if known is None or known.key != key:
            cached = False
            known, content = _train(problem.on(job.device), job, key)
        training = start.training(known.seconds).model_copy(update={"convergence": known.convergence})
    return TrainingResult(TrainedModel(job.task, job.seed, key, training, cached, rows=rows, code=code), content)


def _check_not_converged(job: TrainingJob) -> None:
    """Raise UnsupportedError for a network that came trained, which nothing here changes."""
    if job.converged:
        raise UnsupportedError(
            "a problem with a recipe, whose training can be continued (converged_map)",
            received=f"the trained network of {job.task}, which is used as it is",
            remedy="converge it first, estimators.training.converge_map(model, ...), and leave converged_map out.",
        )


def load_problem(model: TrainedModel, directory: Path, device: str) -> Problem:
    """Return the problem with its trained network in eval mode, on a device.

    Raises NonDeterministicError if its rows differ from those that the training saw, and errors of `load_checkpoint`.
    """
    problem = _kept_problem(resolve_task(model.task), model.seed)
    _check_same_rows(problem, model)
    if problem.trains_model:
        load_checkpoint(problem, model, directory)
    return problem.on(device)


def _kept_problem(task: Task, seed: int) -> Problem:
    """Return the problem of a seed with its sets read once and kept."""
    problem = task.problem(seed)
    with seeded(seed):
        return problem.kept()


def _check_same_rows(problem: Problem, model: TrainedModel) -> None:
    with seeded(model.seed):
        found = row_set_digests(problem)
    other = sorted(name for name, rows in model.rows.items() if found.get(name) != rows)
    if other:
        raise NonDeterministicError(
            f"the same rows for {model.task} seed {model.seed} in every process",
            received=f"other rows than before in: {', '.join(other)}",
            remedy="draw the data from the seed that the factory is given; pad rows that are shuffled to one length.",
        )


def load_checkpoint(problem: Problem, model: TrainedModel, directory: Path) -> None:
    """Load the trained weights and buffers into the network of a problem; StateError if they are of another network."""
    content = (model.weights or checkpoint_path(directory, model.task, model.seed)).read_bytes()
    key = _key_of(content)
    if key != model.key:
        raise StateError(
            f"the weights of {model.task} seed {model.seed} with key {model.key}",
            received=f"a file with key {key}: another run has trained it for other code, data or device since",
            remedy="give each code, data and device a directory of its own, and repeat the command.",
        )
    problem.model.load_state_dict(safetensors.torch.load(content), strict=False)  # all that training can change
    problem.model.eval()


def checkpoint_path(directory: Path, task: str, seed: int) -> Path:
    """Return the path of the trained weights of a (task, seed) in the directory of a grid."""
    return directory / "checkpoints" / slug(task) / f"seed-{seed}.safetensors"


def known_training(path: Path) -> KnownTraining | None:
    """Return what a complete checkpoint says of its training; None if it is missing or damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        text = metadata.get("convergence")
        convergence = None if text is None else Convergence.model_validate_json(text)
        return KnownTraining(metadata["key"], float(metadata["seconds"]), convergence)
    except (OSError, safetensors.SafetensorError, KeyError, ValueError):
        return None


def _key_of(content: bytes) -> str | None:
    """Read the key from the header of a safetensors file: eight bytes of length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    key: str | None = json.loads(content[8 : 8 + length]).get("__metadata__", {}).get("key")
    return key


def _train(problem: Problem, job: TrainingJob, key: str) -> tuple[KnownTraining, bytes]:
    """Train the network of a problem; return how, and the checkpoint."""
    assert problem.recipe is not None
    start = time.perf_counter()
    with seeded(job.seed):
        train_map(
            problem.model,
            problem.likelihood,
            problem.train,
            prior_precision=problem.prior_precision,
            recipe=problem.recipe,
            seed=job.seed,
        )
        convergence = _converge(problem) if job.converged else None
    known = KnownTraining(key, time.perf_counter() - start, convergence)
    # What training can change, weights that require a gradient and buffers; the problem has the rest. Each is a copy
    # with its own memory, since safetensors has no tied tensors.
    frozen = {id(p) for p in problem.model.parameters() if not p.requires_grad}
    tensors = problem.model.state_dict(keep_vars=True).items()
    state = {name: t.detach().cpu().clone().contiguous() for name, t in tensors if id(t) not in frozen}
    metadata = {"key": key, "seconds": repr(known.seconds)}
    if convergence is not None:
        metadata["convergence"] = convergence.model_dump_json()
    return known, safetensors.torch.save(state, metadata=metadata)


def _converge(problem: Problem) -> Convergence:
    """Continue training to a stationary point of L; the record says how near it came."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        report = converge_map(problem.model, problem.likelihood, problem.train, prior_precision=problem.prior_precision)
    return Convergence(**{name: asdict(report)[name] for name in Convergence.model_fields})
