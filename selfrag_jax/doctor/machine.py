"""The machine's memory, disk and caches, and which credentials it has; never what they are."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selfrag_jax.critic.teachers.settings import API_KEY

_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",  # version 2
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
_MOST_FILES = 20_000  # of a cache, that are counted
_BUCKETS = "https://storage.googleapis.com"


def memory() -> dict[str, Any]:
    """Bytes of main memory: all, available, and the limit of a container if it is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for text in map(_read, _CGROUP_LIMITS) if text.isdigit()]
    limit = min(limits, default=total)
    available = None
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return {"total": total, "available": available, "limit": limit if limit < total else None}


def host() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory(),
    }


def disk(folder: str | Path) -> dict[str, Any]:
    """Bytes of the disk where a folder is, or would be made, and whether we may write there."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    writable = place.is_dir() and os.access(place, os.W_OK)
    return {"folder": str(folder), "total": usage.total, "free": usage.free, "writable": writable}


def caches() -> dict[str, dict[str, Any]]:
    """Folders and files that outlive a run, with their sizes; `more` if not all was counted."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = Path(os.environ.get("HF_HOME") or home / "huggingface")
    places = {
        "compiled programs": Path(
            os.environ.get("JAX_COMPILATION_CACHE_DIR") or home / "selfrag_jax" / "xla"
        ),
        "teachers' replies": home / "selfrag_jax" / "teacher_replies.sqlite3",
        "indexes of --passages": home / "selfrag_jax" / "passages",
        "hub downloads": Path(os.environ.get("HF_HUB_CACHE") or hub / "hub"),
    }
    return {name: {"path": str(path), **_size(path)} for name, path in places.items()}


def _size(path: Path) -> dict[str, Any]:
    """Stops after _MOST_FILES, as a network disk takes its time."""
    if not path.is_dir():
        return {"bytes": path.stat().st_size if path.is_file() else 0, "more": False}
    total = seen = 0
    for folder, _, files in os.walk(path, onerror=None):
        for name in files:
            seen += 1
            if seen > _MOST_FILES:
                return {"bytes": total, "more": True}
            try:
                stat = os.lstat(os.path.join(folder, name))  # the hub's links are no copies
            except OSError:
                continue
            total += stat.st_size
    return {"bytes": total, "more": False}


def credentials() -> dict[str, str | None]:
    """Where a credential was found, by what it is for; None if nowhere."""
    home = Path.home()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    gcloud = Path(os.environ.get("CLOUDSDK_CONFIG") or home / ".config" / "gcloud")
    hub = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    return {
        "gs://": _first(
            _file_of("GOOGLE_APPLICATION_CREDENTIALS"),
            _file(gcloud / "application_default_credentials.json"),
            _variable("STORAGE_EMULATOR_HOST"),
            "this virtual machine's service account" if _on_google_cloud() else None,
        ),
        "hub": _first(
            _variable("HF_TOKEN"),
            _file(Path(os.environ.get("HF_TOKEN_PATH") or hub / "token")),
        ),
        "teacher": _variable(API_KEY),
    }


def _first(*found: str | None) -> str | None:
    return next((place for place in found if place), None)


def _variable(name: str) -> str | None:
    return name if os.environ.get(name, "").strip() else None


def _file(path: Path) -> str | None:
    return str(path) if path.is_file() else None


def _file_of(variable: str) -> str | None:
    path = os.environ.get(variable)
    if not path:
        return None
    return f"{variable}" if Path(path).is_file() else f"{variable}: {path} is no file"


def _on_google_cloud() -> bool:
    return "Google" in _read("/sys/class/dmi/id/product_name")


def network(timeout: float = 5.0) -> dict[str, str]:
    """Tries a connection to the hub and to buckets; "reached", or why not, by address."""
    addresses = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co", _BUCKETS)
    return {address: _reach(address, timeout) for address in addresses}


def _reach(address: str, timeout: float) -> str:
    parts = urlsplit(address)
    if any(os.environ.get(n) for n in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return "behind a proxy, not tried"
    try:
        socket.create_connection((parts.hostname, parts.port or 443), timeout).close()
    except OSError as e:
        return f"not reached: {e}"
    return "reached"


def hub() -> str:
    """What the hub's settings say, without a network."""
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE", "True"):
        return "offline (HF_HUB_OFFLINE)"
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
