"""Files in a bucket: fetched, sent, and what happens when the bucket fails."""

import errno
import json
import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace

import bucket as buckets
import pytest

from selfrag_jax import artifacts, cli, files
from selfrag_jax.checkpoints import saving, workdirs
from selfrag_jax.commands import load_command
from selfrag_jax.errors import StageFailed, UserError
from selfrag_jax.records import write_jsonl
from selfrag_jax.storage import copies, paths
from selfrag_jax.storage.copies import is_copy
from selfrag_jax.storage.mirror import Mirror, push_now, pushed_regularly

GS = f"gs://{buckets.NAME}"


def put(name, text):
    paths.as_path(f"{GS}/{name}").write_text(text)


def get(name):
    return paths.as_path(f"{GS}/{name}").read_text()


async def no_sleep(_):
    """In place of the pauses between tries."""


# ---- addresses -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "address, why",
    [
        ("http://x.org/a", "files are not read from http://; known: gs://, s3://"),
        ("gs://", "expected gs://BUCKET/NAME"),
        ("gs://bucket", "expected gs://BUCKET/NAME"),
        ("gs:///name", "expected gs://BUCKET/NAME"),
    ],
)
def test_wrong_addresses_are_refused(address, why):
    with pytest.raises(UserError, match=why):
        paths.check_address(address)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(UserError, match="pip install s3fs"):
        paths.as_path("s3://bucket/name")


def test_local_paths_stay_pathlibs(tmp_path):
    assert type(paths.as_path(tmp_path)) is type(tmp_path)
    assert paths.absolute("x").is_absolute()


# ---- whole files ---------------------------------------------------------------------------------
def test_files_are_written_whole_or_not_at_all(bucket):
    files.write_json(f"{GS}/whole/a.json", {"ä": 1})
    assert files.read_json(f"{GS}/whole/a.json") == {"ä": 1}
    with pytest.raises(ZeroDivisionError), files.atomic_write(f"{GS}/whole/b.txt") as f:
        f.write("half")
        raise ZeroDivisionError
    assert bucket.names("whole/") == ["a.json"]
    with pytest.raises(UserError, match="no such file"):
        files.read_json(f"{GS}/whole/b.txt")


def test_the_manifest_of_a_folder_is_read_in_place(bucket, tmp_path):
    (tmp_path / "input.txt").write_text("text")
    inputs = {"data": tmp_path / "input.txt"}
    folder = f"{GS}/manifests/w"
    assert not artifacts.is_finished(folder, "train", {"a": 1}, inputs)
    artifacts.claim_workdir(folder, "train", {"a": 1}, inputs)
    with pytest.raises(UserError, match="other settings .config.a: 1 there, 2 asked for"):
        artifacts.claim_workdir(folder, "train", {"a": 2}, inputs)
    artifacts.write_manifest(folder, "train", {"a": 1}, inputs, {})
    assert artifacts.is_finished(folder, "train", {"a": 1}, inputs)
    local = artifacts.fingerprint(tmp_path / "input.txt")
    put("manifests/input.txt", "text")
    assert artifacts.fingerprint(f"{GS}/manifests/input.txt") == local


# ---- copies --------------------------------------------------------------------------------------
def test_a_folder_is_fetched_once_and_then_what_changed(bucket, monkeypatch):
    put("folder/a.txt", "a")
    put("folder/sub/b.txt", "b")
    copy = Mirror(f"{GS}/folder").pull()
    assert (copy / "a.txt").read_text() == "a" and (copy / "sub/b.txt").read_text() == "b"
    put("folder/sub/b.txt", "other")
    paths.as_path(f"{GS}/folder/a.txt").unlink()
    fetched = []
    fetch = Mirror._fetch
    monkeypatch.setattr(
        Mirror, "_fetch", lambda self, name, info: (fetched.append(name), fetch(self, name, info))
    )
    Mirror(f"{GS}/folder").pull()
    assert fetched == ["sub/b.txt"] and not (copy / "a.txt").exists()
    assert (copy / "sub/b.txt").read_text() == "other"


def test_a_file_brings_its_manifest_and_its_parts_only(bucket):
    for name in ("q.jsonl", "q.jsonl.manifest.json", ".q.jsonl.12.partial", "qa.jsonl", "r.jsonl"):
        put(f"file/{name}", name)
    copy = Mirror(f"{GS}/file/q.jsonl").pull()
    assert sorted(p.name for p in copy.parent.iterdir() if "remote" not in p.name) == [
        ".q.jsonl.12.partial", "q.jsonl", "q.jsonl.manifest.json",
    ]  # fmt: skip


def test_files_of_one_folder_do_not_concern_each_other(bucket):
    """Inputs and outputs often lie side by side."""
    for name in ("q.jsonl", "p.jsonl", "p.jsonl.manifest.json"):
        put(f"side/{name}", name)
    first, second = Mirror(f"{GS}/side/q.jsonl"), Mirror(f"{GS}/side/p.jsonl")
    out = Mirror(f"{GS}/side/out.jsonl")
    paths_here = [m.pull(must_exist=m is not out) for m in (first, out, second)]
    assert [p.exists() for p in paths_here] == [True, False, True]
    paths_here[1].write_text("made")
    for m in (first, second, out):
        m.push()
    assert bucket.names("side/") == ["out.jsonl", "p.jsonl", "p.jsonl.manifest.json", "q.jsonl"]


def test_the_copy_of_another_address_is_not_sent_again(bucket):
    """data.tsv was an input once, and has been removed from the bucket since."""
    put("again/data.tsv", "old")
    Mirror(f"{GS}/again/data.tsv").pull()
    paths.as_path(f"{GS}/again/data.tsv").unlink()
    out = Mirror(f"{GS}/again/data.jsonl")
    out.pull(must_exist=False).write_text("made")
    out.path.with_name("data.scores.jsonl").write_text("scored")
    out.push()
    assert bucket.names("again/") == ["data.jsonl", "data.scores.jsonl"]


def test_a_stage_that_fails_names_addresses(bucket, monkeypatch, capsys):
    def fail(values, _):
        raise StageFailed(f"{values['out']}: nothing worked")

    command = replace(load_command("world"), run=fail)
    monkeypatch.setattr(cli, "load_command", lambda _: command)
    assert cli.main(["world", f"--out={GS}/failing", "--config=tiny:smoke"]) == 1
    assert capsys.readouterr().err == f"selfrag world: {GS}/failing: nothing worked\n"


@pytest.mark.parametrize("name", ["world.v1", "world"])
def test_an_output_is_the_folder_or_file_that_the_command_made(bucket, name):
    m = Mirror(f"{GS}/made/{name}")
    copy = m.pull(must_exist=False)
    (copy / "sub").mkdir(parents=True)
    (copy / "sub/a.txt").write_text("a")
    m.push()
    assert get(f"made/{name}/sub/a.txt") == "a"
    again = Mirror(f"{GS}/made/{name}")
    assert again.is_folder and (again.pull() / "sub/a.txt").read_text() == "a"


def test_a_file_sends_the_parts_of_an_unfinished_one_and_folders_beside_it(bucket):
    m = Mirror(f"{GS}/parts/data.jsonl", beside=("judgements",))
    folder = m.pull(must_exist=False).parent
    for name in ("data.jsonl.parts/ab/0.jsonl", "other.parts/0.jsonl"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("x")
    (folder / "judgements").mkdir()
    with closing(sqlite3.connect(folder / "judgements/c.sqlite3")) as database:
        database.execute("pragma journal_mode = wal")
        database.execute("create table t (x)")
        m.push()
        database.execute("insert into t values (7)")
        database.commit()  # so far, in the log beside the file
        m.push()
        sent = ["data.jsonl.parts/ab/0.jsonl", "judgements/c.sqlite3"]
        assert bucket.names("parts/") == sent
        shutil.rmtree(copies.root())
    copy = Mirror(f"{GS}/parts/data.jsonl", beside=("judgements",)).pull(must_exist=False).parent
    assert (copy / "data.jsonl.parts/ab/0.jsonl").read_text() == "x"
    with closing(sqlite3.connect(copy / "judgements/c.sqlite3")) as database:
        assert database.execute("select x from t").fetchall() == [(7,)]


def test_what_is_written_is_sent_manifests_last(bucket, monkeypatch):
    m = Mirror(f"{GS}/out")
    copy = m.pull(must_exist=False)
    (copy / "parts").mkdir(parents=True)
    (copy / "manifest.json").write_text("{}")
    (copy / "z.txt").write_text("z")
    (copy / "parts/0.txt").write_text("0")
    (copy / ".z.txt.9.tmp").write_text("half")
    (copy / ".lock").write_text("")
    sent = []
    put_file = m._fs.put_file
    monkeypatch.setattr(
        m._fs, "put_file", lambda a, b: (sent.append(b.rpartition("/")[2]), put_file(a, b))
    )
    assert m.push() == 3 and sent[-1] == "manifest.json"
    assert bucket.names("out/") == ["manifest.json", "parts/0.txt", "z.txt"]
    assert m.push() == 0
    (copy / "parts/0.txt").unlink()
    (copy / "z.txt").write_text("longer")
    assert m.push() == 1 and bucket.names("out/") == ["manifest.json", "z.txt"]
    assert get("out/z.txt") == "longer"


def test_a_process_beside_the_first_sends_its_own_files_only(bucket):
    put("shared/vectors/0.npy", "of another")
    m = Mirror(f"{GS}/shared", "vectors/*.npy")
    copy = m.pull()
    (copy / "vectors/1.npy").write_text("own")
    (copy / "manifest.json").write_text("the first one's concern")
    with pushed_regularly([m]):
        push_now()
        assert m.push() == 0  # all has been sent
    assert is_copy(copy / "vectors") and not is_copy(copy.parents[5])
    there = Mirror(f"{GS}/shared")._listed()
    assert sorted(there) == ["vectors/0.npy", "vectors/1.npy"]
    nothing = Mirror(f"{GS}/shared", "")
    assert (nothing.pull() / "manifest.json").is_file() and nothing.push() == 0


def test_work_that_was_not_sent_is_kept_and_a_conflict_loses_nothing(bucket, capsys):
    put("kept/a.txt", "there")
    m = Mirror(f"{GS}/kept")
    copy = m.pull()
    (copy / "a.txt").write_text("changed here")
    assert (Mirror(f"{GS}/kept").pull() / "a.txt").read_text() == "changed here"
    put("kept/a.txt", "changed there")
    assert (Mirror(f"{GS}/kept").pull() / "a.txt").read_text() == "changed there"
    assert [p.read_text() for p in copy.glob("a.txt.kept-*")] == ["changed here"]
    assert "changed here and in the bucket" in capsys.readouterr().err


def test_a_file_that_arrives_damaged_is_fetched_again(bucket, monkeypatch):
    put("damaged/a.txt", "right")
    m, arrivals = Mirror(f"{GS}/damaged/a.txt"), []
    get_file = m._fs.get_file

    def damage_first(there, here):
        get_file(there, here)
        arrivals.append(there)
        if len(arrivals) == 1:
            with open(here, "w") as f:
                f.write("wrong")

    monkeypatch.setattr(m._fs, "get_file", damage_first)
    assert m.pull().read_text() == "right" and len(arrivals) == 2


# ---- a bucket that fails -------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["503", "cut"])
def test_requests_that_fail_now_and_then_are_repeated(bucket, kind):
    put(f"now/{kind}.txt", "text")
    m = Mirror(f"{GS}/now/{kind}.txt")
    bucket.fail(kind, 1)
    assert m.pull().read_text() == "text"
    m.path.write_text("new")
    bucket.fail(kind, 1)
    m.push()
    assert get(f"now/{kind}.txt") == "new"


@pytest.mark.parametrize(
    "kind, status, said",
    [
        ("403", 2, "access denied"),
        ("404", 2, "no such bucket, or no access to it"),
        ("503", 1, "the request failed, after several tries"),
        ("cut", 1, "the request failed, after several tries"),
    ],
)
def test_a_bucket_that_stays_away_is_one_line(bucket, monkeypatch, capsys, kind, status, said):
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", no_sleep)
    bucket.fail(kind)
    assert cli.main(["world", f"--out={GS}/w", "--config=tiny:smoke"]) == status
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"selfrag world: {GS}/w: ") and said in line


def test_a_full_disk_of_this_machine_is_not_the_buckets_fault(bucket, monkeypatch):
    put("full/a.txt", "a")
    m = Mirror(f"{GS}/full/a.txt")

    def full(there, here):
        raise OSError(errno.ENOSPC, "No space left on device", here)

    monkeypatch.setattr(m._fs, "get_file", full)
    with pytest.raises(OSError, match="cannot be copied to this machine .No space left on device"):
        m.pull()


def test_one_output_that_cannot_be_sent_does_not_keep_the_others_back(bucket, monkeypatch):
    first, second = Mirror(f"{GS}/two/a.txt"), Mirror(f"{GS}/two/b.txt")
    for m in (first, second):
        m.pull(must_exist=False).write_text("x")
    monkeypatch.setattr(first, "push", lambda: first._fs.cat_file(f"{GS}/none"))
    with pytest.raises(OSError, match="a.txt; the same command"), pushed_regularly([first, second]):
        pass
    assert bucket.names("two/") == ["b.txt"]


def test_a_missing_input_is_one_line(bucket, capsys):
    arguments = ["index", f"--passages={GS}/none.tsv", f"--out={GS}/index"]
    assert cli.main(arguments) == 2
    assert f"{GS}/none.tsv: no such file or folder" in capsys.readouterr().err


def test_messages_name_addresses_and_not_copies(bucket, capsys):
    put("bad/q.jsonl", '{"question": "Who?"}\n')
    put("bad/p.jsonl", "{}\n")
    files = f"--task={GS}/bad/q.jsonl", f"--predictions={GS}/bad/p.jsonl", f"--out={GS}/bad/o.json"
    assert cli.main(["evaluate", *files]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"selfrag evaluate: {GS}/bad/p.jsonl:1: missing field 'id'")


def test_results_need_a_place_where_the_input_is_in_a_bucket(bucket, capsys):
    put("place/q.jsonl", "{}\n")
    assert cli.main(["evaluate", "--task=popqa", f"--input={GS}/place/q.jsonl", "--model=m"]) == 2
    assert "missing --out: --input is in a bucket" in capsys.readouterr().err


def test_what_could_not_be_sent_is_kept_and_sent_by_the_same_command(bucket, monkeypatch, capsys):
    arguments = ["world", f"--out={GS}/later", "--config=tiny:smoke"]
    push = Mirror.push

    def fails(self):
        raise OSError(f"{self.address}: the request failed")

    monkeypatch.setattr(Mirror, "push", fails)
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert "the same command sends it" in err and str(copies.root()) in err
    assert bucket.names("later/") == []
    monkeypatch.setattr(Mirror, "push", push)
    assert cli.main(arguments) == 0
    there = json.loads(get("later/manifest.json"))
    assert there["stage"] == "world" and "passages.tsv" in bucket.names("later/")


def test_no_bucket_is_asked_where_no_flag_is_an_address(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "open_file_system", lambda _: pytest.fail("asked"))
    assert cli.main(["world", f"--out={tmp_path}/w", "--config=tiny:smoke"]) == 0
    assert os.listdir(tmp_path) == ["w"]


@pytest.mark.slow
def test_a_refused_checkpoint_is_one_line_and_the_same_command_continues(
    bucket, tmp_path, monkeypatch, capsys
):
    rows = [
        {"id": str(i), "instruction": f"Say {i}.", "output": f"[No Retrieval]{i}.[Utility:5]"}
        for i in range(12)
    ]
    write_jsonl(tmp_path / "data.jsonl", rows)
    workdir = f"{GS}/refused"
    data = f"--data={tmp_path}/data.jsonl"
    arguments = ["train", "--role=generator", data, f"--workdir={workdir}", "--config=tiny:smoke"]
    save, steps = saving.save_checkpoint, []

    def refuse_second(manager, step, *rest):
        manager.wait_until_finished()
        steps.append(step)
        if len(steps) == 2:
            bucket.fail("403")
        save(manager, step, *rest)

    with monkeypatch.context() as m:
        m.setattr(saving, "save_checkpoint", refuse_second)
        assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert f"{workdir}: a checkpoint could not be written (Forbidden" in err.splitlines()[-1]
    assert "Traceback" not in err
    bucket.recover()
    assert cli.main(arguments) == 0
    assert workdirs.saved_steps(workdir)[-1] == 6
