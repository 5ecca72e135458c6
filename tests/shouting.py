"""A model for tests of `selfrag ask` that answers at once, in capitals; run, it is at a prompt."""

import sys
import time
from types import SimpleNamespace

from selfrag_jax import cli
from selfrag_jax.answering.records import Answer, AnswerSegment, failed_answer
from selfrag_jax.commands import ask


class Shouting:
    """What `ask` needs of a SelfRAG."""

    retriever = object()

    def search_config(self, changes):
        return SimpleNamespace(mode="adaptive_retrieval")

    def stream(self, question, **changes):
        asked = question.question
        if "slow" in asked:
            print("thinking", flush=True)
            time.sleep(60)
        if "broken" in asked:
            raise RuntimeError("the device is gone")
        if "lost" in asked:
            yield failed_answer(question, KeyError("index"))
            return
        text = asked.upper() + " INDEED" * (500 if "long" in asked else 1)
        segment = AnswerSegment(text, None, "none", 0.0, {}, {}, {}, 0.0, 0)
        node = dict(
            id=0, parent=-1, chosen=True, passage=None, text=text, isrel=(0, 0), issup=(0, 0, 0),
            isuse=(0,) * 5, p_segment=0, score=0,
        )  # fmt: skip
        yield Answer(question.id, asked, text, (segment,), (), (), False, 0.0, 0.0, (node,))

    def __repr__(self):
        return "Shouting(4 parameters)"


if __name__ == "__main__":
    ask.load_selfrag = lambda values: Shouting()
    sys.exit(cli.main(["ask", "--workdir=W"]))
