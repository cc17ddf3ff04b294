"""SWAG posteriors over neural-network weights, as an optax gradient transformation."""

from swagjax import batch_stats, metrics, schedules
from swagjax.averaging import predict, predict_batches, predict_log, predict_samples
from swagjax.posterior import entropy, from_noise, log_prob, mean, sample, variance
from swagjax.transform import SWAGState, get_state, member_axes, swa, swag, swag_diag

__all__ = [
    "SWAGState",
    "batch_stats",
    "entropy",
    "from_noise",
    "get_state",
    "log_prob",
    "mean",
    "member_axes",
    "metrics",
    "predict",
    "predict_batches",
    "predict_log",
    "predict_samples",
    "sample",
    "schedules",
    "swa",
    "swag",
    "swag_diag",
    "variance",
]
