// embed: from ids to activations.

// out = tokens[token] + positions[position], or zeros where token is negative.
__device__ __forceinline__ void embed(int token, int position, const T* tokens, const T* positions, T* out, int width) {
    const bool whole = width % LANE_WIDTH == 0;
    const T *left = tokens + (long long)token * width, *right = positions + (long long)position * width;
    for (int k = threadIdx.x * LANE_WIDTH; k < width; k += blockDim.x * LANE_WIDTH) {
        float sum[LANE_WIDTH] = {}, other[LANE_WIDTH];
        if (token >= 0 && whole) {
            load16(left + k, sum);
            load16(right + k, other);
#pragma unroll
            for (int i = 0; i < LANE_WIDTH; i++) sum[i] += other[i];
        }
        if (whole) {
            store16(out + k, sum);
            continue;
        }
        for (int i = 0; i < LANE_WIDTH && k + i < width; i++)
            out[k + i] = from_float<T>(token < 0 ? 0.f : to_float(left[k + i]) + to_float(right[k + i]));
    }
}

// out[r] = token_table[tokens[r]] + position_table[positions[r]], or zeros where tokens[r] is negative
//   tokens, positions int32 [rows]; tables T [ids, width], [positions, width]; out T [rows, width]; all contiguous
//   grid (rows), block 128, no shared memory; moves 3 * rows * width
extern "C" __global__ void embed_tokens(const int* tokens, const int* positions, const T* token_table,
                                        const T* position_table, T* out, int width) {
    launch_next();
    wait_for_previous();
    const int row = blockIdx.x;
    embed(tokens[row], positions[row], token_table, position_table, out + (long long)row * width, width);
}

// embed_tokens for the token that each row's slot holds, at the position it will have in the cache
//   rows int32 [n]: slots of the rows; slots Slot [lanes]; else as embed_tokens
extern "C" __global__ void embed_rows(const int* rows, const Slot* slots, const T* token_table, const T* position_table,
                                      T* out, int width) {
    launch_next();
    wait_for_previous();
    const Slot& slot = slots[rows[blockIdx.x]];
    embed(slot.token, slot.length, token_table, position_table, out + (long long)blockIdx.x * width, width);
}
