"""Records are split into their parts and put together again, and each part gets its own metrics."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from bdl_bench.metrics import METRICS, Parts, evaluate, flattened, metrics_of, parts, tuned
from bdl_bench.metrics.evaluation import ood_scores
from estimators.errors import DataError


def near(value):
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def made(kind, seed, *, rows=40, outputs=3):
    """Arrays of one set of rows; means of regression carry a noise of variance 0.5."""
    rng = np.random.default_rng(seed)
    mean, variance = rng.normal(size=(rows, outputs)), rng.gamma(2, size=(rows, outputs))
    arrays = {"mean": mean, "epistemic_variance": variance}
    if kind == "regression":
        return arrays | {"total_variance": variance + 0.5, "targets": mean + rng.normal(size=mean.shape)}
    if kind == "binary":
        targets = rng.integers(2, size=mean.shape).astype(float)
        return arrays | {"probs": 1 / (1 + np.exp(-mean)), "targets": targets}
    probs = np.exp(mean) / np.exp(mean).sum(-1, keepdims=True)
    return arrays | {"probs": probs, "targets": rng.integers(outputs, size=rows).astype(float)}


def without_targets(arrays):
    return {name: array for name, array in arrays.items() if name != "targets"}


def complete(kind):
    """Every part; the out-of-distribution rows have no targets."""
    shift = {name: made(kind, seed) for seed, name in enumerate(["blur-1", "blur-3", "noise-2", "far-off"], 10)}
    ood = {"letters": without_targets(made(kind, 2, rows=25)), "a/b": without_targets(made(kind, 3, rows=7))}
    return Parts(made(kind, 0), made(kind, 1, rows=30), ood, shift)


def same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array is other[name]


KINDS = sorted(METRICS)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_parts_that_were_flattened(kind):
    split = complete(kind)
    found = parts(flattened(split))
    same(found.test, split.test)
    same(found.validation, split.validation)
    assert list(found.ood) == ["letters", "a/b"]
    assert list(found.shift) == list(split.shift)
    for name, arrays in {**split.ood, **split.shift}.items():
        same({**found.ood, **found.shift}[name], arrays)


def test_plain_arrays_are_test_rows_and_nothing_else():
    arrays = made("regression", 0)
    split = parts(arrays)
    same(split.test, arrays)
    assert (split.validation, split.ood, split.shift) == ({}, {}, {})


def test_tuned_arrays_have_the_layout_of_the_others_and_their_targets():
    split = complete("classification")
    again = Parts(*(made("classification", seed) for seed in (20, 21)), ood={"letters": made("classification", 22)})
    arrays = flattened(split) | flattened(again, prefix="tuned/")
    same(parts(arrays).test, split.test)
    same(tuned(arrays), flattened(again))
    del arrays["tuned/targets"]
    same(tuned(arrays), flattened(again) | {"targets": split.test["targets"]})
    assert tuned(flattened(split)) == {}
    assert evaluate("classification", tuned(arrays))["cls/NLL"] != evaluate("classification", arrays)["cls/NLL"]


def test_tuned_arrays_do_not_take_targets_of_sets_that_they_do_not_have():
    arrays = {"probs": np.ones((2, 1)), "targets": np.zeros(2), "shift/a-1/targets": np.zeros(2)}
    assert list(tuned(arrays | {"tuned/probs": np.ones((2, 1))})) == ["probs", "targets"]


@pytest.mark.parametrize("path", ["test/mean", "ood/mean", "validation/a/mean", "shift/blur-1/", "/mean"])
def test_a_name_that_belongs_to_no_part_raises(path):
    with pytest.raises(DataError, match="Expected arrays named"):
        parts({path: np.zeros(1)})


@pytest.mark.parametrize("kind", KINDS)
def test_the_keys_are_those_of_every_part(kind):
    arrays = flattened(complete(kind))
    keys = list(evaluate(kind, arrays))
    expected = [metric.key for metric in METRICS[kind]]
    if kind != "regression":
        expected += ["sc/AURC/variance", "sc/AUGRC/variance"]
    expected += ["cp/coverage", "cp/width" if kind == "regression" else "cp/size"]
    for name in ("letters", "a/b"):
        for score in ("variance", "entropy"):
            expected += [f"ood/{short}/{name}/{score}" for short in ("AUROC", "AUPR", "FPR95")]
    shorts = ("NLL", "RMSE") if kind == "regression" else ("NLL", "Acc", "ECE")
    for name in ("blur-1", "blur-3", "noise-2", "far-off", "blur-mean", "noise-mean"):
        expected += [f"shift/{short}/{name}" for short in shorts]
    assert keys == expected
    assert [metric.key for metric in metrics_of(kind, arrays)] == keys


@pytest.mark.parametrize("kind", KINDS)
def test_shifted_rows_have_the_metrics_of_test_rows(kind):
    split = complete(kind)
    values = evaluate(kind, flattened(split))
    prefix = "reg/NLL" if kind == "regression" else "cls/NLL"
    of_blur = [evaluate(kind, split.shift[f"blur-{s}"]) for s in (1, 3)]
    assert [values[f"shift/NLL/blur-{s}"] for s in (1, 3)] == near([found[prefix] for found in of_blur])
    assert values["shift/NLL/blur-mean"] == near((of_blur[0][prefix] + of_blur[1][prefix]) / 2)
    other, key = ("RMSE", "reg/RMSE") if kind == "regression" else ("ECE", "cal/ECE")
    assert values[f"shift/{other}/blur-mean"] == near((of_blur[0][key] + of_blur[1][key]) / 2)
    assert values[f"shift/{other}/noise-mean"] == values[f"shift/{other}/noise-2"]


@pytest.mark.parametrize("kind", KINDS)
def test_detection_is_that_of_sklearn_by_variance_and_by_entropy(kind):
    split = complete(kind)
    values = evaluate(kind, flattened(split))
    labels = np.repeat([0, 1], [40, 25])
    both = [np.concatenate([split.test[name], split.ood["letters"][name]]) for name in ("epistemic_variance", "mean")]
    scores = {"variance": both[0].mean(-1)}
    if kind == "regression":
        scores["entropy"] = np.log(both[0] + 0.5).sum(-1)
    elif kind == "binary":
        p = 1 / (1 + np.exp(-both[1]))
        scores["entropy"] = -(p * np.log(p) + (1 - p) * np.log(1 - p)).sum(-1)
    else:
        p = np.exp(both[1]) / np.exp(both[1]).sum(-1, keepdims=True)
        scores["entropy"] = -(p * np.log(p)).sum(-1)
    for name, score in scores.items():
        assert values[f"ood/AUROC/letters/{name}"] == near(roc_auc_score(labels, score))
        assert values[f"ood/AUPR/letters/{name}"] == near(average_precision_score(labels, score))


def test_with_one_output_the_gaussian_entropy_detects_as_the_total_variance():
    split = Parts(made("regression", 0, outputs=1), ood={"far": made("regression", 1, outputs=1)})
    inside, outside = ood_scores("regression", flattened(split), "far", "entropy")
    total = np.concatenate([split.test["total_variance"], split.ood["far"]["total_variance"]])[:, 0]
    assert np.argsort(np.concatenate([inside, outside])).tolist() == np.argsort(total).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_variance_has_no_metric_by_variance(kind):
    split = complete(kind)
    for arrays in (split.test, *split.ood.values()):
        arrays["epistemic_variance"] = np.zeros_like(arrays["mean"])
        if kind == "regression":
            arrays["total_variance"] = np.full_like(arrays["mean"], 0.5)
    keys = evaluate(kind, flattened(split)).keys()
    assert not [key for key in keys if key.endswith("/variance")]
    assert any(key.endswith("/entropy") for key in keys) == (kind != "regression")


def test_rejection_by_variance_ranks_outputs_for_bernoulli_and_rows_for_classes():
    split = complete("binary")
    flat = {name: array.reshape(-1, 1) for name, array in split.test.items()}
    assert evaluate("binary", split.test)["sc/AUGRC/variance"] == near(evaluate("binary", flat)["sc/AUGRC/variance"])
    arrays = made("classification", 5)
    order = np.argsort(arrays["epistemic_variance"].mean(-1))
    wrong = (arrays["probs"].argmax(-1) != arrays["targets"])[order]
    risks = np.cumsum(wrong) / np.arange(1, 41)
    assert evaluate("classification", arrays)["sc/AURC/variance"] == near(risks.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_says_how_to_read_it_and_is_a_mean_over_rows_or_a_number(kind):
    arrays = flattened(complete(kind))
    for metric in metrics_of(kind, arrays):
        assert metric.label
        assert metric.reading
        assert (metric.scores is None) != (metric.compute is None)
        if metric.scores is not None:
            mean = metric.scores(arrays).mean()
            assert metric.value(arrays) == near(np.sqrt(mean) if metric.root else mean)
