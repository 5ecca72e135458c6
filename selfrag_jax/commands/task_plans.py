"""Which system is run on which task's file, with which model and settings; loads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax.commands.answer import answer_identity
from selfrag_jax.commands.model_flags import model_and_config, search_changes
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation.systems import FULL, MODEL, NDOCS, PLAIN, System
from selfrag_jax.evaluation.tasks import Task
from selfrag_jax.search.config import NEVER
from selfrag_jax.text import plain_prompts

if TYPE_CHECKING:
    from selfrag_jax.answering.config import AnswerConfig
    from selfrag_jax.answering.plain import PlainConfig

SYSTEMS_FOLDER = "systems"  # in the task's folder, for all systems but full Self-RAG


@dataclass(frozen=True)
class TaskFile:
    """A task, the file of its questions, the folder of its results, and files not taken."""

    task: Task
    input: Path
    out: Path
    others: tuple[str, ...] = ()  # names of other files that look like the task's


@dataclass(frozen=True)
class SystemRun:
    """A system on a task's file. model: its folder; changes: as its Answerer takes them."""

    where: TaskFile
    system: System
    model: Path
    index: Path | None
    config: AnswerConfig
    plain: PlainConfig | None  # of systems that are no search
    changes: dict[str, Any]
    with_mauve: bool = True  # where --mauve asks for it

    @property
    def folder(self) -> Path:
        out = self.where.out
        return out if self.system.name == FULL else out / SYSTEMS_FOLDER / self.system.name

    @property
    def reads_passages(self) -> bool:
        if self.plain is not None:
            return bool(self.changes["passages"])
        return self.changes.get("mode", self.config.search.mode) != NEVER

    @property
    def sources(self) -> dict[str, Path]:
        """The model and the index, whose hashes identify the answers."""
        uses_index = self.index is not None and (self.plain is None or self.reads_passages)
        return {"model": self.model} | ({"index": self.index} if uses_index and self.index else {})

    def identity(self) -> dict[str, Any]:
        task, config = self.where.task, self.plain or self.config
        return answer_identity(config, task.name, self.changes, task)


class Planner:
    """Turns the command's flags into runs; reads each model's config once, and no weights."""

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self.prompt = plain_prompts.load(values["plain_prompt"] or plain_prompts.SELFRAG.name)
        self._settings: dict[str, tuple[Path, Path | None, AnswerConfig]] = {}
        self._searchable: set[Path] = set()  # models that have the reflection tokens

    def refusal(self, where: TaskFile, system: System) -> str:
        """Why the system cannot be run on this task as it was asked for; "" if it can.

        Raises UserError if its model is missing.
        """
        if system.model not in (MODEL, PLAIN) and not self.values[system.model]:
            return f"needs a model of its own; give --{system.model}"
        search, settings = self._model(system)[2].search, task_changes(where.task, self.values)
        scorer = settings.get("scorer", search.scorer)
        return system.refusal(scorer, settings.get("max_depth", search.max_depth))

    def run(self, where: TaskFile, system: System) -> SystemRun:
        """Raises UserError if the model is missing, or has no reflection tokens for a search."""
        model, index, config = self._model(system)
        changes, plain = task_changes(where.task, self.values), None
        if system.is_search:
            self._require_reflection_tokens(system, model)
            changes |= dict(system.changes)
        else:
            plain, changes = self._plain(where.task, system, config, changes)
        return SystemRun(where, system, model, index, config, plain, changes)

    def _model(self, system: System) -> tuple[Path, Path | None, AnswerConfig]:
        flag = system.model
        if flag == PLAIN and not self.values[PLAIN]:
            flag = MODEL
        if flag not in self._settings:
            values = self.values | {"model": self.values[flag]}
            self._settings[flag] = model_and_config(values, calibrated=False)
        return self._settings[flag]

    def _require_reflection_tokens(self, system: System, model: Path) -> None:
        from selfrag_jax.answering import generator
        from selfrag_jax.text.reflection import MissingReflectionTokens

        if model not in self._searchable:
            try:
                generator.require_reflection_tokens(model)
            except MissingReflectionTokens as e:
                raise UserError(f"{e} (--systems={system.name}; baselines need none)") from None
            self._searchable.add(model)

    def _plain(
        self, task: Task, system: System, config: AnswerConfig, settings: dict[str, Any]
    ) -> tuple[PlainConfig, dict[str, Any]]:
        """A trained ablation is asked as it was trained, whatever --plain_prompt says."""
        from selfrag_jax.answering.plain import PlainConfig

        limit = settings.get("max_new_tokens", config.search.max_new_tokens)
        if "max_new_tokens" in settings and "max_new_tokens" not in search_changes(self.values):
            limit = task.answer_tokens
        passages = system.passages
        if passages == NDOCS:
            passages = settings.get("ndocs", config.search.ndocs)
        plain = PlainConfig(
            batch=config.batch,
            max_new_tokens=limit,
            length_bucket=config.search.length_bucket,
            prompt=self.prompt if system.model == PLAIN else plain_prompts.SELFRAG,
            dtype=config.dtype,
            quantization=config.quantization,
        )
        return plain, {"passages": passages, "max_new_tokens": limit}


def task_changes(task: Task, values: dict[str, Any]) -> dict[str, Any]:
    """The search's settings: the task's, then --config.answer.search.x=, then the search's flags.

    A setting that the user changed in the config is left to it.
    """
    given = {k: v for k, v in search_changes(values).items() if k != "seed"}  # the bootstrap's
    in_config = {
        assignment.partition("=")[0].rpartition(".")[2]
        for assignment in values["overrides"]
        if assignment.startswith("answer.search.")
    }
    settings = task.settings(given.get("scorer", ""))
    return {k: v for k, v in settings.items() if k not in in_config} | given
