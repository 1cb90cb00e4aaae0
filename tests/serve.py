#!/usr/bin/env python3
"""serve.py BIN PART...: asks a medrun-serve that it starts itself, with Python's standard library
alone. Parts: api limits grammar tools refusals webui hostile promise types. The last line is as in
the other tests."""
import atexit, base64, hashlib, http.client, json, os, random, re, shutil, signal, socket
import subprocess, sys, tempfile, threading, time

MODEL = 'tools/demo/demo.mdr'
ALL = bool(os.environ.get('MEDRUN_TEST_ALL'))
counts = {'passed': 0, 'failed': 0, 'skipped': 0}
lock = threading.Lock()


def check(what, good, shown=''):
    with lock:
        counts['passed' if good else 'failed'] += 1
        if not good:
            print('FAILED:', what, str(shown)[:600], flush=True)


def skip(what):
    counts['skipped'] += 1
    print('skipped:', what)


def free_port():
    s = socket.socket()
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


class Server:
    def __init__(self, *args, model=MODEL, host='127.0.0.1', env=None, wait=True):
        self.port = free_port()
        self.log = tempfile.TemporaryFile()
        command = [BIN, model, '--port', str(self.port), '--host', host, *args]
        command += os.environ.get('MEDRUN_SERVE_ARGS', '').split()
        self.p = subprocess.Popen(command, stderr=self.log, env={**os.environ, **(env or {})})
        atexit.register(self.p.kill)    # whatever becomes of this test
        for _ in range(400 if wait else 0):
            try:
                if self.ask('GET', '/health')[0] == 200:
                    return
            except OSError:
                pass
            if self.p.poll() is not None:
                break
            time.sleep(0.05)
        if wait:
            sys.exit('the server did not start: ' + self.text())

    def text(self):
        self.log.seek(0)
        return self.log.read().decode('utf-8', 'replace')

    def connect(self, timeout=600):
        return http.client.HTTPConnection('127.0.0.1', self.port, timeout=timeout)

    def ask(self, method, path, body=None, headers=None, timeout=600):
        c = self.connect(timeout)
        h = {'Content-Type': 'application/json', **(headers or {})}
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body)
        c.request(method, path, data, h)
        r = c.getresponse()
        text = r.read()
        c.close()
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        return r.status, value, {k.lower(): v for k, v in r.getheaders()}

    def metric(self, name):
        text = self.ask('GET', '/metrics')[1].decode()
        return float(re.search('^' + name + r' ([0-9.]+)', text, re.M).group(1))

    def post(self, path, **body):
        return self.ask('POST', path, body)

    def chunks(self, path, **body):
        """The events of a streamed answer, [DONE] as a text."""
        c = self.connect()
        c.request('POST', path, json.dumps({**body, 'stream': True}),
                  {'Content-Type': 'application/json'})
        r = c.getresponse()
        text = r.read().decode()
        c.close()
        if r.status != 200:
            return r.status, json.loads(text)
        events = [e for e in text.split('\n\n') if e and not e.startswith(':')]
        assert all(e.startswith('data: ') and '\n' not in e for e in events), events
        return 200, [e[6:] if e == 'data: [DONE]' else json.loads(e[6:]) for e in events]

    def raw(self, data, pieces=None, timeout=20):
        """What comes back for these bytes, to the end of the connection or of the answer."""
        s = socket.create_connection(('127.0.0.1', self.port), timeout)
        for piece in pieces or [data]:
            s.sendall(piece)
            if pieces:
                time.sleep(0.0005)
        out = b''
        try:
            while True:
                more = s.recv(65536)
                out += more
                head, _, body = out.partition(b'\r\n\r\n')
                length = re.search(rb'Content-Length: (\d+)', head)
                if not more or (length and len(body) >= int(length.group(1))):
                    break
        except OSError:
            pass
        s.close()
        return out

    def end(self):
        self.p.send_signal(signal.SIGTERM)
        code = self.p.wait(60)
        return code


CHAT = '/v1/chat/completions'
ASK = [{'role': 'user', 'content': 'What are the symptoms of diabetes?'}]


def plain(value):
    """An answer without what says who made it, when, and how fast."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()
                if k not in ('id', 'created', 'timings', 'prompt_tokens_details') or
                (k == 'id' and isinstance(v, int))}
    return value


# ---- what the API says ---------------------------------------------------------------------------

def part_api():
    s = Server('--lenient')
    status, m, _ = s.ask('GET', '/v1/models')
    check('models', status == 200 and m['data'][0]['max_model_len'] == 2048, m)
    name = m['data'][0]['id']
    check('one model', s.ask('GET', '/v1/models/' + name.replace(' ', '%20'))[1]['id'] == name)
    for other in ('other', name[:3], name.replace(' ', '%2'), name.replace(' ', '%00'), '%'):
        check('no such model', s.ask('GET', '/v1/models/' + other)[0] == 404, other)
    status, a, _ = s.post(CHAT, messages=ASK)
    text = a['choices'][0]['message']['content']
    check('chat', 'thirst' in text and a['choices'][0]['finish_reason'] == 'stop', a)
    medrun = os.path.join(os.path.dirname(BIN), 'medrun')
    medrun = medrun if os.path.exists(medrun) else './medrun'
    said = subprocess.run([medrun, 'run', MODEL, '-p',
                           ASK[0]['content']], capture_output=True).stdout.decode().strip()
    check('the same as medrun run', text.strip() == said, (text, said))
    check('usage', a['usage']['total_tokens'] == a['usage']['prompt_tokens'] +
          a['usage']['completion_tokens'], a)
    again = s.post(CHAT, messages=ASK)[1]
    check('the prompt was kept', again['usage']['prompt_tokens_details']['cached_tokens'] > 0)
    check('and changed nothing', plain(again['choices']) == plain(a['choices']))
    for kind, body in (('chat', {'messages': ASK}), ('text', {'prompt': 'The pancreas'})):
        for n in (1, 3):
            for top in (None, 0, 5):
                for stop in (None, ['of', 'and hunger']):
                    q = dict(body, n=n, temperature=0.9, seed=7, max_tokens=24)
                    if stop:
                        q['stop'] = stop
                    if top is not None:
                        q.update({'logprobs': True, 'top_logprobs': top} if kind == 'chat'
                                 else {'logprobs': top})
                    streamed_as_whole(s, CHAT if kind == 'chat' else '/v1/completions', q)
    api_fields(s)
    api_llama(s)
    api_progress(s)
    api_tokens(s)
    api_echo(s)
    api_refusals(s)
    code = s.end()
    check('SIGTERM ends it', code == 0, code)
    check('no text in the log', 'diabetes' not in s.text() and 'thirst' not in s.text())


def streamed_as_whole(s, path, q):
    status, a, _ = s.post(path, **q)
    code, events = s.chunks(path, stream_options={'include_usage': True}, **q)
    check('statuses', status == 200 and code == 200, (q, a, events))
    if status != 200 or code != 200:
        return
    check('[DONE]', events[-1] == '[DONE]')
    check('usage', plain(events[-2]['usage']) == plain(a['usage']) and not events[-2]['choices'],
          (events[-2], a['usage']))
    for want in a['choices']:
        mine = [e['choices'][0] for e in events[:-2] if e['choices'][0]['index'] == want['index']]
        if path == CHAT:
            check('role first', mine[0]['delta'] == {'role': 'assistant', 'content': None}, mine[0])
            parts = [c['delta'].get('content') or '' for c in mine]
            check('no empty chunk', all(parts[1:-1]), parts)
            text, whole = ''.join(parts), want['message']['content']
            rows = [r for c in mine if c['logprobs'] for r in c['logprobs']['content']]
            rows_wanted = (want['logprobs'] or {'content': []})['content']
        else:
            text, whole = ''.join(c['text'] for c in mine), want['text']
            rows = [r for c in mine if c['logprobs'] for r in c['logprobs']['token_logprobs']]
            rows_wanted = (want['logprobs'] or {'token_logprobs': []})['token_logprobs']
        check('streamed text', text == whole, (q, text, whole))
        check('streamed log-probabilities', rows == rows_wanted, (q, rows, rows_wanted))
        check('one finish_reason', [c['finish_reason'] for c in mine if c['finish_reason']] ==
              [want['finish_reason']])
        for word in q.get('stop', []):
            check('no stop in the text', word not in text, text)


def api_fields(s):
    first = s.post(CHAT, messages=ASK, max_tokens=1, logprobs=True, top_logprobs=20)[1]
    row = first['choices'][0]['logprobs']['content'][0]
    check('20 alternatives', len(row['top_logprobs']) == 20)
    best = [r['logprob'] for r in row['top_logprobs']]
    check('in order', best == sorted(best, reverse=True) and best[0] == row['logprob'])
    check('length', first['choices'][0]['finish_reason'] == 'length')
    ban = s.post(CHAT, messages=ASK, max_tokens=1, logit_bias={str(row['id']): -100})[1]
    check('a ban', ban['choices'][0]['message']['content'] != row['token'], ban)
    check('no bias', s.post(CHAT, messages=ASK, max_tokens=1, logit_bias={})[0] == 200)
    want = s.post(CHAT, messages=ASK, max_tokens=3,
                  logit_bias={str(row['top_logprobs'][5]['id']): 100})[1]
    check('a wish', want['choices'][0]['message']['content'] ==
          3 * row['top_logprobs'][5]['token'], want)
    two = [s.post(CHAT, messages=ASK, temperature=4, seed=k)[1] for k in (5, 5, 6)]
    check('equal seeds', plain(two[0]) == plain(two[1]))
    check('other seeds', plain(two[0]['choices']) != plain(two[2]['choices']))
    many = s.post(CHAT, messages=ASK, temperature=4, seed=5, n=2)[1]
    check('choice k uses seed + k', plain(many['choices'][1]['message']) ==
          plain(two[2]['choices'][0]['message']), many)
    check('null is absent', s.post(CHAT, messages=ASK, max_tokens=None, stop=None, n=None,
                                   tools=None, logit_bias=None)[0] == 200)
    status, a, h = s.post(CHAT, messages=ASK, max_tokens=1, wishes=3, mirostat=2, user='x')
    check('ignored fields are named', h.get('x-medrun-ignored') == 'wishes, mirostat', h)
    check('nothing new', s.post('/v1/completions', prompt='One', max_tokens=0)[1]
          ['choices'][0]['text'] == '')
    more = s.post(CHAT, messages=ASK + [{'role': 'assistant', 'content': 'The symptoms of diabetes'
                                         ' are'}])[1]['choices'][0]['message']['content']
    check('the last message goes on', more.startswith(' increased'), more)
    parts = [{'role': 'developer', 'content': ''}, {'role': 'user', 'content':
             [{'type': 'text', 'text': 'What are the '}, {'type': 'text', 'text': 'signs?'}]}]
    check('parts', s.post(CHAT, messages=parts, max_tokens=1)[0] == 200)
    many = s.post('/v1/completions', prompt=['The heart', 'The liver', [5, 6, 7]], max_tokens=4)[1]
    check('prompts', [c['index'] for c in many['choices']] == [0, 1, 2], many)
    check('counted', many['usage']['completion_tokens'] == 12)
    flat = s.post('/completion', prompt='The heart', n_predict=4, n_probs=2)[1]
    check('llama.cpp shape', flat['content'] == many['choices'][0]['text'] and
          len(flat['completion_probabilities']) == 4 and flat['stop_type'] == 'limit', flat)
    eos = s.post(CHAT, messages=ASK, max_tokens=60, ignore_eos=True)[1]
    check('ignore_eos', eos['choices'][0]['finish_reason'] == 'length')
    half = s.post('/v1/completions', prompt=[5], max_tokens=30, temperature=5, seed=3)[1]
    check('always UTF-8', isinstance(half['choices'][0]['text'], str))


def api_llama(s):
    """llama.cpp's shape, streamed as whole; what it counts, and how fast it says it was."""
    before = s.metric('llamacpp:tokens_predicted_total')
    q = dict(prompt='The symptoms of diabetes', n_predict=12, n_probs=3, seed=5, temperature=0.9)
    whole = s.post('/completion', **q)[1]
    events = s.chunks('/completion', **q)[1]
    check('only the last stops', [e['stop'] for e in events[-2:]] == [False, True], events)
    check('streamed text', ''.join(e['content'] for e in events) == whole['content'], events)
    for field in ('tokens', 'completion_probabilities'):
        check('streamed ' + field, [x for e in events for x in e[field]] == whole[field],
              (events, whole))
    check('generation_settings', whole['generation_settings']['n_predict'] == 12, whole)
    check('the end', whole['stop_type'] == 'limit' and whole['stopping_word'] == '' and
          not whole['has_new_line'], whole)
    check('all tokens are counted', s.metric('llamacpp:tokens_predicted_total') - before == 24)
    word = whole['content'][9:14]
    stopped = s.post('/completion', **q, stop=['not there', word, 'nor this'])[1]
    check('stopping_word', stopped['stop_type'] == 'word' and stopped['stopping_word'] == word and
          stopped['content'] == whole['content'][:whole['content'].index(word)], stopped)
    line = s.post('/completion', prompt='x', grammar='root ::= "a\\nb"')[1]
    check('has_new_line', line['has_new_line'] and line['content'] == 'a\nb', line)
    one = s.post('/completion', prompt='The heart', n_predict=1)[1]['timings']
    check('the first token comes with the prompt', one['predicted_n'] == 1 and
          one['predicted_per_second'] == 0 == one['predicted_per_token_ms'], one)
    t = whole['timings']
    check('the others are timed', abs(t['predicted_per_token_ms'] * 11 - t['predicted_ms']) < .1, t)


def api_progress(s):
    long = 'The heart pumps blood. ' * 60
    for path, body in ((CHAT, {'messages': [{'role': 'user', 'content': long}]}),
                       ('/v1/completions', {'prompt': [long, 'x ' + long]}),
                       ('/completion', {'prompt': long})):
        for salt in ('progress ' + path, 'progress ' + path):       # the second from the cache
            q = dict(body, max_tokens=3, seed=1, timings_per_token=True, cache_salt=salt)
            status, events = s.chunks(path, return_progress=True, **q)
            told = [e for e in events if 'prompt_progress' in e]
            check('progress', status == 200 and len(told) > 1, events)
            check('without any answer', all(not e.get('choices') and not e.get('content')
                                            for e in told), told)
            check('and how fast', all(e['timings']['prompt_ms'] >= 0 and
                                      e['timings']['predicted_n'] == 0 for e in told[:2]), told)
            first, last = told[0]['prompt_progress'], told[-1]['prompt_progress']
            check('from the start', first['processed'] == first['cache'] < first['total'], first)
            check('to the end', last['processed'] == last['total'], last)
            rest = plain([e for e in events if e not in told])
            other = plain(s.chunks(path, **q)[1])
            for e in rest + other:
                e.pop('tokens_cached', 0) if isinstance(e, dict) else None
            check('it changes nothing', rest == other, (rest, other))
        check('the cache counts', first['cache'] > 0, told)
    q = dict(messages=ASK, max_tokens=4, timings_per_token=True,
             stream_options={'include_usage': True})
    events = s.chunks(CHAT, **q)[1]
    check('timings of all but the first', 'timings' not in events[0] and
          all('timings' in e for e in events[1:-1]), events)


def api_tokens(s):
    ids = s.post('/tokenize', prompt='test <|eot_id|>', add_special_tokens=False)[1]
    check('tokenize', ids['count'] == len(ids['tokens']) and 4089 not in ids['tokens'], ids)
    back = s.post('/detokenize', tokens=ids['tokens'])[1]
    check('detokenize', back['prompt'] == 'test <|eot_id|>' == back['content'], back)
    special = s.post('/tokenize', content='a<|eot_id|>')[1]
    check('llama.cpp parses control tokens', special['tokens'][-1] == 4089, special)
    pieces = s.post('/tokenize', content='thé', with_pieces=True)[1]['tokens']
    check('pieces', all('piece' in p for p in pieces), pieces)
    info = s.ask('GET', '/tokenizer_info')[1]
    check('eos', s.post('/tokenize', content=info['eos_token'])[1]['tokens'] == [4089], info)
    t = s.post('/apply-template', messages=ASK)[1]
    check('template', t['prompt'].endswith('<|end_header_id|>\n\n') and t['tokens'][0] == 4080 or
          t['tokens'], t)
    n = s.post(CHAT[3:] + '/input_tokens', messages=ASK)[1]['input_tokens']
    check('both paths', s.post(CHAT + '/input_tokens', messages=ASK)[1]['input_tokens'] == n)
    check('input tokens', n == len(t['tokens']) ==
          s.post(CHAT, messages=ASK, max_tokens=1)[1]['usage']['prompt_tokens'])
    p = s.ask('GET', '/props')[1]
    check('props', p['model_path'] == 'demo.mdr' and len(p['checkpoint_sha256']) == 64, p)
    check('slots', len(s.ask('GET', '/slots')[1]) == 8)
    text = s.ask('GET', '/metrics')[1].decode()
    check('metrics', '# TYPE llamacpp:tokens_predicted_total counter' in text and
          'medrun:inter_token_seconds_bucket{le="+Inf"}' in text)
    for line in text.splitlines():
        check('a metric', line.startswith('# ') or
              re.fullmatch(r'[a-z_:0-9]+(\{[^}]*\})? [-+.e0-9]+', line), line)
    code, body, h = s.ask('GET', '/')
    if b'<script>' in body:
        for tag, name in ((b'script', 'script-src'), (b'style', 'style-src')):
            inner = re.search(b'<%s>(.*?)</%s>' % (tag, tag), body, re.S).group(1)
            want = base64.b64encode(hashlib.sha256(inner).digest()).decode()
            check('hash of the ' + name, f"{name} 'sha256-{want}'" in h['content-security-policy'])
    check('page', code == 200 and len(body) <= 65536, len(body))


def api_echo(s):
    """lm-evaluation-harness's way to log-likelihoods."""
    text = 'The symptoms of diabetes are increased thirst. ' * 9
    ids = s.post('/tokenize', prompt=text)[1]['tokens']
    q = dict(temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    fresh = s.post('/v1/completions', prompt=[ids], cache_salt='one', **q)[1]['choices'][0]
    l = fresh['logprobs']
    check('one row a token', len(l['tokens']) == len(l['token_logprobs']) ==
          len(l['top_logprobs']) == len(l['text_offset']) == len(ids) + 1, l)
    check('null first', l['token_logprobs'][0] is None and l['top_logprobs'][0] is None)
    for i in range(1, len(ids)):
        own = l['top_logprobs'][i].get(l['tokens'][i])
        check('itself among the best', own == l['token_logprobs'][i], l['top_logprobs'][i])
    for _ in range(2):
        kept = s.post('/v1/completions', prompt=[ids], cache_salt='one', **q)[1]
        check('the same from the cache', kept['choices'][0] == fresh, kept)
    check('and it was', kept['usage']['prompt_tokens_details']['cached_tokens'] > 0, kept['usage'])
    longer = [ids + [k] for k in ids[:4]]
    alone = [s.post('/v1/completions', prompt=x, cache_salt=str(i), **q)[1]['choices'][0]
             ['logprobs'] for i, x in enumerate(longer)]
    once = s.post('/v1/completions', prompt=longer, cache_salt='two', **q)[1]
    check('four choices', [c['logprobs'] for c in once['choices']] == alone)
    check('their start was made once', once['usage']['prompt_tokens_details']['cached_tokens'] >
          2 * len(ids), once['usage'])
    off = s.post('/v1/completions', prompt='Wärme über 38 °C', max_tokens=2, logprobs=0,
                 echo=True)
    c = off[1]['choices'][0]
    for at, token in zip(c['logprobs']['text_offset'], c['logprobs']['tokens']):
        if not token.startswith(('bytes:', '<|')):
            check('offsets count characters', c['text'][at:at + len(token)] == token, (c, at))
    all_of_it = s.post('/v1/completions', prompt='a', max_tokens=1, logprobs=20)[1]
    check('20', len(all_of_it['choices'][0]['logprobs']['top_logprobs'][0]) in (20, 21))


REFUSED = [     # body of a chat, param
    ({}, 'messages'), ({'messages': []}, 'messages'), ({'messages': 'x'}, 'messages'),
    ({'messages': [5]}, 'messages'), ({'messages': [{'role': 'user'}]}, 'messages'),
    ({'messages': [{'role': 'king', 'content': 'x'}]}, 'messages'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 'messages'),
    ({'messages': ASK + 2 * [{'role': 'assistant', 'content': 'x'}]}, 'messages'),
    ({'messages': ASK, 'temperature': -1}, 'temperature'),
    ({'messages': ASK, 'temperature': 'hot'}, 'temperature'),
    ({'messages': ASK, 'top_p': 1.5}, 'top_p'), ({'messages': ASK, 'top_k': -1}, 'top_k'),
    ({'messages': ASK, 'min_p': 2}, 'min_p'), ({'messages': ASK, 'n': 0}, 'n'),
    ({'messages': ASK, 'n': 9}, 'n'), ({'messages': ASK, 'n': 1.5}, 'n'),
    ({'messages': ASK, 'max_tokens': -2}, 'max_tokens'), ({'messages': ASK, 'stop': 5}, 'stop'),
    ({'messages': ASK, 'stop': ['x'] * 17}, 'stop'), ({'messages': ASK, 'stop': 'x' * 257}, 'stop'),
    ({'messages': ASK, 'seed': 'x'}, 'seed'), ({'messages': ASK, 'stream': 'yes'}, 'stream'),
    ({'messages': ASK, 'stream_options': {}}, 'stream_options'),
    ({'messages': ASK, 'top_logprobs': 5}, 'top_logprobs'),
    ({'messages': ASK, 'logprobs': True, 'top_logprobs': 21}, 'top_logprobs'),
    ({'messages': ASK, 'logit_bias': {'99999': 1}}, 'logit_bias'),
    ({'messages': ASK, 'logit_bias': {'5': 101}}, 'logit_bias'),
    ({'messages': ASK, 'tools': [{'type': 'function', 'function': {'name': 'f'}}]}, 'tools'),
    ({'messages': ASK, 'presence_penalty': 3}, 'presence_penalty'),
    ({'messages': ASK, 'echo': True}, 'echo'),
    ({'messages': ASK + [{'role': 'assistant', 'content': 'x'}], 'continue_final_message': True,
      'add_generation_prompt': True}, 'continue_final_message'),
    ({'messages': ASK, 'cache_salt': 5}, 'cache_salt'),
    ({'messages': [{'role': 'user', 'content': 'word ' * 3000}]}, 'prompt'),
]


def api_refusals(s):
    for body, param in REFUSED:
        for stream in (False, True):
            status, a, h = s.ask('POST', CHAT, {**body, 'stream': stream} if param != 'stream' and
                                 param != 'stream_options' else body)
            check(f'refused: {param}', status == 400 and a['error']['param'] == param,
                  (body, status, a))
            check('no retry', h.get('x-should-retry') == 'false')
    long = s.post(CHAT, messages=[{'role': 'user', 'content': 'word ' * 3000}])[1]['error']
    check('too long', long['code'] == 'context_length_exceeded' and long['n_ctx'] == 2048 and
          'exceeds the available context size' in long['message'], long)
    for body in (b'', b'{', b'[1]', b'"x"', b'{"messages":[}', b'{"a":1}x', b'\xff', b'[' * 100):
        status, a, _ = s.ask('POST', CHAT, body)
        check('broken JSON', status == 400 and a['error']['type'] == 'invalid_request_error', a)
    for body in ({'prompt': []}, {'prompt': 5}, {'prompt': [[]]}, {'prompt': [-1]},
                 {'prompt': [4096]}, {'prompt': [1.5]}, {'prompt': [['x']]}, {'prompt': ['a'] * 65},
                 {'prompt': 'x', 'logprobs': 21}, {'prompt': 'x', 'logprobs': True}):
        check('refused prompt', s.ask('POST', '/v1/completions', body)[0] == 400, body)
    check('not here', s.ask('GET', '/nothing')[0] == 404)
    status, _, h = s.ask('GET', CHAT)
    check('wrong method', status == 405 and h['allow'] == 'POST')
    check('embeddings', s.post('/v1/embeddings', input='x')[0] == 501)
    check('and the next is served', s.post(CHAT, messages=ASK, max_tokens=1)[0] == 200)


# ---- who may ask, and how ------------------------------------------------------------------------

def part_limits():
    keys = tempfile.NamedTemporaryFile('w', suffix='.keys')
    keys.write('# staff\nanna secret-one\nbert secret-two\n')
    keys.flush()
    r = subprocess.run([BIN, MODEL, '--host', '0.0.0.0', '--port', str(free_port())],
                       capture_output=True)
    check('no LAN without a key', r.returncode == 2 and b'key' in r.stderr, r)
    os.chmod(keys.name, 0o644)
    r = subprocess.run([BIN, MODEL, '--api-key-file', keys.name, '--port', str(free_port())],
                       capture_output=True)
    check('keys that others can read', r.returncode == 2, r)
    os.chmod(keys.name, 0o600)
    s = Server('--api-key-file', keys.name, '--max-body', '0.1', '--allow-host', 'med.example',
               '--cors-origin', 'https://ward.example')
    key = {'Authorization': 'Bearer secret-one'}
    for path in ('/v1/models', '/props', '/slots', '/metrics', '/tokenizer_info'):
        check('a key is wanted for ' + path, s.ask('GET', path)[0] == 401)
        check('and opens it', s.ask('GET', path, headers=key)[0] == 200)
    for wrong in ('Bearer secret-on', 'Bearer secret-one1', 'Bearer ', 'secret-one', 'Basic x'):
        check('a wrong key', s.ask('GET', '/v1/models', headers={'Authorization': wrong})[0] == 401)
    check('health and page need none', s.ask('GET', '/health')[0] == 200 ==
          s.ask('GET', '/')[0])
    q = {'messages': ASK, 'max_tokens': 1}
    two = {'Authorization': 'Bearer secret-two'}
    for h in (key, two, key, dict(two)):
        cached = s.ask('POST', CHAT, q, h)[1]['usage']['prompt_tokens_details']['cached_tokens']
        h['n'] = str(cached)
    check('a key shares nothing with another', two['n'] == '0' and key['n'] != '0', (key, two))
    for host, want in (('localhost', 200), ('127.0.0.1:80', 200), ('med.example', 200),
                       ('evil.example', 421), ('localhost.evil.example', 421), ('', 400)):
        check('Host ' + host, s.ask('GET', '/health', headers={'Host': host})[0] == want, host)
    for origin, want in ((f'http://127.0.0.1:{s.port}', 200), ('https://ward.example', 200),
                         ('http://evil.example', 403), ('null', 403)):
        status, _, h = s.ask('GET', '/health', headers={'Origin': origin})
        check('Origin ' + origin, status == want, status)
        check('CORS', ('access-control-allow-origin' in h) == (origin == 'https://ward.example'))
    plain_text = s.ask('POST', CHAT, q, {**key, 'Sec-Fetch-Site': 'cross-site',
                                         'Content-Type': 'text/plain'})
    check('a form of another site', plain_text[0] == 415, plain_text)
    check('too large', s.ask('POST', CHAT, b' ' * 200000, key)[0] == 413)
    bad_requests(s)
    check('no text in the log', 'secret' not in s.text(), s.text())
    s.end()
    first_answers()
    unix_socket()
    for what in ('open', 'write', 'connect', 'exec'):
        more = os.environ.get('MEDRUN_SERVE_ARGS', '').split()
        r = subprocess.run([BIN, MODEL, '--port', str(free_port()), '--try', what, *more],
                           capture_output=True)
        if b'no open' not in r.stderr:
            skip('this system has no sandbox')
            break
        killed = what in ('connect', 'exec')
        check('the sandbox: ' + what, r.returncode in ((-31, -9) if killed else (0,)), r)


def bad_requests(s):
    good = b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n'
    table = [
        (b'GET /health HTTP/1.1\n\n', 400), (b'GET /health\r\n\r\n', 400), (b'\r\n\r\n', 400),
        (b'GET /health HTTP/2\r\nHost: localhost\r\n\r\n', 400),
        (b'GET  /health HTTP/1.1\r\nHost: localhost\r\n\r\n', 400),
        (b'GET /health HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n', 400),
        (b'GET /health HTTP/1.1\r\nHost: localhost\r\n X: folded\r\n\r\n', 400),
        (b'GET /health HTTP/1.1\r\nHost: localhost\r\nX\r\n\r\n', 400),
        (b'GET /health HTTP/1.1\r\nHost: localhost\r\nX : y\r\n\r\n', 400),
        (b'GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n', 400),
        (b'GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n', 400),
        (b'GET /health HTTP/1.1\r\n\r\n', 400),
        (b'GET /he alth HTTP/1.1\r\nHost: localhost\r\n\r\n', 400),
        (b'GET /' + b'a' * 3000 + b' HTTP/1.1\r\nHost: localhost\r\n\r\n', 431),
        (b'GET / HTTP/1.1\r\nHost: localhost\r\nX: ' + b'a' * 17000 + b'\r\n\r\n', 431),
        (b'GET / HTTP/1.1\r\nHost: localhost\r\n' + b'X: y\r\n' * 70 + b'\r\n', 431),
        (b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n', 411),
        (b'POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n', 411),
        (b'POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 3'
         b'\r\n\r\nabc', 400),
        (b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na',
         400),
        (b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: +1\r\n\r\na', 400),
        (b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0x1\r\n\r\na', 400),
        (b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999999999999\r\n\r\n',
         413),
        (b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n', 413),
        (good, 200)]
    for data, want in table:
        out = s.raw(data)
        check(f'bytes {data[:60]}', out.startswith(b'HTTP/1.1 %d ' % want), out[:200])
    two = s.raw(good + good.replace(b'Host', b'Connection: close\r\nHost'))
    check('two in a row', two.count(b'HTTP/1.1 200') >= 1, two)
    cont = s.raw(b'', [b'POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n'
                       b'Expect: 100-continue\r\n\r\n'])
    check('100-continue', cont.startswith(b'HTTP/1.1 100 Continue'), cont)
    body = json.dumps({'messages': ASK, 'max_tokens': 1}).encode()
    post = (b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer '
            b'secret-two\r\nContent-Length: %d\r\n\r\n' % len(body)) + body
    whole = s.raw(post)
    check('a request', whole.startswith(b'HTTP/1.1 200'), whole)
    step = 1 if ALL else 7
    for at in range(1, len(post), step):
        out = s.raw(b'', [post[:at], post[at:]])
        check(f'cut at byte {at}', out.startswith(b'HTTP/1.1 200'), out[:100])
    out = s.raw(b'', [post[i:i + 1] for i in range(len(post))])
    check('byte by byte', out.startswith(b'HTTP/1.1 200'), out[:100])


def first_answers():
    """From the first moment on: nobody there, then a model that is being loaded, then all is well."""
    s = Server('--parallel', '64', '-q', wait=False)
    seen, end = [], time.time() + 30
    while (not seen or seen[-1] != 200) and time.time() < end and s.p.poll() is None:
        try:
            seen.append(s.ask('GET', '/health', timeout=5)[0])
        except ConnectionRefusedError:
            pass
    check('503 until 200', seen[-1:] == [200] and set(seen[:-1]) <= {503}, seen)
    check('and it ends', s.end() == 0)


def unix_socket():
    folder = tempfile.mkdtemp()
    path = os.path.join(folder, 'm.sock')
    p = subprocess.Popen([BIN, MODEL, '--host', path, '-q',
                          *os.environ.get('MEDRUN_SERVE_ARGS', '').split()])
    answer = b''
    for _ in range(200):                        # nobody there, 503, 200
        try:
            with socket.socket(socket.AF_UNIX) as c:
                c.connect(path)
                c.sendall(b'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n')
                answer = c.recv(4096)
        except OSError:
            pass
        if b'200 OK' in answer:
            break
        time.sleep(0.05)
    check('unix socket', b'200 OK' in answer, answer)
    check('its owner alone', os.stat(path).st_mode & 0o777 == 0o600)
    p.send_signal(signal.SIGTERM)
    check('it ends', p.wait(30) == 0)


# ---- hostile clients -----------------------------------------------------------------------------

def health_time(s):
    start = time.time()
    good = s.ask('GET', '/health', timeout=20)[0] == 200
    return time.time() - start if good else 99


def wait_idle(s):
    """Within 10 s nothing runs or waits any more."""
    for _ in range(100):
        m = s.ask('GET', '/metrics')[1].decode()
        if re.search(r'processing 0\n', m) and re.search(r'deferred 0\n', m):
            return True
        time.sleep(0.1)
    return False


def part_hostile():
    s = Server('--queue', '8', '--parallel', '4')
    idle = [socket.create_connection(('127.0.0.1', s.port)) for _ in range(100)]
    drip = [socket.create_connection(('127.0.0.1', s.port)) for _ in range(100)]
    long = {'prompt': 'The heart', 'max_tokens': 1500, 'ignore_eos': True}
    stuck = []
    for _ in range(2):                      # readers that do not read
        c = socket.create_connection(('127.0.0.1', s.port))
        c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({**long, 'stream': True, 'logprobs': 20}).encode()
        c.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n'
                  % len(body) + body)
        stuck.append(c)
    slowest, text = 0, b'GET /health HTTP/1.1\r\nX: ' + b'y' * 500
    for i in range(40):
        for c in drip:
            try:
                c.sendall(text[i:i + 1])
            except OSError:
                pass
        slowest = max(slowest, health_time(s))
        time.sleep(0.02)
    check(f'/health beside 200 bad connections: {slowest * 1e3:.0f} ms', slowest < 2, slowest)
    start = time.time()
    status = s.post(CHAT, messages=ASK, max_tokens=8)[0]
    check('others are served', status == 200 and time.time() - start < 30, time.time() - start)
    flood = []
    for _ in range(40):
        c = s.connect()
        c.request('POST', '/v1/completions', json.dumps(long), {'Content-Type': 'application/json'})
        flood.append(c)
    codes = []
    for c in flood[::-1]:
        c.sock.settimeout(0.2)
        try:
            codes.append(c.getresponse().status)
        except OSError:
            pass
        c.close()
    check('a full queue says 503', 503 in codes and 500 not in codes, codes)
    for c in idle + drip + stuck:
        c.close()
    check('whoever went is not computed for', wait_idle(s))
    stopped_reader(s)
    endless(s)
    clients = [threading.Thread(target=random_requests, args=(s, 2500 if ALL else 40, k))
               for k in range(4)]
    [t.start() for t in clients]
    slowest = 0
    while any(t.is_alive() for t in clients):
        slowest = max(slowest, health_time(s))
        time.sleep(0.05)
    check(f'/health beside damaged requests: {slowest * 1e3:.0f} ms', slowest < 5, slowest)
    check('nothing is left of them', wait_idle(s))
    check('it lives', s.post(CHAT, messages=ASK, max_tokens=1)[0] == 200)
    check('and ends', s.end() == 0, s.text()[-800:])


READER = '''import http.client, json, sys
c = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1]))
c.request('POST', '/v1/completions', json.dumps({'prompt': 'x', 'max_tokens': 1900, 'stream': True,
          'ignore_eos': True, 'logprobs': 20}), {'Content-Type': 'application/json'})
r = c.getresponse()
while r.read(1000):
    print('.', flush=True)
'''


def stopped_reader(s):
    """A client that is stopped in the middle of its answer: others do not notice it."""
    p = subprocess.Popen([sys.executable, '-c', READER, str(s.port)], stdout=subprocess.PIPE)
    atexit.register(p.kill)
    p.stdout.readline()
    p.send_signal(signal.SIGSTOP)
    time.sleep(1)
    check('beside a stopped reader', s.post(CHAT, messages=ASK, max_tokens=8)[0] == 200 and
          health_time(s) < 2)
    p.kill()
    p.send_signal(signal.SIGCONT)
    p.wait()
    p.stdout.close()
    check('nothing is left of it', wait_idle(s))


def endless(s):
    """Bodies that never end, in chunks or longer than they say: whoever sends them is cut off."""
    head = b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n'
    for more, piece, want in (
            (b'Transfer-Encoding: chunked\r\n\r\n', b'1000\r\n' + b'x' * 4096 + b'\r\n', 411),
            (b'Transfer-Encoding: chunked\r\n\r\n', b'zz\r\n\r\n-1\r\n' * 400, 411),
            (b'Content-Length: 2\r\n\r\n{}', b'x' * 4096, 400),
            (b'Content-Length: 99999999999\r\n\r\n', b'x' * 4096, 413),
            (b'X: ', b'y' * 4096, 431)):
        c = socket.create_connection(('127.0.0.1', s.port), 20)
        c.sendall(head + more)
        start, answer = time.time(), b''
        try:
            while time.time() - start < 30:
                c.sendall(piece)
                if not answer and time.time() - start > 0.5:
                    answer = c.recv(4096)
            gone = False
        except OSError:
            gone = True
        c.close()
        check(f'an endless body ends: {want}', gone and health_time(s) < 5, time.time() - start)
        check('and was refused', not answer or answer.startswith(b'HTTP/1.1 %d ' % want), answer)


def random_requests(s, n, seed):
    """Requests that were good and are damaged; any answer will do but 500, silence or an end."""
    rng = random.Random(seed)
    bodies = [json.dumps(b).encode() for b in (
        {'messages': ASK, 'max_tokens': 2, 'n': 2, 'logprobs': True, 'top_logprobs': 3},
        {'prompt': ['a', 'b'], 'max_tokens': 2, 'logprobs': 5, 'echo': True, 'stop': ['x', 'yz']},
        {'prompt': [1, 2, 3], 'max_tokens': 1, 'stream': True, 'logit_bias': {'5': 1}},
        {'messages': [{'role': 'system', 'content': 'x'}] + ASK, 'max_tokens': 1, 'stream': True})]
    for _ in range(n):
        body = bytearray(rng.choice(bodies))
        for _ in range(rng.choice((0, 1, 1, 2, 8))):
            kind, at = rng.randrange(3), rng.randrange(len(body))
            if kind == 0:
                body[at] = rng.randrange(256)
            elif kind == 1:
                del body[at:at + rng.randrange(1, 9)]
            else:
                body[at:at] = rng.choice((b'"', b'{', b'[', b'9' * 20, b'-', b'null', b'\\u0000'))
        path = rng.choice((b'/v1/chat/completions', b'/v1/completions', b'/completion',
                           b'/tokenize', b'/apply-template', b'/detokenize'))
        head = (b'POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
                b'Content-Length: %d\r\n\r\n' % (path, len(body)))
        data = bytearray(head + body)
        if rng.randrange(4) == 0:
            data[rng.randrange(len(head))] = rng.randrange(256)
        if rng.randrange(8) == 0:
            c = socket.create_connection(('127.0.0.1', s.port))
            c.sendall(data[:rng.randrange(len(data))])
            c.close()
            continue
        c = socket.create_connection(('127.0.0.1', s.port), 20)
        c.sendall(data)
        c.shutdown(socket.SHUT_WR) if rng.randrange(9) == 0 else None
        out = b''
        try:
            c.settimeout(0.3)
            out = c.recv(65536)
        except OSError:
            pass
        c.close()
        check('no 500', b'HTTP/1.1 500' not in out, (bytes(data), out))


# ---- answers of a given shape --------------------------------------------------------------------

def obj(required=None, **properties):
    return {'type': 'object', 'properties': properties,
            'required': list(properties) if required is None else required}


SCHEMAS = [
    {'type': 'boolean'}, {'type': 'integer'}, {'type': 'number'}, {'type': 'null'},
    {'type': 'integer', 'minimum': -3, 'maximum': 7}, {'type': 'integer', 'exclusiveMinimum': 98},
    {'type': 'integer', 'minimum': 3, 'maximum': 1205}, {'type': 'integer', 'maximum': -20},
    {'type': 'number', 'minimum': -2, 'maximum': 3}, {'type': 'number', 'exclusiveMaximum': -5},
    {'type': 'string', 'maxLength': 5}, {'type': 'string', 'minLength': 3, 'maxLength': 4},
    {'type': 'string', 'pattern': '^[A-Z]{2,3}-\\d+$'}, {'type': 'string', 'pattern': 'ä|"|\\\\'},
    {'type': 'string', 'pattern': '^[^a-zA-Z "\\\\]{1,4}$'},
    {'type': 'string', 'format': 'date'}, {'type': 'string', 'format': 'date-time'},
    {'type': 'string', 'format': 'uuid'}, {'type': 'string', 'format': 'ipv4'},
    {'enum': ['yes', 'no', 5, None, {'a': [1.5]}]}, {'const': 'Zoë "x"\n'},
    {'enum': ['yes', 5, 7.5], 'type': ['string', 'integer']},
    {'type': 'array', 'items': {'type': 'integer', 'minimum': 0, 'maximum': 9}, 'minItems': 2,
     'maxItems': 4}, {'type': 'array', 'maxItems': 0},
    obj(a={'type': 'integer', 'maximum': 9, 'minimum': 0}, b={'type': 'boolean'}),
    obj(required=['b'], a={'type': 'boolean'}, b={'type': 'null'}, c={'enum': ['x']}),
    obj(required=[], a={'type': 'boolean'}, b={'type': 'null'}),
    {**obj(a={'type': 'boolean'}, ab={'type': 'boolean'}), 'additionalProperties':
     {'type': 'boolean'}},
    {'anyOf': [{'type': 'boolean'}, {'type': 'null'}]},
    {'oneOf': [{'type': 'string', 'maxLength': 2}, {'type': 'integer', 'maximum': 5, 'minimum': 1}]},
    {'$ref': '#/$defs/t', '$defs': {'t': obj(required=[], v={'type': 'boolean'},
                                             kids={'type': 'array', 'maxItems': 2,
                                                   'items': {'$ref': '#/$defs/t'}})}},
    {'type': ['string', 'null'], 'maxLength': 3}, {'allOf': [{'type': 'boolean'}]},
    {'type': 'string', 'pattern': '^[a-c]+$', 'minLength': 2, 'maxLength': 4},
    {'type': 'number', 'minimum': 0.5, 'exclusiveMaximum': 2.25, 'multipleOf': 0.25},
    {'type': 'integer', 'multipleOf': 7, 'minimum': 20, 'maximum': 99},
    {'type': 'array', 'prefixItems': [{'type': 'boolean'}, {'type': 'null'}], 'items': False,
     'minItems': 1},
    {**obj(required=[], a={'type': 'null'}, b={'type': 'null'}, c={'type': 'null'}),
     'minProperties': 1, 'maxProperties': 2, 'additionalProperties': False},
    {'type': 'object', 'patternProperties': {'^x[0-9]$': {'type': 'boolean'}},
     'additionalProperties': False, 'maxProperties': 2},
    {'allOf': [obj(a={'type': 'boolean'}), obj(b={'type': 'null'})]},
    {'type': 'object', 'propertyNames': {'enum': ['p', 'q']}, 'additionalProperties':
     {'type': 'null'}, 'maxProperties': 2},
    {'oneOf': [obj(t={'const': 'x'}, n={'type': 'null'}), obj(t={'const': 'y'})]},
    {'enum': ['a', 'abc', 5, 7, None], 'maxLength': 2, 'minimum': 6},
    {'type': 'string', 'format': 'time'}, {'type': 'string', 'format': 'ipv6'},
    {'type': 'string', 'format': 'duration'},
]
NOT_COVERED = [     # and where
    ({'not': {}}, '#/not'), ({'type': 'king'}, '#/type'),
    (obj(a={'type': 'string', 'format': 'king'}), '#/properties/a/format'),
    (obj(a=obj(b={'type': 'string', 'pattern': '(?=x)'})), '#/properties/a/properties/b/pattern'),
    ({'$ref': 'http://x/y'}, '#/$ref'), ({'oneOf': [{}, {}]}, '#/oneOf'),
    ({'allOf': [{}, {'if': {}}]}, '#/allOf/1/if'), ({'type': 'array', 'items': 5}, '#/items'),
    ({'type': 'array', 'uniqueItems': True}, '#/uniqueItems'),
    ({'type': 'array', 'prefixItems': []}, '#/prefixItems'),
    ({'type': 'integer', 'multipleOf': 1e9}, '#/multipleOf'), ({'minimun': 1}, '#/minimun'),
]


def part_grammar():
    try:
        import jsonschema
    except ImportError:
        jsonschema = None
        skip('no jsonschema: answers are only parsed')
    s = Server('--parallel', '4')
    ends = 0
    for number, schema in enumerate(SCHEMAS):
        form = {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': schema}}
        for seed in range(8 if ALL else 3):
            q = dict(messages=ASK, response_format=form, temperature=seed * 2, seed=seed,
                     max_tokens=120)
            status, a, _ = s.post(CHAT, **q)
            check(f'schema {number}', status == 200, (schema, a))
            if status != 200:
                break
            text, why = a['choices'][0]['message']['content'], a['choices'][0]['finish_reason']
            code, events = s.chunks(CHAT, **q)
            check('streamed', ''.join(e['choices'][0]['delta'].get('content') or ''
                                      for e in events[:-1]) == text)
            if why != 'stop':
                continue
            ends += 1
            try:
                value = json.loads(text)
                if jsonschema:
                    jsonschema.validate(value, schema)
                good = True
            except Exception as e:
                good = str(e)[:200]
            check(f'an answer to schema {number}', good is True, (schema, text, good))
    check('most come to their end', ends > 2 * len(SCHEMAS), ends)
    hard = {'type': 'string', 'pattern': '^(a|aa)*b.{0,200}c(a|b)*.{0,500}d.{0,300}$'}
    for n in (1, 3):
        status, a, _ = s.post('/v1/completions', prompt='x', json_schema=hard, n=n, temperature=2,
                              seed=1, max_tokens=200)
        check('too much work', status == 400 and 'more work' in a['error']['message'], a)
    for schema, place in NOT_COVERED:
        a = s.post(CHAT, messages=ASK, response_format={'type': 'json_schema', 'json_schema':
                                                        {'schema': schema}})
        check('refused with its place', a[0] == 400 and 'schema: ' + place + ':' in
              a[1]['error']['message'], (schema, a))
    a = s.post(CHAT, messages=ASK, guided_json=obj(a={'$ref': '#'}))
    check('nothing could fit', a[0] == 400 and 'no text fits' in a[1]['error']['message'], a)
    a = s.post(CHAT, messages=ASK, response_format={'type': 'json_object'}, max_tokens=40)[1]
    check('an object', a['choices'][0]['message']['content'].startswith('{'), a)
    for choice in (['yes', 'no'], ['mild', 'moderate', 'severe', 'severe pain'], ['ä', 'é', '痛み']):
        for t in (0, 3):
            a = s.post(CHAT, messages=ASK, guided_choice=choice, temperature=t, seed=1)[1]
            check('a choice', a['choices'][0]['message']['content'] in choice, a)
    for r in ('[0-9]{3}', '(yes|no), because [a-z ]{5,20}\\.', '[^\\x00-\\x7f]{2}', '.{0,9}', 'a?b*c+'):
        a = s.post('/v1/completions', prompt='x', guided_regex=r, temperature=2, seed=4,
                   max_tokens=99)[1]
        c = a['choices'][0] if 'choices' in a else {'text': '', 'finish_reason': str(a)}
        check('an expression', c['finish_reason'] == 'length' or re.fullmatch(r, c['text']), (r, c))
    for r in ('(', '[a', 'a{2', 'a**', '(?<=x)', '\\1', 'a)', '[b-a]', '\\b'):
        check('no expression', s.post('/v1/completions', prompt='x', guided_regex=r)[0] == 400, r)
    wide = '|'.join(f'[ -~]*{chr(97 + i % 26)}[ -~]{{{20 + i // 26}}}x' for i in range(220))
    code, a, _ = s.post(CHAT, messages=ASK, guided_regex=wide, temperature=1)
    check('a mask of too much work', code == 400 and 'more work' in a['error']['message'], a)
    check('one shape', s.post(CHAT, messages=ASK, guided_regex='a', guided_choice=['b'])[0] == 400)
    for g, r in (('root ::= "yes" | "no " [a-z]{2,4}', 'yes|no [a-z]{2,4}'),
                 ('root ::= ("a" root "b")? # as many', 'a*b*')):
        for name in ('grammar', 'guided_grammar'):
            a = s.post(CHAT, messages=ASK, temperature=2, seed=3, max_tokens=60, **{name: g})[1]
            c = a['choices'][0] if 'choices' in a else {'finish_reason': str(a)}
            check('a grammar', c['finish_reason'] == 'length' or
                  re.fullmatch(r, c['message']['content']), (g, c))
    a = s.post(CHAT, messages=ASK, grammar='root ::= "x"\nb ::= [')
    check('no grammar', a[0] == 400 and 'grammar: line 2:' in a[1]['error']['message'], a)
    open_one = {**obj(a={'type': 'null'}), 'additionalProperties': True}
    for q in ({'additional': 'spec'}, {}):
        a = s.post(CHAT, messages=ASK, guided_regex='x', **q)
        check('additional', a[0] == 200, a)
    check('additional is a word', s.post(CHAT, messages=ASK, guided_json=open_one,
                                         additional=5)[0] == 400)
    # what has only one way on takes no pass of its own, and changes nothing
    one = obj(**{'a long name that is given': {'enum': ['and a long value, too']}})
    before = s.metric('llamacpp:n_decode_total')
    a = s.post(CHAT, messages=ASK, guided_json=one, temperature=1, seed=5)[1]
    passes = s.metric('llamacpp:n_decode_total') - before
    with_them = s.post(CHAT, messages=ASK, guided_json=one, temperature=1, seed=5, logprobs=True)[1]
    check('forced tokens', passes < a['usage']['completion_tokens'] - 9, (passes, a))
    check('the same bytes', a['choices'][0]['message'] == with_them['choices'][0]['message'] and
          a['usage']['completion_tokens'] == with_them['usage']['completion_tokens'],
          (a, with_them))
    many = s.post(CHAT, messages=ASK, n=3, temperature=3, seed=9, guided_json=SCHEMAS[24])[1]
    check('for each choice', all(set(json.loads(c['message']['content'])) == {'a', 'b'}
                                 for c in many['choices']), many)
    check('it ends', s.end() == 0)


# ---- calls of functions ---------------------------------------------------------------------------

def function(name, **parameters):
    return {'type': 'function', 'function': {'name': name, 'description': None,
                                             'parameters': obj(**parameters)}}


TOOLS = [function('dose', drug={'enum': ['a', 'b']}, mg={'type': 'integer', 'minimum': 1,
                                                         'maximum': 99}),
         {'type': 'function', 'function': {'name': 'end'}}]


def good_call(c):
    f = c['function']
    given = json.loads(f['arguments'])
    if f['name'] == 'end':
        return isinstance(given, dict)
    return (f['name'] == 'dose' and set(given) == {'drug', 'mg'} and given['drug'] in ('a', 'b') and
            1 <= given['mg'] <= 99)


def part_tools():
    models = [(MODEL, 'llama3.1')]
    fixture = os.path.join(os.environ.get('MEDRUN_TEST_BUILD', 'build'), 'apertus-plain-bf16.mdr')
    if os.path.exists(fixture):
        models.append((fixture, 'apertus'))
    else:
        skip('no apertus-plain fixture')
    dose = {'type': 'function', 'function': {'name': 'dose'}}
    for model, template in models:
        s = Server('--template', template, '-q', model=model)
        q = dict(messages=ASK, tools=TOOLS, temperature=1, max_tokens=150)
        whole = 0
        for choice in ('required', dose):
            for seed in range(8 if ALL else 4):
                q.update(seed=seed, tool_choice=choice, parallel_tool_calls=seed % 2 == 0)
                status, a, _ = s.post(CHAT, **q)
                check(f'{template}: a call', status == 200, a)
                c = a['choices'][0]
                _, events = s.chunks(CHAT, **q)
                if c['finish_reason'] == 'length':
                    continue
                whole += 1
                calls = c['message']['tool_calls']
                check(f'{template}: calls', c['finish_reason'] == 'tool_calls' and
                      all(good_call(x) for x in calls) and c['message']['content'] is None, c)
                check('one', seed % 2 == 0 or len(calls) == 1, calls)
                check('the one that was named', choice == 'required' or
                      all(x['function']['name'] == 'dose' for x in calls), calls)
                parts = {}
                for e in events[:-1]:
                    for t in e['choices'][0]['delta'].get('tool_calls') or []:
                        parts[t['index']] = parts.get(t['index'], '') + t['function']['arguments']
                check('streamed', list(parts.values()) ==
                      [x['function']['arguments'] for x in calls], (parts, calls))
        check(f'{template}: most come to their end', whole > 3, whole)
        q.update(max_tokens=6, tool_choice=dose)
        c = s.post(CHAT, **q)[1]['choices'][0]
        check('cut', c['finish_reason'] == 'length' and not c['message'].get('tool_calls'), c)
        for more, param in ((dict(tool_choice={'type': 'function', 'function': {'name': 'x'}}),
                             'tool_choice'), (dict(tool_choice='maybe'), 'tool_choice'),
                            (dict(tools=None, tool_choice='required'), 'tool_choice'),
                            (dict(parallel_tool_calls=1), 'parallel_tool_calls'),
                            (dict(guided_regex='x'), 'guided_regex'), (dict(tools=5), 'tools'),
                            (dict(tools=[function('f', x={'not': {}})], tool_choice='auto'), 'tools')):
            a = s.post(CHAT, **{**q, **more})
            check('refused', a[0] == 400 and a[1]['error']['param'] == param, (more, a))
        check('its place', '#/properties/x/not' in a[1]['error']['message'], a)
        if template == 'llama3.1':          # a brace opens a call: its arguments fit
            q.update(tool_choice='auto', max_tokens=150, logit_bias={'{': 100})
            c = s.post(CHAT, **q)[1]['choices'][0]
            check('auto', c['finish_reason'] == 'tool_calls' and good_call(
                c['message']['tool_calls'][0]), c)
        check('it ends', s.end() == 0)


# ---- every row of the table of refusals, as curl sees it -----------------------------------------

def part_refusals():
    curl = shutil.which('curl')
    if not curl:
        return skip('no curl')
    s = Server('--parallel', '1', '--per-key', '1', '--queue', '2', '-q',
               env={'MEDRUN_API_KEY': 'secret'})
    key = ['-H', 'Authorization: Bearer secret']
    as_json = ['-H', 'Content-Type: application/json']

    def ask(path, *more, body=None):
        data = [] if body is None else ['-d', body if isinstance(body, str) else json.dumps(body)]
        r = subprocess.run([curl, '-s', '-i', '-m', '20', *more, *data,
                            f'http://127.0.0.1:{s.port}{path}'], capture_output=True)
        head, _, text = r.stdout.decode('utf-8', 'replace').rpartition('\r\n\r\n')
        status = re.findall(r'^HTTP/1.1 (\d+)', head, re.M)
        try:
            error = json.loads(text)['error']
        except (ValueError, KeyError, TypeError):
            error = {}
        return int(status[-1]) if status else 0, error, head.lower()

    def row(status, kind, words, got):
        check(f'{status} {kind} {words}', got[0] == status and got[1].get('type') == kind and
              words in got[1].get('message', '') and set(got[1]) >= {'message', 'type', 'param',
                                                                     'code'}, got)
        check('retry or not', ('x-should-retry: false' in got[2]) == (400 <= status < 500 and
                                                                      status != 429), got)

    def chat(**fields):
        return ask(CHAT, *key, *as_json, body={'messages': ASK, **fields})

    def form(schema):
        return {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': schema}}

    bad = 'invalid_request_error'
    row(400, bad, 'byte', ask(CHAT, *key, *as_json, body='{"messages": [}'))
    row(400, bad, 'temperature', chat(temperature='hot'))
    row(400, bad, 'no place for tools', chat(tools=TOOLS))
    row(400, bad, '#/properties/a/not', chat(response_format=form(obj(a={'not': {}}))))
    row(400, bad, 'grammar: line 2', chat(grammar='root ::= "x"\nb ::= ['))
    row(400, 'exceed_context_size_error', 'exceeds the available context size',
        chat(messages=[{'role': 'user', 'content': 'word ' * 3000}]))
    row(401, 'authentication_error', '', ask('/v1/models'))
    row(401, 'authentication_error', '', ask('/v1/models', '-H', 'Authorization: Bearer secreT'))
    row(403, 'permission_error', '', ask('/v1/models', *key, '-H', 'Origin: http://other.example'))
    row(421, 'permission_error', '', ask('/v1/models', *key, '-H', 'Host: elsewhere.example'))
    row(404, 'not_found_error', '', ask('/v1/nothing', *key))
    got = ask(CHAT, *key)
    row(405, bad, '', got)
    check('what is allowed', 'allow: post' in got[2], got)
    row(411, bad, '', ask(CHAT, *key, *as_json, '-H', 'Transfer-Encoding: chunked', body='{}'))
    row(413, bad, '', ask(CHAT, *key, *as_json, '-H', 'Content-Length: 99999999', body='{}'))
    row(431, bad, '', ask('/v1/models', *key, '-H', 'X-Long: ' + 'x' * 20000))
    row(501, 'not_supported_error', '', ask('/v1/embeddings', *key, *as_json, body={'input': 'x'}))
    late = socket.create_connection(('127.0.0.1', s.port))
    late.sendall(b'GET /health HTTP/1.1\r\nHost: loc')
    many = []
    for _ in range(3):                  # one runs, one waits; a key may have no more than that
        c = s.connect()
        c.request('POST', '/v1/completions', json.dumps({'prompt': 'x', 'max_tokens': 1900,
                                                         'ignore_eos': True}),
                  {'Content-Type': 'application/json', 'Authorization': 'Bearer secret'})
        many.append(c)
        time.sleep(0.05)                # in this order; all three take longer than that
    got = chat()
    row(429, 'rate_limit_error', 'key', got)
    check('when to come back', 'retry-after: ' in got[2], got)
    late.settimeout(20)
    answer = late.recv(4096)
    check('408', answer.startswith(b'HTTP/1.1 408 '), answer)
    for c in many:
        c.close()
    check('it lives', ask('/health')[0] == 200 and wait_idle_key(s))
    check('it ends', s.end() == 0)
    refused_late(curl)


def wait_idle_key(s):
    for _ in range(200):
        slots = s.ask('GET', '/slots', headers={'Authorization': 'Bearer secret'})[1]
        if not any(x['is_processing'] for x in slots):
            return True
        time.sleep(0.05)
    return False


def refused_late(curl):
    """The rows for a server that is full, that ends, and whose answer cannot be finished."""
    def bodies(*more):
        r = subprocess.run([curl, '-s', '-i', '-m', '60', '-H', 'Content-Type: application/json',
                            *more], capture_output=True)
        return r.stdout.decode('utf-8', 'replace')

    def busy(s, n, tokens=1900):
        out = []
        for _ in range(n):
            c = s.connect()
            c.request('POST', '/v1/completions', json.dumps(
                {'prompt': 'x', 'max_tokens': tokens, 'ignore_eos': True}),
                {'Content-Type': 'application/json'})
            out.append(c)
        return out

    s = Server('--parallel', '1', '--queue', '1', '--drain', '300', '-q')
    where = f'http://127.0.0.1:{s.port}/v1/completions'
    stuck = busy(s, 1)
    while s.metric('llamacpp:requests_processing') < 1:
        time.sleep(0.01)
    stuck += busy(s, 1)
    while s.metric('llamacpp:requests_deferred') < 1:
        time.sleep(0.01)
    got = bodies('-d', '{"prompt":"x"}', where)
    check('503, full', got.startswith('HTTP/1.1 503 ') and 'Retry-After: 2' in got and
          '"unavailable_error"' in got and 'queue is full' in got, got)
    for c in stuck:
        c.close()
    check('idle again', wait_idle(s))
    # what the grammar wants is forbidden: no token is left, and that is known only then
    never = {'prompt': 'x', 'guided_choice': ['a'], 'logit_bias': {'a': -100}}
    got = bodies('-d', json.dumps(never), where)
    for more in ({}, {'guided_choice': None, 'guided_regex': 'a+'},
                 {'guided_choice': None, 'logit_bias': {str(i): -100 for i in range(4096)}}):
        q = {**never, **more}
        got = bodies('-d', json.dumps(q), where)
        check('no token is left', got.startswith('HTTP/1.1 400 ') and 'forbids every' in got and
              '"invalid_request_error"' in got, got)
        got = bodies('-d', json.dumps({**q, 'stream': True}), where)
        check('an error midway', got.startswith('HTTP/1.1 200 ') and 'data: {"error":' in got and
              '[DONE]' not in got and '"finish_reason":"' not in got, got)
    got = bodies('-d', json.dumps({'messages': [{'role': 'user', 'content': 'word ' * 3000}],
                                   'stream': True}), f'http://127.0.0.1:{s.port}{CHAT}')
    check('too long is known before a stream begins', got.startswith('HTTP/1.1 400 ') and
          '"n_prompt_tokens":' in got and '"n_ctx":2048' in got, got)
    check('the next is served', bodies('-d', '{"prompt":"x"}', where).startswith('HTTP/1.1 200 '))
    c = s.connect()                     # one more request on a connection that is there
    c.request('GET', '/health')
    c.getresponse().read()
    stuck = busy(s, 1)
    while s.metric('llamacpp:requests_processing') < 1:
        time.sleep(0.01)
    s.p.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    for method, path in (('GET', '/health'), ('POST', '/v1/completions')):
        c.request(method, path, '{"prompt":"x"}' if method == 'POST' else None)
        r = c.getresponse()
        text = r.read().decode()
        check('503, ending', r.status == 503 and '"unavailable_error"' in text and
              r.getheader('Retry-After') == '2', text)
    c.close()
    check('what ran comes to its end', stuck[0].getresponse().status == 200)
    check('and so does the server', s.p.wait(300) == 0)


# ---- Open WebUI ----------------------------------------------------------------------------------

TITLE = '''### Task:
Write a title of 3 to 5 words for the conversation. Answer with JSON: { "title": "..." }
### Conversation:
<chat_history>
USER: What are the symptoms of diabetes?
ASSISTANT: Increased thirst.
</chat_history>'''


def part_webui():
    """What Open WebUI asks: its server for all, and browsers themselves in a direct connection."""
    page = 'https://webui.example'
    s = Server('--cors-origin', page, '-q', env={'MEDRUN_API_KEY': 'secret'})
    own = {'Authorization': 'Bearer secret', 'X-OpenWebUI-User-Name': 'Anna%20B',
           'X-OpenWebUI-User-Id': '1', 'X-OpenWebUI-User-Email': 'a@ward.example',
           'X-OpenWebUI-User-Role': 'user', 'X-OpenWebUI-Chat-Id': '7'}
    direct = {'Authorization': 'Bearer secret', 'Origin': page, 'Sec-Fetch-Site': 'cross-site'}
    status, models, _ = s.ask('GET', '/v1/models', headers=own)
    check('the list is verified', status == 200 and models['data'][0]['id'], models)
    name = models['data'][0]['id']
    status, e, _ = s.ask('GET', '/v1/models', headers={'Authorization': 'Bearer '})
    check('a missing key is said', status == 401 and e['error']['message'], e)
    talk = [{'role': 'system', 'content': 'Be brief.'}, *ASK,
            {'role': 'assistant', 'content': 'Thirst.'}, {'role': 'user', 'content': 'Which more?'}]
    chat = {'stream': True, 'model': name, 'messages': talk, 'stream_options':
            {'include_usage': True}, 'temperature': 0.8, 'top_p': 0.9, 'min_p': 0.0, 'top_k': 40,
            'max_tokens': 24, 'seed': 3, 'stop': ['</s>'], 'frequency_penalty': 0,
            'presence_penalty': 0, 'repeat_penalty': 1.1, 'reasoning_effort': 'medium',
            'logit_bias': {}, 'keep_alive': '5m', 'think': False, 'num_ctx': 2048,
            'function_calling': 'default'}
    task = {'model': name, 'messages': [{'role': 'user', 'content': TITLE}], 'stream': False,
            'max_completion_tokens': 40}
    browser = {**chat, 'params': {}, 'files': [], 'tool_servers': [], 'features': {
               'image_generation': False, 'code_interpreter': False, 'web_search': False},
               'variables': {'{{USER_NAME}}': 'Anna'}, 'session_id': 's', 'chat_id': 'c', 'id': 'm',
               'background_tasks': {'title_generation': True}, 'model_item': {'id': name}}
    for body, headers in ((chat, own), (browser, direct)):
        status, text, h = s.ask('POST', CHAT, body, headers)
        check('a chat', status == 200 and h['content-type'].startswith('text/event-stream'), text)
        events = [json.loads(x[6:]) for x in text.decode().split('\n\n')[:-2]]
        said = ''.join(e['choices'][0]['delta'].get('content') or '' for e in events[:-1])
        check('its text', said, text)
        check('its usage', not events[-1]['choices'] and
              events[-1]['usage']['total_tokens'] > events[-1]['usage']['completion_tokens'] > 0,
              events[-1])
        check('how it ends', text.endswith(b'data: [DONE]\n\n') and
              events[-2]['choices'][0]['finish_reason'] in ('stop', 'length'), text)
        check('what counts not is named', 'think' in h['x-medrun-ignored'].split(', '), h)
    check('the page may read it', h.get('access-control-allow-origin') == page, h)
    for form in ({}, {'response_format': {'type': 'json_object'}}):
        status, a, _ = s.ask('POST', CHAT, {**task, **form}, own)
        check('a title', status == 200 and a['choices'][0]['message']['content'] and
              a['choices'][0]['finish_reason'] in ('stop', 'length'), a)
    status, _, h = s.ask('OPTIONS', CHAT, headers={
        'Origin': page, 'Access-Control-Request-Method': 'POST',
        'Access-Control-Request-Headers': 'authorization,content-type'})
    check('what its browser asks first', status == 204 and
          h['access-control-allow-origin'] == page and 'POST' in h['access-control-allow-methods']
          and 'authorization' in h['access-control-allow-headers'], h)
    status, e, h = s.ask('POST', CHAT, chat, {**direct, 'Origin': 'https://other.example'})
    check('another page', status == 403 and 'access-control-allow-origin' not in h, e)
    c = s.connect()                     # its stop button closes the connection
    c.request('POST', CHAT, json.dumps({**chat, 'max_tokens': 1500, 'ignore_eos': True}),
              {'Content-Type': 'application/json', **own})
    c.getresponse().read(200)
    c.close()
    check('stopped', wait_idle_key(s))
    check('it ends', s.end() == 0)


# ---- the promise ---------------------------------------------------------------------------------

WORDS = ['diabetes', 'the heart', 'asthma', 'a fever', 'the liver', 'anaemia', 'gout', 'migraine']
OPENINGS = ['What are the symptoms of ', 'What is ', 'How is ', 'Tell me about ']


def random_request(rng, vocab, context):
    text = rng.choice(OPENINGS) + rng.choice(WORDS) + '?'
    q = {'temperature': rng.choice((0, 0, 0.7, 1.3)), 'seed': rng.randrange(1 << 30),
         'max_tokens': rng.choice((1, 5, 20, 40)), 'top_k': rng.choice((0, 5, 50)),
         'top_p': rng.choice((1, 0.9)), 'min_p': rng.choice((0, 0.05)),
         'n': rng.choice((1, 1, 1, 2, 3)), 'stream': rng.random() < 0.5}
    if rng.random() < 0.3:
        q['stop'] = [rng.choice((' and', 'the', 'e', '.'))]
    if rng.random() < 0.2:
        q.update(presence_penalty=0.7, frequency_penalty=0.3, repeat_penalty=1.2)
    if rng.random() < 0.15:
        q['guided_json'] = rng.choice(SCHEMAS)
    if rng.random() < 0.2:
        q['logit_bias'] = {str(rng.randrange(vocab)): rng.choice((-100, 3))}
    if rng.random() < 0.5:
        turns = []
        for _ in range(rng.randrange(3)):
            turns += [{'role': 'user', 'content': rng.choice(OPENINGS) + rng.choice(WORDS) + '?'},
                      {'role': 'assistant', 'content': 'It is a disease. ' *
                       rng.randrange(context // 100)}]
        if rng.random() < 0.4:
            q.update(logprobs=True, top_logprobs=rng.choice((0, 2, 20)))
        return CHAT, {**q, 'messages': turns + [{'role': 'user', 'content': text}]}
    if rng.random() < 0.5:
        q.update(logprobs=rng.choice((0, 1, 5, 6)), echo=rng.random() < 0.6)
    prompt = text * rng.choice((1, 1, 3, min(40, (context - 130) // len(text))))
    return '/v1/completions', {**q, 'prompt': rng.choice((prompt, [prompt, text]))}


def fetch(s, path, body):
    """What counts of an answer: everything but ids and times; streamed, chunk by chunk."""
    if body['stream']:
        return plain(list(s.chunks(path, **body)))
    return plain(list(s.post(path, **body)[:2]))


def cancel_midway(s, rng, path, body):
    c = s.connect()
    c.request('POST', path, json.dumps({**body, 'stream': True, 'max_tokens': 200}),
              {'Content-Type': 'application/json'})
    time.sleep(rng.random() * 0.1)
    if rng.random() < 0.5:
        c.sock.recv(100)
    c.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
    c.close()


def promise(n, model, *args):
    """N random requests alone, and again in random company: what differs."""
    rng = random.Random(11)
    s = Server('--parallel', '4', '-q', *args, model=model)
    about = s.ask('GET', '/v1/models')[1]['data'][0]
    asked = [random_request(rng, about['meta']['n_vocab'], about['max_model_len'])
             for _ in range(n)]
    alone = [fetch(s, p, {**b, 'cache_salt': str(i)}) for i, (p, b) in enumerate(asked)]
    s.end()
    refused = sum(a[0] != 200 for a in alone)
    check(f'{model}: nearly all are answered', refused <= n // 20,
          [(q, a) for q, a in zip(asked, alone) if a[0] != 200][:2])
    s = Server('--parallel', '6', '--cache-mem', '4' if model == MODEL else '1', '-q', '--queue',
               '1000', *args, model=model)
    work, differ = list(enumerate(asked)), []
    rng.shuffle(work)

    def client(seed, leave=0, often=0.25):
        own = random.Random(seed)
        while True:
            with lock:
                if len(work) <= leave:
                    return
                i, (path, body) = work.pop()
            try:
                if own.random() < often:
                    cancel_midway(s, own, path, body)
                found = fetch(s, path, body)
            except (OSError, http.client.HTTPException) as e:
                found = repr(e)
            good = found == alone[i]
            check('an answer in company', good)
            if not good:
                differ.append((path, body, alone[i], found))

    start = time.time()
    client(12, n - n // 6, 1)               # one who leaves while nobody else asks ends the pass
    threads = [threading.Thread(target=client, args=(k,)) for k in range(12)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for d in differ[:1]:
        print(json.dumps(d)[:6000])
    m = s.ask('GET', '/metrics')[1].decode()
    cached = re.search(r'cached_total (\d+)', m).group(1)
    went = re.search(r'medrun:cancelled_total (\d+)', m).group(1)
    print(f'{os.path.basename(model)}: {n} requests, {len(differ)} differ from themselves alone; '
          f'{refused} refused, {cached} tokens from the cache, {went} cancelled, '
          f'{time.time() - start:.1f} s')
    check('it ends', s.end() == 0)


def part_promise():
    n = int(os.environ.get('MEDRUN_TEST_PROMISES', 1000 if ALL else 60))
    promise(n, os.environ.get('MEDRUN_TEST_MODEL', MODEL))


# Random weights, whose likeliest tokens lie close together; a vocabulary of SentencePiece, too.
OTHERS = ['llama-grouped-bf16', 'llama-grouped-int4', 'mistral-spm-bf16', 'mistral-window-int8',
          'apertus-plain-int4']


def part_types():
    n = int(os.environ.get('MEDRUN_TEST_PROMISES', 1000 if ALL else 30))
    for name in OTHERS:
        model = os.path.join(os.environ.get('MEDRUN_TEST_BUILD', 'build'), name + '.mdr')
        if not os.path.exists(model):
            skip('no ' + model)
            continue
        promise(n, model, '--template', 'alpaca', '-t', '1')
        if name == OTHERS[0]:
            promise(n, model, '--template', 'alpaca', '-t', '1', '--strict', '--kv', 'int8')


BIN = os.path.join(sys.argv[1], '') + 'medrun-serve'
if os.path.isfile(sys.argv[1]):
    BIN = sys.argv[1]
if __name__ == '__main__':
    for part in sys.argv[2:] or ('api', 'limits', 'grammar', 'tools', 'refusals', 'webui',
                                 'hostile', 'promise', 'types'):
        started = time.time()
        globals()['part_' + part]()
        print(f'{part}: {time.time() - started:.1f} s')
    print('{passed} passed, {failed} failed, {skipped} skipped'.format(**counts))
    sys.exit(counts['failed'] > 0)
