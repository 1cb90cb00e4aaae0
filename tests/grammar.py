#!/usr/bin/env python3
"""grammar.py PROGRAM WHAT...: other people's test suites of JSON schemas against the rules that
medrun-serve makes of them; PROGRAM is tests/44_grammar.c. WHAT:

    suite FOLDER    tests/draft2020-12 of github.com/json-schema-org/JSON-Schema-Test-Suite
    mask FOLDER     maskbench/data of github.com/guidance-ai/jsonschemabench
    walks N         texts made by chance from N random schemas are valid for Python's jsonschema
    next N          what may follow the beginnings of such texts, beside what llguidance lets follow

A schema passes where it is taken, and all its valid texts fit, and none that is not valid. Of what is
not valid nothing may ever fit: a failure. How many pass is a ratchet: fewer are a failure."""
import collections, glob, json, os, random, re, subprocess, sys, tempfile

PASS = {'suite': 152, 'mask': 9915}     # the ratchet: at least as many
counts = {'passed': 0, 'failed': 0, 'skipped': 0}


def check(what, good, shown=''):
    counts['passed' if good else 'failed'] += 1
    if not good:
        print('FAILED:', what, str(shown)[-600:])


def ask(program, lines):
    """The answers to LINES; one that ends the program is answered with None."""
    answers = []
    while len(answers) < len(lines):
        with tempfile.NamedTemporaryFile('w', suffix='.jsonl', encoding='utf-8') as f:
            f.writelines(json.dumps(x, ensure_ascii=False) + '\n' for x in lines[len(answers):])
            f.flush()
            p = subprocess.run([program], env={**os.environ, 'MEDRUN_GRAMMAR_CASES': f.name},
                               stdout=subprocess.PIPE)
        answers += [json.loads(x) for x in p.stdout.decode('utf-8', 'replace').split('\n')[:-1]]
        if p.returncode:
            answers.append(None)
    return answers[:len(lines)]


def judge(program, name, groups):
    """GROUPS: (place, schema, [(text, valid)])."""
    lines = [{'schema': s, 'open': True, 'texts': [t for t, _ in tests]} for _, s, tests in groups]
    passing = taken = wrong = 0
    why, partly = collections.Counter(), collections.Counter()
    for (place, schema, tests), a in zip(groups, ask(program, lines)):
        check(f'{place}: it lives', a is not None)
        if not a or 'error' in a:
            why[re.sub(r'#[^:]*/', '#.../', (a or {'error': 'crash'})['error'])[:80]] += 1
            continue
        taken += 1
        bad = [t for (t, valid), fits in zip(tests, a['fits']) if fits and not valid]
        missed = [t for (t, valid), fits in zip(tests, a['fits']) if valid and not fits]
        wrong += bool(bad)
        check(f'{place}: nothing that is not valid', not bad, (schema, bad))
        if missed and os.environ.get('MEDRUN_GRAMMAR_SHOW'):
            print('missed', place, json.dumps(schema)[:400], missed[0][:200])
        passing += not bad and not missed and not a['failed']
    check(f'{name}: as many as before', passing >= PASS[name], passing)
    print(f'{name}: {len(groups)} schemas, {taken} taken, {passing} pass '
          f'({100 * passing / len(groups):.1f} %), {wrong} take what is not valid')
    for reason, n in why.most_common(12 if os.environ.get('MEDRUN_GRAMMAR_SHOW') else 0):
        print(f'{n:6} {reason}')


def suite(program, folder):
    groups = []
    for path in sorted(glob.glob(os.path.join(folder, '*.json'))):
        with open(path, encoding='utf-8') as f:
            for g in json.load(f):
                groups.append((f'{os.path.basename(path)}: {g["description"]}', g['schema'],
                               [(json.dumps(t['data'], ensure_ascii=False), t['valid'])
                                for t in g['tests']]))
    judge(program, 'suite', groups)


def mask(program, folder):
    groups = []
    for path in sorted(glob.glob(os.path.join(folder, '*.json'))):
        with open(path, encoding='utf-8') as f:
            g = json.load(f)
        groups.append((os.path.basename(path), g['schema'],
                       [(json.dumps(t['data'], ensure_ascii=False), t['valid'])
                        for t in g['tests']]))
    judge(program, 'mask', groups)


# ---- schemas made by chance ----------------------------------------------------------------------

def some_schema(rng, depth, plain):
    """PLAIN: only what llguidance reads as we do, to the byte."""
    kind = rng.choice(('null', 'boolean', 'integer', 'string', 'string', 'enum', 'number') +
                      ('object', 'object', 'array', 'any') * (depth > 0))
    s = {'type': kind}
    lo = rng.randrange(-200, 1000)
    if kind == 'integer' and rng.random() < 0.7:
        lo = abs(lo) + 1 if plain else lo
        s.update(minimum=lo, maximum=lo + rng.choice((0, 3, 90, 5000)))
        if not plain and rng.random() < 0.4:
            s.update(multipleOf=rng.choice((1, 3, 7, 10)), maximum=lo + 500)
    elif kind == 'number':
        if plain:
            return {'type': 'boolean'}
        s.update({rng.choice(('minimum', 'exclusiveMinimum')): lo / 8, 'maximum': lo / 8 + 9.375})
    elif kind == 'string':
        if rng.random() < 0.5:
            s['pattern'] = rng.choice(('^[a-z]{2,4}$', '^(ab|cd)+e?$', '^[A-Z][0-9]{3}$', '^x*$',
                                       '^[^a-z"\\\\]{1,3}$', '^[a-c\xe4]+$', '^.{1,3}$'))
        if rng.random() < 0.5:
            if not plain or 'pattern' not in s:
                s.update(minLength=rng.randrange(3), maxLength=rng.randrange(3, 7))
        elif not plain and rng.random() < 0.4:
            s['format'] = rng.choice(('date', 'time', 'date-time', 'uuid', 'ipv4', 'ipv6', 'email',
                                      'hostname', 'uri', 'duration'))
            s.pop('pattern', None)
    elif kind == 'enum':
        s = {'enum': rng.sample(['a', 'ab', 'b c', 'x"y', 'ä', 5, 17, True, None], 4)}
    elif kind == 'array':
        s['items'] = some_schema(rng, depth - 1, plain)
        s.update(minItems=rng.randrange(3), maxItems=rng.randrange(2, 5))
        if rng.random() < 0.4:
            s['prefixItems'] = [some_schema(rng, depth - 1, plain) for _ in range(2)]
            s['items'] = rng.choice((False, s['items']))
    elif kind == 'object':
        names = rng.sample(['a', 'b', 'ab', 'long name', 'x1', 'x2'], rng.randrange(1, 4))
        s['properties'] = {n: some_schema(rng, depth - 1, plain) for n in names}
        s['required'] = [n for n in names if rng.random() < 0.5]
        s['additionalProperties'] = False
        if not plain and rng.random() < 0.5:
            s['additionalProperties'] = some_schema(rng, 0, plain)
            if rng.random() < 0.5:
                s['patternProperties'] = {'^x': some_schema(rng, 0, plain)}
            if rng.random() < 0.5:
                s['propertyNames'] = {'maxLength': 9}
        if not plain and rng.random() < 0.3:
            s.update(minProperties=1, maxProperties=rng.randrange(1, 4))
    elif kind == 'any':
        parts = [some_schema(rng, depth - 1, plain) for _ in range(2)]
        s = {rng.choice(('anyOf', 'anyOf', 'allOf', 'oneOf')) if not plain else 'anyOf': parts}
    return s


def some_schemas(program, n, plain, **more):
    rng = random.Random(11)
    schemas = [some_schema(rng, 3, plain) for _ in range(n)]
    answers = ask(program, [{'schema': s, 'open': True, **more} for s in schemas])
    return [(s, a) for s, a in zip(schemas, answers) if check_lives(s, a) and 'error' not in a]


def check_lives(schema, a):
    check('it lives', a is not None, schema)
    return a is not None


def walks(program, n):
    import jsonschema
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    texts = 0
    taken = some_schemas(program, int(n), False, walks=20)
    for schema, a in taken:
        v = jsonschema.Draft202012Validator(schema, format_checker=formats)
        wrong = []
        for text in a['walks']:
            texts += 1
            try:
                if not v.is_valid(json.loads(text)):
                    wrong.append(text)
            except ValueError as e:
                wrong.append((text, str(e)))
        check('texts that were made are valid', not wrong and not a['failed'], (schema, wrong[:3]))
    print(f'walks: {n} random schemas, {len(taken)} taken, {texts} texts')
    check('most are taken', len(taken) > int(n) * 0.6)


def outside(text):
    """Is what comes next outside of strings?"""
    return len(re.sub(r'\\.', '', text).split('"')) % 2 == 1


def follow(program, n):
    import llguidance
    tokenizer = llguidance.LLTokenizer('byte')
    rng = random.Random(12)
    taken = some_schemas(program, int(n), True, walks=4)
    lines = []
    for schema, a in taken:
        cuts = [t[:rng.randrange(len(t) + 1)] for t in a['walks'] for _ in range(3)]
        cuts = [t for t in cuts if not set(t) & set('\n\x7f')]        # they allow neither here
        lines.append({'schema': schema, 'open': True, 'next': cuts})
    pairs = same = 0
    for line, a in zip(lines, ask(program, lines)):
        for text, ours in zip(line['next'], a['next']):
            m = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(
                line['schema'], overrides={'whitespace_flexible': True}))
            if m.is_error() or not m.consume_tokens(list(text.encode())) or m.is_error():
                check('llguidance takes it', False, (line['schema'], text, m.get_error()))
                continue
            bits = m.compute_bitmask()
            theirs = {i for i in range(256) if bits[i // 8] >> i % 8 & 1}
            if text.endswith('\\'):
                continue                    # they escape what needs none, too
            own = set(bytes.fromhex(ours.strip('.'))) - {127}
            theirs -= {127}
            if outside(text):               # each has its own blanks
                theirs -= set(b' \n\r\t')
                own -= set(b' \n\r\t')
            pairs += 1
            same += own == theirs
            check('the same bytes may follow', own == theirs,
                  (line['schema'], text, bytes(own - theirs), bytes(theirs - own)))
    print(f'next: {pairs} beginnings, {same} may be followed by the same bytes as in llguidance')


def main():
    program, what = sys.argv[1], sys.argv[2:]
    while what:
        {'suite': suite, 'mask': mask, 'walks': walks, 'next': follow}[what[0]](program, what[1])
        what = what[2:]
    print('{passed} passed, {failed} failed, {skipped} skipped'.format(**counts))
    return counts['failed'] > 0


if __name__ == '__main__':
    sys.exit(main())
