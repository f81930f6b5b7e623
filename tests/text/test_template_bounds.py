"""Chat templates are programs of others': their steps, time and memory are bounded."""

import pytest

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.text import chat_template
from opendeep_jax.text.chat_template import render_chat

ASK = [{"role": "user", "content": "hi"}]
GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}"
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a loop with a variable of the counter's name": "{% set step = namespace %}{% set environment = 1 %}"
    "{% for i in range(99999) %}{% endfor %}",
    "loops of their own": "{% for m in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
    "texts by ~": GROW % ("'ab'", "ns.x ~ ns.x"),
    "texts by +": GROW % ("'ab'", "ns.x + ns.x"),
    "lists by +": GROW % ("[1]", "ns.x + ns.x"),
    "numbers": GROW % ("3", "ns.x * ns.x"),
    "replace": GROW % ("'aa'", "ns.x.replace('a', 'aa')"),
    "replace, the filter": GROW % ("'aa'", "ns.x|replace('a', 'aa')"),
    "center": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "%": "{{ '%999999999d' % 1 }}",
    "indent": "{{ messages|tojson(indent=10**9) }}",
    "join": "{{ range(99999)|join('a' * 100000) }}",
    "join of what has no length": "{{ range(99999)|map('string')|join('a' * 100000) }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_takes_without_end_is_refused(template, monkeypatch):
    monkeypatch.setattr(chat_template, "MOST_STEPS", 20_000)
    with pytest.raises(ConfigError, match="steps|makes too much|recursion"):
        render_chat(template, ASK, {})


def test_a_template_ends_when_its_time_is_over():
    with pytest.raises(TimeoutError):
        render_chat(ENDLESS["loops"], ASK, {}, seconds=0.05)


def test_what_templates_do_is_as_before():
    template = "{% for m in messages %}{{ loop.index ~ '/' ~ messages|length }} {{ m.content.replace('h', 'H') }}\
{{ '%s' % 'x' }}{{ ['a', 'b']|join(', ') }}{{ none ~ 1 }}{% if loop.last %}.{% endif %}{% endfor %}"
    assert render_chat(template, ASK, {}) == "1/1 Hixa, bNone1."
    many = [{"role": "user", "content": "word " * 50}] * 2000
    assert len(render_chat("{% for m in messages %}{{ m.content|trim }}{% endfor %}", many, {})) == 2000 * 249
