// Repacking of single rows, for tables that stay as a file packs them and are only gathered from.
#pragma once
#include "layout.h"

namespace gemcutter {

// Write one row of a source as the only row of the panel at target.data, which is written to.
void repack_row(const gc_source &source, int64_t row, const gc_matrix &target);

}  // namespace gemcutter
