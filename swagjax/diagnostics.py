"""Is a posterior to be trusted: checks of what was collected."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from swagjax.pairing import restrict
from swagjax.transform import SWAGState, check_single, get_state, widen


def check_iterate(opt_state: Any, params: optax.Params) -> None:
    """Check that the iterate collected last is ``params``: that swag is last in the chain.

    What changes the updates after swag in a chain (weight decay, a projection, a second optimizer)
    makes it collect points that were never visited, which it cannot see from inside. Call this
    once, after a step that collected, outside ``jit``. The iterate is recovered from the state, as
    the mean plus the newest deviation; without deviations that works after the first collection
    only, when the mean is the iterate.

    Args:
      opt_state: the optimizer state after that step, as for ``swagjax.get_state``.
      params: the parameters after that step.

    Raises:
      ValueError: where they differ by more than the rounding of the state; where nothing was
        collected; where a state without deviations has collected more than one iterate; for params
        of another structure.

    Example:
      >>> import jax.numpy as jnp, optax, swagjax
      >>> tx = optax.chain(optax.sgd(0.1), swagjax.swag(rank=2), optax.scale(0.5))  # not last
      >>> params = {"w": jnp.ones(2)}
      >>> updates, opt_state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> swagjax.diagnostics.check_iterate(opt_state, params)
      Traceback (most recent call last):
      ...
      ValueError: the iterate collected last differs from params['w'] by up to 0.05: put swag last
      in the optax.chain, ...
    """
    state = get_state(opt_state)
    if isinstance(state.count, jax.core.Tracer):
        raise ValueError(f"opt_state is traced, {state.count}: call check_iterate outside jit")
    check_single(state)
    deviation = jax.tree.leaves(_newest_deviation(state))
    paths = jax.tree.leaves_with_path(restrict(state.mean, params, "params"))
    means = jax.tree.leaves(state.mean)
    for (path, leaf), m, d in zip(paths, means, deviation, strict=True):
        where = f"params{jax.tree_util.keystr(path)}"
        if not jnp.isfinite(leaf).all():
            raise ValueError(
                f"{where} is not finite: such an iterate is never collected, see state.skipped"
            )
        error = jnp.abs(widen(m) + widen(d) - leaf)
        if not (error <= _rounding(m, d)).all():  # so that NaN is an error too
            raise ValueError(
                f"the iterate collected last differs from {where} by up to {error.max():.2g}: put "
                "swag last in the optax.chain, and call check_iterate right after a step that "
                "collected"
            )


def _newest_deviation(state: SWAGState) -> Any:
    count = int(state.count)
    if count and state.deviations is not None:
        return jax.tree.map(lambda ring: ring[(count - 1) % len(ring)], state.deviations)
    if count == 1:
        return jax.tree.map(jnp.zeros_like, state.mean)
    raise ValueError(
        f"count={count}: the iterate collected last is not known; call check_iterate after a step "
        "that collected, and without deviations (swa, swag_diag) after the first such step"
    )


def _rounding(mean: jax.Array, deviation: jax.Array) -> jax.Array:
    """A bound on what is lost between an iterate and the mean plus its deviation.

    Of the largest weight of a leaf: where the update is applied by another program than the one
    that collects, the two round it apart, and a weight may be much smaller than its update.
    """
    m, d = jnp.abs(widen(mean)), jnp.abs(widen(deviation))
    eps, ring = float(jnp.finfo(mean.dtype).eps), jnp.finfo(deviation.dtype)
    stored = float(ring.eps) * d + float(ring.smallest_subnormal)
    return 4 * eps * jnp.max(m + d, initial=0) + stored
