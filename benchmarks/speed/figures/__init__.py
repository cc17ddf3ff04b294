"""The figures of the speed suite: what each measures, on which workloads, in how much memory."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.speed.figures import (
    choosing,
    compiling,
    predicting,
    sampling,
    stepping,
    storing,
    training,
)
from benchmarks.speed.figures.setting import Setting
from benchmarks.speed.results import Figure

_STATES = ("lenet5", "resnet18", "wrn28x10", "transformer")
_NETWORKS = ("lenet5", "preresnet20", "resnet18", "wrn28x10")


class Kind(NamedTuple):
    """A group of figures.

    Attributes:
      measure: yields them.
      workloads: those that it can be measured on, unless others are asked for.
      floats: memory that it takes, in numbers for each parameter; every peer takes as much.
      compared: whether peers are asked for the same.
    """

    measure: Callable[[Setting], Iterator[Figure]]
    workloads: tuple[str, ...]
    floats: Callable[[Setting], float]
    compared: bool = False


KINDS = {
    "idle": Kind(stepping.idle, ("lenet5", "resnet18", "wrn28x10"), lambda s: s.rank + 10),
    "collect": Kind(stepping.collect, _STATES, lambda s: s.rank + 8, True),
    "members": Kind(
        stepping.members, ("lenet5", "resnet18"), lambda s: (stepping.MEMBERS + 1) * (s.rank + 5)
    ),
    "sample": Kind(sampling.sample, _STATES, lambda s: s.rank + 6, True),
    "samples": Kind(sampling.samples, _STATES, lambda s: 1.5 * s.rank + 4 + 1.2 * s.samples, True),
    "low-rank": Kind(sampling.low_rank, _STATES, lambda s: s.rank + 5 + 1.2 * s.samples),
    "predict": Kind(predicting.predict, ("lenet5", "preresnet20"), lambda s: s.rank + 6, True),
    "generators": Kind(choosing.generators, ("lenet5",), lambda s: 0),
    "averaging": Kind(choosing.averaging, ("lenet5",), lambda s: s.rank + 2 * s.samples),
    "axes": Kind(
        choosing.members, ("lenet5", "resnet18"), lambda s: 5 * stepping.MEMBERS * (s.rank + 4)
    ),
    "compile": Kind(compiling.first_call, (*_NETWORKS[:3], "leaves300"), lambda s: 0),
    "memory": Kind(storing.memory, _NETWORKS, lambda s: s.rank + 12),
    "scaling": Kind(storing.scaling, ("lenet5", "resnet18"), lambda s: 2 * s.rank + 20),
    "training": Kind(training.throughput, ("lenet5", "preresnet20"), lambda s: s.rank + 10),
}
