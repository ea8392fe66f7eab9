// The fused operations of ldm/fast/plain.py for float32 on a CPU: matrix products whose right side is packed on the way, so that weights stay
// as they are and are held once. Compiled by ldm/fast/compiler.py for the machine it runs on; called through ctypes from ldm/fast/cpu.py.
//
// All products run through one kernel, `tile`: a few rows times one or two vectors of columns, held in registers over the depth k.
// Right sides are packed into panels of PANEL columns, [k][PANEL], zeros where there is no column; left sides are read where they lie.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <omp.h>
#include <sys/mman.h>

#ifndef LANES  // floats in a vector
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef int64_t i64;

namespace {

constexpr int ROWS = LANES == 16 ? 12 : 6;  // of a tile: with two columns of vectors as many accumulators as registers allow
constexpr int PANEL = 2 * LANES;
constexpr i64 DEPTH = 384;  // of a product at a time: a panel of it stays in the first cache

inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec load(const float* p, i64 some) {
    if (some == LANES) return load(p);
    vec v = {};
    std::memcpy(&v, p, some * sizeof(float));
    return v;
}
inline void store(float* p, vec v, i64 some) { some == LANES ? store(p, v) : void(std::memcpy(p, &v, some * sizeof(float))); }
inline vec all(float x) { return x - vec{}; }
inline i64 blocks(i64 n, i64 size) { return (n + size - 1) / size; }
inline i64 whole(i64 n, i64 size) { return blocks(n, size) * size; }

struct Free { void operator()(float* p) const { std::free(p); } };
typedef std::unique_ptr<float, Free> Buffer;

// Room that begins at a page, or none if there is none; a large one in large pages where the system has them, whose addresses are found quicker.
Buffer buffer(i64 floats) {
    const i64 bytes = std::max<i64>(floats, 1) * 4, page = bytes < (1 << 20) ? 4 << 10 : 2 << 20;
    void* const found = std::aligned_alloc(page, whole(bytes, page));
#ifdef MADV_HUGEPAGE
    if (found && page > 4 << 10) madvise(found, whole(bytes, page), MADV_HUGEPAGE);
#endif
    return Buffer(static_cast<float*>(found));
}

// Room for every thread, taken before they begin, so that a lack of it can be reported.
struct Rooms {
    const i64 each;
    const Buffer all;
    Rooms(i64 floats, int threads) : each(whole(floats, 1024)), all(buffer(each * threads)) {}
    float* mine() const { return all.get() + each * omp_get_thread_num(); }
};

// 2^x for x <= 0: 2^n times a Chebyshev fit of 2^r on [-1/2, 1/2] with relative error 2e-09. What is not a number stays so.
inline vec power(vec x) {
    x = all(-125.f) > x ? all(-125.f) : x;
    const vec shifted = x + 12582912.f;  // 1.5 * 2^23: the last bits of the sum are the nearest integer n
    const vec r = x - (shifted - 12582912.f);
    vec p = all(0.000153375635f);
    for (float factor : {0.00133998735f, 0.00961851969f, 0.0555032897f, 0.240226466f, 0.693147206f, 1.f}) p = p * r + factor;
    ivec bits, n;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&n, &shifted, sizeof n);
    bits += n << 23;  // onto the exponent
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

constexpr float LOG2E = 1.44269504f;

inline vec silu(vec x) {
    const vec e = power((x > 0.f ? -x : x) * LOG2E);  // e^-|x|
    return (x > 0.f ? x : x * e) / (1.f + e);
}

// x Phi(x), exactly: erfc(a) = e^(-a^2) t P(t) with t = 1 / (1 + 0.35 a), P a Chebyshev fit on a in [0, 9.5] with relative error 7e-9.
inline vec gelu(vec x) {
    const vec a = (x > 0.f ? x : -x) * 0.707106781f, t = 1.f / (1.f + 0.35f * a);
    vec p = all(0.0382435684f);
    for (float factor : {-0.157946656f, 0.17881337f, -0.0236548256f, 0.0831517872f, 0.148426607f, 0.150238293f, 0.188136232f, 0.19710593f, 0.197485702f})
        p = p * t + factor;
    const vec tail = 0.5f * power(-a * a * LOG2E) * t * p;
    return x * (x > 0.f ? 1.f - tail : tail);
}

// c[0..R)[0..N * LANES) = a[0..R)[0..k) b[0..k)[PANEL], or += .
template <int R, int N, bool Add> void tile(const float* a, i64 lda, const float* b, i64 k, float* c, i64 ldc) {
    vec sum[R][N] = {};
    for (i64 p = 0; p < k; p++) {
        vec right[N];
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) right[j] = load(b + p * PANEL + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
            const vec left = all(a[i * lda + p]);
#pragma GCC unroll 2
            for (int j = 0; j < N; j++) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) {
            float* const to = c + i * ldc + j * LANES;
            store(to, Add ? load(to) + sum[i][j] : sum[i][j]);
        }
}

template <int R, int N> void tile_of(i64 rows, const float* a, i64 lda, const float* b, i64 k, float* c, i64 ldc, bool add) {
    if (rows == R) return add ? tile<R, N, true>(a, lda, b, k, c, ldc) : tile<R, N, false>(a, lda, b, k, c, ldc);
    if constexpr (R > 1) tile_of<R - 1, N>(rows, a, lda, b, k, c, ldc, add);
}

// c [m, n] (+)= a [m, k] times one packed panel, N vectors of it used; in tiles of rows as equal as can be, since a tile of few wastes time.
template <int N> void panel_product(i64 m, i64 k, const float* a, i64 lda, const float* panel, float* c, i64 ldc, bool add) {
    constexpr int R = N == 2 ? ROWS : 2 * ROWS;
    for (i64 i = 0, left = blocks(m, R), rows; i < m; i += rows) {
        rows = blocks(m - i, left--);
        tile_of<R, N>(rows, a + i * lda, lda, panel, k, c + i * ldc, ldc, add);
    }
}

// c [m, n] (+)= a [m, k] times packed panels; `between` floats lie between one panel and the next. c has room for whole vectors.
void product(i64 m, i64 n, i64 k, const float* a, i64 lda, const float* panels, i64 between, float* c, i64 ldc, bool add) {
    for (; n > 0; n -= PANEL, c += PANEL, panels += between)
        n > LANES ? panel_product<2>(m, k, a, lda, panels, c, ldc, add) : panel_product<1>(m, k, a, lda, panels, c, ldc, add);
}

// The same over a depth of any size, in equal parts of at most DEPTH.
void deep_product(i64 m, i64 n, i64 k, const float* a, i64 lda, const float* panels, float* c, i64 ldc) {
    const i64 part = blocks(k, blocks(k, DEPTH));
    for (i64 p = 0; p < k; p += part)
        product(m, n, std::min(part, k - p), a + p, lda, panels + p * PANEL, k * PANEL, c, ldc, p > 0);
}

// Transposes LANES vectors: in every step the halves that lie `S` lanes apart are exchanged between rows that lie S apart.
template <int S = 1> inline void transpose(vec* rows) {
    ivec low, high;
    for (int l = 0; l < LANES; l++) {
        low[l] = l & S ? LANES + l - S : l;
        high[l] = l & S ? LANES + l : l + S;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) {
            const vec a = rows[i], b = rows[i | S];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i | S] = __builtin_shuffle(a, b, high);
        }
    if constexpr (2 * S < LANES) transpose<2 * S>(rows);
}

// `columns` rows of a matrix [.., k] that lie `between` floats apart become LANES columns of a panel [k][PANEL]: their transpose.
void pack_rows(const float* w, i64 between, i64 columns, i64 k, float* panel) {
    i64 p = 0;
    for (; columns >= LANES && p + LANES <= k; p += LANES) {
        vec rows[LANES];
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) rows[j] = load(w + j * between + p);
        transpose(rows);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) store(panel + (p + j) * PANEL, rows[j]);
    }
    for (; p < k; p++)
        for (i64 j = 0; j < LANES; j++) panel[p * PANEL + j] = j < columns ? w[j * between + p] : 0.f;
}

// A whole panel.
void pack_panel(const float* w, i64 between, i64 columns, i64 k, float* panel) {
    pack_rows(w, between, columns, k, panel);
    pack_rows(w + LANES * between, between, columns - LANES, k, panel + LANES);
}

}  // namespace

// Every function returns 0, or 1 if there was not enough memory.
extern "C" {

int ldm_lanes() { return LANES; }

// y [m, n] = x [m, k] w^T + bias + add, w [n, k]. Gated: w [2 n, k], bias [2 n], y = value * gelu(gate).
int ldm_linear(const float* x, const float* w, const float* bias, const float* add, float* y, i64 m, i64 n, i64 k, int gated, int threads) {
    const i64 step = gated ? LANES : PANEL;                    // columns of y in a panel
    i64 wide = whole(blocks(n, threads * blocks(n, threads * 10 * step)), step);  // of a task: equal shares, at most ten panels
    const i64 across = blocks(n, wide), high = std::max<i64>(96, whole(blocks(m, std::max<i64>(1, blocks(2 * threads, across))), 96));
    const i64 tasks = across * blocks(m, high), room = blocks(wide, step) * PANEL;
    const Rooms rooms(room * k + 96 * room, threads);
    if (!rooms.all) return 1;
#pragma omp parallel num_threads(threads)
    {
        float *const panels = rooms.mine(), *const sums = panels + room * k;
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < tasks; task++) {
            const i64 first = task % across * wide, columns = std::min(wide, n - first), top = task / across * high;
            const i64 count = blocks(columns, step);
            for (i64 j = 0; j < count; j++) {
                float* const panel = panels + j * k * PANEL;
                const i64 from = first + j * step, some = std::min(step, n - from);
                if (!gated) pack_panel(w + from * k, k, some, k, panel);
                else pack_rows(w + from * k, k, some, k, panel), pack_rows(w + (n + from) * k, k, some, k, panel + LANES);
            }
            for (i64 i = top; i < std::min(m, top + high); i += 96) {
                const i64 rows = std::min<i64>(96, std::min(m, top + high) - i);
                deep_product(rows, gated ? count * PANEL : columns, k, x + i * k, k, panels, sums, room);
                for (i64 r = 0; r < rows; r++) {
                    const float* sum = sums + r * room;
                    float* to = y + (i + r) * n + first;
                    const float* more = add ? add + (i + r) * n + first : nullptr;
                    for (i64 c = 0; c < columns; c += LANES) {
                        const i64 some = std::min<i64>(LANES, columns - c);
                        auto with_bias = [&](const float* from, i64 at) { return bias ? load(from) + load(bias + at, some) : load(from); };
                        vec value = with_bias(gated ? sum + 2 * c : sum + c, first + c);
                        if (gated) value *= gelu(with_bias(sum + 2 * c + LANES, n + first + c));
                        if (more) value += load(more + c, some);
                        store(to + c, value, some);
                    }
                }
            }
        }
    }
    return 0;
}

// A 3x3 convolution with a border of one, by F(2x2, 3x3) of Lavin & Gray 2015 ("Fast Algorithms for Convolutional Neural Networks", section
// 4.1): 16 products per tile of four outputs instead of 36. x [b, sh, sw, c], w [o, c, 3, 3], y [b, h, w, o], bias [o].
// up: x is first enlarged to h x w, h in {2 sh, 2 sh - 1} by repetition of rows and columns; then 7 of the 16 products are with zeros where
// h and w are even, and are left out.
// kind of add: 0 none, 1 [b, o], 2 [b, h, w, o].
int ldm_conv(const float* x, const float* w, const float* bias, const float* add, float* y, i64 b, i64 sh, i64 sw, i64 c, i64 h, i64 wd, i64 o,
              int up, int kind, int threads) {
    const bool nine = up && h % 2 == 0 && wd % 2 == 0;
    int active[16], products = 0;
    for (int p = 0; p < 16; p++)
        if (!nine || (p / 4 != 2 && p % 4 != 2)) active[products++] = p;
    const i64 th = blocks(h, 2), tw = blocks(wd, 2), tiles = b * th * tw;
    const i64 most = std::min<i64>(128, std::max<i64>(32, (8 << 20) / (4 * products * c) / 16 * 16));  // columns of a task: its weights in the last cache
    const i64 wide = whole(blocks(o, threads * blocks(o, threads * most)), PANEL), across = blocks(o, wide);
    const i64 rows = std::max<i64>(ROWS, (256 << 10) / (4 * products * wide) / ROWS * ROWS);  // tiles at a time: their sums in the second cache
    const i64 chunk = std::min(tiles, std::max<i64>(512, (16 << 20) / (4 * products * c)));
    const i64 shares = across % threads == 0 || across > 4 * threads ? 1 : blocks(2 * threads, across);  // parts of a chunk, for threads without columns
    const Buffer inputs = buffer(products * chunk * c);
    const Rooms rooms(products * wide * c + 16 * rows * wide + 9 * c * PANEL, threads);
    if (!inputs || !rooms.all) return 1;
    float* const v = inputs.get();

    for (i64 start = 0; start < tiles; start += chunk) {
        const i64 count = std::min(chunk, tiles - start), high = whole(blocks(count, shares), rows);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (i64 t = 0; t < count; t++) {  // v = B^T d B
                const i64 at = start + t, image = at / (th * tw), ty = at / tw % th, tx = at % tw;
                const float* from[16];
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++) {
                        const i64 r = 2 * ty + i - 1, s = 2 * tx + j - 1;
                        const bool inside = r >= 0 && r < h && s >= 0 && s < wd;
                        from[4 * i + j] = inside ? x + ((image * sh + (up ? r / 2 : r)) * sw + (up ? s / 2 : s)) * c : nullptr;
                    }
                auto transform = [&](i64 ch, auto get, auto put) {
                    typedef decltype(get(0, ch)) T;
                    T d[4][4], e[4][4];
                    for (int i = 0; i < 4; i++)
                        for (int j = 0; j < 4; j++) d[i][j] = get(4 * i + j, ch);
                    for (int j = 0; j < 4; j++) {
                        e[0][j] = d[0][j] - d[2][j];
                        e[1][j] = d[1][j] + d[2][j];
                        e[2][j] = d[2][j] - d[1][j];
                        e[3][j] = d[1][j] - d[3][j];
                    }
                    for (int i = 0; i < 4; i++) {
                        d[i][0] = e[i][0] - e[i][2];
                        d[i][1] = e[i][1] + e[i][2];
                        d[i][2] = e[i][2] - e[i][1];
                        d[i][3] = e[i][1] - e[i][3];
                    }
                    for (int p = 0; p < products; p++) put((p * count + t) * c + ch, d[active[p] / 4][active[p] % 4]);
                };
                i64 ch = 0;
                for (; ch + LANES <= c; ch += LANES)
                    transform(ch, [&](int p, i64 at) { return from[p] ? load(from[p] + at) : vec{}; }, [&](i64 at, vec value) { store(v + at, value); });
                for (; ch < c; ch++)
                    transform(ch, [&](int p, i64 at) { return from[p] ? from[p][at] : 0.f; }, [&](i64 at, float value) { v[at] = value; });
            }

            float *const u = rooms.mine(), *const m = u + products * wide * c, *const g = m + 16 * rows * wide;
            std::memset(m, 0, sizeof(float) * 16 * rows * wide);
#pragma omp for schedule(dynamic)
            for (i64 task = 0; task < across * shares; task++) {
                const i64 first = task % across * wide, columns = std::min(wide, o - first), top = task / across * high;
                if (top >= count) continue;
                for (i64 j = 0; j < columns; j += PANEL) {  // u = G g G^T, packed
                    pack_panel(w + (first + j) * c * 9, c * 9, columns - j, c * 9, g);
                    for (i64 ch = 0; ch < c; ch++)
                        for (int half = 0; half < PANEL; half += LANES) {
                            vec e[4][3];
                            for (int q = 0; q < 3; q++) {
                                const float* const from = g + (ch * 9 + q) * PANEL + half;
                                const vec g0 = load(from), g1 = load(from + 3 * PANEL), g2 = load(from + 6 * PANEL);
                                e[0][q] = g0;
                                e[1][q] = 0.5f * (g0 + g1 + g2);
                                e[2][q] = 0.5f * (g0 - g1 + g2);
                                e[3][q] = g2;
                            }
                            for (int p = 0; p < products; p++) {
                                const vec* r = e[active[p] / 4];
                                const int s = active[p] % 4;
                                const vec value = s == 0 ? r[0] : s == 1 ? 0.5f * (r[0] + r[1] + r[2]) : s == 2 ? 0.5f * (r[0] - r[1] + r[2]) : r[2];
                                store(u + (p * wide + j) * c + ch * PANEL + half, value);
                            }
                        }
                }
                for (i64 t = top; t < std::min(count, top + high); t += rows) {
                    const i64 some = std::min(rows, std::min(count, top + high) - t);
                    for (int p = 0; p < products; p++)
                        deep_product(some, columns, c, v + (p * count + t) * c, c, u + p * wide * c, m + active[p] * rows * wide, wide);
                    for (i64 r = 0; r < some; r++) {  // y = A^T m A
                        const i64 at = start + t + r, image = at / (th * tw), ty = at / tw % th, tx = at % tw;
                        auto finish = [&](i64 n, auto get, auto put, auto zero) {
                            typedef decltype(zero) T;
                            T e[2][4];
                            for (int j = 0; j < 4; j++) {
                                const T m0 = get(m + (j * rows + r) * wide + n), m1 = get(m + ((4 + j) * rows + r) * wide + n);
                                const T m2 = get(m + ((8 + j) * rows + r) * wide + n), m3 = get(m + ((12 + j) * rows + r) * wide + n);
                                e[0][j] = m0 + m1 + m2;
                                e[1][j] = m1 - m2 - m3;
                            }
                            const T base = (bias ? get(bias + first + n) : zero) + (kind == 1 ? get(add + image * o + first + n) : zero);
                            for (int i = 0; i < 2; i++)
                                for (int j = 0; j < 2; j++) {
                                    if (2 * ty + i >= h || 2 * tx + j >= wd) continue;
                                    const i64 to = ((image * h + 2 * ty + i) * wd + 2 * tx + j) * o + first + n;
                                    T value = (j == 0 ? e[i][0] + e[i][1] + e[i][2] : e[i][1] - e[i][2] - e[i][3]) + base;
                                    if (kind == 2) value += get(add + to);
                                    put(y + to, value);
                                }
                        };
                        i64 n = 0;
                        for (; n + LANES <= columns; n += LANES) finish(n, [](const float* p) { return load(p); }, [](float* p, vec q) { store(p, q); }, vec{});
                        for (; n < columns; n++) finish(n, [](const float* p) { return *p; }, [](float* p, float q) { *p = q; }, 0.f);
                    }
                }
            }
        }
    }
    return 0;
}

// softmax(q k^T / sqrt(d)) v with running maxima (Milakov & Gimelshein 2018): q [b, n, heads d], k and v [b, m, heads d], y as q.
// Rows of q, k and v lie ldq, ldk and ldv floats apart, batches n, m and m rows.
int ldm_attend(const float* q, const float* k, const float* v, float* y, i64 b, i64 heads, i64 n, i64 m, i64 d, i64 ldq, i64 ldk, i64 ldv, int threads) {
    constexpr i64 HIGH = 96, WIDE = 256;  // queries and keys at a time: their scores in the second cache
    const float scale = LOG2E / std::sqrt(static_cast<float>(d));  // scores in powers of two
    const i64 room = whole(d, PANEL), keys = whole(m, PANEL), across = blocks(n, HIGH);
    const Buffer packed_k = buffer(b * heads * keys * d), packed_v = buffer(b * heads * m * room);
    const Rooms rooms(HIGH * (WIDE + d + room), threads);
    if (!packed_k || !packed_v || !rooms.all) return 1;
#pragma omp parallel num_threads(threads)
    {
        float *const s = rooms.mine(), *const out = s + HIGH * WIDE, *const a = out + HIGH * room;
        float top[HIGH], total[HIGH];
#pragma omp for schedule(static)
        for (i64 head = 0; head < b * heads; head++) {
            const float *const from_k = k + head / heads * m * ldk + head % heads * d, *const from_v = v + head / heads * m * ldv + head % heads * d;
            for (i64 j = 0; j < m; j += PANEL) pack_panel(from_k + j * ldk, ldk, m - j, d, packed_k.get() + (head * keys + j) * d);
            for (i64 j = 0; j < d; j += PANEL)  // of v the panels run over keys: [m][PANEL]
                for (i64 p = 0; p < m; p++)
                    for (i64 l = 0; l < PANEL; l++) packed_v.get()[(head * room + j) * m + p * PANEL + l] = j + l < d ? from_v[p * ldv + j + l] : 0.f;
        }
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < b * heads * across; task++) {
            const i64 head = task / across, i = task % across * HIGH, rows = std::min(HIGH, n - i);
            for (i64 r = 0; r < rows; r++) {
                const float* from = q + (head / heads * n + i + r) * ldq + head % heads * d;
                for (i64 l = 0; l < d; l++) a[r * d + l] = from[l] * scale;
                top[r] = -INFINITY, total[r] = 0.f;
            }
            for (i64 j = 0; j < m; j += WIDE) {
                const i64 some = std::min(WIDE, m - j), vectors = whole(some, LANES);
                product(rows, some, d, a, d, packed_k.get() + (head * keys + j) * d, d * PANEL, s, WIDE, false);
                for (i64 r = 0; r < rows; r++) {
                    float* const row = s + r * WIDE;
                    for (i64 l = some; l < vectors; l++) row[l] = -INFINITY;
                    vec best = load(row);
                    for (i64 l = LANES; l < vectors; l += LANES) {
                        const vec value = load(row + l);
                        best = value > best ? value : best;
                    }
                    float most = top[r];
                    for (int l = 0; l < LANES; l++) most = std::max(most, best[l]);
                    vec sum = {};
                    for (i64 l = 0; l < vectors; l += LANES) {
                        const vec e = power(load(row + l) - most);
                        store(row + l, e);
                        sum += e;
                    }
                    float more = 0.f;
                    for (int l = 0; l < LANES; l++) more += sum[l];
                    const float fade = std::exp2(top[r] - most);
                    total[r] = total[r] * fade + more;
                    top[r] = most;
                    if (j > 0 && fade != 1.f)
                        for (i64 l = 0; l < room; l += LANES) store(out + r * room + l, load(out + r * room + l) * fade);
                }
                product(rows, d, some, s, WIDE, packed_v.get() + head * room * m + j * PANEL, m * PANEL, out, room, j > 0);
            }
            for (i64 r = 0; r < rows; r++) {
                float* to = y + (head / heads * n + i + r) * heads * d + head % heads * d;
                for (i64 l = 0; l < d; l++) to[l] = out[r * room + l] / total[r];
            }
        }
    }
    return 0;
}

// GroupNorm of x [b, n, c] over all n and the c / groups channels of a group, then SiLU if asked. Moments are taken of differences to the
// first row, in float32 over 64 rows and in float64 above, so that a mean far from zero costs no digits.
int ldm_norm(const float* x, const float* weight, const float* bias, float* y, i64 b, i64 n, i64 c, i64 groups, double eps, int activate, int threads) {
    constexpr i64 HIGH = 64;
    const i64 parts = std::min<i64>(threads, blocks(n, HIGH)), share = whole(blocks(n, parts), HIGH), size = c / groups;
    const Buffer sums_in_double = buffer(4 * b * parts * c), factors = buffer(2 * b * c);
    const Rooms rooms(2 * c, threads);
    if (!sums_in_double || !factors || !rooms.all) return 1;
    double* const moments = reinterpret_cast<double*>(sums_in_double.get());
    std::fill(moments, moments + 2 * b * parts * c, 0.);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (i64 task = 0; task < b * parts; task++) {
            const i64 image = task / parts, end = std::min(n, (task % parts + 1) * share);
            const float *const first = x + image * n * c;
            float *const one = rooms.mine(), *const two = one + c;
            double* const total = moments + 2 * task * c;
            for (i64 top = task % parts * share; top < end; top += HIGH) {
                std::memset(one, 0, 2 * c * sizeof(float));
                for (i64 r = top; r < std::min(end, top + HIGH); r++)
                    for (i64 j = 0; j < c; j++) {
                        const float difference = first[r * c + j] - first[j];
                        one[j] += difference;
                        two[j] += difference * difference;
                    }
                for (i64 j = 0; j < 2 * c; j++) total[j] += one[j];
            }
        }
#pragma omp for schedule(static)
        for (i64 task = 0; task < b * groups; task++) {  // factor and offset of every channel
            const i64 image = task / groups, from = task % groups * size;
            double mean = 0, square = 0;
            for (i64 j = from; j < from + size; j++) {
                double sum = 0;
                for (i64 part = 0; part < parts; part++) sum += moments[2 * (image * parts + part) * c + j];
                mean += sum / n + x[image * n * c + j];
            }
            mean /= size;
            for (i64 j = from; j < from + size; j++) {  // E (x - mean)^2 = var of the channel + (its mean - mean)^2
                double sum = 0, squares = 0;
                for (i64 part = 0; part < parts; part++) {
                    sum += moments[2 * (image * parts + part) * c + j];
                    squares += moments[(2 * (image * parts + part) + 1) * c + j];
                }
                const double own = sum / n, off = own + x[image * n * c + j] - mean;
                square += squares / n - own * own + off * off;
            }
            const double rstd = 1 / std::sqrt(std::max(0., square / size) + eps);
            for (i64 j = from; j < from + size; j++) {
                const double factor = rstd * weight[j];
                factors.get()[2 * image * c + j] = static_cast<float>(factor);
                factors.get()[(2 * image + 1) * c + j] = static_cast<float>(bias[j] - mean * factor);
            }
        }
#pragma omp for schedule(static)
        for (i64 row = 0; row < b * n; row++) {
            const float *const factor = factors.get() + 2 * (row / n) * c, *const offset = factor + c, *const from = x + row * c;
            float* const to = y + row * c;
            i64 j = 0;
            for (; j + LANES <= c; j += LANES) {
                const vec value = load(from + j) * load(factor + j) + load(offset + j);
                store(to + j, activate ? silu(value) : value);
            }
            for (; j < c; j++) {
                const float value = from[j] * factor[j] + offset[j];
                to[j] = activate ? value / (1.f + std::exp(-value)) : value;
            }
        }
    }
    return 0;
}

}  // extern "C"
