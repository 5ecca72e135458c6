"""`selfrag compile`: a config and a topology in, memory and least time out, without hardware."""

from __future__ import annotations

import json
import os
from typing import Any

from selfrag_jax.commands.command import Command, Flag, config_flag, load_config
from selfrag_jax.errors import StageFailed
from selfrag_jax.files import write_json


def run(values: dict[str, Any], _: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the slice is described, not looked for
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    from selfrag_jax.compilation.compile import compile_program, misfit_message
    from selfrag_jax.training.architecture import follow_base

    config = follow_base(load_config(values), values["overrides"])
    result = compile_program(config, values["topology"], values["program"], values["slices"])
    print(json.dumps(result, indent=2))
    if values["out"]:
        write_json(values["out"], result)
    if not result["fits"]:
        raise StageFailed(misfit_message(result))


COMMAND = Command(
    example="selfrag compile --config=generator_7b --topology=v5e:4x4\n"
    "selfrag compile --config=small --config.base=FOLDER --topology=h100:1",
    flags=(
        Flag(
            "topology",
            "a TPU slice (v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:8x8) or the GPUs of a host (h100:8)",
            required=True,
        ),
        Flag(
            "slices",
            "with --program=train: that many slices of the topology; only the batch is split over "
            "them, and `dcn` counts what they exchange over the network",
            1,
            type=int,
        ),
        Flag(
            "program",
            "train; decode: answering (configs short_form and long_form); search: all vectors of a "
            "corpus on the devices; embed: a corpus to vectors (both: config index:wikipedia)",
            "train",
            choices=("train", "decode", "search", "embed"),
        ),
        Flag("out", "JSON file to write as well", writes=True),
        config_flag(
            "generator_7b",
            "; --config.base=FOLDER or --config.architecture=FILE compiles the architecture of any "
            "model's config.json; the compilers come with the extras `.[tpu]` and `.[gpu]`",
            "generator_7b, small",
        ),
    ),
    run=run,
)
