"""The French-English translator behind a real Triton on a GPU: in every precision as good as transformers' decoding.

Triton is found as `lightseq serve` finds it: an unpacked one is named by LIGHTSEQ_TRITON.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from test_fr2en import check, server

from lightseq_backend.errors import ConfigError
from lightseq_backend.serving.embedded import find_triton


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    try:
        find_triton()
    except ConfigError as error:
        pytest.skip(str(error))
    with server(tmp_path_factory.mktemp("fr2en"), "gpu", ("fp32", "fp16", "int8")) as running:
        yield running.grpc


@pytest.mark.parametrize(("precision", "equal"), [("fp32", 0.98), ("fp16", 0.9), ("int8", 0.7)])
def test_served_translator_is_as_good_as_transformers(address: str, precision: str, equal: float) -> None:
    check(address, precision, equal)
