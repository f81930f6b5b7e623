"""Chat templates: Jinja programs from elsewhere that write messages as the text a model was trained on.

They run in Jinja's immutable sandbox, with the helpers that the field's templates expect and bounds on what they make.
"""

import datetime
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from opendeep_jax.config.checks import ConfigError

LONGEST_PROMPT = 1 << 24
"""Characters that a template may write."""
LONGEST_REPEAT = 1 << 20
"""Characters that a template's `*` may make of a text, and bits of its `**`."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str],
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
        template: A Jinja program.
        messages: As `{"role": "user", "content": "Hello"}`.
        special: Names of special tokens: bos_token, eos_token, ...
        add_generation_prompt: End where the model's answer begins.
        variables: What else the template knows, such as `enable_thinking`.

    Raises:
        ConfigError: the template is wrong, refuses the messages, or writes without end; a text is not Unicode.
    """
    check_text([list(messages), variables])
    variables = {"tools": None, "documents": None, **special, **variables}
    pieces, length = [], 0
    try:
        stream = _compiled(template).generate(
            messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **variables
        )
        for piece in stream:
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST_PROMPT:
                raise ConfigError(f"The chat template writes more than {LONGEST_PROMPT:,} characters: it is wrong.")
    except ConfigError:
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
    """Raises ConfigError for a text, alone or inside of lists and mappings, with surrogates: it is no Unicode."""
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


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context, operator, left, right):
        if _size(operator, left, right) > LONGEST_REPEAT:
            raise jinja2.sandbox.SecurityError(f"{operator} makes too much")
        return super().call_binop(context, operator, left, right)


def _size(operator: str, left: Any, right: Any) -> float:
    """Characters of `left * right`, or bits of `left ** right`; lists are not repeated, as they nest."""
    numbers = [side for side in (left, right) if isinstance(side, int | float)]
    if operator == "**":
        return abs(right) * math.log2(abs(left) + 2) if len(numbers) == 2 else math.inf
    if len(numbers) == 2:
        return 0
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
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
