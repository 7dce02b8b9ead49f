"""Rows of the conformance table: Laplace and RegVar."""

from functools import partial

from conformance_row import (
    CLOSED_FORMS,
    COVARIANCE,
    DIFFERING,
    ENDS_IN_LINEAR,
    GGN,
    GRADIENTS,
    LAWS,
    MATRICES,
    SAMPLES,
    Row,
)

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
# Products and definiteness are tried by the rows of the GGN and of the dense Hessian; here, that they go together.
SOLVED = [*REFITTED, "closed-form-regression", "closed-form-binary", "covariance", "functional", "predict-epistemic"]
# By default: the derivatives, the prior, the formula, and what a solve could leave behind.
SOLVED_ONCE = frozenset(
    {"supports-a-model", "closed-form-classification", "closed-form-prior-groups", "closed-form-covariance"}
    | {"closed-form-network", "covariance", "model-untouched-by-fit", "random-state-untouched", "state-round-trip"}
)
# Minibatch refits: the laws, and what training could touch.
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
    "full": Row(laplace(), GGN),
    "full, cholesky": Row(laplace(inverse="cholesky"), GGN, by_default=DIFFERING),
    "full, dual": Row(laplace(inverse="dual"), GGN, by_default=DIFFERING),
    "full, matrix_free_dual": Row(laplace(inverse="matrix_free_dual"), GGN, by_default=DIFFERING),
    "full, cg": Row(laplace(inverse="cg"), GGN, by_default=DIFFERING),
    "low rank, all of it": Row(laplace(hessian_structure="lowrank"), GGN, by_default=DIFFERING),
    "low rank": Row(
        laplace(hessian_structure="lowrank", rank=5), {"prior_of": "all"}, CLOSED_FORMS, by_default=DIFFERING
    ),
    "kron": Row(laplace(hessian_structure="kron"), {"prior_of": "all"}, CLOSED_FORMS),
    "ekfac": Row(laplace(hessian_structure="ekfac"), {"prior_of": "all"}, CLOSED_FORMS, by_default=DIFFERING),
    "diag": Row(laplace(hessian_structure="diag"), {"prior_of": "all"}, CLOSED_FORMS, by_default=DIFFERING),
    "hessian": Row(laplace(curvature="hessian"), {"exact": "hessian"}, by_default=DIFFERING),
    "hessian, cg": Row(
        laplace(curvature="hessian", inverse="cg"), {"exact": "hessian", "checks": SOLVED}, by_default=SOLVED_ONCE
    ),
    "last layer": Row(LastLayerLaplace, {"exact": "last_layer"}, ENDS_IN_LINEAR),
    "last layer, kron": Row(
        partial(LastLayerLaplace, hessian_structure="kron"),
        {"prior_of": "last_layer"},
        ENDS_IN_LINEAR | CLOSED_FORMS,
    ),
    "last layer, diag": Row(
        partial(LastLayerLaplace, hessian_structure="diag"),
        {"prior_of": "last_layer"},
        ENDS_IN_LINEAR | CLOSED_FORMS,
    ),
    "pointwise, linear response": Row(
        regvar(Pointwise(), LinearResponse()), GGN, SAMPLES | MATRICES | GRADIENTS | {"joint-covariance"}
    ),
    "pointwise, linear response, hessian": Row(
        regvar(Pointwise(), LinearResponse(), curvature="hessian"),
        {"exact": "hessian", "checks": SOLVED},
        by_default=SOLVED_ONCE,
    ),
    "pointwise, newton": Row(
        regvar(Pointwise(), NewtonRefit()), {**GGN, "tolerance": 1e-5, "checks": REFITTED}, by_default=SOLVED_ONCE
    ),
    "draws": Row(draws(800), {**GGN, "noise": 0.05, "n_samples": 800}, MATRICES),
    "draws, no Rao-Blackwellisation": Row(
        draws(800, rao_blackwell=None),
        {**GGN, "noise": 0.05, "n_samples": 800},
        MATRICES,
        by_default=DIFFERING | SAMPLES,
    ),
    "draws, bounds": Row(
        draws(800, variance_estimate="bounds"),
        {
            **GGN,
            "noise": 0.05,
            "n_samples": 800,
            "skip": {"sample-moments": "samples are the draws, the variance is not"},
        },
        {"sample-moments"} | MATRICES,
        DIFFERING,
    ),
    "draws, fine tune": Row(
        regvar(PosteriorDraws(n_draws=16), FineTune(recipe=SHORT)),
        {"prior_of": "all", "noise": 0.4, "n_samples": 16, "checks": TRAINED},
        CLOSED_FORMS,
    ),
    "parameter probes": Row(
        regvar(ParameterProbes(n_probes=1500), LinearResponse()),
        {**GGN, "noise": 0.1},
        SAMPLES | COVARIANCE | MATRICES | GRADIENTS,
    ),
    "signed probes": Row(
        regvar(SignedProbes(n_probes=1500), LinearResponse()),
        {**GGN, "noise": 0.1},
        SAMPLES | COVARIANCE | MATRICES | GRADIENTS | {"batch-independence"},
        DIFFERING,
    ),
    "mean absolute": Row(
        regvar(MeanAbsolute(), LinearResponse()),
        {},
        CLOSED_FORMS | LAWS | SAMPLES | COVARIANCE | MATRICES | GRADIENTS | {"jacobians"},
    ),
}
