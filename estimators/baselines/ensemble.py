"""Deep ensemble: networks trained alike from other beginnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from estimators.baselines.members import MembersEstimator
from estimators.baselines.report import PassReport
from estimators.baselines.retraining import MakeModel, Retraining, checked_make_model, tensors_by_name
from estimators.likelihoods import Likelihood
from estimators.objective import Objective
from estimators.option_checks import checked_instance, checked_integer, checked_seed
from estimators.progress import track
from estimators.pytrees import PyTree
from estimators.recipe import Recipe
from estimators.rng import member_seeds
from estimators.state import Learned

__all__ = ["DeepEnsemble"]


class DeepEnsemble(MembersEstimator):
    """Networks trained from independent initialisations and orders of the rows (Lakshminarayanan et al. 2017).

        f_1 = the model that was passed, f_2 ... f_S = make_model() trained by `recipe` on the same loss and prior

    Their variance is that between local optima, of all weights at once; it is no approximation of a Laplace variance.
    Each member keeps its own buffers, such as the statistics of a BatchNorm. No adversarial examples.

    Args:
        make_model: builds a fresh network of the architecture of `model`, drawing its weights from the global random
            state, which is put back.
        recipe: how a member is trained: as the model was, for members that are alike.
        n_members: S >= 2, the model itself included; a larger ensemble begins with the same members.
        seed: of initialisations and orders.

    Fitted: `members_`, the tensors of f_2 ... f_S by name; `fit_report_`, in which a member costs its epochs.
    Errors: ModelError for a `make_model` that does not fit; those of training.
    """

    retrains = True

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        *,
        make_model: MakeModel,
        recipe: Recipe,
        n_members: int = 5,
        seed: int = 0,
        prior_precision: float | Mapping[str, float] = 1.0,
    ) -> None:
        super().__init__(model, likelihood, prior_precision=prior_precision)
        self.make_model = checked_make_model(make_model)
        self.recipe = checked_instance("recipe", recipe, Recipe, remedy="Recipe(epochs=100).")
        self.n_members, self.seed = checked_integer("n_members", n_members, at_least=2), checked_seed(seed)

    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        retraining = Retraining(self.make_model, self.recipe, self.prior_precision)
        trained: list[nn.Module] = []
        for seed in track(member_seeds(self.seed, self.n_members - 1), "members", shown=progress_bar):
            trained.append(retraining.run(objective, seed, others=trained, progress_bar=False))
        self.members_ = [self._kept(model) for model in trained]
        for batch in objective.batches:
            for model, member in zip(trained, self.members_, strict=True):
                objective.network.check_exchanged(batch.x, member, model)
        self.fit_report_ = PassReport.of(objective)

    def _kept(self, trained: nn.Module) -> dict[str, Tensor]:
        """What tells a member from the model."""
        return tensors_by_name(trained)

    def _learned(self) -> Learned:
        tensors = {f"{i}/{name}": t for i, member in enumerate(self.members_) for name, t in member.items()}
        return tensors, {**super()._learned()[1], "exchange": self.network_.routes.swap}

    def _restore(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:
        super()._restore(objective, tensors, learned)
        objective.network.routes.swap = learned["exchange"]
        self.members_ = [{} for _ in range(self.n_members - 1)]
        for key, tensor in tensors.items():
            i, _, name = key.partition("/")
            self.members_[int(i)][name] = tensor

    def _members(self, x: PyTree) -> Tensor:
        network = self.network_
        with torch.no_grad():
            others = [network.with_pieces(member, x) for member in self.members_]
        return torch.stack([network.outputs(x), *others])
