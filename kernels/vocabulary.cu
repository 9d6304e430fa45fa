// vocabulary: LayerNorm and the projection onto the vocabulary, for few rows. Of the logits only what the search needs
// leaves the chip: for each tile of TILE ids the statistics of the softmax and the best candidates, which kernels/
// search.cu merges. Compiled with
//   INNER   width of x
//   ROWS    rows a block takes: a multiple of 8; up to 64 where HALF, else up to 32. blockIdx.x counts such groups
//   WARPS   with HALF: warps of a block, 8 or 16; a block takes WARPS / 8 tiles at a time
//   MOST_DEPTH, PREFETCH  with HALF: chunks of weights on their way to registers and to L2
//   STAGES  without HALF: slices of W in shared memory, 2 or 3
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
    const T *x, *gain, *norm_bias, *weight, *bias;
    const int* rows;
    const Slot* slots;
    float* logits;
    float2* statistics;
    Choice* choices;
    int count, vocabulary, best, banned;
    float epsilon, scale;
};

// Weights are never written: they may be requested before the kernels in front have ended, and pass L1 by.
__device__ __forceinline__ uint4 load_weight(const uint4* source) {
#ifdef CUDA_ON_CPU
    return *source;
#else
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(source));
    return x;
#endif
}

// LayerNorm of one row by one warp ------------------------------------------------------------------------------------

constexpr int PIECES = (INNER + 32 * LANE_WIDTH - 1) / (32 * LANE_WIDTH);  // of sixteen bytes, a lane
struct Row { Pack16 piece[PIECES]; };

__device__ __forceinline__ Pack16 load_piece(const T* row, int k) {
    Pack16 piece;
    if (INNER % LANE_WIDTH == 0 && k < INNER) return *reinterpret_cast<const Pack16*>(row + k);
#pragma unroll
    for (int i = 0; i < LANE_WIDTH; i++) piece.value[i] = k + i < INNER ? row[k + i] : from_float<T>(0.f);
    return piece;
}

__device__ __forceinline__ Row load_row(const T* x, int row) {
    Row loaded;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        loaded.piece[i] = load_piece(x + (long long)row * INNER, (32 * i + threadIdx.x % 32) * LANE_WIDTH);
    return loaded;
}

// Mean and 1 / sqrt(variance + epsilon), in two passes over registers.
__device__ __forceinline__ float2 moments(const Row& row, float epsilon) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
#pragma unroll
        for (int j = 0; j < LANE_WIDTH; j++) sum += to_float(row.piece[i].value[j]);  // zeros from INNER on
    float mean = warp_sum(sum) / INNER;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
#pragma unroll
        for (int j = 0; j < LANE_WIDTH; j++) {
            float centred = to_float(row.piece[i].value[j]) - mean;
            if ((32 * i + threadIdx.x % 32) * LANE_WIDTH + j < INNER) squares += centred * centred;
        }
    return make_float2(mean, 1.f / sqrtf(warp_sum(squares) / INNER + epsilon));
}

// (piece - mean) / deviation * gain + bias; zeros from column INNER on.
__device__ __forceinline__ Pack16 normalise(const Pack16& piece, float2 moments, const Pack16& gain, const Pack16& bias,
                                            int k) {
    Pack16 result;
#pragma unroll
    for (int i = 0; i < LANE_WIDTH; i++) {
        float x = (to_float(piece.value[i]) - moments.x) * moments.y;
        x = x * to_float(gain.value[i]) + to_float(bias.value[i]);
        result.value[i] = from_float<T>(k + i < INNER ? x : 0.f);
    }
    return result;
}

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
    if (there && task.slots) wanted = min(wanted, task.slots[task.rows[row]].width);
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
                task.logits[(long long)row * task.vocabulary + id] = logits[line * LOGIT_STRIDE + i % TILE];
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

#if HALF
// On tensor cores: a warp has 16 ids of a tile for all rows. Weights go from memory to registers in the order of
// kernels/linear.cu pack_weight, DEPTH chunks of 32 k ahead, over the ends of tiles; x is normalised once a block.
constexpr int CHUNKS = (INNER + 31) / 32;
#ifndef MOST_DEPTH
#define MOST_DEPTH 4
#endif
constexpr int DEPTH = CHUNKS < MOST_DEPTH ? CHUNKS : MOST_DEPTH;
constexpr int TURNS = (CHUNKS + DEPTH - 1) / DEPTH;
constexpr int ROW_STRIDE = 32 * CHUNKS + (CHUNKS % 2 ? 0 : 32);  // halves: rows 64 bytes apart modulo 128
constexpr int NORM_WIDTH = (INNER + 7) / 8 * 8;

struct Weights { uint4 step[2]; };

__device__ __forceinline__ void load_weights(Weights& weights, const Task& task, int tile, int chunk) {
    int own = tile * (TILE / 16) + threadIdx.x / 32;
    bool inside = chunk < CHUNKS && own < (task.vocabulary + 15) / 16;
    const uint4* packed = reinterpret_cast<const uint4*>(task.weight);
    const uint4* source = packed + ((long long)own * CHUNKS + chunk) * 64 + threadIdx.x % 32;
    weights.step[0] = inside ? load_weight(source) : make_uint4(0, 0, 0, 0);
    weights.step[1] = inside ? load_weight(source + 32) : make_uint4(0, 0, 0, 0);
}

// Asks for what follows a warp's first DEPTH chunks of a tile, as far as PREFETCH chunks, to be brought to L2: memory
// has something to do while the block normalises or searches.
#ifndef PREFETCH
#define PREFETCH 8
#endif
__device__ __forceinline__ void prefetch_weights(const Task& task, int tile) {
#if __CUDA_ARCH__ >= 900 && !defined(CUDA_ON_CPU)
    constexpr int COUNT = (PREFETCH < CHUNKS ? PREFETCH : CHUNKS) - DEPTH;
    int own = tile * (TILE / 16) + threadIdx.x / 32;
    if (COUNT <= 0 || own >= (task.vocabulary + 15) / 16 || threadIdx.x % 32) return;
    const uint4* from = reinterpret_cast<const uint4*>(task.weight) + ((long long)own * CHUNKS + DEPTH) * 64;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(COUNT * 1024) : "memory");
#endif
}

// A piece of sixteen bytes to shared memory, zeros where it is not wanted; there once this thread has waited for it.
__device__ __forceinline__ void stage_piece(__half* to, const __half* row, int k, bool wanted) {
    bool inside = wanted && k < INNER;
    if (INNER % 8 == 0) copy_async16(to, inside ? row + k : row, inside ? 16 : 0);
    else *reinterpret_cast<Pack16*>(to) = load_piece(row, wanted ? k : INNER);
}

// Gain and bias of the norm to shared memory: [2][NORM_WIDTH].
__device__ __forceinline__ void stage_norm(__half* norm, const Task& task) {
    for (int k = threadIdx.x * 8; k < NORM_WIDTH; k += THREADS * 8) {
        stage_piece(norm + k, task.gain, k, true);
        stage_piece(norm + NORM_WIDTH + k, task.norm_bias, k, true);
    }
    copy_async_commit();
}

// normed: [ROWS][ROW_STRIDE], zeros for rows that are not there. A lane normalises what it copied.
__device__ __forceinline__ void normalise_rows(__half* normed, const __half* norm, const Task& task) {
    int lane = threadIdx.x % 32;
    for (int local = threadIdx.x / 32; local < ROWS; local += WARPS) {
        int row = blockIdx.x * ROWS + local;
        bool there = row < task.count;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int k = (32 * i + lane) * 8;
            if (k < 32 * CHUNKS)
                stage_piece(normed + local * ROW_STRIDE + k, task.x + (there ? (long long)row * INNER : 0), k, there);
        }
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();  // the norm is there
#pragma unroll 2
    for (int local = threadIdx.x / 32; local < ROWS; local += WARPS) {
        Row held;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int k = (32 * i + lane) * 8;
            held.piece[i] = *reinterpret_cast<const Pack16*>(normed + local * ROW_STRIDE + (k < 32 * CHUNKS ? k : 0));
            if (k >= INNER) held.piece[i] = Pack16{};
        }
        float2 statistics = moments(held, task.epsilon);
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int k = (32 * i + lane) * 8, inside = k < NORM_WIDTH ? k : 0;
            Pack16 gain = *reinterpret_cast<const Pack16*>(norm + inside);
            Pack16 bias = *reinterpret_cast<const Pack16*>(norm + NORM_WIDTH + inside);
            if (k < 32 * CHUNKS)
                *reinterpret_cast<Pack16*>(normed + local * ROW_STRIDE + k) =
                    normalise(held.piece[i], statistics, gain, bias, k);
        }
    }
}

__device__ __forceinline__ void run(const Task& task) {
    extern __shared__ __align__(16) char shared_memory[];
    __half* normed = reinterpret_cast<__half*>(shared_memory);  // [ROWS][ROW_STRIDE]
    float* logits = reinterpret_cast<float*>(normed + ROWS * ROW_STRIDE);  // [SPAN][ROWS][LOGIT_STRIDE]
    __half* norm = reinterpret_cast<__half*>(logits + SPAN * ROWS * LOGIT_STRIDE);
    int tiles = (task.vocabulary + TILE - 1) / TILE, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Weights weights[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) load_weights(weights[i], task, blockIdx.y * SPAN, i);
    prefetch_weights(task, blockIdx.y * SPAN);
    stage_norm(norm, task);
    wait_for_previous();
    normalise_rows(normed, norm, task);
    __syncthreads();
    for (int tile = blockIdx.y * SPAN; tile < tiles; tile += gridDim.y * SPAN) {
        int part = threadIdx.x / 256, column = threadIdx.x / 32 % 8 * 16 + g, id = (tile + part) * TILE + column;
        float sums[ROWS / 8][4] = {}, bias[2] = {load_bias(id, task), load_bias(id + 8, task)};
        for (int turn = 0; turn < TURNS; turn++) {
#pragma unroll
            for (int i = 0; i < DEPTH; i++) {
                int chunk = turn * DEPTH + i;
                if (chunk < CHUNKS) {
                    const uint4 *low = &weights[i].step[0], *high = &weights[i].step[1];
                    const unsigned first[4] = {low->x, low->y, low->z, low->w};
                    const unsigned second[4] = {high->x, high->y, high->z, high->w};
#pragma unroll
                    for (int n = 0; n < ROWS / 8; n++) {
                        const __half* from = normed + (8 * n + g) * ROW_STRIDE + 32 * chunk + 8 * t;
                        uint4 x = *reinterpret_cast<const uint4*>(from);
                        mma16816(sums[n], first, {x.x, x.y});
                        mma16816(sums[n], second, {x.z, x.w});
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
            for (int i = 0; i < 4; i++)
                own[(8 * n + 2 * t + i % 2) * LOGIT_STRIDE + i / 2 * 8] =
                    finish_logit(sums[n][i], bias[i / 2], id + i / 2 * 8, task);
        __syncthreads();
        finish_tiles(logits, tile, task);
        __syncthreads();
    }
}

#else
static_assert(WARPS == 8, "a thread's share of a slice");
// In true float: a thread has four ids of a tile for every eighth row. Weights come through shared memory, STAGES - 1
// slices of SLICE k ahead, over the ends of tiles; x is normalised as it is put beside them.
constexpr int SLICE = 32;
constexpr int SLICES = (INNER + SLICE - 1) / SLICE;
#ifndef STAGES
#define STAGES 3
#endif
constexpr int OWN_ROWS = ROWS / 8;
constexpr int X_STRIDE = SLICE + 4;

struct Stage { float weight[SLICE][TILE]; };
struct Shared {
    Stage stage[STAGES];
    float x[2][ROWS][X_STRIDE], logits[ROWS][LOGIT_STRIDE];
    float2 statistics[ROWS];
};

__device__ __forceinline__ void load_stage(Stage& stage, const Task& task, int tile, int slice) {
    int columns = (task.vocabulary + 63) / 64 * 64;
    for (int i = threadIdx.x; i < SLICE * TILE / 4; i += THREADS) {
        int k = i / (TILE / 4), c = i % (TILE / 4) * 4, id = tile * TILE + c;
        bool inside = id < columns;
        const float* source = task.weight + (inside ? (long long)(slice * SLICE + k) * columns + id : 0);
        copy_async16(&stage.weight[k][c], source, inside ? 16 : 0);
    }
}

__device__ __forceinline__ void run(const Task& task) {
    extern __shared__ __align__(16) char shared_memory[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
    int tiles = (task.vocabulary + TILE - 1) / TILE;
    int steps = blockIdx.y < tiles ? (tiles - 1 - (int)blockIdx.y) / (int)gridDim.y * SLICES + SLICES : 0;
    auto request = [&](int step) {
        if (step < steps)
            load_stage(shared.stage[step % STAGES], task, blockIdx.y + step / SLICES * gridDim.y, step % SLICES);
        copy_async_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) request(i);
    wait_for_previous();
    for (int local = threadIdx.x / 32; local < ROWS; local += THREADS / 32) {
        if (blockIdx.x * ROWS + local >= task.count) break;
        float2 own = moments(load_row(task.x, blockIdx.x * ROWS + local), task.epsilon);
        if (threadIdx.x % 32 == 0) shared.statistics[local] = own;
    }
    __syncthreads();
    // Eight threads bring a row's part of a slice of x: four numbers each.
    int local = threadIdx.x / 8, column = threadIdx.x % 8 * 4, row = blockIdx.x * ROWS + local;
    bool brings = local < ROWS, there = brings && row < task.count;
    Pack16 piece, gain, bias;
    auto fetch = [&](int slice) {
        int k = slice * SLICE + column;
        piece = load_piece(task.x + (there ? (long long)row * INNER : 0), there ? k : INNER);
        gain = load_piece(task.gain, k);
        bias = load_piece(task.norm_bias, k);
    };
    auto place = [&](int buffer, int slice) {
        float2 moments = there ? shared.statistics[local] : make_float2(0.f, 0.f);
        if (brings)
            *reinterpret_cast<Pack16*>(&shared.x[buffer][local][column]) =
                normalise(piece, moments, gain, bias, slice * SLICE + column);
    };
    fetch(0);
    place(0, 0);
    int y = threadIdx.x % 8, ids = threadIdx.x / 8 * 4;
    float sums[OWN_ROWS][4] = {}, biases[4];
    for (int step = 0; step < steps; step++) {
        int slice = step % SLICES, next = (step + 1) % SLICES;
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // the slice is there, and the slice before it is used up
        request(step + STAGES - 1);
        if (step + 1 < steps) fetch(next);
        int tile = blockIdx.y + step / SLICES * gridDim.y;
        if (slice == 0) {
#pragma unroll
            for (int i = 0; i < 4; i++) biases[i] = load_bias(tile * TILE + ids + i, task);
        }
        const Stage& stage = shared.stage[step % STAGES];
#pragma unroll 2
        for (int k = 0; k < SLICE; k += 4) {
            float4 x[OWN_ROWS];
#pragma unroll
            for (int r = 0; r < OWN_ROWS; r++)
                x[r] = *reinterpret_cast<const float4*>(&shared.x[step % 2][y + 8 * r][k]);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float4 w = *reinterpret_cast<const float4*>(&stage.weight[k + j][ids]);
#pragma unroll
                for (int r = 0; r < OWN_ROWS; r++) {
                    float value = j == 0 ? x[r].x : j == 1 ? x[r].y : j == 2 ? x[r].z : x[r].w;
                    sums[r][0] = fmaf(value, w.x, sums[r][0]);
                    sums[r][1] = fmaf(value, w.y, sums[r][1]);
                    sums[r][2] = fmaf(value, w.z, sums[r][2]);
                    sums[r][3] = fmaf(value, w.w, sums[r][3]);
                }
            }
        }
        if (step + 1 < steps) place((step + 1) % 2, next);
        if (slice < SLICES - 1) continue;
#pragma unroll
        for (int r = 0; r < OWN_ROWS; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                shared.logits[y + 8 * r][ids + i] = finish_logit(sums[r][i], biases[i], tile * TILE + ids + i, task);
                sums[r][i] = 0;
            }
        __syncthreads();
        finish_tiles(shared.logits[0], tile, task);
    }
}
#endif

// vocabulary: logits = scale * (layer_norm(x) . W) + b, and of each tile of TILE ids for each row
//   statistics[r, tile] = (largest, sum of exp(logit - largest)), the banned id included
//   choices[r, tile] = its `best` best logits but the banned id, best first (common.cuh Choice; 0 where it has no more)
//   x T [count, INNER]   gain, norm_bias T [INNER]   weight T packed by kernels/linear.cu pack_weight
//   bias T [vocabulary] or null
//   rows int32 [count], slots Slot [lanes], or both null: then a row wants no more choices than its sequence has beams
//   logits float [count, vocabulary] or null   statistics float2 [count, tiles] or null: then choices neither
//   choices [count, tiles, best]; banned: an id or -1
//   grid (ceil(count / ROWS), blocks up to ceil(tiles / (WARPS / 8))): groups of rows that share a tile run at the same
//   time; block 32 * WARPS, dynamic shared memory: vocabulary_launch.py
//   moves W once (for more than one group of rows again, from L2); needs sm_75 where HALF
extern "C" __global__ void __launch_bounds__(THREADS, 16 / WARPS)
vocabulary(const T* x, const T* gain, const T* norm_bias, const T* weight, const T* bias, const int* rows,
           const Slot* slots, float* logits, float2* statistics, Choice* choices, int count, int vocabulary, int best,
           int banned, float epsilon, float scale) {
    launch_next();
    run({x, gain, norm_bias, weight, bias, rows, slots, logits, statistics, choices, count, vocabulary, best, banned,
         epsilon, scale});
}

// vocabulary_tiles: the same statistics and choices from products that cuBLAS made, for many rows.
//   logits float [count, vocabulary], unfinished: scale and bias are taken into account here
//   other arguments as above
//   grid (ceil(tiles / 32), count); block 256; static shared memory 17 KiB; moves logits once
constexpr int SUMMARISING = 32;  // tiles of a block, eight lanes each
extern "C" __global__ void __launch_bounds__(8 * SUMMARISING)
vocabulary_tiles(const float* logits, const T* bias, const int* rows, const Slot* slots, float2* statistics,
                 Choice* choices, int count, int vocabulary, int best, int banned, float scale) {
    __shared__ __align__(16) float staged[SUMMARISING][LOGIT_STRIDE];
    Task task = {nullptr, nullptr, nullptr, nullptr, bias, rows, slots, nullptr, statistics, choices, count, vocabulary,
                 best, banned, 0.f, scale};
    launch_next();
    wait_for_previous();
    int tiles = (vocabulary + TILE - 1) / TILE, row = blockIdx.y;
    const float* own = logits + (long long)row * vocabulary;
    int first = blockIdx.x * SUMMARISING + threadIdx.x / 32 * 4;  // tile of the warp
    if (first >= tiles) return;
#pragma unroll
    for (int i = 0; i < 4 * TILE / 32; i++) {
        int line = i * 32 / TILE, column = (32 * i + threadIdx.x % 32) % TILE, id = (first + line) * TILE + column;
        float logit = id < vocabulary ? own[id] : 0.f;
        staged[threadIdx.x / 32 * 4 + line][column] = finish_logit(logit, load_bias(id, task), id, task);
    }
    __syncwarp();
    int local = threadIdx.x / 8, tile = blockIdx.x * SUMMARISING + local;
    summarise(staged[local], row, tile, tile < tiles, task);
}
