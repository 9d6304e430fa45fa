"""What LightSeq's model_conf means: from its fields to a configuration and back.

Protobuf cannot tell a field that is absent from one that is zero, so each release of LightSeq gives zero a
meaning of its own; that is decided here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from lightseq_backend.config import (
    BEAM_SEARCH,
    TOPK,
    TOPK_GREEDY,
    TOPP,
    Config,
    DecodingOptions,
    Dialect,
    GptConfig,
    TransformerConfig,
)
from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.weights.layout import GPT, TRANSFORMER, Sizes, layers_of, layout_of, sizes_of
from lightseq_backend.weights.schema import message_type

Check = Callable[[str, bool, str], None]  # field, whether its value holds, what it must be

V0_FIELDS = {
    TRANSFORMER: (
        "head_num",
        "beam_size",
        "extra_decode_length",
        "length_penalty",
        "src_padding_id",
        "trg_start_id",
    ),
    GPT: ("head_num", "src_padding_id"),
}
PERPLEXITY = "ppl"  # a GPT file made for scoring; here every GPT model scores, and generates as well
FILE_METHODS = {
    TRANSFORMER: (BEAM_SEARCH, TOPK, TOPP, TOPK_GREEDY),
    GPT: (TOPK, TOPP, BEAM_SEARCH, PERPLEXITY),
}


def read_config(
    kind: str, conf: Any, dialect: Dialect, sizes: dict[str, Sizes], layers: dict[str, int], faults: list[str]
) -> Config | None:
    """The configuration that a model_conf message gives, for tensors of these sizes.

    `faults` grows by one line a fault, under LightSeq's names. None when there are any, old ones included.
    """
    known = type(conf)()
    known.CopyFrom(conf)
    if dialect.name == "v0":
        for field in known.DESCRIPTOR.fields:
            if field.name not in V0_FIELDS[kind]:
                known.ClearField(field.name)
    read = _transformer if kind == TRANSFORMER else _gpt
    settings = read(known, dialect, sizes, layers)
    faults += _faults(kind, known, settings, sizes)
    if faults:
        return None
    try:
        return TransformerConfig(**settings) if kind == TRANSFORMER else GptConfig(**settings)
    except ConfigError as error:
        faults += str(error).splitlines()
        return None


def write_config(config: Config) -> bytes:
    """The serialized model_conf of a configuration.

    WeightError names every setting that such a file cannot hold, found by reading back what would be written.
    """
    faults: list[str] = []
    conf, back = _read_back(config, faults)
    if back is not None:
        faults += [*_differences(config, back), *_differences(config.decoding, back.decoding)]
    else:  # a decoding method that is none of LightSeq's must not hide what else it lacks
        plain = dataclasses.replace(config, decoding=DecodingOptions(FILE_METHODS[layout_of(config).kind][0], top_k=1))
        back = _read_back(plain, [])[1]
        faults += [] if back is None else _differences(plain, back)
    if faults:
        raise WeightError("\n".join(faults))
    return conf.SerializeToString(deterministic=True)


def _read_back(config: Config, faults: list[str]) -> tuple[Any, Config | None]:
    """The model_conf of a configuration, and what it reads as; None where `faults` grew."""
    layout = layout_of(config)
    values = _transformer_fields(config) if isinstance(config, TransformerConfig) else _gpt_fields(config)
    conf: Any = message_type(layout.conf_message)()
    try:
        for name, value in values.items():
            setattr(conf, name, value)
    except (TypeError, ValueError) as error:
        raise WeightError(f"model_conf.{name} cannot be {value!r}: {error}") from None
    found: list[str] = []
    back = read_config(layout.kind, conf, config.dialect, sizes_of(config), layers_of(config), found)
    faults += found
    return conf, back


def _transformer(conf: Any, dialect: Dialect, sizes: dict[str, Sizes], layers: dict[str, int]) -> dict[str, Any]:
    source, target = sizes["source"].values, sizes["target"].values
    vocabulary = target.get("V", 0)
    return {
        "hidden": target.get("h"),
        "inner": target.get("f"),
        "heads": conf.head_num,
        "encoder_layers": layers["encoder_stack"],
        "decoder_layers": layers["decoder_stack"],
        "source_vocabulary": source.get("V"),
        "target_vocabulary": target.get("V"),
        "max_positions": target.get("P"),
        "padding_id": conf.src_padding_id,
        "start_id": conf.trg_start_id,
        "end_id": conf.trg_end_id or vocabulary - 1,
        "extra_decode_length": conf.extra_decode_length,
        "post_norm": conf.is_post_ln,
        "activation": "gelu" if conf.use_gelu else "relu",
        "scaled_embedding": not conf.no_scale_embedding,
        "dialect": dialect,
        "decoding": DecodingOptions(
            sampling_method=conf.sampling_method or BEAM_SEARCH,
            beam_size=conf.beam_size,
            length_penalty=_shortest(conf.length_penalty),
            diverse_lambda=_shortest(conf.diverse_lambda),
            top_k=conf.topk,
            top_p=_shortest(conf.topp) if conf.topp or conf.sampling_method == TOPP else 1.0,
        ),
    }


def _gpt(conf: Any, dialect: Dialect, sizes: dict[str, Sizes], layers: dict[str, int]) -> dict[str, Any]:
    source = sizes["source"].values
    searches = conf.sampling_method == BEAM_SEARCH
    # Only LightSeq's new architecture searches with a GPT, so its zeros count then; else ours are as good.
    defaults = DecodingOptions(beam_size=1, length_penalty=1.0) if searches else DecodingOptions()
    return {
        "hidden": source.get("h"),
        "inner": source.get("f"),
        "heads": conf.head_num,
        "layers": layers["encoder_stack"],
        "vocabulary": source.get("V"),
        "max_positions": source.get("P"),
        "padding_id": conf.src_padding_id,
        # LightSeq leaves this uninitialised where a file says 0; the last id is what its Transformer would take.
        "end_id": conf.eos_id or source.get("V", 0) - 1,
        "extra_decode_length": conf.extra_decode_length,
        "dialect": dialect,
        "decoding": DecodingOptions(
            sampling_method=TOPK if conf.sampling_method in ("", PERPLEXITY) else conf.sampling_method,
            beam_size=conf.beam_size or defaults.beam_size,
            length_penalty=_shortest(conf.length_penalty) or defaults.length_penalty,
            diverse_lambda=_shortest(conf.diverse_lambda),
            top_k=conf.topk or 4,
            top_p=_shortest(conf.topp) or 0.75,
        ),
    }


def _transformer_fields(config: TransformerConfig) -> dict[str, Any]:
    options = config.decoding
    return {
        "head_num": config.heads,
        "beam_size": options.beam_size,
        "extra_decode_length": config.extra_decode_length,
        "length_penalty": options.length_penalty,
        "src_padding_id": config.padding_id,
        "trg_start_id": config.start_id,
        "diverse_lambda": options.diverse_lambda,
        "sampling_method": options.sampling_method,
        "topp": options.top_p,
        "topk": options.top_k,
        "trg_end_id": config.end_id,
        "is_post_ln": config.post_norm,
        "no_scale_embedding": not config.scaled_embedding,
        "use_gelu": config.activation == "gelu",
    }


def _gpt_fields(config: GptConfig) -> dict[str, Any]:
    options = config.decoding
    values: dict[str, Any] = {
        "head_num": config.heads,
        "src_padding_id": config.padding_id,
        "sampling_method": options.sampling_method,
        "topp": options.top_p,
        "topk": options.top_k,
        "eos_id": config.end_id,
        "extra_decode_length": config.extra_decode_length,
        "diverse_lambda": options.diverse_lambda,
    }
    default = DecodingOptions()
    searches = options.sampling_method == BEAM_SEARCH
    for name in ("beam_size", "length_penalty"):
        if searches or getattr(options, name) != getattr(default, name):
            values[name] = getattr(options, name)
    return values


def _faults(kind: str, conf: Any, settings: dict[str, Any], sizes: dict[str, Sizes]) -> list[str]:
    """One line a value that cannot be, under LightSeq's name. What cannot be judged without a size is left out."""
    faults: list[str] = []

    def check(name: str, holds: bool, limit: str) -> None:
        if not holds:
            faults.append(f"model_conf.{name} is {getattr(conf, name)!r}; it must be {limit}")

    hidden = settings["hidden"]
    if conf.head_num == 0:
        faults.append("model_conf.head_num is missing")
    else:
        check("head_num", conf.head_num > 0, "at least 1")
    if conf.head_num > 0 and hidden:
        check("head_num", hidden % conf.head_num == 0, f"a divisor of the hidden size, {hidden}")
    vocabulary = sizes["target" if kind == TRANSFORMER else "source"].values.get("V")
    if vocabulary:
        for name in ("trg_start_id", "trg_end_id") if kind == TRANSFORMER else ("eos_id",):
            check(name, 0 <= getattr(conf, name) < vocabulary, f"from 0 to {vocabulary - 1}, the last id")
    if kind == TRANSFORMER and conf.multilg_type:
        faults.append(f"model_conf.multilg_type is {conf.multilg_type}; multilingual models are not supported yet")
    _check_decoding(kind, conf, settings["decoding"], vocabulary, check)
    return faults


def _check_decoding(kind: str, conf: Any, options: DecodingOptions, vocabulary: int | None, check: Check) -> None:
    """Only what the file's own method uses: files often hold nonsense for the others, and LightSeq takes them."""
    method = options.sampling_method
    methods = FILE_METHODS[kind]
    check("sampling_method", (conf.sampling_method or method) in methods, f"one of {', '.join(methods)}")
    if method in (BEAM_SEARCH, TOPK_GREEDY):
        check("beam_size", options.beam_size >= 1, "at least 1")
        check("length_penalty", -10 <= options.length_penalty <= 10, "from -10 to 10")
    if method == BEAM_SEARCH:
        check("diverse_lambda", 0 <= options.diverse_lambda < np.inf, "a number from 0 up")
    if method == TOPK:
        most = vocabulary or 2**31 - 1
        check("topk", 1 <= options.top_k <= most, f"from 1 to {most}, the vocabulary")
    if method == TOPP:
        check("topp", 0 < options.top_p <= 1, "over 0 and at most 1")


def _differences(wanted: Any, back: Any) -> list[str]:
    faults = []
    for field in dataclasses.fields(wanted):
        if field.name in ("decoding", "positions", "position_offset"):  # of the last two it only lacks the word
            continue
        ours, theirs = getattr(wanted, field.name), getattr(back, field.name)
        same = np.float32(ours) == np.float32(theirs) if isinstance(ours, float) else ours == theirs
        if not same:
            faults.append(f"{field.name} is {ours!r}; LightSeq's format cannot hold that, it would read as {theirs!r}")
    return faults


def _shortest(value: float) -> float:
    """The number its author meant: 0.6, where a float32 holds 0.6000000238."""
    return float(str(np.float32(value)))
