"""Bayesian model averaging, beside as many plain passes of the network."""

from collections.abc import Iterator
from typing import Any

import jax

import swagjax
from benchmarks.speed import measure, workloads
from benchmarks.speed.command import BATCH
from benchmarks.speed.figures.setting import Setting, peer_actions
from benchmarks.speed.results import Figure
from swagjax import batch_stats


def predict(setting: Setting) -> Iterator[Figure]:
    """Averaged probabilities; with BatchNorm, statistics recomputed for every sample."""
    key, x = jax.random.key(5), workloads.images(setting.images)
    params, state = workloads.state(setting.workload, setting.rank)
    prob_fn, how = workloads.probabilities(setting.workload), refreshing(setting)

    def average() -> jax.Array:
        return swagjax.predict(key, state, prob_fn, x, num_samples=setting.samples, **how)

    actions = {
        "ours": measure.timed(average),
        "floor": measure.scaled(passes(setting, params, x), setting.samples),
    } | peer_actions(
        setting,
        "predict",
        samples=setting.samples,
        images=setting.images,
        refresh=setting.refresh if how else 0,
        batch=BATCH,
    )
    seconds = measure.interleave(actions, setting.rounds)
    yield Figure(
        name=f"predict {setting.samples}" + (", statistics refreshed" if how else ""),
        workload=setting.name,
        ours=seconds.pop("ours"),
        floor=seconds.pop("floor"),
        floor_is="S passes over the images" + (" and S over the training images" if how else ""),
        target=1.05,
        peers=seconds,
        ahead=1.0,
        details={"images": setting.images, "refresh": setting.refresh if how else 0},
    )


def refreshing(setting: Setting) -> dict[str, Any]:
    """The keyword of ``predict`` for a network with BatchNorm."""
    if not setting.workload.batch_stats:
        return {}
    refresh = batch_stats.linen(
        setting.workload.model,
        workloads.batch_stats(setting.workload),
        workloads.images(setting.refresh),
        batch_size=BATCH,
        train=True,
    )
    return {"refresh": refresh}


def passes(setting: Setting, params: Any, x: jax.Array) -> measure.Action:
    """One pass over the images and, with BatchNorm, one in training mode over training images.

    The latter batch by batch, each of them a compiled call: as fast as a loop of Python can.
    """
    prob_fn = jax.jit(workloads.probabilities(setting.workload))
    forward = measure.timed(prob_fn, params, x, *_stats(setting))
    if not setting.workload.batch_stats:
        return forward
    model, variables = setting.workload.model, {"params": params, "batch_stats": _stats(setting)[0]}

    @jax.jit
    def train_pass(variables: Any, x: jax.Array) -> Any:
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[1]

    batch = measure.timed(train_pass, variables, workloads.images(BATCH))
    return measure.both(forward, measure.scaled(batch, setting.refresh / BATCH))


def _stats(setting: Setting) -> tuple[Any, ...]:
    stats = workloads.batch_stats(setting.workload)
    return (stats,) if stats else ()
