"""Finds the Chromium of the browser tests. As a program: prints its path, or what to install."""

import shutil
import subprocess
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = (
    "no Chromium, which the browser tests need: `apt-get install chromium` as root, or "
    "`python -m playwright install --with-deps chromium`"
)


def find():
    """The path of a Chromium that starts: one on the PATH, or playwright's own; "" for none."""
    paths = [path for name in NAMES if (path := shutil.which(name))]
    return next(filter(_starts, paths), "") or _playwrights_own()


def _starts(path):
    """False for Ubuntu's `chromium-browser`, for one, which only names a package to install."""
    return subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0


def _playwrights_own():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() and _starts(path) else ""


if __name__ == "__main__":
    if not (found := find()):
        sys.exit(INSTALL)
    print(found)
