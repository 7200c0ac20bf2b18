"""An HTTP server with the routes of OpenAI, TEI and Ollama, whose faults a test chooses. It says its prompt's words."""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class Stub:
    """`limit`: requests at once, above it the stub answers 429. `faults`: taken one by one by POST requests."""

    words: int = 8
    step_s: float = 0.0
    limit: int = 10_000
    key: str = ""
    owned_by: str = "vllm"
    retry_after: str = ""
    metrics: str = ""
    faults: list[str | int] = field(default_factory=list)
    always: str | int = ""
    say: Callable[[Body], list[str]] | None = None
    refuse: Callable[[Body], int] = lambda body: 0
    requests: list[tuple[str, Body]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    refused: int = 0
    hung_up: int = 0
    ran: list[tuple[float, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""
    vector: Callable[[str], list[float]] = lambda text: vector(text)

    def texts(self, body: Body) -> list[str]:
        """The pieces that answer a request: numbered words, each behind the text that the request has already."""
        if self.say:
            return self.say(body)
        if "messages" in body:
            last = body["messages"][-1]
            said = last["content"] if last["role"] == "assistant" else ""
            whole = [f"w{n} " for n in range(self.words)]
        else:
            prompt = body["prompt"] if isinstance(body["prompt"], str) else "ids:"
            head, _, said = prompt.partition(":")
            whole = [f"{head}{n} " for n in range(self.words)]
        begun = said.count(" ")
        assert "".join(whole[:begun]) == said, (said, whole)
        rest = whole[begun:]
        return rest[: body["max_tokens"]] if body.get("max_tokens") else rest


@contextmanager
def serving(stub: Stub, port: int = 0) -> Iterator[Stub]:
    class Handler(_Handler):
        pass

    Handler.stub = stub
    server = _Server(("127.0.0.1", port), Handler)
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        server.drop()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *args: Any) -> None:
        self.sockets: set[Any] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.sockets.add(request)
        super().process_request(request, client_address)

    def drop(self) -> None:
        """Cuts all connections, as the death of a server does."""
        for each in list(self.sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        self.sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    stub: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        stub = self.stub
        if stub.key and self.headers.get("authorization") != f"Bearer {stub.key}":
            return self._json(401, {"error": {"message": "wrong key"}})
        match self.path:
            case "/v1/models":
                return self._json(200, {"data": [{"id": "m", "owned_by": stub.owned_by, "created": time.time()}]})
            case "/v1/info":
                return self._json(200, {"model_id": "m", "model_sha": "abc"})
            case "/v1/api/tags":
                return self._json(200, {"models": [{"name": "m:latest", "digest": "abc"}]})
            case "/v1/health" | "/v1/api/version":
                return self._json(200, {})
            case "/metrics" if stub.metrics:
                return self._send(200, stub.metrics.encode(), "text/plain")
        return self._json(404, {"error": "no such route"})

    def do_POST(self) -> None:
        stub = self.stub
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if stub.key and self.headers.get("authorization") != f"Bearer {stub.key}":
            return self._json(401, {"error": {"message": "wrong key"}})
        with stub.lock:
            is_over = stub.running >= stub.limit
            stub.refused += is_over
            fault = "" if is_over else stub.faults.pop(0) if stub.faults else stub.always
            if not is_over:
                stub.running += 1
                stub.most = max(stub.most, stub.running)
                stub.ran.append((time.monotonic(), stub.running))
                stub.requests.append((self.path.removeprefix("/v1"), body))
                stub.headers.append(dict(self.headers))
        if is_over:
            headers = {"retry-after": stub.retry_after} if stub.retry_after else {}
            return self._json(429, {"error": {"message": "too many requests"}}, headers)
        try:
            self._answer(body, fault)
        except (BrokenPipeError, ConnectionResetError):
            stub.hung_up += 1
            self.close_connection = True
        finally:
            with stub.lock:
                stub.running -= 1
                stub.ran.append((time.monotonic(), stub.running))

    def _answer(self, body: Body, fault: str | int) -> None:
        if status := self.stub.refuse(body):
            return self._json(status, {"error": {"message": "the input is too long"}})
        if isinstance(fault, int):
            headers = {"retry-after": self.stub.retry_after} if self.stub.retry_after else {}
            return self._json(fault, {"error": {"message": f"fault {fault}"}}, headers)
        match fault:
            case "reset":
                self.connection.close()
                self.close_connection = True
                return None
            case "silence":
                time.sleep(3.0)
                self.close_connection = True
                return None
            case "not json":
                return self._send(200, b"<html>oops</html>", "text/html")
        path = self.path.removeprefix("/v1")
        match path:
            case "/completions" | "/chat/completions":
                return self._stream(body, fault, sse=True)
            case "/api/generate" | "/api/chat":
                return self._stream(body, fault, sse=False)
        time.sleep(self.stub.step_s)
        return self._json(200, self._rows(path, body))

    def _rows(self, path: str, body: Body) -> object:
        match path:
            case "/embeddings":
                assert body["encoding_format"] == "base64"
                data = [
                    {"index": at, "embedding": base64.b64encode(_packed(self.stub.vector(text))).decode()}
                    for at, text in enumerate(body["input"])
                ]
                return {"data": data[::-1], "usage": {"prompt_tokens": 5 * len(data), "total_tokens": 5 * len(data)}}
            case "/api/embed":
                return {"embeddings": [self.stub.vector(text) for text in body["input"]], "prompt_eval_count": 3}
            case "/embed":
                return [self.stub.vector(text) for text in body["inputs"]]
            case "/rerank" if "texts" in body:
                return [{"index": at, "score": float(len(text))} for at, text in enumerate(body["texts"])][::-1]
            case "/rerank":
                results = [
                    {"index": at, "relevance_score": float(len(text))} for at, text in enumerate(body["documents"])
                ]
                return {"results": results[::-1], "usage": {"total_tokens": 7}}
        raise AssertionError(path)

    def _stream(self, body: Body, fault: str, *, sse: bool) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream" if sse else "application/x-ndjson")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        texts = self.stub.texts(body)
        for at, text in enumerate(texts):
            if at == 3 and fault == "half":
                self.connection.close()
                self.close_connection = True
                return
            if at == 3 and fault == "end":
                self._chunk(b"")
                return
            if at == 3 and fault == "stall":
                time.sleep(3.0)
                self.close_connection = True
                return
            if at == 3 and fault == "malformed":
                self._chunk(b"data: {broken\n\n")
            if at == 3 and fault == "error":
                self._chunk(b'data: {"error": {"message": "out of memory", "code": 500}}\n\n')
                self._chunk(b"")
                return
            self._event(body, text, sse)
            time.sleep(self.stub.step_s)
        self._finish(body, len(texts), sse)

    def _event(self, body: Body, text: str, sse: bool) -> None:
        if not sse:
            value: Body = {"message": {"content": text}} if "messages" in body else {"response": text}
            return self._chunk(json.dumps({**value, "done": False}).encode() + b"\n")
        choice: Body = {"delta": {"content": text}} if "messages" in body else {"text": text}
        if body.get("logprobs") is not None and "messages" not in body:
            choice["logprobs"] = {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": [{text: -0.5}]}
        return self._chunk(b": ping\n\ndata: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")

    def _finish(self, body: Body, count: int, sse: bool) -> None:
        reason = "length" if body.get("max_tokens") == count else "stop"
        if not sse:
            last = {"done": True, "done_reason": reason, "prompt_eval_count": 4, "eval_count": count}
            self._chunk(json.dumps(last).encode() + b"\n")
        else:
            usage = {"prompt_tokens": 4, "completion_tokens": count}
            for value in (
                {"choices": [{"text": "", "delta": {}, "finish_reason": reason}]},
                {"choices": [], "usage": usage},
            ):
                self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _json(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers)

    def _send(self, status: int, data: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def vector(text: str) -> list[float]:
    return [float(len(text)), 1.0, 0.0]


def _packed(numbers: list[float]) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)
