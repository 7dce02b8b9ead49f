"""LoRA ensemble: one frozen network with several adapters, trained from different initialisations."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from estimators.baselines.ensemble import DeepEnsemble
from estimators.baselines.fresh_adapters import trained_tensors, with_fresh_adapters
from estimators.likelihoods import Likelihood
from estimators.option_checks import PriorOption, checked_integer
from estimators.training.recipe import Recipe

__all__ = ["LoRAEnsemble"]


class LoRAEnsemble(DeepEnsemble):
    """Members that differ only in their adapters (Wang, Aitchison and Rudolph 2023; Halbheer et al. 2024).

        f_1 = the given model, f_2 ... f_S = its frozen weights with new adapters, trained by `recipe`

    The model has trained adapters. Only they, and layers that are trained with them such as a head, require a gradient.
    peft initialises the adapters of a member (A random, B zero), and `reset_parameters` its other trainable layers. A
    member is trained on the same loss and prior in another order of the rows. Only trained weights are stored per
    member.

    Args:
        model: the trained network, in eval mode; it is not changed.
        likelihood: "regression", "classification" or "binary", or a `Likelihood` with its parameters.
        prior_precision: δ > 0 of the Gaussian prior on the weights: a number, a tensor (P,), or a mapping from name
            patterns to numbers or tensors of the parameter's shape.
        recipe: how to train a member; use the recipe of the model's adapters.
        n_members: the number S >= 2 of members, including the model. The members of a larger ensemble start with those
            of a smaller one.
        seed: the seed of initialisations and orders.

    Attributes:
        members_: the trained tensors of f_2 ... f_S by name.
        fit_report_: the passes of the fit, including the training of the members.

    Raises:
        OptionError: for an invalid option. `fit` raises ModelError if nothing is frozen, or if a layer with trainable
            weights has no `reset_parameters`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators.training import Recipe
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
        >>> _ = model[0].requires_grad_(False)  # the frozen network; a trained peft model in real use
        >>> ensemble = LoRAEnsemble(model, "regression", recipe=Recipe(epochs=2), n_members=3)
        >>> ensemble.fit([(torch.randn(8, 3), torch.randn(8, 2))]).member_outputs(torch.randn(4, 3)).shape
        torch.Size([3, 4, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        recipe: Recipe,
        n_members: int = 5,
        seed: int = 0,
        prior_precision: PriorOption = 1.0,
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

    def _member_tensors(self, trained: nn.Module) -> dict[str, Tensor]:
        return trained_tensors(trained, self.model)
