"""`selfrag world`: a seed in, the files of a world out (worlds.py has the kinds)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from selfrag_jax.commands.command import Command, Flag, config_flag, load_config
from selfrag_jax.commands.worlds import kind_of_config


def make_world(c: ConfigDict, out: Path) -> None:
    """Writes the files of the config's world to `out`; does nothing if they are finished."""
    kind_of_config(c).write(c.world, out)


def run(values: dict[str, Any], _: list[str]) -> None:
    config = load_config(values)
    kind_of_config(config)  # refuses other configs, which have no section `world`
    if values["seed"] is not None:
        config.world.seed = values["seed"]
    make_world(config, Path(values["out"]))
    print(f"{values['out']}: passages.tsv, instructions.jsonl, teacher.jsonl, eval/")


COMMAND = Command(
    example="selfrag world --out=W/world",
    flags=(
        Flag("out", "folder to write", required=True, writes=True),
        Flag("seed", "another seed gives another world", type=int),
        config_flag(),
    ),
    run=run,
)
