"""What test_distributed.py runs on several machines, here processes, and on one.

As a script: ``distributed_program.py folder process num_processes port``.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import swagjax
from swagjax import sharding

MACHINES, DEVICES = 2, 2  # devices of a machine
RANK, STEPS = 4, 7
BATCH, FEATURES, HIDDEN, CLASSES = 16, 8, 2304, 4  # the hidden kernel is large, the rest is pooled


def logits(params, x):
    return jnp.tanh(x @ params["hidden"] + params["bias"]) @ params["out"]


def loss(params, x):
    labels = (x.sum(1) > 0).astype(int)
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), labels).mean()


def prob_fn(params, x):
    return jax.nn.softmax(logits(params, x))


def initial():
    rng = np.random.default_rng(0)
    shapes = {"hidden": (FEATURES, HIDDEN), "bias": (HIDDEN,), "out": (HIDDEN, CLASSES)}
    return {name: (rng.normal(size=s) / 8).astype(np.float32) for name, s in shapes.items()}


def part_of_a_machine(batch):
    """What a machine reads of a batch by itself."""
    share = len(batch) // jax.process_count()
    return batch[share * jax.process_index() :][:share]


def split_along(mesh, axes):
    """Every parameter split along its hidden axis."""
    specs = {"hidden": P(None, axes), "bias": P(axes), "out": P(axes, None)}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def train(mesh, batches):
    """The lines of README: parameters, moments and ring split over all devices of all machines."""
    params = jax.device_put(initial(), split_along(mesh, ("machine", "device")))
    tx = optax.chain(optax.sgd(0.5, momentum=0.9), swagjax.swag(RANK))
    placed = sharding.state_shardings(tx.init, params)
    opt_state = jax.jit(tx.init, out_shardings=placed)(params)

    def train_step(params, opt_state, x):
        updates, opt_state = tx.update(jax.grad(loss)(params, x), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    kept = jax.tree.map(lambda p: p.sharding, params), placed
    step = jax.jit(train_step, donate_argnums=(0, 1), out_shardings=kept)
    split = NamedSharding(mesh, P(("machine", "device")))
    for batch in batches:
        x = jax.make_array_from_process_local_data(split, part_of_a_machine(batch))
        params, opt_state = step(params, opt_state, x)
    return swagjax.get_state(opt_state)


def collect(mesh):
    """A state whose every number comes of one coordinate alone: no sum, so no order of one."""
    params = jax.device_put(initial(), split_along(mesh, ("machine", "device")))
    tx = swagjax.swag(RANK)
    placed = sharding.state_shardings(tx.init, params)
    state = jax.jit(tx.init, out_shardings=placed)(params)

    @functools.partial(jax.jit, out_shardings=placed)
    def update(state, params, t):
        return tx.update(jax.tree.map(lambda p: jnp.sin(9 * p + t), params), state, params)[1]

    for t in range(STEPS):
        state = update(state, params, t)
    return state


def restored(folder, state, mesh):
    """The state by way of the disk: whole on every machine, split over its devices."""
    params = split_along(mesh, "device")
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=params[name])
        for name, leaf in state.mean.items()
    }
    target = sharding.abstract_state(swagjax.swag(RANK).init, abstract)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "checkpoint", target)


def run(folder, devices):
    """Train, collect, checkpoint, sample and predict; all results as arrays of NumPy."""
    names = ("machine", "device")
    mesh = jax.make_mesh((MACHINES, DEVICES), names, (AxisType.Auto,) * 2, devices=devices)
    batches = np.random.default_rng(1).normal(size=(STEPS, BATCH, FEATURES)).astype(np.float32)
    state = train(mesh, batches)
    sample, exact = swagjax.sample(jax.random.key(2), state), collect(mesh)
    again = restored(folder, state, mesh)
    same = jax.tree.map(lambda a, b: (a == b).all(), state, jax.device_put(again, shardings(state)))
    # Samples spread over the machines, the weights of each over the devices of its machine.
    spread = NamedSharding(mesh, P("machine"))
    keys = jax.jit(jax.random.split, static_argnums=1, out_shardings=spread)(jax.random.key(3), 6)
    results = {
        "exact": (exact, swagjax.sample(jax.random.key(2), exact)),
        "state": state,
        "sample": sample,
        "same": same,
        "probs": swagjax.predict(keys, again, prob_fn, jnp.asarray(batches[0])),
        "log_prob": swagjax.log_prob(state, sample, min_variance=1e-6),
    }
    lines = [shard.data.shape for shard in state.deviations["hidden"].addressable_shards]
    assert lines == [(RANK, FEATURES, HIDDEN // (MACHINES * DEVICES))] * len(lines)
    assert len(keys.addressable_shards[0].data) == 6 // MACHINES
    return {
        jax.tree_util.keystr(path): np.asarray(multihost_utils.process_allgather(x, tiled=True))
        for path, x in jax.tree.leaves_with_path(results)
    }


def shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def main(folder, process, processes, port):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        processes,
        process,
        initialization_timeout=60,
        coordinator_bind_address=f"127.0.0.1:{port}",
    )
    assert jax.process_count() == processes == MACHINES
    results = run(pathlib.Path(folder), jax.devices())
    if jax.process_index() == 0:
        np.savez(pathlib.Path(folder) / "results.npz", **results)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
