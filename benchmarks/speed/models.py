"""Networks of the speed suite, in flax linen, and trees of which the shapes alone are needed.

Imports jax and flax only, so that a peer with an older jax can build the same networks.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class ResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images: 3 x 3 stem, four stages of two blocks; 11.2 M parameters.

    Source: He et al. 2016 (arXiv:1512.03385), with the stem that is usual on CIFAR.
    """

    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(N, classes)``; ``train``: BatchNorm uses and records moments of the batch."""
        x = nn.relu(_norm(train)(_conv(64)(x)))
        for stage, width in enumerate((64, 128, 256, 512)):
            for block in range(2):
                stride = 2 if stage and not block else 1
                y = nn.relu(_norm(train)(_conv(width, stride)(x)))
                y = _norm(train)(_conv(width)(y))
                if x.shape != y.shape:
                    x = _norm(train)(_conv(width, stride, size=1)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class PreActResNet(nn.Module):
    """Residual network with normalisation before each convolution, three stages.

    ``blocks=4, widths=(160, 320, 640)`` is WRN-28-10 with 36.5 M parameters,
    ``blocks=3, widths=(16, 32, 64)`` is PreResNet-20 with 272 k.

    Source: He et al. 2016 (arXiv:1603.05027); Zagoruyko, Komodakis 2016 (arXiv:1605.07146).
    """

    blocks: int
    widths: Sequence[int]
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(N, classes)``; ``train``: BatchNorm uses and records moments of the batch."""
        x = _conv(16)(x)
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                y = nn.relu(_norm(train)(x))
                shortcut = x
                if x.shape[-1] != width:
                    shortcut = _conv(width, stride, size=1)(y)
                y = nn.relu(_norm(train)(_conv(width, stride)(y)))
                x = shortcut + _conv(width)(y)
        x = nn.relu(_norm(train)(x)).mean((1, 2))
        return nn.Dense(self.classes)(x)


def decoder_shapes(
    layers: int = 12, width: int = 768, vocabulary: int = 50_257, context: int = 1024
) -> dict[str, Any]:
    """Shapes of the parameters of a decoder-only transformer, by default GPT-2's 124 M.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners"; the output
    layer is the transposed embedding.
    """

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def dense(inside: int, outside: int) -> dict[str, Any]:
        return {"kernel": array(inside, outside), "bias": array(outside)}

    def norm() -> dict[str, Any]:
        return {"scale": array(width), "bias": array(width)}

    def layer() -> dict[str, Any]:
        return {
            "norm1": norm(),
            "attention": {"in": dense(width, 3 * width), "out": dense(width, width)},
            "norm2": norm(),
            "mlp": {"in": dense(width, 4 * width), "out": dense(4 * width, width)},
        }

    return {
        "tokens": array(vocabulary, width),
        "positions": array(context, width),
        "layers": {f"{i:02}": layer() for i in range(layers)},
        "norm": norm(),
    }


def many_leaves(leaves: int = 300, shapes: int = 85) -> dict[str, Any]:
    """A tree of many leaves in many shapes, each of which a careless program compiles anew.

    Vectors, and matrices from 10 x 12 to 178 x 180: sizes below and above what is pooled.
    """

    def shape(i: int) -> tuple[int, ...]:
        return (17 + 3 * i,) if i % 3 else (10 + 2 * i, 12 + 2 * i)

    return {f"{i:03}": jax.ShapeDtypeStruct(shape(i % shapes), jnp.float32) for i in range(leaves)}


def _conv(width: int, stride: int = 1, size: int = 3) -> nn.Conv:
    return nn.Conv(width, (size, size), (stride, stride), padding=size // 2, use_bias=False)


def _norm(train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)
