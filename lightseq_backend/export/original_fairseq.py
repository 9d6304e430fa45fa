"""The original of a converted checkpoint, built and run by fairseq itself on the CPU in float32.

fairseq is not asked to load the file: it gets the settings and the tensors that export/checkpoint.py has read.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np

from lightseq_backend.config import Config, TransformerConfig

Ids = Sequence[int]

# Texts among a checkpoint's settings that fairseq may see.
TEXTS = ("_name", "activation_fn", "arch", "pooler_activation_fn", "task")


def is_installed() -> bool:
    return find_spec("fairseq") is not None


def build(settings: Mapping[str, Any], state: Mapping[str, Any], config: Config) -> tuple[Original | None, str]:
    """The model of flat settings and tensors under fairseq's names; None where an installed fairseq cannot be imported,
    or builds no model of these that runs, and in a few words why. config: of the converted model."""
    version = ""
    try:
        with _logging_left_alone():
            import fairseq

        version = f" {getattr(fairseq, '__version__', '')}".rstrip()
        original = Original(settings, state, config)
        original.logits([config.end_id])
        original.greedy([config.end_id], 1)
    except Exception as error:  # an old release beside new Python and PyTorch fails in many ways
        said = next((f": {line.strip()}" for line in str(error).splitlines() if line.strip()), "")
        return None, f"fairseq{version} cannot run it, {type(error).__name__}{said}"
    return original, f"fairseq{version}"


class Original:
    """It generates with fairseq's own SequenceGenerator, one beam and no rules but that padding is never generated."""

    def __init__(self, settings: Mapping[str, Any], state: Mapping[str, Any], config: Config):
        import torch
        from fairseq import models
        from fairseq.sequence_generator import SequenceGenerator

        assert isinstance(config, TransformerConfig)
        self._torch, self._generator = torch, SequenceGenerator
        self._start, self._end = config.start_id, config.end_id
        self._forced = [] if config.forced_id is None else [config.forced_id]
        source, self._target = (_dictionary(len(state[f"{stack}.embed_tokens.weight"])) for stack in _STACKS)
        task = argparse.Namespace(source_dictionary=source, target_dictionary=self._target)
        self._model = models.build_model(_arguments(settings), task)
        self._model.load_state_dict(dict(state), strict=True)
        self._model.float().eval()

    def encode(self, ids: Ids) -> np.ndarray:
        """The encoder's output, float32 [ids, hidden]."""
        return self._numpy(self._encoded(ids)["encoder_out"][0][:, 0])

    def logits(self, ids: Ids, grown: Ids = ()) -> np.ndarray:
        """Scores of the token after the start token and what has grown so far: float32 [vocabulary]."""
        fed = self._row([self._start, *self._forced, *grown])
        with self._torch.no_grad():
            return self._numpy(self._model.decoder(fed, encoder_out=self._encoded(ids))[0][0, -1])

    def greedy(self, ids: Ids, steps: int) -> list[int]:
        """The best token after the best token, at most so many, up to and with the end id."""
        most = len(self._forced) + steps  # behind that many it appends the end id
        generator = self._generator([self._model], self._target, beam_size=1, max_len_b=most, min_len=0, eos=self._end)
        sample = {"net_input": {"src_tokens": self._row(ids), "src_lengths": self._torch.tensor([len(ids)])}}
        forced = self._row(self._forced) if self._forced else None
        with self._torch.no_grad():
            found = generator.generate([self._model], sample, prefix_tokens=forced)[0][0]["tokens"]
        grown: list[int] = found.tolist()[len(self._forced) : most]
        return grown

    def _encoded(self, ids: Ids) -> Any:
        with self._torch.no_grad():
            return self._model.encoder(self._row(ids), src_lengths=self._torch.tensor([len(ids)]))

    def _row(self, ids: Ids) -> Any:
        return self._torch.tensor([list(ids)])

    @staticmethod
    def _numpy(tensor: Any) -> np.ndarray:
        array: np.ndarray = tensor.float().numpy()
        return array


_STACKS = ("encoder", "decoder")


@contextmanager
def _logging_left_alone() -> Iterator[None]:
    """fairseq's import sets up the root logger, and tells it what else could be installed."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = root.handlers[:], root.level
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)


def _dictionary(size: int) -> Any:
    """One of so many words, whatever they are: a model only asks how many, and for the special ones' ids."""
    from fairseq.data import Dictionary

    made = Dictionary()
    for number in range(len(made), size):
        made.add_symbol(f"word{number}")
    return made


def _arguments(settings: Mapping[str, Any]) -> argparse.Namespace:
    """Numbers and truth values as they are. Of the texts only names: others fairseq may open as files or evaluate."""
    kept = {
        name: value
        for name, value in settings.items()
        if value is None or isinstance(value, int | float) or (name in TEXTS and isinstance(value, str))
    }
    return argparse.Namespace(**{"arch": "transformer", **kept})
