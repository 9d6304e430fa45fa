// warpgroup_scores: what many rows give to the tokens that follow them, without their logits ever leaving the chip: a
// product of all rows and the vocabulary, of whose tiles the statistics of the softmax are kept, and the targets'
// logits. By the instructions that Hopper alone has. Compiled with
//   INNER  width of x, a multiple of 64
//   DEPTH  stages under way
// Two blocks of a cluster take the same ids for different rows, and each brings half of the weights to both: what L2
// gives is as scarce as products are. Their warpgroups have rows of their own and drift apart as far as stages reach,
// so that one multiplies while the other adds up exponentials. Every sum has an order that depends on INNER alone.

#include "hopper.cuh"

constexpr int ROWS = 128, IDS = 256;  // of a block, at a time
constexpr int PAIR = 2;               // blocks of a cluster
constexpr int BAND = 4;               // pairs of blocks of rows that go through the vocabulary together
constexpr int GROUPS = ROWS / 64;     // warpgroups that multiply, each sixty-four rows
constexpr int LOADER = 128 * GROUPS;  // the thread behind them
constexpr int THREADS = LOADER + 32;
constexpr int STAGES = INNER / 64;  // sixty-four columns of x and of the weights
constexpr int X_BYTES = ROWS * 64 * 2, HALF_BYTES = IDS / PAIR * 64 * 2;
constexpr int STAGE_BYTES = X_BYTES + PAIR * HALF_BYTES;
constexpr float LOG2_E = 1.4426950408889634f;

// What becomes of sums: logits are scale * sum + bias, -inf beyond the vocabulary.
struct Logits {
    const __half* bias;  // [vocabulary] or null
    float scale;
    int vocabulary;

    // A thread's, in both of its rows: of ids first + 8 n and the next.
    __device__ __forceinline__ void finish(float (&sums)[IDS / 8][4], int first) const {
        if (scale != 1.f || bias)
#pragma unroll
            for (int n = 0; n < IDS / 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int id = first + 8 * n + j % 2;
                    sums[n][j] = scale * sums[n][j] + (bias && id < vocabulary ? to_float(bias[id]) : 0.f);
                }
        if (first + IDS > vocabulary)
#pragma unroll
            for (int n = 0; n < IDS / 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (first + 8 * n + j % 2 >= vocabulary) sums[n][j] = -INFINITE;
    }
};

// The largest of a row's logits in a tile and the sum of exp(logit - largest). Four lanes share a row; it has the first
// two of each lane's fours, or (lower) the last two.
template <int lower> __device__ __forceinline__ float2 summarise(const float (&logits)[IDS / 8][4]) {
    float most[4], sum[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) most[i] = logits[i][2 * lower];
#pragma unroll
    for (int n = 0; n < IDS / 8; n++)
        most[n % 4] = fmaxf(most[n % 4], fmaxf(logits[n][2 * lower], logits[n][2 * lower + 1]));
    float largest = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, offset));
    const float less = largest * LOG2_E;
#pragma unroll
    for (int n = 0; n < IDS / 8; n++) {
        sum[n % 4] += power_of_two(fmaf(logits[n][2 * lower], LOG2_E, -less));
        sum[n % 4] += power_of_two(fmaf(logits[n][2 * lower + 1], LOG2_E, -less));
    }
    float all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) all += __shfl_xor_sync(FULL_WARP, all, offset);
    return make_float2(largest, all);
}

// What a pair does at a time: so many rows and ids. Few pairs read the same ids at once: what is asked for by many L2
// gives slowly.
struct Turn {
    int row_block, tile;
    __device__ __forceinline__ Turn(int number, int row_blocks, int tiles) {
        const int band = number / (BAND * tiles) * BAND, width = least(BAND, row_blocks - band);
        row_block = band + (number - band * tiles) % width;
        tile = (number - band * tiles) / width;
    }
};

// The target's logit of a row, by the thread that has it.
template <int lower>
__device__ __forceinline__ void keep(const float (&logits)[IDS / 8][4], int target, int first, float* to) {
    if (target < first || target >= first + IDS || (target - first) % 8 > 1) return;
#pragma unroll
    for (int n = 0; n < IDS / 8; n++)
        if (target - first - 8 * n == 0 || target - first - 8 * n == 1)
            *to = target - first - 8 * n ? logits[n][2 * lower + 1] : logits[n][2 * lower];
}

// logits = scale * (x . W) + b; of each row and each tile of IDS ids
//   statistics[r, tile] = (largest, sum of exp(logit - largest)), and once of each row kept[r] = logits[r, targets[r]]
//   x_map: of x half [count, INNER], boxes of [ROWS, 64]; weight_map: of W half [vocabulary, INNER], of [IDS / 2, 64];
//   both swizzled by 128 bytes; bias half [vocabulary] or null; targets int32 [count], ids
//   statistics float2 [count, all_tiles]; kept float [count]
//   W and bias may be a part of a vocabulary of all_tiles tiles, the ids from first_id on, a multiple of IDS; then so
//   many are `vocabulary`
//   grid: pairs of blocks, up to ceil(count / (2 * ROWS)) * ceil(vocabulary / IDS) of them; cluster 2, block THREADS,
//   dynamic shared memory DEPTH * STAGE_BYTES and 16 * DEPTH; moves W count / (2 * ROWS) times and x vocabulary / IDS
//   times, most of it from L2; needs sm_90a
extern "C" __global__ void __launch_bounds__(THREADS, 1)
warpgroup_scores(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap weight_map,
                 const __half* bias, const int* targets, float2* statistics, float* kept, int count, int vocabulary,
                 float scale, int first_id, int all_tiles) {
    extern __shared__ __align__(1024) char memory[];
    Barrier* full = reinterpret_cast<Barrier*>(memory + DEPTH * STAGE_BYTES);
    Barrier* empty = full + DEPTH;
    const int thread = threadIdx.x, warp = uniform_warp(), lane = thread % 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.x % PAIR, tiles = up(vocabulary, IDS), row_blocks = up(count, PAIR * ROWS);
    const int last = tiles * row_blocks, step = gridDim.x / PAIR;

    launch_next();
    if (thread == LOADER) {
        prefetch_map(&x_map);
        prefetch_map(&weight_map);
        for (int i = 0; i < DEPTH; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, PAIR * GROUPS);  // both blocks have what either brings
        }
        publish_barriers();
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();

    if (thread >= LOADER) {
        wait_for_previous();
        int stage = 0;
        for (int at = blockIdx.x / PAIR; at < last; at += step) {
            const Turn turn(at, row_blocks, tiles);
            const int row = (turn.row_block * PAIR + rank) * ROWS, id = turn.tile * IDS + rank * (IDS / PAIR);
            if (thread > LOADER) break;
#pragma unroll 1
            for (int i = 0; i < STAGES; i++, stage++) {
                Barrier* there = full + stage % DEPTH;
                char* to = memory + stage % DEPTH * STAGE_BYTES;
                if (stage >= DEPTH) block_wait(empty + stage % DEPTH, (stage / DEPTH - 1) % 2);
                barrier_expect(there, STAGE_BYTES);
                copy_box(to, &x_map, i * 64, row, there);
                copy_box_to_all<PAIR>(to + X_BYTES + rank * HALF_BYTES, &weight_map, i * 64, id, there);
            }
        }
        // A block's shared memory must be there until the other one has said that it has read what it got from it.
        for (int i = most(0, stage - DEPTH); i < stage; i++) block_wait(empty + i % DEPTH, i / DEPTH % 2);
    } else {
        const Logits logits = {bias, scale, vocabulary};
        const auto x = swizzled_operand(memory + warp / 4 * (X_BYTES / GROUPS));
        const auto w = swizzled_operand(memory + X_BYTES);
        auto release = [&](int stage) {
            if (thread % 128 < PAIR) arrive_at(thread % 128, empty + stage % DEPTH);
        };
        int stage = 0;
        for (int at = blockIdx.x / PAIR; at < last; at += step) {
            float sums[IDS / 8][4] = {};
#pragma unroll 1
            for (int i = 0; i < STAGES; i++, stage++) {
                block_wait(full + stage % DEPTH, stage / DEPTH % 2);
                const int from = stage % DEPTH * STAGE_BYTES;
                warpgroup_begin();
#pragma unroll
                for (int k = 0; k < 4; k++)
                    warpgroup_multiply(sums, further(x, from + k * 32), further(w, from + k * 32));
                warpgroup_commit();
                warpgroup_wait<1>();
                if (i > 0) release(stage - 1);
            }
            warpgroup_wait<0>();
            release(stage - 1);
            const Turn turn(at, row_blocks, tiles);
            const int first = turn.tile * IDS + 2 * t, tile = first_id / IDS + turn.tile;  // in the part, of all
            const int row = (turn.row_block * PAIR + rank) * ROWS + warp * 16 + g;  // and the eighth after it
            logits.finish(sums, first);
            const float2 one = summarise<0>(sums), other = summarise<1>(sums);
            if (row < count) {
                keep<0>(sums, targets[row] - first_id, first, kept + row);
                if (t == 0) statistics[(long long)row * all_tiles + tile] = one;
            }
            if (row + 8 < count) {
                keep<1>(sums, targets[row + 8] - first_id, first, kept + row + 8);
                if (t == 0) statistics[(long long)(row + 8) * all_tiles + tile] = other;
            }
        }
    }
}
