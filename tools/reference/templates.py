#!/usr/bin/env python3
"""Compares medrun's chat templates with Jinja templates, rendered as transformers renders them.

    templates.py [--lab ./medrun-lab] TEMPLATE...
        Says of each TEMPLATE (a .jinja file, a tokenizer_config.json, a Hugging Face folder) which of
        medrun's templates renders all probe conversations the same, refusals included. It prints the
        line for the table in tools/export_chat.c, which needs only those that show functions to the
        model: the exporter compares the others itself. One that renders like none is unknown.

    templates.py --random 1000 [--seed 1] TEMPLATE...
        The same, then that many random conversations for each template that is known.

    templates.py --random 1000 --folder HF_FOLDER --tokenizer TOKENIZER.bin TEMPLATE...
        Compares also the ids with those of HF_FOLDER's tokenizer. TOKENIZER.bin was made of it by
        medrun-export --tokenizer-only; it must have the template's control tokens.

    templates.py --write tests/fixtures/chat.json TEMPLATE...
        Writes what tests/11_chat.c expects: a part of those conversations, with the texts.

Needs jinja2, and for --folder transformers.
"""
import argparse
import datetime
import hashlib
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile

import jinja2
import jinja2.ext
import jinja2.sandbox

NAMES = ["llama3", "llama3.1", "afm", "apertus", "apertus-bare", "apertus-closed", "alpaca",
         "chatml", "chatml-bare", "llama2", "mistral", "mistral-v0.1", "mistral-v0.2"]
DATE = datetime.date(2025, 1, 15)
BOS = {"llama3": "<|begin_of_text|>", "llama3.1": "<|begin_of_text|>", "afm": "<|begin_of_text|>"}


# ---- the reference: jinja2 as transformers.utils.chat_template_utils sets it up

class Refused(Exception):
    pass


def raise_exception(message):
    raise Refused(message)


def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = DATE.strftime
    return env


ENV = environment()


def reference(template, case, bos):
    """The text, or None where the template refuses."""
    if not case["messages"]:
        return None                     # apply_chat_template looks at the first message itself
    options = dict(case["options"])
    if options.pop("date", False):
        options["date_string"] = DATE.strftime("%d %b %Y")
    try:
        return template.render(messages=case["messages"], documents=None, bos_token=bos,
                               eos_token="</s>", tools=options.pop("tools", None),
                               add_generation_prompt=case["answer"], **options)
    except (Refused, jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError):
        return None


# ---- fingerprints: of a template's meaning as far as its tokens tell it

def fingerprint(text):
    """SHA-256 of the template's tokens after jinja2 has applied the white space's rules: comments,
    white space inside tags, the spelling of strings, - and + in tags, and whether a field is written
    x.role or x['role'], do not count. The same as in tools/export_jinja.c, by other means."""
    out, open_tag, skip = [], False, 0
    tokens = [(kind, value) for _, kind, value in ENV.lexer.tokeniter(text, None, None)]
    for i, (kind, value) in enumerate(tokens):
        if skip:
            skip -= 1
            continue
        if kind == "data":
            out.append(("D" + value).encode())
        elif kind.endswith("_begin") and kind != "comment_begin":
            out.append(b"{" + kind[:1].encode())
            open_tag = True
        elif kind.endswith("_end") and kind != "comment_end":
            out.append(b"}")
            open_tag = False
        elif open_tag and tokens[i:i + 3] in FIELDS:
            out += [b"T.", b"T" + tokens[i + 1][1][1:-1].encode()]
            skip = 2
        elif open_tag and kind == "string":
            out.append(b"S" + re.sub(r"\\(.)|\n", unescape, value[1:-1], flags=re.S).encode())
        elif open_tag and kind != "whitespace":
            out += [b"T" + word.encode() for word in re.findall(r"[0-9]+|[^\W0-9]\w*|[^\w\s]", value)]
    data = b"".join(len(x).to_bytes(4, "little") + x for x in merged(out))
    return hashlib.sha256(data).hexdigest()[:32]


FIELDS = [[("operator", "["), ("string", quote + name + quote), ("operator", "]")]
          for quote in "'\"" for name in ("role", "content")]


def unescape(match):
    plain = {"n": "\n", "t": "\t", "\\": "\\", "'": "'", '"': '"', "r": "\r", "\n": "\n"}
    return plain.get(match.group(1), match.group(0)) if match.group(1) else "\n"


def merged(parts):
    """Text that only a comment divides is one."""
    out = []
    for part in parts:
        if part == b"D":
            continue
        if out and part[:1] == b"D" and out[-1][:1] == b"D":
            out[-1] += part[1:]
        else:
            out.append(part)
    return out


# ---- medrun

class Medrun:
    def __init__(self, path):
        self.path = path
        self.folder = tempfile.TemporaryDirectory()

    def render(self, name, case, extra=()):
        """The text (or what EXTRA asks for), or None where medrun refuses."""
        messages = pathlib.Path(self.folder.name, "messages.json")
        messages.write_text(json.dumps(case["messages"]), encoding="utf-8")
        line = [self.path, "call", "--render", "--template", name, "--messages", str(messages), *extra]
        options = case["options"]
        if options.get("date") or name.startswith("apertus"):
            line += ["--date", DATE.isoformat()]
        if options.get("enable_thinking"):
            line += ["--think"]
        if "tools" in options:
            tools = pathlib.Path(self.folder.name, "tools.json")
            tools.write_text(json.dumps(options["tools"]), encoding="utf-8")
            line += ["--tools", str(tools)]
        if not case["answer"]:
            line += ["--no-generation-prompt"]
        done = subprocess.run(line, capture_output=True, check=False)
        if done.returncode in (2, 3) and done.stderr.count(b"\n") == 1 and not done.stdout:
            return None
        if done.returncode or done.stderr:
            sys.exit(f"{line}: exit code {done.returncode}: {done.stderr.decode()}")
        return done.stdout.decode()


# ---- conversations

def says(role, content, **more):
    return {"role": role, "content": content, **more}


def case(messages, answer=True, **options):
    return {"messages": messages, "answer": answer, "options": options}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


LAB = {"name": "get_lab", "description": "Look up a value.", "parameters": {
    "type": "object", "required": ["test"], "properties": {
        "test": {"type": "string", "description": "Which <one>?"},
        "days": {"type": "integer", "default": 30},
        "unit": {"type": "string", "enum": ["SI", "conventional"], "default": "SI"}}}}


def wrapped(function):
    return {"type": "function", "function": function}


def probes(name):
    """Every way a template can treat roles, contents and options."""
    q, a, s = says("user", " Is it\twarm?\n"), says("assistant", "\nYes. "), says("system", " Be. ")
    yield from (case([m], answer) for m in (q, s) for answer in (True, False))
    yield from (case(m, answer) for answer in (True, False) for m in (
        [s, q], [q, a], [s, q, a], [q, a, q], [q, a, a, q], [s, s, q], [q, s, q], [q, a, s], [a],
        [a, q], [q, q], [s, a, q], [says("system", ""), q], [says("user", "")],
        [q, says("tool", "42")], [q, a, says("tool", "42"), says("tool", "43"), a, q],
        [q, says("ipython", "<1>")], [q, a, says("tool", "4\xe9\u201c"), q]))
    yield case([], True)
    if name.startswith("llama3."):
        yield from (case(m, True, date=True) for m in ([q], [s, q, a, q]))
        tools = [wrapped(LAB), {"name": "now", "empty": [], "n": 1.50, "none": None, "o": {}}]
        yield from (case(m, True, tools=tools) for m in ([q], [s, q], [s], [q, a, q], [a, q]))
        one = [call("get_lab", {"test": "HbA1c", "days": 3, "x": [1.0, None, True]})]
        yield from (case(m) for m in ([q, says("assistant", None, tool_calls=one)],
                                      [q, says("user", "x", tool_calls=one), says("tool", "7"), q],
                                      [q, says("assistant", "", tool_calls=one * 2)],
                                      [q, says("assistant", "", tool_calls=[])],
                                      [q, says("tool", {"a": [1, "\u00e9"]}), q]))
    if name.startswith("apertus"):
        tools = [wrapped(LAB) if name == "apertus" else LAB]
        yield from (case(m, True, tools=tools, enable_thinking=True) for m in ([q], [s, q, a]))
        yield from (case([q, a], answer, enable_thinking=True) for answer in (True, False))
        yield from (case(m, answer) for m in blocks(q, a) for answer in (True, False))


def blocks(q, a):
    t, r = {"type": "thoughts", "text": " hm "}, {"type": "response", "text": "so"}
    c = {"type": "tool_calls", "calls": [{"name": "f", "arguments": '{"x": 1}'}]}
    d = {"type": "tool_calls", "calls": [{"name": "display_answers", "arguments": "{}"}]}
    o = {"type": "tool_outputs", "outputs": [{"output": "[1]"}, {"output": "2"}]}
    tool, args = says("tool", "out"), {"x": [1, "\u00e9<"]}
    for some in ([t], [r], [t, r], [t, c], [t, c, o, t, r], [t, d], [d], [c, o, r], [r, t], [],
                 [{"type": "other"}], [t, t, r, r], [t, {"type": "tool_calls", "calls": []}]):
        m = says("assistant", {"blocks": some})
        yield from ([q, m], [q, m, q], [q, m, tool], [q, m, tool, m, q], [q, m, a])
    yield [says("system", {"text": "S"}), says("user", {"parts": [{"type": "text", "text": "a"}] * 2})]
    yield [says("system", {"texts": "S"}), q]
    yield [says("user", {"parts": [{"type": "image", "text": "a"}]})]
    for arguments in (args, json.dumps(args)):
        for content in (None, "", "text", {"blocks": [t]}, 5):
            m = says("assistant", content, tool_calls=[call("f", arguments), call("g", arguments)])
            yield from ([q, m], [q, m, tool, tool, a, q], [q, m, tool, m], [q, m, q])
    yield [q, {"role": "assistant", "tool_calls": [call("f", args)]}]
    yield [q, says("assistant", "x", tool_calls=[{"type": "other", "function": {}}])]
    yield [q, says("assistant", "x", tool_calls=[])]
    yield [q, says("assistant", None, tool_calls=[])]


class Chance(random.Random):
    """Random conversations."""
    words = ["fever", "HbA1c 7.2 %", "\u00e9", "\u4f60\u597d", "\U0001fa7a", "'s", "42", "###", "...",
             "<|eot_id|>", "<|im_end|>", "<|user_end|>", "<s>", "</s>", "[INST]", "<b>&amp;", '"', "\\",
             "### Instruction:", "{{ x }}", "{% if %}", "system", "e\u0301", "\u200d", "\ufeff", "\x7f"]
    spaces = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "\x0b"]

    def text(self, special=True):
        n = self.choice([0, 1, 1, 2, 3, 5, 9])
        units = [self.choice(self.words if self.random() < .6 else self.spaces) for _ in range(n)]
        return "".join(units) if special else re.sub(r"<\|?/?\w+\|?>", "", "".join(units))

    def value(self, depth=2):
        kind = self.randrange(9 if depth else 6)
        if kind < 6:
            return [None, self.random() < .5, self.randrange(-99, 10 ** 20), self.text(),
                    self.choice([0.0, -0.0, 1.0, 1e5, 1e16, 1e-5, 1e-4, 123456.789, 5e-324, 1e300,
                                 self.random(), self.gauss(0, 1e9), 2.5e-7, 1e15, 9.5e15, 1e22]),
                    self.text()][kind]
        if kind == 6:
            return [self.value(depth - 1) for _ in range(self.randrange(4))]
        return {self.text(): self.value(depth - 1) for _ in range(self.randrange(4))}

    def schema(self, depth=3):
        kind = self.choice(["string"] * 4 + ["number", "integer", "boolean", "array", "array", "object",
                                             "object", "list", "oneOf", "anyOf", "none", "enum"])
        s = {}
        if kind in ("string", "number", "integer", "boolean"):
            s["type"] = kind
        if kind == "array":
            s["type"] = "array"
            if self.random() < .8:
                s["items"] = self.schema(depth - 1) if depth else {"type": "string"}
        if kind == "object":
            s["type"] = "object"
            if depth and self.random() < .8:
                s["properties"] = {self.text(): self.schema(depth - 1) for _ in range(self.randrange(4))}
                if self.random() < .6:
                    s["required"] = [k for k in s["properties"] if self.random() < .5]
        if kind == "list":
            s["type"] = self.sample(["string", "null", "object", "array", "number"], self.randrange(4))
        if kind == "oneOf" and depth:
            s["oneOf"] = [self.schema(depth - 1) for _ in range(self.randrange(4))]
        if kind == "anyOf":
            s["anyOf"] = [{"type": "string"}]
        if kind == "enum":
            s["type"] = "string"
            s["enum"] = [self.choice([self.text(), 1, 2.5, None, True, 1e20])
                         for _ in range(self.randrange(4))]
        if self.random() < .2:
            s["nullable"] = self.random() < .7
        if self.random() < .5:
            s["description"] = self.text()
        if self.random() < .4:
            s["default"] = self.text() if s.get("enum") or s.get("oneOf") else self.value()
        return s

    def function(self):
        f = {"name": self.text(), "description": self.text()}
        if self.random() < .9:
            f["parameters"] = {"type": "object", "properties": {
                self.text(): self.schema() for _ in range(self.randrange(5))}}
            if self.random() < .6:
                f["parameters"]["required"] = [
                    k for k in f["parameters"]["properties"] if self.random() < .5]
        if self.random() < .03:
            f.pop(self.choice(list(f)))
        return f

    def block(self):
        kind = self.choice(["thoughts", "response", "tool_calls", "tool_outputs"])
        if kind == "tool_calls":
            names = ["f", "display_answers", self.text()]
            return {"type": kind, "calls": [{"name": self.choice(names), "arguments": self.text()}
                                            for _ in range(self.choice([0, 1, 1, 1, 2]))]}
        if kind == "tool_outputs":
            return {"type": kind, "outputs": [{"output": self.text()}
                                              for _ in range(self.randrange(3))]}
        return {"type": self.choice([kind] * 30 + ["other"]), "text": self.text()}

    def structured(self, role, form):
        if role == "system" and self.random() < .3:
            return {"text": self.text()}
        if role == "user" and self.random() < .3:
            return {"parts": [{"type": self.choice(["text"] * 30 + ["image"]), "text": self.text()}
                              for _ in range(self.randrange(4))]}
        if role == "assistant" and (form == "blocks" or self.random() < .03):
            return {"blocks": [self.block() for _ in range(self.randrange(6))]}
        return self.text()

    def conversation(self, name):
        roles = ["user"] * 4 + ["assistant"] * 4 + ["tool"] * (3 if "." in name or "ap" in name else 1)
        roles += ["ipython"] * (name.startswith("llama3")) + ["system"] * (self.random() < .1)
        in_turn = (name == "llama2" or name.startswith("mistral")) and self.random() < .9
        apertus, form = name.startswith("apertus"), self.choice(["string", "blocks"])
        messages = []
        for i in range(self.choice([0] + [1, 2, 3, 4, 5, 6] * 5 + [30])):
            role = "system" if i == 0 and self.random() < .4 else self.choice(roles)
            if in_turn and role != "system":
                role = "assistant" if messages and messages[-1]["role"] == "user" else "user"
            if apertus and role == "tool" and self.random() < .7 and not any(
                    m["role"] == "assistant" for m in messages):
                role = "assistant"
            m = says(role, self.structured(role, form) if apertus else self.text())
            if name == "llama3.1" and role == "tool" and self.random() < .5:
                m["content"] = self.choice([[self.value()], {"a": self.value()}])
            if role == "assistant" and self.random() < .4:
                n = self.choice([0, 1, 1, 1, 2]) if apertus else self.choice([1] * 9 + [0, 2])
                m["tool_calls"] = [call(self.text(), self.choice([self.value(), self.text()]))
                                   for _ in range(n)]
                if self.random() < .3 and (apertus or name == "llama3.1"):
                    m["content"] = None
                if self.random() < .1 and (apertus or name == "llama3.1"):
                    del m["content"]
            messages.append(m)
        options = {}
        if self.random() < .4 and (apertus or name == "llama3.1"):
            functions = [self.function() for _ in range(self.randrange(1, 4))]
            options["tools"] = [wrapped(f) for f in functions] if name == "apertus" else functions
        if apertus and self.random() < .4:
            options["enable_thinking"] = True
        if name == "llama3.1" and self.random() < .3:
            options["date"] = True
        return {"messages": messages, "answer": self.random() < .7, "options": options}


# ---- comparing

def stricter(name, case):
    """Where Jinja prints a value as Python spells it, or nothing for what is missing, medrun refuses."""
    turns = case["messages"][case["messages"][:1] != [] and case["messages"][0]["role"] == "system":]
    if name == "llama2" or name.startswith("mistral"):      # only a system message, or what Llama 2's
        return not turns or any(m["role"] not in ("user", "assistant") for m in turns)  # leaves out
    return name == "llama3.1" and "tools" in case["options"] and turns and \
        not isinstance(turns[0].get("content"), str)


def compare(medrun, template, name, case, bos, opens_always):
    """None, or what differs. A template that opens the answer unasked is asked each time."""
    if opens_always:
        case = {**case, "answer": True}
    wanted = reference(template, case, bos)
    found = medrun.render(name, case)
    if wanted == found or (found is None and stricter(name, case)):
        return None
    return f"{json.dumps(case)}\n  reference {wanted!r}\n  medrun    {found!r}"


def recognise(medrun, text):
    """(name, whether it always opens the answer) of the template of medrun that renders like it."""
    try:
        template = ENV.from_string(text)
    except jinja2.TemplateError:
        return None, False
    for name in NAMES:
        bos = BOS.get(name, "<s>")
        for opens in (False, True):
            if not any(compare(medrun, template, name, p, bos, opens) for p in probes(name)):
                return name, opens
    return None, False


def load(path):
    path = pathlib.Path(path)
    if path.is_dir():
        path = next(p for p in (path / "chat_template.jinja", path / "tokenizer_config.json")
                    if p.exists())
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text
    text = json.loads(text)["chat_template"]
    if isinstance(text, list):
        text = next(t["template"] for t in text if t["name"] == "default")
    return text


def compare_ids(medrun, args, name, case, tokenizer, text):
    """Texts that look like control tokens are text for medrun and tokens for the reference."""
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = medrun.render(name, case, [args.tokenizer, "--ids"])
    if found is not None and [int(i) for i in found.split()] == wanted:
        return None
    return f"{json.dumps(case)}\n  reference {wanted}\n  medrun    {found}"


def plain(case, control):
    return not any(c in json.dumps(case, ensure_ascii=False) for c in control)


def differential(medrun, args, template, name, bos, opens):
    chance, failures, refused, ids = Chance(args.seed), 0, 0, 0
    tokenizer = None
    if args.folder:
        import transformers
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    for _ in range(args.random):
        one = chance.conversation(name)
        wrong = compare(medrun, template, name, one, bos, opens)
        text = reference(template, {**one, "answer": True} if opens else one, bos)
        refused += text is None
        if not wrong and tokenizer and text is not None and not stricter(name, one) and \
                plain(one, tokenizer.added_tokens_encoder):
            ids += 1
            wrong = compare_ids(medrun, args, name, {**one, "answer": True} if opens else one,
                                tokenizer, text)
        failures += wrong is not None
        if wrong and failures <= 3:
            print(wrong)
    print(f"  {args.random} random conversations, {refused} of them refused by both, ids of {ids} "
          f"compared: {failures} differ")
    return failures


def expectations(template, name, bos, opens):
    """Half of the probes and some random conversations; an unconditional opening is asked for."""
    chance = Chance(name)
    cases = list(probes(name))[::2 if name in (
        "llama3", "llama3.1", "afm", "alpaca", "chatml", "chatml-bare") else 4]
    for one in cases + [chance.conversation(name) for _ in range(12)]:
        if len(one["messages"]) > 12 or stricter(name, one):
            continue
        if opens:
            one = {**one, "answer": True}
        text = reference(template, one, bos)
        yield {"template": name, **one, "expected": text}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", default="./medrun-lab")
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder")
    parser.add_argument("--tokenizer")
    parser.add_argument("--write")
    parser.add_argument("--as", dest="name", choices=NAMES, help="compare with this one only")
    parser.add_argument("templates", nargs="+")
    args = parser.parse_args()
    medrun, failures, written = Medrun(args.lab), 0, []
    if args.name:
        NAMES[:] = [args.name]
    for path in args.templates:
        text = load(path)
        name, opens = recognise(medrun, text)
        if not name:
            print(f"{path}: unknown, fingerprint {fingerprint(text)}")
            if args.name:
                bos = BOS.get(args.name, "<s>")
                wrong = [compare(medrun, ENV.from_string(text), args.name, p, bos, False)
                         for p in probes(args.name)]
                print("\n".join([w for w in wrong if w][:3]))
                failures += 1
            continue
        print(f'{path}: renders like {name}\n    {{"{fingerprint(text)}", "{name}"}},')
        if args.write:
            written += expectations(ENV.from_string(text), name, BOS.get(name, "<s>"), opens)
        if args.random:
            failures += differential(medrun, args, ENV.from_string(text), name,
                                     BOS.get(name, "<s>"), opens)
    if args.write:
        lines = ",\n".join(json.dumps(w, ensure_ascii=False) for w in written)
        pathlib.Path(args.write).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
