"""Dropout against the module in train mode, masks recovered from its members, and a training written out."""

import copy
import itertools
import math
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from estimators import Gaussian
from estimators.baselines import MCDropout
from estimators.errors import OptionError, RandomnessNotCheckedWarning, UnsupportedError
from estimators.runtime.rng import member_seeds, seeded_random_state
from estimators.training import Recipe, train_map

SHORT = Recipe(epochs=5, batch_size=7, lr=0.03)


def make():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


class Twice(nn.Module):
    """One dropout module called twice, one of whole channels, and one that keeps mean and variance."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 4, 3), nn.Linear(8, 3)
        self.channels, self.drop, self.alpha = nn.Dropout1d(0.3), nn.Dropout(0.4), nn.AlphaDropout(0.2)

    def forward(self, x):
        h = self.channels(self.conv(x).tanh())
        h = self.drop(self.drop(h)).flatten(1)
        return self.head(self.alpha(h))


def test_dropout_at_a_mask_is_the_network_with_each_row_dropped_alike(make_problem):
    """A row by itself, through the module in train mode: what a mask may be, and in which shares."""
    problem = make_problem("classification", Twice(), shape=(2, 4))
    fitted = MCDropout(problem.model, "classification", n_samples=4000, seed=2).fit(problem.loader)
    x = torch.cat([problem.query[:1]] * 3)
    members = fitted.member_outputs(x)
    assert torch.allclose(members[:, 0], members[:, 2], rtol=1e-12)  # all rows have the same mask
    in_train_mode = copy.deepcopy(problem.model).train()
    with torch.no_grad():
        drawn = torch.stack([in_train_mode(x[:1])[0] for _ in range(4000)])
    error = drawn.std(0) / math.sqrt(2000)
    assert ((members[:, 0].mean(0) - drawn.mean(0)).abs() < 4 * error).all()
    assert torch.allclose(members[:, 0].var(0), drawn.var(0), rtol=0.15)
    assert not torch.allclose(drawn.var(0), drawn.new_zeros(3), atol=1e-3)


def test_dropout_by_hand_on_a_plain_network(make_problem):
    """f_s = W₂ (m_s ∘ tanh(W₁ x)) / (1 − p) for one mask m_s a member: recovered from members at many queries."""
    p = 0.5
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Dropout(p), nn.Linear(5, 3, bias=False))
    problem = make_problem("classification", model)
    fitted = MCDropout(problem.model, "classification", n_samples=20, seed=1).fit(problem.loader)
    with torch.no_grad():
        hidden = problem.model[0](problem.x).tanh()  # (20, 5)
    masks = set()
    for f in fitted.member_outputs(problem.x):
        solved = torch.linalg.lstsq(hidden, f).solution  # diag(m) W₂ᵀ / (1 − p)
        mask = (solved / problem.model[3].weight.T.detach()).mean(1) * (1 - p)
        assert torch.allclose(mask, mask.round(), atol=1e-8)
        assert set(mask.round().tolist()) <= {0.0, 1.0}
        masks.add(tuple(mask.round().tolist()))
    assert len(masks) > 10


def test_a_network_without_dropout_is_trained_with_it_before_each_linear_layer_but_the_first(make_problem):
    problem = make_problem("classification", make())
    options = {"rate": 0.3, "make_model": make, "recipe": SHORT, "n_samples": 300, "prior_precision": 2.5}
    fitted = MCDropout(problem.model, "classification", seed=3, **options).fit(problem.loader)

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make()

        def forward(self, x):
            h = self.net[2](self.net[1](self.net[0](x)))
            return self.net[3](F.dropout(h, 0.3, self.training))

    (seed,) = member_seeds(3, 1)
    with seeded_random_state(seed):
        by_hand = Dropped()
        train_map(by_hand, "classification", problem.loader, prior_precision=2.5, recipe=SHORT, seed=seed)
    for name, tensor in by_hand.net.state_dict().items():
        assert torch.allclose(fitted.trained_[name], tensor, rtol=1e-9), name
    with torch.no_grad():
        assert torch.allclose(fitted.predict(problem.query).mean, by_hand.eval()(problem.query), atol=0.1)
    larger = MCDropout(problem.model, "classification", seed=3, **{**options, "n_samples": 305}).fit(problem.loader)
    assert torch.equal(larger.member_outputs(problem.query)[:300], fitted.member_outputs(problem.query))


def test_a_linear_layer_behind_a_convolution_has_dropout_too(make_problem):
    def convolutional():
        return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()

    problem = make_problem("classification", convolutional(), shape=(2, 4))
    options = {"rate": 0.3, "make_model": convolutional, "recipe": SHORT, "n_samples": 5}
    assert (MCDropout(problem.model, "classification", **options).fit(problem.loader).variance(problem.query) > 0).all()


def test_shared_dropout_is_switched_on_wherever_it_is_registered(make_problem):
    drop = nn.Dropout(0.5)
    model = nn.Sequential(nn.Linear(4, 5), drop, nn.Identity(), drop)
    problem = make_problem("regression", nn.Sequential(model, nn.Linear(5, 2)))
    once = nn.Sequential(nn.Sequential(model[0], nn.Dropout(0.5)), problem.model[1]).eval()
    variances = [
        MCDropout(m, Gaussian(0.6), n_samples=600).fit(problem.loader).variance(problem.query)
        for m in (problem.model, once)
    ]
    assert float(variances[0].mean() / variances[1].mean()) > 2  # E[m²]/(1−p)² − 1: 3 for two masks, 1 for one


def test_batch_first_is_asked_for_where_rows_are_not_in_front(make_problem):
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop, self.head = nn.Linear(2, 4), nn.Dropout(0.3), nn.Linear(4, 3)

        def forward(self, x):  # (B, T, 2)
            h = self.drop(self.inner(x.transpose(0, 1)))
            return self.head(h.mean(0))

    problem = make_problem("classification", SequenceFirst(), shape=(3, 2))
    fitted = MCDropout(problem.model, "classification", n_samples=3).fit(problem.loader)
    with pytest.raises(UnsupportedError, match=r"have the rows first.*\(3, 7, 4\).*7 rows"):
        fitted.variance(problem.query)


def test_dropout_options_that_contradict_the_model_are_rejected(make_problem):
    plain, dropping = make(), nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 3)).double().eval()
    cases = [
        (plain, {}, "dropout layers, or rate"),
        (plain, {"rate": 0.1}, "dropout layers, or rate"),
        (nn.Sequential(plain, nn.Dropout(0.0)), {}, "p > 0"),
        (plain, {"rate": 1.0, "make_model": make, "recipe": SHORT}, "0 < rate < 1.*1.0"),
        (dropping, {"rate": 0.1, "make_model": make, "recipe": SHORT}, "used as it is"),
        (dropping, {"n_samples": 1}, "n_samples >= 2.*1"),
    ]
    for model, options, message in cases:
        with pytest.raises(OptionError, match=message):
            MCDropout(model, "classification", **options)
    one = make_problem("classification", nn.Linear(4, 3))
    how = {"rate": 0.1, "make_model": lambda: nn.Linear(4, 3).double(), "recipe": SHORT}
    with pytest.raises(UnsupportedError, match="after another layer"):
        MCDropout(one.model, "classification", **how).fit(one.loader)


class Called(nn.Module):
    """A dropout layer, and another random operation on hidden values in train mode."""

    def __init__(self, noise):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 6), nn.Dropout(0.2), nn.Linear(6, 3)
        self.norm, self.noise = nn.BatchNorm1d(6), noise

    def forward(self, x):
        h = self.drop(self.norm(self.first(x)).tanh())
        return self.last(self.noise(h) if self.training else h)


class Rate(nn.Module):
    """A dropout layer of the user's own, in a module of its own."""

    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Recurrent(nn.LSTM):
    """A recurrent layer with dropout of its own."""

    def forward(self, h):
        return F.dropout(super().forward(h[:, None])[0][:, 0], 0.5, self.training)


NOISES = {
    "F.dropout": lambda h: F.dropout(h, 0.5, True),
    "a small rate": lambda h: F.dropout(h, 1e-9, True),
    "F.alpha_dropout": lambda h: F.alpha_dropout(h, 0.5, True),
    "torch.dropout": lambda h: torch.dropout(h, 0.5, True),
    "a module": Rate(),
    "a mask": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "a mask of numpy": lambda h: h * torch.from_numpy(np.random.rand(*h.shape) < 0.5),
    "a path": lambda h: h * h.new_empty(len(h), 1).bernoulli_(0.5),
    "a path that is rarely left out": lambda h: h * h.new_empty(len(h), 1).bernoulli_(0.999),
    "a layer that is rarely left out": lambda h: 0 * h if torch.rand([]) < 1e-3 else h,
    "a layer that is rarely kept": lambda h: 0 * h if torch.rand([]) < 0.999 else h,
    "a layer left out by Python": lambda h: 0 * h if random.random() < 0.1 else h,
    "a rare mask": lambda h: h * (torch.rand_like(h) < 0.999),
    "uniform noise": lambda h: h + torch.empty_like(h).uniform_(-1, 1),
    "a generator": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5), generator=torch.Generator()),
    "a recurrent layer": Recurrent(6, 6, batch_first=True),
}


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("rate", [None, 0.3])
def test_randomness_outside_of_dropout_layers_is_rejected(name, rate, make_problem):
    """Its members would leave it out: a variance that is too small, without a sign of it."""

    def make():
        model = Called(NOISES[name])
        model.drop.p = 0.2 if rate is None else 0.0
        return model.double()

    problem = make_problem("classification", make())
    statistics = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
    options = {} if rate is None else {"rate": rate, "make_model": make, "recipe": SHORT}
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with pytest.raises(UnsupportedError, match=r"nn\.Dropout modules in place of"):
        MCDropout(problem.model, "classification", n_samples=5, prior_precision=2.5, **options).fit(problem.loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in problem.model.named_buffers())
    assert not any(module.training for module in problem.model.modules())


class Attentive(nn.Module):
    """Dropout of attention weights and in a recurrent layer, which stays off, and numbers that change nothing."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.recurrent = nn.LSTM(4, 4, 2, dropout=0.3, batch_first=True)
        self.norm, self.drop, self.last = nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x):
        p = 0.3 if self.training else 0.0
        x = x[:, None] * torch.arange(1, 4, dtype=x.dtype)[:, None]
        h = self.attention(x, x, x)[0]
        h = F.scaled_dot_product_attention(h, h, h, dropout_p=p)
        h = F.dropout(self.recurrent(h)[0], 0.0, self.training).mean(1)
        if self.training and float(torch.rand([])) < 0.0:  # a layer that is left out with a probability of 0
            return self.last(0 * h)
        return self.last(self.drop(F.rrelu(self.norm(h), training=self.training)))


def test_dropout_of_attention_and_recurrent_layers_stays_off(make_problem):
    problem = make_problem("classification", Attentive())
    statistics = {name: buffer.clone() for name, buffer in problem.model.named_buffers()}
    members = MCDropout(problem.model, "classification", n_samples=30).fit(problem.loader).member_outputs(problem.query)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in problem.model.named_buffers())
    eval_but_last = copy.deepcopy(problem.model).eval()
    hidden = []
    eval_but_last.drop.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with torch.no_grad():
        eval_but_last(problem.query)
    last = problem.model.last
    outputs = {tuple(torch.round(f[0], decimals=8).tolist()) for f in members}
    possible = [
        last(hidden[0][0] * torch.tensor(m, dtype=torch.float64) / 0.8) for m in itertools.product([0, 1], repeat=4)
    ]
    assert outputs <= {tuple(torch.round(f.detach(), decimals=8).tolist()) for f in possible}
    assert len(outputs) > 2


class InTrainMode(nn.Module):
    """A dropout layer, optionally F.dropout after the labels are checked, and another output in train mode."""

    def __init__(self, output, *, needs_labels=False, rate=0.0):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 3)
        self.output, self.needs_labels, self.rate = output, needs_labels, rate

    def forward(self, x, labels=None):
        if self.training and self.needs_labels and labels is None:
            raise ValueError("labels are needed")
        f = self.last(self.drop(F.dropout(self.first(x).tanh(), self.rate, self.training)))
        return self.output(f, labels) if self.training else f


class Unlabelled(InTrainMode):
    """A forward that takes no labels."""

    def forward(self, x):
        return super().forward(x)


class Output:
    """An object that is no pytree."""

    def __init__(self, f):
        self.f = f


OUTPUTS = {
    "outputs": lambda f, _: f,
    "a loss": F.cross_entropy,  # a TypeError without labels
    "a scalar": lambda f, _: f.mean(),
    "a tuple": lambda f, _: (f.mean(), f),
    "a named tuple": lambda f, _: namedtuple("Pair", ["main", "auxiliary"])(f, f),
    "an object": lambda f, _: Output(f),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("needs_labels", [False, True])
def test_a_model_with_other_outputs_in_train_mode_is_checked_too(name, needs_labels, make_problem):
    problem = make_problem("classification", InTrainMode(OUTPUTS[name], needs_labels=needs_labels))
    fitted = MCDropout(problem.model, "classification", n_samples=20).fit(problem.loader)  # warnings are errors
    assert bool((fitted.variance(problem.query) > 0).all())
    problem = make_problem("classification", InTrainMode(OUTPUTS[name], needs_labels=needs_labels, rate=0.3))
    with pytest.raises(UnsupportedError, match=r"would stay off: dropout"):
        MCDropout(problem.model, "classification", n_samples=20).fit(problem.loader)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Unlabelled(OUTPUTS["outputs"], needs_labels=True, rate=0.3), "ValueError: labels are needed"),
        (InTrainMode(lambda *_: None), "an output of type NoneType"),
        (InTrainMode(lambda *_: 1 / 0), "ZeroDivisionError"),
    ],
)
def test_a_model_that_fails_in_train_mode_warns(model, reason, make_problem):
    problem = make_problem("classification", model)
    with pytest.warns(RandomnessNotCheckedWarning, match=reason):
        fitted = MCDropout(problem.model, "classification", n_samples=20).fit(problem.loader)
    assert bool((fitted.variance(problem.query) > 0).all())
    assert not any(module.training for module in problem.model.modules())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_dropout_of_hugging_face_models_stays_off_with_sdpa(attention):
    """The remedy of the error for "eager" attention, which calls F.dropout."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=8, attn_implementation=attention)
    model = transformers.BertForSequenceClassification(config).eval()
    data = [({"input_ids": torch.arange(12).view(3, 4)}, torch.tensor([0, 1, 1]))]
    estimator = MCDropout(model, "classification", n_samples=3)
    if attention == "eager":
        with pytest.raises(UnsupportedError, match='attn_implementation="sdpa"'):
            estimator.fit(data)
    else:
        estimator.fit(data)
