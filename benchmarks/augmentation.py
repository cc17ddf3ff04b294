"""Random changes of training images ``(N, H, W, C)``, made anew in every epoch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

NOISE = 0.3  # standard deviation of the noise; images have standard deviation 1
PADDING = 4  # pixels around an image before ``crop``, as the authors of SWAG do on CIFAR


def augmentation(kinds: tuple[str, ...]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function of a key and a batch that applies the changes named in ``kinds``, in order.

    Of ``shift``, ``crop``, ``noise`` and ``flip``; each takes its own key, ``fold_in(key, i)``.
    """
    changes = [CHANGES[kind] for kind in kinds]

    def augment(key: jax.Array, images: jax.Array) -> jax.Array:
        for i, change in enumerate(changes):
            images = change(jax.random.fold_in(key, i), images)
        return images

    return augment


def usual_augmentation(images: np.ndarray) -> tuple[str, ...]:
    """Shifts; flips of images in colour (photographs, mostly), noise on grey ones."""
    return ("shift", "flip" if images.shape[-1] == 3 else "noise")


def shift(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image moved by up to an eighth of its side; its edge is repeated."""
    return _crop(key, images, max(1, images.shape[1] // 8), "edge")


def crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image moved by up to 4 pixels in each direction, with zeros where it was not."""
    return _crop(key, images, PADDING, "constant")


def noise(key: jax.Array, images: jax.Array) -> jax.Array:
    """Gaussian noise on every pixel."""
    return images + NOISE * jax.random.normal(key, images.shape)


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image left to right, or not, with equal probability."""
    mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


CHANGES = {"shift": shift, "crop": crop, "noise": noise, "flip": flip}


def _crop(key: jax.Array, images: jax.Array, reach: int, padding: str) -> jax.Array:
    """A window of the image's own size, placed at random on the image padded by ``reach``."""
    wide = ((0, 0), (reach, reach), (reach, reach), (0, 0))
    padded = jnp.pad(images, wide, mode=padding)
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * reach + 1)

    def window(image: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*at, 0), images.shape[1:])

    return jax.vmap(window)(padded, corners)
