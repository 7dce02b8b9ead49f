"""LoRA ensemble: one frozen network, several adapters trained alike from other beginnings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from estimators.baselines.ensemble import DeepEnsemble
from estimators.baselines.fresh_adapters import trained_tensors, with_fresh_adapters
from estimators.likelihoods import Likelihood
from estimators.option_checks import checked_integer
from estimators.training.recipe import Recipe

__all__ = ["LoRAEnsemble"]


class LoRAEnsemble(DeepEnsemble):
    """Members that differ in their adapters alone (Wang, Aitchison & Rudolph 2023; Halbheer et al. 2024).

        f_1 = the model that was passed, f_2 ... f_S = its frozen weights with fresh adapters, trained by `recipe`

    The model has its adapters already, and nothing else in it requires a gradient but what is trained with them, such
    as a head. A member begins with adapters that peft draws anew (A random, B zero) and with heads as their
    `reset_parameters` gives them, and is trained on the same loss and prior, in another order of the rows. Stored are
    the trained weights of each member; the frozen ones are shared.

    Args:
        recipe: how a member is trained: as the adapters of the model were, for members that are alike.
        n_members: S >= 2, the model itself included; a larger ensemble begins with the same members.
        seed: of initialisations and orders.

    Fitted: `members_`, the trained tensors of f_2 ... f_S by name; `fit_report_`.
    Errors: ModelError where nothing is frozen, or where a layer does not say how its weights begin.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        recipe: Recipe,
        n_members: int = 5,
        seed: int = 0,
        prior_precision: float | Mapping[str, float] = 1.0,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            make_model=partial(with_fresh_adapters, model),
            recipe=recipe,
            n_members=checked_integer("n_members", n_members, at_least=2),
            seed=seed,
            prior_precision=prior_precision,
        )

    def _kept(self, trained: nn.Module) -> dict[str, Tensor]:
        return trained_tensors(trained, self.model)
