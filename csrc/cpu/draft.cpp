// An assistant's drafts, several in a row in one call: embedding, projections, layers, head and the choice of each token.
//
// Owns the chain and the head over the rows under the nearest centroids; everything else is the ops that targets have too. Only
// the most likely token is chosen here: where tokens are sampled the caller asks for one draft at a time, and for its logits.
// Refuses to know how many drafts are worth it. Read `model/drafter.py` for the definition.
#include <math.h>
#include <string.h>

#include <algorithm>

#include "bounds.h"
#include "layer_ops.h"
#include "parallel_region.h"

GC_EXPORT int gc_embed(const gc_matrix *table, const int64_t *ids, int64_t count, float scale, float *out);
GC_EXPORT int gc_linear(const gc_matrix *parts, int num_parts, const float *x, int64_t rows, int activations, float *out);
GC_EXPORT int gc_final_norm(const float *x, const float *weight, float eps, int64_t rows, int64_t n, float *out);
GC_EXPORT int gc_lm_head(const gc_matrix *head, const float *x, int64_t rows, int activations, float cap, float *out);
GC_EXPORT int gc_layer_forward(const gc_layer *layer, const gc_step *step, const gc_step *kept, const gc_kv *kv,
                               const int64_t *keep, const float *x, const float *ple, int64_t ple_stride, float *out);

namespace gemcutter {
namespace {

Arena &draft_arena() {
    static thread_local Arena arena;  // apart from thread_arena(), which every op of the chain clears
    return arena;
}

// Rows of the head that a row is drafted from.
int64_t choices_of(const gc_drafter &drafter) {
    return drafter.centroids.rows ? drafter.top_k * (drafter.head.rows / drafter.centroids.rows) : drafter.head.rows;
}

// The `top_k` largest of `count` scores, in ascending order of their places; the lower place among equals.
void find_nearest(float *scores, int64_t count, int64_t top_k, int64_t *places, int64_t *nearest) {
    for (int64_t i = 0; i < count; ++i) {
        if (isnan(scores[i])) scores[i] = -INFINITY;  // sorting needs an order
        places[i] = i;
    }
    std::nth_element(places, places + top_k - 1, places + count,
                     [&](int64_t a, int64_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; });
    std::sort(places, places + top_k);
    memcpy(nearest, places, sizeof(int64_t) * (size_t)top_k);
}

class Chain {
  public:
    Chain(Arena &arena, const gc_drafter &drafter, int64_t rows, float *logits)
        : drafter_(drafter), rows_(rows), choices_(choices_of(drafter)) {
        int64_t wide = rows * drafter.target_hidden, narrow = rows * drafter.hidden, centroids = drafter.centroids.rows;
        embedded_ = arena.array<float>(wide);
        joined_ = arena.array<float>(2 * wide);
        x_ = arena.array<float>(narrow);
        y_ = arena.array<float>(narrow);
        scores_ = arena.array<float>(rows * centroids);
        places_ = arena.array<int64_t>(centroids);
        nearest_ = arena.array<int64_t>(rows * drafter.top_k);
        logits_ = logits ? logits : arena.array<float>(rows * choices_);
    }

    // One token more: logits of the tokens after `ids`, and in place of `states` those behind them.
    int forward(const gc_step *const *steps, const gc_kv *const *kv, const int64_t *ids, float *states) {
        int64_t width = drafter_.target_hidden;
        if (int code = gc_embed(&drafter_.embed, ids, rows_, drafter_.embed_scale, embedded_)) return code;
        for (int64_t row = 0; row < rows_; ++row) {
            memcpy(joined_ + 2 * row * width, embedded_ + row * width, sizeof(float) * (size_t)width);
            memcpy(joined_ + (2 * row + 1) * width, states + row * width, sizeof(float) * (size_t)width);
        }
        if (int code = gc_linear(&drafter_.in, 1, joined_, rows_, GC_FLOAT_ROWS, x_)) return code;
        for (int64_t i = 0; i < drafter_.num_layers; ++i, std::swap(x_, y_))
            if (int code = gc_layer_forward(drafter_.layers[i], steps[i], steps[i], kv[i], nullptr, x_, nullptr, 0, y_))
                return code;
        if (int code = gc_final_norm(x_, drafter_.norm, drafter_.eps, rows_, drafter_.hidden, y_)) return code;
        if (int code = gc_linear(&drafter_.out, 1, y_, rows_, GC_FLOAT_ROWS, states)) return code;
        return head();
    }

    // Writes the likeliest token of each row, the lowest among equals, and how likely it is among the row's choices.
    void take_likeliest(int64_t *drafts, float *chances) const {
        parallel_region([&](ThreadPool &pool, int index) {
            Range own = share(rows_, 1, index, pool.size);
            for (int64_t row = own.first; row < own.last; ++row) {
                const float *logits = logits_ + row * choices_;
                float largest, sum;
                kernels().vector_ops->softmax_top(logits, choices_, &largest, &sum);
                int64_t found = -1;
                for (int64_t i = 0; i < choices_; ++i)
                    if (logits[i] == largest && (found < 0 || token(row, i) < found)) found = token(row, i);
                drafts[row] = found < 0 ? 0 : found;  // none equals NaN
                chances[row] = 1.0f / sum;
            }
        });
    }

    void list_candidates(int64_t *tokens) const {
        for (int64_t row = 0; row < rows_; ++row)
            for (int64_t i = 0; i < choices_; ++i) tokens[row * choices_ + i] = token(row, i);
    }

  private:
    int64_t token(int64_t row, int64_t place) const {
        if (!drafter_.centroids.rows) return place;
        int64_t each = choices_ / drafter_.top_k;
        return drafter_.order[nearest_[row * drafter_.top_k + place / each] * each + place % each];
    }

    int head() {
        const gc_matrix &centroids = drafter_.centroids;
        if (!centroids.rows) return gc_lm_head(&drafter_.head, y_, rows_, drafter_.activations, drafter_.softcap, logits_);
        if (int code = gc_linear(&centroids, 1, y_, rows_, GC_FLOAT_ROWS, scores_)) return code;
        for (int64_t row = 0; row < rows_; ++row)
            find_nearest(scores_ + row * centroids.rows, centroids.rows, drafter_.top_k, places_,
                         nearest_ + row * drafter_.top_k);
        return multiply_nearest();
    }

    // Products of each row with the head's panels under its nearest centroids.
    int multiply_nearest() {
        const gc_matrix &table = drafter_.head;
        const int64_t panels = table.rows / drafter_.centroids.rows / PANEL, all = rows_ * drafter_.top_k * panels;
        return in_arena([&](Arena &arena) {
            ConvertedRows converted = allocate_rows(arena, formats_of(&table, 1, 1, drafter_.activations), rows_, drafter_.hidden,
                                                    drafter_.activations);
            Scratch scratch;
            scratch.allocate(arena, scratch_bytes(&table, 1));
            auto panel_of = [&](int64_t item) { return nearest_[item / panels] * panels + item % panels; };
            parallel_region([&](ThreadPool &pool, int index) {
                convert_rows(pool, index, converted, y_);
                pool.barrier();
                Range own = share(all, 1, index, pool.size);
                for (int64_t item = own.first; item < own.last; ++item) {
                    int64_t row = item / panels / drafter_.top_k;
                    const void *next = item + 1 < own.last ? panel_at(table, panel_of(item + 1)) : nullptr;
                    matmul_kernels(table).gemm_panels(&table, panel_of(item), 1, &converted.rows, row, row + 1,
                                                      logits_ + item * PANEL, PANEL, scratch.of(index), next);
                }
            });
        });
    }

    const gc_drafter &drafter_;
    int64_t rows_, choices_;
    float *embedded_, *joined_, *x_, *y_, *scores_, *logits_;
    int64_t *places_, *nearest_;
};

}  // namespace
}  // namespace gemcutter

// drafts [count, rows]: `count` tokens in a row after `ids` [rows], each the likeliest, and how likely each was, chances
// [count, rows]. `steps` and `kv` have an entry for each layer. states [rows, T] come from the target and become those behind
// the last draft. `logits` [rows, choices] are the last draft's, over the tokens `candidates`; either may be null.
GC_EXPORT int gc_draft(const gc_drafter *drafter, const gc_step *const *steps, const gc_kv *const *kv, int64_t rows,
                       int64_t count, const int64_t *ids, float *states, int64_t *drafts, float *chances, float *logits,
                       int64_t *candidates) {
    using namespace gemcutter;
    Arena &arena = draft_arena();
    try {
        arena.clear();
        Chain chain(arena, *drafter, rows, logits);
        for (int64_t i = 0; i < count; ++i) {
            if (int code = chain.forward(steps, kv, i ? drafts + (i - 1) * rows : ids, states)) return code;
            chain.take_likeliest(drafts + i * rows, chances + i * rows);
        }
        if (candidates) chain.list_candidates(candidates);
        return 0;
    } catch (const std::bad_alloc &) { return 1; }
}
