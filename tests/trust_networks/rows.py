"""Rows that depend on each other in eval mode, and networks without a slope or with one that is not a number."""

import torch
from torch import nn

from trust_networks.case import images, network, shaped, vectors


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 5), nn.Linear(5, 2)


@network(images(), expects="raise")
class BatchStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))


@network(vectors(), expects="raise")
class BatchStatisticsOfVectors(_Two):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5, track_running_stats=False)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.a(x))))


@network(vectors(), expects="raise")
class CentredOverTheBatch(_Two):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.head(h - h.mean(0))


@network(vectors(), expects="raise")
class StandardisedInputs(_Two):
    def forward(self, x):
        return self.head(torch.tanh(self.a(x / (1.0 + x.std(0)))))


@network(shaped(3, 4), expects="raise")
class TimeFirstEncoder(nn.Module):
    """batch_first=False given (B, T, C): attention runs over the rows."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


@network(shaped(3, 4), expects="raise")
class TimeFirstLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


@network(vectors(), expects="raise")
class AttentionOverTheBatch(_Two):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.head(torch.softmax(h @ h.T, 1) @ h)


@network(vectors(), expects="raise")
class SoftmaxOverRows(_Two):
    def forward(self, x):
        return self.head(torch.softmax(self.a(x), 0))


@network(vectors(), expects="raise")
class RowBefore(_Two):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.head(h + 0.5 * h.roll(1, 0))


@network(vectors(), expects="raise")
class CumulativeOverRows(_Two):
    def forward(self, x):
        return self.head(torch.tanh(self.a(x)).cumsum(0))


@network(vectors(), expects="raise")
class DividedByTheLargest(_Two):
    """Only the row with the largest norm matters to the others."""

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.head(h / h.abs().max())


@network(vectors(), expects="raise")
class DetachedOutput(_Two):
    def forward(self, x):
        return self.head(torch.tanh(self.a(x))).detach()


@network(vectors(), expects="raise")
class ForwardUnderNoGrad(_Two):
    @torch.no_grad()
    def forward(self, x):
        return self.head(torch.tanh(self.a(x)))


@network(vectors(), expects="raise")
class ForwardInInferenceMode(_Two):
    @torch.inference_mode()
    def forward(self, x):
        return self.head(torch.tanh(self.a(x)))


@network(vectors(), expects="raise")
class ForwardByData(_Two):
    def forward(self, x):
        return self.head(torch.tanh(self.a(x))).data


@network(vectors(), expects="raise")
class ThroughNumpy(_Two):
    def forward(self, x):
        h = torch.tanh(self.a(x)).detach().numpy()
        return torch.from_numpy(h @ self.head.weight.detach().numpy().T)


@network(vectors(), expects="raise")
class RoundedOutput(_Two):
    """A slope that is zero everywhere."""

    def forward(self, x):
        return self.head(torch.tanh(self.a(x))).round()


def _zeros(row):
    row.zero_()


@network(vectors(special=_zeros), expects="raise")
class SquareRootOfZero(nn.Module):
    """Finite outputs, a slope that is not: some rows of later batches are 0."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 5, bias=False), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(torch.sqrt(self.a(x).square()))


@network(vectors(special=_zeros), expects="raise")
class DistanceOfZero(SquareRootOfZero):
    def forward(self, x):
        h = self.a(x)
        return self.head(h) / (1 + h.square().sum(1, keepdim=True).sqrt())


@network(vectors(special=_zeros))
class NormOfZero(SquareRootOfZero):
    """Tensor.norm has slope 0 at 0."""

    def forward(self, x):
        h = self.a(x)
        return self.head(h) / (1 + h.norm(dim=1, keepdim=True))


@network(vectors())
class OneOutputDetached(_Two):
    """One of two outputs has no slope: its variance is 0, the other's is not."""

    def forward(self, x):
        f = self.head(torch.tanh(self.a(x)))
        return torch.stack([f[:, 0], f[:, 1].detach()], 1)


@network(vectors())
class UnusedLayer(_Two):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.a(x)))
