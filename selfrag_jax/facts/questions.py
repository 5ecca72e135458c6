"""Training instructions about a world of facts, in the published format.

Some outputs are wrong on purpose, as in the synthetic encyclopedia (world/questions.py): a critic
that never sees a wrong output learns that fluent means supported. A wrong answer states another
value of the right type, a true fact that was not asked for, or the fact of another entity. To a
question that cannot be answered, a wrong output is any answer, true or not: no passage states it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from selfrag_jax.facts import comparisons, everyday, language, relations
from selfrag_jax.facts.comparisons import Comparison
from selfrag_jax.facts.corpus import FactsWorld, Subject, values_by_relation
from selfrag_jax.facts.relations import FactRelation
from selfrag_jax.facts.settings import TASKS
from selfrag_jax.facts.table import read_table
from selfrag_jax.records import Instruction
from selfrag_jax.text.normalising import normalise

# Share of each type of error among the wrong answers to questions about one fact.
WRONG_ANSWERS: dict[str, float] = {
    "value": 0.6,  # a wrong value of the right type
    "attribute": 0.2,  # a true fact about another attribute of the entity
    "entity": 0.2,  # a true fact about another entity
}
FIRST_STATEMENT = 0.7  # share of answers in the first of a relation's statements
TEMPTING = 2 / 3
DESCRIBED = (3, 4)  # facts of a description: at least, at most


@dataclass(frozen=True)
class Drawn:
    """A question that was drawn, with what an evaluation file says about it."""

    question: str
    output: str
    subjects: tuple[Subject, ...]
    relation: FactRelation
    choices: tuple[tuple[str, str], ...] = ()
    right: str = ""  # the right label, or the right verdict


class QuestionDrawer:
    """Draws questions about the entities of one group of a world."""

    def __init__(self, world: FactsWorld, group: str, rng: random.Random):
        self.world, self.rng, self.is_test = world, rng, group == "test"
        self.subjects = world.group(group)
        self.answerable = [s for s in self.subjects if s.told]
        self.unanswerable = [s for s in self.subjects if s.is_absent or s.withheld]
        self.described = [s for s in self.answerable if len(s.told) >= DESCRIBED[0]]
        self.pairs = self._pairs()

    def _pairs(self) -> dict[str, list[Subject]]:
        """Relation of a comparison -> the entities that have it, if there are two."""
        found = {
            c.relation: [
                s
                for s in self.answerable
                if s.entity.kind == c.asked.kind and c.asked.attribute in s.told
            ]
            for c in comparisons.COMPARISONS
        }
        return {name: members for name, members in found.items() if len(members) > 1}

    # ---- parts -----------------------------------------------------------------------------------
    def relation(self, s: Subject) -> FactRelation:
        return relations.relation(s.entity.kind, self.rng.choice(s.told))

    def question(self, s: Subject, r: FactRelation) -> str:
        phrasings = r.test_questions if self.is_test else r.questions
        name = language.asked_name(s.entity)
        return language.capitalised(self.rng.choice(phrasings).format(n=name))

    def statement(self, s: Subject, r: FactRelation, value: str = "", first: bool = False) -> str:
        """A sentence that states a fact; `value` instead of the right one."""
        template = r.statements[0]
        if not first and self.rng.random() >= FIRST_STATEMENT:
            template = self.rng.choice(r.statements)
        name = language.asked_name(s.entity)
        return language.filled(template, name, value or s.entity.value(r.attribute))

    def wrong_values(self, s: Subject, r: FactRelation, n: int) -> list[str]:
        """Draws n values of a relation that are not the entity's, in any spelling.

        They are those of the world's entities; a small world may need those of the whole table.
        """
        right = {normalise(v) for v in s.entity.values(r.attribute)}
        wrong = [v for v in self.world.values[r.name] if normalise(v) not in right]
        if len(wrong) < n:
            wrong = [v for v in _values_of_table()[r.name] if normalise(v) not in right]
        return self.rng.sample(wrong, min(n, len(wrong)))

    def wrong_value(self, s: Subject, r: FactRelation) -> str:
        """Draws a wrong value, in two cases of three a tempting one if there is one.

        Tempting is the entity's own value of the same type: its year of death for that of birth.
        """
        tempting = [
            s.entity.value(x.attribute)
            for x in relations.of_kind(s.entity.kind)
            if x.value_type == r.value_type and x != r and s.entity.values(x.attribute)
        ]
        if tempting and self.rng.random() < TEMPTING:
            return self.rng.choice(tempting)
        return self.wrong_values(s, r, 1)[0]

    def wrong_answer(self, s: Subject, r: FactRelation) -> str:
        """A sentence that does not answer the question, or wrongly."""
        error = self.rng.choices(tuple(WRONG_ANSWERS), tuple(WRONG_ANSWERS.values()))[0]
        others = [a for a in s.told if a != r.attribute]
        if error == "attribute" and others:
            return self.statement(s, relations.relation(s.entity.kind, self.rng.choice(others)))
        same = [x for x in self.answerable if x.entity.kind == s.entity.kind and x is not s]
        same = [x for x in same if r.attribute in x.told] if error == "entity" else []
        if same:
            return self.statement(self.rng.choice(same), r)
        return self.statement(s, r, self.wrong_value(s, r))

    # ---- forms -----------------------------------------------------------------------------------
    def fact(self, s: Subject, wrong: bool) -> Drawn:
        r = self.relation(s)
        output = self.wrong_answer(s, r) if wrong else self.statement(s, r)
        return Drawn(self.question(s, r), output, (s,), r)

    def unanswered(self, s: Subject, wrong: bool) -> Drawn:
        attributes = s.entity.attributes if s.is_absent else s.withheld
        r = relations.relation(s.entity.kind, self.rng.choice(attributes))
        output = language.refusal(r, language.asked_name(s.entity))
        if wrong:
            is_true = self.rng.random() < 0.5
            output = self.statement(s, r, "" if is_true else self.wrong_value(s, r))
        return Drawn(self.question(s, r), output, (s,), r)

    def claim(self, s: Subject, wrong: bool) -> Drawn:
        r, is_true = self.relation(s), self.rng.random() < 0.5
        value = s.entity.value(r.attribute) if is_true else self.wrong_value(s, r)
        frame = self.rng.choice(language.TEST_CLAIMS if self.is_test else language.CLAIMS)
        right = language.TRUE if is_true else language.FALSE
        output = language.TRUE if is_true != wrong else language.FALSE
        name = language.asked_name(s.entity)
        return Drawn(language.claim(frame, r, name, value), output, (s,), r, right=right)

    def choice(self, s: Subject, wrong: bool) -> Drawn:
        r = self.relation(s)
        options = [*self.wrong_values(s, r, 3), s.entity.value(r.attribute)]
        self.rng.shuffle(options)
        choices = tuple(zip(language.CHOICE_LABELS, options, strict=True))
        right = next(label for label, v in choices if v == s.entity.value(r.attribute))
        chosen = self.rng.choice([x for x, _ in choices if x != right]) if wrong else right
        question = " ".join([self.question(s, r), *(f"{label}: {v}" for label, v in choices)])
        # The value first: a small model copies it from the passage, then looks for its letter.
        output = f"{dict(choices)[chosen]} ({chosen})."
        return Drawn(question, output, (s,), r, choices, right)

    def comparison(self, wrong: bool) -> Drawn:
        c = comparisons.of_relation()[self.rng.choice(sorted(self.pairs))]
        pair = self._pair(c)
        names = tuple(language.asked_name(s.entity) for s in pair)
        values = tuple(s.entity.value(c.asked.attribute) for s in pair)
        phrasings = c.test_questions if self.is_test else c.questions
        question = self.rng.choice(phrasings).format(a=names[0], b=names[1])
        said = list(values)
        if wrong:
            i = self.rng.randrange(2)
            said[i] = self.wrong_value(pair[i], c.asked)
        sentences = [
            self.statement(s, c.asked, v, first=True) for s, v in zip(pair, said, strict=True)
        ]
        last = comparisons.conclusion(c, (names[0], names[1]), (values[0], values[1]))
        output = " ".join([*sentences, last])
        return Drawn(language.capitalised(question), output, pair, c.asked, right=last)

    def _pair(self, c: Comparison) -> tuple[Subject, Subject]:
        """Draws two entities; of those that may be alike, about every second pair is."""
        members, attribute = self.pairs[c.relation], c.asked.attribute
        for attempt in range(50):
            a = self.rng.choice(members)
            alike = [
                s
                for s in members
                if s is not a and s.entity.value(attribute) == a.entity.value(attribute)
            ]
            if c.order == "same" and alike and (attempt % 2 == 0 or self.rng.random() < 0.5):
                return a, self.rng.choice(alike)
            b = self.rng.choice(members)
            same = b.entity.value(attribute) == a.entity.value(attribute)
            if b is not a and (c.order == "same" or not same) and self.rng.random() < 0.5:
                return a, b
        return a, b

    def description(self, s: Subject, wrong: bool) -> Drawn:
        attributes = self.rng.sample(s.told, min(DESCRIBED[1], len(s.told)))
        asked = [relations.relation(s.entity.kind, a) for a in attributes]
        values = [""] * len(asked)
        if wrong:
            i = self.rng.randrange(len(asked))
            values[i] = self.wrong_value(s, asked[i])
        sentences = [
            self.statement(s, r, v, first=True) for r, v in zip(asked, values, strict=True)
        ]
        frames = language.TEST_DESCRIPTIONS if self.is_test else language.DESCRIPTIONS
        question = self.rng.choice(frames).format(n=language.asked_name(s.entity))
        return Drawn(question, " ".join(sentences), (s,), asked[0])


@cache
def _values_of_table() -> dict[str, list[str]]:
    return values_by_relation(read_table())


def instructions(world: FactsWorld, group: str, n: int) -> list[Instruction]:
    """Returns about n shuffled instructions with outputs about the entities of a group.

    Those of the `test` group have the phrasings of the test. Tasks for which the group has no
    entities are left out.
    """
    rng = random.Random(f"instructions-{world.config.seed}-{group}")
    drawer, rows = QuestionDrawer(world, group, rng), []
    shares = dict(world.config.shares)
    total = sum(shares.values())
    forms: dict[str, tuple[Sequence[Subject], Callable[[Subject, bool], Drawn]]] = {
        "facts": (drawer.answerable, drawer.fact),
        "unanswerable": (drawer.unanswerable, drawer.unanswered),
        "claims": (drawer.answerable, drawer.claim),
        "multiple_choice": (drawer.answerable, drawer.choice),
        "description": (drawer.described, drawer.description),
    }
    for task in TASKS:
        for i in range(round(shares.get(task, 0) / total * n)):
            wrong = rng.random() < world.config.wrong_output_rate
            if task == "no_need":
                row = everyday.draw(rng, drawer.is_test)
                text, output = row.question, row.output
            elif task == "comparison":
                if not drawer.pairs:
                    break
                drawn = drawer.comparison(wrong)
                text, output = drawn.question, drawn.output
            else:
                subjects, draw = forms[task]
                if not subjects:
                    break
                drawn = draw(rng.choice(subjects), wrong)
                text, output = drawn.question, drawn.output
            rows.append(Instruction(f"{task}-{i}", text, output, dataset_name=task))
    rng.shuffle(rows)
    return rows
