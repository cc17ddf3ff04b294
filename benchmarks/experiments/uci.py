"""Regression on the UCI sets: SGD, SWA, SWAG and its relatives, and other Bayesian methods.

The authors' protocol: a network of one mean and one variance output and a global noise; inputs and
targets standardised by the train part (the authors standardised before splitting, so that test rows
leaked into it); SGD with momentum 0.9 at a constant step size; one collection an epoch. Up to 600
rows epochs, batches and weight decay are theirs for boston, up to 2000 rows theirs for concrete.
Above that epochs and batches are theirs for elevators, the weight decay is ours, and the network is
smaller for the sake of CPUs: theirs is ``--hidden 1000 1000 500 50``.

The tuned protocol chooses for every method and split, by the NLL on held-out fifths of the train
part (three times over up to 2000 rows, once above), and is the recipe that we advise. SWA,
SWAG-Diag, SWAG and MultiSWAG settle first, by the decayed run of SGD, and then collect in a second
part of a quarter of its length, at a learning rate of its own. They choose learning rate, weight
decay, epochs, the rate of collecting, the scale of the covariance (0 is SWA) and a factor of the
predicted variance. Every algorithm has the same search: all learning rates times all weight decays
(for MC-dropout: dropout rates), each at half the epochs, at all and at five quarters of them, which
is the length of a run of SWAG; that in turn tries two lengths of its first part, with three second
parts each, which comes to five percent fewer epochs. "SGD fitted" chooses the factor of the
variance too. "SWA constant" and "SWAG constant" collect at a constant learning rate from the first
step on, as the authors do, chosen in the same way. MultiSWAG takes what SWAG chose, the deep
ensemble what SGD fitted chose. In the final training a run that failed on its train rows is trained
again at a lower rate, whatever the method (``train_guarded``). The grids were widened by looks at
held-out tables, after test scores on boston and concrete had been seen: as grids they are not
chosen blindly; and the recipe was designed with test scores of boston and kin8nm in view.

SGD decays its step size, which is the honest baseline. "SGD constant" is the last iterate of a run
at a constant step size, under the authors' protocol of the run that SWA and SWAG average. There
"SWAG fitted" chooses a scale and a factor of the predicted variance on a held-out fifth, after a
training of its own. Searches aside, an ensemble of five costs five trainings, SWAG by the recipe
one and a quarter, all others one.
"""

import collections
import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import options

SMALL = {"epochs": 300, "start": 200, "batch_size": 30, "weight_decay": (0.1,), "hidden": (50,)}
MEDIUM = {"epochs": 1000, "start": 500, "batch_size": 100, "weight_decay": (0.01,), "hidden": (50,)}
LARGE = {"epochs": 200, "start": 80, "batch_size": 200, "weight_decay": (1e-4,), "hidden": (50,)}
# To choose from. With many rows the prior is shared by more of them, and there are fewer steps.
FEW = {
    "learning_rate": (1e-3, 3e-3, 0.01, 0.03, 0.1),
    "weight_decay": (1e-4, 1e-3, 0.01, 0.03, 0.1),
    "dropout": (0.005, 0.01, 0.05, 0.1, 0.2),
    "holdouts": 3,
}
MANY = {
    "learning_rate": (3e-3, 0.01, 0.03, 0.1, 0.3),
    "weight_decay": (1e-6, 1e-5, 1e-4, 1e-3),
    "dropout": (0.005, 0.01, 0.05, 0.1),
}
AXES = {
    "RMSE": "RMSE, in units of the target",
    "NLL": "NLL of a row, nats",
    "standardised NLL": "NLL of a row, nats, of standardised targets",
}
LEVEL = 0.05  # of the paired tests, which are corrected for the overlap of the splits
TESTED = ("RMSE", "NLL", "CRPS")
COMPARED = ("SGD", "SGD fitted", "SGD constant", "SWA")  # with SWAG, by a paired test


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uci:
    """Regression: SGD, SWA, SWAG, MultiSWAG, deep ensembles, MC-dropout, VI and SGLD compared.

    Prints RMSE, NLL, CRPS, coverage and width of 95 % intervals beside published figures, and what
    the diagnostics say of SWAG's iterates; writes results.json, scores.png and iterates.png.
    """

    name: tuple[str, ...] = ()
    """Folder names of data sets; by default all that are found in --data-dir."""
    data_dir: Path | None = None
    """Folder of data sets, in the layout of the MC-dropout experiments or of uci_datasets; without
    one, scikit-learn's diabetes."""
    protocol: Literal["authors", "tuned"] = "authors"
    """authors: fixed hyper-parameters; tuned: chosen split by split on held-out train rows."""
    methods: tuple[str, ...] = ()
    """Methods to compare; by default all."""
    splits: int | None = None
    """How many of the splits, the first ones; by default all."""
    members: int = 5
    """Networks of MultiSWAG and of the deep ensemble."""
    hidden: options.ByDataset[tuple[int, ...] | None] = None
    """Units of the hidden layers."""
    epochs: options.ByDataset[int | None] = None
    """Passes over the train rows."""
    start: options.ByDataset[int | None] = None
    """Epochs before the first collection; from then on one iterate is collected every epoch."""
    batch_size: options.ByDataset[int | None] = None
    """Rows in a minibatch."""
    learning_rate: options.ByDataset[tuple[float, ...] | None] = None
    """Step size; several for the tuned protocol to choose from."""
    weight_decay: options.ByDataset[tuple[float, ...] | None] = None
    """L2 penalty that is added to the gradient; several for the tuned protocol."""
    dropout: options.ByDataset[tuple[float, ...] | None] = None
    """Rate of MC-dropout; several for the tuned protocol."""
    collecting: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Learning rates of the second part of a run that settles first, as shares of that of its first
    step, for the tuned protocol to choose from."""
    holdouts: options.ByDataset[int | None] = None
    """Random fifths of a train part to choose by, each with a search of its own; of several the
    mean NLL decides, with less of its chance."""
    rank: int = 20
    """Deviations held by SWAG (K in the paper)."""
    num_samples: int = 30
    """Networks averaged by every method that samples; the members of MultiSWAG share them."""
    resume: bool = False
    """Continue an interrupted run from its last finished stage."""
    results: Path = Path("results")
    """Folder under which uci/<name>/ is written, of the tuned protocol uci/<name>-tuned/."""


def uci(chosen: Uci) -> None:
    """Compare the methods on one data set after the other."""
    from benchmarks.regression import data

    _check(chosen)
    for dataset in data.load(chosen.name, chosen.data_dir):
        _compare(_complete(chosen, len(dataset.targets)), dataset)


def _compare(chosen: Uci, dataset: Any) -> None:
    """Choose, train, score; print the table, write the JSON and the picture."""
    from rich.console import Console

    from benchmarks import report, stages
    from benchmarks.regression import data, scoring, tuning

    folder = chosen.results / "uci" / _folder(chosen, dataset.name)
    splits = dataset.splits[: chosen.splits]
    stage = stages.open_stages(folder / "checkpoints", _identity(chosen, dataset), chosen.resume)
    plan, names = _plan(chosen), _names(chosen)
    held_out = data.parts(dataset, data.held_out(splits, chosen.holdouts))
    methods = _methods(chosen)
    grid = _grid(chosen)
    selected = tuning.choose(methods, names, grid, plan, held_out, len(splits), stage)
    parts = data.parts(dataset, splits)
    scored = scoring.scores(methods, selected, chosen.members, plan, parts, stage)
    content = _record(chosen, dataset, parts, selected, scored)
    report.write_json(folder / "results.json", content)
    console = Console(width=max(100, Console().width))  # of a table with six metrics
    console.print(_title(content), report.beside(content), sep="\n")
    print("\n".join(_remarks(content)))
    _draw(folder / "scores.png", content)
    if content["iterates"]:
        _draw_iterates(folder / "iterates.png", content)
    print(f"results.json and the pictures are in {folder}\n")


def _check(chosen: Uci) -> None:
    """Refuse values that no comparison can be made of, in one line."""
    for name in ("splits", "members", "epochs", "start", "batch_size", "holdouts", "num_samples"):
        value = getattr(chosen, name)
        if value is not None and value < 1:
            raise options.UsageError(f"--{name.replace('_', '-')} {value}: at least 1")
    if chosen.rank < 2:
        raise options.UsageError(f"--rank {chosen.rank}: at least 2")
    ends = {"learning_rate": 1e3, "weight_decay": 1e3, "dropout": 1.0, "collecting": 1e3}
    for name, end in ends.items():
        values = getattr(chosen, name)
        shown = f"--{name.replace('_', '-')} {' '.join(map(str, values or ()))}"
        if values is not None and (not values or not all(0 <= value < end for value in values)):
            raise options.UsageError(f"{shown}: one value or several, of at least 0, below {end:g}")
        if chosen.protocol == "authors" and len(values or "1") > 1 and name != "collecting":
            raise options.UsageError(f"{shown}: several values are for --protocol tuned")
    if chosen.hidden is not None and (not chosen.hidden or min(chosen.hidden) < 1):
        raise options.UsageError("--hidden: one layer or several, each of at least 1 unit")
    if chosen.methods:
        for name in set(chosen.methods) - set(_methods(chosen)):
            raise options.UsageError(
                f"--methods {name!r}: choose of {', '.join(_methods(chosen))}, the methods of "
                f"--protocol {chosen.protocol}"
            )


def _complete(chosen: Uci, rows: int) -> Uci:
    """Fill in the defaults for a data set of this many rows."""
    defaults = SMALL if rows <= 600 else MEDIUM if rows <= 2000 else LARGE
    defaults = defaults | {"learning_rate": (1e-3,), "dropout": (0.05,)}
    if rows > 20_000:
        defaults |= {"hidden": (100,)}
    defaults |= {"holdouts": 1}
    if chosen.protocol == "tuned":
        defaults |= FEW if rows <= 2000 else MANY
    full = options.complete(chosen, defaults)
    if full.start >= full.epochs:
        raise options.UsageError(
            f"--start {full.start}: less than --epochs {full.epochs}, or nothing is collected"
        )
    return full


def _folder(chosen: Uci, name: str) -> str:
    return name if chosen.protocol == "authors" else f"{name}-{chosen.protocol}"


def _identity(chosen: Uci, dataset: Any) -> dict[str, Any]:
    """The options that determine the numbers of one data set."""
    return options.identity(chosen) | {"methods": _names(chosen), "dataset": dataset.name}


def _methods(chosen: Uci) -> Any:
    """All methods of the protocol, by name."""
    from benchmarks.regression import methods

    return methods.TUNED if chosen.protocol == "tuned" else methods.AUTHORS


def _names(chosen: Uci) -> list[str]:
    return [name for name in _methods(chosen) if name in (chosen.methods or _methods(chosen))]


def _plan(chosen: Uci) -> Any:
    from benchmarks.regression.training import Plan

    steps = 0  # known where the rows are
    lengths = (chosen.hidden, chosen.batch_size, chosen.epochs, chosen.start)
    return Plan(*lengths, steps, chosen.rank, chosen.num_samples)


def _grid(chosen: Uci) -> Any:
    from benchmarks.regression.tuning import Grid

    epochs = (chosen.epochs,)
    if chosen.protocol == "tuned":
        epochs = (max(chosen.epochs // 2, 2), chosen.epochs, chosen.epochs * 5 // 4)
    rates = chosen.learning_rate, chosen.weight_decay, chosen.dropout, chosen.collecting
    return Grid(*rates, epochs)


def _record(chosen: Uci, dataset: Any, parts: Any, selected: Any, scored: Any) -> dict[str, Any]:
    from benchmarks import report
    from benchmarks.regression import published, scoring

    ratio = float((parts.test_rows / parts.rows).mean())
    rows = _published(chosen, dataset)
    standardised = any(row["standardised"] for row in rows)
    return report.record(
        scored.scores,
        experiment="uci",
        options=_identity(chosen, dataset),
        data={
            "rows": len(dataset.targets),
            "inputs": dataset.inputs.shape[1],
            "splits": len(parts.rows),
            "layout": dataset.layout,
            "test_to_train": ratio,
        },
        search=_budget(chosen),
        shown=[_in_units(name, standardised) for name in scoring.METRICS],
        published=rows,
        claimed=published.swag_beats_sgd(dataset.name),
        chosen={name: [_plain(choice) for choice in of] for name, of in selected.items()},
        paired_tests={m: report.paired_tests(scored.scores, m, ratio) for m in TESTED},
        edges=_edges(chosen, selected),
        iterates=scored.iterates,
    )


def _edges(chosen: Uci, selected: Any) -> list[str]:
    """Where a quarter of the choices or more are at an end of what was tried: widen it there."""
    said = []
    methods = _methods(chosen)
    for name in (name for name in selected if not methods[name].chosen_as):
        choices, tried = selected[name], methods[name].tried
        fixed = "weight_decay" if name == "MC-dropout" else "dropout"
        rates = {"learning_rate", "weight_decay", "dropout", "collecting"} - {fixed}
        grids = {f: getattr(chosen, f) for f in sorted(rates)}
        grids |= {"scale": tried.scales, "noise": tried.noises}
        for field, grid in grids.items():
            values = [_plain(choice)[field] for choice in choices]
            for end, word in ((min(grid), "least"), (max(grid), "greatest")):
                count = sum(value == end for value in values)
                if len(grid) > 1 and end and 4 * count >= len(values):
                    said.append(
                        f"{name}: {field} is the {word} tried, {end:g}, in {count} of {len(values)}"
                    )
    return said


def _in_units(metric: str, standardised: bool) -> str:
    """NLL of standardised targets where the published one is."""
    return "standardised NLL" if standardised and metric == "NLL" else metric


def _published(chosen: Uci, dataset: Any) -> list[dict[str, Any]]:
    """Published rows of the family of this protocol and these splits."""
    from benchmarks.regression import published

    if chosen.protocol == "authors":
        rows = published.authors(dataset.name)
    else:
        rows = published.standard(dataset.name) if dataset.layout == "standard" else []
    return [
        {
            "label": f"{row.method} *",
            "RMSE": row.rmse,
            "standardised NLL" if row.standardised else "NLL": row.nll,
            "standardised": row.standardised,
            **published.SOURCES[row.source]._asdict(),
        }
        for row in rows
    ]


def _plain(choice: Any) -> dict[str, float]:
    rest = {"epochs": choice.epochs, "scale": choice.scale, "noise": choice.noise}
    return choice.hyper._asdict() | rest


def _budget(chosen: Uci) -> str:
    """What was searched, in words, for the record."""
    if chosen.protocol == "authors":
        return "none; SWAG fitted: one training on four fifths of each train part"
    candidates = len(chosen.learning_rate) * len(chosen.weight_decay)
    drops = len(chosen.learning_rate) * len(chosen.dropout)
    return (
        f"{candidates} candidates an algorithm and split (MC-dropout {drops}), each at half, all "
        "and five quarters of the epochs (SWA and SWAG: half and all, each with "
        f"{len(chosen.collecting)} second parts), trained on four fifths of the train part and "
        f"chosen by NLL on the rest, {chosen.holdouts} times"
    )


def _title(content: dict[str, Any]) -> str:
    o, d = content["options"], content["data"]
    return (
        f"{o['dataset']}, protocol {o['protocol']}: {d['rows']} rows, {d['inputs']} inputs; "
        f"mean ± standard error over {d['splits']} splits; 95 % intervals; hyper-parameter search: "
        f"{content['search']}"
    )


def _remarks(content: dict[str, Any]) -> list[str]:
    """What the numbers say of the aims, and what to know of the published ones."""
    sources = dict.fromkeys((row["paper"], row["caveat"]) for row in content["published"])
    notes = [f"* {paper}: {caveat}" for paper, caveat in sources]
    return [
        *_against_published(content),
        *_against_sgd(content),
        *_of_iterates(content["iterates"]),
        *content["edges"],
        *notes,
    ]


def _against_published(content: dict[str, Any]) -> list[str]:
    """Which methods reach the best published NLL, within one standard error of ours."""
    metric = next(name for name in content["shown"] if name.endswith("NLL"))
    best = min((row[metric] for row in content["published"]), default=None)
    if best is None:
        return []
    reached = [
        name
        for name, of in content["results"].items()
        if of[metric]["mean"] - (of[metric]["standard_error"] or 0) <= best
    ]
    return [f"best published {metric} {best:g}, reached by: {', '.join(reached) or 'none'}"]


def _against_sgd(content: dict[str, Any]) -> list[str]:
    """Whether SWAG is better than what it is to improve on, by the paired test."""
    tests = content["paired_tests"]["NLL"]
    found = {name: tests[name]["SWAG"] for name in COMPARED if "SWAG" in tests.get(name, {})}
    said = {None: [], True: ["the authors report a better NLL of SWAG than of SGD on this set"]}
    said[False] = ["the authors report no better NLL of SWAG than of SGD on this set"]
    return [*(_verdict(name, test) for name, test in found.items()), *said[content["claimed"]]]


def _of_iterates(iterates: dict[str, list[Any]]) -> list[str]:
    """What the diagnostics say of the iterates that SWAG collected, in the median of the splits."""
    if not iterates:
        return []
    names = ("n_eff", "collected", "trend", "expected", "movement", "effective_dimension")
    n_eff, collected, trend, expected, movement, dimension = (
        float(np.median(iterates[name])) for name in names
    )
    verdicts = collections.Counter(iterates["verdict"]).most_common()
    return [
        f"iterates of SWAG: {n_eff:.0f} effective of {collected:.0f} collected, trend {trend:.2f} "
        f"(at rest {expected:.2f}), movement {movement:.2g}, effective dimension {dimension:.1f}",
        f"their verdicts: {', '.join(f'{word} {count}' for word, count in verdicts)} of the splits",
    ]


def _verdict(name: str, test: dict[str, Any]) -> str:
    if test["p"] is None:
        return f"NLL of SWAG - {name}: {-test['difference']:+.4f}, no test of a single split"
    said = "not shown to be better"
    if test["p"] < LEVEL:
        said = "better" if test["difference"] > 0 else "worse"
    return (
        f"NLL of SWAG - {name}: {-test['difference']:+.4f} ± {test['standard_error']:.4f}, "
        f"p = {test['p']:.2g}: SWAG is {said}"
    )


def _draw(path: Path, content: dict[str, Any]) -> None:
    """RMSE and NLL of every method, published ones (with a star) below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results, published = content["results"], content["published"]
    labels = [*results, *(row["label"] for row in published)]
    height = 1.2 + 0.3 * len(labels)
    figure, axes = plt.subplots(1, 2, figsize=(10, height), layout="constrained", sharey=True)
    metrics = [name for name in content["shown"] if name in AXES]
    for ax, metric in zip(axes, metrics, strict=True):
        of = [values[metric] for values in results.values()]
        errors = [value["standard_error"] or 0 for value in of]
        ax.errorbar(
            [value["mean"] for value in of], range(len(of)), xerr=errors, fmt="o", color="#0072B2"
        )
        known = [(row.get(metric), len(of) + i) for i, row in enumerate(published)]
        known = [pair for pair in known if pair[0] is not None]
        if known:
            ax.plot(*zip(*known, strict=True), "D", color="#D55E00", markerfacecolor="none")
        ax.set(xlabel=AXES[metric], yticks=range(len(labels)), yticklabels=labels)
        ax.locator_params(axis="x", nbins=6)  # of more, long labels meet
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    star = "; * published" if published else ""
    figure.suptitle(f"{path.parent.name}: mean ± standard error over splits, less is better{star}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _is_known(curve: list[float]) -> bool:
    """Whether a diagnostic told anything: of fewer than four iterates it does not."""
    return bool(np.isfinite(curve).any())


def _draw_iterates(path: Path, content: dict[str, Any]) -> None:
    """Autocorrelation and captured variance of SWAG's iterates, a curve a split."""
    from matplotlib import pyplot as plt

    from swagjax import plot

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    drawn = {"autocorrelation": plot.autocorrelation, "cumulative": plot.captured_variance}
    for ax, (name, draw) in zip(axes, drawn.items(), strict=True):
        for curve in filter(_is_known, content["iterates"][name]):
            draw(curve, ax=ax, color="#0072B2", linestyle="-", marker="", alpha=0.3)
    figure.suptitle(_title(content).split(";")[0] + ": iterates of SWAG, a curve a split")
    figure.savefig(path, dpi=120)
    plt.close(figure)
