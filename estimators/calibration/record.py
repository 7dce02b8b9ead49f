"""The record of a choice on validation rows: the calibration, all trials, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from estimators.calibration.calibration import Calibration, TrialRecord
from estimators.calibration.trials import ScoreGrid, Trial
from estimators.calibration.tuned_option import TunedOption, is_number
from estimators.errors import OptionError
from estimators.option_checks import shown

__all__ = ["CalibrationRecord"]


@dataclass(frozen=True)
class CalibrationRecord:
    """The choice of an option's value and of a calibration on validation rows, with every score. Made by `fit`.

    Attributes:
        calibration: the calibration to apply to the predictions of the chosen fit.
        option: the option whose values were tried.
        trials: one trial per value, in the order of the values.
        chosen: the chosen trial.
        seconds: wall-clock time of all fits, predictions and scores.
        validation_rows: the number of validation rows.
    """

    calibration: Calibration
    option: TunedOption
    trials: tuple[Trial, ...]
    chosen: Trial
    seconds: float
    validation_rows: int

    def __repr__(self) -> str:
        """Return the choice, its score and what was tried, in a few lines."""
        tried = [trial for trial in self.trials if trial.score is not None]
        failed = f", {len(self.trials) - len(tried)} failed" if len(tried) < len(self.trials) else ""
        ends = f"\n  at the end of a range: {', '.join(self.at_boundary)}" if self.at_boundary else ""
        option = "" if self.option.name is None else f"\n  {self._tried()}{failed}"
        return (
            f"{type(self).__name__}({_shown(self.chosen_values)}\n"
            f"  {self.calibration.score_name} {self.calibration.score:.4g} on {self.validation_rows} validation rows, "
            f"{self.uncalibrated_score:.4g} without calibration{option}{ends})"
        )

    def _tried(self) -> str:
        values = [trial.value for trial in self.trials]
        if len(values) > 1 and all(map(is_number, values)):
            return f"{len(values)} values of {self.option.name} tried, {min(values):.3g} to {max(values):.3g}"
        return f"{len(values)} value{'s' if len(values) > 1 else ''} of {self.option.name} tried"

    @property
    def uncalibrated_score(self) -> float:
        """The score of the fit that was given, with variance scale 1 and temperature or noise factor 1."""
        given = next((trial for trial in self.trials if not trial.refitted), self.chosen)
        return math.nan if given.calibration is None else given.calibration.uncalibrated_score

    @property
    def value(self) -> Any:  # noqa: ANN401
        """The chosen value of the option."""
        return self.chosen.value

    @property
    def fits(self) -> int:
        """The number of fits that tuning made, without the given one."""
        return sum(trial.refitted for trial in self.trials)

    @property
    def passes(self) -> float:
        """The forward and backward passes over the training rows of all trials."""
        return math.fsum(trial.passes for trial in self.trials)

    @property
    def at_boundary(self) -> tuple[str, ...]:
        """The names of choices at an end of their range. Values of the option whose fits failed are left out."""
        return (*self._option_at_boundary(), *self.calibration.at_boundary)

    @property
    def chosen_values(self) -> dict[str, Any]:
        """The chosen value of the option and the chosen calibration by name, with their score."""
        chosen = {} if self.option.name is None else {self.option.name: self.value}
        return {**chosen, **self.calibration.chosen()}

    def _option_at_boundary(self) -> Sequence[str]:
        usable = [trial for trial in self.trials if trial.score is not None and is_number(trial.value)]
        worse = any(trial.score != self.chosen.score for trial in usable)
        if self.option.name is None or not worse or self.chosen.value not in (usable[0].value, usable[-1].value):
            return ()
        return (self.option.name,)

    def score_grid(self, *, noise_or_temperature: float | None = 1.0) -> ScoreGrid:
        """Return the scores over values of the option and variance scales.

        With the option "solver.lam" this is Figure 4 of McInerney and Kallus (2025).

        Args:
            noise_or_temperature: the factor of σ or the softmax temperature of the scores, a value of its grid. None:
                the best of them at each point.

        Returns:
            The scores (A, B) of A values and B variance scales.

        Raises:
            OptionError: for a `noise_or_temperature` that was not tried, and if no value of the option is a number.
        """
        trials = [trial for trial in self.trials if trial.calibration is not None and is_number(trial.value)]
        if not trials:
            raise OptionError(
                "an option with numeric values", received=repr(self.option.name), remedy="tune over numbers."
            )
        grid = self.calibration.grid
        tried = grid.noise_or_temperature(self.calibration.kind)
        if noise_or_temperature is not None and noise_or_temperature not in tried:
            raise OptionError(
                f"noise_or_temperature among {tried}, or None",
                received=repr(noise_or_temperature),
                remedy="1, or None.",
            )
        every = torch.stack([trial.calibration.scores for trial in trials if trial.calibration is not None])
        scores = every.amin(-1) if noise_or_temperature is None else every[..., tried.index(noise_or_temperature)]
        return ScoreGrid(tuple(float(trial.value) for trial in trials), grid.variance_scales, scores)

    def to_dict(self) -> dict[str, Any]:
        """Return every point of every grid, the choice and the cost in JSON types, rounded to eight digits."""
        chosen = {"value": self.value, **self.calibration.chosen()}
        return {
            "option": self.option.name,
            "unit": self.option.unit,
            "points": [record for trial in self.trials for record in self._records(trial)],
            "chosen": _rounded(chosen),
            "at_boundary": list(self.at_boundary),
            "refined": self.calibration.refined,
            "failures": {str(trial.value): trial.failure for trial in self.trials if trial.failure is not None},
            "seconds": self.seconds,
            "fits": self.fits,
            "passes": self.passes,
            "score_name": self.calibration.score_name,
            "validation_rows": self.validation_rows,
        }

    def _records(self, trial: Trial) -> list[TrialRecord]:
        if trial.calibration is None:
            return [_rounded({"value": trial.value, **dict.fromkeys(self.calibration.chosen())})]
        return [_rounded({"value": trial.value, **record}) for record in trial.calibration.points()]


def _rounded(record: dict[str, Any]) -> TrialRecord:
    return {name: float(f"{value:.8g}") if is_number(value) else None for name, value in record.items()}


def _shown(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:.4g}" if is_number(value) else f"{name}={shown(value, 200)}"
        for name, value in values.items()
        if name != "score"
    )
