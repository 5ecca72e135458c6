"""Tasks: how a benchmark's questions are asked, answered and scored, and what the paper reports.

configs/tasks/ holds one file each, with a `TASK`. A variant says whose evaluation is meant:

paper     (the default) our own wording of the instruction, and the paper's equations
released  the instruction of --instructions, the prompt's layout with its quirks, and the search,
          scores and short answers' metric of the authors' scripts. Long answers they do not score:
          ALCE and FActScore do
"""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selfrag_jax import config
from selfrag_jax.data.gold_answers import lettered
from selfrag_jax.data.question_fields import NUMBERED
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.text_metrics import SCRIPT_GOLD
from selfrag_jax.files import open_text
from selfrag_jax.records import Question

VARIANTS = ("paper", "released")
SCRIPT_METRIC = (
    "released_match"  # what run_short_form.py computes, with --metric=match, for any task
)
SHORT_FORM_METRICS = ("match", "option_accuracy")  # those that stand in its place here
LETTERS_OF_SCRIPTS = "ABCD"  # ARC's script lists A to D for every question, D empty if need be


@dataclass(frozen=True, kw_only=True)
class Task:
    """How the questions of a benchmark are asked, searched and scored."""

    name: str
    variant: str = "paper"
    # The prompt: instruction, heading, question, and a line for each choice.
    instruction: str = ""  # in front of the question; "": the question alone
    heading: str = "\n\n## Input:\n\n"  # between instruction and question
    script_name: str = ""  # what the released scripts call the task; "": their default
    # Questions and answers.
    has_choices: bool = False  # every row lists its choices
    options: tuple[str, ...] = ()  # the only answers, where the rows do not list them
    synonyms: tuple[tuple[str, str], ...] = ()  # (gold answer in the file, option)
    needs_gold: bool = True  # False: another program scores it too
    # The search, as the paper describes it, and what the scripts' published commands set otherwise.
    mode: str = "adaptive_retrieval"
    threshold: float = 0.2
    ndocs: int = 5
    max_depth: int = 1
    beam_width: int = 2
    max_new_tokens: int = 100
    weights: tuple[tuple[str, float], ...] = (("w_rel", 1.0), ("w_sup", 1.0), ("w_use", 0.5))
    released: tuple[tuple[str, Any], ...] = ()
    # The scores.
    metric: str = "accuracy"  # the main one
    # metric -> model size -> the paper's figure (Table 2), in percent
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    retriever: str = ""  # what found the passages behind the paper's figures
    # Patterns of the published files' names, in order of preference: the paper's own file first.
    files: tuple[str, ...] = ()

    @property
    def spec(self) -> str:
        return self.name if self.variant == "paper" else f"{self.name}:{self.variant}"

    def settings(self, scorer: str = "") -> dict[str, Any]:
        """The fields of SearchConfig and Weights that this task sets.

        scorer: the one that the user asked for. The released one brings its own weights.
        """
        scorer = scorer or self.variant  # variants are named after the scorers
        names = ("mode", "threshold", "ndocs", "max_depth", "beam_width", "max_new_tokens")
        found: dict[str, Any] = {"scorer": scorer} | {n: getattr(self, n) for n in names}
        return found | dict(self.released if scorer == "released" else self.weights)

    @property
    def answer_tokens(self) -> int:
        """Maximum number of tokens in a whole answer: what the scripts take, not a segment's."""
        return dict(self.released).get("max_new_tokens", self.max_new_tokens)

    @property
    def main_metric(self) -> str:
        """The metric that the task is scored with: the scripts' own in the released variant."""
        return SCRIPT_METRIC if self._is_scored_by_script else self.metric

    @property
    def _is_scored_by_script(self) -> bool:
        return self.variant == "released" and self.metric in SHORT_FORM_METRICS

    def figure_name(self, metric: str) -> str:
        """The name under which the paper's figure for a metric stands; "" where it has none."""
        if metric in ("accuracy", self.main_metric):
            return self.metric
        return "" if metric == self.metric else metric

    def figure(self, metric: str) -> dict[str, float]:
        """The paper's figures for a metric, by model size; `accuracy` is the main metric."""
        return self.figures.get(self.figure_name(metric), {})

    # ---- the prompt ------------------------------------------------------------------------------
    def ask(self, q: Question) -> Question:
        """The question with its prompt, its choices lettered, and its options.

        Raises UserError if it lacks what the task asks with.
        """
        if self.has_choices and not q.choices:
            raise UserError(
                f"question {q.id!r} has no choices, which --task={self.name} lists in its prompt"
            )
        if self.options and q.choices:
            raise UserError(
                f"question {q.id!r} has choices, but the answers of --task={self.name} are "
                f"{' or '.join(self.options)}"
            )
        number = q.extra.get(NUMBERED)
        q = self._closed(_lettered(q))
        if self._is_scored_by_script and q.answers:
            # ARC's script letters the choices and not the gold label, which may be 1 to 4.
            q = replace(q, extra=q.extra | {SCRIPT_GOLD: (number,) if number else q.answers})
        text = q.question + "".join(f"\n{label}: {text}" for label, text in self._listed(q))
        if self.instruction:
            text = f"{self.instruction}{self.heading}{text}"
        return replace(q, prompt=text, task=self.name)

    def ask_all(self, questions: Iterable[Question], where: str = "") -> list[Question]:
        """`ask` for every question; errors begin with `where`."""
        try:
            return [self.ask(q) for q in questions]
        except UserError as e:
            raise UserError(f"{where}: {e}" if where else str(e)) from None

    def prompt_identity(self) -> dict[str, Any]:
        """What of the task changes the answers, besides the search's settings."""
        names = ("variant", "instruction", "heading", "has_choices", "options")
        return {name: getattr(self, name) for name in names}

    def _listed(self, q: Question) -> tuple[tuple[str, str], ...]:
        """The choices that the prompt lists."""
        if self.variant != "released" or not q.choices:
            return q.choices
        labels = {label for label, _ in q.choices}
        added = [(c, "") for c in LETTERS_OF_SCRIPTS if c not in labels]
        return tuple(sorted([*q.choices, *added]))

    def _closed(self, q: Question) -> Question:
        """With the task's options, and the gold answer as one of them."""
        if not self.options:
            return q
        names = {gold.lower(): option for gold, option in self.synonyms}
        names |= {option.lower(): option for option in self.options}
        known = [names[a.lower()] for a in q.answers if a.lower() in names]
        if q.answers and not known:
            raise UserError(
                f"question {q.id!r}: its answer {q.answers[0]!r} is none of the options of "
                f"--task={self.name}: {', '.join(self.options)}"
            )
        return replace(q, options=self.options, answers=tuple(dict.fromkeys(known)))

    def describe(self, instructions: str | Path | None = None) -> str:
        """How the task asks, for one line on the screen. instructions: the user's file."""
        if not self.instruction:
            how = "the question alone"
        else:
            whose = instructions or "our wording"
            how = f"an instruction ({whose}), {self.heading.strip()!r}, the question"
        return f"prompt: task {self.spec}: {how}" + (", its choices" if self.has_choices else "")


def _lettered(q: Question) -> Question:
    """Numbered choices are labelled A, B, C, ..., and so are the gold answers."""
    labels = tuple(label for label, _ in q.choices)
    letters = dict(zip(labels, lettered(labels), strict=True))
    return replace(
        q,
        choices=tuple((letters[label], text) for label, text in q.choices),
        options=tuple(letters.get(o, o) for o in q.options),
        answers=tuple(letters.get(a, a) for a in q.answers),
    )


# ---- finding tasks -------------------------------------------------------------------------------
def names() -> list[str]:
    folder = config.installed_folder() / "tasks"
    return sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")


def is_known(spec: str) -> bool:
    return spec.partition(":")[0] in names()


def load(spec: str) -> Task:
    """The task that `spec` names: `popqa`, or a variant of it, `popqa:released`.

    Raises UserError if there is no such task or variant, naming a close one.
    """
    name, colon, variant = spec.partition(":")
    if name not in names():
        raise UserError(f"--task={spec}: no such task{did_you_mean(name)}")
    if colon and variant not in VARIANTS:
        raise UserError(f"--task={spec}: unknown variant; {name} has {', '.join(VARIANTS)}")
    path = config.installed_folder() / "tasks" / f"{name}.py"
    task: Task = config.import_file(path, spec).TASK
    return replace(task, variant=variant or "paper")


def did_you_mean(name: str) -> str:
    """A hint at the task that was probably meant, and all their names."""
    close = difflib.get_close_matches(name.lower(), names(), 1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (tasks: {', '.join(names())})"


# ---- instructions of a user's file ---------------------------------------------------------------
PYTHON_NAME = "TASK_INST"  # what the released repository assigns its instructions to


def with_instruction(task: Task, file: str | Path | None) -> Task:
    """The task with the instruction that the file holds for it, if it is asked with one.

    Raises UserError if there is none, and for a released variant without a file: the released
    wording is not shipped.
    """
    if file is None:
        if task.variant == "released" and task.instruction and task.script_name:
            raise UserError(
                f"--task={task.spec}: asks with the released instruction of "
                f"{task.script_name!r}, which is not part of this package; give "
                "--instructions=retrieval_lm/utils.py from a copy of the released repository, or a "
                f"JSON file of task and instruction; --task={task.name} --scorer=released takes "
                "our wording"
            )
        return task
    found = read_instructions(file)
    for name in (task.name, task.script_name):
        if name in found:
            return replace(task, instruction=found[name])
    if not task.instruction:  # asked without one, by the released scripts too
        return task
    wanted = " or ".join(dict.fromkeys(filter(None, (task.name, task.script_name))))
    raise UserError(f"{file}: holds no instruction for {wanted}; it has {', '.join(sorted(found))}")


def read_instructions(file: str | Path) -> dict[str, str]:
    """Task -> instruction, from a JSON object or from the released repository's Python source.

    Python is parsed and never run: of it, the dict literal that is assigned to TASK_INST is read.
    Raises UserError if there is none.
    """
    file = Path(file)
    with open_text(file) as (f, _):
        try:
            text = f.read()
        except UnicodeDecodeError:
            raise UserError(f"{file}: is not UTF-8 text") from None
    try:
        found = _python_literal(file, text) if file.suffix == ".py" else json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(
            f"{file}:{e.lineno}: not valid JSON ({e.msg}); expected an object of task and "
            "instruction, or Python source in a file that ends in .py"
        ) from None
    except (RecursionError, MemoryError):
        raise UserError(f"{file}: nested too deeply to hold instructions") from None
    is_text = isinstance(found, dict) and all(
        isinstance(k, str) and isinstance(v, str) and v.strip() for k, v in found.items()
    )
    if not is_text or not found:
        raise UserError(f"{file}: expected a text for each task, {{task: instruction}}")
    return found


def _python_literal(file: Path, text: str) -> Any:
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError) as e:
        raise UserError(f"{file}: is not Python source ({e})") from None
    for s in statements:
        targets = s.targets if isinstance(s, ast.Assign) else [getattr(s, "target", None)]
        if not any(isinstance(t, ast.Name) and t.id == PYTHON_NAME for t in targets):
            continue
        try:
            return ast.literal_eval(s.value)  # type: ignore[attr-defined]
        except (ValueError, TypeError, SyntaxError):
            raise UserError(
                f"{file}:{s.lineno}: {PYTHON_NAME} is computed, and this file is never run; "
                "expected a dict of literal texts"
            ) from None
    raise UserError(f"{file}: assigns no {PYTHON_NAME}, the dict of task and instruction")
