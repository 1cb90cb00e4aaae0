/* Part of medrun-eval (eval.c includes it): the summary as one page that needs no other file. */

static void add_html(buffer *b, const char *text, const char *line_end) {
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        if ((c < 32 && c != '\n' && c != '\t') || c == 127) buffer_text(b, "?");
        else if (*text == '<') buffer_text(b, "&lt;");
        else if (*text == '>') buffer_text(b, "&gt;");
        else if (*text == '&') buffer_text(b, "&amp;");
        else if (*text == '"') buffer_text(b, "&quot;");
        else if (*text == '\n') buffer_text(b, line_end);
        else buffer_add(b, text, 1);
    }
}

static const file_kind page_kind = {"a page of medrun-eval", "<!-- medrun -->", true, true, 0};

/* TEXT made for a terminal, such as a title, as HTML. */
static void add_html_of(buffer *b, const buffer *text) { add_html(b, text_of(text), "<br>"); }

static void add_name_as_html(const results *all, size_t run, const char *name, buffer *b) {
    buffer text = {0};
    add_name(all, run, name, &text);
    b->failed |= text.failed;
    add_html_of(b, &text);
    buffer_free(&text);
}

static const char page_style[] =
    "<style>\n"
    ":root { color-scheme: light dark; --line: #8886; --blue: #2563eb; --soft: #2563eb22;\n"
    "  --warn: #b45309 }\n"
    "@media (prefers-color-scheme: dark) {\n"
    "  :root { --blue: #7aa5ff; --soft: #7aa5ff33; --warn: #f5b155 } }\n"
    "body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto;\n"
    "  padding: 0 1rem }\n"
    "h1 { font-size: 1.5rem; overflow-wrap: anywhere }\n"
    "h2 { font-size: 1.25rem; margin-top: 3rem; overflow-wrap: anywhere }\n"
    "h3 { font-size: 1rem; margin-top: 2rem; overflow-wrap: anywhere }\n"
    "time { white-space: nowrap }\n"
    ".wide { overflow-x: auto; background:\n"           /* a shadow where it can be scrolled     */
    "  linear-gradient(to left, Canvas 50%, #0000) right / 3rem 100% no-repeat local,\n"
    "  linear-gradient(to left, #8889, #0000) right / 1rem 100% no-repeat scroll }\n"
    "table { border-collapse: collapse; font-variant-numeric: tabular-nums }\n"
    "td, th { border-bottom: 1px solid var(--line); padding: .25rem .75rem; text-align: right;\n"
    "  white-space: nowrap }\n"
    "td:first-child, th:first-child, .text { text-align: left }\n"
    ".all { font-weight: 600 }\n"
    ".pair { display: flex; flex-wrap: wrap; gap: 0 3rem } .pair > div { flex: 1 1 22rem;\n"
    "  min-width: 0 }\n"
    "@media (max-width: 40rem) {\n"
    "  td, th { padding: .2rem .3rem; font-size: .8rem } th { white-space: normal } }\n"
    ".about { font-size: .85rem; overflow-wrap: anywhere; opacity: .8 }\n"
    ".remark { border-left: 3px solid var(--warn); padding-left: .75rem;\n"
    "  overflow-wrap: anywhere }\n"
    ".same { background: var(--soft) }\n"
    "svg { max-width: 100%; height: auto } svg text { font-size: 12px; fill: currentColor }\n"
    "details { border-bottom: 1px solid var(--line); padding: .4rem 0; overflow-wrap: anywhere }\n"
    "summary { cursor: pointer; white-space: nowrap; overflow: hidden; text-overflow: ellipsis }\n"
    "</style>\n";

/* Title and heading say which model was asked what, and when this was written. */
static void page_head(const results *all, buffer *b) {
    char today[11];
    buffer title = {0};
    date_today(today);
    add_title(all, &title);
    b->failed |= title.failed;
    buffer_text(b, "<!-- medrun -->\n<!DOCTYPE html>\n<html lang=\"en\"><meta charset=\"utf-8\">\n"
                "<meta name=\"viewport\" content=\"width=device-width\">\n<title>");
    add_html_of(b, &title);
    buffer_printf(b, ", %s: medrun-eval</title>\n%s<h1>", today, page_style);
    add_html_of(b, &title);
    buffer_printf(b, ", <time>%s</time></h1>\n<p>Multiple-choice questions. Research and teaching "
                  "only: a score on an examination says nothing about safety with patients.</p>\n"
                  "<p class=\"about\">", today);
    add_html(b, all->about, " ");
    buffer_text(b, "</p>\n");
    buffer_free(&title);
}

/* A number that guessing would reach says nothing: chance stands beside each accuracy. */
static void page_table(const results *all, const tallies *t, buffer *b) {
    bool many = all->n_runs > 1;
    buffer_printf(b, "<h2>Accuracy by task and subject</h2>\n<div class=\"wide\">"
                  "<table><tr><th>task<th class=\"text\">subject<th>questions<th>acc<th>chance"
                  "<th>standard error<th>95 %% interval<th>acc_norm%s\n",
                  many ? "<th class=\"text\">settings" : "");
    for (const tally *p = t->t; p < t->t + t->n; p++) {
        double interval[2];
        wilson(p->right, p->n, interval);
        buffer_text(b, *p->subject ? "<tr><td>" : "<tr class=\"all\"><td>");
        add_html(b, p->task, " ");
        buffer_text(b, "<td class=\"text\">");
        add_html(b, *p->subject ? p->subject : "all", " ");
        buffer_printf(b, "<td>%zu<td>%.4f<td>%.4f<td>%.4f<td>%.4f to %.4f<td>", p->n,
                      share(p->right, p->n), chance_of(p), error_of(p), interval[0], interval[1]);
        if (p->scored) buffer_printf(b, "%.4f", share(p->right_norm, p->n));
        if (many) buffer_text(b, "<td class=\"text\">");
        if (many) add_html(b, all->runs[p->run].settings, " ");
        buffer_text(b, "\n");
    }
    buffer_text(b, "</table></div>\n<p>");
    add_html(b, metrics_explained, " ");
    buffer_text(b, "</p>\n");
}

/* The remarks of the report, each a paragraph. */
static void page_remarks(const results *all, const tallies *t, buffer *b) {
    buffer text = {0};
    add_remarks(all, t, &text);
    b->failed |= text.failed;
    for (char *p = text.data ? (char *)text.data : NULL, *end; p && *p; p = end) {
        p += *p == '\n';
        end = p + strcspn(p, "\n");
        end += *end == '\n' ? (*end = 0, 1) : 0;
        buffer_text(b, "<p class=\"remark\">");
        add_html(b, p, " ");
        buffer_text(b, "</p>\n");
    }
    buffer_free(&text);
}

enum { BINS = 10, PLOT = 320, EDGE = 60 };

/* Questions by the probability of the chosen answer. */
typedef struct {
    size_t n[BINS], right[BINS], total;
    double sure[BINS];
} bins;

static void count_bins(const results *all, const tally *t, bins *c) {
    *c = (bins){.total = 0};
    for (const result_set *s = all->sets; s < all->sets + all->n_sets; s++)
        for (size_t i = 0; i < s->n && is_of(s, t->run, t->task); i++) {
            const result *r = &s->r[i];
            if (r->sure < 0) continue;
            int bin = (int)(r->sure * BINS) < BINS ? (int)(r->sure * BINS) : BINS - 1;
            c->n[bin]++, c->total++, c->right[bin] += r->pred == r->truth;
            c->sure[bin] += r->sure;
        }
}

static void plot_axes(buffer *b) {
    for (int i = 0; i <= 4; i++) {
        int at = PLOT * i / 4;
        buffer_printf(b, "<path d=\"M%d %dH%dM%d %dV%d\" stroke=\"var(--line)\"/>"
                      "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%.2f</text>"
                      "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%.2f</text>\n", EDGE,
                      EDGE + at, EDGE + PLOT, EDGE + at, EDGE, EDGE + PLOT, EDGE - 6,
                      EDGE + PLOT - at + 4, i / 4.0, EDGE + at, EDGE + PLOT + 16, i / 4.0);
    }
    buffer_printf(b, "<path d=\"M%d %dL%d %d\" stroke=\"currentColor\" stroke-dasharray=\"4\"/>\n"
                  "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">probability of the chosen "
                  "answer, among the choices</text>"
                  "<text x=\"14\" y=\"%d\" transform=\"rotate(-90 14 %d)\" text-anchor=\"middle\">"
                  "share that is right</text>\n", EDGE, EDGE + PLOT, EDGE + PLOT, EDGE,
                  EDGE + PLOT / 2, EDGE + PLOT + 40, EDGE + PLOT / 2, EDGE + PLOT / 2);
}

/* Ten bins by the probability of the chosen answer: how often it was right. A dot's area is the
 * share of questions. */
static void page_calibration(const results *all, const tally *t, buffer *b) {
    bins c;
    double gap = 0;
    count_bins(all, t, &c);
    if (!c.total) return;
    buffer_text(b, "<h3>Calibration: ");
    add_name_as_html(all, t->run, t->task, b);
    buffer_printf(b, "</h3>\n<svg viewBox=\"0 40 %d %d\" width=\"%d\" role=\"img\" "
                  "aria-label=\"accuracy by probability of the answer\">\n", PLOT + 2 * EDGE,
                  PLOT + EDGE + 10, PLOT + 2 * EDGE);
    plot_axes(b);
    for (int i = 0; i < BINS; i++) {
        if (!c.n[i]) continue;
        double x = c.sure[i] / (double)c.n[i], y = share(c.right[i], c.n[i]);
        double part = share(c.n[i], c.total);
        gap += fabs(x - y) * part;
        buffer_printf(b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\" fill=\"var(--soft)\" "
                      "stroke=\"var(--blue)\"><title>%zu questions, probability among the choices "
                      "%.3f, right %.3f</title></circle>\n", EDGE + PLOT * x, EDGE + PLOT * (1 - y),
                      4 + 16 * sqrt(part), c.n[i], x, y);
    }
    buffer_printf(b, "</svg>\n<p>Expected calibration error %.4f, in ten bins: on the dashed line "
                  "a model is as often right as it is sure. A dot's area is its share of the "
                  "%zu questions.", gap, c.total);
    if (t->held >= 0)
        buffer_printf(b, " The choices together hold %.2g of the probability (median).", t->held);
    buffer_text(b, "</p>\n");
}

/* Which questions a table or a list is about: task, settings, file, subject. */
static void add_set_heading(const results *all, const char *what, const result_set *s, buffer *b) {
    buffer_printf(b, "<h3>%s: ", what);
    add_name_as_html(all, s->run, s->task, b);
    if (*s->file) buffer_text(b, ", "), add_html(b, s->file, " ");
    if (*s->subject) buffer_text(b, ", "), add_html(b, s->subject, " ");
}

/* Rows are the right choice, columns the chosen one; the last column: none was found. */
static void page_confusion(const results *all, const result_set *s, buffer *b) {
    static const char *const words[] = {"yes", "no", "maybe"};
    size_t count[MAX_CHOICES][MAX_CHOICES + 1] = {{0}};
    int most = 0;
    bool silent = false, named = !strcmp(s->task, "pubmedqa");
    for (const result *r = s->r; r < s->r + s->n; r++) {
        if (r->skipped) continue;
        count[r->truth][r->pred < 0 ? MAX_CHOICES : r->pred]++;
        silent |= r->pred < 0;
        if (r->n_choices > most) most = r->n_choices;
    }
    add_set_heading(all, "Chosen and right", s, b);
    buffer_text(b, "</h3>\n<div class=\"wide\"><table><tr><th>right is");
    for (int k = 0; k < most; k++)
        named && k < 3 ? buffer_printf(b, "<th>%s chosen", words[k])
                       : buffer_printf(b, "<th>%c chosen", 'A' + k);
    buffer_text(b, silent ? "<th>none\n" : "\n");
    for (int i = 0; i < most; i++) {
        named && i < 3 ? buffer_printf(b, "<tr><td>%s", words[i])
                       : buffer_printf(b, "<tr><td>%c", 'A' + i);
        for (int k = 0; k < most; k++)
            buffer_printf(b, "<td%s>%zu", k == i ? " class=\"same\"" : "", count[i][k]);
        if (silent) buffer_printf(b, "<td>%zu", count[i][MAX_CHOICES]);
        buffer_text(b, "\n");
    }
    buffer_text(b, "</table></div>\n");
}

/* One wrong question; J is its line. */
static void page_question(const result *r, const json *j, buffer *b) {
    buffer text = {0};
    uint32_t f = json_get(j, 0, "question"), c = json_get(j, 0, "choices") + 1;
    if (json_is_type(j, f, JSON_STRING)) json_unescape(j, f, &text);
    buffer_printf(b, "<details><summary>%lld. ", (long long)r->n + 1);
    add_html(b, text_of(&text), " ");
    buffer_text(b, "</summary><p>");
    add_html(b, text_of(&text), "<br>");
    buffer_text(b, "</p><p>");
    for (int i = 0; i < r->n_choices; i++, c = j->nodes[c].next) {
        text.n = 0;
        if (json_is_type(j, c, JSON_STRING)) json_unescape(j, c, &text);
        buffer_printf(b, "%c. ", 'A' + i);
        add_html(b, text.n ? text_of(&text) : "", "<br>");
        buffer_text(b, i == r->truth ? " <b>(right)</b><br>" : i == r->pred ?
                    " <b>(chosen)</b><br>" : "<br>");
    }
    if (r->sure >= 0)
        buffer_printf(b, "Probability of the chosen one, among the choices: %.3f", r->sure);
    if (r->held >= 0) buffer_printf(b, "; all choices together hold %.2g", r->held);
    buffer_text(b, "</p></details>\n");
    b->failed |= text.failed;
    buffer_free(&text);
}

static int page_wrong(const results *all, const result_set *s, buffer *b, medrun_error *e) {
    size_t n = 0;
    for (size_t i = 0; i < s->n; i++) n += !s->r[i].skipped && s->r[i].pred != s->r[i].truth;
    add_set_heading(all, "Wrong answers", s, b);
    buffer_printf(b, ", %zu of %zu</h3>\n", n, s->n);
    for (const result *r = s->r; r < s->r + s->n; r++) {
        json j = {0};
        if (r->skipped || r->pred == r->truth) continue;
        if (json_parse(&j, r->line, r->n_line, e)) return e->code;
        page_question(r, &j, b);
        json_free(&j);
    }
    return MEDRUN_OK;
}

/* All about one task of one run; a group of tasks has no questions of its own. */
static int page_task(const results *all, const tally *t, buffer *b, medrun_error *e) {
    size_t n_sets = 0;
    for (size_t i = 0; i < all->n_sets; i++) n_sets += is_of(&all->sets[i], t->run, t->task);
    if (*t->subject || !n_sets) return e->code;
    double interval[2];
    wilson(t->right, t->n, interval);
    buffer_text(b, "<h2>");
    add_name_as_html(all, t->run, t->task, b);
    buffer_printf(b, ": accuracy %.4f</h2>\n<p>%zu of %zu are right; guessing would get %.4f. The "
                  "accuracy's 95 %% interval is %.4f to %.4f.</p>\n", share(t->right, t->n),
                  t->right, t->n, chance_of(t), interval[0], interval[1]);
    buffer_text(b, "<div class=\"pair\"><div>\n");
    page_calibration(all, t, b);
    buffer_text(b, "</div><div>\n");
    for (const result_set *s = all->sets; s < all->sets + all->n_sets; s++)
        if (is_of(s, t->run, t->task)) page_confusion(all, s, b);
    buffer_text(b, "</div></div>\n");
    for (const result_set *s = all->sets; s < all->sets + all->n_sets && !e->code; s++)
        if (is_of(s, t->run, t->task)) page_wrong(all, s, b, e);
    return e->code;
}

/* Writes the page to PATH, over nothing but an older page. */
static int write_page(const results *all, const tallies *t, const char *path, bool force,
                      medrun_error *e) {
    buffer b = {0};
    page_head(all, &b);
    page_table(all, t, &b);
    page_remarks(all, t, &b);
    for (const tally *p = t->t; p < t->t + t->n && !e->code; p++) page_task(all, p, &b, e);
    if (b.failed) out_of_memory(e, b.n);
    file_writer w;
    if (!writer_open(&w, path, &page_kind, force, e)) {
        fwrite(b.data, 1, b.n, w.f);
        writer_done(&w, e);
    }
    buffer_free(&b);
    return e->code;
}
