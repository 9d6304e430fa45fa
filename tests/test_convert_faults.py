"""What can be wrong with what `convert` is given, or with where it writes: a clear message, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import small_checkpoints
import small_models

from lightseq_backend import weights
from lightseq_backend.__main__ import main
from lightseq_backend.weights import files

needs_torch = pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed, which reads pytorch_model.bin")
needs_h5py = pytest.mark.skipif(not find_spec("h5py"), reason="h5py is not installed")


def copy(family: str, folder: Path, **changes: Any) -> Path:
    """A committed checkpoint, with changes to its config.json."""
    source = shutil.copytree(small_checkpoints.FOLDER / family, folder / "source")
    values = {**json.loads((source / "config.json").read_text()), **changes}
    (source / "config.json").write_text(json.dumps(values))
    return source


def refusal(source: Path, target: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What is said on the way to exit code 2; nothing may have appeared beside the target, which must not be there."""
    before = sorted(target.parent.iterdir())
    assert main(["convert", str(source), str(target), "--no-check", *options]) == 2
    assert sorted(target.parent.iterdir()) == before
    return capsys.readouterr().err


def pickled(family: str, source: Path, **more: Any) -> None:
    """Puts pytorch_model.bin in the place of safetensors, with more in it."""
    import torch

    model = small_checkpoints.build(family)
    (source / "model.safetensors").unlink()
    torch.save({**model.state_dict(), **more}, source / "pytorch_model.bin")


class Harmful:
    """Unpickled, it would run a command."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


# The source ----------------------------------------------------------------------------------------------------------


def remove(name: str) -> Callable[[Path], None]:
    return lambda source: (source / name).unlink()


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        data = (source / name).read_bytes()
        (source / name).write_bytes(data[: int(keep * len(data))])

    return damage


SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "has neither config.json (Hugging Face) nor a .pt file (fairseq): "),
        (remove(SHARD), f"lacks shards that model.safetensors.index.json names: {SHARD}"),
        (remove("model.safetensors.index.json"), "has no weights; looked for model.safetensors, "),
        (cut(SHARD, 0.6), "the file is cut short"),
        (cut(SHARD, 0.01), "the file is cut short or no safetensors file"),
        (cut(SHARD, 0), "the file is empty"),
        (cut("model.safetensors.index.json", 0.5), "model.safetensors.index.json is no JSON"),
        (cut("config.json", 0.5), "config.json is no JSON"),
    ],
)
def test_file_that_is_missing_or_cut_short_is_named(
    damage: Callable[[Path], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("bart", tmp_path)
    damage(source)
    said = refusal(source, tmp_path / "model", capsys)
    assert message in said
    assert str(source) in said


def test_every_missing_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy("bart", tmp_path)
    for shard in source.glob("model-*"):
        shard.unlink()
    assert f"model-00001-of-00002.safetensors, {SHARD}" in refusal(source, tmp_path / "model", capsys)


def test_vocabulary_and_table_of_different_sizes_are_both_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(copy("m2m_100", tmp_path, vocab_size=40), tmp_path / "model", capsys)
    assert "shared.weight is [37, 16]; the settings make it [40, 16]" in said


def test_architecture_that_is_not_known_is_named_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(copy("gpt2", tmp_path, model_type="t5"), tmp_path / "model", capsys)
    assert "model_type is 't5'; this converts gpt2, marian, bart, mbart, m2m_100, pegasus" in said


def test_tokenizer_that_has_other_ends_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy("bart", tmp_path)
    words = ["<pad>", "</s>", *(f"w{i}" for i in range(2, 37))]
    (source / "vocab.txt").write_text("\n".join(words) + "\n")
    said = refusal(source, tmp_path / "model", capsys)
    assert "has end id 1; the model's is 2" in said
    assert "has padding id 0; the model's is 1" in said


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (("source.spm", "vocab.json"), "target.spm"),
        (("source.spm",), "target.spm, vocab.json"),
        (("merges.txt",), "vocab.json"),
        (("target.vocab.txt",), "source.vocab.txt"),
    ],
)
def test_file_that_a_tokenizer_lacks_is_named(
    there: tuple[str, ...], missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("marian", tmp_path)
    for name in there:
        (source / name).touch()
    assert f"has a part of a tokenizer and lacks {missing};" in refusal(source, tmp_path / "model", capsys)
    assert main(["convert", str(source), str(tmp_path / "model"), "--no-check", "--ids-only"]) == 0


def test_model_without_a_tokenizer_is_said_to_take_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(copy("marian", tmp_path)), str(tmp_path / "model"), "--no-check"]) == 0
    assert "has no tokenizer of a known kind: the model takes and gives ids" in capsys.readouterr().out


@needs_torch
def test_code_in_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy("gpt2", tmp_path)
    pickled("gpt2", source, more=Harmful(tmp_path / "ran"))
    said = refusal(source, tmp_path / "model", capsys)
    assert "pytorch_model.bin cannot be read: it pickles posix.system, which might run code" in said
    assert not (tmp_path / "ran").exists()


@needs_torch
def test_pickle_of_more_than_tensors_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse.Namespace is fairseq's alone."""
    import argparse

    source = copy("gpt2", tmp_path)
    pickled("gpt2", source, more=argparse.Namespace(a=1))
    assert "it pickles argparse.Namespace, which" in refusal(source, tmp_path / "model", capsys)


@needs_torch
def test_pickle_that_is_cut_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy("gpt2", tmp_path)
    pickled("gpt2", source)
    cut("pytorch_model.bin", 0.5)(source)
    assert "pytorch_model.bin cannot be read: it is cut short" in refusal(source, tmp_path / "model", capsys)


def test_weight_file_that_is_cut_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights.save(tmp_path / "a.pb", *small_models.transformer(2))
    cut("a.pb", 0.5)(tmp_path)
    assert "cut short or damaged" in refusal(tmp_path / "a.pb", tmp_path / "model", capsys)


# The target ----------------------------------------------------------------------------------------------------------


def test_target_that_is_a_file_or_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = small_checkpoints.FOLDER / "gpt2"
    (tmp_path / "file").write_text("kept")
    assert "file is a file" in refusal(source, tmp_path / "file", capsys)
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    assert "full is not empty" in refusal(source, tmp_path / "full", capsys)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_full_disk_is_said_and_nothing_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: Any) -> None: ...

        def writelines(self, pieces: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_full(path: str, mode: str) -> Any:
        if mode == "rb":
            return open(path, mode)
        Path(path).write_bytes(b"half")
        return Full()

    monkeypatch.setattr(files, "open", open_full, raising=False)
    said = refusal(small_checkpoints.FOLDER / "gpt2", tmp_path / "model", capsys)
    assert said == f"lightseq: {tmp_path / 'model'} cannot be made: No space left on device\n"


# Files may have 4096 bytes: the weights do not fit, what comes before them does.
LIMITED = """
import resource, sys
from lightseq_backend.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("form", ["safetensors", "protobuf", pytest.param("hdf5", marks=needs_h5py)])
def test_write_that_fails_for_real_leaves_nothing(form: str, tmp_path: Path) -> None:
    source = tmp_path / "a.pb"
    weights.save(source, *small_models.transformer(2))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "convert", str(source), str(tmp_path / "model"), "--format", form],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path / 'model'} cannot be made: " in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [source]
