"""Learning rates that settle the iterates before they are collected, or that go in cycles.

``collecting_schedule`` is the one to start with: an ordinary decayed run, and then a short second
part at a rate of its own to collect from, so that the mean starts at what the run would have given.
``swa_schedule`` falls to a constant at which SWAG collects. ``cyclical_schedule`` goes in cycles,
and ``at_minimum`` says after which steps its learning rate was lowest: a snapshot of each cycle. A
fast geometric ensemble is three lines:

    schedule = cyclical_schedule(0.05, 0.0005, cycle, start=start)
    tx = optax.chain(
        optax.sgd(schedule), swagjax.swag(rank, when=at_minimum(cycle, start=start))
    )
    probs = swagjax.predict(key, ensemble.Points(swagjax.iterates(state)), prob_fn, inputs)

with ``rank`` at least the number of cycles, and ``state`` collected by ``tx``.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from swagjax.transform import check_step

Shape = Literal["triangular", "cosine"]


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
    rates = "try 0.05 for init_value and 0.01 for swa_value."
    _check_rate("init_value", init_value, rates)
    _check_rate("swa_value", swa_value, rates)
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


def collecting_schedule(
    init_value: float, collect_value: float, settle: int, rise: int, *, settled: float = 0.01
) -> optax.Schedule:
    """Learning rate of an ordinary decayed run, and then of a second part to collect iterates from.

    With ``least = settled * init_value``, in steps:

        up to settle      as swa_schedule(init_value, least, settle)
        settle ... + rise a straight line from least to collect_value
        after that        collect_value: collect here, swagjax.swag(start=settle + rise)

    At step ``settle`` the weights are what plain training gives, the baseline to compare with, and
    the mean is collected around them. The rise keeps the iterates from being thrown out of a
    minimum that a high rate cannot hold. Choose ``collect_value`` on held-out data: tenths of
    ``init_value`` (0.1, 0.3, 1.0) are worth a trial each, and each costs a second part only.

    Args:
      init_value: learning rate at the start.
      collect_value: learning rate while iterates are collected.
      settle: steps of the ordinary run, 1 or more.
      rise: steps from its end to the first that may be collected, 1 or more: a fifth of the second
        part, which may be a quarter of the first.
      settled: learning rate at the end of the ordinary run, as a fraction of ``init_value``.

    Returns:
      A function from the step number to the learning rate, for any optax optimizer.

    Raises:
      ValueError: a learning rate or fraction that is negative or not finite, ``settle`` or ``rise``
        that is not an integer of at least 1. Rates may be traced, and are then not checked.

    Example:
      >>> import swagjax
      >>> schedule = swagjax.schedules.collecting_schedule(0.1, 0.03, settle=100, rise=10)
      >>> [round(float(schedule(step)), 4) for step in (0, 50, 70, 99, 105, 110, 1000)]
      [0.1, 0.1, 0.0505, 0.001, 0.0155, 0.03, 0.03]

    Source: Izmailov et al. 2018 (arXiv:1803.05407), section 3.2, which starts averaging from a
    pretrained network; the rise is ours.
    """
    _check_rate("collect_value", collect_value, "try 0.03.")
    _check_rate("settled", settled, "try 0.01 of init_value.")
    settle, rise = check_step("settle", settle, 1), check_step("rise", rise, 1)
    least = settled * init_value
    decayed = swa_schedule(init_value, least, settle)

    def schedule(step: ArrayLike) -> ArrayLike:
        risen = jnp.minimum((jnp.asarray(step, float) - settle) / rise, 1)
        rising = least + (collect_value - least) * risen
        return jnp.where(jnp.asarray(step) < settle, decayed(step), rising)

    return schedule


def cyclical_schedule(
    max_value: float,
    min_value: float,
    cycle: int,
    *,
    shape: Shape = "triangular",
    start: int = 0,
) -> optax.Schedule:
    """Learning rate in cycles, from ``max_value`` down to ``min_value`` and up again.

    With i = 1, 2, ... the updates since ``start``, c = ``cycle`` and a_1, a_2 the two values:

        triangular   t = ((i - 1) mod c + 1) / c
                     (1 - 2 t) a_1 + 2 t a_2            for t <= 1/2
                     (2 - 2 t) a_2 + (2 t - 1) a_1      for t > 1/2
        cosine       t = ((i - 1) mod c) / c
                     a_2 + (a_1 - a_2) (1 + cos(pi t)) / 2

    The triangle is ``min_value`` at the c/2-th update of every cycle and ``max_value`` at its last.
    The cosine begins every cycle at ``max_value`` and ends it just above ``min_value``, by
    (pi / 2c)^2 of the difference; then it jumps. ``at_minimum`` finds these steps.

    Args:
      max_value: a_1, the learning rate between two minima.
      min_value: a_2, the learning rate to which it falls; 0 gives updates of nothing at the minima.
      cycle: c, updates of a cycle; in steps, not in epochs. Even for the triangle.
      shape: ``"triangular"``, of fast geometric ensembles, or ``"cosine"``, of cyclical SG-MCMC.
      start: updates before the first cycle, at ``max_value``. For another way to warm up put it
        before the cycles by ``optax.join_schedules([warm_up, cycles], [start])``, with a ``start``
        of 0 here and the joint one in ``at_minimum``.

    Returns:
      A function from the step number (0 for the first update) to the learning rate, for any optax
      optimizer.

    Raises:
      ValueError: a learning rate that is negative or not finite, ``min_value`` above ``max_value``,
        a ``cycle`` below 2 or odd for the triangle, a negative ``start``, an unknown ``shape``.

    Example:
      >>> import swagjax
      >>> schedule = swagjax.schedules.cyclical_schedule(1.0, 0.2, 4, start=2)
      >>> [round(float(schedule(step)), 2) for step in range(10)]
      [1.0, 1.0, 0.6, 0.2, 0.6, 1.0, 0.6, 0.2, 0.6, 1.0]
      >>> cosine = swagjax.schedules.cyclical_schedule(1.0, 0.0, 4, shape="cosine")
      >>> [round(float(cosine(step)), 2) for step in range(6)]
      [1.0, 0.85, 0.5, 0.15, 1.0, 0.85]

    Source: the triangle from Garipov et al. 2018 (arXiv:1802.10026), section 4; the cosine from
    Zhang et al. 2020 (arXiv:1902.03932), equation 1, there with min_value = 0.
    """
    _check_rate("max_value", max_value, "try 0.05.")
    _check_rate("min_value", min_value, "try 0.0005.")
    if min_value > max_value:
        raise ValueError(
            f"min_value is {min_value!r} and max_value {max_value!r}: the first is the lower one, "
            "give cyclical_schedule(max_value, min_value, cycle)."
        )
    cycle, _ = _check_cycle(cycle, shape)
    start = check_step("start", start, 0)

    def schedule(step: ArrayLike) -> ArrayLike:
        done = jnp.asarray(step) - start  # updates of the cycles before this one
        passed = (done % cycle).astype(float) / cycle
        if shape == "cosine":
            share = (1 + jnp.cos(jnp.pi * passed)) / 2
        else:
            share = jnp.abs(2 * (passed + 1 / cycle) - 1)
        return jnp.where(done < 0, max_value, min_value + (max_value - min_value) * share)

    return schedule


def at_minimum(
    cycle: int, *, shape: Shape = "triangular", start: int = 0, last: int = 1
) -> Callable[[jax.Array], jax.Array]:
    """Whether the t-th update was taken at the minimum of ``cyclical_schedule``.

    For ``when=`` of ``swagjax.swag``, which counts t = 1, 2, ... and collects the iterate after the
    t-th update: for the triangle if ``(t - start) mod c = c / 2``, for the cosine if it is 0, the
    end of a cycle. With ``last`` above 1 also after the updates before the minimum, as cyclical
    SG-MCMC collects in the last part of every cycle.

    Args:
      cycle: c, as of the schedule.
      shape: as of the schedule.
      start: as of the schedule.
      last: how many updates of each cycle, the one at the minimum being the last of them.

    Returns:
      A function from t to a boolean.

    Raises:
      ValueError: for a bad argument, or a ``last`` that reaches back before the cycle.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> t = jnp.arange(1, 13)
      >>> print(t[swagjax.schedules.at_minimum(4, start=2)(t)])
      [ 4  8 12]
      >>> print(t[swagjax.schedules.at_minimum(4, shape="cosine", last=2)(t)])
      [ 3  4  7  8 11 12]

    Source: Garipov et al. 2018 (arXiv:1802.10026), algorithm 2; Zhang et al. 2020
    (arXiv:1902.03932), algorithm 1, whose sampling stage r(k) >= beta is
    ``last = floor((1 - beta) c)``.
    """
    cycle, lowest = _check_cycle(cycle, shape)
    start, last = check_step("start", start, 0), check_step("last", last, 1)
    if last > lowest:
        raise ValueError(
            f"last is {last}, but the {shape} cycle of {cycle} updates reaches its minimum after "
            f"{lowest}: give 1 to {lowest}."
        )

    def due(t: jax.Array) -> jax.Array:
        place = (t - start - 1) % cycle  # of the update in its cycle, from 0
        return (t > start) & (lowest - last <= place) & (place < lowest)

    return due


def _check_cycle(cycle: int, shape: str) -> tuple[int, int]:
    """The cycle, and after how many of its updates the minimum is reached."""
    cycle = check_step("cycle", cycle, 2)
    if shape not in ("triangular", "cosine"):
        raise ValueError(f"shape is {shape!r}: give 'triangular' or 'cosine'.")
    if shape == "cosine":
        return cycle, cycle
    if cycle % 2:
        raise ValueError(
            f"cycle is {cycle}, but the triangular one is lowest at half of it: give an even "
            f"number, such as {cycle + 1}."
        )
    return cycle, cycle // 2


def _check_rate(name: str, value: float, advice: str) -> None:
    if not isinstance(value, jax.core.Tracer) and not 0 <= value < math.inf:
        raise ValueError(
            f"{name} is {value!r}, but a learning rate must be finite and not negative: {advice}"
        )
