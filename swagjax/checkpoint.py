"""Crash and resume: orbax checkpoints that are checked before they are read.

The only room that imports orbax (``pip install swagjax[checkpoint]``). Orbax commits a checkpoint
by renaming its finished folder, so that a process killed at any moment leaves no half of one under
the name of a step, and it keeps counters, ring buffer and typed random keys bit for bit. What it
lacks, and what is here, are checksums (an array file with a changed bit is restored without a word)
and the step back from a damaged checkpoint to the one before it.
"""

import itertools
import json
import os
import re
import uuid
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from swagjax.transform import SWAGState

_CHECKSUMS = "SWAGJAX_CHECKSUMS"  # this file in the folder of a step, written last
_METADATA = "_CHECKPOINT_METADATA"  # orbax's, committed with the folder
_STEP = r"(?:(.*)_)?(\d+)"  # how orbax names the folder of a step: prefix and number
_MARK = "swagjax"  # in the custom metadata: that it was saved here, and by which call


class _Record(NamedTuple):
    """What the checksum file says."""

    name: str  # of the folder, by which a copy is told
    files: dict[str, list[int]]
    leaves: dict[str, str]


class _Series(NamedTuple):
    """The checkpoints that one manager made, newest first, and what else has their names."""

    own: list[tuple[int, Path]]
    others: dict[Path, tuple[int, str]]  # number and what is wrong with it


class _OldState(NamedTuple):
    """``SWAGState`` with the names that its counters had once, to read old checkpoints."""

    step: Any
    count: Any
    skipped: Any
    mean: Any
    variance: Any
    deviations: Any


def save(manager: ocp.CheckpointManager, step: int, tree: Any) -> bool:
    """Save a tree as the checkpoint of a step, then the CRC-32 of each file that was written.

    ``manager.save(step, args=ocp.args.StandardSave(tree))``, which it waits for, and the file
    ``SWAGJAX_CHECKSUMS`` beside what orbax wrote, by which ``restore_latest`` tells what was
    damaged later. A checkpoint without it, of a process killed in between, counts as damaged. A
    mark in orbax's own metadata tells which checkpoints were saved by this function.

    Args:
      manager: an ``orbax.checkpoint.CheckpointManager`` of one unnamed item, on a local disk.
        ``max_to_keep`` must be at least 2, or there is none before the last one to go back to.
      step: the number of the checkpoint, larger than those before it.
      tree: arrays, typed random keys and Python numbers: all that the rest of the run depends on,
        such as ``(params, opt_state, key)``.

    Returns:
      Whether a checkpoint was saved, which is ``manager.should_save(step)``.

    Raises:
      ValueError: where several processes run together; orbax alone saves what is spread over them.
        Also for a folder that is not on a local disk, and for a ``step_name_format`` whose names do
        not end in the number of the step.
      RuntimeError: if something deletes the checkpoint before its checksums are written.

    Example:
      >>> import tempfile, jax.numpy as jnp, orbax.checkpoint as ocp
      >>> from swagjax import checkpoint
      >>> with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder) as manager:
      ...     checkpoint.save(manager, 1, {"w": jnp.ones(3)})
      True
    """
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes: checksums are written by one alone; call "
            "manager.save(step, args=ocp.args.StandardSave(tree)) on all of them"
        )
    root, call = _local(manager.directory), uuid.uuid4().hex
    args = ocp.args.StandardSave(tree)
    if not manager.save(step, args=args, custom_metadata={_MARK: call}):
        return False
    manager.wait_until_finished()
    # whatever names the manager gives to its steps, and whoever copies them
    path = next((path for path in root.iterdir() if _mark(path) == call), None)
    if path is None:
        raise RuntimeError(
            f"step {step} was deleted from {root} before its checksums were written: give the "
            "manager options that keep the newest step, such as max_to_keep=2"
        )
    if not re.fullmatch(_STEP, path.name):
        raise ValueError(
            f"manager names step {step} {path.name!r}, which restore_latest would not find: leave "
            "out step_name_format, or let names end in the number, as in '12' and 'run_0012'"
        )
    content = json.dumps(_Record(path.name, _files(path), _kinds(tree))._asdict()).encode()
    unfinished = path / f"{_CHECKSUMS}.tmp"
    unfinished.write_bytes(b"%08x\n%s" % (zlib.crc32(content), content))
    unfinished.rename(path / _CHECKSUMS)
    return True


def restore_latest(
    folder: str | os.PathLike[str], target: Any, *, step_prefix: str | None = None
) -> tuple[int, Any] | None:
    """Restore the newest checkpoint in a folder whose files are those that were written.

    A newer one with files that are cut short, changed or missing is refused: a ``RuntimeWarning``
    says why, and its folder ``<step>`` is renamed to ``<step>.refused``, so that the run can save
    that step again. Call it before the ``CheckpointManager`` is made, which lists the steps once.
    Only what ``save`` wrote is restored or renamed. Other folders stay what they are; a warning
    names those that the manager takes for newer steps, since it saves no step up to theirs. Where
    nothing can be renamed, as on a read-only disk, the warning says so.

    Checkpoints that hold a ``SWAGState`` from before its counters were renamed (``step``,
    ``count``, ``skipped``) are read as well.

    Args:
      folder: the folder of the ``CheckpointManager`` by which ``save`` wrote.
      target: a tree like the one saved, of arrays or of ``jax.ShapeDtypeStruct``. NamedTuples are
        restored as such because ``target`` has them: ``jax.eval_shape(tx.init, params)`` is the
        target of an optimizer state. Arrays take the sharding that ``target`` gives, or else the
        one they were saved with. Weak types become strong ones.
      step_prefix: that of the manager, ``""`` for one without; needed where several managers with
        different ones save in one folder.

    Returns:
      The step and the tree; None where the folder holds no checkpoint or does not exist.

    Raises:
      ValueError: if the newest undamaged checkpoint is of another tree than ``target``: other
        leaves, shapes or dtypes. No older one is tried then. Also if the checkpoints have several
        prefixes and no ``step_prefix`` chooses one.
      RuntimeError: if there are checkpoints but all are damaged, or not written by ``save``; they
        stay where they are.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, optax, orbax.checkpoint as ocp, swagjax
      >>> from swagjax import checkpoint
      >>> tx = optax.chain(optax.sgd(0.1), swagjax.swag(rank=2))
      >>> def init():
      ...     params = {"w": jnp.ones(3)}
      ...     return params, tx.init(params), jax.random.key(0)
      >>> def train(folder, steps):
      ...     done = checkpoint.restore_latest(folder, jax.eval_shape(init)) or (0, init())
      ...     first, (params, opt_state, key) = done
      ...     keep = ocp.CheckpointManagerOptions(max_to_keep=2)
      ...     with ocp.CheckpointManager(folder, options=keep) as manager:
      ...         for step in range(first, steps):
      ...             key, noise_key = jax.random.split(key)
      ...             grads = {"w": params["w"] + jax.random.normal(noise_key, 3)}
      ...             updates, opt_state = tx.update(grads, opt_state, params)
      ...             params = optax.apply_updates(params, updates)
      ...             checkpoint.save(manager, step + 1, (params, opt_state, key))
      ...     collected = swagjax.get_state(opt_state).num_collected
      ...     print(f"steps {first} to {steps}, collected {collected}")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     train(folder, 3)
      ...     train(folder, 5)
      steps 0 to 3, collected 3
      steps 3 to 5, collected 5
    """
    root = _local(folder)
    own, others = _series(root, step_prefix)
    refused: dict[Path, str] = {}
    for step, path in own:
        record, damage = _checked(path)
        if record is None or damage:
            refused[path] = damage
            continue
        tree = _restore(path, record, target)
        left = {each: why for each, (number, why) in others.items() if number > step}
        for message in (*map(_put_aside, refused.items()), *map(_left, left.items())):
            text = f"{message}; the checkpoint of step {step} is restored"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return step, tree
    refused |= {path: why for path, (_, why) in others.items() if (path / _METADATA).exists()}
    if refused:
        causes = "; ".join(f"{path.name}: {why}" for path, why in refused.items())
        raise RuntimeError(
            f"folder={os.fspath(folder)!r}: every checkpoint is damaged, or not written by "
            f"swagjax.checkpoint.save; move them away to start anew ({causes})"
        )
    return None


def _local(folder: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(folder):
        raise ValueError(
            f"folder={os.fspath(folder)!r}: checkpoints are checked on local disks only"
        )
    return Path(folder).absolute()


def _series(root: Path, step_prefix: str | None) -> _Series:
    """What is named like the steps of the manager, whatever padding it gives to the numbers."""
    paths = [path for path in root.iterdir() if path.is_dir()] if root.exists() else []
    matches = [(re.fullmatch(_STEP, path.name), path) for path in paths]
    named = [(match[1] or "", int(match[2]), path) for match, path in matches if match]
    named = [each for each in named if step_prefix in (None, each[0])]
    foreign = {path: why for _, _, path in named if (why := _foreign(path))}
    prefixes = {prefix for prefix, _, path in named if path not in foreign}
    if len(prefixes) > 1:
        raise ValueError(
            f"folder={str(root)!r} has checkpoints with the prefixes {sorted(prefixes)}: say by "
            "step_prefix which to restore"
        )
    named = [each for each in named if each[0] in prefixes or not prefixes]
    own = sorted(((step, path) for _, step, path in named if path not in foreign), reverse=True)
    return _Series(own, {path: (n, foreign[path]) for _, n, path in named if path in foreign})


def _foreign(path: Path) -> str:
    """Why a folder is not one that ``save`` wrote under this name, or nothing."""
    if not os.path.lexists(path / _CHECKSUMS) and _mark(path) is None:
        return "was not written by swagjax.checkpoint.save"
    record, _ = _recorded(path)
    copied = record is not None and record.name != path.name
    return f"is a copy of {record.name}" if record and copied else ""


def _mark(path: Path) -> Any:
    """Which call of ``save`` made a checkpoint; None where orbax's metadata does not say."""
    try:
        return json.loads((path / _METADATA).read_bytes())["custom_metadata"][_MARK]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _recorded(path: Path) -> tuple[_Record | None, str]:
    """The content of the checksum file, or what is wrong with it."""
    try:
        crc32, _, content = (path / _CHECKSUMS).read_bytes().partition(b"\n")
        found = json.loads(content)
        files = {str(name): [int(n) for n in pair] for name, pair in found["files"].items()}
        record = _Record(str(found.get("name", path.name)), files, dict(found["leaves"]))
    except FileNotFoundError:
        return None, f"{_CHECKSUMS} is missing (killed while saving)"
    except OSError as error:
        return None, f"{_CHECKSUMS} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None, f"{_CHECKSUMS} is not as it was written"
    if crc32 != b"%08x" % zlib.crc32(content) or not files:
        return None, f"{_CHECKSUMS} is not as it was written"
    return record, ""


def _checked(path: Path) -> tuple[_Record | None, str]:
    """What was written of a checkpoint's files and leaves, and what is wrong with it, or nothing.

    Before orbax sees it: of a damaged one it may say anything, at any length, from any thread.
    """
    record, damage = _recorded(path)
    if record is None:
        return None, damage
    try:
        found = _files(path)
    except OSError as error:
        return record, f"{error.filename} cannot be read ({error.strerror})"
    for name, written in record.files.items():
        if name not in found:
            return record, f"{name} is missing"
        if found[name] != written:
            cut = found[name][0] != written[0]
            has = f"{found[name][0]} of its {written[0]}" if cut else "changed"
            return record, f"{name} has {has} bytes"
    return record, ""


def _restore(path: Path, record: _Record, target: Any) -> Any:
    """The tree of a checkpoint, with the fields that ``SWAGState`` has now."""
    old = _map_states(SWAGState, lambda state: _OldState(*state), target)
    if record.leaves != _kinds(target) and record.leaves == _kinds(old):
        return _map_states(_OldState, lambda state: SWAGState(*state), _read(path, old))
    _check_same_tree(path, record.leaves, _kinds(target))
    return _read(path, target)


def _read(path: Path, target: Any) -> Any:
    with ocp.StandardCheckpointer() as reader:
        # orbax calls an unnamed item "default"
        return reader.restore(path / "default", _abstract(target))


def _map_states(kind: type, change: Callable[[Any], Any], tree: Any) -> Any:
    def is_state(node: Any) -> bool:
        return isinstance(node, kind)

    return jax.tree.map(lambda x: change(x) if is_state(x) else x, tree, is_leaf=is_state)


def _check_same_tree(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    if saved == wanted:
        return
    name = next(n for n in (saved | wanted) if saved.get(n) != wanted.get(n))
    raise ValueError(
        f"target is another tree than the one in checkpoint {path}: leaf {name or 'itself'} is "
        f"{wanted.get(name, 'missing')} in target, {saved.get(name, 'missing')} in the checkpoint; "
        "build target as for the run that saved, or use another folder"
    )


def _put_aside(refused: tuple[Path, str]) -> str:
    """Rename a damaged checkpoint; the message that says so."""
    path, why = refused
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (f"{path.name}.refused{number}" for number in numbers)  # those of before stay
    aside = next(name for name in names if not os.path.lexists(path.parent / name))
    try:
        path.rename(path.parent / aside)
        done = f"was renamed to {aside}"
    except OSError as error:
        done = (
            f"could not be renamed ({error.strerror}): a manager saves no step up to it while it "
            "is there"
        )
    return f"checkpoint {path} is damaged ({why}) and {done}"


def _left(other: tuple[Path, str]) -> str:
    path, why = other
    return f"{path} {why} and stays: a manager takes it for a step, and saves none up to it"


def _files(path: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file under a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): _size_and_crc32(file) for file in files}


def _size_and_crc32(file: Path) -> list[int]:
    size = crc32 = 0
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            size, crc32 = size + len(block), zlib.crc32(block, crc32)
    return [size, crc32]


def _kinds(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf, such as float32[3, 4]."""

    def kind(leaf: Any) -> str:
        # Python numbers have the dtype that JAX gives them
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        return f"{dtype}{list(getattr(leaf, 'shape', ()))}"

    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): kind(leaf) for path, leaf in leaves}


def _abstract(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
