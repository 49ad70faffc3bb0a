// The plain C interface of the CPU kernels: the structs and enums that Python passes through ctypes (gemcutter/native.py).
//
// Owns the layout of everything that crosses the C boundary; refuses to know torch, Python objects and checkpoints. Every pointer
// is to memory that the caller keeps alive during the call; no entry point keeps a pointer afterwards. Read `layout.h` for the
// packed matrix format, `kernels.h` for what a processor level provides, `layer_ops.cpp` and `embed_head.cpp` for the entry points.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define GC_EXPORT extern "C" __declspec(dllexport)
#else
#define GC_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum gc_codes {
    GC_U4 = 0,
    GC_U6 = 1,
    GC_S8 = 2,
    GC_BF16 = 3,  // this one and the two after it are dense
    GC_F16 = 4,
    GC_F32 = 5,
    GC_T4 = 6,
    GC_E4M3 = 7
};
enum gc_scales { GC_SCALE_F16 = 0, GC_SCALE_BF16 = 1, GC_SCALE_F32 = 2, GC_SUPER32 = 3, GC_SUPER16 = 4 };
enum gc_activations {
    GC_INT8 = 0,
    GC_BF16_ROWS = 1,
    GC_FLOAT_ROWS = 2
};  // precision of activations in products with packed matrices

typedef struct gc_delta gc_delta;

typedef struct {
    const void *data;  // panels of 16 rows (layout.h), or dense rows
    int64_t rows, columns;
    int64_t stride;  // bytes from one panel, or dense row, to the next
    int32_t codes, scales;
    int32_t group;      // columns of one scale
    int32_t has_bias;   // each scale is followed by a bias
    int32_t offset;     // added to every code
    int32_t exponent;   // float16 scales of super-blocks count in units of 2^exponent
    int8_t levels[16];  // of GC_T4: what each code stands for
    int32_t num_deltas, reserved;
    const gc_delta *deltas;  // what adapters add to products with the matrix, ascending by adapter
    const int32_t *order;    // the column of activation rows that each column stands for, where groups are scattered; or null
} gc_matrix;

// What an adapter adds to some rows of a matrix, for the activation rows that ask for it: up times down, in float32.
struct gc_delta {
    gc_matrix down;       // dense, [R, columns]
    const void *up;       // [P, R, 16], the columns of P panels of 16 rows; zero beyond the last row
    int64_t start, rows;  // the first of the matrix' rows that change, a multiple of 16, and how many do
    int32_t up_codes;     // GC_BF16 or GC_F32
    int32_t adapter;      // the number that rows ask for it by
};

enum gc_kinds {
    GC_Q4_0 = 0,  // and IQ4_NL, whose blocks are alike
    GC_Q8_0 = 1,
    GC_Q4_K = 2,
    GC_Q5_K = 3,
    GC_Q6_K = 4,
    GC_STREAM4 = 5,
    GC_STREAM8 = 6,
    GC_MXFP4 = 7,
    GC_IQ4_XS = 8
};

// Rows in a file's format. Blocks hold codes and scales; streams of 4 or 8 bits have separate scales and biases (or null), of
// the same type as the target's.
typedef struct {
    const void *codes, *scales, *biases;
    int64_t code_stride, scale_stride;  // bytes from one row to the next
    int32_t kind;
    int32_t flip;  // XORed with every byte of a stream: 128 turns unsigned codes into signed ones
} gc_source;

// One step: the flat rows of S sequences, and where one layer group's keys are in the KV cache (Step and KVRange of ops/step.py).
typedef struct {
    int64_t rows, sequences;
    const int64_t *query_start;      // [S + 1] sequence s owns rows query_start[s] to query_start[s + 1] - 1
    const int64_t *positions;        // [N] absolute, ascending within a sequence
    const int64_t *kv_start;         // [S] the first position of the sequence that the cache holds
    const int64_t *kv_first_slot;    // [S] the slot of that position if slots are consecutive, else -1
    const int64_t *const *kv_slots;  // [S] otherwise the slots of positions kv_start, kv_start + 1, ...
    const int64_t *kv_length;        // [S] how many positions of the sequence the cache holds
    const int64_t *slot_mapping;     // [N] the slot that each row's key and value are written to; null where none are
    const float *cos, *sin;          // [N, E / 2]; null where nothing is rotated
    const int64_t *
        last_visible;  // [N] the last position that a row sees if later than its own, never descending within a sequence; or null
    const int32_t *adapters;        // [N] the number of the adapter that each row asks for, or -1; null where no row asks for any
    mutable int64_t checked_slots;  // set by the first layer: the step was found to fit a cache of so many slots (bounds.h)
} gc_step;

// The tensors [T, K, E] of the KV cache that hold one layer's keys and values.
typedef struct {
    void *k, *v;
    float *k_scale, *v_scale;  // [T, K], of GC_S8: an element is its code times its vector's scale; null in other types
    int64_t slots;             // T
    int32_t dtype;             // GC_S8, GC_BF16 or GC_F32
    int32_t exact;             // 1: queries and softmax weights stay float32, even where products of bfloat16 are faster
} gc_kv;

// The shape of one layer's attention.
typedef struct {
    int64_t heads, kv_heads, head_dim;
    int64_t window;  // keys up to its own that a query may see; 0 for all
} gc_attention;

// This process as one of `world` tensor-parallel ranks, which share a segment of memory (ranks.h), or sum by other means.
typedef struct {
    int (*sum)(float *x, int64_t n);  // x becomes the sum of all ranks' x; not 0: a rank is gone. Null: over the segment
    void *segment;
    int64_t slot;  // floats of one rank's part of one exchange
    int32_t rank, world;
    uint32_t step;      // exchanges so far
    int32_t has_ended;  // 1: some rank is gone
} gc_ranks;

// A mixture of experts: scales of every expert, and matrices of those that this rank holds, in order.
typedef struct {
    int64_t experts, top_k, width;
    int64_t first, held;  // experts first..first+held-1 have matrices here
    gc_matrix router;
    const gc_matrix *gate, *up, *down;                           // [held] each
    const float *router_scale, *expert_scale;                    // [D], [X]
    const float *norm, *dense_branch_norm, *expert_branch_norm;  // [D]
} gc_experts;

// One layer: its sizes, matrices and norms; a matrix that a layer lacks has 0 rows, a norm that it lacks is null.
typedef struct {
    gc_attention attention;
    int64_t hidden, ple_dim;
    gc_matrix attn_in[3];  // q, k, v; without v the value is the raw key projection, without k the layer only reads
    gc_matrix attn_out, gate, up, down, ple_gate, ple_out;
    const float *attn_norm, *q_norm, *k_norm, *attn_post_norm, *mlp_norm, *mlp_post_norm, *ple_post_norm;
    const gc_experts *experts;
    gc_ranks *ranks;  // whose sums follow the products of attn_out, down and experts; null: there is one rank
    float eps;
    float mlp_scale, ple_scale;  // layer output scale: set in the layer's last op, 1 in the other
    int32_t has_v_norm;
    int32_t activations;  // enum gc_activations
    int32_t reserved;
} gc_layer;

// The per-layer embeddings of a range of layers: only the rows of the projection and columns of the table for that range.
typedef struct {
    gc_matrix projection, table;  // a table with 0 rows: the caller passes its rows
    const gc_source *source;      // rows as a file packs them, each repacked on demand as the single row of `table`; or null
    const float *norm;            // [P]
    int64_t dim;                  // P
    int64_t vocab;                // rows of the table, wherever they are
    float eps, token_scale, context_scale;
    int32_t activations;
} gc_ple;

// An assistant. Where it has centroids, the head's rows are sorted under them: head.rows / centroids.rows neighbouring rows, whole
// panels of 16, belong to each, and only those under the `top_k` nearest centroids are drafted from.
typedef struct {
    gc_matrix embed;            // the target's token table [V, T]
    gc_matrix in, out;          // [D, 2T], [T, D]
    gc_matrix centroids, head;  // [C, D], or 0 rows; [V, D]
    const gc_layer *const *layers;
    const float *norm;     // [D]
    const int64_t *order;  // [V] the tokens that rows of the head stand for; null: their own numbers
    int64_t num_layers, hidden, target_hidden, top_k;
    float embed_scale, eps, softcap;
    int32_t activations;
} gc_drafter;

// How far the values that go into a product and come out of it reach; both infinite where nothing is clipped.
typedef struct {
    float input_min, input_max, output_min, output_max;
} gc_clip;

// One layer of a vision encoder: attention of each image to itself, then the MLP, each between norms and beside the residual.
typedef struct {
    gc_matrix q, k, v, out, gate, up, down;
    gc_clip q_clip, k_clip, v_clip, out_clip, gate_clip, up_clip, down_clip;
    const float *attn_norm, *q_norm, *k_norm, *attn_post_norm, *mlp_norm, *mlp_post_norm;
    int64_t hidden, heads, kv_heads, head_dim, mlp_width;
    float eps;
    int32_t is_clipped;
    int32_t activations;  // enum gc_activations
    int32_t reserved;
} gc_vision_layer;

// One layer of an audio encoder: half a feed-forward, attention to the near past, a gated convolution over time, the other half, and
// a norm. Distances are projected [P, H, E], from the farthest past on, the P-th being `past` - P + 1.
typedef struct {
    gc_matrix ff1_in, ff1_out, q, k, v, attn_out, conv_in, conv_out, ff2_in, ff2_out;
    gc_clip ff1_in_clip, ff1_out_clip, q_clip, k_clip, v_clip, attn_out_clip, conv_in_clip, conv_out_clip, ff2_in_clip,
        ff2_out_clip;
    const float *ff1_norm, *ff1_post_norm, *attn_norm, *attn_post_norm, *conv_norm, *conv_inner_norm, *ff2_norm, *ff2_post_norm,
        *norm;                                     // those behind the feed-forward branches times their weight in the sum
    const float *q_scale, *distances, *depthwise;  // [E], [P, H * E], [taps, D]
    int64_t hidden, heads, head_dim, ff_width, taps;
    int64_t past, future, num_distances;  // keys before a query's own, and behind it, that it sees
    float key_scale, logit_cap, clamp, eps;
    int32_t is_clipped;
    int32_t activations;  // enum gc_activations
} gc_audio_layer;
