"""Records that no method made: plausible arrays of every part that a record may have, for tests that render them.

Means are shared by all methods of a (task, seed); a method scales the variance and adds noise of its own to it. Three
tasks: a regression on one input with a plot grid, a classification with out-of-distribution rows and shifts, a binary
one.
"""

from dataclasses import dataclass

import numpy as np

from bdl_bench.records import Cost, Record, RecordStore, Training, Tuning

SCRIPT = "<script>alert(1)</script>"
PATH = "../../x"
QUOTES = """it's "quoted" `$x_2^2$`"""
LONG = "a-method-whose-name-is-sixty-characters-long-to-be-truncated"
METHODS = {
    "map": 0.0,
    "laplace": 1.0,
    "laplace-kron": 0.8,
    "last-layer-laplace": 0.4,
    "ensemble": 0.7,
    "dropout": 0.5,
    "regvar-finetune": 1.1,
    "regvar": 1.02,
    "regvar-amortized": 3.0,
    SCRIPT: 0.6,
    QUOTES: 0.3,
    LONG: 1.4,
}
FAMILIES = ("noise", "blur")


@dataclass(frozen=True)
class Part:
    """Rows as one method predicts them: difficulty from 0 (as in training) upwards."""

    kind: str
    scale: float
    rows: int
    difficulty: float
    outputs: int = 4

    def arrays(self, shared, own, *, scale_of_variance=1.0):
        """mean, epistemic_variance, probs or total_variance, targets; `shared` is one generator a (task, seed)."""
        outputs = 1 if self.kind != "classification" else self.outputs
        mean = shared.normal(size=(self.rows, outputs)) * 2.5
        base = shared.gamma(2.0, size=(self.rows, 1)) * (0.2 + self.difficulty) * shared.uniform(0.5, 1.5, (1, outputs))
        noise = shared.normal(size=mean.shape) * (0.7 + self.difficulty)
        mixed = own.lognormal(0.0, 0.25, size=base.shape) if self.scale not in (0.0, 1.0) else 1.0
        epistemic = self.scale * base * mixed * scale_of_variance
        if self.kind == "regression":
            targets = mean + 0.6 * noise
            return {
                "mean": mean,
                "epistemic_variance": epistemic,
                "total_variance": epistemic + 0.4,
                "targets": targets,
            }
        logits = mean / np.sqrt(1 + np.pi / 8 * epistemic)
        if self.kind == "binary":
            probs = 1 / (1 + np.exp(-logits))
            targets = (mean + noise > 0).astype(float)
        else:
            probs = np.exp(logits - logits.max(-1, keepdims=True))
            probs /= probs.sum(-1, keepdims=True)
            targets = (mean + noise).argmax(-1).astype(float)
        return {"mean": mean, "epistemic_variance": epistemic, "probs": probs, "targets": targets}


def _under(prefix, arrays):
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def _band(scale, own, *, factor):
    x = np.linspace(-2, 2, 80)[:, None]
    between = 0.02 + np.exp(-((x / 0.8) ** 2)) + 0.4 * np.maximum(np.abs(x) - 1.2, 0)
    variance = scale * factor * between * (1 + 0.1 * own.normal(size=x.shape) ** 2)
    mean = np.sin(2 * x) + 0.3 * x
    return {"x": x, "mean": mean, "epistemic_variance": variance, "total_variance": variance + 0.04}


def cell_arrays(kind, method, scale, seed, *, rows=120):
    """Every part of a record, as fitted and tuned."""
    found = {}
    for prefix, factor in (("", 1.0), ("tuned/", 0.4)):
        shared = np.random.default_rng(seed)
        own = np.random.default_rng([seed, *map(ord, method)])
        parts = {"": Part(kind, scale, rows, 0.0), "validation": Part(kind, scale, 30, 0.0)}
        if kind == "classification":
            parts["ood/held-out"] = Part(kind, scale, rows, 1.5)
            parts["ood/uniform noise"] = Part(kind, scale, rows // 2, 3.0)
            parts |= {f"shift/{f}-{s}": Part(kind, scale, rows, 0.3 * s) for f in FAMILIES for s in range(1, 6)}
        for name, part in parts.items():
            arrays = part.arrays(shared, own, scale_of_variance=factor)
            if name.startswith("ood/"):
                del arrays["targets"]
            found |= _under(prefix + name, arrays) if name else {prefix + k: v for k, v in arrays.items()}
        if kind == "regression":
            found |= _under(f"{prefix}plot_grid", _band(scale, own, factor=factor))
    return found


def tuning(kind, scale, seed):
    """A grid of axis × variance scale × noise or temperature, with a bowl in the first two."""
    rng = np.random.default_rng(seed)
    other = "sigma_noise" if kind == "regression" else "softmax_temperature"
    axis = [None] if scale == 0 else list(np.geomspace(0.01, 100, 9))
    scales = [1.0] if scale == 0 else [0.0, *np.geomspace(0.01, 10, 7)]

    def score(value, variance_scale, temperature):
        from_best = np.log([value or 1, variance_scale * 3 + 1e-3, temperature]) - np.array([1, 0, 0])
        return 0.6 + float(np.array([0.02, 0.03 * scale, 0.1]) @ from_best**2 + 0.002 * rng.normal())

    points = [
        {"value": v, "variance_scale": s, other: t, "score": score(v, s, t)}
        for v in axis for s in scales for t in (0.5, 1.0, 2.0)
    ]  # fmt: skip
    chosen = min(points, key=lambda p: p["score"])
    edge = ["variance_scale"] if scale == 3.0 else []
    return Tuning(
        option=None if scale == 0 else "prior_precision", unit=None, points=points, at_boundary=edge, seconds=0.7,
        fits=9,        chosen={k: v for k, v in chosen.items() if k != "score"}, score_name="NLL", validation_rows=30,
        refit_kind="post hoc at fixed weights",
    )  # fmt: skip


def write_cell(store, task, kind, method, seed, *, rows=120):
    """One finished record."""
    scale = METHODS.get(method, 0.9)
    rng = np.random.default_rng([seed, *map(ord, method)])
    cost = Cost(
        fit_seconds=0.01 + 3 * scale * rng.uniform(0.9, 1.1), predict_seconds=0.02 * rng.uniform(0.9, 1.1),
        peak_bytes=2**29, peak_increase_bytes=2**22, peak_reset=True, passes=1 + 40 * scale,
        tuning_seconds=0.7, exclusive=method != "dropout",
    )  # fmt: skip
    record = Record(
        key="k", task=task, task_summary=f"{kind}, made up", method=method, method_summary=f"made up: {method}",
        seed=seed, status="ok", kind=kind, cost=cost, training=Training(seconds=2.0, recipe="Recipe(epochs=3)"),
        configuration={"prior_precision": "1.0", "parameters": "601"}, tuning=tuning(kind, scale, seed),
        preflight={"gradient norm": "0.19", "smallest eigenvalue": "−0.4: the Hessian is indefinite"},
        environment={"python": "3", "torch": "2"},
    )  # fmt: skip
    return store.write(record, cell_arrays(kind, method, scale, seed, rows=rows))


def write_unfinished(store, task, method, seed, status):
    """A skipped or failed record."""
    fields = {"traceback": f"Traceback\n  {SCRIPT}\nValueError"} if status == "failed" else {}
    store.write(
        Record(key="k", task=task, task_summary="made up", method=method, method_summary="made up", seed=seed,
               status=status, reason=f"TooLargeError: 7 TiB {SCRIPT}", **fields)
    )  # fmt: skip


TASKS = {"between": "regression", "pictures": "classification", f"{PATH} {SCRIPT}": "binary"}


def write_grid(directory, *, methods=tuple(METHODS), tasks=TASKS, seeds=3, rows=120):
    """Every cell of the grid, but one skipped and one failed."""
    store = RecordStore(directory)
    for task, kind in tasks.items():
        for method in methods:
            for seed in range(seeds):
                if (kind, method) == ("classification", "ensemble"):
                    write_unfinished(store, task, method, seed, "skipped")
                elif (kind, method, seed) == ("binary", "dropout", 1):
                    write_unfinished(store, task, method, seed, "failed")
                else:
                    write_cell(store, task, kind, method, seed, rows=rows)
