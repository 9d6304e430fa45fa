"""LightSeq's own int8 files: what their bytes become, what stays rounded, what is refused."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("h5py")  # int8_files writes with it; what pip install -e '.[dev]' gives has it

from int8_files import hdf5, messages
from weight_files import DECODERS, written

from lightseq_backend import weights
from lightseq_backend.__main__ import main
from lightseq_backend.errors import WeightError
from lightseq_backend.quantised import Rounded, side_by_side
from lightseq_backend.weights.schema import message_type

KINDS = ("transformer", "gpt")
SUFFIXES = (".pb", ".hdf5")


def saved(folder: Path, message: Any, suffix: str) -> Path:
    path = folder / f"model{suffix}"
    return hdf5(path, message) if suffix == ".hdf5" else written(path, message)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_read_as_the_floats_they_stand_for(kind: str, suffix: str, tmp_path: Path) -> None:
    rounded, floats = messages(kind)
    config, arrays = weights.load(saved(tmp_path, rounded, suffix))
    theirs, expected = weights.load(written(tmp_path / "floats.pb", floats))
    assert config == theirs
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == np.float32, name
        np.testing.assert_allclose(array, expected[name], rtol=3e-7, atol=1e-12, err_msg=name)


def test_values_are_lightseqs_to_the_last_bit(tmp_path: Path) -> None:
    """(byte - 127) * clip_max / 127, in float32 and in that order."""
    message = messages("gpt")[0]
    layer = message.encoder_stack[0]
    layer.ffn_first_kernel, layer.ffn_first_kernel_clip_max = bytes([0, 126, 127, 128, 254, 255] + [127] * 90), 0.3
    array = weights.load(written(tmp_path / "gpt.pb", message))[1]["layer.0.ffn_inner.weight"]
    step = np.float32(0.3) / np.float32(127)
    assert array[0, :6].tolist() == [-np.float32(0.3), -step, 0, step, np.float32(0.3), np.float32(0.3)]
    assert not array[0, 6:].any()
    assert not array[1:].any()


def test_tables_are_multiplied_by_the_root_of_hidden_whatever_the_file_says(tmp_path: Path) -> None:
    message = messages("transformer", no_scale_embedding=True)[0]
    message.src_embedding.token_embedding = bytes([254]) * 88
    message.src_embedding.emb_clip_max = 2
    config, arrays = weights.load(written(tmp_path / "transformer.pb", message))
    assert config.scaled_embedding
    np.testing.assert_allclose(arrays["source.tokens"], 2 * 8**0.5, rtol=2e-7)


def test_parts_of_the_cross_projection_are_those_that_lightseq_reads(tmp_path: Path) -> None:
    """Each third of the bytes [8, 3, 16] has a clip_max, which is no layer: as LightSeq reads it, its exporters' files
    have one and the same."""
    message = messages("transformer", kv_clips=(1, 2, 4))[0]
    message.trg_embedding.encode_output_project_kernel_kv = bytes([254]) * (8 * DECODERS * 16)
    path = written(tmp_path / "transformer.pb", message)
    for rounded in (False, True):
        arrays = weights.load(path, rounded=rounded)[1]
        for layer in range(DECODERS):
            columns = np.asarray(arrays[f"decoder.{layer}.cross_kv.weight"])[:, 0].tolist()
            # A third is 128 bytes, two rows of [8, 48] and 32 more: layers 0 and 1 of the third row.
            assert columns == [1, 1, 1 if layer < 2 else 2, 2, 2, 2 if layer < 1 else 4, 4, 4]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_products_can_stay_rounded(kind: str, suffix: str, tmp_path: Path) -> None:
    path = saved(tmp_path, messages(kind)[0], suffix)
    floats, arrays = weights.load(path)[1], weights.load(path, rounded=True)[1]
    assert arrays.keys() == floats.keys()
    for name, array in arrays.items():
        assert isinstance(array, Rounded) == name.endswith(".weight"), name
        assert array.shape == floats[name].shape
        np.testing.assert_allclose(np.asarray(array), floats[name], rtol=3e-7, err_msg=name)
    found = arrays["decoder.1.cross_query.weight" if kind == "transformer" else "layer.1.attention_output.weight"]
    assert found.numbers.dtype == np.int8
    layer = messages(kind)[0].decoder_stack[1] if kind == "transformer" else messages(kind)[0].encoder_stack[1]
    stored = layer.encdec_project_kernel_q if kind == "transformer" else layer.multihead_project_kernel_output
    assert (found.numbers.astype(int) + 127).ravel().tolist() == list(stored)


def test_projection_with_a_clip_for_each_part_cannot_stay(tmp_path: Path) -> None:
    path = written(tmp_path / "transformer.pb", messages("transformer", kv_clips=(1, 1, 2))[0])
    arrays = weights.load(path, rounded=True)[1]
    assert not any(isinstance(arrays[f"decoder.{layer}.cross_kv.weight"], Rounded) for layer in range(DECODERS))
    assert isinstance(arrays["output.weight"], Rounded)


def test_rounded_weights_stand_side_by_side() -> None:
    one = Rounded(np.array([[1, 2], [3, 4]], np.int8), np.array([10, 100], np.float32))
    other = Rounded(np.array([[5], [6]], np.int8), np.array([0.5], np.float32))
    both = side_by_side([one, other])
    assert isinstance(both, Rounded)
    assert np.asarray(both).tolist() == [[10, 200, 2.5], [30, 400, 3]]
    assert side_by_side([one, np.array([[7], [8]], np.float32)]).tolist() == [[10, 200, 7], [30, 400, 8]]


@pytest.mark.parametrize("kind", KINDS)
def test_file_becomes_one_of_floats(kind: str, tmp_path: Path) -> None:
    config, arrays = weights.load(written(tmp_path / "a.pb", messages(kind)[0]))
    weights.save(tmp_path / "b.pb", config, arrays)
    back, same = weights.load(tmp_path / "b.pb")
    assert back == config
    assert all((same[name] == arrays[name]).all() for name in arrays)


@pytest.mark.parametrize("form", ["protobuf", "hdf5", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_convert_writes_every_format(kind: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.pb", messages(kind)[0])
    assert main(["convert", str(path), str(tmp_path / "model"), "--format", form]) == 0, capsys.readouterr().err
    assert "read back: all" in capsys.readouterr().out
    assert main(["compare", str(path), str(tmp_path / "model")]) == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("kind", "name"), [("transformer", "QuantTransformer"), ("gpt", "QuantGpt")])
def test_inspect_names_the_kind(
    kind: str, name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(saved(tmp_path, messages(kind)[0], suffix))]) == 0
    assert f"model{suffix}: {kind} of int8 (LightSeq's {name}), " in capsys.readouterr().out


def test_gpt_need_not_say_how_long_it_goes_on(tmp_path: Path) -> None:
    """LightSeq's loader reads no extra_decode_length of an int8 GPT, and one of its exporters writes none."""
    import h5py

    path = hdf5(tmp_path / "gpt.hdf5", messages("gpt", extra_decode_length=3)[0])
    assert weights.load(path)[0].extra_decode_length == 3
    with h5py.File(path, "a") as file:
        del file["model_conf/extra_decode_length"]
    assert weights.load(path)[0].extra_decode_length == 0
    with h5py.File(path, "a") as file:
        del file["model_conf/eos_id"]
    with pytest.raises(WeightError, match=r"model_conf\.eos_id is missing"):
        weights.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("value", "shown"), [(0, "0"), (float("nan"), "nan"), (float("inf"), "inf"), (-0.5, "-0.5")])
def test_clip_that_is_none_is_refused(value: float, shown: str, suffix: str, tmp_path: Path) -> None:
    message = messages("transformer")[0]
    message.decoder_stack[2].encdec_project_kernel_q_clip_max = value
    message.src_embedding.emb_clip_max = value
    message.trg_embedding.encode_output_project_kernel_kv_clip_max[1] = value
    assert faults_of(saved(tmp_path, message, suffix)) == [
        f"src_embedding.emb_clip_max is {shown}; it must be a number over 0",
        f"trg_embedding.encode_output_project_kernel_kv_clip_max[1] is {shown}; it must be a number over 0",
        f"decoder_stack[2].encdec_project_kernel_q_clip_max is {shown}; it must be a number over 0",
    ]


def faults_of(path: Path) -> list[str]:
    with pytest.raises(WeightError) as caught:
        weights.load(path)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_wrong_lengths_are_refused(tmp_path: Path) -> None:
    message = messages("transformer")[0]
    message.encoder_stack[1].ffn_first_kernel = bytes(95)
    message.encoder_stack[0].multihead_project_kernel_output = b""
    message.trg_embedding.encode_output_project_kernel_kv_clip_max.append(1)
    assert faults_of(written(tmp_path / "transformer.pb", message)) == [
        "encoder_stack[0].multihead_project_kernel_output is missing",
        "encoder_stack[1].ffn_first_kernel has 95 values; [8, 12] takes 96",
        "trg_embedding.encode_output_project_kernel_kv_clip_max has 4 values; [3] takes 3",
    ]


def test_floats_in_the_place_of_bytes_are_refused(tmp_path: Path) -> None:
    message = messages("gpt")[0]
    message.encoder_stack[0].ffn_first_kernel = np.zeros(96, np.float32).tobytes()
    assert faults_of(written(tmp_path / "gpt.pb", message)) == [
        "encoder_stack[0].ffn_first_kernel has 384 values; [8, 12] takes 96"
    ]


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("encoder_stack/0/ffn_first_kernel", np.zeros(96, np.float32), ".ffn_first_kernel is float32; an int8 file"),
        ("encoder_stack/0/ffn_first_bias", np.zeros(12, np.uint8), "ffn_first_bias has bytes, as LightSeq's int8"),
        ("encoder_stack/0/ffn_first_kernel", None, "encoder_stack[0].ffn_first_kernel is missing"),
        ("encoder_stack/1/ffn_first_kernel_clip_max", None, "ffn_first_kernel_clip_max is missing"),
        ("encoder_stack/1/ffn_first_kernel_clip_max", b"text", "ffn_first_kernel_clip_max is missing"),
        ("encoder_stack/1/ffn_first_kernel_clip_max", [1.0, 2.0], "_clip_max has 2 values; [1] takes 1"),
    ],
)
def test_fault_of_an_hdf5_file_is_named(name: str, value: Any, fault: str, tmp_path: Path) -> None:
    import h5py

    path = hdf5(tmp_path / "gpt.hdf5", messages("gpt")[0])
    with h5py.File(path, "a") as file:
        del file[name]
        if value is not None:
            file[name] = value
    assert any(fault in line for line in faults_of(path)), faults_of(path)


def test_last_of_two_byte_fields_counts(tmp_path: Path) -> None:
    """As protobuf merges a singular message that comes twice."""
    message = messages("gpt")[0]
    again = message_type("QuantGpt")()
    again.src_embedding.token_embedding = bytes([254]) * 88
    again.src_embedding.emb_clip_max = 3
    path = tmp_path / "gpt.pb"
    path.write_bytes(message.SerializeToString() + again.SerializeToString())
    tokens = weights.load(path)[1]["tokens"]
    assert tokens.shape == (11, 8)
    assert (tokens == 3).all()


def test_damage_ends_in_numbers_or_an_error(tmp_path: Path) -> None:
    data = messages("transformer")[0].SerializeToString()
    random = np.random.default_rng(5)
    for _ in range(60):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 3):
            damaged[place] = random.integers(256)
        (tmp_path / "transformer.pb").write_bytes(damaged[: random.integers(1, len(data) + 1)])
        with contextlib.suppress(WeightError):
            weights.load(tmp_path / "transformer.pb")
