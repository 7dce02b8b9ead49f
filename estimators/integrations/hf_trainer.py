"""The published recipe inside `transformers.Trainer`: a mixin that adds the term to the loss, in training only."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from estimators.errors import DataError, OptionError
from estimators.integrations.manual_training import mean_absolute_penalty
from estimators.models.network import output_tensor

__all__ = ["MeanAbsoluteTraining"]

_IGNORED = -100


class MeanAbsoluteTraining:
    """Put before `Trainer`: `class RegularizedTrainer(MeanAbsoluteTraining, Trainer): ...`.

    Adds (λ/N) · mean |logits| to the loss of each training batch (McInerney & Kallus 2025, Figure 2); evaluation is as
    before. Start it at the trained network, and build the estimator from the two with `RegularizedPair`.

    Args, before those of the Trainer, by keyword:
        lam: λ > 0.
        n_data: N; None takes `len(train_dataset)`. For token losses pass the number of tokens that carry a label.
        causal: the logits at a token speak of the next one, as in a causal language model: labels are shifted before
            the tokens that count (label ≠ −100) are chosen. False chooses them where they stand.

    The decoupled weight decay of AdamW is not the prior of a loss: `weight_decay=0` and a penalty of one's own, or SGD,
    where the numbers are to be those of `MeanAbsolute`.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        lam: float,
        n_data: int | None = None,
        causal: bool = False,
        **keywords: Any,  # noqa: ANN401
    ) -> None:
        self.regvar_lam, self.regvar_n_data, self.regvar_causal = lam, n_data, causal
        super().__init__(*args, **keywords)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        """The Trainer's own loss, and the penalty while the model trains."""
        labels = inputs.get("labels")
        loss, outputs = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training:
            loss = loss + self._penalty(output_tensor(outputs), labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _penalty(self, logits: Tensor, labels: Tensor | None, num_items: Tensor | int | None) -> Tensor:
        logits, mask = self._counted(logits, labels)
        n_data = self._n_data()
        perturbation = mean_absolute_penalty(logits, lam=self.regvar_lam, n_data=n_data, mask=mask)
        if num_items is None or not getattr(self, "model_accepts_loss_kwargs", False):
            return perturbation
        counted = logits[..., 0].numel() if mask is None else mask.sum()  # the loss is a sum over num_items
        return perturbation * counted / num_items

    def _counted(self, logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The logits, and which of their rows carry a label; all, where labels are one a sequence."""
        if labels is None or labels.shape != logits.shape[:-1] or logits.ndim == 2:
            return logits, None
        if not self.regvar_causal:
            return logits, labels != _IGNORED
        return logits[:, :-1], labels[:, 1:] != _IGNORED

    def _n_data(self) -> int:
        if self.regvar_n_data is not None:
            return self.regvar_n_data
        data = getattr(self, "train_dataset", None)
        if data is None:
            raise DataError("a train_dataset", received="none", remedy="pass train_dataset to the Trainer.")
        if not hasattr(data, "__len__"):
            raise OptionError(
                "n_data, for a train_dataset without a length",
                received=f"a {type(data).__name__}",
                remedy="pass n_data, the number of training rows.",
            )
        return len(data)
