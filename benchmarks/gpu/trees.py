"""Trees of arrays in one file each, whole or not at all whenever the process is killed."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

_ABOUT = "about"  # the one entry of a file that is no leaf


def save(path: Path, tree: Any, about: np.ndarray) -> None:
    """Write a tree, and an array about it, in place of what the file holds.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from benchmarks.gpu import trees
      >>> path = Path(tempfile.mkdtemp()) / "tree.npz"
      >>> trees.save(path, {"a": np.ones(2)}, np.arange(3))
      >>> trees.load(path, {"a": np.zeros(2)})
      ({'a': array([1., 1.])}, array([0, 1, 2]))
    """
    leaves = {str(i): leaf for i, leaf in enumerate(jax.device_get(jax.tree.leaves(tree)))}
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        np.savez(file, **leaves, **{_ABOUT: about})
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def load(path: Path, like: Any) -> tuple[Any, np.ndarray]:
    """The tree of a file, in the structure of ``like``, and the array about it.

    Raises:
      ValueError: where the file holds leaves of other shapes or dtypes.
    """
    wanted, treedef = jax.tree.flatten(like)
    with np.load(path) as file:
        leaves = [file[str(i)] for i in range(len(file.files) - 1)]
        about = file[_ABOUT]
    kinds = [[(x.shape, x.dtype) for x in of] for of in (leaves, wanted)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{path} holds another tree: start anew with --fresh")
    return jax.tree.unflatten(treedef, leaves), about
