// How many threads a parallel region gets: all that are wanted while cores are free, fewer while other programs take them.
//
// Owns the decision alone; refuses to know clocks and threads. A thread whose core is taken stops all that wait for it at the next
// barrier, so that on a busy machine a smaller team can be the faster one. What other programs do can't be known, so sizes are
// tried: one size smaller when threads lose cores, one size larger every now and then; the faster one stays.
#pragma once
#include <stdint.h>

namespace gemcutter {

// What became of the time of one region's threads, in ns.
struct RegionTimes {
    int size;              // threads
    int64_t wall;          // from the region's begin to its end
    int64_t useful;        // of all threads: on a core, and not waiting for another
    int64_t stolen;        // of all threads: ready to run, without a core
    bool is_memory_bound;  // weights are streamed for few rows: one thread more brings less than it could compute
};

class TeamSize {
  public:
    // Threads of the next region, at most `wanted`.
    int next(int wanted);
    // Whether threads lost cores to other programs lately: then waiting threads had better sleep.
    bool is_contended() const { return is_contended_; }
    void note(const RegionTimes &region);

  private:
    enum Trial { NONE, SMALLER, LARGER };
    void decide(double speed, double cores_taken);
    bool can_be_better(double speed) const;
    void begin_trial(double speed);
    void end_trial(bool is_better, double speed);
    void hold(int64_t ns);

    int wanted_ = 1, size_ = 1;
    bool is_contended_ = false, is_memory_bound_ = false;
    Trial trial_ = NONE, next_ = SMALLER;
    double before_ = 0;  // the speed of the size before a trial
    int64_t wall_ = 0, useful_ = 0, stolen_ = 0;
    int64_t held_ = 0, patience_ = 0;  // ns since the last decision, and until the next trial
};

}  // namespace gemcutter
