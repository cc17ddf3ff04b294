"""Draws of all weights: one, many at once, and their low-rank part alone."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import swagjax
from benchmarks.speed import machine, measure, workloads
from benchmarks.speed.figures.setting import Setting, peer_actions
from benchmarks.speed.results import Figure


def sample(setting: Setting) -> Iterator[Figure]:
    """One draw."""
    _, state = workloads.state(setting.workload, setting.rank)
    yield _figure(setting, state, 1, swagjax.sample, jax.random.key(3), None)


def samples(setting: Setting) -> Iterator[Figure]:
    """Many draws in one call, with the ring in float32 and in bfloat16."""
    _, state = workloads.state(setting.workload, setting.rank)
    keys = jax.random.split(jax.random.key(3), setting.samples)
    many = jax.jit(jax.vmap(swagjax.sample, (0, None)))
    ahead = {"lenet5": 1.5, "resnet18": 5.0, "wrn28x10": 5.0}.get(setting.name)
    yield _figure(setting, state, setting.samples, many, keys, ahead)
    half = state._replace(
        deviations=jax.tree.map(lambda d: d.astype(jnp.bfloat16), state.deviations)
    )
    actions = {"ours": measure.timed(many, keys, half), "float32": measure.timed(many, keys, state)}
    seconds = measure.interleave(actions, setting.rounds)
    yield Figure(
        name=f"sample {setting.samples}, bfloat16 ring",
        workload=setting.name,
        ours=seconds["ours"],
        floor=seconds["float32"],
        floor_is="the same with the ring in float32",
    )


def low_rank(setting: Setting) -> Iterator[Figure]:
    """D z2 for many samples: what ``from_noise`` does without a variance and with z1 zero."""
    _, state = workloads.state(setting.workload, setting.rank)
    state = state._replace(variance=None)
    z1 = jax.tree.map(jnp.zeros_like, state.mean)
    z2 = jax.random.normal(jax.random.key(4), (setting.samples, setting.rank))
    many = jax.jit(jax.vmap(swagjax.from_noise, (None, None, 0)))
    size = workloads.parameters(setting.workload)
    actions = {
        "ours": measure.timed(many, state, z1, z2),
        "floor": measure.both(
            machine.moving(setting.rank * size), machine.writing(setting.samples * size)
        ),
    }
    seconds = measure.interleave(actions, setting.rounds)
    yield Figure(
        name=f"low-rank part of {setting.samples}",
        workload=setting.name,
        ours=seconds["ours"],
        floor=seconds["floor"],
        floor_is="K P floats moved in place, S P written to new memory",
        target=1.5,
        details={"parameters": size},
    )


def _figure(
    setting: Setting, state: Any, count: int, draw: Any, keys: Any, ahead: float | None
) -> Figure:
    size = workloads.parameters(setting.workload)
    floor = measure.both(
        machine.drawing(count * size), machine.moving((setting.rank + 2 + count) * size)
    )
    actions = {"ours": measure.timed(draw, keys, state), "floor": floor}
    seconds = measure.interleave(
        actions | peer_actions(setting, "sample", samples=count), setting.rounds
    )
    return Figure(
        name=f"sample {count}",
        workload=setting.name,
        ours=seconds.pop("ours"),
        floor=seconds.pop("floor"),
        floor_is="S P normals drawn, (K + 2 + S) P floats moved in place",
        target=1.5,
        peers=seconds,
        ahead=ahead,
        details={"parameters": size},
    )
