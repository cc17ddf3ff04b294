"""How good, how well calibrated and how cautious predictions are: classes and real numbers.

Every function takes arrays and returns JAX scalars or arrays, is pure, and works under ``jit`` and
``vmap``. What is averaged over examples is a mean, never a sum. Half precision is widened to
float32 first. There are three families, in this order:

classification
    ``nll``, ``accuracy``, ``brier``, ``ece``, ``reliability``: ``probs`` has shape ``(..., C)``,
    ``labels`` is an integer array of shape ``(...)``.
out of distribution
    ``predictive_entropy``, ``mutual_information`` of such probabilities, ``auroc`` and ``fpr95`` of
    any scores, ``symmetrised_kl`` of entropies.
regression
    ``rmse``, ``gaussian_nll``, ``mixture_nll``, ``moment_match``, ``coverage``,
    ``interval_width``, ``gaussian_crps``, ``mixture_crps``: a prediction is a Gaussian ``mean`` and
    ``variance`` of the shape of ``targets``, or an equally weighted mixture of S Gaussians,
    ``means`` and ``variances`` with a leading axis S more, such as ``predict_samples`` returns. A
    variance may be a scalar, one for all; nothing else is broadcast, since ``(N, 1)`` against
    ``(N,)`` would compare every example with every other. Variances are those of the targets:
    where the spread of means is all there is, the noise of the targets is missing.

Outside ``jit`` values are checked: labels that are no class, probabilities that are negative or do
not sum to one, variances that are not positive, and means and targets that are not finite are a
``ValueError``. Inside ``jit``, ``vmap`` or ``grad`` nothing can be raised: there any of them makes
the metric NaN, a probability where it is NaN, negative or above one, as most logits are. Sums of
probabilities are not looked at there, which would cost time.
"""

import math
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# Sixteen-bit softmaxes and averages of them sum to one within about a percent; logits do not.
_TOLERANCE = 0.02


class Reliability(NamedTuple):
    """Confidence against accuracy, bin by bin.

    Attributes:
      confidence: mean probability of the predicted class, shape ``(num_bins,)``; NaN in an empty
        bin.
      accuracy: share of examples whose predicted class is the label, shape ``(num_bins,)``; NaN in
        an empty bin.
      count: number of examples, integers of shape ``(num_bins,)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> bins = metrics.reliability(jnp.array([[0.75, 0.25]]), jnp.array([0]), num_bins=2)
      >>> print(bins.confidence, bins.accuracy, bins.count)
      [ nan 0.75] [nan  1.] [0 1]
    """

    confidence: jax.Array
    accuracy: jax.Array
    count: Any  # a jax.Array; annotated so, it would clash with tuple.count


class Moments(NamedTuple):
    """Mean and variance of predictions, arrays of one shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> mean, variance = metrics.Moments(jnp.zeros(3), jnp.ones(3))
    """

    mean: jax.Array
    variance: jax.Array


def nll(probs: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Negative log-likelihood of the labels, a mean over examples in nats.

    ``-mean(log probs[i, labels[i]])``. A label of probability exactly zero gives infinity: nothing
    is clipped, since any floor would be an invented score.

    Args:
      probs: probabilities, shape ``(..., C)``.
      labels: integer classes in ``[0, C)``, shape ``(...)``.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that do not match, empty input, labels that are no integers; and outside
        ``jit`` labels out of range and probabilities that are negative or do not sum to one.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> metrics.nll(jnp.array([[0.5, 0.5], [0.25, 0.75]]), jnp.array([0, 1])).round(4)
      Array(0.4904, dtype=float32)

    Source: Maddox et al. (2019), "A Simple Baseline for Bayesian Uncertainty in Deep Learning",
    section 5; the logarithmic score of Good (1952), "Rational Decisions".
    """
    probs, labels = _read(probs, labels)
    index = labels.astype(jnp.int32)[..., None]
    likelihood = jnp.take_along_axis(probs, index, axis=-1)[..., 0]
    return -jnp.mean(jnp.where(_is_sound(probs, labels), jnp.log(likelihood), jnp.nan))


def accuracy(probs: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Share of examples whose most probable class is the label, in ``[0, 1]``.

    ``mean(argmax_c probs[i, c] == labels[i])``; of several equally probable classes the first
    counts.

    Args:
      probs: probabilities, shape ``(..., C)``.
      labels: integer classes in ``[0, C)``, shape ``(...)``.

    Returns:
      A scalar.

    Raises:
      ValueError: as for ``nll``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> metrics.accuracy(jnp.array([[0.6, 0.4], [0.7, 0.3]]), jnp.array([0, 1]))
      Array(0.5, dtype=float32)

    Source: Maddox et al. (2019), section 5.
    """
    _, hit = _confidence_and_hit(*_read(probs, labels))
    return jnp.mean(hit)


def brier(probs: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Brier score: squared error of the probabilities, in ``[0, 2]``.

    ``mean_i sum_c (probs[i, c] - [labels[i] == c])^2``: a sum over classes, a mean over examples.
    For two classes that is twice the one-column form which ``sklearn.metrics.brier_score_loss``
    reports.

    Args:
      probs: probabilities, shape ``(..., C)``.
      labels: integer classes in ``[0, C)``, shape ``(...)``.

    Returns:
      A scalar.

    Raises:
      ValueError: as for ``nll``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> metrics.brier(jnp.array([[1.0, 0.0], [0.5, 0.5]]), jnp.array([0, 1]))
      Array(0.25, dtype=float32)

    Source: Brier (1950), "Verification of Forecasts Expressed in Terms of Probability", equation 2.
    """
    probs, labels = _read(probs, labels)
    classes = jax.lax.broadcasted_iota(labels.dtype, probs.shape, probs.ndim - 1)
    target = labels[..., None] == classes
    score = jnp.sum((probs - target.astype(probs.dtype)) ** 2, axis=-1)
    return jnp.mean(jnp.where(_is_sound(probs, labels), score, jnp.nan))


def ece(
    probs: ArrayLike, labels: ArrayLike, num_bins: int = 20, *, binning: str = "width"
) -> jax.Array:
    """Expected calibration error: mean distance of accuracy from confidence, in ``[0, 1]``.

    ``sum_b count[b] / n * |accuracy[b] - confidence[b]|`` over the bins of ``reliability``. Empty
    bins weigh nothing.

    Args:
      probs: probabilities, shape ``(..., C)``.
      labels: integer classes in ``[0, C)``, shape ``(...)``.
      num_bins: how many bins; static under ``jit``.
      binning: ``"width"`` or ``"count"``, see ``reliability``; static under ``jit``.

    Returns:
      A scalar.

    Raises:
      ValueError: as for ``nll``; ``num_bins`` below 1; an unknown ``binning``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> probs = jnp.array([[0.75, 0.25], [0.75, 0.25], [1.0, 0.0], [1.0, 0.0]])
      >>> metrics.ece(probs, jnp.array([0, 1, 0, 0]))  # two bins, one off by a quarter
      Array(0.125, dtype=float32)

    Source: Guo et al. (2017), "On Calibration of Modern Neural Networks", equation 3 (equal width,
    after Naeini et al. 2015); Maddox et al. (2019), section 5 (20 bins of equal count).
    """
    gap, _, _ = _bin_sums(probs, labels, num_bins, binning)
    return jnp.sum(jnp.abs(gap)) / jnp.size(labels)


def reliability(
    probs: ArrayLike, labels: ArrayLike, num_bins: int = 20, *, binning: str = "width"
) -> Reliability:
    """Mean confidence, accuracy and count of the examples in each bin of confidence.

    The confidence of an example is the probability of its predicted class. With ``binning="width"``
    bin b is ``(b / num_bins, (b + 1) / num_bins]``, and the first holds its left end as well, so
    that confidences of exactly 0 and 1 are both counted. With ``binning="count"`` the examples are
    sorted by confidence (ties stay in their order) and cut into runs whose lengths differ by at
    most one, the longer ones first.

    Args:
      probs: probabilities, shape ``(..., C)``; the leading axes are examples.
      labels: integer classes in ``[0, C)``, shape ``(...)``.
      num_bins: how many bins; static under ``jit``.
      binning: ``"width"`` or ``"count"``; static under ``jit``.

    Returns:
      A ``Reliability`` of arrays of shape ``(num_bins,)``. An empty bin has count 0 and NaN means.

    Raises:
      ValueError: as for ``ece``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> probs = jnp.array([[0.75, 0.25], [0.75, 0.25], [1.0, 0.0], [1.0, 0.0]])
      >>> bins = metrics.reliability(probs, jnp.array([0, 1, 0, 0]), num_bins=2, binning="count")
      >>> bins.confidence, bins.accuracy
      (Array([0.75, 1.  ], dtype=float32), Array([0.5, 1. ], dtype=float32))
      >>> bins.count
      Array([2, 2], dtype=int32)

    Source: Guo et al. (2017), equations 1 and 2; Maddox et al. (2019), section 5 and figure 3.
    """
    gap, hits, count = _bin_sums(probs, labels, num_bins, binning)
    n = count.astype(gap.dtype)
    return Reliability((hits - gap) / n, hits / n, count)


def predictive_entropy(probs: ArrayLike) -> jax.Array:
    """Entropy of each predicted distribution in nats, between 0 and ``log C``.

    ``-sum_c probs[..., c] log probs[..., c]``, where ``0 log 0 = 0``.

    Args:
      probs: probabilities, shape ``(..., C)``.

    Returns:
      An array of shape ``probs.shape[:-1]``.

    Raises:
      ValueError: no class axis, empty input; and outside ``jit`` probabilities that are negative or
        do not sum to one.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> metrics.predictive_entropy(jnp.array([[1.0, 0.0], [0.5, 0.5]])).round(4)
      Array([0.    , 0.6931], dtype=float32)

    Source: Maddox et al. (2019), section 5 (out-of-domain images); Shannon (1948).
    """
    return _entropy(_read_probs("probs", probs))


def mutual_information(sample_probs: ArrayLike) -> jax.Array:
    """Mutual information of label and weights in nats: the uncertainty due to the posterior.

    ``H(mean_s p_s) - mean_s H(p_s)``, between 0 and ``log min(S, C)``. It is never negative, H
    being concave, so a negative difference is rounding alone and is returned as 0.

    Args:
      sample_probs: the probabilities under S samples of the weights, shape ``(S, ..., C)``.

    Returns:
      An array of shape ``sample_probs.shape[1:-1]``.

    Raises:
      ValueError: fewer than two axes, empty input; and outside ``jit`` probabilities that are
        negative or do not sum to one.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> metrics.mutual_information(jnp.array([[1.0, 0.0], [0.0, 1.0]])).round(4)  # they disagree
      Array(0.6931, dtype=float32)
      >>> metrics.mutual_information(jnp.array([[0.5, 0.5], [0.5, 0.5]]))  # all undecided
      Array(0., dtype=float32)

    Source: Houlsby et al. (2011), "Bayesian Active Learning for Classification and Preference
    Learning", equation 2.
    """
    probs = _read_probs("sample_probs", sample_probs)
    if probs.ndim < 2:
        raise ValueError(
            f"sample_probs has shape {probs.shape}, but needs an axis of samples first and one of "
            "classes last: stack the probabilities of the samples, (S, ..., C)."
        )
    return jnp.maximum(_entropy(jnp.mean(probs, axis=0)) - jnp.mean(_entropy(probs), axis=0), 0.0)


def auroc(scores_in: ArrayLike, scores_out: ArrayLike) -> jax.Array:
    """Area under the ROC curve: the chance that an out score exceeds an in score, in ``[0, 1]``.

    ``P(out > in) + P(out == in) / 2`` over all pairs, ties counted exactly; O(n log n) by sorting.
    For out-of-distribution detection the score is an uncertainty, such as ``predictive_entropy``.
    Scores are compared at the precision that they arrive in; a NaN among them gives NaN inside
    ``jit``.

    Args:
      scores_in: scores of the in-distribution (negative) examples, shape ``(n,)``.
      scores_out: scores of the out-of-distribution (positive) examples, shape ``(m,)``.

    Returns:
      A scalar.

    Raises:
      ValueError: arrays that are not one-dimensional, or empty; and outside ``jit`` NaN scores.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> metrics.auroc(jnp.array([0.1, 0.2, 0.3]), jnp.array([0.3, 0.4]))
      Array(0.9166667, dtype=float32)

    Source: Hanley and McNeil (1982), "The Meaning and Use of the Area under a Receiver Operating
    Characteristic (ROC) Curve"; it is the Mann-Whitney U statistic over its greatest value.
    """
    scores_in = _read_scores("scores_in", scores_in)
    scores_out = _read_scores("scores_out", scores_out)
    ordered = jnp.sort(scores_in)
    # Shares before sums: counts of pairs overflow int32 from 46341 examples a side.
    below = jnp.searchsorted(ordered, scores_out, side="left") / ordered.size
    not_above = jnp.searchsorted(ordered, scores_out, side="right") / ordered.size
    area = jnp.mean((below + not_above) / 2)
    return jnp.where(_any_nan(scores_in) | _any_nan(scores_out), jnp.nan, area)


def fpr95(scores_in: ArrayLike, scores_out: ArrayLike) -> jax.Array:
    """False-positive rate at 95 % true-positive rate: the share of in scores taken for out.

    ``min_t mean(in >= t)`` over the thresholds t with ``mean(out >= t) >= 0.95``: at least 95 % of
    the out-of-distribution examples are detected, at the price of this share of false alarms. The
    best is 0. Scores are compared at the precision that they arrive in; a NaN among them gives NaN
    inside ``jit``.

    Args:
      scores_in: scores of the in-distribution (negative) examples, shape ``(n,)``.
      scores_out: scores of the out-of-distribution (positive) examples, shape ``(m,)``.

    Returns:
      A scalar.

    Raises:
      ValueError: as for ``auroc``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> metrics.fpr95(jnp.array([0.1, 0.2, 0.3, 0.4]), jnp.array([0.3, 0.5]))
      Array(0.5, dtype=float32)

    Source: Hendrycks and Gimpel (2017), "A Baseline for Detecting Misclassified and
    Out-of-Distribution Examples in Neural Networks", section 2, for the setting; Liang et al.
    (2018), "Enhancing the Reliability of Out-of-distribution Image Detection in Neural Networks",
    section 4.3, for the rate, with the roles of the two exchanged.
    """
    scores_in = _read_scores("scores_in", scores_in)
    scores_out = _read_scores("scores_out", scores_out)
    detected = -(-95 * scores_out.size // 100)  # rounded up, in integers
    threshold = jnp.sort(scores_out)[scores_out.size - detected]
    below = jnp.searchsorted(jnp.sort(scores_in), threshold, side="left")
    rate = (scores_in.size - below) / scores_in.size
    return jnp.where(_any_nan(scores_in) | _any_nan(scores_out), jnp.nan, rate)


def symmetrised_kl(
    entropy_in: ArrayLike,
    entropy_out: ArrayLike,
    num_classes: int,
    num_bins: int = 30,
    *,
    smoothing: float = 1.0,
) -> jax.Array:
    """Symmetrised KL divergence of two histograms of predictive entropy, in nats.

    ``KL(p || q) + KL(q || p) = sum_b (p_b - q_b) log(p_b / q_b)``, where p and q are the shares of
    the examples in bins of equal width over ``[0, log C]``, each bin with ``smoothing`` examples
    more: ``p_b = (n_b + a) / (n + a B)``. Without them an empty bin would make it infinite, so that
    it depends on bins, smoothing and numbers of examples: compare only where these are the same.

    Args:
      entropy_in: entropies in nats of the in-distribution examples, shape ``(n,)``.
      entropy_out: entropies of the out-of-distribution examples, shape ``(m,)``.
      num_classes: C; static under ``jit``.
      num_bins: B; static under ``jit``.
      smoothing: a, above 0; static under ``jit``.

    Returns:
      A scalar.

    Raises:
      ValueError: arrays that are not one-dimensional, or empty; ``num_classes`` below 2,
        ``num_bins`` below 1, a ``smoothing`` that is not positive; and outside ``jit`` NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> low, high = jnp.array([0.1, 0.1, 0.1]), jnp.array([0.6, 0.6, 0.6])
      >>> metrics.symmetrised_kl(low, high, num_classes=2, num_bins=2).round(4)  # 4/5, 1/5
      Array(1.6636, dtype=float32)

    Source: Maddox et al. (2019), section 5 (out-of-domain images), which states neither bins nor
    smoothing; Kullback and Leibler (1951), "On Information and Sufficiency", section 3.
    """
    _check_histogram(num_classes, num_bins, smoothing)
    entropies = _read_scores("entropy_in", entropy_in), _read_scores("entropy_out", entropy_out)
    counts = [_histogram(each, math.log(num_classes), num_bins) for each in entropies]
    p, q = ((count + smoothing) / jnp.sum(count + smoothing) for count in counts)
    divergence = jnp.sum((p - q) * jnp.log(p / q))
    return jnp.where(_any_nan(entropies[0]) | _any_nan(entropies[1]), jnp.nan, divergence)


def rmse(predictions: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Root mean squared error, in the units of the targets.

    ``sqrt(mean((predictions - targets)^2))``, the mean over all elements.

    Args:
      predictions: predicted values, shape ``(...)``.
      targets: true values, shape ``(...)``, the same.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that differ, empty input; and outside ``jit`` values that are not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> metrics.rmse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])).round(4)
      Array(1.4142, dtype=float32)
    """
    predictions, targets = _read_pair("predictions", predictions, targets)
    return jnp.sqrt(_mean_score(_squared_error, predictions, 1.0, targets))


def gaussian_nll(mean: ArrayLike, variance: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Negative log density of the targets under Gaussians, a mean over examples in nats.

    ``mean_i 1/2 (log(2 pi variance[i]) + (targets[i] - mean[i])^2 / variance[i])``. A density has
    units: targets divided by a constant a lower it by ``log a``, so name the scale it is given in.

    Args:
      mean: predicted means, shape ``(...)``.
      variance: predicted variances, noise included, shape ``(...)`` or a scalar.
      targets: true values, shape ``(...)``.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes that differ, empty input; and outside ``jit`` variances that are not
        positive and values that are not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> metrics.gaussian_nll(jnp.zeros(2), jnp.ones(2), jnp.array([0.0, 1.0])).round(4)
      Array(1.1689, dtype=float32)

    Source: Maddox et al. (2019), section 5 (regression); the logarithmic score of Good (1952).
    """
    return -_mean_score(_log_density, *_read_gaussian(mean, variance, targets))


def mixture_nll(means: ArrayLike, variances: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Negative log density of the targets under mixtures of S Gaussians, a mean in nats.

    ``-mean_i log(1/S sum_s N(targets[i]; means[s, i], variances[s, i]))``, by ``logsumexp``: the
    Bayesian average of densities, as ``nll`` scores the Bayesian average of probabilities.

    Args:
      means: predicted means under S samples of the weights, shape ``(S, ...)``.
      variances: predicted variances, noise included, shape ``(S, ...)`` or a scalar.
      targets: true values, shape ``(...)``.

    Returns:
      A scalar.

    Raises:
      ValueError: as for ``gaussian_nll``; no axis of samples.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> means = jnp.array([[-1.0], [1.0]])  # S = 2 samples, one example
      >>> metrics.mixture_nll(means, 1.0, jnp.array([0.0])).round(4)
      Array(1.4189, dtype=float32)

    Source: Maddox et al. (2019), section 3.3 (Bayesian model averaging).
    """
    return -_mean_score(_log_mixture, *_read_mixture(means, variances, targets))


def moment_match(means: ArrayLike, variances: ArrayLike) -> Moments:
    """Mean and variance of the equally weighted mixture over the leading axis.

    ``mean = mean_s means[s]``; ``variance = mean_s variances[s] + mean_s (means[s] - mean)^2``, the
    noise plus the spread of the samples. The spread is of differences from the first sample, never
    E[m^2] - E[m]^2, so that it keeps its digits where the means are large and close together.

    Args:
      means: predicted means under S samples of the weights, shape ``(S, ...)``.
      variances: predicted variances, shape ``(S, ...)`` or a scalar.

    Returns:
      ``Moments`` of shape ``means.shape[1:]``.

    Raises:
      ValueError: as for ``mixture_nll``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> metrics.moment_match(jnp.array([1.0, 3.0]), jnp.array([0.5, 1.5]))
      Moments(mean=Array(2., dtype=float32), variance=Array(2., dtype=float32))

    Source: Lakshminarayanan et al. (2017), "Simple and Scalable Predictive Uncertainty Estimation
    using Deep Ensembles", section 2.4.
    """
    means, variances = _read_moments(("means", "variances"), means, variances)
    _check_samples(means)
    return Moments(*_moments(means, variances))


def coverage(
    mean: ArrayLike, variance: ArrayLike, targets: ArrayLike, *, level: float = 0.95
) -> jax.Array:
    """Share of targets inside the central interval of their Gaussian, in ``[0, 1]``.

    ``mean_i (|targets[i] - mean[i]| <= q sqrt(variance[i]))`` where q is the ``(1 + level) / 2``
    quantile of the standard normal. Calibrated predictions cover a share of ``level``; above it
    they are too cautious, below it too sure.

    Args:
      mean: predicted means, shape ``(...)``.
      variance: predicted variances, noise included, shape ``(...)`` or a scalar.
      targets: true values, shape ``(...)``.
      level: probability of the interval, a number in ``(0, 1)``; static under ``jit``.

    Returns:
      A scalar.

    Raises:
      ValueError: as for ``gaussian_nll``; a ``level`` outside ``(0, 1)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> metrics.coverage(jnp.zeros(4), 1.0, jnp.array([-1.9, 0.0, 1.9, 2.0]))
      Array(0.75, dtype=float32)

    Source: Gneiting and Raftery (2007), "Strictly Proper Scoring Rules, Prediction, and
    Estimation", section 6.2 (central prediction intervals).
    """
    mean, variance, targets = _read_gaussian(mean, variance, targets)
    return _mean_score(_is_inside, mean, variance, targets, _quantile(level))


def interval_width(variance: ArrayLike, *, level: float = 0.95) -> jax.Array:
    """Mean width of the central interval of Gaussians, in the units of the targets.

    ``mean_i 2 q sqrt(variance[i])`` with q as in ``coverage``: of two methods of equal coverage the
    one of narrower intervals is the sharper.

    Args:
      variance: predicted variances, noise included, shape ``(...)``.
      level: probability of the interval, a number in ``(0, 1)``; static under ``jit``.

    Returns:
      A scalar.

    Raises:
      ValueError: empty input; a ``level`` outside ``(0, 1)``; and outside ``jit`` variances that
        are not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> metrics.interval_width(jnp.array([1.0, 4.0])).round(4)
      Array(5.8799, dtype=float32)

    Source: Gneiting and Raftery (2007), section 6.2.
    """
    variance = _read_numbers("variance", variance, positive=True)
    width = 2 * _quantile(level) * jnp.sqrt(variance)
    return jnp.mean(jnp.where(_is_variance(variance), width, jnp.nan))


def gaussian_crps(mean: ArrayLike, variance: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Continuous ranked probability score of Gaussians, in the units of the targets.

    ``mean_i sd (z (2 Phi(z) - 1) + 2 phi(z) - pi^(-1/2))`` with ``sd = sqrt(variance[i])`` and
    ``z = (targets[i] - mean[i]) / sd``: the integral of ``(F(x) - [x >= target])^2`` over x. The
    less the better; the absolute error where the variance is nothing.

    Args:
      mean: predicted means, shape ``(...)``.
      variance: predicted variances, noise included, shape ``(...)`` or a scalar.
      targets: true values, shape ``(...)``.

    Returns:
      A scalar.

    Raises:
      ValueError: as for ``gaussian_nll``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> round(float(metrics.gaussian_crps(jnp.zeros(1), 1.0, jnp.zeros(1))), 4)
      0.2337

    Source: Gneiting and Raftery (2007), section 4.2 (there with the opposite sign).
    """
    return _mean_score(_crps, *_read_gaussian(mean, variance, targets))


def mixture_crps(means: ArrayLike, variances: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Continuous ranked probability score of mixtures of S Gaussians, in units of the targets.

    ``mean_i (1/S sum_s A(y - m_s, v_s) - 1/(2 S^2) sum_st A(m_s - m_t, v_s + v_t))``, where
    ``A(m, v) = E|N(m, v)| = m (2 Phi(m / sd) - 1) + 2 sd phi(m / sd)`` with ``sd = sqrt(v)``. All
    pairs of samples are compared, S^2 times the work, in the memory of S.

    Args:
      means: predicted means under S samples of the weights, shape ``(S, ...)``.
      variances: predicted variances, noise included, shape ``(S, ...)`` or a scalar.
      targets: true values, shape ``(...)``.

    Returns:
      A scalar.

    Raises:
      ValueError: as for ``mixture_nll``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> means = jnp.array([[-1.0], [1.0]])  # S = 2 samples, one example
      >>> metrics.mixture_crps(means, 1.0, jnp.array([0.0])).round(4)
      Array(0.3594, dtype=float32)

    Source: Grimit et al. (2006), "The Continuous Ranked Probability Score for Circular Variables
    and its Application to Mesoscale Forecast Ensemble Verification", equation 5.
    """
    return _mean_score(_mixture_crps, *_read_mixture(means, variances, targets))


def _histogram(entropy: jax.Array, top: float, num_bins: int) -> jax.Array:
    """Examples in bins of equal width from 0 to ``top``; rounding may take some beyond an end."""
    wide = jnp.issubdtype(entropy.dtype, jnp.floating) and entropy.dtype.itemsize >= 4
    entropy = entropy if wide else entropy.astype(jnp.float32)
    index = jnp.clip(jnp.floor(entropy / top * num_bins), 0, num_bins - 1).astype(jnp.int32)
    return jnp.zeros(num_bins).at[index].add(1.0)


def _entropy(probs: jax.Array) -> jax.Array:
    terms = jax.scipy.special.entr(probs)
    return jnp.sum(jnp.where(_in_range(probs), terms, jnp.nan), axis=-1)


@jax.jit
def _confidence_and_hit(probs: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Probability of the predicted class, and 1 where that is the label, else 0."""
    hit = (jnp.argmax(probs, axis=-1).astype(labels.dtype) == labels).astype(probs.dtype)
    return jnp.max(probs, axis=-1), jnp.where(_is_sound(probs, labels), hit, jnp.nan)


@jax.jit
def _is_sound(probs: jax.Array, labels: jax.Array) -> jax.Array:
    """Where the label is one of the classes and every number may be a probability."""
    is_class = (labels >= 0) & (labels < probs.shape[-1])
    return is_class & jnp.all(_in_range(probs), axis=-1)


def _in_range(probs: jax.Array) -> jax.Array:
    """Where a number may be a probability; a NaN may not."""
    return (probs >= 0) & (probs <= 1 + _TOLERANCE)


def _bin_sums(
    probs: ArrayLike, labels: ArrayLike, num_bins: int, binning: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of hit minus confidence and of hit, and the count, for each bin."""
    _check_binning(num_bins, binning)
    confidence, hit = _confidence_and_hit(*_read(probs, labels))
    gap, hits, count = _sum_by_bin(confidence.ravel(), hit.ravel(), int(num_bins), binning)
    return gap, hits, count


@partial(jax.jit, static_argnums=(2, 3))
def _sum_by_bin(
    confidence: jax.Array, hit: jax.Array, num_bins: int, binning: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    index = (_equal_width if binning == "width" else _equal_count)(confidence, num_bins)
    # Differences are summed, not confidences: a long float32 sum of 0.9999 drifts.
    gap, hits = (jax.ops.segment_sum(x, index, num_bins) for x in (hit - confidence, hit))
    return gap, hits, jnp.bincount(index, length=num_bins)


def _equal_width(confidence: jax.Array, num_bins: int) -> jax.Array:
    """Bin of each confidence: the number of inner edges below it, which closes both ends."""
    # Python divides: XLA may turn a division by a constant into a product and shift an edge.
    edges = jnp.array([k / num_bins for k in range(1, num_bins)], confidence.dtype)
    return jnp.searchsorted(edges, confidence, side="left")


def _equal_count(confidence: jax.Array, num_bins: int) -> jax.Array:
    """Bin of each confidence by its rank; the first ``n % num_bins`` bins hold one more."""
    n = confidence.size
    sizes = jnp.array([n // num_bins + (b < n % num_bins) for b in range(num_bins)])
    by_rank = jnp.repeat(jnp.arange(num_bins), sizes, total_repeat_length=n)
    return jnp.zeros_like(by_rank).at[jnp.argsort(confidence, stable=True)].set(by_rank)


def _any_nan(x: jax.Array) -> jax.Array:
    return jnp.any(jnp.isnan(x))


def _mean_score(
    score: Callable[..., jax.Array],
    mean: jax.Array,
    variance: ArrayLike,
    targets: jax.Array,
    *rest: ArrayLike,
) -> jax.Array:
    """The mean over examples of a score, NaN where one of them has none; one program for all."""
    result: jax.Array = _compiled_mean(score, mean, variance, targets, *rest)
    return result


@partial(jax.jit, static_argnums=0)
def _compiled_mean(
    score: Callable[..., jax.Array],
    mean: jax.Array,
    variance: jax.Array,
    targets: jax.Array,
    *rest: jax.Array,
) -> jax.Array:
    samples = tuple(range(mean.ndim - targets.ndim))
    variance = jnp.broadcast_to(variance, mean.shape)
    sound = jnp.all(_is_gaussian(mean, variance), axis=samples) & jnp.isfinite(targets)
    return jnp.mean(jnp.where(sound, score(mean, variance, targets, *rest), jnp.nan))


def _squared_error(mean: jax.Array, _: jax.Array, targets: jax.Array) -> jax.Array:
    return (mean - targets) ** 2


def _log_density(mean: jax.Array, variance: jax.Array, targets: jax.Array) -> jax.Array:
    z = (targets - mean) / jnp.sqrt(variance)
    return -(math.log(2 * math.pi) + jnp.log(variance) + z**2) / 2


def _log_mixture(means: jax.Array, variances: jax.Array, targets: jax.Array) -> jax.Array:
    log_densities = _log_density(means, variances, targets[None])
    return jax.nn.logsumexp(log_densities, axis=0) - math.log(len(means))


def _is_inside(
    mean: jax.Array, variance: jax.Array, targets: jax.Array, quantile: jax.Array
) -> jax.Array:
    inside = jnp.abs(targets - mean) <= quantile * jnp.sqrt(variance)
    return inside.astype(mean.dtype)


def _crps(mean: jax.Array, variance: jax.Array, targets: jax.Array) -> jax.Array:
    sd = jnp.sqrt(variance)
    return _mean_distance(targets - mean, sd) - sd / math.sqrt(math.pi)


def _mixture_crps(means: jax.Array, variances: jax.Array, targets: jax.Array) -> jax.Array:
    to_target = jnp.mean(_mean_distance(targets[None] - means, jnp.sqrt(variances)), axis=0)
    return to_target - _mean_pair_distance(means, variances) / 2


def _mean_distance(mean: jax.Array, sd: jax.Array) -> jax.Array:
    """``E|x|`` of x from N(mean, sd^2)."""
    z = mean / (sd * math.sqrt(2))
    return mean * jax.lax.erf(z) + sd * math.sqrt(2 / math.pi) * jnp.exp(-(z**2))


def _mean_pair_distance(means: jax.Array, variances: jax.Array) -> jax.Array:
    """``E|x - x'|`` of independent x and x' from one mixture over the leading axis."""

    @jax.checkpoint  # a gradient, too, in the memory of S
    def from_one(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        mean, variance = one
        sd = jnp.sqrt(variances + variance[None])
        return jnp.mean(_mean_distance(means - mean[None], sd), axis=0)

    return jnp.mean(jax.lax.map(from_one, (means, variances)), axis=0)


@jax.jit
def _moments(means: jax.Array, variances: jax.Array) -> tuple[jax.Array, jax.Array]:
    variances = jnp.broadcast_to(variances, means.shape)
    shift = means - means[:1]
    centre = jnp.mean(shift, axis=0)
    variance = jnp.mean(variances + (shift - centre[None]) ** 2, axis=0)
    sound = jnp.all(_is_gaussian(means, variances), axis=0)
    return jnp.where(sound, means[0] + centre, jnp.nan), jnp.where(sound, variance, jnp.nan)


def _quantile(level: float) -> float:
    """Half the width of the central interval of a standard normal."""
    number = isinstance(level, Real) and not isinstance(level, bool)
    if not number or not 0 < level < 1:
        raise ValueError(
            f"level is {level!r}, but must be a number above 0 and below 1, static under jit: try "
            "0.95."
        )
    return NormalDist().inv_cdf((1 + float(level)) / 2)


def _is_gaussian(mean: jax.Array, variance: jax.Array) -> jax.Array:
    return jnp.isfinite(mean) & _is_variance(variance)


def _is_variance(variance: jax.Array) -> jax.Array:
    return (variance > 0) & (variance < jnp.inf)


def _read(probs: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Both arguments checked, the probabilities in float32 or better."""
    probs, labels = jnp.asarray(probs), jnp.asarray(labels)
    if labels.shape != probs.shape[:-1]:
        raise ValueError(
            f"labels has shape {labels.shape} and probs {probs.shape}, but labels must have the "
            f"shape of probs less its last axis, {probs.shape[:-1]}: pass probs first, and one "
            "class number per example (one-hot labels become numbers by argmax)."
        )
    probs = _read_probs("probs", probs)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels has dtype {labels.dtype}, but class numbers are integers: use "
            "labels.astype(int)."
        )
    # Narrow integers cannot be compared with a large number of classes.
    labels = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    if not isinstance(labels, jax.core.Tracer):
        _check_labels(labels, probs.shape[-1])
    return probs, labels


def _read_probs(name: str, probs: ArrayLike) -> jax.Array:
    probs = jnp.asarray(probs)
    if probs.ndim == 0 or probs.size == 0:
        raise ValueError(
            f"{name} has shape {probs.shape}, but must hold at least one example with its classes "
            "on the last axis: pass an array of shape (..., C)."
        )
    wide = jnp.issubdtype(probs.dtype, jnp.floating) and probs.dtype.itemsize >= 4
    probs = probs if wide else probs.astype(jnp.float32)
    if not isinstance(probs, jax.core.Tracer):
        _check_probs(name, probs)
    return probs


def _read_scores(name: str, scores: ArrayLike) -> jax.Array:
    scores = jnp.asarray(scores)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(
            f"{name} has shape {scores.shape}, but must be one-dimensional and not empty: pass one "
            "score per example (scores.ravel()), and jax.vmap over what is batched."
        )
    if not isinstance(scores, jax.core.Tracer):
        with jax.ensure_compile_time_eval():
            if _any_nan(scores):
                raise ValueError(
                    f"{name} holds NaN, which has no rank: leave these examples out, or look for "
                    "the cause in the model's outputs."
                )
    return scores


def _read_gaussian(
    mean: ArrayLike, variance: ArrayLike, targets: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arguments checked and of one dtype."""
    mean, targets = _read_pair("mean", mean, targets)
    mean, variance = _read_moments(("mean", "variance"), mean, variance)
    mean, variance, targets = _common((mean, variance, targets))
    return mean, variance, targets


def _read_mixture(
    means: ArrayLike, variances: ArrayLike, targets: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``_read_gaussian``, with the samples on a leading axis."""
    means, variances = _read_moments(("means", "variances"), means, variances)
    _check_samples(means)
    targets = _read_numbers("targets", targets)
    if targets.shape != means.shape[1:]:
        raise ValueError(
            f"targets has shape {targets.shape} and means {means.shape}, but targets must have "
            f"the shape of means less its first axis, {means.shape[1:]}: samples come first, and "
            "an axis of length one is dropped by reshape, not broadcast."
        )
    means, variances, targets = _common((means, variances, targets))
    return means, variances, targets


def _read_moments(
    names: tuple[str, str], mean: ArrayLike, variance: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    mean = _read_numbers(names[0], mean)
    variance = _read_numbers(names[1], variance, positive=True)
    if variance.ndim and variance.shape != mean.shape:
        raise ValueError(
            f"{names[1]} has shape {variance.shape} and {names[0]} {mean.shape}, but they must "
            f"have one shape, or {names[1]} be a scalar: nothing else is broadcast, so use "
            "reshape, or jnp.broadcast_to where that is meant."
        )
    mean, variance = _common((mean, variance))
    return mean, variance


def _read_pair(name: str, values: ArrayLike, targets: ArrayLike) -> tuple[jax.Array, jax.Array]:
    values, targets = _read_numbers(name, values), _read_numbers("targets", targets)
    if targets.shape != values.shape:
        raise ValueError(
            f"targets has shape {targets.shape} and {name} {values.shape}, but they must have one "
            f"shape: nothing is broadcast, so use targets.reshape({name}.shape) where that is "
            "meant. An axis of samples is for mixture_nll, mixture_crps and moment_match."
        )
    values, targets = _common((values, targets))
    return values, targets


def _read_numbers(name: str, values: ArrayLike, *, positive: bool = False) -> jax.Array:
    values = jnp.asarray(values)
    if values.size == 0:
        raise ValueError(
            f"{name} has shape {values.shape}, but must hold at least one example: nothing has no "
            "mean."
        )
    wide = jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.itemsize >= 4
    values = values if wide else values.astype(jnp.float32)
    if not isinstance(values, jax.core.Tracer):
        _check_numbers(name, values, positive)
    return values


def _common(arrays: tuple[jax.Array, ...]) -> list[jax.Array]:
    """All in the widest of their dtypes, which strict promotion would not grant."""
    dtype = max((x.dtype for x in arrays), key=lambda d: d.itemsize)
    return [x.astype(dtype) for x in arrays]


def _check_probs(name: str, probs: jax.Array) -> None:
    with jax.ensure_compile_time_eval():  # a constant may meet us inside a jitted function
        least, worst = (float(x) for x in _least_and_worst_sum(probs))
    if least < 0:
        raise ValueError(
            f"{name} holds the negative value {least:g}: probabilities are wanted. Logits become "
            "probabilities by jax.nn.softmax, log-probabilities by jnp.exp."
        )
    if not abs(worst - 1) <= _TOLERANCE:  # so written, NaN is caught
        raise ValueError(
            f"{name} sums to {worst:g} over its last axis for some example, not to 1. Logits "
            "become probabilities by jax.nn.softmax; two classes need two columns; nan comes from "
            "the model's outputs."
        )


@jax.jit
def _least_and_worst_sum(probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = jnp.sum(probs, axis=-1).ravel()
    return jnp.min(probs), total[jnp.argmax(jnp.abs(total - 1))]


def _check_labels(labels: jax.Array, num_classes: int) -> None:
    with jax.ensure_compile_time_eval():
        least, greatest = int(jnp.min(labels)), int(jnp.max(labels))
    if least < 0 or greatest >= num_classes:
        raise ValueError(
            f"labels holds {least if least < 0 else greatest}, but probs has {num_classes} "
            f"classes, 0 to {num_classes - 1}: renumber the labels, or leave these examples out."
        )


def _check_numbers(name: str, values: jax.Array, positive: bool) -> None:
    with jax.ensure_compile_time_eval():
        least, greatest = (float(x) for x in _least_and_greatest(values))  # NaN goes through both
    if not (math.isfinite(least) and math.isfinite(greatest)):
        bad = greatest if math.isfinite(least) else least
        raise ValueError(
            f"{name} holds the value {bad:g}, but must be finite: leave these examples out, or "
            "look for the cause in the model's outputs."
        )
    if positive and least <= 0:
        raise ValueError(
            f"{name} holds the value {least:g}, but must be positive: a network returns a "
            "variance through jnp.exp or jax.nn.softplus, and where it returns none the noise of "
            "the targets is to be added."
        )


@jax.jit
def _least_and_greatest(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(values), jnp.max(values)


def _check_samples(means: jax.Array) -> None:
    if means.ndim == 0:
        raise ValueError(
            "means has shape (), but needs an axis of samples first: stack the predictions of the "
            "samples, (S, ...)."
        )


def _check_histogram(num_classes: int, num_bins: int, smoothing: float) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes!r}, but must be 2 or more.")
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins!r}, but must be 1 or more: try 30.")
    if not 0 < smoothing < math.inf:
        raise ValueError(
            f"smoothing is {smoothing!r}, but must be finite and above 0, or an empty bin would "
            "make the divergence infinite: try 1.0."
        )


def _check_binning(num_bins: int, binning: str) -> None:
    if not isinstance(num_bins, Integral) or isinstance(num_bins, bool) or num_bins < 1:
        raise ValueError(
            f"num_bins is {num_bins!r}, but must be an integer of 1 or more, static under jit: "
            "try 20."
        )
    if binning not in ("width", "count"):
        raise ValueError(
            f"binning is {binning!r}, but must be 'width' (bins of equal width) or 'count' (bins "
            "of equally many examples)."
        )
