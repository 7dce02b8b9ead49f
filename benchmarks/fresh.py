"""Functions in a new process, whose peak memory does not include what ran before."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import torch

from bdl_bench.runner.peak_memory import peak_memory

__all__ = ["in_fresh_process"]

T = TypeVar("T")


def in_fresh_process(function: Callable[..., T], *arguments: object) -> tuple[T, int]:
    """Return the result of a picklable function, and the increase in peak resident bytes above the imports."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_with_peak_memory, partial(function, *arguments)).result()


def _with_peak_memory(function: Callable[[], T]) -> tuple[T, int]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with peak_memory("cpu") as found:
        result = function()
    return result, found.increase_bytes
