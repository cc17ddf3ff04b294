"""Loss surfaces: SGD beside SWA on a plane, how wide the two are, curves between two solutions.

As in the SWA paper, one network is trained with a constant step, and from there on twice: by SGD
whose step decays, and by SGD with the constant step, whose iterates SWAG collects. Everything is
evaluated on images without augmentation, with BatchNorm statistics of each point's own.

What a plane shows of a space of thousands of dimensions is where its points lie to each other. The
iterates of SGD lie far off this one, and so do the samples of SWAG, whose ellipse is their shadow.
"""

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.options import UsageError, identity

NOISE = 0.3  # standard deviation of the noise of augmentation; images have standard deviation 1
RISE = 0.1  # nats of train loss above the centre's: there an optimum ends
TRAIN, TEST = "train loss", "test error"
BLACK, ORANGE, BLUE, PURPLE = "#000000", "#D55E00", "#56B4E9", "#CC79A7"  # of Okabe and Ito
LANDMARKS = {"start": (PURPLE, "D", 8), "SGD": (ORANGE, "s", 8), "SWA": (BLUE, "*", 14)}
WAYS = ("straight line", "polygonal chain", "Bezier curve")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surface:
    """Draw the loss around SGD and SWA, along rays from them, and along curves between solutions.

    Prints losses, widths and barriers; writes results.json, plane.png, width.png, curves.png and
    curve-plane.png.
    """

    dataset: str = "digits"
    """digits (bundled with scikit-learn), or a TFDS set of labelled images: mnist, cifar10, ..."""
    data_dir: Path | None = None
    """Folder of TFDS data sets; where it is not given, TFDS's own default."""
    evaluate: Literal["test", "validation"] = "test"
    """validation: a fifth of the training images takes the place of the test images."""
    model: str = "convnet"
    """Network of benchmarks/models.py for images."""
    epochs: int = 32
    """Epochs of either way, of which SWAG collects one iterate each; before they part, twice as
    many."""
    curve_epochs: int = 40
    """Epochs that a curve is trained."""
    batch_size: int = 16
    """Images in a minibatch."""
    learning_rate: float = 0.05
    """Constant step of SGD with momentum; SGD that decays falls from it to a hundredth."""
    curve_learning_rate: float = 0.05
    """First step in training curves; it falls to zero."""
    weight_decay: float = 1e-4
    """L2 penalty that is added to the gradient."""
    rank: int = 20
    """Deviations held by SWAG (K in the paper)."""
    seed: int = 0
    """Of the network; the second solution that curves lead to is of the next one."""
    resolution: int = 17
    """Grid points along either axis of a plane, and points along rays and curves."""
    rays: int = 5
    """Random directions that the width is measured along."""
    images: int = 2000
    """Training images, and as many test images, that surfaces are evaluated on."""
    results: Path = Path("results")
    """Folder under which surface/<dataset>/ is written."""


def surface(chosen: Surface) -> None:
    """Train, evaluate, print the figures, write the JSON and the pictures."""
    import rich  # here, as all that is heavy: --help needs none of it

    from benchmarks import progress, report

    begun = time.perf_counter()
    setting = _Setting(chosen)
    with progress.bar("training SGD", 6, "parts") as show:
        start, first = setting.solve(chosen.seed)
        show("training the second solution", 1)
        second = setting.solve(chosen.seed + 1)[1]
        show("training SWA", 2)
        first = {"start": start, "SGD": first, **setting.average(chosen.seed, start)}
        show("the plane", 3)
        about_plane, plane_values = _plane(setting, first)
        show("the width", 4)
        about_width, profiles = _width(setting, first)
        show("the curves", 5)
        about_curves, curves = _curves(setting, first["SGD"], second)
        results = setting.at({name: first[name] for name in ("start", "SGD", "SWA")})
    folder = _folder(chosen)
    record = report.record(
        {name: {metric: [v] for metric, v in of.items()} for name, of in results.items()},
        experiment="surface",
        evaluated_on=chosen.evaluate,
        options=identity(chosen),
        plane=about_plane,
        width=about_width,
        curves=about_curves,
        seconds=round(time.perf_counter() - begun, 1),
    )
    report.write_json(folder / "results.json", record)
    _draw_plane(folder / "plane.png", plane_values, about_plane)
    _draw_width(folder / "width.png", profiles)
    _draw_curves(folder, curves, about_curves)
    rich.print(*_summary(results, about_plane, about_width, about_curves), sep="\n")
    print(f"results.json and four pictures are in {folder}")


class _Setting:
    """The network and its data, with what is done to them compiled once."""

    def __init__(self, chosen: Surface):
        import jax
        import optax

        import swagjax
        from benchmarks import data, models
        from swagjax import batch_stats

        _check(chosen, sorted(models.MODELS))
        # All classes are trained on: the set itself stands where others are out of distribution.
        task = data.load(chosen.dataset, chosen.data_dir, None, chosen.evaluate, chosen.dataset)
        self.chosen = chosen
        self.images, self.labels = jax.device_put(tuple(task.train))
        if chosen.batch_size > len(self.labels):
            raise UsageError(
                f"--batch-size {chosen.batch_size}: there are {len(self.labels)} training images"
            )
        self.model = models.MODELS[chosen.model](classes=int(task.train.labels.max()) + 1)
        self.seen = tuple(
            jax.device_put(tuple(x[: chosen.images] for x in part))
            for part in (task.train, task.evaluation)
        )
        variables = jax.jit(self.model.init)(jax.random.key(0), self.images[:1])
        stats = variables.get("batch_stats")
        inputs = self.seen[0][0]
        self.refresh = (
            batch_stats.linen(self.model, stats, inputs, batch_size=1000, train=True)
            if stats
            else batch_stats.keep({})
        )
        self.stats = stats or {}
        self.steps = len(self.labels) // chosen.batch_size  # of an epoch
        self.fit = jax.jit(self._fit, static_argnums=2)
        self.batches = jax.jit(self._batches, static_argnums=1)

        rate, total = chosen.learning_rate, chosen.epochs * self.steps
        collect = swagjax.swag(chosen.rank, every=self.steps)
        self.constant = optax.chain(self.sgd(rate), collect)
        self.decaying = self.sgd(optax.linear_schedule(rate, rate / 100, total))

    def solve(self, seed: int) -> tuple[Any, Any]:
        """The weights after training with a constant step, and those of SGD that decays after."""
        import jax

        epochs = self.chosen.epochs
        first, *keys, last = jax.random.split(jax.random.key(seed), 4)
        start = jax.jit(self.model.init)(first, self.images[:1])["params"]
        for key in keys:
            start = self.fit(self.batches(key, epochs), start, self.constant)[0]
        return start, self.fit(self.batches(last, epochs), start, self.decaying)[0]

    def average(self, seed: int, start: Any) -> dict[str, Any]:
        """SWA, what SWAG collected, and the iterates that it did so from."""
        import jax

        import swagjax

        key = jax.random.fold_in(jax.random.key(seed), 1)
        batches = self.batches(key, self.chosen.epochs)
        _, opt_state, path = self.fit(batches, start, self.constant)
        state = swagjax.get_state(opt_state)
        return {"SWA": state.mean, "state": state, "iterates": path}

    def sgd(self, rate: Any) -> Any:
        """SGD with momentum and an L2 penalty."""
        import optax

        decay = optax.add_decayed_weights(self.chosen.weight_decay)
        return optax.chain(decay, optax.sgd(rate, momentum=0.9))

    def _fit(self, batches: Any, params: Any, tx: Any) -> Any:
        """The weights and the optimizer's state after some epochs, and the weights after each."""
        import jax
        import optax

        def step(carry: Any, batch: Any) -> Any:
            params, opt_state = carry
            grads = jax.grad(self.loss)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        def epoch(carry: Any, batches: Any) -> Any:
            carry, _ = jax.lax.scan(step, carry, batches)
            return carry, carry[0]

        (params, opt_state), path = jax.lax.scan(epoch, (params, tx.init(params)), batches)
        return params, opt_state, path

    def _batches(self, key: Any, epochs: int) -> Any:
        """Indices and a key for every step, (epochs, steps, ...): every epoch in a new order."""
        import jax

        k1, k2 = jax.random.split(key)
        order = jax.vmap(lambda k: jax.random.permutation(k, len(self.labels)))
        used = self.steps * self.chosen.batch_size
        index = order(jax.random.split(k1, epochs))[:, :used]
        index = index.reshape(epochs, self.steps, self.chosen.batch_size)
        return index, jax.random.split(k2, (epochs, self.steps))

    def loss(self, params: Any, batch: Any) -> Any:
        """Cross-entropy in nats of a minibatch, moved by a pixel at most and with noise."""
        import jax
        import jax.numpy as jnp
        import optax

        index, key = batch
        k1, k2 = jax.random.split(key)
        x = self.images[index]
        shifts = jax.random.randint(k1, (len(index), 2), -1, 2)
        x = jax.vmap(lambda image, by: jnp.roll(image, by, (0, 1)))(x, shifts)
        x = x + NOISE * jax.random.normal(k2, x.shape)
        variables = {"params": params, "batch_stats": self.stats}
        logits, _ = self.model.apply(variables, x, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, self.labels[index])
        return losses.mean()

    def scores(self, params: Any, data: Any, stats: Any) -> dict[str, Any]:
        """Train loss, test loss (nats) and test error."""
        import optax

        (x, y), (x_test, y_test) = data
        variables = {"params": params, "batch_stats": stats}
        train, test = (self.model.apply(variables, images) for images in (x, x_test))
        loss = optax.softmax_cross_entropy_with_integer_labels
        error = (test.argmax(-1) != y_test).mean()
        return {TRAIN: loss(train, y).mean(), "test loss": loss(test, y_test).mean(), TEST: error}

    def along(self, path: Callable[[Any], Any], at: Any) -> dict[str, np.ndarray]:
        """The scores at points of a path."""
        import jax

        from swagjax import surface

        scores = surface.evaluate(self.scores, path, at, self.seen, refresh=self.refresh)
        found: dict[str, np.ndarray] = jax.device_get(scores)
        return found

    def at(self, weights: dict[str, Any]) -> dict[str, dict[str, float]]:
        """The scores of some weights, by name."""
        from jax.tree_util import Partial

        from swagjax import surface

        corners = np.linspace(0, 1, len(weights), dtype=np.float32)
        found = self.along(Partial(surface.chain, tuple(weights.values())), corners)
        return {
            name: {metric: float(values[i]) for metric, values in found.items()}
            for i, name in enumerate(weights)
        }


def _plane(setting: _Setting, of: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The plane through start, SGD and SWA: what JSON holds, and what is drawn on it."""
    import jax
    from jax.tree_util import Partial

    from swagjax import surface

    plane = surface.plane(of["SWA"], of["SGD"], of["start"])
    x, y = surface.grid(plane, setting.chosen.resolution, margin=1.0)
    values = setting.along(Partial(surface.point, plane), (x, y))
    where, off = jax.vmap(surface.coordinates, (None, 0))(plane, of["iterates"])
    shadow = surface.project(plane, of["state"])
    points, where, off, shadow, x, y = jax.device_get((plane.points, where, off, shadow, x, y))
    points = dict(zip(("SWA", "SGD", "start"), points.tolist(), strict=True))
    centre = low_centre(x, y, values[TRAIN])
    about = {
        "points": points,
        "iterates": where.tolist(),
        "distance_of_iterates_off_the_plane": [float(off.min()), float(off.max())],
        "swag_mean": shadow.mean.tolist(),
        "swag_covariance": shadow.covariance.tolist(),
        "least_train_loss": float(np.nanmin(values[TRAIN])),
        "least_test_error": float(np.nanmin(values[TEST])),
        "centre_of_low_train_loss": centre.tolist(),
        "distance_to_that_centre": {
            name: float(np.linalg.norm(points[name] - centre)) for name in points
        },
    }
    return about, {"x": x, "y": y, **values}


def low_centre(x: np.ndarray, y: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """The mean of the grid points whose loss is within ``RISE`` of the least."""
    low = loss <= np.nanmin(loss) + RISE
    return np.array([x[low].mean(), y[low].mean()])


def _width(setting: _Setting, of: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Losses along random and principal rays from SGD and SWA, and how far they stay low."""
    import jax
    import jax.numpy as jnp
    from jax.tree_util import Partial

    from swagjax import surface

    chosen = setting.chosen
    keys = jax.random.split(jax.random.key(chosen.seed), chosen.rays)
    random = jax.vmap(surface.random_direction, (0, None))(keys, of["SWA"])
    principal = surface.pca_plane(of["iterates"], num=3)
    directions = jax.tree.map(lambda *x: jnp.concatenate(x), random, principal.directions)
    norm = float(jnp.sqrt(sum(jnp.sum(w**2) for w in jax.tree.leaves(of["SWA"]))))
    reach = 3 * float(jnp.abs(principal.points).max())
    # One array of all rays, of either kind as many points: a single program.
    t = {"random": np.linspace(0, norm, chosen.resolution)}
    t["principal"] = np.linspace(-reach, reach, chosen.resolution)
    at = np.repeat(np.stack(list(t.values())), (chosen.rays, 3), axis=0).astype(np.float32)
    index = np.broadcast_to(np.arange(len(at))[:, None], at.shape)
    parts = {"random": slice(chosen.rays), "principal": slice(chosen.rays, None)}
    profiles, about = {}, {}
    for name in ("SGD", "SWA"):
        scores = setting.along(Partial(_ray, of[name], directions), (index, at))
        for kind, part in parts.items():
            of_kind = {metric: v[part] for metric, v in scores.items()}
            profiles[kind, name] = {"distance": t[kind], **of_kind}
            about[f"{kind} rays from {name}"] = {
                "distance": t[kind].tolist(),
                **{metric: v.tolist() for metric, v in of_kind.items()},
                "width": [width(t[kind], loss) for loss in of_kind[TRAIN]],
            }
    return about, profiles


def _ray(origin: Any, directions: Any, at: Any) -> Any:
    import jax

    from swagjax import surface

    index, t = at
    return surface.ray(origin, jax.tree.map(lambda d: d[index], directions), t)


def width(t: np.ndarray, loss: np.ndarray) -> float | None:
    """How far from t = 0 the loss rises by ``RISE``, mean of both sides; None if it never does.

    Example:
      >>> t = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
      >>> round(width(t, 0.5 + 0.05 * t**2), 3)
      1.333
    """
    level = np.interp(0.0, t, loss) + RISE
    sides = [_first_above(np.abs(t[s])[o], loss[s][o], level) for s, o in _sides(t)]
    known = [side for side in sides if side is not None]
    return float(np.mean(known)) if known else None


def _sides(t: np.ndarray) -> list[tuple[np.ndarray, slice]]:
    """Both sides of zero, each from zero on."""
    sides = [(t >= 0, slice(None)), (t <= 0, slice(None, None, -1))]
    return [side for side in sides if side[0].sum() > 1]


def _first_above(t: np.ndarray, loss: np.ndarray, level: float) -> float | None:
    above = np.flatnonzero(~(loss <= level))
    if not above.size:
        return None
    i = max(int(above[0]), 1)
    if not np.isfinite(loss[i]):
        return float(t[i])
    return float(np.interp(level, loss[i - 1 : i + 1], t[i - 1 : i + 1]))


def _curves(setting: _Setting, start: Any, end: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores along a straight line and trained curves between two solutions."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.tree_util import Partial

    from swagjax import surface

    chosen = setting.chosen
    keys = jax.random.split(jax.random.key(chosen.seed + 1), 2)
    batches = setting.batches(keys[0], chosen.curve_epochs)
    batches = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
    rate = optax.linear_schedule(chosen.curve_learning_rate, 0.0, len(batches[0]))
    at, found, about = jnp.linspace(0, 1, chosen.resolution), {}, {}
    for name in WAYS:
        curve = surface.bezier if name == "Bezier curve" else surface.chain
        points = surface.line(start, end)
        if name != "straight line":
            tx = setting.sgd(rate)
            points, _ = surface.connect(keys[1], setting.loss, points, batches, tx, curve=curve)
        scores = setting.along(Partial(curve, points), at)
        found[name] = {"t": np.asarray(at), **scores}
        about[name] = {metric: v.tolist() for metric, v in scores.items()} | {
            "barrier": barrier(scores[TRAIN]),
            "greatest test error": float(scores[TEST].max()),
        }
    plane = surface.plane(points[0], points[2], points[1])
    x, y = surface.grid(plane, chosen.resolution, margin=0.2)
    values = setting.along(Partial(surface.point, plane), (x, y))
    line = jax.vmap(lambda t: surface.coordinates(plane, surface.bezier(points, t))[0])(at)
    found["plane"] = {"x": x, "y": y, "curve": line, "points": plane.points, **values}
    return about, jax.device_get(found)


def barrier(loss: np.ndarray) -> float:
    """How much the highest loss of a path is above the higher of its ends, in nats."""
    return float(loss.max() - max(loss[0], loss[-1]))


def _folder(chosen: Surface) -> Path:
    """Where results go; those on validation data never overwrite those on test data."""
    name = re.sub(r"[^\w.-]+", "-", chosen.dataset)
    name += "" if chosen.evaluate == "test" else f"-{chosen.evaluate}"
    return chosen.results / "surface" / name


def _summary(results: Any, plane: Any, widths: Any, curves: Any) -> list[Any]:
    """Tables of losses, of widths and of curves."""
    from benchmarks import report

    losses = {n: {metric: [v] for metric, v in of.items()} for n, of in results.items()}
    apart = plane["distance_to_that_centre"]
    lines = [f"{name}: {' '.join(map(_number, of['width']))}" for name, of in widths.items()]
    ways = [
        f"{name}: barrier {of['barrier']:.3f} nats, greatest test error "
        f"{of['greatest test error']:.4f}"
        for name, of in curves.items()
    ]
    return [
        report.table(losses),
        f"distance to the centre of low train loss on the plane: SGD {apart['SGD']:.2f}, SWA "
        f"{apart['SWA']:.2f}, their own {np.linalg.norm(plane['points']['SGD']):.2f}",
        f"distance at which the train loss is {RISE} nats higher, ray by ray:",
        *lines,
        *ways,
    ]


def _number(x: float | None) -> str:
    return "beyond the rays" if x is None else f"{x:.2f}"


def _draw_plane(path: Path, values: dict[str, Any], about: dict[str, Any]) -> None:
    """Train loss and test error side by side, with all that lies on the plane."""
    from swagjax import plot

    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.4), layout="constrained")
    for ax, metric in zip(axes, (TRAIN, TEST), strict=True):
        ax.set_title(f"{metric.capitalize()} on the plane through start, SGD and SWA")
        _draw_surface(ax, values, metric)
        way = {"color": BLACK, "linestyle": "-", "marker": ".", "ms": 4, "lw": 1}
        plot.plane_points(about["iterates"], ax=ax, label="iterates (projected)", **way)
        ellipse = (about["swag_mean"], about["swag_covariance"])
        plot.posterior_ellipse(*ellipse, ax=ax, label="SWAG")
        for name, (color, marker, size) in LANDMARKS.items():
            style = {"color": color, "marker": marker, "linestyle": "none", "ms": size}
            plot.plane_points(about["points"][name], ax=ax, label=name, **style)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_surface(ax: Any, values: dict[str, Any], metric: str) -> None:
    from swagjax import plot

    unit = "nats" if metric == TRAIN else "share of images"
    # Of the walls around the low region no more than shows how they stand.
    least, high = (float(np.nanquantile(values[metric], q)) for q in (0.0, 0.9))
    top = max(high, least + 1e-3)
    x, y = values["x"], values["y"]
    # An error of a thousand images has no finer steps.
    scale = {"top": top, "decades": 3.0 if metric == TRAIN else 2.0}
    plot.loss_surface(x, y, values[metric], ax=ax, label=f"{metric} ({unit})", **scale)


def _draw_width(path: Path, profiles: dict[str, Any]) -> None:
    """Train loss and test error along rays: random ones above, principal ones below."""
    from swagjax import plot

    plt = _pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    for (kind, name), of in profiles.items():
        for ax, metric in zip(axes[int(kind == "principal")], (TRAIN, TEST), strict=True):
            ax.set_title(f"{metric.capitalize()} along {kind} rays (mean and range)")
            plot.loss_profile(of["distance"], of[metric], ax=ax, label=name)
            ax.set(xlabel="distance in weight space", yscale="log")
            ax.set_ylabel(f"{metric} ({'nats' if metric == TRAIN else 'share of images'})")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_curves(folder: Path, curves: dict[str, Any], about: dict[str, Any]) -> None:
    """Train loss and test error along the ways, and the plane of the Bezier curve."""
    from swagjax import plot

    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for ax, metric in zip(axes, (TRAIN, TEST), strict=True):
        ax.set_title(f"{metric.capitalize()} between two solutions")
        for name in about:
            plot.loss_profile(curves[name]["t"], curves[name][metric], ax=ax, label=name)
        unit = "nats" if metric == TRAIN else "share of images"
        ax.set(xlabel="t along the curve", ylabel=f"{metric} ({unit})", yscale="log")
    figure.savefig(folder / "curves.png", dpi=120)
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.4), layout="constrained")
    of = curves["plane"]
    for ax, metric in zip(axes, (TRAIN, TEST), strict=True):
        ax.set_title(f"{metric.capitalize()} on the plane of the Bezier curve")
        _draw_surface(ax, of, metric)
        plain = {"color": BLACK, "marker": "none", "lw": 2}
        plot.plane_points(of["curve"], ax=ax, label="Bezier curve", **plain)
        plot.plane_points(of["points"][:2], ax=ax, label="straight line", ls="--", **plain)
        ends = {"color": ORANGE, "marker": "s", "linestyle": "none", "ms": 8}
        plot.plane_points(of["points"][:2], ax=ax, label="the two solutions", **ends)
        bend = {"color": BLUE, "marker": "X", "linestyle": "none", "ms": 8}
        plot.plane_points(of["points"][2], ax=ax, label="control point", **bend)
    figure.savefig(folder / "curve-plane.png", dpi=120)
    plt.close("all")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _check(chosen: Surface, models: list[str]) -> None:
    """Refuse values that no experiment can be made of, in one line."""
    least = {"epochs": 4, "curve_epochs": 1, "batch_size": 1, "rank": 2, "seed": 0}
    for name, number in (least | {"resolution": 4, "rays": 1, "images": 1}).items():
        if getattr(chosen, name) < number:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} {getattr(chosen, name)}: at least {number}")
    for name in ("learning_rate", "curve_learning_rate", "weight_decay"):
        value, option = getattr(chosen, name), f"--{name.replace('_', '-')}"
        if not 0 <= value < float("inf") or (value == 0 and name != "weight_decay"):
            raise UsageError(f"{option} {value}: a number above zero")
    if chosen.model not in models:
        raise UsageError(f"--model {chosen.model}: one of {', '.join(models)}")
