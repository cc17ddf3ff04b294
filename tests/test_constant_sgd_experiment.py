import dataclasses
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


@pytest.mark.slow
def test_one_command_writes_figures_and_pictures(tmp_path, capsys):
    methods, sweep = tuple(experiment.STYLES), (0.5, 1e6)
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


@pytest.mark.slow
def test_an_interrupted_run_is_resumed_after_the_methods_that_were_done(tmp_path, monkeypatch):
    chosen = ConstantSgd(**TINY, methods=("SGD", "averages"), sweep=(0.5, 1.0), results=tmp_path)
    path = tmp_path / "constant_sgd" / "diabetes" / "results.json"
    constant_sgd(chosen)
    whole = path.read_text()
    path.unlink()
    run, done = experiment.run, []

    def interrupted(*args):
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return run(*args)

    monkeypatch.setattr(experiment, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        constant_sgd(chosen)
    done.clear()
    constant_sgd(dataclasses.replace(chosen, resume=True))
    assert path.read_text() == whole
    assert len(done) == 1  # SGD and its averages were done


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


@pytest.mark.slow
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
    assert not list(tmp_path.rglob("*.png")) + list(tmp_path.rglob("results.json"))


def exact(of, H, momentum, own):
    """Covariance of iterates and of averages, the noise of each row's own Hessian included.

    The mean of theta and velocity moves by L, the mean over rows of M_i; their second moments solve
    ``Sigma = mean_i M_i Sigma M_i^T + Q``. ``own`` is the covariance of noise that SGLD adds.
    """
    D, eye = len(of.mean), np.eye(len(of.mean))
    moves, sources = [], []
    for x, y in zip(of.x.astype(float), of.y.astype(float), strict=True):
        hessian = np.outer(x, x) / of.noise + of.precision * eye
        gradient = x * (x @ of.mean - y) / of.noise + of.precision * of.mean
        pull = -H @ hessian
        moves.append(np.block([[eye + pull, momentum * eye], [pull, momentum * eye]]))
        sources.append(np.tile(H @ gradient, 2))
    q = np.cov(np.array(sources).T, ddof=0)
    q[:D, :D] += own
    kron = sum(np.kron(M, M) for M in moves) / len(moves)
    sigma = np.linalg.solve(np.eye(len(kron)) - kron, q.ravel()).reshape(2 * D, 2 * D)
    L, T = sum(moves) / len(moves), of.steps
    powers = [(np.linalg.matrix_power(L, k) @ sigma)[:D, :D] for k in range(T)]
    total = T * powers[0] + sum((T - k) * (powers[k] + powers[k].T) for k in range(1, T))
    return sigma[:D, :D], total / T**2


@pytest.mark.slow
def test_every_sampler_has_the_moments_that_theory_says(monkeypatch):
    """The last draws of 2000 independent chains against moments that are exact for these rows.

    By n (tr M - D - log det M), about chi-squared with D (D + 1) / 2 degrees of freedom; seven
    comparisons at 1e-8 each. The theory leaves the noise of the rows' Hessians out: a few parts in
    a hundred of N = 250, by the large step of "averages, full" a fifth.
    """
    monkeypatch.setattr(experiment, "LEAST", 1)
    _, of = example()
    chosen = ConstantSgd(chains=2000, burn_in=3.0, length=1e-3)
    step, (diagonal, full) = _best_step(of), experiment.preconditioners(of)
    unit, m = np.eye(4), chosen.momentum
    used = {
        "SGD": (step * unit, 0.0),
        "SGD, momentum": ((1 - m) * step * unit, m),
        "SGD, reshuffled": (step * unit, 0.0),
        "SGD, diagonal": (diagonal, 0.0),
        "SGD, full": (full, 0.0),
        "averages, full": (chosen.averaged * full, 0.0),
        "SGLD": (chosen.langevin * step * unit, 0.0),
    }
    runs = experiment.samplers(chosen, of)
    assert list(runs) == list(used)
    for name, (H, momentum) in used.items():
        averaged, sampler = name.startswith("averages"), runs[name]()
        draws = experiment.run(chosen, of, sampler)[averaged][-chosen.chains :]
        own = 2 * chosen.langevin * step / of.rows * unit if name == "SGLD" else 0.0
        wanted = exact(of, H, momentum, own)[averaged]
        M = np.linalg.solve(wanted, np.cov(draws.T))
        distance = len(draws) * (np.trace(M) - 4 - np.linalg.slogdet(M)[1])
        if name == "SGD, reshuffled":
            assert np.linalg.eigvals(M).real.max() < 0.8
        else:
            assert distance < stats.chi2.isf(1e-8, 10), name
            theory = sampler.averaged if averaged else sampler.covariance
            np.testing.assert_allclose(
                np.linalg.eigvals(np.linalg.solve(theory, wanted)).real, 1, atol=0.25
            )


def _best_step(of):
    return 2 * of.batch_size / of.rows * len(of.mean) / np.trace(of.C)


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
    assert not list(tmp_path.rglob("*.png")) + list(tmp_path.rglob("results.json"))
