#!/usr/bin/env python3
"""Opens pages of medrun-explain in headless Chromium: LESSON PAGE... The first is a lesson's, the second
a plain page of the demo model, the last one of hostile text. Last line: N passed, N failed."""

import re
import sys

from playwright.sync_api import sync_playwright

passed = failed = 0


def check(what, good):
    global passed, failed
    passed += bool(good)
    failed += not good
    if not good:
        print("FAILED:", what)


def open_page(browser, path, **how):
    how.setdefault("viewport", {"width": 1200, "height": 900})
    page = browser.new_context(offline=True, **how).new_page()
    page.requests, page.errors = [], []
    page.on("request", lambda r: page.requests.append(r.url))
    page.on("console", lambda m: page.errors.append(m.text) if m.type in ("error", "warning") else 0)
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    page.on("dialog", lambda d: (page.errors.append("dialog"), d.dismiss()))
    page.goto("file://" + path)
    page.wait_for_function("document.documentElement.dataset.ready", timeout=60000)
    return page


def look(browser, path):
    page = open_page(browser, path)
    name = path.split("/")[-1]
    files = [r for r in page.requests if not r.startswith("data:")]
    check("%s: one request, not %s" % (name, files), len(files) == 1)
    check("%s: nothing on the console: %s" % (name, page.errors), not page.errors)
    ready = page.evaluate("document.documentElement.dataset.ready")
    check("%s: ready in 1.5 s, not %s ms" % (name, ready), ready.isdigit() and int(ready) < 1500)
    page.click("#check")
    check("%s: %s" % (name, page.inner_text("#verdict")), "all sums agree" in page.inner_text("#verdict"))
    for v in range(1, 11):
        text = page.inner_text("#v%d .reading" % v)
        check("%s: view %d says a sentence: %s" % (name, v, text), len(text) > 15 and not
              re.search(r"NaN|undefined|null|Infinity", page.inner_text("#v%d" % v)))
    pins = page.evaluate("""() => { const out = []; for (const t of [1, 5, 9, 3]) {
        const at = performance.now(); pin(t); out.push(performance.now() - at); } return out; }""")
    check("%s: a pin within 50 ms: %s" % (name, pins), sorted(pins)[1] < 50)
    heap = page.evaluate("performance.memory ? performance.memory.usedJSHeapSize / 1e6 : 0")
    check("%s: at most 80 MB of memory, not %.0f" % (name, heap), heap <= 80)
    check("%s: still nothing on the console: %s" % (name, page.errors), not page.errors)
    page.context.close()


def keyboard(browser, path):
    page = open_page(browser, path)
    state = lambda key: page.evaluate("state." + key)
    explained = state("token")
    page.focus("#v1 .token[tabindex='0']")
    page.keyboard.press("ArrowRight")
    check("right: the next token", state("token") == explained + 1)
    check("the focus goes with it", page.evaluate("document.activeElement.dataset.t") == str(explained + 1))
    layer, head = state("layer"), state("head")
    page.keyboard.press("ArrowDown")
    check("down: the next layer", state("layer") != layer)
    page.keyboard.press("]")
    check("]: the next head", state("head") != head)
    page.keyboard.press("Escape")
    check("Esc unpins", state("token") == explained and state("layer") == layer)
    page.keyboard.press("?")
    check("? shows the keys", page.evaluate("document.getElementById('keys').open"))
    page.keyboard.press("Escape")
    page.wait_for_function("!document.getElementById('keys').open")
    for v in range(1, 11):
        page.keyboard.press(str(v % 10))
        page.keyboard.press("t")
        twin = page.evaluate("""v => ({open: !views[v - 1].twin.hidden, rows: views[v - 1].twin.querySelectorAll("tbody tr").length,
            want: views[v - 1].table() ? Math.min(50, views[v - 1].table().rows.length) : 0})""", v)
        check("t opens the table of view %d: %s" % (v, twin), twin["open"] and twin["rows"] == twin["want"])
    # the twins are the pictures' data
    pairs = page.evaluate("""() => ({bars: views[1].table().rows.filter(r => !/head|against/.test(r[0])).map(r => r[1]),
        parts: [...D("parts")].slice(0, blocks.parts.shape[1]).concat([D("rest")[0], D("total")[0]])})""")
    check("the table of view 2 is the waterfall", pairs["bars"] == pairs["parts"])
    twins = page.evaluate("""() => {
        const rows = n => views[n - 1].table().rows, all = s => [...document.querySelectorAll(s)];
        const width = (s, k) => { const r = all(s).map(x => +x.getAttribute("width")), t = rows(5).map(x => x[2]).filter((x, i) => i && i % 2 === k);
            const most = Math.max(...r), top = Math.max(...t); return Math.max(...r.map((x, i) => Math.abs(x / most - t[i] / top))); };
        return {text: all("#v1 .token").every((x, t) => !t || x.title === rows(1)[t][3].toFixed(2) + " bits"),
            lens: rows(3).every((r, k) => { const b = document.querySelector(`#v3 button[data-p="${state.place}"][data-r="${k}"]`); return b.textContent === r[1] && b.title === percent(r[2]); }),
            attention: rows(4).every(([t, , w]) => all("#v4 .token")[t].title === weightText(w)),
            written: Math.max(width("#v5 svg rect.up", 1), width("#v5 svg rect.down", 0)),
            dice: all("#v7 .bars .name").filter(x => x.textContent !== "others, in sum").every((x, n) => x.textContent === rows(7)[n][0])}; }""")
    for name in ("text", "lens", "attention", "dice"):
        check("the table of the %s is its picture" % name, twins[name])
    check("the table of view 5 is its bars: %g" % twins["written"], twins["written"] < .02)
    page.context.close()
    page = open_page(browser, path)
    page.goto("file://" + path + "#v=3&t=4&l=2&h=1")
    page.reload()
    page.wait_for_function("document.documentElement.dataset.ready")
    check("a link leads to its place", [page.evaluate("state." + k) for k in ("token", "layer", "head")] == [4, 2, 1])
    page.context.close()


def several(browser, path):
    page = open_page(browser, path)
    weights = lambda: page.evaluate("views[3].table().rows.map(r => r[2])")
    page.evaluate("pin(9)")
    one = weights()
    page.click("#also")
    page.evaluate("pin(12)")
    both = weights()
    page.click("text=only one token")
    other = weights()
    mean = [(x + (one[k] if k < len(one) else 0)) / 2 for k, x in enumerate(other)]
    check("a kept token and a pinned one: their mean", len(both) == len(mean) and
          max(abs(a - b) for a, b in zip(both, mean)) < 1e-9)
    page.click("#also")
    page.keyboard.press("Escape")
    check("Esc lets kept tokens go", page.evaluate("state.also.length") == 0)
    page.context.close()


def looks(browser, path):
    name = path.split("/")[-1] + ": "
    for scheme in ("light", "dark"):
        page = open_page(browser, path, color_scheme=scheme)
        try:
            from axe_playwright_python.sync_playwright import Axe
            found = Axe().run(page).response["violations"]
            check(name + "axe, %s: %s" % (scheme, [(v["id"], v["nodes"][0]["html"][:90]) for v in found]), not found)
        except ImportError:
            print("skipped: axe: no axe_playwright_python")
        page.context.close()
    page = open_page(browser, path, viewport={"width": 320, "height": 640})
    for wide in (1200, 400, 320):
        page.set_viewport_size({"width": wide, "height": 640})
        found = page.evaluate("document.documentElement.scrollWidth")
        check(name + "%d pixels without sideways scrolling: %d" % (wide, found), found <= wide)
    page.context.close()
    page = open_page(browser, path, forced_colors="active")
    check(name + "forced colours", not page.errors)
    page.emulate_media(media="print")
    pdf = page.pdf(format="A4", margin={k: "1cm" for k in ("top", "bottom", "left", "right")})
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    wanted = 3 if page.evaluate("meta.rows") > 512 else 2      # the text alone fills more than one
    check(name + "printed on %d pages, not %d" % (wanted, pages), pages <= wanted)
    page.context.close()


def predict(browser, path):
    """A lesson asks for a guess before it shows what came, and any probability."""
    for guess, said in (("thirst", None), ("zebra", "none of the model's ten likeliest"), ("", None)):
        page = open_page(browser, path)
        came = page.evaluate("piece(meta.winner, false).trim()")
        hidden = page.inner_text("body")
        check("before the guess the page has no probability: %s" % re.findall(r"[\d.]+\s(?:%|bits|nats)", hidden),
              not re.search(r"[\d.]+\s(%|bits|nats)", hidden))
        check("nor a name or a label that has one", page.evaluate("""[...document.querySelectorAll("[title], [aria-label]")].filter(
            x => x.checkVisibility() && /(%|bits|nats)/.test(x.title + x.getAttribute("aria-label"))).length""") == 0)
        shown = page.evaluate("[...document.querySelectorAll('#v1 .token')].map(x => +x.dataset.t)")
        check("nor what came", shown == list(range(page.evaluate("meta.at") + 1)) and
              "“%s”" % came not in hidden and "“%s”" % came not in page.title())
        page.keyboard.press("t")
        check("nor its table", page.evaluate("views.every(v => v.twin.hidden)"))
        try:
            from axe_playwright_python.sync_playwright import Axe
            found = Axe().run(page).response["violations"]
            check("axe, a guess: %s" % [(v["id"], v["nodes"][0]["html"][:90]) for v in found], not found)
        except ImportError:
            pass
        page.set_viewport_size({"width": 320, "height": 640})
        check("a guess within 320 pixels", page.evaluate("document.documentElement.scrollWidth") <= 320)
        page.focus("#guess")
        page.keyboard.press("Enter")
        check("an empty guess is asked again", "Type a word" in page.inner_text("#judged") and page.evaluate("state.guessing"))
        guess = came if guess == "thirst" else guess
        if guess:
            page.keyboard.type(guess)
            page.keyboard.press("Enter")
        else:
            page.click("#reveal")
        judged = page.inner_text("#judged")
        if guess == came:
            rank = page.evaluate("D('rank')[meta.at + 1] + 1")
            said = "is the model's %d" % rank
        check("the guess %s: %s" % (guess, judged), (said in judged) if said else judged == "")
        check("then all is shown", page.evaluate("views.every(v => v.section.checkVisibility())") and
              "“%s”" % came in page.inner_text("#title") and
              len(page.query_selector_all("#v1 .token")) == page.evaluate("meta.tokens.length"))
        check("nothing on the console: %s" % page.errors, not page.errors)
        page.context.close()


def broken(browser, path):
    text = open(path, encoding="utf-8").read()
    for change in (lambda s: s.replace('id="bin">', 'id="bin">!!!!', 1),
                   lambda s: re.sub(r'(id="bin">.{1000})[^<]*', r"\1", s, count=1),
                   lambda s: s.replace('{"medrun-explain":1', '{"medrun-explain":', 1)):
        with open(path + ".broken.html", "w", encoding="utf-8") as f:
            f.write(change(text))
        page = open_page(browser, path + ".broken.html")
        check("damaged data give a sentence", "cannot be read" in page.inner_text("#top"))
        page.context.close()


def hostile(browser, path):
    page = open_page(browser, path)
    shown = page.evaluate("[...document.querySelectorAll('#v1 .token')].map(x => x.firstChild.textContent).join('')")
    check("the text is shown as text: " + shown, "</script><img" in shown.replace("␣", " ") and
          page.evaluate("document.images.length") == 0)
    check("half characters are bytes, never U+FFFD", "⟨F0" in shown and "\ufffd" not in shown)
    check("what turns the text around is a sign", "\u202e" not in shown and "\u2028" not in shown and
          ("⟨U+202E⟩" in shown or "⟨E2" in shown))
    check("no script of the text's runs", not page.errors)
    page.context.close()


with sync_playwright() as p:
    chromium = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
    lesson, pages = sys.argv[1], sys.argv[2:]
    predict(chromium, lesson)
    for each in pages:
        look(chromium, each)
    keyboard(chromium, pages[0])
    several(chromium, pages[0])
    for each in pages[1:3]:
        looks(chromium, each)
    broken(chromium, pages[0])
    hostile(chromium, sys.argv[-1])
    chromium.close()
print("%d passed, %d failed" % (passed, failed))
sys.exit(failed != 0)
