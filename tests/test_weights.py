"""Weight files: what LightSeq's format says, read and written; the oracle is protobuf's own runtime."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import weight_files as files
from weight_files import gpt_message, transformer_message, written

from lightseq_backend import weights
from lightseq_backend.__main__ import main
from lightseq_backend.config import DIALECTS, DecodingOptions, GptConfig, TransformerConfig
from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.weights import protobuf, schema, wire
from lightseq_backend.weights.describe import describe

H, F, P, VS, VT, N = files.HIDDEN, files.INNER, files.POSITIONS, files.SOURCE, files.TARGET, files.DECODERS


def faults_of(path: Path, **arguments: Any) -> list[str]:
    """The lines of the WeightError that loading this file raises, without the headline."""
    with pytest.raises(WeightError) as error:
        weights.load(path, **arguments)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


# Golden files: written by LightSeq's own exporter conventions.


@pytest.mark.parametrize("name", files.golden_names())
def test_golden_file_comes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    path = files.golden(name)
    weights.save(tmp_path / name, *weights.load(path))
    assert (tmp_path / name).read_bytes() == path.read_bytes()


def test_golden_transformer_config_is_what_the_runtime_reads() -> None:
    config, _ = weights.load(files.golden("t05_postln_bart.pb"))
    assert isinstance(config, TransformerConfig)
    assert (config.hidden, config.heads, config.start_id, config.end_id, config.padding_id) == (32, 4, 2, 2, 1)
    assert (config.post_norm, config.scaled_embedding, config.activation) == (True, False, "gelu")
    assert (config.decoding.beam_size, config.decoding.length_penalty) == (4, 1.0)


def test_golden_gpt_config_is_what_the_runtime_reads() -> None:
    config, _ = weights.load(files.golden("g02_pad_out.pb"))
    assert isinstance(config, GptConfig)
    assert (config.hidden, config.heads, config.padding_id, config.end_id) == (48, 4, 120, 119)
    assert (config.decoding.sampling_method, config.decoding.top_k, config.decoding.top_p) == ("topk", 1, 0.75)


# Arrays: the runtime's numbers under our names and shapes.

FLAT = {
    "source.tokens": ("src_embedding.token_embedding", (VS, H)),
    "source.positions": ("src_embedding.position_embedding", (P, H)),
    "encoder.norm.gain": ("src_embedding.norm_scale", (H,)),
    "encoder.norm.bias": ("src_embedding.norm_bias", (H,)),
    "target.positions": ("trg_embedding.position_embedding", (P, H)),
    "output.weight": ("trg_embedding.token_embedding", (H, VT)),
    "output.bias": ("trg_embedding.shared_bias", (VT,)),
    "decoder.norm.gain": ("trg_embedding.norm_scale", (H,)),
    "decoder.norm.bias": ("trg_embedding.norm_bias", (H,)),
}
FFN = {
    "ffn_norm.gain": ("ffn_norm_scale", (H,)),
    "ffn_norm.bias": ("ffn_norm_bias", (H,)),
    "ffn_inner.weight": ("ffn_first_kernel", (H, F)),
    "ffn_inner.bias": ("ffn_first_bias", (F,)),
    "ffn_output.weight": ("ffn_second_kernel", (F, H)),
    "ffn_output.bias": ("ffn_second_bias", (H,)),
}
ENCODER = {
    "attention_norm.gain": ("multihead_norm_scale", (H,)),
    "attention_norm.bias": ("multihead_norm_bias", (H,)),
    "attention_qkv.weight": ("multihead_project_kernel_qkv", (H, 3 * H)),
    "attention_qkv.bias": ("multihead_project_bias_qkv", (3 * H,)),
    "attention_output.weight": ("multihead_project_kernel_output", (H, H)),
    "attention_output.bias": ("multihead_project_bias_output", (H,)),
    **FFN,
}
DECODER = {
    "self_norm.gain": ("self_norm_scale", (H,)),
    "self_norm.bias": ("self_norm_bias", (H,)),
    "self_qkv.weight": ("self_project_kernel_qkv", (H, 3 * H)),
    "self_qkv.bias": ("self_project_bias_qkv", (3 * H,)),
    "self_output.weight": ("self_project_kernel_output", (H, H)),
    "self_output.bias": ("self_project_bias_output", (H,)),
    "cross_norm.gain": ("encdec_norm_scale", (H,)),
    "cross_norm.bias": ("encdec_norm_bias", (H,)),
    "cross_query.weight": ("encdec_project_kernel_q", (H, H)),
    "cross_query.bias": ("encdec_project_bias_q", (H,)),
    "cross_output.weight": ("encdec_project_kernel_output", (H, H)),
    "cross_output.bias": ("encdec_project_bias_output", (H,)),
    **FFN,
}


def expected_transformer(message: Any) -> dict[str, np.ndarray]:
    """What `load` must give for a message of weight_files, taken from the message by the runtime."""
    arrays = {}
    for name, (path, shape) in FLAT.items():
        part, field = path.split(".")
        arrays[name] = np.array(getattr(getattr(message, part), field), np.float32).reshape(shape)
    for prefix, stack, table in (
        ("encoder", message.encoder_stack, ENCODER),
        ("decoder", message.decoder_stack, DECODER),
    ):
        for index, layer in enumerate(stack):
            for name, (field, shape) in table.items():
                arrays[f"{prefix}.{index}.{name}"] = np.array(getattr(layer, field), np.float32).reshape(shape)
    arrays["target.tokens"] = arrays["output.weight"].T
    kernel = np.array(message.trg_embedding.encode_output_project_kernel_kv, np.float32)
    bias = np.array(message.trg_embedding.encode_output_project_bias_kv, np.float32)
    for layer in range(N):
        arrays[f"decoder.{layer}.cross_kv.weight"] = kernel.reshape(H, N, 2 * H)[:, layer]
        arrays[f"decoder.{layer}.cross_kv.bias"] = bias.reshape(N, 2 * H)[layer]
    return arrays


def expected_gpt(message: Any) -> dict[str, np.ndarray]:
    embedding = message.src_embedding
    arrays = {
        "tokens": np.array(embedding.token_embedding, np.float32).reshape(VS, H),
        "positions": np.array(embedding.position_embedding, np.float32).reshape(P, H),
        "norm.gain": np.array(embedding.norm_scale, np.float32),
        "norm.bias": np.array(embedding.norm_bias, np.float32),
    }
    arrays["output.weight"] = arrays["tokens"].T
    for index, layer in enumerate(message.encoder_stack):
        for name, (field, shape) in ENCODER.items():
            arrays[f"layer.{index}.{name}"] = np.array(getattr(layer, field), np.float32).reshape(shape)
    return arrays


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_transformer_arrays_are_the_runtimes_numbers(tmp_path: Path) -> None:
    message = transformer_message()
    _, arrays = weights.load(written(tmp_path / "transformer.pb", message))
    assert_same(arrays, expected_transformer(message))


def test_gpt_arrays_are_the_runtimes_numbers(tmp_path: Path) -> None:
    message = gpt_message()
    _, arrays = weights.load(written(tmp_path / "gpt.pb", message))
    assert_same(arrays, expected_gpt(message))


def test_arrays_are_float32(tmp_path: Path) -> None:
    _, arrays = weights.load(written(tmp_path / "transformer.pb", transformer_message()))
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}


def test_arrays_are_aligned_for_vector_loads(tmp_path: Path) -> None:
    _, arrays = weights.load(written(tmp_path / "gpt.pb", gpt_message()))
    assert {array.ctypes.data % 64 for array in arrays.values()} == {0}


def test_target_tokens_share_memory_with_output_weight(tmp_path: Path) -> None:
    _, arrays = weights.load(written(tmp_path / "transformer.pb", transformer_message()))
    assert np.shares_memory(arrays["target.tokens"], arrays["output.weight"])


def test_cross_keys_and_values_of_all_layers_share_one_array(tmp_path: Path) -> None:
    _, arrays = weights.load(written(tmp_path / "transformer.pb", transformer_message()))
    first, second = (arrays[f"decoder.{layer}.cross_kv.weight"] for layer in (0, 1))
    assert second.ctypes.data - first.ctypes.data == 2 * H * 4


# Forms of the wire that a reader must take.


def varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def chunk(number: int, content: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(content)) + content


def rebuilt(message: Any, floats: Callable[[int, list[float]], bytes]) -> bytes:
    """A message serialized anew, with each of its repeated float fields in a form of the caller's."""
    out = b""
    for field, value in message.ListFields():
        if field.message_type is None:
            out += floats(field.number, list(value))
        elif field.name == "model_conf":
            out += chunk(field.number, value.SerializeToString())
        else:
            for part in value if field.name.endswith("_stack") else [value]:
                out += chunk(field.number, rebuilt(part, floats))
    return out


def packed(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def unpacked_form(number: int, values: list[float]) -> bytes:
    return b"".join(varint(number * 8 + 5) + packed([value]) for value in values)


def split_form(number: int, values: list[float]) -> bytes:
    return chunk(number, packed(values[:3])) + chunk(number, b"") + chunk(number, packed(values[3:]))


def mixed_form(number: int, values: list[float]) -> bytes:
    return chunk(number, packed(values[:2])) + unpacked_form(number, values[2:5]) + chunk(number, packed(values[5:]))


@pytest.mark.parametrize("form", [unpacked_form, split_form, mixed_form])
def test_floats_load_in_every_form_of_the_wire(form: Callable[[int, list[float]], bytes], tmp_path: Path) -> None:
    message = transformer_message()
    (tmp_path / "transformer.pb").write_bytes(rebuilt(message, form))
    assert_same(weights.load(tmp_path / "transformer.pb")[1], expected_transformer(message))


def test_fields_in_reverse_order_load(tmp_path: Path) -> None:
    message = transformer_message()
    parts = [chunk(5, message.model_conf.SerializeToString())]
    parts += [chunk(4, layer.SerializeToString()) for layer in message.decoder_stack]
    parts += [chunk(3, message.trg_embedding.SerializeToString())]
    parts += [chunk(2, layer.SerializeToString()) for layer in message.encoder_stack]
    parts += [chunk(1, message.src_embedding.SerializeToString())]
    (tmp_path / "transformer.pb").write_bytes(b"".join(parts))
    assert_same(weights.load(tmp_path / "transformer.pb")[1], expected_transformer(message))


def test_unknown_fields_are_passed_over(tmp_path: Path) -> None:
    group = varint(19 * 8 + 3) + chunk(7, b"abc") + varint(6 * 8 + 3) + varint(6 * 8 + 4) + varint(19 * 8 + 4)
    unknown = varint(16 * 8) + varint(300) + varint(17 * 8 + 1) + bytes(8) + varint(18 * 8 + 5) + bytes(4) + group
    message = gpt_message()
    data = unknown + message.SerializeToString() + chunk(900, b"anything") + chunk(2, unknown)[:0]
    conf = chunk(3, unknown + message.model_conf.SerializeToString())
    (tmp_path / "gpt.pb").write_bytes(data + conf)
    assert_same(weights.load(tmp_path / "gpt.pb")[1], expected_gpt(message))


def test_submessage_in_two_pieces_is_merged(tmp_path: Path) -> None:
    message, rest = gpt_message(src_padding_id=3), schema.message_type("Gpt")()
    rest.src_embedding.norm_bias.extend(message.src_embedding.norm_bias)
    rest.model_conf.eos_id = 2
    del message.src_embedding.norm_bias[:]
    (tmp_path / "gpt.pb").write_bytes(message.SerializeToString() + rest.SerializeToString())
    config, arrays = weights.load(tmp_path / "gpt.pb")
    assert (config.padding_id, config.end_id, arrays["norm.bias"].shape) == (3, 2, (H,))


# What model_conf means.


def transformer_config(tmp_path: Path, dialect: str = "head", **conf: Any) -> TransformerConfig:
    config, _ = weights.load(written(tmp_path / "transformer.pb", transformer_message(**conf)), dialect)
    assert isinstance(config, TransformerConfig)
    return config


def gpt_config(tmp_path: Path, dialect: str = "head", **conf: Any) -> GptConfig:
    config, _ = weights.load(written(tmp_path / "gpt.pb", gpt_message(**conf)), dialect)
    assert isinstance(config, GptConfig)
    return config


def test_transformer_sizes_come_from_the_tensors(tmp_path: Path) -> None:
    config = transformer_config(tmp_path)
    found = (config.hidden, config.inner, config.heads, config.max_positions)
    layers = (config.encoder_layers, config.decoder_layers)
    assert (found, layers) == ((8, 12, 2, 7), (2, 3))
    assert (config.source_vocabulary, config.target_vocabulary) == (11, 13)


def test_transformer_fields_left_out_have_lightseqs_defaults(tmp_path: Path) -> None:
    config = transformer_config(tmp_path)
    assert config.end_id == VT - 1
    assert (config.padding_id, config.extra_decode_length) == (0, 0)
    assert (config.post_norm, config.activation, config.scaled_embedding) == (False, "relu", True)
    assert (config.decoding.sampling_method, config.decoding.length_penalty) == ("beam_search", 0.0)


def test_transformer_end_id_of_the_file_holds_under_head(tmp_path: Path) -> None:
    assert transformer_config(tmp_path, trg_end_id=4).end_id == 4


def test_transformer_end_id_is_the_last_under_v0(tmp_path: Path) -> None:
    assert transformer_config(tmp_path, "v0", trg_end_id=4).end_id == VT - 1


def test_v0_reads_only_the_fields_it_had(tmp_path: Path) -> None:
    later = {"is_post_ln": True, "use_gelu": True, "no_scale_embedding": True, "sampling_method": "topk", "topk": 4}
    config = transformer_config(tmp_path, "v0", length_penalty=0.6, **later)
    assert (config.post_norm, config.activation, config.scaled_embedding) == (False, "relu", True)
    assert config.decoding == DecodingOptions("beam_search", beam_size=4, length_penalty=0.6)


def test_dialect_is_part_of_the_config(tmp_path: Path) -> None:
    assert transformer_config(tmp_path, "v0").dialect.norm_epsilon == 1e-6


def test_unknown_dialect_is_a_config_error(tmp_path: Path) -> None:
    path = written(tmp_path / "transformer.pb", transformer_message())
    with pytest.raises(ConfigError, match="known dialects are head, v0"):
        weights.load(path, "v1")


def test_length_penalty_is_the_number_its_author_wrote(tmp_path: Path) -> None:
    assert transformer_config(tmp_path, length_penalty=0.6).decoding.length_penalty == 0.6


def test_transformer_sampling_fields_are_read(tmp_path: Path) -> None:
    options = transformer_config(tmp_path, sampling_method="topp", topp=0.9, topk=3, diverse_lambda=0.5).decoding
    assert (options.sampling_method, options.top_p, options.top_k, options.diverse_lambda) == ("topp", 0.9, 3, 0.5)


def test_gpt_fields_left_out_have_lightseqs_defaults(tmp_path: Path) -> None:
    config = gpt_config(tmp_path)
    options = config.decoding
    assert (config.end_id, config.padding_id, config.extra_decode_length) == (VS - 1, 0, 0)
    assert (options.sampling_method, options.top_k, options.top_p) == ("topk", 4, 0.75)


def test_gpt_under_v0_has_only_heads_and_padding(tmp_path: Path) -> None:
    config = gpt_config(tmp_path, "v0", src_padding_id=3, eos_id=2, topk=2, extra_decode_length=5)
    assert (config.padding_id, config.end_id, config.extra_decode_length) == (3, VS - 1, 0)
    assert config.decoding.top_k == 4


def test_gpt_padding_id_may_lie_outside_the_vocabulary(tmp_path: Path) -> None:
    assert gpt_config(tmp_path, src_padding_id=50257).padding_id == 50257


def test_gpt_made_for_perplexity_generates_by_topk(tmp_path: Path) -> None:
    assert gpt_config(tmp_path, sampling_method="ppl").decoding.sampling_method == "topk"


def test_gpt_beam_search_has_the_new_architectures_defaults(tmp_path: Path) -> None:
    options = gpt_config(tmp_path, sampling_method="beam_search").decoding
    assert (options.sampling_method, options.beam_size, options.length_penalty) == ("beam_search", 1, 1.0)


# Which kind of file it is.


@pytest.mark.parametrize(("make", "config"), [(transformer_message, TransformerConfig), (gpt_message, GptConfig)])
def test_kind_comes_from_the_content(make: Callable[[], Any], config: type, tmp_path: Path) -> None:
    assert type(weights.load(written(tmp_path / "model.bin", make()))[0]) is config


def test_kind_in_the_content_beats_the_file_name(tmp_path: Path) -> None:
    assert isinstance(weights.load(written(tmp_path / "gpt.pb", transformer_message()))[0], TransformerConfig)


def test_gpt_asked_for_as_transformer_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "gpt.pb", gpt_message())
    assert faults_of(path, kind="transformer") == ["this looks like a gpt file, not a transformer file"]


def test_transformer_asked_for_as_gpt_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "transformer.pb", transformer_message())
    assert faults_of(path, kind="gpt") == ["this looks like a transformer file, not a gpt file"]


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "gpt.pb", gpt_message())
    assert faults_of(path, kind="bert") == ["kind is 'bert'; kinds are transformer, gpt"]


# Faults.


def broken_transformer(tmp_path: Path, change: Callable[[Any], None], **conf: Any) -> Path:
    message = transformer_message(**conf)
    change(message)
    return written(tmp_path / "transformer.pb", message)


def test_missing_tensor_is_named_by_lightseqs_path(tmp_path: Path) -> None:
    path = broken_transformer(tmp_path, lambda m: m.decoder_stack[2].ClearField("ffn_first_kernel"))
    assert faults_of(path) == ["decoder_stack[2].ffn_first_kernel is missing"]


@pytest.mark.parametrize(
    ("part", "field", "count", "fault"),
    [
        ("src_embedding", "norm_scale", 7, "src_embedding.norm_scale has 7 values; [8] takes 8"),
        ("src_embedding", "position_embedding", 48, "source and target disagree on the positions: 6 and 7"),
        ("trg_embedding", "shared_bias", 12, "trg_embedding.shared_bias has 12 values; [13] takes 13"),
        (
            "trg_embedding",
            "encode_output_project_kernel_kv",
            300,
            "trg_embedding.encode_output_project_kernel_kv has 300 values; [8, 3, 16] takes 384",
        ),
        (
            "src_embedding",
            "token_embedding",
            87,
            "src_embedding.token_embedding has 87 values; they do not make [V, h]",
        ),
    ],
)
def test_tensor_of_a_wrong_size_is_one_fault(part: str, field: str, count: int, fault: str, tmp_path: Path) -> None:
    path = broken_transformer(tmp_path, lambda m: getattr(getattr(m, part), field).__delitem__(slice(count, None)))
    assert faults_of(path) == [fault]


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    def change(message: Any) -> None:
        message.encoder_stack[1].ClearField("ffn_second_bias")
        message.decoder_stack[0].self_norm_scale.append(1.0)
        message.trg_embedding.ClearField("shared_bias")

    path = broken_transformer(tmp_path, change, head_num=3, trg_start_id=13, trg_end_id=99, sampling_method="best")
    assert set(faults_of(path)) == {
        "encoder_stack[1].ffn_second_bias is missing",
        "decoder_stack[0].self_norm_scale has 9 values; [8] takes 8",
        "trg_embedding.shared_bias is missing",
        "model_conf.head_num is 3; it must be a divisor of the hidden size, 8",
        "model_conf.trg_start_id is 13; it must be from 0 to 12, the last id",
        "model_conf.trg_end_id is 99; it must be from 0 to 12, the last id",
        "model_conf.sampling_method is 'best'; it must be one of beam_search, topk, topp, topk_greedy",
    }


def test_source_and_target_of_different_hidden_size_are_one_fault(tmp_path: Path) -> None:
    narrow = transformer_message()
    for part, counts in [
        (narrow.src_embedding, {**files.SOURCE_COUNTS, "token_embedding": 44, "position_embedding": 28}),
        *((layer, files.ENCODER_COUNTS) for layer in narrow.encoder_stack),
    ]:
        for field, count in counts.items():
            # Every size linear in the hidden size halves, those quadratic in it quarter.
            square = field in ("multihead_project_kernel_qkv", "multihead_project_kernel_output")
            keep = {"token_embedding": 44, "position_embedding": 28, "ffn_first_bias": 12}.get(field)
            del getattr(part, field)[keep or (count // 4 if square else count // 2) :]
    path = written(tmp_path / "transformer.pb", narrow)
    assert faults_of(path) == ["source and target disagree on the hidden size: 4 and 8"]


@pytest.mark.parametrize(
    ("field", "fault"),
    [
        ("src_embedding", "src_embedding is missing"),
        ("encoder_stack", "encoder_stack has no layers"),
        ("model_conf", "model_conf is missing"),
    ],
)
def test_missing_part_is_one_fault(field: str, fault: str, tmp_path: Path) -> None:
    assert faults_of(broken_transformer(tmp_path, lambda m: m.ClearField(field))) == [fault]


def test_transformer_without_decoder_layers_is_refused(tmp_path: Path) -> None:
    path = broken_transformer(tmp_path, lambda m: m.ClearField("decoder_stack"))
    assert "decoder_stack has no layers" in faults_of(path)


@pytest.mark.parametrize(
    ("conf", "fault"),
    [
        ({"head_num": 0}, "model_conf.head_num is missing"),
        ({"head_num": -2}, "model_conf.head_num is -2; it must be at least 1"),
        ({"beam_size": 0}, "model_conf.beam_size is 0; it must be at least 1"),
        ({"multilg_type": 2}, "model_conf.multilg_type is 2; multilingual models are not supported yet"),
        ({"sampling_method": "topk"}, "model_conf.topk is 0; it must be from 1 to 13, the vocabulary"),
        ({"sampling_method": "topp"}, "model_conf.topp is 0.0; it must be over 0 and at most 1"),
        ({"length_penalty": float("nan")}, "model_conf.length_penalty is nan; it must be from -10 to 10"),
        ({"diverse_lambda": -1.0}, "model_conf.diverse_lambda is -1.0; it must be a number from 0 up"),
        ({"trg_start_id": -1}, "model_conf.trg_start_id is -1; it must be from 0 to 12, the last id"),
    ],
)
def test_bad_setting_of_a_transformer_is_refused(conf: dict[str, Any], fault: str, tmp_path: Path) -> None:
    assert faults_of(written(tmp_path / "transformer.pb", transformer_message(**conf))) == [fault]


@pytest.mark.parametrize(
    ("conf", "fault"),
    [
        ({"eos_id": 11}, "model_conf.eos_id is 11; it must be from 0 to 10, the last id"),
        (
            {"sampling_method": "topk_greedy"},
            "model_conf.sampling_method is 'topk_greedy'; it must be one of topk, topp, beam_search, ppl",
        ),
        ({"topk": 12}, "model_conf.topk is 12; it must be from 1 to 11, the vocabulary"),
    ],
)
def test_bad_setting_of_a_gpt_is_refused(conf: dict[str, Any], fault: str, tmp_path: Path) -> None:
    assert faults_of(written(tmp_path / "gpt.pb", gpt_message(**conf))) == [fault]


def test_int8_tensor_is_recognised(tmp_path: Path) -> None:
    message = gpt_message()
    data = message.SerializeToString()
    kernel = packed(list(message.encoder_stack[0].ffn_first_kernel))
    first = message.encoder_stack[0].SerializeToString()
    quantised = first.replace(chunk(9, kernel), chunk(9, bytes(H * F)))
    (tmp_path / "gpt.pb").write_bytes(data.replace(chunk(2, first), chunk(2, quantised)))
    assert faults_of(tmp_path / "gpt.pb") == [
        "encoder_stack[0].ffn_first_kernel has 24 values; [8, 12] takes 96; "
        "one byte a value, as in LightSeq's int8 files"
    ]


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert faults_of(tmp_path / "transformer.pb") == ["there is no such file"]


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "transformer.pb").touch()
    assert faults_of(tmp_path / "transformer.pb") == ["the file is empty"]


def test_folder_is_refused(tmp_path: Path) -> None:
    assert faults_of(tmp_path) == ["the file cannot be read: Is a directory"]


def test_truncated_file_says_where_it_ends(tmp_path: Path) -> None:
    data = transformer_message().SerializeToString()
    (tmp_path / "transformer.pb").write_bytes(data[: len(data) // 2])
    assert faults_of(tmp_path / "transformer.pb") == [
        "decoder_stack[0]: 2813 bytes are announced at byte 7479 and 487 are left; the file is cut short or damaged"
    ]


@pytest.mark.parametrize("content", [b"not a weight file\n" * 99, b"\x89HDF\r\n\x1a\n" + bytes(99), bytes(999)])
def test_other_formats_are_no_protobuf(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "transformer.pb").write_bytes(content)
    (fault,) = faults_of(tmp_path / "transformer.pb")
    assert "not a protobuf" in fault


def test_protobuf_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "transformer.pb").write_bytes(chunk(90, b"something else"))
    (fault,) = faults_of(tmp_path / "transformer.pb")
    assert fault == "nothing in it is part of a LightSeq transformer; is it a weight file?"


def test_float_field_of_odd_bytes_is_a_fault(tmp_path: Path) -> None:
    data = gpt_message().SerializeToString() + chunk(1, chunk(4, b"abc"))
    (tmp_path / "gpt.pb").write_bytes(data)
    assert faults_of(tmp_path / "gpt.pb") == ["src_embedding.norm_bias: 3 bytes are no whole number of floats"]


def test_endless_empty_layers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gpt.pb").write_bytes(gpt_message().SerializeToString() + chunk(2, b"") * 100_000)
    assert faults_of(tmp_path / "gpt.pb") == ["encoder_stack has more than 4096 entries; the file is damaged"]


def test_text_that_is_no_utf8_is_a_fault(tmp_path: Path) -> None:
    data = gpt_message().SerializeToString() + chunk(3, chunk(3, b"\xff\xfe"))
    (tmp_path / "gpt.pb").write_bytes(data)
    (fault,) = faults_of(tmp_path / "gpt.pb")
    assert fault.startswith("model_conf cannot be read")


@pytest.mark.parametrize("make", [transformer_message, gpt_message])
def test_damaged_file_loads_or_is_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    """Flipped bits everywhere, most of them where the structure is: nothing but a WeightError may come of it."""
    whole = make().SerializeToString()
    path = tmp_path / "model.pb"
    chance = random.Random(7)
    slowest = 0.0
    for attempt in range(400):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 1, 5, 50))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        if attempt % 4 == 0:
            del data[chance.randrange(len(data)) :]
        path.write_bytes(data)
        start = time.perf_counter()
        try:
            _, arrays = weights.load(path)
            assert sum(array.nbytes for array in arrays.values()) < 3 * len(whole)
        except WeightError:
            pass
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 5


@pytest.mark.parametrize("make", [transformer_message, gpt_message])
def test_damaged_structure_loads_or_is_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    """Every value of a byte that is a tag or a length, for the first tags of the file and all of model_conf."""
    message = make()
    whole = message.SerializeToString()
    path = tmp_path / "model.pb"
    tail = len(message.model_conf.SerializeToString()) + 2
    for position in [0, 1, 2, 3, 4, 5, *range(len(whole) - tail, len(whole))]:
        for value in range(0, 256, 5):
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            with suppress(WeightError):
                weights.load(path)


# Writing.


@pytest.mark.parametrize("make", [transformer_message, gpt_message])
def test_saved_file_is_what_the_runtime_would_write(make: Callable[..., Any], tmp_path: Path) -> None:
    conf: dict[str, Any] = {
        "sampling_method": "topk",
        "topk": 3,
        "topp": 0.5,
        "src_padding_id": 1,
        "extra_decode_length": 9,
    }
    end = {"eos_id": 3} if make is gpt_message else {"trg_end_id": 3}
    message = make(**conf, **end)
    path = written(tmp_path / "in.pb", message)
    weights.save(tmp_path / "out.pb", *weights.load(path))
    assert type(message).FromString((tmp_path / "out.pb").read_bytes()) == message


def test_saved_arrays_come_from_views_and_copies_alike(tmp_path: Path) -> None:
    config, arrays = weights.load(written(tmp_path / "in.pb", transformer_message()))
    copies = {name: np.array(array, order="F") for name, array in arrays.items() if name != "target.tokens"}
    weights.save(tmp_path / "views.pb", config, arrays)
    weights.save(tmp_path / "copies.pb", config, copies)
    assert (tmp_path / "views.pb").read_bytes() == (tmp_path / "copies.pb").read_bytes()


@pytest.mark.parametrize("dialect", ["head", "v0"])
@pytest.mark.parametrize("make", [transformer_message, gpt_message])
def test_saved_config_is_loaded_again(make: Callable[..., Any], dialect: str, tmp_path: Path) -> None:
    config, arrays = weights.load(written(tmp_path / "in.pb", make(src_padding_id=2)), dialect)
    weights.save(tmp_path / "out.pb", config, arrays)
    assert weights.load(tmp_path / "out.pb", dialect)[0] == config


def test_save_names_every_bad_array(tmp_path: Path) -> None:
    config, arrays = weights.load(written(tmp_path / "in.pb", gpt_message()))
    arrays["layer.0.ffn_norm.gain"] = np.ones(9, np.float32)
    arrays["norm.bias"] = np.ones(8, np.float64)
    arrays["layer.7.ffn_norm.gain"] = arrays.pop("positions")
    with pytest.raises(WeightError) as error:
        weights.save(tmp_path / "out.pb", config, arrays)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "positions is missing",
        "norm.bias is float64 [8]; it must be float32 [8]",
        "layer.0.ffn_norm.gain is float32 [9]; it must be float32 [8]",
        "layer.7.ffn_norm.gain is no array of such a model",
    ]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"end_id": 0}, "end_id is 0"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"decoding": DecodingOptions("topk", top_k=2, top_p=0.75, temperature=0.5)}, "temperature is 0.5"),
        ({"decoding": DecodingOptions("sample", top_p=0.75)}, "model_conf.sampling_method is 'sample'"),
        ({"padding_id": 2**31}, "model_conf.src_padding_id cannot be 2147483648"),
    ],
)
def test_save_refuses_what_the_format_cannot_hold(change: dict[str, Any], fault: str, tmp_path: Path) -> None:
    config, arrays = weights.load(written(tmp_path / "in.pb", gpt_message()))
    with pytest.raises(WeightError, match=fault):
        weights.save(tmp_path / "out.pb", replace(config, **change), arrays)


def test_refused_save_leaves_no_file(tmp_path: Path) -> None:
    config, _ = weights.load(written(tmp_path / "in.pb", gpt_message()))
    with pytest.raises(WeightError):
        weights.save(tmp_path / "out.pb", config, {})
    assert [path.name for path in tmp_path.iterdir()] == ["in.pb"]


# Large files.

LOAD_AND_REPORT = """
import resource, sys
from lightseq_backend import weights
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
config, arrays = weights.load(sys.argv[1])
held = sum(array.nbytes for name, array in arrays.items() if name != "output.weight")
assert arrays["tokens"][-1, -1] == 42
print(held, peak() - before - held)
"""


def sparse_gpt(path: Path, vocabulary: int, **conf: Any) -> Path:
    """A GPT file whose token table is a hole in the file, but for its last value, 42."""
    message = gpt_message(**conf)
    message.src_embedding.ClearField("token_embedding")
    rest = message.src_embedding.SerializeToString()
    table = vocabulary * H * 4
    head = varint(1 * 8 + 2) + varint(table)
    message.ClearField("src_embedding")
    with path.open("wb") as file:
        file.write(varint(1 * 8 + 2) + varint(len(head) + table + len(rest)) + head)
        file.seek(table - 4, 1)
        file.write(packed([42.0]) + rest + message.SerializeToString())
    return path


def test_file_over_two_gigabytes_is_read_to_its_end(tmp_path: Path) -> None:
    contents = protobuf.examine(sparse_gpt(tmp_path / "gpt.pb", 69_000_000), DIALECTS["head"])
    assert isinstance(contents.config, GptConfig)
    assert contents.config.vocabulary == 69_000_000
    (table,), after = (contents.runs[each.entry.path] for each in contents.tensors[:2])
    last = wire.Floats(table.start + 4 * (table.count - 1), 1, 4)
    # Reading the hole itself would take seconds.
    np.testing.assert_array_equal(wire.copy_floats(contents.file, [last]), [42])
    np.testing.assert_array_equal(
        wire.copy_floats(contents.file, after), np.float32(gpt_message().src_embedding.position_embedding)
    )


def test_loading_needs_little_memory_beside_the_arrays(tmp_path: Path) -> None:
    path = sparse_gpt(tmp_path / "gpt.pb", 12_000_000)
    command = [sys.executable, "-c", LOAD_AND_REPORT, str(path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
    held, spare = map(float, result.stdout.split())
    assert held > 384e6
    assert spare < 100e6


def test_file_over_two_gigabytes_is_written_with_true_lengths(tmp_path: Path) -> None:
    conf = {"sampling_method": "topk", "topp": 0.75, "topk": 4, "eos_id": 10}
    path = sparse_gpt(tmp_path / "gpt.pb", 69_000_000, **conf)
    config, arrays = weights.load(written(tmp_path / "small.pb", gpt_message(**conf)))
    assert isinstance(config, GptConfig)
    arrays["tokens"] = np.zeros((69_000_000, H), np.float32)  # untouched, so it takes no memory
    del arrays["output.weight"]
    pieces = list(protobuf.serialize(replace(config, vocabulary=69_000_000), arrays))
    start = b"".join(bytes(piece) for piece in pieces[:2])
    with path.open("rb") as file:
        assert start == file.read(len(start))
    assert sum(len(piece) for piece in pieces) == path.stat().st_size


# The schema.


def test_compiled_schema_is_that_of_the_proto_files() -> None:
    pytest.importorskip("grpc_tools")
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    from lightseq_backend.weights.compile_schema import compile_schema

    committed = FileDescriptorSet.FromString(schema.COMPILED.read_bytes())
    assert FileDescriptorSet.FromString(compile_schema()) == committed


def test_schema_leaves_the_default_pool_alone() -> None:
    """Another package's transformer_pb2 with the same names must still load in this process."""
    from google.protobuf import descriptor_pool

    schema.message_type("Transformer")
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("Transformer")


# The command line.


def test_description_counts_parameters(tmp_path: Path) -> None:
    message = gpt_message()
    count = sum(files.SOURCE_COUNTS.values()) + 2 * sum(files.ENCODER_COUNTS.values())
    lines = describe(written(tmp_path / "gpt.pb", message))
    assert f"parameters  {count:,}" in lines


def test_description_gives_memory_by_precision(tmp_path: Path) -> None:
    vectors = 2 * 8 + 2 * (4 * 8 + 24 + 8 + 12 + 8)
    matrices = 11 * 8 + 7 * 8 + 2 * (192 + 64 + 96 + 96)
    memory = [line.split()[:2] for line in describe(written(tmp_path / "gpt.pb", gpt_message()))[-3:]]
    assert memory == [
        ["fp32", f"{4 * (matrices + vectors):,}"],
        ["fp16", f"{2 * (matrices + vectors):,}"],
        ["int8", f"{matrices + 2 * vectors:,}"],
    ]


def test_inspect_prints_settings_and_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["inspect", str(written(tmp_path / "transformer.pb", transformer_message()))])
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert status == 0
    assert ["source_vocabulary", "11"] in words
    assert ["trg_embedding.token_embedding", "output.weight", "[8,", "13]"] in words


def test_inspect_of_a_bad_file_says_why_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none.pb")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"lightseq: {tmp_path / 'none.pb'} cannot be used:\n  there is no such file\n"
