"""`opendeep chat` in a terminal, or in a pipe."""

import contextlib
import os
import re
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.serving.conversation import Conversation

HELP = """\
/reset   forget what was said, and begin anew
/help    this list
/quit    end; so does Ctrl-D
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one."""

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that would steer the terminal rather than be shown: a model may say anything."""


def chat(conversation: Conversation, name: str) -> None:
    """Chat until /quit or the end of the input."""
    console = Console(highlight=False)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` a history and editing
    console.print(Text(f"{name}. /help for help.", style="dim"))
    while True:
        try:
            text = _read()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print(Text("\nCtrl-D or /quit ends the chat.", style="dim"))
            continue
        match text.strip():
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/reset":
                conversation.messages = []
                console.print(Text("A new conversation.", style="dim"))
            case "/help":
                console.print(Text(HELP, style="dim"))
            case command if re.fullmatch(r"/\w+", command):
                console.print(Text(f"There is no command {command}. /help lists them.", style="dim"))
            case _:
                try:
                    answer(conversation, text, console)
                except ConfigError as error:
                    console.print(Text(f"{error} /reset begins a new one.", style="red"))


def answer(conversation: Conversation, text: str, console: Console) -> None:
    """Show the answer to one question while it is written; Ctrl-C stops it.

    On a terminal thinking comes first, dimmed. Elsewhere standard output has the answer alone, and thinking goes to
    standard error.
    """
    shown = console.is_terminal
    begun, pieces, thinking = 0.0, 0, False

    def show(said: str, style: str = "") -> None:
        console.print(Text(CONTROLS.sub("\ufffd", said), style=style), end="", soft_wrap=True)

    with _interruptible() as stopped:
        for piece in conversation.ask(text, stopped):
            begun = begun or time.perf_counter()
            pieces += 1
            if piece.reasoning:
                thinking = True
                if shown:
                    show(piece.reasoning, "dim italic")
                else:
                    sys.stderr.write(piece.reasoning)
                    sys.stderr.flush()
            for call in piece.calls:  # there is nothing here to be called, so it is shown
                (show if shown else sys.stderr.write)(call["function"].get("name", "") + call["function"]["arguments"])
            if piece.text:
                if thinking:
                    console.print("\n") if shown else print(file=sys.stderr)
                    thinking = False
                if shown:
                    show(piece.text)
                else:
                    sys.stdout.write(piece.text)
                    sys.stdout.flush()
    console.print()
    if shown:
        seconds = time.perf_counter() - begun if begun else 0.0
        speed = f"{pieces / seconds:.1f} tokens/s" if seconds > 0 else ""
        note = ", ".join(filter(None, ("stopped" if stopped() else "", speed)))
        console.print(Text(note, style="dim"))


def piped_input() -> str | None:
    """Return the text piped or redirected to this program, or None. Raises ConfigError unless it is UTF-8 text."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no standard input at all
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return None
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not text in UTF-8 ({error}). Pipe text.") from error


def _read() -> str:
    """One question. Raises EOFError at the end of the input."""
    text = input("> ")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + input(". ")
    # What a terminal of another encoding sent would be half a character, which no tokenizer takes.
    return text.encode("utf-8", "replace").decode("utf-8")


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside only says so, as a step of the engine that is cut off would leave it half done; a second one ends.

    Outside the main thread signals stay as they are.
    """
    interrupted = threading.Event()

    def note(*_) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    if threading.current_thread() is not threading.main_thread():
        yield interrupted.is_set
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted.is_set
    finally:
        signal.signal(signal.SIGINT, before)
