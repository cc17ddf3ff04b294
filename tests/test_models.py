"""The networks for images: their sizes, what they compute, dropout and bfloat16."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import models

CIFAR, MNIST, DIGITS = (32, 32, 3), (28, 28, 1), (8, 8, 1)
HAND = {
    "lenet5": 25 * 3 * 6 + 6 + 25 * 6 * 16 + 16 + 401 * 120 + 121 * 84 + 85 * 10,
    "convnet": 9 * (3 * 16 + 16 * 32 + 32 * 32) + 2 * (16 + 32 + 32) + 33 * 10,
}
SMALL = {
    "lenet5": (models.LeNet5(5), MNIST),
    "convnet": (models.ConvNet(5), DIGITS),
    "preresnet8": (models.PreResNet(5, blocks=1, widths=(4, 8)), (6, 6, 2)),
    "bottleneck": (models.PreResNet(5, blocks=1, widths=(4, 8), bottleneck=True), (6, 6, 2)),
    "vit": (models.ViT(5, width=16, depth=1, heads=2), DIGITS),
}


def images(shape, n=4):
    return jax.random.normal(jax.random.key(1), (n, *shape))


def initialised(model, shape, *args):
    """Weights of the usual size, drawn by NumPy: to initialise is to compile once more."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images(shape), *args))

    def draw(path, leaf):
        normals = rng.normal(size=leaf.shape).astype(np.float32)
        kinds = {"kernel": normals / np.sqrt(leaf.size / leaf.shape[-1]), "var": 1 + 0 * normals}
        return kinds.get(path[-1].key, 0.1 * normals + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def count(name, shape, classes):
    model = models.MODELS[name](classes)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


# sizes


def vgg16(classes):
    widths = [3, 64, 64, 128, 128, 256, 256, 256, *6 * [512]]
    convolutions = sum(9 * a * b + b for a, b in itertools.pairwise(widths))
    return convolutions + 2 * (512 + 1) * 512 + (512 + 1) * classes


def residual(blocks, widths, classes, bottleneck=False):
    """All parameters, layer by layer: (kernel area, inputs, outputs), each after its BatchNorm."""
    total, now = 9 * 3 * 16, 16
    for width in widths:
        out = 4 * width if bottleneck else width
        for i in range(blocks):
            layers = [(9, now, width), (9, width, width)]
            if bottleneck:
                layers = [(1, now, width), (9, width, width), (1, width, out)]
            total += sum(area * a * b + 2 * a for area, a, b in layers)
            total += now * out if i == 0 and now != out else 0
            now = out
    return total + 2 * now + (now + 1) * classes


@pytest.mark.parametrize(
    ("name", "shape", "classes", "known", "derived"),
    [
        ("lenet5", CIFAR, 10, 62_006, HAND["lenet5"]),
        ("lenet5", MNIST, 10, 61_706, HAND["lenet5"] - 25 * 2 * 6),
        ("convnet", CIFAR, 10, 14_746, HAND["convnet"]),
        ("vgg16", CIFAR, 10, 15_245_130, vgg16(10)),
        ("vgg16", CIFAR, 100, 15_291_300, vgg16(100)),
        ("preresnet20", CIFAR, 10, 272_282, residual(3, (16, 32, 64), 10)),
        ("preresnet56", CIFAR, 100, 861_428, residual(9, (16, 32, 64), 100)),
        pytest.param(
            *("preresnet110", CIFAR, 10, 1_730_522, residual(18, (16, 32, 64), 10)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("preresnet164", CIFAR, 10, 1_703_258, residual(18, (16, 32, 64), 10, True)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("preresnet164", CIFAR, 100, 1_726_388, residual(18, (16, 32, 64), 100, True)),
            marks=pytest.mark.slow,
        ),
        ("wrn28x10", CIFAR, 10, 36_479_194, residual(4, (160, 320, 640), 10)),
    ],
)
def test_parameters_are_as_many_as_known_and_as_derived_by_hand(
    name, shape, classes, known, derived
):
    assert count(name, shape, classes) == known == derived


def test_patches_of_the_transformer_are_an_eighth_of_the_image():
    # Patches, positions, 6 layers of attention and two dense ones with their norms, norm, logits.
    layer = 4 * (128 * 128 + 128) + 128 * 512 + 512 + 512 * 128 + 128 + 2 * 256
    rest = 6 * layer + 256 + 129 * 10
    for shape, patch, tokens in [(CIFAR, 4, 64), (MNIST, 4, 49), (DIGITS, 2, 16)]:
        expected = patch * patch * shape[-1] * 128 + 128 + tokens * 128 + rest
        assert count("vit", shape, 10) == expected


@pytest.mark.parametrize("name", sorted(models.MODELS.keys() - {"preresnet110", "preresnet164"}))
@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_all_map_images_to_float32_logits_and_hold_float32(name, dtype):
    model, x = models.MODELS[name](7, dropout=0.1, dtype=dtype), jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.eval_shape(model.apply, variables, x)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


@pytest.mark.parametrize("name", ["vgg16", "vit", "preresnet20"])
def test_images_of_digits_are_large_enough(name):
    model = models.MODELS[name](5)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, *DIGITS)))
    assert logits.shape == (2, 5)


# what they compute


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "preresnet20"])
def test_convolutions_begin_with_two_over_fan_out_as_variance(name):
    """Within six standard errors; false alarms: about 20 layers, each with probability 2e-9."""
    params = jax.jit(models.MODELS[name](10).init)(jax.random.key(0), images(CIFAR))["params"]
    kernels = [x for x in jax.tree.leaves(params) if x.ndim == 4]
    assert len(kernels) == {"vgg16": 13, "preresnet20": 21}[name]
    for kernel in kernels:
        height, width, _, out = kernel.shape
        variance = (np.asarray(kernel, np.float64) ** 2).mean()
        assert abs(variance * height * width * out / 2 - 1) < 6 * np.sqrt(2 / kernel.size)


@pytest.mark.slow
@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_residual_block_with_a_silent_last_layer_passes_its_input_on(bottleneck):
    width, last = (4, "Conv_2") if bottleneck else (16, "Conv_1")
    block, x = models.Residual(width, 1, bottleneck, jnp.float32), images((4, 4, 16))
    variables = initialised(block, (4, 4, 16), False)
    assert len(variables["params"]) == (6 if bottleneck else 4)  # nothing projects the input
    apply = jax.jit(lambda v: block.apply(v, x, False))
    assert np.abs(apply(variables) - x).max() > 0.1
    variables["params"][last]["kernel"] *= 0
    np.testing.assert_array_equal(apply(variables), x)


def test_a_residual_block_is_what_he_et_al_draw():
    """BatchNorm, relu, convolution, twice; added to a strided projection of the input itself."""
    block, x = models.Residual(3, 2, False, jnp.float32), images((6, 6, 2))
    variables = initialised(block, (6, 6, 2), True)
    kernels = [variables["params"][f"Conv_{i}"]["kernel"] for i in range(3)]
    norms = [variables["params"][f"BatchNorm_{i}"] for i in range(2)]
    y = _convolved(np.maximum(_normed(x, norms[0]), 0), kernels[0], 2)
    y = _convolved(np.maximum(_normed(y, norms[1]), 0), kernels[1], 1)
    expected = y + _convolved(np.asarray(x, np.float64), kernels[2], 2)
    got, _ = jax.jit(lambda v: block.apply(v, x, True, mutable=["batch_stats"]))(variables)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def _normed(x, params):
    x = np.asarray(x, np.float64)
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    return x * params["scale"] + params["bias"]


def _convolved(x, kernel, stride):
    """A sum over the kernel's pixels, zeros around; XLA pads 6 -> 3 by (0, 1) for 3 x 3 pixels."""
    kernel, (n, side) = np.asarray(kernel, np.float64), x.shape[:2]
    size, out = len(kernel), side // stride
    padding = max((out - 1) * stride + size - side, 0)
    before = padding // 2
    padded = np.pad(x, ((0, 0), (before, padding - before), (before, padding - before), (0, 0)))
    y = np.zeros((n, out, out, kernel.shape[-1]))
    for i, j in itertools.product(range(size), repeat=2):
        y += padded[:, i:, j:][:, : out * stride : stride, : out * stride : stride] @ kernel[i, j]
    return y


@pytest.mark.slow
def test_the_transformer_knows_where_patches_are_by_their_positions_alone():
    model, shape = SMALL["vit"]
    variables, x = initialised(model, shape), images(shape)
    exchanged = jnp.concatenate([x[:, 4:], x[:, :4]], 1)  # the upper two rows of patches go below
    apply = jax.jit(model.apply)
    kept = [apply(variables, y) for y in (x, exchanged)]
    # Anew, not in place: JAX may still read the array.
    variables["params"]["positions"] = np.zeros_like(variables["params"]["positions"])
    lost = [apply(variables, y) for y in (x, exchanged)]
    np.testing.assert_allclose(*lost, atol=1e-5)
    assert np.abs(kept[0] - kept[1]).max() > 1e-4


def test_training_moves_the_statistics_a_tenth_of_the_way_to_those_of_the_batch():
    model = models.ConvNet(5, widths=(3,))
    variables, x = initialised(model, DIGITS), 2 * images(DIGITS) + 3
    _, changed = jax.jit(lambda v: model.apply(v, x, True, mutable=["batch_stats"]))(variables)
    y = _convolved(np.asarray(x, np.float64), variables["params"]["Conv_0"]["kernel"], 1)
    old, new = (v["batch_stats"]["BatchNorm_0"] for v in (variables, changed))
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * y.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * y.var((0, 1, 2)), rtol=1e-3)


# dropout and bfloat16


@pytest.mark.parametrize(
    "name", ["lenet5", *(pytest.param(n, marks=pytest.mark.slow) for n in SMALL if n != "lenet5")]
)
def test_dropout_acts_where_a_key_is_given_and_nowhere_else(name):
    model, shape = SMALL[name]
    variables, x = initialised(model, shape), images(shape)
    dropping = model.clone(dropout=0.5)
    fresh, silent, first, second = jax.jit(
        lambda v, x: (
            model.apply(v, x),
            dropping.apply(v, x, train=False),
            *(dropping.apply(v, x, rngs={"dropout": jax.random.key(i)}) for i in range(2)),
        )
    )(variables, x)
    np.testing.assert_allclose(silent, fresh, rtol=1e-6)
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first - silent).max() > 1e-3


@pytest.mark.slow
def test_dropout_leaves_the_mean_of_what_it_acts_on():
    """ConvNet is linear behind it: the mean over 4,000 keys is within six standard errors.

    False alarms: 20 logits, each with probability 2e-9.
    """
    model = models.ConvNet(5, widths=(8,), dropout=0.3)
    variables, x = initialised(model, DIGITS), images(DIGITS)
    keys = jax.random.split(jax.random.key(3), 4000)
    drawn = jax.jit(
        lambda v, x: jax.lax.map(
            lambda key: model.apply(v, x, rngs={"dropout": key}), keys, batch_size=100
        )
    )(variables, x)
    error = np.std(drawn, 0) / np.sqrt(len(keys))
    assert np.all(np.abs(np.mean(drawn, 0) - model.apply(variables, x)) < 6 * error)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "lenet5" else [pytest.mark.slow]) for name in SMALL],
)
def test_logits_are_finite_and_bfloat16_ones_near_float32_in_value_and_in_type(name):
    model, shape = SMALL[name]
    variables, x = initialised(model, shape), images(shape)

    @jax.jit
    def both(v, x):
        def apply(m):
            return m.apply(v, x, train=True, mutable=["batch_stats"])

        return apply(model), apply(model.clone(dtype=jnp.bfloat16))

    (exact, _), (rounded, changed) = both(variables, x)
    assert {leaf.dtype for leaf in jax.tree.leaves((rounded, changed))} == {jnp.dtype("float32")}
    assert np.isfinite(exact).all()
    assert np.std(exact, 0).min() > 1e-3  # between images
    distance = np.abs(exact - rounded).max() / np.std(exact)
    assert 1e-5 < distance < 0.1
