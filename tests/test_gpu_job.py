"""The GPU job, rehearsed: parts end, write JSON, keep to their time box and resume after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import swagjax
from benchmarks.errors import UsageError
from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import carry, classification, counting, plan, training, trees
from benchmarks.gpu.job import Job, TimeUpError
from benchmarks.gpu.parts import PARTS, check
from benchmarks.speed import workloads

FIELDS = {"part", "complete", "size", "date", "device", "versions", "dtype", "batch", "options"}
FIELDS |= {"seconds", "results"}


class Linear(nn.Module):
    """Logits that are linear in the pixels."""

    classes: int

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.classes)(x.reshape(len(x), -1))


def recipe(seeds=1):
    return training.Recipe(Linear(3), 4, 0.1, ("flip",), 2, (100.0,), (50.0,), seeds)


def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (12, 4, 4, 1), np.uint8), rng.integers(0, 3, 12, np.int32)


def ticking(seconds):
    """A clock that goes on by so much whenever it is looked at."""
    now = iter(range(10**9))
    return lambda: seconds * next(now)


def counted(network, keys, number, rate, *data):
    """An epoch that adds its number and its rate."""
    return network + number + rate, np.float32(number)


def fit(job, rates=(0.5, 0.25, 0.125, 0.0)):
    start, rates = jnp.zeros(()), np.array(rates, np.float32)
    return training.fit(job, "run", counted, recipe(), start, rates, 20, None, ())


def test_a_training_stops_in_time_and_goes_on_where_it_was(tmp_path):
    """Fault: a time box that ends a training without a save, or one that begins it anew."""
    whole = fit(Job("a", tmp_path, tmp_path / "whole"))
    with pytest.raises(TimeUpError, match="run is at epoch"):
        fit(Job("a", tmp_path, tmp_path / "cut", seconds=30.0, clock=ticking(2.0)))
    saved = trees.load(tmp_path / "cut" / "a" / "run.npz", np.zeros((), np.float32))
    assert 0 < len(saved[1]) < 4
    resumed = fit(Job("a", tmp_path, tmp_path / "cut"))
    assert float(resumed[0]) == float(whole[0]) == 86.875
    np.testing.assert_array_equal(resumed[1], [20, 21, 22, 23])


def test_a_dead_network_is_refused_after_ten_epochs(tmp_path):
    """Fault: minutes of training a network that gives every class the same probability."""

    def dead(network, keys, number, rate, *data):
        return network, np.float32(np.log(3))

    rates = np.zeros(20, np.float32)
    with pytest.raises(RuntimeError, match="try another --seed"):
        training.fit(Job("a", tmp_path, tmp_path), "run", dead, recipe(), 0.0, rates, 0, None, ())


def test_another_tree_is_not_resumed(tmp_path):
    trees.save(tmp_path / "tree.npz", {"a": np.ones(2)}, np.zeros(0))
    with pytest.raises(ValueError, match="--fresh"):
        trees.load(tmp_path / "tree.npz", {"a": np.ones(3)})


def test_what_takes_no_time_is_remembered(tmp_path):
    """Fault: arrays computed anew by every run that resumes."""
    first = Job("a", tmp_path, tmp_path)
    first.stage("one", lambda: 1)
    assert first.array("x", lambda: [1.0, 2.0]).tolist() == [1.0, 2.0]
    again = Job("a", tmp_path, tmp_path)
    assert again.array("x", lambda: 1 / 0).tolist() == [1.0, 2.0]
    with pytest.raises(UsageError, match="seed"):
        Job("a", tmp_path, tmp_path, seed=1)


@pytest.mark.parametrize("seeds", [1, 2])
def test_swag_collects_the_ends_of_epochs(seeds):
    """Fault: collections at other steps, seeds that share what is theirs, a step that is not SGD's.

    Beside SGD written out in NumPy, on the same images in the same order.
    """
    of, data, steps = recipe(seeds), images(), 3
    keys = classification.seed_keys(0, seeds)
    plain = training.initialise(of, keys, data[0][0])
    axes = training.member_axes(of, classification.one_of(of, plain), steps)
    program = training.epoch(of, training.collecting(of, steps), steps, axes)
    weights = [
        jax.device_get(training.of_seed(of, plain, plain_axes(plain), i)) for i in range(seeds)
    ]
    ends = [
        sgd_ends(w.params["Dense_0"], key, data)
        for w, key in zip(weights, listed(keys), strict=True)
    ]
    network = training.begin_collecting(of, plain, steps)
    for number in range(2):
        network, _ = program(network, keys, number, np.float32(0.1), *data)
    for i in range(seeds):
        state = swagjax.get_state(training.of_seed(of, network, axes, i).opt_state)
        assert int(state.num_collected) == 2
        wanted = np.mean(ends[i], axis=0)
        np.testing.assert_allclose(state.mean["Dense_0"]["kernel"], wanted, rtol=1e-4, atol=1e-5)


def listed(keys):
    return list(keys) if keys.ndim else [keys]


def plain_axes(network):
    return jax.tree.map(lambda _: 0, network)


def sgd_ends(dense, key, data, rate=0.1, decay=0.1, momentum=0.9):
    """Kernels at the ends of two epochs, in float64; flips and orders are those of the job."""
    w, b = (np.asarray(dense[name], np.float64) for name in ("kernel", "bias"))
    vw, vb, ends = np.zeros_like(w), np.zeros_like(b), []
    for number in range(2):
        of_epoch = jax.random.fold_in(key, number)
        order = np.asarray(jax.random.permutation(of_epoch, 12))
        for i in range(3):
            rows = order[4 * i : 4 * i + 4]
            flips = jax.random.fold_in(jax.random.fold_in(of_epoch, i), 0)
            mirrored = np.asarray(jax.random.bernoulli(flips, shape=(4, 1, 1, 1)))
            x = np.where(mirrored, data[0][rows][:, :, ::-1], data[0][rows]).astype(np.float64)
            x = ((x - 100) / 50).reshape(4, -1)
            logits = x @ w + b
            p = np.exp(logits - logits.max(1, keepdims=True))
            g = (p / p.sum(1, keepdims=True) - np.eye(3)[data[1][rows]]) / 4
            vw, vb = momentum * vw + x.T @ g + decay * w, momentum * vb + g.sum(0) + decay * b
            w, b = w - rate * vw, b - rate * vb
        ends.append(w)
    return ends


def test_products_are_counted():
    """VGG16's multiply-adds on an image, added up by hand: forward, and by weights and inputs."""
    widths = [(3, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8)]
    widths += [(256, 256, 8)] * 2 + [(256, 512, 4)] + [(512, 512, 4)] * 2 + [(512, 512, 2)] * 3
    by_hand = sum(9 * a * b * size**2 for a, b, size in widths) + 2 * 512**2 + 5120
    content = json.loads(plan.RECORD.read_text())["parts"]
    assert set(content) == set(PARTS)
    of_epoch = content["vgg16"]["full"]["epoch"]
    images = 45_000 // 128 * 128
    # Of the first layer's three products one is not needed: images have no gradient.
    assert of_epoch["flop"] == pytest.approx(
        images * 2 * (3 * by_hand - 9 * 3 * 64 * 32**2), rel=1e-3
    )


def test_the_plan_is_a_table(capsys):
    assert plan.show(measure=False) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in PARTS)


def test_a_loop_costs_as_often_as_it_runs():
    x = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    once = counting.cost(lambda x: x @ x, x)
    assert counting.cost(lambda x: jax.lax.fori_loop(0, 5, lambda _, y: y @ x, x), x) == once.times(
        5
    )


def test_an_epoch_of_vgg16_lowers_for_cuda():
    """Fault: a program that only a CPU runs. Images travel as bytes, products are of bfloat16."""
    setting = PARTS["vgg16"].setting(False)
    program, args = plan.abstract_epoch(setting, plan.abstract_task(setting), collecting=True)
    text = jax.export.export(program, platforms=["cuda"])(*args).mlir_module()
    assert "tensor<45000x32x32x3xui8>" in text
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == 38  # 13 layers, three products each but for the gradient of images
    assert all("xbf16>" in line for line in convolutions)


def test_what_is_checked_lowers_for_cuda():
    workload = workloads.build("lenet5")
    tx = swagjax.swag(check.RANK)
    state, key = jax.eval_shape(tx.init, workload.shapes), jax.eval_shape(lambda: jax.random.key(0))
    probs, x = workloads.probabilities(workload), jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)

    def predict(key, state, x):
        return swagjax.predict(key, state, probs, x, num_samples=4)

    programs = {
        jax.jit(swagjax.sample): (key, state),
        workloads.collector(tx): ((workload.shapes, state), workload.shapes),
        jax.jit(predict): (key, state, x),
    }
    for program, args in programs.items():
        assert jax.export.export(program, platforms=["cuda"])(*args).platforms == ("cuda",)


def test_old_packages_are_refused(monkeypatch, capsys):
    """Fault: minutes of a GPU spent until an old flax fails."""
    monkeypatch.setitem(command_line.REQUIRED, "flax", "99.1")
    assert command_line.main(["plan"]) == 2
    assert "it needs to be 99.1 or later" in capsys.readouterr().err


def test_parts_are_those_of_the_command_line():
    help_text = command_line._parser().format_help()
    assert all(name in help_text for name in PARTS)


def test_carried_wheels_are_late_enough():
    versions = dict(wheel.split("==") for wheel in carry.WHEELS)
    for name, least in command_line.REQUIRED.items():
        if name in versions:
            assert command_line._numbers(versions[name]) >= command_line._numbers(least)


def test_a_folder_too_large_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(11))
    monkeypatch.setattr(carry, "LIMIT", 10)
    with pytest.raises(UsageError, match="at most"):
        carry.check_size(tmp_path)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder of compiled programs, which the runs of a part have in common."""
    return tmp_path_factory.mktemp("compiled")


def start(part, folder, compiled, *options):
    command = [sys.executable, "-m", "benchmarks.gpu", part, "--tiny", "--seconds", "1800"]
    command += ["--out", str(folder / "out"), "--work", str(folder / "work"), *options]
    flags = {"JAX_COMPILATION_CACHE_DIR": str(compiled), "MPLBACKEND": "Agg"}
    flags["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    root = Path(__file__).parent.parent
    return subprocess.Popen(command, cwd=root, env=os.environ | flags, stdout=subprocess.PIPE)


def finish(process):
    said = process.communicate(timeout=1500)[0].decode()
    return process.returncode, said


def read(folder, part):
    return json.loads((folder / "out" / f"{part}.json").read_text())


def kill_after(process, file):
    """SIGKILL as soon as there is a file."""
    while not file.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def numbers(content):
    """What a run that was killed is to have in common with one that was not."""
    if content["part"] == "check":
        return {name: of["error"] for name, of in content["results"].items() if "error" in of}
    return {name: content[name] for name in ("results", "losses")}


# What others train is trained by these as well.
KILLED = {"check": "stages.json", "vgg16": "common.npz", "preresnet20": "sgd.npz"}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_resumes_after_a_kill_and_ends(part, tmp_path, compiled):
    """Fault: a part that fails at its last line, after minutes; one that a kill changes."""
    killed = start(part, tmp_path / "killed", compiled)
    kill_after(killed, tmp_path / "killed" / "work" / part / KILLED.get(part, "common.npz"))
    assert not read(tmp_path / "killed", part)["complete"]
    code, said = finish(start(part, tmp_path / "killed", compiled))
    assert code == 0, said
    content = read(tmp_path / "killed", part)
    assert content["complete"]
    assert set(content) >= FIELDS
    assert content["device"]["device"] == "cpu"
    assert content["versions"]["jax"] == jax.__version__
    files = list((tmp_path / "killed" / "out").iterdir())
    assert len(files) <= 8
    assert sum(file.stat().st_size for file in files) < 1e6
    assert part == "check" or (tmp_path / "killed" / "out" / f"{part}.png").exists()
    if part in KILLED:
        assert finish(start(part, tmp_path / "whole", compiled))[0] == 0
        assert numbers(content) == numbers(read(tmp_path / "whole", part))


def test_a_part_ends_when_its_time_does(tmp_path):
    """Fault: a compilation or a call that hangs takes the machine beyond the time box."""
    code, said = finish(start("vgg16", tmp_path, tmp_path, "--seconds", "0.01"))
    assert code == 3, said
    assert not read(tmp_path, "vgg16")["complete"]
