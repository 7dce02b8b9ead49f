"""A process that works off one item at a time, seen from both ends of the pipe to it.

Each worker has a pipe of its own. A pool of the standard library has one queue for all: when a process dies there, all
that were running are lost, and none can be named.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any, Generic, TypeVar

import torch

from bdl_bench.runner.executors.retries import attempted

__all__ = ["READY", "WorkerProcess", "fresh_processes"]

Item = TypeVar("Item")
READY = b"ready"
_PATIENCE = 5.0  # seconds for an idle process to leave


class WorkerProcess(Generic[Item]):
    """One process. It is given an item when it has said that it is ready; `item` is the one that it has, or None.

    `deadline` is when its item's time is up, of the monotonic clock.
    """

    def __init__(self, work: Callable[[Item], Any], threads: int) -> None:
        context = fresh_processes(work.__module__)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, threads, dict(os.environ)))
        self.process.start()
        theirs.close()
        self.ready = False
        self.item: Item | None = None
        self.deadline = math.inf

    @property
    def signs(self) -> list[Any]:
        """What to wait for: a message, or the end of the process."""
        return [self.connection, self.process.sentinel]

    def send(self, item: Item, seconds: float | None) -> None:
        """Hand over the item, and its time. Errors: those of pickle; a process that is gone is noticed by `hear`."""
        content = pickle.dumps(item)
        self.deadline = math.inf if seconds is None else time.monotonic() + seconds
        try:
            self.connection.send_bytes(content)
        except OSError:
            return

    def hear(self) -> bytes | None:
        """The next message; None when the process has ended without one."""
        try:
            return self.connection.recv_bytes() if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def has_spoken(self) -> bool:
        """Whether there is something to hear, the end of the process for one."""
        return bool(wait(self.signs, 0))

    def rest(self) -> None:
        """It has done its item."""
        self.item, self.deadline = None, math.inf

    def exit_code(self) -> int | None:
        """Of the process, which is at its end."""
        self.process.join(_PATIENCE)
        code: int | None = self.process.exitcode
        return code

    def dismiss(self) -> None:
        """Tell it to leave; at once where it is at work, since it writes nothing that could be lost."""
        self.connection.close()
        if self.item is not None or not self.ready:
            self.process.kill()

    def join(self) -> None:
        """Wait until it is gone."""
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()


def fresh_processes(module: str) -> SpawnContext | ForkServerContext:
    """How processes are started: from a server that has done nothing but import modules, so that it is done once.

    A server has none of the threads, locks and device contexts that make a plain fork unsafe.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bdl_bench.runner.warm_up", module])
    return context


def _serve(connection: Connection, work: Callable[[Any], Any], threads: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # the server may be older than a change of them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who started us ends us
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    connection.send_bytes(READY)
    while True:
        try:
            item = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(attempted(work, item))


def _leave_with_parent() -> None:
    """A killed run leaves nobody who computes on and whose result nobody takes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
