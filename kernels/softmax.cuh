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
__device__ __forceinline__ unsigned two_halves(float x, float y) {
    __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<unsigned*>(&pair);
}
#endif
