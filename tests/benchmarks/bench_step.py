"""A training step with two workers through the whole system, against a bare torchrun DDP script (bare_ddp.py).

Both train the same network with the same global batch norm, loss, optimiser and number of threads. The script's views lie
in memory before the clock starts; the system reads, decodes and makes them on the same two cores (next to nothing beside
the training of the ResNet), and writes metrics and checkpoints. Whole runs alternate; a turn's time is the median over the
steps of a run after the first ones, in which Ray and the read-out of the untrained network still work. The second row of
each configuration leaves the wait for data out.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import timing

SKIPPED = 40
TURNS = 3
COMMON = [
    "views.channels=1",
    "model.projector_dim=256",
    "optim.name=adam",
    "train.workers=2",
    "train.threads=1",
    "evaluate.max_images=50",
    "checkpoint.keep=1",
]
SYSTEMS = {
    "small encoder, 128 images of 28 px, m = 4": ["views.size_px=28", "train.steps=90"],
    "ResNet-18, 16 images of 32 px, m = 4": ["views.size_px=32", "model.encoder=resnet18", "train.batch=16", "train.steps=80"],
}
"""What: its keys. The images are the built-in digits; the recipe of the command line and the script's plain defaults differ, so
that every key that weighs in a step is given here."""


def rows() -> list[timing.Row]:
    made = []
    for what, keys in SYSTEMS.items():
        ours, without_wait, theirs = [], [], []
        for _ in range(TURNS):
            whole, wait = _ours([*COMMON, *keys])
            ours.append(statistics.median(whole))
            without_wait.append(statistics.median(all_s - wait_s for all_s, wait_s in zip(whole, wait, strict=True)))
            theirs.append(statistics.median(_bare([*COMMON, *keys])))
        peer = f"bare DDP, torch {timing.machine()['torch']}"
        made += [
            timing.row(what, ours, theirs, peer=peer, unit="step", cores=2),
            timing.row(f"{what}, without the wait for data", without_wait, theirs, peer=peer, unit="step", cores=2),
        ]
    return made


def _ours(keys: list[str]) -> tuple[list[float], list[float]]:
    """Seconds of each step and of its wait for data."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        subprocess.run([sys.executable, "-m", "ssl_ray", "pretrain", f"run={run}", *keys], check=True, stdout=subprocess.DEVNULL)
        lines = [line for path in sorted((run / "metrics").glob("*.jsonl")) for line in path.read_text().splitlines()]
        records = [json.loads(line) for line in lines][SKIPPED:]
        return [record["seconds"] for record in records], [record["data_wait_s"] for record in records]


def _bare(keys: list[str]) -> list[float]:
    script = Path(__file__).parent / "bare_ddp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), *keys]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])[SKIPPED:]
