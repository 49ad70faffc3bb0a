// Attention of few query rows over a cache of bfloat16 or int8 by bfloat16 products: `attend_few`. Included by attention_bf16.cpp only.
//
// Owns the softmax. A row's result depends on itself alone. Codes of int8 are exact in bfloat16; their scales are multiplied into
// scores and, before they are rounded, into weights. Refuses to know sequences, pages and threads. Read `attention_few.h` for the
// layout, `attention_few_dot.h` and `attention_few_tiles.h` for the products.
#pragma once
#include <math.h>

#if defined(GC_LEVEL_AMX)
#include "attention_few_tiles.h"
#else
#include "attention_few_dot.h"
#endif

namespace gemcutter {
namespace {

// scores *= the scale of their key; 1 for keys that nobody sees.
inline void scale_pairs(const FewRows &few, const Keys &keys, const float *scales) {
    for (int64_t p = 0; p < few.pairs; ++p) {
        float by[2];
        for (int64_t half = 0; half < 2; ++half) {
            const int64_t t = 2 * (few.first_pair + p) + half;
            by[half] = t < few.first || t >= few.last ? 1.0f : scales[slot_of(keys, t) * keys.scale_stride];
        }
        float *row = few.scores + p * few.vectors * 2;
        for (int64_t i = 0; i < 2 * few.vectors; ++i) row[i] *= by[i % 2];
    }
}

// What a row has for keys that it does not see becomes `value`.
inline void hide_keys(const FewRows &few, int64_t row, const DecodeRow &sees, float value) {
    float *own = few.scores + row * few.heads * 2;
    const auto hide = [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t)
            for (int64_t h = 0; h < few.heads; ++h) own[((t / 2 - few.first_pair) * few.vectors + h) * 2 + t % 2] = value;
    };
    hide(2 * few.first_pair, sees.first);
    hide(sees.last, 2 * (few.first_pair + few.pairs));
}

// top [V] = the largest score.
inline void largest_scores(const FewRows &few, float *top) {
    const int64_t stride = few.vectors * 2, size = few.pairs * stride, step = stride < W ? W : stride;
    for (int64_t column = 0; column < stride; column += W) {
        V best = load(few.scores + column);
        for (int64_t i = column + step; i < size; i += step) best = vmax(best, load(few.scores + i));
        float lanes[W];
        store(lanes, best);
        for (int64_t width = W; width > stride; width /= 2)
            for (int64_t i = 0; i < width / 2; ++i) lanes[i] = lanes[i] > lanes[i + width / 2] ? lanes[i] : lanes[i + width / 2];
        for (int64_t i = 0; i < (stride < W ? stride : W); i += 2)
            top[(column + i) / 2] = lanes[i] > lanes[i + 1] ? lanes[i] : lanes[i + 1];
    }
}

// Turns scores into weights relative to top [V]; total [V] = the sums of the weights before they are scaled and rounded, each
// taken pair by pair whatever the number of query vectors.
inline void weigh_pairs(const FewRows &few, const float *top, float *total) {
    const int64_t stride = few.vectors * 2, size = few.pairs * stride, period = stride < W ? stride : W;
    float shifts[W], sums[W];
    for (int64_t column = 0; column < stride; column += W) {
        for (int64_t i = 0; i < W; ++i) shifts[i] = top[(column + i % period) / 2], sums[i] = 0;
        const V shift = load(shifts);
        for (int64_t i = column; i < size; i += stride < W ? W : stride) store(few.scores + i, exp(load(few.scores + i) - shift));
        for (int64_t i = column; i < size; i += stride)
            for (int64_t lane = 0; lane < period; ++lane) sums[lane] += few.scores[i + lane];
        for (int64_t i = 0; i < period; i += 2) total[(column + i) / 2] = sums[i] + sums[i + 1];
    }
}

inline void round_weights(const FewRows &few) {
    auto *to = reinterpret_cast<uint16_t *>(few.weights);
    for (int64_t i = 0; i < few.pairs * few.vectors * 2; i += W) store_bf16(to + i, load(few.scores + i));
}

// Puts the columns of each 32 back in order.
inline void order_columns(const float *sums, int64_t dim, float *out) {
    for (int64_t e = 0; e < dim; e += COLUMNS) {
        const V near = load(sums + e), far = load(sums + e + W);
        store(out + e, __builtin_shufflevector(near, far, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
        store(out + e + W, __builtin_shufflevector(near, far, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
    }
}

inline FewRows make_few(void *scratch, const DecodeRow *rows, int64_t count, int64_t heads, int64_t dim) {
    FewRows few = {};
    few.heads = heads, few.dim = dim, few.queries = count * heads, few.vectors = vectors_of(few.queries);
    few.first = rows[0].first, few.last = rows[count - 1].last;
    const int64_t at_once = pairs_at_once(few.vectors);
    few.first_pair = few.first / 2 / at_once * at_once;
    few.pairs = padded_to((few.last + 1) / 2 - few.first_pair, at_once);
    few.scores = static_cast<float *>(scratch);
    few.sums = few.scores + (few.pairs * 2 + W) * few.vectors;
    few.weights = reinterpret_cast<uint32_t *>(few.sums + few.vectors * dim);
    few.q = reinterpret_cast<uint16_t *>(few.weights + few.pairs * few.vectors);
    few.zeros = few.q + few.vectors * dim;
    few.copies = few.zeros + dim;
    few.q_pairs = reinterpret_cast<uint32_t *>(few.copies + PANEL * dim);
    few.spare = reinterpret_cast<float *>(few.q_pairs + padded_to(few.vectors, PANEL) * dim / 2);
    return few;
}

inline size_t few_bytes(int64_t heads, int64_t dim) {
    const int64_t queries = heads > DECODE_QUERIES ? heads : DECODE_QUERIES, vectors = vectors_of(queries);
    const int64_t pairs = DECODE_KEYS / 2 + 2 * MOST_PAIRS_AT_ONCE;
    const size_t bytes =
        sizeof(float) * (size_t)((pairs * 2 + W) * vectors + 2 * padded_to(vectors, PANEL) * dim + pairs * vectors);
    return bytes + sizeof(uint16_t) * (size_t)((2 * padded_to(vectors, PANEL) + 1 + PANEL) * dim);
}

// The partial attention of DecodeRows, which see positions from `base` on; dim is a multiple of COLUMNS.
template <typename Element>
void attend_few(const DecodeRow *rows, int64_t count, int64_t heads, int64_t dim, const Keys &keys, void *scratch) {
    const FewRows few = make_few(scratch, rows, count, heads, dim);
    memset(few.q, 0, sizeof(uint16_t) * (size_t)((few.vectors + 1) * dim));
    for (int64_t m = 0; m < count; ++m) vector_ops_avx512.to_bf16(rows[m].q, heads * dim, few.q + m * heads * dim);
    score_all<Element>(few, keys);
    if (keys.k_scale) scale_pairs(few, keys, keys.k_scale);
    for (int64_t m = 0; m < count; ++m) hide_keys(few, m, rows[m], -INFINITY);
    float *top = few.sums, *total = top + few.vectors;  // free until values are summed: dim is COLUMNS or more
    largest_scores(few, top);
    weigh_pairs(few, top, total);
    for (int64_t m = 0; m < count; ++m) {
        memcpy(rows[m].top, top + m * heads, sizeof(float) * (size_t)heads);
        memcpy(rows[m].total, total + m * heads, sizeof(float) * (size_t)heads);
    }
    if (keys.v_scale) {
        scale_pairs(few, keys, keys.v_scale);
        for (int64_t m = 0; m < count; ++m) hide_keys(few, m, rows[m], 0.0f);  // scales of keys that it does not see may be NaN
    }
    round_weights(few);
    memset(few.sums, 0, sizeof(float) * (size_t)(few.vectors * dim));
    value_all<Element>(few, keys, rows, count);
    for (int64_t m = 0; m < count; ++m)
        for (int64_t h = 0; h < heads; ++h) order_columns(few.sums + (m * heads + h) * dim, dim, rows[m].out + h * dim);
}

}  // namespace
}  // namespace gemcutter
