// softmax: what attention kernels have in common. Softmax and sums are in float, with powers of two.

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -3e38f;  // below any score, and unlike -inf its difference to itself is a number

// What the parts of a past leave for each other: the running softmax of each over its steps.
template <int BEAMS, int MOST_PARTS> struct __align__(16) Shares {
    float context[BEAMS][MOST_PARTS][HEAD_SIZE], most[BEAMS][MOST_PARTS], sum[BEAMS][MOST_PARTS];
};

// out[b] = the parts' contexts as one, by the whole block, after a barrier; parts are added in order.
template <int BEAMS, int MOST_PARTS>
__device__ __forceinline__ void join(const Shares<BEAMS, MOST_PARTS>& shares, int beams, int parts, T* out,
                                     long long out_stride) {
    for (int i = threadIdx.x; i < beams * HEAD_SIZE; i += blockDim.x) {
        int b = i / HEAD_SIZE, column = i % HEAD_SIZE;
        float highest = LOWEST, total = 0, mixed = 0;
        for (int part = 0; part < parts; part++) highest = fmaxf(highest, shares.most[b][part]);
        for (int part = 0; part < parts; part++) {
            float shrink = power_of_two(shares.most[b][part] - highest);
            total += shrink * shares.sum[b][part];
            mixed += shrink * shares.context[b][part][column];
        }
        out[b * out_stride + column] = from_float<T>(mixed / total);
    }
}

#if HALF
// The running softmax of two rows of a product on tensor cores, which a thread shares with three others: of d[tile] of
// mma.m16n8k16 it has the first two numbers of one row and the last two of the eighth row after it.
struct Running {
    float most[2] = {LOWEST, LOWEST}, sum[2] = {};

    // Scores become shares, laid out as the left operand of the next product, whose sums so far (context) shrink where
    // a higher score is found. scale: of scores, for powers of two.
    template <int TILES, int COLUMNS>
    __device__ __forceinline__ void take(const float (&scores)[TILES][4], float scale, unsigned (&shares)[TILES / 2][4],
                                         float (&context)[COLUMNS][4]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest[4], added[4] = {};  // four at a time, which need not wait for each other
#pragma unroll
            for (int i = 0; i < 4; i++) highest[i] = most[half];
#pragma unroll
            for (int n = 0; n < TILES; n++)
                highest[n % 4] = fmaxf(highest[n % 4], fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
            float top = fmaxf(fmaxf(highest[0], highest[1]), fmaxf(highest[2], highest[3]));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            const float taken = top * scale;
            if (__any_sync(FULL_WARP, top > most[half])) {  // mostly there is none
                const float shrink = power_of_two((most[half] - top) * scale);
                most[half] = top;
                sum[half] *= shrink;
#pragma unroll
                for (int n = 0; n < COLUMNS; n++) {
                    context[n][2 * half] *= shrink;
                    context[n][2 * half + 1] *= shrink;
                }
            }
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                const float x = power_of_two(scores[n][2 * half] * scale - taken);
                const float y = power_of_two(scores[n][2 * half + 1] * scale - taken);
                added[n % 4] += x + y;
                shares[n / 2][n % 2 * 2 + half] = two_halves(x, y);
            }
            sum[half] += (added[0] + added[1]) + (added[2] + added[3]);
        }
    }

    // The whole row's, once there are no more scores: what its context is to be divided by.
    __device__ __forceinline__ float total(int half) {
        const float pair = sum[half] + __shfl_xor_sync(FULL_WARP, sum[half], 1);
        return pair + __shfl_xor_sync(FULL_WARP, pair, 2);
    }
};

// Takes from the scores of a thread's two rows those of keys that are not seen. seen: how many the first row sees of
// the keys from the thread's first on; more: how many more the other does.
template <int TILES> __device__ __forceinline__ void hide(float (&scores)[TILES][4], int seen, int more) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int limit = seen + i / 2 * more - i % 2;
#pragma unroll
        for (int n = 0; n < TILES; n++)
            if (8 * n >= limit) scores[n][i] = -INFINITE;
    }
}
#endif
