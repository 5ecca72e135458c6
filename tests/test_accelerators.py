"""No warning of an absent accelerator; one that is there, or asked for, is left to JAX."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from selfrag_jax import accelerators


@pytest.fixture
def bare_host(monkeypatch, tmp_path):
    """A host without accelerators, where JAX has not been imported; returns a folder for files."""
    monkeypatch.delitem(sys.modules, "jax")
    for name in ("JAX_PLATFORMS", *accelerators._TPU_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(accelerators, "_GPU_FILES", (f"{tmp_path}/nvidia[0-9]*",))
    monkeypatch.setattr(accelerators, "_TPU_FILES", (f"{tmp_path}/accel*",))
    monkeypatch.setattr(accelerators, "_PCI_DEVICES", f"{tmp_path}/pci/*")
    return tmp_path


def pci_device(folder: Path, vendor: str, kind: str) -> None:
    device = folder / "pci" / kind
    device.mkdir(parents=True)
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")


def test_a_host_without_accelerators_is_told_to_jax(bare_host):
    pci_device(bare_host, "0x1ae0", "0x020000")  # a cloud machine's network card
    pci_device(bare_host, "0x8086", "0x120000")
    assert accelerators.expect_none()
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("file", ["nvidia0", "accel0"])
def test_a_device_file_leaves_the_choice_to_jax(bare_host, file):
    (bare_host / file).touch()
    assert not accelerators.expect_none()
    assert "JAX_PLATFORMS" not in os.environ


def test_a_tpu_on_the_pci_bus_leaves_the_choice_to_jax(bare_host):
    pci_device(bare_host, "0x1ae0", "0x120000")
    assert accelerators.has_tpu() and not accelerators.expect_none()


@pytest.mark.parametrize("variable", ["JAX_PLATFORMS", "TPU_NAME", "JAX_FORCE_TPU_INIT"])
def test_a_users_own_choice_wins(bare_host, monkeypatch, variable):
    monkeypatch.setenv(variable, "cuda")
    assert not accelerators.expect_none()
    assert os.environ.get("JAX_PLATFORMS") == ("cuda" if variable == "JAX_PLATFORMS" else None)


def test_hardware_that_only_its_plugin_knows_is_left_to_jax(bare_host, monkeypatch):
    plugin = bare_host / "site" / "jax_plugins" / "other_chip"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").touch()
    monkeypatch.syspath_prepend(bare_host / "site")
    monkeypatch.delitem(sys.modules, "jax_plugins", raising=False)
    assert not accelerators.expect_none()


@pytest.mark.slow
def test_absent_accelerators_are_not_reported(quickstart):
    """With the plugins of TPUs and GPUs installed; JAX alone prints ten lines."""
    assert find_spec("libtpu") and find_spec("jax_plugins.xla_cuda13")
    workdir, _ = quickstart
    command = [sys.executable, "-m", "selfrag_jax", "ask", f"--workdir={workdir}"]
    command += ["--config=tiny:smoke", "Where was Marvin Tellock born?"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("TPU", "CUDA", "cuda", "plugin", "Traceback", "WARNING"):
        assert word not in done.stdout + done.stderr, done.stderr
