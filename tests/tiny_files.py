"""Small files in the formats of the data sets that tasks download."""

import pickle
import struct

import numpy as np
from scipy.io import savemat


def classes_of(n, start=0):
    """Labels (n,) that go through the ten classes."""
    return (np.arange(n) + start) % 10


def pictures(labels, shape, seed):
    """Images of bytes, brighter for higher classes, no two alike."""
    noise = np.random.default_rng(seed).integers(0, 60, size=(len(labels), *shape))
    return (noise + 19 * labels.reshape(-1, *[1] * len(shape))).astype(np.uint8)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    magic = bytes([0, 0, 8, array.ndim])  # 8: unsigned bytes
    path.write_bytes(magic + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes())


def write_mnist(folder, name, *, train=60, test=20, seed=0):
    for prefix, n in (("train", train), ("t10k", test)):
        labels = classes_of(n)
        write_idx(folder / name / "raw" / f"{prefix}-images-idx3-ubyte", pictures(labels, (28, 28), seed + n))
        write_idx(folder / name / "raw" / f"{prefix}-labels-idx1-ubyte", labels)


def cifar_batch(labels, seed):
    """The pickle of a batch as the authors wrote it: protocol 2, by the old name of numpy's module."""
    flat = pictures(labels, (3, 32, 32), seed).reshape(len(labels), -1)
    content = {"data": flat, "labels": labels.tolist(), "batch_label": "a batch", "filenames": ["a.png"] * len(labels)}
    return pickle.dumps(content, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_cifar10(folder, *, a_batch=4, test=10):
    root = folder / "cifar-10-batches-py"
    root.mkdir(parents=True)
    for i in range(1, 6):
        (root / f"data_batch_{i}").write_bytes(cifar_batch(classes_of(a_batch, i), seed=i))
    (root / "test_batch").write_bytes(cifar_batch(classes_of(test), seed=9))


def write_svhn(folder, *, n=12):
    (folder / "SVHN").mkdir(parents=True)
    digits = 1 + classes_of(n)  # the authors call the digit 0 a 10
    images = pictures(digits, (32, 32, 3), seed=5).transpose(1, 2, 3, 0)
    savemat(folder / "SVHN" / "test_32x32.mat", {"X": images, "y": digits.reshape(-1, 1).astype(np.uint8)})


def write_corrupted_cifar10(folder, corruptions, *, test=10):
    root = folder / "CIFAR-10-C"
    root.mkdir(parents=True)
    np.save(root / "labels.npy", np.tile(classes_of(test), 5).astype(np.uint8))
    for i, name in enumerate(corruptions):
        severities = np.repeat(np.arange(1, 6), test).reshape(-1, 1, 1, 1)
        shape = (5 * test, 32, 32, 3)
        np.save(root / f"{name}.npy", np.broadcast_to(10 * i + severities, shape).astype(np.uint8))


def write_uci(folder, name, *, inputs, rows=120, extra_columns=0, repeats=0, splits=2):
    """A set in the layout of the canonical splits; the target is a function of the inputs and not the last column if
    there are extra ones; the last `repeats` rows repeat the first."""
    rng = np.random.default_rng(3)
    x = rng.normal(loc=50, scale=9, size=(rows, inputs))
    y = 7 * x.sum(1, keepdims=True) + rng.normal(size=(rows, 1))
    table = np.concatenate([x, y, rng.normal(size=(rows, extra_columns))], axis=1)
    table = np.concatenate([table, table[:repeats]])
    root = folder / name
    root.mkdir(parents=True, exist_ok=True)
    np.savetxt(root / "data.txt", table, fmt="%.17g")
    (root / "index_features.txt").write_text("".join(f"{i}\n" for i in range(inputs)))
    (root / "index_target.txt").write_text(f"{inputs}\n")
    for number in range(splits):
        order = rng.permutation(len(table))
        cut = round(0.9 * len(table))
        np.savetxt(root / f"index_train_{number}.txt", order[:cut], fmt="%d")
        np.savetxt(root / f"index_test_{number}.txt", order[cut:], fmt="%d")
    return table


def write_package(folder, module, file, content):
    """A file in the folder of an importable package, whose import raises."""
    path = folder / module / file
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / module / "__init__.py").write_text("raise RuntimeError('imported')\n")
    path.write_bytes(content)
    return path
