"""A model without a server: texts or ids in, answers out, as many as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lightseq_backend import local, text
from lightseq_backend.answers import Answer, Failure, Hypothesis, Score
from lightseq_backend.config import Config, DecodingOptions, GptConfig
from lightseq_backend.errors import ConfigError, RequestError
from lightseq_backend.request import GENERATE, SCORE, Output
from lightseq_backend.serving.wire import prompt_of, text_of
from lightseq_backend.streams import Row, results
from lightseq_backend.text.rows import source_row, target_row

RAISE, RETURN = "raise", "return"
RowLike = str | Sequence[int] | np.ndarray
Pair = tuple[RowLike, RowLike]
Parse = Callable[[Any], Any]
Made = TypeVar("Made", Answer, Score)


class Stream(NamedTuple):
    """How rows are read and refused, as the methods of Model have it."""

    errors: str
    first: int
    ahead: int
    parse: Parse


def _as_it_is(row: Any) -> Any:
    return row


class Model:
    """A loaded model; `lightseq_backend.load` says what it is made from.

        with lightseq_backend.load("model_repository/transformer") as model:
            for answer in model.translate(["quatre-vingt-dix-sept"], beam_size=4):
                print(answer.text)

    A row is a text, for a model with a tokenizer, or a sequence of ids. The methods take any number of rows, read as
    they are needed, and give an iterator of answers in the order of the rows. They may be called from any thread, also
    at the same time.

    options  those of a request (docs/protocol.md), by default the weight file's; one hypothesis a row is returned
             unless num_hypotheses is given
    errors   what becomes of a row that the model cannot take: "raise" (RequestError, when its turn comes) or "return"
             (a Failure in its place)
    first    the number of the first row, for what goes on where something else ended: numbers count from it, and the
             random numbers of a given seed with them
    ahead    windows of rows that are read and under way before the answers of one are waited for
    parse    makes a row of each of `rows`, which may then be anything; a RequestError of its is that row's
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        precision: str | None = None,
        dialect: str | None = None,
        tokenizer: str | Path | None = None,
        source_language: str | None = None,
        slots: int = 64,
        window: int = 512,
    ):
        if window < 1:
            raise ConfigError(f"window is {window}; it must be at least 1")
        found = local.find(path, device)
        self._engine = local.build(path, dialect, None, device, precision, slots)
        self.config: Config = self._engine.model.config
        directories = found.tokenizer if tokenizer is None else (Path(tokenizer),)
        self.tokenizer = text.load(directories, self.config, source_language or found.source_language)
        where = " or ".join(map(str, directories))
        if tokenizer is not None and self.tokenizer is None:
            raise ConfigError(f"no tokenizer in {where}; it may be {text.FILE_SETS}")
        self._no_text = f"this model takes ids only: no tokenizer in {where}"
        self._window = window
        self._engine.start()

    @property
    def continues_texts(self) -> bool:
        """Whether this is a GPT; else it translates."""
        return isinstance(self.config, GptConfig)

    def translate(
        self,
        rows: Iterable[Any],
        *,
        errors: str = RAISE,
        first: int = 0,
        ahead: int = 1,
        parse: Parse = _as_it_is,
        **options: object,
    ) -> Iterator[Answer | Failure]:
        """The translations of sources."""
        if self.continues_texts:
            raise RequestError("this model continues texts: generate; it does not translate")
        return self._written(rows, Stream(errors, first, ahead, parse), options)

    def generate(
        self,
        rows: Iterable[Any],
        *,
        errors: str = RAISE,
        first: int = 0,
        ahead: int = 1,
        parse: Parse = _as_it_is,
        **options: object,
    ) -> Iterator[Answer | Failure]:
        """The continuations of prompts."""
        if not self.continues_texts:
            raise RequestError("this model translates: translate; it does not continue texts")
        return self._written(rows, Stream(errors, first, ahead, parse), options)

    def score(
        self,
        rows: Iterable[Any],
        *,
        errors: str = RAISE,
        first: int = 0,
        ahead: int = 1,
        parse: Parse = _as_it_is,
    ) -> Iterator[Score | Failure]:
        """The log-probabilities of texts, or of translations: there a row is a pair of source and target.

        Ids of a target are what the model would write, its end id included if the end is to count.
        """
        read = self._text if self.continues_texts else self._pair
        return self._answered(rows, read, SCORE, self.config.decoding, _score, Stream(errors, first, ahead, parse))

    def perplexity(
        self,
        rows: Iterable[Any],
        *,
        errors: str = RAISE,
        first: int = 0,
        ahead: int = 1,
        parse: Parse = _as_it_is,
    ) -> Iterator[float | Failure]:
        """exp of the mean negative log-likelihood of each row that `score` would take. (LightSeq's ppl is that mean,
        Score.loss.)"""
        scores = self.score(rows, errors=errors, first=first, ahead=ahead, parse=parse)
        return (one if isinstance(one, Failure) else one.perplexity for one in scores)

    def close(self) -> None:
        """Ends the engine's thread: what is under way gets no answer but Overloaded. The memory goes with the model."""
        self._engine.stop(finish=False)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # From rows to requests, from outputs to answers ------------------------------------------------------------------

    def _written(self, rows: Iterable[Any], stream: Stream, changes: dict[str, object]) -> Iterator[Answer | Failure]:
        told = text.with_language(changes, self.tokenizer, self.config)
        options = self._engine.options({"num_hypotheses": 1, **told})
        return self._answered(rows, self._text, GENERATE, options, self._answer, stream)

    def _answered(
        self,
        rows: Iterable[Any],
        read: Callable[[int, Any], Row],
        kind: str,
        options: DecodingOptions,
        made_of: Callable[[Row, Output], Made],
        stream: Stream,
    ) -> Iterator[Made | Failure]:
        if stream.errors not in (RAISE, RETURN):
            raise ValueError(f"errors is {stream.errors!r}; it may be {RAISE!r} or {RETURN!r}")
        if isinstance(rows, str):
            raise TypeError("rows is one text; it must be several: put it into a list")

        decode = None if self.tokenizer is None else self.tokenizer.decode

        def answers() -> Iterator[Made | Failure]:
            taken = (_row(read, stream.parse, number, given) for number, given in enumerate(rows, stream.first))
            for row, result in results(self._engine, taken, kind, options, self._window, stream.ahead, decode):
                if isinstance(result, Output):
                    yield made_of(row, result)
                elif not isinstance(result, RequestError):
                    raise result
                elif stream.errors == RAISE:
                    raise RequestError(f"row {row.number}: {result}")
                else:
                    yield Failure(row.number, result)

        return answers()  # options were checked when we were called, not when the first answer is asked for

    def _text(self, number: int, row: RowLike) -> Row:
        return Row(number, self._ids(row, source_row))

    def _pair(self, number: int, row: Pair) -> Row:
        try:
            source, target = () if isinstance(row, str) else row
        except (TypeError, ValueError):
            raise RequestError("a translation is scored as a pair of source and target") from None
        return Row(number, self._ids(source, source_row), self._ids(target, target_row))

    def _ids(self, row: RowLike, encode: Callable[..., np.ndarray]) -> np.ndarray:
        if not isinstance(row, str):
            try:
                array = np.asarray(row)
            except ValueError as error:
                raise RequestError(f"a row of ids is a sequence of integers: {error}") from None
            return array if array.size else np.zeros(0, np.int32)  # NumPy takes nothing for fractions
        if self.tokenizer is None:
            raise RequestError(self._no_text)
        return encode(row, self.tokenizer, self.config)

    def _answer(self, row: Row, output: Output) -> Answer:
        prompt, hypotheses = prompt_of(row.ids, self.config).tolist(), []
        for one in output.hypotheses:
            ids, parts, written = (*prompt, *one.tokens.tolist()), one.token_log_probabilities, None
            if self.tokenizer is not None:
                written = text_of(row.ids, one, self.config, self.tokenizer.decode)
            each = None if parts is None else tuple(parts.tolist())
            hypotheses.append(Hypothesis(ids, written, one.score, one.finished, each))
        return Answer(row.number, tuple(hypotheses), len(prompt))


def _row(read: Callable[[int, Any], Row], parse: Parse, number: int, given: Any) -> Row:
    try:
        return read(number, parse(given))
    except RequestError as error:
        return Row(number, error=error)


def _score(row: Row, output: Output) -> Score:
    assert output.target_log_probabilities is not None
    parts = tuple(output.target_log_probabilities.tolist())
    scored = row.ids[1:] if row.target is None else row.target
    return Score(row.number, tuple(scored[: len(parts)].tolist()), parts)
