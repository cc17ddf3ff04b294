"""What SWAG gains over SGD, on every regression set whose results by the recipe are published."""

import dataclasses
import json
from pathlib import Path
from typing import Any

SHOWN = ("SGD", "SGD fitted", "SWAG constant", "SWA", "SWAG", "MultiSWAG")  # columns of NLL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gains:
    """Regression: one table of SGD against SWAG from the published results of uci --protocol tuned.

    Prints the table, and writes it to README in place of the last one.
    """

    results: Path | None = None
    """Folder of results of uci, by default the published ones."""


def gains(chosen: Gains) -> None:
    """Print the table and write it to README."""
    from benchmarks import report

    made = table(chosen.results or report.PUBLISHED / "uci")
    print(made)
    report.README.write_text(report.with_text(report.README.read_text(), "gains", made))


def table(folder: Path) -> str:
    """The table of all results by the recipe in a folder, as Markdown."""
    from benchmarks import report
    from benchmarks.options import UsageError

    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*-tuned/results.json"))]
    records = [record for record in records if "SWAG" in record["paired_tests"]["NLL"]["SGD"]]
    if not records:
        raise UsageError(f"--results {folder}: no results of uci --protocol tuned of SGD and SWAG")
    return report.as_markdown([_header(), *map(_row, records)])


def _header() -> list[str]:
    return ["set", "rows", "splits", *SHOWN, "SWAG - SGD", "p", "SWAG better in"]


def _row(record: dict[str, Any]) -> list[str]:
    """NLL of every method, and the corrected paired test of SWAG against SGD."""
    data, test = record["data"], record["paired_tests"]["NLL"]["SGD"]["SWAG"]
    means = [
        f"{record['results'][name]['NLL']['mean']:.3f}" if name in record["results"] else ""
        for name in SHOWN
    ]
    error = test["standard_error"]
    difference = f"{-test['difference']:+.3f}" + ("" if error is None else f"±{error:.3f}")
    p = "" if test["p"] is None else f"{test['p']:.2g}"
    name, splits = record["options"]["dataset"], data["splits"]
    sgd, swag = (record["results"][method]["NLL"]["values"] for method in ("SGD", "SWAG"))
    better = sum(b < a for a, b in zip(sgd, swag, strict=True))
    counts = str(data["rows"]), str(splits)
    return [name, *counts, *means, difference, p, f"{better} of {splits}"]
