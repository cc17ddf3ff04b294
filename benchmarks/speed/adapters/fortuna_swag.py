"""SWAG of aws-fortuna: its trainer's step end, its posterior's sample, its predictive's mean.

Fortuna collects at the end of every training step; here that step end is called by itself, so that
no training is timed.
"""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from serve import serve

sys.path.insert(0, str(Path(__file__).parents[3]))

import jax
import numpy as np
import optax
from fortuna.data.loader import InputsLoader
from fortuna.prob_model import ProbClassifier, SWAGPosteriorApproximator
from fortuna.prob_model.posterior.posterior_state_repository import PosteriorStateRepository
from fortuna.prob_model.posterior.swag.swag_state import SWAGState
from fortuna.prob_model.posterior.swag.swag_trainer import SWAGTrainer

from benchmarks.models import LeNet5
from benchmarks.speed import models

NETWORKS = {
    "lenet5": lambda: LeNet5(10),
    "preresnet20": lambda: models.PreActResNet(3, (16, 32, 64)),
    "resnet18": lambda: models.ResNet18(),
    "wrn28x10": lambda: models.PreActResNet(4, (160, 320, 640)),
}


def build(workload, rank):
    """See ``serve``."""
    network = NETWORKS[workload]()
    classifier = ProbClassifier(
        model=network, posterior_approximator=SWAGPosteriorApproximator(rank=rank)
    )
    x = np.zeros((1, 32, 32, 3), np.float32)
    first = classifier.joint.init((32, 32, 3))
    state = SWAGState.init(
        params=first.params,
        mutable=first.mutable,
        optimizer=optax.sgd(1e-3),
        calib_params=first.calib_params,
        calib_mutable=first.calib_mutable,
    )
    output = classifier.joint.likelihood.prob_output_layer
    trainer = SWAGTrainer(
        predict_fn=output.predict, disable_training_metrics_computation=True, which_params=None
    )
    aux, data, epoch = {"loss": 0.0, "logging_kwargs": None}, {}, 0

    def collect():
        nonlocal epoch
        trainer.training_step_end(epoch, state, aux, None, None, None, {"rank": rank})
        epoch += 1
        jax.block_until_ready(
            (trainer._mean_rav_params, trainer._mean_squared_rav_params),
        )
        jax.block_until_ready(trainer._deviation_rav_params)

    for _ in range(rank + 1):
        state = state.replace(params=jax.tree_util.tree_map(lambda p: 1.001 * p, state.params))
        collect()
    posterior = classifier.posterior
    posterior.state = PosteriorStateRepository(None)
    posterior.state.put(trainer._update_state_with_stats(state))

    def sample(samples):
        for i in range(samples):
            drawn = posterior.sample(rng=jax.random.PRNGKey(i), inputs=x)
            jax.block_until_ready(drawn.params)

    def predict(samples, images, refresh, batch):
        del refresh  # Fortuna has no pass over training inputs: it uses the batch at hand
        if (images, batch) not in data:
            array = np.random.default_rng(0).normal(size=(images, 32, 32, 3)).astype(np.float32)
            data[images, batch] = InputsLoader.from_array_inputs(array, batch_size=batch)
        mean = classifier.predictive.mean(
            data[images, batch], n_posterior_samples=samples, rng=jax.random.PRNGKey(0)
        )
        jax.block_until_ready(mean)

    parameters = sum(p.size for p in jax.tree_util.tree_leaves(state.params))
    return {"parameters": parameters, "collect": collect, "sample": sample, "predict": predict}


if __name__ == "__main__":
    packages = ("jax", "flax", "aws-fortuna")
    versions = {name: metadata.version(name) for name in packages}
    serve(build, {"python": platform.python_version(), **versions})
