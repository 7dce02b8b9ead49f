"""Rows of the conformance table: Laplace and RegVar."""

from functools import partial

import conformance_row as kit

from estimators import (
    FineTune,
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
from estimators.training import Recipe


def laplace(**options):
    return partial(LinearizedLaplace, **options)


def regvar(regularizer, solver, **options):
    return partial(RegVar, regularizer=regularizer, solver=solver, **options)


def draws(n, **options):
    return regvar(PosteriorDraws(n_draws=n, **options), LinearResponse())


# A few of each kind: each solve is a refit to ten digits.
REFITTED = [
    "supports-a-model",
    "constructor-stores",
    "not-fitted",
    "shapes",
    "closed-form-network",
    "closed-form-classification",
    "closed-form-prior-groups",
    "closed-form-frozen",
    "closed-form-covariance",
    "constant-output",
    "prior-limit",
    "model-untouched-by-fit",
    "random-state-untouched",
    "state-round-trip",
]
# Products and definiteness are tried by the rows of the kit.GGN and of the dense Hessian; here, that they go together.
SOLVED = [*REFITTED, "closed-form-regression", "closed-form-binary", "covariance", "functional", "predict-epistemic"]
# By default: the derivatives, the prior, the formula, and what a solve could leave behind.
SOLVED_ONCE = frozenset(
    {"supports-a-model", "closed-form-classification", "closed-form-prior-groups", "closed-form-covariance"}
    | {"closed-form-network", "covariance", "model-untouched-by-fit", "random-state-untouched", "state-round-trip"}
)
# test_regvar_solvers.py and test_regvar_formulas.py have refits of every likelihood, and their covariances.
REFITTED_ONCE = SOLVED_ONCE - {"closed-form-classification", "closed-form-covariance"}
# test_regvar_formulas.py has the formula of each regularizer with every likelihood, to six digits.
OF_VECTORS = SOLVED_ONCE | {"shapes", "dtype-device", "non-negative", "prior-limit", "noise-scaling", "functional"}
OF_VECTORS |= {"constant-output", "dict-inputs", "batch-independence"}
# test_fine_tune.py and test_regvar_solvers.py have the recipe and its end.
TRAINED_ONCE = frozenset(
    {"supports-a-model", "shapes", "below-prior", "prior-limit", "data-reduce-variance", "covariance", "dict-inputs"}
    | {"model-untouched-by-fit", "random-state-untouched", "reproducible", "state-round-trip"}
)
# Minibatch refits: the invariants, and what training could touch.
TRAINED = [
    "supports-a-model",
    "constructor-stores",
    "shapes",
    "dtype-device",
    "non-negative",
    "below-prior",
    "prior-limit",
    "data-reduce-variance",
    "noise-scaling",
    "covariance",
    "sample-shape",
    "functional",
    "batch-independence",
    "dict-inputs",
    "model-untouched-by-fit",
    "random-state-untouched",
    "reproducible",
    "state-round-trip",
]
SHORT = Recipe(
    epochs=20, batch_size=10, optimizer="nesterov", lr="auto", momentum=0.9, schedule="constant", average=0.3
)

POSTERIORS = {
    "full": kit.Row(laplace(), kit.GGN),
    "full, cholesky": kit.Row(laplace(inverse="cholesky"), kit.GGN, by_default=kit.DIFFERING),
    "full, dual": kit.Row(laplace(inverse="dual"), kit.GGN, by_default=kit.DIFFERING),
    "full, matrix_free_dual": kit.Row(laplace(inverse="matrix_free_dual"), kit.GGN, by_default=kit.DIFFERING),
    "full, cg": kit.Row(laplace(inverse="cg"), kit.GGN, by_default=OF_VECTORS),
    "low rank, all of it": kit.Row(laplace(hessian_structure="lowrank"), kit.GGN, by_default=kit.DIFFERING),
    "low rank": kit.Row(
        laplace(hessian_structure="lowrank", rank=5), {"prior_of": "all"}, kit.CLOSED_FORMS, by_default=kit.DIFFERING
    ),
    "kron": kit.Row(laplace(hessian_structure="kron"), {"prior_of": "all"}, kit.CLOSED_FORMS, by_default=kit.DIFFERING),
    "ekfac": kit.Row(
        laplace(hessian_structure="ekfac"), {"prior_of": "all"}, kit.CLOSED_FORMS, by_default=kit.DIFFERING
    ),
    "diag": kit.Row(laplace(hessian_structure="diag"), {"prior_of": "all"}, kit.CLOSED_FORMS, by_default=kit.DIFFERING),
    "hessian": kit.Row(laplace(curvature="hessian"), {"exact": "hessian"}, by_default=kit.DIFFERING),
    "hessian, cg": kit.Row(
        laplace(curvature="hessian", inverse="cg"), {"exact": "hessian", "checks": SOLVED}, by_default=SOLVED_ONCE
    ),
    "last layer": kit.Row(LastLayerLaplace, {"exact": "last_layer"}, kit.ENDS_IN_LINEAR),
    "last layer, kron": kit.Row(
        partial(LastLayerLaplace, hessian_structure="kron"),
        {"prior_of": "last_layer"},
        kit.ENDS_IN_LINEAR | kit.CLOSED_FORMS,
        kit.DIFFERING,
    ),
    "last layer, diag": kit.Row(
        partial(LastLayerLaplace, hessian_structure="diag"),
        {"prior_of": "last_layer"},
        kit.ENDS_IN_LINEAR | kit.CLOSED_FORMS,
        kit.DIFFERING,
    ),
    "pointwise, linear response": kit.Row(
        regvar(Pointwise(), LinearResponse()),
        kit.GGN,
        kit.SAMPLES | kit.MATRICES | kit.GRADIENTS | {"joint-covariance"},
        OF_VECTORS,
    ),
    "pointwise, linear response, hessian": kit.Row(
        regvar(Pointwise(), LinearResponse(), curvature="hessian"),
        {"exact": "hessian", "checks": SOLVED},
        by_default=SOLVED_ONCE,
    ),
    "pointwise, newton": kit.Row(
        regvar(Pointwise(), NewtonRefit()), {**kit.GGN, "tolerance": 1e-5, "checks": REFITTED}, by_default=REFITTED_ONCE
    ),
    "draws": kit.Row(draws(800), {**kit.GGN, "noise": 0.05, "n_samples": 800}, kit.MATRICES),
    "draws, no Rao-Blackwellisation": kit.Row(
        draws(800, rao_blackwell=None),
        {**kit.GGN, "noise": 0.05, "n_samples": 800},
        kit.MATRICES,
        OF_VECTORS | kit.SAMPLES,
    ),
    "draws, bounds": kit.Row(
        draws(800, variance_estimate="bounds"),
        {
            **kit.GGN,
            "noise": 0.05,
            "n_samples": 800,
            "skip": {"sample-moments": "samples are the draws, the variance is not"},
        },
        {"sample-moments"} | kit.MATRICES,
        OF_VECTORS,
    ),
    "draws, fine tune": kit.Row(
        regvar(PosteriorDraws(n_draws=16), FineTune(recipe=SHORT)),
        {"prior_of": "all", "noise": 0.4, "n_samples": 16, "checks": TRAINED},
        kit.CLOSED_FORMS,
        TRAINED_ONCE,
    ),
    "parameter probes": kit.Row(
        regvar(ParameterProbes(n_probes=1500), LinearResponse()),
        {**kit.GGN, "noise": 0.1},
        kit.SAMPLES | kit.COVARIANCE | kit.MATRICES | kit.GRADIENTS,
        OF_VECTORS,
    ),
    "signed probes": kit.Row(
        regvar(SignedProbes(n_probes=1500), LinearResponse()),
        {**kit.GGN, "noise": 0.1},
        kit.SAMPLES | kit.COVARIANCE | kit.MATRICES | kit.GRADIENTS | {"batch-independence"},
        OF_VECTORS,
    ),
    "mean absolute": kit.Row(
        regvar(MeanAbsolute(), LinearResponse()),
        {},
        kit.CLOSED_FORMS | kit.INVARIANTS | kit.SAMPLES | kit.COVARIANCE | kit.MATRICES | kit.GRADIENTS | {"jacobians"},
        OF_VECTORS | {"not-constant"},
    ),
}
