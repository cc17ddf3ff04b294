"""A state read as a Gaussian over the weights: moments, samples, densities.

With K deviations held, theta_SWA, Sigma_diag and D as in ``swagjax.SWAGState``:

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
import numbers
from typing import Any

import chex
import jax
import jax.numpy as jnp

from swagjax import pooling, prng
from swagjax.gaussian import (
    Centering,
    Gaussian,
    capacitance,
    combine,
    contract,
    divide,
    gaussian,
    gram,
    known,
    log_det,
    log_det_capacitance,
    noise_dtype,
    pooled,
    product,
    recentring,
    size,
    sqrt,
    total,
)
from swagjax.pairing import dtypes, fill, restrict
from swagjax.transform import SWAGState, check_single, widen


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
      ValueError: the state has collected no iterate (num_collected=0 after num_updates=0...
    """
    check_collected(state)
    return _mean(state)


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
      like: parameters. The sample takes their dtypes, and for leaves that the state does not hold
        (``None`` or ``optax.MaskedNode`` there: masked, frozen, a function of an equinox module)
        what stands in ``like``, untouched.

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
    cast = None if like is None else dtypes(state.mean, like)
    theta = _sample(prng.one_key(key), state, scale, min_variance, centering=centering, cast=cast)
    return theta if like is None else fill(theta, like)


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
    z1 = restrict(state.mean, z1, "z1")
    _check_noise(state, z2)
    z2 = None if z2 is None else jnp.asarray(z2)
    cast = None if like is None else dtypes(state.mean, like)
    theta = _from_noise(state, z1, z2, scale, min_variance, centering=centering, cast=cast)
    return theta if like is None else fill(theta, like)


def iterates(state: SWAGState, *, like: Any = None) -> Any:
    """The collected iterates themselves, as far as the ring holds them: the last K of n.

    ``theta_i = theta_SWA + d_i - sum_{i < j <= n} d_j / (j - 1)`` with d_i the running deviations:
    exact but for rounding. Around 1 in float32 the error is 4 units in the last place at worst for
    a ring of 20, 11 for one of 100; in a ring of bfloat16 it is 1 % of the distance to theta_SWA.
    Nothing is collected beside what SWAG collects; with a ``rank`` of at least n these are all of
    the iterates. By ``swagjax.ensemble.Points`` they are a posterior for ``predict``: a fast
    geometric ensemble, if they are the snapshots of a cyclical learning rate.

    Args:
      state: what ``swag`` collected. After ``merge`` the iterates of both halves.
      like: as in ``sample``; numbers that the state does not hold are repeated for every iterate.

    Returns:
      A tree like the parameters, with leaves of shape ``(K, *leaf.shape)``, from the oldest to the
      newest; K is the smaller of ``num_collected`` and ``rank``. Inside ``jit``, where it is not
      known, always ``rank`` of them, with NaN in place of those that were not collected.

    Raises:
      ValueError: for a state without deviations, or one that has collected nothing.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax.posterior import iterates
      >>> tx, params = swagjax.swag(rank=3), jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0, 4.0, 8.0):
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> print(iterates(state).T)
      [[3. 4. 8.]]

    Source: fast geometric ensembles, Garipov et al. 2018 (arXiv:1802.10026), algorithm 2.
    """
    check_collected(state)
    rank = _rank(state)
    if not rank:
        raise ValueError(
            "the state holds no deviations, and its iterates cannot be told from their mean: "
            "collect by swagjax.swag(rank), with a rank of at least the number wanted"
        )
    number = min(rank, int(state.num_collected)) if _concrete(state.num_collected) else rank
    thetas = _iterates(state, number)
    return thetas if like is None else fill(thetas, like, repeats=number)


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
    C = I + W^T V^-1 W (K x K; Woodbury's identity and the determinant lemma):

        -1/2 (r^T V^-1 r - (W^T V^-1 r)^T C^-1 (W^T V^-1 r) + log|V| + log|C| + P log 2 pi)

    Where a coordinate of V is zero the density is degenerate: +inf if params agree with theta_SWA
    in all such coordinates, -inf otherwise; ``min_variance`` is the way out. In float32 the value
    itself has seven digits: for 10^7 weights it is near 10^8, and known to about 10. Compare two
    points by ``log_prob_difference``.

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
    params = restrict(state.mean, params, "params")
    density: jax.Array = _log_prob(
        state, params, scale, min_variance, centering=centering, join=_joinable(state)
    )
    return density


def log_prob_difference(
    state: SWAGState,
    params: Any,
    reference: Any,
    *,
    scale: chex.Numeric = 1.0,
    centering: Centering = "running",
    min_variance: chex.Numeric = 0.0,
) -> jax.Array:
    """Log-density at ``params`` less that at ``reference``, in nats, without cancellation.

    With a and b the two, ``-1/2 (a - b)^T Sigma^-1 (a + b - 2 theta_SWA)``. For 10^7 weights the
    densities themselves are near 10^8, where float32 has a spacing of 8; their difference computed
    so is right to about 1e-3 in nats and 1e-6 of itself.

    Args:
      state: what a transformation collected.
      params: a tree like the parameters; leaves that the state does not hold are passed over.
      reference: likewise.
      scale: factor of the covariance.
      centering: ``"running"`` or ``"final"``.
      min_variance: floor under Sigma_diag.

    Returns:
      A scalar; infinite where one of the two lies off theta_SWA in a coordinate of variance zero,
      NaN where both do.

    Raises:
      ValueError: as ``log_prob``.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag_diag(), jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0):
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> print(swagjax.log_prob_difference(state, jnp.array([2.0]), jnp.array([4.0])))  # N(2, 1)
      2.0
    """
    _check(state, scale, centering, min_variance)
    params = restrict(state.mean, params, "params")
    reference = restrict(state.mean, reference, "reference")
    difference: jax.Array = _log_prob_difference(
        state, params, reference, scale, min_variance, centering=centering, join=_joinable(state)
    )
    return difference


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
    nats: jax.Array = _entropy(
        state, scale, min_variance, centering=centering, join=_joinable(state)
    )
    return nats


def kl(
    state: SWAGState,
    other: SWAGState,
    *,
    scale: chex.Numeric = 1.0,
    centering: Centering = "running",
    min_variance: chex.Numeric = 0.0,
) -> jax.Array:
    """Kullback-Leibler divergence KL(state || other) of two posteriors, in nats.

    With N(m, S) that of ``state`` and N(n, T) that of ``other``, over P weights:

        1/2 (tr(T^-1 S) + (m - n)^T T^-1 (m - n) - P + log|T| - log|S|)

    The two may be of different kinds (SWAG against SWAG-Diag) and rank; the options hold for both.
    The terms are summed per weight, so that two posteriors that are nearly the same have a
    divergence of few rounding errors. A coordinate in which both have variance zero counts as no
    dimension while they agree on it; one in which they do not agree, or in which one alone has
    variance zero, makes the divergence infinite.

    Args:
      state: the posterior that the expectation is taken over.
      other: the posterior it is compared with, over the same parameters.
      scale: factor of both covariances.
      centering: ``"running"`` or ``"final"``.
      min_variance: floor under both Sigma_diag.

    Returns:
      A scalar, at least zero but for rounding.

    Raises:
      ValueError: for states of other structure or shape, a bad option, an empty state.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag_diag(), jnp.array([0.0])
      >>> state = other = tx.init(params)
      >>> for update in (1.0, 3.0):  # N(2, 1)
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> for update in (3.0, 5.0):  # N(4, 1)
      ...     _, other = tx.update(jnp.array([update]), other, params)
      >>> print(swagjax.kl(state, other), swagjax.kl(state, state))
      2.0 0.0
    """
    _check(state, scale, centering, min_variance)
    check_collected(other)
    restrict(state.mean, other.mean, "other.mean")
    restrict(other.mean, state.mean, "state.mean")
    divergence: jax.Array = _kl(
        state, other, scale, min_variance, centering=centering, join=_joinable(state, other)
    )
    return divergence


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
    check_single(state)
    # As an int, which is never staged into a trace.
    if _concrete(state.num_collected) and int(state.num_collected) == 0:
        raise ValueError(
            f"the state has collected no iterate (num_collected={state.num_collected} after "
            f"num_updates={state.num_updates}, num_skipped={state.num_skipped} that were not "
            "finite): train past `start` until `every` or `when` comes round"
        )


@jax.jit
def _mean(state: SWAGState) -> Any:
    return jax.tree.map(lambda m: known(state, m), state.mean)


@functools.partial(jax.jit, static_argnames="centering")
def _variance(
    state: SWAGState,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
) -> Any:
    posterior = gaussian(state, scale, centering, min_variance)

    def low_rank(ring: jax.Array) -> Any:
        if centering == "running":  # M is diagonal: a reduction, where the product copies the ring
            weights = jnp.diagonal(posterior.mixing) ** 2
            shape = (-1, *(1,) * (ring.ndim - 1))
            return (weights.reshape(shape) * widen(ring) ** 2).sum(0)
        return (contract(posterior.mixing.T, widen(ring)) ** 2).sum(0)

    leaves = posterior.variance
    if posterior.ring:
        pairs = zip(leaves, posterior.ring, strict=True)
        leaves = [v + low_rank(ring).astype(v.dtype) for v, ring in pairs]
    return jax.tree.unflatten(jax.tree.structure(state.mean), leaves)


@functools.partial(jax.jit, static_argnames=("centering", "cast"))
def _sample(
    key: jax.Array,
    state: SWAGState,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
    cast: tuple[Any, ...] | None,
) -> Any:
    key1, key2 = jax.random.split(key)
    z1 = prng.normal_like(key1, jax.tree.map(widen, state.mean))
    rank, dtype = _rank(state), noise_dtype(state)
    z2 = prng.normal(key2, (rank,), dtype) if rank else None
    return _from_noise(state, z1, z2, scale, min_variance, centering=centering, cast=cast)


@functools.partial(jax.jit, static_argnames=("centering", "cast"))
def _from_noise(
    state: SWAGState,
    z1: Any,
    z2: jax.Array | None,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
    cast: tuple[Any, ...] | None,
) -> Any:
    posterior = gaussian(state, scale, centering, min_variance)
    noise = zip(posterior.mean, posterior.variance, jax.tree.leaves(z1), strict=True)
    leaves = [m + sqrt(v) * z for m, v, z in noise]
    if z2 is not None:
        shifts = combine(contract(posterior.mixing, z2), posterior.ring)
        leaves = [x + w.astype(x.dtype) for x, w in zip(leaves, shifts, strict=True)]
    means, treedef = jax.tree.flatten(state.mean)
    wanted = [m.dtype for m in means] if cast is None else cast
    leaves = [x.astype(dtype) for x, dtype in zip(leaves, wanted, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


@functools.partial(jax.jit, static_argnums=1)
def _iterates(state: SWAGState, number: int) -> Any:
    rank = _rank(state)
    # Where the ring has gone round, its oldest row is the next to be overwritten.
    oldest = jnp.where(state.num_collected > rank, state.num_collected % rank, 0)
    order = jnp.arange(number, dtype=state.num_collected.dtype)
    weights = recentring(state.num_collected, rank, noise_dtype(state))[(oldest + order) % rank]
    held = order < state.num_collected

    def added(m: jax.Array, ring: jax.Array) -> jax.Array:
        theta = widen(m)[None] + contract(weights, widen(ring)).astype(widen(m).dtype)
        there = held.reshape(-1, *(1,) * m.ndim)
        return jnp.where(there, theta, jnp.nan).astype(m.dtype)

    return jax.tree.map(added, state.mean, state.deviations)


@functools.partial(jax.jit, static_argnames=("centering", "join"))
def _log_prob(
    state: SWAGState,
    params: Any,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
    join: bool,
) -> jax.Array:
    posterior, (params,) = _pooled(state, scale, centering, min_variance, join, params)
    factor = capacitance(posterior)
    residual = _subtract(params, posterior.mean)
    distance = product(posterior, factor, residual, residual)
    constant = size(posterior) * math.log(2 * math.pi)
    density = -(distance + log_det(posterior, factor) + constant) / 2
    # Off the mean in a direction of no variance: infinitely far.
    return jnp.where(_any_stray(posterior.variance, residual), -jnp.inf, density)


@functools.partial(jax.jit, static_argnames=("centering", "join"))
def _log_prob_difference(
    state: SWAGState,
    params: Any,
    reference: Any,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
    join: bool,
) -> jax.Array:
    posterior, (a, b) = _pooled(state, scale, centering, min_variance, join, params, reference)
    to_a, to_b = _subtract(a, posterior.mean), _subtract(b, posterior.mean)
    both = [x + y for x, y in zip(to_a, to_b, strict=True)]
    difference = -product(posterior, capacitance(posterior), _subtract(a, b), both) / 2
    stray_a, stray_b = (_any_stray(posterior.variance, x) for x in (to_a, to_b))
    difference = jnp.where(stray_b, jnp.inf, jnp.where(stray_a, -jnp.inf, difference))
    return jnp.where(stray_a & stray_b, jnp.nan, difference)


@functools.partial(jax.jit, static_argnames=("centering", "join"))
def _entropy(
    state: SWAGState,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
    join: bool,
) -> jax.Array:
    posterior, _ = _pooled(state, scale, centering, min_variance, join)
    constant = size(posterior) * (1 + math.log(2 * math.pi))
    return (constant + log_det(posterior, capacitance(posterior))) / 2


@functools.partial(jax.jit, static_argnames=("centering", "join"))
def _kl(
    state: SWAGState,
    other: SWAGState,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
    join: bool,
) -> jax.Array:
    p, _ = _pooled(state, scale, centering, min_variance, join)
    q, _ = _pooled(other, scale, centering, min_variance, join)
    factor = capacitance(q)
    shift = _subtract(p.mean, q.mean)
    ratios = [divide(v, u) for v, u in zip(p.variance, q.variance, strict=True)]
    terms = [
        total([_excess(v, u) for v, u in zip(p.variance, q.variance, strict=True)]),
        product(q, factor, shift, shift),
        _trace_of_low_rank(p, q, factor) - _trace_of_projection(q, factor, ratios),
        log_det_capacitance(factor) - log_det_capacitance(capacitance(p)),
    ]
    divergence = total(terms) / 2
    uneven = [(v == 0) != (u == 0) for v, u in zip(p.variance, q.variance, strict=True)]
    apart = _any([x.any() for x in uneven]) | _any_stray(q.variance, shift)
    return jnp.where(apart, jnp.inf, divergence)


def _excess(v: jax.Array, u: jax.Array) -> jax.Array:
    """Of x = v / u, x - 1 - log x without cancellation near 1; nothing where u is zero."""
    v, u = jnp.where(u == 0, 1, v), jnp.where(u == 0, 1, u)  # before the logarithms' slopes
    excess = v / u - 1
    near = jnp.abs(excess) < 0.5
    return excess - jnp.where(near, jnp.log1p(jnp.where(near, excess, 0)), jnp.log(v) - jnp.log(u))


def _trace_of_low_rank(p: Gaussian, q: Gaussian, factor: jax.Array) -> jax.Array:
    """tr(Sigma_q^-1 W_p W_p^T), a column of W_p at a time."""
    if not p.ring:
        return jnp.zeros((), factor.dtype)

    def column(weights: jax.Array) -> jax.Array:
        w = [x.astype(m.dtype) for x, m in zip(combine(weights, p.ring), p.mean, strict=True)]
        return product(q, factor, w, w)

    quadratics: jax.Array = jax.lax.map(column, p.mixing.T)
    return quadratics.sum()


def _trace_of_projection(q: Gaussian, factor: jax.Array, ratios: list[jax.Array]) -> jax.Array:
    """tr(V_p (V_q^-1 - Sigma_q^-1)) = tr(C_q^-1 W_q^T V_q^-1 V_p V_q^-1 W_q)."""
    if not q.ring:
        return jnp.zeros((), factor.dtype)
    weighted = q._replace(variance=[divide(v, r) for v, r in zip(q.variance, ratios, strict=True)])
    solution = jax.scipy.linalg.cho_solve((factor, True), gram(weighted))
    return jnp.trace(solution)


def _pooled(
    state: SWAGState,
    scale: chex.Numeric,
    centering: Centering,
    min_variance: chex.Numeric,
    join: bool,
    *trees: Any,
) -> tuple[Gaussian, list[list[jax.Array]]]:
    """The Gaussian of a state and trees like its mean, as lists of few arrays."""
    posterior = gaussian(state, scale, centering, min_variance)
    groups = pooling.group(posterior.mean) if join else pooling.lone(posterior.mean)
    return pooled(posterior, groups), [
        pooling.pool(jax.tree.leaves(tree), groups) for tree in trees
    ]


def _joinable(*states: SWAGState) -> bool:
    """Whether small leaves can be joined: a network of hundreds compiles ten times faster so."""
    return pooling.whole(jax.tree.leaves([state.mean for state in states]))


def _subtract(x: list[jax.Array], y: list[jax.Array]) -> list[jax.Array]:
    return [a - b for a, b in zip(x, y, strict=True)]


def _any_stray(variance: list[jax.Array], residual: list[jax.Array]) -> jax.Array:
    """Whether a coordinate without variance is off the mean."""
    pairs = zip(variance, residual, strict=True)
    return _any([((v == 0) & (r != 0)).any() for v, r in pairs])


def _any(flags: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_or, flags, jnp.array(False))


def _rank(state: SWAGState) -> int:
    return next((ring.shape[0] for ring in jax.tree.leaves(state.deviations)), 0)


def _check(
    state: SWAGState, scale: chex.Numeric, centering: str, min_variance: chex.Numeric
) -> None:
    check_collected(state)
    if centering not in ("running", "final"):
        raise ValueError(f"centering={centering!r}: give 'running' or 'final'")
    for name, value in (("scale", scale), ("min_variance", min_variance)):
        if not _is_factor(value):
            raise ValueError(f"{name}={value!r}: give a finite number of at least zero")


def _is_factor(value: Any) -> bool:
    """Whether a value is a finite number of at least zero, as far as a trace can tell."""
    is_number = hasattr(value, "shape") or isinstance(value, numbers.Real)
    if not is_number or jnp.shape(value) != ():
        return False
    return not _concrete(value) or 0 <= float(value) < math.inf


def _check_noise(state: SWAGState, z2: jax.Array | None) -> None:
    wanted = (_rank(state),) if _rank(state) else None
    shape = None if z2 is None else jnp.shape(z2)
    if shape != wanted:
        raise ValueError(f"z2 has shape {shape}: the ring of this state asks for {wanted}")


def _concrete(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer)
