"""SWAG posteriors over neural-network weights, as an optax gradient transformation."""

from swagjax import (
    batch_stats,
    calibration,
    constant_sgd,
    diagnostics,
    ensemble,
    metrics,
    schedules,
    sharding,
    subspace,
    surface,
)
from swagjax.averaging import predict, predict_batches, predict_log, predict_samples
from swagjax.merging import merge
from swagjax.posterior import (
    entropy,
    from_noise,
    iterates,
    kl,
    log_prob,
    log_prob_difference,
    mean,
    sample,
    variance,
)
from swagjax.transform import SWAGState, get_state, member_axes, state_bytes, swa, swag, swag_diag

__all__ = [
    "SWAGState",
    "batch_stats",
    "calibration",
    "constant_sgd",
    "diagnostics",
    "ensemble",
    "entropy",
    "from_noise",
    "get_state",
    "iterates",
    "kl",
    "log_prob",
    "log_prob_difference",
    "mean",
    "member_axes",
    "merge",
    "metrics",
    "predict",
    "predict_batches",
    "predict_log",
    "predict_samples",
    "sample",
    "schedules",
    "sharding",
    "state_bytes",
    "subspace",
    "surface",
    "swa",
    "swag",
    "swag_diag",
    "variance",
]
