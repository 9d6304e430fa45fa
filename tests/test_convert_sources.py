"""Arrays of other programs and weight files as sources of `convert`, LightSeq's formats as results, and `compare`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import repositories
import small_checkpoints
import small_models
import weight_files

from lightseq_backend import proof, weights
from lightseq_backend.__main__ import main
from lightseq_backend.config import Config, TransformerConfig
from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.export import arrays, arrays_file, sources
from lightseq_backend.weights.safetensors import config_path

Arrays = dict[str, np.ndarray]
needs_h5py = pytest.mark.skipif(not find_spec("h5py"), reason="h5py is not installed")


def npz(
    folder: Path, config: Config, arrays: Arrays, stored: Arrays | None = None, tied: bool = True, **changes: Any
) -> Path:
    """An .npz file of `stored`, or of all arrays, and beside it the configuration that our own format writes, with
    changes; None takes a key away. tied: without an output projection of its own."""
    weights.save(folder / "a.safetensors", config, arrays)
    values = json.loads(config_path(folder / "a.safetensors").read_text())
    del values["shared"]
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    (folder / "weights.json").write_text(json.dumps(values))
    stored = dict(arrays if stored is None else stored)
    if tied:
        stored.pop("output.weight", None)
    np.savez(folder / "weights.npz", **stored)
    return folder / "weights.npz"


def without(arrays: Arrays, *endings: str) -> Arrays:
    return {name: array for name, array in arrays.items() if not name.endswith(endings)}


# Arrays --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [small_models.transformer(2), small_models.gpt(2)], ids=["transformer", "gpt"])
def test_arrays_under_our_names_become_the_model(model: Any, tmp_path: Path) -> None:
    config, arrays = model
    read = arrays_file.read(npz(tmp_path, config, arrays))
    assert read.config == config
    assert all((read.arrays[name] == arrays[name]).all() for name in arrays)
    with pytest.raises(WeightError, match=r"output.weight has no place in such a model"):
        arrays_file.read(npz(tmp_path, config, arrays, tied=False))  # two arrays where the configuration says one


def test_arrays_of_a_gpt_may_lack_the_final_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, arrays = small_models.gpt(2, final_norm=False)
    source = npz(tmp_path, config, arrays)
    assert main(["convert", str(source), str(tmp_path / "model")]) == 0
    assert "a plain pass over the arrays" in capsys.readouterr().out
    assert weights.load(tmp_path / "model" / "gpt.safetensors")[0] == config
    with pytest.raises(WeightError, match=r"norm\.gain is missing\n.*norm\.bias is missing"):
        arrays_file.read(npz(tmp_path, config, arrays, final_norm=True))


def test_untied_output_is_an_array_of_its_own(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2, untied=True)
    read = arrays_file.read(npz(tmp_path, config, arrays, tied=False))
    assert (read.arrays["output.weight"] == arrays["output.weight"]).all()
    assert not (read.arrays["output.weight"] == read.arrays["target.tokens"].T).all()


def test_tensor2tensors_habits_are_made_up_for(tmp_path: Path) -> None:
    """Tables without their scale, attention without biases, positions by tensor2tensor's formula."""
    config, arrays = small_models.transformer(2, norm_epsilon=1e-6)
    root = np.float32(4)  # sqrt(16)
    theirs = without(arrays, "positions", "_qkv.bias", "_kv.bias", "_query.bias", "_output.bias")
    theirs = {name: array / root if name.endswith("tokens") else array for name, array in theirs.items()}
    theirs["encoder.0.ffn_output.bias"] = arrays["encoder.0.ffn_output.bias"]
    del theirs["output.bias"]
    path = npz(
        tmp_path, config, arrays, theirs, positions="sinusoids", embedding_scale="sqrt(hidden)", zero_biases=True,
        scaled_embedding=None,
    )  # fmt: skip
    read = arrays_file.read(path)
    assert read.config == replace(config, positions="sinusoids")
    for name in (
        "source.tokens",
        "target.tokens",
        "output.weight",
        "encoder.0.ffn_output.bias",
        "encoder.0.ffn_inner.bias",
    ):
        np.testing.assert_array_equal(read.arrays[name], arrays[name])
    for name in ("encoder.0.attention_qkv.bias", "decoder.0.cross_kv.bias", "output.bias", "decoder.0.ffn_output.bias"):
        assert not read.arrays[name].any()
    position, feature, half = 5, 3, 8
    angle = position * 10000 ** (-feature / (half - 1))
    for side in ("source", "target"):
        row = read.arrays[f"{side}.positions"][position]
        np.testing.assert_allclose([row[feature], row[half + feature]], [np.sin(angle), np.cos(angle)], rtol=1e-5)


def test_kind_of_positions_does_not_keep_a_model_out_of_lightseqs_format(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2)
    source = npz(tmp_path, config, arrays, without(arrays, "positions"), positions="interleaved_sinusoids")
    assert main(["convert", str(source), str(tmp_path / "model"), "--format", "protobuf"]) == 0
    back, tables = weights.load(tmp_path / "model" / "transformer.pb")
    assert (back.positions, tables["source.positions"].shape) == ("table", (12, 16))
    row, feature = tables["source.positions"][5], 3
    angle = 5 / 10000 ** (2 * feature / 16)
    np.testing.assert_allclose([row[feature], row[8 + feature]], [np.sin(angle), np.cos(angle)], rtol=1e-5)


def test_untied_output_keeps_its_scale(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2, untied=True, scaled_embedding=False)
    path = npz(tmp_path, config, arrays, tied=False, embedding_scale="sqrt(hidden)", scaled_embedding=None)
    read = arrays_file.read(path)
    assert read.config == config
    np.testing.assert_array_equal(read.arrays["output.weight"], arrays["output.weight"])
    np.testing.assert_array_equal(read.arrays["source.tokens"], 4 * arrays["source.tokens"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "rotary"}, "positions is 'rotary'; known kinds are table, learned, sinusoids, interleaved"),
        ({"embedding_scale": 3}, "embedding_scale is 3; it may be 1 or 'sqrt(hidden)'"),
        ({"embedding_scale": "sqrt(hidden)"}, "scaled_embedding follows from embedding_scale"),
        ({"tied_output": 2}, "tied_output is 2; it may be True or False"),
        ({"hidden": None}, "hidden is missing"),
        ({"head_size": 5}, "head_size is 5; what else the file says makes it 8"),
        ({"kind": "bert"}, "kind is 'bert'; kinds are transformer, gpt"),
    ],
)
def test_setting_of_an_arrays_file_is_checked(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2)
    with pytest.raises(ConfigError) as caught:
        arrays_file.read(npz(tmp_path, config, arrays, **changes))
    assert message in str(caught.value)


def test_arrays_that_are_missing_superfluous_or_objects_are_refused(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2)
    stored = {**without(arrays, "qkv.bias", "encoder.norm.gain"), "mine": np.zeros(3)}
    path = npz(tmp_path, config, arrays, stored)
    with pytest.raises(WeightError) as caught:
        arrays_file.read(path)
    for name in ("encoder.0.attention_qkv.bias is missing", "encoder.norm.gain is missing", "mine has no place"):
        assert name in str(caught.value)
    npz(tmp_path, config, arrays, {**arrays, "encoder.norm.gain": np.array([print], object)})
    with pytest.raises(WeightError, match=r"weights.npz cannot be read: Object arrays cannot be loaded"):
        arrays_file.read(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(WeightError, match=r"weights.npz cannot be read"):
        arrays_file.read(path)


def test_layer_norms_bias_is_never_made_up(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(2)
    path = npz(tmp_path, config, arrays, without(arrays, "encoder.norm.bias"), zero_biases=True)
    with pytest.raises(WeightError, match=r"encoder.norm.bias is missing"):
        arrays_file.read(path)


def test_converted_arrays_generate_what_the_reference_does(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(3)
    source = npz(tmp_path, config, arrays)
    assert main(["convert", str(source), str(tmp_path / "model")]) == 0
    probe = proof.Probe(tmp_path / "model" / "transformer.safetensors")
    assert (
        probe.greedy([3, 4, 5], 6)
        == small_models.engine(config, arrays)
        .answer([[3, 4, 5]], changes={"sampling_method": "greedy", "max_new_tokens": 6})[0]
        .hypotheses[0]
        .tokens.tolist()
    )


def test_converted_arrays_are_served(tmp_path: Path, serve: Any) -> None:
    (tmp_path / "models").mkdir()
    models = {"t": small_models.transformer(2), "g": small_models.gpt(2)}
    for name, model in models.items():
        folder = tmp_path / name
        folder.mkdir()
        assert main(["convert", str(npz(folder, *model)), str(tmp_path / "models" / name)]) == 0
    greedy = {"sampling_method": "greedy"}
    with repositories.grpc(serve(tmp_path / "models").grpc) as client:
        for name, given, gives in (("t", "source_ids", "target_ids"), ("g", "token_ids", "result")):
            expected = (
                small_models.engine(*models[name]).answer([[5, 6, 7]], changes=greedy)[0].hypotheses[0].tokens.tolist()
            )
            answer = repositories.ask(client, name, given, [[5, 6, 7]], **greedy)[gives].ravel().tolist()
            assert answer[3 if name == "g" else 0 :][: len(expected)] == expected


# Weight files --------------------------------------------------------------------------------------------------------


def lightseqs(path: Path, kind: str = "transformer") -> tuple[Path, Config, Arrays]:
    config, arrays = small_models.transformer(2) if kind == "transformer" else small_models.gpt(2)
    path.parent.mkdir(exist_ok=True)
    weights.save(path, config, arrays)
    return path, config, arrays


FORMATS = [
    pytest.param("safetensors", ".safetensors"),
    pytest.param("protobuf", ".pb"),
    pytest.param("hdf5", ".hdf5", marks=needs_h5py),
]


@pytest.mark.parametrize("kind", ["transformer", "gpt"])
@pytest.mark.parametrize(("form", "suffix"), FORMATS)
def test_every_format_is_made_of_every_other(
    kind: str, form: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, source in enumerate([".safetensors", ".pb", ".hdf5"]):
        if source == ".hdf5":
            pytest.importorskip("h5py")
        path, config, arrays = lightseqs(tmp_path / f"{kind}{source}", kind)
        target = tmp_path / f"model{number}"
        assert main(["convert", str(path), str(target), "--format", form]) == 0
        assert f"read back: all {len(arrays)} arrays and all settings are what {path}" in capsys.readouterr().out
        back = weights.load(target / f"{kind}{suffix}")
        assert back[0] == config
        assert all((back[1][name] == arrays[name]).all() for name in arrays)
        assert main(["compare", str(path), str(target / f"{kind}{suffix}")]) == 0


def test_v0s_reading_is_kept_where_the_format_leaves_it_open(tmp_path: Path) -> None:
    path = weight_files.written(tmp_path / "a.pb", weight_files.transformer_message())
    assert main(["convert", str(path), str(tmp_path / "a"), "--dialect", "v0", "--format", "protobuf"]) == 0
    assert main(["convert", str(path), str(tmp_path / "b"), "--dialect", "v0"]) == 0
    parameter = 'parameters { key: "dialect" value { string_value: "v0" } }'
    assert parameter in (tmp_path / "a" / "config.pbtxt").read_text()
    assert parameter in (tmp_path / "a" / "configs" / "cpu.pbtxt").read_text()
    assert parameter not in (tmp_path / "b" / "config.pbtxt").read_text()
    assert weights.load(tmp_path / "b" / "transformer.safetensors")[0].dialect.name == "v0"


def test_model_that_lightseq_cannot_hold_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = small_checkpoints.FOLDER / "marian"
    assert main(["convert", str(source), str(tmp_path / "model"), "--no-check", "--format", "protobuf"]) == 2
    shown = capsys.readouterr().err
    for name in ("sampling_method is 'greedy'", "activation is 'silu'", "norm_epsilon is 1e-05", "first_norm is False"):
        assert name in shown
    assert list(tmp_path.iterdir()) == []


def test_vocabulary_beside_a_weight_file_comes_along(tmp_path: Path) -> None:
    path, _, _ = lightseqs(tmp_path / "transformer.pb")
    for side, count in (("source", 13), ("target", 11)):
        words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, count))]
        (tmp_path / f"{side}.vocab.txt").write_text("\n".join(words) + "\n")
    assert main(["convert", str(path), str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "target.vocab.txt").is_file()
    assert "text_input" in (tmp_path / "model" / "config.pbtxt").read_text()


def test_source_of_no_kind_is_refused_with_the_kinds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none does not exist"):
        sources.read(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"has neither config.json \(Hugging Face\) nor a .pt file \(fairseq\)"):
        sources.read(tmp_path)
    (tmp_path / "a.onnx").touch()
    with pytest.raises(ConfigError, match=r"that ends in .pt, .npz, .safetensors, .pb, .hdf5"):
        sources.read(tmp_path / "a.onnx")
    with pytest.raises(ConfigError, match="nothing is forced there"):
        sources.read(lightseqs(tmp_path / "gpt.pb", "gpt")[0], forced_id=3)


def test_model_directory_is_a_source_as_its_weights_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, config, _ = lightseqs(tmp_path / "one" / "transformer.pb")
    assert main(["convert", str(path.parent), str(tmp_path / "two")]) == 0
    assert main(["compare", str(path.parent), str(tmp_path / "two")]) == 0
    assert sources.read(tmp_path / "two").config == config
    assert main(["convert", str(path.parent), str(tmp_path / "old"), "--dialect", "v0"]) == 0
    capsys.readouterr()
    code, lines = compared(capsys, path.parent, tmp_path / "old")
    assert (code, "dialect: 'head', 'v0'" in lines) == (1, True)
    assert compared(capsys, path.parent, tmp_path / "old", "--dialect", "v0")[0] == 0
    lightseqs(path.parent / "gpt.pb", "gpt")
    with pytest.raises(ConfigError, match=r"one weight file of .*; transformer\.pb and gpt\.pb are there"):
        sources.read(path.parent)


def test_reading_of_lightseqs_files_is_refused_for_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = small_checkpoints.FOLDER / "gpt2"
    for option in (("--dialect", "v0"), ("--kind", "gpt")):
        assert main(["convert", str(source), str(tmp_path / "model"), *option]) == 2
        assert f"{option[0]} is for LightSeq's files" in capsys.readouterr().err


def test_halves_are_scaled_as_halves_where_that_is_exact() -> None:
    halves = np.array([1.5, -3, 6e-8], np.float16)
    made = arrays.scaled(halves, 32)
    assert (made.dtype, made.tolist()) == (np.float16, (halves.astype(np.float32) * 32).tolist())
    for array, factor in ((halves, 512**0.5), (np.array([3000], np.float16), 32), (halves.astype(np.float32), 32)):
        made = arrays.scaled(array, factor)
        assert made.dtype == np.float32
        np.testing.assert_array_equal(made, array.astype(np.float32) * np.float32(factor))


# Comparing -----------------------------------------------------------------------------------------------------------


def compared(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, list[str]]:
    code = main(["compare", *map(str, arguments)])
    return code, capsys.readouterr().out.splitlines()


def test_compare_finds_settings_and_values_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, config, arrays = lightseqs(tmp_path / "a.pb")
    assert compared(capsys, path, path)[0] == 0
    assert isinstance(config, TransformerConfig)
    other = dict(arrays)
    other["encoder.norm.gain"] = arrays["encoder.norm.gain"].copy()
    other["encoder.norm.gain"][3] = 2
    arrays["encoder.norm.gain"][3] = 1.5
    weights.save(path, config, arrays)
    changed = replace(config, activation="gelu", decoding=replace(config.decoding, beam_size=7))
    weights.save(tmp_path / "b.safetensors", changed, other)
    code, lines = compared(capsys, path, tmp_path / "b.safetensors")
    assert code == 1
    assert lines == [
        "activation: 'relu', 'gelu'",
        "decoding.beam_size: 4, 7",
        "encoder.norm.gain: largest difference 0.5, as a share of the value 0.25",
        f"2 settings differ, 0 arrays have no counterpart, 1 of {len(arrays)} are apart by more than 0, at most by 0.5",
    ]
    weights.save(tmp_path / "b.safetensors", config, other)
    assert compared(capsys, path, tmp_path / "b.safetensors")[0] == 1
    assert compared(capsys, path, tmp_path / "b.safetensors", "--tolerance", "0.4")[0] == 1
    assert compared(capsys, path, tmp_path / "b.safetensors", "--tolerance", "0.5")[0] == 0


def test_compare_names_arrays_without_a_counterpart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lightseqs(tmp_path / "a.safetensors")[0]
    weights.save(tmp_path / "b.safetensors", *small_models.transformer(2, encoder_layers=2, inner=8))
    code, lines = compared(capsys, path, tmp_path / "b.safetensors")
    assert code == 1
    assert "encoder.1.ffn_norm.gain: only in the second" in lines
    assert "encoder.0.ffn_inner.weight: [16, 24], [16, 8]" in lines
    lightseqs(tmp_path / "c.safetensors", "gpt")
    code, lines = compared(capsys, path, tmp_path / "c.safetensors")
    assert "kind: 'transformer', 'gpt'" in lines
    assert "encoder.norm.gain: only in the first" in lines


def test_compare_tells_no_number_from_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, config, arrays = lightseqs(tmp_path / "a.safetensors")
    arrays["output.bias"][2] = np.nan
    weights.save(tmp_path / "b.safetensors", config, arrays)
    assert compared(capsys, tmp_path / "b.safetensors", tmp_path / "b.safetensors")[0] == 0
    code, lines = compared(capsys, path, tmp_path / "b.safetensors", "--tolerance", "1e9")
    assert code == 1
    assert "output.bias: largest difference inf, as a share of the value inf" in lines


def test_compare_takes_a_directory_of_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = small_checkpoints.FOLDER / "bart"
    assert main(["convert", str(source), str(tmp_path / "model"), "--no-check"]) == 0
    capsys.readouterr()
    assert compared(capsys, source, tmp_path / "model" / "transformer.safetensors")[0] == 0
    copy = shutil.copytree(source, tmp_path / "other")
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, "activation_function": "relu"}))
    code, lines = compared(capsys, copy, tmp_path / "model" / "transformer.safetensors")
    assert (code, lines[0]) == (1, "activation: 'relu', 'gelu_erf'")


def test_compare_of_what_cannot_be_read_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _, _ = lightseqs(tmp_path / "a.pb")
    assert main(["compare", str(path), str(tmp_path / "none.pb")]) == 2
    assert "none.pb does not exist" in capsys.readouterr().err
