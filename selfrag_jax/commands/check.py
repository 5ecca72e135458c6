"""`selfrag check`: a file in; what is wrong with it, and what a model would see of it, out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ml_collections import ConfigDict

from selfrag_jax import artifacts
from selfrag_jax.commands.command import Command, Flag, config_flag, given, load_config
from selfrag_jax.commands.embed import CORPUS_FLAGS, corpus_config
from selfrag_jax.commands.train import FORMATS, is_released
from selfrag_jax.errors import OnError, UserError
from selfrag_jax.files import write_json
from selfrag_jax.progress import Progress, progress

if TYPE_CHECKING:
    from selfrag_jax.commands.check_text import ShownRow
    from selfrag_jax.data.file_kinds import FileRow
    from selfrag_jax.data.file_summary import ExampleBuilder, FileSummary, Problems
    from selfrag_jax.retrieval.corpus import CorpusConfig
    from selfrag_jax.text.tokenizer import Tokenizer

T = TypeVar("T")

# Where a config says to how many tokens a row of each kind is cut; the first that it has.
_LENGTHS = {
    "critic": ("critic.length",),
    "generator": ("generator.length",),
    "instructions": ("generator.length",),
    "questions": ("answer.max_length", "generator.length"),
    "corpus": ("answer.max_length", "generator.length"),
}


@dataclass(frozen=True)
class CheckSettings:
    """What a file is checked as."""

    kind: str  # of data.file_kinds.KINDS
    released: bool
    length: int | None  # tokens
    counts_tokens: bool
    tokenizer: Tokenizer
    tokenizer_name: str
    brief: bool
    mask: str
    reading: CorpusConfig | None = None

    def rows(self, path: str | Path, on_error: OnError) -> Iterator[FileRow]:
        from selfrag_jax.data.file_kinds import file_rows

        return file_rows(self.kind, path, self.released, on_error, self.reading)

    def builder(self) -> ExampleBuilder:
        from selfrag_jax.data.file_summary import ExampleBuilder

        return ExampleBuilder(self.tokenizer, self.brief, self.mask)


def check_file(path: str | Path, s: CheckSettings) -> tuple[FileSummary, Problems, str]:
    """Reads all rows; returns what they are, what is wrong, and why the reading stopped, if it did.

    Raises UserError if there are no rows, or none could be read.
    """
    from selfrag_jax.data.file_kinds import UNIQUE_IDS
    from selfrag_jax.data.file_summary import FileSummary, Problems

    summary, problems, stopped = FileSummary(), Problems(), ""
    build = s.builder().build
    with progress("check", 0, "rows") as bar:
        try:
            for row in s.rows(path, problems):
                wanted = row.record is not None and summary.wants_example(s.counts_tokens)
                summary.add(row, build(row.record) if wanted else None, s.counts_tokens)
                bar.advance(note=f"{problems.count:,} problems" if problems.count else "")
        except UserError as e:
            if not summary.num_good and not problems.count:
                raise
            stopped = str(e)
    if not summary.num_good + summary.num_left_out + problems.count:
        raise UserError(f"{path}: holds no rows")
    if s.kind in UNIQUE_IDS and not stopped:
        _report_repeated_ids(path, s, summary, problems)
    return summary, problems, stopped


def _report_repeated_ids(
    path: str | Path, s: CheckSettings, summary: FileSummary, problems: Problems
) -> None:
    """Reads the file again if ids occur twice: to find them is cheaper than to remember all."""
    from selfrag_jax.data.file_summary import repeated_places

    _, repeats, hashes = summary.repeated_ids()
    if not repeats:
        return
    named = 0
    with progress("find repeated ids", 0, "rows") as bar:
        rows = _counted(s.rows(path, lambda _: None), bar)
        for where, id_, first in repeated_places(rows, hashes):
            problems(UserError(f"{where}: id {id_!r} is also the id of {first}"))
            named += 1
    problems.count += repeats - named
    summary.num_good -= repeats


def _counted(rows: Iterable[T], bar: Progress) -> Iterator[T]:
    """Yields the rows, and counts them on the bar."""
    for row in rows:
        bar.advance()
        yield row


def _settings(path: str, values: dict[str, Any]) -> tuple[CheckSettings, str]:
    """What to check the file as, and what told its kind; "" if a flag did."""
    from selfrag_jax.data.file_kinds import KINDS, guess_kind

    kind, told_by = values["for"], ""
    if kind is None:
        kind, told_by = guess_kind(path)
    elif kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"--for={kind}: must be one of {', '.join(KINDS)}{hint}")
    released = is_released(values["format"])
    if released and kind not in ("critic", "generator"):
        raise UserError(f"--format=released: is for critic and generator data, not for {kind}")
    if values["length"] is not None and values["length"] < 1:
        raise UserError(f"--length={values['length']}: must be at least 1")
    if kind != "corpus" and (wrong := given(values, CORPUS_FLAGS)):
        raise UserError(f"--{next(iter(wrong))}: is for a corpus, not for {kind}")
    c = load_config(values)
    tokenizer, name = _tokenizer(values["model"], c)
    length = values["length"]
    if length is None:
        length = next((n for key in _LENGTHS[kind] if (n := _field(c, key, None))), None)
    settings = CheckSettings(
        kind,
        released,
        length,
        values["tokens"],
        tokenizer,
        name,
        brief=_field(c, "label.critic.brief", False),
        mask=_field(c, "generator.mask", "each"),
        reading=corpus_config(values) if kind == "corpus" else None,
    )
    return settings, told_by


def _field(c: ConfigDict, key: str, default: Any) -> Any:
    """A field of a config that may lack it; sections are separated by dots."""
    value: Any = c
    for name in key.split("."):
        if name not in value:
            return default
        value = value[name]
    return value


def _tokenizer(model: str | None, c: ConfigDict) -> tuple[Tokenizer, str]:
    """The tokenizer of a model or of the config's base, with reflection tokens; and its name."""
    from selfrag_jax.checkpoints.loading import read_tokenizer
    from selfrag_jax.huggingface import hub
    from selfrag_jax.training.starting_model import embedded_base

    base = _field(c, "base", "embedded")
    if model:
        folder, name, mode = hub.model_folder(model), model, None
    elif base not in ("embedded", "scratch") and Path(str(base)).exists():
        folder, name, mode = Path(base), str(base), _field(c, "tokenizer", None)
    else:
        folder, mode = embedded_base(), None
        name = (
            "the quickstart's small base, which cuts English finer than large models do; give "
            "--model= to count with another"
        )
    return read_tokenizer(folder, mode).with_reflection_tokens(), name


def _report(
    path: str, s: CheckSettings, summary: FileSummary, problems: Problems, stopped: str
) -> dict[str, Any]:
    """The report as JSON data."""
    distinct, repeats, _ = summary.repeated_ids()
    return {
        "file": path,
        "for": s.kind,
        "format": "released" if s.released else "own",
        "rows": summary.num_good + summary.num_left_out + problems.count,
        "good": summary.num_good,
        "left_out": summary.num_left_out,
        "problems": {"count": problems.count, "first": problems.first},
        "stopped": stopped,
        "ids": {"distinct": distinct, "repeated": repeats},
        "notes": dict(summary.notes.most_common()),
        "labels": {g: dict(counts.most_common()) for g, counts in summary.labels.items() if counts},
        "tokenizer": s.tokenizer_name,
        "tokens": summary.lengths(s.length),
    }


def _shown_rows(s: CheckSettings, summary: FileSummary) -> list[ShownRow]:
    from selfrag_jax.commands.check_text import ShownRow  # imports rich

    runs = s.builder().runs
    return [ShownRow(where, len(e.tokens), runs(e)) for where, e in summary.shown]


def run(values: dict[str, Any], files: list[str]) -> None:
    from selfrag_jax.commands.check_text import show

    if len(files) != 1:
        raise UserError(
            f"one file is checked, found {len(files)}; for example: {COMMAND.examples[0]}"
        )
    [path] = files
    if not path:
        raise UserError(f"the file's name is empty; for example: {COMMAND.examples[0]}")
    out, inputs = values["out"], {"file": path}
    if out:
        artifacts.check_output(out, "check", inputs)
    settings, told_by = _settings(path, values)
    summary, problems, stopped = check_file(path, settings)
    report = _report(path, settings, summary, problems, stopped)
    if out:  # first: whoever reads the screen may stop reading
        artifacts.claim_rewritten(out, "check")
        write_json(out, report)
        made = {"for": settings.kind, "format": report["format"]}
        artifacts.write_manifest(out, "check", made, inputs, {"problems": problems.count})
    show(report, told_by, _shown_rows(settings, summary))
    if out:
        print(f"\n{out}")
    if stopped:
        raise UserError(f"{stopped}; what comes after it was not read")
    bad, rows = problems.count, report["rows"]
    if settings.released and 2 * bad > rows:
        raise UserError(
            f"{path}: {bad:,} of {rows:,} rows are malformed, which is too many to train with; is "
            "it the right file?"
        )
    if bad and not settings.released:
        raise UserError(f"{path}: {bad:,} of {rows:,} rows cannot be used; mend or remove them")
    if not summary.num_good:
        raise UserError(f"{path}: all rows would be left out")


COMMAND = Command(
    example="selfrag check my_questions.jsonl\n"
    "selfrag check generator_data.jsonl --for=generator --config=generator_7b --model=my_llama",
    flags=(
        Flag(
            "for",
            "what the file is for: instructions, critic, generator, questions or corpus "
            "(default: told by its first row)",
            choices=("instructions", "critic", "generator", "questions", "corpus"),
        ),
        Flag(
            "format",
            "own; or released: as `selfrag train --format=released` reads it",
            "own",
            choices=FORMATS,
        ),
        Flag(
            "model",
            "whose tokenizer counts: a folder, a training workdir or a hub name (default: the "
            "config's base, if it is here)",
            in_place=True,
        ),
        Flag("length", "rows of more tokens are counted (default: the config's)", type=int),
        Flag("tokens", "count tokens; false is faster for a large corpus", True, type=bool),
        *CORPUS_FLAGS,
        Flag("out", "JSON file to write: the same report", writes=True),
        config_flag(note="; prompts, mask and length are those that it trains with"),
    ),
    run=run,
    positional="FILE",
    positional_paths=True,
)
