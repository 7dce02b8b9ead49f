"""Work for the tests of executors; a module of its own, since other processes import it."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from bdl_bench.runner.executors import JobQueue, Workers, executor_for, local


class Odd(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def end(how):
    """Do what the words say, to the process that this runs in; else say which one it is."""
    word, _, rest = str(how).partition(" ")
    if word == "signal":
        os.kill(os.getpid(), int(rest))
    if word == "exit":
        os._exit(int(rest))
    if word == "variable":
        return os.environ.get(rest)
    if word == "sleep":
        time.sleep(float(rest))
    if word == "once":
        return once(Path(rest))
    return outcome(word)


def once(mark):
    """Kill the process the first time."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def outcome(word):
    if word == "sys.exit":
        sys.exit(4)
    if word == "raise":
        raise ValueError("on purpose")
    if word == "odd":
        raise Odd(1, 2)
    if word == "memory":
        bytearray(2**62)
    if word == "allocator":
        torch.empty(2**60)
    if word == "lambda":
        return lambda: None
    return os.getpid()


def meet(item):
    """Wait until the other one has started too: only where two run at a time does this end."""
    mine, other = map(Path, item)
    mine.touch()
    while not other.exists():
        time.sleep(0.01)
    return other.name


def write_pid_and_stay(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def pid_or_stay(item):
    return os.getpid() if item == "fine" else write_pid_and_stay(item)


def stay_in_a_worker(path):
    """Run by a process that is to be killed."""
    local._PRELOAD.clear()  # the worker needs no more than this module
    with executor_for(Workers(1, executor="local")) as executor:
        list(executor.run(write_pid_and_stay, JobQueue(iter([path]), print)))
