"""Who decides whether an instruction needs retrieval: critic, teacher, or the generator's base."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrag_jax import artifacts, cli, config
from selfrag_jax.commands import label as label_command
from selfrag_jax.commands import retrieve_labels
from selfrag_jax.critic import needs, self_knowledge
from selfrag_jax.critic.critic import Critic, CriticConfig
from selfrag_jax.critic.labelling import LabelConfig, label_rows
from selfrag_jax.critic.needs import NeedsConfig
from selfrag_jax.critic.self_knowledge import SelfModel
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.records import CriticExample, Instruction, Passage, read_rows, write_jsonl
from selfrag_jax.text import prompts
from selfrag_jax.text.reflection import CONTINUE, NO_RETRIEVAL, RETRIEVAL

CONFIG = NeedsConfig(
    seed=0, shots=0, max_new_tokens=8, short_tokens=4, passages=2, dev_share=1.0, batch=4,
    length_bucket=16, max_length=96,
)  # fmt: skip
LABEL = LabelConfig(
    seed=0, critic=CriticConfig(8, 32, True), passages=2, variants=1, best_rate=1.0, chunk=2,
    needs=CONFIG,
)  # fmt: skip
PASSAGES = (Passage("p", "Title", "Text."), Passage("q", "Other", "More text."))
LONG = "one two three four five six."


def row(i, output, instruction="", **fields):
    fields = {"ctxs": PASSAGES} | fields
    return Instruction(f"r{i}", instruction or f"Question {i}?", output, **fields)


class FakeBase:
    """Knows `answers` by id, and `gain` of each id; counts words as tokens."""

    def __init__(self, answers=None, gain=None):
        self.answers, self.gain = answers or {}, gain or {}
        self.asked, self.shown = [], {}

    def num_tokens(self, text):
        return len(text.split())

    def answer(self, rows, demonstrations):
        self.asked += [r.id for r in rows]
        self.shown |= {r.id: d for r, d in zip(rows, demonstrations, strict=True)}
        return [(self.answers.get(r.id, "no idea"), 0.5) for r in rows]

    def gains(self, rows):
        self.asked += [f"{r.id} gain" for r in rows]
        return [self.gain[r.id] for r in rows]


# ---- right or wrong ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("It is Paris, in France.", "paris", True),
        ("Parisian", "Paris", False),  # whole words only
        ("The Beatles!", "Beatles", True),
        ("Ann Lee was born in Rome.", "Ann Lee was born in Rome.", True),
        ("Rome", "Ann Lee was born in Rome.", False),  # a sentence must be there as a whole
        ("中国的首都是北京。", "北京", True),
        ("", "Paris", False),
        ("A", "A.", True),  # a choice, although SQuAD's normalising drops it
        ("It is a choice.", "A.", False),
        ("anything", "?!", False),
    ],
)
def test_an_answer_is_right_if_it_contains_the_output(answer, gold, right):
    assert needs.is_right(answer, gold) == right


# ---- the threshold -------------------------------------------------------------------------------
DEV = st.lists(
    st.tuples(st.integers(-6, 6).map(lambda n: n / 4), st.booleans()), min_size=2, max_size=20
).filter(lambda dev: len({wrong for _, wrong in dev}) == 2)


@given(DEV)
def test_no_threshold_is_better_than_the_calibrated_one(dev):
    gains, wrong = zip(*dev, strict=True)
    threshold, accuracy = needs.best_threshold(gains, wrong)
    assert needs.balanced_accuracy(gains, wrong, threshold) == pytest.approx(accuracy)
    tried = {t: needs.balanced_accuracy(gains, wrong, t) for t in np.arange(-2, 2, 0.125)}
    assert accuracy == pytest.approx(max(tried.values()))
    lowest = min(t for t, a in tried.items() if a > accuracy - 1e-9)
    same = [g > threshold for g in gains] == [g > lowest for g in gains]
    assert same  # of equally good ones, that which retrieves most


def test_neighbouring_floats_are_told_apart():
    low = 1.0
    high = float(np.nextafter(low, 2))
    threshold, accuracy = needs.best_threshold([high, low], [True, False])
    assert accuracy == 1 and not low > threshold and high > threshold


# ---- decisions -----------------------------------------------------------------------------------
def decide(base, rows, tmp_path, chunk=2, **changes):
    return needs.decide(base, rows, replace(CONFIG, **changes), tmp_path / "parts", chunk)


def test_short_outputs_are_compared_and_long_ones_weighed(tmp_path):
    rows = [
        row(0, "Paris"), row(1, "Rome"), row(2, LONG), row(3, LONG + " x"),
        row(4, "  "), row(5, LONG, ctxs=()), row(6, "Bern"),
    ]  # fmt: skip
    base = FakeBase(
        answers={"r0": "It is Paris.", "r1": "Oslo", "r6": "Bern"},
        gain={"r0": 0.1, "r1": 0.7, "r6": 0.2, "r2": 0.5, "r3": 0.3},
    )
    decisions, calibration = decide(base, rows, tmp_path)
    assert [(d.id, d.token, d.reason) for d in decisions] == [
        ("r0", NO_RETRIEVAL, "right"),
        ("r1", RETRIEVAL, "wrong"),
        ("r2", RETRIEVAL, "gain"),
        ("r3", NO_RETRIEVAL, "gain"),
        ("r4", NO_RETRIEVAL, "empty"),
        ("r5", NO_RETRIEVAL, "no passages"),
        ("r6", NO_RETRIEVAL, "right"),
    ]
    assert (decisions[0].answer, decisions[0].value) == ("It is Paris.", 0.5)
    assert decisions[2].value == 0.5
    assert calibration.threshold == pytest.approx(0.45)  # between 0.2 and 0.7
    assert (calibration.balanced_accuracy, calibration.rows, calibration.wrong) == (1.0, 3, 1)


def test_without_long_outputs_nothing_is_weighed(tmp_path):
    base = FakeBase()
    _, calibration = decide(base, [row(0, "Paris"), row(1, "Rome")], tmp_path)
    assert calibration is None and base.asked == ["r0", "r1"]


@pytest.mark.parametrize("answers", [{}, {"r0": "Paris", "r1": "Rome"}])
def test_without_both_kinds_of_dev_rows_a_threshold_must_be_given(tmp_path, answers):
    rows = [row(0, "Paris"), row(1, "Rome"), row(2, LONG)]
    base = FakeBase(answers, {"r0": 1.0, "r1": 1.0, "r2": 0.3})
    with pytest.raises(UserError, match="1 outputs have more .* Give --need_threshold"):
        decide(base, rows, tmp_path)
    asked = len(base.asked)
    decisions, calibration = decide(base, rows, tmp_path, threshold=0.2)
    assert decisions[2].token == RETRIEVAL and calibration.balanced_accuracy is None
    assert decide(base, rows, tmp_path, threshold=0.4)[0][2].token == NO_RETRIEVAL
    assert len(base.asked) == asked  # the answers and gains were kept


def test_the_dev_share_is_drawn_by_seed(tmp_path):
    rows = [row(i, "Paris") for i in range(60)] + [row(60, LONG)]
    answers, gain = {f"r{i}": "Paris" for i in range(30)}, {f"r{i}": float(i) for i in range(61)}

    def weighed(seed, name):
        base = FakeBase(answers, gain)
        decide(base, rows, tmp_path / name, dev_share=0.4, seed=seed)
        return {a for a in base.asked if a.endswith("gain")}

    first = weighed(0, "a")
    assert first == weighed(0, "b") != weighed(1, "c")
    assert 10 < len(first) < 45


def test_likelihoods_that_are_not_finite_are_no_decision(tmp_path):
    rows = [row(0, "Paris"), row(1, LONG)]
    base = FakeBase(gain={"r0": 0.0, "r1": float("nan")})
    with pytest.raises(StageFailed, match="not finite for row 'r1'"):
        decide(base, rows, tmp_path)


@pytest.mark.parametrize("done", range(5))
def test_a_killed_run_asks_nothing_twice(tmp_path, done):
    rows = [row(i, "Paris") for i in range(5)] + [row(5, LONG)]
    answers, gain = {"r0": "Paris"}, {f"r{i}": float(i) for i in range(6)}

    class Killed(FakeBase):
        calls = 0

        def count(self):
            self.calls += 1
            if self.calls > done:
                raise KeyboardInterrupt

        def answer(self, *args):
            self.count()
            return super().answer(*args)

        def gains(self, *args):
            self.count()
            return super().gains(*args)

    first, second = Killed(answers, gain), FakeBase(answers, gain)
    with pytest.raises(KeyboardInterrupt):
        decide(first, rows, tmp_path)
    found = decide(second, rows, tmp_path)
    assert sorted(first.asked + second.asked) == sorted(set(first.asked + second.asked))
    assert found == decide(FakeBase(answers, gain), rows, tmp_path / "whole")


# ---- demonstrations ------------------------------------------------------------------------------
@given(st.integers(0, 5), st.integers(0, 9))
def test_demonstrations_never_tell_the_answer(shots, i):
    pool = [row(n, ("A.", "Rome", "Oslo", "Bern")[n % 4], f"Question {n // 2}?") for n in range(10)]
    drawn = needs.demonstrations(pool[i], pool, replace(CONFIG, shots=shots))
    assert drawn == needs.demonstrations(pool[i], pool, replace(CONFIG, shots=shots))
    assert len(drawn) == len({d.instruction for d in drawn}) <= shots
    assert bool(drawn) == bool(shots)
    for d in drawn:
        assert d.instruction != pool[i].instruction and d.output != pool[i].output


def test_demonstrations_reach_the_base(tmp_path):
    rows = [row(i, f"City{i}") for i in range(4)]
    base = FakeBase()
    decide(base, rows, tmp_path, shots=2)
    assert all(len(d) == 2 and r not in [x.id for x in d] for r, d in base.shown.items())


# ---- the base model ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def next_token(tiny_model):
    """A function of token ids: log-probabilities of the next token after each of them."""
    model = tiny_model.model

    @jax.jit
    def run(params, tokens):
        hidden, _ = model.hidden(params, tokens, jnp.arange(tokens.size)[None], None)
        return jax.nn.log_softmax(model.logits(params, hidden))[0]

    def log_probs(ids):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(run(tiny_model.params, padded))[: len(ids)]

    return log_probs


def test_gains_equal_likelihoods_computed_one_by_one(tiny_model, next_token):
    rows = [row(0, "Born in Rome."), row(1, "A b c.", "Tell me " * 60), row(2, "x " * 80)]
    tokenizer = tiny_model.tokenizer

    def likelihood(r, passage):
        output = tokenizer.encode(r.output)[:48]
        front = [tokenizer.bos_id, *tokenizer.encode(prompts.instruction(r.instruction))]
        if len(front) + len(output) > 96:
            front = [front[0], *front[len(front) + len(output) - 96 + 1 :]]
        room = 96 - len(front) - len(output)
        if passage and room > 1:
            evidence = tokenizer.encode(prompts.passage(passage))
            cut = len(evidence) > room
            front += [*evidence[: room - 1], evidence[-1]] if cut else evidence
        found = next_token([*front, *output])[len(front) - 1 :]
        return np.mean([found[k, t] for k, t in enumerate(output)])

    expected = [max(likelihood(r, p) for p in PASSAGES) - likelihood(r, None) for r in rows]
    found = SelfModel(tiny_model, CONFIG).gains(rows)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0] != 0 == found[1]  # where the instruction fills the length, no passage fits


def test_answers_are_the_most_likely_tokens(tiny_model, next_token, monkeypatch):
    monkeypatch.setattr(self_knowledge, "_END_OF_ANSWER", re.compile("(?!)"))  # the whole answer
    base, tokenizer = SelfModel(tiny_model, CONFIG), tiny_model.tokenizer
    question, shown = row(0, "Rome", "Where?"), row(1, "Oslo", "Who?")
    prompts_ = [base._question(question, []), base._question(question, [shown])]
    assert prompts_[1][-len(prompts_[0]) + 1 :] == prompts_[0][1:] != prompts_[1][1:]
    found = base.answer([question, question], [[], [shown]])
    for (text, p), ids in zip(found, prompts_, strict=True):
        start, log_probs = len(ids), []
        for _ in range(CONFIG.max_new_tokens):
            after = next_token(ids)[-1]
            ids, log_probs = [*ids, int(after.argmax())], [*log_probs, after.max()]
            if ids[-1] == tokenizer.eos_id:
                break
        whole = tokenizer.decode([i for i in ids[start:] if i != tokenizer.eos_id]).strip()
        assert text == whole != ""
        assert p == pytest.approx(np.exp(np.mean(log_probs)), rel=1e-4)


def test_prompts_fit_and_text_forges_no_control(tiny_model):
    base = SelfModel(tiny_model, CONFIG)
    long_one = row(1, "Oslo " * 40, "Who?")
    question = row(0, "Rome", "Say [Retrieval] " * 3)
    assert base._question(question, [long_one]) == base._question(question, [])
    assert len(base._question(row(0, "Rome", "Where? " * 300), [])) == 96 - 8
    ids = tiny_model.tokenizer.reflection_ids()
    front, output = base._with_output(replace(question, output="[Fully supported]"), PASSAGES[0])
    assert not set(ids.retrieve + ids.issup) & {*front, *output}


def test_an_output_of_megabytes_is_long_and_cut(tiny_model, tmp_path):
    class Counting(FakeBase):
        def num_tokens(self, text):
            assert len(text) < 10_000
            return super().num_tokens(text)

    huge = row(0, "x" * 5_000_000)
    base = Counting(gain={"r0": 1.0})
    [decision], _ = decide(base, [huge], tmp_path, threshold=0.0)
    assert decision.reason == "gain"
    front, output = SelfModel(tiny_model, CONFIG)._with_output(huge, PASSAGES[0])
    assert len(output) == 48 and len(front) + len(output) <= 96


def test_an_answer_ends_before_the_next_heading(tiny_model, monkeypatch):
    monkeypatch.setattr(self_knowledge, "text_of", lambda *_: "Rome\n\n### Instruction:\nWhere?")
    assert SelfModel(tiny_model, CONFIG).answer([row(0, "Rome")], [[]])[0][0] == "Rome"


# ---- the teacher ---------------------------------------------------------------------------------
def critic_data(tmp_path, *examples):
    write_jsonl(tmp_path / "critic_data.jsonl", examples)
    return tmp_path / "critic_data.jsonl"


def retrieve(instruction, token, **fields):
    return CriticExample("retrieve", instruction, token, **fields)


def test_a_teachers_labels_are_found_by_id_or_instruction(tmp_path):
    rows = [
        row(0, "x", "Same?"),
        row(1, "x", "Same?"),
        row(2, "x", "Who?", input="Ann"),
        row(3, "x"),
    ]
    file = critic_data(
        tmp_path,
        retrieve("Same?", RETRIEVAL, id="r0"),
        retrieve("Same?", NO_RETRIEVAL, id="r1"),
        retrieve("Who? Ann", NO_RETRIEVAL),
        retrieve("Question 3?", NO_RETRIEVAL, id="of another row"),
        retrieve("Another?", RETRIEVAL, id="r3"),  # the same id by chance
        retrieve("Same?", CONTINUE, id="r0", preceding="Before.", evidence=PASSAGES[0]),
        CriticExample("isrel", "Same?", "[Relevant]", evidence=PASSAGES[0], id="r0"),
    )
    assert needs.teacher_needs(file, rows) == {
        "r0": RETRIEVAL, "r1": NO_RETRIEVAL, "r2": NO_RETRIEVAL, "r3": NO_RETRIEVAL
    }  # fmt: skip


def test_missing_labels_are_counted(tmp_path):
    file = critic_data(tmp_path, retrieve("Question 0?", RETRIEVAL))
    with pytest.raises(UserError, match=r"label for 2 of 3 .* id 'r1'.*`selfrag collect --groups"):
        needs.teacher_needs(file, [row(i, "x") for i in range(3)])


def test_without_evidence_there_is_nothing_to_continue_with(tmp_path):
    file = critic_data(tmp_path, retrieve("Question 0?", CONTINUE))
    assert needs.teacher_needs(file, [row(0, "x")]) == {"r0": RETRIEVAL}


def test_a_label_of_another_group_is_refused(tmp_path):
    file = critic_data(tmp_path, retrieve("Question 0?", "[Relevant]"))
    with pytest.raises(UserError, match=r"critic_data.jsonl:1: output '\[Relevant\]' must be"):
        needs.teacher_needs(file, [row(0, "x")])


@pytest.mark.parametrize("other", [dict(instruction="Else?"), dict(output="Else")])
def test_two_rows_with_one_id_are_refused(other):
    rows = [row(0, "x", "Same?"), replace(row(0, "x", "Same?"), **other)]
    needs.check_ids([rows[0], rows[0]])
    with pytest.raises(UserError, match="'r0' stands at two different rows"):
        needs.check_ids(rows)


# ---- labelling -----------------------------------------------------------------------------------
def test_decisions_replace_those_of_the_critic(tiny_model):
    rows = [row(i, "Born in Rome. It is so.") for i in range(3)]
    critic = Critic(tiny_model, LABEL.critic)
    own = label_rows(critic, rows, LABEL)
    for token in (RETRIEVAL, NO_RETRIEVAL):
        labelled = label_rows(critic, rows, LABEL, {"r0": token, "r1": token})
        assert all(e.output.startswith(token) for e in labelled[:2])
        assert labelled[2] == own[2]
    bare = [replace(r, ctxs=()) for r in rows]
    labelled = label_rows(critic, bare, LABEL, dict.fromkeys(["r0", "r1", "r2"], RETRIEVAL))
    assert all(e.output.startswith(NO_RETRIEVAL) for e in labelled)


@pytest.fixture
def files(tmp_path, monkeypatch, tiny_model):
    """A folder with instructions, a critic and a base that are both the tiny model."""
    rows = [row(i, "Born in Rome." if i % 2 else LONG * 4) for i in range(5)]
    write_jsonl(tmp_path / "input.jsonl", rows)
    for name, role in (("critic", "critic"), ("base", "generator")):
        (tmp_path / name).mkdir()
        artifacts.write_manifest(tmp_path / name, "train", {"role": role}, {}, {})
    monkeypatch.setattr("selfrag_jax.checkpoints.loading.load", lambda *_: tiny_model)
    data = [retrieve(r.instruction, RETRIEVAL, id=r.id) for r in rows]
    critic_data(tmp_path, *data)
    return tmp_path


def label(folder, *flags, out="out.jsonl"):
    fixed = [f"--critic={folder}/critic", f"--input={folder}/input.jsonl", f"--out={folder}/{out}"]
    small = ["--config=tiny:smoke", "--config.label.chunk=2", "--config.label.needs.short_tokens=6"]
    return cli.main(["label", *fixed, *small, *flags])


SELF = ("--retrieve_labels=self", "--self_model={}/base", "--need_threshold=-9")


def first_tokens(file):
    return {r["output"].split("]")[0] + "]" for _, r in read_rows(file)}


def test_the_three_choices_label_a_file(files, capsys, monkeypatch):
    flags = [f.format(files) for f in SELF]
    assert label(files, out="critic.jsonl") == 0
    manifest = json.loads((files / "critic.jsonl.manifest.json").read_text())
    assert not {"retrieve_labels", "needs"} & set(manifest["config"])
    teacher = f"--teacher_labels={files}/critic_data.jsonl"
    assert label(files, "--retrieve_labels=teacher", teacher, out="teacher.jsonl") == 0
    assert first_tokens(files / "teacher.jsonl") == {RETRIEVAL}

    assert label(files, *flags, out="self.jsonl") == 0
    decided = [r for _, r in read_rows(files / "self.jsonl.needs.jsonl")]
    assert [d["id"] for d in decided] == [f"r{i}" for i in range(5)]
    assert [d["reason"] for d in decided] == ["gain", "wrong", "gain", "wrong", "gain"]
    assert {d["token"] for d in decided} == {RETRIEVAL}  # no gain is below -9
    assert first_tokens(files / "self.jsonl") == {RETRIEVAL}
    err = capsys.readouterr().err
    assert "retrieval is needed for 5 of 5 rows (0 short outputs known, 2 not, 3 long)" in err
    assert "threshold -9" in err
    assert not list(files.glob("*.parts"))

    # Finished, nothing is asked again.
    monkeypatch.setattr("selfrag_jax.checkpoints.loading.load", None)
    before = {f: f.read_bytes() for f in files.glob("*.jsonl")}
    assert label(files, *flags, out="self.jsonl") == 0
    assert {f: f.read_bytes() for f in files.glob("*.jsonl")} == before


def test_a_threshold_given_later_continues_with_the_answers(files, capsys, monkeypatch):
    *flags, threshold = [f.format(files) for f in SELF]
    assert label(files, *flags) == 2
    assert "Give --need_threshold" in capsys.readouterr().err
    monkeypatch.setattr(SelfModel, "answer", None)
    monkeypatch.setattr(SelfModel, "gains", None)
    assert label(files, *flags, threshold) == 0


def test_other_decisions_do_not_pass_for_finished_data(files, capsys):
    teacher = ("--retrieve_labels=teacher", f"--teacher_labels={files}/critic_data.jsonl")
    assert label(files, *teacher) == 0
    rows = [row(i, "Rome") for i in range(5)]
    critic_data(files, *[retrieve(r.instruction, NO_RETRIEVAL, id=r.id) for r in rows])
    assert label(files, *teacher) == 2
    assert "needs: " in capsys.readouterr().err
    assert label(files) == 2


def test_only_label_knows_who_decides_besides_the_critic(files):
    with pytest.raises(UserError, match="'self' wants decisions, and none were given"):
        label_command.label_file(
            files / "critic", files / "input.jsonl", replace(LABEL, retrieve_labels="self"),
            files / "x.jsonl",
        )  # fmt: skip
    with pytest.raises(UserError, match="needs: 'maybe' of row 'r0' must be"):
        retrieve_labels.label_settings(LABEL, {"r0": "maybe"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--retrieve_labels=techer"], "did you mean 'teacher'?"),
        (["--retrieve_labels=self"], "give --self_model"),
        (["--retrieve_labels=teacher"], "give --teacher_labels"),
        (["--teacher_labels=x"], "--teacher_labels is for --retrieve_labels=teacher"),
        (
            ["--retrieve_labels=teacher", "--teacher_labels=x", "--self_model=y"],
            "--self_model is",
        ),
        (["--retrieve_labels=teacher", "--teacher_labels=no.jsonl"], "no.jsonl: no such file"),
        (["--retrieve_labels=self", "--self_model=nowhere/x/y"], "nowhere/x/y"),
        (["--retrieve_labels=self", "--self_model=x", "--config.label.needs.batch=0"], "batch=0"),
        (["--config.label.needs.shots=-1"], "shots=-1"),
        (["--config.label.needs.short_tokens=-1"], "short_tokens=-1"),
        (["--config.label.needs.dev_share=2"], "dev_share=2.0 must be between 0 and 1"),
        (["--config.label.needs.max_length=8"], "leaves no room"),
    ],
)
def test_wrong_input_is_met_with_a_remedy(files, capsys, flags, message):
    assert label(files, *flags) == 2
    assert message in capsys.readouterr().err
    assert not (files / "out.jsonl").exists()


def test_a_config_without_the_section_names_one_that_has_it():
    values = {
        "retrieve_labels": "self", "self_model": "x", "teacher_labels": None, "need_threshold": None
    }  # fmt: skip
    with pytest.raises(UserError, match="critic_7b"):
        retrieve_labels.with_flags(replace(LABEL, needs=None), values)


def test_the_config_for_large_models_labels():
    section = config.load("critic_7b").label
    built = config.build(LabelConfig, section, "label")
    assert built.needs is not None and built.retrieve_labels == "critic"
    assert not built.critic.brief  # as critic_7b trains it


@pytest.mark.slow
def test_the_choices_are_compared_in_a_finished_quickstart(quickstart, tmp_path):
    """Run twice, the benchmark prints the same tables and trains nothing again."""
    shutil.copytree(quickstart[0], tmp_path / "W")
    script = Path(__file__).parents[1] / "launch" / "benchmarks" / "retrieve_labels.py"
    command = [sys.executable, script, tmp_path / "W", "--config=tiny:smoke"]
    command += ["--split=question", "--tasks=long_tail,well_known,no_need"]
    first, again = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    labels, answers = first.stdout.split("\n\nAdaptive mode")
    for table in (labels, answers):
        assert [name for name in needs.CHOICES if f"\n| {name} |" in table] == list(needs.CHOICES)
    assert again.stdout == first.stdout and "steps" not in again.stderr
    # Each half is judged by the model that was trained on the other.
    folder = tmp_path / "W" / "retrieve_labels" / "self-question"
    halves = [{r["instruction"] for _, r in read_rows(folder / f"half-{i}.jsonl")} for i in (0, 1)]
    assert not halves[0] & halves[1]
    for i in (0, 1):
        trained = [r["instruction"] for _, r in read_rows(folder / f"base-half-{1 - i}.jsonl")]
        assert set(trained) == halves[1 - i] and len(trained) == 2 * len(
            list(read_rows(folder / f"half-{1 - i}.jsonl"))
        )
