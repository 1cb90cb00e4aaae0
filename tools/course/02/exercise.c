/* Lesson 2: a chat is one text with control tokens.
 *
 * The model sees one row of ids. The demo model's chat looks like this, each <|...|> one control
 * token, the rest plain text; here "\n\n" are two line ends:
 *
 *     <|begin_of_text|>
 *     <|start_header_id|>user<|end_header_id|>\n\nWhat is gout?<|eot_id|>
 *     <|start_header_id|>assistant<|end_header_id|>\n\n
 *
 * (without the line breaks shown here). The first token comes once. Each turn is one line like the
 * second. The last line opens the answer. demo_control gives the id of a control token, and
 * demo_tokens those of text: read what its argument TRUST does.
 *
 * Read in medrun.c: section 11, chat_render. Check: make 2 */
#include "course.h"

size_t write_chat(const turn *turns, size_t n, int32_t *ids) {
    size_t at = 0;
    ids[at++] = demo_control("<|begin_of_text|>");
    for (size_t i = 0; i < n; i++) {
        /* TODO: the header with turns[i].role, two line ends, turns[i].text, the end of the turn */
        (void)turns;
    }
    /* TODO: the opening of the answer */
    return at;
}
