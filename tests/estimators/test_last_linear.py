"""Which linear layer the last-layer methods take, and which they reject."""

import pytest
import torch
from torch import nn

from estimators import LastLayerLaplace, LinearizedLaplace
from estimators.errors import ModelError
from estimators.models.last_linear import find_last_linear


def fit(problem, **options):
    options = {"prior_precision": problem.delta, **options}
    return LastLayerLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)


def exact(problem, **options):
    options = {"prior_precision": problem.delta, "subset_of_weights": "last_layer", **options}
    return LinearizedLaplace(problem.model, problem.likelihood, inverse="cholesky", **options).fit(problem.loader)


class Branches(nn.Module):
    """An auxiliary head is called last and does not make the output; a subclass of Linear does."""

    def __init__(self):
        super().__init__()
        self.body, self.auxiliary, self.classifier = nn.Linear(4, 5), nn.Linear(5, 3), nn.modules.linear.Linear(5, 3)

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        f = self.classifier(hidden)
        self.auxiliary(hidden)
        return f


def test_the_layer_that_makes_the_output_is_found_not_the_one_defined_last(make_problem):
    problem = make_problem(model=Branches())
    assert find_last_linear(problem.model, problem.x).name == "classifier"
    assert list(fit(problem).network_.subset.shapes) == ["classifier.weight", "classifier.bias"]
    assert list(exact(problem).network_.subset.shapes) == ["classifier.weight", "classifier.bias"]


def test_the_layer_may_be_named(make_problem):
    problem = make_problem(model=Branches())
    named, found = fit(problem, last_layer_name="classifier"), fit(problem)
    assert torch.equal(named.variance(problem.query), found.variance(problem.query))


@pytest.mark.parametrize("name", ["auxiliary", "body", "head", ""])
def test_a_name_that_is_not_the_layer_of_the_output_is_rejected_with_the_one_that_is(name, make_problem):
    problem = make_problem(model=Branches())
    with pytest.raises(ModelError, match=rf"linear layer '{name}'.*\['classifier'\] produce the output"):
        fit(problem, last_layer_name=name)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Recurrent(nn.Module):
    """The last layer is also an earlier one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return 2 * self.layer(x)


def frozen():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight.requires_grad_(requires_grad=False)
    return model


UNUSABLE = {
    "tied to another": (Tied, r"a weight or bias shared by \['first\.weight', 'second\.weight'\]"),
    "called twice": (Recurrent, r"\[\] produce the output"),
    "frozen": (frozen, "a frozen one"),
    "scaled afterwards": (Scaled, r"\['layer'\], of which \[\] produce the output"),
    "none": (lambda: nn.Bilinear(4, 4, 3), "without nn.Linear"),
}


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x) if isinstance(self.inner, nn.Bilinear) else self.inner(x)


@pytest.mark.parametrize("case", UNUSABLE)
@pytest.mark.parametrize("by", [fit, exact])
def test_a_last_layer_that_has_no_closed_form_is_rejected(case, by, make_problem, untouched):
    build, received = UNUSABLE[case]
    problem = make_problem(model=Doubled(build()))
    problem.y = problem.y.clamp(max=2)
    received = (
        received.replace("'first", "'inner.first").replace("'second", "'inner.second").replace("'layer", "'inner.layer")
    )
    with untouched(problem.model), pytest.raises(ModelError, match=rf"Received .*{received}.*Try: "):
        by(problem)


class Ending(nn.Module):
    """A linear layer, and something after it."""

    def __init__(self, after):
        super().__init__()
        self.body, self.layer, self.after = nn.Linear(4, 5), nn.Linear(5, 3), after

    def forward(self, x):
        return self.after(self.layer(torch.tanh(self.body(x))))


CHANGED = {
    "overwritten by relu": torch.relu_,
    "overwritten by a factor": lambda f: f.mul_(0.5),
    "relu that is idle on the data": lambda f: torch.relu(f),
    "a bound near the outputs": lambda f: f.clamp(-8, 8),
    "columns exchanged": lambda f: f.flip(1),
}
UNCHANGED = {
    "a copy": torch.clone,
    "a shape there and back": lambda f: f[:, None].squeeze(1),
    "an addition of zero": lambda f: f + 0.0,
}


def positive(problem):
    """The last layer's outputs are all positive on any data."""
    with torch.no_grad():
        problem.model.layer.bias.add_(5.0)
    return problem


@pytest.mark.parametrize("after", CHANGED)
@pytest.mark.parametrize("by", [fit, exact])
def test_a_layer_whose_output_is_changed_afterwards_is_not_the_last_one(after, by, make_problem):
    problem = positive(make_problem(model=Ending(CHANGED[after])))
    with pytest.raises(ModelError, match=r"\['body', 'layer'\], of which \[\] produce the output"):
        by(problem)


@pytest.mark.parametrize("after", UNCHANGED)
def test_what_returns_its_input_may_come_after_the_last_layer(after, make_problem):
    problem = make_problem(model=Ending(UNCHANGED[after]))
    found, other = fit(problem), exact(problem)
    assert list(found.network_.subset.shapes) == ["layer.weight", "layer.bias"]
    assert torch.allclose(found.covariance(problem.query), other.covariance(problem.query), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("by", [fit, exact])
def test_a_hook_that_changes_the_output_of_the_layer_is_something_after_it(by, make_problem, untouched):
    problem = make_problem()
    problem.model[2].register_forward_hook(lambda _module, _args, output: 2 * output)
    with untouched(problem.model), pytest.raises(ModelError, match=r"of which \[\] produce the output"):
        by(problem)


def test_a_hook_that_changes_the_features_is_part_of_the_features(make_problem, by_hand):
    problem = make_problem()
    problem.model[2].register_forward_pre_hook(lambda _module, args: (args[0] ** 2,))
    expected = by_hand(problem, ["2.weight", "2.bias"]).covariance(problem.query)
    assert torch.allclose(fit(problem).covariance(problem.query), expected, rtol=1e-8, atol=1e-12)


class Doubling(nn.Linear):
    """A subclass that is not Wφ + b."""

    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A subclass that is."""


def test_a_subclass_counts_where_it_keeps_the_forward_of_a_linear_layer(make_problem):
    problem = make_problem(model=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Named(5, 3)))
    assert find_last_linear(problem.model, problem.x).name == "2"
    problem = make_problem(model=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Doubling(5, 3)))
    with pytest.raises(ModelError, match=r"of which \[\] produce the output"):
        fit(problem)


def test_features_that_are_overwritten_later_are_those_that_the_layer_saw(make_problem, by_hand):
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            hidden = self.body(x).tanh()
            f = self.head(hidden)
            if not torch.is_grad_enabled():
                hidden.zero_()
            return f

    problem = make_problem(model=Overwriting())
    expected = by_hand(problem, ["head.weight", "head.bias"]).covariance(problem.query)
    assert torch.allclose(fit(problem).covariance(problem.query), expected, rtol=1e-8, atol=1e-12)
