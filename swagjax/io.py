"""A posterior as a file, and the checkpoints of the authors' PyTorch code as a posterior.

The only room that imports safetensors (``pip install swagjax[io]``), a format of arrays and text
that runs no code when it is read. ``load`` trusts nothing: structure, shapes, dtypes and counters
are checked before a state is made of them, and what is wrong is a ``ValueError`` that names the
file. There are no checksums: changed values are not noticed.

A file holds the counters as ``step``, ``count`` and ``skipped``, and every leaf under its field and
its path in the parameters, such as ``mean/Dense_0/kernel``; any safetensors reader can read it.
"""

import collections
import difflib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save_file

from swagjax.transform import SWAGState, check_integer, get_state, swag

Layout = Callable[[NDArray[Any]], NDArray[Any]]  # moves the entries of an array

_StrPath = str | os.PathLike[str]
_Spec = tuple[str, tuple[int, ...]]  # dtype in the code of safetensors, and shape

_FORMAT = "1"
_OWN = "swagjax."  # how the keys of our own metadata begin
_HOLE = _OWN + "hole/"
# What a file calls the counters, and the fields that hold them.
_COUNTERS = {"step": "num_updates", "count": "num_collected", "skipped": "num_skipped"}
_FIELDS = ("mean", "variance", "deviations")
_FLOATS = {"F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32, "F64": np.float64}
_CODES = {np.dtype(dtype): code for code, dtype in _FLOATS.items()} | {np.dtype("int32"): "I32"}
_RING = "_cov_mat_sqrt"
_KINDS = {"None": None, "MaskedNode": optax.MaskedNode()}
_BATCH_NORM = ("running_mean", "running_var", "num_batches_tracked")


def save(path: _StrPath, state: SWAGState, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state to a file, bit for bit.

    The file appears under its name when it is complete: a process killed while it writes leaves
    the file that was there before, and a temporary folder beside it.

    Args:
      path: the file; one that exists is replaced, and where the path is a symbolic link, the file
        that it points to.
      state: what a transformation collected, or an optimizer state that holds one; also of members
        stacked by ``vmap``. Sharded arrays are gathered in the memory of the host.
      metadata: text to keep with it, such as the name of the model.

    Raises:
      ValueError: for metadata that is not text, leaves whose paths read the same, dtypes other than
        float16, bfloat16, float32 and float64, counters and shapes that do not belong together, and
        arrays with parts on other hosts.
      OSError: where the file cannot be written, or the path is a folder or a device.

    Example:
      >>> import pathlib, tempfile, jax.numpy as jnp, swagjax
      >>> from swagjax import io
      >>> tx, params = swagjax.swag(rank=2), {"w": jnp.array([1.0])}
      >>> _, state = tx.update({"w": jnp.array([2.0])}, tx.init(params), params)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "posterior.safetensors"
      ...     io.save(path, state, metadata={"model": "a line"})
      ...     loaded = io.load(path, params)
      ...     print(loaded.num_collected, loaded.mean, io.read_metadata(path))
      1 {'w': Array([3.], dtype=float32)} {'model': 'a line'}
    """
    state = get_state(state)
    fields = [field for field in _FIELDS if getattr(state, field) is not None]
    tensors = {name: _gather(name, getattr(state, field)) for name, field in _COUNTERS.items()}
    for field in fields:
        for name, leaf in _held(getattr(state, field)).items():
            tensors[_tensor(field, name)] = _gather(_tensor(field, name), leaf)
    specs = {name: (_code(name, x), x.shape) for name, x in tensors.items()}
    shapes = {name: specs[_tensor("mean", name)][1] for name in _held(state.mean)}
    _check_specs("state", specs, fields, shapes)
    _check_counters("state", tensors)
    own = {_OWN + "format": _FORMAT, _OWN + "fields": " ".join(fields)}
    own |= {_HOLE + name: kind for name, kind in _holes(state.mean).items()}
    _write(Path(path), tensors, own | _check_metadata(metadata or {}))


def load(path: _StrPath, like: Any) -> SWAGState:
    """Read a state that ``save`` wrote.

    Args:
      path: the file.
      like: the parameters, arrays or ``jax.ShapeDtypeStruct``: they give structure, containers and
        shapes, and no dtypes. Leaves that the state did not hold (masked, frozen) may be there.

    Returns:
      The state as ``swagjax.get_state`` found it, on the default device;
      ``jax.device_put(state, shardings)`` moves it elsewhere.

    Raises:
      ValueError: for a file that is damaged, not written by ``save``, or of other parameters, and
        for float64 where ``jax_enable_x64`` is not set.
      OSError: where there is no file to read.

    Example:
      >>> import pathlib, tempfile, jax, jax.numpy as jnp, swagjax
      >>> from swagjax import io
      >>> params = {"w": jnp.zeros(3)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "posterior.safetensors"
      ...     io.save(path, swagjax.swag_diag().init(params))
      ...     print(io.load(path, jax.eval_shape(lambda: params)).deviations)
      ...     _ = path.write_bytes(path.read_bytes()[:-1])
      ...     io.load(path, params)
      Traceback (most recent call last):
      ...
      ValueError: ...posterior.safetensors is damaged or no safetensors file: ...
    """
    with _open(path) as file:
        fields, holes = _header(path, file)
        template = _template(_cut(path, like, holes))
        shapes = {name: tuple(leaf.shape) for name, leaf in _held(template.mean).items()}
        names = file.keys()
        specs = {name: _spec(file, name) for name in names}
        _check_specs(str(path), specs, fields, shapes)
        _check_precision(path, specs)
        tensors = {name: _read(path, file, name) for name in specs}
    _check_counters(str(path), tensors)
    kept = {field: _rebuild(field, getattr(template, field), tensors) for field in fields}
    return SWAGState(
        **{field: jnp.asarray(tensors[name]) for name, field in _COUNTERS.items()},
        mean=kept["mean"],
        variance=kept.get("variance"),
        deviations=kept.get("deviations"),
    )


def read_metadata(path: _StrPath) -> dict[str, str]:
    """Read the metadata that was given to ``save``. Errors as those of ``load``.

    Example:
      >>> import pathlib, tempfile, jax.numpy as jnp, swagjax
      >>> from swagjax import io
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "posterior.safetensors"
      ...     io.save(path, swagjax.swa().init(jnp.zeros(3)), metadata={"epochs": "300"})
      ...     io.read_metadata(path)
      {'epochs': '300'}
    """
    with _open(path) as file:
        _header(path, file)
        metadata: dict[str, str] = file.metadata()
    return {key: text for key, text in metadata.items() if not key.startswith(_OWN)}


def from_torch(
    arrays: Mapping[str, ArrayLike],
    like: Any,
    name: Callable[[str], tuple[str, Layout | None]],
    *,
    rank: int | None = None,
) -> SWAGState:
    """Make a state of a checkpoint of the authors' PyTorch code, so that it can be sampled here.

    Their ``SWAG`` in ``swa_gaussian`` keeps of a parameter ``w`` the buffers ``w_mean``,
    ``w_sq_mean`` and, with a covariance, ``w_cov_mat_sqrt``, whose rows are the last deviations
    from the running mean, the oldest first; and ``n_models``, the number of iterates. With them:

        mean       = w_mean
        variance   = max(w_sq_mean - w_mean^2, 0)     (in float64)
        deviations = rows of w_cov_mat_sqrt, in the order of the ring
        num_collected = num_updates = n_models,  num_skipped = 0

    Their ``SWAG`` in ``drbayes`` (subspace inference) keeps the same of all parameters at once:
    the vectors ``mean`` and ``sq_mean`` and the rows of ``subspace.cov_mat_sqrt``. They are cut by
    the shapes of ``base_model.*``, in the order of the state dict; ``name`` then gives keys such as
    ``"base_model.fc.weight"``.

    The two clamp ``w_sq_mean - w_mean^2`` from below, ``swa_gaussian`` at 1e-30 and ``drbayes`` at
    1e-6, which is ``min_variance=1e-6`` here and matters: weights often vary less.

    Their second moment is not centred: a float32 checkpoint knows the variance of a weight to about
    1e-7 times the square of that weight. Their ``scale=0.5`` is ``scale=1.0`` here. The low-rank
    part is divided by the number of deviations held less one, here and in ``drbayes``;
    ``swa_gaussian`` divides by ``max_num_models - 1`` even where fewer were collected.

    Where PyTorch is installed, ``torch.load(path, map_location="cpu", weights_only=True)`` and
    ``{k: v.numpy() for k, v in checkpoint["state_dict"].items()}`` give the arrays;
    ``numpy.savez`` or safetensors carry them to where it is not.

    Args:
      arrays: the state dict, its values NumPy arrays. Buffers of BatchNorm, ``running_mean``,
        ``running_var`` and ``num_batches_tracked``, are passed over; any other key has to be used.
        The vectors of ``drbayes`` need the order of the state dict, which ``numpy.savez`` keeps and
        safetensors does not.
      like: the parameters, arrays or ``jax.ShapeDtypeStruct``; leaves that are ``None`` or
        ``optax.MaskedNode`` are left out.
      name: a function from the path of a leaf, such as ``"Dense_0/kernel"``, to the key of its
        parameter in PyTorch, such as ``"base.fc.weight"``, and its layout: a function that moves
        the entries of an array from their shape to ours, or None where they are the same.
        ``flax_names`` makes one; the ``__getitem__`` of a dict is another.
      rank: rows of the ring, at least 2; by default as many as there are deviations. Fewer keep the
        latest, more are possible where no iterate was dropped yet.

    Returns:
      A state in the dtypes of ``swag(rank).init(like)``; without deviations (SWAG-Diag) where the
      checkpoint has none.

    Raises:
      ValueError: for keys that are missing, used twice or not at all, for shapes that do not agree,
        for a linear layer that seems to read a flattened convolution and whose layout
        ``flax_names`` chose, and for a bad ``rank`` or ``n_models``.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, swagjax
      >>> from swagjax import io
      >>> arrays = {  # of a torch.nn.Linear(3, 2) named fc; two iterates
      ...     "n_models": np.array([2]),
      ...     "base.fc.weight_mean": np.full((2, 3), 2.0, np.float32),
      ...     "base.fc.weight_sq_mean": np.full((2, 3), 5.0, np.float32),
      ...     "base.fc.weight_cov_mat_sqrt": np.array([[0.0] * 6, [1.0] * 6], np.float32),
      ...     "base.fc.bias_mean": np.zeros(2, np.float32),
      ...     "base.fc.bias_sq_mean": np.zeros(2, np.float32),
      ...     "base.fc.bias_cov_mat_sqrt": np.zeros((2, 2), np.float32),
      ... }
      >>> params = {"Dense_0": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
      >>> state = io.from_torch(arrays, params, io.flax_names({"Dense_0": "base.fc"}))
      >>> print(state.num_collected, state.variance["Dense_0"]["kernel"].ravel())
      2 [1. 1. 1. 1. 1. 1.]
      >>> swagjax.sample(jax.random.key(0), state)["Dense_0"]["kernel"].shape
      (3, 2)

    Source: Maddox et al. 2019, algorithm 1, as in github.com/wjmaddox/swa_gaussian,
    ``swag/posteriors/swag.py``; Izmailov et al. 2019, as in github.com/wjmaddox/drbayes,
    ``subspace_inference/posteriors/swag.py``.
    """
    arrays = _by_parameter(arrays)
    template = _template(like)
    held = _held(template.mean)
    parameters = {path: _parameter(name, path) for path in held}
    has_ring = any(key.endswith(_RING) for key in arrays)
    if rank is not None and not has_ring:
        raise ValueError(f"rank={rank}: arrays holds no deviations ({_RING}); leave rank out")
    keys = {path: key for path, (key, _) in parameters.items()}
    _check_keys(arrays, keys, has_ring)
    _check_flattened(arrays, parameters)
    count = _count(arrays)
    source = _source(arrays, keys.values(), count, rank) if has_ring else None
    tensors = {}
    for path, (key, layout) in parameters.items():
        order = _order(path, key, layout, np.shape(arrays[key + "_mean"]), held[path].shape)
        for field, array in _moments(arrays, key, source).items():
            tensors[_tensor(field, path)] = array[..., order].astype(held[path].dtype)
    return SWAGState(
        num_updates=jnp.asarray(count, jnp.int32),
        num_collected=jnp.asarray(count, jnp.int32),
        num_skipped=jnp.zeros((), jnp.int32),
        mean=_rebuild("mean", template.mean, tensors),
        variance=_rebuild("variance", template.variance, tensors),
        deviations=_rebuild("deviations", template.deviations, tensors) if has_ring else None,
    )


def flax_names(modules: Mapping[str, str]) -> Callable[[str], tuple[str, Layout | None]]:
    """Name the parameters of flax modules (linen or nnx) in PyTorch, for ``from_torch``.

    ``kernel`` becomes ``weight`` in the layout of ``kernel``; ``scale`` (of a normalization)
    and ``embedding`` become ``weight``, ``bias`` stays ``bias``. Other cases are put before it:

        special = {"Dense_0/kernel": ("base.fc.weight", io.flattened_kernel(16, 5, 5))}
        from_torch(arrays, params, lambda path: special.get(path) or names(path))

    The first linear layer after convolutions is the usual case: flattened, an image of theirs is
    (C, H, W) and one of flax (H, W, C). ``from_torch`` asks for the layout of a linear layer with a
    multiple of the channels as inputs, where a convolution comes before it in the state dict; it
    cannot tell where the layers were defined in another order.

    Args:
      modules: from the path of a module in the parameters, such as ``"Block_0/Conv_0"``, to its
        name in the state dict, such as ``"base.layer1.0.conv1"`` (the authors' ``SWAG`` puts
        ``base.`` before all of them, or ``base_model.``).

    Returns:
      The argument ``name`` of ``from_torch``. It raises ``ValueError`` for other paths.

    Example:
      >>> import numpy as np
      >>> from swagjax import io
      >>> names = io.flax_names({"Conv_0": "base.conv1", "BatchNorm_0": "base.bn1"})
      >>> names("BatchNorm_0/scale")
      ('base.bn1.weight', None)
      >>> key, layout = names("Conv_0/kernel")
      >>> key, layout(np.zeros((16, 6, 5, 3))).shape
      ('base.conv1.weight', (5, 3, 6, 16))
    """
    leaves = {
        "kernel": ("weight", _chosen_kernel),
        "scale": ("weight", None),
        "embedding": ("weight", None),
        "bias": ("bias", None),
    }

    def name(path: str) -> tuple[str, Layout | None]:
        module, _, leaf = path.rpartition("/")
        if module not in modules or leaf not in leaves:
            raise ValueError(
                f"modules says nothing of {path!r}: it names {_few(modules)}, and their leaves can "
                f"be {', '.join(leaves)}; name this one by hand, as in the docstring of flax_names"
            )
        theirs, layout = leaves[leaf]
        return f"{modules[module]}.{theirs}", layout

    return name


def kernel(weight: NDArray[Any]) -> NDArray[Any]:
    """Layout of the weight of ``torch.nn.Linear``, ``Conv1d``, ``Conv2d`` or ``Conv3d`` in flax.

    From (out, in, ...) to (..., in, out). Not of transposed convolutions.

    Example:
      >>> import numpy as np
      >>> from swagjax import io
      >>> io.kernel(np.zeros((10, 84))).shape, io.kernel(np.zeros((16, 6, 5, 3))).shape
      ((84, 10), (5, 3, 6, 16))
    """
    return np.moveaxis(weight, (0, 1), (-1, -2))


def flattened_kernel(channels: int, height: int, width: int) -> Layout:
    """Layout of a ``torch.nn.Linear`` that reads a flattened image, which is (C, H, W) there.

    In flax it is (H, W, C), so that the inputs are in another order; shapes cannot tell.

    Example:
      >>> import numpy as np
      >>> from swagjax import io
      >>> io.flattened_kernel(channels=2, height=1, width=3)(np.arange(6)[None]).ravel()
      array([0, 3, 1, 4, 2, 5])
    """

    def layout(weight: NDArray[Any]) -> NDArray[Any]:
        image = weight.reshape(-1, channels, height, width)
        return image.transpose(2, 3, 1, 0).reshape(-1, len(image))

    return layout


def _nodes(tree: Any) -> tuple[dict[str, Any], Any]:
    """Leaves and holes of a tree by the names of their paths, and its structure.

    A box of flax counts as a leaf: a file is the same with and without them.
    """

    def is_node(node: Any) -> bool:
        return _is_hole(node) or _is_box(node)

    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)
    names = [_name(path) for path, _ in flat]
    nodes = {name: node for name, (_, node) in zip(names, flat, strict=True)}
    if len(nodes) < len(names):
        twice = {name for name, number in collections.Counter(names).items() if number > 1}
        raise ValueError(f"several leaves have the path {_few(twice)}: rename one of them")
    return nodes, treedef


def _name(path: Any) -> str:
    name: str = jax.tree_util.keystr(path, simple=True, separator="/")
    return name


def _tensor(field: str, name: str) -> str:
    return f"{field}/{name}" if name else field


def _held(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by name."""
    return {name: jax.tree.leaves(node)[0] for name, node in _nodes(tree)[0].items() if _full(node)}


def _holes(tree: Any) -> dict[str, str]:
    """The holes of a tree by name, and of which kind they are."""
    nodes = _nodes(tree)[0].items()
    return {n: "None" if node is None else "MaskedNode" for n, node in nodes if not _full(node)}


def _template(like: Any) -> SWAGState:
    """What ``get_state`` finds after ``swag(...).init(like)``, with abstract arrays."""

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        # result_type narrows float64 without x64; from JAX 0.12 eval_shape warns where it does so
        return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x))

    return get_state(jax.eval_shape(swag(2).init, jax.tree.map(leaf, like)))


def _rebuild(field: str, template: Any, tensors: Mapping[str, NDArray[Any]]) -> Any:
    """A tree like ``template`` with the arrays of a field; holes and boxes stay as they are."""
    nodes, treedef = _nodes(template)

    def put(name: str, node: Any) -> Any:
        return jax.tree.map(lambda _: jnp.asarray(tensors[_tensor(field, name)]), node)

    return jax.tree.unflatten(treedef, [put(*item) for item in nodes.items()])


def _cut(path: _StrPath, like: Any, holes: Mapping[str, str]) -> Any:
    """The shapes of the parameters, with the holes that the file names."""
    met = set()

    def is_cut(key_path: Any, node: Any) -> bool:
        return _is_hole(node) or _name(key_path) in holes

    def cut(key_path: Any, node: Any) -> Any:
        name = _name(key_path)
        met.add(name)
        if name in holes and _full(node):
            return _KINDS[holes[name]]
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float32), node)

    tree = jax.tree.map_with_path(cut, like, is_leaf=is_cut, is_leaf_takes_path=True)
    if holes.keys() - met:
        raise ValueError(f"{path} has holes at {_few(holes.keys() - met)}, where like has nothing")
    return tree


def _full(node: Any) -> bool:
    """Whether there is an array in a node that is no container."""
    return bool(jax.tree.leaves(node))


def _is_hole(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _is_box(node: Any) -> bool:
    """Whether a node is a box of flax.linen, told by its interface: flax is no dependency."""
    return hasattr(node, "replace_boxed") and hasattr(node, "add_axis")


def _gather(name: str, leaf: Any) -> NDArray[Any]:
    """An array in the memory of the host, row by row as safetensors takes it."""
    if not (getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated):
        raise ValueError(
            f"{name} has parts on other hosts: gather the state first, with "
            "jax.experimental.multihost_utils.process_allgather(state, tiled=True)"
        )
    return np.asarray(jax.device_get(leaf), order="C")


def _code(name: str, array: NDArray[Any]) -> str:
    code = _CODES.get(array.dtype)
    if code is None:
        kinds = ", ".join(map(str, _CODES))
        raise ValueError(f"{name} has dtype {array.dtype}: a file holds {kinds}")
    return code


def _check_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str) or key.startswith(_OWN):
            raise ValueError(
                f"metadata[{key!r}]={text!r}: give text, under keys that do not begin with {_OWN}"
            )
    return dict(metadata)


def _write(path: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, str]) -> None:
    """Write beside the file, then rename: under its name a file is whole or not there."""
    path = Path(os.path.realpath(path))  # the rename would replace a symbolic link, not its target
    if path.exists() and not path.is_file():
        raise OSError(f"{path} cannot be replaced by a file: it is a folder or a device")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".swagjax-") as folder:
        new = Path(folder) / "state"
        new.touch()
        mode = (path if path.exists() else new).stat().st_mode
        try:
            save_file(tensors, new, metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        new.chmod(mode)  # safetensors 0.8 lets no one but the owner read what it wrote
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        new.replace(path)


def _open(path: _StrPath) -> Any:
    """Open a file and read its header; not by mmap, where a file cut short later ends Python."""
    try:
        return safetensors.safe_open(path, "numpy", backend="pread")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {_short(error)}") from error


def _header(path: _StrPath, file: Any) -> tuple[list[str], dict[str, str]]:
    """The fields that a file holds, and the holes of its trees with their kinds."""
    metadata: dict[str, str] = file.metadata() or {}
    version = metadata.get(_OWN + "format")
    if version != _FORMAT:
        raise ValueError(
            f"{path} has the format {_short(repr(version))}, and this version of swagjax reads "
            f"{_FORMAT!r}: it was written by a later version, or not by swagjax.io.save"
        )
    fields = metadata.get(_OWN + "fields", "").split()
    if fields != [field for field in _FIELDS if field in fields] or "mean" not in fields:
        raise ValueError(
            f"{path} is damaged: a state has the fields {_few(_FIELDS)}, not {_few(fields)}"
        )
    holes = {k.removeprefix(_HOLE): kind for k, kind in metadata.items() if k.startswith(_HOLE)}
    strange = set(holes.values()) - _KINDS.keys()
    if strange:
        raise ValueError(f"{path} is damaged: holes are {_few(_KINDS)}, not {_few(strange)}")
    return fields, holes


def _spec(file: Any, name: str) -> _Spec:
    tensor = file.get_slice(name)
    return tensor.get_dtype(), tuple(tensor.get_shape())


def _read(path: _StrPath, file: Any, name: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = file.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {_short(error)}") from error
    return array


def _check_specs(
    where: str, specs: Mapping[str, _Spec], fields: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check the names, dtypes and shapes of all tensors against the shapes of the parameters.

    The axes of ``count`` are those of members stacked by ``vmap``: they lead the axes of a leaf.
    """
    leaves = {_tensor(field, name): (field, name) for field in fields for name in shapes}
    missing = {*_COUNTERS, *leaves} - specs.keys()
    unknown = specs.keys() - {*_COUNTERS, *leaves}
    if missing or unknown:
        raise ValueError(
            f"{where} is damaged or not of these parameters: missing {_few(missing)}, "
            f"unknown {_few(unknown)}"
        )
    members = specs["count"][1]
    for name in _COUNTERS:
        shape = () if name == "step" and not specs[name][1] else members
        _check_spec(where, name, specs[name], ["I32"], shape)
    rank = _rank(where, specs, leaves, len(members))
    for tensor, (field, name) in leaves.items():
        lead, own = shapes[name][: len(members)], shapes[name][len(members) :]
        if lead != members:
            raise ValueError(
                f"{where} is of stacked members, count {list(members)}, and {name!r} of the "
                f"parameters has the shape {list(shapes[name])}"
            )
        ring = (rank,) if field == "deviations" else ()
        _check_spec(where, tensor, specs[tensor], [*_FLOATS], (*lead, *ring, *own))


def _rank(
    where: str, specs: Mapping[str, _Spec], leaves: Mapping[str, tuple[str, str]], axis: int
) -> int:
    """The rank of the first ring, which the others have to share."""
    rings = [specs[tensor][1] for tensor, (field, _) in leaves.items() if field == "deviations"]
    if not rings or len(rings[0]) <= axis:
        return 2
    rank = rings[0][axis]
    if not 2 <= rank <= np.iinfo(np.int32).max:
        raise ValueError(f"{where} has rings of {rank} rows: there are 2 at least")
    return rank


def _check_spec(
    where: str, name: str, spec: _Spec, codes: list[str], shape: tuple[int, ...]
) -> None:
    code, found = spec
    if code not in codes or found != shape:
        raise ValueError(
            f"{where}: {name!r} is {code} of shape {list(found)}, and has to be "
            f"{' or '.join(codes)} of shape {list(shape)}"
        )


def _check_counters(where: str, tensors: Mapping[str, NDArray[Any]]) -> None:
    step, count, skipped = (tensors[name].astype(np.int64) for name in _COUNTERS)
    if not ((count >= 0) & (skipped >= 0) & (count + skipped <= step)).all():
        raise ValueError(
            f"{where}: count={count} and skipped={skipped} do not go with step={step}: none is "
            "negative, and a step collects or skips one iterate at most"
        )


def _check_precision(path: _StrPath, specs: Mapping[str, _Spec]) -> None:
    wide = [name for name, (code, _) in specs.items() if code == "F64"]
    if wide and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ValueError(
            f"{path} holds float64 ({_few(wide)}), which JAX would silently hold in float32: set "
            "jax_enable_x64 first"
        )


def _few(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(_short(repr(name)) for name in names[:3]) or "none") + more


def _short(text: object) -> str:
    """The beginning of a text that a hostile file may have made long."""
    text = str(text)
    return text if len(text) <= 200 else text[:200] + "..."


def _parameter(
    name: Callable[[str], tuple[str, Layout | None]], path: str
) -> tuple[str, Layout | None]:
    """The key and the layout of a leaf."""
    try:
        key, layout = name(path)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"name({path!r}) does not return a key and a layout: {type(error).__name__} {error}"
        ) from error
    if not isinstance(key, str):
        raise ValueError(f"name({path!r}) returns the key {_short(repr(key))}: keys are strings")
    return key, layout


def _chosen_kernel(weight: NDArray[Any]) -> NDArray[Any]:
    """``kernel`` where ``flax_names`` chose it, not the user: see ``_check_flattened``."""
    return kernel(weight)


def _by_parameter(arrays: Mapping[str, ArrayLike]) -> Mapping[str, ArrayLike]:
    """The buffers of each parameter, also where the checkpoint has one vector of all of them."""
    strange = [key for key in arrays if not isinstance(key, str)]
    if strange:
        raise ValueError(
            f"arrays has the key {_short(repr(strange[0]))}: the keys of a state dict are strings"
        )
    prefixes = [key[: -len("sq_mean")] for key in arrays if key.rpartition(".")[2] == "sq_mean"]
    return _cut_vectors(arrays, prefixes[0]) if prefixes else arrays


def _cut_vectors(arrays: Mapping[str, ArrayLike], prefix: str) -> dict[str, ArrayLike]:
    """``mean``, ``sq_mean`` and the rows of ``subspace.cov_mat_sqrt`` cut into the parameters."""
    endings = {"mean": "_mean", "sq_mean": "_sq_mean", "subspace.cov_mat_sqrt": _RING}
    vectors = {prefix + name: end for name, end in endings.items() if prefix + name in arrays}
    shapes = _shapes_in_order(arrays, prefix)
    stops = np.cumsum([0, *(math.prod(shape) for shape in shapes.values())])
    used = {*vectors, *shapes, prefix + "subspace.rank"}
    cut = {key: array for key, array in arrays.items() if key not in used}
    for key, ending in vectors.items():
        vector = np.asarray(arrays[key])
        if vector.shape[-1:] != (stops[-1],):
            raise ValueError(
                f"{key!r} has shape {list(vector.shape)}, and the {len(shapes)} parameters "
                f"{prefix}base_model.* have {stops[-1]} entries: leave out buffers and tied weights"
            )
        for (name, shape), start, stop in zip(shapes.items(), stops, stops[1:], strict=False):
            part = vector[..., start:stop]
            cut[name + ending] = part if ending == _RING else part.reshape(shape)
    return cut


def _shapes_in_order(arrays: Mapping[str, ArrayLike], prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters in the order of the vectors, which is that of the state dict."""
    if prefix + "subspace.num_models" in arrays:
        raise ValueError(
            "arrays is of a FreqDirSpace, which keeps a sketch of the deviations: leave out the "
            "keys subspace.* to read it as SWAG-Diag"
        )
    base, keys = prefix + "base_model.", list(arrays)
    names = [k for k in keys if k.startswith(base) and k.rpartition(".")[2] not in _BATCH_NORM]
    if names and prefix + "mean" in arrays and keys.index(names[0]) < keys.index(prefix + "mean"):
        raise ValueError(
            f"arrays is not in the order of the state dict, where {prefix + 'mean'!r} comes before "
            f"{names[0]!r}: its vectors cannot be cut; carry it by numpy.savez, not by safetensors"
        )
    return {name: np.shape(arrays[name]) for name in names}


def _check_flattened(
    arrays: Mapping[str, ArrayLike], parameters: Mapping[str, tuple[str, Layout | None]]
) -> None:
    """Ask for the layout of a linear layer whose inputs are a multiple of the channels before it.

    Theirs is a flattened (C, H, W) then, ours (H, W, C), and only the sizes show it. Sizes of
    features met before, such as those of a BatchNorm or of another linear layer, are no image.
    """
    users = {key + "_mean": (path, layout) for path, (key, layout) in parameters.items()}
    channels, met = 0, set[int]()
    for buffer in (buffer for buffer in arrays if buffer in users):
        (path, layout), shape = users[buffer], np.shape(arrays[buffer])
        inputs = shape[1] if len(shape) == 2 and layout is _chosen_kernel else 0
        if channels > 1 and inputs > 0 and inputs % channels == 0 and inputs not in met:
            raise ValueError(
                f"{path!r} has {inputs} inputs, {inputs // channels} times the {channels} channels "
                "of the convolution before: if they are a flattened image, their order in flax is "
                f"another. Give the layout swagjax.io.flattened_kernel({channels}, height, width), "
                "or swagjax.io.kernel if they are not, as in the docstring of flax_names"
            )
        channels = shape[0] if len(shape) > 2 else channels
        met.update(shape if layout is None else shape[:1])


def _check_keys(arrays: Mapping[str, Any], keys: Mapping[str, str], has_ring: bool) -> None:
    """Check that every buffer is there, and used once."""
    endings = ("_mean", "_sq_mean", _RING) if has_ring else ("_mean", "_sq_mean")
    users: dict[str, str] = {}
    for path, key in keys.items():
        for buffer in (key + ending for ending in endings):
            if buffer in users:
                raise ValueError(f"name gives {key!r} to both {users[buffer]!r} and {path!r}")
            if buffer not in arrays:
                near = difflib.get_close_matches(buffer, arrays, 3)
                raise ValueError(
                    f"arrays lacks {buffer!r}, the key that name gives {path!r}; near it are "
                    f"{_few(near)}"
                )
            users[buffer] = path
    passed_over = (*_BATCH_NORM, "n_models")
    unused = [k for k in arrays if k not in users and k.rpartition(".")[2] not in passed_over]
    if unused:
        raise ValueError(
            f"arrays has keys that no leaf of like takes: {_few(unused)}; name a leaf for each, or "
            "leave them out"
        )


def _count(arrays: Mapping[str, ArrayLike]) -> int:
    """The number of iterates; a wrapper such as DataParallel puts a prefix before its key."""
    keys = [key for key in arrays if key.rpartition(".")[2] == "n_models"]
    values = [number for key in keys for number in np.ravel(arrays[key])]
    if len(values) != 1 or not 0 <= values[0] <= np.iinfo(np.int32).max or values[0] % 1:
        raise ValueError(f"n_models is {_short(values)}: arrays needs one key of it, one integer")
    return int(values[0])


def _source(
    arrays: Mapping[str, ArrayLike], keys: Iterable[str], count: int, rank: int | None
) -> NDArray[Any]:
    """For every row of the ring its row in ``cov_mat_sqrt``, -1 where nothing is written yet."""
    numbers = {len(np.atleast_1d(arrays[key + _RING])) for key in keys} or {0}
    held = min(numbers)
    if len(numbers) > 1 or held > count:
        raise ValueError(f"{_RING} has {sorted(numbers)} rows, n_models={count}")
    rank = max(held, 2) if rank is None else check_integer("rank", rank, 2)
    if held < min(count, rank):
        raise ValueError(
            f"rank={rank}: the checkpoint holds the last {held} of {count} deviations; give a "
            f"lower rank, or leave out the keys {_RING} to read it as SWAG-Diag"
        )
    age = (count - 1 - np.arange(rank)) % rank  # of the iterate in each row, 0 the latest
    return np.maximum(held - 1 - age, -1)


def _moments(
    arrays: Mapping[str, ArrayLike], key: str, source: NDArray[Any] | None
) -> dict[str, NDArray[Any]]:
    """Mean, variance and ring of one parameter in float64, the entries in one row as they have."""
    mean, square = _float64(arrays, key + "_mean"), _float64(arrays, key + "_sq_mean")
    rows = np.zeros((0, mean.size)) if source is None else _float64(arrays, key + _RING)
    if square.shape != mean.shape or rows.ndim != 2 or rows.shape[1] != mean.size:
        raise ValueError(
            f"the buffers of {key!r} do not agree: _mean is {list(mean.shape)}, _sq_mean "
            f"{list(square.shape)}, {_RING} {list(rows.shape)}"
        )
    moments = {"mean": mean.ravel(), "variance": np.maximum(square - mean**2, 0).ravel()}
    if source is not None:
        blank = np.zeros((1, mean.size))  # the row of the index -1
        moments["deviations"] = np.concatenate([rows, blank])[source]
    return moments


def _float64(arrays: Mapping[str, ArrayLike], key: str) -> NDArray[Any]:
    array = np.asarray(arrays[key])
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{key!r} has dtype {array.dtype}: moments are floating point arrays")
    return array.astype(np.float64)


def _order(
    path: str, key: str, layout: Layout | None, theirs: tuple[int, ...], ours: tuple[int, ...]
) -> NDArray[Any]:
    """Where each entry of a leaf is in their buffer: what the layout makes of 0, 1, 2, ..."""
    number = np.arange(math.prod(theirs)).reshape(theirs)
    try:
        order = number if layout is None else np.asarray(layout(number))
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"the layout of {path!r} does not take {key!r} of shape {list(theirs)}: {error}"
        ) from error
    if order.shape != ours:
        raise ValueError(
            f"{path!r} has shape {list(ours)} in like, and {key!r} {list(theirs)}, in its layout "
            f"{list(order.shape)}: name another key, or a layout such as swagjax.io.kernel"
        )
    if not np.array_equal(np.sort(order, axis=None), number.ravel()):
        raise ValueError(f"the layout of {path!r} does not only move the entries of {key!r}")
    return order
