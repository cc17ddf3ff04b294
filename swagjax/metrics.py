"""How good, how well calibrated and how cautious predicted probabilities are.

Every function takes arrays and returns a JAX scalar or array, is pure, and works under ``jit`` and
``vmap``. ``probs`` has shape ``(..., C)``, ``labels`` is an integer array of shape ``(...)``; what
is averaged over examples is a mean, never a sum. Half precision is widened to float32 first.

Outside ``jit`` values are checked: labels that are no class and probabilities that are negative or
do not sum to one are a ``ValueError``. Inside ``jit``, ``vmap`` or ``grad`` nothing can be raised:
a label that is no class, and a probability that is NaN, negative or above one, as most logits are,
make the metric NaN. Sums are not looked at there, which would cost time.
"""

from functools import partial
from numbers import Integral
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
    target = labels[..., None] == jnp.arange(probs.shape[-1], dtype=labels.dtype)
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
