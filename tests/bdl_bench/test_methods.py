"""Every preset runs from beginning to end on a small problem, or says why it cannot."""

from dataclasses import replace

import pytest
import torch
from lora_layers import with_adapters
from torch import nn

from bdl_bench import Problem
from bdl_bench.methods import METHODS, POSTERIOR
from bdl_bench.methods.registry import factors
from bdl_bench.records import RecordStore
from bdl_bench.runner.grid import Grid
from bdl_bench.tasks import TASKS
from bdl_bench.tasks.registry import Task
from estimators import LinearizedLaplace, ReferencePosterior
from estimators.errors import UnsupportedError
from estimators.estimator.cloning import clone
from estimators.sampling import ConvergenceCriteria
from estimators.training import Recipe


def make(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    f = x @ torch.randn(3, 3, generator=generator, dtype=torch.float64)
    targets = {"regression": f, "classification": f.argmax(-1), "binary": (f > 0).double()}
    parts = [
        list(zip(x[i].split(size), targets[kind][i].split(size), strict=True))
        for i, size in ((slice(20), 7), (slice(20, 30), 10), (slice(30, 40), 10))
    ]

    def network():
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    return Problem(
        network(),
        kind,
        *parts,
        prior_precision=0.7,
        recipe=Recipe(epochs=8, lr=2e-2),
        make_model=network,
        ood={"far": [8 * x[:9]]},
    )


ADAPTERS = {"lora-ensemble", "laplace-lora", "tfb"}
"""Methods of networks with adapters."""
SKIPPED = {
    "regression": {"temperature-scaling", "laplace-hessian", *ADAPTERS},
    "classification": {"laplace-hessian", *ADAPTERS},
    "binary": {"laplace-hessian", *ADAPTERS, *(name for name in METHODS if name.startswith("laplace-torch"))},
}


def sampled_briefly(problem, seed):
    """The preset with criteria that any chains meet: how well they converge is tested elsewhere."""
    any_chains = ConvergenceCriteria(1000, 0, 0, 1, 1, 0, 1, 1000)
    options = {"n_chains": 4, "n_draws": 128, "starts": "prior", "criteria": any_chains, "seed": seed}
    return ReferencePosterior(problem.model, problem.likelihood, prior_precision=problem.prior_precision, **options)


BRIEFLY = {
    "sgld": {"n_samples": 8, "burn_in": 4, "thinning": 2},
    "sghmc": {"n_samples": 8, "burn_in": 4, "thinning": 2},
    "cyclical-sghmc": {"n_samples": 4, "n_cycles": 2, "cycle_steps": 16},
    "mile": {"n_samples": 10, "warm_up": 8, "thinning": 2},
    "swag": {"n_samples": 8},
    "dropout": {"n_samples": 8},
    "multi-swag": {"n_members": 2},
    "laplace-mixture": {"n_members": 2},
    "mean-field-vi": {"recipe": Recipe(epochs=20, batch_size=64, optimizer="adam", lr=0.01), "n_samples": 8},
    "ivon": {"recipe": Recipe(epochs=20, batch_size=64, optimizer="sgd", lr=0.1), "n_samples": 8},
}
"""Options that only make chains and trainings shorter, and mixtures and samples smaller."""


def shorter(method, options):
    """The preset with shorter chains or training, or fewer members or samples."""
    return replace(method, build=lambda problem, seed: clone(method.build(problem, seed), options))


def some(first, kind):
    """Every third preset, since neighbours are mostly of one family, and those that this kind of outputs may skip."""
    return set(list(METHODS)[first::3]) | SKIPPED[kind]


SOME = {"classification": set(METHODS), "regression": some(0, "regression"), "binary": some(1, "binary")}
OTHERS = {kind: set(METHODS) - SOME[kind] for kind in ("regression", "binary")}


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        *(pytest.param(kind, methods, id=kind) for kind, methods in SOME.items()),
        *(
            pytest.param(kind, methods, id=f"{kind}, others", marks=pytest.mark.verification)
            for kind, methods in OTHERS.items()
        ),
    ],
)
def test_every_preset_ends_with_predictions_or_a_reason(kind, methods, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "small", Task("small", "a small problem", lambda seed: make(kind, seed)))
    monkeypatch.setitem(METHODS, POSTERIOR, replace(METHODS[POSTERIOR], build=sampled_briefly))
    for name, options in BRIEFLY.items():
        monkeypatch.setitem(METHODS, name, shorter(METHODS[name], options))
    budget = {"classification": 2, "regression": 1, "binary": 0}[kind]  # 1: calibrated, without other fits
    names = [name for name in METHODS if name in methods]
    records = Grid(["small"], names, [0], tmp_path, tune_budget=budget).run(lambda _: None)
    failed = {r.method: r.traceback for r in records if r.status == "failed"}
    assert not failed
    assert {r.method for r in records if r.status == "skipped"} <= SKIPPED[kind]
    for record in records:
        if record.status == "ok":
            arrays = RecordStore(tmp_path).arrays(record)
            variance = arrays["tuned/epistemic_variance" if budget else "epistemic_variance"]
            assert arrays["mean"].shape == variance.shape == (10, 3)
            assert (arrays["ood/far/epistemic_variance"] >= 0).all()
            assert (record.cost.passes is None) == record.method.startswith("laplace-torch")


def test_laplace_lora_is_k_fac_over_the_adapters_alone():
    """The head is trained too, as in a sentence classifier; its weights and the frozen ones are certain."""
    plain = make("classification", 0)
    network = with_adapters(plain.model)
    for parameter in network[2].parameters():
        parameter.requires_grad_(True)
    problem = Problem(
        network.eval(), "classification", plain.train, plain.validation, plain.test, prior_precision={"*": 0.7}
    )
    fitted = METHODS["laplace-lora"].build(problem, 0).fit(problem.train)
    adapters = {f"{layer}.lora_{part}.default.weight" for layer in "02" for part in "AB"}
    assert set(fitted.network_.subset.shapes) == adapters
    named = LinearizedLaplace(
        network, "classification", prior_precision=0.7, subset_of_weights=sorted(adapters), hessian_structure="kron"
    )
    (x, _), *_ = problem.test
    assert torch.allclose(fitted.variance(x), named.fit(problem.train).variance(x))
    assert fitted.fisher == "exact"
    for name in ("laplace-lora", "tfb"):
        with pytest.raises(UnsupportedError, match="trainable LoRA adapters"):
            METHODS[name].build(plain, 0)
    assert METHODS["tfb"].build(problem, 3).fit(problem.train).seed == 3


def test_an_axis_has_as_many_values_as_asked_for_and_the_presets_own_among_them():
    problem = make("classification", 0)
    for method in METHODS.values():
        if method.tuned_option is not None:
            for n in (1, 2, 3, 5, 6):
                values = method.tuned_option.values(problem, n)
                assert len(values) == n
            (own,) = method.tuned_option.values(problem, 1)
            assert any(abs(value / own - 1) < 1e-12 for value in values)


def test_factors_are_evenly_spaced_in_their_logarithm():
    assert factors(5, decades=2) == pytest.approx([0.01, 0.1, 1.0, 10.0, 100.0])
    assert factors(1, decades=2) == [1.0]
    assert factors(2, decades=2) == pytest.approx([0.01, 1.0])
    assert factors(4, decades=2) == pytest.approx([0.01, 0.1, 1.0, 10.0])
