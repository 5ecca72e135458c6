"""`selfrag train`: training data and a starting model in, a workdir with checkpoints out."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from selfrag_jax import artifacts, locks
from selfrag_jax import config as configs
from selfrag_jax.commands.command import DISTRIBUTED, INPUT, Command, Flag, config_flag, load_config
from selfrag_jax.commands.default_config import config_for_base
from selfrag_jax.commands.training_identity import group_weights, training_identity
from selfrag_jax.commands.training_rows import (
    HELD_OUT_FLAG,
    hold_out,
    read_source,
)
from selfrag_jax.errors import UserError
from selfrag_jax.files import write_json
from selfrag_jax.processes.group import current
from selfrag_jax.profiling import check_steps
from selfrag_jax.progress import waiting
from selfrag_jax.records import read_rows
from selfrag_jax.storage.paths import as_path
from selfrag_jax.text import reflection

if TYPE_CHECKING:
    from selfrag_jax.data.critic_examples import CriticSource
    from selfrag_jax.data.generator_examples import GeneratorSource
    from selfrag_jax.training.config import TrainConfig

FORMATS = ("own", "released")
PROFILE_FLAG = Flag(
    "profile",
    "steps to trace after the first ones, into WORKDIR/profile, for xprof or TensorBoard",
    0,
    type=int,
)
MALFORMED = "malformed_rows.json"  # in the workdir: all rows left out of a published file, by kind


def train_model(
    c: ConfigDict,
    role: str,
    data: str | Path,
    workdir: str | Path,
    name: str,
    released: bool = False,
    profile: int = 0,
    held_out: str | None = None,
) -> None:
    """Trains `role` ("critic" or "generator") on `data`. Does nothing if `workdir` is finished.

    name: of the progress bar. released: the data is a published file. profile: number of steps to
    trace into `workdir/profile`. held_out: a file of rows to measure the model on, or a share of
    the data's. Raises UserError for a role that the config has no section for, and for data, mesh
    or base that do not fit.
    """
    import jax

    from selfrag_jax.checkpoints import workdirs
    from selfrag_jax.data.generator_examples import GeneratorSource
    from selfrag_jax.data.published_files import Faults
    from selfrag_jax.training import length
    from selfrag_jax.training.starting_model import starting_model
    from selfrag_jax.training.train import train

    is_main_process = jax.process_index() == 0

    # 1. The config.
    section, weights = _checked_section(c, role), group_weights(c, role)

    # 2. What identifies this training. Finished already, or only made longer?
    with waiting(name, "reads what identifies the base and the data", is_main_process):
        made, inputs = training_identity(c, role, section, data, released, held_out, workdir)
        change = length.asked_length(workdir, made, inputs)
        if change is None and artifacts.is_finished(workdir, "train", made, inputs):
            return

    _require_no_other_model(as_path(workdir))

    # 3. Model, data and mesh, all checked before anything is written.
    resumes = bool(workdirs.saved_steps(workdir))
    with waiting(name, f"loads the base {c.base}", is_main_process):
        # With LoRA the frozen weights come from the base each time; else a checkpoint holds
        # everything.
        start, num_new_tokens = starting_model(c, section.lora is not None or not resumes)
    faults = Faults()  # malformed rows of a published file

    def read(path: str | Path) -> CriticSource | GeneratorSource:
        return read_source(c, role, section, path, start.tokenizer, weights, released, faults)

    with waiting(name, "reads the rows", is_main_process):
        rows = read(data)
        source, held_out_rows = hold_out(rows, held_out, section.seed, read, name)
    mesh = section.make_mesh()
    section.check(start.model.config, mesh)
    # A host may hold its own copy of the data.
    current().require_same(
        "data or base",
        artifacts.identity("train", made, inputs),
        "copy the same files to all hosts",
    )
    if is_main_process:
        _warn_of_tensor_over_hosts(role, mesh)
    length.check_length(role, change, section, source, workdir)

    # 4. Train. One process locks the workdir; all check that it holds this same training.
    with locks.exclusive_workdir(workdir) if is_main_process else nullcontext():
        if change is not None:
            length.change_length(name, change, made, inputs, section, source, workdir)
        artifacts.claim_workdir(workdir, "train", made, inputs, write=is_main_process)
        if is_main_process and faults.total:
            write_json(as_path(workdir) / MALFORMED, faults.rows)
        # Only the trainer holds the parameters, so that it can free them.
        params = [start.params]
        start = replace(start, params=None)
        result = train(
            section, start.model, params.pop, source, start.tokenizer, workdir, name,
            num_new_tokens, profile, held_out_rows,
        )  # fmt: skip
    if is_main_process:
        counts = {k: result[k] for k in ("steps", "examples", "truncated")}
        if isinstance(rows, GeneratorSource):  # by which `selfrag ask` knows a baseline
            counts["reflection_tokens"] = rows.has_reflection_tokens()
        artifacts.write_manifest(workdir, "train", made, inputs, counts)
    current().barrier("trained")


def _require_no_other_model(workdir: Path) -> None:
    """Raises UserError for the folder of a model of another kind, and of a whole quickstart."""
    if (workdir / artifacts.STARTED).is_file():
        return
    for name in ("config.json", "generator/model.json", "critic/model.json"):
        if (workdir / name).is_file():
            raise UserError(
                f"{workdir}: holds {name}, so it is no workdir of a training; choose another "
                f"--workdir, {workdir}/training for example"
            )


def _checked_section(c: ConfigDict, role: str) -> TrainConfig:
    """The settings of a role's training. Raises UserError if the config lacks what it needs."""
    from selfrag_jax.training.config import ROLES, TrainConfig

    if role not in ROLES or role not in c:
        known = ", ".join(r for r in ROLES if r in c) or "none in this config"
        raise UserError(f"--role={role}: must be one of {known}")
    rows_of_new_tokens = "scratch" if c.base == "scratch" else "new_rows"
    configs.require(
        c, "base", "tokenizer", f"{role}_weights", "label.critic.brief", rows_of_new_tokens
    )
    section = configs.build(TrainConfig, c[role], role)
    if section.steps == 0:
        raise UserError(f"config {role}: steps=0 trains nothing")
    if section.mask != "each" and role == "critic":
        raise UserError(
            f"config critic: mask={section.mask!r}: only a generator's data has passages"
        )
    return section


def _warn_of_tensor_over_hosts(role: str, mesh) -> None:
    import jax

    from selfrag_jax.models import sharding

    # The chips of a TPU slice have links of their own, across hosts too.
    hosts = 1 if jax.default_backend() == "tpu" else sharding.hosts_per_tensor_group(mesh)
    if hosts > 1:
        print(
            f"warning: the mesh's tensor={mesh.shape['tensor']} spans {hosts} hosts, and every "
            f"layer waits for the network between them. A host has {jax.local_device_count()} "
            f"devices: lower --config.{role}.mesh.tensor, and put the rest in mesh.fsdp",
            file=sys.stderr,
        )


def is_released(name: str) -> bool:
    """Whether --format names the published layout. Raises UserError for an unknown format."""
    if name not in FORMATS:
        raise UserError(f"--format={name}: must be one of {', '.join(FORMATS)}")
    return name == "released"


def _warn_of_plain_outputs(role: str, data: str) -> None:
    """Says so if generator data look as before `selfrag label`."""
    from selfrag_jax.data.generator_examples import print_plain_outputs

    if role != "generator" or not Path(data).is_file():
        return  # a folder says so itself
    _, first = next(read_rows(data), ("", {}))
    if "output" not in first:
        return  # no generator data: reading them says what is missing
    if not any(token in str(first.get("output")) for token in reflection.RETRIEVE):
        print_plain_outputs(data)


def run(values: dict[str, Any], _: list[str]) -> None:
    released = is_released(values["format"])
    role, data, workdir = values["role"], values["data"], values["workdir"]
    profile = check_steps(values["profile"])
    _warn_of_plain_outputs(role, data)
    if values["config"] is None:
        values = values | {"config": config_for_base(role, values["overrides"])}
    config, held_out = load_config(values), values["held_out"]
    train_model(config, role, data, workdir, role, released, profile, held_out)
    if current().is_main:
        print(values["workdir"])


COMMAND = Command(
    example="selfrag train --role=critic --data=W/critic_data.jsonl --workdir=W/critic\n"
    "selfrag train --config=small --config.base=FOLDER --role=generator "
    "--data=generator_data.jsonl --workdir=generator\n"
    "selfrag train --config=generator_7b --role=generator --format=released --data=train.jsonl "
    "--workdir=generator",
    flags=(
        Flag("role", "critic or generator", required=True, choices=("critic", "generator")),
        Flag(
            "data",
            "critic or generator data (JSON lines); or generator data as a folder made by "
            "`selfrag prepare`",
            required=True,
        ),
        Flag(
            "format",
            "own; or released: the published files, whose malformed rows are left out and reported",
            "own",
            group=INPUT,
            choices=FORMATS,
        ),
        Flag(
            "workdir",
            "for checkpoints and logs; with several processes, a folder that all of them see",
            required=True,
            in_place=True,
        ),
        HELD_OUT_FLAG,
        DISTRIBUTED,
        PROFILE_FLAG,
        config_flag(
            None,
            "; default: tiny, or small for a --config.base of your own",
            "tiny, small, small:full, lora_7b",
        ),
    ),
    run=run,
    saves_on_sigterm=True,
)
