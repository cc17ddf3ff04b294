"""Idioms of flax's own examples, written anew and small: each runs with the library unchanged."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import swagjax
from swagjax import batch_stats

KEY = jax.random.key(0)
KEYS = jax.random.split(jax.random.key(1), 3)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(1, 1, (12, 4, 4, 1)).astype(np.float32)
LABELS = np.arange(12) % 3
TOKENS = RNG.integers(0, 11, (4, 6))


def gaussian_around(params):
    """A state of three iterates near ``params``."""
    tx = swagjax.swag(2)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(3):
        noise = jax.tree.map(lambda p, i=i: 0.1 * jnp.cos(7 * p + i).astype(p.dtype), params)
        _, state = update(noise, state, params)
    return state


def averaged(state, function):
    """The average over samples by the plain loop that ``predict`` replaces."""
    function = jax.jit(function)
    return np.mean([np.float64(function(swagjax.sample(key, state))) for key in KEYS], 0)


# --- mnist: nnx, BatchNorm, dropout that is handed its streams in the call --------------------


class MNIST(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.1)
        self.linear = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x, rngs: nnx.Rngs | None = None):
        x = nnx.relu(self.norm(self.dropout(self.conv(x), rngs=rngs)))
        return self.linear(x.reshape(len(x), -1))


@pytest.mark.slow
def test_mnist_model_trained_by_an_nnx_optimizer():
    """``__call__(self, x, rngs)``: neither BatchNorm's refresh nor prediction needs a change."""
    model = MNIST(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), swagjax.swag(2)), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, rngs):
        def loss_fn(model, rngs):
            logits = model(IMAGES, rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

        optimizer.update(model, nnx.grad(loss_fn)(model, rngs))

    model.train()
    rngs = nnx.Rngs(1)
    for _ in range(3):
        train_step(model, optimizer, rngs)
    state = swagjax.get_state(optimizer.opt_state)

    refresh = batch_stats.nnx(model, IMAGES, batch_size=6, rngs=nnx.Rngs(2))
    model.eval()
    graphdef, _, _, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)

    def prob_fn(params, x, stats):
        return nnx.softmax(nnx.merge(graphdef, params, stats, rest, copy=True)(x))

    probs = swagjax.predict(KEYS, state, prob_fn, IMAGES, refresh=refresh)
    wanted = averaged(state, lambda params: prob_fn(params, IMAGES, refresh(params)))
    np.testing.assert_allclose(probs, wanted, rtol=1e-3, atol=1e-5)


# --- imagenet: a linen ResNet with a list for its stages and BatchNorm over devices -----------


class Block(nn.Module):
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        return nn.relu(x + self.norm()(self.conv(2, (3, 3))(x)))


class ResNet(nn.Module):
    stage_sizes: Sequence[int]
    options: dict[str, Any]

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, **self.options
        )
        x = conv(2, (3, 3), name="conv_init")(x)
        for size in self.stage_sizes:
            for _ in range(size):
                x = Block(conv, norm)(x)
        return nn.softmax(nn.Dense(3)(x.mean((1, 2))))


@pytest.mark.slow
def test_imagenet_resnet_with_a_list_a_dict_and_an_axis_name():
    """Was refused in ``predict``, as a list has no hash, and a NameError without the axis."""
    options = {"axis_name": "batch", "epsilon": 1e-5}
    model = ResNet([1, 1], options)
    variables = model.init(KEY, IMAGES, train=False)
    state = gaussian_around(variables["params"])
    refresh = batch_stats.linen(model, variables["batch_stats"], IMAGES, batch_size=6, train=True)

    def prob_fn(params, x, stats):
        return model.apply({"params": params, "batch_stats": stats}, x, train=False)

    probs = swagjax.predict(KEYS, state, prob_fn, IMAGES, refresh=refresh)
    # The same statistics by the model's own averages at momentum 0, over the whole axis at once.
    plain = ResNet([1, 1], {"epsilon": 1e-5})

    def wanted(params):
        halves = [
            batch_stats.linen(plain, variables["batch_stats"], x, train=True)(params)
            for x in (IMAGES[:6], IMAGES[6:])
        ]
        stats = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
        return plain.apply({"params": params, "batch_stats": stats}, IMAGES, train=False)

    np.testing.assert_allclose(probs, averaged(state, wanted), rtol=1e-3, atol=1e-5)


# --- nnx toys: variables that are written when the model is called ----------------------------


class Count(nnx.Variable):
    """A kind of variable of the user's own."""


class Toy(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.count = Count(jnp.array(0))
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        self.count[...] += 1
        return nnx.softmax(self.dropout(self.norm(self.linear(x))))


@pytest.mark.parametrize("masks", [False, True])
def test_nnx_model_that_writes_variables_when_called(masks):
    """A counter, and with dropout at work the count of its stream: a TraceContextError once."""
    model, x = Toy(nnx.Rngs(0)), IMAGES[:, :, 0, 0]
    refresh = batch_stats.nnx(model, x, batch_size=6)
    model = nnx.view(model, use_running_average=True, deterministic=not masks)
    graphdef, params, _, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    state = gaussian_around(params)

    def prob_fn(params, x, stats):
        return nnx.merge(graphdef, params, stats, rest, copy=True)(x)

    probs = swagjax.predict(KEYS, state, prob_fn, x, refresh=refresh, chunk_size=2)
    wanted = averaged(state, lambda params: prob_fn(params, x, refresh(params)))
    np.testing.assert_allclose(probs, wanted, rtol=1e-3, atol=1e-5)
    assert model.count[...] == 0


# --- lm1b: a linen transformer, dropout in its layers, next-token probabilities ---------------


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens, train: bool):
        x = nn.Embed(11, 8)(tokens)
        mask = nn.make_causal_mask(tokens)
        x += nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=not train)(
            nn.LayerNorm()(x), mask=mask
        )
        return nn.softmax(nn.Dense(11)(nn.Dropout(0.1, deterministic=not train)(x)))


@pytest.mark.slow
def test_lm1b_transformer_with_dropout_at_work_in_every_sample():
    """MC dropout over samples of the weights: a sample is a pair of weights and a key."""
    model = LanguageModel()
    state = gaussian_around(model.init(KEY, TOKENS, train=False)["params"])

    def draw(key):
        first, second = jax.random.split(key)
        return swagjax.sample(first, state), second

    def prob_fn(sample, tokens):
        params, key = sample
        return model.apply({"params": params}, tokens, train=True, rngs={"dropout": key})

    probs = swagjax.predict(KEYS, draw, prob_fn, TOKENS, chunk_size=2)
    run = jax.jit(lambda key: prob_fn(draw(key), TOKENS))
    np.testing.assert_allclose(probs, np.mean([run(key) for key in KEYS], 0), rtol=1e-4)
    assert np.abs(run(KEYS[0]) - run(KEYS[1])).max() > 1e-3


# --- gemma: bfloat16, layers stacked and run in a scan, nnx -----------------------------------


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.zeros(4, jnp.bfloat16))
        self.linear = nnx.Linear(4, 4, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        normed = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + self.scale[...])
        return x + self.linear(normed)


class Gemma(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 4, param_dtype=jnp.bfloat16, rngs=rngs)
        self.layers = nnx.vmap(Layer)(rngs.split(3))

    def __call__(self, tokens):
        x = self.embed(tokens).astype(jnp.bfloat16)
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return nnx.softmax(self.embed.attend(run(x, self.layers)).astype(jnp.float32))


@pytest.mark.slow
def test_gemma_in_bfloat16_with_layers_in_a_scan():
    """Float32 samples would change the dtype of the scan's carry: ``like`` casts them."""
    model = Gemma(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    state = gaussian_around(params)
    posterior = jax.tree_util.Partial(swagjax.sample, state=state, like=params)

    def prob_fn(params, tokens):
        return nnx.merge(graphdef, params, rest, copy=True)(tokens)

    probs = swagjax.predict(KEYS, posterior, prob_fn, TOKENS)
    run = jax.jit(lambda key: prob_fn(posterior(key), TOKENS))
    np.testing.assert_allclose(probs, np.mean([run(key) for key in KEYS], 0), rtol=0.05, atol=0.02)
    assert probs.dtype == jnp.float32
