"""Studies that come with ssl_ray, trained by `ssl-ray study run`, so that the first look at the pages costs nothing.

Made anew from finished studies below a folder, of which it keeps what the pages read:

    python -m ssl_ray.dashboard.demo studies
"""

import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssl_ray import storage
from ssl_ray.errors import DataError
from ssl_ray.study.results import find_studies, read_study

DEMO = Path(__file__).parent / "demo.tar.xz"
_READ = ("study.json", "summary.json", "trials/*/trial.json", "trials/*/run.json", "trials/*/metrics/*", "trials/*/evaluations/*")


@contextmanager
def opened() -> Iterator[str]:
    """A folder with the studies, for as long as it lasts."""
    with storage.scratch_folder("demo") as folder, tarfile.open(DEMO) as archive:
        for entry in archive:
            if (file := archive.extractfile(entry)) is not None:
                path = Path(folder, entry.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read())
        yield folder


def pack(folder: str) -> None:
    """Writes DEMO anew, of all studies below `folder`. Raises DataError where one has not ended."""
    root = storage.absolute(folder)
    studies = find_studies(root)
    for uri in studies:
        if any(trial.state.status != "complete" for trial in read_study(uri).trials):
            raise DataError(f"{uri}: not all of its trials are complete. Run `ssl-ray study resume {uri}` first.")
    with tarfile.open(DEMO, "w:xz", preset=9) as archive:
        for study in map(Path, studies):
            for path in sorted(path for pattern in _READ for path in study.glob(pattern)):
                archive.add(path, str(path.relative_to(root)), filter=_plain)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without who made it and when: the same studies give the same file."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    pack(*sys.argv[1:])
