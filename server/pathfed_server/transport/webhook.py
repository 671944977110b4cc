"""Calling a webhook: one POST, an answer's status, and nothing else. Redirects are not followed, and nothing of the answer is read."""

import asyncio
import ssl
import time
from collections.abc import Mapping

import httpx

from pathfed_common.errors import ErrorCode, RoundError
from pathfed_server.transport.delivery import Delivered, delivery_error

_AGENT = "pathfed-server"


def call(url: str, body: bytes, headers: Mapping[str, str], tls: ssl.SSLContext, *, within_s: float) -> Delivered:
    """Send a JSON body. Taken is what is answered with a status 2xx.

    No proxy, no ``.netrc`` and no cookie is used: what goes out is what is given here. `within_s` bounds it as a whole, however
    slowly the other side speaks.

    Raises:
        RoundError: PF580, the answer is not 2xx; PF581, none within `within_s` seconds; PF582, TLS fails; PF583, nobody is reached.
    """
    begun = time.monotonic()
    try:
        status = asyncio.run(_post(url, body, headers, tls, within_s))
    except (OSError, httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise delivery_error(error, within_s) from None
    if not 200 <= status < 300:
        raise RoundError(ErrorCode.NOTICE_REFUSED, "the receiver did not take the message", value=f"HTTP {status}")
    return Delivered(answer=status, seconds=time.monotonic() - begun)


async def _post(url: str, body: bytes, headers: Mapping[str, str], tls: ssl.SSLContext, within_s: float) -> int:
    sent = {"Content-Type": "application/json", "User-Agent": _AGENT, **headers}
    async with (
        asyncio.timeout(within_s),
        httpx.AsyncClient(verify=tls, trust_env=False, follow_redirects=False, timeout=within_s) as client,
        client.stream("POST", url, content=body, headers=sent) as answer,
    ):
        return answer.status_code
