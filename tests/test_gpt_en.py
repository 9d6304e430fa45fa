"""The shipped English model behind a real Triton gives held-out text the perplexity that PyTorch gives it."""

from __future__ import annotations

import numpy as np
import pytest
from held_out_english import HELD_OUT, MODEL, WITHIN, engine_perplexity, perplexity, pytorch_perplexity
from repositories import arrays, ask, grpc, tritonclient

from lightseq_backend.serving.embedded import EmbeddedServer

SCORER = "gpt_en_score"
MOST_BYTES = 20_000_000
NUMPY_1 = np.lib.NumpyVersion(np.__version__) < "2.0.0"


def test_perplexity_is_that_of_pytorch(server: EmbeddedServer) -> None:
    with grpc(server.grpc) as client:
        found = [ask(client, SCORER, "token_ids", [one["ids"]])["log_probability"].item() for one in HELD_OUT]
    assert perplexity(found) == pytest.approx(pytorch_perplexity(), rel=WITHIN)
    np.testing.assert_allclose(found, [one["log_probability"] for one in HELD_OUT], rtol=1e-4)


def test_weights_of_int8_keep_the_perplexity() -> None:
    assert engine_perplexity("cpu", "int8") == pytest.approx(pytorch_perplexity(), rel=WITHIN)


@pytest.mark.skipif(not NUMPY_1, reason="Triton's Python stub takes no strings under NumPy 2")
def test_text_is_scored_as_the_ids_of_transformers(server: EmbeddedServer) -> None:
    with grpc(server.grpc) as client:
        for one in HELD_OUT[:10]:
            text = tritonclient.grpc.InferInput("text_input", [1, 1], "BYTES")
            text.set_data_from_numpy(np.array([[one["text"]]], np.object_))
            answer = arrays(client.infer(SCORER, [text]))
            assert answer["token_log_probabilities"].shape == (1, len(one["ids"]) - 1)
            assert answer["log_probability"].item() == pytest.approx(one["log_probability"], rel=1e-4)


def test_model_stays_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= MOST_BYTES
