"""What the methods of ``classify`` make of digits that are turned from 0 to 180 degrees.

No digit is turned as far in training, so that confidence should fall as the true class is lost. The
picture is that of Gal and Ghahramani (2016), "Dropout as a Bayesian Approximation", for plain
weight decay beside SWAG and the ensembles. The networks are those of ``classify`` with the same
options: LeNet5 on MNIST, and the small ConvNet on scikit-learn's digits, too small for LeNet5.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from benchmarks.experiments.classify import Classify
from benchmarks.experiments.shift import PICTURES, STYLES, check_images, show
from benchmarks.options import UsageError

END = 180.0
SHOWN = 10  # turned images below the axis
NAMES = {"SGD": "SGD (weight decay)"}  # in pictures; all others by their own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation(Classify):
    """Turn test digits from 0 to 180 degrees, and see what is predicted, and how surely.

    Prints means over all angles; writes results.json, a picture of the probability of the true
    class and of the predictive entropy (rotation.png), and one of the probabilities of all classes
    (classes.png), to rotation/<dataset>/ under the results.
    """

    digit: int = 1
    """Class of the one image that is drawn; one of those trained on."""
    image: int = 0
    """Which of its test images."""
    test_images: int = 100
    """Test images, of all classes trained on, that means are over."""
    step: float = 5.0
    """Degrees from one angle to the next."""
    methods: tuple[str, ...] = ("SGD", "SWAG", "deep ensemble", "MultiSWAG")
    """Methods to compare; only what they need is trained."""
    resume: bool = True
    """Use the networks that classify trained with the same options."""


class Curves(NamedTuple):
    """What one method predicts at every angle, of every seed.

    Attributes:
      one: probabilities for the one image, shape (seeds, angles, classes).
      many: those for the test images, shape (seeds, angles, images, classes).
    """

    one: np.ndarray
    many: np.ndarray


def rotation(chosen: Rotation) -> None:
    """Predict, print the table, write the JSON and the pictures."""
    from rich.console import Console

    from benchmarks import report
    from benchmarks.experiments import classify

    _check(chosen)
    run = classify.prepare(chosen)
    part, label = run.task.evaluation, run.chosen.in_classes.index(chosen.digit)
    one = part.inputs[np.flatnonzero(part.labels == label)[chosen.image]]
    images, labels = (of[: chosen.test_images] for of in (part.inputs, part.labels))
    turned = _turned(np.concatenate([one[None], images]), angles(chosen.step))
    curves = {name: _predict(run, name, turned) for name in classify.methods_of(run)}
    results = {name: summaries(of.many, labels) for name, of in curves.items()}
    Console().print(_title(run, len(labels)), report.table(results), sep="\n")
    folder = chosen.results / "rotation" / run.folder.name
    report.write_json(folder / "results.json", _record(run, results, curves, label, labels))
    _draw(run, folder, turned, curves, label, labels)
    print(f"results.json, rotation.png and classes.png are in {folder}")


def angles(step: float) -> np.ndarray:
    """Degrees from 0 to 180 at this distance; 180 itself whatever the distance."""
    return np.append(step * np.arange(np.ceil(END / step)), END)


def true_class(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probabilities of the true class: ``(..., images, classes)`` to ``(..., images)``."""
    return probs[..., np.arange(len(labels)), labels]


def entropy(probs: np.ndarray) -> np.ndarray:
    """Predictive entropy in nats, over the last axis."""
    from scipy import special

    return special.entr(probs).sum(-1)


def summaries(probs: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    """Means over angles and images, one a seed, for probabilities ``(seeds, angles, images, C)``.

    ``confidence`` is the probability of the predicted class, ``true class`` that of the true one.
    """
    true, least = true_class(probs, labels), np.finfo(np.float32).tiny
    of = {
        "accuracy": probs.argmax(-1) == labels,
        "confidence": probs.max(-1),
        "true class": true,
        "NLL": -np.log(np.maximum(true, least)),
        "entropy": entropy(probs),
    }
    return {name: values.mean((1, 2)).tolist() for name, values in of.items()}


def _check(chosen: Rotation) -> None:
    if not 0 < chosen.step <= END:
        raise UsageError(f"--step {chosen.step}: more than 0 and at most {END:g} degrees")
    if chosen.test_images < 1:
        raise UsageError(f"--test-images {chosen.test_images}: at least 1")
    task = check_images(chosen)
    if chosen.digit not in task.classes:
        known = ", ".join(map(str, task.classes))
        raise UsageError(f"--digit {chosen.digit}: trained on are {known}")
    there_are = np.sum(task.evaluation.labels == task.classes.index(chosen.digit))
    if not 0 <= chosen.image < there_are:
        raise UsageError(f"--image {chosen.image}: 0 to {there_are - 1}")


def _turned(images: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Shape (angles, images, H, W, C)."""
    import jax

    from benchmarks import corruptions

    turn = jax.jit(corruptions.rotate)
    return np.stack(jax.device_get([turn(images, angle) for angle in degrees.tolist()]))


def _predict(run: Any, name: str, turned: np.ndarray) -> Curves:
    from benchmarks.experiments import classify

    probs = np.stack(classify.predict(run, name, turned.reshape(-1, *turned.shape[2:])))
    probs = probs.reshape(len(probs), *turned.shape[:2], -1)
    return Curves(probs[:, :, 0], probs[:, :, 1:])


def _title(run: Any, images: int) -> str:
    chosen = run.chosen
    return (
        f"{chosen.dataset}, {chosen.model}: means over {images} {chosen.evaluate} images at angles "
        f"from 0 to 180 degrees; mean ± standard error over {chosen.seeds} seeds"
    )


def _record(run: Any, results: Any, curves: Any, label: int, labels: np.ndarray) -> dict[str, Any]:
    """The results, and both curves of every method as lists over the angles, one a seed."""
    from benchmarks import report
    from benchmarks.experiments import classify

    drawn = {
        name: {
            "one image, true class": of.one[..., label].tolist(),
            "one image, entropy": entropy(of.one).tolist(),
            "all images, true class": true_class(of.many, labels).mean(-1).tolist(),
            "all images, entropy": entropy(of.many).mean(-1).tolist(),
        }
        for name, of in curves.items()
    }
    return report.record(
        results,
        experiment="rotation",
        options=classify.recorded(run.chosen),
        digit=run.chosen.digit,
        image=run.chosen.image,
        images=len(labels),
        angles=angles(run.chosen.step).tolist(),
        curves=drawn,
    )


def _draw(run: Any, folder: Any, turned: Any, curves: Any, label: int, labels: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    degrees = angles(run.chosen.step)
    _rotation(plt, run, degrees, turned, curves, label, labels).savefig(
        folder / "rotation.png", dpi=120
    )
    _classes(plt, run, degrees, curves).savefig(folder / "classes.png", dpi=120)
    plt.close("all")


def _rotation(
    plt: Any, run: Any, degrees: Any, turned: Any, curves: Any, label: int, labels: Any
) -> Any:
    """Two columns, one image and the mean over all; below them what the networks see."""
    figure, axes = plt.subplots(
        *(3, 2), figsize=(11, 7.4), layout="constrained", height_ratios=(4, 4, 1), sharey="row"
    )
    for name, of in curves.items():
        style = _style(name)
        true = of.one[..., label], true_class(of.many, labels).mean(-1)
        unsure = entropy(of.one), entropy(of.many).mean(-1)
        for row, values in zip(axes, (true, unsure), strict=False):
            for ax, of_seeds in zip(row, values, strict=True):
                _band(ax, degrees, of_seeds, NAMES.get(name, name), style)
    chosen, images = run.chosen, turned.shape[1] - 1
    axes[0, 0].set(title=f"one {chosen.digit}", ylabel="probability of the true class")
    axes[0, 1].set(title=f"mean over {images} test images")
    axes[1, 0].set(ylabel="predictive entropy (nats)")
    # Below one column the one image, below the other a new one at every angle.
    for ax, which in zip(axes[2], ([0] * SHOWN, range(1, SHOWN + 1)), strict=True):
        _strip(ax, degrees, turned, [i % turned.shape[1] for i in which])
    for ax in axes[:2].flat:
        ax.set(xlim=(-10, END + 10), xticks=range(0, 181, 20))
    for ax in axes[1]:
        ax.set_xlabel("rotation (degrees)")
        ax.axhline(np.log(len(chosen.in_classes)), color="#666666", linewidth=1)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(
        f"{chosen.dataset}, {chosen.model}, turned: mean and standard error over the seeds "
        f"({chosen.seeds}); grey: entropy of a guess"
    )
    return figure


def _style(name: str) -> dict[str, Any]:
    """Those of ``shift``."""
    for names in PICTURES.values():
        if name in names:
            return STYLES[names.index(name)]
    return {}


def _band(ax: Any, degrees: np.ndarray, values: np.ndarray, name: str, style: Any) -> None:
    """The mean over the seeds, and a band of one standard error where there are several."""
    mean, seeds = values.mean(0), len(values)
    every = max(1, len(degrees) // 12)
    ax.plot(degrees, mean, label=name, markevery=every, markersize=4, linewidth=1.4, **style)
    if seeds > 1:
        error = values.std(0, ddof=1) / np.sqrt(seeds)
        color = style.get("color")
        ax.fill_between(degrees, mean - error, mean + error, alpha=0.15, color=color, linewidth=0)


def _strip(ax: Any, degrees: np.ndarray, turned: np.ndarray, which: list[int]) -> None:
    """Turned images at even distances along the axis of the panel above."""
    half = 0.45 * END / (SHOWN - 1)
    for image, angle in zip(which, np.linspace(0, END, SHOWN), strict=True):
        nearest = np.abs(degrees - angle).argmin()
        at = (degrees[nearest] - half, degrees[nearest] + half, 0, 1)
        show(ax, turned[nearest, image], turned[0], extent=at, aspect="auto")
    ax.set(xlim=(-10, END + 10), ylim=(0, 1))
    ax.axis("off")


def _classes(plt: Any, run: Any, degrees: np.ndarray, curves: dict[str, Curves]) -> Any:
    """A panel a method: the probabilities of the classes for the one image."""
    means = {name: of.one.mean(0) for name, of in curves.items()}
    top = np.max([mean.max(0) for mean in means.values()], axis=0)
    likely = np.sort(np.argsort(-top, kind="stable")[: len(STYLES)])
    figure, axes = plt.subplots(
        *(1, len(means)),
        figsize=(1 + 3.2 * len(means), 3.6),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for ax, (name, mean) in zip(axes.flat, means.items(), strict=True):
        for c, style in zip(likely, STYLES, strict=False):
            label = f"class {run.chosen.in_classes[c]}"
            every = max(1, len(degrees) // 12)
            ax.plot(degrees, mean[:, c], label=label, markevery=every, markersize=4, **style)
        ax.set(title=NAMES.get(name, name), xlabel="rotation (degrees)", xticks=range(0, 181, 45))
    axes[0, 0].set_ylabel("probability")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"What one {run.chosen.digit} is taken for; mean over the seeds")
    return figure
