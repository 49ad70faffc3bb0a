// A layer of a vision encoder over the flat patches of some images: first the queries, keys and values of all, then the rest.
//
// Owns the order of its parts, the rotation by column and row, and the clipping of values around products. Every patch sees all
// patches of its image: the same attention kernel as in prompts, over rows instead of a cache. Either half takes any run of rows,
// so that who computes a large image can let others compute in between. A row belongs to one thread between products. Shape
// letters: P patches, D hidden, H heads, K key heads, E head dim, F mlp width. Read `model/vision.py` for the definition,
// `layer_ops.h` for the decoder's layers.
#include <string.h>

#include "bounds.h"
#include "parallel_region.h"
#include "towers.h"

namespace gemcutter {
namespace {

// The rows of all images, and what is kept of a layer between its halves, in memory of the caller's.
struct Patches {
    const gc_vision_layer &layer;
    int64_t rows, images;
    const int64_t *edges;
    int64_t q_width, kv_width, qkv_width;
    const PairAttention *pairs;  // null where attention takes float32
    float *qkv;                  // [P, (H + 2K) E]; attention's results take the queries' place
    uint32_t *q_pairs, *k_pairs, *v_pairs;

    Patches(const gc_vision_layer &layer, int64_t rows, const int64_t *edges, int64_t images, float *state)
        : layer(layer), rows(rows), images(images), edges(edges) {
        q_width = layer.heads * layer.head_dim, kv_width = layer.kv_heads * layer.head_dim, qkv_width = q_width + 2 * kv_width;
        pairs = layer.activations == GC_BF16_ROWS && layer.head_dim % 2 == 0 ? kernels().pair_attention : nullptr;
        qkv = state;
        q_pairs = reinterpret_cast<uint32_t *>(state + padded_to(rows * qkv_width, PANEL));
        k_pairs = q_pairs + padded_to(rows * q_width / 2, PANEL);
        v_pairs = k_pairs + keys() * layer.head_dim / 2;
    }
    int64_t keys_of(int64_t image) const {  // of all heads, rounded up
        return padded_to(edges[image + 1] - edges[image], 2 * PANEL) * layer.kv_heads;
    }
    int64_t keys() const {
        int64_t count = 0;
        for (int64_t i = 0; i < images; ++i) count += keys_of(i);
        return count;
    }
    int64_t floats() const {
        int64_t plain = padded_to(rows * qkv_width, PANEL), queries = padded_to(rows * q_width / 2, PANEL);
        return plain + (pairs ? queries + keys() * (layer.head_dim + padded_to(layer.head_dim, PANEL)) / 2 : 0);
    }
    void clear_keys() const {  // what no key fills must be zero
        if (!pairs) return;
        memset(k_pairs, 0, sizeof(uint32_t) * (size_t)(keys() * layer.head_dim / 2));
        memset(v_pairs, 0, sizeof(uint32_t) * (size_t)(keys() * padded_to(layer.head_dim, PANEL) / 2));
    }
    void clip(float *row, const gc_clip &clip, int64_t count) const {
        if (layer.is_clipped) kernels().vector_ops->clamp(row, clip.output_min, clip.output_max, count, row);
    }
    // Keys and values of each head of each image, one after the other; `before` counts those of earlier images.
    KeyPairs pairs_of(int64_t image, int64_t before, int64_t head) const {
        int64_t count = edges[image + 1] - edges[image], first = before + head * padded_to(count, 2 * PANEL);
        return {k_pairs + first * layer.head_dim / 2, v_pairs + first * padded_to(layer.head_dim, PANEL) / 2, count};
    }
};

// Queries, keys and values of a run of rows.
class VisionKeys {
  public:
    VisionKeys(Arena &arena, const Patches &patches, Range run) : p_(patches), layer_(patches.layer), run_(run) {
        const gc_matrix *parts[3] = {&layer_.q, &layer_.k, &layer_.v};
        const gc_clip *clips[3] = {&layer_.q_clip, &layer_.k_clip, &layer_.v_clip};
        inputs_.allocate(arena, parts, layer_.is_clipped ? clips : nullptr, 3, run.last - run.first, layer_.activations);
        scratch_.allocate(arena, most_scratch(parts, 3, sizeof(uint16_t) * (size_t)padded_to(layer_.head_dim, PANEL)));
    }

    void run(ThreadPool &pool, int index, const float *x, const float *cos, const float *sin) {
        int64_t hidden = layer_.hidden;
        Range own = own_rows(run_.last - run_.first, index, pool.size);
        for (int64_t m = own.first; m < own.last; ++m) {
            float *row = inputs_.row(m);
            kernels().vector_ops->rms_norm(x + (run_.first + m) * hidden, layer_.attn_norm, layer_.eps, hidden, row);
            inputs_.fill(m, row);
        }
        inputs_.complete(pool, index);
        float *out = p_.qkv + run_.first * p_.qkv_width;
        void *scratch = scratch_.of(index);
        parallel_gemm(pool, index, &layer_.q, 1, inputs_.rows(0), out, p_.qkv_width, scratch, 0, inputs_.changes(0));
        parallel_gemm(pool, index, &layer_.k, 1, inputs_.rows(1), out + p_.q_width, p_.qkv_width, scratch, 1, inputs_.changes(1));
        parallel_gemm(pool, index, &layer_.v, 1, inputs_.rows(2), out + p_.q_width + p_.kv_width, p_.qkv_width, scratch, 2,
                      inputs_.changes(2));
        pool.barrier();
        int64_t image = 0, before = 0;
        for (int64_t row = run_.first + own.first; row < run_.first + own.last; ++row) {
            finish(row, cos, sin);
            for (; p_.edges[image + 1] <= row; ++image) before += p_.keys_of(image);
            if (p_.pairs) write_pairs(row, image, before, static_cast<uint16_t *>(scratch));
        }
    }

  private:
    void finish(int64_t row, const float *cos, const float *sin) const {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t dim = layer_.head_dim, half = dim / 2;
        float *q = p_.qkv + row * p_.qkv_width, *k = q + p_.q_width, *v = k + p_.kv_width;
        cos += row * half, sin += row * half;
        p_.clip(q, layer_.q_clip, p_.q_width), p_.clip(k, layer_.k_clip, p_.kv_width), p_.clip(v, layer_.v_clip, p_.kv_width);
        for (int64_t head = 0; head < layer_.heads + layer_.kv_heads; ++head, q += dim) {  // queries, then the keys behind them
            ops.rms_norm(q, head < layer_.heads ? layer_.q_norm : layer_.k_norm, layer_.eps, dim, q);
            ops.rope(q, cos, sin, half);
            ops.rope(q + half, cos + half / 2, sin + half / 2, half);
        }
        for (int64_t head = 0; head < layer_.kv_heads; ++head, v += dim) ops.rms_norm(v, nullptr, layer_.eps, dim, v);
    }

    void write_pairs(int64_t row, int64_t image, int64_t before, uint16_t *rounded) const {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t dim = layer_.head_dim, t = row - p_.edges[image];
        const float *q = p_.qkv + row * p_.qkv_width, *k = q + p_.q_width, *v = k + p_.kv_width;
        ops.to_bf16(q, p_.q_width, reinterpret_cast<uint16_t *>(p_.q_pairs + row * p_.q_width / 2));
        for (int64_t head = 0; head < layer_.kv_heads; ++head, k += dim, v += dim) {
            KeyPairs to = p_.pairs_of(image, before, head);
            ops.to_bf16(k, dim, rounded);
            auto *key = const_cast<uint32_t *>(to.k) + t / PANEL * PANEL * (dim / 2) + t % PANEL;
            for (int64_t i = 0; i < dim / 2; ++i) memcpy(key + i * PANEL, rounded + 2 * i, sizeof(uint32_t));
            ops.to_bf16(v, dim, rounded);
            int64_t pairs = padded_to(to.count, 2 * PANEL) / 2;
            auto *value = reinterpret_cast<uint16_t *>(const_cast<uint32_t *>(to.v) + t / 2 * PANEL) + t % 2;
            for (int64_t e = 0; e < dim; ++e) value[2 * (e / PANEL * pairs * PANEL + e % PANEL)] = rounded[e];
        }
    }

    const Patches &p_;
    const gc_vision_layer &layer_;
    Range run_;
    ClippedInputs inputs_;
    Scratch scratch_;
};

// Attention of a run of rows, whose keys are all there, and the MLP.
class VisionRows {
  public:
    VisionRows(Arena &arena, const Patches &patches, Range run) : p_(patches), layer_(patches.layer), run_(run) {
        int64_t rows = run.last - run.first;
        const gc_matrix *out[1] = {&layer_.out}, *gated[2] = {&layer_.gate, &layer_.up}, *down[1] = {&layer_.down};
        const gc_clip *out_clips[1] = {&layer_.out_clip}, *gated_clips[2] = {&layer_.gate_clip, &layer_.up_clip};
        const gc_clip *down_clips[1] = {&layer_.down_clip};
        out_of_attention_.allocate(arena, out, layer_.is_clipped ? out_clips : nullptr, 1, rows, layer_.activations);
        into_mlp_.allocate(arena, gated, layer_.is_clipped ? gated_clips : nullptr, 2, rows, layer_.activations);
        gates_.allocate(arena, down, layer_.is_clipped ? down_clips : nullptr, 1, rows, layer_.activations);
        ups_ = arena.array<float>(rows * layer_.mlp_width);
        product_ = arena.array<float>(rows * layer_.hidden);
        const gc_matrix *parts[4] = {&layer_.out, &layer_.gate, &layer_.up, &layer_.down};
        int64_t group = layer_.heads / layer_.kv_heads, dim = layer_.head_dim;
        size_t bytes = p_.pairs ? p_.pairs->scratch_bytes(dim) : kernels().attention->scratch_bytes(group, dim);
        scratch_.allocate(arena, most_scratch(parts, 4, bytes));
        list_items(arena);
    }

    void run(ThreadPool &pool, int index, const float *x, float *out) {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t hidden = layer_.hidden;
        Range own = own_rows(run_.last - run_.first, index, pool.size);
        void *scratch = scratch_.of(index);
        for (int64_t i; (i = pool.counters[0].fetch_add(1, std::memory_order_relaxed)) < num_items_;)
            attention(items_[i], scratch);
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) out_of_attention_.fill(m, p_.qkv + (run_.first + m) * p_.qkv_width);
        out_of_attention_.complete(pool, index);
        parallel_gemm(pool, index, &layer_.out, 1, out_of_attention_.rows(0), product_, hidden, scratch, 1,
                      out_of_attention_.changes(0));
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) {
            const float *before = x + (run_.first + m) * hidden;
            float *row = into_mlp_.row(m), *after = out + (run_.first + m) * hidden;
            p_.clip(product_ + m * hidden, layer_.out_clip, hidden);
            ops.add_norm(before, product_ + m * hidden, layer_.attn_post_norm, layer_.eps, 1.0f, hidden, after);
            ops.rms_norm(after, layer_.mlp_norm, layer_.eps, hidden, row);
            into_mlp_.fill(m, row);
        }
        into_mlp_.complete(pool, index);
        feed_forward(pool, index, own, out + run_.first * hidden);
    }

  private:
    // Query rows first..last-1 of an image, counted from its own first, with one key head; `before` counts earlier images' keys.
    struct Item {
        int64_t image, before, head, first, last;
    };

    void list_items(Arena &arena) {
        int64_t group = layer_.heads / layer_.kv_heads, longest = 0, blocks = 0;
        int64_t fit = p_.pairs ? p_.pairs->most_rows : kernels().attention->prefill_rows(group, layer_.head_dim);
        int64_t at_once = fit > MOST_QUERIES ? MOST_QUERIES : fit;
        for (int64_t i = 0; i < p_.images; ++i) {
            int64_t count = p_.edges[i + 1] - p_.edges[i];
            blocks += count / at_once + 1;
            longest = count > longest ? count : longest;
        }
        items_ = arena.array<Item>(blocks * layer_.kv_heads);
        positions_ = arena.array<int64_t>(longest);
        last_ = arena.array<int64_t>(at_once * p_.images);
        for (int64_t t = 0; t < longest; ++t) positions_[t] = t;
        at_once_ = at_once;
        int64_t before = 0;
        for (int64_t i = 0; i < p_.images; ++i) {
            int64_t start = p_.edges[i], count = p_.edges[i + 1] - start;
            int64_t low = run_.first > start ? run_.first - start : 0,
                    high = run_.last - start < count ? run_.last - start : count;
            for (int64_t t = 0; t < at_once; ++t) last_[i * at_once + t] = count - 1;
            for (int64_t head = 0; head < layer_.kv_heads; ++head)
                for (int64_t first = low; first < high; first += at_once)
                    items_[num_items_++] = {i, before, head, first, first + at_once < high ? first + at_once : high};
            before += p_.keys_of(i);
        }
    }

    void attention(const Item &item, void *scratch) const {
        int64_t dim = layer_.head_dim, group = layer_.heads / layer_.kv_heads, count = item.last - item.first;
        int64_t start = p_.edges[item.image], row = start + item.first;
        float *q = p_.qkv + row * p_.qkv_width + item.head * group * dim;  // and the result
        if (!p_.pairs) {
            const float *k = p_.qkv + start * p_.qkv_width + p_.q_width + item.head * dim;
            Keys keys = {k, k + p_.kv_width, p_.qkv_width, GC_F32, 0, 0, nullptr};
            return kernels().attention->prefill(q, q, p_.qkv_width, count, group, dim, positions_ + item.first,
                                                last_ + item.image * at_once_, 0, &keys, scratch);
        }
        KeyPairs keys = p_.pairs_of(item.image, item.before, item.head);
        const uint32_t *queries = p_.q_pairs + (row * p_.q_width + item.head * group * dim) / 2;
        for (int64_t i = 0; i < group; ++i)
            p_.pairs->attention(queries + i * dim / 2, p_.q_width / 2, q + i * dim, p_.qkv_width, count, dim, &keys, scratch);
    }

    void feed_forward(ThreadPool &pool, int index, Range own, float *out) {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t hidden = layer_.hidden, width = layer_.mlp_width;
        void *scratch = scratch_.of(index);
        parallel_gemm(pool, index, &layer_.gate, 1, into_mlp_.rows(0), gates_.data(), width, scratch, 2, into_mlp_.changes(0));
        parallel_gemm(pool, index, &layer_.up, 1, into_mlp_.rows(1), ups_, width, scratch, 3, into_mlp_.changes(1));
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) {
            float *gate = gates_.row(m), *up = ups_ + m * width;
            p_.clip(gate, layer_.gate_clip, width), p_.clip(up, layer_.up_clip, width);
            ops.gelu_mul(gate, up, width, gate);
            gates_.fill(m, gate);
        }
        gates_.complete(pool, index);
        parallel_gemm(pool, index, &layer_.down, 1, gates_.rows(0), product_, hidden, scratch, 4, gates_.changes(0));
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) {
            float *row = out + m * hidden;
            p_.clip(product_ + m * hidden, layer_.down_clip, hidden);
            ops.add_norm(row, product_ + m * hidden, layer_.mlp_post_norm, layer_.eps, 1.0f, hidden, row);
        }
    }

    static constexpr int64_t MOST_QUERIES = 256;  // of an item, so that threads finish at about the same time

    const Patches &p_;
    const gc_vision_layer &layer_;
    Range run_;
    ClippedInputs out_of_attention_, into_mlp_, gates_;
    float *ups_, *product_;  // [rows of the run, F], [rows of the run, D]
    Item *items_;
    int64_t *positions_, *last_;
    int64_t num_items_ = 0, at_once_ = 0;
    Scratch scratch_;
};

}  // namespace
}  // namespace gemcutter

// The memory that a layer needs between its halves, in floats; -1 for edges that do not ascend from 0 to P.
GC_EXPORT int64_t gc_vision_state(const gc_vision_layer *layer, int64_t rows, const int64_t *edges, int64_t images) {
    using namespace gemcutter;
    float none = 0;  // nothing is read or written there
    return are_edges(edges, images, rows) ? Patches(*layer, rows, edges, images, &none).floats() : -1;
}

// Writes queries, keys and values of rows first..last-1 of the patches x [P, D] of some images, whose first patches `edges`
// [images + 1] names, and the end, into `state`; cos and sin [P, E / 2] are of each patch's column, then of its row. Runs of rows
// come in order, one after the other. Returns 0, 1 if memory ran out, or OUT_OF_BOUNDS.
GC_EXPORT int gc_vision_keys(const gc_vision_layer *layer, const float *x, int64_t rows, const int64_t *edges, int64_t images,
                             int64_t first, int64_t last, const float *cos, const float *sin, float *state) {
    using namespace gemcutter;
    if (!are_edges(edges, images, rows) || !is_run(first, last, rows)) return OUT_OF_BOUNDS;
    return in_arena([&](Arena &arena) {
        Patches patches(*layer, rows, edges, images, state);
        if (first == 0) patches.clear_keys();
        VisionKeys keys(arena, patches, {first, last});
        parallel_region([&](ThreadPool &pool, int index) { keys.run(pool, index, x, cos, sin); });
    });
}

// out [P, D], rows first..last-1 = the rest of the layer, once the keys of all rows are in `state`. out may be x. Returns the same.
GC_EXPORT int gc_vision_rows(const gc_vision_layer *layer, const float *x, int64_t rows, const int64_t *edges, int64_t images,
                             int64_t first, int64_t last, float *state, float *out) {
    using namespace gemcutter;
    if (!are_edges(edges, images, rows) || !is_run(first, last, rows)) return OUT_OF_BOUNDS;
    return in_arena([&](Arena &arena) {
        Patches patches(*layer, rows, edges, images, state);
        VisionRows forward(arena, patches, {first, last});
        parallel_region([&](ThreadPool &pool, int index) { forward.run(pool, index, x, out); });
    });
}
