"""vLLM servers that somebody has started: its OpenAI interface for responses, its developer's for weights."""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from asyppo.rollout.samplers.base import EngineError
from asyppo.rollout.samplers.vllm.worker import Drawn

REQUESTS = 256
"""Under way at once, at each server, which batches them."""


class Servers:
    """One server, or several that take turns with the prompts; all get the weights.

    Where the environment has ``VLLM_API_KEY``, it goes along.
    """

    def __init__(self, urls: Sequence[str], *, start_timeout: float = 600, timeout: float = 1800):
        """``urls`` such as ``http://127.0.0.1:8000``; timeouts in seconds, of waiting for them to be up and of a
        request."""
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self.start_timeout, self.timeout = start_timeout, timeout
        self.reached = False
        self.requests: list[Future[list[tuple[list[int], list[float]]]]] = []
        self.work: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.threads = self.unfinished = 0

    def load(self, directory: Path) -> None:
        """Let all servers take the weights that lie in ``directory``. Raises EngineError."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}, "timeout": self.timeout}
        with self.paused():
            self.everywhere("/collective_rpc", call)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait until all servers are up, and let them do nothing while they get weights. Raises EngineError."""
        if not self.reached:
            self.each(self._wait_for)
            self.reached = True
        self.everywhere("/pause?mode=wait")
        try:
            yield
            self.each(self._forget)
        except BaseException:
            with suppress(EngineError):  # others may use them, too
                self.everywhere("/resume")
            raise
        self.everywhere("/resume")

    def everywhere(self, path: str, body: dict[str, Any] | None = None) -> None:
        """Send all servers the same, and wait for their answers. Raises EngineError."""
        self.each(lambda url: self.call(url, path, body))

    def within_timeout(self, work: Callable[[], Any]) -> None:
        """Do what may wait for a server that does not answer. Raises EngineError."""
        try:
            self._submit(work).result(self.timeout)
        except TimeoutError as error:
            raise EngineError(
                f"vLLM servers {', '.join(self.urls)} did not take weights within vllm.timeout = {self.timeout:g} s"
            ) from error

    def begin(self, prompts: list[list[int]], samplings: list[dict[str, Any]]) -> None:
        """Let them draw responses; ``finish`` waits for these."""
        self.requests = [
            self._submit(self._draw, self.urls[i % len(self.urls)], prompt, sampling)
            for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
        ]

    def finish(self) -> Drawn:
        """Return what ``begin`` asked for. Raises EngineError."""
        requests, self.requests = self.requests, []
        try:
            return [request.result() for request in requests]
        finally:
            for request in requests:
                request.cancel()

    def sleep(self, level: int) -> None:
        """Servers stay awake."""
        raise NotImplementedError("a server has GPUs of its own")

    def wake(self, tags: list[str]) -> None:
        """Servers stay awake."""
        raise NotImplementedError("a server has GPUs of its own")

    def _draw(self, url: str, prompt: list[int], sampling: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
        request = {"prompt": prompt, "return_token_ids": True, **sampling}
        answer = self.call(url, "/v1/completions", request)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            return [(list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])) for choice in choices]
        except (KeyError, TypeError) as error:
            raise EngineError(
                f"vLLM server {url} answered /v1/completions without tokens and log-probs: {str(answer)[:200]}"
            ) from error

    def _forget(self, url: str) -> None:
        """Let a server drop the prefixes that it computed with other weights."""
        if not self.call(url, "/reset_prefix_cache")["success"]:
            raise EngineError(f"vLLM server {url} did not reset its prefix cache: others use it, too")

    def each(self, work: Callable[[str], Any]) -> None:
        """Do something with all servers at once, and wait. Raises EngineError."""
        for done in [self._submit(work, url) for url in self.urls]:
            done.result()

    def _submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Do some work in a thread. Threads are daemons: none holds up the end of the program over a server that does
        not answer."""
        future: Future[Any] = Future()
        with self.lock:  # work may submit more, and wait for it
            self.unfinished += 1
            more = self.threads < min(REQUESTS * len(self.urls), self.unfinished)
            self.threads += more
        future.add_done_callback(self._finished)
        self.work.put((future, work, arguments))
        if more:
            threading.Thread(target=_do, args=[self.work], name="vllm", daemon=True).start()
        return future

    def _finished(self, _: Future[Any]) -> None:
        with self.lock:
            self.unfinished -= 1

    def _wait_for(self, url: str) -> None:
        """Wait until a server is up."""
        end = time.monotonic() + self.start_timeout
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=10).close()
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise EngineError(
                        f"vLLM server {url} is not there after vllm.start_timeout = {self.start_timeout:g} s: "
                        f"{_reason(error)}"
                    ) from error
            time.sleep(1)

    def call(self, url: str, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        """Return a server's answer to ``path``. Raises EngineError."""
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(2000).decode(errors="replace").split())
            hint = "; needs VLLM_SERVER_DEV_MODE=1 in its environment" if error.code == 404 else ""
            raise EngineError(f"vLLM server {url} answered {path} with {error.code}: {said}{hint}") from error
        except TimeoutError as error:
            raise EngineError(
                f"vLLM server {url} did not answer {path} within vllm.timeout = {self.timeout:g} s"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"vLLM server {url} cannot be reached: {_reason(error)}") from error
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            said = " ".join(text[:200].decode(errors="replace").split())
            raise EngineError(f"{url} answered {path} with no JSON, needs a vLLM server: {said}") from error


def _do(work: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]]) -> None:
    while True:
        future, function, arguments = work.get()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
