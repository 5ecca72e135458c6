"""The published training files as they are, and generator data in folders read through grain."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrag_jax import artifacts, cli, config
from selfrag_jax.commands.prepare import prepare_sets
from selfrag_jax.commands.train import train_model
from selfrag_jax.data import prepared
from selfrag_jax.data.batches import Packer
from selfrag_jax.data.critic_examples import CriticSource, critique_query, read_critic_examples
from selfrag_jax.data.generator_examples import GeneratorSource, output_spans
from selfrag_jax.data.published_files import RowFault
from selfrag_jax.data.released import critic_example, generator_example, split_input
from selfrag_jax.errors import UserError
from selfrag_jax.files import read_json
from selfrag_jax.records import GeneratorExample, Passage, write_jsonl
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control
from selfrag_jax.training import train as trainer
from selfrag_jax.training.config import MeshConfig, TrainConfig
from selfrag_jax.training.optimizer import OptimizerConfig

WEIGHTS = {"retrieve": 1.0, "isrel": 1.0, "issup": 1.0, "isuse": 1.0}


def critic_row(task, text, output, **more):
    return {"instruction": "Judge it.", "input": text, "output": output, "task": task, **more}


# One row of each kind that the published files hold, and the fields in it.
PIER = Passage("0", "Pier", "It opened in 1901.")
CRITIC = [
    (
        critic_row("retrieval", "Task instruction: When did the pier open?", "[Retrieval]"),
        ("retrieve", "When did the pier open?", "", None, ""),
    ),
    (
        critic_row(
            "multi_retrieval",
            "Task instruction: Tell of the pier.\nPreceding sentences: \n"
            "Evidence: Pier\nIt opened in 1901.\nOutput: It is old.",
            "[Continue to Use Evidence]",
        ),
        ("retrieve", "Tell of the pier.", "", PIER, "It is old."),
    ),
    (
        critic_row(
            "retrieval",
            "Task instruction: Tell of the pier.\nPreceding sentences: It is long.\n"
            "Evidence: Pier\nIt opened in 1901.\nOutput: It is old.",
            "[No Retrieval]",
        ),
        ("retrieve", "Tell of the pier.", "It is long.", PIER, "It is old."),
    ),
    (
        critic_row(
            "relevance",
            "##\nTask instruction: Which is it?\nInput: a pier\nEvidence: Pier\nIt opened in 1901.",
            "[Irrelevant]",
        ),
        ("isrel", "Which is it?\nInput: a pier", "", PIER, ""),
    ),
    (
        critic_row(
            "groudness",
            "Task instruction: Tell of it.\nPreceding sentences: A pier.\nOutput: It is old.\n"
            "Evidence: It opened in 1901.",
            "[Partially supported]",
        ),
        ("issup", "Tell of it.", "A pier.", Passage("0", "", "It opened in 1901."), "It is old."),
    ),
    (
        critic_row(
            "groudness",
            "##\nTask instruction: Tell of it.\nEvidence: Pier\nIt opened in 1901.\n"
            "Output: It is old.",
            "[No support / Contradictory] ",
        ),
        ("issup", "Tell of it.", "", PIER, "It is old."),
    ),
    (
        critic_row(
            "utility",
            "Task instruction: Sort.\nInput: b a\nOutput: a b\nInput: d c\nOutput: c d\n\ndone",
            "[Utility:4]",
        ),
        ("isuse", "Sort.\nInput: b a\nOutput: a b\nInput: d c", "", None, "c d\n\ndone"),
    ),
]


OWN_CRITIC = {"task": "retrieve", "instruction": "Who?", "output": "[Retrieval]"}


# ---- critic files --------------------------------------------------------------------------------
@pytest.mark.parametrize("as_list", [False, True])
def test_published_critic_rows_are_split_into_fields(tmp_path, capsys, as_list):
    file = tmp_path / "critic.json"
    rows = [row for row, _ in CRITIC]
    file.write_text(json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows)))
    read = read_critic_examples(file, released=True)
    found = [(e.task, e.instruction, e.preceding, e.evidence, e.segment) for e in read]
    assert found == [fields for _, fields in CRITIC]
    assert [e.output for e in read] == [row["output"].strip() for row in rows]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("brief", [False, True])
@pytest.mark.parametrize(("row", "fields"), CRITIC)
def test_published_critic_rows_are_trained_whole(tmp_path, tokenizer, row, fields, brief):
    file = tmp_path / "critic.jsonl"
    file.write_text(json.dumps(row))
    example = read_critic_examples(file, released=True)[0]
    query = critique_query(example)
    said = "".join(p for p in prompts.critique(query, brief) if isinstance(p, str))
    group, instruction, preceding, evidence, output = fields
    in_prompt = [
        instruction,
        output,
        evidence.text if evidence else "",
        evidence and evidence.title,
    ]
    if group == "retrieve":
        in_prompt.append(preceding)
    assert all(text in said for text in in_prompt if text)
    source = CriticSource([example], tokenizer, brief, WEIGHTS)
    tokens = source.example(0).tokens
    assert tokenizer.token(tokens[-1]) == row["output"].strip()


CRITIC_FAULTS = {
    "not JSON": '{"task": "rel',
    "not a JSON object": "[1]",
    "missing field 'output'": {"task": "utility", "input": "Task instruction: a\nOutput: b"},
    "unknown task": critic_row("relevancy", "Task instruction: a", "[Relevant]"),
    "label of another group": critic_row("relevance", CRITIC[3][0]["input"], "[Utility:1]"),
    "two labels": critic_row("relevance", CRITIC[3][0]["input"], "[Relevant][Irrelevant]"),
    "unknown control token": critic_row("relevance", CRITIC[3][0]["input"], "[Relevent]"),
    "no label": critic_row("relevance", CRITIC[3][0]["input"], "Yes."),
    "text beside the label": critic_row("relevance", CRITIC[3][0]["input"], "[Relevant] as it is"),
    "empty output": critic_row("relevance", CRITIC[3][0]["input"], " "),
    "no task instruction in input": critic_row("relevance", "Evidence: b", "[Relevant]"),
    "empty instruction": critic_row("relevance", "Task instruction: \nEvidence: b", "[Relevant]"),
    "no evidence in input": critic_row("relevance", "Task instruction: a", "[Relevant]"),
    "no output in input": critic_row("utility", "Task instruction: a", "[Utility:2]"),
    "field 'input' is not text": critic_row("utility", ["a"], "[Utility:2]"),
    "unpaired surrogate": critic_row("utility", CRITIC[6][0]["input"] + "\ud83d", "[Utility:1]"),
}


@pytest.mark.parametrize("kind", CRITIC_FAULTS)
def test_a_malformed_critic_row_is_left_out_and_reported(tmp_path, capsys, kind):
    row, good = CRITIC_FAULTS[kind], json.dumps(CRITIC[0][0])
    bad = row if isinstance(row, str) else json.dumps(row)
    file = tmp_path / "critic.jsonl"
    file.write_text(f"{good}\n{bad}\n{good}\n\n{bad}\n{good}\n")
    assert len(read_critic_examples(file, released=True)) == 3
    err = capsys.readouterr().err
    assert f"{file}: 2 of 5 rows are left out\n  {kind}: 2 (rows 2, 5)\n" == err
    file.write_text(f"{good}\n" + f"{bad}\n" * 9)
    with pytest.raises(UserError) as e:
        read_critic_examples(file, released=True)
    assert f"9 of 10 rows are malformed; is it the right file? {kind}: 9" in str(e.value)
    assert "(rows 2, 3, 4, 5, 6, ...)" in str(e.value)


def test_without_the_flag_published_critic_rows_are_read_and_a_malformed_one_ends_it(tmp_path):
    file, rows = tmp_path / "critic.jsonl", [row for row, _ in CRITIC]
    write_jsonl(file, rows)
    assert read_critic_examples(file) == read_critic_examples(file, released=True)
    write_jsonl(file, [*rows, CRITIC_FAULTS["no evidence in input"]])
    with pytest.raises(UserError, match=r"critic.jsonl:8: no evidence in .* --format=released"):
        read_critic_examples(file)


@pytest.mark.parametrize("name", ["id", "_id", "qid", "question_id", "sample_id", "docid"])
@pytest.mark.parametrize("released", [False, True])
def test_ids_of_training_rows_are_kept_under_any_name(tmp_path, tokenizer, name, released):
    write_jsonl(tmp_path / "critic.jsonl", [CRITIC[0][0] | {name: 7}])
    assert read_critic_examples(tmp_path / "critic.jsonl", released)[0].id == "7"
    write_jsonl(tmp_path / "own.jsonl", [OWN_CRITIC | {name: "7"}])
    assert read_critic_examples(tmp_path / "own.jsonl")[0].id == "7"
    row = {k: v for k, v in GOOD.items() if k != "id"} | {name: "7"}
    write_jsonl(tmp_path / "generator.jsonl", [row])
    source = GeneratorSource.read(tmp_path / "generator.jsonl", tokenizer, WEIGHTS, released)
    assert source.rows[0].id == "7"


def test_headings_within_an_instruction_stay_there():
    text = "Task instruction: Copy.\nOutput: a\nEvidence: none\nEvidence: T\nP"
    assert split_input("relevance", text) == {
        "instruction": "Copy.\nOutput: a\nEvidence: none", "evidence": "T\nP",
    }  # fmt: skip
    alone = "Task instruction: Copy.\nOutput: a"
    assert split_input("retrieval", alone) == {"instruction": "Copy.\nOutput: a"}


# ---- generator files -----------------------------------------------------------------------------
GOOD = {
    "id": "nq_1",
    "instruction": "Where?",
    "input": "",
    "output": "[Retrieval]<paragraph>T\nsaid [utility:9]</paragraph>[Relevant]By [the] sea."
    "[Fully supported][Utility:5]",
    "dataset_name": "nq",
}
GENERATOR_FAULTS = {
    "not JSON": "{",
    "missing field 'output'": {"instruction": "a"},
    "unclosed paragraph": GOOD | {"output": "[Retrieval]<paragraph>T\nP[Relevant]A.[Utility:5]"},
    "unknown control token": GOOD | {"output": "[No Retrieval]A.[Utility:6]"},
    "empty output": GOOD | {"output": "[No Retrieval] [Utility:5]"},
    "no reflection token": GOOD | {"output": "By the sea."},
    "empty instruction": GOOD | {"instruction": " "},
    "critic data": CRITIC[0][0],
    "malformed messages": {"messages": [{"role": "user", "content": "a"}]},
}


@pytest.mark.parametrize("kind", GENERATOR_FAULTS)
def test_a_malformed_generator_row_is_left_out_and_reported(tmp_path, capsys, tokenizer, kind):
    row, good = GENERATOR_FAULTS[kind], json.dumps(GOOD)
    bad = row if isinstance(row, str) else json.dumps(row)
    file = tmp_path / "train.jsonl"
    file.write_text(f"{good}\n{bad}\n")
    source = GeneratorSource.read(file, tokenizer, WEIGHTS, released=True)
    assert list(source.rows) == [GeneratorExample(**GOOD)]
    assert f"1 of 2 rows are left out\n  {kind}: 1 (row 2)\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "token",
    ["[Retrieve]", "[retrieval]", "[ Relevant ]", "[Supported]", "[Utility: 5]", "<Paragraph>"],
)
def test_tokens_that_are_nearly_right_are_noticed(tmp_path, capsys, tokenizer, token):
    file = tmp_path / "train.jsonl"
    write_jsonl(file, [GOOD, GOOD | {"output": f"[No Retrieval]A.{token}[Utility:5]"}])
    assert GeneratorSource.read(file, tokenizer, WEIGHTS, released=True).size == 1
    assert "unknown control token: 1 (row 2)" in capsys.readouterr().err


def test_without_the_flag_an_unclosed_paragraph_is_refused_with_the_remedy(tmp_path, tokenizer):
    write_jsonl(tmp_path / "train.jsonl", [GOOD, GENERATOR_FAULTS["unclosed paragraph"]])
    with pytest.raises(UserError, match=r"train.jsonl:2: each <paragraph> .* --format=released"):
        GeneratorSource.read(tmp_path / "train.jsonl", tokenizer, WEIGHTS)


def test_chats_are_trained_as_instruction_and_output(tmp_path, tokenizer, capsys):
    chat = [{"role": "user", "content": "What is tin?"}, {"role": "assistant", "content": "Metal."}]
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat}, GOOD])
    source = GeneratorSource.read(tmp_path / "chats.jsonl", tokenizer, WEIGHTS)
    assert source.rows[0] == GeneratorExample("", "What is tin?", "Metal.")
    assert "chats.jsonl: 1 chats" in capsys.readouterr().err


@settings(max_examples=200)
@given(
    row=st.sampled_from([GOOD, *(row for row, _ in CRITIC)]),
    at=st.integers(0, 4),
    value=st.none() | st.integers() | st.lists(st.text(max_size=2), max_size=2) | st.text()
    | st.lists(st.sampled_from([*reflection.ALL, "a", "\nOutput: ", "[", "\ud83d"])).map("".join),
)  # fmt: skip
def test_a_row_with_any_value_in_any_field_is_read_or_has_a_kind(row, at, value):
    changed = row | {list(row)[at % len(row)]: value}
    build = critic_example if "task" in row else generator_example
    try:
        made = build(changed)
    except RowFault as fault:
        assert str(fault)
        return
    if "task" in row:
        assert made.output in reflection.GROUPS[made.task] and made.instruction
    else:
        assert made.instruction and output_spans(made.output)


# ---- the released mask ---------------------------------------------------------------------------
def learned(output, mask):
    spans = output_spans(output, mask)
    parts = [p for parts, weight in spans if weight for p in parts]
    return [p.token if isinstance(p, Control) else p for p in parts]


def released_mask(tokens):
    """The released script's loop over the tokens of an output: which of them are learned."""
    labels = list(tokens)
    for start in range(len(labels)):
        if labels[start] == "<paragraph>":
            end = max(i for i, t in enumerate(labels) if t == "</paragraph>")
            labels[start + 1 : end] = [None] * (end - start - 1)
    return [t for t in labels if t is not None]


@pytest.mark.parametrize("passages", [0, 1, 2, 3])
def test_the_released_mask_goes_from_the_first_passage_to_the_last(passages):
    some = "[Retrieval]<paragraph>T\nP</paragraph>[Relevant]Said.[Fully supported]"
    output = some * passages + "[No Retrieval]End.[Utility:5]"
    parts = prompts.parse_output(output)
    tokens = [p.token if isinstance(p, Control) else p for p in parts]
    assert learned(output, "released") == released_mask(tokens)
    assert ("Said." in learned(output, "released")) == (passages > 0)
    assert learned(output, "released").count("[Relevant]") == min(passages, 1)
    assert learned(output, "each").count("[Relevant]") == passages


def test_the_mask_is_a_field_of_the_config_that_old_manifests_need_not_have():
    section = config.load("tiny:smoke").generator
    assert "mask" not in config.build(TrainConfig, section, "generator").manifest_fields()
    section.mask = "released"
    fields = config.build(TrainConfig, section, "generator").manifest_fields()
    assert fields["mask"] == "released"
    section.mask = "none"
    with pytest.raises(UserError, match="mask='none': must be one of each, released"):
        config.build(TrainConfig, section, "generator")


# ---- folders through grain -----------------------------------------------------------------------
def generator_rows(n):
    return [
        GeneratorExample(str(i), f"Say {i}.", f"[No Retrieval]Number {i}.[Utility:5]")
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Generator data of 12 rows in a folder made by `selfrag prepare`, with the counts."""
    tmp = tmp_path_factory.mktemp("generator")
    write_jsonl(tmp / "data.jsonl", [*generator_rows(12), GENERATOR_FAULTS["unclosed paragraph"]])
    counts = prepare_sets([prepared.GENERATOR], tmp / "data.jsonl", tmp / "folder")
    return tmp / "folder", counts[prepared.GENERATOR]


@pytest.fixture(scope="module")
def source(folder, tokenizer):
    return GeneratorSource.read(folder[0], tokenizer, WEIGHTS)


def test_generator_data_in_a_folder_is_the_file_without_its_faults(folder, source):
    _, counts = folder
    assert list(source.rows) == generator_rows(12)
    assert counts.kept == 12 and counts.faults.rows == {"unclosed paragraph": ["13"]}


def test_a_folder_needs_no_format(folder, tokenizer):
    with pytest.raises(UserError, match="folder: is a folder, .* leave --format=released out"):
        GeneratorSource.read(folder[0], tokenizer, WEIGHTS, released=True)


def test_each_epoch_has_every_row_in_another_order(source):
    packer = Packer(source, 2, 32, 48, seed=5)
    epochs = [packer.source_rows(12 * e, 12 * e + 12) for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert Packer(source, 2, 32, 48, seed=6).source_rows(0, 12) != epochs[0]


def test_one_integer_resumes_the_batches_anywhere(folder, source, tokenizer):
    packer, states, batches = Packer(source, 2, 32, 48, seed=0), [], []
    for _ in range(12):  # several epochs
        states.append(packer.state)
        batches.append(packer.next())
    assert states[-1] > 24
    for i in (1, 5, 11):
        reopened = GeneratorSource.read(folder[0], tokenizer, WEIGHTS)
        again = Packer(reopened, 2, 32, 48, seed=0, state=states[i]).next()
        np.testing.assert_array_equal(again.tokens, batches[i].tokens)
        np.testing.assert_array_equal(again.weights, batches[i].weights)


@pytest.mark.slow
def test_a_training_from_a_folder_resumes_exactly(tiny_model, source, tmp_path, monkeypatch):
    optimizer = OptimizerConfig("adamw", 0.01, 0.01, "linear", 0.1, 1e-8, 0.0, 1.0, 4.0)
    fields = dict(rows=2, length=32, max_targets=48, save_every=4, log_every=4)
    c = TrainConfig(
        seed=0, steps=12, optimizer=optimizer, mesh=MeshConfig(1, 1, 1), **fields
    )  # fmt: skip
    model, params, tokenizer = tiny_model.model, tiny_model.params, tiny_model.tokenizer

    def run(name):
        return trainer.train(c, model, params, source, tokenizer, tmp_path / name)["params"]

    whole, calls, step = run("whole"), [], trainer.run_step

    def interrupted_step(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(trainer, "run_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    monkeypatch.setattr(trainer, "run_step", step)
    parts = run("parts")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(parts))


def test_a_folder_of_plain_instructions_trains_with_a_word(tmp_path, tokenizer, capsys):
    rows = [
        {"instruction": "Add.", "input": "2 and 5", "output": "7"},
        {"instruction": "What is a spoon of?", "output": "[Relevant] wood."},  # not ours
    ]
    write_jsonl(tmp_path / "alpaca_data.json", rows)
    prepare_sets(["stanford_alpaca"], tmp_path, tmp_path / "plain")
    source = GeneratorSource.read(tmp_path / "plain", tokenizer, WEIGHTS)
    assert [row.output for row in source.rows] == ["7", "[ Relevant] wood."]
    assert "holds instructions without reflection tokens" in capsys.readouterr().err


# ---- the command ---------------------------------------------------------------------------------
SMOKE = ["--config=tiny:smoke", "--config.generator.steps=1", "--config.critic.steps=1"]


@pytest.mark.parametrize("role", [pytest.param("critic", marks=pytest.mark.slow), "generator"])
def test_train_takes_published_files_of_both_roles(tmp_path, capsys, role):
    good, bad = (CRITIC[0][0], CRITIC[1][0] | {"output": ""})
    if role == "generator":
        good, bad = GOOD, GENERATOR_FAULTS["empty output"]
    write_jsonl(tmp_path / "data.jsonl", [good] * 8 + [bad])
    argv = ["train", f"--role={role}", f"--data={tmp_path}/data.jsonl", f"--workdir={tmp_path}/w"]
    assert cli.main([*argv, *SMOKE, "--format=released"]) == 0
    assert "1 of 9 rows are left out\n  empty output: 1 (row 9)" in capsys.readouterr().err
    assert read_json(tmp_path / "w" / "malformed_rows.json") == {"empty output": ["9"]}
    made = read_json(artifacts.manifest_path(tmp_path / "w"))
    assert made["config"]["format"] == "released" and made["counts"]["steps"] == 1
    assert cli.main([*argv, *SMOKE, "--format=publsihed"]) == 2
    assert "must be one of own, released" in capsys.readouterr().err


def test_train_takes_a_folder_and_the_mask(folder, tmp_path, capsys):
    argv = ["train", "--role=generator", f"--data={folder[0]}", f"--workdir={tmp_path}/w", *SMOKE]
    assert cli.main([*argv, "--config.generator.mask=released"]) == 0
    made = read_json(artifacts.manifest_path(tmp_path / "w"))["config"]
    assert made["train"]["mask"] == "released" and "format" not in made
    capsys.readouterr()
    c = config.load("tiny:smoke")
    c.critic.steps = 1
    with c.critic.unlocked():
        c.critic.mask = "released"
    with pytest.raises(UserError, match="config critic: mask='released': only a generator's data"):
        train_model(c, "critic", folder[0], tmp_path / "v", "critic")
