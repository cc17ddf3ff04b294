"""Constant-step SGD as a sampler: its noise, its best step, its stationary distribution.

Notation of the whole module. The loss of one example is minus its log-likelihood plus 1/N of minus
the log-prior, in nats, so that the mean loss L over all N examples is -1/N of the log posterior. At
its minimum theta* the Hessian of L is A, and the posterior is about ``N(theta*, (N A)^-1)``. The
gradient of one example drawn at random has the covariance C. SGD steps by the mean gradient of a
minibatch of S examples drawn **with replacement**, whose covariance is C / S:

    theta <- theta - eps (A (theta - theta*) + noise),     Cov(noise) = C / S

- A squared error is divided by twice the variance of the targets' noise: then C = A where the model
  is right. Where it is not, averages of iterates have the covariance A^-1 C A^-1 / N, the
  *sandwich*, in place of the posterior's. A prior adds to A and not to C.
- The gradients of a shuffled pass are not independent: their noise cancels over the epoch, and the
  iterates spread by less than is said here.

    >>> import jax, jax.numpy as jnp, optax
    >>> from swagjax import constant_sgd
    >>> x = jax.random.normal(jax.random.key(0), (500, 3))
    >>> y = x @ jnp.array([1.0, -1.0, 0.0]) + jax.random.normal(jax.random.key(1), (500,))
    >>> loss = lambda params, example: (example[0] @ params - example[1]) ** 2 / 2  # flat prior
    >>> optimum = jnp.linalg.lstsq(x, y)[0]
    >>> noise = constant_sgd.gradient_noise(loss, optimum, [(x, y)])
    >>> step = constant_sgd.optimal_step_size(noise, num_data=500, batch_size=5)
    >>> round(float(step), 2)  # 2 S / N, as inputs and noise have variance 1
    0.02

Source: Mandt, Hoffman, Blei (2017), "Stochastic Gradient Descent as Approximate Bayesian
Inference", arXiv:1704.04289. The formulas are derived anew where they stand.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from swagjax.transform import SWAGState, check_integer, swa, wide_dtype, widen

Loss = Callable[[Any, Any], ArrayLike]

_MAX_DENSE = 10_000  # parameters; their covariance takes 400 MB in float32


class GradientNoise(NamedTuple):
    """Moments of the gradients of single examples.

    Attributes:
      count: examples seen, an int32 scalar.
      mean: their mean gradient, a tree like the parameters; zero at the minimum of the loss.
      variance: the diagonal of C, a tree like the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import constant_sgd
      >>> print(constant_sgd.GradientNoise(100, jnp.zeros(2), jnp.array([1.0, 4.0])).trace)
      5.0
    """

    count: Any  # a jax.Array; annotated so, it would clash with tuple.count
    mean: Any
    variance: Any

    @property
    def trace(self) -> jax.Array:
        """The trace of C."""
        sums = [v.sum() for v in jax.tree.leaves(self.variance)]
        return functools.reduce(jnp.add, _common(*sums))


def gradient_noise(loss: Loss, params: Any, batches: Iterable[Any]) -> GradientNoise:
    """Mean and variance of per-example gradients, streamed; nothing of the size D x D is formed.

    ``C_kk = 1/n sum_i (g_ik - mean_k)^2``, with g_i the gradient of ``loss(params, example_i)``,
    best taken near the minimum. The same function object ``loss`` compiles once.

    Args:
      loss: of the parameters and one example, to a scalar in nats.
      params: a tree of D numbers in all.
      batches: trees of arrays ``(examples, ...)``: ``[(x, y)]`` for a single one. The gradients of
        one batch are in memory at a time; how the examples are cut changes nothing but rounding.

    Returns:
      A ``GradientNoise``, float32 at the least.

    Raises:
      ValueError: no batches, an empty or ragged one, a loss that is no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import constant_sgd
      >>> loss = lambda params, x: params["w"] * x
      >>> batches = [jnp.array([1.0, 3.0]), jnp.array([5.0])]
      >>> noise = constant_sgd.gradient_noise(loss, {"w": jnp.array(0.0)}, batches)
      >>> int(noise.count), float(noise.mean["w"]), round(float(noise.trace), 3)
      (3, 3.0, 2.667)
    """
    count, mean, squares = _stream(_Moments(loss, _squares), params, batches)
    return GradientNoise(count, mean, jax.tree.map(lambda s: s / count.astype(s.dtype), squares))


def gradient_covariance(loss: Loss, params: Any, batches: Iterable[Any]) -> jax.Array:
    """All of C, ``(D, D)``, in the order of ``jax.flatten_util.ravel_pytree``: for small D.

    Arguments and errors as in ``gradient_noise``, and ``ValueError`` above 10,000 parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import constant_sgd
      >>> x = jnp.array([[1.0, 2.0], [-1.0, -2.0]])
      >>> print(constant_sgd.gradient_covariance(lambda params, x: params @ x, jnp.zeros(2), [x]))
      [[1. 2.]
       [2. 4.]]
    """
    size = _size(params)
    if size > _MAX_DENSE:
        raise ValueError(
            f"params hold {size} numbers, and their covariance the square of it: this is for at "
            f"most {_MAX_DENSE}; gradient_noise gives its diagonal and its trace"
        )
    count, _, products = _stream(_Moments(loss, _outer_products), params, batches)
    return jnp.asarray(products / count.astype(products.dtype))


def optimal_step_size(
    noise: GradientNoise, num_data: int, batch_size: int, momentum: float = 0.0
) -> jax.Array:
    """The step whose iterates are closest to the posterior in KL: ``2 (1 - m) S D / (N tr C)``.

    For small steps Sigma of the iterates solves ``A Sigma + Sigma A = eps/S C``. So it is
    proportional to eps, ``tr(A Sigma) = eps/(2 S) tr C``, and the KL has its minimum there:

        KL(N(., Sigma) || N(., (N A)^-1)) = 1/2 (N tr(A Sigma) - D - log det(N A Sigma))
                                          = 1/2 (eps N/(2 S) tr C - D log eps) + const

    With momentum m each gradient moves the iterate 1 / (1 - m) times as far in the end. As steps
    are finite the best one is smaller than that, by a part of at most about ``eps lambda_max(A)``.

    Args:
      noise: from ``gradient_noise``; D is the number of its coordinates.
      num_data: N.
      batch_size: S.
      momentum: m of ``optax.sgd(step, momentum=m)``, in [0, 1).

    Returns:
      A scalar; infinite where no gradient varies.

    Raises:
      ValueError: for a bad number.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import constant_sgd
      >>> noise = constant_sgd.GradientNoise(100, jnp.zeros(4), jnp.full(4, 2.0))
      >>> step = constant_sgd.optimal_step_size(noise, num_data=1000, batch_size=10, momentum=0.9)
      >>> round(float(step), 6)
      0.001
    """
    _check_noise(noise)
    _check_momentum(momentum)
    step = _factor(num_data, batch_size) * _size(noise.variance) / noise.trace
    return jnp.asarray((1 - momentum) * step)


class PreconditionerState(NamedTuple):
    """H: its diagonal as a tree like the parameters, or all of it as a ``(D, D)`` matrix.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx = swagjax.constant_sgd.scale_by_covariance(jnp.eye(2), num_data=200, batch_size=100)
      >>> print(tx.init(jnp.zeros(2)).preconditioner)
      [[1. 0.]
       [0. 1.]]
    """

    preconditioner: Any


def scale_by_variance(
    noise: GradientNoise, num_data: int, batch_size: int, *, damping: float = 0.0
) -> optax.GradientTransformation:
    """Scale the gradient by ``H = diag(2 S / (N C_kk))``, the diagonal preconditioner.

    Followed by ``optax.sgd(1.0)``, or ``optax.sgd(1 - m, momentum=m)``. For small steps Sigma
    solves ``H A Sigma + Sigma A H = H C H / S``. If C = c A it is ``c/(2 S) H``, and
    ``2 KL = N c/(2 S) tr(H A) - log det H + const`` is least at this H: then ``Sigma_kk =
    1 / (N A_kk)``, the optimum of mean-field variational inference. So it is if A and C are both
    diagonal. For others it is a rule of thumb, which can be worse than the best scalar step.

    Args:
      noise: from ``gradient_noise``.
      num_data: N.
      batch_size: S.
      damping: added to every C_kk; where one is 0, as of a dead unit, H is infinite without it.

    Returns:
      A gradient transformation, with H in its state.

    Raises:
      ValueError: for a bad number; by ``init`` for other parameters than those of ``noise``, and
        outside ``jit`` where H is not finite.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from swagjax import constant_sgd
      >>> noise = constant_sgd.GradientNoise(100, jnp.zeros(2), jnp.array([1.0, 4.0]))
      >>> scale = constant_sgd.scale_by_variance(noise, num_data=100, batch_size=5)
      >>> tx = optax.chain(scale, optax.sgd(1.0))
      >>> print(tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))[0])
      [-0.1   -0.025]
    """
    _check_noise(noise)
    factor = _factor(num_data, batch_size)
    if not isinstance(damping, jax.core.Tracer) and not 0 <= damping < math.inf:
        raise ValueError(f"damping={damping!r}: give a finite number of at least 0")

    def init_fn(params: optax.Params) -> PreconditionerState:
        shapes, own = (jax.tree.map(jnp.shape, tree) for tree in (params, noise.variance))
        if shapes != own:
            raise ValueError(f"noise is of parameters of shapes {own}, and these are {shapes}")
        scale = jax.tree.map(lambda v: factor / (v + damping), noise.variance)
        return _checked(scale, f"damping={damping}: some variance is zero, give more than that")

    def update_fn(updates: optax.Updates, state: Any, params: Any = None) -> Any:
        del params
        # In the precision of H, and back.
        scaled = jax.tree.map(_times, updates, state.preconditioner)
        return scaled, state

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_covariance(
    covariance: ArrayLike, num_data: int, batch_size: int
) -> optax.GradientTransformation:
    """Multiply the gradient by ``H = 2 S / N C^-1``, the full preconditioner: for small D.

    Followed by ``optax.sgd(1.0)``, or ``optax.sgd(1 - m, momentum=m)``. For small steps Sigma
    solves ``H A Sigma + Sigma A H = H C H / S = 2/N H``, and ``Sigma = A^-1 / N`` does: the
    posterior's own covariance, whatever A and C are. The steps being finite, Sigma is larger by a
    part of about S / N; if C = A it is ``A^-1 / (N - S)``.

    Args:
      covariance: C, ``(D, D)``, from ``gradient_covariance``.
      num_data: N.
      batch_size: S.

    Returns:
      A gradient transformation, with H in its state.

    Raises:
      ValueError: for a bad number; by ``init`` for another number of parameters, and outside
        ``jit`` where C is singular, as it is of fewer than D examples.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from swagjax import constant_sgd
      >>> C = jnp.array([[4.0, 2.0], [2.0, 2.0]])
      >>> tx = optax.chain(constant_sgd.scale_by_covariance(C, 100, 50), optax.sgd(1.0))
      >>> print(tx.update(jnp.array([2.0, 0.0]), tx.init(jnp.zeros(2)))[0])
      [-1.  1.]
    """
    matrix = jnp.asarray(covariance) / _factor(num_data, batch_size)

    def init_fn(params: optax.Params) -> PreconditionerState:
        if matrix.shape != (_size(params),) * 2:
            raise ValueError(
                f"covariance has shape {matrix.shape}, and the parameters are {_size(params)}"
            )
        cholesky = jnp.linalg.cholesky(matrix)
        H = jax.scipy.linalg.cho_solve((cholesky, True), jnp.eye(len(matrix), dtype=matrix.dtype))
        return _checked(H, "covariance is not positive definite: add to its diagonal")

    def update_fn(updates: optax.Updates, state: Any, params: Any = None) -> Any:
        del params
        H = state.preconditioner
        # In the precision of H, and back.
        flat, unravel = ravel_pytree(jax.tree.map(lambda g: g.astype(H.dtype), updates))
        moved = unravel(jnp.matmul(H, flat, precision=jax.lax.Precision.HIGHEST))
        return jax.tree.map(lambda x, g: x.astype(g.dtype), moved, updates), state

    return optax.GradientTransformation(init_fn, update_fn)


def iterate_average(window: int) -> optax.GradientTransformationExtraArgs:
    """Average the iterates of each ``window`` steps: ``swa`` that starts anew after every window.

    After every ``window``-th step ``swagjax.mean(get_state(opt_state))`` is the average of the last
    ``window`` iterates: one sample. Last in the chain, as ``swa``. With windows of an epoch, N / S
    steps, the samples have about the covariance of the sandwich, whatever the step, momentum and
    preconditioner, if a window is far longer than ``1 / (eps lambda_min(A))`` steps: see
    ``averaged_covariance``.

    Args:
      window: steps of a window.

    Returns:
      A gradient transformation with the state of ``swa``, that passes the updates through.

    Raises:
      ValueError: ``window`` below 1; by ``init`` and ``update`` as ``swa``.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax import constant_sgd
      >>> tx = constant_sgd.iterate_average(window=2)
      >>> params = jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0, 5.0, 7.0):
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> print(swagjax.mean(state))  # of 5 and 7
      [6.]
    """
    window, inner = check_integer("window", window, 1), swa()

    def update_fn(updates: optax.Updates, state: Any, params: Any = None, **extra: Any) -> Any:
        if isinstance(state, SWAGState):  # any other is refused by swa
            count = jnp.where(state.num_updates % window == 0, 0, state.num_collected)
            state = state._replace(num_collected=count)
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def stationary_covariance(
    hessian: ArrayLike,
    noise_covariance: ArrayLike,
    step_size: ArrayLike,
    batch_size: int,
    *,
    momentum: float = 0.0,
    preconditioner: ArrayLike | None = None,
) -> jax.Array:
    """Sigma of the iterates of ``theta <- theta - eps H gradient``, exact for a quadratic loss.

    Without momentum, of the discrete Lyapunov equation, whose limit of small steps is
    ``H A Sigma + Sigma A H = eps/S H C H``:

        Sigma = (I - eps H A) Sigma (I - eps A H) + eps^2/S H C H

    In a basis B with ``B^T A B = diag(a)`` and ``B B^T = H`` coordinates couple in pairs alone, as
    ``x_i(t+1) = k_i x_i(t) - m x_i(t-1) + noise_i`` with ``k_i = 1 + m - eps a_i`` and noise of
    covariance ``q = eps^2/S B^T C B``. Of ``P_ij = E x_i(t) x_j(t)``, ``R_ij = E x_i(t+1) x_j(t)``
    this says ``R_ij + m R_ji = k_i P_ij`` and ``P_ij = (k_i k_j + m^2) P_ij - m (k_i R_ij +
    k_j R_ji) + q_ij``, and so:

        P_ij = (1 - m^2) q_ij / (m eps^2 (a_i - a_j)^2
                                 + eps (1 - m)^2 ((1 + m)(a_i + a_j) - eps a_i a_j))

    Args:
      hessian: A, symmetric positive definite, ``(D, D)``.
      noise_covariance: C, ``(D, D)``.
      step_size: eps.
      batch_size: S.
      momentum: m, in [0, 1).
      preconditioner: H, ``(D,)`` or symmetric positive definite ``(D, D)``; by default the unit.

    Returns:
      Sigma, ``(D, D)``; NaN under ``jit`` where it does not exist.

    Raises:
      ValueError: for bad shapes and numbers; outside ``jit`` unless ``0 < eps a_i < 2 (1 + m)`` for
        all i, without which SGD diverges.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import constant_sgd
      >>> A = jnp.diag(jnp.array([1.0, 2.0]))
      >>> print(constant_sgd.stationary_covariance(A, A, step_size=0.02, batch_size=1).round(4))
      [[0.0101 0.    ]
       [0.     0.0102]]
    """
    _check_momentum(momentum)
    m = momentum
    a, q, basis, e = _modes(hessian, noise_covariance, step_size, batch_size, preconditioner)
    a_i, a_j = a[:, None], a[None]
    pull = e * (1 - m) ** 2 * ((1 + m) * (a_i + a_j) - e * a_i * a_j)
    pairs = (1 - m**2) * q / (m * e**2 * (a_i - a_j) ** 2 + pull)
    return _assemble(pairs, basis, (e * a > 0) & (e * a < 2 * (1 + m)))


def averaged_covariance(
    hessian: ArrayLike,
    noise_covariance: ArrayLike,
    step_size: ArrayLike,
    batch_size: int,
    window: int,
    *,
    preconditioner: ArrayLike | None = None,
) -> jax.Array:
    """Covariance of averages over a window of T iterates of stationary SGD, without momentum.

    In the basis of ``stationary_covariance`` iterates k steps apart have the covariance
    ``rho_i^k P_ij``, with ``rho_i = 1 - eps a_i``. Over all pairs of a window that makes:

        P_ij / T^2 (T + f_i + f_j),     f_i = sum_{k=1}^{T-1} (T - k) rho_i^k

    and for T eps a_i far above 1 ``A^-1 C A^-1 / (S T)``: with T = N / S the sandwich.

    Args, returns and errors as in ``stationary_covariance``; ``window`` is T, at least 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import constant_sgd
      >>> A, C = jnp.array([[2.0]]), jnp.array([[4.0]])
      >>> averaged = constant_sgd.averaged_covariance(A, C, 0.1, batch_size=1, window=1000)
      >>> round(1000 * averaged.item(), 3)
      0.996
    """
    T = check_integer("window", window, 1)
    a, q, basis, e = _modes(hessian, noise_covariance, step_size, batch_size, preconditioner)
    pull, k = e * a, jnp.arange(1, T, dtype=a.dtype)
    f = ((T - k)[None] * (1 - pull)[:, None] ** k[None]).sum(-1)
    p_i, p_j = pull[:, None], pull[None]
    pairs = q / (p_i + p_j - p_i * p_j) * (T + f[:, None] + f[None]) / T**2
    return _assemble(pairs, basis, (pull > 0) & (pull < 2))


def kl_to_posterior(covariance: ArrayLike, hessian: ArrayLike, num_data: int) -> jax.Array:
    """``KL(N(theta*, Sigma) || N(theta*, (N A)^-1))`` in nats, with all its digits near zero.

    ``1/2 sum_i (t_i - log(1 + t_i))``, with ``1 + t_i`` the eigenvalues of ``N A Sigma``.

    Args:
      covariance: Sigma, ``(D, D)``.
      hessian: A, ``(D, D)``.
      num_data: N.

    Returns:
      A scalar; NaN where a matrix is not positive definite.

    Raises:
      ValueError: for a bad ``num_data``, other shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import constant_sgd
      >>> A = jnp.diag(jnp.array([1.0, 4.0]))
      >>> print(constant_sgd.kl_to_posterior(jnp.diag(jnp.array([1.0, 0.25])) / 100, A, 100))
      0.0
    """
    N = check_integer("num_data", num_data, 1)
    sigma, A = _common(covariance, hessian)
    if sigma.ndim != 2 or not sigma.shape == A.shape == sigma.shape[::-1]:
        raise ValueError(
            f"covariance {sigma.shape}, hessian {A.shape}: give two square matrices of one size"
        )
    with jax.default_matmul_precision("highest"):
        half = jnp.linalg.cholesky(A)
        excess = jnp.linalg.eigvalsh(N * half.T @ sigma @ half) - 1
    return jnp.asarray((excess - jnp.log1p(excess)).sum() / 2)


class _Moments(NamedTuple):
    """What to take of which gradients: equal by its functions, so that it compiles once."""

    loss: Loss
    second: Callable[[Any], Any]  # the sum over examples of a second moment


def _stream(of: _Moments, params: Any, batches: Iterable[Any]) -> tuple[Any, Any, Any]:
    """Examples, mean gradient and second moment about it, of all batches together."""
    if not callable(of.loss):
        raise ValueError(f"loss is a {type(of.loss).__name__}: give a function of one example")
    if isinstance(batches, jax.Array | np.ndarray | Mapping) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches is a {type(batches).__name__}: give a list of them, [batch] for a single one"
        )
    total: tuple[Any, Any, Any] | None = None
    for batch in batches:
        sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
        if len(sizes) != 1 or sizes & {(), (0,)}:
            raise ValueError(
                f"batches holds arrays with leading axes {sorted(sizes)}: give trees of arrays "
                "with one leading axis of examples, [(x, y)] for a single batch"
            )
        found = _of_batch(of, params, batch)
        total = found if total is None else _merge(of, total, found)
    if total is None:
        raise ValueError("batches is empty: give one batch at least; a generator is read once")
    return total


@functools.partial(jax.jit, static_argnums=0)
def _of_batch(of: _Moments, params: Any, batch: Any) -> tuple[Any, Any, Any]:
    def loss(params: Any, example: Any) -> Any:
        value = of.loss(params, example)
        if jnp.shape(value) != ():
            raise ValueError(
                f"loss returned an array of shape {jnp.shape(value)}: return one number, of one "
                "example"
            )
        return value

    gradients = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
    gradients = jax.tree.map(widen, gradients)
    mean = jax.tree.map(lambda g: g.mean(0), gradients)
    centred = jax.tree.map(lambda g, m: g - m[None], gradients, mean)
    count = jnp.asarray(len(jax.tree.leaves(batch)[0]), jnp.int32)
    return count, mean, of.second(centred)


@functools.partial(jax.jit, static_argnums=0)
def _merge(of: _Moments, first: Any, other: Any) -> tuple[Any, Any, Any]:
    """Moments of the union of two samples (Chan, Golub and LeVeque 1979)."""
    count = first[0] + other[0]
    shift = jax.tree.map(jnp.subtract, other[1], first[1])
    between = of.second(jax.tree.map(lambda d: d[None], shift))
    n, n_other = first[0].astype(float), other[0].astype(float)
    share, weight = n_other / (n + n_other), n * n_other / (n + n_other)

    def add(a: Any, b: Any, d: Any) -> Any:
        return a + b + d * weight.astype(d.dtype)

    mean = jax.tree.map(lambda m, d: m + d * share.astype(d.dtype), first[1], shift)
    return count, mean, jax.tree.map(add, first[2], other[2], between)


def _squares(deviations: Any) -> Any:
    return jax.tree.map(lambda d: (d * d).sum(0), deviations)


def _outer_products(deviations: Any) -> jax.Array:
    leaves = _common(*jax.tree.leaves(deviations))
    flat = jnp.concatenate([x.reshape(len(x), -1) for x in leaves], 1)
    products: jax.Array = jnp.matmul(flat.T, flat, precision=jax.lax.Precision.HIGHEST)
    return products


def _modes(
    hessian: ArrayLike, noise_covariance: ArrayLike, step: ArrayLike, batch_size: int, given: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The diagonal a of A in the basis B, ``eps^2/S B^T C B``, B, and eps."""
    given = np.ones(jnp.shape(hessian)[:1], np.float32) if given is None else given
    A, C, H, step = _common(hessian, noise_covariance, given, step)
    S = check_integer("batch_size", batch_size, 1)
    if not A.shape == C.shape == 2 * H.shape[:1] or H.shape not in (A.shape, A.shape[:1]):
        raise ValueError(
            f"hessian {A.shape}, noise_covariance {C.shape}, preconditioner {H.shape}: give two "
            "square matrices of one size, and a vector or a matrix of it"
        )
    with jax.default_matmul_precision("highest"):
        root = jnp.diag(jnp.sqrt(H)) if H.ndim == 1 else jnp.linalg.cholesky(H)
        a, rotation = jnp.linalg.eigh(root.T @ A @ root)
        basis = root @ rotation
        return a, step**2 / S * (basis.T @ C @ basis), basis, step


def _assemble(pairs: jax.Array, basis: jax.Array, stable: jax.Array) -> jax.Array:
    """Back from the basis; NaN, or an error, where there is no stationary distribution."""
    if not isinstance(stable, jax.core.Tracer) and not stable.all():
        raise ValueError(
            "step_size: SGD diverges at this step; take a smaller one, above zero, and a hessian "
            "and a preconditioner that are positive definite"
        )
    with jax.default_matmul_precision("highest"):
        return jnp.where(stable.all(), basis @ pairs @ basis.T, jnp.nan)


def _common(*arrays: ArrayLike) -> list[jax.Array]:
    """In the dtype that holds all of them, float32 at the least."""
    found = [jnp.asarray(x) for x in arrays]
    strong = [x.dtype for x in found if not x.weak_type]
    return [x.astype(wide_dtype(*strong)) for x in found]


def _times(g: jax.Array, h: jax.Array) -> jax.Array:
    return (g.astype(h.dtype) * h).astype(g.dtype)


def _size(tree: Any) -> int:
    return sum(jnp.size(x) for x in jax.tree.leaves(tree))


def _factor(num_data: int, batch_size: int) -> float:
    """2 S / N."""
    S, N = check_integer("batch_size", batch_size, 1), check_integer("num_data", num_data, 1)
    return 2 * S / N


def _check_momentum(momentum: Any) -> None:
    known = not isinstance(momentum, jax.core.Tracer)
    if jnp.shape(momentum) != () or (known and not 0 <= momentum < 1):
        raise ValueError(f"momentum={momentum!r}: give a number of at least 0 and below 1")


def _check_noise(noise: Any) -> None:
    if not isinstance(noise, GradientNoise):
        raise ValueError(
            f"noise is a {type(noise).__name__}: give what constant_sgd.gradient_noise returned"
        )


def _checked(preconditioner: Any, message: str) -> PreconditionerState:
    for leaf in jax.tree.leaves(preconditioner):
        if not isinstance(leaf, jax.core.Tracer) and not jnp.isfinite(leaf).all():
            raise ValueError(message)
    return PreconditionerState(preconditioner)
