// SPDX-License-Identifier: Apache-2.0
// The outlier columns of common/outliers.h on the CPU, in four steps. Every step but `collect` may
// be split over threads by half-open ranges; no call allocates.
#pragma once

#include "common/outliers.h"

namespace kvopt::cpu {

// Fills p.bitmap for 32 columns a word.
void outliers_mark(const OutlierParams& p, int64_t word_begin, int64_t word_end);

// Fills p.columns from the bitmap and returns how many there are.
int64_t outliers_collect(const OutlierParams& p);

// Fills p.inlier_scale from the bitmap.
void outliers_scale(const OutlierParams& p);

// gathered (M, count) = v[:, O].
void outliers_gather(const OutlierParams& p, int64_t count, float* gathered, int64_t row_begin,
                     int64_t row_end);

// The columns of p.part that belong to some tiles of tile32::kRows rows of w.
void outliers_multiply(const OutlierParams& p, int64_t count, const float* gathered,
                       int64_t tile_begin, int64_t tile_end);

}  // namespace kvopt::cpu
