"""Protobuf's text form without a schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightseq_backend.errors import ConfigError
from lightseq_backend.weights.pbtxt import parse

REPOSITORY = Path(__file__).resolve().parents[1] / "model_repository"


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {}),
        ("# a comment alone", {}),
        ('name: "a"', {"name": ["a"]}),
        ('name: \'a\' name:"b\\n\\"\\101"', {"name": ["a", 'b\n"A']}),
        ('name: "a" # "x"\n  \'b\';', {"name": ["ab"]}),
        ("n: -1, x: 1.5e-3 kind: KIND_CPU", {"n": ["-1"], "x": ["1.5e-3"], "kind": ["KIND_CPU"]}),
        ("dims: [ -1, 2 ] none: []", {"dims": ["-1", "2"], "none": []}),
        ('a { b: 1 } a: < b: "2" >', {"a": [{"b": ["1"]}, {"b": ["2"]}]}),
        ("a [ { b: 1 }, { c [ {} ] } ]", {"a": [{"b": ["1"]}, {"c": [{}]}]}),
        ("name: '#{'", {"name": ["#{"]}),
        ('name: "größe"', {"name": ["größe"]}),
    ],
)
def test_text_is_read(text: str, fields: dict) -> None:
    assert parse(text) == fields


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a {", "line 1: there is the end where the name of a field should be"),
        ("a: 1\nb: }", "line 2: there is '}' where a value should be"),
        ("a }", "there is '}' where a colon or a message behind a should be"),
        ("}", "there is '}' where the name of a field should be"),
        ("a: [1 2]", "there is '2' where a comma or ] should be"),
        ("a: 1\n'b", 'line 1: "\'b" is nothing that can be read'),
        ('a: 1\nb: "\\400"', "line 2: a string is no UTF-8, or has an escape over"),
        ('a: "\\xff"', "line 1: a string is no UTF-8, or has an escape over"),
        ("a {" * 100, "at most 64 messages in one another"),
    ],
)
def test_what_is_none_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", sorted(REPOSITORY.rglob("*.pbtxt")), ids=lambda path: "-".join(path.parts[-3:]))
def test_shipped_configurations_are_read_as_protobuf_reads_them(path: Path) -> None:
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    theirs, ours = text_format.Parse(path.read_text(), model_config.ModelConfig()), parse(path.read_text())
    assert ours["name"] == [theirs.name]
    assert [tensor["name"] for tensor in ours["input"]] == [[tensor.name] for tensor in theirs.input]
    assert [tensor["name"] for tensor in ours["output"]] == [[tensor.name] for tensor in theirs.output]
    given = {entry["key"][0]: entry["value"][0]["string_value"][0] for entry in ours.get("parameters", [])}
    assert given == {key: value.string_value for key, value in theirs.parameters.items()}
