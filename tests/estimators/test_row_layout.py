"""Inputs that rows share and values beside the tensors of a batch: kept whole, and those of their own batch."""

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from estimators import (
    FineTune,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    NewtonRefit,
    Pointwise,
    PosteriorDraws,
    RegVar,
)
from estimators.data import TrainingData
from estimators.data.batch import split_batch
from estimators.errors import DataError
from estimators.likelihoods import resolve_likelihood
from estimators.models import Network
from estimators.models.subsets import matching_names
from estimators.numerics.pytrees import RowLayout, Shared, concatenate, n_rows, select_rows, split_rows, tensors_of
from estimators.persistence.checksums import bits_by_row, digest
from estimators.training import Recipe, train_map

DELTA = 0.7
NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(1)], layout=torch.jagged)
EXACT = LinearResponse(tol=1e-12)
N, C = 10, 2


def outputs(model, x):
    """The user's own module, the whole batch in one call."""
    f = model(**x) if isinstance(x, dict) else model(x)
    return f.flatten(1)


def jacobian(model, x):
    """f (M, C) and J (M, C, P), one output after another by plain autograd."""
    parameters = list(model.parameters())
    f = outputs(model, x)
    rows = [torch.autograd.grad(out, parameters, retain_graph=True) for out in f.flatten()]
    return f.detach(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(*f.shape, -1)


def reference(model, batches, query, likelihood):
    """diag J A⁻¹ Jᵀ, A = Σ Jᵀ Λ J + δ."""
    a = DELTA * torch.eye(sum(p.numel() for p in model.parameters())).double()
    for x, _ in batches:
        f, j = jacobian(model, x)
        p = f.softmax(-1)
        lam = torch.eye(C).double().expand(len(f), -1, -1)
        lam = lam if likelihood == "regression" else torch.diag_embed(p) - p[:, :, None] * p[:, None]
        a = a + torch.einsum("ncp,ncd,ndq->pq", j, lam, j)
    j = jacobian(model, query)[1]
    return torch.einsum("mcp,pq,mcq->mc", j, torch.linalg.inv(a), j)


class Timed(nn.Module):
    """A time of the whole batch enters every layer; a string chooses the activation."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, x, time, activation="tanh"):
        return self.last(getattr(torch, activation)(self.first(x) * (1 + time)))


class Tokens(nn.Module):
    """Position ids (1, T) for all rows."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(7, 3), nn.Embedding(4, 3), nn.Linear(3, C)

    def forward(self, position_ids, input_ids):
        return self.head(torch.tanh(self.words(input_ids) + self.places(position_ids)).mean(1))


class Graph(nn.Module):
    """Rows of V nodes along edges (2, E) that all rows share."""

    def __init__(self):
        super().__init__()
        self.node, self.head = nn.Linear(2, 3), nn.Linear(3, C)

    def forward(self, edges, x):
        h = torch.tanh(self.node(x))
        return self.head(torch.tanh(h[:, edges[0]] * h[:, edges[1]] + h[:, edges[1]]).sum(1))


def problem(name):
    """A network, batches of 4, 4 and 2 rows, and a query of 3."""
    torch.manual_seed(3)
    sizes = (4, 4, 2)
    if name in ("time as a number", "time as a tensor", "activation"):
        model = Timed()
        x = [torch.randn(b, 3).double() for b in (*sizes, 3)]
        times = (0.1, 0.9, 2.5, 0.4)
        activations = ("tanh", "sin", "sigmoid", "tanh")
        if name == "activation":
            inputs = [{"x": x, "time": 0.5, "activation": a} for x, a in zip(x, activations, strict=True)]
        else:
            wrap = float if name == "time as a number" else lambda t: torch.tensor(t).double()
            inputs = [{"time": wrap(t), "x": x} for x, t in zip(x, times, strict=True)]
    elif name == "position ids":
        model = Tokens()
        inputs = [
            {"position_ids": torch.arange(4)[None], "input_ids": torch.randint(0, 7, (b, 4))} for b in (*sizes, 3)
        ]
    else:
        model = Graph()
        edges = torch.tensor([[0, 1, 2, 1], [1, 2, 3, 3]])
        inputs = [{"edges": edges, "x": torch.randn(b, 4, 2).double()} for b in (*sizes, 3)]
    *training, query = inputs
    return model.double().eval(), list(zip(training, sizes, strict=True)), query


NAMES = ["time as a number", "time as a tensor", "activation", "position ids", "edges"]
LIKELIHOODS = ["regression", "classification"]


def with_targets(batches, likelihood):
    generator = torch.Generator().manual_seed(5)
    return [
        (x, torch.randn(b, C, generator=generator).double() if likelihood == "regression" else torch.arange(b) % C)
        for x, b in batches
    ]


ESTIMATORS = {
    "cholesky": lambda *a, **k: LinearizedLaplace(*a, inverse="cholesky", **k),
    "dual": lambda *a, **k: LinearizedLaplace(*a, inverse="dual", **k),
    "cg": lambda *a, **k: LinearizedLaplace(*a, inverse="cg", **k),
    "default": LinearizedLaplace,
    "pointwise": lambda *a, **k: RegVar(*a, regularizer=Pointwise(), solver=EXACT, **k),
    "refit": lambda *a, **k: RegVar(*a, regularizer=Pointwise(), solver=NewtonRefit(), **k),
}


def routes():
    """Every estimator with every kind of input, and either with every likelihood; the rest is nightly."""
    for (i, name), (j, estimator), (k, likelihood) in product(*map(enumerate, (NAMES, ESTIMATORS, LIKELIHOODS))):
        marks = () if k == (i + j) % len(LIKELIHOODS) else pytest.mark.verification
        yield pytest.param(estimator, name, likelihood, marks=marks, id=f"{estimator}-{name}-{likelihood}")


@pytest.mark.parametrize(("estimator", "name", "likelihood"), list(routes()))
def test_what_rows_share_is_kept_whole_by_every_route(estimator, name, likelihood):
    model, sized, query = problem(name)
    batches = with_targets(sized, likelihood)
    fitted = ESTIMATORS[estimator](model, likelihood, prior_precision=DELTA).fit(batches)
    assert fitted.n_data_ == N
    expected = reference(model, batches, query, likelihood)
    rtol = 1e-4 if estimator == "refit" else 1e-7
    assert torch.allclose(fitted.variance(query), expected, rtol=rtol)


@pytest.mark.parametrize("name", NAMES)
def test_structured_and_last_layer_forms_take_shared_inputs(name):
    model, sized, query = problem(name)
    batches = with_targets(sized, "regression")
    closed = LastLayerLaplace(model, "regression", prior_precision=DELTA).fit(batches)
    exact = LinearizedLaplace(model, "regression", prior_precision=DELTA, subset_of_weights="last_layer").fit(batches)
    assert torch.allclose(closed.variance(query), exact.variance(query), rtol=1e-8)
    diagonal = LinearizedLaplace(model, "regression", prior_precision=DELTA, hessian_structure="diag").fit(batches)
    squares = sum(jacobian(model, x)[1].square().sum((0, 1)) for x, _ in batches) + DELTA
    expected = (jacobian(model, query)[1].square() / squares).sum(-1)
    assert torch.allclose(diagonal.variance(query), expected, rtol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_draws_between_the_bounds_and_their_weight_take_shared_inputs(name):
    model, sized, query = problem(name)
    batches = with_targets(sized, "regression")
    draws = PosteriorDraws(4, variance_estimate="bounds")
    regvar = RegVar(model, "regression", prior_precision=DELTA, regularizer=draws, solver=LinearResponse())
    fitted = regvar.fit(batches)
    lower, upper = fitted.variance_bounds(query)
    expected = reference(model, batches, query, "regression")
    assert (lower <= expected * (1 + 1e-6)).all()
    assert (expected <= upper * (1 + 1e-6)).all()
    assert torch.allclose(fitted.variance(query), expected, rtol=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_of_regrouped_rows_has_the_outputs_of_the_users_batches(name):
    model, sized, _ = problem(name)
    batches = with_targets(sized, "regression")
    network = Network(model, matching_names(model, "all"))
    checked = TrainingData.checked(batches, network, resolve_likelihood("regression"))
    found = torch.cat([network.outputs(b.x) for b in checked.shuffled(3, torch.Generator().manual_seed(1))])
    expected = torch.cat([outputs(model, x) for x, _ in batches])
    assert torch.allclose(found.sort(0).values, expected.sort(0).values)
    regrouped = name in ("position ids", "edges")
    sizes = sorted(len(b) for b in checked.shuffled(3, torch.Generator().manual_seed(1)))
    assert sizes == ([1, 3, 3, 3] if regrouped else [2, 4, 4])


def test_minibatch_refits_take_the_time_of_each_batch():
    model, sized, query = problem("time as a number")
    batches = with_targets(sized, "regression")
    recipe = Recipe(epochs=100, batch_size=5, lr="auto", optimizer="nesterov")
    solver = FineTune(lam=1e-5, recipe=recipe)
    fitted = RegVar(model, "regression", prior_precision=DELTA, regularizer=Pointwise(), solver=solver).fit(batches)
    expected = reference(model, batches, query, "regression")
    assert torch.allclose(fitted.variance(query), expected, rtol=0.03)


def test_training_takes_the_time_of_each_batch():
    model, sized, _ = problem("time as a number")
    batches = with_targets(sized, "regression")
    train_map(model, "regression", batches, prior_precision=DELTA, recipe=Recipe(epochs=300, batch_size=5, lr=0.05))
    loss = 0.5 * DELTA * sum(p.square().sum() for p in model.parameters())
    loss = loss + sum(0.5 * (outputs(model, x) - y).square().sum() for x, y in batches)
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 0.05


def test_a_saved_fit_knows_which_inputs_are_shared(tmp_path):
    """A query of as many rows as a shared tensor has entries does not tell by itself."""
    model, sized, _ = problem("edges")
    batches = with_targets(sized, "regression")
    fitted = LinearizedLaplace(model, "regression", prior_precision=DELTA).fit(batches)
    query = {"edges": batches[0][0]["edges"], "x": batches[0][0]["x"][:2]}
    expected = reference(model, batches, query, "regression")
    assert torch.allclose(fitted.variance(query), expected, rtol=1e-7)
    fitted.save(tmp_path / "fit")
    loaded = LinearizedLaplace(model, "regression", prior_precision=DELTA).load(tmp_path / "fit")
    assert torch.allclose(loaded.variance(query), expected, rtol=1e-7)


def test_a_query_whose_tensors_disagree_about_the_rows_is_rejected():
    model, sized, query = problem("position ids")
    fitted = LinearizedLaplace(model, "classification").fit(with_targets(sized, "classification"))
    with pytest.raises(DataError, match=r"rows first|number of rows"):
        fitted.variance({**query, "extra": torch.zeros(2, 4)})


def test_a_layout_is_decided_over_all_batches():
    first = {"x": torch.zeros(4, 3), "one": torch.zeros(1, 3), "edges": torch.zeros(2, 5), "mask": torch.zeros(1, 3)}
    second = {"x": torch.zeros(2, 3), "one": torch.zeros(1, 3), "edges": torch.zeros(2, 5), "mask": torch.zeros(2, 3)}
    layout = RowLayout().observe(first, 4).observe(second, 2)
    assert layout.shared == {"['one']", "['edges']"}
    marked = layout.mark(second, 2)
    assert isinstance(marked["edges"], Shared)
    assert isinstance(marked["mask"], torch.Tensor)
    assert isinstance(layout.mark(first, 4)["mask"], Shared)
    assert n_rows({"edges": marked["edges"], "x": marked["x"]}) == 2
    assert [part["edges"].value.shape[0] for part in split_rows(marked, 1)] == [2, 2]
    assert select_rows(marked, slice(0, 1))["x"].shape == (1, 3)
    assert len(tensors_of(marked)) == 4
    assert layout.mark(marked, 2)["edges"] is marked["edges"]


@pytest.mark.parametrize(
    ("trees", "received"),
    [
        ([{"t": 1.0, "x": torch.zeros(2)}, {"t": 2.0, "x": torch.zeros(2)}], r"\['t'\], which rows share"),
        ([{"t": torch.tensor(1.0), "x": torch.zeros(2)}, {"t": torch.tensor(2.0), "x": torch.zeros(2)}], r"\['t'\]"),
        ([{"x": torch.zeros(2)}, {"x": torch.zeros(2), "t": 1}], "different structure"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"\(2, 3\).*\(2, 4\)"),
        ([torch.zeros(2, 3), torch.zeros(2, 3).double()], r"float32.*float64"),
        ([Shared(torch.zeros(2)), torch.zeros(2)], "rows in one batch and shared"),
    ],
)
def test_batches_that_differ_in_more_than_their_rows_are_not_joined(trees, received):
    with pytest.raises(DataError, match=received):
        concatenate(trees)


@dataclass
class Inputs:
    x: torch.Tensor
    time: float


@dataclass
class Item:
    x: torch.Tensor
    time: float
    labels: torch.Tensor


def wrappers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import ModelOutput

    @dataclass
    class Wrapped(ModelOutput):
        x: torch.Tensor | None = None
        time: float | None = None
        labels: torch.Tensor | None = None

    return {
        "UserDict": UserDict,
        "OrderedDict": OrderedDict,
        "BatchEncoding": transformers.BatchEncoding,
        "ModelOutput": lambda entries: Wrapped(**entries),
        "dataclass": lambda entries: Item(**entries) if "labels" in entries else Inputs(**entries),
    }


@pytest.mark.parametrize("kind", ["UserDict", "OrderedDict", "BatchEncoding", "ModelOutput", "dataclass"])
@pytest.mark.parametrize("paired", [False, True], ids=["with labels", "pairs"])
def test_mappings_and_dataclasses_are_batches_and_queries(kind, paired):
    wrap = wrappers()[kind]
    model, sized, query = problem("time as a number")
    batches = with_targets(sized, "classification")
    wrapped = [(wrap(x), y) if paired else wrap({**x, "labels": y}) for x, y in batches]
    fitted = LinearizedLaplace(model, "classification", prior_precision=DELTA).fit(wrapped)
    expected = reference(model, batches, query, "classification")
    assert torch.allclose(fitted.variance(wrap(query)), expected, rtol=1e-7)
    assert fitted.predict(wrap(query)).probs.shape == (3, C)
    assert fitted.sample(wrap(query), 2).shape == (2, 3, C)


def test_a_model_may_return_its_logits_in_a_dict():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, C)

        def forward(self, x):
            return {"loss": None, "logits": self.inner(x)}

    model = Named().double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.arange(5) % C
    named = LinearizedLaplace(model, "classification").fit([(x, y)]).variance(x)
    plain = LinearizedLaplace(model.inner, "classification").fit([(x, y)]).variance(x)
    assert torch.allclose(named, plain)


def test_a_column_called_label_is_the_targets():
    x, y = torch.zeros(3, 2), torch.arange(3)
    batch = split_batch({"x": x, "label": y})
    assert batch.y is y
    assert list(batch.x) == ["x"]
    with pytest.raises(DataError, match=r"'label', 'labels'.*remove_columns"):
        split_batch({"x": x, "label": y, "labels": y})


@pytest.mark.parametrize(
    ("item", "remedy"),
    [
        ((torch.zeros(3, 2), torch.ones(3), torch.arange(3)), r"\(\(x, mask\), y\)"),
        ((pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)]), torch.arange(2)), "pack_padded_sequence in forward"),
        ((torch.zeros(3, 2).to_sparse(), torch.arange(3)), "to_dense"),
        (
            (NESTED, torch.arange(2)),
            "to_padded_tensor",
        ),
        (({"x": torch.zeros(3, 2), "w": np.zeros(3)}, torch.arange(3)), "from_numpy"),
        ((torch.zeros(3, 2), torch.tensor(1)), "one target per row"),
        ((torch.zeros(3, 2), torch.zeros(3, 2).to_sparse()), "dense"),
        (({"x": torch.zeros(3, 2), "cache": object()}, torch.arange(3)), "dense tensor"),
    ],
    ids=["triple", "packed", "sparse", "nested", "numpy", "one target", "sparse targets", "object"],
)
def test_items_whose_rows_cannot_be_taken_are_rejected_with_a_remedy(item, remedy):
    with pytest.raises(DataError, match=remedy):
        split_batch(item)


def test_rows_packed_into_one_long_tensor_are_rejected():
    """The nodes of three graphs: no tensor has a row for each target."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.node = nn.Linear(2, C)

        def forward(self, nodes, graph):
            h = self.node(nodes)
            return h.new_zeros(3, C).index_add(0, graph, h)

    batch = {"nodes": torch.randn(7, 2), "graph": torch.tensor([0, 0, 1, 1, 1, 2, 2]), "labels": torch.arange(3) % C}
    with pytest.raises(DataError, match=r"each of the 3 targets.*\['graph'\] 7.*pad what is packed"):
        LinearizedLaplace(Pooled().eval(), "classification").fit([batch])


def test_a_list_of_a_python_value_for_each_row_is_rejected_and_a_tuple_for_all_is_not():
    model, sized, query = problem("time as a number")

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, time, scale):
            return self.inner(x, time) * torch.tensor(scale).double().mean()

    batches = with_targets(sized, "regression")
    lists = [({**x, "scale": [1.0] * len(y)}, y) for x, y in batches]
    with pytest.raises(DataError, match=r"\['scale'\].*torch\.tensor"):
        LinearizedLaplace(Scaled().eval(), "regression").fit(lists)
    with pytest.raises(DataError, match=r"\['scale'\].*torch\.tensor"):
        train_map(Scaled(), "regression", lists, prior_precision=1.0, recipe=Recipe(epochs=1, lr=0.1))
    for scale in ((1.0, 1.0, 1.0, 1.0), [1.0, 1.0]):
        scaled = [({**x, "scale": scale}, y) for x, y in batches]
        found = LinearizedLaplace(Scaled().eval(), "regression", prior_precision=DELTA).fit(scaled)
        expected = reference(model, batches, query, "regression")
        assert torch.allclose(found.variance({**query, "scale": scale}), expected, rtol=1e-7)


def test_queries_made_in_inference_mode_are_taken_in_any_mapping():
    model, sized, query = problem("time as a number")
    fitted = LinearizedLaplace(model, "regression").fit(with_targets(sized, "regression"))
    with torch.inference_mode():
        made = UserDict({**query, "x": query["x"].clone()})
    assert torch.equal(fitted.variance(made), fitted.variance(query))


class Projected(nn.Module):
    """A matrix (4, 4) that rows share; a mask has rows."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, basis, mask, x):
        return self.last(torch.tanh(self.first(x) @ basis) * mask)


def projected(sizes=(4, 4, 4), basis=None):
    torch.manual_seed(2)
    model = Projected().double().eval()
    basis = torch.randn(4, 4).double() if basis is None else basis
    inputs = [{"basis": basis, "mask": torch.rand(b, 4).double(), "x": torch.randn(b, 3).double()} for b in (*sizes, 3)]
    return model, [(x, torch.randn(len(x["x"]), C).double()) for x in inputs[:-1]], inputs[-1]


@pytest.mark.parametrize("estimator", ["cholesky", "dual", "default", "pointwise", "refit"])
@pytest.mark.parametrize("kept", [True, False])
def test_batches_of_one_size_tell_what_rows_share_by_a_row_alone(estimator, kept, monkeypatch):
    """The matrix has as many rows as every batch."""
    if not kept:
        monkeypatch.setattr("estimators.data.training_data._CACHE_BYTES", 100)
    model, batches, query = projected()
    fitted = ESTIMATORS[estimator](model, "regression", prior_precision=DELTA).fit(batches)
    expected = reference(model, batches, query, "regression")
    assert fitted.objective_.batches.layout.shared == {"['basis']"}
    assert torch.allclose(fitted.variance(query), expected, rtol=1e-4 if estimator == "refit" else 1e-7)


def test_training_on_batches_of_one_size_keeps_what_rows_share_whole():
    model, batches, _ = projected()
    model.train()
    train_map(model, "regression", batches, prior_precision=DELTA, recipe=Recipe(epochs=300, batch_size=5, lr=0.05))
    loss = 0.5 * DELTA * sum(p.square().sum() for p in model.parameters())
    loss = loss + sum(0.5 * (outputs(model, x) - y).square().sum() for x, y in batches)
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 0.1


class Scaled(nn.Module):
    """Outputs of rows with a scale each, an input of shape (B,)."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x, scale):
        return self.inner(x * scale[:, None])


@pytest.mark.parametrize("kind", [LinearizedLaplace, LastLayerLaplace])
def test_a_last_batch_of_one_row_of_a_column_of_a_table(kind):
    """A column of a table has a stride other than 1, also if it has one row and counts as contiguous."""
    torch.manual_seed(0)
    table, y = torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    model = Scaled().double().eval()

    def loader(*, copied):
        scale = table[:, 0].clone() if copied else table[:, 0]
        rows = [slice(i, i + 7) for i in range(0, 50, 7)]
        return [{"x": table[some, 1:], "scale": scale[some], "labels": y[some]} for some in rows]

    assert loader(copied=False)[-1]["scale"].shape == (1,)
    assert loader(copied=False)[-1]["scale"].stride() == (4,)
    query = {"x": table[:1, 1:] + 0.3, "scale": table[:1, 0]}
    found, expected = (
        kind(model, "regression", prior_precision=2.5).fit(loader(copied=copied)).variance(query)
        for copied in (False, True)
    )
    assert torch.equal(found, expected)


def test_bytes_do_not_depend_on_strides():
    table = torch.randn(9, 4, dtype=torch.float64)
    for view in (table[:, 0], table[3:4, 0], table[3:4, :1], table[:0, 0], table.T, table.T[:1, 2:3], table[3:4, None]):
        copied = view.clone(memory_format=torch.contiguous_format)
        assert digest(view) == digest(copied)
        assert (bits_by_row(view) == bits_by_row(copied)).all()
