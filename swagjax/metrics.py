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

Weights: every function that averages over examples takes ``weights``, of the shape of the examples
(of ``labels`` or ``targets``) or of their leading axes, ``(N,)``; ``auroc``, ``fpr95`` and
``symmetrised_kl`` take ``weights_in`` and ``weights_out``. An example of weight w counts as if it
stood there w times. One of weight 0 does not count, whatever it holds: padding, NaN, a label such
as -100 or 255. If all weights are 0, the result is NaN.

Batches: the result for several batches is the mean of theirs, weighted by the total weight (or the
number of examples) of each; for ``rmse`` this holds of its square. The bins of ``reliability`` add,
``bins = bins_a + bins_b``, and ``bins.ece`` is the calibration error of both. ``auroc``, ``fpr95``,
``symmetrised_kl`` and bins of equal count do not combine: concatenate what they take.

Sums over examples keep their digits up to 10^8 of them in float32, on any device.

Outside ``jit`` values are checked: labels that are no class, probabilities that are negative or do
not sum to one, variances that are not positive, means and targets that are not finite, and negative
weights are a ``ValueError``. Inside ``jit``, ``vmap`` or ``grad`` nothing can be raised: there any
of them makes the metric NaN, a probability where it is NaN, negative or above one, as most logits
are. Sums of probabilities are not looked at there, which would cost time.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from swagjax import summing
from swagjax.summing import is_traced

# Sixteen-bit softmaxes and averages of them sum to one within about a percent; logits do not.
_TOLERANCE = 0.02

_TINY = float(jnp.finfo(jnp.float32).tiny)  # XLA takes what is smaller for zero


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("count", "hits", "gap", "rest"),
    meta_fields=("binning",),
)
@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, bin by bin; bins of several batches add.

    A pytree. ``bins_a + bins_b`` (and ``sum(...)``) are the bins of both batches, for
    ``binning="width"`` and one ``num_bins``; ``confidence, accuracy, count = bins`` unpacks. What
    rounding takes from a sum is held in ``rest``, so that any number of batches adds exactly.

    Attributes:
      count: number of examples, integers of shape ``(num_bins,)``; with weights their sum, floats.
      hits: number of those whose predicted class is the label; with weights their sum.
      gap: sum of hit minus confidence, shape ``(num_bins,)``.
      rest: what is missing in each of the three above.
      binning: ``"width"`` or ``"count"``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> bins = metrics.reliability(jnp.array([[0.75, 0.25]]), jnp.array([0]), num_bins=2)
      >>> print(bins.confidence, bins.accuracy, bins.count)
      [ nan 0.75] [nan  1.] [0 1]
      >>> bins += metrics.reliability(jnp.array([[0.75, 0.25]]), jnp.array([1]), num_bins=2)
      >>> print(bins.accuracy, bins.count, bins.ece)
      [nan 0.5] [0 2] 0.25
    """

    count: jax.Array
    hits: jax.Array
    gap: jax.Array
    rest: tuple[jax.Array, jax.Array, jax.Array]
    binning: str = "width"

    @property
    def confidence(self) -> jax.Array:
        """Mean probability of the predicted class, shape ``(num_bins,)``; NaN in an empty bin."""
        return _per_example(self.hits.astype(self.gap.dtype) - self.gap, self.count)

    @property
    def accuracy(self) -> jax.Array:
        """Share of examples whose predicted class is the label; NaN in an empty bin."""
        hits = jnp.where(jnp.isnan(self.gap), self.gap, self.hits.astype(self.gap.dtype))
        return _per_example(hits, self.count)

    @property
    def ece(self) -> jax.Array:
        """Expected calibration error, a scalar, see ``ece``."""
        return _calibration_error(self)

    def __iter__(self) -> Iterator[jax.Array]:
        """Give confidence, accuracy and count, as ``plot.reliability_diagram`` takes them."""
        return iter((self.confidence, self.accuracy, self.count))

    def __add__(self, other: "Reliability") -> "Reliability":
        """The bins of both batches together."""
        if not isinstance(other, Reliability):
            return NotImplemented
        if "count" in (self.binning, other.binning) or self.gap.shape != other.gap.shape:
            raise ValueError(
                f"bins of binning={self.binning!r} and {other.binning!r}, of shapes "
                f"{self.gap.shape} and {other.gap.shape}, have other edges and do not add: use "
                "binning='width' and one num_bins, or concatenate the probabilities."
            )
        return _add_bins(self, other)

    def __radd__(self, other: Any) -> "Reliability":
        """Let ``sum`` begin with its 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented


class Moments(NamedTuple):
    """Mean and variance of predictions, arrays of one shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> mean, variance = metrics.Moments(jnp.zeros(3), jnp.ones(3))
    """

    mean: jax.Array
    variance: jax.Array


def nll(probs: ArrayLike, labels: ArrayLike, *, weights: ArrayLike | None = None) -> jax.Array:
    """Negative log-likelihood of the labels, a mean over examples in nats.

    ``-mean(log probs[i, labels[i]])``. A label of probability exactly zero gives infinity: nothing
    is clipped, since any floor would be an invented score.

    Args:
      probs: probabilities, shape ``(..., C)``.
      labels: integer classes in ``[0, C)``, shape ``(...)``.
      weights: how many times each example counts, 0 for not at all; of the shape of ``labels`` or
        of its leading axes.

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
    return _mean_class_score(_surprise, *_read(probs, labels, weights))


def accuracy(probs: ArrayLike, labels: ArrayLike, *, weights: ArrayLike | None = None) -> jax.Array:
    """Share of examples whose most probable class is the label, in ``[0, 1]``.

    ``mean(argmax_c probs[i, c] == labels[i])``; of several equally probable classes the first
    counts.

    Args:
      probs: probabilities, shape ``(..., C)``.
      labels: integer classes in ``[0, C)``, shape ``(...)``.
      weights: how many times each example counts, 0 for not at all; of the shape of ``labels`` or
        of its leading axes.

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
    return _mean_class_score(_hit, *_read(probs, labels, weights))


def brier(probs: ArrayLike, labels: ArrayLike, *, weights: ArrayLike | None = None) -> jax.Array:
    """Brier score: squared error of the probabilities, in ``[0, 2]``.

    ``mean_i sum_c (probs[i, c] - [labels[i] == c])^2``: a sum over classes, a mean over examples.
    For two classes that is twice the one-column form which ``sklearn.metrics.brier_score_loss``
    reports.

    Args:
      probs: probabilities, shape ``(..., C)``.
      labels: integer classes in ``[0, C)``, shape ``(...)``.
      weights: how many times each example counts, 0 for not at all; of the shape of ``labels`` or
        of its leading axes.

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
    return _mean_class_score(_squared_distance, *_read(probs, labels, weights))


def ece(
    probs: ArrayLike,
    labels: ArrayLike,
    num_bins: int = 20,
    *,
    binning: str = "width",
    weights: ArrayLike | None = None,
) -> jax.Array:
    """Expected calibration error: mean distance of accuracy from confidence, in ``[0, 1]``.

    ``sum_b count[b] / n * |accuracy[b] - confidence[b]|`` over the bins of ``reliability``. Empty
    bins weigh nothing.

    Args:
      probs: probabilities, shape ``(..., C)``.
      labels: integer classes in ``[0, C)``, shape ``(...)``.
      num_bins: how many bins; static under ``jit``.
      binning: ``"width"`` or ``"count"``, see ``reliability``; static under ``jit``.
      weights: how many times each example counts, 0 for not at all; of the shape of ``labels`` or
        of its leading axes.

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
    return reliability(probs, labels, num_bins, binning=binning, weights=weights).ece


def reliability(
    probs: ArrayLike,
    labels: ArrayLike,
    num_bins: int = 20,
    *,
    binning: str = "width",
    weights: ArrayLike | None = None,
) -> Reliability:
    """Mean confidence, accuracy and count of the examples in each bin of confidence.

    The confidence of an example is the probability of its predicted class. With ``binning="width"``
    bin b is ``(b / num_bins, (b + 1) / num_bins]``, and the first holds its left end as well, so
    that confidences of exactly 0 and 1 are both counted. With ``binning="count"`` the examples are
    sorted by confidence (ties stay in their order) and cut into runs whose lengths differ by at
    most one, the longer ones first. With weights an example that lies across a cut is shared by
    both bins; the cuts are at whole numbers of examples if all weights are whole, and else at equal
    weights.

    Args:
      probs: probabilities, shape ``(..., C)``; the leading axes are examples.
      labels: integer classes in ``[0, C)``, shape ``(...)``.
      num_bins: how many bins; static under ``jit``.
      binning: ``"width"`` or ``"count"``; static under ``jit``.
      weights: how many times each example counts, 0 for not at all; of the shape of ``labels`` or
        of its leading axes.

    Returns:
      A ``Reliability`` of arrays of shape ``(num_bins,)``, which adds over batches. An empty bin
      has count 0 and NaN means.

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
    _check_binning(num_bins, binning)
    return _bins(*_read(probs, labels, weights), int(num_bins), binning)


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
    return _information(probs)


def auroc(
    scores_in: ArrayLike,
    scores_out: ArrayLike,
    *,
    weights_in: ArrayLike | None = None,
    weights_out: ArrayLike | None = None,
) -> jax.Array:
    """Area under the ROC curve: the chance that an out score exceeds an in score, in ``[0, 1]``.

    ``P(out > in) + P(out == in) / 2`` over all pairs, ties counted exactly; O(n log n) by sorting.
    For out-of-distribution detection the score is an uncertainty, such as ``predictive_entropy``.
    Scores are compared at the precision that they arrive in; a NaN among them gives NaN inside
    ``jit``.

    Args:
      scores_in: scores of the in-distribution (negative) examples, shape ``(n,)``.
      scores_out: scores of the out-of-distribution (positive) examples, shape ``(m,)``.
      weights_in: how many times each in example counts, 0 for not at all, shape ``(n,)``.
      weights_out: the same for the out examples, shape ``(m,)``.

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
    inside = _read_scores("scores_in", scores_in, weights_in)
    outside = _read_scores("scores_out", scores_out, weights_out)
    return _area(*inside, *outside)


def fpr95(
    scores_in: ArrayLike,
    scores_out: ArrayLike,
    *,
    weights_in: ArrayLike | None = None,
    weights_out: ArrayLike | None = None,
) -> jax.Array:
    """False-positive rate at 95 % true-positive rate: the share of in scores taken for out.

    ``min_t mean(in >= t)`` over the thresholds t with ``mean(out >= t) >= 0.95``: at least 95 % of
    the out-of-distribution examples are detected, at the price of this share of false alarms. The
    best is 0. Scores are compared at the precision that they arrive in; a NaN among them gives NaN
    inside ``jit``.

    Args:
      scores_in: scores of the in-distribution (negative) examples, shape ``(n,)``.
      scores_out: scores of the out-of-distribution (positive) examples, shape ``(m,)``.
      weights_in: how many times each in example counts, 0 for not at all, shape ``(n,)``.
      weights_out: the same for the out examples, shape ``(m,)``.

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
    inside = _read_scores("scores_in", scores_in, weights_in)
    outside = _read_scores("scores_out", scores_out, weights_out)
    return _false_alarms(*inside, *outside)


def symmetrised_kl(
    entropy_in: ArrayLike,
    entropy_out: ArrayLike,
    num_classes: int,
    num_bins: int = 30,
    *,
    smoothing: float = 1.0,
    weights_in: ArrayLike | None = None,
    weights_out: ArrayLike | None = None,
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
      weights_in: how many times each in example counts, 0 for not at all, shape ``(n,)``.
      weights_out: the same for the out examples, shape ``(m,)``.

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
    inside = _read_scores("entropy_in", entropy_in, weights_in)
    outside = _read_scores("entropy_out", entropy_out, weights_out)
    return _divergence(*inside, *outside, num_classes, num_bins, smoothing)


def rmse(
    predictions: ArrayLike, targets: ArrayLike, *, weights: ArrayLike | None = None
) -> jax.Array:
    """Root mean squared error, in the units of the targets.

    ``sqrt(mean((predictions - targets)^2))``, the mean over all elements.

    Args:
      predictions: predicted values, shape ``(...)``.
      targets: true values, shape ``(...)``, the same.
      weights: how many times each example counts, 0 for not at all; of the shape of ``targets`` or
        of its leading axes.

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
    weights = summing.read_weights(weights, "targets", targets.shape)
    _check_numbers({"predictions": predictions, "targets": targets}, weights, targets.ndim)
    return jnp.sqrt(_mean_score(_squared_error, predictions, 1.0, targets, weights))


def gaussian_nll(
    mean: ArrayLike,
    variance: ArrayLike,
    targets: ArrayLike,
    *,
    weights: ArrayLike | None = None,
) -> jax.Array:
    """Negative log density of the targets under Gaussians, a mean over examples in nats.

    ``mean_i 1/2 (log(2 pi variance[i]) + (targets[i] - mean[i])^2 / variance[i])``. A density has
    units: targets divided by a constant a lower it by ``log a``, so name the scale it is given in.

    Args:
      mean: predicted means, shape ``(...)``.
      variance: predicted variances, noise included, shape ``(...)`` or a scalar.
      targets: true values, shape ``(...)``.
      weights: how many times each example counts, 0 for not at all; of the shape of ``targets`` or
        of its leading axes.

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
    return -_mean_score(_log_density, *_read_gaussian(mean, variance, targets, weights))


def mixture_nll(
    means: ArrayLike,
    variances: ArrayLike,
    targets: ArrayLike,
    *,
    event_ndim: int = 0,
    weights: ArrayLike | None = None,
) -> jax.Array:
    """Negative log density of the targets under mixtures of S Gaussians, a mean in nats.

    ``-mean_i log(1/S sum_s N(targets[i]; means[s, i], variances[s, i]))``, by ``logsumexp``: the
    Bayesian average of densities, as ``nll`` scores the Bayesian average of probabilities.

    By default each number is scored alone: of targets ``(N, D)`` it is the mean over examples and
    outputs, each output under its own mixture, whatever the samples say of the outputs together.
    ``event_ndim=1`` gives the joint density of the D outputs of an example, which are independent
    given a sample, ``1/S sum_s prod_d N(targets[i, d]; ...)``, and the mean is over examples alone.

    Args:
      means: predicted means under S samples of the weights, shape ``(S, ...)``.
      variances: predicted variances, noise included, shape ``(S, ...)`` or a scalar.
      targets: true values, shape ``(...)``.
      event_ndim: how many trailing axes of ``targets`` are the outputs of one example, scored
        jointly; static under ``jit``.
      weights: how many times each example counts, 0 for not at all; of the shape of ``targets``
        without its ``event_ndim`` last axes, or of its leading axes.

    Returns:
      A scalar.

    Raises:
      ValueError: as for ``gaussian_nll``; no axis of samples; an ``event_ndim`` that ``targets``
        does not have.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import metrics
      >>> means = jnp.array([[-1.0], [1.0]])  # S = 2 samples, one example
      >>> metrics.mixture_nll(means, 1.0, jnp.array([0.0])).round(4)
      Array(1.4189, dtype=float32)

    Source: Maddox et al. (2019), section 3.3 (Bayesian model averaging).
    """
    score = _log_mixture(event_ndim)
    return -_mean_score(score, *_read_mixture(means, variances, targets, weights, event_ndim))


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
    _check_numbers({"means": means, "variances": variances})
    return Moments(*_moments(means, variances))


def coverage(
    mean: ArrayLike,
    variance: ArrayLike,
    targets: ArrayLike,
    *,
    level: float = 0.95,
    weights: ArrayLike | None = None,
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
      weights: how many times each example counts, 0 for not at all; of the shape of ``targets`` or
        of its leading axes.

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
    arrays = _read_gaussian(mean, variance, targets, weights)
    return _mean_score(_is_inside, *arrays, _quantile(level))


def interval_width(
    variance: ArrayLike, *, level: float = 0.95, weights: ArrayLike | None = None
) -> jax.Array:
    """Mean width of the central interval of Gaussians, in the units of the targets.

    ``mean_i 2 q sqrt(variance[i])`` with q as in ``coverage``: of two methods of equal coverage the
    one of narrower intervals is the sharper.

    Args:
      variance: predicted variances, noise included, shape ``(...)``.
      level: probability of the interval, a number in ``(0, 1)``; static under ``jit``.
      weights: how many times each example counts, 0 for not at all; of the shape of ``variance`` or
        of its leading axes.

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
    variance = _read_numbers("variance", variance)
    weights = summing.read_weights(weights, "variance", variance.shape)
    _check_numbers({"variance": variance}, weights, variance.ndim)
    return _mean_width(variance, weights, 2 * _quantile(level))


def gaussian_crps(
    mean: ArrayLike,
    variance: ArrayLike,
    targets: ArrayLike,
    *,
    weights: ArrayLike | None = None,
) -> jax.Array:
    """Continuous ranked probability score of Gaussians, in the units of the targets.

    ``mean_i sd (z (2 Phi(z) - 1) + 2 phi(z) - pi^(-1/2))`` with ``sd = sqrt(variance[i])`` and
    ``z = (targets[i] - mean[i]) / sd``: the integral of ``(F(x) - [x >= target])^2`` over x. The
    less the better; the absolute error where the variance is nothing.

    Args:
      mean: predicted means, shape ``(...)``.
      variance: predicted variances, noise included, shape ``(...)`` or a scalar.
      targets: true values, shape ``(...)``.
      weights: how many times each example counts, 0 for not at all; of the shape of ``targets`` or
        of its leading axes.

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
    return _mean_score(_crps, *_read_gaussian(mean, variance, targets, weights))


def mixture_crps(
    means: ArrayLike,
    variances: ArrayLike,
    targets: ArrayLike,
    *,
    weights: ArrayLike | None = None,
) -> jax.Array:
    """Continuous ranked probability score of mixtures of S Gaussians, in units of the targets.

    ``mean_i (1/S sum_s A(y - m_s, v_s) - 1/(2 S^2) sum_st A(m_s - m_t, v_s + v_t))``, where
    ``A(m, v) = E|N(m, v)| = m (2 Phi(m / sd) - 1) + 2 sd phi(m / sd)`` with ``sd = sqrt(v)``. All
    pairs of samples are compared, S^2 times the work, in the memory of S. Of several outputs each
    is scored alone, under its own mixture, and the mean is over examples and outputs.

    Args:
      means: predicted means under S samples of the weights, shape ``(S, ...)``.
      variances: predicted variances, noise included, shape ``(S, ...)`` or a scalar.
      targets: true values, shape ``(...)``.
      weights: how many times each example counts, 0 for not at all; of the shape of ``targets`` or
        of its leading axes.

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
    return _mean_score(_mixture_crps, *_read_mixture(means, variances, targets, weights))


@partial(jax.jit, static_argnums=0)
def _mean_class_score(
    score: Callable[[jax.Array, jax.Array], jax.Array],
    probs: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None,
) -> jax.Array:
    """The mean over examples of a score, NaN where one of them has none; one program for all."""
    probs, labels = summing.blank(probs, weights), summing.blank(labels, weights, fill=0)
    scores = jnp.where(_is_sound(probs, labels), score(probs, labels), jnp.nan)
    return summing.mean(scores, weights)


def _surprise(probs: jax.Array, labels: jax.Array) -> jax.Array:
    index = labels.astype(jnp.int32)[..., None]
    return -jnp.log(jnp.take_along_axis(probs, index, axis=-1)[..., 0])


def _hit(probs: jax.Array, labels: jax.Array) -> jax.Array:
    """One where the predicted class is the label, else zero."""
    return (jnp.argmax(probs, axis=-1).astype(labels.dtype) == labels).astype(probs.dtype)


def _squared_distance(probs: jax.Array, labels: jax.Array) -> jax.Array:
    classes = jax.lax.broadcasted_iota(labels.dtype, probs.shape, probs.ndim - 1)
    target = labels[..., None] == classes
    return jnp.sum((probs - target.astype(probs.dtype)) ** 2, axis=-1)


def _is_sound(probs: jax.Array, labels: jax.Array) -> jax.Array:
    """Where the label is one of the classes and every number may be a probability."""
    is_class = (labels >= 0) & (labels < probs.shape[-1])
    return is_class & jnp.all(_in_range(probs), axis=-1)


def _in_range(probs: jax.Array) -> jax.Array:
    """Where a number may be a probability; a NaN may not."""
    return (probs >= 0) & (probs <= 1 + _TOLERANCE)


@partial(jax.jit, static_argnums=(3, 4))
def _bins(
    probs: jax.Array, labels: jax.Array, weights: jax.Array | None, num_bins: int, binning: str
) -> Reliability:
    probs, labels = summing.blank(probs, weights), summing.blank(labels, weights, fill=0)
    hit, confidence = _hit(probs, labels).ravel(), jnp.max(probs, axis=-1).ravel()
    # Differences are summed, not confidences: the sum of many 0.9999 keeps no digits of the rest.
    gap = jnp.where(_is_sound(probs, labels).ravel(), hit - confidence, jnp.nan)
    if weights is not None:
        weights = summing.spread_weights(weights, labels.shape, gap.dtype).ravel()
    hit, confidence, gap, weights = map(summing.gathered, (hit, confidence, gap, weights))
    if weights is not None and binning == "count":
        count, hits, gap = _share_by_count(confidence, hit, gap, weights, num_bins)
    else:
        index = (_equal_width if binning == "width" else _equal_count)(confidence, num_bins)
        # Without weights integers, which do not stop at 2^24.
        hit = hit.astype(jnp.int32) if weights is None else weights * hit
        gap = gap if weights is None else weights * gap
        each = jnp.ones_like(hit) if weights is None else weights
        count, hits, gap = (summing.sum_by_bin(x, index, num_bins) for x in (each, hit, gap))
    rest = jnp.zeros_like(count), jnp.zeros_like(hits), jnp.zeros_like(gap)
    return Reliability(count, hits, gap, rest, binning)


def _equal_width(confidence: jax.Array, num_bins: int) -> jax.Array:
    """Bin of each confidence: the number of inner edges below it, which closes both ends."""
    # Python divides: XLA may turn a division by a constant into a product and shift an edge.
    edges = jnp.array([k / num_bins for k in range(1, num_bins)], confidence.dtype)
    return jnp.searchsorted(edges, confidence, side="left")


def _equal_count(confidence: jax.Array, num_bins: int) -> jax.Array:
    """Bin of each confidence by its rank; the first ``n % num_bins`` bins hold one more."""
    each, more = divmod(confidence.size, num_bins)
    cuts = jnp.array([each * b + min(b, more) for b in range(1, num_bins)], jnp.int32)
    # The ranks are computed, and no constant: XLA would fold what follows, for a minute.
    by_rank = jnp.searchsorted(cuts, jax.lax.iota(jnp.int32, confidence.size), side="right")
    return jnp.zeros_like(by_rank).at[jnp.argsort(confidence, stable=True)].set(by_rank)


def _share_by_count(
    confidence: jax.Array, hit: jax.Array, gap: jax.Array, weights: jax.Array, num_bins: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of weights, hits and gaps in bins of equal weight by rank of confidence."""
    order = jnp.argsort(confidence, stable=True)
    weights = weights[order]
    stand = summing.running_sum(weights)
    cuts = _cuts(stand[-1], jnp.all(weights == jnp.floor(weights)), num_bins)
    last = jnp.searchsorted(stand, cuts, side="right")  # how many lie below each cut as a whole

    def up_to_cut(x: jax.Array) -> jax.Array:
        below = jnp.concatenate([jnp.zeros_like(x[:1]), summing.running_sum(x * weights)])[last]
        start = jnp.concatenate([jnp.zeros_like(x[:1]), stand])[last]
        i = jnp.minimum(last, x.size - 1)
        return below + jnp.where(last < x.size, x[i] * (cuts - start), 0)

    return jnp.diff(cuts), jnp.diff(up_to_cut(hit[order])), jnp.diff(up_to_cut(gap[order]))


def _cuts(total: jax.Array, whole: jax.Array, num_bins: int) -> jax.Array:
    """Where along the weights bins begin and end: as ``_equal_count`` does if they are whole."""
    b = jnp.arange(num_bins + 1, dtype=total.dtype)
    each = jnp.floor(total / num_bins)
    of_whole = each * b + jnp.minimum(b, total - each * num_bins)
    return jnp.where(whole, of_whole, total * (b / num_bins)).at[-1].set(total)


def _per_example(sums: jax.Array, count: jax.Array) -> jax.Array:
    with summing.nan_is_meant():  # of an empty bin
        return _safe_ratio(sums, count)


@jax.jit
def _safe_ratio(sums: jax.Array, count: jax.Array) -> jax.Array:
    n = count.astype(sums.dtype)
    return jnp.where(n > 0, sums / jnp.where(n > 0, n, 1), jnp.nan)


@jax.jit
def _calibration_error(bins: Reliability) -> jax.Array:
    count = summing.block_sum(bins.count).astype(bins.gap.dtype)
    return summing.block_sum(jnp.abs(bins.gap)) / count


@jax.jit
def _add_bins(a: Reliability, b: Reliability) -> Reliability:
    kinds = [jnp.result_type(x) for x in (a.count, b.count, a.gap, b.gap)]
    count = max(kinds[:2], key=lambda d: (jnp.issubdtype(d, jnp.floating), d.itemsize))
    gap = max(kinds[2:], key=lambda d: d.itemsize)

    def pairs(bins: Reliability) -> list[tuple[jax.Array, jax.Array]]:
        sums = zip((bins.count, bins.hits, bins.gap), bins.rest, (count, count, gap), strict=True)
        return [(high.astype(dtype), low.astype(dtype)) for high, low, dtype in sums]

    counts, hits, gaps = (summing.two_sum(*x) for x in zip(pairs(a), pairs(b), strict=True))
    rest = counts[1], hits[1], gaps[1]
    return Reliability(counts[0], hits[0], gaps[0], rest, a.binning)


@jax.jit
def _entropy(probs: jax.Array) -> jax.Array:
    positive = probs > 0
    terms = -probs * jnp.log(jnp.where(positive, probs, 1))
    return jnp.sum(jnp.where(_in_range(probs), terms, jnp.nan), axis=-1)


@jax.jit
def _information(probs: jax.Array) -> jax.Array:
    whole = _entropy(jnp.mean(probs, axis=0))
    return jnp.maximum(whole - jnp.mean(_entropy(probs), axis=0), 0.0)


@jax.jit
def _area(
    inside: jax.Array,
    weights_in: jax.Array | None,
    outside: jax.Array,
    weights_out: jax.Array | None,
) -> jax.Array:
    inside, weights_in, outside, weights_out = map(
        summing.gathered, (inside, weights_in, outside, weights_out)
    )
    inside, outside = summing.blank(inside, weights_in), summing.blank(outside, weights_out)
    below, not_above = (_share_below(inside, weights_in, outside, s) for s in ("left", "right"))
    area = summing.mean((below + not_above) / 2, weights_out)
    return jnp.where(_any_nan(inside) | _any_nan(outside), jnp.nan, area)


def _share_below(
    scores: jax.Array, weights: jax.Array | None, points: jax.Array, side: str
) -> jax.Array:
    """Share of the scores below each point, ``side="left"``, or not above it."""
    if weights is None:
        # Shares before sums: counts of pairs overflow int32 from 46341 examples a side.
        return jnp.searchsorted(jnp.sort(scores), points, side=side) / scores.size
    order = jnp.argsort(scores)
    total = summing.running_sum(summing.spread_weights(weights, scores.shape)[order])
    total = jnp.concatenate([jnp.zeros_like(total[:1]), total])
    return total[jnp.searchsorted(scores[order], points, side=side)] / total[-1]


@jax.jit
def _false_alarms(
    inside: jax.Array,
    weights_in: jax.Array | None,
    outside: jax.Array,
    weights_out: jax.Array | None,
) -> jax.Array:
    inside, weights_in, outside, weights_out = map(
        summing.gathered, (inside, weights_in, outside, weights_out)
    )
    inside, outside = summing.blank(inside, weights_in), summing.blank(outside, weights_out)
    threshold, has_weight = _threshold(outside, weights_out)
    alarm = inside >= threshold
    if weights_in is None:
        rate = jnp.sum(alarm) / alarm.size
    else:
        rate = summing.mean(alarm.astype(weights_in.dtype), weights_in)
    sound = has_weight & ~_any_nan(inside) & ~_any_nan(outside)
    return jnp.where(sound, rate, jnp.nan)


def _threshold(scores: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The greatest score that 95 % of the scores reach, and whether any of them counts."""
    if weights is None:
        detected = -(-95 * scores.size // 100)  # rounded up, in integers
        return jnp.sort(scores)[scores.size - detected], jnp.array(True)
    order = jnp.argsort(scores, descending=True)
    total = summing.running_sum(summing.spread_weights(weights, scores.shape)[order])
    return scores[order][jnp.argmax(20 * total >= 19 * total[-1])], total[-1] > 0


@partial(jax.jit, static_argnums=(4, 5, 6))
def _divergence(
    inside: jax.Array,
    weights_in: jax.Array | None,
    outside: jax.Array,
    weights_out: jax.Array | None,
    num_classes: int,
    num_bins: int,
    smoothing: float,
) -> jax.Array:
    inside, weights_in, outside, weights_out = map(
        summing.gathered, (inside, weights_in, outside, weights_out)
    )
    inside, outside = summing.blank(inside, weights_in), summing.blank(outside, weights_out)
    pairs = (inside, weights_in), (outside, weights_out)
    counts = [_histogram(*pair, math.log(num_classes), num_bins) + smoothing for pair in pairs]
    p, q = (count / jnp.sum(count) for count in counts)
    divergence = jnp.sum((p - q) * jnp.log(p / q))
    return jnp.where(_any_nan(inside) | _any_nan(outside), jnp.nan, divergence)


def _histogram(
    entropy: jax.Array, weights: jax.Array | None, top: float, num_bins: int
) -> jax.Array:
    """Examples in bins of equal width from 0 to ``top``; rounding may take some beyond an end."""
    entropy = summing.widen(entropy)
    index = jnp.clip(jnp.floor(entropy / top * num_bins), 0, num_bins - 1).astype(jnp.int32)
    if weights is None:
        return summing.sum_by_bin(jnp.ones_like(index), index, num_bins).astype(entropy.dtype)
    each = summing.spread_weights(weights, index.shape, entropy.dtype)
    count = summing.sum_by_bin(each, index, num_bins)
    return jnp.where(jnp.any(count > 0), count, jnp.nan)


def _any_nan(x: jax.Array) -> jax.Array:
    return jnp.any(jnp.isnan(x))


@partial(jax.jit, static_argnums=0)
def _mean_score(
    score: Callable[..., jax.Array],
    mean: jax.Array,
    variance: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None,
    *rest: ArrayLike,
) -> jax.Array:
    """The mean over examples of a score, NaN where one of them has none; one program for all."""
    lead = mean.ndim - targets.ndim
    variance = jnp.broadcast_to(variance, mean.shape)
    mean, variance = (summing.blank(x, weights, lead) for x in (mean, variance))
    targets = summing.blank(targets, weights)
    scores = score(mean, variance, targets, *rest)
    sound = jnp.all(_is_gaussian(mean, variance), axis=tuple(range(lead))) & jnp.isfinite(targets)
    sound = jnp.all(sound, axis=tuple(range(scores.ndim, targets.ndim)))
    return summing.mean(jnp.where(sound, scores, jnp.nan), weights)


@jax.jit
def _mean_width(variance: jax.Array, weights: jax.Array | None, factor: ArrayLike) -> jax.Array:
    variance = summing.blank(variance, weights)
    width = jnp.where(_is_variance(variance), factor * jnp.sqrt(variance), jnp.nan)
    return summing.mean(width, weights)


def _squared_error(mean: jax.Array, _: jax.Array, targets: jax.Array) -> jax.Array:
    return (mean - targets) ** 2


def _log_density(mean: jax.Array, variance: jax.Array, targets: jax.Array) -> jax.Array:
    z = (targets - mean) / jnp.sqrt(variance)
    return -(math.log(2 * math.pi) + jnp.log(variance) + z**2) / 2


@functools.cache  # one function object, and one program, for each number of axes
def _log_mixture(event_ndim: int) -> Callable[..., jax.Array]:
    """Log density of a mixture, joint over the trailing axes."""

    def score(means: jax.Array, variances: jax.Array, targets: jax.Array) -> jax.Array:
        log_densities = _log_density(means, variances, targets[None])
        joint = jnp.sum(log_densities, axis=tuple(range(-event_ndim, 0)))
        return _logsumexp(joint) - math.log(len(means))

    return score


def _logsumexp(x: jax.Array) -> jax.Array:
    """Over the first axis, of numbers that a fused program may compute twice, each time rounded.

    Where they are near 1e8 the second is above the maximum of the first by 16 or more, and an
    exponential that should be 1 is infinite.
    """
    top = jax.lax.stop_gradient(jnp.max(x, axis=0, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, jnp.zeros_like(top))
    below = x - top
    below = jnp.where(below > 0, below - jax.lax.stop_gradient(below), below)
    return jnp.log(jnp.sum(jnp.exp(below), axis=0)) + top[0]


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


def _read(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The arguments checked, the probabilities in float32 or better."""
    probs, given, labels = summing.read_numbers(probs), labels, summing.read_integers(labels)
    if labels.shape != probs.shape[:-1]:
        raise ValueError(
            f"labels has shape {labels.shape} and probs {probs.shape}, but labels must have the "
            f"shape of probs less its last axis, {probs.shape[:-1]}: pass probs first, and one "
            "class number per example (one-hot labels become numbers by argmax)."
        )
    probs = _widen_probs("probs", probs)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels has dtype {labels.dtype}, but class numbers are integers: use "
            "labels.astype(int)."
        )
    # Narrow integers cannot be compared with a large number of classes.
    labels = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    weights = summing.read_weights(weights, "labels", labels.shape)
    _check_classes("probs", probs, labels, weights, given)
    return probs, labels, weights


def _read_probs(name: str, probs: ArrayLike) -> jax.Array:
    probs = _widen_probs(name, summing.read_numbers(probs))
    _check_classes(name, probs)
    return probs


def _widen_probs(name: str, probs: jax.Array) -> jax.Array:
    if probs.ndim == 0 or probs.size == 0:
        raise ValueError(
            f"{name} has shape {probs.shape}, but must hold at least one example with its classes "
            "on the last axis: pass an array of shape (..., C)."
        )
    return summing.widen(probs)


def _read_scores(
    name: str, scores: ArrayLike, weights: ArrayLike | None
) -> tuple[jax.Array, jax.Array | None]:
    scores = summing.read_numbers(scores)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(
            f"{name} has shape {scores.shape}, but must be one-dimensional and not empty: pass one "
            "score per example (scores.ravel()), and jax.vmap over what is batched."
        )
    weights = summing.read_weights(weights, name, scores.shape)
    if not (is_traced(scores) or is_traced(weights)):
        _check_scores(name, scores, weights)
    return scores, weights


def _read_gaussian(
    mean: ArrayLike, variance: ArrayLike, targets: ArrayLike, weights: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The arguments checked and of one dtype."""
    mean, targets = _read_pair("mean", mean, targets)
    mean, variance = _read_moments(("mean", "variance"), mean, variance)
    weights = summing.read_weights(weights, "targets", targets.shape)
    arrays = {"mean": mean, "variance": variance, "targets": targets}
    _check_numbers(arrays, weights, targets.ndim)
    mean, variance, targets = _common((mean, variance, targets))
    return mean, variance, targets, weights


def _read_mixture(
    means: ArrayLike,
    variances: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike | None,
    event_ndim: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
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
    if event_ndim not in range(targets.ndim + 1):
        raise ValueError(
            f"event_ndim is {event_ndim!r}, but targets has {targets.ndim} axes: give how many of "
            "its last axes are outputs of one example, 1 for targets of shape (N, D)."
        )
    of_examples = targets.shape[: targets.ndim - event_ndim]
    weights = summing.read_weights(weights, "targets", of_examples)
    arrays = {"means": means, "variances": variances, "targets": targets}
    _check_numbers(arrays, weights, targets.ndim)
    means, variances, targets = _common((means, variances, targets))
    return means, variances, targets, weights


def _read_moments(
    names: tuple[str, str], mean: ArrayLike, variance: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    mean, variance = (_read_numbers(*x) for x in zip(names, (mean, variance), strict=True))
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


def _read_numbers(name: str, values: ArrayLike) -> jax.Array:
    values = summing.read_numbers(values)
    if values.size == 0:
        raise ValueError(
            f"{name} has shape {values.shape}, but must hold at least one example: nothing has no "
            "mean."
        )
    return summing.widen(values)


def _common(arrays: tuple[jax.Array, ...]) -> list[jax.Array]:
    """All in the widest of their dtypes, which strict promotion would not grant."""
    dtype = max((x.dtype for x in arrays), key=lambda d: d.itemsize)
    return [x.astype(dtype) for x in arrays]


def _check_classes(
    name: str,
    probs: jax.Array,
    labels: jax.Array | None = None,
    weights: jax.Array | None = None,
    given: ArrayLike | None = None,
) -> None:
    """Refuse what is no class or no probability, in one program; skip what is traced."""
    known = [None if is_traced(x) else x for x in (probs, labels)]
    if is_traced(weights) or (known[0] is None and known[1] is None and weights is None):
        return
    with jax.ensure_compile_time_eval():  # a constant may meet us inside a jitted function
        least_weight, least, sums, lowest, highest = jax.device_get(_extremes(*known, weights))
    worst = max(sums, key=lambda total: abs(total - 1))
    summing.check_weights(least_weight)
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
    summing.check_labels(lowest, highest, name, probs.shape[-1], given)


@jax.jit
def _extremes(probs: Any, labels: Any, weights: Any) -> tuple[Any, ...]:
    """Least weight; least probability, ends of its sums; ends of the labels: of what counts."""
    least_weight = 0.0 if weights is None else jnp.min(weights)
    least: Any = 0.0
    sums: Any = (1.0, 1.0)
    lowest: Any = 0
    highest: Any = 0
    if probs is not None:
        probs = summing.blank(probs, weights)
        total = summing.blank(jnp.sum(probs, axis=-1), weights)
        least, sums = jnp.min(probs), (jnp.min(total), jnp.max(total))
    if labels is not None:
        labels = summing.blank(labels, weights, fill=0)
        lowest, highest = jnp.min(labels), jnp.max(labels)
    return least_weight, least, sums, lowest, highest


def _check_scores(name: str, scores: jax.Array, weights: jax.Array | None) -> None:
    with jax.ensure_compile_time_eval():
        least_weight, has_nan = jax.device_get(_score_faults(scores, weights))
    summing.check_weights(least_weight, "weights_" + name.split("_")[1])
    if has_nan:
        raise ValueError(
            f"{name} holds NaN, which has no rank: leave these examples out, or look for the cause "
            "in the model's outputs."
        )


@jax.jit
def _score_faults(scores: jax.Array, weights: jax.Array | None) -> tuple[ArrayLike, jax.Array]:
    least: ArrayLike = 0.0 if weights is None else jnp.min(weights)
    return least, _any_nan(summing.blank(scores, weights))


def _check_numbers(
    arrays: dict[str, jax.Array], weights: jax.Array | None = None, ndim: int = 0
) -> None:
    """Refuse what is not finite, and variances that are not positive, in one program."""
    known = {name: x for name, x in arrays.items() if not is_traced(x)}
    if is_traced(weights) or not (known or weights is not None):
        return
    with jax.ensure_compile_time_eval():
        found = _least_and_greatest(tuple(known.values()), weights, ndim)
        least_weight, ends = jax.device_get(found)
    summing.check_weights(least_weight)
    for name, (least, greatest) in zip(known, ends, strict=True):
        _check_ends(name, float(least), float(greatest))


def _check_ends(name: str, least: float, greatest: float) -> None:
    if not (math.isfinite(least) and math.isfinite(greatest)):
        bad = greatest if math.isfinite(least) else least
        raise ValueError(
            f"{name} holds the value {bad:g}, but must be finite: leave these examples out, or "
            "look for the cause in the model's outputs."
        )
    if name.startswith("variance") and least < _TINY:
        raise ValueError(
            f"{name} holds the value {least:g}, but must be positive: a network returns a "
            "variance through jnp.exp or jax.nn.softplus, and where it returns none the noise of "
            "the targets is to be added."
        )


@partial(jax.jit, static_argnums=2)
def _least_and_greatest(
    arrays: tuple[jax.Array, ...], weights: jax.Array | None, ndim: int
) -> tuple[ArrayLike, list[tuple[jax.Array, jax.Array]]]:
    """The least weight, and the ends of each array; NaN goes through both."""
    least: ArrayLike = 0.0 if weights is None else jnp.min(weights)
    arrays = tuple(summing.blank(x, weights, max(x.ndim - ndim, 0)) for x in arrays)
    return least, [(jnp.min(x), jnp.max(x)) for x in arrays]


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
