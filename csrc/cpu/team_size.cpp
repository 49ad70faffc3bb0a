// The trials behind the size of a team. Read `team_size.h` for what they are for.
#include "team_size.h"

#include <math.h>

namespace gemcutter {
namespace {

constexpr int64_t WINDOW = 20'000'000;                                     // ns that a decision looks back: several time slices
constexpr int64_t FIRST_HOLD = 100'000'000, LONGEST_HOLD = 3'200'000'000;  // ns between trials; doubled by each that fails
constexpr int64_t WORTH = 10;                 // a trial that fails is not repeated before this many times what it took
constexpr double NOTICED = 0.2, GONE = 0.06;  // cores that others take from the team: from and down to so much it is busy
constexpr double CLEARLY = 1.03;              // faster by so much

// What a team of `size` brings, relative to one thread, when none waits.
double gain(int size, bool is_memory_bound) { return is_memory_bound ? pow(size, 0.6) : size; }

}  // namespace

int TeamSize::next(int wanted) {
    if (wanted != wanted_) {
        *this = TeamSize();
        wanted_ = size_ = wanted;
    }
    return size_;
}

void TeamSize::note(const RegionTimes &region) {
    if (region.size != size_) return;  // planned before the last decision
    if (region.is_memory_bound != is_memory_bound_) {
        is_memory_bound_ = region.is_memory_bound;
        wall_ = useful_ = stolen_ = 0;
    }
    wall_ += region.wall;
    useful_ += region.useful;
    stolen_ += region.stolen;
    if (wall_ < WINDOW) return;
    held_ += wall_;
    const double time = (double)wall_ * size_;
    decide(gain(size_, is_memory_bound_) * (double)useful_ / time, (double)stolen_ / (double)wall_);
    wall_ = useful_ = stolen_ = 0;
}

void TeamSize::decide(double speed, double cores_taken) {
    if (trial_ != NONE) return end_trial(speed > before_ * CLEARLY, speed);
    is_contended_ = size_ < wanted_ || cores_taken > (is_contended_ ? GONE : NOTICED);
    if (!is_contended_) return hold(0);
    if (held_ < patience_) return;
    if (size_ == wanted_) next_ = SMALLER;
    if (size_ == 1) next_ = LARGER;
    if (next_ == LARGER || can_be_better(speed)) begin_trial(speed);
    else if (size_ < wanted_) next_ = LARGER;
}

// Whether the next smaller team could be faster, if none of its threads ever waited.
bool TeamSize::can_be_better(double speed) const { return gain(size_ - 1, is_memory_bound_) > speed * CLEARLY; }

// The other direction comes next, unless this one turns out to be right.
void TeamSize::begin_trial(double speed) {
    before_ = speed;
    trial_ = next_;
    size_ += trial_ == LARGER ? 1 : -1;
    next_ = trial_ == LARGER ? SMALLER : LARGER;
}

void TeamSize::end_trial(bool is_better, double speed) {
    const Trial ended = trial_;
    trial_ = NONE;
    if (!is_better) {
        size_ += ended == LARGER ? -1 : 1;
        const int64_t longer = 2 * patience_, cost = WORTH * wall_;
        return hold(longer > cost ? longer : cost);
    }
    hold(FIRST_HOLD);
    if (size_ == 1 || size_ == wanted_) return;
    next_ = ended;
    if (next_ == LARGER || can_be_better(speed)) begin_trial(speed);
}

void TeamSize::hold(int64_t ns) {
    held_ = 0;
    patience_ = ns > LONGEST_HOLD ? LONGEST_HOLD : ns > 0 && ns < FIRST_HOLD ? FIRST_HOLD : ns;
}

}  // namespace gemcutter
