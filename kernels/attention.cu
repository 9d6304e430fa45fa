// attention: a new token against its past, beams against their source, packed sequences against themselves.
// Compiled for one head size, -DHEAD_SIZE=d with 1 <= d <= 256. Sixteen bytes are loaded at a time where d is a
// multiple of LANE_WIDTH (matrices begin at multiples of 16 bytes), else one number. Softmax and sums in float, with
// powers of two. A result depends on its own row, head and length alone: never on the other rows.

#include "softmax.cuh"
#include "packed.cuh"

constexpr int VECTOR = HEAD_SIZE % LANE_WIDTH == 0 ? LANE_WIDTH : 1;  // numbers a lane loads at a time
constexpr int VECTORS = HEAD_SIZE / VECTOR;                           // in a head
// Lanes that share a step.
constexpr int GROUP = VECTORS > 16 ? 32 : VECTORS > 8 ? 16 : VECTORS > 4 ? 8 : VECTORS > 2 ? 4 : VECTORS;
constexpr int GROUPS = 32 / GROUP;                      // steps a warp works on at a time
constexpr int PARTS = (VECTORS + GROUP - 1) / GROUP;    // vectors a lane has of a head
constexpr int OWN = PARTS * VECTOR;                     // numbers a lane has of a head

struct __align__(VECTOR * sizeof(T)) Vector { T value[VECTOR]; };
struct Head { Vector part[PARTS]; };  // what a lane has of one head of one row

__device__ __forceinline__ Head load_head(const T* row, int member, bool wanted) {
    Head head;
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        int vector = p * GROUP + member;
        if (wanted && vector < VECTORS) {
            head.part[p] = *reinterpret_cast<const Vector*>(row + vector * VECTOR);
        } else {
#pragma unroll
            for (int i = 0; i < VECTOR; i++) head.part[p].value[i] = from_float<T>(0.f);
        }
    }
    return head;
}

__device__ __forceinline__ float head_value(const Head& head, int i) {
    return to_float(head.part[i / VECTOR].value[i % VECTOR]);
}

__device__ __forceinline__ void store_head(T* row, int member, const Head& head) {
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        int vector = p * GROUP + member;
        if (vector < VECTORS) *reinterpret_cast<Vector*>(row + vector * VECTOR) = head.part[p];
    }
}

// The new token's own key and value, and where they stay. Null: there is none.
struct Own {
    const T *key, *value;
    T *kept_key, *kept_value;
};

// out[b] = sum over t < count of softmax(query[b] . key(t) / sqrt(d)) value(t), for BEAMS queries at a time, so that a
// key is read once for all of them. key(t) and value(t): pointers to one head of a row, and `own` beside them.
// The past is cut by its length alone: into parts of about a warp's reach, GROUPS * UNROLL steps, at most MOST_PARTS.
// Step t belongs to part t / GROUPS % parts; there group t % GROUPS sums its steps in order, then groups, then parts
// are added in order. Warps take parts in turn, so that their number changes no result.
// Keys and values of the past were written before this step began, queries by the kernel in front: a warp requests
// its first steps before it waits.
template <int UNROLL, int BEAMS, int MOST_PARTS, typename Where>
__device__ __forceinline__ void attend(const T* query, long long query_stride, int beams, Own own, int count,
                                       Where where, Shares<BEAMS, MOST_PARTS>& shares, T* out, long long out_stride) {
    constexpr int REACH = GROUPS * UNROLL;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int member = lane % GROUP, parts = max(1, min(MOST_PARTS, (count + REACH - 1) / REACH));
    if (parts == 1 && warp) return;
    Head keys[UNROLL], values[UNROLL];
    auto fetch = [&](int first) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int step = first + u * parts * GROUPS + lane / GROUP;
            const T *key = nullptr, *value = nullptr;
            if (step < count) where(step, key, value);
            keys[u] = load_head(key, member, step < count);
            values[u] = load_head(value, member, step < count);
        }
    };
    if (warp < parts) fetch(warp * GROUPS);
    wait_for_previous();
    const float scale = LOG2_E * rsqrtf((float)HEAD_SIZE);
    Head q[BEAMS];
    float context[BEAMS][OWN], most[BEAMS], sum[BEAMS];
#pragma unroll
    for (int b = 0; b < BEAMS; b++) q[b] = load_head(query + b * query_stride, member, b < beams && warp < parts);
    for (int part = warp; part < parts; part += warps) {
#pragma unroll
        for (int b = 0; b < BEAMS; b++) {
            most[b] = LOWEST;
            sum[b] = 0;
#pragma unroll
            for (int i = 0; i < OWN; i++) context[b][i] = 0;
        }
        if (own.key && part == 0) {  // the first group begins with the token itself
            bool first = lane < GROUP;
            Head key = load_head(own.key, member, first), value = load_head(own.value, member, first);
            float score = 0;
#pragma unroll
            for (int i = 0; i < OWN; i++) score += head_value(q[0], i) * head_value(key, i);
#pragma unroll
            for (int offset = GROUP / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(FULL_WARP, score, offset);
            if (first) {
                most[0] = score * scale;
                sum[0] = 1;
#pragma unroll
                for (int i = 0; i < OWN; i++) context[0][i] = head_value(value, i);
                store_head(own.kept_key, member, key);
                store_head(own.kept_value, member, value);
            }
        }
        for (int first = part * GROUPS; first < count; first += parts * REACH) {
            if (first != warp * GROUPS) fetch(first);
            float scores[UNROLL][BEAMS];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                bool there = first + u * parts * GROUPS + lane / GROUP < count;
#pragma unroll
                for (int b = 0; b < BEAMS; b++) {
                    scores[u][b] = 0;
#pragma unroll
                    for (int i = 0; i < OWN; i++) scores[u][b] += head_value(q[b], i) * head_value(keys[u], i);
#pragma unroll
                    for (int offset = GROUP / 2; offset > 0; offset /= 2)
                        scores[u][b] += __shfl_xor_sync(FULL_WARP, scores[u][b], offset);
                    scores[u][b] = there ? scores[u][b] * scale : -INFINITE;
                }
            }
#pragma unroll
            for (int b = 0; b < BEAMS; b++) {
                float highest = most[b];
#pragma unroll
                for (int u = 0; u < UNROLL; u++) highest = fmaxf(highest, scores[u][b]);
                float shrink = power_of_two(most[b] - highest);
                most[b] = highest;
                sum[b] *= shrink;
#pragma unroll
                for (int i = 0; i < OWN; i++) context[b][i] *= shrink;
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
                    scores[u][b] = power_of_two(scores[u][b] - highest);  // from now on its share
                    sum[b] += scores[u][b];
                }
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++)
#pragma unroll
                for (int b = 0; b < BEAMS; b++)
#pragma unroll
                    for (int i = 0; i < OWN; i++) context[b][i] += scores[u][b] * head_value(values[u], i);
        }
        // The groups of the warp.
#pragma unroll
        for (int b = 0; b < BEAMS; b++) {
            float highest = most[b];
#pragma unroll
            for (int offset = GROUP; offset < 32; offset *= 2)
                highest = fmaxf(highest, __shfl_xor_sync(FULL_WARP, highest, offset));
            float shrink = power_of_two(most[b] - highest);
            sum[b] *= shrink;
#pragma unroll
            for (int offset = GROUP; offset < 32; offset *= 2) sum[b] += __shfl_xor_sync(FULL_WARP, sum[b], offset);
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                context[b][i] *= shrink;
#pragma unroll
                for (int offset = GROUP; offset < 32; offset *= 2)
                    context[b][i] += __shfl_xor_sync(FULL_WARP, context[b][i], offset);
            }
            if (parts == 1) {
                Head result;
#pragma unroll
                for (int i = 0; i < OWN; i++)
                    result.part[i / VECTOR].value[i % VECTOR] = from_float<T>(count || own.key ? context[b][i] / sum[b]
                                                                                               : 0.f);
                if (b < beams && lane < GROUP) store_head(out + b * out_stride, member, result);
                continue;
            }
            if (lane == 0) {
                shares.most[b][part] = highest;
                shares.sum[b][part] = sum[b];
            }
            if (lane < GROUP) {
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    int column = (i / VECTOR * GROUP + member) * VECTOR + i % VECTOR;
                    if (column < HEAD_SIZE) shares.context[b][part][column] = context[b][i];
                }
            }
        }
    }
    if (parts == 1) return;
    __syncthreads();
    join(shares, beams, parts, out, out_stride);
}

// decode_attention: a new token a row. Its keys and values go to step `length` of its slot, ancestors[slot, length]
// becomes the slot; then out[r] = softmax(q . k[t] / sqrt(d)) v[t], t <= length, k[t] = keys[ancestors[slot, t], t].
//   qkv T [rows, 3 hidden]   rows int32 [rows]   slots Slot [lanes]   ancestors int32 [lanes, steps]
//   keys, values T [lanes, steps, hidden]   out T [rows, hidden], zeros for rows of nobody, which write nothing else
//   grid (heads, rows); block of any number of warps up to 16; static shared memory (16 * d + 32 floats)
//   moves 2 * (length + 3) * hidden numbers a row. No row may read what another writes in the same step: ancestors of
//   steps before `length` lie in lanes that are past that step.
//   Of what kernels that may still run write, it reads qkv alone before they have ended: rows, slots and the past must
//   have been there before the step (the graph) began.
constexpr int DECODE_WARPS = 16;
constexpr int DECODE_UNROLL = OWN * sizeof(T) <= 16 ? 8 : 4;
extern "C" __global__ void __launch_bounds__(32 * DECODE_WARPS)
decode_attention(const T* qkv, const int* rows, const Slot* slots, int* ancestors, T* keys, T* values, T* out,
                 int heads, int steps) {
    __shared__ Shares<1, DECODE_WARPS> shares;
    launch_next();
    int head = blockIdx.x, row = blockIdx.y, hidden = heads * HEAD_SIZE, column = head * HEAD_SIZE;
    int slot = rows[row], length = slots[slot].length, width = slots[slot].width;
    T* result = out + (long long)row * hidden + column;
    if (width == 0) {
        wait_for_previous();
        for (int i = threadIdx.x; i < HEAD_SIZE; i += blockDim.x) result[i] = from_float<T>(0.f);
        return;
    }
    const T* query = qkv + 3ll * row * hidden + column;
    long long place = ((long long)slot * steps + length) * hidden + column;
    int* past = ancestors + (long long)slot * steps;
    auto where = [=](int step, const T*& key, const T*& value) {
        long long place = ((long long)past[step] * steps + step) * hidden + column;
        key = keys + place;
        value = values + place;
    };
    Own own = {query + hidden, query + 2 * hidden, keys + place, values + place};
    attend<DECODE_UNROLL>(query, 0, 1, own, length, where, shares, result, 0);
    if (head == 0 && threadIdx.x == 0) past[length] = slot;
}

// cross_attention: out[r] = softmax(q . k[s] / sqrt(d)) v[s] over the memory_length entries of the sequence's memory.
//   query, out T [rows, hidden]   keys, values T [lanes, steps, hidden]   rows, slots as above
//   grid (heads, rows); block of any number of warps up to 4; static shared memory that of the above.
//   Four beams at a time: the block of every fourth row works for the four that follow it, so a sentence's keys and
//   values are read once for up to four beams (and from L2 beyond). Rows of a sequence stand in the order of beams.
//   moves 2 * memory_length * hidden numbers a sentence and 2 * hidden a row; zeros for rows of nobody
//   Of what kernels that may still run write, it reads `query` alone, as above.
constexpr int BEAMS = 4, CROSS_WARPS = 4;
constexpr int CROSS_UNROLL = OWN * sizeof(T) <= 16 ? 4 : 2;
extern "C" __global__ void __launch_bounds__(32 * CROSS_WARPS, 3)
cross_attention(const T* query, const int* rows, const Slot* slots, const T* keys, const T* values, T* out, int heads,
                int steps) {
    __shared__ Shares<BEAMS, CROSS_WARPS> shares;
    launch_next();
    int row = blockIdx.y, hidden = heads * HEAD_SIZE, column = blockIdx.x * HEAD_SIZE;
    const Slot* slot = slots + rows[row];
    int beam = slot->beam, width = slot->width;
    long long place = (long long)row * hidden + column;
    if (width == 0) {
        wait_for_previous();
        for (int i = threadIdx.x; i < HEAD_SIZE; i += blockDim.x) out[place + i] = from_float<T>(0.f);
        return;
    }
    if (beam % BEAMS) return;
    if (beam) slot = slots + rows[row - beam];
    long long memory = (long long)slot->memory * steps * hidden + column;
    auto where = [=](int step, const T*& key, const T*& value) {
        key = keys + memory + (long long)step * hidden;
        value = values + memory + (long long)step * hidden;
    };
    attend<CROSS_UNROLL>(query + place, hidden, min(BEAMS, width - beam), Own{}, slot->memory_length, where, shares,
                         out + place, hidden);
}

// store: keys[l, lanes[r], steps[r]] and values[...] become the two halves of part l of key_values[r].
//   key_values T [rows, layers * 2 hidden], rows `stride` numbers apart   lanes, steps int32 [rows]
//   keys, values T [layers, lane_count, most_steps, hidden]
//   grid (rows, layers); block 256; moves 4 * rows * layers * hidden numbers
extern "C" __global__ void __launch_bounds__(256)
store(const T* key_values, int stride, const int* lanes, const int* steps, T* keys, T* values, int hidden,
      int most_steps, int lane_count) {
    launch_next();
    wait_for_previous();
    const T* from = key_values + (long long)blockIdx.x * stride + blockIdx.y * 2 * hidden;
    long long lane = (long long)blockIdx.y * lane_count + lanes[blockIdx.x];
    long long place = (lane * most_steps + steps[blockIdx.x]) * hidden;
    size_t address = reinterpret_cast<size_t>(key_values);
    bool aligned = address % 16 == 0 && hidden % LANE_WIDTH == 0 && stride % LANE_WIDTH == 0;
    int wide = aligned ? LANE_WIDTH : 1;
    for (int i = threadIdx.x * wide; i < 2 * hidden; i += blockDim.x * wide) {
        T* to = i < hidden ? keys + place + i : values + place + i - hidden;
        if (wide == 1) *to = from[i];
        else *reinterpret_cast<Pack16*>(to) = *reinterpret_cast<const Pack16*>(from + i);
    }
}

// Packed sequences ----------------------------------------------------------------------------------------------------
// packed_attention: out[r] = softmax(q[r] . k[s] / sqrt(d)) v[s], s over r's sequence, up to r where causal is not 0.
//   qkv T [rows, 3 hidden]   starts int32 [sequences + 1]   out T [rows, hidden]
//   grid (heads, any), best rows / 64 + sequences, or / 128 where paired; block 256; static shared memory 34 KiB
//   Products in float on the ordinary cores, for any head size: fp32, and fp16 before sm_75. Moves 4 * rows * hidden
//   numbers and, for sequences of n rows, reads keys and values n / 64 times from L2.
//   Of what kernels that may still run write, it reads qkv alone, and after they have ended.
constexpr int TILE = 64, LOG2_TILE = 6;
constexpr int SLICE = 32;  // columns of q, k or v in shared memory
constexpr int SLICES = (HEAD_SIZE + SLICE - 1) / SLICE;

__device__ __forceinline__ void load_slice(float (*slice)[SLICE + 4], const T* rows, long long stride, int count,
                                           int column) {
    for (int i = threadIdx.x; i < TILE * SLICE; i += 256) {
        int r = i / SLICE, c = i % SLICE;
        slice[r][c] = r < count && column + c < HEAD_SIZE ? to_float(rows[r * stride + column + c]) : 0.f;
    }
}

typedef float Slice[TILE][SLICE + 4];

// One tile of queries of one head. queries, others (keys, then values), shares: in shared memory.
__device__ __forceinline__ void attend_packed(const T* qkv, Queries own, T* out, int heads, int causal, Slice& queries,
                                              Slice& others, float (&shares)[TILE][TILE + 4]) {
    long long hidden = heads * HEAD_SIZE, stride = 3 * hidden;
    const T* q = qkv + own.first * stride + blockIdx.x * HEAD_SIZE;
    const T *k = q + hidden, *v = k + hidden;
    // A thread has queries y, y + 16, y + 32, y + 48 of the tile, and of each slice of the result columns 2 x, 2 x + 1.
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const float scale = LOG2_E * rsqrtf((float)HEAD_SIZE);
    float context[SLICES][4][2] = {}, most[4], sum[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) most[i] = LOWEST;
    int end = causal ? min(own.length, own.query + TILE) : own.length;
    for (int key = 0; key < end; key += TILE) {
        float scores[4][4] = {};
        for (int column = 0; column < HEAD_SIZE; column += SLICE) {
            __syncthreads();
            load_slice(queries, q + own.query * stride, stride, own.length - own.query, column);
            load_slice(others, k + key * stride, stride, own.length - key, column);
            __syncthreads();
#pragma unroll 2
            for (int c = 0; c < SLICE; c += 4) {
                float4 a[4], b[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    a[i] = *reinterpret_cast<const float4*>(&queries[y + 16 * i][c]);
                    b[i] = *reinterpret_cast<const float4*>(&others[x + 16 * i][c]);
                }
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        scores[i][j] += a[i].x * b[j].x + a[i].y * b[j].y + a[i].z * b[j].z + a[i].w * b[j].w;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int seen = causal ? min(own.length, own.query + y + 16 * i + 1) : own.length;
            float highest = most[i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                scores[i][j] = key + x + 16 * j < seen ? scores[i][j] * scale : -INFINITE;
                highest = fmaxf(highest, scores[i][j]);
            }
#pragma unroll
            for (int offset = 8; offset > 0; offset /= 2)
                highest = fmaxf(highest, __shfl_xor_sync(FULL_WARP, highest, offset));
            float shrink = power_of_two(most[i] - highest);
            most[i] = highest;
            sum[i] *= shrink;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float share = power_of_two(scores[i][j] - highest);
                sum[i] += share;
                shares[y + 16 * i][x + 16 * j] = share;
            }
#pragma unroll
            for (int s = 0; s < SLICES; s++) {
                context[s][i][0] *= shrink;
                context[s][i][1] *= shrink;
            }
        }
#pragma unroll
        for (int s = 0; s < SLICES; s++) {
            __syncthreads();
            load_slice(others, v + key * stride, stride, own.length - key, s * SLICE);
            __syncthreads();
#pragma unroll 4
            for (int j = 0; j < TILE; j += 4) {
                float2 value[4];
#pragma unroll
                for (int n = 0; n < 4; n++) value[n] = *reinterpret_cast<const float2*>(&others[j + n][2 * x]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float4 share = *reinterpret_cast<const float4*>(&shares[y + 16 * i][j]);
                    context[s][i][0] += share.x * value[0].x + share.y * value[1].x +
                                        share.z * value[2].x + share.w * value[3].x;
                    context[s][i][1] += share.x * value[0].y + share.y * value[1].y +
                                        share.z * value[2].y + share.w * value[3].y;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(FULL_WARP, sum[i], offset);
        int row = own.query + y + 16 * i;
        if (row >= own.length) continue;
        T* result = out + (own.first + row) * hidden + blockIdx.x * HEAD_SIZE;
#pragma unroll
        for (int s = 0; s < SLICES; s++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int column = s * SLICE + 2 * x + j;
                if (column < HEAD_SIZE) result[column] = from_float<T>(context[s][i][j] / sum[i]);
            }
    }
}

extern "C" __global__ void __launch_bounds__(256, 2)
packed_attention(const T* qkv, const int* starts, T* out, int sequences, int heads, int causal, int paired) {
    __shared__ __align__(16) Slice queries, others;
    __shared__ __align__(16) float shares[TILE][TILE + 4];
    launch_next();
    for_tiles<LOG2_TILE>(starts, sequences, paired, [&](const Queries& own) {
        attend_packed(qkv, own, out, heads, causal, queries, others, shares);
    });
}

// packed_attention_tensor: packed_attention on the tensor cores (Dao, "FlashAttention-2", 2023): fp16 products, float
// sums; weights of the average are rounded to fp16.
//   arguments and grid as above; block 128, of which a multiprocessor has three at a time, for a fourth would cost
//   spilled registers; static shared memory up to 34 KiB
//   needs fp16, sm_75, d % 8 == 0, d <= 128. A warp has 16 queries; two tiles of keys and values are in shared memory,
//   one being filled while the other is used.
#define ON_TENSOR_CORES (HALF && HEAD_SIZE % 8 == 0 && HEAD_SIZE <= 128)
#if ON_TENSOR_CORES
constexpr int DEEP = (HEAD_SIZE + 15) / 16 * 16;  // columns with those that are filled up with zeros
constexpr int KEYS = DEEP <= 64 ? 64 : 32;        // keys in a tile

// Where a number lies: sixteen bytes each of eight rows are in different banks, by turns within 128 bytes or with room
// between the rows. `further`: that many columns on, whose bits the column at `place` does not have.
constexpr int STRIDE = DEEP % 64 ? DEEP + 8 : DEEP;
__device__ __forceinline__ int place(int row, int column) {
    return row * STRIDE + (DEEP % 64 ? column : column ^ (row & 7) * 8);
}
__device__ __forceinline__ int further(int place, int columns) {
    return DEEP % 64 ? place + columns : place ^ columns;
}

constexpr int ACROSS = DEEP <= 16 ? 2 : DEEP <= 32 ? 4 : DEEP <= 64 ? 8 : 16;  // threads that load a row,
constexpr int DOWN = 128 / ACROSS;                                              // rows at a time

// To the KEYS rows from `begin` on. k: the first key, with its value `hidden` numbers behind it, the next 3 * hidden.
__device__ __forceinline__ void load_tile(T* keys, T* values, int begin, const T* k, int hidden, int count) {
    const int row = threadIdx.x / ACROSS, column = threadIdx.x % ACROSS * 8, to = place(begin + row, column);
    k += row * 3 * hidden + column;
    if (column < DEEP) {
#pragma unroll
        for (int r = 0; r < KEYS; r += DOWN, k += DOWN * 3 * hidden) {
            const int bytes = row + r < count && column < HEAD_SIZE ? 16 : 0;
            copy_async16(keys + to + r * STRIDE, k, bytes);
            copy_async16(values + to + r * STRIDE, k + hidden, bytes);
        }
    }
    copy_async_commit();
}

// One tile of queries of one head. keys, values: in shared memory, rows for two tiles of keys; free: the first row of
// the one that may be written, while other warps still read the last keys of the tile before. A sequence's part of qkv
// has less than 2^31 numbers.
__device__ __forceinline__ void attend_packed_tensor(const T* qkv, const Queries& own, T* out, int heads, int causal,
                                                     T* keys, T* values, int& free) {
    const int hidden = heads * HEAD_SIZE, stride = 3 * hidden;
    const T* q = qkv + (long long)own.first * stride + blockIdx.x * HEAD_SIZE;
    const T* k = q + hidden;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int query = own.query + 16 * warp;  // this warp's first; a thread has rows g and g + 8 of its sixteen
    int end = causal ? min(own.length, own.query + TILE) : own.length;

    load_tile(keys, values, free, k, hidden, own.length);
    unsigned a[DEEP / 16][4];
#pragma unroll
    for (int c = 0; c < DEEP / 16; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = query + g + i % 2 * 8, column = 16 * c + 2 * t + i / 2 * 8;
            bool inside = row < own.length && column < HEAD_SIZE;
            a[c][i] = inside ? *reinterpret_cast<const unsigned*>(q + row * stride + column) : 0;
        }
    const float scale = LOG2_E * rsqrtf((float)HEAD_SIZE);
    float context[DEEP / 8][4] = {};
    Running running;
    for (int first = 0; first < end; first += KEYS, free ^= KEYS) {
        copy_async_wait<0>();
        __syncthreads();  // these keys are there, and nobody reads the last ones any more
        if (first + KEYS < end)
            load_tile(keys, values, free ^ KEYS, k + (first + KEYS) * stride, hidden, own.length - first - KEYS);
        if (query >= own.length || (KEYS < TILE && causal && first >= query + 16)) continue;
        float scores[KEYS / 8][4] = {};
        // ldmatrix: the row that this lane points at.
        int block = lane / 8, line = lane % 8, key = place(free + block / 2 * 8 + line, block % 2 * 8);
#pragma unroll
        for (int c = 0; c < DEEP / 16; c++)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                unsigned b[4];
                ldmatrix_x4(b, keys + further(key, 16 * c) + 8 * n * STRIDE);
                mma16816(scores[n], a[c], {b[0], b[1]});
                mma16816(scores[n + 1], a[c], {b[2], b[3]});
            }
        if (first + TILE >= end)  // before, every row sees all keys
            hide(scores, (causal ? query + g + 1 : own.length) - first - 2 * t, causal ? 8 : 0);
        unsigned shares[KEYS / 16][4];
        running.take(scores, scale, shares, context);
        int value = place(free + block % 2 * 8 + line, block / 2 * 8);
#pragma unroll
        for (int c = 0; c < KEYS / 16; c++)
#pragma unroll
            for (int n = 0; n < DEEP / 8; n += 2) {
                unsigned b[4];
                ldmatrix_x4_transposed(b, values + further(value, 8 * n) + 16 * c * STRIDE);
                mma16816(context[n], shares[c], {b[0], b[1]});
                mma16816(context[n + 1], shares[c], {b[2], b[3]});
            }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = query + g + 8 * half;
        const float factor = 1.f / running.total(half);
        if (row >= own.length) continue;
        T* result = out + (long long)(own.first + row) * hidden + blockIdx.x * HEAD_SIZE;
#pragma unroll
        for (int n = 0; n < DEEP / 8; n++) {
            int column = 8 * n + 2 * t;
            if (column < HEAD_SIZE)
                *reinterpret_cast<unsigned*>(result + column) =
                    two_halves(context[n][2 * half] * factor, context[n][2 * half + 1] * factor);
        }
    }
}
#endif

extern "C" __global__ void __launch_bounds__(128, HEAD_SIZE <= 64 ? 3 : 2)
packed_attention_tensor(const T* qkv, const int* starts, T* out, int sequences, int heads, int causal, int paired) {
#if ON_TENSOR_CORES
    __shared__ __align__(16) T keys[2 * KEYS * STRIDE], values[2 * KEYS * STRIDE];
    launch_next();
    int free = 0;
    for_tiles<LOG2_TILE>(starts, sequences, paired, [&](const Queries& own) {
        attend_packed_tensor(qkv, own, out, heads, causal, keys, values, free);
    });
#else
    __trap();
#endif
}
