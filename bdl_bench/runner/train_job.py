"""Stage one of the grid: the network of one (task, seed), trained once and kept for every method."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from bdl_bench.problem.problem import Problem
from bdl_bench.records.content_digests import content_digest
from bdl_bench.records.problem_digest import problem_digest, row_set_digests
from bdl_bench.records.record import Training, content_key, slug
from bdl_bench.records.versions import source_digest
from bdl_bench.runner.executors import Content
from bdl_bench.runner.starting_point import starting_point
from bdl_bench.tasks import Task, resolve_task
from estimators.errors import NonDeterministicError, StateError
from estimators.runtime.rng import seeded
from estimators.training.training import train_map

__all__ = [
    "TrainedModel",
    "TrainingJob",
    "TrainingResult",
    "checkpoint_path",
    "known_training",
    "load_checkpoint",
    "load_problem",
    "train_network",
]


@dataclass(frozen=True)
class TrainingJob:
    """One (task, seed) to train on a device; `known` is the cached training, if any: content key and seconds."""

    task: str
    seed: int
    device: str
    known: tuple[str, float] | None = None


@dataclass(frozen=True)
class TrainedModel:
    """A (task, seed) ready for stage two: the content key of its network and data, and how the network was trained.

    `weights` is where its weights are read; None where the problem brings a trained network. `rows` has a digest of the
    rows of each set, `code` one of the code that makes the problem.
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
    """What stage one gives: a value, written by who asked for it. `content` is the weights file where it is new."""

    prepared: TrainedModel
    content: bytes | None = None


def train_network(place: TrainingJob) -> TrainingResult:
    """Train the network of (task, seed) by its recipe, unless what is known of it has the same key."""
    task = resolve_task(place.task)
    problem = _kept(task, place.seed)
    code = _code(task)
    key, rows = _key(task, problem, place, code), row_set_digests(problem)
    content, cached = None, True
    if not problem.trains_model:
        training = Training(seconds=None, recipe=None)
    else:
        start = starting_point(problem)
        seconds = place.known[1] if place.known is not None and place.known[0] == key else None
        if seconds is None:
            cached = False
            seconds, content = _train(problem.on(place.device), place.seed, key)
        training = start.training(seconds)
    return TrainingResult(TrainedModel(place.task, place.seed, key, training, cached, rows=rows, code=code), content)


def load_problem(prepared: TrainedModel, directory: Path, device: str) -> Problem:
    """The problem with its trained network in eval mode and the rows of stage one, on `device`.

    Errors: NonDeterministicError where its rows are others than those that stage one saw.
    """
    problem = _kept(resolve_task(prepared.task), prepared.seed)
    _check_same_rows(problem, prepared)
    if problem.trains_model:
        load_checkpoint(problem, prepared, directory)
    return problem.on(device)


def _kept(task: Task, seed: int) -> Problem:
    """The problem of a seed, its sets read once."""
    problem = task.problem(seed)
    with seeded(seed):
        return problem.kept()


def _check_same_rows(problem: Problem, prepared: TrainedModel) -> None:
    with seeded(prepared.seed):
        found = row_set_digests(problem)
    other = sorted(name for name, rows in prepared.rows.items() if found.get(name) != rows)
    if other:
        raise NonDeterministicError(
            f"the same rows for {prepared.task} seed {prepared.seed} in every process",
            received=f"other rows than before in: {', '.join(other)}",
            remedy="draw the data from the seed that the factory is given; pad rows that are shuffled to one length.",
        )


def load_checkpoint(problem: Problem, prepared: TrainedModel, directory: Path) -> None:
    """Put the weights and buffers of stage one back into the network. Errors: StateError for those of another."""
    content = (prepared.weights or checkpoint_path(directory, prepared.task, prepared.seed)).read_bytes()
    key = _key_of(content)
    if key != prepared.key:
        raise StateError(
            f"the weights of {prepared.task} seed {prepared.seed} with key {prepared.key}",
            received=f"a file with key {key}: another run has trained it for other code, data or device since",
            remedy="give each code, data and device a directory of its own, and the same command again.",
        )
    problem.model.load_state_dict(safetensors.torch.load(content), strict=False)  # all that training can move
    problem.model.eval()


def checkpoint_path(directory: Path, task: str, seed: int) -> Path:
    """Where the weights of a (task, seed) lie."""
    return directory / "checkpoints" / slug(task) / f"seed-{seed}.safetensors"


def known_training(path: Path) -> tuple[str, float] | None:
    """Content key and seconds of a weights file that is whole; else None."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return metadata["key"], float(metadata["seconds"])
    except (OSError, safetensors.SafetensorError, KeyError):
        return None


def _key_of(content: bytes) -> str | None:
    """From the header of the format: eight bytes of length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    key: str | None = json.loads(content[8 : 8 + length]).get("__metadata__", {}).get("key")
    return key


def _train(problem: Problem, seed: int, key: str) -> tuple[float, bytes]:
    assert problem.recipe is not None
    start = time.perf_counter()
    with seeded(seed):
        train_map(
            problem.model,
            problem.likelihood,
            problem.train,
            prior_precision=problem.prior_precision,
            recipe=problem.recipe,
            seed=seed,
        )
    seconds = time.perf_counter() - start
    state = {name: _plain(t) for name, t in _moved(problem.model).items()}
    return seconds, safetensors.torch.save(state, metadata={"key": key, "seconds": repr(seconds)})


def _moved(model: nn.Module) -> dict[str, Tensor]:
    """What training can change: weights that require a gradient, and buffers. A frozen body is in the problem."""
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in frozen}


def _plain(tensor: Tensor) -> Tensor:
    """A copy of its own, since the format has no tied tensors."""
    return tensor.detach().cpu().clone().contiguous()


def _key(task: Task, problem: Problem, place: TrainingJob, code: str) -> str:
    digest = problem_digest(problem)
    return content_key(task=task.name, seed=place.seed, problem=digest, code=code, device=place.device)


def _code(task: Task) -> str:
    """A digest of what makes the problems of a task: both packages, the factory, and the user's modules it imports."""
    return content_key(packages=source_digest(), factory=content_digest(task.make, values=False))
