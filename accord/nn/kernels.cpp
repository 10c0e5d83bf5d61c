// What stands between the matrix products, in sampling and in training: each kernel is one pass over memory, or two.
//
// Plain loops that a compiler vectorises. The same arithmetic stands in torch where a kernel is called, and is the
// reference: results are rounded to the activations' type where torch rounds them, and tests hold the two together.
// Every array is contiguous unless a stride is given. T is float or bf16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

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

// All heads of some tokens; sign -1 turns them back.   x, out (tokens, heads, d); cos, sin (tokens, d)
template <class T>
void rotate_heads(const T* x, const T* cos, const T* sin, float sign, T* out, int64_t tokens, int64_t heads, int64_t d) {
#pragma omp parallel for schedule(static) if (tokens * heads * d > 8192)
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t at = (t * heads + h) * d;
            rotate(x + at, cos + t * d, sin + t * d, sign, out + at, d);
        }
}

// One query a row against the cache, whose slot `position` it fills first.
//   joined (rows, (H + 2G) * d): queries, keys, values; cos, sin (rows, d) or null where a layer has no positions;
//   keys, values (rows, G, slots, d); positions (rows); window: see at most that many latest slots, 0 is all of them;
//   out (rows, H * d)
template <class T>
void attend(const T* joined, const T* cos, const T* sin, T* keys, T* values, const int64_t* positions, T* out, int64_t rows,
            int64_t H, int64_t G, int64_t d, int64_t slots, int64_t window) {
    const int64_t shared = H / G;  // query heads on one key/value head
    const float scale = 1.0f / std::sqrt(float(d));
#pragma omp parallel
    {
        std::vector<float> query(shared * d), weight(shared * slots), sum(shared * d), turned(d);
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

                for (int64_t s = first; s <= position; ++s) {
                    const T* k = key + s * d;
                    for (int64_t h = 0; h < shared; ++h) {
                        const float* q = query.data() + h * d;
                        float dot = 0;
#pragma omp simd reduction(+ : dot)
                        for (int64_t i = 0; i < d; ++i) dot += q[i] * get(k[i]);
                        weight[h * slots + s] = as<T>(dot) * scale;
                    }
                }
                for (int64_t h = 0; h < shared; ++h) {
                    float* w = weight.data() + h * slots;
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
                }
                std::fill(sum.begin(), sum.end(), 0.0f);
                for (int64_t s = first; s <= position; ++s) {
                    const T* v = value + s * d;
                    for (int64_t h = 0; h < shared; ++h) {
                        float w = weight[h * slots + s], *to = sum.data() + h * d;
#pragma omp simd
                        for (int64_t i = 0; i < d; ++i) to[i] += w * get(v[i]);
                    }
                }
                T* to = out + (b * H + g * shared) * d;
                for (int64_t i = 0; i < shared * d; ++i) put(to + i, sum[i]);
            }
        }
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
    extern "C" void rotate_heads_##NAME(const T* x, const T* cos, const T* sin, float sign, T* out, int64_t tokens, int64_t heads, \
                                        int64_t d) {                                                                               \
        rotate_heads(x, cos, sin, sign, out, tokens, heads, d);                                                                    \
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
