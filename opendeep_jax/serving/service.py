"""The engine in a thread of its own, behind an interface for asyncio: jobs in, their progress out.

All methods but the thread's own are called from the event loop. The thread sleeps while there is nothing to do.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.generation.requests import SamplingParams

if TYPE_CHECKING:
    from opendeep_jax.generation.engine import Engine, RequestProgress
    from opendeep_jax.generation.scoring import Scored

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """The service takes no work now; the message says why, `retry_seconds` when to ask again."""

    retry_seconds = 5


class Full(Unavailable):
    """As many requests run and wait as the service takes."""

    retry_seconds = 1


class Failed(Exception):
    """The engine failed, or gave up a request; the message says why."""


class Limits(NamedTuple):
    """What an engine takes."""

    slots: int
    max_length: int
    """Prompt and answer together, in tokens."""
    vocab_size: int


@dataclasses.dataclass(eq=False)
class Ticket:
    """One prompt of a job, while it runs or waits."""

    job: "ServiceJob"
    index: int
    prompt: Sequence[int]
    params: SamplingParams
    request: Any = None
    """The engine's handle, once it is queued there."""


class ServiceJob:
    """Prompts that were submitted together: an async iterator of (index of the prompt, its progress), and a context.

    Leaving the context aborts what still runs, so that a client that goes frees its pages.

    Raises (while iterating):
        ConfigError: the engine refuses a prompt or its parameters.
        Failed: the engine failed, or the service ended before the job did.
    """

    def __init__(self, service: "EngineService", requests: Sequence[tuple[Sequence[int], SamplingParams]]):
        self._service = service
        self._events: asyncio.Queue[tuple[Ticket, RequestProgress | Exception]] = asyncio.Queue()
        self.open = {Ticket(self, index, prompt, params) for index, (prompt, params) in enumerate(requests)}

    async def __aenter__(self) -> "ServiceJob":
        return self

    async def __aexit__(self, *_) -> None:
        for ticket in list(self.open):
            self._service.abort(ticket)

    async def __aiter__(self) -> "AsyncIterator[tuple[int, RequestProgress]]":
        while self.open or not self._events.empty():
            ticket, event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            yield ticket.index, event

    def give(self, ticket: Ticket, event: "RequestProgress | Exception") -> None:
        """Takes one piece of progress. The event loop's alone to call."""
        if ticket in self.open:
            self._events.put_nowait((ticket, event))
            if isinstance(event, Exception) or event.finish:
                self.open.discard(ticket)

    def abort(self, index: int) -> None:
        """Stops one prompt, whose answer is complete already: nothing more of it comes."""
        for ticket in [ticket for ticket in self.open if ticket.index == index]:
            self._service.abort(ticket)


def no_warm_up(engine: "Engine") -> Iterable[str]:
    """Nothing."""
    return ()


class EngineService:
    """Owns an engine in one thread.

    Args:
        make_engine: Makes the engine; called in the thread, and again after the engine failed.
        max_waiting: Prompts that may wait for a slot; more are refused with `Full`.
        warm_up: What to do with a new engine while it has no requests: does some more each time that it is asked for
            its next item, which says what comes next.
    """

    def __init__(
        self,
        make_engine: Callable[[], "Engine"],
        max_waiting: int = 256,
        warm_up: Callable[["Engine"], Iterable[str]] = no_warm_up,
    ):
        self._make_engine, self._warm_up = make_engine, warm_up
        self._to_prepare: Iterator[str] = iter(())
        self._max_waiting = max_waiting
        self.engine: Engine | None = None
        """None until it is made, and after a failure until it is made again."""
        self.limits: Limits | None = None
        """Of the engine, or of the last one there was."""
        self.failure = ""
        """What the engine failed with; empty once it works again."""
        self.refusal: Exception | None = None
        """Why the engine could not be made in the first place."""
        self.preparing = ""
        """What `warm_up` is at; empty before, and when all is done."""
        self.draining = False
        self._tickets: set[Ticket] = set()
        self._scoring = 0
        self._running: dict[int, Ticket] = {}  # by id of the engine's request, which may be hashable or not
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._made, self._idle = asyncio.Event(), asyncio.Event()

    def start(self) -> None:
        """Starts the thread, which makes the engine. Called once, inside the event loop that the jobs belong to."""
        self._loop = asyncio.get_running_loop()
        self._idle.set()
        self._thread.start()

    async def made(self) -> None:
        """Waits until the engine is there or could not be made."""
        await self._made.wait()

    @property
    def ready(self) -> bool:
        """Whether work is taken."""
        return self.engine is not None and not self.draining

    @property
    def at_work(self) -> bool:
        """Whether the thread has not ended: after `drain`, it is in the middle of a long program."""
        return self._thread.is_alive()

    @property
    def open_prompts(self) -> int:
        """Prompts that run or wait."""
        return len(self._tickets)

    def submit(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> ServiceJob:
        """Queues prompts (token ids) with their parameters, all or none.

        Raises:
            Full: too many wait already.
            Unavailable: the service is draining, or its engine is not there.
        """
        if self.draining:
            raise Unavailable("The server is shutting down and takes no new requests.")
        if self.limits is None:
            raise Unavailable("The model is still being made ready. Ask again in a few seconds.")
        self._check_room(len(requests))
        job = ServiceJob(self, requests)
        self._tickets |= job.open
        if job.open:
            self._idle.clear()
        for ticket in sorted(job.open, key=lambda ticket: ticket.index):
            self._post(lambda ticket=ticket: self._admit(ticket))
        return job

    def abort(self, ticket: Ticket) -> None:
        """Gives a prompt up; its pages are free after the engine's next step, and nothing more of it comes."""
        ticket.job.open.discard(ticket)
        if ticket in self._tickets:
            self._post(lambda: self._abort(ticket))

    async def score(self, sequences: list[Sequence[int]], prefix_lengths: list[int], top: int = 0) -> "list[Scored]":
        """`Engine.score` in the engine's thread, a sequence between two steps. Raises as it and `submit` do."""
        if not self.ready:
            raise Unavailable("The server takes no requests now.")
        self._check_room(len(sequences))
        self._scoring += len(sequences)
        try:
            pairs = zip(sequences, prefix_lengths, strict=True)
            return [
                await self._in_thread(lambda engine, pair=pair: engine.score(*([x] for x in pair), top)[0])
                for pair in pairs
            ]
        finally:
            self._scoring -= len(sequences)

    def _check_room(self, count: int) -> None:
        taken = len(self._tickets) + self._scoring
        room = self._max_waiting + self.limits.slots - taken
        if count > room:
            raise Full(
                f"{taken} prompts run or wait, and there is room for {max(room, 0)} more; this request has {count}. "
                "Ask again in a moment."
            )

    async def _in_thread(self, work: Callable[["Engine"], Any]) -> Any:
        """The result of work on the engine, done in its thread between two steps."""
        answer = self._loop.create_future()

        def settle(result, error) -> None:
            if not answer.done():
                answer.set_exception(error) if error else answer.set_result(result)

        def run() -> None:
            result = error = None
            try:
                if self.engine is None:
                    raise Failed(f"The engine failed: {self.failure}")
                result = work(self.engine)
            except Exception as raised:
                error = raised
            self._tell(settle, result, error)

        self._post(run)
        return await answer

    async def drain(self, seconds: float) -> None:
        """Takes no more work, lets what runs and waits finish for so many seconds, aborts the rest, ends the thread."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        for ticket in list(self._tickets):
            self._finish(ticket, Failed("The server is shutting down, and ended this answer before it was complete."))
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, 30)

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(action)
            self._wake.notify()

    def _finish(self, ticket: Ticket, event: "RequestProgress | Exception") -> None:
        """Hands an event over and, if it is the last, forgets the ticket. In the event loop."""
        ticket.job.give(ticket, event)
        if isinstance(event, Exception) or event.finish:
            self._tickets.discard(ticket)
            if not self._tickets:
                self._idle.set()

    # From here on: the engine's thread.

    def _run(self) -> None:
        self._make()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._inbox or self._closing or self._busy() or self.preparing)
                actions = [self._inbox.popleft() for _ in range(len(self._inbox))]
                if self._closing and not actions:
                    return
            if self.engine is None and actions:
                self._make()
            for action in actions:
                action()
            if self.engine is not None:
                self._step()

    def _busy(self) -> bool:
        return self.engine is not None and self.engine.busy

    def _make(self) -> None:
        try:
            engine = self._make_engine()
            self._to_prepare = iter(self._warm_up(engine))
            self.preparing = next(self._to_prepare, "")
            self.limits = Limits(engine.slots, engine.capacity, engine.vocab_size)
            self.engine = engine
        except Exception as error:
            self.failure = _said(error)
            if self._made.is_set():
                log.exception("the engine could not be made again")
            else:
                self.refusal = error
        self._tell(self._made.set)

    def _step(self) -> None:
        progress = []
        try:
            if self.preparing and not self.engine.busy:
                self._prepare()
            else:
                progress = self.engine.step()
        except Exception as error:
            log.exception("the engine failed; its requests fail, and it is made again")
            self._give_up(_said(error))
        else:
            if progress:
                self.failure = ""
                self._tell(self._deliver, [(self._ticket(each), each) for each in progress])
        if self.engine is None:  # made again only here, where nothing holds on to the memory of the one that failed
            self._make()

    def _prepare(self) -> None:
        """Some more of the warm-up. If it fails, the engine is made again without."""
        try:
            self.preparing = next(self._to_prepare, "")
        except Exception:
            self._warm_up = no_warm_up
            raise

    def _give_up(self, reason: str) -> None:
        """All that runs fails, and the engine goes: what a failed step leaves behind is not to be trusted."""
        self.failure, self.engine, self.preparing = reason, None, ""
        failed = [(ticket, Failed(f"The engine failed: {reason}")) for ticket in self._running.values()]
        self._running.clear()
        self._tell(self._deliver, failed)

    def _ticket(self, progress: "RequestProgress") -> Ticket | None:
        key = id(progress.request)
        return self._running.pop(key, None) if progress.finish else self._running.get(key)

    def _admit(self, ticket: Ticket) -> None:
        if ticket not in ticket.job.open:  # its client went while it was on the way
            self._tell(self._finish, ticket, Failed("The request was given up."))
            return
        try:
            if self.engine is None:
                raise Failed(f"The engine failed: {self.failure}")
            ticket.request = self.engine.submit(ticket.prompt, ticket.params)
        except Exception as error:
            if not isinstance(error, ConfigError | Failed):
                log.exception("the engine did not take a request")
                error = Failed(f"The engine did not take the request: {_said(error)}")
            self._tell(self._finish, ticket, error)
        else:
            self._running[id(ticket.request)] = ticket

    def _abort(self, ticket: Ticket) -> None:
        if ticket.request is not None and id(ticket.request) in self._running:
            self.engine.abort(ticket.request)

    def _tell(self, function: Callable, *arguments) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, events: "Sequence[tuple[Ticket | None, RequestProgress | Exception]]") -> None:
        """In the event loop: one call for all that a step brought."""
        for ticket, event in events:
            if ticket is not None:
                self._finish(ticket, event)


def _said(error: Exception) -> str:
    """An error in one short line; what jaxlib says of a failed program can be pages."""
    first = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
