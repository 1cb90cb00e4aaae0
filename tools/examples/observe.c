/* Prints how long the residual stream is (its L2 norm) after each layer, at a text's last token.
 *     cc -O2 -DMEDRUN_NO_MAIN -c medrun.c && cc -o observe observe.c medrun.o -lm -lpthread */
#define MEDRUN_API_ONLY
#include "medrun.c"
#include <math.h>
#include <stdio.h>
#include <string.h>

static void see(void *user, const char *stage, int layer, size_t rows, size_t cols, size_t stride,
                const float *data) {
    double sum = 0;
    (void)user;
    for (const float *x = data + (rows - 1) * stride; cols--; x++) sum += (double)*x * *x;
    if (strcmp(stage, "embed") && strcmp(stage, "layer_out")) return;
    printf("%-9s %3d %10.3f\n", stage, layer, sqrt(sum));
}

int main(int argc, char **argv) {
    medrun_model *model = NULL;
    medrun_session *session = NULL;
    medrun_error error = {2, "usage: observe MODEL.mdr TEXT"};
    int code = argc != 3 || medrun_open(&model, argv[1], NULL, &error) ||
               medrun_start(&session, model, NULL, NULL, 0, &error) ||
               medrun_say(session, "user", argv[2], strlen(argv[2]), &error);
    if (!code) medrun_observe(session, see, NULL);
    if (code || medrun_step(&session, 1, &error)) fprintf(stderr, "%s\n", error.text);
    medrun_stop(session);
    medrun_close(model);
    return error.code;
}
