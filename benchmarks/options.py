"""What experiments share on their command line, and the error that ends in one clear line.

Imports nothing heavy: ``python -m benchmarks --help`` answers at once.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

V = TypeVar("V")
ByDataset = Annotated[V, tyro.conf.arg(help_behavior_hint="(default: by data set)")]


class UsageError(Exception):
    """Something that the user can put right: shown as one line, without a traceback."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Which data, and which part of them is reported on."""

    dataset: str = "digits"
    """digits (bundled with scikit-learn), or a TFDS set of labelled images: mnist, cifar10, ..."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; where it is not given, TFDS's own default."""
    in_classes: tuple[int, ...] = (0, 1, 2, 8, 9)
    """Classes to train on; test images of all others serve as out of distribution."""
    evaluate: Literal["test", "validation"] = "test"
    """validation: train on four fifths of the training images and report on the others, which is
    how hyper-parameters are chosen without a look at the test images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How to train; None stands for the default of the data set (see ``complete``)."""

    model: ByDataset[Literal["convnet", "lenet5"] | None] = None
    """Network: convnet (BatchNorm) on digits, lenet5 (no BatchNorm) elsewhere."""
    epochs: ByDataset[int | None] = None
    """Passes over the training images."""
    start: ByDataset[int | None] = None
    """Epochs before the first collection; from then on one iterate is collected every epoch."""
    batch_size: ByDataset[int | None] = None
    """Images in a minibatch."""
    learning_rate: ByDataset[float | None] = None
    """Learning rate of the first half of the epochs before start; then it falls linearly."""
    swa_learning_rate: ByDataset[float | None] = None
    """Learning rate while iterates are collected."""
    weight_decay: ByDataset[float | None] = None
    """L2 penalty that is added to the gradient."""
    augment: ByDataset[tuple[Literal["shift", "noise", "flip"], ...] | None] = None
    """Random changes of the training images, from scratch in every epoch: shift (by up to an eighth
    of the side), noise, flip (left to right). By default shift, with noise where the images are
    grey and flip where they are in colour; without a value, none."""
    rank: int = 20
    """Deviations held by SWAG (K in the paper)."""
    seeds: int = 5
    """Networks trained side by side, numbered 0, 1, ...; tables show mean and standard error."""
    checkpoint_every: int = 10
    """Epochs from one checkpoint to the next."""
    resume: bool = False
    """Continue from the last checkpoint; the numbers are those of an uninterrupted run."""


T = TypeVar("T", bound=Training)


def complete(options: T, defaults: dict[str, Any]) -> T:
    """Fill the options that are None with ``defaults``."""
    missing = {k: v for k, v in defaults.items() if getattr(options, k) is None}
    return dataclasses.replace(options, **missing)
