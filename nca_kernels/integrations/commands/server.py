"""Sampling by an OpenAI-compatible server: vLLM, SGLang, ``transformers serve`` and others."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import openai

from ..models.sampling import Sampled, Sampling, response_seed
from .prompts import PromptRow

TRIES = 6
LONGEST_WAIT = 30.0  # seconds between two attempts
TIMEOUT = 600.0  # seconds for one response

# Errors that may not occur again if the request is repeated; all others are the fault of the request.
_PASSING = (
    openai.APIConnectionError,
    openai.InternalServerError,
    openai.RateLimitError,
    openai.APIResponseValidationError,
    ValueError,
)


class Server:
    """A client that requests one response at a time, each with its own seed, and repeats requests after temporary errors.

    The API key is read from ``OPENAI_API_KEY``; a local server needs none.
    """

    def __init__(self, url: str, model: str, sampling: Sampling, *, first_wait: float = 0.5, timeout: float = TIMEOUT):
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=timeout)
        self._url, self._model, self._sampling, self._first_wait = url, model, sampling, first_wait
        self._stopped = threading.Event()

    def responses(self, rows: list[PromptRow], K: int, workers: int) -> Iterator[tuple[PromptRow, list[Sampled]]]:
        """Yield each row with its K responses as soon as it is completed. At most ``workers`` requests are in flight.

        Raises:
            ValueError: the server refuses a request; the message quotes the server.
            OSError: one request has failed ``TRIES`` times in a row.
        """
        requests = ((row, k) for row in rows for k in range(K))
        made: dict[int, dict[int, Sampled]] = {}
        under_way: dict[Future[Sampled], tuple[PromptRow, int]] = {}
        with ThreadPoolExecutor(workers) as pool:
            try:
                for row, k in requests:
                    under_way[pool.submit(self.response, row, k)] = row, k
                    if len(under_way) >= workers:
                        yield from self._complete(under_way, made, K)
                while under_way:
                    yield from self._complete(under_way, made, K)
            finally:
                self._stopped.set()  # requests in flight are not repeated
                pool.shutdown(cancel_futures=True)

    @staticmethod
    def _complete(
        under_way: dict[Future[Sampled], tuple[PromptRow, int]], made: dict[int, dict[int, Sampled]], K: int
    ) -> Iterator[tuple[PromptRow, list[Sampled]]]:
        done, _ = wait(under_way, return_when=FIRST_COMPLETED)
        for future in done:
            row, k = under_way.pop(future)
            made.setdefault(row.number, {})[k] = future.result()
            if len(made[row.number]) == K:
                responses = made.pop(row.number)
                yield row, [responses[i] for i in range(K)]

    def response(self, row: PromptRow, k: int) -> Sampled:
        """Request one response, in up to ``TRIES`` attempts."""
        pause = self._first_wait
        for attempt in range(1, TRIES + 1):
            try:
                return self._ask(row, k)
            except _PASSING as error:
                if attempt == TRIES or self._stopped.is_set():
                    raise OSError(
                        f"{self._url}: row {row.number} failed {attempt} times, the last time with: {_words(error)}"
                    ) from error
                self._stopped.wait(max(pause, _wanted_wait(error)))
                pause = min(2 * pause, LONGEST_WAIT)
            except openai.OpenAIError as error:
                raise ValueError(f"{self._url}: refused row {row.number}: {_words(error)}") from error
        raise AssertionError("unreachable")

    def _ask(self, row: PromptRow, k: int) -> Sampled:
        sampling = self._sampling
        options: dict[str, Any] = {
            "model": self._model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": response_seed(sampling.seed, row.number, k) % 2**31,
        }
        if sampling.stop:
            options["stop"] = list(sampling.stop)
        if isinstance(row.prompt, str):
            choice = _only(self._client.completions.create(prompt=row.prompt, **options))
            text = choice.text
        else:
            options["messages"] = row.prompt
            if row.tools:
                options["tools"] = row.tools
            choice = _only(self._client.chat.completions.create(**options))
            text = choice.message.content
        if not isinstance(text, str):
            raise ValueError("the answer has no text")
        return Sampled(text, choice.finish_reason == "stop")


def _only(answer: Any) -> Any:
    """The one choice of an answer; a ValueError if the answer is incomplete."""
    choices = getattr(answer, "choices", None)
    if not choices or getattr(choices[0], "finish_reason", None) is None:
        raise ValueError("the answer was cut off")
    return choices[0]


def _wanted_wait(error: Exception) -> float:
    """The seconds that the server asks to wait; 0 if it names none."""
    response = getattr(error, "response", None)
    try:
        return min(float(response.headers["retry-after"]), LONGEST_WAIT) if response is not None else 0.0
    except (KeyError, ValueError):
        return 0.0


def _words(error: Exception) -> str:
    return " ".join(f"{error.__cause__ or error}".split()) or type(error).__name__
