// What common.cuh does with inline PTX: the tensor core, ldmatrix, cp.async and clusters, by their definition in the
// PTX manual.
#pragma once

namespace cuda_on_cpu {

struct Mma {
    float* d;
    const unsigned *a, *b;
};
inline void add_product(Fiber** lanes, const float (&a)[16][16], const float (&b)[16][8], int depth) {
    for (int lane = 0; lane < 32; lane++) {
        float* d = ((Mma*)lanes[lane]->data)->d;
        for (int i = 0; i < 4; i++) {
            int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            float sum = 0;
            for (int k = 0; k < depth; k++) sum += a[row][k] * b[k][column];
            d[i] += sum;
        }
    }
}
// What the tensor cores read of a float.
inline float tf32(unsigned x) { return bits<float>(x & 0xffffe000u); }
inline void finish_mma_tf32(Fiber** lanes, unsigned) {
    float a[16][16] = {}, b[16][8] = {};
    for (int lane = 0; lane < 32; lane++) {
        const Mma& own = *(Mma*)lanes[lane]->data;
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = tf32(own.a[i]);
        for (int i = 0; i < 2; i++) b[t + 4 * i][g] = tf32(own.b[i]);
    }
    add_product(lanes, a, b, 8);
}
inline void finish_mma(Fiber** lanes, unsigned) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Mma& own = *(Mma*)lanes[lane]->data;
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 8; i++) {
            __half2 pair = bits<__half2>(own.a[i / 2]);
            a[g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] = __half2float(i % 2 ? pair.y : pair.x);
        }
        for (int i = 0; i < 4; i++) {
            __half2 pair = bits<__half2>(own.b[i / 2]);
            b[2 * t + i % 2 + 8 * (i / 2)][g] = __half2float(i % 2 ? pair.y : pair.x);
        }
    }
    add_product(lanes, a, b, 16);
}

struct LoadMatrix {
    unsigned* to;
    const void* from;
    int count;
    bool transposed;
};
inline void finish_load_matrix(Fiber** lanes, unsigned) {
    for (int lane = 0; lane < 32; lane++) {
        LoadMatrix& own = *(LoadMatrix*)lanes[lane]->data;
        for (int m = 0; m < own.count; m++) {
            auto element = [&](int row, int column) {
                return ((const unsigned short*)((LoadMatrix*)lanes[8 * m + row]->data)->from)[column];
            };
            int g = lane / 4, t = 2 * (lane % 4);
            own.to[m] = own.transposed ? element(t, g) | (unsigned)element(t + 1, g) << 16
                                       : element(g, t) | (unsigned)element(g, t + 1) << 16;
        }
    }
}
inline void load_matrix(unsigned* to, const void* from, int count, bool transposed, const char* file, int line) {
    if ((uintptr_t)from % 16) fail("ldmatrix: a row is not aligned to 16 bytes");
    LoadMatrix data{to, from, count, transposed};
    wait_warp("ldmatrix", {file, line}, ~0u, &data, finish_load_matrix);
}

}  // namespace cuda_on_cpu

// d += a . b: m16n8k16, fp16 in, float sums. a: 16 x 16, b: 16 x 8, d: 16 x 8.
inline void mma16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], CUDA_ON_CPU_HERE) {
    cuda_on_cpu::Mma data{d, a, b};
    cuda_on_cpu::wait_warp("mma16816", {file, line}, ~0u, &data, cuda_on_cpu::finish_mma);
}

// The same for m16n8k8 in TF32.
inline void mma1688(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], CUDA_ON_CPU_HERE) {
    cuda_on_cpu::Mma data{d, a, b};
    cuda_on_cpu::wait_warp("mma1688", {file, line}, ~0u, &data, cuda_on_cpu::finish_mma_tf32);
}

inline uint4 load_weight(const uint4* source) { return *source; }
inline uint4 load_shared(const uint4* source) { return *source; }
inline uint4 load_now(const void* source) { return *(const uint4*)source; }
inline unsigned load_word_now(const void* source) { return *(const unsigned*)source; }

inline void ldmatrix_x4(unsigned (&to)[4], const void* row, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::load_matrix(to, row, 4, false, file, line);
}
inline void ldmatrix_x4_transposed(unsigned (&to)[4], const void* row, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::load_matrix(to, row, 4, true, file, line);
}

inline float power_of_two(float x) {
    float power = exp2f(x);
    return power < 1.17549435e-38f ? 0 : power;
}
// Sixteen bytes to shared memory, zeros after the first `bytes`. Nothing arrives before it is waited for.
inline void copy_async16(void* to, const void* from, int bytes = 16) {
    if ((uintptr_t)to % 16 || (bytes && (uintptr_t)from % 16)) cuda_on_cpu::fail("cp.async: not aligned to 16 bytes");
    memset(to, 0xFF, 16);
    cuda_on_cpu::current->copies.back().push_back({to, from, (size_t)bytes, 16});
}
inline void copy_async_commit() { cuda_on_cpu::current->copies.push_back({}); }
template <int pending> void copy_async_wait() {
    auto& groups = cuda_on_cpu::current->copies;
    while ((int)groups.size() - 1 > pending) {
        for (auto& [to, from, bytes, size] : groups.front()) {
            memset(to, 0, size);
            memcpy(to, from, bytes);
        }
        groups.erase(groups.begin());
    }
}

inline unsigned cluster_rank() { return cuda_on_cpu::current->block->rank; }
inline void cluster_sync(CUDA_ON_CPU_HERE) { cuda_on_cpu::wait_cluster({file, line}); }
inline void cluster_arrive() {}
inline void cluster_wait(CUDA_ON_CPU_HERE) { cuda_on_cpu::wait_cluster({file, line}); }
// The same variable in the shared memory of block `rank` of the cluster.
template <typename X> X* map_shared(X* address, unsigned rank) {
    using namespace cuda_on_cpu;
    for (Variable& one : current->block->variables) {
        ptrdiff_t offset = (const char*)address - one.memory;
        if (offset < 0 || offset > (ptrdiff_t)one.size) continue;
        return (X*)(variable(&cluster[rank], one.key, one.size, one.memory - one.allocated)->memory + offset);
    }
    fail("map_shared: not an address of shared memory");
    return address;
}

// Programmatic dependent launch: kernels run one after another here.
inline void wait_for_previous() {}
inline void launch_next() {}
