#!/usr/bin/env python3
"""serve_clients.py BIN: other people's clients ask medrun-serve, each where it is installed: openai's
Python client, LangChain, llm, and lm-evaluation-harness unmodified, whose log-likelihoods must be
medrun-eval's."""
import asyncio, json, os, shutil, subprocess, sys, tempfile, typing

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import serve
from serve import ASK, MODEL, Server, check, counts, skip

MEDRUN_EVAL = os.path.join(os.path.dirname(serve.BIN), 'medrun-eval')


def openai_client():
    try:
        import openai
    except ImportError:
        return skip('no openai')
    s = Server()
    base = f'http://127.0.0.1:{s.port}/v1'
    c = openai.OpenAI(base_url=base, api_key='x')
    check('models', [m.id for m in c.models.list()] == ['medrun demo'])
    r = c.chat.completions.create(model='m', messages=ASK, logprobs=True, top_logprobs=2)
    text = r.choices[0].message.content
    check('chat', 'thirst' in text and len(r.choices[0].logprobs.content[0].top_logprobs) == 2)
    parts = list(c.chat.completions.create(model='m', messages=ASK, stream=True,
                                           stream_options={'include_usage': True}))
    check('stream', ''.join(p.choices[0].delta.content or '' for p in parts if p.choices) == text)
    check('usage', parts[-1].usage.completion_tokens == r.usage.completion_tokens)
    r = c.completions.create(model='m', prompt=['The heart', [5, 6]], max_tokens=3, n=2, logprobs=1)
    check('completions', [x.index for x in r.choices] == [0, 1, 2, 3])
    for call, kind in ((lambda: c.chat.completions.create(model='m', messages=[]),
                        openai.BadRequestError),
                       (lambda: c.models.retrieve('other'), openai.NotFoundError)):
        try:
            call()
            check('an error', False)
        except openai.APIError as e:
            check('its class', type(e) is kind, e)

    async def many():
        a = openai.AsyncOpenAI(base_url=base, api_key='x')
        return await asyncio.gather(*[a.chat.completions.create(model='m', messages=ASK)
                                      for _ in range(20)])
    check('20 at a time', {x.choices[0].message.content for x in asyncio.run(many())} == {text})
    s.end()


TOOLS = [{'type': 'function', 'function': {
    'name': 'dose', 'description': 'How much.', 'parameters': {
        'type': 'object', 'properties': {'drug': {'type': 'string', 'enum': ['a', 'b']},
                                         'mg': {'type': 'integer', 'minimum': 1, 'maximum': 99}},
        'required': ['drug', 'mg']}}}]


def openai_shapes():
    """Functions and structured answers, as openai's helpers ask for them."""
    try:
        import openai, pydantic
    except ImportError:
        return skip('no openai with pydantic')

    class Finding(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=12)
        days: int = pydantic.Field(ge=1, le=30)
        grade: typing.Optional[typing.Literal['mild', 'severe']]

    s = Server('--template', 'llama3.1')
    c = openai.OpenAI(base_url=f'http://127.0.0.1:{s.port}/v1', api_key='x')
    r = c.chat.completions.parse(model='m', messages=ASK, response_format=Finding)
    check('parse', isinstance(r.choices[0].message.parsed, Finding), r)
    for choice in ('required', {'type': 'function', 'function': {'name': 'dose'}}):
        r = c.chat.completions.create(model='m', messages=ASK, tools=TOOLS, tool_choice=choice)
        call = r.choices[0].message.tool_calls[0].function
        given = json.loads(call.arguments)
        check('a call', call.name == 'dose' and given['drug'] in 'ab' and 1 <= given['mg'] <= 99, r)
    with c.chat.completions.stream(model='m', messages=ASK, response_format=Finding) as stream:
        for _ in stream:
            pass
        check('parse, streamed', isinstance(stream.get_final_completion().choices[0].message.parsed,
                                            Finding))
    print('openai', openai.__version__, 'chat, stream, parse, tools')
    s.end()


def langchain():
    try:
        import langchain_openai, pydantic
        from langchain_core.exceptions import ContextOverflowError
    except ImportError:
        return skip('no langchain-openai')

    class Dose(pydantic.BaseModel):
        """How much."""
        drug: typing.Literal['a', 'b']
        mg: int = pydantic.Field(ge=1, le=99)

    s = Server('--template', 'llama3.1')
    chat = langchain_openai.ChatOpenAI(base_url=f'http://127.0.0.1:{s.port}/v1', api_key='x',
                                       model='m', stream_usage=True)
    question = ASK[0]['content']
    text = chat.invoke(question).content
    parts = list(chat.stream(question))
    check('LangChain: stream', ''.join(p.content for p in parts) == text and text)
    check('LangChain: usage', sum((p.usage_metadata or {}).get('output_tokens', 0)
                                  for p in parts) > 0)
    for method in ('json_schema', 'function_calling'):
        made = chat.with_structured_output(Dose, method=method).invoke(question)
        check('LangChain: ' + method, isinstance(made, Dose), made)
    r = chat.bind_tools([Dose], tool_choice='required').invoke(question)
    check('LangChain: tools', [t['name'] for t in r.tool_calls] == ['Dose'], r)
    try:
        chat.invoke('a word ' * 4000)
        check('LangChain: too long', False)
    except Exception as e:
        check('LangChain: too long', isinstance(e, ContextOverflowError), repr(e))
    print('LangChain: chat, stream, structured output, tools, an overflow')
    s.end()


SCHEMA = {'type': 'object', 'required': ['name', 'days'], 'properties': {
    'name': {'type': 'string', 'maxLength': 12}, 'days': {'type': 'integer', 'maximum': 30}}}


def llm_command():
    program = shutil.which('llm') or os.path.join(os.path.dirname(sys.executable), 'llm')
    if not os.path.exists(program):
        return skip('no llm')
    s = Server()
    folder = tempfile.mkdtemp()
    with open(os.path.join(folder, 'extra-openai-models.yaml'), 'w') as f:
        f.write(f'- model_id: here\n  model_name: m\n  api_base: http://127.0.0.1:{s.port}/v1\n'
                f'  supports_schema: true\n')
    env = {**os.environ, 'LLM_USER_PATH': folder, 'OPENAI_API_KEY': 'x'}
    for more, good in (([], lambda t: 'thirst' in t), (['--no-stream'], lambda t: 'thirst' in t),
                       (['--schema', json.dumps(SCHEMA)],
                        lambda t: set(json.loads(t)) == {'name', 'days'})):
        r = subprocess.run([program, '-m', 'here', *more, ASK[0]['content']], env=env,
                           capture_output=True, text=True, stdin=subprocess.DEVNULL)
        check('llm ' + ' '.join(more), r.returncode == 0 and good(r.stdout), (r.stdout, r.stderr))
    print('llm: streamed, not streamed, with a schema')
    s.end()


TASK = '''task: local_medqa
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: !function "of.text"
doc_to_target: !function "of.target"
doc_to_choice: ["A", "B", "C", "D"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
'''
OF = '''def text(d):
    letters = ["A", "B", "C", "D"]
    lines = [l + ". " + d["ending%d" % i] for i, l in enumerate(letters)]
    return "Question: " + d["sent1"] + "\\n" + "\\n".join(lines) + "\\nAnswer:"
def target(d):
    return d["label"]
'''


def harness():
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        return skip('no lm_eval')
    data = os.path.abspath('tests/eval/medqa_hf.jsonl')
    folder = tempfile.mkdtemp()
    for name, text in (('local.yaml', TASK % data), ('of.py', OF)):
        with open(os.path.join(folder, name), 'w') as f:
            f.write(text)
    s = Server('-q')
    for batch, many in ((16, 8), (1, 1)):
        out = lm_eval.simple_evaluate(
            model='local-completions', tasks=['local_medqa'], bootstrap_iters=0,
            task_manager=TaskManager(include_path=folder, include_defaults=False), batch_size=batch,
            model_args={'base_url': f'http://127.0.0.1:{s.port}/v1/completions', 'model': 'm',
                        'num_concurrent': many})
        rows = sorted(out['samples']['local_medqa'], key=lambda r: r['doc_id'])
        theirs = [[float(x[0]) for x in r['filtered_resps']] for r in rows]
        result = os.path.join(folder, f'{batch}.jsonl')
        subprocess.run([MEDRUN_EVAL, MODEL, 'medqa', data, '--no-template', '--bos', 'off',
                        '-o', result],
                       capture_output=True, check=True)
        with open(result) as f:
            lines = [json.loads(l) for l in f][1:]
        ours = {l['n']: l['ll'] for l in lines if 'll' in l}
        if len(ours) != len(theirs):
            check('as many questions', False, (len(ours), len(theirs), lines[:1]))
            continue
        worst = max(abs(a - b) for i, row in enumerate(theirs) for a, b in zip(row, ours[i]))
        same = all(max(range(4), key=lambda k: row[k]) == max(range(4), key=lambda k: ours[i][k])
                   for i, row in enumerate(theirs))
        check(f'log-likelihoods of {len(theirs)} questions within 1e-3', worst < 1e-3, worst)
        check('the same predictions', same)
        print(f'lm-evaluation-harness, batch {batch}, {many} at a time: {len(theirs)} questions, '
              f'log-likelihoods within {worst:.2g} of medrun-eval')
    s.end()


openai_client()
openai_shapes()
langchain()
llm_command()
harness()
print('{passed} passed, {failed} failed, {skipped} skipped'.format(**counts))
sys.exit(counts['failed'] > 0)
