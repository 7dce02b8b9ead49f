"""Ensemble, dropout and SWAG against hand-trained copies, masks put in by hand, and SGD written out."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from estimators import Gaussian
from estimators.baselines import SWAG, DeepEnsemble, MCDropout
from estimators.baselines.swag import Iterates
from estimators.errors import ConvergenceError, ModelError, OptionError, UnsupportedError
from estimators.rng import member_seeds, seeded_random_state
from estimators.training import Recipe, train_map

SHORT = Recipe(epochs=5, batch_size=7, lr=0.03)
DESCENT = Recipe(epochs=6, batch_size=7, optimizer="sgd", lr=0.02, momentum=0.5, schedule="constant")


def make():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def ensemble(problem, **changed):
    options = {"make_model": make, "recipe": SHORT, "n_members": 3, "seed": 4, "prior_precision": problem.delta}
    return DeepEnsemble(problem.model, problem.likelihood, **{**options, **changed})


def test_an_ensemble_is_the_model_and_copies_trained_by_hand(make_problem):
    problem = make_problem("classification", make())
    networks = [copy.deepcopy(problem.model)]
    for seed in member_seeds(4, 2):
        with seeded_random_state(seed):
            model = make()
        train_map(model, "classification", problem.loader, prior_precision=2.5, recipe=SHORT, seed=seed)
        networks.append(model)
    assert not torch.equal(
        networks[1][1].running_mean, networks[2][1].running_mean
    )  # they keep statistics of their own
    with torch.no_grad():
        outputs = torch.stack([model(problem.query) for model in networks])
    fitted = ensemble(problem).fit(problem.loader)
    assert torch.allclose(fitted.members(problem.query), outputs, rtol=1e-9)
    assert torch.allclose(fitted.variance(problem.query), torch.var(outputs, dim=0), rtol=1e-9)
    assert torch.allclose(fitted.predict(problem.query).mean, torch.mean(outputs, dim=0), rtol=1e-9)


def test_a_larger_ensemble_begins_with_the_same_members_and_another_seed_has_others(make_problem):
    problem = make_problem("classification", make())
    small, large, other = (
        ensemble(problem, **changed).fit(problem.loader).members(problem.query)
        for changed in ({"n_members": 2}, {"n_members": 4}, {"n_members": 2, "seed": 5})
    )
    assert torch.equal(large[:2], small)
    assert torch.equal(other[0], small[0])  # the model itself
    assert not torch.allclose(other[1], small[1], atol=1e-2)
    assert len({float(f[0, 0]) for f in large}) == 4


def test_neighbouring_seeds_share_no_member():
    seeds = [seed for start in range(50) for seed in member_seeds(start, 20)]
    assert len(set(seeds)) == 1000


def test_a_make_model_that_cannot_be_is_refused(make_problem):
    problem = make_problem("classification", make())
    made = make()
    cases = {
        r"architecture.*'0\.bias' of shape \(5,\).*\(6,\); 7 tensors": lambda: nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
        ).double(),
        r"'1\.bias' of shape \(5,\).*'1\.bias' absent": lambda: nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
        ).double(),
        "builds a new network": lambda: problem.model,
        "weights in use": lambda: made,  # the second member would go on from the first
    }
    for message, bad in cases.items():
        with pytest.raises(ModelError, match=message):
            ensemble(problem, make_model=bad).fit(problem.loader)
    with pytest.raises(OptionError, match=r"n_members >= 2.*1"):
        ensemble(problem, n_members=1)


def test_a_model_in_use_is_not_trained_on(make_problem, untouched):
    problem = make_problem("classification", make())
    with untouched(problem.model), pytest.raises(ModelError):
        ensemble(problem, make_model=lambda: problem.model).fit(problem.loader)


class Twice(nn.Module):
    """One dropout module called twice, one of whole channels, and one that keeps mean and variance."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 4, 3), nn.Linear(8, 3)
        self.channels, self.drop, self.alpha = nn.Dropout1d(0.3), nn.Dropout(0.4), nn.AlphaDropout(0.2)

    def forward(self, x):
        h = self.channels(self.conv(x).tanh())
        h = self.drop(self.drop(h)).flatten(1)
        return self.head(self.alpha(h))


def test_dropout_at_a_mask_is_the_network_with_each_row_dropped_alike(make_problem):
    """A row by itself, through the module in train mode: what a mask may be, and in which shares."""
    problem = make_problem("classification", Twice(), shape=(2, 4))
    fitted = MCDropout(problem.model, "classification", n_samples=4000, seed=2).fit(problem.loader)
    x = torch.cat([problem.query[:1]] * 3)
    members = fitted.members(x)
    assert torch.allclose(members[:, 0], members[:, 2], rtol=1e-12)  # all rows have the same mask
    in_train_mode = copy.deepcopy(problem.model).train()
    with torch.no_grad():
        drawn = torch.stack([in_train_mode(x[:1])[0] for _ in range(4000)])
    error = drawn.std(0) / math.sqrt(2000)
    assert ((members[:, 0].mean(0) - drawn.mean(0)).abs() < 4 * error).all()
    assert torch.allclose(members[:, 0].var(0), drawn.var(0), rtol=0.15)
    assert not torch.allclose(drawn.var(0), drawn.new_zeros(3), atol=1e-3)


def test_dropout_by_hand_on_a_plain_network(make_problem):
    """f_s = W₂ (m_s ∘ tanh(W₁ x)) / (1 − p) for one mask m_s a member: recovered from members at many queries."""
    p = 0.5
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Dropout(p), nn.Linear(5, 3, bias=False))
    problem = make_problem("classification", model)
    fitted = MCDropout(problem.model, "classification", n_samples=20, seed=1).fit(problem.loader)
    with torch.no_grad():
        hidden = problem.model[0](problem.x).tanh()  # (20, 5)
    masks = set()
    for f in fitted.members(problem.x):
        solved = torch.linalg.lstsq(hidden, f).solution  # diag(m) W₂ᵀ / (1 − p)
        mask = (solved / problem.model[3].weight.T.detach()).mean(1) * (1 - p)
        assert torch.allclose(mask, mask.round(), atol=1e-8)
        assert set(mask.round().tolist()) <= {0.0, 1.0}
        masks.add(tuple(mask.round().tolist()))
    assert len(masks) > 10


def test_a_network_without_dropout_is_trained_with_it_before_each_linear_layer_but_the_first(make_problem):
    problem = make_problem("classification", make())
    options = {"rate": 0.3, "make_model": make, "recipe": SHORT, "n_samples": 300, "prior_precision": 2.5}
    fitted = MCDropout(problem.model, "classification", seed=3, **options).fit(problem.loader)

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make()

        def forward(self, x):
            h = self.net[2](self.net[1](self.net[0](x)))
            return self.net[3](F.dropout(h, 0.3, self.training))

    (seed,) = member_seeds(3, 1)
    with seeded_random_state(seed):
        by_hand = Dropped()
        train_map(by_hand, "classification", problem.loader, prior_precision=2.5, recipe=SHORT, seed=seed)
    for name, tensor in by_hand.net.state_dict().items():
        assert torch.allclose(fitted.trained_[name], tensor, rtol=1e-9), name
    with torch.no_grad():
        assert torch.allclose(fitted.predict(problem.query).mean, by_hand.eval()(problem.query), atol=0.1)
    larger = MCDropout(problem.model, "classification", seed=3, **{**options, "n_samples": 305}).fit(problem.loader)
    assert torch.equal(larger.members(problem.query)[:300], fitted.members(problem.query))


def test_a_linear_layer_behind_a_convolution_has_dropout_too(make_problem):
    def convolutional():
        return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()

    problem = make_problem("classification", convolutional(), shape=(2, 4))
    options = {"rate": 0.3, "make_model": convolutional, "recipe": SHORT, "n_samples": 5}
    assert (MCDropout(problem.model, "classification", **options).fit(problem.loader).variance(problem.query) > 0).all()


def test_shared_dropout_is_switched_on_wherever_it_is_registered(make_problem):
    drop = nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(4, 5), drop, nn.Identity(), drop)
    problem = make_problem("regression", nn.Sequential(model, nn.Linear(5, 2)))
    once = nn.Sequential(nn.Sequential(model[0], nn.Dropout(0.5)), problem.model[1]).eval()
    variances = [
        MCDropout(m, Gaussian(0.6), n_samples=600).fit(problem.loader).variance(problem.query)
        for m in (problem.model, once)
    ]
    assert float(variances[0].mean() / variances[1].mean()) > 2  # E[m²]/(1−p)² − 1: 3 for two masks, 1 for one


def test_batch_first_is_asked_for_where_rows_are_not_in_front(make_problem):
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop, self.head = nn.Linear(2, 4), nn.Dropout(0.3), nn.Linear(4, 3)

        def forward(self, x):  # (B, T, 2)
            h = self.drop(self.inner(x.transpose(0, 1)))
            return self.head(h.mean(0))

    problem = make_problem("classification", SequenceFirst(), shape=(3, 2))
    fitted = MCDropout(problem.model, "classification", n_samples=3).fit(problem.loader)
    with pytest.raises(UnsupportedError, match=r"rows in front.*\(3, 7, 4\).*7 rows"):
        fitted.variance(problem.query)


def test_dropout_options_that_contradict_the_model_are_refused(make_problem):
    plain, dropping = make(), nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 3)).double().eval()
    cases = [
        (plain, {}, "dropout layers, or rate"),
        (plain, {"rate": 0.1}, "dropout layers, or rate"),
        (nn.Sequential(plain, nn.Dropout(0.0)), {}, "p > 0"),
        (plain, {"rate": 1.0, "make_model": make, "recipe": SHORT}, "0 < rate < 1.*1.0"),
        (dropping, {"rate": 0.1, "make_model": make, "recipe": SHORT}, "used as it is"),
        (dropping, {"n_samples": 1}, "n_samples >= 2.*1"),
    ]
    for model, options, message in cases:
        with pytest.raises(OptionError, match=message):
            MCDropout(model, "classification", **options)
    one = make_problem("classification", nn.Linear(4, 3))
    how = {"rate": 0.1, "make_model": lambda: nn.Linear(4, 3).double(), "recipe": SHORT}
    with pytest.raises(ModelError, match="behind another layer"):
        MCDropout(one.model, "classification", **how).fit(one.loader)


def sgd_by_hand(problem, recipe, delta, mean):
    """θ̂ and the weights after each epoch; L/N of the ragged batches, heavy ball, by autograd on the module."""
    model, n = copy.deepcopy(problem.model), len(problem.x)
    generator = torch.Generator().manual_seed(8)
    flat = lambda: torch.cat([p.detach().reshape(-1) for p in model.parameters()])  # noqa: E731
    velocity, found = 0.0, [flat()]
    for _ in range(recipe.epochs):
        for index in torch.randperm(n, generator=generator).split(7):
            f = model(problem.x[index])
            theta = torch.cat([p.reshape(-1) for p in model.parameters()])
            loss = F.cross_entropy(f, problem.y[index], reduction="sum")
            loss = loss + len(index) / n * delta / 2 * ((theta - mean) ** 2).sum()
            slopes = torch.autograd.grad(loss, list(model.parameters()))
            velocity = recipe.momentum * velocity + torch.cat([s.reshape(-1) for s in slopes]) / 7
            moved = flat() - recipe.lr * velocity
            for p, part in zip(model.parameters(), moved.split([p.numel() for p in model.parameters()]), strict=True):
                p.data.copy_(part.view_as(p))
        found.append(flat())
    return torch.stack(found)


@pytest.mark.parametrize("max_rank", [2, 4, 20])
def test_swag_is_the_moments_of_sgd_written_out(make_problem, max_rank):
    problem = make_problem("classification", make())
    options = {"prior_precision": 2.5, "prior_mean": 0.2, "recipe": DESCENT, "max_rank": max_rank, "seed": 8}
    iterates = SWAG(problem.model, "classification", **options).fit(problem.loader).iterates_
    path = sgd_by_hand(problem, DESCENT, 2.5, 0.2)
    assert torch.allclose(iterates.mean, path.mean(0), rtol=1e-9)
    diagonal = path.square().mean(0) - path.mean(0).square()
    assert torch.allclose(iterates.diagonal, diagonal, rtol=1e-6, atol=1e-14)
    columns = torch.stack([path[t] - path[: t + 1].mean(0) for t in range(1, len(path))])[-max_rank:]
    k = min(max_rank, 6)
    assert len(columns) == k
    covariance = diagonal.diag() / 2 + sum(torch.outer(d, d) for d in columns) / (2 * (k - 1))
    assert torch.allclose(iterates.covariance(), covariance, rtol=1e-6, atol=1e-12)


def test_weights_of_swag_are_drawn_from_mean_diagonal_and_low_rank(make_problem):
    problem = make_problem("classification", make())
    iterates = SWAG(problem.model, "classification", recipe=DESCENT, max_rank=3).fit(problem.loader).iterates_
    draws = torch.stack([iterates.sample(seed) for seed in member_seeds(1, 8000)]) - iterates.mean
    scale = iterates.covariance().diagonal().sqrt()
    found = draws.T @ draws / len(draws) / torch.outer(scale, scale)
    expected = iterates.covariance() / torch.outer(scale, scale)
    assert float((found - expected).abs().max()) < 5 / math.sqrt(8000) * math.sqrt(2)
    assert float((draws.mean(0) / scale).abs().max()) < 5 / math.sqrt(8000)
    assert float((expected - torch.eye(len(scale)).double()).abs().max()) > 0.3  # not diagonal


def test_the_variance_of_swag_on_a_linear_network_is_that_of_its_weights(make_problem):
    """f = Wx + b is linear in θ: the covariance over members is J S Jᵀ, S the sample covariance of their weights."""
    problem = make_problem("regression", nn.Linear(4, 2))
    fitted = SWAG(problem.model, Gaussian(0.6), recipe=DESCENT, n_samples=6, seed=2).fit(problem.loader)
    weights = torch.stack([fitted.iterates_.sample(seed) for seed in member_seeds(2, 6)])
    jacobian = torch.func.jacrev(lambda t: problem.query @ t[:8].view(2, 4).T + t[8:])(weights[0])
    by_hand = jacobian @ torch.cov(weights.T) @ jacobian.transpose(1, 2)
    assert torch.allclose(fitted.covariance(problem.query), by_hand, rtol=1e-8, atol=1e-14)


def test_swag_over_a_subset_moves_nothing_else(make_problem):
    problem = make_problem("classification", make())
    fitted = SWAG(problem.model, "classification", subset_of_weights="last_layer", recipe=DESCENT).fit(problem.loader)
    assert fitted.iterates_.mean.shape == (18,)
    with torch.no_grad():
        features = torch.cat([problem.model[:3](problem.query), torch.ones(7, 1).double()], dim=1)
    f = fitted.members(problem.query) - problem.model(problem.query).detach()
    left = torch.linalg.svd(features)[0][:, 6:]  # what features (7, 6) cannot reach
    assert float((left.T @ f).abs().max()) < 1e-10 < float(f.abs().max())


@pytest.mark.parametrize(
    "bad",
    [{"optimizer": "adam"}, {"schedule": "cosine"}, {"average": 0.5}, {"lr": "auto"}, {"epochs": 1}],
    ids=str,
)
def test_swag_refuses_a_recipe_that_is_no_sgd_at_a_constant_rate(bad, make_problem):
    recipe = Recipe(**{"optimizer": "sgd", "schedule": "constant", **bad})
    with pytest.raises(OptionError, match="constant rate"):
        SWAG(make_problem().model, "classification", recipe=recipe)


def test_swag_refuses_too_few_and_what_diverges(make_problem):
    problem = make_problem("regression", nn.Linear(4, 2))
    for name in ("max_rank", "n_samples"):
        with pytest.raises(OptionError, match=f"{name} >= 2.*1"):
            SWAG(problem.model, "regression", **{name: 1})
    wild = Recipe(epochs=400, optimizer="sgd", lr=1e3, schedule="constant")
    with pytest.raises(ConvergenceError, match="smaller lr"):
        SWAG(problem.model, "regression", recipe=wild).fit(problem.loader)


def test_iterates_far_from_zero_keep_their_variance():
    """mean θ² − θ̄² would lose all digits at 1e8."""
    path = 1e8 + torch.arange(5, dtype=torch.float64)[:, None] * torch.tensor([0.1, 0.2]).double()
    iterates = Iterates(path[0], 3)
    for theta in path[1:]:
        iterates.add(theta)
    assert torch.allclose(iterates.diagonal, torch.tensor([0.02, 0.08]).double(), rtol=1e-6)
