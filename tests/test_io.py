import functools
import json
import math
import os
import pathlib
import pickle
import stat
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError

import swagjax
from swagjax import io
from tests import oracle

RANK = 3
METHODS = {
    "swa": swagjax.swa,
    "swag_diag": swagjax.swag_diag,
    "swag": functools.partial(swagjax.swag, RANK),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Pair(NamedTuple):
    left: object
    right: object


@pytest.fixture
def path(tmp_path):
    return tmp_path / "posterior.safetensors"


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def numbers(shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def model():
    """Leaves with axes, with none, and with nothing in them, in several containers."""
    pair = Pair(numbers((2,), 1), [numbers((), 2)])
    return {"dense": {"kernel": numbers((2, 3)), "empty": jnp.zeros((0, 2))}, "pair": pair}


def run(tx, params, count=5, spoil=None):
    """Collect ``count`` iterates that differ in every coordinate; one of them not finite."""
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(count):
        factor = np.nan if t == spoil else np.cos(t)
        updates = jax.tree.map(lambda p, f=factor: (p * f + f).astype(p.dtype), params)
        _, state = update(updates, state, params)
    return swagjax.get_state(state)


def collected(opt_state, seed=0):
    """A state with random arrays and counters, as after seven steps, without the cost of them."""
    state, rng = swagjax.get_state(opt_state), np.random.default_rng(seed)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state)
    step, count, skipped = (jnp.int32(n) for n in (7, 5, 1))
    return state._replace(num_updates=step, num_collected=count, num_skipped=skipped)


def assert_same(a, b):
    """The same trees of jax arrays, bit for bit (NaN and signed zeros as well)."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, jax.Array)
        assert isinstance(y, jax.Array)
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- Files made and read by hand: no code in common with safetensors ----------------------------


def parse(data):
    """Header and body of a file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def build(header, body, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def values(data, name):
    header, body = parse(data)
    start, stop = header[name]["data_offsets"]
    dtype = {"F32": "<f4", "I32": "<i4"}[header[name]["dtype"]]
    return np.frombuffer(body[start:stop], dtype).reshape(header[name]["shape"])


def put(data, name, value):
    """The file with other bytes in place of a tensor."""
    header, body = parse(data)
    start, stop = header[name]["data_offsets"]
    value = np.asarray(value).tobytes()
    assert len(value) == stop - start
    return build(header, body[:start] + value + body[stop:])


# --- Round trips --------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("count", [0, 2, 7])
def test_state_comes_back_bit_for_bit(path, method, count):
    state = run(method(), model(), count, spoil=1)
    assert (int(state.num_updates), int(state.num_skipped)) == (count, int(count > 1))
    io.save(path, state)
    assert_same(io.load(path, model()), state)


@pytest.mark.parametrize("wide", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("narrow", ["float16", "bfloat16", "float32", "float64"])
def test_every_dtype_and_every_value_comes_back(x64, path, wide, narrow):
    params = {"w": jnp.ones(4, jnp.float16)}
    state = swagjax.swag(2, accumulator_dtype=wide, deviation_dtype=narrow).init(params)
    special = jnp.array([np.nan, -0.0, np.inf, 1e-7])
    state = jax.tree.map(lambda x: x + special.astype(x.dtype) if x.ndim else x, state)
    assert (state.mean["w"].dtype, state.deviations["w"].dtype) == (wide, narrow)
    io.save(path, state)
    assert_same(io.load(path, params), state)


def test_file_holds_what_the_docstring_says(path):
    state = collected(METHODS["swag"]().init(model()))
    io.save(path, state)
    data = path.read_bytes()
    assert (values(data, "step"), values(data, "count"), values(data, "skipped")) == (7, 5, 1)
    for field in ("mean", "variance", "deviations"):
        tree = getattr(state, field)
        np.testing.assert_array_equal(
            values(data, f"{field}/dense/kernel"), tree["dense"]["kernel"]
        )
        np.testing.assert_array_equal(values(data, f"{field}/pair/right/0"), tree["pair"].right[0])
    assert len(parse(data)[0]) == 1 + 3 + 3 * 4


def test_loaded_state_samples_and_collects_as_if_never_saved(path):
    tx, params = METHODS["swag"](), model()
    state = run(tx, params, 4)
    io.save(path, state)
    loaded = io.load(path, jax.eval_shape(lambda: params))
    key = jax.random.key(0)
    assert_same(swagjax.sample(key, loaded), swagjax.sample(key, state))
    assert_same(io.load(path, params), loaded)
    update = jax.jit(tx.update)
    wanted = update(params, state, params)
    assert_same(jax.jit(tx.update, donate_argnums=1)(params, loaded, params), wanted)


@pytest.mark.parametrize("params", [numbers((3,)), (), {"": numbers(3)}, [numbers((2, 0))], {}])
def test_unusual_trees(path, params):
    for method in METHODS.values():
        state = collected(method().init(params))
        io.save(path, state)
        assert_same(io.load(path, params), state)


def test_stacked_members(path):
    tx, params = METHODS["swag"](), numbers((4, 2))
    axes = swagjax.member_axes(jax.eval_shape(tx.init, params[0]))
    state = jax.vmap(tx.init, out_axes=axes)(params)
    update = jax.vmap(tx.update, (0, axes, 0), (0, axes))
    for _ in range(2):
        _, state = update(params.at[2].set(jnp.nan), state, params)
    assert state.deviations.shape == (4, RANK, 2)
    np.testing.assert_array_equal(state.num_collected, [2, 2, 0, 2])
    io.save(path, state)
    assert_same(io.load(path, params), state)
    with pytest.raises(ValueError, match=r"posterior.safetensors"):
        io.load(path, params[0])
    with pytest.raises(ValueError, match=r"members, count \[4\]"):
        io.load(path, params[:3])


def test_whole_optimizer_state_will_do(path):
    tx = optax.chain(optax.adam(0.1), swagjax.swag_diag())
    opt_state = tx.init(model())
    io.save(str(path), opt_state)
    assert_same(io.load(str(path), model()), swagjax.get_state(opt_state))


def test_sharded_arrays_are_gathered(path):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    plain = {"w": numbers((8, 2))}
    sharded = jax.device_put(plain, NamedSharding(mesh, P("d")))
    state = swagjax.swag(RANK).init(sharded)
    state = state._replace(mean=jax.tree.map(jnp.add, state.mean, sharded))
    assert len(state.deviations["w"].sharding.device_set) == 8
    io.save(path, state)
    assert_same(io.load(path, plain), jax.device_put(state, jax.devices()[0]))


def test_arrays_with_parts_on_other_hosts_are_refused(path):
    class Remote:
        is_fully_addressable = is_fully_replicated = False

    state = swagjax.swa().init(jnp.zeros(2))._replace(mean=Remote())
    with pytest.raises(ValueError, match=r"mean has parts on other hosts.*process_allgather"):
        io.save(path, state)
    assert not path.exists()


def test_numpy_leaves_of_any_memory_layout(path):
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    for leaf in (np.asfortranarray(matrix), matrix[::-1, ::-1], matrix[:, :1].repeat(3, 1)):
        state = swagjax.swa().init(jnp.zeros((2, 3)))._replace(mean=leaf)
        io.save(path, state)
        np.testing.assert_array_equal(io.load(path, matrix).mean, leaf)


# --- Containers ---------------------------------------------------------------------------------


def only_kernels(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def test_holes_of_masked_are_filled_by_full_parameters_or_by_masked_ones(path):
    params = model()
    state = collected(optax.masked(METHODS["swag"](), only_kernels).init(params))
    assert isinstance(state.mean["pair"].left, optax.MaskedNode)
    io.save(path, state)
    assert_same(io.load(path, params), state)
    assert_same(io.load(path, state.mean), state)
    left_out = params["pair"]._replace(left=None)  # a hole of like stays what it is
    assert io.load(path, {**params, "pair": left_out}).mean["pair"].left is None


def test_a_hole_may_stand_for_a_subtree_and_for_leaves_that_are_no_arrays(path):
    params = {"w": numbers(3), "frozen": {"a": numbers(2), "b": numbers(2)}, "f": jnp.tanh}
    held = {"w": params["w"], "frozen": optax.MaskedNode(), "f": None}
    state = collected(METHODS["swag"]().init(held))
    io.save(path, state)
    assert_same(io.load(path, params), state)


def test_partition_of_equinox(path):
    class Layer(eqx.Module):
        weight: jax.Array
        activation: object

    net = [Layer(numbers((2, 3)), jnp.tanh), Layer(numbers((3, 1)), None)]
    params = eqx.filter(net, eqx.is_inexact_array)
    state = collected(METHODS["swag"]().init(params))
    io.save(path, state)
    assert_same(io.load(path, params), state)
    assert_same(io.load(path, net), state)  # the functions in it are not parameters


def test_nnx(path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            zeros = nnx.initializers.zeros
            self.layers = nnx.List([nnx.Linear(2, 3, kernel_init=zeros, rngs=rngs)])
            self.norm = nnx.BatchNorm(3, rngs=rngs)

    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.chain(optax.sgd(0.1), swagjax.swag(2)), wrt=nnx.Param)
    state, params = collected(optimizer), nnx.state(net, nnx.Param)
    io.save(path, state)
    assert "deviations/layers/0/kernel" in parse(path.read_bytes())[0]
    assert_same(io.load(path, params), state)
    assert_same(io.load(path, jax.eval_shape(lambda: params)), state)
    assert_same(io.load(path, state.mean), state)


def test_boxes_of_linen_are_kept_and_do_not_name_the_leaves(path):
    boxed = {"kernel": linen.Partitioned(numbers((2, 4)), ("rows", None)), "bias": numbers(4)}
    plain = linen.meta.unbox(boxed)
    state = collected(METHODS["swag"]().init(boxed))
    io.save(path, state)
    loaded = io.load(path, boxed)
    assert_same(loaded, state)
    assert loaded.deviations["kernel"].names == (None, "rows", None)
    assert_same(io.load(path, plain), collected(METHODS["swag"]().init(plain)))


# --- Metadata -----------------------------------------------------------------------------------


def test_metadata(path):
    state = swagjax.swa().init({"w": jnp.zeros(2), "hole": None})
    text = {"model": "LeNet5", "umlaut ü": "line\nbreak \x00", "": ""}
    io.save(path, state, metadata=text)
    assert io.read_metadata(path) == text
    io.save(path, state)
    assert io.read_metadata(path) == {}


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"swagjax.format": "2"}])
def test_metadata_that_is_not_ours_to_keep(path, metadata):
    with pytest.raises(ValueError, match=r"metadata\["):
        io.save(path, swagjax.swa().init(jnp.zeros(2)), metadata=metadata)
    assert not path.exists()


# --- Writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [SafetensorError, OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch, failure):
    old = swagjax.swa().init(jnp.zeros(2))
    io.save(path, old)

    def half(tensors, file, metadata):
        file.write_bytes(b"half")
        raise failure("disk full")

    monkeypatch.setattr(io, "save_file", half)
    expected = OSError if failure is SafetensorError else failure
    with pytest.raises(expected):
        io.save(path, old._replace(num_updates=jnp.int32(9)))
    assert_same(io.load(path, jnp.zeros(2)), old)
    assert list(path.parent.iterdir()) == [path]


def test_file_appears_complete_or_not_at_all(path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.exists()))
    io.save(path, swagjax.swa().init(jnp.zeros(2)))
    assert seen == [False]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="a file that is open cannot be replaced elsewhere")
def test_who_reads_the_old_file_goes_on_reading_it(path):
    state = swagjax.swa().init(jnp.zeros(2))
    io.save(path, state, metadata={"a": "old"})
    old = path.read_bytes()
    with path.open("rb") as file:
        io.save(path, state, metadata={"a": "new"})
        assert file.read() == old
    assert io.read_metadata(path) == {"a": "new"}


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_file_has_the_mode_of_any_new_file_or_of_the_one_it_replaces(path):
    state = swagjax.swa().init(jnp.zeros(2))
    other = path.with_name("other")
    other.touch()
    io.save(path, state)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    path.chmod(0o640)
    io.save(path, state)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path, monkeypatch, exists):
    """It was the link that was replaced, by a file of its own; the target kept the old state."""
    state = swagjax.swa().init(jnp.zeros(2))
    (tmp_path / "runs").mkdir()
    target, link = tmp_path / "runs" / "7", tmp_path / "latest"
    link.symlink_to("runs/7")
    if exists:
        io.save(target, state, metadata={"a": "old"})
    monkeypatch.chdir(tmp_path)
    io.save("latest", state, metadata={"a": "new"})
    assert link.readlink() == pathlib.Path("runs/7")
    assert not target.is_symlink()
    assert io.read_metadata(target) == io.read_metadata(link) == {"a": "new"}
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["7", "latest", "runs"]


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_what_is_no_file_is_not_replaced(path):
    """A pipe, or as root /dev/null, was replaced by the file."""
    os.mkfifo(path)
    for each in (path, path.parent):
        with pytest.raises(OSError, match="cannot be replaced by a file"):
            io.save(each, swagjax.swa().init(jnp.zeros(2)))
    assert path.is_fifo()
    assert list(path.parent.iterdir()) == [path]


def test_missing_folder_and_missing_file_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        io.save(tmp_path / "none" / "x", swagjax.swa().init(jnp.zeros(2)))
    for read in (io.read_metadata, lambda path: io.load(path, jnp.zeros(2))):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")


def test_leaves_with_one_name_are_refused(path):
    params = {"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}}
    with pytest.raises(ValueError, match="several leaves have the path 'a/b'"):
        io.save(path, swagjax.swa().init(params))
    assert not path.exists()


def test_states_that_load_would_refuse_are_not_saved(path):
    state = swagjax.swag(2).init({"a": jnp.zeros(2), "b": jnp.zeros(3)})
    other = jax.tree.map(jnp.zeros_like, {"a": jnp.zeros((2, 2)), "b": jnp.zeros((3, 3))})
    bad = {
        "do not go with": state._replace(num_collected=jnp.int32(1)),
        "count=-1": state._replace(num_collected=jnp.int32(-1)),
        "'count' is F32": state._replace(num_collected=jnp.float32(0)),
        r"'deviations/b' is F32 of shape \[3, 3\]": state._replace(deviations=other),
        "rings of 1 rows": state._replace(deviations=jax.tree.map(lambda x: x[:1], other)),
        "'variance/a' is F32": state._replace(variance=other),
        "missing 'variance/b'": state._replace(variance={"a": jnp.zeros(2)}),
        "unknown 'variance/c'": state._replace(variance={**state.variance, "c": jnp.zeros(1)}),
        "mean/a has dtype int8": state._replace(mean={**state.mean, "a": jnp.zeros(2, jnp.int8)}),
        "opt_state holds no SWAGState": {"w": jnp.zeros(2)},
    }
    for message, each in bad.items():
        with pytest.raises(ValueError, match=message):
            io.save(path, each)
    assert not path.exists()


# --- Files that are not to be trusted -----------------------------------------------------------

SMALL = {"w": jnp.ones((2, 2)), "z": jnp.zeros((0,)), "m": jnp.ones(3)}


@functools.cache
def sound():
    """The bytes of a file of a state with a hole, and the structure of that state."""
    held = {**SMALL, "m": optax.MaskedNode()}
    state = run(METHODS["swag"](), held)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "sound"
        io.save(path, state, metadata={"a": "b"})
        return path.read_bytes(), jax.tree.map(lambda x: (x.shape, x.dtype), state)


def refused(path, data, match="", like=None):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match) as caught:
        io.load(path, SMALL if like is None else like)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_truncations_are_refused(path):
    data, _ = sound()
    for length in (*range(20), *range(20, len(data) - 100, 23), *range(len(data) - 100, len(data))):
        refused(path, data[:length], "is damaged or no safetensors file")
        with pytest.raises(ValueError, match="is damaged or no safetensors file"):
            io.read_metadata(path)


def header(**changes):
    """The sound file with changes to its header; None removes a key."""
    head, body = parse(sound()[0])
    head = {k: v for k, v in {**head, **changes}.items() if v is not None}
    return build(head, body)


def spec(name, **changes):
    return header(**{name: parse(sound()[0])[0][name] | changes})


def own(**changes):
    """The sound file with changes to our metadata."""
    changes = {f"swagjax.{k}": v for k, v in changes.items()}
    metadata = parse(sound()[0])[0]["__metadata__"] | changes
    return header(__metadata__={k: v for k, v in metadata.items() if v is not None})


NO_FILE = "is damaged or no safetensors file"
EXTRA = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
HOSTILE = {
    "empty": (lambda: b"", NO_FILE),
    "noise": (lambda: np.random.default_rng(0).bytes(5000), NO_FILE),
    "pickle": (lambda: pickle.dumps(SMALL | {"x": 1}), NO_FILE),
    "zip of torch": (lambda: b"PK\x03\x04" + bytes(5000), NO_FILE),
    "trailing bytes": (lambda: sound()[0] + b"x", NO_FILE),
    "length of 2^63": (lambda: build(b"{}", b"", 2**63), NO_FILE),
    "length of 2^40": (lambda: build(b"{}", b"", 2**40), NO_FILE),
    "no JSON": (lambda: build(b"{" * 100, b""), NO_FILE),
    "deep JSON": (lambda: build(b"[" * 100_000, b""), NO_FILE),
    "no text": (lambda: build(b'{"\xff": 1}', b""), NO_FILE),
    "a list": (lambda: build(b"[]", b""), NO_FILE),
    "overlap": (lambda: spec("mean/w", data_offsets=[0, 16]), NO_FILE),
    "beyond the end": (lambda: spec("mean/w", data_offsets=[10_000, 10_016]), NO_FILE),
    "backwards": (lambda: spec("mean/w", data_offsets=[16, 0]), NO_FILE),
    "negative shape": (lambda: spec("mean/w", shape=[-2, -2]), NO_FILE),
    "product overflows": (lambda: spec("mean/w", shape=[2**62, 2**62]), NO_FILE),
    "no such dtype": (lambda: spec("mean/w", dtype="O"), NO_FILE),
    "metadata no text": (lambda: header(__metadata__={"a": 1}), NO_FILE),
    "no metadata": (lambda: header(__metadata__=None), "format None.*not by swagjax.io.save"),
    "another format": (lambda: own(format="2"), "format '2'.*reads '1'"),
    "long format": (lambda: own(format="2" * 5000), "format '2222"),
    "no fields": (lambda: own(fields=None), "not none"),
    "no mean": (lambda: own(fields="variance deviations"), "fields"),
    "other fields": (lambda: own(fields="mean variance ring"), "'ring'"),
    "twice a field": (lambda: own(fields="mean mean"), "fields"),
    "fewer fields": (lambda: own(fields="mean variance"), "unknown 'deviations/w'"),
    "another hole": (lambda: own(**{"hole/m": "Nothing"}), "'Nothing'"),
    "hole elsewhere": (lambda: own(**{"hole/x": "None"}), "holes at 'x'"),
    "hole at a leaf": (lambda: own(**{"hole/w": "None"}), "unknown 'deviations/w'"),
    "no hole": (lambda: own(**{"hole/m": None}), "missing 'deviations/m'"),
    "extra": (lambda: header(x=EXTRA), "unknown 'x'"),
    "many extras": (lambda: header(**{f"x{i}": EXTRA for i in range(999)}), "and 996 more"),
    "extra of a long name": (lambda: header(**{"x" * 10_000: EXTRA}), "unknown 'xxx"),
    "missing": (lambda: header(**{"mean/z": None}), "missing 'mean/z'"),
    "no counter": (lambda: header(step=EXTRA, x=parse(sound()[0])[0]["step"]), "unknown 'x'"),
    "integers": (lambda: spec("mean/w", dtype="I32"), "'mean/w' is I32.*has to be F16 or"),
    "complex": (lambda: spec("mean/w", dtype="C64", shape=[2]), "'mean/w' is C64"),
    "float8": (lambda: spec("mean/w", dtype="F8_E4M3", shape=[16]), "'mean/w' is F8_E4M3"),
    "counter of floats": (lambda: spec("count", dtype="F32"), "'count' is F32.*has to be I32"),
    "transposed": (lambda: spec("mean/w", shape=[4]), r"'mean/w' is F32 of shape \[4\]"),
    "one more axis": (lambda: spec("variance/w", shape=[2, 2, 1]), "'variance/w' is F32"),
    "ring without rank": (lambda: spec("deviations/w", shape=[12]), "deviations/w"),
    "ring 0-d": (lambda: spec("deviations/z", shape=[]), NO_FILE),
    "another rank": (lambda: spec("deviations/z", shape=[4, 0]), "deviations/"),
    "huge empty ring": (lambda: spec("deviations/z", shape=[2**60, 0]), "deviations/"),
    "huge empty leaf": (lambda: spec("mean/z", shape=[0, 2**60]), "'mean/z'"),
    "members": (lambda: spec("count", shape=[1]), "'skipped' is I32"),
    "huge dims of a counter": (lambda: spec("count", shape=[1] * 70), "posterior"),
    "count > step": (lambda: put(sound()[0], "count", np.int32(6)), "count=6.*step=5"),
    "count + skipped > step": (lambda: put(sound()[0], "skipped", np.int32(1)), "skipped=1 do not"),
    "negative count": (lambda: put(sound()[0], "count", np.int32(-1)), "count=-1"),
    "negative skipped": (lambda: put(sound()[0], "skipped", np.int32(-1)), "skipped=-1"),
    "sum overflows": (
        lambda: put(put(sound()[0], "count", np.int32(2**31 - 1)), "skipped", np.int32(2**31 - 1)),
        "do not go with",
    ),
}


@pytest.mark.parametrize(("make", "match"), HOSTILE.values(), ids=HOSTILE)
def test_malformed_files_are_refused(path, make, match):
    data = make()
    tracemalloc.start()
    try:
        refused(path, data, match)
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()


def test_the_hostile_files_are_hostile_by_one_change(path):
    """The builders above give the sound file where nothing is changed."""
    data, shapes = sound()
    step = parse(data)[0]["step"]
    for same in (data, header(), own(), header(step=step), put(data, "count", np.int32(5))):
        path.write_bytes(same)
        loaded = io.load(path, SMALL)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), loaded) == shapes


def test_rank_of_a_ring_without_entries(path):
    io.save(path, swagjax.swag(2).init({"z": jnp.zeros(0)}))
    head, body = parse(path.read_bytes())
    for rank in (0, 1, 2**31, 2**62):
        head["deviations/z"]["shape"] = [rank, 0]
        refused(path, build(head, body), f"rings of {rank} rows", {"z": jnp.zeros(0)})


def test_a_pickle_is_not_run(path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(path.with_name("bomb")),)

    refused(path, pickle.dumps(Bomb()), NO_FILE)
    assert not path.with_name("bomb").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert path.with_name("bomb").exists()


def test_parameters_of_another_model_are_refused(path):
    w, z = SMALL["w"], SMALL["z"]
    for match, like in {
        "missing 'deviations/x'": {**SMALL, "x": w},
        "unknown 'deviations/z'": {"w": w, "m": w},
        r"'mean/w' is F32 of shape \[2, 2\].*\[2, 3\]": {**SMALL, "w": jnp.ones((2, 3))},
        "missing 'deviations/w/0'": {**SMALL, "w": [w]},
        "holes at 'm'": {"w": w, "z": z},
    }.items():
        refused(path, sound()[0], match, like)
    with pytest.raises(ValueError, match="several leaves have the path 'a/b'"):
        io.load(path, {**SMALL, "a/b": w, "a": {"b": w}})


def test_float64_is_not_silently_cast(path):
    with jax.enable_x64(True):
        io.save(path, swagjax.swa().init(jnp.zeros(2, jnp.float64)))
    refused(path, path.read_bytes(), "float64 .'mean'.*jax_enable_x64", jnp.zeros(2))
    with jax.enable_x64(True):
        assert io.load(path, jnp.zeros(2)).mean.dtype == np.float64


def test_a_file_cut_short_while_it_is_read_is_refused(path, monkeypatch):
    monkeypatch.setattr(io, "_check_precision", lambda *_: path.write_bytes(sound()[0][:-50]))
    refused(path, sound()[0], "is damaged")


@st.composite
def damaged(draw):
    """A sound file with bytes changed, most of them in the header, cut or grown."""
    data = bytearray(sound()[0])
    end = st.sampled_from([8, 8 + struct.unpack("<Q", data[:8])[0], len(data)])
    for _ in range(draw(st.integers(0, 4))):
        position = draw(st.integers(0, draw(end) - 1))
        common = st.sampled_from(b'0123456789,:[]{}"\\FI64BU \x00\xff')
        data[position] = draw(st.integers(0, 255) | common)
    stop = draw(st.just(len(data)) | st.integers(0, len(data)))
    return bytes(data[:stop]) + draw(st.just(b"") | st.binary(max_size=9))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(damaged())
def test_damage_is_refused_or_harmless(path, data):
    path.write_bytes(data)
    loaded, message = None, ""
    try:
        loaded = io.load(path, SMALL)
    except ValueError as error:
        message = str(error)
    if loaded is None:
        assert str(path) in message
    else:
        assert jax.tree.map(lambda x: (x.shape, x.dtype), loaded) == sound()[1]
        assert (
            0
            <= loaded.num_collected
            <= loaded.num_collected + loaded.num_skipped
            <= loaded.num_updates
        )


def test_importing_swagjax_does_not_import_safetensors():
    code = "import sys, swagjax; sys.exit('safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- The authors' code, stated again in float64 -------------------------------------------------
#
# A network of theirs: conv (2 channels to 3, 2 x 2), batch norm, a linear layer that reads the
# flattened (3, 2, 2) image, another linear layer.

TORCH = {
    "base.conv.weight": (3, 2, 2, 2),
    "base.conv.bias": (3,),
    "base.bn.weight": (3,),
    "base.bn.bias": (3,),
    "base.fc1.weight": (5, 12),
    "base.fc1.bias": (5,),
    "base.fc2.weight": (5, 5),
    "base.fc2.bias": (5,),
}
FLAX = {
    "Conv_0": {"kernel": (2, 2, 2, 3), "bias": (3,)},
    "BatchNorm_0": {"scale": (3,), "bias": (3,)},
    "Dense_0": {"kernel": (12, 5), "bias": (5,)},
    "Dense_1": {"kernel": (5, 5), "bias": (5,)},
}
MODULES = {"Conv_0": "base.conv", "BatchNorm_0": "base.bn", "Dense_1": "base.fc2"}
BUFFERS = {
    "base.bn.running_mean": np.zeros(3),
    "base.bn.running_var": np.ones(3),
    "base.bn.num_batches_tracked": np.array(7),
}


def names(path):
    special = {
        "Dense_0/kernel": ("base.fc1.weight", io.flattened_kernel(3, 2, 2)),
        "Dense_0/bias": ("base.fc1.bias", None),
    }
    return special.get(path) or io.flax_names(MODULES)(path)


def like(dtype=np.float64):
    return {
        module: {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in leaves.items()}
        for module, leaves in FLAX.items()
    }


def torch_iterates(count, seed=0):
    """A random walk of their parameters."""
    rng = np.random.default_rng(seed)
    walk = {k: rng.normal(size=(count, *s)).cumsum(0) for k, s in TORCH.items()}
    return [{k: x[i] for k, x in walk.items()} for i in range(count)]


def torch_swag(iterates, max_num_models, covariance=True):
    """The buffers of their SWAG after collecting the iterates, by their recurrence."""
    buffers, n = {}, 0
    for key, shape in TORCH.items():
        buffers[f"{key}_mean"], buffers[f"{key}_sq_mean"] = np.zeros(shape), np.zeros(shape)
        if covariance:
            buffers[f"{key}_cov_mat_sqrt"] = np.zeros((0, int(np.prod(shape))))
    for weights in iterates:
        for key, w in weights.items():
            mean = (n * buffers[f"{key}_mean"] + w) / (n + 1)
            buffers[f"{key}_mean"] = mean
            buffers[f"{key}_sq_mean"] = (n * buffers[f"{key}_sq_mean"] + w * w) / (n + 1)
            if covariance:
                rows = np.vstack([buffers[f"{key}_cov_mat_sqrt"], (w - mean).reshape(1, -1)])
                buffers[f"{key}_cov_mat_sqrt"] = rows[-max_num_models:]
        n += 1
    return {"n_models": np.array([n]), **buffers}


def to_flax(weights):
    """Their parameters as those of the flax network, by the meaning of the axes."""
    w = {k.removeprefix("base."): v for k, v in weights.items()}
    image = w["fc1.weight"].reshape(5, 3, 2, 2)
    return {
        "Conv_0": {"kernel": np.einsum("oihw->hwio", w["conv.weight"]), "bias": w["conv.bias"]},
        "BatchNorm_0": {"scale": w["bn.weight"], "bias": w["bn.bias"]},
        "Dense_0": {
            "kernel": np.einsum("ochw->hwco", image).reshape(12, 5),
            "bias": w["fc1.bias"],
        },
        "Dense_1": {"kernel": w["fc2.weight"].T, "bias": w["fc2.bias"]},
    }


def matrix(iterates):
    return np.stack([oracle.flatten(to_flax(x)) for x in iterates])


def covariance(state):
    """That of the samples, exactly: they are affine in the noise."""
    size = sum(x.size for x in jax.tree.leaves(state.mean))
    rank = len(jax.tree.leaves(state.deviations)[0]) if state.deviations else 0
    root = thetas(state, jnp.eye(size + rank)) - thetas(state, jnp.zeros((1, size + rank)))
    return np.asarray(root.T @ root)


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0))
def thetas(state, z):
    """Flattened weights for flattened noise."""
    leaves, treedef = jax.tree.flatten(state.mean)
    *parts, z2 = jnp.split(z, np.cumsum([x.size for x in leaves]))
    z1 = [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
    sample = swagjax.from_noise(state, treedef.unflatten(z1), z2 if state.deviations else None)
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(sample)])


@pytest.mark.parametrize(("count", "held"), [(2, 4), (4, 4), (6, 4), (9, 4), (5, 2)])
def test_their_posterior_is_that_of_the_oracle_and_of_our_own_run(x64, count, held):
    iterates = torch_iterates(count)
    state = io.from_torch(torch_swag(iterates, held) | BUFFERS, like(), names)
    points = matrix(iterates)
    assert (int(state.num_updates), int(state.num_collected), int(state.num_skipped)) == (
        count,
        count,
        0,
    )
    np.testing.assert_allclose(oracle.flatten(state.mean), points.mean(0), rtol=1e-12)
    np.testing.assert_allclose(oracle.flatten(state.variance), points.var(0), rtol=1e-9)
    wanted = oracle.covariance("swag", points, held)
    np.testing.assert_allclose(covariance(state), wanted, rtol=1e-9, atol=1e-12)
    assert_close(state, our_run(min(count, held), iterates))


@functools.cache
def observe(rank):
    tx = swagjax.swag(rank) if rank else swagjax.swag_diag()
    return tx, jax.jit(lambda state, params: tx.update(params, state, params)[1])


def our_run(rank, iterates):
    """Our own transformation on the same iterates, half of each being the update."""
    tx, update = observe(rank)
    halves = [jax.tree.map(lambda w: w / 2, to_flax(weights)) for weights in iterates]
    return functools.reduce(update, halves, tx.init(halves[0]))


def assert_close(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, state, other)


@pytest.mark.parametrize(("count", "held", "rank"), [(2, 8, 4), (6, 4, 2), (9, 5, 4)])
def test_rank_can_be_chosen(x64, count, held, rank):
    iterates = torch_iterates(count)
    state = io.from_torch(torch_swag(iterates, held), like(), names, rank=rank)
    assert_close(state, our_run(rank, iterates))


def test_one_iterate_and_none(x64):
    for count in (0, 1):
        iterates = torch_iterates(count)
        state = io.from_torch(torch_swag(iterates, 4), like(), names)
        assert int(state.num_collected) == count
        assert state.deviations["Conv_0"]["bias"].shape == (2, 3)
        if iterates:
            assert_close(state, our_run(2, iterates))


def test_their_diagonal_states_have_no_deviations(x64):
    iterates = torch_iterates(4)
    state = io.from_torch(torch_swag(iterates, 0, covariance=False), like(), names)
    assert_close(state, our_run(None, iterates))
    wanted = oracle.covariance("swag_diag", matrix(iterates))
    np.testing.assert_allclose(covariance(state), wanted, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"rank=3.*leave rank out"):
        io.from_torch(torch_swag(iterates, 0, covariance=False), like(), names, rank=3)


def test_layouts_are_those_of_the_layers():
    """Their network by its definition in NumPy, ours by flax, on one image."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(3, (2, 2), padding="VALID")(x)
            x = linen.BatchNorm(use_running_average=True, epsilon=0.0)(x)
            x = linen.Dense(5)(x.reshape(len(x), -1))
            return linen.Dense(5)(x)

    (weights,) = torch_iterates(1)
    image = np.random.default_rng(1).normal(size=(1, 2, 3, 3))  # NCHW
    windows = np.lib.stride_tricks.sliding_window_view(image, (2, 2), (2, 3))
    x = np.einsum("nihwab,oiab->nohw", windows, weights["base.conv.weight"])
    for bias, gain in (("base.conv.bias", None), ("base.bn.bias", "base.bn.weight")):
        x = x * (weights[gain][:, None, None] if gain else 1) + weights[bias][:, None, None]
    x = x.reshape(1, -1)
    for layer in ("base.fc1", "base.fc2"):
        x = x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]

    state = io.from_torch(torch_swag([weights], 4), like(np.float32), names)
    stats = {"BatchNorm_0": {"mean": np.zeros(3), "var": np.ones(3)}}
    inputs = jnp.asarray(image.transpose(0, 2, 3, 1), jnp.float32)
    out = Net().apply({"params": state.mean, "batch_stats": stats}, inputs)
    np.testing.assert_allclose(out, x, rtol=1e-4, atol=1e-4)


def test_dtypes_are_those_of_our_own_state():
    arrays = {k: v.astype(np.float32) for k, v in torch_swag(torch_iterates(3), 4).items()}
    for dtype in (jnp.bfloat16, np.float32, np.float64):
        state = io.from_torch(arrays, like(dtype), names)
        assert {x.dtype for x in jax.tree.leaves(state)} == {
            jnp.dtype("float32"),
            jnp.dtype("int32"),
        }
        np.testing.assert_array_equal(state.mean["Conv_0"]["bias"], arrays["base.conv.bias_mean"])


# Their other repository, drbayes: all parameters in one vector, in the order of the state dict.


def torch_subspace(iterates, max_rank):
    """The state dict of their subspace SWAG after collecting the iterates."""
    points = np.stack([np.concatenate([w.ravel() for w in x.values()]) for x in iterates])
    means = np.cumsum(points, 0) / np.arange(1, len(points) + 1)[:, None]
    rows = (points - means)[-max_rank:]
    base = {
        key.replace("base.", "base_model."): w for key, w in {**iterates[-1], **BUFFERS}.items()
    }
    return {
        "mean": points.mean(0),
        "sq_mean": (points**2).mean(0),
        "n_models": np.array([len(points)]),
        **base,
        "subspace.rank": np.array([len(rows)]),
        "subspace.cov_mat_sqrt": rows,
    }


def subspace_names(path):
    key, layout = names(path)
    return key.replace("base.", "base_model."), layout


@pytest.mark.parametrize(("count", "held"), [(2, 4), (6, 4)])
def test_their_vectors_of_all_parameters_are_cut(x64, count, held):
    iterates = torch_iterates(count)
    state = io.from_torch(torch_subspace(iterates, held), like(), subspace_names)
    points = matrix(iterates)
    np.testing.assert_allclose(oracle.flatten(state.mean), points.mean(0), rtol=1e-12)
    wanted = oracle.covariance("swag", points, held)
    np.testing.assert_allclose(covariance(state), wanted, rtol=1e-9, atol=1e-12)
    assert_close(state, our_run(min(count, held), iterates))
    prefixed = {f"module.{key}": array for key, array in torch_subspace(iterates, held).items()}
    again = io.from_torch(
        prefixed,
        like(),
        lambda path: (f"module.{subspace_names(path)[0]}", subspace_names(path)[1]),
    )
    assert_same(again, state)


def test_their_vectors_without_deviations_are_a_diagonal_state(x64):
    iterates = torch_iterates(4)
    arrays = torch_subspace(iterates, 4)
    del arrays["subspace.rank"], arrays["subspace.cov_mat_sqrt"]
    assert_close(io.from_torch(arrays, like(), subspace_names), our_run(None, iterates))


def test_their_clamp_of_the_variance_is_our_min_variance(x64):
    """Of weights with a variance below it, it makes most of what they sample."""
    iterates = [{k: 3e-4 * w for k, w in x.items()} for x in torch_iterates(5)]
    arrays = torch_subspace(iterates, 4)
    clamped = np.maximum(arrays["sq_mean"] - arrays["mean"] ** 2, 1e-6)
    theirs = 0.5 * (clamped + (arrays["subspace.cov_mat_sqrt"] ** 2).sum(0) / (4 - 1))
    state = io.from_torch(arrays, like(), subspace_names)
    ours = swagjax.variance(state, min_variance=1e-6)
    stops = np.cumsum([math.prod(shape) for shape in TORCH.values()])[:-1]
    parts = [x.reshape(s) for x, s in zip(np.split(theirs, stops), TORCH.values(), strict=True)]
    wanted = to_flax(dict(zip(TORCH, parts, strict=True)))
    np.testing.assert_allclose(oracle.flatten(ours), oracle.flatten(wanted), rtol=1e-9)
    assert np.median(oracle.flatten(ours) / oracle.flatten(swagjax.variance(state))) > 1.5


def test_their_vectors_are_refused_where_they_cannot_be_cut():
    arrays = torch_subspace(torch_iterates(3), 4)
    for match, bad in {
        # as safetensors gives them back: cut in that order, they would be permuted
        "not in the order of the state dict.*'mean'.*numpy.savez": dict(sorted(arrays.items())),
        r"'mean' has shape \[129\], and the 8 .* base_model\.\* have 128 entries": arrays
        | {"mean": np.zeros(129)},
        "have 131 entries: leave out buffers": arrays | {"base_model.more": np.zeros(3)},
        "FreqDirSpace.*SWAG-Diag": arrays | {"subspace.num_models": np.array([9])},
        "no leaf of like takes: 'subspace.other'": arrays | {"subspace.other": np.zeros(1)},
    }.items():
        with pytest.raises(ValueError, match=match):
            io.from_torch(bad, like(), subspace_names)


# A linear layer that reads an image: flattened in another order here, which shapes do not show.


def layers(**shapes):
    """The buffers of layers with these weights, in this order, and the parameters of flax."""
    arrays, params = {"n_models": np.array([1])}, {}
    for layer, shape in shapes.items():
        for end in ("_mean", "_sq_mean"):
            arrays[f"{layer}.weight{end}"] = np.zeros(shape)
        name = "kernel" if len(shape) > 1 else "scale"
        params[layer] = {name: jnp.zeros(io.kernel(np.zeros(shape)).shape if shape[1:] else shape)}
    return arrays, params


def read_layers(special=None, **shapes):
    arrays, params = layers(**shapes)
    by_hand, chosen = special or {}, io.flax_names({layer: layer for layer in shapes})
    return io.from_torch(arrays, params, lambda path: by_hand.get(path) or chosen(path))


CONV = (4, 3, 2, 2)
FLATTENED = {
    "conv2d": {"conv": CONV, "fc": (7, 12)},
    "conv1d": {"conv": (4, 3, 2), "fc": (7, 12)},
    "norm between": {"conv": CONV, "norm": (4,), "fc": (7, 12)},
    "slope of PReLU between": {"conv": CONV, "slope": (1,), "fc": (7, 12)},
    "linear before": {"first": (12, 5), "conv": CONV, "fc": (7, 24), "out": (5, 7)},
}
NOT_FLATTENED = {
    "mean over the image": {"conv": CONV, "fc": (8, 4), "out": (5, 8)},
    "channels joined, as in DenseNet": {"conv": CONV, "norm": (12,), "fc": (7, 12)},
    "one channel": {"conv": (1, 3, 2, 2), "fc": (7, 12)},
    "no multiple": {"conv": CONV, "fc": (7, 13)},
    "linear layers before": {"a": (4, 3), "b": (7, 12), "conv": CONV},
    "hidden layer as wide as a multiple": {"conv": CONV, "fc": (12, 4), "out": (5, 12)},
}


@pytest.mark.parametrize("shapes", FLATTENED.values(), ids=FLATTENED)
def test_the_layout_of_a_layer_that_reads_a_flattened_image_is_asked_for(shapes):
    """Its inputs were silently permuted where only ``flax_names`` named it."""
    inputs = shapes["fc"][1]
    with pytest.raises(
        ValueError, match=rf"'fc/kernel' has {inputs} inputs, {inputs // 4} times the 4 channels"
    ):
        read_layers(**shapes)
    for layout in (io.kernel, io.flattened_kernel(4, 1, inputs // 4)):
        read_layers({"fc/kernel": ("fc.weight", layout)}, **shapes)


@pytest.mark.parametrize("shapes", NOT_FLATTENED.values(), ids=NOT_FLATTENED)
def test_no_layout_is_asked_for_where_no_image_is_flattened(shapes):
    read_layers(**shapes)


def test_every_layer_that_reads_the_image_is_asked_for():
    heads = {"conv": CONV, "advantage": (5, 12), "value": (1, 12)}
    special = {"advantage/kernel": ("advantage.weight", io.flattened_kernel(4, 1, 3))}
    with pytest.raises(ValueError, match="'value/kernel'"):
        read_layers(special, **heads)


WEIGHT = "base.fc.weight"


def linear(dtype=np.float64):
    """The buffers of one linear layer with a bias of one entry: two iterates."""
    return {
        "n_models": np.array([2]),
        "base.fc.weight_mean": np.array([[2.0, 1e-3]], dtype),
        "base.fc.weight_sq_mean": np.array([[5.0, 0.0]], dtype),
        "base.fc.weight_cov_mat_sqrt": np.array([[0.0, 0.0], [1.0, 2.0]], dtype),
    }


LINEAR = {"fc": {"kernel": jnp.zeros((2, 1))}}
FC = io.flax_names({"fc": "base.fc"})


def test_variance_is_never_negative():
    state = io.from_torch(linear(), LINEAR, FC)
    np.testing.assert_array_equal(state.variance["fc"]["kernel"], [[1.0], [0.0]])


def test_rows_not_yet_written_are_zero():
    arrays = linear() | {f"{WEIGHT}_cov_mat_sqrt": np.array([[1.0, 2.0], [3.0, 4.0]])}
    ring = io.from_torch(arrays, LINEAR, FC, rank=4).deviations["fc"]["kernel"]
    np.testing.assert_array_equal(ring[..., 0], [[1, 2], [3, 4], [0, 0], [0, 0]])


def test_state_can_be_donated_and_comes_from_nnx_as_well():
    params = nnx.State({"fc": {"kernel": nnx.Param(jnp.zeros((2, 1)))}})
    state = io.from_torch(linear(), params, FC)
    wanted = swagjax.get_state(swagjax.swag(2).init(params))
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    copies = jax.jit(lambda x: jax.tree.map(jnp.copy, x), donate_argnums=0)(state)
    assert int(copies.num_collected) == 2


def test_a_prefix_and_other_trees():
    arrays = {f"module.{k}": v for k, v in linear().items()}
    name = {"0": ("module.base.fc.weight", np.transpose)}.__getitem__
    state = io.from_torch(arrays, [LINEAR["fc"]["kernel"], None, optax.MaskedNode()], name)
    assert int(state.num_collected) == 2
    np.testing.assert_array_equal(state.deviations[0][1], [[1.0], [2.0]])
    assert state.mean[1] is None
    assert isinstance(state.mean[2], optax.MaskedNode)


def without(key):
    return {k: v for k, v in linear().items() if k != key}


REFUSED = {
    "no n_models": (lambda: without("n_models"), FC, r"n_models is \[\]"),
    "two n_models": (lambda: linear() | {"a.n_models": np.array(2)}, FC, "n_models is"),
    "n_models of two": (lambda: linear() | {"n_models": np.array([2, 2])}, FC, "n_models is"),
    "n_models not whole": (lambda: linear() | {"n_models": np.array(2.5)}, FC, "n_models is"),
    "n_models negative": (lambda: linear() | {"n_models": np.array(-1)}, FC, "n_models is"),
    "n_models NaN": (lambda: linear() | {"n_models": np.array(np.nan)}, FC, "n_models is"),
    "no mean": (lambda: without(f"{WEIGHT}_mean"), FC, "lacks 'base.fc.weight_mean'"),
    "no square": (lambda: without(f"{WEIGHT}_sq_mean"), FC, "lacks 'base.fc.weight_sq_mean'"),
    "another key": (
        linear,
        io.flax_names({"fc": "fc"}),
        "lacks 'fc.weight_mean', .* 'fc/kernel'.*'base.fc.weight_mean'",
    ),
    "no such module": (linear, io.flax_names({"gc": "base.fc"}), "'fc/kernel'.*'gc'"),
    "no such path": (linear, {}.__getitem__, r"name\('fc/kernel'\).*KeyError"),
    "no pair": (linear, lambda path: None, r"name\('fc/kernel'\).*TypeError"),
    "key of name no string": (linear, lambda path: (0, None), r"name\('fc/kernel'\).*key 0"),
    "keys no strings": (lambda: linear() | {0: np.zeros(2)}, FC, "arrays has the key 0: .*strings"),
    "keys no strings but bytes": (lambda: {b"n_models": 2}, FC, "the key b'n_models'"),
    "unused": (
        lambda: linear() | {"base.gc.weight_mean": np.zeros(2), "x": np.zeros(2)},
        FC,
        "no leaf of like takes: 'base.gc.weight_mean', 'x'",
    ),
    "no layout": (linear, lambda path: (WEIGHT, None), r"shape \[2, 1\].*\[1, 2\].*layout"),
    "layout of 4 axes": (
        linear,
        lambda path: (WEIGHT, lambda w: w.transpose(2, 3, 1, 0)),
        "layout of 'fc/kernel' does not take",
    ),
    "layout that scales": (linear, lambda path: (WEIGHT, lambda w: 2 * w.T), "only move"),
    "layout that repeats": (
        linear,
        lambda path: (WEIGHT, lambda w: w.T[[0, 0]]),
        "only move the entries",
    ),
    "square of another shape": (
        lambda: linear() | {f"{WEIGHT}_sq_mean": np.zeros((2, 1))},
        FC,
        "buffers of 'base.fc.weight' do not agree",
    ),
    "rows of another length": (
        lambda: linear() | {f"{WEIGHT}_cov_mat_sqrt": np.zeros((2, 3))},
        FC,
        "buffers of 'base.fc.weight' do not agree",
    ),
    "rows of one axis": (
        lambda: linear() | {f"{WEIGHT}_cov_mat_sqrt": np.zeros(2)},
        FC,
        "buffers of 'base.fc.weight' do not agree",
    ),
    "more rows than iterates": (
        lambda: linear() | {f"{WEIGHT}_cov_mat_sqrt": np.zeros((3, 2))},
        FC,
        r"\[3\] rows.*n_models=2",
    ),
    "one row of two iterates": (
        lambda: linear() | {f"{WEIGHT}_cov_mat_sqrt": np.zeros((1, 2))},
        FC,
        "last 1 of 2 deviations.*SWAG-Diag",
    ),
    "integers": (
        lambda: linear() | {f"{WEIGHT}_mean": np.zeros((1, 2), int)},
        FC,
        "'base.fc.weight_mean' has dtype int64",
    ),
}


@pytest.mark.parametrize(("make", "name", "match"), REFUSED.values(), ids=REFUSED)
def test_checkpoints_that_do_not_fit_are_refused(make, name, match):
    with pytest.raises(ValueError, match=match):
        io.from_torch(make(), LINEAR, name)


def test_parameters_that_share_a_key_or_differ_in_rows_are_refused():
    both = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    arrays = {f"{key}{end}": np.zeros(2) for key in "ab" for end in ("_mean", "_sq_mean")}
    arrays |= {"n_models": np.array(5), "a_cov_mat_sqrt": np.zeros((3, 2))}
    with pytest.raises(ValueError, match="gives 'a' to both 'a' and 'b'"):
        io.from_torch(arrays, both, lambda path: ("a", None))
    with pytest.raises(ValueError, match="lacks 'b_cov_mat_sqrt'"):
        io.from_torch(arrays, both, lambda path: (path, None))
    arrays["b_cov_mat_sqrt"] = np.zeros((4, 2))
    with pytest.raises(ValueError, match=r"\[3, 4\] rows"):
        io.from_torch(arrays, both, lambda path: (path, None))


@pytest.mark.parametrize(("rank", "match"), [(1, "rank=1"), (2.0, "rank=2.0"), (3, "last 2 of 3")])
def test_bad_ranks(rank, match):
    with pytest.raises(ValueError, match=match):
        io.from_torch(linear() | {"n_models": np.array(3)}, LINEAR, FC, rank=rank)


def test_names_of_flax():
    name = io.flax_names({"Block_0/Conv_0": "base.layer.0.conv", "E": "base.e", "": "base"})
    key, layout = name("Block_0/Conv_0/kernel")
    weight = np.arange(120).reshape(2, 3, 4, 5)
    assert key == "base.layer.0.conv.weight"
    np.testing.assert_array_equal(layout(weight), weight.transpose(2, 3, 1, 0))
    assert name("E/embedding") == ("base.e.weight", None)
    assert name("E/scale") == ("base.e.weight", None)
    assert name("bias") == ("base.bias", None)
    for path in ("Block_1/Conv_0/kernel", "E/other", "E"):
        with pytest.raises(ValueError, match=f"'{path}'"):
            name(path)
