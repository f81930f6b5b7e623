"""Chat templates: Jinja programs from elsewhere that write messages as the text a model was trained on.

They run in Jinja's immutable sandbox, with the helpers that the field's templates expect and bounds on what they make.
"""

import datetime
import functools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from opendeep_jax.config.checks import ConfigError

LONGEST_PROMPT = 1 << 24
"""Characters that a template may write."""
LONGEST_REPEAT = 1 << 20
"""Characters that a template's `*` may make of a text, and bits of its `**`; and what it may pad a text to."""
MOST_STEPS = 1 << 19
"""Rounds of loops and calls of a template: some seconds."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str],
    add_generation_prompt: bool = True,
    seconds: float = math.inf,
    **variables: Any,
) -> str:
    """Return the text of a conversation.

    Args:
        template: A Jinja program.
        messages: As `{"role": "user", "content": "Hello"}`.
        special: Names of special tokens: bos_token, eos_token, ...
        add_generation_prompt: End where the model's answer begins.
        seconds: The template may take so long.
        variables: What else the template knows, such as `enable_thinking`.

    Raises:
        ConfigError: the template is wrong, refuses the messages, or goes on without end; a text is not Unicode.
        TimeoutError: the time is over.
    """
    check_text([list(messages), variables])
    variables = {"tools": None, "documents": None, **special, **variables}
    pieces, length = [], 0
    _running.steps, _running.until = 0, time.monotonic() + seconds
    try:
        stream = _compiled(template).generate(
            messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **variables
        )
        for piece in stream:
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST_PROMPT:
                raise ConfigError(f"The chat template writes more than {LONGEST_PROMPT:,} characters: it is wrong.")
    except (ConfigError, TimeoutError):
        raise
    except _Refused as error:
        raise ConfigError(f"The chat template refuses these messages: {error}") from error
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"The chat template is no Jinja, line {error.lineno}: {error.message}. Fix it.") from error
    except Exception as error:  # a template is a program of someone else's: whatever fails in it is its own
        raise ConfigError(
            f"The chat template cannot write these messages ({type(error).__name__}: {error}). Check that each has a "
            "role and a text that the model knows."
        ) from error
    return "".join(pieces)


def check_text(value: Any) -> None:
    """Raise ConfigError for a text, alone or inside of lists and mappings, with surrogates: it is no Unicode."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"The text has half a surrogate pair at character {error.start}, which is no character. "
                    "Send valid Unicode."
                ) from error
        elif isinstance(value, Mapping):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            pending += value


class _Refused(Exception):
    pass


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's own words for training; the text is the same."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


_running = threading.local()
"""State of the template that this thread runs: the steps so far, and until when it may run."""


def _step() -> str:
    """Count a step of the running template. Raises ConfigError after too many, TimeoutError when its time is over."""
    _running.steps += 1
    if _running.steps > MOST_STEPS:
        raise ConfigError(
            f"The chat template takes more than {MOST_STEPS:,} steps for these messages: it does not end, or they are "
            "too many. Send fewer, or correct the template."
        )
    if not _running.steps % 256 and time.monotonic() > _running.until:
        raise TimeoutError
    return ""


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "+", "%"])
    step = staticmethod(_step)

    def call_binop(self, context, operator, left, right):
        if operator == "+":
            _check_size("+", [left, right])
        elif operator == "%":
            _check_size("format", [left])
        elif _size(operator, left, right) > LONGEST_REPEAT:
            raise jinja2.sandbox.SecurityError(f"{operator} makes too much")
        return super().call_binop(context, operator, left, right)

    def call(self, context, function, *given, **named):
        _step()
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps `format`
        if isinstance(text := getattr(method, "__self__", None), str):
            _check_size(method.__name__, [text, *given, *named.values()])
        return super().call(context, function, *given, **named)

    def concatenated(self, *values):
        """The operator `~`."""
        texts = [str(value) for value in values]
        _check_size("~", texts)
        return "".join(texts)

    def _parse(self, source, name, filename):
        """Parse as Jinja does, but count a step in each loop iteration and macro, and make `~` a call of ours."""
        tree = _Concatenations().visit(super()._parse(source, name, filename))
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, nodes.ExprStmt(_own_call("step", [])).set_lineno(node.lineno))
        return tree


class _Concatenations(NodeTransformer):
    def visit_Concat(self, node):  # noqa: N802  # Jinja's name
        self.generic_visit(node)
        return _own_call("concatenated", node.nodes)


def _own_call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    """A call of the environment's, which no variable of a template can hide."""
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice",
    "round", "truncate", "tojson"})  # fmt: skip
"""Filters and methods of texts that make as much as a number says."""
GROWING = ("replace", "join", "format")


def _check_size(name: str, values: Sequence[Any]) -> None:
    """Raise SecurityError where an operator, filter or method would make much of little."""
    texts = [value for value in values if isinstance(value, str)]
    lists = [value for value in values if isinstance(value, Sized) and not isinstance(value, str)]
    size = 0
    if name in PADDING:
        size = max((abs(value) for value in values if isinstance(value, int)), default=0) * (
            LONGEST_PROMPT // LONGEST_REPEAT
        )
    elif name in ("+", "~"):
        size = sum(map(len, texts)) + sum(map(len, lists)) * (LONGEST_PROMPT // LONGEST_REPEAT)
    elif name == "replace" and len(texts) > 2:
        size = texts[0].count(texts[1]) * len(texts[2])
    elif name == "join" and texts:
        size = sum(map(len, lists)) * len(texts[0]) or math.prod(map(len, texts))
    elif name == "format" and texts and re.search(r"\d{7}|\*", texts[0]):
        size = math.inf
    if size > LONGEST_PROMPT:
        raise jinja2.sandbox.SecurityError(f"{name} makes too much")


def _checked(name: str, plain: Callable) -> Callable:
    """Return a filter behind `_check_size`."""

    @functools.wraps(plain)
    def checked(*given, **named):
        _step()
        given = [list(value) if isinstance(value, Iterator) else value for value in given]  # so that it has a length
        _check_size(name, [*given, *named.values()])
        return plain(*given, **named)

    return checked


def _size(operator: str, left: Any, right: Any) -> float:
    """Characters of `left * right`, or bits of `left ** right`; lists are not repeated, as they nest."""
    numbers = [side for side in (left, right) if isinstance(side, int | float)]
    if operator == "**":
        return abs(right) * math.log2(abs(left) + 2) if len(numbers) == 2 else math.inf
    if len(numbers) == 2:
        return sum(side.bit_length() for side in numbers if isinstance(side, int))
    texts = [side for side in (left, right) if isinstance(side, str)]
    return len(texts[0]) * numbers[0] if texts and numbers else math.inf


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])

    def raise_exception(message):
        raise _Refused(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    for name in {*PADDING, *GROWING} & set(environment.filters):
        environment.filters[name] = _checked(name, environment.filters[name])
    environment.globals.pop("lipsum")
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
