"""launch/tpu.py against a gcloud that fails in chosen ways; scripts of hosts run for real."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
import tpu
from cloud import (
    command_line,
    failures,
    hosts,
    jobs,
    letting_go,
    packing,
    queue,
    records,
    remote,
    watch,
)
from cloud.processes import Runner

FAKES = Path(__file__).parent / "fake_cloud"
CREATE = ["create", "--name=gen", "--type=v6e-16", "--zone=us-east5-b", "--spot"]
TRAIN = ["train", "--role=generator", "--data=/mnt/d.jsonl", "--workdir=/mnt/w"]
WRITES_STEPS = 'echo "generator ███· $((2 + 0))/10 steps 1:00 left"\n'


class Cloud:
    """The fake's folder, and a call of the command line."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys

    def __call__(self, *argv):
        """(exit code, stdout, stderr) of launch/tpu.py."""
        code = command_line.main("launch/tpu.py", tpu.COMMANDS, list(argv))
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def set(self, name, text=""):
        (self.folder / name).write_text(text)

    def stage(self, script):
        """What `selfrag` does on every host. $HOST is NODE-WORKER."""
        self.set("selfrag", f"#!/bin/sh\n{script}")

    @property
    def calls(self):
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.is_file() else []

    def calls_of(self, verb):
        return [call for call in self.calls if f" {verb} " in call]

    def host(self, host, name):
        return (self.folder / "hosts" / host / "selfrag-launch" / name).read_text()

    def created(self, *flags, hosts=4):
        """A TPU of 4 hosts, or of 1, or of 2: two slices of one host each."""
        if hosts < 4:
            self.set("hosts_per_node", "1")
            flags = (*flags, "--type=v6e-4", f"--slices={hosts}")
        code, _, err = self(*CREATE, *flags)
        assert code == 0, err
        (self.folder / "calls").unlink()

    def ran(self, status=None, hosts=1, **fields):
        """A TPU on which a stage was started, without the time that this takes.

        status: that it has ended with; None: it is gone.
        """
        job = records.Job(("train", "--workdir=/mnt/w"), "abc", start="s1")
        self.set("hosts_per_node", str(hosts))
        self.set("states", "ACTIVE\n")
        records.write(records.Record("gen", "us-central2-b", f"v4-{8 * hosts}", job=job, **fields))
        packing.archive_path("abc").parent.mkdir()
        packing.archive_path("abc").write_bytes(b"")
        ended = subprocess.Popen(["true"])
        ended.wait()
        for i in range(hosts):
            folder = self.folder / f"hosts/gen-{i}/selfrag-launch/gen"
            folder.mkdir(parents=True)
            for name, text in (("pid", ended.pid), ("start", "s1"), ("log", "==="), ("rc", status)):
                if text is not None:
                    (folder / name).write_text(f"{text}\n")

    def until(self, condition):
        for _ in range(200):
            if condition():
                return
            time.sleep(0.02)
        pytest.fail("waited too long")

    def ended(self, num_hosts=4):
        """Waits until the stage has written its exit status on all hosts."""
        self.until(
            lambda: len(list(self.folder.glob("hosts/*/selfrag-launch/gen/rc"))) == num_hosts
        )


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True
    )


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "setup.py").write_text("# installs\n")
    git(folder, "init", "-q")
    git(folder, "add", "setup.py")
    git(folder, "commit", "-q", "-m", "first")
    return folder


@pytest.fixture
def cloud(tmp_path, monkeypatch, capsys, checkout):
    folder = tmp_path / "fake"
    folder.mkdir()
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("SELFRAG_LAUNCH", str(tmp_path / "launch"))
    monkeypatch.setenv("PATH", f"{FAKES}:{os.environ['PATH']}")
    monkeypatch.setattr(packing, "ROOT", checkout)
    monkeypatch.setattr(queue, "pause", lambda seconds: None)
    (folder / "host_bin").symlink_to(FAKES / "host_bin")
    made = Cloud(folder, capsys)
    made.set("after_create", "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    made.set("hosts_per_node", "4")
    made.stage(WRITES_STEPS)
    yield made
    for file in folder.glob("hosts/*/selfrag-launch/gen/pid"):  # stages that still run
        with contextlib.suppress(OSError, ValueError):
            pid = int(file.read_text())
            # Only what is a stage of this test: the number may be another process's.
            if pid > 1 and str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.killpg(pid, signal.SIGKILL)


# ---- create --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--type=v6e-16", "--zone=us-east5-b"],
            "gcloud compute tpus queued-resources create gen --accelerator-type=v6e-16 "
            "--runtime-version=v2-alpha-tpuv6e --node-id=gen --async --quiet --zone=us-east5-b",
        ),
        (
            ["--type=v5e:4x4", "--zone=us-west4-a", "--slices=2", "--project=p", "--spot",
             "--valid_until=6h"],
            "gcloud compute tpus queued-resources create gen --accelerator-type=v5litepod-16 "
            "--runtime-version=v2-alpha-tpuv5-lite --node-count=2 --node-prefix=gen --spot "
            "--valid-until-duration=6h --async --quiet --zone=us-west4-a --project=p",
        ),
        (
            ["--type=v5p-32", "--zone=us-east5-a", "--flex_start", "--max_run_duration=4h"],
            "gcloud alpha compute tpus queued-resources create gen --accelerator-type=v5p-32 "
            "--runtime-version=v2-alpha-tpuv5 --node-id=gen --provisioning-model=flex-start "
            "--max-run-duration=4h --async --quiet --zone=us-east5-a",
        ),
        (
            ["--type=v4-32", "--zone=us-central2-b", "--reserved", "--internal_ips",
             "--service_account=a@b", "--startup=" + __file__],
            "gcloud compute tpus queued-resources create gen --accelerator-type=v4-32 "
            "--runtime-version=tpu-ubuntu2204-base --node-id=gen --reserved "
            f"--metadata-from-file=startup-script={__file__} --service-account=a@b --internal-ips "
            "--async --quiet --zone=us-central2-b",
        ),
    ],
)  # fmt: skip
def test_dry_run_prints_the_command_and_does_nothing(cloud, flags, expected):
    code, out, _ = cloud("create", "--name=gen", *flags, "--dry_run")
    assert code == 0 and out.splitlines()[0] == expected
    assert cloud.calls == [] and records.names() == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--type=v6e-15"], "close ones: v6e-8 (2x4), v6e-16 (4x4), v6e-32 (4x8)"),
        (["--type=v5p:2x2x3"], "v5p-16 (2x2x2), v5p-32 (2x2x4)"),
        (["--type=v6-16"], "did you mean v6e?"),
        (["--type=tpu7x-16"], "tpu7x has no TPU VMs; launch/gke.py runs it"),
        (["--zone=us-west4-a"], "these zones have it: us-central1-b, us-east1-d, us-east5-a"),
        (["--zone=mars"], "expected a zone, such as us-central1-b"),
        (["--reserved"], "--spot and --reserved: give one of them"),
        (["--slices=0"], "--slices=0: must be above 0"),
        (["--valid_until=soon"], "expected a duration such as 90m"),
        (["--startup=nowhere.sh"], "no such file"),
        (["--name=Gen"], "small letters"),
        (["--spott"], "did you mean --spot?"),
        (["extra"], "unexpected argument 'extra'"),
    ],
)
def test_wrong_flags_of_create_are_user_errors(cloud, flags, message):
    code, _, err = cloud(*CREATE, *flags)
    assert code == 2 and message in err and err.count("\n") == 1
    assert cloud.calls == []


def test_create_waits_and_tells_each_state(cloud):
    code, out, _ = cloud(*CREATE)
    assert code == 0
    assert out.splitlines() == [
        "gen: WAITING_FOR_RESOURCES", "gen: PROVISIONING", "gen: ACTIVE",
    ]  # fmt: skip
    record = records.read("gen")
    assert (record.type, record.provisioning, record.nodes) == ("v6e-16", "spot", ["gen"])
    code, _, err = cloud(*CREATE)  # twice
    assert code == 2 and "is there already (v6e-16 in us-east5-b)" in err


GCLOUD_SAYS = {
    "quota": "ERROR: (gcloud.alpha.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota "
    "'TPUV6EPreemptiblePerProjectPerRegionForTPUAPI' exhausted. Limit 0 in region us-east5",
    "capacity": "ERROR: (gcloud.compute.tpus.queued-resources.create) There is no more capacity in "
    'the zone "us-east5-b"; you can try in another zone [EID: 0xbb]',
    "permission": "ERROR: (gcloud.compute.tpus.queued-resources.create) PERMISSION_DENIED: "
    "Permission 'tpu.nodes.create' denied on 'projects/p/locations/us-east5-b'",
    "zone": "ERROR: (gcloud.compute.tpus.queued-resources.create) PERMISSION_DENIED: Permission "
    "denied on 'locations/us-east5-b' (or it may not exist).",
    "login": "ERROR: (gcloud.compute.tpus.queued-resources.create) You do not currently have an "
    "active account selected.\nPlease run:\n  $ gcloud auth login",
    "api": "ERROR: Cloud TPU API has not been used in project 12 before or it is disabled.",
    "project": "ERROR: (gcloud.compute.tpus.queued-resources.create) Error parsing "
    "[queued_resource].\nFailed to find attribute [project]. The attribute can be set",
    "exists": "ERROR: ALREADY_EXISTS: Resource 'gen' already exists",
}


@pytest.mark.parametrize("kind", GCLOUD_SAYS)
def test_a_refused_request_is_one_line_with_its_remedy(cloud, kind):
    cloud.set("fail.create", GCLOUD_SAYS[kind])
    code, _, err = cloud(*CREATE, "--delete_on_exit")
    remedies = {
        "quota": "console.cloud.google.com/iam-admin/quotas",
        "capacity": "try another zone",
        "permission": "roles/tpu.admin",
        "zone": "check --zone",
        "login": "gcloud auth login",
        "api": "gcloud services enable tpu.googleapis.com",
        "project": "gcloud config set project",
        "exists": "another name",
    }
    line = next(line for line in err.splitlines() if line.startswith("launch/tpu.py"))
    assert code == 1 and f"({kind})" in line and remedies[kind] in line
    # What is not ours is never deleted.
    assert bool(cloud.calls_of("delete")) == (kind in ("quota", "capacity"))


def test_a_request_that_fails_in_the_queue_says_why(cloud):
    cloud.set("after_create", "WAITING_FOR_RESOURCES\nFAILED no capacity left\n")
    code, _, err = cloud(*CREATE)
    assert code == 1 and "gen: FAILED: no capacity left; `resume` deletes it" in err
    code, _, err = cloud("status", "--name=gen")
    assert code == 1 and "`resume` makes it again" in err


def test_half_created_requests_are_found_out(cloud):
    cloud.set("fail.create", "ERROR: Connection reset")  # but the request went through
    cloud.set("states", "WAITING_FOR_RESOURCES\n")
    code, _, err = cloud(*CREATE)
    assert code == 1 and "exists all the same (WAITING_FOR_RESOURCES) and holds quota" in err
    (cloud.folder / "fail.create").unlink()
    cloud("delete", "--name=gen")
    cloud.set("after_create", "ACTIVE\n")
    cloud.set("node.gen", "READY 3")
    code, _, err = cloud(*CREATE)
    assert code == 1 and "half-created: gen has 3 of 4 hosts" in err
    assert cloud("run", "--name=gen", *TRAIN)[0] == 1  # nothing starts on half of it
    assert cloud.calls_of("ssh") == []


@pytest.mark.parametrize("asked", [True, False])
def test_ctrl_c_frees_the_quota_where_asked(cloud, monkeypatch, asked):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(queue, "pause", interrupted)
    code, _, err = cloud(*CREATE, *(["--delete_on_exit"] if asked else []))
    assert code == 130
    assert bool(cloud.calls_of("delete")) == asked and bool(records.names()) != asked
    assert asked or "holds quota: python launch/tpu.py delete --name=gen" in err


def test_queueing_outlives_lost_connections(cloud, monkeypatch):
    """Six hours in the queue are not given up because of a minute without network."""
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if pauses.count(600):
            (cloud.folder / "fail.describe").unlink(missing_ok=True)

    monkeypatch.setattr(queue, "pause", pause)
    cloud.set("after_create", "ACTIVE\n")
    cloud.set("fail.describe", "ERROR: Unable to find the server at tpu.googleapis.com")
    code, out, err = cloud(*CREATE, "--delete_on_exit", "--poll=150")
    assert code == 0 and "(network)" in out and "again in 300 s" in out, err
    assert pauses == [150, 300, 600] and cloud.calls_of("delete") == []
    cloud("delete", "--name=gen")
    cloud.set("fail.describe", "ERROR: Unable to find the server at tpu.googleapis.com")
    pauses.append(0)
    monkeypatch.setattr(queue, "pause", lambda seconds: None)
    code, out, _ = cloud(*CREATE, "--delete_on_exit")
    assert code == 1 and out.count("looking again") == 9  # not for ever
    assert len(cloud.calls_of("delete")) == 2


def test_the_default_project_is_recorded(cloud):
    """Another default later must not make a second TPU, and leave the first."""
    cloud.set("project", "first\n")
    cloud.created(hosts=1)
    cloud.set("project", "second\n")
    assert cloud("status", "--name=gen")[0] == 0
    assert records.read("gen").project == "first"
    assert all("--project=first" in call for call in cloud.calls)


def test_a_refused_create_keeps_the_record_of_what_ran_before(cloud):
    old = records.Record("gen", "us-east5-b", "v6e-4", job=records.Job(("train",), "abc"))
    records.write(old)
    cloud.set("fail.create", GCLOUD_SAYS["permission"])
    assert cloud(*CREATE)[0] == 1
    assert records.read("gen") == old


# ---- commands that hang --------------------------------------------------------------------------
def test_a_command_without_an_answer_is_ended_with_its_children():
    begun = time.monotonic()
    done = Runner().attempt(["sh", "-c", "sleep 60 & echo $! >&2; wait"], seconds=0.2)
    assert time.monotonic() - begun < 30 and done.status == 124
    failure = failures.explain("describing gen", done.errors, done.status)
    assert failure.kind == "timeout" and "no answer within 0 s" in str(failure)
    assert hosts.unreachable(done)


@pytest.mark.parametrize("finish", [True, False])
def test_ctrl_c_waits_for_commands_whose_outcome_must_be_known(tmp_path, finish):
    def interrupt(*_):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            Runner().attempt(["sh", "-c", f"sleep 0.5; touch {tmp_path}/made"], finish=finish)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert (tmp_path / "made").exists() == finish


def test_ctrl_c_ends_the_commands_of_all_hosts():
    record = records.Record("gen", "us-east5-b", "v6e-16")
    runner = Runner()
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    begun = time.monotonic()
    # A job in the background ignores SIGINT.
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            hosts.Hosts(record, runner).attempt(lambda h: ["sleep", "60" if h.worker else "0"])
    finally:
        timer.join()
        signal.signal(signal.SIGINT, old)
    assert time.monotonic() - begun < 30


def test_a_closed_terminal_ends_the_command_as_ctrl_c_does():
    old = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        letting_go.end_on_signals()
        with pytest.raises(SystemExit, match="129"):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(1)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        letting_go.end_on_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ---- run, logs, status ---------------------------------------------------------------------------
def test_a_stage_runs_on_every_host_with_the_packed_commit(cloud, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "it's secret")
    cloud.stage('echo "$HOST: $* $HF_TOKEN"\n' + WRITES_STEPS)
    cloud.created()
    code, out, err = cloud("run", "--name=gen", "--env=HF_TOKEN", *TRAIN)
    assert code == 0, err
    assert "resume --name=gen --watch" in out
    cloud.ended()
    version = records.read("gen").job.version
    for i in range(4):
        log = cloud.host(f"gen-{i}", "gen/log")
        assert f"gen-{i}: {' '.join(TRAIN)} --distributed=auto it's secret" in log
        assert f"{version}: selfrag train" in log
        assert cloud.host(f"gen-{i}", f"{version}/src/setup.py") == "# installs\n"
    assert not any("secret" in call for call in cloud.calls)  # everybody can read command lines
    assert "secret" not in records.path("gen").read_text()

    code, out, err = cloud("status", "--name=gen")
    assert code == 0, err
    assert out.count("ended, exit status 0, 2/10 steps, last line") == 4

    code, out, _ = cloud("logs", "--name=gen", "--lines=1")
    assert code == 0
    assert sorted(line.split(" | ")[0] for line in out.splitlines()) == [
        f"host {i}" for i in range(4)
    ]

    # Again: the commit is there already, and is not installed twice.
    assert cloud("run", "--name=gen", *TRAIN)[0] == 0
    assert (cloud.folder / "hosts/gen-0/pip").read_text().count("install") == 1


def test_every_slice_of_several_gets_the_stage(cloud):
    cloud.created(hosts=2)
    assert cloud("run", "--name=gen", *TRAIN)[0] == 0
    cloud.ended(2)
    assert cloud.host("gen-1-0", "gen/rc") == "0\n"
    assert "slice 1 host 0 | " in cloud("logs", "--name=gen")[1]


def test_a_stage_outlives_its_connection_and_runs_once(cloud):
    cloud.stage("echo begins; sleep 30")
    cloud.created(hosts=1)
    assert cloud("run", "--name=gen", *TRAIN)[0] == 0
    assert "--distributed" not in records.read("gen").job.arguments  # one host
    code, out, _ = cloud("status", "--name=gen")
    assert code == 0 and "host 0   runs" in out
    code, _, err = cloud("run", "--name=gen", *TRAIN)
    assert code == 1 and "a stage runs already" in err


def test_ssh_refused_on_one_of_four_hosts_names_it(cloud):
    cloud.created()
    cloud.set("refused.gen-2")
    code, _, err = cloud("run", "--name=gen", *TRAIN)
    assert code == 1
    assert "ssh failed on host 2 of 4" in err and "the other 3 answered" in err
    assert "ssh: connect to host 10.0.0.9 port 22: Connection refused" in err
    assert "port 22" in err and err.count("\n") == 1
    assert records.read("gen").job is None  # it runs nowhere


@pytest.mark.parametrize(("command", "hosts"), [("resume", 4), ("run", 2)])
def test_a_half_started_stage_is_finished(cloud, monkeypatch, command, hosts):
    cloud.ran(status=0, hosts=hosts)  # an earlier stage, which says nothing about the next
    cloud.stage("echo begins; sleep 30")
    script = remote.start

    def refuses(*arguments):
        cloud.set("refused.gen-1")
        return script(*arguments)

    monkeypatch.setattr(remote, "start", refuses)
    code, _, err = cloud("run", "--name=gen", *TRAIN[:-1], "--workdir=/mnt/v")
    assert code == 1 and f"ssh failed on host 1 of {hosts}" in err
    assert "`resume --name=gen` stops it everywhere and starts it again" in err
    assert records.read("gen").job.arguments[-2] == "--workdir=/mnt/v"
    monkeypatch.setattr(remote, "start", script)
    (cloud.folder / "refused.gen-1").unlink()

    code, out, err = cloud(command, "--name=gen", *(TRAIN if command == "run" else []))
    assert code == 0, err
    assert ("host 1: nothing runs" if command == "resume" else "runs on host 0 only") in out
    assert cloud("status", "--name=gen")[1].count("   runs") == hosts
    assert cloud.calls_of("delete") == []
    assert [cloud.host(f"gen-{i}", "gen/log").count("=== ") for i in range(hosts)] == [2, 1, 2, 2][
        :hosts
    ]


def test_a_stage_of_somebody_else_is_not_stopped(cloud):
    cloud.stage("sleep 30")
    cloud.created(hosts=1)
    cloud("run", "--name=gen", *TRAIN)
    job = records.read("gen").job
    records.write(dataclasses.replace(records.read("gen"), job=None))
    code, _, err = cloud("run", "--name=gen", *TRAIN)
    assert code == 1 and "a stage runs already on host 0" in err and not records.read("gen").job
    job = dataclasses.replace(job, start="other")
    records.write(dataclasses.replace(records.read("gen"), job=job))
    code, out, _ = cloud("resume", "--name=gen")
    assert code == 1 and "another stage runs on host 0" in out
    assert cloud.host("gen-0", "gen/log").count("=== ") == 1


def test_after_a_reboot_the_number_of_the_process_is_anothers(cloud):
    cloud.ran()
    other = subprocess.Popen(["sleep", "30"], start_new_session=True)
    (cloud.folder / "hosts/gen-0/selfrag-launch/gen/pid").write_text(f"{other.pid}\n")
    try:
        code, _, err = cloud("status", "--name=gen")
        assert code == 1 and "host 0: the process is gone" in err
    finally:
        other.kill()
        other.wait()


def test_lost_logs_delete_nothing(cloud):
    cloud.ran()
    cloud.set("refused.gen-0")
    code, _, err = cloud("logs", "--name=gen", "--follow", "--delete_on_exit")
    assert code == 1 and "no log from host 0" in err
    assert cloud.calls_of("delete") == [] and records.names() == ["gen"]


def test_a_failed_installation_names_its_host(cloud):
    cloud.created()
    cloud.set(
        "fail.pip", "ERROR: 403 Client Error, disk quota exceeded\n"
    )  # pip's, not the cloud's
    code, _, err = cloud("run", "--name=gen", *TRAIN)
    assert code == 1 and err.endswith(
        "failed on host 0, host 1, host 2, host 3 of 4: 403 Client Error, disk quota exceeded\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "'trian' is no stage of selfrag; did you mean 'train'?"),
        ([], "run what?"),
        (["train", "--role=generator"], "selfrag train: missing --data, --workdir"),
        ([*TRAIN, "--rolle=x"], "did you mean --role"),
        ([*TRAIN, "--dirty"], "--dirty belongs to the launcher: give it before 'train'"),
        (["ask", "--model=M", "Who?"], "selfrag ask does not run on several hosts"),
        (["--env=A=1", *TRAIN], "expected names of variables"),
    ],
)
def test_wrong_stages_are_refused_before_anything_is_sent(cloud, arguments, message):
    cloud.created()
    code, _, err = cloud("run", "--name=gen", *arguments)
    assert code == 2 and message in err
    assert cloud.calls == []


def test_dry_run_of_run_prints_what_every_host_would_get(cloud):
    cloud.created()
    code, out, _ = cloud("run", "--name=gen", "--dry_run", *TRAIN)
    assert code == 0 and cloud.calls == []
    lines = out.splitlines()
    assert any(line.startswith("git -C") and "archive" in line for line in lines)
    assert sum("tpu-vm scp" in line for line in lines) == 4
    assert sum("tpu-vm ssh" in line for line in lines) == 8  # install, start
    assert records.read("gen").job is None


def test_unknown_names_list_the_recorded_ones(cloud):
    cloud.created()
    code, _, err = cloud("status", "--name=other")
    assert code == 2 and "(recorded: gen)" in err
    assert cloud("logs", "--name=gen")[0] == 2  # nothing was run
    code, out, _ = cloud("status")
    assert code == 0 and "gen (v6e-16, us-east5-b, spot): ACTIVE" in out


def test_changes_are_packed_only_where_asked(cloud, checkout, monkeypatch):
    cloud.created(hosts=1)
    (checkout / "setup.py").write_text("# changed\n")
    (checkout / "new.py").write_text("")
    try:
        code, _, err = cloud("run", "--name=gen", *TRAIN)
        assert code == 2 and "setup.py not committed" in err and "--dirty" in err
        code, _, err = cloud("run", "--name=gen", "--dirty", *TRAIN)
        assert code == 0 and "not packed, as git does not track it: new.py" in err
        version = records.read("gen").job.version
        assert "-dirty-" in version
        assert cloud.host("gen-0", f"{version}/src/setup.py") == "# changed\n"
        assert (checkout / "setup.py").read_text() == "# changed\n"  # stays as it was
    finally:
        (checkout / "new.py").unlink()
        git(checkout, "checkout", "-q", "setup.py")


def test_the_last_checkpoint_in_a_bucket_is_found(cloud):
    job = records.Job(("train", "--workdir=gs://b/w/"), "abc")
    record = records.Record("gen", "us-east5-b", "v6e-16", job=job)
    cloud.set("listing", "gs://b/w/checkpoints/\n" + "".join(
        f"gs://b/w/checkpoints/{step}/\n" for step in (200, 1000, 400)
    ))  # fmt: skip
    assert jobs.saved_step(record, Runner()) == 1000
    assert cloud.calls[0].split() == ["storage", "ls", "gs://b/w/checkpoints/"]


# ---- resume: what is deleted, and when ----------------------------------------------------------
@pytest.mark.parametrize("state", ["WAITING_FOR_RESOURCES", "node CREATING", "node REPAIRING"])
def test_what_waits_keeps_its_place_in_the_queue(cloud, monkeypatch, state):
    assert cloud(*CREATE, "--nowait")[0] == 0
    if state.startswith("node"):
        cloud.set("states", "ACTIVE\n")
        cloud.set("node.gen", f"{state.split()[1]} 4")
    monkeypatch.setattr(queue, "pause", lambda seconds: cloud.set("node.gen", "READY 4"))
    code, out, err = cloud("resume", "--name=gen")
    assert code == 0 and out.splitlines()[-1] == "gen: ACTIVE", err
    assert cloud.calls_of("delete") == [] and len(cloud.calls_of("create")) == 1


@pytest.mark.parametrize(
    ("name", "text", "watch_it"),
    [("node.gen", "REPAIRING 1", True), ("node.gen", "READY 0", True),
     ("states", "SUSPENDED\n", True), ("preempted.gen-0", "", True),
     ("node.gen", "REPAIRING 1", False), ("preempted.gen-0", "", False)],
)  # fmt: skip
def test_one_bad_look_deletes_nothing(cloud, monkeypatch, name, text, watch_it):
    cloud.ran(status=0)
    good = (cloud.folder / name).read_text() if name == "states" else None
    cloud.set(name, text)

    def pause(seconds):
        (cloud.folder / name).unlink(missing_ok=True) if good is None else cloud.set(name, good)

    monkeypatch.setattr(queue, "pause", pause)
    code, out, err = cloud("resume", "--name=gen", *(["--watch"] if watch_it else []))
    assert code == 0 and "the stage has finished" in out, err
    assert cloud.calls_of("delete") == [] and cloud.calls_of("create") == []


def test_bad_looks_in_a_row_are_counted_and_changes_are_bounded():
    lost, broken = queue.State("SUSPENDED", "x"), queue.State("ACTIVE", "gen is PREEMPTED")
    repaired = queue.State("ACTIVE", "gen is REPAIRING", nodes_change=True)
    looks = queue.Looks(poll=1800)
    assert [looks.verdict(s) for s in (lost, broken, lost)] == ["doubtful", "doubtful", "lost"]
    assert looks.verdict(queue.State("ACTIVE")) == "works"
    assert looks.verdict(lost) == "doubtful"
    assert looks.verdict(queue.State("WAITING_FOR_RESOURCES")) == "waits"
    verdicts = [looks.verdict(repaired) for _ in range(5)]
    assert verdicts == ["waits", "waits", "doubtful", "doubtful", "lost"]  # an hour
    new = queue.State("A_STATE_OF_NEXT_YEAR")
    assert (
        queue.Looks(60).verdict(new) == queue.Looks(60).verdict(queue.State("DELETING")) == "waits"
    )


def test_a_repair_without_end_is_a_loss(cloud):
    cloud.ran()
    cloud.set("node.gen", "REPAIRING 1")
    cloud.set("after_create", "ACTIVE\n")
    code, _, err = cloud("resume", "--name=gen", "--poll=1800")
    assert code == 1 and "installing abc failed" in err  # on the new one: the archive is empty
    assert len(cloud.calls_of("delete")) == len(cloud.calls_of("create")) == 1
    assert len([c for c in cloud.calls_of("describe") if "queued" in c]) == 1 + 5 + 1


@pytest.mark.parametrize("lacks", ["--env=HF_TOKEN: not set", "the packed commit is gone",
                                   "the startup script of gen is gone"])  # fmt: skip
def test_no_tpu_is_made_for_a_stage_that_cannot_start(cloud, monkeypatch, tmp_path, lacks):
    startup = tmp_path / "startup.sh"
    cloud.ran(startup=str(startup))
    cloud.set("states", "SUSPENDED\n")
    if "startup" not in lacks:
        startup.write_text("")
    if "env" in lacks:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        record = records.read("gen")
        job = dataclasses.replace(record.job, env=("HF_TOKEN",))
        records.write(dataclasses.replace(record, job=job))
    if "commit" in lacks:
        packing.archive_path("abc").unlink()
    code, _, err = cloud("resume", "--name=gen")
    assert code == 2 and lacks in err
    assert cloud.calls_of("delete") == [] and cloud.calls_of("create") == []
    if "startup" not in lacks:  # told when the watch begins
        (cloud.folder / "calls").unlink()
        code, _, err = cloud("resume", "--name=gen", "--watch", "--delete_on_exit")
        assert code == 2 and lacks in err and cloud.calls == []


def test_any_error_frees_the_quota_where_asked(cloud, monkeypatch):
    cloud.ran(status=1)
    archive = packing.archive_path("abc")
    monkeypatch.setattr(queue, "pause", lambda seconds: archive.unlink(missing_ok=True))
    code, _, err = cloud("resume", "--name=gen", "--watch", "--delete_on_exit")
    assert code == 2 and "the packed commit is gone" in err
    assert len(cloud.calls_of("delete")) == 1 and records.names() == []


def test_what_was_deleted_meanwhile_is_not_made_again(cloud, monkeypatch):
    """`delete` in another terminal, while this one watches."""
    cloud.ran(status=1)  # between its end and the restart
    monkeypatch.setattr(queue, "pause", lambda seconds: cloud("delete", "--name=gen"))
    code, _, err = cloud("resume", "--name=gen", "--watch")
    assert code == 1 and "was deleted; it is not made again" in err
    assert cloud.calls_of("create") == [] and records.names() == []


def test_watching_needs_a_stage(cloud):
    cloud.created(hosts=1)
    code, _, err = cloud("resume", "--name=gen", "--watch", "--delete_on_exit")
    assert code == 2 and "nothing was run on it yet" in err and cloud.calls == []
    assert cloud("resume", "--name=gen", "--recreate")[0] == 0
    assert len(cloud.calls_of("delete")) == len(cloud.calls_of("create")) == 1


# ---- resume --------------------------------------------------------------------------------------
def test_a_preempted_tpu_is_made_again_and_the_stage_goes_on(cloud):
    cloud.stage("echo runs; sleep 30")
    cloud.created(hosts=2)
    cloud("run", "--name=gen", *TRAIN)
    cloud.set("states", "SUSPENDED\n")
    cloud.stage("echo goes on from $4")
    code, out, err = cloud("resume", "--name=gen")
    assert code == 0, err
    assert "SUSPENDED: suspended by Google (pre-empted, most likely)" in out
    assert "goes on from its last checkpoint" in out
    verbs = [call.split()[3] for call in cloud.calls if "queued-resources" in call]
    assert verbs.index("delete") < verbs.index("create")  # a spot VM is not restarted
    cloud.ended(2)
    assert "goes on from --workdir=/mnt/w" in cloud.host("gen-1-0", "gen/log")
    assert cloud("resume", "--name=gen")[1] == "gen: the stage has finished on all hosts\n"


def test_watching_ends_with_the_stage_and_gives_back_the_tpu(cloud, monkeypatch):
    """Pre-empted while it runs, told by the metadata of one host; then it fails once; then ends."""
    cloud.stage("sleep 30")
    cloud.created(hosts=2)
    cloud("run", "--name=gen", *TRAIN)
    cloud.set("preempted.gen-1-0")
    stages = ["exit 1\n", WRITES_STEPS]

    def next_stage(seconds):
        """Between two looks: what the next start will do; what has ended is waited for."""
        if seconds >= 30:  # the pause before a restart
            cloud.stage(stages.pop(0))
            return
        time.sleep(0.02)

    monkeypatch.setattr(queue, "pause", next_stage)
    code, out, err = cloud("resume", "--name=gen", "--watch", "--delete_on_exit", "--poll=1")
    assert code == 0, out + err
    assert "pre-empted: slice 1 host 0" in out and "restart 1 of 20 in 30 s" in out
    assert "exit status 1" in out and "restart 2 of 20 in 60 s" in out
    assert "the stage has finished on all hosts" in out
    assert records.names() == [] and not (cloud.folder / "states").is_file()


def test_restarts_are_bounded(cloud):
    cloud.stage("echo no memory; exit 1")
    cloud.created(hosts=1)
    cloud("run", "--name=gen", *TRAIN)
    cloud.ended(1)
    code, out, err = cloud("resume", "--name=gen", "--watch", "--max_restarts=2")
    assert code == 1 and "gave up after 2 restarts" in err and "no memory" in err
    assert [line for line in out.splitlines() if "restart" in line and " in " in line] == [
        "gen: restart 1 of 2 in 30 s", "gen: restart 2 of 2 in 60 s",
    ]  # fmt: skip


def test_a_wrong_command_is_not_started_again(cloud):
    cloud.ran(status=2)
    log = cloud.folder / "hosts/gen-0/selfrag-launch/gen/log"
    log.write_text("===\nselfrag train: /mnt/d.jsonl: no such file\n")
    code, _, err = cloud("resume", "--name=gen", "--watch")
    assert code == 1 and "refuses its input on host 0: selfrag train: /mnt/d.jsonl" in err
    assert len(cloud.calls_of("create")) == 0


def test_a_lost_connection_alone_deletes_nothing(cloud):
    cloud.ran(hosts=4)
    cloud.set("refused.gen-3")
    code, _, err = cloud("resume", "--name=gen")
    assert code == 1 and "is ACTIVE, but does not answer" in err
    code, _, err = cloud("status", "--name=gen")
    assert code == 1 and "host 3: not reached" in err
    assert cloud.calls_of("delete") == []


def test_an_expired_login_ends_the_watch_and_deletes_nothing(cloud):
    cloud.ran()
    cloud.set("fail.ssh", "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) Reauthentication failed.")
    code, out, err = cloud("resume", "--name=gen", "--watch")
    assert code == 1 and "gcloud auth login" in err and "restart" not in out
    assert cloud.calls_of("delete") == []


def test_deleting_what_is_gone_is_fine_and_leaks_are_deleted(cloud):
    cloud.created()
    (cloud.folder / "states").unlink()
    cloud.set("leaked.gen")
    code, out, _ = cloud("delete", "--name=gen")
    assert code == 0 and "deleted what was left: gen" in out
    cloud.created()
    code, out, _ = cloud("delete", "--name=gen", "--wait")
    assert code == 0 and out == "gen: deleted\n" and records.names() == []


# ---- hangs ---------------------------------------------------------------------------------------
def health(cpu, progress="5/10 steps", age=0.0, **fields):
    return watch.remote.Health(
        started=True, alive=True, cpu_seconds=cpu, progress=progress, log_age=age, **fields
    )


@pytest.fixture
def hang(cloud, monkeypatch):
    """A watcher, its hosts, and a clock in minutes that the test sets."""
    now = [0.0]
    monkeypatch.setattr(watch, "clock", lambda: 60 * now[0])
    cloud.created()
    record = records.read("gen")
    watcher = watch.Watcher(record, None, hang_minutes=10, poll=1, max_restarts=1)
    return watcher, watch.Hosts(record, None).all, now


def test_a_hang_names_the_host_that_stands_still(hang):
    watcher, hosts, now = hang
    watcher.judge({h: health(100.0) for h in hosts})
    now[0] = 9
    after = {h: health(100.0 if h.worker == 2 else 600.0, age=540) for h in hosts}
    assert watcher.judge(after).kind == "runs"
    now[0] = 11
    found = watcher.judge(after)
    assert found.kind == "hangs"
    assert found.text == (
        "no progress for 11 minutes (last: 5/10 steps); no CPU time was used on host 2"
    )


def test_progress_is_no_hang(hang):
    watcher, hosts, now = hang
    for minute in range(0, 60, 9):
        now[0] = minute
        step = f"{minute}/60 steps"
        assert watcher.judge({h: health(1.0, step) for h in hosts}).kind == "runs"


def test_a_log_that_was_silent_before_the_first_look_is_a_hang(hang):
    watcher, hosts, _ = hang
    found = watcher.judge({h: health(1.0, age=1200) for h in hosts})
    assert found.kind == "hangs" and "no progress for 20 minutes" in found.text
    ended = {h: health(1.0, age=1200, exit_status=0 if h.worker == 3 else None) for h in hosts}
    assert "ended while the others wait: host 3" in watcher.judge(ended).text


def test_a_hang_is_stopped_and_started_again(cloud, monkeypatch):
    """The stage saves on SIGTERM, which `stop` gives it the time for."""
    cloud.stage(
        'trap "echo saved; exit 143" TERM\n' + WRITES_STEPS + "while :; do sleep 0.05; done"
    )
    cloud.created(hosts=1)
    cloud("run", "--name=gen", *TRAIN)
    file = cloud.folder / "hosts/gen-0/selfrag-launch/gen/log"
    cloud.until(lambda: "steps" in file.read_text())
    old = time.time() - 3600
    os.utime(file, (old, old))
    code, _, err = cloud("status", "--name=gen")
    assert code == 1 and "no progress for 60 minutes (last: 2/10 steps)" in err
    code, out, err = cloud("resume", "--name=gen")
    assert code == 0 and "started again" in out, err
    assert "saved" in file.read_text() and file.read_text().count("=== ") == 2
    cloud.until(lambda: file.read_text().count("steps") == 2)
    assert cloud("status", "--name=gen")[0] == 0
    assert cloud.calls_of("delete") == []  # the TPU is fine
