"""Training as the experiments do it, beside a bare loop over the same steps."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import data, methods, options
from benchmarks import training as experiments
from benchmarks.experiments import classify
from benchmarks.speed import measure
from benchmarks.speed.figures import stepping
from benchmarks.speed.figures.setting import Setting
from benchmarks.speed.results import Figure
from benchmarks.speed.workloads import IMAGE

_STEPS = 8  # of an epoch


def throughput(setting: Setting) -> Iterator[Figure]:
    """An epoch of ``benchmarks.training``, with and without its augmentation."""
    batch = setting.workload.batch
    count = _STEPS * batch
    rng = np.random.default_rng(0)
    part = data.Part(
        rng.normal(size=(count, *IMAGE)).astype(np.float32), np.arange(count, dtype=np.int32) % 10
    )
    actions = {
        "ours": _epoch(setting, part, ("shift", "flip")),
        "unaugmented": _epoch(setting, part, ()),
        "bare": _bare(setting, part),
    }
    seconds = measure.interleave(actions, setting.rounds)
    for name, key in (("train epoch", "ours"), ("train epoch, no augmentation", "unaugmented")):
        yield Figure(
            name=name,
            workload=setting.name,
            ours=seconds[key],
            floor=seconds["bare"],
            floor_is="the same steps in a bare loop: batches cut before, no augmentation, no swag",
            details={
                "images_per_second": count / float(np.median(seconds[key])),
                "bare_images_per_second": count / float(np.median(seconds["bare"])),
                "batch": batch,
            },
        )


def _epoch(setting: Setting, part: data.Part, augment: tuple[str, ...]) -> measure.Action:
    """An epoch of one member, collected from at its end."""
    chosen = options.complete(classify.Classify(seeds=1), classify.OTHERS)
    chosen = dataclasses.replace(
        chosen, batch_size=setting.workload.batch, rank=setting.rank, augment=augment, start=1
    )
    tx, model = methods.averaged_sgd(chosen, _STEPS), setting.workload.model
    run = experiments.runner(model, tx, part, chosen, _STEPS)
    member = experiments.initialiser(model, tx, part.images[:1])(jax.random.key(0))
    return measure.carried(lambda members: run(2, members)[0], [member])


def _bare(setting: Setting, part: data.Part) -> measure.Action:
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9))
    step = stepping.training_step(setting.workload, tx)
    cut = [np.split(array, _STEPS) for array in part]
    batches = jax.device_put(list(zip(*cut, strict=True)))

    def epoch(carry: Any) -> Any:
        for x, y in batches:
            carry = step(carry, x, y)
        return carry

    return measure.carried(epoch, stepping.first_carry(setting.workload, tx))
