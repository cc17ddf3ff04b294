"""Results: a table with error bars and the same numbers, and all that led to them, as JSON."""

import json
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from benchmarks.options import UsageError

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
    path.write_text(json.dumps(content, indent=1) + "\n")


def markdown(content: dict[str, Any]) -> str:
    """The table of a record that ``write_json`` wrote, for README."""
    of_methods = content["results"]
    metrics = list(next(iter(of_methods.values())))
    rows = [["", *metrics], ["---"] * (1 + len(metrics))]
    rows += [[name, *(_cell(of[metric]) for metric in metrics)] for name, of in of_methods.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(readme: str, name: str, content: dict[str, Any]) -> str:
    """README with the table between the marks ``<!-- name -->`` and ``<!-- end -->`` made anew."""
    start, end = f"<!-- {name} -->\n", "<!-- end -->"
    if start not in readme:
        return readme
    before, after = readme.split(start)
    return f"{before}{start}\n{markdown(content)}\n\n{end}{after.split(end, 1)[1]}"


def publish(results: Path, name: str, published: Path = PUBLISHED) -> list[Path]:
    """Copy the JSON and PNG files of ``results/name`` to where they are kept under git.

    Raises:
      UsageError: where there are none, or where one is larger than a megabyte.
    """
    files = sorted(p for p in (results / name).glob("*.*") if p.suffix in {".json", ".png"})
    if not files:
        raise UsageError(f"{name}: no JSON or PNG files in {results / name}")
    for file in files:
        if file.stat().st_size > MAX_BYTES:
            raise UsageError(f"{file}: larger than a megabyte, too much to be kept under git")
    (published / name).mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(file, published / name)) for file in files]
