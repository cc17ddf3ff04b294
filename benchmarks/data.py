"""Classification sets as arrays: scikit-learn's digits; images or texts that TFDS knows by name.

Classes are split into those that are trained on and those that are held back as out of
distribution, as the SWAG paper does with the classes (0, 1, 2, 8, 9) of CIFAR-10; or another set of
images is out of distribution. A tenth of the training inputs is held out for all methods alike, so
that those which fit a temperature or a scale on it have no other training inputs than the rest.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import text
from benchmarks.options import UsageError

VALIDATION = 0.2  # the part of the training inputs that ``evaluate="validation"`` sets aside
HELD_OUT = 0.1  # the part of the training inputs on which temperatures and scales are fitted
OF_TEN = (0, 1, 2, 8, 9)  # classes of ten that are trained on, those of the paper
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # red, green and blue in luminance (ITU-R 601)


class Part(NamedTuple):
    """Inputs and integer labels ``(N,)``.

    Inputs are images uint8 or float32 ``(N, H, W, C)``, texts ``(N,)``, or their word numbers int32
    ``(N, T)`` with 0 for padding.
    """

    inputs: np.ndarray
    labels: np.ndarray


class Task(NamedTuple):
    """What an experiment trains and is judged on.

    Images are float32, normalised by ``train``; texts are word numbers, the vocabulary that of
    ``train``. Labels are positions in ``classes``, but those of ``ood`` are the original ones.

    Attributes:
      train: what is trained on.
      held_out: a tenth of the training inputs, to fit a temperature or a scale on.
      evaluation: what is reported on.
      ood: inputs out of distribution.
      classes: the original labels of the classes trained on.
      vocabulary: how many word numbers there are; None for images.
    """

    train: Part
    held_out: Part
    evaluation: Part
    ood: Part
    classes: tuple[int, ...]
    vocabulary: int | None


def load(
    dataset: str,
    data_dir: Path | None,
    in_classes: Sequence[int] | None = None,
    evaluate: str = "test",
    ood_dataset: str | None = None,
) -> Task:
    """Load a data set and split its classes.

    Args:
      dataset: ``"digits"``, or the name of a TFDS set of images of one size, or of texts, with one
        label each.
      data_dir: where TFDS finds or puts its data; None is TFDS's own default.
      in_classes: the labels to train on; all others are out of distribution. None is ``OF_TEN`` of
        ten classes and else the first two thirds; with ``ood_dataset`` all.
      evaluate: ``"test"``, or ``"validation"``: a fifth of the training inputs takes the place of
        the test inputs, in and out of distribution, and the test inputs are not used at all.
      ood_dataset: a set of images that is out of distribution in place of classes.

    Raises:
      UsageError: in one line, for whatever the user can put right.
    """
    train, test = _parts(dataset, data_dir, evaluate)
    classes = _classes(in_classes, int(train.labels.max()) + 1, whole=ood_dataset is not None)
    train, held_out = _halve(_take(train, np.isin(train.labels, classes)), HELD_OUT)
    inside = np.isin(test.labels, classes)
    ood = _take(test, ~inside)
    if ood_dataset is not None:
        ood = _foreign(ood_dataset, data_dir, evaluate, train)
    prepared = _preparation(train)
    parts = [
        Part(prepared(part.inputs), _positions(part.labels, classes))
        for part in (train, held_out, _take(test, inside))
    ]
    is_text = parts[0].inputs.ndim == 2
    vocabulary = text.vocabulary_size(parts[0].inputs) if is_text else None
    return Task(*parts, Part(prepared(ood.inputs), ood.labels), classes, vocabulary)


def raw(dataset: str, data_dir: Path | None) -> tuple[Part, Part]:
    """The train and test splits of a TFDS set as they are stored."""
    return _tfds(dataset, data_dir)


def _parts(dataset: str, data_dir: Path | None, evaluate: str) -> tuple[Part, Part]:
    """What there is to train on, and what to report on."""
    train, test = _digits() if dataset == "digits" else _tfds(dataset, data_dir)
    return (train, test) if evaluate == "test" else _halve(train, VALIDATION)


def _classes(in_classes: Sequence[int] | None, num_classes: int, *, whole: bool) -> tuple[int, ...]:
    if in_classes is None:
        inside = num_classes if whole else num_classes - num_classes // 3
        return OF_TEN if num_classes == 10 and not whole else tuple(range(inside))
    chosen = set(in_classes)
    sound = chosen <= set(range(num_classes)) and len(chosen) == len(in_classes)
    if not sound or not 2 <= len(chosen) < num_classes + whole:
        raise UsageError(
            f"--in-classes {' '.join(map(str, in_classes))}: give at least 2 different classes of "
            f"0 to {num_classes - 1}, and leave at least one out of distribution (or --ood-dataset)"
        )
    return tuple(in_classes)


def _take(part: Part, where: np.ndarray) -> Part:
    return Part(part.inputs[where], part.labels[where])


def _positions(labels: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Re-index the labels as positions in ``classes``."""
    order = np.argsort(classes)
    return order[np.searchsorted(np.asarray(classes)[order], labels)].astype(np.int32)


def _preparation(train: Part) -> Callable[[np.ndarray], np.ndarray]:
    """What makes raw inputs those of a network, by the training inputs."""
    if train.inputs.ndim == 1:
        return text.encoder(train.inputs)
    return _normaliser(train.inputs)


def _normaliser(images: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Zero mean and unit standard deviation, per channel, over the training images."""
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    return lambda x: ((x - mean) / std).astype(np.float32)


def _foreign(name: str, data_dir: Path | None, evaluate: str, like: Part) -> Part:
    """The images of another set, in the size and the colours of those trained on."""
    part = _parts(name, data_dir, evaluate)[1]
    if part.inputs.ndim != 4 or like.inputs.ndim != 4:
        raise UsageError(f"--ood-dataset {name}: both data sets must be of images")
    return Part(_converted(part.inputs, like.inputs.shape[1:]), part.labels)


def _converted(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Images of this height, width and number of channels, resized linearly with antialiasing."""
    import jax

    images = images.astype(np.float32)
    if images.shape[-1] != shape[-1]:
        grey = images @ GREY[:, None] if images.shape[-1] == 3 else images
        images = np.repeat(grey, shape[-1], axis=-1)
    if images.shape[1:] == shape:
        return images
    return np.asarray(jax.image.resize(images, (len(images), *shape), "linear"))


def _halve(part: Part, share: float) -> tuple[Part, Part]:
    """Split off ``share`` of every class, always the same inputs."""
    from sklearn.model_selection import train_test_split

    rest, split_off = train_test_split(
        np.arange(len(part.labels)), test_size=share, stratify=part.labels, random_state=0
    )
    return _take(part, np.sort(rest)), _take(part, np.sort(split_off))


def _digits() -> tuple[Part, Part]:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels, bundled with it; half is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (255 / 16 * digits.images[..., None]).astype(np.float32)  # 0 to 255, as all others
    return _halve(Part(images, digits.target), 0.5)


@functools.lru_cache(maxsize=2)
def _tfds(dataset: str, data_dir: Path | None) -> tuple[Part, Part]:
    """The train and test splits of a TFDS classification set, without TensorFlow."""
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
    """The names of the input and of its label; an error where the set holds something else."""
    keys = _image_keys(builder) or text.keys(builder.info.features, builder.info.supervised_keys)
    if keys is None:
        raise UsageError(f"--dataset {dataset}: not a set of images or texts with one class each")
    missing = {"train", "test"} - set(builder.info.splits)
    if missing:
        raise UsageError(f"--dataset {dataset}: it has no split named {missing.pop()!r}")
    return keys


def _image_keys(builder: Any) -> tuple[str, str] | None:
    import tensorflow_datasets as tfds

    keys, features = tuple(builder.info.supervised_keys or ()), builder.info.features
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if len(keys) != 2 or not all(map(isinstance, map(features.__getitem__, keys), kinds)):
        return None
    return keys


def _read(builder: Any, split: str, key: str, label: str) -> Part:
    source = builder.as_data_source(split=split)
    rows = [(row[key], row[label]) for row in source]
    inputs, labels = zip(*rows, strict=True)
    if isinstance(inputs[0], bytes):
        return Part(np.array(inputs, object), np.asarray(labels))
    if len({x.shape for x in inputs}) > 1:
        raise UsageError(f"--dataset {builder.name}: its images are of different sizes")
    return Part(np.stack(inputs), np.asarray(labels))


def _silence() -> None:
    """No remarks of TFDS on how its files were written, none of urllib3 on every retry.

    For good, not for a while: the threads of a failed download go on until the program ends.
    """
    for name in ("absl", "urllib3", "etils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
