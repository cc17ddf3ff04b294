"""MultiSWAG: several SWAG posteriors as one mixture of Gaussians, a mode of the loss each.

With N(m_j, S_j) the Gaussians of M runs, all of the same weight:

    p(theta) = 1/M sum_j N(theta; m_j, S_j)

The runs are trained apart, or side by side under one ``jax.vmap`` (``swagjax.member_axes``);
``mix`` makes a ``Mixture`` of what they collected. A single run is the mixture of one. A
mixture is a posterior for ``predict``, which takes the same number of samples from each member, as
in the paper, and so leaves the chance of the draw of a member out of the average:

    probs = swagjax.predict(key, mixture, prob_fn, inputs, num_samples=30, refresh=refresh)

``sample`` draws the member anew for every sample; options go in with
``jax.tree_util.Partial(swagjax.ensemble.sample, mixture=mixture, scale=0.5, like=params)``.

Members that are spread over devices predict, and are drawn from, where they are, where those that
are chosen among are gathered on every device first: ``SWAGState(*mixture)`` is the stacked state,
for ``jax.vmap`` over members, here ``vmap(swagjax.sample)(keys, SWAGState(*mixture))``.

Weights that come from elsewhere, one by one, are ``Points``: iterates of one run, a deep
ensemble, a Markov chain.

Options are those of ``swagjax.posterior`` and hold for every member.

Source: Wilson, Izmailov 2020, "Bayesian Deep Learning and a Probabilistic Perspective of
Generalization" (arXiv:2002.08791), section 4.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from swagjax import posterior, prng
from swagjax.gaussian import Centering, contract, gaussian, noise_dtype, sqrt
from swagjax.pairing import dtypes, fill
from swagjax.transform import SWAGState, check_integer, check_single, widen


class Mixture(NamedTuple):
    """The states of M members, stacked: the fields of ``SWAGState`` behind an axis of members.

    A type of its own, so that a mixture is never taken for the state of one run; a tree of arrays
    like it, to be saved, sharded and passed to compiled functions.

    Attributes:
      num_updates: int32, shape (M,).
      num_collected: int32, shape (M,), iterates collected by each member; M is its
        length.
      num_skipped: int32, shape (M,).
      mean: a tree with leaves of shape ``(M, *leaf.shape)``.
      variance: likewise; ``None`` for members of ``swa``.
      deviations: a tree with leaves of shape ``(M, rank, *leaf.shape)``; ``None`` for members of
        ``swa`` and ``swag_diag``.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax import ensemble
      >>> tx, zero = swagjax.swa(), jnp.zeros(3)
      >>> _, state = tx.update(zero, tx.init(zero), zero)
      >>> mixture = ensemble.mix([state, state])
      >>> print(type(mixture).__name__, mixture.num_collected, mixture.mean.shape)
      Mixture [1 1] (2, 3)
    """

    num_updates: jax.Array
    num_collected: jax.Array
    num_skipped: jax.Array
    mean: Any
    variance: Any
    deviations: Any


class Points(NamedTuple):
    """Weights that count the same, each once: a posterior for ``predict`` that draws nothing.

    The snapshots of a cyclical learning rate, ``Points(swagjax.iterates(state))``, which make a
    fast geometric ensemble; the networks of a deep ensemble; the samples of a Markov chain.
    ``num_samples`` of ``predict`` is their number, and need not be given; the key draws nothing.

    Attributes:
      params: a tree like the parameters, with an axis of points before all others.

    Example:
      >>> import jax, jax.numpy as jnp, swagjax
      >>> points = swagjax.ensemble.Points({"w": jnp.array([1.0, 2.0, 6.0])})
      >>> def double(params, x):
      ...     return 2 * params["w"] * x
      >>> print(swagjax.predict(jax.random.key(0), points, double, 1.0))
      6.0
    """

    params: Any


def mix(states: SWAGState | Sequence[SWAGState]) -> Mixture:
    """Make a mixture of the states of several runs.

    Args:
      states: a list of states of the same kind, rank and parameters, collected apart; or one
        state with an axis of members before all others, as ``jax.vmap`` leaves it and, of a member
        per process, ``jax.experimental.multihost_utils.process_allgather``. The members may have
        taken different numbers of steps and collected different numbers of iterates.

    Returns:
      The mixture. A list is copied; arrays that are stacked already stay where they lie, spread
      over devices or not.

    Raises:
      ValueError: for no states, states that differ in kind, rank, structure, shape, dtype or
        device, a single state that is not in a list, or a member that has collected nothing.

    Example:
      >>> import jax, jax.numpy as jnp, optax, swagjax
      >>> from swagjax import ensemble
      >>> tx = optax.chain(optax.sgd(0.1), swagjax.swag(rank=2))
      >>> params = jnp.array([[0.0, 5.0], [1.0, -5.0], [2.0, 0.0]])  # three members
      >>> axes = swagjax.member_axes(jax.eval_shape(tx.init, params[0]))
      >>> opt_state = jax.vmap(tx.init, out_axes=axes)(params)
      >>> update = jax.vmap(tx.update, in_axes=(0, axes, 0), out_axes=(0, axes))
      >>> updates, opt_state = update(jnp.ones((3, 2)), opt_state, params)
      >>> side_by_side = ensemble.mix(swagjax.get_state(opt_state))
      >>> print(side_by_side.num_collected, side_by_side.deviations.shape)
      [1 1 1] (3, 2, 2)
      >>> def alone(params):
      ...     return swagjax.get_state(tx.update(jnp.ones(2), tx.init(params), params)[1])
      >>> apart = ensemble.mix([alone(member) for member in params])
      >>> print((apart.mean == side_by_side.mean).all())
      True
    """
    if isinstance(states, SWAGState):
        mixture = _of_stacked(states)
    else:
        _check_alike(states)
        stacked: SWAGState = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        mixture = Mixture(*stacked)
    _check(mixture)
    return mixture


def member(mixture: Mixture, index: chex.Numeric) -> SWAGState:
    """The state of one member, with which everything goes that goes with a state.

    Args:
      mixture: what ``mix`` made.
      index: its number, from 0; may be traced.

    Returns:
      A state.

    Raises:
      ValueError: where ``mixture`` is none, or the index, if it is known, is out of range.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax import ensemble
      >>> tx, zero = swagjax.swa(), jnp.zeros(1)
      >>> states = [tx.update(zero + x, tx.init(zero), zero)[1] for x in (1.0, 2.0)]
      >>> print(ensemble.member(ensemble.mix(states), 1).mean)
      [2.]
    """
    _check(mixture)
    size = len(mixture.num_collected)
    if not isinstance(index, jax.core.Tracer):
        index = check_integer("index", index, 0)
        if index >= size:
            raise ValueError(f"index={index}: the mixture has members 0 to {size - 1}")
    return _member(mixture, index)


def sample(
    key: chex.PRNGKey,
    mixture: Mixture,
    *,
    scale: chex.Numeric = 1.0,
    centering: Centering = "running",
    min_variance: chex.Numeric = 0.0,
    like: Any = None,
) -> Any:
    """Draw a member, each as likely, and weights from its Gaussian.

    The other members are not touched: a draw takes the time and the memory of one from a single
    state, and ``jax.vmap`` over keys the memory of its samples.

    Args:
      key: one PRNG key, typed or raw.
      mixture: what ``mix`` made.
      scale: factor of every member's covariance.
      centering: ``"running"`` or ``"final"``.
      min_variance: floor under every member's Sigma_diag.
      like: as in ``swagjax.sample``.

    Returns:
      A tree like the parameters of one member.

    Raises:
      ValueError: for a bad key or option, what is no mixture, a member that collected nothing.

    Example:
      >>> import jax, jax.numpy as jnp, swagjax
      >>> from swagjax import ensemble
      >>> tx, zero = swagjax.swa(), jnp.zeros(1)
      >>> states = [tx.update(zero + x, tx.init(zero), zero)[1] for x in (1.0, 2.0)]
      >>> keys = jax.random.split(jax.random.key(0), 1000)
      >>> thetas = jax.vmap(ensemble.sample, (0, None))(keys, ensemble.mix(states))
      >>> print(jnp.unique(thetas), thetas.mean().round(1))
      [1. 2.] 1.5
    """
    _check(mixture)
    one = jnp.int32(1)
    none = SWAGState(mixture.num_updates, one, mixture.num_skipped, (), None, None)  # for errors
    posterior.variance(none, scale=scale, centering=centering, min_variance=min_variance)
    one_mean = jax.eval_shape(_member, mixture, 0).mean
    cast = None if like is None else dtypes(one_mean, like)
    theta = _sample(prng.one_key(key), mixture, scale, min_variance, centering=centering, cast=cast)
    return theta if like is None else fill(theta, like)


def size(posterior: Mixture | Points) -> int:
    """How many members a mixture has, or how many points there are.

    Raises:
      ValueError: for a member that has collected nothing, points without a common axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from swagjax import ensemble
      >>> ensemble.size(ensemble.Points(jnp.zeros((4, 3))))
      4
    """
    if not isinstance(posterior, Points):
        _check(posterior)
        return len(posterior.num_collected)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(posterior.params)}
    if len(lengths) != 1 or not all(lengths) or (0,) in lengths:
        found = ", ".join(sorted({str(jnp.shape(x)) for x in jax.tree.leaves(posterior.params)}))
        raise ValueError(
            f"the points have leaves of shape {found or 'none'}: give a tree like the parameters, "
            "with one axis of points before all others in every leaf"
        )
    ((number,),) = lengths
    return number


def draw(key: jax.Array, posterior: Mixture | Points, index: chex.Numeric) -> Any:
    """Weights from the Gaussian of one member, or one of the points, by its number from 0.

    Of a mixture ``swagjax.sample(key, member(mixture, index))``, without a copy of the ring under
    ``vmap``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from swagjax import ensemble
      >>> print(ensemble.draw(jax.random.key(0), ensemble.Points(jnp.array([[1.0], [2.0]])), 1))
      [2.]
    """
    size(posterior)  # raises where it is of no use
    if isinstance(posterior, Points):
        return jax.tree.map(lambda x: _at(x, index), posterior.params)
    index = jnp.asarray(index)
    return _sample_of(key, posterior, index, 1.0, 0.0, centering="running", cast=None)


def log_prob(
    mixture: Mixture,
    params: Any,
    *,
    scale: chex.Numeric = 1.0,
    centering: Centering = "running",
    min_variance: chex.Numeric = 0.0,
) -> jax.Array:
    """Log-density of the mixture at ``params``, in nats.

    ``logsumexp_j log N(params; m_j, S_j) - log M``, with the members' densities, their precision
    and their degenerate cases as in ``swagjax.log_prob``: of one member it is that number to
    the last bit. Two members of a network are so far apart that one term alone counts. It takes
    the memory of the mixture once more.

    Args:
      mixture: what ``mix`` made.
      params: a tree like the parameters of one member.
      scale: factor of every member's covariance.
      centering: ``"running"`` or ``"final"``.
      min_variance: floor under every member's Sigma_diag.

    Returns:
      A scalar.

    Raises:
      ValueError: as ``swagjax.log_prob``.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax import ensemble
      >>> tx, zero = swagjax.swag_diag(), jnp.zeros(1)
      >>> def collect(*iterates):
      ...     state = tx.init(zero)
      ...     for x in iterates:
      ...         _, state = tx.update(zero + x, state, zero)
      ...     return state
      >>> mixture = ensemble.mix([collect(1.0, 3.0), collect(-1.0, -3.0)])  # N(2, 1), N(-2, 1)
      >>> print(f"{ensemble.log_prob(mixture, zero):.3f}")  # N(2, 1) at 0
      -2.919
    """
    _check(mixture)
    density = functools.partial(
        posterior.log_prob,
        params=params,
        scale=scale,
        centering=centering,
        min_variance=min_variance,
    )
    densities = _of_each(mixture, density)
    mixed: jax.Array = jax.nn.logsumexp(densities) - math.log(len(densities))
    return mixed


def mean(mixture: Mixture) -> Any:
    """Mean of the mixture, ``1/M sum_j m_j``: between the modes, seldom good weights.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax import ensemble
      >>> tx, zero = swagjax.swa(), jnp.zeros(1)
      >>> states = [tx.update(zero + x, tx.init(zero), zero)[1] for x in (1.0, 2.0)]
      >>> print(ensemble.mean(ensemble.mix(states)))
      [1.5]
    """
    _check(mixture)
    return _average(_of_each(mixture, posterior.mean))


def variance(
    mixture: Mixture,
    *,
    scale: chex.Numeric = 1.0,
    centering: Centering = "running",
    min_variance: chex.Numeric = 0.0,
) -> Any:
    """Marginal variance of every weight under the mixture: within members, and between them.

    ``1/M sum_j diag S_j + 1/M sum_j (m_j - mean)^2``. Options and errors as in ``log_prob``.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> from swagjax import ensemble
      >>> tx, zero = swagjax.swa(), jnp.zeros(1)
      >>> states = [tx.update(zero + x, tx.init(zero), zero)[1] for x in (1.0, 2.0)]
      >>> print(ensemble.variance(ensemble.mix(states)))
      [0.25]
    """
    _check(mixture)
    of_member = functools.partial(
        posterior.variance, scale=scale, centering=centering, min_variance=min_variance
    )
    within = _average(_of_each(mixture, of_member))
    between = jax.tree.map(lambda m: widen(m).var(0).astype(m.dtype), mixture.mean)
    return jax.tree.map(jnp.add, within, between)


@functools.partial(jax.jit, static_argnames=("centering", "cast"))
def _sample(
    key: jax.Array,
    mixture: Mixture,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
    cast: tuple[Any, ...] | None,
) -> Any:
    key_index, key = jax.random.split(key)
    index = jax.random.randint(key_index, (), 0, len(mixture.num_collected))
    return _sample_of(key, mixture, index, scale, min_variance, centering=centering, cast=cast)


@functools.partial(jax.jit, static_argnames=("centering", "cast"))
def _sample_of(
    key: jax.Array,
    mixture: Mixture,
    index: jax.Array,
    scale: chex.Numeric,
    min_variance: chex.Numeric,
    *,
    centering: Centering,
    cast: tuple[Any, ...] | None,
) -> Any:
    state = _member(mixture, index)  # of its ring nothing is read
    key1, key2 = jax.random.split(key)
    z1 = jax.tree.leaves(prng.normal_like(key1, jax.tree.map(widen, state.mean)))
    drawn = gaussian(state, scale, centering, min_variance)
    triples = zip(drawn.mean, drawn.variance, z1, strict=True)
    leaves = [m + sqrt(v) * z for m, v, z in triples]
    rings = jax.tree.leaves(mixture.deviations)
    if rings:
        z2 = prng.normal(key2, (rings[0].shape[1],), noise_dtype(state))
        leaves = _add_rows(leaves, rings, index, contract(drawn.mixing, z2))
    means, treedef = jax.tree.flatten(state.mean)
    wanted = [m.dtype for m in means] if cast is None else cast
    leaves = [x.astype(dtype) for x, dtype in zip(leaves, wanted, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


def _add_rows(
    leaves: list[jax.Array], rings: list[jax.Array], index: jax.Array, weights: jax.Array
) -> list[jax.Array]:
    """Add the weighted rows of a member's ring, a row at a time.

    A product would have the ring of the member copied first, under ``vmap`` for every sample; so
    would a slice of the member with the row sliced out of it.
    """

    def add(row: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
        return [
            x + weights[row].astype(x.dtype) * _row(ring, index, row).astype(x.dtype)
            for x, ring in zip(leaves, rings, strict=True)
        ]

    added: list[jax.Array] = jax.lax.fori_loop(0, len(weights), add, leaves)
    return added


def _row(ring: jax.Array, index: jax.Array, row: jax.Array) -> jax.Array:
    start = (index, row.astype(index.dtype), *(jnp.zeros_like(index) for _ in ring.shape[2:]))
    sizes = (1, 1, *ring.shape[2:])
    found = jax.lax.dynamic_slice(ring, start, sizes, allow_negative_indices=False)
    return widen(found.reshape(ring.shape[2:]))


def _member(mixture: Mixture, index: chex.Numeric) -> SWAGState:
    return SWAGState(*jax.tree.map(lambda x: _at(x, index), tuple(mixture)))


def _at(x: jax.Array, index: chex.Numeric) -> jax.Array:
    element: jax.Array = jax.lax.dynamic_index_in_dim(
        x, index, keepdims=False, allow_negative_indices=False
    )
    return element


def _of_each(mixture: Mixture, function: Callable[[SWAGState], Any]) -> Any:
    """What a function gives for each member, stacked; a single one as if it were alone."""
    if len(mixture.num_collected) == 1:
        return jax.tree.map(lambda x: x[None], function(_member(mixture, 0)))
    return jax.vmap(function)(SWAGState(*mixture))


def _average(tree: Any) -> Any:
    return jax.tree.map(lambda x: widen(x).mean(0).astype(x.dtype), tree)


def _of_stacked(state: SWAGState) -> Mixture:
    shape = jnp.shape(state.num_collected)
    if isinstance(state.num_collected, jax.ShapeDtypeStruct):
        check_single(state)  # raises
    if len(shape) != 1:
        raise ValueError(
            f"states is one state with num_collected={state.num_collected}: give a list of "
            "states, mix([state]) for a single one, or a state with one axis of members"
        )
    if not shape[0]:
        raise ValueError("states is a state of no members: a mixture has at least one")
    state = state._replace(num_updates=jnp.broadcast_to(state.num_updates, shape))
    for path, leaf in jax.tree.leaves_with_path(state):
        if jnp.shape(leaf)[:1] != shape:
            raise ValueError(
                f"states{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, and count "
                f"{shape}: every field of stacked states has the axis of members first"
            )
    return Mixture(*jax.tree.map(jnp.asarray, tuple(state)))


def _check_alike(states: Any) -> None:
    if not isinstance(states, Sequence) or not all(isinstance(s, SWAGState) for s in states):
        held = {type(s).__name__ for s in states} if isinstance(states, Sequence) else ""
        raise ValueError(
            f"states is a {type(states).__name__}{f' of {held}' if held else ''}: give a list of "
            "SWAGStates, [swagjax.get_state(opt_state), ...]"
        )
    if not states:
        raise ValueError("states=[]: a mixture has at least one member")
    for i, state in enumerate(states):
        check_single(state)
        for field in ("mean", "variance", "deviations"):
            first, other = (_described(getattr(s, field)) for s in (states[0], state))
            if first != other:
                raise ValueError(
                    f"states[0].{field} is {first}, states[{i}].{field} is {other}: members of a "
                    "mixture have the same kind, rank, parameters and dtypes"
                )
    places = {frozenset(x.devices()) for x in jax.tree.leaves(states) if _is_placed(x)}
    if len(places) > 1:
        raise ValueError(
            f"states lie on {len(places)} different sets of devices: bring them together by "
            "mix(jax.device_get(states))"
        )


def _described(tree: Any) -> Any:
    """Structure, shapes and dtypes, for comparison and for messages."""
    shapes = jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", tree)
    return shapes if tree is None else (jax.tree.structure(tree), *jax.tree.leaves(shapes))


def _is_placed(x: Any) -> bool:
    """Whether an array stays on its devices; others go where they are needed."""
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed


def _check(mixture: Any) -> None:
    if not isinstance(mixture, Mixture):
        raise ValueError(
            f"mixture is a {type(mixture).__name__}: give what swagjax.ensemble.mix(states) made"
        )
    if not _is_known(mixture.num_collected) or np.all(np.asarray(mixture.num_collected) > 0):
        return
    raise ValueError(
        f"the members {np.flatnonzero(np.asarray(mixture.num_collected) == 0)} have collected no "
        f"iterate (num_collected={mixture.num_collected} after num_updates={mixture.num_updates}, "
        f"num_skipped={mixture.num_skipped} that were not finite): "
        "train them past `start`, or leave them out"
    )


def _is_known(x: Any) -> bool:
    """Whether the values of an array can be read: neither traced nor on other hosts."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
