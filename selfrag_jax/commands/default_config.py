"""The config that `selfrag train` takes where none is given: it depends on the base."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from selfrag_jax.errors import UserError
from selfrag_jax.processes.group import current

LARGE = 2e9  # parameters from which the recipes for 7B are the ones to start from
_RECIPES = {
    "critic": "critic_7b (all parameters)",
    "generator": "generator_7b (all parameters) or lora_7b (adapters)",
}


def config_for_base(role: str, overrides: Sequence[str]) -> str:
    """Returns the config's name; says on stderr which it is if --config.base was given.

    tiny for models of the synthetic world, small for others. Raises UserError for a base of more
    than LARGE parameters, and names the configs for it.
    """
    bases = [o.partition("=")[2] for o in overrides if o.startswith("base=")]
    base = bases[-1] if bases else "embedded"
    if base.lower() in ("embedded", "scratch", "none", ""):
        return "tiny"
    from selfrag_jax.checkpoints import loading
    from selfrag_jax.huggingface import hub
    from selfrag_jax.models.llama import Model
    from selfrag_jax.models.params import flatten
    from selfrag_jax.training.architecture import model_architecture

    shapes = Model(model_architecture(base)).shapes()
    parameters = sum(x.size for _, x in flatten(shapes))
    if parameters > LARGE:
        raise UserError(
            f"--config.base={base}: has {parameters / 1e9:.1f}B parameters, for which no config is "
            f"taken unasked; give --config={_RECIPES.get(role, _RECIPES['generator'])}"
        )
    if loading.read_tokenizer(hub.model_folder(base)).mode == "words":
        name, why = "tiny", "is a model of the synthetic world"
    else:
        name, why = "small", f"has {parameters / 1e6:.0f}M parameters"
    if current().is_main:
        print(f"--config={name}: none was given, and {base} {why}", file=sys.stderr)
    return name
