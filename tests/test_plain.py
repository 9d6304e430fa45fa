"""The second way to a source's numbers: it agrees with what others computed, and finds what a conversion got wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_fairseq
import small_models
from reference import GptReference, TransformerReference
from weight_files import golden

from lightseq_backend import proof, weights
from lightseq_backend.__main__ import main
from lightseq_backend.export import arrays, arrays_file, fairseq, plain_arrays, plain_fairseq, sources
from lightseq_backend.export.plain import Plain
from lightseq_backend.weights import description
from lightseq_backend.weights.safetensors import read_tensors

NEAR = 1e-4
MIXED = {"encoder_normalize_before": False, "decoder_normalize_before": True}


def checkpoint(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder = small_fairseq.FOLDER
    return json.loads((folder / f"{name}.json").read_text()), read_tensors(folder / f"{name}.safetensors")


def agrees(plain: Plain, model: Any, ids: list[int]) -> None:
    np.testing.assert_allclose(plain.logits(ids, [5, 3]), model.logits([5, 3])[-1], atol=NEAR)


@pytest.mark.parametrize("name", small_fairseq.COMMITTED)
def test_fairseqs_is_what_its_port_computed(name: str) -> None:
    settings, state = checkpoint(name)
    expected = np.load(small_fairseq.FOLDER / f"{name}.expected.npz")
    plain = plain_fairseq.plain(settings, state, fairseq.convert(settings, state, Path("model.pt")).config)
    for number in range(sum(key.startswith("ids.") for key in expected.files)):
        ids = expected[f"ids.{number}"].tolist()
        np.testing.assert_allclose(plain.encode(ids), expected[f"encoder.{number}"], atol=NEAR)
        np.testing.assert_allclose(plain.logits(ids), expected[f"logits.{number}"], atol=NEAR)
        assert plain.greedy(ids, 16) == expected[f"greedy.{number}"].tolist()


def test_fairseqs_older_names_are_the_same_model() -> None:
    settings, state = checkpoint("post")
    config = fairseq.convert(settings, state, Path("model.pt")).config
    aged = {
        name: array for name, array in state.items() if not any(part in name for part in ("q_proj", "k_proj", "v_proj"))
    }
    for name in [name for name in state if ".q_proj." in name]:
        joined = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
        aged[name.replace("q_proj.", "in_proj_")] = np.concatenate(joined)
    for names in (state, aged):
        found = plain_fairseq.plain(settings, names, config).logits([5, 6, 7, 2])
        np.testing.assert_array_equal(found, plain_fairseq.plain(settings, state, config).logits([5, 6, 7, 2]))


def test_stacks_of_different_order_convert_to_the_same_numbers(tmp_path: Path) -> None:
    settings, state = checkpoint("post")
    settings |= MIXED
    random = np.random.default_rng(0)
    for part, offset in (("weight", 1), ("bias", 0)):
        state[f"decoder.layer_norm.{part}"] = (offset + random.normal(0, 0.2, 16)).astype(np.float32)
    model = fairseq.convert(settings, state, Path("model.pt"))
    weights.save(tmp_path / "a.safetensors", model.config, model.arrays)
    plain = plain_fairseq.plain(settings, state, model.config)
    found = proof.compare(tmp_path / "a.safetensors", plain, inputs=20)
    assert found.holds, "\n".join(found.lines())
    assert max(found.encoder or 0, found.logits) < NEAR


@pytest.mark.parametrize("name", ["t01_base", "t05_postln_bart"])
def test_lightseqs_translator_is_the_one_of_its_definition(name: str) -> None:
    config, held = weights.load(golden(f"{name}.pb"))
    plain = sources.plain(golden(f"{name}.pb"), config)
    assert plain is not None
    ids = [5, 9, 7, 3]
    model = TransformerReference(config, held, ids)
    np.testing.assert_allclose(plain.encode(ids), model.memory, atol=NEAR)
    agrees(plain, model, ids)


def test_lightseqs_gpt_has_the_losses_that_were_written_down() -> None:
    config, _ = weights.load(golden("g01_base.pb"))
    plain = sources.plain(golden("g01_base.pb"), config)
    assert plain is not None
    compared = 0
    for line in golden("g01_base.jsonl").read_text().splitlines():
        case = json.loads(line)
        for row, loss in zip(case["token_ids"] if "ppl" in case else [], case.get("ppl", [])):
            if config.padding_id in row or len(row) < 2:
                continue
            compared += 1
            parts = []
            for place in range(1, len(row)):
                scores = plain.logits(row[:place]).astype(np.float64)
                parts.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[row[place]])
            assert np.mean(parts) == pytest.approx(loss, abs=NEAR)
    assert compared >= 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"post_norm": True, "first_norm": False, "activation": "silu"},
        {"embedding_norm": True, "decoder_post_norm": True, "activation": "gelu_erf", "encoder_final_norm": False},
        {"scaled_embedding": False, "norm_epsilon": 1e-2, "encoder_layers": 2, "decoder_layers": 2},
    ],
    ids=str,
)
def test_arrays_are_the_model_of_their_definition(settings: dict[str, Any]) -> None:
    config, held = small_models.transformer(3, **settings)
    plain = plain_arrays.plain(description.write(config, True), held, config)
    model = TransformerReference(config, held, [3, 4, 5])
    np.testing.assert_allclose(plain.encode([3, 4, 5]), model.memory, atol=NEAR)
    agrees(plain, model, [3, 4, 5])


@pytest.mark.parametrize("final_norm", [True, False])
def test_arrays_of_a_gpt_are_the_model_of_their_definition(final_norm: bool) -> None:
    config, held = small_models.gpt(3, layers=2, final_norm=final_norm)
    plain = plain_arrays.plain(description.write(config, True), held, config)
    np.testing.assert_allclose(plain.logits([3, 4, 5]), GptReference(config, held).logits([3, 4, 5])[-1], atol=NEAR)


# At conversion -------------------------------------------------------------------------------------------------------


def stored(folder: Path, **settings: Any) -> Path:
    """Arrays with tensor2tensor's habits."""
    config, held = small_models.transformer(2, norm_epsilon=1e-6)
    kept = {name: array for name, array in held.items() if not name.endswith("positions") and name != "output.weight"}
    values = {
        **description.write(config, True),
        "positions": "sinusoids",
        "embedding_scale": "sqrt(hidden)",
        **settings,
    }
    del values["scaled_embedding"], values["dialect"], values["decoding"]
    np.savez(folder / "weights.npz", **kept)
    (folder / "weights.json").write_text(json.dumps(values))
    return folder / "weights.npz"


def test_conversion_tells_how_far_it_is_from_a_plain_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(stored(tmp_path)), str(tmp_path / "model")]) == 0
    shown = capsys.readouterr().out
    for part in ("read back: all", "a plain pass over the arrays of", "encoder output", "4 of 4 the same"):
        assert part in shown
    assert main(["convert", str(tmp_path / "weights.npz"), str(tmp_path / "other"), "--no-check"]) == 0
    assert "plain" not in capsys.readouterr().out


@pytest.mark.parametrize("dialect", ["head", "v0"])
@pytest.mark.parametrize("form", ["safetensors", "protobuf"])
@pytest.mark.parametrize("name", ["t01_base", "g01_base"])
def test_lightseqs_files_are_compared(
    name: str, form: str, dialect: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model"
    assert main(["convert", str(golden(f"{name}.pb")), str(target), "--format", form, "--dialect", dialect]) == 0
    assert "4 of 4 the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("SINUSOIDAL", dict.fromkeys(arrays.SINUSOIDAL, arrays.interleaved_sinusoids)),
        ("scaled", lambda array, factor: arrays.scaled(array, factor * 1.01)),
    ],
)
def test_mistake_of_a_conversion_fails_it(
    place: str, wrong: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Reading back cannot see it: what was written is what was read."""
    monkeypatch.setattr(arrays_file, place, wrong)
    assert main(["convert", str(stored(tmp_path)), str(tmp_path / "model")]) == 2
    shown = capsys.readouterr()
    assert "read back: all" in shown.out
    assert "differs from its original; nothing was kept" in shown.err
    assert not (tmp_path / "model").exists()
