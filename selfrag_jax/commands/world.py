"""`selfrag world`: a seed in, the files of a synthetic world out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from selfrag_jax import artifacts
from selfrag_jax import config as configs
from selfrag_jax.commands.command import Command, Flag, config_flag, load_config
from selfrag_jax.world import questions
from selfrag_jax.world.encyclopedia import WorldConfig, build_world


def make_world(c: ConfigDict, out: Path) -> None:
    """Writes the world's files to `out`; does nothing if they are finished."""
    configs.require_kind(c, "quickstart", "configs/tiny.py")
    config = configs.build(WorldConfig, c.world, "world")
    if not artifacts.is_finished(out, "world", config, {}):
        counts = questions.write_world(build_world(config), out)
        artifacts.write_manifest(out, "world", config, {}, counts)


def run(values: dict[str, Any], _: list[str]) -> None:
    config = load_config(values)
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
