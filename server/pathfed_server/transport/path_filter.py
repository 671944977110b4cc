"""The only door to SuperLink for hospitals: a TLS proxy that passes `/v1/fleet/` and nothing else.

SuperLink serves fleet, control and runtime on one port, and its control API is open to whoever reaches it. So SuperLink listens on the
server's loopback, and this filter stands in front. Paths are compared as they came, before any decoding: an escape, a dot segment or a
doubled slash is refused, so that no spelling of another path slips through. Bodies are streamed, never collected.

What SuperLink is sent it keeps, wanted or not. So each site has an allowance of bytes, which honest ones do not come near. It is counted
by network address and node key together: whoever uses another site's key, which SuperLink refuses afterwards, uses up an allowance of
its own.

Run as `python -m pathfed_server.transport.path_filter --listen HOST:PORT --upstream HOST:PORT --ca F --cert F --key F`.
"""

import argparse
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from pathfed_common.errors import ErrorCode
from pathfed_server.transport.limits import RateLimit

FLEET = b"/v1/fleet/"
#: Largest body passed on, bytes. A site's messages carry statements and codes, some kilobytes; what is large moves over the bulk plane.
BODY_LIMIT = 2**20
#: Bytes that a site may send at once, and a second in the long run. An honest one asks once a second and says some kilobytes a round.
SITE_BURST, SITE_PER_S = 16 * 2**20, 16 * 2**10
#: Bytes that a request counts at least: each leaves a trace in SuperLink's database.
_LEAST_BYTES = 2**10
#: Seconds between two lines that tell of one site's spent allowance.
_TELL_S = 3600.0
#: Flower's `PUBLIC_KEY_HEADER`, the node's key.
_KEY_HEADER = "flwr-public-key-bin"
_log = logging.getLogger(__name__)
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"host",
    }
)


def passes(raw_path: bytes) -> bool:
    """Whether a request path, exactly as received, may go on to SuperLink."""
    rest = raw_path.removeprefix(FLEET)
    return raw_path.startswith(FLEET) and bool(rest) and all(byte not in raw_path for byte in (b"%", b"..", b"//", b"\\", b"\x00"))


class Allowance:
    """How much each site may send to SuperLink."""

    def __init__(self) -> None:
        """Begin with full allowances."""
        self._bytes = RateLimit(per_second=SITE_PER_S, burst=SITE_BURST)
        self._lines = RateLimit(per_second=1 / _TELL_S, burst=1)

    def takes(self, request: Request, count: int) -> bool:
        """Whether the sender of a request may send so many bytes more; counts them if so, and says now and then if not."""
        address = request.client.host if request.client else ""
        key = request.headers.get(_KEY_HEADER, "")
        if self._bytes.allows(f"{address} {key}", count):
            return True
        if self._lines.allows(address):
            _log.warning("%s %s sends more than a site has to say, node key %.80r", ErrorCode.RATE_LIMITED.value, address, key)
        return False


def make_filter(upstream: str, ca_file: str) -> Starlette:
    """The filter as an ASGI app; `upstream` is SuperLink's HOST:PORT, reached over TLS and checked against `ca_file`."""
    allowance = Allowance()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        context = ssl.create_default_context(cafile=ca_file)
        timeout = httpx.Timeout(10.0, read=300.0, write=300.0)
        async with httpx.AsyncClient(base_url=f"https://{upstream}", verify=context, timeout=timeout, trust_env=False) as client:
            app.state.client = client
            yield

    async def forward(request: Request) -> Response:
        raw_path: bytes = request.scope.get("raw_path", b"").split(b"?")[0]
        if not passes(raw_path):
            return PlainTextResponse("not found", status_code=404)
        if int(request.headers.get("content-length", "0")) > BODY_LIMIT:
            return _too_large()
        if not allowance.takes(request, _LEAST_BYTES):
            return _too_much()
        return await _pass_on(request.app.state.client, request, raw_path, allowance)

    return Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])], lifespan=lifespan)


class _RefusedError(Exception):
    """A body is refused in its middle: it is larger than `BODY_LIMIT`, or its sender's allowance is spent."""

    def __init__(self, response: Response) -> None:
        self.response = response


def _too_large() -> Response:
    return PlainTextResponse("body too large", status_code=413)


def _too_much() -> Response:
    return PlainTextResponse("too many bytes", status_code=429, headers={"retry-after": "60"})


async def _pass_on(client: httpx.AsyncClient, request: Request, raw_path: bytes, allowance: Allowance) -> Response:
    url = client.base_url.copy_with(raw_path=raw_path)
    headers = [(name, value) for name, value in request.headers.raw if name.lower() not in _HOP_BY_HOP]
    body = _limited(request, allowance) if request.method == "POST" else None
    outgoing = client.build_request(request.method, url, headers=headers, content=body)
    try:
        answer = await client.send(outgoing, stream=True)
    except httpx.TransportError:
        return PlainTextResponse("upstream unavailable", status_code=503)
    except _RefusedError as error:
        return error.response
    except ClientDisconnect:
        return PlainTextResponse("cut off", status_code=400)  # nobody reads it

    async def chunks() -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.aiter_raw():
                yield chunk
        finally:
            await answer.aclose()

    response = StreamingResponse(chunks(), status_code=answer.status_code)
    response.raw_headers = [(name.lower(), value) for name, value in answer.headers.raw if name.lower() not in _HOP_BY_HOP]
    return response


async def _limited(request: Request, allowance: Allowance) -> AsyncIterator[bytes]:
    passed = 0
    async for chunk in request.stream():
        passed += len(chunk)
        if passed > BODY_LIMIT:
            raise _RefusedError(_too_large())
        if not allowance.takes(request, len(chunk)):
            raise _RefusedError(_too_much())
        yield chunk


def main() -> None:
    """Serve the filter until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("listen", "upstream", "ca", "cert", "key"):
        parser.add_argument(f"--{name}", required=True)
    arguments = parser.parse_args()
    host, _, port = arguments.listen.rpartition(":")
    app = make_filter(arguments.upstream, arguments.ca)
    uvicorn.run(
        app,
        host=host,
        port=int(port),
        ssl_certfile=arguments.cert,
        ssl_keyfile=arguments.key,
        access_log=False,
        server_header=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
