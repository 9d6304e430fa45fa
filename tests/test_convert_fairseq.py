"""fairseq's checkpoints: the numbers are those of transformers' ports, nothing pickled is run, the rest is refused."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_fairseq
from small_fairseq import POSITIONS

from lightseq_backend import proof, text, weights
from lightseq_backend.__main__ import main
from lightseq_backend.config import TransformerConfig
from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.export import fairseq
from lightseq_backend.export.plain_fairseq import plain
from lightseq_backend.weights.safetensors import read_tensors

needs_torch = pytest.mark.skipif(
    not (find_spec("torch") and find_spec("transformers")),
    reason="torch or transformers is not installed, which read checkpoints and compute what is expected",
)


def committed(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], Any]:
    """Settings, arrays and what transformers computed, as make_convert_fixtures.py wrote them down."""
    folder = small_fairseq.FOLDER
    arrays = read_tensors(folder / f"{name}.safetensors")
    return json.loads((folder / f"{name}.json").read_text()), arrays, np.load(folder / f"{name}.expected.npz")


def saved(path: Path, checkpoint: Any) -> Path:
    import torch

    torch.save(checkpoint, path)
    return path


# Numbers, without the original ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", small_fairseq.COMMITTED)
def test_converted_model_computes_what_its_port_did(name: str, tmp_path: Path) -> None:
    settings, arrays, expected = committed(name)
    model = fairseq.convert(settings, arrays, Path("model.pt"))
    weights.save(tmp_path / "a.safetensors", model.config, model.arrays)
    probe = proof.Probe(tmp_path / "a.safetensors")
    inputs = sum(key.startswith("ids.") for key in expected.files)
    assert inputs >= 4
    for number in range(inputs):
        ids = expected[f"ids.{number}"].tolist()
        np.testing.assert_allclose(probe.encode(ids), expected[f"encoder.{number}"], atol=1e-4)
        np.testing.assert_allclose(probe.logits(ids), expected[f"logits.{number}"], atol=1e-4)
        assert probe.greedy(ids, 16) == expected[f"greedy.{number}"].tolist()


def test_stacks_of_different_order_are_read() -> None:
    """A pre-norm decoder behind a post-norm encoder: its LayerNorms stay where they are, and it has a last one."""
    settings, arrays, _ = committed("post")
    settings["decoder_normalize_before"] = True
    with pytest.raises(WeightError, match=r"decoder\.layer_norm\.weight is missing"):
        fairseq.convert(settings, arrays, Path("model.pt"))
    arrays["decoder.layer_norm.weight"] = np.full(16, 2, np.float32)
    arrays["decoder.layer_norm.bias"] = np.ones(16, np.float32)
    model = fairseq.convert(settings, arrays, Path("model.pt"))
    assert isinstance(model.config, TransformerConfig)
    assert model.config.encoder_norms == (True, False, False)
    assert model.config.decoder_norms == (False, True, False)
    for ours, theirs in (
        ("encoder.norm", "encoder.layers.1.final_layer_norm"),
        ("encoder.1.attention_norm", "encoder.layers.0.final_layer_norm"),
        ("decoder.0.self_norm", "decoder.layers.0.self_attn_layer_norm"),
        ("decoder.1.ffn_norm", "decoder.layers.1.final_layer_norm"),
        ("decoder.norm", "decoder.layer_norm"),
    ):
        np.testing.assert_array_equal(model.arrays[f"{ours}.gain"], arrays[f"{theirs}.weight"])


def test_decoder_without_a_last_norm_is_read_and_computed(tmp_path: Path) -> None:
    """By the original's own pass over the checkpoint, too, which knows nothing of our description."""
    settings, arrays, _ = committed("pre")
    settings["no_decoder_final_norm"] = True
    for part in ("weight", "bias"):
        del arrays[f"decoder.layer_norm.{part}"]
    model = fairseq.convert(settings, arrays, Path("model.pt"))
    assert isinstance(model.config, TransformerConfig)
    assert (model.config.encoder_final_norm, model.config.decoder_final_norm) == (True, False)
    assert "decoder.norm.gain" not in model.arrays
    weights.save(tmp_path / "a.safetensors", model.config, model.arrays)
    original, probe = plain(settings, arrays, model.config), proof.Probe(tmp_path / "a.safetensors")
    for ids in ([5, 9, 2], [7, 4, 8, 6, 2]):
        np.testing.assert_allclose(probe.logits(ids), original.logits(ids), atol=1e-4)
        assert probe.greedy(ids, 16) == original.greedy(ids, 16)


def test_kind_of_positions_is_told() -> None:
    settings, arrays, _ = committed("post")
    config = fairseq.convert(settings, arrays, Path("model.pt")).config
    assert (config.positions, config.position_offset) == ("sinusoids", 2)
    table = {"encoder.embed_positions.weight": np.ones((POSITIONS + 2, 16), np.float32)}
    learned = fairseq.convert({**settings, "encoder_learned_pos": True}, {**arrays, **table}, Path("model.pt"))
    assert (learned.config.positions, learned.config.position_offset) == ("table", 2)  # one of each
    assert (learned.arrays["source.positions"] == 1).all()


@pytest.mark.parametrize("name", small_fairseq.COMMITTED)
def test_expected_texts_vary(name: str) -> None:
    """Else equal texts would prove little."""
    expected = committed(name)[2]
    texts = {tuple(expected[key].tolist()) for key in expected.files if key.startswith("greedy.")}
    assert len(texts) >= 3
    assert len(set().union(*texts)) >= 5


# Numbers, beside the original ----------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("name", small_fairseq.MODELS)
def test_converted_checkpoint_equals_its_port(name: str, old: bool, tmp_path: Path) -> None:
    """Both generations of checkpoints hold the same; the newer one is run."""
    from lightseq_backend.export.original import Original

    source = saved(tmp_path / "model.pt", small_fairseq.checkpoint(name, old))
    assert main(["convert", str(source), str(tmp_path / "model")]) == 0
    path = tmp_path / "model" / "transformer.safetensors"
    small_fairseq.original(name).save_pretrained(tmp_path / "original")
    comparison = proof.compare(path, Original(tmp_path / "original", weights.load(path)[0]), inputs=8 if old else 50)
    assert comparison.holds, "\n".join(comparison.lines())
    assert comparison.ties == 0
    assert max(comparison.encoder or 0, comparison.logits) < 1.5e-4


@needs_torch
def test_convert_takes_dictionaries_and_names_the_sources(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    saved(source / "checkpoint_best.pt", small_fairseq.checkpoint("post", old=True))
    for language, size in (("de", 37), ("en", 41)):
        (source / f"dict.{language}.txt").write_text("".join(f"{language}{i} 9\n" for i in range(4, size)))
    assert main(["convert", str(source), str(tmp_path / "model")]) == 0
    shown = (tmp_path / "model" / "config.pbtxt").read_text()
    assert 'parameters { key: "source_language" value { string_value: "de" } }' in shown
    assert "text_input" in shown
    config = weights.load(tmp_path / "model" / "transformer.safetensors")[0]
    tokenizer = text.load([tmp_path / "model"], config, "de")
    assert tokenizer is not None
    assert tokenizer.encode("de4 de36") == [4, 36, 2]
    assert tokenizer.decode([40, 2]) == "en40"


@needs_torch
def test_source_language_is_asked_for_and_may_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    saved(source / "model.pt", small_fairseq.checkpoint("post", old=False, source_lang=None))
    for language, size in (("de", 37), ("en", 41)):
        (source / f"dict.{language}.txt").write_text("".join(f"{language}{i} 9\n" for i in range(4, size)))
    assert main(["convert", str(source), str(tmp_path / "model")]) == 2
    assert "source_language must name the source's language" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "model"), "--source-language", "de"]) == 0
    assert 'key: "source_language" value { string_value: "de" }' in (tmp_path / "model" / "config.pbtxt").read_text()


@needs_torch
def test_dictionary_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "model.pt", small_fairseq.checkpoint("pre", old=False))
    (tmp_path / "dict.txt").write_text("".join(f"w{i} 9\n" for i in range(40)))
    assert main(["convert", str(tmp_path / "model.pt"), str(tmp_path / "model")]) == 2
    assert "has 44 source tokens; the model's source vocabulary has 37" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@needs_torch
def test_first_token_may_be_forced(tmp_path: Path) -> None:
    source = saved(tmp_path / "model.pt", small_fairseq.checkpoint("pre", old=False))
    assert main(["convert", str(source), str(tmp_path / "model"), "--forced-id", "9"]) == 0
    assert weights.load(tmp_path / "model" / "transformer.safetensors")[0].forced_id == 9  # type: ignore[union-attr]


# What a file may hold ------------------------------------------------------------------------------------------------


class Harmful:
    """Unpickled, it would run a command."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


@needs_torch
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = small_fairseq.checkpoint("pre", old=True)
    source = saved(tmp_path / "model.pt", {**checkpoint, "extra_state": Harmful(tmp_path / "ran")})
    assert main(["convert", str(source), str(tmp_path / "model")]) == 2
    assert "model.pt cannot be read: it pickles posix.system, which might run code" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


@needs_torch
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"text" * 99])
def test_damaged_checkpoint_is_refused(damage: Any, tmp_path: Path) -> None:
    source = saved(tmp_path / "model.pt", small_fairseq.checkpoint("pre", old=True))
    source.write_bytes(damage(source.read_bytes()))
    with pytest.raises(WeightError, match=r"model.pt cannot be read: it is cut short, damaged or no file of PyTorch"):
        fairseq.read(source)


@needs_torch
@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"weights": {}}, "has no `model`; is it a fairseq checkpoint"),
        ([1], "has no `model`"),
        ({"model": {}}, r"has neither `args` nor `cfg.model`"),
    ],
)
def test_file_of_another_program_is_refused(checkpoint: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=message):
        fairseq.read(saved(tmp_path / "model.pt", checkpoint))


def test_without_torch_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "model.pt").touch()
    with pytest.raises(ConfigError, match=r"model.pt is PyTorch's format: install torch"):
        fairseq.read(tmp_path)


def test_checkpoint_of_a_directory_is_found_or_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no checkpoint; looked for model.pt, checkpoint_best.pt"):
        fairseq.find(tmp_path)
    (tmp_path / "a.pt").touch()
    assert fairseq.find(tmp_path).name == "a.pt"
    (tmp_path / "b.pt").touch()
    with pytest.raises(ConfigError, match=r"has several checkpoints, a.pt among them: name one"):
        fairseq.find(tmp_path)
    (tmp_path / "checkpoint_best.pt").touch()
    assert fairseq.find(tmp_path).name == "checkpoint_best.pt"
    assert fairseq.find(tmp_path / "b.pt").name == "b.pt"


# What is read of the settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "transformer_lm_gpt"}, "arch is 'transformer_lm_gpt'; this converts transformer, bart, mbart"),
        ({"arch": "fconv"}, "arch is 'fconv'; this converts transformer, bart, mbart"),
        ({"decoder_output_dim": 8}, "decoder_output_dim is 8 and decoder_embed_dim 16; they must be the same"),
        ({"decoder_embed_dim": 8}, "decoder_embed_dim is 8 and encoder_embed_dim 16"),
        ({"decoder_ffn_embed_dim": 99}, "decoder_ffn_embed_dim is 99 and encoder_ffn_embed_dim 20"),
        ({"adaptive_softmax_cutoff": [5]}, "adaptive_softmax_cutoff is [5]; that is not supported"),
        ({"cross_self_attention": True}, "cross_self_attention is True; that is not supported"),
        ({"no_token_positional_embeddings": True}, "no_token_positional_embeddings is True"),
        ({"activation_fn": "tanh"}, "activation_fn is 'tanh'; supported are relu, gelu"),
        ({"encoder_layers": None}, "encoder_layers is None; it must be a whole number"),
        ({"encoder_attention_heads": 3, "decoder_attention_heads": 3}, "hidden size 16 does not divide into 3 heads"),
    ],
)
def test_setting_that_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    settings, arrays, _ = committed("post")
    with pytest.raises(ConfigError) as caught:
        fairseq.convert({**settings, **changes}, arrays, Path("model.pt"))
    assert "model.pt" in str(caught.value)
    assert message in str(caught.value)


def test_every_fault_of_the_arrays_is_named() -> None:
    settings, arrays, _ = committed("pre")
    del arrays["encoder.layer_norm.weight"]  # as releases before the version of 2018 had none
    arrays["decoder.layers.1.fc2.weight"] = np.zeros((2, 3), np.float32)
    arrays["encoder.layers.0.w_resid"] = np.zeros(16, np.float32)
    arrays["decoder.output_projection.weight"] = np.ones((37, 16), np.float32)
    with pytest.raises(WeightError) as caught:
        fairseq.convert(settings, arrays, Path("model.pt"))
    assert set(str(caught.value).splitlines()[1:]) == {
        "  encoder.layer_norm.weight is missing",
        "  decoder.layers.1.fc2.weight is [2, 3]; the settings make it [16, 20]",
        "  encoder.layers.0.w_resid has no place in such a model",
        "  decoder.output_projection.weight is not encoder.embed_tokens.weight, though share_all_embeddings says so",
    }


def test_output_under_its_older_name_is_found() -> None:
    settings, arrays, _ = committed("post")
    older = dict(arrays)
    older["decoder.embed_out"] = older.pop("decoder.output_projection.weight")
    expected = fairseq.convert(settings, arrays, Path("model.pt")).arrays
    made = fairseq.convert(settings, older, Path("model.pt")).arrays
    assert all((made[name] == array).all() for name, array in expected.items())


def test_fused_layers_of_the_last_release_are_left_out() -> None:
    """fairseq 0.12.2 saves them with every encoder layer: zeros, or what they were when the training began."""
    settings, arrays, _ = committed("post")
    expected = fairseq.convert(settings, arrays, Path("model.pt")).arrays
    for layer in range(2):
        for name, shape in (("in_proj", (48, 16)), ("out_proj", (16, 16)), ("fc1", (20, 16)), ("fc2", (16, 20))):
            arrays[f"encoder.layers.{layer}.{name}_weight"] = np.zeros(shape, np.float32)
            arrays[f"encoder.layers.{layer}.{name}_bias"] = np.zeros(shape[0], np.float32)
    made = fairseq.convert(settings, arrays, Path("model.pt")).arrays
    assert all((made[name] == array).all() for name, array in expected.items())
    arrays["decoder.layers.0.fc1_bias"] = np.zeros(20, np.float32)
    with pytest.raises(WeightError, match=r"decoder\.layers\.0\.fc1_bias has no place in such a model"):
        fairseq.convert(settings, arrays, Path("model.pt"))


def test_settings_are_found_in_both_places_flat_or_not() -> None:
    nested = {"encoder": {"layers": 3}, "activation_fn": "relu"}
    for checkpoint in ({"args": nested}, {"args": None, "cfg": {"model": nested}}):
        found = fairseq.settings_of(checkpoint, Path("model.pt"))
        assert found == {"encoder_layers": 3, "activation_fn": "relu"}
