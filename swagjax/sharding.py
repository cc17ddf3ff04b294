"""Where a state lies on many devices: its shardings, from those of the parameters.

The ring of a parameter of sharding ``P("data", None)`` has ``P(None, "data", None)``: its rank axis
is whole, so that collecting and sampling move nothing between devices. A state made outside ``jit``
lies so by itself, and on a mesh with axes of ``AxisType.Explicit`` it stays so. With ``Auto`` axes
``jit`` places results as it likes, zeros in particular, and has to be told, where the state is made
and where it is updated:

    placed = swagjax.sharding.state_shardings(tx.init, params)
    opt_state = jax.jit(tx.init, out_shardings=placed)(params)
    step = jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(params_placed, placed))

No names or shapes are matched here: JAX itself is asked what ``init`` would do if the shardings of
the parameters were part of their types. So it holds for the state of any optax optimizer, of flax
and of your own. ``optax.tree_map_params`` is no substitute: it treats a ring as it does the
parameter, and would put the spec of the parameter's first axis on the rank axis.

Many machines run the same program on a larger mesh, after ``jax.distributed.initialize()``.

Inside ``jax.shard_map``, too, weights that are spread over devices are one iterate: it is collected
by all devices or, where one of them holds a coordinate that is not finite, by none. A member of its
own on every device, with counters of its own, skips alone. With ``check_vma=False``, and under
``jax.pmap``, nothing tells the two apart, and all devices skip together. Read the state outside:
``sample`` and the densities take the weights of one device for all there are.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)


def state_shardings(init: Callable[[Any], Any], params: Any) -> Any:
    """Shardings of the state that ``init(params)`` returns, for the ``out_shardings`` of ``jit``.

    What is made from a parameter lies as the parameter does: moments alike, the ring of ``swag``
    behind a whole rank axis. Counters, and all else that ``init`` makes from nothing, are
    replicated over the mesh of the parameters. On a single device everything lies there.

    Args:
      init: ``tx.init`` of any optax transformation, or any function of the parameters alone, such
        as ``lambda params: TrainState.create(apply_fn=..., params=params, tx=tx)``.
      params: parameters with ``NamedSharding``s of one mesh: arrays, or ``jax.ShapeDtypeStruct``s
        with a ``sharding`` where nothing is to be allocated. Leaves that are on a single device,
        or nowhere yet, count as replicated over the mesh of the others.

    Returns:
      A tree like ``init(params)`` of shardings.

    Raises:
      ValueError: where no leaf has a sharding, where one has a sharding that names no axes of a
        mesh, or where there are several meshes.

    Example:
      >>> import jax, jax.numpy as jnp, optax, swagjax
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
      >>> split = NamedSharding(mesh, PartitionSpec("data", None))
      >>> params = {"w": jax.device_put(jnp.zeros((16, 3)), split)}
      >>> tx = optax.chain(optax.adam(1e-3), swagjax.swag(rank=20))
      >>> shardings = swagjax.sharding.state_shardings(tx.init, params)
      >>> opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> state = swagjax.get_state(opt_state)
      >>> print(state.mean["w"].sharding.spec, state.deviations["w"].sharding.spec)
      P('data', None) P(None, 'data', None)
    """
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init, params))


def abstract_state(init: Callable[[Any], Any], params: Any) -> Any:
    """Shapes, dtypes and shardings of the state that ``init(params)`` returns, nothing allocated.

    It is what a checkpoint is restored against, straight into the shards of each device, whatever
    the devices were when it was saved. Arguments and errors as in ``state_shardings``.

    Returns:
      A tree like ``init(params)`` of ``jax.ShapeDtypeStruct``.

    Example:
      >>> import jax, jax.numpy as jnp, swagjax
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((8,), ("data",))
      >>> split = NamedSharding(mesh, PartitionSpec("data"))
      >>> params = {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=split)}
      >>> abstract = swagjax.sharding.abstract_state(swagjax.swag(rank=20).init, params)
      >>> abstract.deviations["w"].shape, abstract.deviations["w"].sharding.shard_shape((20, 16))
      ((20, 16), (20, 2))

    With orbax: ``StandardCheckpointer().restore(path, abstract)``.
    """
    home = _home(params)
    if not isinstance(home, NamedSharding):
        state = jax.eval_shape(init, params)
        return jax.tree.map(lambda leaf: leaf.update(sharding=home), state)
    mesh = home.mesh.abstract_mesh
    typed = mesh.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))
    with jax.sharding.use_abstract_mesh(typed):
        state = jax.eval_shape(init, jax.tree.map(functools.partial(_typed, typed), params))
    return jax.tree.map(lambda leaf: leaf.update(sharding=_spread(home, leaf)), state)


def _home(params: Any) -> Sharding:
    """The replicated sharding over the mesh of the parameters, or the device they are all on."""
    homes: dict[Sharding, str] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        name, sharding = f"params{jax.tree_util.keystr(path)}", getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            homes.setdefault(NamedSharding(sharding.mesh, PartitionSpec()), name)
        elif isinstance(sharding, SingleDeviceSharding):
            homes.setdefault(sharding, name)
        elif sharding is not None:
            raise ValueError(
                f"{name} has a {type(sharding).__name__}, which names no axes of a mesh: place it "
                "with jax.device_put(..., jax.sharding.NamedSharding(mesh, spec))"
            )
    meshes = {home: name for home, name in homes.items() if isinstance(home, NamedSharding)}
    found = meshes or homes
    if len(found) != 1:
        where = "; ".join(f"{name} has {home}" for home, name in found.items())
        raise ValueError(
            f"params lie on {len(found)} meshes or devices ({where or 'no leaf has a sharding'}): "
            "place them all on one mesh, with jax.device_put or in jax.ShapeDtypeStruct"
        )
    return next(iter(found))


def _typed(mesh: AbstractMesh, leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf with its sharding as part of its type, so that tracing carries it along."""
    sharding = getattr(leaf, "sharding", None)
    spec = sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
    return jax.ShapeDtypeStruct(
        jnp.shape(leaf), jnp.result_type(leaf), sharding=NamedSharding(mesh, spec)
    )


def _spread(home: NamedSharding, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
    return NamedSharding(home.mesh, spec)
