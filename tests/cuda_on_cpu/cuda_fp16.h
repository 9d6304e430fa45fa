// What kernels get for <cuda_fp16.h> on a CPU: see machine.h.
#pragma once
#include "machine.h"

struct __half {
    _Float16 value;
    __half() = default;
    __half(float x) : value((_Float16)x) {}
    operator float() const { return (float)value; }
};
struct __align__(4) __half2 {
    __half x, y;
};
typedef __half half;
typedef __half2 half2;

inline float __half2float(__half x) { return (float)x.value; }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float2 __half22float2(__half2 x) { return {(float)x.x.value, (float)x.y.value}; }
inline __half2 __float22half2_rn(float2 x) { return {__half(x.x), __half(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float2half2_rn(float x) { return {__half(x), __half(x)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline float __low2float(__half2 x) { return (float)x.x.value; }
inline float __high2float(__half2 x) { return (float)x.y.value; }
inline __half __low2half(__half2 x) { return x.x; }
inline __half __high2half(__half2 x) { return x.y; }
inline unsigned short __half_as_ushort(__half x) { return cuda_on_cpu::bits<unsigned short>(x); }
inline __half __ushort_as_half(unsigned short x) { return cuda_on_cpu::bits<__half>(x); }
inline __half __hadd(__half x, __half y) { return __half((float)x + (float)y); }
inline __half __hsub(__half x, __half y) { return __half((float)x - (float)y); }
inline __half __hmul(__half x, __half y) { return __half((float)x * (float)y); }
inline __half __hfma(__half x, __half y, __half z) { return __half(fmaf((float)x, (float)y, (float)z)); }
inline __half __hmax(__half x, __half y) { return __half(fmaxf((float)x, (float)y)); }
inline __half2 __hadd2(__half2 x, __half2 y) { return {__hadd(x.x, y.x), __hadd(x.y, y.y)}; }
inline __half2 __hsub2(__half2 x, __half2 y) { return {__hsub(x.x, y.x), __hsub(x.y, y.y)}; }
inline __half2 __hmul2(__half2 x, __half2 y) { return {__hmul(x.x, y.x), __hmul(x.y, y.y)}; }
inline __half2 __hfma2(__half2 x, __half2 y, __half2 z) { return {__hfma(x.x, y.x, z.x), __hfma(x.y, y.y, z.y)}; }
