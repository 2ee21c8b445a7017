"""What the commands print whose output the README shows: the first run of a newcomer, and where the time of its steps goes."""

import dataclasses
import os
import subprocess
import sys
import tempfile

COMMANDS = ("pretrain", "profile digits")


@dataclasses.dataclass(frozen=True)
class Printed:
    command: str
    text: str


def rows() -> list[Printed]:
    """In a new folder each, as on a new machine: without a cluster that is there already, and without runs."""
    return [_printed(command) for command in COMMANDS]


def _printed(command: str) -> Printed:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "ssl_ray", *command.split()],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
    return Printed(f"ssl-ray {command}", done.stdout.replace(f"{folder}/", ""))


def table(rows: list[Printed]) -> str:
    return "\n".join(f"```\n$ {one.command}\n{one.text.strip()}\n```" for one in rows)
