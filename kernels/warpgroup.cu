// warpgroup: matrix products for 33 to 128 rows, narrow ones to 256, by the instructions that Hopper alone has. With
//   ROWS    rows a block takes: 64 or 128; blockIdx.y counts such groups
//   INNER   width of x, a multiple of 64
//   SPLIT   blocks of a cluster that share the sum over INNER
//   DEPTH   stages under way, at most
//   NORM    1 where x goes through a LayerNorm that is folded into W, else 0
//   ACTIVATION  common.cuh Activation
// What many rows cost is x: every block reads all of it. Loaded by threads it comes at 1 TB/s, by the copy engine at 5.

#include "hopper.cuh"

#define OUTPUTS 64     // of a block
#define MULTIPLIERS 2  // warpgroups, each with half of the rows
#define ROW_TILES (ROWS / 8 / MULTIPLIERS)
#define MULTIPLYING (128 * MULTIPLIERS)  // threads: first those, then those that add up moments, then one that loads
#define OBSERVING (NORM ? 128 : 0)
#define LOADER (MULTIPLYING + OBSERVING)
#define THREADS (LOADER + 32)
#define SHARERS (128 / ROWS)  // threads that add up a row's moments

#define STAGES (INNER / 64)  // sixty-four columns of x and as many rows of W
#define SLICE up(STAGES, SPLIT)
#define RING least(DEPTH, SLICE)
#define WEIGHT_BYTES (OUTPUTS * 64 * 2)
#define X_BYTES (ROWS * 64 * 2)
#define STAGE_BYTES (WEIGHT_BYTES + X_BYTES)

#define QUADS (OUTPUTS / 4)  // results of a row, four at a time
#define PARTIAL_STRIDE (OUTPUTS + 4)
#define OWN_ROWS (ROWS / SPLIT)  // rows that a block of the cluster finishes
#define TURNS up(OWN_ROWS * QUADS, MULTIPLYING)

// Shared memory, as warpgroup_launch.py counts it: stages, and when all are read the block's sums in their place; what
// the cluster's other blocks send; moments of the block's own rows; barriers.
#define INBOX_AT most(RING * STAGE_BYTES, ROWS * PARTIAL_STRIDE * 4)
#define MOMENTS_AT (INBOX_AT + (SPLIT - 1) * OWN_ROWS * PARTIAL_STRIDE * 4)
#define BARRIERS_AT (MOMENTS_AT + NORM * SPLIT * SHARERS * OWN_ROWS * 8)
// What each of the others sends: sums of this block's rows, and their moments.
#define ARRIVING ((SPLIT - 1) * OWN_ROWS * (OUTPUTS * 4 + NORM * SHARERS * 8))

struct __align__(8) Four { __half value[4]; };

__device__ __forceinline__ float4 add(const float4& x, const float4& y) {
    return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
}

// out[r] = residual[r] + activation(x[r] . W + b); with NORM, x[r] . W stands for layer_norm(x[r]) . W
//   x_map: of x half [rows, INNER], boxes of [ROWS, 64], swizzled by 128 bytes; W half, packed by warpgroup_launch.py
//   as [wide / 64][INNER / 8][64][8]; bias half [wide] or null; residual half [rows, wide] or null, may be out; out
//   half [rows, wide]; rows residual_stride and out_stride apart, multiples of 4; wide a multiple of 64
//   NORM: as kernels/linear.cu has it, columns float [2][wide]
//   grid (SPLIT * wide / 64, ceil(rows / ROWS)), cluster (SPLIT), block THREADS, shared memory as above; moves the
//   weights once, x wide / 64 times (from L2). The order of a sum depends on INNER and SPLIT alone.
extern "C" __global__ void __launch_bounds__(THREADS)
warpgroup_linear(const __grid_constant__ TensorMap x_map, const __half* weight, const float* columns, float epsilon,
                 const __half* bias, const __half* residual, int residual_stride, __half* out, int out_stride, int rows,
                 int wide) {
    extern __shared__ __align__(1024) char memory[];
    float* partial = reinterpret_cast<float*>(memory);
    float* inbox = reinterpret_cast<float*>(memory + INBOX_AT);  // [SPLIT - 1][OWN_ROWS][PARTIAL_STRIDE]
    float2* moments = reinterpret_cast<float2*>(memory + MOMENTS_AT);  // [SPLIT][SHARERS][OWN_ROWS]
    Barrier* full = reinterpret_cast<Barrier*>(memory + BARRIERS_AT);
    Barrier *empty = full + RING, *arrived = empty + RING;
    const int thread = threadIdx.x, warp = uniform_warp(), lane = thread % 32, g = lane / 4, t = lane % 4;
    const bool multiplies = thread < MULTIPLYING, observes = !multiplies && thread < LOADER;
    const int rank = blockIdx.x % SPLIT, tile = blockIdx.x / SPLIT, first_row = blockIdx.y * ROWS;
    const int first = rank * SLICE, count = most(0, least(SLICE, STAGES - first));
    const char* packed = reinterpret_cast<const char*>(weight) + ((long long)tile * STAGES + first) * WEIGHT_BYTES;
    auto stage_at = [&](int stage) { return memory + stage % RING * STAGE_BYTES; };
    auto load_weights = [&](int stage) {
        barrier_expect(full + stage % RING, STAGE_BYTES);
        copy_bulk(stage_at(stage), packed + stage * WEIGHT_BYTES, WEIGHT_BYTES, full + stage % RING);
    };
    auto load_x = [&](int stage) {
        copy_box(stage_at(stage) + WEIGHT_BYTES, &x_map, (first + stage) * 64, first_row, full + stage % RING);
    };

    launch_next();
    if (thread == LOADER) {
        prefetch_map(&x_map);
        for (int i = 0; i < RING; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, MULTIPLIERS + OBSERVING / 32);
        }
        barrier_init(arrived, 1);
        publish_barriers();
        if (SPLIT > 1) barrier_expect(arrived, ARRIVING);
        for (int stage = 0; stage < least(RING, count); stage++) load_weights(stage);
    }
    __syncthreads();
    if (SPLIT > 1) cluster_arrive();

    const int column = tile * OUTPUTS + thread % QUADS * 4;  // of the results that this thread finishes
    float sums[ROW_TILES][4] = {};
    float4 less, more;
    Four own_bias = {}, residuals[TURNS] = {};
    float2 own_moments;  // of a thread that observes
    if (multiplies) {
        if (bias) own_bias = *reinterpret_cast<const Four*>(bias + column);
        if (NORM) {
            less = *reinterpret_cast<const float4*>(columns + column);
            more = *reinterpret_cast<const float4*>(columns + wide + column);
        }
        wait_for_previous();
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int own = (turn * MULTIPLYING + thread) / QUADS, row = first_row + rank * OWN_ROWS + own;
            if (residual && own < OWN_ROWS && row < rows)
                residuals[turn] =
                    *reinterpret_cast<const Four*>(residual + (long long)row * residual_stride + column);
        }
        const auto w = plain_operand(memory, OUTPUTS * 16);
        const auto x = swizzled_operand(memory + WEIGHT_BYTES + warp / 4 * (X_BYTES / MULTIPLIERS));
#pragma unroll
        for (int stage = 0; stage < SLICE; stage++) {
            if (stage >= count) break;
            block_wait(full + stage % RING, stage / RING % 2);
            const int at = stage % RING * STAGE_BYTES;
            warpgroup_begin();
#pragma unroll
            for (int k = 0; k < 4; k++)
                warpgroup_multiply(sums, further(w, at + k * 2 * OUTPUTS * 16), further(x, at + k * 32));
            warpgroup_commit();
            if (stage > 0) {
                warpgroup_wait<1>();
                if (thread % 128 == 0) barrier_arrive(empty + (stage - 1) % RING);
            }
        }
        warpgroup_wait<0>();
    } else if (observes) {
        const int row = thread % ROWS, part = (thread - MULTIPLYING) / ROWS;
        float sum[2] = {}, squares[2] = {};
        for (int stage = 0; stage < count; stage++) {
            block_wait(full + stage % RING, stage / RING % 2);
            const char* x = stage_at(stage) + WEIGHT_BYTES + row * 128;
#pragma unroll
            for (int i = 0; i < 8 / SHARERS; i++) {
                float values[8];
                load16(reinterpret_cast<const __half*>(x + ((part * (8 / SHARERS) + i) ^ row % 8) * 16), values);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    sum[j % 2] += values[j];
                    squares[j % 2] = fmaf(values[j], values[j], squares[j % 2]);
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + stage % RING);
        }
        own_moments = make_float2(sum[0] + sum[1], squares[0] + squares[1]);
    } else if (thread == LOADER) {
        wait_for_previous();
        for (int stage = 0; stage < least(RING, count); stage++) load_x(stage);
        for (int stage = RING; stage < count; stage++) {
            block_wait(empty + stage % RING, (stage / RING - 1) % 2);
            load_weights(stage);
            load_x(stage);
        }
    }
    __syncwarp();
    __syncthreads();  // all stages have been read

    if (multiplies) {
        float* own = partial + (warp / 4 * (ROWS / MULTIPLIERS) + 2 * t) * PARTIAL_STRIDE + 16 * (warp % 4) + g;
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) own[(8 * n + i % 2) * PARTIAL_STRIDE + i / 2 * 8] = sums[n][i];
    }
    if (SPLIT > 1) cluster_wait();  // all have begun: their shared memory may be written
    if (observes) {
        const int row = thread % ROWS, part = (thread - MULTIPLYING) / ROWS, to = row / OWN_ROWS;
        float2* at = moments + (rank * SHARERS + part) * OWN_ROWS + row % OWN_ROWS;
        if (to == rank)
            *at = own_moments;
        else
            send(to, at, own_moments, arrived);
    }
    __syncthreads();
    if (SPLIT > 1) {
#pragma unroll
        for (int turn = 0; turn < ROWS * QUADS / MULTIPLYING; turn++) {
            const int row = (turn * MULTIPLYING + thread) / QUADS, to = row / OWN_ROWS, at = thread % QUADS * 4;
            if (!multiplies || to == rank) continue;
            float* there = inbox + ((rank - (rank > to)) * OWN_ROWS + row % OWN_ROWS) * PARTIAL_STRIDE + at;
            send(to, reinterpret_cast<float4*>(there),
                 *reinterpret_cast<const float4*>(partial + row * PARTIAL_STRIDE + at), arrived);
        }
        barrier_wait(arrived, 0);
    }
    if (!multiplies) return;

#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int own = (turn * MULTIPLYING + thread) / QUADS, row = first_row + rank * OWN_ROWS + own;
        if (own >= OWN_ROWS || row >= rows) continue;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int part = 0; part < SPLIT; part++) {
            const float* from = part == rank ? partial + (rank * OWN_ROWS + own) * PARTIAL_STRIDE
                                             : inbox + ((part - (part > rank)) * OWN_ROWS + own) * PARTIAL_STRIDE;
            sum = add(sum, *reinterpret_cast<const float4*>(from + thread % QUADS * 4));
        }
#if NORM
        float2 of_row = make_float2(0.f, 0.f);
#pragma unroll
        for (int part = 0; part < SPLIT * SHARERS; part++) {
            const float2 one = moments[part * OWN_ROWS + own];
            of_row = make_float2(of_row.x + one.x, of_row.y + one.y);
        }
        const float mean = of_row.x / INNER, variance = fmaxf(of_row.y / INNER - mean * mean, 0.f);
        const float factor = 1.f / sqrtf(variance + epsilon);
        sum = make_float4((sum.x - mean * less.x) * factor + more.x, (sum.y - mean * less.y) * factor + more.y,
                          (sum.z - mean * less.z) * factor + more.z, (sum.w - mean * less.w) * factor + more.w);
#endif
        const float values[4] = {sum.x, sum.y, sum.z, sum.w};
        Four four;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float x = activate(values[i] + to_float(own_bias.value[i]), ACTIVATION);
            four.value[i] = from_float<__half>(to_float(residuals[turn].value[i]) + x);
        }
        *reinterpret_cast<Four*>(out + (long long)row * out_stride + column) = four;
    }
}
