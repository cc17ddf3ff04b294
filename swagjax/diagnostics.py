"""Is a posterior to be trusted: checks of what was collected.

``report`` says in words what to do. ``drift``, ``effective_count`` and ``captured_variance``, on
which it rests, read the last K collected iterates, whose inner products, less their mean and in the
order of collection, are a K x K matrix:

    G_ij = (theta_i - mean) . (theta_j - mean),    mean = 1/h sum_i theta_i,  h = min(n, K)

All weights count alike, as they do in the distance between two iterates. The functions are pure
and take one state, ``jax.vmap`` them over members: ``in_axes=swagjax.member_axes(state)``. With
fewer than four iterates they raise ``ValueError``, and give NaN inside ``jit``. The ring is read
2 K times and never copied.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from swagjax import pooling
from swagjax.gaussian import (
    collected,
    contract,
    noise_dtype,
    recentring,
    row_products,
    written,
)
from swagjax.pairing import restrict
from swagjax.summing import nan_is_meant
from swagjax.transform import SWAGState, check_single, get_state, widen

_LEAST = 4  # iterates: of three, the permutations have too few moments
_STILL, _APART, _NARROW, _TRAVELS, _FEW = 1e-5, 1.0, 0.05, 0.5, 10.0  # see report
_ADVICE = {
    "diverged": "lower the learning rate of collecting, or raise it more slowly",
    "still": "collect at a higher learning rate, or use the point: scale=0",
    "apart": "lower the learning rate of collecting; compare the loss at theta_SWA with the last",
    "travelling": "start later, collect for longer, or at a lower learning rate",
    "few": "collect for longer, or at a higher learning rate",
    "settled": "choose the scale on held-out data",
}


class Drift(NamedTuple):
    """Whether the iterates stood around one point, see ``drift``.

    Attributes:
      trend: R^2, the share of the held iterates' scatter along a straight line in time.
      expected: the mean of ``trend`` over all orders of the same iterates, 1 / (h - 1).
      z: ``trend`` less ``expected`` over its standard deviation over all orders.
      shift: squared distance of the held iterates' mean from theta_SWA over what it is in the
        mean over all orders of the n iterates; NaN while n <= K, where there is none.
      spread: variance of the held iterates over that of all, summed over the weights.
      movement: RMS distance of all iterates from theta_SWA, over the norm of theta_SWA.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag(rank=5), jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for t in range(5):  # a straight path, each step like the last
      ...     _, state = tx.update(jnp.full(3, float(t)), state, params)
      >>> drift = swagjax.diagnostics.drift(state)
      >>> print(drift.trend, drift.expected)
      1.0 0.25
    """

    trend: jax.Array
    expected: jax.Array
    z: jax.Array
    shift: jax.Array
    spread: jax.Array
    movement: jax.Array


class EffectiveCount(NamedTuple):
    """How many independent iterates the mean is worth, see ``effective_count``.

    Attributes:
      n_eff: effective number of the n collected iterates, n / time.
      time: integrated autocorrelation time, in collections.
      autocorrelation: shape (K,), at lags 0 to K - 1; NaN from lag h on.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag(rank=40), jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for t in range(40):  # to and fro: their mean is better than that of independent iterates
      ...     _, state = tx.update(jnp.full(3, t % 2.0), state, params)
      >>> found = swagjax.diagnostics.effective_count(state)
      >>> print(bool(found.n_eff > 40), found.autocorrelation[:4].round(2))
      True [ 1. -1.  1. -1.]
    """

    n_eff: jax.Array
    time: jax.Array
    autocorrelation: jax.Array


class CapturedVariance(NamedTuple):
    """How many directions the iterates spread over, see ``captured_variance``.

    Attributes:
      cumulative: shape (K - 1,), the share of the held iterates' variance within the first
        1 ... K - 1 principal directions; NaN from h on, where there are no more.
      effective_dimension: participation ratio of the principal variances, from 1 to h - 1.
      low_rank_share: share of the low-rank part in the variance of the posterior.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag(rank=4), jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for t in range(4):  # along one direction
      ...     _, state = tx.update(jnp.full(3, float(t)), state, params)
      >>> print(swagjax.diagnostics.captured_variance(state).cumulative.round(4))
      [1. 1. 1.]
    """

    cumulative: jax.Array
    effective_dimension: jax.Array
    low_rank_share: jax.Array


class Report(NamedTuple):
    """What the iterates were like, see ``report``.

    Attributes:
      verdict: "settled", "travelling", "still", "apart", "diverged" or "few".
      numbers: on which it rests, as text.
      advice: what to do, as text.

    Example:
      >>> import swagjax
      >>> print(swagjax.diagnostics.Report("still", "movement 0", "raise the learning rate"))
      still: movement 0: raise the learning rate
    """

    verdict: str
    numbers: str
    advice: str

    def __str__(self) -> str:
        """All on one line."""
        return f"{self.verdict}: {self.numbers}: {self.advice}"


def check_iterate(opt_state: Any, params: optax.Params) -> None:
    """Check that the iterate collected last is ``params``: that swag is last in the chain.

    What changes the updates after swag in a chain (weight decay, a projection, a second optimizer)
    makes it collect points that were never visited, which it cannot see from inside. Call this
    once, after a step that collected, outside ``jit``. The iterate is recovered from the state, as
    the mean plus the newest deviation; without deviations that works after the first collection
    only, when the mean is the iterate.

    Args:
      opt_state: the optimizer state after that step, as for ``swagjax.get_state``.
      params: the parameters after that step.

    Raises:
      ValueError: where they differ by more than the rounding of the state; where nothing was
        collected; where a state without deviations has collected more than one iterate; for params
        of another structure.

    Example:
      >>> import jax.numpy as jnp, optax, swagjax
      >>> tx = optax.chain(optax.sgd(0.1), swagjax.swag(rank=2), optax.scale(0.5))  # not last
      >>> params = {"w": jnp.ones(2)}
      >>> updates, opt_state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> swagjax.diagnostics.check_iterate(opt_state, params)
      Traceback (most recent call last):
      ...
      ValueError: the iterate collected last differs from params['w'] by up to 0.05: put swag last
      in the optax.chain, ...
    """
    state = get_state(opt_state)
    if isinstance(state.num_collected, jax.core.Tracer):
        raise ValueError(
            f"opt_state is traced, {state.num_collected}: call check_iterate outside jit"
        )
    check_single(state)
    deviation = jax.tree.leaves(_newest_deviation(state))
    paths = jax.tree.leaves_with_path(restrict(state.mean, params, "params"))
    means = jax.tree.leaves(state.mean)
    for (path, leaf), m, d in zip(paths, means, deviation, strict=True):
        where = f"params{jax.tree_util.keystr(path)}"
        if not jnp.isfinite(leaf).all():
            raise ValueError(
                f"{where} is not finite: such an iterate is never collected, see state.num_skipped"
            )
        error = jnp.abs(widen(m) + widen(d) - leaf)
        if not (error <= _rounding(m, d)).all():  # so that NaN is an error too
            raise ValueError(
                f"the iterate collected last differs from {where} by up to {error.max():.2g}: put "
                "swag last in the optax.chain, and call check_iterate right after a step that "
                "collected"
            )


def drift(state: SWAGState) -> Drift:
    """Do the iterates still travel, or stand still: a posterior too wide and off, or too narrow.

    With c the times 1 ... h less their mean, of norm 1, and S = tr Sigma_diag * n / (n - 1):

        trend    = c^T G c / tr G
        z        = (trend - 1 / (h - 1)) / (standard deviation of trend over all h! orders)
        shift    = |mean_h - theta_SWA|^2 / (S (1/h - 1/n))       (mean_h: of the held iterates)
        spread   = tr G / (h - 1) / S
        movement = (tr Sigma_diag)^(1/2) / |theta_SWA|

    If the iterates are exchangeable, as independent draws are, ``z`` has mean 0 and variance 1
    whatever their distribution (and P(z >= t) <= 1 / (1 + t^2)), ``shift`` and ``spread`` have
    mean 1 over the orders of all n. SGD's iterates are correlated, and then ``z`` is large
    long before the posterior is bad: ``trend`` itself is the size of the effect. Summed over many
    weights it is near

    - 1 / (h - 1) for independent iterates,
    - their autocorrelation time / (h - 1), where that time is far below h; for AR(1) with
      coefficients .3, .5, .7, .9 and h = 20: .09, .14, .23, .43,
    - 3/5 (h^2 + 1) / (h^2 - 1) for a random walk: nothing holds the iterates,
    - 1 for a straight path.

    ``shift`` far above 1 says that theta_SWA is an average over a path behind the iterates: start
    later (for a straight path it nears 3 h, for correlated iterates their autocorrelation time).
    ``spread`` far below 1 says that the held iterates, and with them D, are from a smaller region
    than Sigma_diag: the run has settled, or travels. A ``movement`` near the rounding of the
    dtype, 1e-7, is of iterates that stand still, and then the other numbers are of rounding
    errors, or NaN if none moved at all.

    Args:
      state: what ``swag`` collected.

    Returns:
      Scalars.

    Raises:
      ValueError: for a state without deviations, of rank below 4, with fewer than 4 iterates.

    Example:
      >>> import jax, jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag(rank=10), jnp.zeros(1000)
      >>> def follow(path):  # collect the rows of path
      ...     step = lambda state, x: (tx.update(x, state, params)[1], None)
      ...     return jax.lax.scan(step, tx.init(params), path)[0]
      >>> steps = jax.random.normal(jax.random.key(0), (40, 1000))
      >>> for path in (steps, jnp.cumsum(steps, 0), jnp.cumsum(steps + 9, 0)):
      ...     found = swagjax.diagnostics.drift(follow(path))
      ...     print(*(x.round(1) for x in (found.trend, found.expected, found.shift, found.spread)))
      0.1 0.1 1.0 1.0
      0.6 0.1 14.7 0.3
      1.0 0.1 22.0 0.1

    Source: McArdle, Anderson 2001, "Fitting multivariate models to community data", the statistic
    (time as the one regressor); Kazi-Aoual et al. 1995, "Refined approximations to permutation
    tests for multivariate inference", its moments; Antognini, Sohl-Dickstein 2018
    (arXiv:1806.08805), on random walks of many dimensions.
    """
    _check(state)
    with nan_is_meant():
        return _drift(state)


def effective_count(state: SWAGState) -> EffectiveCount:
    """Effective number of collected iterates, n over the integrated autocorrelation time.

    With the autocorrelations rho_l of the held iterates, pooled over all weights:

        n_eff = n / (1 + 2 sum_l rho_l),  rho_l = (g_l + v) / (g_0 + v)
        g_l   = 1 / (h - l) sum_i G_i,i+l
        v     = 1 / h^2 sum_ij gamma_|i-j|,  gamma_l = g_l + v           (solved for v, v >= 0)

    The mean of the held iterates is no more known than they are, and taking it off lowers every
    autocovariance by its variance v: added back here, so that independent iterates have time 1 at
    any h. Both sums stop before the first pair g_2m + g_2m+1 that is not positive, and at lag
    h / 2 at the latest; n_eff is at most n max(1, log10 n).

    A ring of h sees no correlation that is longer. For AR(1) with coefficient rho the true time is
    (1 + rho) / (1 - rho); over many weights the estimate nears

    ======  =====  ======  ======  =======
    rho     true   h = 10  h = 20  h = 100
    ======  =====  ======  ======  =======
    0       1      1       1       1
    .5      3      1.9     2.6     2.9
    .7      5.7    2.1     3.7     5.2
    .9      19     4.0     6.4     14.4
    ======  =====  ======  ======  =======

    so that a time above h / 10 is a lower bound, and n_eff an upper one. A random walk comes
    out at about .4 h, a straight path at .55 h. Spacing the collections by the time (``every``)
    makes the ring hold independent iterates.

    Args:
      state: what ``swag`` collected. All n iterates are taken to be correlated as the held ones.

    Returns:
      Two scalars and the autocorrelations.

    Raises:
      ValueError: for a state without deviations, of rank below 4, with fewer than 4 iterates.

    Example:
      >>> import jax, jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag(rank=50), jnp.zeros(1000)
      >>> def collect(carry, z):  # AR(1) with coefficient 1/2: a third of the iterates counts
      ...     x, state = carry
      ...     x = 0.5 * x + z
      ...     return (x, tx.update(x, state, params)[1]), None
      >>> steps = jax.random.normal(jax.random.key(0), (90, 1000))
      >>> (_, state), _ = jax.lax.scan(collect, (params, tx.init(params)), steps)
      >>> found = swagjax.diagnostics.effective_count(state)
      >>> print(found.n_eff.round(), found.autocorrelation[:4].round(1))
      33.0 [1.  0.5 0.2 0.1]

    Source: Geyer 1992, "Practical Markov chain Monte Carlo", section 3.3 (initial positive
    sequence); the bound on n_eff is that of Stan.
    """
    _check(state)
    with nan_is_meant():
        return _effective_count(state)


def captured_variance(state: SWAGState) -> CapturedVariance:
    """Over how many directions the iterates spread: would a smaller rank do, or a larger one help.

    With l_1 >= ... >= l_(h-1) the eigenvalues of G, the principal variances of the held iterates
    but for the factor 1 / (h - 1), and D the deviations as they are held:

        cumulative_k        = (l_1 + ... + l_k) / tr G
        effective_dimension = (tr G)^2 / tr G^2
        low_rank_share      = L / (L + tr Sigma_diag),   L = tr D D^T / (h - 1)

    Independent iterates of a broad posterior have ``cumulative_k`` near k / (h - 1) and an
    effective dimension near h - 1: every new iterate is a direction of its own, the ring shows no
    subspace, and one of twice the rank would double it. A curve that is near 1 at a few k says
    that so many directions hold the variance, and a ring of a few times that rank would do; but a
    random walk looks so too, with 1 - 6 / pi^2 = .39 of its variance beyond the first direction:
    see ``drift`` first. ``low_rank_share`` is about 1/2 if the held iterates spread as all do.

    Args:
      state: what ``swag`` collected.

    Returns:
      The shares, shape (K - 1,), and two scalars.

    Raises:
      ValueError: for a state without deviations, of rank below 4, with fewer than 4 iterates.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag(rank=4), jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for x in ([3.0, 0, 0], [-3.0, 0, 0], [0, 1.0, 0], [0, -1.0, 0]):
      ...     _, state = tx.update(jnp.array(x), state, params)
      >>> found = swagjax.diagnostics.captured_variance(state)
      >>> print(found.cumulative.round(4), found.effective_dimension.round(2))
      [0.9 1.  1. ] 1.22
    """
    _check(state)
    with nan_is_meant():
        return _captured_variance(state)


def report(state: SWAGState) -> Report:
    """Say in one word, and in one line of advice, what the collected iterates were like.

    The first of these that holds, with ``drift`` and ``effective_count``:

    ==========  ===============================================  ==================================
    verdict     if                                               the posterior is
    ==========  ===============================================  ==================================
    diverged    an iterate was not finite                        of the others alone
    still       movement < 1e-5                                  too narrow: a point
    apart       movement > 1, or spread < 1/20, or NaN           centred where the loss is high
    travelling  trend > 1/2                                      stretched along the path
    few         n_eff < 10                                       hardly known
    settled     nothing of these                                 what SWAG takes it for
    ==========  ===============================================  ==================================

    The thresholds are rules of thumb: a trend of 1/2 lies between an AR(1) process of coefficient
    .9 and a random walk, and a ``spread`` of 1/20 says that nearly all of the scatter was before
    the last K iterates. They tell nothing of the predictions: compare the held-out loss at
    theta_SWA with that of the weights from before the collection.

    Args:
      state: what ``swag`` collected, outside ``jit``.

    Returns:
      A ``Report``; its string is verdict, numbers and advice.

    Raises:
      ValueError: as ``drift``, and inside ``jit``.

    Example:
      >>> import jax, jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag(rank=10), jnp.zeros(1000)
      >>> step = lambda state, x: (tx.update(1 + x, state, params)[1], None)
      >>> noise = 0.1 * jax.random.normal(jax.random.key(0), (40, 1000))
      >>> print(swagjax.diagnostics.report(jax.lax.scan(step, tx.init(params), noise)[0]))
      settled: trend 0.11 (0.11 if independent), movement 0.099, 40 of 40 iterates effective, ...
      >>> path = jnp.cumsum(noise, 0)
      >>> print(swagjax.diagnostics.report(jax.lax.scan(step, tx.init(params), path)[0]))
      travelling: ...: start later, collect for longer, or at a lower learning rate
    """
    if isinstance(state.num_collected, jax.core.Tracer):
        raise ValueError("state is traced: call report outside jit, or drift inside it")
    found, count = drift(state), effective_count(state)
    movement, trend, spread = (float(x) for x in (found.movement, found.trend, found.spread))
    n_eff, n = float(count.n_eff), int(state.num_collected)
    moved = any(bool((v != 0).any()) for v in jax.tree.leaves(state.variance))
    verdict = next(
        name
        for name, holds in (
            ("diverged", int(state.num_skipped) > 0),
            ("still", movement < _STILL or not moved),
            ("apart", not (movement <= _APART and spread >= _NARROW)),  # so that NaN is apart
            ("travelling", trend > _TRAVELS),
            ("few", not n_eff >= _FEW),
            ("settled", True),
        )
        if holds
    )
    numbers = (
        f"trend {trend:.2f} ({float(found.expected):.2f} if independent), movement {movement:.2g}, "
        f"{n_eff:.0f} of {n} iterates effective, {int(state.num_skipped)} not finite"
    )
    return Report(verdict, numbers, _ADVICE[verdict])


def _newest_deviation(state: SWAGState) -> Any:
    count = int(state.num_collected)
    if count and state.deviations is not None:
        return jax.tree.map(lambda ring: ring[(count - 1) % len(ring)], state.deviations)
    if count == 1:
        return jax.tree.map(jnp.zeros_like, state.mean)
    raise ValueError(
        f"num_collected={count}: the iterate collected last is not known; call check_iterate after "
        "a step that collected, and without deviations (swa, swag_diag) after the first such step"
    )


def _rounding(mean: jax.Array, deviation: jax.Array) -> jax.Array:
    """A bound on what is lost between an iterate and the mean plus its deviation.

    Of the largest weight of a leaf: where the update is applied by another program than the one
    that collects, the two round it apart, and a weight may be much smaller than its update.
    """
    m, d = jnp.abs(widen(mean)), jnp.abs(widen(deviation))
    eps, ring = float(jnp.finfo(mean.dtype).eps), jnp.finfo(deviation.dtype)
    stored = float(ring.eps) * d + float(ring.smallest_subnormal)
    return 4 * eps * jnp.max(m + d, initial=0) + stored


def _check(state: SWAGState) -> None:
    if not isinstance(state, SWAGState):
        raise ValueError(
            f"state is a {type(state).__name__}: give the SWAGState, swagjax.get_state(opt_state)"
        )
    check_single(state)
    ring = jax.tree.leaves(state.deviations)
    if not ring or state.variance is None:
        raise ValueError(
            "the state holds no deviations or no variance (swag_diag, swa, a dropped field): the "
            "diagnostics read the last iterates that swagjax.swag(rank=20) holds"
        )
    if len(ring[0]) < _LEAST:
        raise ValueError(
            f"rank={len(ring[0])}: nothing can be told of fewer than {_LEAST} iterates; collect "
            "with a larger rank, swagjax.swag(rank=20)"
        )
    if not isinstance(state.num_collected, jax.core.Tracer) and int(state.num_collected) < _LEAST:
        raise ValueError(
            f"num_collected={state.num_collected}: nothing can be told of fewer than {_LEAST} "
            "iterates; train on, or collect from an earlier `start` or by a smaller `every`"
        )


@jax.jit
def _drift(state: SWAGState) -> Drift:
    gram, h = _gram(state)
    n, time = state.num_collected.astype(h.dtype), jnp.arange(len(gram), dtype=h.dtype)
    held = (time < h).astype(h.dtype)
    # Less its mean over all orders, C / (h - 1) with C the centring matrix: nothing cancels below.
    centring = jnp.diag(held) - held[:, None] * held[None, :] / h
    excess = gram / jnp.trace(gram) - centring / (h - 1)
    c = held * (time - (h - 1) / 2)
    c = c / jnp.sqrt(jnp.sum(c**2))
    trend = contract(c, contract(excess, c))
    variance = _sum(jax.tree.leaves(state.variance), h.dtype)
    norm = _sum([widen(m) ** 2 for m in jax.tree.leaves(state.mean)], h.dtype)
    apart = row_products(_rings(state), _held_mean(state)[None])[0, 0]
    shift = apart / variance * h * (n - 1) / (n - h)
    movement = jnp.sqrt(variance / norm)
    return Drift(
        trend=trend + 1 / (h - 1),
        expected=1 / (h - 1),
        z=trend / jnp.sqrt(_order_variance(excess, c, h)),
        shift=jnp.where(n > h, shift, jnp.nan),
        spread=jnp.trace(gram) / (h - 1) / variance * (n - 1) / n,
        movement=jnp.where(jnp.isnan(h), jnp.nan, movement),
    )


def _order_variance(excess: jax.Array, c: jax.Array, n: jax.Array) -> jax.Array:
    """Variance of c^T E c over all orders of the entries of c, where E 1 = 0 and tr E = 0.

    That of Kazi-Aoual et al. 1995 for the product of two centred matrices, c c^T and C / (n - 1)
    + E with C the centring matrix: the terms without E cancel.
    """
    square, diagonal = jnp.sum(excess**2), jnp.sum(jnp.diagonal(excess) ** 2)
    spikes = n * (n + 1) * jnp.sum(c**4) - 3 * (n - 1)
    rest = n * (n + 1) * diagonal - 2 * (n - 1) * square
    even = 2 * square / ((n - 1) * (n + 1))
    return even + rest * spikes / ((n + 1) * n * (n - 1) * (n - 2) * (n - 3))


@jax.jit
def _effective_count(state: SWAGState) -> EffectiveCount:
    gram, h = _gram(state)
    n, rank = state.num_collected.astype(h.dtype), len(gram)
    lag = jnp.arange(rank, dtype=h.dtype)
    sums = jnp.stack([jnp.trace(gram, offset) for offset in range(rank)])
    g = jnp.where(lag < h, sums / jnp.maximum(h - lag, 1), jnp.nan)
    used = _initial_positive(g, h)
    pairs = jnp.where(used, jnp.where(lag > 0, 2, 1) * (h - lag), 0)  # of iterates a lag apart
    v = jnp.maximum(jnp.sum(jnp.where(used, pairs * g, 0)) / (h**2 - jnp.sum(pairs)), 0)
    rho = (g + v) / (g[0] + v)
    time = 2 * jnp.sum(jnp.where(used, rho, 0)) - 1
    time = jnp.maximum(time, 1 / jnp.maximum(jnp.log10(n), 1))
    time = jnp.where(jnp.isnan(rho[0]), jnp.nan, time)
    return EffectiveCount(n / time, time, rho)


def _initial_positive(g: jax.Array, h: jax.Array) -> jax.Array:
    """Which lags come before the first pair g_2m + g_2m+1 that is not positive, up to h / 2."""
    pairs = jnp.append(g, jnp.zeros(len(g) % 2, g.dtype)).reshape(-1, 2)
    inside = 2 * jnp.arange(len(pairs), dtype=h.dtype) + 1 <= h / 2
    good = (pairs.sum(1) > 0) & inside
    return jnp.repeat(jnp.cumprod(good).astype(bool), 2)[: len(g)]


@jax.jit
def _captured_variance(state: SWAGState) -> CapturedVariance:
    gram, h = _gram(state)
    share = gram / jnp.trace(gram)
    # Of a matrix of NaN some solvers return none.
    values = jnp.linalg.eigvalsh(jnp.where(jnp.isnan(share), 0, share))[::-1]
    cumulative = jnp.cumsum(jnp.maximum(values, 0))[:-1]
    exists = jnp.arange(1, len(gram), dtype=h.dtype) < jnp.where(jnp.isnan(share[0, 0]), 0, h)
    variance = _sum(jax.tree.leaves(state.variance), h.dtype)
    low_rank = _squares(state, h.dtype) / (h - 1)
    return CapturedVariance(
        cumulative=jnp.where(exists, cumulative, jnp.nan),
        effective_dimension=1 / jnp.sum(share**2),
        low_rank_share=low_rank / (low_rank + variance),
    )


def _gram(state: SWAGState) -> tuple[jax.Array, jax.Array]:
    """G in the order of collection, zero beyond the iterates held, and their number h.

    Both are NaN where there are fewer than can be read.
    """
    rank, dtype = len(jax.tree.leaves(state.deviations)[0]), noise_dtype(state)
    number = collected(state.num_collected, rank)
    centred = recentring(state.num_collected, rank, dtype) - _held_mean(state)[None, :]
    # Rows not yet written come last. They stay zero: until all are, the two means are the same.
    order = jnp.argsort(jnp.where(number > 0, number, jnp.iinfo(number.dtype).max))
    held = jnp.minimum(state.num_collected, rank)
    h = jnp.where(held >= _LEAST, held.astype(dtype), jnp.nan)
    return jnp.where(jnp.isnan(h), jnp.nan, row_products(_rings(state), centred[order])), h


def _held_mean(state: SWAGState) -> jax.Array:
    """Weights of the rows of the ring, (K,), that make the held iterates' mean less theta_SWA."""
    rank, dtype = len(jax.tree.leaves(state.deviations)[0]), noise_dtype(state)
    held = collected(state.num_collected, rank) > 0
    average = held.astype(dtype) / jnp.maximum(jnp.sum(held), 1).astype(dtype)
    return contract(average, recentring(state.num_collected, rank, dtype))


def _squares(state: SWAGState, dtype: Any) -> jax.Array:
    """Sum of the squares of the deviations in use."""
    rows = [jnp.sum(widen(ring) ** 2, range(1, ring.ndim)) for ring in _rings(state)]
    rank = len(rows[0])
    held = jnp.diagonal(written(state.num_collected, rank, dtype))
    return jnp.sum(held * functools.reduce(jnp.add, [x.astype(dtype) for x in rows]))


def _rings(state: SWAGState) -> list[jax.Array]:
    """The rings of all leaves, the small ones joined where that moves nothing between devices."""
    rings, means = jax.tree.leaves(state.deviations), jax.tree.leaves(state.mean)
    groups = pooling.group(rings) if pooling.whole(means) else pooling.lone(rings)
    return pooling.pool(rings, groups, lead=1)


def _sum(arrays: list[jax.Array], dtype: Any) -> jax.Array:
    """Sum over all elements of all arrays."""
    return functools.reduce(jnp.add, [widen(x).sum().astype(dtype) for x in arrays])
