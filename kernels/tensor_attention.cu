// tensor_attention: what decode_attention and cross_attention of attention.cu do, on the tensor cores, in a quarter of
// the instructions. Half precision, -DHEAD_SIZE=64. Products have sixteen steps or columns on the left and the
// queries, of which there are one or up to BEAMS, on the right; keys and values go from memory to where the products want
// them in registers.
// A result depends on its own row, head and length alone: never on the other rows.

#include "softmax.cuh"

constexpr int STEPS = 32;                    // that a warp works on at a time
constexpr int BEAMS = 8;                     // of one sentence that share its keys and values
constexpr int KEY_WORDS = HEAD_SIZE / 8;     // of four bytes, that a lane has of a key: four lanes share one
constexpr int VALUE_WORDS = HEAD_SIZE / 16;  // the same of a value, which eight lanes share
constexpr int COLUMNS = HEAD_SIZE / 16;      // tiles of sixteen columns of the result
static_assert(HEAD_SIZE == 64, "a smaller one has no sixteen bytes for a lane, a larger one no registers");

template <int words> __device__ __forceinline__ void load(unsigned (&to)[words], const T* from, bool wanted) {
#pragma unroll
    for (int i = 0; i < words; i += 4) {
        const uint4 piece = wanted ? load_now(from + 2 * i) : make_uint4(0, 0, 0, 0);
        to[i] = piece.x;
        to[i + 1] = piece.y;
        to[i + 2] = piece.z;
        to[i + 3] = piece.w;
    }
}

// Keys and values of STEPS steps as products read them on the left. Lane 4 g + t has of steps 8 n + g the t-th quarter of
// the keys, in whose numbers a sum runs in that order; of steps 16 n + 2 t, the next, the eighth and the ninth after it
// the g-th eighth of the values, two numbers in each tile of columns.
struct Chunk {
    unsigned keys[STEPS / 8][KEY_WORDS], values[STEPS / 16][4][VALUE_WORDS];
};
__device__ __forceinline__ int key_step(int n) { return 8 * n + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int value_step(int n, int i) { return 16 * n + threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }

// The numbers of two halves, one of each word, that belong together as a product reads them.
__device__ __forceinline__ unsigned pair_of(unsigned x, unsigned y, int which) {
    return __byte_perm(x, y, which ? 0x7632 : 0x5410);
}

// The new token's own key and value, its last step, and where they stay. Of attention whose steps were all there before,
// there is Nothing.
struct Own {
    const T *key, *value;
    T *kept_key, *kept_value;
    static constexpr bool THERE = true;
};
struct Nothing : Own {
    static constexpr bool THERE = false;
};

// out[b] = sum over t < count of softmax(query[b] . key(t) / sqrt(d)) value(t) for up to BEAMS queries. place(t): which
// row of keys and values, `hidden` numbers apart, a step is; it is asked by all lanes together, for 32 steps from one
// on, each for its own. With an Own the last step is the token's, which was not there before the kernel in front.
// The past is cut by its length alone into chunks of STEPS, and those into parts, at most MOST_PARTS: chunk c belongs to
// part c % parts. Warps take parts in turn, so that their number changes no result.
// Keys and values of the past were written before this step began, queries by the kernel in front: a warp requests
// its first steps before it waits.
template <int QUERIES, int MOST_PARTS, typename Token, typename Place>
__device__ __forceinline__ void attend(const T* query, long long query_stride, int beams, Token own, int count,
                                       const T* keys, const T* values, long long hidden, Place place,
                                       Shares<QUERIES, MOST_PARTS>& shares, T* out, long long out_stride) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    const int chunks = (count + STEPS - 1) / STEPS, parts = most(1, least(MOST_PARTS, chunks));
    const int past = count - Token::THERE;
    if (parts == 1 && warp) return;
    Chunk chunk;
    auto fetch = [&](int first) {
        const int mine = place(first + lane);
#pragma unroll
        for (int n = 0; n < STEPS / 8; n++) {
            const int step = key_step(n);
            const long long row = __shfl_sync(FULL_WARP, mine, step);
            load(chunk.keys[n], keys + row * hidden + t * (HEAD_SIZE / 4), first + step < past);
        }
#pragma unroll
        for (int n = 0; n < STEPS / 16; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int step = value_step(n, i);
                const long long row = __shfl_sync(FULL_WARP, mine, step);
                load(chunk.values[n][i], values + row * hidden + g * (HEAD_SIZE / 8), first + step < past);
            }
    };
    auto take_own = [&](int at) {  // the step of the chunk that is the token's own
#pragma unroll
        for (int n = 0; n < STEPS / 8; n++)
            if (key_step(n) == at) load(chunk.keys[n], own.key + t * (HEAD_SIZE / 4), true);
#pragma unroll
        for (int n = 0; n < STEPS / 16; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (value_step(n, i) == at) load(chunk.values[n][i], own.value + g * (HEAD_SIZE / 8), true);
    };
    if (warp < parts) fetch(warp * STEPS);
    wait_for_previous();
    // All that the kernel in front wrote is asked for together.
    unsigned q[KEY_WORDS];
    load(q, query + g * query_stride + t * (HEAD_SIZE / 4), g < beams && warp < parts);
    if (Token::THERE && warp < parts && (warp + 1) * STEPS >= count) take_own(past - warp * STEPS);
    // A lane of the first warp keeps sixteen bytes of the key or the value. It stores them in the end: a warp that stores
    // what it has only just asked for does nothing until that has come.
    const bool keeps = Token::THERE && warp == 0 && lane < HEAD_SIZE / 4;
    const int kept_at = lane % (HEAD_SIZE / 8) * 8;
    uint4 kept;
    if (keeps) kept = load_now((lane < HEAD_SIZE / 8 ? own.key : own.value) + kept_at);
    const float scale = LOG2_E * rsqrtf((float)HEAD_SIZE);
    for (int part = warp; part < parts; part += warps) {
        float context[COLUMNS][4] = {}, highest[2] = {LOWEST, LOWEST}, sum[2] = {};  // of queries 2 t and 2 t + 1
        for (int first = part * STEPS; first < count; first += parts * STEPS) {
            if (first != warp * STEPS) {
                fetch(first);
                if (Token::THERE && first + STEPS >= count) take_own(past - first);
            }
            float scores[STEPS / 16][4] = {};
#pragma unroll
            for (int k = 0; k < KEY_WORDS; k += 2)
#pragma unroll
                for (int n = 0; n < STEPS / 16; n++) {
                    const auto &upper = chunk.keys[2 * n], &lower = chunk.keys[2 * n + 1];
                    mma16816(scores[n], {upper[k], lower[k], upper[k + 1], lower[k + 1]}, {q[k], q[k + 1]});
                }
#pragma unroll
            for (int query = 0; query < 2; query++) {
                const float before = highest[query];
#pragma unroll
                for (int n = 0; n < STEPS / 16; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float& score = scores[n][2 * i + query];
                        score = first + 16 * n + 8 * i + g < count ? score * scale : -INFINITE;
                        highest[query] = fmaxf(highest[query], score);
                    }
#pragma unroll
                for (int offset = 4; offset < 32; offset *= 2)
                    highest[query] = fmaxf(highest[query], __shfl_xor_sync(FULL_WARP, highest[query], offset));
                const float shrink = power_of_two(before - highest[query]);
                sum[query] *= shrink;
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    context[j][query] *= shrink;
                    context[j][2 + query] *= shrink;
                }
#pragma unroll
                for (int n = 0; n < STEPS / 16; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float& score = scores[n][2 * i + query];
                        score = power_of_two(score - highest[query]);  // from now on its share
                        sum[query] += score;
                    }
            }
#pragma unroll
            for (int n = 0; n < STEPS / 16; n++) {
                const unsigned shares_of[2] = {transpose(two_halves(scores[n][0], scores[n][1])),
                                               transpose(two_halves(scores[n][2], scores[n][3]))};
                const auto& value = chunk.values[n];
#pragma unroll
                for (int j = 0; j < COLUMNS; j++)
                    mma16816(context[j], {pair_of(value[0][j], value[1][j], 0), pair_of(value[0][j], value[1][j], 1),
                                          pair_of(value[2][j], value[3][j], 0), pair_of(value[2][j], value[3][j], 1)},
                             shares_of);
            }
        }
#pragma unroll
        for (int query = 0; query < 2; query++) {
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2)
                sum[query] += __shfl_xor_sync(FULL_WARP, sum[query], offset);
            const int b = 2 * t + query, column = g * (HEAD_SIZE / 8);
            if (b >= beams) continue;
            if (parts == 1) {
                const float by = sum[query] == 0 ? 0 : 1 / sum[query];
                T* result = out + b * out_stride + column;
                unsigned words[COLUMNS];
#pragma unroll
                for (int j = 0; j < COLUMNS; j++)
                    words[j] = two_halves(context[j][query] * by, context[j][2 + query] * by);
#pragma unroll
                for (int j = 0; j < COLUMNS; j += 4)
                    *reinterpret_cast<uint4*>(result + 2 * j) =
                        make_uint4(words[j], words[j + 1], words[j + 2], words[j + 3]);
                continue;
            }
            if (g == 0) {
                shares.most[b][part] = highest[query];
                shares.sum[b][part] = sum[query];
            }
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                shares.context[b][part][column + 2 * j] = context[j][query];
                shares.context[b][part][column + 2 * j + 1] = context[j][2 + query];
            }
        }
    }
    if (keeps) *reinterpret_cast<uint4*>((lane < HEAD_SIZE / 8 ? own.kept_key : own.kept_value) + kept_at) = kept;
    if (parts == 1) return;
    __syncthreads();
    join(shares, beams, parts, out, out_stride);
}

// decode_attention_tensor: attention.cu decode_attention, with its arguments, launch and order of memory accesses.
//   static shared memory 4.1 KiB
constexpr int DECODE_WARPS = 16;
extern "C" __global__ void __launch_bounds__(32 * DECODE_WARPS)
decode_attention_tensor(const T* qkv, const int* rows, const Slot* slots, int* ancestors, T* keys, T* values, T* out,
                        int heads, int steps) {
    __shared__ Shares<1, DECODE_WARPS> shares;
    launch_next();
    const int head = blockIdx.x, row = blockIdx.y, hidden = heads * HEAD_SIZE, column = head * HEAD_SIZE;
    const int slot = rows[row], length = slots[slot].length, width = slots[slot].width;
    T* result = out + (long long)row * hidden + column;
    if (width == 0) {
        wait_for_previous();
        for (int i = threadIdx.x; i < HEAD_SIZE; i += blockDim.x) result[i] = from_float<T>(0.f);
        return;
    }
    const T* query = qkv + 3ll * row * hidden + column;
    const long long own_place = ((long long)slot * steps + length) * hidden + column;
    int* past = ancestors + (long long)slot * steps;
    const Own own = {query + hidden, query + 2 * hidden, keys + own_place, values + own_place};
    auto place = [=](int step) { return step < length ? past[step] * steps + step : 0; };
    attend<1, DECODE_WARPS>(query, 0, 1, own, length + 1, keys + column, values + column, hidden, place, shares, result,
                            0);
    if (head == 0 && threadIdx.x == 0) past[length] = slot;
}

// cross_attention_tensor: attention.cu cross_attention, but for up to BEAMS beams at a time.
//   static shared memory 8.3 KiB
constexpr int CROSS_WARPS = 4;
extern "C" __global__ void __launch_bounds__(32 * CROSS_WARPS, 4)
cross_attention_tensor(const T* query, const int* rows, const Slot* slots, const T* keys, const T* values, T* out,
                       int heads, int steps) {
    __shared__ Shares<BEAMS, CROSS_WARPS> shares;
    launch_next();
    const int row = blockIdx.y, hidden = heads * HEAD_SIZE, column = blockIdx.x * HEAD_SIZE;
    const Slot* slot = slots + rows[row];
    const int beam = slot->beam, width = slot->width;
    const long long at = (long long)row * hidden + column;
    if (width == 0) {
        wait_for_previous();
        for (int i = threadIdx.x; i < HEAD_SIZE; i += blockDim.x) out[at + i] = from_float<T>(0.f);
        return;
    }
    if (beam % BEAMS) return;
    if (beam) slot = slots + rows[row - beam];
    const long long memory = (long long)slot->memory * steps * hidden + column;
    attend<BEAMS, CROSS_WARPS>(query + at, hidden, least(BEAMS, width - beam), Nothing{}, slot->memory_length,
                               keys + memory, values + memory, hidden, [](int step) { return step; }, shares, out + at,
                               hidden);
}
