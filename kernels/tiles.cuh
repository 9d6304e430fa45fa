// tiles: what becomes of the logits of a tile of the vocabulary. Only what the search needs leaves the chip: for each
// tile the statistics of the softmax and the best candidates, which kernels/search.cu merges.

constexpr int TILE = 128;
constexpr int LOGIT_STRIDE = TILE + 4;  // floats; the rows that a warp touches at once lie in different banks
constexpr float LOG2_E = 1.4426950408889634f;

struct Wanted {
    const int* rows;
    const Slot* slots;
    float* logits;
    float2* statistics;
    Choice* choices;
    int stride, count, vocabulary, best, banned;
};

// What makes a sum over the inner width an id's logit; of no use beyond the vocabulary.
struct __align__(16) Column { float bias, less, more, by; };

__device__ __forceinline__ Column load_column(const float* columns, const T* bias, int id, int vocabulary) {
    if (id >= vocabulary) return {};
    return {bias ? to_float(bias[id]) : 0.f, columns[id], columns[vocabulary + id],
            WEIGHT_BITS == 8 ? columns[2 * vocabulary + id] : 1.f};
}

// moments: mean and 1 / deviation of the row.
__device__ __forceinline__ float logit(float sum, const float2& moments, const Column& column, float scale) {
    return scale * ((sum - moments.x * column.less) * (moments.y * column.by) + column.more) + column.bias;
}

__device__ __forceinline__ float best_of(const float4& x) { return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)); }

// logits: a row's of one tile in shared memory, -inf beyond the vocabulary; overwritten. Eight lanes take it, each
// four groups of four ids. A lane keeps the best of each group; of the group that loses its best it finds the next in
// shared memory. What is not to be chosen, or was already, is not a number, which no maximum heeds.
// Warps whose rows are all beyond the last do not come here.
__device__ __forceinline__ void summarise(float* logits, int row, int tile, bool there, const Wanted& of) {
    constexpr int NO_ID = 0x7fffffff;
    const float none = __int_as_float(0x7fffffff);
    int member = threadIdx.x % 8, wanted = there ? of.best : 0;
    if (there && of.slots) wanted = min(wanted, of.slots[of.rows[row]].looked_at);
    float4* groups = reinterpret_cast<float4*>(logits) + member;  // eight apart
    float4 values[TILE / 32];
    float best[TILE / 32], most, sum = 0;
#pragma unroll
    for (int i = 0; i < TILE / 32; i++) {
        values[i] = groups[8 * i];
        best[i] = best_of(values[i]);
    }
    most = fmaxf(fmaxf(best[0], best[1]), fmaxf(best[2], best[3]));
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, offset));
#pragma unroll
    for (int i = 0; i < TILE / 32; i++)
        sum += (power_of_two((values[i].x - most) * LOG2_E) + power_of_two((values[i].y - most) * LOG2_E)) +
               (power_of_two((values[i].z - most) * LOG2_E) + power_of_two((values[i].w - most) * LOG2_E));
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, offset);

    int tiles = (of.vocabulary + TILE - 1) / TILE, id = tile * TILE + member * 4;
    long long place = (long long)row * tiles + tile;
    if (there && member == 0) of.statistics[place] = make_float2(most, sum);
    if (tile == tiles - 1 || (of.banned >= 0 && of.banned / TILE == tile)) {
#pragma unroll
        for (int i = 0; i < TILE / 32; i++) {
            float4& four = values[i];
            auto out = [&](int j) { return id + 32 * i + j >= of.vocabulary || id + 32 * i + j == of.banned; };
            four = make_float4(out(0) ? none : four.x, out(1) ? none : four.y, out(2) ? none : four.z,
                               out(3) ? none : four.w);
            best[i] = best_of(four);
            groups[8 * i] = four;
        }
    }
    int group = 0, own = NO_ID;  // of what this lane holds out: where it is, and its id
    float mine = none;
    float4 held;
    auto hold_out = [&]() {
        mine = fmaxf(fmaxf(best[0], best[1]), fmaxf(best[2], best[3]));
        group = mine == best[0] ? 0 : mine == best[1] ? 1 : mine == best[2] ? 2 : 3;
        held = groups[8 * group];
        own = id + 32 * group + (mine == held.x ? 0 : mine == held.y ? 1 : mine == held.z ? 2 : 3);
        if (mine != mine) own = NO_ID;
    };
    hold_out();
    // A warp goes on until the last of its rows has what it wants.
    int rounds = wanted;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) rounds = max(rounds, __shfl_xor_sync(FULL_WARP, rounds, offset));
    Choice* found = of.choices + place * of.best;
    for (int rank = 0; rank < rounds; rank++) {
        float top = mine;
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, offset));
        int winner = mine == top ? own : NO_ID;
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2) winner = min(winner, __shfl_xor_sync(FULL_WARP, winner, offset));
        if (member == 0 && rank < wanted) found[rank] = winner == NO_ID ? 0 : choice(top, winner);
        if (own != winner || winner == NO_ID) continue;
        int which = own % 4;
        if (which == 0) held.x = none;
        if (which == 1) held.y = none;
        if (which == 2) held.z = none;
        if (which == 3) held.w = none;
        groups[8 * group] = held;
#pragma unroll
        for (int i = 0; i < TILE / 32; i++)
            if (i == group) best[i] = best_of(held);
        hold_out();
    }
}

// logits: [span][height][stride] in shared memory, of `tile` and those after it and the rows from first_row on,
// -inf beyond the vocabulary; overwritten. By threads threads, whose barrier is `together`.
template <int span, int height, int threads, int stride = LOGIT_STRIDE, typename Together>
__device__ __forceinline__ void finish_tiles(float* logits, int tile, int first_row, const Wanted& of,
                                             Together together) {
    int tiles = (of.vocabulary + TILE - 1) / TILE;
    if (of.logits) {
#pragma unroll 1  // more would take registers from all that comes before
        for (int i = threadIdx.x; i < span * height * TILE; i += threads) {
            int line = i / TILE, row = first_row + line % height, id = (tile + line / height) * TILE + i % TILE;
            if (row < of.count && id < of.vocabulary)
                of.logits[(long long)row * of.stride + id] = logits[line * stride + i % TILE];
        }
        together();
    }
    if (!of.statistics) return;
    for (int line = threadIdx.x / 8; line < span * height; line += threads / 8) {
        int row = first_row + line % height, first = row - threadIdx.x % 32 / 8;  // of the warp
        if (tile + line / height < tiles && first < of.count)
            summarise(logits + line * stride, row, tile + line / height, row < of.count, of);
    }
}
