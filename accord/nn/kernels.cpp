// What stands between the matrix products, in sampling and in training: each kernel is one pass over memory, or two. And a
// decoder's products themselves (multiply).
//
// Plain loops that a compiler vectorises, and AVX512 by hand where it does not. The same arithmetic stands in torch where a kernel is called, and is the
// reference: results are rounded to the activations' type where torch rounds them, and tests hold the two together.
// Every array is contiguous unless a stride is given. T is float or bf16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

inline float get(float x) { return x; }
inline float get(bf16 x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}
inline void put(float* at, float x) { *at = x; }
inline void put(bf16* at, float x) {  // to nearest, ties to even; a NaN stays one
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    at->bits = uint16_t(x != x ? 0x7fc0 : rounded);
}
template <class T>
inline float as(float x) {  // what x is once it is stored as T
    T t;
    put(&t, x);
    return get(t);
}

// exp(x) to 2e-7 relative for x <= 88: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' expf). Below -87 it is 0.
inline float exponential(float x) {
    float clamped = std::min(std::max(x, -87.0f), 88.0f);
    float n = std::nearbyint(clamped * 1.44269504f);
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t power = uint32_t(int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    float out = p * scale;
    return x < -87.0f ? 0.0f : (x != x ? x : out);
}

// x += y (if there is a y), out = w * x / sqrt(mean(x^2) + eps).   x, y, out (rows, width); w (width); scales (rows) or null
template <class T>
void add_norm(T* x, const T* y, const T* weight, T* out, float* scales, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (int64_t r = 0; r < rows; ++r) {
        T* xr = x + r * width;
        T* to = out + r * width;
        if (y) {
            const T* yr = y + r * width;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) put(xr + i, get(xr[i]) + get(yr[i]));
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) squares += get(xr[i]) * get(xr[i]);
        const float scale = 1.0f / std::sqrt(squares / float(width) + eps);
        if (scales) scales[r] = scale;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) put(to + i, get(weight[i]) * as<T>(get(xr[i]) * scale));
    }
}

// Its gradients, from that of out: with n = x * scale, dx = scale * (w g - n mean(w g n)) and dw = sum over rows of g n.
template <class T>
void norm_backward(const T* g, const T* x, const T* weight, const float* scales, T* dx, float* dw, int64_t rows, int64_t width) {
    constexpr int64_t BLOCK = 64;  // columns of dw at a time: one order of summation, however many threads
#pragma omp parallel if (rows * width > 8192)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const T *gr = g + r * width, *xr = x + r * width;
            const float scale = scales[r];
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; ++i) sum += as<T>(get(gr[i]) * get(weight[i])) * get(xr[i]);
            const float mean = sum * scale * scale / float(width);
#pragma omp simd
            for (int64_t i = 0; i < width; ++i)
                put(dx + r * width + i, scale * (as<T>(get(gr[i]) * get(weight[i])) - get(xr[i]) * mean));
        }
        if (dw) {
#pragma omp for schedule(static)
            for (int64_t start = 0; start < width; start += BLOCK) {
                const int64_t count = std::min(BLOCK, width - start);
                float sum[BLOCK] = {};
                for (int64_t r = 0; r < rows; ++r) {
                    const T *gr = g + r * width + start, *xr = x + r * width + start;
                    const float scale = scales[r];
#pragma omp simd
                    for (int64_t i = 0; i < count; ++i) sum[i] += get(gr[i]) * as<T>(get(xr[i]) * scale);
                }
                std::copy(sum, sum + count, dw + start);
            }
        }
    }
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// out = silu(gate) * up.   gate, up (rows, width), a row every `stride` numbers; out (rows, width)
template <class T>
void silu_mul(const T* gate, const T* up, T* out, int64_t rows, int64_t width, int64_t stride) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (int64_t r = 0; r < rows; ++r) {
        const T *a = gate + r * stride, *b = up + r * stride;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) put(out + r * width + i, as<T>(get(a[i]) * sigmoid(get(a[i]))) * get(b[i]));
    }
}

// Its gradients: dgate = g up s (1 + x (1 - s)) with s = sigmoid(x), x = gate; dup = g silu(x).   all (rows, width)
template <class T>
void silu_backward(const T* g, const T* gate, const T* up, T* dgate, T* dup, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = r * width;
#pragma omp simd
        for (int64_t i = at; i < at + width; ++i) {
            const float x = get(gate[i]), s = sigmoid(x);
            put(dgate + i, as<T>(get(g[i]) * get(up[i])) * s * (1.0f + x * (1.0f - s)));
            put(dup + i, get(g[i]) * as<T>(x * s));
        }
    }
}

// Rotate a head (d channels) to its position: x * cos + turned * sin, every product rounded as torch does.
template <class T, class Out>
inline void rotate(const T* x, const T* cos, const T* sin, float sign, Out* out, int64_t d) {
    const int64_t half = d / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float a = get(x[i]), b = get(x[i + half]);
        put(out + i, as<T>(as<T>(a * get(cos[i])) + as<T>(-b * sign * get(sin[i]))));
        put(out + i + half, as<T>(as<T>(b * get(cos[i + half])) + as<T>(a * sign * get(sin[i + half]))));
    }
}

// Heads of tokens to their places in rows, turned to their positions on the way.
//   x (N, heads, d), a token every `stride` numbers; cos, sin (N, d) or null; token (B * T): which one stands there, -1: none, and
//   then zeros; out (B, heads, T, d)
template <class T>
void lay_heads(const T* x, const T* cos, const T* sin, const int64_t* token, T* out, int64_t B, int64_t places, int64_t heads, int64_t d,
               int64_t stride) {
#pragma omp parallel for schedule(static) if (B * places * heads * d > 8192)
    for (int64_t p = 0; p < B * places; ++p) {
        const int64_t n = token[p];
        for (int64_t h = 0; h < heads; ++h) {
            T* to = out + ((p / places * heads + h) * places + p % places) * d;
            if (n < 0) std::memset(to, 0, d * sizeof(T));
            else if (cos) rotate(x + n * stride + h * d, cos + n * d, sin + n * d, 1.0f, to, d);
            else std::memcpy(to, x + n * stride + h * d, d * sizeof(T));
        }
    }
}

// The way back: the sum over a token's places, turned back.
//   rows (B, heads, T, d); offsets (N + 1) into places (b * T + t); out (N, heads, d)
template <class T>
void collect_heads(const T* rows, const T* cos, const T* sin, const int64_t* offsets, const int64_t* places, T* out, int64_t N,
                   int64_t width, int64_t heads, int64_t d) {
#pragma omp parallel if (N * heads * d > 8192)
    {
        std::vector<float> sum(d);
        std::vector<T> once(d);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; ++n)
            for (int64_t h = 0; h < heads; ++h) {
                auto at = [&](int64_t k) { return rows + ((places[k] / width * heads + h) * width + places[k] % width) * d; };
                const T* from = at(offsets[n]);
                if (offsets[n + 1] - offsets[n] > 1) {
                    std::fill(sum.begin(), sum.end(), 0.0f);
                    for (int64_t k = offsets[n]; k < offsets[n + 1]; ++k) {
                        const T* x = at(k);
#pragma omp simd
                        for (int64_t i = 0; i < d; ++i) sum[i] += get(x[i]);
                    }
                    for (int64_t i = 0; i < d; ++i) put(once.data() + i, sum[i]);
                    from = once.data();
                }
                T* to = out + (n * heads + h) * d;
                if (cos) rotate(from, cos + n * d, sin + n * d, -1.0f, to, d);
                else std::memcpy(to, from, d * sizeof(T));
            }
    }
}

// softmax(scale * scores) in place, where a place sees itself and at most window - 1 before it (0: all before it); 0 elsewhere.
//   scores (blocks, T, T)
template <class T>
void causal_softmax(T* scores, float scale, int64_t blocks, int64_t width, int64_t window) {
#pragma omp parallel if (blocks * width * width > 8192)
    {
        std::vector<float> p(width);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < blocks * width; ++r) {
            T* row = scores + r * width;
            const int64_t end = r % width + 1, first = window && window < end ? end - window : 0;
            float most = -std::numeric_limits<float>::infinity(), total = 0;
#pragma omp simd reduction(max : most)
            for (int64_t i = first; i < end; ++i) most = std::max(most, get(row[i]));
#pragma omp simd reduction(+ : total)
            for (int64_t i = first; i < end; ++i) {
                p[i] = exponential((get(row[i]) - most) * scale);
                total += p[i];
            }
            const float share = 1.0f / total;
            std::memset(row, 0, first * sizeof(T));
#pragma omp simd
            for (int64_t i = first; i < end; ++i) put(row + i, p[i] * share);
            std::memset(row + end, 0, (width - end) * sizeof(T));
        }
    }
}

// The slope of the scores from that of the weights, in place: scale * weight * (g - sum(weight g)).   both (blocks, T, T)
template <class T>
void causal_softmax_backward(const T* weights, T* g, float scale, int64_t blocks, int64_t width, int64_t window) {
#pragma omp parallel for schedule(static) if (blocks * width * width > 8192)
    for (int64_t r = 0; r < blocks * width; ++r) {
        const T* w = weights + r * width;
        T* to = g + r * width;
        const int64_t end = r % width + 1, first = window && window < end ? end - window : 0;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = first; i < end; ++i) sum += get(w[i]) * get(to[i]);
        std::memset(to, 0, first * sizeof(T));
#pragma omp simd
        for (int64_t i = first; i < end; ++i) put(to + i, scale * get(w[i]) * (get(to[i]) - sum));
        std::memset(to + end, 0, (width - end) * sizeof(T));
    }
}

// sum over i of q[i] k[i], and out[i] = sum over s of w[s] v[s * d + i]: in registers where the compiler knows the width (WIDE, else 0).
#ifdef __AVX512F__
inline __m512 sixteen(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 sixteen(const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}
#endif
template <int WIDE, class T>
inline float dot(const float* q, const T* k, int64_t d) {
#ifdef __AVX512F__
    if constexpr (WIDE > 0) {
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; i < WIDE; i += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(q + i), sixteen(k + i), sum);
        return _mm512_reduce_add_ps(sum);
    }
#endif
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; ++i) sum += q[i] * get(k[i]);
    return sum;
}
template <int WIDE, class T>
inline void mixture(const float* w, const T* v, int64_t first, int64_t last, T* out, int64_t d) {
#ifdef __AVX512F__
    if constexpr (WIDE > 0) {
        __m512 parts[WIDE / 16];
        for (auto& part : parts) part = _mm512_setzero_ps();
        for (int64_t s = first; s <= last; ++s) {
            const __m512 share = _mm512_set1_ps(w[s]);
            for (int i = 0; i < WIDE / 16; ++i) parts[i] = _mm512_fmadd_ps(share, sixteen(v + s * d + i * 16), parts[i]);
        }
        float sum[WIDE];
        for (int i = 0; i < WIDE / 16; ++i) _mm512_storeu_ps(sum + i * 16, parts[i]);
        for (int64_t i = 0; i < WIDE; ++i) put(out + i, sum[i]);
        return;
    }
#endif
    constexpr int64_t BLOCK = 64;
    for (int64_t at = 0; at < d; at += BLOCK) {
        const int64_t count = std::min(BLOCK, d - at);
        float sum[BLOCK] = {};
        for (int64_t s = first; s <= last; ++s) {
            const T* from = v + s * d + at;
            const float share = w[s];
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) sum[i] += share * get(from[i]);
        }
        for (int64_t i = 0; i < count; ++i) put(out + at + i, sum[i]);
    }
}

// One query a row against the cache, whose slot `position` it fills first.
//   joined (rows, (H + 2G) * d): queries, keys, values; cos, sin (rows, d) or null where a layer has no positions;
//   keys, values (rows, G, slots, d); positions (rows); window: see at most that many latest slots, 0 is all of them;
//   out (rows, H * d)
template <class T, int WIDE>
void attend_wide(const T* joined, const T* cos, const T* sin, T* keys, T* values, const int64_t* positions, T* out, int64_t rows,
                 int64_t H, int64_t G, int64_t width, int64_t slots, int64_t window) {
    const int64_t d = WIDE ? WIDE : width;
    const int64_t shared = H / G;  // query heads on one key/value head
    const float scale = 1.0f / std::sqrt(float(d));
#pragma omp parallel
    {
        std::vector<float> query(shared * d), weight(shared * slots), turned(d);
#pragma omp for schedule(static) collapse(2)
        for (int64_t b = 0; b < rows; ++b) {
            for (int64_t g = 0; g < G; ++g) {
                const T* row = joined + b * (H + 2 * G) * d;
                const int64_t position = positions[b], first = window ? std::max<int64_t>(0, position - window + 1) : 0;
                T* key = keys + (b * G + g) * slots * d;
                T* value = values + (b * G + g) * slots * d;
                auto place = [&](const T* x, float* to) {
                    if (cos) rotate(x, cos + b * d, sin + b * d, 1.0f, to, d);
                    else
                        for (int64_t i = 0; i < d; ++i) to[i] = get(x[i]);
                };
                place(row + (H + g) * d, turned.data());
                for (int64_t i = 0; i < d; ++i) put(key + position * d + i, turned[i]);
                std::memcpy(value + position * d, row + (H + G + g) * d, d * sizeof(T));
                for (int64_t h = 0; h < shared; ++h) place(row + (g * shared + h) * d, query.data() + h * d);

                for (int64_t h = 0; h < shared; ++h) {
                    const float* q = query.data() + h * d;
                    float* w = weight.data() + h * slots;
                    for (int64_t s = first; s <= position; ++s) w[s] = as<T>(dot<WIDE>(q, key + s * d, d)) * scale;
                    float most = -std::numeric_limits<float>::infinity(), total = 0;
#pragma omp simd reduction(max : most)
                    for (int64_t s = first; s <= position; ++s) most = std::max(most, w[s]);
#pragma omp simd reduction(+ : total)
                    for (int64_t s = first; s <= position; ++s) {
                        w[s] = exponential(w[s] - most);
                        total += w[s];
                    }
                    float share = 1.0f / total;
#pragma omp simd
                    for (int64_t s = first; s <= position; ++s) w[s] = as<T>(w[s] * share);
                    mixture<WIDE>(w, value, first, position, out + (b * H + g * shared + h) * d, d);
                }
            }
        }
    }
}

template <class T>
void attend(const T* joined, const T* cos, const T* sin, T* keys, T* values, const int64_t* positions, T* out, int64_t rows,
            int64_t H, int64_t G, int64_t d, int64_t slots, int64_t window) {
    (d == 64 ? attend_wide<T, 64> : d == 128 ? attend_wide<T, 128> : attend_wide<T, 0>)(joined, cos, sin, keys, values, positions, out,
                                                                                        rows, H, G, d, slots, window);
}

// out = x W^T + b, made for the few rows of a decoding step; a prompt's many are as fast as oneDNN's.
// W (N, K) lies in panels of 16 outputs, the last filled up with zeros: for each pair of inputs the 16 pairs of weights, which one
// AVX512-BF16 instruction multiplies by one pair of x and adds to 16 sums. MULTIPLIES says whether this machine has it.
#ifdef __AVX512BF16__
constexpr int MULTIPLIES = 1;
template <int M, int P>  // rows and panels at once: M * P sums stay in registers
inline void tile(const bf16* x, int64_t K, const bf16* panels, const bf16* bias, bf16* out, int64_t stride, int64_t left) {
    __m512 sum[M][P];
    for (int m = 0; m < M; ++m)
        for (int p = 0; p < P; ++p) sum[m][p] = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 2) {
        __m512bh w[P];
        for (int p = 0; p < P; ++p) {
            w[p] = (__m512bh)_mm512_loadu_si512(panels + (p * K + k) * 16);
            _mm_prefetch((const char*)(panels + (p * K + k) * 16) + 4096, _MM_HINT_T0);  // weights come from memory at every step
        }
        for (int m = 0; m < M; ++m) {
            int32_t pair;
            std::memcpy(&pair, x + m * K + k, 4);
            for (int p = 0; p < P; ++p) sum[m][p] = _mm512_dpbf16_ps(sum[m][p], w[p], (__m512bh)_mm512_set1_epi32(pair));
        }
    }
    for (int p = 0; p < P; ++p) {
        const int64_t count = std::min<int64_t>(16, left - p * 16);
        for (int m = 0; m < M; ++m) {
            float s[16];
            _mm512_storeu_ps(s, sum[m][p]);
            for (int64_t i = 0; i < count; ++i) put(out + m * stride + p * 16 + i, s[i] + (bias ? get(bias[p * 16 + i]) : 0.0f));
        }
    }
}
#else
constexpr int MULTIPLIES = 0;
template <int M, int P>
inline void tile(const bf16* x, int64_t K, const bf16* panels, const bf16* bias, bf16* out, int64_t stride, int64_t left) {
    for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < std::min<int64_t>(P * 16, left); ++n) {
            float sum = 0;
            for (int64_t k = 0; k < K; ++k) sum += get(x[m * K + k]) * get(panels[(n / 16 * K + k / 2 * 2) * 16 + n % 16 * 2 + k % 2]);
            put(out + m * stride + n, sum + (bias ? get(bias[n]) : 0.0f));
        }
}
#endif

template <int M>
void panels_of(const bf16* x, const bf16* panels, const bf16* bias, bf16* out, int64_t N, int64_t K, int64_t first, int64_t last) {
    constexpr int P = M <= 4 ? 6 : M <= 6 ? 4 : M <= 8 ? 3 : M <= 12 ? 2 : 1;
    int64_t p = first;
    auto at = [&](auto tile) { tile(x, K, panels + p * K * 16, bias ? bias + p * 16 : nullptr, out + p * 16, N, N - p * 16); };
    for (; p + P <= last; p += P) at(tile<M, P>);
    for (; p < last; ++p) at(tile<M, 1>);
}

// x (rows, K), K even; bias (N) or null; out (rows, N)
void multiply(const bf16* x, const bf16* panels, const bf16* bias, bf16* out, int64_t rows, int64_t N, int64_t K) {
    using Part = void (*)(const bf16*, const bf16*, const bf16*, bf16*, int64_t, int64_t, int64_t, int64_t);
    static const Part parts[] = {nullptr,       panels_of<1>,  panels_of<2>,  panels_of<3>,  panels_of<4>,  panels_of<5>,
                                 panels_of<6>,  panels_of<7>,  panels_of<8>,  panels_of<9>,  panels_of<10>, panels_of<11>,
                                 panels_of<12>, panels_of<13>, panels_of<14>, panels_of<15>, panels_of<16>};
    const int64_t blocks = rows == 0 ? 0 : rows <= 16 ? 1 : (rows + 11) / 12;
    const int64_t all = (N + 15) / 16, step = 6;  // panels a thread takes at a time: they stay in its cache
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < all; first += step)
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t from = b * rows / blocks, to = (b + 1) * rows / blocks;
            parts[to - from](x + from * K, panels, bias, out + from * N, N, K, first, std::min(all, first + step));
        }
}

// Draw a token a row by inverse CDF from softmax(logits / temperature), and give its log-probability.
//   logits (rows, width); uniform (rows) in [0, 1); temperature 0 takes the likeliest, whose log-probability is at 1.
template <class T>
void draw(const T* logits, const double* uniform, float temperature, int64_t* tokens, float* logprobs, int64_t rows, int64_t width) {
    constexpr int64_t BLOCK = 512;
    const int64_t blocks = (width + BLOCK - 1) / BLOCK;
    const float heat = temperature == 0 ? 1.0f : temperature;
#pragma omp parallel
    {
        std::vector<double> sums(blocks);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const T* z = logits + r * width;
            float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
            for (int64_t i = 0; i < width; ++i) most = std::max(most, get(z[i]));
            double total = 0;
            int64_t last = 0;  // the last block with any mass: rounding never draws what has none
            for (int64_t b = 0; b < blocks; ++b) {
                float sum = 0;
                const int64_t end = std::min(width, (b + 1) * BLOCK);
#pragma omp simd reduction(+ : sum)
                for (int64_t i = b * BLOCK; i < end; ++i) sum += exponential((get(z[i]) - most) / heat);
                sums[b] = sum;
                total += sum;
                if (sum > 0) last = b;
            }
            int64_t token = 0;
            if (!(total > 0) || !(total <= double(width) * 2)) {  // a NaN, or nothing but infinities
                tokens[r] = 0;
                logprobs[r] = std::numeric_limits<float>::quiet_NaN();
                continue;
            }
            if (temperature == 0) {
                while (get(z[token]) != most && token < width - 1) ++token;
            } else {
                double left = uniform[r] * total;
                int64_t b = 0;
                while (b < last && left >= sums[b]) left -= sums[b++];
                const int64_t end = std::min(width, (b + 1) * BLOCK);
                int64_t likely = b * BLOCK;
                for (token = b * BLOCK; token < end; ++token) {
                    float p = exponential((get(z[token]) - most) / heat);
                    if (p > 0) likely = token;
                    if (left < p) break;
                    left -= p;
                }
                if (token == end) token = likely;
            }
            tokens[r] = token;
            logprobs[r] = float(double((get(z[token]) - most) / heat) - std::log(total));
        }
    }
}

// A row's softmax in numbers: its largest logit, log sum_i e^(x_i) and entropy, with x = (logit - largest) / temperature.
struct Softmax {
    float most, log_total, entropy;
};
template <class T>
inline Softmax softmax(const T* z, float inverse, int64_t width) {
    float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < width; ++i) most = std::max(most, get(z[i]));
    double total = 0, mean = 0;
    constexpr int64_t BLOCK = 1024;  // sums in float, a block at a time
    for (int64_t start = 0; start < width; start += BLOCK) {
        const int64_t end = std::min(width, start + BLOCK);
        float sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
        for (int64_t i = start; i < end; ++i) {
            float x = (get(z[i]) - most) * inverse, p = exponential(x);
            sum += p;
            weighted += p * std::max(x, -1e4f);  // e^x is 0 there, and 0 times infinity is not
        }
        total += sum;
        mean += weighted;
    }
    const double log_total = std::log(total);
    return {most, float(log_total), float(log_total - mean / total)};
}

// log softmax(logits / temperature) at each row's token, and the entropy of the row.   logits (rows, width)
template <class T>
void token_stats(const T* logits, const int64_t* tokens, float temperature, float* logprobs, float* entropy, int64_t rows, int64_t width) {
    const float inverse = 1.0f / temperature;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const T* z = logits + r * width;
        const Softmax s = softmax(z, inverse, width);
        logprobs[r] = (get(z[tokens[r]]) - s.most) * inverse - s.log_total;
        entropy[r] = s.entropy;
    }
}

// d (a * logprob + b * entropy) / d logits: (a (onehot - p) - b p (log p + entropy)) / temperature.   a, b (rows)
template <class T>
void token_slope(const T* logits, const int64_t* tokens, float temperature, const float* a, const float* b, T* out, int64_t rows,
                 int64_t width) {
    const float inverse = 1.0f / temperature;
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const T* z = logits + r * width;
        T* to = out + r * width;
        const Softmax s = softmax(z, inverse, width);
        const int64_t token = tokens[r];
        const float logprob = (get(z[token]) - s.most) * inverse - s.log_total;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            float x = (get(z[i]) - s.most) * inverse - s.log_total;
            put(to + i, -exponential(x) * (a[r] + b[r] * (std::max(x, -1e4f) + s.entropy)) * inverse);
        }
        put(to + token, (a[r] - exponential(logprob) * (a[r] + b[r] * (logprob + s.entropy))) * inverse);
    }
}

// Eight bits a number, one scale a row: x ~ scale * out.   x, out (rows, width); scales (rows)
template <class T>
void quantize(const T* x, int8_t* out, float* scales, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (int64_t r = 0; r < rows; ++r) {
        const T* from = x + r * width;
        int8_t* to = out + r * width;
        float most = 0, check = 0;
#pragma omp simd reduction(max : most) reduction(+ : check)
        for (int64_t i = 0; i < width; ++i) {
            most = std::max(most, std::fabs(get(from[i])));
            check += get(from[i]) * 0.0f;
        }
        if (check != 0) {  // something is not finite, and so will be what comes of it
            std::fill(to, to + width, int8_t(1));
            scales[r] = std::numeric_limits<float>::quiet_NaN();
            continue;
        }
        const float scale = most > 0 ? most / 127.0f : 1.0f, inverse = 1.0f / scale;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) to[i] = int8_t(std::nearbyint(get(from[i]) * inverse));
        scales[r] = scale;
    }
}

// Back from a product of two such: out = product * row * column (+ bias).   product, out (rows, width); bias may be null
template <class T>
void dequantize(const int32_t* product, const float* row, const float* column, const T* bias, T* out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (int64_t r = 0; r < rows; ++r) {
        const int32_t* from = product + r * width;
        T* to = out + r * width;
        const float scale = row[r];
        if (bias) {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) put(to + i, float(from[i]) * scale * column[i] + get(bias[i]));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) put(to + i, float(from[i]) * scale * column[i]);
        }
    }
}

}  // namespace

#define KERNELS(T, NAME)                                                                                                           \
    extern "C" void add_norm_##NAME(T* x, const T* y, const T* w, T* out, float* scales, int64_t rows, int64_t width, float eps) {   \
        add_norm(x, y, w, out, scales, rows, width, eps);                                                                          \
    }                                                                                                                              \
    extern "C" void norm_backward_##NAME(const T* g, const T* x, const T* w, const float* scales, T* dx, float* dw, int64_t rows,  \
                                         int64_t width) {                                                                          \
        norm_backward(g, x, w, scales, dx, dw, rows, width);                                                                       \
    }                                                                                                                              \
    extern "C" void silu_mul_##NAME(const T* gate, const T* up, T* out, int64_t rows, int64_t width, int64_t stride) {             \
        silu_mul(gate, up, out, rows, width, stride);                                                                              \
    }                                                                                                                              \
    extern "C" void silu_backward_##NAME(const T* g, const T* gate, const T* up, T* dgate, T* dup, int64_t rows, int64_t width) {  \
        silu_backward(g, gate, up, dgate, dup, rows, width);                                                                       \
    }                                                                                                                              \
    extern "C" void lay_heads_##NAME(const T* x, const T* cos, const T* sin, const int64_t* token, T* out, int64_t B, int64_t places,\
                                     int64_t heads, int64_t d, int64_t stride) {                                                   \
        lay_heads(x, cos, sin, token, out, B, places, heads, d, stride);                                                           \
    }                                                                                                                              \
    extern "C" void collect_heads_##NAME(const T* rows, const T* cos, const T* sin, const int64_t* offsets, const int64_t* places, \
                                         T* out, int64_t N, int64_t width, int64_t heads, int64_t d) {                             \
        collect_heads(rows, cos, sin, offsets, places, out, N, width, heads, d);                                                   \
    }                                                                                                                              \
    extern "C" void causal_softmax_##NAME(T* scores, float scale, int64_t blocks, int64_t width, int64_t window) {                 \
        causal_softmax(scores, scale, blocks, width, window);                                                                      \
    }                                                                                                                              \
    extern "C" void causal_softmax_backward_##NAME(const T* weights, T* g, float scale, int64_t blocks, int64_t width,             \
                                                   int64_t window) {                                                               \
        causal_softmax_backward(weights, g, scale, blocks, width, window);                                                         \
    }                                                                                                                              \
    extern "C" void attend_##NAME(const T* joined, const T* cos, const T* sin, T* keys, T* values, const int64_t* positions,       \
                                  T* out, int64_t rows, int64_t H, int64_t G, int64_t d, int64_t slots, int64_t window) {          \
        attend(joined, cos, sin, keys, values, positions, out, rows, H, G, d, slots, window);                                      \
    }                                                                                                                              \
    extern "C" void draw_##NAME(const T* logits, const double* uniform, float temperature, int64_t* tokens, float* logprobs,       \
                                int64_t rows, int64_t width) {                                                                     \
        draw(logits, uniform, temperature, tokens, logprobs, rows, width);                                                         \
    }                                                                                                                              \
    extern "C" void token_stats_##NAME(const T* logits, const int64_t* tokens, float temperature, float* logprobs, float* entropy,    \
                                       int64_t rows, int64_t width) {                                                              \
        token_stats(logits, tokens, temperature, logprobs, entropy, rows, width);                                                  \
    }                                                                                                                              \
    extern "C" void token_slope_##NAME(const T* logits, const int64_t* tokens, float temperature, const float* a, const float* b,  \
                                       T* out, int64_t rows, int64_t width) {                                                      \
        token_slope(logits, tokens, temperature, a, b, out, rows, width);                                                          \
    }                                                                                                                              \
    extern "C" void quantize_##NAME(const T* x, int8_t* out, float* scales, int64_t rows, int64_t width) {                         \
        quantize(x, out, scales, rows, width);                                                                                     \
    }                                                                                                                              \
    extern "C" void dequantize_##NAME(const int32_t* product, const float* row, const float* column, const T* bias, T* out,        \
                                      int64_t rows, int64_t width) {                                                               \
        dequantize(product, row, column, bias, out, rows, width);                                                                  \
    }

KERNELS(float, float32)
KERNELS(bf16, bfloat16)

extern "C" int multiplies() { return MULTIPLIES; }
extern "C" void multiply_bfloat16(const bf16* x, const bf16* panels, const bf16* bias, bf16* out, int64_t rows, int64_t N, int64_t K) {
    multiply(x, panels, bias, out, rows, N, K);
}
