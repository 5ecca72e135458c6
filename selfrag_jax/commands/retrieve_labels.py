"""`selfrag label --retrieve_labels`: who decides whether an instruction needs retrieval.

See critic/needs.py for the choices.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax import artifacts
from selfrag_jax.commands.command import Flag
from selfrag_jax.data.instructions import checked_instructions, require_passages
from selfrag_jax.errors import UserError
from selfrag_jax.progress import progress
from selfrag_jax.records import Instruction, read_rows, write_jsonl

if TYPE_CHECKING:
    from selfrag_jax.critic.labelling import FindPassages, LabelConfig
    from selfrag_jax.critic.needs import Calibration, Need

_QUERIES = 256  # searched at once
# Fields of LabelConfig's critic that change how fast it judges, but not what.
_RUNTIME_ONLY = ("min_shared",)

_NEEDS = "Which instructions need retrieval"
NEEDS_FLAGS = (
    Flag(
        "retrieve_labels",
        "who decides whether an instruction needs retrieval: critic, teacher, or self, what the "
        "generator's own base does not know (default: the config's)",
        group=_NEEDS,
        choices=("critic", "teacher", "self"),
    ),
    Flag(
        "teacher_labels",
        "with --retrieve_labels=teacher: critic data that `selfrag collect` wrote for the input",
        group=_NEEDS,
    ),
    Flag(
        "self_model",
        "with --retrieve_labels=self: the generator's base, as a training workdir, a Hugging Face "
        "folder, a hub name, or embedded",
        group=_NEEDS,
    ),
    Flag(
        "need_threshold",
        "with --retrieve_labels=self: long outputs retrieve where a passage adds more than this to "
        "the log-likelihood per token (default: calibrated on short outputs)",
        group=_NEEDS,
        type=float,
    ),
)
# The choice that each flag belongs to.
_FLAG_OF = {"teacher_labels": "teacher", "self_model": "self", "need_threshold": "self"}


def with_flags(config: LabelConfig, values: dict[str, Any]) -> LabelConfig:
    """Returns the config with the flags' values.

    Raises UserError if a flag is missing, or belongs to another choice.
    """
    if values["retrieve_labels"] is not None:
        config = replace(config, retrieve_labels=values["retrieve_labels"])
    choice = config.retrieve_labels
    for flag, needed_by in _FLAG_OF.items():
        if values[flag] is not None and choice != needed_by:
            raise UserError(
                f"--{flag} is for --retrieve_labels={needed_by}; here it is {choice}: leave the "
                "flag out, or choose the other"
            )
    if choice == "teacher" and not values["teacher_labels"]:
        raise UserError(
            "--retrieve_labels=teacher: give --teacher_labels, critic data that `selfrag collect` "
            "wrote for the same instructions"
        )
    if choice == "self":
        if not values["self_model"]:
            raise UserError(
                "--retrieve_labels=self: give --self_model, the base that the generator will be "
                "trained from"
            )
        if config.needs is None:
            raise UserError(
                "--retrieve_labels=self: the config has no section label.needs; take "
                "--config=critic_7b, or add the section as there"
            )
        if values["need_threshold"] is not None:
            needs = replace(config.needs, threshold=values["need_threshold"])
            config = replace(config, needs=needs)
    return config


def retrieve_needs(values: dict[str, Any], config: LabelConfig) -> dict[str, str] | None:
    """Returns [Retrieval] or [No Retrieval] by the row's id; None where the critic decides."""
    from selfrag_jax.critic.needs import teacher_needs

    if config.retrieve_labels == "critic":
        return None
    if config.retrieve_labels == "teacher":
        rows = _read_rows(values["input"])
        return teacher_needs(values["teacher_labels"], rows)
    index, k = values["index"], values["k"]
    inputs = {"input": values["input"]} | ({"index": index} if index else {})

    def rows_to_decide() -> list[Instruction]:
        rows = with_passages(_read_rows(values["input"]), index, k)
        require_passages(values["input"], any(row.ctxs for row in rows))
        return rows

    out = Path(values["out"]).with_name(Path(values["out"]).name + ".needs.jsonl")
    settings = {"k": k} if index else {}
    return self_needs(values["self_model"], rows_to_decide, config, out, inputs, settings)


def self_needs(
    model: str | Path,
    rows: Callable[[], Sequence[Instruction]],
    config: LabelConfig,
    out: str | Path,
    inputs: Mapping[str, str | Path],
    settings: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Returns what the base `model` needs retrieval for, by the row's id; writes it to `out`.

    The file has id, token, reason, value and answer of each row. Finished, it is read; an
    interrupted run continues after the last finished chunk, and of several processes one does the
    work. inputs: the files that the rows come from; settings: how they were made. Raises UserError
    if two rows share an id, or no threshold can be calibrated.
    """
    from selfrag_jax.checkpoints import loading
    from selfrag_jax.critic.needs import check_ids, decide
    from selfrag_jax.critic.self_knowledge import SelfModel
    from selfrag_jax.huggingface import hub
    from selfrag_jax.training.starting_model import embedded_base

    if config.needs is None:
        raise UserError("config label: lacks the section needs")
    folder = embedded_base() if model == "embedded" else hub.model_folder(model)
    made = {"retrieve_labels": "self", "needs": asdict(config.needs), **(settings or {})}
    inputs = {**inputs, "self_model": folder}
    parts = Path(out).with_name(Path(out).name + ".parts")
    if not artifacts.is_finished(out, "label", made, inputs):
        with artifacts.exclusive_workdir(parts, "deciding where retrieval is needed"):
            if not artifacts.is_finished(out, "label", made, inputs):
                some = rows()
                check_ids(some)
                base = SelfModel(loading.load(folder), config.needs)
                # Neither answers nor gains depend on the threshold: another one continues.
                asked = {**made, "needs": {**made["needs"], "threshold": None}}
                chunks = parts / artifacts.identity(
                    "label", asked | {"chunk": config.chunk}, inputs
                )
                decided = decide(base, some, config.needs, chunks, config.chunk)
                _write_decisions(out, *decided, made, inputs)
        artifacts.remove_parts(parts)
    return {row["id"]: row["token"] for _, row in read_rows(out)}


def _write_decisions(
    out: str | Path,
    decisions: Sequence[Need],
    calibration: Calibration | None,
    made: Mapping[str, Any],
    inputs: Mapping[str, str | Path],
) -> None:
    """Writes the file and its manifest, and prints what was decided."""
    write_jsonl(out, decisions)
    counts: dict[str, Any] = {"rows": len(decisions), **Counter(d.token for d in decisions)}
    counts |= Counter(d.reason for d in decisions)
    if calibration is not None:
        counts["calibration"] = asdict(calibration)
    artifacts.write_manifest(out, "label", made, inputs, counts)
    print(_summary(out, counts), file=sys.stderr)


def _read_rows(path: str | Path) -> list[Instruction]:
    """The rows of the input, those that labelling will refuse too."""
    return [row for _, row in checked_instructions(path, announce=False)]


def passage_finder(index: str | Path | None, k: int | None) -> FindPassages | None:
    """Returns a function that finds k passages for each of several queries; None without index."""
    if index is None or k is None:
        return None
    from selfrag_jax.retrieval.retriever import IndexRetriever, search_passages

    retriever = IndexRetriever(index)

    def find_passages(queries):
        starts = range(0, len(queries), _QUERIES)
        slices = (queries[start : start + _QUERIES] for start in starts)
        return [found for some in slices for found in search_passages(retriever, some, k)]

    return find_passages


def with_passages(
    rows: list[Instruction], index: str | Path | None, k: int | None
) -> list[Instruction]:
    """Returns the rows, those without passages with k from the index, if there is one."""
    missing = [i for i, r in enumerate(rows) if not r.ctxs]
    if (find := passage_finder(index, k)) is None or not missing:
        return rows
    with progress("retrieve", len(missing), "instructions") as bar:
        for start in range(0, len(missing), _QUERIES):
            some = missing[start : start + _QUERIES]
            found = find([rows[i].full_instruction for i in some])
            for i, passages in zip(some, found, strict=True):
                rows[i] = replace(rows[i], ctxs=tuple(passages))
            bar.advance(len(some))
    return rows


def _summary(out: str | Path, counts: dict[str, Any]) -> str:
    text = (
        f"{out}: retrieval is needed for {counts.get('[Retrieval]', 0):,} of {counts['rows']:,} "
        f"rows ({counts.get('right', 0):,} short outputs known, {counts.get('wrong', 0):,} not, "
        f"{counts.get('gain', 0):,} long)"
    )
    if found := counts.get("calibration"):
        accuracy = found["balanced_accuracy"]
        known = "unknown" if accuracy is None else f"{100 * accuracy:.1f}%"
        text += (
            f"; threshold {found['threshold']:.4g}, balanced accuracy {known} on {found['rows']} "
            f"dev rows, of which the base has {found['wrong']} wrong"
        )
    return text


def label_settings(config: LabelConfig, needs: Mapping[str, str] | None) -> dict[str, Any]:
    """Returns the config as the manifest of labelled data records it.

    The decisions that `needs` holds stand for the settings that made them. Raises UserError if the
    config wants them and there are none, and for one that is no such token.
    """
    from selfrag_jax.text import reflection

    if needs is None and config.retrieve_labels != "critic":
        raise UserError(
            f"config label: retrieve_labels={config.retrieve_labels!r} wants decisions, and none "
            "were given"
        )
    made = asdict(config)
    made["critic"] = {n: v for n, v in made["critic"].items() if n not in _RUNTIME_ONLY}
    del made["needs"]
    if needs is None:
        del made["retrieve_labels"]  # as before there was a choice
    else:
        known = (reflection.RETRIEVAL, reflection.NO_RETRIEVAL)
        if wrong := next((item for item in needs.items() if item[1] not in known), None):
            raise UserError(f"needs: {wrong[1]!r} of row {wrong[0]!r} must be {' or '.join(known)}")
        text = json.dumps(sorted(needs.items()))
        made["needs"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return made
