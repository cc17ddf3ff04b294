"""Image classification sets as arrays: scikit-learn's digits, and whatever TFDS knows by name.

Classes are split into those that are trained on and those that are held back as out of
distribution, as the SWAG paper does with the classes (0, 1, 2, 8, 9) of CIFAR-10.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.options import UsageError

HELD_OUT = 0.2  # the part of the training images that ``evaluate="validation"`` sets aside


class Part(NamedTuple):
    """Images uint8 or float32 ``(N, H, W, C)`` and integer labels ``(N,)``."""

    images: np.ndarray
    labels: np.ndarray


class Task(NamedTuple):
    """What an experiment trains and is judged on; images float32, normalised by ``train``.

    Labels of ``train`` and ``evaluation`` are positions in the list of the classes trained on;
    those of ``ood`` are the original ones.
    """

    train: Part
    evaluation: Part
    ood: Part


def load(
    dataset: str, data_dir: Path | None, in_classes: Sequence[int], evaluate: str = "test"
) -> Task:
    """Load a data set and split its classes.

    Args:
      dataset: ``"digits"``, or the name of a TFDS set of images of one size with one label each.
      data_dir: where TFDS finds or puts its data; None is TFDS's own default.
      in_classes: the labels to train on; all others are out of distribution.
      evaluate: ``"test"``, or ``"validation"``: a fifth of the training images takes the place of
        the test images, in and out of distribution, and the test images are not used at all.

    Raises:
      UsageError: in one line, for whatever the user can put right.
    """
    train, test = _digits() if dataset == "digits" else _tfds(dataset, data_dir)
    if evaluate == "validation":
        train, test = _halve(train, HELD_OUT)
    _check_classes(in_classes, int(train.labels.max()) + 1)
    inside = np.isin(test.labels, in_classes)
    train = _take(train, np.isin(train.labels, in_classes))
    normal = _normaliser(train.images)
    return Task(
        Part(normal(train.images), _positions(train.labels, in_classes)),
        Part(normal(test.images[inside]), _positions(test.labels[inside], in_classes)),
        Part(normal(test.images[~inside]), test.labels[~inside]),
    )


def _check_classes(in_classes: Sequence[int], num_classes: int) -> None:
    chosen = set(in_classes)
    sound = chosen <= set(range(num_classes)) and len(chosen) == len(in_classes)
    if not sound or not 2 <= len(chosen) < num_classes:
        raise UsageError(
            f"--in-classes {' '.join(map(str, in_classes))}: give at least 2 different classes of "
            f"0 to {num_classes - 1}, and leave at least one out of distribution"
        )


def _take(part: Part, where: np.ndarray) -> Part:
    return Part(part.images[where], part.labels[where])


def _positions(labels: np.ndarray, in_classes: Sequence[int]) -> np.ndarray:
    """Re-index the labels as positions in ``in_classes``."""
    order = np.argsort(in_classes)
    return order[np.searchsorted(np.asarray(in_classes)[order], labels)].astype(np.int32)


def _normaliser(images: np.ndarray) -> Any:
    """Zero mean and unit standard deviation, per channel, over the training images."""
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    return lambda x: ((x - mean) / std).astype(np.float32)


def _halve(part: Part, share: float) -> tuple[Part, Part]:
    """Split off ``share`` of every class, always the same images."""
    from sklearn.model_selection import train_test_split

    rest, split_off = train_test_split(
        np.arange(len(part.labels)), test_size=share, stratify=part.labels, random_state=0
    )
    return _take(part, np.sort(rest)), _take(part, np.sort(split_off))


def _digits() -> tuple[Part, Part]:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels, bundled with it; half is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _halve(Part(digits.images[..., None].astype(np.float32), digits.target), 0.5)


@functools.lru_cache(maxsize=1)
def _tfds(dataset: str, data_dir: Path | None) -> tuple[Part, Part]:
    """The train and test splits of a TFDS image classification set, without TensorFlow."""
    _silence()
    builder = _builder(dataset, data_dir)
    if not builder.is_prepared():
        _prepare(builder, dataset)
    keys = _supervised_keys(builder, dataset)
    return _read(builder, "train", *keys), _read(builder, "test", *keys)


def _builder(dataset: str, data_dir: Path | None) -> Any:
    import tensorflow_datasets as tfds

    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(f"--data-dir {data_dir}: there is no such folder")
    where = {} if data_dir is None else {"data_dir": data_dir}
    try:
        return tfds.builder(dataset, file_format="array_record", **where)
    except Exception as error:  # TFDS raises an assortment, whose first line says what is wrong
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--dataset {dataset}: {reason}") from error


def _prepare(builder: Any, dataset: str) -> None:
    from tensorflow_datasets.core.download import downloader

    # Its ten, with ever longer pauses, are minutes of silence where there is no network.
    downloader.MAX_RETRIES = 4
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise UsageError(
            f"--dataset {dataset}: it is not prepared in {builder.data_dir} and the download "
            f"failed ({type(error).__name__}): try again with a network, or give the folder of "
            "prepared TFDS data with --data-dir"
        ) from error


def _supervised_keys(builder: Any, dataset: str) -> tuple[str, str]:
    """The names of the image and of its label; an error where the set holds something else."""
    import tensorflow_datasets as tfds

    keys, features = builder.info.supervised_keys, builder.info.features
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if len(keys or ()) != 2 or not all(
        isinstance(features[key], kind) for key, kind in zip(keys, kinds, strict=True)
    ):
        raise UsageError(f"--dataset {dataset}: not a set of images with one class label each")
    missing = {"train", "test"} - set(builder.info.splits)
    if missing:
        raise UsageError(f"--dataset {dataset}: it has no split named {missing.pop()!r}")
    return keys


def _read(builder: Any, split: str, image: str, label: str) -> Part:
    source = builder.as_data_source(split=split)
    rows = [(row[image], row[label]) for row in source]
    images, labels = zip(*rows, strict=True)
    if len({x.shape for x in images}) > 1:
        raise UsageError(f"--dataset {builder.name}: its images are of different sizes")
    return Part(np.stack(images), np.asarray(labels))


def _silence() -> None:
    """No remarks of TFDS on how its files were written, none of urllib3 on every retry.

    For good, not for a while: the threads of a failed download go on until the program ends.
    """
    for name in ("absl", "urllib3", "etils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
