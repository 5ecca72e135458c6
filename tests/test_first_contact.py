"""Wrong uses on first contact, by somebody who has read only the documents.

Each ends with one line that names what is at fault and helps, before anything is written.
"""

import gzip
import json
import shutil

import pytest

from selfrag_jax import cli
from selfrag_jax.huggingface import weights

ROW = '{"id": "1", "question": "Who wrote Emma?", "answers": ["Jane Austen"]}\n'
GENERATOR = json.dumps({"instruction": "Where?", "output": "[No Retrieval]There.[Utility:5]"})
CRITIC = json.dumps({"task": "retrieve", "instruction": "Where?", "output": "[Retrieval]"})
INSTRUCTION = json.dumps({"id": "a", "instruction": "Where?", "output": "There."})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 538090408\n"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "/home/alice/llama", "r": 8}
FILES = {
    "q.jsonl": ROW,
    "gen.jsonl": GENERATOR + "\n",
    "critic.jsonl": CRITIC + "\n",
    "instr.jsonl": INSTRUCTION + "\n",
    "corpus.tsv": "id\ttext\ttitle\n1\tAlder lies by the Tame.\tAlder\n",
    "headless.tsv": "1\tAlder lies by the Tame.\tAlder\n",
    "twice.tsv": "id\ttext\ttitle\n1\tAlder lies.\tA\n1\tBirch lies.\tB\n",
    "empty.jsonl": "",
    "plain.jsonl.gz": ROW,
    "packed.jsonl": gzip.compress(ROW.encode()),
    "cut.jsonl.gz": gzip.compress((GENERATOR + "\n").encode() * 2000)[:-20],
    "utf16.jsonl": ROW.encode("utf-16"),
    "paper.jsonl": b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n",
    "table.jsonl": b"PAR1" + bytes(40),
    "pointer.jsonl": POINTER,
    "missing.jsonl": '{"question": NaN}\n',
    "old.py": "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n",
    "documents/notes.txt": "Otters live in rivers.",
    "adapter/adapter_config.json": json.dumps(ADAPTER),
    "adapter/adapter_model.safetensors": "",
}


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A folder with small files of all kinds, a model and damaged ones, and an index."""
    here = tmp_path_factory.mktemp("first contact")
    for name, content in FILES.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    parts = tiny_model.model.config, tiny_model.params, tiny_model.tokenizer
    weights.save_folder(here / "model", *parts)
    for name in ("alien", "pointed", "cut", "bin", "gpt2", "narrow", "no_config", "no_tokenizer"):
        shutil.copytree(here / "model", here / name)
    (here / "alien/tokenizer.json").write_text(
        (here / "alien/tokenizer.json").read_text().replace('"<s>"', '"<bos>"')
    )
    (here / "pointed/model.safetensors").write_text(POINTER)
    whole = (here / "model/model.safetensors").read_bytes()
    (here / "cut/model.safetensors").write_bytes(whole[: len(whole) // 2])
    (here / "bin/model.safetensors").unlink()
    (here / "bin/pytorch_model.bin").write_text(POINTER)
    config = json.loads((here / "model/config.json").read_text())
    (here / "gpt2/config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    (here / "narrow/config.json").write_text(json.dumps(config | {"vocab_size": 77}))
    (here / "no_config/config.json").unlink()
    (here / "no_tokenizer/tokenizer.json").unlink()
    shutil.copytree(here / "model", here / "quickstart/generator")
    (here / "quickstart/generator/model.json").write_text("{}")
    index = ["index", f"--passages={here / 'corpus.tsv'}", f"--out={here / 'quickstart/index'}"]
    assert cli.main(index) == 0
    shutil.copytree(here / "quickstart/index", here / "index")
    return here


TRAIN = "train --config=small --workdir=out"
USES = [
    # The command itself.
    ("trian", "unknown command 'trian'; did you mean 'train'?"),
    ("help trian", "did you mean 'train'?"),
    ("--version junk", "--version takes no argument"),
    ("completion tcsh", "bash, zsh, fish"),
    ("ask --modle=model Who?", "did you mean --mode or --model?"),
    ("ask --model --index=index Who?", "--model lacks its value"),
    ("ask --model=model Who? --mode", "Missing value for flag --mode"),
    ("ask --ndocs=2.5 Who?", "--ndocs=2.5: must be a whole number"),
    ("ask --threshold=high Who?", "--threshold=high: must be a number"),
    ("ask --full=yes Who?", "--full=yes: must be true or false"),
    ("ask --seed=-1 Who?", "--seed=-1: must be from 0"),
    ("ask --model=~/no/such/model Who?", "/no/such/model: no such folder"),
    ("doctor --stage=trian", "did you mean 'train'?"),
    # Questions.
    ("ask --model=model", "ask what?"),
    ("ask --model=model q.jsonl", "q.jsonl: is a file; answer the questions in it by"),
    ("ask --model=model Who\udcff?", "the question is no text in utf-8"),
    ("retrieve --index=index --input=missing.jsonl --out=out.jsonl", "found NaN"),
    # Models.
    ("ask --model=quickstart Who?", "--workdir=quickstart"),
    ("ask --workdir=quickstart/generator Who?", "is the workdir of a training"),
    ("ask --workdir=q.jsonl Who?", "q.jsonl: is a file"),
    ("ask --model=index Who?", "which goes to --index"),
    ("ask --model=model --index=quickstart Who?", "give quickstart/index"),
    (
        "ask --model=model --index=model Who?",
        "model: is a model; expected an index",
    ),
    ("ask --model=model --index=q.jsonl Who?", "q.jsonl: is a file"),
    ("ask --model=alien Who?", "has no token '<s>', so it is not the one"),
    ("ask --model=pointed Who?", "git lfs pull"),
    ("ask --model=bin Who?", "git lfs pull"),
    ("ask --model=cut Who?", "is it truncated? Copy or download it again"),
    ("ask --model=gpt2 Who?", "llama and mistral are"),
    ("ask --model=narrow Who?", "they do not belong together"),
    ("ask --model=no_config Who?", "no model here"),
    ("ask --model=no_tokenizer Who?", "copy it from the folder that the model came from"),
    ("ask --model=adapter Who?", "/home/alice/llama: no such folder"),
    ("ask --model=model/model.safetensors Who?", "is a file; expected the folder of a model"),
    ("ask --model=model --mode=no_retrieval --config=old.py Who?", "has no section 'answer'"),
    ("check q.jsonl --model=index", "was made by `selfrag index` and holds no model"),
    ("convert --from=index --to=out --format=orbax", "was made by `selfrag index`"),
    ("convert --from=model --to=q.jsonl/out --format=orbax", "choose another --to"),
    # Training.
    (f"{TRAIN} --config.base=index --role=generator --data=gen.jsonl", "holds no model"),
    (f"{TRAIN} --config.base=model --role=generator --data=critic.jsonl", "this is critic data"),
    (f"{TRAIN} --config.base=model --role=critic --data=gen.jsonl", "missing field 'task'"),
    (f"{TRAIN} --config.base=model --role=generator --data=q.jsonl", "missing field 'instruction'"),
    (f"{TRAIN} --config.base=model --role=generator --data=empty.jsonl", "holds no rows"),
    (f"{TRAIN} --config.base=model --role=generator --data=plain.jsonl.gz", "take .gz off"),
    (f"{TRAIN} --config.base=model --role=generator --data=packed.jsonl", "packed.jsonl.gz"),
    (f"{TRAIN} --config.base=model --role=generator --data=cut.jsonl.gz", "is cut off"),
    (f"{TRAIN} --config.base=model --role=generator --data=utf16.jsonl", "iconv -f UTF-16"),
    (f"{TRAIN} --config.base=model --role=generator --data=paper.jsonl", "is a PDF"),
    (f"{TRAIN} --config.base=model --role=generator --data=table.jsonl", "is a Parquet file"),
    (f"{TRAIN} --config.base=model --role=generator --data=pointer.jsonl", "git lfs pull"),
    (
        f"{TRAIN} --config.generator.rows=0 --role=generator --data=gen.jsonl",
        "config generator: rows=0",
    ),
    (f"{TRAIN} --config.generator.rws=2 --role=generator --data=gen.jsonl", "did you mean 'rows'?"),
    # Outputs where something else is.
    (
        "train --role=generator --data=gen.jsonl --workdir=q.jsonl",
        "`selfrag train` writes a folder",
    ),
    ("train --role=generator --data=gen.jsonl --workdir=quickstart", "is no workdir of a training"),
    ("train --role=generator --data=gen.jsonl --workdir=model", "is no workdir of a training"),
    ("world --out=q.jsonl", "`selfrag world` writes a folder"),
    ("quickstart --workdir=q.jsonl", "`selfrag quickstart` writes a folder"),
    ("quickstart --workdir=index", "was made by 'index'"),
    ("index --passages=corpus.tsv --out=documents", "is not empty"),
    # Corpora.
    ("index --passages=headless.tsv --out=out", "the header lacks text"),
    ("index --passages=twice.tsv --out=out", "id '1' was already used"),
    ("index --passages=q.jsonl --out=out", "missing field 'text'"),
    ("index --passages=paper.jsonl --out=out", "is a PDF"),
    ("index --passages=corpus.tsv --encoder=model --out=out", "model_type='llama'"),
    ("index --passages=corpus.tsv --pooling=cls --out=out", "--pooling: is for encoder models"),
    ("index --passages=corpus.tsv --encoder= --out=out", "--encoder=: expected hashed, minilm"),
    ("index --out=index --add=corpus.tsv", "id '1' is in the index already"),
    # Rows of another kind.
    (
        "answer --model=model --index=index --input=corpus.tsv --out=out",
        "no column is the question",
    ),
    ("answer --model=model --input=q.jsonl --out=documents", "--out is a file"),
    ("label --plain=closed --input=q.jsonl --out=out.jsonl", "missing field 'output'"),
    ("retrieve --index=index --input=q.jsonl --k=0 --out=out.jsonl", "k=0: must be at least 1"),
    ("prepare --dataset=selfrag_generator --manual_dir=q.jsonl --out=out", "no row can be used"),
]


@pytest.mark.parametrize(("use", "remedy"), USES, ids=[use for use, _ in USES])
def test_a_wrong_use_ends_with_one_line(made, use, remedy, monkeypatch, capsys):
    monkeypatch.chdir(made)
    monkeypatch.setattr("sys.stdin", None)
    before = contents(made)
    assert cli.main(use.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("read corpus ")]  # read to its end
    assert len(lines) == 1 and lines[0].startswith("selfrag") and remedy in lines[0], lines
    assert contents(made) == before


def contents(folder):
    """Every file's size, and every folder; the locks of finished artifacts stay."""
    return {p: p.is_file() and p.stat().st_size for p in folder.rglob("*") if p.name != ".lock"}
