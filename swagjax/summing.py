"""Private: sums, means and checks over examples, of which there may be 10^8, weighted or not.

A float32 sum that runs one by one stops growing at 2^24. The sums here are taken in blocks of 128,
then over the sums of the blocks, and so on: of 10^8 examples no addend meets more than 4 * 128
others, in whatever order a backend adds within a block.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_BLOCK = 128


def block_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis, by blocks."""
    while x.shape[-1] > _BLOCK:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _BLOCK)])
        x = jnp.sum(x.reshape(*x.shape[:-1], -1, _BLOCK), axis=-1)
    return jnp.sum(x, axis=-1)


def mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Mean over all elements, weighted; weights are of the leading axes of the values."""
    total = block_sum(values.ravel())
    if weights is None:
        return total / values.size
    spread = spread_weights(weights, values.shape, values.dtype)
    return block_sum((spread * values).ravel()) / block_sum(spread.ravel())


def sum_by_bin(x: jax.Array, index: jax.Array, num_bins: int) -> jax.Array:
    """Sum of the elements with each index, by blocks; integers of integers."""
    block = max(_BLOCK, num_bins)  # so that the sums of the blocks are fewer than the elements
    num_blocks = -(-x.size // block)
    of_block = jax.lax.iota(jnp.int32, x.size) // block
    flat = index.astype(jnp.int32) * num_blocks + of_block
    sums = jax.ops.segment_sum(x, flat, num_bins * num_blocks)
    return block_sum(sums.reshape(num_bins, num_blocks))


def running_sum(x: jax.Array) -> jax.Array:
    """Sum up to each element, that one included, by a tree of pairs."""
    sums: jax.Array = jax.lax.associative_scan(jnp.add, x)
    return sums


def two_sum(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Add two numbers, each held as a sum and what rounding took from it.

    Source: Dekker 1971, "A floating-point technique for extending the available precision",
    section 5, with the addition of Knuth, TAOCP 2, section 4.2.2, theorem B.
    """
    total = a[0] + b[0]
    part = total - a[0]
    rest = (a[0] - (total - part)) + (b[0] - part) + (a[1] + b[1])
    # Of an infinite or NaN sum there is no rest.
    rest = jnp.where(jnp.isfinite(total), rest, jnp.zeros_like(rest))
    both = total + rest
    return both, jnp.where(jnp.isfinite(both), rest - (both - total), jnp.zeros_like(rest))


def spread_weights(weights: jax.Array, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
    """The weights of the leading axes of ``shape``, in ``shape``; a negative one is NaN."""
    weights = weights.astype(dtype or weights.dtype)
    weights = jnp.where(weights >= 0, weights, jnp.nan)
    weights = weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim))
    return jnp.broadcast_to(weights, shape)


def blank(x: jax.Array, weights: jax.Array | None, lead: int = 0, fill: int = 1) -> jax.Array:
    """The array with ``fill`` where the weight is zero; weights begin after ``lead`` axes.

    So that what does not count has no say, be it NaN: in no product, and in no gradient.
    """
    if weights is None or x.ndim == 0:
        return x
    shape = (1,) * lead + weights.shape + (1,) * (x.ndim - lead - weights.ndim)
    out = jnp.broadcast_to((weights == 0).reshape(shape), x.shape)
    return jnp.where(out, jnp.asarray(fill, x.dtype), x)


def read_weights(weights: ArrayLike | None, name: str, shape: tuple[int, ...]) -> jax.Array | None:
    """The weights as an array, or None; their shape is that of ``name``, or of its first axes."""
    if weights is None:
        return None
    array = widen(read_numbers(weights))
    if array.shape != shape[: array.ndim]:
        raise ValueError(
            f"weights has shape {array.shape}, but must have that of {name}, {shape}, or of its "
            "leading axes: give one weight per example, 0 for one that does not count."
        )
    return array


def check_weights(least: float, name: str = "weights") -> None:
    """Refuse a least weight that is negative or NaN."""
    if not least >= 0:
        raise ValueError(
            f"{name} holds the value {least:g}, but must not be negative: a weight is how many "
            "times an example counts, 0 for not at all."
        )


def check_labels(
    lowest: int, highest: int, name: str, num_classes: int, labels: ArrayLike | None
) -> None:
    """Refuse labels that are no class; ``labels`` are as they were given, before any narrowing."""
    if lowest >= 0 and highest < num_classes:
        return
    bad, limits = lowest if lowest < 0 else highest, np.iinfo(np.int32)
    if bad in (limits.min, limits.max):
        bad = (np.min if lowest < 0 else np.max)(np.asarray(labels))
    raise ValueError(
        f"labels holds {bad}, but {name} has {num_classes} classes, 0 to {num_classes - 1}: "
        "renumber the labels, leave these examples out, or give them weight 0, as in "
        "weights=labels != 255."
    )


def read_integers(x: ArrayLike) -> jax.Array:
    """``jnp.asarray`` of labels: those that need 64 bits stay beyond any class, unwrapped."""
    if not _would_wrap(x):
        return jnp.asarray(x)
    limits = np.iinfo(np.int32)
    narrow = np.minimum(np.asarray(x), limits.max)
    return jnp.asarray(np.maximum(narrow, limits.min) if narrow.dtype == np.int64 else narrow)


def read_numbers(x: ArrayLike) -> jax.Array:
    """``jnp.asarray`` of numbers: integers that need 64 bits are rounded to floats, not wrapped."""
    with nan_is_meant():  # where the weight is zero; what else it is, is checked later
        return jnp.asarray(np.asarray(x, np.float32) if _would_wrap(x) else x)


def widen(x: jax.Array) -> jax.Array:
    """The array in float32, or in a wider type that it has."""
    wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
    with nan_is_meant():
        return x if wide else x.astype(jnp.float32)


def gathered(x: jax.Array | None) -> Any:
    """The array on every device: of what an Explicit mesh splits, there is no sort or scatter."""
    sharding: Any = jax.typeof(x).sharding if x is not None else None
    if x is None or all(axis is None for axis in sharding.spec):
        return x
    whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*[None] * x.ndim))
    return jax.sharding.reshard(x, whole)


@contextlib.contextmanager
def nan_is_meant() -> Iterator[None]:
    """Let NaN and infinity stand for what is meant, where jax_debug_nans would stop."""
    with jax.debug_nans(False), jax.debug_infs(False):
        yield


def is_traced(x: Any) -> bool:
    """Whether the values are not known yet."""
    return isinstance(x, jax.core.Tracer)


def _would_wrap(x: Any) -> bool:
    """Whether 64-bit integers hold a value that JAX, which narrows them to 32 bits, would wrap."""
    if not isinstance(x, np.ndarray | np.generic) or x.dtype not in (np.int64, np.uint64):
        return False
    narrow = np.iinfo(jax.dtypes.canonicalize_dtype(x.dtype))
    least, greatest = np.min(x, initial=0), np.max(x, initial=0)
    return int(least) < narrow.min or int(greatest) > narrow.max
