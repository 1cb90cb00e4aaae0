/* Tests of medrun-serve's parts without a network: requests cut at every byte, made-up bytes, texts
 * and numbers as JSON, how much rides along, requests while memory ends. Run in the repository
 * root. */

#define _GNU_SOURCE
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>

static size_t allocations_left = SIZE_MAX;      /* then memory is out                             */

static void *test_malloc(size_t n) {
    return allocations_left && allocations_left-- ? malloc(n) : NULL;
}
#ifndef ALL_SERVE               /* all_serve.c has included it                                   */
#define malloc(n) test_malloc(n)
#define main serve_main
#include "../tools/serve.c"
#undef main
#include "test.h"
#endif

#define HOST "Host: localhost\r\n"
static const char *const requests[] = {
    "GET /health HTTP/1.1\r\n" HOST "\r\n",
    "POST /v1/completions HTTP/1.1\r\n" HOST "Content-Length: 12\r\nX-Y:\r\n\r\n",
    "POST /a?b=c HTTP/1.0\r\n" HOST "Authorization: Bearer x\r\nConnection: keep-alive\r\n\r\n",
    "GET / HTTP/1.1\r\nhost:[::1]:80\r\nOrigin: null\r\nExpect: 100-continue\r\n\r\n",
};
static const struct { const char *text; int status; } refused[] = {
    {"GET / HTTP/1.1\n", 400}, {"GET /\r\n", 400}, {"\r\n", 400}, {"GET x HTTP/1.1\r\n", 400},
    {"GET / HTTP/1.1\r\n\r\n", 400}, {"GET / HTTP/1.1\r\n" HOST HOST "\r\n", 400},
    {"GET / HTTP/1.1\r\n" HOST " x: y\r\n", 400}, {"GET / HTTP/1.1\r\nA\r\n", 400},
    {"GET / HTTP/1.1\r\n" HOST "Transfer-Encoding: chunked\r\n\r\n", 411},
    {"GET / HTTP/1.1\r\n" HOST "Content-Length: 1\r\nContent-Length: 1\r\n", 400},
    {"GET / HTTP/1.1\r\n" HOST "Content-Length: -1\r\n", 400},
    {"GET / HTTP/1.1\r\n" HOST "Content-Length: 1\r\nTransfer-Encoding: x\r\n\r\n", 400},
    {"GET / HTTP/1.1\r\nA: \x01\r\n", 400}, {"GET / HTTP/1.1\r\nA: b\rc\r\n", 400},
};

/* However a request is cut, its beginnings want more, and the whole is the same. */
static void test_cuts(void) {
    http_request r;
    for (size_t i = 0; i < sizeof requests / sizeof *requests; i++) {
        size_t n = strlen(requests[i]), wrong_cuts = 0;
        for (size_t cut = 0; cut < n; cut++) wrong_cuts += http_head(&r, requests[i], cut) != 0;
        CHECK_EQ(wrong_cuts, 0);
        CHECK_EQ(http_head(&r, requests[i], n), n);
        CHECK(!r.wrong && r.host.n > 0);
    }
    CHECK(span_is(host_name(r.host), "::1") && r.expect);
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        size_t n = strlen(refused[i].text), others = 0;
        for (size_t cut = 0; cut < n; cut++) {
            int code = http_head(&r, refused[i].text, cut);
            others += code != 0 && code != -refused[i].status;
        }
        CHECK_EQ(others, 0);
        if (!CHECK_EQ(http_head(&r, refused[i].text, n), -refused[i].status)) printf("%zu\n", i);
    }
}

/* Damaged requests give a length within their bytes, a refusal, or want more. */
static void test_damage(void) {
    size_t wrong_ends = 0;
    for (int round = 0; round < (test_all() ? 2000000 : 50000); round++) {
        char text[256];
        size_t n = strlen(requests[round % 4]);
        memcpy(text, requests[round % 4], n);
        for (uint64_t k = test_random() % 4; k < 4; k++)
            text[test_random() % n] = "\r\n\0 :x/\xff"[test_random() % 8];
        n = test_random() % (n + 1);
        char *exact = malloc(n + !n);           /* so that a byte too far is seen                */
        memcpy(exact, text, n);
        http_request r;
        int code = http_head(&r, exact, n);
        wrong_ends += code > (int)n || (code < 0 && (code > -400 || code < -431 || !r.wrong));
        wiping_free(exact);
    }
    CHECK_EQ(wrong_ends, 0);
}

/* Any bytes become JSON that reads back; a character stays as it is. */
static void test_quotes(void) {
    size_t broken = 0, changed = 0;
    for (int round = 0; round < 20000; round++) {
        uint8_t bytes[24];
        size_t n = test_random() % 24;
        bool text = true;
        for (size_t i = 0; i < n; i++) bytes[i] = (uint8_t)(test_random() >> 40);
        if (round % 2) for (size_t i = 0; i < n; i++) bytes[i] &= 0x7F;
        for (size_t i = 0; i < n; i++) text &= bytes[i] < 0x80;
        buffer b = {0}, back = {0};
        json j;
        medrun_error e = {0};
        json_quote(&b, (const char *)bytes, n);
        broken += b.failed || json_parse(&j, (char *)b.data, b.n, &e) || memchr(b.data, '\n', b.n);
        if (!e.code) json_unescape(&j, 0, &back);
        changed += text && (back.n != n || (n && memcmp(back.data, bytes, n)));
        json_free(&j);
        buffer_free(&b);
        buffer_free(&back);
    }
    CHECK_EQ(broken, 0);
    CHECK_EQ(changed, 0);
    buffer b = {0};
    say(&b, "%q", "\xC2\x85\xE2\x80\xA8\xE2\x80\xA9\xC3\xA4");
    CHECK(!strcmp((char *)b.data, "\"\\u0085\\u2028\\u2029\xC3\xA4\""));
    buffer_free(&b);
}

static void test_numbers(void) {
    size_t other = 0;
    for (int i = 0; i < 20000; i++) {
        buffer b = {0};
        double v = -(double)(test_random() >> 11) * 0x1p-49;
        write_number(&b, v);
        double back = strtod((char *)b.data, NULL);
        other += memcmp(&back, &v, sizeof v) != 0;
        buffer_free(&b);
    }
    CHECK_EQ(other, 0);
}

static const char *const bodies[] = {
    "{\"messages\":[{\"role\":\"system\",\"content\":\"Be brief.\"},{\"role\":\"user\",\"content\":"
    "[{\"type\":\"text\",\"text\":\"What is gout?\"}]},{\"role\":\"assistant\",\"content\":\"It\"}]"
    ",\"stop\":[\"a\",\"<|eot_id|>\"],\"logit_bias\":{\"5\":1,\" the\":-100},\"n\":2,\"seed\":1}",
    "{\"prompt\":[\"gout\",[1,2,3]],\"logprobs\":3,\"echo\":true,\"cache_salt\":\"x\",\"other\":1,"
    "\"logit_bias\":[[5,1],[\" the\",false]]}",
};

/* A request is read whole, or refused as one for which there is no memory. */
static void test_memory(server *sv) {
    for (size_t i = 0; i < sizeof bodies / sizeof *bodies; i++) {
        size_t odd = 0, least = SIZE_MAX;
        for (size_t left = 0; left < 2000 && least == SIZE_MAX; left++) {
            job *g = new_array(1, sizeof *g);
            json j = {0};
            buffer ignored = {0};
            api_error x = {0};
            g->api = i ? API_COMPLETION : API_CHAT;
            allocations_left = left;
            if (!json_parse(&j, bodies[i], strlen(bodies[i]), &x.e))
                read_job(sv, g, &j, &ignored, &x);
            allocations_left = SIZE_MAX;
            if (!x.e.code) {
                least = left;
                CHECK_EQ(g->n_seqs, 2);
            } else if (x.e.code != MEDRUN_NO_MEMORY && odd++ < 3)
                printf("%zu: %s\n", left, x.e.text);
            buffer_free(&ignored);
            json_free(&j);
            free_job(g);
        }
        CHECK_EQ(odd, 0);
        if (!CHECK(least > 5 && least < 2000)) printf("%zu\n", least);
    }
}

/* Before the model is there, whoever may ask is told to come back, and nothing is read of it. */
static void test_loading(server *sv) {
    static const char *const asked[] = {
        "GET /health", "GET /v1/health", "GET /v1/models", "GET /slots", "GET /metrics",
        "POST /v1/chat/completions", "POST /tokenize", "HEAD /health", "GET /nothing"};
    sv->max_body = 1 << 20, sv->quiet = sv->ui = true;
    for (size_t i = 0; i < sizeof asked / sizeof *asked; i++)
        for (int ours = 0; ours < 2; ours++) {
            connection c = {.fd = -1};
            buffer_printf(&c.in, "%s HTTP/1.1\r\nHost: %s\r\nContent-Length: 2\r\n\r\n{}", asked[i],
                          ours ? "localhost" : "other.example");
            set_state(&c, READ_HEAD, SECONDS_HEAD);
            read_request(sv, &c);
            buffer_add(&c.out, "", 1);
            const char *text = (const char *)c.out.data;
            CHECK(!strncmp(text, ours ? "HTTP/1.1 503 " : "HTTP/1.1 421 ", 13));
            CHECK(!ours || strstr(text, "\r\nRetry-After: 2\r\n"));
            CHECK(!ours || asked[i][0] == 'H' || strstr(text, "\"unavailable_error\""));
            buffer_free(&c.in);
            buffer_free(&c.out);
        }
}

/* Machines that are made up: seconds of a row, of a key that it looks at, of the weights' way from
 * memory; in wide passes a row takes SHARE of that. */
static const struct machine { double row, key, weights, share; } machines[] = {
    {.003, 1.5e-6, .008, .6}, {.01, 4e-7, .145, .9}, {.002, 4e-7, .145, .8},
    {.0005, 1e-6, .008, .5}};

static double pass_time(const struct machine *m, size_t rows, size_t keys) {
    double time = m->row * (double)rows * (rows > 256 ? m->share : 1);
    return fmax(time, m->weights) + m->key * (double)keys;
}

/* A prompt of 2000 tokens beside those who write, on a machine that is held up now and then, and
 * has half of its speed from the middle on: nobody waits longer than three usual passes (or a row
 * more, where rows are few), and the prompt gets its part. JITTER: of each pass. */
static void test_pace(const struct machine *m, size_t writers, double jitter) {
    pace p = {.per_key = m->key / m->row / 2};          /* half as much as it is                 */
    double plain = pass_time(m, writers, 0), longest = 0, all = 0, own = 0;
    learn_pass(&p, 0, 512, 512, pass_time(m, 512, 512 * 256));
    for (size_t fed = 0, take, i = 0; fed < 2000; fed += take, i++) {
        double room = room_beside(&p, 0, writers), unit = 1 + p.per_key * (double)fed;
        take = room <= 0 ? 0 : room < unit ? 1 : (size_t)(room / unit);
        double time = pass_time(m, writers + take, take * fed), slow = fed < 1000 ? 1 : 2;
        time *= 1 + jitter * ((double)(test_random() >> 11) * 0x1p-52 - 1);
        longest = fmax(longest, time);
        all += time, own += time - plain;
        learn_pass(&p, writers, room, unit * (double)take, time * slow * (i % 50 == 30 ? 9 : 1));
    }
    if (!CHECK(longest < 3 * plain + (writers < 4 ? m->row : 0)) | !CHECK(own > 0.25 * all))
        printf("row %g, %zu writers: %.2f, %.2f\n", m->row, writers, longest / plain, own / all);
    p.passes = 0;
    CHECK(room_beside(&p, 1e-9, writers) >= 1);         /* a prompt goes on whatever --latency is */
}

int main(void) {
    static server sv;
    serve_options o = {0};
    medrun_error e = {0};
    test_cuts();
    test_damage();
    test_quotes();
    test_numbers();
    for (size_t i = 0; i < 4; i++)
        for (size_t writers = 1; writers < 64; writers += writers) {
            test_pace(&machines[i], writers, 0);
            test_pace(&machines[i], writers, 0.03);
        }
    sv.n_slots = 4;
    sv.o = &o, sv.path = "tools/demo/demo.mdr", sv.threads = 1;
    test_loading(&sv);
    if (CHECK(!load(&sv, &e))) test_memory(&sv);
    medrun_close(sv.m);
    return report();
}
