"""Trains a converted model in several processes, each on its part of the batches, and compares it with one that was
trained on whole batches: `python -m helpers.sharded WRAPPING SCOPE`. Prints the largest difference, or the error."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kw
from kw import KWConfig

SCOPES = {
    "within": {"1.0": "a", "1.2": "a", "2.0": "b", "2.2": "b"},  # a warehouse for each block
    "across": dict.fromkeys(("1.0", "1.2", "2.0", "2.2"), "a"),
}


def build(scope):
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)) for _ in range(2))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return kw.convert(model, SCOPES[scope], KWConfig(n=1, attention_norm="layer"))


def shard(model, parts):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if "warehouses" in parts:
        for warehouse in model.warehouses.values():
            fully_shard(warehouse, mesh=mesh, reshard_after_forward="resharded" in parts)
    if "blocks" in parts:
        for block in model[1:3]:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def main(wrapping, scope):
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 3, 14, 14, generator=generator) for _ in range(3)]
    whole = build(scope)
    train(whole, batches)
    model = build(scope)
    trained = DistributedDataParallel(model) if wrapping == "ddp" else shard(model, wrapping.split("+"))
    rank = dist.get_rank()
    try:
        train(trained, [x[2 * rank : 2 * rank + 2] for x in batches])
    except RuntimeError as error:
        print(error)
        return
    states = model.state_dict(), whole.state_dict()
    assert list(states[0]) == list(states[1])
    pairs = [
        (getattr(a, "full_tensor", lambda a=a: a)(), b) for a, b in zip(*(s.values() for s in states), strict=True)
    ]
    print(f"largest difference {max(float((a - b).abs().max()) for a, b in pairs):.9f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
