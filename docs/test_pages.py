"""The built pages as a reader meets them: `make docs` runs this after the build.

All of it but the rendering needs no browser. Rendering is looked at in Chromium, where there is one, at the width of a
desk and of a telephone; JavaScript's errors, formulas and whatever is cut off are seen only there.
"""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

BUILT = Path(__file__).parent / "_build" / "html"
#: Sources of modules and indices are Sphinx's own.
PAGES = sorted(p for p in BUILT.rglob("*.html") if p.relative_to(BUILT).parts[0] not in ("_modules", "_static"))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: Of a desk and of a telephone, in pixels.
WIDTHS = (1280, 400)
VERBATIM = {"pre", "code", "script", "style", "title"}
VERBATIM_CLASSES = {"math", "sig"}
WITHOUT_END = {
    *["img", "br", "hr", "input", "link", "meta", "source", "path", "use", "rect", "circle", "line", "polyline"]
}


class Page(HTMLParser):
    """Links, anchors, and the text that is neither code nor mathematics."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.text, self.open = [], {""}, [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag not in WITHOUT_END:
            verbatim = tag in VERBATIM or bool(VERBATIM_CLASSES & {*(attrs.get("class") or "").split()})
            self.open.append((tag, verbatim))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if not any(verbatim for _, verbatim in self.open):
            self.text.append(data)


@pytest.fixture(scope="module")
def parsed():
    assert PAGES, f"no pages in {BUILT}: `make docs` builds them"
    return {path: Page(path) for path in PAGES}


def test_no_link_is_dead(parsed):
    dead = []
    for path, page in parsed.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = target.exists() and (target not in parsed or unquote(parts.fragment) in parsed[target].anchors)
            dead += [] if found else [f"{path.relative_to(BUILT)}: {link}"]
    assert not dead, dead


#: What Markdown, reStructuredText or TeX look like when they were not understood.
RAW = {
    "table": r"^\s*\|.*\|\s*$",
    "formula": r"\$[^$\n]+\$|\\[(\[a-zA-Z]",
    "role": r"\{(doc|meth|func|class|attr|mod|ref)\}|:(doc|meth|func|class|attr|mod|ref):`",
    "emphasis": r"\*\*\w[^*\n]*\*\*",
    "code": r"`",
}


@pytest.mark.parametrize("what", RAW)
def test_no_markup_is_left(parsed, what):
    left = []
    for path, page in parsed.items():
        left += [f"{path.relative_to(BUILT)}: {x[0]}" for x in re.finditer(RAW[what], "".join(page.text), re.MULTILINE)]
    assert not left, left


#: Elements that are cut at the right, or stick out of the window: the first words of the outermost.
CUT = """() => [...document.querySelectorAll('article *')].filter(e => {
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    if (!box.width || style.visibility == 'hidden' || e.closest('mjx-assistive-mml, .headerlink, svg')) return false;
    const scrolls = x => x && x.tagName != 'ARTICLE' && (['auto', 'scroll'].includes(getComputedStyle(x).overflowX)
        || scrolls(x.parentElement));
    const cut = e.scrollWidth > e.clientWidth + 2 && ['hidden', 'clip'].includes(style.overflowX);
    return (cut || box.right > innerWidth + 1) && !scrolls(e);
}).filter((e, _, all) => !all.includes(e.parentElement))
    .map(e => e.tagName + ': ' + e.textContent.trim().slice(0, 60))"""
#: Formulas that are no formulas on the page.
UNSET = """() => [...document.querySelectorAll('.math')].filter(
    e => !e.querySelector('mjx-container') || e.querySelector('mjx-merror')).map(e => e.textContent.slice(0, 60))"""


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium on PATH: pages are read, and not rendered")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_render(browser, width):
    faults = []
    for path in PAGES:
        page, said = browser.new_page(viewport={"width": width, "height": 900}), []
        page.on("console", lambda message, said=said: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("requestfailed", lambda request, said=said: said.append(f"not loaded: {request.url}"))
        page.goto(path.as_uri())
        if page.query_selector(".math"):
            page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise")
            page.evaluate("() => MathJax.startup.promise")
        said += [f"cut off: {x}" for x in page.evaluate(CUT)] + [f"no formula: {x}" for x in page.evaluate(UNSET)]
        faults += [f"{path.relative_to(BUILT)}: {x}" for x in said]
        page.close()
    assert not faults, "\n".join(faults)
