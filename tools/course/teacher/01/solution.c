/* Lesson 1, solved. */
#include "course.h"

size_t merge_pieces(int32_t *ids, size_t n) {
    while (n > 1) {
        size_t best = n;                        /* n: none yet                                  */
        int32_t best_rank = 0, best_result = 0, rank, result;
        for (size_t i = 0; i + 1 < n; i++) {
            if (!demo_merge(ids[i], ids[i + 1], &rank, &result)) continue;
            if (best < n && rank >= best_rank) continue;
            best = i, best_rank = rank, best_result = result;
        }
        if (best == n) break;
        ids[best] = best_result;
        n--;
        for (size_t i = best + 1; i < n; i++) ids[i] = ids[i + 1];
    }
    return n;
}
