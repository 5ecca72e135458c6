"""The quirks of the released scripts' search, one by one, in the order that its package lists them.

A test writes down what the model generates, runs the search on it, and checks what the search asks
for and what it makes of the answer. test_released.py compares the whole with the scripts.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from plain_search import make_search, prompt_ids

from selfrag_jax.answering.config import DEFAULT
from selfrag_jax.engine.requests import FindPassages, Generate, ReadTokens
from selfrag_jax.engine.segments import GeneratedSegments, Step, TokenRules
from selfrag_jax.records import Passage
from selfrag_jax.search import scoring
from selfrag_jax.search.released import scores
from selfrag_jax.search.released.rules import ReleasedReadings
from selfrag_jax.search.released.search import ReleasedSearch
from selfrag_jax.search.tree import SearchTree
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control

PASSAGES = [
    Passage("0", "First", "Mara studied."),
    Passage("1", "Second", "Mara lives in Lisford."),
]
NO_RETRIEVAL, RETRIEVAL = reflection.NO_RETRIEVAL, reflection.RETRIEVAL
CONTINUE, NO_SUPPORT = reflection.CONTINUE, reflection.NO_SUPPORT
RELEVANT, FULLY, UTILITY = reflection.RELEVANT, reflection.FULLY, "[Utility:5]"


# ---- a model that generates what a test writes down ----------------------------------------------
@dataclass
class Branch:
    """What a branch generates, and how probable its critiques are."""

    parts: tuple[str, ...]  # text and reflection tokens
    rel: float  # p(Relevant)
    sup: float  # p(Fully supported); 0: no IsSup token is generated
    retrieve: tuple[float, float, float]  # the Retrieve tokens' distribution at every position
    tokens: tuple[int, ...]  # instead of parts


def branch(*parts, rel=0.5, sup=0.0, retrieve=(1.0, 0.0, 0.0), tokens=()):
    return Branch(parts, rel, sup, retrieve, tuple(tokens))


@dataclass
class SearchRun:
    """A search that has ended, and what it asked for."""

    search: ReleasedSearch
    tree: SearchTree | None = None
    queries: list = field(default_factory=list)  # FindPassages.previous of each
    histories: list = field(default_factory=list)  # of each Generate: all tokens before a branch
    limits: list = field(default_factory=list)  # of each Generate

    def render(self, task="", voted=False):
        """(beam, path, text) of the answer from the best beam."""
        return self.search.render(self.tree, self.tree.best(), task, voted)

    def text(self, task="", voted=False):
        return self.render(task, voted)[2]


class FakeModel:
    """Stands in for the model and the engine."""

    def __init__(self, loaded):
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        self.prompt = prompt_ids(loaded.tokenizer, "Where is Mara?")

    def encode(self, *parts):
        return self.tokenizer.encode([Control(p) if p in reflection.ALL else p for p in parts])

    def passage_input(self, i):
        """The tokens that feed PASSAGES[i] to a branch."""
        return self.tokenizer.encode([Control(RETRIEVAL), *prompts.passage(PASSAGES[i])])

    def search(self, generations, p=(0.5, 0.4, 0.1), **changes):
        """Runs a search of the long form, three deep, unless `changes` say otherwise.

        generations: what the branches of each Generate request generate, in order. p: distribution
        of the Retrieve tokens after the prompt.
        """
        fields = dict(
            scorer="released", mode="always_retrieve", threshold=0.2, ndocs=2, beam_width=2,
            max_depth=3,
        )  # fmt: skip
        search = make_search(self.loaded, replace(DEFAULT.search, **(fields | changes)))
        run, generations = SearchRun(search), iter(generations)
        requests, result, prefix = search.search(self.prompt, "0"), None, []
        while True:
            try:
                request = requests.send(result)
            except StopIteration as end:
                run.tree = end.value
                assert next(generations, None) is None  # the search has asked for all of them
                return run
            if isinstance(request, ReadTokens):
                [prefix] = request.tokens
                result = np.array([p]), np.log(np.maximum([p], 1e-30))
            elif isinstance(request, FindPassages):
                run.queries.append(request.previous)
                result = [PASSAGES]
            else:
                assert isinstance(request, Generate)
                run.histories.append([[*prefix, *fed] for fed in request.branches[0]])
                run.limits.append(request.limit)
                result = self._segments(next(generations))

    def two_segments(self, first, second):
        """A search whose best path has two segments, of these parts."""
        level = [
            branch(*first, RETRIEVAL, UTILITY, rel=0.9, sup=0.9),
            branch("b", RETRIEVAL, rel=0.1),
        ]
        leaves = [branch(*second, UTILITY, rel=0.9, sup=0.9), branch("c", rel=0.1)]
        return self.search([level, leaves, leaves])

    def _segments(self, branches):
        """The branches as the engine returns them, [1, P]."""
        tokens = [list(b.tokens or self.encode(*b.parts)) for b in branches]
        n, longest = len(branches), max(map(len, tokens))
        padded = [[*row, *[self.tokenizer.pad_id] * (longest - len(row))] for row in tokens]
        isrel = np.array([[1.0 - b.rel, b.rel] for b in branches])
        issup = np.array([[b.sup, 0.0, 1.0 - b.sup] if b.sup else [0.0] * 3 for b in branches])
        return GeneratedSegments(
            tokens=np.array(padded)[None],
            length=np.array([[len(row) for row in tokens]]),
            log_prob=np.zeros((1, n)),
            num_text_tokens=np.ones((1, n), int),
            isrel=isrel[None],
            issup=issup[None],
            isuse=np.zeros((1, n, 5)),
            retrieve=np.zeros((1, n, 3)),
            finished=np.zeros((1, n), bool),
            complete=np.zeros((1, n), bool),
            next_position=np.zeros((1, n), int),
            extras=ReleasedReadings(
                retrieve_at=np.array([[b.retrieve] * longest for b in branches])[None],
                rel_log_probs=np.log(isrel)[None],
                isuse_seen=np.zeros((1, n), bool),
            ),
        )


@pytest.fixture
def fake_model(talkative):
    return FakeModel(talkative)


# ---- gate ----------------------------------------------------------------------------------------
def test_the_long_forms_gate_looks_for_a_generated_retrieval_token(fake_model):
    """With [Retrieval] among the first 25 tokens, the threshold decides.

    Without it nothing is fetched, however likely the token is after the prompt.
    """
    adaptive = dict(mode="adaptive_retrieval", max_depth=2)
    with_token, without_token = [branch("Mara", RETRIEVAL)], [branch("Mara studied")]
    answer, level = [branch("so")], [branch("a"), branch("b")]

    run = fake_model.search([without_token, answer], p=(0.01, 0.99, 0.0), **adaptive)
    assert run.limits[0] == 25 and run.queries == []
    assert run.tree.nodes[0].action == "no_retrieval"
    run = fake_model.search([with_token, answer], p=(0.9, 0.1, 0.0), **adaptive)
    assert run.queries == [] and run.tree.nodes[0].action == "no_retrieval"
    run = fake_model.search([with_token, level], p=(0.7, 0.3, 0.0), **adaptive)
    assert run.queries == [[[]]]
    # What follows a blank line does not count.
    after_blank_line = [branch("Mara\n\n", RETRIEVAL)]
    run = fake_model.search([after_blank_line, answer], p=(0.7, 0.3, 0.0), **adaptive)
    assert run.queries == []


# ---- no retrieval --------------------------------------------------------------------------------
def test_a_long_answer_without_retrieval_ends_at_the_first_blank_line(fake_model):
    paragraphs = "Mara studied\n\nLisford"
    run = fake_model.search([[branch(paragraphs)]], mode="no_retrieval")
    assert run.text() == "Mara studied"
    assert run.histories == [[[*fake_model.prompt, *fake_model.encode(NO_RETRIEVAL)]]]

    # A critique between two line breaks keeps them apart.
    tokens = fake_model.encode("Mara\n\nLisford\n\nso")
    line_break = next(a for a, b in pairwise(tokens) if a == b)
    at = tokens.index(line_break) + 1
    split = branch(tokens=[*tokens[:at], *fake_model.encode(RELEVANT), *tokens[at:]])
    assert fake_model.search([[split]], mode="no_retrieval").text() == "Mara\n\nLisford"

    short = fake_model.search([[branch(paragraphs)]], mode="no_retrieval", max_depth=1)
    assert fake_model.tokenizer.decode(short.tree.best().node.tokens) == paragraphs


# ---- generation ----------------------------------------------------------------------------------
def test_only_the_end_of_text_ends_a_generation(talkative):
    r, t = talkative.tokenizer.reflection_ids(), talkative.tokenizer
    released = make_search(talkative, replace(DEFAULT.search, scorer="released")).rules
    tokens = jnp.array([r.retrieve[1], r.isuse[4], t.eos_id])
    ends_before, ends_answer, _ = released.roles(tokens)
    assert ends_before.tolist() == [False] * 3 and ends_answer.tolist() == [False, False, True]
    ends_before, ends_answer, _ = TokenRules(t.eos_id, t.pad_id, r).roles(tokens)  # the paper's
    assert ends_before.tolist() == [True, False, False]
    assert ends_answer.tolist() == [False, True, True]


# ---- where critiques are read --------------------------------------------------------------------
@dataclass
class Readings:
    """What the released search reads while a segment is generated."""

    segment: GeneratedSegments
    logits: np.ndarray  # [steps, 1, V]

    def distribution(self, step, ids):
        """Of a group at a step."""
        e = np.exp(self.logits[step, 0, list(ids)])
        return e / e.sum()


@pytest.fixture
def read_critiques(talkative):
    """read_critiques(*tokens) -> Readings, of made-up logits."""
    t = talkative.tokenizer
    released = make_search(talkative, replace(DEFAULT.search, scorer="released")).rules

    def read(*tokens, num_known=None, logits=None, paper=False):
        rules = replace(released, num_known=num_known or t.vocab_size)
        if paper:
            rules = make_search(talkative, DEFAULT.search).rules
        if logits is None:
            rng = np.random.default_rng(0)
            logits = rng.normal(size=(len(tokens), 1, t.vocab_size)).astype(np.float32)
        false = jnp.zeros(1, bool)
        segment, issup_seen = GeneratedSegments.empty(1, len(tokens), rules), false
        for age, name in enumerate(tokens):
            token = jnp.array([t.encode(Control(name))[0]])
            step = Step(
                logits[age], token, jnp.array([age]), live=~false, ends=false, at_limit=false
            )
            segment, issup_seen = rules.read_critiques(segment, step, issup_seen)
        return Readings(segment, logits)

    return read


def test_isrel_is_read_at_the_first_token_whatever_it_is(read_critiques, talkative):
    r = talkative.tokenizer.reflection_ids()
    readings = read_critiques("Mara", "[Irrelevant]", RELEVANT)
    expected = readings.distribution(0, r.isrel)
    np.testing.assert_allclose(readings.segment.isrel[0], expected, rtol=1e-5)


def test_issup_and_isuse_are_read_where_they_are_first_generated(read_critiques, talkative):
    r = talkative.tokenizer.reflection_ids()
    readings = read_critiques(RELEVANT, NO_SUPPORT, FULLY, "[Utility:2]", UTILITY)
    issup, isuse = readings.distribution(1, r.issup), readings.distribution(3, r.isuse)
    np.testing.assert_allclose(readings.segment.issup[0], issup, rtol=1e-5)
    np.testing.assert_allclose(readings.segment.isuse[0], isuse, rtol=1e-5)


def test_the_first_issup_of_a_segment_counts_with_either_scorer(read_critiques, talkative):
    r = talkative.tokenizer.reflection_ids()
    for paper in (False, True):
        readings = read_critiques(RELEVANT, NO_SUPPORT, "Mara", FULLY, paper=paper)
        expected = readings.distribution(1, r.issup)
        np.testing.assert_allclose(readings.segment.issup[0], expected, rtol=1e-5)


def test_issup_and_isuse_that_are_never_generated_stay_zero(read_critiques):
    segment = read_critiques(RELEVANT, "Mara", RETRIEVAL).segment
    assert not np.any(segment.issup) and not np.any(segment.isuse)


def test_no_retrieval_is_decided_once_more(fake_model):
    """(p(Retrieval) + p(Continue)) / (p(Retrieval) + p(No Retrieval)) is compared again.

    Above the threshold, [No Retrieval] becomes [Retrieval], where the text is cut. In any case a
    [No Retrieval] is appended.
    """
    parts = ("a", NO_RETRIEVAL, "b")

    def tokens(retrieve):
        level = [branch(*parts, retrieve=retrieve), branch("c")]
        return list(fake_model.search([level], max_depth=2).tree.nodes[0].tokens)

    assert tokens((0.5, 0.3, 0.2)) == fake_model.encode("a")  # .5 / .8
    assert tokens((0.9, 0.1, 0.0)) == fake_model.encode(*parts, NO_RETRIEVAL)  # .1


# ---- unknown probabilities -----------------------------------------------------------------------
def test_the_scripts_know_the_5000_or_32000_most_likely_tokens_of_a_step(talkative):
    for depth, num_known in ((1, 5_000), (2, 32_000), (7, 32_000)):
        config = replace(DEFAULT.search, scorer="released", max_depth=depth)
        assert make_search(talkative, config).rules.num_known == num_known


def test_an_unknown_token_counts_as_e_to_the_minus_100(read_critiques, talkative):
    """[Partially supported] is the 6th most likely token, [No support / Contradictory] the 7th."""
    t = talkative.tokenizer
    logits = np.linspace(-9, -8, t.vocab_size, dtype=np.float32)
    (fully, partially, no_support), others = t.reflection_ids().issup, [20, 21, 22, 23]
    logits[[fully, *others, partially, no_support]] = [5, 4, 4, 4, 4, 3, 2]

    def issup(num_known):
        readings = read_critiques(FULLY, num_known=num_known, logits=logits[None, None])
        return readings.segment.issup[0]

    p = np.exp([5.0, 3.0, 2.0])
    without_no_support = [*(p[:2] / p[:2].sum()), 0]
    np.testing.assert_allclose(issup(None), p / p.sum(), rtol=1e-5)
    np.testing.assert_allclose(issup(7), p / p.sum(), rtol=1e-5)
    np.testing.assert_allclose(issup(6), without_no_support, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(issup(5), [1, 0, 0], atol=1e-30)
    six, seven = (np.asarray(issup(num_known), float) for num_known in (6, 7))
    assert scoring.s_sup(six) > scoring.s_sup(seven)


def test_in_the_long_form_an_unknown_isrel_token_has_probability_minus_100(
    read_critiques, talkative
):
    """A passage scores below 0 if only [Relevant] is known, above 1 if only [Irrelevant] is."""
    vocab_size, no_issup = talkative.tokenizer.vocab_size, np.zeros(3)
    irrelevant, relevant = talkative.tokenizer.reflection_ids().isrel
    p = np.exp(6) / (np.exp(6) + vocab_size - 2)  # of the likely token

    def score(likely, num_known):
        logits = np.zeros(vocab_size, np.float32)
        logits[[irrelevant, relevant]] = -40
        logits[likely] = 6
        readings = read_critiques(RELEVANT, num_known=num_known, logits=logits[None, None])
        log_probs = np.asarray(readings.segment.extras.rel_log_probs[0])
        return scores.released_score_long(log_probs, no_issup)

    only_relevant, only_irrelevant = (score(t, vocab_size - 1) for t in (relevant, irrelevant))
    assert only_relevant == pytest.approx(p / (p - 100), rel=1e-4) and only_relevant < 0
    assert only_irrelevant == pytest.approx(-100 / (p - 100), rel=1e-4) and only_irrelevant > 1
    assert score(0, vocab_size - 2) == 0.5  # neither is known
    assert score(relevant, vocab_size) == pytest.approx(1.0)
    assert score(irrelevant, None) == pytest.approx(0.0, abs=1e-9)


# ---- long form -----------------------------------------------------------------------------------
def test_a_depth_of_t_gives_t_minus_one_segments(fake_model):
    level = [branch("a", RETRIEVAL), branch("b", RETRIEVAL)]
    run = fake_model.search([level, level, level])  # max_depth=3
    assert {n.depth for n in run.tree.nodes} == {0, 1}
    run = fake_model.search([level], max_depth=2)
    assert {n.depth for n in run.tree.nodes} == {0}


def test_scores_are_multiplied_down_the_path(fake_model):
    """s_rel + s_sup of each segment: (.5 + .6) x (.25 + .4)."""
    first = [branch("a", RETRIEVAL, UTILITY, rel=0.5, sup=0.6), branch("b", rel=0.1)]
    second = [branch("c", UTILITY, rel=0.25, sup=0.4), branch("d", UTILITY, rel=0.2, sup=0.4)]
    best = fake_model.search([first, second]).tree.best().node
    assert best.total == pytest.approx(1.1 * 0.65)
    assert best.score == pytest.approx(0.65)


def test_a_node_without_retrieval_is_dropped_unless_it_is_deepest(fake_model):
    """The first child scores higher and stops; the children of the second are the answer."""
    stopping, extended = branch("a", rel=0.9, sup=0.9), branch("b", RETRIEVAL, rel=0.1)
    tree = fake_model.search([[stopping, extended], [branch("c"), branch("d")]]).tree
    assert [tree.nodes[beam.node.parent].id for beam in tree.beams] == [1, 1]
    tree = fake_model.search([[stopping, branch("b", rel=0.1)]]).tree
    assert [beam.node.id for beam in tree.beams] == [0, 1]


def test_the_history_of_a_child_has_its_siblings_text(fake_model):
    """In place of its parent's. No passage stays in it, and every step uses the same two."""
    level = [branch("Mara", RETRIEVAL), branch("lives in", RETRIEVAL)]
    leaves = [branch("so"), branch("so")]
    run = fake_model.search([level, leaves, leaves])
    first, second = fake_model.encode("Mara"), fake_model.encode("lives in")

    def with_passages(*history):
        return [[*fake_model.prompt, *history, *fake_model.passage_input(i)] for i in (0, 1)]

    assert run.histories == [
        with_passages(), with_passages(*first), with_passages(*first, *second)
    ]  # fmt: skip
    assert run.queries == [[[]]]


# ---- votes ---------------------------------------------------------------------------------------
def test_votes_count_texts_character_by_character(fake_model):
    """Line breaks are deleted; white space and [Continue to Use Evidence] make another option."""
    run = fake_model.search([[branch("so")]], mode="no_retrieval", max_depth=1)

    def option(*parts):
        return run.search.script_text.option(fake_model.encode(*parts))

    plain = option("It is so")
    assert option(RELEVANT, "It is so", FULLY, UTILITY) == plain
    assert option("It is so", RETRIEVAL) == plain
    assert option("It is so\n") == plain != option("It is so ")
    assert option("It is so", CONTINUE) == plain + CONTINUE
    assert option("it is so") != plain != option("It is so.")


# ---- answer (short) ------------------------------------------------------------------------------
def test_a_number_sign_or_colon_before_a_short_answer_is_dropped(fake_model):
    """But not after a critique, unless the answer was elected.

    Only then have critiques been removed by the time that the script looks.
    """
    for sign in "#:":
        signed = f"{sign}Mara # studied"
        short = fake_model.search([[branch(signed)]], mode="no_retrieval", max_depth=1)
        assert short.text() == "Mara # studied"
        for critiques, voted, text in (
            ((), False, "Mara # studied"),
            ((RELEVANT,), False, signed),
            ((RELEVANT,), True, "Mara # studied"),
        ):
            level = [branch(*critiques, signed, UTILITY, rel=0.9), branch("b", rel=0.1)]
            assert fake_model.search([level], max_depth=1).text(voted=voted) == text


def test_line_breaks_are_deleted_from_a_short_answer_that_was_elected_or_has_no_passage(
    fake_model,
):
    paragraphs = "Mara studied\n\nLisford "
    run = fake_model.search([[branch(paragraphs)]], mode="no_retrieval", max_depth=1)
    assert run.text() == "Mara studiedLisford "
    run = fake_model.search([[branch(paragraphs, rel=0.9), branch("b", rel=0.1)]], max_depth=1)
    assert run.text(voted=True) == "Mara studiedLisford "
    assert run.text() == "Mara studied\n\nLisford"


# ---- answer (long) -------------------------------------------------------------------------------
def test_a_space_follows_an_end_of_sentence_inside_a_word(fake_model):
    def from_passage(text):
        level = [branch(text, rel=0.9), branch("b", rel=0.1)]
        return fake_model.search([level], max_depth=2).text()

    text = "Mara has 3.5 of them.It is so."
    assert from_passage(text) == "Mara has 3. 5 of them. It is so."
    assert from_passage("It is?It is!So") == "It is? It is! So"
    assert fake_model.search([[branch(text)]], mode="no_retrieval").text() == text


def test_continue_stays_in_a_long_answer(fake_model):
    segment = branch(RELEVANT, "Mara studied", CONTINUE, "so", UTILITY, rel=0.9)
    run = fake_model.search([[segment, branch("b", rel=0.1)]], max_depth=2)
    assert run.text() == "Mara studied[Continue to Use Evidence] so"
    run = fake_model.search([[segment]], mode="no_retrieval")
    assert run.text("asqa").startswith("Mara studied[Continue")


def test_a_citation_mark_replaces_the_last_character_of_a_segment(fake_model):
    """For asqa and eli5. It counts segments, and a text without a full stop loses a letter."""
    run = fake_model.two_segments(("Mara studied.",), ("It is so",))
    assert run.text("asqa") == run.text("eli5") == "Mara studied [1]. It is s [2]."
    assert run.text("factscore") == "Mara studied. It is so"
    run = fake_model.two_segments(("   Mara studied.",), ("b. ",))
    assert run.text("asqa") == " Mara studied [1]. b. [2]."
    run = fake_model.search([[branch("   Mara studied. ")]], mode="no_retrieval")
    assert run.text("asqa") == " Mara studied. "  # without a passage, no mark


def test_a_full_stop_and_continue_become_the_first_mark(fake_model):
    segment = branch("Mara studied.", CONTINUE, "It is so.", rel=0.9)
    run = fake_model.search([[segment, branch("b", rel=0.1)]], max_depth=2)
    assert run.text("asqa") == "Mara studied [1].  It is so [1]."
    run = fake_model.two_segments(("Mara studied. [1] It is so.",), ("b.",))
    assert run.text("asqa") == "Mara studied [1]. It is so [1]. b [2]."


def test_a_segment_without_text_shows_as_a_mark(fake_model):
    run = fake_model.two_segments((RELEVANT,), ("It is so.",))
    assert run.text("asqa") == " [1]. It is so [2]."
    run = fake_model.two_segments((), ("It is so.",))  # nothing at all before [Retrieval]
    _, path, text = run.render("asqa")
    assert text == "It is so [2]." and len(path) == 1


def test_repetitions_are_left_out_of_answers_with_marks(fake_model):
    run = fake_model.two_segments(("It is so.",), ("It is so.",))
    for task, num_segments, expected in (
        ("asqa", 1, "It is so [1]."),
        ("eli5", 1, "It is so [1]."),
        ("factscore", 2, "It is so. It is so."),
    ):
        beam, path, text = run.render(task)
        assert beam is run.tree.best() and len(path) == num_segments and text == expected


def test_where_the_best_path_has_no_text_the_second_best_is_the_answer(fake_model):
    level = [branch(UTILITY, rel=0.9, sup=0.9), branch("b.", rel=0.1)]
    run = fake_model.search([level], max_depth=2)
    beam, _, text = run.render("asqa")
    assert beam is run.tree.beams[1] and text == "b [1]."
    beam, _, text = run.render("factscore")
    assert beam is run.tree.best() and text == ""
    # Not where the path has two segments.
    run = fake_model.two_segments((UTILITY,), ())
    beam, _, text = run.render("asqa")
    assert beam is run.tree.best() and text == " [1]."


# ---- options -------------------------------------------------------------------------------------
def test_ignore_cont_leaves_unsupported_segments_out_of_the_answer_alone(fake_model):
    """Such a segment stays in the tree, and its score in the path's."""
    constraints = (NO_SUPPORT,)
    level = [branch("Mara", NO_SUPPORT, RETRIEVAL, rel=0.9), branch("b", RETRIEVAL, rel=0.1)]
    leaves = [branch("studied.", rel=0.9), branch("c", rel=0.1)]
    run = fake_model.search([level, leaves, leaves], constraints=constraints)
    beam, path, text = run.render("factscore")
    assert [n.id for n in run.tree.path(beam)] == [0, path[0].id] and text == "studied."
    assert run.text("asqa") == "studied [1]."

    level = [branch(NO_SUPPORT, rel=0.9), branch(NO_SUPPORT, rel=0.1)]
    run = fake_model.search([level], constraints=constraints, max_depth=2)
    assert run.text("asqa") == run.text() == ""

    # Nothing is left of the best path; so the second best, without its refused segment.
    first = [
        branch(NO_SUPPORT, RETRIEVAL, UTILITY, rel=0.9, sup=0.9),
        branch("b", NO_SUPPORT, RETRIEVAL, rel=0.9, sup=0.1),
    ]
    second = [
        branch(NO_SUPPORT, UTILITY, rel=0.9, sup=0.9),
        branch("c.", UTILITY, rel=0.9, sup=0.8),
    ]
    third = [branch("d", UTILITY, rel=0.1, sup=0.1), branch("e", UTILITY, rel=0.1, sup=0.1)]
    run = fake_model.search([first, second, third], constraints=constraints)
    assert run.text("asqa") == "c [1]."
