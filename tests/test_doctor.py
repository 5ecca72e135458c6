"""`selfrag doctor`: what is missing, a device that hangs, and no secret on the screen."""

import json
import os
import time

import pytest

from selfrag_jax import accelerators, cli
from selfrag_jax.doctor import devices, machine, packages


@pytest.fixture
def probed(monkeypatch):
    """Replaces the process that starts JAX by another; returns a function that sets its program."""
    return lambda program: monkeypatch.setattr(devices, "_PROGRAM", program)


FOUND = devices._MARK + '[{"platform": "cpu", "kind": "cpu", "memory": null}]'


def doctor(capsys, *argv):
    code = cli.main(["doctor", *argv])
    out, err = capsys.readouterr()
    return code, out, err


# ---- packages ------------------------------------------------------------------------------------
@pytest.fixture
def installed(monkeypatch):
    """Pretends that only these packages are installed, with these requirements."""
    versions = {"selfrag-jax": "0.1.0", "jax": "0.10.2", "numpy": "1.26"}
    requires = {
        "selfrag-jax": [
            "jax>=0.10", "numpy>=2", "flax>=0.12", "jax[tpu]>=0.10; extra == 'tpu'",
            "openai>=2; extra == 'teacher'", "grain; extra == 'train'",
            "colorama; sys_platform == 'win32'",
        ],
        "jax": ["numpy", "libtpu==0.0.42; extra == 'tpu'"],
    }  # fmt: skip

    def version(name):
        if name not in versions:
            raise packages.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(packages.metadata, "version", version)
    monkeypatch.setattr(packages.metadata, "requires", lambda name: requires[name])
    return versions


def test_absent_and_too_old_packages_of_the_core_are_missing(installed):
    assert list(map(str, packages.missing())) == ["numpy>=2 (found 1.26)", "flax>=0.12"]


def test_an_extra_of_an_extra_is_followed(installed):
    assert [m.name for m in packages.missing("tpu")] == ["libtpu"]
    installed["libtpu"] = "0.0.42"
    assert not packages.missing("tpu")


def test_a_command_lacks_what_it_uses_and_nothing_else(installed):
    installed |= {"numpy": "2.4", "flax": "0.12.8"}
    assert packages.lacking("ask") == []
    (line,) = packages.lacking("collect")
    assert "openai>=2" in line and line.endswith("pip install 'selfrag-jax[teacher]'")
    installed["openai"] = "3"
    assert packages.lacking("collect") == []


def test_one_of_two_compilers_is_enough(installed):
    installed |= {"numpy": "2.4", "flax": "0.12.8"}
    assert packages.lacking("compile") == []  # this jax has no extra of GPUs that lacks anything
    installed["jax"] = "0.9"
    assert any("jax" in line for line in packages.lacking("compile"))


def test_a_stage_that_lacks_something_fails(capsys, probed, installed):
    probed(f"print({FOUND!r})")
    code, out, err = doctor(capsys, "--stage=prepare")
    assert code == 1 and "missing for train" in out
    assert "pip install 'selfrag-jax[train]'" in err and "Traceback" not in err


def test_a_plugin_of_another_version_is_a_mismatch(installed):
    assert packages.mismatches() == []
    installed |= {"jaxlib": "0.10.2", "jax-cuda13-plugin": "0.10.1"}
    assert "jax-cuda13-plugin 0.10.1 beside jaxlib 0.10.2" in packages.mismatches()[0]


def test_every_extra_and_command_it_knows_exists():
    from selfrag_jax.commands import SUMMARIES

    assert set(packages.USES) <= set(SUMMARIES)
    provided = packages.metadata.metadata(packages.OURS).get_all("Provides-Extra")
    assert set(packages.EXTRAS) <= set(provided)


# ---- devices -------------------------------------------------------------------------------------
def test_a_device_that_hangs_is_given_up(capsys, probed):
    probed("import time; print('TPU is held', flush=True); time.sleep(60)")
    begin = time.monotonic()
    code, out, _ = doctor(capsys, "--timeout=0.5")
    assert code == 0 and "no devices within" in out and time.monotonic() - begin < 20


def test_an_accelerator_that_does_not_come_up_is_reported(capsys, probed, monkeypatch):
    monkeypatch.setitem(devices._ATTACHED, "gpu", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(accelerators, "has_gpu", lambda: True)
    probed(f"import sys; print('CUDA driver is too old', file=sys.stderr); print({FOUND!r})")
    _, out, _ = doctor(capsys)
    assert "selfrag-jax[gpu]" in out and "CUDA driver is too old" in out


def test_a_jax_that_does_not_start_is_reported(capsys, probed):
    probed("raise RuntimeError('jaxlib is of another version')")
    code, out, _ = doctor(capsys, "--json")
    assert code == 0 and "jaxlib is of another version" in json.loads(out)["devices"]["problem"]


@pytest.mark.slow
def test_the_devices_of_jax_are_found(capsys):
    code, out, _ = doctor(capsys, "--json", "--stage=quickstart")
    found = json.loads(out)
    assert code == 0 and found["devices"]["found"][0]["platform"] == "cpu"
    assert found["devices"]["problem"] is None and found["stage"] == {"quickstart": []}


# ---- the machine ---------------------------------------------------------------------------------
def test_no_secret_is_printed(capsys, probed, monkeypatch, tmp_path):
    probed(f"print({FOUND!r})")
    (tmp_path / "key.json").write_text("top-secret")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    monkeypatch.setenv("HF_TOKEN", "top-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "top-secret")
    for flag in ("--json", "--nojson"):
        _, out, _ = doctor(capsys, flag)
        assert "top-secret" not in out
        assert all(v in out for v in ("GOOGLE_APPLICATION", "HF_TOKEN", "OPENAI_API_KEY"))


def test_without_network_nothing_is_connected_to(capsys, probed, monkeypatch):
    probed(f"print({FOUND!r})")
    tried = []

    def refuse(address, timeout):
        tried.append(address)
        raise OSError("no route")

    monkeypatch.setattr(machine.socket, "create_connection", refuse)
    assert doctor(capsys)[0] == 0 and not tried
    _, out, _ = doctor(capsys, "--network")
    assert len(tried) == 2 and "not reached: no route" in out


def test_a_disk_that_is_not_there_yet_is_that_of_its_parent(tmp_path):
    found = machine.disk(tmp_path / "a" / "b")
    assert found["writable"] and found["total"] == machine.disk(tmp_path)["total"]
    (tmp_path / "file").touch()
    assert not machine.disk(tmp_path / "file" / "x")["writable"]


def test_a_cache_is_counted_up_to_a_limit(monkeypatch, tmp_path):
    for i in range(4):
        (tmp_path / str(i)).write_bytes(b"12345")
    assert machine._size(tmp_path) == {"bytes": 20, "more": False}
    monkeypatch.setattr(machine, "_MOST_FILES", 2)
    assert machine._size(tmp_path) == {"bytes": 10, "more": True}
    assert machine._size(tmp_path / "none") == {"bytes": 0, "more": False}


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--stage=anwser"], "did you mean 'answer'"), (["--timeout=0"], "must be above 0")],
)
def test_wrong_flags_are_met_with_a_remedy(capsys, argv, message):
    code, _, err = doctor(capsys, *argv)
    assert code == 2 and message in err


def test_a_container_has_its_own_limit(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", (str(tmp_path / "memory.max"),))
    assert machine.memory()["limit"] == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory()["limit"] is None
    assert os.sysconf("SC_PAGE_SIZE") < machine.memory()["total"]
