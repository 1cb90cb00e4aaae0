/* medrun-export, section 4: the chat template, stop ids, sampling, licence. Included by export.c.
 *
 * There is no Jinja engine here. A template is recognised by a fingerprint of its tokens, as Jinja
 * reads them after it has applied its rules for white space: comments, white space inside tags, the
 * spelling of strings and the dashes of tags do not count, as far as they change nothing.
 * tools/reference/templates.py makes the lines of the table: it renders many conversations with
 * jinja2 and with `medrun-lab call --render`, and prints a line only where all come out the same.
 * Tests: tests/20_export.c. */

static const struct { const char *fingerprint, *name; } known_templates[] = {
    /* Llama 3 as published first, and opening the answer only where asked */
    {"c33896ec5309dac9452a0e11219c5f15", "llama3"},
    {"e98c2a3993d86ef2bdf2b9d58118140c", "llama3"},
    /* Llama 3.1 and 3.3 */
    {"7fb8ac9e6a1c44f33ef7c1c003d7f22b", "llama3.1"},
    /* three releases of Apertus */
    {"711a166daf3ddab0762fe90400c197f2", "apertus"},
    {"191005a415e38a8908a0a89a5041c724", "apertus-bare"},
    {"f151bafc6730fe9fa5be5d6e542c1445", "apertus-closed"},
    /* AFM and Internist.ai as their cards describe them, in our own words */
    {"10120ea569a91f74d2b1b18009883381", "afm"},
    {"43e72e505d507b8f2315c8b22caaf997", "afm"},
    {"09c90d63b505515d5f2e1f08907f69e0", "alpaca"},
    /* SmolLM2-Instruct */
    {"53e74f3afc87c9b42dce7f9a38855579", "chatml"},
    /* Llama 3, with BOS as a word or a name, before or in the loop, a branch for each role */
    {"0626b720db747a8689a05a6085b04cc0", "llama3"},
    {"07e5a046de1f893063120e81b0610bfe", "llama3"},
    {"218a19acf41bd398942f63cae458a258", "llama3"},
    {"2c38e74d8e75fff804a85ca96942bb50", "llama3"},
    {"3e378e83e10291cc68521ede929c4ac1", "llama3"},
    {"49f1d9d46b94d036ed2110ec6d967d8d", "llama3"},
    {"517afbaf78e79f1510fe185ea5a1837f", "llama3"},
    {"576a4affe1e6b24b68a6a149366beb57", "llama3"},
    {"5a5fadf3a2202d96cea9e74f8e142c30", "llama3"},
    {"6056b70fd746f3c14b0d90dfbc997502", "llama3"},
    {"6664b034c3dce4a3300bf07889c7f311", "llama3"},
    {"6d62afdca06513f242bc79f97b90aafe", "llama3"},
    {"88a3b7943081d32f2c8bb57e6a1c363a", "llama3"},
    {"9a8ff656f43d3dc33bc143296c03df94", "llama3"},
    {"b2fb8f5dbf4175627565d072719f4ccf", "llama3"},
    {"b554bcfe0184c29442bc38a4d395bbbc", "llama3"},
    {"b6607d3f8fdac5e08113104131de9a56", "llama3"},
    {"bac464172f68c7840f2f07476af13a93", "llama3"},
    {"bce0492aa0b8a188698312ccb5b0d946", "llama3"},
    {"ce634ab8b4542c45b4e366efab49d538", "llama3"},
    {"d0fcb02ebb199eba83b01adfd868fb5e", "llama3"},
    {"daa072b04dc39274c8eea7278582c7e5", "llama3"},
    {"e42ec05642450c0174e4f8fec0c39df7", "llama3"},
    {"f0dbe575c79b10997f6a5ffe756d0fa9", "llama3"},
    {"fdab7342ad5c54eb4b4635e611e2bd11", "llama3"},
    {"fe47083f128d52f26ac60067495e879a", "llama3"},
    /* ChatML, its words in strings or as text, with <|im_end|> as a word or a name */
    {"0902f983be2e6c38d454414bc9d3db9d", "chatml-bare"},
    {"3eff1373c21e43c51367dceb2cc22656", "chatml-bare"},
    {"65d1b184081a0eef88bb1f5a40746e99", "chatml-bare"},
    {"aa276bd6c6bc858e32e0df2ae7135163", "chatml-bare"},
    {"b165180505a1cf4b6624d0051d5348d0", "chatml-bare"},
    {"a388bd5b1798e4a12650b0f0a940aeb1", "chatml-bare"},
    /* both in our own words, for the tests */
    {"fd30b3ebade99ce728fe9131c3777525", "llama2"},
    {"6bb4f36ddc3d46baa3170aa09727e002", "mistral"},
    /* Llama-2-Chat; Mistral-7B-Instruct now, v0.2 and v0.1 first */
    {"71dea92784bdb3e4e77d0dfe72a17afc", "llama2"},
    {"bc07a169603eafd25861936d5a04f87a", "llama2"},
    {"d0b6391c4c3f110e816837ca85cf2bd6", "llama2"},
    {"d4827aa89f5fae0b3a727f18bc119cbb", "llama2"},
    {"33f7f09ab6380a2dcef679c3c94ca1ee", "mistral"},
    {"ffdec3890e6115799672c19747561b55", "mistral-v0.2"},
    {"e37b03544174a0871d89274b87becffe", "mistral-v0.1"},
};

/* ---- Jinja's tokens ------------------------------------------------------------------------ */

typedef struct {
    const uint8_t *p;
    size_t n, at;
    buffer out, text;           /* text: what stands between two tags, comments aside          */
} jinja_reader;

/* The bytes of the white space at P, as Python sees it, or 0. */
static size_t jinja_space(const uint8_t *p, size_t n) {
    size_t len;
    if (!n) return 0;
    bool space = class_at(p, n, &len) == CLASS_SPACE || (p[0] >= 0x1C && p[0] < 0x20);
    return space ? len : 0;
}

static void jinja_item(buffer *out, const char *kind, const void *bytes, size_t n) {
    write_le(out, strlen(kind) + n, 4);
    buffer_text(out, kind);
    buffer_add(out, bytes, n);
}

/* Text before a tag that begins with MARK, whose next character is SIGN; LINE_START: the text
 * begins a line. A dash strips it, and a block or comment loses the blanks before it on its
 * line. */
static void jinja_text(jinja_reader *r, const uint8_t *p, size_t n, char mark, char sign,
                       bool line_start) {
    size_t line = n;
    if (sign == '-') {
        const char *text = (const char *)p;
        size_t left = n;
        trim(&text, &left);
        n = left ? (size_t)(text - (const char *)p) + left : 0;
    } else if (sign != '+' && mark != '{') {
        while (line && p[line - 1] != '\n') line--;
        size_t i = line;
        for (size_t len; i < n && (len = jinja_space(p + i, n - i)); i += len) {}
        if ((line || line_start) && i == n) n = line;
    }
    buffer_add(&r->text, p, n);
}

static void jinja_end_text(jinja_reader *r) {
    if (r->text.n) jinja_item(&r->out, "D", r->text.data, r->text.n);
    r->text.n = 0;
}

/* The end of a tag at r->at: CLOSE is its last two characters. A dash takes all white space after
 * it; blocks and comments take a line end. */
static bool jinja_close(jinja_reader *r, const char *close) {
    const uint8_t *p = r->p + r->at;
    size_t left = r->n - r->at, sign = left && (*p == '-' || (*p == '+' && *close != '}'));
    if (left < sign + 2 || memcmp(p + sign, close, 2)) return false;
    r->at += sign + 2;
    if (sign && *p == '-')
        for (size_t len; (len = jinja_space(r->p + r->at, r->n - r->at));) r->at += len;
    else if (!sign && *close != '}' && r->at < r->n && r->p[r->at] == '\n') r->at++;
    return true;
}

/* A string from its quote on; simple escapes are read. */
static bool jinja_string(jinja_reader *r) {
    static const char from[] = "nrt\\'\"\n", to[] = "\n\r\t\\'\"\n";
    buffer b = {0};
    uint8_t quote = r->p[r->at++];
    for (; r->at < r->n && r->p[r->at] != quote; r->at++) {
        const char *plain = NULL;
        if (r->p[r->at] == '\\' && r->at + 1 < r->n) {
            plain = r->p[r->at + 1] ? strchr(from, r->p[r->at + 1]) : NULL;
            if (plain) r->at++;
            else buffer_add(&b, r->p + r->at++, 1);
        }
        buffer_add(&b, plain ? (const void *)&to[plain - from] : r->p + r->at, 1);
    }
    jinja_item(&r->out, "S", b.data, b.n);
    r->out.failed |= b.failed;
    buffer_free(&b);
    return r->at++ < r->n;
}

/* message['role'] is message.role: no other meaning is possible for these two. */
static bool jinja_field(jinja_reader *r) {
    static const char *const spellings[] = {"['role']", "[\"role\"]", "['content']",
                                            "[\"content\"]"};
    for (size_t i = 0; i < 4; i++) {
        size_t n = strlen(spellings[i]);
        if (r->n - r->at < n || memcmp(r->p + r->at, spellings[i], n)) continue;
        jinja_item(&r->out, "T", ".", 1);
        jinja_item(&r->out, "T", spellings[i] + 2, n - 4);
        return r->at += n, true;
    }
    return false;
}

static bool is_jinja_word(uint8_t c) { return isalnum(c) || c == '_' || c >= 0x80; }

/* The tokens of a tag up to its end CLOSE, which does not count within brackets. */
static bool jinja_tag(jinja_reader *r, const char *close) {
    int depth = 0;
    while (r->at < r->n) {
        const uint8_t *p = r->p + r->at;
        size_t len = jinja_space(p, r->n - r->at);
        if (len) { r->at += len; continue; }
        if (!depth && jinja_close(r, close)) return true;
        if (*p == '"' || *p == '\'') {
            if (!jinja_string(r)) return false;
            continue;
        }
        if (*p == '[' && jinja_field(r)) continue;
        depth += (strchr("([{", *p) && *p) - (strchr(")]}", *p) && *p);
        bool word = is_jinja_word(*p), number = isdigit(*p);
        for (len = 1; word && r->at + len < r->n && is_jinja_word(p[len]) &&
                      (!number || isdigit(p[len])) &&
                      !jinja_space(p + len, r->n - r->at - len);) len++;
        jinja_item(&r->out, "T", p, len);
        r->at += len;
    }
    return false;
}

/* Reads to the end; false where the template is not understood. */
static bool jinja_read(jinja_reader *r) {
    bool line_start = true;
    while (r->at < r->n) {
        size_t from = r->at, at = from;
        while (at + 1 < r->n && !(r->p[at] == '{' && memchr("%{#", r->p[at + 1], 3))) at++;
        if (at + 1 >= r->n) { buffer_add(&r->text, r->p + from, r->n - from); break; }
        char mark = (char)r->p[at + 1], sign = at + 2 < r->n ? (char)r->p[at + 2] : 0;
        if (sign != '-' && sign != '+') sign = 0;
        jinja_text(r, r->p + from, at - from, mark, sign, line_start);
        r->at = at + 2 + (sign != 0);
        if (mark == '#') {
            while (r->at < r->n && !jinja_close(r, "#}")) r->at++;
        } else {
            jinja_end_text(r);
            jinja_item(&r->out, mark == '%' ? "{b" : "{v", NULL, 0);
            size_t tag = r->at;
            if (!jinja_tag(r, mark == '%' ? "%}" : "}}")) return false;
            while (jinja_space(r->p + tag, r->n - tag)) tag++;
            if (mark == '%' && r->n - tag > 3 && !memcmp(r->p + tag, "raw", 3)) return false;
            jinja_item(&r->out, "}", NULL, 0);
        }
        line_start = r->p[r->at - 1] == '\n';
    }
    jinja_end_text(r);
    return !r->out.failed && !r->text.failed;
}

/* SHA-256 of the tokens, or false. */
static bool fingerprint(const char *jinja, size_t n, uint8_t digest[32]) {
    buffer lines = {0};
    for (size_t i = 0; i < n; i++) {                    /* line ends become one character, and   */
        bool line = jinja[i] == '\r' || jinja[i] == '\n';               /* the last one goes     */
        i += jinja[i] == '\r' && i + 1 < n && jinja[i + 1] == '\n';
        buffer_add(&lines, line ? "\n" : jinja + i, 1);
    }
    if (lines.n && lines.data[lines.n - 1] == '\n') lines.n--;
    jinja_reader r = {.p = lines.data, .n = lines.n};
    bool good = !lines.failed && lines.n && jinja_read(&r);
    if (good) sha256_of(r.out.data, r.out.n, digest);
    buffer_free(&lines), buffer_free(&r.out), buffer_free(&r.text);
    return good;
}

/* Which of medrun's templates this is, or NULL: never a guess. */
static const chat_template *recognise_template(const char *jinja, size_t n) {
    uint8_t digest[32];
    char hex[65];
    if (!fingerprint(jinja, n, digest)) return NULL;
    hex_of(digest, hex);
    for (size_t i = 0; i < sizeof known_templates / sizeof *known_templates; i++)
        if (!memcmp(hex, known_templates[i].fingerprint, 32))
            return chat_find(known_templates[i].name);
    return NULL;
}

/* ---- template, stops, sampling ------------------------------------------------------------- */

/* The Jinja text: chat_template.jinja, or a field, or of several the one called default. */
static int read_jinja(source *s, const json_file *config, buffer *out, medrun_error *e) {
    const json *j = &config->j;
    if (file_exists(s->folder, "chat_template.jinja"))
        return read_text(s, "chat_template.jinja", out, e);
    uint32_t v = given(j, 0, "chat_template"), several = v;
    if (v == JSON_NONE) return MEDRUN_OK;
    if (json_is_type(j, several, JSON_ARRAY)) {
        for EACH(j, several, c)
            if (json_is(j, json_get(j, c, "name"), "default")) v = json_get(j, c, "template");
    }
    WANT(json_is_type(j, v, JSON_STRING), config, "chat_template", v,
         "a template; name one with --template");
    json_unescape(j, v, out);
    return out->failed ? out_of_memory(e, out->n) : MEDRUN_OK;
}

/* A template that writes bos_token or eos_token means the tokenizer's; the row of the table has a
 * name for it. Where they differ, it is another template. */
static bool names_agree(const source *s, const buffer *jinja, medrun_error *e) {
    tokenizer t;
    const char *const words[] = {"bos_token", "eos_token"};
    const char *const wanted[] = {s->chat->bos, s->chat->stops[0]};
    bool agree = true;
    if (tokenizer_open(&t, s->tokenizer.data, s->tokenizer.n, s->folder, e)) return false;
    const int32_t ids[] = {t.bos, s->eos};
    for (size_t i = 0; i < 2; i++) {
        bool used = false;
        size_t n = strlen(words[i]), length = 0;
        for (size_t at = 0; at + n <= jinja->n && !used; at++)
            used = !memcmp(jinja->data + at, words[i], n);
        const char *name = used && ids[i] >= 0 ? tokenizer_piece(&t, ids[i], &length) : "";
        if (used && wanted[i] && (length != strlen(wanted[i]) || memcmp(name, wanted[i], length)))
            agree = false;
    }
    tokenizer_close(&t);
    return agree;
}

/* NAME is what the user asked for, or NULL: then the template is recognised, or s->chat is NULL and
 * the checkpoint says so. */
static int choose_template(source *s, const buffer *jinja, const char *name, medrun_error *e) {
    s->chat = name ? chat_find(name) : NULL;
    if (name)
        return s->chat ? MEDRUN_OK : fail(e, MEDRUN_USAGE, "--template: found \"%s\", wanted one "
                                          "of %s", name, MEDRUN_TEMPLATES);
    if (jinja->n) s->chat = recognise_template((const char *)jinja->data, jinja->n);
    if (s->chat && !names_agree(s, jinja, e)) s->chat = NULL;
    if (e->code) return e->code;
    if (!jinja->n) s->chat = chat_find("none");
    if (!jinja->n)
        add_note(s, "there is no chat template: this model continues text; if it is made for "
                 "conversations, name theirs with --template");
    else if (!s->chat)
        add_note(s, "the chat template is none that medrun knows: run and chat will refuse this "
                 "checkpoint until --template names one, here or there (" MEDRUN_TEMPLATES "); "
                 "tools/reference/templates.py finds out whether one of them renders the same");
    return MEDRUN_OK;
}

/* The union of all that says when an answer ends, the template's own stops included; Med42's files
 * name only one of its two. */
static int finish_stops(source *s, medrun_error *e) {
    tokenizer t;
    if (s->eos >= 0 && add_stop(s, s->folder, s->eos, e)) return e->code;
    if (!s->chat || tokenizer_open(&t, s->tokenizer.data, s->tokenizer.n, s->folder, e))
        return e->code;
    for (size_t i = 0; !e->code && i < 4; i++) {
        int32_t id = chat_token(&t, s->chat->stops[i]);
        if (id >= 0) add_stop(s, s->folder, id, e);
    }
    tokenizer_close(&t);
    return e->code;
}

/* What the cards say of the models with these templates; what a card leaves open is transformers'
 * default. */
static const struct { const char *name; source_sampling sampling; } card_sampling[] = {
    {"llama3", {.temperature = 0.4, .top_k = 150, .top_p = 0.75, .repeat_penalty = 1}},
    {"llama3.1", {.temperature = 0.6, .top_k = 50, .top_p = 0.9, .repeat_penalty = 1}},
    {"afm", {.temperature = 0.5, .top_k = 50, .top_p = 0.95, .repeat_penalty = 1.1}},
    {"apertus", {.temperature = 0.8, .top_k = 50, .top_p = 0.9, .repeat_penalty = 1}},
    {"alpaca", {.temperature = 1, .top_k = 50, .top_p = 1, .repeat_penalty = 1}},
};

/* Takes the card's values where the model's own files say nothing about sampling. */
static void finish_sampling(source *s) {
    for (size_t i = 0; s->chat && i < sizeof card_sampling / sizeof *card_sampling; i++) {
        const source_sampling *p = &card_sampling[i].sampling;
        size_t n = strlen(card_sampling[i].name), dash = n;
        if (s->sampling.given || strncmp(s->chat->name, card_sampling[i].name, n) ||
            (s->chat->name[dash] && s->chat->name[dash] != '-')) continue;
        s->sampling = *p;
        add_note(s, "the files say nothing about sampling: temperature %g, top_k %lld, top_p %g, "
                 "repeat_penalty %g from the card of the models with template %s", p->temperature,
                 (long long)p->top_k, p->top_p, p->repeat_penalty, s->chat->name);
    }
}

/* ---- licence ------------------------------------------------------------------------------- */

/* Copies the value of KEY in TEXT's front matter (between lines of ---), else makes OUT empty. */
static void front_matter(const char *text, const char *key, char *out, size_t cap) {
    size_t n = strlen(key);
    out[0] = 0;
    if (strncmp(text, "---\n", 4) && strncmp(text, "---\r\n", 5)) return;
    while ((text = strchr(text, '\n')) && strncmp(++text, "---", 3)) {
        if (strncmp(text, key, n) || text[n] != ':') continue;
        const char *from = text + n + 1, *end = text + strcspn(text, "\r\n");
        while (from < end && strchr(" \t\"'", *from)) from++;
        while (end > from && strchr(" \t\"'", end[-1])) end--;
        if ((size_t)(end - from) < cap) snprintf(out, cap, "%.*s", (int)(end - from), from);
    }
}

/* The licence's name in the model card, if there is one that can be read; Hugging Face writes
 * "other" and a license_name. */
static void read_licence(source *s) {
    buffer b = {0};
    char name[sizeof s->licence];
    if (!read_text(s, "README.md", &b, &(medrun_error){0})) {
        front_matter((const char *)b.data, "license", s->licence, sizeof s->licence);
        front_matter((const char *)b.data, "license_name", name, sizeof name);
        if (!strcmp(s->licence, "other") && name[0]) memcpy(s->licence, name, sizeof name);
    }
    buffer_free(&b);
}
