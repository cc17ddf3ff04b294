"""A network that predicts a mean and a variance, and the density that it gives to the targets."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

LEAST = 1e-6  # variance, in units of the standardised targets
Drop = Callable[[int, jax.Array], jax.Array]  # number and values of a hidden layer, to what is left


def init(key: jax.Array, inputs: int, hidden: Sequence[int]) -> dict[str, Any]:
    """Weights and biases uniform within 1 / sqrt(fan in), as PyTorch starts them.

    The last layer has two outputs; ``noise`` is the global variance before the softplus.
    """
    sizes = [inputs, *hidden, 2]
    keys = jax.random.split(key, len(sizes) - 1)

    def layer(key: jax.Array, fan_in: int, fan_out: int) -> dict[str, jax.Array]:
        drawn = jax.random.uniform(key, (fan_in + 1, fan_out), minval=-1, maxval=1) / fan_in**0.5
        return {"w": drawn[:-1], "b": drawn[-1]}

    layers = [layer(*each) for each in zip(keys, sizes[:-1], sizes[1:], strict=True)]
    return {"layers": layers, "noise": jnp.zeros(())}


def apply(
    params: Any, x: jax.Array, drop: Drop = lambda layer, h: h
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the standardised targets, each ``(N,)``, of inputs ``(N, D)``.

    variance = softplus(second output) + softplus(noise).
    """
    *hidden, last = params["layers"]
    for i, layer in enumerate(hidden):
        x = drop(i, jax.nn.relu(x @ layer["w"] + layer["b"]))
    mean, raw = jnp.moveaxis(x @ last["w"] + last["b"], -1, 0)
    return mean, jax.nn.softplus(raw) + jax.nn.softplus(params["noise"]) + LEAST


def log_density(params: Any, x: jax.Array, y: jax.Array, **drop: Drop) -> jax.Array:
    """Logarithm of the density of every target, ``(N,)``."""
    mean, variance = apply(params, x, **drop)
    return jax.scipy.stats.norm.logpdf(y, mean, jnp.sqrt(variance))


def thinned(params: Any, key: jax.Array, rate: float | jax.Array) -> Any:
    """A sample of MC-dropout as weights: hidden units struck out, the others scaled up.

    One mask for all inputs; for each input by itself this is what dropout in the network is.
    """
    layers = params["layers"]
    keys = jax.random.split(key, len(layers))

    def strike(key: jax.Array, layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
        left = jax.random.bernoulli(key, 1 - rate, layer["w"].shape[:1]) / (1 - rate)
        return layer | {"w": layer["w"] * left[:, None]}

    return params | {"layers": [layers[0], *map(strike, keys[1:], layers[1:])]}
