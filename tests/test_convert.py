"""From a Hugging Face directory to a served model: the numbers are the original's, and what cannot be done is named."""

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
import small_fairseq
import weight_files

from lightseq_backend import local, proof, weights
from lightseq_backend.__main__ import main
from lightseq_backend.config import GREEDY, STANDARD_BEAM, TOPK, TOPP
from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.export import arrays, directory, fairseq, huggingface
from lightseq_backend.weights.safetensors import read_tensors

FAMILIES = sorted(small_checkpoints.CHECKPOINTS)
needs_torch = pytest.mark.skipif(
    not (find_spec("torch") and find_spec("transformers")),
    reason="torch or transformers is not installed, which run the original beside the converted model",
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    """A copy of a committed checkpoint, with changes to its config.json or, with generation=True, to the other."""

    def copy(name: str, generation: bool = False, **changes: Any) -> Path:
        folder = tmp_path / "source"
        shutil.copytree(small_checkpoints.FOLDER / name, folder, dirs_exist_ok=True)
        path = folder / ("generation_config.json" if generation else "config.json")
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps(values))
        return folder

    return copy


def converted(source: Path, target: Path) -> Path:
    assert main(["convert", str(source), str(target), "--no-check"]) == 0
    (file,) = target.glob("*.safetensors")
    return file


def rewrite(source: Path, change: Any) -> None:
    """Saves a directory's arrays anew, changed."""
    from small_models import Arrays

    arrays: Arrays = {name: np.array(array) for name, array in read_tensors(source / "model.safetensors").items()}
    change(arrays)
    header, blobs, offset = {}, [], 0
    for name, array in arrays.items():
        blobs.append(array.astype(np.float32).tobytes())
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, offset + len(blobs[-1])]}
        offset += len(blobs[-1])
    text = json.dumps(header).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


# Numbers, without the original ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_model_computes_what_its_original_did(family: str, tmp_path: Path) -> None:
    """What the original computed was written down by make_convert_fixtures.py."""
    source = small_checkpoints.FOLDER / family
    probe = proof.Probe(converted(source, tmp_path / "model"))
    expected = np.load(source / "expected.npz")
    inputs = sum(name.startswith("ids.") for name in expected.files)
    assert inputs >= 4
    for number in range(inputs):
        ids = expected[f"ids.{number}"].tolist()
        np.testing.assert_allclose(probe.logits(ids), expected[f"logits.{number}"], atol=1e-4)
        if not probe.is_gpt:
            np.testing.assert_allclose(probe.encode(ids), expected[f"encoder.{number}"], atol=1e-4)
        assert probe.greedy(ids, 16) == expected[f"greedy.{number}"].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_texts_vary(family: str) -> None:
    """Else equal texts would prove little."""
    expected = np.load(small_checkpoints.FOLDER / family / "expected.npz")
    texts = {tuple(expected[name].tolist()) for name in expected.files if name.startswith("greedy.")}
    assert len(texts) >= 3
    assert len(set().union(*texts)) >= 5


def test_fixtures_are_small() -> None:
    assert sum(path.stat().st_size for path in small_checkpoints.FOLDER.rglob("*") if path.is_file()) < 300_000


# Numbers, beside the original ----------------------------------------------------------------------------------------

# Every family as it is, and what else it may be: name -> family, settings, how it is saved.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{family: (family, {}, {}) for family in FAMILIES},
    "gpt2 wide, gelu": ("gpt2", {"n_inner": None, "activation_function": "gelu"}, {}),
    "gpt2 in shards": ("gpt2", {}, {"max_shard_size": "8KB"}),
    "marian with two vocabularies": (
        "marian", {"vocab_size": 37, "decoder_vocab_size": 41, "share_encoder_decoder_embeddings": False}, {}
    ),
    "marian unscaled, relu": ("marian", {"scale_embedding": False, "activation_function": "relu"}, {}),
    "bart scaled, gelu_new": ("bart", {"scale_embedding": True, "activation_function": "gelu_new"}, {}),
    "bart with a forced first token": ("bart", {"forced_bos_token_id": 7}, {}),
    "m2m_100 with a forced first token": ("m2m_100", {"forced_bos_token_id": 9}, {}),
    "bart untied": ("bart", {"tie_word_embeddings": False, "scale_embedding": True}, {}),
    "m2m_100 of an odd width": (
        "m2m_100", {"d_model": 15, "encoder_attention_heads": 3, "decoder_attention_heads": 3}, {}
    ),
    "mbart of unlike stacks": ("mbart", {"encoder_layers": 1, "decoder_layers": 3}, {}),
}  # fmt: skip


@needs_torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_model_equals_its_original(variant: str, tmp_path: Path) -> None:
    from lightseq_backend.export.original import Original

    family, settings, options = VARIANTS[variant]
    small_checkpoints.build(family, **settings).save_pretrained(tmp_path / "source", **options)
    path = converted(tmp_path / "source", tmp_path / "model")
    original = Original(tmp_path / "source", weights.load(path)[0])
    comparison = proof.compare(path, original, inputs=50)
    assert comparison.holds, "\n".join(comparison.lines())
    assert comparison.inputs == 50
    assert comparison.ties == 0
    assert max(comparison.encoder or 0, comparison.logits) < 1.5e-4  # conversion itself allows 2e-4


@needs_torch
def test_older_files_are_read(tmp_path: Path) -> None:
    """pytorch_model.bin, whole and in shards, with and without the prefix, and with masks that GPT-2 once saved."""
    import torch

    model = small_checkpoints.build("gpt2")
    model.config.save_pretrained(tmp_path)
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    whole = huggingface.read(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    places = {}
    for number, name in enumerate(model.state_dict()):
        places[name] = f"pytorch_model-{number % 2}.bin"
    for file in set(places.values()):
        torch.save({name: model.state_dict()[name] for name in places if places[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    shards = huggingface.read(tmp_path)
    assert whole.config == shards.config
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(array, shards.arrays[name])


@needs_torch
def test_convert_compares_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(small_checkpoints.FOLDER / "marian"), str(tmp_path / "model")]) == 0
    shown = capsys.readouterr().out
    for part in ("4 random inputs", "encoder output", "first-step logits", "4 of 4 the same", "ready to be served"):
        assert part in shown


@needs_torch
def test_model_with_beams_by_default_is_compared_as_well(checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint("marian", generation=True, num_beams=5)
    assert main(["convert", str(source), str(tmp_path / "model")]) == 0
    assert weights.load(tmp_path / "model" / "transformer.safetensors")[0].decoding.beam_size == 5


@needs_torch
def test_model_that_differs_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = huggingface.read

    def read_wrongly(source: Path, forced_id: int | None) -> huggingface.Model:
        model = read(source, forced_id)
        return replace(model, config=replace(model.config, norm_epsilon=0.1))  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface, "read", read_wrongly)
    assert main(["convert", str(small_checkpoints.FOLDER / "marian"), str(tmp_path / "model")]) == 2
    assert "differs from its original; nothing was kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Comparing, with a stand-in for the original -------------------------------------------------------------------------


class Altered:
    """A model as the original of itself, with its scores and texts changed."""

    def __init__(self, path: Path, scores: float = 0.0, last: int | None = None):
        self._probe, self._scores, self._last = proof.Probe(path), scores, last

    def encode(self, ids: Any) -> np.ndarray:
        return self._probe.encode(ids)

    def logits(self, ids: Any, grown: Any = ()) -> np.ndarray:
        return self._probe.logits([*ids, *grown]) + self._scores

    def greedy(self, ids: Any, steps: int) -> list[int]:
        tokens = self._probe.greedy(ids, steps)
        return tokens if self._last is None else [*tokens[:-1], self._last]


def test_comparison_holds_for_the_same_and_fails_for_others(tmp_path: Path) -> None:
    path = converted(small_checkpoints.FOLDER / "gpt2", tmp_path / "model")
    assert proof.compare(path, Altered(path)).holds
    other_scores = proof.compare(path, Altered(path, scores=0.1))
    assert not other_scores.holds
    assert other_scores.logits > proof.TOLERANCE
    other_text = proof.compare(path, Altered(path, last=1))
    assert not other_text.holds
    assert len(other_text.unlike) == other_text.inputs


# A server -------------------------------------------------------------------------------------------------------------


def test_converted_models_of_every_source_are_served(tmp_path: Path, serve: Any) -> None:
    """What the server answers is what transformers generated when the checkpoints were made."""
    expected = {family: small_checkpoints.FOLDER / family / "expected.npz" for family in small_checkpoints.CHECKPOINTS}
    for family in expected:
        converted(small_checkpoints.FOLDER / family, tmp_path / family)
    for name in small_fairseq.COMMITTED:
        stored = small_fairseq.FOLDER / name
        settings = json.loads(stored.with_suffix(".json").read_text())
        model = fairseq.convert(settings, read_tensors(stored.with_suffix(".safetensors")), stored)
        with directory.new_directory(tmp_path / f"fairseq-{name}") as partial:
            directory.write(partial, f"fairseq-{name}", model)
        expected[f"fairseq-{name}"] = stored.with_suffix(".expected.npz")
    with repositories.grpc(serve(tmp_path).grpc) as client:
        for name, values in expected.items():
            given, gives = ("token_ids", "result") if name == "gpt2" else ("source_ids", "target_ids")
            ids, wanted = (np.load(values)[f"{part}.0"].tolist() for part in ("ids", "greedy"))
            options = {"sampling_method": "greedy", "max_new_tokens": len(wanted)}
            answer = repositories.ask(client, name, given, [ids], **options)[gives].ravel().tolist()
            assert answer[len(ids) if name == "gpt2" else 0 :][: len(wanted)] == wanted, name


def test_hdf5_file_is_served(tmp_path: Path, serve: Any) -> None:
    pytest.importorskip("h5py")
    source = weight_files.golden("t01_base.pb")
    assert main(["convert", str(source), str(tmp_path / "old"), "--format", "hdf5", "--ids-only"]) == 0
    expected = local.build(source).answer([[5, 6, 7]])[0].hypotheses[0].tokens.tolist()
    with repositories.grpc(serve(tmp_path).grpc) as client:
        answer = repositories.ask(client, "old", "source_ids", [[5, 6, 7]])["target_ids"][0, 0].tolist()
    assert answer[: len(expected)] == expected


# Directories ---------------------------------------------------------------------------------------------------------


WORDS = [f"w{i}" for i in range(37)]
VOCABULARIES = {"gpt2": {36: "</s>", 0: "<s>"}, "bart": {1: "<pad>", 2: "</s>"}}


def with_words(source: Path, family: str, count: int = 37) -> Path:
    (source / "vocab.txt").write_text("\n".join(VOCABULARIES[family].get(i, WORDS[i]) for i in range(count)) + "\n")
    return source


@pytest.mark.parametrize(("family", "like"), [("gpt2", "gpt"), ("bart", "transformer")])
def test_directory_is_like_the_shipped_ones(family: str, like: str, checkpoint: Any, tmp_path: Path) -> None:
    source = with_words(checkpoint(family), family)
    converted(source, tmp_path / "model")
    assert (tmp_path / "model" / "vocab.txt").read_text() == (source / "vocab.txt").read_text()
    shipped = Path(__file__).parents[1] / "model_repository" / like
    for path in ("config.pbtxt", "configs/cpu.pbtxt", "1/model.py"):
        ours, theirs = ((folder / path).read_text().splitlines() for folder in (tmp_path / "model", shipped))
        apart = ("name", '  { name: "token_log_probabilities"')  # an output that converted models alone have
        assert [line for line in theirs[1:] if not line.startswith(apart)] == [
            line for line in ours[1:] if not line.startswith(apart)
        ]
    assert 'name: "model"' in (tmp_path / "model" / "config.pbtxt").read_text()


def test_tokenizer_of_another_model_is_refused_or_left_out(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = with_words(checkpoint("bart"), "bart", count=36)
    (source / "vocab.txt").write_text((source / "vocab.txt").read_text() + "more\nmore still\n".replace(" ", "_"))
    assert main(["convert", str(source), str(tmp_path / "model"), "--no-check"]) == 2
    assert "has 38 source tokens; the model's source vocabulary has 37" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert main(["convert", str(source), str(tmp_path / "model"), "--no-check", "--ids-only"]) == 0
    assert "text_input" not in (tmp_path / "model" / "config.pbtxt").read_text()
    assert not (tmp_path / "model" / "vocab.txt").exists()


def test_name_may_be_given_and_must_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(small_checkpoints.FOLDER / "gpt2")
    assert main(["convert", source, str(tmp_path / "a"), "--no-check", "--name", "mine"]) == 0
    assert 'name: "mine"' in (tmp_path / "a" / "config.pbtxt").read_text()
    assert main(["convert", source, str(tmp_path / "b"), "--no-check", "--name", 'a"b']) == 2
    assert "it may have letters" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_target_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("kept")
    assert main(["convert", str(small_checkpoints.FOLDER / "gpt2"), str(tmp_path / "model"), "--no-check"]) == 2
    assert "model is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    writing = directory.new_directory(tmp_path / "model")
    (writing.__enter__() / "half").touch()
    assert [path.name.startswith(".") for path in tmp_path.iterdir()] == [True]
    error = RuntimeError("interrupted")
    assert not writing.__exit__(RuntimeError, error, None)
    assert list(tmp_path.iterdir()) == []


def test_empty_target_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert converted(small_checkpoints.FOLDER / "gpt2", tmp_path / "model").exists()


# What is read of the settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "gpt2",
            {"model_type": "llama"},
            "model_type is 'llama'; this converts gpt2, marian, bart, mbart, m2m_100, ",
        ),
        ("gpt2", {"activation_function": "mish"}, "activation_function is 'mish'; supported are relu, gelu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; only False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("gpt2", {"n_head": 5}, "hidden size 16 does not divide into 5 heads"),
        ("gpt2", {"n_embd": "wide"}, "n_embd is 'wide'; it must be a whole number"),
        ("marian", {"normalize_before": True}, "normalize_before is True; only False is supported"),
        ("marian", {"static_position_embeddings": False}, "static_position_embeddings is False; only True"),
        ("marian", {"decoder_ffn_dim": 99}, "decoder_ffn_dim is 99; only 20 is supported"),
        ("bart", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("bart", {"adapters": {"a": 1}}, "adapters is {'a': 1}; that is not supported"),
        ("bart", {"normalize_embedding": False}, "normalize_embedding is False; only True is supported"),
        ("m2m_100", {"quantization_config": {"bits": 8}}, "quantization_config is {'bits': 8}"),
        ("m2m_100", {"pad_token_id": None}, "pad_token_id is None; it must be a whole number"),
    ],
)
def test_setting_that_is_not_supported_is_named(checkpoint: Any, family: str, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        huggingface.read(checkpoint(family, **changes))
    assert message in str(caught.value)


def test_every_fault_is_named_at_once(checkpoint: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        huggingface.read(checkpoint("bart", activation_function="mish", normalize_before=True, d_model=None))
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("changes", "method", "notes"),
    [
        ({}, GREEDY, []),
        ({"num_beams": 5, "length_penalty": 0.8}, STANDARD_BEAM, []),
        ({"do_sample": True, "top_k": 7}, TOPK, []),
        ({"do_sample": True, "top_p": 0.9}, TOPP, []),
        ({"no_repeat_ngram_size": 3}, GREEDY, []),
        ({"typical_p": 0.9}, GREEDY, ["typical_p is 0.9: this engine has no such option"]),
    ],
)
def test_generation_settings_become_defaults(
    checkpoint: Any, changes: dict[str, Any], method: str, notes: list[str]
) -> None:
    model = huggingface.read(checkpoint("gpt2", generation=True, **changes))
    assert model.config.decoding.sampling_method == method
    assert model.notes == notes
    if "num_beams" in changes:
        assert (model.config.decoding.beam_size, model.config.decoding.length_penalty) == (5, 0.8)


@pytest.mark.parametrize(
    ("family", "positions", "offset"),
    [
        ("gpt2", "learned", 0),
        ("bart", "learned", 2),
        ("marian", "interleaved_sinusoids", 0),
        ("m2m_100", "sinusoids", 2),
        ("mbart", "learned", 2),
        ("pegasus", "interleaved_sinusoids", 0),
    ],
)
def test_kind_of_positions_is_told(family: str, positions: str, offset: int) -> None:
    config = huggingface.read(small_checkpoints.FOLDER / family).config
    assert (config.positions, config.position_offset) == (positions, offset)


def test_every_end_id_of_a_list_ends_a_text(checkpoint: Any) -> None:
    model = huggingface.read(checkpoint("gpt2", generation=True, eos_token_id=[36, 3, 4]))
    assert (model.config.end_id, model.config.decoding.end_ids, model.notes) == (36, (3, 4), [])
    with pytest.raises(ConfigError, match="eos_token_id has 10 ids; there may be 9"):
        huggingface.read(checkpoint("gpt2", generation=True, eos_token_id=[36, *range(9)]))


def test_first_token_may_be_forced(checkpoint: Any) -> None:
    assert huggingface.read(checkpoint("m2m_100")).config.forced_id is None  # type: ignore[union-attr]
    assert huggingface.read(checkpoint("m2m_100"), 9).config.forced_id == 9  # type: ignore[union-attr]
    source = checkpoint("m2m_100", generation=True, forced_bos_token_id=8)
    assert huggingface.read(source).config.forced_id == 8  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="forced_id is 99; the target vocabulary has 37"):
        huggingface.read(source, 99)
    with pytest.raises(ConfigError, match="nothing is forced there"):
        huggingface.read(checkpoint("gpt2"), 9)


def test_rules_of_the_directory_become_defaults_and_are_written(checkpoint: Any, tmp_path: Path) -> None:
    rules = {
        "early_stopping": "never", "max_length": 20, "min_length": 3, "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.5, "suppress_tokens": [7, 8], "begin_suppress_tokens": [9], "forced_eos_token_id": 2,
    }  # fmt: skip
    words = {"num_beams": 4, "num_return_sequences": 2, "bad_words_ids": [[3, 4], [1], [5]]}
    source = checkpoint("bart", generation=True, **rules, **words, min_new_tokens=4, forced_bos_token_id=6)
    config = weights.load(converted(source, tmp_path / "model"))[0]
    for name, value in rules.items():
        assert getattr(config.decoding, name) == (tuple(value) if isinstance(value, list) else value)
    assert (config.decoding.sampling_method, config.decoding.beam_size) == (STANDARD_BEAM, 4)
    assert (config.decoding.num_hypotheses, config.decoding.min_new_tokens) == (2, 3)
    assert (config.banned_id, config.decoding.bad_words_ids) == (1, ((3, 4), (5,)))


def test_bad_word_of_one_id_is_never_generated(checkpoint: Any) -> None:
    config = huggingface.read(checkpoint("marian")).config
    assert (config.banned_id, config.decoding.bad_words_ids) == (36, ())
    gpt = huggingface.read(checkpoint("gpt2", generation=True, bad_words_ids=[[4], [5, 6]])).config
    assert gpt.decoding.bad_words_ids == ((4,), (5, 6))
    with pytest.raises(ConfigError, match="take 1025 numbers; there is room for 1024"):
        huggingface.read(checkpoint("gpt2", generation=True, bad_words_ids=[[3] * 1024]))


# What is read of the files -------------------------------------------------------------------------------------------


def test_missing_files_are_named(checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json cannot be read: No such file"):
        huggingface.read(tmp_path)
    source = checkpoint("gpt2")
    (source / "model.safetensors").unlink()
    with pytest.raises(WeightError, match=r"no weights; looked for model.safetensors, .* pytorch_model.bin"):
        huggingface.read(source)


def test_missing_shard_is_named(checkpoint: Any) -> None:
    source = checkpoint("bart")
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightError, match=r"lacks shards that .* names: model-00002-of-00002.safetensors"):
        huggingface.read(source)


def test_shard_of_another_directory_is_refused(checkpoint: Any) -> None:
    source = checkpoint("bart")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    with pytest.raises(WeightError, match=r"names files elsewhere: ../b"):
        huggingface.read(source)


def test_faulty_arrays_are_named(checkpoint: Any) -> None:
    source = checkpoint("marian")

    def change(arrays: dict[str, np.ndarray]) -> None:
        del arrays["model.encoder.layers.0.fc1.bias"]
        arrays["model.decoder.layers.1.fc2.weight"] = np.zeros((2, 3))
        arrays["model.encoder.layers.0.adapter.weight"] = np.zeros(3)

    rewrite(source, change)
    with pytest.raises(WeightError) as caught:
        huggingface.read(source)
    assert str(caught.value).splitlines()[1:] == [
        "  encoder.layers.0.fc1.bias is missing",
        "  decoder.layers.1.fc2.weight is [2, 3]; the settings make it [16, 20]",
        "  encoder.layers.0.adapter.weight has no place in such a model",
    ]


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("gpt2", "lm_head.weight", "lm_head.weight is not wte.weight, though tie_word_embeddings says so"),
        ("marian", "lm_head.weight", "lm_head.weight is not shared.weight, though tie_word_embeddings says so"),
    ],
)
def test_tie_that_does_not_hold_is_named(checkpoint: Any, family: str, name: str, message: str) -> None:
    source = checkpoint(family)
    rewrite(source, lambda arrays: arrays.update({name: np.ones((37, 16))}))
    with pytest.raises(WeightError, match=message):
        huggingface.read(source)


def test_tables_are_stored_once(tmp_path: Path) -> None:
    stored = read_tensors(converted(small_checkpoints.FOLDER / "marian", tmp_path / "model"))
    assert len({"source.tokens", "target.tokens", "output.weight"} & set(stored)) == 1
    assert len({"source.positions", "target.positions"} & set(stored)) == 1


def test_sinusoids_that_a_file_leaves_out_are_computed(checkpoint: Any) -> None:
    source = checkpoint("pegasus")
    kept = huggingface.read(source).arrays
    rewrite(source, lambda stored: [stored.pop(name) for name in list(stored) if "embed_positions" in name])
    made = huggingface.read(source).arrays
    for side in ("source", "target"):
        assert not np.array_equal(kept[f"{side}.positions"], made[f"{side}.positions"])
        np.testing.assert_array_equal(made[f"{side}.positions"], arrays.interleaved_sinusoids(28, 16))


# Positions -----------------------------------------------------------------------------------------------------------


def test_sinusoids_are_those_of_the_formulas() -> None:
    table = arrays.interleaved_sinusoids(9, 6)
    assert table[7, 1] == pytest.approx(np.sin(7 / 10000 ** (2 / 6)))
    assert table[7, 3 + 2] == pytest.approx(np.cos(7 / 10000 ** (4 / 6)))
    table = arrays.fairseq_sinusoids(9, 7)
    assert table[5, 1] == pytest.approx(np.sin(5 / 100), rel=1e-5)
    assert table[5, 3 + 2] == pytest.approx(np.cos(5 / 10000), rel=1e-5)
    assert not table[:, 6].any()
