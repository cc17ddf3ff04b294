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
    from benchmarks.options import UsageError

    if "<!-- gains -->\n" not in report.README.read_text():
        raise UsageError(f"{report.README.name}: no mark <!-- gains --> to write the table behind")
    made = table(chosen.results or report.PUBLISHED / "uci")
    print(made)
    report.README.write_text(report.with_text(report.README.read_text(), "gains", made))


def table(folder: Path) -> str:
    """The table of all results by the recipe in a folder, as Markdown."""
    from benchmarks import report
    from benchmarks.options import UsageError

    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*-tuned/results.json"))]
    records = [of for of in records if "SWAG" in of["paired_tests"]["NLL"].get("SGD", {})]
    if not records:
        raise UsageError(f"--results {folder}: no results of uci --protocol tuned of SGD and SWAG")
    return report.as_markdown([_header(), *map(_row, records)])


def _header() -> list[str]:
    return ["set", "rows", "splits", *SHOWN, "SWAG - SGD", "p", "better in", "SWAG - fitted", "p"]


def _row(record: dict[str, Any]) -> list[str]:
    """NLL of every method, and the corrected paired tests of SWAG against SGD and SGD fitted."""
    data, results = record["data"], record["results"]
    means = [f"{results[m]['NLL']['mean']:.3f}" if m in results else "" for m in SHOWN]
    splits = data["splits"]
    sgd, swag = (results[method]["NLL"]["values"] for method in ("SGD", "SWAG"))
    better = f"{sum(b < a for a, b in zip(sgd, swag, strict=True))} of {splits}"
    name = record["options"]["dataset"], str(data["rows"]), str(splits)
    return [*name, *means, *_test(record, "SGD"), better, *_test(record, "SGD fitted")]


def _test(record: dict[str, Any], other: str) -> tuple[str, str]:
    """Difference of NLL, below 0 where SWAG is better, and p; empty without the other method."""
    test = record["paired_tests"]["NLL"].get(other, {}).get("SWAG")
    if test is None:
        return "", ""
    error = test["standard_error"]
    difference = f"{-test['difference']:+.3f}" + ("" if error is None else f"±{error:.3f}")
    return difference, "" if test["p"] is None else f"{test['p']:.2g}"
