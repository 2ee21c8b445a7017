"""The command line in a process of its own, and what came of it."""

import dataclasses
import json
import os
import subprocess
import sys


@dataclasses.dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    def ok(self) -> "Done":
        assert self.code == 0, self.err
        return self

    def refused(self, code: int, *parts: str) -> "Done":
        """One or two lines on stderr that hold `parts`, nothing on stdout, no traceback."""
        lines = self.err.splitlines()
        assert self.code == code, self
        assert 1 <= len(lines) <= 2, self.err
        assert lines[0].startswith("ssl-ray"), self.err
        assert "Traceback" not in self.err, self.err
        assert self.out == ""
        for part in parts:
            assert part in self.err, (part, self.err)
        return self


def ssl_ray(environment: dict[str, str], *arguments: str) -> Done:
    """`ssl-ray` with these variables, and no other of AWS."""
    command = [sys.executable, "-m", "ssl_ray", *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | environment
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace")
        raise AssertionError(f"no end after 300 s: {' '.join(arguments)}\n{said[-4000:]}") from None
    return Done(done.returncode, done.stdout, done.stderr)
