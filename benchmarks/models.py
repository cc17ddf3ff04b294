"""The networks of the experiments, in flax linen: images ``(N, H, W, C)`` in, logits out."""

from collections.abc import Sequence

import jax
from flax import linen as nn


class LeNet5(nn.Module):
    """The classical LeNet5: two convolutions, three dense layers, no BatchNorm.

    62,006 parameters for 32 x 32 x 3 images and 10 classes. Images of fewer than 32 rows or columns
    (MNIST's 28) are padded with zeros by the first convolution, as its author did.
    """

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(N, classes)``; ``train`` is accepted for uniformity and changes nothing."""
        x = nn.relu(nn.Conv(6, (5, 5), padding="VALID" if min(x.shape[1:3]) >= 32 else "SAME")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(16, (5, 5), padding="VALID")(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(120)(x))
        x = nn.relu(nn.Dense(84)(x))
        return nn.Dense(self.classes)(x)


class ConvNet(nn.Module):
    """Blocks of convolution, BatchNorm and relu, halved in size between blocks; mean over space.

    Small enough for scikit-learn's 8 x 8 digits, and taking any larger image.
    """

    classes: int
    widths: Sequence[int] = (16, 32, 32)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(N, classes)``; ``train``: BatchNorm uses and records moments of the batch."""
        for i, width in enumerate(self.widths):
            if i:
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))


MODELS = {"convnet": ConvNet, "lenet5": LeNet5}
