"""The synthetic world: its language parses back, its words are split, its files are deterministic."""

import collections
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrag_jax import config
from selfrag_jax.critic import collecting
from selfrag_jax.records import Passage, write_jsonl
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.world import encyclopedia, language, questions, truth


def test_vocabularies_share_no_word():
    for kind, values in language.VALUES.items():
        base, world = set(language.words(kind, "base")), set(language.words(kind, "world"))
        assert base and world and not base & world
        assert base | world == {f"{a} {b}" for a in values[0] for b in values[1]}
    with pytest.raises(ValueError, match="vocabulary"):
        language.words("town", "elsewhere")


def test_build_is_deterministic_and_names_are_unique(small_world):
    again = encyclopedia.build_world(small_world.config)
    assert again == small_world
    names = [e.name for e in small_world.entities]
    assert len(names) == len(set(names))
    assert len(small_world.passages) == 2 * len(names)


def test_training_mentions_no_test_entity(small_world):
    held_out = {e.name for e in small_world.group("test")}
    text = " ".join(r.instruction + " " + r.output for r in questions.instructions(small_world))
    assert not [name for name in held_out if name in text]


def test_some_names_look_like_well_known_ones():
    close = {}
    for rate in (0.0, 0.3):
        c = config.override(config.load("tiny"), [f"world.known_look_alike_rate={rate}"])
        assert rate == 0.0 or rate == config.load("tiny").world.known_look_alike_rate
        world = encyclopedia.build_world(config.build(encyclopedia.WorldConfig, c.world, "world"))
        known = world.group("known")
        alike = [
            e
            for e in world.group("train")
            if any(e.kind == k.kind and set(e.words) & set(k.words) for k in known)
        ]
        close[rate] = len(alike)
    # Of 560 half are look-alikes, three in ten of those (84) of a well-known one; others by chance.
    assert 50 < close[0.3] - close[0.0] < 110


@pytest.mark.parametrize("variant", ("tiny", "tiny:smoke"))
def test_phrasings_of_well_known_questions_are_held_out_but_do_not_tell(variant):
    world = encyclopedia.build_world(
        config.build(encyclopedia.WorldConfig, config.load(variant).world, "world")
    )
    known = world.group("known")
    assert [e.kind for e in known] == ["person"] * 2 + ["place"] * 2 + (
        ["organisation"] * 2 + ["work"] * 2
    ) * (len(known) == 8)
    trained = {
        r.instruction
        for r in questions.instructions(world, "train", 5000)
        if r.dataset_name == "well_known"
    }
    tested = {
        r.instruction
        for r in questions.instructions(world, "test", 5000)
        if r.dataset_name == "well_known"
    }
    assert not trained & tested
    assert {r["question"] for r in questions.evaluation(world)["well_known"]} == tested
    every = {
        q.format(n=e.name)
        for e in known
        for r in language.KINDS[e.kind].relations
        for q in r.questions
    }
    assert (
        trained | tested == every and 0 <= len(every) / 4 - len(tested) <= 1
    )  # a half of the attributes, one of two phrasings
    for kind in {e.kind for e in known}:  # each phrasing is met with a well-known name
        met = {truth.parse(q).relations[0]: set() for q in trained}
        for e in known:
            for r in language.KINDS[kind].relations if e.kind == kind else ():
                met[r.name] |= {q for q in r.questions if q.format(n=e.name) in trained}
        assert all(len(met[r.name]) == 2 for r in language.KINDS[kind].relations)


def test_the_question_of_the_readme_can_be_asked():
    asked = set(
        re.findall(r'"(\w[^"\n]+\?)"', (Path(__file__).parents[1] / "README.md").read_text())
    )
    world = encyclopedia.build_world(
        config.build(encyclopedia.WorldConfig, config.load("tiny").world, "world")
    )
    names = {e.name for e in world.entities}
    assert asked and {truth.parse(question).name for question in asked} <= names


@given(seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_passages_and_questions_parse_back(seed):
    rng = random.Random(seed)
    values = {
        k: language.words(k, "world")
        for k in {r.value for kind in language.KINDS.values() for r in kind.relations}
    }
    kind = rng.choice(list(language.KINDS))
    entity = encyclopedia.draw_entity(
        rng, kind, language.draw_name(rng, kind, "world"), values, "test"
    )
    passages = encyclopedia.entity_passages(rng, entity)
    stated = {
        (f.relation, f.value)
        for p in passages
        for f in truth.facts_of_passage(p)
        if f.name == entity.name
    }
    assert stated == set(entity.facts)
    for relation in language.KINDS[kind].relations:
        for template in relation.questions:
            assert truth.parse(template.format(n=entity.name)) == truth.Asked(
                "fact", entity.name, (relation.name,)
            )
        claim = language.claim(entity.name, relation, "East Quenport")
        assert truth.parse(claim) == truth.Asked(
            "claim", entity.name, (relation.name,), "East Quenport"
        )
    a, b = rng.sample(language.KINDS[kind].relations, 2)
    both = language.two_part(
        a.questions[0].format(n=entity.name), b.questions[1].format(n=entity.name)
    )
    assert truth.parse(both) == truth.Asked("two_part", entity.name, (a.name, b.name))


PASSAGE = Passage(
    "1",
    "Mara Tellock",
    "Mara Tellock was born in East Quenport, works as a rope maker and plays the reed harp.",
)
CHOICE = (
    "Where was Mara Tellock born? A: Upper Lisford B: East Quenport C: Old Ostwick D: West Arnholm"
)


@pytest.mark.parametrize(
    ("instruction", "output", "expected"),
    [
        (
            "Where was Mara Tellock born?",
            "Mara Tellock was born in East Quenport.",
            reflection.FULLY,
        ),
        (
            "Where was Mara Tellock born?",
            "Mara Tellock was born in Upper Lisford.",
            reflection.NO_SUPPORT,
        ),
        (
            "Where was Mara Tellman born?",
            "Mara Tellman was born in East Quenport.",
            reflection.NO_SUPPORT,
        ),
        (
            "Where does Mara Tellock live?",
            "Mara Tellock lives in East Quenport.",
            reflection.NO_SUPPORT,
        ),
        (
            "Tell me about Mara Tellock.",
            "Mara Tellock was born in East Quenport and plays the wind harp.",
            reflection.PARTIALLY,
        ),
        ("Is it true that Mara Tellock was born in East Quenport?", "True.", reflection.FULLY),
        (
            "Is it true that Mara Tellock was born in East Quenport?",
            "False.",
            reflection.NO_SUPPORT,
        ),
        ("Is it true that Mara Tellock was born in Upper Lisford?", "False.", reflection.FULLY),
        ("Is it true that Mara Tellock keeps a sea fox?", "False.", reflection.NO_SUPPORT),
        (CHOICE, "B.", reflection.FULLY),
        (CHOICE, "A.", reflection.NO_SUPPORT),
        ("What is the opposite of hot?", "The opposite of hot is cold.", reflection.NO_SUPPORT),
    ],
)
def test_support_by_hand(instruction, output, expected):
    assert truth.support(instruction, PASSAGE, output) == expected


@pytest.mark.parametrize(
    ("instruction", "output", "expected"),
    [
        (
            "Where was Mara Tellock born?",
            "Mara Tellock was born in Upper Lisford.",
            5,
        ),  # utility is not truth
        ("Where was Mara Tellock born?", "Mara Tellock plays the reed harp.", 2),
        ("Where was Mara Tellock born?", "Mara Tellman was born in East Quenport.", 1),
        (
            "Where was Mara Tellock born and what does Mara Tellock play?",
            "Mara Tellock was born in East Quenport.",
            3,
        ),
        ("What is the opposite of hot?", "The opposite of hot is cold.", 5),
        ("Is it true that Mara Tellock was born in East Quenport?", "Mara.", 1),
    ],
)
def test_utility_by_hand(instruction, output, expected):
    assert truth.utility(instruction, output) == f"[Utility:{expected}]"


def test_retrieval_need():
    known = {"Mara Tellock"}
    assert truth.needs_retrieval("Where was Mara Tellock born?", known) == reflection.NO_RETRIEVAL
    assert truth.needs_retrieval("Where was Mara Tellman born?", known) == reflection.RETRIEVAL
    assert truth.needs_retrieval("What is the opposite of hot?", known) == reflection.NO_RETRIEVAL
    told = "Mara Tellock was born in East Quenport."
    assert (
        truth.needs_retrieval("Tell me about Mara Tellock.", (), told, PASSAGE)
        == reflection.CONTINUE
    )
    told += " Mara Tellock works as a rope maker and plays the reed harp."
    assert (
        truth.needs_retrieval("Tell me about Mara Tellock.", (), told, PASSAGE)
        == reflection.RETRIEVAL
    )
    # An attribute that was told wrongly has been told: no segment would repeat it.
    told = told.replace("rope maker", "salt keeper")
    assert (
        truth.needs_retrieval("Tell me about Mara Tellock.", (), told, PASSAGE)
        == reflection.RETRIEVAL
    )


def test_wrong_outputs_are_as_frequent_as_asked(small_world):
    facts = {e.name: e for e in small_world.entities}
    rows = [r for r in questions.instructions(small_world, n=2000) if r.dataset_name == "long_tail"]
    right = 0
    for r in rows:
        asked = truth.parse(r.instruction)
        value = facts[asked.name].value(asked.relations[0])
        right += truth.utility(r.instruction, r.output) == "[Utility:5]" and bool(
            re.search(rf"\b{value}\b", r.output)
        )
    assert 0.70 < right / len(rows) < 0.80


def test_wrong_answers_tempt_in_several_ways(small_world):
    """Many lend the value of another attribute; some answer another question, or about another entity."""
    entities, ways = {e.name: e for e in small_world.entities}, collections.Counter()
    for r in questions.instructions(small_world, n=4000):
        asked = truth.parse(r.instruction)
        entity = entities.get(asked.name)
        if r.dataset_name != "long_tail" or entity.kind not in ("person", "organisation"):
            continue
        [told] = truth.facts_of(r.output)
        if told.name != asked.name:
            ways["entity"] += 1
        elif told.relation != asked.relations[0]:
            ways["attribute"] += 1
        elif told.value != entity.value(told.relation):
            ways["lent" if told.value in dict(entity.facts).values() else "value"] += 1
    wrong = sum(ways.values())
    assert (
        0.32 < ways["lent"] / wrong < 0.50
    )  # 0.6 x (0.6 + 0.4 x 0.38 of questions that tempt anyway) x 0.9 = 0.41
    assert min(ways["entity"], ways["attribute"]) / wrong > 0.13
    assert 0.1 < ways["value"] / wrong < 0.28  # 0.19


@pytest.mark.parametrize("seed", range(10))
def test_the_default_world_can_be_built(seed):
    from selfrag_jax import config

    c = config.override(config.load("tiny"), [f"world.seed={seed}"])
    world = encyclopedia.build_world(config.build(encyclopedia.WorldConfig, c.world, "world"))
    assert len(world.group("test")) == 150
    asked = {r.instruction for r in questions.instructions(world)}
    evaluated = {
        row.get("question") or row["input"]
        for rows in questions.evaluation(world).values()
        for row in rows
    }
    assert (
        not asked & evaluated
    )  # not even the well-known facts are evaluated in the words of training


def test_the_teacher_errs_at_its_rate_and_not_always_about_the_same_question(tmp_path):
    write_jsonl(tmp_path / "teacher.jsonl", [{"entity": "Mara Tellock", "group": "known"}])
    teacher = collecting.RuleTeacher(tmp_path / "teacher.jsonl", 0.02, 0)
    rates = []
    for i in range(40):
        query = CritiqueQuery("retrieve", f"Where was Mara Tell{i} born?")
        labels = [teacher.judge(query, str(row)) for row in range(200)]
        assert labels == [teacher.judge(query, str(row)) for row in range(200)]
        rates.append(sum(label != teacher.truth(query) for label in labels) / len(labels))
    assert 0.016 < sum(rates) / len(rates) < 0.024  # 8,000 labels: a standard deviation is 0.0016
    assert max(rates) < 0.08


def test_evidence_about_another_entity_leaves_nothing_to_continue_with():
    other = Passage(
        "2", "Mara Tellman", "Mara Tellman was born in East Quenport and plays the reed harp."
    )
    told = "Mara Tellock was born in Upper Lisford."
    assert (
        truth.needs_retrieval("Tell me about Mara Tellock.", (), told, other)
        == reflection.RETRIEVAL
    )


def test_a_world_that_is_too_large_says_so(small_world):
    from dataclasses import replace

    from selfrag_jax.errors import UserError

    with pytest.raises(UserError, match="no free name"):
        encyclopedia.build_world(replace(small_world.config, train=20_000))
    with pytest.raises(UserError, match="values_per_kind"):
        encyclopedia.build_world(replace(small_world.config, values_per_kind=90))
