import functools
import math
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import swagjax
from swagjax import batch_stats, ensemble
from swagjax.posterior import iterates

TX = {"swag": swagjax.swag(3), "swag_diag": swagjax.swag_diag(), "swa": swagjax.swa()}
UPDATE = {kind: jax.jit(tx.update) for kind, tx in TX.items()}  # eager ones compile each time
KEY = jax.random.key(0)
KEYS = jax.random.split(jax.random.key(1), 7)
X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
CHUNKS = (1, 2, 100)  # one by one, with a rest, more than all
PREDICTORS = (swagjax.predict, swagjax.predict_log, swagjax.predict_samples)
EVERY = (*PREDICTORS, lambda *args, **options: next(iter(by_batches(*args, **options))))


def by_batches(key, posterior, prob_fn, inputs, **options):
    return swagjax.predict_batches(key, posterior, prob_fn, [inputs], **options)


def collect(kind="swag", count=6, shapes=(("w", (3, 2)), ("b", (2,))), seed=0):
    """A state that has collected random iterates around 1."""
    rng = np.random.default_rng(seed)
    zeros = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes}
    state = TX[kind].init(zeros)
    for _ in range(count):
        iterate = {n: jnp.float32(1 + rng.normal(size=shape)) for n, shape in shapes}
        _, state = UPDATE[kind](iterate, state, zeros)
    return state


@pytest.fixture(scope="module")
def state():
    return collect()


def logits(params, x):
    return x @ params["w"] + params["b"][None]


def probabilities(params, x):
    return jax.nn.softmax(logits(params, x))


def log_probabilities(params, x):
    return jax.nn.log_softmax(logits(params, x))


def weights(params, x):
    del x
    return params


def each(keys, posterior, function, inputs):
    """The outputs of every sample, by the plain loop that the library replaces."""
    draw = posterior if callable(posterior) else functools.partial(swagjax.sample, state=posterior)
    function = jax.jit(function)
    return np.stack([np.asarray(function(draw(key), inputs), np.float64) for key in keys])


# --- Averages --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_predict_is_the_mean_over_samples(state, chunk_size):
    got = swagjax.predict(KEYS, state, probabilities, X, chunk_size=chunk_size)
    wanted = each(KEYS, state, probabilities, X).mean(0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_predict_samples_stacks_in_the_order_of_the_keys(state, chunk_size):
    got = swagjax.predict_samples(KEYS, state, probabilities, X, chunk_size=chunk_size)
    np.testing.assert_allclose(got, each(KEYS, state, probabilities, X), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_predict_log_is_logsumexp_less_log_s(state, chunk_size):
    got = swagjax.predict_log(KEYS, state, log_probabilities, X, chunk_size=chunk_size)
    wanted = scipy.special.logsumexp(each(KEYS, state, log_probabilities, X), 0) - np.log(7)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    probs = swagjax.predict(KEYS, state, probabilities, X, chunk_size=chunk_size)
    np.testing.assert_allclose(np.exp(got), probs, rtol=1e-5)


def test_averages_are_over_probabilities_not_logits(state):
    """A Bayesian average of probabilities differs from the softmax of averaged logits."""
    probs = swagjax.predict(KEYS, state, probabilities, X)
    geometric = scipy.special.softmax(each(KEYS, state, logits, X).mean(0), axis=-1)
    assert np.abs(np.asarray(probs) - geometric).max() > 1e-3


@pytest.mark.parametrize("num_samples", [1, 7])
def test_one_key_gives_num_samples_distinct_samples(state, num_samples):
    options = {"num_samples": num_samples, "chunk_size": 7}
    samples = swagjax.predict_samples(KEY, state, probabilities, X, **options)
    assert samples.shape == (num_samples, 5, 2)
    assert len(np.unique(samples[:, 0, 0])) == num_samples
    mean = swagjax.predict(KEY, state, probabilities, X, **options)
    np.testing.assert_allclose(mean, samples.mean(0), rtol=1e-5)
    # The same samples whatever the chunk.
    again = swagjax.predict_samples(KEY, state, probabilities, X, num_samples=num_samples)
    np.testing.assert_allclose(again, samples, rtol=1e-5)


def test_default_is_thirty_samples(state):
    assert swagjax.predict_samples(KEY, state, probabilities, X).shape == (30, 5, 2)


def test_samples_of_one_key_are_draws_of_the_posterior(state):
    """The average of the weights themselves: 4000 samples, bound at six standard errors."""
    got = swagjax.predict(KEY, state, weights, X, num_samples=4000, chunk_size=4000)
    spread = swagjax.variance(state)
    for name, mean in state.mean.items():
        assert (np.abs(got[name] - mean) < 6 * np.sqrt(spread[name] / 4000)).all()


def test_predict_log_does_not_underflow(state):
    def far(params, x):
        return -1000.0 + params["b"] + 0 * x[0, 0]

    got = swagjax.predict_log(KEYS, state, far, X, chunk_size=3)
    offsets = each(KEYS, state, far, X)
    wanted = scipy.special.logsumexp(offsets, 0) - np.log(7)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_predict_log_of_impossible_outcomes(state):
    """-inf from some samples counts as zero, from all of them stays -inf; never NaN."""

    def impossible(params, x):
        rare = jnp.where(params["b"][0] > 1, 0.0, -jnp.inf)
        return jnp.stack([rare, -jnp.inf, 0 * x[0, 0]])

    got = swagjax.predict_log(KEYS, state, impossible, X, chunk_size=2)
    share = np.mean(each(KEYS, state, impossible, X)[:, 0] == 0)
    assert 0 < share < 1
    np.testing.assert_allclose(got, [np.log(share), -np.inf, 0], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.bool_])
def test_averages_are_float32_at_the_least(state, dtype):
    """In bfloat16 the sum over 300 ones would stop at 256."""

    def ones(params, x):
        return jnp.ones(2, dtype) + (0 * params["b"] * x[0, :2]).astype(dtype)

    for chunk_size in (1, 150):
        got = swagjax.predict(KEY, state, ones, X, num_samples=300, chunk_size=chunk_size)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, [1, 1])


def test_averages_in_float64():
    with jax.enable_x64(True):
        got = swagjax.predict(KEY, lambda k: jnp.float64(1 / 3), lambda p, x: p * x, 1.0)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, 1 / 3, rtol=1e-14)


def test_inputs_and_outputs_may_be_trees(state):
    inputs = {"x": X, "shift": (np.float32(0.5), None)}

    def outputs(params, inputs):
        out = logits(params, inputs["x"]) + inputs["shift"][0]
        return {"probs": jax.nn.softmax(out), "pair": (out.max(), None)}

    got = swagjax.predict(KEYS, state, outputs, inputs, chunk_size=3)
    all_samples = swagjax.predict_samples(KEYS, state, outputs, inputs, chunk_size=3)
    wanted = each(KEYS, state, lambda p, i: outputs(p, i)["pair"][0], inputs)
    np.testing.assert_allclose(all_samples["pair"][0], wanted, rtol=1e-5)
    np.testing.assert_allclose(got["pair"][0], wanted.mean(), rtol=1e-5)
    np.testing.assert_allclose(got["probs"], all_samples["probs"].mean(0), rtol=1e-5)
    assert got["pair"][1] is None


# --- Antithetic pairs ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TX)
def test_antithetic_pairs_mirror_at_the_mean(kind):
    state = collect(kind)
    options = {"num_samples": 6, "chunk_size": 2, "antithetic": True}
    got = swagjax.predict_samples(KEY, state, weights, X, **options)
    for name, mean in state.mean.items():
        draws = got[name]
        assert draws.shape == (6, *mean.shape)
        centres = (draws[::2] + draws[1::2]) / 2
        np.testing.assert_allclose(centres, np.stack([mean] * 3), rtol=1e-5)
        if kind != "swa":
            assert len(np.unique(draws.reshape(6, -1)[:, 0])) == 6


@pytest.mark.parametrize("kind", TX)
def test_antithetic_has_no_error_in_what_is_linear(kind):
    state = collect(kind)
    got = swagjax.predict(KEY, state, logits, X, num_samples=2, antithetic=True)
    np.testing.assert_allclose(got, logits(state.mean, X), rtol=1e-5, atol=1e-6)
    if kind != "swa":
        plain = swagjax.predict(KEY, state, logits, X, num_samples=2)
        assert np.abs(plain - got).max() > 1e-2


@pytest.mark.slow
def test_antithetic_samples_agree_between_the_functions(state):
    options = {"num_samples": 6, "chunk_size": 2, "antithetic": True}
    samples = swagjax.predict_samples(KEY, state, probabilities, X, **options)
    mean = swagjax.predict(KEY, state, probabilities, X, **options)
    logarithm = swagjax.predict_log(KEY, state, log_probabilities, X, **options)
    (batch,) = swagjax.predict_batches(KEY, state, probabilities, [X], **options)
    for got in (mean, np.exp(logarithm), batch):
        np.testing.assert_allclose(got, samples.mean(0), rtol=1e-5)


def test_each_antithetic_pair_is_drawn_from_the_posterior(state):
    """Half of the samples are plain draws: their variance is that of the posterior."""
    options = {"num_samples": 4000, "chunk_size": 2000, "antithetic": True}
    draws = swagjax.predict_samples(KEY, state, weights, X, **options)["b"][::2]
    # The variance of 2000 draws, within six of its standard errors, sqrt(2 / 2000).
    ratio = draws.var(0) / swagjax.variance(state)["b"]
    assert (np.abs(ratio - 1) < 6 * np.sqrt(2 / 2000)).all()


# --- Batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"antithetic": True}, {"chunk_size": 3}])
def test_predict_batches_is_predict_of_the_whole(state, options):
    """The same samples for every batch, of which the last one is smaller."""
    options = {"num_samples": 4, **options}
    batches = swagjax.predict_batches(KEY, state, probabilities, [X[:2], X[2:4], X[4:]], **options)
    got = np.concatenate(list(batches))
    np.testing.assert_allclose(got, swagjax.predict(KEY, state, probabilities, X, **options), 1e-5)


def test_predict_batches_is_lazy(state):
    taken = []

    def batches():
        for i in range(9):
            taken.append(i)
            yield X

    stream = swagjax.predict_batches(KEY, state, probabilities, batches(), num_samples=2)
    assert taken == []
    first, second = next(stream), next(stream)
    assert taken == [0, 1]
    np.testing.assert_array_equal(first, second)


def test_predict_batches_of_nothing_is_nothing(state):
    assert list(swagjax.predict_batches(KEY, state, probabilities, [])) == []


# --- What stands for a posterior -------------------------------------------------------------


def test_a_function_of_a_key_is_a_posterior(state):
    def sampler(key):
        return swagjax.sample(key, state, scale=0.1)

    got = swagjax.predict(KEYS, sampler, probabilities, X, chunk_size=2)
    np.testing.assert_allclose(got, each(KEYS, sampler, probabilities, X).mean(0), rtol=1e-5)


def test_a_function_without_a_state_is_a_posterior():
    def sampler(key):
        return jax.random.normal(key, (3,), jnp.float32)

    got = swagjax.predict_samples(KEYS, sampler, lambda w, x: x @ w, X, chunk_size=2)
    np.testing.assert_allclose(got, each(KEYS, sampler, lambda w, x: x @ w, X), 1e-4, 1e-5)


def test_options_of_sample_go_in_a_partial(state):
    like = jax.tree.map(lambda m: m.astype(jnp.bfloat16), state.mean)
    options = {"scale": 0.5, "centering": "final", "min_variance": 0.1, "like": like}
    partial = jax.tree_util.Partial(swagjax.sample, state=state, **options)
    got = swagjax.predict_samples(KEYS, partial, weights, X, chunk_size=2)
    assert got["w"].dtype == jnp.bfloat16
    for i, key in enumerate(KEYS):
        wanted = swagjax.sample(key, state, **options)
        for name in wanted:
            np.testing.assert_allclose(
                np.float32(got[name][i]), np.float32(wanted[name]), rtol=0.01, atol=0.01
            )


def test_swa_is_a_prediction_of_the_mean():
    state = collect("swa")
    got = swagjax.predict(KEY, state, probabilities, X, num_samples=3)
    np.testing.assert_allclose(got, probabilities(state.mean, X), rtol=1e-5)


# --- Sets of points --------------------------------------------------------------------------

SOME_CHUNKS = (2, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (1, 100)))


def points(n=6, seed=3):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(n, 3, 2)), "b": rng.normal(size=(n, 2))}
    return ensemble.Points(jax.tree.map(jnp.float32, params))


def of_points(chosen, function):
    rows = zip(chosen.params["w"], chosen.params["b"], strict=True)
    return np.stack([np.asarray(function({"w": w, "b": b}, X), np.float64) for w, b in rows])


@pytest.mark.parametrize("chunk_size", SOME_CHUNKS)
def test_every_point_counts_once(chunk_size):
    """In its order, whatever the chunk, whatever the key."""
    chosen = points(5)
    each_one = of_points(chosen, probabilities)
    for key in (KEY, KEYS[:5]):
        got = swagjax.predict_samples(key, chosen, probabilities, X, chunk_size=chunk_size)
        np.testing.assert_allclose(got, each_one, rtol=1e-5)
        mean = swagjax.predict(key, chosen, probabilities, X, chunk_size=chunk_size)
        np.testing.assert_allclose(mean, each_one.mean(0), rtol=1e-5)
    logs = swagjax.predict_log(KEY, chosen, log_probabilities, X, num_samples=5)
    np.testing.assert_allclose(np.exp(logs), each_one.mean(0), rtol=1e-5)
    (batch,) = swagjax.predict_batches(KEY, chosen, probabilities, [X], num_samples=5)
    np.testing.assert_allclose(batch, each_one.mean(0), rtol=1e-5)


def test_points_have_statistics_of_their_own():
    """``refresh`` runs once for each point, for all batches together."""
    chosen, calls = points(4), []

    def refresh(params):
        jax.debug.callback(lambda: calls.append(1))
        return params["b"].sum()

    def shifted(params, x, stats):
        return logits(params, x) + stats

    got = swagjax.predict_batches(KEY, chosen, shifted, [X, -X], chunk_size=1, refresh=refresh)
    first, second = got
    jax.effects_barrier()
    assert len(calls) == 4
    for batch, x in ((first, X), (second, -X)):
        wanted = of_points(chosen, lambda p, _, x=x: logits(p, x) + p["b"].sum()).mean(0)
        np.testing.assert_allclose(batch, wanted, rtol=1e-5, atol=1e-6)


def test_iterates_of_a_state_are_a_posterior():
    """What a fast geometric ensemble does: the plain average over the networks collected."""
    rng = np.random.default_rng(5)
    rows = [{"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)} for _ in range(3)]
    rows = [jax.tree.map(jnp.float32, row) for row in rows]
    state = TX["swag"].init(rows[0])
    for row in rows:
        _, state = UPDATE["swag"](jax.tree.map(jnp.zeros_like, row), state, row)
    chosen = ensemble.Points(iterates(state))
    got = swagjax.predict(KEY, chosen, probabilities, X)
    wanted = np.mean([np.asarray(probabilities(row, X), np.float64) for row in rows], axis=0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.slow
def test_keys_sharded_over_devices_spread_points_and_members():
    """Same numbers as on one device."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    keys = jax.random.split(KEY, 8)
    spread = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("d")))
    for posterior in (points(8), ensemble.mix([collect(seed=m) for m in range(2)])):
        got, wanted = (swagjax.predict(k, posterior, probabilities, X) for k in (spread, keys))
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


# --- Mixtures --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", SOME_CHUNKS)
def test_every_member_gives_as_many_samples(chunk_size):
    """Those of the first before those of the second, as drawn from the member alone."""
    states = [collect(seed=m, count=4 + m) for m in range(3)]
    got = swagjax.predict_samples(KEYS[:6], ensemble.mix(states), weights, X, chunk_size=chunk_size)
    for i, key in enumerate(KEYS[:6]):
        wanted = swagjax.sample(key, states[i // 2])
        for name in wanted:
            np.testing.assert_allclose(got[name][i], wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_mixture_predicts_as_its_members_do():
    """The average of averages; and a mixture of one is its state, with every key."""
    states = [collect(seed=m) for m in range(2)]
    mixture, keys = ensemble.mix(states), KEYS[:6]
    got = swagjax.predict(keys, mixture, probabilities, X)
    each_half = zip(states, (keys[:3], keys[3:]), strict=True)
    wanted = np.mean([each(k, state, probabilities, X).mean(0) for state, k in each_half], axis=0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    logs = swagjax.predict_log(keys, mixture, log_probabilities, X)
    np.testing.assert_allclose(np.exp(logs), wanted, rtol=1e-5)
    (batch,) = swagjax.predict_batches(keys, mixture, probabilities, [X])
    np.testing.assert_allclose(batch, wanted, rtol=1e-5)
    alone, one = (
        swagjax.predict(KEY, posterior, probabilities, X)
        for posterior in (states[0], ensemble.mix(states[:1]))
    )
    np.testing.assert_allclose(one, alone, rtol=1e-5)


@pytest.mark.slow
def test_mixtures_and_points_compile_once():
    prob_fn, traces = traced_by(probabilities)
    for make in (points, lambda seed: ensemble.mix([collect(seed=seed), collect(seed=9)])):
        traces.clear()
        swagjax.predict(KEY, make(seed=0), prob_fn, X, num_samples=6)
        seen = len(traces)
        assert seen
        for seed in (1, 2):
            swagjax.predict(jax.random.key(seed), make(seed=seed), prob_fn, X, num_samples=6)
        assert len(traces) == seen


def masked(tree):
    return {**tree, "b": optax.MaskedNode()}


def masked_mixture():
    state = collect()
    held = {field: masked(getattr(state, field)) for field in ("mean", "variance", "deviations")}
    return ensemble.mix([state._replace(**held)] * 2)


NUMBERED = {
    "samples that do not divide": (
        lambda: (KEY, ensemble.mix([collect(seed=m) for m in range(4)]), {}),
        r"num_samples=30, and posterior 4 members.*give a multiple of 4, such as 32.*Partial",
    ),
    "keys that do not divide": (
        lambda: (KEYS, ensemble.mix([collect(), collect()]), {}),
        r"key holds 7 keys, and posterior 2 members.*a multiple of 2, such as 8",
    ),
    "fewer samples than points": (
        lambda: (KEY, points(6), {"num_samples": 4}),
        r"num_samples=4, and posterior 6 points, each to count once: give 6",
    ),
    "more keys than points": (
        lambda: (KEYS, points(6), {}),
        r"key holds 7 keys, and posterior 6 points, each to count once: give 6",
    ),
    "points as a float": (
        lambda: (KEY, points(6), {"num_samples": 6.5}),
        r"num_samples=6\.5: give",
    ),
    "points without a common axis": (
        lambda: (KEY, ensemble.Points({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}), {}),
        r"points have leaves of shape \(2, 3\), \(3,\): give a tree .* one axis of points",
    ),
    "a single point": (lambda: (KEY, ensemble.Points({"b": jnp.zeros(())}), {}), r"of shape \(\)"),
    "no points": (lambda: (KEY, points(0), {}), r"points have leaves of shape \(0, 2\)"),
    "an empty tree": (lambda: (KEY, ensemble.Points({}), {}), "points have leaves of shape none"),
    "mirrored points": (
        lambda: (KEY, points(6), {"antithetic": True}),
        "antithetic=True: give a SWAGState",
    ),
    "masked members": (
        lambda: (KEY, masked_mixture(), {}),
        r"posterior holds no values at \['b'\].*swagjax\.ensemble\.sample, mixture=mixture, like",
    ),
    "masked points": (
        lambda: (KEY, ensemble.Points(masked(points().params)), {}),
        r"posterior holds no values at \['b'\].*iterates\(state, like=params\)",
    ),
    "a member that has collected nothing": (
        lambda: (KEY, ensemble.mix([collect()] * 2)._replace(num_collected=jnp.array([3, 0])), {}),
        r"the members \[1\] have collected no iterate",
    ),
}


@pytest.mark.parametrize(("make", "message"), NUMBERED.values(), ids=NUMBERED)
def test_wrong_mixtures_and_points_are_answered(make, message):
    key, posterior, options = make()
    with pytest.raises(ValueError, match=message):
        swagjax.predict(key, posterior, probabilities, X, **options)


# --- Errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", EVERY)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples=0: give an integer of at least 1"),
        ({"num_samples": -3}, "num_samples=-3: give an integer of at least 1"),
        ({"num_samples": 5, "antithetic": True}, "num_samples=5: .*even number"),
        ({"chunk_size": 0}, "chunk_size=0: give an integer of at least 1"),
        ({"chunk_size": -1}, "chunk_size=-1: give an integer of at least 1"),
    ],
)
def test_bad_options(state, predictor, options, message):
    with pytest.raises(ValueError, match=message):
        predictor(KEY, state, probabilities, X, **options)


@pytest.mark.parametrize("options", [{"num_samples": 2.5}, {"chunk_size": 2.5}])
def test_numbers_that_are_no_integers_are_refused_by_name(state, options):
    (name,) = options
    with pytest.raises((ValueError, TypeError), match=f"{name}=2.5"):
        swagjax.predict(KEY, state, probabilities, X, **options)


@pytest.mark.parametrize("predictor", EVERY)
def test_a_wrong_posterior_points_to_get_state(state, predictor):
    with pytest.raises(ValueError, match=r"posterior is a dict.*get_state\(opt_state\)"):
        predictor(KEY, state.mean, probabilities, X)
    opt_state = (state,)
    with pytest.raises(ValueError, match=r"posterior is a tuple.*get_state\(opt_state\)"):
        predictor(KEY, opt_state, probabilities, X)


@pytest.mark.parametrize(
    "model",
    [
        nn.Dense(2),
        nnx.Linear(3, 2, rngs=nnx.Rngs(0)),
        eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)),
    ],
    ids=["linen", "nnx", "equinox"],
)
def test_a_model_in_place_of_the_posterior_is_refused_by_name(model):
    """It can be called, as a function from a key to weights can."""
    name = type(model).__name__
    with pytest.raises(ValueError, match=f"posterior is a {name}, a model: give a SWAGState"):
        swagjax.predict(KEY, model, probabilities, X)


def test_a_module_that_makes_weights_of_a_key_is_a_posterior(state):
    posterior = eqx.Partial(swagjax.sample, state=state)
    got = swagjax.predict(KEYS, posterior, probabilities, X)
    np.testing.assert_allclose(got, each(KEYS, state, probabilities, X).mean(0), rtol=1e-5)


@pytest.mark.parametrize("predictor", EVERY)
def test_an_empty_state_is_refused_wherever_it_stands(predictor):
    empty = collect(count=0)
    for posterior in (empty, jax.tree_util.Partial(swagjax.sample, state=empty)):
        with pytest.raises(ValueError, match=r"collected no iterate \(num_collected=0"):
            predictor(KEY, posterior, probabilities, X)
    if predictor in PREDICTORS:
        traced = jax.jit(lambda state: predictor(KEY, state, probabilities, X))(empty)
        assert np.isnan(traced).all()


def test_a_state_of_several_members_is_refused(state):
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ValueError, match="several members"):
        swagjax.predict(KEY, states, probabilities, X)


@pytest.mark.parametrize("predictor", EVERY)
def test_antithetic_needs_a_state(state, predictor):
    with pytest.raises(ValueError, match="antithetic=True: give a SWAGState, or"):
        predictor(KEY, lambda key: state.mean, probabilities, X, num_samples=2, antithetic=True)


def test_antithetic_pairs_of_a_partial_keep_its_options(state):
    like = jax.tree.map(lambda m: m.astype(jnp.bfloat16), state.mean)
    options = {"state": state, "scale": 0.25, "centering": "final", "like": like}
    posterior = jax.tree_util.Partial(swagjax.sample, **options)
    out = swagjax.predict_samples(KEY, posterior, lambda p, x: p, X, num_samples=4, antithetic=True)
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
    plain = jax.vmap(posterior)(jax.random.split(KEY, 2))
    for name in state.mean:
        pairs = np.asarray(out[name], np.float32).reshape(2, 2, -1)
        np.testing.assert_array_equal(
            pairs[:, 0], np.asarray(plain[name], np.float32).reshape(2, -1)
        )
        mean = np.asarray(state.mean[name]).ravel()
        np.testing.assert_allclose(pairs.mean(1) - mean, 0, atol=0.02)


@pytest.mark.parametrize("predictor", EVERY)
def test_bad_keys(state, predictor):
    with pytest.raises(ValueError, match=r"key=0: give a PRNG key"):
        predictor(0, state, probabilities, X)
    with pytest.raises(ValueError, match=r"key holds keys of shape \(2, 3\)"):
        predictor(jax.random.split(KEY, (2, 3)), state, probabilities, X)


def test_no_keys_at_all_are_refused(state):
    with pytest.raises(ValueError, match=r"key"):
        swagjax.predict(KEYS[:0], state, probabilities, X)


def test_raw_keys_are_typed_keys(state):
    raw = jax.random.PRNGKey(0)
    one = [swagjax.predict(k, state, probabilities, X, num_samples=2) for k in (raw, KEY)]
    np.testing.assert_array_equal(*one)
    several = [
        swagjax.predict(k, state, probabilities, X) for k in (jax.random.key_data(KEYS), KEYS)
    ]
    np.testing.assert_array_equal(*several)


def test_errors_of_predict_batches_come_at_the_call(state):
    with pytest.raises(ValueError, match="num_samples=0"):
        swagjax.predict_batches(KEY, state, probabilities, iter([]), num_samples=0)


# --- The compiled program --------------------------------------------------------------------


def traced_by(function):
    """The function, and a list that grows whenever JAX traces it."""
    traces = []

    def traced(*args):
        traces.append(args)
        return function(*args)

    return traced, traces


@pytest.mark.parametrize("predictor", EVERY)
def test_the_same_function_compiles_once(predictor):
    """Across keys, states and inputs of equal shape, by the state or inside a Partial."""
    prob_fn, traces = traced_by(log_probabilities)
    for wrap in (lambda s: s, lambda s: jax.tree_util.Partial(swagjax.sample, state=s, scale=0.5)):
        predictor(KEY, wrap(collect(seed=0)), prob_fn, X, num_samples=4)
        seen = len(traces)
        assert seen
        for seed in (1, 2):
            key, state = jax.random.key(seed), collect(seed=seed, count=4 + seed)
            predictor(key, wrap(state), prob_fn, X + seed, num_samples=4)
        assert len(traces) == seen
        traces.clear()


def test_batches_of_equal_shape_compile_once(state):
    prob_fn, traces = traced_by(probabilities)
    stream = swagjax.predict_batches(KEY, state, prob_fn, [X, X + 1, X[:2]], num_samples=4)
    next(stream)
    seen = len(traces)
    next(stream)
    assert len(traces) == seen
    next(stream)  # the smaller last one compiles once more
    assert len(traces) > seen


def test_two_functions_are_not_mixed_up(state):
    one, two = (swagjax.predict(KEY, state, lambda p, x, c=c: c + 0 * p["b"], X) for c in (1, 2))
    np.testing.assert_array_equal(one, [1, 1])
    np.testing.assert_array_equal(two, [2, 2])


def test_what_has_no_hash_is_told_apart_by_identity(state):
    """As a linen module with a list or a dict among its fields, which was refused."""
    traces = []

    class Scaled:
        __hash__ = None

        def __init__(self, factors):
            self.factors = factors

        def __eq__(self, other):
            return True

        def __call__(self, params, x):
            traces.append(1)
            return self.factors[0] + 0 * params["b"]

    one, two = Scaled([1]), Scaled([2])
    for _ in range(2):
        np.testing.assert_array_equal(swagjax.predict(KEY, state, one, X, num_samples=2), [1, 1])
        seen = len(traces)
    np.testing.assert_array_equal(swagjax.predict(KEY, state, one, X, num_samples=2), [1, 1])
    assert len(traces) == seen
    np.testing.assert_array_equal(swagjax.predict(KEY, state, two, X, num_samples=2), [2, 2])


@pytest.mark.parametrize(
    "predictor", [PREDICTORS[0], *(pytest.param(p, marks=pytest.mark.slow) for p in PREDICTORS[1:])]
)
def test_works_inside_jit_and_grad(state, predictor):
    def inside(key, state, x):
        return predictor(key, state, log_probabilities, x, num_samples=4, chunk_size=3)

    together = jax.jit(inside)
    np.testing.assert_allclose(together(KEY, state, X), inside(KEY, state, X), rtol=1e-5)
    slope = jax.jit(jax.grad(lambda x, state: inside(KEY, state, x)[..., 0].sum()))(X, state)
    bump = 1e-2 * np.eye(5, 3, dtype=np.float32)
    change = together(KEY, state, X + bump) - together(KEY, state, X - bump)
    np.testing.assert_allclose((slope * bump).sum() * 2, change[..., 0].sum(), rtol=0.02)


def wide(size=(200, 300)):
    return collect(count=2, shapes=(("w", size), ("b", (size[1],))))


def compiled(num_samples, chunk_size, state, **options):
    def program(key, state, x):
        return swagjax.predict(
            key, state, probabilities, x, num_samples=num_samples, chunk_size=chunk_size, **options
        )

    return jax.jit(program).lower(KEY, state, jnp.ones((2, 200), jnp.float32)).compile()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"antithetic": True}], ids=["plain", "antithetic"])
def test_memory_does_not_grow_with_the_number_of_samples(options):
    """Samples are drawn, used and dropped: only chunk_size of them are ever in memory."""
    state = wide()
    # Of the two samples in flight; antithetic draws two from a key.
    size = 4 * 200 * 300 * (1 + options.get("antithetic", False))
    few, many, whole = (
        compiled(s, chunk, state, **options).memory_analysis().temp_size_in_bytes
        for s, chunk in ((8, 2), (64, 2), (64, 64))
    )
    assert abs(many - few) < 8_000
    assert many < 12 * size
    assert whole > 30 * size  # what the bounds above would see


@pytest.mark.parametrize(
    ("axis_type", "chunk_size"), [(AxisType.Auto, None), (AxisType.Explicit, 8)]
)
def test_keys_sharded_over_devices_spread_the_samples(axis_type, chunk_size):
    """Same numbers; and no device ever holds the weights of another one's samples."""
    state = wide()
    keys = jax.random.split(KEY, 16)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    spread = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("d")))
    x = jnp.ones((2, 200), jnp.float32) / 200

    @jax.jit
    def program(keys, state, x):
        return swagjax.predict(keys, state, probabilities, x, chunk_size=chunk_size)

    wanted = swagjax.predict(keys, state, probabilities, x, chunk_size=chunk_size)
    compiled = program.lower(spread, state, x).compile()
    np.testing.assert_allclose(compiled(spread, state, x), wanted, rtol=1e-4)
    text = compiled.as_text()
    assert "all-reduce" in text
    side_by_side = (chunk_size or 16) // 8
    assert largest(r"f32\[([\d,]*)\]", text) <= max(2, side_by_side, 3) * 200 * 300
    assert largest(r"\[([\d,]*)\]\S* all-gather", text) < 200 * 300 / 8


def largest(pattern, text):
    """The most elements of any array whose dimensions the pattern captures."""
    sizes = re.findall(pattern, text)
    return max((math.prod(map(int, filter(None, s.split(",")))) for s in sizes), default=0)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("predictor", "chunk_size"),
    [(p, c) for p in (swagjax.predict, swagjax.predict_log) for c in (1, 3)]
    + [(by_batches, 3), (swagjax.predict_samples, 3)],
)
def test_inputs_split_over_devices(state, axis_type, predictor, chunk_size):
    """On an explicit mesh the scan's start lacked the sharding of the outputs: a TypeError."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(axis_type,), devices=jax.devices()[:4])
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    log = predictor is swagjax.predict_log
    fn, keys = (log_probabilities if log else probabilities), KEYS[:4]
    got = predictor(keys, state, fn, spread, chunk_size=chunk_size)
    wanted = each(keys, state, probabilities, x)
    if predictor is by_batches:
        (got,) = got
    if predictor is not swagjax.predict_samples:
        wanted = wanted.mean(0)
    np.testing.assert_allclose(np.exp(got) if log else got, wanted, rtol=1e-4)
    if axis_type == AxisType.Explicit:
        assert jax.typeof(got).sharding.spec[-2] == "d"


@pytest.mark.parametrize("check_vma", [True, False])
def test_predict_inside_shard_map(state, check_vma):
    """The scan's start varies over the manual axes as the outputs do."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)

    def part(x):
        return swagjax.predict(KEYS[:4], state, probabilities, x, chunk_size=2)

    specs = {"in_specs": PartitionSpec("d"), "out_specs": PartitionSpec("d")}
    got = jax.jit(jax.shard_map(part, mesh=mesh, check_vma=check_vma, **specs))(x)
    np.testing.assert_allclose(got, each(KEYS[:4], state, probabilities, x).mean(0), rtol=1e-4)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_programs_lower_for_cpu_cuda_and_tpu(state, predictor):
    def program(key, state, x):
        return predictor(key, state, log_probabilities, x, num_samples=5, chunk_size=2)

    platforms = ["cpu", "cuda", "tpu"]
    exported = jax.export.export(jax.jit(program), platforms=platforms)
    assert exported(jax.random.PRNGKey(0), state, X).platforms == tuple(platforms)


# --- Batch statistics ------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.log_softmax(nn.Dense(2)(nn.relu(x)))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return nnx.log_softmax(self.last(nnx.relu(self.norm(self.first(x)))))


def gaussian_around(params):
    state = TX["swag"].init(params)
    for i in range(4):
        noise = jax.tree.map(lambda p, i=i: 0.3 * jnp.cos(7 * p + i), params)
        _, state = UPDATE["swag"](noise, state, params)
    return state


@pytest.fixture(scope="module")
def linen_net():
    model = Net()
    variables = model.init(KEY, X)
    stats, state = variables["batch_stats"], gaussian_around(variables["params"])
    refresh = batch_stats.linen(model, stats, X, batch_size=3, train=True)

    def log_prob_fn(params, x, stats):
        return model.apply({"params": params, "batch_stats": stats}, x)

    return model, stats, state, refresh, log_prob_fn


@pytest.fixture(scope="module")
def nnx_net():
    model = NNXNet(nnx.Rngs(0))
    graphdef, params, _, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    graphdef = nnx.graphdef(nnx.view(model, use_running_average=True))
    state = gaussian_around(params)
    refresh = batch_stats.nnx(model, X, batch_size=3)

    def log_prob_fn(params, x, stats):
        return nnx.merge(graphdef, params, stats, rest)(x)

    return model, None, state, refresh, log_prob_fn


NETS = pytest.mark.parametrize("net", ["linen_net", "nnx_net"])


@pytest.mark.slow
@NETS
def test_refresh_gives_every_sample_its_own_statistics(net, request):
    _, _, state, refresh, log_prob_fn = request.getfixturevalue(net)
    options = {"chunk_size": 3, "refresh": refresh}

    def alone(theta, x):
        return log_prob_fn(theta, x, refresh(theta))

    wanted = each(KEYS[:4], state, alone, X)
    assert wanted.std(0).max() > 1e-3
    got = swagjax.predict_samples(KEYS[:4], state, log_prob_fn, X, **options)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_refresh_with_antithetic_pairs(linen_net):
    """Both of a pair have statistics of their own, those of the mirrored one included."""
    _, _, state, refresh, log_prob_fn = linen_net
    options = {"num_samples": 6, "chunk_size": 2, "antithetic": True, "refresh": refresh}
    cheap = {**options, "refresh": batch_stats.keep(None)}
    thetas = swagjax.predict_samples(KEY, state, lambda p, x, s: p, X, **cheap)
    members = [jax.tree.map(lambda t, i=i: t[i], thetas) for i in range(6)]
    alone = jax.jit(lambda theta: log_prob_fn(theta, X, refresh(theta)))
    wanted = np.stack([alone(theta) for theta in members])
    got = swagjax.predict_samples(KEY, state, log_prob_fn, X, **options)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)
    first, second = swagjax.predict_batches(KEY, state, log_prob_fn, [X, -X], **options)
    np.testing.assert_allclose(first, wanted.mean(0), rtol=1e-3, atol=1e-4)
    assert np.abs(second - first).max() > 1e-3


def test_refresh_is_called_once_a_sample_and_not_again_for_each_batch(state):
    calls = []

    def refresh(params):
        jax.debug.callback(lambda: calls.append(1))
        return {"shift": params["b"].sum()}

    def prob_fn(params, x, stats):
        return logits(params, x) + stats["shift"]

    stream = swagjax.predict_batches(
        KEY, state, prob_fn, [X, X, X], num_samples=4, chunk_size=1, refresh=refresh
    )
    got = list(stream)
    jax.effects_barrier()
    assert len(calls) == 4
    whole = swagjax.predict(KEY, state, prob_fn, X, num_samples=4, chunk_size=1, refresh=refresh)
    jax.effects_barrier()
    assert len(calls) == 8
    for batch in got:
        np.testing.assert_allclose(batch, whole, rtol=1e-5)


def test_refresh_that_differs_in_arrays_alone_compiles_nothing(linen_net):
    model, stats, state, _, log_prob_fn = linen_net
    prob_fn, traces = traced_by(log_prob_fn)
    outputs = []
    for inputs in (X, 2 * X + 1):
        refresh = batch_stats.linen(model, stats, inputs, batch_size=3, train=True)
        seen = len(traces)
        outputs.append(swagjax.predict(KEY, state, prob_fn, X, num_samples=2, refresh=refresh))
    assert len(traces) == seen > 0
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-4


@pytest.mark.parametrize("predictor", EVERY)
def test_linen_batch_norm_on_stored_statistics_is_refused(linen_net, predictor):
    model, stats, state, *_ = linen_net

    def stored(params, x):
        return model.apply({"params": params, "batch_stats": stats}, x)

    with pytest.raises(ValueError, match=r"stored statistics.*refresh=batch_stats\.linen"):
        predictor(KEY, state, stored, X)
    with pytest.raises(ValueError, match=r"batch_stats\.keep"):  # not only the first time
        predictor(KEY, state, stored, X)


def test_stored_statistics_of_linen_are_refused_in_a_function_that_was_jitted_and_used(linen_net):
    """A cached trace of jit must not hide the layers inside."""
    model, stats, state, *_ = linen_net

    @jax.jit
    def stored(params, x):
        return model.apply({"params": params, "batch_stats": stats}, x)

    stored(state.mean, X)
    with pytest.raises(ValueError, match="stored statistics"):
        swagjax.predict(KEY, state, stored, X)


def test_linen_batch_norm_in_training_mode_is_nobodys_concern(linen_net):
    """It uses the statistics of the batch at hand, none that were stored."""
    model, stats, state, *_ = linen_net

    def on_the_batch(params, x):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    assert swagjax.predict(KEY, state, on_the_batch, X).shape == (5, 2)


def nnx_closures(model):
    """Ways to write a prob_fn that runs an nnx model on the statistics it stores."""
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def by_merge(params, x):
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    def by_update(params, x):
        copy = nnx.clone(model)
        nnx.update(copy, params)
        return copy(x)

    jitted = jax.jit(by_merge)
    if not model.norm.use_running_average:
        return {"merge": by_merge, "jit": jitted}
    jitted(nnx.state(model, nnx.Param), X)  # its trace must not hide the layers inside
    return {"merge": by_merge, "update": by_update, "jit": jitted}


@pytest.mark.parametrize("way", ["merge", "update", "jit"])
def test_nnx_batch_norm_on_stored_statistics_is_refused(nnx_net, way):
    model = nnx.view(NNXNet(nnx.Rngs(0)), use_running_average=True)
    with pytest.raises(ValueError, match=r"stored statistics.*\.nnx"):
        swagjax.predict(KEY, nnx_net[2], nnx_closures(model)[way], X, num_samples=2)


@pytest.mark.parametrize("way", ["merge", "jit"])
def test_forgetting_eval_before_the_split_is_refused(nnx_net, way):
    """Else the same row is .981 or .855, by what else is in its batch; also with a refresh."""
    model, state, refresh = NNXNet(nnx.Rngs(0)), nnx_net[2], nnx_net[3]
    prob_fn = nnx_closures(model)[way]
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        swagjax.predict(KEY, state, prob_fn, X, num_samples=2)
    graphdef, _, _, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)

    def with_stats(params, x, stats):
        return nnx.merge(graphdef, params, stats, rest)(x)

    with pytest.raises(ValueError, match="training mode"):
        swagjax.predict(KEY, state, with_stats, X, num_samples=2, refresh=refresh)


def test_equinox_batch_norm_on_stored_statistics_is_refused():
    model, stats = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    params, static = eqx.partition(eqx.nn.inference_mode(model), eqx.is_inexact_array)

    def stored(params, x):
        return jax.vmap(eqx.combine(params, static), (0, None))(x, stats)[0]

    with pytest.raises(ValueError, match=r"stored statistics.*\.refresher"):
        swagjax.predict(KEY, lambda key: params, stored, X, num_samples=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "options"),
    [("linen_net", {"antithetic": True, "chunk_size": 2}), ("nnx_net", {"chunk_size": 3})],
)
def test_a_loader_is_walked_once_for_all_samples(net, options, request):
    """And gives the statistics that its batches give as one array."""
    model, stats, state, refresh, log_prob_fn = request.getfixturevalue(net)
    walks = []

    class Loader:
        def __iter__(self):
            walks.append(1)
            yield from (X[:3], X[3:])

    if net == "linen_net":
        streamed = batch_stats.linen(model, stats, Loader(), train=True)
    else:
        streamed = batch_stats.nnx(model, Loader())
    options = {"num_samples": 4, **options}
    wanted = swagjax.predict_samples(KEY, state, log_prob_fn, X, refresh=refresh, **options)
    got = swagjax.predict_samples(KEY, state, log_prob_fn, X, refresh=streamed, **options)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert len(walks) == 1
    batches = swagjax.predict_batches(KEY, state, log_prob_fn, [X, X], refresh=streamed, **options)
    for batch in batches:
        np.testing.assert_allclose(batch, wanted.mean(0), rtol=1e-4, atol=1e-5)
    assert len(walks) == 2


@NETS
def test_keeping_the_statistics_is_an_explicit_choice(net, request):
    model, stats, state, _, log_prob_fn = request.getfixturevalue(net)
    stats = nnx.state(model, nnx.BatchStat) if stats is None else stats

    def alone(theta, x):
        return log_prob_fn(theta, x, stats)

    options = {"chunk_size": 2, "refresh": batch_stats.keep(stats)}
    wanted = each(KEYS, state, alone, X).mean(0)
    got = swagjax.predict(KEYS, state, log_prob_fn, X, **options)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    if net == "linen_net":
        (batch,) = swagjax.predict_batches(KEYS, state, log_prob_fn, [X], **options)
        np.testing.assert_allclose(batch, wanted, rtol=1e-4, atol=1e-5)


def test_models_without_batch_statistics_need_no_refresh(state):
    model = nn.Dense(2)

    def prob_fn(params, x):
        return nn.softmax(model.apply({"params": {"kernel": params["w"], "bias": params["b"]}}, x))

    got = swagjax.predict(KEYS, state, prob_fn, X)
    np.testing.assert_allclose(got, each(KEYS, state, probabilities, X).mean(0), rtol=1e-5)


def test_a_jitted_transformation_of_a_function_is_not_taken_apart(state):
    def one(params, x):
        return jax.nn.softmax(x[: len(params["b"])] * params["b"]) / (1 + x.ndim)

    mapped = jax.vmap(one, (None, 0))
    options = {"num_samples": 2}
    wanted = swagjax.predict(KEY, state, mapped, X, **options)
    got = swagjax.predict(KEY, state, jax.jit(jax.jit(mapped)), X, **options)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_another_scale_in_a_partial_compiles_nothing(state):
    prob_fn, traces = traced_by(probabilities)
    counts = []
    for scale in (0.25, 0.5, 1.0):
        posterior = jax.tree_util.Partial(swagjax.sample, state=state, scale=scale)
        swagjax.predict(KEY, posterior, prob_fn, X, num_samples=2)
        counts.append(len(traces))
    assert counts[0] == counts[1] == counts[2] > 0


UNSORTABLE = {1: "a", "b": 2}


def test_what_prob_fn_refers_to_may_be_anything(state):
    def prob_fn(params, x):
        return later(probabilities(params, x)) * UNSORTABLE["b"] if UNSORTABLE else late

    with pytest.raises(NameError):
        swagjax.predict(KEY, state, prob_fn, X)  # only because ``later`` is not there yet

    def later(x):
        return x

    late = None
    assert swagjax.predict(KEY, state, prob_fn, X).shape == (5, 2)
