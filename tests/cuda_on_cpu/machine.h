// A CUDA device on one CPU thread, for testing kernels: every CUDA thread is a fiber that runs until it must wait.
//
// Blocks run one after another, the blocks of a cluster together. Shared memory is filled with 0xFF (NaN, -1) before
// a block begins and after it ends. A barrier that not all threads reach, or that they reach at different lines, ends
// the launch with a message that says who waits where. Fibers can be run in ascending order, all warps side by side, or
// in descending order, a warp far ahead of the others: a result that depends on it shows a missing barrier. Not
// modelled: the memory model, bank conflicts, caches, alignment of vector accesses (the undefined-behaviour sanitizer
// has that).
//
// `shared` declarations are rewritten by __init__.py into calls of cuda_on_cpu::shared. Wrappers of inline PTX that
// kernels use (mma, ldmatrix, cp.async, clusters) are defined at the end; common.cuh has the real ones.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __constant__ const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

// Vector types --------------------------------------------------------------------------------------------------------

#define CUDA_ON_CPU_VECTORS(T, name, align1)                                            \
    struct __align__(2 * align1) name##2 { T x, y; };                                   \
    struct name##3 { T x, y, z; };                                                      \
    struct __align__(4 * align1 > 16 ? 16 : 4 * align1) name##4 { T x, y, z, w; };      \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                          \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                  \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(float, float, 4)
CUDA_ON_CPU_VECTORS(int, int, 4)
CUDA_ON_CPU_VECTORS(unsigned, uint, 4)
CUDA_ON_CPU_VECTORS(short, short, 2)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 2)
CUDA_ON_CPU_VECTORS(signed char, char, 1)
CUDA_ON_CPU_VECTORS(unsigned char, uchar, 1)
CUDA_ON_CPU_VECTORS(long long, longlong, 8)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong, 8)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    unsigned count() const { return x * y * z; }
};

namespace cuda_on_cpu {

template <typename To, typename From> To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy((void*)&to, (const void*)&from, sizeof to);
    return to;
}

// Fibers --------------------------------------------------------------------------------------------------------------

const size_t STACK = 256 << 10;

struct Place {
    const char* file;
    int line;
    bool operator==(const Place& other) const { return line == other.line && file == other.file; }
};

enum State { READY, AT_WARP, AT_BLOCK, AT_CLUSTER, AT_BARRIER, EXITED };

struct Multiplication {  // of a warpgroup, as a thread asked for it
    float (*d)[4];
    int tiles;
    unsigned long long a, b;
    bool across, held;      // b's rows are along the sum; a is in registers
    unsigned registers[4];  // what they held
};

struct Block;
struct Fiber {
    State state;
    const char* operation;  // what it waits in
    Place place;
    unsigned mask;    // at a warp's operation: the lanes that take part
    unsigned number;  // at a block's barrier: its id
    void* data;       // in and out of the operation
    Block* block;
    dim3 index;
    int thread, lane;
    char* stack;
    size_t stack_size;
#if defined(__x86_64__)
    void* saved;
#else
    ucontext_t saved;
#endif
    std::vector<std::vector<std::tuple<void*, const void*, size_t, size_t>>> copies;  // cp.async, by group
    std::vector<std::vector<Multiplication>> multiplications;                             // by group
};

struct Variable {
    const void* key;
    char *memory, *allocated;
    size_t size;
};

struct Block {
    dim3 index;
    unsigned rank;  // in its cluster
    std::vector<Fiber*> threads;
    std::vector<Variable> variables;
    unsigned exited = 0, at_cluster = 0;
    unsigned arrived[16] = {};
};

inline Fiber* current;
inline Fiber scheduler;
inline std::vector<Block> cluster;
inline dim3 grid_size, block_size, cluster_size;
inline size_t dynamic_size;
inline std::string fault;
inline void (*body)(void*);
inline void* body_data;

#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch(void** save, void* to);
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
cuda_on_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#endif

inline void change_to(Fiber* to, Fiber* from) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake;
    __sanitizer_start_switch_fiber(&fake, to->stack, to->stack_size);
#endif
#if defined(__x86_64__)
    cuda_on_cpu_switch(&from->saved, to->saved);
#else
    swapcontext(&from->saved, &to->saved);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void yield() { change_to(&scheduler, current); }

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, (const void**)&scheduler.stack, &scheduler.stack_size);
#endif
    body(body_data);
    current->state = EXITED;
    current->block->exited++;
    yield();
    abort();
}

inline void prepare(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(fiber->stack, STACK);  // frames of a fiber that never returned
#endif
#if defined(__x86_64__)
    void** top = (void**)(fiber->stack + STACK);
    *--top = nullptr;  // keeps the stack of `enter` aligned as after a call
    *--top = (void*)enter;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber->saved = top;
#else
    getcontext(&fiber->saved);
    fiber->saved.uc_stack.ss_sp = fiber->stack;
    fiber->saved.uc_stack.ss_size = STACK;
    fiber->saved.uc_link = nullptr;
    makecontext(&fiber->saved, enter, 0);
#endif
}

// Waiting -------------------------------------------------------------------------------------------------------------

inline void fail(const std::string& message) {
    if (fault.empty()) fault = message;
}

inline std::string describe(const Fiber* fiber) {
    char text[400];
    const Block* block = fiber->block;
    int length = snprintf(text, sizeof text, "thread %d of block (%u,%u,%u) ", fiber->thread, block->index.x,
                          block->index.y, block->index.z);
    if (fiber->state == EXITED)
        snprintf(text + length, sizeof text - length, "has exited");
    else
        snprintf(text + length, sizeof text - length, "waits in %s at %s:%d", fiber->operation, fiber->place.file,
                 fiber->place.line);
    return text;
}

// Ends the launch from inside a fiber: the scheduler sees the fault and runs nobody again.
inline void give_up(const std::string& message) {
    fail(message);
    current->state = AT_WARP;
    yield();
}

typedef void (*Finish)(Fiber** lanes, unsigned mask);

inline void wait_warp(const char* operation, Place place, unsigned mask, void* data, Finish finish) {
    Fiber* self = current;
    self->operation = operation, self->place = place, self->mask = mask, self->data = data;
    int first = self->thread - self->lane;
    std::vector<Fiber*>& threads = self->block->threads;
    unsigned lanes = threads.size() - first >= 32 ? ~0u : (1u << (threads.size() - first)) - 1;
    if (!(mask >> self->lane & 1)) return give_up(describe(self) + ", whose mask leaves it out");
    mask &= lanes;
    self->state = AT_WARP;
    Fiber* others[32];
    for (int lane = 0; lane < 32; lane++) {
        others[lane] = mask >> lane & 1 ? threads[first + lane] : nullptr;
        if (!others[lane] || others[lane] == self) continue;
        if (others[lane]->state != AT_WARP || others[lane]->mask != self->mask) return yield();
        if (others[lane]->operation != operation || !(others[lane]->place == place))
            return give_up("divergent: " + describe(others[lane]) + ", but " + describe(self));
    }
    if (finish) finish(others, mask);
    for (int lane = 0; lane < 32; lane++)
        if (others[lane]) others[lane]->state = READY;
}

typedef void (*FinishBlock)(std::vector<Fiber*>& threads);

// Barrier `number` of the block, for `count` of its threads (0: all).
inline void wait_block(const char* operation, Place place, unsigned number, unsigned count, void* data,
                       FinishBlock finish) {
    Fiber* self = current;
    Block* block = self->block;
    self->operation = operation, self->place = place, self->number = number, self->data = data;
    self->state = AT_BLOCK;
    if (!count) count = block->threads.size();
    if (++block->arrived[number] < count) return yield();
    std::vector<Fiber*> here;
    for (Fiber* thread : block->threads)
        if (thread->state == AT_BLOCK && thread->number == number) here.push_back(thread);
    for (Fiber* thread : here)
        if (thread->operation != operation || (number == 0 && !(thread->place == place)))
            return give_up("divergent: " + describe(thread) + ", but " + describe(self));
    block->arrived[number] = 0;
    if (finish) finish(here);
    for (Fiber* thread : here) thread->state = READY;
}

inline void wait_cluster(Place place) {
    Fiber* self = current;
    self->operation = "cluster_sync", self->place = place, self->state = AT_CLUSTER;
    unsigned arrived = 0, threads = 0;
    self->block->at_cluster++;
    for (Block& block : cluster) arrived += block.at_cluster, threads += block.threads.size();
    if (arrived < threads) return yield();
    for (Block& block : cluster) {
        block.at_cluster = 0;
        for (Fiber* thread : block.threads) {
            if (!(thread->place == place)) return give_up("divergent: " + describe(thread) + ", but " + describe(self));
            thread->state = READY;
        }
    }
}

// Shared memory -------------------------------------------------------------------------------------------------------

inline Variable* variable(Block* block, const void* key, size_t size, size_t align) {
    for (Variable& one : block->variables)
        if (one.key == key) return &one;
    // Aligned as declared and no better; its end is the end of an allocation, for the address sanitizer.
    void* allocated = nullptr;
    if (posix_memalign(&allocated, 2048, size + align)) abort();
    memset(allocated, 0xFF, size + align);
    block->variables.push_back({key, (char*)allocated + align, (char*)allocated, size});
    return &block->variables.back();
}

template <typename Type, size_t align, typename Key> Type& shared(Key) {
    static const char key = 0;
    size_t alignment = align > alignof(Type) ? align : alignof(Type);
    return *reinterpret_cast<Type*>(variable(current->block, &key, sizeof(Type), alignment)->memory);
}

inline const char dynamic_key = 0;
template <size_t align> void* dynamic_shared() {
    return variable(current->block, &dynamic_key, dynamic_size, align > 16 ? align : 16)->memory;
}

inline void free_shared(Block& block) {
    for (Variable& one : block.variables) {
        memset(one.memory, 0xFF, one.size);
        free(one.allocated);
    }
    block.variables.clear();
}

// Launching -----------------------------------------------------------------------------------------------------------

// Whether the fiber could run; it has, until it must wait.
inline bool run_one(Fiber* fiber) {
    if (fiber->state != READY || !fault.empty()) return false;
    current = fiber;
    change_to(fiber, &scheduler);
    return true;
}

// Every thread goes one wait further.
inline bool run_side_by_side(Block& block) {
    bool ran = false;
    for (Fiber* fiber : block.threads) ran |= run_one(fiber);
    return ran;
}

// Every warp, the last one first, goes as far as it can without the others.
inline bool run_far_ahead(Block& block) {
    bool ran = false;
    for (size_t end = block.threads.size(), begin; end > 0; end = begin) {
        begin = (end - 1) / 32 * 32;
        for (bool again = true; again; ran |= again) {
            again = false;
            for (size_t i = end; i > begin; i--) again |= run_one(block.threads[i - 1]);
        }
    }
    return ran;
}

inline bool run_some(bool descending) {
    bool ran = false;
    for (size_t i = 0; i < cluster.size(); i++)
        ran |= descending ? run_far_ahead(cluster[cluster.size() - 1 - i]) : run_side_by_side(cluster[i]);
    return ran && fault.empty();
}

inline void run_cluster(bool descending) {
    while (run_some(descending)) {}
    if (!fault.empty()) return;
    std::string waiting, first;
    const Fiber *stuck = nullptr, *other = nullptr;
    for (Block& block : cluster)
        for (Fiber* fiber : block.threads)
            if (fiber->state != EXITED && !stuck) stuck = fiber;
    if (!stuck) return;
    for (Block& block : cluster)
        for (Fiber* fiber : block.threads)
            if (!other && (fiber->state != stuck->state || !(fiber->place == stuck->place))) other = fiber;
    fail("divergent: " + describe(stuck) + (other ? ", but " + describe(other) : " for others"));
}

inline std::vector<Fiber*>& fibers(size_t count) {
    static std::vector<Fiber*> all;
    while (all.size() < count) {
        Fiber* fiber = new Fiber();
        fiber->stack_size = STACK;
        fiber->stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (fiber->stack == MAP_FAILED) abort();
        all.push_back(fiber);
    }
    return all;
}

inline const char* launch(const unsigned* sizes, size_t shared_bytes, int descending, void (*run)(void*), void* data) {
    grid_size = dim3(sizes[0], sizes[1], sizes[2]);
    block_size = dim3(sizes[3], sizes[4], sizes[5]);
    cluster_size = dim3(sizes[6], sizes[7], sizes[8]);
    dynamic_size = shared_bytes, body = run, body_data = data;
    fault.clear();
#if defined(__x86_64__)
    unsigned rounding = _mm_getcsr();
    _mm_setcsr(rounding | 0x8040);  // denormal numbers are zero, as under -ftz=true
#endif
    unsigned threads = block_size.count(), blocks = cluster_size.count();
    std::vector<Fiber*>& all = fibers(threads * blocks);
    unsigned clusters = grid_size.count() / blocks;
    for (unsigned c = 0; c < clusters && fault.empty(); c++) {
        unsigned which = descending ? clusters - 1 - c : c;
        dim3 wide(grid_size.x / cluster_size.x, grid_size.y / cluster_size.y, grid_size.z / cluster_size.z);
        dim3 at(which % wide.x, which / wide.x % wide.y, which / wide.x / wide.y);
        cluster.assign(blocks, Block());
        for (unsigned b = 0; b < blocks; b++) {
            Block& block = cluster[b];
            block.rank = b;
            block.index = dim3(at.x * cluster_size.x + b % cluster_size.x,
                               at.y * cluster_size.y + b / cluster_size.x % cluster_size.y,
                               at.z * cluster_size.z + b / cluster_size.x / cluster_size.y);
            for (unsigned t = 0; t < threads; t++) {
                Fiber* fiber = all[b * threads + t];
                fiber->state = READY, fiber->block = &block, fiber->thread = t, fiber->lane = t % 32;
                fiber->operation = "", fiber->place = {"", 0};
                fiber->index = dim3(t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y);
                fiber->copies.assign(1, {}), fiber->multiplications.assign(1, {});
                prepare(fiber);
                block.threads.push_back(fiber);
            }
        }
        run_cluster(descending);
        for (Block& block : cluster) free_shared(block);
    }
#if defined(__x86_64__)
    _mm_setcsr(rounding);
#endif
    return fault.empty() ? nullptr : fault.c_str();
}

template <typename... A> struct Call {
    void (*kernel)(A...);
    void** arguments;
    template <size_t... i> void run(std::index_sequence<i...>) { kernel(*(std::remove_cv_t<A>*)arguments[i]...); }
    static void begin(void* self) { ((Call*)self)->run(std::index_sequence_for<A...>()); }
};

template <typename... A>
const char* launch(void (*kernel)(A...), const unsigned* sizes, size_t shared_bytes, int descending, void** arguments) {
    Call<A...> call{kernel, arguments};
    return launch(sizes, shared_bytes, descending, Call<A...>::begin, &call);
}

// One letter a parameter and its size: p8 i4 i8 f4.
template <typename... A> const char* signature(void (*)(A...)) {
    static std::string text;
    text.clear();
    ((text += std::is_pointer_v<A> ? "p" : std::is_floating_point_v<A> ? "f" : "i", text += std::to_string(sizeof(A)),
      text += " "), ...);
    return text.c_str();
}

}  // namespace cuda_on_cpu

// The language --------------------------------------------------------------------------------------------------------

#define threadIdx (cuda_on_cpu::current->index)
#define blockIdx (cuda_on_cpu::current->block->index)
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)
#define warpSize 32

#define CUDA_ON_CPU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_HERE) {
    cuda_on_cpu::wait_block("__syncthreads", {file, line}, 0, 0, nullptr, nullptr);
}
inline int cuda_on_cpu_vote(const char* name, int x, cuda_on_cpu::FinishBlock finish, const char* file, int line) {
    cuda_on_cpu::wait_block(name, {file, line}, 0, 0, &x, finish);
    return x;
}
inline int __syncthreads_count(int x, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu_vote("__syncthreads_count", x, [](std::vector<cuda_on_cpu::Fiber*>& threads) {
        int count = 0;
        for (auto* thread : threads) count += *(int*)thread->data != 0;
        for (auto* thread : threads) *(int*)thread->data = count;
    }, file, line);
}
inline int __syncthreads_or(int x, CUDA_ON_CPU_HERE) { return __syncthreads_count(x, file, line) > 0; }
inline int __syncthreads_and(int x, CUDA_ON_CPU_HERE) { return __syncthreads_count(!x, file, line) == 0; }
// bar.sync number, count: for part of a block.
inline void named_barrier(int number, int count, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::wait_block("named_barrier", {file, line}, number, count, nullptr, nullptr);
}
inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::wait_warp("__syncwarp", {file, line}, mask, nullptr, nullptr);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline unsigned __activemask() { return ~0u; }
inline void __nanosleep(unsigned) {}

namespace cuda_on_cpu {
template <typename X> struct Shuffle {
    X value, result;
    int source;
};
template <typename X> X shuffle(const char* name, unsigned mask, X value, int source, const char* file, int line) {
    Shuffle<X> data{value, value, source};
    wait_warp(name, {file, line}, mask, &data, [](Fiber** lanes, unsigned mask) {
        for (int lane = 0; lane < 32; lane++) {
            if (!lanes[lane]) continue;
            auto* own = (Shuffle<X>*)lanes[lane]->data;
            if (own->source < 0) continue;
            if (lanes[own->source]) own->result = ((Shuffle<X>*)lanes[own->source]->data)->value;
            else fail("divergent: " + describe(lanes[lane]) + " and reads a lane outside its mask");
        }
    });
    return data.result;
}
inline int lane() { return current->lane; }
}  // namespace cuda_on_cpu

template <typename X> X __shfl_sync(unsigned mask, X value, int source, int width = 32, CUDA_ON_CPU_HERE) {
    int lane = cuda_on_cpu::lane();
    return cuda_on_cpu::shuffle("__shfl_sync", mask, value, (lane & -width) | (source & (width - 1)), file, line);
}
template <typename X> X __shfl_xor_sync(unsigned mask, X value, int bits, int width = 32, CUDA_ON_CPU_HERE) {
    int lane = cuda_on_cpu::lane(), from = lane ^ bits;
    bool inside = from < (lane & -width) + width;
    return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, inside ? from : -1, file, line);
}
template <typename X> X __shfl_up_sync(unsigned mask, X value, unsigned by, int width = 32, CUDA_ON_CPU_HERE) {
    int lane = cuda_on_cpu::lane(), from = lane - (int)by;
    return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, from >= (lane & -width) ? from : -1, file, line);
}
template <typename X> X __shfl_down_sync(unsigned mask, X value, unsigned by, int width = 32, CUDA_ON_CPU_HERE) {
    int lane = cuda_on_cpu::lane(), from = lane + (int)by;
    bool inside = from < (lane & -width) + width;
    return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, inside ? from : -1, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int x, CUDA_ON_CPU_HERE) {
    unsigned data = x != 0;
    cuda_on_cpu::wait_warp("__ballot_sync", {file, line}, mask, &data, [](cuda_on_cpu::Fiber** lanes, unsigned mask) {
        unsigned result = 0;
        for (int i = 0; i < 32; i++) result |= lanes[i] ? *(unsigned*)lanes[i]->data << i : 0;
        for (int i = 0; i < 32; i++) if (lanes[i]) *(unsigned*)lanes[i]->data = result;
    });
    return data;
}
inline int __any_sync(unsigned mask, int x, CUDA_ON_CPU_HERE) { return __ballot_sync(mask, x, file, line) != 0; }
inline int __all_sync(unsigned mask, int x, CUDA_ON_CPU_HERE) { return __ballot_sync(mask, !x, file, line) == 0; }
template <typename X> unsigned __match_any_sync(unsigned mask, X x, CUDA_ON_CPU_HERE) {
    struct Data { X value; unsigned result; } data{x, 0};
    cuda_on_cpu::wait_warp("__match_any_sync", {file, line}, mask, &data, [](cuda_on_cpu::Fiber** lanes, unsigned) {
        for (int i = 0; i < 32; i++)
            for (int j = 0; lanes[i] && j < 32; j++)
                if (lanes[j] && ((Data*)lanes[i]->data)->value == ((Data*)lanes[j]->data)->value)
                    ((Data*)lanes[i]->data)->result |= 1u << j;
    });
    return data.result;
}
namespace cuda_on_cpu {
template <typename X, typename F> X reduce(const char* name, unsigned mask, X x, F, const char* file, int line) {
    wait_warp(name, {file, line}, mask, &x, [](Fiber** lanes, unsigned) {
        bool first = true;
        X total{};
        for (int i = 0; i < 32; i++)
            if (lanes[i]) total = first ? *(X*)lanes[i]->data : F::combine(total, *(X*)lanes[i]->data), first = false;
        for (int i = 0; i < 32; i++) if (lanes[i]) *(X*)lanes[i]->data = total;
    });
    return x;
}
struct Add { template <typename X> static X combine(X a, X b) { return a + b; } };
struct Min { template <typename X> static X combine(X a, X b) { return a < b ? a : b; } };
struct Max { template <typename X> static X combine(X a, X b) { return a > b ? a : b; } };
}  // namespace cuda_on_cpu
template <typename X> X __reduce_add_sync(unsigned mask, X x, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::reduce("__reduce_add_sync", mask, x, cuda_on_cpu::Add(), file, line);
}
template <typename X> X __reduce_min_sync(unsigned mask, X x, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::reduce("__reduce_min_sync", mask, x, cuda_on_cpu::Min(), file, line);
}
template <typename X> X __reduce_max_sync(unsigned mask, X x, CUDA_ON_CPU_HERE) {
    return cuda_on_cpu::reduce("__reduce_max_sync", mask, x, cuda_on_cpu::Max(), file, line);
}

#define CUDA_ON_CPU_ATOMIC(name, expression)                                                       \
    template <typename X, typename Y> X name(X* address, Y operand) {                              \
        X old = *address, value = (X)operand;                                                      \
        *address = (expression);                                                                   \
        return old;                                                                                \
    }
CUDA_ON_CPU_ATOMIC(atomicAdd, old + value)
CUDA_ON_CPU_ATOMIC(atomicSub, old - value)
CUDA_ON_CPU_ATOMIC(atomicMax, old > value ? old : value)
CUDA_ON_CPU_ATOMIC(atomicMin, old < value ? old : value)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)
CUDA_ON_CPU_ATOMIC(atomicAnd, old& value)
CUDA_ON_CPU_ATOMIC(atomicXor, old ^ value)
CUDA_ON_CPU_ATOMIC(atomicExch, value)
CUDA_ON_CPU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
template <typename X> X atomicCAS(X* address, X compare, X value) {
    X old = *address;
    if (old == compare) *address = value;
    return old;
}

// Functions -----------------------------------------------------------------------------------------------------------

template <typename X> X __ldg(const X* x) { return *x; }
template <typename X> X __ldcg(const X* x) { return *x; }
template <typename X> X __ldca(const X* x) { return *x; }
template <typename X> X __ldcs(const X* x) { return *x; }
template <typename X> X __ldcv(const X* x) { return *x; }
template <typename X> X __ldlu(const X* x) { return *x; }
template <typename X> void __stcg(X* to, X x) { *to = x; }
template <typename X> void __stcs(X* to, X x) { *to = x; }
template <typename X> void __stwt(X* to, X x) { *to = x; }

template <typename X, typename Y> auto min(X x, Y y) -> decltype(x + y) { return x < y ? x : y; }
template <typename X, typename Y> auto max(X x, Y y) -> decltype(x + y) { return x > y ? x : y; }
inline float __int_as_float(int x) { return cuda_on_cpu::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits<float>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits<unsigned>(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.f / sqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
#undef __expf
#define __expf expf
#define __logf logf
#define __log2f log2f
#define __exp10f exp10f
#define __powf powf
#define __sinf sinf
#define __cosf cosf
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
inline int __float2int_rn(float x) { return (int)rintf(x); }
inline int __float2int_rz(float x) { return (int)x; }
inline int __float2int_rd(float x) { return (int)floorf(x); }
inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline float __ull2float_rn(unsigned long long x) { return (float)x; }
inline void __trap() { cuda_on_cpu::fail("trapped"); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((unsigned long long)x * y >> 32); }
inline int __mulhi(int x, int y) { return (int)((long long)x * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}
inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int i = 0; i < 32; i++) result |= (x >> i & 1) << (31 - i);
    return result;
}

#include "cuda_fp16.h"
#include "tensor.h"
#include "hopper.h"
