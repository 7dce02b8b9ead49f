"""Estimators that are wrong in one way each: what the conformance kit is tried on."""

from dataclasses import replace

import torch
from torch import nn

from estimators import LinearizedLaplace
from estimators.errors import UnsupportedError
from estimators.persistence.weight_checksum import weight_checksum


class Good(LinearizedLaplace):
    """What the faults are seeded into."""


def variance(change):
    """A fault in `_variance` alone: change(variance, estimator, x)."""

    class Fault(Good):
        def _variance(self, x):
            return change(super()._variance(x), self, x)

    return Fault


def both(change):
    """The same in variance and covariance, so that the two agree."""

    class Fault(variance(change)):
        def _covariance(self, x):
            return self._variance(x).diag_embed()

    return Fault


def fit(change):
    """A fault in what is fitted: change(objective) -> objective."""

    class Fault(Good):
        def _fit(self, objective, *, progress_bar):
            super()._fit(change(objective), progress_bar=progress_bar)

    return Fault


def prediction(change):
    """A fault in `predict`: change(prediction) -> prediction."""

    class Fault(Good):
        def predict(self, x, **options):
            return change(super().predict(x, **options))

    return Fault


def loader(change):
    """A `fit` that mends what it should reject: change(batches) -> batches."""

    class Fault(Good):
        def fit(self, train_loader, **options):
            return super().fit(change(train_loader), **options)

    return Fault


def samples(change):
    """A fault in `_sample`: change(samples, mean, generator) -> samples."""

    class Fault(Good):
        def _sample(self, x, n_samples, generator):
            return change(super()._sample(x, n_samples, generator), self.network_.outputs(x), generator)

    return Fault


def with_prior(objective, precision):
    return replace(objective, prior=replace(objective.prior, precision=precision))


def mean_of_losses(objective):
    """A = G/N + δ in place of G + δ is (G + Nδ)/N."""
    return with_prior(objective, objective.prior.precision * objective.batches.n_data)


class MeanLoss(fit(mean_of_losses)):
    def _variance(self, x):
        return super()._variance(x) * self.n_data_


def transposed_blocks(covariance):
    """(M, C, C) read as (C, M, C)."""
    return covariance.transpose(0, 1).reshape(covariance.shape)


class TransposedCovariance(Good):
    def _covariance(self, x):
        return transposed_blocks(super()._covariance(x))


class TransposedBoth(TransposedCovariance):
    def _variance(self, x):
        return self._covariance(x).diagonal(dim1=1, dim2=2)


class DiagonalCovariance(Good):
    def _covariance(self, x):
        return self._variance(x).diag_embed()


class TrainModeAfterFit(Good):
    def fit(self, train_loader, **options):  # what `_fit` leaves behind is put back
        super().fit(train_loader, **options)
        self.model.train()
        return self


class ChangedWeight(Good):
    def _fit(self, objective, *, progress_bar):
        super()._fit(objective, progress_bar=progress_bar)
        with torch.no_grad():
            next(self.model.parameters()).view(-1)[0] += 1e-12


class UnfreezesWhileFitting(Good):
    def fit(self, train_loader, **options):
        before = [p.requires_grad for p in self.model.parameters()]
        self.model.requires_grad_(True)
        super().fit(train_loader, **options)
        for parameter, required in zip(self.model.parameters(), before, strict=True):
            parameter.requires_grad_(required)
        return self


class HookAtQuery(Good):
    def _variance(self, x):
        self.model.register_forward_hook(lambda *_: None)
        return super()._variance(x)


class GlobalRandomNumbers(Good):
    def fit(self, train_loader, **options):
        torch.rand(1)
        return super().fit(train_loader, **options)


class Unseeded(Good):
    def _fit(self, objective, *, progress_bar):
        super()._fit(objective, progress_bar=progress_bar)
        self.factor_ = 1 + 1e-3 * torch.rand(1).item()

    def _variance(self, x):
        return super()._variance(x) * self.factor_


class Accumulating(Good):
    def _fit(self, objective, *, progress_bar):
        super()._fit(objective, progress_bar=progress_bar)
        self.fits_ = getattr(self, "fits_", 0) + 1

    def _variance(self, x):
        return super()._variance(x) / self.fits_


class OnlyFullBatches(Good):
    def _fit(self, objective, *, progress_bar):
        batches = objective.batches
        size = len(batches.stored[0])
        kept = tuple(batch for batch in batches.stored if len(batch) == size)
        super()._fit(replace(objective, batches=replace(batches, stored=kept)), progress_bar=progress_bar)


class FirstRowsOnly(Good):
    def _fit(self, objective, *, progress_bar):
        kept = objective.batches.stored[:1]
        super()._fit(replace(objective, batches=replace(objective.batches, stored=kept)), progress_bar=progress_bar)


class FrozenToo(Good):
    def _parameter_names(self, train_loader):  # noqa: ARG002
        return [name for name, _ in self.model.named_parameters()]


class OnePrior(Good):
    def _make_objective(self, network, batches):
        objective = super()._make_objective(network, batches)
        precision = objective.prior.precision
        return with_prior(objective, precision[:1].expand_as(precision).clone())


class OneNoise(Good):
    def __init__(self, model, likelihood, **options):
        if torch.as_tensor(getattr(likelihood, "sigma_noise", 1.0)).ndim:
            likelihood = type(likelihood)(float(likelihood.sigma_noise[0]))
        super().__init__(model, likelihood, **options)


class Unchecked(Good):
    def variance(self, x, *, of=None):  # noqa: ARG002
        return self._variance(x)


class RunsInConstructor(Good):
    def __init__(self, model, likelihood, **options):
        super().__init__(model, likelihood, **options)
        self.outputs_ = model(torch.zeros(1, 3, dtype=next(model.parameters()).dtype))


class ReturnsNothing(Good):
    def fit(self, train_loader, **options):
        super().fit(train_loader, **options)


class Squeezed(Good):
    def variance(self, x, *, of=None):
        return super().variance(x, of=of).squeeze()


class Flat(Good):
    def variance(self, x, *, of=None):
        return super().variance(x, of=of).flatten(1)


class AlwaysDouble(Good):
    def variance(self, x, *, of=None):
        return super().variance(x, of=of).double()


class PaddedQueries(Good):
    def variance(self, x, *, of=None):
        return super().variance(nn.functional.pad(x, (0, 3 - x.shape[1])), of=of)


class EmptyIsFine(Good):
    def variance(self, x, *, of=None):
        return super().variance(x, of=of) if len(x) else x.new_zeros(0, 2)


class ModelMayChange(Good):
    def variance(self, x, *, of=None):
        if hasattr(self, "weight_checksum_"):
            self.weight_checksum_ = weight_checksum(self.model)
        return super().variance(x, of=of)


class EvalFirst(Good):
    def fit(self, train_loader, **options):
        self.model.eval()
        return super().fit(train_loader, **options)


class TensorsOnly(Good):
    def _variance(self, x):
        return super()._variance(x + 0)


class OtherMean(Good):
    def _mean(self, x):
        return super()._mean(x).roll(1, -1)


class TransposedSamples(Good):
    def sample(self, x, n_samples, *, seed=0):
        return super().sample(x, n_samples, seed=seed).transpose(0, 1)


class NoFunctional(Good):
    def _variance_of(self, x, of):
        return of(self._variance(x).T).T if x.ndim == 1 else super()._variance_of(x, of).sqrt()


class ScoreOfTheBatch(Good):
    def _score(self, x):
        distance = x.square().sum(-1)
        return distance - distance.mean()


class NearIsFar(Good):
    def _score(self, x):
        return -x.square().sum(-1)


class HalfSaved(Good):
    def _get_fit_state(self):
        tensors, learned = super()._get_fit_state()
        return {name: 0.5 * tensor for name, tensor in tensors.items()}, learned


class ConstantOfTheCPU(Good):
    def _variance(self, x):
        return super()._variance(x) * torch.ones(1, dtype=x.dtype)


class ResultOnTheCPU(Good):
    def _variance(self, x):
        return super()._variance(x).cpu()


class SamplesOnTheCPU(Good):
    def _sample(self, x, n_samples, generator):
        return super()._sample(x, n_samples, generator).cpu()


class GeneratorOfTheCPU(Good):
    def _sample(self, x, n_samples, generator):
        own = torch.Generator().manual_seed(generator.initial_seed())
        return super()._sample(x, n_samples, own)


class SamplesByNumpy(Good):
    def _sample(self, x, n_samples, generator):
        return torch.from_numpy(super()._sample(x, n_samples, generator).numpy()).to(x)


DEVICE_FAULTS = [ConstantOfTheCPU, ResultOnTheCPU, SamplesOnTheCPU, GeneratorOfTheCPU, SamplesByNumpy]
"""What is wrong on an accelerator only."""


def rejecting(*_, **__):
    raise UnsupportedError("nothing", received="something", remedy="nothing.")


def independent_rows(drawn, mean, generator):
    """Each row's samples in an order of its own."""
    order = torch.rand(drawn.shape[:2], generator=generator).argsort(0)[..., None].expand_as(drawn)
    return drawn.gather(0, order) + 0 * mean


def half_precision(v, estimator, x):  # noqa: ARG001
    return v.bfloat16().to(v.dtype) if v.dtype == torch.float32 else v


def broadcast(batches):
    return [(x, y[:, :1].expand(len(x), 2) if y.ndim > 1 else y[:, None].expand(-1, 2)) for x, y in batches]


def without_nan(batches):
    return [(x.nan_to_num(), y.nan_to_num()) for x, y in batches]


def is_binary(estimator):
    return estimator.likelihood.kind == "binary"


def noise_of(estimator):
    return getattr(estimator.likelihood, "sigma_noise", 0.0) ** 2


class RawError(Good):
    def _weight_displacements(self, n_samples, generator):
        raise ValueError(n_samples, generator)


class OtherOrder(Good):
    def jacobians(self, x):
        jacobian, f = super().jacobians(x)
        return jacobian.flip(-1), f


class IndependentRows(Good):
    def _joint_covariance(self, x, f):
        of_rows = self._covariance(x)
        joint = of_rows.new_zeros(*f.shape, *f.shape)
        for m, block in enumerate(of_rows):
            joint[m, :, m] = block
        return joint


class PrecisionForCovariance(Good):
    def posterior_covariance(self):
        return self.posterior_precision()


class DisplacementsForWeights(Good):
    def sample_weights(self, n_samples, *, seed=0):
        return super().sample_weights(n_samples, seed=seed) - self.theta_


class RootTooMany(Good):
    def _weight_displacements(self, n_samples, generator):
        return 0.8 * super()._weight_displacements(n_samples, generator)


class DetachedJacobian(Good):
    def _covariance_along(self, jacobian):
        return super()._covariance_along(jacobian.detach())


class HalfOfTheGraph(Good):
    """A graph through one of the two factors J alone."""

    def _covariance_along(self, jacobian):
        return jacobian @ self.precision_.solve(jacobian.detach().flatten(0, 1)).view_as(jacobian).transpose(1, 2)
