"""The parts of the job, in the order in which they are worth their minutes.

A new part is a module with ``run(job)`` and one entry here; ``setting``, where it trains, is what
the plan is counted from.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.gpu.job import Job
from benchmarks.gpu.parts import check, ood, preresnet, rotation, surface, vgg16


class Part(NamedTuple):
    """One part of the job.

    Attributes:
      run: does it.
      setting: of whether it is a rehearsal, what it trains; None where it trains nothing.
      seconds: of its time box, unless others are given.
    """

    run: Callable[[Job], None]
    setting: Callable[[bool], Any] | None
    seconds: float = 480.0


def _preresnet(blocks: int) -> Part:
    of = {"blocks": blocks}
    run, setting = (
        functools.partial(preresnet.run, **of),
        functools.partial(preresnet.setting, **of),
    )
    return Part(run, setting)


PARTS = {
    "check": Part(check.run, None, seconds=150.0),
    "vgg16": Part(vgg16.run, vgg16.setting),
    "ood": Part(ood.run, ood.setting),
    "preresnet20": _preresnet(3),
    "preresnet56": _preresnet(9),
    "surface": Part(surface.run, surface.setting),
    "rotation": Part(rotation.run, rotation.setting),
}
