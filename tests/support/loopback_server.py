"""An asyncio server in a thread of its own, on the loopback unless it is told otherwise."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator


@contextlib.contextmanager
def serving(
    loop: asyncio.AbstractEventLoop,
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    host: str = "127.0.0.1",
) -> Iterator[int]:
    """Serve on a new loop, which is closed at the end with all its connections; the port."""

    async def stop() -> None:
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.05)

    server = loop.run_until_complete(asyncio.start_server(serve, host, 0))
    thread = threading.Thread(target=loop.run_forever, name="loopback server")
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
