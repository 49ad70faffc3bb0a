// Attention of many query rows over a cache of bfloat16 or int8 on processors with AVX512_BF16 or AMX: bfloat16 products, float32
// softmax and sums.
//
// Owns the blocks: the keys of a block become pairs of columns, its values pairs of keys, and some query vectors at a time meet two
// panels of them. Queries and softmax weights are rounded to bfloat16, as the models' own code rounds them; codes of int8 are exact
// in it, and their scales are multiplied into float32 scores and into weights before they are rounded. Few keys, and a cache
// that is float32 or computed with in float32, go to the AVX-512 kernels. A key that no row of a call sees changes nothing,
// whatever its memory holds. Refuses to know sequences, pages and threads; read `attention.cpp` for the same in float32,
// `attention_products.h` for the products, `attention_few_bf16.h` for few rows, `attention_split.cpp` for the caller.
#include <math.h>

#include "attention_few_bf16.h"
#include "attention_products.h"

namespace gemcutter {
namespace {

// The first keys, and rows of prompts that see no more, are attended to in float32: that costs little, and short prompts do not
// depend on how they are cut into steps.
constexpr int64_t LEAST_KEYS = 256;
constexpr int64_t DIM_RUN = 256;  // head dims of keys that are brought into pairs at once: 16 KB for two panels
static_assert(KEY_BLOCK <= DIM_RUN, "pairs of values have the room of those of keys");
// From one query to the next: no power of two, or rows would compete for a few sets of the L1 cache.
constexpr int64_t SCORES_LD = KEY_BLOCK + PANEL, WEIGHTS_LD = KEY_BLOCK + 2 * PANEL;

// The running softmax state of a block of query rows, whose query vectors are rounded up to whole tiles; E' is the head dim
// rounded up to TILE_COLUMNS.
struct Block : QueryRows {
    int64_t heads, dim, width, queries;
    uint16_t *q, *weights;                       // [M, E'], [M, WEIGHTS_LD]
    float *out, *scores, *top, *total, *shrink;  // [E' / 32, M, 32], [M, SCORES_LD], [M]...
    float *key_scales, *value_scales;            // [KEY_BLOCK] of this block, where the cache has scales
    uint32_t *pairs;
};

// A row of keys from dim `e` on as bfloat16: itself, or a copy in `spare`, which has room for DIM_RUN.
inline const uint16_t *as_bf16(const uint16_t *row, int64_t, uint16_t *) { return row; }
inline const uint16_t *as_bf16(const int8_t *codes, int64_t dims, uint16_t *spare) {
    int64_t e = 0;
    for (; e + W <= dims; e += W) store_bf16(spare + e, S8::vector(codes + e));
    if (e == dims) return spare;
    int8_t rest[W] = {};
    uint16_t wide[W];
    memcpy(rest, codes + e, (size_t)(dims - e));
    store_bf16(wide, S8::vector(rest));
    memcpy(spare + e, wide, sizeof(uint16_t) * (size_t)(dims - e));
    return spare;
}

// Pairs of columns of two panels of keys from dim `e` on; keys from `high` on repeat the one before.
template <typename Element>
void pair_keys(const Block &b, const Keys &keys, int64_t t, int64_t high, int64_t e, int64_t dims) {
    alignas(64) uint16_t spare[PANEL][DIM_RUN];
    for (int h = 0; h < TILE_PANELS; ++h) {
        const float *rows[PANEL];
        for (int64_t i = 0; i < PANEL; ++i) {
            int64_t at = t + h * PANEL + i < high ? t + h * PANEL + i : high - 1;
            rows[i] = reinterpret_cast<const float *>(as_bf16(elements_of<Element>(keys.k, keys, at) + e, dims, spare[i]));
        }
        pack_panel<F32>(rows, dims / 2, reinterpret_cast<float *>(b.pairs + h * DIM_RUN / 2 * PANEL));
    }
}

// Scores of query vectors first..last-1 with the keys low..high-1.
template <typename Element>
void score_block(const Block &b, int64_t first, int64_t last, const Keys &keys, int64_t low, int64_t high) {
    for (int64_t t = low; t < high; t += TILE_COLUMNS)
        for (int64_t e = 0; e < b.dim; e += DIM_RUN) {
            int64_t dims = b.dim - e < DIM_RUN ? b.dim - e : DIM_RUN;
            pair_keys<Element>(b, keys, t, high, e, dims);
            multiply_rows(b.q + first * b.width + e, b.width, last - first, b.pairs, DIM_RUN / 2 * PANEL, dims / 2, e > 0,
                          b.scores + first * SCORES_LD + t - low, SCORES_LD);
        }
}

// Turns the scores of one query vector, which sees keys from..to-1 of a block, into softmax weights of `padded` keys, zero
// elsewhere.
void weigh_query(const Block &b, int64_t query, int64_t from, int64_t to, int64_t padded) {
    float *scores = b.scores + query * SCORES_LD;
    if (b.key_scales) multiply(scores, b.key_scales, padded);
    hide_unseen(scores, from, to, padded);
    float best = highest(scores, padded), top = b.top[query] > best ? b.top[query] : best;
    b.shrink[query] = expf(b.top[query] - top);
    b.total[query] =
        b.total[query] * b.shrink[query] + exponentiate(scores, padded, top, b.weights + query * WEIGHTS_LD, b.value_scales);
    b.top[query] = top;
}

// 16 columns of a key as bfloat16 in the lower halves of 32 bits.
inline __m512i lower_halves(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
inline __m512i lower_halves(const int8_t *p) { return _mm512_srli_epi32(_mm512_castps_si512(S8::vector(p)), 16); }

// 16 columns of two neighbouring keys as pairs; a null row is zero.
template <typename Element>
inline __m512i pair_values(const Element *even, const Element *odd) {
    const __m512i low = even ? lower_halves(even) : _mm512_setzero_si512();
    return odd ? _mm512_or_si512(low, _mm512_slli_epi32(lower_halves(odd), 16)) : low;
}

// Adds the weighted values of positions low..high-1 to query vectors first..last-1. Values that no query sees are not read.
template <typename Element>
void value_block(const Block &b, int64_t first, int64_t last, const Keys &keys, int64_t low, int64_t high, bool shrinks) {
    const Element *rows[KEY_BLOCK + 2] = {};
    int64_t row = first / b.heads, count = padded_to((high - low + 1) / 2, PAIR_UNIT);
    for (int64_t t = low; t < high; ++t) {
        while (b.newest(row) < t && row < b.rows - 1) ++row;
        if (b.sees(row, t, t + 1)) rows[t - low] = elements_of<Element>(keys.v, keys, t);
    }
    for (int64_t e = 0; e < b.dim; e += TILE_COLUMNS) {
        for (int h = 0; h < TILE_PANELS; ++h) {
            uint32_t *to = b.pairs + h * KEY_BLOCK / 2 * PANEL;
            int64_t column = e + h * PANEL, left = b.dim - column;
            for (int64_t i = 0; i < count; ++i) {
                const Element *even = rows[2 * i], *odd = rows[2 * i + 1];
                alignas(32) Element spare[2][PANEL] = {};
                if (left < PANEL) {  // the rest of a row, which must not be read beyond its end
                    size_t bytes = left > 0 ? sizeof(Element) * (size_t)left : 0;
                    if (even && bytes) memcpy(spare[0], even + column, bytes);
                    if (odd && bytes) memcpy(spare[1], odd + column, bytes);
                    _mm512_storeu_si512(to + i * PANEL, pair_values<Element>(spare[0], spare[1]));
                } else {
                    _mm512_storeu_si512(to + i * PANEL,
                                        pair_values(even ? even + column : nullptr, odd ? odd + column : nullptr));
                }
            }
        }
        float *out = b.out + e * b.queries;
        for (int64_t m = first; shrinks && m < last; ++m) {
            if (b.shrink[m] == 1.0f) continue;
            const V by = set1(b.shrink[m]);
            for (int64_t c = 0; c < TILE_COLUMNS; c += W)
                store(out + m * TILE_COLUMNS + c, load(out + m * TILE_COLUMNS + c) * by);
        }
        multiply_rows(b.weights + first * WEIGHTS_LD, WEIGHTS_LD, last - first, b.pairs, KEY_BLOCK / 2 * PANEL, count, true,
                      out + first * TILE_COLUMNS, TILE_COLUMNS);
    }
}

// Online-softmax update of all rows that see any of the positions low..high-1.
template <typename Element>
void update_block(const Block &b, const Keys &keys, int64_t low, int64_t high) {
    const auto [first, last] = SeeingRows(b, low, high);
    if (first == last) return;
    const int64_t begin = first * b.heads, end = last * b.heads;
    const int64_t padded = padded_to(high - low, PAIR_UNIT > 1 ? 2 * PAIR_UNIT : PANEL);
    score_block<Element>(b, begin, end, keys, low, high);
    if (b.key_scales) gather_scales(b, first, keys, low, high, padded, b.key_scales, b.value_scales);
    bool shrinks = false;
    for (int64_t row = first; row < last; ++row) {
        int64_t oldest = b.oldest(row) > low ? b.oldest(row) : low, newest = b.newest(row) < high - 1 ? b.newest(row) : high - 1;
        for (int64_t query = row * b.heads; query < (row + 1) * b.heads; ++query) {
            weigh_query(b, query, oldest - low, newest + 1 - low, padded);
            shrinks |= b.shrink[query] != 1.0f;
        }
    }
    // The last tile's rows beyond the end: nothing is added to them.
    for (int64_t query = end; query < begin + padded_to(end - begin, TILE_M); ++query)
        memset(b.weights + query * WEIGHTS_LD, 0, sizeof(uint16_t) * WEIGHTS_LD);
    value_block<Element>(b, begin, end, keys, low, high, shrinks);
}

Block make_block(void *scratch, int64_t rows, int64_t heads, int64_t dim, bool has_scales) {
    Block b = {};
    b.rows = rows, b.heads = heads, b.dim = dim, b.width = padded_to(dim, TILE_COLUMNS);
    b.queries = padded_to(rows * heads, TILE_M) + TILE_M;
    b.pairs = static_cast<uint32_t *>(scratch);
    float *scales = reinterpret_cast<float *>(b.pairs + TILE_PANELS * DIM_RUN / 2 * PANEL);
    if (has_scales) b.key_scales = scales, b.value_scales = scales + KEY_BLOCK;
    b.out = scales + 2 * KEY_BLOCK;
    b.scores = b.out + b.queries * b.width;
    b.top = b.scores + b.queries * SCORES_LD;
    b.total = b.top + b.queries;
    b.shrink = b.total + b.queries;
    b.q = reinterpret_cast<uint16_t *>(b.shrink + b.queries);
    b.weights = b.q + b.queries * b.width;
    return b;
}

size_t block_bytes(int64_t rows, int64_t heads, int64_t dim) {
    const int64_t width = padded_to(dim, TILE_COLUMNS), queries = padded_to(rows * heads, TILE_M) + TILE_M;
    return sizeof(uint32_t) * (size_t)(TILE_PANELS * DIM_RUN / 2 * PANEL) +
           sizeof(float) * (size_t)(2 * KEY_BLOCK + queries * (width + SCORES_LD + 3)) +
           sizeof(uint16_t) * (size_t)(queries * (width + WEIGHTS_LD));
}

void prefill(const float *q, float *out, int64_t stride, int64_t rows, int64_t heads, int64_t dim, const int64_t *positions,
             const int64_t *last_visible, int64_t window, const Keys *keys, void *scratch) {
    auto [low, high] = SeenKeys({rows, positions, last_visible, window}, *keys);
    if (keys->dtype == GC_F32 || keys->exact || dim % (2 * PAIR_UNIT) || high - low < LEAST_KEYS) {
        const int64_t most = attention_avx512.prefill_rows(heads, dim);
        for (int64_t row = 0; row < rows; row += most)
            attention_avx512.prefill(q + row * stride, out + row * stride, stride, rows - row < most ? rows - row : most, heads,
                                     dim, positions + row, last_visible ? last_visible + row : nullptr, window, keys, scratch);
        return;
    }
    configure_tiles();
    Block b = make_block(scratch, rows, heads, dim, keys->dtype == GC_S8);
    auto *update = keys->dtype == GC_S8 ? update_block<int8_t> : update_block<uint16_t>;
    b.positions = positions, b.last_visible = last_visible, b.window = window;
    const int64_t count = rows * heads;
    memset(b.q, 0, sizeof(uint16_t) * (size_t)(b.queries * b.width));
    for (int64_t query = 0; query < count; ++query)
        vector_ops_avx512.to_bf16(q + query / heads * stride + query % heads * dim, dim, b.q + query * b.width);
    memset(b.out, 0, sizeof(float) * (size_t)(b.queries * b.width));
    for (int64_t query = 0; query < count; ++query) b.top[query] = -INFINITY, b.total[query] = 0;

    while (low < high) {
        int64_t next = low / KEY_BLOCK * KEY_BLOCK + KEY_BLOCK;
        if (next > high) next = high;
        update(b, *keys, low, next);
        low = next;
    }
    release_tiles();
    for (int64_t query = 0; query < count; ++query) {
        const V scale = set1(b.total[query] > 0 ? 1.0f / b.total[query] : 0.0f);
        float *to = out + query / heads * stride + query % heads * dim;
        for (int64_t e = 0; e < dim; e += W) {
            float whole[W];
            const float *from = b.out + e / TILE_COLUMNS * TILE_COLUMNS * b.queries + query * TILE_COLUMNS + e % TILE_COLUMNS;
            store(whole, load(from) * scale);
            memcpy(to + e, whole, sizeof(float) * (size_t)(dim - e < W ? dim - e : W));
        }
    }
}

int64_t prefill_rows(int64_t heads, int64_t dim) {
    int64_t queries = BLOCK_ELEMENTS / padded_to(dim, TILE_COLUMNS), other = attention_avx512.prefill_rows(heads, dim);
    int64_t rows = queries < heads ? 1 : queries / heads;
    return rows > other ? rows : other;
}

size_t scratch_bytes(int64_t heads, int64_t dim) {
    size_t own = block_bytes(prefill_rows(heads, dim), heads, dim), few = few_bytes(heads, dim);
    size_t other = attention_avx512.scratch_bytes(heads, dim);
    if (few > own) own = few;
    return own > other ? own : other;
}

void decode(const DecodeRow *rows, int64_t count, int64_t heads, int64_t dim, const Keys *keys, int64_t base, void *scratch) {
    if (keys->dtype == GC_F32 || keys->exact || dim % COLUMNS || base < LEAST_KEYS)
        return attention_avx512.decode(rows, count, heads, dim, keys, base, scratch);
    auto *run = keys->dtype == GC_S8 ? attend_few<int8_t> : attend_few<uint16_t>;
    run(rows, count, heads, dim, *keys, scratch);
}

}  // namespace

extern const AttentionKernels GC_NAME(attention) = {decode, prefill, scratch_bytes, prefill_rows};

}  // namespace gemcutter
