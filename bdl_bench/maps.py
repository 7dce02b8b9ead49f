"""Stage one of the grid: the network of one (task, seed), trained once and kept for every method."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from bdl_bench.fingerprints import problem_digest
from bdl_bench.problem import Problem
from bdl_bench.records import Training, content_key, slug
from bdl_bench.seeding import seeded
from bdl_bench.tasks import Task, resolve_task
from bdl_bench.versions import code_digest, file_digest
from estimators.atomic import write_bytes
from estimators.training import train_map

__all__ = ["Prepared", "load_problem", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """A (task, seed) ready for stage two: the content key of its network and data, and how the network was trained."""

    task: str
    seed: int
    key: str
    training: Training
    cached: bool


def prepare(task_name: str, seed: int, directory: Path, device: str) -> Prepared:
    """Train the network of (task, seed) by its recipe, unless the cached one has the same key."""
    task = resolve_task(task_name)
    problem = task.problem(seed)
    key = _key(task, problem, seed, device)
    if problem.recipe is None:
        return Prepared(task_name, seed, key, Training(seconds=None, recipe=None), cached=True)
    path = _path(directory, task_name, seed)
    metadata = _metadata(path)
    cached = metadata.get("key") == key
    seconds = float(metadata["seconds"]) if cached else _train(problem.on(device), seed, path, key)
    return Prepared(task_name, seed, key, Training(seconds=seconds, recipe=repr(problem.recipe)), cached)


def load_problem(prepared: Prepared, directory: Path, device: str) -> Problem:
    """The problem with its trained network in eval mode, on `device`."""
    problem = resolve_task(prepared.task).problem(prepared.seed)
    if problem.recipe is not None:
        restore(problem, prepared, directory)
    return problem.on(device)


def restore(problem: Problem, prepared: Prepared, directory: Path) -> None:
    """Put the trained weights and buffers of stage one back into the network."""
    state = safetensors.torch.load_file(_path(directory, prepared.task, prepared.seed))
    problem.model.load_state_dict(state)
    problem.model.eval()


def _train(problem: Problem, seed: int, path: Path, key: str) -> float:
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
    state = {name: _plain(t) for name, t in problem.model.state_dict().items()}
    write_bytes(path, safetensors.torch.save(state, metadata={"key": key, "seconds": repr(seconds)}))
    return seconds


def _plain(tensor: Tensor) -> Tensor:
    """A copy of its own, since the format has no tied tensors."""
    return tensor.detach().cpu().clone().contiguous()


def _key(task: Task, problem: Problem, seed: int, device: str) -> str:
    with seeded(seed):
        digest = problem_digest(problem)
    source = file_digest(task.source_file)
    return content_key(task=task.name, seed=seed, problem=digest, source=source, code=code_digest(), device=device)


def _path(directory: Path, task: str, seed: int) -> Path:
    return directory / "maps" / slug(task) / f"seed-{seed}.safetensors"


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return {}
