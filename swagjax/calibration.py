"""Temperature, posterior scale and noise, fitted on held-out data.

Held-out data are neither trained on nor tested on: a number fitted on the data that it is scored on
is not calibrated but flattered, and one fitted on the training set inherits its over-confidence.
Split off a validation set first, fit here, and score once on the test set. Every number is one
scalar, so a few hundred examples will do.

``fit_temperature``  divides logits; softens or sharpens every prediction alike
``fit_noise``        adds to the variances of a regression that lack the noise of the targets
``fit_scale``        any number by a grid: the scale of the posterior, a factor of variances

The first two minimise a negative log-likelihood to the last digits, deterministic, compiled, also
inside ``jit``. Where there is no minimum they raise ``ValueError``, and give NaN inside ``jit``.
Treat what they return as a constant: gradients do not go through it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from swagjax import metrics

# Natural logarithms of 1 / T between which the best one is sought.
_LOG_RANGE = (-50.0, 50.0)

# The grid on which fit_noise looks first, in squared errors: from the greatest down to 1e-16 of it.
_LOG_NOISE = (-37.0, 0.0)
_NUM_NOISE = 64


class ScaleFit(NamedTuple):
    """What ``fit_scale`` found.

    Attributes:
      scale: the best of the scales, a scalar.
      scales: the scales tried, shape ``(n,)``.
      losses: the held-out loss at each of them, shape ``(n,)``.

    Example:
      >>> from swagjax import calibration
      >>> fit = calibration.fit_scale(lambda scale: (scale - 1) ** 2, (0.5, 1.0, 2.0))
      >>> print(fit.scales, fit.losses)
      [0.5 1.  2. ] [0.25 0.   1.  ]
    """

    scale: jax.Array
    scales: jax.Array
    losses: jax.Array


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Temperature T > 0 that minimises the NLL of ``softmax(logits / T)`` on held-out data.

    The NLL is convex in 1 / T, and T is where its slope is zero, found by bisection to the last
    digits of its dtype. T above 1 softens over-confident predictions. Apply it as
    ``jax.nn.softmax(test_logits / T)``; accuracy stays as it is. For averaged probabilities, such
    as ``predict`` returns, their logarithms are logits: ``jnp.log(probs)``, or ``predict_log``.

    Two kinds of held-out data have no best temperature. Where every label is the most probable
    class, the NLL falls for ever as T goes to 0. Where the logits of the labels are on average no
    higher than those of the other classes, it falls for ever as T goes to infinity: the logits know
    less than a uniform guess.

    Args:
      logits: held-out logits, shape ``(..., C)``; minus infinity excludes a class.
      labels: integer classes in ``[0, C)``, shape ``(...)``.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: shapes that do not match, empty input, labels that are no integers; and outside
        ``jit`` labels out of range, logits that are NaN or plus infinity, and data without a best
        temperature. Inside ``jit`` these give NaN.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from swagjax import calibration
      >>> logits = jnp.log(jnp.array([[0.9, 0.1]] * 4))  # 90 % sure, right three times of four
      >>> temperature = calibration.fit_temperature(logits, jnp.array([0, 0, 0, 1]))
      >>> round(float(temperature), 4), round(float(jax.nn.softmax(logits / temperature)[0, 0]), 4)
      (2.0, 0.75)

    Source: Guo et al. (2017), "On Calibration of Modern Neural Networks", section 4.2.
    """
    logits, labels = _read(logits, labels)
    temperature, slopes = _temperature(logits, labels)
    if not isinstance(temperature, jax.core.Tracer):
        _check_temperature(temperature, slopes)
    return jnp.asarray(temperature)


def fit_noise(means: ArrayLike, variances: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Noise variance v >= 0, one for all, that minimises the held-out NLL of a regression.

    ``argmin_v metrics.mixture_nll(means, variances + v, targets)``: for a network that predicts
    means alone, ``variances=0``, v is the variance of the targets around the Bayesian average; for
    one that predicts variances, what is missing in them. It is 0 where nothing is missing or they
    are too great already; what shrinks them is a factor, see ``fit_scale``. Of one Gaussian instead
    of a mixture, pass ``mean[None]``: with ``variances=0`` v is then the mean squared error.

    The best point of a grid over 16 orders of magnitude is refined by bisection of the slope, so
    that of several minima the lowest is found, unless they are closer than a factor of three.

    Args:
      means: held-out predictions under S samples of the weights, shape ``(S, ...)``.
      variances: predicted variances, shape ``(S, ...)``, or a scalar; 0 where there are none.
      targets: true values, shape ``(...)``.

    Returns:
      A scalar in squared units of the targets, float32 or wider.

    Raises:
      ValueError: shapes that do not match, empty input; and outside ``jit`` negative variances,
        values that are not finite, and targets that are hit exactly where a variance is zero, whose
        likelihood grows without bound. Inside ``jit`` these give NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import calibration
      >>> means = jnp.zeros((1, 4))
      >>> targets = jnp.array([-1.0, 1.0, -3.0, 3.0])
      >>> round(float(calibration.fit_noise(means, 0.0, targets)), 4)  # (1 + 1 + 9 + 9) / 4
      5.0
      >>> round(float(calibration.fit_noise(means, 2.0, targets)), 4)
      3.0
    """
    means, variances, targets = _read_regression(means, variances, targets)
    noise = _noise(means, variances, targets)
    if not isinstance(noise, jax.core.Tracer) and math.isnan(noise):
        raise ValueError(
            "variances holds zeros where means hit targets exactly, so that the likelihood grows "
            "without bound as the noise goes to 0: give more held-out examples, or a small "
            "positive variance."
        )
    return jnp.asarray(noise)


def fit_scale(
    held_out_loss: Callable[[jax.Array], ArrayLike],
    scales: Iterable[float] = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
) -> ScaleFit:
    """The one of several scales whose held-out loss is the least; of equals the first.

    ``held_out_loss(scale)`` predicts on held-out data and scores, by any model, data and score. Use
    one key for every scale: with common random numbers the losses differ by the scale alone. The
    scale arrives as an array, so that in ``jax.tree_util.Partial(swagjax.sample, state=state,
    scale=scale)`` one compiled program serves all scales. Where the best is the first or the last,
    look at ``losses`` and try more; 0 is the point theta_SWA.

    Args:
      held_out_loss: function from a scale, a scalar array, to a scalar; less is better.
      scales: what is tried, in the meaning of ``held_out_loss``: factors of the covariance for
        ``swagjax.sample``.

    Returns:
      A ``ScaleFit``.

    Raises:
      ValueError: no scales, negative or infinite ones; losses that are no scalars; and outside
        ``jit`` losses that are NaN, or all infinite.

    Example:
      Classification; for regression, ``predict_samples`` and ``metrics.mixture_nll``.

      >>> import jax, jax.numpy as jnp, swagjax
      >>> from jax.tree_util import Partial
      >>> from swagjax import calibration, metrics
      >>> tx, params = swagjax.swag_diag(), jnp.zeros(())
      >>> state = tx.init(params)
      >>> for update in (2.0, 4.0):  # N(3, 1)
      ...     _, state = tx.update(jnp.array(update), state, params)
      >>> x, y = jnp.array([1.0, 1.0, 1.0, -1.0]), jnp.array([1, 1, 0, 0])  # held out
      >>> def prob_fn(w, x):
      ...     return jax.nn.softmax(jnp.stack([0 * x, w * x], -1))
      >>> def held_out_nll(scale):
      ...     posterior = Partial(swagjax.sample, state=state, scale=scale)
      ...     return metrics.nll(swagjax.predict(jax.random.key(0), posterior, prob_fn, x), y)
      >>> fit = calibration.fit_scale(held_out_nll, (0.0, 1.0, 10.0))
      >>> print(fit.scale, fit.losses.round(1))
      10.0 [0.8 0.8 0.6]
    """
    tried = _read_scales(held_out_loss, scales)
    losses = jnp.stack([_read_loss(scale, held_out_loss(scale)) for scale in tried])
    best = jnp.where(jnp.any(jnp.isnan(losses)), jnp.nan, tried[jnp.argmin(losses)])
    if not isinstance(losses, jax.core.Tracer):
        _check_losses(tried, losses)
    return ScaleFit(best, tried, losses)


@jax.jit
def _temperature(
    logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The temperature, and the slopes of the NLL at the ends of the range of log 1 / T."""
    label_logit = jnp.take_along_axis(logits, labels.astype(jnp.int32)[..., None], axis=-1)
    above_label = logits - label_logit
    # Not above zero, so that no product with a large 1 / T overflows upwards.
    below_best = logits - jnp.max(logits, axis=-1, keepdims=True)

    def slope(log_inverse: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(jnp.exp(log_inverse) * below_best, axis=-1)
        return jnp.mean(jnp.sum(jnp.where(probs == 0, 0, probs * above_label), axis=-1))

    low, high = (jnp.asarray(end, logits.dtype) for end in _LOG_RANGE)
    slopes = slope(low), slope(high)
    is_class = jnp.all((labels >= 0) & (labels < logits.shape[-1]))
    found = is_class & (slopes[0] < 0) & (slopes[1] > 0)
    return jnp.where(found, jnp.exp(-_bisect(slope, low, high)), jnp.nan), slopes


@jax.jit
def _noise(means: jax.Array, variances: jax.Array, targets: jax.Array) -> jax.Array:
    def loss(log_noise: jax.Array) -> jax.Array:
        return metrics.mixture_nll(means, variances + jnp.exp(log_noise), targets)

    slope = jax.grad(loss)
    # Above the greatest squared error every density falls with the noise.
    greatest = jnp.log(jnp.max((targets[None] - means) ** 2))
    grid = greatest + jnp.linspace(*_LOG_NOISE, _NUM_NOISE, dtype=means.dtype)
    losses = jax.lax.map(loss, grid)
    best = jnp.argmin(losses)
    low, high = grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, _NUM_NOISE - 1)]
    # Where nothing falls, the minimum is at no noise at all, or there is none.
    at_zero = jnp.where(jnp.all(variances > 0), 0.0, jnp.nan)
    noise = jnp.where(slope(low) < 0, jnp.exp(_bisect(slope, low, high)), at_zero)
    sound = jnp.all(variances >= 0) & ~jnp.any(jnp.isnan(losses))
    return jnp.where(sound, noise, jnp.nan)


def _bisect(slope: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """Where a slope turns from negative to positive between two points, to the last digits."""

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        falls = slope(middle) < 0
        return jnp.where(falls, middle, low), jnp.where(falls, high, middle)

    steps = jnp.finfo(low.dtype).nmant + 10  # the range is a hundred, and then some
    low, high = jax.lax.fori_loop(0, steps, halve, (low, high))
    return (low + high) / 2


def _read(logits: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Both arguments checked, the logits in float32 or better."""
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if logits.ndim == 0 or logits.size == 0:
        raise ValueError(
            f"logits has shape {logits.shape}, but must hold at least one example with its classes "
            "on the last axis: pass an array of shape (..., C)."
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels has shape {labels.shape} and logits {logits.shape}, but labels must have the "
            f"shape of logits less its last axis, {logits.shape[:-1]}: pass logits first, and one "
            "class number per example (one-hot labels become numbers by argmax)."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels has dtype {labels.dtype}, but class numbers are integers: use "
            "labels.astype(int)."
        )
    logits = _wide(logits)
    if not isinstance(labels, jax.core.Tracer):
        _check_labels(labels, logits.shape[-1])
    if not isinstance(logits, jax.core.Tracer):
        _check_logits(logits)
    # Narrow integers cannot be compared with a large number of classes.
    return logits, labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels


def _read_regression(
    means: ArrayLike, variances: ArrayLike, targets: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arguments checked, in the widest of their dtypes."""
    given = {"means": means, "variances": variances, "targets": targets}
    arrays = {name: jnp.asarray(x) for name, x in given.items()}
    # The metric checks the shapes, and knows its dtype.
    dtype = jax.eval_shape(metrics.mixture_nll, *arrays.values()).dtype
    for name, x in arrays.items():
        if not isinstance(x, jax.core.Tracer):
            _check_numbers(name, x, 0.0 if name == "variances" else -math.inf)
    means, variances, targets = (x.astype(dtype) for x in arrays.values())
    return means, variances, targets


def _read_scales(held_out_loss: Any, scales: Iterable[float]) -> jax.Array:
    if not callable(held_out_loss):
        raise ValueError(
            f"held_out_loss is a {type(held_out_loss).__name__}: give a function from a scale to "
            "the loss on held-out data."
        )
    tried = [float(scale) for scale in scales]
    if not tried or not all(0 <= scale < math.inf for scale in tried):
        raise ValueError(
            f"scales is {tried}, but must hold at least one number, all finite and none negative: "
            "try (0.1, 0.3, 1.0)."
        )
    return jnp.asarray(tried, dtype=float)


def _read_loss(scale: jax.Array, loss: ArrayLike) -> jax.Array:
    loss = jnp.asarray(loss)
    if loss.shape:
        raise ValueError(
            f"held_out_loss returned an array of shape {loss.shape}, but must return a scalar: use "
            "a mean over examples."
        )
    return _wide(loss)


def _wide(x: jax.Array) -> jax.Array:
    wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
    return x if wide else x.astype(jnp.float32)


def _check_temperature(temperature: jax.Array, slopes: tuple[jax.Array, jax.Array]) -> None:
    at_infinity, at_zero = (float(slope) for slope in slopes)
    if at_infinity < 0 < at_zero and not math.isnan(temperature):
        return
    if not math.isfinite(at_infinity):
        raise ValueError(
            "logits holds minus infinity for the label of some example, which no temperature makes "
            "likely: leave these examples out, or pass finite logits."
        )
    if at_infinity >= 0:
        raise ValueError(
            "logits of the labels are on average no higher than those of the other classes, so "
            "that the best temperature is infinite: look whether logits and labels belong "
            "together, or predict uniformly."
        )
    raise ValueError(
        "logits are highest at the label for every example, so that the best temperature is 0: "
        "give more held-out examples, some of them misclassified, or keep the temperature 1."
    )


def _check_labels(labels: jax.Array, num_classes: int) -> None:
    with jax.ensure_compile_time_eval():
        least, greatest = int(jnp.min(labels)), int(jnp.max(labels))
    if least < 0 or greatest >= num_classes:
        raise ValueError(
            f"labels holds {least if least < 0 else greatest}, but logits has {num_classes} "
            f"classes, 0 to {num_classes - 1}: renumber the labels, or leave these examples out."
        )


def _check_logits(logits: jax.Array) -> None:
    with jax.ensure_compile_time_eval():
        least_best = float(jnp.min(jnp.max(logits, axis=-1)))
        greatest = float(jnp.max(logits))
    if not (least_best > -math.inf and greatest < math.inf):
        bad = least_best if greatest < math.inf else greatest
        raise ValueError(
            f"logits holds {bad:g} as the highest of some example, but that must be finite: leave "
            "these examples out, or look for the cause in the model's outputs."
        )


def _check_numbers(name: str, values: jax.Array, floor: float) -> None:
    with jax.ensure_compile_time_eval():
        least, greatest = float(jnp.min(values)), float(jnp.max(values))
    if not (math.isfinite(least) and math.isfinite(greatest)):
        bad = greatest if math.isfinite(least) else least
        raise ValueError(
            f"{name} holds the value {bad:g}, but must be finite: leave these examples out, or "
            "look for the cause in the model's outputs."
        )
    if least < floor:
        raise ValueError(
            f"{name} holds the value {least:g}, but must not be negative: a network returns a "
            "variance through jnp.exp or jax.nn.softplus, and 0.0 stands for none."
        )


def _check_losses(scales: jax.Array, losses: jax.Array) -> None:
    for scale, loss in zip(scales, losses, strict=True):
        if math.isnan(loss):
            raise ValueError(
                f"held_out_loss returned nan at the scale {float(scale):g}: look for the cause in "
                "the model's outputs, or leave that scale out."
            )
    if not math.isfinite(jnp.min(losses)):
        raise ValueError(
            f"held_out_loss returned {float(jnp.min(losses)):g} at its best: give a loss that is "
            "finite at some scale."
        )
