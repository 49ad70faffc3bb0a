// The two attention kernels over one key head: `decode` streams the keys past few query rows, `prefill` multiplies many query
// rows with packed blocks of keys.
//
// Owns softmax and products in float32, with the scale 1. Of an int8 cache the products are with codes: scores are multiplied by
// the keys' scales afterwards, softmax weights by the values' scales beforehand. A key that no row of a call sees, outside the
// window or later than the row, changes nothing, whatever its memory holds. Refuses to know sequences, pages and threads; read
// `attention_split.cpp` for the caller that splits the work, `matmul_f32.h` for the micro-kernel. Head dims that are no multiple of
// a kernel's unit go through padded copies of rows. Shape letters: M query rows times heads, G heads, E head dim, T keys.
#include <math.h>

#include "attention_rows.h"
#include "exp.h"
#include "matmul_f32.h"

namespace gemcutter {
namespace {

constexpr int KEY_BLOCK = 64;     // keys of one softmax update of `prefill`, aligned to absolute positions
constexpr int64_t K_CHUNK = 256;  // head dims of one packed panel: 16 KB, half of an L1 cache
constexpr int VALUE_KEYS = 16;    // values summed in registers before the output is updated, and keys scored in one go
constexpr int64_t SCORES = DECODE_KEYS + 16;  // stride of scores: no power of two, which would crowd into few sets of the cache
constexpr int64_t PREFETCH_KEYS = 8;          // keys prefetched ahead: the hardware prefetcher stops at the end of every row
constexpr int64_t BLOCK_ELEMENTS = 49152;     // of a block of query rows: 384 KB with its output

#if defined(GC_LEVEL_AVX512)
constexpr int MOST_HEADS = 8;  // of one tile: a vector that is loaded and widened once for more of them takes fewer instructions
#else
constexpr int MOST_HEADS = 4;  // for which 16 registers suffice
#endif

// The head dim as `decode` computes with it: whole pairs of vectors.
int64_t padded(int64_t dim) { return padded_to(dim, 2 * W); }

// A row of `count` elements followed by zeros up to `size`: itself where there is nothing to add, else a copy in `spare`.
template <typename Element>
const Element *pad(const Element *row, int64_t count, int64_t size, Element *spare) {
    if (count == size) return row;
    memcpy(spare, row, sizeof(Element) * (size_t)count);
    memset(spare + count, 0, sizeof(Element) * (size_t)(size - count));
    return spare;
}

template <typename Type>
const typename Type::Element *row_of(const void *base, const Keys &keys, int64_t position) {
    return elements_of<typename Type::Element>(base, keys, position);
}

template <typename Type>
void prefetch(const typename Type::Element *row, int64_t dim) {
    constexpr int64_t LINE = 64 / sizeof(typename Type::Element);
    for (int64_t e = 0; e < dim; e += LINE) __builtin_prefetch(row + e);
}

// Two vectors at once in whatever order is cheapest; `order` puts a plain row into the same order and `unorder` takes it back.
inline void load_pair(const float *p, V &a, V &b, F32) { a = load(p), b = load(p + W); }
inline void load_pair(const int8_t *p, V &a, V &b, S8) { a = S8::vector(p), b = S8::vector(p + W); }
inline void load_pair(const uint16_t *p, V &even, V &odd, Bf16) {  // 32 bits hold an even and an odd column
#if defined(GC_LEVEL_AVX512)
    __m512i pair = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)));
#elif defined(GC_LEVEL_AVX2)
    __m256i pair = _mm256_loadu_si256((const __m256i *)p);
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32((int)0xffff0000)));
#elif defined(GC_LEVEL_NEON)
    const uint32x4_t pair = vreinterpretq_u32_u16(vld1q_u16(p));
    even = vreinterpretq_f32_u32(vshlq_n_u32(pair, 16));
    odd = vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xffff0000)));
#else
    for (int i = 0; i < W; ++i) even[i] = Bf16::one(p + 2 * i), odd[i] = Bf16::one(p + 2 * i + 1);
#endif
}
template <typename Type>
inline void order(const float *x, int64_t n, float *out, Type) {
    memcpy(out, x, sizeof(float) * (size_t)n);
}
template <typename Type>
inline void unorder(const float *x, int64_t n, float *out, Type) {
    memcpy(out, x, sizeof(float) * (size_t)n);
}
inline void order(const float *x, int64_t n, float *out, Bf16) {
    for (int64_t i = 0; i < n; i += 2 * W)
        for (int j = 0; j < W; ++j) out[i + j] = x[i + 2 * j], out[i + W + j] = x[i + 2 * j + 1];
}
inline void unorder(const float *x, int64_t n, float *out, Bf16) {
    for (int64_t i = 0; i < n; i += 2 * W)
        for (int j = 0; j < W; ++j) out[i + 2 * j] = x[i + j], out[i + 2 * j + 1] = x[i + W + j];
}

// Scores of H heads and T keys: scores[h * ld + t].
template <typename Type, int H, int T>
void score_tile(const float *q, int64_t dim, const typename Type::Element *const *rows, float *scores, int64_t ld) {
    V acc[H][T];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) acc[h][t] = set1(0.0f);
    for (int64_t e = 0; e < dim; e += 2 * W) {
        V a[T], b[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) load_pair(rows[t] + e, a[t], b[t], Type());
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) {
            V x = load(q + h * dim + e), y = load(q + h * dim + e + W);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) acc[h][t] = fma(x, a[t], acc[h][t]);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) acc[h][t] = fma(y, b[t], acc[h][t]);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) scores[h * ld + t] = sum(acc[h][t]);
}

// Scores of all heads and some keys, which stay in the L1 cache with the heads of a tile.
template <typename Type, int H>
void score_heads(const float *q, int64_t dim, const typename Type::Element *const *rows, int64_t count, float *scores) {
    int64_t t = 0;
    for (; t + 2 <= count; t += 2) score_tile<Type, H, 2>(q, dim, rows + t, scores + t, SCORES);
    if (t < count) score_tile<Type, H, 1>(q, dim, rows + t, scores + t, SCORES);
}

template <typename Type>
void score_keys(const float *q, int64_t heads, int64_t dim, const typename Type::Element *const *rows, int64_t count,
                float *scores) {
    int64_t h = 0;
    if constexpr (MOST_HEADS == 8)
        for (; h + 8 <= heads; h += 8) score_heads<Type, 8>(q + h * dim, dim, rows, count, scores + h * SCORES);
    for (; h + 4 <= heads; h += 4) score_heads<Type, 4>(q + h * dim, dim, rows, count, scores + h * SCORES);
    for (; h + 2 <= heads; h += 2) score_heads<Type, 2>(q + h * dim, dim, rows, count, scores + h * SCORES);
    if (h < heads) score_heads<Type, 1>(q + h * dim, dim, rows, count, scores + h * SCORES);
}

// out[h] += sum over t of weights[h * ld + t] * row t, for H heads and P pairs of vectors.
template <typename Type, int H, int P>
void value_tile(const float *weights, int64_t ld, int64_t count, const typename Type::Element *const *rows, int64_t e, float *out,
                int64_t dim) {
    V acc[H][2 * P];
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
        for (int p = 0; p < 2 * P; ++p) acc[h][p] = load(out + h * dim + e + p * W);
    for (int64_t t = 0; t < count; ++t) {
        V v[2 * P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) load_pair(rows[t] + e + 2 * p * W, v[2 * p], v[2 * p + 1], Type());
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) {
            V x = set1(weights[h * ld + t]);
#pragma GCC unroll 8
            for (int p = 0; p < 2 * P; ++p) acc[h][p] = fma(x, v[p], acc[h][p]);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 8
        for (int p = 0; p < 2 * P; ++p) store(out + h * dim + e + p * W, acc[h][p]);
}

// Values of H heads; meanwhile prefetches as many rows of `next`, if it is given.
template <typename Type, int H>
void value_heads(const float *weights, int64_t ld, int64_t count, const typename Type::Element *const *rows,
                 const typename Type::Element *const *next, float *out, int64_t dim) {
    constexpr int P = H < 4 ? 2 : 1;
    int64_t e = 0, prefetched = 0;
    for (; e + 2 * P * W <= dim; e += 2 * P * W) {
        for (; next && prefetched < count && prefetched * dim <= e * count; ++prefetched) prefetch<Type>(next[prefetched], dim);
        value_tile<Type, H, P>(weights, ld, count, rows, e, out, dim);
    }
    for (; e < dim; e += 2 * W) value_tile<Type, H, 1>(weights, ld, count, rows, e, out, dim);
}

template <typename Type>
void value_keys(const float *weights, int64_t ld, int64_t heads, int64_t count, const typename Type::Element *const *rows,
                const typename Type::Element *const *next, float *out, int64_t dim) {
    int64_t h = 0;
    if constexpr (MOST_HEADS == 8)
        for (; h + 8 <= heads; h += 8, next = nullptr)
            value_heads<Type, 8>(weights + h * ld, ld, count, rows, next, out + h * dim, dim);
    for (; h + 4 <= heads; h += 4, next = nullptr)
        value_heads<Type, 4>(weights + h * ld, ld, count, rows, next, out + h * dim, dim);
    for (; h + 2 <= heads; h += 2, next = nullptr)
        value_heads<Type, 2>(weights + h * ld, ld, count, rows, next, out + h * dim, dim);
    if (h < heads) value_heads<Type, 1>(weights + h * ld, ld, count, rows, next, out + h * dim, dim);
}

// scores = exp(scores - anchor) over n elements, which have padding up to a whole vector after them; returns their sum.
float exponentiate(float *scores, int64_t n, float anchor) {
    for (int64_t i = n; i < padded_to(n, W); ++i) scores[i] = -INFINITY;
    V shift = set1(anchor), total = set1(0.0f);
    for (int64_t i = 0; i < n; i += W) {
        V weight = exp(load(scores + i) - shift);
        store(scores + i, weight);
        total = total + weight;
    }
    return sum(total);
}

float highest(float *scores, int64_t n) {
    for (int64_t i = n; i < padded_to(n, W); ++i) scores[i] = -INFINITY;
    V best = load(scores);
    for (int64_t i = W; i < n; i += W) best = vmax(best, load(scores + i));
    return top(best);
}

// Scores of positions first..last-1; also prefetches the first values. Where rows are padded, `spare` holds VALUE_KEYS of them.
template <typename Type, bool Pads>
void score_range(const float *q, int64_t heads, int64_t dim, const Keys &keys, int64_t first, int64_t last, float *scores,
                 typename Type::Element *spare) {
    // The heads of one row stay in the L1 cache, and memory is asked for most evenly in small blocks; those of several do not.
    int64_t width = Pads ? padded(dim) : dim, block = heads > 8 ? VALUE_KEYS : 2, ahead = heads > 8 ? VALUE_KEYS : PREFETCH_KEYS;
    for (int64_t t = first; t < last; t += block) {
        const typename Type::Element *rows[VALUE_KEYS];
        int64_t count = last - t < block ? last - t : block;
        for (int64_t i = 0; i < count; ++i) {
            int64_t later = t + i + ahead;
            rows[i] = row_of<Type>(keys.k, keys, t + i);
            if constexpr (Pads) rows[i] = pad(rows[i], dim, width, spare + i * width);
            if (later < last) prefetch<Type>(row_of<Type>(keys.k, keys, later), dim);
            else if (first + later - last < last) prefetch<Type>(row_of<Type>(keys.v, keys, first + later - last), dim);
        }
        score_keys<Type>(q, heads, width, rows, count, scores + t - first);
    }
}

// sums [count * G, padded E] = values by their weights, each only for the rows that see it: what a row does not see may hold
// anything. Where rows are padded, `spare` holds VALUE_KEYS.
template <typename Type, bool Pads>
void value_range(const DecodeRow *queries, int64_t num, const float *weights, int64_t heads, int64_t dim, const Keys &keys,
                 int64_t base, float *sums, typename Type::Element *spare) {
    int64_t width = Pads ? padded(dim) : dim, lo = 0, hi = 0, last = queries[num - 1].last;
    memset(sums, 0, sizeof(float) * (size_t)(num * heads * width));
    for (int64_t t = queries[0].first; t < last;) {
        while (lo < num && queries[lo].last <= t) ++lo;
        while (hi < num && queries[hi].first <= t) ++hi;
        if (lo >= hi) {
            t = queries[lo].first;
            continue;
        }
        int64_t until = hi < num && queries[hi].first < queries[lo].last ? queries[hi].first : queries[lo].last;
        int64_t count = until - t < VALUE_KEYS ? until - t : VALUE_KEYS;
        const typename Type::Element *rows[VALUE_KEYS], *next[VALUE_KEYS];
        for (int64_t i = 0; i < count; ++i) {
            int64_t later = t + i + VALUE_KEYS;
            rows[i] = row_of<Type>(keys.v, keys, t + i);
            if constexpr (Pads) rows[i] = pad(rows[i], dim, width, spare + i * width);
            next[i] = row_of<Type>(keys.v, keys, later < last ? later : last - 1);
        }
        value_keys<Type>(weights + lo * heads * SCORES + t - base, SCORES, (hi - lo) * heads, count, rows, next,
                         sums + lo * heads * width, width);
        t += count;
    }
}

// Turns the scores of a row's heads into softmax weights: columns count from `base`, and those that the row does not see are 0.
void weigh_row(const DecodeRow &row, int64_t heads, int64_t base, float *scores) {
    for (int64_t h = 0; h < heads; ++h, scores += SCORES) {
        for (int64_t t = 0; t < row.first - base; ++t) scores[t] = -INFINITY;
        row.top[h] = highest(scores, row.last - base);
        row.total[h] = exponentiate(scores, row.last - base, row.top[h]);
    }
}

// Multiplies the columns of positions first..last-1, DECODE_KEYS at most, in the rows of `heads` heads by the positions' scales.
void scale_columns(const float *scales, const Keys &keys, int64_t first, int64_t last, int64_t heads, float *columns) {
    float by[SCORES] = {};
    for (int64_t t = first; t < last; ++t) by[t - first] = scales[slot_of(keys, t) * keys.scale_stride];
    for (int64_t h = 0; h < heads; ++h) multiply(columns + h * SCORES, by, last - first);
}

template <typename Type, bool Pads>
void decode_type(const DecodeRow *rows, int64_t count, int64_t heads, int64_t dim, const Keys &keys, int64_t base,
                 float *scratch) {
    int64_t width = Pads ? padded(dim) : dim, size = heads * width, all = count * heads;
    float *ordered = scratch, *sums = ordered + all * width, *scores = sums + all * width;
    auto *spare = reinterpret_cast<typename Type::Element *>(scores + all * SCORES);
    for (int64_t m = 0; m < count; ++m)
        for (int64_t h = 0; h < heads; ++h)
            order(pad(rows[m].q + h * dim, dim, width, sums), width, ordered + m * size + h * width, Type());
    int64_t first = rows[0].first;
    score_range<Type, Pads>(ordered, all, dim, keys, first, rows[count - 1].last, scores + first - base, spare);
    if (keys.k_scale) scale_columns(keys.k_scale, keys, first, rows[count - 1].last, all, scores + first - base);
    for (int64_t m = 0; m < count; ++m) {
        float *own = scores + m * heads * SCORES;
        weigh_row(rows[m], heads, base, own);
        if (keys.v_scale) scale_columns(keys.v_scale, keys, rows[m].first, rows[m].last, heads, own + rows[m].first - base);
    }
    value_range<Type, Pads>(rows, count, scores, heads, dim, keys, base, sums, spare);
    for (int64_t m = 0; m < count; ++m) {
        if constexpr (!Pads) {
            unorder(sums + m * size, size, rows[m].out, Type());
            continue;
        }
        unorder(sums + m * size, size, ordered, Type());
        for (int64_t h = 0; h < heads; ++h) memcpy(rows[m].out + h * dim, ordered + h * width, sizeof(float) * (size_t)dim);
    }
}

template <typename Type>
void decode_keys(const DecodeRow *rows, int64_t count, int64_t heads, int64_t dim, const Keys &keys, int64_t base,
                 float *scratch) {
    auto *run = padded(dim) == dim ? decode_type<Type, false> : decode_type<Type, true>;
    run(rows, count, heads, dim, keys, base, scratch);
}

void decode(const DecodeRow *rows, int64_t count, int64_t heads, int64_t dim, const Keys *keys, int64_t base, void *scratch) {
    auto *run = keys->dtype == GC_F32 ? decode_keys<F32> : keys->dtype == GC_S8 ? decode_keys<S8> : decode_keys<Bf16>;
    run(rows, count, heads, dim, *keys, base, static_cast<float *>(scratch));
}

// The running softmax state of one block of query rows. The output is stored as [E / 16][M][16], E rounded up, so that both
// products read and write whole cache lines of it.
struct Block : QueryRows {
    int64_t heads, dim;                                      // each row has one query vector per head
    float *q, *out, *scores, *panel, *top, *total, *shrink;  // [M, E], [E / 16, M, 16], [M, KEY_BLOCK], panel, [M]...
    float *key_scales, *value_scales;                        // [KEY_BLOCK] of this block, where the cache has scales

    int64_t queries() const { return rows * heads; }
};

// Scores of query vectors first..last-1 with up to KEY_BLOCK keys.
template <typename Type>
void score_block(const Block &b, int64_t first, int64_t last, const Keys &keys, int64_t low, int64_t high) {
    const typename Type::Element *rows[PANEL], *some[PANEL];
    for (int64_t t = low; t < high; t += PANEL) {
        for (int64_t i = 0; i < PANEL; ++i) rows[i] = row_of<Type>(keys.k, keys, t + i < high ? t + i : high - 1);
        for (int64_t e = 0; e < b.dim; e += K_CHUNK) {
            int64_t dims = b.dim - e < K_CHUNK ? b.dim - e : K_CHUNK;
            for (int i = 0; i < PANEL; ++i) some[i] = rows[i] + e;
            pack_panel<Type>(some, dims, b.panel);
            gemm_panel(b.q + first * b.dim + e, b.dim, last - first, b.panel, dims, b.scores + first * KEY_BLOCK + t - low,
                       KEY_BLOCK, e > 0);
        }
    }
}

// Turns the scores of one query vector, which sees keys from..to-1, into softmax weights, zero elsewhere.
void softmax_query(const Block &b, int64_t query, int64_t from, int64_t to, int64_t count) {
    float *scores = b.scores + query * KEY_BLOCK;
    if (b.key_scales) multiply(scores, b.key_scales, count);
    hide_unseen(scores, from, to, count);
    float best = highest(scores, count), top = b.top[query] > best ? b.top[query] : best;
    b.shrink[query] = expf(b.top[query] - top);
    b.total[query] = b.total[query] * b.shrink[query] + exponentiate(scores, count, top);
    if (b.value_scales) multiply(scores, b.value_scales, count);
    b.top[query] = top;
}

// panel[t * 16 + c] = column e + c of row t, zero from `columns` on and where there is no row.
template <typename Type>
void pack_tail(const typename Type::Element *const *rows, int64_t count, int64_t e, int64_t columns, float *panel) {
    memset(panel, 0, sizeof(float) * (size_t)(count * PANEL));
    for (int64_t t = 0; t < count; ++t)
        for (int64_t c = 0; rows[t] && c < columns; ++c) panel[t * PANEL + c] = Type::one(rows[t] + e + c);
}

// Adds the weighted values of positions low..high-1 to query vectors first..last-1. Values that no query sees are not read.
template <typename Type>
void value_block(const Block &b, int64_t first, int64_t last, const Keys &keys, int64_t low, int64_t high, bool shrinks) {
    const typename Type::Element *rows[KEY_BLOCK];
    int64_t row = first / b.heads, count = high - low, queries = last - first;
    for (int64_t t = low; t < high; ++t) {
        while (b.newest(row) < t && row < b.rows - 1) ++row;
        rows[t - low] = b.sees(row, t, t + 1) ? row_of<Type>(keys.v, keys, t) : nullptr;
    }
    for (int64_t e = 0; e < b.dim; e += PANEL) {
        float *out = b.out + e * b.queries() + first * PANEL;
        if (e + PANEL <= b.dim) {
            for (int64_t t = 0; t < count; ++t)
                for (int c = 0; c < PANEL; c += W)
                    store(b.panel + t * PANEL + c, rows[t] ? Type::vector(rows[t] + e + c) : set1(0.0f));
        } else {
            pack_tail<Type>(rows, count, e, b.dim - e, b.panel);
        }
        if (shrinks)
            for (int64_t m = 0; m < queries; ++m)
                for (int c = 0; c < PANEL; c += W) {
                    float *at = out + m * PANEL + c;
                    store(at, load(at) * set1(b.shrink[first + m]));
                }
        gemm_panel(b.scores + first * KEY_BLOCK, KEY_BLOCK, queries, b.panel, count, out, PANEL, true);
    }
}

// Online-softmax update of all rows that see any of the positions low..high-1.
template <typename Type>
void update_block(const Block &b, const Keys &keys, int64_t low, int64_t high) {
    const auto [first, last] = SeeingRows(b, low, high);
    if (first == last) return;
    score_block<Type>(b, first * b.heads, last * b.heads, keys, low, high);
    if (b.key_scales) gather_scales(b, first, keys, low, high, padded_to(high - low, W), b.key_scales, b.value_scales);
    bool shrinks = false;
    for (int64_t row = first; row < last; ++row) {
        int64_t oldest = b.oldest(row) > low ? b.oldest(row) : low;
        int64_t newest = b.newest(row) < high - 1 ? b.newest(row) : high - 1;
        for (int64_t query = row * b.heads; query < (row + 1) * b.heads; ++query) {
            softmax_query(b, query, oldest - low, newest + 1 - low, high - low);
            shrinks |= b.shrink[query] != 1.0f;
        }
    }
    value_block<Type>(b, first * b.heads, last * b.heads, keys, low, high, shrinks);
}

void store_first(float *to, V x, int64_t count) {
    float whole[W];
    store(whole, x);
    memcpy(to, whole, sizeof(float) * (size_t)count);
}

Block make_block(void *scratch, int64_t rows, int64_t heads, int64_t dim, bool has_scales) {
    int64_t queries = rows * heads;
    Block b = {};
    b.heads = heads, b.dim = dim, b.rows = rows;
    b.panel = static_cast<float *>(scratch);
    if (has_scales) b.key_scales = b.panel + K_CHUNK * PANEL, b.value_scales = b.key_scales + KEY_BLOCK;
    b.q = b.panel + K_CHUNK * PANEL + 2 * KEY_BLOCK;
    b.out = b.q + queries * dim;
    b.scores = b.out + queries * padded_to(dim, PANEL);
    b.top = b.scores + queries * KEY_BLOCK;
    b.total = b.top + queries;
    b.shrink = b.total + queries;
    return b;
}

void prefill(const float *q, float *out, int64_t stride, int64_t rows, int64_t heads, int64_t dim, const int64_t *positions,
             const int64_t *last_visible, int64_t window, const Keys *keys, void *scratch) {
    Block b = make_block(scratch, rows, heads, dim, keys->dtype == GC_S8);
    auto *update = keys->dtype == GC_F32 ? update_block<F32> : keys->dtype == GC_S8 ? update_block<S8> : update_block<Bf16>;
    b.positions = positions, b.last_visible = last_visible, b.window = window;
    for (int64_t row = 0; row < rows; ++row)
        memcpy(b.q + row * heads * dim, q + row * stride, sizeof(float) * (size_t)(heads * dim));
    memset(b.out, 0, sizeof(float) * (size_t)(b.queries() * padded_to(dim, PANEL)));
    for (int64_t query = 0; query < b.queries(); ++query) b.top[query] = -INFINITY, b.total[query] = 0;

    auto [low, high] = SeenKeys(b, *keys);
    while (low < high) {
        int64_t next = low / KEY_BLOCK * KEY_BLOCK + KEY_BLOCK;
        if (next > high) next = high;
        update(b, *keys, low, next);
        low = next;
    }
    for (int64_t query = 0; query < b.queries(); ++query) {
        V scale = set1(b.total[query] > 0 ? 1.0f / b.total[query] : 0.0f);
        float *to = out + query / heads * stride + query % heads * dim;
        for (int64_t e = 0; e < dim; e += W) {
            V result = load(b.out + (e / PANEL * b.queries() + query) * PANEL + e % PANEL) * scale;
            if (e + W <= dim) store(to + e, result);
            else store_first(to + e, result, dim - e);
        }
    }
}

int64_t prefill_rows(int64_t heads, int64_t dim) {
    int64_t queries = BLOCK_ELEMENTS / dim;
    return queries < heads ? 1 : queries / heads;
}

size_t scratch_bytes(int64_t heads, int64_t dim) {
    int64_t queries = prefill_rows(heads, dim) * heads;
    int64_t blocks = K_CHUNK * PANEL + 2 * KEY_BLOCK + queries * (dim + padded_to(dim, PANEL) + KEY_BLOCK + 3);
    int64_t vectors = heads > DECODE_QUERIES ? heads : DECODE_QUERIES;
    int64_t streams = vectors * (2 * padded(dim) + SCORES) + VALUE_KEYS * padded(dim);  // the last for padded copies of rows
    return sizeof(float) * (size_t)(blocks > streams ? blocks : streams);
}

}  // namespace

extern const AttentionKernels GC_NAME(attention) = {decode, prefill, scratch_bytes, prefill_rows};

}  // namespace gemcutter
