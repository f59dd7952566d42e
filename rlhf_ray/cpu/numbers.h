// bfloat16 as its 16 bits, and an exponential that compilers turn into vector instructions.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float from_bf16(bf16 bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// To the nearest, ties to even. A NaN stays one, as long as not all of its digits are in the lower half: ours never are.
static inline bf16 to_bf16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    return (bf16)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// exp(x) to 2 units in the last place, 0 below -87.7, NaN of NaN: x = n log 2 + r with |r| <= log 2 / 2, exp(r) by its series to
// r^7. With n = -127 the factor 2^n is 0.
static inline float exp_of(float x) {
    float limited = x < -88.0f ? -88.0f : x;
    limited = limited > 88.0f ? 88.0f : limited;
    float n = rintf(limited * 1.44269504f);
    float r = fmaf(n, -0.693359375f, limited);
    r = fmaf(n, 2.12194440e-4f, r);
    float series = 1.0f / 5040;
    series = fmaf(series, r, 1.0f / 720);
    series = fmaf(series, r, 1.0f / 120);
    series = fmaf(series, r, 1.0f / 24);
    series = fmaf(series, r, 1.0f / 6);
    series = fmaf(series, r, 0.5f);
    series = fmaf(series, r, 1.0f);
    series = fmaf(series, r, 1.0f);
    int32_t power = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &power, sizeof scale);
    return series * scale;
}
