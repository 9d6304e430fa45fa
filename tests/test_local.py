"""Running a weight file without a server, as LightSeq's example programs do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from weight_files import golden

from lightseq_backend.__main__ import main
from lightseq_backend.errors import RequestError
from lightseq_backend.local import INFERENCES, read_test_case


def written(folder: Path, text: str) -> Path:
    path = folder / "test_case"
    path.write_text(text)
    return path


def case(name: str, number: int) -> dict:
    return json.loads(golden(f"{name}.jsonl").read_text().splitlines()[number])


def as_text(rows: list[list[int]]) -> str:
    return "\n".join([f"{len(rows)} {len(rows[0])}", *(" ".join(map(str, row)) for row in rows)])


def test_case_is_read_whatever_its_line_breaks(tmp_path: Path) -> None:
    assert read_test_case(written(tmp_path, "2 3\n1 2 3\n4 5 6")).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert read_test_case(written(tmp_path, "2\n3 1 2\n3 4 5 6 7 8")).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with a batch size and a length"),
        ("0 3 1 2 3", "must begin with a batch size and a length"),
        ("2 3 1 2 3", "promises 2 x 3 ids and holds 3"),
        ("1 2 3 x", "more than integers: .*'x'"),
    ],
)
def test_broken_case_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_test_case(written(tmp_path, text))


def test_missing_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_test_case(tmp_path / "none")


def test_run_prints_ten_times_and_every_hypothesis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    translated = case("t01_base", 0)
    path = written(tmp_path, as_text(translated["source_ids"]))
    assert main(["run", str(golden("t01_base.pb")), str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    times = [line for line in lines if re.fullmatch(r"inference \d+ of 10: \d+\.\d\d ms", line)]
    assert times == lines[:INFERENCES]
    assert len(times) == 10
    (row,) = translated["rows"]
    expected = [ids[: ids.index(99) + 1] for ids in row["ids"]]  # up to the first end id
    assert [[int(word) for word in line.split(": ")[1].split()] for line in lines[INFERENCES:]] == expected
    scores = [float(re.search(r"score (\S+):", line)[1]) for line in lines[INFERENCES:]]
    assert scores == pytest.approx(row["scores"], abs=1e-4)


def test_run_scores_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = case("g01_base", 1)
    path = written(tmp_path, as_text(scored["token_ids"]))
    assert main(["run", "--score", str(golden("g01_base.pb")), str(path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert [float(word) for word in last.removeprefix("ppl: ").split()] == pytest.approx(scored["ppl"], abs=1e-4)


def test_directory_is_run_and_inspected_as_its_config_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    parameters = {"weights": str(golden("g01_base.pb")), "dialect": "v0"}
    lines = [f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()]
    (directory / "config.pbtxt").write_text("\n".join(lines))
    assert main(["inspect", str(directory)]) == 0
    settings = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert (settings["dialect"], settings["layers"]) == ("v0", "2")
    assert main(["run", "--score", str(directory), str(written(tmp_path, "1 3 5 6 7"))]) == 0
    assert "ppl: " in capsys.readouterr().out


def test_run_refuses_a_bad_id_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "1 2 5 400")
    assert main(["run", str(golden("t01_base.pb")), str(path)]) == 2
    assert "id 400 at column 1 is outside the vocabulary" in capsys.readouterr().err
