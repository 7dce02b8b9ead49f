"""Networks that the user trained: used as they are, as members of an ensemble, and with dropout."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

from bdl_bench import Problem, compare
from bdl_bench.records import RecordStore, Training
from bdl_bench.records.problem_digest import problem_digest
from estimators.baselines import DeepEnsemble, MCDropout
from estimators.errors import ModelError, OptionError
from estimators.runtime.rng import seeded_random_state
from estimators.training import Recipe, train_map

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(30, 3, generator=GENERATOR, dtype=torch.float64)
Y = X[:, :2].sin() + 0.1 * torch.randn(30, 2, generator=GENERATOR, dtype=torch.float64)
BATCHES = list(zip(X.split(7), Y.split(7), strict=True))
CLASSES = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()
LONG = Recipe(epochs=100, lr=0.05)
DELTA = 0.5


def fresh(*, dropout=False):
    middle = [nn.Dropout(0.2)] if dropout else []
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), *middle, nn.Linear(6, 2)).double()


@functools.cache
def trained(seed, **options):
    with seeded_random_state(seed):
        model = fresh(**options)
        train_map(model, "regression", BATCHES, prior_precision=DELTA, recipe=LONG, seed=seed)
    return model.eval()


MODEL, OTHERS = trained(0), [trained(seed) for seed in (1, 2)]
DROPPING = trained(5, dropout=True)


def problem(**options):
    return Problem(copy.deepcopy(MODEL), "regression", BATCHES, BATCHES, BATCHES[:3], prior_precision=DELTA, **options)


def run(made, method, directory):
    found = compare(made, [method], seeds=1, tune_budget=0, out=directory, progress_bar=False)
    (record,) = (record for record in found.records if record.method == method)
    assert record.status == "ok", record.reason
    return record, RecordStore(directory).arrays(record), found


def members_at(networks, x):
    with torch.no_grad():
        return torch.stack([network(x) for network in networks])


def test_an_ensemble_of_trained_members_is_their_mean_and_variance(tmp_path):
    record, arrays, _ = run(problem(members=OTHERS), "ensemble", tmp_path)
    outputs = members_at([MODEL, *OTHERS], torch.cat([x for x, _ in BATCHES[:3]]))
    assert arrays["mean"] == pytest.approx(outputs.mean(0).numpy(), rel=1e-12)
    assert arrays["epistemic_variance"] == pytest.approx(outputs.var(0).numpy(), rel=1e-12)
    assert "training" not in str(record.fit_report.get("passes", ""))


def test_a_function_gives_the_members_by_number(tmp_path):
    asked = []

    def member(number):
        asked.append(number)
        return [None, *OTHERS, trained(3), trained(4)][number]

    _, arrays, _ = run(problem(members=member), "ensemble", tmp_path)
    assert sorted(set(asked)) == [1, 2, 3, 4]
    outputs = members_at([MODEL, *OTHERS, trained(3), trained(4)], torch.cat([x for x, _ in BATCHES[:3]]))
    assert arrays["epistemic_variance"] == pytest.approx(outputs.var(0).numpy(), rel=1e-12)


def test_members_change_the_content_key_of_a_problem():
    made = [problem(), problem(members=OTHERS), problem(members=OTHERS[:1]), problem(dropout_model=DROPPING),
            problem(recipe=LONG), problem(recipe=LONG, trained=True), problem(members=lambda n: [None, *OTHERS][n])
            ]  # fmt: skip
    made[-1].trained_members = OTHERS[:1]  # as if the function gave one
    digests = [problem_digest(each) for each in made]
    assert len(set(digests[:-1])) == 6
    assert digests[-1] != digests[0]


def test_a_trained_dropout_model_is_used_as_it_is(tmp_path):
    record, arrays, _ = run(problem(dropout_model=DROPPING), "dropout", tmp_path)
    expected = MCDropout(DROPPING, "regression", n_samples=30, seed=0).fit(BATCHES)
    x = torch.cat([x for x, _ in BATCHES[:3]])
    assert arrays["epistemic_variance"] == pytest.approx(expected.variance(x).numpy(), rel=1e-12)
    assert record.metrics["reg/RMSE"] < 1


def test_without_members_or_recipe_the_ensemble_is_skipped_with_both_remedies(tmp_path):
    found = compare(problem(), ["ensemble", "dropout"], seeds=1, tune_budget=0, out=tmp_path, progress_bar=False)
    assert [record.status for record in found.records] == ["skipped", "skipped"]
    assert all("members=, dropout_model=" in record.reason for record in found.records)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([nn.Linear(3, 2).double().eval()], r"members\[0\] with.*absent"),
        (["net.pt"], "a str as"),
        ([fresh().train()], "train mode"),
    ],
)
def test_members_that_are_none_are_rejected_when_the_problem_is_made(members, told):
    with pytest.raises(ModelError, match=told):
        problem(members=members)


def test_a_dropout_model_without_dropout_is_rejected():
    with pytest.raises(ModelError, match=r"nn\.Dropout of p > 0"):
        problem(dropout_model=MODEL)


def ensemble(**options):
    return DeepEnsemble(MODEL, "regression", prior_precision=DELTA, **options)


def test_the_same_network_twice_is_no_ensemble():
    with pytest.raises(ModelError, match=r"weights of the model again in members\[1\]"):
        ensemble(members=[OTHERS[0], copy.deepcopy(MODEL)]).fit(BATCHES)
    with pytest.raises(ModelError, match=r"members\[0\] again"):
        ensemble(members=[OTHERS[0], OTHERS[0]]).fit(BATCHES)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"make_model": fresh},
        {"recipe": LONG},
        {"members": OTHERS, "make_model": fresh, "recipe": LONG},
        {"members": OTHERS, "recipe": LONG},
        {"members": []},
        {"members": OTHERS, "n_members": 5},
    ],
)
def test_members_or_a_way_to_train_them_but_not_both(options):
    with pytest.raises(OptionError):
        ensemble(**options)


def test_trained_members_are_copied_at_the_fit_saved_and_loaded(tmp_path):
    mutable = [copy.deepcopy(each) for each in OTHERS]
    fitted = ensemble(members=mutable).fit(BATCHES)
    before = fitted.variance(X)
    with torch.no_grad():
        mutable[0][0].weight.zero_()
    assert torch.equal(fitted.variance(X), before)
    assert not fitted.retrains
    fitted.save(tmp_path / "ensemble.safetensors")
    again = ensemble(members=OTHERS).load(tmp_path / "ensemble.safetensors")
    assert torch.equal(again.variance(X), before)
    assert torch.equal(
        fitted.clone_with(prior_precision=2.0).variance(X), ensemble(members=mutable).fit(BATCHES).variance(X)
    )


def test_a_trained_model_with_a_recipe_is_trained_further_and_the_report_says_so(tmp_path):
    record, arrays, found = run(problem(recipe=Recipe(epochs=2)), "map", tmp_path)
    assert record.training.further
    assert record.training.epochs == 2
    untouched = MODEL(torch.cat([x for x, _ in BATCHES[:3]])).detach().numpy()
    assert not np.allclose(arrays["mean"], untouched)
    for page in ("report.html", "report.md"):
        text = (tmp_path / page).read_text()
        assert "The network of seed" in text
        assert "trained further for 2 epochs" in text
        assert "trained=True" in text
    assert "trained further for 2 epochs by Recipe(" in found.report.read_text()


def test_a_cached_training_still_says_so(tmp_path):
    first, _, _ = run(problem(recipe=Recipe(epochs=2)), "map", tmp_path)
    second, _, _ = run(problem(recipe=Recipe(epochs=2)), "gradient-norm", tmp_path)
    assert second.training == first.training


def test_members_in_wrappers_are_the_networks_inside():
    wrapped = [nn.DataParallel(copy.deepcopy(each)).eval() for each in OTHERS]
    expected = ensemble(members=OTHERS).fit(BATCHES).variance(X)
    assert torch.equal(ensemble(members=wrapped).fit(BATCHES).variance(X), expected)
    assert problem(members=wrapped).trained_members == wrapped


def test_a_model_marked_as_trained_is_used_as_it_is_beside_a_recipe(tmp_path):
    made = problem(recipe=Recipe(epochs=2), make_model=fresh, trained=True)
    record, arrays, _ = run(made, "map", tmp_path)
    assert arrays["mean"] == pytest.approx(MODEL(torch.cat([x for x, _ in BATCHES[:3]])).detach().numpy(), rel=1e-12)
    assert record.training == Training(seconds=None, recipe=None)
    assert "used as it is" in (tmp_path / "report.html").read_text()
    retrained, arrays, _ = run(made, "ensemble", tmp_path)
    assert retrained.status == "ok"
    assert (arrays["epistemic_variance"] > 0).all()


@pytest.mark.parametrize(("kind", "outputs", "y", "mode"), [
    ("regression", 2, Y, True), ("regression", 2, Y, False), ("classification", 3, CLASSES, False),
    ("binary", 1, (CLASSES > 0).double()[:, None], True)])  # fmt: skip
def test_a_fresh_network_is_trained_not_trained_further(kind, outputs, y, mode, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double().train(mode)
        batches = list(zip(X.split(7), y.split(7), strict=True))
        return Problem(model, kind, batches, batches, batches, prior_precision=DELTA, recipe=Recipe(epochs=3))

    found = compare(make, ["map"], seeds=2, tune_budget=0, out=tmp_path, progress_bar=False)
    assert [record.training.further for record in found.records] == [False] * 2
    assert all("trained for 3 epochs" in record.training.summary for record in found.records)
    assert "trained further" not in (tmp_path / "report.html").read_text()


def test_a_network_is_untrained_only_with_a_recipe():
    with pytest.raises(OptionError, match="trained=False"):
        problem(trained=False)
