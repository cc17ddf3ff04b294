"""How networks are trained: SGD of three kinds, variational inference, Langevin dynamics.

Weight decay is on everything that is trained, as in PyTorch's SGD. It is the prior
N(0, 1 / (N * weight decay)) of the two Bayesian ones, N the number of train rows: the loss of SGD
is the mean over rows, so that all algorithms have the same posterior in mind.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from blackjax.vi import meanfield_vi

import swagjax
from benchmarks.regression import network
from benchmarks.regression.training import Algorithm, Batch, Hyper, Plan
from swagjax import schedules

MOMENTUM = 0.9
LEAST = 0.01  # learning rate at the end of a decayed run, a share of the first
FIRST_LOG_STD = -4.0  # of the weights of mean-field VI


class Descent(NamedTuple):
    """State of an optimizer of optax."""

    params: Any
    opt_state: Any


def averaged_sgd(plan: Plan) -> Algorithm:
    """SGD at a constant step size, one iterate collected an epoch."""

    def optimizer(hyper: Hyper) -> optax.GradientTransformation:
        collect = swagjax.swag(plan.rank, start=plan.start * plan.steps, every=plan.steps)
        return optax.chain(*_sgd(hyper, lambda step: hyper.learning_rate), collect)

    return _descent(optimizer, _mean_loss)


def settled_sgd(plan: Plan) -> Algorithm:
    """The run of ``decayed_sgd``, and a second part of a quarter of its length to collect from.

    Its learning rate rises in its first fifth, in which nothing is collected, from where the first
    part ended to the share ``hyper.collecting`` of where that began, and stays there.
    """
    collecting = range(plan.epochs + 1, plan.epochs + max(plan.epochs // 4, 8) + 1)
    settled, rise = plan.epochs * plan.steps, max(len(collecting) // 5, 1) * plan.steps

    def optimizer(hyper: Hyper) -> optax.GradientTransformation:
        rates = hyper.learning_rate, hyper.learning_rate * hyper.collecting
        schedule = schedules.collecting_schedule(*rates, settled, rise, settled=LEAST)
        collect = swagjax.swag(plan.rank, start=settled + rise, every=plan.steps)
        return optax.chain(*_sgd(hyper, schedule), collect)

    return _descent(optimizer, _mean_loss)._replace(collecting=collecting)


def decayed_sgd(plan: Plan) -> Algorithm:
    """SGD whose step size falls linearly to a hundredth in the second half of the run."""
    return _descent(_decayed(plan), _mean_loss)


def dropout_sgd(plan: Plan) -> Algorithm:
    """The same with dropout on the hidden units."""

    def loss(params: Any, key: jax.Array, hyper: Hyper, batch: Batch) -> jax.Array:
        def drop(layer: int, h: jax.Array) -> jax.Array:
            left = jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - hyper.dropout, h.shape)
            return h * left / (1 - hyper.dropout)

        return -network.log_density(params, batch.x, batch.y, drop=drop).mean()

    return _descent(_decayed(plan), loss)


def mean_field(plan: Plan) -> Algorithm:
    """Mean-field variational inference by Adam, one sample of the weights a step.

    The step size falls as that of ``decayed_sgd``: gradients from one sample never calm down.
    """
    factor = _fall(plan)

    def optimizer(hyper: Hyper) -> optax.GradientTransformation:
        return optax.adam(lambda step: hyper.learning_rate * factor(step))

    def init(params: Any, hyper: Hyper) -> Any:
        # blackjax starts at zero, where a network with hidden units has no gradient.
        rho = jax.tree.map(lambda x: jnp.full_like(x, FIRST_LOG_STD), params)
        return meanfield_vi.MFVIState(params, rho, optimizer(hyper).init((params, rho)))

    def step(key: jax.Array, state: Any, hyper: Hyper, batch: Batch) -> Any:
        def density(params: Any) -> jax.Array:
            return _log_posterior(params, hyper, batch)

        return meanfield_vi.step(key, state, density, optimizer(hyper), num_samples=1)[0]

    return Algorithm(init, step)


def langevin(plan: Plan) -> Algorithm:
    """Stochastic gradient Langevin dynamics at a constant step size.

    The step is learning rate / (1 - momentum) / N on the log posterior: the drift of SGD with
    momentum at this learning rate. Iterates are kept at even distances after ``plan.start``.
    """

    def init(params: Any, hyper: Hyper) -> Any:
        return params

    def step(key: jax.Array, params: Any, hyper: Hyper, batch: Batch) -> Any:
        def gradient(params: Any, batch: Batch) -> Any:
            return jax.grad(_log_posterior)(params, hyper, batch)

        size = hyper.learning_rate / (1 - MOMENTUM) / batch.rows
        return blackjax.sgld(gradient).step(key, params, batch, size)

    kept = np.linspace(plan.start, plan.epochs, plan.num_samples + 1)[1:].round().astype(int)
    return Algorithm(init, step, frozenset(kept.tolist()))


def _descent(optimizer: Callable[[Hyper], Any], loss: Callable[..., jax.Array]) -> Algorithm:
    def init(params: Any, hyper: Hyper) -> Descent:
        return Descent(params, optimizer(hyper).init(params))

    def step(key: jax.Array, state: Descent, hyper: Hyper, batch: Batch) -> Descent:
        grads = jax.grad(loss)(state.params, key, hyper, batch)
        updates, opt_state = optimizer(hyper).update(grads, state.opt_state, state.params)
        return Descent(optax.apply_updates(state.params, updates), opt_state)

    return Algorithm(init, step)


def _sgd(hyper: Hyper, schedule: optax.Schedule) -> tuple[optax.GradientTransformation, ...]:
    return optax.add_decayed_weights(hyper.weight_decay), optax.sgd(schedule, momentum=MOMENTUM)


def _fall(plan: Plan) -> optax.Schedule:
    """Factor of the step size: 1 in the first half of the run, ``LEAST`` from nine tenths on."""
    return schedules.swa_schedule(1.0, LEAST, plan.epochs * plan.steps)


def _decayed(plan: Plan) -> Callable[[Hyper], optax.GradientTransformation]:
    factor = _fall(plan)
    return lambda hyper: optax.chain(*_sgd(hyper, lambda step: hyper.learning_rate * factor(step)))


def _mean_loss(params: Any, key: jax.Array, hyper: Hyper, batch: Batch) -> jax.Array:
    return -network.log_density(params, batch.x, batch.y).mean()


def _log_posterior(params: Any, hyper: Hyper, batch: Batch) -> jax.Array:
    """Estimated from a batch: N (mean log density - weight decay / 2 |params|^2)."""
    decay = 0.5 * hyper.weight_decay * optax.tree.norm(params, squared=True)
    return batch.rows * (network.log_density(params, batch.x, batch.y).mean() - decay)
