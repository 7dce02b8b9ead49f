"""BatchEnsemble: members are explicit networks with rank-one factors, trained as by hand in plain torch."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from estimators.baselines import BatchEnsemble
from estimators.errors import ModelError, OptionError
from estimators.runtime.rng import seeded_random_state
from estimators.training import Recipe

STILL = Recipe(epochs=1, batch_size=7, optimizer="sgd", lr=1e-300)
SGD = Recipe(epochs=3, batch_size=64, optimizer="sgd", lr=0.05, momentum=0.0, schedule="constant")


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 1, groups=2, bias=False), nn.GroupNorm(2, 6), nn.Flatten(),
        nn.Linear(24, 3),
    ).double().eval()  # fmt: skip


def ensemble(problem, make_model, **options):
    given = {"recipe": SGD, "n_members": 3, "seed": 4, "prior_precision": problem.delta, **options}
    return BatchEnsemble(problem.model, problem.likelihood, make_model=make_model, **given)


def built(make_model, seed):
    with seeded_random_state(seed):
        return make_model()


@pytest.mark.parametrize(("make_model", "shape"), [(mlp, (4,)), (cnn, (2, 4, 4))], ids=["mlp", "cnn"])
def test_factors_of_one_are_the_plain_network(make_problem, make_model, shape):
    problem = make_problem("classification", make_model(), shape=shape)
    fitted = ensemble(problem, make_model, recipe=STILL, init_std=0.0).fit(problem.loader)
    plain = built(make_model, 4)(problem.query).detach()
    for outputs in fitted.member_outputs(problem.query):
        assert torch.allclose(outputs, plain, rtol=1e-12, atol=1e-14)
    assert float(fitted.variance(problem.query).max()) < 1e-25


def test_members_are_explicit_networks_and_the_layers_of_the_paper(make_problem):
    """W ∘ (a rᵀ) x = a ∘ W (r ∘ x), in linear layers and in grouped convolutions."""
    problem = make_problem("classification", cnn(), shape=(2, 4, 4))
    fitted = ensemble(problem, cnn).fit(problem.loader)
    outputs = fitted.member_outputs(problem.query)
    assert fitted.variance(problem.query).min() > 1e-3
    for s in range(3):
        theta = fitted.network_.subset.unflatten(fitted.members_.theta(s))
        shared = fitted.network_.subset.unflatten(fitted.members_.weights[: len(fitted.theta_)])
        factors = fitted.members_.factors(s)
        explicit = copy.deepcopy(problem.model)
        explicit.load_state_dict(theta)
        assert torch.allclose(explicit(problem.query), outputs[s], rtol=1e-10)
        (a0, r0), (a2, r2), (a5, r5) = (factors[f"{i}.weight"] for i in (0, 2, 5))
        assert [len(v) for v in (a0, r0, a2, r2, a5, r5)] == [4, 2, 6, 4, 3, 24]
        h = F.conv2d(problem.query * r0[:, None, None], shared["0.weight"]) * a0[:, None, None]
        h = (h + theta["0.bias"][:, None, None]).tanh()
        h = F.conv2d(h * r2[:, None, None], shared["2.weight"], groups=2) * a2[:, None, None]
        h = F.group_norm(h, 2, shared["3.weight"], shared["3.bias"]).flatten(1)
        h = (h * r5) @ shared["5.weight"].T * a5 + theta["5.bias"]
        assert torch.allclose(h, outputs[s], rtol=1e-10)


def test_training_is_that_of_plain_torch(make_problem):
    problem = make_problem("classification", mlp())
    network = built(mlp, 4)
    start = ensemble(problem, mlp, recipe=STILL).fit(problem.loader).members_
    leaf = {n: p.detach().clone().requires_grad_() for n, p in network.named_parameters() if "weight" in n}
    members = []
    for s in range(3):
        own = {}
        for n, (a, r) in start.factors(s).items():
            own |= {f"{n}/a": a.clone().requires_grad_(), f"{n}/r": r.clone().requires_grad_()}
        assert set(torch.cat([v.detach() for v in own.values()]).unique().tolist()) <= {-1.0, 1.0}
        own |= {n: p.detach().clone().requires_grad_() for n, p in network.named_parameters() if "bias" in n}
        members.append(own)
    leaves = [*leaf.values(), *(v for own in members for v in own.values())]
    optimizer = torch.optim.SGD(leaves, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        total = 0.0
        for own in members:
            w = {n: leaf[n] * torch.outer(own[f"{n}/a"], own[f"{n}/r"]) for n in leaf}
            h = (problem.x @ w["0.weight"].T + own["0.bias"]).tanh() @ w["2.weight"].T + own["2.bias"]
            penalty = sum(v.square().sum() for v in [*w.values(), own["0.bias"], own["2.bias"]])
            total = total + F.cross_entropy(h, problem.y, reduction="sum") + 0.5 * problem.delta * penalty
        (total / 3 / len(problem.x)).backward()
        optimizer.step()
    fitted = ensemble(problem, mlp).fit(problem.loader)
    for s, own in enumerate(members):
        theta = fitted.network_.subset.unflatten(fitted.members_.theta(s))
        for n in leaf:
            expected = leaf[n] * torch.outer(own[f"{n}/a"], own[f"{n}/r"])
            assert torch.allclose(theta[n], expected, rtol=1e-9, atol=1e-12)
        assert torch.allclose(theta["0.bias"], own["0.bias"], rtol=1e-9, atol=1e-12)


def test_a_fit_is_seeded_stored_once_and_loaded_again(make_problem, tmp_path, untouched):
    problem = make_problem("classification", mlp())
    with untouched(problem.model):
        fitted = ensemble(problem, mlp).fit(problem.loader)
    p, own = len(fitted.theta_), 4 + 5 + 5 + 5 + 3 + 3
    assert len(fitted.members_.weights) == p + 3 * own
    fitted.save(tmp_path / "ensemble.safetensors")
    again = ensemble(problem, mlp).load(tmp_path / "ensemble.safetensors")
    assert torch.equal(again.variance(problem.query), fitted.variance(problem.query))
    assert torch.equal(ensemble(problem, mlp).fit(problem.loader).members_.weights, fitted.members_.weights)
    other = ensemble(problem, mlp, seed=5).fit(problem.loader)
    assert not torch.equal(other.members_.weights, fitted.members_.weights)
    epochs, members = 3, 3
    assert fitted.fit_report_.passes["training"] == pytest.approx(epochs * members)


def test_factors_are_normal_on_request(make_problem):
    problem = make_problem("classification", mlp())
    members = ensemble(problem, mlp, recipe=STILL, init_std=0.5, n_members=40).fit(problem.loader).members_
    drawn = torch.cat([v for s in range(40) for pair in members.factors(s).values() for v in pair])
    assert float(drawn.mean()) == pytest.approx(1, abs=0.06)
    assert float(drawn.std()) == pytest.approx(0.5, abs=0.05)


def test_frozen_and_tied_weights_stay_so(make_problem):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.second.weight = self.first.weight
            self.last.requires_grad_(False)

        def forward(self, x):
            return self.last(self.second(self.first(x).tanh()).tanh())

    model = Tied().double().eval()
    problem = make_problem("classification", model)
    fitted = ensemble(problem, lambda: Tied().double()).fit(problem.loader)
    assert set(fitted.members_.factors(0)) == {"first.weight"}
    theta = fitted.network_.subset.unflatten(fitted.members_.theta(1))
    explicit = copy.deepcopy(model)
    with torch.no_grad():
        explicit.first.weight.copy_(theta["first.weight"])
        explicit.first.bias.copy_(theta["first.bias"])
        explicit.second.bias.copy_(theta["second.bias"])
    assert torch.allclose(explicit(problem.query), fitted.member_outputs(problem.query)[1], rtol=1e-10)


def test_what_cannot_be_used_is_rejected(make_problem):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return self.factor * x[:, :3]

    problem = make_problem("classification", Scale())
    with pytest.raises(ModelError, match="linear or convolution"):
        ensemble(problem, Scale).fit(problem.loader)
    problem = make_problem("classification", mlp())
    with pytest.raises(ModelError, match="architecture"):
        ensemble(problem, partial(nn.Linear, 4, 3)).fit(problem.loader)
    with pytest.raises(OptionError, match="make_model"):
        ensemble(problem, None)
    with pytest.raises(OptionError, match="init_std"):
        ensemble(problem, mlp, init_std=-1.0)
