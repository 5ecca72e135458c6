"""The algorithm of Self-RAG's released scripts, on torch."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
import transformers
from random_model import TOKENIZER

from selfrag_jax.huggingface.weights import save_folder
from selfrag_jax.models.llama import LlamaConfig
from selfrag_jax.models.params import Params
from selfrag_jax.records import Passage
from selfrag_jax.text.tokenizer import Control


class ReleasedOnTorch:
    """What run_short_form.py and run_long_form_static.py compute.

    transformers takes the place of their generation engine.
    """

    def __init__(self, c: LlamaConfig, params: Params):
        with tempfile.TemporaryDirectory() as folder:
            save_folder(folder, c, params, TOKENIZER, c.dtype)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.eval().to(self.device)
        self.ids = TOKENIZER.reflection_ids()
        self.tokens_read = self.tokens_generated = 0

    def generate(self, prompts: list[list[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Generates greedily, up to the end of text or the limit.

        Returns tokens [B, n] and log-probabilities [n, B, V].
        """
        longest = max(map(len, prompts))
        padded = [[TOKENIZER.pad_id] * (longest - len(p)) + p for p in prompts]
        tokens = torch.tensor(padded, device=self.device)
        padding = torch.tensor([[longest - len(p)] for p in prompts], device=self.device)
        mask = (torch.arange(longest, device=self.device) >= padding).long()
        done = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        self.tokens_read += tokens.numel()
        cache, chosen, log_probs = None, [], []
        with torch.inference_mode():
            for _ in range(limit):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
                out = self.model(
                    tokens,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    logits_to_keep=1,
                )
                cache = out.past_key_values
                log_probs.append(out.logits[:, -1].float().log_softmax(-1))
                tokens = log_probs[-1].argmax(-1, keepdim=True)
                chosen.append(tokens)
                done |= tokens[:, 0] == TOKENIZER.eos_id
                mask = torch.cat([mask, torch.ones_like(tokens)], 1)
                self.tokens_generated += len(prompts)
                if done.all():
                    break
        return torch.cat(chosen, 1).cpu().numpy(), torch.stack(log_probs).float().cpu().numpy()

    def step(
        self, prompt: list[int], passages: list[Passage], limit: int
    ) -> list[tuple[list[int], float]]:
        """Returns for each passage the generated tokens and their score.

        The score is the long form's; it is also the short form's without the sequence score.
        """
        prompts = [
            prompt
            + TOKENIZER.encode(
                [Control("[Retrieval]"), Control("<paragraph>"), p.text, Control("</paragraph>")]
            )
            for p in passages
        ]
        tokens, log_probs = self.generate(prompts, limit)
        out = []
        for i, row in enumerate(tokens):
            relevance = np.exp(log_probs[0, i, list(self.ids.isrel)])
            score = relevance[1] / relevance.sum()
            at = next((j for j, token in enumerate(row) if token in self.ids.issup), None)
            if at is not None:
                support = np.exp(log_probs[at, i, list(self.ids.issup)])
                score += (support[0] + 0.5 * support[1]) / support.sum()
            out.append((list(map(int, row)), float(score)))
        return out

    def answer_short(self, prompt: list[int], passages: list[Passage], limit: int):
        return max(self.step(prompt, passages, limit), key=lambda scored: scored[1])

    def answer_long(
        self, prompt: list[int], passages: list[Passage], limit: int, width: int, steps: int
    ):
        """Searches level by level; a child's text is cut at its first [Retrieval].

        The scripts continue children that generated it. Random weights seldom do, so here every
        child may continue: all steps are taken, as in ours.
        """
        retrieval = TOKENIZER.id("[Retrieval]")
        level: list[tuple[list[int], list[int], float]] = [(prompt, [], 1.0)]
        for _ in range(steps):
            children = []
            for history, text, score in level:
                for row, step_score in self.step(history + text, passages, limit):
                    end = row.index(retrieval) if retrieval in row else len(row)
                    children.append((history + text, row[:end], score * step_score))
            level = sorted(children, key=lambda child: -child[2])[:width]
        return level[0]
