"""The shipped English model has PyTorch's perplexity in every precision of a GPU."""

from __future__ import annotations

import pytest
from held_out_english import WITHIN, engine_perplexity, pytorch_perplexity


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_perplexity_is_that_of_pytorch(precision: str) -> None:
    found, wanted = engine_perplexity("gpu", precision), pytorch_perplexity()
    print(f"{precision}: perplexity {found:.4f}, PyTorch's {wanted:.4f}, {found / wanted - 1:+.4%}")
    assert found == pytest.approx(wanted, rel=WITHIN)
