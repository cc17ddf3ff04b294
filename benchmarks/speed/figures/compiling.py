"""What the first call costs: tracing and compiling."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import swagjax
from benchmarks.speed import workloads
from benchmarks.speed.figures import predicting, stepping
from benchmarks.speed.figures.setting import Setting
from benchmarks.speed.results import Figure

_LIMIT = 10.0  # seconds, for a tree of 300 leaves on a machine that does nothing else
_PLAIN = {
    "step": "the same step without swag",
    "predict": "one pass of the network",
    "sample": "a sample that draws and combines leaf by leaf",
}


def first_call(setting: Setting) -> Iterator[Figure]:
    """Seconds to compile a train step, a collection, a sample and a prediction."""
    plain = _plain_programs(setting)
    for name, lower in _programs(setting).items():
        rounds = range(1 if setting.workload.model is None else min(3, setting.rounds))
        seconds = [_compile(lower) for _ in rounds]
        yield Figure(
            name=f"compile {name}",
            workload=setting.name,
            ours=seconds,
            floor=[_compile(plain[name]) for _ in rounds] if name in plain else [],
            floor_is=_PLAIN.get(name, "") if name in plain else "",
            checks={f"within {_LIMIT:g} s": max(seconds) < _LIMIT},
        )


def _compile(lower: Callable[[], Any]) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    lower().compile()
    return time.perf_counter() - start


def _programs(setting: Setting) -> dict[str, Callable[[], Any]]:
    """For each program a function that traces it on shapes alone."""
    tx, shapes = swagjax.swag(setting.rank), setting.workload.shapes
    state = jax.eval_shape(tx.init, shapes)
    key = jax.eval_shape(lambda: jax.random.key(0))
    collect, many = workloads.collector(tx), jax.vmap(swagjax.sample, (0, None))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), setting.samples))
    lowered = {
        "collect": lambda: collect.lower((shapes, state), shapes),
        "sample": lambda: jax.jit(swagjax.sample).lower(key, state),
        f"sample {setting.samples}": lambda: jax.jit(many).lower(keys, state),
    }
    if setting.workload.model is None:
        return lowered
    chain = optax.chain(optax.sgd(0.1, momentum=0.9), tx)
    prob_fn, x = workloads.probabilities(setting.workload), _images(setting)
    how = predicting.refreshing(setting)

    def predict(key: Any, state: Any, x: Any) -> jax.Array:
        return swagjax.predict(key, state, prob_fn, x, num_samples=setting.samples, **how)

    return lowered | {
        "step": functools.partial(_lower_step, setting, chain),
        "predict": lambda: jax.jit(predict).lower(key, state, x),
    }


def _plain_programs(setting: Setting) -> dict[str, Callable[[], Any]]:
    """What some of the programs are set beside."""
    shapes = setting.workload.shapes
    if setting.workload.model is None:
        state = jax.eval_shape(swagjax.swag(setting.rank).init, shapes)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return {"sample": lambda: jax.jit(_sample_by_leaf).lower(key, state)}
    prob_fn = workloads.probabilities(setting.workload)
    stats = (setting.workload.batch_stats,) if setting.workload.batch_stats else ()
    return {
        "step": functools.partial(_lower_step, setting, optax.sgd(0.1, momentum=0.9)),
        "predict": lambda: jax.jit(prob_fn).lower(shapes, _images(setting), *stats),
    }


def _sample_by_leaf(key: jax.Array, state: swagjax.SWAGState) -> Any:
    """The formula of the paper leaf by leaf, with the generator of JAX."""
    leaves, treedef = jax.tree.flatten(state.mean)
    key2, *keys = jax.random.split(key, len(leaves) + 1)
    rank = len(jax.tree.leaves(state.deviations)[0])
    z2 = jax.random.normal(key2, (rank,)) / (2 * (rank - 1)) ** 0.5

    def draw(key: jax.Array, m: jax.Array, v: jax.Array, d: jax.Array) -> jax.Array:
        return m + jnp.sqrt(v / 2) * jax.random.normal(key, m.shape) + jnp.tensordot(z2, d, 1)

    keys = jax.tree.unflatten(treedef, keys)
    return jax.tree.map(draw, keys, state.mean, state.variance, state.deviations)


def _lower_step(setting: Setting, tx: optax.GradientTransformation) -> Any:
    workload = setting.workload
    step = stepping.training_step(workload, tx)
    opt_state = jax.eval_shape(tx.init, workload.shapes)
    x = jax.ShapeDtypeStruct((workload.batch, *workloads.IMAGE), jnp.float32)
    y = jax.ShapeDtypeStruct((workload.batch,), jnp.int32)
    return step.lower((workload.shapes, workload.batch_stats, opt_state), x, y)


def _images(setting: Setting) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((setting.images, *workloads.IMAGE), jnp.float32)
