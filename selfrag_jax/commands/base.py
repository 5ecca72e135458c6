"""`selfrag base`: a config in, the quickstart's small base model out."""

from __future__ import annotations

from typing import Any

from selfrag_jax.commands.command import Command, Flag, config_flag, load_config


def run(values: dict[str, Any], _: list[str]) -> None:
    from selfrag_jax.base_model.make import make_base_model

    for skill, score in make_base_model(
        load_config(values), values["workdir"], values["out"]
    ).items():
        print(f"{skill:<14} {100 * score:.1f}")
    print(values["out"])


COMMAND = Command(
    example="selfrag base --workdir=W/base --out=my_base",
    flags=(
        Flag("workdir", "for checkpoints; run again, it continues", required=True, writes=True),
        Flag("out", "folder to write, in Hugging Face's format", required=True, writes=True),
        config_flag("base"),
    ),
    run=run,
)
