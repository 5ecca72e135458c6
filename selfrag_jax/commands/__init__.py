"""The commands of `selfrag`: one file each, with its flags and help, its inputs, its manifest.

To add one, write a file here that defines COMMAND, and name it in the table below. Command files
import what takes long to import (jax, flax, orbax) inside functions, so that `--help` is instant.
"""

from __future__ import annotations

from importlib import import_module

from selfrag_jax.commands.command import Command

SUMMARIES = {
    "quickstart": "Builds a whole Self-RAG in a small synthetic world, and measures it.",
    "world": "Writes the synthetic world: passages, instructions, evaluation files.",
    "embed": "Embeds a corpus of passages; killed and run again, it continues.",
    "index": "Builds an index within a memory budget; adds passages to it and removes them.",
    "check": "Checks a file of your own, and shows its rows as the model will see them.",
    "prepare": "Reads published instruction sets into one folder of instructions and outputs.",
    "retrieve": "Adds the best passages (ctxs) to each row of a question or instruction file.",
    "collect": "Collects a teacher's critiques: the critic's training data.",
    "agree": "Compares the labels of two teachers: accuracy and Cohen's kappa in each group.",
    "train": "Trains a critic or a generator; run again after an interruption, it continues.",
    "label": "Labels instructions with passages and critiques: the generator's training data.",
    "ask": "Answers a question, or many at a prompt, with citations and critiques.",
    "answer": "Answers a file of questions; run again after an interruption, it continues.",
    "evaluate": "Scores answers against gold answers, or a critic against labels it has not seen.",
    "sweep": "Answers and scores under many settings, generating only what they change.",
    "calibrate": "Picks the threshold of retrieval on a file with answers, for `answer` to use.",
    "compare": "Compares two runs on the same questions: paired differences and p-values.",
    "export": "Writes answers for ALCE, FActScore, KILT or RAGChecker; checks such files.",
    "report": "Rewrites the report of a quickstart, or reports the mean of several.",
    "convert": "Converts a model between Hugging Face's format and a training workdir.",
    "doctor": "Prints devices, versions, memory and disk, and what is missing for which command.",
    "compile": "Compiles for TPUs or GPUs that you do not have: memory, traffic, least time.",
    "base": "Trains the small base model of the quickstart; it is shipped, and takes an hour.",
    "completion": "Prints the script that makes a shell complete commands, flags and values.",
}
# The headings of `selfrag help`. A command that is missing here stands under the last one.
GROUPS = {
    "The whole flow": ("quickstart",),
    "Data": ("world", "prepare", "check", "collect", "agree", "label"),
    "Training": ("train", "base"),
    "Retrieval": ("embed", "index", "retrieve"),
    "Answering": ("ask", "answer", "calibrate"),
    "Evaluation": ("evaluate", "sweep", "compare", "export", "report"),
    "Tools": ("convert", "doctor", "compile", "completion"),
}


def load_command(name: str) -> Command:
    """The command of that name; imports its file only."""
    return import_module(f"selfrag_jax.commands.{name}").COMMAND
