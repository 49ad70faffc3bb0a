// The plain C interface of the CPU kernels: what Python sees through ctypes.
//
// Owns the structs that cross the border and the list of entry points; refuses to know torch, Python and checkpoints. Every
// pointer is to memory that the caller keeps alive during the call; nothing here is kept afterwards. Read `layout.h` for how a
// matrix lies in memory, `kernels.h` for what a processor level must provide, `sentences.cpp` for the lines of a layer.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define GC_EXPORT extern "C" __declspec(dllexport)
#else
#define GC_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum gc_codes { GC_U4 = 0, GC_U6 = 1, GC_S8 = 2, GC_BF16 = 3, GC_F16 = 4, GC_F32 = 5 };  // from GC_BF16 on: dense
enum gc_scales { GC_SCALE_F16 = 0, GC_SCALE_BF16 = 1, GC_SCALE_F32 = 2, GC_SUPER32 = 3, GC_SUPER16 = 4 };
enum gc_activations { GC_INT8 = 0, GC_BF16_ROWS = 1, GC_FLOAT_ROWS = 2 };  // how packed matrices meet their rows

typedef struct {
    const void *data;  // panels of 16 rows (layout.h), or dense rows
    int64_t rows, columns;
    int64_t stride;  // bytes from one panel, or dense row, to the next
    int32_t codes, scales;
    int32_t group;     // columns of one scale
    int32_t has_bias;  // a bias beside each scale
    int32_t offset;    // added to every code
    int32_t reserved;
} gc_matrix;

enum gc_kinds { GC_Q4_0 = 0, GC_Q8_0 = 1, GC_Q4_K = 2, GC_Q5_K = 3, GC_Q6_K = 4, GC_STREAM4 = 5, GC_STREAM8 = 6 };

// Rows of a file. Blocks hold everything; streams of 4 or 8 bits have scales, and biases or null, apart, typed as the target's.
typedef struct {
    const void *codes, *scales, *biases;
    int64_t code_stride, scale_stride;  // bytes from one row to the next
    int32_t kind;
    int32_t flip;  // exclusively or-ed to the bytes of a stream: 128 makes unsigned ones signed
} gc_source;

// One step: the flat rows of several sequences, and where one group's keys lie (Step and Span of ops/step.py).
typedef struct {
    int64_t rows, sequences;
    const int64_t *row_start;          // [S + 1] sequence s owns rows row_start[s] to row_start[s + 1] - 1
    const int64_t *positions;          // [N] absolute, ascending within a sequence
    const int64_t *span_start;         // [S] the first position that the pool holds of the sequence
    const int64_t *span_low;           // [S] its slot if the slots are consecutive, else -1
    const int64_t *const *span_slots;  // [S] else the slots of positions span_start, span_start + 1, ...
    const int64_t *slots;              // [N] where the rows' own keys go; null where none are written
    const float *cos, *sin;            // [N, E / 2]; null where nothing is rotated
} gc_step;

// Attention of one layer: its shape, and the pool tensors [T, K, E] that it reads.
typedef struct {
    const void *k, *v;
    int64_t heads, kv_heads, head_dim;  // head_dim is a multiple of 32
    int64_t window;                     // keys that a query may see, itself included; 0 for all
    int32_t dtype;                      // of k and v: GC_BF16 or GC_F32
    int32_t reserved;
} gc_attention;

// A mixture of experts: matrices and scales of every expert, in order.
typedef struct {
    int64_t experts, top_k, width;
    gc_matrix router;
    const gc_matrix *gate, *up, *down;                           // [X] each
    const float *router_scale, *expert_scale;                    // [D], [X]
    const float *norm, *dense_branch_norm, *expert_branch_norm;  // [D]
} gc_experts;

// One layer: its sizes, matrices and norms; what a layer lacks has no rows, or is null.
typedef struct {
    gc_attention attention;  // k and v as the pool has them now
    int64_t hidden, ple_dim;
    gc_matrix attn_in[3];  // q, k, v; without v the value is the raw key projection, without k the layer only reads
    gc_matrix attn_out, gate, up, down, ple_gate, ple_out;
    const float *attn_norm, *q_norm, *k_norm, *attn_post_norm, *mlp_norm, *mlp_post_norm, *ple_post_norm;
    const gc_experts *experts;
    float eps;
    float feed_scale, inject_scale;  // of the layer's output, in whichever line closes it; 1 in the other
    int32_t has_v_norm;
    int32_t activations;  // enum gc_activations
    int32_t reserved;
} gc_layer;

// The per-layer embeddings of a span of layers: rows of the projection and columns of the table cut to the span.
typedef struct {
    gc_matrix project, table;  // a table without rows: its rows come from the caller
    const gc_source *source;   // rows as a file packs them, each laid out as the one row of `table` when it is wanted; or null
    const float *norm;         // [P]
    int64_t dim;               // P
    float eps, token_scale, context_scale;
    int32_t activations;
} gc_ple;
