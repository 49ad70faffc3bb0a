// Attention of an image's patches to each other on processors with AVX512_BF16: bfloat16 products, float32 softmax and sums.
//
// Owns the blocks: some queries times some keys, whose weights then multiply the values, all of it in the L2 cache. Refuses to know
// how keys and values became pairs: read `vision.cpp` for that, `kernels.h` for their order, `attention.cpp` for other attention.
#include <math.h>

#include "kernels.h"
#include "softmax_bf16.h"

namespace gemcutter {
namespace {

constexpr int64_t QUERIES = 8 * BF16_ROWS, KEYS = 256;  // of a block
// From one query to the next: no power of two, or rows would compete for a few sets of the L1 cache.
constexpr int64_t SCORES_LD = KEYS + PANEL, WEIGHTS_LD = KEYS + 2 * PANEL;

struct Buffers {
    float *scores, *sums, *top, *total;  // [QUERIES, SCORES_LD], [QUERIES, E'], [QUERIES] each
    uint16_t *weights;                   // [QUERIES, WEIGHTS_LD]
};

Buffers buffers_in(void *scratch, int64_t width) {
    Buffers b;
    b.scores = static_cast<float *>(scratch);
    b.sums = b.scores + QUERIES * SCORES_LD;
    b.top = b.sums + QUERIES * width;
    b.total = b.top + QUERIES;
    b.weights = reinterpret_cast<uint16_t *>(b.total + QUERIES);
    return b;
}

// Makes weights of one query's scores, and brings what was summed for it to the new largest score.
void weigh(const Buffers &b, int64_t query, int64_t count, int64_t seen, int64_t width) {
    float *scores = b.scores + query * SCORES_LD, *sums = b.sums + query * width;
    for (int64_t t = seen; t < count; ++t) scores[t] = -INFINITY;
    float best = highest(scores, count), anchor = best > b.top[query] ? best : b.top[query];
    float shrink = expf(b.top[query] - anchor);
    b.total[query] = b.total[query] * shrink + exponentiate(scores, count, anchor, b.weights + query * WEIGHTS_LD);
    b.top[query] = anchor;
    if (shrink != 1.0f)
        for (int64_t e = 0; e < width; e += W) store(sums + e, load(sums + e) * set1(shrink));
}

void attention(const uint32_t *q, int64_t ldq, float *out, int64_t ldo, int64_t rows, int64_t dim, const KeyPairs *keys,
               void *scratch) {
    int64_t width = padded_to(dim, PANEL), padded = padded_to(keys->count, 2 * PANEL);
    Buffers b = buffers_in(scratch, width);
    memset(b.sums, 0, sizeof(float) * (size_t)(rows * width));
    for (int64_t m = 0; m < rows; ++m) b.top[m] = -INFINITY, b.total[m] = 0;
    for (int64_t first = 0; first < padded; first += KEYS) {
        int64_t count = padded - first < KEYS ? padded - first : KEYS, left = keys->count - first;
        for (int64_t t = 0; t < count; t += PANEL)
            pair_panel(q, ldq, rows, keys->k + (first + t) * (dim / 2), PANEL, dim / 2, b.scores + t, SCORES_LD, false);
        for (int64_t m = 0; m < rows; ++m) weigh(b, m, count, left < count ? left : count, width);
        const uint32_t *weights = reinterpret_cast<const uint32_t *>(b.weights), *values = keys->v + first / 2 * PANEL;
        for (int64_t e = 0; e < width; e += PANEL)
            pair_panel(weights, WEIGHTS_LD / 2, rows, values + e * (padded / 2), PANEL, count / 2, b.sums + e, width, true);
    }
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t e = 0; e < dim; ++e) out[m * ldo + e] = b.sums[m * width + e] / b.total[m];
}

size_t scratch_bytes(int64_t dim) {
    return sizeof(float) * (size_t)(QUERIES * (SCORES_LD + padded_to(dim, PANEL) + 2)) + sizeof(uint16_t) * QUERIES * WEIGHTS_LD;
}

}  // namespace

extern const PairAttention pair_attention_avx512_bf16 = {attention, scratch_bytes, QUERIES};

}  // namespace gemcutter
