"""How networks are trained: SGD of three kinds, Langevin dynamics, cycles of the learning rate.

All cost the same epochs and, but for SGD that decays to the end, are one SGD run until ``start``:
a constant learning rate, then a line down to the one that they collect at. Weight decay is on
everything that is trained, as in the authors' code; the loss being a mean over N training inputs,
it is the prior N(0, 1 / (N * weight decay)) of Langevin dynamics.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import swagjax
from benchmarks.options import Training, UsageError
from swagjax import schedules

MOMENTUM = 0.9
LOWEST = 0.05  # learning rate at the minima of a cycle, as a share of that at its maxima


class Algorithm(NamedTuple):
    """How one network trains.

    Attributes:
      optimizer: what takes a ``key`` beside the gradients, as Langevin dynamics does, is given one.
      rate: the learning rate of a step, for the log.
      dropout: whether the network's dropout is on.
    """

    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    dropout: bool = False


Recipe = Callable[[Training, int], Algorithm]  # of the options and the number of training inputs


class Turns(NamedTuple):
    """State of two optimizers that take turns."""

    step: jax.Array
    first: Any
    second: Any


def decayed_sgd(options: Training, rows: int) -> Algorithm:
    """Plain SGD, its learning rate decayed to a hundredth over the full run."""
    end = options.epochs * steps(options, rows)
    rate = schedules.swa_schedule(options.learning_rate, 0.01 * options.learning_rate, end)
    return Algorithm(optax.chain(*_sgd(options, rate)), rate)


def averaged_sgd(options: Training, rows: int) -> Algorithm:
    """SGD that settles at a constant learning rate, iterates collected at even distances."""
    start, every = _start(options, rows), steps(options, rows) // options.collections
    rate = _settling(options, rows)
    collect = swagjax.swag(options.rank, start=start, every=every)
    return Algorithm(optax.chain(*_sgd(options, rate), collect), rate)


def averaged_dropout(options: Training, rows: int) -> Algorithm:
    """The same with dropout."""
    return averaged_sgd(options, rows)._replace(dropout=True)


def langevin(options: Training, rows: int) -> Algorithm:
    """SGD until ``start``, and from there stochastic gradient Langevin dynamics.

    With N inputs, U = N (mean loss + weight decay / 2 |theta|^2) and the step e = learning rate /
    (1 - momentum) / N, the drift of SGD with momentum: theta <- theta - e grad U + sqrt(2 e T) z.
    Iterates are kept at even distances, the last of all among them.

    Source: Welling and Teh (2011), "Bayesian Learning via Stochastic Gradient Langevin Dynamics",
    equation 4, at a constant step.
    """
    start, end = _start(options, rows), options.epochs * steps(options, rows)
    rate = _settling(options, rows)
    drift = options.swa_learning_rate / (1 - MOMENTUM)
    noise = math.sqrt(2 * drift * options.temperature / rows)
    dynamics = optax.chain(optax.add_decayed_weights(options.weight_decay), _noisy(drift, noise))
    every = max(1, (end - start) // options.snapshots)
    first = max(start, end - every * options.snapshots)
    collect = swagjax.swag(options.snapshots, start=first, every=every)
    return Algorithm(
        optax.chain(_turns(optax.chain(*_sgd(options, rate)), dynamics, start), collect), rate
    )


def cycled_sgd(options: Training, rows: int) -> Algorithm:
    """SGD until ``start``, and from there cycles of the learning rate; its minima are kept.

    A fast geometric ensemble. The cycles are as long as fit, and fall from the learning rate at
    which SWAG collects to a twentieth of it, as from 0.01 to 0.0005 in the authors' runs of VGG16.
    """
    start, end = _start(options, rows), options.epochs * steps(options, rows)
    cycle = 2 * ((end - start) // (2 * options.cycles))
    if cycle < 2:
        raise UsageError(
            f"--cycles {options.cycles}: two steps each at the least, and after --start there are "
            f"{end - start}"
        )
    highest = options.swa_learning_rate
    cycles = schedules.cyclical_schedule(highest, LOWEST * highest, cycle)
    rate = optax.join_schedules([_settling(options, rows), cycles], [start])
    collect = swagjax.swag(options.cycles, when=schedules.at_minimum(cycle, start=start))
    return Algorithm(optax.chain(*_sgd(options, rate), collect), rate)


def steps(options: Training, rows: int) -> int:
    """Full batches in an epoch; the inputs left over wait for the next."""
    return rows // options.batch_size


def _start(options: Training, rows: int) -> int:
    return options.start * steps(options, rows)


def _settling(options: Training, rows: int) -> optax.Schedule:
    rates = options.learning_rate, options.swa_learning_rate
    return schedules.swa_schedule(*rates, _start(options, rows))


def _sgd(options: Training, rate: optax.Schedule) -> tuple[optax.GradientTransformation, ...]:
    return optax.add_decayed_weights(options.weight_decay), optax.sgd(rate, momentum=MOMENTUM)


def _noisy(drift: float, noise: float) -> optax.GradientTransformationExtraArgs:
    """Steps down the gradient of size ``drift`` with normal noise of this standard deviation."""

    def update(grads: Any, state: Any, params: Any = None, *, key: jax.Array, **_: Any) -> Any:
        drawn = optax.tree.random_like(key, grads, sampler=jax.random.normal)
        return jax.tree.map(lambda g, z: noise * z - drift * g, grads, drawn), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _turns(
    first: optax.GradientTransformation, second: optax.GradientTransformation, start: int
) -> optax.GradientTransformationExtraArgs:
    """The first optimizer for ``start`` steps, and then the second."""
    both = [optax.with_extra_args_support(each) for each in (first, second)]

    def init(params: Any) -> Turns:
        return Turns(jnp.zeros((), jnp.int32), *(each.init(params) for each in both))

    def update(grads: Any, state: Turns, params: Any = None, **extra: Any) -> Any:
        def of_first() -> Any:
            updates, new = both[0].update(grads, state.first, params, **extra)
            return updates, state._replace(step=state.step + 1, first=new)

        def of_second() -> Any:
            updates, new = both[1].update(grads, state.second, params, **extra)
            return updates, state._replace(step=state.step + 1, second=new)

        return jax.lax.cond(state.step < start, of_first, of_second)

    return optax.GradientTransformationExtraArgs(init, update)
