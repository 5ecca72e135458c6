"""The report's page: its structure and escaping, and what a browser makes of it."""

import csv
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrag_jax import cli
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import report, scores
from selfrag_jax.evaluation.page import figures, plots_of_results, questions, runs
from selfrag_jax.evaluation.page.figures import Curve, Plot
from selfrag_jax.evaluation.page.page import build_page
from selfrag_jax.evaluation.page.questions import PageLimits

HOSTILE = '</script><!--<script>document.title="owned"</script><img src=x onerror=alert(1)>\u2028&'


def node(number, text, *, chosen=False, parent=-1, support=0.9, passage=HOSTILE):
    return {
        "id": number, "parent": parent, "action": "retrieve" if passage else "no_retrieval",
        "passage": {"id": "7", "title": "Otters", "text": passage} if passage else None,
        "text": text, "p_segment": 0.5, "isrel": [0.1, 0.9],
        "issup": [support, 0.0, 1 - support], "isuse": [0.0, 0.0, 0.1, 0.1, 0.8],
        "score": 2.0 - number, "chosen": chosen, "allowed": True,
    }  # fmt: skip


def answer(number, accuracy, *, system="selfrag_adaptive", retrieved=True, support=0.9):
    text = f"Otter {number} swims. {HOSTILE}"
    passage = HOSTILE if retrieved else ""
    tree = [
        node(0, text, chosen=True, support=support, passage=passage),
        node(1, "No.", passage=passage),
        node(2, "It dives.", chosen=True, parent=0, support=support, passage=passage),
    ]
    cited = [{"id": "7", "title": "Otters", "text": HOSTILE}] if retrieved else []
    citations = [{"segment": 0, "passage": 0, "support": "[Fully supported]"}] if cited else []
    return {
        "id": f"q{number}", "system": system, "task": "popqa", "question": f"Who swims {number}?",
        "answer": f"{text} It dives.", "gold": ["otter", HOSTILE],
        "metrics": {"accuracy": accuracy},
        "popularity": 10 ** (number % 5), "retrieved": retrieved, "p_retrieve": 0.7, "score": 3.0,
        "segments": [{"text": text}, {"text": "It dives."}], "passages": cited,
        "citations": citations, "tree": tree, "notices": [], "error": "",
    }  # fmt: skip


def results():
    return [
        row
        for system, value in (("selfrag_adaptive", 1.0), ("mine <b>", 0.0))
        for row in scores.result_rows(
            system, "popqa", {"accuracy": [value, 1.0] * 9, "retrieval_rate": [0.0, 1.0] * 9}, 0
        )
    ]


def answers():
    """120 answers: 40 wrong, 20 without retrieval, 10 unsupported."""
    return [
        answer(i, float(i % 3 > 0), retrieved=i % 6 != 5, support=0.05 if i % 12 == 1 else 0.9)
        for i in range(120)
    ]


PAPER = [{"system": "Self-RAG 7B", "task": "popqa", "metric": "accuracy", "value": 0.549}]


class Parsed(HTMLParser):
    """The elements of a page, the text of its scripts, and whether its tags match."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.scripts = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def test_the_page_is_whole_and_loads_nothing():
    plots = plots_of_results.plots_of(results(), answers())
    page = Parsed(build_page(f"T {HOSTILE}", results(), answers(), paper=PAPER, plots=plots))
    assert page.tags.count("script") == 2 and "img" not in page.tags
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "style", "onerror", "onclick"}
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    policy = next(v for name, v in page.attributes if name == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    data = json.loads(page.scripts[0])
    assert data["passages"] == [{"id": "7", "title": "Otters", "text": HOSTILE}]
    assert len(data["questions"]) == 120 and {"main", "header", "nav"} <= set(page.tags)
    assert page.tags.count("figure") == 3  # popularity, retrieval rate, support


def test_tables_show_intervals_and_the_papers_figures(tmp_path):
    report.write_report(results(), answers(), tmp_path, "T", paper=PAPER)
    page, text = ((tmp_path / name).read_text() for name in ("index.html", "results.md"))
    assert "Self-RAG 7B <span class='paper'>paper</span></th><td>54.9</td>" in page
    assert "mine &lt;b&gt;" in page and "95% interval" in page
    assert "| Self-RAG, adaptive | 100.0 (100–100) |" in text
    with open(tmp_path / "results.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["metric"] for r in rows] == ["accuracy", "retrieval_rate"] * 2
    assert float(rows[2]["value"]) == 0.5 and rows[2]["system"] == "mine <b>"


def test_counts_and_times_are_no_per_cents(tmp_path):
    values = {"num_tokens": [2.0, 3.0], "mean_isuse": [-0.5, 0.25]}  # IsUse is from -1 to 1
    rows = scores.result_rows("selfrag_adaptive", "popqa", values, 0)
    report.write_report(rows, [], tmp_path, "T")
    assert "### Num tokens\n" in (tmp_path / "results.md").read_text()
    assert "### Mean isuse\n" in (tmp_path / "results.md").read_text()
    page = (tmp_path / "index.html").read_text()
    assert ">2.5</span>" in page and ">-0.125</span>" in page


def test_a_time_without_an_interval_is_shown(tmp_path):
    row = scores.seconds_row("selfrag", "popqa", 1.0, 8)
    report.write_report([row], [], tmp_path / "report", "T")
    assert "| selfrag | 0.125 |" in (tmp_path / "report" / "results.md").read_text()
    assert "seconds_per_question,0.125,,,8" in (tmp_path / "report" / "results.csv").read_text()
    assert "<span title='n = 8'>0.125</span>" in (tmp_path / "report" / "index.html").read_text()
    folder = write_run(tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["rows"].append(row)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert runs.read_run(folder).rows[-1] == row


@given(st.text(), st.text())
def test_no_text_leaves_its_script(one, other):
    text = questions.script_json({one: other + HOSTILE})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text)[one] == other + HOSTILE


def test_a_lone_surrogate_can_be_written():
    assert json.loads(questions.script_json("a\ud800b")) == "a?b"


def test_wrong_answers_come_first_and_the_order_stays():
    data = questions.question_data(answers(), PageLimits(50))
    shown = [int(q["id"][1:]) for q in data["questions"]]
    assert shown == sorted(shown) and len(shown) == data["shown"] == 50
    assert {i for i in range(120) if i % 3 == 0} <= set(shown)
    unsupported = {i for i in range(120) if i % 12 == 1}
    assert unsupported <= set(shown)
    assert data["wrong"] == data["wrong_shown"] == 40 and data["total"] == 120
    assert "50 of 120 answers" in build_page("T", results(), answers(), limits=PageLimits(50))


def test_the_size_is_bounded():
    full = len(questions.script_json(questions.question_data(answers(), PageLimits())))
    data = questions.question_data(answers(), PageLimits(2000, full // 2))
    assert 0 < data["shown"] < 120 and len(questions.script_json(data)) < full * 0.6
    assert questions.question_data(answers(), PageLimits(0))["questions"] == []


def test_answers_without_a_tree_are_shown():
    plain = {
        "id": 1,
        "system": "rag",
        "task": "t",
        "question": "q",
        "answer": "",
        "p_retrieve": None,
    }
    [q] = questions.question_data([plain], PageLimits())["questions"]
    assert q["id"] == "1" and not q["retrieved"] and "tree" not in q and "p" not in q


# ---- plots ---------------------------------------------------------------------------------------
def test_popularity_is_binned_by_decade():
    [plot] = plots_of_results.accuracy_by_popularity(answers())
    [curve] = plot.curves
    assert [round(x, 1) for x, *_ in curve.points] == [round(10 ** (d + 0.5), 1) for d in range(5)]
    for _, y, low, high in curve.points:
        assert low < y < high
    assert not plots_of_results.accuracy_by_popularity([answer(1, 1.0) | {"popularity": None}])


def test_accuracy_is_shown_against_the_answers_own_critique():
    [plot] = plots_of_results.accuracy_by_support(answers())
    [curve] = plot.curves  # of the answers with a passage: 90 well supported, 10 are not
    (low, right, *_), (high, others, *_) = curve.points
    assert (low, high) == (0.05, 0.95) and right == 1.0 and others == pytest.approx(50 / 90)
    assert not plots_of_results.accuracy_by_support(answers()[:4])


def test_wilson_intervals_by_hand():
    # 8 of 10: (0.8 + z²/20 ± z √(0.016 + z²/400)) / (1 + z²/10)
    low, high = plots_of_results.wilson_interval(0.8, 10)
    assert low == pytest.approx(0.4901625) and high == pytest.approx(0.9433178)
    assert plots_of_results.wilson_interval(1.0, 5)[1] == 1.0


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5),
    st.booleans(),
    st.floats(0, 1),
)
def test_every_plot_can_be_drawn(xs, log_x, y):
    curve = Curve("<a>", tuple((x, y, None, None) for x in xs))
    text = figures.figure(Plot("t & u", "x", "y", (curve,), log_x=log_x, share_y=False), 0)
    Parsed(text)
    assert "nan" not in text and "&lt;a&gt;" in text and "<a>" not in text
    assert not figures.figure(Plot("t", "x", "y", ()), 0)


def test_the_losses_of_a_training_are_read_back(tmp_path):
    from selfrag_jax.training.event_files import read_scalars
    from selfrag_jax.training.log import _EventFile

    log = _EventFile(tmp_path / "logs")
    for step in (1, 2, 3):
        log.write({"loss/text": 1 / step, "mfu": 0.5}, step)
    log.close()
    scalars = read_scalars(tmp_path)
    assert scalars["loss/text"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    [plot] = plots_of_results.training_losses({"critic": scalars})
    assert [c.name for c in plot.curves] == ["text"] and len(plot.curves[0].points) == 3
    [file] = (tmp_path / "logs").iterdir()
    file.write_bytes(file.read_bytes()[:-5])  # killed while it wrote
    assert len(read_scalars(tmp_path)["loss/text"]) >= 2
    assert read_scalars(tmp_path / "nothing") == {}


# ---- an evaluation's folder ----------------------------------------------------------------------
def write_run(folder, changed_score=None, changed_answer=None):
    folder.mkdir(parents=True, exist_ok=True)
    of_run, made = results()[:2], [answer(i, float(i)) for i in range(2)]
    scored = [
        {k: a[k] for k in ("id", "question", "gold", "answer", "metrics", "popularity")}
        for a in made
    ]
    scored[1] |= changed_score or {}
    made[1] |= changed_answer or {}
    of_run[0]["paper"] = {"7b": 0.549, "13b": 0.558}
    (folder / "metrics.json").write_text(json.dumps({"rows": of_run, "seed": 0}))
    for name, rows in (("answers", made), ("scores", scored)):
        lines = [json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_an_evaluations_folder_becomes_a_report(tmp_path, capsys):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert cli.main(["report", f"--run={a}"]) == 0
    assert f"{a}/report/index.html" in capsys.readouterr().out
    page = Parsed((a / "report" / "index.html").read_text())
    data = json.loads(page.scripts[0])
    assert [q["metrics"]["accuracy"] for q in data["questions"]] == [0.0, 1.0]
    assert data["questions"][0]["popularity"] == 1 and data["tasks"] == ["popqa"]
    text = (a / "report" / "index.html").read_text()
    assert "Self-RAG 13B <span class='paper'>paper</span></th><td>55.8</td>" in text
    # Two runs of one system stand beside each other under their folders' names.
    assert cli.main(["report", f"--run={a},{b}", f"--out={tmp_path}/both"]) == 0
    text = (tmp_path / "both" / "index.html").read_text()
    assert list(json.loads(Parsed(text).scripts[0])["systems"]) == [str(a), str(b)]


def test_the_curves_of_a_sweep_are_shown(tmp_path):
    points = [
        {"settings": {"threshold": t, "w_sup": w}, "rows": scores.result_rows("x", "t", values, 0)}
        for w in (1.0, 0.0)
        for t in (0.8, 0.2)
        for values in [{"accuracy": [w, t], "num_tokens": [1.0]}]
    ]
    by_threshold, by_weight = plots_of_results.sweep_curves(points)
    assert [(c.name, [p[:2] for p in c.points]) for c in by_threshold.curves] == [
        ("accuracy", [(0.2, 0.6), (0.8, 0.9)])
    ]
    assert by_weight.note == "With threshold=0.8."
    (tmp_path / "sweep.json").write_text(json.dumps({"points": points}))
    run = write_run(tmp_path / "run")
    assert cli.main(["report", f"--run={run}", f"--sweep={tmp_path}"]) == 0
    assert "Sweep of threshold" in (run / "report" / "index.html").read_text()
    with pytest.raises(UserError, match="holds no finished sweep"):
        runs.read_sweep(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "other"}, r"answers\.jsonl:2: id 'q1' is not in scores\.jsonl"),
        ({"metrics": {"f1": float("nan")}}, r"scores\.jsonl:2: metric f1 must be a finite number"),
        ({"popularity": "high"}, r"scores\.jsonl:2: popularity must be a finite number"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        runs.read_run(write_run(tmp_path / "run", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tree": [{"text": "x"}]}, "tree node 1 lacks chosen, isuse, p_segment, passage, score"),
        ({"citations": [{"segment": 0, "passage": 3}]}, "a citation names passage 3 of 1"),
    ],
)
def test_answers_of_another_form_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=r"answers\.jsonl:2: " + message):
        runs.read_run(write_run(tmp_path / "run", changed_answer=change))


def test_an_unfinished_run_is_named(tmp_path):
    (write_run(tmp_path / "run") / "scores.jsonl").unlink()
    with pytest.raises(UserError, match=r"run: holds no finished evaluation \(scores\.jsonl"):
        runs.read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give --workdir"),
        (("--run=a", "--workdir=b"), "give --workdir"),
        (("--run=a", "--examples=-1"), "--examples=-1: must be 0 or more"),
        (("--run=a,b",), "--out says where"),
        (("--run=a,a", "--out=c"), "names a run twice"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, capsys):
    assert cli.main(["report", *flags]) == 2
    assert message in capsys.readouterr().err


# ---- in a browser --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.fail("no Chromium on the PATH: `apt-get install chromium` (the tests need it)")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    report.write_report(results(), answers(), out, "A report", paper=PAPER)
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


@pytest.mark.browser
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


@pytest.mark.browser
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
@pytest.mark.browser
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


@pytest.mark.browser
def test_the_tables_need_no_javascript(open_page):
    page = open_page(java_script_enabled=False)
    assert page.get_by_text("The questions need JavaScript").is_visible()
    assert page.get_by_role("cell", name="54.9").is_visible()
    assert not page.locator("#browser").is_visible()
    assert not open_page().get_by_text("The questions need JavaScript").is_visible()
