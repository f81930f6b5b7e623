"""Exit statuses of `opendeep`, which launchers and clusters decide by. docs/faults.md has the table."""

OK = 0
BUG = 1
"""Python's own, with a stack."""
MEND = 2
"""Input, a directory or a disk that the user has to mend; one paragraph says what."""
STOPPED = 3
"""The run stopped with a diagnosis that starting it again would not fix."""
RESUME = 75
"""Nothing is lost and nothing is wrong with the run: start the same command again. sysexits' EX_TEMPFAIL."""
INTERRUPTED = 130
"""Ctrl-C; what was saved is intact, and the same command goes on."""


class Resume(Exception):
    """Ends this process with status RESUME: it was told to stop, or lost a peer. The message says which."""


class ToldToStop(Resume):
    """A signal asked for it: no fault, however often it happens."""


class PeerEnded(Exception):
    """Ends this process as another one of the job has ended: with a status that starting again would not change."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Stopped(Exception):
    """Ends this process with status STOPPED; the message is the diagnosis, in one paragraph."""
