"""Private: the small leaves of a tree as one array, because XLA compiles every leaf anew.

A contraction or a generator per leaf of a network with 300 leaves takes a minute to compile, over
the pool of its small leaves a few seconds. Large leaves stay as they are: copying them would cost
more than it saves. Which leaf is small depends on its size alone, so that sharded and unsharded
parameters are drawn and scored alike.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

_SMALL = 1 << 14  # elements

Groups = list[list[int]]


def group(leaves: list[Any]) -> Groups:
    """Positions of the leaves in groups: the small ones of a dtype together, each large one alone.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.pooling import group
      >>> group([jnp.zeros(3), jnp.zeros((200, 200)), jnp.zeros((2, 2))])
      [[0, 2], [1]]
    """
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype if leaf.size < _SMALL else i, []).append(i)
    return list(groups.values())


def lone(leaves: list[Any]) -> Groups:
    """Every leaf alone: for leaves of which parts may lie on other devices.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.pooling import lone
      >>> lone([jnp.zeros(3), jnp.zeros((2, 2))])
      [[0], [1]]
    """
    return [[i] for i in range(len(leaves))]


def whole(leaves: list[Any]) -> bool:
    """Whether arrays are known to lie whole on each of their devices: joining them moves nothing.

    Inside ``jit`` that is known where shardings are part of the types, or there is one device.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.pooling import whole
      >>> whole([jnp.zeros(3)])
      True
    """
    return all(map(_is_whole, leaves))


def pool(leaves: list[jax.Array], groups: Groups, lead: int = 0) -> list[jax.Array]:
    """One array a group: its leaves flattened, but for ``lead`` axes, and joined.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.pooling import pool
      >>> [x.shape for x in pool([jnp.zeros((5, 3)), jnp.zeros((5, 2, 2))], [[0, 1]], lead=1)]
      [(5, 7)]
    """

    def join(members: list[jax.Array]) -> jax.Array:
        if len(members) == 1:
            return members[0]
        return jnp.concatenate([x.reshape(*x.shape[:lead], -1) for x in members], axis=lead)

    return [join([leaves[i] for i in indices]) for indices in groups]


def unpool(arrays: list[jax.Array], groups: Groups, leaves: list[Any]) -> list[jax.Array]:
    """Undo ``pool``: arrays in the shapes of ``leaves``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.pooling import unpool
      >>> print(unpool([jnp.arange(3)], [[0, 1]], [jnp.zeros(2), jnp.zeros(1)]))
      [Array([0, 1], dtype=int32), Array([2], dtype=int32)]
    """
    parts: dict[int, jax.Array] = {}
    for array, indices in zip(arrays, groups, strict=True):
        cuts = _cut(array, [leaves[i].size for i in indices])
        parts |= {i: x.reshape(leaves[i].shape) for i, x in zip(indices, cuts, strict=True)}
    return [parts[i] for i in range(len(leaves))]


def _cut(array: jax.Array, sizes: list[int]) -> list[jax.Array]:
    if len(sizes) == 1:
        return [array]
    # Behind a barrier, for constant offsets would make slices of them: the partitioner shards
    # what is sliced, and then moves a piece of every leaf between all devices.
    starts = list(itertools.accumulate(sizes, initial=0))[:-1]
    offsets = jax.lax.optimization_barrier(jnp.array(starts, jnp.int32))
    return [
        jax.lax.dynamic_slice_in_dim(array, offset, size)
        for offset, size in zip(offsets, sizes, strict=True)
    ]


def _is_whole(leaf: Any) -> bool:
    if not isinstance(leaf, jax.core.Tracer):
        sharding = getattr(leaf, "sharding", None)
        return sharding is None or sharding.is_fully_replicated
    sharding = jax.typeof(leaf).sharding
    known = jax.device_count() == 1 or sharding.mesh.are_all_axes_explicit
    return known and not any(sharding.spec)
