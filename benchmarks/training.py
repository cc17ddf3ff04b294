"""Training: several seeds side by side, with checkpoints to resume from and a progress bar.

All randomness is derived from (seed, epoch, step), so that a run that was interrupted and resumed
goes through the same numbers as one that was not.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import swagjax
from benchmarks.data import Part
from benchmarks.options import Training, UsageError
from swagjax import checkpoint

INIT, TRAIN, PREDICT = range(3)  # what a seed is used for
NOISE = 0.3  # standard deviation of the noise of augmentation; images have standard deviation 1


class Member(NamedTuple):
    """One network in training; ``batch_stats`` is empty where the model has no BatchNorm."""

    params: Any
    batch_stats: Any
    opt_state: Any


Optimizer = Callable[[Training, int], optax.GradientTransformation]  # options, steps per epoch
Runner = Callable[[int, list[Member]], tuple[list[Member], float]]  # an epoch: members, mean loss


def train(
    model: nn.Module, part: Part, optimizer: Optimizer, options: Training, folder: Path
) -> list[Member]:
    """Train one network a seed, from the last good checkpoint in ``folder`` if there is one."""
    steps = len(part.labels) // options.batch_size
    tx = optimizer(options, steps)
    init = initialiser(model, tx, part.images[:1])
    members = [init(key(seed, INIT)) for seed in range(options.seeds)]
    run_epoch = runner(model, tx, part, options, steps)
    first, members = _restore(folder, members)
    with _checkpoints(folder) as manager, _progress(options) as show:
        for epoch in range(first, options.epochs):
            members, loss = run_epoch(epoch, members)
            show(f"{optimizer.__name__.replace('_', ' ')}, loss {loss:.3f}", epoch + 1)
            if (epoch + 1) % options.checkpoint_every == 0 or epoch + 1 == options.epochs:
                checkpoint.save(manager, epoch + 1, members)
    return members


def initialiser(model: nn.Module, tx: Any, images: np.ndarray) -> Callable[[jax.Array], Member]:
    """A function from a key to a member with fresh weights."""

    @jax.jit
    def init(key: jax.Array) -> Member:
        variables = model.init(key, images)
        params = variables["params"]
        return Member(params, variables.get("batch_stats", {}), tx.init(params))

    return init


def runner(model: nn.Module, tx: Any, part: Part, options: Training, steps: int) -> Runner:
    """A function that trains all members for an epoch, in the order that is faster here."""
    step = _step(model, tx, _augmentation(options.augment), options.batch_size)
    form = _one_by_one if jax.default_backend() == "cpu" else _side_by_side
    epoch_of_members = form(step, steps)
    data = jax.device_put(part)

    def run(epoch: int, members: list[Member]) -> tuple[list[Member], float]:
        keys = [jax.random.fold_in(key(i, TRAIN), epoch) for i in range(len(members))]
        members, losses = epoch_of_members(members, keys, data)
        return members, float(np.mean(losses))

    return run


def check(options: Training, images: int) -> None:
    """Refuse values that no training can be made of, in one line."""
    for name in ("epochs", "start", "batch_size", "seeds", "checkpoint_every"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    for name in ("learning_rate", "swa_learning_rate", "weight_decay"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 0")
    if options.rank < 2:
        raise UsageError(f"--rank {options.rank}: at least 2")
    if options.start >= options.epochs:
        raise UsageError(
            f"--start {options.start}: less than --epochs {options.epochs}, or nothing is collected"
        )
    if options.batch_size > images:
        raise UsageError(f"--batch-size {options.batch_size}: there are {images} training images")


def usual_augmentation(images: np.ndarray) -> tuple[str, ...]:
    """Shifts; flips of images in colour (photographs, mostly), noise on grey ones."""
    return ("shift", "flip" if images.shape[-1] == 3 else "noise")


def open_checkpoints(folder: Path, options: Training) -> None:
    """Empty the folder of all checkpoints of an experiment; or, to resume, check its options.

    Checkpoints without a record of the options are of a process killed while it emptied the folder.
    """
    record, wanted = folder / "options.json", json.dumps(identity(options), indent=1)
    if options.resume and record.exists():
        _check_same(record, json.loads(wanted))
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write_at_once(record, wanted)


def identity(options: Training) -> dict[str, Any]:
    """The options that determine the numbers: all but folders and those of checkpointing."""
    neutral = {"data_dir", "results", "resume", "checkpoint_every"}
    return {k: v for k, v in dataclasses.asdict(options).items() if k not in neutral}


def key(seed: int, purpose: int) -> jax.Array:
    """The random key of a seed for one of INIT, TRAIN and PREDICT."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def _step(model: nn.Module, tx: Any, augment: Callable, batch_size: int) -> Callable:
    """One step of one member; ``epoch_key`` gives the order of the images and the augmentation."""

    def loss_and_stats(params: Any, batch_stats: Any, x: jax.Array, y: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, changed = model.apply(variables, x, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, changed.get("batch_stats", {})

    def step(member: Member, epoch_key: jax.Array, order: jax.Array, i: Any, data: Part) -> Any:
        batch = jax.lax.dynamic_slice_in_dim(order, i * batch_size, batch_size)
        x = augment(jax.random.fold_in(epoch_key, i), data.images[batch])
        grad = jax.value_and_grad(loss_and_stats, has_aux=True)
        (loss, stats), grads = grad(member.params, member.batch_stats, x, data.labels[batch])
        updates, opt_state = tx.update(grads, member.opt_state, member.params)
        return Member(optax.apply_updates(member.params, updates), stats, opt_state), loss

    return step


def _order(epoch_key: jax.Array, data: Part) -> jax.Array:
    return jax.random.permutation(epoch_key, len(data.labels))


def _one_by_one(step: Callable, steps: int) -> Callable:
    """Member after member, step after step.

    For CPUs: inside a loop XLA does without its fast convolutions there. A step of LeNet5 with a
    batch of 128 took 24 ms by itself and 115 ms in ``lax.scan`` (of ``ConvNet`` 60 and 880 ms), on
    two cores with jax 0.10.2; ``vmap`` over members was no better.
    """
    one_step = jax.jit(step, donate_argnums=0)
    order_of = jax.jit(_order)

    def epoch_of_one(member: Member, epoch_key: jax.Array, data: Part) -> Any:
        order, losses = order_of(epoch_key, data), []
        for i in range(steps):
            member, loss = one_step(member, epoch_key, order, i, data)
            losses.append(loss)
        return member, jax.device_get(losses)

    def epoch(members: list[Member], keys: list[jax.Array], data: Part) -> Any:
        done = [epoch_of_one(*each, data) for each in zip(members, keys, strict=True)]
        return [member for member, _ in done], [losses for _, losses in done]

    return epoch


def _side_by_side(step: Callable, steps: int) -> Callable:
    """All members under ``vmap``, the epoch one ``lax.scan``: for accelerators."""

    def epoch_of_one(member: Member, epoch_key: jax.Array, data: Part) -> Any:
        order = _order(epoch_key, data)

        def body(member: Member, i: Any) -> Any:
            return step(member, epoch_key, order, i, data)

        return jax.lax.scan(body, member, jnp.arange(steps))

    @jax.jit
    def epoch(members: list[Member], keys: list[jax.Array], data: Part) -> Any:
        axes = swagjax.member_axes(members[0])
        run = jax.vmap(epoch_of_one, in_axes=(axes, 0, None), out_axes=(axes, 0))
        stacked, losses = run(_stack(members, axes), jnp.stack(keys), data)
        return [_unstack(stacked, axes, i) for i in range(len(members))], losses

    return epoch


def _stack(members: list[Member], axes: Any) -> Member:
    """Stack the members' leaves, but for those that they share, whose axis is None."""

    def stack(axis: Any, *xs: jax.Array) -> jax.Array:
        return xs[0] if axis is None else jnp.stack(xs)

    return jax.tree.map(stack, axes, *members, is_leaf=lambda x: x is None)


def _unstack(stacked: Member, axes: Any, i: int) -> Member:
    def pick(axis: Any, x: jax.Array) -> jax.Array:
        return x if axis is None else x[i]

    return jax.tree.map(pick, axes, stacked, is_leaf=lambda x: x is None)


def _augmentation(kinds: tuple[str, ...]) -> Callable:
    """A function of a key and a batch that applies the random changes named in ``kinds``."""
    changes = [{"shift": _shift, "noise": _noise, "flip": _flip}[kind] for kind in kinds]

    def augment(key: jax.Array, x: jax.Array) -> jax.Array:
        for i, change in enumerate(changes):
            x = change(jax.random.fold_in(key, i), x)
        return x

    return augment


def _shift(key: jax.Array, x: jax.Array) -> jax.Array:
    """Each image moved by up to an eighth of its side; its edge is repeated."""
    reach = max(1, x.shape[1] // 8)
    padded = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    corners = jax.random.randint(key, (len(x), 2), 0, 2 * reach + 1)

    def crop(image: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (*at, 0), x.shape[1:])

    return jax.vmap(crop)(padded, corners)


def _noise(key: jax.Array, x: jax.Array) -> jax.Array:
    return x + NOISE * jax.random.normal(key, x.shape)


def _flip(key: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, shape=(len(x), 1, 1, 1)), x[:, :, ::-1], x)


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
        raise UsageError(f"--resume: {record} is damaged; start anew without --resume") from None
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise UsageError(
                f"--resume: the checkpoint was made with {name} = {found.get(name)}, not "
                f"{wanted[name]}; give the same options, or start anew without --resume"
            )


def _restore(folder: Path, members: list[Member]) -> tuple[int, list[Member]]:
    """The epochs already done and the members after them."""
    try:
        return checkpoint.restore_latest(folder, members) or (0, members)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--resume: {error}; or start anew without --resume") from error


@contextlib.contextmanager
def _progress(options: Training) -> Iterator[Callable[[str, int], None]]:
    """A bar over the epochs on stderr, shown where that is a terminal."""
    text = TextColumn("{task.description:<28}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("compiling", total=options.epochs)
        yield lambda text, epoch: bar.update(task, description=text, completed=epoch)
