"""The regression benchmark: data, trainings, tuning, paired tests, and its command."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import swagjax
from benchmarks import __main__ as command_line
from benchmarks import options, report, stages
from benchmarks.experiments import uci
from benchmarks.regression import (
    algorithms,
    data,
    methods,
    network,
    published,
    scoring,
    training,
    tuning,
)
from swagjax import diagnostics

ROOT = Path(__file__).parent.parent
UCI = Path(os.environ.get("SWAGJAX_DATA", ROOT.parent / "shared" / "data"))
HYPER = training.Hyper(0.01, 0.1, 0.2)
PLAN = training.Plan((4,), 8, epochs=3, start=1, steps=4, rank=2, num_samples=4)

needs_data = pytest.mark.skipif(
    not (UCI / "uci").is_dir(), reason=f"no data sets in {UCI}: set SWAGJAX_DATA"
)


def rows(count, inputs=3, seed=0):
    """A table whose last column is a noisy function of the others."""
    x = np.random.default_rng(seed).normal(5, 2, (count, inputs))
    noise = np.random.default_rng(seed + 1).normal(0, 0.3, count)
    return np.column_stack([x, 7 + 3 * np.sin(x).sum(1) + noise])


def write_indexed(folder, table, splits):
    """The layout of the MC-dropout experiments, the target in the first column."""
    folder = folder / "data"
    folder.mkdir(parents=True)
    np.savetxt(folder / "data.txt", np.roll(table, 1, axis=1))
    np.savetxt(folder / "index_features.txt", np.arange(1, table.shape[1]))
    np.savetxt(folder / "index_target.txt", [0])
    np.savetxt(folder / "n_splits.txt", [len(splits)], fmt="%d")
    for i, split in enumerate(splits):
        np.savetxt(folder / f"index_train_{i}.txt", split.train, fmt="%d")
        np.savetxt(folder / f"index_test_{i}.txt", split.test)  # as 1.0e+00, which some have


def write_masked(folder, table, splits):
    """The layout of ``uci_datasets``."""
    folder.mkdir(parents=True)
    masks = np.stack([np.isin(np.arange(len(table)), split.test) for split in splits], 1)
    np.savetxt(folder / "data.csv.gz", table, delimiter=",")
    np.savetxt(folder / "test_mask.csv.gz", masks, delimiter=",", fmt="%d")


def ragged(count, splits=3):
    """Splits that test on 6, 7, 8, ... rows."""
    orders = [np.random.default_rng(i).permutation(count) for i in range(splits)]
    return [data.Split(order[6 + i :], order[: 6 + i]) for i, order in enumerate(orders)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of either layout, in folders beside each other."""
    found = tmp_path_factory.mktemp("data")
    write_indexed(found / "uci" / "indexed", rows(60), ragged(60))
    write_masked(found / "large" / "masked", rows(61, 2), ragged(61))
    return found


# data


def test_both_layouts_are_read_wherever_they_are_in_the_folder(folder):
    indexed, masked = sorted(data.load((), folder))
    np.testing.assert_allclose(indexed.inputs, rows(60)[:, :-1])
    np.testing.assert_allclose(indexed.targets, rows(60)[:, -1])
    np.testing.assert_allclose(masked.inputs, rows(61, 2)[:, :-1])
    np.testing.assert_allclose(masked.targets, rows(61, 2)[:, -1])
    for found, splits in ((indexed, ragged(60)), (masked, ragged(61))):
        for one, wanted in zip(found.splits, splits, strict=True):
            assert set(one.train) == set(wanted.train)
            assert set(one.test) == set(wanted.test)
    assert [d.name for d in data.load(["masked"], folder / "large")] == ["masked"]
    assert [d.name for d in data.load((), folder / "uci" / "indexed")] == ["indexed"]


def test_without_a_folder_there_is_diabetes():
    (only,) = data.load((), None)
    assert only.inputs.shape == (442, 10)
    assert len(only.splits) == 20
    for split in only.splits:
        assert sorted(np.concatenate(split)) == list(range(442))


def test_parts_are_standardised_by_their_train_rows_and_keep_every_row():
    table = np.column_stack([rows(40), np.full(40, 0.1)])[:, [0, 1, 2, 4, 3]]  # one is constant
    dataset = data.Dataset("x", table[:, :-1], table[:, -1], ragged(40), "")
    parts = data.parts(dataset, dataset.splits)
    assert list(parts.rows) == [34, 33, 32]
    assert list(parts.test_rows) == [6, 7, 8]
    for i, split in enumerate(dataset.splits):
        x, y = parts.x[i, : parts.rows[i]], parts.y[i, : parts.rows[i]]
        np.testing.assert_allclose(x.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(x.std(0), [1, 1, 1, 0], atol=1e-5)
        back = parts.test_y[i, : parts.test_rows[i]] * parts.y_std[i] + parts.y_mean[i]
        np.testing.assert_allclose(back, dataset.targets[split.test], rtol=1e-5)
        np.testing.assert_allclose([y.mean(), y.std()], [0, 1], atol=1e-6)


def test_test_rows_leak_into_nothing_that_is_trained_on():
    dataset = data.Dataset("x", rows(40)[:, :-1], rows(40)[:, -1], ragged(40)[:1], "")
    (split,) = dataset.splits
    spoilt = dataset._replace(inputs=dataset.inputs.copy(), targets=dataset.targets.copy())
    spoilt.inputs[split.test], spoilt.targets[split.test] = 1e6, -1e6
    for splits in (dataset.splits, data.held_out(dataset.splits)):
        clean, other = (data.parts(each, splits) for each in (dataset, spoilt))
        np.testing.assert_array_equal(clean.x, other.x)
        np.testing.assert_array_equal(clean.y, other.y)
    np.testing.assert_array_equal(clean.test_y, other.test_y)  # those held out, too


def test_held_out_rows_are_a_fifth_of_the_train_rows_and_apart():
    once, twice = (data.held_out(ragged(60), times) for times in (1, 2))
    for split, inner in zip(ragged(60) * 2, twice, strict=True):
        assert len(inner.test) == int(0.2 * 52)
        assert sorted(np.concatenate(inner)) == sorted(split.train)
    for inner, same, other in zip(once, twice[:3], twice[3:], strict=True):
        np.testing.assert_array_equal(inner.test, same.test)
        assert set(inner.test) != set(other.test)


def test_of_several_holdouts_the_mean_decides():
    nll = np.array([[[0.0, 1.0, 0.2], [1.0, 3.0, np.nan]], [[2.0, 1.5, 0.2], [3.0, 0.5, 0.0]]])
    np.testing.assert_array_equal(tuning._least(nll), [2, 1])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "index_target.txt").unlink(), "index_target.txt: there is no such file"),
        (lambda f: (f / "index_test_1.txt").write_text("0\n60\n"), "index_test_1.txt: not all"),
        (lambda f: (f / "index_test_1.txt").write_text("0.5\n"), "index_test_1.txt: not all"),
        (lambda f: (f / "index_test_1.txt").write_text("0\n" * 60), "trains on|index_test_1"),
        (lambda f: (f / "index_train_0.txt").write_text("1\n2\n"), "2 train"),
        (lambda f: (f / "n_splits.txt").write_text("4\n"), "index_train_3.txt: there is no"),
        (lambda f: (f / "n_splits.txt").write_text("many\n"), "n_splits.txt"),
        (lambda f: (f / "n_splits.txt").write_text("2 3\n"), "n_splits.txt"),
        (lambda f: (f / "n_splits.txt").write_text("0\n"), "n_splits.txt"),
        (lambda f: (f / "data.txt").write_text("1 2\n3\n"), "data.txt"),
        (lambda f: (f / "data.txt").write_text("1 nan\n"), "data.txt: .*not finite"),
        (lambda f: (f / "data.txt").write_text(""), "data.txt: empty"),
    ],
)
def test_a_malformed_indexed_folder_is_one_clear_error(spoil, said, tmp_path):
    write_indexed(tmp_path / "a", rows(60), ragged(60))
    spoil(tmp_path / "a" / "data")
    with pytest.raises(options.UsageError, match=said):
        list(data.load((), tmp_path))


@pytest.mark.parametrize("mask", ["0,1\n" * 60, "0,2\n" * 61, "1,0\n" * 61])
def test_a_malformed_mask_is_one_clear_error(mask, tmp_path):
    write_masked(tmp_path / "a", rows(61), ragged(61))
    (tmp_path / "a" / "test_mask.csv.gz").unlink()
    (tmp_path / "a" / "test_mask.csv.gz").write_text(mask)
    with pytest.raises(options.UsageError, match=str(tmp_path / "a")):
        list(data.load((), tmp_path))


def test_a_name_in_two_folders_is_refused(tmp_path):
    for level in ("x", "y"):
        write_masked(tmp_path / level / "a", rows(61), ragged(61))
    with pytest.raises(options.UsageError, match="give the folder above one of them"):
        data.load((), tmp_path)


@needs_data
@pytest.mark.data
def test_all_real_data_sets_are_read():
    found = {d.name: d for d in data.load((), UCI)}
    assert found["concrete"].inputs.shape == (1030, 8)
    assert len(found["concrete"].splits) == 20
    assert len(found["elevators"].splits) == 10
    for dataset in found.values():
        parts = data.parts(dataset, dataset.splits)
        assert np.isfinite(parts.x).all()
        for split in dataset.splits:
            assert len(split.train) + len(split.test) == len(dataset.targets)


# the network


def test_the_density_is_the_normal_one():
    params = network.init(jax.random.key(0), 3, (5, 4))
    x, y = rows(7)[:, :-1], rows(7)[:, -1]
    h = x
    for layer in params["layers"][:-1]:
        h = np.maximum(h @ np.float64(layer["w"]) + np.float64(layer["b"]), 0)
    last = params["layers"][-1]
    mean, raw = (h @ np.float64(last["w"]) + np.float64(last["b"])).T
    variance = np.log1p(np.exp(raw)) + np.log(2) + network.LEAST
    found = jax.jit(network.log_density)(params, x, y)
    np.testing.assert_allclose(found, stats.norm.logpdf(y, mean, np.sqrt(variance)), rtol=1e-4)


def test_thinned_weights_are_dropout_of_hidden_units():
    params = network.init(jax.random.key(0), 3, (400,))
    thin = network.thinned(params, jax.random.key(1), 0.25)
    np.testing.assert_array_equal(thin["layers"][0]["w"], params["layers"][0]["w"])
    ratio = np.asarray(thin["layers"][1]["w"] / params["layers"][1]["w"])
    np.testing.assert_array_equal(ratio[:, 0] == 0, ratio[:, 1] == 0)  # whole units
    np.testing.assert_allclose(ratio[ratio > 0], 1 / 0.75, rtol=1e-5)
    # 400 draws of 3/4: within 6 standard deviations but for one key in 10^8
    assert abs((ratio[:, 0] > 0).mean() - 0.75) < 6 * np.sqrt(0.25 * 0.75 / 400)


# training


@pytest.fixture(scope="module")
def parts():
    dataset = data.Dataset("x", rows(40)[:, :-1], rows(40)[:, -1], ragged(40), "")
    return data.parts(dataset, dataset.splits)


def trained(algorithm, parts, candidates, members=1, plan=PLAN):
    runs = training.runs(candidates, members)
    return training.train("", algorithm(plan), plan, parts, runs)


@pytest.mark.slow
def test_a_run_is_the_same_whatever_is_beside_it_and_in_the_padding(parts):
    """Alone, and in a crowd whose padding would spoil all that it touches."""
    x, y = parts.x.copy(), parts.y.copy()
    for i, count in enumerate(parts.rows):
        x[i, count:], y[i, count:] = np.nan, np.nan
    assert np.isnan(x).any()
    other = HYPER._replace(learning_rate=0.02)
    candidates = [(split, hyper) for split in range(3) for hyper in (HYPER, other)]
    spoilt = parts._replace(x=x, y=y)
    many = trained(algorithms.decayed_sgd, spoilt, candidates, members=2)
    one = trained(algorithms.decayed_sgd, parts, [(1, other)])
    close = lambda a, b: np.testing.assert_allclose(a[6], b[0], rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, many.state.params, one.state.params)
    weights = many.state.params["layers"][0]["w"][:, 0, 0]
    assert np.isfinite(weights).all()
    assert len(np.unique(weights)) == 12


@pytest.mark.slow
def test_of_iterates_is_said_what_the_library_says_of_each_split(parts):
    plan = training.Plan((4,), 8, epochs=12, start=2, steps=2, rank=5, num_samples=4)
    found = trained(algorithms.averaged_sgd, parts, [(0, HYPER), (2, HYPER)], plan=plan)
    said = scoring._diagnose(found.state.opt_state)
    for i in range(2):
        state = swagjax.get_state(jax.tree.map(lambda x, i=i: x[i], found.state.opt_state))
        assert said["collected"][i] == 10
        for function in (diagnostics.drift, diagnostics.effective_count):
            for name, value in function(state)._asdict().items():
                np.testing.assert_allclose(said[name][i], value, rtol=1e-4)
        captured = diagnostics.captured_variance(state).cumulative
        np.testing.assert_allclose(said["cumulative"][i], captured, rtol=1e-4)


def test_averaged_sgd_is_momentum_and_the_mean_of_its_iterates(parts):
    """On full batches, whose order does not matter, against the two recursions written out."""
    plan = training.Plan((4,), 32, epochs=6, start=2, steps=1, rank=3, num_samples=4)
    one = data.Parts(*(leaf[2:] for leaf in parts))
    assert one.rows == 32
    found = trained(algorithms.averaged_sgd, one, [(0, HYPER)], plan=plan)
    params = network.init(training.key(0, 0, training.INIT), 3, (4,))
    x, y = one.x[0, :32], one.y[0, :32]
    gradient = jax.jit(jax.grad(lambda p: -network.log_density(p, x, y).mean()))
    velocity, iterates = jax.tree.map(jnp.zeros_like, params), []
    for _ in range(6):
        grads = jax.tree.map(lambda g, p: g + 0.1 * p, gradient(params), params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - 0.01 * v, params, velocity)
        iterates.append(params)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, 0), *iterates[2:])
    state = swagjax.get_state(found.state.opt_state)
    for ours, wanted in ((found.state.params, params), (state.mean, mean)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-5), ours, wanted)


SETTLING = training.Plan((4,), 8, epochs=20, start=10, steps=4, rank=3, num_samples=4)


@pytest.mark.slow
def test_settled_sgd_goes_on_from_the_decayed_run_and_collects_at_its_own_rate(parts):
    """In two parts and in one; the rate of every update is that of the docstring."""
    hyper = HYPER._replace(collecting=0.3)
    algorithm, runs = algorithms.settled_sgd(SETTLING), training.runs([(2, hyper)], 1)
    assert algorithm.collecting == range(21, 29)
    arguments = "", algorithm, SETTLING, parts, runs
    first = training.train(*arguments, epochs=range(1, 21))
    decayed = trained(algorithms.decayed_sgd, parts, [(2, hyper)], plan=SETTLING)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    jax.tree.map(close, first.state.params, decayed.state.params)
    whole = training.train(*arguments)
    kept = jax.tree.map(jnp.copy, first)
    two = training.train(*arguments, epochs=algorithm.collecting, after=kept)
    jax.tree.map(np.testing.assert_array_equal, two.state, whole.state)
    state = swagjax.get_state(two.state.opt_state)
    assert state.num_collected == 7  # the first of eight epochs is for the rate to rise
    iterates = []
    for end in range(21, 29):
        until = training.train(*arguments, epochs=range(1, end + 1)).state.params
        iterates.append(until)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, 0), *iterates[1:])
    jax.tree.map(close, state.mean, mean)


def test_the_rate_of_collecting_rises_and_stays(parts):
    """From plain SGD without momentum on a loss of slope 1, whose updates are the rates."""
    hyper = training.Hyper(0.5, 0.0, 0.0, collecting=0.2)
    settled = algorithms.settled_sgd(SETTLING)
    slope = lambda params: jax.tree.map(jnp.ones_like, params)  # noqa: E731
    params = network.init(jax.random.key(0), 3, (4,))
    state, noises = settled.init(params, hyper), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithms.jax, "grad", lambda *_: lambda p, *_: slope(p))
        step = jax.jit(lambda s: settled.step(jax.random.key(0), s, hyper, None))
        for _ in range(100):
            state = step(state)
            noises.append(float(state.params["noise"]))
    velocity = -np.diff([0.0, *noises])
    rates = velocity - 0.9 * np.array([0.0, *velocity[:-1]])  # optax scales the trace by the rate
    np.testing.assert_allclose(velocity[:4] / 0.5, np.cumsum(0.9 ** np.arange(4)), rtol=1e-4)
    assert rates[0] == pytest.approx(0.5, rel=1e-4)
    trace = np.cumsum(0.9 ** np.arange(100))
    shares = velocity / trace / 0.5
    np.testing.assert_allclose(shares[72:80], 0.01, rtol=1e-2)
    np.testing.assert_allclose(shares[80:85], 0.01 + 0.19 * np.arange(5) / 4, rtol=1e-2)
    np.testing.assert_allclose(shares[84:], 0.2, rtol=1e-2)


@pytest.mark.slow
def test_a_collection_that_falls_apart_is_made_again_at_a_lower_rate(parts):
    """Beside one that does not, which keeps its rate and its weights."""
    wild, calm = (HYPER._replace(collecting=rate) for rate in (1e5, 0.3))
    runs = training.runs([(2, wild), (2, calm)], 1)
    algorithm = algorithms.settled_sgd(SETTLING)
    used, found = training.train_guarded("", algorithm, SETTLING, parts, runs)
    np.testing.assert_allclose(used.hyper.collecting, [0.0, 0.3])
    np.testing.assert_array_equal(used.hyper.learning_rate, runs.hyper.learning_rate)
    mean = swagjax.get_state(found.state.opt_state).mean
    nll = training._train_nll(mean, used.split, parts)
    decayed = trained(algorithms.decayed_sgd, parts, [(2, HYPER)], plan=SETTLING).state.params
    assert abs(nll[0] - training._train_nll(decayed, used.split[:1], parts)[0]) < 0.1
    plain = training.train("", algorithm, SETTLING, parts, runs)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), found, plain)


@pytest.mark.slow
def test_a_run_that_fails_is_trained_again_at_a_lower_rate_whatever_the_method(parts):
    """Beside one that does not fail, which keeps its rate; SWAG has no second chance alone."""
    runs = training.runs([(2, HYPER._replace(learning_rate=1e4)), (2, HYPER)], 1)
    for algorithm in (algorithms.decayed_sgd, algorithms.settled_sgd):
        used, _ = training.train_guarded("", algorithm(SETTLING), SETTLING, parts, runs)
        np.testing.assert_allclose(used.hyper.learning_rate, [1e4 / 16, 0.01])


def test_the_posterior_of_the_bayesian_methods_is_that_of_the_loss(parts):
    """d log posterior = -N (d loss + weight decay * params)."""
    params = network.init(jax.random.key(0), 3, (4,))
    batch = training.Batch(parts.x[0, :8], parts.y[0, :8], jnp.asarray(34))
    found = jax.jit(jax.grad(algorithms._log_posterior))(params, HYPER, batch)
    loss = jax.jit(jax.grad(algorithms._mean_loss))(params, jax.random.key(0), HYPER, batch)
    wanted = jax.tree.map(lambda g, p: -34 * (g + 0.1 * p), loss, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)


def test_langevin_keeps_the_iterates_of_the_epochs_after_start():
    plan = training.Plan((4,), 8, epochs=1000, start=500, steps=2, rank=2, num_samples=30)
    kept = sorted(algorithms.langevin(plan).snapshots)
    assert len(kept) == 30
    assert kept[0] == pytest.approx(500 + 500 / 30, abs=1)
    assert kept[-1] == 1000


def test_an_ensemble_gives_the_share_of_every_member():
    """Two members at +-1 whose networks ignore the inputs: half of the means at either."""
    first = {"w": jnp.zeros((2, 3, 4)), "b": jnp.zeros((2, 4))}
    last = {"w": jnp.zeros((2, 4, 2)), "b": jnp.array([[-1.0, 0.0], [1.0, 0.0]])}
    states = algorithms.Descent({"layers": [first, last], "noise": jnp.zeros(2)}, ())
    keys = jax.random.split(jax.random.key(0), 2)
    hypers = jax.tree.map(lambda v: jnp.full(2, v), HYPER)
    members = training.Trained(states, ())
    for name, samples in (("deep ensemble", 2), ("MC-dropout", 6)):
        outputs = jax.jit(methods.outputs, static_argnums=(0, 1))
        draw = methods.TUNED[name].draw
        means, variances = outputs(draw, 6, keys, members, hypers, 1.0, jnp.ones((5, 3)))
        wanted = np.repeat([-1.0, 1.0], samples // 2)
        np.testing.assert_array_equal(means, np.tile(wanted[:, None], 5))
        np.testing.assert_allclose(variances, 2 * np.log(2), rtol=1e-5)


# tuning and scoring


def forgetful(name, compute):
    return compute()


def test_the_choice_is_the_least_held_out_nll_of_every_split(parts):
    """Of a network that learns, one that stands still and one that diverges, with two noises."""
    grid = tuning.Grid((1e-9, 0.02, 1e6), (0.0,), (0.0,), (), (30,))
    tried = methods.Calibration(noises=(1.0, 1e4))
    table = methods.TUNED | {"SGD fitted": methods.TUNED["SGD fitted"]._replace(tried=tried)}
    plan = training.Plan((4,), 8, epochs=30, start=15, steps=0, rank=2, num_samples=4)
    dataset = data.Dataset("x", rows(40)[:, :-1], rows(40)[:, -1], ragged(40), "")
    held_out = data.parts(dataset, data.held_out(dataset.splits))
    names = ["SGD fitted", "deep ensemble"]
    chosen = tuning.choose(table, names, grid, plan, held_out, 3, forgetful)
    best = tuning.Choice(training.Hyper(0.02, 0.0, 0.0), 30, 1.0, 1.0)
    assert chosen == {"SGD fitted": [best] * 3, "deep ensemble": [best] * 3}


def test_a_choice_at_an_end_of_what_was_tried_is_said():
    """Unless the end is 0, beyond which there is nothing, or few of the splits are there."""
    chosen = uci._complete(uci.Uci(protocol="tuned"), 500)
    at = lambda rate, scale: tuning.Choice(  # noqa: E731
        training.Hyper(0.01, 0.01, 0.0, rate), 300, scale, 1.0
    )
    selected = {"SWAG": [at(0.3, 30.0), at(0.1, 30.0), at(0.3, 1.0), at(0.3, 1.0), at(0.3, 1.0)]}
    assert uci._edges(chosen, selected) == ["SWAG: scale is the greatest tried, 30, in 2 of 5"]
    assert uci._edges(chosen, {"SWAG": [at(0.3, 0.0)] * 3}) == []


@pytest.mark.parametrize("start", [1, 150, 199])
def test_a_shortened_run_collects(start, parts):
    plan = training.Plan((4,), 8, epochs=200, start=start, steps=0, rank=3, num_samples=4)
    short = tuning.shortened(plan, parts, 100)
    assert short.epochs == 100
    assert short.start == min(round(start / 2), 99)


def test_scores_are_those_of_scipy_in_the_units_of_the_targets(parts):
    rng = np.random.default_rng(0)
    means, variances = rng.normal(size=(4, 8)), rng.uniform(0.5, 2, (4, 8))
    found = scoring._metrics(means.astype("f4"), variances.astype("f4"), parts, 1)
    used, std = slice(parts.test_rows[1]), parts.y_std[1]
    y = parts.test_y[1, used] * std + parts.y_mean[1]
    means, variances = means[:, used] * std + parts.y_mean[1], variances[:, used] * std**2
    mean, spread = means.mean(0), np.sqrt(variances.mean(0) + means.var(0))
    density = stats.norm.pdf(y, means, np.sqrt(variances)).mean(0)
    wanted = {
        "RMSE": np.sqrt(np.mean((mean - y) ** 2)),
        "NLL": -stats.norm.logpdf(y, mean, spread).mean(),
        "mixture": -np.log(density).mean(),
        "coverage": (np.abs(stats.norm.cdf(y, mean, spread) - 0.5) < 0.475).mean(),
        "width": np.mean(2 * stats.norm.ppf(0.975) * spread),
        "standardised NLL": -stats.norm.logpdf(y, mean, spread).mean() - np.log(std),
    }
    assert found["CRPS"] > 0
    assert {k: found[k] for k in wanted} == pytest.approx(wanted, rel=1e-4)


# the report


def test_the_corrected_test_against_scipy_and_by_hand():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 20))
    plain = report.corrected_t_test(first, second, 0.0)
    assert plain["p"] == pytest.approx(stats.ttest_rel(first, second).pvalue)
    corrected = report.corrected_t_test(first, second, 103 / 927)
    factor = np.sqrt((1 / 20 + 103 / 927) / (1 / 20))  # 1.795: 20 splits are worth about six
    assert corrected["standard_error"] == pytest.approx(factor * plain["standard_error"])
    assert corrected["p"] == pytest.approx(
        2 * stats.t.sf(abs(corrected["difference"] / corrected["standard_error"]), 19)
    )


@pytest.mark.parametrize(("second", "p"), [([1.0, 2.0], 1.0), ([0.0, 1.0], 0.0)])
def test_differences_without_variance(second, p):
    assert report.corrected_t_test([1.0, 2.0], second, 0.1)["p"] == p


@pytest.mark.parametrize("scores", [[1.0], [1.0, np.nan]])
def test_no_p_of_a_single_split_or_a_diverged_one(scores):
    assert report.corrected_t_test(scores, scores, 0.1)["p"] is None


def test_published_rows_stand_below_ours_in_either_table():
    ours = report.record({"SWAG": {"NLL": [1.0, 1.2, 1.1], "RMSE": [2.0, 2.0, 2.0]}})
    content = ours | {"shown": ["RMSE", "NLL"], "published": [{"label": "PBP *", "NLL": 3.04}]}
    assert report.markdown(content).splitlines() == [
        "|  | RMSE | NLL |",
        "| --- | --- | --- |",
        "| SWAG | 2 | 1.10±.06 |",
        "| PBP * |  | 3.04 |",
    ]
    assert [len(list(column.cells)) for column in report.beside(content).columns] == [2, 2, 2]


def test_published_figures_have_sources_and_are_of_one_family():
    for name in published._STANDARD:
        assert {row.source for row in published.standard(name)} <= set(published.SOURCES)
        assert "subspace" not in {row.source for row in published.standard(name)}
    for name in published._AUTHORS:
        assert {row.source for row in published.authors(name)} == {"subspace"}
    assert published.standard("nosuch") == published.authors("nosuch") == []
    claims = {n: published.swag_beats_sgd(n) for n in ("concrete", "bostonHousing", "nosuch")}
    assert claims == {"concrete": True, "bostonHousing": False, "nosuch": None}


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ({"difference": 0.5, "standard_error": 0.1, "p": 0.001}, "-0.5000 .* SWAG is better"),
        ({"difference": -0.5, "standard_error": 0.1, "p": 0.001}, "SWAG is worse"),
        ({"difference": 0.5, "standard_error": 0.4, "p": 0.2}, "not shown"),
        ({"difference": 0.5, "standard_error": None, "p": None}, "single split"),
    ],
)
def test_swag_is_called_better_only_where_it_is_shown(test, said):
    assert re.search(said, uci._verdict("SGD", test))


# stages


def test_a_bar_says_which_stage_is_at_work_and_ends_full(capsys):
    with stages.with_bar(lambda name, compute: compute(), 2) as stage:
        assert [stage(name, lambda: 7) for name in ("first", "second")] == [7, 7]
    said = capsys.readouterr().err
    assert "second" in said
    assert "2/2 runs" in said


def test_stages_are_remembered_when_resumed_and_only_then(tmp_path):
    stage = stages.open_stages(tmp_path, {"a": (1,)}, resume=False)
    assert stage("x", lambda: [1.5]) == [1.5]
    again = stages.open_stages(tmp_path, {"a": (1,)}, resume=True)
    assert again("x", pytest.fail) == [1.5]
    with pytest.raises(options.UsageError, match=r"a = \[1\], not \[2\]"):
        stages.open_stages(tmp_path, {"a": (2,)}, resume=True)
    (tmp_path / "notes").write_text("of the user, who finds them again")
    stages.open_stages(tmp_path, {"a": (1,)}, resume=False)  # killed in its first stage
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    anew = stages.open_stages(tmp_path, {"a": (1,)}, resume=True)
    assert anew("x", lambda: [2.5]) == [2.5]


@pytest.mark.parametrize("left", ["", "{", "[]", '{"options": {}}', '{"options": 1, "stages": {}}'])
def test_damaged_stages_are_refused(left, tmp_path):
    (tmp_path / "stages.json").write_text(left)
    with pytest.raises(options.UsageError, match="is damaged"):
        stages.open_stages(tmp_path, {}, resume=True)


# the command

TINY = ["--epochs", "6", "--start", "1", "--hidden", "3", "--rank", "4", "--num-samples", "4"]
TINY += ["--members", "2", "--batch-size", "20"]


SOME = ["SGD", "SWAG", "MultiSWAG", "deep ensemble", "SGLD"]


def run(folder, results, *args):
    args = ["--name", "masked", "--data-dir", str(folder), "--results", str(results), *args]
    assert command_line.main(["uci", *args, *TINY]) == 0
    return results / "uci" / "masked"


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A tiny run on ragged splits: where its results are."""
    return run(folder, tmp_path_factory.mktemp("results"), "--splits", "2", "--methods", *SOME)


@pytest.mark.slow
def test_uci_writes_its_results(finished):
    record = json.loads((finished / "results.json").read_text())
    assert list(record["results"]) == SOME
    assert list(record["results"]["SGD"]) == [*scoring.METRICS, "standardised NLL"]
    for of_method in record["results"].values():
        for summary in of_method.values():
            assert len(summary["values"]) == 2
            assert np.all(np.isfinite(summary["values"]))
    assert record["paired_tests"]["NLL"]["SGD"]["MultiSWAG"]["p"] > 0
    assert record["published"] == []
    assert len(record["iterates"]["trend"]) == 2
    for picture in ("scores.png", "iterates.png"):
        assert (finished / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_json_names_no_folder_of_this_machine(finished, folder):
    text = (finished / "results.json").read_text()
    assert str(finished.parents[1]) not in text
    assert str(folder) not in text


@pytest.mark.slow
def test_a_point_has_no_mixture_and_an_ensemble_has(finished):
    results = json.loads((finished / "results.json").read_text())["results"]
    for name, same in {"SGD": True, "deep ensemble": False, "SGLD": False}.items():
        nll, mixture = (results[name][metric]["values"] for metric in ("NLL", "mixture"))
        assert np.allclose(nll, mixture, rtol=1e-6) == same


@pytest.mark.slow
def test_every_method_runs(folder, tmp_path):
    record = json.loads((run(folder, tmp_path) / "results.json").read_text())
    assert list(record["results"]) == list(methods.AUTHORS)
    assert set(record["paired_tests"]["NLL"]["SWAG"]) == set(list(methods.AUTHORS)[5:])


@pytest.fixture
def tuned(folder, tmp_path):
    """Arguments of a tiny run of the tuned protocol of three methods."""
    args = ["uci", "--name", "indexed", "--data-dir", str(folder), "--results", str(tmp_path)]
    args += ["--protocol", "tuned", "--methods", "SGD fitted", "SWAG", "deep ensemble"]
    args += ["--splits", "1", "--holdouts", "1", "--collecting", "0.1", "0.5"]
    return [*args, "--learning-rate", "1e-9", "0.02", "--weight-decay", "0", *TINY]


@pytest.fixture
def trainings(monkeypatch):
    """Labels of the trainings that were done; put a number to ``stop`` to interrupt the next."""
    train, done, stop = training.train, [], []

    def counted(label, *args, **kwargs):
        if len(done) in stop:
            raise KeyboardInterrupt
        done.append(label)
        return train(label, *args, **kwargs)

    monkeypatch.setattr(training, "train", counted)
    return done, stop


@pytest.mark.slow
def test_an_interrupted_tuned_run_is_resumed_after_its_searches(tuned, tmp_path, trainings):
    done, stop = trainings
    stop.append(3)
    assert command_line.main(tuned) == 130
    stop.clear()
    assert command_line.main([*tuned, "--resume"]) == 0
    assert done[:3] == ["search: decayed sgd"] * 3  # at half, all and five quarters
    settled = "search: settled sgd"
    assert done[3:9] == 2 * [settled, f"{settled}, 0.1", f"{settled}, 0.5"]
    assert set(done[9:]) == {"SGD fitted, deep ensemble", "SWAG"}
    record = json.loads((tmp_path / "uci" / "indexed-tuned" / "results.json").read_text())
    for choice in record["chosen"]["SGD fitted"]:
        assert choice["learning_rate"] in (1e-9, 0.02)
        assert choice["epochs"] in (3, 6, 7)
    assert record["chosen"]["SGD fitted"] == record["chosen"]["deep ensemble"]
    assert record["chosen"]["SWAG"][0]["epochs"] in (3, 6)
    assert record["chosen"]["SWAG"][0]["collecting"] in (0.1, 0.5)
    assert record["iterates"]["verdict"][0] in ("still", "few", "travelling")
    assert record["paired_tests"]["NLL"]["SGD fitted"]["SWAG"]["p"] is None  # of one split


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_numbers_of_a_whole_one(tuned, tmp_path, trainings):
    path = tmp_path / "uci" / "indexed-tuned" / "results.json"
    _, stop = trainings
    assert command_line.main(tuned) == 0
    whole = path.read_text()
    path.unlink()
    stop.append(len(trainings[0]) + 4)
    assert command_line.main(tuned) == 130
    assert not path.exists()
    stop.clear()
    assert command_line.main([*tuned, "--resume"]) == 0
    assert path.read_text() == whole


def test_help_of_uci_imports_nothing_heavy():
    code = (
        "import sys, contextlib, benchmarks.__main__ as m\n"
        "with contextlib.suppress(SystemExit): m.main(['uci', '--help'])\n"
        "sys.exit(bool({'jax', 'blackjax', 'matplotlib', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert ended.returncode == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--name", "concrete"], "--data-dir"),
        (["--data-dir", "nosuch"], "nosuch"),
        (["--data-dir", "."], "no data set"),
        (["--protocol", "nosuch"], "nosuch"),
        (["--methods", "nosuch"], "nosuch"),
        (["--splits", "0"], "--splits"),
        (["--members", "0"], "--members"),
        (["--hidden", "0"], "--hidden"),
        (["--hidden"], "--hidden"),
        (["--rank", "1"], "--rank"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--learning-rate", "0.1", "0.2"], "--protocol tuned"),
        (["--weight-decay", "-1"], "--weight-decay"),
        (["--dropout", "1"], "--dropout"),
        (["--epochs", "10", "--start", "10"], "--start"),
    ],
)
def test_a_wrong_value_ends_in_one_line_and_exit_code_2(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["uci", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not list(tmp_path.iterdir())


def test_defaults_follow_the_number_of_rows():
    small, medium, large, largest = (uci._complete(uci.Uci(), n) for n in (506, 1030, 9568, 45730))
    assert (small.epochs, small.start, small.weight_decay) == (300, 200, (0.1,))
    assert (medium.epochs, medium.start, medium.weight_decay) == (1000, 500, (0.01,))
    assert (large.hidden, largest.hidden) == ((50,), (100,))
    assert uci._complete(uci.Uci(hidden=(7,)), 45730).hidden == (7,)
    assert dataclasses.replace(small, protocol="tuned").start == 200


@needs_data
@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bostonHousing", "skillcraft"])
def test_uci_runs_on_real_sets(name, tmp_path):
    args = ["--name", name, "--data-dir", str(UCI), "--results", str(tmp_path), "--splits", "2"]
    assert command_line.main(["uci", *args, "--methods", "SGD", "SWAG", *TINY]) == 0
    record = json.loads((tmp_path / "uci" / name / "results.json").read_text())
    assert len(record["published"]) == 4
