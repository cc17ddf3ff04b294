import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from jax.tree_util import Partial

import swagjax
from swagjax import calibration, metrics


def classified(seed=0, n=301, classes=5, truth=0.4):
    """Float32 logits, and labels drawn from the softmax of ``truth`` times the logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (n, classes)).astype(np.float32)
    return logits, np.argmax(truth * logits + rng.gumbel(size=logits.shape), -1)


def nll_at(temperature, logits, labels):
    log_probs = scipy.special.log_softmax(logits.astype(float) / temperature, -1)
    return -np.take_along_axis(log_probs, labels[..., None], -1).mean()


def best_temperature(logits, labels):
    """By Brent's method on the NLL in float64."""
    return math.exp(minimum(lambda t: nll_at(math.exp(t), logits, labels), (-8, 8)))


def minimum(function, bounds):
    found = scipy.optimize.minimize_scalar(
        function, bounds=bounds, method="bounded", options={"xatol": 1e-10}
    )
    return found.x


def regression(seed=0, size=4, n=200, noise=0.5):
    """Means of samples, predicted variances, and targets with noise that these lack."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 2, n)
    means = truth + rng.normal(0, 0.3, (size, n))
    variances = rng.gamma(5, 0.02, (size, n))
    targets = rng.normal(truth, math.sqrt(noise))
    return [x.astype(np.float32) for x in (means, variances, targets)]


def mixture_nll_at(noise, means, variances, targets):
    sd = np.sqrt(np.asarray(variances, float) + noise)
    log_densities = scipy.stats.norm.logpdf(targets.astype(float), means.astype(float), sd)
    return -(scipy.special.logsumexp(log_densities, axis=0) - math.log(len(means))).mean()


# Temperature.


@pytest.mark.parametrize("truth", [0.1, 0.4, 1.0, 5.0])
def test_temperature_minimises_the_nll(truth):
    logits, labels = classified(truth=truth)
    temperature = calibration.fit_temperature(logits, labels)
    np.testing.assert_allclose(temperature, best_temperature(logits, labels), rtol=1e-4)
    at = [nll_at(float(temperature) * t, logits, labels) for t in (0.99, 1.0, 1.01)]
    assert at[1] < min(at[0], at[2])


def test_temperature_of_two_classes_in_closed_form():
    """Logit a for all, right in a share p: sigmoid(a / T) = p."""
    logits = np.tile([4.0, 0.0], (10, 1))
    labels = np.array([0] * 8 + [1] * 2)
    expected = 4 / math.log(0.8 / 0.2)
    np.testing.assert_allclose(calibration.fit_temperature(logits, labels), expected, rtol=1e-6)


def test_temperature_recovers_the_true_one():
    """The estimate's standard error is about 0.5 %: 6 of them, a false alarm in 1e8."""
    logits, labels = classified(n=40_000, truth=0.5)
    assert abs(float(calibration.fit_temperature(logits, labels)) / 2 - 1) < 0.03


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_temperature_scales_with_the_logits(factor):
    logits, labels = classified()
    expected = factor * best_temperature(logits, labels)
    temperature = calibration.fit_temperature(np.float32(factor) * logits, labels)
    np.testing.assert_allclose(temperature, expected, rtol=1e-4)


def test_temperature_ignores_a_shift_and_excluded_classes():
    logits, labels = classified()
    expected = best_temperature(logits, labels)
    for excluded in (-np.inf, -1e9, np.finfo(np.float32).min):
        more = np.concatenate([logits + 1024, np.full((301, 2), excluded, np.float32)], -1)
        temperature = calibration.fit_temperature(more, labels)
        np.testing.assert_allclose(temperature, expected, rtol=1e-3)  # 1024 costs digits


def test_temperature_of_log_probabilities_is_that_of_logits():
    logits, labels = classified()
    temperature = calibration.fit_temperature(jax.nn.log_softmax(logits), labels)
    np.testing.assert_allclose(temperature, best_temperature(logits, labels), rtol=1e-4)


def test_temperature_inside_jit_and_vmap_and_of_any_shape():
    logits, labels = (np.stack(x) for x in zip(*(classified(s) for s in range(3)), strict=True))
    expected = [best_temperature(z, y) for z, y in zip(logits, labels, strict=True)]
    result = jax.jit(jax.vmap(calibration.fit_temperature))(logits, labels)
    np.testing.assert_allclose(result, expected, rtol=1e-4)
    both = best_temperature(logits.reshape(-1, 5), labels.ravel())
    np.testing.assert_allclose(calibration.fit_temperature(logits, labels), both, rtol=1e-4)


def test_temperature_in_half_precision_and_in_float64():
    logits, labels = classified()
    half = jnp.asarray(logits, jnp.bfloat16)
    expected = best_temperature(np.asarray(half, np.float32), labels)
    strict = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with jax.enable_x64(True), strict[0], strict[1]:
        temperature = calibration.fit_temperature(half, jnp.asarray(labels, jnp.uint8))
        assert temperature.dtype == jnp.float32
        np.testing.assert_allclose(temperature, expected, rtol=1e-4)
        wide = calibration.fit_temperature(logits.astype(float), labels)
        assert wide.dtype == jnp.float64
        slope = scipy.optimize.approx_fprime([float(wide)], lambda t: nll_at(t, logits, labels))
        assert abs(slope[0]) < 1e-6


@pytest.mark.parametrize("wrong", [(), (7,)])
def test_one_error_among_many_examples_is_enough_for_a_temperature(wrong):
    logits, labels = classified(truth=1000)
    logits += 3 * np.eye(5, dtype=np.float32)[labels]
    for i in wrong:
        labels[i] = np.argsort(logits[i])[-2]
    if wrong:
        expected = best_temperature(logits, labels)
        np.testing.assert_allclose(calibration.fit_temperature(logits, labels), expected, rtol=1e-3)
        return
    with pytest.raises(ValueError, match=r"logits are highest at the label.*temperature is 0"):
        calibration.fit_temperature(logits, labels)
    assert np.isnan(jax.jit(calibration.fit_temperature)(logits, labels))


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_logits_that_know_less_than_a_uniform_guess(sign):
    logits, labels = classified()
    logits *= np.float32(sign)
    with pytest.raises(ValueError, match=r"logits of the labels.*temperature is infinite"):
        calibration.fit_temperature(logits, labels)
    assert np.isnan(jax.jit(calibration.fit_temperature)(logits, labels))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite(value):
    logits, labels = classified()
    logits[3, 2] = value
    with pytest.raises(ValueError, match=rf"logits holds {value:g} as the highest"):
        calibration.fit_temperature(logits, labels)
    assert np.isnan(jax.jit(calibration.fit_temperature)(logits, labels))


def test_a_label_that_is_excluded():
    logits, labels = classified()
    logits[3, labels[3]] = -np.inf
    with pytest.raises(ValueError, match=r"minus infinity for the label of some example"):
        calibration.fit_temperature(logits, labels)
    assert np.isnan(jax.jit(calibration.fit_temperature)(logits, labels))
    with pytest.raises(ValueError, match=r"logits holds -inf as the highest"):
        calibration.fit_temperature(np.full((2, 3), -np.inf), np.zeros(2, int))


@pytest.mark.parametrize("label", [-1, 5, 200])
def test_a_label_that_is_no_class(label):
    logits, labels = classified()
    labels[3] = label
    with pytest.raises(ValueError, match=rf"labels holds {label}, but logits has 5 classes, 0 to"):
        calibration.fit_temperature(logits, labels)
    assert np.isnan(jax.jit(calibration.fit_temperature)(logits, labels))


def test_logits_and_labels_that_do_not_fit():
    logits, labels = (x[:6] for x in classified())
    with pytest.raises(ValueError, match=r"labels has shape \(5,\) and logits \(6, 5\)"):
        calibration.fit_temperature(logits, labels[:5])
    with pytest.raises(ValueError, match=r"logits \(6,\).*logits first"):
        calibration.fit_temperature(labels, logits)
    with pytest.raises(ValueError, match=r"labels has dtype float32.*astype\(int\)"):
        calibration.fit_temperature(logits, labels.astype(np.float32))
    for shape in ((), (0, 3), (3, 0)):
        with pytest.raises(ValueError, match=r"logits has shape .*at least one example"):
            calibration.fit_temperature(np.ones(shape), np.zeros(shape[:-1], int))


# Noise.


@pytest.mark.parametrize("noise", [1e-3, 0.5, 1e4])
@pytest.mark.parametrize("with_variances", [True, False])
def test_noise_minimises_the_nll(noise, with_variances):
    means, variances, targets = regression(noise=noise)
    variances = variances / 1e3 if with_variances else 0.0
    expected = minimum(
        lambda v: mixture_nll_at(math.exp(v), means, variances, targets), np.log([1e-6, 1e6])
    )
    fitted = calibration.fit_noise(means, variances, targets)
    np.testing.assert_allclose(fitted, math.exp(expected), rtol=2e-4)


def test_noise_of_a_point_prediction_is_its_mean_squared_error():
    means, _, targets = regression()
    expected = ((means[0].astype(float) - targets) ** 2).mean()
    np.testing.assert_allclose(calibration.fit_noise(means[:1], 0.0, targets), expected, rtol=1e-5)


def test_noise_of_equal_variances_in_closed_form():
    means, _, targets = regression()
    expected = ((means[0].astype(float) - targets) ** 2).mean() - 0.1
    np.testing.assert_allclose(calibration.fit_noise(means[:1], 0.1, targets), expected, rtol=1e-5)


@pytest.mark.parametrize("variance", [100.0, 1e12])
def test_noise_is_zero_where_variances_are_too_great(variance):
    means, _, targets = regression()
    assert float(calibration.fit_noise(means, variance, targets)) == 0.0
    assert float(jax.jit(calibration.fit_noise)(means, variance, targets)) == 0.0
    assert float(calibration.fit_noise(targets[None], variance, targets)) == 0.0


@pytest.mark.parametrize("misses", [20, 80])
def test_noise_of_several_minima_is_the_lowest(misses):
    """Sure hits ask for little noise, bad misses for much; their number decides."""
    bad = np.arange(200) < misses
    means, variances = np.zeros((1, 200)), np.where(bad, 1.0, 1e-10)[None]
    targets = np.where(bad, 10.0, 1e-4).astype(np.float32)
    grid = np.logspace(-12, 4, 2001)
    nlls = np.array([mixture_nll_at(v, means, variances, targets) for v in grid])
    lows = (nlls[1:-1] < nlls[:-2]) & (nlls[1:-1] < nlls[2:])
    assert lows.sum() == 2
    fitted = calibration.fit_noise(means, variances, targets)
    np.testing.assert_allclose(fitted, grid[np.argmin(nlls)], rtol=0.02)
    assert (fitted > 1) == (misses == 80)


def test_noise_inside_jit_and_vmap():
    cases = [regression(seed) for seed in range(3)]
    expected = [calibration.fit_noise(*case) for case in cases]
    stacked = [np.stack(x) for x in zip(*cases, strict=True)]
    result = jax.jit(jax.vmap(calibration.fit_noise))(*stacked)
    np.testing.assert_allclose(result, expected, rtol=1e-4)


@pytest.mark.slow
def test_noise_in_mixed_precision():
    """The widest dtype is that of the noise; in float64 it has its digits."""
    means, _, targets = regression()
    half = jnp.asarray(means[:1], jnp.bfloat16)
    exact = np.asarray(half, float)[0]
    assert calibration.fit_noise(half, 0.0, targets).dtype == jnp.float32
    strict = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with jax.enable_x64(True), strict[0], strict[1]:
        fitted = calibration.fit_noise(half, np.float32(0), targets.astype(float))
        assert fitted.dtype == jnp.float64
        np.testing.assert_allclose(fitted, ((exact - targets) ** 2).mean(), rtol=1e-12)


def test_targets_hit_exactly_without_variance_have_no_noise():
    means, _, targets = regression()
    hit_by_all = np.stack([targets] * 4)
    hit_by_one = np.stack([targets, *means[1:]])  # which pays for the others
    for hit in (hit_by_all, hit_by_one):
        with pytest.raises(ValueError, match=r"variances holds zeros where means hit targets"):
            calibration.fit_noise(hit, 0.0, targets)
        assert np.isnan(jax.jit(calibration.fit_noise)(hit, 0.0, targets))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, np.nan, "means holds the value nan, but must be finite"),
        (1, np.inf, "variances holds the value inf, but must be finite"),
        (1, -1.0, "variances holds the value -1, but must not be negative"),
        (2, -np.inf, "targets holds the value -inf, but must be finite"),
    ],
)
def test_noise_of_what_cannot_be_scored(position, value, message):
    arrays = regression()
    arrays[position][..., 3] = value
    with pytest.raises(ValueError, match=message):
        calibration.fit_noise(*arrays)
    assert np.isnan(jax.jit(calibration.fit_noise)(*arrays))


def test_noise_of_shapes_that_do_not_fit():
    means, variances, targets = regression()
    with pytest.raises(ValueError, match=r"targets has shape \(200, 1\) and means \(4, 200\)"):
        calibration.fit_noise(means, variances, targets[:, None])
    with pytest.raises(ValueError, match=r"variances has shape \(4,\) and means"):
        calibration.fit_noise(means, variances[:, 0], targets)
    with pytest.raises(ValueError, match=r"targets has shape \(200,\) and means \(200,\)"):
        calibration.fit_noise(means[0], variances[0], targets)


# Scale.


def linear():
    """A posterior N(2, 1) of the one weight of y = w x."""
    tx, params = swagjax.swag_diag(), jnp.zeros(())
    state = tx.init(params)
    for update in (1.0, 3.0):
        _, state = tx.update(jnp.array(update), state, params)
    return state


@pytest.mark.slow
def test_scale_of_a_regression_is_the_variance_of_the_weight():
    """y = w x with w from N(2, 0.3): held-out NLL of the moments is least at scale 0.3.

    2000 targets and 200 samples tell 0.3 from 0.1 and 1.0 by far; seen for all of ten keys.
    """
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, 2000).astype(np.float32)
    y = (rng.normal(2, math.sqrt(0.3), 2000) * x).astype(np.float32)
    state, traces = linear(), []

    def predict(w, x):
        traces.append(w)
        return w * x

    def held_out_nll(scale):
        posterior = Partial(swagjax.sample, state=state, scale=scale)
        means = swagjax.predict_samples(jax.random.key(0), posterior, predict, x, num_samples=200)
        return metrics.gaussian_nll(*metrics.moment_match(means, 1e-4), y)

    fit = calibration.fit_scale(held_out_nll, (0.03, 0.1, 0.3, 1.0, 3.0))
    np.testing.assert_array_equal(fit.scales, np.float32([0.03, 0.1, 0.3, 1.0, 3.0]))
    assert float(fit.scale) == np.float32(0.3)
    assert fit.losses.shape == (5,)
    one_scale = len(traces)
    calibration.fit_scale(held_out_nll, (0.5, 2.0))
    assert len(traces) == one_scale  # compiled once, for all scales


def test_scale_of_a_classification_with_the_point_among_the_scales():
    """Where half of the labels are wrong, caution pays; where none is, the point is the best.

    Of mirrored pairs the latter is no chance: the probability is concave where the label is right.
    """
    state = linear()
    x = jnp.ones(8)

    def prob_fn(w, x):
        return jax.nn.softmax(jnp.stack([0 * x, 4 * w * x], -1))

    def held_out_nll(scale, labels):
        posterior = Partial(swagjax.sample, state=state, scale=scale)
        probs = swagjax.predict(jax.random.key(0), posterior, prob_fn, x, antithetic=True)
        return metrics.nll(probs, labels)

    half = calibration.fit_scale(lambda scale: held_out_nll(scale, jnp.arange(8) % 2))
    right = calibration.fit_scale(lambda scale: held_out_nll(scale, jnp.ones(8, int)))
    assert float(half.scale) == 10.0
    assert float(right.scale) == 0.0


def test_a_factor_of_variances_is_a_scale():
    """Of one Gaussian the best factor is the mean of the squared standardised errors."""
    means, variances, targets = regression()
    best = ((means[0].astype(float) - targets) ** 2 / variances[0]).mean()
    tried = best * np.array([0.7, 0.9, 1.0, 1.1, 1.4])
    fit = calibration.fit_scale(
        lambda f: metrics.gaussian_nll(means[0], f * variances[0], targets), tried
    )
    np.testing.assert_allclose(fit.scale, best, rtol=1e-6)


def test_scale_takes_the_first_of_equals_and_infinite_losses():
    assert float(calibration.fit_scale(lambda scale: 0 * scale, (3.0, 1.0)).scale) == 3.0
    fit = calibration.fit_scale(lambda scale: jnp.where(scale < 1, jnp.inf, scale), (0.0, 1.0, 2.0))
    assert float(fit.scale) == 1.0
    assert math.isinf(fit.losses[0])


@pytest.mark.parametrize(
    ("best", "scales", "at_edge"),
    [
        (5.0, (0.0, 1.0, 3.0), True),
        (1.0, (0.0, 1.0, 3.0), False),
        (0.1, (1.0, 0.5), True),
        (0.0, (0.0, 1.0, 3.0), False),
        (1.0, (1.0,), True),
    ],
)
def test_a_best_scale_at_an_edge_says_so(best, scales, at_edge):
    """But for 0, below which there is nothing."""
    fit = calibration.fit_scale(lambda scale: (scale - best) ** 2, scales)
    assert bool(fit.at_edge) == at_edge


def test_scale_inside_jit():
    fit = jax.jit(lambda target: calibration.fit_scale(lambda s: (s - target) ** 2, (0.0, 1.0)))
    assert float(fit(0.9).scale) == 1.0
    assert float(fit(0.1).scale) == 0.0
    assert np.isnan(fit(np.nan).scale)


@pytest.mark.parametrize("scales", [(), (-1.0, 1.0), (math.inf,), (math.nan,)])
def test_scales_that_are_none(scales):
    with pytest.raises(ValueError, match=r"scales is \[.*at least one number, all finite"):
        calibration.fit_scale(lambda scale: scale, scales)


def test_held_out_losses_that_are_none():
    with pytest.raises(ValueError, match=r"held_out_loss is a float: give a function"):
        calibration.fit_scale(0.5)
    with pytest.raises(ValueError, match=r"held_out_loss returned an array of shape \(2,\)"):
        calibration.fit_scale(lambda scale: jnp.array([scale, scale]))
    with pytest.raises(ValueError, match=r"held_out_loss returned nan at the scale 0\.5"):
        calibration.fit_scale(lambda s: jnp.where(s == 0.5, jnp.nan, s), (0.1, 0.5))
    with pytest.raises(ValueError, match=r"held_out_loss returned inf at its best"):
        calibration.fit_scale(lambda scale: jnp.inf * (1 + scale), (0.1, 0.5))


# Weights, sums over 10^8 examples, and what is taken for what it is not.


def test_temperature_with_weights_is_that_of_repetitions():
    logits, labels = classified()
    weights = np.random.default_rng(1).integers(0, 3, len(labels))
    expected = best_temperature(np.repeat(logits, weights, 0), np.repeat(labels, weights))
    logits[weights == 0], labels[weights == 0] = np.nan, -100
    for call in (calibration.fit_temperature, jax.jit(calibration.fit_temperature)):
        fitted = call(logits, labels, weights=weights.astype(np.float32))
        np.testing.assert_allclose(fitted, expected, rtol=1e-4)
    with pytest.raises(ValueError, match=r"weights holds the value -2, but must not be negative"):
        calibration.fit_temperature(logits, labels, weights=-weights)
    assert np.isnan(calibration.fit_temperature(logits, labels, weights=0 * weights))


def test_noise_with_weights_is_that_of_repetitions():
    means, variances, targets = regression()
    weights = np.random.default_rng(1).integers(0, 3, len(targets))
    real = [np.repeat(x, weights, -1) for x in (means, variances, targets)]
    for x in (means, variances, targets):
        x[..., weights == 0] = np.nan
    expected = minimum(lambda v: mixture_nll_at(math.exp(v), *real), np.log([1e-6, 1e6]))
    fitted = calibration.fit_noise(means, variances, targets, weights=weights)
    np.testing.assert_allclose(fitted, math.exp(expected), rtol=2e-4)
    with pytest.raises(ValueError, match=r"weights holds the value -2, but must not be negative"):
        calibration.fit_noise(*real, weights=-2.0)
    assert np.isnan(calibration.fit_noise(means, variances, targets, weights=0 * weights))


def test_noise_of_several_outputs_jointly():
    """The noise that is best for the joint density of two outputs, by SciPy."""
    means, variances, targets = (x.reshape(*x.shape[:-1], 100, 2) for x in regression())

    def joint_nll(log_noise):
        sd = np.sqrt(variances.astype(float) + math.exp(log_noise))
        log_densities = scipy.stats.norm.logpdf(targets.astype(float), means.astype(float), sd)
        return -scipy.special.logsumexp(log_densities.sum(-1), axis=0).mean()

    expected = math.exp(minimum(joint_nll, np.log([1e-6, 1e6])))
    fitted = calibration.fit_noise(means, variances, targets, event_ndim=1)
    np.testing.assert_allclose(fitted, expected, rtol=2e-4)


def test_regression_probabilities_are_no_logits():
    """Their temperature was fitted in silence, of a softmax of a softmax."""
    logits, labels = classified()
    probs = scipy.special.softmax(logits, -1)
    for dtype in (np.float32, jnp.bfloat16):
        with pytest.raises(ValueError, match=r"logits holds probabilities.*jnp\.log\(probs\)"):
            calibration.fit_temperature(jnp.asarray(probs, dtype), labels)
    weights = np.arange(len(labels)) != 3
    probs[3] = -7.0
    with pytest.raises(ValueError, match=r"logits holds probabilities.*logits - 1"):
        calibration.fit_temperature(probs, labels, weights=weights)
    probs[5] = logits[5]
    calibration.fit_temperature(probs, labels)  # one row that is none, and they are logits


def test_regression_labels_of_64_bits_are_not_wrapped_around():
    """Without x64 JAX makes a 2 of the label 2^32 + 2."""
    logits, labels = classified()
    labels[3] = 2**32 + 2
    with pytest.raises(ValueError, match=r"labels holds 4294967298, but logits has 5 classes"):
        calibration.fit_temperature(logits, labels)


@pytest.mark.slow
def test_regression_temperature_and_noise_of_millions_keep_their_digits():
    """Slopes are summed in blocks; one by one they lose the digits of the temperature."""
    n = 2 * 10**6
    logits = jnp.broadcast_to(jnp.array([4.0, 0.0]), (n, 2))
    labels = (jnp.arange(n) % 5 == 0).astype(int)  # right four times of five
    temperature = calibration.fit_temperature(logits, labels)
    np.testing.assert_allclose(temperature, 4 / math.log(4), rtol=1e-5)
    targets = jnp.where(labels == 1, 3.0, 1.0)
    np.testing.assert_allclose(calibration.fit_noise(jnp.zeros((1, n)), 0.0, targets), 2.6, 1e-5)


def test_regression_sound_data_pass_jax_debug_nans_and_infs():
    logits, labels = classified(n=50)
    logits = np.concatenate([logits, np.full((50, 1), -np.inf, np.float32)], -1)
    means, variances, targets = regression()
    weights = np.arange(200) != 7
    targets[7] = np.nan
    with jax.debug_nans(True), jax.debug_infs(True):
        calibration.fit_temperature(logits, labels)
        calibration.fit_noise(means, variances, targets, weights=weights)
        calibration.fit_scale(lambda scale: (scale - 1) ** 2, (0.0, 1.0))
