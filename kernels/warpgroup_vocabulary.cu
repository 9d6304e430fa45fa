// warpgroup_vocabulary: what kernels/vocabulary.cu does, for up to 128 rows, by the instructions that Hopper alone has:
// the copy engine streams the weights while warpgroups multiply and, once a tile is complete, look for its best. With
//   ROWS    rows a block takes: 64 or 128; blockIdx.x counts such groups
//   INNER   width of x, a multiple of 64
//   SPAN    tiles that a block takes at a time, 1 or 2
//   DEPTH   stages under way
// Every sum has an order that depends on INNER alone: a row's result is the same whatever rows come with it.

#include "hopper.cuh"
#include "tiles.cuh"

constexpr int STAGES = INNER / 64;  // sixty-four columns of x and as many rows of W
constexpr int GROUPS = 2 * SPAN;    // warpgroups that multiply, each sixty-four ids
constexpr int MULTIPLYING = 128 * GROUPS;  // threads: first those, then those that add up moments, then one that loads
constexpr int OBSERVING = least(64, most(32, ROWS));
constexpr int LOADER = MULTIPLYING + OBSERVING;
constexpr int THREADS = LOADER + 32;
constexpr int GROUP_BYTES = 64 * 64 * 2;
constexpr int WEIGHT_BYTES = GROUPS * GROUP_BYTES;
constexpr int X_BYTES = ROWS * 64 * 2;
constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BYTES;
constexpr int LOGIT_BYTES = SPAN * ROWS * LOGIT_STRIDE * 4;
// Of a tile's last stages: so many take logits when they have been read, where shared memory has no room beside them.
constexpr int KEPT = ROWS > 64 ? DEPTH : 0;
static_assert(DEPTH <= STAGES || !KEPT, "logits would take a stage of the next tile");

// Shared memory, as warpgroup_launch.py counts it: stages, logits [SPAN][ROWS][LOGIT_STRIDE], columns, moments,
// barriers.
constexpr int LOGITS_AT = KEPT ? 0 : DEPTH * STAGE_BYTES;
constexpr int COLUMNS_AT = most(DEPTH * STAGE_BYTES, LOGITS_AT + LOGIT_BYTES);
constexpr int MOMENTS_AT = COLUMNS_AT + SPAN * TILE * 16;
constexpr int BARRIERS_AT = MOMENTS_AT + ROWS * 8;

// Arguments and results as kernels/vocabulary.cu has them, but
//   x_map: of x half [count, INNER], boxes of [ROWS, 64], swizzled by 128 bytes; W half, packed by warpgroup_launch.py
//   as [ceil(vocabulary / 64)][INNER / 8][64][8]
//   grid (ceil(count / ROWS), blocks up to ceil(tiles / SPAN)), block THREADS, shared memory as above
extern "C" __global__ void __launch_bounds__(THREADS, ROWS == 64 ? 2 : 1)
warpgroup_vocabulary(const __grid_constant__ TensorMap x_map, const __half* weight, const float* columns,
                     const __half* bias, const int* rows, const Slot* slots, float* logits, int stride,
                     float2* statistics, Choice* choices, int count, int vocabulary, int best, int banned,
                     float epsilon, float scale) {
    extern __shared__ __align__(1024) char memory[];
    float* held = reinterpret_cast<float*>(memory + LOGITS_AT);
    Column* own_columns = reinterpret_cast<Column*>(memory + COLUMNS_AT);
    float2* moments = reinterpret_cast<float2*>(memory + MOMENTS_AT);  // mean and 1 / deviation
    Barrier* full = reinterpret_cast<Barrier*>(memory + BARRIERS_AT);
    Barrier* empty = full + DEPTH;
    Barrier* measured = empty + DEPTH;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int first_row = blockIdx.x * ROWS, tiles = up(vocabulary, TILE);
    const int turns = up(up(tiles, SPAN) - (int)blockIdx.y, gridDim.y), last = turns * STAGES;
    auto tile_of = [&](int turn) { return (blockIdx.y + turn * gridDim.y) * SPAN; };
    auto stage_at = [&](int stage) { return memory + stage % DEPTH * STAGE_BYTES; };
    auto load_weights = [&](int stage) {
        const int first = tile_of(stage / STAGES) * 2, groups = least(GROUPS, up(vocabulary, 64) - first);
        const char* packed = reinterpret_cast<const char*>(weight) +
                             ((long long)first * STAGES + stage % STAGES) * GROUP_BYTES;
        barrier_expect(full + stage % DEPTH, groups * GROUP_BYTES + X_BYTES);
        for (int i = 0; i < groups; i++)
            copy_bulk(stage_at(stage) + i * GROUP_BYTES, packed + (long long)i * STAGES * GROUP_BYTES, GROUP_BYTES,
                      full + stage % DEPTH);
    };
    auto load_x = [&](int stage) {
        copy_box(stage_at(stage) + WEIGHT_BYTES, &x_map, stage % STAGES * 64, first_row, full + stage % DEPTH);
    };

    launch_next();
    if (thread == LOADER) {
        prefetch_map(&x_map);
        for (int i = 0; i < DEPTH; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, GROUPS + OBSERVING / 32);
        }
        barrier_init(measured, OBSERVING / 32);
        publish_barriers();
        for (int stage = 0; stage < least(DEPTH, last); stage++) load_weights(stage);
    }
    __syncthreads();
    wait_for_previous();

    if (thread >= LOADER) {
        if (thread > LOADER) return;
        for (int stage = 0; stage < least(DEPTH, last); stage++) load_x(stage);
        for (int stage = DEPTH; stage < last; stage++) {
            block_wait(empty + stage % DEPTH, (stage / DEPTH - 1) % 2);
            load_weights(stage);
            load_x(stage);
        }
        return;
    }
    if (thread >= MULTIPLYING) {
        constexpr int EACH = up(ROWS, OBSERVING);  // rows
        float sum[EACH][2] = {}, squares[EACH][2] = {};
        for (int stage = 0; stage < last; stage++) {
            block_wait(full + stage % DEPTH, stage / DEPTH % 2);
#pragma unroll
            for (int turn = 0; turn < EACH; turn++) {
                const int row = turn * OBSERVING + thread - MULTIPLYING;
                if (stage >= STAGES || row >= ROWS) continue;
                const char* x = stage_at(stage) + WEIGHT_BYTES + row * 128;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float values[8];
                    load16(reinterpret_cast<const __half*>(x + (i ^ row % 8) * 16), values);
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        sum[turn][j % 2] += values[j];
                        squares[turn][j % 2] = fmaf(values[j], values[j], squares[turn][j % 2]);
                    }
                }
                if (stage < STAGES - 1) continue;
                const float mean = (sum[turn][0] + sum[turn][1]) / INNER;
                const float variance = fmaxf((squares[turn][0] + squares[turn][1]) / INNER - mean * mean, 0.f);
                moments[row] = make_float2(mean, 1.f / sqrtf(variance + epsilon));
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + stage % DEPTH);
            if (lane == 0 && stage == STAGES - 1) barrier_arrive(measured);
        }
        return;
    }

    auto together = [] { named_barrier(1, MULTIPLYING); };
    auto release = [&](int stage) {
        if (thread % 128 == 0) barrier_arrive(empty + stage % DEPTH);
    };
    for (int turn = 0; turn < turns; turn++) {
        const int tile = tile_of(turn), first = turn * STAGES;
        if (thread < SPAN * TILE) own_columns[thread] = load_column(columns, bias, tile * TILE + thread, vocabulary);
        float sums[ROWS / 8][4] = {};
        for (int stage = first; stage < first + STAGES; stage++) {
            block_wait(full + stage % DEPTH, stage / DEPTH % 2);
            const char* w = stage_at(stage) + warp / 4 * GROUP_BYTES;
            const char* x = stage_at(stage) + WEIGHT_BYTES;
            warpgroup_begin();
#pragma unroll
            for (int k = 0; k < 4; k++)
                warpgroup_multiply(sums, plain_operand(w + k * 2 * 64 * 16, 64 * 16), swizzled_operand(x + k * 32));
            warpgroup_commit();
            warpgroup_wait<1>();
            if (stage > first && stage <= first + STAGES - KEPT) release(stage - 1);
        }
        warpgroup_wait<0>();
        if (!KEPT) release(first + STAGES - 1);
        block_wait(measured, 0);
        together();  // all stages have been read, and the logits before
        const int at = warp * 16 + g;
        float* own = held + (warp / 8 * ROWS + 2 * t) * LOGIT_STRIDE + warp % 8 * 16 + g;
#pragma unroll
        for (int half = 0; half < 2; half++) {  // eight ids further
            const Column column = own_columns[at + 8 * half];
            const bool inside = tile * TILE + at + 8 * half < vocabulary;
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++) {
                // Of this row and the next.
                const float4 both = *reinterpret_cast<const float4*>(moments + 8 * n + 2 * t);
                const float one = logit(sums[n][2 * half], make_float2(both.x, both.y), column, scale);
                const float other = logit(sums[n][2 * half + 1], make_float2(both.z, both.w), column, scale);
                own[8 * n * LOGIT_STRIDE + 8 * half] = inside ? one : -INFINITE;
                own[(8 * n + 1) * LOGIT_STRIDE + 8 * half] = inside ? other : -INFINITE;
            }
        }
        together();
        const Wanted wanted = {rows, slots, logits, statistics, choices, stride, count, vocabulary, best, banned};
        finish_tiles<SPAN, ROWS, MULTIPLYING>(held, tile, first_row, wanted, together);
        if (KEPT) {
            publish_writes();
            together();
            for (int stage = first + STAGES - KEPT; stage < first + STAGES; stage++) release(stage);
        }
    }
}
