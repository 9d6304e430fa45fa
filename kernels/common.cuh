// common: what every kernel is built on. Joined in front of each source before it is compiled, because CuPy's cache
// does not see the text of included files. HALF is 1 for fp16 storage, 0 for fp32. Sums are float in either.
// WEIGHT_BITS is 8 where weights of products are int8 (HALF is 1 then), else not given or as HALF says.
#include <cuda_fp16.h>

#ifndef WEIGHT_BITS
#define WEIGHT_BITS (HALF ? 16 : 32)
#endif

#if HALF
typedef __half T;
#else
typedef float T;
#endif

#define FULL_WARP 0xffffffffu
#define INFINITE __int_as_float(0x7f800000)

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <typename U> __device__ __forceinline__ U from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
#if HALF
__device__ __forceinline__ unsigned two_halves(float x, float y) {
    __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<unsigned*>(&pair);
}
#endif

// ops/slots.py SLOT, field by field (a test compares the two): one record a cache lane.
enum Method { NOBODY = 0, SEARCH = 1, FAN_OUT = 2, SAMPLE = 3, STANDARD = 4 };
struct Slot {
    unsigned long long seed;
    unsigned int stream;
    int method;
    int beam;
    int width;
    int token;
    int length;
    int generated;
    int limit;
    int end_id;
    int finished;
    int done;
    int memory;
    int memory_length;
    int top_k;
    float log_probability;
    float score;
    float length_penalty;
    float diverse_lambda;
    float temperature;
    float top_p;
    int detailed;
    int ruled;
    int counted;
    int stopping;
    int pool_length;
    float pool_score;
    int looked_at;
    int more;
    int more_ends[8];
};

__device__ __forceinline__ bool ends(const Slot& slot, int token) {
    bool found = token == slot.end_id;
    for (int i = 0; i < slot.more; i++) found |= token == slot.more_ends[i];
    return found;
}

// Sixteen bytes at a time, as floats: eight halves or four floats.
#if HALF
#define LANE_WIDTH 8
#else
#define LANE_WIDTH 4
#endif
struct __align__(16) Pack16 { T value[LANE_WIDTH]; };

__device__ __forceinline__ void load16(const T* source, float* values) {
    Pack16 pack = *reinterpret_cast<const Pack16*>(source);
#pragma unroll
    for (int i = 0; i < LANE_WIDTH; i++) values[i] = to_float(pack.value[i]);
}

__device__ __forceinline__ void store16(T* destination, const float* values) {
    Pack16 pack;
#pragma unroll
    for (int i = 0; i < LANE_WIDTH; i++) pack.value[i] = from_float<T>(values[i]);
    *reinterpret_cast<Pack16*>(destination) = pack;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

// A score as a number that is larger for the better one: -0 equals 0, and 0 stands for what is not a number.
__device__ __forceinline__ unsigned ranked(float score) {
    unsigned bits = __float_as_uint(score + 0.f);
    return score != score ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float ranked_score(unsigned x) {
    return __uint_as_float(x >> 31 ? x & 0x7fffffffu : ~x);
}
__device__ __forceinline__ unsigned warp_most(unsigned x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(FULL_WARP, x);
#else
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = max(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
#endif
}

// A score and its id as one number that is larger for the better choice: the higher score, among equals the lower id.
// 0 stands for no choice.
typedef unsigned long long Choice;
__device__ __forceinline__ Choice choice(float score, int id) { return (Choice)ranked(score) << 32 | ~(unsigned)id; }
__device__ __forceinline__ int choice_id(Choice x) { return (int)~(unsigned)x; }
__device__ __forceinline__ float choice_score(Choice x) { return ranked_score((unsigned)(x >> 32)); }
__device__ __forceinline__ Choice better(Choice x, Choice y) { return x > y ? x : y; }
__device__ __forceinline__ Choice warp_best(Choice x) {
    unsigned high = warp_most((unsigned)(x >> 32));
    unsigned low = warp_most(high == (unsigned)(x >> 32) ? (unsigned)x : 0);
    return (Choice)high << 32 | low;
}

__device__ __forceinline__ float gelu(float x) {  // tanh form (Hendrycks and Gimpel 2016)
    return 0.5f * x * (1.f + tanhf(0.7978845608028654f * x * (1.f + 0.044715f * x * x)));
}

__device__ __forceinline__ float gelu_erf(float x) { return 0.5f * x * (1.f + erff(0.7071067811865476f * x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

__host__ __device__ constexpr int up(int x, int y) { return (x + y - 1) / y; }
__host__ __device__ constexpr int least(int x, int y) { return x < y ? x : y; }
__host__ __device__ constexpr int most(int x, int y) { return x > y ? x : y; }

enum Activation { NONE = 0, RELU = 1, GELU = 2, GELU_ERF = 3, SILU = 4 };
__device__ __forceinline__ float activate(float x, int activation) {
    switch (activation) {
        case RELU: return fmaxf(x, 0.f);
        case GELU: return gelu(x);
        case GELU_ERF: return gelu_erf(x);
        case SILU: return silu(x);
        default: return x;
    }
}

// Inline PTX. tests/cuda_on_cpu/tensor.h defines the same functions for g++.
#ifndef CUDA_ON_CPU

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 2 ** x; 0 for what is smaller than a normal number, whose digits would cost three times as many instructions.
__device__ __forceinline__ float power_of_two(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// d += a . b on the tensor cores: a 16 x 16, b 16 x 8, d 16 x 8, fragments as in the PTX manual's mma.m16n8k16.
__device__ __forceinline__ void mma16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 750
#pragma unroll
    for (int i = 0; i < 2; i++)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#else
    __trap();
#endif
}

// The same for a 16 x 8 and b 8 x 8 in TF32, which is a float of which the tensor cores read the upper 19 bits.
__device__ __forceinline__ void mma1688(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}

// Weights are never written: they may be requested before the kernels in front have ended, and pass L1 by. Loads of
// what nobody writes (.nc) are moved by the assembler to where they are used, behind wait_for_previous, if that saves
// registers and no cluster's barrier is between: then they must be loads like any other.
#if defined(SPLIT) && SPLIT == 1
#define UNWRITTEN ""
#else
#define UNWRITTEN ".nc"
#endif
// Where a step has so many weights that some wait in shared memory (AHEAD), those for registers are the first to leave
// L2, which is for what is read again: keys and values, activations, code. Elsewhere that is slower, and no faster with
// the others doing so, too.
__device__ __forceinline__ uint4 load_weight(const uint4* source) {
    uint4 x;
#if defined(AHEAD) && AHEAD > 0 && __CUDA_ARCH__ >= 800
    unsigned long long once;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile("ld.global" UNWRITTEN ".L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(source), "l"(once));
#else
    asm volatile("ld.global" UNWRITTEN ".L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(source));
#endif
    return x;
}

// Sixteen bytes that an earlier kernel wrote; in the order of the program.
__device__ __forceinline__ uint4 load_now(const void* source) {
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(source)
                 : "memory");
    return x;
}

// The same of four bytes.
__device__ __forceinline__ unsigned load_word_now(const void* source) {
    unsigned x;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(x) : "l"(source) : "memory");
    return x;
}

// Eight-by-eight blocks of halves from shared memory: lanes 8 i to 8 i + 7 give the rows of block i.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&to)[4], const void* row) {
#if __CUDA_ARCH__ >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
#else
    __trap();
#endif
}

__device__ __forceinline__ void ldmatrix_x4_transposed(unsigned (&to)[4], const void* row) {
#if __CUDA_ARCH__ >= 750
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory");
#else
    __trap();
#endif
}

// Sixteen bytes of shared memory; in the order of the program.
__device__ __forceinline__ uint4 load_shared(const uint4* source) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(shared_address(source)) : "memory");
    return x;
}

// Sixteen bytes to shared memory, zeros after the first `bytes`; there once its group has been waited for.
__device__ __forceinline__ void copy_async16(void* to, const void* from, int bytes = 16) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
#else
    for (int i = 0; i < 4; i++)
        static_cast<int*>(to)[i] = 4 * i < bytes ? static_cast<const int*>(from)[i] : 0;
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's groups are on their way; other threads' need a barrier as well.
template <int pending> __device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Clusters: one block before sm_90.

// Says that this block has begun, to blocks that cluster_wait: of what it has written, only what it published is there
// for them. (Arriving with all of it costs a fence of all memory, half a microsecond.)
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// Barriers in shared memory that also wait for bytes, sm_90 and later.
typedef unsigned long long Barrier;

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// Barriers that this thread made are there for the copy engine and, after a cluster's barrier, for its other blocks.
__device__ __forceinline__ void publish_barriers() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Arrives, and has the phase wait for that many bytes.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

// Until the phase of that parity is over.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .pred over;\n"
                 "again_%=:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1;\n\t"
                 "@!over bra again_%=;\n}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
#endif
}

// To the same variable of block `rank` of the cluster, whose `barrier` waits for its bytes.
__device__ __forceinline__ void send(unsigned rank, float4* to, const float4& x, Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .b32 there, counted;\n\tmapa.shared::cluster.u32 there, %0, %2;\n\t"
                 "mapa.shared::cluster.u32 counted, %1, %2;\n\t"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3,%4,%5,%6}, [counted];\n}"
                 ::"r"(shared_address(to)), "r"(shared_address(barrier)), "r"(rank), "f"(x.x), "f"(x.y), "f"(x.z),
                 "f"(x.w) : "memory");
#endif
}
__device__ __forceinline__ void send(unsigned rank, float2* to, const float2& x, Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .b32 there, counted;\n\tmapa.shared::cluster.u32 there, %0, %2;\n\t"
                 "mapa.shared::cluster.u32 counted, %1, %2;\n\t"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%3,%4}, [counted];\n}"
                 ::"r"(shared_address(to)), "r"(shared_address(barrier)), "r"(rank), "f"(x.x), "f"(x.y) : "memory");
#endif
}

// Programmatic dependent launch: nothing that an earlier kernel wrote may be read before wait_for_previous.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void launch_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif  // CUDA_ON_CPU

// Products on the tensor cores, of T, sums in float. Weights are the 16-row operand and rows of x the eight columns.
// A chunk is 64 bytes of each row of x (CHUNK numbers), two steps, permuted such that lane (g, t) needs of row g the
// sixteen bytes at 16 t: the first half of them at step 0, the second at step 1. kernels/linear.cu pack_weight puts
// weights into the same order, sixteen bytes a lane and step.
// In float a number is the sum of two that TF32 holds: x = high + low to 2^-24 of x, high rounded to 11 bits. Three of
// the four products are taken; the fourth is below a float's last bit. (Ootomo and Yokota 2022; needs sm_80.)
#define CHUNK (64 / (int)sizeof(T))

#if HALF
struct Left { unsigned value[4]; };
struct Right { unsigned value[2]; };
__device__ __forceinline__ Left left_operand(const uint4& w) { return {{w.x, w.y, w.z, w.w}}; }
__device__ __forceinline__ Right right_operand(unsigned x, unsigned y) { return {{x, y}}; }
__device__ __forceinline__ void multiply_add(float (&d)[4], const Left& a, const Right& b) {
    mma16816(d, a.value, b.value);
}
#define ONE 0x3c003c00u
#else
__device__ __forceinline__ unsigned high_part(unsigned x) { return (x + 0x1000u) & 0xffffe000u; }
__device__ __forceinline__ unsigned low_part(unsigned x, unsigned high) {
    return __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
}
struct Left { unsigned high[4], low[4]; };
struct Right { unsigned high[2], low[2]; };
__device__ __forceinline__ Left left_operand(const uint4& w) {
    const unsigned value[4] = {w.x, w.y, w.z, w.w};
    Left a;
#pragma unroll
    for (int i = 0; i < 4; i++) a.high[i] = high_part(value[i]), a.low[i] = low_part(value[i], a.high[i]);
    return a;
}
__device__ __forceinline__ Right right_operand(unsigned x, unsigned y) {
    const unsigned high[2] = {high_part(x), high_part(y)};
    return {{high[0], high[1]}, {low_part(x, high[0]), low_part(y, high[1])}};
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const Left& a, const Right& b) {
    mma1688(d, a.low, b.high);
    mma1688(d, a.high, b.low);
    mma1688(d, a.high, b.high);
}
#define ONE 0x3f800000u
#endif

// A lane's weights of one chunk and sixteen outputs: sixteen bytes a step or, where they are int8, for both steps. An
// int8 is kept as the number plus 128: next to the byte 0x64 that is the half 1024 + 128 + number, so one subtraction,
// which is exact, makes halves of two. Their scale is the output's, for the sum.
#define WEIGHT_PIECES (WEIGHT_BITS == 8 ? 1 : 2)
struct Weight { uint4 piece[WEIGHT_PIECES]; };

__device__ __forceinline__ void load_chunk(Weight& to, const uint4* source, bool inside) {
    const unsigned zero = WEIGHT_BITS == 8 ? 0x80808080u : 0u;
#pragma unroll
    for (int i = 0; i < WEIGHT_PIECES; i++)
        to.piece[i] = inside ? load_weight(source + 32 * i) : make_uint4(zero, zero, zero, zero);
}

#if WEIGHT_BITS == 8
typedef unsigned char Stored;
__device__ __forceinline__ unsigned two_halves(unsigned bytes, unsigned selector) {
    const unsigned biased = __byte_perm(bytes, 0x64646464u, selector), bias = 0x64806480u;
    const __half2 x =
        __hsub2(*reinterpret_cast<const __half2*>(&biased), *reinterpret_cast<const __half2*>(&bias));
    return *reinterpret_cast<const unsigned*>(&x);
}
__device__ __forceinline__ Left left_operand(const Weight& weight, int step) {
    const uint4& both = weight.piece[0];
    const unsigned x = step ? both.z : both.x, y = step ? both.w : both.y;
    return {{two_halves(x, 0x4140), two_halves(x, 0x4342), two_halves(y, 0x4140), two_halves(y, 0x4342)}};
}
#else
typedef T Stored;
__device__ __forceinline__ Left left_operand(const Weight& weight, int step) {
    return left_operand(weight.piece[step]);
}
#endif

// The two steps of a chunk; `piece` is a lane's sixteen bytes of a row.
__device__ __forceinline__ Right right_operand(const uint4& piece, int step) {
    return step ? right_operand(piece.z, piece.w) : right_operand(piece.x, piece.y);
}

// Adds to moments, for the eight rows of `piece`, what `row_moments` reads: the rows are also the upper half of the
// sixteen-row operand, ones are the lower.
__device__ __forceinline__ void add_moments(float (&moments)[4], const uint4& piece) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
        const unsigned x = step ? piece.z : piece.x, y = step ? piece.w : piece.y;
        multiply_add(moments, left_operand(make_uint4(x, ONE, y, ONE)), right_operand(x, y));
    }
}

// Lane (g, t) with g / 2 == t has row g's: {sum, sum of squares}.
__device__ __forceinline__ float2 row_moments(const float (&moments)[4]) {
    const int g = threadIdx.x % 32 / 4;
    return g % 2 ? make_float2(moments[3], moments[1]) : make_float2(moments[2], moments[0]);  // no index: registers
}
