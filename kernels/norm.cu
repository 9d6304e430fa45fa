// norm: LayerNorm on its own: where a product has none folded into it, or something else reads the result.

// out = (x - mean) / sqrt(variance + epsilon) * gain + bias, over a row; biased variance, two passes, sums in float
//   x T [rows, width], rows x_stride apart; gain, bias T [width]; out T [rows, width], contiguous, may be x where
//   x_stride is width
//   grid (rows), block 128, no dynamic shared memory; moves rows * width twice: a row stays in registers up to
//   width 128 * 4 * LANE_WIDTH (4096 halves, 2048 floats), beyond that it is read again from L2
//   sixteen bytes at a time where width and x_stride are multiples of LANE_WIDTH
#define NORM_THREADS 128
#define KEPT 4

__device__ __forceinline__ float block_sum(float x) {
    __shared__ float sums[NORM_THREADS / 32];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < NORM_THREADS / 32; warp++) sum += sums[warp];
    __syncthreads();
    return sum;
}

__device__ __forceinline__ void norm_by_pieces(const T* x, const T* gain, const T* bias, float epsilon, T* out,
                                               int width) {
    Pack16 kept[KEPT], kept_gain[KEPT], kept_bias[KEPT];
    const int step = NORM_THREADS * LANE_WIDTH, begin = threadIdx.x * LANE_WIDTH;
    float sum = 0.f, squares = 0.f, values[LANE_WIDTH], gains[LANE_WIDTH], biases[LANE_WIDTH];
#pragma unroll
    for (int i = 0; i < KEPT; i++)
        if (begin + i * step < width) {
            kept_gain[i] = *reinterpret_cast<const Pack16*>(gain + begin + i * step);
            kept_bias[i] = *reinterpret_cast<const Pack16*>(bias + begin + i * step);
        }
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < KEPT; i++)
        if (begin + i * step < width) kept[i] = *reinterpret_cast<const Pack16*>(x + begin + i * step);
    auto fetch = [&](int i, int k) {
        if (i < KEPT) {
#pragma unroll
            for (int j = 0; j < LANE_WIDTH; j++) values[j] = to_float(kept[i].value[j]);
        } else {
            load16(x + k, values);
        }
    };
    auto add = [&](int i, int k) {
        fetch(i, k);
#pragma unroll
        for (int j = 0; j < LANE_WIDTH; j++) sum += values[j];
    };
    // The first pieces by constant index, so that they stay in registers.
#define FOR_PIECES(function)                                                              \
    _Pragma("unroll") for (int i = 0; i < KEPT; i++)                                      \
        if (begin + i * step < width) function(i, begin + i * step);                      \
    for (int k = begin + KEPT * step; k < width; k += step) function(KEPT, k);
    FOR_PIECES(add)
    const float mean = block_sum(sum) / width;
    auto square = [&](int i, int k) {
        fetch(i, k);
#pragma unroll
        for (int j = 0; j < LANE_WIDTH; j++) squares += (values[j] - mean) * (values[j] - mean);
    };
    FOR_PIECES(square)
    const float factor = 1.f / sqrtf(block_sum(squares) / width + epsilon);
    auto write = [&](int i, int k) {
        fetch(i, k);
        if (i < KEPT) {
#pragma unroll
            for (int j = 0; j < LANE_WIDTH; j++)
                gains[j] = to_float(kept_gain[i].value[j]), biases[j] = to_float(kept_bias[i].value[j]);
        } else {
            load16(gain + k, gains);
            load16(bias + k, biases);
        }
#pragma unroll
        for (int j = 0; j < LANE_WIDTH; j++) values[j] = (values[j] - mean) * factor * gains[j] + biases[j];
        store16(out + k, values);
    };
    FOR_PIECES(write)
#undef FOR_PIECES
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
layer_norm(const T* x, int x_stride, const T* gain, const T* bias, float epsilon, T* out, int width) {
    launch_next();
    x += (long long)blockIdx.x * x_stride;
    out += (long long)blockIdx.x * width;
    if (width % LANE_WIDTH == 0 && x_stride % LANE_WIDTH == 0)
        return norm_by_pieces(x, gain, bias, epsilon, out, width);
    wait_for_previous();
    float sum = 0.f, squares = 0.f;
    for (int k = threadIdx.x; k < width; k += NORM_THREADS) sum += to_float(x[k]);
    const float mean = block_sum(sum) / width;
    for (int k = threadIdx.x; k < width; k += NORM_THREADS) {
        const float centred = to_float(x[k]) - mean;
        squares += centred * centred;
    }
    const float factor = 1.f / sqrtf(block_sum(squares) / width + epsilon);
    for (int k = threadIdx.x; k < width; k += NORM_THREADS)
        out[k] = from_float<T>((to_float(x[k]) - mean) * factor * to_float(gain[k]) + to_float(bias[k]));
}

// layer_norm_rows: layer_norm of many rows, a warp a row, for rows of up to NORM_THREADS pieces of sixteen bytes: no
// barrier, and all rows of a pass begin together.
//   arguments as above, and rows; width and x_stride multiples of LANE_WIDTH, width <= 128 * LANE_WIDTH
//   grid (rows / 4, rounded up), block 128, no shared memory
//   A lane has the pieces that a block's warps have each one of, and adds up in the block's order: the same to the last
//   bit, so that the number of rows may choose. A block a row is sooner done where there are few.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
layer_norm_rows(const T* x, int x_stride, const T* gain, const T* bias, float epsilon, T* out, int width, int rows) {
    constexpr int WARPS = NORM_THREADS / 32, STEP = 32 * LANE_WIDTH;
    launch_next();
    const int row = blockIdx.x * WARPS + threadIdx.x / 32, begin = threadIdx.x % 32 * LANE_WIDTH;
    if (row >= rows) return;
    x += (long long)row * x_stride + begin;
    out += (long long)row * width + begin;
    Pack16 kept[WARPS], kept_gain[WARPS], kept_bias[WARPS];
#pragma unroll
    for (int i = 0; i < WARPS; i++)
        if (begin + i * STEP < width) {
            kept_gain[i] = *reinterpret_cast<const Pack16*>(gain + begin + i * STEP);
            kept_bias[i] = *reinterpret_cast<const Pack16*>(bias + begin + i * STEP);
        }
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < WARPS; i++)
        if (begin + i * STEP < width) kept[i] = *reinterpret_cast<const Pack16*>(x + i * STEP);
    auto sum_of = [](const float* sums) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) sum += warp_sum(sums[i]);
        return sum;
    };
    float sums[WARPS] = {}, squares[WARPS] = {};
#pragma unroll
    for (int i = 0; i < WARPS; i++)
        if (begin + i * STEP < width)
#pragma unroll
            for (int j = 0; j < LANE_WIDTH; j++) sums[i] += to_float(kept[i].value[j]);
    const float mean = sum_of(sums) / width;
#pragma unroll
    for (int i = 0; i < WARPS; i++)
        if (begin + i * STEP < width)
#pragma unroll
            for (int j = 0; j < LANE_WIDTH; j++) {
                const float centred = to_float(kept[i].value[j]) - mean;
                squares[i] += centred * centred;
            }
    const float factor = 1.f / sqrtf(sum_of(squares) / width + epsilon);
#pragma unroll
    for (int i = 0; i < WARPS; i++)
        if (begin + i * STEP < width) {
            float values[LANE_WIDTH];
#pragma unroll
            for (int j = 0; j < LANE_WIDTH; j++)
                values[j] = (to_float(kept[i].value[j]) - mean) * factor * to_float(kept_gain[i].value[j]) +
                            to_float(kept_bias[i].value[j]);
            store16(out + i * STEP, values);
        }
}
