"""What a worker needs is counted before it is started, and refused where it is not there."""

import subprocess
import sys

import pytest
from harness import run

MEASURE = """
import os, sys, torch
from ssl_ray.config import build
from ssl_ray.train import memory
from ssl_ray.train.loop import compute_loss, make_network

config = build({}, sys.argv[1:])
an_image = memory.worker_needs(config).image_bytes
network, spec = make_network(config, group=None), config.views
used = []
for images in (2, 64):
    views = torch.randn(images, spec.count, spec.channels, spec.size_px, spec.size_px)
    loss = compute_loss(network(views), config.loss, group=None).total
    with open('/proc/self/statm') as pages:  # the peak would be that of the process this one was forked from
        used.append(os.sysconf('SC_PAGE_SIZE') * int(pages.read().split()[1]))
    loss.backward()
print(int(62 * an_image), used[1] - used[0])
"""


def test_the_memory_of_more_images_is_what_a_process_takes_for_them():
    keys = ["views.size_px=64", "views.count=8"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *keys], capture_output=True, text=True, timeout=120, check=True)
    counted, used = map(int, done.stdout.split())
    assert counted == pytest.approx(used, rel=0.3)


def test_fewer_workers_than_memory_allows_are_refused(cluster, tmp_path):
    keys = ["train.workers={min: 1, max: 2}", "train.batch=1216", "views.count=64", "views.size_px=128"]
    code, _, err = run("pretrain", f"run={tmp_path / 'run'}", *keys, env=cluster)
    assert code == 4
    last = err.splitlines()[-2:]
    assert last[0].startswith("ssl-ray: train.workers={min: 1, max: 2}: 1 would have 1216 images of a step each, which take ")
    assert last[1] == "Lower train.batch or views.count."
