#!/usr/bin/env python3
"""serve_page.py BIN [FOLDER]: the page of medrun-serve in headless Chromium, which playwright
drives. Writes screenshots to FOLDER. Says what it skips where there is no browser."""
import json, os, sys, time

FOLDER = sys.argv[2] if len(sys.argv) > 2 else None
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
try:
    from playwright.sync_api import sync_playwright
except ImportError:
    print('skipped: no playwright')
    print('0 passed, 0 failed, 1 skipped')
    sys.exit(0)
import serve
from serve import check, counts, Server

HOSTILE = ['<script>window.bad = 1</script>', '<img src=x onerror="window.bad = 1">',
           '[x](javascript:window.bad=1)', '![x](http://evil.example/?q=1)', '<svg/onload=bad=1>',
           '**<b onclick=bad()>bold</b>**', '`<i>`', '| <a> | b |\n|---|---|\n| <iframe> | 2 |',
           '```\n<script>bad = 1</script>\n```', '# <h1>', '- <li onmouseover=bad=1>',
           'https://evil.example/', '\u202etxt.exe', '</script><script>bad=1</script>']
GERMAN = ('**Diabetes mellitus** ist eine Stoffwechselkrankheit.\n\n1. Durst\n2. häufiges '
          'Wasserlassen\n\n| Wert | Grenze |\n|---|---|\n| Nüchternblutzucker | 126 mg/dl |\n\n'
          'Die Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft '
          'wird umbrochen.')
ARABIC = 'داء السكري مرض مزمن.\n\n- العطش\n- كثرة التبول\n\nراجع **الطبيب** إذا استمرت الأعراض.'


def stream(text):
    """What the server would send for this answer, each character a token."""
    def chunk(delta, finish=None, rows=None):
        return 'data: ' + json.dumps({'id': 'x', 'seed': 5, 'choices': [
            {'index': 0, 'delta': delta, 'logprobs': rows, 'finish_reason': finish}]}) + '\n\n'
    out = chunk({'role': 'assistant', 'content': None})
    for c in text:
        row = {'token': c, 'bytes': list(c.encode()), 'logprob': -0.4}
        out += chunk({'content': c}, rows={'content': [{**row, 'top_logprobs': [row, {
            **row, 'token': 'other', 'logprob': -1.5}]}]})
    return out + chunk({}, 'stop') + 'data: [DONE]\n\n'


def shot(page, name):
    if FOLDER:
        page.screenshot(path=os.path.join(FOLDER, name + '.png'))


def ask(page, text, wait=True):
    page.fill('#text', text)
    page.keyboard.press('Enter')
    if wait:
        page.wait_for_selector('#send:text-is("Send")')


def fake(page, text):
    page.unroute('**/v1/chat/completions')
    page.route('**/v1/chat/completions', lambda r: r.fulfill(
        status=200, headers={'Content-Type': 'text/event-stream; charset=utf-8'}, body=stream(text)))


def talk(s, browser):
    page = browser.new_page(viewport={'width': 1200, 'height': 800})
    said, asked = [], []
    page.on('console', lambda m: said.append(m.text))
    page.on('pageerror', lambda e: said.append(str(e)))
    page.on('request', lambda r: asked.append(r.url))
    page.goto(f'http://127.0.0.1:{s.port}/')
    page.wait_for_selector('#model:not(:empty)')
    shot(page, 'empty')
    ask(page, 'What are the symptoms of diabetes?')
    text = page.inner_text('.turn.assistant .body')
    check('an answer', 'thirst' in text, text)
    check('why it stopped', 'came to its end' in page.inner_text('.foot'))
    page.click('text=Again, the same')
    page.wait_for_selector('#send:text-is("Send")')
    check('the same again', page.inner_text('.turn.assistant .body') == text)
    check('two versions', '2/2' in page.inner_text('.turn.assistant .who'))
    page.click('text=How sure?')
    check('words have a shade', page.locator('.tokens span').count() > 5)
    shot(page, 'shaded')
    page.locator('.tokens span').nth(1).click()
    check('alternatives', page.locator('dialog td').count() >= 4)
    shot(page, 'alternatives')
    page.click('dialog button')
    page.click('text=Edit')
    page.fill('dialog textarea', 'What is gout?')
    page.click('text=Send as another version')
    page.wait_for_selector('#send:text-is("Send")')
    check('a branch', '2/2' in page.inner_text('.turn.user .who'))
    check('the notice stays', page.is_visible('#notice'))
    kept = page.evaluate('Object.keys(localStorage).length')
    check('nothing is kept unasked', kept == 0, kept)
    for text in HOSTILE:
        fake(page, text)
        ask(page, 'x')
    check('no script of an answer runs', page.evaluate('window.bad') is None)
    check('no element of an answer', page.locator('#talk img, #talk script, #talk iframe, #talk a, '
                                                  '#talk svg').count() == 0)
    shot(page, 'hostile')
    other = [u for u in asked if not u.startswith((f'http://127.0.0.1:{s.port}/', 'blob:'))]
    check('no request elsewhere', not other, other)
    check('no violation, no error', not said, said)
    page.unroute('**/v1/chat/completions')
    ask(page, 'word ' * 3000)
    check('an error in the server\'s words', 'exceeds the available context' in
          page.inner_text('.turn.error'))
    page.close()


def looks(s, browser):
    for width, dark in ((1200, False), (1200, True), (400, False), (400, True), (320, False)):
        page = browser.new_page(viewport={'width': width, 'height': 800},
                                color_scheme='dark' if dark else 'light')
        page.goto(f'http://127.0.0.1:{s.port}/')
        page.wait_for_selector('#model:not(:empty)')
        fake(page, GERMAN)
        ask(page, 'Was ist Diabetes?')
        fake(page, ARABIC)
        ask(page, 'ما هي أعراض السكري؟')
        wide = page.evaluate('document.documentElement.scrollWidth')
        check(f'fits {width} pixels', wide <= width, wide)
        shot(page, f'{width}-{"dark" if dark else "light"}')
        if width == 400:
            page.click('#menu')
            page.click('summary >> nth=0')
            shot(page, f'{width}-menu-{"dark" if dark else "light"}')
        elif width == 1200:
            page.click('summary >> nth=0')
            shot(page, f'{width}-settings-{"dark" if dark else "light"}')
        page.close()


server = Server()
with sync_playwright() as p:
    try:
        chrome = p.chromium.launch(executable_path='/usr/bin/chromium'
                                   if os.path.exists('/usr/bin/chromium') else None)
    except Exception as e:
        print('skipped: no browser')
        server.end()
        print('0 passed, 0 failed, 1 skipped')
        sys.exit(0)
    talk(server, chrome)
    looks(server, chrome)
    chrome.close()
server.end()
print('{passed} passed, {failed} failed, {skipped} skipped'.format(**counts))
sys.exit(counts['failed'] > 0)
