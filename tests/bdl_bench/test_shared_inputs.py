"""The comparison of a network whose rows share inputs, from loaders of any mapping that reuse their tensors."""

from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn

from bdl_bench import Problem
from bdl_bench.problem.kept_rows import Budget, CheckedRows, kept_rows
from bdl_bench.problem.problem import _OnDevice
from bdl_bench.records.predictions import Predictor
from bdl_bench.records.problem_digest import problem_digest
from estimators import LinearizedLaplace
from estimators.errors import DataError
from estimators.persistence.checksums import row_hashes

EDGES = torch.tensor([[0, 1, 2, 1], [1, 2, 3, 3]])


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.node, self.head = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, edges, time, x):
        h = torch.tanh(self.node(x) * (1 + time))
        return self.head((h[:, edges[0]] * h[:, edges[1]]).sum(1))


def batches(seed=0, sizes=(4, 4, 2)):
    generator = torch.Generator().manual_seed(seed)
    return [
        UserDict(
            edges=EDGES, time=torch.tensor(0.3 * i), x=torch.randn(b, 4, 2, generator=generator),
            labels=torch.arange(b) % 2,
        )
        for i, b in enumerate(sizes)
    ]  # fmt: skip


def make_problem(**loaders):
    torch.manual_seed(1)
    made = {"train": batches(), "validation": batches(1), "test": batches(2), **loaders}
    return Problem(Graph().eval(), "classification", **made, prior_precision=0.5, shifts={"noise-1": batches(3)})


def test_predictions_are_those_of_the_users_model_batch_by_batch():
    problem = make_problem()
    fitted = LinearizedLaplace(problem.model, "classification", prior_precision=0.5).fit(problem.train)
    arrays = Predictor(problem, fitted, fitted.predict).all_sets()
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches(2)]
    expected = torch.cat([problem.model(**x) for x in inputs]).detach().numpy()
    assert np.allclose(arrays["mean"], expected, atol=1e-5)
    variance = torch.cat([fitted.variance(x) for x in inputs]).numpy()
    assert np.allclose(arrays["epistemic_variance"], variance, rtol=1e-4)


def test_the_digest_of_a_problem_sees_every_row_and_what_rows_share():
    """The edges come first, and have two rows for batches of four."""
    before = problem_digest(make_problem())
    assert before == problem_digest(make_problem())
    for name in ("edges", "time", "x"):
        changed = batches()
        changed[0][name] = changed[0][name].clone()
        changed[0][name].view(-1)[-1] += 1 if name != "edges" else -1
        assert problem_digest(make_problem(train=changed)) != before


def test_soft_targets_are_for_training_rows_alone():
    soft = [{**batch, "labels": torch.full((len(batch["labels"]), 2), 0.5)} for batch in batches()]
    problem = make_problem(train=soft)
    fitted = LinearizedLaplace(problem.model, "classification", prior_precision=0.5).fit(problem.train)
    assert np.isfinite(Predictor(problem, fitted, fitted.predict).test()["mean"]).all()
    with pytest.raises(DataError, match="argmax"):
        Predictor(make_problem(test=soft), fitted, fitted.predict).test()


def test_batches_of_any_mapping_are_moved_to_a_device():
    """On the device without data: its tensors have shapes alone."""
    loader = make_problem().on("meta").train
    for batch in loader:
        assert {tensor.device.type for tensor in batch.values()} == {"meta"}
    pairs = [(UserDict(x=torch.zeros(2, 3)), torch.zeros(2)), ((torch.zeros(2), torch.ones(2)), torch.zeros(2))]
    (named, _), (several, _) = _OnDevice(pairs, "meta")
    assert named["x"].device.type == "meta"
    assert isinstance(several, tuple)


def test_a_loader_whose_rows_are_read_again_moves_any_mapping_to_a_device():
    again = kept_rows("test", batches(), Budget(0), make_problem().layout)
    assert isinstance(again, CheckedRows)
    for batch in again.on("meta"):
        assert {tensor.device.type for tensor in batch.values()} == {"meta"}


FOUR_EDGES = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])


class Ring(Graph):
    """Has as many edges as the batches have rows, and accepts no others."""

    def forward(self, edges, x):
        h = torch.tanh(self.node(x))
        i, j = edges.view(4, 2).T
        return self.head((h[:, i] * h[:, j]).sum(1))


def ring_batches(seed, sizes, *, labelled=True):
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(b, 4, 2, generator=generator) for b in sizes]
    labels = [{"labels": torch.arange(b) % 2} if labelled else {} for b in sizes]
    return [{"edges": FOUR_EDGES, "x": each, **named} for each, named in zip(x, labels, strict=True)]


def ring_problem(sizes, **sets):
    torch.manual_seed(1)
    made = {"train": ring_batches(0, sizes), "validation": ring_batches(1, (4,)), "test": ring_batches(2, (4, 3))}
    ood = {"unlabelled": ring_batches(3, (4, 2), labelled=False), "labelled": ring_batches(4, (4, 5))}
    return Problem(Ring().eval(), "classification", **(made | sets), prior_precision=0.5, ood=ood)


@pytest.mark.parametrize("sizes", [(4, 4), (4, 4, 2), (2, 4), (1, 4, 4)])
def test_inputs_that_rows_share_may_be_as_many_as_the_rows_of_a_batch(sizes):
    problem = ring_problem(sizes)
    assert problem.layout.shared == {"['edges']"}
    fitted = LinearizedLaplace(problem.model, "classification", prior_precision=0.5).fit(problem.train)
    arrays = Predictor(problem, fitted, fitted.predict).all_sets()
    for name, loader in problem.ood.items():
        inputs = [(batch["edges"], batch["x"]) for batch in loader]
        expected = torch.cat([problem.model(*each) for each in inputs]).detach().numpy()
        assert np.allclose(arrays[f"ood/{name}/mean"], expected, atol=1e-5)


def test_the_digest_of_a_row_does_not_depend_on_the_size_of_its_batch():
    whole, x = ring_problem((4, 4)), torch.cat([batch["x"] for batch in ring_batches(0, (4, 4))])
    y = torch.cat([batch["labels"] for batch in ring_batches(0, (4, 4))])
    parts = [{"edges": FOUR_EDGES, "x": x[i : i + 3], "labels": y[i : i + 3]} for i in (0, 3, 6)]
    assert problem_digest(ring_problem((4, 4), train=parts)) == problem_digest(whole)
    marked = [whole.layout.mark({"edges": FOUR_EDGES, "x": x[rows]}, len(x[rows])) for rows in (slice(4), slice(1))]
    digests = [row_hashes(each, None) for each in marked]
    assert len(digests[0]) == 4
    assert digests[1] == digests[0][:1]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_targets_of_another_number_than_rows_are_told_from_shared_inputs(n):
    """Two targets are as many as the edges of the graph have rows, but none as many as there are graphs."""
    wrong = [*batches(), UserDict(batches()[0], labels=torch.arange(n) % 2)]
    with pytest.raises(DataError, match=r"train loader, batch 3.* targets"):
        make_problem(train=wrong)
