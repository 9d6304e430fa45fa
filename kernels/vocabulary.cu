// vocabulary: LayerNorm and the projection onto the vocabulary, for few rows. Of the logits only what the search needs
// leaves the chip: for each tile of TILE ids the statistics of the softmax and the best candidates, which kernels/
// search.cu merges. Compiled with
//   INNER   width of x
//   ROWS    rows a block takes: a multiple of 8, up to 64. blockIdx.x counts such groups
//   WARPS   warps of a block, 8 or 16; a block takes WARPS / 8 tiles at a time
//   WEIGHT_BITS  as kernels/linear.cu
//   MOST_DEPTH, PREFETCH  chunks of weights on their way to registers and to L2
// Every sum has an order that depends on INNER alone: a row's result is the same whatever rows come with it.

#ifndef WARPS
#define WARPS 8
#endif
constexpr int TILE = 128;
constexpr int THREADS = 32 * WARPS;
constexpr int SPAN = WARPS / 8;         // tiles that a block takes at a time
constexpr int LOGIT_STRIDE = TILE + 4;  // floats; the rows that a warp touches at once lie in different banks
constexpr float LOG2_E = 1.4426950408889634f;

struct Task {
    const T *x, *bias;
    const Stored* weight;
    const float* columns;
    const int* rows;
    const Slot* slots;
    float* logits;
    float2* statistics;
    Choice* choices;
    int stride, count, vocabulary, best, banned;
    float scale;
};

// What becomes of the logits of one tile ------------------------------------------------------------------------------

__device__ __forceinline__ float best_of(const float4& x) { return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)); }

// logits: a row's of one tile in shared memory, -inf beyond the vocabulary; overwritten. Eight lanes take it, each
// four groups of four ids. A lane keeps the best of each group; of the group that loses its best it finds the next in
// shared memory. What is not to be chosen, or was already, is not a number, which no maximum heeds.
// Warps whose rows are all beyond the last do not come here.
__device__ __forceinline__ void summarise(float* logits, int row, int tile, bool there, const Task& task) {
    constexpr int NO_ID = 0x7fffffff;
    const float none = __int_as_float(0x7fffffff);
    int member = threadIdx.x % 8, wanted = there ? task.best : 0;
    if (there && task.slots) {
        const Slot& slot = task.slots[task.rows[row]];
        wanted = min(wanted, slot.method == STANDARD ? 2 * slot.width : slot.width);
    }
    float4* groups = reinterpret_cast<float4*>(logits) + member;  // eight apart
    float4 values[TILE / 32];
    float best[TILE / 32], most, sum = 0;
#pragma unroll
    for (int i = 0; i < TILE / 32; i++) {
        values[i] = groups[8 * i];
        best[i] = best_of(values[i]);
    }
    most = fmaxf(fmaxf(best[0], best[1]), fmaxf(best[2], best[3]));
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, offset));
#pragma unroll
    for (int i = 0; i < TILE / 32; i++)
        sum += (exp2f((values[i].x - most) * LOG2_E) + exp2f((values[i].y - most) * LOG2_E)) +
               (exp2f((values[i].z - most) * LOG2_E) + exp2f((values[i].w - most) * LOG2_E));
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, offset);

    int tiles = (task.vocabulary + TILE - 1) / TILE, id = tile * TILE + member * 4;
    long long place = (long long)row * tiles + tile;
    if (there && member == 0) task.statistics[place] = make_float2(most, sum);
    if (tile == tiles - 1 || (task.banned >= 0 && task.banned / TILE == tile)) {
#pragma unroll
        for (int i = 0; i < TILE / 32; i++) {
            float4& four = values[i];
            auto out = [&](int j) { return id + 32 * i + j >= task.vocabulary || id + 32 * i + j == task.banned; };
            four = make_float4(out(0) ? none : four.x, out(1) ? none : four.y, out(2) ? none : four.z,
                               out(3) ? none : four.w);
            best[i] = best_of(four);
            groups[8 * i] = four;
        }
    }
    int group = 0, own = NO_ID;  // of what this lane holds out: where it is, and its id
    float mine = none;
    float4 held;
    auto hold_out = [&]() {
        mine = fmaxf(fmaxf(best[0], best[1]), fmaxf(best[2], best[3]));
        group = mine == best[0] ? 0 : mine == best[1] ? 1 : mine == best[2] ? 2 : 3;
        held = groups[8 * group];
        own = id + 32 * group + (mine == held.x ? 0 : mine == held.y ? 1 : mine == held.z ? 2 : 3);
        if (mine != mine) own = NO_ID;
    };
    hold_out();
    // A warp goes on until the last of its rows has what it wants.
    int rounds = wanted;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) rounds = max(rounds, __shfl_xor_sync(FULL_WARP, rounds, offset));
    Choice* found = task.choices + place * task.best;
    for (int rank = 0; rank < rounds; rank++) {
        float top = mine;
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, offset));
        int winner = mine == top ? own : NO_ID;
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) winner = min(winner, __shfl_xor_sync(FULL_WARP, winner, offset));
        if (member == 0 && rank < wanted) found[rank] = winner == NO_ID ? 0 : choice(top, winner);
        if (own != winner || winner == NO_ID) continue;
        int which = own % 4;
        if (which == 0) held.x = none;
        if (which == 1) held.y = none;
        if (which == 2) held.z = none;
        if (which == 3) held.w = none;
        groups[8 * group] = held;
#pragma unroll
        for (int i = 0; i < TILE / 32; i++)
            if (i == group) best[i] = best_of(held);
        hold_out();
    }
}

// logits: [SPAN][ROWS][LOGIT_STRIDE] in shared memory, of `tile` and those after it; overwritten.
__device__ __forceinline__ void finish_tiles(float* logits, int tile, const Task& task) {
    int tiles = (task.vocabulary + TILE - 1) / TILE;
    if (task.logits) {
        for (int i = threadIdx.x; i < SPAN * ROWS * TILE; i += THREADS) {
            int line = i / TILE, row = blockIdx.x * ROWS + line % ROWS, id = (tile + line / ROWS) * TILE + i % TILE;
            if (row < task.count && id < task.vocabulary)
                task.logits[(long long)row * task.stride + id] = logits[line * LOGIT_STRIDE + i % TILE];
        }
        __syncthreads();
    }
    if (!task.statistics) return;
    for (int line = threadIdx.x / 8; line < SPAN * ROWS; line += THREADS / 8) {
        int row = blockIdx.x * ROWS + line % ROWS, first = row - threadIdx.x % 32 / 8;  // of the warp
        if (tile + line / ROWS < tiles && first < task.count)
            summarise(logits + line * LOGIT_STRIDE, row, tile + line / ROWS, row < task.count, task);
    }
}

__device__ __forceinline__ float load_bias(int id, const Task& task) {
    return task.bias && id < task.vocabulary ? to_float(task.bias[id]) : 0.f;
}

__device__ __forceinline__ float finish_logit(float sum, float bias, int id, const Task& task) {
    return id < task.vocabulary ? task.scale * sum + bias : -INFINITE;
}

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

__device__ __forceinline__ void run(const Task& task, float epsilon) {
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
        float sums[ROWS / 8][4] = {}, bias[2], less[2], more[2], by[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int own = id + 8 * i;
            bool inside = own < task.vocabulary;
            bias[i] = load_bias(own, task);
            less[i] = inside ? task.columns[own] : 0.f;
            more[i] = inside ? task.columns[task.vocabulary + own] : 0.f;
            by[i] = WEIGHT_BITS == 8 && inside ? task.columns[2 * task.vocabulary + own] : 1.f;
        }
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
        float* own = logits + part * ROWS * LOGIT_STRIDE + column;
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = 8 * n + 2 * t + i % 2;
                float2 moments = statistics[row];
                float normed = (sums[n][i] - moments.x * less[i / 2]) * (moments.y * by[i / 2]) + more[i / 2];
                own[row * LOGIT_STRIDE + i / 2 * 8] = finish_logit(normed, bias[i / 2], id + i / 2 * 8, task);
            }
        __syncthreads();
        finish_tiles(logits, tile, task);
        __syncthreads();
    }
}

// vocabulary: logits = scale * (layer_norm(x) . W) + b, and of each tile of TILE ids for each row
//   statistics[r, tile] = (largest, sum of exp(logit - largest)), the banned id included
//   choices[r, tile] = its `best` best logits but the banned id, best first (common.cuh Choice; 0 where it has no more)
//   x T [count, INNER]   weight packed by kernels/linear.cu pack_weight, columns float [2][vocabulary] (int8: [3]): the
//   LayerNorm is folded into them as for kernels/linear.cu linear   bias T [vocabulary] or null
//   rows int32 [count], slots Slot [lanes], or both null: then a row wants no more choices than its sequence has beams
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
    run({x, bias, weight, columns, rows, slots, logits, statistics, choices, stride, count, vocabulary, best, banned,
         scale},
        epsilon);
}
