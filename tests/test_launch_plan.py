"""launch/plan.py: its arithmetic by hand, the estimate against the compiler, and its errors."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from selfrag_jax import config as configs

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
import plan
from cloud import command_line, costs, tables

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """(exit code, stdout, stderr) of launch/plan.py, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def call(*flags):
        code = command_line.main("launch/plan.py", plan.COMMANDS, list(flags))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def compiled(topology, gb, hbm=16e9, fits=True, **fields):
    """What `selfrag compile` writes: a step of 2 s and 1,000,000 tokens."""
    return {
        "config": "generator_13b",
        "topology": topology,
        "memory_per_chip": {"total": gb * 1e9, "hbm": hbm},
        "roofline_seconds": {"step": 2.0},
        "roofline_mfu": 0.75,
        "tokens_per_step": 1_000_000,
        "fits": fits,
    } | fields


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that answers from `results`, and counts what it was asked."""
    results, asked = {}, []

    def compile_(command, **_):
        flags = dict(a.split("=", 1) for a in command if a.startswith("--"))
        asked.append(flags["--topology"])
        result = results[flags["--topology"]]
        if isinstance(result, str):
            return SimpleNamespace(returncode=2, stderr=f"selfrag compile: {result}\n")
        Path(flags["--out"]).write_text(json.dumps(result))
        return SimpleNamespace(returncode=0 if result["fits"] else 1, stderr="")

    monkeypatch.setattr(subprocess, "run", compile_)
    return SimpleNamespace(results=results, asked=asked)


def test_hours_and_dollars_by_hand(run, compiler, tmp_path):
    """3 epochs of 128,000 rows are 3,000 updates of 2 s: 1.67 h at best, 3.33 h at half speed."""
    compiler.results |= {
        "v5e:4x4": compiled("v5e:4x4", 18.5, fits=False),
        "v5e:4x8": compiled("v5e:4x8", 12.0),
        "v5e:8x8": compiled("v5e:8x8", 8.5),
    }
    flags = ["--config=generator_13b", "--chips=v5e", "--rows=128000", "--share=0.5"]
    code, out, err = run(*flags, "--budget=100", f"--out={tmp_path / 'plan.json'}")
    assert code == 0, err
    # What does not even hold the parameters is not compiled.
    assert compiler.asked == ["v5e:4x4", "v5e:4x8", "v5e:8x8"]
    assert re.search(r"v5e:2x4 +does not fit: a chip has 16.0 GB, and lacks 10.7 GB at least", out)
    assert re.search(r"v5e:4x4 +does not fit: a chip has 16.0 GB, and lacks 2.5 GB", out)
    hours = 3000 * 2 / 3600 / 0.5
    on_demand, spot = hours * 32 * 1.20, hours * 32 * 0.245
    row = re.search(r"^v5e:4x8 .*$", out, re.MULTILINE).group(0).split()
    assert row == [
        "v5e:4x8", "32", "8", "12.0", "of", "16", "4.00", "s", "250,000", "1.7", "3.3",
        f"${on_demand:.0f}", f"${spot:.0f}", "spot", "only",
    ]  # fmt: skip
    assert "3 epochs of 128,000 rows, 3,000 updates" in out and "MFU of 38% at most" in out
    assert f"cheapest: v5e:4x8, spot, ${spot:.0f}" in out
    assert "--type=v5litepod-32 --zone=us-central1-a --spot" in out
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [w["fits"] for w in written] == [False] * 4 + [True] * 2
    assert written[-1]["on_demand_dollars"] == pytest.approx(hours * 64 * 1.20)

    assert run(*flags)[0] == 0 and len(compiler.asked) == 3  # from the cache
    c = configs.load("generator_13b")
    other = configs.override(configs.load("generator_13b"), ["generator.remat=dots"])
    assert costs._identity(c, "v5e:4x4") != costs._identity(other, "v5e:4x4")  # another program


def test_own_prices_and_a_budget_that_is_too_small(run, compiler):
    compiler.results["h100:4"] = compiled("h100:4", 70.0, 60e9, fits=False)
    compiler.results["h100:8"] = compiled("h100:8", 30.0, 60e9)
    flags = ["--config=generator_13b", "--chips=h100", "--rows=128000", "--share=1"]
    code, out, _ = run(*flags)
    assert code == 0 and "no list price: give --price=" in out
    code, out, _ = run(*flags, "--price=h100=3", "--budget=50")
    assert code == 0 and "$40" in out  # 1.67 h of 8 cards
    code, _, err = run(*flags, "--price=h100=3", "--budget=30")
    assert code == 1 and "nothing is within $30: the cheapest is h100:8 for $40" in err
    code, out, _ = run(*flags, "--price=h100=3", "--spot_price=h100=1.5", "--budget=30")
    assert code == 0 and "spot only" in out


def test_what_the_compiler_refuses_is_in_its_row(run, compiler):
    compiler.results |= {
        "v5e:4x4": "mesh (1, 16, 1) cannot be laid over this slice",
        "v5e:4x8": {
            "config": "generator_13b", "topology": "v5e:4x8", "fits": False, "compiler": "used",
            "memory_per_chip": {"hbm": 16e9, "total": 17.5e9},
        },
    }  # fmt: skip
    flags = ["--config=generator_13b", "--chips=v5e", "--max_chips=32"]
    code, out, err = run(*flags)
    assert code == 1 and "no slice fits" in err
    assert re.search(r"v5e:4x4 +does not fit: mesh \(1, 16, 1\) cannot be laid", out)
    assert re.search(r"v5e:4x8 +does not fit: a chip has 16.0 GB, and lacks 1.5 GB", out)
    compiler.results["v5e:4x4"] = "the TPU compiler is missing: pip install 'selfrag-jax[tpu]'"
    code, _, err = run(*flags)
    assert code == 1 and "pip install 'selfrag-jax[tpu]'" in err


@pytest.mark.parametrize(
    ("name", "topology"),
    [("generator_13b", "v5e:8x8"), ("lora_7b", "v6e:2x2"), ("critic_7b", "v5e:8x8")],
)
def test_the_estimate_is_below_what_the_compiler_found(name, topology):
    """The compiler's figures are those of configs/README.md."""
    readme = (ROOT / "configs" / "README.md").read_text()
    row = rf"\| {name} \| {topology} \| [^|]*\| ([\d.]+) \+ ([\d.]+) of [^|]*\|[^|]*\| ([\d.]+) s"
    arguments, temporaries, seconds = map(float, re.search(row, readme).groups())
    fit = costs.estimate(configs.load(name), topology)
    assert fit.fits
    assert 0.95 * arguments < fit.memory / 1e9 < arguments + temporaries
    assert fit.step_seconds == pytest.approx(seconds, abs=0.006)


def test_the_estimate_says_that_it_is_one(run):
    code, out, _ = run("--config=lora_7b", "--chips=v6e", "--estimate", "--max_chips=4")
    assert code == 0 and "memory and times are lower bounds" in out
    assert re.search(r"v6e:2x2 .*>=[\d.]+ of 32 ", out)
    assert "compile before you rent it" in out


def test_packed_rows_need_the_length_of_an_example():
    section = SimpleNamespace(steps=None, epochs=2.0, rows=10, length=1000, packed=True)
    values = {"epochs": None, "rows": 1000, "tokens": None}
    updates, counted = plan._num_updates(section, values)
    assert updates == 200 and "give --tokens" in counted
    assert plan._num_updates(section, values | {"tokens": 250.0})[0] == 50
    section.steps = 77
    assert plan._num_updates(section, values) == (77, "77 updates")


def test_prices_have_a_chip_with_known_rates():
    assert set(tables.PRICES) <= set(costs._CHIPS) & set(tables.GENERATIONS)
    assert all(price.spot < price.on_demand for price in tables.PRICES.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=generator_13"], "did you mean 'generator_13b'"),
        (["--config=short_form"], "no architecture to plan for; critic_7b"),
        (["--chips=v5"], "--chips=v5: did you mean v5p? known are a100"),
        (["--chips=tpu7x"], "tpu7x: is not planned here; launch/gke.py runs it"),
        (["--price=v5e"], "expected dollars for a chip and hour"),
        (["--price=v4=2"], "v4 is not among --chips=v5e,v6e"),
        (["--chips=h100", "--spot_price=h100=1"], "give --price=h100"),
        (["--share=1.5"], "nothing is faster than the roofline"),
        (["--budget=0"], "--budget=0.0: must be above 0"),
        (["--bugdet=5"], "did you mean --budget?"),
    ],
)
def test_wrong_flags_are_user_errors(run, flags, message):
    code, _, err = run("--estimate", *flags)
    assert code == 2 and message in err and err.count("\n") == 1


SMALL = """
from selfrag_jax import config
from selfrag_jax.models.architectures import ARCHITECTURES

ARCHITECTURES["small"] = dict(
    vocab_size=992, head_dim=128, max_length=512, rope_theta=1e4, norm_eps=1e-5, num_layers=2,
    embed_dim=256, mlp_dim=512, num_heads=4, num_kv_heads=4,
)

def get_config():
    c = config.load("generator_7b")
    c.name = c.architecture = "small"
    c.generator.length = c.generator.loss_chunk = 256
    return c
"""


@pytest.mark.slow
def test_a_small_training_is_planned_with_the_real_compiler(run, tmp_path):
    file = tmp_path / "small.py"
    file.write_text(SMALL)
    flags = [f"--config={file}", "--chips=v5e", "--max_chips=4", "--fitting=1"]
    code, out, err = run(*flags)
    assert code == 0, err
    assert "compiling small for v5e:1x1" in err
    assert re.search(r"v5e:1x1 +1 +1 +[\d.]+ of 16 ", out) and "cheapest: v5e:1x1, spot" in out
    code, again, err = run(*flags)
    assert again == out and "compiling" not in err
