"""Every option is checked where it is passed: numbers of any type are taken, all else is an OptionError at once."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from estimators import (
    Categorical,
    FineTune,
    Gaussian,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    NewtonRefit,
    ParameterProbes,
    Pointwise,
    PosteriorDraws,
    RegVar,
    SignedProbes,
)
from estimators.baselines.batch_ensemble import BatchEnsemble
from estimators.baselines.dropout import MCDropout
from estimators.baselines.ensemble import DeepEnsemble
from estimators.baselines.gradient_norm import GradientNorm
from estimators.baselines.laplace_torch import LaplaceTorch
from estimators.baselines.lora_ensemble import LoRAEnsemble
from estimators.baselines.map import MAP
from estimators.baselines.multi_head import MultiHeadEnsemble
from estimators.baselines.swag import SWAG
from estimators.baselines.tfb import TFB
from estimators.errors import OptionError
from estimators.estimator.options import constructor_options
from estimators.laplace import SubnetworkLaplace
from estimators.likelihoods import CausalTokens
from estimators.sampling import SGHMC, SGLD, CyclicalSGHMC, MicrocanonicalLangevin, ReferencePosterior
from estimators.training import Recipe, train_map
from estimators.tuning import CalibrationGrid
from estimators.variational import IVON, VBLL, MeanFieldVI

SGD = Recipe(epochs=2, optimizer="sgd", lr="auto", schedule="constant")


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()


def estimator(kind, **usual):
    def make(**options):
        return kind(network(), **{"likelihood": "classification", **usual, **options})

    make.kind = kind
    return make


def part(kind, **usual):
    def make(**options):
        return kind(**{**usual, **options})

    make.kind = kind
    return make


TRAINED = {"make_model": network, "recipe": Recipe(epochs=1)}
MADE = {
    "map": estimator(MAP),
    "laplace": estimator(LinearizedLaplace, fisher="mc"),
    "last layer": estimator(LastLayerLaplace),
    "regvar": estimator(RegVar),
    "gradient norm": estimator(GradientNorm),
    "laplace-torch": estimator(LaplaceTorch),
    "subnetwork": estimator(SubnetworkLaplace),
    "swag": estimator(SWAG),
    "reference": estimator(ReferencePosterior),
    "dropout": estimator(MCDropout, rate=0.1, **TRAINED),
    "ensemble": estimator(DeepEnsemble, **TRAINED),
    "batch ensemble": estimator(BatchEnsemble, **TRAINED),
    "tfb": estimator(TFB),
    "adapters": estimator(LoRAEnsemble, recipe=Recipe(epochs=1)),
    "heads": estimator(MultiHeadEnsemble),
    "mean-field VI": estimator(MeanFieldVI),
    "IVON": estimator(IVON),
    "VBLL": estimator(VBLL),
    "SGLD": estimator(SGLD),
    "SGHMC": estimator(SGHMC),
    "cyclical SGHMC": estimator(CyclicalSGHMC),
    "microcanonical": estimator(MicrocanonicalLangevin),
    "fine tune": part(FineTune),
    "linear response": part(LinearResponse),
    "newton": part(NewtonRefit),
    "draws": part(PosteriorDraws),
    "parameter probes": part(ParameterProbes),
    "signed probes": part(SignedProbes),
    "pointwise": part(Pointwise),
    "recipe": part(Recipe),
    "gaussian": part(Gaussian),
    "categorical": part(Categorical),
    "causal": part(CausalTokens),
}
REAL = {
    "prior_precision",
    "prior_mean",
    "rate",
    "step",
    "lam",
    "tol",
    "rtol",
    "lr",
    "momentum",
    "average",
    "sigma_noise",
}
REAL |= {"target_shift", "target_scale", "initial_std", "initial_hessian", "hessian_momentum", "step_size"}
REAL |= {"friction", "exploration", "init_std", "tolerance"}
WHOLE = {
    "mc_samples", "max_gradients",
    "rank", "n_parameters", "max_rank", "n_samples", "n_members", "n_heads", "max_iter", "n_draws", "n_probes", "seed",
    "vmap_chunk_size", "epochs", "batch_size", "micro_batch_size", "class_dim", "ignore_index", "n_chains",
    "burn_in", "thinning", "n_cycles", "cycle_steps", "warm_up", "n_gradient_samples",
}  # fmt: skip
OPTIONS = [(name, option) for name, make in MADE.items() for option in constructor_options(make.kind)]
NUMBERS = [(name, option) for name, option in OPTIONS if option in REAL | WHOLE]
MAY_BE_NONE = {"tol", "rate", "batch_size", "micro_batch_size", "rao_blackwell", "preconditioner", "basis_dtype", "of",
               "last_layer_name", "regularizer", "solver", "recipe", "make_model", "n_chains", "members",
               "init_std"}  # fmt: skip
GOOD = {"hessian_momentum": 0.5, "friction": 0.5, "exploration": 0.5, "cycle_steps": 50, "warm_up": 8,
        "n_gradient_samples": 4, "n_chains": 4}  # fmt: skip
GOOD |= {"rate": 0.5, "class_dim": 1, "momentum": 0.5, "average": 0.5, "step": 1.0}
MAY_BE_SEVERAL = {"sigma_noise", "prior_precision", "prior_mean", "target_shift", "target_scale"}
NEGATIVE = {"target_shift", "prior_mean", "class_dim", "ignore_index", "seed"}


def made_with(name, option, value):
    made = MADE[name](**{option: value})
    return getattr(made, option)


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_a_number_may_come_in_any_type(name, option):
    value = GOOD.get(option, 3)
    kinds = [np.float32, np.float64, torch.tensor, lambda v: np.array([v])] if option in REAL else []
    if option in WHOLE:
        kinds = [np.int64, np.int32, torch.tensor, np.array]
    if option in MAY_BE_SEVERAL:
        kinds = kinds[:-1]  # an array of one is of one output
    if option == "lr" and name == "recipe":
        value = 0.5
    for kind in [type(value), *kinds]:
        found = made_with(name, option, kind(value))
        assert found == value
        assert type(found) is (float if option in REAL else int)


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_what_is_no_number_is_rejected_at_once(name, option):
    bad = [True, "3", math.nan, math.inf, torch.tensor(math.nan), [object()], {3}, 1j, np.array(["a"]), object]
    bad += [] if option in MAY_BE_SEVERAL else [[3.0, 4.0], torch.ones(2), np.ones(3), [3]]
    bad += [] if option in MAY_BE_NONE or (name, option) == ("ensemble", "n_members") else [None]
    bad += [] if option in NEGATIVE else [-1, torch.tensor(-2.0), np.float32(-1)]
    bad += [2.5, torch.tensor(3.0)] if option in WHOLE else []
    for value in bad:
        with pytest.raises(OptionError, match=rf"{option}.*Received .*Try: "):
            made_with(name, option, value)


@pytest.mark.parametrize(("name", "option"), [(n, o) for n, o in OPTIONS if o not in REAL | WHOLE | {"model"}])
def test_any_other_option_of_a_wrong_type_is_rejected_at_once(name, option):
    bad = [3.7, ["ggn", 3], torch.ones(2), np.ones(2), {"a": 1}, object(), object, "no such thing"]
    if option == "last_layer_name":
        bad = bad[:-1]
    if option == "subset_of_weights" and name not in ("last layer", "laplace-torch"):
        bad = bad[:-1]
    if option == "check_rows":
        bad = [3.7, object(), object, "no such thing"]  # whatever has a tensor may be inputs
    if option in ("of", "make_model", "feature_reduction"):
        bad = [value for value in bad if not callable(value)]
    for value in bad:
        with pytest.raises(OptionError, match=r"Received .*Try: "):
            made_with(name, option, value)


def test_a_mapping_of_precisions_takes_numbers_of_any_type_and_nothing_else():
    mapping = {"0.*": np.float32(2), "2.weight": torch.tensor(0), "*": 3}
    assert made_with("map", "prior_precision", mapping) == {"0.*": 2.0, "2.weight": 0.0, "*": 3.0}
    for bad in ({"*": True}, {"*": "1"}, {"*": None}, {"*": [1.0]}, {"*": math.nan}, {"*": -1}, {3: 1.0}, {}):
        with pytest.raises(OptionError, match=r"prior_precision > 0.*Try: "):
            made_with("map", "prior_precision", bad)


@pytest.mark.parametrize("value", [torch.tensor(2.0), np.float32(2), 2, np.array([2.0])], ids=repr)
def test_a_prior_precision_of_any_type_gives_the_same_variance(value, make_problem):
    problem = make_problem()
    fits = [
        LinearizedLaplace(problem.model, problem.likelihood, prior_precision=delta, prior_mean=mean).fit(problem.loader)
        for delta, mean in ((2.0, 0.3), (value, torch.tensor(0.3, dtype=torch.float64)))
    ]
    assert torch.equal(fits[0].variance(problem.query), fits[1].variance(problem.query))
    assert torch.equal(
        fits[0].clone_with(prior_precision=value).variance(problem.query), fits[1].variance(problem.query)
    )
    assert torch.equal(fits[0].log_marginal_likelihood(value), fits[1].log_marginal_likelihood())


@pytest.mark.parametrize("bad", [0, -1, 2.5, "3", None, True, torch.ones(2)], ids=repr)
def test_a_number_of_samples_that_is_none_is_rejected(bad, make_problem):
    problem = make_problem()
    fitted = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=problem.delta).fit(problem.loader)
    with pytest.raises(OptionError, match="n_samples"):
        fitted.sample(problem.query, bad)
    with pytest.raises(OptionError, match="seed"):
        fitted.sample(problem.query, 2, seed="a")
    with pytest.raises(OptionError, match="link_approx"):
        fitted.predict(problem.query, link_approx=["mc"])


def test_a_parameter_without_a_prior_is_a_number_too():
    assert Gaussian([0.1, 0.2]).sigma_noise.tolist() == [0.1, 0.2]
    assert torch.equal(Gaussian(np.array([0.1, 0.2])).sigma_noise, torch.tensor([0.1, 0.2], dtype=torch.float64))
    for bad in ([0.1, -0.2], [], torch.ones(2, 2), [0.1, "a"], torch.tensor([True])):
        with pytest.raises(OptionError, match="sigma_noise"):
            Gaussian(bad)


@pytest.mark.parametrize("bad", ["a", None, True, math.nan, [0.5], -0.5], ids=repr)
def test_numbers_of_a_calibration_are_checked_too(bad, make_problem):
    for name in ("variance_scales", "softmax_temperatures", "noise_factors"):
        with pytest.raises(OptionError, match=name):
            CalibrationGrid(**{name: (0.5, bad)})
        with pytest.raises(OptionError, match=name):
            CalibrationGrid(**{name: 3})
    problem = make_problem("classification")
    prediction = LinearizedLaplace(problem.model, "classification").fit(problem.loader).predict(problem.query)
    for name in ("variance_scale", "softmax_temperature"):
        with pytest.raises(OptionError, match=name):
            prediction.calibrated(**{name: bad})
    grid = CalibrationGrid(torch.tensor([0.5, 2.0]), np.array([0.5]), [np.float32(2)])
    assert (grid.variance_scales, grid.softmax_temperatures, grid.noise_factors) == ((0.5, 1, 2), (0.5, 1), (1, 2))


@pytest.mark.parametrize("bad", ["a", None, True, math.nan, -0.5, {"*": "a"}, {"0.*": 1.0, "1.*": 1.0}], ids=repr)
def test_a_training_checks_its_prior_precision(bad):
    rows = [(torch.zeros(4, 3).double(), torch.zeros(4).long())]
    with pytest.raises(OptionError, match="prior_precision"):
        train_map(network(), "classification", rows, prior_precision=bad, recipe=Recipe(epochs=1))
    with pytest.raises(OptionError, match="seed"):
        train_map(network(), "classification", rows, prior_precision=np.float32(1), recipe=Recipe(epochs=1), seed="a")
