"""The loop of one worker: batches in, steps out. It knows a process group, but neither Ray nor where batches come from.

Whatever ends a run (a stop, an error of one worker, too many bad samples) is agreed on at the top of a step by one
small all-reduce, so that all workers take the same steps and the checkpoint is that of the last whole step.
"""

import dataclasses
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from ssl_ray import losses, storage
from ssl_ray.config import Config, Data, Loss, Views
from ssl_ray.errors import DataError, ResourceError, SslRayError, Stopped, TrainingError
from ssl_ray.model import Network, build_network, default_generator_lock
from ssl_ray.philox import DROPOUT, philox
from ssl_ray.stream import BadSample, Batch
from ssl_ray.train import checkpoint, runs
from ssl_ray.train.optim import build_optimizer, learning_rate
from ssl_ray.train.watchdog import Watchdog
from ssl_ray.train.writer import Writer
from ssl_ray.views.device import photometrics

HEALTH_EVERY = 10
"""Steps between two looks at the spread of the embeddings."""
COLLAPSED_RANK = 1.05
"""Effective rank (participation ratio) below which embeddings are called collapsed: one direction is left."""
COLLAPSED_LOOKS = 10
"""So many collapsed looks in a row end the run."""


log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of a run: known before it starts, the same for all workers."""

    total_steps: int
    steps_per_epoch: int
    evaluate_every: int | None
    """Steps between two read-outs, or None."""


@dataclasses.dataclass
class Counters:
    """What continues over restarts, in every checkpoint's state.json."""

    bad_samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    collapsed_looks: int = 0


def read_counters(state: dict[str, Any], *, step: int, at: str) -> Counters:
    """The counters in the state.json at `at`, which must be of `step`. Raises DataError."""
    kinds = {"step": int, "bad_samples": list, "collapsed_looks": int}
    if {name: type(value) for name, value in state.items()} != kinds or state["step"] != step:
        raise DataError(f"{at}: damaged, expected {', '.join(kinds)} of step {step}. {checkpoint.RESTORE}")
    keys = {field.name for field in dataclasses.fields(BadSample)} | {"step"}
    if not all(isinstance(bad, dict) and bad.keys() == keys for bad in state["bad_samples"]):
        raise DataError(f"{at}: damaged: bad_samples are no samples. {checkpoint.RESTORE}")
    return Counters(state["bad_samples"], state["collapsed_looks"])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the loop ended: all steps done, or the error that ended it (the same on every worker)."""

    step: int
    error: SslRayError | None = None
    left: bool = False
    """The workers made way after a checkpoint: they are to be started again, on other machines or more of them."""


def compute_loss(z: Tensor, spec: Loss, *, group: dist.ProcessGroup | None) -> losses.LossTerms:
    """The loss that `spec` names, of embeddings z [m, B, d]."""
    match spec.name:
        case "barlow_twins":
            beta = losses.beta_auto(z.shape[-1]) if spec.beta == "auto" else float(spec.beta)
            return losses.barlow_twins(z, beta=beta, form=spec.form, group=group)
        case "vicreg":
            weights = {"invariance": spec.invariance, "variance": spec.variance, "covariance": spec.covariance}
            return losses.vicreg(z, **weights, group=group)
        case "spectral":
            return losses.spectral(z, group=group)


def make_network(config: Config, *, group: dist.ProcessGroup | None) -> Network:
    """The network of a run with its initial weights: those of `train.init_from`, else random ones from the seed."""
    model = config.model
    network = build_network(
        model.encoder,
        channels=config.views.channels,
        size_px=config.views.size_px,
        projector_dim=model.projector_dim,
        projector_width=model.projector_width,
        projector_depth=model.projector_depth,
        projector_norm=model.projector_norm,
        seed=config.seed,
        global_batch_norm=group if model.batch_norm == "global" else None,
    )
    if config.train.init_from is not None:
        checkpoint.init_from(config.train.init_from, network)
    return network


def distribute(network: Network, *, views_shape: tuple[int, ...], device: torch.device) -> nn.Module:
    """DDP around the network, after two throw-away passes.

    DDP regroups its gradient buckets after the first backward pass, which with three or more workers changes the order
    of sums: with the passes made at every start, no counted step sees the first order.  Buffers are restored.
    """
    ddp = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    noise = torch.randint(0, 256, (2, *views_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        ddp(noise.to(device)).float().square().mean().backward()
        network.zero_grad(set_to_none=True)
    for name, value in network.named_buffers():
        value.copy_(buffers[name])
    return ddp


def views_on(device: torch.device, batch: Batch, *, spec: Views, seed: int, epoch: int) -> Tensor:
    """uint8 [B, m, C, H, W] on `device`: the views of a batch, whose crops are finished there if `spec` says so."""
    views = torch.from_numpy(batch.views).to(device)
    if spec.photometric_on == "worker":
        views = photometrics(views, batch.hashes, spec=spec, seed=seed, epoch=epoch)
    return views


def views_digest(views: np.ndarray) -> int:
    """The sum modulo 2**64 of a 64-bit hash (blake2b, little endian) of every sample's views; views [B, m, C, H, W].

    They are those that reach the worker: crops, if it does the rest itself (views.photometric_on=worker).
    """
    hashes = (hashlib.blake2b(sample.tobytes(), digest_size=8).digest() for sample in views)
    return sum(int.from_bytes(digest, "little") for digest in hashes) % 2**64


@dataclasses.dataclass(frozen=True)
class Agreed:
    """What the workers tell each other at the top of a step."""

    stop: bool
    leave: bool
    checkpoint: bool
    error: bool
    bad: int
    digest: int
    wait_s: float


def agree(mine: Agreed, *, group: dist.ProcessGroup | None, device: torch.device) -> Agreed:
    """Counts and sums over the workers, the wait as their mean; one all-reduce of seven integers."""
    if group is None:
        return mine
    digest = mine.digest - 2**64 if mine.digest >= 2**63 else mine.digest  # int64 sums wrap, as wanted
    values = [mine.stop, mine.leave, mine.checkpoint, mine.error, mine.bad, digest, int(mine.wait_s * 1e6)]
    flags = torch.tensor([int(value) for value in values], dtype=torch.int64, device=device)
    dist.all_reduce(flags, group=group)
    stop, leave, due, error, bad, digest, wait_us = flags.tolist()
    wait_s = wait_us / 1e6 / dist.get_world_size(group)
    return Agreed(bool(stop), bool(leave), bool(due), bool(error), bad, digest % 2**64, wait_s)


def gather_objects(value: object, *, group: dist.ProcessGroup | None) -> list[Any]:
    """Every worker's `value`, by rank. Between our own workers only."""
    if group is None:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _step_seed(seed: int, step: int, *, rank: int) -> int:
    """For encoders that drop features at random: a resumed step draws as the undisturbed one (of as many workers) did."""
    low, high, _, _ = philox(step, rank, DROPOUT, 0, key=(seed, 0))
    return (int(low) | int(high) << 32) >> 1


def next_batch(batches: Iterator[Batch]) -> tuple[Batch | None, SslRayError | None]:
    """The next batch, or the user error that the stream ended with."""
    try:
        return next(batches), None
    except SslRayError as error:
        return None, error


def add_bad_samples(counters: Counters, found: list[BadSample], *, step: int, spec: Data) -> SslRayError | None:
    """Counts each bad sample once, with the step that met it; the error that ends the run if there are more than allowed."""
    known = {(bad["shard"], bad["key"]) for bad in counters.bad_samples}
    fresh = {(bad.shard, bad.key): dataclasses.asdict(bad) | {"step": step} for bad in found if (bad.shard, bad.key) not in known}
    counters.bad_samples += [fresh[name] for name in sorted(fresh)]
    if len(counters.bad_samples) <= spec.max_bad_samples:
        return None
    first = counters.bad_samples[-len(fresh) if fresh else 0]
    return DataError(
        f"{len(counters.bad_samples)} bad samples, data.max_bad_samples={spec.max_bad_samples} allowed; "
        f"the last: {first['shard']} {first['key']}: {first['reason']}.\n"
        f"Raise data.max_bad_samples and run the same command to go on without them; "
        f"`ssl-ray data check {spec.uri}` finds them all, and runs that begin later leave them out."
    )


def train(
    config: Config,
    schedule: Schedule,
    batches: Iterator[Batch],
    *,
    network: Network,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    counters: Counters,
    first_step: int,
    group: dist.ProcessGroup | None,
    rank: int,
    device: torch.device,
    writer: Writer | None,
    watchdog: Watchdog,
    leaving: Callable[[], bool],
    wait_for_turn: Callable[[int], float],
) -> Outcome:
    """Takes the steps from `first_step` to the end of the schedule. `module` is `network`, in DDP if there is a group.

    batches: this worker's, in order from `first_step`.  writer: worker 0's; None elsewhere.
    leaving: whether this worker is asked to make way, as before its machine is taken away.
    wait_for_turn: is called before each step; the seconds that it took are not the step's.
    """
    warmup_steps = round(config.optim.warmup_epochs * schedule.steps_per_epoch)
    saved, saved_at = first_step, time.monotonic()

    def save(step: int, *, evaluate: bool = False) -> None:
        nonlocal saved, saved_at
        watchdog.at("checkpoint", step)
        shot = checkpoint.snapshot(network, optimizer, step=step, state=dataclasses.asdict(counters))
        bad_weight = checkpoint.first_bad_weight(shot)
        if bad_weight is not None:
            raise TrainingError(_not_finite(f"the weight {bad_weight}", step - 1, saved))
        if writer is not None:
            writer.checkpoint(shot, evaluate=evaluate)
        saved, saved_at = step, time.monotonic()

    def part(name: str) -> record_function:
        """A part of a step, for the profile and the watchdog."""
        watchdog.at(name, step)
        return record_function(name)

    step = first_step
    module.train()
    ended = time.monotonic()
    try:
        while step < schedule.total_steps:
            ended += wait_for_turn(step)
            asked = time.monotonic()
            with part("wait"):
                batch, error = next_batch(batches)
            wait_s = time.monotonic() - asked
            assert batch is None or batch.step == step, f"the stream is at step {batch.step}, the worker at {step}"
            error = error or (_as_user_error(writer.error) if writer is not None and writer.error else None)
            due = writer is not None and time.monotonic() - saved_at >= config.checkpoint.every_s
            stop = writer is not None and writer.stop_requested
            bad = batch.bad if batch is not None else []
            digest = views_digest(batch.views) if config.train.digest and batch is not None else 0
            mine = Agreed(stop, leaving(), due, error is not None, len(bad), digest, wait_s)
            with part("agree"):
                agreed = agree(mine, group=group, device=device)
            if agreed.bad:
                everywhere = [sample for found in gather_objects(bad, group=group) for sample in found]
                error = add_bad_samples(counters, everywhere, step=step, spec=config.data) or error
                log.info("%d bad samples, %d allowed", len(counters.bad_samples), config.data.max_bad_samples)
            if agreed.error:
                error = next(filter(None, gather_objects(error, group=group)))
            if error is None and agreed.stop:
                where = f"after step {step} with a checkpoint" if step else "before the first step"
                error = Stopped(f"stopped {where}; the same command continues.")
            if error is not None:
                if step > saved and (writer is None or writer.error is None):
                    save(step)
                return Outcome(step, error)
            if agreed.leave:
                if step > saved:
                    save(step)
                return Outcome(step, left=True)
            assert batch is not None
            if agreed.checkpoint and step > saved:
                save(step)

            lr = learning_rate(step, peak=config.optim.lr, warmup_steps=warmup_steps, total_steps=schedule.total_steps)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            epoch = step // schedule.steps_per_epoch
            with part("transfer"):
                views = views_on(device, batch, spec=config.views, seed=config.seed, epoch=epoch)
            with (
                part("forward"),
                default_generator_lock,
                torch.autocast(device.type, torch.bfloat16, enabled=config.train.bf16),
            ):
                torch.manual_seed(_step_seed(config.seed, step, rank=rank))
                z = module(views)
            with part("loss"):
                terms = compute_loss(z, config.loss, group=group)
            with part("backward"):
                optimizer.zero_grad(set_to_none=True)
                terms.total.backward()
                loss = terms.total.item()
            if not math.isfinite(loss):
                raise TrainingError(_not_finite(f"the loss ({loss})", step, saved))
            with part("optimizer"):
                optimizer.step()

            record = {"step": step, "epoch": epoch, "loss": loss}
            record |= {name: value.item() for name, value in terms.terms.items()}
            record |= {"lr": lr, "images": config.train.batch, "views": config.train.batch * config.views.count}
            if step % HEALTH_EVERY == 0:
                watchdog.at("look", step)
                record |= _look(z, counters, step=step, group=group)
            if config.train.digest:
                record["digest"] = agreed.digest
            record |= {"bad_samples": len(counters.bad_samples)}
            record |= {"seconds": time.monotonic() - ended, "data_wait_s": agreed.wait_s}
            ended = time.monotonic()
            if writer is not None:
                writer.record(record)
            step += 1
            periodic = schedule.evaluate_every is not None and step % schedule.evaluate_every == 0
            evaluate = periodic or step == schedule.total_steps
            every = config.checkpoint.every_steps
            if evaluate or (every is not None and step % every == 0):
                save(step, evaluate=evaluate)
    except (TrainingError, torch.OutOfMemoryError) as error:
        return Outcome(step, _as_user_error(error))
    finally:
        watchdog.at("end", step)
    return Outcome(step)


def run_worker(
    config: Config,
    schedule: Schedule,
    batches: Iterator[Batch],
    *,
    run: str,
    marker: runs.Marker,
    group: dist.ProcessGroup | None,
    rank: int,
    device: torch.device,
    watchdog: Watchdog,
    leaving: Callable[[], bool] = lambda: False,
    wait_for_turn: Callable[[int], float] = lambda step: 0.0,
) -> Outcome:
    """One worker's whole part in one start of a run: builds, restores, trains, and writes if it is worker 0."""
    torch.set_num_threads(config.train.threads)
    network = make_network(config, group=group).to(device)
    optim, views = config.optim, config.views
    shape = (views.count, views.channels, views.size_px, views.size_px)
    module = network if group is None else distribute(network, views_shape=shape, device=device)
    optimizer = build_optimizer(optim.name, network.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
    counters = Counters()
    if marker.checkpoint is not None:
        at = storage.join(run, "checkpoints", marker.checkpoint)
        state = checkpoint.read_checkpoint(at, network, optimizer)
        counters = read_counters(state, step=marker.step, at=storage.join(at, "state.json"))
    workers = 1 if group is None else dist.get_world_size(group)
    log.info("rank %d of %d begins at step %d of %d on %s", rank, workers, marker.step, schedule.total_steps, device)
    writer = None
    if rank == 0:
        flush_s = 1.0 if storage.is_local(run) else 5.0
        keep = config.checkpoint.keep
        writer = Writer(run, marker=marker, keep=keep, flush_s=flush_s)
    try:
        outcome = train(
            config,
            schedule,
            batches,
            network=network,
            module=module,
            optimizer=optimizer,
            counters=counters,
            first_step=marker.step,
            group=group,
            rank=rank,
            device=device,
            writer=writer,
            watchdog=watchdog,
            leaving=leaving,
            wait_for_turn=wait_for_turn,
        )
    finally:
        if writer is not None:
            writer.close()
    log.info("ends after step %d%s", outcome.step, f": {outcome.error}" if outcome.error else "")
    if writer is not None and writer.error is not None and (outcome.error is None or isinstance(outcome.error, Stopped)):
        return Outcome(outcome.step, _as_user_error(writer.error))  # a stop says that there is a checkpoint
    return outcome


def _look(z: Tensor, counters: Counters, *, step: int, group: dist.ProcessGroup | None) -> dict[str, float]:
    """The spread of the embeddings, and the alarm if they have collapsed."""
    health = losses.embedding_health(z.detach().flatten(0, 1), group=group)
    collapsed = not health.effective_rank >= COLLAPSED_RANK
    counters.collapsed_looks = counters.collapsed_looks + 1 if collapsed else 0
    if counters.collapsed_looks >= COLLAPSED_LOOKS:
        raise TrainingError(
            f"the embeddings have collapsed: effective rank {health.effective_rank:.3f} of {z.shape[-1]} for the last "
            f"{COLLAPSED_LOOKS * HEALTH_EVERY} steps up to step {step}.\n"
            "Lower optim.lr, raise loss.beta (or loss.variance and loss.covariance), or use a larger train.batch."
        )
    return {"embedding_std": health.std, "effective_rank": health.effective_rank}


def _not_finite(what: str, step: int, saved: int) -> str:
    return (
        f"{what} is not finite at step {step}; the last good checkpoint is that of step {saved}.\n"
        "Likely the learning rate is too high: lower optim.lr or raise optim.warmup_epochs, in a new run."
    )


def _as_user_error(error: Exception) -> SslRayError:
    if isinstance(error, SslRayError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return ResourceError(f"out of memory on the device ({error}). Lower train.batch or views.count, or add workers.")
    return SslRayError(f"writing failed: {error}")
