"""A state read as a Gaussian over the weights: moments, samples, densities.

With K deviations held, theta_SWA, Sigma_diag and D as in :class:`swagjax.SWAGState`::

    SWAG        N(theta_SWA, scale * 1/2 (Sigma_diag + D D^T / (K - 1)))
    SWAG-Diag   N(theta_SWA, scale * Sigma_diag)                          (no half)
    SWA         the point theta_SWA

Every function takes the same three options, so that the Gaussian scored is the one sampled:

``scale``
    multiplies the covariance, not the standard deviation. The default 1.0 is the paper's
    posterior; it is the ``scale=0.5`` of the authors' code, whose half stands in the formula here.
``centering``
    ``"running"``: deviations from the running mean at their own time, as in the paper.
    ``"final"``: deviations of the same K iterates from theta_SWA, so that D D^T is their scatter
    about the centre of the Gaussian. No effect without deviations.
``min_variance``
    a floor under every coordinate of Sigma_diag (the zero variance of SWA included), 0 by
    default. A coordinate that never moved, such as a dead unit, has variance zero: samples leave
    it at the mean, and the density is degenerate, +inf or -inf, unless there is a floor.

A state that has collected nothing raises ``ValueError``, and gives NaN inside ``jit``; one that
has collected a single iterate is a point.

Source: Maddox et al. 2019 (arXiv:1902.02476), section 3.2 and equation 1.
"""

import functools
import math
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax

from swagjax import pooling, prng
from swagjax.transform import SWAGState, widen

Centering = Literal["running", "final"]


def mean(state: SWAGState) -> Any:
    """Mean of the posterior, theta_SWA, in the dtypes of the accumulators.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx = swagjax.swa()
      >>> _, state = tx.update(jnp.array([2.0]), tx.init(jnp.array([1.0])), jnp.array([1.0]))
      >>> print(swagjax.mean(state))
      [3.]
      >>> swagjax.mean(tx.init(jnp.array([1.0])))
      Traceback (most recent call last):
      ...
      ValueError: the state has collected no iterate (count=0 after step=0, skipped=0...
    """
    check_collected(state)
    return jax.tree.map(lambda m: _known(state, m), state.mean)


def variance(
    state: SWAGState,
    *,
    scale: chex.Numeric = 1.0,
    centering: Centering = "running",
    min_variance: chex.Numeric = 0.0,
) -> Any:
    """Marginal variance of every weight, the diagonal of the posterior's covariance.

    ``scale * 1/2 (Sigma_diag + sum_k D_k^2 / (K - 1))`` for SWAG, ``scale * Sigma_diag`` for
    SWAG-Diag, zero for SWA. ``state.variance`` is Sigma_diag itself.

    Args:
      state: what a transformation collected.
      scale: factor of the covariance.
      centering: ``"running"`` or ``"final"``.
      min_variance: floor under Sigma_diag.

    Returns:
      A tree like the parameters.

    Raises:
      ValueError: for a bad option, or a state that has collected nothing.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag(rank=2), jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0):  # mean 2, Sigma_diag 1, deviations 0 and 1
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> print(swagjax.variance(state), swagjax.variance(state._replace(deviations=None)))
      [1.] [1.]
    """
    _check(state, scale, centering, min_variance)
    return _variance(state, scale, min_variance, centering=centering)


def sample(
    key: chex.PRNGKey,
    state: SWAGState,
    *,
    scale: chex.Numeric = 1.0,
    centering: Centering = "running",
    min_variance: chex.Numeric = 0.0,
    like: Any = None,
) -> Any:
    """Draw weights from the posterior. Pure, compiled; ``vmap`` it over keys or over states.

    ``theta_SWA + (scale / 2)^(1/2) (Sigma_diag^(1/2) z1 + (K - 1)^(-1/2) D z2)`` for SWAG, with z1
    standard normal in every coordinate and one z2 of K numbers shared by all leaves;
    ``theta_SWA + scale^(1/2) Sigma_diag^(1/2) z1`` for SWAG-Diag; theta_SWA for SWA.

    Args:
      key: one PRNG key, typed or raw.
      state: what a transformation collected.
      scale: factor of the covariance.
      centering: ``"running"`` or ``"final"``.
      min_variance: floor under Sigma_diag.
      like: parameters. The sample takes their dtypes, and their values for leaves that the state
        does not hold (``None`` or ``optax.MaskedNode`` there: masked, frozen).

    Returns:
      A tree like the parameters, in the dtypes of the accumulators unless ``like`` is given.

    Raises:
      ValueError: for a bad key or option, or a state that has collected nothing.

    Example:
      >>> import jax, jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag(rank=2), jnp.array([0.0, 5.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0):
      ...     _, state = tx.update(jnp.array([update, 0.0]), state, params)
      >>> keys = jax.random.split(jax.random.key(0), 10_000)
      >>> thetas = jax.vmap(swagjax.sample, (0, None))(keys, state)  # [2, 5] + N(0, diag(1, 0))
      >>> print(thetas.shape, thetas.mean(0).round(1), thetas.var(0).round(1))
      (10000, 2) [2. 5.] [1. 0.]

    Source: Maddox et al. 2019, equation 1.
    """
    _check(state, scale, centering, min_variance)
    return _sample(prng.one_key(key), state, like, scale, min_variance, centering=centering)


def from_noise(
    state: SWAGState,
    z1: Any,
    z2: jax.Array | None,
    *,
    scale: chex.Numeric = 1.0,
    centering: Centering = "running",
    min_variance: chex.Numeric = 0.0,
    like: Any = None,
) -> Any:
    """Weights as a function of the noise, affine in it: what ``sample`` does with normals.

    Args:
      state: what a transformation collected.
      z1: a tree like the parameters, one number a coordinate.
      z2: shape (rank,), one number a row of the ring; ``None`` for a state without deviations.
      scale: factor of the covariance.
      centering: ``"running"`` or ``"final"``.
      min_variance: floor under Sigma_diag.
      like: as in ``sample``.

    Returns:
      A tree like the parameters.

    Raises:
      ValueError: for noise of other shapes, a bad option, a state that has collected nothing.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag_diag(), jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 5.0):
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> print(swagjax.from_noise(state, jnp.array([1.0]), None))  # mean + standard deviation
      [5.]
    """
    _check(state, scale, centering, min_variance)
    z1 = _restrict(state, z1, "z1")
    _check_noise(state, z2)
    z2 = None if z2 is None else jnp.asarray(z2)
    return _from_noise(state, z1, z2, like, scale, min_variance, centering=centering)


def log_prob(
    state: SWAGState,
    params: Any,
    *,
    scale: chex.Numeric = 1.0,
    centering: Centering = "running",
    min_variance: chex.Numeric = 0.0,
) -> jax.Array:
    """Log-density of the posterior at ``params``, in nats.

    With the covariance V + W W^T, V diagonal and W of K columns, r = params - theta_SWA and
    C = I + W^T V^-1 W (K x K; Woodbury's identity and the determinant lemma)::

        -1/2 (r^T V^-1 r - (W^T V^-1 r)^T C^-1 (W^T V^-1 r) + log|V| + log|C| + P log 2 pi)

    Where a coordinate of V is zero the density is degenerate: +inf if params agree with theta_SWA
    in all such coordinates, -inf otherwise; ``min_variance`` is the way out. In float32 the value
    itself has seven digits: for 10^7 weights it is near 10^8, and known to about 10.

    Args:
      state: what a transformation collected.
      params: a tree like the parameters; leaves that the state does not hold are passed over.
      scale: factor of the covariance.
      centering: ``"running"`` or ``"final"``.
      min_variance: floor under Sigma_diag.

    Returns:
      A scalar.

    Raises:
      ValueError: for params of another structure or shape, a bad option, an empty state.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag_diag(), jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0):
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> print(f"{swagjax.log_prob(state, jnp.array([2.0])):.2f}")  # N(2, 1) at 2
      -0.92
    """
    _check(state, scale, centering, min_variance)
    params = _restrict(state, params, "params")
    density: jax.Array = _log_prob(state, params, scale, min_variance, centering=centering)
    return density


def entropy(
    state: SWAGState,
    *,
    scale: chex.Numeric = 1.0,
    centering: Centering = "running",
    min_variance: chex.Numeric = 0.0,
) -> jax.Array:
    """Differential entropy of the posterior, ``1/2 (P + P log 2 pi + log|Sigma|)``, in nats.

    Options and errors as in ``log_prob``. It is -inf where a coordinate has variance zero.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag_diag(), jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0):
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> print(f"{swagjax.entropy(state):.2f}")  # of a normal of variance 1
      1.42
    """
    _check(state, scale, centering, min_variance)
    nats: jax.Array = _entropy(state, scale, min_variance, centering=centering)
    return nats


def check_collected(state: SWAGState) -> None:
    """Raise ``ValueError`` where the state is concrete and has collected nothing.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax.posterior import check_collected
      >>> tx = swagjax.swa()
      >>> _, state = tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)), jnp.zeros(2))
      >>> check_collected(state)
    """
    if not isinstance(state, SWAGState):
        raise ValueError(
            f"state is a {type(state).__name__}: give the SWAGState, swagjax.get_state(opt_state)"
        )
    if jnp.ndim(state.count):
        raise ValueError(
            f"the state holds several members, count={state.count}: map over them with jax.vmap"
        )
    if _concrete(state.count) and int(state.count) == 0:  # int: never staged into a trace
        raise ValueError(
            f"the state has collected no iterate (count={state.count} after step={state.step}, "
            f"skipped={state.skipped} that were not finite): train past `start` until `every` or "
            "`when` comes round"
        )


@functools.partial(jax.jit, static_argnames="centering")
def _variance(
    state: SWAGState,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
) -> Any:
    diagonal = _diagonal(state, scale, min_variance)
    if not _has_ring(state):
        return diagonal

    def total(v: jax.Array, ring: jax.Array) -> jax.Array:
        if centering == "running":  # a reduction, where the product would copy the ring
            return v + _root(state, scale) ** 2 * (widen(ring) ** 2).sum(0)
        return v + (_contract(_mixing(state, scale, centering).T, widen(ring)) ** 2).sum(0)

    # By leaves: the boxes of a ring (linen.Partitioned, nnx.Param) carry metadata of their own.
    leaves, treedef = jax.tree.flatten(diagonal)
    pairs = zip(leaves, jax.tree.leaves(state.deviations), strict=True)
    return jax.tree.unflatten(treedef, [total(*pair) for pair in pairs])


@functools.partial(jax.jit, static_argnames="centering")
def _sample(
    key: jax.Array,
    state: SWAGState,
    like: Any,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
) -> Any:
    key1, key2 = jax.random.split(key)
    wide = jax.tree.map(widen, state.mean)
    z1 = prng.normal_like(key1, wide)
    shape, dtype = (_rank(state),), _noise_dtype(state)
    z2 = prng.normal(key2, shape, dtype) if _has_ring(state) else None
    return _from_noise(state, z1, z2, like, scale, min_variance, centering=centering)


@functools.partial(jax.jit, static_argnames="centering")
def _from_noise(
    state: SWAGState,
    z1: Any,
    z2: jax.Array | None,
    like: Any,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
) -> Any:
    diagonal = _diagonal(state, scale, min_variance)
    theta = jax.tree.map(lambda m, v, z: widen(m) + _sqrt(v) * z, state.mean, diagonal, z1)
    if z2 is not None:
        weights = _contract(_mixing(state, scale, centering), z2)
        theta = jax.tree.map(jnp.add, theta, _combine(state, weights))
    theta = jax.tree.map(lambda m, t: t.astype(m.dtype), state.mean, theta)
    return theta if like is None else _fill(theta, like)


@functools.partial(jax.jit, static_argnames="centering")
def _log_prob(
    state: SWAGState,
    params: Any,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
) -> jax.Array:
    state, params = _pooled(state, params)
    diagonal = _diagonal(state, scale, min_variance)
    residual = jax.tree.map(lambda m, p: p - widen(m), state.mean, params)
    scaled = jax.tree.map(_divide, diagonal, residual)  # V^-1 r
    # Off the mean in a direction of no variance: infinitely far.
    stray = jax.tree.map(lambda v, r: ((v == 0) & (r != 0)).any(), diagonal, residual)
    far = functools.reduce(jnp.logical_or, jax.tree.leaves(stray), jnp.array(False))
    distance = _sum(jax.tree.map(lambda r, s: jnp.sum(r * s), residual, scaled))
    log_det = _sum(jax.tree.map(lambda v: jnp.log(v).sum(), diagonal))
    if _has_ring(state):
        factor = _capacitance(state, diagonal, scale, centering)
        inner = _sum(jax.tree.map(_inner, state.deviations, scaled))
        whitened = jax.scipy.linalg.solve_triangular(
            factor, _contract(_mixing(state, scale, centering).T, inner), lower=True
        )
        distance -= jnp.sum(whitened**2)
        log_det += 2 * jnp.log(jnp.diagonal(factor)).sum()
    density = -(distance + log_det + _size(state) * math.log(2 * math.pi)) / 2
    return jnp.where(far, -jnp.inf, density)


@functools.partial(jax.jit, static_argnames="centering")
def _entropy(
    state: SWAGState,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
) -> jax.Array:
    (state,) = _pooled(state)
    diagonal = _diagonal(state, scale, min_variance)
    log_det = _sum(jax.tree.map(lambda v: jnp.log(v).sum(), diagonal))
    if _has_ring(state):
        factor = _capacitance(state, diagonal, scale, centering)
        log_det += 2 * jnp.log(jnp.diagonal(factor)).sum()
    return (_size(state) * (1 + math.log(2 * math.pi)) + log_det) / 2


def _combine(state: SWAGState, weights: jax.Array) -> Any:
    """D times K weights, a tree like the mean."""
    leaves, treedef = jax.tree.flatten(state.mean)
    groups = pooling.group(leaves)
    rings = pooling.pool(jax.tree.leaves(state.deviations), groups, lead=1)
    products = [_contract(weights, widen(ring)) for ring in rings]
    return jax.tree.unflatten(treedef, pooling.unpool(products, groups, leaves))


def _pooled(state: SWAGState, *trees: Any) -> tuple[SWAGState, ...]:
    """The state, and trees like its mean, with the small leaves joined: lists of few arrays."""
    groups = pooling.group(jax.tree.leaves(state.mean))

    def pool(tree: Any, lead: int = 0) -> Any:
        return None if tree is None else pooling.pool(jax.tree.leaves(tree), groups, lead)

    mean, variance, deviations = pool(state.mean), pool(state.variance), pool(state.deviations, 1)
    state = state._replace(mean=mean, variance=variance, deviations=deviations)
    return (state, *map(pool, trees))


def _diagonal(state: SWAGState, scale: chex.Numeric, min_variance: chex.Numeric) -> Any:
    """V: the diagonal part of the covariance, with its scale and its half."""
    half = 1.0 if state.deviations is None else 0.5
    source = state.mean if state.variance is None else state.variance

    def scaled(leaf: jax.Array) -> jax.Array:
        leaf = widen(leaf)
        v = jnp.zeros_like(leaf) if state.variance is None else leaf
        floor = jnp.asarray(min_variance, v.dtype)
        return _known(state, jnp.maximum(v, floor) * jnp.asarray(half * scale, v.dtype))

    return jax.tree.map(scaled, source)


def _mixing(state: SWAGState, scale: chex.Numeric, centering: Centering) -> jax.Array:
    """M (rank x rank): the low-rank factor is W = D^T M, D the ring with a row a deviation.

    Running: a multiple of the identity. Final: with d_i = theta_i - mean_i,
    theta_i - mean_n = d_i - sum_{i < j <= n} d_j / (j - 1), an upper triangular matrix A in the
    order of collection that depends on the counts alone; M is a multiple of A^T.
    """
    rank, dtype = _rank(state), _noise_dtype(state)
    root = _root(state, scale)
    identity = jnp.eye(rank, dtype=dtype)
    if centering == "running":
        return root * identity
    row = jnp.arange(rank)
    number = state.count - (state.count - 1 - row) % rank  # of the iterate in each row, from 1
    later = (number[None, :] > number[:, None]) & (number[:, None] > 0)
    steps = jnp.where(later, 1 / jnp.maximum(number - 1, 1)[None, :], 0).astype(dtype)
    return root * (identity - steps).T


def _root(state: SWAGState, scale: chex.Numeric) -> jax.Array:
    """Factor of the deviations, (scale / (2 (K - 1)))^(1/2) with K the number really held."""
    dtype = _noise_dtype(state)
    held = jnp.minimum(state.count, _rank(state))
    # One deviation is zero and no spread can be told from it: the low-rank part vanishes.
    spread = jnp.asarray(scale, dtype) / (2 * jnp.maximum(held - 1, 1).astype(dtype))
    return _sqrt(jnp.where(held > 1, spread, 0))


def _capacitance(
    state: SWAGState, diagonal: Any, scale: chex.Numeric, centering: Centering
) -> jax.Array:
    """Cholesky factor of C = I + W^T V^-1 W."""

    def gram(v: jax.Array, ring: jax.Array) -> jax.Array:
        # A row at a time: one product of all would copy the ring twice.
        products: jax.Array = jax.lax.map(lambda row: _inner(ring, _divide(v, widen(row))), ring)
        return products

    mixing = _mixing(state, scale, centering)
    rows = _sum(jax.tree.map(gram, diagonal, state.deviations))
    inner = _contract(_contract(mixing.T, rows), mixing)
    factor: jax.Array = jnp.linalg.cholesky(jnp.eye(len(rows), dtype=rows.dtype) + inner)
    return factor


def _divide(v: jax.Array, x: jax.Array) -> jax.Array:
    """Divide by the variance; in directions of no variance the quotient is zero."""
    return jnp.where(v == 0, 0, x / jnp.where(v == 0, 1, v))


def _inner(ring: jax.Array, x: jax.Array) -> jax.Array:
    """Inner products of the K rows of a ring with a leaf.

    A sum of products, not a matrix-vector product: over millions of weights that one loses four
    digits on CPU, and it asks where to live if the leaves are explicitly sharded.
    """
    products: jax.Array = (widen(ring) * x).sum(tuple(range(1, ring.ndim)))
    return products


def _sqrt(x: jax.Array) -> jax.Array:
    """Square root whose derivative at zero is zero: dead weights have no say in gradients."""
    root: jax.Array = jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))
    return root


def _contract(a: jax.Array, b: jax.Array) -> jax.Array:
    """Contract over the rank axis in full precision: accelerators would round to 10 bits or so."""
    return jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)


def _sum(tree: Any) -> jax.Array:
    total: jax.Array = sum(jax.tree.leaves(tree), start=jnp.float32(0))
    return total


def _known(state: SWAGState, x: jax.Array) -> jax.Array:
    """NaN in place of the zeros of a state that has collected nothing."""
    return jnp.where(state.count > 0, x, jnp.asarray(jnp.nan, x.dtype))


def _has_ring(state: SWAGState) -> bool:
    return bool(jax.tree.leaves(state.deviations))


def _rank(state: SWAGState) -> int:
    return next((ring.shape[0] for ring in jax.tree.leaves(state.deviations)), 0)


def _size(state: SWAGState) -> int:
    return sum(math.prod(m.shape) for m in jax.tree.leaves(state.mean))


def _noise_dtype(state: SWAGState) -> Any:
    return jnp.result_type(jnp.float32, *jax.tree.leaves(state.mean))


def _restrict(state: SWAGState, tree: Any, name: str) -> Any:
    """The leaves of ``tree`` that the state holds, checked for structure and shape."""

    def cast(m: jax.Array, leaf: jax.Array, _: Any) -> jax.Array:
        return leaf.astype(widen(m).dtype)

    return _pair(state.mean, tree, name, lambda hole, _: hole, cast)


def _fill(theta: Any, like: Any) -> Any:
    """Give ``theta`` the dtypes and containers of ``like``, and its leaves where it has holes."""
    return _pair(
        theta,
        like,
        "like",
        lambda _, leaves: leaves,
        lambda t, leaf, treedef: jax.tree.unflatten(treedef, [t.astype(leaf.dtype)]),
    )


def _pair(held: Any, full: Any, name: str, at_hole: Any, at_leaf: Any) -> Any:
    """Walk a tree with holes beside a full one, by structure, never by order of traversal.

    A leaf of ``held`` may stand against a container of one array, such as an ``nnx.Param``.
    """

    def visit(path: Any, h: Any, f: Any) -> Any:
        if _is_hole(h):
            return at_hole(h, f)
        leaves, treedef = jax.tree.flatten(f)
        shapes = [jnp.shape(leaf) for leaf in leaves]
        if shapes != [h.shape]:
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(f"{where} has shape {shapes}: the state holds {[h.shape]} there")
        return at_leaf(h, jnp.asarray(leaves[0]), treedef)

    try:
        jax.tree.map(lambda *_: None, held, full, is_leaf=_is_hole)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} has another structure than the parameters that were collected: {error}"
        ) from error
    return jax.tree.map_with_path(visit, held, full, is_leaf=_is_hole)


def _is_hole(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _check(
    state: SWAGState, scale: chex.Numeric, centering: str, min_variance: chex.Numeric
) -> None:
    check_collected(state)
    if centering not in ("running", "final"):
        raise ValueError(f"centering={centering!r}: give 'running' or 'final'")
    for name, value in (("scale", scale), ("min_variance", min_variance)):
        if jnp.shape(value) != () or (_concrete(value) and not 0 <= float(value) < math.inf):
            raise ValueError(f"{name}={value!r}: give a finite number of at least zero")


def _check_noise(state: SWAGState, z2: jax.Array | None) -> None:
    wanted = (_rank(state),) if _has_ring(state) else None
    shape = None if z2 is None else jnp.shape(z2)
    if shape != wanted:
        raise ValueError(f"z2 has shape {shape}: the ring of this state asks for {wanted}")


def _concrete(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer)
