"""Training: all splits, candidates and members side by side, an epoch one compiled program.

All randomness is derived from (member, split, epoch, step), so that a run is the same whatever is
trained beside it, and candidates differ in their hyper-parameters alone.
"""

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import swagjax
from benchmarks import progress
from benchmarks.regression import network
from benchmarks.regression.data import Parts

INIT, TRAIN, PREDICT = range(3)  # what a member is used for


class Plan(NamedTuple):
    """What all runs of a training share: sizes, lengths, and when to collect."""

    hidden: tuple[int, ...]
    batch_size: int
    epochs: int
    start: int
    steps: int
    rank: int
    num_samples: int


class Hyper(NamedTuple):
    """What runs side by side may differ in: numbers, or arrays with one value a run."""

    learning_rate: Any
    weight_decay: Any
    dropout: Any


class Batch(NamedTuple):
    """A minibatch, and how many rows it was drawn from."""

    x: jax.Array
    y: jax.Array
    rows: jax.Array


class Algorithm(NamedTuple):
    """How one run trains; all runs of a training are mapped over it.

    Attributes:
      init: from parameters and hyper-parameters, the state before the first step.
      step: from a key, a state, hyper-parameters and a batch, the next state.
      snapshots: epochs after which the state is set aside.
    """

    init: Callable[[Any, Hyper], Any]
    step: Callable[[jax.Array, Any, Hyper, Batch], Any]
    snapshots: Collection[int] = ()


class Runs(NamedTuple):
    """Which runs stand side by side: arrays with one value a run."""

    split: jax.Array
    member: jax.Array
    hyper: Hyper


class Trained(NamedTuple):
    """Final states ``(runs, ...)``, and those set aside ``(runs, snapshots, ...)``, () for none."""

    state: Any
    snapshots: Any


def runs(candidates: Iterable[tuple[int, Hyper]], members: int) -> Runs:
    """Every member of every candidate, in this order.

    Args:
      candidates: number of a split, and hyper-parameters to train with on it.
      members: networks trained of each, numbered 0, 1, ...
    """
    every = [(split, i, hyper) for split, hyper in candidates for i in range(members)]
    split, member, hypers = zip(*every, strict=True)
    columns = (jnp.array(column, jnp.float32) for column in zip(*hypers, strict=True))
    return Runs(jnp.array(split), jnp.array(member), Hyper(*columns))


def train(
    label: str, algorithm: Algorithm, plan: Plan, parts: Parts, side_by_side: Runs
) -> Trained:
    """Train all runs; ``label`` stands beside the progress bar."""
    params = _networks(side_by_side.member, side_by_side.split, parts.x.shape[-1], plan.hidden)
    first = jax.tree.map(lambda leaf: leaf[0], (params, side_by_side.hyper))
    axes = swagjax.member_axes(jax.eval_shape(algorithm.init, *first))
    state = jax.jit(jax.vmap(algorithm.init, out_axes=axes))(params, side_by_side.hyper)
    epoch_of_all = _epoch(algorithm, plan, side_by_side, axes)
    data = jax.device_put((parts.x, parts.y, parts.rows))
    aside = []
    with progress.bar(label, plan.epochs, "epochs") as show:
        for epoch in range(1, plan.epochs + 1):
            state = epoch_of_all(epoch, state, data)
            if epoch in algorithm.snapshots:
                aside.append(jax.tree.map(jnp.copy, state))  # the next epoch reuses its memory
            jax.block_until_ready(state)
            show(label, epoch)
    snapshots = jax.tree.map(lambda *xs: jnp.stack(xs, 1), *aside) if aside else ()
    return Trained(jax.vmap(lambda x: x, in_axes=(axes,))(state), snapshots)


def key(member: Any, split: Any, purpose: int) -> jax.Array:
    """The random key of a member on a split for one of INIT, TRAIN and PREDICT."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(member), split), purpose)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _networks(members: jax.Array, splits: jax.Array, inputs: int, hidden: tuple[int, ...]) -> Any:
    def of_one(member: Any, split: Any) -> Any:
        return network.init(key(member, split, INIT), inputs, hidden)

    return jax.vmap(of_one)(members, splits)


def _epoch(algorithm: Algorithm, plan: Plan, side_by_side: Runs, axes: Any) -> Callable[..., Any]:
    """One pass over the train rows of every run.

    Candidates of one split and member go through the same batches: to sort their rows costs as
    much as to train on them, and is done once for all.
    """
    pairs = np.stack([side_by_side.split, side_by_side.member], axis=1)
    distinct, which = np.unique(pairs, axis=0, return_inverse=True)

    def of_one(state: Any, run: Any, which: Any, batches: Any, epoch: Any, data: Any) -> Any:
        (split, member, hyper), (x, y, rows) = run, data
        drawn = jax.random.fold_in(key(member, split, TRAIN), epoch)

        def body(state: Any, of_step: Any) -> Any:
            i, batch = of_step
            batch = Batch(x[split, batch], y[split, batch], rows[split])
            return algorithm.step(jax.random.fold_in(drawn, i), state, hyper, batch), None

        return jax.lax.scan(body, state, (jnp.arange(plan.steps), batches[which]))[0]

    @functools.partial(jax.jit, donate_argnums=1)
    def of_all(epoch: Any, state: Any, data: Any) -> Any:
        batches = jax.vmap(lambda pair: _batches(*pair, epoch, plan, data))(distinct)
        mapped = jax.vmap(of_one, in_axes=(axes, 0, 0, None, None, None), out_axes=axes)
        return mapped(state, side_by_side, which, batches, epoch, data)

    return of_all


def _batches(split: Any, member: Any, epoch: Any, plan: Plan, data: Any) -> jax.Array:
    """Rows of every batch ``(steps, batch_size)``, in a random order.

    Batches are full: the rows that are left over (fewer than a batch in the smallest split, others
    in every epoch) wait for the next epoch. Padding comes last in every order, where no batch
    reaches.
    """
    x, _, rows = data
    drawn = jax.random.fold_in(key(member, split, TRAIN), epoch)
    ranks = jax.random.uniform(drawn, x.shape[1:2])
    order = jnp.argsort(jnp.where(jnp.arange(x.shape[1]) < rows[split], ranks, 2.0))
    return order[: plan.steps * plan.batch_size].reshape(plan.steps, plan.batch_size)
