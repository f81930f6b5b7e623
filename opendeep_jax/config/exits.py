"""Exit statuses of `opendeep`, which launchers and clusters decide by. docs/faults.md has the table."""

OK = 0
BUG = 1
"""Python's own, with a stack."""
MEND = 2
"""Input, a directory or a disk that the user has to mend; one paragraph says what."""
STOPPED = 3
"""The run stopped with a diagnosis that starting it again would not fix."""
RESUME = 75
"""Exit status of a run to start again with the same command; nothing is lost. sysexits' EX_TEMPFAIL."""
INTERRUPTED = 130
"""Ctrl-C; what was saved is intact, and the same command goes on."""


class Resume(Exception):
    """Exit with status RESUME after a request to stop or the loss of a peer; the message says which."""


class StopRequested(Resume):
    """A signal asked for it: no fault, however often it happens."""


class PeerEnded(Exception):
    """Exit as another process of the job did, with a status that starting again would not change."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Stopped(Exception):
    """Exit with status STOPPED; the message is the diagnosis, in one paragraph."""
