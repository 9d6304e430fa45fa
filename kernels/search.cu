// search: one step of beam search, for every searching sequence at once. One block a row of the step; the block of a
// sequence's beam 0 works for all its beams. At most MAX_WIDTH of them.

constexpr int MAX_WIDTH = 32;

// Best tokens of all rows of one sequence, best first: token and log-probability by beam and rank.
struct Best {
    int tokens[MAX_WIDTH][MAX_WIDTH];
    float log_probabilities[MAX_WIDTH][MAX_WIDTH];
};

// The record of a sequence, that of its beam 0, with what the beams differ in, as they stand before the step.
struct Sequence {
    Slot record;
    int slots[MAX_WIDTH], finished[MAX_WIDTH];
    float log_probability[MAX_WIDTH], score[MAX_WIDTH];
    float norm;  // ((5 + n) / 6) ** -length_penalty for n tokens; 1 where the penalty is negative
};

struct Offer {
    int token;
    float log_probability, score;
};

// What a beam offers at a rank: its old score once finished, and then only at rank 0.
__device__ __forceinline__ Offer offer(const Sequence& sequence, const Best& best, int beam, int rank) {
    Offer made;
    if (sequence.finished[beam]) {
        made.token = sequence.record.end_id;
        made.log_probability = rank ? -INFINITE : sequence.log_probability[beam];
        made.score = rank ? -INFINITE : sequence.score[beam];
    } else {
        made.token = best.tokens[beam][rank];
        made.log_probability = __fadd_rn(sequence.log_probability[beam], best.log_probabilities[beam][rank]);
        made.score = __fmul_rn(made.log_probability, sequence.norm);
    }
    if (sequence.record.diverse_lambda != 0) {
        // LightSeq tells the beams of its one long sort apart by multiples of -2000, which costs resolution: what it
        // carries on is the rounded score. The intrinsics keep the compiler from fusing it away.
        float apart = beam * -2000.f;
        made.score = __fsub_rn(__fadd_rn(made.score, apart), apart);
        if (!sequence.finished[beam]) made.log_probability = made.score / sequence.norm;
    }
    return made;
}

// The offer that a beam of the next step continues, for every beam; called by the first warp. Offers of one beam only
// get worse with their rank, so each lane holds out the best of one beam that is not taken yet.
__device__ __forceinline__ void choose(const Sequence& sequence, const Best& best, int* parents, int* ranks) {
    int lane = threadIdx.x % 32, width = sequence.record.width, rank = 0;
    auto held_out = [&]() {
        if (lane >= width || rank >= width) return (Choice)0;
        float penalty = __fmul_rn(sequence.record.diverse_lambda, (float)(rank + 1));
        return choice(__fsub_rn(offer(sequence, best, lane, rank).score, penalty), lane * width + rank);
    };
    Choice mine = held_out();
    for (int beam = 0; beam < width; beam++) {
        Choice taken = warp_best(mine);
        if (mine == taken) {
            parents[beam] = lane;
            ranks[beam] = rank++;
            mine = held_out();
        }
    }
}

// Beam b becomes the continuation of beam parents[b]: its past and the tokens that led there, with what they were worth
// where that is kept. A thread permutes one step of all beams, so nothing is overwritten before it has been read.
__device__ __forceinline__ void inherit(const Sequence& sequence, const int* parents, int* ancestors, int* history,
                                        float* details, int steps) {
    int width = sequence.record.width, generated = sequence.record.generated, length = sequence.record.length;
    int texts = generated + length + 1, columns = texts + (sequence.record.detailed ? generated : 0);
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        int* column = i < generated ? history + i : ancestors + i - generated;
        if (i >= texts) column = reinterpret_cast<int*>(details) + i - texts;
        int held[MAX_WIDTH];
#pragma unroll
        for (int b = 0; b < MAX_WIDTH; b++) {
            if (b >= width) break;
            held[b] = column[sequence.slots[parents[b]] * steps];
        }
#pragma unroll
        for (int b = 0; b < MAX_WIDTH; b++) {
            if (b >= width) break;
            if (parents[b] != b) column[sequence.slots[b] * steps] = held[b];
        }
    }
}

// Whether this block has a sequence to advance; then its record and beams are in shared memory after a barrier. What it
// reads no kernel of this step writes: it may be read before the kernel in front has ended.
__device__ __forceinline__ bool begin(const int* rows, const Slot* slots, Sequence& sequence) {
    const int* group = rows + blockIdx.x;
    const Slot* lead = slots + group[0];
    int width = lead->width;
    bool searches = lead->method == SEARCH || lead->method == FAN_OUT;
    if (!searches || lead->beam != 0 || width <= 0 || lead->done) return false;
    if (threadIdx.x < width) {
        const Slot* slot = slots + group[threadIdx.x];
        sequence.slots[threadIdx.x] = group[threadIdx.x];
        sequence.finished[threadIdx.x] = slot->finished;
        sequence.log_probability[threadIdx.x] = slot->log_probability;
        sequence.score[threadIdx.x] = slot->score;
    }
    if (threadIdx.x == blockDim.x - 1) {
        sequence.record = *lead;
        float penalty = lead->length_penalty;
        sequence.norm = penalty >= 0 ? powf((6 + lead->generated) / 6.f, -penalty) : 1.f;
    }
    return true;
}

// The step itself, with what the rows would like best in shared memory.
__device__ __forceinline__ void advance(Sequence& sequence, const Best& best, int* parents, int* ranks, Slot* slots,
                                        int* ancestors, int* history, float* details, int steps) {
    const Slot& record = sequence.record;
    if (threadIdx.x < 32) {
        int beam = threadIdx.x;
        if (record.method == FAN_OUT && record.generated > 0) {
            parents[beam] = beam;
            ranks[beam] = 0;
        } else {
            choose(sequence, best, parents, ranks);
        }
        __syncwarp();
        bool mine = beam < record.width;
        Offer made = {};
        if (mine) made = offer(sequence, best, parents[beam], ranks[beam]);
        int finished = ends(record, made.token);
        bool all = __all_sync(FULL_WARP, !mine || finished);
        int done = all || record.generated + 1 >= record.limit;
        if (mine) {
            Slot* slot = slots + sequence.slots[beam];
            slot->log_probability = made.log_probability;
            slot->score = made.score;
            slot->token = made.token;
            slot->finished = finished;
            // The rest of a burst still runs over a closed sequence: its length stays, inside its lane.
            slot->length += !done;
            slot->generated += 1;
            slot->done = done;
            long long place = (long long)sequence.slots[beam] * steps + record.generated;
            history[place] = made.token;
            if (record.detailed)
                details[place] =
                    sequence.finished[parents[beam]] ? 0 : best.log_probabilities[parents[beam]][ranks[beam]];
        }
    }
    __syncthreads();
    inherit(sequence, parents, ancestors, history, details, steps);
}

// beam_step: advances every searching sequence by one token, as ops/cpu.py beam_step.
//   rows int32 [n]   slots Slot [lanes]   ancestors, history int32, details float [lanes, steps]
//   ids int32, log_probabilities float [n, count], best first, count >= any width of the rows
//   grid n; block 128; static shared memory 9 KiB; moves about width * (2 * width + 4 * length) words a sequence
extern "C" __global__ void __launch_bounds__(128)
beam_step(const int* rows, Slot* slots, int* ancestors, int* history, float* details, const int* ids,
          const float* log_probabilities, int count, int steps) {
    __shared__ Sequence sequence;
    __shared__ Best best;
    __shared__ int parents[MAX_WIDTH], ranks[MAX_WIDTH];
    launch_next();
    const bool searches = begin(rows, slots, sequence);
    wait_for_previous();
    if (!searches) return;
    __syncthreads();
    int width = sequence.record.width;
    for (int i = threadIdx.x; i < width * width; i += blockDim.x) {
        long long place = (long long)(blockIdx.x + i / width) * count + i % width;
        best.tokens[i / width][i % width] = ids[place];
        best.log_probabilities[i / width][i % width] = log_probabilities[place];
    }
    __syncthreads();
    advance(sequence, best, parents, ranks, slots, ancestors, history, details, steps);
}

// Merging what kernels/vocabulary.cu found in each tile of the vocabulary ---------------------------------------------

// The largest logit of some tiles and the sum of exp(logit - it), from those of a lane's tile; {-inf, 0}: it has none.
__device__ __forceinline__ float2 total(const float2& own) {
    const float most = warp_max(own.x);
    return make_float2(most, warp_sum(own.y == 0 ? 0.f : own.y * expf(own.x - most)));
}

// The same from any number of tiles a lane.
__device__ __forceinline__ float2 total(const float2* statistics, int first, int stride, int tiles) {
    float most = -INFINITE, sum = 0;
    for (int tile = first; tile < tiles; tile += stride) most = fmaxf(most, statistics[tile].x);
    most = warp_max(most);
    for (int tile = first; tile < tiles; tile += stride) sum += statistics[tile].y * expf(statistics[tile].x - most);
    return make_float2(most, warp_sum(sum));
}

// The total of some tiles of a row and the `wanted` best of them, best first, from the best of each tile, sorted,
// `count` apart; by one warp, whose first lane has tile `first`, `stride` and so on after it. take(rank, choice, total)
// is called for each. A lane holds out the best of its tiles that is not taken yet; tiles that have one taken offer
// their next.
// All that is needed of a lane's only tile is asked for at once.
constexpr int TOGETHER = 4;
template <typename Take>
__device__ __forceinline__ float2 merge(const float2* statistics, const Choice* choices, int first, int stride,
                                        int tiles, int count, int wanted, Take take) {
    first += threadIdx.x % 32;
    if (tiles <= stride) {
        const Choice* own = choices + (long long)first * count;
        Choice ahead[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) ahead[i] = first < tiles && i < wanted ? own[i] : 0;
        const float2 sum = total(first < tiles ? statistics[first] : make_float2(-INFINITE, 0.f));
        int next = 0;
        for (int rank = 0; rank < wanted; rank++) {
            const Choice mine = ahead[0], taken = warp_best(mine);
            take(rank, taken, sum);
            if (mine != taken || !taken || rank + 1 == wanted) continue;
#pragma unroll
            for (int i = 1; i < TOGETHER; i++) ahead[i - 1] = ahead[i];
            if (++next >= TOGETHER) ahead[0] = own[next];
        }
        return sum;
    }
    const float2 sum = total(statistics, first, stride, tiles);
    Choice mine = 0;
#pragma unroll 4
    for (int tile = first; tile < tiles; tile += stride) mine = better(mine, choices[(long long)tile * count]);
    for (int rank = 0; rank < wanted; rank++) {
        const Choice taken = warp_best(mine);
        take(rank, taken, sum);
        if (mine != taken || !taken || rank + 1 == wanted) continue;
        mine = 0;
        for (int tile = first; tile < tiles; tile += stride) {
            const Choice* offered = choices + (long long)tile * count;
            int i = 0;
            while (i < wanted && offered[i] >= taken) i++;
            if (i < wanted) mine = better(mine, offered[i]);
        }
    }
    return sum;
}

// vocabulary_beam_step: the best tokens of each searching row, as many as its sequence has beams, then beam_step.
//   statistics float2 [n, tiles]   choices Choice [n, tiles, count]   other arguments as of beam_step
//   grid n; block 1024; static shared memory 21 KiB; moves n * tiles * (2 + 2 * count) words and what beam_step moves
//   The warps share the rows of a sequence evenly; those of a row share its tiles, then one merges what they found.
constexpr int MERGING_WARPS = 32;
extern "C" __global__ void __launch_bounds__(32 * MERGING_WARPS)
vocabulary_beam_step(const int* rows, Slot* slots, int* ancestors, int* history, float* details,
                     const float2* statistics, const Choice* choices, int tiles, int count, int steps) {
    __shared__ Sequence sequence;
    __shared__ Best best;
    __shared__ Choice found[MERGING_WARPS][MAX_WIDTH];
    __shared__ float2 totals[MERGING_WARPS];
    __shared__ int parents[MAX_WIDTH], ranks[MAX_WIDTH];
    launch_next();
    const bool searches = begin(rows, slots, sequence);
    __syncthreads();
    // Whose tiles a warp has is known before the kernel in front has ended.
    const int width = searches ? sequence.record.width : 1, share = MERGING_WARPS / width;  // warps of a row
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, beam = warp / share, first = 32 * (warp % share);
    const long long tile = (long long)(blockIdx.x + beam) * tiles;
    wait_for_previous();
    if (!searches) return;
    if (beam < width) {
        auto take = [&](int rank, Choice taken, const float2&) {
            if (lane == 0) found[warp][rank] = taken;
        };
        const float2 own =
            merge(statistics + tile, choices + tile * count, first, 32 * share, tiles, count, width, take);
        if (lane == 0) totals[warp] = own;
    }
    __syncthreads();
    if (warp < width)
        merge(totals + warp * share, found[warp * share], 0, 32, share, MAX_WIDTH, width,
              [&](int rank, Choice taken, const float2& all) {
                  if (lane > 0) return;
                  best.tokens[warp][rank] = taken ? choice_id(taken) : 0;  // no numbers, no choice
                  best.log_probabilities[warp][rank] = choice_score(taken) - (all.x + logf(all.y));
              });
    __syncthreads();
    advance(sequence, best, parents, ranks, slots, ancestors, history, details, steps);
}

// best_of_tiles: the best tokens of each row of a standard search, as many as it looks at, and their log-probabilities.
//   rows int32 [n]   slots Slot [lanes]   statistics float2 [n, tiles]   choices Choice [n, tiles, count]
//   ids int32, log_probabilities float [n, count], count <= MAX_WIDTH
//   grid n; block 1024; static shared memory 9 KiB; moves n * tiles * (2 + 2 * count) words
extern "C" __global__ void __launch_bounds__(32 * MERGING_WARPS)
best_of_tiles(const int* rows, const Slot* slots, const float2* statistics, const Choice* choices, int* ids,
              float* log_probabilities, int tiles, int count) {
    __shared__ Choice found[MERGING_WARPS][MAX_WIDTH];
    __shared__ float2 totals[MERGING_WARPS];
    launch_next();
    const Slot* slot = slots + rows[blockIdx.x];
    const int wanted = least(count, slot->looked_at);
    const bool searches = slot->method == STANDARD && slot->width > 0 && !slot->done;
    wait_for_previous();
    if (!searches) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long row = blockIdx.x;
    auto take = [&](int rank, Choice taken, const float2&) {
        if (lane == 0) found[warp][rank] = taken;
    };
    const float2 own = merge(statistics + row * tiles, choices + row * tiles * count, 32 * warp, 32 * MERGING_WARPS,
                             tiles, count, wanted, take);
    if (lane == 0) totals[warp] = own;
    __syncthreads();
    if (warp > 0) return;
    merge(totals, found[0], 0, 32, MERGING_WARPS, MAX_WIDTH, wanted, [&](int rank, Choice taken, const float2& all) {
        if (lane > 0) return;
        ids[row * count + rank] = taken ? choice_id(taken) : 0;  // no numbers, no choice
        log_probabilities[row * count + rank] = choice_score(taken) - (all.x + logf(all.y));
    });
}

// target_of_tiles: the log-probability of each row's target, of what kernels/warpgroup_scores.cu found.
//   statistics float2 [count, tiles]   kept float [count], the targets' logits   out float [count]
//   grid ceil(count / 8); block 256, a warp a row; moves statistics once
extern "C" __global__ void __launch_bounds__(256)
target_of_tiles(const float2* statistics, const float* kept, float* out, int count, int tiles) {
    launch_next();
    wait_for_previous();
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= count) return;
    const float2 all = total(statistics + (long long)row * tiles, lane, 32, tiles);
    if (lane == 0) out[row] = kept[row] - (all.x + logf(all.y));
}
