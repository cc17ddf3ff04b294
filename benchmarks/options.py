"""What experiments share on their command line.

Imports nothing heavy: ``python -m benchmarks --help`` answers at once.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from benchmarks.errors import UsageError as UsageError

V = TypeVar("V")
ByDataset = Annotated[V, tyro.conf.arg(help_behavior_hint="(default: by data set)")]
ByModel = Annotated[V, tyro.conf.arg(help_behavior_hint="(default: by model)")]


NEUTRAL = {"name", "data_dir", "results", "resume"}  # options of no influence on the numbers


def identity(chosen: Any) -> dict[str, Any]:
    """The options that determine the numbers."""
    return {k: v for k, v in dataclasses.asdict(chosen).items() if k not in NEUTRAL}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Which data, and which part of them is reported on."""

    dataset: str = "digits"
    """digits (bundled with scikit-learn), or a TFDS set of labelled images or texts: mnist,
    cifar10, trec, ..."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; where it is not given, TFDS's own default."""
    in_classes: ByDataset[tuple[int, ...] | None] = None
    """Classes to train on; test inputs of all others serve as out of distribution. By default 0, 1,
    2, 8 and 9 of ten, as in the paper, else the first two thirds; with --ood-dataset all."""
    ood_dataset: str | None = None
    """Image set that is out of distribution in place of classes: digits or a TFDS set, whose images
    are made grey or three equal colours, and resized, to be like those trained on."""
    evaluate: Literal["test", "validation"] = "test"
    """validation: train on four fifths of the training inputs and report on the others, which is
    how hyper-parameters are chosen without a look at the test inputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How to train; None stands for the default of the model (see ``complete``)."""

    model: ByDataset[str | None] = None
    """Network, by default convnet (BatchNorm) on digits, transformer on text, lenet5 (no BatchNorm)
    elsewhere; an unknown name shows all."""
    epochs: ByModel[int | None] = None
    """Passes over the training inputs."""
    start: ByModel[int | None] = None
    """Epochs before the first collection."""
    collections: ByModel[int | None] = None
    """Iterates collected an epoch from then on; the paper's is 1, short runs need more."""
    batch_size: ByModel[int | None] = None
    """Inputs in a minibatch."""
    replacement: bool = False
    """Draw the inputs of every minibatch with replacement, as the theory of constant SGD has it;
    otherwise every epoch goes through all inputs in a random order."""
    learning_rate: ByModel[float | None] = None
    """Learning rate of the first half of the epochs before start; then it falls linearly."""
    swa_learning_rate: ByModel[float | None] = None
    """Learning rate while iterates are collected, and the upper one of the cycles of FGE."""
    weight_decay: ByModel[float | None] = None
    """L2 penalty that is added to the gradient; of SGLD the Gaussian prior."""
    augment: ByDataset[tuple[Literal["shift", "crop", "noise", "flip"], ...] | None] = None
    """Random changes of the training images, from scratch in every epoch: shift (by up to an eighth
    of the side), crop (by up to 4 pixels, with zeros beyond the edge), noise, flip (left to right).
    By default shift, with noise where the images are grey and flip where they are in colour;
    without a value, none."""
    rank: int = 20
    """Deviations held by SWAG (K in the paper)."""
    dropout: float = 0.1
    """Rate of SWA-Dropout; all other methods train without."""
    snapshots: int = 30
    """Iterates that SGLD keeps, at even distances after start, and averages."""
    temperature: float = 1.0
    """Of the posterior that SGLD draws from: 1 is Bayes' own, 0 is SGD without momentum."""
    cycles: int = 5
    """Cycles of the learning rate of FGE after start, and so networks that it averages."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What networks compute in; weights and their averages are float32."""
    seeds: int = 5
    """Repetitions, numbered 0, 1, ...; tables show mean and standard error over them."""
    devices: int | None = None
    """Devices over which every batch is split; by default all accelerators, one of a CPU."""
    checkpoint_every: int = 10
    """Epochs from one checkpoint to the next."""
    resume: bool = False
    """Continue from the last checkpoint; the numbers are those of an uninterrupted run."""


T = TypeVar("T", bound=Training)


def complete(options: T, defaults: dict[str, Any]) -> T:
    """Fill the options that are None with ``defaults``."""
    missing = {k: v for k, v in defaults.items() if getattr(options, k) is None}
    return dataclasses.replace(options, **missing)
