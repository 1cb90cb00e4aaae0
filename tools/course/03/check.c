/* Checks lesson 3: random groups of 64 are rounded as medrun rounds them. */
#include "course.h"

static void check_group(const float *x, bool negative) {
    int8_t yours[GROUP_SIZE] = {0}, engine[GROUP_SIZE];
    float scale = to_int8(x, yours), wanted = engine_int8(x, engine), back[GROUP_SIZE];
    int shorter = 0, other = 0;
    if (fabsf(scale - wanted) > 1e-6f * wanted) {
        if (negative)
            hint("the scale is %g, wanted %g. The number of largest magnitude is negative here: "
                 "look for the largest without its sign.", (double)scale, (double)wanted);
        hint("the scale is %g, wanted %g. An int8 has 127 steps on each side of zero: the largest "
             "magnitude must become 127.", (double)scale, (double)wanted);
    }
    from_int8(yours, scale, back);
    for (int i = 0; i < GROUP_SIZE; i++) {
        shorter += abs(yours[i]) < abs(engine[i]);
        /* Where two whole numbers are equally near, either will do. */
        other += yours[i] != engine[i] && !(fabsf(back[i] - x[i]) <= scale * 0.50001f);
    }
    if (shorter > 8 && shorter == other)
        hint("%d of 64 numbers are one too near to zero: they were cut off, not rounded to the "
             "nearest.", shorter);
    if (other)
        for (int i = 0; i < GROUP_SIZE; i++)
            if (!(fabsf(back[i] - x[i]) <= scale * 0.50001f))
                hint("%g became %d times %g, which is %g: more than half a scale away.",
                     (double)x[i], yours[i], (double)scale, (double)back[i]);
}

void lesson(void) {
    float x[GROUP_SIZE], zero[GROUP_SIZE] = {0};
    int8_t q[GROUP_SIZE];
    double worst = 0;
    for (int negative = 0; negative < 2; negative++)
        for (int round = 0; round < 500; round++) {
            float size = (float)exp(4 * draw_normal());
            for (int i = 0; i < GROUP_SIZE; i++) x[i] = size * (float)draw_normal();
            x[draw_below(GROUP_SIZE)] = (negative ? -8 : 8) * size;
            check_group(x, negative);
            float scale = to_int8(x, q), back[GROUP_SIZE];
            from_int8(q, scale, back);
            for (int i = 0; i < GROUP_SIZE; i++)
                worst = fmax(worst, (double)(fabsf(back[i] - x[i]) / scale));
        }
    if (!(to_int8(zero, q) == 0) || q[0]) hint("64 zeros must stay zeros: do not divide by 0.");
    right("1000 groups are rounded as medrun rounds them; the worst number moved by %.2f of a "
          "scale.",
          worst);
}
