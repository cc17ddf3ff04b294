"""Corruptions of images against SciPy and closed forms, and the crops of augmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from benchmarks import augmentation, corruptions

KEY = jax.random.key(0)
corrupt = jax.jit(corruptions.corrupt, static_argnums=(0, 1))
rotate = jax.jit(corruptions.rotate)


def images(n=3, height=8, width=8, channels=2):
    return np.random.default_rng(0).normal(size=(n, height, width, channels)).astype(np.float32)


@pytest.mark.parametrize(
    "kind",
    [
        *("blur", "brightness", "contrast", "pixelate"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("noise", "rotation", "shot")),
    ],
)
def test_severity_0_changes_nothing_and_5_more_than_1(kind):
    x = images(channels=1)
    np.testing.assert_array_equal(corruptions.corrupt(kind, 0, KEY, x), x)
    mild, severe = (np.asarray(corrupt(kind, severity, KEY, x)) for severity in (1, 5))
    assert mild.shape == severe.shape == x.shape
    assert mild.dtype == severe.dtype == np.float32
    assert 0 < np.abs(mild - x).mean() < np.abs(severe - x).mean() < np.inf


def test_what_there_is_not_is_refused():
    with pytest.raises(ValueError, match="kind='fog': one of noise, shot"):
        corruptions.corrupt("fog", 1, KEY, images())
    for severity in (-1, 6, 1.5):
        with pytest.raises(ValueError, match=f"severity={severity}: a whole number from 0 to 5"):
            corruptions.corrupt("noise", severity, KEY, images())


def test_strengths_grow_over_the_severities():
    falling = {"shot", "pixelate", "contrast"}  # of which less is worse
    for kind, strengths in corruptions.STRENGTHS.items():
        assert len(strengths) == 5
        assert (np.diff(strengths) < 0).all() if kind in falling else (np.diff(strengths) > 0).all()


@pytest.mark.parametrize("degrees", [0.0, 17.0, 90.0, 133.0, 180.0, -40.0])
def test_rotation_is_that_of_scipy(degrees):
    # Not square, so that rows and columns can be told apart; two channels of different background.
    x = images(height=7, width=9)
    least = x.min((1, 2))
    expected = np.empty_like(x)
    for i, j in np.ndindex(len(x), x.shape[-1]):
        expected[i, ..., j] = ndimage.rotate(
            *(x[i, ..., j], degrees), reshape=False, order=1, mode="grid-constant", cval=least[i, j]
        )
    np.testing.assert_allclose(rotate(x, degrees), expected, atol=1e-4)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_counter_clockwise(turns):
    x = images()
    np.testing.assert_allclose(rotate(x, 90.0 * turns), np.rot90(x, turns, axes=(1, 2)), atol=1e-5)


def test_the_rotations_of_corrupt_are_those_in_the_table():
    x = images(channels=1)
    for severity, degrees in enumerate(corruptions.STRENGTHS["rotation"], start=1):
        if severity in (1, 5):
            turned = corrupt("rotation", severity, KEY, x)
            np.testing.assert_allclose(turned, rotate(x, degrees), atol=1e-6)


@pytest.mark.parametrize("strength", [0.02, 0.08])
def test_blur_is_that_of_scipy(strength):
    x = images(height=6, width=10)
    expected = ndimage.gaussian_filter(
        x.astype(np.float64), 10 * strength, axes=(1, 2), mode="nearest",
        radius=int(np.ceil(40 * strength)),
    )  # fmt: skip
    np.testing.assert_allclose(
        jax.jit(corruptions.blur, static_argnums=1)(x, strength), expected, atol=1e-5
    )


def test_pixels_of_half_the_side_are_means_of_four_weighted_by_a_triangle():
    x = images(height=4, width=4, channels=1)
    fine = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    weights = np.array([1, 3, 3, 1]) / 8
    inside = np.array([[0, 1, 1, 1], [1, 1, 1, 0]])  # what of the triangle lies in the image
    coarse = np.empty((3, 2, 2, 1))
    for i, j in np.ndindex(2, 2):
        rows, columns = (weights * inside[k] / (weights @ inside[k]) for k in (i, j))
        window = fine[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4]
        coarse[:, i, j] = np.einsum("a,b,nabc->nc", rows, columns, window)
    expected = coarse.repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(corruptions.pixelate(x, 0.5), expected, atol=1e-5)


def test_contrast_and_brightness_change_the_moments_of_each_image_and_channel():
    x = images()
    for strength in (0.75, 0.1):
        y = np.asarray(corruptions.contrast(x, strength))
        np.testing.assert_allclose(y.mean((1, 2)), x.mean((1, 2)), atol=1e-5)
        np.testing.assert_allclose(y.std((1, 2)), strength * x.std((1, 2)), rtol=1e-4)
        np.testing.assert_allclose(np.ptp(y, (1, 2)) / np.ptp(x, (1, 2)), strength, rtol=1e-4)
    np.testing.assert_allclose(corruptions.brightness(x, 1.5) - x, 1.5, atol=1e-5)


def test_noise_is_normal_and_independent_of_the_image():
    """40,000 draws: moments within six standard errors, 4e-9 false alarms each."""
    x = images(n=100, height=20, width=20, channels=1)
    z = (np.asarray(corruptions.noise(KEY, x, 0.5)) - x).ravel() / 0.5
    bound = 6 / np.sqrt(z.size)
    assert abs(z.mean()) < bound
    assert abs((z**2).mean() - 1) < np.sqrt(2) * bound
    assert abs((z**4).mean() - 3) < np.sqrt(96) * bound
    assert abs((z * x.ravel()).mean() / x.std()) < bound
    assert np.any(corruptions.noise(jax.random.key(1), x, 0.5) != corruptions.noise(KEY, x, 0.5))


@pytest.mark.slow
def test_shot_noise_counts_what_is_brighter_than_the_least():
    """Counts of means 0, 2 and 4, 10,000 each: moments within six standard errors."""
    levels = np.array([-1.0, 1.0, 3.0], np.float32)
    x = np.tile(levels[:, None], (1, 10_000))[None, ..., None]
    counts = (np.asarray(corruptions.shot(KEY, x, 4.0))[0, ..., 0] + 1) / 4 * 4
    np.testing.assert_allclose(counts, counts.round(), atol=1e-4)
    np.testing.assert_array_equal(counts[0], 0)
    for mean, of in zip((2, 4), counts[1:], strict=True):
        bound = 6 * np.sqrt(mean / len(of))
        assert abs(of.mean() - mean) < bound
        # The variance of a Poisson variance estimate is about (2 mean^2 + mean) / n.
        assert abs(of.var() - mean) < 6 * np.sqrt((2 * mean**2 + mean) / len(of))


@pytest.mark.slow
def test_an_image_of_one_value_stays_as_it_is():
    flat = np.full((1, 8, 8, 1), 0.7, np.float32)
    for kind in ("shot", "blur", "pixelate", "contrast", "rotation"):
        np.testing.assert_allclose(corruptions.corrupt(kind, 5, KEY, flat), flat, atol=1e-5)


# augmentation


def test_a_crop_is_a_window_of_the_image_with_four_pixels_of_zeros_around():
    x = 10 + images(n=200, channels=1)
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    cropped = np.asarray(jax.jit(augmentation.augmentation(("crop",)))(KEY, x))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))
    found = (windows[:, :, :, 0] == cropped[:, None, None, :, :, 0]).all((-1, -2))
    assert (found.sum((1, 2)) == 1).all()
    # 200 draws of 9 places: that one of them is missing has probability 9 * (8 / 9)^200 < 1e-9.
    assert found.any((0, 2)).all()
    assert found.any((0, 1)).all()
    assert found.any(0).sum() > 40  # of 81; with rows and columns drawn as one it would be 9


def test_kinds_are_applied_in_their_order_each_with_a_key_of_its_own():
    x = jnp.asarray(images(n=5))

    @jax.jit
    def both(x):
        k0, k1 = (jax.random.fold_in(KEY, i) for i in range(2))
        expected = augmentation.noise(k1, augmentation.flip(k0, x))
        return augmentation.augmentation(("flip", "noise"))(KEY, x), expected

    got, expected = both(x)
    np.testing.assert_array_equal(got, expected)
    assert augmentation.usual_augmentation(np.zeros((1, 8, 8, 3))) == ("shift", "flip")
    assert augmentation.usual_augmentation(np.zeros((1, 8, 8, 1))) == ("shift", "noise")
