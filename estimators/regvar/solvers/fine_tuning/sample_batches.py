"""Replicas that descend a flight after the other: only those in flight have slopes, momenta and averages in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from estimators.objective.objective import Objective
from estimators.persistence.checkpoint import Checkpoint
from estimators.persistence.state import Learned
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.runtime.memory import available_bytes

__all__ = ["Flights", "Landed", "most_in_flight", "replicas_at_once"]

_COPIES = 8  # of a replica in flight: iterate, slope and its parts, momentum, average
_SHARE = 0.125  # of the memory there is


def most_in_flight(displacement: Tensor) -> int:
    """Replicas whose state takes at most an eighth of the memory, for displacements like those (K, P)."""
    each = _COPIES * displacement.shape[1] * displacement.element_size()
    return max(1, int(_SHARE * available_bytes(displacement.device)) // each)


@dataclass(frozen=True)
class Landed:
    """Displacements (k, P), energies where they were computed, λ, the departure, the learning rate or the steps."""

    displacement: Tensor
    energies: SampleANormErrors | None
    lam: float
    bend: float
    rate: float | None = None
    steps: int | None = None

    @property
    def how(self) -> dict[str, Any]:
        """The numbers of it, in JSON types."""
        return {"landed_lam": self.lam, "bend": self.bend, "rate": self.rate, "landed_steps": self.steps}


@dataclass
class Flights:
    """K replicas, `size` at a time; where a checkpoint keeps them, those that have landed are kept, too."""

    n_replicas: int
    size: int
    checkpoint: Checkpoint
    landed: list[Landed] = field(default_factory=list)
    saved: Learned | None = None  # what the first flight from here goes on from

    @classmethod
    def resumed(
        cls, n_replicas: int, size: int, checkpoint: Checkpoint, saved: Learned | None, device: torch.device
    ) -> Flights:
        """From what the checkpoint had."""
        if saved is None:
            return cls(n_replicas, size, checkpoint)
        tensors, values = saved
        before = []
        if "landed" in tensors:
            energies = SampleANormErrors(tensors["energies"].to(device), values["n"]) if "energies" in tensors else None
            how = (values[name] for name in ("landed_lam", "bend", "rate", "landed_steps"))
            before = [Landed(tensors["landed"].to(device), energies, *how)]
        return cls(n_replicas, values["in_flight"], checkpoint, before, saved)

    def left(self) -> Iterator[slice]:
        """The flights that have not landed."""
        for start in range(self.n_landed, self.n_replicas, self.size):
            yield slice(start, start + self.size)

    @property
    def n_landed(self) -> int:
        """Replicas that have landed."""
        return sum(len(landed.displacement) for landed in self.landed)

    def land(self, landed: Landed) -> None:
        """Add a flight's end."""
        self.landed.append(landed)

    def keeping(self) -> Checkpoint:
        """The checkpoint of the flight that is next."""
        return _Kept(self, self.checkpoint, self.n_landed)

    @property
    def together(self) -> Landed:
        """All of them."""
        known = [landed.energies for landed in self.landed if landed.energies is not None]
        energies = SampleANormErrors.joined(known) if len(known) == len(self.landed) else None
        whole = torch.cat([landed.displacement for landed in self.landed])
        rates = [landed.rate for landed in self.landed if landed.rate is not None]
        steps = [landed.steps for landed in self.landed if landed.steps is not None]
        bend = max(landed.bend for landed in self.landed)
        lam = self.landed[-1].lam
        return Landed(whole, energies, lam, bend, min(rates, default=None), max(steps, default=None))


@dataclass(frozen=True)
class _Kept(Checkpoint):
    """A flight's state, and those that landed before it; `number` of them."""

    flights: Flights
    inner: Checkpoint
    number: int

    def load(self) -> Learned | None:
        saved, self.flights.saved = self.flights.saved, None
        if saved is None or saved[1]["number"] != self.number:
            return None
        return {name: tensor for name, tensor in saved[0].items() if name not in ("landed", "energies")}, saved[1]

    def save(self, state: Callable[[], Learned]) -> None:
        def all_of_it() -> Learned:
            tensors, values = state()
            values = {**values, "in_flight": self.flights.size, "number": self.number}
            if not self.flights.landed:
                return tensors, values
            before = self.flights.together
            tensors, values = {**tensors, "landed": before.displacement}, {**values, **before.how}
            if before.energies is None:
                return tensors, values
            return {**tensors, "energies": before.energies.terms}, {**values, "n": before.energies.n}

        self.inner.save(all_of_it)


_WORTH_A_VECTOR = 2**20  # numbers in all replicas: on a CPU 8 times as fast at 3·10³ parameters each, slower at 8·10⁵


def replicas_at_once(objective: Objective) -> int:
    """Replicas in one vectorised call: bounded by memory; on a CPU by what is worth it, and one for convolutions."""
    modules, at_once = objective.network.module.modules(), objective.network.vectors_at_once
    if objective.theta.device.type != "cpu":
        return at_once
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in modules):
        return 1
    return min(at_once, max(1, _WORTH_A_VECTOR // objective.theta.numel()))
