"""The networks of the experiments on text, in flax linen: numbers of words or bytes in.

``dtype`` is what they compute in; parameters and the logits of classifiers are float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.text import PADDING


class TransformerClassifier(nn.Module):
    """Embedding, blocks of self-attention, mean over the words; padding changes nothing.

    Positions are sines and cosines, so that texts may have any length.
    """

    classes: int
    vocabulary: int
    width: int = 64
    heads: int = 4
    blocks: int = 1
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(N, classes)``; dropout is on where ``apply`` is given its key."""
        seen = x != PADDING
        h = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(x)
        h = _dropout(self, h + _waves(x.shape[1], self.width).astype(h.dtype))
        for _ in range(self.blocks):
            h = Block(self.heads, self.dropout, self.dtype)(h, nn.make_attention_mask(seen, seen))
        h = nn.LayerNorm(dtype=self.dtype)(h)
        return nn.Dense(self.classes, dtype=jnp.float32)(_dropout(self, _mean(h, seen)))


class LSTMClassifier(nn.Module):
    """Embedding, an LSTM from either end of the text, mean over the words without the padding."""

    classes: int
    vocabulary: int
    width: int = 64
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(N, classes)``; dropout is on where ``apply`` is given its key."""
        seen = x != PADDING
        h = _dropout(self, nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(x))
        forth, back = (nn.RNN(nn.OptimizedLSTMCell(self.width, dtype=self.dtype)) for _ in "01")
        h = nn.Bidirectional(forth, back)(h, seq_lengths=seen.sum(1))
        return nn.Dense(self.classes, dtype=jnp.float32)(_dropout(self, _mean(h, seen)))


class LanguageModel(nn.Module):
    """Decoder-only transformer: normalised before every layer, learned positions, tied embeddings.

    With vocabulary V, length T, width d and L blocks it has (V + T) d + L (12 d² + 13 d) + 2 d
    parameters: 120,576 by default.
    """

    vocabulary: int = 256
    length: int = 64
    width: int = 64
    heads: int = 4
    blocks: int = 2
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits of the next token after each of ``(N, T)``: ``(N, T, vocabulary)``."""
        # As small as the positions: tied, it would begin with large logits otherwise.
        small = nn.initializers.normal(0.02)
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=small, dtype=self.dtype)
        places = self.param("positions", small, (self.length, self.width))
        h = embed(x)
        h = _dropout(self, h + places[: x.shape[1]].astype(h.dtype))
        for _ in range(self.blocks):
            h = Block(self.heads, self.dropout, self.dtype)(h, nn.make_causal_mask(x))
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(h))


class Block(nn.Module):
    """Self-attention and a layer four times as wide, each on what is normalised, each added."""

    heads: int
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, h: jax.Array, mask: jax.Array) -> jax.Array:
        """From ``(N, T, d)`` to the same; ``mask``, with axes (N, 1, T, T), is true where seen."""
        width, dtype = h.shape[-1], self.dtype
        attend = nn.MultiHeadDotProductAttention(self.heads, dtype=dtype)
        h = h + _dropout(self, attend(nn.LayerNorm(dtype=dtype)(h), mask=mask))
        inner = nn.gelu(nn.Dense(4 * width, dtype=dtype)(nn.LayerNorm(dtype=dtype)(h)))
        return h + _dropout(self, nn.Dense(width, dtype=dtype)(inner))


def _dropout(module: nn.Module, h: jax.Array) -> jax.Array:
    return nn.Dropout(module.dropout, deterministic=not module.has_rng("dropout"))(h)


def _mean(h: jax.Array, seen: jax.Array) -> jax.Array:
    """Over what is not padding; zero for a text without words."""
    return (h * seen[..., None]).sum(1) / jnp.maximum(seen.sum(1), 1)[:, None].astype(h.dtype)


@functools.lru_cache
def _waves(length: int, width: int) -> Any:
    """Sines and cosines of positions, of wavelengths from 2 pi to 10,000 times that, in rows.

    Their length is that of new embeddings: otherwise they drown the words for the first epochs.
    """
    import numpy as np

    angles = np.outer(np.arange(length), 1e-4 ** np.linspace(0, 1, width // 2))
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return (waves / np.sqrt(width // 2)).astype(np.float32)


TEXT_MODELS: dict[str, Callable[..., nn.Module]] = {
    "transformer": TransformerClassifier,
    "lstm": LSTMClassifier,
}
