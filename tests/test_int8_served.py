"""LightSeq's int8 files behind a real Triton, as the directories that its own backend served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from int8_files import messages
from repositories import GPT, TRANSFORMER, ask, config, grpc
from weight_files import written

from lightseq_backend import local
from lightseq_backend.serving.embedded import EmbeddedServer

TYPES = {"transformer": ("QuantTransformer", TRANSFORMER, "source_ids"), "gpt": ("QuantGpt", GPT, "token_ids")}


def test_int8_files_are_served_as_they_are_rounded(tmp_path: Path) -> None:
    """Under the file name and the model_type of a LightSeq user, answering as the floats that the bytes stand for."""
    for kind, (model_type, tensors, _) in TYPES.items():
        parameters = {"model_type": model_type, "precision": "int8"}
        more = f'default_model_filename: "quant_{kind}.pb"'
        (tmp_path / kind / "1").mkdir(parents=True)
        text = config(kind, **tensors, parameters=parameters, more=more).replace('"python"', '"lightseq"')
        (tmp_path / kind / "config.pbtxt").write_text(text)
        written(tmp_path / kind / f"quant_{kind}.pb", messages(kind, seed=3, topk=1, extra_decode_length=4)[0])
    row = [5, 9, 2]
    with EmbeddedServer(tmp_path, device="cpu") as server, grpc(server.grpc) as client:
        answers = {kind: ask(client, kind, name, [row]) for kind, (_, _, name) in TYPES.items()}
    exact = {kind: local.build(tmp_path / kind / f"quant_{kind}.pb", precision="fp32") for kind in TYPES}
    hypotheses = exact["transformer"].answer([row])[0].hypotheses
    scores = answers["transformer"]["target_scores"][0]
    np.testing.assert_allclose(scores, [one.score for one in hypotheses], rtol=1e-5, atol=1e-5)
    for text, one in zip(answers["transformer"]["target_ids"][0], hypotheses, strict=True):
        assert text[: len(one.tokens)].tolist() == one.tokens.tolist()
    continued = exact["gpt"].answer([row])[0].hypotheses[0].tokens
    assert answers["gpt"]["result"][0].tolist()[: 3 + len(continued)] == [*row, *continued.tolist()]
