// SPDX-License-Identifier: Apache-2.0
// The outlier columns of common/outliers.h on a GPU. Same conventions as qlinear.h.
#pragma once

#include "common/outliers.h"

namespace kvopt::cuda {

// How many columns there are stays on the device: launches and their sizes depend on the parameters
// alone. M >= 1.

// Fills bitmap, columns, count and inlier_scale.
int outliers_find(const OutlierParams& p, void* stream);

constexpr int kCompactColumns = 512;  // of O that the workspace holds; more are exact as well

// Of p.workspace for outliers_multiply, 256-byte aligned; depends on the parameters but the
// pointers and on the device.
int64_t outliers_workspace_bytes(const OutlierParams& p);

// Fills part, or adds to it.
int outliers_multiply(const OutlierParams& p, void* stream);

}  // namespace kvopt::cuda
