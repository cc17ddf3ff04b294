import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial

import swagjax
from swagjax import batch_stats, surface

SHAPES = {"a": (3, 2), "b": (), "c": [(4,)]}


def tree(seed, scale=1.0, around=0.0, lead=()):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(around + scale * rng.normal(size=lead + shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def rows(stacked):
    """A tree of stacked weights as a float64 matrix, one vector a row."""
    num = len(jax.tree.leaves(stacked)[0])
    parts = [np.asarray(x, np.float64).reshape(num, -1) for x in jax.tree.leaves(stacked)]
    return np.concatenate(parts, 1)


def unflatten(vectors):
    """The inverse of ``rows``; of one vector, of ``oracle.flatten``."""
    shapes, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    parts = np.split(vectors, np.cumsum([math.prod(shape) for shape in shapes])[:-1], axis=-1)
    lead = vectors.shape[:-1]
    leaves = [
        jnp.asarray(x.reshape(lead + y), jnp.float32) for x, y in zip(parts, shapes, strict=True)
    ]
    return treedef.unflatten(leaves)


def collected(kind="swag", n=7, rank=4):
    """The state of iterates, made without what is tested, and the iterates in float64."""
    iterates = np.random.default_rng(0).normal(size=(n, 11))
    count = jnp.int32(n)
    variance = unflatten(iterates.var(0)) if kind != "swa" else None
    ring = unflatten(oracle.ring(iterates, rank)) if kind == "swag" else None
    mean = unflatten(iterates.mean(0))
    return swagjax.SWAGState(count, count, jnp.int32(0), mean, variance, ring), iterates


class TestPlane:
    def test_is_that_of_gram_and_schmidt(self):
        points = [tree(i) for i in range(3)]
        plane = surface.plane(*points)
        w1, w2, w3 = map(oracle.flatten, points)
        u = (w2 - w1) / np.linalg.norm(w2 - w1)
        v = w3 - w1 - (w3 - w1) @ u * u
        v /= np.linalg.norm(v)
        np.testing.assert_allclose(rows(plane.directions), [u, v], atol=1e-6)
        wanted = [[0, 0], [(w2 - w1) @ u, 0], [(w3 - w1) @ u, (w3 - w1) @ v]]
        np.testing.assert_allclose(plane.points, wanted, rtol=1e-5, atol=1e-6)
        for coordinates, w in zip(plane.points, points, strict=True):
            found = surface.point(plane, coordinates)
            np.testing.assert_allclose(oracle.flatten(found), oracle.flatten(w), atol=2e-6)
        jax.tree.map(np.testing.assert_array_equal, surface.point(plane, (0.0, 0.0)), points[0])

    def test_points_close_together_and_far_from_zero_have_orthonormal_directions(self):
        """Almost on a line, and steps of 1e-4 around 1: the float64 plane of the same float32."""
        first = tree(0, 1e-4, 1.0)
        second = jax.tree.map(jnp.add, first, tree(1, 1e-4))
        third = jax.tree.map(lambda a, b, e: a + 3 * (b - a) + e, first, second, tree(2, 3e-6))
        plane = surface.plane(first, second, third)
        basis = rows(plane.directions)
        np.testing.assert_allclose(basis @ basis.T, np.eye(2), atol=3e-7)
        away = oracle.flatten(third) - oracle.flatten(first)
        np.testing.assert_allclose(plane.points[2], basis @ away, rtol=1e-4)

    def test_coordinates_are_a_projection(self):
        plane = surface.plane(*(tree(i) for i in range(3)))
        away = oracle.flatten(tree(3)) - oracle.flatten(plane.origin)
        basis = rows(plane.directions)
        found, distance = surface.coordinates(plane, tree(3))
        np.testing.assert_allclose(found, basis @ away, rtol=1e-5)
        np.testing.assert_allclose(
            distance, np.linalg.norm(away - basis.T @ (basis @ away)), rtol=1e-5
        )
        inside = surface.point(plane, (0.7, -1.2))
        found, distance = jax.jit(surface.coordinates)(plane, inside)
        np.testing.assert_allclose(found, [0.7, -1.2], rtol=1e-5)
        assert distance < 1e-6

    def test_low_precision_comes_back_as_it_was(self):
        points = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(i)) for i in range(3)]
        plane = surface.plane(*points)
        assert {x.dtype for x in jax.tree.leaves(plane.directions)} == {jnp.dtype(jnp.float32)}
        found = surface.point(plane, plane.points[2])
        jax.tree.map(np.testing.assert_array_equal, found, points[2])

    @pytest.mark.parametrize("where", [0.0, 1.0, 0.3])
    def test_points_on_one_line_make_none(self, where):
        first, second = tree(0), tree(1)
        third = jax.tree.map(lambda a, b: (1 - where) * a + where * b, first, second)
        with pytest.raises(ValueError, match="first, second and third lie on one line"):
            surface.plane(first, second, third)
        directions = jax.jit(surface.plane)(first, second, third).directions
        assert all(np.isnan(x[1]).all() for x in jax.tree.leaves(directions))
        assert not any(np.isnan(x[0]).any() for x in jax.tree.leaves(directions))

    def test_the_grid_is_square_and_holds_the_points(self):
        plane = surface.plane(jnp.zeros(2), jnp.array([4.0, 0]), jnp.array([1.0, 2.0]))
        x, y = surface.grid(plane, num=5, margin=0.25)
        np.testing.assert_allclose(x[3], [-1, 0.5, 2, 3.5, 5])
        np.testing.assert_allclose(y[:, 1], [-2, -0.5, 1, 2.5, 4])

    def test_sharded_weights_stay_where_they_are(self):
        mesh = jax.make_mesh((4,), ("d",), devices=jax.devices()[:4])
        split = NamedSharding(mesh, PartitionSpec("d"))
        points = [jnp.asarray(np.random.default_rng(i).normal(size=(8, 2))) for i in range(3)]
        wanted = surface.plane(*points)
        plane = surface.plane(*(jax.device_put(w, split) for w in points))
        assert surface.point(plane, (1.0, 2.0)).sharding.is_equivalent_to(split, 2)
        np.testing.assert_allclose(plane.points, wanted.points, rtol=1e-5)


def check_principal(plane, origin, deviations, num):
    """Against the singular value decomposition of deviations in float64."""
    left, sizes, right = np.linalg.svd(deviations, full_matrices=False)
    left, sizes, right = left[:, :num], sizes[:num], right[:num]
    signs = np.sign(np.take_along_axis(left, np.abs(left).argmax(0)[None], 0))[0]
    np.testing.assert_allclose(oracle.flatten(plane.origin), origin, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows(plane.directions), signs[:, None] * right, atol=1e-5)
    np.testing.assert_allclose(plane.points, left * sizes * signs, rtol=1e-4, atol=1e-5)


class TestPrincipalDirections:
    @pytest.mark.parametrize(("scale", "around"), [(1.0, 0.0), (1e-3, 1.0)])
    def test_are_those_of_a_trajectory(self, scale, around):
        path = tree(0, scale, around, lead=(6,))
        exact = rows(path)
        plane = surface.pca_plane(path, num=3)
        if scale == 1:
            check_principal(plane, exact.mean(0), exact - exact.mean(0), 3)
        basis = rows(plane.directions)
        np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=3e-7)
        np.testing.assert_allclose(
            plane.points, (exact - exact.mean(0)) @ basis.T, rtol=1e-3, atol=1e-3 * scale
        )

    def test_are_those_of_a_ring_that_came_round(self):
        state, iterates = collected(n=7, rank=4)
        mean = iterates.mean(0)
        check_principal(surface.pca_plane(state), mean, iterates[3:] - mean, 2)

    def test_rows_not_yet_written_are_nan(self):
        state, iterates = collected(n=3, rank=4)
        plane = surface.pca_plane(state)
        assert np.isnan(plane.points[3:]).all()
        plane = plane._replace(points=plane.points[:3])
        check_principal(plane, iterates.mean(0), iterates - iterates.mean(0), 2)

    @pytest.mark.slow
    def test_are_those_of_leaves_of_two_precisions(self):
        """Without silent promotion, of a trajectory and of a ring."""
        with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
            path = tree(0, lead=(4,)) | {"b": jnp.asarray(np.random.default_rng(1).normal(size=4))}
            assert path["b"].dtype == jnp.float64
            exact = rows(path)
            plane = surface.pca_plane(path)
            check_principal(plane, exact.mean(0), exact - exact.mean(0), 2)
            dtypes = [x.dtype for x in jax.tree.leaves(plane.directions)]
            assert dtypes == [x.dtype for x in jax.tree.leaves(path)]

    @pytest.mark.parametrize("speed", [0.0, 1.0])
    def test_iterates_that_stand_still_or_on_a_line_span_no_plane(self, speed):
        along = speed * np.arange(6.0)[:, None] * np.random.default_rng(0).normal(size=11)
        with pytest.raises(ValueError, match="span fewer than num=3 directions"):
            surface.pca_plane(unflatten(0.1 + along), num=3)

    def test_wrong_trajectories(self):
        state, _ = collected("swag_diag")
        with pytest.raises(ValueError, match="holds no deviations"):
            surface.pca_plane(state)
        with pytest.raises(ValueError, match=r"leaves with first axes \[\(2,\), \(3,\)\]"):
            surface.pca_plane({"a": jnp.ones((2, 3)), "b": jnp.ones(3)})
        with pytest.raises(ValueError, match="num=4: 3 iterates span"):
            surface.pca_plane(jnp.ones((3, 9)), num=4)


class TestProject:
    @pytest.mark.parametrize(
        ("kind", "n", "options"),
        [
            ("swag", 7, {"scale": 3.0}),
            pytest.param("swag", 7, {"centering": "final"}, marks=pytest.mark.slow),
            pytest.param("swag", 3, {}, marks=pytest.mark.slow),
            pytest.param("swag_diag", 7, {"scale": 0.5}, marks=pytest.mark.slow),
            ("swa", 7, {}),
        ],
    )
    def test_is_the_dense_covariance_between_the_directions(self, kind, n, options):
        state, iterates = collected(kind, n)
        plane = surface.plane(*(tree(i) for i in (11, 12, 13)))
        found = surface.project(plane, state, **options)
        dense = oracle.covariance(kind, iterates, 4, **options)
        basis = rows(plane.directions)
        away = iterates.mean(0) - oracle.flatten(plane.origin)
        np.testing.assert_allclose(found.covariance, basis @ dense @ basis.T, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.mean, basis @ away, rtol=1e-5)
        off = np.linalg.norm(away - basis.T @ (basis @ away))
        np.testing.assert_allclose(found.distance, off, rtol=1e-5)

    def test_leaves_that_the_state_does_not_hold_are_certain(self):
        hole, one = optax.MaskedNode(), jnp.ones(1)
        mean, variance = ({"a": jnp.array(x), "b": hole} for x in ([2.0, 0.0], [1.0, 0.0]))
        state = swagjax.SWAGState(*3 * [jnp.int32(2)], mean, variance, None)
        plane = surface.plane(
            *({"a": x * jnp.ones(2), "b": y * one} for x, y in ((0, 0), (0, 1), (1, 0)))
        )
        found = surface.project(plane, state)
        np.testing.assert_allclose(found.covariance, [[0, 0], [0, 0.5]], atol=1e-6)
        np.testing.assert_allclose(found.mean, [0, np.sqrt(2)], rtol=1e-6)

    def test_wrong_uses(self):
        plane = surface.plane(*(tree(i) for i in range(3)))
        empty = collected()[0]._replace(num_collected=jnp.int32(0))
        with pytest.raises(ValueError, match="collected no iterate"):
            surface.project(plane, empty)
        assert np.isnan(jax.jit(surface.project)(plane, empty).mean).all()
        state, _ = collected()
        with pytest.raises(ValueError, match="centering='middle'"):
            surface.project(plane, state, centering="middle")
        other = surface.plane(*jnp.eye(3))
        with pytest.raises(ValueError, match=r"plane\.origin has another structure"):
            surface.project(other, state)


class TestRays:
    def test_go_from_the_origin_by_the_distance(self):
        unit = np.random.default_rng(1).normal(size=11)
        origin, direction = tree(0), unflatten(unit / np.linalg.norm(unit))
        away = oracle.flatten(surface.ray(origin, direction, 2.5)) - oracle.flatten(origin)
        np.testing.assert_allclose(np.linalg.norm(away), 2.5, rtol=1e-6)
        np.testing.assert_allclose(away, 2.5 * oracle.flatten(direction), atol=1e-6)
        half = jnp.ones(3, jnp.bfloat16)
        assert surface.ray(half, jnp.ones(3), 1.0).dtype == jnp.bfloat16

    @pytest.mark.slow
    def test_are_uniform_on_the_sphere(self):
        """Moments of 4000 directions in 11 dimensions, to six standard errors."""
        draw = jax.vmap(surface.random_direction, (0, None))
        found = rows(draw(jax.random.split(jax.random.key(1), 4000), tree(0)))
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
        scatter = found.T @ found / len(found)
        error = 6 * np.sqrt(2) / 11 / np.sqrt(4000)
        np.testing.assert_allclose(scatter, np.eye(11) / 11, atol=error)
        np.testing.assert_allclose(found.mean(0), 0, atol=6 / np.sqrt(11 * 4000))

    def test_filters_have_the_size_of_those_of_the_weights(self):
        rng = np.random.default_rng(0)
        shapes = {"conv": (3, 3, 2, 4), "dense": (5, 3), "bias": (4,)}
        d, w = ({k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(2))
        d["dense"][:, 1] = 0.0  # a dead one stays so
        as_jax = lambda t: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t)  # noqa: E731
        found = surface.filter_normalize(as_jax(d), as_jax(w))
        for name in ("conv", "dense"):
            for j in range(shapes[name][-1]):
                x, y = d[name][..., j], w[name][..., j]
                wanted = x * np.linalg.norm(y) / (np.linalg.norm(x) or 1.0)
                np.testing.assert_allclose(found[name][..., j], wanted, rtol=1e-5)
        assert not found["bias"].any()


def quadratic(params, data):
    away = jax.tree.map(jnp.subtract, params, data)
    return {"loss": sum(jnp.sum(x**2) for x in jax.tree.leaves(away)), "first": away["b"]}


class TestEvaluate:
    @pytest.mark.parametrize("chunk_size", [1, 4, 100])
    def test_is_the_loss_at_every_point(self, chunk_size):
        plane, data = surface.plane(*(tree(i) for i in range(3))), tree(5)
        x, y = np.meshgrid(np.linspace(-1, 2, 5), np.linspace(0, 3, 3))
        on_plane = Partial(surface.point, plane)
        found = surface.evaluate(quadratic, on_plane, (x, y), data, chunk_size=chunk_size)
        assert found["loss"].shape == (3, 5)
        basis, away = rows(plane.directions), oracle.flatten(plane.origin) - oracle.flatten(data)
        theta = away + x[..., None] * basis[0] + y[..., None] * basis[1]
        np.testing.assert_allclose(found["loss"], (theta**2).sum(-1), rtol=1e-5)
        np.testing.assert_allclose(found["first"], theta[..., 6], rtol=1e-4, atol=1e-5)

    def test_other_points_and_data_compile_nothing_anew(self):
        traces = []

        def loss(params, data):
            traces.append(1)
            return jnp.sum((params - data) ** 2)

        at = jnp.linspace(0, 1, 4)
        for seed in range(3):
            ends = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 3)))
            way = Partial(surface.chain, (ends[0], ends[1]))
            found = surface.evaluate(loss, way, at, ends[1])
            np.testing.assert_allclose(found[-1], 0, atol=1e-12)
        before = len(traces)
        surface.evaluate(loss, way, at, ends[0])
        assert len(traces) == before

    def test_statistics_are_those_of_each_point(self):
        model = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
        wide = lambda w, x: x * w["w"]  # noqa: E731

        def train_pass(params, stats, batch):
            trainer = nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)
            out = trainer.apply({"batch_stats": stats}, wide(params, batch), mutable="batch_stats")
            return out[1]["batch_stats"]

        x = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, size=(64, 1)))
        stats = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
        refresh = batch_stats.refresher(Partial(train_pass), stats, x, batch_size=64)

        def spread(params, data, stats):
            out = model.apply({"batch_stats": stats}, wide(params, data))
            return {"std": out.std(), "mean": stats["mean"][0]}

        way = Partial(surface.chain, ({"w": jnp.ones((1, 1))}, {"w": jnp.full((1, 1), 5.0)}))
        at = jnp.linspace(0.0, 1.0, 3)
        with jax.numpy_dtype_promotion("standard"):  # flax's BatchNorm
            found = surface.evaluate(spread, way, at, x, refresh=refresh, chunk_size=2)
        np.testing.assert_allclose(found["std"], 1.0, rtol=1e-3)  # whatever the size of w
        np.testing.assert_allclose(found["mean"], x.mean() * np.array([1.0, 3.0, 5.0]), rtol=1e-3)
        stale = lambda w, x: spread(w, x, stats)  # noqa: E731
        message = "runs BatchNorm on stored statistics"
        with jax.numpy_dtype_promotion("standard"), pytest.raises(ValueError, match=message):
            surface.evaluate(stale, way, at, x)
        jitted = jax.jit(stale)
        with jax.numpy_dtype_promotion("standard"):
            jitted({"w": jnp.ones((1, 1))}, x)  # its trace is in the cache
        with jax.numpy_dtype_promotion("standard"), pytest.raises(ValueError, match=message):
            surface.evaluate(jitted, way, at, x)

    def test_wrong_uses(self):
        way = Partial(surface.chain, (jnp.zeros(1), jnp.ones(1)))
        run = functools.partial(surface.evaluate, lambda w, _: w, way)
        with pytest.raises(ValueError, match=r"at holds arrays of shapes \[\(2,\), \(3,\)\]"):
            run((jnp.zeros(2), jnp.zeros(3)), None)
        with pytest.raises(ValueError, match=r"at holds arrays of shapes \[\(0,\)\]"):
            run(jnp.zeros(0), None)
        with pytest.raises(ValueError, match="chunk_size=0: give an integer of at least 1"):
            run(jnp.zeros(1), None, chunk_size=0)
        with pytest.raises(ValueError, match="path is a tuple: give a function"):
            surface.evaluate(lambda w, _: w, (1, 2), jnp.zeros(1), None)
        with pytest.raises(ValueError, match="refresh is a dict: give a function"):
            run(jnp.zeros(1), None, refresh={})
        with pytest.raises(ValueError, match=r"coordinates are 3 numbers .* the plane has 2"):
            surface.point(surface.plane(*jnp.eye(3)), (1.0, 2.0, 3.0))


def casteljau(points, t):
    points = [oracle.flatten(p) for p in points]
    while len(points) > 1:
        points = [(1 - t) * a + t * b for a, b in itertools.pairwise(points)]
    return points[0]


class TestCurves:
    @pytest.mark.parametrize("num", [2, 3, 5])
    def test_are_those_of_de_casteljau_and_of_interpolation(self, num):
        points = tuple(tree(i) for i in range(num))
        matrix = np.stack([oracle.flatten(p) for p in points])
        for t in (0.0, 0.3, 0.5, 0.85, 1.0):
            smooth, straight = (oracle.flatten(c(points, t)) for c in CURVES)
            np.testing.assert_allclose(smooth, casteljau(points, t), atol=2e-6)
            knots = np.linspace(0, 1, num)
            wanted = [np.interp(t, knots, column) for column in matrix.T]
            np.testing.assert_allclose(straight, wanted, atol=2e-6)

    @pytest.mark.parametrize(
        "dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16]
    )
    def test_end_exactly_where_they_should(self, dtype):
        points = [jax.tree.map(lambda x: x.astype(dtype), tree(i)) for i in range(4)]
        for curve in CURVES:
            for t, end in ((0, points[0]), (1.0, points[-1])):
                found = jax.jit(curve)(points, t)
                jax.tree.map(np.testing.assert_array_equal, found, end)
                assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}

    def test_the_line_is_straight(self):
        start, end = tree(0), tree(1)
        points = surface.line(start, end, 5)
        assert points[0] is start
        assert points[-1] is end
        wanted = np.linspace(oracle.flatten(start), oracle.flatten(end), 5)
        np.testing.assert_allclose([oracle.flatten(p) for p in points], wanted, atol=1e-6)

    def test_wrong_uses(self):
        with pytest.raises(ValueError, match="of at least 2 trees"):
            surface.bezier([jnp.ones(2)], 0.5)
        with pytest.raises(ValueError, match=r"points\[1\] has shape \[\(3,\)\]"):
            surface.chain([jnp.ones(2), jnp.ones(3)], 0.5)
        with pytest.raises(ValueError, match="num=1: give an integer of at least 2"):
            surface.line(jnp.ones(2), jnp.ones(2), 1)
        with pytest.raises(ValueError, match="points are 2, of which the ends are fixed"):
            surface.connect(jax.random.key(0), ridge, jnp.eye(2), jnp.arange(2), optax.sgd(1.0))
        batches = (np.ones(2), np.ones(3))
        with pytest.raises(ValueError, match=r"batches have first axes \[\(2,\), \(3,\)\]"):
            surface.connect(jax.random.key(0), ridge, [*jnp.eye(3)], batches, optax.sgd(1.0))


CURVES = (surface.bezier, surface.chain)


def ridge(params, _):
    """Least on the unit circle; between two opposite points of it the straight line is a pass."""
    return (jnp.sum(params["w"] ** 2) - 1) ** 2


def to_target(data, params, index):
    return 0.5 * jnp.sum((params - data[index]) ** 2)


class TestConnect:
    @pytest.mark.parametrize(
        "curve", [surface.bezier, pytest.param(surface.chain, marks=pytest.mark.slow)]
    )
    def test_goes_round_a_ridge_with_its_ends_fixed(self, curve):
        start, end = ({"w": jnp.array([sign * 1.0, 0.0])} for sign in (-1, 1))
        straight = surface.line(start, end, 4)
        bent = [jax.tree.map(lambda x: x + 0.05, p) for p in straight[1:3]]
        first = (start, *bent, end)
        key, steps = jax.random.key(0), jnp.arange(400)
        with jax.numpy_dtype_promotion("standard"):  # Adam's step counter
            points, losses = surface.connect(
                key, ridge, first, steps, optax.adam(0.03), curve=curve
            )
        assert points[0] is start
        assert points[-1] is end
        assert losses.shape == (400,)
        at = jnp.linspace(0, 1, 21)
        before, after = (
            surface.evaluate(ridge, Partial(curve, p), at, None) for p in (straight, points)
        )
        np.testing.assert_allclose(before.max(), 1.0)  # the middle of the ridge
        assert after.max() < 0.35
        assert after.mean() < before.mean() / 5
        np.testing.assert_array_equal(after[jnp.array([0, -1])], 0.0)

    @pytest.mark.slow
    def test_finds_the_curve_that_is_known(self):
        """Of a quadratic loss around c: the control point is 5/2 c - 3/4 (start + end).

        The gradient's noise leaves a standard deviation of about 0.014 after so many steps, so
        that six of them are 0.09.
        """
        start, end, data = jnp.array([1.0, 0.0]), jnp.array([3.0, 1.0]), jnp.array([[1.0, 2.0]])
        tx = optax.sgd(lambda k: 1 / (2 / 15 * (k.astype(float) + 20)))
        points, _ = jax.jit(surface.connect, static_argnums=4)(
            jax.random.key(0),
            Partial(to_target, data),
            surface.line(start, end),
            jnp.zeros(20_000, int),
            tx,
        )
        np.testing.assert_allclose(points[1], 2.5 * data[0] - 0.75 * (start + end), atol=0.09)
        np.testing.assert_array_equal(points[0], start)
        np.testing.assert_array_equal(points[2], end)

    def test_places_are_of_the_key(self):
        first = surface.line(*({"w": jnp.array([x, 0.1])} for x in (-1.0, 1.0)))
        tx, steps = optax.sgd(0.1), jnp.arange(5)
        runs = [surface.connect(jax.random.key(i), ridge, first, steps, tx)[1] for i in (0, 0, 1)]
        np.testing.assert_array_equal(runs[0], runs[1])
        assert not np.array_equal(runs[0], runs[2])


def dots(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from dots(getattr(inner, "jaxpr", inner))


def test_products_are_of_full_precision_on_accelerators():
    state, _ = collected()
    plane = surface.plane(*(tree(i) for i in range(3)))
    for function, args in ((surface.project, (plane, state)), (surface.pca_plane, (state,))):
        found = list(dots(jax.make_jaxpr(function)(*args).jaxpr))
        assert found
        highest = (jax.lax.Precision.HIGHEST,) * 2
        assert {equation.params["precision"] for equation in found} == {highest}


def test_integers_of_jax_are_integers():
    """A checked argument is used as checked: as they were given they cannot be hashed."""
    plane = surface.plane(jnp.zeros(2), jnp.array([2.0, 0]), jnp.array([0, 1.0]))
    at = surface.grid(plane, num=jnp.asarray(3))
    assert at[0].shape == (3, 3)
    path = jax.tree_util.Partial(surface.point, plane)
    found = surface.evaluate(lambda w, _: w.sum(), path, at, None, chunk_size=jnp.asarray(2))
    np.testing.assert_allclose(found, at[0] + at[1], rtol=1e-6)
    assert surface.pca_plane(jnp.eye(3), jnp.asarray(2)).points.shape == (3, 2)
