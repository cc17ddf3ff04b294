"""Accuracy, NLL and ECE of the methods of ``classify`` on test images that are corrupted.

The networks are those of ``classify`` with the same options; what it has not trained is trained.
The form is that of Ovadia et al. (2019), "Can You Trust Your Model's Uncertainty?".
"""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from benchmarks.experiments.classify import Classify
from benchmarks.options import UsageError

Kind = Literal["noise", "shot", "blur", "pixelate", "contrast", "brightness", "rotation"]
METRICS = ("accuracy", "NLL", "ECE")
ROWS = 50_000  # images predicted in one call; BatchNorm is refreshed anew for every call
# Methods side by side, one picture each; of Okabe and Ito's colours there are no more.
PICTURES = {
    "shift": ("SGD", "SWA", "SWAG-Diag", "SWAG", "deep ensemble", "MultiSWAG"),
    "rivals": ("SGD-Temp", "SWA-Temp", "SWA-Dropout", "SWAG fitted", "SGLD", "FGE"),
}
STYLES = (
    {"color": "#000000", "linestyle": ":", "marker": "D"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#56B4E9", "linestyle": (0, (1, 1)), "marker": "X"},
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": "#E69F00", "linestyle": (0, (8, 2)), "marker": "P"},
)

# method -> metric -> values, of shape (seeds, conditions)
Scores = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shift(Classify):
    """Corrupt the test images in five severities, and see how accuracy and calibration fare.

    Prints the means over the corruptions; writes results.json with every corruption, a picture of
    SWAG and its relatives (shift.png), one of its rivals (rivals.png), and one of the images
    (images.png), to shift/<dataset>/ under the results.
    """

    corruptions: tuple[Kind, ...] = get_args(Kind)
    """What is done to the images."""
    test_images: int | None = None
    """How many of them; by default all."""
    resume: bool = True
    """Use the networks that classify trained with the same options."""


def shift(chosen: Shift) -> None:
    """Predict, print the tables, write the JSON and the pictures."""
    from benchmarks import report
    from benchmarks.experiments import classify

    _check(chosen)
    run = classify.prepare(chosen)
    part = run.task.evaluation
    images, labels = (of[: chosen.test_images] for of in (part.inputs, part.labels))
    conditions = [("none", 0), *((kind, s) for kind in chosen.corruptions for s in range(1, 6))]
    scores = measure(run, conditions, images, labels)
    means = over_corruptions(scores, conditions)
    _print(_title(run, len(labels)), means)
    folder = chosen.results / "shift" / run.folder.name
    report.write_json(folder / "results.json", _record(run, scores, means, conditions, len(labels)))
    title = f"{run.chosen.dataset}, {run.chosen.model}"
    drawn = _draw(folder, title, scores, conditions)
    drawn.append(_draw_images(folder, images, labels, conditions))
    print(f"results.json, {', '.join(drawn)} are in {folder}")


def measure(run: Any, conditions: list[tuple[str, int]], images: Any, labels: Any) -> Scores:
    """The metrics of every method under every condition, a corruption and its severity."""
    import jax

    from benchmarks.experiments import classify
    from swagjax import metrics

    @jax.jit
    @jax.vmap
    def score(probs: Any) -> Any:
        ece = metrics.ece(probs, labels, binning="count")
        return metrics.accuracy(probs, labels), metrics.nll(probs, labels), ece

    scores: dict[str, list[Any]] = {name: [] for name in classify.methods_of(run)}
    for some in _groups(conditions, len(images)):
        inputs = np.concatenate([_corrupted(*condition, images) for condition in some])
        for name, parts in scores.items():
            probs = np.stack(classify.predict(run, name, inputs))
            probs = probs.reshape(len(probs), len(some), len(images), -1)
            parts.append(jax.device_get([score(of_seed) for of_seed in probs]))
    together = {name: np.concatenate(parts, axis=-1) for name, parts in scores.items()}
    return {
        name: {metric: of[:, i] for i, metric in enumerate(METRICS)}
        for name, of in together.items()
    }


def over_corruptions(scores: Scores, conditions: list[tuple[str, int]]) -> Scores:
    """Means over the corruptions: of shape (seeds, 6), severities 0 to 5."""
    severities = np.array([severity for _, severity in conditions])

    def means(values: np.ndarray) -> np.ndarray:
        return np.stack([values[:, severities == s].mean(1) for s in range(6)], axis=1)

    return {name: {m: means(values) for m, values in of.items()} for name, of in scores.items()}


def of_corruptions(scores: Scores, conditions: list[tuple[str, int]]) -> dict[str, Scores]:
    """Those of every corruption: of shape (seeds, 6), severities 0 to 5."""

    def part(kind: str) -> Scores:
        at = [i for i, (k, s) in enumerate(conditions) if s == 0 or k == kind]
        return {name: {m: values[:, at] for m, values in of.items()} for name, of in scores.items()}

    return {kind: part(kind) for kind in _kinds(conditions)}


def check_images(chosen: Classify) -> Any:
    """The data; an error, before anything is trained, where they are not images."""
    from benchmarks import data

    task = data.load(
        chosen.dataset, chosen.data_dir, chosen.in_classes, chosen.evaluate, chosen.ood_dataset
    )
    if task.vocabulary is not None:
        raise UsageError(f"--dataset {chosen.dataset}: its inputs are texts, not images")
    return task


def show(ax: Any, image: np.ndarray, like: np.ndarray, **how: Any) -> None:
    """Draw a normalised image, black and white the least and the greatest value of ``like``."""
    low, high = like.min((0, 1, 2)), like.max((0, 1, 2))
    pixels = np.clip((image - low) / (high - low), 0, 1)
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1} if pixels.shape[-1] == 1 else {}
    ax.imshow(pixels.squeeze(-1) if grey else pixels, **grey, **how)
    ax.set(xticks=[], yticks=[])


def _check(chosen: Shift) -> None:
    if not chosen.corruptions or len(set(chosen.corruptions)) < len(chosen.corruptions):
        raise UsageError(f"--corruptions {' '.join(chosen.corruptions)}: one or more, each once")
    if chosen.test_images is not None and chosen.test_images < 1:
        raise UsageError(f"--test-images {chosen.test_images}: at least 1")
    check_images(chosen)


def _kinds(conditions: list[tuple[str, int]]) -> list[str]:
    return list(dict.fromkeys(kind for kind, severity in conditions if severity))


def _groups(conditions: list[Any], images: int) -> list[list[Any]]:
    """The conditions, as many at a time as memory has room for their images."""
    size = max(1, ROWS // images)
    return [conditions[i : i + size] for i in range(0, len(conditions), size)]


def _corrupted(kind: str, severity: int, images: np.ndarray) -> np.ndarray:
    """The same for every method and every seed."""
    import jax

    from benchmarks import corruptions

    if severity == 0:
        return images
    change = jax.jit(corruptions.corrupt, static_argnums=(0, 1))
    return np.asarray(change(kind, severity, jax.random.key(severity), images))


def _print(title: str, means: Scores) -> None:
    """A table a metric."""
    from rich.console import Console

    from benchmarks import report

    console = Console(width=max(100, Console().width))  # of a table with six severities
    console.print(title)
    for metric in METRICS:
        console.print(f"\n{metric}, severity 0 to 5", report.table(_columns(means, metric)))


def _columns(means: Scores, metric: str) -> dict[str, dict[str, list[float]]]:
    """A table of one metric, a column a severity."""
    return {
        name: {str(s): of[metric][:, s].tolist() for s in range(6)} for name, of in means.items()
    }


def _title(run: Any, images: int) -> str:
    chosen = run.chosen
    return (
        f"{chosen.dataset}, {chosen.model}: {images} {chosen.evaluate} images, means over "
        f"{len(chosen.corruptions)} corruptions; mean ± standard error over {chosen.seeds} seeds"
    )


def _record(run: Any, scores: Scores, means: Scores, conditions: Any, images: int) -> Any:
    """The means as results, and the corruptions one by one, by method, corruption and severity."""
    from benchmarks import corruptions, report
    from benchmarks.experiments import classify

    results = {
        name: {f"{metric} {s}": of[metric][:, s].tolist() for metric in METRICS for s in range(6)}
        for name, of in means.items()
    }
    single = {
        name: {
            f"{kind} {severity} {metric}": report.summary(of[metric][:, i].tolist())
            for i, (kind, severity) in enumerate(conditions)
            for metric in METRICS
        }
        for name, of in scores.items()
    }
    return report.record(
        results,
        experiment="shift",
        options=classify.recorded(run.chosen),
        images=images,
        strengths={kind: corruptions.STRENGTHS[kind] for kind in run.chosen.corruptions},
        corruptions=single,
    )


def _draw(folder: Any, title: str, scores: Scores, conditions: Any) -> list[str]:
    """One picture a group of methods: a row a metric, a column a corruption."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = []
    for picture, names in PICTURES.items():
        present = {name: scores[name] for name in names if name in scores}
        if present:
            figure = _figure(plt, title, present, names, conditions)
            figure.savefig(folder / f"{picture}.png", dpi=120)
            drawn.append(f"{picture}.png")
    plt.close("all")
    return drawn


def _figure(plt: Any, title: str, scores: Scores, names: tuple[str, ...], conditions: Any) -> Any:
    columns = {"mean": over_corruptions(scores, conditions)} | of_corruptions(scores, conditions)
    figure, axes = plt.subplots(
        len(METRICS),
        len(columns),
        figsize=(1 + 2.0 * len(columns), 6.6),
        layout="constrained",
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for column, (kind, of_column) in zip(axes.T, columns.items(), strict=True):
        for ax, metric in zip(column, METRICS, strict=True):
            for name, of in of_column.items():
                _curve(ax, of[metric], name, STYLES[names.index(name)])
        column[0].set_title(kind)
        column[-1].set(xlabel="severity", xticks=range(6))
    for ax, label in zip(axes[:, 0], ("accuracy", "NLL (nats)", "ECE"), strict=True):
        ax.set_ylabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{title}, test images corrupted: mean ± standard error over the seeds")
    return figure


def _curve(ax: Any, values: np.ndarray, name: str, style: dict[str, Any]) -> None:
    """The mean over the seeds against severity, and its standard error where there are several."""
    seeds, severities = values.shape
    error = values.std(0, ddof=1) / np.sqrt(seeds) if seeds > 1 else None
    ax.errorbar(
        range(severities), values.mean(0), error, label=name, markersize=3.5, linewidth=1.2, **style
    )


def _draw_images(folder: Any, images: Any, labels: Any, conditions: Any) -> str:
    """A picture of one image under all conditions, and the name of its file."""
    from matplotlib import pyplot as plt

    kinds = _kinds(conditions)
    at = labels.argmax()  # of the last class, for one
    figure, axes = plt.subplots(
        *(len(kinds), 6), figsize=(7.2, 1.25 * len(kinds)), layout="constrained", squeeze=False
    )
    for row, kind in zip(axes, kinds, strict=True):
        for severity, ax in enumerate(row):
            show(ax, _corrupted(kind, severity, images)[at], like=images)
        row[0].set_ylabel(kind)
    for severity, ax in enumerate(axes[0]):
        ax.set_title(f"severity {severity}" if severity else "as it is")
    figure.savefig(folder / "images.png", dpi=120)
    plt.close(figure)
    return "images.png"
