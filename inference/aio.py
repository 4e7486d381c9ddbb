"""An engine for asyncio: tensor work on threads of its own, never on the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from schemas.task import Generate, Progress, Result, Task

THREADS = 2
"""The engine lets one task at its tensors; a second thread lets the next one in while the files of
the last are encoded."""


class AsyncEngine:
    """Wraps any blocking `Generate`. Cancelling a call stops the engine between two steps and returns
    only when it has stopped, so that nothing runs on unseen."""

    def __init__(self, generate: Generate, threads: int = THREADS) -> None:
        self._generate = generate
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="engine")

    async def __call__(self, task: Task, on_progress: Callable[[Progress], None]) -> Result:
        """on_progress is called on the event loop."""
        loop = asyncio.get_running_loop()
        stop = threading.Event()

        def report(progress: Progress) -> None:
            loop.call_soon_threadsafe(on_progress, progress)

        future = loop.run_in_executor(
            self._threads, lambda: self._generate(task, report, stop.is_set)
        )
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            stop.set()
            # TaskCancelled, most likely: asked for, so nobody's surprise.
            future.add_done_callback(lambda future: future.cancelled() or future.exception())
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            raise

    def close(self) -> None:
        """Wait for the threads to end."""
        self._threads.shutdown()
