"""The peer of bench_step.py: `torchrun --nproc-per-node N bare_ddp.py [KEY=VALUE ...]`, a plain DDP script.

It has the network, global batch norm, loss and optimiser of the configuration, and views that lie in memory before the clock
starts; no Ray, no stream, no metrics, no checkpoints. Rank 0 prints the seconds of each step as JSON.
"""

import json
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ssl_ray import plan, stream
from ssl_ray.config import build
from ssl_ray.train import loop
from ssl_ray.train.optim import build_optimizer
from ssl_ray.train.pretrain import located, open_data

BATCHES = 8


def main() -> None:
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    config = located(build({}, sys.argv[1:]))
    torch.set_num_threads(config.train.threads)
    data, _ = open_data(config)
    lanes = plan.lanes_of(rank, dist.get_world_size(), data.plan.lanes)
    made = stream.local_batches(data, lanes=lanes, first_step=0, stop_step=BATCHES)
    batches = [torch.from_numpy(batch.views) for batch in made]
    network = loop.make_network(config, group=group)
    module = DistributedDataParallel(network)
    optimizer = build_optimizer(
        config.optim.name, network.parameters(), lr=config.optim.lr, weight_decay=config.optim.weight_decay
    )
    assert config.train.steps is not None
    seconds = []
    for step in range(config.train.steps):
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.bf16):
            z = module(batches[step % BATCHES])
        loss = loop.compute_loss(z, config.loss, group=group).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - begun)
    if rank == 0:
        print(json.dumps(seconds))
    del module
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
