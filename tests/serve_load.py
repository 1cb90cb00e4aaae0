#!/usr/bin/env python3
"""serve_load.py URL: how fast a server of OpenAI's API is: one stream, eight, the first token, the
others' gaps while a long prompt arrives, /health meanwhile. Works for medrun-serve and for others;
Python's standard library alone. Run it on a quiet machine, servers in turn."""
import http.client, json, sys, threading, time
from urllib.parse import urlparse

URL = urlparse(sys.argv[1] if len(sys.argv) > 1 else 'http://127.0.0.1:8080')
TEXT = 'The heart pumps blood through the body. '


def stream(prompt, n):
    """Asks for N tokens; the time of the start and of each chunk with text."""
    c = http.client.HTTPConnection(URL.hostname, URL.port, timeout=3600)
    start = time.time()
    c.request('POST', '/v1/completions', json.dumps({
        'model': 'x', 'prompt': prompt, 'max_tokens': n, 'temperature': 0, 'stream': True,
        'ignore_eos': True, 'cache_prompt': False, 'cache_salt': str(start)}),
        {'Content-Type': 'application/json'})
    r = c.getresponse()
    if r.status != 200:
        sys.exit(f'{r.status}: {r.read(500)}')
    times = []
    for line in r:
        if line.startswith(b'data: {') and json.loads(line[6:])['choices']:
            times.append(time.time())
    c.close()
    return start, times


def together(tasks):
    out = [None] * len(tasks)

    def run(i):
        out[i] = stream(*tasks[i])
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return out


def rate(runs):
    first = min(t[0] for _, t in runs)
    return sum(len(t) - 1 for _, t in runs) / (max(t[-1] for _, t in runs) - first)


def gaps(times, since=0, until=1e18):
    return [b - a for a, b in zip(times, times[1:]) if b >= since and a <= until]


def health(stop, out):
    while not stop.is_set():
        start = time.time()
        c = http.client.HTTPConnection(URL.hostname, URL.port, timeout=60)
        c.request('GET', '/health')
        c.getresponse().read()
        c.close()
        out.append(time.time() - start)
        time.sleep(0.02)


one = stream(TEXT, 96)
print(f'one stream        {rate([one]):8.1f} tokens/s')
eight = together([(TEXT * (i + 1), 96) for i in range(8)])
print(f'eight streams     {rate(eight):8.1f} tokens/s, {rate(eight) / rate([one]):.2f} times one')
start, times = stream(TEXT * 57, 2)
print(f'512-token prompt  {times[0] - start:8.3f} s to the first token')
stop, health_times = threading.Event(), []
watcher = threading.Thread(target=health, args=(stop, health_times))
watcher.start()
late = {}
thread = threading.Thread(target=lambda: (time.sleep(1), late.update(r=stream(TEXT * 200, 2))))
thread.start()
seven = together([(TEXT * (i + 1), 400) for i in range(7)])
thread.join()
stop.set()
watcher.join()
start, times = late['r']
during = [g for _, t in seven for g in gaps(t, start, times[0])]
usual = sorted(g for _, t in seven for g in gaps(t, 0, start))
if during and usual:
    middle = usual[len(usual) // 2]
    print(f'long prompt beside seven: longest gap {max(during):.3f} s, usual {middle:.3f} s; '
          f'its first token after {times[0] - start:.3f} s')
health_times.sort()
print(f'/health under load: {1e3 * health_times[int(0.99 * len(health_times))]:.1f} ms for 99 of 100')
