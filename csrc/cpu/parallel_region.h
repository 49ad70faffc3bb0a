// How an entry point runs: it allocates from the calling thread's arena, then opens one parallel region of the thread pool.
//
// Owns the two templates that every entry point uses. Read `thread_pool.h` for the pool, `parallel_gemm.h` for the arena.
#pragma once
#include <new>

#include "parallel_gemm.h"

namespace gemcutter {

// Runs body(pool, index) on all threads of the pool.
template <typename Body>
void parallel_region(const Body &body) {
    run_parallel([](void *argument, ThreadPool &pool, int index) { (*static_cast<const Body *>(argument))(pool, index); },
                 const_cast<Body *>(&body));
}

// Calls call(arena) with an empty arena; returns 0, or 1 if memory ran out.
template <typename Call>
int in_arena(const Call &call) {
    Arena &arena = thread_arena();
    try {
        arena.clear();
        call(arena);
        return 0;
    } catch (const std::bad_alloc &) { return 1; }
}

}  // namespace gemcutter
