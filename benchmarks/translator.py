"""The shipped French-English translator: this engine beside Hugging Face and CTranslate2 on the same weights.

    python -m benchmarks.translator [--device gpu] [--sentences N] [--repeats N]

Held-out sentences, beam 4, from text to text. Engines take turns; the median is reported, and BLEU of what came out.
Hugging Face and CTranslate2 read the shipped weights from a MarianMT directory that is made of them first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import gpu_device, machine, marian
from benchmarks.worker import Worker
from examples.fr2en.scores import bleu

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "model_repository" / "fr2en"
PAIRS = ROOT / "tests" / "fr2en" / "held_out.tsv"
HUGGING_FACE, CTRANSLATE2 = "Hugging Face", "CTranslate2"
BEAMS = 4
SENTENCES = 64  # that an engine has under way at the same time
THREADS = "2"
PRECISIONS = {"cpu": ("fp32", "int8"), "gpu": ("fp16", "int8")}
_COLUMNS = "| engine | precision | BLEU | sentences/s | slowest - fastest | same as Hugging Face |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.translator", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=list(PRECISIONS), default="cpu")
    parser.add_argument("--sentences", type=int, default=500, help="at most 500, the default")
    parser.add_argument("--repeats", type=int, default=3, help="translations of all by each engine (default: 3)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the report")
    options = parser.parse_args()
    rows = [line.split("\t") for line in PAIRS.read_text(encoding="utf-8").splitlines()[: options.sentences]]
    with tempfile.TemporaryDirectory() as folder:
        engines = measure(Path(folder), [row[0] for row in rows], [row[1] for row in rows], options)
    report: dict[str, Any] = {
        "machine": gpu_device.machine_with(options.device),
        "device": options.device,
        "sentences": len(rows),
        "repeats": options.repeats,
    }
    report["engines"] = engines
    text = markdown(report)
    print(text)
    options.results.mkdir(parents=True, exist_ok=True)
    stem = options.results / f"translator-{machine.file_name(report['machine'].get('gpu'))}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(text)


def measure(folder: Path, french: list[str], english: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    marian.save(MODEL, folder / "marian")
    kinds = [(name, precision) for name in ENGINES for precision in PRECISIONS[options.device]]
    kinds.remove((HUGGING_FACE, "int8"))
    if importlib.util.find_spec("ctranslate2") is None:
        kinds = [kind for kind in kinds if kind[0] != CTRANSLATE2]
    environment: dict[str, str | None] = {"OMP_NUM_THREADS": THREADS, "OPENBLAS_NUM_THREADS": THREADS}
    with ExitStack() as stack:
        workers = {
            (name, precision): stack.enter_context(
                Worker(ENGINES[name], (folder, precision, options.device), environment)
            )
            for name, precision in kinds
        }
        texts = {kind: worker.ask("translate", french, BEAMS) for kind, worker in workers.items()}  # and warms up
        seconds: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
        others: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
        for _ in range(options.repeats):
            for kind, worker in workers.items():
                machine.wait_until_idle(patience=5)
                busy = machine.busy_seconds()
                wall, processor = worker.ask("time", french, BEAMS)
                seconds[kind].append(wall)
                others[kind].append((machine.busy_seconds() - busy - processor) / wall / (os.cpu_count() or 1))
    best = texts[HUGGING_FACE, PRECISIONS[options.device][0]]
    return [
        {
            "engine": name,
            "precision": precision,
            "bleu": bleu(texts[name, precision], english),
            "sentences_a_second": [len(french) / taken for taken in seconds[name, precision]],
            "others_share_of_cores": [max(0.0, share) for share in others[name, precision]],
            "same_as_hugging_face": sum(map(str.__eq__, texts[name, precision], best)) / len(best),
        }
        for name, precision in kinds
    ]


def markdown(report: dict[str, Any]) -> str:
    where = report["machine"]
    gpu = f"{where['gpu']}; " if "gpu" in where else ""
    versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items() if version)
    lines = [
        f"# The French-English translator, {report['device']}",
        "",
        f"{report['sentences']} held-out sentences, beam {BEAMS}, {THREADS} threads, from text to text; medians of "
        f"{report['repeats']}, engines taking turns. {gpu}{where['processor']}, {where['cores']} cores; "
        f"Python {where['python']}, {versions}; {where['date']}.",
        "",
        _COLUMNS,
        "|--|--|--:|--:|--:|--:|",
    ]
    for row in report["engines"]:
        speeds = row["sentences_a_second"]
        lines.append(
            f"| {row['engine']} | {row['precision']} | {row['bleu']:.2f} | {statistics.median(speeds):.0f} "
            f"| {min(speeds):.0f} - {max(speeds):.0f} | {row['same_as_hugging_face']:.1%} |"
        )
    shares = [share for row in report["engines"] for share in row["others_share_of_cores"]]
    lines += [
        "",
        f"Other processes used {statistics.median(shares):.0%} of the cores (median), {max(shares):.0%} at most.",
    ]
    return "\n".join(lines) + "\n"


class Ours:
    def __init__(self, folder: Path, precision: str, device: str):
        import lightseq_backend

        self._model = lightseq_backend.load(MODEL, device=device, precision=precision, slots=SENTENCES * BEAMS)

    def translate(self, sentences: list[str], beams: int) -> list[str]:
        return [answer.text for answer in self._model.translate(sentences, beam_size=beams)]


class HuggingFace:
    """Sentences of like lengths together, SENTENCES a batch."""

    def __init__(self, folder: Path, precision: str, device: str):
        import torch
        from transformers import MarianMTModel

        from lightseq_backend.text.marian import Marian

        torch.set_num_threads(int(THREADS))
        self._torch, self._device = torch, "cuda" if device == "gpu" else "cpu"
        dtype = torch.float16 if precision == "fp16" else torch.float32
        self._model = MarianMTModel.from_pretrained(folder / "marian", dtype=dtype).eval().to(self._device)
        self._tokenizer = Marian(folder / "marian")

    def translate(self, sentences: list[str], beams: int) -> list[str]:
        ids = [self._tokenizer.encode(sentence) for sentence in sentences]
        order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
        texts = [""] * len(ids)
        for start in range(0, len(order), SENTENCES):
            chosen = order[start : start + SENTENCES]
            for index, row in zip(chosen, self._batch([ids[index] for index in chosen], beams), strict=True):
                texts[index] = self._tokenizer.decode(row)
        return texts

    def _batch(self, ids: list[list[int]], beams: int) -> Any:
        torch, padding = self._torch, self._model.config.pad_token_id
        width = max(map(len, ids))
        source = torch.tensor([row + [padding] * (width - len(row)) for row in ids], device=self._device)
        with torch.inference_mode():
            mask = (source != padding).long()
            return self._model.generate(source, attention_mask=mask, num_beams=beams, do_sample=False).tolist()


class CTranslate2:
    """The converter's model of the same directory; batches as it makes them, of SENTENCES at most."""

    def __init__(self, folder: Path, precision: str, device: str):
        import ctranslate2
        import sentencepiece

        converted = folder / "ctranslate2"
        if not converted.is_dir():
            convert = [sys.executable, "-m", "ctranslate2.converters.transformers"]
            subprocess.run([*convert, "--model", folder / "marian", "--output_dir", converted], check=True)
        compute = {"fp32": "float32", "fp16": "float16", "int8": "int8" if device == "cpu" else "int8_float16"}
        self._translator = ctranslate2.Translator(
            str(converted),
            device="cuda" if device == "gpu" else "cpu",
            compute_type=compute[precision],
            inter_threads=1,
            intra_threads=int(THREADS),
        )
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "marian" / "source.spm"))

    def translate(self, sentences: list[str], beams: int) -> list[str]:
        pieces = [[*row, "</s>"] for row in self._pieces.encode(sentences, out_type=str)]
        found = self._translator.translate_batch(pieces, beam_size=beams, max_batch_size=SENTENCES)
        return [self._pieces.decode_pieces(result.hypotheses[0]) for result in found]


ENGINES: dict[str, Callable[[Path, str, str], Any]] = {
    "this engine": Ours,
    HUGGING_FACE: HuggingFace,
    CTRANSLATE2: CTranslate2,
}

if __name__ == "__main__":
    main()
