import json

import jax
import numpy as np
import pytest
from scipy import stats

from benchmarks.experiments import gap as experiment
from benchmarks.experiments.gap import Bands, Gap, gap
from benchmarks.options import UsageError

TINY = {
    "points": 10,
    "hidden": 3,
    "chains": 2,
    "warmup": 20,
    "draws": 8,
    "vi_steps": 20,
    "steps": 40,
    "every": 2,
    "learning_rates": (1e-4, 1e-3),
    "scales": (1.0, 4.0),
    "rank": 3,
    "members": 2,
    "num_samples": 20,
}


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.slow
def test_one_command_writes_figures_and_a_picture(tmp_path, capsys):
    gap(Gap(**TINY, results=tmp_path))
    text = (tmp_path / "gap" / "results.json").read_text()
    record = json.loads(text, parse_constant=refuse_constant)
    assert list(record["results"]) == ["NUTS", "Mean-field VI", "SWAG", "MultiSWAG"]
    metrics = {f"{m} {r}" for m in ("NLL", "distance", "sd ratio") for r in experiment.REGIONS}
    for method, of in record["results"].items():
        assert set(of) == metrics
        assert {len(value["values"]) for value in of.values()} == {2 if method == "SWAG" else 1}
    assert record["results"]["NUTS"]["distance gap"]["mean"] == 0
    nuts, swag = record["methods"]["NUTS"], record["methods"]["SWAG"]
    assert not nuts["converged"]  # 8 draws after 20 steps are not enough, and it says so
    assert "NOT converged" in capsys.readouterr().out
    assert len(swag["validation"]) == 4
    settings = {(entry["learning_rate"], entry["scale"]) for entry in swag["validation"]}
    assert (swag["learning_rate"], swag["scale"]) in settings
    assert record["options"]["hidden"] == 3
    assert (tmp_path / "gap" / "bands.png").stat().st_size > 10_000


def test_points_lie_in_their_regions():
    train, validation, held_out, grid = experiment.problem(Gap(points=60))
    parts = experiment.regions(held_out.x)
    for region, low, high in [("inside", 0.4, 1), ("gap", 0, 0.4), ("outside", 1, 1.5)]:
        size = np.abs(held_out.x[parts[region]])
        assert low <= size.min() < size.max() <= high
        assert len(size) == 1000
    for points in (train, validation):  # which settings are chosen by: nothing of the gap
        assert 0.4 <= np.abs(points.x).min() < np.abs(points.x).max() <= 1
    assert not set(train.x) & set(validation.x)
    assert (train.x < 0).sum() == 30
    assert (grid[0], grid[-1]) == (-1.5, 1.5)
    residual = held_out.y - experiment.truth(held_out.x)
    assert abs(residual.std() / 0.1 - 1) < 0.08  # six standard errors of 3000 points
    again, *_ = experiment.problem(Gap(points=60))
    other, *_ = experiment.problem(Gap(points=60, seed=1))
    assert np.array_equal(again.y, train.y)
    assert not np.array_equal(other.y, train.y)


def test_densities_are_those_of_normals():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=3) for name in ("w1", "b1", "w2")} | {"b2": rng.normal()}
    points = experiment.Points(rng.normal(size=5), rng.normal(size=5))
    values = [
        sum(
            v * np.tanh(4 * (w * x + b)) for w, b, v in zip(*list(params.values())[:3], strict=True)
        )
        / np.sqrt(3)
        + params["b2"]
        for x in points.x
    ]
    wanted = stats.norm(values, 0.1).logpdf(points.y)
    np.testing.assert_allclose(experiment.log_likelihood(params, points), wanted, rtol=1e-4)
    prior = sum(stats.norm.logpdf(leaf).sum() for leaf in params.values())
    np.testing.assert_allclose(experiment.log_prior(params), prior, rtol=1e-5)


def test_nll_is_of_the_averaged_density_by_region():
    """Of two functions, one right and one far off: half the density, log 2 more."""
    points = experiment.Points(np.array([0.5, -0.1, 1.2, 0.6]), np.array([1.0, 2.0, 3.0, 1.1]))
    values = np.stack([points.y + 0.1 * np.array([0, 1, 2, 0]), points.y + 50])
    got = experiment.nll(values, points)
    wanted = np.log(2) - stats.norm.logpdf([0, 1, 2], scale=1) + np.log(0.1)
    np.testing.assert_allclose([got[f"NLL {r}"] for r in experiment.REGIONS], wanted)


def test_distances_are_those_of_normals_by_region():
    x = np.linspace(-1.5, 1.5, 301)
    wanted = Bands(np.sin(x), 1 + x**2)
    inside = (np.abs(x) > 0.4) & (np.abs(x) < 1)
    moved = Bands(wanted.mean + 3 * inside, wanted.sd)
    got = experiment.distances(moved, wanted, x)
    np.testing.assert_allclose([got[f"distance {r}"] for r in experiment.REGIONS], [3, 0, 0])
    np.testing.assert_allclose([got[f"sd ratio {r}"] for r in experiment.REGIONS], [1, 1, 1])
    wider = Bands(wanted.mean, np.where(np.abs(x) <= 0.4, 2, 1) * wanted.sd)
    got = experiment.distances(wider, wanted, x)
    np.testing.assert_allclose([got[f"sd ratio {r}"] for r in experiment.REGIONS], [1, 2, 1])
    in_gap = np.abs(x) <= 0.4
    np.testing.assert_allclose(got["distance gap"], (1 + x**2)[in_gap].mean())


def chains(shift=0.0):
    """Independent draws; in the second chain the same units negated, and a shift."""
    rng = np.random.default_rng(0)
    sign = np.array([1, -1])[:, None, None]
    draws = {name: sign * np.abs(rng.normal(size=(2, 400, 3))) for name in ("w1", "b1", "w2")}
    draws["b2"] = rng.normal(size=(2, 400)) + shift * np.array([0, 1])[:, None]
    return jax.tree.map(lambda x: x.astype(np.float32), draws)


@pytest.mark.slow
def test_r_hat_is_of_functions():
    """Chains at opposite signs, where weights never agree, have the same functions."""
    assert experiment.mixing(chains())["r_hat"] < 1.02
    assert experiment.mixing(chains(shift=3.0))["r_hat"] > 1.1


def test_the_elbo_is_at_most_what_a_perfect_fit_would_give():
    chosen = Gap(**TINY)
    train, *_ = experiment.problem(chosen)
    _, about = experiment._vi(jax.random.key(0), train, chosen)
    assert about["elbo_of_last_tenth"] < -chosen.points * np.log(
        experiment.NOISE * np.sqrt(2 * np.pi)
    )


def test_a_diagnostic_that_is_no_number_is_none():
    assert [experiment._number(x) for x in (np.nan, np.inf, np.float32(1.5))] == [None, None, 1.5]


def test_the_setting_of_the_most_spread_within_a_standard_error_is_chosen():
    """The least NLL is 1 with a standard error of 0.5; 1.4 is within it, 1.6 and NaN are not."""
    means = np.array([[1.0, 1.6], [1.4, np.nan], [1.2, 9.0]])
    nll = means[..., None] + np.array([-1.0, 1.0, 0.0, 0.0]) * np.sqrt(1.5)
    spread = np.array([[0.1, 0.9], [0.5, 0.9], [0.2, 0.9]])
    assert experiment.choose(nll, spread) == (1, 0)
    spread[2, 0] = 0.6
    assert experiment.choose(nll, spread) == (2, 0)
    with pytest.raises(UsageError, match="--learning-rates: SGD diverged"):
        experiment.choose(np.full((2, 2, 3), np.nan), np.ones((2, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 1}, "--points 1: at least 2"),
        ({"chains": 1}, "--chains 1: at least 2"),
        ({"rank": 1}, "--rank 1: at least 2"),
        ({"num_samples": 0}, "--num-samples 0: at least 2"),
        ({"learning_rates": ()}, r"--learning-rates \(\): numbers above zero"),
        ({"scales": (1.0, -1.0)}, r"--scales \(1\.0, -1\.0\): numbers above zero"),
        ({"steps": 10, "every": 6}, "--every 6: at most half of --steps 10"),
    ],
)
def test_bad_options_end_in_one_line(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        gap(Gap(**options, results=tmp_path))
    assert not list(tmp_path.iterdir())
