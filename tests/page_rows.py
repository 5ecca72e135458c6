"""The rows of a small report: results, and answers whose texts try to leave their place."""

from html.parser import HTMLParser

from selfrag_jax.evaluation import scores

HOSTILE = '</script><!--<script>document.title="owned"</script><img src=x onerror=alert(1)>\u2028&'


def node(number, text, *, chosen=False, parent=-1, support=0.9, passage=HOSTILE):
    return {
        "id": number, "parent": parent, "action": "retrieve" if passage else "no_retrieval",
        "passage": {"id": "7", "title": "Otters", "text": passage} if passage else None,
        "text": text, "p_segment": 0.5, "isrel": [0.1, 0.9],
        "issup": [support, 0.0, 1 - support], "isuse": [0.0, 0.0, 0.1, 0.1, 0.8],
        "score": 2.0 - number, "chosen": chosen, "allowed": True,
    }  # fmt: skip


def answer(number, accuracy, *, system="selfrag_adaptive", retrieved=True, support=0.9):
    text = f"Otter {number} swims. {HOSTILE}"
    passage = HOSTILE if retrieved else ""
    tree = [
        node(0, text, chosen=True, support=support, passage=passage),
        node(1, "No.", passage=passage),
        node(2, "It dives.", chosen=True, parent=0, support=support, passage=passage),
    ]
    cited = [{"id": "7", "title": "Otters", "text": HOSTILE}] if retrieved else []
    citations = [{"segment": 0, "passage": 0, "support": "[Fully supported]"}] if cited else []
    return {
        "id": f"q{number}", "system": system, "task": "popqa", "question": f"Who swims {number}?",
        "answer": f"{text} It dives.", "gold": ["otter", HOSTILE],
        "metrics": {"accuracy": accuracy},
        "popularity": 10 ** (number % 5), "retrieved": retrieved, "p_retrieve": 0.7, "score": 3.0,
        "segments": [{"text": text}, {"text": "It dives."}], "passages": cited,
        "citations": citations, "tree": tree, "notices": [], "error": "",
    }  # fmt: skip


def results():
    return [
        row
        for system, value in (("selfrag_adaptive", 1.0), ("mine <b>", 0.0))
        for row in scores.result_rows(
            system, "popqa", {"accuracy": [value, 1.0] * 9, "retrieval_rate": [0.0, 1.0] * 9}, 0
        )
    ]


def answers():
    """120 answers: 40 wrong, 20 without retrieval, 10 unsupported."""
    return [
        answer(i, float(i % 3 > 0), retrieved=i % 6 != 5, support=0.05 if i % 12 == 1 else 0.9)
        for i in range(120)
    ]


def in_all_modes():
    """300 answers of one segment in each mode: right without retrieval never, with it 2 of 3."""
    found = []
    for system in ("selfrag_always", "selfrag_never", "selfrag_adaptive"):
        for i in range(300):
            right, retrieved = i % 3 > 0, system != "selfrag_never"
            row = answer(i, float(right and retrieved), system=system, retrieved=retrieved)
            found.append(row | {"p_retrieve": i / 400, "tree": row["tree"][:1]})
    return found


PAPER = [{"system": "Self-RAG 7B", "task": "popqa", "metric": "accuracy", "value": 0.549}]


class Parsed(HTMLParser):
    """The elements of a page, the text of its scripts, and whether its tags match."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.scripts = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
