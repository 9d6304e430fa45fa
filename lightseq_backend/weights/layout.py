"""Which field of a LightSeq file is which array of a model, and its shape: the one table that load and save share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from lightseq_backend.config import Config, TransformerConfig

TRANSFORMER = "transformer"
GPT = "gpt"
KINDS = (TRANSFORMER, GPT)

# What LightSeq calls the sizes, and what they are called in messages.
SIZE_NAMES = {
    "h": "hidden size",
    "f": "FFN inner size",
    "V": "vocabulary",
    "P": "positions",
    "N": "decoder layers",
}


@dataclass(frozen=True)
class Tensor:
    """One field of many numbers.

    field  LightSeq's name
    name   ours; an array of its part if the part is a layer, else a name of the whole model. With a star it
           is one array in the file and one a decoder layer in the model: the star is the layer's number
    shape  sizes of the axes, outermost first, for example "h 3h"; the axis "N" is the one a star cuts
    clip   of an int8 file: the field beside it that says what its bytes stand for; "" where it has floats
    """

    field: str
    name: str
    shape: str
    clip: str = ""


@dataclass(frozen=True)
class Part:
    """One submessage of the file. Layers are repeated; their arrays are called `prefix.{index}.{name}`.

    side  "source" or "target": the parts of one side share their sizes, and only N is another side's
    """

    field: str
    side: str
    prefix: str
    tensors: tuple[Tensor, ...]

    @property
    def repeated(self) -> bool:
        return bool(self.prefix)


@dataclass(frozen=True)
class Layout:
    """A kind of model in one of LightSeq's two forms, floats or int8. views: arrays that load adds, each the transposed
    view of another; save ignores them."""

    kind: str
    message: str
    conf_message: str
    parts: tuple[Part, ...]
    views: dict[str, str]
    int8: bool = False


@dataclass(frozen=True)
class Entry:
    """A Tensor of one particular file: its path there, and its array's name (with a star as in Tensor)."""

    part: str
    index: int
    path: str
    name: str
    tensor: Tensor
    side: str

    @property
    def clip_path(self) -> str:
        """Where the clip_max of a tensor of bytes is."""
        return f"{self.path.rpartition('.')[0]}.{self.tensor.clip}"


@dataclass
class Sizes:
    """The sizes of one side by LightSeq's letter; one that cannot be told is missing."""

    values: dict[str, int] = field(default_factory=dict)

    def shape(self, text: str) -> tuple[int, ...] | None:
        """ "h 3h" with h = 4 is (4, 12); None when a size is missing."""
        axes = [_axis(axis) for axis in text.split()]
        if any(letter not in self.values for _, letter in axes):
            return None
        return tuple(factor * self.values[letter] for factor, letter in axes)

    def infer(self, letter: str, entries: list[Entry], counts: Mapping[str, int]) -> None:
        """Set `letter` to what most tensors say: then a single wrong tensor is one fault and not dozens.

        Of two values with equal support the one that comes first in the file wins; LightSeq looks there.
        """
        votes: Counter[int] = Counter()
        for entry in entries:
            count = counts[entry.path]
            axes = [_axis(axis) for axis in entry.tensor.shape.split()]
            known = [factor if name == letter else factor * self.values.get(name, 0) for factor, name in axes]
            once = sum(name == letter for _, name in axes) == 1
            if once and count and prod(known) and count % prod(known) == 0:
                votes[count // prod(known)] += 1
        if votes:
            self.values[letter] = votes.most_common(1)[0][0]


def _axis(text: str) -> tuple[int, str]:
    """ "3h" is (3, "h")."""
    return int(text[:-1] or 1), text[-1]


def _norm(field_prefix: str, name: str) -> tuple[Tensor, ...]:
    return (Tensor(f"{field_prefix}_scale", f"{name}.gain", "h"), Tensor(f"{field_prefix}_bias", f"{name}.bias", "h"))


def _linear(fields: str, name: str, wide: str, narrow: str = "h") -> tuple[Tensor, ...]:
    """A kernel [narrow, wide] and its bias; `fields` has a star where LightSeq puts "kernel" or "bias"."""
    return (
        Tensor(fields.replace("*", "kernel"), f"{name}.weight", f"{narrow} {wide}"),
        Tensor(fields.replace("*", "bias"), f"{name}.bias", wide),
    )


_FFN = (
    *_norm("ffn_norm", "ffn_norm"),
    *_linear("ffn_first_*", "ffn_inner", "f"),
    *_linear("ffn_second_*", "ffn_output", "h", narrow="f"),
)
_ENCODER_LAYER = (
    *_norm("multihead_norm", "attention_norm"),
    *_linear("multihead_project_*_qkv", "attention_qkv", "3h"),
    *_linear("multihead_project_*_output", "attention_output", "h"),
    *_FFN,
)
_DECODER_LAYER = (
    *_norm("self_norm", "self_norm"),
    *_linear("self_project_*_qkv", "self_qkv", "3h"),
    *_linear("self_project_*_output", "self_output", "h"),
    *_norm("encdec_norm", "cross_norm"),
    *_linear("encdec_project_*_q", "cross_query", "h"),
    *_linear("encdec_project_*_output", "cross_output", "h"),
    *_FFN,
)
_SOURCE_EMBEDDING = (
    Tensor("token_embedding", "source.tokens", "V h"),
    Tensor("position_embedding", "source.positions", "P h"),
    *_norm("norm", "encoder.norm"),
)
_TARGET_EMBEDDING = (
    Tensor("token_embedding", "output.weight", "h V"),
    Tensor("position_embedding", "target.positions", "P h"),
    *_norm("norm", "decoder.norm"),
    # [h, N, 2, h] in every release, whatever the comment in LightSeq's later .proto says.
    Tensor("encode_output_project_kernel_kv", "decoder.*.cross_kv.weight", "h N 2h"),
    Tensor("encode_output_project_bias_kv", "decoder.*.cross_kv.bias", "N 2h"),
    Tensor("shared_bias", "output.bias", "V"),
)
_GPT_EMBEDDING = (
    Tensor("token_embedding", "tokens", "V h"),
    Tensor("position_embedding", "positions", "P h"),
    *_norm("norm", "norm"),
)

LAYOUTS = {
    TRANSFORMER: Layout(
        TRANSFORMER,
        "Transformer",
        "ModelConf",
        (
            Part("src_embedding", "source", "", _SOURCE_EMBEDDING),
            Part("encoder_stack", "source", "encoder", _ENCODER_LAYER),
            Part("trg_embedding", "target", "", _TARGET_EMBEDDING),
            Part("decoder_stack", "target", "decoder", _DECODER_LAYER),
        ),
        {"target.tokens": "output.weight"},
    ),
    GPT: Layout(
        GPT,
        "Gpt",
        "GptModelConf",
        (
            Part("src_embedding", "source", "", _GPT_EMBEDDING),
            Part("encoder_stack", "source", "layer", _ENCODER_LAYER),
        ),
        {"output.weight": "tokens"},
    ),
}


def _of_bytes(tensor: Tensor) -> Tensor:
    if tensor.field == "token_embedding":
        return replace(tensor, clip="emb_clip_max")
    return replace(tensor, clip=f"{tensor.field}_clip_max") if "kernel" in tensor.field else tensor


def _int8(layout: Layout, **changes: Any) -> Layout:
    parts = [replace(part, tensors=tuple(map(_of_bytes, part.tensors))) for part in layout.parts]
    return replace(layout, message=f"Quant{layout.message}", parts=tuple(parts), int8=True, **changes)


# A GPT's token table is [h, V] there.
_GPT_INT8_EMBEDDING = (Tensor("token_embedding", "output.weight", "h V"), *_GPT_EMBEDDING[1:])
_GPT_INT8_PARTS = (replace(LAYOUTS[GPT].parts[0], tensors=_GPT_INT8_EMBEDDING), *LAYOUTS[GPT].parts[1:])
INT8_LAYOUTS = {
    TRANSFORMER: _int8(LAYOUTS[TRANSFORMER]),
    GPT: _int8(replace(LAYOUTS[GPT], parts=_GPT_INT8_PARTS), views={"tokens": "output.weight"}),
}


def entries(layout: Layout, layers: dict[str, int]) -> Iterator[Entry]:
    """Every tensor of a model, in the order of the file. layers: how many of each repeated part there are."""
    for part in layout.parts:
        for index in range(layers[part.field]) if part.repeated else (0,):
            path = f"{part.field}[{index}]" if part.repeated else part.field
            prefix = f"{part.prefix}.{index}." if part.repeated else ""
            for tensor in part.tensors:
                yield Entry(part.field, index, f"{path}.{tensor.field}", prefix + tensor.name, tensor, part.side)


def layout_of(config: Config) -> Layout:
    return LAYOUTS[TRANSFORMER if isinstance(config, TransformerConfig) else GPT]


def layers_of(config: Config) -> dict[str, int]:
    """How many of each repeated part a model of this configuration has."""
    if isinstance(config, TransformerConfig):
        return {"encoder_stack": config.encoder_layers, "decoder_stack": config.decoder_layers}
    return {"encoder_stack": config.layers}


def sizes_of(config: Config) -> dict[str, Sizes]:
    """The sizes of each side of a model of this configuration."""
    shared = {"h": config.hidden, "f": config.inner, "P": config.max_positions}
    if isinstance(config, TransformerConfig):
        target = {**shared, "V": config.target_vocabulary, "N": config.decoder_layers}
        return {"source": Sizes({**shared, "V": config.source_vocabulary}), "target": Sizes(target)}
    return {"source": Sizes({**shared, "V": config.vocabulary})}


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Every array that a model of this configuration is built from, views included, and its shape."""
    layout, sizes = layout_of(config), sizes_of(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries(layout, layers_of(config)):
        shape = sizes[entry.side].shape(entry.tensor.shape)
        assert shape is not None
        if "*" not in entry.name:
            shapes[entry.name] = shape
            continue
        cut = entry.tensor.shape.split().index("N")
        for layer in range(shape[cut]):
            shapes[entry.name.replace("*", str(layer))] = shape[:cut] + shape[cut + 1 :]
    for name, of in layout.views.items():
        shapes[name] = shapes[of][::-1]
    absent: list[str] = []
    if isinstance(config, TransformerConfig):
        absent += [] if config.encoder_final_norm else ["encoder.norm"]
        absent += [] if config.decoder_final_norm else ["decoder.norm"]
        for norms, embedding, first in (
            (config.encoder_norms, "source.norm", "encoder.0.attention_norm"),
            (config.decoder_norms, "target.norm", "decoder.0.self_norm"),
        ):
            if norms.embedding:
                shapes |= {f"{embedding}.{part}": (config.hidden,) for part in ("gain", "bias")}
            absent += [] if norms.first else [first]
    elif not config.final_norm:
        absent.append("norm")
    for norm in absent:
        del shapes[f"{norm}.gain"], shapes[f"{norm}.bias"]
    return shapes


def array_faults(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> list[str]:
    """What is wrong with an array of that name that must be float32, or float16, and of that shape."""
    if array is None:
        return [f"{name} is missing"]
    if array.shape != shape or array.dtype not in (np.float32, np.float16):
        return [f"{name} is {array.dtype} {list(array.shape)}; it must be float32 {list(shape)}"]
    return []
