"""Images to m views: at 32 px from pixels and from PNG, at 224 px, blurred half the time, from photographs in JPEG of 500x375.

Eight minutes.  Every number of cores has a process of its own, which is kept on them with all that it starts.
"""

import io
import multiprocessing
import os
from multiprocessing.connection import Connection

import numpy as np
import photographs
import timing
import view_peers
from PIL import Image
from timing import Row

SMALL = {
    "lightly": (view_peers.lightly, 48),
    "torchvision": (view_peers.torchvision, 48),
    "kornia": (view_peers.kornia, 256),
    "nvidia-dali-cuda120": (view_peers.dali, 256),
    "ffcv": (view_peers.ffcv, 512),
}
"""By package: the peer and how many images it gets in a call, so many that it takes tens of milliseconds."""
LARGE = {
    "lightly": (view_peers.lightly, 8),
    "torchvision": (view_peers.torchvision, 4),
    "kornia": (view_peers.kornia, 4),
    "nvidia-dali-cuda120": (view_peers.dali, 16),
    "albumentations": (view_peers.albumentations, 24),
}
OURS_SMALL, OURS_LARGE = 512, 24
COUNTS = (2, 4, 8)
SLOW_TO_START = "ffcv"
"""Its time does not depend on m, and each m would cost it a quarter of a minute: it has the last one only."""


def rows() -> list[Row]:
    found = []
    for cores in (1, 2):
        here, there = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=_send_rows, args=(there, cores))
        process.start()
        there.close()
        found += here.recv()
        process.join()
    return sorted(found, key=lambda row: row.what, reverse=True)


def _send_rows(there: Connection, cores: int) -> None:
    timing.use_cores(cores)
    there.send([row for m in COUNTS for row in _rows_of(m, cores=cores, all_peers=m == COUNTS[-1])])
    os._exit(0)  # FFCV 1.0.2 hangs when its process ends


def _rows_of(m: int, *, cores: int, all_peers: bool) -> list[Row]:
    files, jpegs = photographs.small(OURS_SMALL), photographs.large(OURS_LARGE)
    pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in files]
    small = {package: peer for package, peer in SMALL.items() if package != SLOW_TO_START or all_peers}
    return [
        *_compare(f"32 px from pixels, m = {m}", small, pixels, m=m, size=32, blur=0.0, cores=cores),
        *_compare(f"32 px from PNG, m = {m}", small, files, m=m, size=32, blur=0.0, cores=cores),
        *_compare(f"224 px from JPEG, m = {m}", LARGE, jpegs, m=m, size=224, blur=0.5, cores=cores),
    ]


def _compare(what: str, peers: dict, images: view_peers.Images, *, m: int, size: int, blur: float, cores: int) -> list[Row]:
    options = {"views": m, "size": size, "blur": blur, "cores": cores}
    calls, counts, missing = {}, {"ours": len(images) * m}, []
    for package, (peer, share) in peers.items():
        try:
            calls[timing.named(package)] = peer(images[:share], **options)
        except ImportError as error:
            missing.append(timing.skipped(what, package, str(error), cores=cores))
        counts[timing.named(package)] = share * m
    ours = view_peers.ours(images, **options)
    return timing.alternate(what, ours, calls, unit="view", count=counts.__getitem__, cores=cores) + missing
