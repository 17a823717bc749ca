// Group normalisation, scale and shift, SiLU and dropout in one pass, and its gradient: see norm_silu_cpu.py.
//
// Arrays are [batch, positions, channels]. A thread takes some groups of one sample at a time and nobody else
// touches those, so results do not depend on how many threads there are.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

// Pointers are handed on in structures by value, lest the compiler think that what is stored may change them.

enum {
    ROWS = 64,       // positions that are summed in float32, before the sum goes on in float64
    SMALL = 1 << 14  // elements for which no other thread is woken
};

// Everything of one call; norm_silu_cpu.py has the same fields.
typedef struct {
    const void *x;              // float32 or bfloat16
    const float *gain, *bias;   // [batch, channels]
    float *mean, *rstd;         // [batch, groups]
    const void *gradient;       // of the result, like x; forward does not look at it
    void *out;                  // the result, or the gradient of x
    float *g_gain, *g_bias;     // [batch, channels], of backward
    double *scratch;            // [threads, 6 * channels + 4]
    int64_t batch, positions, channels, groups;
    uint64_t seed;              // decides what is dropped
    float eps, growth;          // added to the variance; the factor of what dropout keeps
    int32_t dropped;            // of 65,536 elements
    int32_t bfloat16, silu, threads;
} Norm;

// Groups that a thread takes: n channels from c0 of sample b, its first element at `base`.
typedef struct {
    int64_t b, c0, n, base;
    double *totals, *totals_x;
    float *sums, *sums_x, *mean, *slope, *ones, *along;  // each for a channel
    uint32_t *draws;  // room for 16 random bits a channel, and for 8 channels more
} Part;

INLINE float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float load(const void *x, int64_t i, int bfloat16)
{
    return bfloat16 ? from_bits((uint32_t)((const uint16_t *)x)[i] << 16) : ((const float *)x)[i];
}

INLINE void store(void *x, int64_t i, float value, int bfloat16)
{
    if (!bfloat16) {
        ((float *)x)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // ties to even
    ((uint16_t *)x)[i] = value == value ? nearest : 0x7fc0;
}

// 1 / (1 + exp(-h)), exp by the polynomial of the Cephes library's expf.
INLINE float sigmoid(float h)
{
    float x = -h;
    x = x > 88 ? 88 : x;
    x = x < -87 ? -87 : x;
    const float n = rintf(x * 1.44269504f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    return 1 / (1 + p * from_bits((uint32_t)((int32_t)n + 127) << 23));
}

INLINE float silu_slope(float h)
{
    const float s = sigmoid(h);
    return s * (1 + h * (1 - s));
}

// 16 random bits for each channel of a row: Philox4x32-7 ("Parallel Random Numbers: As Easy as 1, 2, 3", Salmon et
// al., 2011), whose every call gives 128, counted by the sample and position and by eighths of channels.
INLINE const uint16_t *draw(const Norm norm, const Part part, int64_t p)
{
    const int64_t row = part.b * norm.positions + p, first = part.c0 / 8, last = (part.c0 + part.n + 7) / 8;
    const uint64_t seed = norm.seed;
    uint32_t *draws = part.draws;
#pragma omp simd
    for (int64_t k = 0; k < last - first; k++) {
        uint32_t a = k + first, b = row, c = row >> 32, d = 0;
        uint32_t key = seed, other_key = seed >> 32;
#pragma GCC unroll 7
        for (int round = 0; round < 7; round++) {
            const uint64_t from_a = (uint64_t)a * 0xD2511F53, from_c = (uint64_t)c * 0xCD9E8D57;
            a = (uint32_t)(from_c >> 32) ^ b ^ key;
            c = (uint32_t)(from_a >> 32) ^ d ^ other_key;
            b = from_c;
            d = from_a;
            key += 0x9E3779B9;
            other_key += 0xBB67AE85;
        }
        draws[4 * k] = a;
        draws[4 * k + 1] = b;
        draws[4 * k + 2] = c;
        draws[4 * k + 3] = d;
    }
    return (const uint16_t *)draws + part.c0 % 8;
}

INLINE void add_to(double *totals, float *sums, int64_t n)
{
    for (int64_t c = 0; c < n; c++) {
        totals[c] += sums[c];
        sums[c] = 0;
    }
}

// For each channel of the part the mean over its group, totals being sums over positions.
INLINE void mean_of_groups(const Norm norm, const Part part, const double *totals, float *means)
{
    const int64_t width = norm.channels / norm.groups;
    for (int64_t first = 0; first < part.n; first += width) {
        double total = 0;
        for (int64_t c = first; c < first + width; c++) total += totals[c];
        const float mean = total / ((double)width * norm.positions);
        for (int64_t c = first; c < first + width; c++) means[c] = mean;
    }
}

INLINE void forward(const Norm norm, const Part part, const int bfloat16, const int silu, const int dropout)
{
    const int64_t n = part.n, width = norm.channels / norm.groups, first = part.b * norm.channels + part.c0;
    const float *gain = norm.gain + first, *bias = norm.bias + first, growth = norm.growth;
    const int32_t dropped = norm.dropped;
    float *sums = part.sums, *mean = part.mean, *slope = part.slope;
    memset(part.totals, 0, n * sizeof(double));
    memset(sums, 0, n * sizeof(float));
    for (int64_t p = 0; p < norm.positions; p++) {
        const int64_t row = part.base + p * norm.channels;
#pragma omp simd
        for (int64_t c = 0; c < n; c++) sums[c] += load(norm.x, row + c, bfloat16);
        if (p % ROWS == ROWS - 1) add_to(part.totals, sums, n);
    }
    add_to(part.totals, sums, n);
    mean_of_groups(norm, part, part.totals, mean);

    memset(part.totals, 0, n * sizeof(double));
    for (int64_t p = 0; p < norm.positions; p++) {
        const int64_t row = part.base + p * norm.channels;
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            const float centred = load(norm.x, row + c, bfloat16) - mean[c];
            sums[c] += centred * centred;
        }
        if (p % ROWS == ROWS - 1) add_to(part.totals, sums, n);
    }
    add_to(part.totals, sums, n);
    mean_of_groups(norm, part, part.totals, slope);
    for (int64_t c = 0; c < n; c++) {
        const float rstd = 1 / sqrtf(slope[c] + norm.eps);
        const int64_t group = part.b * norm.groups + (part.c0 + c) / width;
        norm.mean[group] = mean[c];
        norm.rstd[group] = rstd;
        slope[c] = rstd * gain[c];
    }

    for (int64_t p = 0; p < norm.positions; p++) {
        const int64_t row = part.base + p * norm.channels;
        const uint16_t *draws = dropout ? draw(norm, part, p) : NULL;
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            float h = (load(norm.x, row + c, bfloat16) - mean[c]) * slope[c] + bias[c];
            if (silu) h *= sigmoid(h);
            if (dropout) h *= draws[c] < dropped ? 0 : growth;
            store(norm.out, row + c, h, bfloat16);
        }
    }
}

INLINE void backward(const Norm norm, const Part part, const int bfloat16, const int silu, const int dropout)
{
    const int64_t n = part.n, width = norm.channels / norm.groups, first = part.b * norm.channels + part.c0;
    const float *gain = norm.gain + first, *bias = norm.bias + first, growth = norm.growth;
    const int32_t dropped = norm.dropped;
    const float *rstd = norm.rstd + part.b * norm.groups + part.c0 / width;
    float *sums = part.sums, *sums_x = part.sums_x, *mean = part.mean, *slope = part.slope;
    float *ones = part.ones, *along = part.along;
    for (int64_t c = 0; c < n; c++) {
        mean[c] = norm.mean[part.b * norm.groups + (part.c0 + c) / width];
        slope[c] = rstd[c / width] * gain[c];
        part.totals[c] = part.totals_x[c] = sums[c] = sums_x[c] = 0;
    }
    for (int64_t p = 0; p < norm.positions; p++) {
        const int64_t row = part.base + p * norm.channels;
        const uint16_t *draws = dropout ? draw(norm, part, p) : NULL;
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            const float centred = load(norm.x, row + c, bfloat16) - mean[c];
            float g = load(norm.gradient, row + c, bfloat16);
            if (dropout) g *= draws[c] < dropped ? 0 : growth;
            if (silu) g *= silu_slope(centred * slope[c] + bias[c]);
            sums[c] += g;
            sums_x[c] += g * centred;
        }
        if (p % ROWS == ROWS - 1) {
            add_to(part.totals, sums, n);
            add_to(part.totals_x, sums_x, n);
        }
    }
    add_to(part.totals, sums, n);
    add_to(part.totals_x, sums_x, n);

    // What the mean and the variance take away.
    for (int64_t c = 0; c < n; c++) {
        const double normed = part.totals_x[c] * rstd[c / width];
        norm.g_bias[first + c] = part.totals[c];
        norm.g_gain[first + c] = normed;
        part.totals[c] *= slope[c];
        part.totals_x[c] = normed * slope[c] * rstd[c / width];
    }
    mean_of_groups(norm, part, part.totals, ones);
    mean_of_groups(norm, part, part.totals_x, along);
    for (int64_t p = 0; p < norm.positions; p++) {
        const int64_t row = part.base + p * norm.channels;
        const uint16_t *draws = dropout ? draw(norm, part, p) : NULL;
#pragma omp simd
        for (int64_t c = 0; c < n; c++) {
            const float centred = load(norm.x, row + c, bfloat16) - mean[c];
            float g = load(norm.gradient, row + c, bfloat16);
            if (dropout) g *= draws[c] < dropped ? 0 : growth;
            if (silu) g *= silu_slope(centred * slope[c] + bias[c]);
            store(norm.out, row + c, g * slope[c] - ones[c] - centred * along[c], bfloat16);
        }
    }
}

// A function whose last three arguments are known when it is compiled.
INLINE void run(const Norm norm, const Part part, int back, int bfloat16, int silu, int dropout)
{
    if (back)
        backward(norm, part, bfloat16, silu, dropout);
    else
        forward(norm, part, bfloat16, silu, dropout);
}

INLINE void for_each_part(const Norm *norm, const int back)
{
    if (!norm->batch) return;
    int64_t parts = (4 * norm->threads + norm->batch - 1) / norm->batch;  // of a sample
    parts = parts < norm->groups ? parts : norm->groups;
    const int64_t channels = norm->channels, width = channels / norm->groups;
#pragma omp parallel for collapse(2) schedule(static) num_threads(norm->threads) \
    if (norm->batch * norm->positions * channels > SMALL)
    for (int64_t b = 0; b < norm->batch; b++) {
        for (int64_t k = 0; k < parts; k++) {
            const int64_t c0 = norm->groups * k / parts * width, c1 = norm->groups * (k + 1) / parts * width;
            double *totals = norm->scratch + omp_get_thread_num() * (6 * channels + 4);
            float *sums = (float *)(totals + 2 * channels);
            const Part part = {
                b, c0, c1 - c0, b * norm->positions * channels + c0, totals, totals + channels, sums,
                sums + channels, sums + 2 * channels, sums + 3 * channels, sums + 4 * channels, sums + 5 * channels,
                (uint32_t *)(sums + 6 * channels)
            };
            switch (norm->bfloat16 * 4 + norm->silu * 2 + (norm->dropped > 0)) {
                case 0: run(*norm, part, back, 0, 0, 0); break;
                case 1: run(*norm, part, back, 0, 0, 1); break;
                case 2: run(*norm, part, back, 0, 1, 0); break;
                case 3: run(*norm, part, back, 0, 1, 1); break;
                case 4: run(*norm, part, back, 1, 0, 0); break;
                case 5: run(*norm, part, back, 1, 0, 1); break;
                case 6: run(*norm, part, back, 1, 1, 0); break;
                case 7: run(*norm, part, back, 1, 1, 1); break;
            }
        }
    }
}

void norm_silu_forward(const Norm *norm) { for_each_part(norm, 0); }
void norm_silu_backward(const Norm *norm) { for_each_part(norm, 1); }
