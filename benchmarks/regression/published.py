"""Published figures that ours stand beside, with where they are from and what to know of them.

Two families, by the splits they were measured on; a table shows one of them.
"""

from typing import NamedTuple


class Source(NamedTuple):
    """Where figures are from, and what forbids to compare them too closely."""

    paper: str
    caveat: str


class Row(NamedTuple):
    """RMSE and NLL of one method on one data set, in the units of ours unless it is said."""

    method: str
    rmse: float | None
    nll: float
    source: str
    standardised: bool = False


SOURCES = {
    "PBP": Source(
        "Hernandez-Lobato and Adams (2015), arXiv:1502.05336",
        "the same splits; one hidden layer of 50 units (protein 100), 40 epochs",
    ),
    "dropout": Source(
        "Gal and Ghahramani (2016), arXiv:1506.02142",
        "the same splits; one hidden layer of 50 units (protein 100), 40 epochs",
    ),
    "ensembles": Source(
        "Lakshminarayanan et al. (2017), arXiv:1612.01474",
        "the same splits; one hidden layer of 50 units (protein 100), 40 epochs",
    ),
    "tuned": Source(
        "https://github.com/yaringal/DropoutUncertaintyExps",
        "the same splits; tuned MC-dropout, trained for longer",
    ),
    "subspace": Source(
        "Izmailov et al. (2019), arXiv:1907.07504, tables 2 and 5",
        "splits of their own, normalised before splitting; PCA+ESS, PCA+VI and SWAG from a sampler "
        "that multiplied by the variance in place of the standard deviation",
    ),
}

_STANDARD = {  # RMSE of PBP, MC-dropout, deep ensembles; their NLL; RMSE, NLL of MC-dropout, tuned
    "bostonHousing": (3.01, 2.97, 3.28, 2.57, 2.46, 2.41, 2.904, 2.402),
    "concrete": (5.67, 5.23, 6.03, 3.16, 3.04, 3.06, 4.826, 2.937),
    "kin8nm": (0.10, 0.10, 0.09, -0.90, -0.95, -1.20, 0.0789, -1.136),
    "power-plant": (4.12, 4.02, 4.11, 2.84, 2.80, 2.79, 4.014, 2.808),
    "protein-tertiary-structure": (4.73, 4.36, 4.71, 2.97, 2.89, 2.83, 4.274, 2.871),
    "wine-quality-red": (0.64, 0.62, 0.64, 0.97, 0.93, 0.94, 0.622, 0.928),
}

_AUTHORS = {  # NLL of SGD, PCA+ESS, PCA+VI, SWAG; RMSE of SGD and SWAG where it is in our units
    "bostonHousing": (2.752, 2.719, 2.716, 2.761, 3.504, 3.517),
    "concrete": (3.178, 3.007, 2.994, 3.013, 5.194, 5.233),
    "elevators": (0.538, 0.397, 0.380, 0.395, None, None),
    "keggdirected": (-0.985, -0.995, -0.988, -0.984, None, None),
    "protein-tertiary-structure": (0.861, 0.834, 0.849, 0.861, None, None),
    "skillcraft": (1.147, 1.159, 1.109, 1.181, None, None),
}


def standard(name: str) -> list[Row]:
    """Rows measured on the standard splits; none for a data set that has none."""
    if name not in _STANDARD:
        return []
    *untuned, rmse, nll = _STANDARD[name]
    methods, sources = ("PBP", "MC-dropout", "deep ensemble"), ("PBP", "dropout", "ensembles")
    rows = [Row(*each) for each in zip(methods, untuned[:3], untuned[3:], sources, strict=True)]
    return [*rows, Row("MC-dropout, tuned", rmse, nll, "tuned")]


def authors(name: str) -> list[Row]:
    """Rows of the authors of SWAG and of subspace inference, on splits of their own."""
    if name not in _AUTHORS:
        return []
    sgd, ess, vi, swag, rmse_sgd, rmse_swag = _AUTHORS[name]
    rmses = {"SGD": rmse_sgd, "SWAG": rmse_swag}
    nlls = {"SGD": sgd, "PCA+ESS": ess, "PCA+VI": vi, "SWAG": swag}
    standardised = rmse_sgd is None
    return [Row(m, rmses.get(m), nll, "subspace", standardised) for m, nll in nlls.items()]


def swag_beats_sgd(name: str) -> bool | None:
    """Whether the authors report a better NLL of SWAG than of SGD; None where they report none."""
    nll = {row.method: row.nll for row in authors(name)}
    return nll["SWAG"] < nll["SGD"] if nll else None
