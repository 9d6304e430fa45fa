"""Tiny random models in fairseq's form, made from those of transformers that compute the same.

fairseq itself is not needed: FSMT is the port of its post-norm models, M2M100 computes its pre-norm ones, BART and
mBART those with learned positions and a LayerNorm after the embeddings.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from small_checkpoints import QUERY_SCALE, build

FOLDER = Path(__file__).parent / "checkpoints" / "fairseq"
POSITIONS = 28
_FSMT = {
    "langs": ["de", "en"],
    "src_vocab_size": 37,
    "tgt_vocab_size": 41,
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
# Name -> the family of transformers, changes to its settings, and what fairseq's settings say beyond the sizes.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "post": ("fsmt", {}, {"arch": "transformer_wmt_en_de", "source_lang": "de", "target_lang": "en"}),
    "post, tied": (
        "fsmt", {"tie_word_embeddings": True, "activation_function": "gelu"},
        {"arch": "transformer_iwslt_de_en", "activation_fn": "gelu", "share_decoder_input_output_embed": True},
    ),
    "post, unscaled": ("fsmt", {"scale_embedding": False}, {"arch": "transformer", "no_scale_embedding": True}),
    "pre": (
        "m2m_100", {},
        {"arch": "transformer_vaswani_wmt_en_de_big", "share_all_embeddings": True,
         "encoder_normalize_before": True, "decoder_normalize_before": True},
    ),
    "learned": (
        "bart", {},
        {"arch": "bart_large", "activation_fn": "gelu", "layernorm_embedding": True, "no_scale_embedding": True,
         "share_all_embeddings": True, "share_decoder_input_output_embed": True,
         "encoder_learned_pos": True, "decoder_learned_pos": True},
    ),
    "learned, pre": (
        "mbart", {"decoder_start_token_id": 2},
        {"arch": "mbart_large", "activation_fn": "gelu", "layernorm_embedding": True, "share_all_embeddings": True,
         "encoder_learned_pos": True, "decoder_learned_pos": True,
         "encoder_normalize_before": True, "decoder_normalize_before": True},
    ),
}  # fmt: skip
COMMITTED = ("post", "pre")  # of which what is expected lies in FOLDER


def original(name: str) -> Any:
    """The model of transformers."""
    family, changes, _ = MODELS[name]
    model = _fsmt(changes) if family == "fsmt" else build(family, **changes)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.zero_()  # fairseq has none
    return model


def settings(name: str, **changes: Any) -> dict[str, Any]:
    sizes = {
        f"{stack}_{key}": value
        for stack in ("encoder", "decoder")
        for key, value in (("embed_dim", 16), ("ffn_embed_dim", 20), ("layers", 2), ("attention_heads", 4))
    }
    dimensions = {"decoder_input_dim": 16, "decoder_output_dim": 16}
    positions = {"max_source_positions": POSITIONS, "max_target_positions": POSITIONS}
    plain = {"adaptive_softmax_cutoff": None, "no_cross_attention": False, "encoder_layers_to_keep": None}
    return {**sizes, **dimensions, **positions, **plain, "dropout": 0.3, **MODELS[name][2], **changes}


def state(name: str, model: Any = None) -> dict[str, Any]:
    """A model's tensors under fairseq's names; model: another than `original`. Sinusoids are not kept there."""
    import torch

    spare = {"shared.weight", "lm_head.weight", "final_logits_bias"}
    if not MODELS[name][2].get("encoder_learned_pos"):
        spare |= {f"{stack}.embed_positions.weight" for stack in ("encoder", "decoder")}
    tensors = {path.removeprefix("model."): tensor for path, tensor in (model or original(name)).state_dict().items()}
    made = {path: tensor for path, tensor in tensors.items() if path not in spare}
    made["encoder.version"] = made["decoder.version"] = torch.tensor([3.0])
    made["encoder.embed_positions._float_tensor"] = torch.zeros(1)
    table = "decoder.embed_tokens.weight"
    made.setdefault("decoder.output_projection.weight", made[table])
    return made


def checkpoint(name: str, old: bool, **changes: Any) -> dict[str, Any]:
    """What fairseq's trainer saves. old: settings as `args`, and names as they were before 2019."""
    values, tensors = settings(name, **changes), state(name)
    if not old:
        return {"args": None, "cfg": {"model": argparse.Namespace(**values), "seed": 1}, "model": tensors}
    return {"args": argparse.Namespace(**values), "model": aged(tensors), "optimizer_history": [{"num_updates": 7}]}


def aged(tensors: dict[str, Any]) -> dict[str, Any]:
    """Queries, keys and values in one tensor, LayerNorms by number."""
    import torch

    made = {}
    for name, tensor in tensors.items():
        stack, _, rest = name.partition(".")
        if ".q_proj." in name:
            names = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
            made[name.replace("q_proj.", "in_proj_")] = torch.cat([tensors[each] for each in names])
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        elif "layer_norm" in rest and rest.startswith("layers."):
            norm = name.split(".")[3]
            numbers = {"self_attn_layer_norm": 0, "encoder_attn_layer_norm": 1, "final_layer_norm": 1}
            number = 2 if stack == "decoder" and norm == "final_layer_norm" else numbers[norm]
            made[name.replace(norm, f"layer_norms.{number}")] = tensor
        else:
            made[name] = tensor
    return made


def _fsmt(changes: dict[str, Any]) -> Any:
    import torch
    import transformers

    torch.manual_seed(7)
    model = transformers.FSMTForConditionalGeneration(transformers.FSMTConfig(**{**_FSMT, **changes}))
    for path, parameter in model.named_parameters():
        if "embed" in path or "output_projection" in path:
            continue
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.data.mul_(QUERY_SCALE if "q_proj" in path or "k_proj" in path else 1.5)
    return model.eval()
