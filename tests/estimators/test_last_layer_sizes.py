"""Last-layer Laplace with many outputs: no Jacobian is made, nor anything larger than what is asked for."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from estimators import LastLayerLaplace
from estimators.errors import TooLargeError

N, M, D, C = 40, 10, 16, 50

structures = pytest.mark.parametrize("structure", ["kron", "diag"])


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def fitted(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, D), nn.Tanh(), nn.Linear(D, C)).eval()
    loader = [(torch.randn(N // 2, 4), torch.randint(0, C, (N // 2,))) for _ in range(2)]
    return LastLayerLaplace(model, "classification", hessian_structure=structure).fit(loader)


@structures
def test_a_fit_makes_nothing_larger_than_the_layer_or_one_hessian(structure):
    with Largest() as largest:
        fitted(structure)
    assert largest.entries <= max(C * C, C * (D + 1), N * C)


@structures
def test_a_variance_makes_nothing_larger_than_its_outputs_or_the_layer(structure):
    estimator, queries = fitted(structure), torch.randn(M, 4)
    with Largest() as largest:
        estimator.variance(queries)
    assert largest.entries <= max(C * C, C * (D + 1), M * C)


@structures
def test_a_covariance_makes_nothing_larger_than_itself(structure):
    estimator, queries = fitted(structure), torch.randn(M, 4)
    with Largest() as largest:
        covariance = estimator.covariance(queries)
    assert largest.entries <= covariance.numel() == M * C * C


def test_the_full_form_of_a_thousand_outputs_is_rejected_before_it_is_made():
    model = nn.Sequential(nn.Linear(4, 512), nn.Tanh(), nn.Linear(512, 1000)).eval()
    loader = [(torch.randn(8, 4), torch.randint(0, 1000, (8,)))]
    with Largest() as largest, pytest.raises(TooLargeError, match="kron"):
        LastLayerLaplace(model, "classification").fit(loader)
    assert largest.entries <= 1000 * 513
