"""The quirks of the released scripts' search (decoding/released.py lists them), each by hand: what a model would say is written
down, and the search is looked at for what it asks next and what it makes of the answer. test_released.py compares the whole with a
plain form of the scripts."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from selfrag_jax.answering.config import DEFAULT
from selfrag_jax.engine.requests import FindPassages, Generate, ReadTokens
from selfrag_jax.engine.segments import GeneratedSegments, Step, TokenRules
from selfrag_jax.records import Passage
from selfrag_jax.search import scoring
from selfrag_jax.search.released import scores
from selfrag_jax.search.released.rules import ReleasedReadings
from selfrag_jax.search.released.search import ReleasedSearch
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control

TWO = [Passage("0", "First", "Mara studied."), Passage("1", "Second", "Mara lives in Lisford.")]


@dataclass
class Says:
    """What a branch generates, and how probable the critiques are."""

    parts: tuple
    rel: float = 0.5
    sup: float = 0.0  # p(Fully supported); 0: it never says such a token, and nor does it of IsUse
    again: tuple[float, float, float] = (1.0, 0.0, 0.0)  # of the Retrieve tokens, at every position
    tokens: tuple = ()  # in place of the parts


@dataclass
class Told:
    """A search that was told what the model says."""

    outcome: object = None
    reads: list = field(default_factory=list)
    asked: list = field(default_factory=list)  # queries
    fed: list = field(
        default_factory=list
    )  # of each Generate: the whole text before each branch, in token ids
    limits: list = field(default_factory=list)


@pytest.fixture
def tell(talkative):
    t = talkative.tokenizer

    def encode(*parts):
        return t.encode([Control(p) if p in reflection.ALL else p for p in parts])

    def segment(says):
        tokens = [[*(s.tokens or encode(*s.parts))] for s in says]
        n, m = len(says), max(map(len, tokens))
        sup = np.array([[s.sup, 0.0, 1.0 - s.sup] if s.sup else [0.0] * 3 for s in says])
        return GeneratedSegments(
            tokens=np.array([[*x, *[t.pad_id] * (m - len(x))] for x in tokens])[None],
            length=np.array([[len(x) for x in tokens]]),
            log_prob=np.zeros((1, n)),
            num_text_tokens=np.ones((1, n), int),
            isrel=np.array([[1.0 - s.rel, s.rel] for s in says])[None],
            issup=sup[None],
            isuse=np.zeros((1, n, 5)),
            retrieve=np.zeros((1, n, 3)),
            finished=np.zeros((1, n), bool),
            complete=np.zeros((1, n), bool),
            next_position=np.zeros((1, n), int),
            extras=ReleasedReadings(
                retrieve_at=np.array([[s.again] * m for s in says])[None],
                rel_log_probs=np.log([[1.0 - s.rel, s.rel] for s in says])[None],
                isuse_seen=np.zeros((1, n), bool),
            ),
        )

    def run(answers, p=(0.5, 0.4, 0.1), **changes):
        """answers: of each Generate, in order, what its branches say. p: of the Retrieve tokens after the prompt."""
        fields = dict(
            scorer="released",
            mode="always_retrieve",
            threshold=0.2,
            ndocs=2,
            beam_width=2,
            max_depth=3,
        )
        config = replace(DEFAULT.search, **(fields | changes))
        prompt = [t.bos_id, *t.encode(prompts.instruction("Where is Mara?"))]
        run.search = search = ReleasedSearch(talkative.model, talkative.params, t, config, 64)
        told, going, value, standing = Told(), search.search(prompt, "0"), None, []
        answers = iter(answers)
        while True:
            try:
                wants = going.send(value)
            except StopIteration as e:
                told.outcome = e.value
                assert next(answers, None) is None  # all that was to be said was asked for
                return told
            if isinstance(wants, ReadTokens):
                [standing] = wants.tokens
                told.reads.append(list(standing))
                value = np.array([p]), np.log(np.maximum([p], 1e-30))
            elif isinstance(wants, FindPassages):
                told.asked.append(wants.previous)
                value = [TWO]
            else:
                assert isinstance(wants, Generate)
                told.fed.append([[*standing, *branch] for branch in wants.branches[0]])
                told.limits.append(wants.limit)
                value = segment(next(answers))

    run.encode, run.prompt = encode, [t.bos_id, *t.encode(prompts.instruction("Where is Mara?"))]
    run.decode = t.decode
    run.passage = lambda i: t.encode([Control(reflection.RETRIEVAL), *prompts.passage(TWO[i])])
    return run


GO, END = "[Retrieval]", "[Utility:5]"


def test_the_long_forms_gate_looks_for_retrieval_in_what_the_model_says(tell):
    """25 tokens are looked through; with [Retrieval] among them the threshold decides, without it nothing is fetched, however
    likely the token is after the prompt."""
    level = [Says(("a",)), Says(("b",))]
    silent = tell(
        [[Says(("Mara studied",))], [Says(("so",))]],
        p=(0.01, 0.99, 0.0),
        mode="adaptive_retrieval",
        max_depth=2,
    )
    assert (
        silent.limits[0] == 25
        and silent.asked == []
        and silent.outcome.nodes[0].action == "no_retrieval"
    )
    asks = [Says(("Mara", GO))]
    refused = tell(
        [asks, [Says(("so",))]], p=(0.9, 0.1, 0.0), mode="adaptive_retrieval", max_depth=2
    )
    assert refused.asked == [] and refused.outcome.nodes[0].action == "no_retrieval"
    granted = tell([asks, level], p=(0.7, 0.3, 0.0), mode="adaptive_retrieval", max_depth=2)
    assert granted.asked == [[[]]]
    behind = tell(
        [[Says(("Mara\n\n", GO))], [Says(("so",))]],
        p=(0.7, 0.3, 0.0),
        mode="adaptive_retrieval",
        max_depth=2,
    )
    assert behind.asked == []  # what stands behind a blank line was not said


def test_without_retrieval_a_long_answer_ends_at_the_first_blank_line(tell):
    long = tell([[Says(("Mara studied\n\nLisford",))]], mode="no_retrieval")
    assert text_of(tell, long.outcome) == "Mara studied"
    tokens = tell.encode("Mara\n\nLisford\n\nso")
    line_break = next(a for a, b in pairwise(tokens) if a == b)
    at = tokens.index(line_break) + 1
    apart = [*tokens[:at], *tell.encode("[Relevant]"), *tokens[at:]]
    outcome = tell([[Says((), tokens=apart)]], mode="no_retrieval").outcome
    assert text_of(tell, outcome) == "Mara\n\nLisford"  # a critique stood between
    assert long.fed == [[[*tell.prompt, *tell.encode("[No Retrieval]")]]]
    short = tell([[Says(("Mara studied\n\nLisford",))]], mode="no_retrieval", max_depth=1)
    assert tell.decode(short.outcome.best().node.tokens) == "Mara studied\n\nLisford"


def test_only_the_end_of_text_ends_a_generation(talkative):
    r, t = talkative.tokenizer.reflection_ids(), talkative.tokenizer
    search = ReleasedSearch(
        talkative.model, talkative.params, t, replace(DEFAULT.search, scorer="released"), 64
    )
    tokens = jnp.array([r.retrieve[1], r.isuse[4], t.eos_id])
    before, last, _ = search.rules.roles(tokens)
    assert before.tolist() == [False] * 3 and last.tolist() == [False, False, True]
    paper = TokenRules(t.eos_id, t.pad_id, r)
    before, last, _ = paper.roles(tokens)
    assert before.tolist() == [True, False, False] and last.tolist() == [False, True, True]


@pytest.fixture
def critiques(talkative):
    """What the released search reads of made-up logits: critiques(tokens) -> the segment, and the distributions of each step."""
    t = talkative.tokenizer
    released = ReleasedSearch(
        talkative.model, talkative.params, t, replace(DEFAULT.search, scorer="released"), 64
    ).rules
    r = t.reflection_ids()

    def read(*names, known=None, logits=None):
        rules = replace(released, num_known=known or t.vocab_size)
        if logits is None:
            logits = (
                np.random.default_rng(0)
                .normal(size=(len(names), 1, t.vocab_size))
                .astype(np.float32)
            )
        no = jnp.zeros(1, bool)
        segment, issup_seen = GeneratedSegments.empty(1, len(names), rules), no
        for age, name in enumerate(names):
            token = jnp.array([t.encode(Control(name))[0]])
            step = Step(logits[age], token, jnp.array([age]), live=~no, ends=no, at_limit=no)
            segment, issup_seen = rules.read_critiques(segment, step, issup_seen)

        def share(step, ids):
            e = np.exp(logits[step, 0, list(ids)])
            return e / e.sum()

        return segment, share, r

    return read


def test_relevance_is_read_at_the_first_token_whatever_it_says(critiques):
    segment, share, r = critiques("Mara", "[Irrelevant]", "[Relevant]")
    np.testing.assert_allclose(segment.isrel[0], share(0, r.isrel), rtol=1e-5)


def test_support_and_utility_are_read_where_they_are_first_said(critiques):
    segment, share, r = critiques(
        "[Relevant]",
        "[No support / Contradictory]",
        "[Fully supported]",
        "[Utility:2]",
        "[Utility:5]",
    )
    np.testing.assert_allclose(segment.issup[0], share(1, r.issup), rtol=1e-5)
    np.testing.assert_allclose(segment.isuse[0], share(3, r.isuse), rtol=1e-5)


def test_support_and_utility_that_are_never_said_are_nothing(critiques):
    segment, _, _ = critiques("[Relevant]", "Mara", "[Retrieval]")
    assert not np.any(segment.issup) and not np.any(segment.isuse)


def test_the_scripts_know_the_5000_or_32000_most_likely_tokens_of_a_step(talkative):
    for depth, known in ((1, 5_000), (2, 32_000), (7, 32_000)):
        config = replace(DEFAULT.search, scorer="released", max_depth=depth)
        assert (
            ReleasedSearch(
                talkative.model, talkative.params, talkative.tokenizer, config, 64
            ).rules.num_known
            == known
        )


def test_what_is_not_known_counts_as_e_to_the_minus_100(critiques, talkative):
    """[Fully supported] is said; [Partially supported] is the 6th most likely token, [No support / Contradictory] the 7th."""
    t = talkative.tokenizer
    logits = np.linspace(-9, -8, t.vocab_size, dtype=np.float32)
    (full, part, no), others = t.reflection_ids().issup, [20, 21, 22, 23]
    logits[[full, *others, part, no]] = [5, 4, 4, 4, 4, 3, 2]
    p = np.exp([5.0, 3.0, 2.0])
    read = lambda known: critiques("[Fully supported]", known=known, logits=logits[None, None])[
        0
    ].issup[0]  # noqa: E731
    np.testing.assert_allclose(read(None), p / p.sum(), rtol=1e-5)
    np.testing.assert_allclose(read(7), p / p.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        read(6), [p[0] / p[:2].sum(), p[1] / p[:2].sum(), 0], rtol=1e-5, atol=1e-30
    )
    np.testing.assert_allclose(read(5), [1, 0, 0], atol=1e-30)
    assert scoring.s_sup(np.asarray(read(6), float)) > scoring.s_sup(np.asarray(read(7), float))


def test_an_unknown_relevance_counts_as_a_probability_of_minus_100_in_the_long_form(
    critiques, talkative
):
    """So that where only [Relevant] is known a passage scores below 0, and where only [Irrelevant] is, above 1."""
    t, never = talkative.tokenizer, np.zeros(3)
    irrelevant, relevant = t.reflection_ids().isrel

    def score(likely, known):
        logits = np.zeros(t.vocab_size, np.float32)
        logits[[irrelevant, relevant]] = -40
        logits[likely] = 6
        segment = critiques("[Relevant]", known=known, logits=logits[None, None])[0]
        p = np.exp(6) / (np.exp(6) + t.vocab_size - 2)
        return scores.released_score_long(np.asarray(segment.extras.rel_log_probs[0]), never), p

    got, p = score(relevant, t.vocab_size - 1)
    assert got == pytest.approx(p / (p - 100), rel=1e-4) and got < 0
    got, p = score(irrelevant, t.vocab_size - 1)
    assert got == pytest.approx(-100 / (p - 100), rel=1e-4) and got > 1
    assert score(0, t.vocab_size - 2)[0] == 0.5  # neither is known
    assert score(relevant, t.vocab_size)[0] == pytest.approx(1.0) and score(irrelevant, None)[
        0
    ] == pytest.approx(0.0, abs=1e-9)


def test_a_depth_of_t_gives_t_minus_one_segments(tell):
    level = [Says(("a", GO)), Says(("b", GO))]
    assert {n.depth for n in tell([level, level, level]).outcome.nodes} == {0, 1}  # max_depth=3
    assert {n.depth for n in tell([level], max_depth=2).outcome.nodes} == {0}


def test_scores_are_multiplied_down_the_path(tell):
    """s_rel + s_sup of each segment: (.5 + .6) x (.25 + .4)."""
    first = [Says(("a", GO, END), 0.5, 0.6), Says(("b",), 0.1)]
    second = [Says(("c", END), 0.25, 0.4), Says(("d", END), 0.2, 0.4)]
    outcome = tell([first, second]).outcome
    assert outcome.best().node.total == pytest.approx(
        1.1 * 0.65
    ) and outcome.best().node.score == pytest.approx(0.65)


def test_what_does_not_ask_to_retrieve_is_dropped_unless_it_is_deepest(tell):
    """The first child has the better score and stops; the second goes on, and its children are the answer."""
    first = [Says(("a",), 0.9, 0.9), Says(("b", GO), 0.1)]
    outcome = tell([first, [Says(("c",)), Says(("d",))]]).outcome
    assert [outcome.nodes[b.node.parent].id for b in outcome.beams] == [1, 1]
    stops = tell([[Says(("a",), 0.9, 0.9), Says(("b",), 0.1)]]).outcome
    assert [b.node.id for b in stops.beams] == [0, 1]


def test_a_childs_history_has_its_siblings_text(tell):
    """In place of their parent's, and the same two passages serve again, none of which stays in the history."""
    level = [Says(("Mara", GO)), Says(("lives in", GO))]
    leaf = [Says(("so",)), Says(("so",))]
    told = tell([level, leaf, leaf])
    first, second = tell.encode("Mara"), tell.encode("lives in")
    assert told.fed[0] == [[*tell.prompt, *tell.passage(i)] for i in (0, 1)]
    assert told.fed[1] == [[*tell.prompt, *first, *tell.passage(i)] for i in (0, 1)]
    assert told.fed[2] == [[*tell.prompt, *first, *second, *tell.passage(i)] for i in (0, 1)]
    assert told.asked == [[[]]]


def test_votes_are_for_texts_character_by_character(tell):
    """Line breaks are deleted; what else is written, white space and [Continue to Use Evidence] too, makes another option."""
    tell([[Says(("so",))]], mode="no_retrieval", max_depth=1)

    def option(*parts):
        return tell.search.script_text.option(tell.encode(*parts))

    plain = option("It is so")
    assert (
        option("[Relevant]", "It is so", "[Fully supported]", END)
        == option("It is so", GO)
        == plain
    )
    assert option("It is so\n") == plain != option("It is so ")
    assert option("It is so", "[Continue to Use Evidence]") == plain + "[Continue to Use Evidence]"
    assert option("it is so") != plain != option("It is so.")


def text_of(tell, outcome, task="", voted=False):
    return tell.search.render(outcome, outcome.best(), task, voted)[2]


def test_a_number_sign_in_front_of_a_short_answer_is_dropped(tell):
    """Or a colon; but not where a critique stands before it, unless the answer was elected: only then have critiques been
    taken out by the time that the script looks."""
    for mark in "#:":
        said = f"{mark}Mara # studied"
        short = tell([[Says((said,))]], mode="no_retrieval", max_depth=1).outcome
        assert text_of(tell, short) == "Mara # studied"
        for front, voted, text in (
            ((), False, "Mara # studied"),
            (("[Relevant]",), False, said),
            (("[Relevant]",), True, "Mara # studied"),
        ):
            level = [Says((*front, said, END), 0.9), Says(("b",), 0.1)]
            assert text_of(tell, tell([level], max_depth=1).outcome, voted=voted) == text


def test_line_breaks_are_deleted_of_a_short_answer_that_was_elected_or_alone(tell):
    said = "Mara studied\n\nLisford "
    alone = tell([[Says((said,))]], mode="no_retrieval", max_depth=1).outcome
    assert text_of(tell, alone) == "Mara studiedLisford "
    outcome = tell([[Says((said,), 0.9), Says(("b",), 0.1)]], max_depth=1).outcome
    assert text_of(tell, outcome, voted=True) == "Mara studiedLisford "
    assert text_of(tell, outcome) == "Mara studied\n\nLisford"


def test_a_full_stop_within_a_word_gets_a_space(tell):
    text = "Mara has 3.5 of them.It is so."
    told = tell([[Says((text,), 0.9), Says(("b",), 0.1)]], max_depth=2)
    assert text_of(tell, told.outcome) == "Mara has 3. 5 of them. It is so."
    told = tell([[Says(("It is?It is!So",), 0.9), Says(("b",), 0.1)]], max_depth=2)
    assert text_of(tell, told.outcome) == "It is? It is! So"
    alone = tell([[Says((text,))]], mode="no_retrieval")  # of which the script has another form
    assert text_of(tell, alone.outcome) == text


def test_continue_stays_in_a_long_answer(tell):
    said = ("[Relevant]", "Mara studied", "[Continue to Use Evidence]", "so", END)
    level = [Says(said, 0.9), Says(("b",), 0.1)]
    assert (
        text_of(tell, tell([level], max_depth=2).outcome)
        == "Mara studied[Continue to Use Evidence] so"
    )
    assert text_of(tell, tell([[Says(said)]], mode="no_retrieval").outcome, "asqa").startswith(
        "Mara studied[Continue"
    )


def two_segments(tell, first, second):
    """A path of two segments that say these parts."""
    level = [Says((*first, GO, END), 0.9, 0.9), Says(("b", GO), 0.1)]
    leaf = [Says((*second, END), 0.9, 0.9), Says(("c",), 0.1)]
    return tell([level, leaf, leaf]).outcome


def test_marks_of_citations_take_the_place_of_each_last_character(tell):
    """Where citations are counted, by the segment's place in the path; a sentence without a full stop loses its last letter."""
    outcome = two_segments(tell, ("Mara studied.",), ("It is so",))
    assert (
        text_of(tell, outcome, "asqa")
        == text_of(tell, outcome, "eli5")
        == "Mara studied [1]. It is s [2]."
    )
    assert text_of(tell, outcome, "factscore") == "Mara studied. It is so"
    assert (
        text_of(tell, two_segments(tell, ("   Mara studied.",), ("b. ",)), "asqa")
        == " Mara studied [1]. b. [2]."
    )
    alone = tell([[Says(("   Mara studied. ",))]], mode="no_retrieval").outcome
    assert text_of(tell, alone, "asqa") == " Mara studied. "  # no mark


def test_a_full_stop_and_continue_become_the_first_mark(tell):
    said = ("Mara studied.", "[Continue to Use Evidence]", "It is so.")
    outcome = tell([[Says(said, 0.9), Says(("b",), 0.1)]], max_depth=2).outcome
    assert text_of(tell, outcome, "asqa") == "Mara studied [1].  It is so [1]."
    outcome = two_segments(tell, ("Mara studied. [1] It is so.",), ("b.",))
    assert text_of(tell, outcome, "asqa") == "Mara studied [1]. It is so [1]. b [2]."


def test_a_segment_without_text_leaves_its_mark(tell):
    outcome = two_segments(tell, ("[Relevant]",), ("It is so.",))
    assert text_of(tell, outcome, "asqa") == " [1]. It is so [2]."
    outcome = two_segments(tell, (), ("It is so.",))  # that says nothing at all does not
    _, path, text = tell.search.render(outcome, outcome.best(), "asqa", False)
    assert text == "It is so [2]." and len(path) == 1


def test_repetitions_are_left_out_where_the_script_counts_citations(tell):
    outcome = two_segments(tell, ("It is so.",), ("It is so.",))
    for task, text in (
        ("asqa", "It is so [1]."),
        ("eli5", "It is so [1]."),
        ("factscore", "It is so. It is so."),
    ):
        best, path, got = tell.search.render(outcome, outcome.best(), task, False)
        assert best is outcome.best() and len(path) == 1 + (task == "factscore") and got == text


def test_where_the_best_path_has_no_text_the_second_is_told(tell):
    outcome = tell([[Says((END,), 0.9, 0.9), Says(("b.",), 0.1)]], max_depth=2).outcome
    best, _, text = tell.search.render(outcome, outcome.best(), "asqa", False)
    assert best is outcome.beams[1] and text == "b [1]."
    best, _, text = tell.search.render(outcome, outcome.best(), "factscore", False)
    assert best is outcome.best() and text == ""
    two = two_segments(tell, (END,), ())
    best, _, text = tell.search.render(two, two.best(), "asqa", False)
    assert best is two.best() and text == " [1]."


def test_what_is_not_supported_is_left_out_of_the_answer_alone(tell):
    """--ignore_cont: the segment stays in the tree, and its score in the path's."""
    level = [Says(("Mara", "[No support / Contradictory]", GO), 0.9), Says(("b", GO), 0.1)]
    leaf = [Says(("studied.",), 0.9), Says(("c",), 0.1)]
    outcome = tell([level, leaf, leaf], constraints=(reflection.NO_SUPPORT,)).outcome
    best, path, text = tell.search.render(outcome, outcome.best(), "factscore", False)
    assert [n.id for n in outcome.path(best)] == [0, path[0].id] and text == "studied."
    assert text_of(tell, outcome, "asqa") == "studied [1]."
    no = "[No support / Contradictory]"
    both = tell(
        [[Says((no,), 0.9), Says((no,), 0.1)]], constraints=(reflection.NO_SUPPORT,), max_depth=2
    ).outcome
    assert text_of(tell, both, "asqa") == text_of(tell, both) == ""
    level = [Says((no, GO, END), 0.9, 0.9), Says(("b", no, GO), 0.9, 0.1)]
    second = [Says((no, END), 0.9, 0.9), Says(("c.", END), 0.9, 0.8)]
    last = [Says(("d", END), 0.1, 0.1), Says(("e", END), 0.1, 0.1)]
    outcome = tell([level, second, last], constraints=(reflection.NO_SUPPORT,)).outcome
    assert (
        text_of(tell, outcome, "asqa") == "c [1]."
    )  # the second path's, without what it is refused


def test_no_retrieval_is_decided_once_more(tell):
    """(p(Retrieval) + p(Continue)) / (p(Retrieval) + p(No Retrieval)) above the threshold makes [Retrieval] of it, where the text
    is cut; and a [No Retrieval] is put behind what said any."""
    said = ("a", "[No Retrieval]", "b")
    [node, _] = tell([[Says(said, again=(0.5, 0.3, 0.2)), Says(("c",))]], max_depth=2).outcome.nodes
    assert list(node.tokens) == tell.encode("a")  # .5 / .8
    [node, _] = tell([[Says(said, again=(0.9, 0.1, 0.0)), Says(("c",))]], max_depth=2).outcome.nodes
    assert list(node.tokens) == tell.encode(*said, "[No Retrieval]")  # .1
