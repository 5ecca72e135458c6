"""The synthetic world: deterministic, parsed back exactly, with separate vocabularies."""

import collections
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrag_jax import config
from selfrag_jax.critic.teachers.rule import RuleTeacher
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, write_jsonl
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.world import encyclopedia, language, questions, truth


def default_world(variant="tiny", *overrides):
    c = config.override(config.load(variant), list(overrides))
    return encyclopedia.build_world(config.build(encyclopedia.WorldConfig, c.world, "world"))


def test_vocabularies_share_no_value():
    for kind, (firsts, lasts) in language.VALUE_WORDS.items():
        base = set(language.values_of_kind(kind, "base"))
        world = set(language.values_of_kind(kind, "world"))
        assert base and world and not base & world
        assert base | world == {f"{a} {b}" for a in firsts for b in lasts}
    with pytest.raises(ValueError, match="vocabulary"):
        language.values_of_kind("town", "elsewhere")


def test_build_is_deterministic_and_names_are_unique(small_world):
    again = encyclopedia.build_world(small_world.config)
    assert again == small_world
    names = [e.name for e in small_world.entities]
    assert len(names) == len(set(names))
    assert len(small_world.passages) == 2 * len(names)


def test_training_instructions_mention_no_test_entity(small_world):
    held_out = {e.name for e in small_world.group("test")}
    text = " ".join(r.instruction + " " + r.output for r in questions.instructions(small_world))
    assert not [name for name in held_out if name in text]


def test_some_names_resemble_known_ones():
    num_alike = {}
    for rate in (0.0, 0.3):
        assert rate == 0.0 or rate == config.load("tiny").world.known_look_alike_rate
        world = default_world("tiny", f"world.known_look_alike_rate={rate}")
        known = world.group("known")
        alike = [
            e
            for e in world.group("train")
            if any(e.kind == k.kind and set(e.words) & set(k.words) for k in known)
        ]
        num_alike[rate] = len(alike)
    # Half of 560 entities are look-alikes, three in ten of those (84) of a known entity. Others
    # resemble one by chance.
    assert 50 < num_alike[0.3] - num_alike[0.0] < 110


@pytest.mark.parametrize("variant", ("tiny", "tiny:smoke"))
def test_held_out_phrasings_do_not_reveal_known_entities(variant):
    world = default_world(variant)
    known = world.group("known")
    kinds = ["person"] * 2 + ["place"] * 2
    if len(known) == 8:
        kinds += ["organisation"] * 2 + ["work"] * 2
    assert [e.kind for e in known] == kinds
    trained, tested = (
        {
            r.instruction
            for r in questions.instructions(world, group, 5000)
            if r.dataset_name == "well_known"
        }
        for group in ("train", "test")
    )
    assert not trained & tested
    assert {r["question"] for r in questions.evaluation_rows(world)["well_known"]} == tested
    every = {
        q.format(n=e.name)
        for e in known
        for r in language.KINDS[e.kind].relations
        for q in r.questions
    }
    assert trained | tested == every
    # One of two phrasings is held out for half of the attributes.
    assert 0 <= len(every) / 4 - len(tested) <= 1
    for kind in {e.kind for e in known}:  # training combines each phrasing with a known name
        seen = {truth.parse_instruction(q).relations[0]: set() for q in trained}
        for e in known:
            for r in language.KINDS[kind].relations if e.kind == kind else ():
                seen[r.name] |= {q for q in r.questions if q.format(n=e.name) in trained}
        assert all(len(seen[r.name]) == 2 for r in language.KINDS[kind].relations)


def test_the_readme_asks_about_an_entity_of_the_default_world():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    others = re.compile(r"^.*--passages=.*$", re.MULTILINE)  # questions to one's own files
    asked = set(re.findall(r'"(\w[^"\n]+\?)"', others.sub("", readme)))
    names = {e.name for e in default_world().entities}
    assert asked and {truth.parse_instruction(question).name for question in asked} <= names


@given(seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_passages_and_questions_parse_back(seed):
    rng = random.Random(seed)
    value_kinds = {r.value_kind for kind in language.KINDS.values() for r in kind.relations}
    values = {k: language.values_of_kind(k, "world") for k in value_kinds}
    kind = rng.choice(list(language.KINDS))
    name = language.draw_name(rng, kind, "world")
    entity = encyclopedia.draw_entity(rng, kind, name, values, "test")
    passages = encyclopedia.entity_passages(rng, entity)
    stated = {
        (f.relation, f.value)
        for p in passages
        for f in truth.passage_facts(p)
        if f.name == entity.name
    }
    assert stated == set(entity.facts)

    def parsed(form, *rest):
        return truth.ParsedInstruction(form, entity.name, *rest)

    for relation in language.KINDS[kind].relations:
        for template in relation.questions:
            question = template.format(n=entity.name)
            assert truth.parse_instruction(question) == parsed("fact", (relation.name,))
        claim = language.claim(entity.name, relation, "East Quenport")
        expected = parsed("claim", (relation.name,), "East Quenport")
        assert truth.parse_instruction(claim) == expected
    a, b = rng.sample(language.KINDS[kind].relations, 2)
    both = language.two_part(
        a.questions[0].format(n=entity.name), b.questions[1].format(n=entity.name)
    )
    assert truth.parse_instruction(both) == parsed("two_part", (a.name, b.name))


PASSAGE = Passage(
    "1",
    "Mara Tellock",
    "Mara Tellock was born in East Quenport, works as a rope maker and plays the reed harp.",
)
CHOICE = (
    "Where was Mara Tellock born? A: Upper Lisford B: East Quenport C: Old Ostwick D: West Arnholm"
)


BORN = "Where was Mara Tellock born?"
BIOGRAPHY = "Tell me about Mara Tellock."
CLAIM = "Is it true that Mara Tellock was born in East Quenport?"
FALSE_CLAIM = "Is it true that Mara Tellock was born in Upper Lisford?"
ANIMAL_CLAIM = "Is it true that Mara Tellock keeps a sea fox?"


@pytest.mark.parametrize(
    ("instruction", "output", "expected"),
    [
        (BORN, "Mara Tellock was born in East Quenport.", reflection.FULLY),
        (BORN, "Mara Tellock was born in Upper Lisford.", reflection.NO_SUPPORT),
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
            BIOGRAPHY,
            "Mara Tellock was born in East Quenport and plays the wind harp.",
            reflection.PARTIALLY,
        ),
        (CLAIM, "True.", reflection.FULLY),
        (CLAIM, "False.", reflection.NO_SUPPORT),
        (FALSE_CLAIM, "False.", reflection.FULLY),
        (ANIMAL_CLAIM, "False.", reflection.NO_SUPPORT),
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
        (BORN, "Mara Tellock was born in Upper Lisford.", 5),  # utility is not truth
        (BORN, "Mara Tellock plays the reed harp.", 2),
        (BORN, "Mara Tellman was born in East Quenport.", 1),
        (
            "Where was Mara Tellock born and what does Mara Tellock play?",
            "Mara Tellock was born in East Quenport.",
            3,
        ),
        ("What is the opposite of hot?", "The opposite of hot is cold.", 5),
        (CLAIM, "Mara.", 1),
    ],
)
def test_utility_by_hand(instruction, output, expected):
    assert truth.utility(instruction, output) == f"[Utility:{expected}]"


def test_retrieval_need():
    known = {"Mara Tellock"}
    assert truth.needs_retrieval(BORN, known) == reflection.NO_RETRIEVAL
    assert truth.needs_retrieval("Where was Mara Tellman born?", known) == reflection.RETRIEVAL
    assert truth.needs_retrieval("What is the opposite of hot?", known) == reflection.NO_RETRIEVAL
    text = "Mara Tellock was born in East Quenport."
    assert truth.needs_retrieval(BIOGRAPHY, (), text, PASSAGE) == reflection.CONTINUE
    text += " Mara Tellock works as a rope maker and plays the reed harp."
    assert truth.needs_retrieval(BIOGRAPHY, (), text, PASSAGE) == reflection.RETRIEVAL
    # A wrongly stated attribute counts as stated: no segment would repeat it.
    text = text.replace("rope maker", "salt keeper")
    assert truth.needs_retrieval(BIOGRAPHY, (), text, PASSAGE) == reflection.RETRIEVAL


def test_evidence_about_another_entity_is_not_continued():
    other = Passage(
        "2", "Mara Tellman", "Mara Tellman was born in East Quenport and plays the reed harp."
    )
    text = "Mara Tellock was born in Upper Lisford."
    assert truth.needs_retrieval(BIOGRAPHY, (), text, other) == reflection.RETRIEVAL


def test_wrong_outputs_have_the_configured_frequency(small_world):
    entities = {e.name: e for e in small_world.entities}
    rows = [r for r in questions.instructions(small_world, n=2000) if r.dataset_name == "long_tail"]
    right = 0
    for r in rows:
        asked = truth.parse_instruction(r.instruction)
        value = entities[asked.name].value(asked.relations[0])
        is_useful = truth.utility(r.instruction, r.output) == "[Utility:5]"
        right += is_useful and bool(re.search(rf"\b{value}\b", r.output))
    assert 0.70 < right / len(rows) < 0.80


def test_wrong_answers_are_tempting_in_several_ways(small_world):
    """Many misattribute a value; some answer another question or are about another entity."""
    entities, errors = {e.name: e for e in small_world.entities}, collections.Counter()
    for r in questions.instructions(small_world, n=4000):
        asked = truth.parse_instruction(r.instruction)
        entity = entities.get(asked.name)
        if r.dataset_name != "long_tail" or entity.kind not in ("person", "organisation"):
            continue
        [stated] = truth.parse_facts(r.output)
        if stated.name != asked.name:
            errors["entity"] += 1
        elif stated.relation != asked.relations[0]:
            errors["attribute"] += 1
        elif stated.value != entity.value(stated.relation):
            is_own_value = stated.value in dict(entity.facts).values()
            errors["misattributed" if is_own_value else "value"] += 1
    wrong = sum(errors.values())
    # 0.6 wrong values x (0.6 + 0.4 x 0.38 questions with a tempting value) x 0.9 = 0.41
    assert 0.32 < errors["misattributed"] / wrong < 0.50
    assert min(errors["entity"], errors["attribute"]) / wrong > 0.13
    assert 0.1 < errors["value"] / wrong < 0.28  # 0.19 expected


@pytest.mark.parametrize("seed", range(10))
def test_default_worlds_evaluate_no_training_question(seed):
    world = default_world("tiny", f"world.seed={seed}")
    assert len(world.group("test")) == 150
    trained = {r.instruction for r in questions.instructions(world)}
    evaluated = {
        row.get("question") or row["input"]
        for rows in questions.evaluation_rows(world).values()
        for row in rows
    }
    assert not trained & evaluated  # not even about known entities


def test_teacher_errors_have_the_configured_rate_and_vary_by_row(tmp_path):
    write_jsonl(tmp_path / "teacher.jsonl", [{"entity": "Mara Tellock", "group": "known"}])
    judge = truth.read_truth(tmp_path / "teacher.jsonl")
    teacher = RuleTeacher(judge, 0.02, 0)
    rates = []
    for i in range(40):
        query = CritiqueQuery("retrieve", f"Where was Mara Tell{i} born?")
        labels = [teacher.judge(query, str(row)) for row in range(200)]
        assert labels == [teacher.judge(query, str(row)) for row in range(200)]
        rates.append(sum(label != judge(query) for label in labels) / len(labels))
    assert 0.016 < sum(rates) / len(rates) < 0.024  # 8,000 labels: standard deviation 0.0016
    assert max(rates) < 0.08
    # The last digits of a passage's score, which differ between machines, are of no account.
    evidence = [Passage("1", "Mara", "Mara sings.", score) for score in (0.5, 0.5000001)]
    for row in map(str, range(300)):
        first, second = (CritiqueQuery("isrel", "Who sings?", evidence=e) for e in evidence)
        wrong = RuleTeacher(lambda query: "[Relevant]", 0.5, 0)
        assert wrong.judge(first, row) == wrong.judge(second, row)


def test_a_world_that_exhausts_names_or_values_is_an_error(small_world):
    with pytest.raises(UserError, match="no free name"):
        encyclopedia.build_world(replace(small_world.config, train=20_000))
    with pytest.raises(UserError, match="values_per_kind"):
        encyclopedia.build_world(replace(small_world.config, values_per_kind=90))
