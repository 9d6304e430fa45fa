"""Tiny random models of every family that can be converted, saved as Hugging Face's transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "checkpoints"
VOCABULARY = 37
POSITIONS = 28
_GPT2 = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 24}
_SIZES = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "init_std": 0.3,
    "forced_eos_token_id": None,
}
_MARIAN_IDS = {"pad_token_id": 36, "decoder_start_token_id": 36, "eos_token_id": 0}
# Name -> classes of transformers, and settings.
CHECKPOINTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel",
        {**_GPT2, "eos_token_id": 36, "bos_token_id": 36, "initializer_range": 0.3},
    ),
    "marian": (
        "MarianConfig", "MarianMTModel",
        {**_SIZES, **_MARIAN_IDS, "activation_function": "swish", "scale_embedding": True},
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", _SIZES),
    "mbart": (
        "MBartConfig", "MBartForConditionalGeneration",
        {**_SIZES, "decoder_start_token_id": 5, "scale_embedding": True},
    ),
    "m2m_100": ("M2M100Config", "M2M100ForConditionalGeneration", _SIZES),
    "pegasus": (
        "PegasusConfig", "PegasusForConditionalGeneration",
        {**_SIZES, "activation_function": "relu", "scale_embedding": True},
    ),
}  # fmt: skip


QUERY_SCALE = 3
SEEDS = {"gpt2": 1, "marian": 4, "bart": 4, "mbart": 5, "m2m_100": 3, "pegasus": 3}  # their texts vary


def build(name: str, **changes: Any) -> Any:
    """The model of a checkpoint, with changes to its settings; its norms and biases are random as well.

    Queries and keys are large, and positions: else a model with tied tables says its last token again and again.
    """
    import torch
    import transformers

    of_config, of_model, settings = CHECKPOINTS[name]
    torch.manual_seed(SEEDS[name])
    model = getattr(transformers, of_model)(getattr(transformers, of_config)(**{**settings, **changes}))
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        elif "embed_positions" in path or "wpe" in path:
            parameter.data.mul_(2)
        elif not any(part in path for part in ("embed", "shared", "wte", "lm_head")):
            parameter.data.mul_(QUERY_SCALE if any(part in path for part in ("q_proj", "k_proj", "c_attn")) else 1.5)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(0.5 * torch.randn_like(model.final_logits_bias))
    if name == "marian":
        model.generation_config.bad_words_ids = [[36]]
    return model.eval()


def save(name: str, folder: Path, half: bool = False, **options: Any) -> None:
    model = build(name)
    (model.half() if half else model).save_pretrained(folder, **options)
