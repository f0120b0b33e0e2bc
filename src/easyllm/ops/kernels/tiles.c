// Products of int8 and int4 weights with many rows at a time, on AMX.
//
// Terms: block, group, chunk, code and terms as in matrix.h, tile and VNNI as in tiles.h; a panel
// is two blocks, 16 outputs.
//
// Data layout: a tile of codes has 16 rows x 32 inputs (one group), a tile of weights 32 inputs x
// 16 outputs, VNNI-interleaved in fours: row c is chunk c of both blocks. Sums are [rows][16] fp32.
//
// A tile of rows is multiplied by a tile of weights. Dot products of codes are exact integers, as
// in matrix.c, and they are scaled by the same arithmetic in the same order. So a row's result is
// bitwise identical to that of matrix.c, and independent of the other rows.
//
// Intrinsics, in addition to those of tiles.h
//   _tile_dpbssd(c, a, b)              tile c += tile a x tile b, int8 inputs and int32 sums
//   _mm512_cvtepi32_ps, _cvtph_ps      convert int32 or fp16 to fp32
//   _mm512_fmadd_ps(a, b, c)           FMA: a * b + c in each lane
//   _mm512_set1_*, _setzero_*          broadcast a value; zeros
//   _mm512_srli_epi16, _and_si512      shift and mask: extract nibbles
//   _mm512_inserti64x4, _mm256_inserti128_si256   set the upper half of a register
//   _mm512_mask(z)_load/store          load or store under a mask
#include "tiles.h"

#ifdef HAS_TILES

#include <sys/syscall.h>
#include <unistd.h>

#define EVEN 0  // tile registers: products of even and odd groups, rows, weights
#define ODD 1
#define ROWS 2
#define WEIGHTS 3
#define WIDTH (AMX_PANEL_BLOCKS * OUTPUTS)
#define GROUP_BYTES (GROUP * WIDTH)
#define GROUPS_AT_ONCE 8  // 5 KB of unpacked weights, which stay in L1 for all rows
#define ROWS_AT_ONCE 128

// Codes of a panel in the layout of AMX tiles, and for int4 its scales and offsets.
typedef struct {
    int8_t codes[GROUPS_AT_ONCE][GROUP_BYTES];
    float scales[GROUPS_AT_ONCE][WIDTH], offsets[GROUPS_AT_ONCE][WIDTH];
} __attribute__((aligned(64))) UnpackedPanel;

// This variable limits the instruction set of PyTorch's GEMMs (oneDNN). If it excludes AMX, these
// kernels do not use it either.
static int is_amx_disabled(void) {
    const char *maximum = getenv("ONEDNN_MAX_CPU_ISA");
    return maximum && !strstr(maximum, "AMX") && strcmp(maximum, "ALL") != 0 &&
           strcmp(maximum, "DEFAULT") != 0;
}

int tiles_ready(void) {
    static int ready = -1;
    int known = __atomic_load_n(&ready, __ATOMIC_RELAXED);
    if (known < 0) {  // Linux saves tile registers only for processes that have requested it
        // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        const long request_permission = 0x1023, tile_data = 18;
        known = !is_amx_disabled() && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
        __atomic_store_n(&ready, known, __ATOMIC_RELAXED);
    }
    return known;
}

void configure_quantized_tiles(void) {
    TileShapes shapes = {.palette = 1};
    shapes.rows[EVEN] = shapes.rows[ODD] = AMX_TILE_ROWS;
    shapes.row_bytes[EVEN] = shapes.row_bytes[ODD] = WIDTH * 4;
    shapes.rows[ROWS] = AMX_TILE_ROWS, shapes.row_bytes[ROWS] = GROUP;
    shapes.rows[WEIGHTS] = GROUP / 4, shapes.row_bytes[WEIGHTS] = WIDTH * 4;
    COMPILER_BARRIER();
    _tile_loadconfig(&shapes);
}

void release_tiles(void) { _tile_release(); }

// Unpacks one group: row c of its tile has chunk c of the panel's two blocks, next to each other.
static void unpack_group(const uint8_t *first, const uint8_t *second, int is_int4,
                         UnpackedPanel *to, i64 g) {
    __m512i *rows = (__m512i *)to->codes[g];
    const __m512i low = _mm512_set1_epi8(15);
    for (int c = 0; c < (is_int4 ? 4 : 8); c++) {
        __m512i codes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)first + c));
        codes = _mm512_inserti64x4(codes, _mm256_loadu_si256((const __m256i *)second + c), 1);
        if (is_int4) {
            _mm512_store_si512(rows + c + 4, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low));
            codes = _mm512_and_si512(codes, low);
        }
        _mm512_store_si512(rows + c, codes);
    }
    if (!is_int4) return;
    const __m128i *halves[2] = {(const __m128i *)first + 8, (const __m128i *)second + 8};
    for (int i = 0; i < 2; i++) {
        __m256i both = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128(halves[0] + i)), _mm_loadu_si128(halves[1] + i),
            1);
        _mm512_store_ps(i == 0 ? to->scales[g] : to->offsets[g], _mm512_cvtph_ps(both));
    }
}

// Multiplies the codes of the rows by those of the weights for one group, into tile NUMBER.
#define START(NUMBER, CODES, ROW_BYTES, GROUP_CODES)  \
    do {                                              \
        COMPILER_BARRIER();                           \
        _tile_loadd(ROWS, CODES, ROW_BYTES);          \
        _tile_loadd(WEIGHTS, GROUP_CODES, WIDTH * 4); \
        _tile_zero(NUMBER);                           \
        _tile_dpbssd(NUMBER, ROWS, WEIGHTS);          \
    } while (0)

typedef int32_t Products[AMX_TILE_ROWS][WIDTH] __attribute__((aligned(64)));

// sum[m] += the integer products of one group times its scales and terms
ALWAYS_INLINE void add_scaled(const UnpackedPanel *w, i64 g, int is_int4, const Products products,
                              const float *t, i64 stride, __m512 *sum) {
    __m512 scale = _mm512_load_ps(w->scales[g]), offset = _mm512_load_ps(w->offsets[g]);
#pragma GCC unroll 16
    for (int m = 0; m < AMX_TILE_ROWS; m++, t += stride) {
        __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(products[m]));
        if (is_int4) {
            whole = _mm512_fmadd_ps(whole, _mm512_set1_ps(t[0]), _mm512_set1_ps(t[1]));
            sum[m] = _mm512_fmadd_ps(scale, whole, sum[m]);
            sum[m] = _mm512_fmadd_ps(offset, _mm512_set1_ps(t[2]), sum[m]);
        } else {
            sum[m] = _mm512_fmadd_ps(whole, _mm512_set1_ps(t[0]), sum[m]);
        }
    }
}

// sums[m] += products of 16 rows with `count` groups of a panel. AMX runs two groups ahead of the
// scaling.
ALWAYS_INLINE void tile_sums(const UnpackedPanel *w, i64 count, int is_int4, const int8_t *codes,
                             const float *terms, i64 groups, float (*sums)[WIDTH]) {
    Products even, odd;
    __m512 sum[AMX_TILE_ROWS];
    i64 codes_stride = groups * GROUP, stride = groups * TERMS, g = 0;
#pragma GCC unroll 16
    for (int m = 0; m < AMX_TILE_ROWS; m++) sum[m] = _mm512_load_ps(sums[m]);
    START(EVEN, codes, codes_stride, w->codes[0]);
    if (count > 1) START(ODD, codes + GROUP, codes_stride, w->codes[1]);
    _tile_stored(EVEN, even, WIDTH * 4);
    for (; g + 1 < count; g += 2) {
        if (g + 2 < count) START(EVEN, codes + (g + 2) * GROUP, codes_stride, w->codes[g + 2]);
        _tile_stored(ODD, odd, WIDTH * 4);
        add_scaled(w, g, is_int4, even, terms + g * TERMS, stride, sum);
        if (g + 3 < count) START(ODD, codes + (g + 3) * GROUP, codes_stride, w->codes[g + 3]);
        if (g + 2 < count) _tile_stored(EVEN, even, WIDTH * 4);
        add_scaled(w, g + 1, is_int4, odd, terms + (g + 1) * TERMS, stride, sum);
    }
    if (g < count) add_scaled(w, g, is_int4, even, terms + g * TERMS, stride, sum);
#pragma GCC unroll 16
    for (int m = 0; m < AMX_TILE_ROWS; m++) _mm512_store_ps(sums[m], sum[m]);
}

// out[m][outputs of the panel] = products with rows [first, first + num_rows), plus bias
static void some_rows(const Matrix *w, i64 panel, const Rows *x, i64 first, i64 num_rows,
                      float *out, i64 stride) {
    float sums[ROWS_AT_ONCE][WIDTH] __attribute__((aligned(64)));
    UnpackedPanel unpacked;
    i64 groups = x->groups, is_int4 = w->format == INT4, group_bytes = is_int4 ? 160 : 256;
    i64 block_bytes = groups * group_bytes, panel_bytes = AMX_PANEL_BLOCKS * block_bytes;
    // after the last block, repeat it
    i64 second = panel * AMX_PANEL_BLOCKS + 1 < blocks_of(w) ? block_bytes : 0;
    const uint8_t *data = (const uint8_t *)w->data + panel * panel_bytes;
    memset(sums, 0, padded_rows(num_rows) * sizeof(*sums));
    for (i64 g = 0; g < groups; g += GROUPS_AT_ONCE) {
        i64 count = min_(GROUPS_AT_ONCE, groups - g);
        for (i64 i = 0; i < count; i++, data += group_bytes) {
            unpack_group(data, data + second, is_int4, &unpacked, i);
            // prefetch the next panel
            fetch(data + panel_bytes, group_bytes), fetch(data + second + panel_bytes, group_bytes);
        }
        for (i64 m = 0; m < num_rows; m += AMX_TILE_ROWS) {
            const int8_t *codes = x->codes + ((first + m) * groups + g) * GROUP;
            const float *terms = x->terms + ((first + m) * groups + g) * TERMS;
            if (is_int4) tile_sums(&unpacked, count, 1, codes, terms, groups, sums + m);
            else tile_sums(&unpacked, count, 0, codes, terms, groups, sums + m);
        }
    }
    i64 from = panel * WIDTH, width = min_(WIDTH, w->outputs - from);
    __mmask16 there = (__mmask16)((1u << width) - 1);
    __m512 scale = is_int4 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there, w->scales + from);
    __m512 bias = w->bias ? _mm512_maskz_loadu_ps(there, w->bias + from) : _mm512_setzero_ps();
    for (i64 m = 0; m < num_rows; m++) {
        __m512 sum = _mm512_load_ps(sums[m]);
        if (!is_int4) sum = _mm512_mul_ps(sum, scale);
        if (w->bias) sum = _mm512_add_ps(sum, bias);
        _mm512_mask_storeu_ps(out + m * stride, there, sum);
    }
}

void tile_panel(const Matrix *w, i64 panel, const Rows *x, i64 num_rows, float *out, i64 stride) {
    for (i64 m = 0; m < num_rows; m += ROWS_AT_ONCE)
        some_rows(w, panel, x, m, min_(ROWS_AT_ONCE, num_rows - m), out + m * stride, stride);
}

#else

int tiles_ready(void) { return 0; }
void configure_quantized_tiles(void) {}
void release_tiles(void) {}
void tile_panel(const Matrix *w, i64 panel, const Rows *x, i64 num_rows, float *out, i64 stride) {
    (void)w, (void)panel, (void)x, (void)num_rows, (void)out, (void)stride;
}

#endif
