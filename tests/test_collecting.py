"""Which queries are asked, which answers become critic data, and models that run here."""

import json
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfrag_jax import cli, config
from selfrag_jax.critic import collecting
from selfrag_jax.critic.collecting import CollectConfig
from selfrag_jax.critic.teachers.prompting import Templates
from selfrag_jax.critic.teachers.settings import LocalConfig
from selfrag_jax.critic.teachers.teacher import LABELS, Request, Verdict, kind_of
from selfrag_jax.errors import UserError
from selfrag_jax.records import CriticExample, Instruction, Passage, read_rows, write_jsonl
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery

SHARES = tuple((group, 1.0) for group in reflection.GROUPS)
CONFIG = CollectConfig(0, "openai", 0.0, SHARES, 5)
PASSAGES = tuple(Passage(str(i), f"T{i}", f"Text {i}.") for i in range(4))


def instruction(i, dataset="a", output="One. Two. Three.", ctxs=PASSAGES):
    return Instruction(f"{dataset}{i}", f"Question {i}?", output, "", dataset, ctxs)


# ---- which queries -------------------------------------------------------------------------------
def test_per_group_draws_evenly_from_datasets_and_kinds():
    rows = [instruction(i, "large") for i in range(300)]
    rows += [instruction(i, "small", ctxs=()) for i in range(10)]
    rows += [instruction(i, "middle") for i in range(60)]
    per_group = (("retrieve", 100), ("isrel", 60), ("issup", 10_000), ("isuse", 63))
    chosen = collecting.choose_requests(rows, replace(CONFIG, per_group=per_group))
    dataset = {row.id: row.dataset_name for row in rows}
    counts = Counter((kind_of(r.query), dataset[r.row_id]) for r in chosen)
    assert counts == {
        ("retrieve", "small"): 10, ("retrieve", "middle"): 23, ("retrieve", "large"): 22,
        ("retrieve_next", "middle"): 23, ("retrieve_next", "large"): 22,
        ("isrel", "middle"): 30, ("isrel", "large"): 30,
        ("issup", "middle"): 180, ("issup", "large"): 900,  # all that there are
        ("isuse", "small"): 10, ("isuse", "middle"): 27, ("isuse", "large"): 26,
    }  # fmt: skip
    assert len({(r.query, r.row_id) for r in chosen}) == len(chosen)
    order = [row.id for row in rows]
    at = [order.index(r.row_id) for r in chosen]
    assert at == sorted(at)
    again = collecting.choose_requests(rows, replace(CONFIG, per_group=per_group))
    other = collecting.choose_requests(rows, replace(CONFIG, per_group=per_group, seed=1))
    assert chosen == again != other


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(0, 100))
def test_spreading_takes_all_that_is_wanted_or_there(sizes, wanted):
    strata = {("k", str(i)): [(i, j) for j in range(n)] for i, n in enumerate(sizes)}
    drawn = collecting.spread_evenly(strata, wanted, random.Random(0))
    assert len(drawn) == len(set(drawn)) == min(wanted, sum(sizes))
    taken = [sum(i == k for i, _ in drawn) for k in range(len(sizes))]
    for n, size in zip(taken, sizes, strict=True):
        assert n == size or n >= max(taken) - 1


def test_some_groups_alone_are_asked_about():
    row, both = instruction(0), {"retrieve", "isuse"}
    for config_of_all in (CONFIG, replace(CONFIG, per_group=(("isrel", 5), ("isuse", 5)))):
        chosen = collecting.choose_requests([row], config_of_all.only(["retrieve", "isuse"]))
        expected = both if not config_of_all.per_group else {"isuse"}
        assert {r.query.group for r in chosen} == expected
    with pytest.raises(UserError, match="no group 'use'"):
        CONFIG.only(["use"])


def test_an_output_of_five_megabytes_is_quick_and_is_never_cut():
    output = "The town was founded by Ada in that year. " * 120_000
    row = instruction(0, output=output, ctxs=PASSAGES[:1])
    start = time.process_time()
    queries = list(collecting.critique_queries(row, CONFIG, random.Random(0)))
    assert time.process_time() - start < 20 and len(output) > 5_000_000
    assert max(len(q.preceding) for q in queries) <= CONFIG.max_characters
    [whole] = [q for q in queries if q.group == "isuse"]
    assert whole.output == output and collecting.length_of(whole) > CONFIG.max_characters


# ---- which answers -------------------------------------------------------------------------------
def example(i, label, task="isrel", instruction=None):
    return CriticExample(task, instruction or f"Q{i}?", label, id=str(i))


def test_balance_caps_frequent_labels_and_keeps_rare_ones():
    labels = ["[Relevant]"] * 900 + ["[Irrelevant]"] * 100
    uses = ["[Utility:5]"] * 398 + ["[Utility:1]"] * 2
    examples = [example(i, label) for i, label in enumerate(labels)]
    examples += [example(i, label, "isuse") for i, label in enumerate(uses)]
    random.Random(0).shuffle(examples)
    kept = collecting.balanced(examples, 3.0, 0)
    assert Counter(e.output for e in kept) == {
        "[Relevant]": 300, "[Irrelevant]": 100,  # three times the rarest
        "[Utility:5]": 60, "[Utility:1]": 2,  # the rarest counts as 5% of its group
    }  # fmt: skip
    assert kept == [e for e in examples if e in set(kept)]
    assert collecting.balanced(examples, None, 0) == examples
    assert collecting.balanced(examples[::-1], 3.0, 0) == kept[::-1] != kept


def test_a_question_is_always_on_the_same_side():
    examples = [example(i, "[Relevant]", instruction=f"Q{i % 500}?") for i in range(2000)]
    train, dev = collecting.split_by_question(examples, 0.1, 0)
    assert len(train) + len(dev) == 2000 and 120 < len(dev) < 280
    assert not {e.instruction for e in train} & {e.instruction for e in dev}
    _, alone = collecting.split_by_question(examples[:50], 0.1, 0)
    assert alone == [e for e in dev if e in examples[:50]]
    respelt = [replace(e, instruction=e.instruction.upper() + "  ") for e in dev]
    assert collecting.split_by_question(respelt, 0.1, 0) == ([], respelt)


def test_a_failed_query_is_never_an_example():
    with pytest.raises(ValueError, match="no label"):
        collecting.example_of(
            Request(CritiqueQuery("isrel", "Q?"), "1"), Verdict(None, "no label in the reply")
        )


def test_settings_added_later_leave_finished_files_finished():
    tiny = config.build(CollectConfig, config.load("tiny").collect, "collect")
    names = {"seed", "teacher", "teacher_error_rate", "share", "passages"}
    assert set(tiny.made_from()) == names
    assert set(replace(tiny, balance=2.0).made_from()) == names | {"balance"}


def test_the_published_config_builds():
    section = config.load("critic_7b").collect
    built = config.build(CollectConfig, section, "collect")
    assert built.teacher == "openai" and sum(n for _, n in built.per_group) == 46_900


# ---- models that run here ------------------------------------------------------------------------
QUERIES = [
    CritiqueQuery("retrieve", "Who founded it?"),
    CritiqueQuery("retrieve", "Who founded it?", "Ada did.", PASSAGES[0]),
    CritiqueQuery("isrel", "Who founded it?", evidence=PASSAGES[1]),
    CritiqueQuery("issup", "Who founded it, and when was that?", evidence=PASSAGES[1], output="A."),
    CritiqueQuery("issup", "Who?", evidence=PASSAGES[2], output="Ada founded it."),
    CritiqueQuery("isuse", "Who founded it?", output="Ada [Utility:1] did."),
]


def short_templates():
    """Templates that leave room in a tiny model's context."""
    texts = {
        kind: " ".join(f"{{{name}}}" for name in ("instruction", "evidence", "output", "labels"))
        for kind in LABELS
    }
    return Templates(tuple(texts.items()))


def test_a_local_model_gives_the_likeliest_label(tiny_model):
    from selfrag_jax.critic.teachers.local import LocalTeacher

    teacher = LocalTeacher(tiny_model, LocalConfig(2, 96), short_templates(), "f")
    requests = [Request(q, "1") for q in QUERIES]
    verdicts = dict(teacher.ask(requests))
    assert sorted(verdicts) == list(range(len(QUERIES)))

    @jax.jit
    def plain(params, ids):
        hidden, _ = tiny_model.model.hidden(params, ids, jnp.arange(96)[None], None)
        return jax.nn.log_softmax(tiny_model.model.logits(params, hidden)[0])

    for i, query in enumerate(QUERIES):
        prompt, labels = teacher._encode(query)
        expected = []
        for label in labels:  # each prompt with each label, as a plain sequence
            ids = [*prompt, *label]
            log_p = np.asarray(plain(tiny_model.params, jnp.array([ids + [0] * (96 - len(ids))])))
            at = np.arange(len(prompt) - 1, len(ids) - 1)
            expected.append(log_p[at, np.array(label)].sum())
        found = teacher.likelihoods([(prompt, labels)])[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert verdicts[i].token == LABELS[kind_of(query)][int(np.argmax(expected))]
    long = Request(CritiqueQuery("retrieve", "word " * 600), "1")
    [(_, verdict)] = teacher.ask([long])
    assert verdict.token is None and "the model has room for 512" in verdict.reason


def test_a_model_with_reflection_tokens_is_asked_for_their_distribution(talkative):
    from selfrag_jax.critic.teachers.local import CriticTeacher

    teacher = CriticTeacher(talkative, LocalConfig(8, 64, brief=True), "f")
    verdicts = dict(teacher.ask([Request(q, "1") for q in QUERIES]))
    for i, (query, p) in enumerate(zip(QUERIES, teacher.critic.judge(QUERIES), strict=True)):
        tokens = reflection.GROUPS[query.group]
        allowed = [p[tokens.index(label)] for label in LABELS[kind_of(query)]]
        assert verdicts[i].token == LABELS[kind_of(query)][int(np.argmax(allowed))]


def test_collecting_from_a_local_model(tmp_path, capsys):
    import selfrag_jax.base_model as base

    model = Path(base.__file__).parent / "weights"
    for kind, text in short_templates().texts:
        names = {
            "retrieve": "{instruction} {labels}",
            "retrieve_next": text + " {preceding}",
        }
        text = names.get(kind, text)
        for name in ("output",) if kind in ("isrel", "retrieve_next") else ():
            text = text.replace(f"{{{name}}}", "")
        text = text.replace("{evidence}", "") if kind == "isuse" else text
        (tmp_path / f"{kind}.txt").write_text(text)
    rows = [collecting.asdict(instruction(i)) for i in range(4)]
    write_jsonl(tmp_path / "in.jsonl", rows)

    def collect(out):
        return cli.main([
            "collect", "--teacher=local", f"--teacher_model={model}", f"--templates={tmp_path}",
            f"--input={tmp_path}/in.jsonl", f"--out={tmp_path}/{out}",
            f"--cache={tmp_path}/cache", "--config.collect.dev_share=0.4",
            "--config.collect.local.length_bucket=128",
        ])  # fmt: skip

    assert collect("out.jsonl") == 0
    train = [row for _, row in read_rows(tmp_path / "out.jsonl")]
    dev = [row for _, row in read_rows(tmp_path / "out.dev.jsonl")]
    assert train and dev and not (tmp_path / "out.failed.jsonl").exists()
    assert not {r["instruction"] for r in train} & {r["instruction"] for r in dev}
    counts = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["counts"]
    assert counts["examples"] == len(train) and counts["dev"] == len(dev)
    for row in train + dev:
        assert row["output"] in reflection.GROUPS[row["task"]]
    capsys.readouterr()
    assert collect("again.jsonl") == 0  # from the cache
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
