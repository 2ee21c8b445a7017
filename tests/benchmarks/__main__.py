"""Benchmarks: `python tests/benchmarks` runs all, `python tests/benchmarks NAME ...` some; each prints a table and
keeps it in docs/: measured.md, growth.md or scale.md.

The peers are in the extra `benchmarks`: `pip install -e '.[benchmarks]'`; one that is not there is named as not run.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = [path.stem for path in sorted(HERE.glob("bench_*.py"))]


def main() -> int:
    """Runs each benchmark in a process of its own: what one imports or pins does not touch the next."""
    short = [name.removeprefix("bench_") for name in NAMES]
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(short)}; default: all")
    parser.add_argument("--json", action="store_true", help="print JSON instead, one object a benchmark, and keep nothing")
    options = parser.parse_args()
    unknown = set(options.names) - set(short)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}. There are: {', '.join(short)}")
    code = "import timing; timing.run('{}', as_json={})"
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    failed = [
        name
        for name in options.names or short
        if subprocess.run(
            [sys.executable, "-c", code.format(name, options.json)], env=os.environ | {"PYTHONPATH": path}
        ).returncode
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
