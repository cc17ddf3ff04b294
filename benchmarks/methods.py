"""The methods that are compared: how each trains, what it keeps, how it predicts.

The Laplace approximation is left out. Of libraries for JAX, laplax (0.0.2, June 2025, no release
since) is not one that this comparison can rest on.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.tree_util import Partial

import swagjax
from benchmarks import algorithms
from benchmarks.algorithms import Recipe
from benchmarks.training import Network
from swagjax import batch_stats, ensemble


class Method(NamedTuple):
    """One row of the table.

    Attributes:
      recipe: how it trains; methods with the same recipe share its networks.
      posterior: what it keeps of a trained network, given a factor of its covariance: a SWAG state,
        points, or a function of a key.
      point: whether that is a single point, for which one sample is enough.
      refresh: whether BatchNorm statistics are recomputed for every sample, over training inputs;
        otherwise they are those that training kept.
      ensemble: whether all members are averaged, each by its share of the samples; else the first.
      dropout: whether the network's dropout is on.
      fitted: what is fitted on held-out inputs, the ``temperature`` of the averaged probabilities
        or the ``scale`` of the covariance.
    """

    recipe: Recipe
    posterior: Callable[[Network, Any], Any]
    point: bool = False
    refresh: bool = True
    ensemble: bool = False
    dropout: bool = False
    fitted: str | None = None


# Of a network: a key, how, the network, batches, number of samples and scale, to probabilities.
Predictor = Callable[..., np.ndarray]


def predictor(model: nn.Module, inputs: jax.Array) -> Predictor:
    """A function that gives the probabilities of one network of a method, for all batches.

    Args:
      model: the network.
      inputs: training inputs, over which BatchNorm statistics are recomputed.
    """

    def plain(drawn: Any, x: jax.Array, stats: Any = None) -> jax.Array:
        return _probabilities(model, drawn, x, stats, {})

    def thinned(drawn: Any, x: jax.Array, stats: Any = None) -> jax.Array:
        params, key = drawn
        return _probabilities(model, params, x, stats, {"dropout": key})

    def predict(
        key: jax.Array,
        method: Method,
        network: Network,
        batches: Iterable[Any],
        num_samples: int,
        scale: Any = 1.0,
    ) -> np.ndarray:
        posterior = method.posterior(network, scale)
        number = {} if isinstance(posterior, ensemble.Points) else {"num_samples": num_samples}
        number = {"num_samples": 1} if method.point else number
        how = {"refresh": _refresh(model, method, network, inputs)} if network.batch_stats else {}
        fn = thinned if method.dropout else plain
        probs = swagjax.predict_batches(key, posterior, fn, batches, **number, **how)
        return np.concatenate(jax.device_get(list(probs)))

    return predict


def _probabilities(model: nn.Module, params: Any, x: Any, stats: Any, rngs: Any) -> jax.Array:
    variables = {"params": params} | ({} if stats is None else {"batch_stats": stats})
    return jax.nn.softmax(model.apply(variables, x, rngs=rngs))


def _refresh(model: nn.Module, method: Method, network: Network, inputs: jax.Array) -> Any:
    if not method.refresh:
        return batch_stats.keep(network.batch_stats)
    if not method.dropout:
        return batch_stats.linen(model, network.batch_stats, inputs, train=True)
    # One mask for all batches: statistics of thinned networks, as those of training are.
    rngs = {"dropout": jax.random.key(0)}
    refresh = batch_stats.linen(model, network.batch_stats, inputs, train=True, rngs=rngs)
    return Partial(_of_params, refresh)


def _of_params(refresh: Any, drawn: Any) -> Any:
    return refresh(drawn[0])


def _last(network: Network, scale: Any) -> Any:
    # A Partial is a pytree: networks differ in an argument of one program, which compiles once.
    return Partial(_same, network.params)


def _same(params: Any, key: jax.Array) -> Any:
    return params


def _swag(network: Network, scale: Any) -> Any:
    state = swagjax.get_state(network.opt_state)
    return Partial(swagjax.sample, state=state, scale=scale, like=network.params)


def _swag_diag(network: Network, scale: Any) -> Any:
    return swagjax.get_state(network.opt_state)._replace(deviations=None)


def _swa(network: Network, scale: Any) -> Any:
    return Partial(_same, swagjax.mean(swagjax.get_state(network.opt_state)))


def _thinned_swa(network: Network, scale: Any) -> Any:
    return Partial(_with_key, swagjax.mean(swagjax.get_state(network.opt_state)))


def _with_key(params: Any, key: jax.Array) -> Any:
    return params, key


def _iterates(network: Network, scale: Any) -> Any:
    state = swagjax.get_state(network.opt_state)
    return ensemble.Points(swagjax.iterates(state))


METHODS = {
    "SGD": Method(algorithms.decayed_sgd, _last, point=True, refresh=False),
    "SGD-Temp": Method(
        algorithms.decayed_sgd, _last, point=True, refresh=False, fitted="temperature"
    ),
    "SWA": Method(algorithms.averaged_sgd, _swa, point=True),
    "SWA-Temp": Method(algorithms.averaged_sgd, _swa, point=True, fitted="temperature"),
    "SWAG-Diag": Method(algorithms.averaged_sgd, _swag_diag),
    "SWAG": Method(algorithms.averaged_sgd, _swag),
    "SWAG fitted": Method(algorithms.averaged_sgd, _swag, fitted="scale"),
    "SWA-Dropout": Method(algorithms.averaged_dropout, _thinned_swa, dropout=True),
    "SGLD": Method(algorithms.langevin, _iterates),
    "FGE": Method(algorithms.cycled_sgd, _iterates),
    "deep ensemble": Method(
        algorithms.decayed_sgd, _last, point=True, refresh=False, ensemble=True
    ),
    "MultiSWAG": Method(algorithms.averaged_sgd, _swag, ensemble=True),
}
