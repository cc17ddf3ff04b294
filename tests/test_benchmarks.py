"""The benchmarks: data, models, training, report, and the command line as a whole."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from scipy import optimize, special

import swagjax
from benchmarks import __main__ as command_line
from benchmarks import algorithms, augmentation, data, methods, models, options, report, training
from benchmarks.experiments import classify, curves, gains

ROOT = Path(__file__).parent.parent
TFDS = Path(os.environ.get("SWAGJAX_DATA", ROOT.parent / "shared" / "data")) / "tfds"
CLASSES = (0, 1, 2, 8, 9)
TINY = ["--epochs", "4", "--start", "1", "--seeds", "2", "--num-samples", "3", "--rank", "2"]
TINY += ["--batch-size", "64", "--methods", "SGD", "SWAG"]


@pytest.fixture(scope="module", autouse=True)
def small_convnet():
    """Commands in this process train a network that compiles in no time, and compile it fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "convnet", functools.partial(models.ConvNet, widths=(4,)))
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


needs_data = pytest.mark.skipif(
    not TFDS.is_dir(), reason=f"no prepared data sets in {TFDS}: set SWAGJAX_DATA"
)


def tiny_options(**changes):
    chosen = options.complete(classify.Classify(seeds=2, epochs=3, start=1), classify.DIGITS)
    usual = {"augment": ("shift", "noise"), "collections": 1}
    return dataclasses.replace(chosen, **{**usual, **changes})


# data


def test_digits_are_normalised_split_and_re_indexed():
    task = data.load("digits", None)
    assert task.train.inputs.shape[1:] == (8, 8, 1)
    assert task.train.inputs.dtype == np.float32
    np.testing.assert_allclose(task.train.inputs.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(task.train.inputs.std(), 1, atol=1e-5)
    assert task.classes == CLASSES
    assert task.vocabulary is None
    for part in (task.train, task.held_out, task.evaluation):
        assert set(part.labels) == set(range(5))
    assert set(task.ood.labels) == {3, 4, 5, 6, 7}


def test_labels_are_positions_in_the_order_given():
    ordered, shuffled = (data.load("digits", None, c).train for c in ((0, 8), (8, 0)))
    np.testing.assert_array_equal(ordered.inputs, shuffled.inputs)
    np.testing.assert_array_equal(ordered.labels, 1 - shuffled.labels)


def test_the_split_is_the_same_every_time_and_its_parts_are_disjoint():
    first, second = (data.load("digits", None, CLASSES) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    rows = [{image.tobytes() for image in part.inputs} for part in first[:4]]
    assert sum(map(len, rows)) == len(set.union(*rows))
    share = len(first.held_out.labels) / (len(first.held_out.labels) + len(first.train.labels))
    assert share == pytest.approx(0.1, abs=0.005)


def test_validation_images_come_from_the_training_images_alone():
    test, validation = (data.load("digits", None, CLASSES, e) for e in ("test", "validation"))
    whole = len(test.train.labels) + len(test.held_out.labels)
    assert sum(len(part.labels) for part in validation[:3]) == whole
    assert len(validation.evaluation.labels) == pytest.approx(0.2 * whole, abs=2)
    assert not set(map(bytes, _raw(validation.ood))) & set(map(bytes, _raw(test.ood)))


def _raw(part):
    """Pixels as integers 0 ... 16 again, whatever they were normalised with."""
    low, high = part.inputs.min(), part.inputs.max()
    return np.round((part.inputs - low) / (high - low) * 16).astype(np.uint8)


@pytest.mark.parametrize("bad", [(), (1,), (1, 1), (1, 77), (-1, 2), tuple(range(10))])
def test_classes_that_cannot_be_split_are_refused(bad):
    with pytest.raises(options.UsageError, match="--in-classes"):
        data.load("digits", None, bad)


def test_of_another_set_all_images_are_out_of_distribution_in_the_shape_of_those_trained_on():
    task = data.load("digits", None, ood_dataset="digits")
    assert task.classes == tuple(range(10))
    assert len(task.ood.labels) == len(task.evaluation.labels) == 899
    np.testing.assert_array_equal(task.ood.inputs, task.evaluation.inputs)


def test_images_of_another_set_become_grey_or_three_colours_and_are_resized():
    grey = np.full((1, 4, 4, 1), 100, np.uint8)
    np.testing.assert_allclose(data._converted(grey, (4, 4, 3)), np.full((1, 4, 4, 3), 100))
    np.testing.assert_allclose(data._converted(grey, (9, 7, 1)), np.full((1, 9, 7, 1), 100))
    red = np.zeros((1, 2, 2, 3), np.uint8) + np.array([200, 0, 0], np.uint8)
    np.testing.assert_allclose(data._converted(red, (2, 2, 1)), np.full((1, 2, 2, 1), 59.8))


@needs_data
@pytest.mark.data
def test_texts_come_as_word_numbers_with_the_vocabulary_of_the_training_texts():
    task = data.load("trec", TFDS)
    assert task.classes == (0, 1, 2, 3)
    assert task.train.inputs.dtype == np.int32
    assert task.train.inputs.max() + 1 == task.vocabulary
    assert max(part.inputs.max() for part in task[:4]) < task.vocabulary
    assert set(task.ood.labels) == {4, 5}


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(("name", "shape"), [("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))])
def test_tfds_sets_come_as_arrays(name, shape):
    task = data.load(name, TFDS, CLASSES)
    assert task.train.inputs.shape[1:] == shape
    assert len(task.evaluation.labels) + len(task.ood.labels) == 10_000
    np.testing.assert_allclose(task.train.inputs.mean((0, 1, 2)), 0, atol=1e-3)


# models


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [
        (models.LeNet5(10), (32, 32, 3), 62_006),
        (models.LeNet5(10), (32, 32, 1), 61_706),
        (models.LeNet5(10), (28, 28, 1), 61_706),
        (models.ConvNet(5), (8, 8, 1), 14_293),
    ],
)
def test_parameter_counts(model, shape, count):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == count


# training


@pytest.fixture(scope="module")
def digits():
    part = data.load("digits", None, CLASSES).train
    return data.Part(part.inputs[:70], part.labels[:70])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [algorithms.averaged_sgd, algorithms.langevin])
def test_networks_side_by_side_equal_networks_one_by_one(recipe, digits):
    chosen, model = tiny_options(), models.ConvNet(5, widths=(4, 4))
    algorithm = recipe(chosen, len(digits.labels))
    init = training.initialiser(model, algorithm, digits.inputs[:1])
    step = training._step(model, algorithm, chosen, data_axis(1))
    keys = [jax.random.key(seed) for seed in range(2)]
    ways = []
    for form in (training._one_by_one, training._side_by_side):
        order = functools.partial(training._order, chosen)
        epoch, networks = form(step, order, 4), [init(key) for key in keys]
        for _ in range(3):
            networks, losses = epoch(networks, keys, digits)
        ways.append((networks, np.ravel(losses)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *ways)
    assert int(swagjax.get_state(ways[1][0][1].opt_state).num_collected) == (
        2 if recipe is algorithms.averaged_sgd else 8
    )


def data_axis(devices):
    mesh = training.mesh(tiny_options(devices=devices))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))


class Linear(nn.Module):
    """A dense layer, with dropout before it: compiles in no time."""

    classes: int
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(len(x), -1)
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        return nn.Dense(self.classes)(x)


@pytest.mark.slow
def test_eight_devices_share_a_batch_and_come_to_what_one_does(digits, tmp_path):
    recipe = algorithms.averaged_dropout
    chosen = tiny_options(seeds=1, epochs=2, augment=("noise",))
    shared = [dataclasses.replace(chosen, devices=number) for number in (1, 8)]
    trained = [
        training.train(Linear(5), digits, recipe, each, tmp_path / str(each.devices))[0]
        for each in shared
    ]
    assert len(trained[1][0].params["Dense_0"]["kernel"].sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *trained)


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(options.UsageError, match="--batch-size 12: not a multiple of 8"):
        training.check(tiny_options(devices=8, batch_size=12), 100)
    with pytest.raises(options.UsageError, match="--devices 9: there are 8"):
        training.check(tiny_options(devices=9), 100)


@pytest.mark.slow
def test_a_network_is_the_same_whoever_trains_beside_it(digits, tmp_path):
    model = models.ConvNet(5, widths=(4, 4))
    alone, pair = (
        training.train(
            model, digits, algorithms.averaged_sgd, tiny_options(seeds=n), tmp_path / str(n)
        )[0]
        for n in (1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, alone[0], pair[0])
    assert not np.array_equal(
        pair[0].params["Dense_0"]["kernel"], pair[1].params["Dense_0"]["kernel"]
    )


def test_members_of_an_ensemble_begin_elsewhere_and_their_log_says_how_they_went(digits, tmp_path):
    chosen = tiny_options(swa_learning_rate=0.02, augment=())
    members = training.train(Linear(5), digits, algorithms.averaged_sgd, chosen, tmp_path, 2)
    assert not np.allclose(*(m[0].params["Dense_0"]["kernel"] for m in members))
    lines = (tmp_path / "log" / "averaged_sgd-1.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [line["epoch"] for line in log] == [1, 2, 3]
    assert log[0]["loss"] == pytest.approx(np.mean(log[0]["of_seeds"]))
    assert log[2]["loss"] < log[0]["loss"]
    assert [line["learning_rate"] for line in log] == pytest.approx([0.03125, 0.02, 0.02])


# algorithms


def test_langevin_dynamics_samples_the_posterior():
    """Of the prior alone, N(0, T / (N * decay)); SGD before it is left as it is.

    The mean square of 1000 independent weights has a standard error of 4.5 %: 5 % of it here and
    below are six standard errors, as there are 40 steps of autocorrelation 0.5, and one time scale.
    """
    chosen = tiny_options(
        epochs=31, start=1, swa_learning_rate=0.05, weight_decay=0.5, temperature=0.5, snapshots=20
    )
    rows = 160  # 10 steps an epoch
    algorithm = algorithms.langevin(chosen, rows)
    params = {"w": jnp.zeros(100_000)}

    def step(carry, key):
        params, state = carry
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = algorithm.optimizer.update(zeros, state, params, key=key)
        return (optax.apply_updates(params, updates), state), jnp.abs(updates["w"]).max()

    keys = jax.random.split(jax.random.key(0), 310)
    (_, state), moves = jax.lax.scan(step, (params, algorithm.optimizer.init(params)), keys)
    np.testing.assert_array_equal(moves[:10], 0)
    kept = swagjax.iterates(swagjax.get_state(state))["w"]
    assert kept.shape == (20, 100_000)
    e = 0.05 / 0.1 / rows  # its chain is w <- (1 - e N decay) w + sqrt(2 e T) z
    variance = 2 * e * 0.5 / (1 - (1 - e * rows * 0.5) ** 2)
    # 100,000 independent weights: the standard error of a variance is 0.45 %.
    np.testing.assert_allclose(np.var(kept, axis=1)[-1], variance, rtol=0.03)


def test_a_fast_geometric_ensemble_is_the_networks_at_the_minima_of_the_learning_rate():
    chosen = tiny_options(epochs=6, start=2, cycles=4, swa_learning_rate=0.02, weight_decay=0.0)
    algorithm = algorithms.cycled_sgd(chosen, 160)  # 40 steps after 20: cycles of 10
    rates = np.array([float(algorithm.rate(step)) for step in range(60)])
    np.testing.assert_allclose(rates[18:20], 0.02, rtol=1e-5)
    lowest = 20 + np.arange(4) * 10 + 4
    np.testing.assert_allclose(rates[lowest], 0.001, rtol=1e-5)
    assert set(20 + np.flatnonzero(rates[20:] < 0.0011)) == set(lowest)
    tx, params, seen = algorithm.optimizer, jnp.zeros(1), []
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(60):
        updates, state = update(jnp.ones(1), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params[0]))
    kept = swagjax.iterates(swagjax.get_state(state))[:, 0]
    np.testing.assert_allclose(kept, np.array(seen)[lowest], rtol=1e-5)


def test_cycles_that_do_not_fit_are_refused():
    with pytest.raises(options.UsageError, match="--cycles 30: two steps each"):
        algorithms.cycled_sgd(tiny_options(epochs=6, start=2, cycles=30), 160)


def test_several_iterates_are_collected_an_epoch():
    chosen = tiny_options(epochs=3, start=1, collections=5)
    tx = algorithms.averaged_sgd(chosen, 160).optimizer
    params = jnp.zeros(1)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(30):
        _, state = update(jnp.ones(1), state, params)
    assert int(swagjax.get_state(state).num_collected) == 10


@pytest.mark.parametrize("replacement", [False, True])
def test_an_epoch_goes_through_all_inputs_or_draws_them_anew(replacement):
    """Of 1000 places drawn with replacement 632 differ, by 10 (a standard deviation)."""
    part = data.Part(np.zeros((1000, 1)), np.zeros(1000, int))
    order = training._order(tiny_options(replacement=replacement), jax.random.key(0), part)
    different = len(np.unique(order))
    assert order.shape == (1000,)
    assert abs(different - 632) < 60 if replacement else different == 1000


# augmentation


def test_augmentation_changes_images_only_as_asked():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 3)), jnp.float32)

    def augment(*kinds):
        return jax.jit(augmentation.augmentation(kinds))(jax.random.key(0), x)

    np.testing.assert_array_equal(augment(), x)
    flipped = augment("flip")
    same, mirrored = (np.all(flipped == y, (1, 2, 3)) for y in (x, x[:, :, ::-1]))
    assert np.all(same ^ mirrored)
    assert np.all(np.isin(augment("shift"), x))
    assert np.all(np.isin(augment("crop"), np.append(x, 0.0)))
    assert 0.2 < np.std(augment("noise") - x) < 0.4


# methods


def test_regression_statistics_are_refreshed_on_images_without_augmentation(monkeypatch):
    seen = []
    monkeypatch.setattr(
        methods.batch_stats,
        "linen",
        lambda model, stats, x, **_: seen.append(x) or (lambda p: stats),
    )
    task, chosen = data.load("digits", None, CLASSES), tiny_options(seeds=1, epochs=2)
    model = models.MODELS["convnet"](len(CLASSES))
    method = methods.METHODS["SWA"]
    rows = len(task.train.labels)
    algorithm = method.recipe(chosen, rows)
    network = training.initialiser(model, algorithm, task.train.inputs[:1])(jax.random.key(0))
    params, update = network.params, jax.jit(algorithm.optimizer.update)
    for _ in range(2 * (rows // chosen.batch_size)):
        opt_state = update(params, network.opt_state, params)[1]
        network = network._replace(opt_state=opt_state)
    predict = methods.predictor(model, task.train.inputs)
    predict(jax.random.key(0), method, network, [task.ood.inputs[:2]], 2)
    (used,) = seen
    np.testing.assert_array_equal(used, task.train.inputs)


def random_network(seed):
    """A linear network with what SWAG of rank 4 would hold of it, as if it had been trained."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return {
            "Dense_0": {
                name: jnp.asarray(rng.normal(size=(*shape, *of)), jnp.float32)
                for name, of in (("kernel", (64, 5)), ("bias", (5,)))
            }
        }

    variance = jax.tree.map(jnp.square, normal())
    moments = jnp.int32(4), jnp.int32(4), jnp.int32(0), normal(), variance, normal(4)
    return training.Network(normal(), {}, swagjax.SWAGState(*moments))


@pytest.fixture(scope="module")
def run(digits):
    """Every method on random linear networks."""
    few = data.Part(digits.inputs[:40], digits.labels[:40])
    chosen = tiny_options(members=2, num_samples=4, methods=tuple(methods.METHODS))
    recipes = dict.fromkeys(method.recipe for method in methods.METHODS.values())
    networks = {
        recipe: [[random_network(100 * i + 10 * j + k) for k in range(2)] for j in range(2)]
        for i, recipe in enumerate(recipes)
    }
    task = data.Task(few, few, few, few, CLASSES, None)
    predictor = methods.predictor(Linear(5), few.inputs)
    made = classify.Run(chosen, task, Linear(5), None, networks, predictor, {})
    fitted = {name: classify._fit(made, name) for name in classify._fitting(made)}
    return made._replace(fitted=fitted)


def linear(params, x):
    kernel, bias = (np.asarray(params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    return special.softmax(x.reshape(len(x), -1).astype(np.float64) @ kernel + bias, axis=-1)


def test_every_method_predicts_by_what_it_keeps(run):
    x = run.task.evaluation.inputs
    decayed, averaged = (run.networks[r] for r in (algorithms.decayed_sgd, algorithms.averaged_sgd))
    assert classify.methods_of(run) == list(methods.METHODS)
    got = {name: classify.predict(run, name, x)[1] for name in methods.METHODS}
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    close(got["SGD"], linear(decayed[0][1].params, x))
    close(got["SWA"], linear(swagjax.get_state(averaged[0][1].opt_state).mean, x))
    close(got["deep ensemble"], np.mean([linear(m[1].params, x) for m in decayed], 0))
    for name, recipe in (("SGLD", algorithms.langevin), ("FGE", algorithms.cycled_sgd)):
        kept = swagjax.iterates(swagjax.get_state(run.networks[recipe][0][1].opt_state))
        points = [jax.tree.map(lambda leaf, i=i: leaf[i], kept) for i in range(4)]
        close(got[name], np.mean([linear(point, x) for point in points], 0))
    (network,) = run.networks[algorithms.averaged_dropout][0][1:]
    mean = swagjax.get_state(network.opt_state).mean
    thinned = [
        run.model.apply({"params": mean}, x, rngs={"dropout": key})
        for key in jax.random.split(training.key(1, training.PREDICT), 4)
    ]
    close(got["SWA-Dropout"], special.softmax(thinned, -1).mean(0))
    parts = []
    for member, network in enumerate(averaged):
        keys = jax.random.split(training.key(1, training.PREDICT, member), 2)
        state = swagjax.get_state(network[1].opt_state)
        parts += [linear(swagjax.sample(key, state), x) for key in keys]
    close(got["MultiSWAG"], np.mean(parts, 0))


def test_the_temperature_is_fitted_on_held_out_inputs_alone(run):
    x, labels = run.task.held_out
    logs = [np.log(p) for p in classify.predict(run, "SGD", x)]
    cold = classify.predict(run, "SGD-Temp", x)
    for logits, tempered, temperature in zip(logs, cold, run.fitted["SGD-Temp"], strict=True):

        def nll(log_t, logits=logits):
            log_probs = special.log_softmax(logits / np.exp(log_t), -1)
            return -np.mean(log_probs[np.arange(len(x)), labels])

        best = optimize.minimize_scalar(nll, bounds=(-4, 4), method="bounded")
        assert nll(np.log(temperature)) <= best.fun + 1e-5
        np.testing.assert_allclose(tempered, special.softmax(logits / temperature, -1), atol=1e-5)


def test_the_scale_is_the_one_of_least_held_out_nll(run):
    x, labels = run.task.held_out
    states = [swagjax.get_state(n.opt_state) for n in run.networks[algorithms.averaged_sgd][0]]
    for seed, chosen in enumerate(run.fitted["SWAG fitted"]):
        keys = jax.random.split(training.key(seed, training.PREDICT), 4)
        losses = []
        for scale in classify.SCALES:
            probs = np.mean(
                [linear(swagjax.sample(k, states[seed], scale=scale), x) for k in keys], 0
            )
            losses.append(-np.log(probs[np.arange(len(x)), labels]).mean())
        assert chosen == pytest.approx(classify.SCALES[np.argmin(losses)])


def test_curves_average_the_first_samples(run):
    x, labels = run.task.evaluation
    found = curves._by_samples(run, "SWAG", (3, 1))
    assert list(found) == [1, 3]
    (network,) = run.networks[algorithms.averaged_sgd][0][1:]
    base = jax.random.fold_in(training.key(1, training.PREDICT), curves.KEY)
    probs = []
    for i in range(3):
        (key,) = jax.random.split(jax.random.fold_in(base, i), 1)
        probs.append(linear(swagjax.sample(key, swagjax.get_state(network.opt_state)), x))
    for size in (1, 3):
        of_labels = np.mean(probs[:size], 0)[np.arange(len(x)), labels]
        np.testing.assert_allclose(found[size][1]["NLL"], -np.log(of_labels).mean(), rtol=1e-4)


@pytest.mark.slow
def test_curves_train_nothing_that_classify_has_trained(finished, monkeypatch):
    chosen = curves.Curves(
        results=finished.parents[1], epochs=4, start=1, seeds=2, rank=2, batch_size=64
    )
    monkeypatch.setattr(training, "_one_by_one", lambda step, order, steps: pytest.fail)
    curves.curves(dataclasses.replace(chosen, samples=(1, 2), num_samples=3))
    folder = finished.parents[1] / "curves" / "digits"
    record = json.loads((folder / "results.json").read_text())
    assert list(record["samples"]) == ["SWA", "SWAG-Diag", "SWAG"]
    assert list(record["samples"]["SWAG"]) == ["1", "2"]
    assert list(record["ranks"]) == ["2"]
    swag = json.loads((finished / "results.json").read_text())["results"]["SWAG"]["NLL"]
    # Another program may round otherwise.
    assert record["ranks"]["2"]["NLL"]["values"] == pytest.approx(swag["values"], rel=1e-5)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_smaller_ring_is_the_end_of_a_larger_one():
    params = jnp.zeros(2)
    wide, narrow = swagjax.swag(rank=5), swagjax.swag(rank=3)
    states = [wide.init(params), narrow.init(params)]
    for i, move in enumerate(np.random.default_rng(0).normal(size=(9, 2))):
        states = [
            tx.update(jnp.asarray(move, jnp.float32), s, params)[1]
            for tx, s in zip((wide, narrow), states, strict=True)
        ]
        if i >= 2:
            jax.tree.map(np.testing.assert_array_equal, curves.narrowed(states[0], 3), states[1])


# report


def test_table_and_json_hold_mean_and_standard_error():
    results = {"SGD": {"NLL": [1.0, 2.0, 3.0]}}
    summary = report.record(results, experiment="x")["results"]["SGD"]["NLL"]
    assert summary["mean"] == 2.0
    assert summary["standard_error"] == pytest.approx(1 / np.sqrt(3))
    assert summary["values"] == [1.0, 2.0, 3.0]
    column = report.table(results).columns[1]
    assert list(column.cells) == ["2.0000±.5774"]


def test_one_seed_has_no_standard_error():
    results = {"SGD": {"NLL": [1.0]}}
    assert report.summary([1.0])["standard_error"] is None
    assert list(report.table(results).columns[1].cells) == ["1.0000"]


def test_publish_copies_the_small_results_and_no_checkpoint(tmp_path):
    source = tmp_path / "results" / "x"
    (source / "checkpoints").mkdir(parents=True)
    for name in ("b.png", "c.txt"):
        (source / name).write_text("1")
    with pytest.raises(options.UsageError, match=r"x: no results\.json"):
        report.publish(tmp_path / "results", "x", tmp_path / "published")
    (source / "results.json").write_text("1")
    report.publish(tmp_path / "results", "x", tmp_path / "published")
    copied = {p.name for p in (tmp_path / "published" / "x").iterdir()}
    assert copied == {"results.json", "b.png"}


def published():
    return sorted(p.parent for p in report.PUBLISHED.rglob("results.json"))


@pytest.mark.parametrize("folder", published(), ids=lambda folder: folder.name)
def test_readme_leads_to_what_is_published_and_its_tables_are_those(folder):
    readme, name = report.README.read_text(), folder.relative_to(report.PUBLISHED).as_posix()
    content = json.loads((folder / "results.json").read_text())
    assert re.search(rf"\]\(benchmarks/results/{re.escape(name)}[/)]", readme)
    assert report.with_table(readme, name, content) == readme


def test_tables_of_readme_are_of_published_results():
    tables = set(re.findall(r"<!-- (.+) -->", report.README.read_text())) - {"end", "gains"}
    names = {folder.relative_to(report.PUBLISHED).as_posix() for folder in published()}
    assert {"classify/digits"} <= tables <= names


def test_the_table_of_gains_in_readme_is_that_of_the_published_results():
    table = gains.table(report.PUBLISHED / "uci")
    assert report.with_text(report.README.read_text(), "gains", table) == report.README.read_text()


def test_a_new_table_replaces_the_old_one_alone():
    content = {"results": {"SWAG": {"NLL": {"mean": 0.5, "standard_error": 0.125}}}}
    readme = "a\n<!-- x/y -->\n\nold\n\n<!-- end -->\nb\n<!-- z -->\n\nkept\n\n<!-- end -->\n"
    new = report.with_table(readme, "x/y", content)
    assert "old" not in new
    assert "| SWAG | .5000±.1250 |" in new
    assert new.startswith("a\n<!-- x/y -->")
    assert new.endswith("<!-- end -->\nb\n<!-- z -->\n\nkept\n\n<!-- end -->\n")


def test_publish_refuses_what_is_too_large(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "results.json").write_text("1")
    (tmp_path / "x" / "a.png").write_bytes(bytes(1_000_001))
    with pytest.raises(options.UsageError, match=r"a\.png: larger"):
        report.publish(tmp_path, "x", tmp_path / "published")


# the command line


def test_help_lists_the_experiments_and_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--help"])
    said = capsys.readouterr().out
    assert "classify" in said
    assert "publish" in said
    assert all(field.__doc__ for field in command_line.COMMANDS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys, contextlib, benchmarks.__main__ as m\n"
        "with contextlib.suppress(SystemExit): m.main(['classify', '--help'])\n"
        "sys.exit(bool({'jax', 'flax', 'matplotlib', 'orbax', 'sklearn'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "classify"),
        (["nosuch"], "nosuch"),
        (["classify", "--epochs", "many"], "--epochs"),
        (["classify", "--model", "nosuch"], "nosuch"),
        (["classify", "--evaluate", "nosuch"], "nosuch"),
        (["classify", "--dataset", "nosuch"], "nosuch"),
        (["classify", "--dataset", "mnist", "--data-dir", "nosuch"], "nosuch"),
        (["classify", "--epochs", "10", "--start", "10"], "--start"),
        (["classify", "--seeds", "0"], "--seeds"),
        (["classify", "--learning-rate", "-1"], "--learning-rate"),
        (["classify", "--learning-rate", "nan"], "--learning-rate"),
        (["classify", "--batch-size", "5000"], "--batch-size"),
        (["classify", "--rank", "1"], "--rank"),
        (["classify", "--methods", "nosuch"], "nosuch"),
        (["classify", "--ood-dataset", "nosuch"], "nosuch"),
        (["classify", "--collections", "99"], "--collections"),
        (["classify", "--dropout", "1"], "--dropout"),
        (["classify", "--devices", "99"], "--devices"),
        (["classify", "--num-samples", "2"], "--num-samples"),
        (["classify", "--num-samples", "0"], "--num-samples"),
        (["classify", "--epochs", "1"], "--epochs 1: at least 2"),
        (["classify", "--methods", "SGD", "FGE", "--cycles", "9999"], "--cycles 9999"),
        (["classify", "--model", "lenet5"], "--model lenet5: inputs of 8 x 8 x 1 are too small"),
        (["classify", "--results", "/proc/nowhere"], "--results: cannot write to /proc/nowhere"),
        (["curves", "--methods"], "--methods : of the curves"),
        (["curves", "--methods", "SGD"], "--methods SGD: of the curves"),
        (["publish", "nosuch"], "nosuch"),
    ],
)
def test_a_wrong_value_ends_in_one_line_and_exit_code_2(args, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run of the main job: its folder."""
    results = tmp_path_factory.mktemp("results")
    assert command_line.main(["classify", *TINY, "--results", str(results)]) == 0
    return results / "classify" / "digits"


def test_classify_writes_its_results(finished):
    record = json.loads((finished / "results.json").read_text())
    assert tuple(record["results"]) == ("SGD", "SWAG")
    assert list(record["results"]["SGD"])[:5] == ["accuracy", "NLL", "ECE", "Brier", "OOD AUROC"]
    assert list(record["results"]["SGD"])[5:] == ["FPR95", "sym. KL"]
    for of_method in record["results"].values():
        for summary in of_method.values():
            assert len(summary["values"]) == 2
            assert np.all(np.isfinite(summary["values"]))
    assert record["evaluated_on"] == "test"
    assert record["options"]["epochs"] == 4
    for name in ("reliability.png", "entropy.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_the_json_names_no_folder_of_this_machine(finished):
    assert str(finished.parents[2]) not in (finished / "results.json").read_text()


@pytest.mark.slow
def test_interrupted_and_its_last_checkpoint_damaged_a_run_resumes_to_the_same_numbers(
    finished, tmp_path, monkeypatch, capsys
):
    args = ["classify", *TINY, "--checkpoint-every", "1", "--results", str(tmp_path)]
    one_by_one, done = training._one_by_one, []

    def interrupted(*how):
        epoch = one_by_one(*how)

        def run(*inputs):
            done.append(1)
            if len(done) == 7:  # in the third epoch of the second training
                raise KeyboardInterrupt
            return epoch(*inputs)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(training, "_one_by_one", interrupted)
        assert command_line.main(args) == 130
    assert "--resume" in capsys.readouterr().err
    resumed = tmp_path / "classify" / "digits" / "results.json"
    checkpoints = resumed.parent / "checkpoints" / "averaged_sgd" / "0"
    assert {path.name for path in checkpoints.iterdir()} == {"1", "2"}
    truncated = checkpoints / "2" / "default" / "manifest.ocdbt"
    truncated.write_bytes(truncated.read_bytes()[:50])
    with pytest.warns(RuntimeWarning, match=r"2 is damaged .* has 50 of .* step 1 is restored"):
        assert command_line.main([*args, "--resume"]) == 0
    assert resumed.read_text() == (finished / "results.json").read_text()


def test_resuming_with_other_options_is_refused(finished, capsys):
    args = ["classify", *TINY, "--results", str(finished.parents[1]), "--resume"]
    assert command_line.main([*args, "--learning-rate", "0.02"]) == 2
    said = capsys.readouterr().err
    assert "learning_rate = 0.05, not 0.02" in said
    assert "start anew with --no-resume" in said  # to resume is the default of curves and shift


def test_what_a_method_refuses_is_refused_before_checkpoints_are_deleted(finished, capsys):
    kept = sorted((finished / "checkpoints").rglob("*"))
    args = ["classify", *TINY, "--results", str(finished.parents[1]), "--methods", "FGE"]
    assert command_line.main([*args, "--cycles", "9999"]) == 2
    assert "--cycles 9999" in capsys.readouterr().err
    assert sorted((finished / "checkpoints").rglob("*")) == kept


def test_where_every_checkpoint_is_damaged_one_line_says_so(tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "SWAGJAX_CHECKSUMS").touch()
    with pytest.raises(
        options.UsageError, match=r"--resume: .* damaged.*start anew with --no-resume"
    ):
        training._restore(tmp_path, [])


@pytest.mark.parametrize("left", ["", "{", '{"epochs": 3'])
def test_a_damaged_record_of_the_options_is_refused(left, tmp_path):
    (tmp_path / "options.json").write_text(left)
    with pytest.raises(options.UsageError, match=r"options\.json is damaged"):
        training.open_checkpoints(tmp_path, tiny_options(resume=True))


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_no_run_made_is_not_emptied(resume, tmp_path):
    """Whatever lay under --results in a folder of that name was deleted."""
    (tmp_path / "notes").mkdir(parents=True)
    with pytest.raises(options.UsageError, match=r"holds notes and no options\.json"):
        training.open_checkpoints(tmp_path, tiny_options(resume=resume))
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]


def test_a_run_killed_in_its_first_write_starts_anew(tmp_path):
    (tmp_path / "options.tmp").write_text("{")
    training.open_checkpoints(tmp_path, tiny_options(resume=True))
    assert [p.name for p in tmp_path.iterdir()] == ["options.json"]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path):
    rng = np.random.default_rng(4)

    def start(name, *more):
        args = ["classify", *TINY, "--checkpoint-every", "1", "--results", str(tmp_path / name)]
        return subprocess.Popen([sys.executable, "-m", "benchmarks", *args, *more], cwd=ROOT)

    def kill_after(checkpoint, *more):
        with start("killed", *more) as run:
            folder = tmp_path / "killed" / "classify" / "digits" / "checkpoints"
            while not (folder / checkpoint).exists():
                assert run.poll() is None
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.5))
            run.kill()
        assert run.returncode == -signal.SIGKILL

    kill_after("decayed_sgd/0/2.orbax-checkpoint-tmp")
    kill_after("decayed_sgd/0/3", "--resume")
    kill_after("averaged_sgd/0/2", "--resume")
    for name in ("killed", "uninterrupted"):
        with start(name, "--resume") as run:
            assert run.wait() == 0
    killed, uninterrupted = (
        tmp_path / name / "classify" / "digits" / "results.json"
        for name in ("killed", "uninterrupted")
    )
    assert killed.read_text() == uninterrupted.read_text()


def test_an_unfinished_run_is_not_completed_with_checkpoints_of_an_older_one(tmp_path):
    chosen = tiny_options()
    (tmp_path / "averaged_sgd").mkdir(parents=True)
    (tmp_path / "options.json").write_text("{}")
    training.open_checkpoints(tmp_path, chosen)
    assert [p.name for p in tmp_path.iterdir()] == ["options.json"]
    (tmp_path / "averaged_sgd").mkdir()
    training.open_checkpoints(tmp_path, dataclasses.replace(chosen, resume=True))
    assert (tmp_path / "averaged_sgd").is_dir()


def test_results_are_of_one_folder_whatever_the_names_of_the_data_sets():
    chosen = tiny_options(dataset="a/b:1.0", ood_dataset="c/d", evaluate="validation")
    folder = classify._folder(dataclasses.replace(chosen, results=Path("r")))
    assert folder == Path("r/classify/a-b-1.0-convnet-against-c-d-validation")


def test_all_may_stand_among_other_methods_and_texts_are_not_augmented(digits):
    task = data.Task(digits, digits, digits, digits, CLASSES, None)
    chosen = classify._complete(classify.Classify(methods=("all", "SGD")), task)
    assert chosen.methods == tuple(methods.METHODS)
    with pytest.raises(options.UsageError, match="--augment crop: of images, not of texts"):
        classify._complete(classify.Classify(augment=("crop",)), task._replace(vocabulary=9))


@needs_data
@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "trec"])
def test_classify_runs_on_tfds_sets(name, tmp_path, monkeypatch):
    load = data.load

    def some(*which):
        task = load(*which)
        parts = (data.Part(of.inputs[:500], of.labels[:500]) for of in task[:4])
        return data.Task(*parts, *task[4:])

    monkeypatch.setattr(data, "load", some)
    args = ["classify", "--dataset", name, "--data-dir", str(TFDS), "--results", str(tmp_path)]
    tiny = ["--epochs", "2", "--start", "1", "--seeds", "1", "--num-samples", "3"]
    tiny += ["--members", "1", "--batch-size", "50"]
    assert command_line.main([*args, *tiny, "--cycles", "2", "--snapshots", "2"]) == 0
    record = json.loads((tmp_path / "classify" / name / "results.json").read_text())
    assert tuple(record["results"]) == tuple(methods.METHODS)
    for of_method in record["results"].values():
        assert np.isfinite([of["mean"] for of in of_method.values()]).all()
