// How an entry point runs: memory from the calling thread's arena, then one region of the team.
#pragma once
#include <new>

#include "products.h"

namespace gemcutter {

// Run body(team, index) on all threads of the team.
template <typename Body>
void region(const Body &body) {
    run([](void *argument, Team &team, int index) { (*static_cast<const Body *>(argument))(team, index); },
        const_cast<Body *>(&body));
}

// Run call(arena) with an empty arena; 0, or 1 if there was no memory.
template <typename Call>
int in_arena(const Call &call) {
    Arena &arena = thread_arena();
    try {
        arena.clear();
        call(arena);
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}

}  // namespace gemcutter
