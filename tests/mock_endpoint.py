"""A fake OpenAI-compatible endpoint on loopback: injects faults, and counts requests."""

import hashlib
import json
import re
import select
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from selfrag_jax.text import reflection

KEY = "sk-secret-of-the-tests"
ANOTHER_GROUP = {"retrieve": "[Relevant]", "isrel": "[Retrieval]", "issup": "[Relevant]"}


def prompt_of(body):
    """The user's first message, without the form of the reply, which differs by mode."""
    return re.split(r"\n\nReply (?:in|as)", body["messages"][0]["content"])[0]


def labels_of(prompt):
    return [line for line in prompt.rsplit("labels:", 1)[1].split("\n") if line.startswith("[")]


def label_of(prompt):
    """The label that this endpoint gives, a function of the prompt alone."""
    labels = labels_of(prompt)
    return labels[hashlib.sha256(prompt.encode()).digest()[0] % len(labels)]


def completion(body, fault=""):
    """A completion of a body: right, or wrong in what it says."""
    prompt = prompt_of(body)
    labels, label = labels_of(prompt), label_of(prompt)
    foreign = next(t for group in reflection.GROUPS.values() for t in group if t not in labels)
    said = {
        "no label": "I would rather not say.",
        "two labels": f"Label: {labels[0]} or {labels[1]}",
        "another group": f"Label: {foreign}",
    }
    text = said.get(fault)
    if text is None and "response_format" in body:
        text = json.dumps({"explanation": "It is so.", "label": label})
    message = {"role": "assistant", "content": text or f"Explanation: It is so.\nLabel: {label}"}
    usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": 10, "total_tokens": 0}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    if fault == "no choices":
        choices = None
    out = {"id": "c", "object": "chat.completion", "created": 0, "model": body["model"]}
    return out | {"choices": choices, "usage": usage}


class MockEndpoint:
    """What the server was asked, and how it is to fail.

    fault: a function of (number of the request, its body) that names a fault or returns "".
    """

    def __init__(self, fault=lambda n, body: "", schema=True, delay=0.0, hang=2.0):
        self.fault, self.schema, self.delay, self.hang = fault, schema, delay, hang
        self.lock = threading.Lock()
        self.requests, self.active, self.most_active = [], 0, 0
        self.faults, self.answered = Counter(), Counter()  # by name; by prompt: good replies
        self.times = []
        self.files, self.batches = {}, {}
        self.batch_fault = lambda batch, n, line: ""
        self.batch_status = "completed"
        self.drop_create = 0  # batches that are made, but whose reply is cut off
        self.url = ""

    # ---- single requests ---------------------------------------------------------------------
    def complete(self, handler, body):
        with self.lock:
            n = len(self.requests)
            self.requests.append(body)
            self.times.append(time.monotonic())
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            fault = self.fault(n, body)
            if not self.schema and "response_format" in body:
                fault = "400 format"
            with self.lock:
                self.faults[fault] += 1
            if fault == "hang":
                select.select([handler.connection], [], [], self.hang)  # until the client leaves
            else:
                time.sleep(self.delay)
            with self.lock:
                if not fault:
                    self.answered[prompt_of(body)] += 1
        finally:
            with self.lock:  # before the reply is sent: the client may be quick to ask again
                self.active -= 1
        self._reply(handler, body, fault)

    def _reply(self, handler, body, fault):
        if fault == "cut":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            handler.close_connection = True
        elif fault == "not json":
            handler.reply(200, "<html>busy</html>")
        elif fault == "429":
            handler.reply(429, _error("slow down"), {"Retry-After": "0.2"})
        elif fault == "429 reset":
            limits = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "200ms"}
            handler.reply(429, _error("slow down"), limits)
        elif fault == "429 quota":
            handler.reply(429, _error("You exceeded your current quota, please check your plan"))
        elif fault == "400 format":
            handler.reply(400, _error("response_format: json_schema is not supported here"))
        elif fault[:3].isdigit():
            key = handler.headers.get("Authorization", "")
            handler.reply(int(fault[:3]), _error(f"{fault} {key}"))
        else:
            handler.reply(200, completion(body, fault))

    # ---- batches -----------------------------------------------------------------------------
    def create_batch(self, body):
        """Creates and runs a batch; the first poll still reports it as in progress."""
        n = len(self.batches)
        good, bad, status = [], [], self.batch_status
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        for i, line in enumerate(lines):
            fault = self.batch_fault(n, i, line)
            if not self.schema and "response_format" in line["body"]:
                fault = "400"
            out = {"id": f"r{i}", "custom_id": line["custom_id"], "error": None}
            if fault == "missing":
                continue
            if fault == "expired":
                out |= {"response": None, "error": {"code": "batch_expired", "message": "late"}}
                bad.append(out)
                status = "expired"
            elif fault.isdigit():
                error = _error("response_format is unknown" if fault == "400" else "it broke")
                bad.append(out | {"response": {"status_code": int(fault), "body": error}})
            else:
                reply = completion(line["body"], fault)
                if not fault:
                    self.answered[prompt_of(line["body"])] += 1
                good.append(out | {"response": {"status_code": 200, "body": reply}})
        ids = []
        for rows in (good, bad):
            if rows and status != "failed":
                ids.append(self.add_file("".join(json.dumps(r) + "\n" for r in rows).encode()))
            else:
                ids.append(None)
        batch = {
            "id": f"batch_{n}", "object": "batch", "endpoint": body["endpoint"], "created_at": n,
            "input_file_id": body["input_file_id"], "completion_window": "24h", "looks": 0,
            "metadata": body.get("metadata"), "output_file_id": ids[0], "error_file_id": ids[1],
            "final": status, "status": "in_progress", "errors": None,
        }  # fmt: skip
        if status == "failed":
            batch["errors"] = {"object": "list", "data": [{"message": "line 3 is wrong"}]}
        self.batches[batch["id"]] = batch
        return batch

    def look_at(self, batch):
        batch["looks"] += 1
        if batch["looks"] > 1:
            batch["status"] = batch["final"]
        return batch

    def add_file(self, content):
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return name


def _error(message):
    return {"error": {"message": message, "type": "error", "code": None, "param": None}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mock: MockEndpoint

    def log_message(self, *_):
        pass

    def reply(self, status, content, headers=None):
        data = content if isinstance(content, (str, bytes)) else json.dumps(content)
        data = data.encode() if isinstance(data, str) else data
        kind = "application/json" if not isinstance(content, (str, bytes)) else "text/plain"
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.removeprefix("/v1")
        if path == "/chat/completions":
            self.mock.complete(self, json.loads(data))
        elif path == "/files":
            boundary = re.search(r"boundary=(\S+)", self.headers["Content-Type"]).group(1).encode()
            part = next(p for p in data.split(b"--" + boundary) if b"filename=" in p)
            content = part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
            file = {"id": self.mock.add_file(content), "object": "file", "bytes": len(content)}
            self.reply(200, file | {"created_at": 0, "filename": "f", "purpose": "batch"})
        elif path == "/batches":
            batch = self.mock.create_batch(json.loads(data))
            if self.mock.drop_create:
                self.mock.drop_create -= 1
                self.close_connection = True
                self.connection.close()
                return
            self.reply(200, batch)
        else:
            self.reply(404, _error("no such path"))

    def do_GET(self):
        path = self.path.removeprefix("/v1").split("?")[0]
        name = path.split("/")[2] if path.count("/") > 1 else ""
        if path == "/batches":
            rows = list(self.mock.batches.values())[::-1]
            self.reply(200, {"object": "list", "data": rows, "has_more": False})
        elif name in self.mock.batches:
            self.reply(200, self.mock.look_at(self.mock.batches[name]))
        elif name in self.mock.files:
            self.reply(200, self.mock.files[name])
        else:
            self.reply(404, _error("no such path"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address):
        pass  # clients are killed, and connections cut, on purpose


@contextmanager
def serve(mock):
    """Serves a MockEndpoint within the block, and sets its url."""
    handler = type("Handler", (_Handler,), {"mock": mock})
    server = _Server(("127.0.0.1", 0), handler)
    mock.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield mock
    finally:
        server.shutdown()
        server.server_close()
