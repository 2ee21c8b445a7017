"""The loss, forward and backward: against lightly's over all pairs of views, and as a share of a ResNet-18 step.

Both get the same embeddings, each in the memory layout that suits it: ours as the network gives them, image by image, lightly
view by view. lightly's loss is one of two views, so that m views take m (m - 1) / 2 calls. The last rows hold, for one process
and for two that train together (gloo, a core each), the time of the loss with its two all-reduces against that of the whole
step: a ratio of 50 is 2 %.
"""

import itertools
import multiprocessing
import socket
import time
from collections.abc import Callable

import timing

M, D = 8, 256
BETA = 0.01
STEP_IMAGES, STEP_PX, STEPS = 32, 32, 5


def rows() -> list[timing.Row]:
    timing.use_cores(1)
    return [*_against_lightly(), *_share_of_step()]


def _against_lightly() -> list[timing.Row]:
    import torch

    from ssl_ray import losses

    peer = timing.named("lightly")
    try:
        from lightly.loss import BarlowTwinsLoss
    except ImportError as error:
        return [timing.skipped(f"loss, m = {M}, d = {D}", peer, str(error))]
    theirs = BarlowTwinsLoss(lambda_param=BETA)

    def backward(loss: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor) -> None:
        for _ in range(5):
            z.grad = None
            loss(z).backward()

    def all_pairs(z: torch.Tensor) -> torch.Tensor:
        pairs = list(itertools.combinations(range(M), 2))
        return sum(theirs(z[u], z[v]) for u, v in pairs) / len(pairs)

    made = []
    for batch in (128, 256):
        stored = torch.randn(batch, 1, D) + 0.5 * torch.randn(batch, M, D)
        z = stored.transpose(0, 1).requires_grad_()
        by_view = z.detach().contiguous().requires_grad_()
        for form in ("mean", "pairs"):

            def ours(z: torch.Tensor, form: str = form) -> torch.Tensor:
                return losses.barlow_twins(z, beta=BETA, form=form).total

            made += timing.alternate(
                f"loss {form}, m = {M}, B = {batch}, d = {D}",
                lambda ours=ours, z=z: backward(ours, z),
                {peer: lambda z=by_view: backward(all_pairs, z)},
                unit="loss",
                count=5,
                turns=15,
            )
    return made


def _share_of_step() -> list[timing.Row]:
    context = multiprocessing.get_context("spawn")
    made = []
    for workers in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        queue = context.Queue()
        processes = [context.Process(target=_step_worker, args=(rank, workers, port, queue)) for rank in range(workers)]
        for process in processes:
            process.start()
        taken = queue.get(timeout=600)
        for process in processes:
            process.join()
        what = f"loss in a ResNet-18 step, m = {M}, d = {D}, {STEP_IMAGES} images of {STEP_PX} px, {workers} worker(s)"
        made.append(timing.row(what, *taken, peer="whole step", unit="step", cores=workers))
    return made


def _step_worker(rank: int, workers: int, port: int, queue) -> None:
    """Seconds of the loss and of the whole step, by step, from rank 0. The workers begin the loss together: what one
    waits for the other is part of the step, not of the loss."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from ssl_ray import losses
    from ssl_ray.model import build_network

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    group = dist.group.WORLD
    network = build_network(
        "resnet18",
        channels=3,
        size_px=STEP_PX,
        projector_dim=D,
        projector_width=None,
        projector_depth=2,
        projector_norm="batch",
        seed=0,
        global_batch_norm=group,
    )
    module = DistributedDataParallel(network)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    views = torch.randint(0, 256, (STEP_IMAGES // workers, M, 3, STEP_PX, STEP_PX), dtype=torch.uint8)
    loss_s, step_s = [], []
    for _ in range(STEPS + 1):
        begun = time.perf_counter()
        z = module(views)
        dist.barrier()
        before = time.perf_counter()
        own = z.detach().requires_grad_()
        losses.barlow_twins(own, beta=BETA, group=group).total.backward()
        loss_s.append(time.perf_counter() - before)
        z.backward(own.grad)
        optimizer.step()
        optimizer.zero_grad()
        step_s.append(time.perf_counter() - begun)
    if rank == 0:
        queue.put((loss_s[1:], step_s[1:]))
    dist.destroy_process_group()
