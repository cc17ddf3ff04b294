"""SWAG as optax gradient transformations: observers that collect moments of the iterates.

``swa``, ``swag_diag`` and ``swag`` pass the updates through untouched and differ in what they
keep of the iterates: the mean, also the variance, also the last K deviations. They stand last in
an ``optax.chain``, because every member of a chain sees the parameters from before the step: what
changes the updates after them would make them collect points that were never visited.
"""

import functools
import numbers
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial


class SWAGState(NamedTuple):
    """The first and second moments of the collected iterates, and the last deviations.

    With theta_1 ... theta_n the collected iterates (n = ``num_collected``):

        mean       = 1/n sum_i theta_i                                (theta_SWA)
        variance   = 1/n sum_i theta_i^2 - mean^2, held centred       (Sigma_diag)
        sq_mean    = mean^2 + variance                                (a property)
        deviations = the last K of theta_i - mean_i, mean_i = 1/i sum_{j <= i} theta_j   (D)

    The second moment is held centred (Welford's recurrence): in float32 the difference of
    ``sq_mean`` and ``mean**2`` is rounding noise for iterates that move by 1e-4 around 1.

    Attributes:
      num_updates: int32 scalar, calls of ``update`` so far.
      num_collected: int32 scalar, iterates collected.
      num_skipped: int32 scalar, iterates left out because a coordinate was not finite.
      mean: a tree like the parameters.
      variance: a tree like the parameters; ``None`` in the state of ``swa``.
      deviations: a tree with leaves of shape ``(rank, *leaf.shape)``, a ring buffer: the i-th
        collected iterate is in row ``(i - 1) % rank``; rows not yet written count as zero. ``None``
        in the states of ``swa`` and ``swag_diag``.

    The counters stop at 2^31 - 1. With ``num_collected`` set to 0, as in
    ``optax.tree_utils.tree_set(opt_state, num_collected=0)``, collecting starts anew: nothing that
    was collected before counts any more. No field has a name that states of optax have, so that
    ``tree_set(opt_state, count=0)`` restarts a schedule and leaves the posterior alone.

    Fields can be dropped: of a SWAG state ``state._replace(deviations=None)`` is the SWAG-Diag
    state of the same run, and ``state._replace(variance=None, deviations=None)`` its SWA state.

    Example:
      >>> import jax.numpy as jnp, optax, swagjax
      >>> tx = swagjax.swag(rank=2)
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> state = tx.init(params)
      >>> for step in ({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([3.0, 0.0])}):
      ...     updates, state = tx.update(step, state, params)  # params stay: [2, 2], then [4, 2]
      >>> print(state.num_collected, state.mean["w"], state.variance["w"], state.sq_mean["w"])
      2 [3. 2.] [1. 0.] [10.  4.]
      >>> print(state.deviations["w"])
      [[0. 0.]
       [1. 0.]]

    Source: Maddox et al. 2019 (arXiv:1902.02476), section 3.1 and algorithm 1.
    """

    num_updates: jax.Array
    num_collected: jax.Array
    num_skipped: jax.Array
    mean: Any
    variance: Any
    deviations: Any

    @property
    def sq_mean(self) -> Any:
        """The running mean of theta squared, ``mean**2 + variance``; None where none is kept."""
        if self.variance is None:
            return None
        return jax.tree.map(lambda m, v: m * m + v, self.mean, self.variance)


def swag(
    rank: int = 20,
    *,
    start: int = 0,
    every: int = 1,
    when: Callable[[jax.Array], jax.Array] | None = None,
    accumulator_dtype: Any = None,
    deviation_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Collect the moments of SWAG: mean, variance and the last ``rank`` deviations.

    The updates pass through unchanged. After the t-th call (t = 1, 2, ...) the iterate is
    ``optax.apply_updates(params, updates)``; it is collected if ``t > start`` and
    ``(t - start) % every == 0``. With n iterates collected before it:

        mean     <- mean + (theta - mean) / (n + 1)
        variance <- variance + ((theta - mean)^2 (n + 1) / n - variance) / (n + 1)   (new mean)
        row n % rank of the ring <- theta - mean                                     (new mean)

    Steps that do not collect cost nothing; a collection moves each array once, in place where the
    optimizer state is donated. An iterate with a coordinate that is not finite is left out and
    counted in ``num_skipped``; a finite one 1e19 off the mean is collected, and makes the variance
    of float32 infinite or NaN. The state takes ``rank + 2`` times the memory of float32 parameters,
    and of bfloat16 ones twice that, as accumulators are float32 unless said otherwise.

    In float32 the variance of 139 iterates is right to 1e-3 for weights that move by 1e-4 of their
    size, to 1e-2 for 1e-5. The mean of n iterates stalls once it changes by less than half a unit
    in its last place, at n of about 10^7 times spread over size: no harm to iterates that have
    settled (10^5 of them, spread 1e-4: variance within 1 %), but those that drift on are followed
    no more. Collect less often then, or in float64.

    Place it last in the chain. Under gradient accumulation put the accumulator before it,
    ``chain(MultiSteps(opt, k).gradient_transformation(), swag(start=k * s, every=k * n))``: t then
    counts micro-steps. ``MultiSteps`` around the chain is right as well, with t counting the full
    steps, but passes over the whole ring at every micro-step.

    Some optimizers train at other weights than those to be evaluated: ``optax.contrib.sam`` takes
    every other step from perturbed weights, ``optax.contrib.schedule_free`` holds the average
    apart, ``optax.lookahead`` the slow weights. A chain would collect what they train at;
    ``swagjax.collect`` collects what is evaluated.

    Args:
      rank: K, the number of deviations held, at least 2.
      start: calls of ``update`` before the first that may collect.
      every: calls of ``update`` from one collection to the next.
      when: in place of ``start`` and ``every``, a traceable function of t (int32 scalar) to a
        boolean scalar: whether to collect after the t-th call.
      accumulator_dtype: dtype of mean and variance; by default that of the parameter, float32 at
        the least.
      deviation_dtype: dtype of the deviations; by default that of the accumulators. bfloat16
        halves the memory, and rounds each deviation by up to 0.4 %; on CPU, XLA then widens the
        whole ring at each collection and draw.

    Returns:
      A gradient transformation whose state is a ``SWAGState``.

    Raises:
      ValueError: for a bad argument; by ``init`` for leaves that are not real floating point; by
        ``update`` where ``params`` is missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax, swagjax
      >>> tx = optax.chain(optax.sgd(0.1), swagjax.swag(rank=5, start=10, every=2))
      >>> params = {"w": jnp.ones(3)}
      >>> opt_state = tx.init(params)
      >>> for _ in range(20):
      ...     grads = jax.grad(lambda p: (p["w"] ** 2).sum())(params)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> state = swagjax.get_state(opt_state)
      >>> int(state.num_updates), int(state.num_collected), state.deviations["w"].shape
      (20, 5, (5, 3))

    Source: Maddox et al. 2019, section 3.2 and algorithm 1 (one collection an epoch there:
    ``every=steps_per_epoch``, ``rank=20``).
    """
    rank = check_integer("rank", rank, 1)
    if rank < 2:
        raise ValueError(
            f"rank={rank}: the low-rank part divides by rank - 1 and needs at least 2 deviations; "
            "swag_diag is SWAG without a low-rank part"
        )
    _check_dtype("deviation_dtype", deviation_dtype)
    return _observer(_cadence(start, every, when), True, rank, accumulator_dtype, deviation_dtype)


def swag_diag(
    *,
    start: int = 0,
    every: int = 1,
    when: Callable[[jax.Array], jax.Array] | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Collect the moments of SWAG-Diag: mean and variance. Arguments and errors as in ``swag``.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx = swagjax.swag_diag()
      >>> params = jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0):
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> print(state.mean, state.variance, state.deviations)
      [2.] [1.] None

    Source: Maddox et al. 2019, section 3.1.
    """
    return _observer(_cadence(start, every, when), True, None, accumulator_dtype, None)


def swa(
    *,
    start: int = 0,
    every: int = 1,
    when: Callable[[jax.Array], jax.Array] | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Collect the mean of the iterates, theta_SWA. Arguments and errors as in ``swag``.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx = swagjax.swa()
      >>> params = jnp.array([0.0])
      >>> state = tx.init(params)
      >>> for update in (1.0, 3.0):
      ...     _, state = tx.update(jnp.array([update]), state, params)
      >>> print(state.mean, state.variance)
      [2.] None

    Source: Izmailov et al. 2018 (arXiv:1803.05407), algorithm 1.
    """
    return _observer(_cadence(start, every, when), False, None, accumulator_dtype, None)


class CollectState(NamedTuple):
    """The state of ``collect``.

    Attributes:
      optimizer_state: of the optimizer.
      collected: of the transformation that collects; ``get_state`` finds the ``SWAGState`` in it.

    Example:
      >>> import jax.numpy as jnp, optax, swagjax
      >>> tx = swagjax.collect(optax.sgd(0.1), swagjax.swa(), lambda opt_state, params: params)
      >>> tx.init(jnp.zeros(2)).collected.mean.shape
      (2,)
    """

    optimizer_state: Any
    collected: Any


def collect(
    optimizer: optax.GradientTransformation,
    observer: optax.GradientTransformation,
    evaluate: Callable[[Any, Any], Any],
) -> optax.GradientTransformationExtraArgs:
    """Collect other weights than those trained at: ``evaluate(optimizer_state, params)``.

    As ``optax.chain(optimizer, observer)``, but for what is collected: after a step, ``evaluate``
    of the new state of ``optimizer`` and the new parameters. It is called at the steps that collect
    alone. For three optimizers of optax:

        collect(optax.contrib.schedule_free_sgd(...), swag(...),
                optax.contrib.schedule_free_eval_params)                # x, the average
        collect(optax.lookahead(...), swag(...), lambda _, params: params.slow)

        def clean(state, params):  # the weights that sam has not perturbed
            synced = state.steps_since_sync == 0
            return jax.tree.map(lambda x, c: jnp.where(synced, x, c), params, state.cache)

        collect(optax.contrib.sam(...), swag(...), clean)               # opaque_mode=False

    ``sam(..., opaque_mode=True)`` needs none of this; nor do steps of ``sam`` that are collected
    after whole periods, ``swag(start=s * sync_period, every=n * sync_period)``.

    Args:
      optimizer: any gradient transformation, of which extra arguments are passed on.
      observer: ``swag``, ``swag_diag`` or ``swa``, or one of them in ``optax.masked``; the sample
        is then a tree like what ``evaluate`` returns.
      evaluate: a traceable function of the state of ``optimizer`` and the parameters to a tree of
        arrays.

    Returns:
      A gradient transformation whose state is a ``CollectState``.

    Raises:
      ValueError: where ``evaluate`` is not callable; by ``update`` where ``params`` is missing.

    Example:
      >>> import jax.numpy as jnp, optax, swagjax
      >>> free = optax.contrib.schedule_free_sgd(0.5)
      >>> tx = swagjax.collect(free, swagjax.swa(), optax.contrib.schedule_free_eval_params)
      >>> params = jnp.array([1.0])
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params[0]:.3f} {swagjax.mean(swagjax.get_state(state))[0]:.3f}")
      0.252 0.383
    """
    if not callable(evaluate):
        raise ValueError(
            f"evaluate is a {_type(evaluate)}: give a function of the optimizer's state and the "
            "parameters, such as optax.contrib.schedule_free_eval_params"
        )
    untyped: Any = optax  # which does not mark this one as exported
    inner = untyped.with_extra_args_support(optimizer)
    outer = untyped.with_extra_args_support(observer)

    def init_fn(params: optax.Params) -> CollectState:
        opt_state = inner.init(params)
        return CollectState(opt_state, outer.init(evaluate(opt_state, params)))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, CollectState]:
        params = _given(params)
        updates, opt_state = inner.update(updates, state.optimizer_state, params, **extra)
        # Not yet evaluated: the observer does it inside its branch, if it is time to collect.
        iterate = Partial(evaluate, opt_state, optax.apply_updates(params, updates))
        shapes = jax.eval_shape(iterate)
        _, collected = outer.update(shapes, state.collected, shapes, iterate=iterate)
        return updates, CollectState(opt_state, collected)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def state_bytes(
    params: optax.Params, rank: int, *, accumulator_dtype: Any = None, deviation_dtype: Any = None
) -> int:
    """Memory of the state of ``swag(rank, ...)``, in bytes: about 4 (rank + 2) a float weight.

    Nothing is allocated.

    Args:
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      rank: as for ``swag``, like the dtypes.
      accumulator_dtype: dtype of mean and variance.
      deviation_dtype: dtype of the deviations.

    Returns:
      The sum over all devices of a sharded state; replicas are counted once.

    Raises:
      ValueError: as ``swag``.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> swagjax.state_bytes({"w": jnp.zeros(1000)}, rank=20)  # 22 times 4 kB, and 3 counters
      88012
      >>> swagjax.state_bytes({"w": jnp.zeros(1000)}, rank=20, deviation_dtype=jnp.bfloat16)
      48012
    """
    tx = swag(rank, accumulator_dtype=accumulator_dtype, deviation_dtype=deviation_dtype)
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def get_state(opt_state: Any) -> SWAGState:
    """Find the one ``SWAGState`` inside any optimizer state, whatever wraps it.

    Args:
      opt_state: a tree that holds a ``SWAGState``: the state of a chain, of ``MultiSteps``,
        ``masked`` or ``partition``, a flax ``TrainState``, an ``nnx.Optimizer`` or its
        ``opt_state`` (whose variables are unwrapped to arrays).

    Returns:
      The state, with arrays as leaves.

    Raises:
      ValueError: where there is none, or more than one; beside a state of
        ``optax.contrib.schedule_free`` or ``optax.lookahead``, unless ``collect`` collected what
        is evaluated.

    Example:
      >>> import jax.numpy as jnp, optax, swagjax
      >>> tx = optax.chain(optax.adam(1e-3), swagjax.swag_diag())
      >>> swagjax.get_state(tx.init(jnp.zeros(3))).mean.shape
      (3,)
      >>> swagjax.get_state(optax.adam(1e-3).init(jnp.zeros(3)))
      Traceback (most recent call last):
      ...
      ValueError: opt_state holds no SWAGState: put swagjax.swag(...) last in the optax.chain...
    """
    # An nnx.Optimizer is a pytree only in some modes of flax; its opt_state always is.
    opt_state = getattr(opt_state, "opt_state", opt_state)
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_state)
    found = [node for node in nodes if _is_state(node)]
    if not found:
        raise ValueError(
            "opt_state holds no SWAGState: put swagjax.swag(...) last in the optax.chain; what is "
            "restored from a checkpoint asks for the target jax.eval_shape(tx.init, params)"
        )
    if len(found) > 1:
        raise ValueError(
            f"opt_state holds {len(found)} SWAGStates: pass the part of it that holds the one "
            "you mean, such as opt_state.inner_states['group']"
        )
    if elsewhere := _trains_elsewhere(opt_state, found[0]):
        raise ValueError(
            f"opt_state holds a {elsewhere}, and the SWAGState was collected of the weights that "
            "are trained at, not of those to be evaluated: see swagjax.collect; where the first "
            "are meant, pass the part of opt_state that holds the SWAGState"
        )
    state: SWAGState = jax.tree.map(_unwrap, found[0], is_leaf=_is_variable)
    return state


def member_axes(tree: Any) -> Any:
    """Axes for ``jax.vmap`` over members trained side by side: 0, but None at ``num_updates``.

    Mapped over ``num_updates``, a state no longer branches on whether to collect: ``vmap`` turns
    the branch into a selection that touches the whole ring at every step. All members take the
    same steps, so the counter needs no member axis; ``num_collected`` and ``num_skipped`` keep
    theirs.

    Args:
      tree: an optimizer state, or any tree that holds ``SWAGState``s; leaves may be abstract.

    Returns:
      A tree like ``tree`` of 0 and None, for ``in_axes`` and ``out_axes``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, swagjax
      >>> tx = optax.chain(optax.sgd(0.1), swagjax.swag(rank=2))
      >>> params = jnp.zeros((4, 3))  # four members
      >>> axes = swagjax.member_axes(jax.eval_shape(tx.init, params[0]))
      >>> opt_state = jax.vmap(tx.init, out_axes=axes)(params)
      >>> update = jax.vmap(tx.update, in_axes=(0, axes, 0), out_axes=(0, axes))
      >>> updates, opt_state = update(jnp.ones((4, 3)), opt_state, params)
      >>> state = swagjax.get_state(opt_state)
      >>> state.num_updates.shape, state.num_collected.shape, state.deviations.shape
      ((), (4,), (4, 2, 3))
    """

    def axes(node: Any) -> Any:
        zeros = jax.tree.map(lambda _: 0, node)
        return zeros._replace(num_updates=None) if _is_state(node) else zeros

    return jax.tree.map(axes, tree, is_leaf=_is_state)


def widen(x: jax.Array) -> jax.Array:
    """Cast to the precision of the arithmetic: the dtype of ``x``, float32 at the least.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.transform import widen
      >>> widen(jnp.zeros(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    return x.astype(wide_dtype(x.dtype))


def wide_dtype(*dtypes: Any) -> Any:
    """The dtype that holds all of ``dtypes``, float32 at the least.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax.transform import wide_dtype
      >>> wide_dtype(jnp.bfloat16, jnp.float16)
      dtype('float32')
    """
    # Widening is meant here, also where the user has forbidden silent promotion.
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def check_integer(name: str, value: Any, least: int) -> int:
    """Check an argument that is an integer of at least ``least``, and return it as an int.

    Example:
      >>> from swagjax.transform import check_integer
      >>> check_integer("every", 0, 1)
      Traceback (most recent call last):
      ...
      ValueError: every=0: give an integer of at least 1
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} is traced, and decides what is compiled: give an integer; "
            f"optax.inject_hyperparams takes static_args=({name!r}, ...)"
        )
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise ValueError(f"{name}={value!r}: give an integer of at least {least}")
    return number


def check_step(name: str, value: Any, least: int) -> int:
    """Check an integer that is compared with a counter of steps, which are counted in int32.

    Example:
      >>> from swagjax.transform import check_step
      >>> check_step("start", 2**40, 0)
      Traceback (most recent call last):
      ...
      ValueError: start=1099511627776: steps are counted in int32, give at most 2147483647
    """
    number, most = check_integer(name, value, least), jnp.iinfo(jnp.int32).max
    if number > most:
        raise ValueError(f"{name}={number}: steps are counted in int32, give at most {most}")
    return number


def check_single(state: SWAGState) -> None:
    """Raise ``ValueError`` for a state of shapes alone, and for one of several members.

    Example:
      >>> import jax, jax.numpy as jnp, swagjax
      >>> from swagjax.transform import check_single
      >>> check_single(jax.vmap(swagjax.swa().init)(jnp.zeros((4, 3))))
      Traceback (most recent call last):
      ...
      ValueError: the state holds several members, num_collected=[0 0 0 0]: map over them with...
    """
    if isinstance(state.num_collected, jax.ShapeDtypeStruct):
        raise ValueError(
            "the state holds shapes, no numbers: it is what jax.eval_shape gave, the target of a "
            "checkpoint; tx.init(params) gives arrays"
        )
    if jnp.ndim(state.num_collected):
        raise ValueError(
            f"the state holds several members, num_collected={state.num_collected}: map over "
            "them with jax.vmap"
        )


def _observer(
    due: Callable[[jax.Array], jax.Array],
    second_moment: bool,
    rank: int | None,
    accumulator_dtype: Any,
    deviation_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
    """Build the transformation that collects the iterate when ``due(t)``."""
    _check_dtype("accumulator_dtype", accumulator_dtype)

    def accumulator(p: Any, dtype: Any = accumulator_dtype) -> jax.Array:
        return jnp.zeros_like(p, dtype=_storage_dtype(p, dtype))

    def ring(p: Any) -> Any:
        if not jax.tree.leaves(p):  # a box whose array is masked
            return p
        if _is_box(p):
            return _rebox(p, ring)
        # Broadcast, not made from a bare shape, which would lose the sharding of p.
        row = accumulator(p, deviation_dtype or accumulator_dtype)
        return jnp.broadcast_to(row, (rank, *row.shape))

    def init_fn(params: optax.Params) -> SWAGState:
        _check_leaves(params)
        return SWAGState(
            num_updates=jnp.zeros((), jnp.int32),
            num_collected=jnp.zeros((), jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
            mean=jax.tree.map(accumulator, params),
            variance=jax.tree.map(accumulator, params) if second_moment else None,
            deviations=jax.tree.map(ring, params, is_leaf=_is_box) if rank else None,
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        iterate: Any = None,
        **_: Any,
    ) -> tuple[optax.Updates, SWAGState]:
        params = _given(params)
        _check_state(state, second_moment, rank)
        _check_alike("updates", updates, "params", params, "give the gradients of these params")
        _check_alike("params", params, "the state", state.mean, "start anew with tx.init(params)")
        state = state._replace(num_updates=optax.safe_increment(state.num_updates))
        if not isinstance(iterate, Partial):  # that of ``collect``, evaluated in the branch
            # Outside the branch, where XLA shares it with the caller's own apply_updates.
            iterate = optax.apply_updates(params, updates)
        # On ``num_updates`` alone: a predicate that differs between vmapped members would turn the
        # branch into a selection over the ring.
        state = jax.lax.cond(due(state.num_updates), _collect, _pass, _vary(state, params), iterate)
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _pass(state: SWAGState, iterate: Any) -> SWAGState:
    """Collect nothing. A function of the module: a new one a call would be compiled anew."""
    del iterate
    return state


def _collect(state: SWAGState, iterate: Any) -> SWAGState:
    """Add one iterate to the moments; one that is not finite changes ``num_skipped`` alone."""
    if isinstance(iterate, Partial):
        iterate = _held(state.mean, iterate())
    theta = jax.tree.map(lambda m, x: x.astype(m.dtype), state.mean, iterate)
    finite = _agree(_all_finite(theta), state.num_collected)
    n: Any = optax.safe_increment(state.num_collected)  # an array, typed as any number
    row = state.num_collected  # modulo the size of the ring
    restarts = row == 0  # of what was collected before it was set to 0 nothing counts

    # A skipped iterate counts as the mean with weight zero, and its row is written back: under
    # vmap a second branch would be a selection over the ring. Each line reads new arrays or its
    # own old one, never another's: so XLA updates them all in place.
    def difference(x: jax.Array, m: jax.Array) -> jax.Array:
        return jnp.where(finite, widen(x) - widen(m), 0)

    def approach(held: jax.Array, new: jax.Array) -> jax.Array:
        old = jnp.where(restarts, 0, widen(held))
        change = jnp.where(finite, new - old, 0)
        moved: jax.Array = old + change * (1 / n.astype(old.dtype))
        return moved.astype(held.dtype)

    def spread(v: jax.Array, e: jax.Array) -> jax.Array:
        # n / (n - 1), of no consequence at n = 1, where the deviation is zero.
        growth = n.astype(e.dtype) / jnp.maximum(n - 1, 1).astype(e.dtype)
        return approach(v, e * e * growth)

    def push(ring: jax.Array, x: jax.Array, m: jax.Array) -> Any:
        return _write_row(ring, jax.lax.rem(row, jnp.int32(ring.shape[0])), x, m, finite)

    mean = jax.tree.map(lambda m, x: approach(m, widen(x)), state.mean, theta)
    deviation = jax.tree.map(difference, theta, mean)
    return SWAGState(
        num_updates=state.num_updates,
        num_collected=jnp.where(finite, n, state.num_collected),
        num_skipped=jnp.where(finite, state.num_skipped, optax.safe_increment(state.num_skipped)),
        mean=mean,
        variance=_map_kept(spread, state.variance, deviation),
        deviations=_map_kept(push, state.deviations, theta, mean),
    )


@jax.custom_jvp
def _write_row(
    ring: jax.Array, row: jax.Array, theta: jax.Array, mean: jax.Array, valid: jax.Array
) -> jax.Array:
    """Write theta - mean to a row of the ring in place, or write the row back as it was."""
    written: jax.Array = _write_mapped(ring, row, theta, mean, valid)
    return written


@_write_row.defjvp
def _write_row_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Linear in all floats; said here because ``custom_vmap`` has no reverse mode."""
    (_, row, _, _, valid), (ring, _, theta, mean, _) = primals, tangents
    return _write_row(*primals), _write(ring, (row,), theta, mean, valid)


@jax.custom_batching.custom_vmap
def _write_mapped(
    ring: jax.Array, row: jax.Array, theta: jax.Array, mean: jax.Array, valid: jax.Array
) -> jax.Array:
    written: jax.Array = _write(ring, (row,), theta, mean, valid)
    return written


@_write_mapped.def_vmap
def _write_rows(size: int, batched: Any, *args: jax.Array) -> tuple[jax.Array, bool]:
    """Write a row of every member's ring; the rows differ where a member has skipped an iterate.

    Left to ``vmap`` that is a scatter, for which XLA:CPU holds the deviations of all members in
    memory at once; it takes one member after another instead, in place.
    """
    mapped = [
        x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_mapped in zip(args, batched, strict=True)
    ]
    scatter = jax.vmap(lambda ring, row, *rest: _write(ring, (row,), *rest))
    rings: jax.Array = jax.lax.platform_dependent(*mapped, cpu=_one_by_one, default=scatter)
    return rings, True


def _one_by_one(rings: jax.Array, rows: jax.Array, *rest: jax.Array) -> jax.Array:
    def body(i: jax.Array, rings: jax.Array) -> Any:
        row, *others = (jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in (rows, *rest))
        return _write(rings, (i.astype(row.dtype), row), *others)

    written: jax.Array = jax.lax.fori_loop(0, len(rows), body, rings)
    return written


def _write(array: Any, at: tuple[Any, ...], theta: Any, mean: Any, valid: Any) -> Any:
    """Write to ``array[at]``, and read no more of it: so that it happens in place, in one loop."""
    start = (*at, *(jnp.zeros_like(at[-1]) for _ in theta.shape))
    shape = (*(1 for _ in at), *theta.shape)
    old = jax.lax.dynamic_slice(array, start, shape, allow_negative_indices=False)
    new = (widen(theta) - widen(mean)).astype(array.dtype).reshape(shape)
    new = jnp.where(valid, new, old)
    return jax.lax.dynamic_update_slice(array, new, start, allow_negative_indices=False)


def _map_kept(function: Callable[..., jax.Array], kept: Any, *others: Any) -> Any:
    """Map over a field of the state, or leave it out where the method keeps none.

    By leaves: the boxes of a ring carry other metadata than those of the parameters.
    """
    if kept is None:
        return None
    leaves, treedef = jax.tree.flatten(kept)
    rows = zip(leaves, *map(jax.tree.leaves, others), strict=True)
    return jax.tree.unflatten(treedef, [function(*row) for row in rows])


def _all_finite(tree: Any) -> jax.Array:
    # The largest modulus, which is NaN where any is: a reduction that fuses, unlike all().
    largest = [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(tree)]
    finite = [jnp.isfinite(x) for x in largest]
    # Sorted because a sort is never fused: as a plain reduction the scalars of all leaves would
    # be combined anew in the loop over every leaf, and a tree of 300 leaves compile for minutes.
    return jnp.sort(jnp.stack(finite))[0] if finite else jnp.array(True)


def _agree(finite: jax.Array, counter: jax.Array) -> jax.Array:
    """Under ``jax.shard_map``: whether the weights are finite on all devices that share them.

    They do along the axes in which the weights vary and the counter does not: a counter of its own
    on each device is that of a member of its own. With ``check_vma=False`` nothing tells which
    axes these are, and all devices have to agree.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not manual:
        return finite
    axes = manual
    if _varying(jax.lax.axis_index(manual)):  # types tell
        shared = _varying(finite) - _varying(counter)
        axes = tuple(name for name in manual if name in shared)
    return jax.lax.pmin(finite.astype(jnp.int32), axes) > 0 if axes else finite


def _vary(state: SWAGState, params: Any) -> SWAGState:
    """Under ``jax.shard_map``: let the fields vary as they will once an iterate is collected."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return state
    own = _varying(state.num_collected)

    def like(held: jax.Array, *others: Any) -> Any:
        missing = own.union(*map(_varying, others)) - _varying(held)
        return jax.lax.pcast(held, tuple(missing), to="varying") if missing else held

    return state._replace(
        num_skipped=like(state.num_skipped),
        mean=_map_kept(like, state.mean, params),
        variance=_map_kept(like, state.variance, params),
        deviations=_map_kept(like, state.deviations, params),
    )


def _varying(x: Any) -> frozenset[Any]:
    """The manual axes of a mesh over which an array differs, as far as its type tells."""
    kind: Any = jax.typeof(x)
    kind = getattr(kind, "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def _held(mean: Any, iterate: Any) -> Any:
    """The leaves of an iterate that the state holds: the observer may stand in optax.masked."""

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(lambda m, x: m if masked(m) else x, mean, iterate, is_leaf=masked)


def _cadence(
    start: int, every: int, when: Callable[[jax.Array], jax.Array] | None
) -> Callable[[jax.Array], jax.Array]:
    """Build the predicate of t that says whether to collect."""
    start, every = check_step("start", start, 0), check_step("every", every, 1)
    if when is None:
        return lambda t: (t > start) & ((t - start) % every == 0)
    if (start, every) != (0, 1):
        raise ValueError(
            f"when={when!r} together with start={start}, every={every}: when replaces both, "
            "give one or the other"
        )
    if not callable(when):
        raise ValueError(f"when={when!r}: give a function of the step to a boolean scalar")

    def due(t: jax.Array) -> jax.Array:
        returned = when(t)
        verdict = None if returned is None else jnp.asarray(returned)
        if verdict is None or verdict.shape != () or verdict.dtype != jnp.bool_:
            shown = None if verdict is None else f"{verdict.dtype}{list(verdict.shape)}"
            raise ValueError(f"when(t) returned {shown}: return a boolean scalar")
        return verdict

    return due


def _check_dtype(name: str, dtype: Any) -> None:
    if dtype is None:
        return
    try:
        held = _is_held(dtype)
    except TypeError:  # a name that is none of a dtype
        held = False
    if not held:
        raise ValueError(
            f"{name}={dtype!r}: give a floating point dtype, such as jnp.float32, of at least 16 "
            "bits"
        )


def _is_held(dtype: Any) -> bool:
    """Whether moments can be held in a dtype: in 8 bits, deviations of 1e-3 are zero."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize > 1


def _storage_dtype(p: Any, dtype: Any) -> Any:
    wide = wide_dtype(jnp.result_type(p))
    dtype = jnp.dtype(wide if dtype is None else dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            "accumulators or deviations of float64: JAX would silently hold them in float32; "
            "set jax_enable_x64 first"
        )
    return dtype


def _check_leaves(params: optax.Params) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        is_array = hasattr(leaf, "shape") or isinstance(leaf, numbers.Number)
        if not is_array or not _is_held(jnp.result_type(leaf)):
            found = f"has dtype {jnp.result_type(leaf)}" if is_array else f"is a {_type(leaf)}"
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} {found}: SWAG averages real "
                "floating point weights; leave other leaves out with optax.masked"
            )


def _given(params: Any) -> Any:
    if params is None:
        raise ValueError(
            "params=None: swag collects the parameters after the step; "
            "call tx.update(updates, state, params)"
        )
    return params


def _check_state(state: Any, second_moment: bool, rank: int | None) -> None:
    """Refuse a state that another transformation made: it would be kept as it is, unseen."""
    if not isinstance(state, SWAGState):
        raise ValueError(
            f"state is a {_type(state)}: give what tx.init(params) or the last tx.update returned, "
            "or a checkpoint restored with the target jax.eval_shape(tx.init, params)"
        )
    check_single(state)
    rings = jax.tree.leaves(state.deviations)
    held = None if state.deviations is None else len(rings[0]) if rings else rank
    found, own = _kind(state.variance is not None, held), _kind(second_moment, rank)
    if found != own:
        raise ValueError(
            f"the state is of {found}, and this is {own}: go on with the transformation it came "
            "from, or start anew with init(params)"
        )


def _kind(second_moment: bool, rank: int | None) -> str:
    if rank is not None:
        return f"swag(rank={rank})"
    return "swag_diag" if second_moment else "swa"


def _check_alike(name: str, tree: Any, other_name: str, other: Any, way_out: str) -> None:
    """Refuse trees that differ in structure or shape: a broadcast would change the weights."""

    def check(path: Any, y: Any, x: Any) -> None:
        shapes, wanted = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)], [jnp.shape(y)]
        if shapes != wanted:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {shapes}: {other_name} holds "
                f"{wanted} there; {way_out}"
            )

    try:
        jax.tree.map(lambda *_: None, other, tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} has another structure than {other_name}: {error}; {way_out}"
        ) from error
    jax.tree.map_with_path(check, other, tree)


def _type(x: Any) -> str:
    return type(x).__name__


def _is_state(node: Any) -> bool:
    return isinstance(node, SWAGState)


def _trains_elsewhere(opt_state: Any, found: SWAGState) -> str | None:
    """The optimizer that holds the weights to be evaluated apart, if they were not collected."""
    contrib: Any = optax.contrib  # whose exports are not marked as such
    kinds = (contrib.ScheduleFreeState, optax.LookaheadState, CollectState)
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    held = [_type(node) for node in nodes if isinstance(node, kinds)]
    both = isinstance(found.mean, optax.LookaheadParams)
    return None if not held or both or "CollectState" in held else held[0]


def _is_variable(node: Any) -> bool:
    """Whether a node is a variable of flax.nnx, told by its interface: flax is no dependency."""
    return hasattr(node, "get_metadata") and hasattr(node, "get_value")


def _is_box(node: Any) -> bool:
    """Whether a node is an array with metadata of its axes: flax.linen's boxes, nnx variables."""
    return _is_variable(node) or (hasattr(node, "replace_boxed") and hasattr(node, "add_axis"))


def _rebox(box: Any, function: Callable[[Any], Any]) -> Any:
    """Map what is in a box to a ring, and move the names of its axes past the rank axis.

    Left as they are, the names would shard the ring over its rank: silently, where it divides.
    """
    if not _is_variable(box):
        return box.replace_boxed(function(box.unbox())).add_axis(0, {"partition_name": None})
    names = {
        name: _behind_rank(value)
        for name, value in box.get_metadata().items()
        if name.endswith("sharding")
    }
    return box.copy(function(box.get_value()), **names)


def _behind_rank(names: Any) -> Any:
    """The names of the axes of a ring, from those of its parameter in any form that flax takes."""
    if isinstance(names, NamedSharding):
        return NamedSharding(names.mesh, _behind_rank(names.spec), memory_kind=names.memory_kind)
    if isinstance(names, PartitionSpec):
        return PartitionSpec(None, *names)
    return (None, *names) if isinstance(names, tuple | list) else names


def _unwrap(node: Any) -> Any:
    return node.get_value() if _is_variable(node) else node
