"""Loaders: rows counted as they come, sums that do not depend on the order, and data that change rejected."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from estimators import LastLayerLaplace, LinearizedLaplace
from estimators.data import TrainingData
from estimators.data.batch import split_batch
from estimators.errors import DataError, ModelChangedError, NonDeterministicError
from estimators.models import Network
from estimators.models.subsets import matching_names


def fit(problem, loader):
    return LinearizedLaplace(problem.model, problem.likelihood, prior_precision=problem.delta).fit(loader)


def variance(problem, loader):
    return fit(problem, loader).variance(problem.query)


@pytest.mark.parametrize("batch_size", [1, 3, 6, 19, 20, 100])
@pytest.mark.parametrize("shuffle", [False, True])
def test_neither_batch_size_nor_order_changes_the_variance(batch_size, shuffle, make_problem, by_hand):
    problem = make_problem()
    loader = DataLoader(TensorDataset(problem.x, problem.y), batch_size=batch_size, shuffle=shuffle)
    fitted = fit(problem, loader)
    assert fitted.n_data_ == 20
    assert torch.allclose(fitted.variance(problem.query), by_hand(problem).variance(problem.query), rtol=1e-9)


def test_n_is_what_the_loader_yields(make_problem, by_hand):
    problem = make_problem()
    loader = DataLoader(TensorDataset(problem.x, problem.y), batch_size=6, drop_last=True)
    fitted = fit(problem, loader)
    assert fitted.n_data_ == 18
    problem.x, problem.y = problem.x[:18], problem.y[:18]
    assert torch.allclose(fitted.variance(problem.query), by_hand(problem).variance(problem.query), rtol=1e-9)


def test_dropping_other_rows_in_each_pass_is_rejected(make_problem, untouched):
    problem = make_problem()
    loader = DataLoader(TensorDataset(problem.x, problem.y), batch_size=6, drop_last=True, shuffle=True)
    with untouched(problem.model), pytest.raises(NonDeterministicError, match=r"other checksums.*drop_last=False"):
        fit(problem, loader)


def test_sampling_with_replacement_is_rejected(make_problem, untouched):
    problem = make_problem()
    data = TensorDataset(problem.x, problem.y)
    sampler = torch.utils.data.RandomSampler(data, replacement=True)
    loader = DataLoader(data, batch_size=6, sampler=sampler)
    with untouched(problem.model), pytest.raises(NonDeterministicError, match="without replacement"):
        fit(problem, loader)


class Augmented(Dataset):
    """Rows with noise from one of the three global generators."""

    def __init__(self, problem, source):
        self.problem, self.source = problem, source

    def __len__(self):
        return len(self.problem.x)

    def __getitem__(self, i):
        noise = {"torch": lambda: float(torch.randn(())), "numpy": np.random.randn, "random": random.random}
        return self.problem.x[i] * (1 + 0.1 * noise[self.source]()), self.problem.y[i]


@pytest.mark.parametrize("source", ["torch", "numpy", "random"])
def test_random_augmentation_is_rejected_and_the_generators_are_as_before(source, make_problem, untouched):
    problem = make_problem()
    loader = DataLoader(Augmented(problem, source), batch_size=6)
    with untouched(problem.model), pytest.raises(NonDeterministicError, match="no random augmentation"):
        fit(problem, loader)


@pytest.mark.parametrize("batch_size", [6, 20])
def test_a_one_shot_iterator_is_rejected(batch_size, make_problem, untouched):
    problem = make_problem(batch_size=batch_size)
    for once in (iter(problem.loader), (pair for pair in problem.loader)):
        with untouched(problem.model), pytest.raises(NonDeterministicError, match="re-iterable"):
            fit(problem, once)


@pytest.mark.parametrize("batch_size", [6, 20])
@pytest.mark.parametrize("estimator", [LinearizedLaplace, LastLayerLaplace])
def test_a_one_shot_iterator_is_rejected_where_the_last_layer_is_looked_for(estimator, batch_size, make_problem):
    """Looking for the layer takes the first batch away, which may be all there is."""
    problem = make_problem(batch_size=batch_size)
    with pytest.raises(DataError, match="re-iterable"):
        estimator(problem.model, problem.likelihood, subset_of_weights="last_layer").fit(iter(problem.loader))


def test_functional_dropout_is_rejected_though_the_model_is_in_eval_mode(make_problem, untouched):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return F.dropout(self.linear(x), p=0.3, training=True)

    problem = make_problem(model=Functional())
    with untouched(problem.model), pytest.raises(NonDeterministicError, match="functional dropout"):
        fit(problem, problem.loader)


def test_shuffling_leaves_the_global_random_state_alone(make_problem, untouched):
    problem = make_problem()
    loader = DataLoader(TensorDataset(problem.x, problem.y), batch_size=6, shuffle=True)
    with untouched(problem.model):
        fitted = fit(problem, loader)
        fitted.variance(problem.query)
        fitted.sample(problem.query, 3)


def test_data_too_large_to_keep_are_read_again_with_the_random_state_restored(make_problem, untouched, monkeypatch):
    problem = make_problem()
    expected = variance(problem, problem.loader)
    monkeypatch.setattr("estimators.data.training_data._CACHE_BYTES", 100)
    loader = DataLoader(TensorDataset(problem.x, problem.y), batch_size=6, shuffle=True)
    with untouched(problem.model):
        fitted = fit(problem, loader)
        assert fitted.objective_.batches.stored is None
        assert torch.allclose(fitted.variance(problem.query), expected, rtol=1e-9)


def checked(problem, loader):
    network = Network(problem.model, matching_names(problem.model, "all"))
    return TrainingData.checked(loader, network, problem.likelihood)


def test_data_that_are_read_again_come_in_one_order_and_leave_the_random_state(make_problem, monkeypatch):
    problem = make_problem()
    monkeypatch.setattr("estimators.data.training_data._CACHE_BYTES", 100)
    batches = checked(problem, DataLoader(TensorDataset(problem.x, problem.y), batch_size=6, shuffle=True))
    assert batches.stored is None
    state = torch.get_rng_state()
    first = torch.cat([batch.x for batch in batches])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat([batch.x for batch in batches]), first)


def test_small_data_are_kept_and_the_loader_is_not_asked_again(make_problem):
    problem = make_problem()
    passes = []

    class Counting(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    batches = checked(problem, Counting(problem.loader))
    assert len(passes) == 2
    for _ in range(3):
        assert torch.equal(torch.cat([batch.x for batch in batches]), problem.x)
    assert len(passes) == 2


@pytest.mark.parametrize("batch_size", [4, 20])
def test_a_shuffled_epoch_holds_every_row_once_with_its_own_target(batch_size, make_problem):
    problem = make_problem("regression")
    batches = checked(problem, problem.loader)
    epoch = list(batches.shuffled(batch_size, torch.Generator().manual_seed(1)))
    x, y = torch.cat([b.x for b in epoch]), torch.cat([b.y for b in epoch])
    order = [int((problem.x == row).all(1).nonzero()) for row in x]
    assert sorted(order) == list(range(20))
    assert order != sorted(order)
    assert torch.equal(y, problem.y[order])
    assert max(len(batch) for batch in epoch) == batch_size


def test_rows_of_different_shapes_are_shuffled_as_whole_batches(make_problem):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x.mean(1))

    problem = make_problem(model=Mean(), shape=(2, 4))
    long = torch.randn(5, 9, 4, dtype=torch.float64)
    batches = checked(problem, [(problem.x, problem.y), (long, problem.y[:5])])
    epoch = list(batches.shuffled(4, torch.Generator().manual_seed(0)))
    assert sorted(len(batch) for batch in epoch) == [5, 20]
    assert batches.n_data == 25


class FromKeywords(nn.Module):
    """What a language model looks like from outside: keywords in, an object with logits out."""

    def __init__(self, inner, *, wrapped):
        super().__init__()
        self.inner, self.wrapped = inner, wrapped

    def forward(self, features, scale=None):
        f = self.inner(features if scale is None else features * scale)
        return SimpleNamespace(logits=f, loss=None) if self.wrapped else f


@pytest.mark.parametrize("wrapped", [True, False])
def test_dicts_with_labels_and_outputs_with_logits_are_understood(wrapped, make_problem):
    problem = make_problem()
    expected = variance(problem, problem.loader)
    problem.model = FromKeywords(problem.model, wrapped=wrapped).eval()
    loader = [{"features": x, "labels": y} for x, y in problem.loader]
    fitted = fit(problem, loader)
    assert fitted.n_data_ == 20
    assert torch.allclose(fitted.variance({"features": problem.query}), expected, rtol=1e-9)


def test_dicts_of_several_tensors_keep_their_rows_together(make_problem):
    problem = make_problem()
    scale = torch.rand(20, 1, dtype=torch.float64) + 0.5
    expected = variance(problem, [(problem.x * scale, problem.y)])
    problem.model = FromKeywords(problem.model, wrapped=True).eval()
    loader = [
        {"features": x, "scale": s, "labels": y}
        for x, s, y in zip(problem.x.split(6), scale.split(6), problem.y.split(6), strict=True)
    ]
    query = {"features": problem.query, "scale": torch.ones(7, 1, dtype=torch.float64)}
    assert torch.allclose(variance_of(problem, loader, query), expected, rtol=1e-9)


def variance_of(problem, loader, query):
    return fit(problem, loader).variance(query)


class Pair(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pair):
        left, right = pair
        return self.inner(left + right)


@pytest.mark.parametrize("make", [tuple, list], ids=["tuple", "list"])
def test_a_pair_of_inputs_is_one_pytree(make, make_problem):
    problem = make_problem()
    expected = variance(problem, problem.loader)
    problem.model = Pair(problem.model).eval()
    loader = [(make((x / 3, 2 * x / 3)), y) for x, y in problem.loader]
    query = make((problem.query / 3, 2 * problem.query / 3))
    assert torch.allclose(variance_of(problem, loader, query), expected, rtol=1e-9)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_the_closed_form_reads_pytrees_too(structure, make_problem):
    problem = make_problem()
    options = {"prior_precision": 2.5, "hessian_structure": structure}
    plain = LastLayerLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
    wrapped = FromKeywords(problem.model, wrapped=True).eval()
    loader = [{"features": x, "labels": y} for x, y in problem.loader]
    fitted = LastLayerLaplace(wrapped, problem.likelihood, **options).fit(loader)
    assert torch.allclose(fitted.variance({"features": problem.query}), plain.variance(problem.query), rtol=1e-12)


def test_lists_of_two_are_batches_as_data_loaders_yield_them(make_problem):
    problem = make_problem()
    assert torch.equal(variance(problem, [list(pair) for pair in problem.loader]), variance(problem, problem.loader))


@pytest.mark.parametrize(
    ("item", "received"),
    [
        (torch.zeros(3, 4), "Tensor"),
        ((torch.zeros(3, 4),), "tuple of length 1"),
        ((torch.zeros(3, 4), torch.zeros(3), torch.zeros(3)), "tuple of length 3"),
        ((torch.zeros(3, 4), [0, 1, 2]), "tuple of length 2"),
        ({"features": torch.zeros(3, 4)}, "dict of length 1"),
        ({"features": torch.zeros(3, 4), "labels": [0, 1, 2]}, "dict of length 2"),
        (None, "NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_batch_is_rejected_with_its_type(item, received):
    with pytest.raises(DataError, match=rf"batches \(x, y\).*{received}.*pairs"):
        split_batch(item)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_class_indices_of_other_integer_types_count_alike(dtype, make_problem):
    problem = make_problem()
    for curvature in ("ggn", "hessian"):
        options = {"prior_precision": 60.0, "curvature": curvature}
        fits = [
            LinearizedLaplace(problem.model, problem.likelihood, **options).fit([(problem.x, y)])
            for y in (problem.y, problem.y.to(dtype))
        ]
        assert torch.equal(fits[0].variance(problem.query), fits[1].variance(problem.query))
        assert torch.equal(fits[0].log_marginal_likelihood(), fits[1].log_marginal_likelihood())


@pytest.mark.parametrize("empty", [[], [(torch.zeros(0, 4).double(), torch.zeros(0).long())]], ids=["none", "no rows"])
@pytest.mark.parametrize("estimator", [LinearizedLaplace, LastLayerLaplace])
def test_a_loader_without_rows_is_rejected(empty, estimator, make_problem):
    problem = make_problem()
    with pytest.raises(DataError, match=r"at least one row.*empty"):
        estimator(problem.model, problem.likelihood).fit(empty)


def test_an_empty_batch_among_others_changes_nothing(make_problem):
    problem = make_problem()
    expected = variance(problem, problem.loader)
    nothing = (problem.x[:0], problem.y[:0])
    for loader in ([nothing, *problem.loader], [*problem.loader, nothing]):
        fitted = fit(problem, loader)
        assert fitted.n_data_ == 20
        assert torch.allclose(fitted.variance(problem.query), expected, rtol=1e-9)


def changed_weight(model):
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6


def swapped_rows(model):
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.flip(0))


def changed_running_statistics(model):
    model[1].running_mean.add_(1e-3)


def trained_a_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(torch.ones(2, 4).double()).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [changed_weight, swapped_rows, changed_running_statistics, trained_a_step])
@pytest.mark.parametrize("method", ["variance", "covariance", "predict", "sample"])
def test_a_model_changed_since_fit_is_rejected(change, method, make_problem):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    problem = make_problem(model=model)
    fitted = fit(problem, problem.loader)
    change(problem.model)
    arguments = (problem.query, 2) if method == "sample" else (problem.query,)
    with pytest.raises(ModelChangedError, match=r"changed weights or buffers: .*fit again"):
        getattr(fitted, method)(*arguments)


def test_weights_put_back_make_the_fit_valid_again(make_problem):
    problem = make_problem()
    fitted = fit(problem, problem.loader)
    expected, kept = fitted.variance(problem.query), problem.model[0].weight.detach().clone()
    changed_weight(problem.model)
    with torch.no_grad():
        problem.model[0].weight.copy_(kept)
    assert torch.equal(fitted.variance(problem.query), expected)


def test_a_second_fit_takes_the_changed_model(make_problem, by_hand):
    problem = make_problem()
    estimator = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=problem.delta)
    estimator.fit(problem.loader)
    swapped_rows(problem.model)
    found = estimator.fit(problem.loader).variance(problem.query)
    assert torch.allclose(found, by_hand(problem).variance(problem.query), rtol=1e-9)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_randomness_inside_the_network_leaves_the_global_state_alone(subset, make_problem, untouched):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x * (1 + 0.1 * torch.randn_like(x)))

    problem = make_problem(model=Noisy())
    estimator = LinearizedLaplace(problem.model, problem.likelihood, subset_of_weights=subset)
    with untouched(problem.model), pytest.raises(NonDeterministicError):
        estimator.fit(problem.loader)
