"""The worlds behind one interface: which one a config or a file names, and who knows its truth."""

import json
from dataclasses import replace

import pytest

from selfrag_jax import artifacts, cli, config
from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.answering.plain import PlainConfig
from selfrag_jax.commands import judging, quickstart, world_evaluation, worlds
from selfrag_jax.commands.few_shot import FewShotConfig
from selfrag_jax.critic.collecting import CollectConfig
from selfrag_jax.critic.labelling import LabelConfig
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.systems import BASE, BY_NAME, FEW_SHOT
from selfrag_jax.retrieval.encoders import EncoderConfig
from selfrag_jax.retrieval.plan import IndexConfig
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.world import questions, truth


@pytest.fixture(scope="module")
def encyclopedia(tmp_path_factory):
    """The folder of a written encyclopedia, and its config."""
    out = tmp_path_factory.mktemp("worlds") / "world"
    c = config.load("tiny:smoke")
    worlds.kind_of_config(c).write(c.world, out)
    return out, c


@pytest.mark.parametrize("name", worlds.KINDS)
def test_a_kinds_systems_tasks_and_comparisons_fit(name):
    kind = worlds.KINDS[name]()
    assert kind.name == name
    assert {kind.sample_task, *kind.long_form} <= set(kind.tasks)
    assert set(kind.systems) <= {*BY_NAME, *(s.name for s in FEW_SHOT)}
    for tasks in kind.systems.values():
        assert tasks and set(tasks) <= set(kind.tasks)
    for one, other, task in kind.compared:
        assert one != other and task in kind.systems[one] and task in kind.systems[other]
    assert [run.system.name for run in world_evaluation.systems(kind)] == list(kind.systems)
    for system in quickstart.SHOWN_SYSTEMS:  # their answers to all tasks are in the report
        assert kind.systems[system] == kind.tasks


@pytest.mark.parametrize("name", ["tiny", "tiny:smoke", "facts", "facts:table", "facts:smoke"])
def test_every_section_of_a_quickstarts_config_is_complete(name):
    c = config.load(name)
    kind = worlds.kind_of_config(c)
    sections = dict(
        world=kind.config, encoder=EncoderConfig, index=IndexConfig, collect=CollectConfig,
        label=LabelConfig, critic=TrainConfig, generator=TrainConfig, answer=AnswerConfig,
        plain=PlainConfig,
    )  # fmt: skip
    if any(run.folder == BASE for run in world_evaluation.systems(kind)):
        sections["few_shot"] = FewShotConfig
    for section, cls in sections.items():
        config.build(cls, c[section], section)
    for name in ("rag", "closed"):  # of both sections, only the number of updates differs
        trained = quickstart.with_steps(c, "generator", c.baseline_steps[name]).generator
        assert trained.steps == (c.baseline_steps[name] or c.generator.steps)
        assert trained.to_dict() | {"steps": 0} == c.generator.to_dict() | {"steps": 0}
    assert c.baseline_steps.rag is None  # as many as Self-RAG


def test_the_truth_of_a_file_is_that_of_its_world(encyclopedia):
    folder, _ = encyclopedia
    teacher = folder / "teacher.jsonl"
    kind, found = worlds.kind_of_file(teacher), worlds.read_truth(teacher)
    assert kind.name == "encyclopedia" and kind.tasks == questions.TASKS
    judge = truth.read_truth(teacher)
    rows = [json.loads(line) for line in (folder / "instructions.jsonl").read_text().splitlines()]
    asked = [CritiqueQuery("isuse", r["instruction"], output=r["output"]) for r in rows]
    assert [found.judge(q) for q in asked] == [judge(q) for q in asked]
    name = next(r["entity"] for r in map(json.loads, teacher.read_text().splitlines()))
    assert found.entity_of(f"Tell me about {name}.") == name
    assert found.entity_of("What is two plus two?") == ""
    told = next(r["output"] for r in rows if truth.stated_facts(r["output"]))
    assert found.stated_facts(told) == truth.stated_facts(told)


def test_a_written_world_is_left_alone_and_another_refused(encyclopedia):
    folder, c = encyclopedia
    kind = worlds.kind_of_config(c)
    before = artifacts.manifest_path(folder).stat().st_mtime_ns
    kind.write(c.world, folder)
    assert artifacts.manifest_path(folder).stat().st_mtime_ns == before
    other = config.override(config.load("tiny:smoke"), ["world.seed=9"])
    with pytest.raises(UserError, match="seed: 0 there, 9 asked for"):
        kind.write(other.world, folder)


def test_unknown_kinds_are_refused_by_name(tmp_path):
    c = config.override(config.load("tiny:smoke"), ["world_kind=moon"])
    with pytest.raises(UserError, match="config world_kind='moon': must be one of encyclopedia"):
        worlds.kind_of_config(c)
    with c.unlocked():
        del c.world_kind
    with pytest.raises(UserError, match="config: lacks world_kind"):
        worlds.kind_of_config(c)
    with pytest.raises(UserError, match="expected one of kind 'quickstart'"):
        worlds.kind_of_config(config.load("small"))
    file = tmp_path / "teacher.jsonl"
    file.write_text('{"world": 3}\n')
    with pytest.raises(UserError, match=r"teacher.jsonl:1: world=3: must be one of encyclopedia"):
        worlds.read_truth(file)
    file.write_text("")
    with pytest.raises(UserError, match="holds no rows; expected the teacher.jsonl"):
        worlds.read_truth(file)


def test_workdirs_of_two_worlds_are_not_averaged(encyclopedia, tmp_path, monkeypatch):
    folder, _ = encyclopedia
    moon = replace(worlds.KINDS["encyclopedia"](), name="moon")
    monkeypatch.setitem(worlds.KINDS, "moon", lambda: moon)
    other = tmp_path / "teacher.jsonl"
    other.write_text('{"world": "moon"}\n')
    first = folder / "teacher.jsonl"
    assert worlds.common_kind([first, first]).name == "encyclopedia"
    with pytest.raises(UserError, match="teacher.jsonl: is of the world 'moon', and"):
        worlds.common_kind([first, other])


def test_the_judge_world_takes_a_worlds_truth(encyclopedia, tmp_path, monkeypatch):
    folder, _ = encyclopedia
    teacher = str(folder / "teacher.jsonl")
    assert judging.open_judge("world") is truth.fully_supports
    assert judging.open_verifier("world", "") is truth.stated_facts

    class Moon:
        def supports(self, *_):
            return True

        def stated_facts(self, _):
            return [("moon", "made of", "cheese")]

    moon = replace(worlds.KINDS["encyclopedia"](), read_truth=lambda _: Moon())
    monkeypatch.setitem(worlds.KINDS, "encyclopedia", lambda: moon)
    assert judging.open_judge("world", teacher)("", None, "")
    assert judging.open_verifier("world", "", teacher)("") == [("moon", "made of", "cheese")]
    task, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    gold = {"topic": "moon", "facts": [["made of", "cheese"]]}
    task.write_text(json.dumps({"id": "1", "question": "Moon?", "answers": ["cheese"]} | gold))
    answers.write_text(
        json.dumps(
            {
                "id": "1",
                "question": "Moon?",
                "answer": "cheese",
                "segments": [],
                "citations": [],
                "passages": [],
                "retrieved": False,
            }
        )
    )
    flags = [f"--task={task}", f"--predictions={answers}", "--judge=world", f"--truth={teacher}"]
    assert cli.main(["evaluate", *flags, f"--out={tmp_path}/m.json"]) == 0
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert {r["metric"]: r["value"] for r in rows}["fact_precision"] == 1
