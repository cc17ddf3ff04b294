"""Training as the experiments do it, beside a bare loop over the same steps."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.speed import measure
from benchmarks.speed.figures import stepping
from benchmarks.speed.figures.setting import Setting
from benchmarks.speed.results import Figure
from benchmarks.speed.workloads import IMAGE

_STEPS = 8  # of an epoch
RATES = (0.05, 0.01, 5e-4)  # learning rate, that while iterates are collected, weight decay


def throughput(setting: Setting) -> Iterator[Figure]:
    """An epoch of ``benchmarks.training``, with and without its augmentation."""
    from benchmarks import data

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


def _epoch(setting: Setting, part: Any, augment: tuple[str, ...]) -> measure.Action:
    """An epoch of one member, collected from at its end."""
    from benchmarks import algorithms, options  # here, as what they need no other figure does
    from benchmarks import training as experiments

    rates = dict(zip(("learning_rate", "swa_learning_rate", "weight_decay"), RATES, strict=True))
    chosen = options.Training(
        seeds=1,
        epochs=3,
        start=1,
        collections=1,
        batch_size=setting.workload.batch,
        augment=augment,
        rank=setting.rank,
        **rates,
    )
    model, algorithm = setting.workload.model, algorithms.averaged_sgd(chosen, len(part.labels))
    run = experiments.runner(model, algorithm, part, chosen)
    network = experiments.initialiser(model, algorithm, part.inputs[:1])(jax.random.key(0))
    return measure.carried(lambda networks: run(2, networks)[0], [network])


def _bare(setting: Setting, part: Any) -> measure.Action:
    tx = optax.chain(optax.add_decayed_weights(RATES[2]), optax.sgd(RATES[1], momentum=0.9))
    step = stepping.training_step(setting.workload, tx)
    cut = [np.split(array, _STEPS) for array in part]
    batches = jax.device_put(list(zip(*cut, strict=True)))

    def epoch(carry: Any) -> Any:
        for x, y in batches:
            carry = step(carry, x, y)
        return carry

    return measure.carried(epoch, stepping.first_carry(setting.workload, tx))
