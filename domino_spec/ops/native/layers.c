/* All layers of a decoder in one call: norm, attention over a cache, norm, SwiGLU, and the two sums beside them; and a
 * draft's context, which goes into its cache in the same way.
 *
 * The steps are those of cpu.c, in the order and with the bits of single calls. Returning to Python between them took a
 * third of a small model's pass.
 *
 * Built by build.py and called by bindings.py, which checks the arguments; bindings.py and context.py say what they are.
 */

#include "cpu.h"
#include "vectors.h"

#define KEPT_FLOATS (2 << 20) /* scratch that a thread keeps from call to call; a long prompt's is given back */

struct layer {
  int64_t hidden, heads, kv_heads, head_dim, inner;
  const float *input_norm, *joined, *joined_bias, *query_norm, *key_norm, *output, *output_bias; /* NULL: has none */
  const float *post_norm, *gate_up, *gate_up_bias, *down, *down_bias;
  float input_eps, query_eps, key_eps, post_eps, scale;
  int64_t kind; /* of attention: which mask */
};

struct pass {
  int64_t requests, tokens, extent, capacity, rotary;
  int64_t layer_stride, request_stride, head_stride; /* of keys and values */
  const float *cos, *sin;                            /* [requests, tokens, rotary] */
  const int64_t *rows;                               /* [requests, tokens], where keys and values go */
  const uint8_t *const *seen;                        /* of each kind, [requests, tokens, extent] */
  float *keys, *values;                              /* [layers, requests, kv_heads, capacity, head_dim] */
  float *x;                                          /* [requests, tokens, hidden], becomes the last layer's output */
  int64_t taps;
  const int64_t *tapped;                             /* [taps], layers */
  float *features;                                   /* [requests, tokens, taps * hidden], their outputs side by side */
};

const struct member layer_layout[] = {SIZE(layer), AT(layer, hidden), AT(layer, heads), AT(layer, kv_heads),
    AT(layer, head_dim), AT(layer, inner), AT(layer, input_norm), AT(layer, joined), AT(layer, joined_bias),
    AT(layer, query_norm), AT(layer, key_norm), AT(layer, output), AT(layer, output_bias), AT(layer, post_norm),
    AT(layer, gate_up), AT(layer, gate_up_bias), AT(layer, down), AT(layer, down_bias), AT(layer, input_eps),
    AT(layer, query_eps), AT(layer, key_eps), AT(layer, post_eps), AT(layer, scale), AT(layer, kind), {0}};
const struct member pass_layout[] = {SIZE(pass), AT(pass, requests), AT(pass, tokens), AT(pass, extent),
    AT(pass, capacity), AT(pass, rotary), AT(pass, layer_stride), AT(pass, request_stride), AT(pass, head_stride),
    AT(pass, cos), AT(pass, sin), AT(pass, rows), AT(pass, seen), AT(pass, keys), AT(pass, values), AT(pass, x),
    AT(pass, taps), AT(pass, tapped), AT(pass, features), {0}};

static float *scratch(__int128 floats, int *kept) {
  static _Thread_local float *buffer;
  *kept = floats <= KEPT_FLOATS;
  if (!*kept) return room_for(floats, sizeof(float));
  if (!buffer) buffer = malloc(KEPT_FLOATS * sizeof(float));
  return buffer;
}

/* Where keys and values of new tokens go. */
struct places {
  int64_t requests, tokens, kv_heads, width, capacity, request_stride, head_stride;
  const int64_t *rows; /* [requests, tokens] */
  float *keys, *values;
};

/* Whether no row is negative. Rows beyond the capacity are dropped: they are of requests that have ended. */
static int are_rows(const int64_t *rows, int64_t count) {
  for (int64_t t = 0; t < count; t++)
    if (rows[t] < 0) return 0;
  return 1;
}

/* Keys that stand every `stride` values, a token's heads side by side, and the values `apart` behind them. */
static void write_rows(const struct places *to, const float *keys, int64_t stride, int64_t apart) {
  for (int64_t t = 0; t < to->requests * to->tokens; t++) {
    if (to->rows[t] >= to->capacity) continue;
    for (int64_t h = 0; h < to->kv_heads; h++) {
      int64_t place = t / to->tokens * to->request_stride + h * to->head_stride + to->rows[t] * to->width;
      const float *key = keys + t * stride + h * to->width;
      memcpy(to->keys + place, key, to->width * sizeof(float));
      memcpy(to->values + place, key + apart, to->width * sizeof(float));
    }
  }
}

static void add(float *sum, const float *other, int64_t count) {
  for (int64_t i = 0; i < count; i++) sum[i] += other[i];
}

/* Floats of scratch for a token: each step's results have their place. */
static int64_t room_of(const struct layer *l) {
  int64_t queries = l->heads * l->head_dim, widest = l->hidden > queries ? l->hidden : queries;
  if (l->inner > widest) widest = l->inner;
  return widest + 2 * l->hidden + 2 * queries + 2 * l->kv_heads * l->head_dim + 3 * l->inner;
}

static int64_t run_layer(const struct layer *l, const struct pass *p, int64_t number, float *room) {
  int64_t count = p->requests * p->tokens, hidden = l->hidden, width = l->head_dim, inner = l->inner;
  int64_t queries = l->heads * width, row = queries + 2 * l->kv_heads * width;
  float *keys = p->keys + number * p->layer_stride, *values = p->values + number * p->layer_stride, *x = p->x;
  struct places cache = {p->requests, p->tokens, l->kv_heads, width, p->capacity, p->request_stride, p->head_stride,
                         p->rows, keys, values};
  float *normed = room, *out = normed + count * hidden, *joined = out + count * hidden, *mixed = joined + count * row;
  float *gate_up = mixed + count * queries, *product = gate_up + 2 * count * inner, *transposed = product + count * inner;

  rms_norm(x, count, hidden, 1, hidden, l->input_norm, l->input_eps, normed);
  linear(normed, count, hidden, l->joined, l->joined_bias, row, transposed, joined);
  if (l->query_norm) rms_norm(joined, count, row, l->heads, width, l->query_norm, l->query_eps, joined);
  if (l->key_norm) rms_norm(joined + queries, count, row, l->kv_heads, width, l->key_norm, l->key_eps, joined + queries);
  rotate(joined, count, row, l->heads + l->kv_heads, width, p->rotary, p->cos, p->sin);
  write_rows(&cache, joined + queries, row, l->kv_heads * width);
  if (attend(joined, row, keys, values, p->request_stride, p->head_stride, p->seen[l->kind], p->requests, p->tokens,
             l->heads, l->kv_heads, p->extent, width, l->scale, mixed))
    return NO_MEMORY;
  linear(mixed, count, queries, l->output, l->output_bias, hidden, transposed, out);
  add(x, out, count * hidden);

  rms_norm(x, count, hidden, 1, hidden, l->post_norm, l->post_eps, normed);
  linear(normed, count, hidden, l->gate_up, l->gate_up_bias, 2 * inner, transposed, gate_up);
  silu_mul(gate_up, count, inner, product);
  linear(product, count, inner, l->down, l->down_bias, hidden, transposed, out);
  add(x, out, count * hidden);
  return DONE;
}

/* New rows of a draft's context into its cache: `write_context_` in context.py; `projected` is lost. */
int64_t write_context(float *projected, int64_t requests, int64_t tokens, int64_t layers, int64_t kv_heads,
                      int64_t width, const float *norms, float eps, const float *cos, const float *sin,
                      const int64_t *rows, int64_t capacity, int64_t layer_stride, int64_t request_stride,
                      int64_t head_stride, float *keys, float *values) {
  int64_t count = requests * tokens, heads = kv_heads * width, row = 2 * layers * heads;
  if (!are_rows(rows, count)) return BAD_INDEX;
  for (int64_t i = 0; i < layers; i++) {
    float *of_layer = projected + 2 * i * heads;
    rms_norm(of_layer, count, row, kv_heads, width, norms + i * width, eps, of_layer);
    rotate(of_layer, count, row, kv_heads, width, width, cos, sin);
    struct places cache = {requests, tokens, kv_heads, width, capacity, request_stride, head_stride,
                           rows, keys + i * layer_stride, values + i * layer_stride};
    write_rows(&cache, of_layer, row, heads);
  }
  return DONE;
}

int64_t decoder_layers(const struct layer *layers, int64_t number, const struct pass *p) {
  int64_t count = p->requests * p->tokens, most = 0;
  for (int64_t i = 0; i < number; i++)
    if (room_of(layers + i) > most) most = room_of(layers + i);
  if (!are_rows(p->rows, count)) return BAD_INDEX;
  int is_kept;
  float *room = scratch((__int128)count * most, &is_kept);
  int64_t status = room ? DONE : NO_MEMORY;
  for (int64_t i = 0; i < number && status == DONE; i++) {
    int64_t hidden = layers[i].hidden;
    status = run_layer(layers + i, p, i, room);
    for (int64_t tap = 0; tap < p->taps; tap++)
      for (int64_t n = 0; p->tapped[tap] == i && n < count; n++)
        memcpy(p->features + (n * p->taps + tap) * hidden, p->x + n * hidden, hidden * sizeof(float));
  }
  if (!is_kept) free(room);
  return status;
}
