"""SWAG in float64 NumPy, straight from the list of iterates: an oracle that shares no code.

``iterates`` is an array (n, P), one flattened iterate a row.
"""

import jax
import numpy as np


def flatten(tree):
    """All leaves of a tree as one float64 vector, in the order of the iterates' columns."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def deviations(iterates, rank, centering="running"):
    """The last ``rank`` iterates less the mean at their own time, or less the final one."""
    n = len(iterates)
    held = range(max(0, n - rank), n)
    stop = {"running": lambda i: i + 1, "final": lambda i: n}[centering]
    return np.array([iterates[i] - iterates[: stop(i)].mean(0) for i in held])


def ring(iterates, rank):
    """The deviations as a ring buffer holds them: the i-th in row (i - 1) % rank, (rank, P)."""
    rows, n = np.zeros((rank, iterates.shape[1])), len(iterates)
    for i, deviation in zip(range(max(0, n - rank), n), deviations(iterates, rank), strict=True):
        rows[i % rank] = deviation
    return rows


def covariance(kind, iterates, rank=None, *, scale=1.0, centering="running", min_variance=0.0):
    """The dense covariance of ``"swag"``, ``"swag_diag"`` or ``"swa"``."""
    variances = np.zeros(iterates.shape[1]) if kind == "swa" else iterates.var(0)
    diagonal = np.diag(np.maximum(variances, min_variance))
    if kind != "swag":
        return scale * diagonal
    D = deviations(iterates, rank, centering)
    scatter = D.T @ D / (len(D) - 1) if len(D) > 1 else 0.0
    return scale / 2 * (diagonal + scatter)


def kl(mean, covariance, other_mean, other_covariance):
    """KL(N(mean, covariance) || N(other_mean, other_covariance)) in nats, by dense algebra."""
    if not len(mean):
        return 0.0
    shift = np.asarray(other_mean) - mean
    trace = np.trace(np.linalg.solve(other_covariance, covariance))
    distance = shift @ np.linalg.solve(other_covariance, shift)
    logs = [np.linalg.slogdet(c)[1] for c in (other_covariance, covariance)]
    return (trace + distance - len(shift) + logs[0] - logs[1]) / 2
