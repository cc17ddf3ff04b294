"""Crash and resume: a killed run ends in the same bits, a damaged checkpoint is never restored.

Run as a program, ``python tests/test_checkpoint.py FOLDER OUT``, this file is the training that
the tests below kill: it resumes from the checkpoints in FOLDER, says ``step t`` after each of its
steps, and writes the bytes of its final state to OUT.
"""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import swagjax
from swagjax import checkpoint

ROOT = Path(__file__).parent.parent
STEPS, SAVE_EVERY, RANK = 44, 4, 3
TX = optax.chain(optax.adam(0.01), swagjax.swag(RANK, start=8, every=2))


class Run(NamedTuple):
    """All that the rest of a run depends on."""

    params: Any
    opt_state: Any
    key: jax.Array


def init():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "hidden": jax.random.normal(keys[0], (8, 64)),  # too large to lie inside orbax's index
        "bias": jnp.zeros(64, jnp.bfloat16),
        "out": 0.1 * jax.random.normal(keys[1], (64, 1)),
    }
    return Run(params, TX.init(params), jax.random.key(7))


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - y) ** 2)


@jax.jit
def train_step(run):
    key, batch_key, noise_key = jax.random.split(run.key, 3)
    x = jax.random.normal(batch_key, (32, 8))
    y = jnp.sin(x[:, :1]) + 0.1 * jax.random.normal(noise_key, (32, 1))
    grads = jax.grad(loss)(run.params, x, y)
    updates, opt_state = TX.update(grads, run.opt_state, run.params)
    return Run(optax.apply_updates(run.params, updates), opt_state, key)


def keep(count):
    """Save at once, not in the background, and keep this many."""
    return ocp.CheckpointManagerOptions(max_to_keep=count, enable_async_checkpointing=False)


def main(folder, out):
    first, run = checkpoint.restore_latest(folder, jax.eval_shape(init)) or (0, init())
    print("resumed at", first, flush=True)
    with ocp.CheckpointManager(folder, options=keep(2)) as manager:
        for step in range(first + 1, STEPS + 1):
            run = train_step(run)
            if step % SAVE_EVERY == 0:
                checkpoint.save(manager, step, run)
            print("step", step, flush=True)
    np.savez(out, **as_bytes(run))


def as_bytes(tree):
    """Every leaf as its dtype and bytes, under its path, which names the fields of NamedTuples."""

    def of_leaf(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return of_leaf(jax.random.key_data(leaf))
        return f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes()

    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.void(of_leaf(leaf)) for path, leaf in leaves}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert as_bytes(found) == as_bytes(expected)


def advanced(run, steps):
    for _ in range(steps):
        run = train_step(run)
    return run


# a killed process


class Training:
    """The program above in a process of its own."""

    def __init__(self, folder, out):
        args = [sys.executable, __file__, str(folder), str(out)]
        self.folder, self.said = folder, []
        self.process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def lines(self):
        for line in self.process.stdout:
            self.said.append(line.strip())
            yield line.strip()

    def reach(self, step):
        """Wait until it says that it made this step, or a later one where it began beyond it."""
        made = (int(line.split()[1]) for line in self.lines() if line.startswith("step"))
        assert any(number >= step for number in made)

    def kill(self):
        self.process.kill()
        assert self.end() == -signal.SIGKILL

    def end(self):
        self.process.stdout.close()
        return self.process.wait()

    def kill_after(self, step, delay):
        """Kill it ``delay`` seconds after this step."""
        self.reach(step)
        time.sleep(delay)
        self.kill()

    def kill_while_saving(self, step):
        """Kill it with the folder of a checkpoint half written, the next one after this step."""
        self.reach(step)
        while not self._stopped_while_saving():
            assert self.process.poll() is None
        self.kill()

    def _stopped_while_saving(self):
        if not self._unfinished():
            return False
        self.process.send_signal(signal.SIGSTOP)  # so that it cannot finish while we look again
        time.sleep(0.01)
        if self._unfinished():
            return True
        self.process.send_signal(signal.SIGCONT)
        return False

    def _unfinished(self):
        return any("orbax-checkpoint-tmp" in path.name for path in self.folder.iterdir())

    def finish(self):
        list(self.lines())
        assert self.end() == 0
        return self.said


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder and the final state of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    said = Training(folder / "checkpoints", folder / "final.npz").finish()
    assert said[0] == "resumed at 0"
    return dict(np.load(folder / "final.npz"))


def killed_and_restarted(folder, kills):
    """The final state, and the steps from which the run was resumed."""
    resumed = []
    for kill in kills:
        training = Training(folder / "checkpoints", folder / "final.npz")
        kill(training)
        resumed.append(training.said[0])
        assert not (folder / "final.npz").exists()
    resumed.append(Training(folder / "checkpoints", folder / "final.npz").finish()[0])
    return dict(np.load(folder / "final.npz")), [int(line.split()[-1]) for line in resumed]


@pytest.mark.slow
def test_the_uninterrupted_run_is_worth_comparing_with(uninterrupted):
    """It goes round the ring several times, and its state is the one computed here in one go."""
    state = swagjax.get_state(advanced(init(), STEPS).opt_state)
    assert int(state.num_updates) == STEPS
    assert int(state.num_collected) == (STEPS - 8) // 2 > 5 * RANK
    assert ".key" in uninterrupted
    ring = ".opt_state[1].deviations['hidden']"
    assert len(bytes(uninterrupted[ring])) > 4 * RANK * 8 * 64


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_in_the_same_bits(uninterrupted, tmp_path):
    rng = np.random.default_rng(0)
    anywhere, saving = rng.integers(6, 20), rng.integers(22, 36)
    kills = [
        lambda training: training.kill_after(anywhere, rng.uniform(0, 0.1)),
        lambda training: training.kill_while_saving(saving),
    ]
    final, resumed = killed_and_restarted(tmp_path, kills)
    assert 0 == resumed[0] < resumed[1] < resumed[2]
    assert final == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_many_times_a_run_ends_in_the_same_bits(seed, uninterrupted, tmp_path):
    rng = np.random.default_rng([1, seed])

    def kill(training, step):
        if rng.random() < 0.5:
            training.kill_while_saving(step)
        else:
            training.kill_after(step, rng.uniform(0, 0.05))

    steps = [6 * i + rng.integers(1, 5) for i in range(6)]
    kills = [lambda training, step=step: kill(training, step) for step in steps]
    final, _ = killed_and_restarted(tmp_path, kills)
    assert final == uninterrupted


# damaged checkpoints


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A folder with the checkpoints 20, 30 and 40, and what is in them."""
    folder = tmp_path_factory.mktemp("intact")
    runs = {step: advanced(init(), step) for step in (20, 30, 40)}
    with ocp.CheckpointManager(folder, options=keep(3)) as manager:
        for step, run in runs.items():
            assert checkpoint.save(manager, step, run)
    return folder, runs


@pytest.fixture
def folder(intact, tmp_path):
    """A copy of the intact checkpoints, to do harm to."""
    return shutil.copytree(intact[0], tmp_path / "checkpoints")


@pytest.fixture(scope="module")
def runs(intact):
    return intact[1]


@contextlib.contextmanager
def damage_to(path):
    """A folder that is as it was before on leaving."""
    safe = shutil.copytree(path, path.parents[1] / "safe")
    try:
        yield
    finally:
        for at in (path, path.parent / f"{path.name}.refused"):
            shutil.rmtree(at, ignore_errors=True)
        safe.rename(path)


def restored_with_messages(folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step, run = checkpoint.restore_latest(folder, jax.eval_shape(init))
    assert all(warning.category is RuntimeWarning for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)  # where the caller is
    return step, run, [str(warning.message) for warning in caught]


def assert_refused(folder, runs, why, aside="40.refused"):
    """Not 40 is restored but 30, as it was saved, and one message says why."""
    step, run, messages = restored_with_messages(folder)
    assert step == 30
    assert_same(run, runs[30])
    (message,) = messages
    assert message.startswith(f"checkpoint {folder / '40'} is damaged ({why}")
    assert message.endswith(f"renamed to {aside}; the checkpoint of step 30 is restored")
    assert {path.name for path in folder.iterdir()} == {"20", "30", "40.refused", aside}


def files_of(path):
    """What orbax and we wrote for a step."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) > 10
    assert path / "SWAGJAX_CHECKSUMS" in files
    return files


def test_undamaged_the_newest_is_restored_without_a_word(intact, runs):
    step, run, messages = restored_with_messages(intact[0])
    assert step == 40
    assert_same(run, runs[40])
    assert messages == []


@pytest.mark.slow
def test_a_truncated_file_is_refused(folder, runs, capfd):
    for file in files_of(folder / "40"):
        content = file.read_bytes()
        for length in (0, len(content) // 2, len(content) - 1):
            why = f"{file.relative_to(folder / '40')} has {length} of its {len(content)} bytes"
            with damage_to(folder / "40"):
                file.write_bytes(content[:length])
                ours = file.name == "SWAGJAX_CHECKSUMS"
                assert_refused(folder, runs, f"{file.name} is not" if ours else why)
    assert capfd.readouterr() == ("", "")  # orbax has pages to say about what it cannot read


def test_a_missing_file_is_refused(folder, runs):
    for file in files_of(folder / "40"):
        with damage_to(folder / "40"):
            file.unlink()
            assert_refused(folder, runs, f"{file.relative_to(folder / '40')} is missing")


def test_a_changed_bit_is_refused(folder, runs):
    rng = np.random.default_rng(2)
    for file in files_of(folder / "40"):
        changed = bytearray(file.read_bytes())
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        with damage_to(folder / "40"):
            file.write_bytes(changed)
            ours = file.name == "SWAGJAX_CHECKSUMS"
            assert_refused(folder, runs, str(file.relative_to(folder / "40")) + " is" * ours)


@pytest.mark.parametrize("at", [0, 8, 9, 400, -1])  # of the checksum itself, and of the rest
def test_a_changed_bit_of_the_checksums_is_refused(at, folder, runs):
    file = folder / "40" / "SWAGJAX_CHECKSUMS"
    changed = bytearray(file.read_bytes())
    changed[at] ^= 1
    file.write_bytes(changed)
    assert_refused(folder, runs, "SWAGJAX_CHECKSUMS is not as it was written")


@pytest.mark.parametrize("name", [".", "default", "default/ocdbt.process_0"])
@pytest.mark.parametrize("empty", [True, False])
def test_a_lost_folder(name, empty, folder, runs):
    shutil.rmtree(folder / "40" / name)
    if empty:
        (folder / "40" / name).mkdir()
    if name != ".":
        assert_refused(folder, runs, "default")
        return
    step, _, messages = restored_with_messages(folder)
    stays = [f"{folder / '40'} was not written by swagjax.checkpoint.save and stays"] * empty
    assert (step, [message.split(":")[0] for message in messages]) == (30, stays)
    assert (folder / "40").exists() == empty  # whose it was, nobody can tell


def cut(path):
    """Truncate the file without which nothing can be read."""
    (path / "default" / "manifest.ocdbt").write_bytes(b"")


def test_two_damaged_checkpoints_leave_the_one_before(folder, runs):
    cut(folder / "40")
    cut(folder / "30")
    step, run, messages = restored_with_messages(folder)
    assert step == 20
    assert_same(run, runs[20])
    assert [message.split()[1] for message in messages] == [str(folder / n) for n in ("40", "30")]
    assert {path.name for path in folder.iterdir()} == {"20", "30.refused", "40.refused"}


def test_where_all_are_damaged_nothing_is_restored_or_moved(folder):
    for name in ("20", "30", "40"):
        cut(folder / name)
    why = r"default/manifest\.ocdbt has 0 of its \d+ bytes"
    with pytest.raises(RuntimeError, match=f"every .* damaged, .*40: {why}; 30: {why}; 20: {why}"):
        checkpoint.restore_latest(folder, jax.eval_shape(init))
    assert {path.name for path in folder.iterdir()} == {"20", "30", "40"}


def test_a_checkpoint_that_orbax_alone_saved_is_refused(tmp_path):
    with ocp.CheckpointManager(tmp_path, options=keep(2)) as manager:
        manager.save(1, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
    with pytest.raises(RuntimeError, match=r"\(1: was not written by swagjax\.checkpoint\.save\)"):
        checkpoint.restore_latest(tmp_path, {"w": jnp.ones(3)})
    assert {path.name for path in tmp_path.iterdir()} == {"1"}


def test_a_refused_step_is_saved_again_and_one_refused_before_is_kept(folder, runs):
    """The second one took the name of the first, which was deleted."""
    for aside in ("40.refused", "40.refused-2"):
        cut(folder / "40")
        (folder / "40" / "notes.txt").write_text(aside)
        assert_refused(folder, runs, "default/manifest.ocdbt has 0", aside)
        assert (folder / aside / "notes.txt").read_text() == aside
        with ocp.CheckpointManager(folder, options=keep(3)) as manager:
            assert checkpoint.save(manager, 40, advanced(runs[30], 10))
        step, run, messages = restored_with_messages(folder)
        assert (step, messages) == (40, [])
        assert_same(run, runs[40])


def test_what_others_put_beside_the_files_does_no_harm(folder, runs):
    (folder / "40" / "notes.txt").write_text("a good one")
    (folder / "notes_3").write_text("not a checkpoint")
    assert restored_with_messages(folder)[::2] == (40, [])


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# whose folders are touched


def test_folders_of_others_are_neither_restored_nor_renamed(folder, runs):
    """Any folder whose name ended in a number was taken for a damaged checkpoint and renamed."""
    for name in ("events_1700000000", "logs_2024", "ckpt_50"):
        (folder / name).mkdir()
        (folder / name / "log").write_text("mine")
    before = contents(folder)
    assert restored_with_messages(folder)[::2] == (40, [])
    assert contents(folder) == before
    (folder / "2024").mkdir()
    shutil.copytree(folder / "40", folder / "50")
    with ocp.CheckpointManager(folder) as manager:
        manager.save(60, args=ocp.args.StandardSave({"w": jnp.ones(2)}), force=True)
        assert set(manager.all_steps()) == {20, 30, 40, 50, 60, 2024}
    before = contents(folder)
    step, run, messages = restored_with_messages(folder)
    assert step == 40
    assert_same(run, runs[40])
    stays = " and stays: a manager takes it for a step, and saves none up to it; the checkpoint of"
    assert sorted(message.removesuffix(f"{stays} step 40 is restored") for message in messages) == [
        f"{folder / '2024'} was not written by swagjax.checkpoint.save",
        f"{folder / '50'} is a copy of 40",
        f"{folder / '60'} was not written by swagjax.checkpoint.save",
    ]
    assert contents(folder) == before


def test_a_folder_without_checkpoints_is_left_alone(tmp_path):
    (tmp_path / "events_1700000000").mkdir()
    (tmp_path / "3").mkdir()
    assert checkpoint.restore_latest(tmp_path, {}) is None
    assert {path.name for path in tmp_path.iterdir()} == {"events_1700000000", "3"}


def test_a_process_killed_before_the_checksums_leaves_one_that_is_refused(folder, runs):
    """It is told from one that orbax alone saved by the mark in orbax's metadata."""
    (folder / "40" / "SWAGJAX_CHECKSUMS").unlink()
    assert_refused(folder, runs, "SWAGJAX_CHECKSUMS is missing (killed while saving)")


def prefixed(prefix):
    return ocp.CheckpointManagerOptions(step_prefix=prefix, enable_async_checkpointing=False)


def tree_of(step):
    return {"w": jnp.full(3, float(step))}


def test_checksums_go_into_the_folder_of_the_manager(tmp_path):
    """They went into a copy with the same number, and the real one was refused."""
    with ocp.CheckpointManager(tmp_path, options=prefixed("ckpt")) as manager:
        checkpoint.save(manager, 1, tree_of(1))
        shutil.copytree(tmp_path / "ckpt_1", tmp_path / "best_1")
        shutil.copytree(tmp_path / "ckpt_1", tmp_path / "best_2")
        shutil.copytree(tmp_path / "ckpt_1", tmp_path / "zest_2")
        before = contents(tmp_path / "best_2")
        checkpoint.save(manager, 2, tree_of(2))
    assert contents(tmp_path / "best_2") == contents(tmp_path / "zest_2") == before
    assert (tmp_path / "ckpt_2" / "SWAGJAX_CHECKSUMS").exists()
    names = {path.name for path in tmp_path.iterdir()}
    step, tree = checkpoint.restore_latest(tmp_path, tree_of(0))
    assert (step, list(tree["w"])) == (2, [2, 2, 2])
    assert {path.name for path in tmp_path.iterdir()} == names
    (tmp_path / "ckpt_2" / "default" / "manifest.ocdbt").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match=r"ckpt_2 is damaged .* renamed to ckpt_2\.refused"):
        assert checkpoint.restore_latest(tmp_path, tree_of(0))[0] == 1
    assert {path.name for path in tmp_path.iterdir()} == names - {"ckpt_2"} | {"ckpt_2.refused"}


def test_two_managers_in_one_folder_are_told_apart_by_their_prefix(tmp_path):
    for prefix, step in (("ema", 5), ("run", 3), (None, 4)):
        with ocp.CheckpointManager(tmp_path, options=prefixed(prefix)) as manager:
            checkpoint.save(manager, step, tree_of(step))
    with pytest.raises(ValueError, match=r"prefixes \['', 'ema', 'run'\]: say by step_prefix"):
        checkpoint.restore_latest(tmp_path, tree_of(0))
    for prefix, step in (("ema", 5), ("run", 3), ("", 4)):
        assert checkpoint.restore_latest(tmp_path, tree_of(0), step_prefix=prefix)[0] == step
    assert checkpoint.restore_latest(tmp_path, tree_of(0), step_prefix="other") is None


def test_where_nothing_can_be_renamed_the_older_one_is_restored(folder, runs, monkeypatch):
    """On a read-only disk the damaged one could not be renamed, and nothing was restored."""

    def rename(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", rename)
    cut(folder / "40")
    step, run, (message,) = restored_with_messages(folder)
    assert step == 30
    assert_same(run, runs[30])
    assert "and could not be renamed (Read-only file system): a manager saves no step" in message
    assert {path.name for path in folder.iterdir()} == {"20", "30", "40"}


def recorded(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return b"%08x\n%s" % (zlib.crc32(text), text)


WRONG = [
    *(b"", b"\xff", b"[" * 100_000, [], 3),
    *({"files": 3, "leaves": {}}, {"files": {"a": 1}}, {"files": {"a": [1, 1]}, "leaves": 3}),
    *({"files": {"a": ["x", 1]}, "leaves": {}}, {"files": {}, "leaves": {}}),
]


def test_checksums_of_right_crc_and_wrong_content_are_refused(folder, runs):
    """They raised, and no older one was tried."""
    for content in WRONG:
        with damage_to(folder / "40"):
            (folder / "40" / "SWAGJAX_CHECKSUMS").write_bytes(recorded(content))
            assert_refused(folder, runs, "SWAGJAX_CHECKSUMS is not as it was written")


def test_a_folder_in_place_of_the_checksums_is_refused(folder, runs):
    (folder / "40" / "SWAGJAX_CHECKSUMS").unlink()
    (folder / "40" / "SWAGJAX_CHECKSUMS").mkdir()
    assert_refused(folder, runs, "SWAGJAX_CHECKSUMS cannot be read (Is a directory)")


def test_a_file_that_cannot_be_read_is_refused(folder, runs, monkeypatch):
    opened, bad = Path.open, folder / "40" / "default" / "manifest.ocdbt"

    def fail(path, *args, **kwargs):
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fail)
    assert_refused(folder, runs, f"{bad} cannot be read (Input/output error)")


# from before the counters of SWAGState were renamed


class OldState(NamedTuple):
    step: Any
    count: Any
    skipped: Any
    mean: Any
    variance: Any
    deviations: Any


def test_checkpoints_of_before_the_counters_were_renamed_are_restored(tmp_path):
    """Their fields are step, count and skipped; the names of their leaves are part of the file."""
    run = advanced(init(), 12)
    adam, state = run.opt_state
    old = run._replace(opt_state=(adam, OldState(*state)))
    assert ".opt_state[1].count" in as_bytes(old)
    with ocp.CheckpointManager(tmp_path, options=keep(2)) as manager:
        checkpoint.save(manager, 12, old)
    record = tmp_path / "12" / "SWAGJAX_CHECKSUMS"
    content = json.loads(record.read_bytes().partition(b"\n")[2])
    del content["name"]  # nor did the record of then say the name of its folder
    record.write_bytes(recorded(content))
    step, found = checkpoint.restore_latest(tmp_path, jax.eval_shape(init))
    assert step == 12
    assert_same(found, run)
    assert type(found.opt_state[1]) is swagjax.SWAGState
    with pytest.raises(ValueError, match="target is another tree"):
        checkpoint.restore_latest(tmp_path, jax.eval_shape(OTHER_TREES["rank"]))


# another tree


def with_params(change):
    def changed():
        params = change(init().params)
        return Run(params, TX.init(params), jax.random.key(0))

    return changed


def with_collector(collector):
    tx = optax.chain(optax.adam(1.0), collector)
    return lambda: init()._replace(opt_state=tx.init(init().params))


OTHER_TREES = {
    "shape": with_params(lambda p: {**p, "out": jnp.zeros((64, 2))}),
    "dtype": with_params(lambda p: {**p, "bias": jnp.zeros(64)}),
    "leaf too many": with_params(lambda p: {**p, "new": jnp.zeros(1)}),
    "leaf too few": with_params(lambda p: {"hidden": p["hidden"], "bias": p["bias"]}),
    "fields of a dict": lambda: init()._asdict(),
    "kind of key": lambda: init()._replace(key=jax.random.key(0, impl="rbg")),
    "raw key": lambda: init()._replace(key=jax.random.PRNGKey(0)),
    "rank": with_collector(swagjax.swag(RANK + 1)),
    "method": with_collector(swagjax.swa()),
}


@pytest.mark.parametrize("other", OTHER_TREES.values(), ids=OTHER_TREES)
def test_another_tree_is_refused_and_is_not_damage(other, intact):
    folder, _ = intact
    with pytest.raises(ValueError, match=r"target is another tree than .*/40: leaf .* in target"):
        checkpoint.restore_latest(folder, jax.eval_shape(other))
    assert {path.name for path in folder.iterdir()} == {"20", "30", "40"}


def test_an_older_checkpoint_of_the_right_tree_does_not_hide_a_newer_one_of_another(tmp_path):
    with ocp.CheckpointManager(tmp_path, options=keep(2)) as manager:
        checkpoint.save(manager, 1, {"w": jnp.ones(3)})
        checkpoint.save(manager, 2, {"w": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"leaf \['w'\] is float32\[3\] in target, float32\[4\]"):
        checkpoint.restore_latest(tmp_path, {"w": jnp.ones(3)})


# what is restored


def roundtrip(tree, target, tmp_path):
    with ocp.CheckpointManager(tmp_path, options=keep(2)) as manager:
        assert checkpoint.save(manager, 5, tree)
    step, found = checkpoint.restore_latest(tmp_path, target)
    assert step == 5
    return found


def test_nothing_to_restore(tmp_path):
    assert checkpoint.restore_latest(tmp_path, {}) is None
    assert checkpoint.restore_latest(tmp_path / "nosuch", {}) is None
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.restore_latest(str(tmp_path), {}) is None


@pytest.mark.parametrize("tx", [swagjax.swa(), swagjax.swag_diag(), swagjax.swag(2)])
def test_one_line_keeps_the_named_tuples(tx, tmp_path):
    params = {"w": jnp.arange(3.0)}
    state = tx.update(params, tx.init(params), params)[1]
    found = roundtrip(state, jax.eval_shape(tx.init, params), tmp_path)
    assert type(found) is swagjax.SWAGState
    assert_same(found, state)


def test_keys_and_numbers_and_values_that_are_not_finite(tmp_path):
    tree = {
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
        "raw": jax.random.PRNGKey(2),
        "odd": jnp.array([jnp.nan, -jnp.inf, -0.0, 1e-42]),
        "numpy": np.arange(3, dtype=np.float64),
        "none": None,
        "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    }
    assert_same(roundtrip(tree, tree, tmp_path), tree)


def test_python_numbers(tmp_path):
    tree = {"step": 3, "rate": 0.1, "on": True}
    assert roundtrip(tree, {"step": 0, "rate": 0.0, "on": False}, tmp_path) == tree


def test_a_manager_that_saves_in_the_background_is_waited_for(tmp_path):
    run = advanced(init(), 12)
    with ocp.CheckpointManager(tmp_path) as manager:
        checkpoint.save(manager, 12, run)
        step, found = checkpoint.restore_latest(tmp_path, jax.eval_shape(init))
    assert step == 12
    assert_same(found, run)


def test_shardings(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, columns = (
        jax.sharding.NamedSharding(mesh, jax.P(*spec)) for spec in (("x",), (None, "x"))
    )
    tree = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), rows)}
    as_saved = roundtrip(tree, jax.eval_shape(lambda: tree), tmp_path)
    assert as_saved["w"].sharding == rows
    target = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=columns)}
    _, as_asked = checkpoint.restore_latest(tmp_path, target)
    assert as_asked["w"].sharding == columns
    for found in (as_saved, as_asked):
        assert_same(found, tree)


def test_names_that_a_manager_may_give_to_steps(tmp_path):
    options = ocp.CheckpointManagerOptions(step_prefix="run", step_format_fixed_length=4)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step in (9, 10):
            checkpoint.save(manager, step, {"w": jnp.full(3, step)})
    assert {path.name for path in tmp_path.iterdir()} == {"run_0009", "run_0010"}
    step, tree = checkpoint.restore_latest(tmp_path, {"w": jnp.zeros(3, int)})
    assert (step, list(tree["w"])) == (10, [10, 10, 10])


class Dashed:
    """A naming of the user's own, which orbax allows."""

    def build_name(self, step):
        return f"step-{step}"

    def find_all(self, base_path):
        return iter(())

    def find_step(self, base_path, step):
        return ocp.path.step.Metadata(step=step, path=base_path / self.build_name(step))


def test_names_that_would_not_be_found_are_refused_when_saving(tmp_path):
    options = ocp.CheckpointManagerOptions(step_name_format=Dashed())
    with (
        ocp.CheckpointManager(tmp_path, options=options) as manager,
        pytest.raises(ValueError, match=r"manager names step 3 'step-3'.*end in the number"),
    ):
        checkpoint.save(manager, 3, {"w": jnp.ones(2)})


def test_a_checkpoint_that_is_deleted_while_it_is_saved(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:

        class Deleting:
            directory, save = manager.directory, staticmethod(manager.save)

            @staticmethod
            def wait_until_finished():
                manager.wait_until_finished()
                shutil.rmtree(tmp_path / "3")

        with pytest.raises(RuntimeError, match=r"step 3 was deleted from .* before its checksums"):
            checkpoint.save(Deleting, 3, {"w": jnp.ones(2)})


def test_a_step_that_the_manager_does_not_save(tmp_path):
    options = ocp.CheckpointManagerOptions(save_interval_steps=2)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        saved = [checkpoint.save(manager, step, {"w": jnp.ones(2)}) for step in range(4)]
    assert saved == [True, False, True, False]


def test_a_relative_folder(tmp_path, monkeypatch):
    roundtrip({"w": jnp.ones(2)}, {"w": jnp.ones(2)}, tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert checkpoint.restore_latest(tmp_path.name, {"w": jnp.ones(2)})[0] == 5


def test_another_file_system_is_refused():
    with pytest.raises(
        ValueError, match="folder='gs://bucket/run': checkpoints are checked on local disks"
    ):
        checkpoint.restore_latest("gs://bucket/run", {})


def test_importing_swagjax_leaves_orbax_alone():
    code = "import sys, swagjax; sys.exit('orbax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))


def test_several_processes_are_left_to_orbax(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"2 processes.*manager\.save"):
        checkpoint.save(None, 1, {})
