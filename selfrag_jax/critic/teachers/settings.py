"""Settings of the teachers that are language models."""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from selfrag_jax.config import setting
from selfrag_jax.errors import UserError

API_KEY = "OPENAI_API_KEY"
BASE_URL = "OPENAI_BASE_URL"
OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint, and how it is asked."""

    teacher_model: str = setting(
        "the model: its name at the endpoint, or for --teacher=local a folder or hub name",
        default="",
    )
    base_url: str = setting(
        "address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1 (default: "
        "OPENAI_BASE_URL, or OpenAI itself)",
        default="",
    )
    concurrency: int = setting("requests at the same time", default=16)
    temperature: float = 0.0
    max_tokens: int = 300  # of a reply
    structured: bool = True  # ask for JSON by schema, where the endpoint can do so
    timeout: float = 120.0  # seconds for a reply
    retries: int = 6  # after rate limits, server errors, timeouts and cut connections
    backoff: float = 1.0  # seconds before the first retry, doubled for each further one
    max_backoff: float = 60.0
    poll: float = 60.0  # seconds between two looks at a batch

    def __post_init__(self):
        for name in ("concurrency", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("timeout", "poll"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: must be above 0")
        for name in ("retries", "backoff", "max_backoff", "temperature"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: must not be below 0")

    @property
    def address(self) -> str:
        """The endpoint's URL. Raises UserError if it is none."""
        url = self.base_url or os.environ.get(BASE_URL) or OPENAI
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is none, a bracket too many
            good = False
        if not good:
            raise UserError(f"--base_url={url}: expected something like http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            plain = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
            raise UserError(f"--base_url: give {plain} alone, and a key in {API_KEY}")
        return url.rstrip("/")

    def api_key(self) -> str:
        """The key, from the environment.

        Raises UserError if OpenAI is asked without one, and for a key that no request can carry.
        """
        key = os.environ.get(API_KEY, "").strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"{API_KEY}: holds a space, a line break or letters that no key has")
        if not key and self.address == OPENAI:
            raise UserError(
                f"{API_KEY} is not set; export the key, or give --base_url for an endpoint of "
                "your own"
            )
        return key or "none"  # servers of one's own mostly want no key, the library wants a text


@dataclass(frozen=True)
class LocalConfig:
    """How a model is asked that runs here."""

    batch: int = 8  # prompts at once
    length_bucket: int = 128  # prompts are padded to a multiple of it
    brief: bool = False  # of a critic: the prompt's wording, as it was trained

    def __post_init__(self):
        for name in ("batch", "length_bucket"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
