"""How fairseq is asked, and what happens where it cannot be: with a stand-in of that name, which computes by NumPy.

test_convert_fairseq_itself.py has the real one.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_fairseq

from lightseq_backend.__main__ import main
from lightseq_backend.export import fairseq, original_fairseq
from lightseq_backend.weights.safetensors import read_tensors

needs_torch = pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed, which reads checkpoints")

PACKAGE = """
import logging
__version__ = "0.0"
logging.basicConfig(level=logging.INFO, force=True)
"""
DATA = """
class Dictionary:
    def __init__(self):
        self.symbols = ["<s>", "<pad>", "</s>", "<unk>"]
    def add_symbol(self, word):
        self.symbols.append(word)
    def __len__(self):
        return len(self.symbols)
"""
MODELS = """
import numpy as np
import torch
from lightseq_backend.export.plain_fairseq import OUTPUTS, _Stack

SEEN = {}

def build_model(args, task):
    SEEN.update(vars(args))
    return Model(vars(args), task)

class Model:
    def __init__(self, settings, task):
        self.settings, self.task = settings, task
    def load_state_dict(self, state, strict):
        arrays = {name: tensor.float().numpy() for name, tensor in state.items()}
        self.source, self.target = (_Stack(self.settings, arrays, side).built() for side in ("encoder", "decoder"))
        self.output = next(arrays[name] for name in OUTPUTS if name in arrays)
        assert len(self.task.source_dictionary) == len(arrays["encoder.embed_tokens.weight"])
        assert len(self.task.target_dictionary) == len(self.output)
    def float(self):
        return self
    def eval(self):
        return self
    def encoder(self, row, src_lengths):
        assert src_lengths.tolist() == [row.shape[1]]
        return {"encoder_out": [torch.from_numpy(self.source(row[0].tolist(), np.zeros((0, 0))))[:, None]]}
    def decoder(self, row, encoder_out):
        x = self.target(row[0].tolist(), encoder_out["encoder_out"][0][:, 0].numpy())
        return torch.from_numpy(x @ self.output.T)[None], {}
"""
GENERATOR = """
import torch

class SequenceGenerator:
    def __init__(self, models, dictionary, beam_size, max_len_b, min_len, eos):
        assert (beam_size, min_len, eos) == (1, 0, 2)
        self.model, self.most, self.end = models[0], max_len_b, eos
    def generate(self, models, sample, prefix_tokens):
        memory = self.model.encoder(**{"row": sample["net_input"]["src_tokens"],
                                       "src_lengths": sample["net_input"]["src_lengths"]})
        grown = [] if prefix_tokens is None else prefix_tokens[0].tolist()
        while len(grown) < self.most and self.end not in grown:
            scores = self.model.decoder(torch.tensor([[self.end, *grown]]), memory)[0][0, -1]
            scores[1] = float("-inf")
            grown.append(int(scores.argmax()))
        return [[{"tokens": torch.tensor(grown if self.end in grown else [*grown, self.end])}]]
"""
FILES = {"__init__": PACKAGE, "data": DATA, "models": MODELS, "sequence_generator": GENERATOR}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package named fairseq, the first to be found."""
    folder = tmp_path / "packages" / "fairseq"
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    for name in [name for name in sys.modules if name.split(".")[0] == "fairseq"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("fairseq", *(f"fairseq.{name}" for name in FILES if name != "__init__")):
        monkeypatch.setitem(sys.modules, name, None)  # what is imported under it goes away again
        del sys.modules[name]
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def committed(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder = small_fairseq.FOLDER
    return json.loads((folder / f"{name}.json").read_text()), read_tensors(folder / f"{name}.safetensors")


def saved(path: Path, name: str = "post", **changes: Any) -> Path:
    import torch

    settings, arrays = committed(name)
    state = {path: torch.from_numpy(np.array(array)) for path, array in arrays.items()}
    torch.save({"args": argparse.Namespace(**{**settings, **changes}), "model": state}, path)
    return path


@needs_torch
@pytest.mark.parametrize("forced", [[], ["--forced-id", "9"]], ids=["", "forced"])
@pytest.mark.parametrize("name", small_fairseq.COMMITTED)
def test_conversion_tells_how_far_it_is_from_fairseq(
    name: str, forced: list[str], stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "model.pt", name)
    assert main(["convert", str(source), str(tmp_path / "model"), *forced]) == 0
    shown = capsys.readouterr().out
    for part in ("read back: all", "compared with fairseq 0.0 on 4 random", "encoder output", "4 of 4 the same"):
        assert part in shown
    assert "plain pass" not in shown


@needs_torch
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("models", "Model(vars(args), task)", 'Model({**vars(args), "activation_fn": "gelu"}, task)'),
        ("models", "[None], {}", "[None] + 1, {}"),
        ("sequence_generator", "scores.argmax()", "scores.argmin()"),
    ],
)
def test_model_that_differs_from_fairseqs_is_not_kept(
    file: str, right: str, wrong: str, stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert right in FILES[file]
    (stand_in / f"{file}.py").write_text(FILES[file].replace(right, wrong))
    assert main(["convert", str(saved(tmp_path / "model.pt")), str(tmp_path / "model")]) == 2
    shown = capsys.readouterr()
    assert "compared with fairseq 0.0" in shown.out
    assert "the converted model differs from its original; nothing was kept" in shown.err
    assert not (tmp_path / "model").exists()


@needs_torch
@pytest.mark.parametrize(
    ("file", "right", "wrong", "reason"),
    [
        ("__init__", "__version__", "raise ValueError('no default\\n of today')\n__version__",
         "fairseq cannot run it, ValueError: no default"),
        ("models", "import torch", "import a_package_of_its_own",
         "fairseq 0.0 cannot run it, ModuleNotFoundError: No module named 'a_package_of_its_own'"),
        ("models", "return Model(vars(args), task)", "raise KeyError",
         "fairseq 0.0 cannot run it, KeyError"),
        ("models", "def encoder(", "def another(",
         "fairseq 0.0 cannot run it, AttributeError: 'Model' object has no attribute 'encoder'"),
        ("sequence_generator", "def generate(", "def another(",
         "fairseq 0.0 cannot run it, AttributeError: 'SequenceGenerator' object has no attribute 'generate'"),
    ],
)  # fmt: skip
def test_plain_pass_stays_where_fairseq_fails(
    file: str, right: str, wrong: str, reason: str,
    stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert right in FILES[file]
    (stand_in / f"{file}.py").write_text(FILES[file].replace(right, wrong))
    source = saved(tmp_path / "model.pt")
    assert main(["convert", str(source), str(tmp_path / "model")]) == 0
    assert f"compared with a plain pass over the arrays of {source} ({reason}) on 4 random" in capsys.readouterr().out


@needs_torch
def test_plain_pass_stays_where_fairseq_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "fairseq", None)
    source = saved(tmp_path / "model.pt")
    assert main(["convert", str(source), str(tmp_path / "model")]) == 0
    assert f"compared with a plain pass over the arrays of {source} on 4 random" in capsys.readouterr().out


def test_fairseq_that_cannot_be_imported_is_no_error(stand_in: Path) -> None:
    """Without PyTorch, too."""
    (stand_in / "__init__.py").write_text("raise ValueError('mutable default')")
    settings, arrays = committed("post")
    config = fairseq.convert(settings, arrays, Path("model.pt")).config
    assert original_fairseq.is_installed()
    assert original_fairseq.build(settings, arrays, config) == (
        None,
        "fairseq cannot run it, ValueError: mutable default",
    )


@needs_torch
def test_fairseq_sees_numbers_and_names_alone(stand_in: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "model.pt", encoder_embed_path="a file", betas="(0.9, 0.98)", lr=[0.1], share=True)
    assert main(["convert", str(source), str(tmp_path / "model")]) == 0
    seen = sys.modules["fairseq.models"].SEEN
    assert not {"encoder_embed_path", "betas", "lr", "source_lang"} & set(seen)
    assert (seen["arch"], seen["share"], seen["dropout"]) == ("transformer_wmt_en_de", True, 0.3)
    assert (seen["encoder_layers"], seen["adaptive_softmax_cutoff"]) == (2, None)


@needs_torch
def test_fairseq_does_not_set_up_our_logging(stand_in: Path, tmp_path: Path) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level, root.manager.disable
    assert main(["convert", str(saved(tmp_path / "model.pt")), str(tmp_path / "model")]) == 0
    assert (root.handlers, root.level, root.manager.disable) == before
