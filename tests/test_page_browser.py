"""What a browser makes of the report's page: filters, trees, both schemes, accessibility.

Needs Chromium: `python tests/chromium.py` says which one is used, or what to install.
"""

from pathlib import Path

import chromium
import pytest
from page_rows import HOSTILE, PAPER, answers, in_all_modes, results

from selfrag_jax.evaluation import report
from selfrag_jax.evaluation.page.plots_of_answers import answer_curves

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    found = chromium.find() or pytest.fail(chromium.INSTALL)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    curves = answer_curves(in_all_modes())
    report.write_report(results(), answers(), out, "A report", paper=PAPER, curves=curves)
    return out / "index.html"


@pytest.fixture
def open_page(browser, page_file):
    """Opens the page; fails the test if anything is written to its console."""
    errors, contexts = [], []

    def opened(width=1280, scheme="light", **options):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda r: r.url.startswith("file:") or errors.append(r.url))
        page.goto(page_file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


def questions_shown(page):
    return page.locator("#list .q").all_text_contents()


def test_questions_are_filtered_searched_and_paged(open_page):
    page = open_page()
    assert len(questions_shown(page)) == 50
    assert page.locator("#count").text_content() == "120 answers"
    page.get_by_role("button", name="Next").press("Enter")
    assert questions_shown(page)[0] == "Who swims 50?"
    assert page.locator("#place").text_content() == "51 to 100 of 120"
    page.get_by_role("combobox", name="Answer").select_option("wrong")
    assert page.locator("#count").text_content() == "40 answers"
    assert questions_shown(page) == [f"Who swims {i}?" for i in range(0, 120, 3)]
    page.get_by_role("combobox", name="Answer").select_option("")
    page.get_by_label("not retrieved").check()
    assert questions_shown(page) == [f"Who swims {i}?" for i in range(5, 120, 6)]
    page.get_by_label("not retrieved").uncheck()
    page.get_by_label("unsupported").check()
    assert len(questions_shown(page)) == 10
    page.get_by_label("unsupported").uncheck()
    page.get_by_label("Text").fill("OTTER 77 </script>")
    page.get_by_text("1 answer", exact=True).wait_for()
    assert questions_shown(page) == ["Who swims 77?"]


def test_a_tree_opens_and_hostile_text_stays_text(open_page):
    page = open_page()
    card = page.locator("details.card").first
    card.locator("summary").focus()
    page.keyboard.press("Enter")
    card.locator(".tree").wait_for()
    assert card.locator(".node").count() == 3 and card.locator(".node.chosen").count() == 2
    assert card.locator(".tree ul .node").text_content().startswith("It dives.")
    assert card.locator(".decision").text_content() == "Decision: p(retrieve) 0.70: retrieved"
    chosen = card.locator(".node.chosen").first
    assert chosen.locator(".passage").text_content() == f"Otters: {HOSTILE}"
    assert "IsSup: full 0.90, partial 0.00, none 0.10" in chosen.text_content()
    width = "e => getComputedStyle(e).width.slice(0, -2) / e.parentElement.clientWidth"
    assert chosen.locator(".b0").evaluate(width) == pytest.approx(0.9, abs=0.02)
    card.get_by_role("link", name="[1]").click()
    assert page.evaluate("document.activeElement.id") == chosen.get_attribute("id")
    assert page.title() == "A report" and page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_fits_and_is_accessible(open_page, width, scheme):
    import axe_playwright_python

    page = open_page(width, scheme)
    page.get_by_label("Text").fill("77")
    page.get_by_text("1 answer", exact=True).wait_for()
    page.locator("details.card summary").first.click()
    page.locator("figure summary").first.click()
    page.locator(".tree").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
    page.evaluate(Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text())
    violations = page.evaluate("axe.run()")["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in violations] == []


def test_the_tables_need_no_javascript(open_page):
    page = open_page(java_script_enabled=False)
    assert page.get_by_text("The questions need JavaScript").is_visible()
    assert page.get_by_role("cell", name="54.9").is_visible()
    assert not page.locator("#browser").is_visible()
    assert not open_page().get_by_text("The questions need JavaScript").is_visible()
