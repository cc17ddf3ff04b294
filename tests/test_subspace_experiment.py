"""The experiment in the subspace: its samplers, what it draws, and its command."""

import dataclasses
import json

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from scipy import stats

import swagjax
from benchmarks import options
from benchmarks.experiments import subspace as experiment
from benchmarks.experiments.subspace import Subspace
from benchmarks.regression import data, network
from swagjax import subspace

KEY = jax.random.key(0)
TINY = {
    "splits": 2,
    "dim": 2,
    "temperatures": (1.0, 100.0),
    "scales": (1.0, 3.0),
    "hidden": (4,),
    "epochs": 12,
    "start": 4,
    "batch_size": 100,
    "weight_decay": 0.1,
    "rank": 5,
    "chains": 2,
    "warmup": 20,
    "draws": 12,
    "num_samples": 6,
}


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.slow
def test_one_command_writes_figures_and_a_picture(tmp_path, capsys):
    experiment.subspace(Subspace(**TINY, results=tmp_path))
    folder = tmp_path / "subspace" / "diabetes"
    record = json.loads((folder / "results.json").read_text(), parse_constant=refuse_constant)
    assert tuple(record["results"]) == experiment.METHODS
    for of in record["results"].values():
        assert all(len(of[metric]["values"]) == 2 for metric in experiment.METRICS)
    assert set(record["chosen"]["PCA"]) <= {1.0, 100.0}
    assert set(record["chosen"]["SWAG scaled"]) <= {1.0, 3.0}
    tables = record["held_out_nll"]
    for name, values in record["chosen"].items():
        tried = (1.0, 3.0) if name == "SWAG scaled" else (1.0, 100.0)
        assert values == [tried[int(np.argmin(row))] for row in tables[name]]
    assert record["results"]["SWA"] != record["results"]["PCA+ESS"]
    assert (folder / "posterior.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "NLL of PCA+ESS - SWAG scaled" in said
    assert "R-hat" in said


@pytest.mark.slow
def test_an_interrupted_run_is_resumed_after_its_search(tmp_path, monkeypatch):
    chosen = Subspace(**TINY, results=tmp_path)
    path = tmp_path / "subspace" / "diabetes" / "results.json"
    experiment.subspace(chosen)
    whole = path.read_text()
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "_final", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            experiment.subspace(chosen)
    monkeypatch.setattr(experiment, "_search", None)
    experiment.subspace(dataclasses.replace(chosen, resume=True))
    assert path.read_text() == whole


def trained(count=9, rank=6):
    """A state of iterates of a network around an initial one."""
    tx, params = swagjax.swag(rank), network.init(KEY, 3, (4,))
    update, state = jax.jit(tx.update), None
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    rows = flat + 0.1 * np.random.default_rng(0).normal(size=(count, len(flat)))
    for row in rows:
        zero = jax.tree.map(jnp.zeros_like, params)
        state = update(zero, tx.init(params) if state is None else state, unravel(row))[1]
    return state, np.asarray(rows, np.float64), rank


@pytest.mark.slow
def test_swag_in_the_coordinates_of_the_subspace():
    """By the dense covariance and the orthogonal projection, in float64."""
    state, rows, rank = trained()
    space = subspace.pca(state, 4)
    v = np.concatenate(
        [np.reshape(x, (4, -1)) for x in jax.tree.leaves(space.directions)], axis=1
    ).astype(np.float64)
    to_z = v / (v**2).sum(1, keepdims=True)
    wanted = to_z @ oracle.covariance("swag", rows, rank) @ to_z.T
    got = experiment.swag_covariance(space, state)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)
    assert (np.diag(got) > 0.5).all()  # of the low-rank part alone 1/2


def test_the_likelihood_is_of_the_train_rows_and_not_of_the_padding():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: network.init(key, 3, (4,)), KEY)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=7)
    mean, variance = network.apply(params, jnp.asarray(x))
    wanted = stats.norm(mean, np.sqrt(variance)).logpdf(y)[:5].sum()
    rows = experiment.Rows(jnp.asarray(x), jnp.asarray(y), 5)
    np.testing.assert_allclose(experiment.log_likelihood(rows, params), wanted, rtol=1e-5)


@pytest.mark.slow
def test_draws_are_thinned_evenly_over_all_chains():
    space = subspace.Subspace(jnp.zeros(1), jnp.ones((1, 1)), jnp.ones(1))
    zs = jnp.arange(12.0).reshape(3, 4, 1)
    for number, each in ((3, 1), (6, 2)):
        got = np.ravel(experiment.thinned(space, zs, number))
        assert len(set(got)) == number
        assert np.bincount(got.astype(int) // 4).tolist() == [each] * 3
        assert len(set(np.diff(got))) == 1


def test_outputs_are_cut_into_methods():
    """One network of SWA, then as many of each other method."""
    labels = np.concatenate([[0], np.repeat(np.arange(1, 6), 3)])
    outputs = (np.tile(labels[None, :, None], (2, 1, 4)), np.ones((2, 16, 4)))
    found = experiment._by_method(outputs, 3)
    assert tuple(found) == experiment.METHODS
    for i, name in enumerate(experiment.METHODS):
        means, variances = found[name]
        assert means.shape == variances.shape == (2, 3 if i else 1, 4)
        assert (means == i).all()


def test_the_least_nll_is_chosen_and_never_one_that_diverged():
    nll = np.array([[3.0, 1.0, 2.0], [np.nan, 2.0, 1.5], [np.inf, np.nan, 4.0]])
    assert experiment._least(nll).tolist() == [1, 2, 2]


@pytest.mark.slow
def test_scores_are_in_the_units_of_the_targets():
    """Of two members, by the moments of their mixture, padding left out."""
    rng = np.random.default_rng(0)
    dataset = data.Dataset("made", rng.normal(size=(40, 2)), rng.normal(10, 7, 40), [], "random")
    splits = [
        data.Split(np.arange(30), np.arange(30, 40)),
        data.Split(np.arange(32), np.arange(33, 40)),
    ]
    parts = data.parts(dataset, splits)
    means, variances = rng.normal(size=(2, 2, 10)), rng.uniform(0.5, 2, (2, 2, 10))
    found = experiment._scores(means, variances, parts)
    for i, split in enumerate(splits):
        n, y, std = len(split.test), dataset.targets[split.test], parts.y_std[i]
        mean = means[i, :, :n].mean(0)
        spread = np.sqrt((variances[i, :, :n] + means[i, :, :n] ** 2).mean(0) - mean**2)
        mean, spread = parts.y_mean[i] + std * mean, std * spread
        np.testing.assert_allclose(found["RMSE"][i], np.sqrt(((mean - y) ** 2).mean()), rtol=1e-4)
        wanted = -stats.norm(mean, spread).logpdf(y).mean()
        np.testing.assert_allclose(found["NLL"][i], wanted, rtol=1e-4)
        inside = np.abs(y - mean) < stats.norm.ppf(0.975) * spread
        np.testing.assert_allclose(found["coverage"][i], inside.mean(), rtol=1e-6)


MISUSE = {
    "dim": ({"dim": 1}, "--dim 1: at least 2"),
    "rank": ({"rank": 5}, "--dim 5: less than --rank 5"),
    "chains": ({"chains": 1}, "--chains 1: at least 2"),
    "samples": ({"num_samples": 2000}, "--num-samples 2000: at most .* 1200"),
    "temperatures": ({"temperatures": (0.0,)}, "--temperatures 0.0: numbers above zero"),
    "scales": ({"scales": ()}, "--scales : numbers above zero"),
    "rate": ({"learning_rate": -1.0}, "--learning-rate -1.0: a number of at least 0"),
    "start": ({"start": 297}, "--start 297: more than --dim 5 less than --epochs 300"),
    "name": ({"name": ("boston",)}, "--name boston: give the folder"),
}


@pytest.mark.parametrize(("chosen", "message"), MISUSE.values(), ids=MISUSE)
def test_wrong_options_are_answered(chosen, message):
    with pytest.raises(options.UsageError, match=message):
        experiment.subspace(Subspace(**chosen))


def test_defaults_are_those_of_the_authors_by_the_number_of_rows():
    assert experiment._complete(Subspace(), 442).epochs == 300
    full = experiment._complete(Subspace(epochs=50, start=10), 1030)
    assert (full.epochs, full.batch_size, full.weight_decay, full.hidden) == (50, 100, 0.01, (50,))
