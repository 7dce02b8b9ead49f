"""The grid: train once per (task, seed), then task × method × seed, each cell a record; what is done stays done."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from bdl_bench.claims import Claims
from bdl_bench.directories import check_directory, made
from bdl_bench.disk import Disk
from bdl_bench.events import Event, Listener
from bdl_bench.executors import ONE_WORKER, Workers, check_workers, executor_for
from bdl_bench.methods import methods_named
from bdl_bench.records import Record
from bdl_bench.stages import Stages
from bdl_bench.tasks import resolve_task
from estimators.errors import OptionError

__all__ = ["Event", "Grid"]


@dataclass(frozen=True)
class Grid:
    """Tasks (names or "module:factory"), methods and seeds to run into `directory`."""

    tasks: Sequence[str]
    methods: Sequence[str]
    seeds: Sequence[int]
    directory: Path
    device: str = "cpu"
    workers: Workers = ONE_WORKER
    tune: int = 0
    """Fits that each method may spend on its option; 0 tunes nothing, 1 the calibration of the given fit alone."""

    def check(self) -> None:
        """OptionError for an unknown task, method or device, a directory or workers that cannot be, nothing to run."""
        for name in ("tasks", "methods"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise OptionError(f"{name} as a list of names", received=repr(value), remedy=f"[{value!r}].")
        for task in self.tasks:
            resolve_task(task)
        methods_named(self.methods)
        if not (self.tasks and self.methods and self.seeds):
            raise OptionError("a task, a method and a seed at least", received="none", remedy="name some.")
        if self.tune < 0:
            raise OptionError("tune >= 0", received=str(self.tune), remedy="0 for no tuning, 5 for five fits a method.")
        check_workers(self.workers)
        check_directory(self.directory)
        _check_device(self.device, elsewhere=self.workers.name == "ray")

    @property
    def steps(self) -> list[tuple[str, int, str | None]]:
        """Every training and every cell once: task, seed, method; a method of None is the training."""
        places = [(task, seed) for task in dict.fromkeys(self.tasks) for seed in dict.fromkeys(self.seeds)]
        cells = [(*place, method) for place in places for method in dict.fromkeys(self.methods)]
        return [*((*place, None) for place in places), *cells]

    @property
    def n_steps(self) -> int:
        """How many trainings and cells there are."""
        return len(self.steps)

    def run(self, listener: Listener) -> list[Record]:
        """Run what is not yet done; the records of every cell, in the order tasks, methods, seeds.

        Several runs into one directory, of this machine or others, share the work. Leaving by an exception (Ctrl-C)
        keeps what is done and ends what is under way. Errors: OptionError as of `check`; FullDiskError.
        """
        self.check()
        for step in self.steps:
            listener(Event(*step, "planned"))
        with ExitStack() as stack:
            with Disk(self.directory).writing():
                made(self.directory)
                claims = stack.enter_context(Claims(self.directory))
            executor = stack.enter_context(executor_for(self.workers, device=self.device))
            records = Stages(self, listener, executor, claims).run()
        order = [(t, s, m) for t in self.tasks for m in self.methods for s in self.seeds]
        return [records[place] for place in order]


def _check_device(name: str, *, elsewhere: bool) -> None:
    try:
        device = torch.device(name)
        if not (elsewhere and device.type == "cuda"):
            torch.zeros(1, device=device)
        elif device.index:
            raise RuntimeError("ray gives each job one GPU, whose number is 0 there")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(
            "a device that is here", received=f"{name!r}: {reason}", remedy="--device cpu or cuda."
        ) from error
