// A layer of a vision encoder over the flat patches of some images, in one parallel region.
//
// Owns the order of its parts, the rotation by column and row, and the clipping of values around products. Every patch sees all
// patches of its image: the same attention kernel as in prompts, over rows instead of a cache. A row belongs to one thread between
// products. Shape letters: P patches, D hidden, H heads, K key heads, E head dim, F mlp width. Read `model/vision.py` for the
// definition, `layer_ops.h` for the decoder's layers.
#include <string.h>

#include "bounds.h"
#include "layer_ops.h"
#include "parallel_region.h"

namespace gemcutter {
namespace {

bool same_input(const gc_clip &a, const gc_clip &b) { return a.input_min == b.input_min && a.input_max == b.input_max; }

// The rows that several matrices read: one copy for all that clip alike.
class Inputs {
  public:
    void allocate(Arena &arena, const gc_vision_layer &layer, const gc_matrix *const *parts, const gc_clip *const *clips,
                  int count, int64_t rows) {
        for (int i = 0; i < count; ++i) {
            int same = 0;
            while (layer.is_clipped && !same_input(*clips[same], *clips[i])) ++same;
            of_[i] = same;
            if (same == i) clips_[i] = layer.is_clipped ? clips[i] : nullptr;
        }
        for (int i = 0; i < count; ++i) {
            if (of_[i] != i) continue;
            int formats = 0;
            for (int j = i; j < count; ++j)
                if (of_[j] == i) formats |= formats_of(parts[j], 1, rows, layer.activations);
            buffers_[i].allocate(arena, formats, rows, parts[i]->columns, layer.activations);
        }
        count_ = count;
    }
    // Takes row m, clipped for each matrix. `from` may be row(m).
    void fill(int64_t m, const float *from) {
        int64_t columns = buffers_[0].converted.rows.columns;
        for (int i = count_ - 1; i >= 0; --i) {  // the first last, since `from` may be its memory
            if (of_[i] != i) continue;
            float *to = buffers_[i].row(m);
            if (clips_[i]) kernels().vector_ops->clamp(from, clips_[i]->input_min, clips_[i]->input_max, columns, to);
            else if (to != from) memcpy(to, from, sizeof(float) * (size_t)columns);
            buffers_[i].convert(m);
        }
    }
    float *row(int64_t m) { return buffers_[0].row(m); }
    float *data() { return buffers_[0].x; }
    const Rows &rows(int i) const { return buffers_[of_[i]].converted.rows; }

  private:
    static constexpr int MOST = 3;
    ActivationBuffer buffers_[MOST];
    const gc_clip *clips_[MOST] = {};
    int of_[MOST] = {}, count_ = 0;
};

// Query rows first..last-1 of one image with one key head.
struct AttentionItem {
    int64_t image, head, first, last;
};

class VisionLayer {
  public:
    VisionLayer(Arena &arena, const gc_vision_layer &layer, int64_t rows, const int64_t *edges, int64_t images)
        : layer_(layer), rows_(rows), edges_(edges) {
        q_width_ = layer.heads * layer.head_dim, kv_width_ = layer.kv_heads * layer.head_dim;
        qkv_width_ = q_width_ + 2 * kv_width_;
        const gc_matrix *qkv[3] = {&layer.q, &layer.k, &layer.v}, *gated[2] = {&layer.gate, &layer.up};
        const gc_matrix *out[1] = {&layer.out}, *down[1] = {&layer.down};
        const gc_clip *qkv_clips[3] = {&layer.q_clip, &layer.k_clip, &layer.v_clip};
        const gc_clip *gated_clips[2] = {&layer.gate_clip, &layer.up_clip};
        const gc_clip *out_clips[1] = {&layer.out_clip}, *down_clips[1] = {&layer.down_clip};
        into_attention_.allocate(arena, layer, qkv, qkv_clips, 3, rows);
        out_of_attention_.allocate(arena, layer, out, out_clips, 1, rows);
        qkv_ = arena.array<float>(rows * qkv_width_);
        into_mlp_.allocate(arena, layer, gated, gated_clips, 2, rows);
        gates_.allocate(arena, layer, down, down_clips, 1, rows);
        ups_ = arena.array<float>(rows * layer.mlp_width);
        product_ = arena.array<float>(rows * layer.hidden);
        const PairAttention *pairs = kernels().pair_attention;
        if (pairs && layer.activations == GC_BF16_ROWS && layer.head_dim % 2 == 0) allocate_pairs(arena, images);
        size_t bytes = pairs_ ? pairs_->scratch_bytes(layer.head_dim)
                              : kernels().attention->scratch_bytes(layer.heads / layer.kv_heads, layer.head_dim);
        for (const gc_matrix *part : {&layer.q, &layer.k, &layer.v, &layer.out, &layer.gate, &layer.up, &layer.down}) {
            size_t of_part = scratch_bytes(part, 1);
            bytes = of_part > bytes ? of_part : bytes;
        }
        scratch_.allocate(arena, bytes);
        list_items(arena, images);
    }

    void run(ThreadPool &pool, int index, const float *x, const float *cos, const float *sin, float *out) {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t hidden = layer_.hidden;
        Range own = own_rows(rows_, index, pool.size);
        for (int64_t m = own.first; m < own.last; ++m) {
            float *row = into_attention_.row(m);
            ops.rms_norm(x + m * hidden, layer_.attn_norm, layer_.eps, hidden, row);
            into_attention_.fill(m, row);
        }
        pool.barrier();
        multiply(pool, index, layer_.q, into_attention_.rows(0), qkv_, qkv_width_);
        multiply(pool, index, layer_.k, into_attention_.rows(1), qkv_ + q_width_, qkv_width_);
        multiply(pool, index, layer_.v, into_attention_.rows(2), qkv_ + q_width_ + kv_width_, qkv_width_);
        pool.barrier();
        for (int64_t m = own.first, image = 0; m < own.last; ++m) {
            finish_qkv(m, cos, sin);
            while (edges_[image + 1] <= m) ++image;
            if (pairs_) write_pairs(m, image, static_cast<uint16_t *>(scratch_.of(index)));
        }
        pool.barrier();
        run_attention(pool, index);
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) out_of_attention_.fill(m, qkv_ + m * qkv_width_);
        pool.barrier();
        multiply(pool, index, layer_.out, out_of_attention_.rows(0), product_, hidden);
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) {
            float *row = into_mlp_.row(m), *after = out + m * hidden;
            clip(product_ + m * hidden, layer_.out_clip, hidden);
            ops.add_norm(x + m * hidden, product_ + m * hidden, layer_.attn_post_norm, layer_.eps, 1.0f, hidden, after);
            ops.rms_norm(after, layer_.mlp_norm, layer_.eps, hidden, row);
            into_mlp_.fill(m, row);
        }
        pool.barrier();
        feed_forward(pool, index, own, out);
    }

  private:
    // Keys and values of each head of each image, one after the other.
    void allocate_pairs(Arena &arena, int64_t images) {
        int64_t dim = layer_.head_dim, keys = 0;
        pairs_ = kernels().pair_attention;
        starts_ = arena.array<int64_t>(images);
        for (int64_t i = 0; i < images; ++i) {
            starts_[i] = keys;
            keys += padded_to(edges_[i + 1] - edges_[i], 2 * PANEL) * layer_.kv_heads;
        }
        q_pairs_ = arena.array<uint32_t>(rows_ * q_width_ / 2);
        k_pairs_ = arena.array<uint32_t>(keys * dim / 2);
        v_pairs_ = arena.array<uint32_t>(keys * padded_to(dim, PANEL) / 2);
        memset(k_pairs_, 0, sizeof(uint32_t) * (size_t)(keys * dim / 2));
        memset(v_pairs_, 0, sizeof(uint32_t) * (size_t)(keys * padded_to(dim, PANEL) / 2));
    }

    KeyPairs pairs_of(int64_t image, int64_t head) const {
        int64_t count = edges_[image + 1] - edges_[image], keys = starts_[image] + head * padded_to(count, 2 * PANEL);
        return {k_pairs_ + keys * layer_.head_dim / 2, v_pairs_ + keys * padded_to(layer_.head_dim, PANEL) / 2, count};
    }

    void write_pairs(int64_t m, int64_t image, uint16_t *rounded) {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t dim = layer_.head_dim, t = m - edges_[image];
        const float *q = qkv_ + m * qkv_width_, *k = q + q_width_, *v = k + kv_width_;
        ops.to_bf16(q, q_width_, reinterpret_cast<uint16_t *>(q_pairs_ + m * q_width_ / 2));
        for (int64_t head = 0; head < layer_.kv_heads; ++head, k += dim, v += dim) {
            KeyPairs to = pairs_of(image, head);
            ops.to_bf16(k, dim, rounded);
            auto *key = const_cast<uint32_t *>(to.k) + t / PANEL * PANEL * (dim / 2) + t % PANEL;
            for (int64_t i = 0; i < dim / 2; ++i) memcpy(key + i * PANEL, rounded + 2 * i, sizeof(uint32_t));
            ops.to_bf16(v, dim, rounded);
            int64_t pairs = padded_to(to.count, 2 * PANEL) / 2;
            auto *value = reinterpret_cast<uint16_t *>(const_cast<uint32_t *>(to.v) + t / 2 * PANEL) + t % 2;
            for (int64_t e = 0; e < dim; ++e) value[2 * (e / PANEL * pairs * PANEL + e % PANEL)] = rounded[e];
        }
    }

    void list_items(Arena &arena, int64_t images) {
        int64_t at_once = kernels().attention->prefill_rows(layer_.heads / layer_.kv_heads, layer_.head_dim), longest = 0;
        if (at_once > MOST_QUERIES) at_once = MOST_QUERIES;
        if (pairs_) at_once = pairs_->most_rows;
        for (int64_t i = 0; i < images; ++i) {
            int64_t count = edges_[i + 1] - edges_[i];
            num_items_ += layer_.kv_heads * ((count + at_once - 1) / at_once);
            longest = count > longest ? count : longest;
        }
        items_ = arena.array<AttentionItem>(num_items_);
        positions_ = arena.array<int64_t>(longest);
        last_ = arena.array<int64_t>(at_once * images);
        for (int64_t p = 0; p < longest; ++p) positions_[p] = p;
        at_once_ = at_once;
        AttentionItem *item = items_;
        for (int64_t i = 0; i < images; ++i) {
            int64_t count = edges_[i + 1] - edges_[i];
            for (int64_t p = 0; p < at_once; ++p) last_[i * at_once + p] = count - 1;
            for (int64_t head = 0; head < layer_.kv_heads; ++head)
                for (int64_t first = 0; first < count; first += at_once)
                    *item++ = {i, head, first, first + at_once < count ? first + at_once : count};
        }
    }

    // `multiply` has a counter of its own for every product of a layer.
    void multiply(ThreadPool &pool, int index, const gc_matrix &part, const Rows &rows, float *out, int64_t ld) {
        const gc_matrix *parts[] = {&layer_.q, &layer_.k, &layer_.v, &layer_.out, &layer_.gate, &layer_.up, &layer_.down};
        int counter = COUNT_ATTENTIONS;
        for (const gc_matrix *each : parts) {
            ++counter;
            if (each == &part) break;
        }
        parallel_gemm(pool, index, &part, 1, rows, out, ld, scratch_.of(index), counter);
    }

    void clip(float *row, const gc_clip &clip, int64_t count) {
        if (layer_.is_clipped) kernels().vector_ops->clamp(row, clip.output_min, clip.output_max, count, row);
    }

    void finish_qkv(int64_t m, const float *cos, const float *sin) {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t dim = layer_.head_dim, half = dim / 2;
        float *q = qkv_ + m * qkv_width_, *k = q + q_width_, *v = k + kv_width_;
        cos += m * half, sin += m * half;
        clip(q, layer_.q_clip, q_width_), clip(k, layer_.k_clip, kv_width_), clip(v, layer_.v_clip, kv_width_);
        for (int64_t head = 0; head < layer_.heads + layer_.kv_heads; ++head, q += dim) {  // queries, then the keys behind them
            ops.rms_norm(q, head < layer_.heads ? layer_.q_norm : layer_.k_norm, layer_.eps, dim, q);
            ops.rope(q, cos, sin, half);
            ops.rope(q + half, cos + half / 2, sin + half / 2, half);
        }
        for (int64_t head = 0; head < layer_.kv_heads; ++head, v += dim) ops.rms_norm(v, nullptr, layer_.eps, dim, v);
    }

    void run_attention(ThreadPool &pool, int index) {
        int64_t dim = layer_.head_dim, group = layer_.heads / layer_.kv_heads;
        for (int64_t i; (i = pool.counters[COUNT_ATTENTIONS].fetch_add(1, std::memory_order_relaxed)) < num_items_;) {
            const AttentionItem &item = items_[i];
            const float *image = qkv_ + edges_[item.image] * qkv_width_, *k = image + q_width_ + item.head * dim;
            Keys keys = {k, k + kv_width_, qkv_width_, GC_F32, 0, 0, nullptr};
            if (pairs_) {
                attention_of_pairs(item, scratch_.of(index));
                continue;
            }
            float *q = qkv_ + (edges_[item.image] + item.first) * qkv_width_ + item.head * group * dim;  // and the result
            kernels().attention->prefill(q, q, qkv_width_, item.last - item.first, group, dim, positions_ + item.first,
                                         last_ + item.image * at_once_, 0, &keys, scratch_.of(index));
        }
    }

    void attention_of_pairs(const AttentionItem &item, void *scratch) {
        int64_t dim = layer_.head_dim, group = layer_.heads / layer_.kv_heads, first = edges_[item.image] + item.first;
        KeyPairs keys = pairs_of(item.image, item.head);
        for (int64_t head = item.head * group; head < (item.head + 1) * group; ++head)
            pairs_->attention(q_pairs_ + (first * q_width_ + head * dim) / 2, q_width_ / 2,
                              qkv_ + first * qkv_width_ + head * dim, qkv_width_, item.last - item.first, dim, &keys, scratch);
    }

    void feed_forward(ThreadPool &pool, int index, Range own, float *out) {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t hidden = layer_.hidden, width = layer_.mlp_width;
        multiply(pool, index, layer_.gate, into_mlp_.rows(0), gates_.data(), width);
        multiply(pool, index, layer_.up, into_mlp_.rows(1), ups_, width);
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) {
            float *gate = gates_.row(m), *up = ups_ + m * width;
            clip(gate, layer_.gate_clip, width), clip(up, layer_.up_clip, width);
            ops.gelu_mul(gate, up, width, gate);
            gates_.fill(m, gate);
        }
        pool.barrier();
        multiply(pool, index, layer_.down, gates_.rows(0), product_, hidden);
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) {
            float *row = out + m * hidden;
            clip(product_ + m * hidden, layer_.down_clip, hidden);
            ops.add_norm(row, product_ + m * hidden, layer_.mlp_post_norm, layer_.eps, 1.0f, hidden, row);
        }
    }

    static constexpr int COUNT_ATTENTIONS = 0;
    static constexpr int64_t MOST_QUERIES = 256;  // of an item, so that threads finish at about the same time

    const gc_vision_layer &layer_;
    int64_t rows_, q_width_, kv_width_, qkv_width_, num_items_ = 0, at_once_ = 0;
    const int64_t *edges_;
    Inputs into_attention_, out_of_attention_, into_mlp_, gates_;
    float *qkv_, *ups_, *product_;  // [P, (H + 2K) E], [P, F], [P, D]
    const PairAttention *pairs_ = nullptr;
    uint32_t *q_pairs_ = nullptr, *k_pairs_ = nullptr, *v_pairs_ = nullptr;
    int64_t *starts_ = nullptr;  // [images] the first of each image's keys
    AttentionItem *items_;
    int64_t *positions_, *last_;
    Scratch scratch_;
};

}  // namespace
}  // namespace gemcutter

// out [P, D] = one layer over the patches x [P, D] of some images, whose first patches `edges` [images + 1] names, and the end;
// cos and sin [P, E / 2] are of each patch's column, then of its row. Returns 0, 1 if memory ran out, or OUT_OF_BOUNDS for edges
// that do not ascend from 0 to P.
GC_EXPORT int gc_vision_layer_forward(const gc_vision_layer *layer, const float *x, int64_t rows, const int64_t *edges,
                                      int64_t images, const float *cos, const float *sin, float *out) {
    using namespace gemcutter;
    if (images < 1 || edges[0] != 0 || edges[images] != rows) return OUT_OF_BOUNDS;
    for (int64_t i = 0; i < images; ++i)
        if (edges[i + 1] < edges[i]) return OUT_OF_BOUNDS;
    return in_arena([&](Arena &arena) {
        VisionLayer forward(arena, *layer, rows, edges, images);
        parallel_region([&](ThreadPool &pool, int index) { forward.run(pool, index, x, cos, sin, out); });
    });
}
