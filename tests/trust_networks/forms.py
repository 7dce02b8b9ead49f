"""Forms of inputs, outputs, state and layers that are common in practice."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from trust_networks.case import images, in_batches, masked, network, shaped, tokens, vectors


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 5), nn.Linear(5, 2)


@network(vectors(), outputs=3)
class ScalarParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return torch.tanh(self.a(x)) * self.scale


@network(vectors(1), outputs=1)
class OnlyScalars(nn.Module):
    """A fitted formula of physics: three parameters, none with a dimension."""

    def __init__(self):
        super().__init__()
        self.height, self.rate, self.shift = (nn.Parameter(torch.tensor(v)) for v in (2.0, 0.5, -0.3))

    def forward(self, x):
        return self.height * torch.exp(-self.rate * x) + self.shift


@network(shaped(3, 1, 4, 4))
class Video(nn.Module):
    """Frames folded into rows for a convolution, and unfolded again."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 2), nn.Linear(2, 2)

    def forward(self, x):
        h = torch.tanh(self.conv(x.flatten(0, 1))).mean((2, 3))
        return self.head(h.view(len(x), -1, 2).mean(1))


@network(shaped(2, 1, 4, 4))
class Siamese(nn.Module):
    """The two images of a row are stacked behind each other."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 2), nn.Linear(2, 2)

    def forward(self, x):
        both = torch.cat([x[:, 0], x[:, 1]])
        h = torch.tanh(self.conv(both)).mean((2, 3))
        left, right = h.chunk(2)
        return self.head((left - right).square())


@network(shaped(2, 4))
class SiameseVectors(_Two):
    def forward(self, x):
        left, right = torch.tanh(self.a(torch.cat([x[:, 0], x[:, 1]]))).chunk(2)
        return self.head((left - right).square())


@network(vectors(), expects="answer or raise")
class WritesIntoInput(_Two):
    def forward(self, x):
        x.sub_(0.5).div_(2.0)
        return self.head(torch.tanh(self.a(x)))


@network(vectors(), expects="answer or raise")
class FillsMissingInputs(_Two):
    """Writes into its input, and a second pass over it changes nothing."""

    def forward(self, x):
        x[x < -1.0] = -1.0
        return self.head(torch.tanh(self.a(x)))


@network(vectors())
def in_place_activations():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ELU(inplace=True), nn.Linear(5, 2))


@network(vectors())
class InPlaceArithmetic(_Two):
    def forward(self, x):
        h = self.a(x)
        h += 1.0
        h = torch.tanh(h)
        h = h * 2
        h[:, 0] = 0.0
        return self.head(h)


@network(vectors())
class CachesItsFeatures(_Two):
    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        self.last = torch.tanh(self.a(x))
        return self.head(self.last)


@network(vectors())
class CachesADerivedWeight(_Two):
    """Made at the first call, and kept: a weight that a second call no longer reaches."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, x):
        if "scale" not in self.kept:
            self.kept["scale"] = torch.ones(5, dtype=x.dtype)
        return self.head(torch.tanh(self.a(x)) * self.kept["scale"])


@network(vectors())
class CountsCalls(_Two):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return self.head(torch.tanh(self.a(x)))


@network(vectors())
class CountsCallsInAnAttribute(_Two):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(torch.tanh(self.a(x)))


@network(vectors())
class RunningMean(_Two):
    """A buffer that every call moves, and that the outputs do not use."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        h = torch.tanh(self.a(x))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.head(h)


class _Recurrent(nn.Module):
    kind = nn.LSTM

    def __init__(self):
        super().__init__()
        self.rnn, self.head = type(self).kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@network(shaped(4, 3))
class LongShortTermMemory(_Recurrent):
    pass


@network(shaped(4, 3))
class GatedRecurrentUnit(_Recurrent):
    kind = nn.GRU


@network(shaped(4, 3))
class ElmanNetwork(_Recurrent):
    kind = nn.RNN


@network(shaped(3, 3))
class BidirectionalTwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 2, 2, batch_first=True, bidirectional=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


@network(shaped(4, 3))
class RecurrenceByHand(nn.Module):
    """A cell called once a step: every weight is used four times a row."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.head(h)


@network(tokens(5, 12))
class PackedSequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(12, 3), nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, ids):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embedding(ids), (ids != 0).sum(1), batch_first=True, enforce_sorted=False
        )
        return self.head(self.rnn(packed)[1][0])


def _pad(mask):
    mask[8:, 2] = True
    mask[20, 1] = True


@network(masked(4, (3,), "pad", _pad), name="padding-mask-of-vectors")
class _MaskOfVectors(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x, pad):
        return self.head(torch.tanh(self.a(x)).masked_fill(pad, 0.0))


def _sequences(generator):
    x, pad = torch.randn(24, 3, 4, generator=generator), torch.zeros(24, 3, dtype=torch.bool)
    _pad(pad)
    inputs = {"x": x, "pad": pad}
    return in_batches(inputs), {key: value[[2, 8, 14, 20]].clone() for key, value in inputs.items()}


@network(_sequences)
class PaddedEncoder(nn.Module):
    """Its fast path makes nested tensors, and pads the output to the longest row."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(4, 2)

    def forward(self, x, pad):
        return self.head(self.encoder(x, src_key_padding_mask=pad)[:, 0])


@network(_sequences)
class PaddedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x, pad):
        return self.head(self.attention(x, x, x, key_padding_mask=pad, need_weights=False)[0].mean(1))


@network(shaped(3, 4))
class AttentionTimeFirst(nn.Module):
    """batch_first=False, and the network transposes, as it should."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        h = x.transpose(0, 1)
        return self.head(self.attention(h, h, h)[0].mean(0))


@network(shaped(3, 4))
class ScaledDotProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, -1])


@network(shaped(3, 4))
class DecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory = nn.Parameter(torch.randn(2, 4))
        self.layer, self.head = nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x, self.memory.expand(len(x), -1, -1)).mean(1))


@network(vectors())
class DictOutput(_Two):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        return {"logits": self.head(h), "hidden": h}


@dataclass
class _Output:
    logits: torch.Tensor
    hidden: torch.Tensor


@network(vectors())
class ObjectOutput(_Two):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        return _Output(self.head(h), h)


@network(vectors(), expects="answer or raise")
class TupleOutput(_Two):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.head(h), h


@network(vectors(), expects="answer or raise", tolerance=1e-3)
class SinglePrecisionOutput(_Two):
    def forward(self, x):
        return self.head(torch.tanh(self.a(x))).float()


def _shared(generator):
    def batch(rows):
        return {"x": torch.randn(rows, 3, 4, generator=generator), "positions": torch.arange(3)[None]}

    return [batch(n) for n in (7, 12, 5)], batch(4)


@network(_shared, expects="answer or raise")
class PositionsSharedByRows(nn.Module):
    """position_ids (1, T), as Hugging Face models take them."""

    def __init__(self):
        super().__init__()
        self.positions, self.head = nn.Embedding(3, 4), nn.Linear(4, 2)

    def forward(self, x, positions):
        return self.head(torch.tanh(x + self.positions(positions)).mean(1))


def _edges(generator):
    edges = torch.tensor([[0, 1, 2, 3, 1, 2], [1, 2, 3, 0, 3, 0]])

    def batch(rows):
        return {"x": torch.randn(rows, 4, 3, generator=generator), "edges": edges}

    return [batch(n) for n in (7, 12, 5)], batch(4)


@network(_edges, expects="answer or raise")
class GraphSharedByRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, edges):
        h = torch.tanh(self.a(x))
        return self.head(torch.zeros_like(h).index_add(1, edges[1], h[:, edges[0]]).mean(1))


@network(images(1, 4))
class AutoregressiveMask(nn.Module):
    """A convolution whose weight is masked in every call."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(2, 2)
        self.register_buffer("mask", torch.ones(1, 1, 3, 3).tril())

    def forward(self, x):
        h = F.conv2d(x, self.conv.weight * self.mask, self.conv.bias, padding=1)
        return self.head(torch.tanh(h).mean((2, 3)))


@network(vectors())
class SameLayerTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.a(torch.tanh(self.a(x)))))


@network(vectors())
class TransposeTied(nn.Module):
    """A weight shared by two layers, one of them transposed."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.head(torch.tanh(F.linear(h, self.a.weight.T)))


@network(vectors())
class FixedPoint(nn.Module):
    """An implicit layer: iterated until it moves no more, which is control flow by data."""

    def __init__(self):
        super().__init__()
        self.a, self.w, self.head = nn.Linear(4, 3), nn.Parameter(0.1 * torch.randn(3, 3)), nn.Linear(3, 2)

    def forward(self, x):
        h = z = self.a(x)
        for _ in range(50):
            new = torch.tanh(z @ self.w.T + h)
            if (new - z).abs().max() < 1e-12:
                break
            z = new
        return self.head(z)
