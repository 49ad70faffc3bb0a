"""Chat templates that compute too much end soon, with one error; the dialect is what transformers renders."""

from __future__ import annotations

import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.errors import CheckpointError, RequestError
from gemcutter.text.chat import ChatTemplate
from gemcutter.text.template_sandbox import MAX_SOURCE
from gemcutter.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(DEMO_FOLDER)
TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " Well? "}, {"role": "user", "content": "Yes"}]
SECONDS = 60.0  # against a hang; how long it really takes depends on what else runs

HOSTILE = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in 'x' * 1000 %}{% for b in 'x' * 1000 %}{% for c in 'x' * 1000 %}{% endfor %}{% endfor %}{% endfor %}",
    "{% set big = range(99999) | list %}{% for i in big recursive %}{{ loop(big) if loop.depth < 3 }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ lipsum(n=10000000) }}",
    "{{ 9 ** (9 ** 9) }}",
    '{{ "%1000000000d" | format(1) }}',
    '{{ "%1000000000d" % 1 }}',
    '{{ "%*d" % (1000000000, 1) }}',
    '{{ "{:1000000000}".format(1) }}',
    '{{ "{:{w}}".format(1, w=1000000000) }}',
    '{{ "x" * 10000000000 }}',
    "{{ [0] * 10000000000 }}",
    '{{ "x".ljust(10000000000) }}',
    '{{ "x" | center(10000000000) }}',
    '{{ ("x" * 1000) | indent(10000000000, true) }}',
    '{{ ("\\t" * 10000000).expandtabs(10000) }}',
    '{% set ns = namespace(x="x") %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}',
    '{% set ns = namespace(x="x") %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}',
    '{% set ns = namespace(x="x") %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}',
    '{% set ns = namespace(x="x") %}{% for i in range(60) %}{% set ns.x = ns.x | replace("x", "xx") %}{% endfor %}',
    '{% set ns = namespace(x="x") %}{% for i in range(60) %}{% set ns.x = ns.x.replace("x", "xx") %}{% endfor %}',
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x > 1 }}",
    '{% set ns = namespace(x=["lol"]) %}{% for i in range(9) %}{% set ns.x = [ns.x] * 100 %}{% endfor %}{{ ns.x }}',
    '{% set ns = namespace(x=["lol"]) %}{% for i in range(9) %}{% set ns.x = [ns.x] * 100 %}{% endfor %}{{ ns.x | tojson }}',
    '{% set ns = namespace(x=["lol"]) %}{% for i in range(9) %}{% set ns.x = [ns.x] * 100 %}{% endfor %}{{ ns.x | upper }}',
    "{% for i in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
    "{% set all %}{% for i in range(99999) %}" + "x" * 10_000 + "{% endfor %}{% endset %}{{ all | length }}",
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_templates_end_soon_with_one_error(source: str) -> None:
    started = time.perf_counter()
    with pytest.raises((RequestError, CheckpointError), match=r"template"):
        ChatTemplate(source, TOKENIZER, origin="some.jinja").render(TALK)
    assert time.perf_counter() - started < SECONDS


def test_a_template_of_megabytes_is_not_compiled() -> None:
    with pytest.raises(CheckpointError, match="characters, above"):
        ChatTemplate("x" * (MAX_SOURCE + 1), TOKENIZER)


SAME = [
    "{% for m in messages %}{{ m.role ~ ': ' ~ m.content | trim }}{% if not loop.last %}; {% endif %}{% endfor %}",
    "{% for m in messages %}{% if loop.index == 2 %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}",
    "{%- for m in messages -%}\n  {%- generation -%}\n {{ m.content }} {%- endgeneration -%}\n{%- endfor -%}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ loop.length }}{{ m.content }}{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ messages | map(attribute='role') | join(', ') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ '%5.2f|%s' | format(3.14159, 'x') }}",
    "{{ 'a' * 3 + 'b' }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 'x'.center(9) }}{{ 'a,b'.split(',') }}{{ 'x' | indent(2, true) }}",
    "{% macro turn(m, depth=0) %}<{{ m.role }}>{{ caller() if caller }}{% endmacro %}{{ turn(messages[0]) }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}",
    "{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}={{ v }} {% endfor %}{% for c in 'abc' %}{{ c }}.{% endfor %}",
    "{{ 'yes' if messages is iterable and messages is not mapping }}{{ missing is defined }}{{ messages[0]['content'][1:3] }}",
    "{% for row in messages | batch(2) %}[{% for m in row %}{{ m.role }}{% endfor %}]{% endfor %}{{ [[1], [2]] | sum(start=[]) }}",  # noqa: E501
]


@pytest.mark.parametrize("source", SAME, ids=range(len(SAME)))
def test_the_dialect_is_that_of_transformers(source: str) -> None:
    """Templates print what transformers prints; its own spelling of None differs on purpose, and none is printed here."""
    theirs, _ = render_jinja_template([TALK], chat_template=source)
    assert ChatTemplate(source, TOKENIZER).render(TALK) == theirs[0]
