import functools
import math
import re

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from swagjax import metrics

PER_LABEL = (metrics.nll, metrics.accuracy, metrics.brier, metrics.ece)
BINNINGS = ("width", "count")
settings.register_profile("metrics", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("metrics")


def example(seed=0, n=211, classes=7, spread=2.0):
    """Over-confident float32 predictions with labels that they only half explain."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (n, classes))
    labels = np.array([rng.choice(classes, p=p) for p in softmax(0.6 * logits)])
    return softmax(logits).astype(np.float32), labels


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def binary(confidence, hit):
    """Two-class predictions of given confidences (0.5 or more), right or wrong as told."""
    confidence = np.asarray(confidence, np.float32)
    probs = np.stack([confidence, 1 - confidence], -1)
    return probs, np.where(np.asarray(hit, bool), 0, 1)


def bin_members(confidence, num_bins, binning):
    """The examples of each bin, found one by one."""
    if binning == "count":
        order = sorted(range(len(confidence)), key=lambda i: (confidence[i], i))
        return [list(part) for part in np.array_split(order, num_bins)]
    members = [[] for _ in range(num_bins)]
    for i, value in enumerate(confidence):
        for b in range(num_bins):
            low, high = np.float32(b / num_bins), np.float32((b + 1) / num_bins)
            if low < value <= high or (b == 0 and value == 0):
                members[b].append(i)
    return members


def reliability_oracle(probs, labels, num_bins, binning):
    rows = []
    confidence, predicted = probs.max(-1), probs.argmax(-1)
    for members in bin_members(confidence, num_bins, binning):
        total = sum(float(confidence[i]) for i in members)
        hits = sum(int(predicted[i] == labels[i]) for i in members)
        n = len(members)
        rows.append((total / n, hits / n, n) if n else (math.nan, math.nan, 0))
    return np.array(rows).T


def ece_oracle(probs, labels, num_bins, binning):
    total = 0.0
    for conf, acc, n in reliability_oracle(probs, labels, num_bins, binning).T:
        total += n * abs(acc - conf) if n else 0.0
    return total / len(labels)


# Against scikit-learn, SciPy and loops in float64.


@pytest.mark.parametrize("seed", range(3))
def test_nll_accuracy_and_brier(seed):
    probs, labels = example(seed)
    wide = probs.astype(np.float64)
    wide /= wide.sum(-1, keepdims=True)
    expected = {
        metrics.nll: sklearn.metrics.log_loss(labels, wide, labels=range(7)),
        metrics.accuracy: sklearn.metrics.accuracy_score(labels, probs.argmax(-1)),
        metrics.brier: sklearn.metrics.brier_score_loss(
            labels, wide, labels=range(7), scale_by_half=False
        ),
    }
    for metric, value in expected.items():
        np.testing.assert_allclose(metric(probs, labels), value, rtol=2e-6)


@pytest.mark.parametrize("binning", BINNINGS)
@pytest.mark.parametrize("num_bins", [1, 15, 20, 300])
def test_ece_and_reliability(num_bins, binning):
    probs, labels = example(num_bins)
    bins = metrics.reliability(probs, labels, num_bins, binning=binning)
    conf, acc, count = reliability_oracle(probs, labels, num_bins, binning)
    np.testing.assert_array_equal(bins.count, count)
    np.testing.assert_allclose(bins.accuracy, acc, rtol=1e-6)
    np.testing.assert_allclose(bins.confidence, conf, rtol=2e-6)
    ece = metrics.ece(probs, labels, num_bins, binning=binning)
    np.testing.assert_allclose(ece, ece_oracle(probs, labels, num_bins, binning), rtol=5e-6)


@pytest.mark.slow
@given(
    steps=st.lists(st.integers(10, 20), min_size=23, max_size=23),
    num_bins=st.sampled_from([3, 20]),
    binning=st.sampled_from(BINNINGS),
    seed=st.integers(0, 99),
)
def test_bins_of_confidences_that_lie_on_edges(steps, num_bins, binning, seed):
    hit = np.random.default_rng(seed).random(len(steps)) < 0.7
    probs, labels = binary(np.array(steps) / 20, hit)
    conf, acc, count = reliability_oracle(probs, labels, num_bins, binning)
    for function in (
        metrics.reliability,
        jax.jit(metrics.reliability, static_argnums=2, static_argnames="binning"),
    ):
        bins = function(probs, labels, num_bins, binning=binning)
        np.testing.assert_array_equal(bins.count, count)
        np.testing.assert_allclose(bins.accuracy, acc, rtol=1e-6)
        np.testing.assert_allclose(bins.confidence, conf, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 19, 199])
def test_equal_count_bins_differ_by_at_most_one_and_lose_none(n):
    probs, labels = example(n, n=n)
    count = np.asarray(metrics.reliability(probs, labels, binning="count").count)
    assert count.sum() == n
    assert np.ptp(count) <= 1


def test_equal_count_keeps_ties_in_their_order():
    probs, labels = binary([0.8] * 6, [1, 1, 1, 0, 0, 0])
    bins = metrics.reliability(probs, labels, 2, binning="count")
    np.testing.assert_array_equal(bins.accuracy, [1, 0])


def test_ece_is_at_most_one_bins_and_at_least_the_plain_gap():
    probs, labels = example(5)
    plain = abs(probs.max(-1).mean() - float(metrics.accuracy(probs, labels)))
    np.testing.assert_allclose(metrics.ece(probs, labels, 1), plain, rtol=1e-5)
    assert metrics.ece(probs, labels, 20) >= plain - 1e-6


def test_entropy():
    probs, _ = example()
    expected = scipy.stats.entropy(probs.astype(np.float64), axis=-1)
    np.testing.assert_allclose(metrics.predictive_entropy(probs), expected, rtol=2e-6, atol=1e-7)


def test_entropy_of_certainty_is_zero_and_of_ignorance_log_c():
    certain, ignorant = np.eye(5)[:1], np.full((1, 5), 0.2)
    assert float(metrics.predictive_entropy(certain)[0]) == 0.0
    np.testing.assert_allclose(metrics.predictive_entropy(ignorant), [math.log(5)], rtol=1e-6)


def test_mutual_information():
    probs = np.stack([example(seed)[0] for seed in range(4)]).astype(np.float64)
    whole = scipy.stats.entropy(probs.mean(0), axis=-1)
    parts = scipy.stats.entropy(probs, axis=-1).mean(0)
    result = metrics.mutual_information(probs)
    assert result.shape == (211,)
    np.testing.assert_allclose(result, whole - parts, rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 10_000), spread=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_mutual_information_is_never_negative(seed, spread):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(1, 6, 5)) + spread * rng.normal(size=(3, 6, 5))
    probs = softmax(logits).astype(np.float32)
    result = np.asarray(metrics.mutual_information(probs))
    wide = probs.astype(np.float64)
    expected = scipy.stats.entropy(wide.mean(0), axis=-1) - scipy.stats.entropy(wide, axis=-1).mean(
        0
    )
    assert (result >= 0).all()
    np.testing.assert_allclose(result, expected, atol=1e-6)


def scores(*sizes):
    """Lists of few different integers; few lengths, so that few programs are compiled."""
    lengths = st.sampled_from(sizes)
    return lengths.flatmap(lambda n: st.lists(st.integers(-5, 5), min_size=n, max_size=n))


@given(scores_in=scores(1, 17), scores_out=scores(1, 30))
def test_auroc_with_ties(scores_in, scores_out):
    pairs = [(a < b) + 0.5 * (a == b) for a in scores_in for b in scores_out]
    area = metrics.auroc(np.float32(scores_in), np.float32(scores_out))
    np.testing.assert_allclose(area, np.mean(pairs), rtol=1e-6, atol=1e-7)
    swapped = metrics.auroc(np.float32(scores_out), np.float32(scores_in))
    np.testing.assert_allclose(swapped, 1 - np.mean(pairs), rtol=1e-6, atol=1e-6)


def test_auroc_against_scikit_learn():
    rng = np.random.default_rng(0)
    scores_in = rng.normal(0, 1, 900).round(1).astype(np.float32)
    scores_out = rng.normal(1, 1, 300).round(1).astype(np.float32)
    truth = np.repeat([0, 1], [900, 300])
    expected = sklearn.metrics.roc_auc_score(truth, np.concatenate([scores_in, scores_out]))
    np.testing.assert_allclose(metrics.auroc(scores_in, scores_out), expected, rtol=1e-6)


def test_auroc_of_more_pairs_than_int32_counts():
    n = 200_000  # 4e10 pairs
    scores = np.arange(n, dtype=np.float32)
    np.testing.assert_allclose(metrics.auroc(scores, scores), 0.5, rtol=1e-5)
    np.testing.assert_allclose(metrics.auroc(scores, scores + n), 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics.auroc(scores, scores + n // 2), 0.875, rtol=1e-5)


def test_auroc_of_large_integers_does_not_tie_them():
    base = 2**24
    area = metrics.auroc(jnp.array([base, base + 2]), jnp.array([base + 1, base + 3]))
    assert float(area) == 0.75


def test_auroc_of_infinite_scores():
    assert float(metrics.auroc([0.0, jnp.inf], [jnp.inf, jnp.inf])) == 0.75
    assert float(metrics.auroc([0.0], [-0.0])) == 0.5


@pytest.mark.parametrize(("num_in", "num_out"), [(900, 300), (7, 20), (5, 19), (1, 1)])
def test_fpr95_against_scikit_learn(num_in, num_out):
    rng = np.random.default_rng(num_out)
    scores_in = rng.normal(0, 1, num_in).round(1).astype(np.float32)
    scores_out = rng.normal(1, 1, num_out).round(1).astype(np.float32)
    truth = np.repeat([0, 1], [num_in, num_out])
    false, true, _ = sklearn.metrics.roc_curve(
        truth, np.concatenate([scores_in, scores_out]), drop_intermediate=False
    )
    rate = metrics.fpr95(scores_in, scores_out)
    np.testing.assert_allclose(rate, false[true >= 0.95].min(), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(metrics.fpr95)(scores_in, scores_out), rate, rtol=1e-6)


def test_fpr95_lets_one_in_twenty_escape():
    scores_out = np.array([-9.0] + [1.0] * 19)
    assert float(metrics.fpr95([0.0, 0.5, 1.0, 2.0], scores_out)) == 0.5
    assert float(metrics.fpr95([0.0, 0.5, 1.0, 2.0], scores_out[:19])) == 1.0


def test_symmetrised_kl_against_numpy():
    rng = np.random.default_rng(0)
    inside, outside = (rng.beta(a, 2, 500).astype(np.float32) * np.log(5) for a in (0.5, 2))
    p, q = (np.histogram(x, 30, (0, np.log(5)))[0] + 0.5 for x in (inside, outside))
    p, q = p / p.sum(), q / q.sum()
    expected = scipy.stats.entropy(p, q) + scipy.stats.entropy(q, p)
    kl = metrics.symmetrised_kl(inside, outside, 5, smoothing=0.5)
    np.testing.assert_allclose(kl, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics.symmetrised_kl(outside, inside, 5, smoothing=0.5), kl)
    assert float(metrics.symmetrised_kl(inside, inside, 5)) == 0


def test_symmetrised_kl_counts_entropies_at_both_ends():
    ends = jnp.array([-1e-8, 0.0]), jnp.array([np.log(2), np.log(2) + 1e-6])
    kl = metrics.symmetrised_kl(*ends, num_classes=2, num_bins=2)  # 3/4, 1/4
    np.testing.assert_allclose(kl, np.log(3), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"num_bins": 0}, "num_bins is 0"),
        ({"smoothing": 0.0}, r"smoothing is 0\.0"),
        ({"smoothing": float("inf")}, "smoothing is inf"),
        ({"entropy_in": [np.nan]}, "entropy_in holds NaN"),
        ({"entropy_out": []}, "entropy_out has shape"),
    ],
)
def test_bad_arguments_of_symmetrised_kl(changes, message):
    arguments = {"entropy_in": [0.1], "entropy_out": [0.2], "num_classes": 2} | changes
    with pytest.raises(ValueError, match=message):
        metrics.symmetrised_kl(**arguments)


# Mistakes of other implementations.


def test_regression_saturated_confidences_do_not_vanish():
    """With both bin edges open, confidences of exactly one (and exactly an edge) are lost."""
    probs, labels = binary([1.0, 1.0, 1.0, 0.5], [1, 0, 0, 0])
    for num_bins in (1, 2, 10, 20):
        bins = metrics.reliability(probs, labels, num_bins)
        assert int(bins.count.sum()) == 4
        assert float(metrics.ece(probs, labels, num_bins)) == pytest.approx(2.5 / 4)
    assert int(metrics.reliability(probs, labels, 20).count[-1]) == 3
    assert int(metrics.reliability(probs, labels, 20).count[9]) == 1  # 0.5 is in (0.45, 0.5]


def test_regression_rounding_beyond_one_loses_no_example():
    probs = np.array([[1.0000002, 0.0]], np.float32)
    assert int(metrics.reliability(probs, np.array([0])).count[-1]) == 1


def test_regression_confidences_of_zero_are_counted():
    """Only an average in sixteen bits gets there; the first bin is closed all the same."""
    index = metrics._equal_width(jnp.array([0.0, 0.05, jnp.nextafter(0.05, 1.0)]), 20)
    np.testing.assert_array_equal(index, [0, 0, 1])


@pytest.mark.parametrize("metric", PER_LABEL)
def test_regression_metrics_are_means_and_not_sums(metric):
    probs, labels = example()
    twice = np.concatenate([probs, probs]), np.concatenate([labels, labels])
    np.testing.assert_allclose(metric(*twice), metric(probs, labels), rtol=1e-5)


def test_regression_brier_is_summed_over_classes():
    np.testing.assert_allclose(metrics.brier(np.eye(4)[:1], np.array([2])), 2.0)


@pytest.mark.parametrize("binning", BINNINGS)
def test_regression_a_million_saturated_examples_keep_their_digits(binning):
    """A float32 sum of a million times 0.9999, one by one, comes out as 999999.76."""
    probs, labels = binary(np.full(1_000_000, 0.9999), np.ones(1_000_000))
    gap = 1.0 - float(np.float32(0.9999))
    np.testing.assert_allclose(metrics.ece(probs, labels, binning=binning), gap, rtol=0.02)
    bins = metrics.reliability(probs, labels, binning=binning)
    np.testing.assert_allclose(bins.confidence[-1], 0.9999, atol=2e-6)


# Shapes, dtypes and transformations.


@pytest.mark.parametrize("metric", PER_LABEL)
def test_any_number_of_leading_axes(metric):
    probs, labels = example(n=24)
    value = metric(probs, labels)
    assert isinstance(value, jax.Array)
    assert value.shape == ()
    reshaped = metric(probs.reshape(2, 3, 4, 7), labels.reshape(2, 3, 4))
    np.testing.assert_allclose(reshaped, value, rtol=1e-6)
    assert metric(probs[0], labels[0]).shape == ()
    assert metrics.predictive_entropy(probs.reshape(2, 3, 4, 7)).shape == (2, 3, 4)


@pytest.mark.parametrize("metric", PER_LABEL)
def test_jit_and_vmap_equal_eager(metric):
    probs, labels = (np.stack(x) for x in zip(*(example(seed) for seed in range(4)), strict=True))
    expected = np.array([metric(p, y) for p, y in zip(probs, labels, strict=True)])
    np.testing.assert_allclose(jax.vmap(metric)(probs, labels), expected, rtol=2e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(metric))(probs, labels), expected, rtol=2e-6)


@pytest.mark.parametrize("binning", BINNINGS)
def test_jit_and_vmap_of_reliability_equal_eager(binning):
    probs, labels = (np.stack(x) for x in zip(*(example(seed) for seed in range(3)), strict=True))

    def bins(p, y):
        return metrics.reliability(p, y, 11, binning=binning)

    expected = [bins(p, y) for p, y in zip(probs, labels, strict=True)]
    for result in (jax.vmap(bins)(probs, labels), jax.jit(jax.vmap(bins))(probs, labels)):
        for i, one in enumerate(expected):
            for field, of_one in zip(result, one, strict=True):
                np.testing.assert_allclose(field[i], of_one, rtol=2e-6)


@pytest.mark.slow
def test_jit_and_vmap_of_the_uncertainties_equal_eager():
    probs = np.stack([example(seed)[0] for seed in range(4)])
    for function in (metrics.predictive_entropy, metrics.mutual_information):
        np.testing.assert_allclose(jax.jit(function)(probs), function(probs), atol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(metrics.mutual_information, 1)(probs), metrics.mutual_information(probs), atol=1e-6
    )
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 20)).astype(np.float32), rng.normal(size=(3, 9)).astype(np.float32)
    expected = [metrics.auroc(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(jax.jit(jax.vmap(metrics.auroc))(a, b), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("metric", PER_LABEL)
def test_half_precision_is_computed_in_float32(metric, dtype):
    probs, labels = example(n=3000)
    half = jnp.asarray(probs, dtype)
    value = metric(half, labels)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, metric(half.astype(jnp.float32), labels), rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_uncertainties(dtype):
    probs = jnp.asarray(np.stack([example(seed)[0] for seed in range(4)]), dtype)
    wide = probs.astype(jnp.float32)
    for function in (metrics.predictive_entropy, metrics.mutual_information):
        assert function(probs).dtype == jnp.float32
        np.testing.assert_allclose(function(probs), function(wide), atol=1e-7)
    entropy = metrics.predictive_entropy(probs[0]).astype(dtype)
    assert metrics.auroc(entropy[:50], entropy[50:]).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_softmaxes_and_their_averages_are_accepted(dtype):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (30, 20, 300)), dtype)
    samples = jax.nn.softmax(logits)
    metrics.predictive_entropy(sum(samples) / 30)
    metrics.mutual_information(samples)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32"])
@pytest.mark.parametrize("metric", PER_LABEL)
def test_labels_of_every_width(metric, dtype):
    probs, labels = example(n=40, classes=300)
    labels = labels % 128
    expected = metric(probs, labels)
    np.testing.assert_allclose(metric(probs, labels.astype(dtype)), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(metric)(probs, labels.astype(dtype)), expected, rtol=1e-6)


def test_one_hot_integers_are_probabilities():
    assert float(metrics.brier(np.eye(3, dtype=int), np.arange(3))) == 0.0


@pytest.mark.parametrize("binning", BINNINGS)
def test_works_in_float64_and_under_strict_promotion(binning):
    probs, labels = example()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        wide = probs.astype(np.float64) / probs.astype(np.float64).sum(-1, keepdims=True)
        ece = metrics.ece(wide, labels.astype(np.uint64), binning=binning)
        assert ece.dtype == jnp.float64
        np.testing.assert_allclose(ece, ece_oracle(wide, labels, 20, binning), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_the_precision_of_the_probabilities_is_that_of_the_metrics(dtype):
    """Of integers, one-hot ones, it is float32."""
    labels = np.arange(7) % 3
    probs = np.eye(3)[labels]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        probs, labels = jnp.asarray(probs, dtype), jnp.asarray(labels, jnp.uint64)
        values = [metric(probs, labels) for metric in PER_LABEL]
        values += [metrics.reliability(probs, labels).confidence]
        values += [metrics.predictive_entropy(probs), metrics.mutual_information(probs[None])]
        wanted = np.float64 if dtype is np.float64 else np.float32
        assert [value.dtype for value in values] == [wanted] * len(values)
        np.testing.assert_array_equal(jnp.stack(values[:4]), [0, 1, 0, 0])


@pytest.mark.parametrize(("dtype", "label"), [("uint32", 2**32 - 1), ("int64", 2**32)])
def test_wide_labels_are_not_wrapped_around(dtype, label):
    with jax.enable_x64(True), pytest.raises(ValueError, match=rf"labels holds {label}, but"):
        metrics.nll(np.eye(2), jnp.array([0, label], dtype))


@pytest.mark.slow
def test_strict_promotion_in_half_precision():
    probs, labels = example()
    probs, labels = jnp.asarray(probs, jnp.bfloat16), jnp.asarray(labels, jnp.uint8)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for function in (*PER_LABEL, metrics.reliability):
            function(probs, labels)
        metrics.mutual_information(probs[None])
        for function in (metrics.auroc, metrics.fpr95):
            function(probs[:, 0], probs[:, 1])
        metrics.symmetrised_kl(probs[:, 0], probs[:, 1], 3)


def test_nll_has_a_gradient():
    logits = jnp.array([[1.0, 2.0, 0.5], [0.1, 0.2, 0.3]])
    labels = jnp.array([2, 0])
    gradient = jax.grad(lambda z: metrics.nll(jax.nn.softmax(z), labels))(logits)
    expected = (softmax(np.asarray(logits)) - np.eye(3)[np.asarray(labels)]) / 2
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


# What cannot be scored.


def test_a_label_of_probability_zero_is_infinitely_bad():
    assert float(metrics.nll(np.array([[1.0, 0.0]]), np.array([1]))) == math.inf


@pytest.mark.parametrize("metric", PER_LABEL)
@pytest.mark.parametrize("label", [-1, 7, 255])
def test_a_label_that_is_no_class(metric, label):
    probs, labels = example()
    labels[3] = label
    message = rf"labels holds {label}, but probs has 7 classes, 0 to 6: renumber"
    with pytest.raises(ValueError, match=message):
        metric(probs, labels)
    assert np.isnan(jax.jit(metric)(probs, labels))


def test_reliability_shows_where_a_label_is_no_class_inside_jit():
    probs, _ = binary([0.6, 0.9], [1, 1])
    bins = jax.jit(metrics.reliability, static_argnums=2)(probs, np.array([-1, 0]), 2)
    assert np.isnan(bins.accuracy).all()  # one bin is empty, the other holds the bad label
    bins = jax.jit(metrics.reliability, static_argnums=2)(probs, np.array([-1, 0]), 10)
    assert float(bins.accuracy[8]) == 1.0
    assert int(bins.count[5]) == 1


@pytest.mark.parametrize("metric", PER_LABEL)
def test_a_nan_among_the_probabilities(metric):
    probs, labels = example()
    probs[5, (labels[5] + 1) % 7] = np.nan
    with pytest.raises(ValueError, match=r"probs sums to nan .*nan comes from the model's outputs"):
        metric(probs, labels)
    assert np.isnan(jax.jit(metric)(probs, labels))


@pytest.mark.parametrize("value", [-1e-3, 1.1, np.inf, -np.inf, np.nan])
def test_what_can_be_no_probability_is_nan_inside_jit(value):
    probs, labels = example(n=6)
    probs[3, (labels[3] + 1) % 7] = value
    for metric in PER_LABEL:
        assert np.isnan(jax.jit(metric)(probs, labels)), metric
    bad = np.arange(6) == 3
    np.testing.assert_array_equal(np.isnan(jax.jit(metrics.predictive_entropy)(probs)), bad)
    samples = np.stack([example(seed, n=6)[0] for seed in range(2)])
    assert np.isfinite(jax.jit(metrics.mutual_information)(samples)).all()
    samples[1] = probs
    np.testing.assert_array_equal(np.isnan(jax.jit(metrics.mutual_information)(samples)), bad)


def test_logits_are_nan_where_nothing_can_be_raised():
    logits = np.random.default_rng(0).normal(0, 3, (1, 20, 5)).astype(np.float32)
    labels = np.zeros((1, 20), int)
    for metric in (metrics.nll, metrics.brier):
        assert np.isnan(jax.jit(metric)(logits, labels))
        assert np.isnan(jax.vmap(metric)(logits, labels)).all()
        assert np.isnan(jax.value_and_grad(metric)(logits, labels)[0])


def test_rounding_of_probabilities_does_no_harm_inside_jit():
    probs = np.array([[1.0000002, 0.0], [0.0, 1.0]], np.float32)
    labels = np.arange(2)
    for metric, best in zip(PER_LABEL, (0, 1, 0, 0), strict=True):
        assert float(jax.jit(metric)(probs, labels)) == pytest.approx(best, abs=1e-6)
    assert np.abs(jax.jit(metrics.predictive_entropy)(probs)).max() < 1e-6


def test_constants_inside_jit_are_checked_and_do_no_harm():
    probs, labels = (jnp.asarray(x) for x in example())
    wrong, negative = jnp.full_like(labels, 9), -probs
    with pytest.raises(ValueError, match="labels holds 9"):
        jax.jit(lambda p: metrics.nll(p, wrong))(probs)
    with pytest.raises(ValueError, match="negative value"):
        jax.jit(lambda y: metrics.nll(negative, y))(labels)
    expected = metrics.nll(probs, labels)
    np.testing.assert_allclose(jax.jit(lambda y: metrics.nll(probs, y))(labels), expected)


def call_all(probs, labels):
    """Every public function of probabilities, as calls without arguments."""
    yield from (lambda m=m: m(probs, labels) for m in (*PER_LABEL, metrics.reliability))
    yield lambda: metrics.predictive_entropy(probs)


def test_logits_log_probabilities_and_single_columns_are_refused():
    probs, labels = example()
    bad = {
        "probs holds the negative value -.*softmax.*jnp.exp": np.log(probs),
        "probs sums to 2 .*not to 1.*softmax": 2 * probs,
        "probs sums to inf .*not to 1": np.where(probs == probs.max(), np.inf, probs),
        r"probs sums to \S+ .*two classes need two columns": probs[:, :1] * 0.5,
    }
    for message, values in bad.items():
        for call in call_all(values, labels * 0):
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(ValueError, match="sample_" + message):
            metrics.mutual_information(values[None])


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_one_bad_example_among_many_is_found(factor):
    probs, labels = example()
    probs[17] *= factor
    with pytest.raises(ValueError, match=rf"sums to {factor} "):
        metrics.nll(probs, labels)


def test_the_only_class_is_certain():
    """One column of ones is one class, in which there is nothing to err."""
    ones, labels = np.ones((4, 1), np.float32), np.zeros(4, int)
    for metric, best in zip(PER_LABEL, (0, 1, 0, 0), strict=True):
        assert float(metric(ones, labels)) == best
    np.testing.assert_array_equal(metrics.predictive_entropy(ones), 0)
    np.testing.assert_array_equal(metrics.mutual_information(ones[None]), 0)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), ()])
def test_empty_probabilities(shape):
    probs = np.ones(shape, np.float32)
    for call in call_all(probs, np.zeros(shape[:-1], int)):
        with pytest.raises(ValueError, match=r"probs has shape .*at least one example"):
            call()


def test_samples_need_their_axis():
    with pytest.raises(ValueError, match=r"sample_probs has shape \(2,\).*axis of samples first"):
        metrics.mutual_information([0.5, 0.5])


@pytest.mark.parametrize("function", [*PER_LABEL, metrics.reliability])
def test_labels_that_do_not_fit(function):
    probs, labels = example(n=6)
    with pytest.raises(ValueError, match=r"labels has shape \(5,\) and probs \(6, 7\).*\(6,\)"):
        function(probs, labels[:5])
    with pytest.raises(ValueError, match=r"labels has shape \(6, 7\).*argmax"):
        function(probs, np.eye(7, dtype=int)[labels])
    with pytest.raises(
        ValueError, match=r"labels has shape \(6, 7\) and probs \(6,\).*probs first"
    ):
        function(labels, probs)
    for wrong in (labels.astype(np.float32), labels > 2):
        with pytest.raises(ValueError, match=rf"labels has dtype {wrong.dtype}.*astype\(int\)"):
            function(probs, wrong)


@pytest.mark.parametrize("function", [metrics.ece, metrics.reliability])
def test_bad_bins(function):
    probs, labels = example(n=6)
    for num_bins in (0, -3, 2.5, None, "20", True):
        with pytest.raises(ValueError, match=rf"num_bins is {num_bins!r}, but must be an integer"):
            function(probs, labels, num_bins)
    with pytest.raises(ValueError, match=r"num_bins is .*Tracer.* static under jit: try 20"):
        jax.jit(function)(probs, labels, 20)
    with pytest.raises(ValueError, match=r"binning is 'quantile', but must be 'width' .*'count'"):
        function(probs, labels, binning="quantile")
    function(probs, labels, np.int64(5))


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros(0), r"has shape \(0,\), but must be one-dimensional and not empty"),
        (np.zeros((2, 2)), r"has shape \(2, 2\).*ravel"),
        (np.array([1.0, np.nan]), "holds NaN"),
    ],
)
@pytest.mark.parametrize("function", [metrics.auroc, metrics.fpr95])
def test_bad_scores(function, position, scores, message):
    arguments = [np.zeros(3), np.zeros(3)]
    arguments[position] = scores
    name = ("scores_in", "scores_out")[position]
    with pytest.raises(ValueError, match=f"{name} {message}"):
        function(*arguments)
    if scores.ndim == 1 and scores.size:
        assert np.isnan(jax.jit(function)(*arguments))


# Regression. A case is the arguments of a metric: a Gaussian, or with samples a mixture.

GAUSSIAN = (metrics.gaussian_nll, metrics.coverage, metrics.gaussian_crps)
MIXTURE = (metrics.mixture_nll, metrics.mixture_crps)


def regression(seed=0, shape=(61,)):
    """Means, variances and targets, float32; targets may lie far from what is predicted."""
    rng = np.random.default_rng(seed)
    mean, variance = rng.normal(3, 2, shape), rng.gamma(2, 1, shape)
    targets = rng.normal(3, 4, shape[-1:])
    return [x.astype(np.float32) for x in (mean, variance, targets)]


def mixture(seed=0):
    return regression(seed, (5, 23))


def case(metric):
    return mixture() if metric in MIXTURE else regression()


def wide(arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def crps_oracle(cdf, target, spread):
    """The definition, integrated numerically on both sides of the target."""
    left, _ = scipy.integrate.quad(lambda x: cdf(x) ** 2, target - spread, target, limit=200)
    right, _ = scipy.integrate.quad(lambda x: (1 - cdf(x)) ** 2, target, target + spread, limit=200)
    return left + right


def test_rmse():
    predictions, _, targets = regression()
    expected = sklearn.metrics.root_mean_squared_error(*wide((targets, predictions)))
    np.testing.assert_allclose(metrics.rmse(predictions, targets), expected, rtol=1e-6)


def test_gaussian_nll():
    mean, variance, targets = regression()
    expected = -scipy.stats.norm.logpdf(*wide((targets, mean)), np.sqrt(variance.astype(float)))
    value = metrics.gaussian_nll(mean, variance, targets)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-6)


def test_mixture_nll():
    means, variances, targets = mixture()
    density = scipy.stats.norm.pdf(targets.astype(float), means, np.sqrt(variances)).mean(0)
    expected = -np.log(density).mean()
    np.testing.assert_allclose(metrics.mixture_nll(means, variances, targets), expected, rtol=2e-6)


def test_mixture_nll_of_densities_that_underflow():
    value = metrics.mixture_nll(np.zeros((4, 1)), 1.0, np.array([100.0]))
    np.testing.assert_allclose(value, 5000 + math.log(2 * math.pi) / 2, rtol=1e-6)


def test_moment_match():
    means, variances, _ = mixture()
    result = metrics.moment_match(means, variances)
    second = variances.astype(float) + means.astype(float) ** 2
    expected = means.astype(float).mean(0)
    np.testing.assert_allclose(result.mean, expected, rtol=1e-6)
    np.testing.assert_allclose(result.variance, second.mean(0) - expected**2, rtol=1e-5)


def test_moments_of_a_mixture_against_numerical_integration():
    means, variances = np.array([[-1.0], [2.0], [0.5]]), np.array([[0.3], [1.0], [0.2]])
    density = lambda x: scipy.stats.norm.pdf(x, means, np.sqrt(variances)).mean()  # noqa: E731
    mean, _ = scipy.integrate.quad(lambda x: x * density(x), -20, 20, limit=200)
    variance, _ = scipy.integrate.quad(lambda x: (x - mean) ** 2 * density(x), -20, 20, limit=200)
    np.testing.assert_allclose(metrics.moment_match(means, variances), [[mean], [variance]], 1e-5)


def test_regression_the_spread_of_large_and_close_means_keeps_its_digits():
    """In float32, E[m^2] - E[m]^2 of these is noise, and the rounded mean itself is off."""
    means = np.float32(20_000) + np.array([[0.0], [1.0], [1.0]], np.float32) / 256
    result = metrics.moment_match(means, np.float32(1e-12))
    np.testing.assert_allclose(result.variance, [2 / 9 / 256**2], rtol=1e-6)


@pytest.mark.parametrize("level", [0.05, 0.5, 0.95, 0.999])
def test_coverage_and_width(level):
    mean, variance, targets = regression(1, (400,))
    low, high = scipy.stats.norm.interval(level, mean.astype(float), np.sqrt(variance))
    inside = (low <= targets) & (targets <= high)
    value = metrics.coverage(mean, variance, targets, level=level)
    np.testing.assert_allclose(value, inside.mean(), rtol=1e-6)
    width = metrics.interval_width(variance, level=level)
    np.testing.assert_allclose(width, (high - low).mean(), rtol=1e-6)


def test_calibrated_predictions_are_covered_at_their_level():
    """5 sigma of a binomial share: a false alarm in 2e6."""
    rng = np.random.default_rng(0)
    mean, variance = rng.normal(size=100_000), rng.gamma(2, 1, 100_000)
    targets = rng.normal(mean, np.sqrt(variance))
    value = metrics.coverage(mean, variance, targets, level=0.9)
    assert abs(float(value) - 0.9) < 5 * math.sqrt(0.09 / 100_000)


@pytest.mark.parametrize("seed", range(3))
def test_gaussian_crps_against_numerical_integration(seed):
    arrays = regression(seed, (9,))
    expected = [
        crps_oracle(lambda x, m=m, v=v: scipy.special.ndtr((x - m) / math.sqrt(v)), y, 60)
        for m, v, y in zip(*wide(arrays), strict=True)
    ]
    np.testing.assert_allclose(metrics.gaussian_crps(*arrays), np.mean(expected), rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_mixture_crps_against_numerical_integration(seed):
    means, variances, targets = wide(regression(seed, (4, 5)))
    sd = np.sqrt(variances)
    expected = [
        crps_oracle(lambda x, i=i: scipy.special.ndtr((x - means[:, i]) / sd[:, i]).mean(), y, 60)
        for i, y in enumerate(targets)
    ]
    value = metrics.mixture_crps(means, variances, targets)
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("of_mixture", "of_gaussian"),
    [
        (metrics.mixture_nll, metrics.gaussian_nll),
        (metrics.mixture_crps, metrics.gaussian_crps),
    ],
)
def test_a_mixture_of_equals_is_a_gaussian(of_mixture, of_gaussian):
    mean, variance, targets = regression()
    expected = of_gaussian(mean, variance, targets)
    means, variances = (np.stack([x] * 3) for x in (mean, variance))
    np.testing.assert_allclose(of_mixture(means, variances, targets), expected, rtol=1e-6)


def test_crps_is_the_absolute_error_of_what_is_certain():
    mean, _, targets = regression()
    expected = np.abs(wide([targets - mean])).mean()
    for crps, m in ((metrics.gaussian_crps, mean), (metrics.mixture_crps, mean[None])):
        np.testing.assert_allclose(crps(m, 1e-12, targets), expected, rtol=1e-6)


@pytest.mark.slow
def test_crps_of_many_samples_is_that_of_their_distribution():
    """Means drawn from N(0, 3), noise 1: N(0, 4) in the limit. 6 sigma, seen from other keys."""
    rng = np.random.default_rng(0)
    means = rng.normal(0, math.sqrt(3), (1000, 40))
    targets = np.linspace(-4, 4, 40)
    expected = metrics.gaussian_crps(np.zeros(40), 4.0, targets)
    np.testing.assert_allclose(metrics.mixture_crps(means, 1.0, targets), expected, atol=0.02)


def test_regression_mixture_crps_compares_all_pairs_in_the_memory_of_one():
    """30 samples of 5000 examples: all pairs at once would take 18 MB of float32 an array."""
    means, variances, targets = regression(0, (30, 5000))

    def temporary(function):
        compiled = jax.jit(function).lower(means, variances, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(metrics.mixture_crps) < 8 * means.nbytes
    assert temporary(jax.grad(metrics.mixture_crps)) < 16 * means.nbytes


# What they share.


@pytest.mark.parametrize("metric", [*GAUSSIAN, *MIXTURE])
def test_regression_metrics_are_means_over_all_axes(metric):
    mean, variance, targets = case(metric)
    value = metric(mean, variance, targets)
    assert value.shape == ()
    twice = [np.stack([x, x], -1) for x in (mean, variance, targets)]
    np.testing.assert_allclose(metric(*twice), value, rtol=1e-6)


@pytest.mark.parametrize("metric", [*GAUSSIAN, *MIXTURE])
def test_one_variance_for_all(metric):
    mean, _, targets = case(metric)
    expected = metric(mean, np.full_like(mean, 0.7), targets)
    np.testing.assert_allclose(metric(mean, 0.7, targets), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(metric)(mean, 0.7, targets), expected, rtol=1e-6)


@pytest.mark.parametrize("metric", [*GAUSSIAN, *MIXTURE])
def test_jit_and_vmap_of_the_regression_metrics_equal_eager(metric):
    make = mixture if metric in MIXTURE else regression
    cases = [make(seed) for seed in range(3)]
    expected = [metric(*c) for c in cases]
    stacked = [np.stack(x) for x in zip(*cases, strict=True)]
    np.testing.assert_allclose(jax.vmap(metric)(*stacked), expected, rtol=2e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(metric))(*stacked), expected, rtol=2e-6)


def test_jit_of_the_other_regression_metrics_equals_eager():
    means, variances, _ = mixture()
    mean, variance, targets = regression()
    np.testing.assert_allclose(
        jax.jit(metrics.rmse)(mean, targets), metrics.rmse(mean, targets), rtol=1e-6
    )
    np.testing.assert_allclose(
        jax.jit(metrics.interval_width)(variance), metrics.interval_width(variance), rtol=1e-6
    )
    for ours, eager in zip(
        jax.jit(metrics.moment_match)(means, variances),
        metrics.moment_match(means, variances),
        strict=True,
    ):
        np.testing.assert_allclose(ours, eager, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("metric", MIXTURE)
def test_gradients_against_differences(metric):
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in wide(case(metric))]
        jax.test_util.check_grads(lambda m, v: metric(m, v, arrays[2]), arrays[:2], 1, ["rev"])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_regression_is_computed_in_float32(dtype):
    for metric in (*GAUSSIAN, *MIXTURE):
        half = [jnp.asarray(x, dtype) for x in case(metric)]
        value = metric(*half)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, metric(*(x.astype(jnp.float32) for x in half)), 1e-7)
    mean, variance, targets = (jnp.asarray(x, dtype) for x in regression())
    others = metrics.rmse(mean, targets), metrics.interval_width(variance)
    others += tuple(metrics.moment_match(mean, variance))
    assert [x.dtype for x in others] == [jnp.float32] * 4


@pytest.mark.slow
def test_regression_in_mixed_precision_under_strict_promotion():
    """Targets are integers or float64: the widest dtype is that of the metric."""
    strict = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with jax.enable_x64(True), strict[0], strict[1]:
        for metric in (metrics.gaussian_nll, metrics.mixture_crps):
            mean, variance, targets = case(metric)
            assert metric(mean, np.float16(1), targets.astype(int)).dtype == "float32"
            assert metric(mean, variance, targets.astype(float)).dtype == "float64"
        mean, variance, targets = regression()
        assert metrics.rmse(mean, targets.astype(float)).dtype == "float64"
        assert metrics.interval_width(variance).dtype == "float32"
        assert metrics.moment_match(mean, variance.astype(float)).mean.dtype == "float64"


# What cannot be scored.


@pytest.mark.parametrize("function", [metrics.rmse, *GAUSSIAN])
def test_regression_a_column_against_a_row_is_an_error(function):
    """(N, 1) against (N,) broadcasts to all pairs of examples: the classic mistake."""
    mean, variance, targets = regression()
    rest = () if function is metrics.rmse else (variance,)
    name = "predictions" if function is metrics.rmse else "mean"
    columns = [x[:, None] for x in (mean, *rest)]
    for call in (function, jax.jit(function)):
        with pytest.raises(
            ValueError, match=rf"targets has shape \(61,\) and {name} \(61, 1\).*re"
        ):
            call(*columns, targets)
        with pytest.raises(ValueError, match=r"targets has shape \(61, 1\) .*nothing is broadcast"):
            call(mean, *rest, targets[:, None])
        with pytest.raises(ValueError, match=r"targets has shape \(\)"):
            call(mean, *rest, 0.0)
    with pytest.raises(ValueError, match=r"axis of samples is for mixture_nll"):
        function(*(np.stack([x, x]) for x in (mean, *rest)), targets)


@pytest.mark.parametrize("metric", MIXTURE)
def test_regression_mixtures_do_not_broadcast_either(metric):
    means, variances, targets = mixture()
    message = r"targets has shape {} and means \(5, 23{}\).*less its first axis, \(23{}\)"
    with pytest.raises(ValueError, match=message.format(r"\(23,\)", ", 1", ", 1")):
        metric(means[..., None], variances[..., None], targets)
    with pytest.raises(ValueError, match=message.format(r"\(23, 1\)", "", ",")):
        metric(means, variances, targets[:, None])
    with pytest.raises(ValueError, match=r"means \(23, 5\).*samples come first"):
        metric(means.T, variances.T, targets)
    with pytest.raises(ValueError, match=r"means has shape \(\), but needs an axis of samples"):
        metric(0.0, 1.0, 0.0)


@pytest.mark.parametrize("function", [*GAUSSIAN, *MIXTURE, metrics.moment_match])
def test_variances_that_do_not_fit(function):
    mixed = function in (*MIXTURE, metrics.moment_match)
    mean, variance, targets = mixture() if mixed else regression()
    rest = () if function is metrics.moment_match else (targets,)
    name = "variances" if mixed else "variance"
    for wrong in (variance[..., :1], variance[..., None], variance[:1]):
        with pytest.raises(ValueError, match=rf"^{name} has shape .*or {name} be a scalar"):
            function(mean, wrong, *rest)


@pytest.mark.parametrize("value", [0.0, -0.5, np.nan, np.inf])
@pytest.mark.parametrize("metric", [*GAUSSIAN, *MIXTURE])
def test_a_variance_that_is_none(metric, value):
    mean, variance, targets = case(metric)
    variance[..., 3] = value
    message = rf"variances? holds the value {value:g}, but must be (positive|finite)"
    with pytest.raises(ValueError, match=message):
        metric(mean, variance, targets)
    assert np.isnan(jax.jit(metric)(mean, variance, targets))
    if metric is metrics.coverage:  # once for the others of the family
        with pytest.raises(ValueError, match=message):
            metrics.interval_width(variance)
        assert np.isnan(jax.jit(metrics.interval_width)(variance))
        pair = mean[None], variance[None]
        with pytest.raises(ValueError, match=message):
            metrics.moment_match(*pair)
        for moment in jax.jit(metrics.moment_match)(*pair):
            np.testing.assert_array_equal(np.isnan(moment), np.arange(61) == 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("metric", [*GAUSSIAN, *MIXTURE])
def test_values_that_are_not_finite(metric, position, value):
    arrays = case(metric)
    arrays[position][..., 3] = value
    name = "targets" if position else "means?"
    with pytest.raises(ValueError, match=rf"{name} holds the value {value:g}, but must be finite"):
        metric(*arrays)
    assert np.isnan(jax.jit(metric)(*arrays))
    if metric is metrics.coverage:
        pair = arrays[0], arrays[2]
        name = "targets" if position else "predictions"
        with pytest.raises(ValueError, match=rf"{name} holds the value {value:g}"):
            metrics.rmse(*pair)
        assert np.isnan(jax.jit(metrics.rmse)(*pair))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_predictions(shape):
    empty = np.ones(shape, np.float32)
    calls = [lambda m=m: m(empty, empty, empty) for m in (*GAUSSIAN, *MIXTURE)]
    calls += [lambda: metrics.rmse(empty, empty), lambda: metrics.moment_match(empty, empty)]
    for call in [*calls, lambda: metrics.interval_width(empty)]:
        with pytest.raises(ValueError, match=r"has shape .*at least one example"):
            call()


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, np.nan, None, "0.95", True])
def test_a_level_that_is_no_probability(level):
    mean, variance, targets = regression()
    with pytest.raises(ValueError, match=rf"level is {level!r}, but must be a number above 0"):
        metrics.coverage(mean, variance, targets, level=level)
    with pytest.raises(ValueError, match=r"level is .*static under jit"):
        metrics.interval_width(variance, level=level)
    metrics.interval_width(variance, level=np.float32(0.5))


def test_constants_of_regression_inside_jit_are_checked():
    mean, variance, targets = (jnp.asarray(x) for x in regression())
    negative = -variance
    with pytest.raises(ValueError, match="variance holds the value -"):
        jax.jit(lambda m: metrics.gaussian_nll(m, negative, targets))(mean)
    expected = metrics.gaussian_nll(mean, variance, targets)
    value = jax.jit(lambda m: metrics.gaussian_nll(m, variance, targets))(mean)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


# Sums over 10^8 examples, weights, and what programs hold.


def equations(jaxpr):
    """All equations of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from equations(getattr(inner, "jaxpr", inner))


def is_program(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def assert_sums_in_blocks(function, *shapes):
    """No float32 element of a sum meets more than 300 others: by a look at the program."""
    program = jax.make_jaxpr(function)(*shapes).jaxpr
    for equation in equations(program):
        inputs, outputs = (
            v[0].aval for v in (equation.invars or equation.outvars, equation.outvars)
        )
        if equation.primitive.name in ("scatter-add", "scatter_add"):
            inputs = equation.invars[-1].aval
        elif equation.primitive.name not in ("reduce_sum", "cumsum", "reduce", "dot_general"):
            continue
        if jnp.issubdtype(outputs.dtype, jnp.floating):
            assert inputs.size <= 300 * outputs.size, equation
        elif jnp.issubdtype(outputs.dtype, jnp.integer):
            assert jnp.iinfo(outputs.dtype).max > 10**8


MANY = 10**8


def shapes_of(metric, n):
    """Arguments of n examples, as shapes."""
    real = jax.ShapeDtypeStruct((n,), jnp.float32)
    if metric in (*PER_LABEL, metrics.reliability):
        probs, labels = (jax.ShapeDtypeStruct(*x) for x in (((n, 2), jnp.float32), ((n,), int)))
        return probs, labels
    if metric in MIXTURE:
        samples = jax.ShapeDtypeStruct((2, n), jnp.float32)
        return samples, samples, real
    return {metrics.interval_width: (real,), **dict.fromkeys(GAUSSIAN, (real,) * 3)}.get(
        metric, (real,) * 2
    )


def call_many():
    """Every function that sums over examples, with the names of its weights."""
    for metric in (*PER_LABEL, metrics.reliability, *GAUSSIAN, *MIXTURE):
        yield metric, metric, ("weights",)
    for metric in (metrics.ece, metrics.reliability):
        yield metric, functools.partial(metric, binning="count"), ("weights",)
    for metric in (metrics.rmse, metrics.interval_width):
        yield metric, metric, ("weights",)
    both = ("weights_in", "weights_out")
    for metric in (metrics.auroc, metrics.fpr95):
        yield metric, metric, both
    yield metrics.symmetrised_kl, lambda x, y, **w: metrics.symmetrised_kl(x, y, 2, **w), both


def test_regression_float32_sums_over_a_hundred_million_examples_are_in_blocks():
    """Scatters and sums that run one by one stop at 2^24; integers count up to 2^31."""
    for metric, call, names in call_many():
        shapes = shapes_of(metric, MANY)
        weights = [jax.ShapeDtypeStruct((MANY,), jnp.float32)] * len(names)
        assert_sums_in_blocks(call, *shapes)

        def weighted(*x, call=call, names=names):
            weights = dict(zip(names, x[-len(names) :], strict=True))
            return call(*x[: -len(names)], **weights)

        assert_sums_in_blocks(weighted, *shapes, *weights)


def confident(n):
    """Predictions between .998 and 1, calibrated but for a tenth of a per cent."""
    rng = np.random.default_rng(0)
    confidence = (1 - 0.002 * rng.random(n)).astype(np.float32)
    hit = rng.random(n) < 0.998
    return confidence, hit, *binary(confidence, hit)


@pytest.mark.parametrize("n", [2_000_000, pytest.param(20_000_000, marks=pytest.mark.slow)])
def test_regression_bins_of_millions_keep_their_digits(n):
    """In float32, one by one, ECE was .0020 for .0010 at 2 10^7, and counts stopped at 2^24."""
    confidence, hit, probs, labels = confident(n)
    gap = (hit - confidence.astype(float)).mean()
    for weights in (None, jnp.ones(n)):
        bins = metrics.reliability(probs, labels, weights=weights)
        assert int(bins.count[-1]) == n
        np.testing.assert_allclose(bins.ece, abs(gap), rtol=3e-6)
        np.testing.assert_allclose(bins.accuracy[-1], hit.mean(), rtol=2e-7)
        np.testing.assert_allclose(bins.confidence[-1], confidence.mean(dtype=float), rtol=2e-7)
    bins = metrics.reliability(probs, labels, binning="count")
    parts = np.array_split(np.argsort(confidence, kind="stable"), 20)
    np.testing.assert_array_equal(bins.count, [len(part) for part in parts])
    expected = [(hit[part] - confidence[part].astype(float)).sum() for part in parts]
    np.testing.assert_allclose(bins.gap, expected, rtol=1e-5, atol=1e-3)


def test_regression_counts_of_a_histogram_do_not_stop():
    """The counts of ``symmetrised_kl`` were float32 ones, added one by one; also by weight."""
    low, high = np.array([0.1, 0.6], np.float32), np.array([0.6, 0.1], np.float32)
    weights = [np.float32([3e7, 1e7])] * 2
    kl = metrics.symmetrised_kl(low, high, 2, 2, weights_in=weights[0], weights_out=weights[1])
    np.testing.assert_allclose(kl, math.log(3), rtol=1e-6)


def repeat(weights, *arrays, axis=0):
    """Each example as often as it counts, in float64."""
    return [np.repeat(np.asarray(x), weights, axis) for x in arrays]


def weighted_classes(seed):
    """Predictions with whole weights; an example of weight 0 holds nothing of use."""
    rng = np.random.default_rng(seed)
    probs, labels = example(seed, n=60, classes=4)
    weights = rng.integers(0, 4, 60)
    real = repeat(weights, probs, labels)
    probs[weights == 0], labels[weights == 0] = np.nan, 255
    return (probs, labels, weights), real


@pytest.mark.parametrize("binning", BINNINGS)
def test_weights_of_labels_are_repetitions(binning):
    """Each of five seeds against loops over the repeated examples, eager and inside ``jit``."""
    for seed in range(5):
        (probs, labels, weights), (real, classes) = weighted_classes(seed)
        likelihood = real[np.arange(len(real)), classes].astype(float)
        expected = {
            metrics.nll: -np.log(likelihood).mean(),
            metrics.accuracy: (real.argmax(-1) == classes).mean(),
            metrics.brier: ((real - np.eye(4)[classes]) ** 2).sum(-1).mean(),
            functools.partial(metrics.ece, binning=binning): ece_oracle(real, classes, 20, binning),
        }
        for metric, value in expected.items():
            for w in (weights, weights.astype(np.float32)):
                np.testing.assert_allclose(metric(probs, labels, weights=w), value, rtol=1e-5)
        jitted = jax.jit(lambda p, y, w: metrics.reliability(p, y, binning=binning, weights=w))
        bins = jitted(probs, labels, weights)
        for ours, theirs in zip(bins, reliability_oracle(real, classes, 20, binning), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.slow
def test_weights_of_numbers_are_repetitions():
    for seed in range(3):
        weights = np.random.default_rng(seed).integers(0, 4, 23)
        means, variances, targets = regression(seed, (5, 23))
        real = repeat(weights, *wide((means, variances)), axis=1) + repeat(
            weights, wide([targets])[0]
        )
        of_one = [real[0][0], real[1][0], real[2]]
        for x in (means, variances, targets):
            x[..., weights == 0] = np.nan
        with jax.enable_x64(True):
            expected = {m: m(*real) for m in MIXTURE} | {m: m(*of_one) for m in GAUSSIAN}
            width = metrics.interval_width(of_one[1])
        for metric, value in expected.items():  # unweighted, they have oracles of their own above
            arrays = (means, variances) if metric in MIXTURE else (means[0], variances[0])
            for call in (metric, jax.jit(metric)):
                ours = call(*arrays, targets, weights=weights)
                np.testing.assert_allclose(ours, value, rtol=2e-6, atol=1e-6)
        error = np.sqrt(((of_one[0] - of_one[2]) ** 2).mean())
        np.testing.assert_allclose(
            metrics.rmse(means[0], targets, weights=weights), error, rtol=1e-6
        )
        ours = metrics.interval_width(variances[0], weights=weights)
        np.testing.assert_allclose(ours, width, rtol=1e-6)


@pytest.mark.slow
def test_weights_of_scores_are_repetitions():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scores = [rng.normal(shift, 1, 60).round(1).astype(np.float32) for shift in (0, 1)]
        weights = [rng.integers(0, 4, 60) for _ in range(2)]
        real = [repeat(w, x)[0] for w, x in zip(weights, scores, strict=True)]
        truth = np.repeat([0, 1], [len(x) for x in real])
        area = sklearn.metrics.roc_auc_score(truth, np.concatenate(real))
        false, true, _ = sklearn.metrics.roc_curve(
            truth, np.concatenate(real), drop_intermediate=False
        )
        counts = [np.histogram(np.clip(x, 0, np.log(2)), 30, (0, np.log(2)))[0] + 1 for x in real]
        p, q = (count / count.sum() for count in counts)
        for x, w in zip(scores, weights, strict=True):
            x[w == 0] = np.nan
        names = {"weights_in": weights[0], "weights_out": weights[1]}
        for wrap in (lambda f: f, jax.jit):
            ours = wrap(metrics.auroc)(*scores, **names)
            np.testing.assert_allclose(ours, area, rtol=1e-6)
            ours = wrap(metrics.fpr95)(*scores, **names)
            np.testing.assert_allclose(ours, false[true >= 0.95].min(), rtol=1e-6)
        kl = metrics.symmetrised_kl(*scores, 2, **names)
        np.testing.assert_allclose(kl, ((p - q) * np.log(p / q)).sum(), rtol=1e-5)
        one_sided = metrics.auroc(real[0], scores[1], weights_out=weights[1])
        np.testing.assert_allclose(one_sided, area, rtol=1e-6)


def test_fractional_weights_share_an_example_between_bins():
    """Weights of halves are repetitions of half examples, where these fill the bins evenly."""
    rng = np.random.default_rng(0)
    probs, labels = example(n=60, classes=4)
    twice = rng.integers(0, 6, 60)
    twice[0] += 1 + (-(twice.sum() + 1)) % 8
    bins = metrics.reliability(probs, labels, 8, binning="count", weights=twice / 2)
    expected = reliability_oracle(*repeat(twice, probs, labels), 8, "count")
    np.testing.assert_allclose(bins.accuracy, expected[1], rtol=1e-5)
    np.testing.assert_allclose(bins.confidence, expected[0], rtol=1e-5)
    np.testing.assert_allclose(bins.count, expected[2] / 2, rtol=1e-6)


def test_weights_of_the_leading_axes():
    """A weight for each image of a segmentation, or for each pixel."""
    probs, labels = (x[:24].reshape(2, 3, 4, *x.shape[1:]) for x in example())
    weights = np.array([0.5, 2.0])
    each = np.broadcast_to(weights[:, None, None], labels.shape)
    for metric in (metrics.nll, metrics.ece):
        expected = metric(probs, labels, weights=each)
        np.testing.assert_allclose(metric(probs, labels, weights=weights), expected, rtol=1e-6)
    mean, variance, targets = (x[:60].reshape(20, 3) for x in regression())
    weights = np.arange(20)
    each = np.broadcast_to(weights[:, None], (20, 3))
    ours = metrics.gaussian_nll(mean, variance, targets, weights=weights)
    expected = metrics.gaussian_nll(mean, variance, targets, weights=each)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_ignored_labels_of_a_segmentation_have_no_gradient():
    logits, labels = np.zeros((2, 3, 4), np.float32), np.array([[0, 255, 1], [-100, 2, 3]])
    weights = (labels != 255) & (labels != -100)

    def loss(z):
        return metrics.nll(jax.nn.softmax(z), labels, weights=weights)

    gradient = jax.grad(loss)(logits)
    np.testing.assert_array_equal(np.any(gradient != 0, -1), weights)
    np.testing.assert_allclose(loss(logits), math.log(4), rtol=1e-6)


def test_without_any_weight_there_is_no_metric():
    probs, labels = example(n=6)
    none = np.zeros(6)
    for metric in (metrics.nll, metrics.ece):
        assert np.isnan(metric(probs, labels, weights=none))
    assert np.isnan(metrics.ece(probs, labels, binning="count", weights=none))
    assert np.isnan(metrics.coverage(*(x[:6] for x in regression()), weights=none))
    scores = probs[:, 0]
    for metric in (
        metrics.auroc,
        metrics.fpr95,
        lambda x, y, **w: metrics.symmetrised_kl(x, y, 2, **w),
    ):
        for name in ("weights_in", "weights_out"):
            assert np.isnan(metric(scores, scores, **{name: none}))


def test_weights_that_are_none():
    probs, labels = example(n=6)
    mean, variance, targets = (x[:6] for x in regression())
    calls = {
        "weights": lambda w: metrics.nll(probs, labels, weights=w),
        "weights_in": lambda w: metrics.auroc(mean, targets, weights_in=w),
        "weights ": lambda w: metrics.gaussian_nll(mean, variance, targets, weights=w),
    }
    for name, call in calls.items():
        with pytest.raises(
            ValueError, match=rf"{name.strip()} holds the value -1, but must not be"
        ):
            call(np.array([1, -1, 0, 2, 0, 0]))
        with pytest.raises(ValueError, match=r"weights has shape \(5,\), but must have that of"):
            call(np.ones(5))
        assert np.isnan(jax.jit(call)(np.array([1.0, -1.0, 0.0, 2.0, 0.0, 0.0])))


# Batches.


@pytest.mark.slow
def test_bins_of_batches_add():
    probs, labels = example()
    weights = np.random.default_rng(1).random(len(labels))
    for w in (None, weights):
        whole = metrics.reliability(probs, labels, weights=w)
        parts = sum(
            metrics.reliability(probs[i], labels[i], weights=None if w is None else w[i])
            for i in (slice(0, 50), slice(50, 53), slice(53, None))
        )
        for ours, theirs in zip(parts, whole, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-6)
        np.testing.assert_allclose(parts.ece, whole.ece, rtol=2e-6)
    mixed = metrics.reliability(probs, labels) + metrics.reliability(probs, labels, weights=weights)
    np.testing.assert_allclose(mixed.count.sum(), len(labels) + weights.sum(), rtol=1e-6)


def test_regression_a_million_batches_add_without_loss():
    """In float32 a batch of sum .1 added to 10^5 is lost to the last digits of that."""
    probs, labels = binary(np.full(100, 0.999), np.ones(100))
    batch = metrics.reliability(probs, labels, 1)
    many = 2**20 + 1

    @jax.jit
    def add_all(batch):
        return jax.lax.fori_loop(1, many, lambda _, bins: bins + batch, batch)

    bins = add_all(batch)
    assert int(bins.count[0]) == 100 * many
    gap = 1 - float(np.float32(0.999))
    np.testing.assert_allclose(bins.ece, gap, rtol=2e-6)


def test_bins_of_other_edges_do_not_add():
    probs, labels = example(n=20)
    width, count = metrics.reliability(probs, labels), metrics.reliability(probs, labels, 4)
    by_count = metrics.reliability(probs, labels, binning="count")
    for a, b in ((width, count), (by_count, by_count), (width, by_count)):
        with pytest.raises(ValueError, match=r"other edges and do not add.*one num_bins"):
            a + b
    with pytest.raises(TypeError):
        width + 1
    with pytest.raises(TypeError):
        1 + width


def test_means_of_batches_combine_by_weight():
    (probs, labels, weights), (real, classes) = weighted_classes(0)
    parts = [slice(0, 20), slice(20, 60)]
    values = [metrics.nll(probs[i], labels[i], weights=weights[i]) for i in parts]
    combined = np.average(values, weights=[weights[i].sum() for i in parts])
    np.testing.assert_allclose(combined, metrics.nll(real, classes), rtol=1e-6)


# What stops elsewhere.


@pytest.mark.slow
def test_regression_sound_data_pass_jax_debug_nans_and_infs():
    """No 0 log 0 and no 0/0, not even of empty bins or of what has no weight."""
    probs, labels = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0]], np.array([0, 1, 2, 2, -100])
    probs[3] = 0.5, 0, 0.5, 0
    weights = np.array([1, 1, 1, 1, 0.0])
    padded = probs.copy()
    padded[4] = np.nan
    mean, variance, targets = (x[:5] for x in regression())
    holes = [x.copy() for x in (mean, variance, targets)]
    for x in holes:
        x[4] = np.inf
    with jax.debug_nans(True), jax.debug_infs(True):
        for metric in (*PER_LABEL, metrics.reliability):
            metric(probs[:4], labels[:4])
            metric(padded, labels, weights=weights)
        for binning in BINNINGS:
            assert len(list(metrics.reliability(probs[:4], labels[:4], binning=binning))) == 3
            metrics.ece(padded, labels, binning=binning, weights=weights)
        metrics.predictive_entropy(probs)
        metrics.mutual_information(np.stack([probs, probs[::-1]]))
        for metric in (metrics.auroc, metrics.fpr95):
            metric(mean, targets)
            metric(holes[0], holes[2], weights_in=weights, weights_out=weights)
        metrics.symmetrised_kl(np.zeros(3), np.full(3, 0.6), 2)
        metrics.rmse(mean, targets)
        metrics.rmse(holes[0], holes[2], weights=weights)
        metrics.interval_width(holes[1], weights=weights)
        metrics.moment_match(mean[None], variance[None])
        for metric in GAUSSIAN:
            metric(mean, variance, targets)
            metric(*holes, weights=weights)
        for metric in MIXTURE:
            metric(mean[None], variance[None], targets)
            metric(holes[0][None], holes[1][None], holes[2], weights=weights)


def test_regression_no_program_holds_a_constant_of_the_size_of_the_data():
    """XLA took half a minute at 10^6 rows to fold the ranks of bins of equal count."""
    for metric, call, _ in call_many():
        text = jax.jit(call).lower(*shapes_of(metric, 5000)).compile().as_text()
        for dimensions in re.findall(r"\w\d+\[([\d,]*)\]\S* constant\(", text):
            assert math.prod(int(d) for d in dimensions.split(",") if d) < 1000, metric


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
@pytest.mark.parametrize("metric", [metrics.nll, metrics.ece])
def test_regression_labels_of_64_bits_are_not_wrapped_around(metric, dtype):
    """Without x64 JAX makes a 2 of the label 2^32 + 2."""
    probs, labels = example(n=6)
    labels = labels.astype(dtype)
    labels[2] = 2**32 + 2
    with pytest.raises(ValueError, match=r"labels holds 4294967298, but probs has 7 classes"):
        metric(probs, labels)
    weights = np.arange(6) != 2
    expected = metric(probs[weights], labels[weights])
    np.testing.assert_allclose(metric(probs, labels, weights=weights), expected, rtol=1e-6)


def test_regression_targets_and_scores_of_64_bits_are_not_wrapped_around():
    """As floats they are rounded: 2^32 + 2 was 2."""
    large = np.array([2**32 + 2, 2**33])
    np.testing.assert_allclose(metrics.rmse(np.zeros(2), large), math.sqrt((2**64 + 2**66) / 2))
    assert float(metrics.auroc(np.array([5, 6]), large)) == 1.0


def test_several_outputs_alone_and_jointly():
    """Targets (N, D): each output under its own mixture, or the joint density by SciPy."""
    means, variances, targets = (x[..., :20].reshape(*x.shape[:-1], 10, 2) for x in mixture())
    density = scipy.stats.norm.pdf(targets, *wide((means, np.sqrt(variances))))
    alone = -np.log(density.mean(0)).mean()
    joint = -np.log(density.prod(-1).mean(0))
    np.testing.assert_allclose(metrics.mixture_nll(means, variances, targets), alone, rtol=2e-6)
    call = functools.partial(metrics.mixture_nll, means, variances, targets, event_ndim=1)
    np.testing.assert_allclose(call(), joint.mean(), rtol=2e-6)
    weights = np.arange(10)
    expected = np.average(joint, weights=weights)
    np.testing.assert_allclose(call(weights=weights), expected, rtol=2e-6)
    for wrong in (-1, 3, None, 0.5):
        with pytest.raises(ValueError, match=rf"event_ndim is {wrong}, but targets has 2 axes"):
            metrics.mixture_nll(means, variances, targets, event_ndim=wrong)


@pytest.mark.slow
def test_regression_examples_split_by_an_explicit_mesh():
    """Checks, sorts and scatters of split arrays were a ``ShardingTypeError``."""
    probs, labels = example(n=64)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, PartitionSpec("data"))
        p, y, x = (jax.device_put(a, split) for a in (probs, labels, probs[:, 0]))
        for metric in (metrics.nll, metrics.ece):
            np.testing.assert_allclose(metric(p, y), metric(probs, labels), rtol=1e-6)
        ours = metrics.ece(p, y, binning="count", weights=x)
        theirs = metrics.ece(probs, labels, binning="count", weights=probs[:, 0])
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert float(metrics.auroc(x, x)) == 0.5
        metrics.fpr95(x, x)
        assert float(metrics.symmetrised_kl(x, x, 3)) == 0.0
