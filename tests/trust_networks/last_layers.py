"""Last layers that are not what the rows of the first batch show."""

import torch
from torch import nn
from torch.nn import functional as F

from trust_networks.case import masked, network, tokens, vectors


class _Two(nn.Module):
    def __init__(self, hidden=5, outputs=2):
        super().__init__()
        self.a, self.head = nn.Linear(4, hidden), nn.Linear(hidden, outputs)

    def features(self, x):
        return torch.tanh(self.a(x))


def _large(row):
    row[0] = 6.0


def _is_large(x):
    return x[:, :1] > 5.0


@network(tokens(4, padded=False), outputs=30)
class HeadIsEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 30)

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(F.embedding(ids, self.head.weight).mean(1))))


@network(tokens(4, 12, padded=False), outputs=12)
class HeadTiedToEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(12, 5), nn.Linear(5, 5), nn.Linear(5, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embedding(ids).mean(1))))


@network(vectors())
class EncoderTiedToDecoder(nn.Module):
    """The head's weight is the transpose of an earlier one."""

    def __init__(self):
        super().__init__()
        self.lift, self.decoder = nn.Linear(4, 2), nn.Linear(5, 2)

    def forward(self, x):
        return self.decoder(torch.tanh(self.lift(x) @ self.decoder.weight))


@network(vectors())
class BiasTiedElsewhere(_Two):
    def __init__(self):
        super().__init__()
        self.shift = nn.Linear(4, 2)
        self.shift.bias = self.head.bias

    def forward(self, x):
        return self.head(self.features(x) * self.shift(x).sum(1, keepdim=True))


@network(vectors(special=_large))
class BiasUsedLater(_Two):
    """The bias of the head enters the features of some rows."""

    def forward(self, x):
        h = self.features(x)
        return self.head(torch.where(_is_large(x), torch.tanh(h + self.head.bias.sum()), h))


def _mark(mask):
    mask[9, 1] = mask[14, 2] = mask[20, 0] = True


@network(masked(4, (3,), "mask", _mark), outputs=3)
class MaskedLater(_Two):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x, mask):
        return self.head(self.features(x)).masked_fill(mask, -5.0)


@network(vectors(special=_large))
class GatedLater(_Two):
    def forward(self, x):
        f = self.head(self.features(x))
        return torch.where(_is_large(x), f.square(), f)


@network(vectors(special=_large))
class SwitchedLater(_Two):
    """Some rows go through another head."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(5, 2)

    def forward(self, x):
        h = self.features(x)
        return torch.where(_is_large(x), self.other(h), self.head(h))


@network(vectors(special=_large))
class DetachedLater(_Two):
    def forward(self, x):
        f = self.head(self.features(x))
        return torch.where(_is_large(x), f.detach(), f)


@network(vectors(special=_large))
class HeadUsedTwiceLater(_Two):
    def __init__(self):
        super().__init__(2)

    def forward(self, x):
        f = self.head(self.features(x))
        return torch.where(_is_large(x), self.head(torch.tanh(f)), f)


@network(vectors(special=_large))
class ScaledLater(_Two):
    def forward(self, x):
        return self.head(self.features(x)) * torch.where(_is_large(x), 3.0, 1.0)


@network(vectors(special=_large))
class ClampedLater(_Two):
    def forward(self, x):
        return self.head(self.features(x) * torch.where(_is_large(x), 50.0, 0.1)).clamp(-2.0, 2.0)


@network(vectors())
class OneExpertARow(nn.Module):
    """Top-1 routing: an expert sees few rows."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x):
        gate, chosen = self.router(x).softmax(1).max(1)
        every = torch.stack([torch.tanh(expert(x)) for expert in self.experts], 1)
        return gate[:, None] * every[torch.arange(len(x)), chosen]


@network(vectors(), expects="answer")
class ExpertsByIndex(nn.Module):
    """Rows are gathered by expert, which is control flow by data."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))

    def forward(self, x):
        gate, chosen = self.router(x).softmax(1).max(1)
        f = x.new_zeros(len(x), 2)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            f = f.index_add(0, rows, expert(x[rows]))
        return gate[:, None] * f


@network(vectors(), outputs=3)
class LogSoftmaxOutput(_Two):
    def __init__(self):
        super().__init__(5, 3)

    def forward(self, x):
        return F.log_softmax(self.head(self.features(x)), 1)


@network(vectors())
class LearnedTemperature(_Two):
    """A parameter without dimensions behind the head."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.head(self.features(x)) / self.temperature


@network(vectors())
class ResidualOutput(_Two):
    def forward(self, x):
        return self.head(self.features(x)) + x[:, :2].sin()


@network(vectors())
class HeadReadElsewhere(_Two):
    """The output depends on the norm of the head's weights as well."""

    def forward(self, x):
        return self.head(self.features(x)) / self.head.weight.norm()


@network(vectors())
class SlicedHead(_Two):
    def __init__(self):
        super().__init__(5, 4)

    def forward(self, x):
        return self.head(self.features(x))[:, 1:3]


@network(vectors(), outputs=4)
class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return torch.cat([self.one(h), self.two(h)], 1)


@network(vectors())
class CosineHead(_Two):
    """Normalised features and weights: not linear in its weights."""

    def forward(self, x):
        return 5 * F.linear(F.normalize(self.features(x)), F.normalize(self.head.weight))
