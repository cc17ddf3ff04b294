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
Treat what they return as a constant: gradients do not go through it. Both take ``weights``, as in
``metrics``: an example of weight w counts as if it stood there w times, one of weight 0 does not
count, whatever it holds. They need all held-out data at once: numbers fitted to batches do not
combine. The loss that ``fit_scale`` is given takes weights itself.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from swagjax import metrics, summing
from swagjax.summing import is_traced

# Natural logarithms of 1 / T between which the best one is sought.
_LOG_RANGE = (-50.0, 50.0)

# The grid on which fit_noise looks first, in squared errors: from the greatest down to 1e-16 of it.
_LOG_NOISE = (-37.0, 0.0)
_NUM_NOISE = 64

# Rows of probabilities sum to one so far, in sixteen bits; not all rows of logits do.
_TOLERANCE = 0.02


class ScaleFit(NamedTuple):
    """What ``fit_scale`` found.

    Attributes:
      scale: the best of the scales, a scalar.
      scales: the scales tried, shape ``(n,)``.
      losses: the held-out loss at each of them, shape ``(n,)``.

    Example:
      >>> from swagjax import calibration
      >>> fit = calibration.fit_scale(lambda scale: (scale - 1) ** 2, (0.5, 1.0, 2.0))
      >>> print(fit.scales, fit.losses, fit.at_edge)
      [0.5 1.  2. ] [0.25 0.   1.  ] False
    """

    scale: jax.Array
    scales: jax.Array
    losses: jax.Array

    @property
    def at_edge(self) -> jax.Array:
        """Whether the best is the least tried but for 0, or the greatest: try others beyond it."""
        least, greatest = jnp.min(self.scales), jnp.max(self.scales)
        return (self.scale == greatest) | ((self.scale == least) & (least > 0))


def fit_temperature(
    logits: ArrayLike, labels: ArrayLike, *, weights: ArrayLike | None = None
) -> jax.Array:
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
      weights: how many times each example counts, 0 for not at all; of the shape of ``labels`` or
        of its leading axes.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: shapes that do not match, empty input, labels that are no integers; and outside
        ``jit`` labels out of range, logits that are NaN or plus infinity, negative weights, and
        data without a best temperature, which inside ``jit`` give NaN; and outside ``jit``
        probabilities in the place of logits, which inside ``jit`` are taken for logits.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from swagjax import calibration
      >>> logits = jnp.log(jnp.array([[0.9, 0.1]] * 4))  # 90 % sure, right three times of four
      >>> temperature = calibration.fit_temperature(logits, jnp.array([0, 0, 0, 1]))
      >>> round(float(temperature), 4), round(float(jax.nn.softmax(logits / temperature)[0, 0]), 4)
      (2.0, 0.75)

    Source: Guo et al. (2017), "On Calibration of Modern Neural Networks", section 4.2.
    """
    logits, labels, weights = _read(logits, labels, weights)
    temperature, slopes = _temperature(logits, labels, weights)
    if not is_traced(temperature):
        _check_temperature(temperature, slopes)
    return jnp.asarray(temperature)


def fit_noise(
    means: ArrayLike,
    variances: ArrayLike,
    targets: ArrayLike,
    *,
    event_ndim: int = 0,
    weights: ArrayLike | None = None,
) -> jax.Array:
    """Noise variance v >= 0, one for all, that minimises the held-out NLL of a regression.

    ``argmin_v metrics.mixture_nll(means, variances + v, targets)``: for a network that predicts
    means alone, ``variances=0``, v is the variance of the targets around the Bayesian average; for
    one that predicts variances, what is missing in them. It is 0 where nothing is missing or they
    are too great already; what shrinks them is a factor, see ``fit_scale``. Of one Gaussian instead
    of a mixture, pass ``mean[None]``: with ``variances=0`` v is then the mean squared error.

    The best point of a grid over 16 orders of magnitude is refined by bisection of the slope, so
    that of several minima the lowest is found, unless they are closer than a factor of three.

    Of several outputs each is scored alone, and v is one for all of them: call it once per output
    where they differ in units. ``event_ndim=1`` scores the outputs of an example jointly, as in
    ``metrics.mixture_nll``.

    Args:
      means: held-out predictions under S samples of the weights, shape ``(S, ...)``.
      variances: predicted variances, shape ``(S, ...)``, or a scalar; 0 where there are none.
      targets: true values, shape ``(...)``.
      event_ndim: how many trailing axes of ``targets`` are the outputs of one example, scored
        jointly; static under ``jit``.
      weights: how many times each example counts, 0 for not at all; of the shape of ``targets``
        without its ``event_ndim`` last axes, or of its leading axes.

    Returns:
      A scalar in squared units of the targets, float32 or wider.

    Raises:
      ValueError: shapes that do not match, empty input; and outside ``jit`` negative variances or
        weights, values that are not finite, and targets that are hit exactly where a variance is
        zero, whose likelihood grows without bound. Inside ``jit`` these give NaN.

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
    arrays = _read_regression(means, variances, targets, weights, event_ndim)
    noise = _noise(*arrays, event_ndim)
    if not is_traced(noise) and math.isnan(noise) and _has_weight(arrays[3]):
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
    scale=scale)`` one compiled program serves all scales. Where ``at_edge`` is true, try more; 0 is
    the point theta_SWA. For a regression that lacks its noise fit both: let ``held_out_loss`` call
    ``fit_noise`` at its scale, and score with that.

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
    if not is_traced(losses):
        _check_losses(tried, losses)
    return ScaleFit(best, tried, losses)


@jax.jit
def _temperature(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The temperature, and the slopes of the NLL at the ends of the range of log 1 / T."""
    logits, labels = summing.blank(logits, weights), summing.blank(labels, weights, fill=0)
    label_logit = jnp.take_along_axis(logits, labels.astype(jnp.int32)[..., None], axis=-1)
    above_label = logits - label_logit
    # Not above zero, so that no product with a large 1 / T overflows upwards.
    below_best = logits - jnp.max(logits, axis=-1, keepdims=True)

    def slope(log_inverse: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(jnp.exp(log_inverse) * below_best, axis=-1)
        above = jnp.where(probs == 0, 0, above_label)
        return summing.mean(jnp.sum(probs * above, axis=-1), weights)

    low, high = (jnp.full_like(logits, end, shape=()) for end in _LOG_RANGE)
    slopes = slope(low), slope(high)
    is_class = jnp.all((labels >= 0) & (labels < logits.shape[-1]))
    found = is_class & (slopes[0] < 0) & (slopes[1] > 0)
    return jnp.where(found, jnp.exp(-_bisect(slope, low, high)), jnp.nan), slopes


@partial(jax.jit, static_argnums=4)
def _noise(
    means: jax.Array,
    variances: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None,
    event_ndim: int,
) -> jax.Array:
    variances = jnp.broadcast_to(variances, means.shape)
    means, variances = (summing.blank(x, weights, lead=1) for x in (means, variances))
    targets = summing.blank(targets, weights)

    def loss(log_noise: jax.Array) -> jax.Array:
        noisy = variances + jnp.exp(log_noise)
        return metrics.mixture_nll(means, noisy, targets, event_ndim=event_ndim, weights=weights)

    def slope(log_noise: jax.Array) -> jax.Array:
        # Forward, so that slopes, too, are summed in the blocks of the loss.
        return jax.jvp(loss, (log_noise,), (jnp.ones_like(log_noise),))[1]

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


def _read(
    logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The arguments checked, the logits in float32 or better."""
    logits, given, labels = summing.read_numbers(logits), labels, summing.read_integers(labels)
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
    logits = summing.widen(logits)
    # Narrow integers cannot be compared with a large number of classes.
    labels = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    weights = summing.read_weights(weights, "labels", labels.shape)
    _check_values(logits, labels, weights, given)
    return logits, labels, weights


def _read_regression(
    means: ArrayLike,
    variances: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None,
    event_ndim: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The arguments checked, in the widest of their dtypes."""
    given = {"means": means, "variances": variances, "targets": targets}
    arrays = {name: summing.read_numbers(x) for name, x in given.items()}
    # The metric checks the shapes, and knows its dtype.
    loss = partial(metrics.mixture_nll, event_ndim=event_ndim)
    dtype = jax.eval_shape(lambda *x: loss(*x[:3], weights=x[3]), *arrays.values(), weights).dtype
    counts = None if weights is None else summing.widen(summing.read_numbers(weights))
    if counts is not None and not is_traced(counts):
        with jax.ensure_compile_time_eval():
            summing.check_weights(float(jnp.min(counts)))
    for name, x in arrays.items():
        if not is_traced(x) and not is_traced(counts):
            _check_numbers(name, x, counts, 0.0 if name == "variances" else -math.inf)
    means, variances, targets = (x.astype(dtype) for x in arrays.values())
    return means, variances, targets, counts


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
    return summing.widen(loss)


def _check_temperature(temperature: jax.Array, slopes: tuple[jax.Array, jax.Array]) -> None:
    at_infinity, at_zero = (float(slope) for slope in slopes)
    if at_infinity < 0 < at_zero and not math.isnan(temperature):
        return
    if math.isnan(at_infinity):  # all weights are 0
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


def _has_weight(weights: jax.Array | None) -> bool:
    return weights is None or bool(jnp.any(weights > 0))


def _check_values(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None, given: ArrayLike
) -> None:
    """Refuse what is no class or no logit, in one program; skip what is traced."""
    known = [None if is_traced(x) else x for x in (logits, labels)]
    if is_traced(weights) or (known[0] is None and known[1] is None and weights is None):
        return
    with jax.ensure_compile_time_eval():  # a constant may meet us inside a jitted function
        found = jax.device_get(_extremes(*known, weights))
    summing.check_weights(found["weight"])
    lowest, highest = found["labels"]
    summing.check_labels(lowest, highest, "logits", logits.shape[-1], given)
    _check_logits(*(float(x) for x in found["logits"]))
    if found["probabilities"]:
        raise ValueError(
            "logits holds probabilities: all its rows are non-negative and sum to 1. Give their "
            "logarithms, jnp.log(probs), or what the network returns before the softmax. Where "
            "these are logits all the same, give logits - 1: a shift changes nothing."
        )


@jax.jit
def _extremes(logits: Any, labels: Any, weights: Any) -> dict[str, Any]:
    """The ends of what counts, and whether logits are probabilities."""
    found: dict[str, Any] = {"weight": 0.0 if weights is None else jnp.min(weights)}
    found |= {"labels": (0, 0), "logits": (0.0, 0.0), "probabilities": False}
    if labels is not None:
        labels = summing.blank(labels, weights, fill=0)
        found["labels"] = jnp.min(labels), jnp.max(labels)
    if logits is not None:
        logits = summing.blank(logits, weights)
        best = jnp.max(logits, axis=-1)
        found["logits"] = jnp.min(best), jnp.max(best)
        total = summing.blank(jnp.sum(jnp.maximum(logits, 0), axis=-1), weights)
        found["probabilities"] = jnp.all(logits >= 0) & jnp.all(jnp.abs(total - 1) < _TOLERANCE)
        found["probabilities"] &= True if weights is None else jnp.any(weights > 0)
    return found


def _check_logits(least_best: float, greatest: float) -> None:
    if not (least_best > -math.inf and greatest < math.inf):
        bad = least_best if greatest < math.inf else greatest
        raise ValueError(
            f"logits holds {bad:g} as the highest of some example, but that must be finite: leave "
            "these examples out, or look for the cause in the model's outputs."
        )


def _check_numbers(name: str, values: jax.Array, weights: jax.Array | None, floor: float) -> None:
    lead = 0 if name == "targets" else 1
    with jax.ensure_compile_time_eval():
        values = summing.blank(values, weights, lead if values.ndim else 0)
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
