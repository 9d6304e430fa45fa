// tensor_attention: what decode_attention and cross_attention of attention.cu do, on the tensor cores, in few
// instructions. Half precision, -DHEAD_SIZE=64. For scores, products have eight keys on the left and the queries (one,
// or up to BEAMS) on the right; for results, sixteen columns of values and the queries' shares. Keys are where products
// want them in registers as they come from memory. There are few branches and little is in the code twice: a
// layer's kernels share the multiprocessor's cache of instructions, and what it has no room for is waited for.
// A result depends on its own row, head and length alone: never on the other rows.

#include "softmax.cuh"

constexpr int STEPS = 32;                    // that a warp works on at a time
constexpr int BEAMS = 4;                     // of one sentence that share its keys and values
constexpr int KEY_WORDS = HEAD_SIZE / 8;     // of four bytes, that a lane has of a key: four lanes share one
constexpr int VALUE_WORDS = HEAD_SIZE / 16;  // the same of a value, which eight lanes share
constexpr int COLUMNS = HEAD_SIZE / 16;      // tiles of sixteen columns of the result
static_assert(HEAD_SIZE == 64, "a smaller one has no sixteen bytes for a lane, a larger one no registers");

template <int words> __device__ __forceinline__ void load(unsigned (&to)[words], const void* from) {
#pragma unroll
    for (int i = 0; i < words; i += 4) {
        const uint4 piece = load_now(static_cast<const uint4*>(from) + i / 4);
        to[i] = piece.x;
        to[i + 1] = piece.y;
        to[i + 2] = piece.z;
        to[i + 3] = piece.w;
    }
}

// Keys and values of STEPS steps as products read them. Lane 4 g + t has of steps 8 n + g the t-th quarter of the
// keys: of each of its two pieces of sixteen bytes, words 0 and 2 are in row g of the left operand and 1 and 3 in row
// g + 8. Of steps 16 n + 2 t, the next, the eighth and the ninth after it a lane has the g-th eighth of the values, two
// numbers for each tile of columns.
struct Chunk {
    unsigned keys[STEPS / 8][KEY_WORDS], values[STEPS / 16][4][VALUE_WORDS];
};
__device__ __forceinline__ int key_step(int n) { return 8 * n + threadIdx.x % 32 / 4; }
__device__ __forceinline__ int value_step(int n, int i) { return 16 * n + threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }

// The numbers of two halves, one of each word, that belong together as a product reads them.
__device__ __forceinline__ unsigned pair_of(unsigned x, unsigned y, int which) {
    return __byte_perm(x, y, which ? 0x7632 : 0x5410);
}

// out[b] = sum over t < count of softmax(query[b] . key(t) / sqrt(d)) value(t) for up to BEAMS queries. place(t): which
// row of keys and values, `hidden` numbers apart, a step is; asked by all lanes together, each for its own.
// With OWN there is one query, of a token whose own key and value come after its past; they are behind the query, and
// stay in row `own` of keys and values. place(0) is a row there is even where count is 0; what it has is not heeded.
// The past is cut by its length alone into chunks of STEPS, and those into parts, at most MOST_PARTS: chunk c belongs
// to part c % parts. Warps take parts in turn, so that their number changes no result.
// Keys and values of the past were written before this step began, queries by the kernel in front: a warp requests
// its first steps before it waits.
template <bool OWN, int QUERIES, int MOST_PARTS, typename Place>
__device__ __forceinline__ void attend(const T* query, int query_stride, int beams, int own, int count, T* keys,
                                       T* values, int hidden, Place place, Shares<QUERIES, MOST_PARTS>& shares, T* out,
                                       int out_stride) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    const int parts = most(1, least(MOST_PARTS, (count + STEPS - 1) / STEPS));
    if (parts == 1 && warp) return;
    const int stride = hidden * (int)sizeof(T), quarter = t * (HEAD_SIZE / 4), eighth = g * (HEAD_SIZE / 8);
    char *all_keys = reinterpret_cast<char*>(keys + quarter), *all_values = reinterpret_cast<char*>(values + eighth);
    Chunk chunk;
    auto fetch = [&](int first) {
        auto at = [=](int row) { return (long long)row * stride; };
        const int mine = place(most(0, least(first + lane, count - 1)));  // the last one again after it
#pragma unroll
        for (int n = 0; n < STEPS / 8; n++)
            load(chunk.keys[n], all_keys + at(__shfl_sync(FULL_WARP, mine, key_step(n))));
#pragma unroll
        for (int n = 0; n < STEPS / 16; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                load(chunk.values[n][i], all_values + at(__shfl_sync(FULL_WARP, mine, value_step(n, i))));
    };
    const float scale = LOG2_E * rsqrtf((float)HEAD_SIZE);
    unsigned q[KEY_WORDS / 2];
    // Of query t the highest score so far and this lane's part of the sum; of queries 2 t and 2 t + 1 the columns
    // 2 j and 2 j + 1 of the g-th eighth.
    float highest = LOWEST, sum = 0, context[COLUMNS][4] = {};
    // of[0] + of[3] becomes the product of key g and query t: the right operand's column 2 t has the words of the query
    // that meet those in row g, the next one the others.
    auto multiply = [&](float (&of)[4], const unsigned (&key)[KEY_WORDS], int i) {
        mma16816(of, {key[4 * i], key[4 * i + 1], key[4 * i + 2], key[4 * i + 3]}, {q[2 * i], q[2 * i + 1]});
    };
    auto of_query = [&](float x, int i) {  // query 2 t + i's x, of which there is one in lane t
        return QUERIES == 1 ? x : __shfl_sync(FULL_WARP, x, (2 * t + i) % 4, 4);
    };
    auto keep = [](void* to, const unsigned* words) {
        *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    };
    bool asked = false;
#pragma unroll 1
    for (int part = warp, first = part * STEPS; part < parts;) {
        fetch(first);
        if (!asked) {
            asked = true;
            wait_for_previous();
            // All that the kernel in front wrote is asked for together.
            const T* words = query + least(g / 2, beams - 1) * query_stride + quarter + g % 2 * 2;
#pragma unroll
            for (int i = 0; i < KEY_WORDS / 2; i++) q[i] = load_word_now(words + 4 * i);
            if (OWN && part == 0) {  // it begins with the token itself
                unsigned own_key[KEY_WORDS], own_value[VALUE_WORDS];
                load(own_key, query + hidden + quarter);
                load(own_value, query + 2 * hidden + eighth);
                float product[4] = {};
#pragma unroll
                for (int i = 0; i < KEY_WORDS / 4; i++) multiply(product, own_key, i);
                highest = (product[0] + product[3]) * scale;
                sum = g == 0;
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&own_value[j]));
                    context[j][0] = two.x;
                    context[j][2] = two.y;
                }
                const long long row = (long long)own * stride;
                if (t == 0) keep(all_values + row, own_value);
                if (g == 0) keep(all_keys + row, own_key), keep(all_keys + row + 16, own_key + 4);
            }
        }
        float products[STEPS / 8][4] = {};
#pragma unroll
        for (int i = 0; i < KEY_WORDS / 4; i++)
#pragma unroll
            for (int n = 0; n < STEPS / 8; n++) multiply(products[n], chunk.keys[n], i);
        float scores[STEPS / 8], most = highest;  // of query t and steps 8 n + g
#pragma unroll
        for (int n = 0; n < STEPS / 8; n++) {
            scores[n] = first + key_step(n) < count ? (products[n][0] + products[n][3]) * scale : -INFINITE;
            most = fmaxf(most, scores[n]);
        }
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, offset));
        const float shrink = power_of_two(highest - most);
        highest = most;
        sum *= shrink;
#pragma unroll
        for (int n = 0; n < STEPS / 8; n++) {
            scores[n] = power_of_two(scores[n] - highest);  // from now on its share
            sum += scores[n];
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float by = of_query(shrink, i);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                context[j][i] *= by;
                context[j][2 + i] *= by;
            }
        }
        if (first < count)
#pragma unroll
            for (int n = 0; n < STEPS / 16; n++) {
                const auto& value = chunk.values[n];
                // Steps 2 t and the next, of queries g: from lanes 8 t + g and 8 t + 4 + g.
                const unsigned two = two_halves(scores[2 * n], scores[2 * n + 1]);
                const unsigned even = __shfl_sync(FULL_WARP, two, 8 * t + g % 4),
                               odd = __shfl_sync(FULL_WARP, two, 8 * t + 4 + g % 4);
#pragma unroll
                for (int j = 0; j < COLUMNS; j++)
                    mma16816(context[j], {pair_of(value[0][j], value[1][j], 0), pair_of(value[0][j], value[1][j], 1),
                                          pair_of(value[2][j], value[3][j], 0), pair_of(value[2][j], value[3][j], 1)},
                             {pair_of(even, odd, 0), pair_of(even, odd, 1)});
            }
        first += parts * STEPS;
        if (first < count) continue;

#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, offset);
        if (parts > 1 && g == 0 && t < beams) {
            shares.most[t][part] = highest;
            shares.sum[t][part] = sum;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int b = 2 * t + i;
            const float all = of_query(sum, i), by = parts > 1 ? 1 : all == 0 ? 0 : 1 / all;
            float of[2 * COLUMNS];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                of[2 * j] = context[j][i] * by;
                of[2 * j + 1] = context[j][2 + i] * by;
                context[j][i] = context[j][2 + i] = 0;
            }
            if (b < beams && parts == 1)
                store16(out + b * out_stride + eighth, of);
            else if (b < beams)
#pragma unroll
                for (int j = 0; j < 2 * COLUMNS; j += 4)
                    *reinterpret_cast<float4*>(&shares.context[b][part][eighth + j]) =
                        make_float4(of[j], of[j + 1], of[j + 2], of[j + 3]);
        }
        part += warps;
        first = part * STEPS;
        highest = LOWEST;
        sum = 0;
    }
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
    int* past = ancestors + (long long)slot * steps;
    auto place = [=](int step) { return step < length ? past[step] * steps + step : slot * steps; };
    attend<true, 1, DECODE_WARPS>(query, 0, 1, slot * steps + length, length, keys + column, values + column, hidden,
                                  place, shares, result, 0);
    if (head == 0 && threadIdx.x == 0) past[length] = slot;
}

// cross_attention_tensor: attention.cu cross_attention, but for up to BEAMS beams at a time.
//   static shared memory 4.1 KiB
constexpr int CROSS_WARPS = 4;
extern "C" __global__ void __launch_bounds__(32 * CROSS_WARPS, 4)
cross_attention_tensor(const T* query, const int* rows, const Slot* slots, T* keys, T* values, T* out, int heads,
                       int steps) {
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
    attend<false, BEAMS, CROSS_WARPS>(query + at, hidden, least(BEAMS, width - beam), 0, slot->memory_length,
                                      keys + memory, values + memory, hidden, [](int step) { return step; }, shares,
                                      out + at, hidden);
}
