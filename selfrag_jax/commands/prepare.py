"""`selfrag prepare`: published instruction sets in, a folder of instructions and outputs out."""

from __future__ import annotations

import difflib
import io
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts, locks
from selfrag_jax.commands.command import Command, Flag
from selfrag_jax.data import prepared
from selfrag_jax.data.published_files import Faults
from selfrag_jax.data.sources.sets import SETS, SetCounts
from selfrag_jax.errors import UserError, library
from selfrag_jax.files import read_json, write_json
from selfrag_jax.progress import progress

_COUNTS = "counts.json"  # in the folder of a finished set


def prepare_sets(
    names: Sequence[str],
    manual_dir: str | Path,
    out: str | Path,
    limits: Mapping[str, int | None] | None = None,
    seed: int = 0,
) -> dict[str, SetCounts]:
    """Writes the named sets into the folder `out`; returns what became of the rows of each.

    Killed and run again, it continues after the last finished set. limits: at most so many rows of
    a set, drawn with `seed`. Raises UserError for an unknown set, a missing file, and a set of
    which no row can be used.
    """
    out, limits = Path(out), {name: (limits or {}).get(name) for name in names}
    _check(names, limits)
    library("tensorflow_datasets", "reading published sets", "train")
    if Path(manual_dir).is_file() and len(names) > 1:
        raise UserError(f"--manual_dir={manual_dir}: is a file; give one --dataset, or a folder")
    files = {name: SETS[name].find_files(manual_dir) for name in names}
    config = {"datasets": list(names), "limits": limits, "seed": seed}
    inputs: dict[str, str | Path] = {
        f"{name} {file.name}": file for name, found in files.items() for file in found
    }
    if artifacts.is_finished(out, prepared.STAGE, config, inputs):
        return _all_counts(out, names)
    artifacts.require_own_or_empty(out, prepared.STAGE)
    with locks.exclusive_workdir(out):
        artifacts.claim_workdir(out, prepared.STAGE, config, inputs)
        try:
            for name in names:
                _prepare(name, manual_dir, out, limits[name], seed)
        except UserError:
            if not any(out.glob(f"*/{_COUNTS}")):  # with another file, it may begin again
                (out / artifacts.STARTED).unlink()
            raise
        finally:
            shutil.rmtree(out / "downloads", ignore_errors=True)  # tensorflow-datasets makes it
        counts = _all_counts(out, names)
        as_json = {name: asdict(c) for name, c in counts.items()}
        artifacts.write_manifest(out, prepared.STAGE, config, inputs, as_json)
    return counts


def parse_limits(given: Sequence[str], limit: int | None) -> dict[str, int | None]:
    """Returns the limit of each set of --dataset=NAME[:N],...; `limit` where none is given."""
    limits: dict[str, int | None] = {}
    for text in given:
        name, colon, number = text.partition(":")
        if colon and not number.isdecimal():
            raise UserError(f"--dataset={text}: expected NAME or NAME:ROWS, such as {name}:10000")
        if name in limits:
            raise UserError(f"--dataset={','.join(given)}: name each set once")
        limits[name] = int(number) if colon else limit
    return limits


def _check(names: Sequence[str], limits: Mapping[str, int | None]) -> None:
    for name in names:
        if name not in SETS:
            close = difflib.get_close_matches(name, SETS, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"--dataset={name}: no such set; {hint}known: {', '.join(SETS)}")
        limit = limits[name]
        if limit is not None and limit < 1:
            raise UserError(f"{name}: a limit of {limit} rows: must be at least 1")
    if not names:
        raise UserError(f"--dataset: names no set; known: {', '.join(SETS)}")
    if prepared.GENERATOR in names and len(names) > 1:
        raise UserError(
            f"--dataset: {prepared.GENERATOR} has labelled outputs, the other sets have plain "
            "ones; give it a folder of its own"
        )


def _prepare(name: str, manual_dir: str | Path, out: Path, limit: int | None, seed: int) -> None:
    """Writes one set, unless that is done; its counts come last, and mark it as finished."""
    if (out / name / _COUNTS).is_file():
        return
    shutil.rmtree(out / name, ignore_errors=True)  # what a killed run left
    import tensorflow_datasets as tfds

    from selfrag_jax.data.sources.builders import BUILDERS

    tfds.disable_progress_bar()
    try:
        with progress(f"prepare {name}", 0, "rows") as bar:
            builder = BUILDERS[name](
                manual_dir=manual_dir, limit=limit, seed=seed, advance=bar.advance, data_dir=out
            )
            # It announces what the bar and the table say.
            with redirect_stdout(io.StringIO()):
                builder.download_and_prepare()
    except UserError:
        shutil.rmtree(out / name, ignore_errors=True)
        raise
    write_json(out / name / _COUNTS, asdict(builder.counts))


def _all_counts(out: Path, names: Sequence[str]) -> dict[str, SetCounts]:
    found = {name: read_json(out / name / _COUNTS) for name in names}
    return {n: SetCounts(**{**c, "faults": Faults(**c["faults"])}) for n, c in found.items()}


def counts_table(counts: dict[str, SetCounts]) -> str:
    """Returns a table of the rows read, kept and left out, followed by the reasons."""
    width = max(map(len, [*counts, "all"]))
    lines = [f"{'set':<{width}} {'read':>10} {'usable':>10} {'kept':>10} {'left out':>10}"]
    numbers = {n: (c.read, c.usable, c.kept, c.faults.total) for n, c in counts.items()}
    if len(numbers) > 1:
        read, usable, kept, left_out = zip(*numbers.values(), strict=True)
        numbers["all"] = (sum(read), sum(usable), sum(kept), sum(left_out))
    for name, row in numbers.items():
        lines.append(f"{name:<{width}} " + " ".join(f"{n:>10,}" for n in row))
    for name, c in counts.items():
        lines += [f"{name}: left out: {reason}" for reason in c.faults.by_frequency()]
    return "\n".join(lines)


def run(values: dict[str, Any], _: list[str]) -> None:
    limits = parse_limits(values["dataset"], values["limit"])
    names, out = list(limits), values["out"]
    counts = prepare_sets(names, values["manual_dir"], out, limits, values["seed"])
    print(counts_table(counts))
    print(out)


def _set_lines() -> str:
    """Each set, the files that are looked for, and where they are published."""
    return "".join(
        f"\n      {s.name}: {' or '.join(s.files)}, from {s.published_at}" for s in SETS.values()
    )


COMMAND = Command(
    example="selfrag prepare --dataset=gpt4_alpaca:26000,fever:10000 "
    "--manual_dir=downloads --out=W/instructions",
    flags=(
        Flag(
            "dataset",
            "names with commas between, or NAME:ROWS to draw so many:" + _set_lines(),
            required=True,
            type=tuple,
        ),
        Flag(
            "manual_dir",
            "folder with the published files (or with a folder of each set's name); for one set, "
            "its file",
            required=True,
        ),
        Flag(
            "out",
            "folder to write; next: `selfrag retrieve --input=` it for collect, or label with an "
            "index",
            required=True,
            writes=True,
        ),
        Flag("limit", "at most so many rows of each set that has no number of its own", type=int),
        Flag("seed", "seed of the draw", 0, type=int),
    ),
    run=run,
)
