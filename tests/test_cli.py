"""The command line: help that teaches, and wrong flags, fields and files met with a remedy."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from plain_search import make_rag

import selfrag_jax
from selfrag_jax import cli, config
from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.commands import GROUPS, SUMMARIES, ask, help_text, load_command
from selfrag_jax.critic.collecting import CollectConfig
from selfrag_jax.critic.labelling import LabelConfig
from selfrag_jax.errors import UserError
from selfrag_jax.retrieval.encoders import EncoderConfig
from selfrag_jax.training.config import TrainConfig
from selfrag_jax.world.encyclopedia import WorldConfig


def run(capsys, *argv):
    """(exit code, stdout, stderr)."""
    code = cli.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---- help and wrong input ------------------------------------------------------------------------
def test_the_overview_lists_every_command_once(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    for same in (["help"], ["--help"], ["help", "help"], ["help", "--help"]):
        assert run(capsys, *same)[:2] == (0, out)
    listed = [line.split()[0] for line in out.splitlines() if re.match(r"  \w", line)]
    assert sorted(listed) == sorted(SUMMARIES) and set().union(*GROUPS.values()) <= set(SUMMARIES)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["", *SUMMARIES])
def test_help_fits_the_terminal(capsys, monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = run(capsys, "help", *([name] if name else []))
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert name not in ("ask", "answer", "evaluate") or max(map(len, lines)) > width - 10
    assert not any(line.endswith(" ") for line in lines)


@pytest.mark.parametrize("name", SUMMARIES)
def test_help_is_narrow_on_a_narrow_terminal(name):
    """But for examples, whose words stay whole."""
    parts = help_text.command_help(name, load_command(name), 40).split("\n\n")
    lines = [line for p in parts if not p.startswith("Examples") for line in p.splitlines()]
    assert len(lines) > 1 and max(map(len, lines)) <= 40


@pytest.mark.parametrize("name", SUMMARIES)
def test_help_has_every_flag_in_a_group_with_its_default(capsys, name):
    command = load_command(name)
    code, out, _ = run(capsys, "help", name)
    assert code == 0 and run(capsys, name, "--help")[1] == out
    unwrapped = out.replace(" \\\n     ", "")
    assert all(f"\n  {example}\n" in unwrapped for example in command.examples)
    group, described = "", {}  # flag -> [group, help]
    for line in out.partition("\nExamples\n")[2].splitlines():
        if line and not line.startswith(" "):
            group = line.partition(" (defaults of")[0]
        elif found := re.match(r"  --(\w+)(.*)", line):
            flag = found[1]
            described[flag] = [group, found[2]]
        elif line and group:
            described[flag][1] += " " + line.strip()
    assert set(described) == {f.name for f in command.flags}
    for f in command.flags:
        group, text = described[f.name]
        assert group == ("Required" if f.required else f.heading)
        assert f.required or "default" in text, f.name
    headings = [group for group, _ in described.values()]
    assert headings == sorted(headings, key=[*dict.fromkeys(headings)].index), "in one piece"
    assert "Required" not in headings[sum(f.required for f in command.flags) :]


def test_help_of_ask_groups_its_flags_and_tells_the_numbers_of_its_config():
    groups = help_text.flag_groups(load_command("ask"))
    titles = ["Model and index", "Passages without an index", "Search", "Sampling"]
    assert [*groups] == [*titles, "Output", "Settings"]
    assert sum(map(len, groups.values())) >= 26 and max(map(len, groups.values())) <= 15
    text = help_text.command_help("ask", load_command("ask"), 120)
    search = config.load("any_model").answer.search
    for name in ("ndocs", "beam_width", "max_depth", "threshold"):
        row = re.search(rf"  --{name} .*?\(default: (.*?)\)", text, re.DOTALL)
        assert row and row[1] == str(search[name])
    assert "Search (defaults of --config=any_model)" in text


def test_the_values_that_complete_are_those_that_the_library_takes():
    """Where a command spells them out, so that its help imports nothing that takes long."""
    from selfrag_jax.checkpoints.converting import FORMATS
    from selfrag_jax.compilation.compile import PROGRAMS
    from selfrag_jax.data.file_kinds import KINDS
    from selfrag_jax.models.params import DTYPES
    from selfrag_jax.retrieval.bm25 import MIXES
    from selfrag_jax.retrieval.index import BACKENDS

    for command, flag, known in (
        ("retrieve", "backend", BACKENDS),
        ("retrieve", "mix", MIXES),
        ("compile", "program", PROGRAMS),
        ("check", "for", tuple(KINDS)),
        ("convert", "format", FORMATS),
        ("convert", "dtype", DTYPES),
    ):
        [choices] = [f.choices for f in load_command(command).flags if f.name == flag]
        assert choices == known, (command, flag)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["help", "anser"], "unknown command 'anser'; did you mean 'answer'?"),
        (["xyzzy"], "unknown command 'xyzzy'; `selfrag help` lists the commands"),
        (["--workdir=W", "ask"], "flags come after the command"),
        (["--versoin"], "did you mean '--version'?"),
        (["completion"], "completion of which shell? bash, zsh, fish"),
        (["completion", "bsh"], "completion of which shell?"),
        (["completion", "--zzz"], "unknown flag --zzz; it has no flags"),
        (["ask", "--full=maybe", "Who?"], "--full=maybe: must be true or false"),
    ],
)
def test_an_unknown_command_is_met_in_one_line(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2 and not out and message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", ["--version", "help", "help prepare"])
def test_help_that_nobody_reads_to_its_end_ends_in_silence(arguments):
    """As in `selfrag help | head -1`."""
    command = [sys.executable, "-m", "selfrag_jax", *arguments.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


def test_an_error_that_quotes_a_file_is_inert(capsys, monkeypatch):
    def fail(values):
        raise UserError("f.tsv, line 2: \x1b]0;title\x07evil \x1b[2Jid")

    monkeypatch.setattr(ask, "load_selfrag", fail)
    assert run(capsys, "ask", "Who?") == (2, "", "selfrag ask: f.tsv, line 2: evil id\n")


@pytest.mark.parametrize(("name", "continues"), [("ask", False), ("train", True), ("label", True)])
def test_ctrl_c_promises_to_continue_only_where_something_was_begun(
    capsys, monkeypatch, name, continues
):
    def stop(*_):
        raise KeyboardInterrupt

    command = replace(load_command(name), run=stop)
    monkeypatch.setattr(cli, "load_command", lambda _: command)
    needed = [f"--{f.name}=x" for f in command.flags if f.required]
    code, _, err = run(capsys, name, *needed)
    assert code == 130 and err.startswith("\ninterrupted")
    assert ("the same command continues" in err) == continues


def test_version_names_package_jax_and_python(capsys):
    code, out, _ = run(capsys, "--version")
    python = ".".join(map(str, sys.version_info[:3]))
    assert code == 0
    assert out == f"selfrag-jax {selfrag_jax.__version__}, jax {jax.__version__}, Python {python}\n"


@pytest.mark.parametrize("name", SUMMARIES)
def test_wrong_flags_of_every_command_exit_with_2(capsys, name):
    """A misspelt flag names the right one; a missing one and an unknown address are named."""
    flags = load_command(name).flags
    if not flags:
        return  # `completion`
    for f in flags:
        misspelt = f.name + "x"
        code, _, err = run(capsys, name, f"--{misspelt}=1")
        assert code == 2 and f"unknown flag --{misspelt}; did you mean --" in err
    code, _, err = run(capsys, name, "--zzzz=1")
    assert code == 2 and f"flags: --{flags[0].name}" in err
    if needed := [f.name for f in flags if f.required]:
        code, _, err = run(capsys, name)
        assert code == 2 and all(f"--{n}" in err for n in needed)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quikstart"], "did you mean 'quickstart'"),
        (["quickstart"], "missing --workdir"),
        (["quickstart", "--wrkdir=W"], "did you mean --workdir"),
        (["quickstart", "--workdir=W", "--config=tinny"], "did you mean 'tiny'"),
        (["quickstart", "--workdir=W", "--config=tiny:smok"], "unknown variant 'smok'"),
        (["quickstart", "--workdir=W", "--config.world.tests=3"], "did you mean 'test'"),
        (["quickstart", "--workdir=W", "--config.world.test=many"], "expected a value like 150"),
        (["quickstart", "--workdir=W", "extra"], "unexpected argument 'extra'"),
        (["retrieve", "--index=I", "--input=Q", "--out=O", "--k=five"], "--k=five"),
        (["ask", "--workdir=nowhere", "Who?"], "holds no finished quickstart"),
        (
            ["ask", "--model=nowhere", "Who?"],
            "nowhere: no such folder; expected the folder of a model",
        ),
        (
            ["answer", "--model=M", "--input=Q", "--out=O", "--treshold=1"],
            "did you mean --threshold",
        ),
        (["index", "--out=I"], "either --embeddings"),
        (["evaluate", "--task=popqa", "--seed=-1"], "--seed=-1: must be from 0 to 2,147,483,647"),
        (["embed", "--passages=none.tsv", "--out=E"], "none.tsv: no such file"),
        (["label", "--critic=none", "--input=x", "--out=y"], "does not exist"),
        (
            ["world", "--out=W", "--config.world.train=0"],
            "config world: train=0: must be at least 1",
        ),
        (
            ["world", "--out=W", "--config.world.wrong_output_rate=2"],
            "wrong_output_rate=2.0: must be between 0 and 1",
        ),
        (
            ["world", "--out=W", "--config.world.values_per_kind=3"],
            "values_per_kind=3: multiple choice needs at least 4",
        ),
        (
            ["world", "--out=W", "--config.world.vocabulary=klingon"],
            "vocabulary='klingon': must be base or world",
        ),
        (
            ["train", "--role=critic", "--data=x", "--workdir=ftp://bucket/w"],
            "ftp://bucket/w: files are not read from ftp://; known: gs://, s3://",
        ),
        (["report", "--workdir=none"], "run `selfrag quickstart --workdir=none` first"),
    ],
)
def test_wrong_input_is_met_with_a_remedy(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *argv)
    assert code == 2 and message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_an_unfinished_workdir_is_refused(capsys, tmp_path):
    """A quickstart was killed while the generator trained; its index is finished."""
    (tmp_path / "generator" / "100").mkdir(parents=True)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "manifest.json").write_text("{}")
    for argv in (["ask", f"--workdir={tmp_path}", "Who?"], ["report", f"--workdir={tmp_path}"]):
        code, _, err = run(capsys, *argv)
        assert code == 2 and f"run `selfrag quickstart --workdir={tmp_path}` first" in err


def test_a_mean_of_runs_needs_a_folder_to_write_to(tmp_path, capsys):
    row = {
        "system": "rag_top1", "task": "long_tail", "metric": "accuracy", "value": 0.5, "low": 0.4,
        "high": 0.6, "n": 2,
    }  # fmt: skip
    for workdir in ("a", "b"):
        (tmp_path / workdir / "report").mkdir(parents=True)
        results = tmp_path / workdir / "report" / "results.json"
        results.write_text(json.dumps({"rows": [row]}))
    code, _, err = run(capsys, "report", f"--workdir={tmp_path}/a,{tmp_path}/b")
    assert code == 2 and "--out" in err


# ---- failures ------------------------------------------------------------------------------------
@pytest.mark.parametrize("as_json", [False, True])
def test_a_question_without_an_answer_is_a_failure(capsys, monkeypatch, talkative, as_json):
    class Broken:
        def search(self, *_):
            raise RuntimeError("the index is broken")

    rag = make_rag(talkative, ndocs=2)
    rag.retriever = Broken()
    monkeypatch.setattr(ask, "load_selfrag", lambda values: rag)
    flags = ["--mode=always_retrieve", *(["--json"] if as_json else [])]
    code, out, err = run(capsys, "ask", "Who?", *flags)
    assert code == 1 and err == "selfrag ask: no answer: RuntimeError: the index is broken\n"
    if as_json:
        assert json.loads(out)["error"] == "RuntimeError: the index is broken"
    else:
        assert not out


def test_a_full_device_is_reported_with_settings_that_take_less(capsys, monkeypatch, tmp_path):
    def run_out_of_memory(values, _):
        raise RuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9.5GiB.\nand much more"
        )

    command = replace(load_command("world"), run=run_out_of_memory)
    monkeypatch.setattr(cli, "load_command", lambda name: command)
    code, _, err = run(capsys, "world", f"--out={tmp_path}/W")
    assert code == 1 and "memory is full" in err and "9.5GiB" in err
    assert "--config.answer.batch=" in err and "and much" not in err


# ---- memory --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stage", "keeps"), [("train", 1), ("answer", 1), ("convert", 0), ("compile", 0)]
)
def test_a_process_that_runs_a_model_keeps_freed_memory(monkeypatch, stage, keeps):
    """As a command only: a program that calls `main` with arguments decides on its own memory."""
    kept = []
    monkeypatch.setattr(cli.allocator, "keep_freed_memory", lambda: kept.append(stage))
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    command = replace(load_command(stage), flags=(), run=lambda values, positional: None)
    monkeypatch.setattr(cli, "load_command", lambda name: command)
    monkeypatch.setattr(cli.sys, "argv", ["selfrag", stage])
    assert cli.main() == 0 and len(kept) == keeps
    assert cli.main([stage]) == 0 and len(kept) == keeps


def test_a_part_without_its_extra_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    files = Path(__file__).parent / "data"
    argv = ["prepare", "--dataset=gpt4_alpaca", f"--manual_dir={files}", f"--out={tmp_path}/out"]
    code, _, err = run(capsys, *argv)
    assert code == 2 and not (tmp_path / "out").exists()
    assert "needs tensorflow_datasets" in err and "pip install 'selfrag-jax[train]'" in err


# ---- configs -------------------------------------------------------------------------------------
def test_help_of_no_command_waits_for_jax():
    """Command files import what takes long inside functions (commands/__init__.py)."""
    program = (
        "import sys\n"
        "from selfrag_jax.commands import SUMMARIES, load_command\n"
        "for name in SUMMARIES:\n"
        "    load_command(name)\n"
        "    heavy = {'jax', 'flax', 'scann', 'pyarrow', 'orbax'} & set(sys.modules)\n"
        "    assert not heavy, f'{name}: {heavy}'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_the_package_and_the_overview_import_little():
    """Counted, as times vary: numpy alone has 150 modules, jax 700."""
    for arguments in (["-c", "import selfrag_jax"], ["-m", "selfrag_jax", "--help"]):
        command = [sys.executable, "-X", "importtime", *arguments]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        names = {line.rpartition("|")[2].strip() for line in lines.splitlines()}
        assert "selfrag_jax" in names and len(names) < 300
        assert not names & {"jax", "numpy", "flax", "torch", "tensorflow_datasets", "scann"}


def test_a_config_of_another_kind_is_refused(capsys, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict(dict(kind='index'))\n"
    )
    code, _, err = run(capsys, "quickstart", f"--workdir={tmp_path}/W", f"--config={other}")
    assert code == 2 and "of kind 'index'" in err
    code, _, err = run(capsys, "embed", "--passages=p", "--out=o", f"--config={other}")
    assert code == 2 and "no section 'encoder'" in err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return missing", "mine.py:2: NameError: name 'missing' is not defined"),
        ("c = config.load('small'); c.generator.length = 'many'", r"mine.py:2: TypeError: .*lengt"),
        (
            "c = config.load('small'); c.generator.lenght = 9",
            r"mine.py:2: AttributeError: .*lenght",
        ),
        ("c = config.load('smal')", "--config=smal: no such config; did you mean 'small'"),
        (
            "return {'base': 'embedded'}",
            r"get_config\(\) of .*mine.py returns a dict; expected an ",
        ),
        ("c = 1", r"returns a NoneType; expected an ml_collections.ConfigDict"),
    ],
)
def test_a_config_whose_code_fails_is_named_with_its_line(tmp_path, monkeypatch, body, message):
    monkeypatch.chdir(tmp_path)
    mine = Path("mine.py")
    mine.write_text(f"from selfrag_jax import config\ndef get_config(): {body}\n")
    with pytest.raises(UserError, match=message) as e:
        config.load(str(mine))
    assert "\n" not in str(e.value)


def test_build_refuses_unknown_and_missing_fields():
    with pytest.raises(UserError, match="did you mean 'dim'"):
        config.build(EncoderConfig, {"name": "hashed", "dims": 8, "word_weight": 1.0}, "encoder")
    with pytest.raises(UserError, match="lacks name"):
        config.build(EncoderConfig, {"dim": 8, "word_weight": 1.0}, "encoder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(steps=1.5), "steps=1.5 must be a whole number"),
        (dict(steps="abc"), "steps='abc' must be a whole number"),
        (dict(steps=True), "steps=True must be a whole number"),
        (dict(packed=1), "packed=1 must be true or false"),
        (dict(dtype=16), "dtype=16 must be text"),
        (dict(keep_best=-1), "keep_best=-1: must not be below 0"),
    ],
)
def test_build_refuses_fields_of_the_wrong_type(change, message):
    section = config.load("tiny:smoke").generator
    section = section.to_dict() | dict(steps=3, epochs=None) | change
    with pytest.raises(UserError, match=message):
        config.build(TrainConfig, section, "generator")


def test_none_is_a_word_where_a_field_has_such_a_value():
    c = config.override(config.load("generator_7b"), ["generator.remat=none"])
    assert config.build(TrainConfig, c.generator, "generator").remat == "none"


def test_both_variants_of_tiny_build_every_section():
    sections = dict(
        world=WorldConfig,
        collect=CollectConfig,
        label=LabelConfig,
        answer=AnswerConfig,
        critic=TrainConfig,
    )
    for variant in ("tiny", "tiny:smoke"):
        loaded = config.load(variant)
        for name, cls in sections.items():
            config.build(cls, loaded[name], name)


def test_the_large_critic_labels_with_full_prompts():
    label = config.build(LabelConfig, config.load("critic_7b").label, "label")
    assert not label.critic.brief and label.passages == 5


def test_reseeding_moves_every_seed():
    plain, reseeded = config.load("tiny"), config.reseed(config.load("tiny"), 5)
    assert reseeded.seed == plain.seed + 5
    for section in ("world", "collect", "critic", "generator", "label", "report"):
        assert reseeded[section].seed == plain[section].seed + 5, section
