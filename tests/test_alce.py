"""ALCE's scores against a plain second implementation, and judges that are local models."""

import json
import random
import re
import string
import sys

import numpy as np
import pytest

from selfrag_jax.commands import evaluate
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import alce, judges, mauve_score, scores
from selfrag_jax.records import Passage, Question


# ---- str-em -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "parts", "expected"),
    [
        ("It is Tokyo's old port [1].", [["Tokyo"]], (1, 1)),
        ("It ran from 1967-1970", [["1967"]], (1, 1)),
        ("It ran [1967].", [["1967"]], (0, 0)),  # a mark is not an answer
        ("Tokyo.\nKyoto.", [["Tokyo"], ["Kyoto"]], (0.5, 0)),  # the first line alone
        ("\n Tokyo and Kyoto", [["Tokyo"], ["Osaka", "The Kyoto"]], (1, 1)),
        ("", [["x"]], (0, 0)),
        ("anything", [["The The"]], (1, 1)),  # nothing is in everything, as in ALCE's script
        ("anything", [[]], (0, 0)),
    ],
)
def test_str_em_by_hand(answer, parts, expected):
    assert (alce.str_em(answer, parts), alce.str_hit(answer, parts)) == expected


def plain_normal(text):
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    for article in ("a", "an", "the"):
        kept = re.sub(rf"\b{article}\b", " ", kept)
    return " ".join(kept.split())


def test_str_em_equals_a_plain_second_implementation():
    rng, seen = random.Random(0), set()
    words = [
        "Tokyo",
        "tokyo's",
        "the",
        "A",
        "1967-1970",
        "1967",
        "old",
        "port.",
        "北京",
        "[1]",
        "\n",
    ]
    for _ in range(500):
        text = " ".join(rng.choices([*words, "[1]", "\n"], k=rng.randint(0, 7)))
        parts = [
            [
                " ".join(rng.choices(words[:9], k=rng.randint(1, 2)))
                for _ in range(rng.randint(1, 2))
            ]
            for _ in range(rng.randint(1, 3))
        ]
        line = plain_normal(text.strip().splitlines()[0].replace("[1]", "")) if text.strip() else ""
        found = [any(plain_normal(short) in line for short in shorts) for shorts in parts]
        assert alce.str_em(text, parts) == pytest.approx(sum(found) / len(found))
        assert alce.str_hit(text, parts) == all(found)
        seen.add((any(found), all(found)))
    assert len(seen) == 3


# ---- rouge, lists -------------------------------------------------------------------------------
def test_rouge_is_rouge_scores_own():
    from rouge_score.rouge_scorer import RougeScorer

    rng, words = random.Random(0), ["Otters", "swimming", "swim", "rivers", "The", "old", "port"]

    def sentence():
        return " ".join(rng.choices(words, k=rng.randint(2, 6))) + "."

    scorer = RougeScorer(["rougeL", "rougeLsum"], use_stemmer=True)
    for _ in range(50):
        answer, *references = ([sentence() for _ in range(rng.randint(1, 3))] for _ in range(3))
        ours = alce.rouge(" ".join(answer) + "\nnot read", [" ".join(r) for r in references])
        theirs = [scorer.score("\n".join(r).lower(), "\n".join(answer).lower()) for r in references]
        assert ours == {
            "rouge_l": max(s["rougeL"].fmeasure for s in theirs),
            "rouge_lsum": max(s["rougeLsum"].fmeasure for s in theirs),
        }


def test_asqa_and_eli5_have_rouge_and_claims():
    pairs = [{"short_answers": ["x"]}]
    long = [{"long_answer": text} for text in ("no", "An x.", "not read")]
    asqa = Question("0", "q", ("An x.",), extra={"qa_pairs": pairs, "annotations": long})
    eli5 = Question("1", "q", ("An x.",), extra={"claims": ["An", "y"]})
    fields = {"retrieved": False, "segments": [], "passages": [], "citations": []}
    rows = [{"id": i, "answer": "An x [1].", **fields} for i in "01"]
    first, second = (r["metrics"] for r in scores.score_questions([asqa, eli5], rows, SetJudge()))
    assert first["rouge_lsum"] == second["rouge_lsum"] == first["accuracy"] == 1
    assert "match" not in first and "match" not in second
    assert second["claim_recall"] == 0.5 and "accuracy" not in second


def test_lists_by_hand():
    groups = [["Paris", "City of Light"], ["Rome"], ["Oslo"]]
    found = alce.list_scores("paris, The City of Light, Bern, Rome.", groups)
    assert found == pytest.approx(
        {
            "list_precision": 3 / 4,
            "list_recall": 2 / 3,
            "list_recall_5": 2 / 3,
            "list_f1": 12 / 17,
            "list_f1_5": 12 / 17,
        }
    )
    many = [[str(i)] for i in range(10)]
    assert alce.list_scores("0, 1, 2, 3, 4", many)["list_recall_5"] == 1
    assert set(alce.list_scores("", many).values()) == {0}


# ---- citations ----------------------------------------------------------------------------------
class SetJudge:
    """Supports a claim if all its words are in the premise; counts how often it is asked."""

    name = "words"

    def __init__(self):
        self.calls = 0

    def entails(self, pairs):
        self.calls += 1
        return [set(h.strip(".").split()) <= set(p.split()) for p, h in pairs]


def documents(*texts):
    return tuple(Passage(str(i), "", text) for i, text in enumerate(texts))


def cited(answer, *texts):
    return alce.CitedSentences(alce.cited_sentences(answer), documents(*texts))


@pytest.mark.parametrize(
    ("answer", "texts", "expected"),
    [
        ("a b [1].", ["a b"], (1, 1)),
        ("a b.", ["a b"], (0, 0)),
        ("a b [2].", ["a b"], (0, 0)),  # beyond the documents
        ("a b [0].", ["a b"], (0, 0)),
        ("a b [1][2].", ["a", "b"], (1, 1)),  # both are needed
        ("a b [1][2].", ["a b", "c"], (0.5, 1)),  # the second adds nothing
        ("a b [1][2].", ["a b", "a b"], (1, 1)),  # each suffices
        ("a b [1][2].", ["a", "c"], (0, 0)),
        ("a b [1][1].", ["a b"], (1, 1)),
        ("a b [1][2][3][4].", ["c", "d", "e", "a b"], (0, 0)),  # the fourth is not read
        ("a b [1]. C d.", ["a b"], (1, 0.5)),
    ],
)
def test_citation_scores_by_hand(answer, texts, expected):
    assert alce.citation_scores([cited(answer, *texts)], SetJudge()) == [expected]


def plain_citation_scores(sentences, docs, entails):
    """ALCE's rules, sentence by sentence; sentences: (claim, marks)."""
    recalls, good, total = [], 0, 0
    for claim, marks in sentences:
        if not marks or min(marks) < 1 or max(marks) > len(docs):
            recalls.append(0)
            continue
        used = marks[:3]
        total += len(used)
        passages = [f"Title: {docs[m - 1].title}\n{docs[m - 1].text}" for m in used]
        joint = entails("\n".join(passages), claim)
        recalls.append(int(joint))
        if not joint:
            continue
        for k, passage in enumerate(passages):
            rest = "\n".join(p for j, p in enumerate(passages) if j != k)
            useless = len(used) > 1 and not entails(passage, claim) and entails(rest, claim)
            good += not useless
    return (good / total if total else 0), np.mean(recalls)


def test_citation_scores_equal_a_plain_second_implementation():
    rng, answers, expected = random.Random(0), [], []
    judge = SetJudge()
    for _ in range(500):
        docs = documents(*(" ".join(rng.choices("abcd", k=2)) for _ in range(rng.randint(1, 4))))
        sentences = [
            (
                " ".join(rng.choices("abcd", k=rng.randint(1, 2))) + ".",
                tuple(rng.choices(range(0, len(docs) + 2), [1, *[8] * len(docs), 1], k=n)),
            )
            for n in rng.choices(range(5), k=rng.randint(1, 3))
        ]
        written = [f"{c[:-1]} " + "".join(f"[{m}]" for m in marks) + "." for c, marks in sentences]
        read = [
            alce.CitedSentence(alce.without_marks(w).strip(), marks)
            for w, (_, marks) in zip(written, sentences, strict=True)
        ]
        answers.append(alce.CitedSentences(tuple(read), docs))
        expected.append(
            plain_citation_scores(
                [(s.text, s.marks) for s in read], docs, lambda p, h: judge.entails([(p, h)])[0]
            )
        )
    judge.calls = 0
    found = alce.citation_scores(answers, judge)
    assert judge.calls == 3  # all answers at once
    np.testing.assert_allclose(found, expected)
    assert len({tuple(np.round(f, 2)) for f in found}) > 10


def test_marks_are_read_from_their_sentence():
    first, second = alce.cited_sentences("It swims [1][12]. It eats fish [2].\nNot read [3].")
    assert (first.text, first.marks) == ("It swims.", (1, 12))
    assert (second.text, second.marks) == ("It eats fish.", (2,))
    assert alce.cited_sentences("") == ()
    assert alce.citation_scores([cited("", "a")], SetJudge()) == [None]


def test_segments_cite_by_their_citations():
    row = {
        "id": "0",
        "answer": "One. a b.",
        "retrieved": True,
        "segments": [{"text": "One. a b."}],
        "citations": [{"segment": 0, "passage": 1}],
        "passages": [{"id": "p", "title": "", "text": t} for t in ("c", "a b")],
    }
    [scored] = scores.score_questions([Question("0", "q", ("x",))], [row], SetJudge())
    found = scored["metrics"]
    assert (found["citation_precision"], found["citation_recall"]) == (1, 0.5)


# ---- models as judges ---------------------------------------------------------------------------
def make_model(folder, kind, labels=("contradiction", "neutral", "entailment"), words="abcd"):
    """A tiny model with random weights."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    special = ["<pad>", "</s>", "<unk>", "premise", "hypothesis", ":", "1", "0"]
    vocabulary = {piece: i for i, piece in enumerate([*special, *words])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    size = {"vocab_size": len(vocabulary), "pad_token_id": 0, "eos_token_id": 1}
    if kind == "bert":
        config = transformers.BertConfig(
            **size,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            id2label=dict(enumerate(labels)),
            label2id={name: i for i, name in enumerate(labels)},
        )
        model = transformers.BertForSequenceClassification(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(**size, n_embd=8, n_layer=1, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.T5Config(
            **size, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(folder)
    return model.eval()


PAIRS = [("a b", "a"), ("c", "d"), ("a b c d a", "b"), ("d", "d d d"), ("b " * 700, "a")]


def test_a_classifier_judges_by_the_label_of_entailment(tmp_path):
    import torch
    import transformers

    tokenizer_of = transformers.AutoTokenizer.from_pretrained
    model, verdicts = make_model(tmp_path / "nli", "bert"), {}
    judge = judges.NliJudge(tmp_path / "nli", batch=2)
    tokenizer = tokenizer_of(tmp_path / "nli")
    for label in range(3):
        with torch.no_grad():
            model.classifier.bias[:] = torch.tensor([8.0 * (i == label) for i in range(3)])
        judge._model.load_state_dict(model.state_dict())
        verdicts[label] = judge.entails(PAIRS)
        for (p, h), verdict in zip(PAIRS[:4], verdicts[label][:4], strict=True):
            best = model(**tokenizer(p, h, return_tensors="pt")).logits.argmax()
            assert verdict == (best == 2)
    assert verdicts[0] == verdicts[1] == [False] * 5 and verdicts[2] == [True] * 5
    assert judge.name == "nli" and judge.entails([]) == []


def test_a_t5_judges_by_writing_1(tmp_path):
    make_model(tmp_path / "true", "t5")
    judge = judges.NliJudge(tmp_path / "true", batch=2)
    asked = []

    def generate(input_ids, **_):
        asked.extend(judge._tokenizer.batch_decode(input_ids, skip_special_tokens=True))
        one, zero = judge._tokenizer.convert_tokens_to_ids(["1", "0"])
        return input_ids.new_tensor(
            [[one if "a b" in t else zero] for t in asked[-len(input_ids) :]]
        )

    written = judge.entails(PAIRS)  # the random model writes something else
    judge._model.generate = generate
    assert judge.entails(PAIRS[:3]) == [True, False, True] and written == [False] * 5
    assert sorted(asked) == sorted(f"premise : {p} hypothesis : {h}" for p, h in PAIRS[:3])
    judge.entails(PAIRS[4:])
    assert asked[-1].endswith("hypothesis : a") and len(asked[-1].split()) <= 512


@pytest.mark.parametrize("labels", [("yes", "no"), ("entailment", "entails"), ("not_entailment",)])
def test_labels_without_one_entailment_are_refused(tmp_path, labels):
    make_model(tmp_path, "bert", labels)
    with pytest.raises(UserError, match="id2label must name one label 'entailment'"):
        judges.NliJudge(tmp_path)


def test_a_judge_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such folder"):
        judges.NliJudge(tmp_path / "none")
    with pytest.raises(UserError, match=r"no config\.json in it"):
        judges.NliJudge(tmp_path)
    with pytest.raises(UserError, match="must be one of none, world, or the folder of an NLI"):
        evaluate.open_judge("wrold")
    for content in ("{}", '{"architectures": []}', "[1]", "no"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json: names no model class"):
            judges.NliJudge(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    with pytest.raises(UserError, match="transformers cannot open this judge"):
        judges.NliJudge(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs torch, .* pip install 'selfrag-jax\[eval\]'"):
        judges.NliJudge(tmp_path)


# ---- MAUVE --------------------------------------------------------------------------------------
def test_mauve_texts_are_as_alce_cuts_them():
    assert mauve_score.mauve_text("Why?", " It is so [1].\nMore") == "Why? It is so"
    assert len(mauve_score.mauve_text("Why?", "word " * 200).split()) == 100


def test_mauve_is_high_for_the_same_texts_and_low_for_others():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 4)), rng.normal(size=(40, 4)) + 20
    alike, low, high = mauve_score.mauve(a, a, 0)
    assert alike > 0.9 and low <= alike <= high
    assert mauve_score.mauve(a, b, 0)[0] < 0.1


def test_evaluate_names_the_judge_and_computes_mauve(tmp_path):
    make_model(tmp_path / "nli", "bert")
    make_model(tmp_path / "gpt", "gpt2")
    with_pairs = {"qa_pairs": [{"short_answers": ["a"]}], "answer": "a b c"}
    questions = [{"id": str(i), "question": "a b", **with_pairs} for i in range(8)]
    passage = {"id": "p", "title": "a", "text": "b"}
    row = {"retrieved": True, "segments": [], "citations": [], "passages": [passage]}
    answers = [{"id": str(i), "question": "a b", "answer": "a [1].", **row} for i in range(8)]
    task, predictions = tmp_path / "t.jsonl", tmp_path / "a.jsonl"
    task.write_text("\n".join(map(json.dumps, questions)))
    predictions.write_text("\n".join(map(json.dumps, answers)))
    out, models = tmp_path / "o" / "metrics.json", [str(tmp_path / n) for n in ("nli", "gpt")]
    rows = evaluate.evaluate_file(task, predictions, models[0], out, 0, models[1])
    by_name = {r["metric"]: r for r in rows}
    assert json.loads(out.read_text())["judge"] == "nli"
    assert by_name["citation_recall"]["n"] == 8 and 0 <= by_name["mauve"]["value"] <= 1
    assert by_name["str_em"]["value"] == 1
    with pytest.raises(UserError, match=r"no config\.json; --mauve is the local folder"):
        evaluate.evaluate_file(task, predictions, "none", out, 0, str(tmp_path / "none"))
