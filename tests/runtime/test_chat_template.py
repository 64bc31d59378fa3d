"""The template sandbox: what templates use works, what they must not do is refused with a paragraph."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from corral.runtime.chat_template import ChatTemplate
from corral.spec.errors import InputError

HELLO = [{"role": "user", "content": "hello <b> & 'x'"}]


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(HELLO, **variables)


def test_what_templates_use_is_there() -> None:
    assert render("{{ bos_token }}{{ messages[0].content }}") == "<s>hello <b> & 'x'"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ tools | tojson }}", tools=[{"naïve": "<a>"}]) == '[{"naïve": "<a>"}]'
    assert render("{{ tools | tojson(indent=1) }}", tools=[1]) == "[\n 1\n]"
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}
    assert render("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}") == "2"


def test_blocks_leave_no_blank_lines() -> None:
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{{ strftime_now(3) }}",
        "{% include '/etc/passwd' %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}" + "x" * 100_000 + "{% endfor %}{% endfor %}",
    ],
)
def test_hostile_and_broken_templates_are_refused(hostile: str) -> None:
    with pytest.raises(InputError, match="chat template"):
        render(hostile)


@pytest.mark.parametrize("attribute", ["__class__", "__init__", "__reduce__"])
def test_attributes_that_lead_out_are_undefined(attribute: str) -> None:
    assert render("{{ messages." + attribute + " is defined }}") == "False"


def test_a_template_that_does_not_parse_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"t\.jinja is not a valid Jinja template"):
        ChatTemplate("{% if %}", {}, where="t.jinja")
