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
constexpr int HALVES = ROWS / 64;   // of the rows
constexpr int GROUPS = HALVES * SPAN;  // warpgroups that multiply, each sixty-four rows by a tile
constexpr int MULTIPLYING = 128 * GROUPS;  // threads: first those, then those that add up moments, then one that loads
constexpr int OBSERVING = least(64, most(32, ROWS));
constexpr int LOADER = MULTIPLYING + OBSERVING;
constexpr int THREADS = LOADER + 32;
constexpr int TILE_BYTES = TILE * 64 * 2;
constexpr int WEIGHT_BYTES = SPAN * TILE_BYTES;
constexpr int X_BYTES = ROWS * 64 * 2;
constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BYTES;
constexpr int STRIDE = TILE + 8;  // of a row of logits; those that a warp touches at once lie in different banks
constexpr int LOGIT_BYTES = SPAN * ROWS * STRIDE * 4;
// Of a tile's last stages: so many take logits when they have been read, where shared memory has no room beside them.
constexpr int KEPT = ROWS > 64 ? DEPTH : 0;
static_assert(DEPTH <= STAGES || !KEPT, "logits would take a stage of the next tile");

constexpr int FEW = 4;         // best that four lanes find
constexpr int OWN = TILE / 4;  // ids of a row that a lane has

// Shared memory, as warpgroup_launch.py counts it: stages, logits [SPAN][ROWS][STRIDE], columns, moments,
// barriers.
constexpr int LOGITS_AT = KEPT ? 0 : DEPTH * STAGE_BYTES;
constexpr int COLUMNS_AT = most(DEPTH * STAGE_BYTES, LOGITS_AT + LOGIT_BYTES);
constexpr int MOMENTS_AT = COLUMNS_AT + SPAN * TILE * 16;
constexpr int BARRIERS_AT = MOMENTS_AT + ROWS * 8;

// The larger goes first; not a number goes nowhere.
__device__ __forceinline__ void put_in_order(float& x, float& y) {
    const float larger = fmaxf(x, y);
    y = fminf(x, y);
    x = larger;
}

// What the largest of each FEW-th part is; not a number is less than any.
__device__ __forceinline__ void find_largest(const float (&own)[OWN], float (&largest)[FEW]) {
#pragma unroll
    for (int j = 0; j < FEW; j++) largest[j] = -INFINITE;
#pragma unroll
    for (int i = 0; i < OWN; i++) largest[i * FEW / OWN] = fmaxf(largest[i * FEW / OWN], own[i]);
}

// What rises and then falls, or falls and then rises, in falling order.
__device__ __forceinline__ void sort(float (&largest)[FEW]) {
    put_in_order(largest[0], largest[2]);
    put_in_order(largest[1], largest[3]);
    put_in_order(largest[0], largest[1]);
    put_in_order(largest[2], largest[3]);
}

// A row of a tile, of whose logits (-inf beyond the vocabulary) a lane has 8 n + 2 (lane % 4) and the next, from `logits`
// on. The FEW best are among those at or above the FEW-th largest of what groups of eight logits have at most. Each lane
// sorts its own of them, then the best of the four lanes is taken, FEW times.
__device__ __forceinline__ void summarise_few(float* logits, int row, int tile, const Wanted& of) {
    float own[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i += 2) {
        const float2 both = *reinterpret_cast<const float2*>(logits + 4 * i);
        own[i] = both.x;
        own[i + 1] = both.y;
    }
    const int member = threadIdx.x % 4, id = tile * TILE + 2 * member;
    float largest[FEW];
    find_largest(own, largest);
    float most = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3])), sum[2] = {};
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, offset));
#pragma unroll
    for (int i = 0; i < OWN; i++) sum[i % 2] += power_of_two((own[i] - most) * LOG2_E);
    sum[0] += sum[1];
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) sum[0] += __shfl_xor_sync(FULL_WARP, sum[0], offset);

    const bool there = row < of.count;
    const int tiles = up(of.vocabulary, TILE);
    const long long place = (long long)row * tiles + tile;
    if (there && member == 0) of.statistics[place] = make_float2(most, sum[0]);
    int wanted = there ? of.best : 0;
    if (there && of.slots) wanted = min(wanted, of.slots[of.rows[row]].looked_at);
    if (tile == tiles - 1 || (of.banned >= 0 && of.banned / TILE == tile)) {
#pragma unroll
        for (int i = 0; i < OWN; i++)
            if (id + i / 2 * 8 + i % 2 >= of.vocabulary || id + i / 2 * 8 + i % 2 == of.banned)
                own[i] = __int_as_float(0x7fffffff);
        find_largest(own, largest);
    }
    put_in_order(largest[0], largest[1]);
    put_in_order(largest[3], largest[2]);
    sort(largest);
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
        float other[FEW];
#pragma unroll
        for (int j = 0; j < FEW; j++) other[j] = __shfl_xor_sync(FULL_WARP, largest[FEW - 1 - j], offset);
#pragma unroll
        for (int j = 0; j < FEW; j++) largest[j] = fmaxf(largest[j], other[j]);
        sort(largest);
    }

    unsigned hits = 0;
#pragma unroll
    for (int i = 0; i < OWN; i++) hits |= (own[i] >= largest[FEW - 1] ? 1u : 0u) << i;
    Choice best[FEW] = {};
    while (hits) {
        const int i = __ffs(hits) - 1;
        hits &= hits - 1;
        const int at = i / 2 * 8 + i % 2;
        Choice rest = choice(logits[at], id + at);
#pragma unroll
        for (int j = 0; j < FEW; j++) {
            const Choice kept = better(best[j], rest);
            rest = kept == rest ? best[j] : rest;
            best[j] = kept;
        }
    }
    Choice mine = 0;
#pragma unroll
    for (int rank = 0; rank < FEW; rank++) {
        Choice taken = best[0];
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2)
            taken = better(taken, __shfl_xor_sync(FULL_WARP, taken, offset));
        if (rank == member) mine = taken;
        if (taken != best[0]) continue;
#pragma unroll
        for (int j = 0; j < FEW; j++) best[j] = j + 1 < FEW ? best[j + 1] : 0;
    }
    if (member < wanted) of.choices[place * of.best + member] = mine;
}

// Arguments and results as kernels/vocabulary.cu has them, but
//   x_map: of x half [count, INNER], boxes of [ROWS, 64], swizzled by 128 bytes; W half, packed by warpgroup_launch.py
//   as [ceil(vocabulary / 128)][INNER / 8][128][8]
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
        const int first = tile_of(stage / STAGES), span = least(SPAN, tiles - first);
        const char* packed = reinterpret_cast<const char*>(weight) +
                             ((long long)first * STAGES + stage % STAGES) * TILE_BYTES;
        barrier_expect(full + stage % DEPTH, span * TILE_BYTES + X_BYTES);
        for (int i = 0; i < span; i++)
            copy_bulk(stage_at(stage) + i * TILE_BYTES, packed + (long long)i * STAGES * TILE_BYTES, TILE_BYTES,
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
    bool wants_many = logits || (!slots && best > FEW);
    if (slots && thread < ROWS && first_row + thread < count)
        wants_many |= least(best, slots[rows[first_row + thread]].looked_at) > FEW;
    const bool many = __syncthreads_or(wants_many);  // any of the block's rows
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
    const Wanted wanted = {rows, slots, logits, statistics, choices, stride, count, vocabulary, best, banned};
    const int group = warp / 4, part = group / HALVES, half = group % HALVES;
    const int row = half * 64 + warp % 4 * 16 + g;  // of the block; and the eighth after it
    for (int turn = 0; turn < turns; turn++) {
        const int first_tile = tile_of(turn), tile = first_tile + part, first = turn * STAGES;
        for (int i = thread; i < SPAN * TILE; i += MULTIPLYING)
            own_columns[i] = load_column(columns, bias, first_tile * TILE + i, vocabulary);
        float sums[TILE / 8][4] = {};
        for (int stage = first; stage < first + STAGES; stage++) {
            block_wait(full + stage % DEPTH, stage / DEPTH % 2);
            const char* w = stage_at(stage) + part * TILE_BYTES;
            const char* x = stage_at(stage) + WEIGHT_BYTES + half * 64 * 128;
            warpgroup_begin();
#pragma unroll
            for (int k = 0; k < 4; k++)
                warpgroup_multiply(sums, swizzled_operand(x + k * 32), plain_operand(w + k * 2 * TILE * 16, TILE * 16));
            warpgroup_commit();
            warpgroup_wait<1>();
            if (stage > first && stage <= first + STAGES - KEPT) release(stage - 1);
        }
        warpgroup_wait<0>();
        if (!KEPT) release(first + STAGES - 1);
        block_wait(measured, 0);
        together();  // all stages have been read, and the logits before
        const Column* own = own_columns + part * TILE + 2 * t;
        float* to = held + (part * ROWS + row) * STRIDE + 2 * t;
        const float2 upper = moments[row], lower = moments[row + 8];
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
            const Column columns[2] = {own[8 * n], own[8 * n + 1]};
            const int id = tile * TILE + 8 * n + 2 * t;
            auto value = [&](int j, const float2& measure) {
                const float made = logit(sums[n][j], measure, columns[j % 2], scale);
                return id + j % 2 < vocabulary ? made : -INFINITE;
            };
            *reinterpret_cast<float2*>(to + 8 * n) = make_float2(value(0, upper), value(1, upper));
            *reinterpret_cast<float2*>(to + 8 * STRIDE + 8 * n) = make_float2(value(2, lower), value(3, lower));
        }
        together();
        if (many) {
            finish_tiles<SPAN, ROWS, MULTIPLYING, STRIDE>(held, first_tile, first_row, wanted, together);
        } else if (tile < tiles && first_row + row - g < count) {
#pragma unroll 1
            for (int i = 0; i < 16; i += 8)
                summarise_few(to + i * STRIDE, first_row + row + i, tile, wanted);
        }
        if (KEPT) {
            publish_writes();
            together();
            for (int stage = first + STAGES - KEPT; stage < first + STAGES; stage++) release(stage);
        }
    }
}
