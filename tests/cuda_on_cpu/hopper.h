// What kernels do with the inline PTX of Hopper alone: barriers in shared memory, copies that end at one, tensor maps and
// products of a warpgroup, by their definition in the PTX manual. Nothing that is asked for happens before it is waited
// for; until then the memory a copy goes to holds 0xFF.
#pragma once
#include <map>

// A matrix of halves and the box of it that a copy takes; on a GPU, 128 bytes that the driver makes.
struct TensorMap {
    const __half* address;
    unsigned long long columns, rows, stride;  // numbers
    unsigned box_columns, box_rows;
    char unused[88];
};
typedef unsigned long long Barrier;

namespace cuda_on_cpu {

struct Copy {
    char* to;
    size_t bytes;
    TensorMap map;  // of a box
    const char* from;  // of a bulk copy, else null
    int column, row;
};
// The state behind each Barrier; its place in shared memory is only a name.
struct Phase {
    int arrivals, pending, parity = 0;
    long long bytes = 0;
    std::vector<Copy> copies;
    std::vector<Fiber*> waiting;
};
inline std::map<const Barrier*, Phase> barriers;

inline void land(const Copy& copy) {
    if (copy.from) {
        memcpy(copy.to, copy.from, copy.bytes);
        return;
    }
    const TensorMap& map = copy.map;
    for (unsigned row = 0; row < map.box_rows; row++)
        for (unsigned column = 0; column < map.box_columns; column++) {
            unsigned long long from_row = copy.row + row, from_column = copy.column + column;
            bool inside = from_row < map.rows && from_column < map.columns;
            // 128-byte swizzle: the sixteen bytes c of row r are at c ^ r % 8
            size_t at = row * 128 + ((column / 8) ^ row % 8) * 16 + column % 8 * 2;
            *(__half*)(copy.to + at) = inside ? map.address[from_row * map.stride + from_column] : __half(0.f);
        }
}

inline void wake(Phase& phase) {
    for (Fiber* fiber : phase.waiting) fiber->state = READY;
    phase.waiting.clear();
}

inline void settle(Phase& phase) {
    if (phase.pending || phase.bytes) return;
    phase.parity ^= 1, phase.pending = phase.arrivals;
    wake(phase);
}

inline void start_copy(void* to, size_t bytes, Copy copy, Barrier* barrier) {
    if ((uintptr_t)to % 16 || (copy.from && (uintptr_t)copy.from % 16) || bytes % 16)
        fail("a bulk copy is not aligned to 16 bytes");
    memset(to, 0xFF, bytes);
    copy.to = (char*)to, copy.bytes = bytes;
    Phase& phase = barriers.at(barrier);
    phase.copies.push_back(copy);
    wake(phase);
}

}  // namespace cuda_on_cpu

inline void prefetch_map(const TensorMap*) {}
inline void publish_barriers() {}
inline void publish_writes() {}
inline void barrier_init(Barrier* barrier, int arrivals) {
    cuda_on_cpu::Phase phase;
    phase.arrivals = phase.pending = arrivals;
    cuda_on_cpu::barriers[barrier] = phase;
}
inline void barrier_arrive(Barrier* barrier) {
    cuda_on_cpu::Phase& phase = cuda_on_cpu::barriers.at(barrier);
    if (--phase.pending < 0) cuda_on_cpu::fail("more threads arrive at a barrier than it was made for");
    cuda_on_cpu::settle(phase);
}
inline void barrier_expect(Barrier* barrier, int bytes) {
    cuda_on_cpu::barriers.at(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
inline void barrier_wait(Barrier* barrier, int parity, CUDA_ON_CPU_HERE) {
    using namespace cuda_on_cpu;
    for (;;) {
        Phase& phase = barriers.at(barrier);
        if (phase.parity != parity) return;
        std::vector<Copy> copies;
        copies.swap(phase.copies);
        for (const Copy& copy : copies) land(copy), phase.bytes -= (long long)copy.bytes;
        settle(phase);
        if (phase.parity != parity) return;
        current->operation = "barrier_wait", current->place = {file, line}, current->state = AT_BARRIER;
        phase.waiting.push_back(current);
        yield();
    }
}
inline void block_wait(Barrier* barrier, int parity, CUDA_ON_CPU_HERE) { barrier_wait(barrier, parity, file, line); }
template <typename X> void send(unsigned rank, X* to, const X& x, Barrier* barrier) {
    if ((uintptr_t)to % sizeof(X)) cuda_on_cpu::fail("st.async: not aligned to what is sent");
    *map_shared(to, rank) = x;
    cuda_on_cpu::Phase& phase = cuda_on_cpu::barriers.at(map_shared(barrier, rank));
    phase.bytes -= (long long)sizeof(X);
    cuda_on_cpu::settle(phase);
}
inline void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier) {
    cuda_on_cpu::start_copy(to, bytes, {nullptr, 0, {}, (const char*)from, 0, 0}, barrier);
}
inline void copy_box(void* to, const TensorMap* map, int column, int row, Barrier* barrier) {
    if ((uintptr_t)to % 1024) cuda_on_cpu::fail("a swizzled box is not aligned to 1024 bytes");
    cuda_on_cpu::start_copy(to, map->box_rows * map->box_columns * 2, {nullptr, 0, *map, nullptr, column, row}, barrier);
}
template <int blocks> void copy_box_to_all(void* to, const TensorMap* map, int column, int row, Barrier* barrier) {
    for (int rank = 0; rank < blocks; rank++)
        copy_box(map_shared((char*)to, rank), map, column, row, map_shared(barrier, rank));
}
inline void arrive_at(unsigned rank, Barrier* barrier) { barrier_arrive(map_shared(barrier, rank)); }

// Operands are addresses here, with what the descriptor says beside in the bits that addresses do not use.
inline unsigned long long plain_operand(const void* at, int along) {
    return (unsigned long long)at | (unsigned long long)(along / 16) << 48;
}
inline unsigned long long swizzled_operand(const void* at) { return (unsigned long long)at | 0xFFFFull << 48; }
inline unsigned long long across_operand(const void* at) { return (unsigned long long)at | 0x8000ull << 48; }
inline unsigned long long further(unsigned long long operand, int bytes) { return operand + bytes; }
inline int uniform_warp() { return cuda_on_cpu::current->thread / 32; }

namespace cuda_on_cpu {
// Number k of row `row` of an operand.
inline float operand(unsigned long long operand, int row, int k) {
    uintptr_t at = operand & 0xFFFFFFFFFFFFull;
    unsigned along = operand >> 48;
    if (along == 0x8000) fail("a product reads an operand as what it is not");
    if (along != 0xFFFF) return __half2float(*(__half*)(at + k / 8 * along * 16 + row * 16 + k % 8 * 2));
    uintptr_t address = at + row * 128 + k * 2;  // the swizzle is a function of the address's bits
    return __half2float(*(__half*)(address ^ (address >> 7 & 7) << 4));
}
// Number k of column `column` of an operand whose rows are along the sum.
inline float operand_across(unsigned long long operand, int column, int k) {
    if (operand >> 48 != 0x8000) fail("a product reads an operand as what it is not");
    uintptr_t address = (operand & 0xFFFFFFFFFFFFull) + k * 128 + column * 2;
    return __half2float(*(__half*)(address ^ (address >> 7 & 7) << 4));
}
// Number k of a row of a warp's sixteen that is in the registers of its lanes.
inline float operand_held(Fiber* const* lanes, size_t number, int row, int k) {
    const Multiplication& one = lanes[row % 8 * 4 + k % 8 / 2]->multiplications.front()[number];
    __half2 pair = bits<__half2>(one.registers[row / 8 + k / 8 * 2]);
    return __half2float(k % 2 ? pair.y : pair.x);
}

// The groups of a warpgroup's multiplications but the last `pending`: alike for all of its 128 threads.
inline void finish_multiplications(std::vector<Fiber*>& threads) {
    size_t pending = *(size_t*)threads[0]->data;
    while (threads[0]->multiplications.size() - 1 > pending) {
        for (size_t i = 0; i < threads[0]->multiplications.front().size(); i++)
            for (Fiber* fiber : threads) {
                const Multiplication& one = fiber->multiplications.front()[i];
                for (int tile = 0; tile < one.tiles; tile++)
                    for (int j = 0; j < 4; j++) {
                        int row = fiber->thread % 128 / 32 * 16 + fiber->lane / 4 + j / 2 * 8;
                        int column = tile * 8 + fiber->lane % 4 * 2 + j % 2;
                        float sum = 0;
                        for (int k = 0; k < 16; k++) {
                            float a = one.held ? operand_held(&threads[row / 16 * 32], i, row % 16, k)
                                               : operand(one.a, row, k);
                            sum += a * (one.across ? operand_across(one.b, column, k) : operand(one.b, column, k));
                        }
                        one.d[tile][j] += sum;
                    }
            }
        for (Fiber* fiber : threads) fiber->multiplications.erase(fiber->multiplications.begin());
    }
}
}  // namespace cuda_on_cpu

inline void warpgroup_begin() {}
inline void warpgroup_commit() { cuda_on_cpu::current->multiplications.push_back({}); }
template <int tiles>
void warpgroup_multiply(float (&d)[tiles][4], unsigned long long a, unsigned long long b) {
    cuda_on_cpu::current->multiplications.back().push_back({d, tiles, a, b, false, false, {}});
}
inline void warpgroup_multiply(float (&d)[8][4], const unsigned (&a)[4], unsigned long long b) {
    cuda_on_cpu::current->multiplications.back().push_back({d, 8, 0, b, false, true, {a[0], a[1], a[2], a[3]}});
}
inline void warpgroup_multiply_across(float (&d)[8][4], const unsigned (&a)[4], unsigned long long b) {
    cuda_on_cpu::current->multiplications.back().push_back({d, 8, 0, b, true, true, {a[0], a[1], a[2], a[3]}});
}
template <int pending> void warpgroup_wait(CUDA_ON_CPU_HERE) {
    size_t data = pending;
    unsigned number = 8 + cuda_on_cpu::current->thread / 128;
    cuda_on_cpu::wait_block("warpgroup_wait", {file, line}, number, 128, &data, cuda_on_cpu::finish_multiplications);
}
