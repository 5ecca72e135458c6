"""Which folders can answer, what is said of those that cannot, and notices on those that can."""

import json
import shutil

import pytest
from plain_search import make_rag

from selfrag_jax import artifacts, cli
from selfrag_jax.answering import generator
from selfrag_jax.base_model.source import make_tokenizer
from selfrag_jax.checkpoints import workdirs
from selfrag_jax.commands import quickstart as flow
from selfrag_jax.commands.command import Command
from selfrag_jax.commands.model_flags import search_changes
from selfrag_jax.commands.task_plans import task_changes
from selfrag_jax.data.generator_examples import GeneratorSource
from selfrag_jax.errors import UserError
from selfrag_jax.evaluation import tasks
from selfrag_jax.huggingface import weights
from selfrag_jax.records import GeneratorExample, Passage
from selfrag_jax.retrieval.retriever import IndexRetriever
from selfrag_jax.text.reflection import MissingReflectionTokens

SMOKE = "--config=tiny:smoke"


def make_workdir(folder, tiny_model, role="generator", steps=(100, 200), train=None, stage="train"):
    """A workdir without weights; unfinished."""
    workdirs.write_architecture(folder, tiny_model.model.config, tiny_model.tokenizer)
    for step in steps:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    config = {"role": role, "train": train or {"steps": 280}}
    (folder / artifacts.STARTED).write_text(json.dumps({"stage": stage, "config": config}))
    return folder


def made_by(folder, stage):
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"stage": stage, "config": {}}))
    return folder


def error_of(capsys, *argv):
    """The one line of a wrong command."""
    assert cli.main(list(argv)) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


# ---- folders that are no generator ---------------------------------------------------------------
def test_a_folder_of_another_kind_is_named_in_one_line(tmp_path, tiny_model, capsys):
    workdir = make_workdir(tmp_path / "generator", tiny_model)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    begun = made_by(tmp_path / "begun", "train")
    (begun / "manifest.json").rename(begun / artifacts.STARTED)
    critic = make_workdir(tmp_path / "critic", tiny_model, "critic")
    without = make_workdir(tmp_path / "without", tiny_model, steps=())
    converted = make_workdir(tmp_path / "converted", tiny_model, None, stage="convert")
    expected = {
        made_by(tmp_path / "E", "embed"): "was made by `selfrag embed` and holds embeddings;",
        made_by(tmp_path / "I", "index"): "holds an index, which goes to --index; expected a gen",
        made_by(tmp_path / "P", "prepare"): "was made by `selfrag prepare` and holds instructions",
        made_by(tmp_path / "S", "sweep"): "was made by `selfrag sweep` and holds no model",
        tmp_path: f"is the folder of a quickstart; give --workdir={tmp_path}",
        tmp_path / "encoder": "is an encoder of texts (bert), which --encoder of `selfrag index`",
        tmp_path / "empty": "no model here; expected a generator: a training workdir,",
        tmp_path / "file": "is a file; expected the folder of a model",
        workdir / "checkpoints": f"is a part of a training workdir; give all of it, {workdir}",
        workdir / "checkpoints" / "200": f"give all of it, {workdir}",
        critic: "is a critic; expected a generator, which `selfrag train --role=generator` makes",
        without: f"has not saved a checkpoint yet, so there is no model to answer with; the same "
        f"`selfrag train --workdir={without}` continues it",
        begun: f"the same `selfrag train --workdir={begun}` continues it",
        converted: "is unfinished; run `selfrag convert` again, which resumes it",
    }
    for folder, message in expected.items():
        line = error_of(capsys, "ask", f"--model={folder}", "Who?")
        assert line.startswith(f"selfrag ask: {folder}: ") and message in line, line
    assert generator.find_generator(workdir) == workdir


def test_a_corpus_in_place_of_an_index_is_to_be_indexed_first(tmp_path):
    (tmp_path / "note.txt").write_text("Alder lies by the Tame.")
    with pytest.raises(UserError, match=f"is no index; `selfrag index --passages={tmp_path} --out"):
        IndexRetriever(tmp_path)
    (tmp_path / artifacts.STARTED).write_text('{"stage": "index"}')
    with pytest.raises(UserError, match="is unfinished; run `selfrag index` first"):
        IndexRetriever(tmp_path)


def test_a_base_without_reflection_tokens_is_to_be_trained_first(tmp_path, tiny_model, capsys):
    """For every command that needs them; a critic is named as such. Nothing is written."""
    plain = make_tokenizer(4000)
    weights.save_folder(tmp_path / "base", tiny_model.model.config, tiny_model.params, plain)
    (tmp_path / "q.jsonl").write_text('{"id": "0", "question": "Who?", "answers": ["I"]}\n')
    model, files = f"--model={tmp_path}/base", f"--input={tmp_path}/q.jsonl"
    out = f"--out={tmp_path}/out"
    for argv in (
        ["ask", model, "--mode=no_retrieval", "Who?"],
        ["answer", model, files, out, "--mode=no_retrieval"],
        ["evaluate", "--task=popqa", model, files, out, "--mode=no_retrieval"],
    ):
        assert cli.main(argv) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"{tmp_path}/base: is a base model without reflection tokens; run `selfrag" in line
        # Without --config, which depends on the base's size.
        assert f"selfrag train --role=generator --config.base={tmp_path}/base --data" in line
    line = error_of(capsys, "label", f"--critic={tmp_path}/base", files, out)
    assert "expected a critic made by `selfrag train`" in line and "--role=critic" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "q.jsonl"]


def test_a_tokenizer_that_lost_some_reflection_tokens_is_no_base(tmp_path, tiny_model):
    tiny_model.tokenizer.save(tmp_path)
    row = json.loads((tmp_path / "tokenizer.json").read_text())
    row["added_tokens"] = [t for t in row["added_tokens"] if t["content"] != "[Relevant]"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(row))
    with pytest.raises(MissingReflectionTokens, match=r"lacks 1 reflection token.*\[Relevant\]"):
        generator.require_reflection_tokens(tmp_path)


# ---- a training that is unfinished ---------------------------------------------------------------
def test_the_notice_of_an_unfinished_training_says_how_far_it_is(tmp_path, tiny_model):
    folder = make_workdir(tmp_path / "g", tiny_model)
    notice = generator.unfinished_notice(folder)
    assert "its last checkpoint answers, step 200 of 280" in notice
    assert f"the same `selfrag train --workdir={folder}` finishes it" in notice
    epochs = make_workdir(tmp_path / "e", tiny_model, train={"steps": None, "epochs": 3})
    assert "step 200 (of 3 epochs);" in generator.unfinished_notice(epochs)
    (tmp_path / "W" / "world").mkdir(parents=True)
    quickstart = make_workdir(tmp_path / "W" / "generator", tiny_model)
    assert f"`selfrag quickstart --workdir={tmp_path}/W` finishes it" in (
        generator.unfinished_notice(quickstart)
    )
    (folder / "manifest.json").write_text("{}")
    assert generator.unfinished_notice(folder) == ""


def test_a_baseline_says_that_it_is_no_self_rag(tmp_path, tiny_model, capsys):
    """By what its training recorded; older trainings recorded nothing."""
    folder = make_workdir(tmp_path / "rag", tiny_model)
    noticed = []
    for counts in ({}, {"reflection_tokens": True}, {"reflection_tokens": False}):
        (folder / "manifest.json").write_text(json.dumps({"stage": "train", "counts": counts}))
        noticed.append(bool(generator.baseline_notice(folder)))
    assert noticed == [False, False, True]
    generator.print_notices(folder, tiny_model.tokenizer, None)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {folder}: is no Self-RAG: its training data had no reflection")
    assert f"`selfrag evaluate --systems=baselines --plain_model={folder}`" in line


def test_data_with_and_without_reflection_tokens_are_told_apart(tmp_path, tiny_model):
    def source(*outputs):
        rows = [GeneratorExample(str(i), "q", output) for i, output in enumerate(outputs)]
        return GeneratorSource(rows, tiny_model.tokenizer, {})

    passage = "<paragraph>Otters\n\nThey swim.</paragraph>They swim."
    assert not source("They swim.", passage).has_reflection_tokens()
    for token in ("[No Retrieval]", "[Relevant]", "[Fully supported]", "[Utility:5]"):
        assert source("They swim.", passage + token).has_reflection_tokens()


def test_an_unfinished_training_is_identified_by_its_checkpoints(tmp_path, tiny_model):
    """What else changes in its folder while it goes on does not make other answers."""
    folder = make_workdir(tmp_path / "g", tiny_model)
    for step in ("100", "200"):
        (folder / "checkpoints" / step / "data").mkdir()
        (folder / "checkpoints" / step / "data" / "metadata").write_text(step)
    first = artifacts.fingerprint(folder)
    (folder / "logs").mkdir()
    (folder / "logs" / "events").write_text("more")
    assert artifacts.fingerprint(folder) == first
    (folder / "checkpoints" / "200" / "data" / "metadata").write_text("other weights")
    assert artifacts.fingerprint(folder) != first


@pytest.mark.slow
def test_an_unfinished_quickstart_answers_from_its_last_checkpoint(quickstart, tmp_path, capsys):
    """The same answers as the finished one's; the notice stands in every command."""
    finished, _ = quickstart
    for name in ("generator", "index", "world"):
        shutil.copytree(finished / name, tmp_path / name)
    (tmp_path / "generator" / "manifest.json").unlink()
    last = workdirs.saved_steps(tmp_path / "generator")[-1]
    question = flow.sample_question(finished)
    rows = []
    for workdir in (finished, tmp_path):
        assert cli.main(["ask", f"--workdir={workdir}", SMOKE, "--json", question]) == 0
        out, err = capsys.readouterr()
        rows.append(json.loads(out))
        assert (f"step {last} of {last}; `selfrag quickstart" in err) == (workdir == tmp_path)
    assert rows[0] == rows[1]


# ---- a model of the synthetic world --------------------------------------------------------------
def test_a_model_of_the_world_says_so_when_it_meets_another_corpus(small_world, talkative):
    tokenizer = talkative.tokenizer
    assert generator.corpus_notice(tokenizer, small_world.passages, "W/generator") == ""
    for text in (
        "Marie Curie won the Nobel prize in physics and died in Savoy.",
        "玛丽·居里是物理学家",
        "Пушкин родился в Москве",
    ):
        notice = generator.corpus_notice(tokenizer, [Passage("0", "", text)], "W/generator")
        assert notice.startswith("W/generator: this generator knows only the quickstart's small w")
        assert "docs/your_own_model.md" in notice
    assert generator.corpus_notice(tokenizer, [], "W/generator") == ""


def test_its_notice_is_printed_for_an_index_and_for_passages_of_a_file(
    quickstart, tmp_path, capsys
):
    workdir, _ = quickstart
    (tmp_path / "corpus.tsv").write_text(
        "id\ttext\ttitle\n1\tMarie Curie won the Nobel prize in physics.\tMarie Curie\n"
    )
    corpus, index = f"--passages={tmp_path}/corpus.tsv", tmp_path / "index"
    assert cli.main(["index", corpus, f"--out={index}", SMOKE]) == 0
    model = f"--model={workdir}/generator"
    ctxs = [{"title": "Marie Curie", "text": "Marie Curie won the Nobel prize in physics."}]
    row = {"id": "0", "question": "Who is Marie Curie?", "ctxs": ctxs}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    files = f"--input={tmp_path}/q.jsonl", f"--out={tmp_path}/a.jsonl"
    for argv, is_said in (
        (["ask", model, f"--index={index}", SMOKE, "Who is Marie Curie?"], True),
        (["ask", model, f"--index={workdir}/index", SMOKE, "Who is Marie Curie?"], False),
        (["answer", model, *files, SMOKE], True),
    ):
        capsys.readouterr()
        assert cli.main(argv) == 0
        said = capsys.readouterr().err.count("knows only the quickstart's small world")
        assert said == is_said, argv


# ---- settings of the released scorer -------------------------------------------------------------
RELEASED = (
    (["--scorer=released"], 1.0),  # the scripts' own
    (["--scorer=released", "--w_use=0.25"], 0.25),
    (["--scorer=released", "--config.answer.search.weights.w_use=0.25"], 0.25),
    (["--config.answer.search.scorer=released"], 1.0),
    (["--config.answer.search.scorer=released", "--w_use=0.25"], 0.25),
    (
        ["--config.answer.search.scorer=released", "--config.answer.search.weights.w_use=0.25"],
        0.25,
    ),
    (["--scorer=released", "--w_use=0.25", "--config.answer.search.weights.w_use=3"], 0.25),
)


@pytest.mark.parametrize(("arguments", "w_use"), RELEASED)
def test_weights_that_were_asked_for_count_with_the_released_scorer(talkative, arguments, w_use):
    """Through ask and answer, a task of evaluate, and Python."""
    for stage in ("ask", "answer"):
        command: Command = cli.load_command(stage)
        needed = [f"--{f.name}=x" for f in command.flags if f.required]
        values, _ = cli.parse(command, stage, [*needed, *arguments, "--max_depth=1"])
        rag = make_rag(talkative, accumulate="mean")
        config = rag.search_config(search_changes(values))
        assert config.scorer == "released" and config.weights.w_use == w_use
    command = cli.load_command("evaluate")
    values, _ = cli.parse(command, "evaluate", ["--task=popqa", *arguments])
    config = make_rag(talkative).search_config(task_changes(tasks.load("popqa"), values))
    assert config.scorer == "released" and config.weights.w_use == w_use
    changes = dict(scorer="released", max_depth=1) | ({} if w_use == 1 else {"w_use": w_use})
    assert make_rag(talkative).search_config(changes).weights.w_use == w_use
