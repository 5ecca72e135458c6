"""`selfrag convert`: a Hugging Face folder or a GGUF file in, a training workdir out, or back."""

from __future__ import annotations

from typing import Any

from selfrag_jax.commands.command import Command, Flag


def run(values: dict[str, Any], _: list[str]) -> None:
    from selfrag_jax.checkpoints.converting import convert

    n = convert(
        values["from"],
        values["to"],
        values["format"],
        values["dtype"],
        values["reflection_tokens"],
        values["tokenizer"],
        values["step"],
    )
    print(f"{values['to']}: {n / 1e6:,.1f}M parameters")


COMMAND = Command(
    example="selfrag convert --from=W/generator --to=my_model --format=huggingface\n"
    "selfrag convert --from=model.gguf --to=my_model --format=huggingface",
    flags=(
        Flag(
            "from",
            "a Hugging Face folder, that of a PEFT adapter, a GGUF file, a hub name (owner/model; "
            "smollm2 for SmolLM2-135M-Instruct), or a training workdir",
            required=True,
            is_model=True,
            in_place=True,
        ),
        Flag("to", "folder to write", required=True, writes=True, is_folder=True),
        Flag(
            "format",
            "orbax (a training workdir), huggingface, or peft (the adapter alone of a training "
            "with LoRA)",
            required=True,
            choices=("orbax", "huggingface", "peft"),
        ),
        Flag(
            "step",
            "which checkpoint of a workdir: last, best (the lowest training loss), or its number",
            "last",
        ),
        Flag(
            "dtype",
            "type of the parameters: float32, bfloat16 or float16; default: unchanged",
            choices=("float32", "bfloat16", "float16"),
        ),
        Flag(
            "tokenizer",
            "how Llama-2's tokenizer treats white space: llama_slow (as the released model was "
            "trained) or llama_fast (as it was served)",
            choices=("llama_slow", "llama_fast"),
        ),
        Flag("reflection_tokens", "add those that the vocabulary lacks", False, type=bool),
    ),
    run=run,
)
