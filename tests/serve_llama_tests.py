#!/usr/bin/env python3
"""serve_llama_tests.py BIN: llama.cpp's own tests of its server, asked of medrun-serve. They are
not here: LLAMA_SERVER_TESTS names the folder tools/server/tests of its source (b11434 was tried),
which wants pytest, requests, openai and filelock. Which of them must pass stands in
serve_llama_tests.txt, and why the others do not; a list that only grows.

Their model, stories260K, is not here, either: a fixture answers in its place. What they say of its
texts, and of how many tokens its tokenizer makes, is not looked at; all else is."""
import os, shlex, shutil, socket, subprocess, sys, tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
LIST = os.path.join(HERE, 'serve_llama_tests.txt')
FILES = ['test_basic', 'test_tokenize', 'test_completion', 'test_chat_completion', 'test_ctx_shift',
         'test_metrics', 'test_ignore_eos', 'test_security', 'test_tool_call']
MODEL = os.path.abspath(os.environ.get('MEDRUN_TEST_MODEL', 'build/llama-grouped-int8.mdr'))

# What medrun-serve calls what they ask of llama-server; the rest has no meaning here.
SAME = {'--port': '--port', '--host': '--host', '--alias': '--alias', '--parallel': '--parallel',
        '--threads': '--threads', '--no-ui': '--no-ui'}
TEMPLATES = ['llama3.1', 'llama3', 'llama2', 'chatml']


def as_llama_server(binary, words):
    """Becomes medrun-serve, with the options of llama-server's that it has."""
    args, got = [], {}
    for word, value in zip(words, words[1:] + ['']):
        if word.startswith('-'):
            got[word] = value
        if word in SAME:
            args += [SAME[word]] + ([] if word == '--no-ui' else [value])
    if '--ctx-size' in got:             # theirs is divided among the slots
        shares = 1 if '--kv-unified' in got else int(got.get('--parallel', 1))
        args += ['--ctx-size', str(min(int(got['--ctx-size']) // shares, 512))]
    if '--batch-size' in got:
        args += ['--batch', str(min(max(int(got['--batch-size']), 64), 512))]
    if '--api-key' in got:
        os.environ['MEDRUN_API_KEY'] = got['--api-key']
    wanted = got.get('--chat-template', got.get('--chat-template-file', '')).lower()
    for name in TEMPLATES:
        if name in wanted.replace('-', ''):
            args += ['--template', name]
            break
    os.execv(binary, [binary, MODEL, *args, *shlex.split(os.environ.get('MEDRUN_SERVE_ARGS', ''))])


PLUGIN = '''
import utils


class Whatever(int):                    # how many tokens their tokenizer makes of a text
    def __eq__(self, other):
        return isinstance(other, int) and other > 0
    __hash__ = int.__hash__


def pytest_collection_modifyitems(items):
    for item in items:
        given = getattr(item, "callspec", None)
        if given and "n_prompt" in given.params:
            given.params.update(n_prompt=Whatever(), re_content="")


STORIES = ["(going|bed)+", "(Suddenly)+", "(little|girl)+"]
match = utils.match_regex
utils.match_regex = lambda regex, text: regex in STORIES or match(regex, text)


# Their server has a seed for all that say none, and their model never comes to an end.
def like_stories(ask):
    def asks(self, method, path, data=None, *args, **more):
        if data and "completion" in path:
            data = {"seed": self.seed, "ignore_eos": True, **data}
        return ask(self, method, path, data, *args, **more)
    return asks


for name in ("make_request", "make_stream_request"):
    setattr(utils.ServerProcess, name, like_stories(getattr(utils.ServerProcess, name)))
'''


def run(folder, binary, made):
    """What pytest says of each test, as {name: passed}."""
    shim = os.path.join(made, 'llama-server')
    with open(os.path.join(made, 'medrun_plugin.py'), 'w') as f:
        f.write(PLUGIN)
    with open(os.path.join(made, 'wget.py'), 'w') as f:
        f.write('def download(*args, **more): raise OSError("no network")\n')
    with open(shim, 'w') as f:
        f.write('#!/bin/sh\nexec %s %s --as-llama-server %s "$@"\n' % (
            shlex.quote(sys.executable), shlex.quote(os.path.abspath(__file__)),
            shlex.quote(os.path.abspath(binary))))
    os.chmod(shim, 0o755)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'LLAMA_SERVER_BIN_PATH': shim, 'PORT': str(port),
           'PYTHONPATH': made + os.pathsep + folder, 'PYTHONDONTWRITEBYTECODE': '1',
           'MEDRUN_TEST_MODEL': MODEL}
    r = subprocess.run([sys.executable, '-m', 'pytest', '-p', 'medrun_plugin', '-p',
                        'no:cacheprovider', '-q', '-rA', '--tb=line', '-m', 'not slow',
                        '--basetemp', os.path.join(made, 'tmp'),
                        *[os.path.join('unit', f + '.py') for f in FILES]],
                       cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       text=True)
    found = {}
    for line in r.stdout.splitlines():
        for word in ('PASSED', 'FAILED', 'ERROR'):
            if line.startswith(word + ' unit/'):
                name = line[len(word) + 6:].split(' - ')[0]
                found[name] = word == 'PASSED'
    if not found:
        sys.exit('serve_llama_tests.py: ' + r.stdout[-2000:])
    return found


def main():
    folder = os.environ.get('LLAMA_SERVER_TESTS')
    try:
        import filelock, openai, pytest, requests
        missing = None if folder else "no LLAMA_SERVER_TESTS: llama.cpp's tests of its server"
        missing = missing or (None if os.path.exists(MODEL) else 'no ' + MODEL)
    except ImportError as e:
        missing = f"llama.cpp's tests of its server: {e}"
    if missing:
        print('skipped:', missing)
        print('0 passed, 0 failed, 1 skipped')
        return 0
    with open(LIST) as f:
        wanted = [line.rstrip('\n') for line in f if not line.startswith('#') and line.strip()]
    made = tempfile.mkdtemp()
    found = run(os.path.abspath(folder), sys.argv[1], made)
    shutil.rmtree(made, ignore_errors=True)
    lost = [name for name in wanted if not found.get(name)]
    for name in lost:
        print('FAILED:', name)
    for name in found:
        if found[name] and name not in wanted:
            print('passes, and is not in the list:', name)
    print(f"llama.cpp's tests of its server: {sum(found.values())} of {len(found)} pass")
    print(f'{len(wanted) - len(lost)} passed, {len(lost)} failed, 0 skipped')
    return len(lost) > 0


if __name__ == '__main__':
    if len(sys.argv) > 3 and sys.argv[1] == '--as-llama-server':
        as_llama_server(sys.argv[2], sys.argv[3:])
    sys.exit(main())
