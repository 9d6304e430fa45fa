"""fairseq's checkpoints beside fairseq itself: models it built and checkpoints it wrote, where it is installed."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_fairseq

from lightseq_backend import proof, weights
from lightseq_backend.__main__ import main
from lightseq_backend.export import fairseq as converter
from lightseq_backend.export import original_fairseq, sources

try:
    import fairseq
    import torch
    from fairseq import checkpoint_utils, options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from omegaconf import OmegaConf
except Exception as error:  # an old release beside new Python fails in many ways
    pytest.skip(f"fairseq cannot be imported: {error}", allow_module_level=True)

SIZES = [
    *("--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "20", "--encoder-layers", "2"),
    *("--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "20", "--decoder-layers", "2"),
    *("--encoder-attention-heads", "4", "--decoder-attention-heads", "4"),
    *("--max-source-positions", "28", "--max-target-positions", "28"),
]
PRE = ("--encoder-normalize-before", "--decoder-normalize-before")
LEARNED = ("--encoder-learned-pos", "--decoder-learned-pos")
# What fairseq-train is told; the dictionaries are joined where all embeddings are shared.
MODELS: dict[str, tuple[str, ...]] = {
    "post-norm": ("--arch", "transformer"),
    "pre-norm": ("--arch", "transformer", *PRE),
    "shared": ("--arch", "transformer_wmt_en_de", *PRE, "--share-all-embeddings"),
    "tied": ("--arch", "transformer_iwslt_de_en", "--share-decoder-input-output-embed"),
    "learned": ("--arch", "transformer", *LEARNED),
    "one of each position": ("--arch", "transformer", "--encoder-learned-pos"),
    "no scale": ("--arch", "transformer", "--no-scale-embedding"),
    "no final norm": ("--arch", "transformer", *PRE, "--no-decoder-final-norm"),
    "norm behind the embeddings": ("--arch", "transformer", "--layernorm-embedding"),
    "norm behind the embeddings, pre-norm": ("--arch", "transformer", "--layernorm-embedding", *PRE),
    "encoder post-norm": ("--arch", "transformer", "--decoder-normalize-before"),
    "decoder post-norm": ("--arch", "transformer", "--encoder-normalize-before"),
    "gelu": ("--arch", "transformer", "--activation-fn", "gelu"),
    "gelu_accurate": ("--arch", "transformer", "--activation-fn", "gelu_accurate"),
    "gelu_fast": ("--arch", "transformer", "--activation-fn", "gelu_fast"),
    "bart": ("--arch", "bart_base", "--share-all-embeddings"),
    "mbart": ("--arch", "mbart_base", "--share-all-embeddings"),
}


def checkpoint(name: str, folder: Path, old: bool = False, **changes: Any) -> Path:
    """A random model that fairseq builds of those arguments, saved as its trainer does. old: as it was before 2019."""
    joined = "--share-all-embeddings" in MODELS[name]
    for language, size in (("de", 37), ("en", 37 if joined else 41)):
        words = "".join(f"{'w' if joined else language}{i} 9\n" for i in range(4, size))
        (folder / f"dict.{language}.txt").write_text(words)
    parser = options.get_training_parser()
    given = [str(folder), "--source-lang", "de", "--target-lang", "en", *MODELS[name], *SIZES]
    args = options.parse_args_and_arch(parser, given)
    cfg = convert_namespace_to_omegaconf(args)
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(3)
    model = task.build_model(cfg.model)
    for path, parameter in model.named_parameters():
        if not path.endswith("embed_tokens.weight"):
            parameter.data.mul_(1.5).add_(0.1 * torch.randn_like(parameter))
    state = model.state_dict()
    if old:
        fused = re.compile(r"encoder\.layers\.\d+\.\w+_(weight|bias)")  # of release 0.12.2
        tensors = small_fairseq.aged({path: tensor for path, tensor in state.items() if not fused.fullmatch(path)})
        made = {"args": argparse.Namespace(**{**vars(args), **changes}), "model": tensors}
    else:
        for key, value in changes.items():
            setattr(cfg.model, key, value)
        made = {"args": None, "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True), "model": state}
    progress = {"optimizer_history": [{"num_updates": 7}], "task_state": task.state_dict(), "extra_state": {"epoch": 1}}
    checkpoint_utils.torch_persistent_save({**made, **progress}, str(folder / "model.pt"))
    return folder / "model.pt"


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("name", MODELS)
def test_converted_checkpoint_equals_what_fairseq_computes(
    name: str, old: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(name, tmp_path, old)
    assert main(["convert", str(source), str(tmp_path / "model")]) == 0
    assert f"compared with fairseq {fairseq.__version__} on 4 random inputs" in capsys.readouterr().out
    path = tmp_path / "model" / "transformer.safetensors"
    original, _ = sources.by_fairseq(source, weights.load(path)[0])
    assert original is not None
    comparison = proof.compare(path, original, inputs=8 if old else 50)
    print("\n".join(comparison.lines(name)))
    assert comparison.holds, "\n".join(comparison.lines())
    assert comparison.ties == 0
    assert max(comparison.encoder or 0, comparison.logits) < 2e-5


def test_texts_of_these_models_vary(tmp_path: Path) -> None:
    """Else equal texts would prove little."""
    source = checkpoint("post-norm", tmp_path)
    config = converter.read(source).config
    original, _ = sources.by_fairseq(source, config)
    assert original is not None
    texts = {tuple(original.greedy(ids, 16)) for ids in proof.random_inputs(config, 20, 0)}
    assert len(texts) >= 10
    assert len(set().union(*texts)) >= 10


@pytest.mark.parametrize(("name", "read_as"), [("post-norm", "silu"), ("gelu", "gelu"), ("gelu_accurate", "gelu_erf")])
def test_activation_that_is_read_wrongly_is_found(
    name: str, read_as: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(name, tmp_path)
    monkeypatch.setitem(converter.ACTIVATIONS, "relu" if name == "post-norm" else name, read_as)
    assert main(["convert", str(source), str(tmp_path / "model")]) == 2
    shown = capsys.readouterr()
    assert "compared with fairseq" in shown.out
    assert "the converted model differs from its original; nothing was kept" in shown.err
    assert not (tmp_path / "model").exists()


def test_activation_of_another_model_is_found(tmp_path: Path) -> None:
    source = checkpoint("gelu", tmp_path)
    assert main(["convert", str(source), str(tmp_path / "model"), "--no-check"]) == 0
    path = tmp_path / "model" / "transformer.safetensors"
    other, _ = sources.by_fairseq(checkpoint("gelu", tmp_path, activation_fn="relu"), weights.load(path)[0])
    assert other is not None
    assert not proof.compare(path, other).holds


def test_first_token_may_be_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint("pre-norm", tmp_path)
    assert main(["convert", str(source), str(tmp_path / "model"), "--forced-id", "9"]) == 0
    assert "compared with fairseq" in capsys.readouterr().out


def test_files_that_settings_name_are_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint("post-norm", tmp_path, encoder_embed_path=str(tmp_path / "nowhere"))
    assert main(["convert", str(source), str(tmp_path / "model")]) == 0
    assert "compared with fairseq" in capsys.readouterr().out


def test_model_that_fairseq_does_not_build_is_computed_plainly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint("post-norm", tmp_path, arch="transformer_of_mine", _name="transformer_of_mine")
    assert main(["convert", str(source), str(tmp_path / "model")]) == 0
    shown = capsys.readouterr().out
    assert f"compared with a plain pass over the arrays of {source} (fairseq {fairseq.__version__} cannot run" in shown


def test_halves_are_run_as_floats(tmp_path: Path) -> None:
    source = checkpoint("pre-norm", tmp_path)
    held = torch.load(source, weights_only=False)
    held["model"] = {name: tensor.half() for name, tensor in held["model"].items()}
    torch.save(held, source)
    original, _ = sources.by_fairseq(source, converter.read(source).config)
    assert isinstance(original, original_fairseq.Original)
    assert original.encode([5, 9, 2]).dtype == np.float32
    assert main(["convert", str(source), str(tmp_path / "model")]) == 0
