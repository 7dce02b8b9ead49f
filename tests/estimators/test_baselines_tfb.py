"""Training-free Bayesianization: the covariance of the perturbed weights, and the width that the tolerance allows."""

import copy
import math

import pytest
import torch
from lora_layers import LoRALinear, with_adapters
from torch import nn
from torch.func import functional_call

from estimators import Gaussian
from estimators.baselines import TFB
from estimators.errors import ConvergenceError, ModelError, OptionError


def network():
    return with_adapters(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())


def tfb(problem, **options):
    return TFB(problem.model, problem.likelihood, prior_precision=problem.delta, **{"seed": 3, **options})


N = 600
"""Samples of the weights, for their covariance."""


def products_of(fitted, b):
    """B A of the first adapter in every sample, (N, out K)."""
    weights = [fitted.network_.subset.unflatten(theta) for theta in fitted._member_weights()]
    return torch.stack([(b @ of_one["0.lora_A.default.weight"].flatten(1)).flatten() for of_one in weights])


@pytest.fixture
def fitted(make_problem):
    problem = make_problem("classification", network())
    return problem, tfb(problem, n_samples=6).fit(problem.loader)


def test_adapted_weights_are_isotropic_in_the_columns_of_b(make_problem):
    """Covariance of vec(BA) over many samples against σ² (U Uᵀ) ⊗ I, U from a QR instead of an SVD."""
    problem = make_problem("classification", network())
    fitted = tfb(problem, n_samples=3).fit(problem.loader)
    fitted.n_samples = N
    b = problem.model[0].lora_B["default"].weight.detach()
    products = products_of(fitted, b)
    q = torch.linalg.qr(b)[0]
    scale = fitted.sigma_q_**2
    expected = scale * torch.kron(q @ q.T, torch.eye(4, dtype=b.dtype))
    assert torch.allclose(torch.cov(products.T), expected, atol=5 * scale / math.sqrt(N))
    mean = (b @ problem.model[0].lora_A["default"].weight).flatten().detach()
    assert torch.allclose(products.mean(0), mean, atol=5 * math.sqrt(scale / N))


def test_members_are_networks_with_other_first_matrices_alone(fitted):
    problem, estimator = fitted
    outputs, weights = [], list(estimator._member_weights())
    for theta in weights:
        state = estimator.weights_to_state_dict(theta)
        outputs.append(functional_call(problem.model, state, (problem.query,)).detach())
        moved = {n for n, v in state.items() if not torch.equal(v, dict(problem.model.named_parameters())[n])}
        assert moved == {"0.lora_A.default.weight", "2.lora_A.default.weight"}
    outputs = torch.stack(outputs)
    assert torch.allclose(estimator.member_outputs(problem.query), outputs, rtol=1e-12)
    assert torch.allclose(estimator.variance(problem.query), outputs.var(0), rtol=1e-10)
    probs = estimator.predict(problem.query).probs
    assert torch.allclose(probs, outputs.softmax(-1).mean(0), rtol=1e-10)


@pytest.mark.parametrize("kind", ["classification", "regression", "binary"])
def test_sigma_is_the_largest_one_within_the_tolerance(make_problem, kind):
    model = with_adapters(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3 if kind == "classification" else 2)))
    problem = make_problem(kind, model)
    fitted = tfb(problem, tolerance=0.05).fit(problem.loader)
    subset = fitted.network_.subset
    names = list(subset.shapes)

    def loss(weights):
        """−mean log mean_s p(y | f_s), by torch.distributions."""
        logs = []
        for theta in weights:
            f = functional_call(problem.model, dict(subset.unflatten(theta)), (problem.x,)).detach()
            if kind == "classification":
                logs.append(torch.distributions.Categorical(logits=f).log_prob(problem.y))
            elif kind == "binary":
                logs.append(torch.distributions.Bernoulli(logits=f).log_prob(problem.y).sum(1))
            else:
                logs.append(-0.5 * ((f - problem.y) / 0.6).square().sum(1))
        return -float((torch.stack(logs).logsumexp(0) - math.log(len(logs))).mean())

    assert len(names) == 4
    base, change = loss([fitted.theta_]), {}
    for factor in (1.0, 1.03):
        moved = [fitted.theta_ + factor * (theta - fitted.theta_) for theta in fitted._member_weights()]
        change[factor] = abs(loss(moved) - base) / base
    assert fitted.loss_change_ == pytest.approx(change[1.0], rel=1e-8)
    assert change[1.0] <= 0.05 < change[1.03]


def test_a_larger_tolerance_gives_a_larger_variance(make_problem):
    problem = make_problem("classification", network())
    small, large = (tfb(problem, tolerance=t).fit(problem.loader) for t in (1e-3, 1e-1))
    assert small.sigma_q_ < large.sigma_q_
    assert bool((small.variance(problem.query) < large.variance(problem.query)).all())


def test_a_second_matrix_of_lower_rank_is_perturbed_in_its_columns_alone(make_problem):
    model = network()
    with torch.no_grad():
        weight = model[0].lora_B["default"].weight
        weight[:, 1] = 2 * weight[:, 0]
    problem = make_problem("classification", model)
    fitted = tfb(problem).fit(problem.loader)
    b = model[0].lora_B["default"].weight.detach()
    for theta in fitted._member_weights():
        a = fitted.network_.subset.unflatten(theta)["0.lora_A.default.weight"]
        moved = b @ (a - model[0].lora_A["default"].weight).detach()
        assert torch.isfinite(moved).all()
        assert moved.norm() > 1e-3 * fitted.sigma_q_
        shift = (a - model[0].lora_A["default"].weight).detach()
        null = torch.tensor([2.0, -1.0], dtype=b.dtype) / math.sqrt(5)  # B n = 0
        assert float((null @ shift).norm()) < 1e-6 * float(shift.norm())


def test_a_loaded_fit_and_another_seed(fitted, tmp_path):
    problem, estimator = fitted
    estimator.save(tmp_path / "tfb.safetensors")
    again = tfb(problem, n_samples=6).load(tmp_path / "tfb.safetensors")
    assert again.sigma_q_ == estimator.sigma_q_
    assert torch.equal(again.variance(problem.query), estimator.variance(problem.query))
    other = tfb(problem, n_samples=6, seed=4).fit(problem.loader)
    assert not torch.equal(other.variance(problem.query), estimator.variance(problem.query))


def test_the_model_is_unchanged_and_the_passes_of_the_search_are_counted(make_problem, untouched):
    problem = make_problem("classification", network())
    with untouched(problem.model):
        fitted = tfb(problem).fit(problem.loader)
    forwards = 3 * fitted.fit_report_.passes["search"]  # a pass is one forward and one backward, which counts twice
    assert forwards > 100
    assert forwards % 10 == pytest.approx(1)  # the trained network once, and 10 samples at every σ


def test_what_has_no_trained_adapters_is_rejected(make_problem):
    plain = make_problem("classification")
    with pytest.raises(ModelError, match="LoRA adapters"):
        tfb(plain).fit(plain.loader)
    zero = network()
    nn.init.zeros_(zero[0].lora_B["default"].weight)
    problem = make_problem("classification", zero)
    with pytest.raises(ModelError, match=r"0\.lora_B\.default\.weight"):
        tfb(problem).fit(problem.loader)
    with pytest.raises(OptionError, match="tolerance"):
        tfb(problem, tolerance=0)


def test_adapters_that_the_loss_does_not_depend_on_raise(make_problem):
    class Ignored(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.adapter = nn.Linear(4, 3).requires_grad_(False), LoRALinear(nn.Linear(4, 3))

        def forward(self, x):
            return self.layer(x) + 0 * self.adapter(x)

    problem = make_problem("classification", Ignored())
    with pytest.raises(ConvergenceError, match="depends on the adapters"):
        tfb(problem).fit(problem.loader)


def test_adapters_of_peft_are_found(make_problem):
    peft = pytest.importorskip("peft", reason="needs the extra: pip install bdl-bench[text]")
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 4, 3))
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0", "2"]), body).double()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    problem = make_problem("classification", model, shape=(1, 6, 6))
    fitted = tfb(problem, n_samples=3).fit(problem.loader)
    fitted.n_samples = N
    b = copy.deepcopy(model[0].lora_B["default"].weight).detach().flatten(1)
    q = torch.linalg.qr(b)[0]
    expected = fitted.sigma_q_**2 * torch.kron(q @ q.T, torch.eye(9, dtype=b.dtype))
    assert torch.allclose(torch.cov(products_of(fitted, b).T), expected, atol=5 * fitted.sigma_q_**2 / math.sqrt(N))


def test_the_noise_of_a_gaussian_does_not_move_the_search_through_its_constant(make_problem):
    """ℓ is without log σ: the relative change at small σ is that of the squared residuals."""
    model = with_adapters(nn.Sequential(nn.Linear(4, 2)))
    problem = make_problem("regression", model)
    sigmas = []
    for noise in (0.6, 0.6 * (1 + 1e-9)):
        problem.likelihood = Gaussian(noise)
        sigmas.append(tfb(problem, n_samples=4).fit(problem.loader).sigma_q_)
    assert sigmas[0] == pytest.approx(sigmas[1], rel=0.03)
