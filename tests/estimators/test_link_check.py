"""A softmax or sigmoid inside the model is noticed, and nothing else is."""

import warnings

import pytest
import torch
from torch import nn

from estimators import LastLayerLaplace, LinearizedLaplace
from estimators.errors import NotLogitsWarning
from estimators.likelihoods import Bernoulli, Categorical

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(30, 3, generator=GENERATOR, dtype=torch.float64)
CLASSES = torch.randint(3, (30,), generator=GENERATOR)
BINARY = torch.randint(2, (30, 1), generator=GENERATOR).double()


def body(outputs):
    torch.manual_seed(0)
    return [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)]


def model(*layers):
    return nn.Sequential(*layers).double().eval()


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def fit(network, likelihood, y):
    return LinearizedLaplace(network, likelihood, prior_precision=0.3).fit([(X[:11], y[:11]), (X[11:], y[11:])])


@pytest.mark.parametrize(
    ("link", "likelihood", "y"),
    [
        (nn.Softmax(-1), "classification", CLASSES),
        (Function(lambda f: f.softmax(-1).clamp(1e-7, 1)), "classification", CLASSES),
        (nn.Sigmoid(), "binary", BINARY),
        (Function(lambda f: torch.sigmoid(f).squeeze(-1).unsqueeze(-1)), "binary", BINARY),
        (Function(lambda f: torch.cat([f, -f], -1).softmax(-1)[:, :1]), "binary", BINARY),
        (Function(lambda f: torch.sigmoid(f).clamp(1e-6, 1 - 1e-6)), "binary", BINARY),
    ],
)
def test_a_link_inside_the_model_is_named_with_the_remedy(link, likelihood, y):
    with pytest.warns(NotLogitsWarning, match=r"expects logits.*before the softmax or sigmoid"):
        fit(model(*body(3 if likelihood == "classification" else 1), link), likelihood, y)


def test_a_link_before_classes_first_is_seen_along_its_dimension():
    network = model(*body(6), nn.Unflatten(-1, (3, 2)), nn.Softmax(1))
    y = torch.randint(3, (30, 2), generator=torch.Generator().manual_seed(1))
    with pytest.warns(NotLogitsWarning, match="sums to 1"):
        fit(network, Categorical(class_dim=1), y)


def test_a_trained_sigmoid_is_noticed_by_its_labels_where_no_last_operation_shows_it():
    y = (X[:, :1] > 0).double()
    network = model(nn.Linear(3, 1), nn.Sigmoid(), Function(lambda p: torch.where(p > 2, p, p * 1.0)))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[6.0, 0.0, 0.0]]))
        network[0].bias.zero_()
    with pytest.warns(NotLogitsWarning, match="between 0 and 1"):
        fit(network, Bernoulli(), y)


@pytest.mark.parametrize(
    ("layers", "likelihood", "y"),
    [
        (body(3), "classification", CLASSES),
        ([*body(3), nn.LogSoftmax(-1)], "classification", CLASSES),
        ([*body(3), nn.Sigmoid()], "classification", CLASSES),
        ([*body(1), nn.LogSigmoid()], "binary", BINARY),
        ([nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 3)], "classification", CLASSES),
        ([nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 1)], "binary", BINARY),
        ([*body(3), nn.Softmax(-1)], "regression", torch.zeros(30, 3, dtype=torch.float64)),
    ],
)
def test_logits_give_no_alarm(layers, likelihood, y):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model(*layers), likelihood, y)


def test_logits_that_happen_to_lie_between_zero_and_one_give_no_alarm():
    network = model(nn.Linear(3, 1))
    with torch.no_grad():
        network[0].weight.mul_(0.1)
        network[0].bias.fill_(0.5)
    assert ((network(X) > 0) & (network(X) < 1)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(network, "binary", BINARY)


def test_a_softmax_in_the_first_batch_alone_is_none():
    """Rows of one batch that sum to 1 by chance say nothing: every batch has to."""
    network = model(nn.Linear(3, 3, bias=False))
    nn.init.eye_(network[0].weight)
    x = torch.cat([torch.full((2, 3), 1 / 3, dtype=torch.float64), X[:5]])
    y = CLASSES[:7]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LastLayerLaplace(network, "classification").fit([(x[:2], y[:2]), (x[2:], y[2:])])
