"""Which accelerators this host has, by their device files, without loading any driver."""

from __future__ import annotations

import os
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

# Containers and Windows' Linux may show only one of them: jax/_src/hardware_utils.py.
_GPU_FILES = (
    "/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu/*",  # NVIDIA
    "/dev/dxg", "/dev/kfd",  # Windows' Linux; AMD
)  # fmt: skip
_TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_PCI_DEVICES = "/sys/bus/pci/devices/*"
_GOOGLE = "0x1ae0"  # also the vendor of a cloud machine's disks and network cards
_DISK, _NETWORK = "0x01", "0x02"  # the first byte of a PCI class
# A user who sets one of these expects a TPU, whatever files there are.
_TPU_VARIABLES = ("JAX_FORCE_TPU_INIT", "TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID")
_KNOWN_PLUGINS = ("xla_cuda", "xla_rocm")  # GPU plugins of JAX: modules of jax_plugins


def has_gpu() -> bool:
    return any(map(glob, _GPU_FILES))


def has_tpu() -> bool:
    return any(map(glob, _TPU_FILES)) or any(map(_is_tpu, glob(_PCI_DEVICES)))


def _is_tpu(pci_device: str) -> bool:
    try:
        vendor, kind = (Path(pci_device, name).read_text() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor.strip() == _GOOGLE and not kind.startswith((_DISK, _NETWORK))


def expect_none() -> bool:
    """Sets JAX_PLATFORMS=cpu on a host without accelerators; returns whether it did.

    Else JAX tries each installed plugin, and each reports what it did not find: ten lines where
    jax[tpu] and jax[cuda13] are installed. Does nothing if JAX_PLATFORMS or a TPU's variables are
    set, if a device file shows an accelerator (one that then fails must be reported), or if a
    plugin is installed whose hardware we would not recognise.

    Call it before JAX is imported.
    """
    if "jax" in sys.modules or any(n in os.environ for n in ("JAX_PLATFORMS", *_TPU_VARIABLES)):
        return False
    if has_gpu() or has_tpu() or _has_unknown_plugin():
        return False
    os.environ["JAX_PLATFORMS"] = "cpu"
    return True


def _has_unknown_plugin() -> bool:
    """Looks where JAX does: entry points, and modules of the namespace package jax_plugins."""
    from importlib.metadata import entry_points  # takes as long as everything else of a --help
    from pkgutil import iter_modules

    package = find_spec("jax_plugins")
    locations = list(package.submodule_search_locations or ()) if package else []
    names = [m.name for m in iter_modules(locations)]
    names += [e.value.rpartition(".")[2] for e in entry_points(group="jax_plugins")]
    return not all(name.startswith(_KNOWN_PLUGINS) for name in names)
