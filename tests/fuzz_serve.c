/* fuzz_serve.c - what strangers' requests can do to medrun-serve, for clang's libFuzzer: see `make
 * fuzz`.
 *
 * MEDRUN_FUZZ names what the input is: http (all bytes of a connection), or api (a byte that chooses
 * the path, and a body). It goes through the server's own reader, and what it starts is computed for
 * some passes of the checkpoint MEDRUN_FUZZ_BASE, all in one thread and without a network. An answer
 * must be one that HTTP and JSON allow, and never a 500. */
#define main serve_main                 /* libFuzzer has one */
#include "../tools/serve.c"
#undef main

static const char *target;
static server *const sv = &the_server;

static void must(bool ok, const char *what) {
    if (ok) return;
    fprintf(stderr, "fuzz: %s\n", what);
    abort();
}

static const char *const paths[] = {
    "/v1/chat/completions", "/v1/completions", "/completion", "/tokenize", "/detokenize",
    "/apply-template", "/v1/chat/completions/input_tokens", "/v1/embeddings",
};
enum { N_PATHS = sizeof paths / sizeof *paths };

/* First of the corpus: a body that is good, and every field once. */
static const struct { int path; const char *body; } seeds[] = {
    {0, "{\"messages\":[{\"role\":\"system\",\"content\":\"x\"},{\"role\":\"user\",\"content\":["
        "{\"type\":\"text\",\"text\":\"gout?\"}]},{\"role\":\"assistant\",\"content\":\"It\"}],"
        "\"stream\":true,\"stream_options\":{\"include_usage\":true},\"return_progress\":true,"
        "\"timings_per_token\":true,\"logprobs\":true,\"top_logprobs\":3,\"n\":2,\"seed\":1}"},
    {0, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":"
        "null,\"tool_calls\":[{\"id\":\"c\",\"type\":\"function\",\"function\":{\"name\":\"f\","
        "\"arguments\":\"{\\\"a\\\":1}\"}}]},{\"role\":\"tool\",\"tool_call_id\":\"c\","
        "\"content\":\"5\"}],\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\","
        "\"description\":null,\"parameters\":{\"type\":\"object\",\"properties\":{\"a\":{\"type\":"
        "\"integer\",\"minimum\":1,\"maximum\":9}},\"required\":[\"a\"]}}}],\"tool_choice\":{"
        "\"type\":\"function\",\"function\":{\"name\":\"f\"}},\"parallel_tool_calls\":false}"},
    {0, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"response_format\":{\"type\":"
        "\"json_schema\",\"json_schema\":{\"name\":\"x\",\"schema\":{\"enum\":[\"y\",5]}}},"
        "\"reasoning_effort\":\"low\",\"chat_template_kwargs\":{\"enable_thinking\":true},"
        "\"max_completion_tokens\":9,\"add_generation_prompt\":true,\"user\":\"u\"}"},
    {1, "{\"prompt\":[\"gout\",[1,2,3]],\"logprobs\":3,\"echo\":true,\"cache_salt\":\"x\",\"o\":1,"
        "\"stop\":[\"a\",\"bc\"],\"stop_token_ids\":[7],\"logit_bias\":{\"5\":1,\"a\":-100},"
        "\"presence_penalty\":1,\"frequency_penalty\":-1,\"repeat_penalty\":1.1,\"max_tokens\":5}"},
    {1, "{\"prompt\":\"x\",\"guided_regex\":\"[ab]{2}\",\"temperature\":2,\"top_p\":0.9,\"top_k\":5,"
        "\"min_p\":0.1,\"ignore_eos\":true,\"stream\":true,\"parse_special\":true,\"best_of\":1}"},
    {1, "{\"prompt\":\"x\",\"guided_choice\":[\"a\"],\"logit_bias\":{\"a\":-100},\"n\":2}"},
    {1, "{\"prompt\":\"x\",\"max_tokens\":0,\"stream\":true}"},
    {2, "{\"prompt\":[1,2],\"n_predict\":4,\"n_probs\":3,\"grammar\":\"root ::= \\\"a\\\"+\","
        "\"cache_prompt\":true,\"id_slot\":0,\"logit_bias\":[[5,false],[\"a\",2.5]]}"},
    {3, "{\"content\":\"a<|eot_id|>\",\"with_pieces\":true,\"add_special\":true}"},
    {3, "{\"prompt\":\"a\",\"add_special_tokens\":false}"}, {4, "{\"tokens\":[1,2,300]}"},
    {5, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}"}, {7, "{\"input\":\"a\"}"},
};

static buffer request_of(int path, const char *body, size_t n) {
    buffer b = {0};
    buffer_printf(&b, "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %zu\r\n\r\n",
                  paths[path], n);
    buffer_add(&b, body, n);
    return b;
}

static void make_seeds(void) {
    for (size_t i = 0; i < sizeof seeds / sizeof *seeds; i++) {
        char name[40], path = (char)seeds[i].path;
        snprintf(name, sizeof name, "corpus/seed-%zu", i);
        FILE *f = fopen(name, "wb");
        must(f != NULL, "no corpus");
        size_t n = strlen(seeds[i].body);
        buffer b = request_of(path, seeds[i].body, n);
        if (*target == 'a') fwrite(&path, 1, 1, f);
        if (*target == 'a') fwrite(seeds[i].body, 1, n, f);
        else fwrite(b.data, 1, b.n, f);
        must(!fclose(f), "seed");
        buffer_free(&b);
    }
}

/* What the engine's thread does, a few times. */
static void engine_turns(int turns) {
    for (int i = 0; i < turns && take_jobs(sv, false); i++) {
        end_jobs(sv);
        admit(sv);
        bool idle = !run_pass(sv);
        end_jobs(sv);
        publish(sv);
        if (idle && !sv->jobs) break;
    }
}

/* The bytes are an answer: its status, and a body that is JSON where it says so. */
static void check_answer(const buffer *b) {
    if (!b->n) return;
    const char *text = (const char *)b->data, *end = text + b->n, *body;
    int status;
    if (b->n > 25 && !memcmp(text, "HTTP/1.1 100 Continue\r\n\r\n", 25)) text += 25;
    if (text == end) return;
    must(end - text > 21 && !memcmp(text, "HTTP/1.1 ", 9), "no status line");
    status = atoi(text + 9);
    must(status >= 200 && status < 504 && memcmp(text + 13, "Internal", 8),
         "a status that should not be");
    body = memmem(text, (size_t)(end - text), "\r\n\r\n", 4);
    must(body != NULL, "headers without an end");
    body += 4;
    if (!memmem(text, (size_t)(body - text), "application/json", 16) || body == end) return;
    json j;
    must(!json_parse(&j, body, (size_t)(end - body), NULL), "a body that is no JSON");
    json_free(&j);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n);

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    const char *base = getenv("MEDRUN_FUZZ_BASE");
    static const serve_options o = {.template_name = "llama3.1"};
    medrun_error e = {0};
    target = getenv("MEDRUN_FUZZ");
    must(target && base, "MEDRUN_FUZZ and MEDRUN_FUZZ_BASE say what to read");
    sv->n_slots = 3, sv->max_queue = 8, sv->per_key = 8, sv->max_body = 1 << 20;
    sv->quiet = true, sv->listener = -1, sv->cache_seconds = 60;
    pthread_mutex_init(&sv->lock, NULL);
    pthread_cond_init(&sv->work, NULL);
    sv->queue_end = &sv->queue;
    must(!pipe(sv->wake), "pipe");
    for (int i = 0; i < 2; i++) fcntl(sv->wake[i], F_SETFL, O_NONBLOCK);
    sv->o = &o, sv->path = base, sv->threads = 1, sv->batch = LOGIT_ROWS, sv->cache_mb = 1;
    must(!load(sv, &e) && !start_sessions(sv, &e), e.text);
    atomic_store(&sv->state, READY);
    make_seeds();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t n) {
    connection c = {.fd = -1};
    if (*target == 'a') {
        if (!n) return 0;
        c.in = request_of(input[0] % N_PATHS, (const char *)input + 1, n - 1);
    } else buffer_add(&c.in, input, n);
    set_state(&c, READ_HEAD, SECONDS_HEAD);
    read_request(sv, &c);
    if (c.job) {
        job *g = c.job;
        engine_turns(8);
        if (g->done && !c.streams) {
            json j;
            must(g->status != 500, "an answer could not be finished");
            must(!json_parse(&j, (const char *)g->out.data, g->out.n, NULL), "no JSON");
            json_free(&j);
        }
        cancel_job(sv, g);
        engine_turns(2);
        must(!sv->jobs && !sv->queue && !sv->n_running && !sv->n_waiting, "something is left");
    } else check_answer(&c.out);
    buffer_free(&c.in);
    buffer_free(&c.out);
    return 0;
}
