"""More operations, control flow by data, and weights that are tied in unusual ways."""

import torch
from torch import nn
from torch.nn import functional as F

from trust_networks.case import images, masked, network, shaped, tokens, vectors


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 5), nn.Linear(5, 2)


@network(vectors())
class BooleanMask(_Two):
    """Entries are picked by a mask, and put back: shapes depend on data."""

    def forward(self, x):
        h = self.a(x)
        positive = h > 0
        out = torch.zeros_like(h)
        out[positive] = torch.log1p(h[positive])
        return self.head(out)


@network(vectors())
class MaskedScatter(_Two):
    def forward(self, x):
        h = self.a(x)
        positive = h > 0
        return self.head(torch.zeros_like(h).masked_scatter(positive, torch.tanh(h.masked_select(positive))))


@network(vectors())
class LoopOverRows(_Two):
    """A Python loop with a branch on the value of each row."""

    def forward(self, x):
        rows = [torch.tanh(self.a(row)) if float(row[0]) > 0 else torch.sin(self.a(row)) for row in x]
        return self.head(torch.stack(rows))


@network(vectors(), expects="raise")
class BranchOnTheBatch(_Two):
    """All rows go one way or the other, by the mean of the batch."""

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.head(h if float(x.mean()) > 0 else h.square())


@network(vectors(), expects="raise")
class NoiseInEvalMode(_Two):
    """Two passes do not agree."""

    def forward(self, x):
        return self.head(torch.tanh(self.a(x)) + 0.1 * torch.randn(5, dtype=x.dtype))


@network(vectors())
class GatherAndTake(_Two):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        order = x.argsort(1)
        return self.head(torch.cat([h.gather(1, order), h[:, :1]], 1) + h.take_along_dim(order[:, :1], 1))


@network(vectors())
class IndexPutWithRepeats(_Two):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        rows = torch.arange(len(x))[:, None]
        return self.head(torch.zeros_like(h).index_put((rows, torch.tensor([[0, 0, 1, 1, 2]])), h, accumulate=True))


@network(vectors())
class LogSumExpAndCumulative(_Two):
    def forward(self, x):
        h = self.a(x)
        return self.head(h.logcumsumexp(1) - h.logsumexp(1, keepdim=True) + h.cumsum(1).tanh())


@network(vectors())
class MatrixExponential(nn.Module):
    """A linear dynamical system."""

    def __init__(self):
        super().__init__()
        self.generator, self.head = nn.Parameter(0.3 * torch.randn(4, 4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(x @ torch.linalg.matrix_exp(self.generator - self.generator.T)))


@network(vectors())
class EigenvaluesOfAMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 9), nn.Linear(3, 2)

    def forward(self, x):
        m = self.a(x).view(-1, 3, 3)
        return self.head(torch.linalg.eigvalsh(m + m.transpose(1, 2)))


@network(vectors())
class CholeskyAndTriangularSolve(nn.Module):
    def __init__(self):
        super().__init__()
        self.root, self.a, self.head = nn.Parameter(torch.randn(3, 3)), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        factor = torch.linalg.cholesky(self.root @ self.root.T + torch.eye(3, dtype=x.dtype))
        return self.head(torch.linalg.solve_triangular(factor, torch.tanh(self.a(x)).T, upper=False).T)


@network(vectors())
class KthValueAndQuantile(_Two):
    def forward(self, x):
        h = self.a(x)
        return self.head(torch.tanh(h) * h.kthvalue(3, 1, keepdim=True).values + h.quantile(0.3, 1, keepdim=True))


@network(images(2, 4))
class UpsampledImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.conv(x))
        h = F.interpolate(h, scale_factor=2, mode="bilinear") + F.interpolate(h, scale_factor=2, mode="bicubic")
        return self.out(F.avg_pool2d(F.local_response_norm(h, 2), 8).flatten(1))


@network(images(1, 4))
class PooledAndUnpooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(32, 2)

    def forward(self, x):
        h, where = F.max_pool2d(torch.tanh(self.conv(x)), 2, return_indices=True)
        return self.out(F.max_unpool2d(h, where, 2).flatten(1))


@network(images(4, 3))
class ShuffledPixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.out = nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Linear(1, 2)

    def forward(self, x):
        return self.out(F.pixel_shuffle(torch.tanh(self.up(x)), 2).mean((2, 3)))


@network(images(2, 5))
def reflected_and_dilated():
    layers = nn.ReflectionPad2d(1), nn.Conv2d(2, 2, 3, dilation=2), nn.Hardswish(), nn.AdaptiveMaxPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2, 2))


@network(images(2, 4))
def convolution_without_padding_mode():
    """Circular padding."""
    layers = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.SiLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2, 2))


@network(shaped(1, 4, 4, 4))
def convolution_of_three_dimensions():
    layers = nn.Conv3d(1, 2, 2), nn.Tanh(), nn.ConvTranspose3d(2, 2, 2), nn.AdaptiveAvgPool3d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2, 2))


@network(images(2, 5))
def batch_norm_with_running_statistics():
    """The usual kind: rows do not depend on each other."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    model.train()
    model(torch.randn(8, 2, 5, 5))
    return model


@network(tokens(5, 12, padded=False))
class WeightedBag(nn.Module):
    """EmbeddingBag with a learned weight a sample."""

    def __init__(self):
        super().__init__()
        self.bag, self.weight, self.head = nn.EmbeddingBag(12, 4, mode="sum"), nn.Embedding(12, 1), nn.Linear(4, 2)

    def forward(self, ids):
        return self.head(torch.tanh(self.bag(ids, per_sample_weights=self.weight(ids)[..., 0])))


@network(tokens(5, 12))
class MeanOfPresentTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(12, 4), nn.Linear(4, 2)

    def forward(self, ids):
        here = (ids != 0)[..., None].to(self.head.weight.dtype)
        return self.head(torch.tanh((self.embedding(ids) * here).sum(1) / here.sum(1)))


@network(vectors())
class SharedStorage(nn.Module):
    """Two parameters on one memory: autograd takes them for two."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = nn.Parameter(self.a.weight.data)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


@network(vectors())
class OneModuleTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@network(vectors())
class OneBiasForAll(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.bias = self.head.bias = self.a.bias

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


@network(vectors())
class HeadOfTwoLayers(nn.Module):
    """The last layer shares its weight with the first, which is of the same shape."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight = self.a.weight
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.head(torch.tanh(self.a(x))))


@network(vectors())
class FrozenInside(nn.Module):
    """A frozen layer between trained ones, and a parameter that is part of a larger frozen one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


@network(vectors())
class LinearBySumsAndProducts(nn.Module):
    """Layers written out: einsum, addmm, baddbmm, matmul of a transposed view."""

    def __init__(self):
        super().__init__()
        self.w, self.v, self.u = (nn.Parameter(0.5 * torch.randn(*s)) for s in ((4, 5), (5, 5), (5, 2)))
        self.c = nn.Parameter(torch.randn(5))

    def forward(self, x):
        h = torch.tanh(torch.einsum("bi,ij->bj", x, self.w))
        h = torch.tanh(torch.addmm(self.c, h, self.v.t()))
        return torch.baddbmm(x.new_zeros(len(x), 1, 2), h[:, None], self.u.expand(len(x), -1, -1))[:, 0]


@network(vectors())
class WrittenIntoAView(_Two):
    """The output is filled in place, column by column."""

    def forward(self, x):
        h = torch.tanh(self.a(x))
        f = self.head(h)
        out = torch.empty_like(f)
        out[:, 0], out[:, 1] = f[:, 0], f[:, 1] * f[:, 0].detach()
        return out


@network(vectors())
class BufferOfForward(_Two):
    """A preallocated plain attribute that forward fills and reads."""

    def __init__(self):
        super().__init__()
        self.room = None

    def forward(self, x):
        self.room = x.new_zeros(len(x), 5)
        self.room = self.room + torch.tanh(self.a(x))
        return self.head(self.room)


def _choose(mask):
    mask[10:, 0] = True
    mask[14, 1] = True


@network(masked(4, (2,), "use", _choose))
class SwitchedByAnInput(nn.Module):
    """A flag of each row says which head it goes through; the first batch knows one of them."""

    def __init__(self):
        super().__init__()
        self.a, self.one, self.two = nn.Linear(2, 5), nn.Linear(5, 2), nn.Linear(5, 2)
        self.narrow = nn.Linear(4, 2)

    def forward(self, x, use):
        h = torch.tanh(self.a(self.narrow(x)))
        return torch.where(use, self.two(h), self.one(h))


@network(vectors())
class UnusedUntilLater(_Two):
    """A layer that no row of the first batch reaches."""

    def __init__(self):
        super().__init__()
        self.rare = nn.Linear(4, 5)

    def forward(self, x):
        rare = x[:, :1] > 1.0
        h = self.a(x)
        if bool(rare.any()):
            h = torch.where(rare, h + self.rare(x), h)
        return self.head(torch.tanh(h))


@network(vectors())
class Polynomial(nn.Module):
    """f = x θ² + θ³: not linear in anything, P = 8."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        return x @ self.theta.square() + self.theta.pow(3).sum(0)


@network(vectors(), expects="answer or raise", tolerance=1e-4)
class TwoDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 5, dtype=torch.float32), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.a(x.float())).double())


class _CubeFunction(torch.autograd.Function):
    """Forward mode is there and agrees, vmap is not."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        ctx.save_for_forward(h)
        return h**3

    @staticmethod
    def backward(ctx, g):
        (h,) = ctx.saved_tensors
        return 3 * h.square() * g

    @staticmethod
    def jvp(ctx, t):
        (h,) = ctx.saved_tensors
        return 3 * h.square() * t


@network(vectors())
class FunctionWithForwardMode(_Two):
    def forward(self, x):
        return self.head(_CubeFunction.apply(torch.tanh(self.a(x))))


@network(vectors())
class SavedTensorHooks(_Two):
    """Activations are kept in another form for the backward pass, as offloading does."""

    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            h = torch.tanh(self.a(x)).square()
        return self.head(h)


@network(vectors())
class AnomalyAndGradModes(_Two):
    def forward(self, x):
        with torch.enable_grad():
            h = torch.tanh(self.a(x))
        with torch.autograd.set_detect_anomaly(False):
            return self.head(h)
