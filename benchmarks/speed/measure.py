"""Times that can be compared: interleaved, repeated, summed up by median and quartiles.

An *action* is a function without arguments that does something and returns how many seconds it
took. What is compared runs in turn, round after round, so that a slow minute of the machine is a
slow minute for all; ratios are taken within a round.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Action = Callable[[], float]

BLOCK = 0.05  # seconds at the least of what is timed: several calls where they are short
PAUSE = 0.2  # seconds between actions, for the threads of the last one to go to sleep
_LONG = 10.0  # seconds of a first call that was not for compiling alone


def timed(function: Callable[..., Any], *args: Any) -> Action:
    """Seconds of one call, from the call until its results are there. Compiled before.

    Example:
      >>> import jax.numpy as jnp
      >>> from benchmarks.speed.measure import timed
      >>> timed(jnp.sin, 1.0)() > 0
      True
    """
    return _blocks(lambda: jax.block_until_ready(function(*args)))


def carried(step: Callable[..., Any], carry: Any, *args: Any) -> Action:
    """Seconds of one ``carry = step(carry, *args)``, for steps whose carry is donated.

    Example:
      >>> import jax
      >>> from benchmarks.speed.measure import carried
      >>> carried(jax.jit(lambda x: x + 1, donate_argnums=0), jax.numpy.zeros(3))() > 0
      True
    """

    def call() -> None:
        nonlocal carry
        carry = jax.block_until_ready(step(carry, *args))

    return _blocks(call)


def scaled(action: Action, factor: float) -> Action:
    """``factor`` times the seconds of an action: a floor of many equal parts, one of them timed."""
    return lambda: factor * action()


def both(*actions: Action) -> Action:
    """The seconds of several actions, one after another: a floor of several parts."""
    return lambda: sum(action() for action in actions)


def interleave(
    actions: Mapping[str, Action], rounds: int, pause: float | None = None
) -> dict[str, list[float]]:
    """Seconds of every action in every round; the order turns from round to round.

    ``pause`` seconds before each, by default ``PAUSE``; none are needed among our own.

    Example:
      >>> from benchmarks.speed.measure import interleave
      >>> interleave({"a": lambda: 1.0, "b": lambda: 2.0}, 2)
      {'a': [1.0, 1.0], 'b': [2.0, 2.0]}
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(rounds):
        for name in list(actions) if i % 2 == 0 else reversed(actions):
            time.sleep(PAUSE if pause is None else pause)
            seconds[name].append(actions[name]())
    return seconds


def summary(values: list[float]) -> dict[str, Any]:
    """Median, quartiles and the values themselves.

    Example:
      >>> from benchmarks.speed.measure import summary
      >>> summary([3.0, 1.0, 2.0])["median"]
      2.0
    """
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {
        "median": float(median),
        "quartiles": [float(low), float(high)],
        "values": [float(v) for v in values],
    }


def ratio(values: list[float], of: list[float]) -> dict[str, Any]:
    """``values / of``, round by round, summed up.

    Example:
      >>> from benchmarks.speed.measure import ratio
      >>> ratio([2.0, 8.0], of=[1.0, 4.0])["median"]
      2.0
    """
    return summary([a / b for a, b in zip(values, of, strict=True)])


def _blocks(call: Callable[[], Any]) -> Action:
    first = _seconds(call, 1)  # compiles
    typical = first if first > _LONG else _seconds(call, 1)
    calls = max(1, round(BLOCK / typical))
    return lambda: _seconds(call, calls) / calls


def _seconds(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start
