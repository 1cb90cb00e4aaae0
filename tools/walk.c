/* Walking over JSON. A tool includes this file after medrun.c. MIT licence, see LICENSE. */
#ifndef MEDRUN_WALK             /* programs of several parts may include it twice               */
#define MEDRUN_WALK

__attribute__((unused)) static uint32_t children(const json *j, uint32_t v) {
    bool container = json_is_type(j, v, JSON_ARRAY) || json_is_type(j, v, JSON_OBJECT);
    return container ? j->nodes[v].count : 0;
}

/* for EACH(j, v, c): the items C of an array. for EACH_KEY(j, v, c): the keys C of an object, whose
 * values are C + 1. Nothing where V is none or no container. */
#define EACH(j, v, c) (uint32_t c = (v) + 1, left_##c = children(j, v); left_##c; \
                       left_##c--, c = (j)->nodes[c].next)
#define EACH_KEY(j, v, c) (uint32_t c = (v) + 1, left_##c = children(j, v); left_##c; \
                           left_##c -= 2, c = (j)->nodes[c + 1].next)
#endif
