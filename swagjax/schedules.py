"""Learning-rate schedules that settle the iterates before they are collected."""

import math

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def swa_schedule(
    init_value: float,
    swa_value: float,
    start: float,
    *,
    anneal_begin: float = 0.5,
    anneal_end: float = 0.9,
) -> optax.Schedule:
    """Learning rate that is constant, falls linearly, and is constant while SWA collects.

    With ``t = step / start``: ``init_value`` until ``t = anneal_begin``, then a straight line that
    reaches ``swa_value`` at ``t = anneal_end``, and ``swa_value`` ever after. The step size has
    thus settled some time before step ``start``, the one to give to ``swagjax.swag(start=...)``.

    Args:
      init_value: learning rate of the ordinary training.
      swa_value: learning rate while iterates are collected; larger than ``init_value`` is allowed.
      start: step at which collecting starts, 1 or more; counted in steps, not in epochs.
      anneal_begin: where the line begins, as a fraction of ``start``.
      anneal_end: where the line ends, as a fraction of ``start``.

    Returns:
      A function from the step number to the learning rate, for any optax optimizer.

    Raises:
      ValueError: a learning rate that is negative or not finite, ``start`` below 1, or fractions
        that are not ``0 <= anneal_begin < anneal_end <= 1``.

    Example:
      >>> import swagjax
      >>> schedule = swagjax.schedules.swa_schedule(0.1, 0.02, start=100)
      >>> [round(float(schedule(step)), 3) for step in (0, 50, 70, 90, 1000)]
      [0.1, 0.1, 0.06, 0.02, 0.02]

    Source: the schedule of the experiments of Maddox et al. (2019), "A Simple Baseline for Bayesian
    Uncertainty in Deep Learning", after Izmailov et al. (2018), "Averaging Weights Leads to Wider
    Optima and Better Generalization".
    """
    _check_rate("init_value", init_value)
    _check_rate("swa_value", swa_value)
    if not 1 <= start < math.inf:
        raise ValueError(
            f"start is {start!r}, but must be a finite number of steps of 1 or more: multiply the "
            "epoch at which collecting starts by the steps per epoch."
        )
    if not 0 <= anneal_begin < anneal_end <= 1:
        raise ValueError(
            f"anneal_begin is {anneal_begin!r} and anneal_end {anneal_end!r}, but they must be "
            "fractions of start with 0 <= anneal_begin < anneal_end <= 1: try 0.5 and 0.9."
        )
    # The line runs over one unit of rescaled time: optax counts whole steps, and rounding the ends
    # to steps would leave no line at all for a small start.
    line = optax.linear_schedule(init_value, swa_value, transition_steps=1)
    begin, length = anneal_begin * start, (anneal_end - anneal_begin) * start

    def schedule(step: ArrayLike) -> ArrayLike:
        return line((jnp.asarray(step, float) - begin) / length)

    return schedule


def _check_rate(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(
            f"{name} is {value!r}, but a learning rate must be finite and not negative: "
            "try 0.05 for init_value and 0.01 for swa_value."
        )
