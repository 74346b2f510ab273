"""The page in a real browser: what is there, how it is moved through, what untrusted text does, what can be read.

`make browser-test` runs these.
"""

import re

import pytest

from influence_core.report.page import write_page
from tests.browser import CHROMIUM, DRIVER, NEEDED, browser
from tests.report_pages import TextTask, made_up

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=f"needs {NEEDED}"),
]

NASTY = [
    "<script>window.ran = 'script'</script>",
    "<img src=x onerror=\"window.ran = 'img'\"><svg onload=\"window.ran = 'svg'\">",
    "<a href=\"javascript:window.ran = 'link'\" onmouseover=\"window.ran = 'mouse'\">here</a>",
    "&lt;b&gt; &amp &#x27; &#0; &nosuch; ]]> </script></p></article></main> <!-- <style>*{display:none}</style>",
    "</script><script>window.ran = 'json'</script> \u2028 \u2029 {{ 7*7 }} ${7*7} '\"`",
    "\x1b[31m \x07 \x9b \u202e \u2066 \x00 controls",
    "long" * 100,
    "日本 😀 👩‍👩‍👧 é\n\n\tlines\n",
]
VIEW = ".query:not([hidden])"  # that is shown
QUERIES = [*NASTY, "a query of plain words", "another query of other words"]
TRAIN = [*NASTY, *(f"training example number {number} of plain words" for number in range(30))]


@pytest.fixture(scope="module")
def window():
    with browser() as one:
        one.resize(1280, 900)
        yield one


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The page of untrusted texts."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    task = TextTask()
    write_page(path, task, QUERIES, TRAIN, made_up(task, QUERIES, TRAIN), len(QUERIES), {})
    return path


@pytest.fixture
def page(window, place):
    """The page, opened anew; nothing may have been logged as an error by the end."""
    window.prefer("light")
    window.resize(1280, 900)
    window.open(place, "#/q0")
    window.problems()
    window.open(place, "#/q0")
    yield window
    assert window.problems() == []
    assert window.run("return window.ran || ''") == "", "text of the data ran"


def shown(page):
    """The view that is shown."""
    return page.run("return [...document.querySelectorAll('#overview, .query')].filter(x => !x.hidden).map(x => x.id)")


def opened(page):
    """The training example that is open in the view."""
    return page.run(f"return [...document.querySelectorAll('{VIEW} .example[open]')].map(x => x.dataset.example)")


def order(page):
    """The training examples of the view, from above."""
    return page.run(f"return [...document.querySelectorAll('{VIEW} .example')].map(x => x.dataset.example)")


def test_what_is_there(page):
    """A view, its first example open, its tokens and the query's shaded; lists, histogram, layers, the way to read."""
    assert shown(page) == ["q0"] and len(order(page)) == 20 and opened(page) == order(page)[:1]
    for selector in ("#search", ".reading", ".query:not([hidden]) svg .bin", ".query:not([hidden]) .mark",
                     ".example[open] .token.pos", ".example[open] .token.neg", ".example[open] .layer",
                     ".query:not([hidden]) .asked-about .token.pos", "kbd"):  # fmt: skip
        assert page.run("return document.querySelectorAll(arguments[0]).length", selector), selector


def test_texts_are_what_they_are(page):
    """Every query's and example's text, with what would act shown: as text content, also once its tokens are drawn."""
    for number, text in enumerate(NASTY):
        page.run("location.hash = arguments[0]", f"/q{number}")
        page.press("k", "j") if number else page.press("j", "k")
        drawn = page.run("return document.querySelector(arguments[0]).textContent", f"#q{number} .asked-about .tokens")
        plain = page.run("return document.querySelector(arguments[0]).textContent", f"#t{number} .tokens")
        assert drawn == plain
        # What is left of the text when escapes are taken out is there to the letter.
        for part in re.split("[\x00\x07\x1b\x9b\u202e\u2066\u2028\u2029]", text):
            assert part in drawn
        assert not set("\x00\x07\x1b\x9b\u202e\u2066") & set(drawn)
    acting = "main script, main img, main a[href^=javascript], main style, main [onmouseover]"
    assert page.run("return document.querySelectorAll(arguments[0]).length", acting) == 0
    page.run("for (const x of document.querySelectorAll('main *')) x.dispatchEvent(new Event('mouseover'))")


def test_all_examples_can_be_opened(page):
    """One after the other, by the keyboard, in the order of the lists; the query is shaded by each."""
    examples = order(page)
    shadings = set()
    for example in examples[1:]:
        page.press("ArrowDown")
        assert opened(page) == [example]
        assert example in page.run("return document.querySelector('.query:not([hidden]) .shaded-by').textContent")
        shadings.add(page.run("return [...document.querySelectorAll('.query:not([hidden]) .asked-about .token')]"
                              ".map(x => x.style.getPropertyValue('--weight')).join()"))  # fmt: skip
    assert len(shadings) == len(examples) - 1
    page.press("ArrowDown")
    assert opened(page) == examples[-1:]
    page.press("ArrowUp")
    assert opened(page) == examples[-2:-1]


def test_keys_move_between_queries(page):
    page.press("j", "j")
    assert shown(page) == ["q2"]
    page.press("k")
    assert shown(page) == ["q1"] and page.run("return location.hash") == "#/q1"
    page.press("ArrowLeft")
    assert shown(page) == ["q1"]
    page.press("ArrowRight")
    assert page.run("return document.activeElement.closest('.example[open]') !== null"), "the open example's tokens"
    assert shown(page) == ["q1"]
    page.press("o")
    assert shown(page) == ["overview"]
    page.press("k")
    assert shown(page) == ["overview"]
    page.run("history.back()")
    page.run("return new Promise(done => setTimeout(done, 200))")
    assert shown(page) == ["q1"]


def test_search(page):
    """By all the words that are typed, in the queries' texts; moving skips what is filtered out."""
    entries = "return [...document.querySelectorAll('.queries li')].filter(x => !x.hidden).map(x => x.textContent)"
    page.press("/")
    page.press(*"OTHER words")
    assert len(page.run(entries)) == 1 and "another query" in page.run(entries)[0]
    assert page.run("return document.querySelector('#found').textContent") == "1 of 10 queries"
    page.press("Enter")
    assert shown(page) == ["q9"]
    page.press("k")
    assert shown(page) == ["q9"], "the others are filtered out"
    page.press("/", *"no such words")
    assert page.run("return document.querySelector('#found').textContent") == "0 of 10 queries"
    page.press("Escape", "k")
    assert len(page.run(entries)) == 1 + len(QUERIES) and shown(page) == ["q8"]


def test_a_topic_is_found_and_an_unknown_query_is_told(page):
    page.run("location.hash = '#/q999'")
    assert shown(page) == ["overview"]
    assert "Query 999 is not on this page" in page.run("return document.querySelector('#found').textContent")


def test_values_on_hover_and_on_focus(page):
    """Of the token under the mouse, and of the focused one: the same that was computed; arrows go on to the next."""
    tip = "const tip = document.querySelector('#tip'); return tip.hidden ? '' : tip.textContent"
    page.run("document.querySelector('.example[open] .token.pos').id = 'one'")
    page.point("#one")
    hovered = page.run(tip)
    assert re.fullmatch(r"[+−][\d,.e+−]+ {2}· {2}[+−][\d.]+ % of the score", hovered), hovered
    page.point("h1")
    assert page.run(tip) == ""
    page.run("document.querySelector('#one').focus()")
    assert page.run(tip) == hovered
    page.press("ArrowRight")
    assert page.run("return document.activeElement.previousElementSibling.id") == "one" and page.run(tip) != ""
    assert shown(page) == ["q0"], "arrows in tokens stay there"
    page.press("Escape")
    assert page.run(tip) == ""


def test_the_keyboard_alone_reaches_everything(page):
    """Tab from the search goes to links, the query's tokens and examples, and each that has the focus shows it."""
    page.press("/")
    seen = set()
    for _ in range(60):
        page.press("Tab")
        seen.add(page.run("const e = document.activeElement; return e.tagName + '.' + e.className"))
        ring = page.run("const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth")
        assert ring != "none0px"
    assert "SUMMARY." in seen and "A." in seen and any(each.startswith("SPAN.token") for each in seen)


CONTRAST = """
const parse = (text) => {
  const numbers = text.match(/[\\d.]+/g).map(Number);
  return text.startsWith("color(") ? [...numbers.slice(0, 3).map((x) => 255 * x), numbers[3] ?? 1]
                                   : [...numbers.slice(0, 3), numbers[3] ?? 1];
};
const over = (top, under) => top.slice(0, 3).map((x, i) => x * top[3] + under[i] * (1 - top[3]));
const light = (colour) => {
  const [r, g, b] = colour.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  const layers = [];
  for (let each = element; each; each = each.parentElement) layers.push(parse(getComputedStyle(each).backgroundColor));
  return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
};
const worst = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.getClientRects().length || element.closest("svg, script, style")) continue;
  if (element.classList.contains("skip")) continue;
  const back = behind(element), ink = over(parse(getComputedStyle(element).color), back);
  const [low, high] = [light(back), light(ink)].sort((a, b) => a - b);
  worst.push([(high + 0.05) / (low + 0.05), `${element.tagName}.${element.className}`]);
}
for (const element of document.querySelectorAll("svg text")) {
  if (!element.getClientRects().length) continue;
  const back = behind(element.closest("figure, details")), ink = parse(getComputedStyle(element).fill);
  const [low, high] = [light(back), light(ink)].sort((a, b) => a - b);
  worst.push([(high + 0.05) / (low + 0.05), "svg text"]);
}
return worst.sort((a, b) => a[0] - b[0]).slice(0, 5);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, place, scheme):
    """Of every text on what lies behind it, the strongest shading of both signs among them: 4.5 : 1 (WCAG AA)."""
    page.prefer(scheme)
    page.open(place, "#/q6")
    page.run("""
        document.querySelectorAll(".example[open] .token").forEach((token, number) => {
          token.classList.remove("pos", "neg");
          token.classList.add(number % 2 ? "pos" : "neg");
          token.style.transition = "none";
          token.style.setProperty("--weight", 1);
        });
        document.querySelector(".which").insertAdjacentElement("beforeend",
          Object.assign(document.createElement("span"), {className: "flag", textContent: "near-duplicate"}));
    """)
    colour = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    backs = [page.run(colour, f".example[open] .token.{sign}") for sign in ("pos", "neg")]
    assert backs[0] != backs[1] and all("0.5" in back or "0.6" in back for back in backs), backs
    worst = page.run(CONTRAST)
    assert worst and worst[0][0] >= 4.5, worst
    page.press("o")
    worst = page.run(CONTRAST)
    assert worst and worst[0][0] >= 4.5, worst


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_is_wider_than_the_window(page, place, width):
    """At the width of a phone, a tablet and a desk: no view scrolls sideways."""
    page.resize(width, 800)
    page.open(place, "#/q0")
    for view in ("q0", "q3", "q7", "overview"):
        page.run("location.hash = arguments[0]", f"/{view}")
        page.run("return new Promise(done => setTimeout(done, 100))")
        assert shown(page) == [view]
        assert page.run("return document.documentElement.scrollWidth") <= width, view


def test_without_scripts(window, place):
    """Scores and texts are all there, and a link leads to each text."""
    window.without_scripts()
    try:
        window.open(place)
    finally:
        window.without_scripts(False)
    assert window.run("return document.querySelectorAll('noscript').length") == 1
    visible = "return [...document.querySelectorAll(arguments[0])].filter(x => x.getClientRects().length).length"
    assert window.run(visible, ".query") == len(QUERIES) and window.run(visible, "#texts article") == len(TRAIN)
    assert window.run("return document.querySelectorAll('.token').length") == 0
    missing = "return [...document.querySelectorAll('.body a')].filter(x => !document.querySelector(x.hash)).length"
    assert window.run(missing) == 0


def test_endings_and_titles(window, tmp_path):
    """Rows of an example are told apart, and the right one is marked."""
    task = TextTask(titles=["Ending 1", "Ending 2"])
    queries, train = [["one way", "another way"]], [[f"so {number}", f"or {number}"] for number in range(25)]
    write_page(tmp_path / "page.html", task, queries, train, made_up(task, queries, train), 1, {})
    window.open(tmp_path / "page.html")
    titles = window.run("return [...document.querySelectorAll('#q0 .example[open] h4')].map(x => x.textContent)")
    assert titles[:2] == ["Ending 1", "Ending 2 ✓ the right one"]
    assert window.run("return document.querySelectorAll('#q0 .example[open] .segment').length") == 2
