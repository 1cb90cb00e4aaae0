/* Part of medrun-eval (eval.c includes it): the summary as one page that needs no other file. */

static void add_html(buffer *b, const char *text, const char *line_end) {
    for (; *text; text++) {
        if (*text == '<') buffer_text(b, "&lt;");
        else if (*text == '>') buffer_text(b, "&gt;");
        else if (*text == '&') buffer_text(b, "&amp;");
        else if (*text == '"') buffer_text(b, "&quot;");
        else if (*text == '\n') buffer_text(b, line_end);
        else buffer_add(b, text, 1);
    }
}

static const file_kind page_kind = {"a page of medrun-eval", "<!-- medrun -->", false};

static void page_head(const results *all, buffer *b) {
    buffer_text(b, "<!-- medrun -->\n<!DOCTYPE html>\n<html lang=\"en\"><meta charset=\"utf-8\">\n"
        "<meta name=\"viewport\" content=\"width=device-width\">\n<title>medrun-eval</title>\n"
        "<style>\n"
        ":root { color-scheme: light dark; --line: #8886; --blue: #2563eb; --soft: #2563eb22 }\n"
        "@media (prefers-color-scheme: dark) { :root { --blue: #7aa5ff; --soft: #7aa5ff33 } }\n"
        "body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; "
        "padding: 0 1rem }\n"
        "h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem }\n"
        ".wide { overflow-x: auto }\n"
        "table { border-collapse: collapse; font-variant-numeric: tabular-nums }\n"
        "td, th { border-bottom: 1px solid var(--line); padding: .25rem .75rem; text-align: right; "
        "white-space: nowrap }\n"
        "td:first-child, th:first-child { text-align: left }\n"
        ".about { font-size: .85rem; overflow-wrap: anywhere; opacity: .8 }\n"
        ".same { background: var(--soft) }\n"
        "svg { max-width: 100%; height: auto } svg text { font-size: 11px; fill: currentColor }\n"
        "details { border-bottom: 1px solid var(--line); padding: .4rem 0; "
        "overflow-wrap: anywhere }\n"
        "summary { cursor: pointer; white-space: nowrap; overflow: hidden; "
        "text-overflow: ellipsis }\n</style>\n<h1>Multiple-choice questions</h1>\n"
        "<p>Research and teaching only: a score on an examination says nothing about safety with "
        "patients.</p>\n<p class=\"about\">");
    add_html(b, all->about, " ");
    buffer_text(b, "</p>\n");
}

static void page_table(const tallies *t, buffer *b) {
    buffer_text(b, "<h2>Accuracy</h2>\n<div class=\"wide\"><table><tr><th>task<th>questions<th>acc"
                "<th>standard error<th>95 % interval<th>acc_norm\n");
    for (const tally *p = t->t; p < t->t + t->n; p++) {
        double interval[2];
        wilson(p->right, p->n, interval);
        buffer_text(b, "<tr><td>");
        add_html(b, p->task, " ");
        if (*p->subject) buffer_text(b, " / "), add_html(b, p->subject, " ");
        buffer_printf(b, "<td>%zu<td>%.4f<td>%.4f<td>%.4f to %.4f<td>", p->n, share(p->right, p->n),
                      error_of(p), interval[0], interval[1]);
        if (p->scored) buffer_printf(b, "%.4f", share(p->right_norm, p->n));
        buffer_text(b, "\n");
    }
    buffer_text(b, "</table></div>\n");
}

/* Ten bins by the probability of the chosen answer: how often it was right. A dot's area is the
 * share of questions. */
static void page_calibration(const results *all, buffer *b) {
    enum { BINS = 10, SIZE = 320, EDGE = 60 };
    size_t n[BINS] = {0}, right[BINS] = {0}, total = 0;
    double sure[BINS] = {0}, gap = 0;
    for (size_t i = 0; i < all->n_sets; i++)
        for (const result *r = all->sets[i].r; r < all->sets[i].r + all->sets[i].n; r++) {
            if (r->sure < 0) continue;
            int bin = (int)(r->sure * BINS) < BINS ? (int)(r->sure * BINS) : BINS - 1;
            n[bin]++, total++, right[bin] += r->pred == r->truth, sure[bin] += r->sure;
        }
    if (!total) return;
    buffer_printf(b, "<h2>Calibration</h2>\n<svg viewBox=\"0 40 %d %d\" width=\"%d\" role=\"img\" "
                  "aria-label=\"accuracy by probability of the answer\">\n", SIZE + 2 * EDGE,
                  SIZE + EDGE + 10, SIZE + 2 * EDGE);
    for (int i = 0; i <= 4; i++) {
        int at = SIZE * i / 4;
        buffer_printf(b, "<path d=\"M%d %dH%dM%d %dV%d\" stroke=\"var(--line)\"/>"
                      "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%.2f</text>"
                      "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%.2f</text>\n", EDGE,
                      EDGE + at, EDGE + SIZE, EDGE + at, EDGE, EDGE + SIZE, EDGE - 6,
                      EDGE + SIZE - at + 4, i / 4.0, EDGE + at, EDGE + SIZE + 16, i / 4.0);
    }
    buffer_printf(b, "<path d=\"M%d %dL%d %d\" stroke=\"currentColor\" stroke-dasharray=\"4\"/>\n",
                  EDGE, EDGE + SIZE, EDGE + SIZE, EDGE);
    for (int i = 0; i < BINS; i++) {
        if (!n[i]) continue;
        double x = sure[i] / (double)n[i], y = share(right[i], n[i]);
        gap += fabs(x - y) * (double)n[i] / (double)total;
        buffer_printf(b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\" fill=\"var(--soft)\" "
                      "stroke=\"var(--blue)\"><title>%zu questions, probability %.3f, right %.3f"
                      "</title></circle>\n", EDGE + SIZE * x, EDGE + SIZE * (1 - y),
                      4 + 16 * sqrt((double)n[i] / (double)total), n[i], x, y);
    }
    buffer_printf(b, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">probability of the chosen "
                  "answer</text><text x=\"14\" y=\"%d\" transform=\"rotate(-90 14 %d)\" "
                  "text-anchor=\"middle\">share that is right</text>\n</svg>\n"
                  "<p>Expected calibration error %.4f, in ten bins.</p>\n", EDGE + SIZE / 2,
                  EDGE + SIZE + 40, EDGE + SIZE / 2, EDGE + SIZE / 2, gap);
}

/* Rows are the right choice, columns the chosen one; the last column: none was found. */
static void page_confusion(const result_set *s, buffer *b) {
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
    buffer_text(b, "<h2>Chosen and right: ");
    add_html(b, s->task, " ");
    buffer_text(b, "</h2>\n<div class=\"wide\"><table><tr><th>right");
    for (int k = 0; k < most; k++)
        named && k < 3 ? buffer_printf(b, "<th>%s", words[k]) : buffer_printf(b, "<th>%c", 'A' + k);
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

static int page_wrong(const result_set *s, buffer *b, medrun_error *e) {
    size_t n = 0;
    for (size_t i = 0; i < s->n; i++) n += !s->r[i].skipped && s->r[i].pred != s->r[i].truth;
    buffer_text(b, "<h2>Wrong: ");
    add_html(b, s->task, " ");
    buffer_printf(b, ", %zu of %zu</h2>\n", n, s->n);
    for (const result *r = s->r; r < s->r + s->n; r++) {
        json j = {0};
        buffer text = {0};
        if (r->skipped || r->pred == r->truth) continue;
        if (json_parse(&j, r->line, r->n_line, e)) return e->code;
        uint32_t f = json_get(&j, 0, "question"), c = json_get(&j, 0, "choices") + 1;
        if (json_is_type(&j, f, JSON_STRING)) json_unescape(&j, f, &text);
        buffer_printf(b, "<details><summary>%lld. ", (long long)r->n);
        add_html(b, text_of(&text), " ");
        buffer_text(b, "</summary><p>");
        add_html(b, text_of(&text), "<br>");
        buffer_text(b, "</p><p>");
        for (int i = 0; i < r->n_choices; i++, c = j.nodes[c].next) {
            text.n = 0;
            if (json_is_type(&j, c, JSON_STRING)) json_unescape(&j, c, &text);
            buffer_printf(b, "%c. ", 'A' + i);
            add_html(b, text.n ? text_of(&text) : "", "<br>");
            buffer_text(b, i == r->truth ? " <b>(right)</b><br>" : i == r->pred ?
                        " <b>(chosen)</b><br>" : "<br>");
        }
        if (r->sure >= 0) buffer_printf(b, "Probability of the chosen one: %.3f", r->sure);
        buffer_text(b, "</p></details>\n");
        buffer_free(&text);
        json_free(&j);
    }
    return MEDRUN_OK;
}

/* Writes the page to PATH, over nothing but an older page. */
static int write_page(const results *all, const tallies *t, const char *path, medrun_error *e) {
    buffer b = {0};
    page_head(all, &b);
    page_table(t, &b);
    page_calibration(all, &b);
    for (size_t i = 0; i < all->n_sets; i++) page_confusion(&all->sets[i], &b);
    for (size_t i = 0; i < all->n_sets && !e->code; i++) page_wrong(&all->sets[i], &b, e);
    if (b.failed) out_of_memory(e, b.n);
    file_writer w;
    if (!writer_open(&w, path, &page_kind, false, e)) {
        fwrite(b.data, 1, b.n, w.f);
        writer_done(&w, e);
    }
    buffer_free(&b);
    return e->code;
}
