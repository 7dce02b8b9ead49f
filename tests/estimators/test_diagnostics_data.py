"""The diagnosis of data, labels and weight decay, each finding against a number derived otherwise."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from estimators import Bernoulli, Categorical, Gaussian
from estimators.diagnostics import diagnose, prior_precision_of
from estimators.errors import UnsupportedError
from estimators.persistence.checksums import row_hashes


def looked_at(problem, *checks, **options):
    options = {"prior_precision": problem.delta, **options}
    return diagnose(problem.model, problem.likelihood, problem.loader, checks=checks, **options)


def test_overlaps_are_counted_by_rows_whatever_their_order_label_and_batch(make_problem):
    problem = make_problem()
    rows = torch.cat([problem.x[[7, 2, 2]], problem.query])
    labels = torch.zeros(10, dtype=torch.long)
    held_out = list(zip(rows.split(4), labels.split(4), strict=True))
    new = [(problem.query + 1, labels[:7])]
    diagnosis = looked_at(problem, "overlap", validation=new, test=held_out)
    assert diagnosis["train/test overlap"].values == {"shared": 3, "rows": 10}
    assert diagnosis["train/test overlap"].level == "error"
    assert diagnosis["train/validation overlap"].level == diagnosis["validation/test overlap"].level == "ok"


def test_repeated_training_rows_are_counted(make_problem):
    problem = make_problem()
    problem.x[4] = problem.x[11]
    problem.x[5] = problem.x[11]
    assert looked_at(problem, "overlap")["repeated rows"].values["repeated"] == 2


def test_a_digest_is_of_one_row_over_all_tensors_of_a_pytree():
    x = {"a": torch.arange(6.0).view(3, 2), "b": torch.arange(3), "scalar": torch.ones(1)}
    digests = row_hashes(x)
    assert len(set(digests)) == 3
    changed = {**x, "b": torch.tensor([0, 1, 5])}
    assert [a == b for a, b in zip(digests, row_hashes(changed), strict=True)] == [True, True, False]


def mean_losses():
    """(likelihood, the mean loss that is usual for it, targets of (20, 3) outputs, how many labels)."""
    generator = torch.Generator().manual_seed(5)
    classes = torch.randint(0, 3, (20,), generator=generator)
    values = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    return {
        "classification": (Categorical(), F.cross_entropy, classes),
        "regression": (Gaussian(0.7), F.mse_loss, values),
        "binary": (Bernoulli(), F.binary_cross_entropy_with_logits, (values > 0).double()),
    }


@pytest.mark.parametrize("kind", ["classification", "regression", "binary"])
def test_the_prior_precision_of_a_weight_decay_gives_a_multiple_of_the_loss_that_was_trained(kind):
    """∇(mean loss) + wd·θ must be ∇L(θ) times a constant, for every θ."""
    likelihood, mean_loss, y = mean_losses()[kind]
    decay, generator = 0.03, torch.Generator().manual_seed(6)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    delta = prior_precision_of(decay, likelihood, n_data=20, n_outputs=3)
    ratios = []
    for _ in range(2):
        weight = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
        f = x @ weight
        trained = torch.autograd.grad(mean_loss(f, y) + 0.5 * decay * weight.square().sum(), weight, retain_graph=True)
        ours = torch.autograd.grad(likelihood.nll(f, y).sum() + 0.5 * delta * weight.square().sum(), weight)
        ratios.append(ours[0] / trained[0])
    ratios = torch.stack(ratios)
    assert torch.allclose(ratios, ratios.mean().expand_as(ratios), rtol=1e-8)


def test_several_labels_a_row_count_each():
    assert prior_precision_of(0.1, Categorical(), n_data=20, n_outputs=15, n_labels=55) == pytest.approx(5.5)


def test_noises_that_differ_have_no_prior_precision_of_a_plain_mean():
    with pytest.raises(UnsupportedError, match="sigma_noise"):
        prior_precision_of(0.1, Gaussian(torch.tensor([0.5, 0.6])), n_data=20, n_outputs=2)


@pytest.mark.parametrize(("decay", "level", "ratio"), [(0.125, "ok", 1), (0.1, "note", 1.25), (0.5, "warning", 4)])
def test_a_weight_decay_is_compared_with_the_prior(make_problem, decay, level, ratio):
    finding = looked_at(make_problem(), "decay", weight_decay=decay)["weight decay"]  # δ = 2.5, N = 20
    assert finding.level == level
    assert finding.values["ratio"] == pytest.approx(ratio)
    assert f"weight decay {decay} with a mean loss is δ = 20 · {decay} = {20 * decay:g}; prior" in finding.measured
    assert finding.measured.endswith("prior_precision is 2.5")


def test_groups_of_an_optimizer_are_compared_each_with_its_own_prior(make_problem):
    problem = make_problem()
    weights, biases = ([p for n, p in problem.model.named_parameters() if n.endswith(end)] for end in ("ght", "ias"))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    right = looked_at(problem, "decay", weight_decay=optimizer, prior_precision={"*bias": 0.0, "*": 2.0})
    assert right["weight decay"].level == "ok"
    assert looked_at(problem, "decay", weight_decay=optimizer)["weight decay"].values["ratio"] == float("inf")


def test_adamw_has_no_prior_precision(make_problem):
    problem = make_problem()
    optimizer = torch.optim.AdamW(problem.model.parameters(), weight_decay=0.1)
    finding = looked_at(problem, "decay", weight_decay=optimizer)["weight decay"]
    assert finding.values["decoupled"]
    adam = torch.optim.Adam(problem.model.parameters(), weight_decay=0.125)
    assert looked_at(problem, "decay", weight_decay=adam)["weight decay"].level == "ok"


def test_classes_and_losses_are_counted_on_every_set(make_problem):
    problem = make_problem()
    problem.y[problem.y == 2] = 0
    with torch.no_grad():
        f, query = problem.model(problem.x), problem.model(problem.query)
    labels = query.argmax(-1)
    diagnosis = looked_at(problem, "targets", test=[(problem.query, labels)])
    counts = np.bincount(problem.y.numpy(), minlength=3)
    values = diagnosis["class balance"].values
    assert (values["least"], values["most"], values["absent"]) == (0, counts.max(), 1)
    assert diagnosis["class balance"].level == "warning"
    nll = float(F.cross_entropy(f, problem.y))
    shares = counts[counts > 0] / 20
    values = diagnosis["training loss"].values
    assert values["nll"] == pytest.approx(nll)
    assert values["nll_of_constant"] == pytest.approx(float(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert diagnosis["accuracy"].values["test"] == 1.0
    assert diagnosis["accuracy"].values["train"] == pytest.approx(float((f.argmax(-1) == problem.y).double().mean()))


def test_a_network_that_explains_nothing_is_a_warning(make_problem):
    problem = make_problem("regression")
    problem.y += 50
    assert looked_at(problem, "targets")["training loss"].level == "warning"


def test_a_noise_far_from_the_residuals_is_a_warning_with_the_one_that_is_near(make_problem):
    problem = make_problem("regression", n=400)
    noise = looked_at(problem, "targets")["noise"]
    with torch.no_grad():
        rmse = (problem.model(problem.x) - problem.y).square().mean(0).sqrt()
    assert noise.values["rmse_train"] == pytest.approx(rmse.tolist())
    assert noise.level == "warning"  # σ = 0.6, residuals of 1
    problem.likelihood = Gaussian(1.0)
    assert looked_at(problem, "targets")["noise"].level == "ok"


def test_predictions_of_many_places_a_row_are_judged_at_those_that_are_kept(make_problem):
    model = nn.Sequential(nn.Linear(4, 15), nn.Unflatten(1, (5, 3)))
    problem = make_problem("regression", model)
    problem.likelihood = Categorical()
    problem.y = torch.randint(0, 3, (20, 5), generator=torch.Generator().manual_seed(2))
    problem.y[:, 3:] = -100
    diagnosis = looked_at(problem, "targets", "decay", weight_decay=0.1)
    with torch.no_grad():
        f = model(problem.x)[:, :3].flatten(0, 1)
    assert diagnosis["training loss"].values["nll"] == pytest.approx(
        float(F.cross_entropy(f, problem.y[:, :3].flatten()))
    )
    assert diagnosis["weight decay"].values["factor"] == 60
