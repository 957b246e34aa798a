/* Calls every entry of the C loops on numbers of its own and prints the results, so that test_other_machines.py can
 * compare what different compilers make of the loops, for processors that PyTorch does not run on here. */
#include <stdio.h>

#include "rollout.c" /* for its structs; the other files are linked */

int64_t panel_width(void);
int64_t lanes(void);
int64_t write_context(float *projected, int64_t requests, int64_t tokens, int64_t layers, int64_t kv_heads,
                      int64_t width, const float *norms, float eps, const float *cos, const float *sin,
                      const int64_t *rows, int64_t capacity, int64_t layer_stride, int64_t request_stride,
                      int64_t head_stride, float *keys, float *values);
int64_t blended_rows(int64_t half, void *base, void *correction, int64_t target_half, const void *target,
                     const int64_t *labels, const float *weights, int64_t rows, int64_t width, float lambda_base,
                     float cross_entropy, float kl, float total_variation, float log_acceptance, float adaptive_eta,
                     float *base_losses, float *final_losses);

/* Each use has a seed of its own: arguments are evaluated in any order. */
#define numbers(count) random_numbers(__COUNTER__, count)

static float *random_numbers(uint32_t state, int64_t count) {
  float *made = malloc(count * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    state = state * 1664525u + 1013904223u;
    made[i] = (float)(state >> 8) / (1 << 23) - 1.0f; /* -1 to 1 */
  }
  return made;
}

static void print(const char *name, const float *values, int64_t count) {
  printf("%s", name);
  for (int64_t i = 0; i < count; i++) printf(" %.6g", values[i]);
  printf("\n");
}

/* The same weight whatever the width of a panel: packed [panels, inputs, width] from [outputs, inputs]. */
static float *packed(const float *weight, int64_t outputs, int64_t inputs) {
  int64_t width = panel_width(), panels = (outputs + width - 1) / width;
  float *made = calloc(panels * inputs * width, sizeof(float));
  for (int64_t o = 0; o < outputs; o++)
    for (int64_t i = 0; i < inputs; i++) made[(o / width * inputs + i) * width + o % width] = weight[o * inputs + i];
  return made;
}

int main(void) {
  enum { COUNT = 7, IN = 96, OUT = 70, HEADS = 4, WIDTH = 32, EXTENT = 37, TOKENS = 5 };
  float *x = numbers(COUNT * IN), *y = numbers(COUNT * OUT), *room = numbers(COUNT * IN);
  linear(x, COUNT, IN, packed(numbers(OUT * IN), OUT, IN), NULL, OUT, room, y);
  print("linear", y, COUNT * OUT);
  rms_norm(x, COUNT, IN, 1, IN, numbers(IN), 1e-6f, x);
  print("rms_norm", x, COUNT * IN);
  rotate(x, COUNT, IN, 2, WIDTH, WIDTH, numbers(COUNT * WIDTH), numbers(COUNT * WIDTH));
  print("rotate", x, COUNT * IN);
  silu_mul(numbers(COUNT * 2 * WIDTH), COUNT, WIDTH, y);
  print("silu_mul", y, COUNT * WIDTH);

  uint8_t seen[TOKENS * EXTENT];
  for (int i = 0; i < TOKENS * EXTENT; i++) seen[i] = i % 3 != 0;
  float *mixed = numbers(TOKENS * HEADS * WIDTH), *keys = numbers(2 * EXTENT * WIDTH), *values = numbers(2 * EXTENT * WIDTH);
  int64_t status = attend(numbers(TOKENS * HEADS * WIDTH), HEADS * WIDTH, keys, values, 0, EXTENT * WIDTH, seen, 1,
                          TOKENS, HEADS, 2, EXTENT, WIDTH, 0.3f, mixed);
  print("attend", mixed, TOKENS * HEADS * WIDTH);

  int64_t places[TOKENS] = {3, 4, 5, 6, EXTENT};
  status |= write_context(numbers(TOKENS * 4 * WIDTH), 1, TOKENS, 1, 2, WIDTH, numbers(WIDTH), 1e-6f,
                          numbers(TOKENS * WIDTH), numbers(TOKENS * WIDTH), places, EXTENT, 0, 0, EXTENT * WIDTH, keys,
                          values);
  print("keys", keys, 2 * EXTENT * WIDTH);
  print("values", values, 2 * EXTENT * WIDTH);

  enum { DEPTHS = 4, VOCABULARY = 61, LOW = 16, K = 9, BUDGET = 8 };
  struct head head = {.hidden = WIDTH, .state = 48, .low_rank = LOW, .pure_prefix = 1, .tokens = VOCABULARY,
                      .input_gates = numbers(3 * 48 * WIDTH), .state_gates = numbers(3 * 48 * 48),
                      .to_low_rank = numbers(LOW * (WIDTH + 48)), .correction = numbers(VOCABULARY * LOW),
                      .embeddings = numbers(VOCABULARY * WIDTH), .scale = 1.0f};
  int64_t widths[DEPTHS] = {3, 3, 3, 3}, kept[DEPTHS], choices[24], parents[24], number[2], ids[2 * DEPTHS * K];
  float scores[24];
  struct rollout tree = {.head = &head, .slots = numbers(2 * DEPTHS * WIDTH), .anchors = numbers(2 * WIDTH),
                         .logits = numbers(2 * DEPTHS * VOCABULARY), .requests = 2, .depths = DEPTHS,
                         .vocabulary = VOCABULARY, .candidates = K, .threshold = -INFINITY, .widths = widths,
                         .kept = kept, .room = 12, .choices = choices, .parents = parents, .scores = scores,
                         .budget = BUDGET, .num_drafts = number, .ids = ids};
  status |= head_rollout(&tree);
  for (int i = 0; i < 24; i++) printf("draft %d %d\n", (int)choices[i], (int)parents[i]);
  print("scores", scores, BUDGET);
  print("scores", scores + 12, BUDGET);

  int64_t labels[3] = {0, 40, 60};
  float *base = numbers(3 * VOCABULARY), *correction = numbers(3 * VOCABULARY), losses[6];
  status |= blended_rows(0, base, correction, 0, numbers(3 * VOCABULARY), labels, numbers(3), 3, VOCABULARY, 0.4f, 0.3f,
                         0.5f, 0.7f, 0.2f, 2.0f, losses, losses + 3);
  print("losses", losses, 6);
  print("base", base, 3 * VOCABULARY);
  print("correction", correction, 3 * VOCABULARY);
  printf("status %d\n", (int)status);
  return 0;
}
