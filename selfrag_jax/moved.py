"""Old module paths, which still import with a warning that names the new ones.

`MOVED` is the whole list. An old module finds its names in the new modules, in their order.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "aot": ("compilation.compile", "compilation.train", "compilation.collectives"),
    "aot_decode": ("compilation.decode",),
    "aot_gpu": ("compilation.gpu",),
    "critique": (),
    "critique.collect": ("critic.collecting", "critic.teachers.rule", "commands.collect"),
    "critique.label": ("critic.labelling", "critic.critic", "commands.label"),
    "critique.sentences": ("text.sentences",),
    "data.critic": ("data.critic_examples",),
    "data.generator": ("data.generator_examples",),
    "decoding": (),
    "decoding.answer": (
        "answering.selfrag", "answering.records", "answering.config", "answering.loading",
    ),
    "decoding.batch": ("commands.answer",),
    "decoding.beam_search": ("search.paper", "search.config", "search.tree"),
    "decoding.citations": ("answering.citations",),
    "decoding.engine": ("engine.engine", "engine.requests", "engine.shapes"),
    "decoding.released": ("search.released.search",),
    "decoding.scoring": ("search.scoring", "search.released.scores"),
    "decoding.segments": ("engine.segments",),
    "decoding.show": ("answering.terminal",),
    "decoding.slots": ("engine.programs",),
    "evaluation.baselines": ("answering.plain",),
    "evaluation.evaluate": ("evaluation.scores", "commands.evaluate"),
    "memory": ("allocator",),
    "models.checkpoints": (
        "checkpoints.loading", "checkpoints.saving", "checkpoints.workdirs",
        "checkpoints.integrity", "checkpoints.vocabulary_rows",
    ),
    "models.config_json": ("huggingface.config_json",),
    "models.convert": ("checkpoints.converting",),
    "models.fingerprints": ("checkpoints.fingerprints",),
    "models.huggingface": ("huggingface.weights", "huggingface.hub"),
    "models.opened": ("checkpoints.orbax_streaming",),
    "prompts": ("text.prompts",),
    "reflection": ("text.reflection",),
    "retrieval.embed": ("retrieval.encoders", "commands.embed"),
    "stages": ("commands",),
    "tokenizer": ("text.tokenizer",),
    "training.distributed": ("processes.joining",),
    "training.metrics": ("training.log", "training.loss"),
    "training.stage": ("commands.train", "training.starting_model", "processes.joining"),
    "vocabulary": ("text.vocabularies",),
    "world.base": ("base_model.source",),
    "world.documents": ("base_model.documents",),
    "world.drawer": ("base_model.sampler",),
    "world.gate": ("base_model.gate",),
    "world.make_base": ("base_model.make",),
    "world.quickstart": ("commands.quickstart",),
}  # fmt: skip
# Names that changed with their module.
RENAMED = {
    "BadInput": "UserError",
    "BeamSearch": "PaperSearch",
    "Failed": "StageFailed",
    "Search": "SearchTree",
    "Segment": "AnswerSegment",
    "prepare": "prepare_model",
    "train_stage": "train_model",
}
_PACKAGE = __package__


class _OldModules(MetaPathFinder, Loader):
    """Finds modules at their old paths; asked last, for paths that exist nowhere else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix(f"{_PACKAGE}.")
        if old == fullname or old not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=not MOVED[old])

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__.removeprefix(f"{_PACKAGE}.")]

        def find(name: str) -> Any:
            if not name.startswith("__"):
                for target in new:
                    found = importlib.import_module(f"{_PACKAGE}.{target}")
                    for candidate in (name, RENAMED.get(name, name)):
                        if hasattr(found, candidate):
                            return getattr(found, candidate)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        if new:
            paths = " and ".join(f"{_PACKAGE}.{target}" for target in new)
            warnings.warn(f"{module.__name__} is now {paths}", DeprecationWarning, stacklevel=2)
        module.__dict__["__getattr__"] = find


def install() -> None:
    sys.meta_path.append(_OldModules())
