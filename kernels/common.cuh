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

__device__ __forceinline__ float gelu(float x) {  // tanh form (Hendrycks and Gimpel 2016)
    return 0.5f * x * (1.f + tanhf(0.7978845608028654f * x * (1.f + 0.044715f * x * x)));
}

enum Activation { NONE = 0, RELU = 1, GELU = 2 };
__device__ __forceinline__ float activate(float x, int activation) {
    return activation == RELU ? fmaxf(x, 0.f) : activation == GELU ? gelu(x) : x;
}
