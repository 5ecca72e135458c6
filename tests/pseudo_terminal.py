"""A program on a pseudo-terminal, as a user sees it."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

# Makes the pseudo-terminal the program's own, so that Ctrl-C on it sends SIGINT; and lets SIGINT
# through, which a job in the background ignores and its children with it.
_START = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


class PseudoTerminal:
    """Starts `command` on a terminal of 100 columns; use as a context manager."""

    def __init__(self, command, folder, **environment):
        self.fd, child = pty.openpty()
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *command],
            stdin=child, stdout=child, stderr=child, cwd=folder, start_new_session=True,
            env=os.environ | {"TERM": "dumb", "HOME": str(folder), **environment},
        )  # fmt: skip
        os.close(child)
        self.unread = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.fd)

    def type(self, text):
        os.write(self.fd, text.encode())

    def read_until(self, text, seconds=60):
        """Returns what is printed, up to `text`."""
        out, end = self.unread, time.monotonic() + seconds
        while text not in out:
            left = end - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], f"no {text!r} in {out!r}"
            try:
                out += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # the program has ended
                raise AssertionError(f"no {text!r} in {out!r}") from None
        before, found, self.unread = out.partition(text)
        return before + found

    def read_to_end(self, seconds=60):
        """Returns the rest of what is printed, and the exit status."""
        out, end = self.unread, time.monotonic() + seconds
        while select.select([self.fd], [], [], max(0, end - time.monotonic()))[0]:
            try:
                out += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:
                break
        return out, self.process.wait(timeout=seconds)
