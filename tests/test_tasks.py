"""Tasks: exact prompts, instructions of a user's file, and `selfrag evaluate --task=NAME`."""

import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrag_jax import artifacts, cli
from selfrag_jax.answering.config import DEFAULT
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.commands import answer, task_runs
from selfrag_jax.config import installed_folder
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import mauve_score, reproduction, tables, task_files, tasks
from selfrag_jax.evaluation.page.page import build_page
from selfrag_jax.huggingface import weights
from selfrag_jax.records import Question, read_rows, write_jsonl
from selfrag_jax.search.algorithms import ALGORITHMS
from selfrag_jax.text import prompts, reflection

PASSAGES = [{"title": "Quenport", "text": "Mara lives in Lisford."}]
POINTS = np.random.default_rng(0).normal(size=(8, 4))  # features of eight texts, for MAUVE


def choice_question(labels, answers=("B",)):
    texts = ("wood", "iron", "glass", "salt", "clay")
    choices = tuple(zip(labels, texts, strict=False))
    return Question("1", "What rusts?", answers, choices=choices, options=tuple(labels))


def written(file, content):
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


# ---- configs -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", tasks.names())
def test_every_task_has_settings_that_a_search_takes(name):
    for spec in (name, f"{name}:paper", f"{name}:released"):
        task = tasks.load(spec)
        settings = task.settings()
        terms = {k: v for k, v in settings.items() if k.startswith("w_")}
        others = {k: v for k, v in settings.items() if not k.startswith("w_")}
        config = ALGORITHMS[settings["scorer"]].configure(DEFAULT.search, others, terms)
        assert config.scorer == ("released" if spec.endswith("released") else "paper")
        is_short_script = config.scorer == "released" and config.max_depth == 1
        assert config.weights.w_use == (1.0 if is_short_script else 0.5)
        assert task.files and task.name == name == task.spec.partition(":")[0]
    text = (installed_folder() / "tasks" / f"{name}.py").read_text()
    assert f"selfrag evaluate --task={name} " in text and "Traps: " in text


def test_the_papers_figures():
    """Table 2: the tasks' main figures, 7B and 13B."""
    expected = {
        "popqa": (54.9, 55.8), "triviaqa": (66.4, 69.3), "pubhealth": (72.4, 74.5),
        "arc_challenge": (67.3, 73.1), "asqa": (30.0, 31.7), "factscore_bio": (81.2, 80.2),
    }  # fmt: skip
    for name, (small, large) in expected.items():
        assert tasks.load(name).figure("accuracy") == {"7b": small, "13b": large}
    assert {n for n in tasks.names() if tasks.load(n).figures} == set(expected)
    assert tasks.load("asqa").figure("citation_recall") == {"7b": 67.8, "13b": 71.3}
    assert tasks.load("popqa").figure("retrieval_rate") == {}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("popqua", "no such task; did you mean 'popqa'"),
        ("popqa:author", "unknown variant; popqa has paper, released"),
        ("popqa:", "unknown variant"),
    ],
)
def test_unknown_tasks_and_variants_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        tasks.load(spec)


# ---- prompts -------------------------------------------------------------------------------------
CLAIM = Question("1", "Salt cures colds.", ("false",))
BEST = "Which of the listed answers is the best one? Reply with its letter only."
RIGHT = "Decide whether the claim below is right. Reply true if it is, and false if not."
SEVERAL = (
    "Answer the question below in a few sentences. Where it can be understood in several ways, "
    "give the answer to each of them."
)
LISTED = "What rusts?\nA: wood\nB: iron\nC: glass"


@pytest.mark.parametrize(
    ("spec", "question", "expected"),
    [
        ("popqa", Question("1", "Who is Mara?"), "Who is Mara?"),
        ("popqa:released", Question("1", "Who is Mara?"), "Who is Mara?"),
        ("factscore_bio", Question("1", "Tell me about Mara."), "Tell me about Mara."),
        ("pubhealth", CLAIM, f"{RIGHT}\n\n## Input:\n\nSalt cures colds."),
        ("fever:released", CLAIM, "Do it.\n\n## Input:\n\nSalt cures colds."),
        ("arc_challenge", choice_question("ABC"), f"{BEST}\n\n### Input:\n{LISTED}"),
        ("arc_challenge", choice_question("123", "2"), f"{BEST}\n\n### Input:\n{LISTED}"),
        ("arc_challenge:released", choice_question("123", "2"),
         f"Do it.\n\n### Input:\n{LISTED}\nD: "),
        ("arc_challenge:released", choice_question("ABCDE"),
         f"Do it.\n\n### Input:\n{LISTED}\nD: salt\nE: clay"),
        ("mmlu", choice_question("ABCD"), f"{BEST}\n\n### Input:\n{LISTED}\nD: salt"),
        ("asqa", Question("1", "Who is Mara?"), f"{SEVERAL}## Input:\n\nWho is Mara?"),
        ("asqa:released", Question("1", "Who?"), "Do it.## Input:\n\nWho?"),
        ("eli5:released", Question("1", "Why?"), "Do it.## Input:\n\nWhy?"),
    ],
)  # fmt: skip
def test_prompts_by_hand(spec, question, expected, tmp_path):
    file = written(tmp_path / "i.json", dict.fromkeys(("arc_c", "fever", "asqa", "eli5"), "Do it."))
    given = file if spec.endswith("released") else None
    asked = tasks.with_instruction(tasks.load(spec), given).ask(question)
    assert prompts.question_text(asked) == asked.prompt == expected
    assert asked.question == question.question  # what passages are searched with
    assert asked.task == spec.partition(":")[0]


def test_answers_become_options():
    asked = tasks.load("arc_challenge").ask(choice_question("1234", ("3",)))
    assert asked.answers == ("C",) and asked.options == ("A", "B", "C", "D")
    released = tasks.load("arc_challenge:released").ask(choice_question("ABC"))
    assert released.options == ("A", "B", "C")  # the scripts' empty D is shown and is no answer
    for gold, option in (("SUPPORTS", "true"), ("REFUTES", "false"), ("True", "true")):
        asked = tasks.load("fever").ask(Question("1", "Salt.", (gold,)))
        assert asked.answers == (option,) and asked.options == ("true", "false")
    asked = tasks.load("strategyqa").ask(Question("1", "Do otters?", ("true", "yes")))
    assert asked.answers == ("yes",)


@pytest.mark.parametrize(
    ("name", "question", "message"),
    [
        ("arc_challenge", CLAIM, "question '1' has no choices"),
        ("pubhealth", choice_question("AB"), "has choices, but the answers of --task=pubhealth"),
        ("fever", Question("1", "?", ("NOT ENOUGH INFO",)), "'NOT ENOUGH INFO' is none of the opt"),
    ],
)
def test_a_question_of_another_task_is_refused(name, question, message):
    with pytest.raises(UserError, match=f"q.jsonl: .*{message}"):
        tasks.load(name).ask_all([question], "q.jsonl")


HEADINGS = ("### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n", "\n\n## Input:\n\n")


@given(st.lists(st.sampled_from([*reflection.ALL, *HEADINGS, "<s>", "</s>", " Mara "]), min_size=1))
def test_text_cannot_forge_control_tokens(tokenizer, texts):
    """Neither a question nor a choice nor an instruction of a file becomes a control token."""
    text = "".join(texts)
    q = Question("1", f"{text}?", ("A",), choices=(("A", text), ("B", "x")), options=("A", "B"))
    asked = tasks.load("arc_challenge").ask(q)
    control = {*tokenizer.reflection_ids().all, tokenizer.bos_id, tokenizer.eos_id}
    ids = tokenizer.encode(prompts.instruction(asked.prompt), before_control=True)
    assert not control & set(ids)
    plain = tokenizer.encode(prompts.instruction("x"), before_control=True)
    # The template's own headings, once each, and no other.
    for heading in (plain[0], plain[-1]):
        assert ids.count(heading) == 1


# ---- instructions --------------------------------------------------------------------------------
SOURCE = """import jsonlines
TASK_INST = {"arc_c": "Choose. ",
             "fever": "Is it " "so?"}
open("was_run", "w")
"""


def test_instructions_are_read_from_json_and_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = written(tmp_path / "utils.py", SOURCE)
    assert tasks.read_instructions(source) == {"arc_c": "Choose. ", "fever": "Is it so?"}
    assert not (tmp_path / "was_run").exists()
    task = tasks.with_instruction(tasks.load("pubhealth:released"), source)
    assert task.instruction == "Is it so?"
    assert tasks.with_instruction(tasks.load("popqa:released"), source).instruction == ""
    # The task's own name comes before the scripts'.
    both = written(tmp_path / "i.json", {"fever": "F", "pubhealth": "P"})
    assert tasks.with_instruction(tasks.load("pubhealth"), both).instruction == "P"
    annotated = written(tmp_path / "a.py", "TASK_INST: dict = {'asqa': 'A'}")
    assert tasks.read_instructions(annotated) == {"asqa": "A"}
    with pytest.raises(UserError, match=r"utils\.py: .*no instruction for asqa; .*arc_c, fever"):
        tasks.with_instruction(tasks.load("asqa"), source)
    with pytest.raises(UserError, match="give --instructions=retrieval_lm/utils.py"):
        tasks.with_instruction(tasks.load("asqa:released"), None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("u.py", "TASK_INST = dict(a=open('was_run', 'w'))", "u.py:1: TASK_INST is computed"),
        ("u.py", "TASK_INST = {'a': __import__('os').getcwd()}", "is computed"),
        ("u.py", "x = 1", "assigns no TASK_INST"),
        ("u.py", "TASK_INST = {", "is not Python source"),
        ("u.py", "TASK_INST = " + "(" * 9000 + ")" * 9000, "not Python source|nested too deeply"),
        ("i.json", "{", "i.json:1: not valid JSON"),
        ("i.json", "[]", "expected a text for each task"),
        ("i.json", '{"a": 1}', "expected a text for each task"),
        ("i.json", '{"a": " "}', "expected a text for each task"),
    ],
)
def test_other_files_of_instructions_are_refused(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        tasks.read_instructions(written(tmp_path / name, content))
    assert not (tmp_path / "was_run").exists()


# ---- the flow ------------------------------------------------------------------------------------
QUICK = (
    "--ndocs=2", "--max_new_tokens=6", "--config.answer.search.length_bucket=16",
    "--config.answer.max_length=64", "--config.answer.batch=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(talkative, tmp_path_factory):
    """A random model's folder; the smallest."""
    folder = tmp_path_factory.mktemp("model")
    params = jax.device_get(talkative.params)
    weights.save_folder(folder, talkative.model.config, params, talkative.tokenizer)
    return folder


@pytest.fixture
def popqa(tmp_path):
    file = tmp_path / "popqa_longtail.jsonl"
    texts = ("Who?", "Who is Mara?", "Where is Mara?", "What?")
    write_jsonl(
        file,
        [
            {"id": f"q{i}", "question": t, "answers": ["the"], "ctxs": PASSAGES}
            for i, t in enumerate(texts)
        ],
    )
    return file


def evaluate(*flags):
    return cli.main(["evaluate", *flags, *QUICK])


def test_a_task_is_answered_scored_and_compared(model, popqa, tmp_path, capsys, monkeypatch):
    """Interrupted and continued; finished, the model is not loaded again."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    flags = ("--task=popqa", f"--input={popqa}", f"--model={model}")
    reads, read = [], answer.read_questions
    monkeypatch.setattr(answer, "read_questions", lambda *a: reads.append(a) or read(*a))
    assert evaluate(*flags, f"--out={whole}") == 0
    assert len(reads) == 1  # scoring and answering take the same questions
    printed = capsys.readouterr()
    assert "prompt: task popqa: the question alone" in printed.err
    assert re.search(r"^metric +ours +95% interval +n +paper 7b +paper 13b$", printed.out, re.M)
    line = r"^accuracy +\d+\.\d +[\d.]+–[\d.]+ +4 +54\.9 +55\.8$"
    assert re.search(line, printed.out, re.M)
    metrics = json.loads((whole / "metrics.json").read_text())
    [row] = [r for r in metrics["rows"] if r["metric"] == "accuracy"]
    assert row["system"] == "selfrag" and row["task"] == "popqa" and metrics["failed"] == 0
    assert row["paper"] == {"7b": pytest.approx(0.549), "13b": pytest.approx(0.558)}
    scored = [json.loads(text) for text in (whole / "scores.jsonl").read_text().splitlines()]
    assert [r["id"] for r in scored] == ["q0", "q1", "q2", "q3"]
    assert np.mean([r["metrics"]["accuracy"] for r in scored]) == row["value"]

    answered, make_answer = [], SelfRAG._answer

    def interrupted_answer(self, search, tree, q, notices):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(q.id)
        return make_answer(self, search, tree, q, notices)

    with monkeypatch.context() as patched:
        patched.setattr(SelfRAG, "_answer", interrupted_answer)
        assert evaluate(*flags, f"--out={out}") == 130
    assert len(answered) == 2 and not (out / "metrics.json").exists()

    def recording_answer(self, search, tree, q, notices):
        answered.append(q.id)
        return make_answer(self, search, tree, q, notices)

    with monkeypatch.context() as patched:
        patched.setattr(SelfRAG, "_answer", recording_answer)
        assert evaluate(*flags, f"--out={out}") == 0
    assert sorted(answered) == ["q0", "q1", "q2", "q3"]
    for name in ("answers.jsonl", "scores.jsonl"):
        assert (out / name).read_text() == (whole / name).read_text()
    ours, uninterrupted = (
        json.loads((folder / "metrics.json").read_text())["rows"] for folder in (out, whole)
    )
    assert [r for r in ours if r["metric"] != "seconds_per_question"] == uninterrupted[:-1]
    for last in (ours[-1], uninterrupted[-1]):
        assert last["metric"] == "seconds_per_question" and last["n"] == 4 and last["value"] > 0
        assert last["low"] is last["high"] is None
    assert re.search(r"^seconds_per_question +\d+\.\d{3} +4$", printed.out, re.M)

    monkeypatch.setattr(SelfRAG, "load", lambda *_: pytest.fail("loaded again"))
    assert evaluate(*flags, f"--out={out}") == 0
    assert evaluate(*flags, f"--out={out}", "--threshold=0.5") == 2  # the answers are others
    assert "threshold" in capsys.readouterr().err


def test_all_tasks_of_a_folder(model, popqa, tmp_path, capsys):
    """Each task with a file there is run; a broken file does not keep the others."""
    data = popqa.parent
    broken = [{"id": "1", "question": "What rusts?", "answers": ["B"], "ctxs": PASSAGES}]
    write_jsonl(data / "arc_challenge_processed.jsonl", broken)
    flags = ("--all", f"--data={data}", f"--model={model}")
    assert evaluate(*flags, f"--out={tmp_path / 'out'}") == 1
    printed = capsys.readouterr()
    assert "question '1' has no choices" in printed.err
    assert re.search(r"^popqa +match +54\.9 +\d+\.\d +[+-]\d", printed.out, re.M)
    assert "popqa: scorer: the paper's equations" in printed.out
    assert (tmp_path / "out" / "popqa_longtail-popqa" / "metrics.json").is_file()


@pytest.fixture
def asqa(tmp_path, monkeypatch):
    """ASQA's file; its answers and their features are made without a model."""
    long = [{"long_answer": f"Mara lives in Lisford {i}."} for i in range(2)]
    pairs = [{"question": "Where?", "short_answers": ["Lisford"]}]
    row = {"question": "Where?", "qa_pairs": pairs, "annotations": long, "docs": PASSAGES}
    file = tmp_path / "asqa.jsonl"
    write_jsonl(file, [row | {"id": str(i)} for i in range(8)])
    answered = {
        "question": "Where?", "answer": "In Lisford.", "retrieved": True, "segments": [],
        "citations": [], "passages": [], "error": "",
    }  # fmt: skip

    def answers(self, run, questions):
        rows = [answered | {"id": q.id, "question": q.question} for q in questions]
        write_jsonl(run.folder / "answers.jsonl", rows)
        return rows

    def features(texts, folder):
        assert folder == "gpt2" and len(texts) == 8
        return POINTS

    monkeypatch.setattr(task_runs.Models, "answers", answers)
    monkeypatch.setattr(mauve_score, "features", features)
    return file


def test_mauve_of_a_task_stands_beside_the_papers(model, asqa, tmp_path, capsys):
    files = f"--input={asqa}", f"--model={model}", f"--out={tmp_path / 'out'}"
    assert evaluate("--task=asqa", *files, "--mauve=gpt2") == 0
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"]
    [mauve] = [r for r in rows if r["metric"] == "mauve"]
    assert mauve["value"] == mauve_score.mauve(POINTS, POINTS, 0)[0]
    assert mauve["paper"]["7b"] == pytest.approx(0.743)
    line = r"^mauve +\d+\.\d +[\d.]+–[\d.]+, range of 5 seeds +8 +74\.3 +71\.6$"
    assert re.search(line, capsys.readouterr().out, re.M)
    # In the table of all tasks and in the report, too: its ends are no 95% interval.
    [row, _] = reproduction.comparison([(tasks.load("asqa"), [mauve])])
    assert reproduction.comparison_lines([row], "7b")[1][-1].endswith(", range of 5 seeds")
    assert ", range of 5 seeds) |" in tables.markdown([mauve])
    page = build_page("T", [mauve, mauve | {"metric": "rouge_l"}], [])
    assert page.count("title='95% interval ") == 1 and page.count("range of 5 seeds, n = 8'") == 1


def test_mauve_of_all_tasks_is_that_of_long_answers(model, asqa, popqa, tmp_path, capsys):
    """Tasks of short answers are scored without it, and the lines say so."""
    out = tmp_path / "out"
    write_jsonl(tmp_path / "pubhealth.jsonl", [{"claim": "Salt.", "label": "true"}])  # fails
    flags = f"--data={tmp_path}", f"--model={model}", f"--out={out}", "--mauve=gpt2"
    assert evaluate("--all", *flags) == 1
    printed = capsys.readouterr()
    assert "1 tasks were not evaluated; the first, pubhealth: " in printed.err
    assert "--mauve: computed for asqa\n" in printed.err
    for folder, has_mauve in (("asqa-asqa", True), ("popqa_longtail-popqa", False)):
        rows = json.loads((out / folder / "metrics.json").read_text())["rows"]
        assert any(r["metric"] == "mauve" for r in rows) == has_mauve
    assert re.search(r"^asqa +mauve +74\.3 ", printed.out, re.M)
    assert (
        "\nTable 3 (ablations): the same command with --systems=selfrag,ablations\n" in printed.out
    )
    passages = "passages: those of asqa.jsonl; the paper's are from GTR-XXL"
    assert f"asqa: {passages}\n" in printed.out
    # ASQA's questions without their long answers: all but MAUVE is computed.
    rows = [row for _, row in read_rows(asqa)]
    write_jsonl(asqa, [{k: v for k, v in row.items() if k != "annotations"} for row in rows])
    assert evaluate("--all", *flags[:2], f"--out={tmp_path / 'bare'}", "--mauve=gpt2") == 1
    err = capsys.readouterr().err
    assert "--mauve: computed for no task\n" in err
    assert "asqa.jsonl: --mauve: fewer than two questions have a long gold answer" in err
    assert (tmp_path / "bare/asqa-asqa/metrics.json").is_file()


def test_the_papers_file_is_taken_and_ours_never(tmp_path, capsys):
    names = {
        "asqa_eval_dpr_top100.json": 0, "asqa_eval_gtr_top100.json": 1,
        "triviaqa_test.jsonl": 0, "triviaqa_test_w_gs.jsonl.gz": 1,
        "popqa_answers.jsonl": 0, "popqa_answers.scores.jsonl": 0,
        "popqa_mine.jsonl": 0, "popqa_longtail.jsonl": 1, "popqa_mine.jsonl.manifest.json": 0,
        "nq_with_passages.jsonl": 1, "nq_with_passages.jsonl.manifest.json": 0,
        "mmlu_said.jsonl": 0, "mmlu_said.jsonl.manifest.json": 0, "fever_answers.jsonl": 0,
    }  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("{}")
    for name, stage in (
        ("popqa_mine", "answer"),
        ("mmlu_said", "export"),
        ("nq_with_passages", "retrieve"),
    ):
        artifacts.write_manifest(tmp_path / f"{name}.jsonl", stage, {}, {}, {})
    found = task_files.find_files(tmp_path)
    assert {f.file.name for f in found} == {name for name, taken in names.items() if taken}
    others = {f.task.name: f.others for f in found}
    assert others == {
        "asqa": ("asqa_eval_dpr_top100.json",), "triviaqa": ("triviaqa_test.jsonl",),
        "popqa": (), "nq": (),
    }  # fmt: skip
    said = "asqa: takes asqa_eval_gtr_top100.json, not asqa_eval_dpr_top100.json\n"
    assert said in capsys.readouterr().err
    [asqa] = [f for f in found if f.task.name == "asqa"]
    values = {"instructions": "i.json", "scorer": "released", "index": None}
    for index, ours in ((None, ""), ("I", ", of the index where a question has none")):
        assert reproduction.causes(
            asqa.task, (), values | {"index": index}, {"str_em"}, asqa.file.name, asqa.others
        ) == [
            f"asqa: passages: those of asqa_eval_gtr_top100.json{ours}; the paper's are from "
            "GTR-XXL; the folder also has asqa_eval_dpr_top100.json"
        ]
    for file in tmp_path.iterdir():
        file.rename(file.with_name(f"x_{file.name}"))
    with pytest.raises(UserError, match="holds no task's file; looked for .*popqa_longtail_w_gs"):
        task_files.find_files(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task=popqua", "--input=Q"], "no such file or task; did you mean 'popqa'"),
        (["--task=popqa"], "missing --input"),
        (["--task=popqa", "--input=none.jsonl", "--model=M"], "none.jsonl: no such file"),
        (["--task=popqa", "--input=Q"], "give --model"),
        (["--task=popqa", "--input=bare.jsonl", "--model=M"], "no passages (ctxs); give --index"),
        (["--task=popqa", "--input=twice.jsonl", "--model=M"], "id '1' occurs more than once"),
        (["--task=popqa", "--input=open.jsonl", "--model=M"], "2 of 2 questions have no gold"),
        (["--task=arc_challenge", "--input=bare.jsonl", "--model=M"], "'1' has no choices"),
        (
            ["--task=popqa", "--input=short.jsonl", "--model=M", "--mauve=gpt2"],
            "--mauve: fewer than two questions have a long gold answer",
        ),
        (["--task=asqa:released", "--input=Q", "--model=M"], "give --instructions="),
        (["--task=popqa", "--input=Q", "--predictions=P"], "goes with a task's name"),
        (["--task=popqa", "--input=Q", "--critic=C"], "does not go with a task's name"),
        (["--all", "--model=M"], "missing --data"),
        (["--all", "--data=.", "--model=M"], "holds no task's file; looked for"),
        ([], "missing --task"),
    ],
)
def test_wrong_input_is_named_before_the_model_is_loaded(
    model, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    rows = {
        "bare": [{"id": "1", "question": "Who?", "answers": ["x"]}],
        "twice": [{"id": "1", "question": "Who?", "answers": ["x"], "ctxs": PASSAGES}] * 2,
        "short": [{"id": "1", "question": "Who?", "answers": ["x"], "ctxs": PASSAGES}],
        "open": [{"id": i, "question": "Who?", "ctxs": PASSAGES} for i in "12"],
    }
    folder = tmp_path / "questions"
    for name, content in rows.items():
        write_jsonl(folder / f"{name}.jsonl", content)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(SelfRAG, "load", lambda *_: pytest.fail("loaded"))
    flags = [f"--model={model}" if f == "--model=M" else f for f in flags]
    assert cli.main(["evaluate", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert len(list(folder.iterdir())) == len(rows)


@pytest.mark.parametrize("holds", ["a model", "an index", "metrics", "a file"])
def test_an_evaluation_replaces_only_an_evaluation(model, tmp_path, holds):
    out, message = tmp_path / "out", "was not made by `selfrag evaluate`"
    if holds == "a file":
        out.write_text("mine")
        message = "is a file"
    elif holds == "a model":
        out, message = model, "is both the output and the model"
    elif holds == "metrics":
        write_jsonl(out / "metrics.json", [{"mine": 1}])
    else:
        write_jsonl(out / "manifest.json", [{"stage": "index"}])
        message = "was made by `selfrag index`"
    with pytest.raises(UserError, match=message):
        task_runs.check_folder(out, model, None)
    if holds == "metrics":  # killed after its answers, before its manifest
        (out / "answers.jsonl").write_text("{}")
        artifacts.write_manifest(out / "answers.jsonl", "answer", {}, {}, {})
        task_runs.check_folder(out, model, None)


@pytest.mark.parametrize(
    ("flags", "prompt", "line"),
    [
        ([], "", "prompt: the questions as they are; --task=popqa would ask as that task does"),
        (["--task=asqa"], "one paragraph", "prompt: task asqa: an instruction (i.json)"),
        (["--task=asqua"], "", "--task=asqua is a name only; did you mean 'asqa'"),
    ],
)
def test_answer_takes_a_tasks_prompt_by_its_name_only(
    tmp_path, monkeypatch, capsys, flags, prompt, line
):
    """A file that is called like a task is asked as before."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "popqa.jsonl", [{"id": "1", "question": "Who?", "ctxs": PASSAGES}])
    written(tmp_path / "i.json", {"asqa": "In one paragraph."})
    asked = []

    def record(rag, input_path, out, task, changes, task_prompt, questions, *_):
        asked.extend(questions)
        return len(asked)

    monkeypatch.setattr(answer, "answer_file", record)
    settings = SimpleNamespace(search=SimpleNamespace(mode="always_retrieve"))
    monkeypatch.setattr(answer, "model_and_config", lambda values: ("M", None, settings))
    monkeypatch.setattr(answer, "load_from", lambda *_: SimpleNamespace(check=lambda _: None))
    if prompt:
        flags = [*flags, "--instructions=i.json"]
    assert cli.main(["answer", "--model=M", "--input=popqa.jsonl", "--out=o.jsonl", *flags]) == 0
    assert prompt in asked[0].prompt and bool(prompt) == bool(asked[0].prompt)
    assert line in capsys.readouterr().err
