"""What a program costs before it runs: the products in its trace, and the bytes that they need."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Cost(NamedTuple):
    """Operations, bytes and number of the products (matrix products and convolutions).

    Bytes are the fewest: every product reads its arguments and writes its result once, and all else
    is fused into them.
    """

    flop: float = 0.0
    bytes: float = 0.0
    products: float = 0.0

    def __add__(self, other: tuple[float, ...]) -> "Cost":  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, number: float) -> "Cost":
        """That of so many."""
        return Cost(*(number * each for each in self))


def cost(function: Callable[..., Any], *args: Any) -> Cost:
    """The cost of a call, by its trace on shapes alone; a loop counts as often as it runs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from benchmarks.gpu.counting import cost
      >>> a, b = jax.ShapeDtypeStruct((2, 3), "float32"), jax.ShapeDtypeStruct((3, 5), "float32")
      >>> cost(jnp.dot, a, b)
      Cost(flop=60, bytes=124, products=1)
      >>> def loop(a, b):
      ...     return jax.lax.scan(lambda carry, _: (carry, a @ b), 0.0, length=7)
      >>> cost(loop, a, b).products
      7
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Any) -> Cost:
    total = Cost(0, 0, 0)
    for eqn in jaxpr.eqns:
        flop = _FLOP.get(eqn.primitive.name)
        if flop is not None:
            arrays = (*eqn.invars, *eqn.outvars)
            total += Cost(flop(eqn), sum(_bytes(v.aval) for v in arrays), 1)
            continue
        often = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        inner = [_of_jaxpr(each) for each in _inside(eqn)]
        if inner:  # of the branches of a condition the dearest
            total += max(inner).times(often)
    return total


def _inside(eqn: Any) -> list[Any]:
    found = []
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(value):
            found.append(getattr(value, "jaxpr", value))
    return found


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _of_convolution(eqn: Any) -> int:
    kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
    features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return int(2 * out.size * kernel.size // features)


def _of_product(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return int(2 * out.size * math.prod(left.shape[axis] for axis in contracted))


def _bytes(aval: Any) -> int:
    return int(aval.size * aval.dtype.itemsize)


_FLOP = {"conv_general_dilated": _of_convolution, "dot_general": _of_product}
