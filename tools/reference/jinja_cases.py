#!/usr/bin/env python3
"""Writes tests/fixtures/jinja.json: small Jinja templates and what jinja2, set up as transformers does,
makes of them; tests/20_export.c compares tools/export_jinja.c with it.

    jinja_cases.py OUT.json

A case is [template, [text or null for each conversation]]; null: jinja2 refuses. In "lost" stand
templates that the exporter may say it does not understand, but of which it must write nothing else.
Needs jinja2.
"""
import json
import pathlib
import sys

import jinja2

from templates import ENV, reference, says

U, A, S = says("user", " Is 38.5 \u00b5 a fever?\n"), says("assistant", "Yes."), says("system", "Be brief.")
CONVERSATIONS = [[U], [S, U, A, U], [U, A]]

LOOP = "{% for m in messages %}"
KNOWN = [
    # macros: places, defaults, names, white space, calls in calls
    "{% macro t(m) %}{{ m.role }}:{{ m.content }};{% endmacro %}" + LOOP + "{{ t(m) }}{% endfor %}",
    "{%- macro t(m, end='.') -%} {{ m.role ~ end }} {%- endmacro -%}" + LOOP + "{{ t(m) }}"
    "{{ t(m, '!') }}"
    "{{ t(end='?', m=m) }}{% endfor %}",
    "{% macro a(x) %}<{{ x }}>{% endmacro %}{% macro b(x, y=a(x)) %}{{ a(y) ~ a(x) }}{% endmacro %}"
    "{{ b(1) }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f() }}|{{ f() | length }}|{{ f is defined }}"
    "|{{ g is defined }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1, x=2) }}",
    "{% macro f(x, y=x) %}{{ x }}{{ y }}{% endmacro %}{{ f(3) }}{{ f(3, 4) }}",
    "{% macro f(x, y=raise_exception('no')) %}{{ x }}{% endmacro %}{{ f(3, 4) }}",
    "{% macro f(x, y=raise_exception('no')) %}{{ x }}{% endmacro %}{{ f(3) }}",
    "{% macro f() %}{{ raise_exception('no') }}{% endmacro %}{{ 'a' if true else f() }}",
    "{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
    "{% macro f(a=none) %}{% if a %}y{% else %}n{% endif %}{% endmacro %}{{ f() }}{{ f(1) }}",
    # of the names around it a macro sees the template's, as they are when it is called
    "{% macro f() %}{{ x }}{% endmacro %}{% set x = 1 %}{{ f() }}{% set x = 2 %}{{ f() }}",
    "{% macro f() %}[{{ m }}{{ loop }}]{% endmacro %}" + LOOP + "{{ f() }}{% endfor %}",
    "{% set x = 0 %}{% macro f() %}{% set x = 5 %}{{ x }}{% endmacro %}{{ f() }}{{ x }}",
    "{% set x = 0 %}{% macro f() %}{{ x }}{% endmacro %}" + LOOP + "{% set x = 7 %}{{ f() }}"
    "{% endfor %}{{ x }}",
    "{% macro f(x) %}{{ x }}{{ g(2) }}{% endmacro %}{% macro g(y) %}{{ x }}{{ y }}{% endmacro %}"
    "{{ f(1) }}",
    "{% set ns = namespace(n=0) %}{% macro f() %}{% set ns.n = ns.n + 1 %}{% endmacro %}" + LOOP +
    "{{ f() }}{% endfor %}{{ ns.n }}",
    "{% macro f() %}{% set ns = namespace(n=4) %}{% set ns.k = 1 %}{{ ns.n + ns.k }}{% endmacro %}"
    "{{ f() }}{{ f() }}",
    "{% macro f() %}{% for i in range(3) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    "{% endmacro %}"
    + LOOP + "{{ f() }}{% endfor %}",
    "{% if messages[0].role == 'user' %}{% macro f() %}u{% endmacro %}{% else %}{% macro f() %}"
    "s{% endmacro %}"
    "{% endif %}{{ f() }}",
    "{% macro f(m) %}{%- if m.role == 'user' -%}U{%- elif m.role == 'system' -%}S{%- else -%}"
    "A{%- endif -%}"
    "{% endmacro %}" + LOOP + "{{ f(m) | lower }}{% endfor %}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f('a') + f('b') }}{{ f('ab')[0] }}{{ f(' c ').strip() }}",
    # texts that are set have names of their own, too
    "{% set x %}{% set y = 1 %}{{ y }}{% endset %}{{ x }}{{ y }}",
    "{% set x = 1 %}{% set y %}{{ x }}{% set x = 2 %}{{ x }}{% endset %}{{ x }}{{ y }}",
    LOOP + "{% set t %}{{ m.role }}{% endset %}{{ t }}{% endfor %}{{ t }}",
    # loops, their else, conditions, names
    LOOP + "{{ loop.index }}{{ loop.last }}{{ loop.revindex0 }}{% endfor %}{{ loop }}{{ m }}",
    "{% for x in [] %}a{% else %}b{% endfor %}{% for x in [1] %}a{% else %}b{% endfor %}",
    "{% for x in [] %}{% else %}{% set q = 1 %}{% endfor %}{{ q }}",
    "{% for m in messages if m.role != 'system' %}{{ loop.index0 }}{{ m.role }}{% endfor %}",
    LOOP + "{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k in messages[0] %}{{ k }}{% endfor %}{{ 'role' in messages[0] }}{{ 'x' in messages[0] }}",
    # what is false, undefined or none
    "{% set t = none | selectattr('type', 'equalto', 'x') | list | length %}{{ t }}",
    "{{ tools | rejectattr('type') | list | length }}{{ nobody | selectattr('a') | list | length }}",
    "{{ none | list }}", "{{ nobody.a }}",
    "{{ nobody }}{{ nobody is none }}{{ tools is none }}{{ nobody == none }}",
    "{{ tools | length }}", "{{ nobody | length }}{{ nobody | default('d') }}"
    "{{ '' | default('d', true) }}",
    "{{ namespace(a=1) | length }}", "{{ messages[9] }}{{ messages[9] is defined }}",
    "{{ messages[9].role }}",
    "{{ messages[0]['nothing'] }}{{ messages[0].get('nothing') }}{{ messages[0].get('nothing', 'x') }}",
    # numbers, texts, comparing
    "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 * 3 + 1 }}{{ -3 + 1 }}{{ 1 - 2 - 3 }}{{ true + 1 }}{{ 1 == true }}",
    "{{ 'a' ~ 1 ~ none ~ true }}{{ 'a' 'b' }}{{ \"it's\" }}{{ 'a\\tb' }}", "{{ 'a' + 1 }}",
    "{{ ([1] + [2]) | length }}",
    "{{ not true or true }}{{ not (true or true) }}{{ 1 and 0 or 'x' }}{{ '' or 'y' }}{{ 1 if 0 }}",
    "{{ 'b' in 'abc' }}{{ '' in '' }}{{ 'b' not in ['a', 'b'] }}{{ 1 in [true] }}",
    "{{ messages | length > 1 and messages[1].role == 'assistant' }}{{ messages[-1].role }}"
    "{{ messages[1:] | length }}",
    "{{ messages[::-1][0].role }}{{ messages[0].role[0] }}{{ messages[0].role[1:3] }}"
    "{{ messages[0].role[:-1] }}",
    LOOP + "{{ m.content.split('.')[0] | trim }}{{ m.content.strip().rstrip('.') }}"
    "{{ m.content.replace('.', '') }}{% endfor %}",
    "{{ 'aXb'.lower() ~ 'ab' | upper ~ 'ab cd' | title ~ 'AB' | capitalize }}"
    "{{ 'a,b'.split(',') | join('-') }}",
    "{{ 'a</think>b'.split('</think>')[-1].lstrip('\\n') }}{{ 'abc'.startswith('ab') }}"
    "{{ 'abc'.endswith('b') }}",
    LOOP + "{{ m.content | tojson }}{% endfor %}", "{{ 5 is even }}{{ 5 is odd }}{{ 6 is divisibleby(3) }}",
    "{{ messages is string }}{{ messages is iterable }}{{ messages[0] is mapping }}"
    "{{ messages[0].content is string }}",
    "{{ 5 is defined and 5 is number and not ('a' is number) }}{{ 'a' is eq 'a' }}"
    "{{ 'a' is in ['a'] }}",
    "{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{% if add_generation_prompt %}"
    ">{% endif %}",
    # white space
    "  {%- for m in messages %}\n  {{ m.role -}}  \n{%- endfor %}\n\n",
    "a\n  {% if true %}\n  b\n  {% endif %}\nc\n",
    "a {#- note -#} b{# note #}\n c", "{{ 'a' -}}\n\n b {{- 'c' }} \n{%+ if true %} d{% endif +%}\n e",
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set s = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set s = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') "
    "!= (loop.index0 % 2 == 0) %}{{ raise_exception('in turn') }}{% endif %}"
    "{{ s if s and loop.first else '' }}"
    "{{ m['content'] | trim }}{% endfor %}",
]
LOST = [
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1, 2) }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(y=2) }}",
    "{% macro f(x) %}{{ varargs | length }}{% endmacro %}{{ f(1, 2) }}", "{{ pad_token }}",
    "{{ cycler }}",
    "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}x{% endcall %}",
    "{% with x = 1 %}{{ x }}{% endwith %}",
    "{% filter upper %}a{% endfilter %}", "{% raw %}{{ x }}{% endraw %}", "{{ messages }}",
    "{{ 1.5 }}", "{{ 3 / 2 }}",
    LOOP + "{% macro f() %}{{ m.role }}{% endmacro %}{{ f() }}{% endfor %}",
    "{{ messages | map(attribute='role') | join }}",
    "{% macro f() %}{% macro g() %}x{% endmacro %}{{ g() }}{% endmacro %}{{ f() }}",
    "{% set a, b = 1, 2 %}{{ a }}",
    "{% macro f() %}x{% endmacro %}{{ f }}", "{% macro f() %}x{% endmacro %}{{ f.name }}",
    "{{ '\u00b5' | upper }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f() %}{% break %}{% endmacro %}{{ f() }}",
    "{% set x | trim %} a {% endset %}{{ x }}", "{{ strftime_now('%d') }}", "{{ dict(a=1) | length }}",
    "{{ 'a' < 'b' }}", "{{ 1 < 2 < 3 }}", "{{ 2 ** 3 }}", "{{ [1, 2] == [1, 2] }}",
    "{{ 'ab' | reverse }}",
    "{{ messages | groupby('role') | length }}", "{{ '%s' % 1 }}", "{{ 'a' * 3 }}", "{{ [1, 2] }}",
]


def case(text):
    """What jinja2 cannot compile or never comes to an end with, transformers cannot use."""
    try:
        template = ENV.from_string(text)
        return [text, [reference(template, {"messages": m, "answer": len(m) != 2, "options": {}}, "<s>")
                       for m in CONVERSATIONS]]
    except (jinja2.TemplateError, RecursionError, SyntaxError):
        return [text, [None] * len(CONVERSATIONS)]


def main():
    lines = [",\n".join(json.dumps(case(t), ensure_ascii=False) for t in texts) for texts in (KNOWN, LOST)]
    pathlib.Path(sys.argv[1]).write_text(
        f'{{"conversations": {json.dumps(CONVERSATIONS)},\n"known": [\n{lines[0]}],\n"lost": [\n{lines[1]}]}}\n',
        encoding="utf-8")


if __name__ == "__main__":
    main()
