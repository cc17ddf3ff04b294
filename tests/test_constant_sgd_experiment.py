import json

import numpy as np
import pytest
from scipy import stats

from benchmarks.experiments import constant_sgd as experiment
from benchmarks.experiments.constant_sgd import ConstantSgd, Moments, constant_sgd
from benchmarks.options import UsageError
from benchmarks.regression.data import Dataset, Split
from tests import oracle

TINY = {"batch_size": 20, "chains": 4, "burn_in": 0.001, "length": 0.001, "vi_steps": 20}


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize(
    ("methods", "sweep"),
    [
        (("averages",), ()),
        pytest.param(tuple(experiment.STYLES), (0.5, 1e6), marks=pytest.mark.slow),
    ],
)
def test_one_command_writes_figures_and_pictures(methods, sweep, tmp_path, capsys):
    constant_sgd(ConstantSgd(**TINY, methods=methods, sweep=sweep, results=tmp_path))
    folder = tmp_path / "constant_sgd" / "diabetes"
    text = (folder / "results.json").read_text()
    record = json.loads(text, parse_constant=refuse_constant)
    assert list(record["results"]) == [*methods, "posterior"]
    for name, of in record["results"].items():
        assert (max(of["KL"]["mean"], of["KL, theory"]["mean"]) < 1e-9) == (name == "posterior")
    assert [point["multiple"] for point in record["sweep"]] == [m for m in sweep if m < 1e6]
    assert record["options"]["batch_size"] == 20
    assert record["least_kl"]["scalar"]["least"] <= record["least_kl"]["scalar"]["formula"]
    for picture in ("step.png", "spread.png"):
        assert (folder / picture).stat().st_size > 10_000
    assert "diabetes: N = 398, D = 11" in capsys.readouterr().out


def example():
    """A well-specified problem of 300 rows in two splits."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)) * [1, 5, 0.1]
    y = x @ [1.0, 0.2, -3.0] + rng.normal(size=300)
    order = rng.permutation(300)
    splits = [Split(order[50:], order[:50]), Split(order[:250], order[250:])]
    dataset = Dataset("example", x, y, splits, "random")
    return dataset, experiment.problem(ConstantSgd(prior=0.5), dataset, 1)


def test_the_posterior_is_that_of_linear_regression():
    """By conditioning the joint normal of weights and targets, in their kernel form."""
    dataset, of = example()
    rows = dataset.splits[1].train
    x, y = dataset.inputs[rows], dataset.targets[rows]
    X = np.column_stack([(x - x.mean(0)) / x.std(0), np.ones(250)])
    y = (y - y.mean()) / y.std()
    residual = y - X @ np.linalg.lstsq(X, y)[0]
    noise = residual @ residual / 246
    np.testing.assert_allclose(of.noise, noise, rtol=1e-5)
    joint = X @ X.T / 4 + noise * np.eye(250)  # prior of standard deviation 1/2
    gain = np.linalg.solve(joint, X).T / 4
    np.testing.assert_allclose(of.mean, gain @ y, rtol=1e-4, atol=1e-6)
    wanted = np.eye(4) / 4 - gain @ X / 4
    np.testing.assert_allclose(of.covariance, wanted, rtol=1e-4, atol=1e-8)
    gradients = X * ((X @ of.mean - y) / noise)[:, None]
    np.testing.assert_allclose(of.C, np.cov(gradients.T, ddof=0), rtol=1e-3, atol=1e-4)
    assert of.batch_size == 1
    assert of.steps == 250


def test_scores_are_those_of_normals():
    _, of = example()
    moments = Moments(of.mean + 0.01, 1.5 * of.covariance + 1e-4 * np.eye(4))
    got = experiment.scores(of, moments, Moments(of.mean, 4 * of.covariance))
    wanted = oracle.kl(*moments, of.mean, of.covariance)
    np.testing.assert_allclose(got["KL"], wanted)
    np.testing.assert_allclose(got["KL, theory"], 4 * (4 - 1 - np.log(4)) / 2)
    ratio = np.sqrt(1.5 + 1e-4 / np.diag(of.covariance))
    np.testing.assert_allclose([got["least sd"], got["largest sd"]], [ratio.min(), ratio.max()])
    sd = [np.sqrt(of.noise + x @ moments.covariance @ x) for x in of.test_x.astype(float)]
    wanted = -stats.norm(of.test_x @ moments.mean, sd).logpdf(of.test_y).mean()
    np.testing.assert_allclose(got["test NLL"], wanted, rtol=1e-6)


def test_reshuffled_epochs_take_every_row_once():
    import jax

    _, of = example()
    of = of._replace(batch_size=4)  # 62 minibatches, two rows of the 250 left out
    for reshuffled in (True, False):
        rows = np.asarray(experiment._minibatches(jax.random.key(0), of, 3, reshuffled))
        assert rows.shape == (62, 3, 4)
        assert 0 <= rows.min() <= rows.max() < 250
        distinct = {len(set(rows[:, chain].ravel().tolist())) for chain in range(3)}
        assert (distinct == {248}) == reshuffled
        assert len({rows[:, chain].tobytes() for chain in range(3)}) == 3


def test_minibatches_that_are_too_large_end_in_one_line(tmp_path):
    chosen = ConstantSgd(batch_size=398, methods=("SGD",), results=tmp_path)
    with pytest.raises(UsageError, match="--batch-size 398: SGD diverges"):
        constant_sgd(chosen)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_sampler_has_the_moments_that_theory_says():
    """500 chains; of normal draws log det has a standard error of 0.13, and 8 % is added for N."""
    _, of = example()
    chosen = ConstantSgd(chains=500, burn_in=3.0, length=0.01)
    for name, build in experiment.samplers(chosen, of).items():
        sampler = build()
        draws = experiment.run(chosen, of, sampler)[name.startswith("averages")]
        covariance = sampler.averaged if name.startswith("averages") else sampler.covariance
        eigenvalues = np.linalg.eigvals(np.linalg.solve(covariance, np.cov(draws.T))).real
        if name == "SGD, reshuffled":
            assert eigenvalues.max() < 0.8
        else:
            np.testing.assert_allclose(eigenvalues, 1, atol=0.15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chains": 1}, "--chains 1: at least 2"),
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"burn_in": 0.0}, "--burn-in 0.0: a number above zero"),
        ({"momentum": 1.0}, "--momentum 1.0: at least 0, below 1"),
        ({"sweep": (1.0, 0.0)}, "--sweep"),
        ({"methods": ("SWAG",)}, "--methods 'SWAG': choose of SGD, SGD, momentum"),
    ],
)
def test_bad_options_end_in_one_line(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        constant_sgd(ConstantSgd(**options, results=tmp_path))
    assert not list(tmp_path.iterdir())
