// hopper: the instructions that Hopper alone has (sm_90a): tensor maps, bulk copies that end at a barrier in shared
// memory, products of a warpgroup from shared memory. Only where HALF.

#ifndef CUDA_ON_CPU  // tests/cuda_on_cpu/hopper.h defines the same for g++

// cuTensorMapEncodeTiled made it: a matrix, and the box of it that one copy takes.
struct __align__(64) TensorMap { char bytes[128]; };
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// The map's box at (column, row); zeros beyond the matrix.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, int column, int row, Barrier* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared_address(to)), "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)) : "memory");
}

// The same box to the same place of all blocks of a cluster of so many, each of whose barriers waits for its bytes.
template <int blocks>
__device__ __forceinline__ void copy_box_to_all(void* to, const TensorMap* map, int column, int row, Barrier* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(shared_address(to)), "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)),
                 "h"((unsigned short)((1 << blocks) - 1)) : "memory");
}

// barrier_arrive at the same barrier of block `rank` of the cluster.
__device__ __forceinline__ void arrive_at(unsigned rank, Barrier* barrier) {
    asm volatile("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)), "r"(rank)
                 : "memory");
}

// barrier_wait for what this block's threads and copies do: does not look at the cluster's memory, nor empty L1 for it.
__device__ __forceinline__ void block_wait(Barrier* barrier, int parity) {
    asm volatile("{\n\t.reg .pred over;\n"
                 "again_%=:\n\tmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n\t"
                 "@!over bra again_%=;\n}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// What this thread did to shared memory comes before what the copy engine does there after the next barrier.
__device__ __forceinline__ void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Where a warpgroup's operand is, as the PTX manual's matrix descriptor: core matrices of eight rows of sixteen bytes,
// each contiguous, `along` bytes from one to the next along the sum and 128 across.
__device__ __forceinline__ unsigned long long plain_operand(const void* at, int along) {
    return (shared_address(at) & 0x3ffff) >> 4 | (unsigned long long)along << 12 | 8ull << 32;
}
// The same for rows of 128 bytes in the 128-byte swizzle: sixteen bytes c of row r are at c ^ r % 8.
__device__ __forceinline__ unsigned long long swizzled_operand(const void* at) {
    return (shared_address(at) & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// An operand b of sixty-four columns whose rows are along the sum, each 128 bytes in that swizzle: as a matrix [inner, 64]
// lies in memory. Sixteen rows are 2048 bytes.
__device__ __forceinline__ unsigned long long across_operand(const void* at) { return swizzled_operand(at); }
// The operand so many bytes behind; in shared memory nothing is carried beyond the address's bits.
__device__ __forceinline__ unsigned long long further(unsigned long long operand, int bytes) {
    return (operand & ~0xffffffffull) | ((unsigned)operand + bytes / 16);
}
// The warp's number, which the compiler then knows to be the same for all its lanes: operands stay in uniform registers.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(FULL_WARP, threadIdx.x / 32, 0); }

__device__ __forceinline__ void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `pending` committed groups are under way.
template <int pending> __device__ __forceinline__ void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// d += a . b: a 64 x 16, b 16 x (8 tiles), d[tile] as mma.m16n8k16's; warp w of the group has rows 16 w to 16 w + 15.
// a may be in registers, where each warp has its rows as mma.m16n8k16's a; they must stay as they are until the product
// has been waited for. warpgroup_multiply_across: b is an across_operand.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FOUR(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
__device__ __forceinline__ void warpgroup_multiply(float (&d)[1][4], unsigned long long a, unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 "
                 "{%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
                 : FOUR(0) : "l"(a), "l"(b));
}
__device__ __forceinline__ void warpgroup_multiply(float (&d)[2][4], unsigned long long a, unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, 1, 1, 1, 0, 0;"
                 : FOUR(0), FOUR(1) : "l"(a), "l"(b));
}
__device__ __forceinline__ void warpgroup_multiply(float (&d)[4][4], unsigned long long a, unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, 1, 1, 1, 0, 0;"
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3) : "l"(a), "l"(b));
}
__device__ __forceinline__ void warpgroup_multiply(float (&d)[8][4], unsigned long long a, unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7) : "l"(a), "l"(b));
}
__device__ __forceinline__ void warpgroup_multiply(float (&d)[16][4], unsigned long long a, unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, 1, 0, 0;"
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7),
                   FOUR(8), FOUR(9), FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15) : "l"(a), "l"(b));
}
__device__ __forceinline__ void warpgroup_multiply(float (&d)[32][4], unsigned long long a, unsigned long long b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
                 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
                 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
                 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
                 "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
                 "%128, %129, 1, 1, 1, 0, 0;"
                 : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7),
                   FOUR(8), FOUR(9), FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15),
                   FOUR(16), FOUR(17), FOUR(18), FOUR(19), FOUR(20), FOUR(21), FOUR(22), FOUR(23),
                   FOUR(24), FOUR(25), FOUR(26), FOUR(27), FOUR(28), FOUR(29), FOUR(30), FOUR(31)
                 : "l"(a), "l"(b));
}
#define HELD(name, across) \
    __device__ __forceinline__ void name(float (&d)[8][4], const unsigned (&a)[4], unsigned long long b) { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " \
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
                     "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, " \
                     "{%32,%33,%34,%35}, %36, 1, 1, 1, " #across ";" \
                     : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7) \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
    }
HELD(warpgroup_multiply, 0)
HELD(warpgroup_multiply_across, 1)
#undef HELD
#undef FOUR
#else
template <int tiles, typename A>
__device__ __forceinline__ void warpgroup_multiply(float (&d)[tiles][4], const A& a, unsigned long long b) {
    __trap();
}
__device__ __forceinline__ void warpgroup_multiply_across(float (&d)[8][4], const unsigned (&a)[4],
                                                          unsigned long long b) {
    __trap();
}
#endif

// A barrier of `count` threads of the block; number 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier(int number, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(count) : "memory");
}

#endif  // CUDA_ON_CPU
