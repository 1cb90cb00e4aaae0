/* A device against the processor, bit for bit: products of every type and odd shapes for every way
 * of packing activations; whole models, prompts and generation, company, a part of the layers,
 * observers, files of sessions; and all that can be wrong with a device, from the start or in the
 * middle of a run. Runs on any OpenCL device (MEDRUN_TEST_DEVICE, 0), PoCL's for one. */
#if defined __has_include
#if __has_include(<CL/cl.h>) || __has_include(<OpenCL/cl.h>)
#define MEDRUN_OPENCL
#endif
#endif

#ifdef MEDRUN_OPENCL
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "../tools/store.c"
#include "test.h"

static const char *const folders[] = {"llama-plain", "llama-tied", "llama-sharded",
                                      "llama-grouped", "mistral-window", "mistral-spm",
                                      "arcee-yarn", "arcee-yarn5", "apertus-plain",
                                      "apertus-grouped"};
static const char *const types[] = {"bf16", "int8", "int4"};
enum { N_FOLDERS = sizeof folders / sizeof *folders, CONTEXT = 320 };
static const char *device_name = "0";

static opencl_device *device_of(const medrun_model *m) { return (opencl_device *)m->device; }

/* ---- products -------------------------------------------------------------------------------- */

static float uniform(void) { return (float)((double)test_random() / 0x1p63 - 1); }

/* Panels of random weights: int4 as they come, with scales that are numbers. */
static tensor random_tensor(int type, size_t rows, size_t cols) {
    size_t bytes = panel_bytes(type, cols), panels = (rows + LANES - 1) / LANES;
    uint8_t *data = malloc(panels * bytes);
    float *w = malloc(LANES * cols * sizeof *w);
    for (size_t p = 0; p < panels; p++) {
        uint8_t *panel = data + p * bytes;
        size_t live = rows - p * LANES < LANES ? rows - p * LANES : LANES;
        for (size_t i = 0; i < LANES * cols; i++) w[i] = uniform() * (i % 7 ? 1 : 1e-4f);
        if (type != TYPE_INT4) store_panel(type, w, live, cols, panel);
        for (size_t i = 0; type == TYPE_INT4 && i < bytes; i++) panel[i] = (uint8_t)test_random();
        for (size_t g = 0; type == TYPE_INT4 && g < (cols + GROUP - 1) / GROUP * 2; g++)
            for (size_t r = 0; r < LANES; r++) panel[group_scales(TYPE_INT4, g) + 2 * r + 1] &= 0xBB;
    }
    free(w);
    return (tensor){type, rows, cols, data};
}

/* W and a second matrix in one go, by the processor and by the device; strides are more than rows.
 * Every place of OUT is compared, those that nobody writes to as well. */
static bool same_products(const engine *eng, device *d, const tensor *w, const tensor *v,
                          size_t tokens) {
    size_t cols = w->cols, x_stride = cols + 3, strides[] = {round_up(w->rows, LANES) + 5,
                                                             round_up(v->rows, LANES)};
    size_t n = tokens * (strides[0] + strides[1]);
    float *x = malloc(tokens * x_stride * sizeof *x), *out = malloc(2 * n * sizeof *out);
    packed a = {.data = malloc(pack_bytes(pack_kind(eng, w->type), cols, tokens))};
    engine with = *eng;
    with.block_bytes = engine_block_bytes(eng, w->type, cols);
    with.blocks = malloc((size_t)eng->pool->threads * with.block_bytes);
    for (size_t i = 0; i < tokens * x_stride; i++) x[i] = uniform() * (i % 5 ? 3 : 1e-12f);
    for (size_t i = 0; i < 2 * n; i++) out[i] = 12345;
    pack_activations(eng, &a, w->type, x, x_stride, cols, tokens);
    for (int i = 0; i < 2; i++) {
        float *to = out + (i ? n : 0);
        with.device = i ? d : NULL;
        matmul(&with, (product[]){{w, to, strides[0]},
                                  {v, to + tokens * strides[0], strides[1]}}, 2, &a);
    }
    bool same = !memcmp((void *)out, (void *)(out + n), n * sizeof *out) && !d->failed;
    free(x), free(out), free(a.data), free(with.blocks);
    return same;
}

static device *open_device(const engine *eng, const tensor *const *all, size_t n) {
    buffer log = {0};
    medrun_error e = {0};
    device *d = device_open(&(device_request){.name = device_name}, eng, all, n, 1, &log, &e);
    if (!d) printf("%s\n%s\n", e.text, log.n ? (char *)log.data : ""), exit(1);
    buffer_free(&log);
    return d;
}

static void test_products(void) {
    static const size_t cols[] = {16, 48, 64, 112, 128, 320, 1040}, rows[] = {1, 16, 33, 200};
    static const size_t tokens[] = {1, 2, 3, 5, 8, 9, 13, 37, 600};
    const kernel_set *sets[N_KERNEL_SETS];
    thread_pool pool = {0};
    int n_sets = usable_kernels(sets), wrong = 0;
    CHECK(!pool_start(&pool, 2, NULL));
    for (int type = TYPE_BF16; type < N_TYPES; type++)
        for (size_t i = 0; i < 7 * 4; i++) {
            tensor w = random_tensor(type, rows[i % 4], cols[i / 4]);
            tensor v = random_tensor(type, 40, w.cols), other = random_tensor(type, 16, w.cols);
            bool done[N_PACKS] = {0};
            for (int k = 0; k < n_sets; k++) {
                engine eng = {.pool = &pool, .k = sets[k], .strict = true};
                int kind = pack_kind(&eng, type);
                if (done[kind]) continue;               /* the device gets the same              */
                done[kind] = true;
                device *d = open_device(&eng, (const tensor *[]){&w, &v}, 2);
                CHECK_EQ(d->loaded, 2);
                for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
                    wrong += !same_products(&eng, d, &w, &v, tokens[t]);
                packed none = {kind, 1, w.cols, NULL};
                wrong += d->multiply(d, &(product){&other, NULL, 16}, 1, &none);
                none.kind = PACK_BF16;
                wrong += d->multiply(d, &(product){&w, NULL, 16}, 1, &none);
                device_close(d);
            }
            free((void *)(uintptr_t)w.data), free((void *)(uintptr_t)v.data);
            free((void *)(uintptr_t)other.data);
        }
    CHECK_EQ(wrong, 0);
    pool_stop(&pool);
}

/* More products than there is room for at once. */
static void test_many_products(void) {
    thread_pool pool = {0};
    CHECK(!pool_start(&pool, 2, NULL));
    engine eng = {.pool = &pool, .k = &kernel_row_scalar, .strict = true};
    tensor w = random_tensor(TYPE_BF16, 40000, 16), v = random_tensor(TYPE_BF16, 40, 16);
    device *d = open_device(&eng, (const tensor *[]){&w, &v}, 2);
    CHECK(430 * w.rows > DEVICE_OUT && same_products(&eng, d, &w, &v, 430));
    device_close(d);
    free((void *)(uintptr_t)w.data), free((void *)(uintptr_t)v.data);
    pool_stop(&pool);
}

/* ---- models ---------------------------------------------------------------------------------- */

static medrun_model *open_model(const char *folder, const char *type, bool on_device, int layers) {
    char path[256];
    const char *build = getenv("MEDRUN_TEST_BUILD");
    medrun_model *m;
    medrun_error e = {0};
    snprintf(path, sizeof path, "%s/%s-%s.mdr", build ? build : "build", folder, type);
    if (medrun_open(&m, path, &(medrun_options){.threads = 2}, &e) ||
        (on_device && medrun_attach(m, device_name, layers, &e)))
        printf("%s\n", e.text), exit(1);
    return m;
}

static medrun_session *start(const medrun_model *m, medrun_session_options o) {
    medrun_session *s;
    medrun_error e = {0};
    if (!o.context) o.context = CONTEXT;
    o.strict = true;
    if (medrun_start(&s, m, &o, NULL, 0, &e)) printf("%s\n", e.text), exit(1);
    return s;
}

static void feed(medrun_session *s, size_t n) {
    int failed = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t id = (int32_t)((medrun_length(s) * 31 + 7) % 260);
        failed += medrun_feed(s, &id, 1, NULL);
    }
    CHECK_EQ(failed, 0);
}

static void run(medrun_session *s) {
    medrun_error e = {0};
    while (medrun_pending(s) && !e.code) medrun_step(&s, 1, &e);
    if (!CHECK(!e.code)) printf("%s\n", e.text);
}

static bool same_logits(const medrun_session *a, const medrun_session *b, size_t rows) {
    size_t vocab = (size_t)a->model->config.vocab_size;
    for (size_t r = 0; r < rows; r++) {
        const float *x = medrun_logits(a, r), *y = medrun_logits(b, r);
        if (!x || !y || memcmp((const void *)x, (const void *)y, vocab * sizeof *x)) return false;
    }
    return true;
}

/* Prompts of several lengths in chunks, every row of logits of the last, then tokens one by one. */
static bool same_run(const medrun_model *cpu, const medrun_model *gpu, int batch, int kv,
                     size_t length) {
    int rows = batch < 16 ? batch : 16;
    medrun_session_options o = {.batch = batch, .kv = kv, .logit_rows = rows};
    medrun_session *a = start(cpu, o), *b = start(gpu, o);
    feed(a, length), feed(b, length);
    run(a), run(b);
    size_t last = length % (size_t)batch ? length % (size_t)batch : (size_t)batch;
    bool same = same_logits(a, b, last < (size_t)rows ? last : (size_t)rows);
    for (int i = 0; i < 3; i++) {
        feed(a, 1), feed(b, 1);
        run(a), run(b);
        same = same && same_logits(a, b, 1);
    }
    medrun_stop(a), medrun_stop(b);
    return same;
}

static void test_models(void) {
    static const struct { int batch, kv; size_t length; } runs[] = {
        {512, MEDRUN_KV_F16, 1}, {512, MEDRUN_KV_F32, 7}, {7, MEDRUN_KV_F16, 64},
        {512, MEDRUN_KV_INT8, 300}, {100, MEDRUN_KV_F32, 300}};
    for (int f = 0; f < N_FOLDERS; f++)
        for (int t = 0; t < 3; t++) {
            medrun_model *cpu = open_model(folders[f], types[t], false, 0);
            medrun_model *gpu = open_model(folders[f], types[t], true, -1);
            medrun_info info;
            medrun_describe(gpu, &info);
            CHECK(strstr(info.device, " and the logits, with the processor's bits") != NULL);
            size_t same = 0, n = sizeof runs / sizeof *runs;
            for (size_t i = 0; i < n; i++)
                same += same_run(cpu, gpu, runs[i].batch, runs[i].kv, runs[i].length);
            if (!CHECK_EQ(same, n)) printf("%s %s\n", folders[f], types[t]);
            medrun_close(cpu), medrun_close(gpu);
        }
}

static void test_part(void) {
    for (int f = 2; f < N_FOLDERS; f += 3) {
        medrun_model *cpu = open_model(folders[f], "int8", false, 0);
        medrun_model *gpu = open_model(folders[f], "int8", true, 1);
        medrun_info info;
        medrun_describe(gpu, &info);
        CHECK(strstr(info.device, ": 1 of ") && !strstr(info.device, "logits"));
        CHECK_EQ(gpu->device->loaded, gpu->config.activation == ACTIVATION_SILU ? 7 : 6);
        CHECK(same_run(cpu, gpu, 50, MEDRUN_KV_F16, 300));
        medrun_close(cpu), medrun_close(gpu);
    }
}

/* Three sessions of different lengths in each step. */
static void test_company(void) {
    medrun_model *cpu = open_model("mistral-window", "int8", false, 0);
    medrun_model *gpu = open_model("mistral-window", "int8", true, -1);
    medrun_session *a[3], *b[3];
    bool same = true;
    for (size_t i = 0; i < 3; i++) {
        a[i] = start(cpu, (medrun_session_options){0});
        b[i] = start(gpu, (medrun_session_options){0});
        feed(a[i], 1 + 40 * i), feed(b[i], 1 + 40 * i);
    }
    for (int round = 0; round < 4; round++) {
        for (size_t i = 0; i < 3; i++) run(a[i]);
        CHECK(!medrun_step(b, 3, NULL));
        for (size_t i = 0; i < 3; i++) {
            same = same && same_logits(a[i], b[i], 1);
            feed(a[i], 1 + i), feed(b[i], 1 + i);
        }
    }
    CHECK(same);
    for (size_t i = 0; i < 3; i++) medrun_stop(a[i]), medrun_stop(b[i]);
    medrun_close(cpu), medrun_close(gpu);
}

static void look(void *user, const char *stage, int layer, size_t rows, size_t cols, size_t stride,
                 const float *data) {
    (void)stage, (void)layer, (void)rows, (void)cols, (void)stride, (void)data;
    ++*(int *)user;
}

/* An observer's passes, files, rewinding. */
static void test_wandering(int layers, int kv) {
    medrun_model *cpu = open_model("llama-sharded", "int8", false, 0);
    medrun_model *gpu = open_model("llama-sharded", "int8", true, layers);
    medrun_session_options o = {.kv = kv};
    medrun_session *a = start(cpu, o), *b = start(gpu, o), *c = start(gpu, o);
    char path[256];
    const char *build = getenv("MEDRUN_TEST_BUILD");
    int seen = 0;
    snprintf(path, sizeof path, "%s/opencl.state", build ? build : "build");
    feed(a, 37), feed(b, 37), run(a), run(b);
    medrun_observe(b, look, &seen);
    feed(a, 5), feed(b, 5), run(a), run(b);
    CHECK(seen > 20 && same_logits(a, b, 1));
    medrun_observe(b, NULL, NULL);
    feed(a, 20), feed(b, 20), run(a), run(b);
    CHECK(same_logits(a, b, 1));
    CHECK(!medrun_rewind(a, 40, NULL) && !medrun_rewind(b, 40, NULL));
    feed(a, 10), feed(b, 10), run(a), run(b);
    CHECK(same_logits(a, b, 1));
    CHECK(!medrun_save(b, path, NULL) && !medrun_restore(c, path, NULL));
    feed(a, 3), feed(c, 3), run(a), run(c);
    CHECK(same_logits(a, c, 1));
    CHECK(!medrun_save(a, path, NULL) && !medrun_restore(c, path, NULL));
    feed(a, 3), feed(c, 3), run(a), run(c);
    CHECK(same_logits(a, c, 1));
    remove(path);
    medrun_stop(a), medrun_stop(b), medrun_stop(c);
    medrun_close(cpu), medrun_close(gpu);
}

/* Guessing ahead gives the same ids. */
static void test_lookup(void) {
    medrun_model *cpu = open_model("llama-plain", "int8", false, 0);
    medrun_model *gpu = open_model("llama-plain", "int8", true, -1);
    medrun_session *a = start(cpu, (medrun_session_options){0});
    medrun_session *b = start(gpu, (medrun_session_options){.lookup = 8});
    const char *text;
    size_t n;
    int same = 0;
    feed(a, 20), feed(b, 20);
    for (int i = 0; i < 60; i++) {
        int32_t one = -1, two = -2;
        medrun_next(a, &one, &text, &n, NULL);
        medrun_next(b, &two, &text, &n, NULL);
        same += one == two;
    }
    CHECK_EQ(same, 60);
    medrun_stop(a), medrun_stop(b);
    medrun_close(cpu), medrun_close(gpu);
}

/* ---- what can be wrong ---------------------------------------------------------------------- */

/* Attaching this device must fail with a line that has WORDS; the model works on. */
static void refused(device_request r, const char *words, int code) {
    medrun_model *m = open_model("llama-plain", "int8", false, 0);
    medrun_error e = {0};
    medrun_info info;
    CHECK_EQ(attach_device(m, &r, -1, &e), code);
    if (!CHECK(strstr(e.text, words) != NULL)) printf("%s\n", e.text);
    medrun_describe(m, &info);
    CHECK(!*info.device && !m->device);
    CHECK(!*info.device_log == !strstr(words, "built"));
    medrun_session *s = start(m, (medrun_session_options){0});
    feed(s, 3), run(s);
    CHECK(medrun_logits(s, 0) != NULL);
    medrun_stop(s);
    medrun_close(m);
}

static void test_refusals(void) {
    enum { NONE = MEDRUN_USAGE, UNABLE = MEDRUN_NO_MEMORY };
    const char *name = device_name;
    refused((device_request){name, "./none.so", NULL, 0}, "no OpenCL library", NONE);
    refused((device_request){name, "libm.so.6", NULL, 0}, "has no cl", NONE);
    refused((device_request){.name = "99"}, "found no \"99\"", NONE);
    refused((device_request){.name = "no such name"}, "found no", NONE);
    refused((device_request){.name = name, .memory = 1 << 20}, "1 MB are not enough", UNABLE);
    refused((device_request){.name = name, .options = "-D sum=+"}, "cannot be built", UNABLE);
    refused((device_request){.name = name, .options = "-D get_global_id=get_local_id"},
            "its products are not the processor's", UNABLE);
    medrun_model *m = open_model("llama-plain", "int8", true, -1);
    medrun_error e = {0};
    CHECK_EQ(medrun_attach(m, name, -1, &e), MEDRUN_USAGE);
    CHECK(strstr(e.text, "this model has one") && m->device);
    medrun_close(m);
    m = open_model("llama-plain", "int8", false, 0);
    CHECK_EQ(medrun_attach(m, name, 0, &e), MEDRUN_USAGE);
    CHECK(strstr(e.text, "0 layers") && !m->device);
    medrun_close(m);
}

/* What does not fit stays here: first the output matrix, then layers from the last on. */
static void test_memory(void) {
    medrun_model *cpu = open_model("llama-sharded", "int8", false, 0);
    medrun_model *m = open_model("llama-sharded", "int8", true, -1);
    const opencl_device *d = device_of(m);
    uint64_t all = d->facts.memory - d->facts.memory / 16, used = all - d->room;
    size_t matrices = m->device->loaded, layers = (size_t)m->config.n_layers;
    for (size_t kept = matrices; kept-- > matrices / layers;) {
        const tensor *w = d->copies[kept].w;
        char says[64];
        medrun_model *part = open_model("llama-sharded", "int8", false, 0);
        used -= tensor_bytes(w->type, w->rows, w->cols);
        CHECK(!attach_device(part, &(device_request){.name = device_name, .memory = used}, -1,
                             NULL));
        snprintf(says, sizeof says, ": %zu of %zu layers, ", kept / 7, layers);
        CHECK(part->device->loaded == kept && strstr(part->device->says, says));
        CHECK(same_run(cpu, part, 512, MEDRUN_KV_F16, 30));
        medrun_close(part);
    }
    medrun_close(m), medrun_close(cpu);
}

/* ---- calls that fail in the middle of a run: the Nth from now on ----------------------------- */

static int calls_left;
static opencl real;
#define FAILS (calls_left-- == 0)

static cl_int CL_API_CALL failing_write(cl_command_queue q, cl_mem m, cl_bool wait, size_t at,
                                        size_t n, const void *from, cl_uint events,
                                        const cl_event *before, cl_event *after) {
    return FAILS ? -5 : real.clEnqueueWriteBuffer(q, m, wait, at, n, from, events, before, after);
}

static cl_int CL_API_CALL failing_argument(cl_kernel k, cl_uint i, size_t n, const void *value) {
    return FAILS ? -5 : real.clSetKernelArg(k, i, n, value);
}

static cl_int CL_API_CALL failing_kernel(cl_command_queue q, cl_kernel k, cl_uint dimensions,
                                         const size_t *offset, const size_t *items,
                                         const size_t *group, cl_uint events,
                                         const cl_event *before, cl_event *after) {
    return FAILS ? -5 : real.clEnqueueNDRangeKernel(q, k, dimensions, offset, items, group, events,
                                                    before, after);
}

static cl_int CL_API_CALL failing_read(cl_command_queue q, cl_mem m, cl_bool wait,
                                       const size_t *there, const size_t *here,
                                       const size_t *region, size_t a, size_t b, size_t c, size_t d,
                                       void *to, cl_uint events, const cl_event *before,
                                       cl_event *after) {
    return FAILS ? -5 : real.clEnqueueReadBufferRect(q, m, wait, there, here, region, a, b, c, d,
                                                     to, events, before, after);
}

static cl_int CL_API_CALL failing_finish(cl_command_queue q) {
    cl_int why = real.clFinish(q);
    return FAILS ? -5 : why;
}

/* The run goes on with the same bits; the model says which call failed, and none comes after it. */
static void test_failures(void) {
    medrun_model *cpu = open_model("llama-plain", "int8", false, 0);
    for (int i = 0; i < 5 * 3; i++) {
        medrun_model *m = open_model("llama-plain", "int8", true, -1);
        opencl *cl = &device_of(m)->cl;
        medrun_info info;
        real = *cl;
        if (i % 5 == 0) cl->clEnqueueWriteBuffer = failing_write;
        if (i % 5 == 1) cl->clSetKernelArg = failing_argument;
        if (i % 5 == 2) cl->clEnqueueNDRangeKernel = failing_kernel;
        if (i % 5 == 3) cl->clEnqueueReadBufferRect = failing_read;
        if (i % 5 == 4) cl->clFinish = failing_finish;
        calls_left = i / 5 * 3;
        CHECK(same_run(cpu, m, 7, MEDRUN_KV_F16, 20));
        medrun_describe(m, &info);
        if (!CHECK(m->device->failed && strstr(info.device, " failed (-5)"))) puts(info.device);
        /* After a write or a read that failed the device is still waited for. */
        CHECK(calls_left >= (i % 5 == 0 || i % 5 == 3 ? -2 : -1));
        medrun_close(m);
    }
    medrun_close(cpu);
}

/* bf16 weights make every session strict, as the device is. */
static void test_strict(void) {
    medrun_model *m = open_model("llama-plain", "bf16", true, -1);
    medrun_session *s;
    CHECK(!medrun_start(&s, m, &(medrun_session_options){.batch = 64}, NULL, 0, NULL));
    CHECK(s->options.strict);
    medrun_stop(s);
    medrun_close(m);
}

/* PoCL keeps a few bytes of every kernel. */
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0"; }

int main(void) {
    opencl cl;
    device_facts all[MAX_DEVICES];
    medrun_error e = {0};
    if (getenv("MEDRUN_TEST_DEVICE")) device_name = getenv("MEDRUN_TEST_DEVICE");
    if (opencl_open(&cl, NULL, &e)) return SKIP(e.text), report();
    int n = list_devices(&cl, all);
    if (!n) return SKIP("OpenCL has no device here"), report();
    test_products();
    test_many_products();
    test_models();
    test_part();
    test_company();
    test_wandering(-1, MEDRUN_KV_F16);
    test_wandering(1, MEDRUN_KV_F32);
    test_wandering(-1, MEDRUN_KV_INT8);
    test_lookup();
    test_strict();
    test_memory();
    test_failures();
    test_refusals();
    return report();
}

#else
#include <stdio.h>
int main(void) {
    puts("skipped: no OpenCL headers (opencl-headers)\n0 passed, 0 failed, 1 skipped");
    return 0;
}
#endif
