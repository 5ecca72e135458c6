"""Installs the package, the `selfrag` command, and the configs as selfrag_jax.configs."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="selfrag-jax",
    version="0.1.0",
    description="Self-RAG on JAX, Flax and TPUs: retrieve, generate and critique through self-reflection",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[*find_packages(include=["selfrag_jax", "selfrag_jax.*"]), "selfrag_jax.configs"],
    package_dir={"selfrag_jax": "selfrag_jax", "selfrag_jax.configs": "configs"},
    package_data={"selfrag_jax": ["base_model/weights/*"]},
    entry_points={"console_scripts": ["selfrag=selfrag_jax.cli:main"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12,<0.13",
        "scann>=1.4.2",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "safetensors>=0.6",
        "huggingface-hub>=0.34",
        "ml-dtypes>=0.5",
        "ml-collections>=1.1",
        "absl-py>=2.1",
        "numpy>=2.0",
        "scipy>=1.13",
        "pysbd>=0.3.4",
        "rich>=14",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "gpu": ["jax[cuda13]>=0.10,<0.12"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff==0.15.1",
            "torch>=2.8",
            "transformers>=5",
            "jax[tpu,cuda13]>=0.10,<0.12",
        ],
    },
)
