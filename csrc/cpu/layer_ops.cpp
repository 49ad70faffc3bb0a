// The ops of a layer and their entry points, each one parallel region: qkv, attn_out, mlp, ple_gate, and a whole layer.
//
// Owns the order of norms, matrix products and residuals; every float32 sum follows ops/reference.py. Refuses to know how
// matrices are multiplied, attention is split and threads wait. Read `layer_ops.h` for how ops share a region, `experts.cpp` for
// the mixture of experts, `embed_head.cpp` for the ops before the first and after the last layer.
#include <string.h>

#include "bounds.h"
#include "layer_ops.h"
#include "parallel_region.h"
#include "ranks.h"

namespace gemcutter {

void Scratch::allocate(Arena &arena, size_t bytes) {
    stride = (bytes + 127) / 128 * 128;  // no two threads share a cache line, nor the pair of lines that is prefetched together
    memory = static_cast<char *>(arena.allocate(stride * (size_t)threads()));
}

void ActivationBuffer::allocate(Arena &arena, const gc_matrix *parts, int num_parts, int64_t count, int64_t columns,
                                int activations) {
    allocate(arena, formats_of(parts, num_parts, count, activations), count, columns, activations, parts->order);
}

void ActivationBuffer::allocate(Arena &arena, int wanted, int64_t count, int64_t columns, int activations, const int32_t *order) {
    x = arena.array<float>(count * columns);
    converted = allocate_rows(arena, wanted, count, columns, activations, order);
    if (!converted.rows.x) converted.rows.x = x;
}

// ---- qkv ----

Qkv::Qkv(Arena &arena, const gc_layer &layer, const gc_step &step, const gc_kv *kv, const int64_t *keep, int64_t kept,
         const AdapterRuns &all, const AdapterRuns &wanted)
    : layer_(layer),
      step_(step),
      cache_(kv),
      keep_(keep),
      kept_(keep ? kept : step.rows),
      q_width_(layer.attn_in[0].rows),
      kv_width_(layer.attn_in[1].rows + layer.attn_in[2].rows),
      num_kv_(!!layer.attn_in[1].rows + !!layer.attn_in[2].rows) {
    const gc_matrix *parts = layer.attn_in;
    all_.allocate(arena, keep ? parts + 1 : parts, num_kv_ + !keep, step.rows, layer.hidden, layer.activations);
    if (keep) {
        wanted_.allocate(arena, parts, 1, kept_, layer.hidden, layer.activations);
        all_changes_.allocate(arena, all, {parts + 1, parts + 2});
        wanted_changes_.allocate(arena, wanted, {parts});
        kv_ = arena.array<float>(step.rows * kv_width_);
        raw_q_ = arena.array<float>(kept_ * q_width_);
        kv_stride_ = kv_width_, q_stride_ = q_width_;
    } else {
        all_changes_.allocate(arena, all, {parts, parts + 1, parts + 2});
        raw_q_ = arena.array<float>(step.rows * (q_width_ + kv_width_));
        kv_ = raw_q_ + q_width_;
        kv_stride_ = q_stride_ = q_width_ + kv_width_;
    }
    scratch_.allocate(arena, scratch_bytes(parts, 1 + num_kv_));
    spare_.allocate(arena, sizeof(float) * (size_t)(2 * layer.attention.head_dim));
}

void Qkv::run(ThreadPool &pool, int index, const float *x, float *q) {
    const VectorOps &ops = *kernels().vector_ops;
    const gc_attention &shape = layer_.attention;
    int64_t rows = step_.rows, hidden = layer_.hidden;
    prefetch_weights(pool, index, layer_.attn_in, 1 + num_kv_, rows);
    Range own = own_rows(rows, index, pool.size);
    for (int64_t n = own.first; n < own.last; ++n) {
        ops.rms_norm(x + n * hidden, layer_.attn_norm, layer_.eps, hidden, all_.row(n));
        all_.convert(n);
    }
    if (keep_) {  // kept rows may be in another thread's range, so they are normed again
        Range kept = own_rows(kept_, index, pool.size);
        for (int64_t m = kept.first; m < kept.last; ++m) {
            ops.rms_norm(x + keep_[m] * hidden, layer_.attn_norm, layer_.eps, hidden, wanted_.row(m));
            wanted_.convert(m);
        }
    }
    pool.barrier();
    bool changes_all = all_changes_.reduce(pool, index, all_.x), changes_wanted = wanted_changes_.reduce(pool, index, wanted_.x);
    if (changes_all || changes_wanted) pool.barrier();
    void *scratch = scratch_.of(index);
    if (keep_) {
        const gc_matrix *kv = layer_.attn_in + 1;
        parallel_gemm(pool, index, kv, num_kv_, all_.converted.rows, kv_, kv_stride_, scratch, COUNT_KV, all_changes_);
        if (kept_)
            parallel_gemm(pool, index, layer_.attn_in, 1, wanted_.converted.rows, raw_q_, q_stride_, scratch, COUNT_Q,
                          wanted_changes_);
    } else {
        parallel_gemm(pool, index, layer_.attn_in, 1 + num_kv_, all_.converted.rows, raw_q_, q_stride_, scratch, COUNT_KV,
                      all_changes_);
    }
    pool.barrier();
    Range heads = share(kept_ * shape.heads, 1, index, pool.size);
    for (int64_t i = heads.first; i < heads.last; ++i) finish_query(i / shape.heads, i % shape.heads, q);
    Range keys = share(num_kv_ ? rows * shape.kv_heads : 0, 1, index, pool.size);
    for (int64_t i = keys.first; i < keys.last; ++i)
        write_keys(i / shape.kv_heads, i % shape.kv_heads, static_cast<float *>(spare_.of(index)));
}

void Qkv::finish_query(int64_t m, int64_t head, float *q) const {
    const VectorOps &ops = *kernels().vector_ops;
    int64_t dim = layer_.attention.head_dim, at = (keep_ ? keep_[m] : m) * (dim / 2);
    float *out = q + (m * layer_.attention.heads + head) * dim;
    ops.rms_norm(raw_q_ + m * q_stride_ + head * dim, layer_.q_norm, layer_.eps, dim, out);
    ops.rope(out, step_.cos + at, step_.sin + at, dim);
}

void Qkv::write_keys(int64_t n, int64_t head, float *spare) const {
    const VectorOps &ops = *kernels().vector_ops;
    const gc_attention &shape = layer_.attention;
    int64_t dim = shape.head_dim, at = n * (dim / 2), vector = step_.slot_mapping[n] * shape.kv_heads + head, slot = vector * dim;
    const float *raw_k = kv_ + n * kv_stride_ + head * dim, *raw_v = raw_k + (num_kv_ == 2 ? layer_.attn_in[1].rows : 0);
    float *k = spare, *v = spare + dim;
    ops.rms_norm(raw_k, layer_.k_norm, layer_.eps, dim, k);
    ops.rope(k, step_.cos + at, step_.sin + at, dim);
    if (layer_.has_v_norm) ops.rms_norm(raw_v, nullptr, layer_.eps, dim, v);
    else memcpy(v, raw_v, sizeof(float) * (size_t)dim);
    if (cache_->dtype == GC_BF16) {
        ops.to_bf16(k, dim, (uint16_t *)cache_->k + slot);
        ops.to_bf16(v, dim, (uint16_t *)cache_->v + slot);
    } else if (cache_->dtype == GC_S8) {
        ops.quantize_vector(k, dim, (int8_t *)cache_->k + slot, cache_->k_scale + vector);
        ops.quantize_vector(v, dim, (int8_t *)cache_->v + slot, cache_->v_scale + vector);
    } else {
        memcpy((float *)cache_->k + slot, k, sizeof(float) * (size_t)dim);
        memcpy((float *)cache_->v + slot, v, sizeof(float) * (size_t)dim);
    }
}

// A product [rows, D] of this rank's columns becomes that of all ranks; complete before and after.
static void sum_product(ThreadPool &pool, int index, const gc_layer &layer, float *product, int64_t rows) {
    if (!layer.ranks) return;
    sum_over_ranks(pool, index, *layer.ranks, product, rows * layer.hidden);
    pool.barrier();
}

// ---- attn_out ----

AttnOut::AttnOut(Arena &arena, const gc_layer &layer, int64_t rows, const AdapterRuns &adapters) : layer_(layer), rows_(rows) {
    const gc_matrix &weight = layer.attn_out;
    converted_ = allocate_rows(arena, formats_of(&weight, 1, rows, layer.activations), rows, weight.columns, layer.activations,
                               weight.order);
    changes_.allocate(arena, adapters, {&weight});
    product_ = arena.array<float>(rows * layer.hidden);
    scratch_.allocate(arena, scratch_bytes(&weight, 1));
}

void AttnOut::run(ThreadPool &pool, int index, const float *x, const int64_t *keep, const float *o, float *out) {
    int64_t hidden = layer_.hidden;
    prefetch_weights(pool, index, &layer_.attn_out, 1, rows_);
    convert_rows(pool, index, converted_, o);
    changes_.reduce(pool, index, o);
    pool.barrier();
    parallel_gemm(pool, index, &layer_.attn_out, 1, converted_.rows, product_, hidden, scratch_.of(index), COUNT_OUT, changes_);
    pool.barrier();
    sum_product(pool, index, layer_, product_, rows_);
    Range own = own_rows(rows_, index, pool.size);
    for (int64_t m = own.first; m < own.last; ++m) {
        const float *residual = x + (keep ? keep[m] : m) * hidden, *row = product_ + m * hidden;
        kernels().vector_ops->add_norm(residual, row, layer_.attn_post_norm, layer_.eps, 1.0f, hidden, out + m * hidden);
    }
}

// ---- mlp ----

Mlp::Mlp(Arena &arena, const gc_layer &layer, int64_t rows, const AdapterRuns &adapters) : layer_(layer), rows_(rows) {
    const gc_matrix in[2] = {layer.gate, layer.up};
    normed_.allocate(arena, in, 2, rows, layer.hidden, layer.activations);
    gated_.allocate(arena, &layer.down, 1, rows, layer.down.columns, layer.activations);
    in_changes_.allocate(arena, adapters, {&layer.gate, &layer.up});
    out_changes_.allocate(arena, adapters, {&layer.down});
    product_ = arena.array<float>(rows * layer.hidden);
    size_t bytes = geglu_scratch_bytes(&layer.gate, &layer.up, most_chunk_rows(layer.gate, rows)),
           down = scratch_bytes(&layer.down, 1);
    scratch_.allocate(arena, bytes > down ? bytes : down);
    if (layer.experts) experts_.emplace(arena, layer, rows, adapters);
}

void Mlp::run(ThreadPool &pool, int index, const float *x, float *out, float scale) {
    int64_t hidden = layer_.hidden;
    prefetch_weights(pool, index, &layer_.gate, 1, rows_);
    Range own = own_rows(rows_, index, pool.size);
    for (int64_t m = own.first; m < own.last; ++m) {
        kernels().vector_ops->rms_norm(x + m * hidden, layer_.mlp_norm, layer_.eps, hidden, normed_.row(m));
        normed_.convert(m);
    }
    if (experts_) experts_->route(pool, index, x);
    else pool.barrier();
    if (in_changes_.reduce(pool, index, normed_.x)) pool.barrier();
    void *scratch = scratch_.of(index);
    const bool is_direct = gated_.converted.formats == FORMAT_TILES && !gated_.converted.order && out_changes_.is_empty();
    uint16_t *tiles = is_direct ? const_cast<uint16_t *>(gated_.converted.rows.tiles) : nullptr;
    parallel_geglu(pool, index, &layer_.gate, &layer_.up, normed_.converted.rows, {layer_.down.columns, gated_.x, tiles}, scratch,
                   COUNT_GATED, in_changes_);
    prefetch_weights(pool, index, &layer_.down, 1, rows_);
    pool.barrier();
    if (!is_direct) {
        convert_rows(pool, index, gated_.converted, gated_.x);
        out_changes_.reduce(pool, index, gated_.x);
        pool.barrier();
    }
    parallel_gemm(pool, index, &layer_.down, 1, gated_.converted.rows, product_, hidden, scratch, COUNT_DOWN, out_changes_);
    if (experts_) experts_->run(pool, index);
    else pool.barrier();
    sum_product(pool, index, layer_, product_, rows_);
    if (experts_) {
        for (int64_t m = own.first; m < own.last; ++m) experts_->sum(m, normed_.row(m));  // no longer needed as input
        if (layer_.ranks) pool.barrier();
        sum_product(pool, index, layer_, normed_.x, rows_);
    }
    for (int64_t m = own.first; m < own.last; ++m) join(m, x + m * hidden, out + m * hidden, scale);
}

// Finishes one row: norm and residual, after the sum of both branches where there are experts.
void Mlp::join(int64_t m, const float *x, float *out, float scale) {
    const VectorOps &ops = *kernels().vector_ops;
    int64_t hidden = layer_.hidden;
    float *y = product_ + m * hidden;
    if (experts_) {
        const float *mixed = normed_.row(m);
        ops.rms_norm(y, layer_.experts->dense_branch_norm, layer_.eps, hidden, y);
        ops.add_norm(y, mixed, layer_.experts->expert_branch_norm, layer_.eps, 1.0f, hidden, y);
    }
    ops.add_norm(x, y, layer_.mlp_post_norm, layer_.eps, scale, hidden, out);
}

// ---- ple_gate ----

PleGate::PleGate(Arena &arena, const gc_layer &layer, int64_t rows, const AdapterRuns &adapters) : layer_(layer), rows_(rows) {
    input_.allocate(arena, &layer.ple_gate, 1, rows, layer.hidden, layer.activations);
    gated_.allocate(arena, &layer.ple_out, 1, rows, layer.ple_dim, layer.activations);
    in_changes_.allocate(arena, adapters, {&layer.ple_gate});
    out_changes_.allocate(arena, adapters, {&layer.ple_out});
    product_ = arena.array<float>(rows * layer.hidden);
    size_t in = scratch_bytes(&layer.ple_gate, 1), out = scratch_bytes(&layer.ple_out, 1);
    scratch_.allocate(arena, in > out ? in : out);
}

void PleGate::run(ThreadPool &pool, int index, const float *x, const float *ple, int64_t stride, float *out, float scale) {
    const VectorOps &ops = *kernels().vector_ops;
    int64_t hidden = layer_.hidden, dim = layer_.ple_dim;
    void *scratch = scratch_.of(index);
    prefetch_weights(pool, index, &layer_.ple_gate, 1, rows_);
    Range own = own_rows(rows_, index, pool.size);
    for (int64_t m = own.first; m < own.last; ++m) {
        memcpy(input_.row(m), x + m * hidden, sizeof(float) * (size_t)hidden);
        input_.convert(m);
    }
    pool.barrier();
    if (in_changes_.reduce(pool, index, input_.x)) pool.barrier();
    parallel_gemm(pool, index, &layer_.ple_gate, 1, input_.converted.rows, gated_.x, dim, scratch, COUNT_PLE_GATE, in_changes_);
    prefetch_weights(pool, index, &layer_.ple_out, 1, rows_);
    pool.barrier();
    for (int64_t m = own.first; m < own.last; ++m) {
        ops.gelu_mul(gated_.row(m), ple + m * stride, dim, gated_.row(m));
        gated_.convert(m);
    }
    pool.barrier();
    if (out_changes_.reduce(pool, index, gated_.x)) pool.barrier();
    parallel_gemm(pool, index, &layer_.ple_out, 1, gated_.converted.rows, product_, hidden, scratch, COUNT_PLE_OUT, out_changes_);
    pool.barrier();
    for (int64_t m = own.first; m < own.last; ++m)
        ops.add_norm(x + m * hidden, product_ + m * hidden, layer_.ple_post_norm, layer_.eps, scale, hidden, out + m * hidden);
}

}  // namespace gemcutter

// Every entry returns 0, 1 if memory for intermediate activations ran out, OUT_OF_BOUNDS, with nothing read or written, if a step
// names rows, slots or positions that are not there, or RANKS_ENDED if a rank that it waited for is gone.

// q [M, H, E]: queries of the M rows that `keep` lists (null: of all rows); writes keys and values of all rows to the cache.
// `adapters` [M], or null, are those that the listed rows ask for.
GC_EXPORT int gc_qkv(const gc_layer *layer, const gc_step *step, const gc_kv *kv, const float *x, const int64_t *keep,
                     int64_t kept, const int32_t *adapters, float *q) {
    using namespace gemcutter;
    if ((kv && !fits(*step, *kv)) || (keep && !are_inside(keep, kept, step->rows))) return OUT_OF_BOUNDS;
    return in_arena([&](Arena &arena) {
        const AdapterRuns all(arena, step->adapters, step->rows), wanted(arena, keep ? adapters : nullptr, kept);
        Qkv qkv(arena, *layer, *step, kv, keep, kept, all, wanted);
        parallel_region([&](ThreadPool &pool, int index) { qkv.run(pool, index, x, q); });
    });
}

// Here and below, `adapters` [rows], or null, are the adapters that rows ask for, as in gc_step.

// out [rows, D] = x + norm(o [rows, H * E] times the out-projection).
GC_EXPORT int gc_attn_out(const gc_layer *layer, const float *x, const float *o, int64_t rows, const int32_t *adapters,
                          float *out) {
    using namespace gemcutter;
    const int code = in_arena([&](Arena &arena) {
        const AdapterRuns runs(arena, adapters, rows);
        AttnOut attn_out(arena, *layer, rows, runs);
        parallel_region([&](ThreadPool &pool, int index) { attn_out.run(pool, index, x, nullptr, o, out); });
    });
    return code ? code : result_of(layer->ranks);
}

// out [rows, D] = (x + the feed-forward of x) * mlp_scale.
GC_EXPORT int gc_mlp(const gc_layer *layer, const float *x, int64_t rows, const int32_t *adapters, float *out) {
    using namespace gemcutter;
    const int code = in_arena([&](Arena &arena) {
        const AdapterRuns runs(arena, adapters, rows);
        Mlp mlp(arena, *layer, rows, runs);
        parallel_region([&](ThreadPool &pool, int index) { mlp.run(pool, index, x, out, layer->mlp_scale); });
    });
    return code ? code : result_of(layer->ranks);
}

// out [rows, D] = (x + the gated per-layer embeddings, `stride` elements from row to row) * ple_scale.
GC_EXPORT int gc_ple_gate(const gc_layer *layer, const float *x, const float *ple, int64_t stride, int64_t rows,
                          const int32_t *adapters, float *out) {
    using namespace gemcutter;
    return in_arena([&](Arena &arena) {
        const AdapterRuns runs(arena, adapters, rows);
        PleGate ple_gate(arena, *layer, rows, runs);
        parallel_region([&](ThreadPool &pool, int index) { ple_gate.run(pool, index, x, ple, stride, out, layer->ple_scale); });
    });
}

constexpr int64_t MANY_ROWS = 64;  // from here on attention, mlp and ple_gate reuse the same memory, with barriers between them

// A whole layer: out [M, D] of x [N, D]. Where rows are dropped, `keep` lists the remaining ones and `kept` is their step;
// otherwise keep is null and kept == step.
GC_EXPORT int gc_layer_forward(const gc_layer *layer, const gc_step *step, const gc_step *kept, const gc_kv *kv,
                               const int64_t *keep, const float *x, const float *ple, int64_t ple_stride, float *out) {
    using namespace gemcutter;
    if (!fits(*step, *kv) || !fits(*kept, *kv) || (keep && !are_inside(keep, kept->rows, step->rows))) return OUT_OF_BOUNDS;
    const int code = in_arena([&](Arena &arena) {
        const gc_attention &shape = layer->attention;
        const AdapterRuns all(arena, step->adapters, step->rows), some(arena, keep ? kept->adapters : nullptr, kept->rows);
        const AdapterRuns &runs = keep ? some : all;
        const Arena::Mark start = arena.mark();
        int64_t rows = kept->rows, width = rows * shape.heads * shape.head_dim;
        float *q = arena.array<float>(width), *o = arena.array<float>(width);
        Qkv qkv(arena, *layer, *step, kv, keep, rows, all, runs);
        AttentionPlan plan = plan_attention(arena, *kept, shape, *kv);
        AttnOut attn_out(arena, *layer, rows, runs);
        bool shares = rows >= MANY_ROWS;
        if (shares) arena.rewind(start);
        Mlp mlp(arena, *layer, rows, runs);
        std::optional<PleGate> ple_gate;
        if (shares) arena.rewind(start);
        if (layer->ple_gate.rows) ple_gate.emplace(arena, *layer, rows, runs);
        parallel_region([&](ThreadPool &pool, int index) {
            qkv.run(pool, index, x, q);
            pool.barrier();
            attention(pool, index, plan, q, o, COUNT_ATTENTION);
            pool.barrier();
            attn_out.run(pool, index, x, keep, o, out);
            if (shares) pool.barrier();
            mlp.run(pool, index, out, out, layer->mlp_scale);
            if (shares) pool.barrier();
            if (ple_gate) ple_gate->run(pool, index, out, ple, ple_stride, out, layer->ple_scale);
        });
    });
    return code ? code : result_of(layer->ranks);
}

// Size in bytes of the structs of api.h in their order there, checked against the ctypes structs; 0 beyond the last.
GC_EXPORT int64_t gc_bytes_of(int which) {
    constexpr int64_t BYTES[] = {sizeof(gc_matrix),  sizeof(gc_delta), sizeof(gc_step), sizeof(gc_kv),      sizeof(gc_attention),
                                 sizeof(gc_experts), sizeof(gc_layer), sizeof(gc_ple),  sizeof(gc_drafter), sizeof(gc_ranks)};
    constexpr int COUNT = sizeof BYTES / sizeof *BYTES;
    return which >= 0 && which < COUNT ? BYTES[which] : 0;
}
