// How attention is launched, for what runs it on a CPU and on a GPU; the program's own is src/model/gpu/attention.rs.
#pragma once

#include <cstddef>

/// The launch geometry, as attention.cu documents it.
struct Geometry {
    /// Rows that a block writes: of y, of dq, and of dk and dv.
    unsigned rows, q_rows, kv_rows, threads, q_threads, kv_threads, width;
    size_t forward, back_q, back_kv;

    Geometry(unsigned d, size_t size) {
        width = 256;
        for (const unsigned smaller : {128u, 96u, 64u, 32u}) width = d <= smaller ? smaller : width;
        if (size == 4) {
            rows = q_rows = kv_rows = 32;
            threads = q_threads = 64;
            kv_threads = width == 256 ? 128 : 64;
            forward = 384 * (width + 4) + 5120;
            back_q = 512 * (width + 4) + 5120;
            back_kv = 512 * (width + 4) + 80 * kv_threads + 512;
        } else if (BY_WARPGROUPS && width >= 64 && width <= 128) {
            rows = 128;
            q_rows = kv_rows = 64;
            threads = 256;
            q_threads = kv_threads = 128;
            forward = 2 * width * (128 + 4 * 64);
            back_q = 4 * width * (64 + 2 * 64) + 8 * 64 + 128;
            back_kv = 4 * width * (64 + 2 * 64) + 32 * 64 + 512;
        } else {
            rows = q_rows = 128;
            kv_rows = width == 256 ? 64 : 128;
            threads = q_threads = width == 256 ? 256 : 128;
            kv_threads = width <= 64 ? 128 : 256;
            const unsigned step = width <= 96 ? 64 : 32, q_step = width <= 64 ? 64 : width == 256 ? 16 : 32;
            forward = 2 * width * (rows + 4 * step);
            back_q = 4 * width * (rows + 2 * q_step) + 8 * rows + 128;
            back_kv = 4 * width * (kv_rows + 2 * step) + 32 * step + 512;
        }
    }
};
