"""A saved fit belongs to the options that were fitted: any other value is rejected, an equal one is accepted."""

import copy
import json
import types
from dataclasses import fields

import numpy as np
import pytest
import torch
from lora_layers import with_adapters
from sampling_problems import LOOSE
from torch import nn

from estimators import (
    Categorical,
    FineTune,
    Gaussian,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    MeanAbsolute,
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
from estimators.baselines.lora_ensemble import LoRAEnsemble
from estimators.baselines.map import MAP
from estimators.baselines.multi_head import MultiHeadEnsemble
from estimators.baselines.swag import SWAG
from estimators.baselines.temperature import TemperatureScaling
from estimators.baselines.tfb import TFB
from estimators.curvature.builders import LOW_RANK
from estimators.errors import StateError
from estimators.estimator.cloning import clone
from estimators.estimator.options import constructor_options
from estimators.laplace import SubnetworkLaplace
from estimators.likelihoods import CausalTokens
from estimators.sampling import (
    SGHMC,
    SGLD,
    ConvergenceCriteria,
    CyclicalSGHMC,
    MicrocanonicalLangevin,
    ReferencePosterior,
)
from estimators.training import Recipe
from estimators.variational import IVON, VBLL, MeanFieldVI

SGD = Recipe(epochs=2, batch_size=7, optimizer="sgd", lr="auto", schedule="constant")
RECIPE = {
    "epochs": 3,
    "batch_size": None,
    "optimizer": "nesterov",
    "lr": 1e-3,
    "momentum": 0.8,
    "schedule": "cosine",
    "average": 0.2,
}
GAUSSIAN = {"sigma_noise": 0.7, "target_shift": 0.3, "target_scale": 1.4}
BASE = {
    "prior_precision": {"0.*": 1.9, "*": 2.0},
    "prior_mean": 0.2,
    "subset_of_weights": "0.*",
    **{f"likelihood.{name}": value for name, value in GAUSSIAN.items()},
}
RECIPE_OF = {**{f"recipe.{name}": value for name, value in RECIPE.items()}, "recipe.schedule": "constant"}


def network(*, dropout=False, classes=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        middle = nn.Dropout(0.1) if dropout else nn.Tanh()
        return nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, classes)).double().eval()


def adapters():
    model = network()
    model[0].requires_grad_(requires_grad=False)
    return model


def lora():
    return with_adapters(network())


def wider():
    return network(classes=2)


def copied(function):
    return types.FunctionType(function.__code__, globals(), function.__name__)


def another():
    return network(classes=1 + 1)


def data(kind="regression"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(23, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(23, 2, generator=generator, dtype=torch.float64)
    y = y if kind == "regression" else (y[:, 0] > 0).long()
    return [(x[:9], y[:9]), (x[9:], y[9:])]


def first(f):
    return f[..., :1]


def second(f):
    return f[..., 1:]


def regvar(regularizer, solver, **options):
    return RegVar, {"regularizer": regularizer, "solver": solver, **options}


DRAWS = {"n_draws": 4, "seed": 1, "rao_blackwell": None, "variance_estimate": "monte_carlo"}
RESPONSE = {"tol": 1e-6, "max_iter": 900, "basis_dtype": torch.float16}
FINE_TUNE = {
    "lam": 1e-3,
    "difference": "central",
    "seed": 1,
    **{f"recipe.{name}": value for name, value in RECIPE.items()},
}
NEWTON = {"lam": 1e-3, "difference": "forward", "tol": 1e-8, "max_iter": 29, "preconditioner": None}
OF_REGVAR = {**BASE, "curvature": "hessian"}


def parts(regularizer=None, solver=None):
    changed = {f"regularizer.{name}": value for name, value in (regularizer or {}).items()}
    return {**OF_REGVAR, **changed, **{f"solver.{name}": value for name, value in (solver or {}).items()}}


CHAIN = {"n_samples": 2, "thinning": 1, "n_chains": 2}
OTHER_CHAIN = {"step_size": 1e-3, "step": 0.02, "n_samples": 3, "n_chains": 3, "batch_size": 5, "seed": 1}

CASES = {
    "map": ((MAP, {}), BASE),
    "auto": (
        (RegVar, {"regularizer": PosteriorDraws(4)}),
        {**BASE, "rtol": 0.1, "regularizer.n_draws": 5}
        | dict.fromkeys(["solver", "regularizer.seed", "regularizer.rao_blackwell", "regularizer.variance_estimate"]),
    ),
    "laplace": (
        (LinearizedLaplace, {}),
        {**BASE, "curvature": "hessian", "hessian_structure": "diag", "inverse": "cg", "rank": 7, "fisher": "empirical"}
        | dict.fromkeys(["mc_samples", "seed", "kfac_approx"]),
    ),
    "sampled laplace": (
        (LinearizedLaplace, {"hessian_structure": "kron", "fisher": "mc"}),
        {**BASE, "hessian_structure": "ekfac", "mc_samples": 2, "seed": 1, "kfac_approx": "reduce", "rank": 7}
        | dict.fromkeys(["curvature", "inverse", "fisher"]),
    ),
    "last layer": (
        (LastLayerLaplace, {}),
        {
            **BASE,
            "hessian_structure": "diag",
            "last_layer_name": "2",
            "subset_of_weights": None,
            "feature_reduction": None,
        },
    ),
    "pointwise": (regvar(Pointwise(first), LinearResponse()), parts({"of": second}, RESPONSE)),
    "mean absolute": (regvar(MeanAbsolute(), LinearResponse()), parts({}, RESPONSE)),
    "signed probes": (regvar(SignedProbes(3), LinearResponse()), parts({"n_probes": 4, "seed": 1}, RESPONSE)),
    "parameter probes": (regvar(ParameterProbes(3), NewtonRefit()), parts({"n_probes": 4, "seed": 1}, NEWTON)),
    "draws": (regvar(PosteriorDraws(3), LinearResponse()), {**parts(DRAWS, RESPONSE), "curvature": None}),
    "fine tune": (
        regvar(PosteriorDraws(3), FineTune(recipe=SGD)),
        {**parts(DRAWS, FINE_TUNE), "curvature": None},
    ),
    "paper": (
        regvar(MeanAbsolute(), FineTune(1e-4, "central", recipe=SGD), curvature="hessian", centred=False),
        {**parts({}, {**FINE_TUNE, "difference": "forward"}), "curvature": None, "centred": True},
    ),
    "gradient norm": ((GradientNorm, {}), BASE),
    "subnetwork": (
        (SubnetworkLaplace, {"n_parameters": 5}),
        {**BASE, "n_parameters": 6, "chosen_by": "magnitude", "subnetwork_indices": None},
    ),
    "swag": (
        (SWAG, {"recipe": SGD, "n_samples": 3}),
        {
            **BASE,
            **{f"recipe.{name}": value for name, value in RECIPE.items() if name not in ("schedule", "average")},
            "step": 0.5,
            "max_rank": 3,
            "n_samples": 4,
            "seed": 1,
        },
    ),
    "dropout": (
        (MCDropout, {"rate": 0.1, "make_model": wider, "recipe": Recipe(epochs=1), "n_samples": 3}),
        {**BASE, **RECIPE_OF, "rate": 0.2, "make_model": another, "n_samples": 4, "seed": 1},
    ),
    "ensemble": (
        (DeepEnsemble, {"make_model": wider, "recipe": Recipe(epochs=1), "n_members": 2}),
        {**BASE, **RECIPE_OF, "make_model": another, "n_members": 3, "seed": 1},
    ),
    "adapters": (
        (LoRAEnsemble, {"recipe": Recipe(epochs=1), "n_members": 2}),
        {**BASE, **RECIPE_OF, "n_members": 3, "seed": 1},
    ),
    "batch ensemble": (
        (BatchEnsemble, {"make_model": wider, "recipe": Recipe(epochs=1), "n_members": 2}),
        {**BASE, **RECIPE_OF, "make_model": another, "n_members": 3, "init_std": 0.5, "seed": 1},
    ),
    "tfb": (
        (TFB, {"n_samples": 2}),
        {**BASE, "subset_of_weights": "0.lora_A*", "tolerance": 0.1, "n_samples": 3, "seed": 1},
    ),
    "reference": (
        (
            ReferencePosterior,
            {
                "n_chains": 4,
                "n_draws": 1000,
                "starts": "prior",
                "max_gradients": 40_000,
                "criteria": LOOSE,
                "accept_unconverged": True,
            },
        ),
        {
            **BASE,
            "n_chains": 6,
            "n_draws": 900,
            "starts": "trained",
            "collapse": "last_layer",
            "max_gradients": 900_000,
            "criteria": ConvergenceCriteria(),
            "check_rows": torch.ones(2, 3, dtype=torch.float64),
            "ood_check_rows": [torch.full((2, 3), 3.0, dtype=torch.float64)],
            "accept_unconverged": False,
            "dtype": torch.float32,
            "engine": "nutpie",
            "seed": 1,
        },
    ),
    "heads": ((MultiHeadEnsemble, {"n_heads": 3}), {**BASE, "n_heads": 4, "max_iter": 499, "seed": 1}),
    "mean-field VI": (
        (MeanFieldVI, {"recipe": Recipe(epochs=1), "n_samples": 3}),
        {**BASE, **RECIPE_OF, "initial_std": 0.02, "n_gradient_samples": 4, "n_samples": 4, "seed": 1},
    ),
    "IVON": (
        (IVON, {"recipe": Recipe(epochs=1, optimizer="sgd"), "n_samples": 3}),
        {
            **BASE,
            **{name: value for name, value in RECIPE_OF.items() if name not in ("recipe.optimizer", "recipe.average")},
            **{"hessian_momentum": 0.9, "initial_hessian": 2.0, "n_gradient_samples": 4, "n_samples": 4, "seed": 1},
        },
    ),
    "VBLL": ((VBLL, {}), {**BASE, "subset_of_weights": None, "last_layer_name": "2", "tol": 1e-5, "max_iter": 999}),
    "SGLD": ((SGLD, {**CHAIN, "burn_in": 1}), {**BASE, **OTHER_CHAIN, "burn_in": 2, "thinning": 2}),
    "SGHMC": (
        (SGHMC, {**CHAIN, "burn_in": 1}),
        {**BASE, **OTHER_CHAIN, "friction": 0.2, "burn_in": 2, "thinning": 2},
    ),
    "cyclical SGHMC": (
        (CyclicalSGHMC, {"n_samples": 2, "n_chains": 2, "cycle_steps": 6, "n_cycles": 1}),
        {**BASE, **OTHER_CHAIN, "friction": 0.2, "n_cycles": 2, "cycle_steps": 7, "exploration": 0.4},
    ),
    "microcanonical": (
        (MicrocanonicalLangevin, {"n_samples": 2, "thinning": 1, "n_chains": 2, "warm_up": 4}),
        {**BASE, "n_chains": 3, "warm_up": 5, "n_samples": 3, "thinning": 2, "step_size": 0.01, "seed": 1}
        | dict.fromkeys(["make_model", "recipe"]),
    ),
    "temperature": ((TemperatureScaling, {"validation": data("classification")}), {**BASE, "shrinkage": 0.5}),
}
COMPARED_NOWHERE = {
    "model",
    "members",
    "validation",
    "solver.vmap_chunk_size",
    "solver.recipe.micro_batch_size",
    "recipe.micro_batch_size",
}
MODELS = {"adapters": adapters, "tfb": lora}


def build(name, **changed):
    kind, options = CASES[name][0]
    likelihood = "classification" if name == "temperature" else Gaussian(0.6)
    made = kind(MODELS.get(name, network)(), likelihood, prior_precision=1.9, **copy.deepcopy(options))
    return clone(made, changed) if changed else made


def options_of(part, prefix=""):
    """Dotted names of the options of an object and of the objects among them."""
    for name in constructor_options(type(part)):
        value = getattr(part, name)
        dotted = f"{prefix}{name}"
        if isinstance(value, (Recipe, FineTune, LinearResponse, NewtonRefit, Gaussian, Categorical)) or (
            name == "regularizer"
        ):
            yield from options_of(value, f"{dotted}.")
        else:
            yield dotted


def every_change():
    for name, (_, changes) in CASES.items():
        known = set(options_of(build(name)))
        yield from ((name, option, value) for option, value in changes.items() if option in known and value is not None)
        yield from ((name, option, None) for option, value in changes.items() if option in known and value is None
                    and option.split(".")[-1] in ("rao_blackwell", "preconditioner", "batch_size"))  # fmt: skip


@pytest.fixture(scope="module")
def states():
    found = {}

    def state_of(name):
        if name not in found:
            kind = "classification" if name == "temperature" else "regression"
            found[name] = build(name).fit(data(kind)).state_dict()
        return found[name]

    return state_of


pytestmark = pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")


@pytest.mark.parametrize("name", CASES)
def test_every_option_has_a_change_here_or_is_documented_as_not_compared(name):
    changes = {**CASES[name][1], "likelihood.class_dim": 1, "likelihood.ignore_index": 1}
    unseen = set(options_of(build(name))) - changes.keys() - COMPARED_NOWHERE
    other_values_are_rejected = {
        "centred", "curvature", "rtol", "recipe.schedule", "recipe.average", "recipe.optimizer",  # by the constructor
    }  # fmt: skip
    assert unseen <= other_values_are_rejected


def stable_id(value):
    """Functions by their names: their addresses differ between processes."""
    return getattr(value, "__name__", str(value))[:30]


@pytest.mark.parametrize(("name", "option", "value"), list(every_change()), ids=stable_id)
def test_a_fit_is_not_loaded_under_another_value_of_any_option(name, option, value, states):
    state = states(name)
    if option.endswith("recipe.optimizer") and name == "fine tune":
        other = build(name, **{option: value, "solver.recipe.lr": 0.1})
    else:
        other = build(name, **{option: value})
    with pytest.raises(StateError, match=option.replace(".", r"\.")):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("fine tune", {"solver.vmap_chunk_size": 2, "solver.recipe.micro_batch_size": 3}),
        ("ensemble", {"recipe.micro_batch_size": 3}),
        ("temperature", {"validation": None}),
    ],
)
def test_what_does_not_affect_a_fit_is_not_compared(name, changes, states):
    build(name, **changes).load_state_dict(states(name))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("laplace", {"prior_precision": np.float32(1.9), "prior_mean": torch.tensor(0), "rank": np.int64(LOW_RANK)}),
        ("laplace", {"likelihood": Gaussian(torch.tensor(0.6)), "subset_of_weights": "all"}),
        ("fine tune", {"solver": FineTune("auto", recipe=SGD, seed=np.int32(0)), "regularizer": PosteriorDraws(3)}),
        ("parameter probes", {"solver.lam": np.float32(1e-4), "solver.tol": torch.tensor(1e-9)}),
        (
            "ensemble",
            {"make_model": copied(wider), "recipe.lr": np.float32(1e-2)},
        ),
    ],
)
def test_equal_options_are_accepted_in_whatever_type_they_come(name, changes, states):
    if name == "laplace":
        changes = (
            {"rank": build(name).rank, **changes} if "rank" not in changes else {**changes, "rank": build(name).rank}
        )
    if name == "ensemble":
        wider_again = copy.copy(wider)
        changes = {**changes, "make_model": wider_again}
    build(name, **changes).load_state_dict(states(name))


def test_a_list_of_globs_is_a_tuple_of_them_and_an_array_of_sigmas_a_list():
    def make(globs, sigma):
        return LinearizedLaplace(network(), Gaussian(sigma), subset_of_weights=globs, prior_precision={"*": 2})

    state = make(["0.*", "2.bias"], torch.tensor([0.5, 0.7])).fit(data()).state_dict()
    make(("0.*", "2.bias"), [0.5, 0.7]).load_state_dict(state)
    make(["0.*", "2.bias"], np.array([0.5, 0.7], dtype=np.float32)).load_state_dict(state)
    with pytest.raises(StateError, match="sigma_noise"):
        make(["0.*", "2.bias"], [0.5, 0.71]).load_state_dict(state)


def test_the_middle_of_1200_sigmas_counts():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(2, 1200).double()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.linspace(0.1, 1.0, 1200)
    state = (
        LinearizedLaplace(model, Gaussian(sigma), hessian_structure="diag").fit([(x, model(x).detach())]).state_dict()
    )
    changed = sigma.clone()
    changed[600] *= 77
    with pytest.raises(StateError, match=r"likelihood\.sigma_noise=numbers of shape \(1200,\)"):
        LinearizedLaplace(model, Gaussian(changed), hessian_structure="diag").load_state_dict(state)
    LinearizedLaplace(model, Gaussian(sigma.tolist()), hessian_structure="diag").load_state_dict(state)


class Wider(Gaussian):
    """A likelihood of a user's own that has no `__repr__`."""

    def __init__(self, factor):
        super().__init__(0.6)
        self.factor = factor

    __repr__ = object.__repr__

    def hessian_product(self, f, v):
        return super().hessian_product(f, v) * self.factor


def own_likelihood(factor):
    return LinearizedLaplace(network(), Wider(factor), inverse="cholesky")


def load_own_likelihood(path):
    """Run by a process of its own."""
    own_likelihood(2).load(path)


def test_an_own_likelihood_without_a_repr_is_compared_by_its_attributes_in_another_process_too(fork_server, tmp_path):
    path = tmp_path / "fit.safetensors"
    own_likelihood(2).fit(data()).save(path)
    own_likelihood(2.0).load(path)
    with pytest.raises(StateError, match=r"likelihood\.factor=2"):
        own_likelihood(3).load(path)
    assert fork_server.run(load_own_likelihood, str(path)) == 0


def test_options_behind_keywords_of_an_own_estimator_count():
    class Own(LinearizedLaplace):
        def __init__(self, *args, scale=1.0, **options):
            super().__init__(*args, **options)
            self.scale = scale

    def make(**options):
        return Own(network(), "regression", inverse="cholesky", **options)

    fitted = make(scale=2.0, prior_precision=3.0).fit(data())
    make(scale=2, prior_precision=3).load_state_dict(fitted.state_dict())
    for other, option in (({"scale": 1.0, "prior_precision": 3.0}, "scale"), ({"scale": 2.0}, "prior_precision")):
        with pytest.raises(StateError, match=option):
            make(**other).load_state_dict(fitted.state_dict())
    assert fitted.clone_with(prior_precision=5.0).scale == 2.0


def test_a_state_of_an_earlier_version_is_rejected_with_the_remedy(states):
    state = dict(states("map"))
    about = json.loads(state["about"])
    state["about"] = json.dumps({**about, "format": 1, "options": {"prior_precision": "1.9"}})
    with pytest.raises(StateError, match=r"format 2.*Try: fit again and save"):
        build("map").load_state_dict(state)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "data parallel"])
def test_a_fit_of_a_wrapped_model_is_one_of_the_model_inside(wrap, tmp_path):
    def make(model):
        return LinearizedLaplace(model, Gaussian(0.6), prior_precision={"0.*": 2.0, "*": 1.5}, inverse="cholesky")

    x = data()[0][0]
    plain, wrapped = make(network()).fit(data()), make(wrap(network())).fit(data())
    plain.save(tmp_path / "plain")
    wrapped.save(tmp_path / "wrapped")
    assert torch.equal(make(network()).load(tmp_path / "wrapped").variance(x), plain.variance(x))
    assert torch.equal(make(wrap(network())).load(tmp_path / "plain").variance(x), plain.variance(x))


def test_a_model_of_another_architecture_is_rejected_with_a_typed_error(states):
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 2))).double()
    renamed = nn.ModuleDict({"body": network()})
    for model in (other, renamed):
        with pytest.raises(StateError.__mro__[1], match="weights or buffers"):
            LinearizedLaplace(model, Gaussian(0.6), prior_precision=1.9).load_state_dict(states("laplace"))


def test_every_field_of_a_likelihood_and_a_recipe_is_in_these_tests():
    assert {field.name for field in fields(Recipe)} == {*RECIPE, "micro_batch_size"}
    assert constructor_options(Gaussian) == list(GAUSSIAN)
    cases = ((Categorical, "class_dim", 1), (Categorical, "ignore_index", 7), (CausalTokens, "ignore_index", 7))
    for kind, name, value in cases:
        likelihoods = kind(), kind(**{name: value})
        one, other = (MAP(network(), likelihood)._described_options() for likelihood in likelihoods)
        assert one != other
