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

// LINES lines of logits at a time, of one row and one tile each, in shared memory, -inf beyond the vocabulary;
// overwritten. Eight lanes take a line, each four groups of four ids; that a warp has several hides what its reductions
// wait for. A lane keeps the best of each group; of the group that loses its best it finds the next in shared memory.
// What is not to be chosen, or was already, is not a number, which no maximum heeds.
template <int LINES> struct Lines {
    float4* groups[LINES];  // this lane's, eight apart
    int row[LINES], tile[LINES];
    bool there[LINES];  // where not, nothing is written
};

template <int LINES> __device__ __forceinline__ void summarise(const Lines<LINES>& lines, const Wanted& of) {
    constexpr int NO_ID = 0x7fffffff, GROUPS = TILE / 32;
    const float none = __int_as_float(0x7fffffff);
    const int member = threadIdx.x % 8, tiles = (of.vocabulary + TILE - 1) / TILE;
    int wanted[LINES], rounds = 0;
    float best[LINES][GROUPS], most[LINES], sum[LINES];
#pragma unroll
    for (int l = 0; l < LINES; l++) {
        wanted[l] = lines.there[l] ? of.best : 0;
        if (lines.there[l] && of.slots) wanted[l] = min(wanted[l], of.slots[of.rows[lines.row[l]]].looked_at);
    }
#pragma unroll
    for (int l = 0; l < LINES; l++) {
#pragma unroll
        for (int i = 0; i < GROUPS; i++) best[l][i] = best_of(lines.groups[l][8 * i]);
        most[l] = fmaxf(fmaxf(best[l][0], best[l][1]), fmaxf(best[l][2], best[l][3]));
    }
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2)
#pragma unroll
        for (int l = 0; l < LINES; l++) most[l] = fmaxf(most[l], __shfl_xor_sync(FULL_WARP, most[l], offset));
#pragma unroll
    for (int l = 0; l < LINES; l++) {
        sum[l] = 0;
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            const float4 four = lines.groups[l][8 * i];
            sum[l] += (exp2f((four.x - most[l]) * LOG2_E) + exp2f((four.y - most[l]) * LOG2_E)) +
                      (exp2f((four.z - most[l]) * LOG2_E) + exp2f((four.w - most[l]) * LOG2_E));
        }
    }
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2)
#pragma unroll
        for (int l = 0; l < LINES; l++) sum[l] += __shfl_xor_sync(FULL_WARP, sum[l], offset);
#pragma unroll
    for (int l = 0; l < LINES; l++) {
        const int tile = lines.tile[l], id = tile * TILE + member * 4;
        if (lines.there[l] && member == 0)
            of.statistics[(long long)lines.row[l] * tiles + tile] = make_float2(most[l], sum[l]);
        if (tile != tiles - 1 && (of.banned < 0 || of.banned / TILE != tile)) continue;
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
            float4 four = lines.groups[l][8 * i];
            auto out = [&](int j) { return id + 32 * i + j >= of.vocabulary || id + 32 * i + j == of.banned; };
            four = make_float4(out(0) ? none : four.x, out(1) ? none : four.y, out(2) ? none : four.z,
                               out(3) ? none : four.w);
            best[l][i] = best_of(four);
            lines.groups[l][8 * i] = four;
        }
    }
    int group[LINES], own[LINES];  // of what this lane holds out: where it is, and its id
    float mine[LINES];
    float4 held[LINES];
    auto hold_out = [&](int l) {
        const float(&of_groups)[GROUPS] = best[l];
        mine[l] = fmaxf(fmaxf(of_groups[0], of_groups[1]), fmaxf(of_groups[2], of_groups[3]));
        group[l] = mine[l] == of_groups[0] ? 0 : mine[l] == of_groups[1] ? 1 : mine[l] == of_groups[2] ? 2 : 3;
        held[l] = lines.groups[l][8 * group[l]];
        own[l] = lines.tile[l] * TILE + member * 4 + 32 * group[l] +
                 (mine[l] == held[l].x ? 0 : mine[l] == held[l].y ? 1 : mine[l] == held[l].z ? 2 : 3);
        if (mine[l] != mine[l]) own[l] = NO_ID;
    };
#pragma unroll
    for (int l = 0; l < LINES; l++) {
        hold_out(l);
        rounds = max(rounds, wanted[l]);
    }
    // A warp goes on until the last of its rows has what it wants.
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) rounds = max(rounds, __shfl_xor_sync(FULL_WARP, rounds, offset));
    for (int rank = 0; rank < rounds; rank++) {
        float top[LINES];
        int winner[LINES];
#pragma unroll
        for (int l = 0; l < LINES; l++) top[l] = mine[l];
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2)
#pragma unroll
            for (int l = 0; l < LINES; l++) top[l] = fmaxf(top[l], __shfl_xor_sync(FULL_WARP, top[l], offset));
#pragma unroll
        for (int l = 0; l < LINES; l++) winner[l] = mine[l] == top[l] ? own[l] : NO_ID;
#pragma unroll
        for (int offset = 4; offset > 0; offset /= 2)
#pragma unroll
            for (int l = 0; l < LINES; l++)
                winner[l] = min(winner[l], __shfl_xor_sync(FULL_WARP, winner[l], offset));
#pragma unroll
        for (int l = 0; l < LINES; l++) {
            if (rank >= wanted[l]) continue;
            if (member == 0)
                of.choices[((long long)lines.row[l] * tiles + lines.tile[l]) * of.best + rank] =
                    winner[l] == NO_ID ? 0 : choice(top[l], winner[l]);
            if (own[l] != winner[l] || winner[l] == NO_ID) continue;
            const int which = own[l] % 4;
            if (which == 0) held[l].x = none;
            if (which == 1) held[l].y = none;
            if (which == 2) held[l].z = none;
            if (which == 3) held[l].w = none;
            lines.groups[l][8 * group[l]] = held[l];
#pragma unroll
            for (int i = 0; i < GROUPS; i++)
                if (i == group[l]) best[l][i] = best_of(held[l]);
            hold_out(l);
        }
    }
}

// logits: [span][height][LOGIT_STRIDE] in shared memory, of `tile` and those after it and the rows from first_row on,
// -inf beyond the vocabulary; overwritten. By threads threads, whose barrier is `together`.
template <int span, int height, int threads, typename Together>
__device__ __forceinline__ void finish_tiles(float* logits, int tile, int first_row, const Wanted& of,
                                             Together together) {
    const int tiles = (of.vocabulary + TILE - 1) / TILE;
    if (of.logits) {
#pragma unroll 1  // more would take registers from all that comes before
        for (int i = threadIdx.x; i < span * height * TILE; i += threads) {
            int line = i / TILE, row = first_row + line % height, id = (tile + line / height) * TILE + i % TILE;
            if (row < of.count && id < of.vocabulary)
                of.logits[(long long)row * of.stride + id] = logits[line * LOGIT_STRIDE + i % TILE];
        }
        together();
    }
    if (!of.statistics) return;
    constexpr int AT_ONCE = threads / 8, LINES = span * height >= 2 * AT_ONCE ? 2 : 1;
    for (int first = threadIdx.x / 8; first < span * height; first += LINES * AT_ONCE) {
        Lines<LINES> lines;
        bool any = false;  // of the warp's lines is there
#pragma unroll
        for (int l = 0; l < LINES; l++) {
            const int line = first + l * AT_ONCE, row = first_row + line % height, own = tile + line / height;
            const bool inside = line < span * height && own < tiles;
            float* const at = logits + (inside ? line : first) * LOGIT_STRIDE;
            lines.groups[l] = reinterpret_cast<float4*>(at) + threadIdx.x % 8;
            lines.row[l] = row;
            lines.tile[l] = inside ? own : -1;
            lines.there[l] = inside && row < of.count;
            any = any || (inside && row - (int)threadIdx.x % 32 / 8 < of.count);
        }
        if (any) summarise(lines, of);
    }
}
