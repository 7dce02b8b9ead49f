"""Split conformal prediction on top of any fitted estimator: intervals and sets of classes with guaranteed coverage."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from estimators.calibration.conformal_scores import (
    aps_scores,
    conformal_threshold,
    has_threshold,
    lac_scores,
    scaled_residuals,
    two_classes,
    within_threshold,
)
from estimators.calibration.scores import check_none_missing
from estimators.calibration.validation import ValidationPredictions, ValidationRows
from estimators.curvature.fisher import uniform_numbers
from estimators.data.inputs import as_inputs
from estimators.errors import DataError, NotFittedError, OptionError, StateError, UncalibratedWarning, UnsupportedError
from estimators.likelihoods import Likelihood
from estimators.likelihoods.prediction import Prediction, log_odds_of, log_probs_of
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import checked_choice, checked_number, checked_seed, shown
from estimators.persistence.checksums import digest, row_hashes
from estimators.persistence.fit_digest import fit_digest
from estimators.persistence.state import ABOUT, FittedState, model_digest, read_file, write_file

__all__ = ["Predicts", "SplitConformal"]

_SCORES = {"regression": ("scaled_residual", "residual"), "classification": ("lac", "aps", "randomized_aps")}
_NAMES = ("auto", *(name for names in _SCORES.values() for name in names))
_KIND = "SplitConformal"


class Predicts(Protocol):
    """A fitted estimator, a tuned one, or any other object with `predict`."""

    def predict(self, x: PyTree) -> Prediction:
        """Return the prediction of M rows."""
        ...


class SplitConformal:
    """Intervals and sets of classes that contain the label with a chosen probability, whatever the prediction is.

    `fit` computes a score of each validation row from its prediction and its label. The set of a query has every label
    whose score is at most the ⌈(n + 1) · level⌉-th smallest of these n (Vovk et al. 2005; Lei et al. 2018). If the
    validation rows and the query are exchangeable, its coverage is at least `level`, and less than level + 1/(n + 1)
    without ties. This holds on average over splits and rows, and not for each kind of row. A better prediction has
    smaller sets. With fewer than level/(1 − level) validation rows there is no finite threshold: intervals are
    (−∞, ∞), and sets have every class.

        prediction       `score`             score of the label y           interval, or set of classes
        regression       "scaled_residual"   |y − m| / s                    m ± q · s
                         "residual"          |y − m|                        m ± q
        classes, binary  "lac"               −log p_y                       classes with −log p_c <= q; may be empty
                         "aps"               Σ p_c over p_c >= p_y          classes whose score is at most q
                         "randomized_aps"    that minus (1 − u) · p_y       the same rule; may be empty

    m is the predicted mean, s the standard deviation `prediction.std`, p_c the probability of class c, q the threshold
    and u a uniform random number in (0, 1).

    Every output has its own threshold, so that coverage holds for each, and not for all of a row at once. "lac" has the
    smallest sets on average (Sadinle et al. 2019), "aps" covers rows of different difficulty more evenly (Romano et al.
    2020), and "randomized_aps" has smaller sets of exact coverage. The u of a row is a function of its inputs and the
    seed, so that its set does not depend on other rows.

    Args:
        estimator: a fitted estimator, a `Tuned` one, or any object with `predict(x)` that returns a `Prediction`.
        score: "scaled_residual" or "residual" for regression; "lac", "aps" or "randomized_aps" for classes. "auto":
            "scaled_residual" or "lac".
        seed: the seed of u in "randomized_aps".

    Attributes:
        scores_: scores of the validation rows in ascending order: (n,) for classes, otherwise (n, C), one column per
            output.
        score_: the score in use.

    Raises:
        OptionError: for an unknown score, a score of another kind of prediction, or a seed without randomisation.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators import LinearizedLaplace, SplitConformal
        >>> model = nn.Linear(3, 2)
        >>> laplace = LinearizedLaplace(model, "regression").fit([(torch.randn(20, 3), torch.randn(20, 2))])
        >>> conformal = SplitConformal(laplace).fit([(torch.randn(40, 3), torch.randn(40, 2))])
        >>> low, high = conformal.interval(torch.randn(5, 3), level=0.9)
        >>> low.shape, bool((low < high).all())
        (torch.Size([5, 2]), True)
    """

    scores_: Tensor
    score_: str
    kind_: str

    def __init__(self, estimator: Predicts, *, score: str = "auto", seed: int = 0) -> None:
        if not callable(getattr(estimator, "predict", None)):
            raise OptionError(
                "an object with predict(x)", received=shown(estimator), remedy="a fitted estimator, or a Tuned one."
            )
        self.estimator = estimator
        self.score = checked_choice("score", score, _NAMES)
        self.seed = checked_seed(seed)
        if seed != 0 and score != "randomized_aps":
            raise OptionError(
                'score="randomized_aps" for a seed',
                received=f"score={score!r}, seed={seed}",
                remedy="leave the seed out: nothing is random.",
            )

    def __repr__(self) -> str:
        """Return the estimator, the score, and the number of validation rows."""
        state = f"fitted on {len(self.scores_):,} validation rows" if hasattr(self, "scores_") else "not fitted"
        return f"{_KIND}({type(self.estimator).__name__}, score={self.score!r}; {state})"

    def fit(self, val_loader: Iterable[Any]) -> Self:
        """Compute the scores of the validation rows. The estimator does not change.

        Args:
            val_loader: a re-iterable of (x, y), in the units of the training loader. Neither the network nor its
                calibration may have seen these rows: a `fit(val_loader=...)` of the estimator needs others.

        Returns:
            This object, fitted.

        Raises:
            DataError: for invalid batches, and for predictions or targets that are not finite, are no classes, or are
                left out by `given` of the likelihood.
            UnsupportedError: for class predictions at several positions of a row.
            OptionError: for a score that the predictions do not have.
        """
        rows = ValidationRows.of(val_loader)
        parts = [self._scored(batch.x, batch.y) for batch in rows.batches]
        kinds = {kind for kind, _ in parts}
        shapes = {scores.shape[1:] for _, scores in parts}
        if len(kinds) > 1 or len(shapes) > 1:
            raise DataError(
                "one shape of outputs for all validation rows, whose outputs each have a threshold",
                received=f"shapes {sorted(tuple(shape) for shape in shapes)}",
                remedy="pad the rows to one length.",
            )
        self.kind_ = kinds.pop()
        self.score_ = self._score_of(self.kind_)
        self.scores_ = torch.cat([scores for _, scores in parts]).sort(dim=0).values
        return self

    def threshold(self, level: float = 0.9) -> Tensor:
        """Return the largest score of a label in the set.

        Args:
            level: the nominal coverage, in (0, 1).

        Returns:
            One number for classes, (); otherwise one per output, (C,). Infinite if there are too few validation rows.

        Raises:
            NotFittedError: before `fit`.
            OptionError: for a level outside (0, 1).
        """
        self._check_fitted()
        level = checked_number("level", level, above=0, below=1, remedy="0.9.")
        return conformal_threshold(self.scores_, level=level)

    def has_threshold(self, level: float = 0.9) -> bool:
        """Return whether there are enough validation rows for a finite threshold.

        Args:
            level: the nominal coverage, in (0, 1).

        Returns:
            Whether `threshold(level)` is finite.

        Raises:
            NotFittedError, OptionError: as `threshold`.
        """
        self._check_fitted()
        return has_threshold(len(self.scores_), level=checked_number("level", level, above=0, below=1, remedy="0.9."))

    def interval(self, x: PyTree, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Return the interval of each output.

        Args:
            x: M query rows.
            level: the nominal coverage, in (0, 1).

        Returns:
            Lower and upper ends, (M, C) each, in the units of `predict`.

        Raises:
            UnsupportedError: for classes.
            NotFittedError, OptionError: as `threshold`.
        """
        threshold = self.threshold(level)
        if self.kind_ != "regression":
            raise UnsupportedError(
                "a regression estimator for intervals", received=f"one of {self.kind_}", remedy="predict_set(x, level)."
            )
        prediction = self._predict(x)
        half = threshold.to(prediction.mean)
        if self.score_ == "scaled_residual":
            half = half * prediction.std
        return prediction.mean - half, prediction.mean + half

    def predict_set(self, x: PyTree, level: float = 0.9) -> Tensor:
        """Return which classes are in the set of each row.

        Args:
            x: M query rows.
            level: the nominal coverage, in (0, 1).

        Returns:
            Booleans (M, C); for C binary outputs (M, C, 2), whether the set of each output has 0 and 1.

        Raises:
            UnsupportedError: for regression.
            NotFittedError, OptionError: as `threshold`.
        """
        threshold = self.threshold(level)
        if self.kind_ == "regression":
            raise UnsupportedError(
                "an estimator of classes for sets", received="one of regression", remedy="interval(x, level)."
            )
        scores = self._class_scores(x, self._predict(x))
        return within_threshold(scores, threshold.to(scores)[..., None])

    def _scored(self, x: PyTree, y: Tensor) -> tuple[str, Tensor]:
        """Return the kind of a batch of validation rows, and the scores of their labels in float64."""
        predicted, likelihood = self._predict(x), self._likelihood
        if likelihood is not None:
            likelihood.check_targets(predicted.mean, y)
        ((prediction, y),) = ValidationPredictions.of(predicted, y).parts
        check_none_missing(y, likelihood, kind=prediction.kind)
        if prediction.kind == "regression":
            target = _in_target_units(likelihood, y)
            std = prediction.std if self._score_of(prediction.kind) == "scaled_residual" else torch.ones_like(y)
            scores = scaled_residuals(target, prediction.mean, std)
        else:
            all_scores, labels = self._class_scores(x, prediction), _labels(prediction, y, likelihood)
            scores = all_scores.gather(-1, labels[..., None])[..., 0]
        bad = scores.isnan() if prediction.kind != "regression" else ~scores.isfinite()  # −log p of p = 0 is infinite
        if bool(bad.any()):
            raise DataError(
                "finite predictions and targets of the validation rows",
                received=f"{int(bad.sum())} scores that are NaN or Inf",
                remedy="look at the predictions and targets of these rows.",
            )
        return prediction.kind, scores

    def _class_scores(self, x: PyTree, prediction: Prediction) -> Tensor:
        """Return the score of each class, (M, C), or of both values of each binary output, (M, C, 2), in float64."""
        if prediction.mean.ndim != 2:
            raise UnsupportedError(
                "one class prediction per row, or binary outputs (M, C)",
                received=f"outputs of shape {tuple(prediction.mean.shape)}",
                remedy="an estimator of one position; positions of one row are not exchangeable.",
            )
        score = self._score_of(prediction.kind)
        binary = prediction.kind == "binary"
        log_probs = two_classes(log_odds_of(prediction)) if binary else log_probs_of(prediction)
        if score == "lac":
            return lac_scores(log_probs)
        return aps_scores(log_probs, self._uniform(x, log_probs) if score == "randomized_aps" else None)

    def _uniform(self, x: PyTree, log_probs: Tensor) -> Tensor:
        """Return a number in (0, 1) for each class prediction, determined by the inputs of the row and the seed."""
        keys = [int.from_bytes(row[:8], "little", signed=True) for row in row_hashes(self._marked(x))]
        n = log_probs[0, ..., 0].numel()
        numbers = uniform_numbers(torch.tensor(keys, dtype=torch.int64), n, self.seed, 0)
        return numbers.to(log_probs).reshape(log_probs.shape[:-1])

    def _marked(self, x: PyTree) -> PyTree:
        """Return inputs in which tensors that the training rows share are marked, whatever their length."""
        for fitted in (self.estimator, getattr(self.estimator, "estimator", None)):
            objective = getattr(fitted, "objective_", None)
            if isinstance(objective, Objective):
                return objective.batches.layout.mark(as_inputs(x))
        return as_inputs(x)

    def _score_of(self, kind: str) -> str:
        """Return the score for a kind of prediction. Raises OptionError if the chosen one is of another kind."""
        names = _score_names(kind)
        return names[0] if self.score == "auto" else checked_choice("score", self.score, names)

    def _predict(self, x: PyTree) -> Prediction:
        """Return the prediction of the estimator; that it is not calibrated otherwise does not matter here."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UncalibratedWarning)
            return self.estimator.predict(x)

    @property
    def _likelihood(self) -> Likelihood | None:
        """The likelihood of the estimator, if it has one."""
        found = getattr(self.estimator, "likelihood", None)
        return found if isinstance(found, Likelihood) else None

    def state_dict(self) -> FittedState:
        """Return the scores of the validation rows, and what they belong to.

        Returns:
            The state, for `load_state_dict`.

        Raises:
            NotFittedError: before `fit`.
        """
        self._check_fitted()
        about = {"kind": self.kind_, "score": self.score_, "seed": self.seed, "estimator": _digest_of(self.estimator)}
        return {"scores": self.scores_, ABOUT: json.dumps({"class": _KIND, **about})}

    def load_state_dict(self, state: Mapping[str, Tensor | str]) -> Self:
        """Load the result of `state_dict` into this object, whose estimator and options are the same.

        Args:
            state: the result of `state_dict`.

        Returns:
            This object, fitted.

        Raises:
            StateError: for another score, seed or fit of the estimator, or the state of another class.
        """
        text, scores = state.get(ABOUT), state.get("scores")
        try:
            about = json.loads(text) if isinstance(text, str) else {}
        except json.JSONDecodeError:
            about = {}
        if not isinstance(scores, Tensor) or about.get("class") != _KIND:
            raise StateError(
                f"the state of a {_KIND}", received="another one", remedy="load(path) of the estimator itself."
            )
        score = _score_names(about["kind"])[0] if self.score == "auto" else self.score
        expected = {"score": score, "seed": self.seed, "estimator": _digest_of(self.estimator)}
        differing = [name for name, value in expected.items() if about[name] != value]
        if differing:
            name = differing[0]
            raise StateError(
                f"the scores of this {name}, {shown(expected[name])}",
                received=shown(about[name]),
                remedy="construct it with the options and the fitted estimator of the file, or fit again.",
            )
        self.kind_, self.score_, self.scores_ = about["kind"], about["score"], scores
        return self

    def save(self, path: str | Path) -> None:
        """Write the scores to one safetensors file, without the estimator. An interrupted write leaves no file.

        Args:
            path: the file to write.

        Raises:
            NotFittedError: before `fit`.
        """
        write_file(self.state_dict(), path)

    def load(self, path: str | Path) -> Self:
        """Load the scores in a file that `save` wrote.

        Args:
            path: the file.

        Returns:
            This object, fitted.

        Raises:
            StateError: as `load_state_dict`.
            FileNotFoundError: if there is no such file.
        """
        return self.load_state_dict(read_file(path))

    def _check_fitted(self) -> None:
        if not hasattr(self, "scores_"):
            raise NotFittedError(
                f"a fitted {_KIND}", received="one that is not fitted", remedy="call fit(val_loader) first."
            )


def _score_names(kind: str) -> tuple[str, ...]:
    """Return the scores of a kind of prediction, the default one first."""
    return _SCORES["regression" if kind == "regression" else "classification"]


def _labels(prediction: Prediction, y: Tensor, likelihood: Likelihood | None) -> Tensor:
    """Return the index of the label of each class prediction. Raises DataError for soft or absent labels."""
    labels = y.long()
    n_classes = 2 if prediction.kind == "binary" else prediction.mean.shape[-1]
    expected = prediction.mean.shape if prediction.kind == "binary" else prediction.mean.shape[:1]
    # `given` returns another likelihood if some labels are the ignore_index.
    absent = likelihood is not None and y.ndim == 1 and likelihood.given(y) is not likelihood
    if absent or y.shape != expected or bool(((labels != y) | (labels < 0) | (labels >= n_classes)).any()):
        raise DataError(
            f"hard labels 0..{n_classes - 1} of shape {tuple(expected)}",
            received=f"{y.dtype} of shape {tuple(y.shape)}, from {y.min()} to {y.max()}"
            f"{', some of them the ignore_index of rows without a label' if absent else ''}",
            remedy="argmax or round soft labels, and leave out rows without a label.",
        )
    return labels


def _in_target_units(likelihood: Likelihood | None, y: Tensor) -> Tensor:
    """Return targets of a loader in the units of `predict`."""
    if likelihood is None:
        return y
    none = torch.zeros_like(y)
    target = Prediction(y, none, "regression", aleatoric_variance=none, total_variance=none)
    return likelihood.to_target_units(target).mean


def _digest_of(estimator: object) -> str:
    """Return a digest of the fit of an estimator; its class alone if it cannot be saved."""
    name = type(estimator).__name__
    state_dict = getattr(estimator, "state_dict", None)
    if not callable(state_dict):
        return name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = state_dict()
    except UnsupportedError:
        return name
    model = getattr(getattr(estimator, "estimator", estimator), "model", None)
    parts = [fit_digest(state), *([model_digest(model)] if isinstance(model, nn.Module) else [])]
    return f"{name} {digest(*parts).hex()}"
