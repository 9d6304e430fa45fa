"""The loop: admit, prefill, a burst of decode steps, retire. One thread owns the device."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Ordered
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from types import ModuleType

import numpy as np

from lightseq_backend.config import DecodingLimits, DecodingOptions, EngineConfig, GptConfig
from lightseq_backend.decoding import methods, standard
from lightseq_backend.decoding.stops import Stops
from lightseq_backend.engine import scoring
from lightseq_backend.engine.buffers import allocate, candidates
from lightseq_backend.engine.departures import Departures
from lightseq_backend.engine.follow import Look, follow
from lightseq_backend.engine.graphs import SEARCHING, Passes, Steps, mix_of
from lightseq_backend.engine.scheduler import Scheduler
from lightseq_backend.engine.uploads import Uploads
from lightseq_backend.errors import ConfigError, Overloaded, RequestError
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.request import GENERATE, SCORE, Output, Request, Sequence, Timing
from lightseq_backend.small import counting

log = logging.getLogger(__name__)

STEP_PATIENCE = 5.0  # seconds that `stop` gives to the step under way, its patience with the rest being at an end
TIMINGS = 1 << 16  # that are kept for whoever reads them; older ones go


@dataclass
class _Report:
    """What there will be of a burst.

    ran       the sequences it works on; some may be gone when it is read
    records   SLOT [lanes]; calling it waits
    followed  of those who are followed
    last      of those who take no step after it
    """

    ran: list[Sequence]
    records: Callable[[], np.ndarray]
    followed: Look
    last: Look


class Engine:
    """Runs one model. `submit` from any thread; replies come from the engine's own.

    Raises ConfigError when the memory for `config` is not there. Without `start` nothing runs by itself: a test or
    a script calls `step` until `idle`, or `answer`.
    """

    def __init__(self, model: Transformer | Gpt, config: EngineConfig, ops: ModuleType):
        self.model, self.config, self._ops = model, config, ops
        beams = min(config.max_beam_size, model.config.vocabulary - (model.config.banned_id >= 0))
        if beams > ops.MOST_BEAMS:
            raise ConfigError(f"max_beam_size is {config.max_beam_size}; a GPU searches with {ops.MOST_BEAMS} at most")
        self.limits = DecodingLimits(beams, model.config.vocabulary, candidates(model.config, beams, ops))
        ops.start()
        self._buffers = allocate(model, config, beams, ops)
        self._steps = Steps(model, self._buffers, config.slots, ops)
        self._passes = Passes(model, self._buffers, config.scores, ops)
        # What is read while serving, read once in full: that makes the room it takes.
        state = self._buffers.state
        for kept in ("history", "details", "pool", "pool_details"):
            ops.get(getattr(state, kept))
        for largest in (state.slots, state.history, state.details, state.pool, self._buffers.scored):
            ops.fetch(largest)()
        self._uploads = Uploads(model.config, self._buffers, self._passes, self._steps, config.slots, ops)
        self._scheduler = Scheduler(config)
        self._admitted: dict[int, Sequence] = {}  # by id(): everything taken from the queue and not yet answered
        self._active: list[Sequence] = []  # those of them that decode
        self._departures = Departures()
        self._reports: deque[_Report] = deque()  # of bursts under way
        self._rows = 0  # the bucket that the rows in device memory fill
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.fault: str | None = None  # why the device takes no more work
        self.counts: Counter[str] = Counter()
        self.step_seconds = 0.0  # that decode steps took, up to the host's look at them
        self.timings: deque[Timing] = deque(maxlen=TIMINGS)  # of what was answered; for one reader, who takes them out
        log.info("engine memory: %d bytes for %d slots", self._buffers.size, config.slots)

    # What other threads call ------------------------------------------------------------------------------------------

    @property
    def memory(self) -> int:
        """Bytes of the engine's block, weights not included."""
        return self._buffers.size

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    @property
    def waiting_tokens(self) -> int:
        return self._scheduler.tokens

    @property
    def waiting_seconds(self) -> float:
        """How long the one who has waited longest has waited."""
        return self._scheduler.age

    @property
    def slots_in_use(self) -> int:
        return self._scheduler.slots_in_use

    @property
    def idle(self) -> bool:
        return not self._active and not self._scheduler.waiting

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether answers can be expected."""
        return self.alive and self.fault is None

    def options(self, changes: dict[str, object] | None = None) -> DecodingOptions:
        """The model's defaults with a request's own settings; RequestError names each bad one."""
        return self.model.config.decoding.with_changes(changes or {}, self.limits)

    def submit(self, requests: Ordered[Request]) -> None:
        """Queues all requests or none.

        RequestError: one cannot be honoured. Overloaded: the queue is full, or the engine is stopping. RuntimeError:
        the device has failed.
        """
        for request in requests:
            if request.kind == SCORE and not self.config.scores:
                raise RequestError("this model is loaded for generation alone")
            if request.kind == GENERATE and request.options.width > self.limits.max_beam_size:
                raise RequestError(
                    f"the request is {request.options.width} rows wide; this model takes {self.limits.max_beam_size}"
                )
        if self.fault:
            raise RuntimeError(self.fault)
        sequences = Sequence.all_of(requests, self.model.config)
        for request in requests:  # before the engine's thread can have answered and forgotten it
            self._departures.expect(request)
        try:
            self._scheduler.enqueue(sequences)
        except Overloaded:
            for request in requests:
                self._departures.forget(request)
            raise

    def cancel(self, requests: Iterable[Request], error: Exception) -> None:
        """Has requests answered with the error and their slots freed before the next burst, unless they have had an
        answer by then."""
        for request in requests:
            self._departures.cancel(request, error)

    def answer(
        self,
        rows: Ordered[Ordered[int]],
        kind: str = GENERATE,
        changes: dict[str, object] | None = None,
        targets: Ordered[Ordered[int]] | None = None,
    ) -> list[Output]:
        """Submits rows of ids, however many there are, and returns their outputs in order; raises what they raise.

        targets: of a translation that is scored, one a row. Without `start` the calling thread runs the engine.
        """
        wanted = [None] * len(rows) if targets is None else [np.asarray(target) for target in targets]
        options = self.options(changes) if kind == GENERATE else self.model.config.decoding
        results: dict[int, Output | Exception] = {}
        replies: SimpleQueue[tuple[int, Output | Exception]] = SimpleQueue()

        def reply_to(row: int) -> Callable[[Output | Exception], None]:
            return lambda result: replies.put((row, result))

        for start in range(0, len(rows), self.config.queue):
            part = rows[start : start + self.config.queue]
            requests = [
                Request(np.asarray(ids, np.int64), options, reply_to(i), kind, i, wanted[i])
                for i, ids in enumerate(part, start)
            ]
            self.submit(requests)
            while not self.alive and not self.idle:
                self.step()
            results.update(replies.get() for _ in part)
        outputs = []
        for row in range(len(rows)):
            output = results[row]
            if isinstance(output, Exception):
                raise output
            outputs.append(output)
        return outputs

    def warm_up(self) -> None:
        """Runs two steps, or a score, as the first request would; to be called before `start`. What is wrong with the
        device shows here. Nothing of it stays, in the counts neither."""
        config = self.model.config
        special = {config.padding_id, config.end_id}
        row = [next(i for i in range(config.input_vocabulary) if i not in special)]
        with suppress(RequestError):  # the file's own defaults may want more than two tokens
            scores_text = isinstance(config, GptConfig) and self.config.scores
            self.answer([row * 2], SCORE) if scores_text else self.answer([row], changes={"max_new_tokens": 2})
        self.counts.clear()
        self.timings.clear()
        self.step_seconds = 0.0

    def expire(self) -> None:
        """Answers what has waited for too long. From any thread."""
        for sequence in self._scheduler.remove_expired():
            self._admitted[id(sequence)] = sequence
            limit = self.config.queue_seconds
            self._retire(sequence, Overloaded(f"the request has waited for {limit:g} s, the limit; come again later"))

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Takes no more."""
        self._stopping = True
        self._scheduler.close()

    def stop(self, patience: float = 30.0, finish: bool = True) -> None:
        """Takes no more, finishes what runs or waits within `patience` seconds (without `finish`: the step it is at),
        answers the rest with an error."""
        self._abandoned = not finish
        self.close()
        if self._thread is not None:
            self._thread.join(0 if self.fault else patience)  # what has failed does not finish
            self._abandoned = True
            self._thread.join(min(patience, STEP_PATIENCE))
        for sequence in self._scheduler.remove():
            self._admitted[id(sequence)] = sequence
        self._fail(Overloaded("the engine was stopped"))

    # The engine's thread ----------------------------------------------------------------------------------------------

    _abandoned = False

    def _loop(self) -> None:
        self._ops.start()
        while not self._abandoned:
            with self._scheduler.changed:
                self._scheduler.changed.wait_for(lambda: self._stopping or not self.idle)
                if self._stopping and self.idle:
                    return
            self.step()

    def step(self) -> None:
        """One round. An error of ours fails what is in flight, with the reason, and nothing that comes after, unless
        the device itself has failed: then `fault` says so and nothing more is taken."""
        moved = self._dismiss()
        admitted = self._scheduler.admit()
        self._admitted.update((id(one), one) for one in admitted)
        if self.fault:  # what still waited when the device failed
            self._fail(RuntimeError(self.fault))
            return
        try:
            self._score([one for one in admitted if one.request.kind == SCORE])
            self._begin([one for one in admitted if one.request.kind == GENERATE])
            if moved:
                self._write_rows()
            if self._active:
                self._burst()
        except Exception as error:
            log.exception("a step failed")
            self.fault = self.fault or self._ops.fault()
            self._fail(error)

    def _dismiss(self) -> bool:
        """Answers those who leave early, and takes their slots back; whether the device works on fewer rows now."""
        due = self._departures.due()
        if not due:
            return False
        waiting = self._scheduler.remove(lambda one: id(one.request) in due)
        self._admitted.update((id(one), one) for one in waiting)
        active = [one for one in self._active if id(one.request) in due]
        self._leave(active)
        for one in (*waiting, *active):
            self._retire(one, due[id(one.request)])
        return bool(active)

    def _leave(self, sequences: list[Sequence]) -> None:
        """No step that is still to be queued works on them."""
        gone = set(map(id, sequences))
        self._active = [one for one in self._active if id(one) not in gone]
        if not self._active:
            self._reports.clear()  # of bursts that had nothing left to do

    def _begin(self, sequences: list[Sequence]) -> None:
        """Reads prompts or sources, writes the slots' first records, adds the sequences to the batch."""
        sequences = [one for one in sequences if not self._ended_before_it_began(one)]
        if not sequences:
            return
        for one in sequences:
            one.stops = Stops(one, self.model.config) if one.request.options.stops else None
        # A prompt's last token is left to the first decode step, which then is like any other.
        held_back = int(isinstance(self.model.config, GptConfig))
        self._read(sequences, [one.tokens[: len(one.tokens) - held_back] for one in sequences])
        self._feed_prefixes(sequences)
        self._uploads.records(sequences, lambda one: methods.begin(one, self.model.config))
        self._uploads.rules([one for one in sequences if one.request.options.ruled])
        self._active.extend(sequences)
        self._write_rows()

    def _ended_before_it_began(self, sequence: Sequence) -> bool:
        output = methods.without_a_step(sequence, self.model.config)
        if output is not None:
            self._retire(sequence, output)
        return output is not None

    def _read(self, sequences: list[Sequence], texts: list[np.ndarray]) -> None:
        """Prompts or sources, of each sequence's tokens the first, as `texts` has them: keys and values are kept."""
        kept = [(one, text) for one, text in zip(sequences, texts) if len(text)]
        if not kept:
            return
        sequences, texts = [one for one, _ in kept], [text for _, text in kept]
        positions = [one.positions[: len(text)] for one, text in kept]
        self._passes.prefill(self._uploads.pack(sequences, texts, positions))
        self.counts["prompt_tokens"] += sum(map(len, texts))

    def _feed_prefixes(self, sequences: list[Sequence]) -> None:
        """The start token and what is to follow it: steps that keep keys and values, and choose nothing."""
        config = self.model.config
        if isinstance(config, GptConfig):
            return
        fed = {id(one): (config.start_id, *config.prefix(one.request.options)) for one in sequences}
        for step in range(max(map(len, fed.values())) - 1):

            def records_of(sequence: Sequence, step: int = step) -> np.ndarray:
                records = methods.begin(sequence, config)
                records["method"], records["length"], records["token"] = 0, step, fed[id(sequence)][step]
                return records

            longer = [one for one in sequences if len(fed[id(one)]) > step + 1]
            self._uploads.records(longer, records_of)
            self._steps.run(self._uploads.rows(longer), SEARCHING)

    def _write_rows(self) -> None:
        """Tells the device which slots the next steps work on."""
        self._rows = self._uploads.rows(self._active)

    def _burst(self) -> None:
        """Queues a burst of steps, then looks at how an earlier one ended while the device works on this one."""
        began = time.monotonic()
        # Nobody takes more steps than its limit: none is queued that no sequence can use.
        steps = min(self.config.burst, max(one.limit - one.queued for one in self._active))
        if steps > 0:
            mix = mix_of((one.request.options, standard.rules_act(one, steps)) for one in self._active)
            for _ in range(steps):
                self._steps.run(self._rows, mix)
            for one in self._active:
                one.queued += steps
            self.counts["steps"] += steps
            self.counts["step_rows"] += steps * sum(len(one.slots) for one in self._active)
            state, records = self._buffers.state, self._ops.fetch(self._buffers.state.slots)
            followed = Look.at([one for one in self._active if one.followed], methods.looked_at, state, self._ops)
            # Those that have all their steps are done behind this burst: what they have found is asked for now.
            last = Look.at([one for one in self._active if one.queued >= one.limit], methods.kept, state, self._ops)
            self._reports.append(_Report(list(self._active), records, followed, last))
        if steps <= 0 or len(self._reports) >= self._ops.BURSTS_AHEAD:
            self._settle(self._reports.popleft())
        self.step_seconds += time.monotonic() - began

    def _settle(self, report: _Report) -> None:
        """Retires what was done at the end of a burst."""
        ran, records = report.ran, report.records()
        ended = records["done"].tolist()
        fresh = [one for one in ran if one.seen is None and one.slots]
        if fresh:
            now, steps = time.monotonic(), records["generated"].tolist()
            for one in fresh:
                one.seen = now, steps[one.slots[0]]
        done = [one for one in ran if one.slots and ended[one.slots[0]]]
        followed = report.followed
        going_on = [one for one in ran if one.followed and one.slots and one not in done] if followed.arrays else []
        stopped = self._follow(going_on, records, followed)
        if not done and not stopped:
            return
        self._leave([*done, *stopped])
        if self._active:
            self._write_rows()
        for sequence, output in stopped.items():
            self._retire(sequence, output)
        if not done:
            return
        first, kept = self._kept(done, report.last)
        for sequence in done:
            lanes = {name: array[sequence.lanes(first)] for name, array in kept.items()}
            self._retire(sequence, methods.finish(sequence, records[sequence.lanes()], lanes))

    def _kept(self, done: list[Sequence], look: Look) -> tuple[int, dict[str, np.ndarray]]:
        """What sequences have found, by name, from the lane on that it begins with."""
        names = methods.kept(done)
        if look.covers(done, names):
            return look.lanes.start, look.read()
        slots = [slot for sequence in done for slot in sequence.slots]
        first, end, state = min(slots), max(slots) + 1, self._buffers.state
        return first, {name: self._ops.get(getattr(state, name)[first:end]) for name in names}

    def _follow(self, sequences: list[Sequence], records: np.ndarray, look: Look) -> dict[Sequence, Output]:
        """Reports on sequences that go on; the answers of those that stop words have ended."""
        stopped: dict[Sequence, Output] = {}
        arrays = look.read() if sequences else {}
        for sequence in sequences:
            own = records[sequence.lanes()]
            lanes = {name: array[sequence.lanes(look.lanes.start)] for name, array in arrays.items()}
            if follow(sequence, own, lanes):
                stopped[sequence] = methods.finish_early(sequence, own, lanes)
        return stopped

    def _score(self, sequences: list[Sequence]) -> None:
        """Log-probabilities of what all sequences were given, in one pass behind that over their sources."""
        if not sequences:
            return
        if not isinstance(self.model.config, GptConfig):
            self._read(sequences, [one.tokens for one in sequences])
            self._uploads.records(sequences, scoring.record)
        texts = [one.scored for one in sequences]
        self._passes.score(self._uploads.pack(sequences, texts, [counting(len(text)) for text in texts], True))
        scored = self._ops.fetch(self._buffers.scored[: sum(map(len, texts))])
        own = scoring.Scored(sequences)
        outputs = own.outputs(scored())
        self.counts["scored_tokens"] += own.tokens
        for sequence, output in zip(sequences, outputs, strict=True):
            self._retire(sequence, output)

    def _retire(self, sequence: Sequence, result: Output | Exception) -> None:
        """Answers, exactly once: whoever is not in _admitted any more has had an answer.

        From another thread come here only those who have waited for too long, and what `stop` leaves.
        """
        if self._admitted.pop(id(sequence), None) is None:
            return
        self._scheduler.retire(sequence)
        request = sequence.request
        self._departures.forget(request)
        if isinstance(result, Output):
            if request.progress is not None:
                seen = time.monotonic() if sequence.seen is None else sequence.seen[0]
                result = result._replace(first_token=seen - sequence.arrived)
            self.counts["answered"] += 1
            self.timings.append(sequence.timing(time.monotonic(), result.steps))
            for hypothesis in result.hypotheses:
                self.counts["generated_tokens"] += len(hypothesis.tokens)
        else:
            self.counts["failed"] += 1
        try:
            request.reply(result)
        except Exception:
            log.exception("a reply could not be delivered")

    def _fail(self, error: Exception) -> None:
        self._active = []
        self._reports.clear()
        for sequence in list(self._admitted.values()):
            self._retire(sequence, error)
