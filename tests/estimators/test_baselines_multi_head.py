"""The multi-head ensemble: each head the minimum of its own weighted and anchored loss, given the features."""

import pytest
import torch
from torch import nn

from estimators import LastLayerLaplace
from estimators.baselines import MultiHeadEnsemble
from estimators.baselines.stacked_minimum import Whitening
from estimators.errors import ModelError, NotConvergedWarning, OptionError
from estimators.likelihoods import CausalTokens, Gaussian

S, SEED = 4, 3


def ensemble(problem, **changed):
    options = {"n_heads": S, "seed": SEED, "prior_precision": problem.delta}
    return MultiHeadEnsemble(problem.model, problem.likelihood, **{**options, **changed})


def drawn(n, entries, delta, mean):
    """Anchors (S, entries) and counts of rows (S, N), drawn as the class says: anchors first."""
    generator = torch.Generator().manual_seed(SEED)
    anchors = mean + torch.randn(S, entries, generator=generator, dtype=torch.float64) / delta**0.5
    rows = torch.randint(n, (S, n), generator=generator)
    return anchors, torch.stack([(rows == i).sum(1) for i in range(n)], dim=1).double()


def features_of(problem, x):
    with torch.no_grad():
        return torch.cat([problem.model[:-1](x), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)


def as_matrices(vectors, c):
    """θ of weight and bias, (S, C·D + C) -> (S, C, D + 1)."""
    weight, bias = vectors[:, :-c], vectors[:, -c:]
    return torch.cat([weight.reshape(len(vectors), c, -1), bias[:, :, None]], dim=2)


def test_heads_of_a_regression_are_weighted_ridge_solutions(make_problem):
    problem = make_problem("regression", delta=2.5)
    assert len(problem.loader[-1][0]) == 2  # six do not divide twenty
    fitted = ensemble(problem, prior_mean=0.3).fit(problem.loader)
    anchors, counts = drawn(20, 12, 2.5, 0.3)
    phi = features_of(problem, problem.x)
    for head, anchor, weight in zip(fitted.heads_, as_matrices(anchors, 2), counts, strict=True):
        precision = (phi.T * weight) @ phi / 0.36 + 2.5 * torch.eye(6, dtype=torch.float64)
        by_hand = torch.linalg.solve(precision, (phi.T * weight) @ problem.y / 0.36 + 2.5 * anchor.T).T
        assert torch.allclose(head, by_hand, rtol=1e-6, atol=1e-7)
    outputs = torch.einsum("sce,me->smc", fitted.heads_, features_of(problem, problem.query))
    assert torch.allclose(fitted.member_outputs(problem.query), outputs, rtol=1e-10)
    assert torch.allclose(fitted.variance(problem.query), outputs.var(0), rtol=1e-10)


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_a_frozen_bias_is_added_to_the_outputs_of_every_head(kind, make_problem):
    problem = make_problem(kind)
    c = problem.model[2].out_features
    bias = torch.tensor([5.0, -3.0, 1.0])[:c].double()
    with torch.no_grad():
        problem.model[2].bias.copy_(bias)
    problem.model[2].bias.requires_grad_(False)
    fitted = ensemble(problem).fit(problem.loader)
    anchors, counts = drawn(20, 5 * c, 2.5, 0.0)
    phi = problem.model[:-1](problem.x).detach()
    for head, anchor, weight in zip(fitted.heads_, anchors.reshape(S, c, 5), counts, strict=True):
        f = phi @ head.T + bias
        residual = (f - problem.y) / 0.36 if kind == "regression" else f.softmax(-1) - torch.eye(3).double()[problem.y]
        assert ((residual * weight[:, None]).T @ phi + 2.5 * (head - anchor)).abs().max() < 1e-5
    query = problem.model[:-1](problem.query).detach()
    outputs = torch.einsum("sce,me->smc", fitted.heads_, query) + bias
    assert torch.allclose(fitted.member_outputs(problem.query), outputs, rtol=1e-10)
    loaded = ensemble(problem).load_state_dict(fitted.state_dict())
    assert torch.equal(loaded.member_outputs(problem.query), fitted.member_outputs(problem.query))


def test_heads_of_a_classification_have_no_slope_of_their_loss(make_problem):
    problem = make_problem("classification")
    fitted = ensemble(problem).fit(problem.loader)
    anchors, counts = drawn(20, 18, 2.5, 0.0)
    phi, one_hot = features_of(problem, problem.x), torch.eye(3, dtype=torch.float64)[problem.y]
    for head, anchor, weight in zip(fitted.heads_, as_matrices(anchors, 3), counts, strict=True):
        residual = torch.softmax(phi @ head.T, -1) - one_hot
        slope = (residual * weight[:, None]).T @ phi + 2.5 * (head - anchor)
        assert slope.abs().max() < 1e-5


def test_binary_heads_with_a_flat_bias_have_no_slope_of_their_loss(make_problem):
    problem = make_problem("binary")
    fitted = ensemble(problem, prior_precision={"*bias": 0.0, "*": 2.5}).fit(problem.loader)
    anchors, counts = drawn(20, 12, 2.5, 0.0)
    phi = features_of(problem, problem.x)
    delta = torch.tensor([2.5] * 5 + [0.0], dtype=torch.float64)
    for head, anchor, weight in zip(fitted.heads_, as_matrices(anchors, 2), counts, strict=True):
        residual = torch.sigmoid(phi @ head.T) - problem.y
        slope = (residual * weight[:, None]).T @ phi + delta * (head - anchor)
        assert slope.abs().max() < 1e-5


def test_heads_do_not_depend_on_how_the_rows_are_batched_but_on_the_seed(make_problem):
    problem = make_problem("classification")
    fitted = ensemble(problem, n_heads=6).fit(problem.loader)
    assert fitted.heads_.shape == (6, 3, 6)
    problem.batch_size = 20
    assert torch.allclose(ensemble(problem, n_heads=6).fit(problem.loader).heads_, fitted.heads_, atol=1e-5)
    assert torch.unique(fitted.heads_[:, 0, 0]).numel() == 6
    others = ensemble(problem, n_heads=6, seed=SEED + 1).fit(problem.loader)
    assert not torch.allclose(others.heads_, fitted.heads_, atol=1e-2)


def test_the_variance_of_many_heads_is_of_the_order_of_last_layer_laplace():
    """Features that depend on each other, little noise, and queries far from the data, where heads begun at the prior
    and left early have the prior's variance."""
    generator = torch.Generator().manual_seed(1)
    body, head = nn.Linear(1, 20), nn.Linear(20, 1)
    model = nn.Sequential(body, nn.Tanh(), head).double().eval()
    x = torch.rand(60, 1, generator=generator, dtype=torch.float64) - 1
    options = {"prior_precision": 0.3}
    with torch.no_grad():
        y = model(x) + 0.1 * torch.randn(60, 1, generator=generator, dtype=torch.float64)
    heads = MultiHeadEnsemble(model, Gaussian(0.1), n_heads=200, **options).fit([(x, y)])
    laplace = LastLayerLaplace(model, Gaussian(0.1), **options).fit([(x, y)])
    query = torch.tensor([[-0.9], [-0.5], [0.5], [1.0]], dtype=torch.float64)
    ratio = heads.variance(query) / laplace.variance(query)
    assert ratio.min() > 0.5
    assert ratio.max() < 2


def test_heads_of_a_float32_network_are_minima_to_the_last_digits_of_float32(make_problem):
    problem = make_problem("regression")
    problem.model.float()
    problem.x, problem.y = problem.x.float(), problem.y.float()
    fitted = ensemble(problem).fit(problem.loader)
    assert fitted.heads_.dtype == torch.float32
    generator = torch.Generator().manual_seed(SEED)
    anchors = as_matrices(torch.randn(S, 12, generator=generator).double() / 2.5**0.5, 2)
    counts = torch.stack([row.bincount(minlength=20) for row in torch.randint(20, (S, 20), generator=generator)])
    with torch.no_grad():
        phi = torch.cat([problem.model[:-1](problem.x), torch.ones(20, 1)], dim=1).double()
    for head, anchor, weight in zip(fitted.heads_.double(), anchors, counts.double(), strict=True):
        precision = (phi.T * weight) @ phi / 0.36 + 2.5 * torch.eye(6, dtype=torch.float64)
        by_hand = torch.linalg.solve(precision, (phi.T * weight) @ problem.y.double() / 0.36 + 2.5 * anchor.T).T
        assert torch.allclose(head, by_hand, atol=1e-5)


def test_heads_that_are_left_early_are_told_of(make_problem):
    problem = make_problem("classification", delta=1e-3)
    with pytest.warns(NotConvergedWarning, match="raise max_iter"):
        ensemble(problem, max_iter=1).fit(problem.loader)


def test_one_basis_whitens_the_curvature_of_every_output():
    generator = torch.Generator().manual_seed(2)
    phi = torch.randn(3, 30, 5, generator=generator, dtype=torch.float64)
    gram, delta = phi.mT @ phi, torch.tensor([2.5, 2.5, 0.7, 0.7, 0.0]).double()
    kappa = torch.tensor([[0.01, 1.99], [1.0, 1.0], [1.5, 0.5]], dtype=torch.float64)
    whitening = Whitening.of(gram, kappa, delta)
    v = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    w = whitening.displacement(v)
    product = torch.stack([k[:, None] * (g @ m.T).T + m * delta for k, g, m in zip(kappa, gram, w, strict=True)])
    assert torch.allclose(whitening.gradient(product), v, atol=1e-7)


class Reader(nn.Module):
    """A token of 5 at each of T places: (B, T) -> logits (B, T, 5)."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)

    def forward(self, tokens):
        return self.head(torch.tanh(self.words(tokens).cumsum(1)))


def test_heads_of_a_language_model_are_used_at_every_place():
    model = Reader().double().eval()
    tokens = torch.randint(0, 5, (9, 6), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[::2, 4:] = -100
    options = {"n_heads": 2, "prior_precision": 2.5, "seed": SEED}
    fitted = MultiHeadEnsemble(model, "causal_lm", **options).fit([(tokens, labels)])
    with torch.no_grad():
        phi = torch.tanh(model.words(tokens).cumsum(1))
    outputs = torch.einsum("sce,mte->smtc", fitted.heads_, phi)
    assert torch.allclose(fitted.member_outputs(tokens), outputs, rtol=1e-10)
    assert fitted.variance(tokens).shape == (9, 6, 5)
    generator = torch.Generator().manual_seed(SEED)
    anchors = torch.randn(2, 20, generator=generator, dtype=torch.float64).reshape(2, 5, 4) / 2.5**0.5
    rows = torch.randint(9, (2, 9), generator=generator)
    for head, anchor, row in zip(fitted.heads_, anchors, rows, strict=True):
        head = head.clone().requires_grad_()
        loss = CausalTokens().nll((phi @ head.T).flatten(1), labels)[row].sum() + 1.25 * (head - anchor).square().sum()
        (slope,) = torch.autograd.grad(loss, head)
        assert slope.abs().max() < 1e-5


def test_a_network_without_a_last_layer_of_its_own_is_rejected(make_problem):
    problem = make_problem("classification", nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    with pytest.raises(ModelError, match=r"nn\.Linear"):
        ensemble(problem).fit(problem.loader)
    with pytest.raises(OptionError, match="n_heads >= 2"):
        ensemble(problem, n_heads=1)
    with pytest.raises(OptionError, match="max_iter >= 1"):
        ensemble(problem, max_iter=0)
