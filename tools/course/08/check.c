/* Checks lesson 8: 1000 seeds draw what medrun_sample draws. */
#include "course.h"

/* How many of some draws differ from the engine's; *EARLIER: how many of those came too soon. */
static int differences(const float *logits, double temperature, double top_p, int draws) {
    int wrong = 0;
    for (int i = 0; i < draws; i++) {
        double ticket;
        uint64_t seed = (uint64_t)draw_below(1u << 30);
        int32_t wanted = engine_draw(logits, temperature, top_p, seed, &ticket);
        wrong += draw_token(logits, (size_t)facts.vocab_size, temperature, top_p, ticket) != wanted;
    }
    return wrong;
}

/* Two pieces of weight 1 and 1/2, the rest nothing: top_p 0.8 keeps both, 0.5 the first alone. */
static void check_edges(void) {
    static float z[1 << 16];
    size_t n = (size_t)facts.vocab_size;
    for (size_t i = 0; i < n; i++) z[i] = -200;
    z[7] = 0, z[3] = -0.693147f;
    if (draw_token(z, n, 1, 1, 0) != 7 || draw_token(z, n, 1, 1, 0.5) != 7)
        hint("two pieces hold 2/3 and 1/3: a ticket of 0 or 0.5 falls on the first.");
    if (draw_token(z, n, 1, 1, 0.9) != 3)
        hint("two pieces hold 2/3 and 1/3: a ticket of 0.9 falls on the second.");
    if (draw_token(z, n, 1, 0.8, 0.9) != 3)
        hint("the first piece holds 2/3, and top_p is 0.8: the piece that crosses the line is "
             "kept, too.");
    z[5] = -0.693148f;                          /* 1/2, 1/4, 1/4                                */
    if (draw_token(z, n, 1, 0.7, 0.6) != 7 || draw_token(z, n, 1, 0.4, 0.9) != 7)
        hint("what is cut away cannot be drawn, and the ticket falls on the sum of the kept "
             "weights, not of all.");
}

void lesson(void) {
    static const double temperatures[] = {1, 0.5, 2, 1.3}, tops[] = {1, 0.9, 0.6, 0.95};
    int32_t ids[MOST_IDS];
    size_t n, rows, cols;
    check_edges();
    for (int round = 0; round < 4; round++) {
        n = demo_ask(draw_question(), ids);
        recording *r = demo_run(ids, n, MEDRUN_KV_F16);
        const float *z = demo_stage(r, "logits", -1, &rows, &cols);
        for (int k = 0; k < 4; k++) {
            /* Behind each token but the last the model is less sure, so there is more to draw. */
            const float *row = z + draw_below(rows) * cols;
            int wrong = differences(row, 1, 1, 20);
            if (wrong) hint("temperature 1, top_p 1: %d of 20 draws are not medrun's.", wrong);
            if (differences(row, temperatures[k], 1, 20))
                hint("right at temperature 1, not at %g: divide by the temperature. A high one "
                     "makes the weights more alike.", temperatures[k]);
            wrong = differences(row, temperatures[k], tops[k], 23);
            if (wrong) hint("top_p %g: %d of 23 draws are not medrun's.", tops[k], wrong);
        }
        demo_forget(r);
    }
    right("1008 seeds drew the ids that medrun draws.");
}
