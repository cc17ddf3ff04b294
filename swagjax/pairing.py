"""Private: a tree with holes, where leaves are masked or frozen, beside a full one of parameters.

Leaves are paired by structure, never by order of traversal.
"""

import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from swagjax.transform import widen

_FLOATS = (jnp.floating,)  # cast to integers, a sample would be rounded


def restrict(held: Any, full: Any, name: str) -> Any:
    """The leaves of ``full`` that ``held`` has, in the precision of the arithmetic.

    Args:
      held: a tree of arrays and holes (``None`` or ``optax.MaskedNode``).
      full: a tree of the same structure, with anything in place of the holes.
      name: what ``full`` is called in errors.

    Returns:
      A tree like ``held``.

    Raises:
      ValueError: where structure or shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.pairing import restrict
      >>> print(restrict({"a": jnp.zeros(1), "b": None}, {"a": jnp.ones(1), "b": 3}, "params"))
      {'a': Array([1.], dtype=float32), 'b': None}
    """

    def cast(m: jax.Array, leaf: jax.Array, _: Any) -> jax.Array:
        return leaf.astype(widen(m).dtype)

    kinds = (jnp.floating, jnp.integer)
    return _pair(held, full, name, kinds, lambda hole, _: hole, cast)


def fill(theta: Any, like: Any, *, repeats: int | None = None) -> Any:
    """Give ``theta`` the dtypes and containers of ``like``, and its leaves where it has holes.

    Those leaves may be anything, and stay what they are: integers, keys, functions.

    Args:
      theta: a tree of arrays and holes.
      like: a tree of the same structure, with anything in place of the holes.
      repeats: length of the leading axis of all arrays of ``theta``; the numbers that fill the
        holes are repeated along it.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.pairing import fill
      >>> fill({"a": jnp.ones(1), "b": None}, {"a": jnp.zeros(1, jnp.bfloat16), "b": 3})
      {'a': Array([1], dtype=bfloat16), 'b': 3}
    """

    def repeat(leaf: Any) -> Any:
        if not _is_number(leaf):
            return leaf
        leaf = jnp.asarray(leaf)
        return jnp.broadcast_to(leaf, (repeats, *leaf.shape))

    return _pair(
        theta,
        like,
        "like",
        _FLOATS,
        lambda _, leaves: leaves if repeats is None else jax.tree.map(repeat, leaves),
        lambda t, leaf, treedef: jax.tree.unflatten(treedef, [t.astype(leaf.dtype)]),
        lead=0 if repeats is None else 1,
    )


def dtypes(held: Any, like: Any) -> tuple[Any, ...]:
    """The dtypes that the leaves of ``held`` have in ``like``: all that a program asks of it.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.pairing import dtypes
      >>> dtypes({"a": jnp.ones(1), "b": None}, {"a": jnp.zeros(1, jnp.bfloat16), "b": len})
      (dtype(bfloat16),)
    """
    found = _pair(held, like, "like", _FLOATS, lambda hole, _: hole, lambda _, leaf, __: leaf.dtype)
    return tuple(jax.tree.leaves(found))


def replace(held: Any, full: Any, function: Callable[[Any, Any], Any]) -> Any:
    """``full`` with ``function(h, leaf)`` in place of every leaf that ``held`` has.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.pairing import replace
      >>> replace({"a": jnp.ones(1), "b": None}, {"a": jnp.ones(1), "b": 3}, jnp.add)
      {'a': Array([2.], dtype=float32), 'b': 3}
    """
    return _pair(
        held,
        full,
        "like",
        _FLOATS,
        lambda _, leaves: leaves,
        lambda h, leaf, treedef: jax.tree.unflatten(treedef, [function(h, leaf)]),
    )


def _pair(
    held: Any, full: Any, name: str, kinds: Any, at_hole: Any, at_leaf: Any, lead: int = 0
) -> Any:
    """Walk both trees; a leaf of ``held`` may stand against a container of one array.

    Such a container is an ``nnx.Param``. Leaves of ``held`` have ``lead`` axes more.
    """

    def visit(path: Any, h: Any, f: Any) -> Any:
        if _is_hole(h):
            return at_hole(h, f)
        where = f"{name}{jax.tree_util.keystr(path)}"
        leaves, treedef = jax.tree.flatten(f)
        shapes, shape = [_shape(leaf) for leaf in leaves], h.shape[lead:]
        if shapes != [shape]:
            raise ValueError(f"{where} has shape {shapes}: the state holds {[shape]} there")
        leaf = jnp.asarray(leaves[0])
        if not any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds):
            raise ValueError(f"{where} has dtype {leaf.dtype}: the state holds {h.dtype} there")
        return at_leaf(h, leaf, treedef)

    try:
        jax.tree.map(lambda *_: None, held, full, is_leaf=_is_hole)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} has another structure than the parameters that were collected: {error}"
        ) from error
    return jax.tree.map_with_path(visit, held, full, is_leaf=_is_hole)


def _shape(leaf: Any) -> Any:
    """The shape of a leaf, or the type of what has none: a function, a string."""
    return jnp.shape(leaf) if _is_number(leaf) else type(leaf).__name__


def _is_number(leaf: Any) -> bool:
    return hasattr(leaf, "shape") or isinstance(leaf, numbers.Number)


def _is_hole(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)
