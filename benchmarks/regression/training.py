"""Training: all splits, candidates and members side by side, an epoch one compiled program.

All randomness is derived from (member, split, epoch, step), so that a run is the same whatever is
trained beside it, and candidates differ in their hyper-parameters alone.
"""

import functools
import operator
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
APART = 1.0  # nats, see train_guarded
CONSTANT = 0.5 * np.log(2 * np.pi * np.e)  # NLL of N(0, 1), of standardised targets


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
    collecting: Any = 0.0  # learning rate while iterates are collected, a share of the first


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
      collecting: numbers of the epochs of a second part, after those of the plan, at the learning
        rate ``hyper.collecting``; none where there is one part alone.
    """

    init: Callable[[Any, Hyper], Any]
    step: Callable[[jax.Array, Any, Hyper, Batch], Any]
    snapshots: Collection[int] = ()
    collecting: range = range(0)


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
    label: str,
    algorithm: Algorithm,
    plan: Plan,
    parts: Parts,
    side_by_side: Runs,
    *,
    epochs: range | None = None,
    after: Trained | None = None,
) -> Trained:
    """Train all runs.

    Args:
      label: what stands beside the progress bar.
      algorithm: how a run trains.
      plan: sizes and lengths.
      parts: rows of all splits.
      side_by_side: the runs.
      epochs: numbers of the epochs to train for, by default those of both parts.
      after: the same runs as they stood before these epochs; by default new networks.
    """
    params = _networks(side_by_side.member, side_by_side.split, parts.x.shape[-1], plan.hidden)
    first = jax.tree.map(lambda leaf: leaf[0], (params, side_by_side.hyper))
    axes = swagjax.member_axes(jax.eval_shape(algorithm.init, *first))
    if after is None:
        state = jax.jit(jax.vmap(algorithm.init, out_axes=axes))(params, side_by_side.hyper)
    else:
        is_axis = functools.partial(operator.is_, None)
        state = jax.tree.map(
            lambda a, x: x[0] if a is None else x, axes, after.state, is_leaf=is_axis
        )
    epoch_of_all = _epoch(algorithm, plan, side_by_side, axes)
    data = jax.device_put((parts.x, parts.y, parts.rows))
    mapped = jax.vmap(lambda x: x, in_axes=(axes,))  # with a leading axis in every leaf
    aside = []
    epochs = epochs or range(1, plan.epochs + len(algorithm.collecting) + 1)
    with progress.bar(label, epochs[-1], "epochs") as show:
        for epoch in epochs:
            state = epoch_of_all(epoch, state, data)
            if epoch in algorithm.snapshots:
                aside.append(jax.tree.map(jnp.copy, mapped(state)))  # its memory is reused
            jax.block_until_ready(state)
            show(label, epoch)
    snapshots = jax.tree.map(lambda *xs: jnp.stack(xs, 1), *aside) if aside else ()
    return Trained(mapped(state), snapshots)


def train_guarded(
    label: str, algorithm: Algorithm, plan: Plan, parts: Parts, side_by_side: Runs
) -> tuple[Runs, Trained]:
    """Train, and once more at a lower rate where that failed, by a look at the train rows alone.

    SGD of any kind has failed where its NLL is not below that of a constant prediction; it is
    trained again at a quarter of the learning rate, twice at most. A second part has where an
    iterate was not finite, or the NLL of the averaged weights is above that of the settled ones by
    more than ``APART``; its rate is a quarter of the last each time, and 0 the third time.

    Returns:
      The runs with the rates that were used, and what was trained.
    """

    def first_part(runs: Runs) -> Trained:
        return train(label, algorithm, plan, parts, runs, epochs=range(1, plan.epochs + 1))

    def failed(trained: Trained, runs: Runs) -> jax.Array:
        return ~(_train_nll(trained.state.params, runs.split, parts) < CONSTANT)  # ~: NaN is too

    runs, first = side_by_side, first_part(side_by_side)
    if not hasattr(first.state, "params"):
        return runs, first
    runs, first = _again(first_part, failed, "learning_rate", (1 / 4, 1 / 4), runs, first)
    if not algorithm.collecting:
        return runs, first
    settled = _train_nll(first.state.params, runs.split, parts)

    def second_part(runs: Runs) -> Trained:
        after = jax.tree.map(jnp.copy, first)  # the second part works in its memory
        return train(label, algorithm, plan, parts, runs, epochs=algorithm.collecting, after=after)

    def apart(trained: Trained, runs: Runs) -> jax.Array:
        state = swagjax.get_state(trained.state.opt_state)
        above = _train_nll(state.mean, runs.split, parts) - settled
        return ~(above < APART) | (state.num_skipped > 0)

    lower = "collecting", (1 / 4, 1 / 4, 0.0)
    return _again(second_part, apart, *lower, runs, second_part(runs))


def key(member: Any, split: Any, purpose: int) -> jax.Array:
    """The random key of a member on a split for one of INIT, TRAIN and PREDICT."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(member), split), purpose)


def _again(
    train_part: Callable[[Runs], Trained],
    failed: Callable[[Trained, Runs], jax.Array],
    rate: str,
    factors: Iterable[float],
    runs: Runs,
    trained: Trained,
) -> tuple[Runs, Trained]:
    """Train the runs that failed again, each time with a rate of theirs times a factor."""
    for factor in factors:
        where = failed(trained, runs)
        if not where.any():
            break
        rates = jnp.where(where, factor, 1.0) * getattr(runs.hyper, rate)
        runs = runs._replace(hyper=runs.hyper._replace(**{rate: rates}))
        trained = jax.tree.map(functools.partial(_choose, where), train_part(runs), trained)
    return runs, trained


def _choose(where: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.where(where.reshape(-1, *(1,) * (one.ndim - 1)), one, other)


@jax.jit
def _train_nll(params: Any, splits: jax.Array, parts: Parts) -> jax.Array:
    """NLL of every run on the train rows of its split, in nats of standardised targets."""

    def of_run(run: Any) -> jax.Array:
        params, split = run
        density = network.log_density(params, parts.x[split], parts.y[split])
        real = jnp.arange(len(density)) < parts.rows[split]
        return -jnp.where(real, density, 0).sum() / parts.rows[split]

    return jax.lax.map(of_run, (params, splits))


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
