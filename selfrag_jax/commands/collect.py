"""`selfrag collect`: instructions with passages in, critic data out (paper, Section 3.2.1)."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selfrag_jax import artifacts
from selfrag_jax.commands.command import (
    INPUT,
    Command,
    Flag,
    config_flag,
    config_section,
    flags_of,
    given,
)
from selfrag_jax.commands.worlds import read_truth
from selfrag_jax.critic import collecting
from selfrag_jax.critic.collecting import CollectConfig
from selfrag_jax.critic.teachers import asking, chat, cost
from selfrag_jax.critic.teachers.batch import BatchTeacher
from selfrag_jax.critic.teachers.cache import default_path, open_cache, teacher_name
from selfrag_jax.critic.teachers.cost import Budget, CostConfig
from selfrag_jax.critic.teachers.endpoint import EndpointTeacher
from selfrag_jax.critic.teachers.prompting import Templates
from selfrag_jax.critic.teachers.rule import RuleTeacher
from selfrag_jax.critic.teachers.settings import EndpointConfig
from selfrag_jax.critic.teachers.teacher import Request, Teacher, Verdict
from selfrag_jax.data.instructions import read_instructions, require_passages
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.files import read_json
from selfrag_jax.progress import Progress, progress
from selfrag_jax.records import write_jsonl
from selfrag_jax.storage.copies import is_copy

_TEACHER = "Teacher"
ENDPOINT_FLAGS = tuple(
    replace(flag, is_url=flag.name == "base_url")
    for flag in flags_of(EndpointConfig, "collect.endpoint", _TEACHER)
)
COST_FLAGS = flags_of(CostConfig, "", "Cost")


@dataclass(frozen=True)
class AskingConfig:
    """How replies are asked for and paid; none of it shapes what comes out."""

    cache: str | Path = ""  # default: the user's
    templates: str | Path = ""  # default: the built-in ones
    costs: CostConfig = field(default_factory=CostConfig)
    dry_run: bool = False
    retry_failed: bool = False


def collect_critiques(
    input_path: str | Path,
    truth: str | Path | None,
    config: CollectConfig,
    out: str | Path,
    how: AskingConfig | None = None,
) -> int:
    """Asks the teacher about the input's rows and writes critic data; returns the number of rows.

    input_path: instructions with `ctxs`, as `selfrag retrieve` writes them; truth: the world's
    teacher.jsonl, for the rule teacher. Does nothing, and returns 0, if `out` is already finished,
    or after a dry run, which prints an estimate. Raises StageFailed if the teacher stops, or has no
    answer to any query.
    """
    out, how = Path(out), how or AskingConfig()
    inputs: dict[str, str | Path] = {"input": input_path}
    made: dict[str, Any] = {**config.made_from(), "limit": None}  # kept for old manifests
    if config.teacher == "rule":
        if not truth:
            raise UserError(
                "--teacher=rule needs --truth, the teacher.jsonl of `selfrag world`; for your own "
                "data, give --teacher=openai, openai-batch or local"
            )
        inputs["truth"] = truth
        if how.dry_run:
            raise UserError("--dry_run: the rule teacher costs nothing")
        if artifacts.is_finished(out, "collect", made, inputs, _beside(out)):
            return 0
        teacher = RuleTeacher(read_truth(truth).judge, config.teacher_error_rate, config.seed)
        requests = _requests(input_path, config)
        verdicts = _ask_rule(teacher, requests, config)
        return _write(out, requests, verdicts, config, made, inputs)
    return _collect_from_model(out, config, made, inputs, how)


def _requests(input_path: str | Path, config: CollectConfig) -> list[Request]:
    rows = read_instructions(input_path)
    require_passages(input_path, any(row.ctxs for row in rows))
    return collecting.choose_requests(rows, config)


def _ask_rule(
    teacher: RuleTeacher, requests: Sequence[Request], config: CollectConfig
) -> list[Verdict]:
    verdicts: list[Verdict] = [Verdict(None)] * len(requests)
    with progress("collect", len(requests), "queries") as bar:
        for i, verdict in teacher.ask(requests):
            verdicts[i] = _too_long(requests[i], config) or verdict
            bar.advance()
    return verdicts


def _too_long(request: Request, config: CollectConfig) -> Verdict | None:
    """The verdict on a query that is too long to be asked."""
    n = collecting.length_of(request.query)
    if n <= config.max_characters:
        return None
    return Verdict(
        None, f"{n:,} characters; collect.max_characters allows {config.max_characters:,}"
    )


def _default_cache(out: Path) -> Path:
    """The user's cache of replies; beside an output in a bucket, which may outlive this machine."""
    return out.with_name(f"{out.stem}.replies.sqlite3") if is_copy(out) else default_path()


# ---- language models -----------------------------------------------------------------------------
def _collect_from_model(
    out: Path,
    config: CollectConfig,
    made: dict[str, Any],
    inputs: dict[str, str | Path],
    how: AskingConfig,
) -> int:
    is_batch = config.teacher == "openai-batch"
    factor = cost.BATCH_FACTOR if is_batch else 1.0
    budget = Budget(how.costs, config.endpoint.max_tokens, factor=factor)
    templates = Templates.read(how.templates or None)
    # Batches of another teacher or wording are none of ours: their results would answer nothing.
    asked_by = {**chat.identity(config.endpoint), "templates": templates.fingerprint()}
    folder = out.with_name(f"{out.stem}.batches") / teacher_name(asked_by)
    teacher = _open_teacher(config, templates, budget, folder)
    made |= {"asked": teacher.identity(), "templates": templates.fingerprint()}
    if is_batch:
        made["teacher"] = "openai"  # the replies are the same
    if not how.dry_run and artifacts.is_finished(out, "collect", made, inputs, _beside(out)):
        counts = read_json(artifacts.manifest_path(out))["counts"]
        if not (how.retry_failed and counts.get("failed")):
            return 0
    requests = _requests(inputs["input"], config)
    # What was paid and what failed belongs to the output, whatever its settings are.
    job = str(out.resolve())
    with open_cache(how.cache or _default_cache(out), teacher.identity(), job) as cache:
        budget.charge(cache.paid())
        asked = [i for i, r in enumerate(requests) if _too_long(r, config) is None]
        known = asking.look_up(
            teacher, [requests[i] for i in asked], cache, how.retry_failed and not how.dry_run
        )
        to_ask = [requests[i] for i in asked]
        if how.dry_run or (config.teacher != "local" and known.open()):
            estimates = asking.estimates(teacher, to_ask, known, cache)
            concurrency = config.endpoint.concurrency if config.teacher == "openai" else 1
            table = cost.table(estimates, how.costs, factor, concurrency, is_batch)
            print(table, file=sys.stdout if how.dry_run else sys.stderr)
        if how.dry_run:
            return 0
        with progress("collect", len(requests), "queries") as bar:
            bar.skip(len(requests) - sum(map(known.open().__contains__, known.keys)))
            show = _shown_cost(bar, budget)
            found = iter(asking.ask(teacher, to_ask, known, cache, budget, show))
        verdicts = [_too_long(request, config) or next(found) for request in requests]
    return _write(out, requests, verdicts, config, made, inputs)


def _open_teacher(
    config: CollectConfig, templates: Templates, budget: Budget, batch_folder: Path
) -> Teacher:
    model = config.endpoint.teacher_model
    if not model:
        raise UserError(f"--teacher={config.teacher} needs --teacher_model, the model to ask")
    if config.teacher == "local":
        from selfrag_jax.critic.teachers.local import open_local

        return open_local(model, config.local, templates)
    if config.teacher == "openai-batch":
        return BatchTeacher(config.endpoint, templates, budget, batch_folder)
    return EndpointTeacher(config.endpoint, templates, budget)


def _shown_cost(bar: Progress, budget: Budget) -> Callable[[int], None]:
    """Returns a function that counts answers, and shows what they cost so far."""

    def answered(n: int) -> None:
        tokens = budget.used.tokens_in + budget.used.tokens_out
        cost = f"cost {budget.spent:,.2f}" if budget.config.known else f"{tokens:,} tokens"
        bar.advance(n, cost if tokens else "")

    return answered


# ---- writing -------------------------------------------------------------------------------------
def _beside(out: Path) -> tuple[Path, Path]:
    """The files of development examples and of failures."""
    return out.with_name(f"{out.stem}.dev.jsonl"), out.with_name(f"{out.stem}.failed.jsonl")


def _write(
    out: Path,
    requests: Sequence[Request],
    verdicts: Sequence[Verdict],
    config: CollectConfig,
    made: dict[str, Any],
    inputs: dict[str, str | Path],
) -> int:
    """Writes examples, development examples, failures and the manifest."""
    pairs = list(zip(requests, verdicts, strict=True))
    failed = [collecting.failed_row(r, v) for r, v in pairs if v.token is None]
    labelled = [collecting.example_of(r, v) for r, v in pairs if v.token is not None]
    dev_file, failures = _beside(out)
    if failed:
        write_jsonl(failures, failed)
        print(
            f"{failures}: {len(failed):,} of {len(pairs):,} queries have no label, and the reason; "
            "--retry_failed asks again what was asked",
            file=sys.stderr,
        )
    else:
        failures.unlink(missing_ok=True)
    if not labelled:
        raise StageFailed(f"{out}: no query has a label; the reasons are in {failures}")
    kept = collecting.balanced(labelled, config.balance, config.seed)
    train, dev = collecting.split_by_question(kept, config.dev_share, config.seed)
    if not train:
        raise StageFailed(f"{out}: dev_share={config.dev_share} leaves nothing to train on")
    if config.dev_share:
        write_jsonl(dev_file, dev)
    n = write_jsonl(out, train)
    counts = {"examples": n, "dev": len(dev), "failed": len(failed)}
    counts |= {"dropped_by_balance": len(labelled) - len(kept), **Counter(e.output for e in train)}
    artifacts.write_manifest(out, "collect", made, inputs, counts)
    return n


def run(values: dict[str, Any], _: list[str]) -> None:
    if values["config"] is None:
        values["config"] = "tiny" if values["teacher"] in (None, "rule") else "critic_7b"
    config = config_section(values, CollectConfig, "collect")
    endpoint = replace(config.endpoint, **given(values, ENDPOINT_FLAGS))
    config = replace(config, teacher=values["teacher"] or config.teacher, endpoint=endpoint)
    if values["groups"]:
        config = config.only(values["groups"])
    how = AskingConfig(
        values["cache"] or "",
        values["templates"] or "",
        CostConfig(**given(values, COST_FLAGS)),
        values["dry_run"],
        values["retry_failed"],
    )
    collect_critiques(values["input"], values["truth"], config, values["out"], how)
    if not how.dry_run:
        print(values["out"])


COMMAND = Command(
    example="selfrag collect --teacher=openai --teacher_model=gpt-4o-mini "
    "--input=with_passages.jsonl --out=critic_data.jsonl --dry_run",
    flags=(
        Flag("input", "instructions with ctxs, as `selfrag retrieve` writes them", required=True),
        Flag(
            "out",
            "critic data (JSON lines); beside it .dev.jsonl, .failed.jsonl",
            required=True,
            writes=True,
        ),
        Flag(
            "teacher",
            "openai: an endpoint, its key in OPENAI_API_KEY; openai-batch: the same by batch "
            "files, at half the price; local: a model that runs here; rule: the synthetic "
            "world's truth (default: the config's)",
            group=_TEACHER,
            choices=collecting.TEACHERS,
        ),
        *ENDPOINT_FLAGS,
        Flag(
            "groups",
            "only these of retrieve, isrel, issup and isuse, with commas (default: all)",
            type=tuple,
            group=INPUT,
        ),
        Flag("truth", "the world's teacher.jsonl, for --teacher=rule", group=_TEACHER),
        Flag(
            "templates",
            "folder of prompts, one file for each kind of query (default: ours)",
            group=_TEACHER,
            is_folder=True,
        ),
        Flag(
            "cache",
            "file of all replies so far (default: in ~/.cache/selfrag_jax, or "
            "beside --out if that is in a bucket)",
            writes=True,
        ),
        Flag("dry_run", "tell tokens, cost and time, and stop", False, type=bool, group="Cost"),
        *COST_FLAGS,
        Flag("retry_failed", "ask again what got no label in earlier runs", False, type=bool),
        config_flag(None, " (default: tiny for the rule teacher, else critic_7b)", "critic_7b"),
    ),
    run=run,
    default_config="critic_7b",
)
