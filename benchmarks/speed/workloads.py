"""What the figures are measured on: networks, and trees of shapes where only the state counts."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import swagjax
from benchmarks.models import LeNet5
from benchmarks.speed import models

IMAGE = (32, 32, 3)


class Workload(NamedTuple):
    """A network, or only its tree.

    Attributes:
      model: ``None`` where the shapes alone are known.
      batch: images in a train step, few where a step takes long on a CPU.
    """

    model: nn.Module | None
    shapes: Any
    batch_stats: Any
    batch: int


def build(name: str) -> Workload:
    """The workload of a name: shapes, no arrays yet."""
    return _BUILDERS[name]()


def parameters(workload: Workload) -> int:
    """P: how many numbers the tree of parameters holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(workload.shapes))


def random_params(workload: Workload, scale: float = 0.05) -> Any:
    """Parameters in the shapes of the workload, normal with standard deviation ``scale``."""
    return _random_tree(0, workload.shapes, scale)


def batch_stats(workload: Workload) -> Any:
    """BatchNorm statistics as at the start of training: means zero, variances one."""
    return jax.tree.map_with_path(
        lambda path, s: jnp.full(s.shape, float(path[-1].key == "var"), s.dtype),
        workload.batch_stats,
    )


def state(
    workload: Workload, rank: int, place: Callable[[Any], Any] = lambda tree: tree
) -> tuple[Any, swagjax.SWAGState]:
    """Parameters, and the state of SWAG after ``rank + 1`` iterates on a line through them.

    ``place`` puts trees like the parameters where they are to live, such as on several devices.
    """
    tx = swagjax.swag(rank)
    step = collector(tx)
    params = place(random_params(workload))
    direction = place(_random_tree(1, workload.shapes, 1e-3))
    carry = params, tx.init(params)
    for i in range(rank + 1):
        carry = step(carry, jax.tree.map(functools.partial(jnp.multiply, math.sin(i)), direction))
    return carry


def collector(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """``((params, state), updates) -> (params, state)``, compiled, both updated in place.

    The end of a train step: SWAG collects the very parameters that the step returns.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def collect(carry: Any, updates: Any) -> Any:
        params, state = carry
        _, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    return collect


def probabilities(workload: Workload) -> Callable[..., jax.Array]:
    """``(params, images)``, with BatchNorm ``(params, images, statistics)``, to probabilities."""
    model = workload.model

    def prob_fn(params: Any, x: jax.Array, *stats: Any) -> jax.Array:
        variables = {"params": params} | ({"batch_stats": stats[0]} if stats else {})
        return jax.nn.softmax(model.apply(variables, x))

    return prob_fn


def images(count: int) -> jax.Array:
    """Normal images, 32 x 32 x 3."""
    return jax.random.normal(jax.random.key(7), (count, *IMAGE))


def _random_tree(seed: int, shapes: Any, scale: float) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.array(scale * rng.standard_normal(s.shape, np.float32)), shapes
    )


def _network(model: nn.Module, batch: int) -> Workload:
    x = jnp.zeros((1, *IMAGE))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return Workload(model, shapes["params"], shapes.get("batch_stats", {}), batch)


def _tree(shapes: Any) -> Workload:
    return Workload(None, shapes, {}, 0)


_BUILDERS: dict[str, Callable[[], Workload]] = {
    "lenet5": lambda: _network(LeNet5(10), 128),
    "preresnet20": lambda: _network(models.PreActResNet(3, (16, 32, 64)), 64),
    "resnet18": lambda: _network(models.ResNet18(), 8),
    "wrn28x10": lambda: _network(models.PreActResNet(4, (160, 320, 640)), 2),
    "transformer": lambda: _tree(models.decoder_shapes()),
    "leaves300": lambda: _tree(models.many_leaves()),
}
