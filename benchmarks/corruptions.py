"""Corruptions of images ``(N, H, W, C)`` in five severities, to predict what was not trained on.

In the spirit of Hendrycks and Dietterich (2019), "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations". The constants are ours, for theirs are in units of pixels from 0 to
1 and for one size of image each: here images are normalised, of mean 0 and standard deviation 1 per
channel over the data, lengths are shares of the image's side, and nothing is clipped. Results are
comparable between methods, not with figures for CIFAR-10-C.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import ndimage

SEVERITIES = (0, 1, 2, 3, 4, 5)  # 0: as they are
# Severity 1 to 5 of every corruption, in the unit that its function states.
STRENGTHS = {
    "noise": (0.25, 0.5, 0.75, 1.0, 1.5),
    "shot": (60.0, 25.0, 12.0, 5.0, 3.0),
    "blur": (0.02, 0.035, 0.05, 0.065, 0.08),
    "pixelate": (0.75, 0.6, 0.5, 0.4, 0.3),
    "contrast": (0.75, 0.5, 0.35, 0.2, 0.1),
    "brightness": (0.4, 0.8, 1.2, 1.6, 2.0),
    "rotation": (15.0, 30.0, 45.0, 60.0, 75.0),
}


def corrupt(kind: str, severity: int, key: jax.Array, images: jax.Array) -> jax.Array:
    """Images changed by one corruption; ``kind`` and ``severity`` are static under ``jit``.

    Args:
      kind: a key of ``STRENGTHS``.
      severity: 0, which returns the images as they are, to 5.
      key: random key, for ``noise`` and ``shot``; every image has its own draws.
      images: ``(N, H, W, C)`` in normalised units.

    Raises:
      ValueError: for a kind or a severity that there is not.
    """
    if kind not in STRENGTHS:
        raise ValueError(f"kind={kind!r}: one of {', '.join(STRENGTHS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity={severity}: a whole number from 0 to 5")
    if severity == 0:
        return images
    return CHANGES[kind](key, images, STRENGTHS[kind][severity - 1])


def rotate(images: jax.Array, degrees: jax.Array | float) -> jax.Array:
    """Images turned counter-clockwise about their centre, pixels interpolated bilinearly.

    What turns in from outside has the least value of the image's channel: the background of digits.
    """
    angle = jnp.deg2rad(degrees)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    height, width = images.shape[1:3]
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    y, x = jnp.mgrid[:height, :width] - centre
    # The inverse map: where each pixel comes from. Rows count downwards.
    sources = jnp.stack([cos * y + sin * x, cos * x - sin * y]) + centre

    def turn(channel: jax.Array) -> jax.Array:
        return ndimage.map_coordinates(channel, list(sources), order=1, mode="constant", cval=0.0)

    least = images.min((1, 2), keepdims=True)
    over_channels = jax.vmap(turn, in_axes=-1, out_axes=-1)
    return jax.vmap(over_channels)(images - least) + least


def noise(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Gaussian noise on every pixel, of standard deviation ``strength``."""
    return images + strength * jax.random.normal(key, images.shape)


def shot(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Poisson noise: ``strength`` counts for the brightest pixel of each image, none for the least.

    A count's standard deviation is its mean's root, so that the noise is in the bright pixels.
    """
    least = images.min((1, 2, 3), keepdims=True)
    reach = jnp.maximum(images.max((1, 2, 3), keepdims=True) - least, 1e-6)
    counts = jax.random.poisson(key, strength * (images - least) / reach, images.shape)
    return least + reach * counts.astype(images.dtype) / strength


def blur(images: jax.Array, strength: float) -> jax.Array:
    """Gaussian blur with standard deviation ``strength`` sides of the image; edges are repeated."""
    for axis in (1, 2):
        images = _blur_along(axis, images, strength * max(images.shape[1:3]))
    return images


def pixelate(images: jax.Array, strength: float) -> jax.Array:
    """Fewer pixels, ``strength`` of those along a side, drawn as squares of the former size."""
    n, height, width, channels = images.shape
    small = (n, *(max(1, round(strength * side)) for side in (height, width)), channels)
    # Antialiased, as pixels of a coarser camera: each is a mean of those that it replaces.
    return jax.image.resize(jax.image.resize(images, small, "linear"), images.shape, "nearest")


def contrast(images: jax.Array, strength: float) -> jax.Array:
    """Differences from the mean of each image's channel, ``strength`` times as large."""
    mean = images.mean((1, 2), keepdims=True)
    return mean + strength * (images - mean)


def brightness(images: jax.Array, strength: float) -> jax.Array:
    """All pixels brighter by ``strength``."""
    return images + strength


def _without_key(change: Callable) -> Callable:
    return lambda key, images, strength: change(images, strength)


CHANGES = {
    "noise": noise,
    "shot": shot,
    **{change.__name__: _without_key(change) for change in (blur, pixelate, contrast, brightness)},
    "rotation": _without_key(rotate),
}


def _blur_along(axis: int, images: jax.Array, sd: float) -> jax.Array:
    """A weighted sum of shifted images, weights cut at four standard deviations."""
    reach = math.ceil(4 * sd)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sd) ** 2)
    weights = (weights / weights.sum()).tolist()
    wide = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
    padded, side = jnp.pad(images, wide, mode="edge"), images.shape[axis]
    shifted = [jax.lax.slice_in_dim(padded, i, i + side, axis=axis) for i in range(len(weights))]
    return sum(weight * image for weight, image in zip(weights, shifted, strict=True))
