#!/usr/bin/env python3
"""serve_load.py URL, or serve_load.py [-n TURNS] NAME COMMAND [NAME COMMAND]...: how fast servers of
OpenAI's API are. COMMANDs are started in turn, A B A B, PORT in them is a free one, and the table
has the median of each measure. Works for medrun-serve and llama-server; Python's standard library
alone. Figures count only where nothing else runs. With the same weights:

    serve_load.py ours 'medrun-serve M.mdr --port PORT -c 4096 -q' \\
        theirs 'llama-server -m M.gguf --port PORT -c 32768 -np 8 -t 2 --no-ui'
"""
import atexit, http.client, json, shlex, socket, statistics, subprocess, sys, threading, time
from urllib.parse import urlparse

TEXT = 'The heart pumps blood through the body. '
URL = None


def connect(timeout=3600):
    return http.client.HTTPConnection(URL.hostname, URL.port, timeout=timeout)


def ask(method, path, body=None):
    c = connect()
    c.request(method, path, body and json.dumps(body), {'Content-Type': 'application/json'})
    r = c.getresponse()
    text = r.read()
    c.close()
    return r.status, text


class Stream(threading.Thread):
    """Asks for N tokens: the time of its start and of each chunk with text."""
    def __init__(self, prompt, n):
        super().__init__()
        self.prompt, self.n, self.times, self.stops = prompt, n, [], False
        self.start()

    def run(self):
        c = connect()
        self.began = time.time()
        c.request('POST', '/v1/completions', json.dumps({
            'model': 'x', 'prompt': self.prompt, 'max_tokens': self.n, 'temperature': 0,
            'stream': True, 'ignore_eos': True, 'cache_prompt': False,
            'cache_salt': str(self.began)}), {'Content-Type': 'application/json'})
        r = c.getresponse()
        if r.status != 200:
            print(r.status, r.read(500), file=sys.stderr)
        for line in r:
            if line.startswith(b'data: {') and json.loads(line[6:])['choices']:
                self.times.append(time.time())
            if self.stops:
                break
        c.close()

    def first(self):
        return self.times[0] - self.began

    def gaps(self, since=0, until=1e18):
        return [b - a for a, b in zip(self.times, self.times[1:]) if b >= since and a <= until]


def rate(runs):
    [s.join() for s in runs]
    first = min(s.times[0] for s in runs)
    return sum(len(s.times) - 1 for s in runs) / (max(s.times[-1] for s in runs) - first)


class Health(threading.Thread):
    def __init__(self):
        super().__init__()
        self.times, self.stops = [], False
        self.start()

    def run(self):
        while not self.stops:
            start = time.time()
            ask('GET', '/health')
            self.times.append(time.time() - start)
            time.sleep(0.02)

    def worst(self):
        self.stops = True
        self.join()
        return sorted(self.times)[int(0.99 * len(self.times))]


def idle():
    return not any(s['is_processing'] for s in json.loads(ask('GET', '/slots')[1]))


def wait_for(what, step=0.002):
    start = time.time()
    while not what():
        time.sleep(step)
    return time.time() - start


def measure():
    """Each measure by its name."""
    ids = json.loads(ask('POST', '/tokenize', {'content': TEXT * 300})[1])['tokens']
    Stream(ids[:64], 8).join()          # weights come into memory
    found = {'one stream, tokens/s': rate([Stream(TEXT, 96)])}
    found['eight streams, tokens/s'] = rate([Stream(TEXT * (i + 1), 96) for i in range(8)])
    found['eight by one'] = found['eight streams, tokens/s'] / found['one stream, tokens/s']
    short = Stream(ids[:512], 2)
    short.join()
    found['first token of 512, s'] = short.first()
    health = Health()
    seven = [Stream(TEXT * (i + 1), 1500) for i in range(7)]
    wait_for(lambda: all(len(s.times) > 12 for s in seven) or not any(s.is_alive() for s in seven))
    late = Stream(ids[:2000], 2)
    late.join()
    found['/health, 99 of 100, ms'] = 1e3 * health.worst()
    usual = statistics.median(g for s in seven for g in s.gaps(0, late.began))
    found['usual gap of seven, s'] = usual
    found['longest as 2000 tokens come, s'] = max(g for s in seven
                                                 for g in s.gaps(late.began, late.times[0]))
    found['longest by usual'] = found['longest as 2000 tokens come, s'] / usual
    found['first token of those 2000, s'] = late.first()
    for s in seven:
        s.stops = True
    [s.join() for s in seven]
    wait_for(idle)
    gone = Stream(TEXT, 1500)
    wait_for(lambda: len(gone.times) > 5)
    gone.stops = True
    gone.join()
    found['cancel to idle, ms'] = 1e3 * wait_for(idle)
    return found


def start(command):
    """Starts a server and waits until it is there."""
    global URL
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    URL = urlparse(f'http://127.0.0.1:{port}')
    p = subprocess.Popen(shlex.split(command.replace('PORT', str(port))),
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(p.kill)

    def ready():
        try:
            return ask('GET', '/health')[0] == 200
        except OSError:
            if p.poll() is not None:
                sys.exit(f'{command}: ended with {p.returncode}')
            return False
    wait_for(ready, 0.05)
    return p


def main(args):
    global URL
    turns = int(args[1]) if args[:1] == ['-n'] else 2
    args = args[2:] if args[:1] == ['-n'] else args
    if len(args) < 2:
        URL = urlparse(args[0] if args else 'http://127.0.0.1:8080')
        for name, value in measure().items():
            print(f'{name:32} {value:10.3f}')
        return
    names, all_found = args[::2], {name: [] for name in args[::2]}
    for _ in range(turns):
        for name, command in zip(names, args[1::2]):
            p = start(command)
            all_found[name].append(measure())
            print(f'{name}: {all_found[name][-1]}', file=sys.stderr, flush=True)
            p.terminate()
            p.wait()
    print(f'{"median of " + str(turns) + " turns":32}' + ''.join(f'{n:>12}' for n in names))
    for measured in all_found[names[0]][0]:
        print(f'{measured:32}' + ''.join(
            f'{statistics.median(f[measured] for f in all_found[n]):12.3f}' for n in names))


if __name__ == '__main__':
    main(sys.argv[1:])
