"""The recipe: a schedule that settles and then collects, and the report on what was collected."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import swagjax
from benchmarks import __main__ as command_line
from benchmarks import report
from swagjax import diagnostics, schedules


def test_the_schedule_is_a_decayed_run_a_rise_and_a_constant_rate():
    schedule = schedules.collecting_schedule(0.2, 0.05, 200, 40, settled=0.1)
    t = np.arange(400.0)
    decayed = np.interp(t / 200, [0, 0.5, 0.9, 1], [0.2, 0.2, 0.02, 0.02])
    rising = np.interp(t, [200, 240], [0.02, 0.05])
    wanted = np.where(t < 200, decayed, rising)
    np.testing.assert_allclose([schedule(int(step)) for step in t], wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(t.astype(int)), wanted, rtol=1e-5)


def test_the_rates_of_the_schedule_may_be_traced():
    def at(rate, step):
        return schedules.collecting_schedule(rate, rate / 2, 10, 5)(step)

    rates = jnp.array([0.1, 0.4])
    np.testing.assert_allclose(jax.vmap(at, (0, None))(rates, 20), [0.05, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"init_value": -1.0}, "init_value is -1.0"),
        ({"collect_value": np.nan}, "collect_value is nan"),
        ({"settle": 0}, "settle=0"),
        ({"rise": 1.5}, "rise=1.5"),
        ({"settled": -0.1}, "settled is -0.1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(kwargs, said):
    good = {"init_value": 0.1, "collect_value": 0.01, "settle": 10, "rise": 2}
    with pytest.raises(ValueError, match=said):
        schedules.collecting_schedule(**good | kwargs)


def test_the_mean_is_collected_around_the_settled_weights():
    """On a quadratic with noise: the iterates spread as the rate of collecting says.

    Of SGD of rate r on x^2 / 2 with unit noise the stationary variance is r / (2 - r).
    """
    schedule = schedules.collecting_schedule(0.5, 0.2, 500, 100)
    tx = optax.chain(optax.sgd(schedule), swagjax.swag_diag(start=600))
    noise = jax.random.normal(jax.random.key(0), (4600, 1000))

    def step(carry, z):
        x, opt_state = carry
        updates, opt_state = tx.update(x - 3.0 + z, opt_state, x)
        return (optax.apply_updates(x, updates), opt_state), None

    x = jnp.zeros(1000)
    (_, opt_state), _ = jax.lax.scan(step, (x, tx.init(x)), noise)
    state = swagjax.get_state(opt_state)
    assert state.num_collected == 4000
    # Means over 1000 coordinates of 4000 correlated iterates: off by 1e-3 with one key in 10^6.
    assert jnp.mean(state.mean) == pytest.approx(3.0, abs=3e-3)
    assert jnp.mean(state.variance) == pytest.approx(0.2 / 1.8, rel=1e-2)


def path(kind, size=2000, number=60):
    """Iterates around 1 that are as their name says."""
    rng = np.random.default_rng(0)
    noise = 0.05 * rng.normal(size=(number, size))
    slow = np.cumsum(noise, 0) / 4
    jumped = noise / 50 + np.where(np.arange(number)[:, None] < 20, 0.9 * rng.normal(size=size), 0)
    spoiled = noise.copy()
    spoiled[7, 3] = np.nan
    return 1 + {
        "settled": noise,
        "travelling": slow,
        "still": 1e-7 * noise,
        "apart": jumped,
        "diverged": spoiled,
        "few": noise[:5],
        "all zero": 0 * noise - 1,
        "overflow": 1e25 * noise,
    }[kind].astype(np.float32)


def collected(iterates, rank=20):
    tx, params = swagjax.swag(rank), jnp.zeros(iterates.shape[1])

    def step(state, x):
        return tx.update(x, state, params)[1], None

    return jax.lax.scan(step, tx.init(params), iterates)[0]


@pytest.mark.parametrize("kind", ["settled", "travelling", "still", "apart", "diverged", "few"])
def test_the_report_tells_what_the_iterates_did(kind):
    state = collected(jnp.asarray(path(kind)))
    found = diagnostics.report(state)
    assert found.verdict == kind
    assert f"{diagnostics.drift(state).trend:.2f}" in found.numbers
    assert str(found) == f"{kind}: {found.numbers}: {found.advice}"


@pytest.mark.parametrize(("kind", "verdict"), [("all zero", "still"), ("overflow", "apart")])
def test_numbers_that_are_none_are_not_settled(kind, verdict):
    """Movement and spread are NaN: of weights that are zero, and of squares that overflow."""
    assert diagnostics.report(collected(jnp.asarray(path(kind)))).verdict == verdict


def test_no_report_is_made_inside_jit():
    state = collected(jnp.asarray(path("settled")))
    with pytest.raises(ValueError, match="traced: call report outside jit"):
        jax.jit(lambda s: diagnostics.report(s).numbers and 0)(state)


def test_the_table_of_gains_is_made_from_the_results(tmp_path, monkeypatch, capsys):
    """Signs as they are read: below 0 is better; sets without SWAG are left out."""
    scores = {"SGD": [1.0, 1.2, 1.4], "SWAG": [0.9, 1.0, 1.1]}
    for name, used in (("a", scores), ("b", {"SGD": scores["SGD"], "SWA": scores["SWAG"]})):
        of = {method: {"NLL": values} for method, values in used.items()}
        tests = {"NLL": report.paired_tests(of, "NLL", 0.1)}
        data = {"rows": 500, "splits": 3}
        context = {"options": {"dataset": name}, "data": data, "paired_tests": tests}
        report.write_json(tmp_path / f"{name}-tuned" / "results.json", report.record(of, **context))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- gains -->\nold\n<!-- end -->\nafter")
    monkeypatch.setattr(report, "README", readme)
    assert command_line.main(["gains", "--results", str(tmp_path)]) == 0
    test = json.loads((tmp_path / "a-tuned" / "results.json").read_text())["paired_tests"]["NLL"]
    error, p = (test["SGD"]["SWAG"][name] for name in ("standard_error", "p"))
    row = (
        f"| a | 500 | 3 | 1.200 |  |  |  | 1.000 |  | -0.200±{error:.3f} | {p:.2g} | 3 of 3 |  |  |"
    )
    assert row in capsys.readouterr().out
    text = readme.read_text()
    assert row in text
    assert "old" not in text
    assert text.startswith("before")
    assert text.endswith("after")
    assert command_line.main(["gains", "--results", str(tmp_path / "nothing")]) == 2
