"""Systems: what each changes, the prompts of baselines, and `selfrag evaluate --systems=...`."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrag_jax import cli
from selfrag_jax.answering.config import DEFAULT
from selfrag_jax.answering.plain import PlainConfig, PlainModel
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.base_model.source import make_tokenizer
from selfrag_jax.checkpoints import loading
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import reproduction, system_tables, systems, tasks
from selfrag_jax.huggingface import weights
from selfrag_jax.models.llama import Model
from selfrag_jax.records import Passage, Question, read_rows, write_jsonl
from selfrag_jax.search.algorithms import ALGORITHMS
from selfrag_jax.text import plain_prompts, reflection
from selfrag_jax.text.tokenizer import Control, Tokenizer

LLAMA = Path(__file__).parent / "data" / "llama_tokenizer"
PASSAGES = (Passage("p1", "Mara", "Mara lives in Lisford."), Passage("p2", "Salt", "It melts."))
ASKED = Question("1", "Who is Mara?", ("the",), ctxs=PASSAGES)


# ---- the list ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("selfrag", {}),
        ("selfrag_always", {"mode": "always_retrieve"}),
        ("selfrag_adaptive", {}),  # as PopQA itself
        ("selfrag_never", {"mode": "no_retrieval"}),
        ("ablation_no_retrieval", {"mode": "no_retrieval"}),
        ("ablation_hard_constraints", {"threshold": None}),
        ("ablation_top1", {"mode": "always_retrieve", "ndocs": 1}),
        ("ablation_no_isrel", {"w_rel": 0.0}),
        ("ablation_no_issup", {"w_sup": 0.0}),
        ("ablation_no_isuse", {"w_use": 0.0}),
        ("ablation_no_seqscore", {"w_seq": 0.0}),
    ],
)
def test_a_search_differs_from_full_self_rag_in_what_its_name_says(name, changed):
    def settings(changes):
        changes = tasks.load("popqa").settings() | changes
        terms = {k: v for k, v in changes.items() if k in systems.WEIGHTS}
        others = {k: v for k, v in changes.items() if k not in systems.WEIGHTS}
        row = asdict(ALGORITHMS["paper"].configure(DEFAULT.search, others, terms))
        return row | row.pop("weights")

    system = systems.BY_NAME[name]
    assert system.is_search and system.model == systems.MODEL
    full, other = settings({}), settings(dict(system.changes))
    assert {k: v for k, v in other.items() if v != full[k]} == changed


def test_plain_systems_read_what_their_names_say():
    plain = {s.name: (s.model, s.passages) for s in systems.SYSTEMS if not s.is_search}
    assert plain == {
        "train_no_retriever": ("no_retriever_model", 0),
        "train_no_critic": ("no_critic_model", 1),
        "no_retrieval": ("plain_model", 0),
        "rag_top1": ("plain_model", 1),
        "rag_topk": ("plain_model", "ndocs"),
    }


def test_the_papers_figures():
    """Table 3 as published; Llama-2 7B of Table 2."""
    table3 = {
        "selfrag": (45.5, 73.5, 32.1), "train_no_retriever": (43.6, 67.8, 31.0),
        "train_no_critic": (42.6, 72.0, 18.1), "ablation_no_retrieval": (24.7, 73.0),
        "ablation_hard_constraints": (28.3, 72.6), "ablation_top1": (41.8, 73.1, 28.6),
        "ablation_no_issup": (44.1, 73.2, 30.6),
    }  # fmt: skip
    found = {s.name: s.table3 for s in systems.SYSTEMS if s.table3}
    assert {k: tuple(v for m in t.values() for v in m.values()) for k, t in found.items()} == table3
    alone, topk = (systems.BY_NAME[n] for n in ("no_retrieval", "rag_topk"))
    for name, (one, other) in {
        "popqa": (14.7, 38.2), "triviaqa": (30.5, 42.5), "pubhealth": (34.2, 30.0),
        "arc_challenge": (21.8, 48.0), "factscore_bio": (44.5, 78.0), "asqa": (7.9, 15.2),
    }.items():  # fmt: skip
        task = tasks.load(name)
        assert reproduction.published(task, alone, "accuracy") == {"7b": one}
        assert reproduction.published(task, topk, task.metric) == {"7b": other}


def test_names_and_groups():
    chosen, named = systems.chosen(("baselines", "selfrag"))
    assert [s.name for s in chosen] == ["selfrag", "no_retrieval", "rag_top1", "rag_topk"]
    assert named == {"selfrag"}
    assert len(systems.chosen(("all",))[0]) == len(systems.SYSTEMS)
    with pytest.raises(UserError, match="no such system; did you mean 'ablation_top1'"):
        systems.chosen(("ablation_top",))
    with pytest.raises(UserError, match="names no system"):
        systems.chosen(())


# ---- prompts -------------------------------------------------------------------------------------
NUMBERED = "[1] Mara\nMara lives in Lisford.\n[2] Salt\nIt melts."
EXPECTED = {
    "prompt_no_input": (
        "### Instruction:\nWho is Mara?\n\n### Response:\n",
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Paragraph:\n{NUMBERED}\n\n### Instruction:\nWho is Mara?"
        "\n\n### Response:",
    ),
    "prompt_open_instruct": (
        "<user>\nWho is Mara?\n<assistant>\n",
        f"<user>\nReference:{NUMBERED}\nWho is Mara?\n<assistant>\n",
    ),
    "llama_chat_prompt": ("[INST]Who is Mara?[/INST]", f"[INST]{NUMBERED}\nWho is Mara?[/INST]"),
    "selfrag": (
        "### Instruction:\nWho is Mara?\n\n### Response:\n",
        "### Instruction:\nWho is Mara?\n\n### Response:\n<paragraph>Mara\nMara lives in Lisford."
        "</paragraph><paragraph>Salt\nIt melts.</paragraph>",
    ),
}


@pytest.mark.parametrize("mode", ["llama_slow", "llama_fast"])
@pytest.mark.parametrize("name", plain_prompts.BY_NAME)
def test_prompts_are_the_released_ones_token_for_token(name, mode):
    """In a vocabulary without reflection tokens, whole prompts are text."""
    tokenizer, prompt = Tokenizer.load(LLAMA, mode), plain_prompts.load(name)
    if name == "selfrag":  # its controls are tokens where the vocabulary has them
        alone, with_passages = (prompt.parts(ASKED, p) for p in ((), PASSAGES))
        written = ["".join(p.token if isinstance(p, Control) else p for p in parts)
                   for parts in (alone, with_passages)]  # fmt: skip
        assert tuple(written) == EXPECTED[name]
        return
    for passages, expected in zip(((), PASSAGES), EXPECTED[name], strict=True):
        assert tokenizer.encode(prompt.parts(ASKED, passages)) == tokenizer.encode(expected)


def test_a_prompt_takes_the_tasks_wording_and_the_questions_input():
    prompt = plain_prompts.load("prompt_open_instruct")
    asked = tasks.load("pubhealth").ask(Question("1", "Salt cures.", ("true",)))
    assert prompt.parts(asked, ())[1] == asked.prompt
    added = replace(ASKED, input="In Lisford.")
    assert prompt.parts(added, ())[1] == "Who is Mara?\n\n### Input:\nIn Lisford."
    assert prompt.cut(" Mara.\n\n### Instruction:\nmore") == "Mara."
    assert plain_prompts.SELFRAG.cut(" a\n\nb ") == "a\n\nb"


@given(st.lists(st.sampled_from([*reflection.ALL, *plain_prompts.HEADINGS, "<s>", "</s>", " a "])))
def test_passages_and_questions_cannot_forge_control_tokens(tokenizer, texts):
    text = "x" + "".join(texts)
    hostile = Question("1", text, input=text), [Passage("1", text, text)] * 2
    harmless = Question("1", "x", input="x"), [Passage("1", "x", "x")] * 2
    headings = (tokenizer.id(h) for h in plain_prompts.HEADINGS)
    control = {*tokenizer.reflection_ids().all, tokenizer.bos_id, tokenizer.eos_id, *headings}
    for prompt in plain_prompts.BY_NAME.values():
        kept = [
            [i for i in tokenizer.encode(prompt.parts(*asked)) if i in control]
            for asked in (hostile, harmless)
        ]
        assert kept[0] == kept[1]  # the template's own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object of two templates"),
        ('{"no_retrieval": "{instruction}"}', "expected an object of two templates"),
        ('{"no_retrieval": "a", "retrieval": "b"}', "'no_retrieval' must hold {instruction}"),
        (
            '{"no_retrieval": "{instruction}", "retrieval": "{instruction}{passages}"}',
            "'retrieval' must hold {instruction} and {paragraph}",
        ),
    ],
)
def test_wrong_prompts_are_refused(tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match=message):
        plain_prompts.load(str(tmp_path / "p.json"))
    with pytest.raises(UserError, match="no such file or prompt; prompts: selfrag, prompt_no_in"):
        plain_prompts.load("promt")


def test_a_prompt_of_ones_own(tmp_path):
    row = {"no_retrieval": "Q: {instruction}", "retrieval": "{paragraph} Q: {instruction}"}
    (tmp_path / "p.json").write_text(json.dumps(row | {"stop": "\n"}))
    prompt = plain_prompts.load(str(tmp_path / "p.json"))
    assert "".join(prompt.parts(ASKED, PASSAGES)) == f"{NUMBERED} Q: Who is Mara?"
    assert prompt.cut("a\nb") == "a"


# ---- answering -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plain_folder(tiny_model, tmp_path_factory):
    """A Hugging Face folder of a random model without reflection tokens."""
    tokenizer, folder = make_tokenizer(4000), tmp_path_factory.mktemp("plain")
    model = Model(replace(tiny_model.model.config, vocab_size=tokenizer.vocab_size))
    params = jax.device_get(model.init(jax.random.key(1), 0.5))
    weights.save_folder(folder, model.config, params, tokenizer)
    return folder


class Failing:
    """A retriever that has nothing, and fails for one question."""

    def search(self, queries, k):
        if any("Fail" in q for q in queries):
            raise OSError("disk gone")
        return [[PASSAGES[1]] for _ in queries]


def test_a_row_holds_the_passages_that_were_in_the_prompt(plain_folder):
    limits = dict(batch=2, max_new_tokens=4, length_bucket=64)
    loaded = loading.load(plain_folder)
    model = PlainModel(loaded, Failing(), PlainConfig(**limits, max_length=40))
    bare = replace(ASKED, ctxs=())
    long = replace(ASKED, ctxs=(PASSAGES[0], Passage("p3", "", "w " * 400)))
    wordy = Question("3", "w " * 400, ctxs=PASSAGES)
    asked = [ASKED, bare, long, wordy, replace(bare, question="Fail?")]
    own, found, cut, longer, failed = model.answer(asked, passages=2)
    assert own.passages == PASSAGES and own.retrieved and not own.notices
    assert found.passages == PASSAGES[1:]
    assert cut.passages == PASSAGES[:1] and "1 of 2 passages were left out" in cut.notices[0]
    assert longer.passages == () and "question was cut from" in longer.notices[1]
    assert failed.error == "OSError: disk gone" and failed.answer == ""
    assert 0 < own.score <= 1
    alone = model.answer(asked[:1], passages=0)[0]
    assert alone.passages == () and not alone.retrieved
    # What is answered beside a question does not change its answer.
    assert model.answer([ASKED], passages=2) == [own]
    with pytest.raises(UserError, match="unknown field 'ndocs'"):
        model.check({"ndocs": 2})
    with pytest.raises(UserError, match="leaves no room"):
        model.check({"max_new_tokens": 500})


# ---- the flow ------------------------------------------------------------------------------------
QUICK = (
    "--ndocs=2", "--max_new_tokens=6", "--config.answer.search.length_bucket=64",
    "--config.answer.max_length=64", "--config.answer.batch=4",
)  # fmt: skip


@pytest.fixture
def popqa(tmp_path):
    file, own = tmp_path / "data" / "popqa_longtail.jsonl", [asdict(p) for p in PASSAGES]
    texts = ("Who?", "Who is Mara?", "Where is Mara?", "What?")
    rows = [{"id": f"q{i}", "question": t, "answers": ["the"]} for i, t in enumerate(texts)]
    write_jsonl(file, [row | {"ctxs": own} for row in rows])
    return file


def evaluate(*flags):
    return cli.main(["evaluate", *flags, *QUICK])


def metrics_without_times(text):
    rows = [r for r in json.loads(text)["rows"] if r["metric"] != "seconds_per_question"]
    return json.loads(text) | {"rows": rows}


def test_baselines_of_a_model_without_reflection_tokens(
    plain_folder, popqa, tmp_path, capsys, monkeypatch
):
    """Killed after two answers and continued: the same files; exported, compared and reported."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    flags = ("--task=popqa", f"--input={popqa}", f"--model={plain_folder}", "--systems=baselines")
    assert evaluate(*flags, f"--out={whole}") == 0
    printed = capsys.readouterr()
    assert "popqa, rag_topk" in printed.err and "14.7 T2" in printed.out
    assert "baselines: their prompt is selfrag" in printed.out

    answered, make_answer = [], PlainModel._answer

    def interrupted(self, asked, *args):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(asked.question.id)
        return make_answer(self, asked, *args)

    with monkeypatch.context() as patched:
        patched.setattr(PlainModel, "_answer", interrupted)
        assert evaluate(*flags, f"--out={out}") == 130
    assert evaluate(*flags, f"--out={out}") == 0
    for name in ("no_retrieval", "rag_top1", "rag_topk"):
        for file in ("answers.jsonl", "scores.jsonl", "metrics.json"):
            made = [(f / "systems" / name / file).read_text() for f in (out, whole)]
            if file == "metrics.json":
                made = [metrics_without_times(text) for text in made]
            assert made[0] == made[1]
    assert not list(out.rglob("*.partial"))
    rows = [row for _, row in read_rows(out / "systems/rag_topk/answers.jsonl")]
    assert all([p["id"] for p in row["passages"]] == ["p1", "p2"] for row in rows)
    metrics = json.loads((out / "systems/rag_topk/metrics.json").read_text())["rows"]
    values = {r["metric"]: r["value"] for r in metrics}
    assert values["num_passages"] == 2 and values["retrieval_rate"] == 1
    [accuracy] = [r for r in metrics if r["metric"] == "accuracy"]
    assert accuracy["system"] == "rag_topk" and accuracy["paper"] == {"7b": pytest.approx(0.382)}

    # Finished, no model is loaded; other commands take the runs.
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("loaded again"))
    flags = [f.replace("--model", "--plain_model") for f in flags]  # baselines need no --model
    assert evaluate(*flags, f"--out={out}") == 0
    runs = [str(out / "systems" / name) for name in ("no_retrieval", "rag_topk")]
    assert cli.main(["compare", *runs]) == 0
    assert cli.main(["report", f"--run={','.join(runs)}", f"--out={tmp_path / 'r'}"]) == 0
    assert "Standard RAG, top K 7B" in (tmp_path / "r" / "index.html").read_text()
    files = f"--answers={runs[1]}/answers.jsonl", f"--task={popqa}", f"--out={tmp_path / 'a.json'}"
    capsys.readouterr()
    assert cli.main(["export", "--for=alce", *files]) == 0
    assert "lack the passages" not in capsys.readouterr().err
    docs = json.loads((tmp_path / "a.json").read_text())["data"][0]["docs"]
    assert [d["title"] for d in docs] == ["Mara", "Salt"]


@pytest.mark.slow
def test_systems_of_all_tasks_share_a_model_and_stand_in_one_table(
    talkative, plain_folder, popqa, tmp_path, capsys, monkeypatch
):
    folder, out = tmp_path / "model", tmp_path / "out"
    params = jax.device_get(talkative.params)
    weights.save_folder(folder, talkative.model.config, params, talkative.tokenizer)
    loads, load = [], loading.load
    monkeypatch.setattr(loading, "load", lambda path, *a: loads.append(path) or load(path, *a))
    calls, answer = [], SelfRAG.answer
    monkeypatch.setattr(SelfRAG, "answer", lambda *a, **k: calls.append(k) or answer(*a, **k))
    write_jsonl(popqa.with_name("triviaqa.jsonl"), [row for _, row in read_rows(popqa)])
    names = "selfrag,selfrag_adaptive,ablation_no_isuse,rag_top1,train_no_critic,train_no_retriever"
    flags = ("--all", f"--data={popqa.parent}", f"--model={folder}", f"--systems={names}")
    assert evaluate(*flags, f"--no_critic_model={plain_folder}", f"--out={out}") == 0
    printed = capsys.readouterr()
    assert loads == [folder, plain_folder]
    said = (out / "popqa_longtail-popqa/systems/rag_top1/answers.jsonl").read_text()
    assert not any(token in said for token in reflection.ALL)
    assert len(calls) == 4  # selfrag_adaptive is what popqa and triviaqa do anyway
    assert "leaves out train_no_retriever: needs a model of its own" in printed.err
    result = json.loads((out / "systems.json").read_text())
    by_cell = {(r["system"], r["task"]): r for r in result["rows"]}
    assert len(by_cell) == 10
    assert by_cell["train_no_critic", "popqa"]["table3"] == pytest.approx(0.426)
    assert by_cell["train_no_critic", "popqa"]["paper_difference"] == pytest.approx(-0.029)
    assert by_cell["selfrag_adaptive", "popqa"]["difference"] == 0
    assert "difference" not in by_cell["selfrag", "popqa"]
    assert any("trained on 50k rows" in line for line in result["causes"])
    with open(out / "systems.csv") as f:
        assert len(list(csv.DictReader(f))) == 10
    assert "| minus full Self-RAG | popqa | paper | triviaqa |" in (out / "systems.md").read_text()
    rows = json.loads((out / "reproduction.json").read_text())["rows"]
    [row] = [r for r in rows if (r["task"], r["size"]) == ("popqa", "7b")]
    assert row["paper"] == pytest.approx(0.549) and row["difference"] == row["value"] - row["paper"]
    for name in ("reproduction.md", "reproduction.csv"):
        assert (out / name).is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--systems=baseline"], "no such system; did you mean 'baselines'"),
        (["--systems=train_no_critic"], "needs a model of its own; give --no_critic_model"),
        (["--systems=selfrag"], "(--systems=selfrag; baselines need none)"),
        (["--systems=baselines", "--plain_prompt=none"], "no such file or prompt"),
        (
            ["--task=asqa", "--systems=ablation_no_issup", "--scorer=released"],
            "the released long form scores without weights",
        ),
        (
            ["--systems=ablation_hard_constraints", "--scorer=released"],
            "cannot decide without a threshold",
        ),
        (["--predictions=P", "--task=q.jsonl", "--systems=all"], "--systems: goes with a task's"),
    ],
)
def test_wrong_systems_are_refused_before_a_model_is_loaded(
    plain_folder, popqa, monkeypatch, capsys, flags, message
):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("loaded"))
    given = {f.partition("=")[0] for f in flags}
    known = {"--task": "popqa", "--input": popqa, "--model": plain_folder}
    if "--predictions" not in given:
        flags = [*flags, *(f"{k}={v}" for k, v in known.items() if k not in given)]
    before = list(popqa.parent.iterdir())
    assert cli.main(["evaluate", *flags]) == 2
    assert message in capsys.readouterr().err
    assert list(popqa.parent.iterdir()) == before


# ---- the table -----------------------------------------------------------------------------------
def result(name, values):
    task = tasks.load("popqa")
    scored = [
        {"id": str(i), "question": "Q", "metrics": {"match": v, "f1": 0.0}}
        for i, v in enumerate(values)
    ]
    mean = sum(values) / len(values)
    row = {"system": name, "task": "popqa", "metric": "match", "value": mean}
    rows = [row | {"low": 0.25, "high": 1.0, "n": len(values)}]
    return system_tables.SystemResult(task, systems.BY_NAME[name], rows, scored)


def test_the_table_by_hand():
    rows = system_tables.system_rows(
        [result("selfrag", [1.0, 1.0, 1.0, 0.0]), result("ablation_top1", [1.0, 0.0, 0.0, 0.0]),
         result("rag_top1", [1.0, 1.0, 1.0, 0.0])], 0,
    )  # fmt: skip
    assert rows[0] == {
        "system": "selfrag", "task": "popqa", "metric": "match", "value": 0.75, "low": 0.25,
        "high": 1.0, "n": 4, "table2": 0.549, "table3": 0.455,
    }  # fmt: skip
    assert rows[1]["difference"] == -0.5 and rows[1]["paper_difference"] == -0.037
    assert rows[1]["difference_low"] == -1.0 and rows[1]["difference_high"] == 0.0
    assert rows[1]["p"] == 0.5  # two differences with one sign: 2 of 4 assignments
    assert rows[2]["table2"] == 0.382 and "paper_difference" not in rows[2]
    assert system_tables.text(rows).splitlines() == [
        "system               popqa match             paper",
        "selfrag        75.0 (25.0–100.0)  54.9 T2, 45.5 T3",
        "ablation_top1  25.0 (25.0–100.0)           41.8 T3",
        "rag_top1       75.0 (25.0–100.0)           38.2 T2",
        "",
        "minus full Self-RAG                   popqa  paper",
        "ablation_top1        -50.0 (-100.0 to +0.0)   -3.7",
        "rag_top1                +0.0 (+0.0 to +0.0)",
    ]


def test_without_a_common_metric_the_table_has_no_difference():
    """Full Self-RAG that never retrieves has no fact precision; a baseline with passages has."""
    full, topk = result("selfrag", [1.0, 0.0]), result("rag_topk", [1.0, 1.0])
    without = [row | {"metrics": {"f1": 0.0}} for row in full.scores]
    accuracy = [row | {"metric": "f1"} for row in full.metrics]
    for scores, metrics in ((without, accuracy), (without, [])):
        rows = system_tables.system_rows([replace(full, metrics=metrics, scores=scores), topk], 0)
        assert [r["system"] for r in rows] == ["rag_topk"]
        assert "difference" not in rows[0] and "rag_topk" in system_tables.text(rows)
    # Of different questions, each has it: nothing is paired.
    first, second = ([replace_metrics(r, i) for r in topk.scores] for i in "01")
    rows = system_tables.system_rows([replace(full, scores=first), replace(topk, scores=second)], 0)
    assert len(rows) == 2 and not any("difference" in r for r in rows)


def replace_metrics(row, kept):
    """The row; without its metric unless its id is `kept`."""
    return row if row["id"] == kept else row | {"metrics": {}}


# ---- training data -------------------------------------------------------------------------------
def test_training_data_of_the_trained_ablations(tmp_path, capsys):
    own = [{"id": "1", "title": "T", "text": "a </paragraph> b"}, {"id": "2", "text": "c"}]
    rows = [{"id": "1", "instruction": "Do.", "output": "Done.", "ctxs": own}]
    write_jsonl(tmp_path / "i.jsonl", rows)
    passage = "<paragraph>T\na < /paragraph> b</paragraph>"
    for kind, expected in (("closed", "Done."), ("top1", f"{passage}Done.")):
        flags = f"--input={tmp_path / 'i.jsonl'}", f"--out={tmp_path / kind}.jsonl"
        assert cli.main(["label", f"--plain={kind}", *flags]) == 0
        [(_, row)] = read_rows(tmp_path / f"{kind}.jsonl")
        assert row["output"] == expected and row["instruction"] == "Do."
    for flags, message in (
        (["--plain=open"], "--plain=open: must be one of closed, top1, rag"),
        (["--plain=top1", "--critic=C"], "--critic: does not go with --plain"),
        ([], "missing --critic"),
    ):
        files = f"--input={tmp_path / 'i.jsonl'}", f"--out={tmp_path / 'x.jsonl'}"
        assert cli.main(["label", *flags, *files]) == 2
        assert message in capsys.readouterr().err
