// common: what every kernel is built on. Joined in front of each source before it is compiled, because CuPy's cache
// does not see the text of included files. HALF is 1 for fp16 storage, 0 for fp32. Sums are float in either.
#include <cuda_fp16.h>

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

// ops/slots.py SLOT, field by field (a test compares the two): one record a cache lane.
enum Method { NOBODY = 0, SEARCH = 1, FAN_OUT = 2, SAMPLE = 3 };
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
};

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

// A score and its id as one number that is larger for the better choice: the higher score, among equals the lower id.
// -0 equals 0; what is not a number comes last. 0 stands for no choice.
typedef unsigned long long Choice;
__device__ __forceinline__ Choice choice(float score, int id) {
    unsigned bits = __float_as_uint(score + 0.f);
    bits = score != score ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
    return (Choice)bits << 32 | ~(unsigned)id;
}
__device__ __forceinline__ int choice_id(Choice x) { return (int)~(unsigned)x; }
__device__ __forceinline__ float choice_score(Choice x) {
    unsigned bits = (unsigned)(x >> 32);
    return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}
__device__ __forceinline__ Choice better(Choice x, Choice y) { return x > y ? x : y; }
__device__ __forceinline__ Choice warp_best(Choice x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = better(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

__device__ __forceinline__ float gelu(float x) {  // tanh form (Hendrycks and Gimpel 2016)
    return 0.5f * x * (1.f + tanhf(0.7978845608028654f * x * (1.f + 0.044715f * x * x)));
}

enum Activation { NONE = 0, RELU = 1, GELU = 2 };
__device__ __forceinline__ float activate(float x, int activation) {
    return activation == RELU ? fmaxf(x, 0.f) : activation == GELU ? gelu(x) : x;
}

// Inline PTX. tests/cuda_on_cpu/tensor.h defines the same functions for g++.
#ifndef CUDA_ON_CPU

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
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
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

// cluster_sync in two halves: what comes between them does not wait.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// The same variable in the shared memory of block `rank` of the cluster.
template <typename X> __device__ __forceinline__ X* map_shared(X* address, unsigned rank) {
#if __CUDA_ARCH__ >= 900
    X* mapped;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(address), "r"(rank));
    return mapped;
#else
    return address;
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
