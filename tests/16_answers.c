/* Tests of how medrun-lab call prints an answer: tool calls as JSON. The model is made to say what
 * the test wants by writing its logits. */
#define main lab_main
#define report medrun_report
#include "../tools/lab.c"
#undef main
#undef report
#include "test.h"

typedef struct {
    medrun_session *s;
    const int32_t *ids;
    size_t n, at;
} script;

/* Called after the logits of a pass are in their place: makes the next id of the script win. */
static void dictate(void *user, const char *stage, int layer, size_t rows, size_t cols,
                    size_t stride, const float *data) {
    script *p = user;
    (void)layer, (void)rows, (void)stride, (void)data;
    if (strcmp(stage, "logits")) return;
    for (size_t i = 0; i < cols; i++) p->s->logits[i] = 0;
    p->s->logits[p->ids[p->at < p->n ? p->at++ : p->n - 1]] = 100;
}

/* What medrun prints when the model says SAID, control tokens spelled out, in at most MOST tokens;
 * *CODE is the exit code. */
static const char *answer_of(command *c, const char *said, int most, int *code) {
    static char text[4096];
    buffer ids = {0};
    int32_t bos = c->t->bos;
    size_t n;
    tokenizer_encode(c->t, said, strlen(said), MEDRUN_PARSE_SPECIAL, &ids, NULL);
    script p = {c->s, ids_of(&ids), ids.n / 4, 0};
    c->e = (medrun_error){0}, c->number[O_PREDICT] = most;
    medrun_rewind(c->s, 0, NULL);
    medrun_observe(c->s, dictate, &p);
    medrun_feed(c->s, &bos, 1, NULL);
    fflush(stdout);
    int saved = dup(1);
    FILE *f = tmpfile();
    if (!f || dup2(fileno(f), 1) < 0) return "no temporary file";
    print_reply(c);
    *code = end_call(c);
    fflush(stdout);
    dup2(saved, 1), close(saved);
    rewind(f);
    n = fread(text, 1, sizeof text - 1, f);
    text[n] = 0;
    fclose(f);
    buffer_free(&ids);
    return text;
}

static void test_calls(command *c) {
    static const struct { const char *said; int most, code; const char *printed; } cases[] = {
        {"Hello.<|assistant_end|>", -1, 0, "Hello.\n"},
        {"<|tools_prefix|>[{\"f\": {\"x\": 1}}]<|tools_suffix|>", -1, 0,
         "[{\"name\": \"f\", \"arguments\": {\"x\": 1}}]\n"},
        {"Let me see.<|tools_prefix|>[{\"f\":{}},{\"g\\u00e9\":[1.0]}]<|tools_suffix|>", -1, 0,
         "Let me see.\n[{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"g\xC3\xA9\", "
         "\"arguments\": [1.0]}]\n"},
        {"Now:\n<|tools_prefix|>[]<|tools_suffix|>", -1, 0, "Now:\n[]\n"},
        {"<|inner_prefix|>hm<|inner_suffix|>x<|tools_prefix|>[]<|tools_suffix|>", -1, 0, "hmx\n[]\n"},
        {"A<|tools_prefix|>[{\"f\": }]<|tools_suffix|>", -1, 1, "A\n[{\"f\": }]\n"},
        {"A<|tools_prefix|>f(1)<|assistant_end|>", -1, 1, "A\nf(1)\n"},
        {"A<|tools_prefix|>[\xE2\x82\xAC", 5, 1, NULL},
        {"[{\"f\": {}}]<|tools_suffix|>", -1, 0, "[{\"f\": {}}]\n"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int code;
        const char *printed = answer_of(c, cases[i].said, cases[i].most, &code);
        bool good = code == cases[i].code && (code ? strstr(c->e.text, "tool call") != NULL
                                                   : !c->e.text[0]);
        if (cases[i].printed) good = good && !strcmp(printed, cases[i].printed);
        else good = good && !strncmp(printed, "A\n[", 3);
        if (!CHECK(good))
            printf("    %s: code %d %s, printed \"%s\"\n", cases[i].said, code, c->e.text, printed);
    }
    c->piece = NULL;                            /* medrun run: text like any other               */
    int code;
    CHECK(!strcmp(answer_of(c, "A<|tools_prefix|>[{\"f\": {}}]<|tools_suffix|>", -1, &code),
                  "A[{\"f\": {}}]\n") && !code);
}

int main(void) {
    const char *build = getenv("MEDRUN_TEST_BUILD");
    char path[2048];
    static const program lab = {.name = "medrun-lab", .commands = lab_commands,
                                .options = lab_options, .n_options = N_LAB_OPTIONS, .unnamed = -1};
    static command c = {.p = &lab, .row = &lab_commands[CALL]};
    snprintf(path, sizeof path, "%s/apertus-plain-bf16.mdr", build ? build : "build");
    if (CHECK(!medrun_open(&c.m, path, &(medrun_options){.threads = 1}, &c.e))) {
        c.t = &c.m->tokenizer, c.chat = chat_find("apertus");
        c.piece = print_piece_or_call;
        for (size_t i = 0; i < 3; i++)          /* the fixture may stop at fewer tokens          */
            if (!medrun_is_stop(c.m, chat_token(c.t, c.chat->stops[i])))
                c.m->stops[c.m->n_stops++] = chat_token(c.t, c.chat->stops[i]);
        medrun_session_options o = {.context = 200, .custom_sampling = true,
                                    .sampling = {.top_p = 1, .repeat_penalty = 1}};
        if (CHECK(!medrun_start(&c.s, c.m, &o, NULL, 0, NULL))) test_calls(&c);
    } else printf("    %s; `make test` makes it\n", c.e.text);
    close_command(&c);
    return report();
}
