"""What the library chose beside what it could have chosen.

The choice is our time, the other one the floor: a ratio below one speaks for the choice.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import swagjax
from benchmarks.speed import measure, workloads
from benchmarks.speed.figures import stepping
from benchmarks.speed.figures.setting import Setting
from benchmarks.speed.results import Figure
from swagjax import prng

_NORMALS = 1 << 24
_HIDDEN = 50  # units of the network of the UCI regressions


def generators(setting: Setting) -> Iterator[Figure]:
    """The unrolled threefry of ``sample`` beside the generators of JAX."""
    keys = {name: jax.random.key(0, impl=name) for name in ("threefry2x32", "rbg")}
    draws = {name: jax.jit(lambda key: jax.random.normal(key, (_NORMALS,))) for name in keys}
    unrolled = jax.jit(lambda key: prng.normal(key, (_NORMALS,), jnp.float32))
    actions = {name: measure.timed(draws[name], key) for name, key in keys.items()}
    actions["ours"] = measure.timed(unrolled, keys["threefry2x32"])
    seconds = measure.interleave(actions, setting.rounds)
    for name in keys:
        yield _against(f"normals: unrolled, not {name}", "2^24 numbers", seconds, "ours", name)


def averaging(setting: Setting) -> Iterator[Figure]:
    """Samples one after another beside all side by side, for convolutions and for dense layers."""
    _, state = workloads.state(setting.workload, setting.rank)
    prob_fn, x = workloads.probabilities(setting.workload), workloads.images(setting.images)
    yield from _averaging(setting, setting.name, state, prob_fn, x)
    params = {"in": jnp.zeros((13, _HIDDEN)), "out": jnp.zeros((_HIDDEN, 2))}
    tx = swagjax.swag(setting.rank)
    state = tx.update(params, tx.init(params), params)[1]
    x = jax.random.normal(jax.random.key(6), (setting.images, 13))
    yield from _averaging(setting, "one hidden layer", state, _dense, x)


def members(setting: Setting) -> Iterator[Figure]:
    """Members side by side that do not collect, with ``member_axes`` and with the step mapped."""
    size = stepping.MEMBERS
    tx = swagjax.swag(setting.rank, start=1 << 30)
    params = workloads.random_params(setting.workload)
    state = jax.eval_shape(tx.init, params)
    axes = {"ours": swagjax.member_axes(state), "mapped": jax.tree.map(lambda _: 0, state)}
    many = jax.tree.map(lambda p: jnp.stack([p] * size), params)
    updates = jax.tree.map(lambda p: 1e-5 * p, many)
    actions = {}
    for name, axis in axes.items():
        carry = many, jax.vmap(tx.init, out_axes=axis)(many)
        step = jax.vmap(workloads.collector(tx), in_axes=((0, axis), 0), out_axes=(0, axis))
        carry = jax.tree.map(jnp.copy, carry)
        actions[name] = measure.carried(jax.jit(step, donate_argnums=0), carry, updates)
    seconds = measure.interleave(actions, setting.rounds)
    name = f"{size} idle members: step shared, not mapped"
    yield _against(name, setting.name, seconds, "ours", "mapped")


def _averaging(
    setting: Setting, workload: str, state: Any, prob_fn: Any, x: jax.Array
) -> Iterator[Figure]:
    key, samples = jax.random.key(5), setting.samples + setting.samples % 2

    def action(**options: Any) -> measure.Action:
        return measure.timed(
            lambda: swagjax.predict(key, state, prob_fn, x, num_samples=samples, **options)
        )

    actions = {
        "default": action(),
        "all": action(chunk_size=samples),
        "antithetic": action(antithetic=True),
    }
    seconds = measure.interleave(actions, setting.rounds)
    name = f"predict {samples}"
    yield _against(f"{name}: default, not side by side", workload, seconds, "default", "all")
    yield _against(f"{name}: antithetic, not default", workload, seconds, "antithetic", "default")


def _dense(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(jax.nn.relu(x @ params["in"]) @ params["out"])


def _against(
    name: str, workload: str, seconds: dict[str, list[float]], choice: str, other: str
) -> Figure:
    return Figure(
        name=name,
        workload=workload,
        ours=seconds[choice],
        floor=seconds[other],
        floor_is="the other choice",
    )
