"""An HTTP proxy on loopback that does to answers what networks and stores do to them, and keeps a log of requests.

In a test: `with proxy.serve(HOST, PORT) as between:`, then set `between.rules`. As a program, with random faults, one JSON line
for each on stdout:

    python tests/proxy.py --upstream 127.0.0.1:8333 --port 9333 --seed 0 --rate 0.02

Requests pass as they are, Host too, so that signatures stay valid. A connection carries one request.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import random
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator

FAULTS = ("503", "500", "reset", "truncate", "stall", "slow")
_ERRORS = {
    "503": b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    "500": b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>",
}
_PIECE = 2**16


@dataclasses.dataclass
class Rule:
    """What happens to the next `times` answers to requests whose first line has `match` in it.

    503, 500: that, without asking the server.  reset, truncate: the connection ends inside the body, with or without an RST.
    stall: nothing comes for `seconds` inside the body, then the rest.  slow: the rest of the body at `bytes_per_s`.
    An answer without a body is cut, or held back, before its head.
    """

    fault: str
    times: int = 1
    match: str = ""
    after_bytes: int = 1000
    seconds: float = 60.0
    bytes_per_s: int = 1000


@dataclasses.dataclass(frozen=True)
class Request:
    line: str
    """Method, path and version, without the end of the line."""
    fault: str | None


class Proxy:
    def __init__(self, host: str, port: int, choose: Callable[[str], Rule | None] | None = None):
        """choose: the fault for a request, by its first line; without it, the first of `rules` that matches."""
        self.upstream = host, port
        self.rules: list[Rule] = []
        self.log: list[Request] = []
        self.choose = choose or self._first_rule
        self.port = 0
        self._answering: set[asyncio.Task] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def _first_rule(self, line: str) -> Rule | None:
        for rule in self.rules:
            if rule.times > 0 and rule.match in line:
                rule.times -= 1
                return rule
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)  # or it might be collected
        task.add_done_callback(self._answering.discard)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):  # the last: at the end
            head = await reader.readuntil(b"\r\n\r\n")
            first, _, rest = head.partition(b"\r\n")
            line = first.decode("latin-1")
            rule = self.choose(line)
            self.log.append(Request(line, rule and rule.fault))
            if rule and rule.fault in _ERRORS:
                await _refuse(rule.fault, line, reader, writer)
            else:
                await self._pass_on(first + b"\r\nConnection: close\r\n" + rest, line, rule, reader, writer)
        writer.close()

    async def _pass_on(self, head: bytes, line: str, rule: Rule | None, reader, writer) -> None:
        try:
            from_server, to_server = await asyncio.open_connection(*self.upstream)
        except OSError:
            _reset(writer)
            return
        to_server.write(head)
        sending = asyncio.create_task(_copy(reader, to_server))
        try:
            await _answer(line, rule, from_server, writer)
        except (OSError, asyncio.IncompleteReadError):
            _reset(writer)
        finally:
            sending.cancel()
            to_server.close()


async def _answer(line: str, rule: Rule | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        writer.write(head)
        head = await reader.readuntil(b"\r\n\r\n")
    if rule is None:
        writer.write(head)
        await _copy(reader, writer)
        return
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    body = 0 if line.startswith("HEAD") else int(length[1]) if length else rule.after_bytes + 1
    if body:
        writer.write(head)
        writer.write(await reader.readexactly(min(rule.after_bytes, body - 1)))
        await writer.drain()
    match rule.fault:
        case "reset":
            await asyncio.sleep(0.05)  # an RST overtakes what was sent before
            _reset(writer)
            return
        case "truncate":
            return
        case "stall":
            await asyncio.sleep(rule.seconds)
        case "slow":
            while piece := await reader.read(max(1, rule.bytes_per_s // 20)):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(len(piece) / rule.bytes_per_s)
    if not body:
        writer.write(head)
    await _copy(reader, writer)


async def _refuse(fault: str, line: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    body = _ERRORS[fault]
    head = f"HTTP/1.1 {fault} Fault\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + (b"" if line.startswith("HEAD") else body))
    await writer.drain()
    writer.write_eof()
    with contextlib.suppress(TimeoutError):  # closed with a part of the request unread, the answer would be lost in a reset
        async with asyncio.timeout(10):
            while await reader.read(_PIECE):
                pass


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(_PIECE):
            writer.write(piece)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.contextmanager
def serve(host: str, port: int) -> Iterator[Proxy]:
    """A proxy in a thread of this process, without faults until it gets rules."""
    made, loop = Proxy(host, port), asyncio.new_event_loop()
    listening = loop.run_until_complete(made.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(_end(listening))
        loop.close()


async def _end(listening: asyncio.Server) -> None:
    listening.close()
    unfinished = asyncio.all_tasks() - {asyncio.current_task()}
    for task in unfinished:
        task.cancel()
    await asyncio.gather(*unfinished, return_exceptions=True)
    await asyncio.sleep(0)  # connections close a turn later


def random_faults(seed: int, rate: float) -> Callable[[str], Rule | None]:
    """One request in 1 / `rate` has a fault of any kind; printed as they are drawn."""
    drawn = random.Random(seed)

    def choose(line: str) -> Rule | None:
        if drawn.random() >= rate:
            return None
        rule = Rule(drawn.choice(FAULTS), after_bytes=drawn.randrange(200_000), seconds=drawn.uniform(1, 30), bytes_per_s=200_000)
        print(json.dumps({"time": time.time(), "fault": rule.fault, "request": line}), flush=True)
        return rule

    return choose


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True, metavar="HOST:PORT")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.02, help="share of the requests that a fault befalls")
    options = parser.parse_args()
    host, _, port = options.upstream.rpartition(":")
    server = await Proxy(host, int(port), random_faults(options.seed, options.rate)).start(options.port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(_main()))
