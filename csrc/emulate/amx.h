// AMX's tiles in plain C++: eight tiles a thread, whose shapes a configuration sets.
//
// Owns the state of a thread and the checks that the processor makes: an operation on shapes that do not fit, or without a
// configuration, traps here as it faults there. Read `avx512.h` for how kernels come to call these.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

// Names that are macros in some compilers, or at some levels of optimization.
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#undef _tile_loadd
#undef _tile_stored
#undef _tile_stream_loadd
#undef _tile_zero

namespace gemcutter {
namespace {

struct Tile {
    int rows, row_bytes;
    unsigned char at[16][64];
};

thread_local struct {
    bool is_configured;
    Tile tiles[8];
} tile_state;

inline void require(bool is_true) {
    if (!is_true) __builtin_trap();
}

inline Tile &tile(int index) {
    require(tile_state.is_configured && index >= 0 && index < 8);
    Tile &found = tile_state.tiles[index];
    require(found.rows > 0);
    return found;
}

inline void _tile_loadconfig(const void *memory) {
    const unsigned char *bytes = (const unsigned char *)memory;
    require(bytes[0] == 1);  // the palette of 8 tiles of 16 rows of 64 bytes
    for (int i = 1; i < 16; ++i) require(bytes[i] == 0);
    for (int i = 0; i < 8; ++i) {
        uint16_t row_bytes;
        memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
        int rows = bytes[48 + i];
        require(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0));
        tile_state.tiles[i] = Tile{};
        tile_state.tiles[i].rows = rows;
        tile_state.tiles[i].row_bytes = row_bytes;
    }
    for (int i = 8; i < 16; ++i) require(bytes[16 + 2 * i] == 0 && bytes[17 + 2 * i] == 0 && bytes[48 + i] == 0);
    tile_state.is_configured = true;
}

inline void _tile_release() { tile_state.is_configured = false; }

inline void _tile_zero(int index) {
    Tile &t = tile(index);
    memset(t.at, 0, sizeof t.at);
}

inline void _tile_loadd(int index, const void *base, int64_t stride) {
    Tile &t = tile(index);
    memset(t.at, 0, sizeof t.at);
    for (int row = 0; row < t.rows; ++row) memcpy(t.at[row], (const char *)base + row * stride, (size_t)t.row_bytes);
}

inline void _tile_stream_loadd(int index, const void *base, int64_t stride) { _tile_loadd(index, base, stride); }

inline void _tile_stored(int index, void *base, int64_t stride) {
    const Tile &t = tile(index);
    for (int row = 0; row < t.rows; ++row) memcpy((char *)base + row * stride, t.at[row], (size_t)t.row_bytes);
}

// Subnormal numbers count as zero, whatever the thread's floating-point mode.
inline float without_subnormal(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.0f, x) : x; }

inline float tile_bf16(const unsigned char *row, int index) {
    uint32_t bits = (uint32_t)(row[2 * index] | row[2 * index + 1] << 8) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return without_subnormal(value);
}

// Three tiles, whose shapes are those of a product.
inline void require_product(int out_index, int a_index, int b_index) {
    const Tile &out = tile(out_index), &a = tile(a_index), &b = tile(b_index);
    require(out_index != a_index && out_index != b_index && a_index != b_index);
    require(out.rows == a.rows && a.row_bytes == 4 * b.rows && out.row_bytes == b.row_bytes && out.row_bytes % 4 == 0);
}

// out[m][n] += sum over pairs k of a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1]; the two halves of pairs are summed apart.
inline void _tile_dpbf16ps(int out_index, int a_index, int b_index) {
    require_product(out_index, a_index, b_index);
    Tile &out = tile(out_index), &a = tile(a_index), &b = tile(b_index);
    for (int m = 0; m < out.rows; ++m)
        for (int n = 0; n < out.row_bytes / 4; ++n) {
            float sums[2] = {0.0f, 0.0f}, before;
            for (int k = 0; k < b.rows; ++k)
                for (int half = 0; half < 2; ++half) {
                    float x = tile_bf16(a.at[m], 2 * k + half), y = tile_bf16(b.at[k], 2 * n + half);
                    sums[half] = without_subnormal(__builtin_fmaf(x, y, sums[half]));
                }
            memcpy(&before, &out.at[m][4 * n], 4);
            float after = without_subnormal(without_subnormal(before) + without_subnormal(sums[0] + sums[1]));
            memcpy(&out.at[m][4 * n], &after, 4);
        }
}

// out[m][n] += sum over quads k of four signed bytes of a[m] times four unsigned ones of b[k].
inline void _tile_dpbsud(int out_index, int a_index, int b_index) {
    require_product(out_index, a_index, b_index);
    Tile &out = tile(out_index), &a = tile(a_index), &b = tile(b_index);
    for (int m = 0; m < out.rows; ++m)
        for (int n = 0; n < out.row_bytes / 4; ++n) {
            int32_t sum;
            memcpy(&sum, &out.at[m][4 * n], 4);
            for (int k = 0; k < b.rows; ++k)
                for (int i = 0; i < 4; ++i) sum += (int8_t)a.at[m][4 * k + i] * b.at[k][4 * n + i];
            memcpy(&out.at[m][4 * n], &sum, 4);
        }
}

}  // namespace
}  // namespace gemcutter
