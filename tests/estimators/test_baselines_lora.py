"""The LoRA ensemble: one frozen body, adapters and heads trained by hand beside it."""

import copy

import pytest
import torch
from torch import nn

from estimators.baselines import DeepEnsemble, LoRAEnsemble
from estimators.baselines.fresh_adapters import with_fresh_adapters
from estimators.errors import ModelError
from estimators.runtime.rng import member_seeds, seeded_random_state
from estimators.training import Recipe, train_map

SHORT = Recipe(epochs=5, batch_size=7, lr=0.03)
TRAINED = ("2.weight", "2.bias")


def body_and_head():
    """A frozen body and a head that is trained: what adapters are to larger networks."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].requires_grad_(False)
    return model


def with_lora():
    peft = pytest.importorskip("peft", reason="needs the extra: pip install bdl-bench[text]")
    adapters = peft.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.0)
    model = peft.inject_adapter_in_model(adapters, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    model[2].requires_grad_(True)
    return model.double()


def ensemble(problem, **changed):
    options = {"recipe": SHORT, "n_members": 3, "seed": 4, "prior_precision": problem.delta}
    return LoRAEnsemble(problem.model, problem.likelihood, **{**options, **changed})


def test_members_are_the_model_and_fresh_heads_trained_by_hand(make_problem, untouched):
    problem = make_problem("classification", body_and_head())
    networks = [problem.model]
    for seed in member_seeds(4, 2):
        model = copy.deepcopy(problem.model)
        with seeded_random_state(seed):
            model[2].reset_parameters()
        train_map(model, "classification", problem.loader, prior_precision=2.5, recipe=SHORT, seed=seed)
        networks.append(model)
    with torch.no_grad():
        outputs = torch.stack([model(problem.query) for model in networks])
    with untouched(problem.model):
        fitted = ensemble(problem).fit(problem.loader)
    assert torch.allclose(fitted.member_outputs(problem.query), outputs, rtol=1e-9)
    assert torch.allclose(fitted.variance(problem.query), torch.var(outputs, dim=0), rtol=1e-9)
    assert fitted.variance(problem.query).min() > 1e-4
    assert [sorted(member) for member in fitted.members_] == [sorted(TRAINED)] * 2


def test_adapters_begin_where_they_change_nothing_and_share_the_frozen_weights(make_problem):
    model = make_problem("classification", with_lora()).model
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3)
    x = torch.randn(5, 4, dtype=torch.float64)
    made, other = with_fresh_adapters(model), with_fresh_adapters(model)
    base = model[0].base_layer
    assert torch.allclose(made[0](x), base(x), rtol=1e-12)
    assert not torch.allclose(model[0](x), base(x), atol=1e-2)
    assert made[0].base_layer.weight is base.weight
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in made.named_parameters() if p.requires_grad] == trained
    of_made, of_other = dict(made.named_parameters()), dict(other.named_parameters())
    for name in trained:
        assert torch.equal(of_made[name], of_other[name]) == ("lora_B" in name), name


def test_an_ensemble_of_adapters_stores_them_alone_and_is_loaded_again(make_problem, tmp_path):
    problem = make_problem("classification", with_lora())
    fitted = ensemble(problem).fit(problem.loader)
    stored = {name for member in fitted.members_ for name in member}
    assert stored == {"0.lora_A.default.weight", "0.lora_B.default.weight", *TRAINED}
    fitted.save(tmp_path / "ensemble.safetensors")
    again = ensemble(problem).load(tmp_path / "ensemble.safetensors")
    assert torch.equal(again.variance(problem.query), fitted.variance(problem.query))
    assert fitted.variance(problem.query).min() > 1e-4


def test_statistics_of_a_member_are_its_own(make_problem):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)).double()
    model[0].requires_grad_(False)
    problem = make_problem("classification", model)
    fitted = ensemble(problem).fit(problem.loader)
    assert "1.running_mean" in fitted.members_[0]
    assert not torch.equal(fitted.members_[0]["1.running_mean"], model[1].running_mean)


def test_where_nothing_is_frozen_it_is_a_deep_ensemble_that_is_wanted(make_problem):
    problem = make_problem("classification")
    with pytest.raises(ModelError, match="DeepEnsemble"):
        ensemble(problem).fit(problem.loader)


def test_a_layer_that_does_not_say_how_it_begins_is_named(make_problem):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return self.factor * x

    model = nn.Sequential(nn.Linear(4, 5), Scale(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    problem = make_problem("classification", model)
    with pytest.raises(ModelError, match=r"'1', a Scale"):
        ensemble(problem).fit(problem.loader)


def test_it_is_a_deep_ensemble_whose_members_are_made_of_the_model(make_problem):
    problem = make_problem("classification", body_and_head())
    adapters = ensemble(problem).fit(problem.loader)
    whole = DeepEnsemble(
        problem.model,
        "classification",
        make_model=lambda: with_fresh_adapters(problem.model),
        recipe=SHORT,
        n_members=3,
        seed=4,
        prior_precision=2.5,
    )
    assert torch.equal(whole.fit(problem.loader).member_outputs(problem.query), adapters.member_outputs(problem.query))
