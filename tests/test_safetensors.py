"""Our own weight files: what is written reads back, damage is named, arrays stay mapped, and serving finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models

from lightseq_backend import local, weights
from lightseq_backend.__main__ import main
from lightseq_backend.config import DIALECTS, GREEDY, DecodingOptions
from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.weights.safetensors import config_path, read_tensors

MARIAN = {"post_norm": True, "first_norm": False, "activation": "silu", "norm_epsilon": 1e-5, "never_id": 3}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "lightseq": {},
    "marian": MARIAN,
    "mbart": {"embedding_norm": True, "activation": "gelu_erf", "dialect": DIALECTS["v0"]},
    "untied": {"untied": True, "decoding": DecodingOptions(GREEDY, top_p=0.5, seed=7)},
}


def written(folder: Path, **settings: Any) -> Path:
    path = folder / "transformer.safetensors"
    weights.save(path, *small_models.transformer(**settings))
    return path


def edit(path: Path, **changes: Any) -> None:
    beside = config_path(path)
    values = {**json.loads(beside.read_text()), **changes}
    beside.write_text(json.dumps({name: value for name, value in values.items() if value != "gone"}))


def rewrite_header(path: Path, change: Any) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("settings", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_transformer_reads_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    config, arrays = small_models.transformer(1, **settings)
    weights.save(tmp_path / "a.safetensors", config, arrays)
    again, back = weights.load(tmp_path / "a.safetensors")
    assert again == config
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


@pytest.mark.parametrize("final_norm", [True, False])
def test_gpt_reads_back_and_answers_the_same(tmp_path: Path, final_norm: bool) -> None:
    config, arrays = small_models.gpt(1, activation="gelu_erf", norm_epsilon=1e-5, final_norm=final_norm)
    weights.save(tmp_path / "a.safetensors", config, arrays)
    again, back = weights.load(tmp_path / "a.safetensors")
    assert again == config
    assert back.keys() == arrays.keys()
    changes = {"sampling_method": GREEDY}
    ours = local.build(tmp_path / "a.safetensors").answer([[3, 4]], changes=changes)
    assert ours[0].hypotheses[0].tokens.tolist() == (
        small_models.engine(config, arrays).answer([[3, 4]], changes=changes)[0].hypotheses[0].tokens.tolist()
    )


def test_lightseqs_file_may_become_ours(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2)
    weights.save(tmp_path / "a.pb", config, arrays)
    weights.save(tmp_path / "a.safetensors", *weights.load(tmp_path / "a.pb"))
    assert weights.load(tmp_path / "a.safetensors")[0] == config


def test_what_only_our_files_can_say_is_refused_by_lightseqs(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2, activation="gelu_erf", norm_epsilon=1e-5, never_id=3)
    with pytest.raises(WeightError) as caught:
        weights.save(tmp_path / "a.pb", config, arrays)
    for name in ("activation is 'gelu_erf'", "norm_epsilon is 1e-05", "never_id is 3"):
        assert name in str(caught.value)


@pytest.mark.parametrize("suffix", [".pb", ".hdf5"])
def test_gpt_without_a_final_norm_is_refused_by_lightseqs_formats(tmp_path: Path, suffix: str) -> None:
    if suffix == ".hdf5":
        pytest.importorskip("h5py")
    with pytest.raises(WeightError, match="final_norm is False; LightSeq's format cannot hold that"):
        weights.save(tmp_path / f"a{suffix}", *small_models.gpt(2, final_norm=False))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
def test_final_norm_of_a_gpt_is_there_as_its_configuration_says(tmp_path: Path, there: bool) -> None:
    config, _ = small_models.gpt(2, final_norm=there)
    _, arrays = small_models.gpt(2, final_norm=not there)
    with pytest.raises(WeightError, match=r"norm\.gain is missing" if there else r"norm\.gain is no array of such"):
        weights.save(tmp_path / "a.safetensors", config, arrays)


def test_arrays_stay_mapped_and_the_same_memory_is_stored_once(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2, source_vocabulary=11)
    arrays["source.tokens"] = arrays["target.tokens"]
    path = tmp_path / "a.safetensors"
    weights.save(path, config, arrays)
    stored = read_tensors(path)
    assert len({"source.tokens", "target.tokens", "output.weight"} & set(stored)) == 1
    back = weights.load(path)[1]
    assert np.shares_memory(back["source.tokens"], back["output.weight"])
    assert not any(array.flags.owndata or array.flags.writeable for array in back.values())


def test_the_package_safetensors_reads_and_writes_the_same(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy", reason="the package safetensors is not installed")
    theirs = package.load_file(written(tmp_path))
    ours = read_tensors(tmp_path / "transformer.safetensors")
    assert theirs.keys() == ours.keys()
    package.save_file(theirs, tmp_path / "b.safetensors")
    back = read_tensors(tmp_path / "b.safetensors")
    assert all((ours[name] == theirs[name]).all() and (back[name] == theirs[name]).all() for name in ours)


def test_every_missing_superfluous_and_misshapen_array_is_named(tmp_path: Path) -> None:
    path = written(tmp_path)

    def change(header: dict[str, Any]) -> None:
        header["extra"] = header.pop("encoder.norm.gain")
        header["decoder.norm.bias"]["shape"] = [4, 4]
        header["decoder.0.self_qkv.bias"]["dtype"] = "I32"

    rewrite_header(path, change)
    with pytest.raises(WeightError) as caught:
        weights.load(path)
    assert set(str(caught.value).splitlines()) == {
        f"{path} cannot be used: 4 faults",
        "  encoder.norm.gain is missing",
        "  decoder.norm.bias is float32 [4, 4]; it must be float32 [16]",
        "  decoder.0.self_qkv.bias is int32 [48]; it must be float32 [48]",
        "  extra is no array of such a model",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": "gone", "wide": 3}, "wide is no setting"),
        ({"hidden": "gone"}, "hidden is missing"),
        ({"heads": 2.5}, "heads is 2.5; it must be int"),
        ({"post_norm": 1}, "post_norm is 1; it must be bool"),
        ({"heads": 5}, "hidden size 16 does not divide into 5 heads"),
        ({"dialect": "v7"}, "dialect is 'v7'"),
        ({"decoding": {"beams": 4}}, "decoding.beams is no setting"),
        ({"decoding": 4}, "decoding is 4; it must be dict"),
        ({"kind": "bert"}, "kind is 'bert'; kinds are transformer, gpt"),
        ({"shared": {"a": 1}}, "shared is"),
        (
            {"shared": {"output.weight": {"of": "nothing", "transposed": True}}, "tied_output": False},
            "the file lacks it",
        ),
        ({"head_size": 3}, "head_size is 3; what else the file says makes it 8"),
        ({"tied_output": False}, "tied_output is False; what else the file says makes it True"),
        ({"positions": "rotary"}, "positions is 'rotary'; known kinds are table, learned, sinusoids, interleaved"),
        ({"first_norm": False}, "encoder.0.attention_norm.gain is no array of such a model"),
        ({"encoder_layers": 2}, "encoder.1.ffn_norm.gain is missing"),
    ],
)
def test_fault_of_the_configuration_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path)
    edit(path, **changes)
    with pytest.raises(WeightError, match=message):
        weights.load(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "the file is empty"),
        (lambda data: data[:5], "cut short or no safetensors file"),
        (lambda data: data[:-1], "the file is cut short"),
        (lambda data: b"\xff" * 64, "cut short or no safetensors file"),
        (lambda data: (4).to_bytes(8, "little") + b"nope" + data, "header is no JSON"),
        (lambda data: (2).to_bytes(8, "little") + b"[]" + data, "header is no JSON object"),
        (lambda data: (7).to_bytes(8, "little") + b'{"a":1}', "entry for a cannot be read"),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    path = written(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightError, match=message):
        weights.load(path)


def test_missing_configuration_is_named(tmp_path: Path) -> None:
    path = written(tmp_path)
    config_path(path).unlink()
    with pytest.raises(WeightError, match=r"transformer.json cannot be read: No such file"):
        weights.load(path)


def test_other_kind_or_dialect_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(WeightError, match="this is a transformer file, not a gpt file"):
        weights.load(path, kind="gpt")
    with pytest.raises(ConfigError, match=r"is said in .*transformer.json"):
        weights.load(path, dialect="v0")


def test_half_precision_of_other_programs_is_read(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    header = (
        b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"b":{"dtype":"F16","shape":[],"data_offsets":[4,6]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x80\x3f\x20\xc0" + np.float16(0.5).tobytes())
    arrays = read_tensors(path)
    assert arrays["a"].tolist() == [1, -2.5]
    assert arrays["b"] == 0.5


def test_inspect_shows_our_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(written(tmp_path, **MARIAN))]) == 0
    shown = capsys.readouterr().out
    assert "first_norm" in shown
    assert "encoder.0.attention_qkv.weight" in shown


def test_halves_are_kept_as_halves_and_loaded_as_float32(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2)
    halves = {name: array.astype(np.float16) for name, array in arrays.items() if name != "target.tokens"}
    halves["output.bias"] = arrays["output.bias"]
    path = tmp_path / "a.safetensors"
    weights.save(path, config, halves)
    kinds = {name: array.dtype for name, array in read_tensors(path).items()}
    assert kinds.pop("output.bias") == np.float32
    assert set(kinds.values()) == {np.dtype(np.float16)}
    back = weights.load(path)[1]
    assert {array.dtype for array in back.values()} == {np.dtype(np.float32)}
    assert all((back[name] == array).all() for name, array in halves.items())
    assert np.shares_memory(back["target.tokens"], back["output.weight"])


def test_halves_become_float32_in_lightseqs_format(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2)
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    weights.save(tmp_path / "a.pb", config, halves)
    back = weights.load(tmp_path / "a.pb")[1]
    assert all((back[name] == array).all() for name, array in halves.items())


def test_configuration_spells_out_what_follows_and_may_leave_it_out(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2, untied=True)
    path = tmp_path / "a.safetensors"
    weights.save(path, config, arrays)
    values = json.loads(config_path(path).read_text())
    assert {key: values.pop(key) for key in ("head_size", "positions", "tied_output")} == {
        "head_size": 8,
        "positions": "table",
        "tied_output": False,
    }
    config_path(path).write_text(json.dumps(values))  # as files were before
    assert weights.load(path)[0] == config


def test_stop_words_come_back_from_a_file(tmp_path: Path) -> None:
    options = DecodingOptions("greedy", stop=("a", (3, 4)), end_ids=(5,), include_stop=True)
    config, arrays = small_models.gpt(decoding=options)
    weights.save(tmp_path / "gpt.safetensors", config, arrays)
    assert weights.load(tmp_path / "gpt.safetensors")[0].decoding == options
