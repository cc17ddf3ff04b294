"""Training: networks side by side, with checkpoints to resume from, a log and a progress bar.

All randomness is derived from (seed, member, epoch, step), so that a run that was interrupted and
resumed goes through the same numbers as one that was not. Several devices share every batch: it
lies split over them, everything else whole on each, and what they compute is the same up to
rounding.
"""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import swagjax
from benchmarks import progress
from benchmarks.algorithms import Algorithm, Recipe, steps
from benchmarks.augmentation import augmentation
from benchmarks.data import Part
from benchmarks.options import Data, Training, UsageError
from swagjax import checkpoint

INIT, TRAIN, PREDICT = range(3)  # what a network is used for


class Network(NamedTuple):
    """One network in training; ``batch_stats`` is empty where the model has no BatchNorm."""

    params: Any
    batch_stats: Any
    opt_state: Any


# An epoch of one network a seed of a member, to these and their mean losses.
Runner = Callable[[int, list[Network], int], tuple[list[Network], list[float]]]


def train(
    model: nn.Module, part: Part, recipe: Recipe, options: Training, folder: Path, members: int = 1
) -> list[list[Network]]:
    """Train one network a seed for every member, from the last good checkpoint if there is one.

    Args:
      model: the network.
      part: what it is trained on.
      recipe: how.
      options: of the recipe and of the run.
      folder: under which ``checkpoints/<recipe>/<member>/`` and ``log/`` are kept.
      members: networks of an ensemble, which begin and go on at random each in its own way.
    """
    algorithm = recipe(options, len(part.labels))
    init = initialiser(model, algorithm, part.inputs[:1])
    run_epoch = runner(model, algorithm, part, options)
    rates = _rates(algorithm, options, len(part.labels))
    whole = NamedSharding(mesh(options), PartitionSpec())

    def train_member(member: int) -> list[Network]:
        networks = [init(key(seed, INIT, member)) for seed in range(options.seeds)]
        kept = folder / "checkpoints" / recipe.__name__ / str(member)
        first, networks = _restore(kept, networks)
        networks = jax.device_put(networks, whole)
        note = _log(folder / "log" / f"{recipe.__name__}-{member}.jsonl", rates, first)
        label = recipe.__name__.replace("_", " ") + (f" {member + 1}" if member else "")
        with _checkpoints(kept) as manager, progress.bar(label, options.epochs, "epochs") as show:
            for epoch in range(first, options.epochs):
                networks, losses = run_epoch(epoch, networks, member)
                note(epoch + 1, losses)
                show(f"{label}, loss {np.mean(losses):.3f}", epoch + 1)
                if (epoch + 1) % options.checkpoint_every == 0 or epoch + 1 == options.epochs:
                    checkpoint.save(manager, epoch + 1, networks)
        return networks

    return [train_member(member) for member in range(members)]


def initialiser(
    model: nn.Module, algorithm: Algorithm, inputs: np.ndarray
) -> Callable[[jax.Array], Network]:
    """A function from a key to a network with fresh weights."""

    @jax.jit
    def init(key: jax.Array) -> Network:
        variables = model.init(key, inputs)
        params = variables["params"]
        return Network(params, variables.get("batch_stats", {}), algorithm.optimizer.init(params))

    return init


def runner(model: nn.Module, algorithm: Algorithm, part: Part, options: Training) -> Runner:
    """A function that trains all networks for an epoch, in the order that is faster here."""
    split = NamedSharding(mesh(options), PartitionSpec("data"))
    step = _step(model, algorithm, options, split)
    form = _one_by_one if jax.default_backend() == "cpu" else _side_by_side
    order = functools.partial(_order, options)
    epoch_of_all = form(step, order, steps(options, len(part.labels)))
    data = jax.device_put(part, NamedSharding(split.mesh, PartitionSpec()))

    def run(
        epoch: int, networks: list[Network], member: int = 0
    ) -> tuple[list[Network], list[float]]:
        keys = [jax.random.fold_in(key(i, TRAIN, member), epoch) for i in range(len(networks))]
        networks, losses = epoch_of_all(networks, keys, data)
        return networks, np.mean(losses, axis=1).tolist()

    return run


def mesh(options: Training) -> Mesh:
    """The devices that share every batch, along the axis ``data``."""
    number = options.devices or (1 if jax.default_backend() == "cpu" else jax.device_count())
    return jax.make_mesh(
        (number,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:number]
    )


def check(options: Training, rows: int) -> None:
    """Refuse values that no training can be made of, in one line."""
    least = dict.fromkeys(("start", "batch_size", "collections", "seeds", "checkpoint_every"), 1)
    least |= dict.fromkeys(("epochs", "rank", "snapshots", "cycles"), 2)
    least |= dict.fromkeys(("learning_rate", "swa_learning_rate", "weight_decay"), 0)
    for name, lowest in (least | {"temperature": 0, "dropout": 0}).items():
        if not lowest <= getattr(options, name) < float("inf"):
            flag = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise UsageError(f"{flag}: at least {lowest}")
    if options.dropout >= 1:
        raise UsageError(f"--dropout {options.dropout}: less than 1")
    if options.start >= options.epochs:
        raise UsageError(
            f"--start {options.start}: less than --epochs {options.epochs}, or nothing is collected"
        )
    if options.batch_size > rows:
        raise UsageError(f"--batch-size {options.batch_size}: there are {rows} training inputs")
    if options.collections > (number := steps(options, rows)):
        raise UsageError(f"--collections {options.collections}: an epoch has {number} steps")
    _check_devices(options)


def _check_devices(options: Training) -> None:
    if options.devices is not None and not 1 <= options.devices <= jax.device_count():
        raise UsageError(f"--devices {options.devices}: there are {jax.device_count()}")
    if options.batch_size % (number := mesh(options).size):
        raise UsageError(f"--batch-size {options.batch_size}: not a multiple of {number} devices")


def open_checkpoints(folder: Path, options: Training) -> None:
    """Empty the folder of all checkpoints of an experiment; or, to resume, check its options.

    A folder without a record of the options was not made here, and what is in it is not deleted.
    """
    record, wanted = folder / "options.json", json.dumps(identity(options), indent=1)
    if options.resume and record.exists():
        _check_same(record, json.loads(wanted))
        return
    found = set(folder.iterdir()) if folder.is_dir() else set()
    if strange := record not in found and found - {record.with_suffix(".tmp")}:
        raise UsageError(
            f"--results: {folder} holds {min(strange).name} and no {record.name} of a run: move it "
            "away, or give another folder"
        )
    try:
        for path in found - {record}:  # the record goes last, by which a run knows its folder
            shutil.rmtree(path, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        _write_at_once(record, wanted)
    except OSError as error:
        raise UsageError(
            f"--results: cannot write to {folder}: {error.strerror}; give another folder"
        ) from error


def identity(options: Training) -> dict[str, Any]:
    """The options that determine what is trained: not how many members, methods or samples."""
    neutral = {"data_dir", "resume", "checkpoint_every", "devices"}
    fields = (*dataclasses.fields(Data), *dataclasses.fields(Training))
    return {f.name: getattr(options, f.name) for f in fields if f.name not in neutral}


def key(seed: int, purpose: int, member: int = 0) -> jax.Array:
    """The random key of a network for one of INIT, TRAIN and PREDICT."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), member)


def _step(model: nn.Module, algorithm: Algorithm, options: Training, split: Any) -> Callable:
    """One step of one network; ``epoch_key`` gives the order of the inputs and all else."""
    augment = augmentation(options.augment)
    tx = optax.with_extra_args_support(algorithm.optimizer)

    def loss_and_stats(params: Any, batch_stats: Any, key: jax.Array, batch: Part) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        rngs = {"dropout": key} if algorithm.dropout else {}
        logits, changed = model.apply(
            variables, batch.inputs, train=True, mutable=["batch_stats"], rngs=rngs
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return loss, changed.get("batch_stats", {})

    def step(network: Network, epoch_key: jax.Array, order: jax.Array, i: Any, data: Part) -> Any:
        rows = jax.lax.dynamic_slice_in_dim(order, i * options.batch_size, options.batch_size)
        drawn = Part(*(jax.lax.with_sharding_constraint(x[rows], split) for x in data))
        keys = [jax.random.fold_in(jax.random.fold_in(epoch_key, i), use) for use in range(3)]
        batch = drawn._replace(inputs=augment(keys[0], drawn.inputs))
        grad = jax.value_and_grad(loss_and_stats, has_aux=True)
        (loss, stats), grads = grad(network.params, network.batch_stats, keys[1], batch)
        updates, opt_state = tx.update(grads, network.opt_state, network.params, key=keys[2])
        return Network(optax.apply_updates(network.params, updates), stats, opt_state), loss

    return step


def _order(options: Training, epoch_key: jax.Array, data: Part) -> jax.Array:
    """The inputs of an epoch: each once, or drawn anew for every place."""
    rows = len(data.labels)
    if options.replacement:
        return jax.random.randint(epoch_key, (rows,), 0, rows)
    return jax.random.permutation(epoch_key, rows)


def _one_by_one(step: Callable, order_of: Callable, steps: int) -> Callable:
    """Network after network, step after step.

    For CPUs: inside a loop XLA does without its fast convolutions there. A step of LeNet5 with a
    batch of 128 took 24 ms by itself and 115 ms in ``lax.scan`` (of ``ConvNet`` 60 and 880 ms), on
    two cores with jax 0.10.2; ``vmap`` over members was no better.
    """
    one_step, order_of = jax.jit(step, donate_argnums=0), jax.jit(order_of)

    def epoch_of_one(network: Network, epoch_key: jax.Array, data: Part) -> Any:
        order, losses = order_of(epoch_key, data), []
        for i in range(steps):
            network, loss = one_step(network, epoch_key, order, i, data)
            losses.append(loss)
        return network, jax.device_get(losses)

    def epoch(networks: list[Network], keys: list[jax.Array], data: Part) -> Any:
        done = [epoch_of_one(*each, data) for each in zip(networks, keys, strict=True)]
        return [network for network, _ in done], [losses for _, losses in done]

    return epoch


def _side_by_side(step: Callable, order_of: Callable, steps: int) -> Callable:
    """All networks under ``vmap``, the epoch one ``lax.scan``: for accelerators."""

    def epoch_of_one(network: Network, epoch_key: jax.Array, data: Part) -> Any:
        order = order_of(epoch_key, data)

        def body(network: Network, i: Any) -> Any:
            return step(network, epoch_key, order, i, data)

        return jax.lax.scan(body, network, jnp.arange(steps))

    @jax.jit
    def epoch(networks: list[Network], keys: list[jax.Array], data: Part) -> Any:
        axes = swagjax.member_axes(networks[0])
        run = jax.vmap(epoch_of_one, in_axes=(axes, 0, None), out_axes=(axes, 0))
        stacked, losses = run(_stack(networks, axes), jnp.stack(keys), data)
        return [_unstack(stacked, axes, i) for i in range(len(networks))], losses

    return epoch


def _stack(networks: list[Network], axes: Any) -> Network:
    """Stack the networks' leaves, but for those that they share, whose axis is None."""

    def stack(axis: Any, *xs: jax.Array) -> jax.Array:
        return xs[0] if axis is None else jnp.stack(xs)

    return jax.tree.map(stack, axes, *networks, is_leaf=lambda x: x is None)


def _unstack(stacked: Network, axes: Any, i: int) -> Network:
    def pick(axis: Any, x: jax.Array) -> jax.Array:
        return x if axis is None else x[i]

    return jax.tree.map(pick, axes, stacked, is_leaf=lambda x: x is None)


def _checkpoints(folder: Path) -> ocp.CheckpointManager:
    # Two, so that there is one to go back to where the last is damaged.
    keep = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=keep)


def _write_at_once(path: Path, text: str) -> None:
    """Whole or not at all, whenever the process is killed."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    unfinished.rename(path)


def _check_same(record: Path, wanted: dict[str, Any]) -> None:
    try:
        found = json.loads(record.read_text())
    except ValueError:
        raise UsageError(f"--resume: {record} is damaged; start anew with --no-resume") from None
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise UsageError(
                f"--resume: the checkpoint was made with {name} = {found.get(name)}, not "
                f"{wanted[name]}; give the same options, or start anew with --no-resume"
            )


def _restore(folder: Path, networks: list[Network]) -> tuple[int, list[Network]]:
    """The epochs already done and the networks after them."""
    try:
        return checkpoint.restore_latest(folder, networks) or (0, networks)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--resume: {error}; or start anew with --no-resume") from error


def _rates(algorithm: Algorithm, options: Training, rows: int) -> list[float]:
    """The learning rate of the last step of every epoch."""
    last = steps(options, rows) * jnp.arange(1, options.epochs + 1) - 1
    return jax.device_get(jax.vmap(algorithm.rate)(last)).tolist()


def _log(path: Path, rates: list[float], first: int) -> Callable[[int, list[float]], None]:
    """A function that adds a line of JSON an epoch; epochs done again are written again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = path.read_text().splitlines()[:first] if first and path.exists() else []
    _write_at_once(path, "".join(f"{line}\n" for line in kept))
    last = time.perf_counter()

    def note(epoch: int, losses: list[float]) -> None:
        nonlocal last
        last, seconds = time.perf_counter(), time.perf_counter() - last
        of_epoch = {"epoch": epoch, "loss": float(np.mean(losses)), "of_seeds": losses}
        of_epoch |= {"learning_rate": rates[epoch - 1], "seconds": round(seconds, 3)}
        with path.open("a") as file:
            file.write(json.dumps(of_epoch) + "\n")

    return note
