"""Two states collected apart made one, as if one run had collected the iterates of both."""

from typing import Any

import jax
import jax.numpy as jnp

from swagjax.gaussian import collected, combine, contract, recentring, written
from swagjax.transform import SWAGState, check_single, wide_dtype, widen


def merge(first: SWAGState, second: SWAGState) -> SWAGState:
    """The state of a run that collected the iterates of ``first`` and then those of ``second``.

    For two parts of a run, or two runs from one point. With n and m iterates, D their deviations:

        mean     = (n mean_1 + m mean_2) / (n + m)
        variance = (n variance_1 + m variance_2) / (n + m) + n m / (n + m)^2 (mean_2 - mean_1)^2
        ring     = the last K iterates of the sequence, less the running mean of the sequence

    Both rings are recentred, to the means of their own states and from there to the union's, so
    that both centrings of the posterior stay exact and collecting can go on. Where ``second``
    holds K deviations of its own, the ring of the union is made of those alone: the order of the
    arguments matters to the ring, and to nothing else. The counters are added up.

    Args:
      first: a state of ``swag``, ``swag_diag`` or ``swa``.
      second: one of the same kind, rank and parameters. Either may have collected nothing.

    Returns:
      A state in the dtypes of ``first``.

    Raises:
      ValueError: for states that are not of the same kind, rank, structure and shapes.

    Example:
      >>> import jax.numpy as jnp, swagjax
      >>> tx, params = swagjax.swag(rank=2), jnp.array([0.0])
      >>> def collect(*iterates):
      ...     state = tx.init(params)
      ...     for x in iterates:
      ...         _, state = tx.update(jnp.array([x]), state, params)
      ...     return state
      >>> merged = swagjax.merge(collect(0.0, 6.0), collect(6.0))
      >>> print(merged.num_collected, merged.mean, merged.variance)
      3 [4.] [8.]
      >>> print(merged.deviations.ravel().round(4))
      [2. 3.]
      >>> print(collect(0.0, 6.0, 6.0).deviations.ravel())
      [2. 3.]

    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing
    sample variances", equation 2.1.
    """
    _check_alike(first, second)
    state: SWAGState = _merge(first, second)
    return state


@jax.jit
def _merge(first: SWAGState, second: SWAGState) -> SWAGState:
    def mean(m: jax.Array, other: jax.Array) -> Any:
        a, b = widen(m), widen(other)
        return (a + (b - a) * _share(first, second, a.dtype)).astype(m.dtype)

    def variance(v: jax.Array, other: jax.Array, shift: jax.Array) -> Any:
        a, b, share = widen(v), widen(other), _share(first, second, shift.dtype)
        # The shift from an empty state is none: its square could be infinite.
        apart = jnp.where(share * (1 - share) == 0, 0, shift)
        return (a + (b - a) * share + apart * apart * (share * (1 - share))).astype(v.dtype)

    shift = jax.tree.map(lambda a, b: widen(b) - widen(a), first.mean, second.mean)
    return SWAGState(
        num_updates=_plus(first.num_updates, second.num_updates),
        num_collected=_plus(first.num_collected, second.num_collected),
        num_skipped=_plus(first.num_skipped, second.num_skipped),
        mean=jax.tree.map(mean, first.mean, second.mean),
        variance=None
        if first.variance is None
        else jax.tree.map(variance, first.variance, second.variance, shift),
        deviations=_merge_rings(first, second, jax.tree.leaves(shift)),
    )


def _merge_rings(first: SWAGState, second: SWAGState, shift: list[jax.Array]) -> Any:
    """The ring of the union: three small matrices times the two rings and the shift of the means.

    With E = theta - (mean of the union) for the iterates of the union's rows, those of ``first``
    have E = A_1 D_1 + (mean_1 - mean), those of ``second`` E = A_2 D_2 + (mean_2 - mean), with A
    the recentring of each; and D = A^-1 E.
    """
    rings, treedef = jax.tree.flatten(first.deviations)
    others = jax.tree.leaves(second.deviations)
    if not rings:
        return first.deviations
    rank, dtype = len(rings[0]), wide_dtype(*[x.dtype for x in shift])
    n, m = first.num_collected, second.num_collected
    count = _plus(n, m)
    number = collected(count, rank)
    is_first, is_second = (number > 0) & (number <= n), number > n
    # The j-th iterate of the second is number n + j of the union: its row moves on by n.
    moved = jnp.roll(recentring(m, rank, dtype), n, axis=0)
    back = _running(count, rank, dtype)
    share, as_it_is = _share(first, second, dtype), written(count, rank, dtype)
    of_first = contract(back, jnp.where(is_first[:, None], recentring(n, rank, dtype), 0))
    of_first = jnp.where(m == 0, as_it_is, of_first)  # to the last bit
    of_second = contract(back, jnp.where(is_second[:, None], moved, 0))
    of_second = jnp.where(n == 0, as_it_is, of_second)
    of_shift = contract(back, jnp.where(is_second, 1 - share, jnp.where(is_first, -share, 0)))

    def row_by_row(ring: jax.Array, a: jax.Array, b: jax.Array, s: jax.Array) -> jax.Array:
        outer = of_shift.reshape(-1, *(1,) * s.ndim).astype(s.dtype) * s[None]
        return (a.astype(s.dtype) + b.astype(s.dtype) + outer).astype(ring.dtype)

    parts = zip(rings, combine(of_first, rings), combine(of_second, others), shift, strict=True)
    return jax.tree.unflatten(treedef, [row_by_row(*part) for part in parts])


def _share(first: SWAGState, second: SWAGState, dtype: Any) -> jax.Array:
    """The share of the second state in all iterates."""
    n, m = first.num_collected.astype(dtype), second.num_collected.astype(dtype)
    return m / jnp.maximum(n + m, 1)


def _plus(n: jax.Array, m: jax.Array) -> jax.Array:
    """The sum of two counters, which stops at the largest int32 as each of them does."""
    return n + jnp.minimum(m, jnp.iinfo(n.dtype).max - n)


def _running(count: jax.Array, rank: int, dtype: Any) -> jax.Array:
    """The inverse of ``recentring``: d_i = e_i + 1/i sum_{j > i} e_j for e_i = theta_i - mean_n."""
    number = collected(count, rank)
    later = (number[None, :] > number[:, None]) & (number[:, None] > 0)
    shares = jnp.where(later, 1 / jnp.maximum(number, 1).astype(dtype)[:, None], 0)
    return jnp.eye(rank, dtype=dtype) + shares.astype(dtype)


def _check_alike(first: Any, second: Any) -> None:
    for name, state in (("first", first), ("second", second)):
        if not isinstance(state, SWAGState):
            raise ValueError(
                f"{name} is a {type(state).__name__}: give the SWAGState, "
                "swagjax.get_state(opt_state)"
            )
        check_single(state)
    for field in ("mean", "variance", "deviations"):
        shapes = [_shapes(getattr(state, field)) for state in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"first.{field} is {shapes[0]}, second.{field} is {shapes[1]}: only states of the "
                "same kind, rank and parameters can be merged"
            )


def _shapes(tree: Any) -> dict[str, Any] | None:
    """The shape of every leaf by its path, for comparison and for messages."""
    if tree is None:
        return None
    paths = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in paths}
