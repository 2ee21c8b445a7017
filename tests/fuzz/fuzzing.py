"""What every fuzz shares: damage to bytes and values, and the bounds of a case."""

import contextlib
import faulthandler
import signal
from collections.abc import Callable, Iterator

import psutil
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ssl_ray.errors import SslRayError, shown

CASE_CPU_S = 10.0
"""A case that takes more of the CPU is a hang; they take milliseconds."""
CASE_S = 60.0
"""Where machine code hangs, which no signal ends, the process is ended."""
GROWTH_BYTES = 256 * 2**20
"""Memory that all cases of a test may leave behind."""


class Hang(BaseException):
    """No Exception, which the code under test may catch."""


def _hang(_number: int, _frame: object) -> None:
    raise Hang(f"a case took {CASE_CPU_S} s")


@contextlib.contextmanager
def refused_or_done(*names: str) -> Iterator[None]:
    """A case: it ends in time, and if with an error, then with one of ours of one to three lines with one of `names` in it."""
    before = signal.signal(signal.SIGPROF, _hang)
    signal.setitimer(signal.ITIMER_PROF, CASE_CPU_S)
    faulthandler.dump_traceback_later(CASE_S, exit=True)
    try:
        yield
    except SslRayError as error:
        require_message(str(error), *names)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def require_message(message: str, *names: str) -> None:
    assert message.strip()
    assert any(name in message for name in names), (names, message)
    lines = shown(message).split("\n")
    assert len(lines) <= 3
    assert all(len(line) <= 1000 and line.isprintable() for line in lines), lines


def fuzz(case: Callable[..., None], cases: int, **strategies: st.SearchStrategy) -> None:
    """Calls `case` so often, the same cases at each call, and requires that no memory is left behind."""
    process, seen = psutil.Process(), 0
    memory: list[int] = []

    def counted(**drawn) -> None:
        nonlocal seen
        seen += 1
        if seen == cases // 4:  # what is loaded and kept once is there
            memory.append(process.memory_info().rss)
        case(**drawn)

    quiet = settings(
        max_examples=cases,
        phases=[Phase.generate],  # to shrink a failure can take minutes
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    quiet(given(**strategies)(counted))()
    assert seen >= cases * 0.9, f"only {seen} of {cases} cases: there are no more different ones"
    assert process.memory_info().rss - memory[0] < GROWTH_BYTES


_EDGES = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -1, -(2**31), -(2**63)]
_TEXTS = [
    "",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "\x1b[31m\x07",
    "\r\n\n",
    "é\u202e",
    "\ud800",
    "nan",
    "-0",
    "1e999",
]
numbers = st.sampled_from(_EDGES) | st.integers(-(2**63), 2**63 - 1)
texts = st.text(max_size=20) | st.sampled_from([*_TEXTS, "x" * 10_000])
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)

_EDIT = st.tuples(
    st.sampled_from(["set", "flip", "cut", "drop", "insert", "repeat", "zero", "number"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 64),
    st.binary(min_size=1, max_size=8),
    st.sampled_from([1, 2, 4, 8]),
)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One to four edits of bytes, whatever their number: changed, cut, doubled, moved, put in, or a number written over them."""
    edits = draw(st.lists(_EDIT, min_size=1, max_size=4))

    def damage(data: bytes) -> bytes:
        for kind, place, length, other, width in edits:
            at = int(place * len(data))
            match kind:
                case "set":
                    data = data[:at] + other + data[at + len(other) :]
                case "flip":
                    data = data[:at] + bytes([(data[at] if at < len(data) else 0) ^ (other[0] or 1)]) + data[at + 1 :]
                case "cut":
                    data = data[:at]
                case "drop":
                    data = data[:at] + data[at + length :]
                case "insert":
                    data = data[:at] + other * (1 + length) + data[at:]
                case "repeat":
                    data = data[:at] + data[at : at + 8 * length] * 3 + data[at:]
                case "zero":
                    data = data[:at] + bytes(length) + data[at + length :]
                case "number":
                    edge = _EDGES[other[0] % len(_EDGES)] % 2 ** (8 * width)
                    value = edge.to_bytes(width, "little" if length % 2 else "big")
                    data = data[:at] + value + data[at + width :]
        return data

    return damage
