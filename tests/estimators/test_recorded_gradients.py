"""Replayed gradients are those of the network, and a network whose forward branches on its weights is found."""

import pytest
import torch
from torch import nn

from estimators.baselines import MAP
from estimators.objective import recorded_gradients
from estimators.objective.over_copies import data_gradients
from estimators.objective.recorded_gradients import BatchGradients, RecordingMismatchError
from estimators.sampling import SGHMC, MicrocanonicalLangevin
from estimators.training import Recipe
from estimators.variational import IVON, MeanFieldVI


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(recorded_gradients, "_CALLS_BEFORE", 0)


def objective_of(problem):
    return MAP(problem.model, problem.likelihood, prior_precision=2.5).fit(problem.loader).objective_


def copies(objective, size=0.3):
    noise = torch.randn(3, len(objective.theta), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return objective.theta + size * noise


@pytest.mark.parametrize("kind", ["regression", "classification", "binary"])
def test_replays_have_the_losses_and_gradients_of_the_network(kind, make_problem):
    problem = make_problem(kind)
    objective = objective_of(problem)
    gradients, count = BatchGradients(objective), objective.network.pass_counter
    for size in (0.1, 0.3, 1.0):
        for batch in objective.batches:
            thetas, before = copies(objective, size), count.cost_except("self-check")
            found = gradients(thetas, batch)
            assert count.cost_except("self-check") - before == pytest.approx(3 * len(batch))
            for mine, expected in zip(found, data_gradients(objective, thetas, batch), strict=True):
                assert torch.allclose(mine, expected, rtol=1e-10)
                assert not mine.requires_grad
    assert gradients.replayed == 12  # 6 + 6 + 6 + 2 rows, three times
    assert gradients.replays
    assert len(gradients._modules) == 2  # one per size of a batch


class BranchOnWeights(nn.Module):
    """A forward that takes another way if a weight is large; recorded at small ones."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2).double()

    def forward(self, x):
        scale = 2.0 if float(self.inner.weight.detach().abs().max()) > 5 else 1.0
        return scale * self.inner(x)


def test_a_forward_that_branches_on_weights_is_not_replayed(make_problem):
    """vmap has no value of a weight to branch on: one copy at a time."""
    problem = make_problem("regression", BranchOnWeights())
    objective = objective_of(problem)
    gradients, thetas = BatchGradients(objective), copies(objective)
    thetas[2] *= 100
    for batch in objective.batches:
        found, expected = gradients(thetas, batch)[1], data_gradients(objective, thetas, batch)[1]
        assert torch.allclose(found, expected, rtol=1e-10)
    assert gradients.replayed == 0


def test_a_late_disagreement_is_an_error_and_the_fit_is_made_without_replays(make_problem, monkeypatch):
    problem = make_problem("classification")
    objective = objective_of(problem)
    monkeypatch.setattr(recorded_gradients, "_CALLS_PER_CHECK", 5)
    gradients, batches = BatchGradients(objective), list(objective.batches)
    for _ in range(2):
        for batch in batches:
            gradients(copies(objective), batch)
    kept = dict(gradients._modules)
    gradients._modules = {kind: lambda *a, m=module: (2 * m(*a)[0], m(*a)[1]) for kind, module in kept.items()}

    def five_calls():
        return [gradients(copies(objective), batches[0]) for _ in range(5)]

    with pytest.raises(RecordingMismatchError):
        five_calls()


FITS = {
    "VI": lambda model: MeanFieldVI(model, "classification", recipe=Recipe(epochs=5, batch_size=7), n_samples=3),
    "IVON": lambda model: IVON(model, "classification", recipe=Recipe(5, 7, optimizer="sgd", lr=0.1), n_samples=3),
    "SGHMC": lambda model: SGHMC(model, "classification", burn_in=6, n_samples=3, thinning=4, batch_size=7),
    "microcanonical": lambda model: MicrocanonicalLangevin(
        model, "classification", warm_up=12, n_samples=2, thinning=3, n_chains=2
    ),
}


@pytest.mark.filterwarnings("ignore:Expected a maximum of the ELBO")  # five epochs
@pytest.mark.parametrize("name", FITS)
def test_fits_with_and_without_replays_are_equal(name, make_problem, monkeypatch):
    problem = make_problem("classification")
    replayed = FITS[name](problem.model).fit(problem.loader).variance(problem.query)
    used = BatchGradients._record

    def mismatch(self, *arguments):
        module = used(self, *arguments)
        calls = []

        def wrong_in_the_end(*inputs):
            calls.append(inputs)
            slopes, values = module(*inputs)
            return (slopes if len(calls) < 4 else 2 * slopes), values

        return wrong_in_the_end

    with monkeypatch.context() as patch:  # the fit starts again without replays
        patch.setattr(recorded_gradients, "_CALLS_PER_CHECK", 4)
        patch.setattr(BatchGradients, "_record", mismatch)
        again = FITS[name](problem.model).fit(problem.loader).variance(problem.query)
    monkeypatch.setattr(recorded_gradients, "_CALLS_BEFORE", 10**6)
    plain = FITS[name](problem.model).fit(problem.loader).variance(problem.query)
    assert torch.allclose(replayed, plain, rtol=1e-6)
    assert torch.allclose(again, plain, rtol=1e-6)
