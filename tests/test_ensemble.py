import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import special, stats

import swagjax
from swagjax import SWAGState, ensemble
from tests import oracle

RANK, SIZE = 3, 5
KEY = jax.random.key(0)
KINDS = {
    "swag": swagjax.swag(RANK),
    "swag_diag": swagjax.swag_diag(),
    "swa": swagjax.swa(),
}
SHAPES = {"a": (2, 2), "b": ()}
COUNTS = (2, 6, 9)
CENTRES = (-40.0, 0.0, 70.0)


def unflatten(row):
    return {"a": jnp.asarray(row[:4], jnp.float32).reshape(2, 2), "b": jnp.float32(row[4])}


@functools.cache
def iterates(m):
    """Those of the m-th member, correlated and far from the others'."""
    rng = np.random.default_rng(m)
    rows = CENTRES[m] + rng.normal(size=(COUNTS[m], SIZE)) @ rng.normal(size=(SIZE, SIZE))
    return rows.astype(np.float32).astype(np.float64)


@functools.cache
def state(kind, m, tx=None):
    tx = tx or KINDS[kind]
    collected = tx.init(unflatten(iterates(m)[0]))
    for row in iterates(m):
        collected = tx.update(unflatten(0 * row), collected, unflatten(row))[1]
    return collected


def states(kind="swag", members=range(3)):
    return [state(kind, m) for m in members]


def moments(kind, m, **options):
    """Mean and dense covariance of a member's Gaussian, in float64."""
    return iterates(m).mean(0), oracle.covariance(kind, iterates(m), RANK, **options)


def leaves_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


# --- Making a mixture ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_what_was_put_in(kind):
    mixture = ensemble.mix(states(kind))
    for m in range(3):
        assert leaves_equal(ensemble.member(mixture, m), state(kind, m))
    assert tuple(mixture.num_collected) == COUNTS
    assert ensemble.member(mixture, np.int64(1)).num_collected == COUNTS[1]
    assert ensemble.member(mixture, jnp.asarray(1)).num_collected == COUNTS[1]
    assert jax.jit(ensemble.member)(mixture, 2).num_collected == COUNTS[2]


def test_a_stacked_state_and_a_list_make_the_same_mixture():
    """With one step for all, as ``member_axes`` leaves it, or one each, as hosts gather it."""
    stacked = jax.tree.map(lambda *x: np.stack(x), *states())
    wanted = ensemble.mix(states())
    assert leaves_equal(ensemble.mix(stacked), wanted)
    shared = ensemble.mix(stacked._replace(num_updates=jnp.int32(9)))
    assert tuple(shared.num_updates) == (9, 9, 9)
    assert leaves_equal(shared._replace(num_updates=wanted.num_updates), wanted)
    assert leaves_equal(ensemble.mix(tuple(states())), wanted)


def test_members_trained_side_by_side_are_those_trained_apart():
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), swagjax.swag(RANK, start=2, every=2))
    params = {"w": jnp.linspace(-2, 2, 12).reshape(4, 3)}
    axes = swagjax.member_axes(jax.eval_shape(tx.init, {"w": params["w"][0]}))

    def step(carry, t):
        params, opt_state = carry
        updates, opt_state = tx.update({"w": jnp.cos(params["w"] + t)}, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state)

    both = (0, axes)
    together = jax.jit(jax.vmap(step, in_axes=(both, None), out_axes=both))
    alone = jax.jit(step)
    carry = params, jax.vmap(tx.init, out_axes=axes)(params)
    apart = [({"w": w}, tx.init({"w": w})) for w in params["w"]]
    for t in range(11):
        carry = together(carry, float(t))
        apart = [alone(one, float(t)) for one in apart]
    mixture = ensemble.mix(swagjax.get_state(carry[1]))
    assert tuple(mixture.num_collected) == (4, 4, 4, 4)
    for m, (_, opt_state) in enumerate(apart):
        pairs = zip(ensemble.member(mixture, m), swagjax.get_state(opt_state), strict=True)
        for got, wanted in pairs:
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), got, wanted)


# --- Reading it ------------------------------------------------------------------------------

OPTIONS = [{}, {"scale": 0.3, "centering": "final", "min_variance": 2.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["swag", "swag_diag"])
def test_density_is_that_of_the_dense_mixture(kind, options):
    """At the means, between the modes, and where every member's density underflows in float64."""
    mixture = ensemble.mix(states(kind))
    points = [iterates(m).mean(0) + 1 for m in range(3)] + [np.full(SIZE, x) for x in (10, 5e3)]
    for point in points:
        logs = [
            stats.multivariate_normal(*moments(kind, m, **options)).logpdf(point) for m in range(3)
        ]
        wanted = special.logsumexp(logs) - np.log(3)
        got = ensemble.log_prob(mixture, unflatten(point), **options)
        np.testing.assert_allclose(got, wanted, rtol=2e-4)


def test_density_where_two_members_count():
    """Between two overlapping members neither term may be lost, nor the weight of 1/M."""
    tx = swagjax.swag_diag()

    def normal(mean):  # N(mean, 1)
        collected = tx.init(jnp.zeros(1))
        for x in (mean - 1, mean + 1):
            collected = tx.update(jnp.zeros(1), collected, jnp.full(1, x))[1]
        return collected

    mixture = ensemble.mix([normal(0.0), normal(0.0), normal(1.0), normal(9.0)])
    for x in (-1.0, 0.3, 5.0):
        wanted = np.log(np.mean(stats.norm([0, 0, 1, 9]).pdf(x)))
        got = ensemble.log_prob(mixture, jnp.full(1, x))
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_member_has_the_density_of_its_state_to_the_last_bit(kind, options):
    """Zero variances, at the mean (+inf) and off it (-inf), included."""
    alone = state(kind, 1)
    mixture = ensemble.mix([alone])
    for params in (alone.mean, unflatten(iterates(1)[0]), unflatten(np.full(SIZE, 1e4))):
        got = ensemble.log_prob(mixture, params, **options)
        wanted = swagjax.log_prob(alone, params, **options)
        np.testing.assert_array_equal(got, wanted)
    assert leaves_equal(ensemble.mean(mixture), swagjax.mean(alone))
    got, wanted = (
        f(x, **options) for f, x in [(ensemble.variance, mixture), (swagjax.variance, alone)]
    )
    assert leaves_equal(got, wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_those_of_the_dense_mixture(kind, options):
    """Var = E[var] + Var[mean], computed here as E[x^2] - E[x]^2."""
    of_members = [moments(kind, m, **options) for m in range(3)]
    mean = np.mean([m for m, _ in of_members], axis=0)
    square = np.mean([np.diag(c) + m**2 for m, c in of_members], axis=0)
    mixture = ensemble.mix(states(kind))
    np.testing.assert_allclose(oracle.flatten(ensemble.mean(mixture)), mean, rtol=1e-5)
    got = oracle.flatten(ensemble.variance(mixture, **options))
    np.testing.assert_allclose(got, square - mean**2, rtol=1e-5)


# --- Sampling --------------------------------------------------------------------------------


@functools.cache
def drawn(kind, which, n=30_000):
    """Samples of the mixture of a kind with some OPTIONS, one flattened a row."""
    keys, draw = jax.random.split(KEY, n), functools.partial(ensemble.sample, **OPTIONS[which])
    thetas = jax.vmap(draw, (0, None))(keys, ensemble.mix(states(kind)))
    rows = np.concatenate([np.reshape(x, (n, -1)) for x in jax.tree.leaves(thetas)], axis=1)
    return keys, rows.astype(np.float64)


@pytest.mark.parametrize(("kind", "which"), [("swag", 0), ("swag", 1), ("swag_diag", 1)])
def test_samples_are_those_of_the_mixture(kind, which):
    """Whitened per member: 5 means, 5 variances, 10 correlations, within six standard errors.

    False-alarm rate 3 members x 21 numbers x 2e-9 = 1e-7 for a random key; the key is fixed.
    """
    _, rows = drawn(kind, which)
    n, nearest = len(rows), np.abs(rows.mean(1)[:, None] - np.array(CENTRES)).argmin(1)
    for m in range(3):
        own = rows[nearest == m]
        assert abs(len(own) - n / 3) < 6 * np.sqrt(n * 2 / 9)
        mean, covariance = moments(kind, m, **OPTIONS[which])
        white = np.linalg.solve(np.linalg.cholesky(covariance), (own - mean).T)
        assert np.abs(white.mean(1)).max() < 6 / np.sqrt(len(own))
        errors = (white @ white.T / len(own) - np.eye(SIZE)) * np.sqrt(len(own))
        assert np.abs(np.diag(errors)).max() < 6 * np.sqrt(2)
        assert np.abs(errors - np.diag(np.diag(errors))).max() < 6


def test_samples_of_points_are_the_points():
    mixture = ensemble.mix(states("swa"))
    thetas = jax.vmap(ensemble.sample, (0, None))(jax.random.split(KEY, 64), mixture)
    assert set(np.asarray(thetas["b"]).tolist()) == {float(s.mean["b"]) for s in states("swa")}


def test_a_draw_is_the_same_alone_and_mapped():
    keys, rows = drawn("swag", 0)
    for key, row in zip(keys[:8], rows, strict=False):
        got = oracle.flatten(ensemble.sample(key, ensemble.mix(states())))
        np.testing.assert_allclose(got, row, rtol=1e-5)


@pytest.mark.slow
def test_a_draw_holds_no_member_beside_the_sample():
    """Neither the rings of all members, nor that of one, nor one for every mapped key."""
    leaf, members, rank = jnp.zeros(1 << 16), 4, 20
    one = swagjax.swag(rank).init(leaf)._replace(num_collected=jnp.int32(30))
    mixture, keys = ensemble.mix([one] * members), jax.random.split(KEY, 8)
    of_each, index = jax.vmap(ensemble.draw, (0, None, 0)), jnp.arange(8) // 2
    for draw, key, samples in [
        (ensemble.sample, KEY, 1),
        (jax.vmap(ensemble.sample, (0, None)), keys, len(keys)),
        (lambda keys, mixture: of_each(keys, mixture, index), keys, len(keys)),
    ]:
        compiled = jax.jit(draw).lower(key, mixture).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 3 * samples * leaf.nbytes


def test_samples_take_the_dtypes_and_the_holes_of_like():
    tx = optax.masked(swagjax.swag(RANK), {"a": True, "b": False})
    full = unflatten(np.arange(5.0))
    masked = tx.init(full)
    for shift in (1.0, 2.0, 4.0):
        masked = tx.update({"a": full["a"] * 0 + shift, "b": full["b"]}, masked, full)[1]
    mixture = ensemble.mix([swagjax.get_state(masked)] * 2)
    like = {"a": full["a"].astype(jnp.bfloat16), "b": full["b"]}
    theta = ensemble.sample(KEY, mixture, like=like)
    assert theta["a"].dtype == jnp.bfloat16
    assert theta["b"] == full["b"]
    assert isinstance(ensemble.sample(KEY, mixture)["b"], optax.MaskedNode)


def test_deviations_of_bfloat16():
    """Rounded by 2^-8 of themselves, and no more."""
    low = [state("swag", m, swagjax.swag(RANK, deviation_dtype=jnp.bfloat16)) for m in range(3)]
    got, wanted = (ensemble.sample(KEY, ensemble.mix(x)) for x in (low, states()))
    assert got["a"].dtype == jnp.float32
    np.testing.assert_allclose(got["a"], wanted["a"], atol=0.1)


def test_a_member_that_collected_nothing_gives_nan_inside_jit():
    empty = swagjax.swag(RANK).init(unflatten(np.zeros(5)))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), empty, empty)
    theta = jax.jit(lambda stacked: ensemble.sample(KEY, ensemble.mix(stacked)))(stacked)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(theta))


# --- Predicting ------------------------------------------------------------------------------

INPUTS = jnp.linspace(-1, 1, 6, dtype=jnp.float32).reshape(3, 2)


def prob_fn(params, x):
    return jax.nn.sigmoid((x @ params["a"] + params["b"]) / 50)


def test_predict_averages_over_members():
    """Of points: the average over the members drawn, so many sixtieths of each."""
    mixture, points = ensemble.mix(states("swa")), states("swa")
    posterior = jax.tree_util.Partial(ensemble.sample, mixture=mixture)
    outputs = swagjax.predict_samples(KEY, posterior, prob_fn, INPUTS, num_samples=60)
    of_points = np.stack([prob_fn(s.mean, INPUTS) for s in points])
    distance = np.abs(np.asarray(outputs)[:, None] - of_points).max((2, 3))
    assert distance.min(1).max() < 1e-6
    shares = np.bincount(distance.argmin(1), minlength=3) / 60
    assert (shares > 0.1).all()
    got = swagjax.predict(KEY, posterior, prob_fn, INPUTS, num_samples=60)
    np.testing.assert_allclose(got, np.tensordot(shares, of_points, 1), rtol=1e-5)
    (batched,) = swagjax.predict_batches(KEY, posterior, prob_fn, [INPUTS], num_samples=60)
    np.testing.assert_allclose(batched, got, rtol=1e-6)


@pytest.mark.slow
def test_a_mixture_as_a_posterior_leaves_nothing_to_chance():
    """As many samples of each member: of points the plain average, whatever the key."""
    wanted = np.mean([prob_fn(s.mean, INPUTS) for s in states("swa")], axis=0)
    mixture = ensemble.mix(states("swa"))
    got = swagjax.predict(KEY, mixture, prob_fn, INPUTS, num_samples=6)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    points = ensemble.Points(mixture.mean)
    np.testing.assert_allclose(swagjax.predict(KEY, points, prob_fn, INPUTS), wanted, rtol=1e-6)


class BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(4)(x))
        return nn.softmax(nn.Dense(3)(x))


@pytest.mark.slow
def test_every_sample_has_batch_statistics_of_its_own():
    """Of point members: what flax gives with the mean and variance of the whole training set."""
    model, tx = BatchNormed(), swagjax.swa()
    train = jax.random.normal(KEY, (32, 2), jnp.float32)
    variables = model.init(KEY, train, train=False)
    inits = [jax.tree.map(lambda p, m=m: p + p**2 * m, variables["params"]) for m in range(3)]
    points = [tx.update(params, tx.init(params), params)[1] for params in inits]
    refresh = swagjax.batch_stats.linen(model, variables["batch_stats"], train, train=True)

    def prob_fn(params, x, stats):
        return model.apply({"params": params, "batch_stats": stats}, x, train=False)

    def by_hand(params):
        kernel, bias = (np.asarray(params["Dense_0"][name]) for name in ("kernel", "bias"))
        hidden = np.asarray(train) @ kernel + bias
        stats = {"BatchNorm_0": {"mean": hidden.mean(0), "var": hidden.var(0)}}
        return prob_fn(params, INPUTS, stats)

    posterior = jax.tree_util.Partial(ensemble.sample, mixture=ensemble.mix(points))
    got = swagjax.predict_samples(KEY, posterior, prob_fn, INPUTS, num_samples=12, refresh=refresh)
    wanted = np.stack([by_hand(point.mean) for point in points])
    distance = np.abs(np.asarray(got)[:, None] - wanted).max((2, 3))
    assert distance.min(1).max() < 1e-5
    assert set(distance.argmin(1)) == {0, 1, 2}


# --- Many devices ----------------------------------------------------------------------------


@functools.cache
def spread():
    """Eight members trained side by side, one on each device, and their mixture."""
    mesh = jax.make_mesh((8,), ("member",), axis_types=(AxisType.Auto,))
    along, whole = NamedSharding(mesh, P("member")), NamedSharding(mesh, P())
    tx = optax.chain(optax.sgd(0.1), swagjax.swag(RANK))
    params = jax.device_put({"w": jax.random.normal(KEY, (8, 200))}, along)
    axes = swagjax.member_axes(jax.eval_shape(tx.init, {"w": jnp.zeros(200)}))
    placed = jax.tree.map(
        lambda axis: along if axis == 0 else whole, axes, is_leaf=lambda axis: axis is None
    )
    opt_state = jax.jit(jax.vmap(tx.init, out_axes=axes), out_shardings=placed)(params)

    def update(params, opt_state, t):
        updates, opt_state = tx.update({"w": jnp.cos(params["w"] + t)}, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    update = jax.vmap(update, in_axes=(0, axes, None), out_axes=(0, axes))
    step = jax.jit(update, out_shardings=({"w": along}, placed))
    for t in range(4):
        params, opt_state = step(params, opt_state, float(t))
    return ensemble.mix(swagjax.get_state(opt_state))


def test_members_stay_on_their_devices():
    mixture = spread()
    assert mixture.deviations["w"].sharding.spec[0] == "member"
    assert {s.data.shape for s in mixture.deviations["w"].addressable_shards} == {(1, RANK, 200)}


@pytest.mark.slow
def test_spread_members_read_as_gathered_ones():
    mixture, gathered = spread(), jax.tree.map(jnp.asarray, jax.device_get(spread()))
    theta = ensemble.member(gathered, 3).mean
    for key in jax.random.split(KEY, 4):
        got, wanted = (ensemble.sample(key, m)["w"] for m in (mixture, gathered))
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    got, wanted = (ensemble.log_prob(m, theta, min_variance=1e-3) for m in (mixture, gathered))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.slow
def test_spread_members_predict_where_they_are():
    """Only their outputs, and no weights, are exchanged."""

    def of_member(key, state):
        return swagjax.predict(key, state, lambda w, x: jnp.tanh(x @ w["w"]), x, num_samples=3)

    @jax.jit
    def prediction(keys, mixture):
        return jax.vmap(of_member)(keys, SWAGState(*mixture)).mean(0)

    x, keys = jnp.ones((5, 200)) / 50, jax.random.split(KEY, 8)
    gathered = jax.tree.map(jnp.asarray, jax.device_get(spread()))
    wanted = np.mean([of_member(keys[m], ensemble.member(gathered, m)) for m in range(8)], axis=0)
    compiled = prediction.lower(keys, spread()).compile()
    np.testing.assert_allclose(compiled(keys, spread()), wanted, rtol=1e-5)
    exchanged = re.findall(r"= (\S+) (?:all-\w+|collective-permute)\(", compiled.as_text())
    assert exchanged
    assert not any("200" in shape for shape in exchanged), exchanged


# --- Wrong uses ------------------------------------------------------------------------------


def stacked(kind="swag"):
    return jax.tree.map(lambda *x: jnp.stack(x), *states(kind))


@functools.cache
def mixture():
    return ensemble.mix(states())


def empty():
    return swagjax.swag(RANK).init(unflatten(np.zeros(5)))


def on_device(i):
    return jax.device_put(state("swag", 1), jax.devices()[i])


GIVE_MIXTURE = r"mixture is a {}: give what swagjax\.ensemble\.mix\(states\) made"
GIVE_LIST = r"states is .*: give a list of SWAGStates, \[swagjax\.get_state\(opt_state\)"
ALIKE = r"members of a mixture have the same kind, rank, parameters and dtypes"
MISUSE = {
    "no members": (lambda: ensemble.mix([]), r"states=\[\]: a mixture has at least one member"),
    "a state of no members": (
        lambda: ensemble.mix(jax.tree.map(lambda x: x[:0], stacked())),
        r"states is a state of no members",
    ),
    "one state, not in a list": (
        lambda: ensemble.mix(state("swag", 0)),
        r"states is one state with num_collected=2: give a list of states, mix\(\[state\]\)",
    ),
    "members of members": (
        lambda: ensemble.mix(jax.tree.map(lambda x: x[None], stacked())),
        r"states is one state with num_collected=\[\[2 6 9\]\]: give a list .* one axis of members",
    ),
    "a list of stacked states": (
        lambda: ensemble.mix([stacked(), stacked()]),
        r"the state holds several members, num_collected=\[2 6 9\]",
    ),
    "a field that was not stacked": (
        lambda: ensemble.mix(stacked()._replace(variance=state("swag", 0).variance)),
        r"states\.variance\['a'\] has shape \(2, 2\), and count \(3,\): every field .* first",
    ),
    "optimizer states": (
        lambda: ensemble.mix([(state("swag", 0),), (state("swag", 1),)]),
        GIVE_LIST,
    ),
    "parameters": (lambda: ensemble.mix(unflatten(np.zeros(5))), GIVE_LIST),
    "a generator of states": (lambda: ensemble.mix(s for s in states()), GIVE_LIST),
    "states of shapes": (
        lambda: ensemble.mix([jax.eval_shape(lambda: state("swag", 0))]),
        r"the state holds shapes, no numbers",
    ),
    "a stacked state of shapes": (
        lambda: ensemble.mix(jax.eval_shape(stacked)),
        r"the state holds shapes, no numbers",
    ),
    "a mixture of a mixture": (lambda: ensemble.mix(mixture()), GIVE_LIST),
    "a member by name": (lambda: ensemble.member(mixture(), "first"), "index='first': give an int"),
    "SWAG beside SWAG-Diag": (
        lambda: ensemble.mix([state("swag", 0), state("swag_diag", 0)]),
        r"states\[0\]\.deviations is .*, states\[1\]\.deviations is None: " + ALIKE,
    ),
    "SWA beside SWAG-Diag": (
        lambda: ensemble.mix([state("swa", 0), state("swag_diag", 0)]),
        r"states\[0\]\.variance is None, .*" + ALIKE,
    ),
    "other ranks": (
        lambda: ensemble.mix([state("swag", 0), state("swag", 0, swagjax.swag(7))]),
        r"states\[0\]\.deviations .*\[3, 2, 2\].*states\[1\]\.deviations .*\[7, 2, 2\].*" + ALIKE,
    ),
    "other structures": (
        lambda: ensemble.mix([state("swag", 0), state("swag", 0)._replace(mean={"c": 0})]),
        r"states\[0\]\.mean .*'a'.*states\[1\]\.mean .*'c'.*" + ALIKE,
    ),
    "other dtypes": (
        lambda: ensemble.mix(
            [state("swag", 0), state("swag", 0, swagjax.swag(RANK, deviation_dtype=jnp.bfloat16))]
        ),
        r"float32\[3, 2, 2\].*bfloat16\[3, 2, 2\].*" + ALIKE,
    ),
    "states on devices of their own": (
        lambda: ensemble.mix([on_device(0), on_device(1)]),
        r"states lie on 2 different sets of devices: .*mix\(jax\.device_get\(states\)\)",
    ),
    "a member that collected nothing": (
        lambda: ensemble.mix([state("swag", 0), empty()]),
        r"the members \[1\] have collected no iterate \(num_collected=\[2 0\] after num_updates",
    ),
    "sample of one state": (
        lambda: ensemble.sample(KEY, state("swag", 0)),
        GIVE_MIXTURE.format("SWAGState"),
    ),
    "sample of a list": (lambda: ensemble.sample(KEY, states()), GIVE_MIXTURE.format("list")),
    "key and mixture swapped": (
        lambda: ensemble.sample(mixture(), KEY),
        GIVE_MIXTURE.format("PRNGKeyArray"),
    ),
    "density of a stacked state": (
        lambda: ensemble.log_prob(stacked(), unflatten(np.zeros(5))),
        GIVE_MIXTURE.format("SWAGState"),
    ),
    "mean of a state": (lambda: ensemble.mean(state("swag", 0)), GIVE_MIXTURE.format("SWAGState")),
    "variance of a state": (
        lambda: ensemble.variance(state("swag", 0)),
        GIVE_MIXTURE.format("SWAGState"),
    ),
    "member of a list": (lambda: ensemble.member(states(), 0), GIVE_MIXTURE.format("list")),
    "a member too many": (
        lambda: ensemble.member(mixture(), 3),
        "index=3: the mixture has members 0 to 2",
    ),
    "the last member from the end": (
        lambda: ensemble.member(mixture(), -1),
        "index=-1: give an integer of at least 0",
    ),
    "many keys": (
        lambda: ensemble.sample(jax.random.split(KEY, 3), mixture()),
        r"key holds keys of shape \(3,\): give one, or map over them with jax\.vmap",
    ),
    "a negative scale": (lambda: ensemble.sample(KEY, mixture(), scale=-1.0), r"scale=-1\.0: give"),
    "a negative scale of a density": (
        lambda: ensemble.log_prob(mixture(), unflatten(np.zeros(5)), scale=-1.0),
        r"scale=-1\.0: give",
    ),
    "a negative scale of a variance": (
        lambda: ensemble.variance(mixture(), scale=-1.0),
        r"scale=-1\.0: give",
    ),
    "a misspelt centering": (
        lambda: ensemble.sample(KEY, mixture(), centering="last"),
        r"centering='last': give 'running' or 'final'",
    ),
    "density at other parameters": (
        lambda: ensemble.log_prob(mixture(), {"c": jnp.zeros(3)}),
        r"params has another structure than the parameters that were collected",
    ),
    "density at the parameters of all members": (
        lambda: ensemble.log_prob(mixture(), stacked().mean),
        r"params\['a'\] has shape \[\(3, 2, 2\)\]: the state holds \[\(2, 2\)\] there",
    ),
    "a mixture in place of a state": (
        lambda: swagjax.sample(KEY, mixture()),
        r"state is a Mixture: give the SWAGState",
    ),
}


@pytest.mark.parametrize(("use", "message"), MISUSE.values(), ids=MISUSE)
def test_wrong_use_is_answered(use, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        use()
