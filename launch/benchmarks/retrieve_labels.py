"""Who should decide whether an instruction needs retrieval? The three choices in the tiny world.

    selfrag quickstart --workdir=W
    python launch/benchmarks/retrieve_labels.py W

The generator's data are labelled with each choice of `selfrag label --retrieve_labels`, a generator
is trained on each, and adaptive mode answers questions on rare entities (long_tail), well-known
entities and common knowledge (no_need). Prints how often retrieval was labelled, and accuracy and
retrieval rate of the answers, as Markdown. Everything is kept in W/retrieve_labels; started again,
it continues.

    critic   the quickstart's own labels and generator
    teacher  the world's rule teacher, from the quickstart's file of critic data
    self     what the generator's base knows

The embedded base has never read of this world, so it has a stand-in: the base, fine-tuned to answer
with a passage in front and without, as a real base can read and has read. It must not have seen
what it judges, so there are two, each trained on one half of the instructions and asked about the
other. The halves are of rows: a popular question may stand in both, as a real base has met it again
and again. With --split=question it may not, and a fact is known only if the other half has it in
another phrasing; half of the well-known facts have only one. With a real base this is not needed:

    selfrag label --retrieve_labels=self --self_model=BASE ...
"""

import argparse
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

from selfrag_jax import artifacts
from selfrag_jax import config as configs
from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.commands.label import label_file
from selfrag_jax.commands.quickstart import baseline_data
from selfrag_jax.commands.retrieve_labels import self_needs
from selfrag_jax.commands.train import train_model
from selfrag_jax.critic.labelling import LabelConfig
from selfrag_jax.critic.needs import CHOICES, teacher_needs
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import scores
from selfrag_jax.records import instruction_from, read_records, read_rows, write_jsonl
from selfrag_jax.text.reflection import RETRIEVAL

TASKS = ("long_tail", "well_known", "no_need")


class Experiment:
    """The three choices in the workdir of a finished quickstart, with its config."""

    def __init__(self, workdir: Path, config, split: str):
        self.w, self.c, self.split = workdir, config, split
        self.out = workdir / "retrieve_labels"
        self.input = workdir / "retrieved" / "instructions.jsonl"
        self.label = configs.build(LabelConfig, config.label, "label")
        self.rows = read_records(self.input, instruction_from)

    def folder(self, choice: str) -> Path:
        if choice == "critic":
            return self.w
        return self.out / (f"self-{self.split}" if choice == "self" else choice)

    def run(self, choice: str) -> None:
        """Labels the data with a choice, trains a generator, and answers the questions."""
        folder = self.folder(choice)
        if choice != "critic":
            config = replace(self.label, retrieve_labels=choice)
            data = folder / "generator_data.jsonl"
            label_file(self.w / "critic", self.input, config, data, needs=self.needs(choice))
            train_model(self.c, "generator", data, folder / "generator", f"generator, {choice}")
        asked = {t: self.questions(t) for t in TASKS if not self.predictions(choice, t).is_file()}
        if asked:
            answering = configs.build(AnswerConfig, self.c.answer, "answer")
            model = SelfRAG.load(folder / "generator", self.w / "index", answering)
            for task, questions in asked.items():
                rows = [a.to_row() for a in model.answer([replace(q, ctxs=()) for q in questions])]
                write_jsonl(self.predictions(choice, task), rows)

    def questions(self, task: str):
        return read_questions(self.w / "retrieved" / "eval" / f"{task}.jsonl", task)

    def predictions(self, choice: str, task: str) -> Path:
        name = self.folder(choice).name if choice == "self" else choice
        return self.out / "predictions" / name / f"{task}.jsonl"

    # ---- who decides -------------------------------------------------------------------------
    def needs(self, choice: str) -> dict[str, str]:
        if choice == "teacher":
            return teacher_needs(self.w / "critic_data.jsonl", self.rows)
        folder, needs = self.folder("self"), {}
        halves = self.halves()
        for i, half in enumerate(halves):
            mine, others = folder / f"half-{i}.jsonl", folder / f"half-{1 - i}.jsonl"
            for file, rows in ((mine, half), (others, halves[1 - i])):
                if not file.is_file():
                    write_jsonl(file, rows)
            model = folder / f"base-{1 - i}"
            train_model(self.c, "generator", self.base_data(others), model, f"base, half {1 - i}")
            config = replace(self.label, retrieve_labels="self")
            out = folder / f"half-{i}.needs.jsonl"
            needs |= self_needs(model, lambda half=half: half, config, out, {"input": mine})
        return needs

    def base_data(self, half: Path) -> Path:
        """Writes the rows of a half with passages and without; returns the file."""
        both = half.with_name(f"base-{half.name}")
        if not both.is_file():
            files = {kind: half.with_name(f"{kind}-{half.name}") for kind in ("closed", "rag")}
            for kind, file in files.items():
                baseline_data(half, kind, self.c.seed, file)
            write_jsonl(both, [row for file in files.values() for _, row in read_rows(file)])
        return both

    def halves(self):
        """The instructions in two halves; all rows of a question, or single rows, are together."""
        keys = [r.id if self.split == "row" else r.full_instruction for r in self.rows]
        unique = sorted(set(keys))
        random.Random(f"halves-{self.c.seed}").shuffle(unique)
        first = set(unique[::2])
        halves = [[], []]
        for row, key in zip(self.rows, keys, strict=True):
            halves[key not in first].append(row)
        return halves

    # ---- tables ------------------------------------------------------------------------------
    def labelled(self, choice: str) -> dict[str, float]:
        """Returns, for each form of instruction, the share that begins with [Retrieval]."""
        total, retrieving = Counter(), Counter()
        for _, row in read_rows(self.folder(choice) / "generator_data.jsonl"):
            total[row["dataset_name"]] += 1
            retrieving[row["dataset_name"]] += row["output"].startswith(RETRIEVAL)
        return {form: retrieving[form] / n for form, n in total.items()}

    def scored(self, choice: str, task: str) -> list[float]:
        """Returns accuracy and retrieval rate of adaptive mode."""
        predictions = [row for _, row in read_rows(self.predictions(choice, task))]
        values = scores.score(self.questions(task), predictions, judge=None, facts_of=None)
        return [sum(v) / len(v) for v in (values["accuracy"], values["retrieval_rate"])]

    def tables(self) -> str:
        shares = {choice: self.labelled(choice) for choice in CHOICES}
        forms = list(shares["critic"])
        lines = [
            f"Instructions labelled [Retrieval], per cent (split by {self.split}):\n",
            _row("decided by", forms),
            _row("---", ["---"] * len(forms)),
            *(_row(choice, [_percent(shares[choice][f]) for f in forms]) for choice in CHOICES),
            "\nAdaptive mode, accuracy / retrieval rate, per cent:\n",
            _row("decided by", [f"{t} ({len(self.questions(t))})" for t in TASKS]),
            _row("---", ["---"] * len(TASKS)),
        ]
        for choice in CHOICES:
            cells = [" / ".join(map(_percent, self.scored(choice, task))) for task in TASKS]
            lines.append(_row(choice, cells))
        return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", type=Path, help="of a finished quickstart")
    parser.add_argument("--config", default="tiny", help="the quickstart's config")
    parser.add_argument("--seed", type=int, default=0, help="the quickstart's seed")
    parser.add_argument("--split", choices=("row", "question"), default="row")
    args = parser.parse_args()
    try:
        artifacts.require_finished(args.workdir / "generator", "train", "generator")
        config = configs.reseed(configs.load(args.config), args.seed)
        experiment = Experiment(args.workdir, config, args.split)
        for choice in CHOICES:
            experiment.run(choice)
        print(experiment.tables())
    except UserError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
