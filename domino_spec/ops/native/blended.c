/* Losses of rows of logits, which become their gradients in place: the C twin of `blended_rows_torch_` in blended.py,
 * which has the formulas.
 *
 * A row is copied once into float32 scratch of its thread, which stays in the nearest cache: its exponentials are computed once, and
 * probabilities are never written, only multiplied into what is made of them. Rows do not depend on each other, so
 * results do not depend on the number of threads.
 *
 * Built by build.py and called by bindings.py, which checks the arguments; blended.py says what they are.
 */
#include "cpu.h"
#include "vectors.h"

#define LOWEST -1e30f            /* stands for missing logits and -inf: its exponential is 0, its products are finite */
#define SUM_BLOCK (64 * LANES)   /* summed up before they join the total: long sums would lose low bits */
#define SMALLEST_ALPHA 1e-30f    /* blended.py's: less would come from probabilities that float32 cannot hold */

typedef uint16_t half_vec __attribute__((vector_size(2 * LANES), aligned(2)));

struct terms {
  float cross_entropy, kl, total_variation, log_acceptance, adaptive_eta; /* NAN: not adaptive */
};

struct softmax {
  float *exps, inverse, log_sum; /* exp(z - top), one over their sum, and its logarithm */
  float mean;                    /* of z - top, under the target's distribution or, without one, its own */
};

/* gradient_i = exps_i * (q_i < p_i ? below : above) - target * target_exps_i - label * [i is the label] */
struct slope {
  float above, below, target, label;
};

/* Lanes of a row of bfloat16 (half) or float32 from index i on; those past its end are LOWEST. */
ALWAYS_INLINE vec read_lanes(const int half, const void *row, int64_t i, int64_t width) {
  int64_t present = width - i;
  vec lanes = {0};
  if (half) {
    const uint16_t *from = (const uint16_t *)row + i;
    half_vec halves = {0};
    if (present >= LANES)
      halves = *(const half_vec *)from;
    else
      memcpy(&halves, from, present * sizeof *from);
    lanes = (vec)(__builtin_convertvector(halves, uvec) << 16);
  } else if (present >= LANES)
    lanes = load((const float *)row + i);
  else
    memcpy(&lanes, (const float *)row + i, present * sizeof(float));
  lanes = larger(splat(LOWEST), lanes); /* in this order NAN stays */
  return present >= LANES ? lanes : choose(lane_numbers() < (int32_t)present, lanes, splat(LOWEST));
}

/* Rounded to the nearest, ties to even. */
ALWAYS_INLINE half_vec to_half(vec lanes) {
#ifdef __AVX512BF16__
  return (half_vec)_mm512_cvtneps_pbh((__m512)lanes);
#else
  uvec bits = (uvec)lanes;
  return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, half_vec);
#endif
}

ALWAYS_INLINE void write_lanes(const int half, void *row, int64_t i, int64_t width, vec lanes) {
  int64_t room = width - i;
  if (half) {
    uint16_t *to = (uint16_t *)row + i;
    half_vec halves = to_half(lanes);
    if (room >= LANES)
      *(half_vec *)to = halves;
    else
      memcpy(to, &halves, room * sizeof *to);
  } else if (room >= LANES)
    store((float *)row + i, lanes);
  else
    memcpy((float *)row + i, &lanes, room * sizeof(float));
}

/* values[padded] = row (plus another's values); returns the largest. */
ALWAYS_INLINE float read_row_as(const int half, const void *row, const float *plus, int64_t width, float *values) {
  vec largest = splat(LOWEST);
  for (int64_t i = 0; i < width; i += LANES) {
    vec lanes = read_lanes(half, row, i, width);
    if (plus) lanes += load(plus + i);
    store(values + i, lanes);
    largest = larger(largest, lanes);
  }
  return largest_lane(largest);
}

static float read_row(int half, const void *row, const float *plus, int64_t width, float *values) {
  return half ? read_row_as(1, row, plus, width, values) : read_row_as(0, row, plus, width, values);
}

/* The softmax of values[padded], which become their exponentials. */
static struct softmax soften(float *values, float top, int64_t padded, const struct softmax *target) {
  vec total = splat(0.0f), total_products = splat(0.0f);
  for (int64_t start = 0; start < padded; start += SUM_BLOCK) {
    int64_t end = start + SUM_BLOCK < padded ? start + SUM_BLOCK : padded;
    vec sum = splat(0.0f), products = splat(0.0f);
    for (int64_t i = start; i < end; i += LANES) {
      vec value = load(values + i) - top, e = exp_lanes(value);
      store(values + i, e);
      sum += e;
      products = fma_lanes(target ? load(target->exps + i) : e, value, products);
    }
    total += sum;
    total_products += products;
  }
  float sum = sum_lanes(total), inverse = 1.0f / sum;
  return (struct softmax){values, inverse, __builtin_logf(sum),
                          sum_lanes(total_products) * (target ? target->inverse : inverse)};
}

/* alpha = sum min(p, q); returns the sum of q where q < p. */
static float overlap(const struct softmax *draft, const struct softmax *target, int64_t padded, float *alpha) {
  vec total = splat(0.0f), total_below = splat(0.0f);
  for (int64_t start = 0; start < padded; start += SUM_BLOCK) {
    int64_t end = start + SUM_BLOCK < padded ? start + SUM_BLOCK : padded;
    vec sum = splat(0.0f), sum_below = splat(0.0f);
    for (int64_t i = start; i < end; i += LANES) {
      vec q = load(draft->exps + i) * draft->inverse, p = load(target->exps + i) * target->inverse;
      sum += smaller(q, p);
      sum_below += (vec)((ivec)q & (q < p));
    }
    total += sum;
    total_below += sum_below;
  }
  *alpha = sum_lanes(total);
  return sum_lanes(total_below);
}

/* Loss of one row whose label is at z - top = label_value, and its gradient, to be scaled. */
static float loss_and_slope(const struct terms *terms, const struct softmax *draft, float label_value,
                            const struct softmax *target, int64_t padded, float scale, struct slope *slope) {
  float loss = -terms->cross_entropy * (label_value - draft->log_sum), kl = terms->kl, tv = terms->total_variation;
  float pull = 0.0f, below = 0.0f, alpha = 1.0f;
  int adaptive = terms->adaptive_eta == terms->adaptive_eta;
  if (target && (adaptive || tv != 0.0f || terms->log_acceptance != 0.0f)) {
    below = overlap(draft, target, padded, &alpha);
    if (alpha < SMALLEST_ALPHA) alpha = SMALLEST_ALPHA;
    if (adaptive) {
      float far = __builtin_expf(-terms->adaptive_eta * alpha);
      kl += far;
      tv += 1.0f - far;
    }
    pull = tv + terms->log_acceptance / alpha;
    loss += tv * (1.0f - alpha) - terms->log_acceptance * __builtin_logf(alpha);
  }
  if (target) loss += kl * ((target->mean - target->log_sum) - (draft->mean - draft->log_sum));
  float above = terms->cross_entropy + kl + pull * below;
  *slope = (struct slope){scale * above * draft->inverse, scale * (above - pull) * draft->inverse,
                          target ? scale * kl * target->inverse : 0.0f, scale * terms->cross_entropy};
  return loss;
}

ALWAYS_INLINE vec slope_lanes(const struct slope *slope, const struct softmax *draft, const struct softmax *target,
                              int64_t i, ivec at_label) {
  vec e = load(draft->exps + i), subtracted = (vec)((ivec)splat(slope->label) & at_label);
  if (!target) return e * slope->above - subtracted;
  vec target_e = load(target->exps + i);
  ivec below = e * draft->inverse < target_e * target->inverse;
  vec factor = choose(below, splat(slope->below), splat(slope->above));
  return fma_lanes(e, factor, fma_lanes(target_e, splat(-slope->target), -subtracted));
}

/* Gradients of one row; the base logits are in the final ones too, so they get both. */
ALWAYS_INLINE void write_row_as(const int half, const struct softmax *drafts, const struct softmax *target,
                                const struct slope *slopes, int64_t label, int64_t width, void *base,
                                void *correction) {
  const ivec lane = lane_numbers();
  for (int64_t i = 0; i < width; i += LANES) {
    ivec at_label = lane == (int32_t)(label - i);
    vec gradient = slope_lanes(&slopes[0], &drafts[0], target, i, at_label);
    if (correction) {
      vec final = slope_lanes(&slopes[1], &drafts[1], target, i, at_label);
      write_lanes(half, correction, i, width, final);
      gradient += final;
    }
    write_lanes(half, base, i, width, gradient);
  }
}

static void write_row(int half, const struct softmax *drafts, const struct softmax *target, const struct slope *slopes,
                      int64_t label, int64_t width, void *base, void *correction) {
  if (half)
    write_row_as(1, drafts, target, slopes, label, width, base, correction);
  else
    write_row_as(0, drafts, target, slopes, label, width, base, correction);
}

/* One row; scratch is room for three rows, padded. Its final loss is not written if there is no correction. */
static void blend_row(int half, void *base, void *correction, int target_half, const void *target, int64_t label,
                      float weight, float lambda_base, const struct terms *terms, int64_t width, int64_t padded,
                      float *scratch, float *base_loss, float *final_loss) {
  const int sides = correction ? 2 : 1;
  void *rows[2] = {base, correction};
  float *values[3] = {scratch, scratch + padded, scratch + 2 * padded}, *losses[2] = {base_loss, final_loss}, tops[2];
  float scales[2] = {correction ? lambda_base * weight : weight, (1.0f - lambda_base) * weight};
  struct softmax drafts[2], softened_target, *soft = NULL;
  struct slope slopes[2];
  if (target) {
    float top = read_row(target_half, target, NULL, width, values[2]);
    softened_target = soften(values[2], top, padded, NULL);
    soft = &softened_target;
  }
  for (int side = 0; side < sides; side++)
    tops[side] = read_row(half, rows[side], side ? values[0] : NULL, width, values[side]);
  for (int side = 0; side < sides; side++) {
    float label_value = values[side][label] - tops[side];
    drafts[side] = soften(values[side], tops[side], padded, soft);
    *losses[side] = loss_and_slope(terms, &drafts[side], label_value, soft, padded, scales[side], &slopes[side]);
  }
  write_row(half, drafts, soft, slopes, label, width, base, correction);
}

/* base, correction and target are [rows, width] of bfloat16 (half) or float32, the last two may be missing; labels,
 * weights and losses are [rows]. */
int64_t blended_rows(int64_t half, void *base, void *correction, int64_t target_half, const void *target,
                     const int64_t *labels, const float *weights, int64_t rows, int64_t width, float lambda_base,
                     float cross_entropy, float kl, float total_variation, float log_acceptance, float adaptive_eta,
                     float *base_losses, float *final_losses) {
  const struct terms terms = {cross_entropy, kl, total_variation, log_acceptance, adaptive_eta};
  int64_t padded = (width + LANES - 1) / LANES * LANES;
  int64_t stride = width * (half ? 2 : 4), target_stride = width * (target_half ? 2 : 4); /* bytes */
  int64_t status = DONE;
  for (int64_t r = 0; r < rows; r++)
    if (labels[r] < 0 || labels[r] >= width) return BAD_INDEX;
#pragma omp parallel
  {
    float *scratch = aligned_alloc(sizeof(vec), 3 * padded * sizeof(float)); /* no vector straddles cache lines */
    if (!scratch) {
#pragma omp atomic write
      status = NO_MEMORY;
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
      if (!scratch) continue;
      blend_row(half, (char *)base + r * stride, correction ? (char *)correction + r * stride : NULL, target_half,
                target ? (const char *)target + r * target_stride : NULL, labels[r], weights[r], lambda_base, &terms,
                width, padded, scratch, base_losses + r, final_losses + r);
    }
    free(scratch);
  }
  return status;
}
