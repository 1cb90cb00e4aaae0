/* Lesson 9, solved. */
#include "course.h"

void split_difference(const float *stream, size_t rows, size_t dim, const float *weight, float eps,
                      const float *row_a, const float *row_b, double *parts) {
    const float *last = stream + (rows - 1) * dim;
    double squares = 0;
    for (size_t i = 0; i < dim; i++) squares += (double)last[i] * last[i];
    double size = sqrt(squares / (double)dim + eps);
    for (size_t r = 0; r < rows; r++) {
        const float *row = stream + r * dim;
        parts[r] = 0;
        for (size_t i = 0; i < dim; i++) {
            double added = (double)row[i] - (r ? (double)stream[(r - 1) * dim + i] : 0);
            parts[r] += added * weight[i] * ((double)row_a[i] - row_b[i]) / size;
        }
    }
}
