"""Bayesian model averaging: predictions averaged over samples of a posterior.

Every function draws its samples inside one compiled program, uses them and drops them, so memory
holds ``chunk_size`` samples however many are averaged. They differ in what they return:

``predict``          the average over samples of what ``prob_fn`` returns, usually probabilities
``predict_log``      the logarithm of that average, from log-probabilities
``predict_samples``  what ``prob_fn`` returns for every sample, stacked
``predict_batches``  ``predict`` for every batch of an iterable

``posterior`` is a ``SWAGState``, a ``Mixture`` of several (as many samples from each), a set of
``Points`` (each once), or any function from a key to weights. Options of ``sample`` go in with
``jax.tree_util.Partial(swagjax.sample, state=state, scale=0.5, like=params)``; ``like`` is what
gives the samples the dtypes of the parameters, and the leaves that the state does not hold. A
Partial is a pytree, so a new state or scale in it compiles nothing anew. Functions are told apart
by identity: define ``prob_fn``, or a function that stands for the posterior, once, not in the loop
that calls ``predict``.

A sample may be anything that ``prob_fn`` takes, so a function of a key covers more than weights.
MC dropout, where a sample is a mask, by weights that stay and a key:

>>> import flax.linen as nn, jax, jax.numpy as jnp, swagjax
>>> class Net(nn.Module):
...     @nn.compact
...     def __call__(self, x, train):
...         return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))
>>> model, x = Net(), jnp.ones((3, 4))
>>> params = model.init(jax.random.key(0), x, train=False)["params"]
>>> def draw(key):
...     return params, key  # for SWAG and dropout: swagjax.sample(first, state), second
>>> def dropped(sample, x):
...     params, key = sample
...     logits = model.apply({"params": params}, x, train=True, rngs={"dropout": key})
...     return jax.nn.softmax(logits)
>>> swagjax.predict(jax.random.key(1), draw, dropped, x).shape
(3, 2)

Checkpoints that lie on disk are collected one by one, as from updates that are zero, and never
stand in memory together:

>>> tx = swagjax.swag(rank=2)
>>> state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
>>> for factor in (1.0, 2.0, 3.0):
...     restored = jax.tree.map(lambda p: factor * p, params)  # read a checkpoint here
...     _, state = tx.update(zeros, state, restored)
>>> int(state.num_collected)
3

A model in bfloat16, whose layers run in a ``lax.scan``, must get bfloat16 weights, as a scan does
not let its carry change its dtype; the state holds float32, and ``like`` casts:

>>> half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), {"w": jnp.ones((5, 3, 3))})
>>> tx = swagjax.swag_diag()
>>> _, state = tx.update(jax.tree.map(jnp.zeros_like, half), tx.init(half), half)
>>> def scanned(params, x):
...     return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]
>>> posterior = jax.tree_util.Partial(swagjax.sample, state=state, like=half)
>>> swagjax.predict(jax.random.key(0), posterior, scanned, jnp.ones((2, 3), jnp.bfloat16)).shape
(2, 3)

A model of flax nnx is split outside and merged inside of ``prob_fn``, in evaluation mode and with
``copy=True``, without which one that writes a variable when called (a counter, the count of a
stream of random numbers) raises a ``TraceContextError``:

>>> from flax import nnx
>>> class Counting(nnx.Module):
...     def __init__(self, rngs):
...         self.layer, self.calls = nnx.Linear(4, 2, rngs=rngs), nnx.Variable(jnp.zeros(()))
...     def __call__(self, x):
...         self.calls[...] += 1
...         return jax.nn.softmax(self.layer(x))
>>> counting = Counting(nnx.Rngs(0))
>>> counting.eval()
>>> graphdef, params, rest = nnx.split(counting, nnx.Param, ...)
>>> tx = swagjax.swag_diag()
>>> _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
>>> def merged(params, x):
...     return nnx.merge(graphdef, params, rest, copy=True)(x)
>>> swagjax.predict(jax.random.key(0), state, merged, x).shape
(3, 2)

Source: Maddox et al. 2019 (arXiv:1902.02476), section 3.3 and algorithm 1.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from swagjax import batch_stats, ensemble, prng, programs
from swagjax.batch_stats import Refresh, refuse_stored, refuse_training
from swagjax.ensemble import Mixture, Points
from swagjax.pairing import replace
from swagjax.posterior import check_collected, from_noise, sample
from swagjax.transform import SWAGState, check_integer, widen

_NUM_SAMPLES = 30
_NO_POSTERIOR = (
    "posterior is a {}: give a SWAGState, swagjax.get_state(opt_state), or a function from a key "
    "to weights; the model is called in prob_fn"
)
_WEIGHTS_IN_FLIGHT = 1 << 30  # bytes of samples side by side on an accelerator, by default


def predict(
    key: chex.PRNGKey,
    posterior: Any,
    prob_fn: Callable[..., Any],
    inputs: Any,
    *,
    num_samples: int = _NUM_SAMPLES,
    chunk_size: int | None = None,
    antithetic: bool = False,
    refresh: Refresh | None = None,
) -> Any:
    """Average ``prob_fn(params, inputs)`` over samples: ``1/S sum_s p(y | x, theta_s)``.

    ``prob_fn`` returns probabilities, not logits: averaged logits are not a Bayesian average.
    Anything else that is to be averaged may stand in its place, in any tree of arrays.

    Args:
      key: one PRNG key; or in place of ``num_samples`` an array of keys, one for each sample (for
        each pair if ``antithetic``), sharded over devices to spread the samples over them.
      posterior: a ``SWAGState``; an ``ensemble.Mixture``, of whose M members each gives S / M
        samples, those of the first before those of the second; ``ensemble.Points``, each of which
        counts once; or a function from a key to weights.
      prob_fn: ``(params, inputs) -> outputs``, or with ``refresh``
        ``(params, inputs, statistics) -> outputs``.
      inputs: an array or a tree of arrays, handed to ``prob_fn`` as it is.
      num_samples: S. For a SWA state, a point, 1 will do; for a mixture a multiple of M; for
        points their number, which is also what they give by default.
      chunk_size: how many samples run side by side under ``vmap``. By default one at a time on
        CPU, where convolutions with a kernel per sample are slow, and elsewhere as many as fit
        1 GiB of weights; all of them where an array of keys is given.
      antithetic: draw samples in pairs mirrored at the mean, 2 theta_SWA - theta: half the random
        numbers, and no error in what is linear in the weights. For a ``SWAGState``, or a Partial
        of ``sample`` with one, and even S.
      refresh: ``params -> statistics`` for a model with batch statistics, called for each sample:
        see ``swagjax.batch_stats``. One over a loader walks it once for all samples.

    Returns:
      What ``prob_fn`` returns, averaged, in float32 at the least.

    Raises:
      ValueError: for a bad argument, a state that has collected nothing, or a model of flax or
        Equinox that runs BatchNorm on statistics of other weights (without ``refresh`` that takes
        ``refresh=batch_stats.keep(statistics)``) or was left in training mode. A BatchNorm inside
        a jitted function that ran before is not seen, unless that is ``prob_fn`` itself.

    MC dropout, checkpoints on disk, bfloat16 and flax nnx: see the head of this module.

    Example:
      >>> import jax, jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag_diag(), jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0):  # N(2, 1)
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> def prob_fn(w, x):
      ...     return jax.nn.sigmoid(w * x)
      >>> key = jax.random.key(0)
      >>> probs = swagjax.predict(key, state, prob_fn, jnp.array([-9.0, 0.0, 9.0]))
      >>> probs.shape, float(probs[1])
      ((3,), 0.5)
    """
    run, keys = _prepare(key, posterior, prob_fn, num_samples, chunk_size, antithetic, refresh)
    return _run(*_walked(run, keys), inputs, _MEAN)


def predict_log(
    key: chex.PRNGKey,
    posterior: Any,
    log_prob_fn: Callable[..., Any],
    inputs: Any,
    *,
    num_samples: int = _NUM_SAMPLES,
    chunk_size: int | None = None,
    antithetic: bool = False,
    refresh: Refresh | None = None,
) -> Any:
    """Logarithm of the averaged probabilities: ``logsumexp_s log p(y | x, theta_s) - log S``.

    For probabilities that underflow, and for densities. Arguments and errors as in ``predict``,
    but ``log_prob_fn`` returns log-probabilities.

    Example:
      >>> import jax, jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag_diag(), jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0):
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> def log_prob_fn(w, x):
      ...     return -1000 * x - 0 * w
      >>> print(swagjax.predict_log(jax.random.key(0), state, log_prob_fn, jnp.ones(2)).round(1))
      [-1000. -1000.]
    """
    run, keys = _prepare(key, posterior, log_prob_fn, num_samples, chunk_size, antithetic, refresh)
    return _run(*_walked(run, keys), inputs, _LOG_MEAN)


def predict_samples(
    key: chex.PRNGKey,
    posterior: Any,
    prob_fn: Callable[..., Any],
    inputs: Any,
    *,
    num_samples: int = _NUM_SAMPLES,
    chunk_size: int | None = None,
    antithetic: bool = False,
    refresh: Refresh | None = None,
) -> Any:
    """Outputs of every sample, stacked on a leading axis of length S, from the same samples.

    For mutual information, quantiles, mixtures. Arguments and errors as in ``predict``; memory
    holds S outputs, but still only ``chunk_size`` samples. Pairs stand side by side where
    ``antithetic``: sample 2 i + 1 mirrors sample 2 i.

    Example:
      >>> import jax, jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag_diag(), jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0):
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> key = jax.random.key(0)
      >>> out = swagjax.predict_samples(
      ...     key, state, lambda w, x: w * x, jnp.ones(5), num_samples=4, antithetic=True
      ... )
      >>> print(out.shape, out.mean(0))
      (4, 5) [2. 2. 2. 2. 2.]
    """
    run, keys = _prepare(key, posterior, prob_fn, num_samples, chunk_size, antithetic, refresh)
    return _run(*_walked(run, keys), inputs, None)


def predict_batches(
    key: chex.PRNGKey,
    posterior: Any,
    prob_fn: Callable[..., Any],
    batches: Iterable[Any],
    *,
    num_samples: int = _NUM_SAMPLES,
    chunk_size: int | None = None,
    antithetic: bool = False,
    refresh: Refresh | None = None,
) -> Iterator[Any]:
    """``predict`` for each batch of an iterable, with the same samples for all batches.

    The statistics of ``refresh`` are computed once and kept, S sets of them; the weights are drawn
    anew from their keys for each batch, so memory stays at ``chunk_size`` samples. A batch of
    another shape, such as a smaller last one, compiles once more. Arguments and errors as in
    ``predict``; errors in the arguments come at the call, not at the first batch.

    Example:
      >>> import jax, jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag_diag(), jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0):
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> batches = jnp.zeros((3, 2))
      >>> probs = swagjax.predict_batches(
      ...     jax.random.key(0), state, lambda w, x: jax.nn.sigmoid(w * x), batches
      ... )
      >>> [float(p[0]) for p in probs]
      [0.5, 0.5, 0.5]
    """
    run, keys = _prepare(key, posterior, prob_fn, num_samples, chunk_size, antithetic, refresh)
    run, keys, stats = _walked(run, keys)
    if refresh is not None and stats is None:
        stats = _for_each(run._replace(prob_fn=_statistics), keys, None, ())
    return (_run(run, keys, stats, batch, _MEAN) for batch in batches)


class _Run(NamedTuple):
    """How samples are drawn and evaluated. The leaves that are no arrays are compiled in."""

    posterior: Any
    prob_fn: Any
    refresh: Any
    chunk_size: int
    antithetic: bool


class _Reduction(NamedTuple):
    """How outputs of samples become one: within a chunk, between chunks, and at the end."""

    identity: float
    within: Callable[..., jax.Array]
    between: Callable[..., jax.Array]
    finish: Callable[..., jax.Array]


_MEAN = _Reduction(0.0, jnp.sum, jnp.add, lambda total, count: total / count)
_LOG_MEAN = _Reduction(
    -jnp.inf, jax.nn.logsumexp, jnp.logaddexp, lambda total, count: total - jnp.log(count)
)


def _prepare(
    key: Any,
    posterior: Any,
    prob_fn: Any,
    num_samples: int,
    chunk_size: int | None,
    antithetic: bool,
    refresh: Any,
) -> tuple[_Run, jax.Array]:
    """Check the arguments, and draw a key for each sample or pair."""
    if not isinstance(antithetic, bool | np.bool_):
        raise ValueError(f"antithetic={antithetic!r}: give True or False")
    _check_posterior(posterior, antithetic)
    _check_functions(prob_fn, refresh)
    if chunk_size is not None:
        chunk_size = check_integer("chunk_size", chunk_size, 1)
    keys = prng.typed_keys(key)
    if keys.ndim > 1 or keys.size == 0:
        raise ValueError(f"key holds keys of shape {keys.shape}: give one, or one for each sample")
    if keys.ndim:
        _check_number(posterior, len(keys), f"key holds {len(keys)} keys")
    if chunk_size is None:
        chunk_size = len(keys) if keys.ndim else _default_chunk(posterior, keys)
    if not keys.ndim:
        keys = _split(keys, _number(posterior, num_samples), antithetic)
    return _Run(posterior, programs.unjit(prob_fn), refresh, chunk_size, bool(antithetic)), keys


def _check_posterior(posterior: Any, antithetic: bool) -> None:
    for state in jax.tree.leaves(posterior, is_leaf=_is_state):
        if _is_state(state):
            check_collected(state)
    if isinstance(posterior, Mixture | Points):
        ensemble.size(posterior)  # raises where it is of no use
    elif not (_is_state(posterior) or callable(posterior)):
        raise ValueError(_NO_POSTERIOR.format(type(posterior).__name__))
    _check_no_model(posterior)
    _check_whole(posterior)
    if antithetic:
        _state_of(posterior)  # raises where there is no mean


def _check_no_model(posterior: Any) -> None:
    """Refuse a model, which can be called as well, unless it makes something of a key."""
    kinds = [sys.modules.get(name) for name in ("flax.linen", "flax.nnx", "equinox")]
    if isinstance(posterior, tuple(kind.Module for kind in kinds if kind is not None)):
        draw: Any = posterior
        try:
            jax.eval_shape(draw, jax.random.key(0))
        except Exception as error:
            kind = f"{type(posterior).__name__}, a model"
            raise ValueError(_NO_POSTERIOR.format(kind)) from error


def _check_whole(posterior: Any) -> None:
    """Refuse a state with masked leaves: a model cannot run on its samples."""
    if isinstance(posterior, Points):
        tree, way_out = posterior.params, "ensemble.Points(swagjax.iterates(state, like=params))"
    elif isinstance(posterior, Mixture):
        way_out = "jax.tree_util.Partial(swagjax.ensemble.sample, mixture=mixture, like=params)"
        tree = posterior.mean
    elif _is_state(posterior):
        way_out = "jax.tree_util.Partial(swagjax.sample, state=state, like=params)"
        tree = posterior.mean
    else:
        return
    paths = jax.tree.leaves_with_path(tree, is_leaf=_is_masked)
    masked = [jax.tree_util.keystr(path) for path, leaf in paths if _is_masked(leaf)]
    if masked:
        raise ValueError(
            f"posterior holds no values at {masked[0]}, which was masked where it collected: give "
            f"{way_out}"
        )


def _check_functions(prob_fn: Any, refresh: Any) -> None:
    if not callable(prob_fn):
        raise ValueError(
            f"prob_fn is a {type(prob_fn).__name__}: give a function (params, inputs) -> "
            "probabilities; the order is key, posterior, prob_fn, inputs"
        )
    if refresh is not None and not callable(refresh):
        raise ValueError(
            f"refresh is a {type(refresh).__name__}: give a function params -> statistics, such as "
            "batch_stats.keep(statistics)"
        )


def _check_inputs(inputs: Any) -> None:
    """Refuse what streams; a list or a tuple of arrays is a tree."""
    if batch_stats.is_loader(inputs):
        raise ValueError(
            f"inputs is a {type(inputs).__name__}: give an array or a tree of arrays, or stream "
            "over batches by predict_batches"
        )


def _number(posterior: Any, num_samples: int) -> int:
    """How many samples to take; the default for a set of points is all of them."""
    if isinstance(posterior, Points) and num_samples == _NUM_SAMPLES:
        return ensemble.size(posterior)
    number = check_integer("num_samples", num_samples, 1)
    _check_number(posterior, number, f"num_samples={number}")
    return number


def _check_number(posterior: Any, number: int, given: str) -> None:
    """Refuse a number of samples that does not give every member or point the same weight."""
    if isinstance(posterior, Points) and number != (size := ensemble.size(posterior)):
        raise ValueError(f"{given}, and posterior {size} points, each to count once: give {size}")
    if isinstance(posterior, Mixture) and number % (size := ensemble.size(posterior)):
        raise ValueError(
            f"{given}, and posterior {size} members, each to give as many samples: give a "
            f"multiple of {size}, such as {-(-number // size) * size}, or draw members at random "
            "by jax.tree_util.Partial(swagjax.ensemble.sample, mixture=mixture)"
        )


def _split(key: jax.Array, num_samples: int, antithetic: bool) -> jax.Array:
    check_integer("num_samples", num_samples, 1)
    if antithetic and num_samples % 2:
        raise ValueError(f"num_samples={num_samples}: antithetic pairs ask for an even number")
    return jax.random.split(key, num_samples // 2 if antithetic else num_samples)


def _default_chunk(posterior: Any, key: jax.Array) -> int:
    if jax.default_backend() == "cpu":
        return 1
    shapes = jax.tree.leaves(jax.eval_shape(functools.partial(_draw, posterior), key, 0))
    weights: int = sum(x.size * x.dtype.itemsize for x in shapes)
    return max(1, _WEIGHTS_IN_FLIGHT // max(1, weights))


def _run(run: _Run, keys: jax.Array, stats: Any, inputs: Any, reduction: _Reduction | None) -> Any:
    _check_inputs(inputs)
    arrays, static = programs.separate(run, "posterior, prob_fn or refresh")
    return _program(arrays, keys, stats, inputs, static, reduction)


def _walked(run: _Run, keys: jax.Array) -> tuple[_Run, jax.Array, Any]:
    """The statistics of all samples where ``refresh`` walks a loader; it is walked once."""
    walk = run.refresh
    if not isinstance(walk, batch_stats.Walk):
        return run, keys, None

    def step(function: Any, inputs: Any, sums: Any) -> Any:
        return _for_each(run._replace(prob_fn=function, refresh=_walking), keys, sums, inputs)

    return run._replace(refresh=batch_stats.keep(None)), keys, walk.walk(step)


def _for_each(run: _Run, keys: jax.Array, stats: Any, inputs: Any) -> Any:
    """Outputs of every sample, with leading axes (keys, draws of a key)."""
    stacked = _run(run, keys, stats, inputs, None)
    return jax.tree.map(lambda x: x.reshape(len(keys), -1, *x.shape[1:]), stacked)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _program(
    arrays: list[Any],
    keys: jax.Array,
    stats: Any,
    inputs: Any,
    static: programs.Static,
    reduction: _Reduction | None,
) -> Any:
    """Evaluate all samples chunk by chunk; average them, or stack them without a reduction."""
    run: _Run = programs.together(arrays, static)
    evaluate = functools.partial(_evaluate, run, inputs)
    chunk, rest = _chunked((keys, _indices(run.posterior, len(keys)), stats), run.chunk_size)
    if reduction is None:
        return _stack(evaluate, chunk, rest)
    return _reduce(evaluate, chunk, rest, reduction, len(keys) * (1 + run.antithetic))


def _indices(posterior: Any, number: int) -> Any:
    """For each sample the member or the point that it comes from; None where there are none."""
    if not isinstance(posterior, Mixture | Points):
        return None
    return jnp.arange(number) * ensemble.size(posterior) // number


def _chunked(xs: Any, chunk_size: int) -> tuple[Any, Any]:
    """Cut the leading axis into whole chunks, (n, chunk_size, ...), and a rest, None if empty.

    A chunk takes every n-th element, so that an axis sharded over devices stays spread over them
    within each chunk.
    """
    length = len(jax.tree.leaves(xs)[0])
    size = min(chunk_size, length)
    n = length // size

    def whole(x: jax.Array) -> jax.Array:
        return x[: n * size].reshape(size, n, *x.shape[1:]).swapaxes(0, 1)

    rest = jax.tree.map(lambda x: x[n * size :], xs) if length % size else None
    return jax.tree.map(whole, xs), rest


def _stack(evaluate: Callable[[Any], Any], chunks: Any, rest: Any) -> Any:
    _, out = jax.lax.scan(lambda _, xs: (None, _side_by_side(evaluate, xs)), None, chunks)
    out = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[3:]), out)
    if rest is None:
        return out
    last = _side_by_side(evaluate, rest)
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y.reshape(-1, *y.shape[2:])]), out, last)


def _reduce(
    evaluate: Callable[[Any], Any], chunks: Any, rest: Any, reduction: _Reduction, count: int
) -> Any:
    def partial(xs: Any) -> Any:
        out = _side_by_side(evaluate, xs)
        return jax.tree.map(lambda x: reduction.within(widen(x), axis=(0, 1)), out)

    def add(total: Any, xs: Any) -> tuple[Any, None]:
        return jax.tree.map(reduction.between, total, partial(xs)), None

    shapes = jax.eval_shape(partial, _at(chunks, 0))
    # Also of the same sharding on an explicit mesh, and varying over the same manual axes.
    empty = jax.tree.map(lambda s: jax.lax.full_like(s, reduction.identity), shapes)
    total, _ = jax.lax.scan(add, empty, chunks)
    if rest is not None:
        total, _ = add(total, rest)
    return jax.tree.map(lambda x: reduction.finish(x, count), total)


def _side_by_side(evaluate: Callable[[Any], Any], xs: Any) -> Any:
    """Outputs of a chunk, with leading axes (chunk, draws of a key)."""
    if len(jax.tree.leaves(xs)[0]) > 1:
        return jax.vmap(evaluate)(xs)
    # A single one without vmap, which would make convolutions grouped ones.
    out = evaluate(_at(xs, 0))
    return jax.tree.map(lambda x: x[None], out)


def _evaluate(run: _Run, inputs: Any, x: tuple[jax.Array, Any, Any]) -> Any:
    """Outputs of the sample of a key, or of the mirrored pair, stacked."""
    key, index, stats = x
    draws = [_draw(run.posterior, key, index)]
    if run.antithetic:
        centre = _centre(_state_of(run.posterior))
        draws.append(replace(centre, draws[0], _mirror))
    kept = [None if stats is None else _at(stats, i) for i in range(len(draws))]
    outputs = [_output(run, inputs, *pair) for pair in zip(draws, kept, strict=True)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _output(run: _Run, inputs: Any, theta: Any, stats: Any) -> Any:
    if run.refresh is _walking:
        return run.prob_fn(theta, inputs, stats)
    if run.refresh is not None:
        stats = run.refresh(theta) if stats is None else stats
        with refuse_training():
            outputs = run.prob_fn(theta, inputs, stats)
    else:
        with refuse_stored():
            outputs = run.prob_fn(theta, inputs)
    if outputs is None:
        raise ValueError("prob_fn returned None: return an array or a tree of arrays")
    return outputs


def _at(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def _state_of(posterior: Any) -> SWAGState:
    """Read off a posterior the state that its mean is made of."""
    if isinstance(posterior, SWAGState):
        return posterior
    if getattr(posterior, "func", None) is not sample or "state" not in posterior.keywords:
        raise ValueError(
            "antithetic=True: give a SWAGState, or jax.tree_util.Partial(swagjax.sample, "
            "state=state, ...), for a mean to mirror samples at"
        )
    state: SWAGState = posterior.keywords["state"]
    return state


def _centre(state: SWAGState) -> Any:
    """The mean as a sample: what no noise gives; with holes where nothing is to be mirrored."""
    rings = jax.tree.leaves(state.deviations)
    z2 = jnp.zeros(len(rings[0]), jnp.float32) if rings else None
    return from_noise(state, jax.tree.map(jnp.zeros_like, state.mean), z2)


def _mirror(mean: jax.Array, theta: jax.Array) -> jax.Array:
    return (2 * widen(mean) - widen(theta)).astype(theta.dtype)


def _draw(posterior: Any, key: jax.Array, index: Any) -> Any:
    if isinstance(posterior, Mixture | Points):
        return ensemble.draw(key, posterior, index)
    return sample(key, posterior) if _is_state(posterior) else posterior(key)


def _walking(params: Any) -> None:
    """Stand for the refresh in a step of a walk, a pass in training mode on the sums so far."""
    del params


def _statistics(params: Any, inputs: Any, stats: Any) -> Any:
    del params, inputs
    return stats


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_state(node: Any) -> bool:
    return isinstance(node, SWAGState)
