"""Any number of workers trains as one does: 50 steps in float64, where no ReLU flips on a rounding."""

import gloo
import pytest
import torch
import torch.distributed as dist

from ssl_ray import plan, stream
from ssl_ray.config import Config, build
from ssl_ray.model import PIXEL_MEAN, PIXEL_STD
from ssl_ray.train import loop
from ssl_ray.train.optim import build_optimizer
from ssl_ray.train.pretrain import located, open_data

STEPS = 50
KEYS = ["views.count=2", "views.size_px=8", "views.channels=1", "model.projector_dim=16", "train.batch=48"]


def losses_of_worker(group: dist.ProcessGroup | None, config: Config) -> list[float]:
    rank, workers = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    data, _ = open_data(config)
    network = loop.make_network(config, group=group).double()
    module = network if group is None else torch.nn.parallel.DistributedDataParallel(network, process_group=group)
    optimizer = build_optimizer("adam", network.parameters(), lr=1e-3, weight_decay=1e-6)
    lanes = plan.lanes_of(rank, workers, data.plan.lanes)
    losses = []
    for batch in stream.local_batches(data, lanes=lanes, first_step=0, stop_step=STEPS):
        views = (torch.from_numpy(batch.views).double() / 255 - PIXEL_MEAN) / PIXEL_STD
        terms = loop.compute_loss(module(views), config.loss, group=group)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        losses.append(terms.total.item())
    return losses


@pytest.mark.parametrize(
    ("loss", "numbers"),
    [("loss.form=mean", (2, 3)), ("loss.form=pairs", (3,)), ("loss.name=vicreg", (3,)), ("loss.name=spectral", (3,))],
)
def test_losses_of_fifty_steps_do_not_depend_on_the_number_of_workers(loss: str, numbers: tuple[int, ...]):
    config = located(build({"data": {"uri": "digits"}}, [*KEYS, loss]))
    alone = losses_of_worker(None, config)
    for workers in numbers:  # of 48 lanes; three workers have 16 each
        together = gloo.run(losses_of_worker, [(config,)] * workers)
        assert all(losses == together[0] for losses in together)
        assert together[0] == pytest.approx(alone, rel=1e-9)
