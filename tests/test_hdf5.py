"""LightSeq's HDF5 files: what its exporters write is read, what we write has all that its loader asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import weight_files

from lightseq_backend import local, weights
from lightseq_backend.__main__ import main
from lightseq_backend.config import DIALECTS, TOPP, DecodingOptions
from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.weights.hdf5 import REQUIRED

h5py = pytest.importorskip("h5py", reason="h5py is not installed, which reads and writes HDF5")

MESSAGES = {"transformer": weight_files.transformer_message, "gpt": weight_files.gpt_message}
CONF: dict[str, dict[str, Any]] = {
    "transformer": {
        "extra_decode_length": 50, "length_penalty": 0.6, "sampling_method": "beam_search", "topk": 4, "topp": 0.75,
        "trg_end_id": 6, "is_post_ln": True, "no_scale_embedding": True, "use_gelu": True,
    },
    "gpt": {"sampling_method": "topp", "topk": 4, "topp": 0.75, "eos_id": 6, "extra_decode_length": 3},
}  # fmt: skip


def exported(path: Path, kind: str) -> tuple[Path, Any]:
    """A file as LightSeq's exporters make it of a message: lists of floats, Python scalars, text as int8 codes."""
    message = MESSAGES[kind](**CONF[kind])
    with h5py.File(path, "w") as file:
        for part, value in message.ListFields():
            if part.name == "model_conf":
                for field in value.DESCRIPTOR.fields:
                    one = getattr(value, field.name)
                    codes = np.array([ord(letter) for letter in one]).astype(np.int8) if isinstance(one, str) else one
                    file.create_dataset(f"model_conf/{field.name}", data=codes)
            elif part.name.endswith("_stack"):
                for number, layer in enumerate(value):
                    for field, floats in layer.ListFields():
                        file.create_dataset(f"{part.name}/{number}/{field.name}", data=list(floats), dtype="f4")
                file.create_dataset(f"model_conf/n_{part.name}", data=len(value))
            else:
                for field, floats in value.ListFields():
                    file.create_dataset(f"{part.name}/{field.name}", data=list(floats), dtype="f4")
    return path, message


def change(path: Path, name: str, value: Any = None) -> None:
    """Takes a dataset away, or puts another value in its place."""
    with h5py.File(path, "a") as file:
        if name in file:
            del file[name]
        if value is not None:
            file[name] = value


@pytest.mark.parametrize("kind", MESSAGES)
def test_exporters_file_is_read_as_the_protobuf_file_is(kind: str, tmp_path: Path) -> None:
    path, message = exported(tmp_path / "a.hdf5", kind)
    config, arrays = weights.load(path)
    theirs, expected = weights.load(weight_files.written(tmp_path / f"{kind}.pb", message))
    assert config == theirs
    assert arrays.keys() == expected.keys()
    assert all((arrays[name] == expected[name]).all() for name in arrays)


@pytest.mark.parametrize("dtype", ["f2", "f8", "i4"])
def test_numbers_of_any_type_become_float32(dtype: str, tmp_path: Path) -> None:
    path, _ = exported(tmp_path / "a.hdf5", "gpt")
    values = np.arange(8, dtype=dtype).reshape(2, 4)
    change(path, "src_embedding/norm_scale", values)
    array = weights.load(path)[1]["norm.gain"]
    assert (array.dtype, array.tolist()) == (np.float32, list(range(8)))


@pytest.mark.parametrize("name", ["t01_base.pb", "t05_postln_bart.pb", "g01_base.pb"])
def test_golden_file_survives_both_formats(name: str, tmp_path: Path) -> None:
    config, arrays = weights.load(weight_files.golden(name))
    weights.save(tmp_path / "a.hdf5", config, arrays)
    back, same = weights.load(tmp_path / "a.hdf5")
    assert back == config
    assert all((same[each] == arrays[each]).all() for each in arrays)
    weights.save(tmp_path / "b.pb", back, same)
    assert (tmp_path / "b.pb").read_bytes() == _rewritten(config, arrays, tmp_path)


def _rewritten(config: Any, arrays: Any, tmp_path: Path) -> bytes:
    weights.save(tmp_path / "c.pb", config, arrays)
    return (tmp_path / "c.pb").read_bytes()


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("transformer", small_models.transformer(1, extra_decode_length=0, padding_id=0)),
        ("gpt", small_models.gpt(1, decoding=DecodingOptions(TOPP, top_p=0.5, top_k=4))),
    ],
)
def test_written_file_has_all_that_lightseq_asks_for(kind: str, model: Any, tmp_path: Path) -> None:
    """Zeros as well: a dataset that is absent is an error there. Text is its codes, without an end."""
    config, arrays = model
    weights.save(tmp_path / "a.hdf5", config, arrays)
    with h5py.File(tmp_path / "a.hdf5") as file:
        conf = file["model_conf"]
        assert set(REQUIRED[kind]) <= set(conf)
        assert conf["n_encoder_stack"][()] == (config.encoder_layers if kind == "transformer" else config.layers)
        method = conf["sampling_method"]
        assert (method.dtype, bytes(method[()]).decode()) == (np.int8, config.decoding.sampling_method)
        assert file["encoder_stack/0/multihead_project_kernel_qkv"].shape == (16, 48)
        assert {conf[name].shape for name in conf if name != "sampling_method"} == {()}
        # The new architecture reads this where it is there, and takes GELU where it is not.
        assert ("use_gelu" in conf) == (kind == "transformer")


def test_lightseqs_loader_can_read_the_scalars(tmp_path: Path) -> None:
    """It asks HDF5's library for C's types: bool, int and float, of whatever is stored."""
    config, arrays = small_models.transformer(1, post_norm=True)
    weights.save(tmp_path / "a.hdf5", config, arrays)
    types = {bool: h5py.h5t.NATIVE_UINT8, int: h5py.h5t.NATIVE_INT32, float: h5py.h5t.NATIVE_FLOAT}
    wanted: dict[str, Any] = {"is_post_ln": True, "use_gelu": False, "beam_size": 4, "length_penalty": 0.6}
    with h5py.File(tmp_path / "a.hdf5") as file:
        for name, value in wanted.items():
            kind = types[type(value)]
            read = np.zeros((), kind.dtype)
            file[f"model_conf/{name}"].id.read(h5py.h5s.ALL, h5py.h5s.ALL, read, kind)
            assert read == kind.dtype.type(value)


def test_server_side_commands_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, arrays = small_models.transformer(2)
    weights.save(tmp_path / "a.pb", config, arrays)
    weights.save(tmp_path / "a.hdf5", config, arrays)
    answers = [local.build(tmp_path / f"a{suffix}").answer([[3, 4]])[0] for suffix in (".pb", ".hdf5")]
    assert [each.hypotheses[0].tokens.tolist() for each in answers[:1]] == [
        each.hypotheses[0].tokens.tolist() for each in answers[1:]
    ]
    shown = []
    for suffix in (".pb", ".hdf5"):
        assert main(["inspect", str(tmp_path / f"a{suffix}")]) == 0
        shown.append(capsys.readouterr().out.splitlines()[1:])
    assert shown[0] == shown[1]


def test_v0_reads_it_its_own_way(tmp_path: Path) -> None:
    path, _ = exported(tmp_path / "a.hdf5", "transformer")
    config = weights.load(path, dialect="v0")[0]
    assert config.dialect == DIALECTS["v0"]
    assert config.end_id == weight_files.TARGET - 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder_stack/1/ffn_norm_bias", None, "encoder_stack[1].ffn_norm_bias is missing"),
        ("encoder_stack/1", None, "encoder_stack[1].multihead_norm_scale is missing"),
        ("trg_embedding", None, "trg_embedding is missing"),
        ("decoder_stack/0/self_norm_bias", np.zeros(3), "decoder_stack[0].self_norm_bias has 3 values; [8] takes 8"),
        ("decoder_stack/0/self_norm_bias", b"text", "decoder_stack[0].self_norm_bias is no dataset of numbers"),
        ("src_embedding/token_embedding", np.zeros(88, np.uint8), "src_embedding.token_embedding has bytes, as Light"),
        ("model_conf/topk", None, "model_conf.topk is missing"),
        ("model_conf/head_num", 3, "model_conf.head_num is 3; it must be a divisor of the hidden size, 8"),
        ("model_conf/head_num", [2, 2], "model_conf.head_num is None, which it cannot be"),
        ("model_conf/head_num", 2.5, "model_conf.head_num is 2.5, which it cannot be"),
        ("model_conf/n_decoder_stack", None, "model_conf.n_decoder_stack is missing"),
        ("model_conf/n_decoder_stack", 1 << 30, "model_conf.n_decoder_stack is 1073741824; it must be"),
        ("model_conf/sampling_method", np.array([1.5]), "model_conf.sampling_method is None"),
        ("model_conf/multilg_type", 1, "multilingual models are not supported yet"),
    ],
)
def test_fault_is_named(name: str, value: Any, message: str, tmp_path: Path) -> None:
    path, _ = exported(tmp_path / "a.hdf5", "transformer")
    change(path, name, value)
    with pytest.raises(WeightError) as caught:
        weights.load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "the file is empty"),
        (lambda data: b"no HDF5" * 99, "HDF5 says"),
        (lambda data: data[: len(data) // 2], "HDF5 says"),
    ],
)
def test_damaged_file_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    path, _ = exported(tmp_path / "a.hdf5", "gpt")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightError, match=message):
        weights.load(path)


def test_name_that_is_no_text_is_left_aside(tmp_path: Path) -> None:
    path, _ = exported(tmp_path / "transformer.hdf5", "transformer")
    with h5py.File(path, "a") as file:
        file["src_embedding"].create_dataset(b"\xff_clip_max", data=1.0)
    weights.load(path)


@pytest.mark.parametrize("value", [1.0, [1.0, 2.0]])
def test_number_in_place_of_a_group_is_refused(value: Any, tmp_path: Path) -> None:
    path, _ = exported(tmp_path / "transformer.hdf5", "transformer")
    change(path, "src_embedding", value)
    with pytest.raises(WeightError, match=r"src_embedding\.token_embedding"):
        weights.load(path)


def test_other_content_and_other_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="there is no such file"):
        weights.load(tmp_path / "none.hdf5")
    change(tmp_path / "a.hdf5", "layers/0", 1)
    with pytest.raises(WeightError, match="nothing in it is part of a LightSeq model"):
        weights.load(tmp_path / "a.hdf5")
    path, _ = exported(tmp_path / "b.hdf5", "gpt")
    with pytest.raises(WeightError, match="this looks like a gpt file, not a transformer file"):
        weights.load(path, kind="transformer")


def test_what_lightseq_cannot_hold_is_refused_and_nothing_written(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2, untied=True)
    with pytest.raises(WeightError, match=r"target.tokens is not output.weight"):
        weights.save(tmp_path / "a.hdf5", config, arrays)
    config, arrays = small_models.transformer(2, norm_epsilon=1e-5, first_norm=False, post_norm=True)
    with pytest.raises(WeightError, match="first_norm is False; LightSeq's format cannot hold that"):
        weights.save(tmp_path / "a.hdf5", config, arrays)
    assert list(tmp_path.iterdir()) == []


def test_without_h5py_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"a.hdf5 needs the package h5py: install the extra `hdf5`"):
        weights.load(tmp_path / "a.hdf5")
