/* fuzz.c - what a stranger's file can do to medrun, for clang's libFuzzer: see `make fuzz`.
 *
 * MEDRUN_FUZZ names what is read: header (of the checkpoint MEDRUN_FUZZ_BASE; its length and hash
 * are made right, or nothing behind them would be reached), tokenizer, json, jinja, messages, state,
 * gguf; schema, gbnf, regex (what medrun-serve lets an answer be; fuzz_serve.c has its
 * requests); and of the Hugging Face folder MEDRUN_FUZZ_BASE one file: config.json,
 * tokenizer.json, tokenizer_config.json, generation_config.json, model.safetensors. Files are made
 * in the working folder, first what is valid, corpus/seed. An error is fine; the sanitizers and
 * libFuzzer's limits of time and memory say what is not. */
#define MEDRUN_NO_MAIN
#define MEDRUN_EXPORT_NO_MAIN
#include "../tools/export.c"
#define read_messages tools_read_messages       /* export.c has one, too                        */
#include "../tools/tool_calls.c"
#undef read_messages
#define span shape_span         /* export_jinja.c has a span, too                               */
#include "../tools/serve_grammar.c"
#include "../tools/serve_schema.c"
#undef span

static const char *target, *base;
static buffer original;                 /* the file of which the input replaces a part          */
static medrun_model *model;             /* MEDRUN_FUZZ_BASE, for messages and state             */

static void must(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "fuzz: %s\n", what);
    exit(1);
}

static void slurp(const char *path, buffer *b) {
    file_map map;
    medrun_error e = {0};
    must(!map_file(path, &map, &e), e.text);
    buffer_add(b, map.data, map.n);
    unmap_file(&map);
}

static void put_file(const char *path, const void *a, size_t n, const void *b, size_t m) {
    FILE *f = fopen(path, "wb");
    must(f && fwrite(a, 1, n, f) == n && fwrite(b, 1, m, f) == m && !fclose(f), path);
}

static void use_model(const char *path) {
    static const int32_t ids[] = {1, 2, 3, 4};
    medrun_model *m;
    medrun_session *s;
    if (medrun_open(&m, path, &(medrun_options){.threads = 1}, NULL)) return;
    medrun_session_options o = {.context = 32};
    size_t bytes = medrun_session_bytes(m, &o);
    if (bytes && bytes < 64 << 20 && !medrun_start(&s, m, &o, NULL, 0, NULL)) {
        if (!medrun_feed(s, ids, 4, NULL)) medrun_step(&s, 1, NULL);
        medrun_stop(s);
    }
    medrun_close(m);
}

/* The checkpoint with INPUT for its header. */
static void try_header(const uint8_t *input, size_t n) {
    reader r = {original.data, original.n, 8, false};
    size_t body = round_up(PREAMBLE + (size_t)read_u64(&r) + 32, FILE_ALIGN);
    size_t end = PREAMBLE + n + 32, gap = round_up(end, FILE_ALIGN) - end;
    static const uint8_t zeros[FILE_ALIGN];
    uint8_t digest[32];
    buffer b = {0};
    buffer_add(&b, "MEDRUN02", 8);
    write_le(&b, n, 8);
    buffer_add(&b, input, n);
    sha256_of(b.data, b.n, digest);
    buffer_add(&b, digest, 32);
    buffer_add(&b, zeros, gap);
    put_file("input", b.data, b.n, original.data + body, original.n - body);
    buffer_free(&b);
    use_model("input");
}

static void try_tokenizer(const uint8_t *input, size_t n) {
    static const char text[] = "Fever, 38.5 \xC2\xB0\x43 <|eot_id|>\n\n  na\xC3\xAFve\xFF";
    tokenizer t;
    buffer ids = {0};
    if (tokenizer_open(&t, input, n, "input", NULL)) return;
    tokenizer_encode(&t, text, sizeof text, MEDRUN_PARSE_SPECIAL, &ids, NULL);
    buffer_free(&ids);
    tokenizer_close(&t);
}

static void try_json(const uint8_t *input, size_t n) {
    json j, again;
    buffer text = {0}, quoted = {0};
    bool good = !json_parse(&j, (const char *)input, n, NULL);
    for (uint32_t v = 0; good && v < j.n; v++) {        /* what is read is what is written      */
        if (json_typeof(&j, v) != JSON_STRING) continue;
        text.n = quoted.n = 0;
        json_unescape(&j, v, &text);
        json_quote(&quoted, (const char *)text.data, text.n);
        must(!json_parse(&again, (const char *)quoted.data, quoted.n, NULL), "refused as quoted");
        size_t before = text.n;
        json_unescape(&again, 0, &text);
        must(text.n == 2 * before, "another length as quoted");
        must(!before || !memcmp(text.data, text.data + before, before), "another text as quoted");
        json_free(&again);
    }
    buffer_free(&text), buffer_free(&quoted);
    json_free(&j);
}

static void try_messages(const uint8_t *input, size_t n) {
    static const char *const names[] = {"llama3", "llama3.1", "alpaca", "afm", "apertus", "none"};
    medrun_message m[2] = {{"user", "hello", 5}, {"tool", (const char *)input, n}};
    int32_t ids[64];
    size_t count;
    json j = {0};
    bool good = !json_parse(&j, (const char *)input, n, NULL);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const chat_template *c = chat_find(names[i]);
        medrun_error e = {0}, f = {0}, g = {0};
        buffer tools = {0};
        tool_list list = {0};
        medrun_render(model, names[i], NULL, m, 2, true, ids, 64, &count, NULL);
        medrun_message *plain = NULL;
        size_t n_plain;
        buffer text = {0};
        if (good && !chat_messages(c, &j, 0, "input", &plain, &n_plain, &text, &e))
            medrun_render(model, names[i], NULL, plain, n_plain, true, ids, 64, &count, NULL);
        free(plain);
        buffer_free(&text);
        if (good && !tools_messages(c, &j, 0, "input", i & 1, &list, &f))
            medrun_render(model, names[i], NULL, list.m, list.n, true, ids, 64, &count, NULL);
        tool_list_free(&list);
        if (!tools_text(c, (const char *)input, n, &tools, &g)) {
            medrun_chat_options o = {.tools = (const char *)tools.data, .n_tools = tools.n};
            medrun_render(model, names[i], &o, m, 1, true, ids, 64, &count, NULL);
        }
        buffer_free(&tools);
    }
    json_free(&j);
}

/* A chat template: what it makes of every conversation, and which row of the table it is. */
static void try_jinja(const uint8_t *input, size_t n) {
    jinja_reader r = {0};
    buffer lines = {0}, out = {0}, system = {0};
    size_t n_tokens = 0;
    bool good = jinja_tokens(&r, &lines, (const char *)input, n);
    jinja_token *tokens = good ? jinja_list_tokens(&r, &n_tokens) : NULL;
    for (size_t i = 0; tokens && i < N_PROBES; i++) {
        medrun_message m[MOST_TURNS];
        size_t count = probe_messages(i, (int)(i % N_VARIANTS), m);
        out.n = 0;
        jinja_render(tokens, n_tokens, m, count, i & 1, "<s>", i & 2 ? "</s>" : NULL, &out);
    }
    free(tokens), buffer_free(&lines), buffer_free(&out), buffer_free(&r.out), buffer_free(&r.text);
    fit_template((const char *)input, n, "<s>", "</s>", &system);
    buffer_free(&system);
}

/* The templates of tests/fixtures/jinja.json. */
static void make_templates(void) {
    json j;
    must(!json_parse(&j, (const char *)original.data, original.n, NULL), "not JSON");
    for (int lost = 0; lost < 2; lost++) {
        uint32_t all = json_get(&j, 0, lost ? "lost" : "known"), c = all + 1;
        for (uint32_t i = 0; i < j.nodes[all].count; i++, c = j.nodes[c].next) {
            char path[64];
            buffer text = {0};
            json_unescape(&j, c + 1, &text);
            snprintf(path, sizeof path, "corpus/seed-%s-%u", lost ? "lost" : "known", i);
            put_file(path, text.data, text.n, NULL, 0);
            buffer_free(&text);
        }
    }
    json_free(&j);
}

/* The sums of the head and of the ids in a file without panels are made right. */
static void try_state(const uint8_t *input, size_t n) {
    buffer b = {0};
    buffer_add(&b, input, n);
    uint64_t sum = 0;
    for (size_t at = 0, part = sizeof(state_head); at + part + 8 <= n; at += part + 8, part = 64) {
        sum = add_to_sum(sum, b.data + at, part);
        memcpy(b.data + at + part, &sum, 8);
    }
    put_file("input", b.data, b.n, NULL, 0);
    buffer_free(&b);
    medrun_session *s;
    must(!medrun_start(&s, model, &(medrun_session_options){.context = 64}, NULL, 0, NULL), "start");
    if (!medrun_restore(s, "input", NULL)) medrun_step(&s, 1, NULL);
    size_t taken;
    medrun_feed_saved(s, (const int32_t[24]){1, 2, 3, 4}, 24, "input", &taken, NULL);
    medrun_stop(s);
}

/* What is allowed anywhere leads on, and a text that fits is JSON where a schema asked for it. */
static void walk_grammar(grammar *g, bool is_json) {
    uint32_t at = grammar_start(g), next = DEAD;
    buffer text = {0};
    for (uint32_t i = 0; i < 400 && at != DEAD && !grammar_ends(g, at); i++) {
        uint32_t from = i * 2654435761u >> 24, k = 0;
        while (k < 256 && (next = grammar_step(g, at, (uint8_t)(from + k))) == DEAD) k++;
        must(k < 256 || g->failed, "a state without a way on");
        if (k == 256) break;
        uint8_t byte = (uint8_t)(from + k);
        buffer_add(&text, &byte, 1);
        at = next;
    }
    json j = {0};
    if (is_json && !g->failed && grammar_ends(g, at))
        must(!json_parse(&j, (const char *)text.data, text.n, NULL), "a text that is no JSON");
    json_free(&j);
    buffer_free(&text);
    grammar_free(g);
}

static void try_schema(const uint8_t *input, size_t n) {
    json j = {0};
    medrun_error e = {0};
    if (n && !json_parse(&j, (const char *)input, n, &e)) {
        grammar *g = grammar_of_schema(&j, 0, j.n & 1, &e);
        must((g != NULL) == !e.code, "neither a grammar nor an error");
        if (g) walk_grammar(g, true);
    }
    json_free(&j);
}

static void try_shape(const uint8_t *input, size_t n) {
    json j = {0};
    buffer quoted = {0};
    medrun_error e = {0};
    python_quote(&quoted, (const char *)input, n);
    if (!json_parse(&j, (const char *)quoted.data, quoted.n, &e)) {
        grammar *g = grammar_of_text(&j, 0, *target == 'g' ? IS_GBNF : IS_REGEX, &e);
        must((g != NULL) == !e.code, "neither a grammar nor an error");
        if (g) walk_grammar(g, false);
    }
    json_free(&j);
    buffer_free(&quoted);
}

static void run_export(const char *source) {
    char *line[] = {"medrun-export", (char *)(uintptr_t)source, "out.mdr", "--dry-run", NULL};
    export_main(4, line);
}

static void try_gguf(const uint8_t *input, size_t n) {
    put_file("input.gguf", input, n, NULL, 0);
    run_export("input.gguf");
}

/* One file of a folder; of safetensors the header, whose length is made right. */
static void try_folder(const uint8_t *input, size_t n) {
    char path[256];
    snprintf(path, sizeof path, "folder/%s", target);
    buffer b = {0};
    if (strcmp(target, "model.safetensors")) {
        put_file(path, input, n, NULL, 0);
    } else {
        reader r = {original.data, original.n, 0, false};
        size_t body = 8 + (size_t)read_u64(&r);
        write_le(&b, n, 8);
        buffer_add(&b, input, n);
        put_file(path, b.data, b.n, original.data + body, original.n - body);
        buffer_free(&b);
    }
    run_export("folder");
}

/* What is valid, for the first of the corpus. */
static void make_seed(void) {
    if (!strcmp(target, "header") || !strcmp(target, "model.safetensors")) {
        size_t at = *target == 'h' ? 8 : 0;
        reader r = {original.data, original.n, at, false};
        put_file("corpus/seed", original.data + at + 8, (size_t)read_u64(&r), NULL, 0);
    } else if (!strcmp(target, "state")) {
        medrun_session *s;
        must(!medrun_start(&s, model, &(medrun_session_options){.context = 64}, NULL, 0, NULL) &&
             !medrun_feed(s, (const int32_t[20]){1, 2, 3, 4}, 20, NULL) &&
             !medrun_step(&s, 1, NULL) && !medrun_save(s, "corpus/seed", NULL), "seed");
        medrun_stop(s);
    } else if (!strcmp(target, "jinja")) {
        make_templates();
    } else if (!strcmp(target, "json") || !strcmp(target, "messages")) {
        static const char text[] = "{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": "
                                   "\"\\u00b5\\ud83d\\ude00\"}, 1e-3, null, true, [-0.5]]}";
        put_file("corpus/seed", text, sizeof text - 1, NULL, 0);
    } else if (!strcmp(target, "schema")) {
        static const char text[] =
            "{\"properties\":{\"a\":{\"$ref\":\"#/$defs/x\"},\"b\":{\"oneOf\":[{\"minimum\":"
            "1.5},{\"type\":\"null\"}]}},\"required\":[\"a\"],\"minProperties\":1,"
            "\"patternProperties\":{\"^x\":{\"items\":{\"multipleOf\":3,\"maximum\":9}}},"
            "\"$defs\":{\"x\":{\"allOf\":[{\"pattern\":\"^a+$\"},{\"maxLength\":3},"
            "{\"enum\":[\"a\",1,{\"b\":[]}]}]}}}";
        put_file("corpus/seed", text, sizeof text - 1, NULL, 0);
    } else if (!strcmp(target, "gbnf")) {
        static const char text[] = "root ::= (a | \"x\"{1,3} [^a-z\\n]+)* # all\n"
                                   "a ::= \"\\x41\" root?\n";
        put_file("corpus/seed", text, sizeof text - 1, NULL, 0);
    } else if (!strcmp(target, "regex")) {
        static const char text[] = "^(a|[^b-d\\]]{2,4}?)+\\d*\\u00e4.$|(?:x)";
        put_file("corpus/seed", text, sizeof text - 1, NULL, 0);
    } else {
        put_file("corpus/seed", original.data, original.n, NULL, 0);
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n);

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    target = getenv("MEDRUN_FUZZ"), base = getenv("MEDRUN_FUZZ_BASE");
    must(target && base, "MEDRUN_FUZZ and MEDRUN_FUZZ_BASE say what to read");
    medrun_error e = {0};
    if (!strcmp(target, "messages") || !strcmp(target, "state"))
        must(!medrun_open(&model, base, &(medrun_options){.threads = 1}, &e), e.text);
    slurp(base, &original);
    make_seed();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n) {
    static const struct {
        const char *name;
        void (*run)(const uint8_t *input, size_t n);
    } all[] = {{"header", try_header}, {"tokenizer", try_tokenizer}, {"json", try_json},
               {"jinja", try_jinja}, {"messages", try_messages}, {"state", try_state},
               {"gguf", try_gguf}, {"schema", try_schema}, {"gbnf", try_shape},
               {"regex", try_shape}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(target, all[i].name)) return all[i].run(input, n), 0;
    try_folder(input, n);
    return 0;
}
