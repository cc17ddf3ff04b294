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
from benchmarks.regression.methods import Calibration, Method, outputs
from benchmarks.regression.training import Hyper, Plan
from benchmarks.stages import Stage
from swagjax import metrics


class Grid(NamedTuple):
    """What is tried: every combination, but that dropout rates take the place of weight decays.

    Dropout is a regulariser itself, and so all algorithms have grids of one size; it is trained
    with the least weight decay. An algorithm of two parts tries every combination at all but the
    longest of the epochs, each with a second part at every rate of collecting; the longest is what
    the two parts take together, for the others to have as much.

    Attributes:
      learning_rates: of the first step.
      weight_decays: L2 penalties.
      dropouts: rates of MC-dropout.
      collecting: learning rates of the second part, as shares of that of the first step.
      epochs: lengths of a run.
    """

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    dropouts: tuple[float, ...]
    collecting: tuple[float, ...]
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
    methods: Mapping[str, Method],
    names: Sequence[str],
    grid: Grid,
    plan: Plan,
    held_out: Parts,
    splits: int,
    stage: Stage,
) -> dict[str, list[Choice]]:
    """For every method a choice per split, by the least NLL on its held-out rows.

    Args:
      methods: all there are.
      names: of those that are compared.
      grid: what all try in training, side by side.
      plan: sizes and lengths of the final training.
      held_out: train rows to train on and train rows to choose by; where all splits come several
        times, their NLL is averaged.
      splits: how many there are.
      stage: runs a computation, or remembers what it gave.
    """
    deciding = dict.fromkeys(methods[name].chosen_as or name for name in names)
    chosen: dict[str, list[Choice]] = {}
    for algorithm in dict.fromkeys(methods[name].algorithm for name in deciding):
        group = {name: methods[name] for name in deciding if methods[name].algorithm is algorithm}
        chosen |= _of_algorithm(algorithm, group, grid, plan, held_out, splits, stage)
    return {name: chosen[methods[name].chosen_as or name] for name in names}


def _of_algorithm(
    algorithm: Any,
    methods: dict[str, Method],
    grid: Grid,
    plan: Plan,
    held_out: Parts,
    splits: int,
    stage: Stage,
) -> dict[str, list[Choice]]:
    """The choices of methods that share a search; where there is no choice, nothing is trained."""
    hypers, rates, lengths = _hypers(grid, algorithm), *_parts(grid, algorithm)
    every = itertools.product(lengths, hypers, rates)
    trained = [(hyper._replace(collecting=rate), epochs) for epochs, hyper, rate in every]
    options = {name: _options(trained, method.tried) for name, method in methods.items()}
    only = {name: [of[0]] * splits for name, of in options.items()}
    searched = {name: methods[name] for name, of in options.items() if len(of) > 1}
    if not searched:
        return only
    tables = [
        stage(
            f"search, {algorithm.__name__}, {epochs} epochs",
            partial(_search, algorithm, hypers, rates, epochs, searched, plan, held_out),
        )
        for epochs in lengths
    ]
    nll = {name: np.concatenate([of[name] for of in tables], axis=1) for name in searched}
    best = {name: _least(nll[name].reshape(-1, splits, len(options[name]))) for name in searched}
    return only | {name: [options[name][i] for i in best[name]] for name in searched}


def _least(nll: np.ndarray) -> np.ndarray:
    """Options of least mean NLL ``(times, splits, options)``; none of a training that diverged."""
    mean = nll.mean(0)
    return np.argmin(np.where(np.isfinite(mean), mean, np.inf), axis=1)


def _options(trained: list[tuple[Hyper, int]], calibration: Calibration) -> list[Choice]:
    """All choices of a method, in the order of the tables of ``_search``."""
    every = itertools.product(trained, calibration.scales, calibration.noises)
    return [Choice(*of, scale, noise) for of, scale, noise in every]


def _parts(grid: Grid, algorithm: Any) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Rates of collecting, and lengths of the run or of its first part."""
    if algorithm is algorithms.settled_sgd:
        return grid.collecting, grid.epochs[:-1]
    return (0.0,), grid.epochs


def _hypers(grid: Grid, algorithm: Any) -> list[Hyper]:
    if algorithm is algorithms.dropout_sgd:
        decay = min(grid.weight_decays)
        return [Hyper(rate, decay, drop) for rate in grid.learning_rates for drop in grid.dropouts]
    return [Hyper(rate, decay, 0.0) for rate in grid.learning_rates for decay in grid.weight_decays]


def _search(
    algorithm: Any,
    hypers: list[Hyper],
    rates: tuple[float, ...],
    epochs: int,
    methods: dict[str, Method],
    plan: Plan,
    parts: Parts,
) -> dict[str, list[list[float]]]:
    """NLL of every method ``(splits, candidates * rates * scales * noises)`` on held-out rows."""
    plan = shortened(plan, parts, epochs)
    splits = range(len(parts.rows))
    runs = training.runs([(split, hyper) for split in splits for hyper in hypers], members=1)
    label, steps = f"search: {algorithm.__name__.replace('_', ' ')}", algorithm(plan)
    first = training.train(label, steps, plan, parts, runs, epochs=range(1, plan.epochs + 1))
    of_rates = []
    for rate in rates:
        runs = runs._replace(hyper=runs.hyper._replace(collecting=jnp.full(len(runs.split), rate)))
        trained = first
        if steps.collecting:
            # A copy, as the second part works in the memory of the first.
            parted = {"epochs": steps.collecting, "after": jax.tree.map(jnp.copy, first)}
            trained = training.train(f"{label}, {rate:g}", steps, plan, parts, runs, **parted)
        found = {name: _nll(method, plan, parts, runs, trained) for name, method in methods.items()}
        of_rates.append(
            {name: of.reshape(len(splits), len(hypers), -1) for name, of in found.items()}
        )
    return {
        name: np.stack([of[name] for of in of_rates], 2).reshape(len(splits), -1).tolist()
        for name in methods
    }


def _nll(method: Method, plan: Plan, parts: Parts, runs: Any, trained: Any) -> np.ndarray:
    """NLL ``(runs, scales, noises)`` of the moment-matched Gaussian, of standardised targets."""
    x, y = jnp.asarray(parts.test_x), jnp.asarray(parts.test_y)  # parts of one size: no padding
    scales, noises = map(jnp.array, method.tried)

    def of_run(one: Any) -> jax.Array:
        run, member = one
        key = training.key(run.member, run.split, training.PREDICT)
        alone = jax.tree.map(lambda leaf: leaf[None], (key, member, run.hyper))

        def of_scale(scale: jax.Array) -> jax.Array:
            means, variances = outputs(method.draw, plan.num_samples, *alone, scale, x[run.split])

            def of_noise(noise: jax.Array) -> jax.Array:
                moments = metrics.moment_match(means, noise * variances)
                return metrics.gaussian_nll(*moments, y[run.split])

            return jax.vmap(of_noise)(noises)

        return jax.lax.map(of_scale, scales)

    return np.asarray(jax.jit(partial(jax.lax.map, of_run))((runs, trained)))
