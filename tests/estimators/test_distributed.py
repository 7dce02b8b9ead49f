"""Two processes that share the rows end where one does."""

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fork_server import call
from safetensors.torch import load_file, save_file
from torch import nn

from estimators import FineTune, LinearResponse, MeanAbsolute, NewtonRefit, PosteriorDraws, RegVar
from estimators.curvature.krylov.block_lanczos import BlockLanczos
from estimators.data import Batch
from estimators.data.distributed import ProcessGroup
from estimators.errors import OptionError
from estimators.objective import objective
from estimators.regvar.solvers.fine_tune import DEFAULT_RECIPE
from estimators.runtime.rng import preserved_random_state
from estimators.training import Recipe

SGD = Recipe(epochs=6, batch_size=7, optimizer="sgd", lr="auto")
FITS = {
    "fine-tune": {"regularizer": PosteriorDraws(3), "solver": FineTune(recipe=SGD)},
    "fine-tune, averaged": {
        "regularizer": PosteriorDraws(3, variance_estimate="monte_carlo"),
        "solver": FineTune(recipe=replace(DEFAULT_RECIPE, batch_size=7)),
    },
    "central": {"regularizer": PosteriorDraws(3), "solver": FineTune(1e-3, "central", recipe=SGD)},
    "linear response": {"regularizer": PosteriorDraws(3, variance_estimate="bounds"), "solver": LinearResponse()},
    "to tolerance": {"regularizer": PosteriorDraws(3), "rtol": 0.01},
    "newton": {"regularizer": PosteriorDraws(2), "solver": NewtonRefit()},
    "hessian": {"regularizer": MeanAbsolute(), "solver": FineTune(1e-3, "central", recipe=SGD), "curvature": "hessian"},
}


def fits(directory, **options):
    """Of two dtypes; 22 rows in batches of 9, 9 and 4, then of 7, 7, 7 and 1: the second process has no row of that."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(22, 4, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randint(0, 3, (22,), generator=generator)
        with preserved_random_state():
            torch.manual_seed(2)
            model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype).eval()
        for name, parts in FITS.items():
            if dtype == torch.float32 and name not in ("fine-tune", "linear response", "to tolerance"):
                continue
            regvar = RegVar(model, "classification", prior_precision=30.0, **parts)
            path = directory / f"{name}-{dtype}.safetensors"
            regvar.fit(list(zip(x.split(9), y.split(9), strict=True)), checkpoint=path, **options)
            found[f"{name} {str(dtype)[6:]}"] = regvar.variance(x[:6])
    return found


def in_a_process(directory, result):
    """One of the processes, as `accelerate launch --cpu` starts them."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    found = fits(Path(directory), accelerator=accelerator)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{result}-{accelerator.process_index}")
    short_of_memory(accelerator)
    wrong_data(accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads, now and then, are still there when the interpreter takes itself apart, and abort it


def short_of_memory(accelerator):
    """One of them has no room for a basis, and both of them thin theirs; by the memory of each they would part."""
    model, x = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 2)).double(), torch.rand(20, 3).double()
    with torch.no_grad():
        for place, p in enumerate(model.parameters()):
            p.copy_(torch.arange(p.numel()).view_as(p).add(place).sin())
        x.copy_(torch.arange(60.0).view_as(x).cos())

    def variance(**options):
        draws = PosteriorDraws(2, rao_blackwell=None)
        regvar = RegVar(model, "regression", regularizer=draws, solver=LinearResponse(tol=1e-10))
        return regvar.fit([(x, x[:, :2])], **options).variance(x[:4])

    alone, free = variance(), objective.available_bytes
    objective.available_bytes = (lambda _: 1) if accelerator.process_index else free
    thinned, thin = [], BlockLanczos.thick_restart
    BlockLanczos.thick_restart = lambda cycle: (thinned.append(cycle.rank), thin(cycle))
    try:
        together = variance(accelerator=accelerator)
    finally:
        objective.available_bytes, BlockLanczos.thick_restart = free, thin
    assert thinned
    assert torch.allclose(alone, together, rtol=1e-7)


def wrong_data(accelerator):
    """A loader that was divided among the processes already."""
    from estimators.errors import DataError, ModelError

    model, x = nn.Linear(2, 1), torch.arange(12.0).reshape(6, 2)
    with torch.no_grad():
        model.weight.fill_(0.3)
        model.bias.fill_(0.1)
    mine = x[accelerator.process_index :: 2]
    with pytest.raises(DataError, match="whole loader"):
        RegVar(model, "regression").fit([(mine, mine[:, :1])], accelerator=accelerator)
    with torch.no_grad():
        model.bias.fill_(float(accelerator.process_index))
    with pytest.raises(ModelError, match="same weights"):
        RegVar(model, "regression").fit([(x, x[:, :1])], accelerator=accelerator)


@pytest.mark.filterwarnings("ignore::estimators.errors.NotConvergedWarning")
def test_two_processes_end_where_one_does(fork_server, tmp_path):
    pytest.importorskip("accelerate")
    result = tmp_path / "result"
    (tmp_path / "two").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = str(tmp_path / "two"), str(result)
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    fork_server.start(*[call(in_a_process, *arguments, env=env, imports=["accelerate"]) for env in ranks])
    alone = fits(tmp_path)
    assert fork_server.wait() == [0, 0]
    first, second = load_file(f"{result}-0"), load_file(f"{result}-1")
    assert first.keys() == second.keys() == alone.keys()
    for name, variance in alone.items():
        assert torch.equal(first[name], second[name]), name
        apart = float((first[name] - variance).abs().max() / variance.abs().max())
        assert apart < (1e-9 if "64" in name else 1e-2), name  # a difference of two refits in float32 is so good


def test_the_shards_of_a_process_group_are_the_batch():
    batch = Batch({"a": torch.arange(5)}, torch.arange(5) * 2)
    parts = [ProcessGroup(index, 3).shard(batch) for index in range(3)]
    assert sorted(torch.cat([part.x["a"] for part in parts]).tolist()) == list(range(5))
    assert all(torch.equal(part.y, 2 * part.x["a"]) for part in parts)
    assert ProcessGroup(4, 6).shard(batch) is not None
    assert ProcessGroup(5, 6).shard(batch) is None


def test_what_is_no_accelerator_raises():
    with pytest.raises(OptionError, match=r"accelerate\.Accelerator.*received str|Received str"):
        RegVar(nn.Linear(2, 1), "regression").fit([(torch.ones(3, 2), torch.ones(3, 1))], accelerator="gpu")
