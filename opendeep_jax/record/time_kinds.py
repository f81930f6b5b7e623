"""The kinds of time that a run's seconds are divided into: one table, from which every account and picture is made."""

from typing import NamedTuple


class Kind(NamedTuple):
    """One kind of time. A new one needs a line in KINDS, and `clock.counting(name)` where it is spent."""

    color: str
    """A color of the page's style sheet, as in `blue`, or half of it on the background, as in `pale blue`."""
    mark: str
    """One ASCII character for terminals without colors."""
    meaning: str
    is_measured: bool = True
    """False for what no process counts and only all starts together tell."""

    @property
    def css(self) -> str:
        """The color on a page."""
        color = f"var(--{self.color.removeprefix('pale ')})"
        return f"color-mix(in srgb,{color} 50%,var(--card))" if self.color.startswith("pale ") else color

    @property
    def terminal(self) -> str:
        """The color in a terminal, by rich's names."""
        color = TERMINAL[self.color.removeprefix("pale ")]
        if not self.color.startswith("pale "):
            return color
        return "white" if color == "bright_black" else f"bright_{color}"


TERMINAL = {
    "green": "green", "orange": "yellow", "yellow": "yellow", "violet": "magenta", "blue": "blue", "red": "red",
    "muted": "bright_black",
}  # fmt: skip
KINDS = {
    "step": Kind("green", "#", "steps whose updates the run still has: the goodput"),
    "data": Kind("orange", "-", "waiting for batches"),
    "compile": Kind("violet", ".", "compiling"),
    "evaluation": Kind("blue", ":", "evaluations and samples"),
    "checkpoint": Kind("pale blue", "~", "what saving kept training from, and waiting for the last save"),
    "restore": Kind("pale violet", "%", "reading checkpoints"),
    "start": Kind("muted", "&", "imports and preparation, until the first of the others"),
    "other": Kind("pale muted", "*", "the rest"),
    "waste": Kind("red", "+", "steps done twice or skipped, and waiting for their data", is_measured=False),
    "restart": Kind("pale red", "=", "from a start's last line to the next start", is_measured=False),
}
"""All kinds, in display order."""


def measured() -> list[str]:
    """Return the kinds that a process counts."""
    return [name for name, kind in KINDS.items() if kind.is_measured]
