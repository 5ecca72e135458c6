"""The worlds that a quickstart runs in: what each one asks, and who knows what is true in it.

The field `world_kind` of a config names one of KINDS, and the section `world` has its settings. A
world's teacher.jsonl names its kind in the field `world` of its first row (those of the
encyclopedia, which was the first, name none), so that other commands need the file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from selfrag_jax import artifacts
from selfrag_jax import config as configs
from selfrag_jax.errors import UserError
from selfrag_jax.records import Instruction, Passage, read_rows
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.text.sentences import split_sentences

ENCYCLOPEDIA, FACTS = "encyclopedia", "facts"
_KIND_FIELD = "world"  # of the first row of teacher.jsonl


class WorldTruth(Protocol):
    """What is true in a world, as its teacher.jsonl has it."""

    def judge(self, query: CritiqueQuery) -> str:
        """Returns the true reflection token for a critique query."""
        ...

    def supports(self, instruction: str, passage: Passage, segment: str) -> bool:
        """Returns whether a passage fully supports a segment: the judge of citations."""
        ...

    def stated_facts(self, text: str) -> list[tuple[str, str, str]]:
        """Returns (name, relation, value) of each fact that a text states."""
        ...

    def entity_of(self, question: str) -> str:
        """Returns the entity that a question is about; "" if there is none."""
        ...


@dataclass(frozen=True)
class WorldKind:
    """One kind of world. Its evaluation files are eval/TASK.jsonl, and eval/critic.jsonl."""

    name: str
    title: str  # of the report
    about: str  # one line on what is written, for the screen
    tasks: tuple[str, ...]
    long_form: tuple[str, ...]  # several segments; other tasks take one, as in the paper
    sample_task: str  # the user is offered one of its questions to ask
    # Of tasks whose right outputs no single passage supports: which training rows are right.
    right_rows: Mapping[str, Callable[[Any, Instruction], bool]]
    systems: Mapping[str, tuple[str, ...]]  # the rows of the results table: system -> its tasks
    compared: tuple[tuple[str, str, str], ...]  # differences: one system, another, and the task
    config: type[Any]  # the dataclass of the section `world`
    write_files: Callable[[Any, Path], dict[str, int]]  # (config, folder) -> counts
    read_truth: Callable[[str | Path], WorldTruth]

    def write(self, section: ConfigDict, out: Path) -> None:
        """Writes the world's files to `out`; does nothing if they are finished."""
        config = configs.build(self.config, section, "world")
        if not artifacts.is_finished(out, "world", config, {}):
            counts = self.write_files(config, out)
            artifacts.write_manifest(out, "world", config, {}, counts)


# ---- right outputs of training rows --------------------------------------------------------------
def is_useful(truth: WorldTruth, row: Instruction) -> bool:
    """Whether an output answers all that was asked, which says enough where answers are simple."""
    query = CritiqueQuery("isuse", row.full_instruction, output=row.output)
    return truth.judge(query) == reflection.ISUSE[-1]


def states_supported_facts(truth: WorldTruth, row: Instruction) -> bool:
    """Whether each sentence before the last, the conclusion, is what one of the passages says."""
    facts = [s.strip() for s in split_sentences(row.output.strip())[:-1]]
    instruction = row.full_instruction
    return bool(facts) and all(
        any(truth.supports(instruction, p, fact) for p in row.ctxs) for fact in facts
    )


# ---- the kinds -----------------------------------------------------------------------------------
class EncyclopediaTruth:
    """The fictional encyclopedia's: its language is regular, so that any sentence can be judged."""

    def __init__(self, judge: Callable[[CritiqueQuery], str]):
        self._judge = judge

    def judge(self, query: CritiqueQuery) -> str:
        return self._judge(query)

    def supports(self, instruction: str, passage: Passage, segment: str) -> bool:
        from selfrag_jax.world import truth

        return truth.fully_supports(instruction, passage, segment)

    def stated_facts(self, text: str) -> list[tuple[str, str, str]]:
        from selfrag_jax.world import truth

        return truth.stated_facts(text)

    def entity_of(self, question: str) -> str:
        from selfrag_jax.world import truth

        return truth.parse_instruction(question).name


@cache
def _encyclopedia() -> WorldKind:
    from selfrag_jax.world import questions, truth
    from selfrag_jax.world.encyclopedia import WorldConfig, build_world

    everywhere = (
        "no_retrieval", "rag_top1", "rag_topk", "selfrag_always", "selfrag_adaptive",
        "selfrag_never",
    )  # fmt: skip
    ablations = (
        "ablation_top1", "ablation_no_isrel", "ablation_no_issup", "ablation_no_isuse",
        "ablation_no_seqscore", "train_no_critic", "train_no_retriever",
    )  # fmt: skip
    return WorldKind(
        name=ENCYCLOPEDIA,
        title="Self-RAG in the synthetic world",
        about="a fictional encyclopedia, questions about it, a teacher that knows it",
        tasks=questions.TASKS,
        long_form=("two_part", "biography"),
        sample_task="long_tail",
        right_rows={"no_need": is_useful},
        systems=dict.fromkeys(everywhere, questions.TASKS)
        | dict.fromkeys(ablations, ("long_tail", "well_known")),
        compared=(
            ("selfrag_always", "rag_top1", "long_tail"),
            ("selfrag_always", "ablation_top1", "long_tail"),
            ("selfrag_always", "no_retrieval", "long_tail"),
            ("selfrag_always", "ablation_no_isrel", "long_tail"),
            ("selfrag_always", "ablation_no_issup", "long_tail"),
            ("selfrag_always", "ablation_no_isuse", "long_tail"),
            ("selfrag_always", "ablation_no_seqscore", "long_tail"),
            ("selfrag_always", "selfrag_adaptive", "long_tail"),
            ("selfrag_always", "selfrag_adaptive", "well_known"),
            ("selfrag_never", "selfrag_adaptive", "no_need"),
            ("selfrag_adaptive", "rag_top1", "claims"),
        ),
        config=WorldConfig,
        write_files=lambda config, out: questions.write_world(build_world(config), out),
        read_truth=lambda file: EncyclopediaTruth(truth.read_truth(file)),
    )


@cache
def _facts() -> WorldKind:
    from selfrag_jax.facts import world
    from selfrag_jax.facts.usefulness import is_refusal

    everywhere = (
        "base_few_shot", "base_few_shot_rag", "no_retrieval", "rag_top1", "rag_topk",
        "selfrag_always", "selfrag_adaptive", "selfrag_never",
    )  # fmt: skip
    ablations = (
        "ablation_top1", "ablation_no_isrel", "ablation_no_issup", "ablation_no_isuse",
        "ablation_no_seqscore",
    )  # fmt: skip
    return WorldKind(
        name=FACTS,
        title="Self-RAG on real facts",
        about="passages that state real facts, questions about them, a teacher with a table",
        tasks=world.TASKS,
        long_form=world.LONG_FORM,
        sample_task="facts",
        right_rows={
            "no_need": is_useful,
            "unanswerable": lambda _, row: is_refusal(row.output),
            "comparison": states_supported_facts,
        },
        systems=dict.fromkeys(everywhere, world.TASKS) | dict.fromkeys(ablations, ("facts",)),
        compared=(
            ("selfrag_always", "base_few_shot_rag", "facts"),
            ("selfrag_always", "rag_top1", "facts"),
            ("selfrag_always", "rag_topk", "facts"),
            ("selfrag_always", "no_retrieval", "facts"),
            ("selfrag_always", "ablation_top1", "facts"),
            ("selfrag_always", "ablation_no_isrel", "facts"),
            ("selfrag_always", "ablation_no_issup", "facts"),
            ("selfrag_always", "ablation_no_isuse", "facts"),
            ("selfrag_always", "ablation_no_seqscore", "facts"),
            ("selfrag_always", "selfrag_adaptive", "facts"),
            ("selfrag_adaptive", "rag_top1", "unanswerable"),
            ("selfrag_adaptive", "rag_top1", "claims"),
            ("selfrag_never", "selfrag_adaptive", "no_need"),
        ),
        config=world.FactsConfig,
        write_files=world.write_world,
        read_truth=world.read_truth,
    )


KINDS: dict[str, Callable[[], WorldKind]] = {ENCYCLOPEDIA: _encyclopedia, FACTS: _facts}


# ---- which one -----------------------------------------------------------------------------------
def kind_of_config(c: ConfigDict) -> WorldKind:
    """Returns the kind that a quickstart's config names. Raises UserError for another config."""
    configs.require_kind(c, "quickstart", "configs/tiny.py")
    configs.require(c, "world_kind", "world")
    return _kind(c.world_kind, f"config world_kind={c.world_kind!r}")


def kind_of_file(teacher: str | Path) -> WorldKind:
    """Returns the kind of world that a teacher.jsonl is of. Raises UserError for another file."""
    for where, row in read_rows(teacher):
        name = row.get(_KIND_FIELD, ENCYCLOPEDIA)
        return _kind(name, f"{where}: {_KIND_FIELD}={name!r}")
    raise UserError(f"{teacher}: holds no rows; expected the teacher.jsonl of `selfrag world`")


def read_truth(teacher: str | Path) -> WorldTruth:
    """Returns what is true in the world whose teacher.jsonl this is. Raises UserError."""
    return kind_of_file(teacher).read_truth(teacher)


def common_kind(teachers: Sequence[str | Path]) -> WorldKind:
    """Returns the kind of all these files. Raises UserError if they differ."""
    kinds = [kind_of_file(file) for file in teachers]
    for file, kind in zip(teachers, kinds, strict=True):
        if kind is not kinds[0]:
            raise UserError(
                f"{file}: is of the world {kind.name!r}, and {teachers[0]} of {kinds[0].name!r}; "
                "report each on its own"
            )
    return kinds[0]


def _kind(name: object, where: str) -> WorldKind:
    if not isinstance(name, str) or name not in KINDS:
        raise UserError(f"{where}: must be one of {', '.join(KINDS)}")
    return KINDS[name]()
