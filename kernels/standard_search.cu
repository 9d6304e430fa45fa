// standard_search: one step of the beam search of Hugging Face's generate, for every sequence that has it at once. One
// block a row of the step; the block of a sequence's beam 0 works for all its beams. At most MAX_WIDTH of them, which
// look at the best (1 + end ids) * width offers.

constexpr int MAX_WIDTH = 16;
constexpr int CANDIDATES = 2 * MAX_WIDTH;  // of a beam
constexpr int MOST_OFFERS = (1 + 9) * MAX_WIDTH;  // of all beams, with as many end ids as there may be
enum Stopping { UNTIL_NO_BETTER = 0, UNTIL_FULL = 1, UNTIL_NONE_CAN_BE = 2 };  // as in ops/slots.py

// The record of a sequence, that of its beam 0, with what the beams differ in, as they stand before the step.
struct Sequence {
    Slot record;
    int slots[MAX_WIDTH], pool_length[MAX_WIDTH];
    float log_probability[MAX_WIDTH], pool_score[MAX_WIDTH];
};

// Best tokens of all rows of one sequence, best first, by beam and rank.
struct Best {
    int tokens[MAX_WIDTH][CANDIDATES];
    float log_probabilities[MAX_WIDTH][CANDIDATES];
};

// A candidate: the beam it continues, the token it adds and what that is worth, and the sum of the whole.
struct Offer {
    int parent, token;
    float log_probability, total;
};

// What becomes of the offers: which one each beam continues with, and which one each place of the pool takes, or -1.
struct Outcome {
    Offer offers[MOST_OFFERS];
    int beams[MAX_WIDTH], newcomers[MAX_WIDTH];
};

__device__ __forceinline__ float divisor(int tokens, float length_penalty) {
    return (float)pow((double)tokens, (double)length_penalty);
}

// The best offers of all beams, best first; how many there are. Offers of one beam only get worse with their rank, so
// each lane holds out the best of one beam that is not taken yet.
__device__ __forceinline__ int choose(const Sequence& sequence, const Best& best, int count, Offer* offers) {
    const int lane = threadIdx.x % 32, width = sequence.record.width;
    const int wanted = least((2 + sequence.record.more) * width, width * count);
    int rank = 0;
    float total = 0;
    auto held_out = [&]() {
        if (lane >= width || rank >= count) return (Choice)0;
        total = __fadd_rn(sequence.log_probability[lane], best.log_probabilities[lane][rank]);
        return choice(total, lane * count + rank);
    };
    Choice mine = held_out();
    for (int i = 0; i < wanted; i++) {
        const Choice taken = warp_best(mine);
        if (mine == taken) {
            offers[i] = {lane, best.tokens[lane][rank], best.log_probabilities[lane][rank], total};
            rank++;
            mine = held_out();
        }
    }
    __syncwarp();
    return wanted;
}

// Offers that end go to the pool where they are better than its worst: of equals the first place, and an offer that is
// only as good stays out. A lane has one place. Returns the lowest score in the pool then.
__device__ __forceinline__ float fill_pool(Sequence& sequence, Outcome& outcome, int count, bool last) {
    const Slot& record = sequence.record;
    const int lane = threadIdx.x % 32, width = record.width;
    const float by = divisor(record.counted + record.generated + 1, record.length_penalty);
    float score = lane < width ? sequence.pool_score[lane] : 0;
    int newcomer = -1;
    auto worst = [&]() { return warp_best(lane < width ? choice(-score, lane) : (Choice)0); };
    for (int i = 0; i < least(width, count); i++) {
        const Offer& offer = outcome.offers[i];
        if (!ends(record, offer.token) && !last) continue;
        const Choice place = worst();
        const float offered = offer.total / by;
        if (offered > -choice_score(place) && choice_id(place) == lane) {
            score = offered;
            newcomer = i;
        }
        __syncwarp();
    }
    if (lane < width) {
        sequence.pool_score[lane] = score;
        outcome.newcomers[lane] = newcomer;
        if (newcomer >= 0) sequence.pool_length[lane] = record.generated + 1;
    }
    return -choice_score(worst());
}

// The next beams: the first offers that do not end; those that do come behind them.
__device__ __forceinline__ void go_on(const Sequence& sequence, Outcome& outcome, int count) {
    const int lane = threadIdx.x % 32, width = sequence.record.width;
    const unsigned before = (1u << lane) - 1;
    int filled = 0;
    for (int ending = 0; ending < 2; ending++) {
        for (int first = 0; first < count && filled < width; first += 32) {
            const int i = first + lane;
            const bool fits = i < count && ends(sequence.record, outcome.offers[i].token) == (ending != 0);
            const unsigned fitting = __ballot_sync(FULL_WARP, fits);
            const int place = filled + __popc(fitting & before);
            if (fits && place < width) outcome.beams[place] = i;
            filled += __popc(fitting);
        }
    }
    __syncwarp();
}

// A column of tokens or of their log-probabilities: the pool takes what ended, then the beams change places. A thread
// has all lanes of one step, so nothing is overwritten before it has been read.
__device__ __forceinline__ void inherit(const Sequence& sequence, const Outcome& outcome, int* column, int* pool,
                                        int steps) {
    const int width = sequence.record.width;
    int held[MAX_WIDTH];
#pragma unroll
    for (int b = 0; b < MAX_WIDTH; b++) {
        if (b >= width) break;
        held[b] = column[(long long)sequence.slots[outcome.offers[outcome.beams[b]].parent] * steps];
        if (!pool || outcome.newcomers[b] < 0) continue;
        pool[(long long)sequence.slots[b] * steps] =
            column[(long long)sequence.slots[outcome.offers[outcome.newcomers[b]].parent] * steps];
    }
#pragma unroll
    for (int b = 0; b < MAX_WIDTH; b++) {
        if (b >= width) break;
        column[(long long)sequence.slots[b] * steps] = held[b];
    }
}

// standard_step: advances every sequence of the standard search by one token, as ops/cpu.py standard_step.
//   rows int32 [n]   slots Slot [lanes]   ancestors, history, pool int32, details, pool_details float [lanes, steps]
//   ids int32, log_probabilities float [n, count], best first, count >= min(looked_at, ids that may come) of any row
//   grid n; block 128; static shared memory 7 KiB; moves about width * (4 * width + 4 * length) words a sequence, and
//   the tokens of a hypothesis that enters the pool
extern "C" __global__ void __launch_bounds__(128)
standard_step(const int* rows, Slot* slots, int* ancestors, int* history, float* details, int* pool,
              float* pool_details, const int* ids, const float* log_probabilities, int count, int steps) {
    __shared__ Sequence sequence;
    __shared__ Best best;
    __shared__ Outcome outcome;
    launch_next();
    wait_for_previous();
    const int* group = rows + blockIdx.x;
    const Slot* lead = slots + group[0];
    const int width = lead->width;
    if (lead->method != STANDARD || lead->beam != 0 || width <= 0 || lead->done) return;
    const int looked_at = least(lead->looked_at, count);
    if (threadIdx.x < width) {
        const Slot* slot = slots + group[threadIdx.x];
        sequence.slots[threadIdx.x] = group[threadIdx.x];
        sequence.log_probability[threadIdx.x] = slot->log_probability;
        sequence.pool_score[threadIdx.x] = slot->pool_score;
        sequence.pool_length[threadIdx.x] = slot->pool_length;
    }
    if (threadIdx.x == blockDim.x - 1) sequence.record = *lead;
    for (int i = threadIdx.x; i < width * looked_at; i += blockDim.x) {
        const int beam = i / looked_at, rank = i % looked_at;
        const long long place = (long long)(blockIdx.x + beam) * count + rank;
        best.tokens[beam][rank] = ids[place];
        best.log_probabilities[beam][rank] = log_probabilities[place];
    }
    __syncthreads();
    const Slot& record = sequence.record;
    const int generated = record.generated;
    if (threadIdx.x < 32) {
        const bool last = generated + 1 >= record.limit, mine = threadIdx.x < width;
        const int offered = choose(sequence, best, looked_at, outcome.offers);
        const float worst = fill_pool(sequence, outcome, offered, last);
        go_on(sequence, outcome, offered);
        const bool furthest = record.stopping == UNTIL_NONE_CAN_BE && record.length_penalty > 0;
        const int tokens = record.counted + (furthest ? record.limit : generated + 1);
        const float hope = outcome.offers[outcome.beams[0]].total / divisor(tokens, record.length_penalty);
        const bool full = __all_sync(FULL_WARP, !mine || sequence.pool_length[threadIdx.x % MAX_WIDTH] > 0);
        const int done = last || !(hope > worst) || (full && record.stopping == UNTIL_FULL);
        if (mine) {
            const int lane = sequence.slots[threadIdx.x], newcomer = outcome.newcomers[threadIdx.x];
            const Offer& offer = outcome.offers[outcome.beams[threadIdx.x]];
            const long long place = (long long)lane * steps + generated;
            Slot* slot = slots + lane;
            slot->log_probability = offer.total;
            slot->token = offer.token;
            // The rest of a burst still runs over a closed sequence: its length stays, inside its lane.
            slot->length += !done;
            slot->generated += 1;
            slot->done = done;
            slot->pool_score = sequence.pool_score[threadIdx.x];
            slot->pool_length = sequence.pool_length[threadIdx.x];
            history[place] = offer.token;
            if (record.detailed) details[place] = offer.log_probability;
            if (newcomer >= 0) {
                pool[place] = outcome.offers[newcomer].token;
                if (record.detailed) pool_details[place] = outcome.offers[newcomer].log_probability;
            }
        }
    }
    __syncthreads();
    const int columns = record.length + 1 + (record.detailed ? 2 : 1) * generated;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        if (i < generated) {
            inherit(sequence, outcome, history + i, pool + i, steps);
        } else if (i < generated + record.length + 1) {
            inherit(sequence, outcome, ancestors + i - generated, nullptr, steps);
        } else {
            const int step = i - generated - record.length - 1;
            inherit(sequence, outcome, reinterpret_cast<int*>(details) + step,
                    reinterpret_cast<int*>(pool_details) + step, steps);
        }
    }
}
