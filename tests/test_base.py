"""The shipped base model: its scores are those of its record, and the command that makes one works in reduced form."""

import json

import pytest

from selfrag_jax import config
from selfrag_jax.models import checkpoints
from selfrag_jax.records import BadInput
from selfrag_jax.training.stage import embedded_base
from selfrag_jax.world import base, gate, language, make_base


def test_the_shipped_model_does_what_its_record_says():
    loaded = checkpoints.load(embedded_base())
    recorded = json.loads((embedded_base() / make_base.RECORD).read_text())["scores"]
    scores = gate.measure(loaded, seed=11, n=300)  # other cases than those of the record
    assert {k: (v, recorded[k]) for k, v in scores.items() if v < recorded[k] - 0.05} == {}


def test_base_documents_hold_no_world_word(tokenizer):
    families = tuple((name, 1.0) for name in base._FAMILIES)
    source = base.BaseSource(base.BaseDataConfig(0, "base", families, 1.0, 1.0, 1, 2), tokenizer)
    forbidden = {w for kind in language.MORPHEMES for w in language.words(kind, "world")}
    for i in range(300):
        text = " ".join(p for parts, _ in source.segments(i) for p in parts if isinstance(p, str))
        assert not forbidden & set(text.replace(".", " ").replace(",", " ").replace("?", " ").split())


@pytest.mark.slow
def test_the_command_still_works(tmp_path):
    scores = make_base.make(config.load("base:smoke"), tmp_path / "w", tmp_path / "out")
    assert set(scores) == set(gate.SKILLS)
    assert checkpoints.load(tmp_path / "out").model.config.embed_dim == 128
    record = json.loads((tmp_path / "out" / make_base.RECORD).read_text())
    assert record["scores"] == scores and record["command"].startswith("selfrag base")


@pytest.mark.slow
def test_a_model_below_the_gate_is_not_written(tmp_path):
    c = config.override(config.load("base:smoke"), ["gate.minimum=0.99"])
    with pytest.raises(BadInput, match="did not pass its gate"):
        make_base.make(c, tmp_path / "w", tmp_path / "out")
    assert not (tmp_path / "out").exists()
