"""Shell completion: what argcomplete is told, and that real shells complete with the scripts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pseudo_terminal import PseudoTerminal

from selfrag_jax import cli

SCRIPTS = Path(sys.executable).parent


def completions(line, folder):
    """What `selfrag` answers to a shell whose line ends at the cursor."""
    out = folder / "completions"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line.encode())),
        "COMP_TYPE": "9",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",
    }
    command = [sys.executable, "-m", "selfrag_jax"]
    subprocess.run(command, env=environment, cwd=folder, check=True)
    return [word.strip() for word in out.read_text().split("\n")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("selfrag ans", {"answer"}),
        ("selfrag help cal", {"calibrate"}),
        ("selfrag answer --mo", {"--model", "--mode"}),
        ("selfrag answer --mode=al", {"always_retrieve"}),
        ("selfrag train --config=gen", {"generator_7b", "generator_13b"}),
        ("selfrag ask --model=fo", {"folder/"}),
        ("selfrag ask --model=mo", {"model.gguf"}),
        ("selfrag answer --input=fi", {"file.jsonl"}),
        ("selfrag ask --config.answer.search.nd", {"--config.answer.search.ndocs="}),
        ("selfrag completion z", {"zsh"}),
        ("selfrag doctor --stage=pre", {"prepare"}),
        ("selfrag ask --nokeep", {"--nokeep_passages"}),
    ],
)
def test_commands_flags_and_values_complete(tmp_path, line, expected):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.jsonl").touch()
    (tmp_path / "forms.txt").touch()  # no folder
    (tmp_path / "model.gguf").touch()
    (tmp_path / "model.txt").touch()
    assert set(completions(line, tmp_path)) == expected


def test_without_its_library_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install argcomplete" in capsys.readouterr().err


# ---- real shells ---------------------------------------------------------------------------------
SHELLS = {
    "bash": (["bash", "--norc", "-i"], 'eval "$(selfrag completion bash)"'),
    "zsh": (
        ["zsh", "-f", "-i"],
        'autoload -U compinit; compinit -u -D; eval "$(selfrag completion zsh)"',
    ),
    "fish": (["fish", "--no-config", "-i"], "selfrag completion fish | source"),
}


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
def test_a_real_shell_completes(tmp_path, shell):
    command, setup = SHELLS[shell]
    if shell != "bash" and not shutil.which(shell):
        code = subprocess.run(
            [sys.executable, "-m", "selfrag_jax", "completion", shell],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert "selfrag" in code and "_ARGCOMPLETE" in code  # all that can be tested without it
        return
    path = f"{SCRIPTS}:{os.environ['PATH']}"
    with PseudoTerminal(command, tmp_path, PATH=path) as terminal:
        terminal.type(f"{setup}\necho set_'up'\n")
        terminal.read_until("set_up")
        terminal.type("selfrag ans\t")
        terminal.read_until("selfrag answer")
        terminal.type("--mode=al\t")
        terminal.read_until("--mode=always_retrieve")
        terminal.type("--quan\t")
        terminal.read_until("--quantization")
