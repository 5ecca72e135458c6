"""Judges of entailment: does a premise support a hypothesis? Any local NLI model can be one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from selfrag_jax.errors import UserError, library


class EntailmentJudge(Protocol):
    """A judge whose name stands beside every number that rests on it."""

    name: str

    def entails(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Returns, of each (premise, hypothesis), whether the premise entails the hypothesis."""


class Verdicts(dict[tuple[str, str], bool]):
    """What a judge said of (premise, hypothesis) pairs; each is asked once."""

    def __init__(self, judge: EntailmentJudge):
        super().__init__()
        self._judge = judge

    def ask(self, pairs: Iterable[tuple[str, str]]) -> None:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self]
        if new:
            self.update(zip(new, self._judge.entails(new), strict=True))


class RememberingJudge:
    """A judge that is asked each pair once, however often answers are scored."""

    def __init__(self, judge: EntailmentJudge):
        self.name = judge.name
        self._verdicts = Verdicts(judge)

    def entails(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        self._verdicts.ask(pairs)
        return [self._verdicts[pair] for pair in pairs]


class NliJudge:
    """A Hugging Face NLI model in a local folder.

    Either a sequence classifier, whose label of entailment is found by its name in `id2label`, or a
    T5 that answers "1" to "premise: ... hypothesis: ...", as ALCE's judge TRUE does
    (google/t5_xxl_true_nli_mixture). Other judges than that one give other numbers.

    Pairs are sorted by length and judged `batch` at a time. What exceeds `max_length` tokens is cut
    at the end of the premise.
    """

    def __init__(self, folder: str | Path, batch: int = 16, max_length: int = 512):
        self.name = Path(folder).name or str(folder)
        self._batch = batch
        self._is_t5 = _architecture(Path(folder)).startswith(("T5", "MT5"))
        self._torch, transformers = _libraries()
        model_class = (
            transformers.AutoModelForSeq2SeqLM
            if self._is_t5
            else transformers.AutoModelForSequenceClassification
        )
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True
            )
            self._model = model_class.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError, KeyError) as e:
            reason = str(e).strip().split("\n")[0]
            raise UserError(f"{folder}: transformers cannot open this judge: {reason}") from None
        if self._torch.cuda.is_available():
            # TRUE has 11 billion weights; ALCE runs it in bfloat16 too.
            dtype = self._torch.bfloat16 if self._is_t5 else None
            self._model = self._model.to("cuda", dtype)
        self._max_length = min(max_length, self._tokenizer.model_max_length)
        self._entailment = None if self._is_t5 else _entailment_label(folder, self._model.config)

    def entails(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
        found = [False] * len(pairs)
        judge = self._generate if self._is_t5 else self._classify
        for start in range(0, len(order), self._batch):
            chunk = order[start : start + self._batch]
            with self._torch.inference_mode():
                for i, verdict in zip(chunk, judge([pairs[i] for i in chunk]), strict=True):
                    found[i] = verdict
        return found

    def _classify(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        premises, hypotheses = (list(texts) for texts in zip(*pairs, strict=True))
        inputs = self._tokenizer(
            premises,
            hypotheses,
            truncation="only_first",
            max_length=self._max_length,
            padding=True,
            return_tensors="pt",
        ).to(self._model.device)
        best = self._model(**inputs).logits.argmax(-1)
        return [int(label) == self._entailment for label in best]

    def _generate(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        # Long premises are cut, never the hypothesis behind them.
        texts = [f"premise: {self._cut(p, h)} hypothesis: {h}" for p, h in pairs]
        inputs = self._tokenizer(
            texts, truncation=True, max_length=self._max_length, padding=True, return_tensors="pt"
        ).to(self._model.device)
        written = self._model.generate(**inputs, max_new_tokens=10)
        answers = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        return [answer.strip() == "1" for answer in answers]

    def _cut(self, premise: str, hypothesis: str) -> str:
        rest = len(self._tokenizer(f"premise: hypothesis: {hypothesis}").input_ids)
        ids = self._tokenizer(premise, add_special_tokens=False).input_ids
        room = max(0, self._max_length - rest - 1)
        return premise if len(ids) <= room else self._tokenizer.decode(ids[:room])


def _architecture(folder: Path) -> str:
    """The class name in a folder's config.json. Raises UserError if there is no such model."""
    if not (folder / "config.json").is_file():
        what = "no config.json in it" if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: {what}; a judge is the local folder of a Hugging Face NLI model"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["architectures"][0])
    except (ValueError, TypeError, KeyError, IndexError):
        raise UserError(
            f"{folder}/config.json: names no model class (field 'architectures')"
        ) from None


def _libraries() -> tuple[Any, Any]:
    torch = library("torch", "an NLI judge", "eval")
    return torch, library("transformers", "an NLI judge", "eval")


def _entailment_label(folder: str | Path, config: Any) -> int:
    """The label of entailment. Raises UserError unless exactly one is called so."""
    names = {int(i): str(label) for i, label in config.id2label.items()}
    found = [
        i
        for i, label in names.items()
        if "entail" in label.lower() and not label.lower().startswith(("not", "non", "un"))
    ]
    if len(found) != 1:
        raise UserError(
            f"{folder}: id2label must name one label 'entailment'; found: "
            f"{', '.join(names.values())}"
        )
    return found[0]
