"""The demo corpus: reads corpus/*.txt, turns every fact into questions, and sets some questions aside for the test.

    python corpus.py            check the corpus, write heldout.jsonl, print what there is

A topic looks like this (`||` separates the answer from the keys that a grader looks for; "a/b" means either):

    @ condition | asthma | bronchial asthma
    what: Asthma is a long-term inflammation of the airways ... || airway; inflammat
    symptoms: ...

A topic of the kind `model` brings its own questions instead (`q: one | two | three`, `a: answer || keys`). If its
header has names, `{n}` in a question stands for each of them, and `ask: KIND` asks for each with KIND's templates.
Everything here is a pure function of the files and a seed: two people who run it get the same split.
"""

import hashlib
import json
import pathlib
import random
import re
import sys
from dataclasses import dataclass, field

from phrasings import HELD_OUT, LITERAL, OPENERS, TEMPLATES

HERE = pathlib.Path(__file__).resolve().parent
# When two topics lay claim to the same question ("What are the signs of stroke?": condition, first aid), the kind
# that stands first here keeps it. Two answers to one question would only teach the model to waver.
KINDS = ["model", "condition", "drug", "lab", "anatomy", "physiology", "procedure", "firstaid", "compare", "term"]
# Held-out questions per kind: (known template, this topic never asked that way; template that no topic was asked).
QUOTA = {"condition": (32, 18), "drug": (22, 12), "lab": (16, 8), "anatomy": (18, 10), "physiology": (12, 6),
         "procedure": (12, 6), "firstaid": (10, 4), "term": (10, 4), "compare": (10, 4), "model": (16, 22)}


@dataclass
class Fact:
    """One answer, with every question that leads to it."""
    kind: str
    topic: str
    aspect: str
    answer: str
    keys: str
    where: str                                      # file:line, for messages
    train: list = field(default_factory=list)       # [(question, weight)]
    held: list = field(default_factory=list)        # [(question, "topic" | "template")]


@dataclass
class Topic:
    kind: str
    name: str
    aliases: list
    where: str
    facts: list = field(default_factory=list)
    questions: list = field(default_factory=list)   # kind model only
    ask: str = ""                                   # kind model only: the kind whose templates ask for the names


class CorpusError(Exception):
    """A slip in the corpus; the text says file and line."""


# ---------------------------------------------------------------------------------------------------- reading

def has_keys(text, keys):
    """True when the text holds every key: "airway; cough/wheez" wants `airway`, and one of the other two."""
    low = text.lower()
    return all(any(k.strip() in low for k in key.split("/")) for key in keys.split(";"))


def split_answer(rest, where):
    answer, bar, keys = rest.partition("||")
    answer, keys = " ".join(answer.split()), "; ".join(k.strip().lower() for k in keys.split(";") if k.strip())
    if not answer:
        raise CorpusError(f"{where}: no answer")
    if not bar or not keys:
        raise CorpusError(f"{where}: no keys; wanted `ANSWER || key; key`")
    for key in keys.split("; "):
        if not has_keys(answer, key):               # such a fact could never be graded as right
            raise CorpusError(f"{where}: the answer does not contain its own key `{key}`")
    return answer, keys


def parse_header(line, where):
    parts = [p.strip() for p in line[1:].split("|")]
    if len(parts) not in (2, 3) or not parts[1]:
        raise CorpusError(f"{where}: wanted `@ kind | name | alias; alias`, found `{line}`")
    kind, name = parts[0], parts[1]
    if kind not in KINDS:
        raise CorpusError(f"{where}: unknown kind `{kind}`; one of {', '.join(KINDS)}")
    if kind == "compare" and " vs " not in name:
        raise CorpusError(f"{where}: a comparison is named `A vs B`, found `{name}`")
    aliases = [a.strip() for a in parts[2].split(";") if a.strip()] if len(parts) == 3 else []
    return Topic(kind, name, aliases, where)


def parse_line(topic, line, where):
    """One `aspect: ...` line (or q:/a: of a model topic) into the topic."""
    word, colon, rest = line.partition(":")
    word = word.strip()
    if not colon:
        raise CorpusError(f"{where}: wanted `aspect: answer || keys`, found `{line[:60]}`")
    if topic.kind == "model":
        if word == "q":
            topic.questions += [q.strip() for q in rest.split("|") if q.strip()]
            return
        if word == "ask":
            topic.ask = rest.strip()
            if topic.ask not in TEMPLATES:
                raise CorpusError(f"{where}: `ask` wants a kind, one of {', '.join(TEMPLATES)}; found `{topic.ask}`")
            return
        if word != "a":
            raise CorpusError(f"{where}: a topic of kind model has only q:, ask: and a:, found `{word}`")
    elif word not in TEMPLATES[topic.kind]:
        known = ", ".join(TEMPLATES[topic.kind])
        raise CorpusError(f"{where}: unknown aspect `{word}` for {topic.kind}; one of {known}")
    if any(f.aspect == word for f in topic.facts):
        raise CorpusError(f"{where}: `{word}` stands twice in `{topic.name}`")
    topic.facts.append(Fact(topic.kind, topic.name, word, *split_answer(rest, where), where))


def parse_file(path):
    topics = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where, line = f"{path.name}:{number}", line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("@"):
            topics.append(parse_header(line, where))
        elif not topics:
            raise CorpusError(f"{where}: text before the first `@ kind | name` line")
        else:
            parse_line(topics[-1], line, where)
    for t in topics:
        if not t.facts or (t.kind == "model" and not t.questions and not t.ask):
            raise CorpusError(f"{t.where}: `{t.name}` has {'q: or a: missing' if t.kind == 'model' else 'no facts'}")
        if not t.aliases and (t.ask or any("{" in q for q in t.questions)):
            raise CorpusError(f"{t.where}: `{t.name}` asks for names and its header has none")
    return topics


def read_corpus(folder=HERE / "corpus"):
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise CorpusError(f"{folder}: no .txt files")
    topics = [t for f in files for t in parse_file(f)]
    return sorted(topics, key=lambda t: KINDS.index(t.kind))      # sorted() keeps the order within a kind


# ---------------------------------------------------------------------------------------------------- grammar

SINGULAR_S = ("ss", "us", "is", "os", "'s")               # "abscess", "tetanus", "sepsis" are one thing
SINGULAR = set("diabetes rabies herpes measles mumps shingles scabies rickets caries ascites biceps triceps "
               "quadriceps forceps lens series bends pancreas atlas lues erysipelas".split())
PLURAL = set("varices hives striae feces faeces bronchi alveoli villi ossicles vertebrae metastases meninges ganglia "
             "diverticula atria teeth feet testes".split())


def is_plural(name):
    """Does the name take "are"? Medical English is full of singulars that end in s, so this looks at the ending."""
    head = re.split(r" (?:of|in|with|from|due|after|at|on|for) | \(", name)[0].split()[-1]
    if head.lower() in PLURAL or re.fullmatch(r"\w*[A-Z]s", head):      # SSRIs, DOACs
        return True
    head = head.lower()
    return head.endswith("s") and head not in SINGULAR and not head.endswith(SINGULAR_S)


COUNTED = {"count", "level", "rate", "ratio", "score", "index", "time", "pressure", "gap", "titre", "titer", "value"}


def with_adjective(adjective, name):
    """"high sodium", but "a high platelet count"."""
    return f"{'a ' if name.split()[-1].lower() in COUNTED else ''}{adjective} {name}"


def capitalise(text):
    """Big first letter, but not for words like pH or eGFR that bring their own capitals."""
    first = text.split()[0]
    return text if any(c.isupper() for c in first[1:]) else text[0].upper() + text[1:]


def fill(template, name):
    plural = is_plural(name)
    a, _, b = name.partition(" vs ")
    fields = {"n": name, "bare": re.sub(r"^(?:a|an|the) ", "", name),
              "the": name if name.startswith("the ") else f"the {name}",
              "is": "are" if plural else "is", "does": "do" if plural else "does", "s": "" if plural else "s",
              "highn": with_adjective("high", name), "lown": with_adjective("low", name),
              "a": a, "b": b, "isa": "are" if is_plural(a) else "is"}
    return capitalise(template.format(**fields))


# ---------------------------------------------------------------------------------------------------- questions

def plain(question):
    """What makes two questions the same: neither case, nor punctuation, nor a space more or less."""
    return " ".join(re.findall(r"[\w+%/-]+", question.lower()))


def names_of(topic):
    """(name, weight): the name itself counts as much as all its aliases together. Comparisons go both ways round."""
    names = [topic.name] + topic.aliases
    if topic.kind == "compare":
        names += [" vs ".join(reversed(n.split(" vs "))) for n in names if " vs " in n]
        names = [n for n in names if " vs " in n]
    names = list(dict.fromkeys(names))
    share = 1.0 / max(1, len(names) - 1)
    return [(n, 1.0 if i == 0 else share) for i, n in enumerate(names)]


def rank(fact, salt=""):
    """A fixed, arbitrary order. By hash, so that mending one topic does not reshuffle the others' split."""
    return hashlib.sha256(f"{salt}|{fact.kind}|{fact.topic}|{fact.aspect}".encode()).hexdigest()


def fillings(template, names):
    """The question once for every name; together they weigh as much as one question."""
    if "{" not in template:
        return [(template, 1.0)]
    return [(fill(template, n), 1.0 / len(names)) for n in names]


def templates_of(table, kind):
    return [t for templates in table.get(kind, {}).values() for t in templates]


def questions_of(topic, fact):
    if topic.kind == "model":
        wanted = topic.questions + templates_of(TEMPLATES, topic.ask)
        return [qw for t in wanted for qw in fillings(t, topic.aliases)]
    return [(fill(t, n), w) for n, w in names_of(topic) for t in TEMPLATES[topic.kind][fact.aspect]]


def build(topics):
    """All facts, each with the questions that may be trained and those that are held out."""
    facts, owner = [], {}
    for topic in topics:
        for fact in topic.facts:
            facts.append(fact)
            for q, w in questions_of(topic, fact):
                if owner.setdefault(plain(q), fact) is fact:
                    fact.train.append((q, w))
    by_name = {(t.kind, t.name): t for t in topics}
    literal = {plain(q) for q in LITERAL}
    for kind, (n_topic, n_template) in QUOTA.items():
        mine = [f for f in facts if f.kind == kind]
        for fact in sorted(mine, key=lambda f: rank(f, "topic"))[:n_topic]:
            hold_topic(fact, literal)
        for fact in sorted(mine, key=lambda f: rank(f, "template"))[:n_template]:
            hold_template(fact, by_name[kind, fact.topic], owner, literal)
    for fact in facts:
        if not fact.train:
            raise CorpusError(f"{fact.where}: every question for it belongs to an earlier topic too; rename an alias")
    return facts


def hold_topic(fact, literal):
    """Take one ordinary question out of training, in whatever case or punctuation it might come."""
    choice = [q for q, w in fact.train if plain(q) not in literal]
    rng = random.Random(rank(fact, "choice"))
    q = rng.choices(choice, [w for q, w in fact.train if plain(q) not in literal])[0]
    fact.held.append((q, "topic"))
    fact.train = [(t, w) for t, w in fact.train if plain(t) != plain(q)]


def hold_template(fact, topic, owner, literal):
    """A question from a wording that nobody trains (for topics with their own questions: the last, for every name)."""
    rng = random.Random(rank(fact, "choice"))
    if topic.questions:
        last = [q for q, _ in fillings(topic.questions[-1], topic.aliases)]
        if len(topic.questions) > 3 and not {plain(q) for q in last} & literal:
            fact.held.append((rng.choice(last), "template"))
            fact.train = [(t, w) for t, w in fact.train if plain(t) not in {plain(q) for q in last}]
        return
    if topic.kind == "model":
        names, weights, templates = topic.aliases, None, templates_of(HELD_OUT, topic.ask)
    else:
        names, weights = zip(*names_of(topic))
        templates = HELD_OUT[topic.kind][fact.aspect]
    q = fill(rng.choice(templates), rng.choices(names, weights)[0])
    if plain(q) not in owner:                       # otherwise a trained template has the same words: not a test
        fact.held.append((q, "template"))


def draw(fact, rng):
    """One training question for the fact: any template, often typed in a hurry, sometimes with a polite opening."""
    q = rng.choices([q for q, _ in fact.train], [w for _, w in fact.train])[0]
    if fact.kind != "model" and rng.random() < 0.06:
        q = rng.choice(OPENERS) + q
    hurry = rng.random()
    if hurry < 0.4:
        q = q.lower()
    if hurry < 0.33 or hurry > 0.92:
        q = q.rstrip("?.")
    return q


def literal_facts(facts):
    """The questions that the documentation shows, with the facts that answer them."""
    owner = {plain(q): f for f in facts for q, _ in f.train}
    return [(q, owner.get(plain(q))) for q in LITERAL]


def held_out(facts):
    return [{"question": q, "keys": f.keys, "kind": f.kind, "topic": f.topic, "aspect": f.aspect, "split": split}
            for f in facts for q, split in f.held]


def main():
    topics = read_corpus()
    facts = build(topics)
    rows = held_out(facts)
    trained = {plain(q) for f in facts for q, _ in f.train}
    assert not any(plain(r["question"]) in trained for r in rows), "a held-out question is trained"
    with open(HERE / "heldout.jsonl", "w", encoding="utf-8") as out:
        out.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    for kind in KINDS:
        n = [sum(x.kind == kind for x in xs) for xs in (topics, facts)]
        print(f"{kind:11} {n[0]:5} topics {n[1]:5} facts {sum(r['kind'] == kind for r in rows):4} held out")
    splits = [sum(r["split"] == s for r in rows) for s in ("topic", "template")]
    print(f"{len(topics)} topics, {len(facts)} facts, {len(trained)} training questions, "
          f"{sum(len(f.answer) for f in facts)} characters of answers, held out {splits[0]} + {splits[1]}")
    for q, fact in literal_facts(facts):
        print(f"  {q!r}: {fact.topic + ' / ' + fact.aspect if fact else 'NO TOPIC ANSWERS THIS'}")


if __name__ == "__main__":
    try:
        main()
    except CorpusError as e:
        sys.exit(str(e))
