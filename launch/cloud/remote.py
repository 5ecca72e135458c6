"""The shell scripts that run on a host, and what they print.

Below the home folder of each host:

    selfrag-launch/VERSION/    the commit (src/) and its environment (venv/), made once
    selfrag-launch/NAME/       of the job: pid, rc (exit status), log, env, start (its name)
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

FOLDER = "selfrag-launch"
ALREADY_RUNNING = 75  # exit status of `start`

# Steps of training, rows of the other stages: "120/3500 steps" (selfrag_jax/progress.py).
PROGRESS = r"[0-9]+/[0-9]+ [a-z]+"

# Runs the stage, "$@", in a session of its own. `stop` signals the whole group: the stage saves,
# and this shell waits for its status.
JOB = (
    'echo $$ > pid; [ ! -f env ] || . ./env; "$@" & child=$!; trap : TERM; wait $child; rc=$?; '
    "if kill -0 $child 2>/dev/null; then wait $child; rc=$?; fi; echo $rc > rc"
)


# Whether the process in `pid` is ours: after a reboot, its number may be another's.
_RUNS = f'ps -ww -o args= -p "$(cat pid)" 2>/dev/null | grep -q {FOLDER}/'


def install(version: str, archive: str) -> str:
    """Returns the script that unpacks a commit and installs it, unless this host has it."""
    # Runtimes bring Python 3.10; uv fetches a newer one.
    return f"""set -eu
mkdir -p "$HOME/{FOLDER}/{version}"
cd "$HOME/{FOLDER}/{version}"
if [ -f installed ]; then echo "{version} is installed"; exit 0; fi
rm -rf src venv
mkdir src
tar -xzf "$HOME/{archive}" -C src
python=""
for name in python3.13 python3.12 python3.11; do
  if command -v $name >/dev/null && $name -m venv venv >/dev/null 2>&1; then python=$name; break; fi
done
if [ -z "$python" ]; then
  python3 -m pip install -q --user uv
  python3 -m uv venv -q --seed --clear --python 3.12 venv
fi
venv/bin/pip install -q './src[tpu]'
touch installed
echo "{version} installed"
"""


def start(name: str, version: str, arguments: Sequence[str], start: str) -> str:
    """Returns the script that starts a stage, detached, so that it outlives the connection."""
    command = shlex.join(["selfrag", *arguments])
    return f"""set -eu
mkdir -p "$HOME/{FOLDER}/{name}"
cd "$HOME/{FOLDER}/{name}"
if [ -f pid ] && [ ! -f rc ] && {_RUNS}; then
  echo "a stage runs already, process $(cat pid)" >&2; exit {ALREADY_RUNNING}
fi
rm -f pid rc
echo {shlex.quote(start)} > start
if [ -f "$HOME/.{FOLDER}-{name}-env" ]; then mv "$HOME/.{FOLDER}-{name}-env" env; fi
echo "=== $(date -u +%FT%TZ) {version}:" {shlex.quote(command)} >> log
nohup setsid bash -c {shlex.quote(JOB)} job \\
  "$HOME/{FOLDER}/{version}/venv/bin/selfrag" {shlex.join(arguments)} >> log 2>&1 < /dev/null &
for _ in 1 2 3 4 5 6 7 8 9 10; do [ -f pid ] || sleep 0.2; done
echo "started, process $(cat pid)"
"""


def stop(name: str, seconds: int = 120) -> str:
    """Returns the script that ends a stage: SIGTERM, so that it saves, then SIGKILL."""
    return f"""cd "$HOME/{FOLDER}/{name}" 2>/dev/null || exit 0
[ -f pid ] || exit 0
pid=$(cat pid)
[ "$pid" -gt 1 ] 2>/dev/null || exit 0  # "-1" would be every process
# Of its session; after a reboot, the number may be that of others, who are none of our business.
case $(ps -ww -o args= -g "$pid" 2>/dev/null) in *{FOLDER}/*) ;; *) exit 0 ;; esac
kill -TERM -- "-$pid" 2>/dev/null || exit 0
for _ in $(seq {5 * seconds}); do kill -0 -- "-$pid" 2>/dev/null || exit 0; sleep 0.2; done
kill -KILL -- "-$pid" 2>/dev/null || true
"""


def probe(name: str, workdir: str | None, start: str) -> str:
    """Returns the script that prints how a stage is doing on this host, one `key=value` a line.

    Of a start other than `start` it prints only whether it runs.
    """
    checkpoints = ""
    if workdir and "://" not in workdir:
        folder = shlex.quote(f"{workdir}/checkpoints")
        checkpoints = (
            f"echo \"checkpoint=$(find {folder} -maxdepth 1 -name '[0-9]*' -printf '%f\\n' "
            "2>/dev/null | grep -E '^[0-9]+$' | sort -n | tail -1)\""
        )
    # A pre-empted VM can still accept ssh for a moment; its metadata server knows already.
    metadata = "http://metadata.google.internal/computeMetadata/v1/instance/preempted"
    return f"""mkdir -p "$HOME/{FOLDER}/{name}"
cd "$HOME/{FOLDER}/{name}" || exit 1
echo "preempted=$(curl -s -m 2 -H 'Metadata-Flavor: Google' {metadata} || true)"
[ -f pid ] || exit 0
pid=$(cat pid)
if {_RUNS}; then echo alive=1; fi
[ "$(cat start 2>/dev/null)" = {shlex.quote(start)} ] || exit 0
echo "pid=$pid"
echo "rc=$(cat rc 2>/dev/null || true)"
echo "cpu=$(ps -o cputimes= -g "$pid" 2>/dev/null | awk '{{s += $1}} END {{print s + 0}}')"
echo "age=$(( $(date +%s) - $(stat -c %Y log) ))"
# Of this start only: what an earlier one reached is no progress.
echo "progress=$(tail -c 20000 log | tac | sed '/^=== /q' | grep -aoEm 1 '{PROGRESS}' | head -n 1)"
{checkpoints}
echo "last=$(tail -c 2000 log | tr '\\r' '\\n' | grep -av '^ *$' | tail -1)"
"""


def follow(name: str, lines: int, forever: bool) -> str:
    """Returns the script that prints the end of a log, and with `forever` what comes after it."""
    file = f'"$HOME/{FOLDER}/{name}/log"'
    return f"tail -n {lines} {'-F ' if forever else ''}{file}"


@dataclass(frozen=True)
class Health:
    """How a stage is doing on one host, as `probe` printed it."""

    started: bool = False  # the start that was asked for, not an earlier one
    alive: bool = False  # a stage runs, of whatever start
    exit_status: int | None = None  # of the stage, once it has ended
    cpu_seconds: float = 0.0
    log_age: float = 0.0  # seconds since the last line of the log
    progress: str = ""  # "120/3500 steps"
    checkpoint: int | None = None  # the last step saved, if the host sees the workdir
    preempted: bool = False
    last_line: str = ""


def read_health(output: str) -> Health:
    """Returns what the output of `probe` says."""
    found = dict(re.findall(r"^(\w+)=(.*)$", output, re.MULTILINE))

    def number(key: str) -> int | None:
        return int(found[key]) if re.fullmatch(r"-?\d+", found.get(key, "")) else None

    return Health(
        started="pid" in found,
        alive=found.get("alive") == "1",
        exit_status=number("rc"),
        cpu_seconds=number("cpu") or 0,
        log_age=number("age") or 0,
        progress=found.get("progress", ""),
        checkpoint=number("checkpoint"),
        preempted=found.get("preempted", "").strip() == "TRUE",
        last_line=found.get("last", ""),
    )
