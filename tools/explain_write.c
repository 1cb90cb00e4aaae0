/* Part of medrun-explain: blocks of numbers, as JSON with all digits and packed into a page.
 *
 * A page is HTML with two scripts of data: `meta`, JSON that says what was run and names each block
 * with its type, shape and place, and `bin`, the blocks' bytes in base64. Text never becomes HTML:
 * it stands in meta alone, where < is \u003c. MIT licence, see LICENSE. */

#include "explain_page.h"

/* f32 and u32 as they are, little-endian; s8: round(255 sqrt a) of a probability, which is right to
 * 0.004 and, from 0.01 on, to 4 %. */
enum { AS_F32, AS_U32, AS_S8 };
static const char *const block_types[] = {"f32", "u32", "s8"};

enum { MAX_BLOCKS = 48, MAX_DIMS = 4 };

typedef struct {
    const char *name, *unit;
    int type;
    size_t dims[MAX_DIMS], n, at;       /* n: numbers; at: where it begins in the bytes         */
} block;

typedef struct {
    block blocks[MAX_BLOCKS];
    size_t n_blocks;
    buffer bin, json;                   /* json: only where it is asked for                     */
    bool wants_json;
} page_data;

#define DIMS(...) ((const size_t[MAX_DIMS + 1]){__VA_ARGS__})

/* DIMS ends with a 0. */
static block *new_block(page_data *g, const char *name, const char *unit, int type,
                        const size_t *dims) {
    block *b = &g->blocks[g->n_blocks++];
    while (g->bin.n % 4) buffer_add(&g->bin, "", 1);
    *b = (block){.name = name, .unit = unit, .type = type, .n = 1, .at = g->bin.n};
    for (size_t i = 0; dims[i]; i++) b->dims[i] = dims[i], b->n *= dims[i];
    if (g->wants_json) buffer_printf(&g->json, ",\n\"%s\":[", name);
    return b;
}

static uint8_t pack_share(float a) {
    return (uint8_t)lrintf(255 * sqrtf(a < 0 ? 0 : a > 1 ? 1 : a));
}

/* Numbers of type f32 or s8. JSON has no infinities: what is not finite becomes null there. */
static void add_block(page_data *g, const char *name, const char *unit, int type,
                      const size_t *dims, const float *v) {
    const block *b = new_block(g, name, unit, type, dims);
    for (size_t i = 0; i < b->n; i++) {
        uint8_t share = pack_share(v[i]);
        if (type == AS_S8) buffer_add(&g->bin, &share, 1);
        else write_le(&g->bin, float_bits(v[i]), 4);
        if (!g->wants_json) continue;
        if (fabsf(v[i]) <= FLT_MAX) buffer_printf(&g->json, i ? ",%.9g" : "%.9g", (double)v[i]);
        else buffer_text(&g->json, i ? ",null" : "null");
    }
    if (g->wants_json) buffer_text(&g->json, "]");
}

static void add_numbers(page_data *g, const char *name, const char *unit, const size_t *dims,
                        const uint32_t *v) {
    const block *b = new_block(g, name, unit, AS_U32, dims);
    for (size_t i = 0; i < b->n; i++) {
        write_le(&g->bin, v[i], 4);
        if (g->wants_json) buffer_printf(&g->json, i ? ",%u" : "%u", v[i]);
    }
    if (g->wants_json) buffer_text(&g->json, "]");
}

/* The directory, as a member of an object. */
static void write_directory(const page_data *g, buffer *to) {
    buffer_text(to, "\"blocks\":[");
    for (size_t i = 0; i < g->n_blocks; i++) {
        const block *b = &g->blocks[i];
        buffer_printf(to, "%s{\"name\":\"%s\",\"unit\":\"%s\",\"type\":\"%s\",\"at\":%zu,"
                      "\"shape\":[", i ? ",\n" : "", b->name, b->unit, block_types[b->type], b->at);
        for (size_t k = 0; k < MAX_DIMS && b->dims[k]; k++)
            buffer_printf(to, k ? ",%zu" : "%zu", b->dims[k]);
        buffer_text(to, "]}");
    }
    buffer_text(to, "]");
}

/* In a script element nothing but < could end it. */
static void add_script_text(const buffer *text, buffer *to) {
    for (size_t i = 0, n; i < text->n; i += n) {
        const uint8_t *at = memchr(text->data + i, '<', text->n - i);
        n = at ? (size_t)(at - text->data) - i : text->n - i;
        buffer_add(to, text->data + i, n);
        if (at) buffer_text(to, "\\u003c"), n++;
    }
}

static const file_kind explain_page = {"a page of medrun-explain", "<!-- medrun-expl", true, true,
                                       0};
static const file_kind explain_json = {"numbers of medrun-explain", "{\"medrun-explain", true, true,
                                       0};

/* The page: what stands before META, between META and BIN, and behind is in explain_page.h. */
static void compose_page(const page_data *g, const buffer *meta, buffer *to) {
    for (size_t i = 0; i < sizeof page_start / sizeof *page_start; i++)
        buffer_text(to, page_start[i]);
    buffer_text(to, "<script type=\"application/json\" id=\"meta\">");
    add_script_text(meta, to);
    buffer_text(to, "</script>\n<script type=\"text/plain\" id=\"bin\">");
    write_base64(g->bin.data, g->bin.n, to);
    buffer_text(to, "</script>\n");
    for (size_t i = 0; i < sizeof page_end / sizeof *page_end; i++) buffer_text(to, page_end[i]);
}

static int write_file(const char *path, const file_kind *kind, bool force, const buffer *b,
                      medrun_error *e) {
    file_writer w;
    if (b->failed) return out_of_memory(e, b->n);
    if (!strcmp(path, "-")) {
        fwrite(b->data, 1, b->n, stdout);
        return finish_stdout(e);
    }
    if (writer_open(&w, path, kind, force, e)) return e->code;
    fwrite(b->data, 1, b->n, w.f);
    return writer_done(&w, e);
}
