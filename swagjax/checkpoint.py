"""Crash and resume: orbax checkpoints that are checked before they are read.

The only room that imports orbax (``pip install swagjax[checkpoint]``). Orbax commits a checkpoint
by renaming its finished folder, so that a process killed at any moment leaves no half of one under
the name of a step, and it keeps counters, ring buffer and typed random keys bit for bit. What it
lacks, and what is here, are checksums (an array file with a changed bit is restored without a word)
and the step back from a damaged checkpoint to the one before it.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

_CHECKSUMS = "SWAGJAX_CHECKSUMS"  # this file in the folder of a step, written last


def save(manager: ocp.CheckpointManager, step: int, tree: Any) -> bool:
    """Save a tree as the checkpoint of a step, then the CRC-32 of each file that was written.

    ``manager.save(step, args=ocp.args.StandardSave(tree))``, which it waits for, and the file
    ``SWAGJAX_CHECKSUMS`` beside what orbax wrote, by which ``restore_latest`` tells what was
    damaged later. A checkpoint without it, of a process killed in between, counts as damaged.

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
    if not manager.save(step, args=ocp.args.StandardSave(tree)):
        return False
    manager.wait_until_finished()
    path = dict(_newest_first(manager.directory))[step]
    content = json.dumps({"files": _files(path), "leaves": _kinds(tree)}).encode()
    unfinished = path / f"{_CHECKSUMS}.tmp"
    unfinished.write_bytes(b"%08x\n%s" % (zlib.crc32(content), content))
    unfinished.rename(path / _CHECKSUMS)
    return True


def restore_latest(folder: str | os.PathLike[str], target: Any) -> tuple[int, Any] | None:
    """Restore the newest checkpoint in a folder whose files are those that were written.

    A newer one with files that are cut short, changed or missing is refused: a ``RuntimeWarning``
    says why, and its folder ``<step>`` is renamed to ``<step>.refused``, so that the run can save
    that step again. Call it before the ``CheckpointManager`` is made, which lists the steps once.

    Args:
      folder: the folder of the ``CheckpointManager`` by which ``save`` wrote.
      target: a tree like the one saved, of arrays or of ``jax.ShapeDtypeStruct``. NamedTuples are
        restored as such because ``target`` has them: ``jax.eval_shape(tx.init, params)`` is the
        target of an optimizer state. Arrays take the sharding that ``target`` gives, or else the
        one they were saved with. Weak types become strong ones.

    Returns:
      The step and the tree; None where the folder holds no checkpoint or does not exist.

    Raises:
      ValueError: if the newest undamaged checkpoint is of another tree than ``target``: other
        leaves, shapes or dtypes. No older one is tried then.
      RuntimeError: if there are checkpoints but all are damaged; they stay where they are.

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
    refused: dict[Path, str] = {}
    for step, path in _newest_first(folder):
        record, damage = _checked(path)
        if damage:
            refused[path] = damage
            continue
        _check_same_tree(path, record["leaves"], _kinds(target))
        with ocp.StandardCheckpointer() as reader:
            # orbax calls an unnamed item "default"
            tree = reader.restore(path / "default", _abstract(target))
        for each, why in refused.items():
            warnings.warn(_put_aside(each, why, step), RuntimeWarning, stacklevel=2)
        return step, tree
    if refused:
        causes = "; ".join(f"{path.name}: {why}" for path, why in refused.items())
        raise RuntimeError(
            f"folder={os.fspath(folder)!r}: every checkpoint is damaged, move them away to start "
            f"anew ({causes})"
        )
    return None


def _newest_first(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """The committed steps, under whatever prefix or padding the manager gave them."""
    if "://" in os.fspath(folder):
        raise ValueError(
            f"folder={os.fspath(folder)!r}: checkpoints are checked on local disks only"
        )
    root = Path(folder).absolute()
    paths = root.iterdir() if root.exists() else ()
    named = [(re.fullmatch(r"(?:.+_)?(\d+)", path.name), path) for path in paths]
    return sorted(((int(name[1]), path) for name, path in named if name), reverse=True)


def _checked(path: Path) -> tuple[dict[str, Any], str]:
    """What was written of a checkpoint's files and leaves, and what is wrong with it, or nothing.

    Before orbax sees it: of a damaged one it may say anything, at any length, from any thread.
    """
    if not (path / _CHECKSUMS).exists():
        return {}, f"{_CHECKSUMS} is missing (killed while saving, or saved by orbax alone)"
    crc32, _, content = (path / _CHECKSUMS).read_bytes().partition(b"\n")
    if crc32 != b"%08x" % zlib.crc32(content):
        return {}, f"{_CHECKSUMS} is not as it was written"
    record = json.loads(content)
    found = _files(path)
    for name, (size, crc) in record["files"].items():
        if name not in found:
            return record, f"{name} is missing"
        if found[name] != [size, crc]:
            has = f"{found[name][0]} of its {size}" if found[name][0] != size else "changed"
            return record, f"{name} has {has} bytes"
    return record, ""


def _check_same_tree(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    if saved == wanted:
        return
    name = next(n for n in (saved | wanted) if saved.get(n) != wanted.get(n))
    raise ValueError(
        f"target is another tree than the one in checkpoint {path}: leaf {name or 'itself'} is "
        f"{wanted.get(name, 'missing')} in target, {saved.get(name, 'missing')} in the checkpoint; "
        "build target as for the run that saved, or use another folder"
    )


def _put_aside(path: Path, why: str, step: int) -> str:
    """Rename a damaged checkpoint; the message that says so."""
    aside = path.parent / f"{path.name}.refused"
    shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
    path.rename(aside)
    return (
        f"checkpoint {path} is damaged ({why}) and was renamed to {aside.name}; "
        f"that of step {step} is restored"
    )


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
