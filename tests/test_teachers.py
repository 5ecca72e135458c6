"""Teachers that are language models, against an endpoint on loopback that fails in every way."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock_endpoint import KEY, MockEndpoint, label_of, prompt_of, serve

from selfrag_jax import cli
from selfrag_jax.critic.teachers import faults
from selfrag_jax.critic.teachers.batch_files import split
from selfrag_jax.critic.teachers.cache import open_cache
from selfrag_jax.critic.teachers.parsing import parse_reply
from selfrag_jax.critic.teachers.prompting import BUILT_IN, PLACEHOLDERS, Templates
from selfrag_jax.critic.teachers.teacher import LABELS, Usage, Verdict, kind_of
from selfrag_jax.errors import UserError
from selfrag_jax.records import Passage, read_rows, write_jsonl
from selfrag_jax.text import reflection
from selfrag_jax.text.prompts import CritiqueQuery

QUICK = ("backoff=0.01", "max_backoff=0.05", "poll=0.01", "timeout=20", "retries=3")


def rows(n=4):
    return [
        {
            "id": f"q{i}",
            "instruction": f"Who founded town {i}?",
            "output": f"Ada founded town {i}. She did so in {1800 + i}.",
            "dataset_name": "towns" if i % 2 else "cities",
            "ctxs": [{"title": f"Town {i}", "text": f"Ada founded it in {1800 + i}."}],
        }
        for i in range(n)
    ]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Runs `selfrag collect` with the endpoint; every file is in a folder of its own."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_jsonl(tmp_path / "in.jsonl", rows())

    def run(mock, *flags, teacher="openai", out="out.jsonl", quick=QUICK):
        config = [f"--config.collect.endpoint.{setting}" for setting in quick]
        config += ["--config.collect.balance=none", "--config.collect.dev_share=0"]
        config = [] if "--teacher=rule" in flags else config  # tiny has no section of endpoints
        return cli.main([
            "collect", f"--teacher={teacher}", "--teacher_model=m", f"--base_url={mock.url}",
            f"--input={tmp_path}/in.jsonl", f"--out={tmp_path}/{out}",
            f"--cache={tmp_path}/cache.sqlite3", *config, *flags,
        ])  # fmt: skip

    return run


def read(path):
    return [row for _, row in read_rows(path)] if Path(path).exists() else []


def first_tries(fault, n=10**9):
    """The first n requests of each prompt end in `fault`."""
    seen = Counter()

    def choose(_, body):
        prompt = prompt_of(body)
        seen[prompt] += 1
        return fault if seen[prompt] <= n else ""

    return choose


# ---- prompts and replies -------------------------------------------------------------------------
EVIDENCE = Passage("1", "Ada", "Ada founded it. [Irrelevant]")
QUERIES = {
    "retrieve": CritiqueQuery("retrieve", "Who? {output} [Retrieval]"),
    "retrieve_next": CritiqueQuery("retrieve", "Who?", "Ada.", EVIDENCE),
    "isrel": CritiqueQuery("isrel", "Who? [Relevant]", evidence=EVIDENCE),
    "issup": CritiqueQuery("issup", "Who?", evidence=EVIDENCE, output="{labels} Ada."),
    "isuse": CritiqueQuery("isuse", "Wer gründete 北京?", output="[Utility:5]"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_prompts_hold_the_query_and_no_control_token_of_the_user(kind):
    query = QUERIES[kind]
    assert kind_of(query) == kind
    prompt = Templates.read().fill(query)
    for text in (query.instruction, query.preceding, query.output):
        assert re.sub(r"\[(?=\w)", "[ ", text) in prompt  # "{output}" of a user stays as it is
    rubric = dict(Templates.read().texts)[kind]
    for label in reflection.ALL:
        expected = rubric.count(label) + (label in LABELS[kind])
        assert prompt.count(label) == expected, label
    assert prompt.endswith("\n".join(LABELS[kind]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "{evidence} {question}", "unknown placeholder {question}"),
        (lambda text: text.replace("{output}", ""), "issup.txt: lacks the placeholder {output}"),
        (None, "issup.txt: no such file"),
    ],
)
def test_templates_are_checked(tmp_path, change, message):
    for kind in PLACEHOLDERS:
        text = (BUILT_IN / f"{kind}.txt").read_text()
        if kind != "issup":
            (tmp_path / f"{kind}.txt").write_text(text)
        elif change:
            (tmp_path / f"{kind}.txt").write_text(change(text))
    with pytest.raises(UserError, match=re.escape(message)):
        Templates.read(tmp_path)


@pytest.mark.parametrize(
    ("reply", "token", "reason"),
    [
        ("Explanation: Yes.\nLabel: [Relevant]", "[Relevant]", ""),
        ("**Label:** Relevant.", "[Relevant]", ""),
        ("Not [Irrelevant] at all.\nLabel: [relevant]", "[Relevant]", ""),
        ("It is about Ada.\n\n[Relevant].", "[Relevant]", ""),
        ("It is [Relevant]. Yes, [Relevant].", None, "among other words"),
        ("It is not [Relevant].", None, "among other words"),
        ("Label: not [Relevant]", None, "among other words"),
        ('{"label": "not [Relevant]"}', None, "among other words"),
        ('{"explanation": "I would not call it [Relevant], since', None, "among other words"),
        ('{"explanation": "E", "label": "[Relevant]"}', "[Relevant]", ""),
        ('```json\n{"explanation": "no [Irrelevant]", "label": "Relevant"}\n```', "[Relevant]", ""),
        ("", None, "no label"),
        ("It is relevant.", None, "no label"),
        ('{"label": 5}', None, "no label"),
        ('{"verdict": "[Relevant]"}', None, "no label"),
        ("[Relevant] or [Irrelevant]", None, "two labels"),
        ("Label: [Relevant]\nLabel: [Irrelevant]", None, "two labels"),
        ("Label: [Fully supported]", None, "not asked for: [Fully supported]"),
        ("[Relevant][Utility:5]", None, "not asked for: [Utility:5]"),
        ('{"label": "[Retrieval]"}', None, "not asked for: [Retrieval]"),
    ],
)
def test_replies_have_exactly_one_label_of_the_group(reply, token, reason):
    verdict = parse_reply(reply, "isrel")
    assert verdict.token == token and reason in verdict.reason
    assert bool(verdict.reason) == (token is None)


def test_before_retrieval_there_is_no_evidence_to_continue_with():
    assert parse_reply(f"Label: {reflection.CONTINUE}", "retrieve").token is None
    assert parse_reply(f"Label: {reflection.CONTINUE}", "retrieve_next").token


@given(st.text(), st.sampled_from(sorted(LABELS)))
def test_any_reply_gives_a_label_of_the_group_or_a_reason(reply, kind):
    verdict = parse_reply(reply, kind)
    assert (verdict.token in LABELS[kind]) != bool(verdict.reason)
    for label in LABELS[kind]:
        assert parse_reply(f"Explanation: e\nLabel: {label}", kind).token == label


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2),
        ({"retry-after-ms": "150"}, 0.15),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "soon"}, 0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2.5s"}, 62.5),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "1s"}, 0),
        ({}, 0),
    ],
)
def test_waits_that_headers_ask_for(headers, seconds):
    assert faults.asked_wait(headers) == pytest.approx(seconds)


# ---- an endpoint that works ----------------------------------------------------------------------
@pytest.mark.parametrize("schema", [True, False])
def test_collects_labels_and_pays_once(job, tmp_path, schema):
    with serve(MockEndpoint(schema=schema)) as mock:
        assert job(mock, "--concurrency=3") == 0
        asked = len(mock.requests)
        examples = read(tmp_path / "out.jsonl")
        # 4 rows: retrieve, its second sentence, isrel, issup, isuse
        assert Counter(e["task"] for e in examples) == dict(retrieve=8, isrel=4, issup=4, isuse=4)
        assert all(e["explanation"] == "It is so." for e in examples)
        assert {e["id"] for e in examples} == {f"q{i}" for i in range(4)}
        for e in examples:
            evidence = Passage(**{"id": "", **e["evidence"]}) if e.get("evidence") else None
            query = CritiqueQuery(
                e["task"], e["instruction"], e.get("preceding", ""), evidence, e.get("segment", "")
            )
            assert e["output"] == label_of(Templates.read().fill(query))
        assert mock.faults["400 format"] <= 3  # those under way when the first came back
        assert set(mock.answered.values()) == {1}
        assert mock.most_active <= 3 and not (tmp_path / "out.failed.jsonl").exists()
        # Finished: nothing is done. Another output: everything is there.
        assert job(mock) == 0 and job(mock, out="again.jsonl") == 0
        assert len(mock.requests) == asked
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_what_shapes_the_reply_is_asked_anew(job, tmp_path):
    with serve(MockEndpoint()) as mock:
        job(mock)
        asked = len(mock.requests)
        assert job(mock, out="b.jsonl", quick=(*QUICK, "temperature=0.5")) == 0
        assert len(mock.requests) == 2 * asked
        assert job(mock, quick=(*QUICK, "temperature=0.5")) == 2  # the same output
        # Another wording of one kind: only that kind is asked anew.
        shutil.copytree(BUILT_IN, tmp_path / "templates")
        (tmp_path / "templates" / "isuse.txt").write_text(
            "{instruction} {output} labels:\n{labels}"
        )
        assert job(mock, f"--templates={tmp_path}/templates", out="c.jsonl") == 0
        assert len(mock.requests) == 2 * asked + 4


# ---- faults --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fault", ["429", "429 reset", "500", "503", "cut", "hang", "no choices", "not json"]
)
def test_faults_that_pass_are_tried_again(job, tmp_path, fault):
    quick = (*QUICK, f"timeout={1 if fault == 'hang' else 20}")
    with serve(MockEndpoint(first_tries(fault, 1), hang=5)) as mock:
        assert job(mock, quick=quick) == 0
    assert len(read(tmp_path / "out.jsonl")) == 20
    assert mock.faults[fault] >= 1 and set(mock.answered.values()) == {1}
    if fault.startswith("429"):  # nobody asks before the endpoint said
        refused = [t for t, n in zip(mock.times, range(16), strict=False)]
        assert min(mock.times[16:]) - max(refused) >= 0.15


@pytest.mark.parametrize("fault", ["no label", "two labels", "another group"])
def test_a_reply_that_is_no_label_is_asked_again_once(job, tmp_path, fault):
    with serve(MockEndpoint(first_tries(fault, 1))) as mock:
        assert job(mock) == 0
    assert len(read(tmp_path / "out.jsonl")) == 20 and len(mock.requests) == 40
    assert [len(body["messages"]) for body in mock.requests].count(3) == 20


@pytest.mark.parametrize("fault", ["500", "no choices", "no label", "two labels", "another group"])
def test_what_stays_bad_is_recorded_and_asked_again_on_demand(job, tmp_path, capsys, fault):
    bad = "Town 2"
    with serve(MockEndpoint(lambda n, body: fault if bad in prompt_of(body) else "")) as mock:
        assert job(mock) == 0
        failed = read(tmp_path / "out.failed.jsonl")
        assert len(failed) == 3 and len(read(tmp_path / "out.jsonl")) == 17
        assert {row["id"] for row in failed} == {"q2"}
        assert Counter(row["kind"] for row in failed) == dict(retrieve_next=1, isrel=1, issup=1)
        assert all(row["reason"] for row in failed)
        assert all(bool(row["reply"]) == (fault in ("no label", "two labels", "another group"))
                   for row in failed)  # fmt: skip
        assert "3 of 20 queries have no label" in capsys.readouterr().err
        tries = 4 if fault in ("500", "no choices") else 2
        assert len(mock.requests) == 17 + 3 * tries
        assert job(mock) == 0 and len(mock.requests) == 17 + 3 * tries
        mock.fault = lambda n, body: ""
        assert job(mock, "--retry_failed") == 0
    assert len(mock.requests) == 20 + 3 * tries
    assert len(read(tmp_path / "out.jsonl")) == 20
    assert not (tmp_path / "out.failed.jsonl").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("401", "the key is wrong (HTTP 401); it is read from OPENAI_API_KEY"),
        ("403", "the key may not use this model (HTTP 403)"),
        ("404", "no such address, or no model 'm' (HTTP 404)"),
        ("402", "the account has no credit left"),
        ("429 quota", "quota is used up"),
    ],
)
def test_what_no_retry_mends_stops_at_once(job, tmp_path, capsys, fault, message):
    with serve(MockEndpoint(lambda n, body: fault)) as mock:
        assert job(mock, "--concurrency=2") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and KEY not in error
    assert len(mock.requests) <= 2 and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/v1", "nothing answers there"),
        ("http://no-such-host.invalid/v1", "no such host"),
    ],
)
def test_an_endpoint_that_does_not_exist(job, capsys, url, message):
    mock = MockEndpoint()
    mock.url = url
    assert job(mock) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base_url=localhost:8000"], "expected something like http://localhost:8000/v1"),
        (["--base_url=http://me:secret@host/v1"], "give http://host/v1 alone"),
        (["--base_url=http://127.0.0.1:99999/v1"], "expected something like http://localhost:8000"),
        (["--base_url=http://[::1/v1"], "expected something like http://localhost:8000/v1"),
        (["--price_in=nan", "--price_out=1"], "--price_in=nan: must be a number"),
        (["--groups=use"], "no group 'use'"),
        (["--teacher_model="], "needs --teacher_model"),
        (["--max_cost=1"], "--max_cost needs --price_in and --price_out"),
        (["--teacher=wizard"], "unknown; available: rule, openai"),
        (["--teacher=rule"], "needs --truth"),
        (["--concurrency=0"], "must be at least 1"),
        (["--config.collect.balance=0.5"], "must be at least 1"),
    ],
)
def test_wrong_flags(job, capsys, flags, message):
    mock = MockEndpoint()
    mock.url = "http://127.0.0.1:1/v1"
    assert job(mock, *flags) == 2
    assert message in capsys.readouterr().err


def test_openai_itself_needs_a_key(job, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    mock = MockEndpoint()
    assert job(mock) == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-a b", "ключ"])
def test_a_key_that_no_request_can_carry_is_refused_and_not_shown(job, capsys, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serve(MockEndpoint()) as mock:
        assert job(mock) == 2
    err = capsys.readouterr().err
    assert "OPENAI_API_KEY: holds a space" in err and key not in err and not mock.requests


def test_a_run_in_which_nothing_succeeds_stops_and_leaves_all_queries_open(job, tmp_path, capsys):
    write_jsonl(tmp_path / "in.jsonl", rows(20))
    with serve(MockEndpoint(lambda n, body: "400")) as mock:
        assert job(mock, "--concurrency=4") == 1
        assert "the first 20 queries all failed: refused (HTTP 400)" in capsys.readouterr().err
        assert len(mock.requests) < 40
        mock.fault = lambda n, body: ""
        assert job(mock) == 0
    assert len(read(tmp_path / "out.jsonl")) == 100 and not read(tmp_path / "out.failed.jsonl")


def test_files_of_others_are_kept(job, tmp_path, capsys):
    (tmp_path / "out.failed.jsonl").write_text("mine")
    with serve(MockEndpoint()) as mock:
        assert job(mock) == 0
        assert (tmp_path / "out.failed.jsonl.old-1").read_text() == "mine"
        for side in ("dev", "failed"):
            shutil.copy(tmp_path / "in.jsonl", tmp_path / f"b.{side}.jsonl")
            assert job(mock, f"--input={tmp_path}/b.{side}.jsonl", out="b.jsonl") == 2
            assert "both a file beside the output and the input" in capsys.readouterr().err
        assert job(mock, out="c.jsonl.gz") == 2 and job(mock, out="in.jsonl/x.jsonl") == 2
    err = capsys.readouterr().err
    assert "leave .gz out of --out" in err and "in.jsonl is a file" in err


def test_a_reply_with_half_a_character_and_an_absurd_price(job, tmp_path):
    """A lone surrogate cannot be written; a negative number of tokens pays nothing back."""
    from selfrag_jax.critic.teachers.chat import read_reply

    message = {"content": "[Relevant] \ud800"}
    usage = {"prompt_tokens": -5, "completion_tokens": 2}
    reply = read_reply({"choices": [{"message": message}], "usage": usage}, "four")
    assert reply.text == "[Relevant] ?" and reply.usage == Usage(4, 2)


def test_a_long_outage_stops_the_run_and_the_next_one_goes_on(job, tmp_path, capsys):
    write_jsonl(tmp_path / "in.jsonl", rows(60))
    with serve(MockEndpoint(lambda n, body: "500" if n >= 50 else "")) as mock:
        assert job(mock, quick=(*QUICK, "retries=0")) == 1
        assert "queries all failed: HTTP 500" in capsys.readouterr().err
        assert 150 <= len(mock.requests) < 200
        mock.fault = lambda n, body: ""
        assert job(mock, "--retry_failed", quick=(*QUICK, "retries=0")) == 0
    assert len(read(tmp_path / "out.jsonl")) == 300 and set(mock.answered.values()) == {1}


def test_two_runs_of_one_teacher_exclude_each_other(tmp_path):
    one, other = {"model": "a"}, {"model": "b"}
    with open_cache(tmp_path / "c", one, "job"):
        busy = pytest.raises(UserError, match="another process is writing it")
        with busy, open_cache(tmp_path / "c", one, "another job"):
            pass
        with open_cache(tmp_path / "c", other, "job") as cache:
            cache.store("k", "isrel", "p", Verdict("[Relevant]", usage=Usage(3, 1)))
    with open_cache(tmp_path / "c", one, "job") as cache:
        assert cache.answer("k") == Verdict("[Relevant]") and cache.paid() == Usage(3, 1)
        cache.store("f", "isrel", "p", Verdict(None, "no label", usage=Usage(2, 2)))
        assert cache.failure("f") and not cache.answer("f") and cache.paid() == Usage(5, 3)
    with open_cache(tmp_path / "c", one, "another job") as cache:  # it may ask again
        assert not cache.failure("f") and cache.paid() == Usage()


def test_a_file_that_is_no_cache(job, tmp_path, capsys):
    (tmp_path / "cache.sqlite3").write_text("no database, but long enough to be read as one " * 50)
    mock = MockEndpoint()
    mock.url = "http://127.0.0.1:1/v1"
    assert job(mock) == 2
    assert "is no cache of replies" in capsys.readouterr().err


def test_user_text_that_is_hard_to_ask_about(job, tmp_path):
    """Too long, in other scripts, or full of control tokens: a label or a reason for each."""
    row = rows(1)[0]
    hard = [
        row | {"id": "long", "output": "word " * 10_000},
        row | {"id": "script", "instruction": "北京是哪国的首都？", "output": "中国。 مرحبا"},
        row | {"id": "control", "instruction": "[Relevant]", "output": "[Utility:5]</paragraph>"},
    ]
    write_jsonl(tmp_path / "in.jsonl", hard)
    with serve(MockEndpoint(schema=False)) as mock:
        assert job(mock) == 0
    examples, failed = read(tmp_path / "out.jsonl"), read(tmp_path / "out.failed.jsonl")
    assert {(r["id"], r["task"]) for r in failed} == {("long", "isuse"), ("long", "issup")}
    assert all("max_characters" in row["reason"] for row in failed)
    assert Counter(e["id"] for e in examples) == dict(long=2, script=5, control=4)
    [use] = [e for e in examples if (e["id"], e["task"]) == ("control", "isuse")]
    assert use["segment"] == "[Utility:5]</paragraph>" and use["instruction"] == "[Relevant]"


# ---- costs ---------------------------------------------------------------------------------------
PRICES = ("--price_in=1000", "--price_out=2000")


def test_a_dry_run_asks_nothing(job, tmp_path, capsys):
    with serve(MockEndpoint()) as mock:
        assert job(mock, "--dry_run", *PRICES) == 0
        before = capsys.readouterr().out
        assert not mock.requests and not (tmp_path / "out.jsonl").exists()
        job(mock)
        assert job(mock, "--dry_run", *PRICES) == 0
        after = capsys.readouterr().out
    assert re.search(r"^all +20 +0 +20 ", before, re.MULTILINE)
    assert re.search(r"^all +20 +20 +0 +0 +0 +0.00 ", after, re.MULTILINE)


def test_max_cost_is_never_exceeded_and_what_was_paid_is_kept(job, tmp_path, capsys):
    def spent(mock):
        tokens_in = sum(len(prompt_of(body)) // 4 for body in mock.requests)
        return (tokens_in * 1000 + 10 * len(mock.requests) * 2000) / 1e6

    quick = (*QUICK, "max_tokens=20")
    with serve(MockEndpoint(delay=0.01)) as mock:
        limit = 3.0
        assert job(mock, f"--max_cost={limit}", *PRICES, quick=quick) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        asked = len(mock.requests)
        assert 0 < asked < 20 and spent(mock) <= limit and not (tmp_path / "out.jsonl").exists()
        assert f"the {20 - asked} requests that are left" in error
        # The same limit, again: what was spent before counts.
        assert job(mock, f"--max_cost={limit}", *PRICES, quick=quick) == 1
        assert spent(mock) <= limit
        more = re.search(r"run again with --max_cost=([\d.]+)", error).group(1)
        assert job(mock, f"--max_cost={more}", *PRICES, quick=quick) == 0
    assert len(mock.requests) == 20 and spent(mock) <= float(more)
    assert set(mock.answered.values()) == {1}


# ---- batches -------------------------------------------------------------------------------------
def test_batches_of_files(job, tmp_path):
    with serve(MockEndpoint()) as mock:
        assert job(mock, teacher="openai-batch") == 0
        assert len(mock.batches) == 1 and not mock.requests
        [sent] = [json.loads(line) for line in mock.files["file-0"].splitlines()][:1]
        assert sent["method"] == "POST" and sent["url"] == "/v1/chat/completions"
        assert len(read(tmp_path / "out.jsonl")) == 20
        # The replies are those of single requests: nothing is paid again.
        assert job(mock, out="b.jsonl") == 0 and not mock.requests
        assert job(mock) == 0 and job(mock, teacher="openai-batch", out="c.jsonl") == 0
    assert len(mock.batches) == 1


@pytest.mark.parametrize("fault", ["expired", "missing", "500", "no label", "no choices", "400"])
def test_a_part_failed_batch_keeps_its_successes(job, tmp_path, fault):
    schema = fault != "400"
    with serve(MockEndpoint(schema=schema)) as mock:
        if schema:
            mock.batch_fault = lambda n, i, line: fault if n == 0 and i % 3 == 0 else ""
        assert job(mock, teacher="openai-batch") == 0
    sizes = [mock.files[b["input_file_id"]].count(b"\n") for b in mock.batches.values()]
    assert sizes == ([20, 7] if schema else [20, 20])
    assert len(read(tmp_path / "out.jsonl")) == 20 and set(mock.answered.values()) == {1}


def test_requests_that_no_batch_answers_are_recorded(job, tmp_path):
    with serve(MockEndpoint()) as mock:
        mock.batch_fault = lambda n, i, line: "500" if "Town 2" in str(line["body"]) else ""
        assert job(mock, teacher="openai-batch") == 0
    assert len(mock.batches) == 4
    failed = read(tmp_path / "out.failed.jsonl")
    assert [row["reason"] for row in failed] == ["HTTP 500: it broke"] * 3


def test_a_batch_that_was_made_is_never_sent_twice(job, tmp_path):
    """The connection ends after the endpoint made the batch and before it said so."""
    with serve(MockEndpoint()) as mock:
        mock.drop_create = 1
        assert job(mock, teacher="openai-batch") == 0
    assert len(mock.batches) == 1 and len(read(tmp_path / "out.jsonl")) == 20


def test_batches_of_other_settings_are_left_alone(job, tmp_path, monkeypatch):
    """Killed while it waits, run with other settings, and then with the first ones again."""
    from selfrag_jax.critic.teachers import batch

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    warm = "--config.collect.endpoint.temperature=0.5"
    with serve(MockEndpoint()) as mock:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(batch.BatchTeacher, "_collect", kill)
            job(mock, teacher="openai-batch")
        assert job(mock, warm, teacher="openai-batch", out="out.jsonl") == 0
        (tmp_path / "out.jsonl").unlink(), (tmp_path / "out.jsonl.manifest.json").unlink()
        assert job(mock, teacher="openai-batch") == 0
    assert len(mock.batches) == 2


@pytest.mark.parametrize("moment", ["send", "create_batch", "collect"])
def test_a_killed_run_goes_on_with_its_batches(job, tmp_path, monkeypatch, moment):
    from selfrag_jax.critic.teachers import batch

    class Killed(BaseException):
        pass

    def kill(self, *_):
        raise Killed

    with serve(MockEndpoint()) as mock:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if moment == "create_batch":  # the batch is made; its id is not noted
                patch.setattr(mock, "drop_create", 1)
                patch.setattr(batch.BatchTeacher, "_patiently", _killed_after_create(mock, Killed))
            else:
                patch.setattr(batch.BatchTeacher, f"_{moment}", kill)
            job(mock, teacher="openai-batch")
        assert len(mock.batches) == (moment != "send")
        assert job(mock, teacher="openai-batch") == 0
    assert len(mock.batches) == 1 and len(read(tmp_path / "out.jsonl")) == 20


def _killed_after_create(mock, error):
    def patiently(self, call):
        try:
            return call()
        except Exception:
            if mock.batches:
                raise error from None
            raise

    return patiently


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_refused_batch_stops_and_is_sent_anew_by_the_next_run(job, tmp_path, capsys, status):
    with serve(MockEndpoint()) as mock:
        mock.batch_status = status
        mock.batch_fault = lambda n, i, line: "missing" if n == 0 and i > 4 else ""
        assert job(mock, teacher="openai-batch") == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"(batch_0) {status}" in error and ("line 3 is wrong" in error) == (
            status == "failed"
        )
        mock.batch_status = "completed"
        assert job(mock, teacher="openai-batch") == 0
    sizes = [mock.files[b["input_file_id"]].count(b"\n") for b in mock.batches.values()]
    assert sizes == [20, 20 if status == "failed" else 15]
    assert len(read(tmp_path / "out.jsonl")) == 20


def test_the_budget_limits_batches_too(job, tmp_path, capsys):
    quick = (*QUICK, "max_tokens=20")
    with serve(MockEndpoint()) as mock:
        assert job(mock, "--max_cost=1", *PRICES, quick=quick, teacher="openai-batch") == 1
        assert 0 < len(mock.answered) < 20
        assert "run again with --max_cost=" in capsys.readouterr().err
        assert job(mock, "--max_cost=30", *PRICES, quick=quick, teacher="openai-batch") == 0
    assert len(mock.answered) == 20 and set(mock.answered.values()) == {1}


def test_files_of_batches_stay_within_the_limits(monkeypatch):
    from selfrag_jax.critic.teachers import batch_files

    lines = [(str(i), "x" * (10 + i), Usage()) for i in range(20)]
    monkeypatch.setattr(batch_files, "MAX_REQUESTS", 4)
    monkeypatch.setattr(batch_files, "MAX_BYTES", 60)
    parts = list(split(lines))
    assert [line for part in parts for line in part] == lines
    for part in parts:
        assert len(part) <= 4 and sum(len(text) for _, text, _ in part) <= 60
    assert replace(Usage(1, 2)) + Usage(3, 4) == Usage(4, 6)
