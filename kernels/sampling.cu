// sampling: what is done with whole rows of logits: the next token drawn, the best ids, what a target's id is worth.
// One block a row; logits are float [rows, vocabulary], rows `stride` apart, at most 2^18 ids. Nothing depends on the
// order in which threads come: float sums are taken in a fixed order, counts and shares of probability are integers.

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr int MOST_BEST = 32;  // ids that `top` finds

// Reductions over the block; all threads get the result. `scratch` has one place a warp.
template <typename X, typename Combine>
__device__ __forceinline__ X block_reduce(X x, X* scratch, Combine combine) {
    __syncthreads();
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(FULL_WARP, x, offset));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = scratch[threadIdx.x % 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

__device__ __forceinline__ float block_max(float x, float* scratch) {
    return block_reduce(x, scratch, [](float a, float b) { return fmaxf(a, b); });
}
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    return block_reduce(x, scratch, [](float a, float b) { return a + b; });
}
__device__ __forceinline__ Choice block_best(Choice x, Choice* scratch) {
    return block_reduce(x, scratch, [](Choice a, Choice b) { return better(a, b); });
}

__device__ __forceinline__ float highest(const float* logits, int vocabulary) {
    float most = -INFINITE;
#pragma unroll 8
    for (int id = threadIdx.x; id < vocabulary; id += THREADS) most = fmaxf(most, logits[id]);
    return most;
}

__device__ __forceinline__ float log_sum_exp(const float* logits, int vocabulary, float most, float* scratch) {
    float sum = 0;
#pragma unroll 8
    for (int id = threadIdx.x; id < vocabulary; id += THREADS) sum += expf(logits[id] - most);
    return logf(block_sum(sum, scratch)) + most;
}

// finish_logits: logits = scale * logits + bias, in place, after cuBLAS.
//   logits float [rows, vocabulary]   bias T [vocabulary] or null
//   grid (ceil(vocabulary / 1024), rows up to 65535); block 256; moves logits twice
extern "C" __global__ void __launch_bounds__(256)
finish_logits(float* logits, int stride, const T* bias, int rows, int vocabulary, float scale) {
    launch_next();
    wait_for_previous();
    int first = blockIdx.x * 1024 + threadIdx.x;
    for (int row = blockIdx.y; row < rows; row += gridDim.y)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int id = first + i * 256;
            if (id >= vocabulary) break;
            float* logit = logits + (long long)row * stride + id;
            *logit = scale * *logit + (bias ? to_float(bias[id]) : 0.f);
        }
}

struct __align__(4 * (int)sizeof(T)) Bias4 { T value[4]; };

// What is made of a product: scale * logit + bias. bias: T [vocabulary] or null.
struct Finish {
    const T* bias;
    float scale;
    __device__ __forceinline__ float operator()(float logit, int id) const {
        return scale * logit + (bias ? to_float(bias[id]) : 0.f);
    }
};

// Four logits of a row from `id` on, -inf beyond its end; at once where the row begins at a multiple of 16 bytes.
struct Four {
    float4 logits;
    Bias4 bias;
    __device__ __forceinline__ void request(const float* row, int id, int vocabulary, Finish finish) {
        const bool whole = reinterpret_cast<size_t>(row) % 16 == 0 && id + 4 <= vocabulary;
        logits = whole ? *reinterpret_cast<const float4*>(row + id) : make_float4(0.f, 0.f, 0.f, 0.f);
        bias = whole && finish.bias ? *reinterpret_cast<const Bias4*>(finish.bias + id) : Bias4{};
    }
    __device__ __forceinline__ void finished(float (&z)[4], const float* row, int id, int vocabulary, Finish finish) {
        const bool whole = reinterpret_cast<size_t>(row) % 16 == 0 && id + 4 <= vocabulary;
        const float values[4] = {logits.x, logits.y, logits.z, logits.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (whole)
                z[i] = finish.scale * values[i] + (finish.bias ? to_float(bias.value[i]) : 0.f);
            else
                z[i] = id + i < vocabulary ? finish(row[id + i], id + i) : -INFINITE;
    }
};

// Calls take(z, id) for this thread's share of a row, four ids at a time; several fours are requested before the first
// is used.
constexpr int STRIDE = 4 * THREADS;
template <typename Take>
__device__ __forceinline__ void for_row(const float* row, int vocabulary, Finish finish, Take take) {
    constexpr int REQUESTED = 4;
    for (int first = threadIdx.x * 4; first < vocabulary; first += REQUESTED * STRIDE) {
        Four fours[REQUESTED];
#pragma unroll
        for (int n = 0; n < REQUESTED; n++) fours[n].request(row, first + n * STRIDE, vocabulary, finish);
#pragma unroll
        for (int n = 0; n < REQUESTED; n++) {
            const int id = first + n * STRIDE;
            if (id >= vocabulary) break;
            float z[4];
            fours[n].finished(z, row, id, vocabulary, finish);
            take(z, id);
        }
    }
}

// A row to be looked at several times: by reading it each time, or held by all threads' registers.
struct Read {
    const float* row;
    int vocabulary;
    Finish finish;
    template <typename Take> __device__ __forceinline__ void each(Take take) const {
        for_row(row, vocabulary, finish, take);
    }
};
constexpr int HELD = 8;  // fours of a thread
struct Held {
    float z[HELD][4];
    __device__ __forceinline__ static bool fits(int vocabulary) { return vocabulary <= HELD * STRIDE; }
    __device__ __forceinline__ void load(const float* row, int vocabulary, Finish finish) {
        constexpr int REQUESTED = HELD / 2;
#pragma unroll
        for (int first = 0; first < HELD; first += REQUESTED) {
            Four fours[REQUESTED];
#pragma unroll
            for (int n = 0; n < REQUESTED; n++)
                fours[n].request(row, threadIdx.x * 4 + (first + n) * STRIDE, vocabulary, finish);
#pragma unroll
            for (int n = 0; n < REQUESTED; n++)
                fours[n].finished(z[first + n], row, threadIdx.x * 4 + (first + n) * STRIDE, vocabulary, finish);
        }
    }
    template <typename Take> __device__ __forceinline__ void each(Take take) const {
#pragma unroll
        for (int n = 0; n < HELD; n++) take(z[n], threadIdx.x * 4 + n * STRIDE);
    }
};

// The largest of what a thread has seen, and the sum of exp(z - largest).
struct Running {
    float most = -3e38f, sum = 0.f;
    __device__ __forceinline__ static float exponential(float x) { return exp2f(x * 1.4426950408889634f); }
    __device__ __forceinline__ void add(const float (&z)[4]) {
        float largest = fmaxf(fmaxf(most, fmaxf(z[0], z[1])), fmaxf(z[2], z[3]));
        sum = sum * exponential(most - largest) + ((exponential(z[0] - largest) + exponential(z[1] - largest)) +
                                                   (exponential(z[2] - largest) + exponential(z[3] - largest)));
        most = largest;
    }
    // log sum exp over all threads' shares.
    __device__ __forceinline__ float total(float* scratch) const {
        float largest = block_max(most, scratch);
        return logf(block_sum(sum * expf(most - largest), scratch)) + largest;
    }
};

// target_log_probabilities: out[r] = log softmax(z[r])[targets[r]], z = scale * logits + bias.
//   logits float [rows, vocabulary]   bias T [vocabulary] or null   targets int32 [rows]   out float [rows]
//   grid rows; block 1024; moves logits once
extern "C" __global__ void __launch_bounds__(THREADS)
target_log_probabilities(const float* logits, int stride, const T* bias, const int* targets, float* out, int vocabulary,
                         float scale) {
    __shared__ float scratch[32];
    launch_next();
    wait_for_previous();
    const float* own = logits + (long long)blockIdx.x * stride;
    const Finish finish = {bias, scale};
    Running running;
    for_row(own, vocabulary, finish, [&](const float (&z)[4], int) { running.add(z); });
    float normalisation = running.total(scratch);
    int target = targets[blockIdx.x];
    if (threadIdx.x == 0) out[blockIdx.x] = finish(own[target], target) - normalisation;
}

// top: of z = scale * logits + bias the `count` best ids of each row but `banned`, best first, the lower id first among
// equals, and their log-probabilities; the banned id (or -1) counts in the normalisation.
//   logits float [rows, vocabulary]   bias T [vocabulary] or null
//   ids int32, log_probabilities float [rows, count], count <= 32
//   normalisations float [rows] or null: a row's log sum exp, where it is a number, in place of that of z
//   grid rows; block 1024; static shared memory 26 KiB; moves logits once; above 32768 ids reads them again from L2
//   Each thread finds its largest; the count-th of these bounds what can be among the best. What reaches it is few,
//   unless there are many equals: then the best are looked for one by one.
constexpr int MOST_PROMISING = 512;

// The best `count` of each warp's threads, then of these lists: by the first warp, a lane a list.
__device__ __forceinline__ void best_of_threads(Choice mine, int count, Choice (&lists)[WARPS][MOST_BEST],
                                                Choice* found) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int rank = 0; rank < count; rank++) {
        Choice best = warp_best(mine);
        if (lane == 0) lists[warp][rank] = best;
        if (mine == best) mine = 0;
    }
    __syncthreads();
    if (warp == 0) {
        int next = 0;
        for (int rank = 0; rank < count; rank++) {
            Choice held_out = next < count ? lists[lane][next] : 0, best = warp_best(held_out);
            if (held_out == best) next++;
            if (lane == 0) found[rank] = best;
        }
    }
    __syncthreads();
}

template <typename Logits>
__device__ __forceinline__ void find_best(const Logits& row, int* ids, float* log_probabilities, int vocabulary,
                                          int count, int banned, const float* normalisations) {
    __shared__ float scratch[32];
    __shared__ Choice lists[WARPS][MOST_BEST], found[MOST_BEST], promising[MOST_PROMISING], choices[32];
    __shared__ int promising_count;
    Running running;
    float most = -INFINITE;
    row.each([&](const float (&z)[4], int id) {
        running.add(z);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (id + i != banned) most = fmaxf(most, z[i]);
    });
    if (threadIdx.x == 0) promising_count = 0;
    float normalisation = running.total(scratch);
    if (normalisations && normalisations[blockIdx.x] == normalisations[blockIdx.x])
        normalisation = normalisations[blockIdx.x];
    best_of_threads(choice(most, threadIdx.x), count, lists, found);
    const float bound = choice_score(found[count - 1]);
    row.each([&](const float (&z)[4], int id) {
        if (!(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])) >= bound)) return;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!(z[i] >= bound) || id + i >= vocabulary || id + i == banned) continue;
            int place = atomicAdd(&promising_count, 1);
            if (place < MOST_PROMISING) promising[place] = choice(z[i], id + i);
        }
    });
    __syncthreads();
    Choice last = ~0ull;
    if (promising_count <= MOST_PROMISING) {
        if (threadIdx.x < 32)
            for (int rank = 0; rank < count; rank++) {
                Choice mine = 0;
                for (int i = threadIdx.x; i < promising_count; i += 32)
                    if (promising[i] < last) mine = better(mine, promising[i]);
                last = warp_best(mine);
                if (threadIdx.x == 0) found[rank] = last;
            }
    } else {
        for (int rank = 0; rank < count; rank++) {
            Choice mine = 0;
            row.each([&](const float (&z)[4], int id) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    Choice candidate = choice(z[i], id + i);
                    if (candidate < last && id + i < vocabulary && id + i != banned) mine = better(mine, candidate);
                }
            });
            last = block_best(mine, choices);
            if (threadIdx.x == 0) found[rank] = last;
        }
    }
    __syncthreads();
    if (threadIdx.x < count) {
        long long place = (long long)blockIdx.x * count + threadIdx.x;
        Choice own_choice = found[threadIdx.x];
        ids[place] = own_choice ? choice_id(own_choice) : 0;  // no numbers, no choice
        log_probabilities[place] = choice_score(own_choice) - normalisation;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
top(const float* logits, int stride, const T* bias, int* ids, float* log_probabilities, int vocabulary, int count,
    int banned, float scale, const float* normalisations) {
    launch_next();
    wait_for_previous();
    const float* own = logits + (long long)blockIdx.x * stride;
    const Finish finish = {bias, scale};
    if (Held::fits(vocabulary)) {
        Held held;
        held.load(own, vocabulary, finish);
        find_best(held, ids, log_probabilities, vocabulary, count, banned, normalisations);
    } else {
        find_best(Read{own, vocabulary, finish}, ids, log_probabilities, vocabulary, count, banned, normalisations);
    }
}

// Rules ---------------------------------------------------------------------------------------------------------------

// ops/slots.py RULES, field by field.
struct Rules {
    float repetition_penalty;
    int no_repeat, least, forced_end, context, suppressed, suppressed_first, words;
};

// What a row has read and generated. Negative tokens stand for padding.
struct Past {
    const int *context, *generated;
    int read, size;
    __device__ __forceinline__ int operator[](int i) const { return i < read ? context[i] : generated[i - read]; }
    // Whether tokens [first, first + count) are those of a list.
    template <typename List> __device__ __forceinline__ bool has(int first, const List& list, int count) const {
        for (int i = 0; i < count; i++)
            if ((*this)[first + i] != list(i)) return false;
        return true;
    }
};

// Every token of the past counts once: the threads read before any writes, and of later rounds those that are new.
__device__ __forceinline__ void penalise(float* logits, const Past& past, float penalty, float shift) {
    for (int first = 0; first < past.size; first += THREADS) {
        const int i = first + threadIdx.x, token = i < past.size ? past[i] : -1;
        bool fresh = token >= 0;
        for (int j = 0; fresh && j < first; j++) fresh = past[j] != token;
        float score = 0;
        if (fresh) {
            score = logits[token] - shift;
            score = (score < 0 ? score * penalty : score / penalty) + shift;
        }
        __syncthreads();
        if (fresh) logits[token] = score;
        __syncthreads();
    }
}

// apply_rules: changes the logits of rows that have rules, as ops/cpu.py apply_rules.
//   rows int32 [n]   slots Slot, rules Rules [lanes]   listed int32 [lanes, room]
//   contexts, history int32 [lanes, steps]
//   logits float [n, vocabulary], rows `stride` apart   normalisations float [n]
//   grid n; block 1024; static shared memory 128 bytes; of rows that have rules moves logits once, and what they change
extern "C" __global__ void __launch_bounds__(THREADS)
apply_rules(const int* rows, const Slot* slots, const Rules* rules, const int* listed, const int* contexts,
            const int* history, float* logits, int stride, float* normalisations, int vocabulary, int steps, int room) {
    __shared__ float scratch[32];
    launch_next();
    wait_for_previous();
    const int lane = rows[blockIdx.x];
    const Slot slot = slots[lane];
    if (!slot.ruled || slot.done || slot.width <= 0) {
        if (threadIdx.x == 0) normalisations[blockIdx.x] = __int_as_float(0x7fffffff);
        return;
    }
    const long long lead = rows[blockIdx.x - slot.beam];
    const Rules rule = rules[lead];
    const int* list = listed + lead * room;
    const Past past = {contexts + lead * steps, history + (long long)lane * steps, rule.context,
                       rule.context + slot.generated};
    float* own = logits + (long long)blockIdx.x * stride;
    Running running;
    for_row(own, vocabulary, Finish{nullptr, 1.f}, [&](const float (&z)[4], int) { running.add(z); });
    const float normalisation = running.total(scratch);
    if (threadIdx.x == 0) normalisations[blockIdx.x] = normalisation;
    __syncthreads();

    const bool alone = slot.method == SAMPLE || slot.width == 1;  // one row to a choice
    if (rule.repetition_penalty != 1.f) penalise(own, past, rule.repetition_penalty, alone ? 0.f : normalisation);
    const int tail = past.size + 1 - rule.no_repeat;  // where the tokens are that would begin the n-gram again
    for (int i = threadIdx.x; rule.no_repeat > 0 && i < tail; i += THREADS) {
        const int token = past[i + rule.no_repeat - 1];
        if (token >= 0 && past.has(i, [&](int j) { return past[tail + j]; }, rule.no_repeat - 1))
            own[token] = -INFINITE;
    }
    for (int number = threadIdx.x; number < rule.words; number += THREADS) {
        const int* word = list + rule.suppressed + rule.suppressed_first;  // its length, then its ids
        for (int i = 0; i < number; i++) word += 1 + *word;
        const int before = *word - 1;
        if (before <= past.size && past.has(past.size - before, [&](int j) { return word[1 + j]; }, before))
            own[word[1 + before]] = -INFINITE;
    }
    if (threadIdx.x == 0 && slot.generated < rule.least) {
        own[slot.end_id] = -INFINITE;
        for (int i = 0; i < slot.more; i++) own[slots[lane].more_ends[i]] = -INFINITE;
    }
    __syncthreads();
    if (rule.forced_end >= 0 && slot.generated + 1 >= slot.limit)
        for (int id = threadIdx.x; id < vocabulary; id += THREADS)
            own[id] = id == rule.forced_end ? normalisation : -INFINITE;
    __syncthreads();
    const int suppressed = rule.suppressed + (slot.generated == 0 ? rule.suppressed_first : 0);
    for (int i = threadIdx.x; i < suppressed; i += THREADS) own[list[i]] = -INFINITE;
}

// Drawing -------------------------------------------------------------------------------------------------------------

// Philox4x32-10 (Salmon et al., SC 2011), as ops/philox.py: four words for tokens 4 i to 4 i + 3.
__device__ __forceinline__ uint4 philox(uint4 counter, unsigned key0, unsigned key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        unsigned high0 = __umulhi(counter.x, 0xD2511F53u), low0 = counter.x * 0xD2511F53u;
        unsigned high1 = __umulhi(counter.z, 0xCD9E8D57u), low1 = counter.z * 0xCD9E8D57u;
        counter = make_uint4(high1 ^ counter.y ^ key0, low1, high0 ^ counter.w ^ key1, low0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// Standard Gumbel noise of a word. The draw is taken at the end near zero, where float is dense; a word near 2^32
// rounds to exactly 1, and the largest float below it keeps the logarithm finite.
__device__ __forceinline__ float gumbel(unsigned word) {
    float uniform = __fmul_rn(__fadd_rn((float)word, 0.5f), 2.3283064365386963e-10f);
    return -logf(-log1pf(-fminf(uniform, 0.99999994f)));
}

// A row whose token is drawn: its logits divided by the temperature, and what of them is kept: choices from `cut` on.
struct Row {
    const float* logits;
    int vocabulary, banned;
    float temperature;
    Choice cut;

    __device__ __forceinline__ Choice at(int id) const { return choice(logits[id] / temperature, id); }
    __device__ __forceinline__ bool keeps(Choice candidate, int id) const { return candidate >= cut && id != banned; }
};

// Digits of a choice, the leading ones first: 32 bits of the score, then the 18 of the id that tell ids apart.
constexpr int DIGITS = 5;
constexpr int BINS = 2048;
__device__ __forceinline__ int digit_shift(int digit) {
    return digit == 0 ? 53 : digit == 1 ? 42 : digit == 2 ? 32 : digit == 3 ? 9 : 0;
}
__device__ __forceinline__ int digit_bins(int digit) { return digit < 2 ? 2048 : digit == 2 ? 1024 : 512; }
constexpr Choice ALIKE = 0xFFFC0000ull;  // bits above those of an id below 2^18: all set

// A probability as an integer: 45 bits, in two words of a histogram, neither of which can overflow when the sum over
// 2^18 ids is 2^45.
constexpr int LOW_BITS = 14;
struct Histogram {
    unsigned high[BINS], low[BINS];
    unsigned long long warps[WARPS], left;
    int bin;
};

__device__ __forceinline__ unsigned long long in_bin(const Histogram& histogram, int bin) {
    return ((unsigned long long)histogram.high[bin] << LOW_BITS) + histogram.low[bin];
}

// The highest cut from which the weights of what is kept add up to at least `target`, in integers: the smallest prefix
// of the sorted choices that does. weight(score): what a kept id counts. Leaves the cut as it is where all together
// does not reach the target. target: of the sum of all weights.
template <typename Weight, typename Target>
__device__ __forceinline__ void raise_cut(Row& row, Histogram& histogram, Weight weight, Target target) {
    Choice prefix = 0, known = 0;  // the digits of the cut found so far, and which bits they are
    unsigned long long left = 0;   // still to be found, at and below the prefix
    for (int digit = 0; digit < DIGITS; digit++) {
        int shift = digit_shift(digit), bins = digit_bins(digit);
        __syncthreads();
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) histogram.high[bin] = histogram.low[bin] = 0;
        if (threadIdx.x == 0) histogram.bin = -1;
        __syncthreads();
#pragma unroll 4
        for (int id = threadIdx.x; id < row.vocabulary; id += THREADS) {
            Choice candidate = row.at(id);
            if (!row.keeps(candidate, id) || (candidate & known) != prefix) continue;
            unsigned long long counts = weight(choice_score(candidate));
            int bin = (int)(candidate >> shift) & (bins - 1);
            unsigned high = (unsigned)(counts >> LOW_BITS), low = (unsigned)counts & ((1u << LOW_BITS) - 1);
            if (high) atomicAdd(&histogram.high[bin], high);
            if (low) atomicAdd(&histogram.low[bin], low);
        }
        __syncthreads();
        // Thread i has the bins from the top that are 2 i and 2 i + 1; before: the sum of all bins above them.
        int bin = BINS - 1 - 2 * (int)threadIdx.x, lane = threadIdx.x % 32;
        unsigned long long first = in_bin(histogram, bin), second = in_bin(histogram, bin - 1), before = first + second;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            unsigned long long above = __shfl_up_sync(FULL_WARP, before, offset);
            if (lane >= offset) before += above;
        }
        if (lane == 31) histogram.warps[threadIdx.x / 32] = before;
        __syncthreads();
        before -= first + second;
        unsigned long long total = 0;
        for (int warp = 0; warp < WARPS; warp++) {
            if (warp < threadIdx.x / 32) before += histogram.warps[warp];
            total += histogram.warps[warp];
        }
        if (digit == 0) left = target(total);
        if (left > total) return;  // only at the first digit: later ones look into a bin that reaches it
        if (before < left && left <= before + first + second) {
            bool upper = left <= before + first;
            histogram.bin = upper ? bin : bin - 1;
            histogram.left = upper ? left - before : left - before - first;
        }
        __syncthreads();
        if (histogram.bin < 0) return;  // nothing was asked for
        left = histogram.left;
        prefix |= (Choice)histogram.bin << shift;
        known |= (Choice)(bins - 1) << shift;
        if (digit == 2) prefix |= ALIKE, known |= ALIKE;
    }
    row.cut = prefix;
}

// Keeps the best `top_k`, then the smallest prefix of what is left that holds top_p of its probability.
__device__ __forceinline__ void cut(Row& row, const Slot& slot, Histogram& histogram, float* scratch) {
    int candidates = row.vocabulary - (row.banned >= 0 && row.banned < row.vocabulary);
    if (slot.top_k > 0 && slot.top_k < candidates)
        raise_cut(row, histogram, [](float) { return 1ull; },
                  [&](unsigned long long) { return (unsigned long long)slot.top_k; });
    if (slot.top_p >= 1) return;
    float most = -INFINITE, sum = 0;
    for (int id = threadIdx.x; id < row.vocabulary; id += THREADS)
        if (id != row.banned) most = fmaxf(most, row.logits[id] / row.temperature);
    most = block_max(most, scratch);
    for (int id = threadIdx.x; id < row.vocabulary; id += THREADS) {
        Choice candidate = row.at(id);
        if (row.keeps(candidate, id)) sum += expf(choice_score(candidate) - most);
    }
    float scale = 35184372088832.f / block_sum(sum, scratch);  // 2^45
    raise_cut(
        row, histogram, [=](float score) { return (unsigned long long)(expf(score - most) * scale); },
        [&](unsigned long long total) {
            unsigned long long target = (unsigned long long)ceil((double)slot.top_p * (double)total);
            return target ? target : 1ull;  // at least one
        });
}

// The id with the largest score + Gumbel noise of what is kept: a draw from its softmax.
__device__ __forceinline__ int draw(const Row& row, const Slot& slot, int step, Choice* scratch) {
    Choice best = 0;
    for (int four = threadIdx.x; four * 4 < row.vocabulary; four += THREADS) {
        float scores[4];
        bool kept[4], any = false;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int id = four * 4 + i;
            scores[i] = id < row.vocabulary ? row.logits[id] / row.temperature : 0.f;
            kept[i] = id < row.vocabulary && row.keeps(choice(scores[i], id), id);
            any |= kept[i];
        }
        if (!any) continue;
        uint4 words = philox(make_uint4(four, step, slot.stream, 0), (unsigned)slot.seed, (unsigned)(slot.seed >> 32));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned word = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
            if (kept[i]) best = better(best, choice(scores[i] + gumbel(word), four * 4 + i));
        }
    }
    return choice_id(block_best(best, scratch));
}

// Closes the step of a sequence; by the block that comes last. Every row's slot holds its new token already.
__device__ __forceinline__ void advance(const int* group, Slot* slots, int* history, int steps) {
    const volatile Slot* lead = slots + group[0];
    const Slot& text = slots[group[0]];  // what ends it changes in no step
    int width = lead->width, generated = lead->generated;
    bool all = true;
    for (int i = threadIdx.x; i < width; i += 32)
        all = all && ends(text, static_cast<const volatile Slot*>(slots + group[i])->token);
    int done = __all_sync(FULL_WARP, all) || generated + 1 >= lead->limit;
    __syncwarp();
    for (int i = threadIdx.x; i < width; i += 32) {
        volatile Slot* slot = slots + group[i];
        int token = slot->token;
        history[(long long)group[i] * steps + generated] = token;
        slot->finished = ends(text, token);
        // The rest of a burst still runs over a closed sequence: its length stays, inside its lane.
        slot->length = slot->length + !done;
        slot->generated = generated + 1;
        slot->done = done;
    }
}

// sample_step: draws the next token of every row of a sampling sequence, and closes the step of the sequence, as
// ops/cpu.py sample_step.
//   rows int32 [n], those of a sequence in the order of `beam`   slots Slot [lanes]
//   history int32, details float [lanes, steps]
//   logits float [n, vocabulary], vocabulary <= 2^18; banned: an id never drawn, or -1
//   arrivals int32 [n]: zeros, and zeros again afterwards
//   grid n; block 1024; static shared memory 17 KiB; reads logits once, and 2 to 12 times from L2
extern "C" __global__ void __launch_bounds__(THREADS)
sample_step(const int* rows, Slot* slots, int* history, float* details, const float* logits, int stride, int* arrivals,
            int vocabulary, int banned, int steps) {
    __shared__ Histogram histogram;
    __shared__ float scratch[32];
    __shared__ Choice choices[32];
    __shared__ int last;
    launch_next();
    wait_for_previous();
    Slot* slot = slots + rows[blockIdx.x];
    if (slot->method != SAMPLE || slot->width <= 0) return;
    int first = blockIdx.x - slot->beam, width = slot->width;
    const Slot* lead = slots + rows[first];
    if (lead->done) return;
    const Slot before = *slot;
    int generated = lead->generated, token = lead->end_id;
    float penalty = lead->length_penalty;
    if (!before.finished) {
        Row row = {logits + (long long)blockIdx.x * stride, vocabulary, banned, before.temperature, 0};
        cut(row, before, histogram, scratch);
        token = draw(row, before, generated, choices);
        float most = block_max(highest(row.logits, vocabulary), scratch);
        float normalisation = log_sum_exp(row.logits, vocabulary, most, scratch);
        if (threadIdx.x == 0) {
            float norm = penalty >= 0 ? powf((6 + generated) / 6.f, -penalty) : 1.f;
            float chance = row.logits[token] - normalisation, total = before.log_probability + chance;
            if (before.detailed) details[(long long)rows[blockIdx.x] * steps + generated] = chance;
            slot->log_probability = total;
            slot->score = total * norm;
        }
    }
    __syncthreads();  // all have read the records that the last block will change
    if (threadIdx.x == 0) {
        slot->token = token;
        // The block that comes last closes the step: by then all tokens are there.
        __threadfence();
        last = width == 1 || atomicAdd(arrivals + first, 1) == width - 1;
        if (last) {
            arrivals[first] = 0;
            __threadfence();
        }
    }
    __syncthreads();
    if (last && threadIdx.x < 32) advance(rows + first, slots, history, steps);
}
