"""Inference in a subspace of few dimensions, spanned by the deviations that SWAG holds.

With theta_SWA, the deviations D (K rows, of K iterates) and their singular values s_1 >= s_2 >= ...
and right singular vectors u_j:

    theta(z) = theta_SWA + sum_j z_j v_j,    v_j = s_j u_j / sqrt(K - 1),    j = 1 ... dim

    log p(z | data) = log p(data | theta(z)) / T + log N(z; 0, I) + const

so that the prior N(0, I) of z is as wide in every direction as the iterates. T tempers the
likelihood and not the prior: 1 is the posterior of this prior, and a larger one is wider, up to the
prior itself. The authors need it because there are many data and few dimensions; their code takes
the number of data over ``dim`` where none is given.

``pca`` makes the subspace, ``point`` the weights of a z, ``log_likelihood`` and ``log_prob`` are
what a sampler asks for. The samplers are blackjax's, here one chain of elliptical slice sampling:

    def log_likelihood(params):  # a sum over all data
        return model_log_density(params, x, y).sum()

    space = subspace.pca(state, dim=5)
    tempered = Partial(subspace.log_likelihood, space, function=log_likelihood, temperature=100.0)
    kernel = blackjax.elliptical_slice(tempered, mean=jnp.zeros(5), cov=jnp.ones(5))

    def step(chain, key):
        chain, info = kernel.step(key, chain)
        return chain, chain.position

    keys = jax.random.split(key, 1000)
    _, zs = jax.lax.scan(step, kernel.init(jnp.zeros(5)), keys)
    points = ensemble.Points(jax.vmap(subspace.point, (None, 0))(space, zs[200::20]))
    probs = swagjax.predict(key, points, prob_fn, inputs)

NUTS takes ``Partial(subspace.log_prob, space, function=log_likelihood, temperature=100.0)``.

Source: Izmailov et al. 2019, "Subspace Inference for Bayesian Deep Learning" (arXiv:1907.07504).
"""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from swagjax import pooling, prng
from swagjax.gaussian import Centering, combine, contract, gaussian, gram, known, pooled
from swagjax.pairing import fill, restrict
from swagjax.posterior import check_collected
from swagjax.transform import SWAGState, check_integer, wide_dtype, widen


class Subspace(NamedTuple):
    """An affine subspace of the weights; a tree of arrays.

    Attributes:
      origin: theta_SWA, a tree like the parameters.
      directions: v_j, a tree with leaves of shape ``(dim, *leaf.shape)``.
      variances: the squared length of every direction, shape (dim,), of ``pca`` in falling order:
        of all weights together the variance of the iterates along it.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import subspace
      >>> space = subspace.Subspace(jnp.ones(2), jnp.array([[2.0, 0.0]]), jnp.array([4.0]))
      >>> print(subspace.point(space, jnp.array([0.5])))
      [2. 1.]
    """

    origin: Any
    directions: Any
    variances: jax.Array


def pca(state: SWAGState, dim: int, *, centering: Centering = "running") -> Subspace:
    """The subspace of the first principal components of the deviations.

    From the eigenvectors q_j of the K x K Gram matrix D D^T / (K - 1), in full precision:
    v_j = D^T q_j / sqrt(K - 1), so that nothing is divided by a small singular value and nothing
    is of size P x P. In float32 a direction of a variance below 1e-6 of the first is rounding.

    Args:
      state: what ``swag`` collected.
      dim: directions, at most ``min(rank, count - 1)``.
      centering: ``"running"`` deviations, as in the paper, or those from theta_SWA, ``"final"``.

    Returns:
      The subspace; of every direction the largest coefficient of a deviation is positive. Inside
      ``jit``, where ``num_collected`` is not known, directions beyond what was collected are zero.

    Raises:
      ValueError: for a state without deviations, or more directions than it has.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax import subspace
      >>> tx, params = swagjax.swag(rank=5), jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for x in ([1.0, 0.0, 0.0], [0.0, 3.0, 0.0], [1.0, 1.0, 0.0]):
      ...     _, state = tx.update(jnp.array(x), state, params)
      >>> space = subspace.pca(state, 2)
      >>> print(space.directions.shape, space.variances.round(3))  # of three deviations, one zero
      (2, 3) [1.34  0.021]

    Source: Izmailov et al. 2019; the scale of the directions is that of the authors' code.
    """
    check_collected(state)
    if centering not in ("running", "final"):
        raise ValueError(f"centering={centering!r}: give 'running' or 'final'")
    rings = jax.tree.leaves(state.deviations)
    if not rings:
        raise ValueError("the state holds no deviations: collect by swagjax.swag(rank)")
    dim, most = check_integer("dim", dim, 1), len(rings[0])
    if not isinstance(state.num_collected, jax.core.Tracer):
        most = min(most, int(state.num_collected) - 1)
    if dim > most:
        raise ValueError(
            f"dim={dim}: the state spans {most} directions (rank={len(rings[0])}, "
            f"num_collected={state.num_collected}); collect more iterates, or give at most {most}"
        )
    space: Subspace = _pca(state, dim, centering, pooling.whole(jax.tree.leaves(state.mean)))
    return space


def random(key: chex.PRNGKey, origin: Any, dim: int) -> Subspace:
    """A subspace of random directions of length one, with which the one of ``pca`` is compared.

    Args:
      key: one PRNG key.
      origin: parameters, such as ``swagjax.mean(state)``.
      dim: how many directions.

    Raises:
      ValueError: for a bad key, ``dim`` below 1, an origin that is not of floats.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from swagjax import subspace
      >>> space = subspace.random(jax.random.key(0), {"w": jnp.zeros((4, 3))}, 2)
      >>> print(space.directions["w"].shape, (space.directions["w"] ** 2).sum((1, 2)).round(4))
      (2, 4, 3) [1. 1.]

    Source: Izmailov et al. 2019.
    """
    dim = check_integer("dim", dim, 1)
    key = prng.one_key(key)
    leaves, treedef = jax.tree.flatten(origin)
    kinds = {str(jnp.asarray(x).dtype) for x in leaves}
    if not all(jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) for x in leaves) or not kinds:
        raise ValueError(
            f"origin holds numbers of {sorted(kinds)}: give parameters, floats, such as "
            "swagjax.mean(state)"
        )
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, (dim, *jnp.shape(x)), widen(jnp.asarray(x)).dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    length = jnp.sqrt(_total([(x**2).sum(tuple(range(1, x.ndim))) for x in drawn]))
    scaled = [x / length.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype) for x in drawn]
    return Subspace(origin, jax.tree.unflatten(treedef, scaled), jnp.ones_like(length))


def point(space: Subspace, z: jax.Array, *, like: Any = None) -> Any:
    """Weights of a point of the subspace, ``origin + sum_j z_j v_j``; ``vmap`` it over many.

    Args:
      space: what ``pca`` or ``random`` made.
      z: shape (dim,).
      like: parameters, for their dtypes and for leaves that the state did not hold, as in
        ``swagjax.sample``.

    Returns:
      A tree like the parameters.

    Raises:
      ValueError: for a z of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import subspace
      >>> space = subspace.Subspace(jnp.ones(2), jnp.array([[2.0, 0.0]]), jnp.array([4.0]))
      >>> print(subspace.point(space, jnp.array([3.0])))
      [7. 1.]
    """
    _check_space(space)
    z = jnp.asarray(z)
    if z.shape != space.variances.shape:
        raise ValueError(
            f"z has shape {z.shape}: the subspace asks for {space.variances.shape}; map over many "
            "by jax.vmap(subspace.point, (None, 0))(space, zs)"
        )
    theta = jax.tree.map(
        lambda x, v: (widen(x) + contract(z, widen(v)).astype(widen(x).dtype)).astype(x.dtype),
        space.origin,
        space.directions,
    )
    return theta if like is None else fill(theta, like)


def coordinates(space: Subspace, params: Any) -> jax.Array:
    """The z of the point of the subspace that is nearest to ``params``, shape (dim,).

    NaN or infinite along a direction of no length.

    Raises:
      ValueError: for params of another structure or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import subspace
      >>> space = subspace.Subspace(jnp.ones(2), jnp.array([[2.0, 0.0]]), jnp.array([4.0]))
      >>> print(subspace.coordinates(space, jnp.array([7.0, 5.0])))
      [3.]
    """
    _check_space(space)
    params = restrict(space.origin, params, "params")
    away = [
        x - widen(o)
        for x, o in zip(jax.tree.leaves(params), jax.tree.leaves(space.origin), strict=True)
    ]
    rows = jax.tree.leaves(space.directions)
    inner = _total([_inner(v, x) for v, x in zip(rows, away, strict=True)])
    products = _total([jax.vmap(functools.partial(_inner, v))(widen(v)) for v in rows])
    z: jax.Array = jnp.linalg.solve(products, inner)
    return z


def log_likelihood(
    space: Subspace,
    z: jax.Array,
    *,
    function: Callable[[Any], jax.Array],
    temperature: chex.Numeric = 1.0,
) -> jax.Array:
    """Tempered log-likelihood ``function(theta(z)) / T``: what elliptical slice sampling asks for.

    Args:
      space: what ``pca`` or ``random`` made.
      z: shape (dim,).
      function: from weights to the log-likelihood of all data together, a sum and not a mean.
      temperature: T, above zero.

    Returns:
      A scalar.

    Raises:
      ValueError: for a z of another shape, a temperature that is not above zero, a ``function``
        that returns no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import subspace
      >>> space = subspace.Subspace(jnp.ones(2), jnp.array([[2.0, 0.0]]), jnp.array([4.0]))
      >>> def log_density(params):
      ...     return -params.sum()
      >>> print(subspace.log_likelihood(space, jnp.ones(1), function=log_density, temperature=2.0))
      -2.0
    """
    _check_temperature(temperature)
    if not callable(function):
        raise ValueError(
            f"function is a {type(function).__name__}: give one from weights to the log-likelihood"
        )
    value = function(point(space, z))
    if value is None or jnp.shape(value) != ():
        what = "None" if value is None else f"an array of shape {jnp.shape(value)}"
        raise ValueError(
            f"function returned {what}: return one number, the sum of the log-likelihood over all "
            "data"
        )
    value = widen(jnp.asarray(value))
    return value / jnp.asarray(temperature, value.dtype)


def log_prob(
    space: Subspace,
    z: jax.Array,
    *,
    function: Callable[[Any], jax.Array],
    temperature: chex.Numeric = 1.0,
) -> jax.Array:
    """Log-density of z, ``function(theta(z)) / T + log N(z; 0, I)``, but for a constant.

    What NUTS asks for. Arguments and errors as in ``log_likelihood``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import subspace
      >>> space = subspace.Subspace(jnp.ones(2), jnp.array([[2.0, 0.0]]), jnp.array([4.0]))
      >>> print(f"{subspace.log_prob(space, jnp.zeros(1), function=lambda params: 0.0):.4f}")
      -0.9189
    """
    likelihood = log_likelihood(space, z, function=function, temperature=temperature)
    prior = -(jnp.sum(jnp.square(z)) + len(z) * math.log(2 * math.pi)) / 2
    return likelihood + prior.astype(likelihood.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _pca(state: SWAGState, dim: int, centering: Centering, join: bool) -> Subspace:
    # Of scale 2 the low-rank part of SWAG, scale / 2 * D^T D / (K - 1), is that of the paper.
    posterior = gaussian(state, 2.0, centering, 0.0)
    flat = posterior._replace(variance=[jnp.ones_like(m) for m in posterior.mean])
    groups = pooling.group(flat.mean) if join else pooling.lone(flat.mean)
    variances, vectors = jnp.linalg.eigh(gram(pooled(flat, groups)))
    variances, vectors = variances[::-1][:dim], vectors[:, ::-1][:, :dim]
    rows = contract(_signed(vectors).T, posterior.mixing.T)
    held = [
        x.astype(m.dtype) for x, m in zip(combine(rows, posterior.ring), flat.mean, strict=True)
    ]
    directions = jax.tree.unflatten(jax.tree.structure(state.mean), held)
    origin = jax.tree.map(lambda m: known(state, m), state.mean)
    return Subspace(origin, directions, jnp.maximum(variances, 0))


def _signed(vectors: jax.Array) -> jax.Array:
    """Columns of which the largest entry is positive: eigenvectors have no sign of their own."""
    largest = jnp.take_along_axis(vectors, jnp.abs(vectors).argmax(0)[None], 0)
    return vectors * jnp.where(largest < 0, -1, 1).astype(vectors.dtype)


def _inner(rows: jax.Array, x: jax.Array) -> jax.Array:
    """Inner products of every row with a leaf."""
    return (widen(rows) * x.astype(widen(rows).dtype)[None]).sum(tuple(range(1, rows.ndim)))


def _total(arrays: list[jax.Array]) -> jax.Array:
    dtype = wide_dtype(*[x.dtype for x in arrays])
    return functools.reduce(jnp.add, [x.astype(dtype) for x in arrays])


def _check_space(space: Any) -> None:
    if not isinstance(space, Subspace):
        raise ValueError(
            f"space is a {type(space).__name__}: give what subspace.pca or subspace.random made"
        )


def _check_temperature(temperature: Any) -> None:
    is_number = hasattr(temperature, "shape") or isinstance(temperature, numbers.Real)
    known_value = is_number and not isinstance(temperature, jax.core.Tracer)
    if not is_number or jnp.shape(temperature) != ():
        raise ValueError(f"temperature={temperature!r}: give a finite number above zero")
    if known_value and not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature={temperature!r}: give a finite number above zero")
