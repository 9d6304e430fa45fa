// linear: matrix products for few rows, which read each weight once and are as fast as memory; and what goes with
// cuBLAS for many rows. Compiled with
//   ROWS     rows a block takes: 8, 16, 32, or 64 (64 where HALF); blockIdx.y counts such groups of rows
//   INNER    width of x
//   OUTPUTS  columns of the result a block takes: 16, 32 or 64 where HALF, else 64
//   SPLIT    blocks of a cluster that share the sum over INNER (1 before sm_90)
//   NORM     1 for norm_linear, 0 for linear
//   ALIGNED  1 where rows of x begin at multiples of 16 bytes and INNER is made of such pieces
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

// LayerNorm of one row by one warp ------------------------------------------------------------------------------------

#define PIECES up(INNER, 32 * LANE_WIDTH)  // of a row, a lane

struct Row { Pack16 piece[PIECES]; };

// Mean and 1 / sqrt(variance + epsilon), in two passes over registers.
__device__ __forceinline__ float2 moments(const Row& row, float epsilon) {
    const int lane = threadIdx.x % 32;
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
#pragma unroll
        for (int j = 0; j < LANE_WIDTH; j++)
            if ((32 * i + lane) * LANE_WIDTH + j < INNER) sum += to_float(row.piece[i].value[j]);
    const float mean = warp_sum(sum) / INNER;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
#pragma unroll
        for (int j = 0; j < LANE_WIDTH; j++) {
            const float centred = to_float(row.piece[i].value[j]) - mean;
            if ((32 * i + lane) * LANE_WIDTH + j < INNER) squares += centred * centred;
        }
    return make_float2(mean, 1.f / sqrtf(warp_sum(squares) / INNER + epsilon));
}

// Gain and bias of the norm to shared memory: [2][INNER up to whole pieces].
#define NORM_WIDTH (up(INNER, 8) * 8)
__device__ __forceinline__ void stage_norm(T* norm, const T* gain, const T* bias) {
#if ALIGNED
    for (int k = threadIdx.x * LANE_WIDTH; k < INNER; k += THREADS * LANE_WIDTH) {
        copy_async16(norm + k, gain + k);
        copy_async16(norm + NORM_WIDTH + k, bias + k);
    }
#else
    for (int k = threadIdx.x; k < NORM_WIDTH; k += THREADS) {
        norm[k] = k < INNER ? gain[k] : from_float<T>(0.f);
        norm[NORM_WIDTH + k] = k < INNER ? bias[k] : from_float<T>(0.f);
    }
#endif
    copy_async_commit();
}

// (piece - mean) / deviation * gain + bias; zeros from column INNER on.
__device__ __forceinline__ Pack16 normalise(const Pack16& piece, float2 moments, const T* norm, int k) {
    float gain[LANE_WIDTH], bias[LANE_WIDTH];
    Pack16 result;
    const bool inside = k < INNER;
    load16(norm + (inside ? k : 0), gain);
    load16(norm + NORM_WIDTH + (inside ? k : 0), bias);
#pragma unroll
    for (int i = 0; i < LANE_WIDTH; i++) {
        const float x = (to_float(piece.value[i]) - moments.x) * moments.y * gain[i] + bias[i];
        result.value[i] = from_float<T>(k + i < INNER ? x : 0.f);
    }
    return result;
}

// The end of a product: sums over warps and over the cluster, and what is done to the result --------------------------

struct Epilogue {
    const T* bias;      // [wide] or null
    const T* residual;  // [rows, wide] or null; may be out
    T* out;             // [rows, wide]
    int residual_stride, out_stride, rows, wide, activation;
    float scale;
};

#define PARTIAL_STRIDE (OUTPUTS + 4)              // floats; with four more no two lanes of a store share a bank
#define QUADS (ROWS * OUTPUTS / 4)                // results of a block, four at a time
#define OWN_QUADS up(QUADS, SPLIT)                // those a block of the cluster finishes
#define TURNS up(OWN_QUADS, THREADS)

struct __align__(4 * sizeof(T)) Four { T value[4]; };

// What the end needs from memory, requested at the beginning: the bias at once, the residual when it is there.
struct Before { Four bias[TURNS], residual[TURNS]; };

__device__ __forceinline__ int quad_of(int turn) {
    const int own = turn * THREADS + threadIdx.x, quad = blockIdx.x % SPLIT * OWN_QUADS + own;
    return own < OWN_QUADS && quad < QUADS ? quad : -1;
}

__device__ __forceinline__ int row_of(int quad) { return blockIdx.y * ROWS + quad / (OUTPUTS / 4); }
__device__ __forceinline__ int column_of(int quad) { return blockIdx.x / SPLIT * OUTPUTS + quad % (OUTPUTS / 4) * 4; }

// Four numbers from `column` on, zeros from `wide` on.
__device__ __forceinline__ Four load_four(const T* from, int column, int wide) {
    Four four;
    if (column + 4 <= wide && reinterpret_cast<size_t>(from + column) % sizeof(Four) == 0)
        return *reinterpret_cast<const Four*>(from + column);
#pragma unroll
    for (int i = 0; i < 4; i++) four.value[i] = column + i < wide ? from[column + i] : from_float<T>(0.f);
    return four;
}

__device__ __forceinline__ void load_bias(const Epilogue& end, Before& before) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int quad = quad_of(turn);
        before.bias[turn] = load_four(end.bias, quad >= 0 ? column_of(quad) : 0, end.bias && quad >= 0 ? end.wide : 0);
    }
}

__device__ __forceinline__ void load_residual(const Epilogue& end, Before& before) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int quad = quad_of(turn);
        const bool inside = end.residual && quad >= 0 && row_of(quad) < end.rows;
        const T* from = inside ? end.residual + (long long)row_of(quad) * end.residual_stride : nullptr;
        before.residual[turn] = load_four(from, quad >= 0 ? column_of(quad) : 0, inside ? end.wide : 0);
    }
}

// partial: the sums of each warp, [WARPS][ROWS][PARTIAL_STRIDE]; inbox: [SPLIT][OWN_QUADS], where SPLIT > 1.
__device__ __forceinline__ void finish(const float* partial, float4* inbox, const Epilogue& end, const Before& before) {
    const int rank = blockIdx.x % SPLIT;
    for (int quad = threadIdx.x; SPLIT > 1 && quad < QUADS; quad += THREADS) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        const float* from = partial + quad / (OUTPUTS / 4) * PARTIAL_STRIDE + quad % (OUTPUTS / 4) * 4;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) {
            const float4 x = *reinterpret_cast<const float4*>(from + warp * ROWS * PARTIAL_STRIDE);
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        map_shared(inbox, quad / OWN_QUADS)[rank * OWN_QUADS + quad % OWN_QUADS] = sum;
    }
    if (SPLIT > 1) cluster_sync();
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int quad = quad_of(turn);
        if (quad < 0) continue;
        const int row = row_of(quad), column = column_of(quad);
        if (row >= end.rows) continue;
        float sum[4] = {};
        const float* from = partial + quad / (OUTPUTS / 4) * PARTIAL_STRIDE + quad % (OUTPUTS / 4) * 4;
#pragma unroll
        for (int part = 0; part < (SPLIT > 1 ? SPLIT : WARPS); part++) {
            const float4 x = SPLIT > 1 ? inbox[part * OWN_QUADS + quad % OWN_QUADS]
                                       : *reinterpret_cast<const float4*>(from + part * ROWS * PARTIAL_STRIDE);
            sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
        }
        Four four;
        T* to = end.out + (long long)row * end.out_stride + column;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float x = activate(sum[i] * end.scale + to_float(before.bias[turn].value[i]), end.activation);
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

#define TILES (OUTPUTS / 16)
#define ROW_TILES (ROWS / 8)
#define CHUNKS up(INNER, 32)
#define SLICE up(CHUNKS, SPLIT)  // chunks of a block: chunk c is warp c % WARPS's
#define SHARE up(SLICE, WARPS)   // chunks of a warp
// Chunks whose weights are under way, in registers: as many as 128 registers a thread allow without spills, so that a
// multiprocessor takes two blocks, this kernel's and the next one's.
#define DEPTH least(SHARE, most(1, (ROWS > 32 ? 4 : NORM && PIECES > 4 ? 6 : 8) / TILES))
#define STAGES least(SHARE, ROWS > 32 ? 2 : 4)            // chunks whose x is under way, in shared memory
#define ROW_STRIDE (32 * CHUNKS + (CHUNKS % 2 ? 0 : 32))   // halves: rows 64 bytes apart modulo 128, no bank conflicts

struct Weights { uint4 value[TILES][2]; };

struct Place {
    int lane, warp, first, count, tiles;  // first chunk of the block, number of chunks
};

__device__ __forceinline__ Place place(int wide) {
    const int first = blockIdx.x % SPLIT * SLICE;
    return {(int)threadIdx.x % 32, (int)threadIdx.x / 32, first, most(0, least(SLICE, CHUNKS - first)), up(wide, 16)};
}

__device__ __forceinline__ void load_weights(Weights& weights, const uint4* packed, const Place& at, int share) {
    const int chunk = at.warp + share * WARPS;
#pragma unroll
    for (int m = 0; m < TILES; m++) {
        const int tile = blockIdx.x / SPLIT * TILES + m;
        const uint4* source = packed + ((long long)tile * CHUNKS + at.first + chunk) * 64 + at.lane;
        const bool inside = chunk < at.count && tile < at.tiles;
        weights.value[m][0] = inside ? load_weight(source) : make_uint4(0, 0, 0, 0);
        weights.value[m][1] = inside ? load_weight(source + 32) : make_uint4(0, 0, 0, 0);
    }
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

__device__ __forceinline__ void store_sums(float* partial, const Sums& sums, const Place& at) {
    const int g = at.lane / 4, t = at.lane % 4;
    float* own = partial + at.warp * ROWS * PARTIAL_STRIDE;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                own[(8 * n + 2 * t + i % 2) * PARTIAL_STRIDE + 16 * m + g + i / 2 * 8] = sums[m][n][i];
}

#if !NORM
// out[r] = residual[r] + activation(scale * (x[r] . W) + b)
//   x T [rows, INNER], rows x_stride apart; W packed by pack_weight; bias T [wide] or null; residual T [rows, wide] or
//   null, may be out; out T [rows, wide]; rows residual_stride and out_stride apart
//   grid (SPLIT * ceil(wide / OUTPUTS), ceil(rows / ROWS)), cluster (SPLIT), block 256, shared memory linear_launch.py
//   moves the weights once, x wide / OUTPUTS times (from L2); needs sm_75
extern "C" __global__ void __launch_bounds__(THREADS, ROWS * OUTPUTS > 1024 ? 1 : 2)
linear(const T* x, int x_stride, const T* weight, const T* bias, const T* residual, int residual_stride, T* out,
       int out_stride, int rows, int wide, int activation, float scale) {
    extern __shared__ __align__(128) char memory[];
    uint4* staged = reinterpret_cast<uint4*>(memory);  // [WARPS][STAGES][ROW_TILES][32]: each lane reads what it copied
    float* partial = reinterpret_cast<float*>(memory);
    const int body = most(WARPS * STAGES * ROW_TILES * 512, WARPS * ROWS * PARTIAL_STRIDE * 4);
    float4* inbox = reinterpret_cast<float4*>(memory + body);
    const Place at = place(wide);
    const uint4* packed = reinterpret_cast<const uint4*>(weight);

    launch_next();
    Weights weights[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) load_weights(weights[i], packed, at, i);
    const Epilogue end = {bias, residual, out, residual_stride, out_stride, rows, wide, activation, scale};
    Before before;
    load_bias(end, before);
    wait_for_previous();

    auto stage = [&](int share) {
        const int chunk = at.warp + share * WARPS, k = (at.first + chunk) * 32 + at.lane % 4 * 8;
        uint4* to = staged + (at.warp * STAGES + share % STAGES) * ROW_TILES * 32 + at.lane;
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            const int row = blockIdx.y * ROWS + 8 * n + at.lane / 4;
            if (chunk < at.count) stage_piece(to + 32 * n, x, x_stride, row, k, rows);
        }
        copy_async_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++) stage(i);
    load_residual(end, before);
    if (SPLIT > 1) cluster_sync();  // all have begun: their shared memory may be written

    Sums sums = {};
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        copy_async_wait<STAGES - 1>();
        if (at.warp + i * WARPS < at.count) {
            uint4 piece[ROW_TILES];
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++)
                piece[n] = staged[((at.warp * STAGES + i % STAGES) * ROW_TILES + n) * 32 + at.lane];
            multiply(sums, weights[i % DEPTH], piece);
        }
        if (i + DEPTH < SHARE) load_weights(weights[i % DEPTH], packed, at, i + DEPTH);
        if (i + STAGES < SHARE) stage(i + STAGES);
        else copy_async_commit();
    }
    __syncthreads();
    store_sums(partial, sums, at);
    __syncthreads();
    finish(partial, inbox, end, before);
}

#else  // NORM
// normed = layer_norm(x); out = activation(scale * (normed . W) + b)
//   as linear; gain, norm_bias T [INNER]; normed T [rows, INNER] or null: written by the first blocks, not x itself
//   every block normalises all rows (of its slice of INNER) while its weights are on their way
extern "C" __global__ void __launch_bounds__(THREADS, ROWS * OUTPUTS > 1024 ? 1 : 2)
norm_linear(const T* x, int x_stride, const T* gain, const T* norm_bias, float epsilon, T* normed, const T* weight,
            const T* bias, T* out, int out_stride, int rows, int wide, int activation, float scale) {
    extern __shared__ __align__(128) char memory[];
    T* held = reinterpret_cast<T*>(memory);  // [ROWS][ROW_STRIDE]: x, then normed; a lane touches its own pieces only
    float* partial = reinterpret_cast<float*>(memory);
    const int body = most(ROWS * ROW_STRIDE * 2, WARPS * ROWS * PARTIAL_STRIDE * 4);
    float4* inbox = reinterpret_cast<float4*>(memory + body);
    T* norm = reinterpret_cast<T*>(memory + body + (SPLIT > 1 ? SPLIT * OWN_QUADS * 16 : 0));
    const Place at = place(wide);
    const uint4* packed = reinterpret_cast<const uint4*>(weight);

    launch_next();
    stage_norm(norm, gain, norm_bias);
    Weights weights[DEPTH];
#pragma unroll
    for (int i = 0; i < DEPTH; i++) load_weights(weights[i], packed, at, i);
    const Epilogue end = {bias, nullptr, out, 0, out_stride, rows, wide, activation, scale};
    Before before = {};
    load_bias(end, before);
    wait_for_previous();

    for (int r = at.warp; r < ROWS && blockIdx.y * ROWS + r < rows; r += WARPS)
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int k = (32 * i + at.lane) * 8;
            if (k < CHUNKS * 32) stage_piece(held + r * ROW_STRIDE + k, x, x_stride, blockIdx.y * ROWS + r, k, rows);
        }
    copy_async_commit();
    copy_async_wait<0>();
    if (SPLIT > 1) cluster_sync();  // all have begun; and the norm is there
    else __syncthreads();
#pragma unroll 1
    for (int r = at.warp; r < ROWS && blockIdx.y * ROWS + r < rows; r += WARPS) {
        Row row;
        T* own = held + r * ROW_STRIDE;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int k = (32 * i + at.lane) * 8;
            row.piece[i] = *reinterpret_cast<const Pack16*>(own + (k < CHUNKS * 32 ? k : 0));
        }
        const float2 statistics = moments(row, epsilon);
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const int k = (32 * i + at.lane) * 8;
            if (k < at.first * 32 || k >= (at.first + at.count) * 32) continue;
            // Read again: kept in registers, the row would push weights out of them.
            const Pack16 piece = normalise(*reinterpret_cast<const Pack16*>(own + k), statistics, norm, k);
            *reinterpret_cast<Pack16*>(own + k) = piece;
            if (normed && blockIdx.x < SPLIT) {
                T* to = normed + (long long)(blockIdx.y * ROWS + r) * INNER + k;
                if (INNER % 8 == 0 && k < INNER) *reinterpret_cast<Pack16*>(to) = piece;
                for (int j = 0; INNER % 8 && j < 8 && k + j < INNER; j++) to[j] = piece.value[j];
            }
        }
    }
    __syncthreads();

    Sums sums = {};
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        const int chunk = at.warp + i * WARPS;
        if (chunk < at.count) {
            uint4 piece[ROW_TILES];  // of rows that are not there, anything: columns of an mma never meet
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++)
                piece[n] = *reinterpret_cast<const uint4*>(
                    held + (8 * n + at.lane / 4) * ROW_STRIDE + (at.first + chunk) * 32 + at.lane % 4 * 8);
            multiply(sums, weights[i % DEPTH], piece);
        }
        if (i + DEPTH < SHARE) load_weights(weights[i % DEPTH], packed, at, i + DEPTH);
    }
    __syncthreads();
    store_sums(partial, sums, at);
    __syncthreads();
    finish(partial, inbox, end, before);
}
#endif  // NORM

#else
// The product in true float -------------------------------------------------------------------------------------------
// A lane has all rows of four columns; a warp 64 columns and two of every 16 groups of four k: what a lane loads of x
// serves four columns, what it loads of W all rows, so that arithmetic, not loading, bounds it at 32 rows.

#define UNITS up(INNER, 64)       // of 64 k
#define STEPS up(UNITS, SPLIT)    // units of a block
#define DEPTH least(STEPS, ROWS > 16 ? 1 : 2)
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

#define TOGETHER least(ROWS / WARPS, most(1, 32 / PIECES))  // rows whose loads are under way at once, a warp
#define BODY most(ROWS * X_STRIDE * 4, WARPS * ROWS * PARTIAL_STRIDE * 4)

#if !NORM
// As linear above, in float: W [INNER up to 64, wide up to 64], zero-filled by pack_weight.
extern "C" __global__ void __launch_bounds__(THREADS)
linear(const T* x, int x_stride, const T* weight, const T* bias, const T* residual, int residual_stride, T* out,
       int out_stride, int rows, int wide, int activation, float scale) {
    extern __shared__ __align__(128) char memory[];
    float* held = reinterpret_cast<float*>(memory);
    launch_next();
    Weights weights[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) load_weights(weights[d], weight, d, wide);
    const Epilogue end = {bias, residual, out, residual_stride, out_stride, rows, wide, activation, scale};
    Before before;
    load_bias(end, before);
    wait_for_previous();
    load_residual(end, before);
    if (SPLIT > 1) cluster_sync();
    multiply(held, held, weights, weight, wide, [&](int step) {
        const int first = (blockIdx.x % SPLIT * STEPS + step) * 64;
        for (int i = threadIdx.x; i < ROWS * TILE_STEPS * 16; i += THREADS) {
            const int r = i / (TILE_STEPS * 16), k = i % (TILE_STEPS * 16) * 4;
            *reinterpret_cast<Pack16*>(held + r * X_STRIDE + k) =
                load_piece(x, x_stride, blockIdx.y * ROWS + r, first + k, rows);
        }
    });
    finish(held, reinterpret_cast<float4*>(memory + BODY), end, before);
}

#else  // NORM
// As norm_linear above, in float.
extern "C" __global__ void __launch_bounds__(THREADS)
norm_linear(const T* x, int x_stride, const T* gain, const T* norm_bias, float epsilon, T* normed, const T* weight,
            const T* bias, T* out, int out_stride, int rows, int wide, int activation, float scale) {
    extern __shared__ __align__(128) char memory[];
    float* held = reinterpret_cast<float*>(memory);
    float4* inbox = reinterpret_cast<float4*>(memory + BODY);
    T* norm = reinterpret_cast<T*>(memory + BODY + (SPLIT > 1 ? SPLIT * OWN_QUADS * 16 : 0));
    __shared__ float2 statistics[ROWS];
    launch_next();
    stage_norm(norm, gain, norm_bias);
    Weights weights[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) load_weights(weights[d], weight, d, wide);
    const Epilogue end = {bias, nullptr, out, 0, out_stride, rows, wide, activation, scale};
    Before before = {};
    load_bias(end, before);
    wait_for_previous();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int first = 0; first < ROWS; first += TOGETHER * WARPS) {
        Row row[TOGETHER];
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            const int here = blockIdx.y * ROWS + first + j * WARPS + warp;
#pragma unroll
            for (int i = 0; i < PIECES; i++)
                row[j].piece[i] = load_piece(x, x_stride, here, (32 * i + lane) * 4, rows);
        }
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            const float2 own = moments(row[j], epsilon);
            if (lane == 0 && first + j * WARPS + warp < ROWS) statistics[first + j * WARPS + warp] = own;
        }
    }
    copy_async_wait<0>();
    if (SPLIT > 1) cluster_sync();
    multiply(held, held, weights, weight, wide, [&](int step) {
        const int first = (blockIdx.x % SPLIT * STEPS + step) * 64;
        for (int i = threadIdx.x; i < ROWS * TILE_STEPS * 16; i += THREADS) {
            const int r = i / (TILE_STEPS * 16), local = i % (TILE_STEPS * 16) * 4, k = first + local;
            const int here = blockIdx.y * ROWS + r;
            const Pack16 piece = normalise(load_piece(x, x_stride, here, k, rows), statistics[r], norm, k);
            *reinterpret_cast<Pack16*>(held + r * X_STRIDE + local) = piece;
            // Units past this block's slice are the next block's to write.
            if (normed && blockIdx.x < SPLIT && here < rows && step * 64 + local < STEPS * 64)
                for (int j = 0; j < 4 && k + j < INNER; j++) normed[(long long)here * INNER + k + j] = piece.value[j];
        }
    });
    finish(held, inbox, end, before);
}
#endif  // NORM
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
