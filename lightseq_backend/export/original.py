"""The original of a converted model, run by Hugging Face's transformers on the CPU in float32."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lightseq_backend.config import Config, GptConfig
from lightseq_backend.errors import ConfigError

Ids = Sequence[int]


def missing_packages() -> list[str]:
    """What must be installed to run originals, and is not."""
    return [name for name in ("torch", "transformers") if find_spec(name) is None]


class Original:
    """config: of the converted model; the original is asked for plain greedy decoding, without rules of its own but
    that one id is never generated."""

    def __init__(self, source: str | Path, config: Config):
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        gpt = isinstance(config, GptConfig)
        made = transformers.AutoModelForCausalLM if gpt else transformers.AutoModelForSeq2SeqLM
        try:
            self._model = made.from_pretrained(str(source), dtype=torch.float32, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"transformers cannot load {source}: {error}") from None
        self._torch, self._gpt = torch, gpt
        self._start: list[int] = []  # what the decoder is fed before it generates
        if not isinstance(config, GptConfig):
            self._start = [config.start_id, *([] if config.forced_id is None else [config.forced_id])]
        never = None if config.banned_id < 0 else [[config.banned_id]]
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            num_beams=1,
            eos_token_id=[config.end_id, *config.decoding.end_ids],
            pad_token_id=config.end_id if gpt else config.padding_id,
            decoder_start_token_id=self._start[0] if self._start else None,
            forced_bos_token_id=self._start[1] if len(self._start) > 1 else None,
            bad_words_ids=never,
        )

    def encode(self, ids: Ids) -> np.ndarray:
        """The encoder's output, float32 [ids, hidden]."""
        with self._torch.no_grad():
            return self._numpy(self._model.get_encoder()(self._row(ids)).last_hidden_state[0])

    def logits(self, ids: Ids, grown: Ids = ()) -> np.ndarray:
        """Scores of the token after ids (or the start token) and what has grown so far: float32 [vocabulary]."""
        with self._torch.no_grad():
            if self._gpt:
                return self._numpy(self._model(self._row([*ids, *grown])).logits[0, -1])
            fed = self._row([*self._start, *grown])
            return self._numpy(self._model(input_ids=self._row(ids), decoder_input_ids=fed).logits[0, -1])

    def greedy(self, ids: Ids, steps: int) -> list[int]:
        """The best token after the best token, at most so many, up to and with the end id."""
        row = self._row(ids)
        with self._torch.no_grad():
            most = steps + max(0, len(self._start) - 1)  # what is forced counts there
            grown = self._model.generate(row, attention_mask=self._torch.ones_like(row), max_new_tokens=most)[0]
        new: list[int] = grown[len(ids) if self._gpt else len(self._start) :].tolist()
        return new

    def _row(self, ids: Sequence[int]) -> Any:
        return self._torch.tensor([list(ids)])

    @staticmethod
    def _numpy(tensor: Any) -> np.ndarray:
        array: np.ndarray = tensor.float().numpy()
        return array
