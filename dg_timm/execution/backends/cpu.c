// Aggregation on CPUs (paper Eq. 3 and its gradient) and the routers' pooling (Eq. 4), compiled once by cpu.py; dg_timm/graph/edges.py is the reference.
//
// A map of one image is a run of `len` numbers in memory, whatever its layout. Every sum runs over pieces that fit the
// first cache, four sources at a time, in the order of the sources and with fused multiply-adds: bit for bit what
// torch.addcmul gives one source after another. A source of weight 0 is not read. Accumulation is in float32 (float64
// for float64). Pieces do not depend on the number of threads, and so neither does any result.
//
// The file includes itself once for each type of number.

#ifndef NUMBER

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE = 16384 };  // runs this long keep the memory's prefetchers busy; their sum stays in the second cache

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define NAME(f) JOIN(f, SUFFIX)

#if defined(__FMA__) || defined(__aarch64__)
#define FMAF(a, b, c) __builtin_fmaf(a, b, c)
#define FMAD(a, b, c) __builtin_fma(a, b, c)
#else
#define FMAF(a, b, c) ((a) * (b) + (c))
#define FMAD(a, b, c) ((a) * (b) + (c))
#endif

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {  // to nearest, ties to even
    uint32_t wide;
    memcpy(&wide, &value, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

#define NUMBER float
#define SUFFIX f32
#define SUM float
#define FMA FMAF
#define LOAD(v) (v)
#define STORE(v) (v)
#include __FILE__

#define NUMBER double
#define SUFFIX f64
#define SUM double
#define FMA FMAD
#define LOAD(v) (v)
#define STORE(v) (v)
#include __FILE__

#define NUMBER uint16_t
#define SUFFIX bf16
#define SUM float
#define FMA FMAF
#define LOAD(v) from_bf16(v)
#define STORE(v) to_bf16(v)
#include __FILE__

#ifdef __FLT16_MAX__
#define NUMBER _Float16
#define SUFFIX f16
#define SUM float
#define FMA FMAF
#define LOAD(v) ((float)(v))
#define STORE(v) ((_Float16)(v))
#include __FILE__
#endif

#else

// sum[k] = w[0] x[0][k] + ... + w[n - 1] x[n - 1][k], n from 1 to 4, onto what is there unless it is the first.
#define EACH for (int64_t k = 0; k < len; k++)
static inline void NAME(add)(SUM *restrict sum, int first, int n, const NUMBER *const *x, const SUM *w, int64_t len) {
    const NUMBER *a = x[0], *b = x[n > 1], *c = x[n > 2 ? 2 : 0], *d = x[n > 3 ? 3 : 0];
    SUM p = w[0], q = w[n > 1], r = w[n > 2 ? 2 : 0], t = w[n > 3 ? 3 : 0];
#define ONE (first ? LOAD(a[k]) * p : FMA(LOAD(a[k]), p, sum[k]))
#define TWO FMA(LOAD(b[k]), q, ONE)
#define THREE FMA(LOAD(c[k]), r, TWO)
#define FOUR FMA(LOAD(d[k]), t, THREE)
    if (n == 1) EACH sum[k] = ONE;
    if (n == 2) EACH sum[k] = TWO;
    if (n == 3) EACH sum[k] = THREE;
    if (n == 4) EACH sum[k] = FOUR;
#undef ONE
#undef TWO
#undef THREE
#undef FOUR
}

// One piece of one image: out[k] = sum over sources of weight != 0.
static void NAME(piece)(NUMBER *restrict out, int64_t n, const NUMBER *const *x, int64_t from, const SUM *w, int64_t len) {
    SUM sum[PIECE];
    const NUMBER *group[4];
    SUM weight[4];
    int held = 0, first = 1;
    for (int64_t i = 0; i < n; i++) {
        if (w[i] != 0) {
            group[held] = x[i] + from;
            weight[held++] = w[i];
        }
        if (held == 4 || (i == n - 1 && held)) {
            NAME(add)(sum, first, held, group, weight, len);
            held = first = 0;
        }
    }
    if (first) memset(sum, 0, sizeof(SUM) * len);
    EACH out[k] = STORE(sum[k]);
}

// <g, x> over what is finite of x. A closed edge learns from what is behind it, and not from what is no number.
static double NAME(finite_dot)(const NUMBER *g, const NUMBER *x, int64_t len) {
    double dot = 0;
    EACH if (isfinite((double)LOAD(x[k]))) dot += (double)LOAD(g[k]) * LOAD(x[k]);
    return dot;
}

// As piece, and dot[j] = <g[j], x> on the way, for which sources of weight 0 are read, too.
static void NAME(sum_and_dots)(NUMBER *restrict out, double *dot, int64_t n, const NUMBER *const *g, int64_t from, const SUM *w, const NUMBER *x, int64_t len) {
    SUM sum[PIECE];
    memset(sum, 0, sizeof(SUM) * len);
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        const NUMBER *a = g[j] + from, *b = g[j + 1] + from, *c = g[j + 2] + from, *d = g[j + 3] + from;
        SUM p = w[j], q = w[j + 1], r = w[j + 2], t = w[j + 3], dot_a = 0, dot_b = 0, dot_c = 0, dot_d = 0;
#pragma omp simd reduction(+ : dot_a, dot_b, dot_c, dot_d)
        for (int64_t k = 0; k < len; k++) {
            SUM at = LOAD(x[k]), ga = LOAD(a[k]), gb = LOAD(b[k]), gc = LOAD(c[k]), gd = LOAD(d[k]);
            dot_a = FMA(ga, at, dot_a), dot_b = FMA(gb, at, dot_b), dot_c = FMA(gc, at, dot_c), dot_d = FMA(gd, at, dot_d);
            sum[k] = FMA(gd, t, FMA(gc, r, FMA(gb, q, FMA(ga, p, sum[k]))));
        }
        dot[j] = dot_a, dot[j + 1] = dot_b, dot[j + 2] = dot_c, dot[j + 3] = dot_d;
    }
    for (; j < n; j++) {
        const NUMBER *a = g[j] + from;
        SUM p = w[j], dot_a = 0;
#pragma omp simd reduction(+ : dot_a)
        for (int64_t k = 0; k < len; k++) {
            SUM ga = LOAD(a[k]);
            dot_a = FMA(ga, LOAD(x[k]), dot_a);
            sum[k] = FMA(ga, p, sum[k]);
        }
        dot[j] = dot_a;
    }
    if (out) EACH out[k] = STORE(sum[k]);
}

// As above; where the weight is 0 and something is no number, once more with care: sources of weight 0 leave no trace.
static void NAME(piece_and_dots)(NUMBER *restrict out, double *dot, int64_t n, const NUMBER *const *g, int64_t from, const SUM *w, const NUMBER *x, int64_t len) {
    int again = 0;
    NAME(sum_and_dots)(out, dot, n, g, from, w, x, len);
    for (int64_t j = 0; j < n; j++)
        if (w[j] == 0 && !isfinite(dot[j])) {
            dot[j] = NAME(finite_dot)(g[j] + from, x, len);
            again = 1;
        }
    if (again && out) NAME(piece)(out, n, g, from, w, len);
}

// out[b] = sum_i weights[b, i] x[i][b]; x: n bases of (batch, len), weights: (batch, n), out: (batch, len).
void NAME(weighted_sum)(NUMBER *out, const NUMBER *const *x, const SUM *weights, int64_t batch, int64_t n, int64_t len, int threads) {
    int64_t pieces = (len + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * pieces; task++) {
        int64_t b = task / pieces, from = task % pieces * PIECE, size = len - from < PIECE ? len - from : PIECE;
        NAME(piece)(out + b * len + from, n, x, b * len + from, weights + b * n, size);
    }
}

// The mean of every channel: out (batch, channels), x (batch, channels, size), or (batch, size, channels) if channels_last.
void NAME(channel_means)(NUMBER *out, const NUMBER *x, int64_t batch, int64_t channels, int64_t size, int channels_last, int threads) {
    enum { TOGETHER = 256 };  // channels
    int64_t groups = (channels + TOGETHER - 1) / TOGETHER;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * groups; task++) {
        int64_t b = task / groups, from = task % groups * TOGETHER, len = channels - from < TOGETHER ? channels - from : TOGETHER;
        SUM sum[TOGETHER] = {0};
        if (channels_last)
            for (int64_t i = 0; i < size; i++) {
                const NUMBER *at = x + (b * size + i) * channels + from;
                EACH sum[k] += LOAD(at[k]);
            }
        else
            EACH {
                const NUMBER *at = x + (b * channels + from + k) * size;
                SUM own = 0;
#pragma omp simd reduction(+ : own)
                for (int64_t i = 0; i < size; i++) own += LOAD(at[i]);
                sum[k] = own;
            }
        EACH out[b * channels + from + k] = STORE(sum[k] / size);
    }
}

#include "cpu_sparse.h"

// The gradient at a source x that n targets read, whose gradients are g: in one pass over the g
//   dx[b] = sum_j weights[b, j] g[j][b]          (dx may be NULL)
//   dw[b, j] = <g[j][b], x[b]>                   (dw may be NULL)
// Returns 0, or 1 where there was no memory for the pieces of dw.
int NAME(product_gradients)(NUMBER *dx, SUM *dw, const NUMBER *const *g, const NUMBER *x, const SUM *weights, int64_t batch, int64_t n, int64_t len, int threads) {
    if (!dx && !dw) return 0;
    int64_t pieces = (len + PIECE - 1) / PIECE;
    double *part = dw ? malloc(sizeof(double) * (batch * pieces * n + 1)) : NULL;
    if (dw && !part) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * pieces; task++) {
        int64_t b = task / pieces, from = task % pieces * PIECE, len_ = len, at = b * len_ + from;
        int64_t len = len_ - from < PIECE ? len_ - from : PIECE;
        if (dw)
            NAME(piece_and_dots)(dx ? dx + at : NULL, part + task * n, n, g, at, weights + b * n, x + at, len);
        else
            NAME(piece)(dx + at, n, g, at, weights + b * n, len);
    }
    if (dw) {
        for (int64_t b = 0; b < batch; b++)
            for (int64_t j = 0; j < n; j++) {
                double sum = 0;
                for (int64_t p = 0; p < pieces; p++) sum += part[(b * pieces + p) * n + j];
                dw[b * n + j] = sum;
            }
        free(part);
    }
    return 0;
}

#undef EACH
#undef NUMBER
#undef SUFFIX
#undef SUM
#undef FMA
#undef LOAD
#undef STORE

#endif
