"""The world of real facts: the table, its passages and questions, and the truth about them."""

import csv
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import metrics
from selfrag_jax.facts import (
    comparisons,
    corpus,
    everyday,
    language,
    passage_language,
    relations,
    table,
    usefulness,
    world,
)
from selfrag_jax.facts.questions import QuestionDrawer, instructions
from selfrag_jax.facts.settings import FactsConfig
from selfrag_jax.facts.truth import passage_key
from selfrag_jax.records import Passage, write_jsonl
from selfrag_jax.text import reflection
from selfrag_jax.text.normalising import normalise
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.text.sentences import split_sentences

FOLDER = Path(table.__file__).parent
CONFIG = FactsConfig(
    seed=0,
    kinds=(
        ("film", 0.3), ("city", 0.2), ("country", 0.1), ("element", 0.1), ("person", 0.2),
        ("airport", 0.1),
    ),
    train=120,
    test=100,
    distractors=150,
    lacking_rate=0.2,
    absent_rate=0.1,
    second_passage_rate=0.4,
    list_passages=30,
    instructions=300,
    shares=(
        ("facts", 0.4), ("unanswerable", 0.15), ("claims", 0.1), ("multiple_choice", 0.1),
        ("comparison", 0.1), ("description", 0.1), ("no_need", 0.05),
    ),
    wrong_output_rate=0.3,
    known_from=10,
    fact_questions=40,
    test_questions=40,
    critic_questions=60,
)  # fmt: skip


@pytest.fixture(scope="module")
def facts_world():
    return corpus.build_world(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("facts")
    world.write_world(CONFIG, out)
    return out


@pytest.fixture(scope="module")
def truth(folder):
    return world.read_truth(folder / "teacher.jsonl")


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def stating(facts_world, name, attribute):
    """The passages that state a fact."""
    return [p.passage for p in facts_world.passages if (name, attribute) in p.states]


# ---- the table -----------------------------------------------------------------------------------
def test_the_table_has_what_is_promised():
    entities = table.read_table()
    assert table.FILE.stat().st_size <= 300_000
    assert len(entities) == len({normalise(e.name) for e in entities}) > 8000
    assert {e.kind for e in entities} == set(table.KINDS)
    used = {f"{e.kind}_{a}" for e in entities for a in e.attributes}
    assert used == set(relations.by_name()) and len(used) >= 12
    for e in entities:
        assert e.facts and e.popularity >= 0
        assert all(values and all(v.strip() for v in values) for _, values in e.facts), e.name


def test_facts_that_everyone_knows_are_right():
    of = {(e.kind, e.name): e for e in table.read_table()}
    for kind, name, attribute, value in (
        ("film", "Pulp Fiction", "director", "Quentin Tarantino"),
        ("film", "Titanic", "year", "1997"),
        ("city", "Chicago", "state", "Illinois"),
        ("city", "Mumbai", "country", "India"),
        ("country", "France", "capital", "Paris"),
        ("country", "Japan", "currency", "yen"),
        ("country", "Kenya", "continent", "Africa"),
        ("country", "Germany", "calling_code", "49"),
        ("element", "gold", "number", "79"),
        ("element", "oxygen", "discovery_year", "1774"),
        ("person", "Johann Sebastian Bach", "birth_year", "1685"),
        ("person", "William Shakespeare", "nationality", "English"),
        ("airport", "Ben Gurion International Airport", "code", "TLV"),
    ):
        assert of[kind, name].value(attribute) == value, (kind, name, attribute)


def test_names_give_no_answer_away():
    for e in table.read_table():
        if e.is_asked:
            names = f"{normalise(e.name)} {normalise(e.short)}"
            for attribute, values in e.facts:
                assert not [v for v in values if normalise(v) in names], (e.name, attribute)


def test_deciles_are_even_within_a_kind():
    counts = Counter((e.kind, e.decile) for e in table.read_table())
    for kind in table.KINDS:
        sizes = [counts[kind, decile] for decile in range(10)]
        assert max(sizes) - min(sizes) <= 1
    films = [e for e in table.read_table() if e.kind == "film"]
    assert max(e.popularity for e in films if e.decile == 0) <= min(
        e.popularity for e in films if e.decile == 9
    )


def test_a_table_is_written_as_it_was_read(tmp_path):
    entities = table.read_table()[::40]
    table.write_table(tmp_path / "t.xz", reversed(entities))
    again = table.read_table(tmp_path / "t.xz")
    assert [replace(e, decile=0) for e in again] == [replace(e, decile=0) for e in entities]
    (tmp_path / "broken.xz").write_bytes((tmp_path / "t.xz").read_bytes()[:100])
    with pytest.raises(UserError, match=r"broken\.xz: the table of facts is not readable"):
        table.read_table(tmp_path / "broken.xz")


def test_every_source_is_named_with_its_licence():
    readme, licences = ((FOLDER / name).read_text() for name in ("README.md", "LICENSES.txt"))
    makers = "".join(f.read_text() for f in FOLDER.glob("*make_table.py"))
    sources = re.findall(r"[a-z-]+(?:==|@)[\d.]+", makers)
    assert len(sources) == 5
    for source in sources:
        name, version = re.split("==|@", source)
        assert f"{name} {version}" in readme and f"{name} {version}" in licences, source
    for text in ("CC BY 4.0", "MIT", "WordNet"):
        assert text in readme
    assert "Creative Commons Attribution 4.0" in licences and "Princeton University" in licences


# ---- phrasings -----------------------------------------------------------------------------------
def test_every_relation_has_six_phrasings_and_none_is_shared_with_the_test():
    for r in relations.RELATIONS:
        assert len(set(r.questions) | set(r.test_questions)) >= 6
        assert all(q.count("{n}") == 1 for q in (*r.questions, *r.test_questions))
    train = {q for r in relations.RELATIONS for q in r.questions}
    test = {q for r in relations.RELATIONS for q in r.test_questions}
    assert not train & test
    assert not set(language.CLAIMS) & set(language.TEST_CLAIMS)
    assert not set(language.DESCRIPTIONS) & set(language.TEST_DESCRIPTIONS)
    for c in comparisons.COMPARISONS:
        assert not set(c.questions) & set(c.test_questions)


def test_every_fact_can_be_told_alone():
    details = defaultdict(set)
    for e in table.read_table():
        details[e.kind] |= {name for name, _ in e.details}
    for r in relations.RELATIONS:
        alone = [
            t
            for t in passage_language.FURTHER[r.kind]
            if passage_language.fields(t) == {r.attribute}
        ]
        assert len(alone) >= 2, r.name
    for kind, templates in passage_language.OPENINGS.items():
        known = {r.attribute for r in relations.of_kind(kind)} | details[kind]
        for t in (*templates, *passage_language.FURTHER[kind]):
            assert passage_language.fields(t) <= known, t
        assert all("{n}" in t for t in templates)


# ---- the world -----------------------------------------------------------------------------------
def test_equal_configs_write_equal_files(folder, tmp_path):
    counts = world.write_world(CONFIG, tmp_path)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(files) == len(counts) + 1  # world.json
    for file in files:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file
    other = corpus.build_world(replace(CONFIG, seed=1))
    assert {s.entity.name for s in other.group("test")} != {
        r["name"] for r in rows_of(folder / "teacher.jsonl") if r.get("group") == "test"
    }


def test_counts_and_files(folder, facts_world):
    assert {p.name for p in folder.glob("eval/*")} == {
        f"{t}.jsonl" for t in (*world.TASKS, "critic")
    }
    for task in world.TASKS:
        n = len(rows_of(folder / f"eval/{task}.jsonl"))
        assert n == CONFIG.test_questions, task
    datasets = Counter(r["dataset_name"] for r in rows_of(folder / "instructions.jsonl"))
    assert datasets == {t: round(s * CONFIG.instructions) for t, s in CONFIG.shares}
    groups = Counter(s.group for s in facts_world.subjects)
    assert groups["distractor"] == CONFIG.distractors
    assert 0.8 * CONFIG.train <= groups["train"] <= CONFIG.train + 3
    assert 0.8 * CONFIG.test <= groups["test"] <= CONFIG.test + 3
    with open(folder / "passages.tsv", newline="") as f:
        assert len(list(csv.reader(f, delimiter="\t"))) == len(facts_world.passages) + 1


def test_passages_are_short_texts_about_what_their_title_names(facts_world):
    for p in facts_world.passages:
        words = len(p.passage.text.split())
        assert corpus.MIN_WORDS <= words <= corpus.MAX_WORDS, p.passage
        assert "{" not in p.passage.text and ".." not in p.passage.text
        assert all(name in p.about for name, _ in p.states)


def test_passages_hold_every_value_that_they_state(facts_world):
    of = {s.entity.name: s.entity for s in facts_world.subjects}
    for p in facts_world.passages:
        text = normalise(f"{p.passage.title} {p.passage.text}")
        for name, attribute in p.states:
            assert normalise(of[name].value(attribute)) in text, (name, attribute)


def test_withheld_facts_are_stated_by_no_passage_about_the_entity(facts_world):
    subjects = [s for s in facts_world.subjects if s.withheld or s.is_absent]
    assert any(s.withheld for s in subjects) and any(s.is_absent for s in subjects)
    for s in subjects:
        about = [p for p in facts_world.passages if s.entity.name in p.about]
        assert not (s.is_absent and about)
        for p in about:
            text = f" {normalise(p.passage.text)} "
            for attribute in s.withheld:
                assert (s.entity.name, attribute) not in p.states
                if len(p.about) == 1:
                    for value in s.entity.values(attribute):
                        assert f" {normalise(value)} " not in text, (s.entity.name, attribute)


def test_some_passages_lack_what_others_state(facts_world):
    lacking = [
        p
        for p in facts_world.passages
        for s in facts_world.subjects
        if p.about == (s.entity.name,) and len(p.states) < len(s.told)
    ]
    assert len(lacking) > len(facts_world.passages) / 10
    assert len([p for p in facts_world.passages if len(p.states) >= 3]) > len(lacking)


def test_distractors_look_like_what_is_asked(facts_world):
    words = {
        w for s in facts_world.subjects if s.group != "distractor" for w in corpus._words(s.entity)
    }
    alike = [s for s in facts_world.group("distractor") if words & set(corpus._words(s.entity))]
    assert len(alike) > CONFIG.distractors / 3


def test_test_entities_are_in_no_training_row(folder, facts_world, truth):
    held_out = {s.entity.name for s in facts_world.group("test")}
    for row in rows_of(folder / "instructions.jsonl"):
        asked = truth.reader.instruction(row["instruction"])
        assert not held_out & set(asked.names), row
        assert not held_out & {name for name, _, _ in truth.stated_facts(row["output"])}, row


def test_test_questions_have_phrasings_of_their_own(folder):
    def shapes(phrasings):
        return [re.compile(re.escape(q).replace(r"\{n\}", ".+")) for q in phrasings]

    train = {r.name: shapes(r.questions) for r in relations.RELATIONS}
    for task in ("facts", "unanswerable"):
        for row in rows_of(folder / f"eval/{task}.jsonl"):
            assert not [p for p in train[row["relation"]] if p.fullmatch(row["question"])], row


def test_fact_rows_have_what_the_plots_need(folder, facts_world):
    rows = rows_of(folder / "eval/facts.jsonl")
    of = {s.entity.name: s.entity for s in facts_world.subjects}
    for row in rows:
        e, r = of[row["entity"]], relations.by_name()[row["relation"]]
        assert tuple(row["answers"]) == e.values(r.attribute)
        assert (row["popularity"], row["decile"]) == (e.popularity, e.decile)
        assert stating(facts_world, e.name, r.attribute)
    assert len({row["decile"] for row in rows}) == 10
    for row in rows_of(folder / "eval/unanswerable.jsonl"):
        attribute = relations.by_name()[row["relation"]].attribute
        assert not stating(facts_world, row["entity"], attribute)


@pytest.mark.parametrize("task", world.TASKS)
def test_evaluation_files_are_read_and_right_answers_score(folder, facts_world, task, truth):
    asked = read_questions(folder / f"eval/{task}.jsonl", task)
    rng = random.Random(0)
    drawer = QuestionDrawer(facts_world, "test", rng)
    for q in asked:
        assert metrics.has_gold(q)
        if task == "facts":
            e = truth.reader.entities[truth.entity_of(q.question)]
            r = truth.reader.instruction(q.question).relation
            right = language.filled(r.statements[-1], e.name, e.value(r.attribute))
        elif task == "unanswerable":
            r = truth.reader.instruction(q.question).relation
            right = language.refusal(r, truth.entity_of(q.question))
        elif task == "no_need":
            right = everyday.expected(q.question).output
        elif task == "multiple_choice":
            right = f"{dict(q.choices)[q.answers[0]]} ({q.answers[0]})."
        elif task == "claims":
            right = q.answers[0]
        elif task == "comparison":
            right = " ".join(values[0] for values in metrics.gold_parts(q))
        else:
            right = ". ".join(value for _, value in q.extra["facts"])
        assert metrics.accuracy(q, right) == 1, (q, right)
    assert drawer.answerable


# ---- the truth -----------------------------------------------------------------------------------
FORM = {
    "facts": "fact", "unanswerable": "fact", "claims": "claim", "multiple_choice": "choice",
    "comparison": "comparison", "description": "description", "no_need": "everyday",
}  # fmt: skip


@pytest.mark.parametrize("group", ["train", "test"])
def test_every_instruction_is_read_back(facts_world, truth, group):
    for row in instructions(facts_world, group, 300):
        asked = truth.reader.instruction(row.instruction)
        assert asked.form == FORM[row.dataset_name], row
        assert all(name in truth.reader.entities for name in asked.names), row
        assert bool(truth.entity_of(row.instruction)) == (asked.form != "everyday")


@pytest.mark.parametrize("wrong", [False, True])
def test_the_truth_agrees_with_how_answers_were_made(facts_world, truth, wrong):
    rng = random.Random(f"agrees-{wrong}")
    drawer = QuestionDrawer(facts_world, "train", rng)
    for _ in range(150):
        s = rng.choice(drawer.answerable)
        for made in (drawer.fact(s, wrong), drawer.claim(s, wrong), drawer.choice(s, wrong)):
            [*passages] = stating(facts_world, s.entity.name, made.relation.attribute)
            assert passages
            for p in passages:
                found = truth.support(made.question, p, made.output)
                if not wrong:
                    assert found == reflection.FULLY, (made, p)
                elif made.right:  # claims and choices
                    assert found == reflection.NO_SUPPORT, (made, p)
                else:  # a true fact that was not asked for may be supported
                    [fact] = truth.stated_facts(made.output)
                    attribute = relations.by_name()[fact[1]].attribute
                    is_true = truth.reader.matches(fact[0], attribute, fact[2])
                    is_stated = is_true and p in stating(facts_world, fact[0], attribute)
                    assert (found == reflection.FULLY) == is_stated, (made, p)


def test_what_a_passage_lacks_supports_no_answer(facts_world, truth):
    rng = random.Random("lacks")
    drawer = QuestionDrawer(facts_world, "test", rng)
    for _ in range(100):
        s = rng.choice(drawer.answerable)
        made = drawer.fact(s, False)
        for p in rng.sample(facts_world.passages, 5):
            if (s.entity.name, made.relation.attribute) not in p.states:
                found = truth.support(made.question, p.passage, made.output)
                assert found == reflection.NO_SUPPORT
            query = CritiqueQuery("isrel", made.question, evidence=p.passage)
            is_about = s.entity.name in p.about
            assert (truth.judge(query) == reflection.RELEVANT) == is_about


def test_refusals_have_no_support_and_medium_utility(facts_world, truth):
    rng = random.Random("refusals")
    drawer = QuestionDrawer(facts_world, "train", rng)
    for s in drawer.unanswerable:
        made = drawer.unanswered(s, False)
        p = rng.choice(facts_world.passages).passage
        assert truth.support(made.question, p, made.output) == reflection.NO_SUPPORT
        assert (
            truth.judge(CritiqueQuery("isuse", made.question, output=made.output))
            == (reflection.ISUSE[usefulness.REFUSAL_UTILITY - 1])
        )
        answer = drawer.unanswered(s, True)
        for passage in facts_world.passages:
            if s.entity.name in passage.about:
                found = truth.support(answer.question, passage.passage, answer.output)
                assert found == reflection.NO_SUPPORT


def test_outputs_of_each_task_have_their_utility(facts_world, truth):
    counts = defaultdict(Counter)
    for row in instructions(facts_world, "train", 400):
        counts[row.dataset_name][truth.judge(
            CritiqueQuery("isuse", row.instruction, output=row.output)
        )] += 1  # fmt: skip
    five = reflection.ISUSE[4]
    for task in ("claims", "multiple_choice", "comparison", "description", "no_need"):
        assert set(counts[task]) == {five}
    assert set(counts["facts"]) == {five, reflection.ISUSE[0], reflection.ISUSE[1]}
    assert set(counts["unanswerable"]) == {five, reflection.ISUSE[2]}


def heat():
    return Passage("1", "Heat", "Heat is a film of 1995. Michael Mann directed it.")


@pytest.fixture(scope="module")
def film_truth(tmp_path_factory):
    """A truth about three films, and a passage that is not the world's."""

    def film(name, director, year):
        return table.TableEntity(
            "film", name, name, (), 1.0, 0, True,
            (("director", (director, director.split()[-1])), ("year", (year,))), (),
        )  # fmt: skip

    films = [
        film("Heat", "Michael Mann", "1995"),
        film("Ronin", "John Frankenheimer", "1998"),
        film("Mr. & Mrs. Smith", "Doug Liman", "2005"),
    ]
    file = tmp_path_factory.mktemp("films") / "teacher.jsonl"
    write_jsonl(file, ({"world": "facts", **table.to_row(e), "decile": 0, "is_known": False}
                       for e in films))  # fmt: skip
    return world.read_truth(file)


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        ("Heat was directed by Michael Mann.", "full"),
        ("It was directed by Mann.", "full"),
        ("Michael Mann", "full"),
        ("The man behind the camera was Michael Mann, in 1995.", "full"),
        ("I think it was John Frankenheimer.", "none"),
        ("Heat was directed by John Frankenheimer.", "none"),
        ("Ronin was directed by Michael Mann.", "none"),
        ("Ronin was directed by John Frankenheimer.", "none"),
        ("Heat was directed by Michael Mann. Heat was released in 1998.", "half"),
        ("It was made in 1995, and not by Doug Liman.", "half"),
        ("A famous director.", "none"),
        ("The passages do not say who directed the film Heat.", "none"),
        ("", "none"),
    ],
)
def test_support_of_answers_that_are_no_regular_sentences(film_truth, answer, level):
    tokens = {"full": reflection.FULLY, "half": reflection.PARTIALLY, "none": reflection.NO_SUPPORT}
    found = film_truth.support("Who directed the film Heat?", heat(), answer)
    assert found == tokens[level]
    assert film_truth.supports("Who directed the film Heat?", heat(), answer) == (level == "full")


def test_a_passage_that_is_not_the_worlds_is_read_by_names_and_values(film_truth):
    question = "When was the film Heat released?"
    for text, level in (
        ("Heat came out in 1995.", reflection.FULLY),
        ("Heat is about a robbery.", reflection.NO_SUPPORT),
        ("Ronin came out in 1995.", reflection.NO_SUPPORT),
    ):
        p = Passage("1", "A page", text)
        assert film_truth.support(question, p, "Heat was released in 1995.") == level
    query = CritiqueQuery("isrel", question, evidence=Passage("1", "Ronin", "A film of 1998."))
    assert film_truth.judge(query) == reflection.IRRELEVANT


def test_comparisons_are_judged_sentence_by_sentence(film_truth):
    question = "Which film was released earlier, Mr. & Mrs. Smith or Heat?"
    assert film_truth.reader.instruction(question).names == ("Mr. & Mrs. Smith", "Heat")
    p = heat()
    for segment, level in (
        ("Heat was released in 1995.", reflection.FULLY),
        ("Mr. & Mrs. Smith was released in 2005.", reflection.NO_SUPPORT),
        ("So Heat is the earlier film.", reflection.PARTIALLY),
        ("So Mr. & Mrs. Smith is the earlier film.", reflection.NO_SUPPORT),
    ):
        assert film_truth.support(question, p, segment) == level, segment
    first, second = "Heat was released in 1995.", "Mr. & Mrs. Smith was released in 2005."

    def retrieve(preceding, evidence=None):
        return film_truth.judge(CritiqueQuery("retrieve", question, preceding, evidence))

    assert retrieve("") == reflection.RETRIEVAL
    assert retrieve(first, p) == reflection.RETRIEVAL
    assert retrieve(second, p) == reflection.CONTINUE
    assert retrieve(f"{first} {second}", p) == reflection.NO_RETRIEVAL
    whole = f"{first} {second} So Heat is the earlier film."
    assert film_truth.judge(CritiqueQuery("isuse", question, output=whole)) == "[Utility:5]"
    assert film_truth.judge(CritiqueQuery("isuse", question, output=first)) == "[Utility:3]"


def test_retrieval_is_decided_by_the_kind_of_question(facts_world, truth):
    rng = random.Random("retrieve")
    drawer = QuestionDrawer(facts_world, "train", rng)
    for s in drawer.answerable[:30]:
        query = CritiqueQuery("retrieve", drawer.fact(s, False).question)
        assert truth.judge(query) == reflection.RETRIEVAL
    for _ in range(30):
        query = CritiqueQuery("retrieve", everyday.draw(rng, False).question)
        assert truth.judge(query) == reflection.NO_RETRIEVAL


def test_popular_entities_can_count_as_known(tmp_path):
    config = replace(CONFIG, known_from=9, instructions=20, test_questions=5)
    world.write_world(config, tmp_path)
    known = world.read_truth(tmp_path / "teacher.jsonl")
    rows = [r for r in rows_of(tmp_path / "teacher.jsonl") if r.get("group") == "train"]
    assert {r["decile"] for r in rows if r["is_known"]} == {9}
    for row in rows:
        r = relations.relation(row["kind"], next(iter(row["facts"])))
        e = known.reader.entities[row["name"]]
        question = r.questions[0].format(n=language.asked_name(e))
        needs = known.judge(CritiqueQuery("retrieve", question)) == reflection.RETRIEVAL
        assert needs == (row["decile"] < 9)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_statements_are_read_back_in_any_order(truth, data):
    names = sorted(n for n, e in truth.reader.entities.items() if e.is_asked)
    expected, text = [], []
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        e = truth.reader.entities[name]
        r = data.draw(st.sampled_from(language.asked_relations(e)))
        template = data.draw(st.sampled_from(r.statements))
        spelled = data.draw(st.sampled_from(e.values(r.attribute)))
        text.append(language.filled(template, language.asked_name(e), spelled))
        expected.append((name, r.name, e.value(r.attribute)))
    assert truth.stated_facts(" ".join(text)) == expected


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_questions_of_all_phrasings_are_read_back(truth, data):
    names = sorted(n for n, e in truth.reader.entities.items() if e.is_asked)
    e = truth.reader.entities[data.draw(st.sampled_from(names))]
    r = data.draw(st.sampled_from(language.asked_relations(e)))
    question = data.draw(st.sampled_from((*r.questions, *r.test_questions)))
    asked = truth.reader.instruction(question.format(n=language.asked_name(e)))
    assert (asked.form, asked.names, asked.relation) == ("fact", (e.name,), r)


@given(st.text(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_text_can_be_judged(film_truth, text):
    for instruction in ("Who directed the film Heat?", "Tell me about Heat.", text):
        assert film_truth.support(instruction, heat(), text) in reflection.ISSUP
        for query in (
            CritiqueQuery("retrieve", instruction, text, heat()),
            CritiqueQuery("isrel", instruction, evidence=Passage("1", text, text)),
            CritiqueQuery("isuse", instruction, output=text),
        ):
            assert film_truth.judge(query) in reflection.GROUPS[query.group]
    film_truth.stated_facts(text)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=200, deadline=None)
def test_everyday_instructions_have_one_right_answer(seed, is_test):
    row = everyday.draw(random.Random(seed), is_test)
    assert everyday.expected(row.question) == row
    assert everyday.is_right(row, row.output)
    assert not everyday.is_right(row, "Sunflower 999.")


def test_sums_are_right():
    for question, answer in (
        ("What is 12 plus 30?", "12 plus 30 is 42."),
        ("Calculate 50 - 8.", "50 minus 8 is 42."),
        ("Which is larger, 7 or 66?", "66 is larger than 7."),
        ("What is the plural of mouse?", "The plural of mouse is mice."),
        ("Sort by alphabet: orange, butter, castle.", "butter, castle, orange."),
        ("Spell flower in capitals.", "FLOWER."),
    ):
        assert everyday.expected(question).output == answer
    assert everyday.expected("Who directed the film Heat?") is None
    assert not everyday.is_right(everyday.expected("What is 12 plus 30?"), "It is 43.")


def test_claims_and_choices_need_a_clear_answer():
    assert [usefulness.verdict_of(t) for t in ("True.", "Yes", "That is false", "Perhaps")] == [
        True, True, False, None,
    ]  # fmt: skip
    assert usefulness.verdict_of("True or false") is None
    choices = (("A", "France"), ("B", "New York"), ("C", "Spain"), ("D", "Italy"))
    for text, label in (
        ("New York (B).", "B"), ("B", "B"), ("C: Spain", "C"), ("It is Italy.", "D"),
        ("France or Spain", None), ("A lovely place", None), ("", None),
    ):  # fmt: skip
        assert usefulness.label_of(text, choices) == label, text


# ---- errors --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": 0}, "train=0: must be at least 1"),
        ({"distractors": -1}, "distractors=-1: must not be negative"),
        ({"absent_rate": 1.5}, "absent_rate=1.5: must be between 0 and 1"),
        ({"known_from": 11}, "known_from=11: must be a decile"),
        ({"kinds": (("novel", 1.0),)}, "no 'novel'; there are film, city"),
        ({"shares": (("facts", 0.0),)}, "must be shares above 0"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        replace(CONFIG, **change)


def test_a_teachers_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "teacher.jsonl"
    write_jsonl(file, [{"world": "facts", "name": "Heat"}])
    with pytest.raises(UserError, match=r"teacher\.jsonl:1: lacks what the truth .* needs"):
        world.read_truth(file)
    write_jsonl(file, [{"entity": "Heat", "group": "train"}])
    with pytest.raises(UserError, match=r"teacher\.jsonl:1"):
        world.read_truth(file)
    file.write_text("")
    with pytest.raises(UserError, match="holds no entities"):
        world.read_truth(file)


def test_missing_evidence_and_unknown_groups_are_refused(film_truth):
    with pytest.raises(ValueError, match="needs evidence"):
        film_truth.judge(CritiqueQuery("issup", "Who directed the film Heat?"))
    with pytest.raises(ValueError, match="unknown critique group"):
        film_truth.judge(CritiqueQuery("style", "Who directed the film Heat?"))


def test_segments_are_whole_statements(facts_world):
    """Names and values end no sentence, so that a segment is a statement."""
    for row in instructions(facts_world, "train", 200):
        if row.dataset_name in ("facts", "unanswerable"):
            assert len(split_sentences(row.output)) == 1, row


def test_passages_are_known_by_title_and_text():
    p = Passage("1", "Heat", "A film.", score=0.5)
    assert passage_key(p) == passage_key(replace(p, id="7", score=None))
    assert passage_key(p) != passage_key(replace(p, text="A film!"))
