"""How many samples, and what rank: NLL and ECE against both.

The networks are those of ``classify`` with the same options; what it has not trained is trained.
Samples are drawn once, and the first S of them averaged. A ring of rank K is the last K rows of a
larger one, so that one training serves all ranks; SWAG's variance is the same in all of them.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import options
from benchmarks.experiments.classify import Classify

KEY = 7  # of the samples, one after the other, which are others than those of classify
LOOKS = {
    "SWA": {"color": "#000000", "linestyle": ":", "marker": ""},
    "SWAG-Diag": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "SWAG": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves(Classify):
    """NLL and ECE of SWAG and SWAG-Diag against the number of samples, of SWAG against the rank.

    Writes results.json and curves.png. Run it after classify with the same options, and nothing is
    trained anew.
    """

    methods: tuple[str, ...] = ("SWA", "SWAG-Diag", "SWAG")
    """Methods to compare, of these three."""
    samples: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 30, 50)
    """Numbers of samples averaged."""
    ranks: tuple[int, ...] = (2, 3, 5, 10, 20)
    """Ranks of SWAG; those above --rank, or above the number of iterates, are left out."""
    resume: bool = True
    """Use the networks that classify trained with the same options."""
    results: Path = Path("results")
    """Folder under which curves/<dataset>/ is written, and classify/<dataset>/ is looked for."""


def curves(chosen: Curves) -> None:
    """Predict with every number of samples and every rank; write the JSON and the picture."""
    from benchmarks import report
    from benchmarks.experiments import classify

    _check(chosen)
    run = classify.prepare(chosen)
    by_samples = {name: _by_samples(run, name, chosen.samples) for name in run.chosen.methods}
    by_rank = _by_rank(run, chosen.ranks) if "SWAG" in run.chosen.methods else {}
    folder = chosen.results / "curves" / run.folder.name
    content = report.record(
        {},
        experiment="curves",
        evaluated_on=run.chosen.evaluate,
        options=classify.recorded(run.chosen),
        samples={name: _summaries(of) for name, of in by_samples.items()},
        ranks=_summaries(by_rank),
    )
    report.write_json(folder / "results.json", content)
    _draw(folder / "curves.png", content)
    print(f"results.json and curves.png are in {folder}")


def narrowed(state: Any, rank: int) -> Any:
    """The state that a smaller rank would have collected; at least that many iterates are held."""
    import jax

    held, last = len(jax.tree.leaves(state.deviations)[0]), int(state.num_collected) - 1
    # Of a ring of this rank, row r holds the last iterate whose number is r modulo the rank.
    numbers = last - (last - np.arange(rank)) % rank
    ring = jax.tree.map(lambda rows: rows[numbers % held], state.deviations)
    return state._replace(deviations=ring)


def _check(chosen: Curves) -> None:
    if not chosen.methods or not set(chosen.methods) <= set(LOOKS):
        given, known = " ".join(chosen.methods), ", ".join(LOOKS)
        raise options.UsageError(f"--methods {given}: of the curves there are {known}")
    for name, least in (("samples", 1), ("ranks", 2)):
        values = getattr(chosen, name)
        if not values or min(values) < least:
            given = " ".join(map(str, values))
            raise options.UsageError(f"--{name} {given}: numbers of at least {least}")


def _by_samples(run: Any, name: str, sizes: tuple[int, ...]) -> dict[int, list[Any]]:
    """Of every number of samples the scores, one a seed."""
    import jax

    from benchmarks import methods, training

    method, found = methods.METHODS[name], {size: [] for size in sorted(sizes)}
    for seed, network in enumerate(run.networks[method.recipe][0]):
        key = jax.random.fold_in(training.key(seed, training.PREDICT), KEY)
        total = 0.0
        for i in range(1 if method.point else max(sizes)):
            total = total + _probabilities(run, method, jax.random.fold_in(key, i), network, 1)
            if i + 1 in found:
                found[i + 1].append(_scores(run, total / (i + 1)))
    return {size: scores for size, scores in found.items() if scores}


def _by_rank(run: Any, ranks: tuple[int, ...]) -> dict[int, list[Any]]:
    """Of every rank the scores of SWAG, one a seed, with the samples of ``classify``."""
    import swagjax
    from benchmarks import methods, training

    method = methods.METHODS["SWAG"]
    states = [swagjax.get_state(net.opt_state) for net in run.networks[method.recipe][0]]
    most = min(run.chosen.rank, *(int(state.num_collected) for state in states))
    found: dict[int, list[Any]] = {rank: [] for rank in sorted(ranks) if rank <= most}
    for rank, scores in found.items():
        for seed, state in enumerate(states):
            network = run.networks[method.recipe][0][seed]
            network = network._replace(opt_state=narrowed(state, rank))
            key = training.key(seed, training.PREDICT)
            probs = _probabilities(run, method, key, network, run.chosen.num_samples)
            scores.append(_scores(run, probs))
    return found


def _probabilities(run: Any, method: Any, key: Any, network: Any, number: int) -> np.ndarray:
    from benchmarks.experiments import classify

    batches = classify.batches(run.chosen, run.task.evaluation.inputs)
    return run.predictor(key, method, network, batches, number)


def _scores(run: Any, probs: np.ndarray) -> dict[str, float]:
    from swagjax import metrics

    labels = run.task.evaluation.labels
    ece = metrics.ece(probs, labels, binning="count")
    return {"NLL": float(metrics.nll(probs, labels)), "ECE": float(ece)}


def _summaries(found: dict[int, list[Any]]) -> dict[int, dict[str, Any]]:
    """Mean and standard error over the seeds."""
    from benchmarks import report

    return {
        number: {metric: report.summary([of[metric] for of in scores]) for metric in scores[0]}
        for number, scores in found.items()
    }


def _draw(path: Path, content: dict[str, Any]) -> None:
    """NLL and ECE above each other, against samples on the left, against rank on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, 2, figsize=(10, 7), layout="constrained", sharex="col", sharey="row"
    )
    for row, metric in zip(axes, ("NLL", "ECE"), strict=True):
        for name, of in content["samples"].items():
            _curve(row[0], of, metric, name)
        _curve(row[1], content["ranks"], metric, "SWAG")
        row[0].set_ylabel("NLL (nats)" if metric == "NLL" else "ECE (20 bins of equal count)")
    axes[1, 0].set_xlabel("number of samples S")
    axes[1, 1].set_xlabel("rank K")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    chosen = content["options"]
    figure.suptitle(
        f"{chosen['dataset']}, {chosen['model']}: left with K = {chosen['rank']}, right with "
        f"S = {chosen['num_samples']}; mean ± standard error over {chosen['seeds']} seeds"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curve(ax: Any, of: dict[int, Any], metric: str, name: str) -> None:
    """A curve with error bars, over a logarithmic axis; of a single number a line across."""
    if not of:
        return
    means = [scores[metric]["mean"] for scores in of.values()]
    errors = [scores[metric]["standard_error"] or 0.0 for scores in of.values()]
    if name == "SWA":
        ax.axhline(means[0], label=name, **LOOKS[name])
        ax.axhspan(means[0] - errors[0], means[0] + errors[0], color="#000000", alpha=0.08)
        return
    ax.errorbar(list(of), means, errors, label=name, capsize=3, **LOOKS[name])
    ax.set_xscale("log")
    ax.set_xticks(list(of), list(map(str, of)))
    ax.minorticks_off()
