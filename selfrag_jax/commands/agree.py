"""`selfrag agree`: critic data of two teachers in, their agreement in each group out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.commands.command import INPUT, Command, Flag
from selfrag_jax.commands.train import FORMATS, is_released
from selfrag_jax.errors import UserError
from selfrag_jax.files import write_json
from selfrag_jax.text import reflection


def compare_files(
    first: str | Path,
    second: str | Path,
    out: str | Path | None = None,
    seed: int = 0,
    released: bool = False,
) -> str:
    """Compares two files of critic data; returns the tables to print and writes them to `out`.

    released: they are published files. The JSON file holds rows of results.json and the confusion
    matrices. Raises UserError if the files are the same, if no query is in both, and as reading
    critic data does.
    """
    from selfrag_jax.data.critic_examples import read_critic_examples
    from selfrag_jax.evaluation import agreement, critic_tables

    first, second = Path(first), Path(second)
    inputs = {"first": first, "second": second}
    if first.exists() and second.exists() and first.samefile(second):
        raise UserError(f"{first}: is both --first and --second; give the files of two teachers")
    _require_other_file(out, inputs)
    try:
        groups = agreement.compare_labels(
            read_critic_examples(first, released), read_critic_examples(second, released)
        )
    except agreement.NothingInCommon as e:
        raise UserError(f"{first} and {second}: {e}") from None
    rows = agreement.agreement_rows(groups, seed)
    if out:
        confusion = {
            g.group: {"labels": reflection.GROUPS[g.group], "table": g.table.tolist()}
            for g in groups
        }
        only = {
            "only_in_first": {g.group: g.only_first for g in groups},
            "only_in_second": {g.group: g.only_second for g in groups},
        }
        write_json(out, {"rows": rows, "confusion": confusion, **only})
        counts = {"queries": sum(g.n for g in groups)}
        artifacts.write_manifest(out, "agree", {"seed": seed}, inputs, counts)
    tables = [
        critic_tables.confusion_text(g.group, g.table, "first", "second") for g in groups if g.n
    ]
    return "\n\n".join([critic_tables.agreement_text(rows, groups), *tables])


def _require_other_file(out: str | Path | None, inputs: dict[str, Path]) -> None:
    if out is None:
        return
    if Path(out).is_dir():
        raise UserError(f"{out}: is a folder; --out is a file, {out}/agreement.json for example")
    for name, path in inputs.items():
        if path.exists() and Path(out).exists() and path.samefile(out):
            raise UserError(f"{out}: is both --out and --{name}; choose another --out")
    artifacts.claim_rewritten(out, "agree")


def run(values: dict[str, Any], _: list[str]) -> None:
    released = is_released(values["format"])
    print(compare_files(values["first"], values["second"], values["out"], values["seed"], released))
    if values["out"]:
        print(f"\n{values['out']}")


COMMAND = Command(
    example="selfrag agree --first=by_gpt.jsonl --second=by_llama.jsonl --out=agreement.json",
    flags=(
        Flag("first", "critic data of one teacher (JSON lines)", required=True),
        Flag(
            "second",
            "critic data of another, made from the same input; queries are matched by what was "
            "asked, in any order; collect both with --config.collect.balance=none",
            required=True,
        ),
        Flag(
            "format",
            "format of both files: own; or released, for published files",
            "own",
            group=INPUT,
            choices=FORMATS,
        ),
        Flag("out", "JSON file to write: the rows and the confusion matrices", writes=True),
        Flag("seed", "seed of the bootstrap", 0, type=int),
    ),
    run=run,
)
