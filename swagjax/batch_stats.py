"""BatchNorm statistics of a sample: recomputed over training inputs, for linen and for nnx.

Weights drawn from a posterior never ran through training, so the running statistics that the
network kept belong to other weights. Each sample gets its own: the moments of each training batch,
averaged over the batches with weights proportional to their size. The variance is then the mean
of the variances within batches, as in the authors' code.

A *refresh* is a function ``params -> statistics``. ``swagjax.predict(..., refresh=...)`` calls it
for every sample and hands the statistics to ``prob_fn(params, inputs, statistics)``; the functions
here build one. Its arrays travel as arguments of the compiled program, not as constants of it.

The batch moments are read off the running statistics, whatever the momentum: BatchNorm computes
``new = momentum * old + (1 - momentum) * batch``, affine in ``old``, so two passes from known
statistics give the momentum, and a pass from zeros over 1 - momentum is the batch moment.

Source: Maddox et al. 2019 (arXiv:1902.02476), algorithm 1; Izmailov et al. 2018
(arXiv:1803.05407), section 3.2.
"""

import contextlib
import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from swagjax.transform import check_integer, widen

Refresh = Callable[[Any], Any]

# Statistics beside which batch moments are small, so that their difference is the momentum.
_FAR = 2.0**24

_STORED = (
    "prob_fn runs BatchNorm on stored statistics, which belong to other weights than the "
    "samples: let it take them, prob_fn(params, inputs, statistics), and pass "
    "refresh=batch_stats.linen(...) or .nnx(...) to recompute them for each sample, or "
    "refresh=batch_stats.keep(statistics) to keep these on purpose"
)


def linen(
    model: Any, batch_stats: Any, inputs: Any, *, batch_size: int = 256, **apply_kwargs: Any
) -> Refresh:
    """Build the refresh of a ``flax.linen`` model with a ``"batch_stats"`` collection.

    Args:
      model: the linen module.
      batch_stats: ``variables["batch_stats"]``, for its structure; floating values are not used.
      inputs: training inputs without augmentation, an array or a tree of arrays (N, ...).
      batch_size: how many of them pass at a time; the moments are those of such batches.
      **apply_kwargs: what puts ``model.apply`` into training mode, such as ``train=True``, and
        what else it asks for, such as ``rngs``.

    Returns:
      A function from params to a ``batch_stats`` collection.

    Raises:
      ValueError: for a batch size below one, inputs that are empty or differ in length; when it is
        called, for a model that is not in training mode and so leaves the statistics as they are.

    A model with further collections of variables, or with statistics that BatchNorm did not make
    (spectral norm's are not affine and become NaN), takes ``refresher``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from swagjax import batch_stats
      >>> model = nn.BatchNorm(momentum=0.99)
      >>> x = jnp.array([[1.0], [3.0], [5.0], [7.0]])
      >>> variables = model.init(jax.random.key(0), x, use_running_average=False)
      >>> refresh = batch_stats.linen(
      ...     model, variables["batch_stats"], x, batch_size=2, use_running_average=False
      ... )
      >>> stats = refresh(variables["params"])  # batches (1, 3) and (5, 7)
      >>> print(f"{stats['mean'][0]:.3f} {stats['var'][0]:.3f}")
      4.000 1.000
    """
    train_pass = jax.tree_util.Partial(_linen_pass, model, apply_kwargs)
    return refresher(train_pass, batch_stats, inputs, batch_size=batch_size)


def nnx(model: Any, inputs: Any, *, batch_size: int = 256) -> Refresh:
    """Build the refresh of a ``flax.nnx`` model whose statistics are ``nnx.BatchStat`` variables.

    Args:
      model: the nnx module, in any mode; it is not changed. It is called as ``model(batch)``,
        after ``model.train()``.
      inputs: training inputs without augmentation, an array or a tree of arrays (N, ...).
      batch_size: how many of them pass at a time.

    Returns:
      A function from params, ``nnx.state(model, nnx.Param)`` or a sample, to an ``nnx.State`` of
      statistics for ``nnx.merge(graphdef, params, statistics, rest)``.

    Raises:
      ValueError: for a model without batch statistics, or as in ``linen``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from swagjax import batch_stats
      >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> x = jnp.array([[1.0], [3.0], [5.0], [7.0]])
      >>> stats = batch_stats.nnx(model, x, batch_size=2)(nnx.state(model, nnx.Param))
      >>> print(f"{stats['mean'][0]:.3f} {stats['var'][0]:.3f}")
      4.000 1.000
    """
    from flax import nnx as flax_nnx  # in this room alone: the core does without flax

    trainer = flax_nnx.clone(model)
    trainer.train()
    graphdef, *states = flax_nnx.split(trainer, flax_nnx.Param, flax_nnx.BatchStat, ...)
    _, stats, rest = map(flax_nnx.as_pure, states)
    if not jax.tree.leaves(stats):
        raise ValueError("model has no nnx.BatchStat variables: predict needs no refresh")
    train_pass = jax.tree_util.Partial(_nnx_pass, graphdef, rest)
    return refresher(train_pass, stats, inputs, batch_size=batch_size)


def keep(batch_stats: Any) -> Refresh:
    """Build the refresh that gives every sample the same statistics: a choice, never a default.

    Right where nothing depends on the weights, wrong for BatchNorm after other layers: there the
    statistics of the last iterate are not those of a sample.

    Example:
      >>> from swagjax import batch_stats
      >>> batch_stats.keep({"mean": 0.0})({"params": 1.0})
      {'mean': 0.0}
    """
    return jax.tree_util.Partial(_constant, batch_stats)


def refresher(
    train_pass: Callable[[Any, Any, Any], Any],
    batch_stats: Any,
    inputs: Any,
    *,
    batch_size: int = 256,
) -> Refresh:
    """Build a refresh from one pass in training mode, for models that ``linen`` does not fit.

    Args:
      train_pass: ``(params, statistics, batch) -> new statistics``, affine in the statistics with
        one momentum a leaf. A leaf for which this does not hold becomes NaN.
      batch_stats: statistics of the structure that ``train_pass`` takes; leaves that are not
        floating point are kept as they are.
      inputs: training inputs, an array or a tree of arrays (N, ...).
      batch_size: how many of them pass at a time; a smaller last batch counts by its size.

    Returns:
      A function from params to statistics. Called often, it is worth a ``jax.jit``.

    Raises:
      ValueError: as in ``linen``.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import batch_stats
      >>> def train_pass(scale, mean, batch):
      ...     return 0.9 * mean + 0.1 * scale * batch.mean()
      >>> refresh = batch_stats.refresher(train_pass, jnp.zeros(()), jnp.arange(10.0))
      >>> print(f"{refresh(2.0):.3f}")
      9.000
    """
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(inputs)}
    if len(sizes) != 1 or not all(sizes) or (0,) in sizes:
        raise ValueError(f"inputs have lengths {sorted(sizes)}: give arrays of one length N > 0")
    check_integer("batch_size", batch_size, 1)
    (length,) = sizes.pop()
    size = min(batch_size, length)
    whole = length // size * size
    inputs = jax.tree.map(jnp.asarray, inputs)
    full = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), inputs)
    rest = jax.tree.map(lambda x: x[whole:], inputs)
    return jax.tree_util.Partial(_recompute, train_pass, batch_stats, full, rest)


@contextlib.contextmanager
def refuse_stored() -> Iterator[None]:
    """Refuse, while the body traces, a linen BatchNorm that runs on stored statistics.

    One inside a jitted function that was called before is not traced again, and not seen.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from swagjax import batch_stats
      >>> model, x = nn.BatchNorm(use_running_average=True), jnp.ones((2, 1))
      >>> variables = model.init(jax.random.key(0), x)
      >>> with batch_stats.refuse_stored():
      ...     model.apply(variables, x)
      Traceback (most recent call last):
      ...
      ValueError: prob_fn runs BatchNorm on stored statistics, which belong to other weights...
    """
    linen_module = sys.modules.get("flax.linen")
    if linen_module is None:  # never imported: no model of linen can run
        yield
        return

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, linen_module.BatchNorm) and context.method_name == "__call__":
            given = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
            if module.use_running_average if given is None else given:
                raise ValueError(_STORED)
        return call(*args, **kwargs)

    with linen_module.intercept_methods(intercept):
        yield


def refuse_closure(prob_fn: Any) -> None:
    """Refuse a function that refers to ``nnx.BatchStat`` variables, stored statistics in nnx.

    A look at what the function and those of its module that it calls close over, bind, default to
    or name, where that is a module, state or variable of nnx; not a proof.

    Example:
      >>> from flax import nnx
      >>> from swagjax import batch_stats
      >>> stats = nnx.state(nnx.BatchNorm(1, rngs=nnx.Rngs(0)), nnx.BatchStat)
      >>> batch_stats.refuse_closure(lambda params, x: (x - stats["mean"]) * params["scale"])
      Traceback (most recent call last):
      ...
      ValueError: prob_fn runs BatchNorm on stored statistics, which belong to other weights...
    """
    nnx_module = sys.modules.get("flax.nnx")
    if nnx_module is None:
        return

    def is_stat(node: Any) -> bool:
        return isinstance(node, nnx_module.BatchStat)

    kinds = (nnx_module.Module, nnx_module.State, nnx_module.Variable)
    held = [value for value in _referred(prob_fn) if isinstance(value, kinds)]
    if any(map(is_stat, jax.tree.leaves(held, is_leaf=is_stat))):
        raise ValueError(_STORED)


def _referred(function: Any) -> list[Any]:
    """What a function refers to, and what the functions of its module among that refer to."""
    home = _home(function)
    seen: set[int] = set()
    found: list[Any] = []
    waiting = [function]
    while waiting:
        bare = inspect.unwrap(waiting.pop())
        if id(bare) in seen:
            continue
        seen.add(id(bare))
        values = _named(bare)
        found += values
        waiting += [v for v in values if callable(v) and _home(v) == home]
    return found


def _home(function: Any) -> str | None:
    """Name of the module of a function, or of the one inside a partial, which has no own."""
    bare = inspect.unwrap(function)
    if isinstance(bare, functools.partial):
        return _home(bare.func)
    module: str | None = getattr(bare, "__module__", None)  # methods of builtin types have none
    return module


def _named(function: Any) -> list[Any]:
    """Values that a function binds, closes over, defaults to or finds by name in its module."""
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *function.keywords.values()]
    if not inspect.isfunction(function):
        return []
    empty = types.CellType()  # of a name that is assigned later
    closed = [cell.cell_contents for cell in function.__closure__ or () if cell != empty]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    names = [n for n in function.__code__.co_names if n in function.__globals__]
    return [*closed, *defaults, *(function.__globals__[n] for n in names)]


def _linen_pass(model: Any, apply_kwargs: Any, params: Any, batch_stats: Any, batch: Any) -> Any:
    variables = {"params": params, "batch_stats": batch_stats}
    _, new = model.apply(variables, batch, mutable=["batch_stats"], **apply_kwargs)
    return new["batch_stats"]


def _nnx_pass(graphdef: Any, rest: Any, params: Any, batch_stats: Any, batch: Any) -> Any:
    from flax import nnx as flax_nnx

    model = flax_nnx.merge(graphdef, params, batch_stats, rest)
    model(batch)
    return flax_nnx.as_pure(flax_nnx.state(model, flax_nnx.BatchStat))


def _constant(batch_stats: Any, params: Any) -> Any:
    del params
    return batch_stats


def _recompute(train_pass: Any, template: Any, full: Any, rest: Any, params: Any) -> Any:
    """Average the batch moments over the batches, weighted by size."""
    zeros = _filled(template, 0.0)
    # The momentum is the same for any batch: a few examples of the first will do.
    probe = jax.tree.map(lambda x: x[0, :8], full)
    at_zero = train_pass(params, zeros, probe)
    _check_changed(zeros, at_zero)
    share = jax.tree.map(
        _batch_share, template, at_zero, train_pass(params, _filled(template, _FAR), probe)
    )

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        weight = len(_first(batch))
        new = train_pass(params, zeros, batch)
        return jax.tree.map(lambda t, n, s: t + weight * n / s, total, new, share), None

    total = jax.tree.map(lambda z, s: jnp.zeros(jnp.shape(z), s.dtype), zeros, share)
    total, _ = jax.lax.scan(add, total, full)
    if len(_first(rest)):
        total, _ = add(total, rest)
    count = math.prod(_first(full).shape[:2]) + len(_first(rest))
    return jax.tree.map(lambda s, t: t / count if _is_float(s) else s, template, total)


def _check_changed(old: Any, new: Any) -> None:
    """A pass that hands back the very statistics it was given was none in training mode."""
    same = jax.tree.map(lambda a, b: a is b, old, new)
    if all(jax.tree.leaves(same)):
        raise ValueError(
            "the pass over training inputs left all statistics as they were: put the model into "
            "training mode, for linen with what its __call__ asks for, such as train=True"
        )


def _batch_share(leaf: Any, at_zero: jax.Array, at_far: jax.Array) -> jax.Array:
    """1 - momentum of a leaf: its median over the features, NaN where it differs between them.

    Taken per feature it would lose digits at a momentum such as 0.999.
    """
    if not _is_float(leaf):
        return jnp.ones(())  # kept as it is, whatever a pass makes of it
    momentum = widen(at_far - at_zero) / _FAR
    median = jnp.median(momentum)
    affine = (jnp.abs(momentum - median) <= 1e-3).all()
    return jnp.where(affine, 1 - median, jnp.nan)


def _filled(template: Any, value: float) -> Any:
    return jax.tree.map(lambda s: jnp.full_like(s, value) if _is_float(s) else s, template)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _first(tree: Any) -> jax.Array:
    leaf: jax.Array = jax.tree.leaves(tree)[0]
    return leaf
