"""Who should decide whether an instruction needs retrieval? The three choices in a quickstart.

    selfrag quickstart --workdir=W
    python launch/benchmarks/retrieve_labels.py W --tasks=long_tail,well_known,no_need

The generator's data are labelled with each choice of `selfrag label --retrieve_labels`, a generator
is trained on each, and each answers the questions of some tasks always and never retrieving, with
one segment. That gives its answers in adaptive mode at every threshold. Prints how often retrieval
was labelled, and accuracy and retrieval rate in adaptive mode with the config's threshold, as
Markdown. W/retrieve_labels/report has them as a page with two plots of each task
(docs/evaluation.md): accuracy by popularity, where the questions have one, and accuracy against
retrieval rate, both with a curve for each choice. Started again, it continues.

    critic   the critic, as in the paper
    teacher  the quickstart's teacher, from its file of critic data
    self     what the generator's base knows

The choice that the config makes (label.retrieve_labels) is the quickstart's own generator.

Where the config's base is a real model, or --self_model names one, that is asked what it knows. The
embedded base has never read of the quickstart's world, so it has a stand-in: the base, fine-tuned
to answer with a passage in front and without, as a real base can read and has read. It must not
have seen what it judges, so there are two, each trained on one half of the instructions and asked
about the other. The halves are of rows: a popular question may stand in both, as a real base has
met it again and again. With --split=question it may not, and a fact is known only if the other half
has it in another phrasing; half of the well-known facts of the fictional world have only one.
"""

import argparse
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

from selfrag_jax import artifacts
from selfrag_jax import config as configs
from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.answering.rescoring import at_threshold
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.commands.label import label_file
from selfrag_jax.commands.plain_data import baseline_data
from selfrag_jax.commands.retrieve_labels import self_needs
from selfrag_jax.commands.train import train_model
from selfrag_jax.critic.labelling import LabelConfig
from selfrag_jax.critic.needs import CHOICES, teacher_needs
from selfrag_jax.data.questions import read_questions
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import report, scores
from selfrag_jax.evaluation.page.plots_of_answers import (
    BY_RATE,
    RATES_FILE,
    AnswerCurves,
    rate_curves_plot,
    titled,
)
from selfrag_jax.evaluation.popularity import BINS, FEWEST, accuracy_by_popularity
from selfrag_jax.evaluation.retrieval_rates import BothModes, both_modes, to_json
from selfrag_jax.files import write_json
from selfrag_jax.records import instruction_from, read_records, read_rows, write_jsonl
from selfrag_jax.search.config import ADAPTIVE, ALWAYS, NEVER
from selfrag_jax.text.reflection import RETRIEVAL

MODES = (ALWAYS, NEVER)
ONE_SEGMENT = {"max_depth": 1, "beam_width": 1}


class Experiment:
    """The three choices in the workdir of a finished quickstart, with its config.

    self_model: what is asked what it knows; "" for stand-ins.
    """

    def __init__(self, workdir: Path, config, tasks: list[str], split: str, self_model: str):
        self.w, self.c, self.split = workdir, config, split
        self.self_model = self_model
        self.tasks = {task: self.questions(task) for task in tasks}
        self.out = workdir / "retrieve_labels"
        self.input = workdir / "retrieved" / "instructions.jsonl"
        self.label = configs.build(LabelConfig, config.label, "label")
        self.rows = read_records(self.input, instruction_from)

    def folder(self, choice: str) -> Path:
        if choice == self.label.retrieve_labels:
            return self.w
        return self.out / self.name(choice)

    def name(self, choice: str) -> str:
        if choice != "self":
            return choice
        return "self-model" if self.self_model else f"self-{self.split}"

    def run(self, choice: str) -> None:
        """Labels the data with a choice, trains a generator, and answers the questions."""
        folder = self.folder(choice)
        if folder != self.w:
            config = replace(self.label, retrieve_labels=choice)
            data = folder / "generator_data.jsonl"
            label_file(self.w / "critic", self.input, config, data, needs=self.needs(choice))
            train_model(self.c, "generator", data, folder / "generator", f"generator, {choice}")
        asked = [
            (task, mode)
            for task in self.tasks
            for mode in MODES
            if not self.predictions(choice, mode, task).is_file()
        ]
        if asked:
            model = SelfRAG.load(folder / "generator", self.w / "index", self.answering())
            for task, mode in asked:
                questions = [replace(q, ctxs=()) for q in self.tasks[task]]
                rows = [a.to_row() for a in model.answer(questions, mode=mode, **ONE_SEGMENT)]
                write_jsonl(self.predictions(choice, mode, task), rows)

    def answering(self) -> AnswerConfig:
        return configs.build(AnswerConfig, self.c.answer, "answer")

    def questions(self, task: str):
        return read_questions(self.w / "retrieved" / "eval" / f"{task}.jsonl", task)

    def predictions(self, choice: str, mode: str, task: str) -> Path:
        return self.out / "predictions" / self.name(choice) / mode / f"{task}.jsonl"

    # ---- who decides -------------------------------------------------------------------------
    def needs(self, choice: str) -> dict[str, str] | None:
        """What needs retrieval, by the row's id; None where the critic decides."""
        if choice == "critic":
            return None
        if choice == "teacher":
            return teacher_needs(self.w / "critic_data.jsonl", self.rows)
        folder, needs = self.folder("self"), {}
        if self.self_model:
            config, out = replace(self.label, retrieve_labels="self"), folder / "needs.jsonl"
            inputs = {"input": self.input}
            return self_needs(self.self_model, lambda: self.rows, config, out, inputs)
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

    # ---- what came out -----------------------------------------------------------------------
    def labelled(self, choice: str) -> dict[str, float]:
        """Returns, for each form of instruction, the share that begins with [Retrieval]."""
        total, retrieving = Counter(), Counter()
        for _, row in read_rows(self.folder(choice) / "generator_data.jsonl"):
            total[row["dataset_name"]] += 1
            retrieving[row["dataset_name"]] += row["output"].startswith(RETRIEVAL)
        return {form: retrieving[form] / n for form, n in total.items()}

    def answers(self, choice: str, task: str) -> dict[str, list[dict]]:
        """Returns the answers of each mode; those of adaptive mode are taken from the others."""
        found = {}
        for mode in MODES:
            found[mode] = [row for _, row in read_rows(self.predictions(choice, mode, task))]
        threshold, both = self.answering().search.threshold, zip(*found.values(), strict=True)
        return found | {ADAPTIVE: [at_threshold(a, n, threshold) for a, n in both]}

    def scored(self, choice: str, task: str) -> dict[str, list[dict]]:
        """Returns the answers of each mode as the plots take them."""
        return {
            mode: [
                row | one | {"task": task, "system": title(choice, mode)}
                for row, one in zip(
                    rows, scores.score_questions(self.tasks[task], rows), strict=True
                )
            ]
            for mode, rows in self.answers(choice, task).items()
        }

    def report(self) -> str:
        """Writes the page and the numbers of its plots; returns the tables as Markdown."""
        own, results, shown, plots = self.label.retrieve_labels, [], [], []
        modes: dict[str, BothModes] = {}
        for task in self.tasks:
            curves = {}
            for choice in CHOICES:
                scored = self.scored(choice, task)
                for mode in (ADAPTIVE, *(MODES if choice == own else ())):
                    values = scores.columns(scored[mode])
                    values = {name: values[name] for name in ("accuracy", "retrieval_rate")}
                    results += scores.result_rows(title(choice, mode), task, values, self.c.seed)
                    shown += scored[mode]
                if found := both_modes(scored[ALWAYS], scored[NEVER]):
                    curves[choice] = modes[f"{task}, {choice}"] = found
            if curves:
                name = titled(BY_RATE, task)
                plots.append(
                    rate_curves_plot(name, curves, own if own in curves else next(iter(curves)))
                )
        by_popularity = accuracy_by_popularity(shown, BINS, FEWEST, self.c.seed)
        drawn = AnswerCurves(by_popularity, {})  # the curves of the other kind are in `plots`
        out, page = self.out / "report", "Who decides whether retrieval is needed"
        report.write_report(results, shown, out, page, plots=plots, curves=drawn)
        write_json(out / RATES_FILE, to_json(modes, self.c.seed))
        return self.tables(results)

    def tables(self, results: list[dict]) -> str:
        shares = {choice: self.labelled(choice) for choice in CHOICES}
        forms = list(shares["critic"])
        value = {(r["system"], r["task"], r["metric"]): r["value"] for r in results}
        lines = [
            f"Instructions labelled [Retrieval], per cent (self: {self.name('self')}):\n",
            _row("decided by", forms),
            _row("---", ["---"] * len(forms)),
            *(_row(choice, [_percent(shares[choice][f]) for f in forms]) for choice in CHOICES),
            "\nAdaptive mode, accuracy / retrieval rate, per cent:\n",
            _row("decided by", [f"{t} ({len(asked)})" for t, asked in self.tasks.items()]),
            _row("---", ["---"] * len(self.tasks)),
        ]
        for choice in CHOICES:
            of = [(title(choice, ADAPTIVE), task) for task in self.tasks]
            pairs = [[value[*key, m] for m in ("accuracy", "retrieval_rate")] for key in of]
            lines.append(_row(choice, [" / ".join(map(_percent, pair)) for pair in pairs]))
        return "\n".join(lines)


def title(choice: str, mode: str) -> str:
    """The name of a generator's mode in the report."""
    names = {ADAPTIVE: f"adaptive, {choice}", ALWAYS: "always", NEVER: "no retrieval"}
    return names[mode]


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", type=Path, help="of a finished quickstart")
    parser.add_argument("--config", default="tiny", help="the quickstart's config")
    parser.add_argument("--seed", type=int, default=0, help="the quickstart's seed")
    parser.add_argument(
        "--tasks",
        required=True,
        help="with commas: files of retrieved/eval whose answers are one segment",
    )
    parser.add_argument("--self_model", help="what knows or does not; default: the config's base")
    parser.add_argument(
        "--need_threshold", type=float, help="of `selfrag label`; default: calibrated"
    )
    parser.add_argument("--split", choices=("row", "question"), default="row")
    args = parser.parse_args()
    try:
        artifacts.require_finished(args.workdir / "generator", "train", "generator")
        config = configs.reseed(configs.load(args.config), args.seed)
        if args.need_threshold is not None:
            config.label.needs.threshold = args.need_threshold
        base = "" if config.base == "embedded" else config.base
        self_model = args.self_model or base
        tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
        experiment = Experiment(args.workdir, config, tasks, args.split, self_model)
        for choice in CHOICES:
            experiment.run(choice)
        print(experiment.report())
    except UserError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
