#!/usr/bin/env python3
"""serve_load.py URL, or serve_load.py [-n TURNS] NAME COMMAND [NAME COMMAND]...: how fast servers of
OpenAI's API are. COMMANDs are started in turn, A B A B, PORT in them is a free one, and the table
(Markdown) has the median of each measure, what is wanted of the first server, beside the second
where that is the measure, and whether it is reached. Works for medrun-serve and llama-server;
Python's standard library alone. Figures count only where nothing else runs, and of a model whose
passes take longer than a request to /slots: of the demo, this client is what is measured. With the
same weights:

    serve_load.py ours 'medrun-serve M.mdr --port PORT -c 4096 -q' \\
        theirs 'llama-server -m M.gguf --port PORT -c 32768 -np 8 -t 2 --no-ui'
"""
import atexit, http.client, json, select, shlex, socket, statistics, subprocess, sys, threading
import time
from urllib.parse import urlparse

# Of the first server: at least or at most a number, or as many times better than the second.
WANTED = {'eight streams, tokens/s': ('times', 2), 'eight by one': ('>=', 6),
          'first token of 512, s': ('times', 2.4), 'longest by usual': ('<=', 3),
          'cancel to idle, passes': ('<=', 1), '/health, 99 of 100, ms': ('<=', 20)}
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
        self.prompt, self.n, self.times, self.stops, self.made = prompt, n, [], False, 0
        self.start()

    def run(self):
        c = connect()
        self.began = time.time()
        c.request('POST', '/v1/completions', json.dumps({
            'model': 'x', 'prompt': self.prompt, 'max_tokens': self.n, 'temperature': 0,
            'stream': True, 'stream_options': {'include_usage': True}, 'ignore_eos': True,
            'cache_prompt': False,
            'cache_salt': str(self.began)}), {'Content-Type': 'application/json'})
        r = c.getresponse()
        if r.status != 200:
            print(r.status, r.read(500), file=sys.stderr)
        for line in r:
            event = json.loads(line[6:]) if line.startswith(b'data: {') else {}
            if event.get('choices'):
                self.times.append(time.time())
            if event.get('usage'):      # llama-server sends it with the last choice
                self.made = event['usage']['completion_tokens']
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
    return sum(s.made - 1 for s in runs) / (max(s.times[-1] for s in runs) - first)


def watch_health():
    """Prints how long /health took, until our own input ends. A process for itself, as the threads
    of this one wait for each other."""
    while not select.select([sys.stdin], [], [], 0.02)[0]:
        began = time.time()
        ask('GET', '/health')
        print(time.time() - began)


class Health:
    def __init__(self):
        self.p = subprocess.Popen([sys.executable, __file__, '--health', URL.geturl()],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def worst(self):
        times = sorted(float(t) for t in self.p.communicate()[0].split())
        return times[int(0.99 * len(times))]


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
    firsts = []
    for _ in range(3):
        firsts.append(Stream(ids[:512], 2))
        firsts[-1].join()
    found['first token of 512, s'] = statistics.median(s.first() for s in firsts)
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
    waits, passes = [], []
    for _ in range(3):
        gone = Stream(TEXT, 1500)
        wait_for(lambda: len(gone.times) > 12)
        gone.stops = True
        gone.join()
        waits.append(wait_for(idle))
        passes.append(waits[-1] / statistics.median(gone.gaps()))
    found['cancel to idle, ms'] = 1e3 * statistics.median(waits)
    found['cancel to idle, passes'] = statistics.median(passes)
    return found


def print_table(names, found):
    """FOUND: for each name, the median of each measure."""
    print('| measure |', ' | '.join(names), '| wanted | |')
    print('|---|' + '---:|' * len(names) + '---|---|')
    for measure, own in found[names[0]].items():
        how, much = WANTED.get(measure, ('', 0))
        other = found[names[1]][measure] if len(names) > 1 else None
        ratio = own / other if 'tokens/s' in measure and other else other and other / own
        if how == 'times':
            wanted = f'{much} x {names[1]}' if other else f'{much} x another'
            good = f'{ratio:.2f} x: ' + ('yes' if ratio >= much else 'NO') if other else ''
        else:
            wanted = f'{how} {much}' if how else ''
            good = how and ('yes' if (own >= much if how == '>=' else own <= much) else 'NO')
        values = ' | '.join(f'{found[n][measure]:.3f}' for n in names)
        print(f'| {measure} | {values} | {wanted} | {good} |')


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
    if args[:1] == ['--health']:
        URL = urlparse(args[1])
        watch_health()
        return
    turns = int(args[1]) if args[:1] == ['-n'] else 2
    args = args[2:] if args[:1] == ['-n'] else args
    if len(args) < 2:
        URL = urlparse(args[0] if args else 'http://127.0.0.1:8080')
        print_table(['server'], {'server': measure()})
        return
    names, all_found = args[::2], {name: [] for name in args[::2]}
    for _ in range(turns):
        for name, command in zip(names, args[1::2]):
            p = start(command)
            all_found[name].append(measure())
            print(f'{name}: {all_found[name][-1]}', file=sys.stderr, flush=True)
            p.terminate()
            p.wait()
    print_table(names, {n: {m: statistics.median(f[m] for f in all_found[n])
                            for m in all_found[n][0]} for n in names})


if __name__ == '__main__':
    main(sys.argv[1:])
