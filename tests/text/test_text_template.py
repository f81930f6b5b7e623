"""Chat templates are programs of strangers: what they may do, and what they are kept from."""

import datetime

import pytest

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.text.chat_template import render_chat

MESSAGES = [{"role": "user", "content": "Hi & <bye>"}]


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ messages[0].content }}{{ bos_token }}", "Hi & <bye><s>"),
        ("{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n", "user\n"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi & <bye>"}'),
        ("{{ {'é': [1, 2]} | tojson(indent=1) }}", '{\n "é": [\n  1,\n  2\n ]\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{% if add_generation_prompt %}go{% endif %}{{ enable_thinking }}", "goFalse"),
        ("{{ '=' * 10 }}{{ 2 ** 10 }}{{ 3 * 4 }}", "==========102412"),
        ("{% if tools %}tools{% endif %}", ""),
    ],
)
def test_what_the_fields_templates_use_is_there(template, text):
    assert render_chat(template, MESSAGES, {"bos_token": "<s>"}, enable_thinking=False) == text


def test_the_date_is_today():
    year = str(datetime.datetime.now().year)
    assert render_chat("{{ strftime_now('%Y') }}", [], {}) == year


@pytest.mark.parametrize(
    "template, complaint",
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{% for %}", "no Jinja, line 1"),
        ("{{ missing.name }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ render.__globals__ }}", "cannot write"),
        ("{{ 'a' * 10**9 }}", "SecurityError"),
        ("{{ [[0] * 100000] * 100000 }}", "SecurityError"),
        ("{{ 10 ** (10 ** 10) }}", "SecurityError"),
        ("{{ 'a' ** 2 }}", "SecurityError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include 'x' %}", "cannot write"),
        ("{{ strftime_now(3) }}", "TypeError"),
    ],
)
def test_a_wrong_or_malicious_template_gives_one_sentence(template, complaint):
    with pytest.raises(ConfigError, match=complaint):
        render_chat(template, MESSAGES, {})
