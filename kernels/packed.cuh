// packed: which queries of packed sequences a block takes. A tile is 1 << LOG2_TILE queries of one sequence; where
// `paired`, the block that has tile i of n takes tile n - 1 - i as well, the longer one first: all pairs of a causal
// sequence have n + 1 tiles of keys to look at. The host knows only how many rows and sequences there may be, so tiles
// (or pairs) are counted in `starts`, sequence by sequence. A block takes every gridDim.y-th until the sequences are
// over; the last of them may be empty, all at the end.

struct Queries {
    int first, length;  // the sequence: its first row and its rows
    int query;          // the first query of this tile, a row of the sequence; -1: there is no such tile
};

// By a whole warp. `query` is the first of the span of 1 << log2_span queries.
__device__ __forceinline__ Queries find_queries(const int* starts, int sequences, int span, int log2_span) {
    constexpr int EACH = 4;  // sequences of a lane at a time
    const int lane = threadIdx.x % 32, total = starts[sequences];
    for (int begin = 0; begin < sequences; begin += 32 * EACH) {
        int start[EACH + 1], before[EACH + 1];  // spans before each in this round
#pragma unroll
        for (int i = 0; i <= EACH; i++) start[i] = starts[min(sequences, begin + lane * EACH + i)];
        before[0] = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            before[i + 1] = before[i] + ((start[i + 1] - start[i] + (1 << log2_span) - 1) >> log2_span);
        int sum = before[EACH];
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int other = __shfl_up_sync(FULL_WARP, sum, offset);
            if (lane >= offset) sum += other;
        }
        const unsigned beyond = __ballot_sync(FULL_WARP, span < sum);
        if (beyond) {
            const int own = span - (sum - before[EACH]);
            int i = 0;
#pragma unroll
            for (int j = 1; j < EACH; j++) i += before[j] <= own;
            Queries found = {start[0], start[1] - start[0], own << log2_span};
#pragma unroll
            for (int j = 1; j < EACH; j++)
                if (j == i) found = {start[j], start[j + 1] - start[j], (own - before[j]) << log2_span};
            const int lane = __ffs(beyond) - 1;
            return {__shfl_sync(FULL_WARP, found.first, lane), __shfl_sync(FULL_WARP, found.length, lane),
                    __shfl_sync(FULL_WARP, found.query, lane)};
        }
        if (__shfl_sync(FULL_WARP, start[EACH], 31) == total) break;  // the rest is empty
        span -= __shfl_sync(FULL_WARP, sum, 31);
    }
    return {0, 0, -1};
}

// attend(span), by the whole block, for each span of 1 << log2_span queries that is this block's. Sequences are there
// before the kernel in front begins.
template <typename Attend>
__device__ __forceinline__ void for_spans(const int* starts, int sequences, int log2_span, Attend attend) {
    Queries own = find_queries(starts, sequences, blockIdx.y, log2_span);
    wait_for_previous();
    for (int span = blockIdx.y; own.query >= 0; own = find_queries(starts, sequences, span, log2_span)) {
        attend(own);
        span += gridDim.y;
    }
}

// Of a pair of tiles, the first query of the one where that of the other is `query`.
template <int LOG2_TILE> __device__ __forceinline__ int other_tile(const Queries& own, int query) {
    return ((own.length - 1) >> LOG2_TILE << LOG2_TILE) - query;
}

// attend(tile), for each tile of 1 << LOG2_TILE queries that is this block's.
template <int LOG2_TILE, typename Attend>
__device__ __forceinline__ void for_tiles(const int* starts, int sequences, int paired, Attend attend) {
    for_spans(starts, sequences, LOG2_TILE + (paired != 0), [&](Queries own) {
        if (paired) own.query = other_tile<LOG2_TILE>(own, own.query / 2);
        for (int other = 0;; own.query = other) {
            attend(own);
            other = other_tile<LOG2_TILE>(own, own.query);
            if (!paired || other >= own.query) break;
        }
    });
}
