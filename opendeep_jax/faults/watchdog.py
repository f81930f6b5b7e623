"""A thread that sees to it that no process waits for ever: for itself, or for another one.

Each process tells all others, every few seconds, what it is doing. Who is not heard of for `faults.peer_seconds` is
missing: its machine is down, or it is killed or stopped. Who is heard of and yet stays at one thing for
`faults.hang_seconds` hangs. Either way every process writes the stacks of all its threads to WORKDIR/stacks, says in
one paragraph who is missing or where each one is, and exits with RESUME: nothing that was saved is lost. Ages are
taken on this process's monotonic clock from when news arrived, so clocks that jump or differ do not matter.
"""

import contextlib
import faulthandler
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
from jax._src import distributed

from opendeep_jax.checkpoint.files import short
from opendeep_jax.config.exits import RESUME, PeerEnded, Resume
from opendeep_jax.config.operations import FaultsConfig
from opendeep_jax.faults.exit_notice import install_exit_notice
from opendeep_jax.parallel.distributed import announce_end, ended_peer, get_values, host_of, put_value
from opendeep_jax.record.events import record_event
from opendeep_jax.record.heartbeat import BEAT_SECONDS, beat

STACKS = "stacks"
SLOWER = {"compile": 10.0, "data preparation": 1000.0, "evaluation": 4.0, "replay": 10.0, "restore": 10.0}
"""Activities that may take this many times faults.hang_seconds."""
OUT_OF_TOUCH = "DEADLINE_EXCEEDED|UNAVAILABLE|timed out|timeout|connection (closed|reset|refused)|broken pipe"
"""Error messages of collectives whose peer does not answer."""


class Watchdog:
    """Context manager that watches this process and its peers.

        with Watchdog(workdir, config.faults) as watchdog:
            watchdog.doing("step", 12)

    Args:
        exit: ends the process; a test puts in its own.
    """

    def __init__(self, workdir: Path, faults: FaultsConfig, exit: Callable[[int], None] = os._exit):
        self.workdir, self.faults, self._exit = Path(workdir), faults, exit
        self._doing, self._step, self._since = "start", 0, time.monotonic()
        self._news: dict[int, tuple[str, float]] = {}  # of each peer: its last word, and when it came
        self._hosts: dict[str, str] = {}
        self._looking = False  # for the peer whose loss a failure may be
        self._answered = time.monotonic()  # when the coordination service last did
        self._ended_peer: PeerEnded | None = None
        self._ended = threading.Event()
        limits = [s for s in (faults.peer_seconds, faults.hang_seconds) if s]
        self._interval = min(max(min(limits, default=60.0) / 10, 0.1), BEAT_SECONDS)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        # Of its own, as it waits for ever where the service's machine is stopped.
        self._talker = threading.Thread(target=self._exchange_heartbeats, name="watchdog's talker", daemon=True)
        self._dismiss_notice: Callable[[], None] = lambda: None

    def __enter__(self):
        process = jax.process_index()
        directory = self.workdir / STACKS
        directory.mkdir(exist_ok=True)
        self._stacks = directory / f"process_{process}.txt"
        self._file = open(self._stacks, "w", encoding="utf-8")
        self._had_faulthandler = faulthandler.is_enabled()
        faulthandler.enable(self._file)
        if process:
            address = distributed.global_state.coordinator_address or ""
            self._dismiss_notice = install_exit_notice(process, address, host_of(0), str(self._stacks))
        self._answered = time.monotonic()
        self._beat()
        self._thread.start()
        if jax.process_count() > 1:
            self._talker.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join(timeout=5)
        self._beat(ended=True)
        self._dismiss_notice()
        if self._had_faulthandler:
            faulthandler.enable(sys.__stderr__)  # in a notebook, sys.stderr is no file of the system
        else:
            faulthandler.disable()
        self._file.close()
        with contextlib.suppress(OSError):  # others' stacks may be there, or the directory is gone
            if not self._stacks.stat().st_size:
                self._stacks.unlink()
                self._stacks.parent.rmdir()

    def doing(self, what: str, step: int | None = None) -> None:
        """Record the loop's current activity and step."""
        self._doing, self._step, self._since = what, self._step if step is None else step, time.monotonic()

    def _beat(self, ended: bool = False) -> None:
        if not jax.process_index():
            beat(self.workdir, self._doing, self._step, ended)

    def lost_peer(self, error: BaseException) -> Resume | PeerEnded | None:
        """Return which peer caused a failure of this process, if any; wait as long as it takes to know.

        A collective fails as soon as a peer's connection closes; the peer's silence tells later whose it was. Where all
        are still heard of, it was the network between them, or one that came too late.
        """
        if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError | ValueError | RuntimeError):
            return None
        self._looking = True
        end = time.monotonic() + self.faults.peer_seconds + 2 * self._interval
        while time.monotonic() < end:
            if self._ended_peer:
                return self._ended_peer
            if missing := self._missing():
                traceback.print_exception(error, file=self._file)
                text = self._diagnosis(missing)
                self._write_traces(text, missing)
                return Resume(text)
            time.sleep(min(self._interval, 1.0))
        if not re.search(OUT_OF_TOUCH, str(error), re.IGNORECASE):
            return None
        traceback.print_exception(error, file=self._file)
        text = (
            f"process {jax.process_index()} could not exchange arrays with the others ({short(error)}), and all are "
            "still heard of: one of them came too late, or the network between them broke. The stacks are in "
            f"{self._stacks}. Nothing that was saved is lost: start the same command again. If it comes again, look "
            "for a machine that is much busier than the others, and at their network."
        )
        self._write_traces(text, [])
        return Resume(text)

    def _watch(self) -> None:
        beaten = time.monotonic()
        while not self._ended.wait(min(self._interval, 1.0)):
            if time.monotonic() - beaten > 0.9 * BEAT_SECONDS:
                self._beat()
                beaten = time.monotonic()
            missing = self._missing()
            if self._looking:
                continue
            if self._ended_peer and not self._ended.wait(1.0):  # which the main thread may be about to do by itself
                self._give_up(str(self._ended_peer), [], self._ended_peer.status)
            patience = self.faults.hang_seconds * SLOWER.get(self._doing, 1.0)
            if missing:
                self._give_up(self._diagnosis(missing), missing)
            elif patience and time.monotonic() - self._since > patience:
                self._give_up(self._hang(patience), [])

    def _exchange_heartbeats(self) -> None:
        """Exchange heartbeats with the other processes until the end."""
        process, told = jax.process_index(), 0
        due = time.monotonic()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone: it no longer answers, that is all
            while not self._ended.wait(min(self._interval, 1.0)):
                self._check_peer_exits()
                if time.monotonic() < due:
                    continue
                due, told = time.monotonic() + self._interval, told + 1
                put_value(f"beat/{process}", f"{told}|{self._step}|{self._doing}")
                heard = get_values("beat")
                if len(self._hosts) < jax.process_count():
                    self._hosts = get_values("host")
                self._answered = now = time.monotonic()
                for peer in range(jax.process_count()):
                    word = heard.get(str(peer), "")
                    if self._news.get(peer, (None, 0))[0] != word:
                        self._news[peer] = word, now

    def _check_peer_exits(self) -> None:
        self._ended_peer = self._ended_peer or ended_peer()

    def _missing(self) -> list[int]:
        """Return the processes whose last heartbeat is too old."""
        if jax.process_count() == 1 or not self.faults.peer_seconds:
            return []
        now = time.monotonic()
        if jax.process_index() and now - self._answered > self.faults.peer_seconds:
            return [0]  # which answers for all; of the others nothing is known
        return [
            peer
            for peer, (_, at) in list(self._news.items())
            if peer != jax.process_index() and now - at > self.faults.peer_seconds
        ]

    def _diagnosis(self, missing: list[int]) -> str:
        names = " and ".join(f"process {peer} on {self._host(peer)}" for peer in missing)
        return (
            f"{names} {'was' if len(missing) == 1 else 'were'} not heard of for {self.faults.peer_seconds:g} seconds: "
            f"the machine is down, or the process is killed or stopped. Process {jax.process_index()} was at step "
            f"{self._step:,} ({self._doing}) and ends; its stacks are in {self._stacks}. Nothing that was saved is "
            "lost: start the same command again, without that machine if it stays away."
        )

    def _hang(self, patience: float) -> str:
        text = f"{self._doing} of step {self._step:,} has not ended within {patience:g} seconds"
        places = {peer: word.split("|")[1:] for peer, (word, _) in sorted(self._news.items()) if word}
        others = {peer: place for peer, place in places.items() if place != [str(self._step), self._doing]}
        if others:
            behind = [f"process {p} on {self._host(p)} at step {s} ({d})" for p, (s, d) in others.items()]
            text += f", while elsewhere: {'; '.join(behind[:8])}"
        return (
            f"{text}. Process {jax.process_index()} ends; its stacks are in {self._stacks}. Nothing that was saved is "
            "lost: start the same command again. If that is how long it takes, raise faults.hang_seconds."
        )

    def _host(self, peer: int) -> str:
        return self._hosts.get(str(peer), "an unknown host")

    def _give_up(self, text: str, missing: list[int], status: int = RESUME) -> None:
        sys.stderr.write(f"\nopendeep train: {text}\n")
        if status == RESUME:
            self._write_traces(text, missing)
        else:
            announce_end(status, text)
        self._beat(ended=True)
        self._dismiss_notice()
        self._exit(status)

    def _write_traces(self, text: str, missing: list[int]) -> None:
        """Write this process's stacks, and the event if no earlier process is left to write it."""
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.flush()
        alive = [peer for peer in range(jax.process_count()) if peer not in missing]
        if jax.process_index() == min(alive):
            try:
                kind = "lost_peer" if missing else "hang"
                record_event(self.workdir, kind, self._step, text, processes=missing)
            except OSError:
                pass  # the paragraph is on standard error
