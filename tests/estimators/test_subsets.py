"""Which parameters a posterior is over, and the flat vector θ that they make."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from estimators import LastLayerLaplace, LinearizedLaplace, MeanAbsolute, RegVar
from estimators.errors import OptionError
from estimators.models.subsets import Subset, delta_of_names, matching_names
from estimators.training import Recipe, train_map


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


def named(model, names):
    parameters = dict(model.named_parameters())
    return torch.cat([parameters[name].detach().reshape(-1) for name in names])


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("all", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
        ("*", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
        ("*.bias", ["0.bias", "2.bias", "4.bias"]),
        ("2.*", ["2.weight", "2.bias"]),
        ("[02].weight", ["0.weight", "2.weight"]),
        ("4.weight", ["4.weight"]),
        (["4.*", "0.bias"], ["0.bias", "4.weight", "4.bias"]),
        (("2.bias", "4.*"), ["2.bias", "4.weight", "4.bias"]),
    ],
    ids=repr,
)
def test_globs_choose_parameters_in_the_models_own_order(model, spec, names):
    assert matching_names(model, spec) == names


def test_the_fitted_theta_is_that_of_the_chosen_parameters(make_problem):
    problem = make_problem()
    for spec, names in (("0.*", ["0.weight", "0.bias"]), ("last_layer", ["2.weight", "2.bias"])):
        fitted = LinearizedLaplace(problem.model, problem.likelihood, subset_of_weights=spec).fit(problem.loader)
        assert torch.equal(fitted.theta_, named(problem.model, names))


def test_theta_is_a_copy(make_problem):
    problem = make_problem()
    fitted = LinearizedLaplace(problem.model, problem.likelihood).fit(problem.loader)
    fitted.theta_.add_(1.0)
    assert not torch.equal(fitted.theta_, named(problem.model, dict(problem.model.named_parameters())))


def test_frozen_parameters_are_outside_of_every_subset(model):
    model[2].requires_grad_(requires_grad=False)
    assert matching_names(model, "all") == ["0.weight", "0.bias", "4.weight", "4.bias"]
    assert matching_names(model, "*.bias") == ["0.bias", "4.bias"]
    with pytest.raises(OptionError, match=r"'2\.\*', which matches none.*0\.weight"):
        matching_names(model, "2.*")


def test_a_model_without_trainable_parameters_is_rejected(model):
    model.requires_grad_(requires_grad=False)
    with pytest.raises(OptionError, match="none"):
        matching_names(model, "all")


@pytest.mark.parametrize("estimator", [LinearizedLaplace, lambda *a, **k: RegVar(*a, regularizer=MeanAbsolute(), **k)])
def test_a_pattern_without_a_match_is_rejected_with_the_names_there_are(estimator, make_problem):
    problem = make_problem()
    with pytest.raises(OptionError, match=r"'encoder\.\*'.*0\.weight, 0\.bias"):
        estimator(problem.model, problem.likelihood, subset_of_weights="encoder.*").fit(problem.loader)


def test_last_layer_laplace_has_no_other_subset(model):
    with pytest.raises(OptionError, match=r"'all'.*LinearizedLaplace"):
        LastLayerLaplace(model, "classification", subset_of_weights="all")


def test_flatten_and_unflatten_are_inverse_to_each_other(model):
    subset = Subset.of(model, ["2.weight", "0.bias"])
    theta = torch.arange(subset.n_parameters, dtype=torch.float64)
    parts = subset.unflatten(theta)
    assert {name: part.shape for name, part in parts.items()} == {"0.bias": (5,), "2.weight": (5, 5)}
    assert torch.equal(subset.flatten(parts), theta)


def test_slices_and_masks_say_where_each_parameter_lies(model):
    subset = Subset.of(model, matching_names(model, "all"))
    theta = subset.flatten(dict(model.named_parameters())).detach()
    for name, place in subset.slices.items():
        assert torch.equal(theta[place], dict(model.named_parameters())[name].detach().reshape(-1))
        assert torch.equal(theta[subset.mask([name])], theta[place])
    assert bool(subset.mask(list(subset.shapes)).all())
    assert not bool(subset.mask([]).any())


def test_a_number_is_the_precision_of_every_parameter(model):
    subset = Subset.of(model, ["0.bias", "4.bias"])
    like = torch.zeros(8, dtype=torch.float64)
    assert torch.equal(delta_of_names(2.5, subset, like), torch.full((8,), 2.5, dtype=torch.float64))


def test_the_first_matching_glob_counts(model):
    subset = Subset.of(model, ["0.bias", "4.bias"])
    delta = delta_of_names({"4.*": 3.0, "*.bias": 1.0, "0.*": 7.0}, subset, torch.zeros(8).double())
    assert delta.tolist() == [1.0] * 5 + [3.0] * 3


def test_a_mapping_without_a_match_for_a_parameter_is_rejected(make_problem):
    problem = make_problem()
    estimator = LinearizedLaplace(problem.model, problem.likelihood, prior_precision={"0.*": 1.0, "2.weight": 2.0})
    with pytest.raises(OptionError, match=r'without a match for \'2\.bias\'.*"\*"'):
        estimator.fit(problem.loader)


@pytest.mark.parametrize(
    "bad", [0, 0.0, -1.0, float("nan"), float("inf"), {}, {"*": -1.0}, {"*": float("nan")}, "1.0", None], ids=repr
)
def test_a_precision_that_is_none_is_rejected(bad, model):
    for estimator in (LinearizedLaplace, LastLayerLaplace, RegVar):
        with pytest.raises(OptionError, match=r"prior_precision > 0.*Try: "):
            estimator(model, "classification", prior_precision=bad)


def test_a_tied_parameter_is_counted_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert matching_names(model, "all") == ["0.weight", "0.bias", "2.bias"]


def test_a_tied_weight_moves_in_both_places(make_problem, by_hand):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    problem = make_problem(model=Tied(), shape=(3,))
    fitted = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=problem.delta).fit(problem.loader)
    assert torch.allclose(fitted.variance(problem.query), by_hand(problem).variance(problem.query), rtol=1e-9)


class Tied(nn.Module):
    """A head that shares its weight with the first layer, under a second name."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x)))


def fitted(problem, model=None, **options):
    options = {"inverse": "cholesky", "prior_precision": problem.delta, **options}
    return LinearizedLaplace(model or problem.model, problem.likelihood, **options).fit(problem.loader)


@pytest.mark.parametrize("spec", [["2.*", "haed.*"], ("2.bias", "2.biass"), ["0.*", ""]], ids=repr)
def test_each_glob_of_a_subset_must_match_and_the_error_names_the_nearest_parameters(spec, make_problem):
    problem = make_problem()
    with pytest.raises(OptionError, match=rf"{spec[1]!r}, which matches none.*2\.bias"):
        LinearizedLaplace(problem.model, problem.likelihood, subset_of_weights=spec).fit(problem.loader)


@pytest.mark.parametrize(
    ("delta", "says"),
    [
        ({"1.*": 50.0, "*": 1.0}, r"'1\.\*', which matches none.*0\.weight"),
        ({"2.wieght": 50.0, "*": 1.0}, r"'2\.wieght', which matches none.*2\.weight, "),
        ({"*": 1.0, "2.*": 50.0}, r"'2\.\*', all of whose matches \(2\.weight, 2\.bias\).*'\*' before it"),
        ({"0.*": 1.0, "2.*": 2.0, "*": 3.0}, r"'\*', all of whose matches.*'0\.\*', '2\.\*' before it"),
        ({"*weight": 1.0, "*bias": 2.0, "2.*": 3.0}, r"'2\.\*'.*decided by '\*bias', '\*weight' before it"),
    ],
    ids=repr,
)
def test_a_glob_of_the_prior_that_decides_nothing_is_rejected(delta, says, make_problem):
    problem = make_problem()
    for subset in ("all", "last_layer"):
        with pytest.raises(OptionError, match=says):
            fitted(problem, prior_precision=delta, subset_of_weights=subset)
    whole = fitted(problem)
    with pytest.raises(OptionError, match=says):
        whole.clone_with(prior_precision=delta)
    with pytest.raises(OptionError, match=says):
        whole.log_marginal_likelihood(delta)


def test_one_mapping_over_the_whole_model_serves_every_subset(make_problem):
    problem = make_problem()
    delta = {"0.*": 0.3, "2.weight": 1.7, "2.bias": 2.9}
    last = fitted(problem, prior_precision=delta, subset_of_weights="last_layer")
    n_weights = problem.model[2].weight.numel()
    expected = [1.7] * n_weights + [2.9] * problem.model[2].bias.numel()
    assert last.objective_.prior.precision.tolist() == expected
    problem.model[0].requires_grad_(requires_grad=False)
    assert fitted(problem, prior_precision=delta).objective_.prior.precision.tolist() == expected


def test_a_tied_weight_is_found_by_each_of_its_names(make_problem):
    problem = make_problem(model=Tied(), shape=(3,))
    expected = {"embed.weight": 50.0, "embed.bias": 1.3, "head.bias": 1.3}
    for glob in ("embed.weight", "head.weight", "head.w*"):
        estimator = fitted(problem, prior_precision={glob: 50.0, "*": 1.3})
        found = estimator.network_.subset.unflatten(estimator.objective_.prior.precision)
        assert {name: float(part.unique()) for name, part in found.items()} == expected
        assert matching_names(problem.model, ["embed.bias", glob]) == ["embed.weight", "embed.bias"]
    with pytest.raises(OptionError, match=r"'head\.weight', all of whose.*'embed\.weight'"):
        fitted(problem, prior_precision={"embed.weight": 1.0, "head.weight": 2.0, "*": 3.0})


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "data parallel"])
@pytest.mark.parametrize("where", ["the model", "a layer"])
def test_globs_see_the_names_inside_a_wrapper(wrap, where, make_problem):
    problem = make_problem()
    options = {"prior_precision": {"2.*": 50.0, "*": 1.3}, "subset_of_weights": ["0.*", "2.bias"]}
    plain = fitted(problem, **options)
    model = wrap(problem.model)
    if where == "a layer":
        model = nn.Sequential(wrap(problem.model[0]), *problem.model[1:-1], wrap(problem.model[-1]))
    inside = fitted(problem, model, **options)
    assert list(inside.network_.subset.shapes) == ["0.weight", "0.bias", "2.bias"]
    assert torch.allclose(inside.variance(problem.query), plain.variance(problem.query), rtol=1e-12)
    with pytest.raises(OptionError, match=r"'_orig_mod\.2\.\*', which matches none.* 2\.weight"):
        fitted(problem, model, prior_precision={"_orig_mod.2.*": 50.0, "*": 1.3})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by the tracer of torch.compile
@pytest.mark.parametrize(
    "wrap", [partial(torch.compile, backend="eager"), nn.DataParallel], ids=["compiled", "data parallel"]
)
@pytest.mark.parametrize("where", ["the model", "a layer"])
def test_training_a_wrapped_model_trains_every_weight(wrap, where):
    torch.manual_seed(2)
    x, y = torch.randn(23, 3).double(), torch.randn(23, 2).double()
    loader = list(zip(x.split(9), y.split(9), strict=True))
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    twin = copy.deepcopy(plain)
    model = wrap(twin) if where == "the model" else nn.Sequential(wrap(twin[0]), twin[1], wrap(twin[2]))
    options = {"prior_precision": {"2.*": 5.0, "*": 1.3}, "recipe": Recipe(epochs=3)}
    train_map(plain, "regression", loader, **options)
    train_map(model, "regression", loader, **options)
    for expected, trained in zip(plain.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(expected, trained, rtol=1e-12)


@pytest.mark.parametrize("bad", [3, None, [], ["0.*", 2], {"0.*": 1.0}, torch.ones(2)], ids=repr)
def test_a_subset_of_another_type_is_rejected_at_once(bad, model):
    with pytest.raises(OptionError, match=r"subset_of_weights.*Try: "):
        LinearizedLaplace(model, "classification", subset_of_weights=bad)
