/* serve_http.c: medrun-serve's HTTP/1.1: requests with strict limits, connections, one thread that
 * polls them all. Included by serve.c. MIT licence, see LICENSE. */

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

/* ---- one request, as bytes ------------------------------------------------------------------ */

enum {
    MAX_LINE = 2048, MAX_HEAD = 16384, MAX_HEADERS = 64,
    MAX_CONNECTIONS = 256, MAX_PER_ADDRESS = 16,
    SECONDS_HEAD = 10, SECONDS_BODY = 30, SECONDS_IDLE = 60, SECONDS_STUCK = 30,
    SECONDS_PING = 15, SECONDS_LINGER = 2,
};

static bool span_is(span s, const char *text) {
    return s.n == strlen(text) && !memcmp(s.text, text, s.n);
}

static bool span_is_nocase(span s, const char *text) {
    return s.n == strlen(text) && !strncasecmp(s.text, text, s.n);
}

/* What a request says before its body; spans point into the bytes that were read. */
typedef struct {
    span method, path, query, host, origin, site, type, key;
    bool old, close, expect, has_length, wants_chunks;  /* OLD: HTTP/1.0                        */
    uint64_t length;
    const char *wrong;              /* why it is refused                                        */
} http_request;

/* A token of RFC 9110, as methods and names of headers are. */
static bool is_http_token(span s) {
    for (size_t i = 0; i < s.n; i++)
        if (!isalnum((uint8_t)s.text[i]) && !strchr("!#$%&'*+-.^_`|~", s.text[i])) return false;
    return s.n > 0 && !memchr(s.text, 0, s.n);
}

static int http_wrong(http_request *r, int status, const char *why) {
    r->wrong = why;
    return -status;
}

/* METHOD SP TARGET SP HTTP/1.x */
static int http_line(http_request *r, span line) {
    const char *end = line.text + line.n;
    const char *a = memchr(line.text, ' ', line.n);
    const char *b = a ? memchr(a + 1, ' ', (size_t)(end - a - 1)) : NULL;
    if (!b) return http_wrong(r, 400, "the request line is not METHOD PATH HTTP/1.1");
    span version = {b + 1, (size_t)(end - b - 1)};
    r->method = (span){line.text, (size_t)(a - line.text)};
    r->path = (span){a + 1, (size_t)(b - a - 1)};
    r->old = span_is(version, "HTTP/1.0");
    if (!r->old && !span_is(version, "HTTP/1.1"))
        return http_wrong(r, 400, "the version is not HTTP/1.1 or HTTP/1.0");
    if (!is_http_token(r->method) || !r->path.n || r->path.text[0] != '/')
        return http_wrong(r, 400, "the request line is not METHOD /PATH HTTP/1.1");
    for (size_t i = 0; i < r->path.n; i++)
        if ((uint8_t)r->path.text[i] <= ' ' || (uint8_t)r->path.text[i] >= 0x7F)
            return http_wrong(r, 400, "the path holds a byte that must be escaped");
    const char *mark = memchr(r->path.text, '?', r->path.n);
    if (mark) {
        r->query = (span){mark + 1, r->path.n - (size_t)(mark + 1 - r->path.text)};
        r->path.n = (size_t)(mark - r->path.text);
    }
    return 0;
}

/* Content-Length: digits only, once. */
static int http_length(http_request *r, span v) {
    if (r->has_length) return http_wrong(r, 400, "Content-Length stands twice");
    if (!v.n || v.n > 15) return http_wrong(r, v.n ? 413 : 400, "Content-Length is no number");
    for (size_t i = 0; i < v.n; i++) {
        if (!isdigit((uint8_t)v.text[i])) return http_wrong(r, 400, "Content-Length is no number");
        r->length = r->length * 10 + (uint64_t)(v.text[i] - '0');
    }
    r->has_length = true;
    return 0;
}

/* One header. Which of them count stands here; of those that must not stand twice, none may. */
static int http_header(http_request *r, span line) {
    struct { const char *name; span *to; } const kept[] = {
        {"host", &r->host}, {"origin", &r->origin}, {"sec-fetch-site", &r->site},
        {"content-type", &r->type}, {"authorization", &r->key}};
    const char *colon = memchr(line.text, ':', line.n);
    if (line.text[0] == ' ' || line.text[0] == '\t')
        return http_wrong(r, 400, "a header goes over two lines");
    span name = {line.text, colon ? (size_t)(colon - line.text) : 0};
    if (!is_http_token(name)) return http_wrong(r, 400, "a header is not NAME: VALUE");
    span v = {colon + 1, line.n - name.n - 1};
    while (v.n && strchr(" \t", v.text[0])) v.text++, v.n--;
    while (v.n && strchr(" \t", v.text[v.n - 1])) v.n--;
    for (size_t i = 0; i < v.n; i++)
        if ((uint8_t)v.text[i] < ' ' && v.text[i] != '\t')
            return http_wrong(r, 400, "a header holds a control character");
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) {
        if (!span_is_nocase(name, kept[i].name)) continue;
        if (kept[i].to->text) return http_wrong(r, 400, "a header that counts stands twice");
        *kept[i].to = v;
    }
    if (span_is_nocase(name, "content-length")) return http_length(r, v);
    if (span_is_nocase(name, "transfer-encoding")) r->wants_chunks = true;
    if (span_is_nocase(name, "expect")) {
        if (!span_is_nocase(v, "100-continue")) return http_wrong(r, 417, "unknown Expect");
        r->expect = true;
    }
    if (span_is_nocase(name, "connection")) {
        if (span_is_nocase(v, "close")) r->close = true;
        if (r->old && span_is_nocase(v, "keep-alive")) r->old = false;  /* it knows how          */
    }
    return 0;
}

/* Reads the head of a request, everything before its body, from N bytes: its length; 0 while more
 * must come; or minus the status with which it is refused. */
static int http_head(http_request *r, const char *data, size_t n) {
    *r = (http_request){0};
    size_t at = 0, lines = 0;
    for (;; lines++) {
        const char *end = memchr(data + at, '\n', n - at);
        size_t most = lines ? MAX_HEAD : MAX_LINE, len = end ? (size_t)(end - data) - at : n - at;
        if ((lines ? at + len : len) > most)
            return http_wrong(r, 431, lines ? "the headers are longer than 16 KiB"
                                            : "the request line is longer than 2 KiB");
        if (memchr(data + at, 0, len)) return http_wrong(r, 400, "a NUL in the headers");
        const char *bare = memchr(data + at, '\r', len);
        if (bare && bare + 1 < data + at + len)
            return http_wrong(r, 400, "a line of the headers ends with CR alone");
        if (!end) return 0;
        if (!bare) return http_wrong(r, 400, "a line of the headers ends with LF alone");
        span line = {data + at, len - 1};
        at += len + 1;
        if (lines && !line.n) break;
        if (lines > MAX_HEADERS) return http_wrong(r, 431, "more than 64 headers");
        int code = lines ? http_header(r, line) : http_line(r, line);
        if (code) return code;
    }
    if (r->wants_chunks && r->has_length)
        return http_wrong(r, 400, "both Content-Length and Transfer-Encoding");
    if (r->wants_chunks)
        return http_wrong(r, 411, "a body in chunks: send it with a Content-Length");
    if (!r->host.n) return http_wrong(r, 400, "the header Host is missing");
    return (int)at;
}

/* ---- who may ask ---------------------------------------------------------------------------- */

/* HOST without its port and brackets. */
static span host_name(span host) {
    if (host.n && host.text[0] == '[') {
        const char *end = memchr(host.text, ']', host.n);
        return end ? (span){host.text + 1, (size_t)(end - host.text) - 1} : (span){host.text, 0};
    }
    const char *colon = memchr(host.text, ':', host.n);
    return colon ? (span){host.text, (size_t)(colon - host.text)} : host;
}

/* The address behind FD's own end as text; "" for a unix socket. */
static void own_address(int fd, char text[64]) {
    struct sockaddr_storage a = {0};
    socklen_t n = sizeof a;
    text[0] = 0;
    if (getsockname(fd, (struct sockaddr *)&a, &n)) return;
    if (a.ss_family == AF_INET)
        inet_ntop(AF_INET, &((struct sockaddr_in *)(void *)&a)->sin_addr, text, 64);
    if (a.ss_family == AF_INET6)
        inet_ntop(AF_INET6, &((struct sockaddr_in6 *)(void *)&a)->sin6_addr, text, 64);
    if (!strncmp(text, "::ffff:", 7)) memmove(text, text + 7, strlen(text + 7) + 1);
}

/* A web page under a name of its own that leads to this machine (DNS rebinding) says that name. */
static bool host_is_ours(const server *sv, int fd, span host) {
    char address[64];
    span name = host_name(host);
    if (span_is_nocase(name, "localhost") || span_is(name, "127.0.0.1") || span_is(name, "::1"))
        return true;
    for (size_t i = 0; i < sv->n_hosts; i++) if (span_is_nocase(name, sv->hosts[i])) return true;
    own_address(fd, address);
    return address[0] && span_is_nocase(name, address);
}

/* http://HOST, or one that was allowed. */
static bool origin_is_ours(const server *sv, span origin, span host) {
    for (size_t i = 0; i < sv->n_origins; i++) if (span_is(origin, sv->origins[i])) return true;
    for (int tls = 0; tls < 2; tls++) {         /* a proxy may speak TLS before us               */
        const char *scheme = tls ? "https://" : "http://";
        size_t n = strlen(scheme);
        if (origin.n == n + host.n && !strncasecmp(origin.text, scheme, n) &&
            !strncasecmp(origin.text + n, host.text, host.n)) return true;
    }
    return false;
}

/* The key that TEXT, an Authorization header, shows, or NULL. Digests of all keys are compared to
 * their end, so that the time says nothing. */
static const api_key *find_key(const server *sv, span text) {
    const api_key *found = NULL;
    uint8_t digest[32];
    if (text.n < 8 || strncasecmp(text.text, "Bearer ", 7)) return NULL;
    sha256_of(text.text + 7, text.n - 7, digest);
    for (size_t i = 0; i < sv->n_keys; i++) {
        unsigned differs = 0;
        for (int k = 0; k < 32; k++) differs |= (unsigned)(digest[k] ^ sv->keys[i].digest[k]);
        if (!differs) found = &sv->keys[i];
    }
    return found;
}

/* ---- connections ---------------------------------------------------------------------------- */

enum { READ_HEAD, READ_BODY, WORKING, LINGERING };

struct connection {
    int fd, state;
    double since, deadline, written;    /* of this state; when bytes last went out              */
    buffer in, out;                     /* what came; what is to go, from `gone` on             */
    size_t gone, head;                  /* HEAD: bytes of the request's head in `in`            */
    http_request request;
    bool close, streams, chunked;       /* after this answer; the answer comes in parts         */
    job *job;                           /* whose answer is awaited, or NULL                     */
    uint8_t address[16];
    bool local;
};

typedef struct { int status; const char *text, *type; } status_row;

/* The last one is that of every other status. */
static const status_row statuses[] = {
    {200, "OK", NULL}, {204, "No Content", NULL}, {400, "Bad Request", NULL},
    {401, "Unauthorized", "authentication_error"}, {403, "Forbidden", "permission_error"},
    {404, "Not Found", "not_found_error"}, {405, "Method Not Allowed", NULL},
    {408, "Request Timeout", NULL}, {411, "Length Required", NULL},
    {413, "Content Too Large", NULL}, {415, "Unsupported Media Type", NULL},
    {417, "Expectation Failed", NULL}, {421, "Misdirected Request", "permission_error"},
    {429, "Too Many Requests", "rate_limit_error"}, {431, "Request Header Fields Too Large", NULL},
    {501, "Not Implemented", "not_supported_error"},
    {503, "Service Unavailable", "unavailable_error"},
    {500, "Internal Server Error", "server_error"}};

/* STATUS in words, and the type of its errors. */
static status_row status_row_of(int status) {
    const status_row *r = statuses;
    while (r->status != status && r->status != 500) r++;
    return (status_row){status, r->text, r->type ? r->type : "invalid_request_error"};
}

/* Writes the head of an answer; LENGTH SIZE_MAX: its length is not known yet. MORE are headers that
 * end with CRLF, or "". */
static void answer_head(const server *sv, connection *c, int status, const char *type,
                        const char *more, size_t length) {
    const http_request *r = &c->request;
    buffer *b = &c->out;
    c->streams = length == SIZE_MAX;
    c->chunked = c->streams && !r->old;
    c->close |= r->close || r->old;
    buffer_printf(b, "HTTP/1.1 %d %s\r\nContent-Type: %s\r\n", status, status_row_of(status).text,
                  type);
    buffer_text(b, "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n");
    if (status >= 400 && status < 500 && status != 429)
        buffer_text(b, "x-should-retry: false\r\n");
    if (status == 503 || status == 429) buffer_text(b, "Retry-After: 2\r\n");
    if (c->streams) buffer_text(b, "X-Accel-Buffering: no\r\n");
    for (size_t i = 0; r->origin.n && i < sv->n_origins; i++)
        if (span_is(r->origin, sv->origins[i]))
            buffer_printf(b, "Access-Control-Allow-Origin: %s\r\nVary: Origin\r\n"
                          "Access-Control-Allow-Headers: authorization, content-type\r\n"
                          "Access-Control-Allow-Methods: GET, POST\r\n", sv->origins[i]);
    buffer_text(b, more);
    if (c->chunked) buffer_text(b, "Transfer-Encoding: chunked\r\n");
    if (!c->streams) buffer_printf(b, "Content-Length: %zu\r\n", length);
    buffer_printf(b, "Connection: %s\r\n\r\n", c->close ? "close" : "keep-alive");
}

/* A whole answer. */
static void answer(const server *sv, connection *c, int status, const char *type, const char *more,
                   const buffer *body) {
    c->written = seconds();
    answer_head(sv, c, status, type, more, body->n);
    if (!span_is(c->request.method, "HEAD")) buffer_add(&c->out, body->data, body->n);
    if (body->failed || c->out.failed) c->close = true;
}

/* A part of a streamed answer. */
static void answer_part(connection *c, const void *bytes, size_t n) {
    if (!n) return;
    if (c->chunked) buffer_printf(&c->out, "%zx\r\n", n);
    buffer_add(&c->out, bytes, n);
    if (c->chunked) buffer_text(&c->out, "\r\n");
}

/* Sends what it can. False: the client is gone. */
static bool send_out(connection *c) {
    while (c->gone < c->out.n) {
        ssize_t n = send(c->fd, c->out.data + c->gone, c->out.n - c->gone, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
        c->gone += (size_t)n;
        c->written = seconds();
    }
    wipe(c->out.data, c->out.n);
    c->out.n = c->gone = 0;
    return true;
}

static void drop_connection(server *sv, connection *c) {
    if (c->job) cancel_job(sv, c->job);
    close(c->fd);
    buffer_free(&c->in);
    buffer_free(&c->out);
    *c = (connection){.fd = -1};
}

static void set_state(connection *c, int state, double time) {
    c->state = state;
    c->since = seconds();
    c->deadline = c->since + time;
}

/* After an answer: the next request may already be in `in`. */
static void next_request(connection *c) {
    size_t used = c->head + (size_t)c->request.length;
    if (used > c->in.n) used = c->in.n;
    size_t left = c->in.n - used;
    memmove(c->in.data, c->in.data + used, left);
    wipe(c->in.data + left, used);
    c->in.n = left;
    c->head = 0;
    c->request = (http_request){0};
    c->streams = c->chunked = false;
    set_state(c, READ_HEAD, left ? SECONDS_HEAD : SECONDS_IDLE);
}

/* An answer is on its way out: what comes behind it? */
static void end_answer(connection *c) {
    if (c->out.failed) c->close = true;
    if (!c->close) { next_request(c); return; }
    shutdown(c->fd, SHUT_WR);           /* closing at once could take the answer back            */
    set_state(c, LINGERING, SECONDS_LINGER);
}

/* Refuses a request that cannot be read further. */
static void refuse(server *sv, connection *c, int status, const char *why) {
    c->close = true;
    c->request.length = 0;
    answer_error(sv, c, status, why);
    set_state(c, WORKING, 1e9);
}

/* A request's head is there: may it go on? */
static void check_head_of(server *sv, connection *c) {
    http_request *r = &c->request;
    if (r->length > sv->max_body) refuse(sv, c, 413, "the body is longer than --max-body");
    else if (!r->has_length && span_is(r->method, "POST"))
        refuse(sv, c, 411, "a POST needs a Content-Length");
    else if (!buffer_room(&c->in, (size_t)r->length)) refuse(sv, c, 503, "no memory for the body");
    else {
        http_head(r, (const char *)c->in.data, c->in.n);    /* once more: `in` may have moved    */
        if (r->expect && c->in.n < c->head + r->length)
            buffer_text(&c->out, "HTTP/1.1 100 Continue\r\n\r\n");
        set_state(c, READ_BODY, SECONDS_BODY);
    }
}

/* Does what can be done with the bytes that are there. */
static void read_request(server *sv, connection *c) {
    if (c->state == READ_HEAD && c->in.n) {
        int n = http_head(&c->request, (const char *)c->in.data, c->in.n);
        if (n > 0) {
            c->head = (size_t)n;
            check_head_of(sv, c);
        } else if (n < 0) refuse(sv, c, -n, c->request.wrong);
        else if (c->deadline > c->since + SECONDS_HEAD) set_state(c, READ_HEAD, SECONDS_HEAD);
    }
    if (c->state == READ_BODY && c->in.n >= c->head + c->request.length) {
        set_state(c, WORKING, 1e9);
        c->written = c->since;
        take_request(sv, c, (span){(char *)c->in.data + c->head, (size_t)c->request.length});
    }
}

/* Reads what came; while an answer is made, a client may send the next request, up to a limit. */
static bool receive(server *sv, connection *c) {
    uint8_t bytes[16384];
    for (;;) {
        size_t most = c->state == READ_BODY ? c->head + c->request.length - c->in.n : sizeof bytes;
        if (c->state == WORKING && c->in.n > c->head + c->request.length + MAX_HEAD) return true;
        if (most > sizeof bytes) most = sizeof bytes;
        ssize_t n = recv(c->fd, bytes, most, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
        if (n == 0) return false;
        if (c->state == LINGERING) continue;
        buffer_add(&c->in, bytes, (size_t)n);
        wipe(bytes, (size_t)n);
        if (c->in.failed) return false;
        read_request(sv, c);
    }
}

/* Takes what the engine has written for this connection's job, and goes on when it is done. */
static void pump(server *sv, connection *c) {
    job *j = c->job;
    if (j && c->out.n == 0) {
        buffer part = {0};
        bool done;
        pthread_mutex_lock(&sv->lock);
        if (c->streams || j->done) {
            part = j->out;
            j->out = (buffer){0};
        }
        done = j->done;
        if (j->stalled && part.n) {
            j->stalled = false;
            sv->poked = true;
            pthread_cond_signal(&sv->work);
        }
        pthread_mutex_unlock(&sv->lock);
        if (!c->streams && done) answer(sv, c, j->status, JSON_TYPE, chars_of(&j->headers), &part);
        else answer_part(c, part.data, part.n);
        if (part.failed) c->close = true;
        buffer_free(&part);
        if (done) {
            if (c->chunked && !j->broken) buffer_text(&c->out, "0\r\n\r\n");
            if (j->broken) c->close = true;
            c->job = NULL;
            end_job(sv, j);
        }
    }
    if (j && c->job && c->streams && !c->out.n && seconds() - c->written > SECONDS_PING) {
        answer_part(c, ": ping\n\n", 8);
        c->written = seconds();
    }
    if (!send_out(c)) { drop_connection(sv, c); return; }
    if (c->state == WORKING && !c->job && !c->out.n) end_answer(c);
    if (c->state == READ_HEAD && c->in.n) read_request(sv, c);
}

/* What is late goes: whoever does not send, or does not read. A request that is computed has no
 * deadline. */
static void check_deadline(server *sv, connection *c, double now) {
    if (c->state == WORKING) {
        if (c->out.n && now - c->written > SECONDS_STUCK) drop_connection(sv, c);
        return;
    }
    if (now < c->deadline) return;
    if (c->state == LINGERING || (c->state == READ_HEAD && !c->in.n)) drop_connection(sv, c);
    else refuse(sv, c, 408, "the request did not come in time");
}

/* ---- listening ------------------------------------------------------------------------------ */

/* Room for one more: if there is none, the one that has been silent for the longest goes. */
static connection *free_connection(server *sv) {
    connection *oldest = NULL;
    for (connection *c = sv->connections; c < sv->connections + MAX_CONNECTIONS; c++) {
        if (c->fd < 0) return c;
        if (c->state != WORKING && (!oldest || c->since < oldest->since)) oldest = c;
    }
    if (oldest) drop_connection(sv, oldest);
    return oldest;
}

static void take_address(connection *c, const struct sockaddr_storage *a) {
    const uint8_t *v4 = a->ss_family == AF_INET
        ? (const uint8_t *)&((const struct sockaddr_in *)(const void *)a)->sin_addr : NULL;
    memset(c->address, 0, sizeof c->address);
    if (v4) memcpy(c->address, v4, 4);
    else if (a->ss_family == AF_INET6)
        memcpy(c->address, &((const struct sockaddr_in6 *)(const void *)a)->sin6_addr, 16);
    static const uint8_t loop6[16] = {[15] = 1};
    c->local = (v4 && v4[0] == 127) || (a->ss_family != AF_INET && a->ss_family != AF_INET6) ||
               (!v4 && !memcmp(c->address, loop6, 16));
}

/* Connections from this machine (a proxy's, too) share one address and are not counted by it. */
static bool too_many(const server *sv, const connection *from) {
    int n = 0;
    for (const connection *c = sv->connections; c < sv->connections + MAX_CONNECTIONS; c++)
        n += c->fd >= 0 && !c->local && !memcmp(c->address, from->address, 16);
    return !from->local && n >= MAX_PER_ADDRESS;
}

static void accept_all(server *sv) {
    for (;;) {
        struct sockaddr_storage a = {0};
        socklen_t n = sizeof a;
        int one = 1, fd = accept(sv->listener, (struct sockaddr *)&a, &n);
        if (fd < 0) return;
        connection made = {.fd = fd};
        take_address(&made, &a);
        fcntl(fd, F_SETFL, O_NONBLOCK);
        fcntl(fd, F_SETFD, FD_CLOEXEC);
        if (a.ss_family != AF_UNIX) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        connection *c = too_many(sv, &made) ? NULL : free_connection(sv);
        if (!c) { close(fd); continue; }
        *c = made;
        set_state(c, READ_HEAD, SECONDS_HEAD);
    }
}

/* One turn of the I/O thread's loop. */
static void poll_once(server *sv) {
    struct pollfd fds[MAX_CONNECTIONS + 2];
    connection *of[MAX_CONNECTIONS + 2];
    nfds_t n = 0;
    fds[n++] = (struct pollfd){.fd = sv->wake[0], .events = POLLIN};
    fds[n++] = (struct pollfd){.fd = sv->draining ? -1 : sv->listener, .events = POLLIN};
    for (connection *c = sv->connections; c < sv->connections + MAX_CONNECTIONS; c++) {
        if (c->fd < 0) continue;
        bool full = c->state == WORKING && c->in.n > c->head + c->request.length + MAX_HEAD;
        of[n] = c;
        fds[n++] = (struct pollfd){.fd = c->fd, .events = (short)((full ? 0 : POLLIN) |
                                                                 (c->out.n ? POLLOUT : 0))};
    }
    if (poll(fds, n, 250) < 0 && errno != EINTR) return;
    if (fds[0].revents) {
        char bytes[64];
        while (read(sv->wake[0], bytes, sizeof bytes) > 0) continue;
    }
    for (nfds_t i = 2; i < n; i++) {
        connection *c = of[i];
        if (c->fd != fds[i].fd) continue;
        bool gone = (fds[i].revents & (POLLERR | POLLNVAL)) ||
                    ((fds[i].revents & POLLHUP) && !(fds[i].revents & POLLIN));
        if (!gone && fds[i].revents & POLLIN) gone = !receive(sv, c);
        if (gone) drop_connection(sv, c);
    }
    double now = seconds();
    for (connection *c = sv->connections; c < sv->connections + MAX_CONNECTIONS; c++) {
        if (c->fd >= 0) pump(sv, c);
        if (c->fd >= 0) check_deadline(sv, c, now);
    }
    if (fds[1].revents) accept_all(sv);
}

/* HOST is an address, a name of this machine, or the path of a unix socket. */
static int listen_unix(const char *path, medrun_error *e) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    struct stat st;
    if (strlen(path) >= sizeof a.sun_path)
        return fail(e, MEDRUN_USAGE, "%s: a socket's path may have %zu bytes", path,
                    sizeof a.sun_path - 1), -1;
    memcpy(a.sun_path, path, strlen(path) + 1);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd >= 0 && !lstat(path, &st)) {         /* of a server that has ended                    */
        bool dead = S_ISSOCK(st.st_mode) && connect(fd, (struct sockaddr *)&a, sizeof a) &&
                    errno == ECONNREFUSED;
        if (!dead) {
            close(fd);
            return fail(e, MEDRUN_USAGE, "%s exists and is not a socket that nobody uses", path),
                   -1;
        }
        unlink(path);
    }
    mode_t mask = umask(0177);
    int failed = fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 128);
    umask(mask);
    if (failed) return cannot(e, MEDRUN_FAILED, path, "listen"), -1;
    return fd;
}

/* *LOCAL: nobody but this machine can reach it. */
static int listen_on(const char *host, int port, bool *local, medrun_error *e) {
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
    size_t n = strlen(host);
    *local = true;
    if (n > 5 && !strcmp(host + n - 5, ".sock")) return listen_unix(host, e);
    if (!strcmp(host, "localhost")) host = "127.0.0.1";
    bool is4 = inet_pton(AF_INET, host, &v4.sin_addr) == 1;
    if (!is4 && inet_pton(AF_INET6, host, &v6.sin6_addr) != 1)
        return fail(e, MEDRUN_USAGE, "--host: found \"%s\", wanted an address such as 127.0.0.1, "
                    "or a path that ends with .sock", host), -1;
    *local = is4 ? ntohl(v4.sin_addr.s_addr) >> 24 == 127 : IN6_IS_ADDR_LOOPBACK(&v6.sin6_addr);
    int one = 1, fd = socket(is4 ? AF_INET : AF_INET6, SOCK_STREAM, 0);
    const struct sockaddr *a = is4 ? (struct sockaddr *)&v4 : (struct sockaddr *)&v6;
    if (fd >= 0) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (fd < 0 || bind(fd, a, is4 ? sizeof v4 : sizeof v6) || listen(fd, 128)) {
        fail(e, errno_code(MEDRUN_FAILED), "cannot listen on %s port %d: %s", host, port,
             strerror(errno));
        if (fd >= 0) close(fd);
        return -1;
    }
    return fd;
}
