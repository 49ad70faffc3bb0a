// The mixture of experts: the router's top-k choice, grouping of rows by expert, and the grouped GEMMs over all chosen experts.
//
// Owns the order of sums (ascending experts, whatever the batch) and the list of (row, expert) pairs, sorted by expert so that an
// expert's rows are contiguous. The router runs in float32, so that its choice is stable. Read `layer_ops.h` for how this joins
// the dense branch in `Mlp`, `ops/reference.py` for the definition.
#include <math.h>
#include <string.h>

#include "layer_ops.h"

namespace gemcutter {

constexpr int64_t ELSEWHERE = -1;         // the place of a pair whose expert another rank holds
constexpr int64_t PIECES_OF_THREAD = 64;  // experts differ in rows: small pieces keep threads equally busy

Experts::Experts(Arena &arena, const gc_layer &layer, int64_t rows, const AdapterRuns &adapters)
    : layer_(layer), experts_(*layer.experts), rows_(rows) {
    const gc_experts &moe = experts_;
    const gc_matrix in[2] = {moe.gate[0], moe.up[0]};
    int64_t hidden = layer.hidden, pairs = rows * moe.top_k;
    routed_.allocate(arena, &moe.router, 1, rows, hidden, GC_FLOAT_ROWS);
    router_changes_.allocate(arena, adapters, {&moe.router});
    normed_ = arena.array<float>(rows * hidden);
    if (rows > 1) row_rows_ = allocate_rows(arena, formats_at_any_count(in, 2), rows, hidden, layer.activations);
    pair_rows_ = allocate_rows(arena, formats_at_any_count(in, 2), rows == 1 ? 1 : pairs, hidden, layer.activations);
    if (pair_rows_.formats & FORMAT_FLOAT && !pair_rows_.rows.x)
        pair_rows_.rows.x = rows == 1 ? normed_ : arena.array<float>(pairs * hidden);
    if (rows > 1 && row_rows_.formats & FORMAT_FLOAT && !row_rows_.rows.x) row_rows_.rows.x = normed_;
    gated_.allocate(arena, formats_at_any_count(moe.down, 1), pairs, moe.width, layer.activations);
    router_logits_ = arena.array<float>(rows * moe.experts);
    weights_ = arena.array<float>(pairs);
    product_ = arena.array<float>(pairs * hidden);
    chosen_ = arena.array<int64_t>(pairs);
    places_ = arena.array<int64_t>(pairs);
    row_of_ = arena.array<int64_t>(pairs);
    groups_ = arena.array<Group>(moe.held);
    size_t gated = geglu_scratch_bytes(&moe.gate[0], &moe.up[0], rows), down = scratch_bytes(moe.down, 1);
    size_t router = scratch_bytes(&moe.router, 1), most = gated > down ? gated : down;
    scratch_.allocate(arena, most > router ? most : router);
}

// Activation formats for any number of rows that an expert may get.
int Experts::formats_at_any_count(const gc_matrix *parts, int num_parts) const {
    int formats = 0;
    for (int64_t count = 1; count <= rows_; ++count) formats |= formats_of(parts, num_parts, count, layer_.activations);
    // An expert's rows begin anywhere among those of all, which blocks of 16 rows do not.
    if (formats & FORMAT_TILES) formats |= FORMAT_BF16;
    return formats & ~(FORMAT_TILES | FORMAT_PAIRS);
}

void Experts::route(ThreadPool &pool, int index, const float *x) {
    const VectorOps &ops = *kernels().vector_ops;
    int64_t hidden = layer_.hidden;
    Range own = own_rows(rows_, index, pool.size);
    for (int64_t n = own.first; n < own.last; ++n) {
        float *row = routed_.row(n);
        ops.rms_norm(x + n * hidden, experts_.router_scale, layer_.eps, hidden, row);
        routed_.convert(n);
        ops.rms_norm(x + n * hidden, experts_.norm, layer_.eps, hidden, normed_ + n * hidden);
        convert_row(rows_ > 1 ? row_rows_ : pair_rows_, n, normed_ + n * hidden);
    }
    pool.barrier();
    if (router_changes_.reduce(pool, index, routed_.x)) pool.barrier();
    parallel_gemm(pool, index, &experts_.router, 1, routed_.converted.rows, router_logits_, experts_.experts, scratch_.of(index),
                  COUNT_ROUTER, router_changes_);
    pool.barrier();
    for (int64_t n = own.first; n < own.last; ++n) route(n);
    pool.barrier();
    if (index == 0) group();
    pool.barrier();
    if (rows_ == 1) return;
    Range pairs = own_rows(placed_, index, pool.size);
    for (int64_t pair = pairs.first; pair < pairs.last; ++pair) copy_row(row_rows_.rows, row_of_[pair], pair_rows_.rows, pair);
    pool.barrier();
}

// Chooses a row's experts: the top_k of the softmax, the lower index among equals, with weights renormalised to sum to 1.
void Experts::route(int64_t row) {
    const float *scores = router_logits_ + row * experts_.experts;
    int64_t *chosen = chosen_ + row * experts_.top_k, top_k = experts_.top_k, found = 0;
    float *weights = weights_ + row * top_k;
    for (int64_t expert = 0; expert < experts_.experts; ++expert) {  // insertion into a list in descending order
        int64_t place = found;
        while (place > 0 && scores[expert] > scores[chosen[place - 1]]) --place;
        if (place == top_k) continue;
        int64_t last = found < top_k ? found++ : top_k - 1;
        memmove(chosen + place + 1, chosen + place, sizeof(int64_t) * (size_t)(last - place));
        chosen[place] = expert;
    }
    float best = scores[chosen[0]], total = 0.0f;
    for (int64_t k = 1; k < top_k; ++k) {  // to ascending order
        int64_t expert = chosen[k], place = k;
        for (; place > 0 && chosen[place - 1] > expert; --place) chosen[place] = chosen[place - 1];
        chosen[place] = expert;
    }
    for (int64_t k = 0; k < top_k; ++k) total += weights[k] = expf(scores[chosen[k]] - best);
    for (int64_t k = 0; k < top_k; ++k) weights[k] = weights[k] / total * experts_.expert_scale[chosen[k]];
}

// Sorts all pairs whose experts this rank holds by expert, then by row. Experts count from the first one held.
void Experts::group() {
    int64_t pairs = rows_ * experts_.top_k, held = experts_.held;
    const auto number_of = [&](int64_t pair) { return chosen_[pair] - experts_.first; };
    const auto is_held = [&](int64_t pair) { return number_of(pair) >= 0 && number_of(pair) < held; };
    for (int64_t expert = 0; expert < held; ++expert) groups_[expert] = {expert, 0, 0};
    for (int64_t pair = 0; pair < pairs; ++pair)
        if (is_held(pair)) ++groups_[number_of(pair)].count;
    placed_ = 0;
    for (int64_t expert = 0; expert < held; ++expert) {
        groups_[expert].first = placed_;
        placed_ += groups_[expert].count;
        groups_[expert].count = 0;
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
        places_[pair] = ELSEWHERE;
        if (!is_held(pair)) continue;
        Group &group = groups_[number_of(pair)];
        int64_t place = group.first + group.count++;
        places_[pair] = place;
        row_of_[place] = pair / experts_.top_k;
    }
    num_groups_ = 0;
    for (int64_t expert = 0; expert < held; ++expert)
        if (groups_[expert].count) groups_[num_groups_++] = groups_[expert];
}

// The rows of one expert among those of all pairs.
Rows Experts::rows_of(const Rows &all, const Group &group) const {
    Rows rows = all;
    int64_t first = all.count == 1 ? 0 : group.first, blocks = all.columns / BLOCK;
    rows.count = group.count;
    if (rows.x) rows.x += first * all.columns;
    if (rows.q) rows.q += first * all.columns, rows.scale += first * blocks, rows.sum += first * blocks;
    if (rows.halves) rows.halves += first * 2 * blocks;
    if (rows.bf16) rows.bf16 += first * all.columns;
    return rows;
}

// Calls item(group, panels) once for all panels of every chosen expert, some of them at a time, on some thread.
template <typename Item>
void Experts::for_each_panels(ThreadPool &pool, int counter, const gc_matrix &like, int64_t at_once, Item item) const {
    int64_t each = groups_of(like, at_once), items = num_groups_ * each, piece = items / (PIECES_OF_THREAD * pool.size) + 1;
    for (int64_t start; (start = pool.counters[counter].fetch_add(piece, std::memory_order_relaxed)) < items;)
        for (int64_t i = start; i < start + piece && i < items; ++i)
            item(groups_[i / each], panels_of_group(like, i % each, at_once));
}

void Experts::run(ThreadPool &pool, int index) {
    int64_t hidden = layer_.hidden;
    void *scratch = scratch_.of(index);
    int64_t at_once = rows_ > 1 ? panels_at_once(experts_.gate[0], experts_.up[0]) : 1;
    for_each_panels(pool, COUNT_EXPERTS_IN, experts_.gate[0], at_once, [&](const Group &group, const Panels &panels) {
        const gc_matrix &gate = experts_.gate[group.expert], &up = experts_.up[group.expert];
        Rows rows = rows_of(pair_rows_.rows, group);
        geglu_panels(gate, up, panels, rows, 0, group.count, {experts_.width, gated_.row(group.first), nullptr}, scratch);
    });
    pool.barrier();
    Range pairs = own_rows(placed_, index, pool.size);
    for (int64_t pair = pairs.first; pair < pairs.last; ++pair) gated_.convert(pair);
    pool.barrier();
    at_once = rows_ > 1 ? panels_at_once(experts_.down[0], experts_.down[0]) : 1;
    for_each_panels(pool, COUNT_EXPERTS_OUT, experts_.down[0], at_once, [&](const Group &group, const Panels &panels) {
        const gc_matrix &down = experts_.down[group.expert];
        Rows rows = rows_of(gated_.converted.rows, group);
        float *out = product_ + group.first * hidden + panels.first * PANEL;
        matmul_kernels(down).gemm_panels(&down, panels.first, panels.count, &rows, 0, group.count, out, hidden, scratch, nullptr);
    });
    pool.barrier();
}

void Experts::sum(int64_t row, float *out) const {
    int64_t hidden = layer_.hidden, first = row * experts_.top_k;
    memset(out, 0, sizeof(float) * (size_t)hidden);
    for (int64_t k = first; k < first + experts_.top_k; ++k)
        if (places_[k] != ELSEWHERE) kernels().vector_ops->add_scaled(product_ + places_[k] * hidden, weights_[k], hidden, out);
}

}  // namespace gemcutter
