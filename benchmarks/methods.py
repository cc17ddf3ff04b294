"""The methods that are compared: how each trains, what it keeps, how it predicts."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import optax
from flax import linen as nn

import swagjax
from benchmarks.options import Training
from benchmarks.training import Member, Optimizer
from swagjax import batch_stats, schedules


class Method(NamedTuple):
    """One row of the table.

    Attributes:
      optimizer: how it trains; methods with the same optimizer share one training.
      posterior: what it keeps of a trained member: a SWAG state, or a function of a key.
      point: whether that is a single point, for which one sample is enough.
      refresh: whether BatchNorm statistics are recomputed for every sample, over the training
        images; otherwise they are those that training kept.
    """

    optimizer: Optimizer
    posterior: Callable[[Member], Any]
    point: bool
    refresh: bool


def decayed_sgd(options: Training, steps: int) -> optax.GradientTransformation:
    """Plain SGD, its learning rate decayed to a hundredth over the full run."""
    rate, end = options.learning_rate, options.epochs * steps
    return optax.chain(*_sgd(options, schedules.swa_schedule(rate, 0.01 * rate, end)))


def averaged_sgd(options: Training, steps: int) -> optax.GradientTransformation:
    """SGD that settles at a constant learning rate, one iterate collected an epoch."""
    start = options.start * steps
    schedule = schedules.swa_schedule(options.learning_rate, options.swa_learning_rate, start)
    collect = swagjax.swag(options.rank, start=start, every=steps)
    return optax.chain(*_sgd(options, schedule), collect)


def _sgd(options: Training, schedule: optax.Schedule) -> tuple[optax.GradientTransformation, ...]:
    return optax.add_decayed_weights(options.weight_decay), optax.sgd(schedule, momentum=0.9)


def _last(member: Member) -> Callable[[jax.Array], Any]:
    # A Partial is a pytree: the members differ in an argument of one program, which compiles once.
    return jax.tree_util.Partial(_same, member.params)


def _same(params: Any, key: jax.Array) -> Any:
    return params


def _swag(member: Member) -> swagjax.SWAGState:
    return swagjax.get_state(member.opt_state)


def _swag_diag(member: Member) -> swagjax.SWAGState:
    return _swag(member)._replace(deviations=None)


def _swa(member: Member) -> swagjax.SWAGState:
    return _swag(member)._replace(variance=None, deviations=None)


METHODS = {
    "SGD": Method(decayed_sgd, _last, point=True, refresh=False),
    "SWA": Method(averaged_sgd, _swa, point=True, refresh=True),
    "SWAG-Diag": Method(averaged_sgd, _swag_diag, point=False, refresh=True),
    "SWAG": Method(averaged_sgd, _swag, point=False, refresh=True),
}


def predictor(model: nn.Module, images: jax.Array, num_samples: int) -> Callable[..., Iterator]:
    """A function of a key, a method, a member and batches that yields probabilities.

    Args:
      model: the network.
      images: training images, over which BatchNorm statistics are recomputed.
      num_samples: samples that are averaged, where the method is not a point.
    """

    def plain(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.softmax(model.apply({"params": params}, x))

    def normed(params: Any, x: jax.Array, stats: Any) -> jax.Array:
        return jax.nn.softmax(model.apply({"params": params, "batch_stats": stats}, x))

    def refresh(method: Method, member: Member) -> Any:
        if not method.refresh:
            return batch_stats.keep(member.batch_stats)
        return batch_stats.linen(model, member.batch_stats, images, train=True)

    def predict(key: jax.Array, method: Method, member: Member, batches: Iterable) -> Iterator:
        samples = 1 if method.point else num_samples
        how = {"refresh": refresh(method, member)} if member.batch_stats else {}
        fn = normed if member.batch_stats else plain
        posterior = method.posterior(member)
        return swagjax.predict_batches(key, posterior, fn, batches, num_samples=samples, **how)

    return predict
