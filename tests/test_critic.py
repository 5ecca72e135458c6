"""The critic's forward pass with a shared prefix, and the judgements that are kept."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from selfrag_jax.checkpoints.loading import LoadedModel
from selfrag_jax.critic.critic import Critic, CriticConfig, PromptTooLong
from selfrag_jax.critic.judgements import JudgementStore, StoredCritic
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.models.cache import Cache
from selfrag_jax.models.llama import Model
from selfrag_jax.records import Passage
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery
from selfrag_jax.text.tokenizer import Tokenizer

SHARED, PLAIN = CriticConfig(16, 128, False), CriticConfig(16, 128, False, min_shared=0)
STARTS = ("Who?", "1 + 1", "\n- a list", " blank", "«é»", "中文。", ": colon", "")


def queries(lengths, starts=STARTS):
    """Queries of all groups, with texts of those lengths."""
    out = []
    for i, n in enumerate(lengths):
        start, words = starts[i % len(starts)], "passage of words " * n
        evidence = Passage(str(i), f"Title {i}" if i % 2 else "", f"Some {words}{i}.")
        for group in reflection.GROUPS:
            preceding = "It is." * (i % 2)
            out.append(CritiqueQuery(group, start + words[:n], preceding, evidence, f"Out {i}."))
    return out


@pytest.fixture(scope="module")
def llama_mode(tiny_model):
    """The tiny model with a published tokenizer, which joins text across parts."""
    folder = Path(__file__).parent / "data" / "llama_tokenizer"
    tokenizer = Tokenizer.load(folder, "llama_fast").with_reflection_tokens()
    model = Model(replace(tiny_model.model.config, vocab_size=tokenizer.vocab_size))
    return LoadedModel(model, model.init(jax.random.key(1), 0.5), tokenizer)


@pytest.mark.parametrize("name", ["tiny_model", "llama_mode"])
def test_a_shared_prefix_changes_nothing(name, request):
    loaded = request.getfixturevalue(name)
    shared, plain = Critic(loaded, SHARED), Critic(loaded, PLAIN)
    asked = queries([0, 3, 4, 9])
    for group in reflection.GROUPS:
        n = len(shared.shared_prefix(group))
        assert n >= 16 and plain.shared_prefix(group) == ()
        assert any(shared._shares_prefix(p) for p in shared.prompts(asked) if p.group == group)
    results = zip(asked, shared.judge(asked), plain.judge(asked), strict=True)
    for query, p, expected in results:
        np.testing.assert_allclose(p, expected, atol=1e-5, err_msg=str(query))
        assert len(p) == len(reflection.GROUPS[query.group])
    assert len({tuple(p.round(3)) for p in plain.judge(asked)}) == len(asked)  # none alike


@pytest.mark.parametrize("name", ["tiny_model", "llama_mode"])
def test_the_prefix_is_one_of_tokens(name, request):
    """A prompt whose text joins the question's last token is read whole."""
    loaded = request.getfixturevalue(name)
    critic = Critic(loaded, SHARED)
    for prompt in critic.prompts(queries([3] * len(STARTS))):
        prefix = critic.shared_prefix(prompt.group)
        assert critic._shares_prefix(prompt) == (prompt.ids[: len(prefix)] == prefix)
    other = replace(prompt, ids=(*prompt.ids[:5], 7, *prompt.ids[6:]))
    assert not critic._shares_prefix(other)
    [p] = critic.judge_prompts([other])
    [expected] = Critic(loaded, PLAIN).judge_prompts([other])
    np.testing.assert_allclose(p, expected, atol=1e-5)


def test_brief_prompts_share_too_little_to_be_split(tiny_model):
    critic = Critic(tiny_model, CriticConfig(8, 16, True))
    assert {critic.shared_prefix(group) for group in reflection.GROUPS} == {()}


@pytest.mark.parametrize("min_shared", [0, 16])
def test_few_shapes_are_compiled(tiny_model, min_shared):
    critic = Critic(tiny_model, CriticConfig(8, 16, False, min_shared))
    answer = {g: np.zeros((8, len(names))) for g, names in reflection.GROUPS.items()}
    whole, after = set(), set()

    def record(shapes, *args):
        shapes.add(tuple(x.shape for x in args))
        return answer

    critic._forward = lambda _, *args: record(whole, *args)
    critic._forward_after = lambda _, prefix, *args: record(after, prefix.valid, *args)
    critic._read_prefix = lambda _, tokens, valid: Cache(0, 0, valid[:1], 0, 0)
    critic.judge(queries(range(0, 150)))
    # Multiples of 16 up to 128, then four lengths per doubling; for each length of a prefix. And
    # one small batch at the end.
    critic.judge(queries([3])[:1])
    prefixes = {shape[0] for shape in after}
    assert len(prefixes) <= len(reflection.GROUPS)
    assert 5 < len(whole | after) <= (8 + 4 * 2) * max(1, len(prefixes)) + 1
    assert {shape[-1][0] for shape in whole | after} == {8, 1}
    assert bool(after) == bool(min_shared) and not (whole and after)


def test_equal_queries_are_judged_once(tiny_model):
    critic, rows = Critic(tiny_model, PLAIN), []
    forward = critic._forward
    critic._forward = lambda params, tokens, valid: (
        rows.append(int((valid.sum(1) > 1).sum())) or forward(params, tokens, valid)
    )
    asked = queries([1, 2])
    results = critic.judge(asked * 3)
    assert sum(rows) == len(asked)
    np.testing.assert_array_equal(results[0], results[len(asked)])


def test_long_evidence_is_cut_and_counted_and_nothing_else(tiny_model):
    critic = Critic(tiny_model, SHARED)
    evidence = Passage("1", "Title", "word " * 3000)
    query = CritiqueQuery("issup", "Who is it?", evidence=evidence, output="It is she.")
    [prompt] = critic.prompts([query])
    context = tiny_model.model.config.max_length
    assert context - 3 <= len(prompt.ids) <= context
    text = tiny_model.tokenizer.decode(prompt.ids)
    assert "Who is it?" in text and "It is she." in text and "word word" in text
    critic.prompts([query, query, replace(query, group="isrel")])
    assert critic.num_cut == 2  # different prompts

    long = replace(query, output="word " * 3000)
    with pytest.raises(PromptTooLong, match=r"issup prompt has 3,\d+ tokens without evidence"):
        critic.prompts([query, long])
    with pytest.raises(PromptTooLong) as error:
        critic.prompts([query, long, replace(long, group="isuse", evidence=None)])
    assert list(error.value.reasons) == [1, 2]


# ---- several devices -----------------------------------------------------------------------------
def judge_and_print():
    """What the test below runs in a process with several devices."""
    from selfrag_jax.base_model.source import make_tokenizer
    from selfrag_jax.models.llama import LlamaConfig

    tokenizer = make_tokenizer(4000).with_reflection_tokens()
    shape = dict(embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
    fields = dict(max_length=512, rope_theta=1e4, norm_eps=1e-5, tie_embeddings=True)
    fields |= dict(dtype="float32", remat="none", scan_unroll=1)
    model = Model(LlamaConfig(vocab_size=tokenizer.vocab_size, **shape, **fields))
    loaded = LoadedModel(model, model.init(jax.random.key(0), 0.5), tokenizer)
    for p in Critic(loaded, replace(SHARED, batch=3)).judge(queries([1, 4, 9])):
        print(*p)


@pytest.mark.slow
def test_several_devices_give_what_one_gives():
    def result(devices):
        flags = f"--xla_force_host_platform_device_count={devices}"
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return [list(map(float, line.split())) for line in done.stdout.splitlines()]

    for p, expected in zip(result(4), result(1), strict=True):
        np.testing.assert_allclose(p, expected, atol=1e-5)


# ---- kept judgements -----------------------------------------------------------------------------
class CountingCritic(Critic):
    def judge_prompts(self, queries):
        self.judged = getattr(self, "judged", []) + list(queries)
        return super().judge_prompts(queries)


def test_nothing_is_judged_twice(tiny_model, tmp_path):
    asked = queries([1, 2, 3])
    critic = CountingCritic(tiny_model, SHARED)
    expected = critic.judge(asked)
    runs = [((0, 2), 8, 8), ((0, 2), 8, 0), ((1, 2), 12, 4), ((0, 1), 12, 0)]
    for shard, n, new in runs:
        store = JudgementStore(tmp_path, "abc", shard)  # opened again, as by another process
        stored, before = StoredCritic(critic, store), len(critic.judged)
        for p, q in zip(stored.judge(asked[:n] * 2), expected[:n] * 2, strict=True):
            np.testing.assert_allclose(p, q, atol=1e-6)
        assert len(critic.judged) - before == new == stored.num_asked
        assert stored.num_found == n - new
        store.close()
    stored = StoredCritic(critic, JudgementStore(tmp_path, "another critic"))
    stored.judge(asked)
    assert stored.num_asked == len(asked)


def test_what_was_judged_before_a_failure_is_kept(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("selfrag_jax.critic.judgements._PROMPTS_PER_WRITE", 4)
    asked = queries([1, 2, 3])
    critic = CountingCritic(tiny_model, SHARED)
    judge = critic.judge_prompts

    def failing(some):
        if len(getattr(critic, "judged", [])) >= 8:
            raise KeyboardInterrupt
        return judge(some)

    critic.judge_prompts = failing
    with pytest.raises(KeyboardInterrupt):
        StoredCritic(critic, JudgementStore(tmp_path, "abc")).judge(asked)
    critic.judge_prompts = judge
    stored = StoredCritic(critic, JudgementStore(tmp_path, "abc"))
    stored.judge(asked)
    assert (stored.num_found, stored.num_asked) == (8, 4)
    assert len(set(critic.judged)) == len(critic.judged) == 12


def test_a_damaged_store_is_named(tmp_path):
    file = tmp_path / "abc.0-of-1.sqlite3"
    file.write_bytes(b"no database " * 100)
    with pytest.raises(UserError, match=r"abc\.0-of-1\.sqlite3: not readable .* remove it"):
        JudgementStore(tmp_path, "abc")
    with pytest.raises(UserError, match=r"abc\.0-of-1\.sqlite3: not readable"):
        JudgementStore(tmp_path, "abc", (1, 2)).get([b"1"])


def test_a_store_that_another_process_is_making_is_passed_over(tmp_path):
    (tmp_path / "abc.1-of-2.sqlite3").touch()  # it has no table yet
    store = JudgementStore(tmp_path, "abc", (0, 2))
    store.put([(b"1", np.ones(3))])
    assert list(store.get([b"1", b"2"])) == [b"1"]


def test_a_disk_that_cannot_be_written_is_named(tmp_path):
    store = JudgementStore(tmp_path, "abc")
    store._own.execute("PRAGMA query_only = ON")
    with pytest.raises(StageFailed, match=r"abc\.0-of-1\.sqlite3: judgements cannot be stored"):
        store.put([(b"1", np.ones(3))])


if __name__ == "__main__":
    judge_and_print()
