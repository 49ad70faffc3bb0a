// What every processor level provides, as tables of function pointers; a level's objects are compiled with its own flags.
//
// Owns the contract between kernels compiled once per level (vector_ops.cpp, packed.cpp, dense.cpp, attention.cpp, amx.cpp) and
// the code that is compiled once (layer_ops.cpp, parallel_gemm.cpp, dispatch.cpp). Level sources include no C++ library
// templates: an inline function compiled for AVX-512 must never be the copy that the linker keeps for every processor. Shape
// letters: M rows, K columns, E head dim, T keys.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "api.h"
#include "layout.h"

namespace gemcutter {

// The formats in which a matmul kernel may read activations; `MatmulKernels::formats` returns which ones it needs.
// FORMAT_HALVES are sums beside FORMAT_INT8, for matrices with scales for 16 columns; FORMAT_TILES are bfloat16, too, for which
// FORMAT_BF16 can stand in. FORMAT_PAIRS are few rows of FORMAT_BF16, which every thread lays out once more for itself.
enum ActivationFormat {
    FORMAT_FLOAT = 1,
    FORMAT_INT8 = 2,
    FORMAT_BF16 = 4,
    FORMAT_HALVES = 8,
    FORMAT_TILES = 16,
    FORMAT_PAIRS = 32
};

// M activation rows [M, columns]; formats that no kernel needs are null. All but tiles and pairs are contiguous: row m begins at
// m * columns.
struct Rows {
    int64_t count, columns;
    int activations;       // enum gc_activations
    const float *x;        // float32; rounded to bfloat16 if activations says so
    const int8_t *q;       // -127..127, one scale for every 32 columns
    const float *scale;    // [M, columns / 32]
    const float *sum;      // [M, columns / 32]: scale * the sum of the 32 q
    const float *halves;   // [M, 2, columns / 32]: the same of the first 16 q of each block, then of the second
    const uint16_t *bf16;  // bfloat16
    // Two more layouts of bfloat16, M rounded up to 16 rows.
    const uint16_t *tiles;  // [M' / 16, columns / 32, 16, 32], for columns that are a multiple of 32
    const uint32_t *pairs;  // [M' / 16, columns / 2, 16], two columns in each, for even columns; null for a single row
};

// Where 32 columns of a row lie in tiles.
inline int64_t place_in_tiles(int64_t columns, int64_t row, int64_t column) {
    return row / 16 * 16 * columns + column * 16 + row % 16 * 32;
}

// Element-wise and reduction ops on single rows.
struct VectorOps {
    // out = x / rms(x) * weight; weight null means 1. out may be x.
    void (*rms_norm)(const float *x, const float *weight, float eps, int64_t n, float *out);
    // out = (x + rms_norm(y) * weight) * scale. out may be x.
    void (*add_norm)(const float *x, const float *y, const float *weight, float eps, float scale, int64_t n, float *out);
    // out = gelu_tanh(gate) * up. out may be gate.
    void (*gelu_mul)(const float *gate, const float *up, int64_t n, float *out);
    // out = x / (1 + exp(-gate)). out may be x or gate.
    void (*gate)(const float *x, const float *gate, int64_t n, float *out);
    // Rotate pairs (i, i + E/2) in place with cos and sin [E/2].
    void (*rope)(float *x, const float *cos, const float *sin, int64_t head_dim);
    // x = tanh(x / cap) * cap, in place.
    void (*softcap)(float *x, float cap, int64_t n);
    // Round float32 to bfloat16 (nearest even, NaN kept).
    void (*to_bf16)(const float *x, int64_t n, uint16_t *out);
    void (*from_bf16)(const uint16_t *x, int64_t n, float *out);
    // Quantize a row to int8, one scale for every 32 columns; a block of zeros has scale 0.
    void (*quantize)(const float *x, int64_t n, int8_t *q, float *scale, float *sum);
    // halves [2, n / 32]: scale * the sum of the first, and of the second, 16 columns of each quantized block.
    void (*sum_halves)(const int8_t *q, const float *scale, int64_t n, float *halves);
    // out += x * factor
    void (*add_scaled)(const float *x, float factor, int64_t n, float *out);
    // out += x * y
    void (*add_product)(const float *x, const float *y, int64_t n, float *out);
    // The sum of x * y.
    float (*dot)(const float *x, const float *y, int64_t n);
    // out = x * factor
    void (*scale)(const float *x, float factor, int64_t n, float *out);
    // out = x, no less than low and no more than high. out may be x.
    void (*clamp)(const float *x, float low, float high, int64_t n, float *out);
    // The largest of n > 0 numbers, and the sum of exp(x - largest): the softmax of the largest is 1 / sum.
    void (*softmax_top)(const float *x, int64_t n, float *largest, float *sum);
    // Quantize n numbers to int8 with one scale, the largest magnitude / 127; rounded to nearest even. Where the largest magnitude
    // is 1e-36 or less, scale and codes are 0; where a number is not finite, codes are 0 and the scale is NaN.
    void (*quantize_vector)(const float *x, int64_t n, int8_t *q, float *scale);
};

// How much of a product of many rows is computed in one go: neighbouring panels, which share the work on rows, and rows, a multiple
// of ROW_UNIT, which are multiplied with one group of panels after the other.
struct Blocking {
    int64_t panels, rows;
};

constexpr int64_t ROW_UNIT = 32;  // blocks of rows are multiples of the rows that any micro-kernel takes at once

// As many rows as have so many elements, and `most` at most.
inline int64_t most_rows(int64_t elements, int64_t columns, int64_t most) {
    const int64_t fit = elements / columns / ROW_UNIT * ROW_UNIT;
    return fit < ROW_UNIT ? ROW_UNIT : fit < most ? fit : most;
}

// Products of activation rows with neighbouring panels of a matrix.
struct MatmulKernels {
    // The activation formats (a bit set) that `gemm_panels` reads for this matrix and number of rows.
    int (*formats)(const gc_matrix *matrix, int64_t rows, int activations);
    // Rows first..last-1 times the matrix rows of `panels` panels from `panel` on, those of `blocking` at most:
    // out[m * ld + r], m counted from `first`, r from the first panel's first row; a ragged last panel writes only the rows that
    // exist. `scratch` has scratch_bytes(), 64-byte aligned, one for each thread. `next` is what the thread reads afterwards,
    // prefetched near the end of the last panel; null means the next panel in memory.
    void (*gemm_panels)(const gc_matrix *matrix, int64_t panel, int64_t panels, const Rows *rows, int64_t first, int64_t last,
                        float *out, int64_t ld, void *scratch, const void *next);
    size_t (*scratch_bytes)(const gc_matrix *matrix);
    // Write one row of a matrix as float32.
    void (*gather)(const gc_matrix *matrix, int64_t row, float *out);
    Blocking (*blocking)(const gc_matrix *matrix);
};

// Keys and values of one key head in one sequence. Slot t of positions start, start + 1, ...: consecutive from `low`, or listed.
struct Keys {
    const void *k, *v;          // first element of the key head in slot 0
    int64_t stride;             // elements from one slot to the next
    int32_t dtype;              // GC_S8, GC_BF16 or GC_F32
    int64_t start, first_slot;  // first cached position; its slot, or -1 if `slots` lists them
    const int64_t *slots;
    int64_t scale_stride = 0;                            // from the scale of one slot to the next, of GC_S8
    const float *k_scale = nullptr, *v_scale = nullptr;  // of the key head in slot 0
    bool exact = false;                                  // as in gc_kv
};

constexpr int64_t CHUNK_ELEMENTS = 96 * 1024;  // a part of the L2 cache, which also holds a panel's codes
constexpr int64_t CHUNK_ROWS = 256;
// Up to here products are bound by memory, a thread has its own range of panels, and a row's result must not depend on the rows
// beside it: kernels for more rows may round otherwise.
constexpr int64_t FEW_ROWS = 16;

constexpr int64_t DECODE_KEYS = 512;    // the most keys of one call of `decode`
constexpr int64_t DECODE_QUERIES = 64;  // and the most query vectors, unless one row has more heads

// One query row in a call of `decode`: G query heads (q [G, E], float32), the positions first..last-1 that it sees, and where its
// results go: unnormalised out [G, E], and per head the maximum score and the sum of exp(score - maximum).
struct DecodeRow {
    const float *q;
    int64_t first, last;
    float *out, *top, *total;
};

// Attention over one key head.
struct AttentionKernels {
    // Partial attention of some query rows of one sequence over one key head; `first` and `last` of rows never descend, and all
    // lie between `base` and base + DECODE_KEYS. A row's result depends on itself and on `base`, not on the rows beside it.
    void (*decode)(const DecodeRow *rows, int64_t count, int64_t heads, int64_t head_dim, const Keys *keys, int64_t base,
                   void *scratch);
    // Attention of `rows` query rows at `positions` (ascending) times G heads over one key head: q and out [rows, G, E] with
    // row stride `stride` elements, head stride E. window 0 means all keys up to the row's own position;
    // `last_visible` (never descending, or null) extends what a row sees beyond its own position.
    void (*prefill)(const float *q, float *out, int64_t stride, int64_t rows, int64_t heads, int64_t head_dim,
                    const int64_t *positions, const int64_t *last_visible, int64_t window, const Keys *keys, void *scratch);
    size_t (*scratch_bytes)(int64_t heads, int64_t head_dim);  // enough for either
    int64_t (*prefill_rows)(int64_t heads, int64_t head_dim);  // the most rows of one prefill call
};

static inline int64_t padded_to(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Keys and values of one head as bfloat16 pairs, which lie side by side: k [T' / 16, E / 2, 16], neighbouring columns of 16 keys;
// v [E' / 16, T' / 2, 16], 16 columns of two neighbouring keys. T' is the number of keys rounded up to 32, E' is E rounded up to 16; values
// beyond either end are zero.
struct KeyPairs {
    const uint32_t *k, *v;
    int64_t count;
};

// Attention without a mask, in bfloat16: rows of query pairs, of which there are `most_rows` or fewer, see all keys.
struct PairAttention {
    void (*attention)(const uint32_t *q, int64_t ldq, float *out, int64_t ldo, int64_t rows, int64_t head_dim,
                      const KeyPairs *keys, void *scratch);
    size_t (*scratch_bytes)(int64_t head_dim);
    int64_t most_rows;
};

// out[m * ld + c] += the sum over i < rank of low[m * stride + i] * up[i * 16 + c], for `width` columns c, 16 at most. The sum is made
// in the order of i, whatever other rows there are, and rounded before it is added. `codes`: GC_BF16 or GC_F32, those of `up`.
typedef void AddLowRank(const void *up, int32_t codes, int64_t rank, const float *low, int64_t stride, int64_t rows,
                        int64_t width, float *out, int64_t ld);

// A loop of nothing but one kind of product, and how many operations, two for a product and its sum, one round of it has.
struct PeakLoop {
    const char *name;  // "float32", "int8", "bfloat16"; null behind a level's last
    double operations;
    void (*run)(int64_t rounds);
};

// Lays out rows of bfloat16 as pairs (struct Rows).
typedef void PairRows(const uint16_t *x, int64_t rows, int64_t columns, uint32_t *out);

struct Kernels {
    const char *name;  // "portable", "avx2", "avx_vnni", "avx512", "avx512_bf16", "amx", "neon", "neon_i8mm"
    const VectorOps *vector_ops;
    const MatmulKernels *packed, *dense;
    const AttentionKernels *attention;
    const PairAttention *pair_attention;  // null where there are no such products
    const PeakLoop *peaks;
    AddLowRank *add_low_rank;
    PairRows *pair_rows = nullptr;  // of a level whose kernels read pairs
};

#define GC_DECLARE(level)                            \
    extern const VectorOps vector_ops_##level;       \
    extern const MatmulKernels packed_##level;       \
    extern const MatmulKernels dense_##level;        \
    extern const AttentionKernels attention_##level; \
    extern const PeakLoop peaks_##level[];           \
    AddLowRank add_low_rank_##level;
GC_DECLARE(portable)
#if defined(__x86_64__)
GC_DECLARE(avx2)
GC_DECLARE(avx512)
extern const MatmulKernels packed_avx_vnni, dense_avx512_bf16, packed_amx, dense_amx;
extern const AttentionKernels attention_avx512_bf16, attention_amx;
extern const PairAttention pair_attention_avx512_bf16;
extern const PeakLoop peaks_avx_vnni[], peaks_avx512_bf16[], peaks_amx[];
PairRows pair_rows_amx;
#elif defined(__aarch64__)
GC_DECLARE(neon)
extern const MatmulKernels packed_neon_i8mm, dense_neon_i8mm;
extern const PeakLoop peaks_neon_i8mm[];
#endif

const Kernels &kernels();  // of the level in use

// Address of a panel; also of the one after the last, for prefetching.
inline const void *panel_at(const gc_matrix &m, int64_t panel) {
    return static_cast<const char *>(m.data) + panel * m.stride * (is_dense(m) ? PANEL : 1);
}

inline const MatmulKernels &matmul_kernels(const gc_matrix &m) { return is_dense(m) ? *kernels().dense : *kernels().packed; }
inline Blocking blocking_of(const gc_matrix &m) { return matmul_kernels(m).blocking(&m); }

}  // namespace gemcutter
