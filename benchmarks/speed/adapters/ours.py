"""SWAG of swagjax, in a process of its own: its memory is that of nothing else.

Also ``scaling``, which asks for a number of devices that is fixed when a process starts.
"""

import sys
from pathlib import Path

from serve import serve

sys.path.insert(0, str(Path(__file__).parents[3]))

import jax

import swagjax
from benchmarks import report
from benchmarks.speed import scaling, workloads
from swagjax import batch_stats


def build(workload, rank):
    """See ``serve``."""
    chosen = workloads.build(workload)
    carry = workloads.state(chosen, rank)
    step, key = workloads.collector(swagjax.swag(rank)), jax.random.key(3)
    updates = jax.tree.map(lambda p: 1e-5 * p, carry[0])
    prob_fn, data = workloads.probabilities(chosen), {}

    def collect():
        nonlocal carry
        carry = jax.block_until_ready(step(carry, updates))

    def sample(samples):
        for k in jax.random.split(key, samples):
            jax.block_until_ready(swagjax.sample(k, carry[1]))

    def predict(samples, images, refresh, batch):
        if (images, refresh, batch) not in data:
            how = {}
            if refresh:
                how["refresh"] = batch_stats.linen(
                    *(chosen.model, workloads.batch_stats(chosen), workloads.images(refresh)),
                    batch_size=batch,
                    train=True,
                )
            data[images, refresh, batch] = workloads.images(images), how
        x, how = data[images, refresh, batch]
        jax.block_until_ready(
            swagjax.predict(key, carry[1], prob_fn, x, num_samples=samples, **how)
        )

    return {
        "parameters": workloads.parameters(chosen),
        "collect": collect,
        "sample": sample,
        "predict": predict,
    }


if __name__ == "__main__":
    jax.devices()  # so that the idle process has them
    serve(build, report.versions(), scaling=scaling.answer)
