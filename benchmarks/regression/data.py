"""Regression sets with the train and test splits that they come with.

Two layouts of folders, recognised by the files in them and not by names: that of the MC-dropout
experiments (``<name>/data/data.txt`` and ``index_*.txt``), and that of the ``uci_datasets``
repository (``<name>/data.csv.gz`` and ``test_mask.csv.gz``).
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.options import UsageError

INDEXED, MASKED = "data.txt", "data.csv.gz"  # the file that tells each layout
EMBEDDED = "diabetes"
HELD_OUT = 0.2  # the part of a train set on which hyper-parameters are chosen


class Split(NamedTuple):
    """Rows to train on and rows to be judged on."""

    train: np.ndarray
    test: np.ndarray


class Dataset(NamedTuple):
    """Inputs float64 ``(N, D)``, targets ``(N,)``, and splits; ``layout`` says whose."""

    name: str
    inputs: np.ndarray
    targets: np.ndarray
    splits: list[Split]
    layout: str


class Parts(NamedTuple):
    """What all splits train on and are judged on, standardised by their own train rows.

    Splits may differ by some rows: the arrays are padded to the longest, and ``rows`` and
    ``test_rows`` count what is real. Padding is never trained on nor scored.

    Attributes:
      x: inputs to train on, float32 ``(splits, N, D)``.
      y: targets to train on, ``(splits, N)``.
      rows: train rows of each split, ``(splits,)``.
      test_x: inputs to be judged on, ``(splits, M, D)``.
      test_y: their targets, as standardised as ``y``, ``(splits, M)``.
      test_rows: test rows of each split, ``(splits,)``.
      y_mean: mean of the targets of the train rows, in their own units, ``(splits,)``.
      y_std: standard deviation of the same.
    """

    x: np.ndarray
    y: np.ndarray
    rows: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    test_rows: np.ndarray
    y_mean: np.ndarray
    y_std: np.ndarray


def load(names: Sequence[str], data_dir: Path | None) -> Iterator[Dataset]:
    """The data sets of these names, or all in the folder; scikit-learn's diabetes without one.

    Args:
      names: folder names in ``data_dir``, or one level below it; none stands for all.
      data_dir: a folder of data sets, of folders of data sets, or a data set itself.

    Raises:
      UsageError: at the first call, for what is missing; at a data set, for what is wrong in it.
    """
    if data_dir is None:
        if set(names) - {EMBEDDED}:
            raise UsageError(
                f"--name {' '.join(names)}: give the folder of the data sets with --data-dir; "
                f"without one there is only scikit-learn's {EMBEDDED}"
            )
        return iter([_embedded()])
    found = _find(data_dir)
    missing = [name for name in names if name not in found]
    if missing or not found:
        raise UsageError(
            f"--name {' '.join(missing) or '(all)'}: no data set of this name in {data_dir}; "
            f"there are: {', '.join(found) or 'none'}"
        )
    return (_read(name, found[name]) for name in (names or found))


def parts(dataset: Dataset, splits: Sequence[Split]) -> Parts:
    """Gather and standardise the rows of all splits, each by its own train rows alone."""
    each = [_standardised(dataset, split) for split in splits]
    columns = [list(column) for column in zip(*each, strict=True)]
    x, y, test_x, test_y, y_mean, y_std = columns
    rows, test_rows = ([len(part) for part in column] for column in (y, test_y))
    x, y, test_x, test_y = map(_padded, (x, y, test_x, test_y))
    return Parts(
        x, y, np.array(rows), test_x, test_y, np.array(test_rows), np.array(y_mean), np.array(y_std)
    )


def held_out(splits: Sequence[Split], times: int = 1) -> list[Split]:
    """Splits of the train rows alone: four fifths to train on, a random fifth to choose by.

    All splits for the first time, then all for the second, to the last. The fifth is of the same
    size in all splits: that of the smallest.
    """
    size = max(1, int(HELD_OUT * min(len(split.train) for split in splits)))
    orders = [
        np.random.default_rng((time, i)).permutation(split.train)
        for time in range(times)
        for i, split in enumerate(splits)
    ]
    return [Split(order[size:], order[:size]) for order in orders]


def _standardised(dataset: Dataset, split: Split) -> tuple[np.ndarray, ...]:
    inputs, targets = dataset.inputs[split.train], dataset.targets[split.train]
    mean, std = inputs.mean(0), _spread(inputs)
    y_mean, y_std = targets.mean(), _spread(targets)
    return (
        ((inputs - mean) / std).astype(np.float32),
        ((targets - y_mean) / y_std).astype(np.float32),
        ((dataset.inputs[split.test] - mean) / std).astype(np.float32),
        ((dataset.targets[split.test] - y_mean) / y_std).astype(np.float32),
        y_mean,
        y_std,
    )


def _spread(values: np.ndarray) -> np.ndarray:
    """Standard deviation, and one where a column is constant: it becomes zero, not NaN."""
    # Not by the standard deviation, which rounding makes larger than zero.
    return np.where(np.ptp(values, axis=0) == 0, 1.0, values.std(0))


def _padded(arrays: list[np.ndarray]) -> np.ndarray:
    longest = max(map(len, arrays))
    return np.stack([np.pad(a, [(0, longest - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in arrays])


def _find(data_dir: Path) -> dict[str, Path]:
    """Folders that hold a data set, by name: the folder itself, below it, or one level further."""
    if not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir}: there is no such folder")
    if _marker(data_dir):
        return {data_dir.resolve().name: data_dir}
    found: dict[str, Path] = {}
    for folder in [*sorted(data_dir.glob("*/")), *sorted(data_dir.glob("*/*/"))]:
        if not _marker(folder):
            continue
        if folder.name in found:
            raise UsageError(
                f"--data-dir {data_dir}: {folder.name} is in {found[folder.name]} and in {folder}; "
                "give the folder above one of them"
            )
        found[folder.name] = folder
    return found


def _marker(folder: Path) -> Path | None:
    """The file by which a folder is known to hold a data set."""
    markers = (folder / "data" / INDEXED, folder / MASKED)
    return next((marker for marker in markers if marker.exists()), None)


def _read(name: str, folder: Path) -> Dataset:
    marker = _marker(folder)
    read = _indexed if marker.name == INDEXED else _masked
    dataset = read(name, marker.parent)
    _check(dataset, marker)
    return dataset


def _indexed(name: str, folder: Path) -> Dataset:
    """The layout of the MC-dropout experiments: columns and rows are named in index files."""
    table = _table(folder / INDEXED)
    columns = _index(folder / "index_features.txt", table.shape[1])
    target = _index(folder / "index_target.txt", table.shape[1])
    splits = [
        Split(*(_index(folder / f"index_{p}_{i}.txt", len(table)) for p in ("train", "test")))
        for i in range(_count(folder / "n_splits.txt"))
    ]
    return Dataset(name, table[:, columns], table[:, target[0]], splits, "standard")


def _masked(name: str, folder: Path) -> Dataset:
    """The layout of ``uci_datasets``: the target is the last column, a mask tells test rows."""
    table, path = _table(folder / MASKED, ","), folder / "test_mask.csv.gz"
    masks = _table(path, ",")
    if len(masks) != len(table) or not np.isin(masks, (0, 1)).all():
        raise UsageError(
            f"{path}: {len(masks)} rows for {len(table)} of {MASKED}, each 0 or 1; fetch it again"
        )
    splits = [Split(np.flatnonzero(mask == 0), np.flatnonzero(mask)) for mask in masks.T]
    return Dataset(name, table[:, :-1], table[:, -1], splits, "uci_datasets")


def _table(path: Path, delimiter: str | None = None) -> np.ndarray:
    try:
        with warnings.catch_warnings(action="ignore"):  # of an empty file: an error below
            table = np.loadtxt(path, delimiter=delimiter, ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise UsageError(f"{path}: {reason}; fetch the data set again") from None
    if not table.size or not np.isfinite(table).all():
        raise UsageError(f"{path}: empty, or with values that are not finite; fetch it again")
    return table


def _index(path: Path, size: int) -> np.ndarray:
    """Row or column numbers from 0; the files write some as 1.0e+00."""
    index = _table(path).ravel()
    if (index != index.astype(int)).any() or index.min() < 0 or index.max() >= size:
        raise UsageError(f"{path}: not all whole numbers of 0 to {size - 1}; fetch it again")
    return index.astype(int)


def _count(path: Path) -> int:
    count = _table(path)
    if count.size > 1 or count.item() not in range(1, 1000):
        raise UsageError(f"{path}: not a number of splits; fetch it again")
    return int(count.item())


def _check(dataset: Dataset, path: Path) -> None:
    for i, split in enumerate(dataset.splits):
        if np.intersect1d(*split).size:
            raise UsageError(f"{path.parent}: split {i} tests on rows that it trains on")
        if len(split.train) < 10 or not len(split.test):
            raise UsageError(
                f"{path.parent}: split {i} has {len(split.train)} train and {len(split.test)} test "
                "rows, but 10 and 1 are needed"
            )


def _embedded() -> Dataset:
    """Scikit-learn's 442 patients, in 20 random splits of nine tenths and one."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    orders = [np.random.default_rng(i).permutation(len(y)) for i in range(20)]
    splits = [Split(order[len(y) // 10 :], order[: len(y) // 10]) for order in orders]
    return Dataset(EMBEDDED, x, y, splits, "random")
