"""What SWAG costs in training: steps that do not collect, and steps that do."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import swagjax
from benchmarks.speed import machine, measure, programs, workloads
from benchmarks.speed.figures.setting import Setting, peer_actions
from benchmarks.speed.results import Figure
from benchmarks.speed.workloads import Workload

MEMBERS = 4
_TIMES = 30  # collections in one program
_PAIRS = 5  # of steps in a round, for a difference of two per cent
_NEVER = 1 << 30  # no step of a figure gets there
_TABLE = 128  # bytes for each leaf: the branch's own table of buffers


def idle(setting: Setting) -> Iterator[Figure]:
    """A train step with SWAG that does not collect, beside the same step without SWAG."""
    sgd = optax.sgd(1e-4, momentum=0.9)
    with_swag = optax.chain(sgd, swagjax.swag(setting.rank, start=_NEVER))
    data = workloads.images(setting.workload.batch), jnp.arange(setting.workload.batch) % 10
    actions, temporary = {}, {}
    for name, tx in {"ours": with_swag, "plain": sgd}.items():
        step, carry = training_step(setting.workload, tx), first_carry(setting.workload, tx)
        temporary[name] = programs.temporary_bytes(step.lower(carry, *data).compile())
        actions[name] = measure.carried(step, carry, *data)
    extra, leaves = temporary["ours"] - temporary["plain"], len(jax.tree.leaves(carry[0]))
    seconds = measure.interleave(actions, _PAIRS * setting.rounds, pause=0)
    yield Figure(
        name="idle step",
        workload=setting.name,
        ours=seconds["ours"],
        floor=seconds["plain"],
        floor_is="the same step without swag",
        target=1.02,
        checks={
            "no temporary array beyond the plain step's": extra < _TABLE * leaves,
        },
        details={"temporary_bytes": temporary, "batch": setting.workload.batch},
    )


def collect(setting: Setting) -> Iterator[Figure]:
    """The end of a train step that collects, beside the numbers that the collection moves.

    As a program of its own; and, as in a train step, inside one that has been launched already.
    """
    step = workloads.collector(swagjax.swag(setting.rank))
    carry = workloads.state(setting.workload, setting.rank)
    inside = measure.carried(_many(step), jax.tree.map(jnp.copy, carry), _small(carry[0]))
    updates = _small(carry[0])
    size = workloads.parameters(setting.workload)
    temporary = programs.temporary_bytes(step.lower(carry, updates).compile())
    actions = {
        "launch": _launch(carry),
        "called": measure.carried(step, carry, updates),
        "inside": measure.scaled(inside, 1 / _TIMES),
        "floor": machine.moving(9 * size),
    }
    seconds = measure.interleave(actions | peer_actions(setting, "collect"), setting.rounds)
    launch, floor = measure.summary(seconds.pop("launch")), seconds.pop("floor")
    ours = {"collect": seconds.pop("called"), "collect, in a loop": seconds.pop("inside")}
    for name, values in ours.items():
        yield Figure(
            name=name,
            workload=setting.name,
            ours=values,
            floor=floor,
            floor_is="9 P floats moved in place; ours writes the new parameters as well",
            target=1.3,
            peers=seconds,
            ahead=20 if setting.name == "resnet18" else 1,
            checks={"no copy of the parameters": temporary < machine.FLOAT * size / 2},
            details={"temporary_bytes": temporary, "parameters": size, "launch": launch},
        )


def members(setting: Setting) -> Iterator[Figure]:
    """The same for four members side by side, beside four times that of one."""
    tx = swagjax.swag(setting.rank)
    carry = workloads.state(setting.workload, setting.rank)
    axes = jax.tree.map(lambda _: 0, carry[0]), swagjax.member_axes(carry[1])
    stacked = jax.tree.map(_repeat, axes, carry, is_leaf=lambda axis: axis is None)
    step = workloads.collector(tx)
    step_all = jax.jit(jax.vmap(step, in_axes=(axes, 0), out_axes=axes), donate_argnums=0)
    one, four = _small(carry[0]), _small(stacked[0])
    compiled = step_all.lower(stacked, four).compile()
    ring = sum(x.nbytes for x in jax.tree.leaves(stacked[1].deviations))
    leaf = max(x.nbytes for x in jax.tree.leaves(stacked[1].deviations))
    temporary = programs.temporary_bytes(compiled)
    actions = {
        "ours": measure.carried(step_all, stacked, four),
        "single": measure.scaled(measure.carried(step, carry, one), MEMBERS),
    }
    seconds = measure.interleave(actions, setting.rounds)
    yield Figure(
        name=f"collect, {MEMBERS} members",
        workload=setting.name,
        ours=seconds["ours"],
        floor=seconds["single"],
        floor_is=f"{MEMBERS} times one member's collection",
        target=1.2,
        checks={
            "no selection over the ring": programs.largest_result(compiled, "select") < leaf,
            "no copy of the ring": temporary < ring / 2,
        },
        details={"temporary_bytes": temporary},
    )


def training_step(workload: Workload, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """A donated step ``(carry, images, labels) -> carry``: forward, backward, update."""

    def loss(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": stats}
        logits, new = workload.model.apply(variables, x, train=True, mutable=["batch_stats"])
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return entropy, new.get("batch_stats", {})

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        params, stats, opt_state = carry
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    return step


def first_carry(workload: Workload, tx: optax.GradientTransformation) -> Any:
    """What the first step takes: parameters, BatchNorm statistics, state of the optimizer."""
    params = workloads.random_params(workload)
    return params, workloads.batch_stats(workload), jax.jit(tx.init)(params)


def _many(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step ``_TIMES`` times over in one program: without what a launch costs."""

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(carry: Any, updates: Any) -> Any:
        return jax.lax.fori_loop(0, _TIMES, lambda _, carry: step(carry, updates), carry)

    return steps


def _launch(carry: Any) -> measure.Action:
    """A step on as many arrays, of one number each: what any call of that many costs."""
    first = jax.tree.map(lambda x: x.reshape(-1)[:1].reshape((1,) * x.ndim), carry)
    step = functools.partial(jax.jit, donate_argnums=0)(lambda carry, updates: carry)
    return measure.carried(step, first, _small(first[0]))


def _small(params: Any) -> Any:
    return jax.tree.map(lambda p: 1e-5 * p, params)


def _repeat(axis: int | None, x: jax.Array) -> jax.Array:
    return jnp.copy(x) if axis is None else jnp.stack([x] * MEMBERS)
