"""Private: standard normals for a tree, bit for bit those of ``jax.random.normal``, fast on CPU.

On CPU, JAX lowers threefry to a rolled loop over arrays in memory. The same rounds written out in
``jnp`` fuse with whatever uses the numbers and run several times as fast. Sampling a posterior is
mostly drawing normals, hence this module; every other case is left to ``jax.random.normal``.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": threefry-2x32, 20 rounds.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from swagjax import pooling

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def typed_keys(key: Any) -> jax.Array:
    """Check PRNG keys, typed or raw, and return them typed.

    Example:
      >>> import jax
      >>> from swagjax.prng import typed_keys
      >>> typed_keys(jax.random.PRNGKey(0)) == jax.random.key(0)
      Array(True, dtype=bool)
      >>> typed_keys(0)
      Traceback (most recent call last):
      ...
      ValueError: key=0: give a PRNG key, such as jax.random.key(0)
    """
    dtype = getattr(key, "dtype", None)
    try:  # a dtype that is none as well: of an nnx.Rngs every attribute is a stream of keys
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return jnp.asarray(key)
        typed: jax.Array = jax.random.wrap_key_data(key)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"key={key!r}: give a PRNG key, such as jax.random.key(0)") from error
    return typed


def one_key(key: Any) -> jax.Array:
    """Check that ``key`` is a single PRNG key and return it typed.

    Example:
      >>> import jax
      >>> from swagjax.prng import one_key
      >>> one_key(jax.random.split(jax.random.key(0), 3))
      Traceback (most recent call last):
      ...
      ValueError: key holds keys of shape (3,): give one, or map over them with jax.vmap
    """
    typed = typed_keys(key)
    if typed.ndim:
        raise ValueError(
            f"key holds keys of shape {typed.shape}: give one, or map over them with jax.vmap"
        )
    return typed


def normal_like(key: jax.Array, tree: Any) -> Any:
    """Draw independent standard normals in the shapes and dtypes of a tree of arrays.

    Large leaves draw with a key of their own, the small ones of a dtype from one vector.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from swagjax.prng import normal_like
      >>> draws = normal_like(jax.random.key(0), {"a": jnp.zeros((2, 3)), "b": jnp.zeros(5)})
      >>> draws["a"].shape, draws["b"].shape
      ((2, 3), (5,))
    """
    leaves, treedef = jax.tree.flatten(tree)
    groups = pooling.group(leaves)
    keys = jax.random.split(key, len(groups))
    draws = [
        _draw(k, [leaves[i] for i in members]) for k, members in zip(keys, groups, strict=True)
    ]
    return jax.tree.unflatten(treedef, pooling.unpool(draws, groups, leaves))


def normal(
    key: jax.Array, shape: tuple[int, ...], dtype: Any, out_sharding: Any = None
) -> jax.Array:
    """Draw what ``jax.random.normal(key, shape, dtype)`` draws; faster for threefry on CPU.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from swagjax.prng import normal
      >>> key = jax.random.key(0)
      >>> (normal(key, (5,), jnp.float32) == jax.random.normal(key, (5,))).all()
      Array(True, dtype=bool)
    """
    if not _unrollable(key, shape, dtype):
        return jax.random.normal(key, shape, dtype, out_sharding=out_sharding)
    draw: jax.Array = jax.lax.platform_dependent(
        key,
        cpu=lambda key: _unrolled_normal(jax.random.key_data(key), shape, out_sharding),
        default=lambda key: jax.random.normal(key, shape, dtype, out_sharding=out_sharding),
    )
    return draw


def _draw(key: jax.Array, leaves: list[jax.Array]) -> jax.Array:
    """Draw for one leaf in its shape, or for several in one vector."""
    if len(leaves) == 1:
        return normal(key, leaves[0].shape, leaves[0].dtype, _sharding(leaves[0]))
    # In two halves by a loop, which XLA does not fuse: it would copy the generator into the
    # arithmetic of every leaf otherwise, and compile it there.
    size = sum(leaf.size for leaf in leaves)
    half, dtype = (-(-size // 2),), leaves[0].dtype
    halves: jax.Array = jax.lax.map(lambda k: normal(k, half, dtype), jax.random.split(key))
    return halves.reshape(-1)[:size]


def _unrollable(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> bool:
    config: Any = jax.config  # its flags are set at run time, unknown to type checkers
    return (
        config.jax_threefry_partitionable
        and str(jax.random.key_impl(key)) == "threefry2x32"
        and dtype == jnp.float32
        and math.prod(shape) < 1 << 32  # beyond that the counter needs its upper word
    )


def _unrolled_normal(key: jax.Array, shape: tuple[int, ...], out_sharding: Any) -> jax.Array:
    """Bits to uniform on (-1, 1) to normal, as ``jax.random`` does it."""
    x0, x1 = _threefry(key, _counter(shape, out_sharding))
    mantissa = (x0 ^ x1) >> 9 | jnp.uint32(0x3F800000)
    unit = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1
    low = jnp.nextafter(jnp.float32(-1), jnp.float32(0))
    uniform = jnp.maximum(low, unit * (1 - low) + low)
    return jax.lax.mul(jnp.full_like(uniform, math.sqrt(2)), jax.lax.erf_inv(uniform))


def _counter(shape: tuple[int, ...], out_sharding: Any) -> jax.Array:
    """The position of every element in the flat array.

    From one counter an axis, each partitioned as its axis is: of a flat one, reshaped, every
    device would hold the whole.
    """
    counter, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        steps = jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=out_sharding)
        counter = counter + steps * jnp.uint32(stride)
        stride *= shape[axis]
    return counter


def _sharding(leaf: jax.Array) -> Any:
    """The sharding of a leaf where it is part of its type, else None."""
    sharding = jax.typeof(leaf).sharding
    return sharding if any(sharding.spec) else None


def _threefry(key: jax.Array, counter: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encrypt the pairs (0, counter): 20 rounds of add, rotate, xor, unrolled."""
    ks = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x0, x1 = ks[0], counter + ks[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << rotation | x1 >> (32 - rotation)) ^ x0
        x0 = x0 + ks[(group + 1) % 3]
        x1 = x1 + ks[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1
