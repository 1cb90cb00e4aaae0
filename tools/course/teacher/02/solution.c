/* Lesson 2, solved. */
#include "course.h"

static size_t write_header(const char *role, int32_t *ids) {
    size_t at = 0;
    ids[at++] = demo_control("<|start_header_id|>");
    at += demo_tokens(role, false, ids + at);
    ids[at++] = demo_control("<|end_header_id|>");
    at += demo_tokens("\n\n", false, ids + at);
    return at;
}

size_t write_chat(const turn *turns, size_t n, int32_t *ids) {
    size_t at = 0;
    ids[at++] = demo_control("<|begin_of_text|>");
    for (size_t i = 0; i < n; i++) {
        at += write_header(turns[i].role, ids + at);
        at += demo_tokens(turns[i].text, false, ids + at);
        ids[at++] = demo_control("<|eot_id|>");
    }
    at += write_header("assistant", ids + at);
    return at;
}
