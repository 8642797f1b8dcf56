// Which kernels a program runs on a GPU, and when, by CUPTI: lines of start, end (ns) and name.
//
//     cc -O2 -shared -fPIC -o trace.so tests/bench/trace.c -I CUPTI/include -I $CUDA_HOME/include -L CUPTI/lib -l:libcupti.so.13
//     CUDA_INJECTION64_PATH=$PWD/trace.so TRACE_OUT=trace.tsv PROGRAM …
//     sort -n trace.tsv | awk -F'\t' '{ sum[$3] += $2 - $1 }
//       $3 == "adamw" { delete line; for (name in sum) line[name] = sum[name]; delete sum; all = $2 - before; before = $2 }
//       END { for (name in line) { print line[name] / 1e6, name; all -= line[name] } print all / 1e6, "nothing" }' | sort -rn
//
// The last command sums up the last step of training, in milliseconds. CUPTI is the nvidia/cu13 folder of the wheel
// nvidia-cuda-cupti 13.0; its library must be found where the program runs.
#include <cupti.h>
#include <stdio.h>
#include <stdlib.h>

static FILE *out;

static void give_room(uint8_t **room, size_t *bytes, size_t *records) {
    *bytes = 8 << 20;
    *records = 0;
    *room = aligned_alloc(8, *bytes);
}

static void line(uint64_t start, uint64_t end, const char *name) {
    fprintf(out, "%llu\t%llu\t%s\n", (unsigned long long)start, (unsigned long long)end, name);
}

static void take(CUcontext context, uint32_t stream, uint8_t *room, size_t bytes, size_t used) {
    (void)context, (void)stream, (void)bytes;
    for (CUpti_Activity *at = NULL; cuptiActivityGetNextRecord(room, used, &at) == CUPTI_SUCCESS;) {
        if (at->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const CUpti_ActivityKernel10 *kernel = (const void *)at;
            line(kernel->start, kernel->end, kernel->name);
        } else if (at->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const CUpti_ActivityMemcpy6 *copy = (const void *)at;
            line(copy->start, copy->end, "memcpy");
        } else if (at->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
            const CUpti_ActivityMemset4 *set = (const void *)at;
            line(set->start, set->end, "memset");
        }
    }
    free(room);
}

static void finish(void) {
    cuptiActivityFlushAll(1);
    fclose(out);
}

int InitializeInjection(void) {
    const char *path = getenv("TRACE_OUT");
    out = fopen(path ? path : "trace.tsv", "w");
    if (!out) return 0;
    cuptiActivityRegisterCallbacks(give_room, take);
    const CUpti_ActivityKind kinds[] = {
        CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET};
    for (int i = 0; i < 3; ++i) {
        if (cuptiActivityEnable(kinds[i]) != CUPTI_SUCCESS) fprintf(stderr, "trace: kind %d is not there\n", kinds[i]);
    }
    atexit(finish);
    return 1;
}
