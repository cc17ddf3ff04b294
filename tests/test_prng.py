import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from swagjax import prng

KEY = jax.random.key(20)
SHAPES = [(), (1,), (0,), (7,), (3, 5), (2, 0, 3), (1, 1, 4), (2**14,), (40_961,), (17, 1001)]


def same(a, b):
    """Equal bit for bit, -0.0 and 0.0 told apart."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    np.testing.assert_array_equal(*(np.ravel(x).view(np.uint8) for x in (a, b)))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


# --- normal: the numbers of jax.random.normal ---------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_numbers_of_jax(shape):
    same(prng.normal(KEY, shape, jnp.float32), jax.random.normal(KEY, shape, jnp.float32))


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, -1, 123456789])
def test_the_numbers_of_jax_at_many_keys(seed):
    keys = jax.random.split(jax.random.key(seed), 20)
    ours = jax.jit(jax.vmap(lambda k: prng.normal(k, (33,), jnp.float32)))(keys)
    same(ours, jax.vmap(lambda k: jax.random.normal(k, (33,), jnp.float32))(keys))


@pytest.mark.parametrize("data", [(0, 0), (0, 1), (1, 0), (2**32 - 1, 2**32 - 1)])
def test_the_numbers_of_jax_at_extreme_keys(data):
    # The sums of the key words overflow 32 bits here.
    key = jax.random.wrap_key_data(jnp.array(data, jnp.uint32))
    same(prng.normal(key, (1000,), jnp.float32), jax.random.normal(key, (1000,), jnp.float32))


def test_the_numbers_of_jax_in_a_large_odd_vector_under_jit():
    size = 1_000_003
    ours = jax.jit(lambda k: prng.normal(k, (size,), jnp.float32))(KEY)
    same(ours, jax.random.normal(KEY, (size,), jnp.float32))


def test_the_numbers_of_jax_for_typed_and_raw_keys():
    raw = jax.random.PRNGKey(5)
    typed = prng.typed_keys(raw)
    same(prng.normal(typed, (9,), jnp.float32), jax.random.normal(raw, (9,), jnp.float32))
    assert prng.typed_keys(typed) == typed


def test_the_numbers_of_jax_in_a_loop_and_under_nested_maps():
    keys = jax.random.split(KEY, 6)
    expected = jax.vmap(lambda k: jax.random.normal(k, (4, 3), jnp.float32))(keys)

    def draw(k):
        return prng.normal(k, (4, 3), jnp.float32)

    # The same bits; the last digit of the normal is up to how XLA fuses the arithmetic of a loop.
    np.testing.assert_array_max_ulp(jax.lax.map(draw, keys), expected, maxulp=8)
    nested = jax.vmap(jax.vmap(draw))(keys.reshape(2, 3))
    np.testing.assert_array_max_ulp(nested, expected.reshape(2, 3, 4, 3), maxulp=8)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_other_generators_are_left_to_jax(impl):
    key = jax.random.key(3, impl=impl)
    same(prng.normal(key, (50,), jnp.float32), jax.random.normal(key, (50,), jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_other_dtypes_are_left_to_jax(dtype):
    same(prng.normal(KEY, (50,), dtype), jax.random.normal(KEY, (50,), dtype))


def test_float64_is_left_to_jax():
    with jax.enable_x64(True):
        draws = prng.normal(KEY, (50,), jnp.float64)
        assert draws.dtype == jnp.float64
        same(draws, jax.random.normal(KEY, (50,), jnp.float64))
        # And float32 stays what it was.
        same(prng.normal(KEY, (50,), jnp.float32), jax.random.normal(KEY, (50,), jnp.float32))


def test_without_the_partitionable_scheme_the_numbers_are_still_those_of_jax():
    partitionable = jax.random.normal(KEY, (101,), jnp.float32)
    with jax.threefry_partitionable(False):
        old = jax.random.normal(KEY, (101,), jnp.float32)
        same(prng.normal(KEY, (101,), jnp.float32), old)
    assert not np.array_equal(old, partitionable)  # so the flag was seen


def test_other_platforms_get_the_generator_of_jax():
    draw = jax.jit(lambda k: prng.normal(k, (1 << 16,), jnp.float32))

    def calls_jax(platform):
        return "threefry2x32" in jax.export.export(draw, platforms=(platform,))(KEY).mlir_module()

    assert calls_jax("cuda")
    assert calls_jax("tpu")
    assert not calls_jax("cpu")
    both = jax.export.export(draw, platforms=("cpu", "tpu"))(KEY)
    same(both.call(KEY), jax.random.normal(KEY, (1 << 16,), jnp.float32))


# --- normal_like --------------------------------------------------------------------------------


def mixed_tree():
    """Scalars, empty leaves, leaves above and below the size of the pool, three dtypes."""
    return {
        "scalar": jnp.float32(0),
        "empty": jnp.zeros((0, 4)),
        "small": [jnp.zeros((3, 5)), jnp.zeros(701)],
        "large": (jnp.zeros((130, 130)), jnp.zeros(2**14)),
        "below": jnp.zeros(2**14 - 1),
        "half": {"small": jnp.zeros(9, jnp.bfloat16), "large": jnp.zeros(20_000, jnp.float16)},
    }


def test_shapes_and_dtypes_are_those_of_the_tree():
    tree = mixed_tree()
    draws = prng.normal_like(KEY, tree)
    assert jax.tree.structure(draws) == jax.tree.structure(tree)
    for draw, leaf in zip(jax.tree.leaves(draws), jax.tree.leaves(tree), strict=True):
        assert (draw.shape, draw.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize(
    "tree", [{}, None, jnp.zeros(0), jnp.float32(0), {"a": jnp.zeros((0,)), "b": jnp.zeros((3, 0))}]
)
def test_trees_with_little_in_them(tree):
    draws = prng.normal_like(KEY, tree)
    assert jax.tree.structure(draws) == jax.tree.structure(tree)
    assert np.all(np.isfinite(flat([*jax.tree.leaves(draws), jnp.zeros(1)])))


def test_no_two_coordinates_share_a_number():
    tree = {k: v for k, v in mixed_tree().items() if k != "half"}
    numbers = flat(prng.normal_like(KEY, tree))
    # A uniform has 23 random bits, so coincidences happen: 50 000 draws make about 150 pairs
    # (n^2 / 2^24), with deviation about 12. Two leaves of 700 that shared their numbers would add
    # 700 pairs; a false alarm would be 20 deviations.
    repeats = len(numbers) - len(np.unique(numbers))
    assert repeats < 400
    # And no run of two numbers appears twice: (n^2 / 2) 2^-46 = 2e-5 expected, at a fixed key.
    runs = np.stack([numbers[:-1], numbers[1:]])
    assert len(np.unique(runs, axis=1).T) == len(runs.T)


def test_equal_leaves_are_uncorrelated():
    # 12 small leaves from one vector, 4 large with a key each. Over 66 + 6 pairs the scaled
    # correlation is standard normal: P(|z| > 6.5) * 72 < 6e-9.
    small, large = [jnp.zeros(4001)] * 12, [jnp.zeros(20_000)] * 4
    draws = prng.normal_like(KEY, (small, large))
    for leaves in draws:
        correlations = np.corrcoef(np.stack(leaves)) * np.sqrt(leaves[0].size)
        off = correlations[np.triu_indices(len(leaves), 1)]
        assert np.abs(off).max() < 6.5


def test_leaves_are_standard_normal():
    # Kolmogorov-Smirnov at a fixed key; five tests at level 1e-7 each.
    tree = {"large": jnp.zeros(200_000), "small": [jnp.zeros(16_000), jnp.zeros((100, 100))]}
    draws = prng.normal_like(KEY, tree)
    for leaf in jax.tree.leaves(draws):
        assert scipy.stats.kstest(np.ravel(leaf).astype(np.float64), "norm").pvalue > 1e-7
    # One coordinate over many keys, of a scalar in the pool and of one in a large leaf.
    keys = jax.random.split(KEY, 5000)
    tree = {"scalar": jnp.float32(0), "large": jnp.zeros(2**14)}
    many = jax.lax.map(
        lambda k: jax.tree.map(lambda x: x.ravel()[-1], prng.normal_like(k, tree)), keys
    )
    for column in jax.tree.leaves(many):
        assert scipy.stats.kstest(np.asarray(column, np.float64), "norm").pvalue > 1e-7


def test_tails_are_those_of_a_normal():
    # 4 M draws: |z| > 4 has probability 6.33e-5, so 253 are expected, with deviation 16. The
    # bounds are six deviations away: false alarm < 2e-9.
    draws = np.asarray(prng.normal(KEY, (4_000_000,), jnp.float32))
    assert 253 - 96 < np.sum(np.abs(draws) > 4) < 253 + 96
    assert np.all(np.isfinite(draws))


def test_other_keys_give_other_numbers_and_the_same_key_the_same():
    tree = mixed_tree()
    first, again = prng.normal_like(KEY, tree), prng.normal_like(KEY, tree)
    other = prng.normal_like(jax.random.key(21), tree)
    for a, b, c in zip(*map(jax.tree.leaves, (first, again, other)), strict=True):
        same(a, b)
        assert a.size == 0 or np.mean(np.asarray(a) == np.asarray(c)) < 0.2


def test_vmap_and_jit_give_the_numbers_of_single_eager_calls():
    tree = {"a": jnp.zeros(20_000), "b": jnp.zeros((3, 2)), "c": jnp.float32(0)}
    keys = jax.random.split(KEY, 3)
    mapped = jax.jit(jax.vmap(lambda k: prng.normal_like(k, tree)))(keys)
    for i, key in enumerate(keys):
        alone = prng.normal_like(key, tree)
        jax.tree.map(lambda m, a, i=i: same(m[i], a), mapped, alone)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_normal_like_takes_every_generator(impl):
    draws = prng.normal_like(jax.random.key(0, impl=impl), {"a": jnp.zeros(30_000)})
    assert abs(np.mean(draws["a"])) < 6 / np.sqrt(30_000)  # false alarm 2e-9


def shifts(leaves):
    """Shifts in the compiled program of a sample: 20 rounds of threefry hold 20 to the left."""
    tree = [jnp.ones((3 + i % 85, 4)) for i in range(leaves)]
    sample = jax.jit(
        lambda k: jax.tree.map(lambda x, z: x + 2 * z, tree, prng.normal_like(k, tree))
    )
    return sample.lower(KEY).compile().as_text().count("shift-left(")


@pytest.mark.slow
def test_the_generator_is_compiled_once_not_once_for_every_leaf():
    few, many = shifts(3), shifts(300)
    assert few > 0  # it is unrolled, so it is counted
    assert many == few


def test_the_private_generator_is_used_on_cpu():
    program = jax.jit(lambda k: prng.normal(k, (100_000,), jnp.float32)).lower(KEY).compile()
    text = program.as_text()
    assert "while" not in text
    assert text.count("shift-left(") >= 20


# --- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [0, 1.0, None, "key", [0, 1], np.zeros(2), jnp.zeros(2, jnp.int32)])
def test_what_is_no_key_is_refused(key):
    for check in (prng.typed_keys, prng.one_key):
        with pytest.raises(ValueError, match=r"key=.*jax\.random\.key"):
            check(key)


def test_a_scalar_of_key_words_is_no_key():
    with pytest.raises(ValueError, match=r"key=.*jax\.random\.key"):
        prng.typed_keys(jnp.uint32(3))


def test_numpy_raw_keys_are_keys():
    assert prng.one_key(np.array([0, 5], np.uint32)) == jax.random.key(5)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_one_key_refuses_several(make):
    assert prng.one_key(make(0)) == jax.random.key(0)
    keys = jax.random.split(make(0), 4)
    assert prng.typed_keys(keys).shape == (4,)
    with pytest.raises(ValueError, match=r"keys of shape \(4,\).*jax\.vmap"):
        prng.one_key(keys)


def test_keys_are_checked_under_jit_and_vmap():
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    draw = jax.jit(jax.vmap(lambda k: prng.normal(prng.one_key(k), (2,), jnp.float32)))
    same(draw(keys), jax.vmap(lambda k: jax.random.normal(k, (2,), jnp.float32))(keys))
