"""What a compiled program says of itself: temporary memory, and operations on the ring."""

import math
import re
from typing import Any

_SHAPE = re.compile(r"\b(f32|bf16|f64|u32|s32|pred)\[([\d,]*)\]")
_BYTES = {"f32": 4, "bf16": 2, "f64": 8, "u32": 4, "s32": 4, "pred": 1}


def temporary_bytes(compiled: Any) -> int:
    """Bytes that a compiled program allocates beside its arguments and results."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def largest_result(compiled: Any, operation: str, leading: int | None = None) -> int:
    """Bytes of the largest result of an operation in the text of a program; 0 where it has none.

    With ``leading`` only of results with a first axis of that length, such as a ring's.

    Example:
      >>> import jax
      >>> from benchmarks.speed.programs import largest_result
      >>> compiled = jax.jit(lambda x: jax.lax.cond(x[0] > 0, jax.numpy.sin, jax.numpy.cos, x))
      >>> compiled = compiled.lower(jax.numpy.ones(3)).compile()
      >>> largest_result(compiled, "conditional"), largest_result(compiled, "all-gather")
      (12, 0)
    """
    sizes = [0]
    for line in compiled.as_text().splitlines():
        result, _, call = line.partition(f" {operation}")
        if call[:1] == "(" or call.startswith("-start("):
            found = _SHAPE.findall(result.partition("=")[2])
            shapes = [(dtype, [int(d) for d in axes.split(",") if d]) for dtype, axes in found]
            sizes += [
                _BYTES[dtype] * math.prod(shape)
                for dtype, shape in shapes
                if leading is None or shape[:1] == [leading]
            ]
    return max(sizes)
