"""Operations of torch whose rules for vmap or forward mode are missing, wrong or unlike reverse mode; and ties."""

import torch
from torch import nn
from torch.nn import functional as F

from trust_networks.case import SIZES, images, network, shaped, tokens, vectors


@network(vectors(new=8), outputs=10)
def prelu_with_as_many_rows_as_outputs():
    return nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 10))


@network(vectors(new=8), outputs=10)
def prelu_by_channel():
    return nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 10))


@network(vectors(), outputs=5)
class Prototypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.centres = nn.Linear(4, 3), nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return -torch.cdist(torch.tanh(self.a(x)), self.centres)


@network(vectors(), outputs=5)
class ManhattanPrototypes(Prototypes):
    def forward(self, x):
        return -torch.cdist(torch.tanh(self.a(x)), self.centres, p=1.0)


@network(vectors(), outputs=2)
class RadialBasis(nn.Module):
    """Kernel features by distances, then a linear layer."""

    def __init__(self):
        super().__init__()
        self.centres, self.head = nn.Parameter(torch.randn(6, 4)), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.exp(-torch.cdist(x, self.centres).square()))


@network(tokens(padded=False))
class BagOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(30, 5), nn.Linear(5, 2)

    def forward(self, ids):
        return self.head(torch.tanh(self.bag(ids)))


@network(tokens(padded=False))
class BagOfWordsMaximum(BagOfWords):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(30, 5, mode="max")


def _offsets(generator):
    """{"ids": (total,), "offsets": (B,)}: rows of unequal length, one behind the other."""

    def batch(rows):
        lengths = torch.randint(1, 5, (rows,), generator=generator)
        ids = torch.randint(0, 30, (int(lengths.sum()),), generator=generator)
        return {"ids": ids, "offsets": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)[:-1]])}

    return [batch(n) for n in SIZES], batch(4)


@network(_offsets, expects="answer or raise")
class BagWithOffsets(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(30, 5), nn.Linear(5, 2)

    def forward(self, ids, offsets):
        return self.head(torch.tanh(self.bag(ids, offsets)))


class _MeanOfTokens(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 6, **options), nn.Linear(6, 2)

    def forward(self, ids):
        return self.head(torch.tanh(self.embedding(ids).mean(1)))


@network(tokens())
def padding_index():
    return _MeanOfTokens(padding_idx=0)


@network(tokens())
def padding_index_with_a_weight():
    """The padded row is not zero."""
    model = _MeanOfTokens(padding_idx=0)
    with torch.no_grad():
        model.embedding.weight[0] = 1.0
    return model


@network(tokens(vocabulary=8), expects="answer or raise")
def gradient_scaled_by_frequency():
    """The gradient of a row depends on how often its tokens occur in the batch."""
    return _MeanOfTokens(scale_grad_by_freq=True)


@network(tokens(padded=False))
def sparse_embedding():
    return _MeanOfTokens(sparse=True)


@network(tokens(padded=False), expects="answer or raise")
def embedding_of_bounded_norm():
    """max_norm writes into the weights in every forward pass."""
    model = _MeanOfTokens(max_norm=1.0)
    model(torch.arange(30)[None])
    return model


@network(images(1, 5))
class SpatialTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.where, self.head = nn.Linear(25, 6), nn.Linear(25, 2)

    def forward(self, x):
        grid = F.affine_grid(torch.tanh(self.where(x.flatten(1))).view(-1, 2, 3), list(x.shape), align_corners=False)
        return self.head(F.grid_sample(x, grid, align_corners=False).flatten(1))


class _Scatter(nn.Module):
    """Products or extremes of groups of features."""

    reduce = "prod"

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x):
        h = self.activation(self.a(x))
        groups = torch.tensor([0, 1, 2, 0, 1, 2]).expand(len(x), -1)
        return self.head(h.new_ones(len(x), 3).scatter_reduce(1, groups, h, self.reduce))

    def activation(self, h):
        return torch.tanh(h)


@network(vectors())
class ScatterProduct(_Scatter):
    pass


@network(vectors())
class ScatterProductWithZeros(_Scatter):
    def activation(self, h):
        return torch.relu(h)


@network(vectors())
class ScatterMean(_Scatter):
    reduce = "mean"


@network(vectors())
class ScatterMaximum(_Scatter):
    reduce = "amax"

    def activation(self, h):
        return torch.relu(h) + 1.0  # ties with the ones that it starts from


def _zeros(row):
    row.zero_()


@network(vectors(special=_zeros))
def relu_at_zero():
    """Without a bias every hidden unit of a zero row is exactly 0."""
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))


@network(vectors(special=_zeros))
class AbsoluteAtZero(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.a(x).abs())


@network(vectors(special=_zeros))
class ClampAtItsEnd(AbsoluteAtZero):
    def forward(self, x):
        return self.head(self.a(x).clamp(0.0, 1.0) + F.hardtanh(self.a(x), 0.0, 2.0))


@network(vectors(special=_zeros))
class MaximumWithTies(AbsoluteAtZero):
    def forward(self, x):
        h = self.a(x)
        return self.head(torch.maximum(h, -h) + h.amax(1, keepdim=True) + h.max(1, keepdim=True).values)


def _equal(row):
    row.fill_(0.5)


@network(vectors(special=_equal))
class SortWithTies(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh((x * self.scale).sort(1).values))


@network(vectors(special=_equal))
class TopKWithTies(SortWithTies):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(torch.tanh((x * self.scale).topk(2, dim=1).values))


@network(vectors(special=_equal))
class MedianAndCumulative(SortWithTies):
    def forward(self, x):
        h = x * self.scale
        return self.head(h.cummax(1).values + h.median(1, keepdim=True).values)


@network(images(1, 6))
class MaxPoolWithTies(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(F.max_pool2d(torch.relu(self.conv(x)), 2).flatten(1))


@network(vectors(special=_zeros))
class CumulativeProductWithZeros(SortWithTies):
    def forward(self, x):
        return self.head((x * self.scale).cumprod(1) + (x * self.scale).prod(1, keepdim=True))


@network(vectors())
class BilinearPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.head = nn.Bilinear(4, 4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.pair(x, x.flip(1))))


@network(vectors())
class LinearAlgebraInside(nn.Module):
    """A Gaussian-process layer: solve and log-determinant of a matrix of the weights."""

    def __init__(self):
        super().__init__()
        self.a, self.root, self.head = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 2)

    def forward(self, x):
        matrix = self.root @ self.root.T + torch.eye(3, dtype=x.dtype)
        h = torch.linalg.solve(matrix, self.a(x).T).T
        return self.head(torch.tanh(h)) + torch.linalg.slogdet(matrix)[1]


@network(shaped(8))
class FourierMixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.tanh(torch.fft.fft(self.a(x)).real))


@network(shaped(8), expects="answer or raise")
class FourierOperator(nn.Module):
    """Complex weights, as in Fourier neural operators."""

    def __init__(self):
        super().__init__()
        self.spectral = nn.Parameter(torch.randn(5, dtype=torch.complex128))
        self.a, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        h = torch.fft.irfft(torch.fft.rfft(x) * self.spectral, n=8)
        return self.head(torch.tanh(h + self.a(x)))


@network(shaped(2, 8))
def convolutions_of_one_dimension():
    layers = nn.Conv1d(2, 3, 3, padding="same"), nn.Tanh(), nn.ConvTranspose1d(3, 2, 2), nn.Tanh()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 2))


@network(images(2, 4))
def group_and_instance_norm():
    layers = nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.InstanceNorm2d(4, affine=True)
    return nn.Sequential(*layers, nn.LPPool2d(2, 3), nn.Flatten(), nn.Linear(4, 2))


@network(images(1, 4))
class UnfoldedPatches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        patches = F.unfold(x, 2, stride=2).transpose(1, 2)
        return self.head(torch.tanh(self.a(patches)).amax(1))
