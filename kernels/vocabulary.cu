// vocabulary: LayerNorm and the projection onto the vocabulary, for few rows. Compiled with
//   INNER   width of x
//   ROWS    rows a block takes: a multiple of 8, up to 64. blockIdx.x counts such groups
//   WARPS   warps of a block, 8 or 16; a block takes WARPS / 8 tiles at a time
//   WEIGHT_BITS  as kernels/linear.cu
//   NORM    whether x goes through the LayerNorm that is folded into W; 0 where it has, and columns have zeros for it
//   MOST_DEPTH, PREFETCH  chunks of weights on their way to registers and to L2
// Every sum has an order that depends on INNER alone: a row's result is the same whatever rows come with it.

#include "tiles.cuh"

#ifndef NORM
#define NORM 1
#endif
#ifndef WARPS
#define WARPS 8
#endif
constexpr int THREADS = 32 * WARPS;
constexpr int SPAN = WARPS / 8;  // tiles that a block takes at a time

struct Task {
    const T *x, *bias;
    const Stored* weight;
    const float* columns;
    int count, vocabulary;
    float scale;
};

// A warp has 16 ids of a tile for all rows. Weights go from memory to registers in the order of kernels/linear.cu
// pack_weight, DEPTH chunks ahead, over the ends of tiles; x lies in shared memory.
constexpr int CHUNKS = up(INNER, CHUNK);
#ifndef MOST_DEPTH
#define MOST_DEPTH 4
#endif
constexpr int DEPTH = least(CHUNKS, MOST_DEPTH);
constexpr int TURNS = up(CHUNKS, DEPTH);
constexpr int ROW_STRIDE = CHUNK * (CHUNKS + 1 - CHUNKS % 2);  // rows 64 bytes apart modulo 128

__device__ __forceinline__ void load_weights(Weight& weights, const Task& task, int tile, int chunk) {
    int own = tile * (TILE / 16) + threadIdx.x / 32;
    bool inside = chunk < CHUNKS && own < up(task.vocabulary, 16);
    const uint4* packed = reinterpret_cast<const uint4*>(task.weight);
    load_chunk(weights, packed + ((long long)own * CHUNKS + chunk) * (32 * WEIGHT_PIECES) + threadIdx.x % 32, inside);
}

// Asks for what follows a warp's first DEPTH chunks of a tile, as far as PREFETCH chunks, to be brought to L2: memory
// has something to do while the block waits for x or searches.
#ifndef PREFETCH
#define PREFETCH (16 / WEIGHT_PIECES)
#endif
__device__ __forceinline__ void prefetch_weights(const Task& task, int tile) {
#if __CUDA_ARCH__ >= 900 && !defined(CUDA_ON_CPU)
    constexpr int COUNT = least(PREFETCH, CHUNKS) - DEPTH;
    int own = tile * (TILE / 16) + threadIdx.x / 32;
    if (COUNT <= 0 || own >= up(task.vocabulary, 16) || threadIdx.x % 32) return;
    const uint4* from =
        reinterpret_cast<const uint4*>(task.weight) + ((long long)own * CHUNKS + DEPTH) * (32 * WEIGHT_PIECES);
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(COUNT * 512 * WEIGHT_PIECES)
                 : "memory");
#endif
}

// held: [ROWS][ROW_STRIDE], this block's rows of x; zeros for those that are not there, and from INNER on.
__device__ __forceinline__ void stage_rows(T* held, const Task& task) {
    constexpr int PIECES = CHUNKS * 4;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        int row = blockIdx.x * ROWS + i / PIECES, k = i % PIECES * LANE_WIDTH;
        bool there = row < task.count;
        const T* from = task.x + (there ? (long long)row * INNER : 0);
        T* to = held + i / PIECES * ROW_STRIDE + k;
        if (INNER % LANE_WIDTH == 0) {
            bool inside = there && k < INNER;
            copy_async16(to, inside ? from + k : from, inside ? 16 : 0);
        } else {
#pragma unroll
            for (int j = 0; j < LANE_WIDTH; j++) to[j] = there && k + j < INNER ? from[k + j] : from_float<T>(0.f);
        }
    }
    copy_async_commit();
    copy_async_wait<0>();
}

// The mean and 1 / sqrt(variance + epsilon) of each row that is held, in two passes, by a warp a row.
__device__ __forceinline__ void measure_rows(const T* held, float2* statistics, float epsilon) {
    constexpr int STEPS = up(INNER, 32 * LANE_WIDTH);
    if (!NORM) {
        for (int row = threadIdx.x; row < ROWS; row += THREADS) statistics[row] = make_float2(0.f, 1.f);
        return;
    }
    for (int row = threadIdx.x / 32; row < ROWS; row += WARPS) {
        const T* own = held + row * ROW_STRIDE;
        float sum = 0, squares = 0, values[LANE_WIDTH];
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            int k = (32 * i + threadIdx.x % 32) * LANE_WIDTH;
            if (k >= INNER) break;
            load16(own + k, values);  // zeros from INNER on
#pragma unroll
            for (int j = 0; j < LANE_WIDTH; j++) sum += values[j];
        }
        float mean = warp_sum(sum) / INNER;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            int k = (32 * i + threadIdx.x % 32) * LANE_WIDTH;
            if (k >= INNER) break;
            load16(own + k, values);
#pragma unroll
            for (int j = 0; j < LANE_WIDTH; j++)
                if (k + j < INNER) squares += (values[j] - mean) * (values[j] - mean);
        }
        float factor = 1.f / sqrtf(warp_sum(squares) / INNER + epsilon);
        if (threadIdx.x % 32 == 0) statistics[row] = make_float2(mean, factor);
    }
}

__device__ __forceinline__ void run(const Task& task, const Wanted& wanted, float epsilon) {
    extern __shared__ __align__(16) char shared_memory[];
    T* held = reinterpret_cast<T*>(shared_memory);                       // [ROWS][ROW_STRIDE]
    float* logits = reinterpret_cast<float*>(held + ROWS * ROW_STRIDE);  // [SPAN][ROWS][LOGIT_STRIDE]
    float2* statistics = reinterpret_cast<float2*>(logits + SPAN * ROWS * LOGIT_STRIDE);
    int tiles = up(task.vocabulary, TILE), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Weight weights[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) load_weights(weights[i], task, blockIdx.y * SPAN, i);
    prefetch_weights(task, blockIdx.y * SPAN);
    wait_for_previous();
    stage_rows(held, task);
    __syncthreads();
    measure_rows(held, statistics, epsilon);
    __syncthreads();
    for (int tile = blockIdx.y * SPAN; tile < tiles; tile += gridDim.y * SPAN) {
        int part = threadIdx.x / 256, column = threadIdx.x / 32 % 8 * 16 + g, id = (tile + part) * TILE + column;
        float sums[ROWS / 8][4] = {};
        const Column columns[2] = {load_column(task.columns, task.bias, id, task.vocabulary),
                                   load_column(task.columns, task.bias, id + 8, task.vocabulary)};
        for (int turn = 0; turn < TURNS; turn++) {
#pragma unroll
            for (int i = 0; i < DEPTH; i++) {
                int chunk = turn * DEPTH + i;
                if (chunk < CHUNKS) {
                    const Left first = left_operand(weights[i], 0), second = left_operand(weights[i], 1);
#pragma unroll
                    for (int n = 0; n < ROWS / 8; n++) {
                        const T* from = held + (8 * n + g) * ROW_STRIDE + CHUNK * chunk + LANE_WIDTH * t;
                        uint4 piece = *reinterpret_cast<const uint4*>(from);
                        multiply_add(sums[n], first, right_operand(piece, 0));
                        multiply_add(sums[n], second, right_operand(piece, 1));
                    }
                }
                bool last = turn == TURNS - 1;
                load_weights(weights[i], task, last ? tile + gridDim.y * SPAN : tile, last ? i : chunk + DEPTH);
            }
        }
        prefetch_weights(task, tile + gridDim.y * SPAN);
        float* own = logits + (part * ROWS + 2 * t) * LOGIT_STRIDE + column;
        const float2* moments = statistics + 2 * t;
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = 8 * n + i % 2;
                bool inside = id + i / 2 * 8 < task.vocabulary;
                own[row * LOGIT_STRIDE + i / 2 * 8] =
                    inside ? logit(sums[n][i], moments[row], columns[i / 2], task.scale) : -INFINITE;
            }
        __syncthreads();
        finish_tiles<SPAN, ROWS, THREADS>(logits, tile, blockIdx.x * ROWS, wanted, [] { __syncthreads(); });
        __syncthreads();
    }
}

// vocabulary: logits = scale * (layer_norm(x) . W) + b, and of each tile of TILE ids for each row
//   statistics[r, tile] = (largest, sum of exp(logit - largest)), the banned id included
//   choices[r, tile] = its `best` best logits but the banned id, best first (common.cuh Choice; 0 where it has no more)
//   x T [count, INNER]   weight packed by kernels/linear.cu pack_weight, columns float [2][vocabulary] (int8: [3]): the
//   LayerNorm is folded into them as for kernels/linear.cu linear   bias T [vocabulary] or null
//   rows int32 [count], slots Slot [lanes], or both null: else a row wants no more choices than looked_at
//   logits float [count, vocabulary], rows `stride` apart, or null
//   statistics float2 [count, tiles] or null: then choices neither
//   choices [count, tiles, best]; banned: an id or -1
//   grid (ceil(count / ROWS), blocks up to ceil(tiles / (WARPS / 8))): groups of rows that share a tile run at the same
//   time; block 32 * WARPS, dynamic shared memory: vocabulary_launch.py
//   moves W once (for more than one group of rows again, from L2); needs sm_75 where HALF, else sm_80
extern "C" __global__ void __launch_bounds__(THREADS, 16 / WARPS)
vocabulary(const T* x, const Stored* weight, const float* columns, const T* bias, const int* rows, const Slot* slots,
           float* logits, int stride, float2* statistics, Choice* choices, int count, int vocabulary, int best,
           int banned, float epsilon, float scale) {
    launch_next();
    run({x, bias, weight, columns, count, vocabulary, scale},
        {rows, slots, logits, statistics, choices, stride, count, vocabulary, best, banned}, epsilon);
}
