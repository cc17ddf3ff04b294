"""Training on an accelerator: an epoch is one program, and the next is queued before it ends.

Images lie on the device as bytes, are augmented as bytes and made numbers batch by batch. The
learning rate is an argument, so that one program serves every schedule, whatever its length; it is
that of the authors, constant within an epoch.

All randomness is derived from (seed, epoch, step): a run that was killed and resumed goes through
the same numbers as one that was not.
"""

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import swagjax
from benchmarks.augmentation import augmentation
from benchmarks.gpu.job import MARGIN, Job, TimeUpError

MOMENTUM = 0.9
DROPOUT = 1 << 16  # beyond the numbers by which augmentations fold the same key
AHEAD = 2  # epochs queued on the device: it never waits for the host, and the clock is honest
LEARNS = 10, 0.95  # by this epoch the loss is below this share of a guess's


class Network(NamedTuple):
    """One network in training, or several along a first axis."""

    params: Any
    batch_stats: Any
    opt_state: Any


class Recipe(NamedTuple):
    """How a network trains, but for the learning rate.

    Attributes:
      model: the network.
      batch: images in a minibatch.
      weight_decay: L2 penalty that is added to the gradient.
      augment: changes of ``benchmarks.augmentation``.
      rank: deviations that SWAG holds.
      mean: of a pixel, per channel, from 0 to 255.
      std: likewise.
      seeds: how many train side by side, under ``vmap`` where they are more than one.
    """

    model: nn.Module
    batch: int
    weight_decay: float
    augment: tuple[str, ...]
    rank: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seeds: int


def plain(recipe: Recipe) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum; ``update`` takes the learning rate as ``rate``."""
    decay = optax.add_decayed_weights(recipe.weight_decay)
    return optax.with_extra_args_support(optax.chain(decay, optax.trace(MOMENTUM), _by_rate()))


def collecting(recipe: Recipe, steps: int) -> optax.GradientTransformationExtraArgs:
    """The same, with SWAG collecting at the end of every epoch."""
    collect = swagjax.swag(recipe.rank, every=steps)
    return optax.with_extra_args_support(optax.chain(plain(recipe), collect))


def initialise(recipe: Recipe, keys: jax.Array, image: np.ndarray) -> Network:
    """Fresh networks, one a key."""

    def init(key: jax.Array) -> Network:
        variables = recipe.model.init(key, normalise(recipe, image[None]))
        params = variables["params"]
        return Network(params, variables.get("batch_stats", {}), plain(recipe).init(params))

    return jax.jit(_over_seeds(recipe, init, 0, 0))(keys)


def begin_collecting(recipe: Recipe, network: Network, steps: int) -> Network:
    """Networks that go on with SWAG, which has collected nothing yet."""
    collect = swagjax.swag(recipe.rank, every=steps)

    def add(network: Network) -> Network:
        return network._replace(opt_state=(network.opt_state, collect.init(network.params)))

    axes = member_axes(recipe, network, steps)
    return jax.jit(_over_seeds(recipe, add, 0, axes))(network)


def member_axes(recipe: Recipe, network: Network, steps: int) -> Network:
    """Of networks that collect: their axes of seeds."""
    state = jax.eval_shape(swagjax.swag(recipe.rank, every=steps).init, network.params)
    plain_axes = jax.tree.map(lambda _: 0, network)
    return plain_axes._replace(opt_state=(plain_axes.opt_state, swagjax.member_axes(state)))


def epoch(recipe: Recipe, tx: Any, steps: int, axes: Any = 0) -> Callable[..., Any]:
    """``(network, keys, number, rate, images, labels) -> (network, mean losses)``, donated.

    One program: the order of the images, and a loop over the minibatches.
    """
    step = functools.partial(_step, recipe, tx)

    def of_one(
        network: Network, key: jax.Array, number: Any, rate: Any, images: Any, labels: Any
    ) -> Any:
        key = jax.random.fold_in(key, number)
        order = jax.random.permutation(key, len(labels))

        def body(network: Network, i: Any) -> Any:
            rows = jax.lax.dynamic_slice_in_dim(order, i * recipe.batch, recipe.batch)
            return step(network, jax.random.fold_in(key, i), rate, images[rows], labels[rows])

        network, losses = jax.lax.scan(body, network, jnp.arange(steps))
        return network, losses.mean()

    in_axes = (axes, 0, None, None, None, None)
    return jax.jit(_over_seeds(recipe, of_one, in_axes, (axes, 0)), donate_argnums=0)


def fit(
    job: Job,
    name: str,
    program: Callable[..., Any],
    recipe: Recipe,
    network: Network,
    rates: np.ndarray,
    first: int,
    keys: jax.Array,
    data: Any,
) -> tuple[Network, np.ndarray]:
    """Train from an epoch on, one epoch a rate, from the last save if there is one.

    Args:
      job: whose time box and folder it is.
      name: of the file that it is saved in.
      program: see ``epoch``.
      recipe: that it was made of.
      network: what it begins from; donated.
      rates: learning rates of the epochs.
      first: number of the first of them.
      keys: of the seeds.
      data: images and labels, on the device.

    Returns:
      The networks and their losses, shape (epochs,) or (epochs, seeds).

    Raises:
      TimeUpError: after saving; the next run goes on from there.
    """
    found = job.saved(name, network)
    losses = [] if found is None else list(found[1])
    network = network if found is None else found[0]
    pending: deque[Any] = deque()
    saved = job.spent() if found is not None else job.spent() - job.save_every / 2

    def wait(queued: int) -> None:
        while len(pending) > queued:
            losses.append(np.asarray(pending.popleft()))
            _check_learns(first + len(losses), losses[-1], recipe.model.classes)

    for i in range(len(losses), len(rates)):
        if job.left() < MARGIN:
            wait(0)
            job.save(name, network, np.asarray(losses))
            raise TimeUpError(f"{job.part}: {name} is at epoch {first + i}")
        network, loss = program(network, keys, first + i, rates[i], *data)
        pending.append(loss)
        wait(AHEAD)
        if losses:
            job.say(f"{name}, epoch {first + len(losses)}, loss {np.mean(losses[-1]):.4f}", 10)
        if i + 1 < len(rates) and job.spent() - saved >= job.save_every:
            wait(0)
            job.save(name, network, np.asarray(losses))
            saved = job.spent()
    wait(0)
    if found is None or len(losses) > len(found[1]):
        job.save(name, network, np.asarray(losses))
    return network, np.asarray(losses)


def normalise(recipe: Recipe, images: Any) -> jax.Array:
    """Bytes to numbers of mean 0 and standard deviation 1 per channel."""
    mean, std = jnp.array(recipe.mean, jnp.float32), jnp.array(recipe.std, jnp.float32)
    return (jnp.asarray(images, jnp.float32) - mean) / std


def of_seed(recipe: Recipe, tree: Any, axes: Any, seed: int) -> Any:
    """One network of those side by side, given their axes."""
    if recipe.seeds == 1:
        return tree

    def pick(axis: Any, x: jax.Array) -> jax.Array:
        return x if axis is None else x[seed]

    return jax.tree.map(pick, axes, tree, is_leaf=lambda x: x is None)


def _step(
    recipe: Recipe, tx: Any, network: Network, key: jax.Array, rate: Any, images: Any, labels: Any
) -> Any:
    images = normalise(recipe, augmentation(recipe.augment)(key, images))

    def loss_and_stats(params: Any) -> Any:
        variables = {"params": params, "batch_stats": network.batch_stats}
        random = {"dropout": jax.random.fold_in(key, DROPOUT)}
        logits, changed = recipe.model.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs=random
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, changed.get("batch_stats", {})

    (loss, stats), grads = jax.value_and_grad(loss_and_stats, has_aux=True)(network.params)
    updates, opt_state = tx.update(grads, network.opt_state, network.params, rate=rate)
    return Network(optax.apply_updates(network.params, updates), stats, opt_state), loss


def _check_learns(epoch: int, loss: np.ndarray, classes: int) -> None:
    """Refuse to spend minutes on networks that are dead, as one of nine LeNet5s once was."""
    number, share = LEARNS
    if epoch == number and not np.all(loss < share * np.log(classes)):
        raise RuntimeError(
            f"after {number} epochs the loss is {loss}, no better than a guess: "
            "try another --seed with --fresh"
        )


def _by_rate() -> optax.GradientTransformationExtraArgs:
    """Scale by minus the learning rate that ``update`` is given."""

    def update(updates: Any, state: Any, params: Any = None, *, rate: Any, **_: Any) -> Any:
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _over_seeds(recipe: Recipe, function: Any, in_axes: Any, out_axes: Any) -> Any:
    """One network by itself: under ``vmap`` its convolutions would be grouped ones."""
    return function if recipe.seeds == 1 else jax.vmap(function, in_axes, out_axes)
