"""Last layers that are applied to every token: closed form against the linearized network over the same weights."""

import pytest
import torch
from torch import nn

from estimators import Categorical, LastLayerLaplace, LinearizedLaplace
from estimators.errors import NoLastLayerError, OptionError

DELTA, WORDS, LENGTH, PADDING = 2.5, 7, 6, 0


class Reader(nn.Module):
    """Tokens (B, T) -> (B, 3): the layer at every token, then one output per row."""

    def __init__(self, reduce):
        super().__init__()
        self.words, self.end, self.reduce = nn.Embedding(WORDS, 4), nn.Linear(4, 3), reduce

    def forward(self, input_ids, attention_mask):
        return self.reduce(self.end(torch.tanh(self.words(input_ids).cumsum(1))), attention_mask)


REDUCTIONS = {
    "pick_first": lambda f, _: f[:, 0],
    "pick_last": lambda f, mask: f[torch.arange(len(f)), mask.sum(1) - 1],
    "average": lambda f, mask: (f * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    "second": lambda f, _: f[:, 1],
}


def rows(n):
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randint(1, WORDS, (n, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (n, 1), generator=generator)
    kept = torch.arange(LENGTH) < lengths
    return {"input_ids": tokens.where(kept, PADDING), "attention_mask": kept.long()}


def loader():
    return [(rows(n), torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(n))) for n in (6, 5)]


def second(features, _):
    return features[:, 1]


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("name", list(REDUCTIONS))
def test_it_is_the_linearized_laplace_of_the_layer(name, structure):
    model, likelihood = Reader(REDUCTIONS[name]).double().eval(), Categorical()
    options = {"prior_precision": DELTA, "hessian_structure": structure}
    reduction = second if name == "second" else name
    closed = LastLayerLaplace(model, likelihood, feature_reduction=reduction, **options).fit(loader())
    inverse = {"inverse": "cholesky"} if structure == "full" else {}
    other = LinearizedLaplace(model, likelihood, subset_of_weights=["end.*"], **options, **inverse).fit(loader())
    x = rows(4)
    assert torch.allclose(closed.variance(x), other.variance(x), rtol=1e-9)
    assert torch.allclose(closed.covariance(x), other.covariance(x), rtol=1e-9)
    assert torch.allclose(closed.log_marginal_likelihood(), other.log_marginal_likelihood(), rtol=1e-9)
    again = LastLayerLaplace(model, likelihood, feature_reduction=reduction, **options)
    assert torch.equal(again.load_state_dict(closed.state_dict()).variance(x), closed.variance(x))


def test_a_network_that_reduces_in_another_way_is_rejected():
    model = Reader(REDUCTIONS["average"]).double().eval()
    with pytest.raises(NoLastLayerError, match='feature_reduction="pick_last"'):
        LastLayerLaplace(model, "classification").fit(loader())
    for name in ("pick_first", "pick_last"):
        with pytest.raises(NoLastLayerError):
            LastLayerLaplace(model, "classification", feature_reduction=name).fit(loader())
    with pytest.raises(OptionError, match="pick_last"):
        LastLayerLaplace(model, "classification", feature_reduction="last")


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_sequence_classifiers_with_causal_attention_have_a_last_layer(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": WORDS, "num_labels": 3, "pad_token_id": PADDING, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "GPT2":
        config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=LENGTH, **sizes)
    else:
        llama = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(**llama, max_position_embeddings=LENGTH, **sizes)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).double().eval()
    options = {"prior_precision": DELTA}
    closed = LastLayerLaplace(model, "classification", feature_reduction="pick_last", **options).fit(loader())
    other = LinearizedLaplace(
        model, "classification", subset_of_weights=["score.*"], inverse="cholesky", **options
    ).fit(loader())
    x = rows(4)
    assert closed.last_layer_.layer.name == "score"
    assert torch.allclose(closed.variance(x), other.variance(x), rtol=1e-9)
    assert torch.allclose(closed.predict(x).probs, other.predict(x).probs, rtol=1e-9)


def test_a_reduction_that_does_not_fit_is_not_advised():
    """The error for outputs that are not those of the given reduction names another way."""
    model = Reader(REDUCTIONS["average"]).double().eval()
    with pytest.raises(NoLastLayerError, match="another feature_reduction") as raised:
        LastLayerLaplace(model, Categorical(), feature_reduction="pick_last").fit(loader())
    assert "pick_last" in raised.value.expected
    assert "pick_last" not in raised.value.remedy
