"""The errors a user can meet. Each says in a line or two what and where, got and expected, and what to do.

SslRayError             exit code 1
  UsageError            2   a wrong key, type, value or combination of them
    RunMismatchError    2   the run URI holds a run of another configuration
  DataError             3   shards, manifest, samples or storage
  ResourceError         4   CPU, memory, disk, a lease
  TrainingError         1   NaN, inf or a collapsed embedding
  Stopped               130 stopped by a signal, with a checkpoint

The one argument of each is its message, so that they survive the pickling between Ray processes.  A message may hold names and
texts of others: whoever prints it prints `shown(message)`.
"""

from ssl_ray.masking import without_secrets

MAX_LINES, MAX_LINE = 3, 1000
"""Of a message as it is printed; the head and the end of a longer line stay."""


def shown(text: str) -> str:
    """`text` as a terminal or a log may have it: without secrets or control characters, at most MAX_LINES lines of MAX_LINE."""
    lines = text.split("\n", MAX_LINES - 1)
    return "\n".join(_shortened(in_line(line)) for line in lines)


def in_line(text: str) -> str:
    """`text` whole in one line: what may command a terminal or turn the direction of text is written as Python writes it."""
    line = without_secrets(text)
    return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def _shortened(line: str) -> str:
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE // 2]} ... {line[-(MAX_LINE // 2 - 5) :]}"


class SslRayError(Exception):
    exit_code = 1


class UsageError(SslRayError):
    exit_code = 2


class RunMismatchError(UsageError):
    pass


class DataError(SslRayError):
    exit_code = 3


class ResourceError(SslRayError):
    exit_code = 4


class TrainingError(SslRayError):
    exit_code = 1


class Stopped(SslRayError):
    exit_code = 130
