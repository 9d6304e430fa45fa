"""The client itself: many requests under way at once, answers in the order of the rows."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from lightseq_client.answers import (
    Answer,
    Call,
    Failure,
    Given,
    Row,
    RowLike,
    answers_of,
    call_of,
    encoded,
    grouped,
    sides_of,
)
from lightseq_client.errors import (
    INVALID_ARGUMENT,
    UNAVAILABLE,
    ModelError,
    RequestFailed,
    RequestTimeout,
    ServerUnreachable,
)
from lightseq_client.protocols import CONTROL_TIMEOUT, DEFAULT_URLS, Grpc, Http, checked_url
from lightseq_client.signature import GENERATE, LOG_PROBABILITY, SCORE, TRANSLATE, Signature, signature
from lightseq_client.stream import Part, parts
from lightseq_client.vocabulary import Codec, Ids

DEFAULT_MODELS = {TRANSLATE: "transformer", GENERATE: "gpt", SCORE: "gptlm"}
DEFAULT_STREAMS = {TRANSLATE: "transformer_stream", GENERATE: "gpt_stream"}
FIRST_PAUSE = 0.05  # seconds before the second attempt; doubles with each
LONGEST_PAUSE = 2.0
ROWS_AHEAD = 4  # requests prepared per request under way: a slow one must not stop those behind it

T = TypeVar("T")


@dataclass(frozen=True)
class ModelState:
    """One model as the server tells of it. state and reason are Triton's words; "" where it did not say."""

    name: str
    version: str
    ready: bool
    state: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Health:
    live: bool
    ready: bool
    models: tuple[ModelState, ...]


class Client:
    """Asks LightSeq models on a Triton server, over gRPC or HTTP.

        with Client("localhost:8001") as client:
            for answer in client.translate([[5, 9, 2], [7, 2]], beam_size=4):
                print(answer.hypotheses[0].ids, answer.hypotheses[0].score)

    url          host:port; the default is Triton's own port on this machine
    protocol     "grpc" or "http"
    concurrency  requests under way at once
    timeout      seconds for one attempt of one request
    retries      further attempts after UNAVAILABLE (queue full, connection lost), with growing pauses:
                 8 take about 6 seconds. Nothing else is tried again.
    admin_key    opens the repository index of a server that restricts it under the name admin-key

    The methods may be called from any thread, and where an event loop runs (a notebook): the client has
    a loop and a thread of its own. Raises ServerUnreachable when nobody answers, ModelError when the
    model cannot serve the task.
    """

    def __init__(
        self,
        url: str | None = None,
        protocol: str = "grpc",
        *,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 8,
        admin_key: str | None = None,
    ):
        if protocol not in DEFAULT_URLS:
            raise ValueError(f"protocol is {protocol!r}; protocols are {', '.join(DEFAULT_URLS)}")
        if concurrency < 1 or timeout <= 0 or retries < 0:
            limits = "concurrency and timeout must be over 0 and retries at least 0"
            raise ValueError(f"concurrency is {concurrency}, timeout {timeout}, retries {retries}; {limits}")
        self.url = checked_url(DEFAULT_URLS[protocol] if url is None else url)
        self.protocol = protocol
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self._signatures: dict[tuple[str, str], Signature] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lightseq-client", daemon=True)
        self._thread.start()
        try:
            self._wire, self._gate = self._run(self._open(admin_key))
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is under way and disconnect. A second call does nothing."""
        if not self._loop.is_closed():
            try:
                self._run(self._abandon())
            finally:
                self._stop()

    def translate(
        self, rows: Iterable[RowLike], *, model: str = DEFAULT_MODELS[TRANSLATE], **settings: Any
    ) -> list[Answer]:
        """Translations of the rows, in their order. Settings are those of `answers`.

        Raises the error of the first row that has no answer.
        """
        return list(_all_or_raise(self.answers(TRANSLATE, rows, model=model, **settings)))

    def generate(
        self, rows: Iterable[RowLike], *, model: str = DEFAULT_MODELS[GENERATE], **settings: Any
    ) -> list[Answer]:
        """Continuations of the prompts, in their order; a hypothesis begins with its prompt. See translate."""
        return list(_all_or_raise(self.answers(GENERATE, rows, model=model, **settings)))

    def score(self, rows: Iterable[RowLike], *, model: str = DEFAULT_MODELS[SCORE], **settings: Any) -> list[float]:
        """Mean negative log-likelihood of each row's ids after the first, natural log. See translate.

        ModelError for a model that gives log_probability instead: `answers` hands that out.
        """
        if self._signature(SCORE, model).scores == LOG_PROBABILITY:
            raise ModelError(f"model {model} gives {LOG_PROBABILITY}, not a loss: ask score_targets, or answers")
        answers = _all_or_raise(self.answers(SCORE, rows, model=model, **settings))
        return [answer.loss for answer in answers if answer.loss is not None]

    def score_targets(self, pairs: Iterable[tuple[RowLike, RowLike]], *, model: str, **settings: Any) -> list[Answer]:
        """Translations that are given, each with its source: log_probability and token_log_probabilities of the
        answers are the target's. A target is what the model would write. See translate."""
        return list(_all_or_raise(self.answers(SCORE, pairs, model=model, **settings)))

    def answers(
        self,
        task: str,
        rows: Iterable[Given],
        *,
        model: str | None = None,
        codec: Codec | None = None,
        rows_per_request: int = 1,
        ready: Callable[[], bool] = lambda: True,
        **options: Any,
    ) -> Generator[Answer | Failure, None, None]:
        """One Answer or Failure a row, in the order of the rows, which are drawn as room appears.

        rows              ids, or text where a codec is given; with the codec ServerText() the server, where
                          it has the model's tokenizer, turns text into ids and ids into text. Where a
                          model scores translations, a row is a pair: a source and its target
        rows_per_request  1 sends every row by itself. With n, n consecutive rows travel together:
                          padded to one matrix where the codec knows the padding id (LightSeq's step
                          limit then counts the padding too), else, and for prompts always, one request
                          for each length among them. Rows of a refused matrix are asked one by one, so
                          that a bad row harms itself alone.
        ready             False when the next row may be long in coming: answers under way are then
                          handed out first
        options           travel as request parameters: sampling_method, beam_size, length_penalty,
                          diverse_lambda, top_k, top_p, temperature, seed, max_new_tokens,
                          num_hypotheses, and those of Hugging Face's generate (early_stopping,
                          no_repeat_ngram_size, bad_words_ids, ...), lists as lists. The server
                          checks them. None means "not given".
        """
        if rows_per_request < 1:
            raise ValueError(f"rows_per_request is {rows_per_request}; it must be at least 1")
        name = DEFAULT_MODELS[task] if model is None else model
        call = call_of(task, name, self._signature(task, name), codec or Ids(), options, streams=False)
        return self._flow(call, enumerate(rows, 1), rows_per_request, ready)

    def stream(
        self,
        task: str,
        row: RowLike,
        *,
        model: str | None = None,
        codec: Codec | None = None,
        request_id: str = "",
        **options: Any,
    ) -> Generator[Part, None, None]:
        """The answer to one row in parts, as they come; the last one holds the whole answer.

        Closed early, or dropped, it has the server stop; over HTTP only where there is a request_id, which should be
        hard to guess, and of no other request: a stop is for all that have it. The time limit is that between two
        parts. Other parameters are those of `answers`; nothing is tried again.
        """
        name = DEFAULT_STREAMS[task] if model is None else model
        call = call_of(task, name, self._signature(task, name), codec or Ids(), options, streams=True)
        rows, failures = encoded(call, [(1, row)])
        for failure in failures:
            raise failure.error
        return parts(self.url, self.protocol, call, rows[0], request_id, self.timeout)

    def health(self, models: Sequence[str] = ()) -> Health:
        """The server's state and that of the models named, or of all of its models.

        A server that keeps its repository index to its administrators is asked about the models that
        this client asks by default. Raises ServerUnreachable.
        """
        return self._run(self._health(tuple(models)))

    def takes_text(self, task: str, model: str) -> bool:
        """Whether the server tokenises for the model: the codec ServerText needs that."""
        return self._signature(task, model).takes_text(task)

    def takes_targets(self, model: str) -> bool:
        """Whether the model scores translations: rows are pairs then."""
        return self._signature(SCORE, model).target is not None

    def weights(self, model: str) -> str:
        """Where the model's configuration says its weights are, seen from the model's directory; "" if nowhere."""
        config = self._run(self._described(model, self._wire.config))
        return str(config.get("parameters", {}).get("weights", {}).get("string_value", ""))

    def _flow(
        self, call: Call, rows: Iterator[tuple[int, Given]], rows_per_request: int, ready: Callable[[], bool]
    ) -> Generator[Answer | Failure, None, None]:
        window: deque[Future[list[Answer | Failure]]] = deque()
        more = True
        try:
            while more or window:
                full = len(window) >= ROWS_AHEAD * self.concurrency
                if window and (full or not more or window[0].done() or not ready()):
                    yield from window.popleft().result()
                    continue
                chunk = list(itertools.islice(rows, rows_per_request))
                more = bool(chunk)
                if chunk:
                    window.append(asyncio.run_coroutine_threadsafe(self._ask(call, *encoded(call, chunk)), self._loop))
        finally:  # also when the caller stops early, or is interrupted
            for future in window:
                future.cancel()

    async def _ask(self, call: Call, rows: list[Row], failures: list[Failure]) -> list[Answer | Failure]:
        groups = await asyncio.gather(*(self._answer(call, group) for group in grouped(rows, call.pads)))
        return sorted([*failures, *itertools.chain(*groups)], key=lambda item: item.number)

    async def _answer(self, call: Call, rows: list[Row]) -> list[Answer | Failure]:
        started = 0.0

        async def attempt() -> dict[str, Any]:
            infer = self._wire.infer(call.model, call.tensors, sides_of(call, rows), call.parameters)
            return await asyncio.wait_for(infer, self.timeout)

        try:
            async with self._gate:
                started = time.perf_counter()
                outputs = await self._patiently(attempt)
                latency = time.perf_counter() - started
            return answers_of(call, rows, outputs, latency)
        except RequestFailed as error:
            if len(rows) > 1 and error.status == INVALID_ARGUMENT:
                return list(itertools.chain(*await asyncio.gather(*(self._answer(call, [row]) for row in rows))))
            return [Failure(row.number, row.given, error) for row in rows]

    async def _patiently(self, attempt: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the attempt; after UNAVAILABLE pause and run it again, at most `retries` times."""
        for number in itertools.count(1):
            try:
                return await attempt()
            except asyncio.TimeoutError:
                raise RequestTimeout(self.timeout) from None
            except RequestFailed as error:
                if error.status != UNAVAILABLE:
                    raise
                if number > self.retries:
                    await self._check_live()
                    raise
            await asyncio.sleep(pause(number))
        raise AssertionError("count() ended")

    def _signature(self, task: str, model: str) -> Signature:
        """The model's tensors, asked once."""
        if (task, model) not in self._signatures:
            self._signatures[task, model] = signature(
                task, model, self._run(self._described(model, self._wire.metadata))
            )
        return self._signatures[task, model]

    async def _described(
        self, model: str, question: Callable[[str], Coroutine[Any, Any, dict[str, Any]]]
    ) -> dict[str, Any]:
        """What the server says of a model that must be ready."""
        await self._check_live()
        if not await self._soon(self._wire.model_ready(model), False):
            state = await self._state(model, await self._soon(self._wire.index(), []))
            reason = f": {state.reason}" if state.reason else f" ({state.state})" if state.state else ""
            raise ModelError(f"model {model} is not ready at {self.url}{reason}")
        try:
            return await asyncio.wait_for(question(model), CONTROL_TIMEOUT)
        except (RequestFailed, asyncio.TimeoutError) as error:
            raise ModelError(f"no description of model {model} at {self.url}: {error}") from None

    async def _check_live(self) -> None:
        hint = f"is this the server's {self.protocol} port?"
        try:
            if await asyncio.wait_for(self._wire.live(), CONTROL_TIMEOUT):
                return
        except asyncio.TimeoutError:
            hint = f"no answer within {CONTROL_TIMEOUT:g} s"
        except RequestFailed as error:
            hint = error.message
        raise ServerUnreachable(f"no live Triton at {self.url} over {self.protocol}: {hint}")

    async def _health(self, models: tuple[str, ...]) -> Health:
        await self._check_live()
        index = await self._soon(self._wire.index(), [])
        names = models or sorted({entry["name"] for entry in index}) or sorted(DEFAULT_MODELS.values())
        states = [await self._state(name, index) for name in names]
        return Health(live=True, ready=await self._soon(self._wire.ready(), False), models=tuple(states))

    async def _state(self, model: str, index: list[dict[str, str]]) -> ModelState:
        entries = [entry for entry in index if entry["name"] == model]
        ready = await self._soon(self._wire.model_ready(model), False)
        versions = [entry["version"] for entry in entries if entry.get("version")]
        if ready and not versions:
            versions = (await self._soon(self._wire.metadata(model), {})).get("versions", [])
        told = {key: "; ".join(sorted({e[key] for e in entries if e.get(key)})) for key in ("state", "reason")}
        return ModelState(model, ", ".join(versions), ready, **told)

    async def _soon(self, question: Coroutine[Any, Any, T], otherwise: T) -> T:
        """The answer to a side question; `otherwise` when it is refused or does not come."""
        try:
            return await asyncio.wait_for(question, CONTROL_TIMEOUT)
        except (RequestFailed, asyncio.TimeoutError):
            return otherwise

    async def _open(self, admin_key: str | None) -> tuple[Grpc | Http, asyncio.Semaphore]:
        gate = asyncio.Semaphore(self.concurrency)
        if self.protocol == "grpc":
            return Grpc(self.url, admin_key), gate
        return Http(self.url, admin_key, connections=self.concurrency + 1), gate

    async def _abandon(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._wire.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("this client is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def pause(attempt: int) -> float:
    """Seconds to wait after that many attempts: doubling, bounded, and up to half shorter by chance, so that
    clients turned away together do not come back together."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1)


def _all_or_raise(items: Iterator[Answer | Failure]) -> Iterator[Answer]:
    for item in items:
        if isinstance(item, Failure):
            raise item.error
        yield item
