/* A session in memory that the program has had from its start, for a machine whose memory is
 * planned: after medrun_say nothing more is asked for, however long the answer gets.
 *     cc -O2 -DMEDRUN_NO_MAIN -c medrun.c && cc -o buffer buffer.c medrun.o -lm -lpthread */
#define MEDRUN_API_ONLY
#include "medrun.c"
#include <stdio.h>
#include <string.h>

static _Alignas(64) unsigned char memory[2 << 20];      /* zero, as medrun_start wants it */

int main(int argc, char **argv) {
    const char *question = argc > 2 ? argv[2] : "What are the symptoms of diabetes?", *text;
    medrun_session_options options = {.context = 256, .batch = 32};
    medrun_model *model = NULL;
    medrun_session *session = NULL;
    medrun_error error = {0};
    size_t n_bytes;
    int32_t id;
    int code = argc < 2 || medrun_open(&model, argv[1], &(medrun_options){.threads = 1}, &error);
    if (!code) {
        fprintf(stderr, "%zu of %zu bytes\n", medrun_session_bytes(model, &options), sizeof memory);
        code = medrun_start(&session, model, &options, memory, sizeof memory, &error);
    }
    if (!code) code = medrun_say(session, "user", question, strlen(question), &error);
    while (!code && !(code = medrun_next(session, &id, &text, &n_bytes, &error))) {
        fwrite(text, 1, n_bytes, stdout);
        if (medrun_is_stop(model, id)) break;
    }
    puts("");
    if (code) fprintf(stderr, "%s\n", argc < 2 ? "usage: buffer MODEL.mdr [QUESTION]" : error.text);
    medrun_stop(session);
    medrun_close(model);
    return code;
}
