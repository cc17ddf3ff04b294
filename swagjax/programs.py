"""Private: functions as arguments of a compiled program, their arrays traced and the rest static.

A function that is a pytree, such as ``jax.tree_util.Partial``, brings arrays: as arguments of the
program they may change without another compilation. The same function object compiles once.
"""

from typing import Any, NamedTuple

import jax
import numpy as np


class Static(NamedTuple):
    """What of a tree is no array: its structure, and in their places the other leaves, typed.

    Example:
      >>> from swagjax import programs
      >>> programs.separate([len, 2.0], "it")[1].leaves
      ((<class 'builtin_function_or_method'>, <built-in function len>), None)
    """

    treedef: Any
    leaves: tuple[Any, ...]


def separate(functions: Any, names: str) -> tuple[list[Any], Static]:
    """Part a tree of functions into its arrays and all else, which gets a hash.

    Args:
      functions: a tree with functions, arrays and other values for leaves; those without a hash
        are told apart by identity, as functions are.
      names: what the tree is called in errors.

    Returns:
      The arrays, None in the places of other leaves; and the others, None in those of arrays.

    Raises:
      ValueError: for a tree whose own structure has no hash.

    Example:
      >>> from swagjax import programs
      >>> programs.separate([len, 2.0], "it")[0]
      [None, 2.0]
    """
    leaves, treedef = jax.tree.flatten(functions)
    arrays = [leaf if _is_array(leaf) else None for leaf in leaves]
    # With its type: 1, 1.0 and True are equal, and would share a program.
    others = tuple(None if _is_array(leaf) else (type(leaf), _hashable(leaf)) for leaf in leaves)
    try:
        hash((treedef, others))
    except TypeError as error:
        raise ValueError(
            f"{names} holds what can be neither traced nor compiled in ({error}): give "
            "functions, or pytrees of arrays and hashable values"
        ) from error
    return arrays, Static(treedef, others)


def together(arrays: list[Any], static: Static) -> Any:
    """Undo ``separate``: the tree of functions, whose arrays may be traced.

    Example:
      >>> from swagjax import programs
      >>> programs.together(*programs.separate([len, 2.0], "it"))
      [<built-in function len>, 2.0]
    """
    leaves = [a if o is None else _bare(o[1]) for a, o in zip(arrays, static.leaves, strict=True)]
    return jax.tree.unflatten(static.treedef, leaves)


def unjit(function: Any) -> Any:
    """Return what ``jax.jit`` wraps: a trace in its cache would hide the layers from a look.

    Example:
      >>> import jax
      >>> from swagjax.programs import unjit
      >>> unjit(jax.jit(len)) is len
      True
    """
    jitted: Any = type(jax.jit(len))
    while isinstance(function, jitted):
        function = function.__wrapped__
    return function


class _Same:
    """A leaf without a hash, such as a linen module with a list in it: told apart by identity."""

    def __init__(self, leaf: Any):
        self.leaf = leaf

    def __hash__(self) -> int:
        return id(self.leaf)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.leaf is other.leaf


def _hashable(leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError:
        return _Same(leaf)
    return leaf


def _bare(leaf: Any) -> Any:
    return leaf.leaf if isinstance(leaf, _Same) else leaf


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | float)
