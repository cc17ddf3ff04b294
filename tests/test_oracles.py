"""Random runs of the real transformation, read as Gaussians, against dense algebra in float64.

Two steps, so that every tolerance is one of rounding. What was collected is compared with the
iterates. What is read is compared with the dense Gaussian of the arrays collected, so that a
variance of few digits, as after two iterates that nearly coincide, does not blur the algebra. In
float64 the densities are also compared with the iterates directly.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

import swagjax

SOME = settings(max_examples=8, deadline=None, derandomize=True)
MORE = settings(max_examples=20, deadline=None, derandomize=True)
MANY = settings(max_examples=100, deadline=None, derandomize=True)
KINDS = ("swag", "swag_diag", "swa")
FLOATS = ("float16", "bfloat16", "float32")
DOUBLE = ("float64", "float64", "float32")


# --- Random runs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """A parameter to be; ``held`` is false where a mask keeps it from the transformation."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    held: bool = True


class Run(NamedTuple):
    """A state, the iterates that it collected as float64 rows, and the last parameters."""

    state: swagjax.SWAGState
    iterates: np.ndarray
    params: Any
    held: Any
    kind: str
    rank: int
    steps: int


class Recipe(NamedTuple):
    """All that a run is made from."""

    layout: Any
    kind: str
    rank: int
    count: int
    start: int
    every: int
    after: int
    seed: int
    origin: int
    drift: float
    dead: bool


# Few shapes, so that few programs are compiled: empty leaves, scalars, holes of both kinds.
POOL = (
    (3, {"w": Leaf((2, 3)), "rest": [Leaf((4,), "bfloat16"), Leaf(())], "void": Leaf((0, 2))}),
    (2, (Leaf((3,), "float16"), None, {"off": Leaf((2,), held=False), "on": Leaf((2, 1))})),
)
DOUBLES = (4, {"w": Leaf((2, 2), "float64"), "rest": (Leaf((3,), "float64"), Leaf((), "float64"))})


def any_layout(floats):
    """Trees of any nesting; most are small, because the oracle is dense."""
    shapes = st.lists(st.integers(0, 3), max_size=2).map(tuple)
    leaves = st.builds(Leaf, shapes, st.sampled_from(floats), st.sampled_from([True, True, False]))

    def nest(inner):
        named = st.dictionaries(st.sampled_from(["w", "b", "W10", "w2"]), inner, max_size=3)
        listed = st.lists(inner, max_size=3)
        return named | listed | listed.map(tuple)

    trees = st.recursive(leaves | st.none(), nest, max_leaves=5)
    return trees.filter(lambda tree: tree is not None)  # optax takes it for missing parameters


@st.composite
def recipes(draw, layouts):
    rank, layout = draw(layouts)
    return Recipe(
        layout=layout,
        kind=draw(st.sampled_from(KINDS)),
        rank=rank,
        count=draw(st.integers(1, 2 * rank + 2)),
        start=draw(st.integers(0, 3)),
        every=draw(st.integers(1, 3)),
        after=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 2**32 - 1)),
        origin=draw(st.integers(0, 1)),
        drift=draw(st.sampled_from([0.0, 0.3])),
        dead=draw(st.sampled_from([False, False, True])),
    )


def any_layouts(floats=FLOATS):
    return st.tuples(st.integers(2, 6), any_layout(floats))


@st.composite
def readings(draw, *kinds):
    """The options of every function of a state; ``centering`` means nothing without a ring."""
    options = {
        "scale": draw(st.sampled_from([1.0, 0.5, 0.1, 3.0])),
        "min_variance": draw(st.sampled_from([0.0, 0.0, 0.01, 1.0])),
        "centering": "running",
    }
    if "swag" in kinds:
        options["centering"] = draw(st.sampled_from(["running", "final"]))
    return options


@st.composite
def cases(draw, layouts):
    recipe = draw(recipes(layouts))
    return recipe, draw(readings(recipe.kind))


def leaf_map(function, layout):
    return jax.tree.map(function, layout, is_leaf=lambda x: isinstance(x, Leaf))


def transformation(recipe):
    cadence = {"start": recipe.start, "every": recipe.every}
    if recipe.kind == "swag":
        return swagjax.swag(recipe.rank, **cadence)
    return {"swag_diag": swagjax.swag_diag, "swa": swagjax.swa}[recipe.kind](**cadence)


def run(recipe):
    """Train for as many steps as collect ``count`` iterates, and for a few that collect nothing.

    The gradients are random, with a spread of its own for every coordinate. Where ``dead``, the
    first coordinate of every leaf never moves.
    """
    rng = np.random.default_rng(recipe.seed)
    held = leaf_map(lambda leaf: leaf.held, recipe.layout)
    origin = np.random.default_rng(recipe.origin)
    params = leaf_map(
        lambda leaf: jnp.asarray(origin.normal(size=leaf.shape), leaf.dtype), recipe.layout
    )
    spread = jax.tree.map(lambda p: rng.uniform(0.1, 1.0, p.shape), params)
    if recipe.dead:
        spread = jax.tree.map(without_first, spread)

    def gradient(p, s):
        return jnp.asarray(s * (rng.normal(size=p.shape) + recipe.drift), p.dtype)

    tx = transformation(recipe)
    masked = tx if all(jax.tree.leaves(held)) else optax.masked(tx, held)
    opt = optax.chain(optax.sgd(0.5), masked)
    opt_state, iterates = opt.init(params), []
    steps = recipe.start + recipe.every * recipe.count + min(recipe.after, recipe.every - 1)
    for t in range(1, steps + 1):
        updates, opt_state = opt.update(jax.tree.map(gradient, params, spread), opt_state, params)
        params = optax.apply_updates(params, updates)
        if t > recipe.start and (t - recipe.start) % recipe.every == 0:
            iterates.append(row(params, held))
    state = swagjax.get_state(opt_state)
    return Run(state, np.array(iterates), params, held, recipe.kind, recipe.rank, steps)


def without_first(x):
    flat = x.ravel()
    flat[:1] = 0
    return flat.reshape(x.shape)


def row(params, held):
    """The leaves that the transformation sees, as one float64 vector."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(held), strict=True)
    return oracle.flatten([np.zeros(0)] + [p for p, seen in pairs if seen])


def flatten(tree):
    """As ``oracle.flatten``, of trees without leaves too."""
    return oracle.flatten([np.zeros(0), tree])


def flat_ring(state):
    """The ring as a matrix (rank, P)."""
    rings = [np.asarray(x, np.float64) for x in jax.tree.leaves(state.deviations)]
    return np.concatenate([x.reshape(len(x), -1) for x in rings], 1)


def unflatten(vector, run):
    """The parameters, but those that the state holds from a vector, in its accumulators' dtypes."""
    ends = np.cumsum([x.size for x in jax.tree.leaves(run.state.mean)], dtype=int)
    parts = iter(np.split(vector, ends))
    means = iter(jax.tree.leaves(run.state.mean))
    params, treedef = jax.tree.flatten(run.params)
    leaves = [
        jnp.asarray(next(parts).reshape(p.shape), next(means).dtype) if held else p
        for p, held in zip(params, jax.tree.leaves(run.held), strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def epsilons(state):
    """The spacing of the accumulators at 1, coordinate by coordinate."""
    return flatten(jax.tree.map(lambda x: np.full(x.shape, jnp.finfo(x.dtype).eps), state.mean))


def epsilon(state):
    return max(epsilons(state), default=np.finfo(np.float32).eps)


# --- What was collected ----------------------------------------------------------------------


def check_moments(run):
    """Mean, variance and ring of the iterates: n roundings of each number, at the most.

    The mean is rounded to eps |theta| at each of n steps, a deviation inherits that error, and the
    variance twice that error times the deviation.
    """
    state, x = run.state, run.iterates
    n = len(x)
    assert (int(state.num_collected), int(state.num_updates), int(state.num_skipped)) == (
        n,
        run.steps,
        0,
    )
    size = np.abs(x).max(0)
    width = np.abs(x - x.mean(0)).max(0)
    error = (n + 4) * epsilons(state)
    assert (np.abs(flatten(state.mean) - x.mean(0)) <= error * size).all()
    if run.kind == "swa":
        assert state.variance is None
        assert state.sq_mean is None
    else:
        bound = error * (2 * width * size + width**2)
        assert (np.abs(flatten(state.variance) - x.var(0)) <= bound).all()
        np.testing.assert_allclose(
            flatten(state.sq_mean), (x**2).mean(0), rtol=0, atol=max(2 * error * size**2, default=0)
        )
    if run.kind != "swag":
        assert state.deviations is None
    elif jax.tree.leaves(state.mean):
        ring = oracle.ring(x, run.rank)
        assert (np.abs(flat_ring(state) - ring) <= error * (size + width)).all()


# --- The Gaussian of the arrays --------------------------------------------------------------


def dense(run, *, scale, centering, min_variance):
    """Diagonal and low-rank part of the covariance, from the arrays of the state alone.

    Both as diagonal V (P,) and factor W (P, K). The ring is put in order of collection, and
    recentred backwards: with d_i = theta_i - mean_i, mean_{i-1} is mean_i - d_i / (i - 1).
    """
    state, n = run.state, len(run.iterates)
    size = run.iterates.shape[1]
    kept = np.zeros(size) if run.kind == "swa" else flatten(state.variance)
    half = 0.5 if run.kind == "swag" else 1.0
    V = scale * half * np.maximum(kept, min_variance)
    held = range(max(0, n - run.rank), n)
    if run.kind != "swag" or size == 0 or len(held) < 2:
        return V, np.zeros((size, 0))
    ring = flat_ring(state)
    rows, mean = [], np.zeros(size)  # as seen from the final mean
    for i in reversed(held):
        d = ring[i % run.rank]
        rows.append(mean + d if centering == "final" else d)
        mean = mean - d / max(i, 1)
    return V, np.transpose(rows) * np.sqrt(scale / 2 / (len(held) - 1))


class Reading(NamedTuple):
    """What the library says of a state, in float64."""

    variance: np.ndarray
    centre: np.ndarray
    root: np.ndarray
    densities: np.ndarray
    differences: np.ndarray
    entropy: np.ndarray
    sample: np.ndarray
    filled: Any


PAIRS = ((0, 1), (1, 0), (0, 2), (2, 0), (2, 2))  # of points to take differences of


@functools.cache
def reader(centering):
    """Everything in one program: compiling is what these tests spend their time on."""

    def vector(tree):
        leaves = jax.tree.leaves(tree)
        dtype = jnp.result_type(jnp.float32, *leaves)
        return jnp.concatenate([jnp.zeros(0, dtype), *(x.ravel().astype(dtype) for x in leaves)])

    def read(state, params, points, scale, min_variance):
        options = {"scale": scale, "min_variance": min_variance, "centering": centering}
        leaves, treedef = jax.tree.flatten(state.mean)
        rank = next((len(ring) for ring in jax.tree.leaves(state.deviations)), 0)
        ends = np.cumsum([x.size for x in leaves], dtype=int)

        def theta(z):
            *z1, z2 = jnp.split(z, ends)
            z1 = [z.reshape(x.shape).astype(x.dtype) for z, x in zip(z1, leaves, strict=True)]
            z1 = jax.tree.unflatten(treedef, z1)
            return vector(swagjax.from_noise(state, z1, z2 if rank else None, **options))

        def point(i):
            return jax.tree.map(lambda x: x[i], points)

        def score(i):
            return swagjax.log_prob(state, point(i), **options)

        def differ(pair):
            return swagjax.log_prob_difference(state, point(pair[0]), point(pair[1]), **options)

        zero = jnp.zeros_like(vector(state.mean), shape=sum(x.size for x in leaves) + rank)
        key = jax.random.key(0)
        return Reading(
            variance=vector(swagjax.variance(state, **options)),
            centre=theta(zero),
            root=jax.jacfwd(theta)(zero),  # exact: theta is affine
            densities=jax.vmap(score)(jnp.arange(3)),
            differences=jax.vmap(differ)(jnp.array(PAIRS)),
            entropy=swagjax.entropy(state, **options),
            sample=vector(swagjax.sample(key, state, **options)),
            filled=swagjax.sample(key, state, like=params, **options),
        )

    return jax.jit(read)


def read(run, points, *, scale, centering, min_variance):
    """Read a run at three points, which are scored as full trees: masked leaves are passed over."""
    trees = [unflatten(x, run) for x in points]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *trees)
    reading = reader(centering)(run.state, run.params, stacked, scale, min_variance)
    arrays = [np.asarray(x, np.float64) for x in reading[:-1]]
    return Reading(*arrays, reading.filled)


def two_points_and_one_off(run, V, W, seed=0):
    """Two points a few standard deviations from the mean, and one that is off it everywhere."""
    mean, rng = flatten(run.state.mean), np.random.default_rng(seed)
    draws = np.sqrt(V + (W**2).sum(1)) * rng.normal(size=(2, len(mean)))
    points = [mean + draws[0], mean + draws[1], mean + 1]
    return [row(unflatten(x, run), run.held) for x in points]  # as the accumulators hold them


def check_covariance(run, reading, V, W):
    """The Jacobian of the sampler times its transpose; its diagonal; the centre.

    Entries are sums of few rounded products, so they are right relative to the variances.
    """
    wanted = np.diag(V) + W @ W.T
    spread = np.sqrt(np.diag(wanted))
    tolerance = 40 * epsilon(run.state)
    np.testing.assert_array_equal(reading.centre, flatten(run.state.mean))
    error = np.abs(reading.root @ reading.root.T - wanted)
    assert (error <= tolerance * np.outer(spread, spread)).all()
    np.testing.assert_allclose(reading.variance, np.diag(wanted), rtol=tolerance)


def check_densities(run, reading, points, V, W):
    """``log_prob``, ``log_prob_difference`` and ``entropy`` against SciPy, and where they end.

    Where a variance is zero, differences are those of the Gaussian over the other coordinates.
    """
    mean, alive = flatten(run.state.mean), V > 0
    V, W = V[alive], W[alive]
    wanted = np.array([logpdf(V, W, (x - mean)[alive]) for x in points])
    size = np.abs(np.log(V)).sum() + condition(V, W) + 2 * len(V) + 1
    tolerance = 30 * epsilon(run.state) * (size + np.abs(wanted).max())
    differences = np.array([wanted[i] - wanted[j] for i, j in PAIRS])
    if alive.all():
        assert np.abs(reading.densities - wanted).max() <= tolerance
        assert abs(reading.entropy - differential_entropy(V, W)) <= tolerance
        assert np.abs(reading.differences - differences).max() <= tolerance
    else:
        np.testing.assert_array_equal(reading.densities, [np.inf, np.inf, -np.inf])
        assert reading.entropy == -np.inf
        assert np.abs(reading.differences[:2] - differences[:2]).max() <= tolerance
        np.testing.assert_array_equal(reading.differences[2:], [np.inf, -np.inf, np.nan])


def condition(V, W):
    """Of I + W^T V^-1 W, whose eigenvalues begin at 1."""
    white = W / np.sqrt(V)[:, None]
    return 1 + np.linalg.norm(white, 2) ** 2 if white.size else 1.0


def whitened(V, W):
    """The Gaussian in units of the root of V, and the log of those units.

    SciPy takes a covariance for singular whose variances differ by ten orders of magnitude.
    """
    white = W / np.sqrt(V)[:, None]
    covariance = np.eye(len(V)) + white @ white.T
    return scipy.stats.multivariate_normal(np.zeros(len(V)), covariance), np.log(V).sum() / 2


def logpdf(V, W, residual):
    if not len(V):
        return 0.0
    gaussian, units = whitened(V, W)
    return gaussian.logpdf(residual / np.sqrt(V)) - units


def differential_entropy(V, W):
    if not len(V):
        return 0.0
    gaussian, units = whitened(V, W)
    return gaussian.entropy() + units


def check_filled(run, reading):
    """With ``like``, leaves that the state does not hold are those of the parameters."""
    assert jax.tree.structure(reading.filled) == jax.tree.structure(run.params)
    drawn = row(reading.filled, run.held)
    leaves = zip(*map(jax.tree.leaves, (reading.filled, run.params, run.held)), strict=True)
    for got, param, held in leaves:
        assert got.dtype == param.dtype
        if not held:
            np.testing.assert_array_equal(got, param)
    coarsest = max((float(jnp.finfo(p.dtype).eps) for p in jax.tree.leaves(run.params)), default=0)
    np.testing.assert_allclose(drawn, reading.sample, rtol=coarsest, atol=coarsest)


def check_from_iterates(run, reading, points, options):
    """End to end: no array of the state is looked at, only the iterates."""
    x = run.iterates
    covariance = oracle.covariance(run.kind, x, run.rank, **options)
    variances = np.diag(covariance)
    if not x.size or not variances.min() > 1e-4 * variances.max():
        return
    gaussian = scipy.stats.multivariate_normal(x.mean(0), covariance)
    np.testing.assert_allclose(reading.densities, gaussian.logpdf(points), rtol=1e-9)
    np.testing.assert_allclose(reading.entropy, gaussian.entropy(), rtol=1e-9)
    error = np.abs(reading.root @ reading.root.T - covariance)
    assert error.max() <= 1e-11 * variances.max()


def check_reading(case):
    recipe, options = case
    collected = run(recipe)
    V, W = dense(collected, **options)
    points = two_points_and_one_off(collected, V, W)
    reading = read(collected, points, **options)
    check_moments(collected)
    check_covariance(collected, reading, V, W)
    check_densities(collected, reading, points, V, W)
    check_filled(collected, reading)
    if epsilon(collected.state) < 1e-15:
        check_from_iterates(collected, reading, points, options)


@pytest.mark.slow
@SOME
@given(cases(st.sampled_from(POOL)))
def test_reading_a_run(case):
    check_reading(case)


@pytest.mark.slow
@SOME
@given(cases(st.just(DOUBLES)))
def test_reading_a_run_in_float64(case):
    with jax.enable_x64(True):
        check_reading(case)


@pytest.mark.slow
@MANY
@given(cases(any_layouts()))
def test_reading_a_run_over_any_tree(case):
    check_reading(case)


@pytest.mark.slow
@MANY
@given(cases(any_layouts(DOUBLE)))
def test_reading_a_run_over_any_tree_in_float64(case):
    with jax.enable_x64(True):
        check_reading(case)


@pytest.mark.parametrize("kind", ["swag", "swag_diag"])
def test_samples_have_the_moments_of_the_dense_gaussian(kind):
    """Exact laws at a fixed key: a false alarm over all bounds has probability below 1e-6.

    N times the squared mean of N whitened samples is chi-square, and so is the sum of squares
    along every axis and every diagonal between two axes, which determine all covariances.
    """
    options = {"scale": 0.5, "centering": "final", "min_variance": 0.01}
    rank, layout = POOL[1]
    collected = run(Recipe(layout, kind, rank, 5, 1, 2, 1, 3, 0, 0.3, True))
    number, keys = 20_000, jax.random.split(jax.random.key(1), 20_000)
    draw = functools.partial(swagjax.sample, **options)
    thetas = jax.jit(jax.vmap(draw, (0, None)))(keys, collected.state)
    thetas = [np.asarray(x, np.float64).reshape(number, -1) for x in jax.tree.leaves(thetas)]
    offsets = np.concatenate(thetas, 1) - flatten(collected.state.mean)
    V, W = dense(collected, **options)
    root = np.linalg.cholesky(np.diag(V) + W @ W.T)
    white = scipy.linalg.solve_triangular(root, offsets.T, lower=True).T
    size = white.shape[1]
    assert number * (white.mean(0) ** 2).sum() < scipy.stats.chi2.isf(3e-7, size)
    gram = white.T @ white
    i, j = np.triu_indices(size, 1)
    axes = np.diag(gram)
    squares = np.concatenate([axes, (axes[i] + axes[j]) / 2 + gram[i, j]])
    tail = 3e-7 / len(squares)
    low, high = scipy.stats.chi2.isf([1 - tail, tail], number)
    assert low < squares.min()
    assert squares.max() < high


# --- Two Gaussians ---------------------------------------------------------------------------


@st.composite
def pairs(draw, layouts):
    """Two runs over the same parameters, of any kinds, lengths and ranks, from one origin or two.

    In a third of the runs each, the first coordinate of every leaf never moves.
    """
    layout = st.just(draw(layouts))
    first, second = draw(recipes(layout)), draw(recipes(layout))
    second = second._replace(rank=first.rank + draw(st.sampled_from([0, 0, 1])))
    return (first, second), draw(readings(first.kind, second.kind))


def uncompiled(state, other, **options):
    """Operation by operation: one program a pair of kinds would take all the time there is."""
    with jax.disable_jit():
        return swagjax.kl(state, other, **options)


def check_divergence(case, divergence=uncompiled):
    """The dense formula over the coordinates that live in both, or infinity as documented."""
    recipes, options = case
    p, q = (run(recipe) for recipe in recipes)
    got = float(divergence(p.state, q.state, **options))
    (V, W), (U, X) = dense(p, **options), dense(q, **options)
    m, n = flatten(p.state.mean), flatten(q.state.mean)
    live = (V > 0) & (U > 0)
    if ((V > 0) != (U > 0)).any() or (m != n)[~live].any():
        assert got == np.inf
        return
    S, T = (np.diag(v[live]) + w[live] @ w[live].T for v, w in ((V, W), (U, X)))
    wanted = oracle.kl(m[live], S, n[live], T)
    size = 1 + abs(wanted) + np.abs(np.log(V[live] / U[live])).sum()
    size += condition(V[live], W[live]) + condition(U[live], X[live])
    assert abs(got - wanted) <= 10 * epsilon(p.state) * size
    if recipes[0] == recipes[1]:
        assert abs(got) <= 10 * epsilon(p.state) * size


@pytest.mark.slow
@MORE
@given(pairs(st.sampled_from(POOL)))
def test_divergence_of_two_runs(case):
    check_divergence(case)


@pytest.mark.slow
@MORE
@given(pairs(st.just(DOUBLES)))
def test_divergence_of_two_runs_in_float64(case):
    with jax.enable_x64(True):
        check_divergence(case)


@pytest.mark.slow
@MANY
@given(pairs(any_layouts()))
def test_divergence_of_two_runs_over_any_tree(case):
    check_divergence(case, swagjax.kl)


@pytest.mark.slow
@MANY
@given(pairs(any_layouts(DOUBLE)))
def test_divergence_of_two_runs_over_any_tree_in_float64(case):
    with jax.enable_x64(True):
        check_divergence(case, swagjax.kl)


def collect(tx, iterates):
    """The state of a run over ``iterates``, float32 rows of one vector."""
    zero = jnp.zeros_like(jnp.asarray(iterates[0], jnp.float32))
    state = tx.init({"w": zero})
    for x in iterates:
        _, state = tx.update({"w": jnp.asarray(x, jnp.float32)}, state, {"w": zero})
    return state


def normal(std, mean=0.0):
    """A SWAG-Diag state that is N(mean, std^2) in every coordinate."""
    mean, std = np.broadcast_arrays(np.float32(mean), np.float32(std))
    return collect(swagjax.swag_diag(), [mean + std, mean - std])


@pytest.mark.parametrize("exponent", [-18, -12, -8, -7, -6, -4, -2, 2, 6, 12, 18])
def test_divergence_of_variances_of_any_ratio(exponent):
    """With the ratio x, 1/2 (x - 1 - log x): right at both ends, and where the two are alike."""
    x = 10.0**exponent
    std = np.sqrt([x, 1.0, x])
    state, other = normal(std), normal([1.0, 1.0, 1.0])
    ratio = flatten(state.variance) / flatten(other.variance)
    wanted = (ratio - 1 - np.log(ratio)).sum() / 2
    np.testing.assert_allclose(swagjax.kl(state, other), wanted, rtol=1e-5)


@pytest.mark.parametrize("x", [1e-3, 1e-2, 0.1])
def test_divergence_of_variances_that_are_alike_is_of_second_order(x):
    """x - 1 - log x of x near 1, which a sum of traces and logarithms would lose in rounding."""
    state, other = normal(np.full(50, np.sqrt(1 + x))), normal(np.ones(50))
    ratio = flatten(state.variance) / flatten(other.variance)
    wanted = (ratio - 1 - np.log(ratio)).sum() / 2
    np.testing.assert_allclose(swagjax.kl(state, other), wanted, rtol=1e-3)
    assert swagjax.kl(state, state) == 0


@pytest.mark.parametrize("std", [1e-17, 1e18])
def test_densities_of_spreads_at_the_ends_of_float32(std):
    """Squares of a standard deviation are representable, squares of a hundredth of it are not."""
    rng = np.random.default_rng(0)
    iterates = np.float32(std) * rng.normal(size=(6, 5)).astype(np.float32)
    state = collect(swagjax.swag(3), iterates)
    unit = collect(swagjax.swag(3), iterates / np.float32(std))
    log = 5 * np.log(np.float64(np.float32(std)))
    np.testing.assert_allclose(swagjax.entropy(state), swagjax.entropy(unit) + log, rtol=1e-5)
    theta = {"w": state.mean["w"] + np.float32(0.3 * std)}
    shifted = {"w": unit.mean["w"] + 0.3}
    wanted = swagjax.log_prob(unit, shifted) - log
    np.testing.assert_allclose(swagjax.log_prob(state, theta), wanted, rtol=1e-4)
    wanted = swagjax.log_prob_difference(unit, shifted, unit.mean)
    got = swagjax.log_prob_difference(state, theta, state.mean)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    half = {"w": unit.variance["w"] / 2}, {"w": state.variance["w"] / 2}
    wanted = swagjax.kl(unit, unit._replace(variance=half[0]))
    got = swagjax.kl(state, state._replace(variance=half[1]))
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_gradients_of_the_difference_and_of_the_divergence():
    """-Sigma^-1 (a - mean), its negative at the reference, and T^-1 (m - n)."""
    options = {"scale": 0.5, "centering": "final", "min_variance": 0.01}
    rank, layout = DOUBLES
    with jax.enable_x64(True):
        p, q = (run(Recipe(layout, "swag", rank, 6, 0, 1, 0, i, i, 0.3, False)) for i in (0, 1))
        parts = [dense(x, **options) for x in (p, q)]
        S, T = (np.diag(V) + W @ W.T for V, W in parts)
        m, n = flatten(p.state.mean), flatten(q.state.mean)
        a, b, _ = two_points_and_one_off(p, *parts[0])

        def difference(x, y):
            return swagjax.log_prob_difference(p.state, x, y, **options)

        slopes = jax.jit(jax.grad(difference, (0, 1)))(unflatten(a, p), unflatten(b, p))
        for slope, wanted in zip(slopes, (m - a, b - m), strict=True):
            np.testing.assert_allclose(flatten(slope), np.linalg.solve(S, wanted), rtol=1e-9)

        def divergence(mean):
            return swagjax.kl(p.state._replace(mean=mean), q.state, **options)

        slope = flatten(jax.jit(jax.grad(divergence))(p.state.mean))
        np.testing.assert_allclose(slope, np.linalg.solve(T, m - n), rtol=1e-9)


@pytest.mark.slow
def test_gradients_of_the_divergence_pass_dead_weights_by():
    """A weight that neither run moved counts as no dimension, in the slope as in the value."""
    iterates = np.random.default_rng(0).normal(size=(6, 4))
    dead = iterates.copy()
    dead[:, 1] = 0.7

    def slope(iterates):
        state = collect(swagjax.swag(3), iterates)
        mean = {"w": state.mean["w"].at[0].add(0.5)}
        other = state._replace(mean=mean, variance={"w": 2 * state.variance["w"]})
        return jax.grad(lambda scale: swagjax.kl(state, other, scale=scale))(0.7)

    np.testing.assert_allclose(slope(dead), slope(np.delete(iterates, 1, axis=1)), rtol=1e-4)


def test_divergence_of_members_side_by_side():
    rng = np.random.default_rng(0)
    states = [collect(swagjax.swag(3), rng.normal(size=(n, 4))) for n in (5, 5)]
    others = [collect(swagjax.swag_diag(), rng.normal(size=(n, 4))) for n in (3, 3)]
    alone = [swagjax.kl(p, q) for p, q in zip(states, others, strict=True)]
    stacked, beside = (jax.tree.map(lambda *x: jnp.stack(x), *group) for group in (states, others))
    together = jax.jit(jax.vmap(swagjax.kl))(stacked, beside)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_divergence_refuses_what_does_not_match():
    state = normal(np.ones(3))
    with pytest.raises(ValueError, match=r"other\.mean\['w'\] has shape \[\(4,\)\]"):
        swagjax.kl(state, normal(np.ones(4)))
    with pytest.raises(ValueError, match=r"other\.mean has another structure"):
        swagjax.kl(state, state._replace(mean={}, variance={}))
    empty = swagjax.swag_diag().init({"w": jnp.zeros(3)})
    for one, two in ((state, empty), (empty, state)):
        with pytest.raises(ValueError, match="collected no iterate"):
            swagjax.kl(one, two)
        assert np.isnan(jax.jit(swagjax.kl)(one, two))
    with pytest.raises(ValueError, match=r"state is a dict.*get_state"):
        swagjax.kl(state, {"w": 1.0})
    with pytest.raises(ValueError, match=r"scale=-1\.0"):
        swagjax.kl(state, state, scale=-1.0)
    with pytest.raises(ValueError, match="reference has another structure"):
        swagjax.log_prob_difference(state, state.mean, {})
    with pytest.raises(ValueError, match="params has another structure"):
        swagjax.log_prob_difference(state, {}, state.mean)
