"""The published comparisons: their tasks, splits and methods, and the published column of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bdl_bench.reproduce.published import BDE, UCI, Published
from bdl_bench.tasks.uci import UCI_SETS
from estimators.errors import OptionError

__all__ = ["STUDIES", "Column", "Study", "StudyTask", "study_named"]

_METHODS = ("map", "dropout", "ensemble", "regvar", "last-layer-laplace", "laplace-kron", "mean-field-vi")
_LARGE = {"naval": 5, "protein": 5}
"""Splits of the sets whose 20 splits take hours; protein has no more than 5."""


@dataclass(frozen=True)
class Column:
    """The published column that a method is compared with.

    Args:
        method: name of the method.
        published: name of the column in the tables of the study.
    """

    method: str
    published: str


@dataclass(frozen=True)
class StudyTask:
    """A set of a comparison by one protocol.

    Args:
        data: name of the set.
        protocol: such as "40" (epochs); empty if there is only one.
        task: the registered task.
        splits: splits that run if no number is given.
        most: splits that exist.
    """

    data: str
    protocol: str
    task: str
    splits: int
    most: int

    def seeds(self, splits: int | None) -> range:
        """Return the seeds of the first splits.

        Args:
            splits: how many; None: the default number.

        Returns:
            The seeds, at most as many as splits exist.
        """
        return range(min(self.splits if splits is None else splits, self.most))


@dataclass(frozen=True)
class Study:
    """A published comparison.

    Args:
        name: on the command line.
        title: of the page.
        source: the papers, in words.
        tasks: all sets and protocols, the fastest first.
        methods: that run if none are named.
        published: numbers by metric ("RMSE", "NLL"), set and column.
        columns: which methods have a published column, by protocol.
        notes: what differs from the papers, in sentences.
        nll_from_rmse: whether the published NLL is that of a Gaussian whose variance is the mean squared error of the
            test rows, ½ log(2πe) + log RMSE.
        default_protocols: that run if none are named.
    """

    name: str
    title: str
    source: str
    tasks: Sequence[StudyTask]
    methods: Sequence[str]
    published: Mapping[str, Mapping[str, Mapping[str, Published]]]
    columns: Mapping[str, Sequence[Column]]
    notes: Sequence[str] = field(default_factory=tuple)
    nll_from_rmse: bool = False
    default_protocols: Sequence[str] = ("",)

    @property
    def sets(self) -> list[str]:
        """The names of the sets, in the order of the tasks."""
        return list(dict.fromkeys(task.data for task in self.tasks))

    @property
    def protocols(self) -> list[str]:
        """The names of the protocols."""
        return list(dict.fromkeys(task.protocol for task in self.tasks))

    def chosen(self, sets: Sequence[str] | None, protocols: Sequence[str] | None) -> list[StudyTask]:
        """Return the tasks of some sets and protocols.

        Args:
            sets: names; None: all.
            protocols: names; None: the default ones.

        Returns:
            The tasks, the fastest first.

        Raises:
            OptionError: for an unknown name.
        """
        wanted = self.sets if sets is None else list(sets)
        by = list(self.default_protocols) if protocols is None else list(protocols)
        for option, names, known in (("--sets", wanted, self.sets), ("--epochs", by, self.protocols)):
            unknown = [name for name in names if name not in known]
            if unknown or not names:
                raise OptionError(
                    f"{option} among {', '.join(known) or 'nothing'}, for {self.name}",
                    received=", ".join(unknown) or "none",
                    remedy=f"{option} {known[0]}." if known[0] else f"leave {option} out.",
                )
        return [task for task in self.tasks if task.data in wanted and task.protocol in by]


def _uci_tasks() -> list[StudyTask]:
    return [
        StudyTask(s.name, protocol, f"uci-{s.name}{suffix}", _LARGE.get(s.name, s.n_splits), s.n_splits)
        for protocol, suffix in (("40", ""), ("400", "-400"))
        for s in UCI_SETS
    ]


STUDIES = {
    "uci": Study(
        name="uci",
        title="UCI regression with the published splits",
        source="Hernández-Lobato and Adams (2015), Gal and Ghahramani (2016), Lakshminarayanan et al. (2017)",
        tasks=_uci_tasks(),
        methods=_METHODS,
        published=UCI,
        columns={
            "40": (Column("dropout", "dropout"), Column("ensemble", "ensemble")),
            "400": (Column("dropout", "dropout, tuned per split"),),
        },
        notes=(
            "A tenth of the training rows of each split is held out for tuning, and no network sees it. Published "
            "networks are trained on these rows, too.",
            "σ is one number per method, learned from the validation rows. The published ensembles predict a variance "
            "for each row, and are trained with adversarial examples.",
            "The protocol of 40 epochs takes Adam at 0.03. The ensemble paper states 0.1, with which the last iterate "
            "fluctuates. Of 0.1, 0.03, 0.01 and 0.003, this rate has the smallest errors on the validation rows.",
            "`mean-field-vi` continues from the trained weights for at least 200 epochs and 2000 steps of its own, so "
            "that it trains longer than the others.",
        ),
        default_protocols=("40",),
    ),
    "bde": Study(
        name="bde",
        title="Airfoil and bike sharing by the protocol of bde",
        source="Arvanitis et al. (2025), bde: A Python package for Bayesian deep ensembles via MILE",
        tasks=[StudyTask(name, "", f"{name}-bde", 5, 1000) for name in ("airfoil", "bike")],
        methods=(*_METHODS, "mile"),
        published=BDE,
        columns={"": (Column("ensemble", "deep ensemble"), Column("mile", "BDE (MILE)"))},
        notes=(
            'The published "NLL (mean regr.)" takes the RMSE of the test rows as σ, so that it is ½ log(2πe) + log '
            "RMSE and says nothing about the predicted variance. The same is shown of ours here.",
            "Ensembles have 5 members here and 10 there; their networks predict a variance for each row.",
        ),
        nll_from_rmse=True,
    ),
}


def study_named(name: str) -> Study:
    """Return a comparison by its name.

    Args:
        name: such as "uci".

    Returns:
        The comparison.

    Raises:
        OptionError: for an unknown name.
    """
    if name not in STUDIES:
        raise OptionError(f"one of {', '.join(STUDIES)}", received=repr(name), remedy="bdl-bench reproduce uci.")
    return STUDIES[name]
