"""The device that tests run kernels on: that it computes as CUDA does, and sees the faults it is there to see."""

from __future__ import annotations

import textwrap

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import Kernels, LaunchError, TensorMap

pytestmark = pytest.mark.skipif(not cuda_on_cpu.available(), reason="no C++ compiler")

# One source for all: each compilation costs a second.
SOURCE = """
extern "C" __global__ void add(const float* x, const float* y, float* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = x[i] + y[i];
}
extern "C" __global__ void reverse(const int* x, int* out) {
    __shared__ int held[64];
    held[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void reverse_without_barrier(const int* x, int* out) {
    __shared__ int held[64];
    held[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = held[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void barrier_for_some(int* out) {
    if (threadIdx.x < 32)
        __syncthreads();
    out[threadIdx.x] = 1;
}
extern "C" __global__ void barriers_apart(int* out) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 1;
}
extern "C" __global__ void shuffle_for_some(int* out) {
    int x = threadIdx.x;
    if (x % 32 < 16) x = __shfl_xor_sync(0xffffffffu, x, 1);
    out[threadIdx.x] = x;
}
extern "C" __global__ void unwritten(float* out) {
    extern __shared__ float memory[];
    __shared__ float fixed[2];
    out[0] = memory[0];
    out[1] = fixed[1];
}
extern "C" __global__ void shuffles(int* out) {
    int x = threadIdx.x;
    out[x] = __shfl_xor_sync(0xffffffffu, x, 5);
    out[32 + x] = __shfl_down_sync(0xffffffffu, x, 3);
    out[64 + x] = __shfl_up_sync(0xffffffffu, x, 3, 8);
    out[96 + x] = __shfl_sync(0xffffffffu, x, 2, 4);
    out[128 + x] = __ballot_sync(0xffffffffu, x % 3 == 0);
}
extern "C" __global__ void multiply(const __half* a, const __half* b, float* out, int width) {
    // a [16, 16], b [16, 8], both row by row
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    unsigned fragment[4], other[2];
    ldmatrix_x4(fragment, a + (lane % 16) * 16 + lane / 16 * 8);
    for (int i = 0; i < 2; i++) {
        __half2 pair = __halves2half2(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
        other[i] = cuda_on_cpu::bits<unsigned>(pair);
    }
    float sums[4] = {};
    mma16816(sums, fragment, other);
    for (int i = 0; i < 4; i++) out[(g + i / 2 * 8) * width + 2 * t + i % 2] = sums[i];
}
extern "C" __global__ void multiply_held(const __grid_constant__ TensorMap map, const __half* a, float* out) {
    // out [64, 128] = a [64, 64] . b^T beside a . b, of the map's b [64, 64]; a goes through registers
    extern __shared__ __align__(1024) char memory[];
    Barrier* there = reinterpret_cast<Barrier*>(memory + 8192);
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    if (threadIdx.x == 0) {
        barrier_init(there, 1);
        barrier_expect(there, 8192);
        copy_box(memory, &map, 0, 0, there);
    }
    __syncthreads();
    barrier_wait(there, 0);
    float along[8][4] = {}, across[8][4] = {};
    warpgroup_begin();
    for (int k = 0; k < 4; k++) {
        unsigned held[4];
        for (int i = 0; i < 4; i++)
            held[i] = *(const unsigned*)(a + (16 * warp + g + i % 2 * 8) * 64 + 16 * k + 2 * t + i / 2 * 8);
        warpgroup_multiply(along, held, further(swizzled_operand(memory), 32 * k));
        warpgroup_multiply_across(across, held, further(across_operand(memory), 2048 * k));
    }
    warpgroup_commit();
    warpgroup_wait<0>();
    for (int n = 0; n < 8; n++)
        for (int i = 0; i < 4; i++) {
            float* to = out + (16 * warp + g + i / 2 * 8) * 128 + 8 * n + 2 * t + i % 2;
            to[0] = along[n][i], to[64] = across[n][i];
        }
}
extern "C" __global__ void __cluster_dims__(2) __launch_bounds__(32) swap(int* out) {
    __shared__ int held[32];
    held[threadIdx.x] = 100 * blockIdx.x + threadIdx.x;
    cluster_sync();
    out[blockIdx.x * 32 + threadIdx.x] = map_shared(held, cluster_rank() ^ 1)[31 - threadIdx.x];
    cluster_sync();
}
extern "C" __global__ void copy(const int4* from, int4* out, int wait) {
    __shared__ int4 held[32];
    copy_async16(&held[threadIdx.x], from + threadIdx.x);
    copy_async_commit();
    if (wait) copy_async_wait<0>();
    __syncthreads();
    out[threadIdx.x] = held[threadIdx.x ^ 1];
}
extern "C" __global__ void write_where_others_read(int* out) {  // a barrier of the block is missing between the two
    __shared__ int held[64];
    held[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = held[threadIdx.x];
    __syncwarp();
    __syncwarp();
    held[63 - threadIdx.x] = -1;
}
extern "C" __global__ void overrun(int* x, int n) { x[n] = 1; }
"""
KERNELS = Kernels("test", text=SOURCE)


def test_kernel_computes_on_views_and_writes_nothing_else() -> None:
    x = np.arange(300, dtype=np.float32)
    out = np.zeros(300, np.float32)
    KERNELS.launch("add", 3, 64, (x[100:], x[:150], out[20:], np.int32(150)))
    np.testing.assert_array_equal(out[20:170], x[100:250] + x[:150])
    assert not out[:20].any()
    assert not out[170:].any()


def test_shared_memory_is_the_blocks() -> None:
    x, out = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    KERNELS.launch("reverse", 1, 64, (x, out))
    np.testing.assert_array_equal(out, x[::-1])


def test_missing_barrier_is_found() -> None:
    x, out = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    with pytest.raises(LaunchError, match="order of threads"):
        KERNELS.launch("reverse_without_barrier", 1, 64, (x, out))


def test_missing_barrier_is_found_where_warps_side_by_side_would_not_need_it() -> None:
    out = np.zeros(64, np.int32)
    KERNELS.launch("write_where_others_read", 1, 64, (out,), orders=[0])
    np.testing.assert_array_equal(out, np.arange(64))
    with pytest.raises(LaunchError, match="order of threads"):
        KERNELS.launch("write_where_others_read", 1, 64, (out,))


@pytest.mark.parametrize("name", ["barrier_for_some", "barriers_apart", "shuffle_for_some"])
def test_divergent_barrier_is_reported_with_both_places(name: str) -> None:
    with pytest.raises(LaunchError, match=r"divergent: thread \d+ .*, but thread \d+ "):
        KERNELS.launch(name, 1, 64, (np.zeros(64, np.int32),))


def test_shared_memory_holds_nan_until_written() -> None:
    out = np.zeros(2, np.float32)
    KERNELS.launch("unwritten", 1, 1, (out,), shared=16)
    assert np.isnan(out).all()


def test_shuffles_move_values_as_cuda_does() -> None:
    out, x = np.zeros((5, 32), np.int32), np.arange(32)
    KERNELS.launch("shuffles", 1, 32, (out,))
    expected = [
        x ^ 5, np.where(x < 29, x + 3, x), np.where(x % 8 >= 3, x - 3, x), x // 4 * 4 + 2, np.full(32, 0x49249249),
    ]  # fmt: skip
    np.testing.assert_array_equal(out, expected)


def test_tensor_core_multiplies() -> None:
    random = np.random.default_rng(1)
    a, b = (random.standard_normal(shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    out = np.zeros((16, 10), np.float32)
    KERNELS.launch("multiply", 1, 32, (a, b, out, np.int32(10)))
    np.testing.assert_allclose(out[:, :8], a.astype(np.float64) @ b.astype(np.float64), rtol=1e-5, atol=1e-5)


def test_warpgroup_multiplies_what_registers_hold_with_rows_or_columns() -> None:
    a, b = np.random.default_rng(1).standard_normal((2, 64, 64)).astype(np.float16)
    out = np.zeros((64, 128), np.float32)
    KERNELS.launch("multiply_held", 1, 128, (TensorMap(b, (64, 64)), a, out), shared=8192 + 8)
    wide = a.astype(np.float64)
    np.testing.assert_allclose(out, np.concatenate([wide @ b.T, wide @ b], axis=1), rtol=1e-5, atol=1e-5)


def test_blocks_of_a_cluster_read_each_other() -> None:
    out = np.zeros((4, 32), np.int32)
    KERNELS.launch("swap", 4, 32, (out,), cluster=2)
    np.testing.assert_array_equal(out, [[100 * (block ^ 1) + 31 - i for i in range(32)] for block in range(4)])


def test_asynchronous_copy_arrives_only_when_waited_for() -> None:
    values, out = np.arange(128, dtype=np.int32).reshape(32, 4), np.zeros((32, 4), np.int32)
    KERNELS.launch("copy", 1, 32, (values, out, np.int32(1)))
    np.testing.assert_array_equal(out, values.reshape(16, 2, 4)[:, ::-1].reshape(32, 4))
    KERNELS.launch("copy", 1, 32, (values, out, np.int32(0)))
    assert (out == -1).all()


def test_arguments_of_the_wrong_size_are_refused() -> None:
    x = np.zeros(4, np.float32)
    with pytest.raises(LaunchError, match="takes p8 p8 p8 i4, not p8 p8 p8 i8"):
        KERNELS.launch("add", 1, 4, (x, x, x, np.int64(4)))


def test_sanitizers_see_an_overrun() -> None:
    script = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, "tests")
        import numpy as np
        import test_cuda_on_cpu
        test_cuda_on_cpu.KERNELS.launch("overrun", 1, 1, (np.zeros(4, np.int32), np.int32(int(sys.argv[1]))))
        """
    )
    assert cuda_on_cpu.sanitized(["-c", script, "3"]).returncode == 0
    outcome = cuda_on_cpu.sanitized(["-c", script, "4"])
    assert outcome.returncode != 0
    assert "heap-buffer-overflow" in outcome.stderr
