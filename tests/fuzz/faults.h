// faults.h - lets one allocation of the library fail.
//
// SPDX-License-Identifier: MIT

#pragma once

enum fault_kind : int {
    FAULT_HOST,   // operator new below a function of kvarn, from 8 KiB on: rows and tiles in host memory
    FAULT_BUFFER, // posix_memalign, but for ggml_init(), which aborts by itself: tensors and compute buffers
};

// the n-th such allocation (0: the next one) of this thread fails
void arm_fault(fault_kind kind, int n);

// true: one has failed
bool disarm_fault();
