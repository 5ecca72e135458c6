"""For the tests of decoding: the search as a plain loop, and small things to search."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from selfrag_jax.answering.config import DEFAULT
from selfrag_jax.answering.selfrag import SelfRAG
from selfrag_jax.records import Passage
from selfrag_jax.search import scoring
from selfrag_jax.search.config import SearchConfig
from selfrag_jax.text import prompts, reflection
from selfrag_jax.text.tokenizer import Control


class PlainSearch:
    """The same search, one branch at a time, every token by a full forward; no cache, no batch, no sharing."""

    LENGTH = 160

    def __init__(self, loaded, config: SearchConfig):
        self.loaded, self.c, self.t = loaded, config, loaded.tokenizer
        self.r = loaded.tokenizer.reflection_ids()

        def forward(params, tokens, last):
            positions = jnp.arange(self.LENGTH)[None]
            mask = jnp.ones((1, self.LENGTH), jnp.int32)
            hidden, _ = loaded.model.hidden(params, tokens, positions, mask)
            return loaded.model.logits(params, hidden[0, last])

        self.forward = jax.jit(forward)

    def logits(self, ids):
        tokens = np.zeros((1, self.LENGTH), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(self.forward(self.loaded.params, tokens, len(ids) - 1)).astype(np.float64)

    def group(self, logits, ids):
        e = np.exp(logits[list(ids)] - logits[list(ids)].max())
        return e / e.sum()

    def segment(self, ids, has_passage, parent_isrel):
        text, generated, log_probs = list(ids), [], []
        isrel = issup = isuse = retrieve = None
        finished = False
        for step in range(self.c.max_new_tokens):
            logits = self.logits(text)
            if self.t.pad_id != self.t.eos_id:
                logits[self.t.pad_id] = -1e30
            token = int(logits.argmax())
            if step == 0:
                isrel = self.group(logits, self.r.isrel)
            ends = token in self.r.retrieve
            last = token == self.t.eos_id or token in self.r.isuse
            cut = step == self.c.max_new_tokens - 1
            if token in self.r.issup or ((ends or last or cut) and issup is None):
                issup = self.group(logits, self.r.issup)
            if ends or last or cut:
                isuse, retrieve = (
                    self.group(logits, self.r.isuse),
                    self.group(logits, self.r.retrieve),
                )
            if ends:
                break
            generated.append(token)
            text.append(token)
            if token not in self.r.all and token != self.t.eos_id:
                log_probs.append(
                    logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
                )
            if last:
                finished = True
                break
        isrel = parent_isrel if parent_isrel is not None else isrel
        p = np.exp(sum(log_probs) / len(log_probs)) if log_probs else 0.0
        score = float(
            scoring.segment_score(p, isrel, issup, isuse, float(has_passage), self.c.weights)
        )
        return dict(
            tokens=tuple(generated),
            ids=text,
            isrel=isrel,
            retrieve=retrieve,
            score=score,
            finished=finished,
        )

    def run(self, prompt, passages):
        beams = [
            dict(
                ids=prompt,
                retrieve=self.group(self.logits(prompt), self.r.retrieve),
                total=None,
                path=(),
                finished=False,
                evidence=None,
                isrel=None,
                node=-1,
            )
        ]
        self.tree = []
        for _ in range(self.c.max_depth):
            if all(b["finished"] for b in beams):
                break
            candidates = [b for b in beams if b["finished"]]
            for b in beams:
                if not b["finished"]:
                    candidates += self.extend(b, passages)
            length = (lambda b: len(b["path"])) if self.c.accumulate == "mean" else (lambda b: 1)
            allowed = [b for b in candidates if b["allowed"]] or candidates
            beams = sorted(allowed, key=lambda b: -b["total"] / length(b))[: self.c.beam_width]
        return beams

    def extend(self, b, passages):
        p = b["retrieve"]
        rate = scoring.p_retrieve(p, self.c.normalise)
        wanted = p.argmax() == 1 if self.c.threshold is None else rate > self.c.threshold
        if self.c.mode == "no_retrieval":
            kind = reflection.NO_RETRIEVAL
        elif (
            self.c.mode != "always_retrieve"
            and b["path"]
            and b["used"]
            and self.c.keep_passages
            and p.argmax() == 2
        ):
            kind = reflection.CONTINUE
        else:
            kind = (
                reflection.RETRIEVAL
                if self.c.mode == "always_retrieve" or wanted
                else reflection.NO_RETRIEVAL
            )
        found = passages[: self.c.ndocs] if kind == reflection.RETRIEVAL else [None]
        for passage in found:
            parts = [Control(kind), *(prompts.passage(passage) if passage else [])]
            evidence = b["evidence"] if kind == reflection.CONTINUE else passage
            inherited = b["isrel"] if kind == reflection.CONTINUE else None
            s = self.segment(b["ids"] + self.t.encode(parts), evidence is not None, inherited)
            product = self.c.accumulate == "product"
            total = max(s["score"], 0.0) if product else s["score"]
            if b["total"] is not None:
                total = b["total"] * total if product else b["total"] + total
            if not self.c.keep_passages:
                fed = [] if passage else [self.t.id(reflection.NO_RETRIEVAL)]
                s["ids"] = [*b["ids"], *fed, *s["tokens"]]
            self.tree.append((b["node"], s["tokens"], s["score"]))
            unwanted = {self.t.id(t) for t in self.c.constraints}
            yield s | dict(
                total=total, path=(*b["path"], s["tokens"]), evidence=evidence, used=kind != reflection.NO_RETRIEVAL,
                node=len(self.tree) - 1, allowed=not unwanted & set(s["tokens"]),
            )  # fmt: skip


def make_passages(rng, tokenizer, n):
    words = [
        "Quenport",
        "ropemaker",
        "Mara Tellock",
        "lives in",
        "studied",
        "the",
        "starlore",
        "Lisford",
    ]
    return [
        Passage(str(i), str(rng.choice(words)), " ".join(rng.choice(words, rng.integers(1, 7))))
        for i in range(n)
    ]


def make_rag(loaded, **changes):
    search = replace(DEFAULT.search, max_new_tokens=6, length_bucket=16, max_depth=2, **changes)
    return SelfRAG(loaded, None, replace(DEFAULT, search=search, batch=4, max_length=64))
