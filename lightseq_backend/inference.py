"""LightSeq's Python package: `import lightseq_backend.inference as lsi` where a script had lightseq.inference.

Constructors and methods are LightSeq's, those of its last release and of the ones before (lightseq_format.md 5.1, 5.2):
arrays in, arrays out, one call at a time, RuntimeError for whatever cannot be done. An argument is honoured or refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lightseq_backend import local
from lightseq_backend.config import BEAM_SEARCH, TOPK, TOPK_GREEDY, TOPP, GptConfig, TransformerConfig
from lightseq_backend.errors import ConfigError, Overloaded, RequestError, WeightError
from lightseq_backend.request import GENERATE, SCORE, Output
from lightseq_backend.serving.settings import INT8
from lightseq_backend.serving.wire import FORMS, GPT, TRANSFORMER, Form, Wire

FILES = -1  # an argument of this value leaves the choice to the weight file
_MOST_SLOTS = 128


class _Model:
    _kind: str
    _methods: tuple[str, ...]
    _precision: str | None = None

    def __init__(self, weight_path: str, max_batch_size: int, device: str):
        if max_batch_size < 1:
            raise RuntimeError(f"max_batch_size is {max_batch_size}; it must be at least 1")
        self._most = max_batch_size
        try:
            # More rows than slots wait for their turn; LightSeq takes the memory for all of them at once.
            slots = min(max(16, 4 * max_batch_size), _MOST_SLOTS)
            scores = self._kind == GPT
            self._engine = local.build(weight_path, None, self._kind, device, self._precision, slots, scores)
        except (ConfigError, WeightError) as error:
            raise RuntimeError(str(error)) from None

    def _rows(self, input_seq: Any) -> np.ndarray:
        """Integers [rows, columns]; LightSeq's own words for what is too large. Fractions are cut off, as there."""
        array = np.asarray(input_seq)
        if array.ndim != 2:
            raise ValueError(f"array has incorrect number of dimensions: {array.ndim}; expected 2")
        if array.dtype.kind not in "iuf":
            raise TypeError(f"input_seq is an array of {array.dtype}; it must be one of integers")
        rows, columns = array.shape
        if rows > self._most:
            raise RuntimeError(
                f"batch size of input greater than max_batch_size: it is {rows}, max_batch_size is {self._most}"
            )
        if columns > self._longest:
            raise RuntimeError(f"seq len of input greater than max_step: it is {columns}, max_step is {self._longest}")
        if not array.size:
            raise RuntimeError(f"input_seq has shape {list(array.shape)}; it needs a row and a column")
        return array.astype(np.int64) if array.dtype.kind == "f" else array  # not int32: what is beyond it is refused

    @property
    def _longest(self) -> int:
        return self._engine.model.config.max_positions

    def _run(self, rows: np.ndarray, kind: str, **changes: object) -> list[Output]:
        try:
            return self._engine.answer(list(rows), kind, changes)
        except (RequestError, Overloaded) as error:
            raise RuntimeError(str(error)) from None

    def _method(self, asked: str, files: str) -> str:
        if asked and asked not in self._methods:
            raise RuntimeError(f"unsupported sampling_method: {asked}; methods are {', '.join(self._methods)}")
        return asked or files


class Transformer(_Model):
    """lightseq.inference.Transformer.

    weight_path     a transformer.pb, or what `lightseq convert` made
    max_batch_size  rows of one call
    device          "auto", "cpu" or "gpu"
    """

    _kind, _methods = TRANSFORMER, (BEAM_SEARCH, TOPK, TOPP, TOPK_GREEDY)

    def __init__(self, weight_path: str, max_batch_size: int, *, device: str = "auto"):
        super().__init__(weight_path, max_batch_size, device)
        self._config: TransformerConfig = self._engine.model.config  # type: ignore[assignment]
        self._wire = Wire("source_ids", _form("target_ids"), np.dtype(np.int32), batched=True)
        self._files = self._config.decoding.sampling_method

    def infer(
        self,
        input_seq: Any,
        multiple_output: bool | None = None,
        sampling_method: str = "",
        beam_size: int = FILES,
        length_penalty: float = FILES,
        topp: float = FILES,
        topk: int = FILES,
        diverse_lambda: float = FILES,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, int32 [rows, hypotheses, columns], filled up with the end id; scores, float32 [rows, hypotheses].

        input_seq: integers [rows, columns], filled up with the padding id. Called with it alone, as the last release
        has it, this gives all beams; `multiple_output`, an argument of earlier ones, says whether it gives them or the
        best alone (topk_greedy: always all; topk, topp: one). As in those, a sampling_method stays for later calls.
        """
        rows = self._rows(input_seq)
        self._files = method = self._method(sampling_method, self._files)
        changes: dict[str, object] = {"sampling_method": method}
        given = {"beam_size": beam_size, "length_penalty": length_penalty, "diverse_lambda": diverse_lambda}
        changes |= {name: value for name, value in given.items() if value != FILES}
        changes |= _narrowing(method, topk, topp)
        if multiple_output is False and method != TOPK_GREEDY:
            changes["num_hypotheses"] = 1
        answer = self._wire.answer(list(rows), self._run(rows, GENERATE, **changes), self._config)
        return answer["target_ids"], answer["target_scores"]


class QuantTransformer(Transformer):
    """lightseq.inference.QuantTransformer: of an int8 file, whose weights stay as they are rounded there."""

    _precision = INT8


class Gpt(_Model):
    """lightseq.inference.Gpt.

    weight_path     a gpt.pb, or what `lightseq convert` made
    max_batch_size  rows of one call
    max_step        of the release that has it: the most columns a row may have or grow to
    device          "auto", "cpu" or "gpu"
    """

    _kind, _methods = GPT, (TOPK, TOPP)

    def __init__(self, weight_path: str, max_batch_size: int, max_step: int | None = None, *, device: str = "auto"):
        super().__init__(weight_path, max_batch_size, device)
        self._config: GptConfig = self._engine.model.config  # type: ignore[assignment]
        if max_step is not None and not 1 <= max_step <= self._config.max_positions:
            raise RuntimeError(f"max_step is {max_step}; this model has {self._config.max_positions} positions")
        self._max_step = max_step
        self._wire = Wire("token_ids", _form("result"), np.dtype(np.int32), batched=True)

    @property
    def _longest(self) -> int:
        return self._max_step or super()._longest

    def sample(self, input_seq: Any, sampling_method: str = "", topk: int = FILES, topp: float = FILES) -> np.ndarray:
        """int32 [rows, columns]: prompts with what follows, filled up with the end id.

        input_seq: integers [rows, columns]. Rows may be of different lengths, filled up with the padding id.
        """
        rows = self._rows(input_seq)
        method = self._method(sampling_method, self._config.decoding.sampling_method)
        changes: dict[str, object] = {"sampling_method": method, **_narrowing(method, topk, topp)}
        if self._max_step is not None:
            changes["max_new_tokens"] = max(1, self._max_step - rows.shape[1])
        return self._wire.answer(list(rows), self._run(rows, GENERATE, **changes), self._config)["result"]

    def ppl(self, input_seq: Any) -> np.ndarray:
        """float32 [rows]: the mean negative log-likelihood of the tokens after the first, natural log."""
        return np.array([output.loss for output in self._run(self._rows(input_seq), SCORE)], np.float32)


class QuantGpt(Gpt):
    """lightseq.inference.QuantGpt, as QuantTransformer."""

    _precision = INT8


def _narrowing(method: str, topk: int, topp: float) -> dict[str, object]:
    """What a sampling method narrows to. LightSeq's scripts give it the other one's argument as well, which means
    nothing there; a search takes neither."""
    given = {TOPK: ("top_k", topk), TOPP: ("top_p", topp)}
    if method in given:
        option, value = given[method]
        return {} if value == FILES else {option: value}
    for name, (_, value) in given.items():
        if value != FILES:
            raise RuntimeError(f"{name} is {value}; it is for sampling, and this call uses {method}")
    return {}


def _form(ids: str) -> Form:
    return next(form for form in FORMS if form.ids == ids)
