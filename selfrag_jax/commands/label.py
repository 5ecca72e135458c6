"""`selfrag label`: a critic and instructions in, generator data out (paper, Section 3.2.2)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfrag_jax import artifacts, locks
from selfrag_jax.commands import label_chunks
from selfrag_jax.commands.command import (
    DISTRIBUTED,
    MODEL,
    Command,
    Flag,
    config_flag,
    config_section,
)
from selfrag_jax.commands.embed import parse_shard
from selfrag_jax.commands.label_chunks import Chunks
from selfrag_jax.commands.model_flags import config_for
from selfrag_jax.commands.plain_data import KINDS, baseline_data
from selfrag_jax.commands.retrieve_labels import (
    NEEDS_FLAGS,
    label_settings,
    passage_finder,
    retrieve_needs,
    with_flags,
)
from selfrag_jax.data.instructions import (
    checked_instructions,
    require_passages,
)
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.files import read_json, write_json
from selfrag_jax.processes.group import current
from selfrag_jax.progress import progress
from selfrag_jax.records import (
    GeneratorExample,
    Instruction,
    write_jsonl,
)

if TYPE_CHECKING:
    from selfrag_jax.critic.labelling import FindPassages, LabelConfig, QueryJudge

_MERGING = "merging the chunks"


def label_file(
    critic_path: str | Path,
    input_path: str | Path,
    config: LabelConfig,
    out: str | Path,
    index: str | Path | None = None,
    k: int | None = None,
    needs: Mapping[str, str] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> int:
    """Labels all rows of `input_path` and writes generator data in the published format.

    index: where to find k passages for every segment that retrieves; without it, the rows' ctxs
    serve. needs: [Retrieval] or [No Retrieval] by row id, instead of the critic's decision about
    the instruction. shard: (i, n): labels every n-th chunk only; whichever of n such runs finds all
    chunks there merges them. Of the processes of a job (`--distributed`), each labels its share of
    the chunks that are missing, and process 0 merges.

    Rows that cannot be labelled go to OUT.failed.jsonl with the reason. OUT.stats.json and
    OUT.stats.svg say what the data consists of. Judgements are kept beside `out`, so no later run
    asks for one again. An interrupted run continues after the last finished chunk.

    Returns the number of examples; 0 if it is finished already, or if other shards are not. Raises
    UserError for a malformed row, for two rows with one id, and if no row has passages; StageFailed
    if no row could be labelled.
    """
    from selfrag_jax.critic.critic import check_wording

    out = Path(out)
    made = label_settings(config, needs) | ({"k": k} if index else {})
    inputs = {"critic": critic_path, "input": input_path} | ({"index": index} if index else {})
    artifacts.require_finished(critic_path, "train", "critic")
    check_wording(critic_path, config.critic.brief)
    all_parts = out.with_name(out.name + ".parts")
    # A file without a manifest is moved aside, but not from another shard that is writing both.
    merging = locks.exclusive_workdir(all_parts, _MERGING)

    def is_finished() -> bool:
        with merging if all_parts.is_dir() else nullcontext():
            return artifacts.is_finished(out, "label", made, inputs, _beside(out))

    group, identity = current(), artifacts.identity("label", made, inputs)
    group.require_same("other files", identity, "copy the critic, the input and the index to all")
    if group.from_main("labels are there", is_finished):
        artifacts.remove_parts(all_parts)
        return 0
    num_rows = _check_rows(input_path, has_index=index is not None)
    # Named by critic, config and input: chunks of another run are never continued.
    chunks = Chunks(all_parts / identity, Path(input_path), config, num_rows)

    def label(mine: list[int], left: list[int], shard: tuple[int, int]) -> None:
        _label_chunks(chunks, mine, left, critic_path, (index, k), needs, shard, out)

    n = 0
    if group.count > 1:
        share = group.index, group.count
        with locks.exclusive_workdir(chunks.folder / "shard-{}-of-{}".format(*share)):
            left = label_chunks.share_of(chunks, group)
            if left:
                label(left, left, share)
            label_chunks.send_to_main(chunks, group)
        if group.is_main:
            n = _finish(chunks, out, made, inputs)
        group.barrier("labels are written")
    else:
        _label_shard(chunks, shard, out, label)
        if not artifacts.manifest_path(out).is_file() and (missing := chunks.missing()):
            print(
                f"{out}: shard {shard[0]}/{shard[1]} is finished; {len(missing)} of "
                f"{chunks.number} chunks are missing, from other shards"
            )
            return 0
        with locks.exclusive_workdir(all_parts, _MERGING):
            if not artifacts.manifest_path(out).is_file():
                n = _finish(chunks, out, made, inputs)
    artifacts.remove_parts(all_parts)
    return n


def _label_shard(
    chunks: Chunks,
    shard: tuple[int, int],
    out: Path,
    label: Callable[[list[int], list[int], tuple[int, int]], None],
) -> None:
    """Labels the missing chunks of one shard, every n-th of all."""
    mine = [c for c in range(chunks.number) if c % shard[1] == shard[0]]
    # Else two runs of one shard would judge everything twice.
    with locks.exclusive_workdir(chunks.folder / f"shard-{shard[0]}-of-{shard[1]}"):
        left = [c for c in mine if not chunks.file(c).is_file()]
        if left and not artifacts.manifest_path(out).is_file():
            label(mine, left, shard)


def _finish(
    chunks: Chunks, out: Path, made: dict[str, Any], inputs: Mapping[str, str | Path]
) -> int:
    """Writes all files, and the manifest last; returns the number of examples."""
    counts = _merge(chunks, out)
    artifacts.write_manifest(out, "label", made, inputs, counts)
    return counts["examples"]


# ---- rows ---------------------------------------------------------------------------------------
def _check_rows(path: str | Path, has_index: bool) -> int:
    """Reads the rows once, before any work, and returns their number."""
    num_rows, has_passages = 0, has_index
    for _, row in checked_instructions(path):
        has_passages = has_passages or bool(row.ctxs)
        num_rows += 1
    require_passages(path, has_passages)
    return num_rows


def _label_chunks(
    chunks: Chunks,
    mine: list[int],
    left: list[int],
    critic_path: str | Path,
    index_and_k: tuple[str | Path | None, int | None],
    needs: Mapping[str, str] | None,
    shard: tuple[int, int],
    out: Path,
) -> None:
    """Labels the chunks `left` of those that are `mine`, and writes their files."""
    from selfrag_jax.checkpoints import loading
    from selfrag_jax.critic.critic import Critic
    from selfrag_jax.critic.judgements import (
        FOLDER,
        JudgementStore,
        StoredCritic,
        critic_digest,
    )

    find_passages = passage_finder(*index_and_k)
    loaded = loading.load(critic_path)
    critic = Critic(loaded, chunks.config.critic)
    store = JudgementStore(out.parent / FOLDER, critic_digest(loaded), shard)
    stored, num_failed = StoredCritic(critic, store), 0
    sizes = {c: chunks.size(c) for c in mine}
    done = sum(sizes.values()) - sum(sizes[c] for c in left)
    with progress("label", sum(sizes.values()), "instructions", done) as bar:
        for c, rows in chunks.read(left):
            cut_before = critic.num_cut
            examples, record = _label_rows(stored, rows, chunks.config, needs, find_passages)
            num_failed += len(record["failed"])
            record["evidence_cut"] = critic.num_cut - cut_before
            write_json(chunks.record(c), record)
            write_jsonl(chunks.file(c), examples)
            bar.advance(len(rows), f"{num_failed} failed" if num_failed else "")
    store.close()
    if stored.num_found:
        print(
            f"{stored.num_asked:,} judgements; {stored.num_found:,} more were already stored",
            file=sys.stderr,
        )


def _label_rows(
    critic: QueryJudge,
    rows: Mapping[str, Instruction],
    config: LabelConfig,
    needs: Mapping[str, str] | None,
    find_passages: FindPassages | None,
) -> tuple[list[GeneratorExample], dict[str, Any]]:
    """Labels a chunk; returns its examples, and a record of failed rows and missing passages."""
    from selfrag_jax.critic.labelling import label_rows

    place = {row.id: where for where, row in rows.items()}
    record: dict[str, Any] = {"failed": [], "nothing_found": 0}

    def on_failure(row: Instruction, reason: str) -> None:
        record["failed"].append({"id": row.id, "where": place[row.id], "reason": reason})

    def on_nothing_found(row: Instruction) -> None:
        record["nothing_found"] += 1

    examples = label_rows(
        critic, list(rows.values()), config, needs, find_passages, on_failure, on_nothing_found
    )
    return examples, record


# ---- merging -------------------------------------------------------------------------------------
def statistics_path(out: str | Path) -> Path:
    return Path(out).with_name(Path(out).name + ".stats.json")


def plot_path(out: str | Path) -> Path:
    return Path(out).with_name(Path(out).name + ".stats.svg")


def _beside(out: Path) -> tuple[Path, ...]:
    return failed_path(out), statistics_path(out), plot_path(out)


def failed_path(out: str | Path) -> Path:
    return Path(out).with_name(Path(out).name + ".failed.jsonl")


def _merge(chunks: Chunks, out: Path) -> dict[str, int]:
    """Writes all files but the manifest, the examples last. Returns what the manifest counts."""
    from selfrag_jax.critic.label_statistics import LabelStatistics, write_plot

    failed, num_cut, num_without = failed_path(out), 0, 0
    reasons = []
    for record in chunks.records():
        reasons += record["failed"]
        num_cut += record["evidence_cut"]
        num_without += record["nothing_found"]
    if reasons:
        write_jsonl(failed, reasons)
        print(
            f"{len(reasons):,} of {chunks.num_rows:,} rows could not be labelled; the first, "
            f"{reasons[0]['where']}: {reasons[0]['reason']}. All are in {failed}",
            file=sys.stderr,
        )
    if num_cut:
        print(f"evidence was cut to the critic's context in {num_cut:,} prompts", file=sys.stderr)
    if num_without:
        print(
            f"{num_without:,} rows need retrieval, but no passage was there; they are labelled "
            "[No Retrieval]",
            file=sys.stderr,
        )
    if len(reasons) == chunks.num_rows:
        raise StageFailed(f"{out}: no row could be labelled; {failed} says why")
    statistics = LabelStatistics()
    for example in chunks.examples():
        statistics.add(example)
    write_json(statistics_path(out), statistics.to_json())
    write_plot(statistics.to_json(), plot_path(out))
    n = write_jsonl(out, chunks.examples())
    counts = {"examples": n, "failed": len(reasons), "evidence_cut": num_cut}
    return counts | {"nothing_found": num_without}


def run(values: dict[str, Any], _: list[str]) -> None:
    from selfrag_jax.critic.label_statistics import table
    from selfrag_jax.critic.labelling import LabelConfig

    if values["plain"]:
        _write_plain(values)
        return
    if not values["critic"]:
        raise UserError(f"missing --critic; for example: {EXAMPLE}")
    shard = parse_shard(values["shard"])
    if shard != (0, 1) and values["distributed"]:
        raise UserError("--shard: goes without --distributed, which shares the work itself")
    if values["config"] is None:
        artifacts.require_finished(values["critic"], "train", "critic")
        values = values | {"config": config_for(values["critic"], "critic_7b")}
    config, out = with_flags(config_section(values, LabelConfig, "label"), values), values["out"]
    if values["index"] and values["k"] < 1:
        raise UserError(f"--k={values['k']}: must be at least 1")
    artifacts.require_finished(values["critic"], "train", "critic")
    # Before what takes long: `self` asks a model about all rows.
    artifacts.check_output(out, "label", {"input": values["input"]}, _beside(Path(out)))
    # One process decides: they may see no disk of each other's, and `self` asks a model.
    needs = current().from_main("needs", lambda: retrieve_needs(values, config))
    label_file(
        values["critic"],
        values["input"],
        config,
        out,
        values["index"],
        values["k"],
        needs,
        shard,
    )
    if not current().is_main:
        return
    if artifacts.manifest_path(out).is_file() and statistics_path(out).is_file():
        print(table(read_json(statistics_path(out))))
        print(out)


def _write_plain(values: dict[str, Any]) -> None:
    """--plain: outputs as they are, with or without passages in front; no critic judges."""
    judged = ("critic", "index", "distributed", *(f.name for f in NEEDS_FLAGS))
    if given := [name for name in judged if values[name] is not None]:
        raise UserError(
            f"--{given[0]}: does not go with --plain, which judges nothing and takes the rows' own "
            "passages (`selfrag retrieve` adds some)"
        )
    n = baseline_data(values["input"], values["plain"], values["seed"], values["out"])
    print(f"{values['out']}: {n} rows" if n else values["out"])


EXAMPLE = (
    "selfrag label --critic=W/critic --input=W/retrieved/instructions.jsonl "
    "--out=W/generator_data.jsonl"
)
PLAIN_EXAMPLE = "selfrag label --plain=closed --input=instructions.jsonl --out=closed_data.jsonl"
COMMAND = Command(
    example=f"{EXAMPLE}\n{PLAIN_EXAMPLE}",
    flags=(
        Flag(
            "critic",
            "workdir of a trained critic; needed unless --plain is given",
            group=MODEL,
            is_folder=True,
            in_place=True,
        ),
        Flag(
            "plain",
            "instead of a critic's labels, no reflection tokens: "
            + "; ".join(f"{kind}, {what}" for kind, what in KINDS.items()),
            group=MODEL,
            choices=tuple(KINDS),
        ),
        Flag("seed", "with --plain=rag: which rows get all passages", 0, type=int),
        Flag(
            "input",
            "instructions with outputs, and with ctxs unless --index is given",
            required=True,
        ),
        Flag(
            "index",
            "made by `selfrag index`: finds passages for each segment that needs some (default: "
            "the rows' ctxs, for all of their segments)",
            group=MODEL,
            is_folder=True,
        ),
        Flag("k", "passages for each segment, from the index", 5, type=int, group=MODEL),
        *NEEDS_FLAGS,
        Flag(
            "out",
            "generator data in the published format (JSON lines); its statistics and the rows that "
            "failed are written beside it",
            required=True,
            writes=True,
            folders_beside=("judgements",),
            each_sends="*.parts/*",
        ),
        Flag("shard", "i/n: every n-th chunk only, where n machines share a disk", "0/1"),
        DISTRIBUTED,
        config_flag(
            None,
            " (default: tiny for critics of the synthetic world, else critic_7b)",
            "tiny, critic_7b",
        ),
    ),
    run=run,
)
