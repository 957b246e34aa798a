/* Vectors as wide as the processor's, and the few functions of them that the loops share. */
#ifndef VECTORS_H
#define VECTORS_H
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__x86_64__) && !defined(__FMA__)
#error "this processor is older than the instructions that these loops are made of"
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4)));
#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE vec load(const float *p) { return *(const vec *)p; }
ALWAYS_INLINE void store(float *p, vec v) { *(vec *)p = v; }
ALWAYS_INLINE vec splat(float x) { return x - (vec){0}; }

/* a * b + c, rounded once. Named, and contraction turned off: in `a * b + c * d` the compiler would choose which
 * product to round, and choose anew wherever the function is inlined. */
ALWAYS_INLINE vec fma_lanes(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  float32x4_t left[2], right[2], sum[2];
  memcpy(left, &a, sizeof a), memcpy(right, &b, sizeof b), memcpy(sum, &c, sizeof c);
  for (int i = 0; i < 2; i++) sum[i] = vfmaq_f32(sum[i], left[i], right[i]);
  memcpy(&c, sum, sizeof c);
  return c;
#else
  for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

/* 0, 1, 2, ... */
ALWAYS_INLINE ivec lane_numbers(void) {
#if LANES == 16
  return (ivec){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
  return (ivec){0, 1, 2, 3, 4, 5, 6, 7};
#endif
}

ALWAYS_INLINE float sum_lanes(vec v) {
#if LANES == 16
  typedef float half __attribute__((vector_size(32)));
  half halves[2];
  memcpy(halves, &v, sizeof halves);
  half eight = halves[0] + halves[1];
#else
  vec eight = v;
#endif
  typedef float quarter __attribute__((vector_size(16)));
  quarter quarters[2];
  memcpy(quarters, &eight, sizeof quarters);
  quarter four = quarters[0] + quarters[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

/* Lanes without `bit` get sums of pairs of a, lanes with it sums of pairs of b. A macro, as a shuffle takes constants. */
#define FOLD(a, b, bit) (SHUFFLE(a, b, OWN_LANE, bit) + SHUFFLE(a, b, OTHER_LANE, bit))
#define OWN_LANE(lane, bit) ((lane) + ((lane) & (bit) ? LANES : 0))
#define OTHER_LANE(lane, bit) ((lane) + (bit) + ((lane) & (bit) ? LANES - 2 * (bit) : 0))
#define EIGHT(of, first, bit) of(first, bit), of(first + 1, bit), of(first + 2, bit), of(first + 3, bit), \
    of(first + 4, bit), of(first + 5, bit), of(first + 6, bit), of(first + 7, bit)
#if LANES == 16
#define SHUFFLE(a, b, of, bit) __builtin_shufflevector(a, b, EIGHT(of, 0, bit), EIGHT(of, 8, bit))
#else
#define SHUFFLE(a, b, of, bit) __builtin_shufflevector(a, b, EIGHT(of, 0, bit))
#endif

/* The sum of each of LANES vectors, which are overwritten. */
ALWAYS_INLINE vec sum_each(vec *sums) {
#if LANES == 16
  for (int k = 0; k < 8; k++) sums[k] = FOLD(sums[k], sums[k + 8], 8);
#endif
  for (int k = 0; k < 4; k++) sums[k] = FOLD(sums[k], sums[k + 4], 4);
  for (int k = 0; k < 2; k++) sums[k] = FOLD(sums[k], sums[k + 2], 2);
  return FOLD(sums[0], sums[1], 1);
}

/* a where the mask is all ones, b where it is 0. */
ALWAYS_INLINE vec choose(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

/* Of two lanes of which one is NAN, both give b's. */
ALWAYS_INLINE vec larger(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__FMA__)
  return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return choose(a > b, a, b);
#endif
}

ALWAYS_INLINE vec smaller(vec a, vec b) {
#if defined(__AVX512F__)
  return (vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__FMA__)
  return (vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return choose(a < b, a, b);
#endif
}

/* One bit for each lane that is at least `bound`. */
ALWAYS_INLINE uint32_t lanes_from(vec v, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_GE_OQ);
#elif defined(__FMA__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_GE_OQ));
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; i++) bits |= (uint32_t)(v[i] >= bound) << i;
  return bits;
#endif
}

ALWAYS_INLINE float largest_lane(vec v) {
  float top = v[0];
  for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
  return top;
}

/* exp: 2^n times a polynomial in the remainder (Cephes' coefficients); 0 below -87, and not beyond exp(88). */
ALWAYS_INLINE vec exp_lanes(vec x) {
  const float round_to_integer = 12582912.0f; /* 1.5 * 2^23: adding it leaves n in the lowest bits, and no fraction */
  ivec too_low = x <= splat(-87.0f);
  x = smaller(splat(88.0f), x);
  vec shifted = fma_lanes(x, splat(1.44269504f), splat(round_to_integer)), n = shifted - round_to_integer;
  vec r = fma_lanes(n, splat(2.12194440e-4f), fma_lanes(n, splat(-0.693359375f), x));
  const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f};
  vec p = splat(1.9875691500e-4f);
#pragma GCC unroll 7
  for (int i = 0; i < 7; i++) p = fma_lanes(p, r, splat(coefficients[i]));
  return (vec)((ivec)((uvec)p + ((uvec)shifted << 23)) & ~too_low); /* n added to the exponent */
}

#endif
