// linear: matrix products for few rows, which read each weight once and are as fast as memory; and what goes with
// cuBLAS for many rows. Compiled with
//   ROWS     rows a block takes: 8, 16, 32, or 64 (64 where HALF); blockIdx.y counts such groups of rows
//   INNER    width of x
//   OUTPUTS  columns of the result a block takes: 16, 32 or 64 where HALF, else 64
//   SPLIT    blocks of a cluster that share the sum over INNER (1 before sm_90)
//   NORM     1 where x goes through a LayerNorm that is folded into W (HALF only), else 0
//   ALIGNED  1 where rows of x begin at multiples of 16 bytes and INNER is made of such pieces
//   LATE     1 where the next kernel may begin once x is on its way, 0 where it may begin at once (HALF only)
// The sum of one result has an order that depends on INNER and SPLIT alone, never on ROWS: a row's result is the same
// whatever rows come with it.

#define WARPS 8
#define THREADS (32 * WARPS)

#ifdef INNER

__host__ __device__ constexpr int up(int x, int y) { return (x + y - 1) / y; }
__host__ __device__ constexpr int least(int x, int y) { return x < y ? x : y; }
__host__ __device__ constexpr int most(int x, int y) { return x > y ? x : y; }

// A piece of sixteen bytes of row `row` from column k on, zeros outside x.
__device__ __forceinline__ Pack16 load_piece(const T* x, int stride, int row, int k, int rows) {
    Pack16 piece;
#if ALIGNED
    if (row < rows && k < INNER) return *reinterpret_cast<const Pack16*>(x + (long long)row * stride + k);
#pragma unroll
    for (int i = 0; i < LANE_WIDTH; i++) piece.value[i] = from_float<T>(0.f);
#else
#pragma unroll
    for (int i = 0; i < LANE_WIDTH; i++)
        piece.value[i] = row < rows && k + i < INNER ? x[(long long)row * stride + k + i] : from_float<T>(0.f);
#endif
    return piece;
}

// The same to shared memory; there once this thread has waited for its copies.
__device__ __forceinline__ void stage_piece(void* to, const T* x, int stride, int row, int k, int rows) {
#if ALIGNED
    const bool inside = row < rows && k < INNER;
    copy_async16(to, inside ? x + (long long)row * stride + k : x, inside ? 16 : 0);
#else
    *static_cast<Pack16*>(to) = load_piece(x, stride, row, k, rows);
#endif
}

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

// The end of a product: sums over warps and over the cluster, and what is done to the result --------------------------

struct Epilogue {
    const T* bias;         // [wide] or null
    const T* residual;     // [rows, wide] or null; may be out
    const float* columns;  // [2][wide], where NORM
    T* out;                // [rows, wide]
    int residual_stride, out_stride, rows, wide, activation;
    float scale, epsilon;
};

#define PARTIAL_STRIDE (OUTPUTS + 4)        // floats: with four more no two lanes of a store share a bank; or moments
#define ROW_QUADS (OUTPUTS / 4)             // results of a row, four at a time
#define SENT_QUADS (ROW_QUADS + NORM)       // the same and the row's sum and sum of squares
#define OWN_ROWS up(ROWS, SPLIT)            // rows that a block of the cluster finishes
#define TURNS up(OWN_ROWS * ROW_QUADS, THREADS)

struct __align__(4 * sizeof(T)) Four { T value[4]; };

// What the end needs, made at the beginning; the residual when it is there.
struct Before {
    Four bias[TURNS], residual[TURNS];
#if NORM
    float4 sums[TURNS], offsets[TURNS];
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
    Four four;
    if (column + 4 <= wide && reinterpret_cast<size_t>(from + column) % sizeof(Four) == 0)
        return *reinterpret_cast<const Four*>(from + column);
#pragma unroll
    for (int i = 0; i < 4; i++) four.value[i] = column + i < wide ? from[column + i] : from_float<T>(0.f);
    return four;
}

__device__ __forceinline__ void prepare(const Epilogue& end, Before& before) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int column = blockIdx.x / SPLIT * OUTPUTS + own_column(turn);
        before.bias[turn] = load_four(end.bias, column, end.bias ? end.wide : 0);
#if NORM
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            values[i] = column + i % 4 < end.wide ? end.columns[i / 4 * end.wide + column + i % 4] : 0.f;
        before.sums[turn] = make_float4(values[0], values[1], values[2], values[3]);
        before.offsets[turn] = make_float4(values[4], values[5], values[6], values[7]);
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

// partial: the sums of each warp, [WARPS][ROWS][PARTIAL_STRIDE]; inbox: [SPLIT][OWN_ROWS][SENT_QUADS], if SPLIT > 1.
__device__ __forceinline__ void finish(const float* partial, float4* inbox, const Epilogue& end, const Before& before) {
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
                map_shared(inbox, row / OWN_ROWS)[(rank * OWN_ROWS + row % OWN_ROWS) * SENT_QUADS + column] =
                    over_warps(row, column * 4);
        }
        cluster_sync();
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int own = own_row(turn), row = blockIdx.y * ROWS + own;
        if (own < 0 || row >= end.rows) continue;
        const int column = blockIdx.x / SPLIT * OUTPUTS + own_column(turn);
        float4 sum = SPLIT > 1 ? over_cluster(own, own_column(turn)) : over_warps(own, own_column(turn));
#if NORM
        const float4 moments = SPLIT > 1 ? over_cluster(own, OUTPUTS) : over_warps(own, OUTPUTS);
        const float mean = moments.x / INNER, variance = fmaxf(moments.y / INNER - mean * mean, 0.f);
        const float factor = 1.f / sqrtf(variance + end.epsilon);
        const float4 less = before.sums[turn], more = before.offsets[turn];
        sum = make_float4((sum.x - mean * less.x) * factor + more.x, (sum.y - mean * less.y) * factor + more.y,
                          (sum.z - mean * less.z) * factor + more.z, (sum.w - mean * less.w) * factor + more.w);
#endif
        const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
        Four four;
        T* to = end.out + (long long)row * end.out_stride + column;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float x = activate(sums[i] * end.scale + to_float(before.bias[turn].value[i]), end.activation);
            four.value[i] = from_float<T>(to_float(before.residual[turn].value[i]) + x);
        }
        if (column + 4 <= end.wide && reinterpret_cast<size_t>(to) % sizeof(Four) == 0)
            *reinterpret_cast<Four*>(to) = four;
        else
            for (int i = 0; i < 4 && column + i < end.wide; i++) to[i] = four.value[i];
    }
}

#if HALF
// The product on tensor cores -----------------------------------------------------------------------------------------
// Weights are the 16-row operand of mma.m16n8k16 and rows of x its eight columns. A chunk is 32 columns of x, two steps
// of 16, permuted such that lane (g, t) needs columns 8 t to 8 t + 7 of row g: one piece of sixteen bytes.
//
// A block is alone with its latencies: what is computed between wait_for_previous and the loads of x delays every
// kernel behind, so all addresses are made before (`settle`).

#define TILES (OUTPUTS / 16)
#define ROW_TILES (ROWS / 8)
#define CHUNKS up(INNER, 32)
#define SLICE up(CHUNKS, SPLIT)  // chunks of a block: chunk c is warp c % WARPS's
#define SHARE up(SLICE, WARPS)   // chunks of a warp
#define EVEN (CHUNKS % (SPLIT * WARPS) == 0)
// Chunks whose weights are under way, and those whose x is, in registers.
#define DEPTH least(SHARE, 8 / TILES)
#define STAGES least(SHARE, most(1, 16 / ROW_TILES))

struct Weights { uint4 value[TILES][2]; };

__device__ __forceinline__ void settle(const T*& pointer) {
#ifndef CUDA_ON_CPU
    asm volatile("" : "+l"(pointer));
#endif
}

// Sixteen bytes that an earlier kernel wrote; in the order of the program.
__device__ __forceinline__ uint4 load_now(const T* source) {
#ifdef CUDA_ON_CPU
    return *reinterpret_cast<const uint4*>(source);
#else
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(source)
                 : "memory");
    return x;
#endif
}

typedef float Sums[TILES][ROW_TILES][4];

__device__ __forceinline__ void multiply(Sums& sums, const Weights& weights, const uint4 (&x)[ROW_TILES]) {
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            const uint4& w = weights.value[m][step];
            const unsigned a[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
                const unsigned b[2] = {step ? x[n].z : x[n].x, step ? x[n].w : x[n].y};
                mma16816(sums[m][n], a, b);
            }
        }
}

// Of each row the sum and the sum of squares: x is also the upper half of the 16-row operand, ones are the lower.
__device__ __forceinline__ void measure(float (&moments)[ROW_TILES][4], const uint4 (&x)[ROW_TILES]) {
    const unsigned ones = 0x3c003c00u;
#pragma unroll
    for (int step = 0; step < 2; step++)
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            const unsigned b[2] = {step ? x[n].z : x[n].x, step ? x[n].w : x[n].y}, a[4] = {b[0], ones, b[1], ones};
            mma16816(moments[n], a, b);
        }
}

// out[r] = residual[r] + activation(scale * (x[r] . W) + b); with NORM, x[r] . W stands for layer_norm(x[r]) . W
//   x T [rows, INNER], rows x_stride apart; W packed by pack_weight; bias T [wide] or null; residual T [rows, wide] or
//   null, may be out; out T [rows, wide]; rows residual_stride and out_stride apart
//   NORM: W has each row times its gain, columns float [2][wide] the sums of W's columns and (bias of the norm) . W:
//   layer_norm(x) . W = (x . W - mean * columns[0]) / deviation + columns[1], and the moments of x come with the product
//   grid (SPLIT * ceil(wide / OUTPUTS), ceil(rows / ROWS)), cluster (SPLIT), block 256, shared memory as
//   linear_launch.py says; moves the weights once, x wide / OUTPUTS times (from L2); needs sm_75
extern "C" __global__ void __launch_bounds__(THREADS)
linear(const T* x, int x_stride, const T* weight, const float* columns, float epsilon, const T* bias,
       const T* residual, int residual_stride, T* out, int out_stride, int rows, int wide, int activation,
       float scale) {
    extern __shared__ __align__(128) char memory[];
    float* partial = reinterpret_cast<float*>(memory);
    float4* inbox = reinterpret_cast<float4*>(memory + WARPS * ROWS * PARTIAL_STRIDE * 4);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x % SPLIT * SLICE, count = most(0, least(SLICE, CHUNKS - first)), tiles = up(wide, 16);
    auto has = [&](int share) { return EVEN || (share < SHARE && warp + share * WARPS < count); };

#if !LATE
    launch_next();
#endif
    if (SPLIT > 1) cluster_arrive();
    const uint4* packed = reinterpret_cast<const uint4*>(weight) +
                          ((long long)(blockIdx.x / SPLIT * TILES) * CHUNKS + first + warp) * 64 + lane;
    Weights weights[DEPTH];
    auto load_weights = [&](int share) {
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            const uint4* source = packed + (m * CHUNKS + share * WARPS) * 64;
            const bool inside = has(share) && (int)(blockIdx.x / SPLIT * TILES + m) < tiles;
            weights[share % DEPTH].value[m][0] = inside ? load_weight(source) : make_uint4(0, 0, 0, 0);
            weights[share % DEPTH].value[m][1] = inside ? load_weight(source + 32) : make_uint4(0, 0, 0, 0);
        }
    };
#pragma unroll
    for (int i = 0; i < DEPTH; i++) load_weights(i);

    const Epilogue end = {bias, residual, columns, out, residual_stride, out_stride, rows, wide, activation, scale,
                          epsilon};
    Before before;
    prepare(end, before);
    const T* rows_of_x[ROW_TILES];  // row g of each tile, from this lane's first column on; the last row again after it
    const int begin = (first + warp) * 32 + t * 8;
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
            const int offset = share * WARPS * 32;
#if ALIGNED
            const bool inside = has(share) && (INNER % 32 == 0 || begin + offset < INNER);
            pieces[share % STAGES][n] = inside ? load_now(rows_of_x[n] + offset) : make_uint4(0, 0, 0, 0);
#else
            Pack16 piece;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const bool inside = has(share) && begin + offset + i < INNER;
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

    Sums sums = {};
    float moments[ROW_TILES][4] = {};
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        multiply(sums, weights[i % DEPTH], pieces[i % STAGES]);
        if (NORM) measure(moments, pieces[i % STAGES]);
        if (i + DEPTH < SHARE) load_weights(i + DEPTH);
        if (i + STAGES < SHARE) load_x(i + STAGES);
    }
    float* own = partial + warp * ROWS * PARTIAL_STRIDE;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                own[(8 * n + 2 * t + i % 2) * PARTIAL_STRIDE + 16 * m + g + i / 2 * 8] = sums[m][n][i];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
        if (NORM && g / 2 == t)
            *reinterpret_cast<float4*>(own + (8 * n + g) * PARTIAL_STRIDE + OUTPUTS) =
                make_float4(moments[n][2 + g % 2], moments[n][g % 2], 0.f, 0.f);
    __syncthreads();
    finish(partial, inbox, end, before);
}

#else
// The product in true float -------------------------------------------------------------------------------------------
// A lane has all rows of four columns; a warp 64 columns and two of every 16 groups of four k: what a lane loads of x
// serves four columns, what it loads of W all rows, so that arithmetic, not loading, bounds it at 32 rows.

#define UNITS up(INNER, 64)       // of 64 k
#define STEPS up(UNITS, SPLIT)    // units of a block
#define DEPTH least(STEPS, 2)
#ifndef TILE_STEPS
#define TILE_STEPS STEPS          // units of x in shared memory at a time
#endif
#define X_STRIDE (64 * TILE_STEPS + 4)

struct Weights { float4 value[4]; };

__device__ __forceinline__ void load_weights(Weights& weights, const float* packed, int step, int wide) {
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32 * 2 + lane / 16;
    const int unit = blockIdx.x % SPLIT * STEPS + step, columns = up(wide, 64) * 64;
    const int column = blockIdx.x / SPLIT * 64 + lane % 16 * 4;
    const float* source = packed + ((long long)unit * 64 + group * 4) * columns + column;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint4 w = make_uint4(0, 0, 0, 0);
        if (step < STEPS && unit < UNITS)
            w = load_weight(reinterpret_cast<const uint4*>(source + (long long)i * columns));
        weights.value[i] = {__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z), __uint_as_float(w.w)};
    }
}

__device__ __forceinline__ void accumulate(float4& sum, float x, const float4& w) {
    sum.x = fmaf(x, w.x, sum.x), sum.y = fmaf(x, w.y, sum.y), sum.z = fmaf(x, w.z, sum.z), sum.w = fmaf(x, w.w, sum.w);
}

// sums over this block's slice, then in partial. stage(step) fills held [ROWS][X_STRIDE] with TILE_STEPS units of x.
template <typename Stage>
__device__ __forceinline__ void multiply(const float* held, float* partial, Weights (&weights)[DEPTH],
                                         const float* packed, int wide, Stage stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp * 2 + lane / 16;
    float4 sums[ROWS] = {};
#pragma unroll 1
    for (int first = 0; first < STEPS; first += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const int step = first + d;
            if (step >= STEPS) break;
            if (step % TILE_STEPS == 0) {
                __syncthreads();
                stage(step);
                __syncthreads();
            }
            const Weights current = weights[d];
            load_weights(weights[d], packed, step + DEPTH, wide);
            const float* from = held + step % TILE_STEPS * 64 + group * 4;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float4 x = *reinterpret_cast<const float4*>(from + r * X_STRIDE);
                accumulate(sums[r], x.x, current.value[0]);
                accumulate(sums[r], x.y, current.value[1]);
                accumulate(sums[r], x.z, current.value[2]);
                accumulate(sums[r], x.w, current.value[3]);
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float4 sum = sums[r];
        sum.x += __shfl_xor_sync(FULL_WARP, sum.x, 16);
        sum.y += __shfl_xor_sync(FULL_WARP, sum.y, 16);
        sum.z += __shfl_xor_sync(FULL_WARP, sum.z, 16);
        sum.w += __shfl_xor_sync(FULL_WARP, sum.w, 16);
        if (lane / 16 == r % 2)
            *reinterpret_cast<float4*>(partial + (warp * ROWS + r) * PARTIAL_STRIDE + lane % 16 * 4) = sum;
    }
    __syncthreads();
}

#define BODY most(ROWS * X_STRIDE * 4, WARPS * ROWS * PARTIAL_STRIDE * 4)

// As linear above, in float and without NORM: W [INNER up to 64, wide up to 64], zero-filled by pack_weight.
extern "C" __global__ void __launch_bounds__(THREADS, ROWS > 8 ? 1 : 2)
linear(const T* x, int x_stride, const T* weight, const float* columns, float epsilon, const T* bias,
       const T* residual, int residual_stride, T* out, int out_stride, int rows, int wide, int activation,
       float scale) {
    extern __shared__ __align__(128) char memory[];
    float* held = reinterpret_cast<float*>(memory);
    launch_next();
    if (SPLIT > 1) cluster_arrive();
    Weights weights[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) load_weights(weights[d], weight, d, wide);
    const Epilogue end = {bias, residual, columns, out, residual_stride, out_stride, rows, wide, activation, scale,
                          epsilon};
    Before before;
    prepare(end, before);
    if (SPLIT > 1) cluster_wait();  // all have begun: their shared memory may be written
    wait_for_previous();
    load_residual(end, before);
    multiply(held, held, weights, weight, wide, [&](int step) {
        const int first = (blockIdx.x % SPLIT * STEPS + step) * 64;
        for (int i = threadIdx.x; i < ROWS * TILE_STEPS * 16; i += THREADS) {
            const int r = i / (TILE_STEPS * 16), k = i % (TILE_STEPS * 16) * 4;
            stage_piece(held + r * X_STRIDE + k, x, x_stride, blockIdx.y * ROWS + r, first + k, rows);
        }
        copy_async_commit();
        copy_async_wait<0>();
    });
    finish(held, reinterpret_cast<float4*>(memory + BODY), end, before);
}
#endif  // HALF

#else  // without INNER: kernels that need no constants

// packed = W in the order linear reads it; zeros beyond W
//   source T: W[k, n] at k * row_stride + n * column_stride, [inner, wide]
//   packed T, HALF:  [ceil(wide / 16)][ceil(inner / 32)][2 steps][32 lanes][8]: lane (g, t) of step s has, a fragment of
//                    mma.m16n8k16, outputs g and g + 8 of k 8 t + 4 s to 8 t + 4 s + 3
//             float: [inner up to 64][wide up to 64]
//   one thread for sixteen bytes of packed; grid ceil(pieces / 256), block 256
extern "C" __global__ void pack_weight(const T* source, long long row_stride, long long column_stride, T* packed,
                                       int inner, int wide) {
    const long long piece = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    float values[LANE_WIDTH];
#if HALF
    const int chunks = (inner + 31) / 32, tiles = (wide + 15) / 16;
    if (piece >= (long long)tiles * chunks * 64) return;
    const int lane = piece % 32, step = piece / 32 % 2, chunk = piece / 64 % chunks, tile = piece / 64 / chunks;
#else
    const int columns = (wide + 63) / 64 * 16, deep = (inner + 63) / 64 * 64;
    if (piece >= (long long)deep * columns) return;
#endif
#pragma unroll
    for (int i = 0; i < LANE_WIDTH; i++) {
#if HALF
        const int n = tile * 16 + lane / 4 + i / 2 % 2 * 8;
        const int k = chunk * 32 + lane % 4 * 8 + step * 4 + i / 4 * 2 + i % 2;
#else
        const int n = piece % columns * 4 + i, k = piece / columns;
#endif
        values[i] = k < inner && n < wide ? to_float(source[k * row_stride + n * column_stride]) : 0.f;
    }
    store16(packed + piece * LANE_WIDTH, values);
}

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

// out = residual + y + b, after cuBLAS; out may be residual or y
//   all T [rows, wide], contiguous; bias T [wide] or null; grid and block as bias_activation; moves 3 * rows * wide
extern "C" __global__ void add_residual(const T* residual, const T* y, const T* bias, T* out, int rows, int wide) {
    launch_next();
    wait_for_previous();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * LANE_WIDTH;
    if (column >= wide) return;
    const bool whole = wide % LANE_WIDTH == 0;
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        const long long at = (long long)row * wide + column;
        float left[LANE_WIDTH], right[LANE_WIDTH];
        if (whole) load16(residual + at, left), load16(y + at, right);
#pragma unroll
        for (int i = 0; i < LANE_WIDTH; i++) {
            if (column + i >= wide) break;
            const float b = bias ? to_float(bias[column + i]) : 0.f;
            left[i] = (whole ? left[i] : to_float(residual[at + i])) + ((whole ? right[i] : to_float(y[at + i])) + b);
            if (!whole) out[at + i] = from_float<T>(left[i]);
        }
        if (whole) store16(out + at, left);
    }
}

#endif  // INNER
