"""44_course_pages.py CLASS OTHER... - the course's pages in Chromium, without a network: one request each,
nothing on the console, no sideways scrolling from 320 pixels on, every answer by keyboard; axe in
light and dark where axe_playwright_python is installed. On the explain pages each step that asks for
an answer takes it, by keyboard, and says so when it is wrong."""
import glob
import os
import sys

from playwright.sync_api import sync_playwright

try:
    from axe_playwright_python.sync_playwright import Axe
except ImportError:
    Axe = None
    print("skipped: axe: no axe_playwright_python")

passed = failed = 0


def check(what, ok):
    global passed, failed
    passed += bool(ok)
    failed += not ok
    if not ok:
        print("FAILED:", what)


def open_page(browser, path, width, scheme):
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True).new_page()
    page.requests, page.errors = [], []
    page.on("request", lambda r: page.requests.append(r.url))
    page.on("console", lambda m: page.errors.append(m.text) if m.type in ("error", "warning") else 0)
    page.goto("file://" + path)
    return page


with sync_playwright() as p:
    chromium = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
    top = os.path.abspath(sys.argv[1])
    paths = [top + "/index.html", top + "/teacher/teacher.html"] + sorted(glob.glob(top + "/lesson-*.html"))
    check("twelve pages: %d" % len(paths), len(paths) == 12)
    for path in paths:
        name = os.path.basename(path)
        for width, scheme in ((1200, "light"), (400, "dark"), (320, "light")):
            page = open_page(chromium, path, width, scheme)
            files = [r for r in page.requests if not r.startswith("data:")]
            check("%s: one request, not %s" % (name, files), len(files) == 1)
            check("%s: nothing on the console: %s" % (name, page.errors), not page.errors)
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            wide = page.evaluate("document.documentElement.scrollWidth")
            check("%s: %d pixels without sideways scrolling: %d" % (name, width, wide), wide <= width)
            if Axe and width > 320:
                found = Axe().run(page).response["violations"]
                check("%s: axe, %s: %s" % (name, scheme, [(v["id"], v["nodes"][0]["html"][:90]) for v in found]), not found)
            page.context.close()
    page = open_page(chromium, top + "/lesson-05.html", 1200, "light")
    page.focus("summary")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('details').open")
    check("an answer opens by keyboard", page.inner_text("details p").startswith(("Right.", "Not quite.")))
    page.context.close()
    asked = 0
    for path in sorted(glob.glob(top + "/explain-*.html")):
        name = os.path.basename(path)
        page = open_page(chromium, path, 320, "light")
        page.click("#reveal")
        kinds = page.evaluate("meta.lesson.looks.map(x => x[2] || '')")
        asked += bool([k for k in kinds if k])
        for i, kind in enumerate(kinds):
            field, said = "#answer%d" % (i + 1), "#said%d" % (i + 1)
            check("%s: step %d asks, or not" % (name, i + 1), bool(page.query_selector(field)) == bool(kind))
            if not kind:
                continue
            page.focus(field)
            for wrong, reply in (("", "Type your answer first."), ("nothing like it", "Not yet. ")):
                page.fill(field, wrong)
                page.keyboard.press("Enter")
                check("%s: %s to %r: %s" % (name, kind, wrong, page.inner_text(said)), page.inner_text(said).startswith(reply))
            page.keyboard.press("Tab")
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")
            shown = page.inner_text(said)
            check("%s: %s is shown: %s" % (name, kind, shown), shown.startswith("It is "))
            page.fill(field, shown[len("It is "):].split(", ")[0].rstrip("."))
            page.press(field, "Enter")
            check("%s: %s takes %s: %s" % (name, kind, shown, page.inner_text(said)), page.inner_text(said).startswith("Right: "))
        wide = page.evaluate("document.documentElement.scrollWidth")
        check("%s: answers within 320 pixels: %d" % (name, wide), wide <= 320)
        found = Axe().run(page).response["violations"] if Axe else []
        check("%s: axe, answered: %s" % (name, [(v["id"], v["nodes"][0]["html"][:90]) for v in found]), not found)
        page.click("#what")
        check("%s: words are explained" % name, page.is_visible("#words dd"))
        page.keyboard.press("Escape")
        check("%s: and Esc closes them" % name, not page.is_visible("#words"))
        check("%s: nothing on the console: %s" % (name, page.errors), not page.errors)
        page.context.close()
    check("each lesson has a step that takes an answer: %d" % asked, asked == 10)
    for path, fields in zip(sys.argv[2:], (["answer1"], ["answer3", "answer4"])):
        page = open_page(chromium, os.path.abspath(path), 1200, "light")
        page.click("#reveal")
        asks = page.evaluate("[...document.querySelectorAll('.lesson input')].map(x => x.id)")
        check("another prompt is asked what it can answer: %s" % asks, asks == fields)
        page.context.close()
    # Where a control is rebuilt, the keyboard stays on it.
    page = open_page(chromium, top + "/explain-05.html", 1200, "light")
    page.click("#reveal")
    page.focus("#v4 select")
    at = page.evaluate("state.layer")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    check("two layers up by keyboard", page.evaluate("state.layer") == at - 2)
    page.context.close()
    chromium.close()
print("%d passed, %d failed" % (passed, failed))
sys.exit(failed != 0)
