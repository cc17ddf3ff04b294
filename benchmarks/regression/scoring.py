"""The final trainings, and every metric of every method on the test rows of every split."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import swagjax
from benchmarks.regression import training
from benchmarks.regression.data import Parts
from benchmarks.regression.methods import Draw, Method, outputs
from benchmarks.regression.training import Plan
from benchmarks.regression.tuning import Choice, shortened
from benchmarks.stages import Stage
from swagjax import diagnostics, metrics

METRICS = ("RMSE", "NLL", "mixture", "CRPS", "coverage", "width")  # mixture: its NLL
LEAST_RANK = 4  # for diagnostics
DIAGNOSED = "SWAG"  # the method whose iterates are looked at
Scores = dict[str, dict[str, list[float]]]  # method -> metric -> one value a split


class Scored(NamedTuple):
    """Metrics of every method, and of the iterates of SWAG what ``diagnostics`` says of them.

    Attributes:
      scores: one value a split.
      iterates: one value a split, a list where a diagnostic is a curve; empty without SWAG.
    """

    scores: Scores
    iterates: dict[str, list[Any]]


def scores(
    methods: Mapping[str, Method],
    chosen: Mapping[str, list[Choice]],
    members: int,
    plan: Plan,
    parts: Parts,
    stage: Stage,
) -> Scored:
    """Train on the whole train parts with what was chosen, and score on the test parts.

    Methods that chose the same of one algorithm share the trainings of it.
    """
    groups: dict[Any, list[str]] = {}
    for name, choices in chosen.items():
        settings = tuple((choice.hyper, choice.epochs) for choice in choices)
        groups.setdefault((methods[name].algorithm, settings), []).append(name)
    done: Scores = {}
    iterates: dict[str, list[Any]] = {}
    for names in groups.values():
        of_group = {name: chosen[name] for name in names}
        compute = partial(_group, methods, of_group, members, plan, parts)
        scored = Scored(**stage("final, " + ", ".join(names), compute))
        done |= scored.scores
        iterates |= scored.iterates
    return Scored({name: done[name] for name in chosen}, iterates)


def _group(
    methods: Mapping[str, Method],
    chosen: Mapping[str, list[Choice]],
    members: int,
    plan: Plan,
    parts: Parts,
) -> dict[str, Any]:
    first = next(iter(chosen))
    algorithm, choices = methods[first].algorithm, chosen[first]
    members = members if any(methods[name].ensemble for name in chosen) else 1
    test_x = jnp.asarray(parts.test_x)
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in chosen}
    iterates: dict[int, dict[str, Any]] = {}
    for epochs in sorted({choice.epochs for choice in choices}):
        splits = [i for i, choice in enumerate(choices) if choice.epochs == epochs]
        runs = training.runs([(i, choices[i].hyper) for i in splits], members)
        of_length = shortened(plan, parts, epochs)
        made = algorithm(of_length), of_length, parts, runs
        runs, trained = training.train_guarded(", ".join(chosen), *made)
        by_split = jax.tree.map(
            lambda leaf: leaf.reshape(-1, members, *leaf.shape[1:]), (runs, trained)
        )
        for name in chosen:
            used = members if methods[name].ensemble else 1
            own = jax.tree.map(lambda leaf, used=used: leaf[:, :used], by_split)
            scales = jnp.array([chosen[name][i].scale for i in splits])
            drawn = _outputs(methods[name].draw, plan.num_samples, test_x, own, scales)
            for i, means, variances in zip(splits, *jax.device_get(drawn), strict=True):
                found[name][i] = _metrics(means, variances * chosen[name][i].noise, parts, i)
        if DIAGNOSED in chosen and plan.rank >= LEAST_RANK:
            run, first_of = jax.tree.map(lambda leaf: leaf[:, 0], by_split)
            used = {name: getattr(run.hyper, name) for name in ("learning_rate", "collecting")}
            told = _diagnose(first_of.state.opt_state) | used
            said = jax.tree.map(np.ndarray.tolist, jax.device_get(told))
            states = swagjax.get_state(first_of.state.opt_state)
            each = [jax.tree.map(lambda leaf, j=j: leaf[j], states) for j in range(len(splits))]
            said["verdict"] = [_verdict(state) for state in each]
            iterates |= {i: {k: v[j] for k, v in said.items()} for j, i in enumerate(splits)}
    return {
        "scores": {name: _by_name(of) for name, of in found.items()},
        "iterates": _by_name(iterates),
    }


def _verdict(state: swagjax.SWAGState) -> str:
    if int(state.num_collected) < LEAST_RANK:  # too few for a report
        return "diverged" if int(state.num_skipped) else "few"
    return diagnostics.report(state).verdict


def _by_name(of_splits: dict[int, dict[str, Any]]) -> dict[str, list[Any]]:
    """One list a name, in the order of the splits."""
    names = next(iter(of_splits.values()), {})
    return {name: [of_splits[i][name] for i in sorted(of_splits)] for name in names}


@partial(jax.jit, static_argnums=(0, 1))  # SWAG at any scale is one program
def _outputs(
    draw: Draw, num_samples: int, test_x: jax.Array, by_split: Any, scales: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Means and variances ``(splits, S, M)`` of the standardised targets, padding included."""

    def of_split(one: Any) -> Any:
        (runs, members), scale = one
        keys = jax.vmap(training.key, (0, 0, None))(runs.member, runs.split, training.PREDICT)
        return outputs(draw, num_samples, keys, members, runs.hyper, scale, test_x[runs.split[0]])

    return jax.lax.map(of_split, (by_split, scales))


@jax.jit
def _diagnose(opt_states: Any) -> dict[str, jax.Array]:
    """What the library's diagnostics say of the state of every split."""

    def of_one(state: swagjax.SWAGState) -> dict[str, jax.Array]:
        drift, count = diagnostics.drift(state), diagnostics.effective_count(state)
        captured = diagnostics.captured_variance(state)
        return {
            "collected": state.num_collected,
            **drift._asdict(),
            **count._asdict(),
            **captured._asdict(),
        }

    return jax.lax.map(of_one, swagjax.get_state(opt_states))


def _metrics(
    means: np.ndarray, variances: np.ndarray, parts: Parts, split: int
) -> dict[str, float]:
    """Every metric of one split, in the units of the targets."""
    rows, std = parts.test_rows[split], float(parts.y_std[split])
    values = _standardised(means[:, :rows], variances[:, :rows], parts.test_y[split, :rows])
    found = dict(zip(METRICS, map(float, values), strict=True))
    lengths = {name: found[name] * std for name in ("RMSE", "CRPS", "width")}
    densities = {name: found[name] + math.log(std) for name in ("NLL", "mixture")}
    return found | lengths | densities | {"standardised NLL": found["NLL"]}


@jax.jit  # where a training diverged the scores are NaN: the metrics raise outside jit alone
def _standardised(means: jax.Array, variances: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    mean, variance = metrics.moment_match(means, variances)
    return (
        metrics.rmse(mean, y),
        metrics.gaussian_nll(mean, variance, y),
        metrics.mixture_nll(means, variances, y),
        metrics.mixture_crps(means, variances, y),
        metrics.coverage(mean, variance, y),
        metrics.interval_width(variance),
    )
