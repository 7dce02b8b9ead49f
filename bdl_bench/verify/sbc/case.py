"""The network and inputs of simulation-based calibration, and data sets drawn from its prior and likelihood."""

from __future__ import annotations

import copy
import hashlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bdl_bench.problem.problem import Problem, rows
from bdl_bench.records.content_digests import content_digest
from estimators.errors import NotConvergedWarning, OptionError, UnsupportedError
from estimators.likelihoods import Categorical, Gaussian, Likelihood
from estimators.models.network import Network
from estimators.models.outputs import output_tensor
from estimators.models.subsets import delta_of_names, matching_names
from estimators.numerics.pytrees import (
    PyTree,
    concatenate,
    forward_arguments,
    n_rows,
    plain_inputs,
    select_rows,
    tensors_of,
    with_floats,
)
from estimators.option_checks import checked_integer
from estimators.runtime.module_wrappers import parameter_names
from estimators.runtime.rng import seeded_random_state
from estimators.training.converge import converge_map
from estimators.training.recipe import Recipe
from estimators.training.retraining import check_architecture, tensors_by_name
from estimators.training.training import train_map

__all__ = ["SbcCase", "Simulation", "small_cases"]


@dataclass(frozen=True)
class Simulation:
    """One data set of simulation-based calibration, with the truth that made it.

    Attributes:
        problem: the simulated training data, and the network trained on them.
        truth: outputs of the true network at the queries, (M, C).
        truth_at_inputs: outputs of the true network at the training inputs, (N, C).
        inputs: the training inputs, N rows.
        targets: the simulated targets, N rows.
        queries: M rows.
        relative_gradient: ‖∇L‖ / ‖δ θ̂‖ of the trained network.
    """

    problem: Problem
    truth: Tensor
    truth_at_inputs: Tensor
    inputs: PyTree
    targets: Tensor
    queries: PyTree
    relative_gradient: float


@dataclass(frozen=True)
class SbcCase:
    """A network, its likelihood and prior, and the inputs at which data are simulated.

    A simulation draws θ ~ N(0, 1/δ) and y ~ p(y | f(x; θ)), and trains a network on (x, y) for the methods that start
    at one. All is in float64.

    Args:
        model: the architecture, in eval mode; parameters that require a gradient are drawn from the prior.
        likelihood: one that can sample labels: Gaussian, Categorical, Bernoulli.
        prior_precision: δ > 0, a number or a mapping {glob of parameter names: number}.
        inputs: training inputs x, N rows.
        queries: inputs x* of M rows at which f is ranked.
        recipe: how a network is trained, before it is converged by L-BFGS.
        make_model: function that builds an untrained network, for initial weights and for methods that train several;
            its frozen parameters and buffers become those of the model. None: a draw from the prior is the start, and
            those methods are skipped.

    Raises:
        UnsupportedError: `simulate` raises it for outputs of other shapes than (N, C), and for a likelihood that cannot
            sample labels.
        OptionError: `simulate` raises it unless every prior precision is positive.
        ModelError: `simulate` raises it if `make_model` builds another architecture.

    Example:
        >>> import torch
        >>> from estimators import Gaussian
        >>> from estimators.training import Recipe
        >>> inputs, queries = torch.randn(12, 2), torch.randn(3, 2)
        >>> case = SbcCase(torch.nn.Linear(2, 1).eval(), Gaussian(0.5), 1.0, inputs, queries, Recipe(epochs=5))
        >>> case.simulate(0).truth.shape
        torch.Size([3, 1])
    """

    model: nn.Module
    likelihood: Likelihood
    prior_precision: float | Mapping[str, float]
    inputs: PyTree
    queries: PyTree
    recipe: Recipe
    make_model: Callable[[], nn.Module] | None = None

    @classmethod
    def of_problem(cls, problem: Problem, *, n_queries: int = 8) -> SbcCase:
        """Return the case of a problem: its network, prior and training inputs, and the first rows of its test set.

        Args:
            problem: its targets are not used.
            n_queries: the number of test rows.

        Returns:
            The case.
        """
        inputs = concatenate([batch.mark_shared(problem.layout).x for batch in rows(problem.train)])
        test = concatenate([batch.mark_shared(problem.layout).x for batch in rows(problem.test)])
        n_queries = min(checked_integer("n_queries", n_queries, at_least=1), n_rows(test))
        queries = plain_inputs(select_rows(test, slice(0, n_queries)))
        model = copy.deepcopy(problem.model).cpu().double().eval()
        return cls(
            model,
            problem.likelihood,
            problem.prior_precision,
            _float64(plain_inputs(inputs)),
            _float64(queries),
            problem.recipe or Recipe(),
            problem.make_model,
        )

    def simulate(self, seed: int) -> Simulation:
        """Return a data set drawn from the prior and the likelihood, with a network trained on it.

        Training that has not converged gives no warning: `relative_gradient` of the result says how far it got.

        Args:
            seed: of the parameters, the targets and the initial weights; the global random state is not changed.

        Returns:
            The simulation.

        Raises:
            UnsupportedError: for outputs of other shapes than (N, C), and for a likelihood that cannot sample labels.
            OptionError: unless every prior precision is positive.
            ModelError: if `make_model` builds another architecture.
        """
        generator = torch.Generator().manual_seed(seed)
        inputs, queries = _float64(self.inputs), _float64(self.queries)
        truth = self._prior_draw(generator)
        f, f_star = (_outputs(truth, x) for x in (inputs, queries))
        y, y_star = (self._labels(outputs, generator) for outputs in (f, f_star))
        model = self._start(generator, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            options = {"prior_precision": self.prior_precision}
            train_map(model, self.likelihood, [(inputs, y)], recipe=self.recipe, seed=seed, **options)  # type: ignore[arg-type]
            report = converge_map(model, self.likelihood, [(inputs, y)], **options)  # type: ignore[arg-type]
        problem = Problem(
            model,
            self.likelihood,
            train=[(inputs, y)],
            validation=[(queries, y_star)],
            test=[(queries, y_star)],
            prior_precision=self.prior_precision,
            recipe=self.recipe,
            trained=True,
            make_model=None if self.make_model is None else partial(_like_the_truth, self.make_model, self.model),
        )
        return Simulation(problem, f_star, f, inputs, y, queries, report.relative_gradient)

    def checksum(self) -> str:
        """Return a checksum of all that determines the simulations.

        It covers network, likelihood, prior, inputs, recipe, and the code and options of `make_model`.

        Returns:
            16 hexadecimal digits.
        """
        buffer = io.BytesIO()
        tensors = [*tensors_of(self.inputs), *tensors_of(self.queries), *self.model.buffers()]
        frozen = [p.detach() for p in self.model.parameters() if not p.requires_grad]
        for tensor in (*tensors, *frozen):
            buffer.write(repr((str(tensor.dtype), tuple(tensor.shape))).encode() + tensor.cpu().numpy().tobytes())
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        words = (str(self.model), shapes, repr(self.likelihood), repr(self.prior_precision), repr(self.recipe))
        make_model = content_digest(self.make_model)
        buffer.write(repr((*words, make_model)).encode())
        return hashlib.sha256(buffer.getvalue()).hexdigest()[:16]

    def _prior_draw(self, generator: torch.Generator) -> nn.Module:
        """Return a copy of the network with weights drawn from the prior."""
        model = copy.deepcopy(self.model).double().eval()
        network = Network(model, matching_names(model, "all"))
        delta = delta_of_names(self.prior_precision, network.subset, network.theta).expand_as(network.theta)
        if not bool((delta > 0).all()):
            raise OptionError(
                "prior_precision > 0 for every weight, since weights are drawn from the prior",
                received=repr(self.prior_precision),
                remedy="a small positive number.",
            )
        theta = torch.randn(len(delta), generator=generator, dtype=torch.float64) / delta.sqrt()
        named, own = dict(model.named_parameters()), parameter_names(model)
        with torch.no_grad():
            for name, value in network.subset.unflatten(theta).items():
                named[own[name]].copy_(value)
        return model

    def _start(self, generator: torch.Generator, seed: int) -> nn.Module:
        """Return an untrained network."""
        if self.make_model is None:
            return self._prior_draw(generator)
        with seeded_random_state(seed):
            return _like_the_truth(self.make_model, self.model).eval()

    def _labels(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Return labels of outputs f (N, C)."""
        if f.ndim != 2:
            raise UnsupportedError(
                "outputs (N, C) for simulated labels",
                received=f"outputs of shape {tuple(f.shape)}",
                remedy="a network with one prediction per row.",
            )
        return self.likelihood.sample_labels(
            f, lambda n: torch.rand(len(f), n, generator=generator, dtype=torch.float64)
        )


def small_cases() -> dict[str, SbcCase]:
    """Return a regression with two outputs and a classification into three classes, small enough for any method.

    The networks have 27 and 33 weights. 10 and 20 rows determine fewer directions, so that the prior matters.

    Returns:
        The cases by name.
    """
    generator = torch.Generator().manual_seed(0)

    def inputs(n: int) -> Tensor:
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    recipe = Recipe(epochs=150, batch_size=None, lr=0.03)
    cases = {}
    for name, n, outputs, likelihood in (
        ("regression", 10, 2, Gaussian(0.4)),
        ("classification", 20, 3, Categorical()),
    ):
        make_model = partial(_small_network, outputs)
        with seeded_random_state(0):
            model = make_model()
        cases[name] = SbcCase(model, likelihood, 1.3, inputs(n), inputs(4), recipe, make_model)
    return cases


def _small_network(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, outputs)).double().eval()


def _like_the_truth(make_model: Callable[[], nn.Module], truth: nn.Module) -> nn.Module:
    """Return a new network in float64 with the frozen parameters and buffers of the network that makes the targets."""
    made = make_model().cpu().double()
    check_architecture(made, truth)
    own, trained = tensors_by_name(made), matching_names(truth, "all")
    for name, tensor in tensors_by_name(truth).items():
        if name not in trained:
            own[name].copy_(tensor)
    return made


def _float64(x: PyTree) -> PyTree:
    return with_floats(x, torch.float64)


def _outputs(model: nn.Module, x: PyTree) -> Tensor:
    arguments, keywords = forward_arguments(x)
    with torch.no_grad():
        return output_tensor(model(*arguments, **keywords))
