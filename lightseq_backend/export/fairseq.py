"""fairseq's Transformers: a checkpoint, read without running what it pickles, to a configuration and arrays of ours."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightseq_backend.config import LEARNED, SINUSOIDS, TABLE, Norms, TransformerConfig
from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.export import arrays
from lightseq_backend.export.checkpoint import Arrays, load_pickle, tensors_of
from lightseq_backend.export.model import Model
from lightseq_backend.options import STANDARD_BEAM, DecodingOptions

# In the order of preference.
FILES = ("model.pt", "checkpoint_best.pt", "checkpoint_last.pt")
ARCHITECTURES = ("transformer", "bart", "mbart")  # an architecture's name is one of these, perhaps with _more behind it
OTHER_MODELS = ("transformer_lm", "transformer_from_pretrained_xlm", "transformer_moe")
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu_erf",
    "gelu_fast": "gelu",
    "gelu_accurate": "gelu",
    "swish": "silu",
}
# What changes the arithmetic and is not done here, where it is anything but nothing.
NEVER = (
    "adaptive_input",
    "adaptive_softmax_cutoff",
    "base_layers",
    "char_inputs",
    "cross_self_attention",
    "decoder_layers_to_keep",
    "decoder_recurrent_stacking",
    "encoder_layers_to_keep",
    "encoder_recurrent_stacking",
    "no_cross_attention",
    "no_token_positional_embeddings",
    "use_factorized_embedding",
)
# Special tokens of every dictionary; generation begins with the end.
PADDING, END = 1, 2
MOST_POSITIONS = 1024  # where a checkpoint does not say
MOST_NEW = 200  # tokens: max_len_b of fairseq-generate
# Before a release of 2018 each layer's LayerNorms were numbered.
OLD_NORMS = {
    "encoder": ("self_attn_layer_norm", "final_layer_norm"),
    "decoder": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}


def find(source: Path) -> Path:
    """The checkpoint that a directory holds, or the file itself. ConfigError where it cannot be told."""
    if source.is_file():
        return source
    found = [source / name for name in FILES if (source / name).is_file()] or sorted(source.glob("*.pt"))[:2]
    if not found:
        raise ConfigError(f"{source} has no checkpoint; looked for {', '.join(FILES)}, *.pt")
    if len(found) > 1 and found[0].name not in FILES:
        raise ConfigError(f"{source} has several checkpoints, {found[0].name} among them: name one")
    return found[0]


def read(source: Path) -> Model:
    """The model of a checkpoint. ConfigError names every setting that is not supported, WeightError every bad array."""
    path = find(source)
    checkpoint = load_pickle(path, argparse.Namespace)
    state = checkpoint.get("model") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping):
        raise WeightError(f"{path} has no `model`; is it a fairseq checkpoint?")
    return convert(settings_of(checkpoint, path), tensors_of(state), path)


def settings_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The model's settings, flat: `args` of older checkpoints, `cfg.model` of newer ones."""
    found = checkpoint.get("args")
    if found is None and isinstance(checkpoint.get("cfg"), Mapping):
        found = checkpoint["cfg"].get("model")
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    if not isinstance(found, Mapping):
        raise WeightError(f"{path} has neither `args` nor `cfg.model`, which say what the model is")
    flat: dict[str, Any] = {}
    for key, value in found.items():
        if key in ("encoder", "decoder", "quant_noise") and isinstance(value, Mapping):
            flat |= {f"{key}_{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def convert(values: Mapping[str, Any], state: Mapping[str, np.ndarray], path: Path) -> Model:
    """A model of flat settings and arrays under fairseq's names; `path` is for messages. Errors as in `read`."""
    settings = Settings(values, path)
    settings.check()
    source = Arrays(renamed(state), "")
    config = _config(settings, state)
    made = arrays.tables(
        config, source, _table_names(settings, source), _scale(settings, config.hidden), _ties(settings)
    )
    made |= _positions(settings, config, source)
    made["output.bias"] = np.zeros(config.target_vocabulary, np.float32)
    made |= arrays.layers(config, source)
    source.finish(path, _known_to_be_spare)
    return Model(config, made, [], settings.get("source_lang"))


def renamed(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Older names made today's: queries, keys and values in one array, numbered LayerNorms, embed_out."""
    made = {}
    for name, array in state.items():
        joined = re.fullmatch(r"(.*_attn)\.in_proj_(weight|bias)", name)
        numbered = re.fullmatch(r"((encoder|decoder)\.layers\.\d+)\.layer_norms\.(\d)\.(weight|bias)", name)
        if joined and len(array) % 3 == 0:
            for part, piece in zip("qkv", np.split(array, 3)):
                made[f"{joined[1]}.{part}_proj.{joined[2]}"] = piece
        elif numbered and int(numbered[3]) < len(OLD_NORMS[numbered[2]]):
            made[f"{numbered[1]}.{OLD_NORMS[numbered[2]][int(numbered[3])]}.{numbered[4]}"] = array
        elif name == "decoder.embed_out":
            made["decoder.output_projection.weight"] = array
        else:
            made[name] = array
    return made


class Settings:
    """What a checkpoint says of its model, with fairseq's own defaults, and what of it is not supported."""

    def __init__(self, values: Mapping[str, Any], path: Path):
        self._values, self._path = values, path
        self.faults: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(key)
        return default if value is None else value

    def check(self) -> None:
        """Notes every setting that is not supported. ConfigError at once where the whole model is another one."""
        name = str(self.get("arch", self.get("_name", "transformer")))
        if name.startswith(OTHER_MODELS) or not re.fullmatch(f"({'|'.join(ARCHITECTURES)})(_.*)?", name):
            known = ", ".join(ARCHITECTURES)
            raise ConfigError(f"{self._path}: arch is {name!r}; this converts {known} and what is named after them")
        for key in NEVER:
            if self.get(key):
                self.faults.append(f"{key} is {self.get(key)!r}; that is not supported")
        for name in ("embed_dim", "ffn_embed_dim", "attention_heads"):
            self._alike(f"decoder_{name}", f"encoder_{name}")
        for name in ("decoder_input_dim", "decoder_output_dim"):
            if self.get(name) is not None:
                self._alike(name, "decoder_embed_dim")
        if self.get("activation_fn", "relu") not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            self.faults.append(f"activation_fn is {self.get('activation_fn')!r}; supported are {known}")

    def number(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        self.faults.append(f"{key} is {value!r}; it must be a whole number")
        return 1

    def fail(self, *more: str) -> None:
        """ConfigError with every fault, if there is one."""
        if self.faults or more:
            raise ConfigError("\n  ".join([f"{self._path} cannot be converted:", *self.faults, *more]))

    def _alike(self, key: str, other: str) -> None:
        if (self.get(key) or None) != (self.get(other) or None):
            self.faults.append(f"{key} is {self.get(key)!r} and {other} {self.get(other)!r}; they must be the same")


def _config(settings: Settings, state: Mapping[str, np.ndarray]) -> TransformerConfig:
    encoder, decoder = (_norms(settings, stack) for stack in ("encoder", "decoder"))
    learned = {bool(settings.get(f"{stack}_learned_pos", False)) for stack in ("encoder", "decoder")}
    sizes: dict[str, Any] = {
        ours: settings.number(theirs)
        for ours, theirs in (
            ("hidden", "encoder_embed_dim"),
            ("inner", "encoder_ffn_embed_dim"),
            ("heads", "encoder_attention_heads"),
            ("encoder_layers", "encoder_layers"),
            ("decoder_layers", "decoder_layers"),
        )
    }
    settings.fail()
    for side, stack in (("source", "encoder"), ("target", "decoder")):
        table = state.get(f"{stack}.embed_tokens.weight")
        if table is None:
            raise WeightError(f"{stack}.embed_tokens.weight is missing: this is no Transformer of fairseq's")
        sizes[f"{side}_vocabulary"] = len(table)
    try:
        return TransformerConfig(
            **sizes,
            max_positions=min(settings.get(f"max_{side}_positions", MOST_POSITIONS) for side in ("source", "target")),
            padding_id=PADDING,
            start_id=END,
            end_id=END,
            extra_decode_length=MOST_NEW,
            post_norm=encoder.post,
            **{f"decoder_{name}_norm": own for name, own in decoder._asdict().items() if decoder != encoder},
            positions=TABLE if len(learned) > 1 else LEARNED if learned == {True} else SINUSOIDS,
            position_offset=PADDING + 1,
            activation=ACTIVATIONS[settings.get("activation_fn", "relu")],
            scaled_embedding=not settings.get("no_scale_embedding", False) and _ties(settings),
            norm_epsilon=arrays.EPSILON,
            first_norm=encoder.first,
            decoder_final_norm=decoder.post or not settings.get("no_decoder_final_norm", False),
            embedding_norm=encoder.embedding,
            never_id=PADDING,
            decoding=DecodingOptions(STANDARD_BEAM, beam_size=5, length_penalty=1.0, early_stopping=True),
        )
    except ConfigError as error:
        settings.fail(*str(error).splitlines())
        raise


def _norms(settings: Settings, stack: str) -> Norms:
    post, embedding = not settings.get(f"{stack}_normalize_before", False), settings.get("layernorm_embedding", False)
    return Norms(post, bool(embedding or not post), bool(embedding and not post))


def _scale(settings: Settings, hidden: int) -> float:
    return 1.0 if settings.get("no_scale_embedding", False) else math.sqrt(hidden)


def _ties(settings: Settings) -> bool:
    """Whether the decoder's token table is the output projection too."""
    shared = ("share_all_embeddings", "share_decoder_input_output_embed")
    return any(settings.get(key, False) for key in shared)


def _table_names(settings: Settings, source: Arrays) -> tuple[str, str, str]:
    encoder, decoder = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
    output = "decoder.output_projection.weight"
    if settings.get("share_all_embeddings", False):
        table = source.alike("share_all_embeddings", encoder, decoder, output)
        return table, table, table
    if _ties(settings):
        decoder = output = source.alike("share_decoder_input_output_embed", decoder, output)
    return encoder, decoder, output


def _positions(settings: Settings, config: TransformerConfig, source: Arrays) -> dict[str, np.ndarray]:
    """Positions are counted from the row behind padding's, whether they were learned or not."""
    first, rows = config.position_offset, config.max_positions
    sinusoids = arrays.fairseq_sinusoids(first + rows, config.hidden)[first:]
    made = {}
    for side, stack in (("source", "encoder"), ("target", "decoder")):
        table = sinusoids
        if settings.get(f"{stack}_learned_pos", False):
            most = settings.get(f"max_{side}_positions", MOST_POSITIONS)
            table = arrays.learned_positions(source, stack, most, config.hidden, first)[:rows]
        made[f"{side}.positions"] = table
    return made


def _known_to_be_spare(name: str) -> bool:
    """Versions of the stacks, tables that are computed here, and what release 0.12.2 keeps beside each encoder layer's
    arrays for PyTorch's fused layer: it is made anew of them when a checkpoint is loaded, and stale in the file."""
    spare = r"(en|de)coder\.(version|embed_positions\.(weights|_float_tensor))"
    fused = r"encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)"
    return bool(re.fullmatch(f"{spare}|{fused}", name))
