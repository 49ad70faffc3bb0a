// A layer of an audio encoder over the flat positions of some sounds: first up to queries, keys and values of all, then the rest.
//
// Owns the order of its parts, attention to the near past with its scores of distance, and the gated convolution over time. Either
// half takes any run of rows, so that who computes a long sound can let others compute in between; the second half takes runs in
// order, since a row's convolution reads the rows before it. A row belongs to one thread between products. Shape letters: T
// positions, D hidden, H heads, E head dim, F feed-forward width, P distances. Read `model/audio.py` for the definition, `vision.cpp`
// for its sibling.
#include <math.h>
#include <string.h>

#include "bounds.h"
#include "parallel_region.h"
#include "towers.h"

namespace gemcutter {
namespace {

// One product: its matrix, how it is clipped, and the counter by which threads share it.
struct Product {
    const gc_matrix &matrix;
    const gc_clip &clip;
    int counter;
};

// The positions of all sounds, and what is kept of a layer between its halves, in memory of the caller's.
struct Positions {
    const gc_audio_layer &layer;
    int64_t rows, sounds;
    const int64_t *edges;
    float *x, *q, *k, *v;  // [T, D] each: rows after the first branch; attention's results take the queries' place
    float *gated;          // [T, D]: what the convolution over time reads

    Positions(const gc_audio_layer &layer, int64_t rows, const int64_t *edges, int64_t sounds, float *state)
        : layer(layer), rows(rows), sounds(sounds), edges(edges) {
        int64_t each = rows * layer.hidden;
        x = state, q = x + each, k = q + each, v = k + each, gated = v + each;
    }
    void limit(float *row) const { kernels().vector_ops->clamp(row, -layer.clamp, layer.clamp, layer.hidden, row); }
    void clip(float *row, const gc_clip &clip, int64_t count) const {
        if (layer.is_clipped) kernels().vector_ops->clamp(row, clip.output_min, clip.output_max, count, row);
    }
    const gc_clip *const *clips(const gc_clip *const *given) const { return layer.is_clipped ? given : nullptr; }
};

// A feed-forward branch over the rows of a run, which begin at `x` and `out`.
class FeedForward {
  public:
    FeedForward(Arena &arena, const Positions &positions, const Product &in, const Product &out, const float *norm,
                const float *post_norm, int64_t rows)
        : p_(positions), layer_(positions.layer), in_(in), out_(out), norm_(norm), post_norm_(post_norm) {
        const gc_matrix *in_part[1] = {&in.matrix}, *out_part[1] = {&out.matrix};
        const gc_clip *in_clip[1] = {&in.clip}, *out_clip[1] = {&out.clip};
        normed_.allocate(arena, in_part, p_.clips(in_clip), 1, rows, layer_.activations);
        opened_.allocate(arena, out_part, p_.clips(out_clip), 1, rows, layer_.activations);
        product_ = arena.array<float>(rows * layer_.hidden);
    }

    // Leaves each thread's own rows of `out` complete, as it found those of x; out may be x.
    void run(ThreadPool &pool, int index, Range own, const float *x, float *out, void *scratch) {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t hidden = layer_.hidden, width = layer_.ff_width;
        for (int64_t m = own.first; m < own.last; ++m) {
            float *row = normed_.row(m);
            ops.clamp(x + m * hidden, -layer_.clamp, layer_.clamp, hidden, row);
            ops.rms_norm(row, norm_, layer_.eps, hidden, row);
            normed_.fill(m, row);
        }
        normed_.complete(pool, index);
        parallel_gemm(pool, index, &in_.matrix, 1, normed_.rows(0), opened_.data(), width, scratch, in_.counter,
                      normed_.changes(0));
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) {
            float *row = opened_.row(m);
            p_.clip(row, in_.clip, width);
            ops.gate(row, row, width, row);
            opened_.fill(m, row);
        }
        opened_.complete(pool, index);
        parallel_gemm(pool, index, &out_.matrix, 1, opened_.rows(0), product_, hidden, scratch, out_.counter, opened_.changes(0));
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) {
            float *row = product_ + m * hidden;
            p_.clip(row, out_.clip, hidden);
            p_.limit(row);
            ops.add_norm(x + m * hidden, row, post_norm_, layer_.eps, 1.0f, hidden, out + m * hidden);
        }
    }

  private:
    const Positions &p_;
    const gc_audio_layer &layer_;
    Product in_, out_;
    const float *norm_, *post_norm_;
    ClippedInputs normed_, opened_;
    float *product_;
};

// The first branch, then queries, keys and values of a run of rows.
class AudioKeys {
  public:
    AudioKeys(Arena &arena, const Positions &positions, Range run)
        : p_(positions),
          layer_(positions.layer),
          run_(run),
          ff_(arena, positions, {layer_.ff1_in, layer_.ff1_in_clip, 0}, {layer_.ff1_out, layer_.ff1_out_clip, 1}, layer_.ff1_norm,
              layer_.ff1_post_norm, run.last - run.first) {
        const gc_matrix *parts[3] = {&layer_.q, &layer_.k, &layer_.v};
        const gc_clip *clips[3] = {&layer_.q_clip, &layer_.k_clip, &layer_.v_clip};
        inputs_.allocate(arena, parts, p_.clips(clips), 3, run.last - run.first, layer_.activations);
        const gc_matrix *all[5] = {&layer_.ff1_in, &layer_.ff1_out, &layer_.q, &layer_.k, &layer_.v};
        scratch_.allocate(arena, most_scratch(all, 5, 1));
    }

    void run(ThreadPool &pool, int index, const float *x) {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t hidden = layer_.hidden, start = run_.first * hidden;
        Range own = own_rows(run_.last - run_.first, index, pool.size);
        void *scratch = scratch_.of(index);
        ff_.run(pool, index, own, x + start, p_.x + start, scratch);
        for (int64_t m = own.first; m < own.last; ++m) {
            float *row = inputs_.row(m);
            ops.clamp(p_.x + start + m * hidden, -layer_.clamp, layer_.clamp, hidden, row);
            ops.rms_norm(row, layer_.attn_norm, layer_.eps, hidden, row);
            inputs_.fill(m, row);
        }
        inputs_.complete(pool, index);
        parallel_gemm(pool, index, &layer_.q, 1, inputs_.rows(0), p_.q + start, hidden, scratch, 2, inputs_.changes(0));
        parallel_gemm(pool, index, &layer_.k, 1, inputs_.rows(1), p_.k + start, hidden, scratch, 3, inputs_.changes(1));
        parallel_gemm(pool, index, &layer_.v, 1, inputs_.rows(2), p_.v + start, hidden, scratch, 4, inputs_.changes(2));
        pool.barrier();
        for (int64_t row = run_.first + own.first; row < run_.first + own.last; ++row) finish(row * hidden);
    }

  private:
    void finish(int64_t at) const {
        const VectorOps &ops = *kernels().vector_ops;
        p_.clip(p_.q + at, layer_.q_clip, layer_.hidden);
        p_.clip(p_.k + at, layer_.k_clip, layer_.hidden);
        p_.clip(p_.v + at, layer_.v_clip, layer_.hidden);
        ops.scale(p_.k + at, layer_.key_scale, layer_.hidden, p_.k + at);
        for (int64_t head = 0; head < layer_.heads; ++head) {
            float *q = p_.q + at + head * layer_.head_dim;
            for (int64_t e = 0; e < layer_.head_dim; ++e) q[e] *= layer_.q_scale[e];
        }
    }

    const Positions &p_;
    const gc_audio_layer &layer_;
    Range run_;
    FeedForward ff_;
    ClippedInputs inputs_;
    Scratch scratch_;
};

// Attention of a run of rows, whose keys are all there, the convolution over time, the second branch and the last norm.
class AudioRows {
  public:
    AudioRows(Arena &arena, const Positions &positions, Range run)
        : p_(positions),
          layer_(positions.layer),
          run_(run),
          ff_(arena, positions, {layer_.ff2_in, layer_.ff2_in_clip, 3}, {layer_.ff2_out, layer_.ff2_out_clip, 4}, layer_.ff2_norm,
              layer_.ff2_post_norm, run.last - run.first) {
        int64_t rows = run.last - run.first;
        allocate(arena, heard_, layer_.attn_out, layer_.attn_out_clip, rows);
        allocate(arena, normed_, layer_.conv_in, layer_.conv_in_clip, rows);
        allocate(arena, mixed_, layer_.conv_out, layer_.conv_out_clip, rows);
        product_ = arena.array<float>(rows * layer_.hidden);
        halves_ = arena.array<float>(rows * 2 * layer_.hidden);
        const gc_matrix *all[5] = {&layer_.attn_out, &layer_.conv_in, &layer_.conv_out, &layer_.ff2_in, &layer_.ff2_out};
        scratch_.allocate(arena, most_scratch(all, 5, sizeof(float) * (size_t)(keys() + layer_.head_dim)));
    }

    void run(ThreadPool &pool, int index, float *out) {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t hidden = layer_.hidden;
        Range own = own_rows(run_.last - run_.first, index, pool.size);
        void *scratch = scratch_.of(index);
        add_attention(pool, index, own, scratch);
        add_convolution(pool, index, own, scratch);
        float *rows = p_.x + run_.first * hidden, *to = out + run_.first * hidden;
        ff_.run(pool, index, own, rows, rows, scratch);
        for (int64_t m = own.first; m < own.last; ++m) {
            p_.limit(rows + m * hidden);
            ops.rms_norm(rows + m * hidden, layer_.norm, layer_.eps, hidden, to + m * hidden);
        }
    }

  private:
    int64_t keys() const { return layer_.past + 1 + layer_.future; }

    void allocate(Arena &arena, ClippedInputs &inputs, const gc_matrix &matrix, const gc_clip &clip, int64_t rows) const {
        const gc_matrix *parts[1] = {&matrix};
        const gc_clip *clips[1] = {&clip};
        inputs.allocate(arena, parts, p_.clips(clips), 1, rows, layer_.activations);
    }

    // The sound of a row, at or after that of `sound`.
    int64_t sound_of(int64_t row, int64_t sound) const {
        while (p_.edges[sound + 1] <= row) ++sound;
        return sound;
    }

    // Attention and its projection, added to the rows.
    void add_attention(ThreadPool &pool, int index, Range own, void *scratch) {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t hidden = layer_.hidden, sound = 0;
        for (int64_t m = own.first; m < own.last; ++m) {
            int64_t row = run_.first + m;
            sound = sound_of(row, sound);
            for (int64_t head = 0; head < layer_.heads; ++head) attention(row, sound, head, static_cast<float *>(scratch));
            heard_.fill(m, p_.q + row * hidden);
        }
        heard_.complete(pool, index);
        parallel_gemm(pool, index, &layer_.attn_out, 1, heard_.rows(0), product_, hidden, scratch, 0, heard_.changes(0));
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) {
            float *row = p_.x + (run_.first + m) * hidden, *found = product_ + m * hidden;
            p_.clip(found, layer_.attn_out_clip, hidden);
            p_.limit(found);
            ops.add_norm(row, found, layer_.attn_post_norm, layer_.eps, 1.0f, hidden, row);
        }
    }

    // Puts what one head of a row hears in the query's place.
    void attention(int64_t row, int64_t sound, int64_t head, float *scratch) const {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t dim = layer_.head_dim, hidden = layer_.hidden, column = head * dim;
        int64_t first = row - layer_.past, last = row + layer_.future;
        first = first > p_.edges[sound] ? first : p_.edges[sound];
        last = last < p_.edges[sound + 1] ? last : p_.edges[sound + 1] - 1;
        float *q = p_.q + row * hidden + column, *found = scratch, *scores = found + dim, total = 0;
        for (int64_t key = first; key <= last; ++key) {
            int64_t place = layer_.past + 1 - (row - key);
            float score = ops.dot(q, p_.k + key * hidden + column, dim);
            if (place < layer_.num_distances) score += ops.dot(q, layer_.distances + place * hidden + column, dim);
            scores[key - first] = score;
        }
        int64_t count = last - first + 1;
        ops.softcap(scores, layer_.logit_cap, count);
        float best = scores[0];
        for (int64_t i = 1; i < count; ++i) best = scores[i] > best ? scores[i] : best;
        memset(found, 0, sizeof(float) * (size_t)dim);
        for (int64_t i = 0; i < count; ++i) {
            float weight = expf(scores[i] - best);
            total += weight;
            ops.add_scaled(p_.v + (first + i) * hidden + column, weight, dim, found);
        }
        ops.scale(found, 1.0f / total, dim, q);
    }

    // The gated convolution over time, added to the rows.
    void add_convolution(ThreadPool &pool, int index, Range own, void *scratch) {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t hidden = layer_.hidden, sound = 0;
        for (int64_t m = own.first; m < own.last; ++m) {
            float *row = normed_.row(m);
            ops.rms_norm(p_.x + (run_.first + m) * hidden, layer_.conv_norm, layer_.eps, hidden, row);
            normed_.fill(m, row);
        }
        normed_.complete(pool, index);
        parallel_gemm(pool, index, &layer_.conv_in, 1, normed_.rows(0), halves_, 2 * hidden, scratch, 1, normed_.changes(0));
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) {
            float *row = halves_ + m * 2 * hidden;
            p_.clip(row, layer_.conv_in_clip, 2 * hidden);
            ops.gate(row, row + hidden, hidden, p_.gated + (run_.first + m) * hidden);
        }
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) {
            sound = sound_of(run_.first + m, sound);
            convolve(run_.first + m, p_.edges[sound], mixed_.row(m));
            mixed_.fill(m, mixed_.row(m));
        }
        mixed_.complete(pool, index);
        parallel_gemm(pool, index, &layer_.conv_out, 1, mixed_.rows(0), product_, hidden, scratch, 2, mixed_.changes(0));
        pool.barrier();
        for (int64_t m = own.first; m < own.last; ++m) {
            p_.clip(product_ + m * hidden, layer_.conv_out_clip, hidden);
            ops.add_scaled(product_ + m * hidden, 1.0f, hidden, p_.x + (run_.first + m) * hidden);
        }
    }

    // Each channel over a row of a sound that begins at `start` and those before it, normed and opened.
    void convolve(int64_t row, int64_t start, float *out) const {
        const VectorOps &ops = *kernels().vector_ops;
        int64_t hidden = layer_.hidden;
        memset(out, 0, sizeof(float) * (size_t)hidden);
        for (int64_t tap = 0; tap < layer_.taps; ++tap) {
            int64_t from = row - (layer_.taps - 1) + tap;
            if (from >= start) ops.add_product(p_.gated + from * hidden, layer_.depthwise + tap * hidden, hidden, out);
        }
        p_.limit(out);
        ops.rms_norm(out, layer_.conv_inner_norm, layer_.eps, hidden, out);
        ops.gate(out, out, hidden, out);
    }

    const Positions &p_;
    const gc_audio_layer &layer_;
    Range run_;
    FeedForward ff_;
    ClippedInputs heard_, normed_, mixed_;
    float *product_, *halves_;  // [rows of the run, D], [rows of the run, 2 D]
    Scratch scratch_;
};

}  // namespace
}  // namespace gemcutter

// Computes rows first..last-1 of the positions x [T, D] of some sounds, whose first positions `edges` [sounds + 1] names, and the
// end, up to queries, keys and values, into `state` [5, T, D]. Returns 0, 1 if memory ran out, or OUT_OF_BOUNDS.
GC_EXPORT int gc_audio_keys(const gc_audio_layer *layer, const float *x, int64_t rows, const int64_t *edges, int64_t sounds,
                            int64_t first, int64_t last, float *state) {
    using namespace gemcutter;
    if (!are_edges(edges, sounds, rows) || !is_run(first, last, rows)) return OUT_OF_BOUNDS;
    return in_arena([&](Arena &arena) {
        Positions positions(*layer, rows, edges, sounds, state);
        AudioKeys keys(arena, positions, {first, last});
        parallel_region([&](ThreadPool &pool, int index) { keys.run(pool, index, x); });
    });
}

// out [T, D], rows first..last-1 = the rest of the layer, once the keys of all rows are in `state`. Runs of rows come in order, one
// after the other; out may be x. Returns the same.
GC_EXPORT int gc_audio_rows(const gc_audio_layer *layer, int64_t rows, const int64_t *edges, int64_t sounds, int64_t first,
                            int64_t last, float *state, float *out) {
    using namespace gemcutter;
    if (!are_edges(edges, sounds, rows) || !is_run(first, last, rows)) return OUT_OF_BOUNDS;
    return in_arena([&](Arena &arena) {
        Positions positions(*layer, rows, edges, sounds, state);
        AudioRows forward(arena, positions, {first, last});
        parallel_region([&](ThreadPool &pool, int index) { forward.run(pool, index, out); });
    });
}
