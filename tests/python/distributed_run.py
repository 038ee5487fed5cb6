"""One training step of a small model by two processes (test_distributed.py starts it).

argv: rank, world size, file to meet at, "ddp" or "fsdp2", file for rank 0's result.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn as nn
from kalmanet import GatedKalmaNet

SEED = 20261123


def build():
    torch.manual_seed(SEED)
    layers = [GatedKalmaNet(16, head_dim=4, num_heads=2, num_kv_heads=1) for _ in range(2)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(16, 3)})


def loss_of(model, x):
    for layer in model["layers"]:
        x = x + layer(x)[0]
    return model["head"](x).square().mean()


def data():
    return torch.randn(4, 13, 16, generator=torch.Generator().manual_seed(SEED))


class Whole(nn.Module):
    """DDP and FSDP2 want one forward."""

    def __init__(self):
        super().__init__()
        self.parts = build()

    def forward(self, x):
        return loss_of(self.parts, x)


def steps(module, x, optimizer):
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = module(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def main():
    rank, world, meeting, kind, result = sys.argv[1:]
    rank, world = int(rank), int(world)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    module = Whole()
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(module)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in module.parts["layers"]:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(module, mesh=mesh)
    losses = steps(
        wrapped, data().chunk(world)[rank], torch.optim.SGD(wrapped.parameters(), lr=0.5)
    )
    dist.all_reduce(losses)
    weights = {}
    for name, p in module.named_parameters():
        full = p.full_tensor() if hasattr(p, "full_tensor") else p
        weights[name] = full.detach().clone()
    if rank == 0:
        torch.save({"losses": losses / world, "weights": weights}, result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
