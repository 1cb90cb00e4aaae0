#!/usr/bin/env python3
"""grammar.py PROGRAM WHAT...: other people's test suites of JSON schemas against the rules that
medrun-serve makes of them; PROGRAM is tests/44_grammar.c. WHAT:

    suite FOLDER    tests/draft2020-12 of github.com/json-schema-org/JSON-Schema-Test-Suite
    mask FOLDER     maskbench/data of github.com/guidance-ai/jsonschemabench

A schema passes where it is taken, and all its valid texts fit, and none that is not valid. Of what is
not valid nothing may ever fit: a failure. How many pass is a ratchet: fewer are a failure."""
import collections, glob, json, os, re, subprocess, sys, tempfile

PASS = {'suite': 149, 'mask': 9619}     # the ratchet: at least as many
counts = {'passed': 0, 'failed': 0, 'skipped': 0}


def check(what, good, shown=''):
    counts['passed' if good else 'failed'] += 1
    if not good:
        print('FAILED:', what, str(shown)[:600])


def ask(program, lines):
    """The answers to LINES; one that ends the program is answered with None."""
    answers = []
    while len(answers) < len(lines):
        with tempfile.NamedTemporaryFile('w', suffix='.jsonl', encoding='utf-8') as f:
            f.writelines(json.dumps(x, ensure_ascii=False) + '\n' for x in lines[len(answers):])
            f.flush()
            p = subprocess.run([program], env={**os.environ, 'MEDRUN_GRAMMAR_CASES': f.name},
                               stdout=subprocess.PIPE)
        answers += [json.loads(x) for x in p.stdout.decode('utf-8', 'replace').splitlines()]
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


def main():
    program, what = sys.argv[1], sys.argv[2:]
    while what:
        {'suite': suite, 'mask': mask}[what[0]](program, what[1])
        what = what[2:]
    print('{passed} passed, {failed} failed, {skipped} skipped'.format(**counts))
    return counts['failed'] > 0


if __name__ == '__main__':
    sys.exit(main())
