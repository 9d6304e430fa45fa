// linear: matrix products for few rows, which read each weight once and are as fast as memory; and what goes with
// cuBLAS for many rows. Compiled with
//   ROWS     rows a block takes: 8, 16 or 32; blockIdx.y counts such groups
//   INNER    width of x
//   OUTPUTS  columns of the result a block takes: 32, 48 or 64
//   SPLIT    blocks of a cluster that share the sum over INNER (1 before sm_90)
//   WARPS    of a block, 8 unless it is given
//   NORM     1 where x goes through a LayerNorm that is folded into W, else 0
//   WEIGHT_BITS  8 where W is int8 with a scale per output, which NORM and the sums over INNER do not see
//   ALIGNED  1 where rows of x begin at multiples of 16 bytes and INNER is made of such pieces
//   FOURS    1 where `wide` is made of fours, and so do rows of residual and out begin, and bias
//   ACTIVATION  common.cuh Activation: a switch in the end of a product would be jumped through by every result
//   DEPTH    chunks of a warp whose weights are under way in registers
//   AHEAD    chunks behind those that are under way to shared memory before x is there; 0 where W is int8
//   LATE     1 where the next kernel may begin once x is on its way, 0 where it may begin at once
// The order of a sum depends on INNER, SPLIT and WARPS alone, never on the rows: a row's result is the same whatever
// other rows come with it.

#ifndef WARPS
#define WARPS 8
#endif
#define THREADS (32 * WARPS)

#ifdef INNER

// Every warp has all results of a block, and of the sum one chunk in WARPS.
#define TILES (OUTPUTS / 16)  // sixteen outputs
#define ROW_TILES (ROWS / 8)  // eight rows
#define CHUNKS up(INNER, CHUNK)
#define SLICE up(CHUNKS, SPLIT)  // chunks of a block: chunk c is warp c % WARPS's
#define SHARE up(SLICE, WARPS)   // chunks of a warp
#define EVEN (CHUNKS % (SPLIT * WARPS) == 0)
static_assert(DEPTH + AHEAD <= SHARE, "as many as there are");
#define AHEAD_PIECES (TILES * WEIGHT_PIECES * THREADS)  // of sixteen bytes, in a chunk of every warp

// The end of a product: sums over warps and over the cluster, and what is done to the result --------------------------

struct Epilogue {
    const T* bias;         // [wide] or null
    const T* residual;     // [rows, wide] or null; may be out
    const float* columns;  // [2][wide] where NORM, and behind them the scales where W is int8
    T* out;                // [rows, wide]
    int residual_stride, out_stride, rows, wide;
    float epsilon;
};

#define PARTIAL_STRIDE (OUTPUTS + 4)        // floats: with four more no two lanes of a store share a bank; or moments
#define ROW_QUADS (OUTPUTS / 4)             // results of a row, four at a time
#define SENT_QUADS (ROW_QUADS + NORM)       // the same and the row's sum and sum of squares
#define OWN_ROWS up(ROWS, SPLIT)            // rows that a block of the cluster finishes
#define TURNS up(OWN_ROWS * ROW_QUADS, THREADS)

struct __align__(4 * (int)sizeof(T)) Four { T value[4]; };

// What the end needs, made at the beginning; the residual when it is there.
struct Before {
    Four bias[TURNS], residual[TURNS];
#if NORM
    float4 sums[TURNS], offsets[TURNS];
#endif
#if WEIGHT_BITS == 8
    float4 scales[TURNS];
#endif
};

// This thread's row in the block (-1: none) and first column in the block, at each turn.
__device__ __forceinline__ int own_row(int turn) {
    const int own = (turn * THREADS + threadIdx.x) / ROW_QUADS, row = blockIdx.x % SPLIT * OWN_ROWS + own;
    return own < OWN_ROWS && row < ROWS ? row : -1;
}
__device__ __forceinline__ int own_column(int turn) { return (turn * THREADS + threadIdx.x) % ROW_QUADS * 4; }

// Four numbers from `column` on, zeros from `wide` on.
__device__ __forceinline__ Four load_four(const T* from, int column, int wide) {
    Four four = {};
    if (FOURS) {
        if (column < wide) four = *reinterpret_cast<const Four*>(from + column);
        return four;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) four.value[i] = column + i < wide ? from[column + i] : from_float<T>(0.f);
    return four;
}

// Four of a line of end.columns, zeros from `wide` on.
__device__ __forceinline__ float4 load_columns(const Epilogue& end, int line, int column) {
    const float* from = end.columns + (long long)line * end.wide + column;
    if (FOURS)
        return column < end.wide ? *reinterpret_cast<const float4*>(from) : make_float4(0.f, 0.f, 0.f, 0.f);
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = column + i < end.wide ? from[i] : 0.f;
    return make_float4(values[0], values[1], values[2], values[3]);
}

__device__ __forceinline__ void prepare(const Epilogue& end, Before& before) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int column = blockIdx.x / SPLIT * OUTPUTS + own_column(turn);
        before.bias[turn] = load_four(end.bias, column, end.bias ? end.wide : 0);
#if NORM
        before.sums[turn] = load_columns(end, 0, column);
        before.offsets[turn] = load_columns(end, 1, column);
#endif
#if WEIGHT_BITS == 8
        before.scales[turn] = load_columns(end, 2 * NORM, column);
#endif
    }
}

__device__ __forceinline__ void load_residual(const Epilogue& end, Before& before) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int own = own_row(turn), row = blockIdx.y * ROWS + own;
        const bool inside = end.residual && own >= 0 && row < end.rows;
        const T* from = inside ? end.residual + (long long)row * end.residual_stride : nullptr;
        before.residual[turn] =
            load_four(from, blockIdx.x / SPLIT * OUTPUTS + own_column(turn), inside ? end.wide : 0);
    }
}

__device__ __forceinline__ float4 add(const float4& x, const float4& y) {
    return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
}

// partial: the sums of each warp, [WARPS][ROWS][PARTIAL_STRIDE]; inbox, if SPLIT > 1: [SPLIT][OWN_ROWS][SENT_QUADS],
// full once `arrived` says so.
#define INBOX_BYTES (SPLIT * OWN_ROWS * SENT_QUADS * 16)
__device__ __forceinline__ void finish(const float* partial, float4* inbox, Barrier* arrived, const Epilogue& end,
                                       const Before& before) {
    auto over_warps = [&](int row, int column) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++)
            sum = add(sum, *reinterpret_cast<const float4*>(partial + (warp * ROWS + row) * PARTIAL_STRIDE + column));
        return sum;
    };
    auto over_cluster = [&](int row, int column) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int part = 0; part < SPLIT; part++)
            sum = add(sum, inbox[(part * OWN_ROWS + row % OWN_ROWS) * SENT_QUADS + column / 4]);
        return sum;
    };
    if (SPLIT > 1) {
        const int rank = blockIdx.x % SPLIT;
#pragma unroll
        for (int turn = 0; turn < up(ROWS * SENT_QUADS, THREADS); turn++) {
            const int quad = turn * THREADS + threadIdx.x, row = quad / SENT_QUADS, column = quad % SENT_QUADS;
            if (row < ROWS)
                send(row / OWN_ROWS, inbox + (rank * OWN_ROWS + row % OWN_ROWS) * SENT_QUADS + column,
                     over_warps(row, column * 4), arrived);
        }
        barrier_wait(arrived, 0);
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int own = own_row(turn), row = blockIdx.y * ROWS + own;
        if (own < 0 || row >= end.rows) continue;
        const int column = blockIdx.x / SPLIT * OUTPUTS + own_column(turn);
        float4 sum = SPLIT > 1 ? over_cluster(own, own_column(turn)) : over_warps(own, own_column(turn));
#if WEIGHT_BITS == 8
        const float4 by = before.scales[turn];
#else
        const float4 by = make_float4(1.f, 1.f, 1.f, 1.f);
#endif
#if NORM
        const float4 moments = SPLIT > 1 ? over_cluster(own, OUTPUTS) : over_warps(own, OUTPUTS);
        const float mean = moments.x / INNER, variance = fmaxf(moments.y / INNER - mean * mean, 0.f);
        const float factor = 1.f / sqrtf(variance + end.epsilon);
        const float4 less = before.sums[turn], more = before.offsets[turn];
        sum = make_float4((sum.x - mean * less.x) * (factor * by.x) + more.x,
                          (sum.y - mean * less.y) * (factor * by.y) + more.y,
                          (sum.z - mean * less.z) * (factor * by.z) + more.z,
                          (sum.w - mean * less.w) * (factor * by.w) + more.w);
#else
        sum = make_float4(sum.x * by.x, sum.y * by.y, sum.z * by.z, sum.w * by.w);
#endif
        const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
        Four four;
        T* to = end.out + (long long)row * end.out_stride + column;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float x = activate(sums[i] + to_float(before.bias[turn].value[i]), ACTIVATION);
            four.value[i] = from_float<T>(to_float(before.residual[turn].value[i]) + x);
        }
        if (!FOURS)
            for (int i = 0; i < 4 && column + i < end.wide; i++) to[i] = four.value[i];
        else if (column < end.wide)
            *reinterpret_cast<Four*>(to) = four;
    }
}

// The product ---------------------------------------------------------------------------------------------------------
// A block is alone with its latencies: what is computed between wait_for_previous and the loads of x delays every
// kernel behind, so all addresses are made before (`settle`).

struct Weights { Weight tile[TILES]; };

__device__ __forceinline__ void settle(const T*& pointer) {
#ifndef CUDA_ON_CPU
    asm volatile("" : "+l"(pointer));
#endif
}

// Where a warp's weights are: chunks `warp`, warp + WARPS and so on of this block's slice.
struct Source {
    const uint4* packed;
    int tile, tiles, warp, count;

    __device__ __forceinline__ Source(const Stored* weight, int wide) : warp(threadIdx.x / 32) {
        const int first = blockIdx.x % SPLIT * SLICE;
        tile = blockIdx.x / SPLIT * TILES;
        tiles = up(wide, 16);
        count = most(0, least(SLICE, CHUNKS - first));
        packed = reinterpret_cast<const uint4*>(weight) +
                 ((long long)tile * CHUNKS + first + warp) * (32 * WEIGHT_PIECES) + threadIdx.x % 32;
    }
    __device__ __forceinline__ bool has(int share) const {
        return EVEN || (share < SHARE && warp + share * WARPS < count);
    }
    __device__ __forceinline__ void load(Weights& weights, int share) const {
#pragma unroll
        for (int m = 0; m < TILES; m++)
            load_chunk(weights.tile[m], packed + (m * CHUNKS + share * WARPS) * (32 * WEIGHT_PIECES),
                       has(share) && tile + m < tiles);
    }
    // The same by way of shared memory, where a lane reads what it has copied itself.
    __device__ __forceinline__ void copy(uint4* to, int share) const {
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < WEIGHT_PIECES; i++) {
                const bool inside = has(share) && tile + m < tiles;
                const int at = (m * CHUNKS + share * WARPS) * WEIGHT_PIECES + i;
                copy_async16(to + (m * WEIGHT_PIECES + i) * THREADS, packed + (inside ? at * 32 : 0), inside ? 16 : 0);
            }
    }
    __device__ __forceinline__ static void fetch(Weights& weights, const uint4* from) {
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < WEIGHT_PIECES; i++)
                weights.tile[m].piece[i] = load_shared(from + (m * WEIGHT_PIECES + i) * THREADS);
    }
};

typedef float Sums[TILES][ROW_TILES][4];

__device__ __forceinline__ void multiply(Sums& sums, const Weights& weights, const uint4 (&x)[ROW_TILES]) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
        Right rows[ROW_TILES];
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) rows[n] = right_operand(x[n], step);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            const Left outputs = left_operand(weights.tile[m], step);
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) multiply_add(sums[m][n], outputs, rows[n]);
        }
    }
}

// A warp's sums to where `finish` looks for them: own is the warp's part of partial.
__device__ __forceinline__ void hand_over(float* own, const Sums& sums) {
    own += threadIdx.x % 4 * 2 * PARTIAL_STRIDE + threadIdx.x % 32 / 4;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) own[(8 * n + i % 2) * PARTIAL_STRIDE + 16 * m + i / 2 * 8] = sums[m][n][i];
}

// out[r] = residual[r] + activation(x[r] . W + b); with NORM, x[r] . W stands for layer_norm(x[r]) . W
//   x T [rows, INNER], rows x_stride apart; W packed by pack_weight; bias T [wide] or null; residual T [rows, wide] or
//   null, may be out; out T [rows, wide]; rows residual_stride and out_stride apart
//   NORM: W has each row times its gain, columns float [2][wide] the sums of W's columns and (bias of the norm) . W:
//   layer_norm(x) . W = (x . W - mean * columns[0]) / deviation + columns[1]; the moments of x come with the product
//   W int8: number * scale of its column, float [wide] behind those columns; x . W and columns[0] are without the scale
//   grid (SPLIT * ceil(wide / OUTPUTS), ceil(rows / ROWS)), cluster (SPLIT), block 32 * WARPS, shared memory as
//   linear_launch.py says; moves the weights once, x wide / OUTPUTS times (from L2); needs sm_75 where HALF, else sm_80
// Chunks of x under way, in registers.
#define STAGES least(SHARE, most(1, (SHARE > 4 ? 8 : 16) / ROW_TILES))

extern "C" __global__ void __launch_bounds__(THREADS)
linear(const T* x, int x_stride, const Stored* weight, const float* columns, float epsilon, const T* bias,
       const T* residual, int residual_stride, T* out, int out_stride, int rows, int wide) {
    extern __shared__ __align__(128) char memory[];
    uint4* ahead = reinterpret_cast<uint4*>(memory) + threadIdx.x;
    float* partial = reinterpret_cast<float*>(memory);  // once all weights have been read
    char* behind = memory + most(AHEAD * AHEAD_PIECES * 16, WARPS * ROWS * PARTIAL_STRIDE * 4);
    float4* inbox = reinterpret_cast<float4*>(behind);
    Barrier* arrived = reinterpret_cast<Barrier*>(behind + INBOX_BYTES);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#if !LATE
    launch_next();
#endif
    if (SPLIT > 1) {
        if (threadIdx.x == 0) {
            barrier_init(arrived, 1);
            publish_barriers();
            barrier_expect(arrived, INBOX_BYTES);
        }
        __syncwarp();
        cluster_arrive();
    }
    const Source source(weight, wide);
    Weights weights[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) source.load(weights[i], i);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        source.copy(ahead + i * AHEAD_PIECES, DEPTH + i);
        copy_async_commit();
    }

    const Epilogue end = {bias, residual, columns, out, residual_stride, out_stride, rows, wide, epsilon};
    Before before;
    prepare(end, before);
    const T* rows_of_x[ROW_TILES];  // row g of each tile, from this lane's first column on; the last row again after it
    const int begin = (blockIdx.x % SPLIT * SLICE + warp) * CHUNK + t * LANE_WIDTH;
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        rows_of_x[n] = x + (long long)least(blockIdx.y * ROWS + 8 * n + g, rows - 1) * x_stride + begin;
        settle(rows_of_x[n]);
    }
    if (SPLIT > 1) cluster_wait();  // all have begun: their shared memory may be written
    wait_for_previous();

    uint4 pieces[STAGES][ROW_TILES];
    auto load_x = [&](int share) {
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            const int offset = share * WARPS * CHUNK;
#if ALIGNED
            const bool inside = source.has(share) && (INNER % CHUNK == 0 || begin + offset < INNER);
            pieces[share % STAGES][n] = inside ? load_now(rows_of_x[n] + offset) : make_uint4(0, 0, 0, 0);
#else
            Pack16 piece;
#pragma unroll
            for (int i = 0; i < LANE_WIDTH; i++) {
                const bool inside = source.has(share) && begin + offset + i < INNER;
                piece.value[i] = inside ? rows_of_x[n][offset + i] : from_float<T>(0.f);
            }
            pieces[share % STAGES][n] = *reinterpret_cast<const uint4*>(&piece);
#endif
        }
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++) load_x(i);
    load_residual(end, before);
#if LATE
    launch_next();
#endif

    auto next_weights = [&](Weights& to, int share) {
#if AHEAD
        uint4* from = ahead + (share - DEPTH) % AHEAD * AHEAD_PIECES;
        copy_async_wait<AHEAD - 1>();
        source.fetch(to, from);
        if (share + AHEAD < SHARE) source.copy(from, share + AHEAD);
        copy_async_commit();
#else
        source.load(to, share);
#endif
    };
    Sums sums = {};
    float moments[ROW_TILES][4] = {};
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        multiply(sums, weights[i % DEPTH], pieces[i % STAGES]);
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
            if (NORM) add_moments(moments[n], pieces[i % STAGES][n]);
        if (i + DEPTH < SHARE) next_weights(weights[i % DEPTH], i + DEPTH);
        if (i + STAGES < SHARE) load_x(i + STAGES);
    }
    if (AHEAD) __syncthreads();
    float* own = partial + warp * ROWS * PARTIAL_STRIDE;
    hand_over(own, sums);
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
        const float2 of_row = row_moments(moments[n]);
        if (NORM && g / 2 == t)
            *reinterpret_cast<float4*>(own + (8 * n + g) * PARTIAL_STRIDE + OUTPUTS) =
                make_float4(of_row.x, of_row.y, 0.f, 0.f);
    }
    __syncthreads();
    finish(partial, inbox, arrived, end, before);
}

#else  // without INNER: kernels that need no constants

// packed = W in the order linear reads it; zeros beyond W
//   source T, or signed char where W is int8: W[k, n] at k * row_stride + n * column_stride, [inner, wide]
//   packed [ceil(wide / 16)][ceil(inner / CHUNK)][2 steps][32 lanes][16 bytes]: lane (g, t) of step s has outputs g
//          and g + 8 of the k whose x are in half s of its piece of sixteen bytes: where HALF 8 t + 4 s to
//          8 t + 4 s + 3, a fragment of mma.m16n8k16; else 4 t + 2 s and the next, of mma.m16n8k8
//          int8: [..][..][32 lanes][2 steps][8 bytes], the number plus 128
//   one thread for sixteen bytes of packed; grid ceil(pieces / 256), block 256
#if WEIGHT_BITS == 8
typedef signed char Given;
__device__ __forceinline__ Stored stored(Given x) { return (Stored)(x + 128); }
#else
typedef T Given;
__device__ __forceinline__ Stored stored(Given x) { return x; }
#endif
constexpr int PIECE = 16 / (int)sizeof(Stored);  // weights
struct __align__(16) Piece { Stored value[PIECE]; };

extern "C" __global__ void pack_weight(const Given* source, long long row_stride, long long column_stride,
                                       Stored* packed, int inner, int wide) {
    const long long piece = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int chunks = up(inner, CHUNK), tiles = up(wide, 16);
    if (piece >= (long long)tiles * chunks * 32 * WEIGHT_PIECES) return;
    const int lane = piece % 32, chunk = piece / (32 * WEIGHT_PIECES) % chunks;
    const int tile = piece / (32 * WEIGHT_PIECES) / chunks;
    constexpr int PAIR = LANE_WIDTH / 4;  // k that a register holds
    Piece result;
#pragma unroll
    for (int i = 0; i < PIECE; i++) {
        const int step = WEIGHT_PIECES == 1 ? i / LANE_WIDTH : piece / 32 % 2, j = i % LANE_WIDTH;
        const int n = tile * 16 + lane / 4 + j / PAIR % 2 * 8;
        const int k = chunk * CHUNK + lane % 4 * LANE_WIDTH + step * 2 * PAIR + j / (2 * PAIR) * PAIR + j % PAIR;
        result.value[i] = stored(k < inner && n < wide ? source[k * row_stride + n * column_stride] : Given(0));
    }
    reinterpret_cast<Piece*>(packed)[piece] = result;
}

#if WEIGHT_BITS == 8
// out[n, k] = W[k, n], number times scale, for cuBLAS; and what a LayerNorm's bias gives joins the bias
//   packed as pack_weight wrote it, from a multiple of sixteen outputs on; scales float [wide]
//   out T [wide, out_stride], zeros from `inner` on; out_stride is `inner` up to the next multiple of 8
//   bias T [wide] or null; offsets float [wide] and bias_out T [wide], bias + scale * offsets, or both null: `scale` is
//   what the product will be multiplied by before its bias is added
//   one thread for sixteen bytes of packed; grid ceil(pieces / 256), block 256; moves packed and out once
extern "C" __global__ void unpack_weight(const uint4* packed, const float* scales, const T* bias, const float* offsets,
                                         float scale, T* out, int out_stride, T* bias_out, int inner, int wide) {
    launch_next();
    const long long piece = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int chunks = up(inner, CHUNK), lane = piece % 32, k = piece / 32 % chunks * CHUNK + lane % 4 * LANE_WIDTH;
    const int tile = piece / 32 / chunks;
    if (tile >= up(wide, 16)) return;
    union { uint4 piece; unsigned char numbers[16]; } from = {packed[piece]};
    wait_for_previous();
#pragma unroll
    for (int upper = 0; upper < 2; upper++) {
        const int n = tile * 16 + lane / 4 + upper * 8;
        if (n >= wide) continue;
        if (k < out_stride) {
            float values[LANE_WIDTH];
#pragma unroll
            for (int i = 0; i < LANE_WIDTH; i++)
                values[i] = scales[n] * (from.numbers[i / 2 * 4 + upper * 2 + i % 2] - 128);
            store16(out + (long long)n * out_stride + k, values);
        }
        if (bias_out && k == 0) bias_out[n] = from_float<T>((bias ? to_float(bias[n]) : 0.f) + scale * offsets[n]);
    }
}
#endif

// x = activation(scale * x + b), in place, after cuBLAS
//   x T [rows, wide], contiguous; bias T [wide] or null
//   grid (ceil(wide / (256 * LANE_WIDTH)), rows up to 65535), block 256; moves x twice
extern "C" __global__ void bias_activation(T* x, const T* bias, int rows, int wide, int activation, float scale) {
    launch_next();
    wait_for_previous();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * LANE_WIDTH;
    if (column >= wide) return;
    const bool whole = wide % LANE_WIDTH == 0;
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        T* at = x + (long long)row * wide + column;
        float values[LANE_WIDTH];
        if (whole) load16(at, values);
#pragma unroll
        for (int i = 0; i < LANE_WIDTH; i++) {
            if (column + i >= wide) break;
            const float b = bias ? to_float(bias[column + i]) : 0.f;
            values[i] = activate((whole ? values[i] : to_float(at[i])) * scale + b, activation);
            if (!whole) at[i] = from_float<T>(values[i]);
        }
        if (whole) store16(at, values);
    }
}

#endif  // INNER
