/* What the machine can do at most: a part of tools/kernels.h. MIT licence, see LICENSE. */

#define peak K(peak)
#define read_all K(read_all)

/* As many chains as a tile has, each with weights of its own; the other factor changes, lest the
 * compiler find a shorter way. */
static size_t peak(int kind, size_t rounds, float *sink) {
    enum { CHAINS = TILE_PANELS * TILE_TOKENS };
    uint8_t bytes[2 * STEP_BYTES + 8 * CHAINS] = {1, 2, 3};
    __asm__("" : : "r"(bytes) : "memory");
    wvec w[TILE_PANELS];
    ivec dot[CHAINS];
    vec sum[CHAINS], total = vsplat(0);
    UNROLLED for (size_t i = 0; i < TILE_PANELS; i++) w[i] = wload(bytes + 4 * i);
    UNROLLED for (size_t i = 0; i < CHAINS; i++)
        dot[i] = isplat((int32_t)i), sum[i] = vsplat((float)i);
#ifdef OWN_READY
    for (size_t n = 0; kind == INT_PACK && n < rounds; n++)
        UNROLLED for (size_t i = 0; i < CHAINS; i += 2)
            K(two_tokens)(false, &dot[i], &dot[i + 1], w[0], w[0], vld1q_u8(bytes + n % 8 * 4));
    for (size_t n = 0; kind == PACK_BF16 && n < rounds; n++)
        UNROLLED for (size_t i = 0; i < CHAINS; i += 2)
            K(two_tokens)(true, &dot[i], &dot[i + 1], w[0], w[0], vld1q_u8(bytes + n % 8 * 4));
#else
    for (size_t n = 0; kind == INT_PACK && n < rounds; n++)
        UNROLLED for (size_t i = 0; i < CHAINS; i++)
            dot[i] = idot4(dot[i], bready(w[i % TILE_PANELS]),
                           xload(bytes + n % 8 * 4, i / TILE_PANELS, TILE_TOKENS, TILE_TOKENS));
#ifdef BF16_NAME
    for (size_t n = 0; kind == PACK_BF16 && n < rounds; n++)
        UNROLLED for (size_t i = 0; i < CHAINS; i++)
            sum[i] = vdot2(sum[i], w[i % TILE_PANELS],
                           xload(bytes + n % 8 * 4, i / TILE_PANELS, TILE_TOKENS, TILE_TOKENS));
#endif
#endif
    for (size_t n = 0; kind == PACK_F32 && n < rounds; n++)
        UNROLLED for (size_t i = 0; i < CHAINS; i++)
            sum[i] = vfma(sum[i], vsplat((float)(n % 8)), sum[i]);
    UNROLLED for (size_t i = 0; i < CHAINS; i++)
        total = vadd(total, vadd(vfloat(dot[i]), sum[i]));
    *sink += vsum(total);
#ifdef OWN_READY
    const size_t in_pairs = kind == PACK_F32 ? 1 : 2;
#else
    const size_t in_pairs = 1;
#endif
    return CHAINS * LANES * in_pairs * (kind == INT_PACK ? 8 : kind == PACK_BF16 ? 4 : 2);
}

/* Reads N bytes in order, as a matmul of one token does; a number that depends on all but a few at
 * the end. */
static float read_all(const uint8_t *p, size_t n) {
    static const uint8_t ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    ivec sum[4];
    UNROLLED for (size_t i = 0; i < 4; i++) sum[i] = isplat(0);
    for (size_t at = 0; at + 4 * STEP_BYTES <= n; at += 4 * STEP_BYTES)
        UNROLLED for (size_t i = 0; i < 4; i++) {
            PREFETCH(p + at + i * STEP_BYTES);
            sum[i] = idot4(sum[i], bready(wload(p + at + i * STEP_BYTES)), xload(ones, 0, 1, 1));
        }
    return vsum(vadd(vadd(vfloat(sum[0]), vfloat(sum[1])), vadd(vfloat(sum[2]), vfloat(sum[3]))));
}
