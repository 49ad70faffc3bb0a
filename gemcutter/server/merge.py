"""Several replies read as one: whichever has something comes next.

Owns the fan-in of a request for n replies, or of a batch of prompts. Refuses to know what the readings are for. Read `bridge.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from gemcutter.server.bridge import Reading, Reply


async def merged(replies: Sequence[Reply]) -> AsyncIterator[tuple[int, Reading]]:
    """Yield readings with the number of their reply, until all have ended. Raises the error of the first that fails."""
    if len(replies) == 1:
        async for reading in replies[0]:
            yield 0, reading
        return
    sources = {index: aiter(reply) for index, reply in enumerate(replies)}
    waiting = {asyncio.ensure_future(anext(source)): index for index, source in sources.items()}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                try:
                    reading = task.result()
                except StopAsyncIteration:
                    continue
                yield index, reading
                waiting[asyncio.ensure_future(anext(sources[index]))] = index
    finally:
        for task in waiting:
            task.cancel()
        for task in waiting:
            with suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                await task
