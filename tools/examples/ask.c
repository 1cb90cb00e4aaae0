/* Asks a checkpoint one question. One source file beside this one is all it needs:
 *     cc -O2 -DMEDRUN_NO_MAIN -c medrun.c && cc -o ask ask.c medrun.o -lm -lpthread */
#define MEDRUN_API_ONLY
#include "medrun.c"
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv) {
    medrun_model *model;
    medrun_session *session;
    medrun_error error = {0};
    const char *question = argc > 2 ? argv[2] : "What are the symptoms of diabetes?", *text;
    size_t n_bytes;
    int32_t id;
    if (argc < 2 || medrun_open(&model, argv[1], NULL, &error) ||
        medrun_start(&session, model, NULL, NULL, 0, &error) ||
        medrun_say(session, "user", question, strlen(question), &error)) {
        fprintf(stderr, "%s\n", argc < 2 ? "usage: ask MODEL.mdr [QUESTION]" : error.text);
        return 1;
    }
    do {
        if (medrun_next(session, &id, &text, &n_bytes, &error)) break;
        fwrite(text, 1, n_bytes, stdout);
    } while (!medrun_is_stop(model, id));
    putchar('\n');
    medrun_stop(session);
    medrun_close(model);
    return error.code;
}
