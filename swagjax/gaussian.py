"""Private: a state and its options as N(mean, V + W W^T), and the algebra of its density.

V is diagonal and W = D^T M, with D the ring of K rows and M a K x K matrix that carries the scale
and the centring. Nothing here is of size P x P, none makes a copy of the ring, and a sum over
millions of weights keeps its digits in float32.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from swagjax import pooling
from swagjax.summing import two_sum
from swagjax.transform import SWAGState, wide_dtype, widen

Centering = Literal["running", "final"]


class Gaussian(NamedTuple):
    """N(mean, V + W W^T) over lists of arrays: the leaves of a tree, or pools of them.

    Attributes:
      mean: theta_SWA.
      variance: V, with its scale and its half; NaN where nothing was collected.
      ring: the rows of D, in the dtype in which they are stored; empty without deviations.
      mixing: M, (K, K), with W = D^T M.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax.gaussian import gaussian
      >>> tx, params = swagjax.swag(rank=2), jnp.zeros(1)
      >>> state = tx.init(params)
      >>> for x in (1.0, 3.0):
      ...     _, state = tx.update(jnp.array([x]), state, params)
      >>> found = gaussian(state, 1.0, "running", 0.0)
      >>> print(found.mean, found.variance)  # V is half of Sigma_diag
      [Array([2.], dtype=float32)] [Array([0.5], dtype=float32)]
    """

    mean: list[jax.Array]
    variance: list[jax.Array]
    ring: list[jax.Array]
    mixing: jax.Array


def gaussian(
    state: SWAGState, scale: chex.Numeric, centering: Centering, min_variance: chex.Numeric
) -> Gaussian:
    """Apply the options to a state.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax.gaussian import gaussian
      >>> tx, params = swagjax.swag(rank=2), jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0):
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> posterior = gaussian(state, 1.0, "running", 0.0)
      >>> print(posterior.mean[0], posterior.variance[0], posterior.mixing.shape)
      [2.] [0.5] (2, 2)
    """
    half = 1.0 if state.deviations is None else 0.5
    kept = state.mean if state.variance is None else state.variance

    def scaled(leaf: jax.Array) -> jax.Array:
        leaf = widen(leaf)
        v = jnp.zeros_like(leaf) if state.variance is None else leaf
        v = jnp.maximum(v, jnp.asarray(min_variance, v.dtype))
        return known(state, v * (half * jnp.asarray(scale, v.dtype)))

    ring = jax.tree.leaves(state.deviations)
    rank = len(ring[0]) if ring else 0
    return Gaussian(
        mean=[widen(leaf) for leaf in jax.tree.leaves(state.mean)],
        variance=[scaled(leaf) for leaf in jax.tree.leaves(kept)],
        ring=ring,
        mixing=_mixing(state.num_collected, rank, noise_dtype(state), scale, centering),
    )


def known(state: SWAGState, x: jax.Array) -> jax.Array:
    """NaN in place of the zeros of a state that has collected nothing.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax.gaussian import known
      >>> print(known(swagjax.swa().init(jnp.zeros(2)), jnp.zeros(2)))
      [nan nan]
    """
    return jnp.where(state.num_collected > 0, x, jnp.asarray(jnp.nan, x.dtype))


def noise_dtype(state: SWAGState) -> Any:
    """The dtype of the noise shared by all leaves: the widest of the mean, float32 at the least.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax.gaussian import noise_dtype
      >>> noise_dtype(swagjax.swa().init(jnp.zeros(2, jnp.bfloat16)))
      dtype('float32')
    """
    return wide_dtype(*[leaf.dtype for leaf in jax.tree.leaves(state.mean)])


def recentring(count: jax.Array, rank: int, dtype: Any) -> jax.Array:
    """The matrix A (K x K) that takes the running deviations to those from the final mean.

    With d_i = theta_i - mean_i and n iterates collected,
    theta_i - mean_n = d_i - sum_{i < j <= n} d_j / (j - 1): in the order of collection an upper
    triangular matrix that depends on the counts alone. It is zero in the rows and columns of rows
    of the ring that are not yet written, whatever stands there.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import recentring
      >>> print(recentring(jnp.array(2), 3, jnp.float32))  # theta_1 - mean_2 = d_1 - d_2
      [[ 1. -1.  0.]
       [ 0.  1.  0.]
       [ 0.  0.  0.]]
    """
    number = collected(count, rank)
    later = (number[None, :] > number[:, None]) & (number[:, None] > 0)
    steps = jnp.where(later, 1 / jnp.maximum(number - 1, 1).astype(dtype)[None, :], 0)
    return written(count, rank, dtype) - steps.astype(dtype)


def written(count: jax.Array, rank: int, dtype: Any) -> jax.Array:
    """The matrix (K x K) that keeps the rows of the ring in use, and puts zero for others.

    A row that was not written since ``num_collected`` was last 0 may hold an older deviation.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import written
      >>> print(written(jnp.array(1), 2, jnp.float32))
      [[1. 0.]
       [0. 0.]]
    """
    return jnp.diag((collected(count, rank) > 0).astype(dtype))


def collected(count: jax.Array, rank: int) -> jax.Array:
    """Number of the iterate in each row of the ring, from 1; 0 or less in rows not yet written.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import collected
      >>> print(collected(jnp.array(5), 3), collected(jnp.array(1), 3))
      [4 5 3] [ 1 -1  0]
    """
    return count - (count - 1 - jnp.arange(rank, dtype=count.dtype)) % max(rank, 1)


def pooled(posterior: Gaussian, groups: pooling.Groups) -> Gaussian:
    """The same Gaussian with its small leaves joined: few arrays, for a program of few loops.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax.gaussian import gaussian, pooled
      >>> params = [jnp.zeros(2), jnp.zeros((2, 2))]
      >>> _, state = swagjax.swa().update(params, swagjax.swa().init(params), params)
      >>> [x.shape for x in pooled(gaussian(state, 1.0, "running", 0.0), [[0, 1]]).mean]
      [(6,)]
    """
    mean, variance = (pooling.pool(part, groups) for part in (posterior.mean, posterior.variance))
    ring = pooling.pool(posterior.ring, groups, lead=1) if posterior.ring else []
    return Gaussian(mean, variance, ring, posterior.mixing)


def combine(weights: jax.Array, ring: list[jax.Array]) -> list[jax.Array]:
    """Weighted sums of the rows: ``weights`` (..., K) times D, a list of (..., *leaf.shape).

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import combine
      >>> print(combine(jnp.array([1.0, 2.0]), [jnp.array([[1.0, 0.0], [0.0, 1.0]])])[0])
      [1. 2.]
    """
    return [contract(weights, widen(rows)) for rows in ring]


def contract(a: jax.Array, b: jax.Array) -> jax.Array:
    """Contract over the rank axis in full precision: accelerators would round to 10 bits or so.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import contract
      >>> print(contract(jnp.array([1.0, 2.0]), jnp.array([[1.0], [3.0]])))
      [7.]
    """
    dtype = wide_dtype(a.dtype, b.dtype)
    highest = jax.lax.Precision.HIGHEST
    return jnp.tensordot(a.astype(dtype), b.astype(dtype), 1, precision=highest)


def capacitance(posterior: Gaussian) -> jax.Array:
    """Lower Cholesky factor of C = I + W^T V^-1 W.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import Gaussian, capacitance
      >>> one = Gaussian([jnp.zeros(1)], [jnp.ones(1)], [jnp.full((1, 1), 3.0)], jnp.eye(1))
      >>> print((capacitance(one) ** 2).round(4))  # 1 + 3^2
      [[10.]]
    """
    factor: jax.Array = jnp.linalg.cholesky(
        jnp.eye(len(posterior.mixing), dtype=posterior.mixing.dtype) + gram(posterior)
    )
    return factor


def row_products(rings: list[jax.Array], weights: jax.Array) -> jax.Array:
    """Inner products of sums of the rows of a ring: (W D) (W D)^T, for W of shape (R, K).

    As W (D (W D)^T): where W takes off what the rows have in common, the products of that part
    would have to cancel in W (D D^T) W^T, and float32 keeps seven digits of them.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import row_products
      >>> print(row_products([jnp.array([[5.0, 1.0], [5.0, 3.0]])], jnp.array([[1.0, -1.0]])))
      [[4.]]
    """

    def products(ring: jax.Array) -> jax.Array:
        # A sum at a time: all at once would copy the ring.
        def one(row: jax.Array) -> jax.Array:
            x = combine(row, [ring])[0]
            terms = ring.astype(x.dtype) * x[None]
            return terms.sum(tuple(range(1, ring.ndim))).astype(weights.dtype)

        inner: jax.Array = jax.lax.map(one, weights)
        return inner

    inner = contract(functools.reduce(jnp.add, map(products, rings)), weights.T)
    return (inner + inner.T) / 2


def gram(posterior: Gaussian) -> jax.Array:
    """W^T V^-1 W, (K, K).

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import Gaussian, gram
      >>> one = Gaussian([jnp.zeros(1)], [jnp.ones(1)], [jnp.full((1, 1), 3.0)], jnp.eye(1))
      >>> print(gram(one))
      [[9.]]
    """
    mixing = posterior.mixing
    if not posterior.ring:
        return jnp.zeros_like(mixing)

    def products(v: jax.Array, ring: jax.Array) -> jax.Array:
        # A row at a time: one product of all would copy the ring twice.
        rows: jax.Array = jax.lax.map(lambda row: _inner(ring, divide(widen(row), v)), ring)
        return rows

    pairs = zip(posterior.variance, posterior.ring, strict=True)
    inner = _add([products(*pair) for pair in pairs])
    return contract(contract(mixing.T, inner.astype(mixing.dtype)), mixing)


def log_det(posterior: Gaussian, factor: jax.Array) -> jax.Array:
    """log|V + W W^T| = log|V| + log|C|, with the factor of the capacitance.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import Gaussian, capacitance, log_det
      >>> one = Gaussian([jnp.zeros(1)], [jnp.ones(1)], [jnp.full((1, 1), 3.0)], jnp.eye(1))
      >>> print(jnp.exp(log_det(one, capacitance(one))).round(4))
      10.0
    """
    logs = total([jnp.log(v) for v in posterior.variance])
    return logs + log_det_capacitance(factor).astype(logs.dtype)


def log_det_capacitance(factor: jax.Array) -> jax.Array:
    """log|C| from its Cholesky factor.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import log_det_capacitance
      >>> print(log_det_capacitance(jnp.eye(2)))
      0.0
    """
    return 2 * jnp.log(jnp.diagonal(factor)).sum()


def product(
    posterior: Gaussian, factor: jax.Array, x: list[jax.Array], y: list[jax.Array]
) -> jax.Array:
    """x^T (V + W W^T)^-1 y, over the coordinates in which V is not zero.

    With c(x) = C^-1 W^T V^-1 x it is (x - W c(x))^T V^-1 (y - W c(y)) + c(x)^T c(y). The form of
    Woodbury's identity, x^T V^-1 y - (W^T V^-1 x)^T c(y), is a difference of two numbers that may
    be a million times larger; in this one an error in c enters only squared, and one step of
    refinement makes it small.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import Gaussian, capacitance, product
      >>> one = Gaussian([jnp.zeros(1)], [jnp.ones(1)], [jnp.full((1, 1), 3.0)], jnp.eye(1))
      >>> x = [jnp.full(1, 10.0)]
      >>> print(product(one, capacitance(one), x, x).round(4))  # 10^2 / (1 + 3^2)
      10.0
    """
    rest_x, c_x = _project(posterior, factor, x)
    rest_y, c_y = (rest_x, c_x) if y is x else _project(posterior, factor, y)
    triples = zip(rest_x, rest_y, posterior.variance, strict=True)
    terms = [a * divide(b, v) for a, b, v in triples]  # b / v first: squares underflow sooner
    inner = jnp.sum(c_x * c_y)
    return total([*terms, inner])


def total(arrays: list[jax.Array]) -> jax.Array:
    """Sum over all elements of all arrays, with the rounding errors summed alongside.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import total
      >>> print(total([jnp.array([1e8, 3.0, -1e8]), jnp.array(1.0)]))
      4.0
    """
    dtype = wide_dtype(*[x.dtype for x in arrays])
    zero = jnp.zeros((), dtype)
    parts = [_exact_sum(x.astype(dtype)) for x in arrays]
    high, low = functools.reduce(two_sum, parts, (zero, zero))
    return high + low


def divide(x: jax.Array, v: jax.Array) -> jax.Array:
    """Divide by the variance; in directions of no variance the quotient is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import divide
      >>> print(divide(jnp.ones(2), jnp.array([2.0, 0.0])))
      [0.5 0. ]
    """
    return jnp.where(v == 0, 0, x / jnp.where(v == 0, 1, v))


def sqrt(x: jax.Array) -> jax.Array:
    """Square root whose derivative at zero is zero: dead weights have no say in gradients.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from swagjax.gaussian import sqrt
      >>> print(sqrt(jnp.array(4.0)), jax.grad(sqrt)(0.0))
      2.0 0.0
    """
    root: jax.Array = jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))
    return root


def _mixing(
    count: jax.Array, rank: int, dtype: Any, scale: chex.Numeric, centering: Centering
) -> jax.Array:
    """M: (scale / (2 (K - 1)))^(1/2), K the number really held, times A^T if recentred."""
    held = jnp.minimum(count, rank)
    # One deviation is zero and no spread can be told from it: the low-rank part vanishes.
    spread = jnp.asarray(scale, dtype) / (2 * jnp.maximum(held - 1, 1)).astype(dtype)
    root = sqrt(jnp.where(held > 1, spread, 0))
    if centering == "running":
        return root * written(count, rank, dtype)
    return root * recentring(count, rank, dtype).T


def _project(
    posterior: Gaussian, factor: jax.Array, x: list[jax.Array]
) -> tuple[list[jax.Array], jax.Array]:
    """The rest x - W c, and c = C^-1 W^T V^-1 x."""
    if not posterior.ring:
        return x, jnp.zeros((), factor.dtype)

    def solve(x: list[jax.Array], c: jax.Array) -> jax.Array:
        scaled = [divide(a, v) for a, v in zip(x, posterior.variance, strict=True)]
        inner = _add([_inner(*pair) for pair in zip(posterior.ring, scaled, strict=True)])
        residual = contract(posterior.mixing.T, inner.astype(c.dtype)) - c
        solution: jax.Array = jax.scipy.linalg.cho_solve((factor, True), residual)
        return solution

    def without(c: jax.Array) -> list[jax.Array]:
        rows = combine(contract(posterior.mixing, c), posterior.ring)
        return [a - w.astype(a.dtype) for a, w in zip(x, rows, strict=True)]

    c = solve(x, jnp.zeros(len(factor), factor.dtype))
    c = c + solve(without(c), c)
    return without(c), c


def _inner(ring: jax.Array, x: jax.Array) -> jax.Array:
    """Inner products of the K rows of a ring with a leaf.

    A sum of products, not a matrix-vector product: over millions of weights that one loses four
    digits on CPU, and it asks where to live if the leaves are explicitly sharded.
    """
    products: jax.Array = (widen(ring) * x[None]).sum(tuple(range(1, ring.ndim)))
    return products


def _add(arrays: list[jax.Array]) -> jax.Array:
    dtype = wide_dtype(*[x.dtype for x in arrays])
    return functools.reduce(jnp.add, (x.astype(dtype) for x in arrays))


@jax.custom_jvp
def _exact_sum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum and rounding error of it."""
    zero = jnp.zeros((), x.dtype)
    # Zeros that depend on x in form: where a transformation has dropped the rule below, a reduction
    # is differentiable only if all of its operands have tangents.
    pairs = (x, jnp.where(jnp.zeros_like(x, bool), x, 0))
    high, low = jax.lax.reduce(pairs, (zero, zero), two_sum, tuple(range(x.ndim)))
    return high, low


@_exact_sum.defjvp
def _exact_sum_jvp(primals: Any, tangents: Any) -> Any:
    slope = jnp.sum(tangents[0])
    return _exact_sum(*primals), (slope, jnp.zeros_like(slope))


def size(posterior: Gaussian) -> int:
    """P, the number of weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.gaussian import Gaussian, size
      >>> size(Gaussian([jnp.zeros((2, 3))], [jnp.zeros((2, 3))], [], jnp.eye(0)))
      6
    """
    return sum(math.prod(m.shape) for m in posterior.mean)
