// The lines of a dense layer and their entry points, each one parallel region: project, mix, feed, inject, and a whole layer.
//
// Owns the order of norms, products and residuals; every float32 sum follows ops/reference.py. Refuses to know how matrices are
// multiplied, attention is cut and threads wait. Read `lines.h` for how lines share a region, `experts.cpp` for the mixture of
// experts, `ends.cpp` for what stands before the first and after the last layer.
#include <string.h>

#include "lines.h"
#include "region.h"

namespace gemcutter {

void Scratch::take(Arena &arena, size_t bytes) {
    stride = (bytes + 127) / 128 * 128;  // no two threads share a cache line, nor the pair that is fetched together
    memory = static_cast<char *>(arena.take(stride * (size_t)threads()));
}

void Entering::take(Arena &arena, const gc_matrix *parts, int num_parts, int64_t count, int64_t columns, int activations) {
    take(arena, forms_of(parts, num_parts, count, activations), count, columns, activations);
}

void Entering::take(Arena &arena, int wanted, int64_t count, int64_t columns, int activations) {
    x = arena.array<float>(count * columns);
    forms = take_forms(arena, wanted, count, columns, activations);
    if (!forms.rows.x) forms.rows.x = x;
}

// ---- project ----

Project::Project(Arena &arena, const gc_layer &layer, const gc_step &step, const int64_t *keep, int64_t kept)
    : layer_(layer), step_(step), keep_(keep), kept_(keep ? kept : step.rows), q_width_(layer.attn_in[0].rows),
      kv_width_(layer.attn_in[1].rows + layer.attn_in[2].rows), num_kv_(!!layer.attn_in[1].rows + !!layer.attn_in[2].rows) {
    const gc_matrix *parts = layer.attn_in;
    all_.take(arena, keep ? parts + 1 : parts, num_kv_ + !keep, step.rows, layer.hidden, layer.activations);
    if (keep) {
        wanted_.take(arena, parts, 1, kept_, layer.hidden, layer.activations);
        kv_ = arena.array<float>(step.rows * kv_width_);
        raw_q_ = arena.array<float>(kept_ * q_width_);
        kv_stride_ = kv_width_, q_stride_ = q_width_;
    } else {
        raw_q_ = arena.array<float>(step.rows * (q_width_ + kv_width_));
        kv_ = raw_q_ + q_width_;
        kv_stride_ = q_stride_ = q_width_ + kv_width_;
    }
    scratch_.take(arena, scratch_bytes(parts, 1 + num_kv_));
    spare_.take(arena, sizeof(float) * (size_t)(2 * layer.attention.head_dim));
}

void Project::run(Team &team, int index, const float *x, float *q) {
    const Words &words = *kernels().words;
    const gc_attention &shape = layer_.attention;
    int64_t rows = step_.rows, hidden = layer_.hidden;
    warm(team, index, layer_.attn_in, 1 + num_kv_, rows);
    Range own = own_rows(rows, index, team.size);
    for (int64_t n = own.first; n < own.last; ++n) {
        words.rms_norm(x + n * hidden, layer_.attn_norm, layer_.eps, hidden, all_.row(n));
        all_.finish(n);
    }
    if (keep_) {  // in another thread's range perhaps: normed anew
        Range kept = own_rows(kept_, index, team.size);
        for (int64_t m = kept.first; m < kept.last; ++m) {
            words.rms_norm(x + keep_[m] * hidden, layer_.attn_norm, layer_.eps, hidden, wanted_.row(m));
            wanted_.finish(m);
        }
    }
    team.barrier();
    void *scratch = scratch_.of(index);
    if (keep_) {
        multiply(team, index, layer_.attn_in + 1, num_kv_, all_.forms.rows, kv_, kv_stride_, scratch, COUNT_KV);
        if (kept_) multiply(team, index, layer_.attn_in, 1, wanted_.forms.rows, raw_q_, q_stride_, scratch, COUNT_Q);
    } else {
        multiply(team, index, layer_.attn_in, 1 + num_kv_, all_.forms.rows, raw_q_, q_stride_, scratch, COUNT_KV);
    }
    team.barrier();
    Range heads = share(kept_ * shape.heads, 1, index, team.size);
    for (int64_t i = heads.first; i < heads.last; ++i) finish_query(i / shape.heads, i % shape.heads, q);
    Range keys = share(num_kv_ ? rows * shape.kv_heads : 0, 1, index, team.size);
    for (int64_t i = keys.first; i < keys.last; ++i)
        write_keys(i / shape.kv_heads, i % shape.kv_heads, static_cast<float *>(spare_.of(index)));
}

void Project::finish_query(int64_t m, int64_t head, float *q) const {
    const Words &words = *kernels().words;
    int64_t dim = layer_.attention.head_dim, at = (keep_ ? keep_[m] : m) * (dim / 2);
    float *out = q + (m * layer_.attention.heads + head) * dim;
    words.rms_norm(raw_q_ + m * q_stride_ + head * dim, layer_.q_norm, layer_.eps, dim, out);
    words.rope(out, step_.cos + at, step_.sin + at, dim);
}

void Project::write_keys(int64_t n, int64_t head, float *spare) const {
    const Words &words = *kernels().words;
    const gc_attention &shape = layer_.attention;
    int64_t dim = shape.head_dim, at = n * (dim / 2), slot = (step_.slots[n] * shape.kv_heads + head) * dim;
    const float *raw_k = kv_ + n * kv_stride_ + head * dim, *raw_v = raw_k + (num_kv_ == 2 ? layer_.attn_in[1].rows : 0);
    float *k = spare, *v = spare + dim;
    words.rms_norm(raw_k, layer_.k_norm, layer_.eps, dim, k);
    words.rope(k, step_.cos + at, step_.sin + at, dim);
    if (layer_.has_v_norm)
        words.rms_norm(raw_v, nullptr, layer_.eps, dim, v);
    else
        memcpy(v, raw_v, sizeof(float) * (size_t)dim);
    if (shape.dtype == GC_BF16) {
        words.to_bf16(k, dim, (uint16_t *)shape.k + slot);
        words.to_bf16(v, dim, (uint16_t *)shape.v + slot);
    } else {
        memcpy((float *)shape.k + slot, k, sizeof(float) * (size_t)dim);
        memcpy((float *)shape.v + slot, v, sizeof(float) * (size_t)dim);
    }
}

// ---- mix ----

Mix::Mix(Arena &arena, const gc_layer &layer, int64_t rows) : layer_(layer), rows_(rows) {
    const gc_matrix &weight = layer.attn_out;
    forms_ = take_forms(arena, forms_of(&weight, 1, rows, layer.activations), rows, weight.columns, layer.activations);
    product_ = arena.array<float>(rows * layer.hidden);
    scratch_.take(arena, scratch_bytes(&weight, 1));
}

void Mix::run(Team &team, int index, const float *x, const int64_t *keep, const float *o, float *out) {
    int64_t hidden = layer_.hidden;
    warm(team, index, &layer_.attn_out, 1, rows_);
    make_forms(team, index, forms_, o);
    team.barrier();
    multiply(team, index, &layer_.attn_out, 1, forms_.rows, product_, hidden, scratch_.of(index), COUNT_OUT);
    team.barrier();
    Range own = own_rows(rows_, index, team.size);
    for (int64_t m = own.first; m < own.last; ++m) {
        const float *residual = x + (keep ? keep[m] : m) * hidden, *row = product_ + m * hidden;
        kernels().words->add_norm(residual, row, layer_.attn_post_norm, layer_.eps, 1.0f, hidden, out + m * hidden);
    }
}

// ---- feed ----

Feed::Feed(Arena &arena, const gc_layer &layer, int64_t rows) : layer_(layer), rows_(rows) {
    const gc_matrix in[2] = {layer.gate, layer.up};
    normed_.take(arena, in, 2, rows, layer.hidden, layer.activations);
    gated_.take(arena, &layer.down, 1, rows, layer.down.columns, layer.activations);
    product_ = arena.array<float>(rows * layer.hidden);
    size_t bytes = gated_scratch_bytes(&layer.gate, &layer.up), down = scratch_bytes(&layer.down, 1);
    scratch_.take(arena, bytes > down ? bytes : down);
    if (layer.experts) experts_.emplace(arena, layer, rows);
}

void Feed::run(Team &team, int index, const float *x, float *out, float scale) {
    int64_t hidden = layer_.hidden;
    warm(team, index, &layer_.gate, 1, rows_);
    Range own = own_rows(rows_, index, team.size);
    for (int64_t m = own.first; m < own.last; ++m) {
        kernels().words->rms_norm(x + m * hidden, layer_.mlp_norm, layer_.eps, hidden, normed_.row(m));
        normed_.finish(m);
    }
    if (experts_)
        experts_->route(team, index, x);
    else
        team.barrier();
    void *scratch = scratch_.of(index);
    multiply_gated(team, index, &layer_.gate, &layer_.up, normed_.forms.rows, gated_.x, layer_.down.columns, scratch,
                   COUNT_GATED);
    warm(team, index, &layer_.down, 1, rows_);
    team.barrier();
    make_forms(team, index, gated_.forms, gated_.x);
    team.barrier();
    multiply(team, index, &layer_.down, 1, gated_.forms.rows, product_, hidden, scratch, COUNT_DOWN);
    if (experts_)
        experts_->run(team, index);
    else
        team.barrier();
    for (int64_t m = own.first; m < own.last; ++m) join(m, x + m * hidden, out + m * hidden, scale);
}

// Close one row: norm and residual, after the sum of both branches where there are experts.
void Feed::join(int64_t m, const float *x, float *out, float scale) {
    const Words &words = *kernels().words;
    int64_t hidden = layer_.hidden;
    float *y = product_ + m * hidden;
    if (experts_) {
        float *mixed = normed_.row(m);  // read to the end by now
        experts_->sum(m, mixed);
        words.rms_norm(y, layer_.experts->dense_branch_norm, layer_.eps, hidden, y);
        words.add_norm(y, mixed, layer_.experts->expert_branch_norm, layer_.eps, 1.0f, hidden, y);
    }
    words.add_norm(x, y, layer_.mlp_post_norm, layer_.eps, scale, hidden, out);
}

// ---- inject ----

Inject::Inject(Arena &arena, const gc_layer &layer, int64_t rows) : layer_(layer), rows_(rows) {
    entering_.take(arena, &layer.ple_gate, 1, rows, layer.hidden, layer.activations);
    gated_.take(arena, &layer.ple_out, 1, rows, layer.ple_dim, layer.activations);
    product_ = arena.array<float>(rows * layer.hidden);
    size_t in = scratch_bytes(&layer.ple_gate, 1), out = scratch_bytes(&layer.ple_out, 1);
    scratch_.take(arena, in > out ? in : out);
}

void Inject::run(Team &team, int index, const float *x, const float *ple, int64_t stride, float *out, float scale) {
    const Words &words = *kernels().words;
    int64_t hidden = layer_.hidden, dim = layer_.ple_dim;
    void *scratch = scratch_.of(index);
    warm(team, index, &layer_.ple_gate, 1, rows_);
    Range own = own_rows(rows_, index, team.size);
    for (int64_t m = own.first; m < own.last; ++m) {
        memcpy(entering_.row(m), x + m * hidden, sizeof(float) * (size_t)hidden);
        entering_.finish(m);
    }
    team.barrier();
    multiply(team, index, &layer_.ple_gate, 1, entering_.forms.rows, gated_.x, dim, scratch, COUNT_PLE_GATE);
    warm(team, index, &layer_.ple_out, 1, rows_);
    team.barrier();
    for (int64_t m = own.first; m < own.last; ++m) {
        words.gelu_mul(gated_.row(m), ple + m * stride, dim, gated_.row(m));
        gated_.finish(m);
    }
    team.barrier();
    multiply(team, index, &layer_.ple_out, 1, gated_.forms.rows, product_, hidden, scratch, COUNT_PLE_OUT);
    team.barrier();
    for (int64_t m = own.first; m < own.last; ++m)
        words.add_norm(x + m * hidden, product_ + m * hidden, layer_.ple_post_norm, layer_.eps, scale, hidden, out + m * hidden);
}

}  // namespace gemcutter

// Every entry gives 0, or 1 if there is no memory for the rows on their way.

// q [M, H, E]: queries of the rows that `keep` lists (null: of all), M of them; keys and values of all rows are written.
GC_EXPORT int gc_project(const gc_layer *layer, const gc_step *step, const float *x, const int64_t *keep, int64_t kept,
                         float *q) {
    using namespace gemcutter;
    return in_arena([&](Arena &arena) {
        Project project(arena, *layer, *step, keep, kept);
        region([&](Team &team, int index) { project.run(team, index, x, q); });
    });
}

// out [rows, D] = x + norm(o [rows, H * E] times the out-projection).
GC_EXPORT int gc_mix(const gc_layer *layer, const float *x, const float *o, int64_t rows, float *out) {
    using namespace gemcutter;
    return in_arena([&](Arena &arena) {
        Mix mix(arena, *layer, rows);
        region([&](Team &team, int index) { mix.run(team, index, x, nullptr, o, out); });
    });
}

// out [rows, D] = (x + the feed-forward of x) * feed_scale.
GC_EXPORT int gc_feed(const gc_layer *layer, const float *x, int64_t rows, float *out) {
    using namespace gemcutter;
    return in_arena([&](Arena &arena) {
        Feed feed(arena, *layer, rows);
        region([&](Team &team, int index) { feed.run(team, index, x, out, layer->feed_scale); });
    });
}

// out [rows, D] = (x + the gated per-layer embeddings, `stride` elements from row to row) * inject_scale.
GC_EXPORT int gc_inject(const gc_layer *layer, const float *x, const float *ple, int64_t stride, int64_t rows, float *out) {
    using namespace gemcutter;
    return in_arena([&](Arena &arena) {
        Inject inject(arena, *layer, rows);
        region([&](Team &team, int index) { inject.run(team, index, x, ple, stride, out, layer->inject_scale); });
    });
}

constexpr int64_t MANY_ROWS = 64;  // from here on attention, feed and inject share their memory and wait for each other

// A whole layer: out [M, D] of x [N, D]. Where rows are dropped, `keep` lists those that stay and `kept` is their step; else
// keep is null and kept == step.
GC_EXPORT int gc_layer_forward(const gc_layer *layer, const gc_step *step, const gc_step *kept, const int64_t *keep,
                               const float *x, const float *ple, int64_t ple_stride, float *out) {
    using namespace gemcutter;
    return in_arena([&](Arena &arena) {
        const gc_attention &shape = layer->attention;
        const Arena::Mark start = arena.mark();
        int64_t rows = kept->rows, width = rows * shape.heads * shape.head_dim;
        float *q = arena.array<float>(width), *o = arena.array<float>(width);
        Project project(arena, *layer, *step, keep, rows);
        AttendWork attention = take_attend(arena, *kept, shape);
        Mix mix(arena, *layer, rows);
        bool shares = rows >= MANY_ROWS;
        if (shares) arena.rewind(start);
        Feed feed(arena, *layer, rows);
        std::optional<Inject> inject;
        if (shares) arena.rewind(start);
        if (layer->ple_gate.rows) inject.emplace(arena, *layer, rows);
        region([&](Team &team, int index) {
            project.run(team, index, x, q);
            team.barrier();
            attend(team, index, attention, q, o, COUNT_ATTEND);
            team.barrier();
            mix.run(team, index, x, keep, o, out);
            if (shares) team.barrier();
            feed.run(team, index, out, out, layer->feed_scale);
            if (shares) team.barrier();
            if (inject) inject->run(team, index, out, ple, ple_stride, out, layer->inject_scale);
        });
    });
}

// Bytes of the structs of api.h in their order there, for checking the other side's; 0 beyond the last.
GC_EXPORT int64_t gc_bytes_of(int which) {
    constexpr int64_t BYTES[] = {sizeof(gc_matrix),  sizeof(gc_step),  sizeof(gc_attention),
                                 sizeof(gc_experts), sizeof(gc_layer), sizeof(gc_ple)};
    constexpr int COUNT = sizeof BYTES / sizeof *BYTES;
    return which >= 0 && which < COUNT ? BYTES[which] : 0;
}
