"""Studies that come with ssl_ray, trained by `ssl-ray study run`, so that the first look at the pages costs nothing.

Made anew from finished studies, of which it keeps what the pages read:

    python -m ssl_ray.dashboard.demo studies/projector-small studies/pareto-small
"""

import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssl_ray import storage

DEMO = Path(__file__).parent / "demo.zip"
_READ = ("study.json", "summary.json", "trials/*/trial.json", "trials/*/run.json", "trials/*/metrics/*", "trials/*/evaluations/*")


@contextmanager
def opened() -> Iterator[str]:
    """A folder with the studies, for as long as it lasts."""
    with storage.scratch_folder("demo") as folder, zipfile.ZipFile(DEMO) as archive:
        archive.extractall(folder)
        yield folder


def pack(studies: list[str]) -> None:
    with zipfile.ZipFile(DEMO, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for study in map(Path, studies):
            for path in sorted(path for pattern in _READ for path in study.glob(pattern)):
                # A fixed time: the same studies give the same file.
                entry = zipfile.ZipInfo(f"{study.name}/{path.relative_to(study)}")
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    pack(sys.argv[1:])
