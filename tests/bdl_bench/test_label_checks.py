"""Labels, shapes, dtypes and NaN in any batch of any loader are rejected with the loader, the batch and the row."""

import numpy as np
import pytest
import torch
from torch import nn

from bdl_bench import Problem
from bdl_bench.metrics import evaluate
from bdl_bench.problem.queries import queries
from bdl_bench.records.predictions import Predictor, check_arrays
from estimators.baselines.map import MAP
from estimators.errors import DataError, ModelError
from estimators.training import Recipe

LOADERS = ("train", "validation", "test", "ood far", "shift noise-1")
SCORED = LOADERS[1:]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(11, 3, generator=GENERATOR)
CLASSES = torch.randint(3, (11,), generator=GENERATOR)
ROW = 2  # in the third batch, whose rows are 8, 9, 10


def labels(kind):
    if kind == "classification":
        return CLASSES.clone()
    return (CLASSES[:, None] > 0).float() if kind == "binary" else X[:, :2].clone()


def batches(x, y):
    return [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]


def network(kind):
    torch.manual_seed(0)
    return nn.Linear(3, {"classification": 3, "binary": 1, "regression": 2}[kind]).eval()


def problem(kind, loader, bad, likelihood=None, **options):
    good = batches(X, labels(kind))
    loaders = dict.fromkeys(("train", "validation", "test"), good)
    sets = {"ood": {"far": good}, "shifts": {"noise-1": good}}
    family, _, name = loader.partition(" ")
    if family in loaders:
        loaders[family] = bad
    else:
        sets["ood" if family == "ood" else "shifts"] = {name: bad}
    return Problem(network(kind), likelihood or kind, **loaders, **sets, prior_precision=1.0, **options)


def with_label(kind, value):
    y = labels(kind)
    y[8 + ROW] = value
    return batches(X, y)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        ("classification", -1, "from -1 to -1"),
        ("classification", 3, "from 3 to 3"),
        ("binary", 2.0, "2"),
        ("binary", -1.0, "-1"),
        ("binary", float("nan"), "NaN"),
        ("regression", float("nan"), "NaN"),
        ("regression", float("inf"), "Inf"),
    ],
)
def test_a_bad_label_in_the_last_batch_is_named_by_loader_batch_and_row(loader, kind, value, told):
    with pytest.raises(DataError, match=rf"in the {loader} loader, batch 2, row {ROW} \(counted from 0\): .*{told}"):
        problem(kind, loader, with_label(kind, value))


def test_labels_of_other_classes_may_be_left_out_of_an_ood_loader():
    with pytest.raises(DataError, match=r"omit the labels of ood far: x alone, or \[x\]"):
        problem("classification", "ood far", with_label("classification", 7))


@pytest.mark.parametrize("loader", SCORED)
def test_a_soft_binary_label_is_not_scored_as_a_hard_one(loader):
    with pytest.raises(DataError, match=rf"{loader} loader, batch 2, row {ROW} .*0\.3"):
        problem("binary", loader, with_label("binary", 0.3))


@pytest.mark.parametrize("loader", SCORED)
def test_soft_classes_are_not_scored(loader):
    soft = torch.full((3, 3), 1 / 3)
    with pytest.raises(DataError, match=rf"{loader} loader, batch 2, row 0"):
        problem("classification", loader, [*batches(X, CLASSES)[:2], (X[8:], soft)])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("last", "told"),
    [
        ((X[8:], CLASSES[8:, None]), r"row 0 .*shape \(3, 1\)"),
        ((X[8:], CLASSES[8:].float()), "row 0 .*torch.float32"),
        ((X[8:], CLASSES[8:10]), r"row 2 .*\(2,\)"),
        ((X[8:, :2], CLASSES[8:]), "batch 2 .*cannot be multiplied"),
        ((X[8:].double(), CLASSES[8:]), "batch 2 .*dtype"),
        ((torch.where(torch.arange(3)[:, None] == ROW, torch.nan, X[8:]), CLASSES[8:]), f"row {ROW} .*a NaN or Inf"),
        ([X[8:], CLASSES[8:], CLASSES[8:], CLASSES[8:]], "batch 2 .*list of length 4"),
    ],
    ids=["target-shape", "target-dtype", "count", "width", "input-dtype", "nan", "items"],
)
def test_a_bad_batch_after_good_ones_is_named(loader, last, told):
    with pytest.raises(DataError, match=rf"in the {loader} loader, batch 2.*{told.removeprefix('batch 2 ')}"):
        problem("classification", loader, [*batches(X, CLASSES)[:2], last])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("item", [[X], X, {"x": X}])
def test_only_out_of_distribution_rows_may_have_no_labels(loader, item):
    if loader.startswith("ood"):
        if not isinstance(item, dict):
            (query,) = queries(problem("classification", loader, [item]).ood["far"])
            assert query.y is None
            assert torch.equal(query.x, X)
        return
    with pytest.raises(DataError, match=rf"in the {loader} loader, batch 0 \(counted from 0\): "):
        problem("classification", loader, [item])


def test_a_band_is_checked_over_all_batches():
    line = torch.linspace(-1, 1, 6).unsqueeze(1)
    torch.manual_seed(0)
    arguments = {name: [(line, line)] for name in ("train", "validation", "test")}
    with pytest.raises(DataError, match="ascending"):
        Problem(nn.Linear(1, 1).eval(), "regression", **arguments, prior_precision=1.0, plot_grid=[line[3:], line[:3]])


def test_ignored_places_are_no_labels_where_the_likelihood_has_several_a_row():
    y = torch.randint(3, (11, 2), generator=torch.Generator().manual_seed(1))
    y[9, 1] = -100
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Unflatten(-1, (2, 3))).eval()
    arguments = dict.fromkeys(("train", "validation", "test"), batches(X, y))
    made = Problem(model, "classification", **arguments, prior_precision=1.0)
    estimator = MAP(model, "classification").fit(made.train)
    arrays = Predictor(made, estimator, estimator.predict).test()
    assert arrays["targets"].tolist() == [label for label in y.flatten().tolist() if label != -100]
    with pytest.raises(DataError, match="at least one label"):
        Problem(model, "classification", **{**arguments, "test": batches(X, torch.full_like(y, -100))},
                prior_precision=1.0)  # fmt: skip


def test_metrics_reject_targets_that_are_no_classes():
    arrays = {"probs": torch.full((2, 3), 1 / 3).numpy(), "epistemic_variance": torch.ones(2, 3).numpy()}
    for bad in (-1.0, 3.0, 0.5):
        with pytest.raises(DataError, match=f"{bad} in row 1"):
            evaluate("classification", arrays | {"targets": torch.tensor([0.0, bad]).numpy()})


def test_the_generator_of_a_loader_is_left_as_it_was():
    rows = torch.utils.data.TensorDataset(X, CLASSES)
    generator = torch.Generator().manual_seed(1)
    loader = torch.utils.data.DataLoader(rows, 4, shuffle=True, generator=generator)
    network("classification")  # seeds as `problem` does
    before, everywhere = generator.get_state(), torch.get_rng_state()
    problem("classification", "train", loader)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), everywhere)


@pytest.mark.parametrize(
    ("kind", "link"), [("classification", nn.Softmax(-1)), ("binary", nn.Sigmoid())], ids=["softmax", "sigmoid"]
)
@pytest.mark.parametrize("recipe", [None, Recipe(epochs=1)])
def test_a_link_inside_the_model_is_rejected(kind, link, recipe):
    good = batches(X, labels(kind))
    model = nn.Sequential(network(kind), link).eval()
    with pytest.raises(ModelError, match=r"logits.*before the softmax or sigmoid"):
        Problem(model, kind, good, good, good, prior_precision=1.0, recipe=recipe)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("centred_variance", np.nan, "NaN or Inf among 6 values of ood/far/centred_variance, the first in row 1"),
        ("epistemic_variance", np.inf, "ood/far/epistemic_variance, the first in row 1"),
        ("total_variance", 0.0, "positive in row 1"),
        ("total_variance", -2.0, "-2 as the least of ood/far/total_variance"),
        ("log_probs", np.nan, "ood/far/log_probs"),
    ],
)
def test_what_is_no_number_is_not_scored(name, value, told):
    good = np.ones((3, 2))
    bad = good.copy()
    bad[1, 0] = value
    check_arrays({name: good, "row_id": np.array(["a", "b", "c"])})
    with pytest.raises(DataError, match=told):
        check_arrays({name: good, f"ood/far/{name}": bad})


def test_a_class_of_probability_zero_is_a_number():
    with np.errstate(divide="ignore"):
        check_arrays({"log_probs": np.log([[1.0, 0.0]])})
