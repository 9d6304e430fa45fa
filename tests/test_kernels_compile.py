"""Every kernel compiles, by NVRTC, for every GPU that is promised, and the hot ones keep to their registers."""

from __future__ import annotations

import functools
from typing import Any

import cuda_on_cpu
import nvrtc
import pytest

from lightseq_backend.ops import launch, vocabulary_launch, warpgroup_launch
from lightseq_backend.ops.linear_launch import Device, Plan, plan

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
TOOLKIT = nvrtc.find()

pytestmark = pytest.mark.skipif(TOOLKIT is None, reason="no NVRTC: neither NVIDIA's wheels nor a CUDA toolkit")

SHARED = {70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have


def builds(architecture: int) -> dict[str, list[dict[str, Any]]]:
    """Definitions that each source is compiled with for a GPU: Transformer-big's and GPT-2's.

    Of each precision where the code in the kernels changes, without fp32 for the GPUs between.
    """
    device = Device(architecture, 132, SHARED[architecture] * 1024)

    def product(norm: bool, made: Plan) -> dict[str, Any]:
        return {**dict(made.definitions), "ACTIVATION": 1 if norm else 0}

    products = [
        {**product(norm, plan(device, rows, inner, wide, half, norm, True)), "FOURS": 1}
        for rows, inner, wide, half, norm in (
            (32, 1024, 4096, True, True),
            (32, 4096, 1024, True, False),
            (8, 4096, 1024, True, False),
            (32, 1024, 1024, True, False),
            (8, 768, 3072, True, True),
            (8, 1600, 4800, True, True),
            (8, 6400, 1600, True, False),
            (32, 1024, 3072, False, False),
            (32, 4096, 1024, False, False),
        )
    ]
    products.append({**products[0], "FOURS": 0, "ACTIVATION": 3})
    precisions = [{"HALF": 1}, {"HALF": 0}]
    int8 = [
        {**product(norm, plan(device, rows, inner, wide, True, norm, True, int8=True)), "FOURS": 1}
        for rows, inner, wide, norm in ((32, 1024, 4096, True), (32, 4096, 1024, False), (8, 1600, 4800, True))
    ]
    if architecture not in (75, 80, 90):
        precisions, products = precisions[:1], products[:2]
    groups = [
        product(norm, warpgroup_launch.plan(device, rows, inner, wide, norm))
        for rows, inner, wide, norm in (
            *((128, 1024, 4096, True), (128, 4096, 1024, False), (64, 1024, 3072, True)),
            *((192, 4096, 1024, False), (192, 1024, 1024, True)),
        )
        if warpgroup_launch.can(device, inner, wide, half=True)
    ]
    attention = warpgroup_launch.attention_plan(device, 4096, 8, 12, causal=True)[0].definitions
    return {
        "attention.cu": [{**precision, "HEAD_SIZE": 64} for precision in precisions],
        "embed.cu": precisions,
        "linear.cu": [*precisions, *products, {"HALF": 1, "WEIGHT_BITS": 8}, *int8],
        "norm.cu": precisions,
        "sampling.cu": [{"HALF": 1}],
        "search.cu": [{"HALF": 1}],
        "standard_search.cu": [{"HALF": 1}],
        "tensor_attention.cu": [{"HALF": 1, "HEAD_SIZE": 64}],
        "vocabulary.cu": [
            *(
                dict(vocabulary_launch.plan(device, 32, 1024, 30016, bool(precision["HALF"])).definitions)
                for precision in precisions
            ),
            *(
                dict(vocabulary_launch.plan(device, rows, 1024, 30016, True, int8=True).definitions)
                for rows in (8, 32, 64)
            ),
            dict(vocabulary_launch.plan(device, 32, 1024, 30016, True, int8=True, norm=False).definitions),
        ],
        "warpgroup.cu": groups,
        "warpgroup_vocabulary.cu": [
            dict(warpgroup_launch.vocabulary_plan(device, rows, 1024, 30016).definitions)
            for rows in (64, 128)
            if warpgroup_launch.can_search(device, 1024, half=True)
        ],
        "warpgroup_scores.cu": [
            dict(warpgroup_launch.scores_plan(device, 4096, inner, 50257).definitions)
            for inner in (768, 1600)
            if warpgroup_launch.can_score(device, inner, half=True)
        ],
        "warpgroup_attention.cu": [dict(attention)] if warpgroup_launch.can_attend(device, 64, half=True) else [],
    }


@functools.cache
def compiled(source: str, architecture: int) -> list[tuple[dict[str, Any], dict[str, nvrtc.Resources]]]:
    """What the kernels of a source take, for each of its definitions."""
    assert TOOLKIT is not None
    text = launch.source(source.removesuffix(".cu"))
    target = warpgroup_launch.ARCHITECTURE.removeprefix("sm_") if source.startswith("warpgroup") else architecture
    return [(definition, TOOLKIT.compile(text, target, definition)) for definition in builds(architecture)[source]]


def test_every_source_is_compiled_here() -> None:
    assert {path.name for path in cuda_on_cpu.KERNELS.glob("*.cu")} == set(builds(90))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile(architecture: int) -> None:
    assert TOOLKIT is not None
    if architecture not in TOOLKIT.architectures:
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    for source in builds(architecture):
        for definition, kernels in compiled(source, architecture):
            assert kernels, (source, definition)


GROUPS = ("warpgroup", "warpgroup_vocabulary", "warpgroup_scores", "warpgroup_attention")
HOT = ("linear", "attention", "tensor_attention", "vocabulary", *GROUPS)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("source", [f"{name}.cu" for name in HOT])
def test_hot_kernels_do_not_spill(source: str, architecture: int) -> None:
    for definition, kernels in compiled(source, architecture):
        for name, resources in kernels.items():
            assert resources.spilled == 0, (name, definition, resources)


def test_products_hold_the_weights_they_ask_for_early() -> None:
    """The assembler may move loads behind the wait for the kernel in front, and needs fewer registers then."""
    for definition, kernels in compiled("linear.cu", 90):
        if "INNER" in definition:
            assert kernels["linear"].registers >= registers_of_weights_and_sums(definition), definition


def test_products_with_weights_in_shared_memory_leave_registers_for_the_next_ones() -> None:
    built = [(build, kernels["linear"]) for build, kernels in compiled("linear.cu", 90) if build.get("AHEAD")]
    assert len(built) == 2
    for build, resources in built:
        assert 2 * 256 * resources.registers <= 65536, build


def registers_of_weights_and_sums(build: dict[str, Any]) -> int:
    """What kernels/linear.cu has at least: DEPTH chunks of weights, and the sums of a warp."""
    tiles, pieces = build["OUTPUTS"] // 16, 1 if build["WEIGHT_BITS"] == 8 else 2
    return 4 * build["DEPTH"] * tiles * pieces + build["ROWS"] // 8 * tiles * 4


def test_products_of_warpgroups_keep_sums_in_registers_and_do_not_wait_for_each_other() -> None:
    for source in GROUPS:
        for definition, kernels in compiled(f"{source}.cu", 90):
            for name, resources in kernels.items():
                assert (resources.stack, resources.serialized) == (0, False), (name, definition)
