// The products of prompts' attention: rows of bfloat16 times two panels of pairs, which lie side by side. Included by
// attention_bf16.cpp only, for the levels avx512_bf16 and amx.
//
// Owns how many rows and pairs a level multiplies at once, which callers round up to, and how large its blocks are. A row is summed in order, whatever other rows
// there are.
#pragma once
#if defined(GC_LEVEL_AMX)
#include "amx_tiles.h"
#else
#include "matmul_bf16.h"
#endif
#include "layout.h"

namespace gemcutter {
namespace {

constexpr int TILE_PANELS = 2;
constexpr int64_t TILE_COLUMNS = TILE_PANELS * PANEL;

// KEY_BLOCK: keys of one softmax update, aligned to absolute positions. BLOCK_ELEMENTS: of a block of query rows, two bytes each, and
// four of output. Keys and values are made pairs of once for a block of rows, and output comes and goes once for a block of keys: the
// faster products are, the larger are the blocks that pay for that.
#if defined(GC_LEVEL_AMX)
constexpr int64_t KEY_BLOCK = 256, BLOCK_ELEMENTS = 1 << 18;
constexpr int TILE_M = 2 * TILE_HEIGHT;
constexpr int64_t PAIR_UNIT = TILE_STEP / 2;
// Some rows are multiplied along with the last ones: their sums are written, too.
inline void multiply_rows(const uint16_t *rows, int64_t stride, int64_t count, const uint32_t *panels, int64_t panel_stride,
                          int64_t pairs, bool is_added, float *to, int64_t to_stride) {
    const int64_t panel_bytes = panel_stride * (int64_t)sizeof(uint32_t);
    memory_is_read(panels);
    for (; count > 0; count -= TILE_M, rows += TILE_M * stride, to += TILE_M * to_stride) {
        const TileSource upper = {(const char *)rows, stride * 2, TILE_LINE};
        const char *lower = (const char *)(rows + TILE_HEIGHT * stride);
        if (is_added) load_sums<2, 2>(to, to_stride);
        else zero_sums<2, 2>();
        auto nothing = [] {};
        multiply_tiles<2, 2>(upper, lower, (const char *)panels, panel_bytes, pairs / PAIR_UNIT, nothing);
        store_sums<2, 2>(to, to_stride);
    }
}
#else
constexpr int64_t KEY_BLOCK = 128, BLOCK_ELEMENTS = 1 << 16;
constexpr int TILE_M = 8;
constexpr int64_t PAIR_UNIT = 1;
inline void configure_tiles() {}
inline void release_tiles() {}
// to [count, 32] = (is_added: itself) + rows of `pairs` pairs of columns times two panels [pairs, 16]; strides in elements.
inline void multiply_rows(const uint16_t *rows, int64_t stride, int64_t count, const uint32_t *panels, int64_t panel_stride,
                          int64_t pairs, bool is_added, float *to, int64_t to_stride) {
    const uint32_t *a = reinterpret_cast<const uint32_t *>(rows);
    for (; count > 0; count -= TILE_M, a += TILE_M * stride / 2, to += TILE_M * to_stride)
        pair_tiles<TILE_M, TILE_PANELS>(a, stride / 2, panels, panel_stride, pairs, is_added ? to : nullptr, to_stride, to,
                                        to_stride);
}
#endif

}  // namespace
}  // namespace gemcutter
