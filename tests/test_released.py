"""The released scripts' search against a plain form of the scripts, over full forward passes.

test_released_quirks.py takes their quirks one by one.
"""

import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from plain_search import (
    PlainNode,
    PlainSearch,
    log_softmax,
    make_passages,
    make_questions,
    make_rag,
    own_passages,
    prompt_ids,
    scores_of,
    structure,
)
from repetitions import some

from selfrag_jax.answering.config import DEFAULT
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.data.questions import read_questions
from selfrag_jax.engine import engine
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import reproduction, systems, tasks
from selfrag_jax.evaluation.metrics import gold_metrics
from selfrag_jax.records import Question, write_jsonl
from selfrag_jax.search import scoring
from selfrag_jax.search.released import scores
from selfrag_jax.search.released.search import ReleasedSearch
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control


# ---- gate and scores -----------------------------------------------------------------------------
def test_the_gate_compares_logarithms():
    """With p(Retrieval) = .9 and p(No Retrieval) = .1, log .9 / (log .9 + log .1) is only .04.

    So a less likely [Retrieval] gives a larger quotient.
    """
    likely, unlikely = np.log([0.1, 0.9, 0.0001]), np.log([0.9, 0.1, 0.0001])
    assert scores.released_gate(likely) == pytest.approx(0.10536 / (0.10536 + 2.30259), abs=1e-4)
    assert scores.released_gate(likely) < 0.2 < scores.released_gate(unlikely)
    assert scoring.p_retrieve(np.array([0.1, 0.9, 0.0]), "yes_no") > 0.2  # the paper's


def test_scores_by_hand():
    isrel, issup = np.array([0.2, 0.6]), np.array([0.5, 0.2, 0.3])
    isuse = np.array([0.1, 0.1, 0.1, 0.2, 0.5])
    no_issup, no_isuse = np.zeros(3), np.zeros(5)  # of groups that were never generated
    weights = scoring.Weights(1.0, 2.0, 0.5, 0.0)
    score = scores.released_score(0.4, isrel, issup, isuse, weights)
    assert score == pytest.approx(0.75 + 1.2 + 0.225)
    score = scores.released_score(0.4, isrel, no_issup, no_isuse, weights)
    assert score == pytest.approx(0.75)
    score = scores.released_score(0.4, isrel, issup, isuse, replace(weights, w_seq=1.0))
    assert score == pytest.approx(0.4 + 0.75 + 1.2 + 0.225)
    # The long form: no sequence, no IsUse, and no weights.
    assert scores.released_score_long(np.log(isrel), issup) == pytest.approx(0.75 + 0.6)
    assert scores.released_score_long(np.log(isrel), no_issup) == pytest.approx(0.75)


# ---- the scripts in plain form -------------------------------------------------------------------
@dataclass(frozen=True)
class ScriptTree:
    retrieved: bool
    nodes: list[PlainNode]  # their scores: in the long form, of the path
    beams: tuple[int, ...] = (0,)  # nodes of the deepest level, best first


class PlainScripts(PlainSearch):
    """The scripts, one prompt at a time, with log-probabilities of the whole vocabulary."""

    num_known = 5_000  # most likely tokens whose log-probabilities the scripts get to see
    num_unknown = 0  # tokens whose probability was asked for in vain
    num_generated = 0  # by all searches; the short form's gate reads a distribution only
    almost_0 = np.exp(-100)

    # ---- generation and scores ----
    def generate(self, prompt, limit):
        """The tokens, and at each position the log-probabilities of all tokens."""
        tokens, log_probs = [], []
        for _ in range(limit):
            logits = self.logits([*prompt, *tokens])
            logits[self.tokenizer.pad_id] = -1e30
            log_probs.append(log_softmax(logits))
            tokens.append(int(logits.argmax()))
            if tokens[-1] == self.tokenizer.eos_id:
                break
        self.num_generated += len(tokens) if limit > 1 else 0
        return tokens, log_probs

    def known_probability(self, log_probs, token, unknown=almost_0):
        """The probability of a token, or `unknown` where the scripts do not see it."""
        is_known = (log_probs > log_probs[token]).sum() < self.num_known
        self.num_unknown += not is_known
        return np.exp(log_probs[token]) if is_known else unknown

    def critique_scores(self, tokens, log_probs):
        """The terms of a segment's score: rel, sup, use and seq."""
        r, is_long_form = self.reflection, self.config.max_depth > 1
        unknown = -100 if is_long_form else self.almost_0
        isrel = np.array([self.known_probability(log_probs[0], i, unknown) for i in r.isrel])
        terms = {"rel": isrel[1] / isrel.sum(), "sup": 0.0, "use": 0.0}
        positions = [i for i, t in enumerate(tokens) if t in r.issup]
        if positions:
            p = np.array([self.known_probability(log_probs[positions[0]], i) for i in r.issup])
            terms["sup"] = p[0] / p.sum() + 0.5 * p[1] / p.sum()
        positions = [i for i, t in enumerate(tokens) if t in r.isuse]
        if positions:
            p = np.array([self.known_probability(log_probs[positions[0]], i) for i in r.isuse])
            weighted = zip((-1, -0.5, 0, 0.5, 1), p / p.sum(), strict=True)
            terms["use"] = sum(w * x for w, x in weighted)
        total = sum(log[t] for log, t in zip(log_probs, tokens, strict=True))
        terms["seq"] = np.exp(total / max(len(tokens), 1))
        return terms

    def with_passage(self, prompt, passage):
        parts = [Control(reflection.RETRIEVAL), *prompts.passage(passage)]
        return prompt + self.tokenizer.encode(parts)

    def first_paragraph(self, tokens):
        ends = [n for n in range(len(tokens)) if "\n\n" in self.tokenizer.decode(tokens[: n + 1])]
        return tokens[: ends[0] + 1] if ends else tokens

    # ---- run_short_form.py ----
    def short_form(self, prompt, passages):
        """One segment for each passage, or one without."""
        c, (no, yes, _) = self.config, self.reflection.retrieve
        retrieve = c.mode == "always_retrieve"
        if c.mode == "adaptive_retrieval":
            _, [log_probs] = self.generate(prompt, 1)
            retrieve = log_probs[yes] / (log_probs[yes] + log_probs[no]) > c.threshold
        if not retrieve:
            tokens, _ = self.generate([*prompt, no], c.max_new_tokens)
            return ScriptTree(False, [PlainNode(-1, tuple(tokens), 0.0)])
        nodes, w = [], c.weights
        for passage in passages[: c.ndocs]:
            tokens, log_probs = self.generate(self.with_passage(prompt, passage), c.max_new_tokens)
            s = self.critique_scores(tokens, log_probs)
            score = w.w_seq * s["seq"] + w.w_rel * s["rel"] + w.w_sup * s["sup"]
            nodes.append(PlainNode(-1, tuple(tokens), score + w.w_use * s["use"]))
        return ScriptTree(True, nodes)

    # ---- run_long_form_static.py ----
    def long_form(self, prompt, passages):
        """Level by level, the children of the nodes that say [Retrieval]."""
        c, (no, yes, _), eos = self.config, self.reflection.retrieve, self.tokenizer.eos_id
        retrieve = c.mode == "always_retrieve"
        if c.mode == "adaptive_retrieval":
            tokens, log_probs = self.generate(prompt, 25)
            p = np.exp([log_probs[0][i] for i in self.reflection.retrieve])
            says_retrieval = yes in self.first_paragraph(tokens)
            retrieve = says_retrieval and p[1] / (p[0] + p[1]) > c.threshold
        if not retrieve:
            tokens, _ = self.generate([*prompt, no], c.max_new_tokens)
            tokens = self.first_paragraph(tokens)
            return ScriptTree(False, [PlainNode(-1, tuple(tokens), 0.0)])

        nodes = [dict(prompt=prompt, pred=[yes], text=[], score=1.0)]  # the root
        levels = [[0]]
        for depth in range(1, c.max_depth):
            levels.append([])
            for parent in levels[depth - 1]:
                node = nodes[parent]
                history, previous = node["prompt"], node["text"]
                if yes not in node["pred"]:
                    continue
                branches = [self.with_passage(history + previous, p) for p in passages[: c.ndocs]]
                for branch in branches:
                    tokens, log_probs = self.generate(branch, c.max_new_tokens)
                    s = self.critique_scores(tokens, log_probs)
                    pred = self.remapped(tokens, log_probs)
                    until_retrieval = pred[: pred.index(yes)] if yes in pred else pred
                    child = dict(
                        prompt=history + previous,
                        pred=pred,
                        score=(s["rel"] + s["sup"]) * node["score"],
                        parent=parent,
                        tokens=until_retrieval,
                    )
                    # It gets into the prompt of the next child too.
                    previous = child["text"] = [t for t in until_retrieval if t != eos]
                    levels[depth].append(len(nodes))
                    nodes.append(child)
            ranked = sorted(levels[depth], key=lambda n: -nodes[n]["score"])
            levels[depth] = ranked[: c.beam_width]
        deepest = [level for level in levels[1:] if level][-1]
        # Here the root is no node.
        found = [PlainNode(n["parent"] - 1, tuple(n["tokens"]), n["score"]) for n in nodes[1:]]
        return ScriptTree(True, found, tuple(n - 1 for n in deepest))

    def remapped(self, tokens, log_probs):
        """The tokens, with every [No Retrieval] decided again and one appended if there was any."""
        (no, yes, again), threshold = self.reflection.retrieve, self.config.threshold
        if no not in tokens:
            return list(tokens)
        pred = [t for t in tokens if t != self.tokenizer.eos_id]
        for i, token in enumerate(tokens):
            if token != no:
                continue
            p_no, p_yes, p_again = (
                self.known_probability(log_probs[i], j) for j in (no, yes, again)
            )
            # The script compares the result of the comparison once more.
            if float((p_yes + p_again) / (p_yes + p_no) > threshold) > threshold:
                pred[i] = yes
        return [*pred, no]

    # ---- texts of answers ----
    def text(self, tokens):
        """The text as vLLM returns it, but for the space after control tokens at its beginning."""
        removed = "|".join(re.escape(t) for t in reflection.ALL if t != reflection.CONTINUE)
        return re.sub(f"^((?:{removed})+) ", r"\1", self.tokenizer.decode(tokens))

    def cleaned(self, text, *more):
        """The text without control tokens and `more`."""
        for token in (*(t for t in reflection.ALL if t != reflection.CONTINUE), "</s>", *more):
            text = text.replace(token, "")
        return text

    def elected(self, tree):
        """The option, a text, whose passages' scores sum highest."""
        sums = {}
        for node in tree.nodes:
            option = self.cleaned(self.text(node.tokens), "\n")
            sums[option] = sums.get(option, 0) + node.score
        return sorted(sums.items(), key=lambda pair: pair[1], reverse=True)[0][0]

    def short_answer(self, tree, is_closed_set):
        if not tree.retrieved:
            text = self.cleaned(self.text(tree.nodes[0].tokens), "\n")
        elif is_closed_set:
            text = self.elected(tree)
        else:
            text = self.text(max(tree.nodes, key=lambda n: n.score).tokens)
        text = text[1:] if text[:1] in ("#", ":") else text
        if is_closed_set or not tree.retrieved:
            return text
        # The script leaves the control tokens of this one. Our answers have none.
        return self.cleaned(text, reflection.CONTINUE).strip()

    def long_answer(self, tree, task):
        if not tree.retrieved:
            return self.tidy(self.text(tree.nodes[0].tokens).split("\n\n")[0])
        paths = [self.path_texts(tree, node) for node in tree.beams]
        joined = " ".join(["", *paths[0]])
        if task == "factscore":
            return spaced(self.tidy(joined))
        use_second = not self.tidy(joined) and len(paths) > 1
        answer, seen = "", []
        for i, text in enumerate(["", *paths[1 if use_second else 0]]):
            if text and self.tidy(text) not in seen:
                seen.append(self.tidy(text))
                answer += self.tidy(text)[:-1] + f" [{i}]" + ". "
        answer = spaced(answer[:-1])
        return answer.replace(".[Continue to Use Evidence]", " [1]. ").replace(". [1] ", " [1]. ")

    def path_texts(self, tree, node):
        """The text of each segment down to a node."""
        texts = []
        while node >= 0:
            # vLLM does not return the end of text.
            texts.insert(0, self.text(tree.nodes[node].tokens).replace("</s>", ""))
            node = tree.nodes[node].parent
        return texts

    def tidy(self, text):
        return self.cleaned(text).removeprefix(" ")


def spaced(text):
    return re.sub(r"(?<=\w)([.!?])(?=\w)", r"\1 ", text)


# ---- the search against the scripts --------------------------------------------------------------
MODES = ("always_retrieve", "adaptive_retrieval", "no_retrieval", "adaptive_retrieval")
LONG_FORM_SHAPES = ((1, 2, 3), (3, 1, 3), (3, 2, 4), (10, 4, 3))  # passages, beam width, depth
SHORT_FORM_SHAPES = ((1, 1, 1), (3, 1, 1), (5, 1, 1), (10, 1, 1))


def random_config(seed, is_long_form):
    """Settings of a released search: the shape and the mode go round with the seed."""
    rng = np.random.default_rng(seed)
    shapes = LONG_FORM_SHAPES if is_long_form else SHORT_FORM_SHAPES
    ndocs, width, depth = shapes[seed % 4]
    return replace(
        DEFAULT.search,
        scorer="released",
        mode=MODES[seed // 4 % 4],
        threshold=(0.2, 0.5, 0.9)[rng.integers(3)],
        weights=scoring.Weights(*rng.choice([0.0, 0.5, 1.0, 2.0], 4)),
        beam_width=width,
        max_depth=depth,
        ndocs=ndocs,
        max_new_tokens=8,
        length_bucket=32,
    )


SCRIPT_TASKS = {  # (the scripts' name, ours); "" asks the bare question
    False: (("", "popqa"), ("arc_c", "arc_challenge"), ("fever", "pubhealth"), ("fever", "fever")),
    True: (("", "factscore_bio"), ("asqa", "asqa"), ("eli5", "eli5")),
}
INSTRUCTIONS = {name: f"{name}: what?" for name in ("arc_c", "fever", "asqa", "eli5")}


def script_prompt(name, row):
    """The instruction as run_short_form.py and run_long_form_static.py build it."""
    if not name:
        return row["question"]
    if name != "arc_c":
        blank = "" if name in ("asqa", "eli5") else "\n\n"
        return f"{INSTRUCTIONS[name]}{blank}## Input:\n\n{row['question']}"
    texts = dict.fromkeys("ABCD", "")
    for label, text in zip(row["choices"]["label"], row["choices"]["text"], strict=True):
        texts["ABCD"[int(label) - 1] if label in "1234" else label] = text
    lines = "".join(f"\n{letter}: {text}" for letter, text in texts.items())
    return f"{INSTRUCTIONS[name]}\n\n### Input:\n{row['question']}{lines}"


def random_row(rng, name, question):
    """A row of the task's published file: three options, four or five."""
    if name != "arc_c":
        return {"question": question, "answers": ["true"]}
    n = int(rng.integers(3, 6))
    labels = list("1234"[:n] if n < 5 and rng.random() < 0.5 else "ABCDE"[:n])
    texts = [str(t) for t in rng.choice(["Quenport", "Lisford", "the ropemaker"], n)]
    choices = {"label": labels, "text": texts}
    return {"question": question, "choices": choices, "answerKey": labels[2]}


def asked_by_task(rng, tmp_path, is_long_form, questions):
    """(Question as our task asks it, the script's prompt, the row); tasks go round."""
    file, rows = tmp_path / "instructions.json", tmp_path / "rows.jsonl"
    file.write_text(json.dumps(INSTRUCTIONS))
    known = [
        (name, tasks.with_instruction(tasks.load(f"{ours}:released"), file))
        for name, ours in SCRIPT_TASKS[is_long_form]
    ]
    tasks_of = [known[i % len(known)] for i in range(len(questions))]
    made = [random_row(rng, n, q) for (n, _), q in zip(tasks_of, questions, strict=True)]
    write_jsonl(rows, made)
    read = zip(tasks_of, made, read_questions(rows), strict=True)
    return [(task.ask(q), script_prompt(n, row), row) for (n, task), row, q in read]


def random_questions(tokenizer, config, seed, n=5):
    """n prompts, and passages for each."""
    rng = np.random.default_rng(2000 + seed)
    words = ["where", "what", "who is Mara", "the ropemaker", "of Quenport"]
    questions = [" ".join(rng.choice(words, 1 + i)) for i in range(n)]
    passages = [
        make_passages(rng, tokenizer, int(rng.integers(1, config.ndocs + 1))) for _ in questions
    ]
    return [prompt_ids(tokenizer, q) for q in questions], passages


def search_and_scripts(loaded, config, seed):
    """The search and the plain scripts; for even seeds, both know half of the vocabulary only."""
    plain = PlainScripts(loaded, config)

    class Search(ReleasedSearch):
        @property
        def rules(self):
            return replace(super().rules, num_known=plain.num_known)

    search = Search(loaded.model, loaded.params, loaded.tokenizer, config, 64)
    num_known = ReleasedSearch.rules.fget(search).num_known
    plain.num_known = (loaded.tokenizer.vocab_size // 2, num_known)[seed % 2]
    return search, plain


@pytest.mark.slow
def test_the_short_form_equals_the_script(talkative):
    """For 80 questions (--full: 160): the same decision, tokens, scores, vote and answer."""
    num_retrieved = num_shared_options = num_unknown = 0
    question = Question("0", "?", options=("a", "b"))
    num_seeds = some(16, 32)
    for seed in range(num_seeds):
        config = random_config(seed, is_long_form=False)
        all_prompts, passages = random_questions(talkative.tokenizer, config, seed)
        # Where there is room, a passage occurs twice, so two segments have the same text.
        passages = [[*found, found[-1]][: config.ndocs] for found in passages]
        search, plain = search_and_scripts(talkative, config, seed)
        trees = search.run(all_prompts, own_passages(passages))
        for prompt, found, tree in zip(all_prompts, passages, trees, strict=True):
            before = plain.num_generated
            expected = plain.short_form(prompt, found)
            assert tree.num_tokens == plain.num_generated - before
            assert (tree.nodes[0].action == "retrieve") == expected.retrieved
            assert [n.tokens for n in tree.nodes] == [n.tokens for n in expected.nodes]
            np.testing.assert_allclose(scores_of(tree), scores_of(expected), atol=1e-5)
            assert tree.best().node.score == max(scores_of(tree))
            for is_closed_set in (False, True):
                beam = tree.best()
                if is_closed_set and expected.retrieved:
                    beam = search.elect(tree, question) or beam
                _, _, text = search.render(tree, beam, "", is_closed_set)
                assert text == plain.short_answer(expected, is_closed_set)
            if expected.retrieved:
                num_retrieved += 1
                option, elected = search.script_text.option, search.elect(tree, question).node
                assert option(elected.tokens) == plain.elected(expected)
                same = [n.score for n in tree.nodes if option(n.tokens) == option(elected.tokens)]
                assert elected.score == max(same)
                num_shared_options += len(same) > 1
        num_unknown += plain.num_unknown
    # Each seed has five questions: both decisions, and each case that the two must agree on, occur.
    assert 5 * num_seeds / 4 < num_retrieved < 5 * num_seeds * 3 / 4
    assert min(num_shared_options, num_unknown) > num_seeds / 4


@pytest.mark.slow
def test_the_long_form_equals_the_script(talkative):
    """For 80 questions (--full: 160): the same tree, totals, deepest level and answer.

    The texts are compared for tasks with citation marks and without.
    """
    no_retrieval = talkative.tokenizer.id(reflection.NO_RETRIEVAL)
    num_deep = num_stopped = num_remapped = num_unknown = 0
    num_seeds = some(16, 32)
    for seed in range(num_seeds):
        config = random_config(seed, is_long_form=True)
        all_prompts, passages = random_questions(talkative.tokenizer, config, seed)
        search, plain = search_and_scripts(talkative, config, seed)
        trees = search.run(all_prompts, own_passages(passages))
        for prompt, found, tree in zip(all_prompts, passages, trees, strict=True):
            before = plain.num_generated
            expected = plain.long_form(prompt, found)
            assert tree.num_tokens == plain.num_generated - before
            assert (tree.nodes[0].action == "retrieve") == expected.retrieved
            assert structure(tree) == structure(expected)
            np.testing.assert_allclose(
                [n.total for n in tree.nodes], scores_of(expected), atol=1e-5
            )
            assert tuple(b.node.id for b in tree.beams) == expected.beams
            for task in ("asqa", "factscore"):
                _, _, text = search.render(tree, tree.best(), task, False)
                assert text == plain.long_answer(expected, task)
            depth = max(n.depth for n in tree.nodes)
            num_deep += depth > 0
            num_stopped += expected.retrieved and depth < config.max_depth - 2
            num_remapped += any(no_retrieval in n.tokens for n in tree.nodes)
        num_unknown += plain.num_unknown
    assert min(num_deep, num_stopped, num_remapped, num_unknown) > num_seeds / 4


@pytest.mark.parametrize("is_long_form", [False, True])
def test_prompts_equal_the_scripts(tmp_path, is_long_form):
    """Of 500 random questions, with the instructions given."""
    rng = np.random.default_rng(7)
    words = ["where", "## Input:\n\n", "Ω", "the ropemaker", "\n", "A:", reflection.RETRIEVAL]
    questions = [f"q{i} " + " ".join(rng.choice(words, 1 + i % 7)) for i in range(500)]
    asked = asked_by_task(rng, tmp_path, is_long_form, questions)
    assert [q.prompt for q, _, _ in asked] == [prompt for _, prompt, _ in asked]


def script_match(row, pred):
    """The metric of run_short_form.py, --metric=match, on a preprocessed row."""
    if "SUPPORTS" in pred:
        pred = "true"
    elif "REFUTES" in pred:
        pred = "false"
    return int(any(gold in pred for gold in row.get("answers", [row.get("answerKey")])))


def test_the_released_variants_score_short_answers_as_the_script_does(tmp_path):
    """500 random answers to each task; ARC's C is wrong where the file says 3."""
    rng = np.random.default_rng(3)
    said = (
        "true",
        "True.",
        "SUPPORTS",
        "It REFUTES that",
        "A",
        "C",
        "C: Lisford",
        "3",
        "",
        "untrue",
    )
    asked = asked_by_task(rng, tmp_path, False, [f"q{i}" for i in range(2000)])
    scored = []
    for q, _, row in asked:
        answer = str(rng.choice(said))
        found = gold_metrics(q, answer)
        assert found["accuracy"] == found["released_match"] == script_match(row, answer)
        ours = found.get("option_accuracy", found.get("match"))
        scored.append((q.task, answer, found["accuracy"], ours))
    for task, answer, script, ours in (
        ("arc_challenge", "C", 0, 1), ("arc_challenge", "3", 1, 0), ("arc_challenge", "C", 1, 1),
        ("popqa", "True.", 0, 1), ("pubhealth", "untrue", 1, 0), ("fever", "SUPPORTS", 1, 1),
    ):  # fmt: skip
        assert (task, answer, script, ours) in scored
    task = tasks.load("arc_challenge:released")
    assert task.main_metric == "released_match" and task.figure("option_accuracy") == {}
    assert task.figure("accuracy") == task.figure("released_match") == {"7b": 67.3, "13b": 73.1}
    alone = systems.BY_NAME["no_retrieval"]
    assert reproduction.published(task, alone, "released_match") == {"7b": 21.8}
    assert tasks.load("asqa:released").main_metric == "str_em"
    values = {"instructions": "i", "scorer": None, "index": None}
    for spec, n in (("popqa", 1), ("popqa:released", 0), ("nq", 0)):
        task = tasks.load(spec)
        lines = reproduction.causes(task, (), values, {task.main_metric}, "f.jsonl", ())
        assert sum("metric: match; the paper's figures are the scripts'" in c for c in lines) == n


@pytest.mark.slow
@pytest.mark.parametrize("is_long_form", [False, True])
def test_answers_to_tasks_equal_the_scripts(talkative, tmp_path, is_long_form):
    """From a row of each task's file to the answer's text: the same scores, vote and text."""
    rng, num_retrieved = np.random.default_rng(11), 0
    seeds = (1, 6, *range(7, 16))[: some(2, 11)]  # always, and adaptive
    for seed in seeds:
        config = random_config(seed, is_long_form)
        words = ["where", "what", "who is Mara", "the ropemaker", "of Quenport"]
        num_tasks = len(SCRIPT_TASKS[is_long_form])
        questions = [" ".join(rng.choice(words, 1 + i % 3)) for i in range(num_tasks)]
        asked = asked_by_task(rng, tmp_path, is_long_form, questions)
        passages = [make_passages(rng, talkative.tokenizer, config.ndocs) for _ in asked]
        asked = [
            (replace(q, id=str(i), ctxs=tuple(found)), prompt)
            for i, ((q, prompt, _), found) in enumerate(zip(asked, passages, strict=True))
        ]
        rag = SelfRAG(talkative, None, replace(DEFAULT, search=config, batch=4, max_length=128))
        plain = PlainScripts(talkative, config)
        known = ReleasedSearch(talkative.model, talkative.params, talkative.tokenizer, config, 128)
        plain.num_known = known.rules.num_known
        for (q, prompt), answer in zip(asked, rag.answer([q for q, _ in asked]), strict=True):
            assert not answer.error and not any("was cut from" in n for n in answer.notices)
            ids = prompt_ids(talkative.tokenizer, prompt)
            if is_long_form:
                expected = plain.long_form(ids, q.ctxs)
                task = q.task if q.task in ("asqa", "eli5") else "factscore"
                text = plain.long_answer(expected, task)
            else:
                expected = plain.short_form(ids, q.ctxs)
                text = plain.short_answer(expected, bool(q.options))
            assert answer.retrieved == expected.retrieved and answer.answer == text
            num_retrieved += expected.retrieved
            if expected.retrieved:
                found = [node["total" if is_long_form else "score"] for node in answer.tree]
                np.testing.assert_allclose(found, scores_of(expected), atol=1e-4)
    assert num_retrieved > len(seeds)


@pytest.mark.parametrize(
    ("depth", "mode", "reads"),
    [
        (1, "always_retrieve", 1),
        (1, "adaptive_retrieval", 1),
        (2, "always_retrieve", 1),
        (2, "adaptive_retrieval", 2),
    ],
)
def test_a_prompt_is_read_once(talkative, monkeypatch, depth, mode, reads):
    """And once more, without its last token, for the gate of the long form and its first level."""
    jobs_read, read = [], engine.Engine.read

    def recording_read(self, jobs):
        jobs_read.extend(jobs)
        return read(self, jobs)

    monkeypatch.setattr(engine.Engine, "read", recording_read)
    texts = ["Who?" + " x" * i for i in range(3)]
    questions = make_questions(talkative.tokenizer, 5, texts, 2)
    rag = make_rag(talkative, ndocs=2)
    answers = rag.answer(questions, scorer="released", mode=mode, threshold=0.2, max_depth=depth)
    assert all(a.segments and not a.error for a in answers)
    assert len(jobs_read) == reads * len(questions)


# ---- through SelfRAG -----------------------------------------------------------------------------
@pytest.mark.slow
def test_answers_of_the_released_scorer(talkative):
    """Neighbours change nothing, citations are valid, and no passage without IsSup is cited."""
    questions = make_questions(talkative.tokenizer, 5, [f"Where {i}?" for i in range(5)])
    rag = make_rag(talkative)
    for depth in (1, 3):
        changes = dict(scorer="released", mode="always_retrieve", max_depth=depth)
        answers = rag.answer(questions, **changes)
        for question, a in list(zip(questions, answers, strict=True))[: some(2, 5)]:
            [alone] = rag.answer([question], **changes)
            assert alone.answer == a.answer and alone.score == pytest.approx(a.score, abs=1e-5)
        for a in answers:
            for c in a.citations:
                assert sum(a.segments[c.segment].issup.values()) > 0
                assert c.passage < len(a.passages)


@pytest.mark.slow
def test_the_task_and_the_options_of_a_question_reach_its_text(talkative, monkeypatch):
    """asqa alone has citation marks, and the short form knows what was put to a vote."""
    [question] = make_questions(talkative.tokenizer, 5, ["Where?"])
    rag, changes = make_rag(talkative), dict(scorer="released", mode="always_retrieve")
    for task, has_marks in (("asqa", True), ("factscore", False), ("", False)):
        [a] = rag.answer([replace(question, task=task)], max_depth=3, **changes)
        assert a.answer and not a.error and bool(re.search(r" \[1\]\.", a.answer)) == has_marks
    voted, render = [], ReleasedSearch.render

    def recording_render(self, tree, beam, task, was_voted):
        voted.append(was_voted)
        return render(self, tree, beam, task, was_voted)

    monkeypatch.setattr(ReleasedSearch, "render", recording_render)
    for options, depth in (((), 1), (("a", "b"), 1), (("a", "b"), 3)):
        rag.answer([replace(question, options=options)], max_depth=depth, **changes)
    assert voted == [False, True, False]


def test_settings_that_the_scripts_do_not_have_are_refused(talkative):
    rag = make_rag(talkative)
    with pytest.raises(UserError, match="needs a --threshold"):
        rag.answer(["q"], scorer="released", threshold=None)
    with pytest.raises(UserError, match="searches have none"):
        rag.answer(["q"], scorer="released", constraints=(reflection.IRRELEVANT,))
    with pytest.raises(UserError, match="searches have none"):
        rag.answer(["q"], scorer="released", constraints=(reflection.NO_SUPPORT,), max_depth=1)
    rag.check(
        dict(scorer="released", constraints=[reflection.NO_SUPPORT], max_depth=3, threshold=0.2)
    )
    with pytest.raises(UserError, match="keep no passage"):
        rag.answer(["q"], scorer="released", keep_passages=True)
    with pytest.raises(UserError, match="--scorer='authors': must be one of paper, released"):
        rag.answer(["q"], scorer="authors")
