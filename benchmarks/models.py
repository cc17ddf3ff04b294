"""The networks for images, in flax linen: ``(N, H, W, C)`` in, logits ``(N, classes)`` out.

All take ``classes``; ``dropout``, a rate that acts where ``apply`` is given a key ``dropout`` and
nowhere else, so that a prediction with a key is one of MC-dropout; and ``dtype``, the type that
hidden layers compute in. Parameters, BatchNorm's statistics and logits are float32 in any case.
``train``: BatchNorm uses and records moments of the batch; it changes nothing in networks without.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# As the authors of SWAG. By flax's default the logits of a fresh VGG16 are a seventh of the size.
HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class LeNet5(nn.Module):
    """The classical LeNet5: two convolutions, three dense layers, no BatchNorm.

    62,006 parameters for 32 x 32 x 3 images and 10 classes. Images of fewer than 32 rows or columns
    (MNIST's 28) are padded with zeros by the first convolution, as its author did.
    """

    classes: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(N, classes)``; ``train`` is accepted for uniformity and changes nothing."""
        conv = functools.partial(nn.Conv, kernel_size=(5, 5), dtype=self.dtype)
        x = nn.relu(conv(6, padding="VALID" if min(x.shape[1:3]) >= 32 else "SAME")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(conv(16, padding="VALID")(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        for width in (120, 84):
            x = _dropout(self, nn.relu(nn.Dense(width, dtype=self.dtype)(x)))
        return _logits(self, x)


class ConvNet(nn.Module):
    """Blocks of convolution, BatchNorm and relu, halved in size between blocks; mean over space.

    Small enough for scikit-learn's 8 x 8 digits, and taking any larger image.
    """

    classes: int
    widths: Sequence[int] = (16, 32, 32)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(N, classes)``."""
        for i, width in enumerate(self.widths):
            if i:
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.Conv(width, (3, 3), use_bias=False, dtype=self.dtype)(x)
            x = _norm_relu(x, train, self.dtype)
        return _logits(self, _dropout(self, x.mean((1, 2))))


class VGG16(nn.Module):
    """Thirteen convolutions and three dense layers, no BatchNorm: the authors' of SWAG for CIFAR.

    15,245,130 parameters for 32 x 32 x 3 images and 10 classes. Dense layers have 512 units, and
    their inputs are dropped out. Smaller images are halved until one pixel is left.

    Source: Simonyan and Zisserman (2015), configuration D.
    """

    classes: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(N, classes)``; ``train`` is accepted for uniformity and changes nothing."""
        for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(depth):
                x = nn.relu(nn.Conv(width, (3, 3), kernel_init=HE, dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(512, dtype=self.dtype)(_dropout(self, x)))
        return _logits(self, x)


class PreResNet(nn.Module):
    """Residual blocks that begin with BatchNorm and relu, in three stages, each half the size.

    Depth is ``6 * blocks + 2``, with bottlenecks ``9 * blocks + 2``. Parameters for 32 x 32 x 3
    images and 10 classes: PreResNet-20 272,282; 56 855,578; 110 1,730,522; 164, which is of
    bottlenecks, 1,703,258. With ``widths`` of (160, 320, 640) and 4 blocks it is the wide residual
    network WRN-28-10: 36,479,194. (At depth 56 and 110 the authors of SWAG use bottlenecks.)

    Source: He et al. (2016), "Identity Mappings in Deep Residual Networks"; Zagoruyko and Komodakis
    (2016), "Wide Residual Networks".
    """

    classes: int
    blocks: int
    widths: Sequence[int] = (16, 32, 64)
    bottleneck: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(N, classes)``."""
        x = _conv(16, 3, dtype=self.dtype)(x)
        for stage, width in enumerate(self.widths):
            for i in range(self.blocks):
                stride = 2 if stage and not i else 1
                x = Residual(width, stride, self.bottleneck, self.dtype)(x, train)
        return _logits(self, _dropout(self, _norm_relu(x, train, self.dtype).mean((1, 2))))


class Residual(nn.Module):
    """One block: its input, projected where the shape changes, plus two or three convolutions."""

    width: int
    stride: int
    bottleneck: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Features ``(N, H / stride, W / stride, width)``, of bottlenecks four times as many."""
        wide = 4 * self.width
        plain = ((self.width, 3, self.stride), (self.width, 3, 1))
        narrow = ((self.width, 1, 1), (self.width, 3, self.stride), (wide, 1, 1))
        layers = narrow if self.bottleneck else plain
        y = x
        for features, kernel, stride in layers:
            y = _conv(features, kernel, stride, self.dtype)(_norm_relu(y, train, self.dtype))
        if x.shape != y.shape:
            x = _conv(layers[-1][0], 1, self.stride, self.dtype)(x)
        return x + y


class ViT(nn.Module):
    """A small vision transformer: LayerNorm, no BatchNorm, no class token; mean over patches.

    Patches are an eighth of the image's longer side, and 2 pixels at least: 4 x 4 pixels for CIFAR
    and MNIST, 2 x 2 for scikit-learn's digits. What is left over at an edge is filled with zeros.

    Source: Dosovitskiy et al. (2021), "An Image is Worth 16x16 Words".
    """

    classes: int
    width: int = 128
    depth: int = 6
    heads: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(N, classes)``; ``train`` is accepted for uniformity and changes nothing."""
        patch = (max(2, -(-max(x.shape[1:3]) // 8)),) * 2
        x = nn.Conv(self.width, patch, patch, dtype=self.dtype, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        init = nn.initializers.normal(0.02)
        x = x + self.param("positions", init, x.shape[1:]).astype(self.dtype)
        for _ in range(self.depth):
            x = Encoder(self.heads, self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x).mean(1)
        return _logits(self, _dropout(self, x))


class Encoder(nn.Module):
    """One layer of a transformer: attention, then two dense layers, each added to its input."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Features ``(N, patches, width)``, as they came in."""
        width, dtype = x.shape[-1], self.dtype
        attention = nn.MultiHeadDotProductAttention(
            self.heads, dtype=dtype, force_fp32_for_softmax=True
        )
        x = x + attention(nn.LayerNorm(dtype=dtype)(x))
        y = nn.gelu(nn.Dense(4 * width, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x)))
        return x + nn.Dense(width, dtype=dtype)(y)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
    "lenet5": LeNet5,
    "vgg16": VGG16,
    "preresnet20": functools.partial(PreResNet, blocks=3),
    "preresnet56": functools.partial(PreResNet, blocks=9),
    "preresnet110": functools.partial(PreResNet, blocks=18),
    "preresnet164": functools.partial(PreResNet, blocks=18, bottleneck=True),
    "wrn28x10": functools.partial(PreResNet, blocks=4, widths=(160, 320, 640)),
    "vit": ViT,
}


def _conv(features: int, kernel: int, stride: int = 1, dtype: Any = jnp.float32) -> nn.Conv:
    size, strides = (kernel, kernel), (stride, stride)
    return nn.Conv(features, size, strides, use_bias=False, kernel_init=HE, dtype=dtype)


def _norm_relu(x: jax.Array, train: bool, dtype: Any) -> jax.Array:
    return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)(x))


def _dropout(module: Any, x: jax.Array) -> jax.Array:
    return nn.Dropout(module.dropout, deterministic=not module.has_rng("dropout"))(x)


def _logits(module: Any, x: jax.Array) -> jax.Array:
    """The last layer, in float32 whatever the others compute in."""
    return nn.Dense(module.classes, dtype=jnp.float32)(x)
