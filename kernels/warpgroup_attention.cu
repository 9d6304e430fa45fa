// warpgroup_attention: packed_attention of attention.cu, for fp16 heads of 64 numbers, by the instructions that Hopper
// alone has. A block is a warpgroup, which has 64 queries at a time. Keys and values lie in shared memory as the copy
// engine brought them; a product reads the columns of values; shares of the average stay where the product in front has
// left them. A result depends on its own row, head and sequence alone.

#include "softmax.cuh"
#include "packed.cuh"
#include "hopper.cuh"

constexpr int TILE = 64, LOG2_TILE = 6;  // queries, and keys and values
constexpr int THREADS = 128;
constexpr int TILE_BYTES = TILE * HEAD_SIZE * 2;
static_assert(HEAD_SIZE == 64, "rows of 128 bytes");

// Two tiles of keys, of which one is used while the other comes, and one of values. They are counted on through all that
// a block attends to. Four such blocks have room on a multiprocessor beside what L1 keeps.
struct Ring {
    char* memory;
    Barrier* there;  // of keys 0 and 1, of values
    const TensorMap* map;

    // By the whole block.
    __device__ __forceinline__ void begin() const {
        if (threadIdx.x == 0) {
            prefetch_map(map);
            for (int i = 0; i < 3; i++) barrier_init(there + i, 1);
            publish_barriers();
        }
        __syncthreads();
    }
    __device__ __forceinline__ char* keys(int number) const { return memory + number % 2 * TILE_BYTES; }
    __device__ __forceinline__ char* values() const { return memory + 2 * TILE_BYTES; }
    // By one thread: a tile from that column and row of qkv. Those beyond the sequence are others'.
    __device__ __forceinline__ void load(char* to, Barrier* there, int column, int row) const {
        barrier_expect(there, TILE_BYTES);
        copy_box(to, map, column, row, there);
    }
    __device__ __forceinline__ void load_keys(int number, int column, int row) const {
        load(keys(number), there + number % 2, column, row);
    }
    __device__ __forceinline__ void load_values(int column, int row) const { load(values(), there + 2, column, row); }
    __device__ __forceinline__ void wait_for_keys(int number) const { block_wait(there + number % 2, number / 2 % 2); }
    // `count` of them are the sequence's. What is behind them must be numbers: their shares are zeros.
    __device__ __forceinline__ void wait_for_values(int number, int count) const {
        block_wait(there + 2, number % 2);
        if (count >= TILE) return;
        uint4* pieces = reinterpret_cast<uint4*>(values());
        for (int i = count * 8 + threadIdx.x; i < TILE * 8; i += THREADS) pieces[i] = make_uint4(0, 0, 0, 0);
        publish_writes();
        __syncthreads();
    }
};

// The queries from `query` on of one head, as a product's left operand; zeros beyond the sequence. q: its first query.
__device__ __forceinline__ void load_queries(unsigned (&a)[HEAD_SIZE / 16][4], const T* q, int stride, int query,
                                             int length) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, first = query + threadIdx.x / 32 * 16 + g;
#pragma unroll
    for (int c = 0; c < HEAD_SIZE / 16; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = first + i % 2 * 8, column = 16 * c + 2 * t + i / 2 * 8;
            a[c][i] = row < length ? *reinterpret_cast<const unsigned*>(q + row * stride + column) : 0;
        }
}

// The queries of one tile or of two, of one head. other: the first query of the second, or -1. number: of tiles that the
// block has had in its ring.
// A sequence's part of qkv has less than 2^31 numbers.
__device__ __forceinline__ void attend(const T* qkv, const Queries& own, int other, T* out, int heads, int causal,
                                       const Ring& ring, int& number) {
    const int hidden = heads * HEAD_SIZE, stride = 3 * hidden, column = blockIdx.x * HEAD_SIZE;
    const T* q = qkv + (long long)own.first * stride + column;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, line = uniform_warp() * 16 + g;
    const float scale = LOG2_E * rsqrtf((float)HEAD_SIZE);
    auto end_of = [&](int query) { return causal ? min(own.length, query + TILE) : own.length; };
    const int first_tiles = up(end_of(own.query), TILE), before = number;
    const int tiles = first_tiles + (other < 0 ? 0 : up(end_of(other), TILE));
    auto row_of = [&](int tile) { return own.first + (tile < first_tiles ? tile : tile - first_tiles) * TILE; };
    auto load_keys = [&](int tile) {
        if (threadIdx.x == 0 && tile < tiles) ring.load_keys(before + tile, hidden + column, row_of(tile));
    };

    load_keys(0);
    unsigned a[HEAD_SIZE / 16][4];
    load_queries(a, q, stride, own.query, own.length);
    int tile = 0;
    for (int query = own.query;; query = other) {
        const int begin = tile, last = begin + up(end_of(query), TILE) - 1;
        float context[HEAD_SIZE / 8][4] = {};
        Running running;
        for (; tile <= last; tile++) {
            const int first = (tile - begin) * TILE;
            __syncthreads();  // nobody reads the last keys and values any more
            load_keys(tile + 1);
            if (threadIdx.x == 0) ring.load_values(2 * hidden + column, own.first + first);
            __syncwarp();
            ring.wait_for_keys(before + tile);
            const auto keys = swizzled_operand(ring.keys(before + tile));
            float scores[TILE / 8][4] = {};
            warpgroup_begin();
#pragma unroll
            for (int c = 0; c < HEAD_SIZE / 16; c++) warpgroup_multiply(scores, a[c], further(keys, c * 32));
            warpgroup_commit();
            warpgroup_wait<0>();
            if (tile == last) {  // before, every row sees all keys
                hide(scores, (causal ? query + line + 1 : own.length) - first - 2 * t, causal ? 8 : 0);
                if (query != other && other >= 0) load_queries(a, q, stride, other, own.length);
            }
            unsigned shares[TILE / 16][4];
            running.take(scores, scale, shares, context);
            ring.wait_for_values(before + tile, own.length - first);
            const auto values = across_operand(ring.values());
            warpgroup_begin();
#pragma unroll
            for (int c = 0; c < TILE / 16; c++)
                warpgroup_multiply_across(context, shares[c], further(values, c * 16 * HEAD_SIZE * 2));
            warpgroup_commit();
            warpgroup_wait<0>();
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = query + line + 8 * half;
            const float factor = 1.f / running.total(half);
            if (row >= own.length) continue;
            T* result = out + (long long)(own.first + row) * hidden + column + 2 * t;
#pragma unroll
            for (int n = 0; n < HEAD_SIZE / 8; n++)
                *reinterpret_cast<unsigned*>(result + 8 * n) =
                    two_halves(context[n][2 * half] * factor, context[n][2 * half + 1] * factor);
        }
        if (query == other || other < 0) break;
    }
    number = before + tiles;
}

// warpgroup_attention: out[r] = softmax(q[r] . k[s] / sqrt(64)) v[s], s over r's sequence, up to r where causal is not 0:
// fp16 products, float sums; shares of the average are rounded to fp16. (Dao, "FlashAttention-2", 2023.)
//   qkv half [rows, 3 hidden]; map: of it, boxes of [64, 64], swizzled by 128 bytes   starts int32 [sequences + 1]
//   out half [rows, hidden]
//   grid (heads, any), best rows / 64 + sequences, or / 128 where paired; block 128; dynamic shared memory
//   3 * TILE_BYTES + 24; moves 4 * rows * hidden numbers and, for sequences of n rows, reads keys and values n / 64
//   times from L2; needs sm_90a. Of what kernels that may still run write, it reads qkv alone, and after they have ended
extern "C" __global__ void __launch_bounds__(THREADS, 4)
warpgroup_attention(const __grid_constant__ TensorMap map, const T* qkv, const int* starts, T* out, int sequences,
                    int heads, int causal, int paired) {
    extern __shared__ __align__(1024) char memory[];
    const Ring ring = {memory, reinterpret_cast<Barrier*>(memory + 3 * TILE_BYTES), &map};
    int number = 0;
    launch_next();
    ring.begin();
    for_spans(starts, sequences, LOG2_TILE + (paired != 0), [&](Queries own) {
        int other = -1;
        if (paired) {
            other = own.query / 2;
            own.query = other_tile<LOG2_TILE>(own, other);
            if (other == own.query) other = -1;  // the tile in the middle
        }
        attend(qkv, own, other, out, heads, causal, ring, number);
    });
}
