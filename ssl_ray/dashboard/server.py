"""The page of the studies at a URI over HTTP: reading only, for this machine only unless a token is given.

Only GET and HEAD are answered. The Host header must name this machine or be an address, so that a page from elsewhere whose
name leads here (DNS rebinding) reads nothing. With a token every request needs it: in a cookie that opening /?token=... sets, or
as `Authorization: Bearer`. The page may load nothing from elsewhere (Content-Security-Policy).

A study is read in a thread, at most every FRESH_S seconds whatever the number of pages, and only what changed of it. Memory is
bounded: the STUDIES that were asked for last are kept, and FIGURE_BYTES of figures.
"""

import asyncio
import collections
import dataclasses
import hashlib
import hmac
import ipaddress
import json
import math
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from ssl_ray import storage
from ssl_ray.dashboard import page
from ssl_ray.dashboard.gallery import gallery, looks
from ssl_ray.dashboard.spectrum import eigenspectrum, read_spectra
from ssl_ray.errors import DataError, SslRayError, UsageError, in_line, shown
from ssl_ray.study.results import Study, Trial, counts, find_studies, read_study
from ssl_ray.study.schema import read_head, read_optional

FRESH_S = 1.0
"""What was read so long ago is shown without looking again."""
STUDIES = 4
FIGURE_BYTES = 64 * 2**20
PICTURES = 16
LEAST_TOKEN = 16
"""Characters: shorter ones can be guessed."""
HEADERS = {
    # Styles may be inline, since plotly makes rules of its own: they can load nothing from elsewhere. Scripts may not.
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclasses.dataclass(eq=False)
class _Kept:
    """A study as it was read last."""

    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    study: Study | None = None
    read_at: float = -math.inf


@dataclasses.dataclass(eq=False)
class _Shelf:
    """What a server remembers."""

    uri: str
    poll_s: float
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    """URIs of the studies by the name that the page calls them by."""
    studies: collections.OrderedDict[str, _Kept] = dataclasses.field(default_factory=collections.OrderedDict)
    figures: collections.OrderedDict[tuple, bytes] = dataclasses.field(default_factory=collections.OrderedDict)
    pictures: collections.OrderedDict[str, bytes] = dataclasses.field(default_factory=collections.OrderedDict)
    drawing: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    """One figure at a time: they share the interpreter's lock anyway, and the same one is then drawn once."""


SHELF: web.AppKey[_Shelf] = web.AppKey("shelf", _Shelf)


def make_app(uri: str, *, host: str = "127.0.0.1", token: str | None = None, poll_s: float = page.POLL_S) -> web.Application:
    """The application. Raises UsageError if others than this machine could read without a token."""
    if token is None and not _is_loopback(host):
        raise UsageError(
            f"--host {host}: other machines could read the results.\nGive --token-file with a file that holds a secret."
        )
    if token is not None and (len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable()):
        raise UsageError(f"the token must have {LEAST_TOKEN} or more printable ASCII characters.\nMake one: openssl rand -hex 32")
    app = web.Application(middlewares=[_guard(host, token)])
    app[SHELF] = _Shelf(uri=uri, poll_s=poll_s)
    app.router.add_get("/", _page)
    app.router.add_get("/assets/{name}", _asset)
    app.router.add_get("/api/studies", _answering(_studies))
    app.router.add_get("/api/study", _answering(_study))
    app.router.add_get("/api/figure", _answering(_figure))
    app.router.add_get("/api/spectrum", _answering(_spectrum))
    app.router.add_get("/api/gallery", _answering(_gallery))
    return app


def serve(uri: str, *, host: str, port: int, token: str | None, ready: Callable[[str], None]) -> None:
    """Serves until it is interrupted. ready: is told the page's address. Port 0: a free one."""
    uri = storage.absolute(uri)
    app = make_app(uri, host=host, token=token)
    if storage.is_local(uri) and not Path(uri).is_dir():
        raise DataError(f"{uri}: no such folder.\nGive a study, a folder of studies, or a URI such as s3://bucket/studies.")
    asyncio.run(_serve(app, host, port, ready))


async def _serve(app: web.Application, host: str, port: int, ready: Callable[[str], None]) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise UsageError(
                f"{host} port {port}: {error.strerror or error}.\nGive another --port; 0 takes a free one."
            ) from error
        taken = runner.addresses[0][1]
        ready(f"http://{'[' + host + ']' if ':' in host else host}:{taken}/")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


# Who may ask ---------------------------------------------------------------------------------------------------------


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_address(host) is not None and ipaddress.ip_address(host).is_loopback)


def _address(host: str) -> str | None:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def _guard(host: str, token: str | None) -> Any:
    names = {"localhost", host.lower(), socket.gethostname().lower()}
    cookie = "ssl_ray_" + hashlib.sha256(b"name" + (token or "").encode()).hexdigest()[:12]  # cookies are shared by all ports
    secret = hashlib.sha256(b"cookie" + (token or "").encode()).hexdigest()

    def known(request: web.Request) -> bool:
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        given = [(bearer, token or ""), (request.query.get("token", ""), token or ""), (request.cookies.get(cookie, ""), secret)]
        return any(hmac.compare_digest(mine.encode(errors="replace"), true.encode()) for mine, true in given)

    @web.middleware
    async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
        name = _host_name(request.headers.get("Host", ""))
        if request.method not in ("GET", "HEAD"):
            response: web.StreamResponse = web.Response(status=405, text="Only GET.\n", headers={"Allow": "GET, HEAD"})
        elif name not in names and _address(name) is None:
            response = web.Response(status=421, text="This server is not known by that name; use its address.\n")
        elif request.headers.get("Sec-Fetch-Site") == "cross-site" and request.path != "/":
            # A page from elsewhere could not read the answer, but have this machine draw pictures.
            response = web.Response(status=403, text="Only for the page of this server.\n")
        elif token is not None and not known(request):
            response = web.Response(status=401, text="A token is needed: open /?token=TOKEN once.\n")
        else:
            try:
                response = await handler(request)
            except web.HTTPException as error:
                response = web.Response(status=error.status, text=f"{error.reason}\n")
            if token is not None and "token" in request.query:
                response.set_cookie(cookie, secret, httponly=True, samesite="Strict", path="/")
        for key, value in HEADERS.items():
            response.headers.setdefault(key, value)
        return response

    return guard


def _host_name(header: str) -> str:
    """Without its port; empty for what is no host."""
    parts = re.fullmatch(r"(?:\[([^][]*)\]|([^][:]*))(?::[0-9]*)?", header)
    return "" if parts is None else (parts[1] or parts[2] or "").lower()


# Page and files ------------------------------------------------------------------------------------------------------


async def _page(request: web.Request) -> web.Response:
    text = page.render(title="ssl_ray studies", live=True, poll_s=request.app[SHELF].poll_s)
    return web.Response(text=text, content_type="text/html")


async def _asset(request: web.Request) -> web.StreamResponse:
    name = request.match_info["name"]
    if name == page.PLOTLY_JS.name:
        return web.FileResponse(page.PLOTLY_JS)
    if name not in (*page.SCRIPTS, page.STYLE):
        raise web.HTTPNotFound()
    return web.FileResponse(page.HERE / name)


# Data ----------------------------------------------------------------------------------------------------------------


def _answering(answer: Any) -> Any:
    """The handler that answers with the bytes and their tag that `answer` returns, or says in JSON why it cannot."""

    async def handler(request: web.Request) -> web.Response:
        try:
            tag, body, kind = await answer(request)
        except SslRayError as error:
            status = 404 if isinstance(error, UsageError) else 503
            return _json(json.dumps({"error": shown(str(error))}).encode(), status=status)
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers={"ETag": tag})
        if kind == "image/png":
            return web.Response(body=body, content_type=kind, headers={"ETag": tag})
        return _json(body, headers={"ETag": tag})

    return handler


def _json(body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    response = web.Response(body=body, status=status, content_type="application/json", charset="utf-8", headers=headers)
    response.enable_compression()
    return response


def _tag(*parts: bytes | str) -> str:
    joined = b"\0".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    return f'"{hashlib.sha256(joined).hexdigest()[:32]}"'


def _dumped(value: Any) -> bytes:
    return page.dumped(value).encode()


Answer = tuple[str, bytes, str]
JSON = "application/json"


async def _studies(request: web.Request) -> Answer:
    shelf = request.app[SHELF]
    rows = await asyncio.to_thread(_list, shelf)
    body = _dumped({"uri": in_line(shelf.uri), "studies": rows})
    return _tag(body), body, JSON


def _list(shelf: _Shelf) -> list[dict[str, Any]]:
    places = {_called(shelf.uri, at): at for at in find_studies(shelf.uri)}
    shelf.places = places
    rows = []
    for called, at in places.items():
        row: dict[str, Any] = {"study": called, "uri": in_line(at)}
        try:
            head, summary = read_head(at), read_optional(storage.join(at, "summary.json"))
            row |= {"name": head.name, "created": head.created, "objective": head.objective, "trials": len(head.trials)}
            row |= {"swept": list(head.swept), "counts": None if summary is None else summary.get("counts")}
            kept = shelf.studies.get(called)
            if kept is not None and kept.study is not None:
                row["counts"] = counts(kept.study, now=time.time())
        except SslRayError as error:
            row["error"] = shown(str(error))
        rows.append(row)
    return rows


def _called(uri: str, at: str) -> str:
    return at.rstrip("/").removeprefix(uri.rstrip("/")).lstrip("/") or "."


async def _read(request: web.Request) -> Study:
    """The study that the request names, as it is now."""
    shelf, called = request.app[SHELF], request.query.get("study", "")
    if called not in shelf.places:
        await asyncio.to_thread(_list, shelf)
    if called not in shelf.places:
        raise UsageError(f"{called!r:.100}: no such study here.")
    kept = shelf.studies.setdefault(called, _Kept())
    shelf.studies.move_to_end(called)
    while len(shelf.studies) > STUDIES:
        shelf.studies.popitem(last=False)
    async with kept.lock:
        if kept.study is None or time.monotonic() - kept.read_at > FRESH_S:
            kept.study = await asyncio.to_thread(read_study, shelf.places[called], kept.study)
            kept.read_at = time.monotonic()
        return kept.study


def _trial(study: Study, name: str) -> Trial:
    found = [trial for trial in study.trials if trial.name == name]
    if not found:
        raise UsageError(f"{name!r:.100}: no such trial.")
    return found[0]


async def _study(request: web.Request) -> Answer:
    study = await _read(request)
    body = await asyncio.to_thread(lambda: _dumped(page.studied(study, now=time.time())))
    return _tag(body), body, JSON


async def _figure(request: web.Request) -> Answer:
    shelf, query = request.app[SHELF], request.query
    name, only, target = query.get("figure", ""), query.get("only"), query.get("target")
    if name not in page.FIGURES:
        raise UsageError(f"{name!r:.100}: no such figure.")
    try:
        wanted = None if target is None else float(target)
    except ValueError as error:
        raise UsageError(f"target: got {target!r:.100}, expected a share such as 0.9.") from error
    if wanted is not None and not 0 <= wanted <= 1:
        raise UsageError(f"target: got {target!r:.100}, expected 0 to 1.")
    study = await _read(request)
    key = (study.uri, page.version(study), name, only, wanted)
    tag = _tag(json.dumps(key))
    if request.headers.get("If-None-Match") == tag:
        return tag, b"", JSON
    async with shelf.drawing:
        if key not in shelf.figures:
            part = study if only is None else page.chosen(study, only)
            shelf.figures[key] = await asyncio.to_thread(lambda: _dumped(page.draw(part, name, target=wanted)))
        shelf.figures.move_to_end(key)
        body = shelf.figures[key]
        while len(shelf.figures) > 1 and sum(map(len, shelf.figures.values())) > FIGURE_BYTES:
            shelf.figures.popitem(last=False)
    return tag, body, JSON


async def _spectrum(request: web.Request) -> Answer:
    study = await _read(request)
    trial = _trial(study, request.query.get("trial", ""))

    def made() -> bytes:
        return _dumped(eigenspectrum(read_spectra(study.uri, trial.name)))

    body = await asyncio.to_thread(made)
    return _tag(body), body, JSON


async def _gallery(request: web.Request) -> Answer:
    shelf, study = request.app[SHELF], await _read(request)
    trial = _trial(study, request.query.get("trial", ""))
    key = json.dumps(looks(study, trial), sort_keys=True)
    async with shelf.drawing:
        if key not in shelf.pictures:
            shelf.pictures[key] = await asyncio.to_thread(gallery, study, trial)
        shelf.pictures.move_to_end(key)
        while len(shelf.pictures) > PICTURES:
            shelf.pictures.popitem(last=False)
        return _tag(key), shelf.pictures[key], "image/png"
