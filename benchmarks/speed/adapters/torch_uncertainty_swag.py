"""SWAG of torch-uncertainty (its ``methods.swag.SWAG``)."""

import platform
from importlib import metadata

import torch
import torch_networks
from serve import serve, threads
from torch_uncertainty.methods.swag import SWAG


def build(workload, rank):
    """See ``serve``. No estimators: ``update_wrapper`` would draw them at every collection."""
    model = torch_networks.NETWORKS[workload]()
    swag, data = SWAG(model, 0, 1, max_num_models=rank, num_estimators=0), {}
    epoch = 0

    def collect():
        nonlocal epoch
        epoch += 1
        swag.update_wrapper(epoch)

    for step in range(rank + 1):
        torch_networks.wander(model, step)
        collect()

    def sample(samples):
        for _ in range(samples):
            swag.sample(0.5)

    def predict(samples, images, refresh, batch):
        if (images, refresh, batch) not in data:
            pair = torch_networks.batches(images, batch), torch_networks.batches(refresh, batch)
            data[images, refresh, batch] = pair
        test, train = data[images, refresh, batch]

        def draw():
            drawn = swag.sample(0.5)
            if train:
                torch.optim.swa_utils.update_bn(train, drawn)
            return drawn.eval()

        torch_networks.average(samples, test, batch, draw)

    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "collect": collect, "sample": sample, "predict": predict}


if __name__ == "__main__":
    torch.set_num_threads(threads())
    packages = ("torch", "torch-uncertainty")
    versions = {name: metadata.version(name) for name in packages}
    serve(build, {"python": platform.python_version(), **versions})
