"""A stream's parts: what is new since the last one, as ids and as text that is never taken back. No Triton."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightseq_backend.config import Config, DecodingOptions
from lightseq_backend.decoding import methods
from lightseq_backend.request import Decode, Output
from lightseq_backend.serving.wire import ALL, FINAL, FIRST_TOKEN, TEXT_OUTPUT, Wire, prompt_of_text, text_of
from lightseq_backend.text.tokenizer import NO_TOKEN

_CONTEXT = 8  # tokens that are decoded once more, so that what is new is read as what goes on


class Parts:
    """One stream. Joined, its parts are what was generated of the texts they belong to: the samples, or the best text
    of a search.

    decode  turns ids into text; None where no text is wanted
    """

    def __init__(
        self, wire: Wire, config: Config, row: np.ndarray, options: DecodingOptions, decode: Decode | None = None
    ) -> None:
        self._wire, self._config, self._row = wire, config, row
        self._decode = decode
        count = methods.texts(options)
        self._ends = [config.end_id, *options.end_ids]
        self._shown = [0] * count
        prompt = [] if decode is None else prompt_of_text(row, config)
        self._written = [] if decode is None else [Written(decode, prompt) for _ in range(count)]

    def part(self, texts: Sequence[np.ndarray]) -> dict[str, np.ndarray] | None:
        """The tensors of the next part; None where there is nothing to tell. texts: int32 [n] each, all so far."""
        written = None
        if self._decode is not None:
            written = [one.grown(self._spoken(text)) for one, text in zip(self._written, texts, strict=True)]
            if not any(written):
                return None  # the ids come with the text
        return self._tensors(texts, written)

    def rest(self, output: Output) -> dict[str, np.ndarray] | None:
        """The last part, which the answer follows."""
        hypotheses = output.hypotheses[: len(self._shown)]
        written = None
        if self._decode is not None:
            written = [
                one.completed(text_of(self._row, found, self._config, self._decode))
                for one, found in zip(self._written, hypotheses, strict=True)
            ]
        return self._tensors([found.tokens for found in hypotheses], written)

    def closing(self, output: Output) -> dict[str, np.ndarray]:
        """What an answer has beside what one without a stream has."""
        tensors = {FINAL: np.array([True])}
        if self._wire.tells_first_token and output.first_token is not None:
            tensors[FIRST_TOKEN] = np.array([output.first_token * 1e3], np.float32)
        return self._shaped(tensors)

    def _tensors(self, texts: Sequence[np.ndarray], written: list[str] | None) -> dict[str, np.ndarray] | None:
        new = [text[shown:] for text, shown in zip(texts, self._shown, strict=True)]
        width = max(map(len, new))
        if not width and not any(written or ()):
            return None
        self._shown = list(map(len, texts))
        ids = np.full((len(new), width), self._config.end_id, self._wire.ids_type)
        for row, tokens in zip(ids, new):
            row[: len(tokens)] = tokens
        form = self._wire.form
        tensors = {str(form.ids): ids if form.hypotheses == ALL or len(new) > 1 else ids[0]}
        if written is not None:
            tensors[TEXT_OUTPUT] = np.array(written, np.object_)
        tensors[FINAL] = np.array([False])
        return self._shaped(tensors)

    def _shaped(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: tensor[None] for name, tensor in tensors.items()} if self._wire.batched else tensors

    def _spoken(self, tokens: np.ndarray) -> list[int]:
        ends = np.flatnonzero(np.isin(tokens, self._ends))
        return [int(id_) for id_ in (tokens[: ends[0]] if ends.size else tokens)]


class Written:
    """The text of a growing list of ids, behind a prompt, as far as it is sure.

    What is told is told for good: a character is held back until all of its bytes are there, a blank until something
    follows it, for decoders may take it back.
    """

    def __init__(self, decode: Decode, prompt: list[int]):
        self._decode, self._prompt = decode, prompt
        self._read = len(prompt)  # ids whose text has been told
        self._told = ""

    def grown(self, tokens: list[int]) -> str:
        """What is new in the text of the prompt and all tokens so far."""
        ids = [*self._prompt, *tokens]
        start = max(0, self._read - _CONTEXT)
        before, now = self._decode(ids[start : self._read]), self._decode(ids[start:])
        if not now.startswith(before) or now == before or now.endswith(NO_TOKEN) or now[-1].isspace():
            return ""
        self._read = len(ids)
        self._told += now[len(before) :]
        return now[len(before) :]

    def completed(self, text: str) -> str:
        """What is still to be told of the whole text, its prompt included; nothing where that is read otherwise."""
        whole = text[len(self._decode(self._prompt)) :] if self._prompt else text
        return whole[len(self._told) :] if whole.startswith(self._told) else ""
