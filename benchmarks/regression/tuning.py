"""Hyper-parameters chosen split by split on held-out rows of its train part, never on test rows."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.regression import algorithms, training
from benchmarks.regression.data import Parts
from benchmarks.regression.methods import METHODS, Calibration, Draw, outputs
from benchmarks.regression.training import Hyper, Plan
from benchmarks.stages import Stage
from swagjax import metrics


class Grid(NamedTuple):
    """What is tried: every combination, but that dropout rates take the place of weight decays.

    Dropout is a regulariser itself, and so all algorithms have grids of one size; it is trained
    with the least weight decay.
    """

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    dropouts: tuple[float, ...]
    epochs: tuple[int, ...]


class Choice(NamedTuple):
    """What one method uses on one split."""

    hyper: Hyper
    epochs: int
    scale: float
    noise: float


def shortened(plan: Plan, parts: Parts, epochs: int) -> Plan:
    """The plan for these train rows and these epochs, of which collecting has its share."""
    fewest = int(parts.rows.min())
    batch_size = min(plan.batch_size, fewest)
    start = min(round(plan.start * epochs / plan.epochs), epochs - 1)  # collects at least once
    steps = fewest // batch_size
    return plan._replace(batch_size=batch_size, epochs=epochs, start=start, steps=steps)


def choose(
    names: Sequence[str],
    calibrations: Mapping[str, Calibration],
    grid: Grid,
    plan: Plan,
    held_out: Parts,
    splits: int,
    stage: Stage,
) -> dict[str, list[Choice]]:
    """For every method a choice per split, by the least NLL on its held-out rows.

    Args:
      names: methods.
      calibrations: what each tries after training.
      grid: what all try in training, side by side.
      plan: sizes and lengths of the final training.
      held_out: train rows to train on and train rows to choose by; where all splits come several
        times, their NLL is averaged.
      splits: how many there are.
      stage: runs a computation, or remembers what it gave.
    """
    deciding = dict.fromkeys(METHODS[name].chosen_as or name for name in names)
    chosen: dict[str, list[Choice]] = {}
    for algorithm in dict.fromkeys(METHODS[name].algorithm for name in deciding):
        group = [name for name in deciding if METHODS[name].algorithm is algorithm]
        tried = {name: calibrations[name] for name in group}
        chosen |= _of_algorithm(algorithm, tried, grid, plan, held_out, splits, stage)
    return {name: chosen[METHODS[name].chosen_as or name] for name in names}


def _of_algorithm(
    algorithm: Any,
    calibrations: dict[str, Calibration],
    grid: Grid,
    plan: Plan,
    held_out: Parts,
    splits: int,
    stage: Stage,
) -> dict[str, list[Choice]]:
    """The choices of methods that share a search; where there is no choice, nothing is trained."""
    hypers = _hypers(grid, algorithm)
    options = {name: _options(hypers, grid, tried) for name, tried in calibrations.items()}
    first = {name: [of[0]] * splits for name, of in options.items()}
    searched = {name: calibrations[name] for name, of in options.items() if len(of) > 1}
    if not searched:
        return first
    tables = [
        stage(
            f"search, {algorithm.__name__}, {epochs} epochs",
            partial(_search, algorithm, hypers, epochs, searched, plan, held_out),
        )
        for epochs in grid.epochs
    ]
    nll = {name: np.concatenate([of[name] for of in tables], axis=1) for name in searched}
    best = {name: _least(nll[name].reshape(-1, splits, len(options[name]))) for name in searched}
    return first | {name: [options[name][i] for i in best[name]] for name in searched}


def _least(nll: np.ndarray) -> np.ndarray:
    """Options of least mean NLL ``(times, splits, options)``; none of a training that diverged."""
    mean = nll.mean(0)
    return np.argmin(np.where(np.isfinite(mean), mean, np.inf), axis=1)


def _options(hypers: list[Hyper], grid: Grid, calibration: Calibration) -> list[Choice]:
    """All choices of a method, in the order of the tables of ``_search``."""
    every = itertools.product(grid.epochs, hypers, calibration.scales, calibration.noises)
    return [Choice(hyper, epochs, scale, noise) for epochs, hyper, scale, noise in every]


def _hypers(grid: Grid, algorithm: Any) -> list[Hyper]:
    if algorithm is algorithms.dropout_sgd:
        decay = min(grid.weight_decays)
        return [Hyper(rate, decay, drop) for rate in grid.learning_rates for drop in grid.dropouts]
    return [Hyper(rate, decay, 0.0) for rate in grid.learning_rates for decay in grid.weight_decays]


def _search(
    algorithm: Any,
    hypers: list[Hyper],
    epochs: int,
    calibrations: dict[str, Calibration],
    plan: Plan,
    parts: Parts,
) -> dict[str, list[list[float]]]:
    """NLL of every method ``(splits, candidates * scales * noises)`` on the held-out rows."""
    plan = shortened(plan, parts, epochs)
    splits = range(len(parts.rows))
    runs = training.runs([(split, hyper) for split in splits for hyper in hypers], members=1)
    label = f"search: {algorithm.__name__.replace('_', ' ')}"
    trained = training.train(label, algorithm(plan), plan, parts, runs)
    return {
        name: _nll(METHODS[name].draw, calibration, plan, parts, runs, trained)
        .reshape(len(splits), -1)
        .tolist()
        for name, calibration in calibrations.items()
    }


def _nll(
    draw: Draw, calibration: Calibration, plan: Plan, parts: Parts, runs: Any, trained: Any
) -> np.ndarray:
    """NLL ``(runs, scales, noises)`` of the moment-matched Gaussian, of standardised targets."""
    x, y = jnp.asarray(parts.test_x), jnp.asarray(parts.test_y)  # parts of one size: no padding
    scales, noises = map(jnp.array, calibration)

    def of_run(one: Any) -> jax.Array:
        run, member = one
        key = training.key(run.member, run.split, training.PREDICT)
        alone = jax.tree.map(lambda leaf: leaf[None], (key, member, run.hyper))

        def of_scale(scale: jax.Array) -> jax.Array:
            means, variances = outputs(draw, plan.num_samples, *alone, scale, x[run.split])

            def of_noise(noise: jax.Array) -> jax.Array:
                moments = metrics.moment_match(means, noise * variances)
                return metrics.gaussian_nll(*moments, y[run.split])

            return jax.vmap(of_noise)(noises)

        return jax.lax.map(of_scale, scales)

    return np.asarray(jax.jit(partial(jax.lax.map, of_run))((runs, trained)))
