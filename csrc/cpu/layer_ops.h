// The ops of a layer as parts of one parallel region: qkv, attention (attention_split.h), attn_out, mlp, ple_gate.
//
// An op is constructed before the region, which allocates its memory, and run inside it by every thread of the pool, so that
// several ops can share one region. Between ops a row belongs to the thread that `own_rows` names: an op begins with its thread's
// own rows complete and leaves them complete, and needs no barrier before or after it unless its comment says so. Shape letters:
// N rows, M kept rows, D hidden, H heads, K key heads, E head dim, F mlp width, P per-layer-embedding dim. Read `layer_ops.cpp`
// for the entry points, `experts.cpp` for the mixture of experts, `ops/reference.py` for the definition of each op.
#pragma once
#include <optional>

#include "attention_split.h"

namespace gemcutter {

// Indices of the pool counters within one parallel region; a layer uses each once.
enum Counter {
    COUNT_KV,
    COUNT_Q,
    COUNT_ATTENTION,
    COUNT_OUT,
    COUNT_GATED,
    COUNT_DOWN,
    COUNT_PLE_GATE,
    COUNT_PLE_OUT,
    COUNT_ROUTER,
    COUNT_EXPERTS_IN,
    COUNT_EXPERTS_OUT
};

inline Range own_rows(int64_t count, int index, int size) { return share(count, 1, index, size); }

// Scratch memory with one part for each thread.
struct Scratch {
    char *memory = nullptr;
    size_t stride = 0;
    void allocate(Arena &arena, size_t bytes);
    void *of(int index) const { return memory + (size_t)index * stride; }
};

// The input rows of a matrix product: in float32 and in the formats that its kernels read.
struct ActivationBuffer {
    float *x = nullptr;
    ConvertedRows converted;
    void allocate(Arena &arena, const gc_matrix *parts, int num_parts, int64_t count, int64_t columns, int activations);
    void allocate(Arena &arena, int wanted, int64_t count, int64_t columns, int activations, const int32_t *order = nullptr);
    float *row(int64_t m) { return x + m * converted.rows.columns; }
    void convert(int64_t m) { convert_row(converted, m, row(m)); }  // call once row(m) is filled
};

class Qkv {
  public:
    // `keep` lists the rows whose queries are computed; null means all. `all` are the adapters of all rows, `wanted` of those.
    Qkv(Arena &arena, const gc_layer &layer, const gc_step &step, const gc_kv *kv, const int64_t *keep, int64_t kept,
        const AdapterRuns &all, const AdapterRuns &wanted);
    // q [M, H, E], complete after the next barrier.
    void run(ThreadPool &pool, int index, const float *x, float *q);

  private:
    void finish_query(int64_t m, int64_t head, float *q) const;
    void write_keys(int64_t n, int64_t head, float *spare) const;

    const gc_layer &layer_;
    const gc_step &step_;
    const gc_kv *cache_;  // null in a layer that only reads
    const int64_t *keep_;
    int64_t kept_, q_width_, kv_width_;  // kv_width_: 0 in a layer that only reads the cache
    int num_kv_;
    ActivationBuffer all_, wanted_;         // `wanted_` only where some rows are dropped
    LowRank all_changes_, wanted_changes_;  // as above
    float *kv_, *raw_q_;                    // projection outputs; one matrix [N, q + kv] where all rows are kept
    int64_t kv_stride_, q_stride_;
    Scratch scratch_, spare_;
};

class AttnOut {
  public:
    AttnOut(Arena &arena, const gc_layer &layer, int64_t rows, const AdapterRuns &adapters);
    // out = x + norm(o times the out-projection); x row keep[m] where keep is given. Needs all of o complete (a barrier before).
    void run(ThreadPool &pool, int index, const float *x, const int64_t *keep, const float *o, float *out);

  private:
    const gc_layer &layer_;
    int64_t rows_;
    ConvertedRows converted_;
    LowRank changes_;
    float *product_;
    Scratch scratch_;
};

class Experts {
  public:
    Experts(Arena &arena, const gc_layer &layer, int64_t rows, const AdapterRuns &adapters);
    // Chooses the experts of all rows x [N, D] and groups rows by expert; ends with a barrier.
    void route(ThreadPool &pool, int index, const float *x);
    // Runs the feed-forward of the chosen experts; ends with a barrier.
    void run(ThreadPool &pool, int index);
    // out [D] = the sum of one row's experts, in ascending order of experts.
    void sum(int64_t row, float *out) const;

  private:
    struct Group {  // the rows of one expert: pairs first to first + count - 1
        int64_t expert, first, count;
    };
    void route(int64_t row);
    void group();
    Rows rows_of(const Rows &all, const Group &group) const;
    int formats_at_any_count(const gc_matrix *parts, int num_parts) const;
    template <typename Item>
    void for_each_panels(ThreadPool &pool, int counter, const gc_matrix &like, int64_t at_once, Item item) const;

    const gc_layer &layer_;
    const gc_experts &experts_;
    int64_t rows_, num_groups_ = 0, placed_ = 0;  // placed_: pairs whose experts this rank holds
    ActivationBuffer routed_, gated_;
    LowRank router_changes_;
    float *normed_;            // [N, D]
    ConvertedRows row_rows_;   // normed_ in the experts' formats, where there are several rows
    ConvertedRows pair_rows_;  // one for each (row, expert) pair, sorted by expert; a single one where there is one row
    float *router_logits_, *weights_, *product_;  // [N, X], [N, top_k], [pairs, D]
    int64_t *chosen_, *places_;                   // [N, top_k]: a row's experts in ascending order, and the pair of each
    int64_t *row_of_;                             // [pairs]
    Group *groups_;
    Scratch scratch_;
};

class Mlp {
  public:
    Mlp(Arena &arena, const gc_layer &layer, int64_t rows, const AdapterRuns &adapters);
    // out = (x + the feed-forward of x) * scale; out may be x.
    void run(ThreadPool &pool, int index, const float *x, float *out, float scale);

  private:
    void join(int64_t row, const float *x, float *out, float scale);

    const gc_layer &layer_;
    int64_t rows_;
    ActivationBuffer normed_, gated_;
    LowRank in_changes_, out_changes_;
    float *product_;
    std::optional<Experts> experts_;
    Scratch scratch_;
};

class PleGate {
  public:
    PleGate(Arena &arena, const gc_layer &layer, int64_t rows, const AdapterRuns &adapters);
    // out = (x + norm(gated per-layer embedding)) * scale, with ple rows `stride` elements apart; out may be x.
    void run(ThreadPool &pool, int index, const float *x, const float *ple, int64_t stride, float *out, float scale);

  private:
    const gc_layer &layer_;
    int64_t rows_;
    ActivationBuffer input_, gated_;
    LowRank in_changes_, out_changes_;
    float *product_;
    Scratch scratch_;
};

}  // namespace gemcutter
