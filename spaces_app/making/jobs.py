"""Let visitors take turns: a queue for all, limits for each, and an end to work that nobody waits for."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address, ip_network
from itertools import count
from operator import itemgetter
from typing import Any, TypeVar

import anyio
import gradio as gr
from gradio.context import LocalContext
from shelf import WORKERS, refused

T = TypeVar("T")

OF_ADDRESS, OF_ALL = 12, 18
"""Most jobs of one address, and of all, in a line. Each takes one of gradio's 40 places, so some of these stay free."""
LOOK = 0.25  # seconds between two looks at the queue

_numbers = count()


@dataclass(eq=False)
class Job:
    """The work that one visitor has asked for."""

    session: str
    address: str
    key: str = field(default_factory=lambda: str(next(_numbers)))
    stop: threading.Event = field(default_factory=threading.Event)
    running: bool = False


class Line:
    """A queue in which visitors take turns; visitors with many jobs queue behind others' first jobs."""

    def __init__(self, places: int, of_session: int) -> None:
        self._places, self._of_session, self._lock = places, of_session, threading.Lock()
        self._jobs: list[Job] = []

    @contextmanager
    def entered(self, request: gr.Request | None) -> Iterator[Job]:
        """Queue a job of a visitor, or refuse one too many; the job leaves and is stopped at the end."""
        job = Job((request and request.session_hash) or "", address_of(request))
        with self._lock:
            if sum(other.session == job.session != "" for other in self._jobs) >= self._of_session:
                raise refused(f"You have {self._of_session} requests under way. Wait for one to end, or press Stop.")
            if sum(other.address == job.address for other in self._jobs) >= OF_ADDRESS or len(self._jobs) >= OF_ALL:
                raise refused("Too many requests are waiting. Try again in a minute.")
            self._jobs.append(job)
        try:
            yield job
        finally:
            job.stop.set()
            with self._lock:
                self._jobs.remove(job)

    async def turn(self, job: Job) -> AsyncIterator[int]:
        """Yield the place in the queue, from 1, until the job may run or is stopped."""
        while not job.stop.is_set() and (place := self._place(job)):
            yield place
            await anyio.sleep(LOOK)

    def _place(self, job: Job) -> int:
        """Start the job if it is its turn, and return its place among those that wait, or 0."""
        with self._lock:
            running = [other for other in self._jobs if other.running]
            asked, turns = Counter(other.address for other in running), []
            for other in (other for other in self._jobs if not other.running):
                turns.append((asked[other.address], other))
                asked[other.address] += 1
            order = [other for _, other in sorted(turns, key=itemgetter(0))]  # by arrival where they are equal
            job.running = job.running or order.index(job) < self._places - len(running)
            return 0 if job.running else 1 + order.index(job)

    def stop(self, request: gr.Request) -> None:
        """Stop the jobs of a visitor; a request without a session stops nothing, since it could be anybody's."""
        for job in list(self._jobs):
            if job.session and job.session == request.session_hash:
                job.stop.set()

    def stop_of(self, key: str) -> threading.Event:
        """Return the event that stops a job; another process, as on ZeroGPU, does not see it."""
        return next((job.stop for job in list(self._jobs) if job.key == key), threading.Event())


MATCHES, SHORT = Line(WORKERS, of_session=2), Line(WORKERS, of_session=8)


def address_of(request: gr.Request | None) -> str:
    """Return the address of a visitor; in a Space, the last public one that the proxies in front of it have noted."""
    noted = request.headers.get("x-forwarded-for", "") if request and os.environ.get("SPACE_ID") else ""
    own = request.client.host if request and request.client else ""
    for text in (*reversed(noted.split(",")), own):
        with suppress(ValueError):
            address = ip_address(text.strip())
            if address.is_global or text is own:  # a provider gives a whole network of IPv6 to one customer
                return str(ip_network((address, 64), strict=False) if isinstance(address, IPv6Address) else address)
    return own


async def soon(work: Callable[..., T], *given: Any) -> T:
    """Do short work in its turn, in another thread."""
    with SHORT.entered(LocalContext.request.get(None)) as job:
        async for _ in SHORT.turn(job):
            pass
        return await anyio.to_thread.run_sync(work, *given)


async def followed(states: Generator[T]) -> AsyncIterator[T]:
    """Yield what a blocking generator yields, and close it at the end."""
    end: Any = object()
    try:
        while (state := await anyio.to_thread.run_sync(next, states, end)) is not end:
            yield state
    finally:
        with anyio.CancelScope(shield=True), suppress(ValueError):  # it may be at work, until it sees its stop event
            await anyio.to_thread.run_sync(states.close)
