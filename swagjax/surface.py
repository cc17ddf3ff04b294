"""Loss surfaces: planes, rays and curves through weight space, and what a model does along them.

A *path* is a function from coordinates to weights, and ``evaluate`` runs a model on many of its
points within one compiled program, with BatchNorm statistics of each point's own:

``Partial(point, plane)``           (x, y) -> weights, on the plane through three weight vectors
``Partial(ray, origin, direction)`` t -> weights, along a direction: how wide an optimum is
``Partial(bezier, points)``         t -> weights, on a smooth curve from one solution to another
``Partial(chain, points)``          t -> weights, on straight segments from point to point

with ``Partial`` of ``jax.tree_util``: its arrays travel as arguments of the program, so that
other points of the same shapes compile nothing anew. ``connect`` trains a curve between two
solutions, ``project`` is the shadow of a SWAG posterior on a plane. Everything is of arrays;
``swagjax.plot`` draws them.

Source: Garipov et al. 2018, "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs"
(arXiv:1802.10026); Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better
Generalization" (arXiv:1803.05407).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from swagjax import prng, programs
from swagjax.batch_stats import Refresh, refuse_stored, refuse_training
from swagjax.gaussian import (
    Centering,
    collected,
    combine,
    contract,
    divide,
    gaussian,
    known,
    noise_dtype,
    recentring,
    row_products,
)
from swagjax.pairing import restrict
from swagjax.posterior import check_collected, variance
from swagjax.transform import SWAGState, check_integer, wide_dtype, widen

_ROUNDINGS = 8.0  # units in the last place of the weights, below which a length is rounding alone


class Plane(NamedTuple):
    """A plane through weight space: ``origin + x u + y v`` with orthonormal u and v.

    Or a flat of another dimension R, a line or a volume, where so many directions were asked for.

    Attributes:
      origin: a tree of weights.
      directions: a tree with leaves of shape ``(R, *leaf.shape)``: u and v, of norm 1 over the
        whole tree and orthogonal to each other.
      points: shape ``(N, R)``, the coordinates of the weights that the plane was made of.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import surface
      >>> plane = surface.Plane(jnp.zeros(3), jnp.eye(3)[:2], jnp.zeros((1, 2)))
      >>> print(surface.point(plane, (1.0, 2.0)))
      [1. 2. 0.]
    """

    origin: Any
    directions: Any
    points: jax.Array


class Projection(NamedTuple):
    """A Gaussian on a plane, see ``project``.

    Attributes:
      mean: shape ``(R,)``, the coordinates of theta_SWA.
      covariance: shape ``(R, R)``, of the coordinates.
      distance: scalar, how far theta_SWA lies off the plane.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax import surface
      >>> tx, zero = swagjax.swa(), jnp.zeros(3)
      >>> _, state = tx.update(jnp.array([1.0, 2.0, 4.0]), tx.init(zero), zero)
      >>> plane = surface.Plane(zero, jnp.eye(3)[:2], jnp.zeros((1, 2)))
      >>> found = surface.project(plane, state)
      >>> print(found.mean, found.distance)
      [1. 2.] 4.0
    """

    mean: jax.Array
    covariance: jax.Array
    distance: jax.Array


def plane(first: Any, second: Any, third: Any) -> Plane:
    """Make the plane through three weight vectors, such as SGD, SWA and the initialisation.

    The first is the origin, and the second lies on the first axis (Gram and Schmidt):

        u = (w2 - w1) / |w2 - w1|
        v = (w3 - w1 - <w3 - w1, u> u) / |w3 - w1 - <w3 - w1, u> u|

    Args:
      first: a tree of weights; points of the plane have its dtypes.
      second: another, of the same structure and shapes.
      third: a third, not on the line through the two.

    Returns:
      The plane, with the coordinates of the three, shape (3, 2).

    Raises:
      ValueError: for trees that differ in structure or shape or are not of floats, and, outside
        ``jit``, for weights that are equal or lie on one line; inside, the directions are NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import surface
      >>> three = ({"w": jnp.array(w)} for w in ([0.0, 0, 1], [2.0, 0, 1], [1.0, 3, 1]))
      >>> plane = surface.plane(*three)
      >>> print(plane.points)
      [[0. 0.]
       [2. 0.]
       [1. 3.]]

    Source: Garipov et al. 2018, the visualisation of figure 1; Izmailov et al. 2018, figure 3.
    """
    _check_weights("first", first)
    found: Plane
    found, independent = _plane(first, second, third)
    _check_independent(
        independent,
        "first, second and third lie on one line (or two of them are equal): a plane takes three "
        "weight vectors that do not, such as initialisation, SGD and SWA",
    )
    return found


def pca_plane(trajectory: Any, num: int = 2) -> Plane:
    """Make the plane of the first principal directions of iterates, where a run moved most.

    With the T deviations d_i = theta_i - origin and G_ij = <d_i, d_j> (T x T, nothing is of size
    P x P), the eigenvectors e_r of its largest eigenvalues l_r give:

        u_r = sum_i e_r,i d_i / l_r^(1/2),   points_i,r = <d_i, u_r> = l_r^(1/2) e_r,i

    Signs are such that the coordinate of largest size on each axis is positive.

    Args:
      trajectory: iterates, a tree with leaves of shape ``(T, *leaf.shape)`` as ``lax.scan`` stacks
        them, whose mean is the origin; or what ``swag`` collected, and the origin is theta_SWA,
        the d_i the last K deviations from it.
      num: R, how many directions.

    Returns:
      The plane, with the coordinates of the iterates in the order of the run, shape (T, R); NaN
      for rows of a ring that were not yet written. ``points.var(0)`` are the variances.

    Raises:
      ValueError: for a state without deviations or that has collected nothing, and, outside
        ``jit``, for iterates that span fewer than R directions; inside, those are NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import surface
      >>> path = jnp.array([[1.0, 4.0, 0.0], [1.0, -4.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
      >>> found = surface.pca_plane(path)
      >>> print(found.origin, abs(found.points).round(4).tolist())
      [1. 0. 0.] [[4.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.0, 1.0]]

    Source: Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets" (arXiv:1712.09913),
    section 7.2.
    """
    num = check_integer("num", num, 1)
    rows = _check_trajectory(trajectory)
    if num > rows:
        raise ValueError(f"num={num}: {rows} iterates span no more than {rows} directions")
    found: Plane
    found, independent = _pca_plane(trajectory, num)
    _check_independent(
        independent,
        f"the iterates span fewer than num={num} directions: give more of them, collected while "
        "they still move",
    )
    return found


def point(plane: Plane, coordinates: Sequence[chex.Numeric] | jax.Array) -> Any:
    """Weights at a point of a plane, ``origin + sum_r coordinates_r u_r``.

    Args:
      plane: what ``plane`` or ``pca_plane`` made.
      coordinates: R numbers, in units of the distance between weights.

    Returns:
      A tree like ``plane.origin``, in its dtypes.

    Raises:
      ValueError: for another number of coordinates.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import surface
      >>> plane = surface.plane(jnp.zeros(3), jnp.array([2.0, 0, 0]), jnp.array([0, 0, 1.0]))
      >>> print(surface.point(plane, (5.0, 7.0)))
      [5. 0. 7.]
    """
    _check_plane(plane)
    num = plane.points.shape[-1]
    if isinstance(coordinates, Sequence):
        shapes = {jnp.shape(c) for c in coordinates}
    else:
        shapes = {coordinates.shape[1:]}
    if len(coordinates) != num or shapes != {()}:
        raise ValueError(
            f"coordinates are {len(coordinates)} numbers of shapes {sorted(shapes)}: the plane has "
            f"{num} axes, give a number for each; many points go to evaluate, or through jax.vmap"
        )
    found: Any = _point(plane, coordinates)
    return found


def coordinates(plane: Plane, params: Any) -> tuple[jax.Array, jax.Array]:
    """Coordinates of the point of a plane that is nearest to ``params``, and the distance to it.

    ``c_r = <params - origin, u_r>`` and ``|params - origin - sum_r c_r u_r|``.

    Args:
      plane: what ``plane`` or ``pca_plane`` made.
      params: weights of the same structure and shapes.

    Returns:
      Coordinates, shape (R,), and a scalar.

    Raises:
      ValueError: for weights that differ in structure or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import surface
      >>> plane = surface.plane(jnp.zeros(3), jnp.array([2.0, 0, 0]), jnp.array([0, 0, 1.0]))
      >>> print(*surface.coordinates(plane, jnp.array([1.0, 4.0, 3.0])))
      [1. 3.] 4.0
    """
    _check_plane(plane)
    found: tuple[jax.Array, jax.Array] = _coordinates(plane, params)
    return found


def grid(plane: Plane, num: int = 25, margin: float = 0.3) -> list[jax.Array]:
    """A square grid of coordinates around the points of a plane, for ``evaluate`` and ``plot``.

    It is centred at the middle of the points, and as wide as their widest extent with ``margin``
    times that on either side, so that both axes have one scale.

    Args:
      plane: a plane of two directions.
      num: grid points along each axis.
      margin: share of the extent that is added on either side.

    Returns:
      Coordinates x and y, each of shape (num, num), x along the columns.

    Raises:
      ValueError: for a plane of another dimension, fewer than two grid points, a margin below 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import surface
      >>> plane = surface.plane(jnp.zeros(2), jnp.array([2.0, 0]), jnp.array([0, 1.0]))
      >>> x, y = surface.grid(plane, num=3, margin=0.5)
      >>> print(x[0], y[:, 0])
      [-1.  1.  3.] [-1.5  0.5  2.5]
    """
    num = check_integer("num", num, 2)
    _check_plane(plane)
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin={margin!r}: give a share of at least 0, such as 0.3")
    if plane.points.shape[-1] != 2:
        raise ValueError(f"plane has {plane.points.shape[-1]} directions: a grid takes one of 2")
    found: list[jax.Array] = _grid(plane.points, margin, num)
    return found


def ray(origin: Any, direction: Any, t: chex.Numeric) -> Any:
    """Weights at distance t along a direction, ``origin + t direction``.

    Args:
      origin: a tree of weights, SWA's or SGD's.
      direction: a tree of the same structure, such as ``random_direction`` makes; a principal one
        is ``jax.tree.map(lambda x: x[i], plane.directions)``.
      t: scalar; a distance where the direction has norm 1.

    Returns:
      A tree like ``origin``, in its dtypes.

    Raises:
      ValueError: for trees that differ in structure or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import surface
      >>> print(surface.ray(jnp.ones(2), jnp.array([0.6, 0.8]), 5.0))
      [4. 5.]

    Source: Izmailov et al. 2018, section 4.3, the width of an optimum along random rays.
    """
    _check_weights("origin", origin)
    _check_number("t", t)
    found: Any = _ray(origin, direction, t)
    return found


def random_direction(key: chex.PRNGKey, like: Any) -> Any:
    """Draw a direction of norm 1, uniform on the sphere: a normal vector over its length.

    Args:
      key: one PRNG key, typed or raw.
      like: a tree of weights, for structure and shapes.

    Returns:
      A tree like it, in float32 at the least.

    Raises:
      ValueError: for a bad key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from swagjax import surface
      >>> params = {"w": jnp.zeros((3, 2)), "b": jnp.ones(2)}
      >>> d = surface.random_direction(jax.random.key(0), params)
      >>> print(sum((x**2).sum() for x in jax.tree.leaves(d)).round(4))
      1.0

    Source: Izmailov et al. 2018, section 4.3.
    """
    found: Any = _random_direction(prng.one_key(key), like)
    return found


def filter_normalize(direction: Any, params: Any) -> Any:
    """Scale a direction filter by filter to the weights: of one size for networks of any scale.

    A network with BatchNorm or relu is the same function when a filter is scaled and the next
    layer scaled back, so that a direction of norm 1 is a large step for one and a small step for
    the other. With j the output channels, here the last axis (that of flax):

        d_j <- d_j / |d_j| * |w_j|

    Leaves of fewer than two axes, biases and the parameters of BatchNorm, are set to zero. The
    result has norm 1 no more: distances along it are in units of the weights.

    Args:
      direction: a tree, such as ``random_direction`` makes.
      params: weights of the same structure.

    Returns:
      A tree like ``direction``.

    Raises:
      ValueError: for trees that differ in structure or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import surface
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(2)}
      >>> direction = {"kernel": jnp.array([[1.0, 1.0], [0.0, 1.0]]), "bias": jnp.ones(2)}
      >>> print(surface.filter_normalize(direction, params)["kernel"].round(4))
      [[5.     0.7071]
       [0.     0.7071]]

    Source: Li et al. 2018 (arXiv:1712.09913), section 4.
    """
    found: Any = _filter_normalize(direction, params)
    return found


def evaluate(
    fn: Callable[..., Any],
    path: Callable[[Any], Any],
    at: Any,
    data: Any,
    *,
    refresh: Refresh | None = None,
    chunk_size: int = 1,
) -> Any:
    """Evaluate ``fn(path(c), data)`` at many points c of a path, within one compiled program.

    Weights are made, used and dropped point by point: memory holds ``chunk_size`` of them.

    Args:
      fn: ``(params, data) -> values``, or with ``refresh`` ``(params, data, statistics) ->
        values``, a tree of arrays: the loss, the error. Define it once: functions are told apart
        by identity, and the same one is compiled once.
      path: a function from a coordinate, or a tuple of coordinates, to weights: best a
        ``jax.tree_util.Partial`` of ``point``, ``ray``, ``bezier`` or ``chain``.
      at: coordinates: an array of any shape, or a list or tuple of arrays of one shape (``grid``,
        ``jnp.meshgrid``), and then ``path`` gets a number of each.
      data: an array or a tree of arrays, handed to ``fn`` as it is.
      refresh: ``params -> statistics`` for a model with batch statistics, called at each point:
        see ``swagjax.batch_stats``.
      chunk_size: how many points run side by side under ``vmap``. One at a time keeps
        convolutions fast on CPU; dense networks and accelerators gain by more.

    Returns:
      What ``fn`` returns, its leaves behind the axes of ``at``.

    Raises:
      ValueError: for a bad argument, or a model of flax or Equinox that runs BatchNorm on
        statistics of other weights (without ``refresh`` that takes
        ``refresh=batch_stats.keep(statistics)``) or was left in training mode.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from swagjax import surface
      >>> loss = lambda params, data: {"loss": jnp.sum((params - data) ** 2)}
      >>> plane = surface.plane(jnp.zeros(3), jnp.array([2.0, 0, 0]), jnp.array([0, 1.0, 0]))
      >>> on_plane = jax.tree_util.Partial(surface.point, plane)
      >>> at = jnp.meshgrid(jnp.arange(3.0), jnp.arange(2.0))
      >>> print(surface.evaluate(loss, on_plane, at, jnp.array([1.0, 0, 2.0]))["loss"])
      [[5. 4. 5.]
       [6. 5. 6.]]
    """
    chunk_size = check_integer("chunk_size", chunk_size, 1)
    for name, function in (("fn", fn), ("path", path), ("refresh", refresh)):
        if not (name == "refresh" and function is None):
            _check_function(name, function)
    shapes = {jnp.shape(x) for x in jax.tree.leaves(at)}
    if len(shapes) != 1 or 0 in next(iter(shapes)):
        raise ValueError(f"at holds arrays of shapes {sorted(shapes)}: give one shape, not empty")
    return _compiled(_Evaluation(chunk_size), (programs.unjit(fn), path, refresh), at, data)


def project(
    plane: Plane,
    state: SWAGState,
    *,
    scale: chex.Numeric = 1.0,
    centering: Centering = "running",
) -> Projection:
    """The posterior's shadow on a plane: mean and covariance of the coordinates of its samples.

    With U the directions, the rows of an (R, P) matrix, exactly and without sampling:

        mean       = U (theta_SWA - origin)
        covariance = U Sigma U^T,   Sigma = scale * 1/2 (Sigma_diag + D D^T / (K - 1))    (SWAG)

    and ``scale * Sigma_diag`` for SWAG-Diag, zero for SWA. The ellipse of k standard deviations
    holds 1 - exp(-k^2 / 2) of the samples once they are projected; the samples themselves lie far
    off the plane, and a loss read inside the ellipse is not theirs.

    Args:
      plane: what ``plane`` or ``pca_plane`` made.
      state: what a transformation collected. Leaves that it does not hold are certain.
      scale: factor of the covariance.
      centering: ``"running"`` or ``"final"``.

    Returns:
      Mean (R,), covariance (R, R), and the distance of theta_SWA from the plane.

    Raises:
      ValueError: for a bad option, a state that has collected nothing, or one of other parameters.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax import surface
      >>> tx, params = swagjax.swag(rank=2), jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for x in ([1.0, 0, 0], [3.0, 0, 4.0]):  # mean (2, 0, 2), Sigma_diag (1, 0, 4)
      ...     _, state = tx.update(jnp.array(x), state, params)
      >>> plane = surface.plane(params, jnp.array([1.0, 0, 0]), jnp.array([0, 1.0, 0]))
      >>> shadow = surface.project(plane, state)
      >>> print(shadow.mean, shadow.covariance.tolist(), shadow.distance)
      [2. 0.] [[1.0, 0.0], [0.0, 0.0]] 2.0

    Source: Maddox et al. 2019 (arXiv:1902.02476), equation 1 and section 4 (posterior shapes).
    """
    _check_plane(plane)
    check_collected(state)
    # Of no leaves, for the errors of options.
    none = SWAGState(state.num_updates, state.num_collected, state.num_skipped, (), None, None)
    variance(none, scale=scale, centering=centering)
    found: Projection = _project(plane, state, scale, centering=centering)
    return found


def line(start: Any, end: Any, num: int = 3) -> tuple[Any, ...]:
    """Points on the straight line from one solution to another, ends included: where curves begin.

    Args:
      start: a tree of weights.
      end: another, of the same structure and shapes.
      num: how many points, at equal distances; a curve has ``num - 2`` that can be trained.

    Returns:
      ``num`` trees; the first is ``start``, the last ``end``.

    Raises:
      ValueError: for trees that differ in structure or shape, fewer than two points.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import surface
      >>> print(surface.line(jnp.array([0.0, 2.0]), jnp.array([4.0, 2.0]))[1])
      [2. 2.]
    """
    num = check_integer("num", num, 2)
    ends = (start, end)
    return (start, *(chain(ends, i / (num - 1)) for i in range(1, num - 1)), end)


def bezier(points: Sequence[Any], t: chex.Numeric) -> Any:
    """Weights on a Bezier curve, bent towards the points between its ends.

    With n + 1 points w_0 ... w_n (three make the quadratic curve of the paper):

        w(t) = sum_k C(n, k) (1 - t)^(n - k) t^k w_k,   0 <= t <= 1

    Args:
      points: at least two trees of one structure: start, control points, end.
      t: scalar in [0, 1].

    Returns:
      A tree like ``points[0]``, in its dtypes: exactly the first at t = 0 and the last at 1.

    Raises:
      ValueError: for fewer than two points, trees that differ in structure or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import surface
      >>> points = [jnp.array([0.0, 0.0]), jnp.array([1.0, 2.0]), jnp.array([2.0, 0.0])]
      >>> print(surface.bezier(points, 0.5))
      [1. 1.]

    Source: Garipov et al. 2018, section 3.2.
    """
    _check_points(points)
    _check_number("t", t)
    found: Any = _bezier(tuple(points), t)
    return found


def chain(points: Sequence[Any], t: chex.Numeric) -> Any:
    """Weights on a polygonal chain: straight segments from point to point, each 1 / n of t.

    With n + 1 points w_0 ... w_n:

        w(t) = (k + 1 - n t) w_k + (n t - k) w_(k+1),   k <= n t <= k + 1

    Args:
      points: at least two trees of one structure: start, bends, end. Of two, the straight line.
      t: scalar in [0, 1].

    Returns:
      A tree like ``points[0]``, in its dtypes: exactly the first at t = 0 and the last at 1.

    Raises:
      ValueError: for fewer than two points, trees that differ in structure or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import surface
      >>> points = [jnp.array([0.0, 0.0]), jnp.array([1.0, 2.0]), jnp.array([2.0, 0.0])]
      >>> print(surface.chain(points, 0.25), surface.chain(points, 0.5))
      [0.5 1. ] [1. 2.]

    Source: Garipov et al. 2018, section 3.2.
    """
    _check_points(points)
    _check_number("t", t)
    found: Any = _chain(tuple(points), t)
    return found


def connect(
    key: chex.PRNGKey,
    loss_fn: Callable[[Any, Any], jax.Array],
    points: Sequence[Any],
    batches: Any,
    tx: optax.GradientTransformation,
    *,
    curve: Callable[[Sequence[Any], Any], Any] = bezier,
) -> tuple[tuple[Any, ...], jax.Array]:
    """Train a curve of low loss between two solutions, whose ends stay fixed.

    By one step of ``tx`` for each batch on the points between the ends, at a random place of the
    curve each, which is stochastic gradient descent on the mean loss over it:

        min over w_1 ... w_(n-1) of E_t loss(curve(t)),   t ~ U(0, 1)

    For BatchNorm ``loss_fn`` runs the model in training mode, on moments of the batch; statistics
    of points of the curve are recomputed by the ``refresh`` of ``evaluate``.

    Args:
      key: one PRNG key, typed or raw, for the places.
      loss_fn: ``(params, batch) -> scalar``. Data go in as arguments of the program where it is a
        ``jax.tree_util.Partial`` that holds them, and ``batch`` is a row of indices.
      points: start, points to be trained, end: ``line(start, end, 3)`` begins at the straight
        line with one that moves.
      batches: a tree of arrays whose first axis is that of the steps.
      tx: any optax transformation.
      curve: ``bezier``, ``chain``, or another function of points and t.

    Returns:
      The points, first and last as they were given; the losses, shape (steps,), at the places
      drawn.

    Raises:
      ValueError: for a bad key or function, fewer than three points, trees that differ in
        structure or shape, batches that differ in length, a loss that is no scalar.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from swagjax import surface
      >>> loss = lambda w, _: (jnp.sum(w**2) - 1) ** 2  # least on a circle
      >>> ends = jnp.array([-1.0, 0.0]), jnp.array([1.0, 0.0])
      >>> first = surface.line(*ends)
      >>> first = (ends[0], first[1] + 0.1, ends[1])  # off the ridge in the middle
      >>> points, _ = surface.connect(
      ...     jax.random.key(0), loss, first, jnp.arange(500), optax.sgd(0.1)
      ... )
      >>> at = jnp.linspace(0, 1, 11)
      >>> for way in (first, points):
      ...     curve = jax.tree_util.Partial(surface.bezier, way)
      ...     print(surface.evaluate(loss, curve, at, None).max().round(1))
      1.0
      0.0

    Source: Garipov et al. 2018, section 3.1, equation 2.
    """
    for name, function in (("loss_fn", loss_fn), ("curve", curve)):
        _check_function(name, function)
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(f"tx={tx!r}: give an optax transformation, such as optax.sgd(0.1)")
    if len(points) < 3:
        raise ValueError(
            f"points are {len(points)}, of which the ends are fixed: give at least 3, such as "
            "line(start, end, num=3)"
        )
    for i, tree in enumerate(points):
        restrict(points[0], tree, f"points[{i}]")
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(batches)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(
            f"batches have first axes {sorted(lengths)}: give one of all steps, jnp.arange(steps) "
            "for a loss that needs none"
        )
    functions = (loss_fn, tx, curve)
    trained, losses = _compiled(_train, functions, prng.one_key(key), tuple(points), batches)
    return (points[0], *trained, points[-1]), losses


class _Evaluation(NamedTuple):
    """The program of ``evaluate``."""

    chunk_size: int

    def __call__(self, functions: Any, at: Any, data: Any) -> Any:
        fn, path, refresh = functions
        leaves = jax.tree.leaves(at)
        shape, size = jnp.shape(leaves[0]), jnp.size(leaves[0])

        def one(c: Any) -> Any:
            params = path(c)
            if refresh is not None:
                stats = refresh(params)
                with refuse_training():
                    return _values(fn(params, data, stats))
            with refuse_stored():
                return _values(fn(params, data))

        # Never a chunk of one: vmap would make convolutions grouped ones.
        chunk = None if self.chunk_size == 1 or size == 1 else min(self.chunk_size, size)
        flat = jax.tree.map(lambda x: jnp.reshape(x, -1), at)
        values = jax.lax.map(one, flat, batch_size=chunk)
        return jax.tree.map(lambda v: v.reshape(*shape, *v.shape[1:]), values)


def _train(functions: Any, key: jax.Array, points: tuple[Any, ...], batches: Any) -> Any:
    """The program of ``connect``: the trained points between the ends, and the losses."""
    loss_fn, tx, curve = functions
    start, *between, end = points
    keys = jax.random.split(key, len(jax.tree.leaves(batches)[0]))
    dtype = wide_dtype(*[x.dtype for x in jax.tree.leaves(start)])

    def step(carry: Any, x: Any) -> Any:
        (trained, opt_state), (key, batch) = carry, x
        t = jax.random.uniform(key, dtype=dtype)

        def loss(trained: Any) -> Any:
            return _scalar(loss_fn(curve((start, *trained, end), t), batch))

        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), value

    first = tuple(between)
    (trained, _), losses = jax.lax.scan(step, (first, tx.init(first)), (keys, batches))
    return trained, losses


def _compiled(run: Any, functions: Any, *args: Any) -> Any:
    """``run(functions, *args)`` in a program; arrays that the functions hold are arguments too."""
    arrays, static = programs.separate(functions, "a function")
    return _program(arrays, args, static, run)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _program(arrays: list[Any], args: tuple[Any, ...], static: programs.Static, run: Any) -> Any:
    return run(programs.together(arrays, static), *args)


@jax.jit
def _plane(first: Any, second: Any, third: Any) -> tuple[Plane, jax.Array]:
    names = ("first", "second", "third")
    w = [_leaves(first, x, name) for x, name in zip((first, second, third), names, strict=True)]
    vectors = [_subtract(x, w[0]) for x in w[1:]]
    basis, lengths = _orthonormal(vectors)
    least = _ROUNDINGS * _eps(lengths) * (_norm(w[0]) + jnp.stack([_norm(v) for v in vectors]))
    independent = lengths > least
    points = jnp.stack([_products(basis, v) for v in vectors])
    points = jnp.concatenate([jnp.zeros_like(points[:1]), points])
    points = points.at[1, 1].set(0)  # on the first axis but for rounding
    return Plane(first, _stack(first, basis, independent), points), independent


@functools.partial(jax.jit, static_argnums=1)
def _pca_plane(trajectory: Any, num: int) -> tuple[Plane, jax.Array]:
    origin, rows, mixing, held = _deviations(trajectory)
    vectors = jnp.linalg.eigh(row_products(rows, mixing))[1][:, ::-1][:, :num]
    extremes = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), 0)[None], 0)
    vectors = vectors * jnp.where(extremes < 0, -1, 1).astype(vectors.dtype)
    mixed = combine(contract(vectors.T, mixing), rows)
    sums = [x.astype(widen(ring).dtype) for x, ring in zip(mixed, rows, strict=True)]
    basis, lengths = _orthonormal([[x[r] for x in sums] for r in range(num)])
    size = _norm(jax.tree.leaves(origin)) + lengths[0]
    independent = lengths > _ROUNDINGS * _eps(lengths) * size
    shadows = jnp.stack([_ring_products(rows, u) for u in basis]).astype(mixing.dtype)
    points = contract(mixing, shadows.T)
    points = jnp.where(held[:, None] & independent[None], points, jnp.nan)
    return Plane(origin, _stack(origin, basis, independent), points), independent


def _deviations(trajectory: Any) -> tuple[Any, list[jax.Array], jax.Array, jax.Array]:
    """The origin, rows whose mixture are the deviations from it, the mixture, which are held."""
    if isinstance(trajectory, SWAGState):
        rows = jax.tree.leaves(trajectory.deviations)
        count, rank = trajectory.num_collected, len(rows[0])
        number = collected(count, rank)
        order = jnp.argsort(jnp.where(number > 0, number, jnp.iinfo(number.dtype).max))
        mixing = recentring(count, rank, noise_dtype(trajectory))[order]
        origin = jax.tree.map(lambda m: known(trajectory, widen(m)), trajectory.mean)
        return origin, rows, mixing, number[order] > 0
    first = jax.tree.map(lambda x: widen(x[0]), trajectory)
    rows = [widen(x) - widen(x[:1]) for x in jax.tree.leaves(trajectory)]  # near, so exact
    num, dtype = len(rows[0]), wide_dtype(*[x.dtype for x in rows])
    mixing = jnp.eye(num, dtype=dtype) - jnp.asarray(1 / num, dtype)
    means = jax.tree.unflatten(jax.tree.structure(first), [x.mean(0) for x in rows])
    return jax.tree.map(jnp.add, first, means), rows, mixing, jnp.ones(num, bool)


@jax.jit
def _point(plane: Plane, coordinates: Any) -> Any:
    wide = jax.tree.map(widen, plane.origin)
    for axis in range(len(coordinates)):
        move = functools.partial(_move, coordinates[axis])
        wide = jax.tree.map(move, wide, _direction(plane, axis))
    return jax.tree.map(lambda w, x: w.astype(x.dtype), wide, plane.origin)


@functools.partial(jax.jit, static_argnums=2)
def _grid(points: jax.Array, margin: chex.Numeric, num: int) -> list[jax.Array]:
    low, high = jnp.nanmin(points, axis=0), jnp.nanmax(points, axis=0)
    reach = (0.5 + jnp.asarray(margin, low.dtype)) * (high - low).max()
    middle = (low + high) / 2
    return jnp.meshgrid(*(jnp.linspace(m - reach, m + reach, num) for m in middle))


@jax.jit
def _ray(origin: Any, direction: Any, t: chex.Numeric) -> Any:
    d = restrict(origin, direction, "direction")
    return jax.tree.map(lambda w, x: _move(t, widen(w), x).astype(w.dtype), origin, d)


@jax.jit
def _filter_normalize(direction: Any, params: Any) -> Any:
    return jax.tree.map(_scale_filters, direction, restrict(direction, params, "params"))


@jax.jit
def _coordinates(plane: Plane, params: Any) -> tuple[jax.Array, jax.Array]:
    away = _subtract(*(_leaves(plane.origin, w, "params") for w in (params, plane.origin)))
    basis = _basis(plane, plane.origin)
    found = _products(basis, away)
    return found, _norm(_without(away, basis, found))


@functools.partial(jax.jit, static_argnames="centering")
def _project(
    plane: Plane, state: SWAGState, scale: chex.Numeric, *, centering: Centering
) -> Projection:
    posterior = gaussian(state, scale, centering, 0.0)
    origin = jax.tree.leaves(restrict(state.mean, plane.origin, "plane.origin"))
    basis = _basis(plane, state.mean)
    away = [known(state, a) for a in _subtract(posterior.mean, origin)]
    mean = _products(basis, away)

    def spread(u: list[jax.Array], v: list[jax.Array]) -> jax.Array:
        return _sum([a * b * s for a, b, s in zip(u, v, posterior.variance, strict=True)])

    covariance = jnp.stack([jnp.stack([spread(u, v) for v in basis]) for u in basis])
    if posterior.ring:
        shadows = jnp.stack([_ring_products(posterior.ring, u) for u in basis])  # U D^T, (R, K)
        low_rank = contract(shadows, posterior.mixing)
        covariance = covariance + contract(low_rank, low_rank.T).astype(covariance.dtype)
    return Projection(mean, covariance, _norm(_without(away, basis, mean)))


@jax.jit
def _random_direction(key: jax.Array, like: Any) -> Any:
    z = prng.normal_like(key, jax.tree.map(widen, like))
    size = _norm(jax.tree.leaves(z))
    return jax.tree.map(lambda x: x / size.astype(x.dtype), z)


def _scale_filters(d: jax.Array, w: jax.Array) -> jax.Array:
    if d.ndim < 2:
        return jnp.zeros_like(d)
    d_norm, w_norm = (jnp.sqrt((x**2).sum(range(d.ndim - 1), keepdims=True)) for x in (widen(d), w))
    return (widen(d) * divide(w_norm.astype(d_norm.dtype), d_norm)).astype(d.dtype)


@jax.jit
def _bezier(points: tuple[Any, ...], t: chex.Numeric) -> Any:
    n, t = len(points) - 1, _real(t)
    return _combine(points, [math.comb(n, k) * (1 - t) ** (n - k) * t**k for k in range(n + 1)])


@jax.jit
def _chain(points: tuple[Any, ...], t: chex.Numeric) -> Any:
    n, t = len(points) - 1, _real(t)
    return _combine(points, [jnp.maximum(1 - jnp.abs(n * t - k), 0) for k in range(n + 1)])


def _combine(points: tuple[Any, ...], weights: list[jax.Array]) -> Any:
    """Weighted sum of trees, in the dtypes of the first."""
    wide = [restrict(points[0], point, f"points[{i}]") for i, point in enumerate(points)]

    def leaf(w: jax.Array, *leaves: jax.Array) -> jax.Array:
        terms = [x * c.astype(x.dtype) for x, c in zip(leaves, weights, strict=True)]
        return functools.reduce(jnp.add, terms).astype(w.dtype)

    return jax.tree.map(leaf, points[0], *wide)


def _orthonormal(vectors: list[list[jax.Array]]) -> tuple[list[list[jax.Array]], jax.Array]:
    """Gram and Schmidt: orthonormal vectors, and how long each was without those before it."""
    basis: list[list[jax.Array]] = []
    lengths = []
    for vector in vectors:
        rest = vector
        for _ in range(2):  # once more: of near parallel ones the first pass leaves a part
            rest = _without(rest, basis, _products(basis, rest))
        lengths.append(_norm(rest))
        basis.append([x / lengths[-1].astype(x.dtype) for x in rest])
    return basis, jnp.stack(lengths)


def _without(
    x: list[jax.Array], basis: list[list[jax.Array]], sizes: Sequence[jax.Array] | jax.Array
) -> list[jax.Array]:
    """What is left of x without so much of each direction."""
    for i, u in enumerate(basis):
        x = [_move(-sizes[i], a, b) for a, b in zip(x, u, strict=True)]
    return x


def _products(basis: list[list[jax.Array]], x: list[jax.Array]) -> Any:
    """Inner products with each direction."""
    products = [_sum([a * b for a, b in zip(x, u, strict=True)]) for u in basis]
    return jnp.stack(products) if products else []


def _norm(x: list[jax.Array]) -> jax.Array:
    return jnp.sqrt(_sum([a * a for a in x]))


def _sum(arrays: list[jax.Array]) -> jax.Array:
    """Sum over all elements; not a dot product, which loses digits over millions of weights."""
    dtype = wide_dtype(*[x.dtype for x in arrays])
    return functools.reduce(jnp.add, [x.sum().astype(dtype) for x in arrays])


def _ring_products(rows: list[jax.Array], u: list[jax.Array]) -> jax.Array:
    """Inner products of rows with a direction, (K,)."""

    def products(ring: jax.Array, x: jax.Array) -> jax.Array:
        found: jax.Array = (widen(ring) * x[None]).sum(tuple(range(1, ring.ndim)))
        return found

    dtype = wide_dtype(*[x.dtype for x in (*rows, *u)])
    terms = [products(*pair).astype(dtype) for pair in zip(rows, u, strict=True)]
    return functools.reduce(jnp.add, terms)


def _stack(like: Any, basis: list[list[jax.Array]], sound: jax.Array) -> Any:
    """Directions as one tree, NaN where rounding alone made them."""

    def stack(*leaves: jax.Array) -> jax.Array:
        kept = [jnp.where(s, x, jnp.nan) for x, s in zip(leaves, sound, strict=True)]
        return jnp.stack(kept)

    stacked = [stack(*leaves) for leaves in zip(*basis, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), stacked)


def _direction(plane: Plane, axis: int) -> Any:
    return jax.tree.map(lambda x: x[axis], plane.directions)


def _basis(plane: Plane, held: Any) -> list[list[jax.Array]]:
    """Leaves of each direction that ``held`` has."""
    num = plane.points.shape[-1]
    return [_leaves(held, _direction(plane, axis), "plane.directions") for axis in range(num)]


def _move(size: chex.Numeric, w: jax.Array, x: jax.Array) -> jax.Array:
    return w + jnp.asarray(size).astype(w.dtype) * x.astype(w.dtype)


def _subtract(x: list[jax.Array], y: list[jax.Array]) -> list[jax.Array]:
    return [a - b.astype(a.dtype) for a, b in zip(x, y, strict=True)]


def _leaves(held: Any, full: Any, name: str) -> list[jax.Array]:
    return jax.tree.leaves(restrict(held, full, name))


def _real(t: chex.Numeric) -> jax.Array:
    t = jnp.asarray(t)
    return t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(jnp.result_type(float))


def _eps(x: jax.Array) -> float:
    return float(jnp.finfo(x.dtype).eps)


def _values(found: Any) -> Any:
    if not jax.tree.leaves(found):
        raise ValueError(f"fn returned {found!r}: return an array, or a tree of arrays")
    return found


def _scalar(loss: Any) -> Any:
    if jnp.shape(loss) != ():
        raise ValueError(
            f"loss_fn returned an array of shape {jnp.shape(loss)}: return one number, the mean "
            "over the batch"
        )
    return loss


def _check_function(name: str, function: Any) -> None:
    if not callable(function):
        raise ValueError(f"{name} is a {type(function).__name__}: give a function")


def _check_number(name: str, value: Any) -> None:
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} has shape {jnp.shape(value)}: give one number; many go to evaluate, or "
            "through jax.vmap"
        )


def _check_plane(plane: Any) -> None:
    if not isinstance(plane, Plane):
        raise ValueError(
            f"plane is a {type(plane).__name__}: give what surface.plane or surface.pca_plane made"
        )


def _check_weights(name: str, tree: Any) -> None:
    """Refuse integers, to which points between them would be rounded."""
    dtypes = {jnp.asarray(x).dtype for x in jax.tree.leaves(tree)}
    wrong = [str(dtype) for dtype in dtypes if not jnp.issubdtype(dtype, jnp.floating)]
    if wrong:
        raise ValueError(
            f"{name} holds numbers of {sorted(wrong)[0]}: give weights, arrays of floats, such as "
            "swagjax.mean(state) makes of a state"
        )


def _check_points(points: Sequence[Any]) -> None:
    if not isinstance(points, Sequence) or len(points) < 2:
        raise ValueError(
            f"points is a {type(points).__name__} of {len(jax.tree.leaves(points))} arrays: give a "
            "list or tuple of at least 2 trees of weights"
        )
    _check_weights("points[0]", points[0])


def _check_trajectory(trajectory: Any) -> int:
    """Number of rows."""
    if isinstance(trajectory, SWAGState):
        check_collected(trajectory)
        rings = jax.tree.leaves(trajectory.deviations)
        if not rings:
            raise ValueError(
                "the state holds no deviations (swag_diag, swa): give that of swagjax.swag, or "
                "iterates stacked on a first axis"
            )
        return len(rings[0])
    _check_weights("trajectory", trajectory)
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(trajectory)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ValueError(
            f"trajectory has leaves with first axes {sorted(lengths)}: give iterates stacked on "
            "one first axis, as lax.scan returns them"
        )
    return int(lengths.pop()[0])


def _check_independent(independent: jax.Array, message: str) -> None:
    if not isinstance(independent, jax.core.Tracer) and not np.asarray(independent).all():
        raise ValueError(message)
