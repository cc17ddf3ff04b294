"""The methods that are compared: how each trains, what it draws, what it fits when held out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from blackjax.vi import meanfield_vi

import swagjax
from benchmarks.regression import algorithms, network
from benchmarks.regression.training import Algorithm, Hyper, Plan, Trained

# From a key, one trained run, its hyper-parameters, a scale and a number of samples.
Draw = Callable[[jax.Array, Trained, Hyper, Any, int], Any]


class Calibration(NamedTuple):
    """What is tried on held-out data after training: every pair of factors of two variances.

    Attributes:
      scales: of the posterior's covariance.
      noises: of the variance that the network predicts.
    """

    scales: tuple[float, ...] = (1.0,)
    noises: tuple[float, ...] = (1.0,)


class Method(NamedTuple):
    """One row of the table.

    Attributes:
      algorithm: how it trains; methods with the same algorithm and hyper-parameters share networks.
      draw: samples of networks, on a leading axis; one of them where it is a point.
      ensemble: whether all members are averaged; each gives its share of the samples.
      chosen_as: the method whose hyper-parameters it takes; its own where it is not said.
      tried: what is tried on held-out data after training, beside the hyper-parameters of it.
    """

    algorithm: Callable[[Plan], Algorithm]
    draw: Draw
    ensemble: bool = False
    chosen_as: str | None = None
    tried: Calibration = Calibration()


def outputs(
    draw: Draw,
    num_samples: int,
    keys: jax.Array,
    members: Trained,
    hyper: Any,
    scale: Any,
    x: Any,
) -> tuple[jax.Array, jax.Array]:
    """Means and variances ``(S, N)`` that the samples of one method give to the inputs ``(N, D)``.

    Args:
      draw: that of a method.
      num_samples: of all members together; members that are points give one each.
      keys: one a member.
      members: trained runs, with a leading axis of members.
      hyper: what they were trained with, likewise.
      scale: factor of the posterior's covariance.
      x: inputs, standardised.
    """

    def of_member(key: jax.Array, member: Trained, hyper: Hyper) -> Any:
        return draw(key, member, hyper, scale, max(1, num_samples // len(keys)))

    drawn = jax.vmap(of_member)(keys, members, hyper)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), drawn)
    return jax.vmap(network.apply, (0, None))(flat, x)


def _last(key: jax.Array, member: Trained, hyper: Hyper, scale: Any, num: int) -> Any:
    return _point(member.state.params)


def _swa(key: jax.Array, member: Trained, hyper: Hyper, scale: Any, num: int) -> Any:
    return _point(swagjax.get_state(member.state.opt_state).mean)


def _point(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], params)


def _swag(key: jax.Array, member: Trained, hyper: Hyper, scale: Any, num: int) -> Any:
    return _sampled(key, swagjax.get_state(member.state.opt_state), scale, num)


def _swag_diag(key: jax.Array, member: Trained, hyper: Hyper, scale: Any, num: int) -> Any:
    state = swagjax.get_state(member.state.opt_state)._replace(deviations=None)
    return _sampled(key, state, scale, num)


def _sampled(key: jax.Array, state: swagjax.SWAGState, scale: Any, num: int) -> Any:
    # The same key draws the same noise at every scale: scales are compared without its chance.
    keys = jax.random.split(key, num)
    return jax.vmap(lambda one: swagjax.sample(one, state, scale=scale))(keys)


def _dropout(key: jax.Array, member: Trained, hyper: Hyper, scale: Any, num: int) -> Any:
    keys = jax.random.split(key, num)
    return jax.vmap(network.thinned, (None, 0, None))(member.state.params, keys, hyper.dropout)


def _mean_field(key: jax.Array, member: Trained, hyper: Hyper, scale: Any, num: int) -> Any:
    return meanfield_vi.sample(key, member.state, num)


def _langevin(key: jax.Array, member: Trained, hyper: Hyper, scale: Any, num: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[-num:], member.snapshots)


_NOISES = (0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.7, 2.0, 2.5, 3.0, 4.0, 6.0)
_NOISE = Calibration(noises=_NOISES)
_BOTH = Calibration(scales=(0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), noises=_NOISES)
_SETTLED, _CONSTANT = algorithms.settled_sgd, algorithms.averaged_sgd

_OTHERS = {
    "MC-dropout": Method(algorithms.dropout_sgd, _dropout),
    "mean-field VI": Method(algorithms.mean_field, _mean_field),
    "SGLD": Method(algorithms.langevin, _langevin),
}

# The recipe, beside SGD and others; "constant" is the authors' way, its choices made as all others.
TUNED = {
    "SGD": Method(algorithms.decayed_sgd, _last),
    "SGD fitted": Method(algorithms.decayed_sgd, _last, tried=_NOISE),
    "SWA": Method(_SETTLED, _swa, tried=_NOISE),
    "SWAG-Diag": Method(_SETTLED, _swag_diag, tried=_BOTH),
    "SWAG": Method(_SETTLED, _swag, tried=_BOTH),
    "MultiSWAG": Method(_SETTLED, _swag, ensemble=True, chosen_as="SWAG"),
    "SGD constant": Method(_CONSTANT, _last),
    "SWA constant": Method(_CONSTANT, _swa, tried=_NOISE),
    "SWAG constant": Method(_CONSTANT, _swag, tried=_BOTH),
    "deep ensemble": Method(algorithms.decayed_sgd, _last, ensemble=True, chosen_as="SGD fitted"),
    **_OTHERS,
}

AUTHORS = {
    "SGD": Method(algorithms.decayed_sgd, _last),
    "SGD constant": Method(_CONSTANT, _last),
    "SWA": Method(_CONSTANT, _swa),
    "SWAG-Diag": Method(_CONSTANT, _swag_diag),
    "SWAG": Method(_CONSTANT, _swag),
    "SWAG fitted": Method(_CONSTANT, _swag, tried=_BOTH),
    "MultiSWAG": Method(_CONSTANT, _swag, ensemble=True, chosen_as="SWAG"),
    "deep ensemble": Method(algorithms.decayed_sgd, _last, ensemble=True, chosen_as="SGD"),
    **_OTHERS,
}
