"""BatchNorm statistics of a sample: recomputed over training inputs, for linen and for nnx.

Weights drawn from a posterior never ran through training, so the running statistics that the
network kept belong to other weights. Each sample gets its own: the moments of each training batch,
averaged over the batches with weights proportional to their size. The variance is then the mean
of the variances within batches, as in the authors' code.

A *refresh* is a function ``params -> statistics``. ``swagjax.predict(..., refresh=...)`` calls it
for every sample and hands the statistics to ``prob_fn(params, inputs, statistics)``; the functions
here build one. Its arrays travel as arguments of the compiled program, not as constants of it.
Training inputs that do not fit into memory come as a loader, an iterable of batches: ``predict``
then walks it once for all samples.

The batch moments are read off the running statistics, whatever the momentum: BatchNorm computes
``new = momentum * old + (1 - momentum) * batch``, affine in ``old``. Passes over one batch from
zeros and from a power of two far above any moment give the momentum without rounding, and a pass
from zeros over 1 - momentum is the batch moment. Both are in float32 at the least, whatever the
dtype of the statistics, and batches add up as deviations from the first.

The BatchNorm of flax computes its variance here as if ``use_fast_variance=False``, because
E[x^2] - E[x]^2 has no digits left where the mean is large beside the deviation; and as if without
``axis_name`` where no such axis is there, the batch being whole.

Dropout and other noise take another key for each batch and for each set of weights: it is folded
from the index of the batch and from the bits of the weights, so the same weights give the same
statistics again.

Source: Maddox et al. 2019 (arXiv:1902.02476), algorithm 1; Izmailov et al. 2018
(arXiv:1803.05407), section 3.2.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from swagjax import programs
from swagjax.transform import check_integer, wide_dtype, widen

Refresh = Callable[[Any], Any]

# Beside it moments of up to 2^76 vanish, so that it comes back as its product with the momentum.
_FAR = 2.0**100
_RAN_LONG = 2**30  # the count of a de-biased average whose bias is gone

_STORED = (
    "prob_fn runs BatchNorm on stored statistics, which belong to other weights than the "
    "samples: let it take them, prob_fn(params, inputs, statistics), and pass "
    "refresh=batch_stats.linen(...), .nnx(...) or .refresher(...) to recompute them for each "
    "sample, or refresh=batch_stats.keep(statistics) to keep these on purpose"
)
_TRAINING = (
    "prob_fn runs BatchNorm in training mode, on the moments of the inputs to be predicted: put "
    "the model into evaluation mode before it is split, by model.eval() of nnx or "
    "equinox.nn.inference_mode(model), or say {} in the call of the layer if it is meant"
)

# A layer's class is changed for as long as a thread traces: others wait with theirs.
_WATCHING = threading.RLock()


def linen(
    model: Any, batch_stats: Any, inputs: Any, *, batch_size: int = 256, **apply_kwargs: Any
) -> Refresh:
    """Build the refresh of a ``flax.linen`` model with a ``"batch_stats"`` collection.

    Args:
      model: the linen module.
      batch_stats: ``variables["batch_stats"]``, for its structure; floating values are not used.
      inputs: training inputs without augmentation: an array or a tree of arrays (N, ...), or a
        loader, an iterable of batches. A tuple or list of inputs is spread over the model's
        positional arguments, a dict is one argument.
      batch_size: how many of them pass at a time; the moments are those of such batches. A loader
        has batches of its own.
      **apply_kwargs: what puts ``model.apply`` into training mode, such as ``train=True``, and
        what else it asks for: ``rngs``, of which each batch and each set of weights gets its own;
        ``method``, a function ``(model, *inputs)`` for calls of another form.

    Returns:
      A function from params to a ``batch_stats`` collection.

    Raises:
      ValueError: for a batch size below one, inputs that are empty or differ in length; when it is
        called, for a model that is not in training mode and so leaves the statistics as they are,
        and outside ``jit`` for statistics that are not averages with one momentum (inside they
        become NaN).

    A model with further collections of variables, or with statistics that BatchNorm did not make
    (spectral norm's are not affine), takes ``refresher``. One that asks for a fixed batch size
    takes inputs cut to a multiple of it.

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

      A loader of (inputs, labels), walked at every call:

      >>> loader = [(x[:2], 0), (x[2:], 1)]
      >>> class Images:
      ...     def __iter__(self):
      ...         return (images for images, _ in loader)
      >>> refresh = batch_stats.linen(
      ...     model, variables["batch_stats"], Images(), use_running_average=False
      ... )
      >>> print(f"{refresh(variables['params'])['mean'][0]:.3f}")
      4.000
    """
    rngs = apply_kwargs.pop("rngs", None)
    train_pass = jax.tree_util.Partial(_linen_pass, model, apply_kwargs)
    return _refresher(train_pass, batch_stats, inputs, batch_size, rngs)


def nnx(
    model: Any,
    inputs: Any,
    *,
    batch_size: int = 256,
    rngs: Any = None,
    method: Any = None,
    **call_kwargs: Any,
) -> Refresh:
    """Build the refresh of a ``flax.nnx`` model whose statistics are ``nnx.BatchStat`` variables.

    Args:
      model: the nnx module, in any mode; it is not changed. It is called as ``model(batch)``,
        after ``model.train()``. Its streams of random numbers, those of its dropout layers, start
        from another key for each batch and each set of weights.
      inputs: training inputs without augmentation, as in ``linen``.
      batch_size: how many of them pass at a time.
      rngs: an ``nnx.Rngs``, for a model that is called as ``model(batch, rngs=rngs)``: also with
        another key each time.
      method: a function ``(model, *inputs, **call_kwargs)``, or the name of a method, to be called
        in place of the model.
      **call_kwargs: what else the call asks for, such as ``train=True``.

    Returns:
      A function from params, ``nnx.state(model, nnx.Param)`` or a sample, to an ``nnx.State`` of
      statistics for ``nnx.merge(graphdef, params, statistics, rest, copy=True)``. Without
      ``copy=True`` a model that writes a variable when called, a counter or a stream of random
      numbers, raises a ``TraceContextError`` in ``predict``.

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
    kinds = (flax_nnx.Param, flax_nnx.BatchStat, flax_nnx.RngKey, ...)
    graphdef, _, *states = flax_nnx.split(trainer, *kinds)
    stats, own_keys, rest = map(flax_nnx.as_pure, states)
    if not jax.tree.leaves(stats):
        raise ValueError("model has no nnx.BatchStat variables: predict needs no refresh")
    streams = flax_nnx.Rngs() if rngs is None else rngs
    given, *states = flax_nnx.split(streams, flax_nnx.RngKey, ...)
    given_keys, counts = map(flax_nnx.as_pure, states)
    call = _Call(graphdef, None if rngs is None else given, method, call_kwargs)
    train_pass = jax.tree_util.Partial(_nnx_pass, call, (rest, counts))
    return _refresher(train_pass, stats, inputs, batch_size, (own_keys, given_keys))


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
    train_pass: Callable[..., Any],
    batch_stats: Any,
    inputs: Any,
    *,
    batch_size: int = 256,
    rngs: Any = None,
) -> Refresh:
    """Build a refresh from one pass in training mode, for models that ``linen`` does not fit.

    Args:
      train_pass: ``(params, statistics, batch) -> new statistics``, affine in the statistics with
        one momentum a leaf, from 0 to below 1; ``(params, statistics, batch, rngs)`` if there are
        ``rngs``. It gets and returns float32 statistics, also where they are kept in bfloat16.
      batch_stats: statistics of the structure that ``train_pass`` takes. Signed integers that a
        pass changes count steps, as those of averages that are de-biased by
        ``1 - momentum ** count``: they are set to 2^30, where the bias is gone. Leaves of other
        kinds are kept as they are.
      inputs: training inputs, an array or a tree of arrays (N, ...), or a loader, an iterable of
        such batches: it is walked once for each call, or once in ``predict`` for all samples.
      batch_size: how many of them pass at a time; a smaller last batch counts by its size.
      rngs: a PRNG key or a tree of them, folded for each batch and for each set of weights.

    Returns:
      A function from params to statistics, in float32 at the least. Called often, it is worth a
      ``jax.jit``, unless ``inputs`` is a loader.

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

      For Equinox, with statistics of a model that has just been made:

      >>> import equinox as eqx, jax
      >>> model, fresh = eqx.nn.make_with_state(eqx.nn.BatchNorm)(2, "batch", mode="batch")
      >>> params, static = eqx.partition(model, eqx.is_inexact_array)
      >>> def train_pass(params, state, batch):
      ...     model = eqx.combine(params, static)
      ...     run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
      ...     return run(batch, state)[1]
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> state = batch_stats.refresher(train_pass, fresh, x)(params)
      >>> evaluated, _ = eqx.nn.inference_mode(model)(jnp.array([2.0, 6.0]), state)
      >>> print(evaluated.round(3))
      [0. 1.]
    """
    return _refresher(train_pass, batch_stats, inputs, batch_size, rngs)


class Walk:
    """The refresh over a loader: ``params -> statistics``, outside ``jit``, in one walk.

    What ``linen``, ``nnx`` and ``refresher`` return where ``inputs`` is an iterable of batches.
    """

    def __init__(self, train_pass: Any, batch_stats: Any, batches: Iterable[Any], rngs: Any):
        self._template, self._batches = batch_stats, batches
        self._start = jax.tree_util.Partial(_started, train_pass, batch_stats, rngs)
        self._add = jax.tree_util.Partial(_added, train_pass, rngs)

    def __call__(self, params: Any) -> Any:
        """Walk the loader for one set of weights."""

        def run(step: Any, inputs: Any, sums: Any) -> Any:
            arrays, static = programs.separate(step, "model or train_pass")
            return _step(arrays, params, inputs, sums, static)

        return self.walk(run)

    def walk(self, run: Callable[[Any, Any, Any], Any]) -> Any:
        """Walk the loader, every step by ``run(step, inputs, sums)``: step(params, inputs, sums).

        ``run`` may add leading axes to the sums, of the samples: the result has them too.
        """
        sums, seen = None, 0
        for index, batch in enumerate(self._batches):
            batch = jax.tree.map(jnp.asarray, batch)
            seen += (length := _length(batch))
            if sums is None:
                sums = run(self._start, batch, None)
                _check_outside(sums)
            else:
                sums = run(self._add, (batch, index, length / seen), sums)
        if sums is None:
            raise ValueError(
                "inputs gave no batch: give an iterable that starts anew each time, such as a "
                "loader; a generator can be walked only once"
            )
        return _finished(self._template, sums)


def is_loader(inputs: Any) -> bool:
    """Whether ``inputs`` are an iterable of batches, not an array nor a tree of arrays.

    Example:
      >>> from swagjax import batch_stats
      >>> batch_stats.is_loader(iter([1])), batch_stats.is_loader([1])
      (True, False)
    """
    if isinstance(inputs, Iterator):  # first: JAX warns of one among its trees
        return True
    if not isinstance(inputs, Iterable) or hasattr(inputs, "shape"):
        return False
    leaves = jax.tree.leaves(inputs)
    return len(leaves) == 1 and leaves[0] is inputs


@contextlib.contextmanager
def refuse_stored() -> Iterator[None]:
    """Refuse, while the body traces, a BatchNorm that runs on stored statistics.

    One of flax linen, flax nnx or Equinox; and also what ``refuse_training`` refuses. One inside a
    jitted function that was called before is not traced again, and not seen.

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
    with _refuse_linen(), _refuse(stored=True):
        yield


@contextlib.contextmanager
def refuse_training() -> Iterator[None]:
    """Refuse, while the body traces, a BatchNorm of nnx or Equinox that was left in training mode.

    Told so by the model, not by an argument of the call. (In linen it takes ``mutable``.)

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from swagjax import batch_stats
      >>> with batch_stats.refuse_training():
      ...     nnx.BatchNorm(1, rngs=nnx.Rngs(0))(jnp.ones((2, 1)))
      Traceback (most recent call last):
      ...
      ValueError: prob_fn runs BatchNorm in training mode, on the moments of the inputs to be...
    """
    with _refuse(stored=False):
        yield


@contextlib.contextmanager
def _refuse_linen() -> Iterator[None]:
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


@contextlib.contextmanager
def _refuse(*, stored: bool) -> Iterator[None]:
    """Look at each call of a BatchNorm of nnx or Equinox, which have no interceptors."""

    def look(asked: str, own: bool | None, given: bool | None) -> None:
        evaluates = own if given is None else given
        if evaluates and stored:
            raise ValueError(_STORED)
        if given is None and own is False:
            raise ValueError(_TRAINING.format(f"{asked}=False"))

    def nnx_look(layer: Any, x: Any, use_running_average: Any = None, **_: Any) -> None:
        look("use_running_average", layer.use_running_average, use_running_average)

    def equinox_look(layer: Any, *_: Any, inference: Any = None, **__: Any) -> None:
        look("inference", layer.inference, inference)

    with contextlib.ExitStack() as stack:
        for name, inspect in (("flax.nnx", nnx_look), ("equinox.nn", equinox_look)):
            if name in sys.modules:
                stack.enter_context(_watched(sys.modules[name].BatchNorm, inspect))
        yield


@contextlib.contextmanager
def _watched(layer: type, look: Callable[..., None]) -> Iterator[None]:
    """Show the calls of a class to ``look`` first, those of this thread."""
    with _WATCHING:
        own, thread = vars(layer)["__call__"], threading.get_ident()

        @functools.wraps(own)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                look(self, *args, **kwargs)
            return own(self, *args, **kwargs)

        setattr(layer, "__call__", call)  # noqa: B010
        try:
            yield
        finally:
            setattr(layer, "__call__", own)  # noqa: B010


def _linen_pass(
    model: Any, apply_kwargs: Any, params: Any, batch_stats: Any, batch: Any, rngs: Any = None
) -> Any:
    variables = {"params": params, "batch_stats": batch_stats}
    options = {**apply_kwargs, "rngs": rngs, "mutable": ["batch_stats"]}
    _, new = model.apply(variables, *_arguments(batch), **options)
    return new["batch_stats"]


class _Call(NamedTuple):
    """How a model of nnx is called: its graph, that of the streams it is given, and arguments."""

    graphdef: Any
    rngs: Any
    method: Any
    kwargs: Any


def _nnx_pass(call: _Call, rest: Any, params: Any, batch_stats: Any, batch: Any, keys: Any) -> Any:
    from flax import nnx as flax_nnx

    (own_keys, given_keys), (own, counts), kwargs = keys, rest, call.kwargs
    if call.rngs is not None:
        kwargs = {**kwargs, "rngs": flax_nnx.merge(call.rngs, given_keys, counts)}
    model = flax_nnx.merge(call.graphdef, params, batch_stats, own_keys, own, copy=True)
    for _, layer in flax_nnx.iter_modules(model):
        if isinstance(layer, flax_nnx.BatchNorm):
            _set(layer, **_whole_batch(layer))
    if callable(call.method):
        call.method(model, *_arguments(batch), **kwargs)
    else:
        getattr(model, call.method or "__call__")(*_arguments(batch), **kwargs)
    return flax_nnx.as_pure(flax_nnx.state(model, flax_nnx.BatchStat))


def _arguments(batch: Any) -> Any:
    """A plain tuple or list is spread; a named one, such as a graph, is one argument."""
    return batch if type(batch) in (tuple, list) else (batch,)


@contextlib.contextmanager
def _whole_batches() -> Iterator[None]:
    """Let each BatchNorm of linen treat its batch as whole, and its variance with care."""
    linen_module = sys.modules.get("flax.linen")
    if linen_module is None:
        yield
        return

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not (isinstance(module, linen_module.BatchNorm) and context.method_name == "__call__"):
            return call(*args, **kwargs)
        changed = _whole_batch(module)
        before = {name: getattr(module, name) for name in changed}
        try:
            _set(module, **changed)
            return call(*args, **kwargs)
        finally:
            _set(module, **before)

    with linen_module.intercept_methods(intercept):
        yield


def _whole_batch(layer: Any) -> dict[str, Any]:
    """Settings of a BatchNorm of flax for a pass over a batch that is all there."""
    absent = layer.axis_name is not None and not _is_bound(layer.axis_name)
    return {"use_fast_variance": False} | ({"axis_name": None} if absent else {})


def _is_bound(axis_name: Any) -> bool:
    try:
        jax.lax.axis_index(axis_name)
    except NameError:
        return False
    return True


def _set(layer: Any, **fields: Any) -> None:
    for name, value in fields.items():
        object.__setattr__(layer, name, value)  # the layers of linen are frozen


def _constant(batch_stats: Any, params: Any) -> Any:
    del params
    return batch_stats


def _refresher(
    train_pass: Any, batch_stats: Any, inputs: Any, batch_size: int, rngs: Any
) -> Refresh:
    check_integer("batch_size", batch_size, 1)
    if is_loader(inputs):
        return Walk(train_pass, batch_stats, inputs, rngs)
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(inputs)}
    if len(sizes) != 1 or not all(sizes) or (0,) in sizes:
        raise ValueError(f"inputs have lengths {sorted(sizes)}: give arrays of one length N > 0")
    (length,) = sizes.pop()
    size = min(batch_size, length)
    whole = length // size * size
    inputs = jax.tree.map(jnp.asarray, inputs)
    full = jax.tree.map(lambda x: _in_batches(x[:whole], size), inputs)
    rest = jax.tree.map(lambda x: x[whole:], inputs)
    return jax.tree_util.Partial(_recompute, train_pass, batch_stats, rngs, full, rest)


def _in_batches(x: jax.Array, size: int) -> jax.Array:
    """Cut the first axis into batches. One that is split over devices stays so in each batch."""
    shape = (-1, size, *x.shape[1:])
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or not sharding.spec or sharding.spec[0] is None:
        return x.reshape(shape)
    return x.reshape(shape, out_sharding=jax.P(None, *sharding.spec))


class _Sums(NamedTuple):
    """What a pass from zeros makes of the statistics, averaged over batches.

    ``share`` is 1 - momentum, NaN for a leaf whose average is none; ``first`` that of the first
    batch; ``deviation`` the mean over all batches of the difference from it.
    """

    share: Any
    first: Any
    deviation: Any


def _recompute(train_pass: Any, template: Any, rngs: Any, full: Any, rest: Any, params: Any) -> Any:
    """Average the batch moments over the batches, weighted by size."""
    sums = _started(train_pass, template, rngs, params, _at(full, 0), None)
    number, size = jax.tree.leaves(full)[0].shape[:2]
    add = functools.partial(_added, train_pass, rngs, params)

    def step(sums: Any, index: Any) -> tuple[Any, None]:
        return add((_at(full, index), index, 1 / (1 + index)), sums), None

    if number > 1:
        sums, _ = jax.lax.scan(step, sums, jnp.arange(1, number))
    if left := _length(rest):
        sums = add((rest, number, left / (number * size + left)), sums)
    return _finished(template, sums)


def _started(train_pass: Any, template: Any, rngs: Any, params: Any, batch: Any, _: None) -> _Sums:
    """Sums of the first batch, which also tells the momentum."""
    run = _passing(train_pass, rngs, params, batch, 0)
    template = _long_run(template, run)
    # The statistics alone are mapped over: what the layers compute is computed once.
    olds = jnp.array([0, 1, _FAR / 2, _FAR])
    rows = jax.vmap(lambda old: run(_filled(template, old)))(olds)
    share = jax.tree.map(_share, template, rows)
    first = jax.tree.map(lambda s, r: widen(r[0]) if _is_float(s) else s, template, rows)
    nothing = jax.tree.map(lambda s, f: jnp.zeros_like(f) if _is_float(s) else s, template, first)
    return _Sums(share, first, nothing)


def _added(train_pass: Any, rngs: Any, params: Any, inputs: Any, sums: _Sums) -> _Sums:
    """Sums with one batch more, which is ``ratio`` of all so far."""
    batch, index, ratio = inputs
    new = _passing(train_pass, rngs, params, batch, index)(_filled(sums.first, 0.0))

    def move(first: Any, deviation: Any, new: Any) -> Any:
        if not _is_float(first):
            return deviation
        return deviation + jnp.asarray(ratio, first.dtype) * (widen(new) - first - deviation)

    return sums._replace(deviation=jax.tree.map(move, sums.first, sums.deviation, new))


def _finished(template: Any, sums: _Sums) -> Any:
    """Moments from the sums; outside jit refused where there are none."""
    _check_shares(sums.share)

    def moment(leaf: Any, share: Any, first: Any, deviation: Any) -> Any:
        return (first + deviation) / share if _is_float(leaf) else first

    return jax.tree.map(moment, template, *sums)


def _passing(train_pass: Any, rngs: Any, params: Any, batch: Any, index: Any) -> Any:
    """The pass over one batch, from statistics to new ones."""
    extra = () if rngs is None else (_fold(rngs, params, index),)

    def run(statistics: Any) -> Any:
        with _whole_batches():
            new = train_pass(params, statistics, batch, *extra)
        _check_changed(statistics, new)
        return new

    return run


def _fold(rngs: Any, params: Any, index: Any) -> Any:
    """Keys for one batch and one set of weights."""
    bits = _bits(params)

    def fold(key: Any) -> Any:
        return jax.random.fold_in(jax.random.fold_in(key, bits), index)

    def fold_all(keys: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(keys), jax.dtypes.prng_key):
            return fold(keys)  # one raw key
        return jnp.reshape(jax.vmap(fold)(jnp.reshape(keys, -1)), jnp.shape(keys))

    return jax.tree.map(fold_all, rngs)


def _bits(params: Any) -> jax.Array:
    """A number that tells sets of weights apart."""
    total = jnp.uint32(0)
    for leaf in filter(_is_float, jax.tree.leaves(params)):
        words = jax.lax.stop_gradient(jnp.asarray(leaf)).astype(jnp.float32)
        words = jax.lax.bitcast_convert_type(words, jnp.uint32)
        total = total * jnp.uint32(0x9E3779B1) + jnp.sum(words, dtype=jnp.uint32)
    return jnp.asarray(total)


def _check_changed(old: Any, new: Any) -> None:
    """A pass that hands back the very statistics it was given was none in training mode."""
    same = jax.tree.map(lambda a, b: a is b, old, new)
    if all(jax.tree.leaves(same)):
        raise ValueError(
            "the pass over training inputs left all statistics as they were: put the model into "
            "training mode, for linen with what its __call__ asks for, such as train=True"
        )


def _check_outside(sums: Any) -> None:
    if _is_traced(sums):
        raise ValueError(
            "inputs are a loader, which is walked outside jit: give an array or a tree of arrays, "
            "or call without jax.jit"
        )


def _check_shares(shares: Any) -> None:
    """Outside jit, name a leaf whose momentum could not be read."""
    if _is_traced(shares):
        return
    leaves = jax.tree.leaves_with_path(shares)
    wrong = [jax.tree_util.keystr(path) for path, share in leaves if jnp.isnan(share).any()]
    if wrong:
        raise ValueError(
            f"batch_stats{wrong[0]}: a pass does not average this leaf with one momentum, from 0 "
            "to below 1, that float32 or what the pass returns can hold: give refresher a "
            "train_pass that does, from statistics of a model that has just been made, or keep"
        )


def _long_run(template: Any, run: Any) -> Any:
    """The template with its counters far on: signed integers that a pass changes."""
    if not any(map(_is_count, jax.tree.leaves(template))):
        return template

    def count(old: Any, new: Any) -> Any:
        if not _is_count(old):
            return old
        dtype = jnp.result_type(old)
        far = jnp.asarray(min(_RAN_LONG, jnp.iinfo(dtype).max // 2), dtype)
        return jnp.where((new != old).any(), far, old)

    return jax.tree.map(count, template, run(template))


def _share(leaf: Any, rows: jax.Array) -> jax.Array:
    """1 - momentum of a leaf: its median over the features, NaN where it differs between them."""
    if not _is_float(leaf):
        return jnp.ones(())  # kept as it is, whatever a pass makes of it
    precision = jnp.finfo(rows.dtype).eps / 4  # to which the momentum is rounded
    zero, one, half, far = widen(rows)
    each = jnp.stack([(far - zero) / _FAR, (half - zero) / (_FAR / 2)])
    momentum = jnp.median(each[0])
    share = _snapped(1 - momentum)
    affine = (jnp.abs(each - momentum) <= 1e-3 * share + 16 * precision).all()
    affine &= (jnp.abs(one - zero - momentum) <= 1e-4 + 64 * precision * (1 + jnp.abs(zero))).all()
    held = (momentum >= 0) & (share * 0.02 > precision)
    return jnp.broadcast_to(jnp.where(affine & held, share, jnp.nan), zero.shape)


def _snapped(share: jax.Array) -> jax.Array:
    """The decimal that a share stands for, if it lies within the rounding of the momentum.

    The momentum 0.99 is 0.9900000095 in float32, and 1 less that is 1e-6 off the 0.01 by which
    the layer weighs the batch: too much for moments far from zero.
    """
    decimal = jnp.round(share * 1e6) / 1e6
    near = jnp.abs(share - decimal) <= jnp.finfo(share.dtype).eps / 2
    return jax.lax.select(near, decimal, share)


def _filled(template: Any, value: Any) -> Any:
    """The template with all floats of one value, in float32 at the least."""

    def fill(leaf: Any) -> Any:
        if not _is_float(leaf):
            return leaf
        return jnp.full_like(leaf, value, dtype=wide_dtype(jnp.result_type(leaf)))

    return jax.tree.map(fill, template)


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _is_count(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.signedinteger)


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _length(tree: Any) -> int:
    """Number of examples of a batch, beside which a loader may put single numbers."""
    return next(len(leaf) for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf))


@functools.partial(jax.jit, static_argnums=4)
def _step(arrays: Any, params: Any, inputs: Any, sums: Any, static: programs.Static) -> Any:
    return programs.together(arrays, static)(params, inputs, sums)
