"""RegVar inside `transformers.Trainer`: a mixin that adds the regularizer to the training loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from estimators.errors import DataError, OptionError
from estimators.integrations.manual_training import mean_absolute_penalty
from estimators.models.outputs import output_tensor

__all__ = ["MeanAbsoluteTraining"]

_IGNORED = -100
"""Label of tokens without a target, as in transformers."""


class MeanAbsoluteTraining:
    """Mixin for `transformers.Trainer` that adds (λ/N) · mean |logits| to the loss of each training batch.

    Source: McInerney & Kallus 2025, Figure 2. Evaluation is unchanged. Start at the trained network, and build the
    estimator from both networks with `RegularizedPair`. The decoupled weight decay of AdamW is not the prior of a loss:
    for the numbers of `MeanAbsolute` use SGD, or `weight_decay=0` and an L2 term in the loss.

    Args:
        args: positional arguments of the Trainer.
        lam: λ > 0.
        n_data: N; None takes `len(train_dataset)`. For token losses pass the number of tokens with a label.
        causal: whether the logits at a token predict the next token, as in a causal language model. If so, labels are
            shifted before tokens with a label (≠ −100) are selected.
        keywords: keyword arguments of the Trainer.

    Example:
        >>> class Trainer:  # stands for transformers.Trainer
        ...     def __init__(self, model):
        ...         self.model = model
        >>> class RegularizedTrainer(MeanAbsoluteTraining, Trainer):
        ...     pass
        >>> RegularizedTrainer(nn.Linear(2, 3), lam=0.1, n_data=100).regvar_lam
        0.1
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
        """Return the Trainer's loss, plus the regularizer while the model trains.

        Args:
            model: the network.
            inputs: arguments of the forward by name, with "labels".
            return_outputs: whether to return the outputs of the model, too.
            num_items_in_batch: number of labels in all accumulated batches, if the Trainer passes it.

        Returns:
            The loss, a scalar; or the loss and the outputs.
        """
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
        penalty = mean_absolute_penalty(logits, lam=self.regvar_lam, n_data=n_data, mask=mask)
        if num_items is None or not getattr(self, "model_accepts_loss_kwargs", False):
            return penalty
        counted = logits[..., 0].numel() if mask is None else mask.sum()  # the loss is a sum over num_items
        return penalty * counted / num_items

    def _counted(self, logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the logits and a mask of those with a label; None for the mask if there is one label per sequence."""
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
