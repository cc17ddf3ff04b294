"""Results: a table with error bars and the same numbers, and all that led to them, as JSON."""

import json
import math
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from benchmarks.errors import UsageError

PUBLISHED = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
MAX_BYTES = 1_000_000  # of a published file

Results = dict[str, dict[str, list[float]]]  # method -> metric -> one value a seed


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, standard error of the mean (None for a single seed) and the values themselves."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
    error = None if error is None else float(error)
    return {"mean": float(np.mean(values)), "standard_error": error, "values": list(values)}


def table(results: Results) -> Table:
    """One row a method, one column a metric: mean ± standard error over the seeds.

    Five metrics fit into 80 columns.
    """
    metrics = list(next(iter(results.values())))
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    drawn.add_column("", no_wrap=True)
    for metric in metrics:
        drawn.add_column(metric, justify="right", no_wrap=True)
    for method, of_method in results.items():
        drawn.add_row(method, *(_cell(summary(of_method[metric])) for metric in metrics))
    return drawn


def _cell(value: dict[str, Any]) -> str:
    error = value["standard_error"]
    return _short(value["mean"]) + ("" if error is None else f"±{_short(error)}")


def _short(number: float) -> str:
    """Four decimals, without the zero before them, as in the papers."""
    return f"{number:.4f}".removeprefix("0")


def beside(content: dict[str, Any]) -> Table:
    """The table of a record, published rows below ours; decimals to the size of the errors."""
    header, *lines = _lines(content)
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(header):
        drawn.add_column(name, justify="right" if i else "left", no_wrap=True)
    ours = len(content["results"])
    for i, line in enumerate(lines):
        drawn.add_row(*line, end_section=i == ours - 1)
    return drawn


def corrected_t_test(
    first: list[float], second: list[float], test_to_train: float
) -> dict[str, float | None]:
    """Paired test over random splits of one data set, which overlap and so are not independent.

    With d the J differences: t = mean(d) / sqrt((1 / J + n_test / n_train) var(d)), two-sided with
    J - 1 degrees of freedom.

    Args:
      first: scores of one method, one a split.
      second: scores of another on the same splits.
      test_to_train: n_test / n_train.

    Returns:
      The mean of ``first - second``, its corrected standard error, and p; the last two None for a
      single split or scores that are not finite.

    Example:
      >>> test = corrected_t_test([3.0, 5.0, 4.0], [2.0, 3.0, 1.0], 1 / 9)
      >>> {name: round(value, 4) for name, value in test.items()}
      {'difference': 2.0, 'standard_error': 0.6667, 'p': 0.0955}

    Source: Nadeau and Bengio (2003), "Inference for the Generalization Error", section 3.
    """
    from scipy import stats

    d = np.subtract(first, second)
    if len(d) < 2 or not np.isfinite(d).all():
        return {"difference": float(d.mean()), "standard_error": None, "p": None}
    mean, error = d.mean(), np.sqrt((1 / len(d) + test_to_train) * d.var(ddof=1))
    p = 2 * stats.t.sf(abs(mean) / error, len(d) - 1) if error else float(mean == 0)
    return {"difference": float(mean), "standard_error": float(error), "p": float(p)}


def paired_tests(results: Results, metric: str, test_to_train: float) -> dict[str, dict[str, Any]]:
    """``corrected_t_test`` of every two methods: ``[first][second]``, each pair once."""
    names = list(results)
    return {
        first: {
            second: corrected_t_test(results[first][metric], results[second][metric], test_to_train)
            for second in names[i + 1 :]
        }
        for i, first in enumerate(names[:-1])
    }


def record(results: Results, **context: Any) -> dict[str, Any]:
    """All that is written as JSON: the context, the versions, and the summary of every number."""
    of_methods = {
        method: {metric: summary(values) for metric, values in of_method.items()}
        for method, of_method in results.items()
    }
    return {**context, "versions": versions(), "results": of_methods}


def versions() -> dict[str, str]:
    """Python's version and those of the packages that make the numbers."""
    packages = ("swagjax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that people can read and compare."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")  # whole or not at all, whenever it is killed
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.rename(path)


def markdown(content: dict[str, Any]) -> str:
    """The table of a record that ``write_json`` wrote, for README."""
    return as_markdown(_lines(content))


def as_markdown(lines: list[list[str]]) -> str:
    """A table of these cells, of which the first line is the header."""
    header, *rest = lines
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rest])


def _lines(content: dict[str, Any]) -> list[list[str]]:
    """Cells of a record's table: the header, our methods, and what was published, if it is there.

    A record with published rows names in ``shown`` the metrics that its table has room for.
    """
    of_methods = content["results"]
    metrics = content.get("shown", list(next(iter(of_methods.values()))))
    cell = _rounded if "shown" in content else _cell
    ours = [[name, *(cell(of[metric]) for metric in metrics)] for name, of in of_methods.items()]
    published = [
        [row["label"], *("" if row.get(m) is None else f"{row[m]:g}" for m in metrics)]
        for row in content.get("published", [])
    ]
    return [["", *metrics], *ours, *published]


def _rounded(value: dict[str, Any]) -> str:
    """Mean ± standard error, to one digit of the error, or two where it begins with 1 or 2."""
    mean, error = value["mean"], value["standard_error"]
    if not error or not np.isfinite(error):
        return f"{mean:.3g}"
    exponent = math.floor(math.log10(error))
    decimals = max(0, -exponent + (error < 3 * 10**exponent))
    shown = (f"{number:.{decimals}f}" for number in (mean, error))
    return "±".join(
        number.replace("0.", ".", 1) if abs(float(number)) < 1 else number for number in shown
    )


def with_table(readme: str, name: str, content: dict[str, Any]) -> str:
    """README with the table of a record made anew, if it has one."""
    return with_text(readme, name, markdown(content)) if f"<!-- {name} -->\n" in readme else readme


def with_text(readme: str, name: str, text: str) -> str:
    """README with what is between the marks ``<!-- name -->`` and ``<!-- end -->`` replaced."""
    start, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, after = readme.split(start)
    return f"{before}{start}\n{text}\n\n{end}{after.split(end, 1)[1]}"


def publish(results: Path, name: str, published: Path = PUBLISHED) -> list[Path]:
    """Copy the JSON and PNG files of ``results/name`` to where they are kept under git.

    Raises:
      UsageError: where there is no results.json, or where one is larger than a megabyte.
    """
    files = sorted(p for p in (results / name).glob("*.*") if p.suffix in {".json", ".png"})
    if results / name / "results.json" not in files:
        raise UsageError(f"{name}: no results.json in {results / name}; run the experiment first")
    for file in files:
        if file.stat().st_size > MAX_BYTES:
            raise UsageError(f"{file}: larger than a megabyte, too much to be kept under git")
    (published / name).mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(file, published / name)) for file in files]
