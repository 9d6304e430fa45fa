"""A converted MarianMT model written back as the Hugging Face directory that it was, for other engines to read."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import huggingface_layers, huggingface_settings
from lightseq_backend import local, weights
from lightseq_backend.config import TransformerConfig

TOKENIZER = ("source.spm", "target.spm", "vocab.json")


def save(model: Path, target: Path) -> None:
    """`model`, a directory that `lightseq convert` made of a MarianMT directory, as such a directory again.

    Needs torch and transformers. The weights are stored in float32; config.json's beams are those of `model`.
    """
    import torch
    from transformers import MarianMTModel

    config, arrays = weights.load(local.find(model).weights)
    if not isinstance(config, TransformerConfig) or not config.post_norm or config.first_norm:
        raise ValueError(f"{model} is no converted MarianMT model")
    theirs = MarianMTModel(settings(config))
    state = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in _state(config, arrays).items()}
    spare = theirs.load_state_dict(state, strict=False)
    missing = [name for name in spare.missing_keys if "embed_positions" not in name and "embed_tokens" not in name]
    if spare.unexpected_keys or missing != ["lm_head.weight"]:
        raise ValueError(f"transformers names other weights: {spare.unexpected_keys}, and lacks {missing}")
    theirs.generation_config.update(
        bad_words_ids=[[config.padding_id]], num_beams=config.decoding.beam_size, max_length=config.max_positions
    )
    theirs.save_pretrained(target)
    for name in TOKENIZER:
        shutil.copy(model / name, target / name)


def settings(config: TransformerConfig) -> Any:
    """config.json of it."""
    from transformers import MarianConfig

    return MarianConfig(
        decoder_vocab_size=config.target_vocabulary,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
        bos_token_id=config.end_id,
        forced_eos_token_id=config.end_id,
        **huggingface_settings(config),
    )


def _state(config: TransformerConfig, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "model.shared.weight": arrays["source.tokens"].astype(np.float32) / math.sqrt(config.hidden),
        "final_logits_bias": arrays["output.bias"][None],
        **huggingface_layers(config, _with_norms_behind(config, arrays)),
    }


def _with_norms_behind(config: TransformerConfig, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`arrays`, each LayerNorm under the name of the sublayer that it stands behind: one sublayer back."""
    moved = dict(arrays)
    for stack, sublayers, layers in (
        ("encoder", ("attention", "ffn"), config.encoder_layers),
        ("decoder", ("self", "cross", "ffn"), config.decoder_layers),
    ):
        names = [f"{stack}.{layer}.{name}_norm" for layer in range(layers) for name in sublayers]
        for behind, before in zip(names, [*names[1:], f"{stack}.norm"], strict=True):
            moved |= {f"{behind}.{part}": arrays[f"{before}.{part}"] for part in ("gain", "bias")}
    return moved
