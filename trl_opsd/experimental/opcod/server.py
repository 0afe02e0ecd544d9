# SPDX-License-Identifier: Apache-2.0
"""Answers of a served model, each asked for once and kept in a folder."""

import json
import os
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from urllib.error import HTTPError

from .settings import PeerSettings


class PeerUnavailable(RuntimeError):
    """No try of a call gave an answer, or calls pause after one whose tries all failed."""


class PeerServer:
    """Asks an OpenAI-compatible server; may be called from several threads and processes.

    Args:
        settings: reads `url`, `model`, `cache_folder`, `max_tokens`, `timeout_seconds`, `num_tries` and `pause_seconds`.
        count: called with `calls`, `cached` or `failed`.
        sleep: waits between tries.
    """

    def __init__(
        self, settings: PeerSettings, count: Callable[[str], None], sleep: Callable[[float], None] = time.sleep
    ):
        self.settings, self.count, self.sleep = settings, count, sleep
        self.folder = Path(settings.cache_folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._paused_until = 0.0
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def ask(self, question: str) -> str:
        """The peer's answer to a text, from the folder where it was given before.

        Raises:
            PeerUnavailable: there is none.
        """
        request = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.settings.max_tokens,
            "temperature": 0,
        }
        body = json.dumps(request, sort_keys=True).encode()
        key = sha256(self.settings.url.encode() + body).hexdigest()
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        try:
            with lock:  # the same text from another thread waits for this answer
                file = self.folder / f"{key}.json"
                if file.exists():
                    self.count("cached")
                    return json.loads(file.read_text(encoding="utf-8"))["answer"]
                answer = self._call(body)
                self._keep(file, answer)
                return answer
        finally:
            self._locks.pop(key, None)  # a run asks about as many texts as it has rollouts

    def _keep(self, file: Path, answer: str) -> None:
        """Write whole or not at all: another process may read it."""
        with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False, encoding="utf-8") as part:
            json.dump({"answer": answer}, part)
        os.replace(part.name, file)

    def _call(self, body: bytes) -> str:
        if time.monotonic() < self._paused_until:
            self.count("failed")
            raise PeerUnavailable(f"{self.settings.url} did not answer a moment ago; it is asked again later")
        last: Exception | None = None
        for number in range(self.settings.num_tries):
            if number:
                self.sleep(min(2.0 ** (number - 1), 10.0))
            self.count("calls")
            try:
                return self._try(body)
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:  # network, garbage, another form
                last = error
        self._paused_until = time.monotonic() + self.settings.pause_seconds
        self.count("failed")
        raise PeerUnavailable(
            f"{self.settings.url} gave no answer in {self.settings.num_tries} tries: {last!r}"
        ) from last

    def _try(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        request = urllib.request.Request(f"{self.settings.url.rstrip('/')}/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.settings.timeout_seconds) as response:
                answer = json.loads(response.read())["choices"][0]["message"]["content"]
        except HTTPError as error:
            with error:  # it holds the connection, and says what is wrong with the request
                raise OSError(f"{error.code}: {error.read()[:300]!r}") from None
        if not isinstance(answer, str):
            raise TypeError(f"the answer is {answer!r}")
        return answer
