// Splits the attention of a step into work items for the thread pool, and merges the partial results of split-KV items.
//
// Owns the split and the merging of partial softmaxes, no other arithmetic; refuses to know vector instructions. Read
// `attention_split.h` for how the work is split, `attention.cpp` for the kernels.
#include "attention_split.h"

#include <math.h>
#include <string.h>

#include "bounds.h"
#include "parallel_region.h"

namespace gemcutter {

// Work on one key head of one sequence: a block of query rows with all their keys, or one piece of the keys of a few query rows.
struct AttentionItem {
    int64_t sequence, kv_head, row, rows;
    int64_t number;  // of the piece: positions number * size up to (number + 1) * size
    int64_t merge;   // index of the first row's AttentionMerge, that of the next is kv_heads later; -1 for a block of rows
};

// The partial results of one query row and one key head; none where the row sees no key.
struct AttentionMerge {
    int64_t row, kv_head, piece, pieces;  // indices of partial results: one for each piece of the keys, in order
    int64_t first, last, size;            // the positions that the row sees, and of a piece
};

namespace {

constexpr int64_t MIN_PIECE = 128;   // keys: fewer would cost more to merge than the split gains
constexpr int64_t MAX_PIECES = 32;   // of one row, unless the kernel's limit on keys asks for more
constexpr int64_t MIN_QUERIES = 48;  // query vectors (rows times heads) of a block, below which packing its keys does not pay

int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t group_of(const gc_attention &layer) { return layer.heads / layer.kv_heads; }

// Enumerates the work items of a step: once to count them, then again to record them.
struct WorkSplitter {
    const gc_step &step;
    const gc_attention &layer;
    int64_t block;  // rows
    AttentionItem *items;
    AttentionMerge *merges;
    int64_t num_items = 0, num_merges = 0, num_pieces = 0;

    void split() {
        for (int64_t s = 0; s < step.sequences; ++s)
            if (rows_of(s) > FEW_ROWS) split_rows(s);
        for (int64_t s = 0; s < step.sequences; ++s)
            if (rows_of(s) <= FEW_ROWS) split_keys(s);
    }

    int64_t rows_of(int64_t s) const { return step.query_start[s + 1] - step.query_start[s]; }

    // The last rows have the most keys and come first, so that no long item is started last.
    void split_rows(int64_t s) {
        for (int64_t end = step.query_start[s + 1]; end > step.query_start[s];) {
            int64_t rows = min_of(block, end - step.query_start[s]);
            end -= rows;
            for (int64_t head = 0; head < layer.kv_heads; ++head) add({s, head, end, rows, 0, -1});
        }
    }

    // Rows that see some of the same keys share items. Pieces lie on a grid of positions whose size depends on the row alone.
    void split_keys(int64_t s) {
        for (int64_t row = step.query_start[s]; row < step.query_start[s + 1];) {
            AttentionMerge oldest = pieces_of(s, row), newest = oldest;
            int64_t end = row + 1;
            for (; end < step.query_start[s + 1]; ++end) {
                AttentionMerge next = pieces_of(s, end);
                if (next.size != oldest.size || next.first >= newest.last) break;
                newest = next;
            }
            split_group(s, row, end, oldest, newest);
            row = end;
        }
    }

    // Heads of one slot are adjacent in memory, so they are adjacent items.
    void split_group(int64_t s, int64_t row, int64_t end, const AttentionMerge &oldest, const AttentionMerge &newest) {
        int64_t first_merge = num_merges, low = oldest.first / oldest.size, high = ceil_div(newest.last, oldest.size);
        for (int64_t each = row; each < end; ++each) add_merges(pieces_of(s, each));
        int64_t most = rows_at_once(end - row, max_of(high - low, 1) * layer.kv_heads);
        for (int64_t number = low; number < high; ++number)
            for (int64_t first = row; first < end; first += most)
                for (int64_t head = 0; head < layer.kv_heads; ++head)
                    add({s, head, first, min_of(most, end - first), number, first_merge + (first - row) * layer.kv_heads + head});
    }

    // As many rows as the kernel takes, or fewer where that would leave threads idle.
    int64_t rows_at_once(int64_t rows, int64_t pieces) const {
        int64_t most = min_of(rows, max_of(DECODE_QUERIES / group_of(layer), 1));
        while (most > 1 && ceil_div(rows, most) * pieces < 2 * threads()) most = (most + 1) / 2;
        return most;
    }

    AttentionMerge pieces_of(int64_t s, int64_t row) const {
        int64_t last = newest_of(step, row) + 1, first = step.kv_start[s];
        if (layer.window) first = max_of(first, step.positions[row] + 1 - layer.window);
        int64_t size = max_of(MIN_PIECE, ceil_div(ceil_div(last - first, MAX_PIECES), 16) * 16);
        size = min_of(size, DECODE_KEYS);
        return {row, 0, 0, last > first ? ceil_div(last, size) - first / size : 0, first, last, size};
    }

    void add_merges(AttentionMerge merge) {
        for (; merge.kv_head < layer.kv_heads; ++merge.kv_head, ++num_merges, num_pieces += merge.pieces) {
            merge.piece = num_pieces;
            if (merges) merges[num_merges] = merge;
        }
    }

    void add(const AttentionItem &item) {
        if (items) items[num_items] = item;
        ++num_items;
    }
};

// Query rows of a block: the largest number that the kernel takes, or fewer where that would leave threads idle.
int64_t block_rows(const gc_step &step, const gc_attention &layer) {
    int64_t group = group_of(layer), block = kernels().attention->prefill_rows(group, layer.head_dim);
    while (block / 2 * group >= MIN_QUERIES && ceil_div(step.rows, block) * layer.kv_heads < 3 * threads()) block /= 2;
    return block;
}

int64_t element_bytes(int32_t dtype) { return dtype == GC_F32 ? 4 : dtype == GC_S8 ? 1 : 2; }

Keys keys_of(const AttentionPlan &plan, const AttentionItem &item) {
    const gc_attention &layer = plan.layer;
    const gc_step &step = *plan.step;
    int64_t offset = item.kv_head * layer.head_dim * element_bytes(plan.kv.dtype), first_slot = step.kv_first_slot[item.sequence];
    Keys keys = {};
    keys.k = static_cast<const char *>(plan.kv.k) + offset;
    keys.v = static_cast<const char *>(plan.kv.v) + offset;
    keys.stride = layer.kv_heads * layer.head_dim;
    keys.dtype = plan.kv.dtype;
    keys.start = step.kv_start[item.sequence];
    keys.first_slot = first_slot;
    keys.slots = first_slot < 0 ? step.kv_slots[item.sequence] : nullptr;
    keys.exact = plan.kv.exact;
    if (plan.kv.dtype != GC_S8) return keys;
    keys.scale_stride = layer.kv_heads;
    keys.k_scale = plan.kv.k_scale + item.kv_head, keys.v_scale = plan.kv.v_scale + item.kv_head;
    return keys;
}

void run_item(const AttentionPlan &plan, const AttentionItem &item, const float *q, float *out, void *scratch) {
    const gc_attention &layer = plan.layer;
    int64_t group = group_of(layer), dim = layer.head_dim, stride = layer.heads * dim;
    int64_t at = item.row * stride + item.kv_head * group * dim;
    Keys keys = keys_of(plan, item);
    if (item.merge < 0)
        return kernels().attention->prefill(q + at, out + at, stride, item.rows, group, dim, plan.step->positions + item.row,
                                            plan.step->last_visible ? plan.step->last_visible + item.row : nullptr, layer.window,
                                            &keys, scratch);
    DecodeRow rows[FEW_ROWS];
    int64_t count = 0, base = 0;
    for (int64_t m = 0; m < item.rows; ++m) {
        const AttentionMerge &merge = plan.merges[item.merge + m * layer.kv_heads];
        base = item.number * merge.size;
        int64_t first = max_of(merge.first, base), last = min_of(merge.last, base + merge.size);
        int64_t piece = merge.piece + item.number - merge.first / merge.size;
        if (first < last)
            rows[count++] = {q + at + m * stride,       first, last, plan.partial + piece * group * dim, plan.top + piece * group,
                             plan.total + piece * group};
    }
    if (count) kernels().attention->decode(rows, count, group, dim, &keys, base, scratch);
}

// Combines the partial results of one head of a row: each is weighted by exp(its maximum - the largest maximum).
void merge_head(const AttentionPlan &plan, const AttentionMerge &merge, int64_t head, float *out) {
    int64_t group = group_of(plan.layer), dim = plan.layer.head_dim;
    const float *top = plan.top + merge.piece * group + head, *total = plan.total + merge.piece * group + head;
    float best = -INFINITY, sum = 0;
    for (int64_t i = 0; i < merge.pieces; ++i) best = top[i * group] > best ? top[i * group] : best;
    for (int64_t i = 0; i < merge.pieces; ++i) sum += total[i * group] * expf(top[i * group] - best);
    memset(out, 0, sizeof(float) * (size_t)dim);
    for (int64_t i = 0; i < merge.pieces; ++i) {
        const float *part = plan.partial + ((merge.piece + i) * group + head) * dim;
        kernels().vector_ops->add_scaled(part, expf(top[i * group] - best) / sum, dim, out);
    }
}

}  // namespace

AttentionPlan plan_attention(Arena &arena, const gc_step &step, const gc_attention &layer, const gc_kv &kv) {
    int64_t group = group_of(layer);
    WorkSplitter count = {step, layer, block_rows(step, layer), nullptr, nullptr};
    count.split();
    AttentionPlan plan = {};
    plan.step = &step, plan.layer = layer, plan.kv = kv;
    plan.num_items = count.num_items, plan.num_merges = count.num_merges;
    plan.items = arena.array<AttentionItem>(count.num_items);
    plan.merges = arena.array<AttentionMerge>(count.num_merges);
    plan.partial = arena.array<float>(count.num_pieces * group * layer.head_dim);
    plan.top = arena.array<float>(count.num_pieces * group);
    plan.total = arena.array<float>(count.num_pieces * group);
    plan.scratch_stride = (kernels().attention->scratch_bytes(group, layer.head_dim) + 63) / 64 * 64;
    plan.scratch = arena.array<char>((int64_t)plan.scratch_stride * threads());
    WorkSplitter record = {step, layer, count.block, plan.items, plan.merges};
    record.split();
    return plan;
}

void attention(ThreadPool &pool, int index, const AttentionPlan &plan, const float *q, float *out, int counter) {
    void *scratch = plan.scratch + plan.scratch_stride * (size_t)index;
    for (int64_t i; (i = pool.counters[counter].fetch_add(1, std::memory_order_relaxed)) < plan.num_items;)
        run_item(plan, plan.items[i], q, out, scratch);
    if (!plan.num_merges) return;
    pool.barrier();
    int64_t group = group_of(plan.layer), dim = plan.layer.head_dim;
    Range own = share(plan.num_merges * group, 1, index, pool.size);
    for (int64_t i = own.first; i < own.last; ++i) {
        const AttentionMerge &merge = plan.merges[i / group];
        merge_head(plan, merge, i % group, out + (merge.row * plan.layer.heads + merge.kv_head * group + i % group) * dim);
    }
}

}  // namespace gemcutter

// Attention of all rows of a step: out [N, H, E] from q [N, H, E], float32. Returns 0, 1 if memory ran out, or OUT_OF_BOUNDS.
GC_EXPORT int gc_attention_forward(const float *q, const gc_step *step, const gc_attention *layer, const gc_kv *kv, float *out) {
    using namespace gemcutter;
    if (!fits(*step, *kv)) return OUT_OF_BOUNDS;
    return in_arena([&](Arena &arena) {
        AttentionPlan plan = plan_attention(arena, *step, *layer, *kv);
        parallel_region([&](ThreadPool &pool, int index) { attention(pool, index, plan, q, out, 0); });
    });
}
