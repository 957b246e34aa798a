/* Float32 loops of a decoder pass over few rows: products, norms, rotary positions, SwiGLU, attention.
 *
 * A verify pass multiplies a handful of rows by every weight, so its time goes into reading weights from memory; each
 * weight is read once for all rows. Every output row is computed in the same order whatever the number of rows:
 * a token verified among eight others gets the bits it would have got alone.
 *
 * Built by build.py and called by bindings.py, which checks the arguments and says what they are.
 */
#include "cpu.h"
#include "vectors.h"

#ifdef _OPENMP
#include <omp.h>
int64_t uses_threads(void) { return 1; }
#else
static int omp_get_max_threads(void) { return 1; }
int64_t uses_threads(void) { return 0; }
#endif

#if LANES == 16
#define MAX_TILE 12 /* rows whose two accumulators each fit the registers, beside two weights and a broadcast */
#else
#define MAX_TILE 6
#endif
#define PANEL (2 * LANES)
#define SUM_BLOCK 64 /* products summed up before they join the total: long sums would lose low bits */

#define TRANSPOSED 64    /* inputs that a thread transposes at a time */
#define AHEAD 32         /* steps that weights are fetched in advance; processors do not look so far ahead */
#define QUERY_ROWS 4     /* of attention, at once in registers */
#define VALUE_VECTORS 4  /* of a value, at once in registers */
#define SHARED_ROWS 32   /* of attention, that take turns at keys and values while those are in the nearest cache */
#define VALUE_BLOCK 64   /* values that do so */
#define FEW_ROWS 8       /* of attention; fewer are not worth reading keys and values for once more */

int64_t panel_width(void) { return PANEL; }
int64_t lanes(void) { return LANES; }

/* y[rows, columns] = transposed inputs x[inputs, rows], times one panel [inputs, PANEL], plus bias[PANEL] if there is one. */
ALWAYS_INLINE void tile(const int rows, const float *restrict x, int64_t inputs, const float *restrict panel,
                        const float *bias, float *y, int64_t y_stride, int64_t columns) {
  vec totals[MAX_TILE][2];
  for (int r = 0; r < rows; r++)
    for (int side = 0; side < 2; side++) totals[r][side] = bias ? load(bias + side * LANES) : splat(0.0f);
  for (int64_t start = 0; start < inputs; start += SUM_BLOCK) {
    int64_t end = start + SUM_BLOCK < inputs ? start + SUM_BLOCK : inputs;
    vec sums[MAX_TILE][2];
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = splat(0.0f);
    for (int64_t k = start; k < end; k++, x += rows, panel += PANEL) {
      __builtin_prefetch(panel + AHEAD * PANEL);
      __builtin_prefetch(panel + AHEAD * PANEL + LANES);
      vec left = load(panel), right = load(panel + LANES);
#pragma GCC unroll 12
      for (int r = 0; r < rows; r++) {
        vec input = splat(x[r]);
        sums[r][0] = fma_lanes(left, input, sums[r][0]);
        sums[r][1] = fma_lanes(right, input, sums[r][1]);
      }
    }
    for (int r = 0; r < rows; r++)
      for (int side = 0; side < 2; side++) totals[r][side] += sums[r][side];
  }
  for (int r = 0; r < rows; r++) memcpy(y + r * y_stride, totals[r], columns * sizeof(float));
}

/* x[rows, inputs] to transposed[inputs, rows], which one pointer can walk; the part from..to of the inputs. */
ALWAYS_INLINE void transpose(const int rows, const float *restrict x, int64_t inputs, int64_t from, int64_t to,
                        float *restrict transposed) {
  for (int64_t k = from; k < to; k++)
    for (int r = 0; r < rows; r++) transposed[k * rows + r] = x[r * inputs + k];
}

/* A number of rows known to the compiler keeps a tile's sums in registers. */
#if MAX_TILE == 12
#define FOR_ROWS(count, call) \
  switch (count) { \
    case 1: call(1); break; case 2: call(2); break; case 3: call(3); break; case 4: call(4); break; \
    case 5: call(5); break; case 6: call(6); break; case 7: call(7); break; case 8: call(8); break; \
    case 9: call(9); break; case 10: call(10); break; case 11: call(11); break; case 12: call(12); break; \
  }
#else
#define FOR_ROWS(count, call) \
  switch (count) { \
    case 1: call(1); break; case 2: call(2); break; case 3: call(3); break; \
    case 4: call(4); break; case 5: call(5); break; case 6: call(6); break; \
  }
#endif

static void any_transpose(int64_t rows, const float *x, int64_t inputs, int64_t from, int64_t to, float *transposed) {
#define TRANSPOSE(n) transpose(n, x, inputs, from, to, transposed)
  FOR_ROWS(rows, TRANSPOSE)
#undef TRANSPOSE
}

static void any_tile(int64_t rows, const float *x, int64_t inputs, const float *panel, const float *bias, float *y,
                     int64_t y_stride, int64_t columns) {
#define TILE(n) tile(n, x, inputs, panel, bias, y, y_stride, columns)
  FOR_ROWS(rows, TILE)
#undef TILE
}

/* `transposed` is room for rows * inputs values. */
void linear(const float *x, int64_t rows, int64_t inputs, const float *panels, const float *bias, int64_t outputs,
            float *transposed, float *y) {
  int64_t num_panels = (outputs + PANEL - 1) / PANEL, num_tiles = (rows + MAX_TILE - 1) / MAX_TILE;
#pragma omp parallel
  {
#pragma omp for schedule(static) collapse(2)
    for (int64_t t = 0; t < num_tiles; t++)
      for (int64_t from = 0; from < inputs; from += TRANSPOSED) {
        int64_t first = rows * t / num_tiles, count = rows * (t + 1) / num_tiles - first;
        int64_t to = from + TRANSPOSED < inputs ? from + TRANSPOSED : inputs;
        any_transpose(count, x + first * inputs, inputs, from, to, transposed + first * inputs);
      }
#pragma omp for schedule(static)
    for (int64_t p = 0; p < num_panels; p++) {
      int64_t columns = outputs - p * PANEL < PANEL ? outputs - p * PANEL : PANEL;
      for (int64_t t = 0; t < num_tiles; t++) {
        int64_t first = rows * t / num_tiles, count = rows * (t + 1) / num_tiles - first;
        any_tile(count, transposed + first * inputs, inputs, panels + p * PANEL * inputs, bias ? bias + p * PANEL : NULL,
                 y + first * outputs + p * PANEL, outputs, columns);
      }
    }
  }
}

/* Rows of `width` values, `groups` of them side by side every `stride` values; y may be x. */
void rms_norm(const float *x, int64_t rows, int64_t stride, int64_t groups, int64_t width, const float *weight,
              float eps, float *y) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t g = 0; g < groups; g++) {
      const float *in = x + r * stride + g * width;
      float *out = y + r * stride + g * width;
      vec squares = splat(0.0f);
      for (int64_t i = 0; i < width; i += LANES) squares = fma_lanes(load(in + i), load(in + i), squares);
      float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / width + eps);
      for (int64_t i = 0; i < width; i += LANES) store(out + i, load(in + i) * scale * load(weight + i));
    }
}

/* RoPE in its half-split form, in place, on the first `rotary` values of `heads` heads at the start of every row. */
void rotate(float *x, int64_t rows, int64_t stride, int64_t heads, int64_t width, int64_t rotary, const float *cos,
            const float *sin) {
  int64_t half = rotary / 2;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t h = 0; h < heads; h++) {
      float *left = x + r * stride + h * width, *right = left + half;
      const float *c = cos + r * rotary, *s = sin + r * rotary;
      for (int64_t i = 0; i < half; i++) {
        float a = left[i], b = right[i];
        left[i] = a * c[i] - b * s[i];
        right[i] = b * c[half + i] + a * s[half + i];
      }
    }
}

/* y[rows, width] = silu(x[:, :width]) * x[:, width:]. */
void silu_mul(const float *x, int64_t rows, int64_t width, float *y) {
#pragma omp parallel for schedule(static) if (rows * width > 65536)
  for (int64_t r = 0; r < rows; r++) {
    const float *gate = x + r * 2 * width, *up = gate + width;
    for (int64_t i = 0; i < width; i += LANES) {
      vec g = load(gate + i);
      store(y + r * width + i, g / (1.0f + exp_lanes(-g)) * load(up + i));
    }
  }
}

/* Products of a query with LANES neighbouring keys, of which only `present` exist. */
ALWAYS_INLINE vec score_keys(const float *query, const float *keys, int64_t width, int64_t present) {
  vec sums[LANES];
  for (int k = 0; k < LANES; k++) sums[k] = splat(0.0f);
  for (int64_t i = 0; i < width; i += LANES) {
    vec part = load(query + i);
#pragma GCC unroll 16
    for (int k = 0; k < LANES; k++) sums[k] = fma_lanes(part, load(keys + (k < present ? k : 0) * width + i), sums[k]);
  }
  return sum_each(sums);
}

#define HIDDEN -1e30f /* the score of what the mask hides */

/* Scores of one row become weights, exactly 0 if the mask hides the key; returns one over their sum, 0 if all are hidden. */
ALWAYS_INLINE float softmax_row(float *scores, const uint8_t *seen, int64_t end) {
  int64_t padded = (end + LANES - 1) / LANES * LANES;
  for (int64_t t = 0; t < end; t++) scores[t] = seen[t] ? scores[t] : HIDDEN;
  for (int64_t t = end; t < padded; t++) scores[t] = HIDDEN;
  vec largest = load(scores);
  for (int64_t t = LANES; t < padded; t += LANES) largest = larger(largest, load(scores + t));
  float top = largest_lane(largest);
  vec total = splat(0.0f);
  for (int64_t t = 0; t < padded; t += LANES) {
    vec weight = exp_lanes(load(scores + t) - top);
    store(scores + t, weight);
    total += weight;
  }
  return top == HIDDEN ? 0.0f : 1.0f / sum_lanes(total);
}

/* Rows of queries that read the same keys: tokens of one head, or of several that share a key head. */
struct rows {
  const float *query[SHARED_ROWS];
  const uint8_t *seen[SHARED_ROWS];
  float *out[SHARED_ROWS];
};

/* out[rows] += weights[rows, from..to] times `vectors` vectors of values[end, width]; at the start from 0. */
ALWAYS_INLINE void mix_rows(const int rows, const int vectors, const float *weights, int64_t stride,
                            const float *values, int64_t width, int64_t from, int64_t to, float *const *out,
                            int64_t place) {
  vec sums[QUERY_ROWS][VALUE_VECTORS];
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < vectors; i++) sums[r][i] = from ? load(out[r] + place + i * LANES) : splat(0.0f);
  for (int64_t t = from; t < to; t++)
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < vectors; i++)
        sums[r][i] = fma_lanes(load(values + t * width + place + i * LANES), splat(weights[r * stride + t]), sums[r][i]);
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < vectors; i++) store(out[r] + place + i * LANES, sums[r][i]);
}

/* Attention of `count` rows; `scores` is [count, stride]. Keys and values are read once for all of them. */
static void attend_rows(const struct rows *of, int64_t count, const float *keys, const float *values, int64_t extent,
                        int64_t width, float scale, float *scores, int64_t stride) {
  int64_t end = 1; /* keys that any of these rows sees */
  for (int64_t n = 0; n < count; n++)
    for (int64_t t = extent; t > end; t--)
      if (of->seen[n][t - 1]) end = t;
  for (int64_t t = 0; t < end; t += LANES)
    for (int64_t n = 0; n < count; n++) {
      const float *row = of->query[n], *some = keys + t * width;
      vec dots = t + LANES <= end ? score_keys(row, some, width, LANES) : score_keys(row, some, width, end - t);
      store(scores + n * stride + t, dots * scale);
    }
  float inverse[SHARED_ROWS];
  for (int64_t n = 0; n < count; n++) inverse[n] = softmax_row(scores + n * stride, of->seen[n], end);
  for (int64_t from = 0; from < end; from += VALUE_BLOCK) {
    int64_t to = from + VALUE_BLOCK < end ? from + VALUE_BLOCK : end;
    for (int64_t n = 0, rows = 1; n < count; n += rows)
      for (int64_t place = 0, vectors; place < width; place += vectors * LANES) {
        const float *weights = scores + n * stride;
        float *const *out = of->out + n;
        rows = count - n < QUERY_ROWS ? count - n : QUERY_ROWS;
        vectors = (width - place) / LANES < VALUE_VECTORS ? (width - place) / LANES : VALUE_VECTORS;
        /* numbers known to the compiler keep the sums in registers */
        switch (vectors == VALUE_VECTORS ? rows : 0) {
#define MIX(rows, vectors) mix_rows(rows, vectors, weights, stride, values, width, from, to, out, place)
          case QUERY_ROWS: MIX(QUERY_ROWS, VALUE_VECTORS); break;
          case 3: MIX(3, VALUE_VECTORS); break;
          case 2: MIX(2, VALUE_VECTORS); break;
          case 1: MIX(1, VALUE_VECTORS); break;
          default: MIX(rows, vectors);
#undef MIX
        }
      }
  }
  for (int64_t n = 0; n < count; n++)
    for (int64_t i = 0; i < width; i += LANES) store(of->out[n] + i, load(of->out[n] + i) * inverse[n]);
}

/* Parts that the rows of a key head are divided into: as few as keep all threads busy. */
static int64_t parts_of(int64_t rows, int64_t key_heads, int64_t threads) {
  int64_t parts = (rows + SHARED_ROWS - 1) / SHARED_ROWS;
  for (; parts < rows; parts++) {
    int64_t units = key_heads * parts, uneven = units < 4 * threads && units % threads;
    if (units >= threads && !(uneven && rows / (parts + 1) >= FEW_ROWS)) break;
  }
  return parts;
}

/* query rows lie every `query_stride` values, `heads` heads side by side; keys and values of a request every
 * `request_stride` values, of a head every `head_stride`; seen[requests, tokens, extent];
 * y[requests, tokens, heads, width]. */
int64_t attend(const float *query, int64_t query_stride, const float *keys, const float *values,
               int64_t request_stride, int64_t head_stride, const uint8_t *seen, int64_t requests, int64_t tokens,
               int64_t heads, int64_t kv_heads, int64_t extent, int64_t width, float scale, float *y) {
  int64_t stride = (extent + LANES - 1) / LANES * LANES, rows = heads / kv_heads * tokens;
  int64_t parts = parts_of(rows, requests * kv_heads, omp_get_max_threads());
  if (parts == 0) return DONE; /* no rows */
  int64_t most = (rows + parts - 1) / parts;
  int64_t status = DONE;
#pragma omp parallel
  {
    float *scores = room_for((__int128)most * stride, sizeof(float));
    if (!scores) {
#pragma omp atomic write
      status = NO_MEMORY;
    }
#pragma omp for schedule(static) collapse(3)
    for (int64_t r = 0; r < requests; r++)
      for (int64_t h = 0; h < kv_heads; h++)
        for (int64_t part = 0; part < parts; part++) {
          int64_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
          int64_t place = r * request_stride + h * head_stride;
          struct rows of;
          if (!scores) continue;
          for (int64_t n = 0; n < count; n++) {
            int64_t token = r * tokens + (first + n) % tokens, head = h * (heads / kv_heads) + (first + n) / tokens;
            of.query[n] = query + token * query_stride + head * width;
            of.seen[n] = seen + token * extent;
            of.out[n] = y + (token * heads + head) * width;
          }
          attend_rows(&of, count, keys + place, values + place, extent, width, scale, scores, stride);
        }
    free(scores);
  }
  return status;
}
