/* The best few of many logits, in order. */
#ifndef SELECTION_H
#define SELECTION_H
#include <math.h>

#include "cpu.h"
#include "vectors.h"

#define GROUPS 4 /* groups of logits for each candidate, by whose maxima the candidates are found */

struct entry {
  float value;
  int64_t index;
};

static inline int by_value(const void *a, const void *b) { /* the largest first; of equals, the first */
  const struct entry *left = a, *right = b;
  if (left->value != right->value) return left->value < right->value ? 1 : -1;
  return left->index < right->index ? -1 : left->index > right->index;
}

/* The k-th largest of count values, which are reordered. */
static inline float kth_largest(float *values, int64_t count, int64_t k) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    float pivot = values[low + (high - low) / 2];
    int64_t left = low, right = high;
    while (left <= right) {
      while (values[left] > pivot) left++;
      while (values[right] < pivot) right--;
      if (left <= right) {
        float other = values[left];
        values[left++] = values[right];
        values[right--] = other;
      }
    }
    if (k - 1 <= right) high = right;
    else if (k - 1 >= left) low = left;
    else break;
  }
  return values[k - 1];
}

/* The k best of count logits, the best first. The k-th largest maximum of k groups or more is a lower bound of the k-th
 * largest logit, and few others reach it. Logits that are no number are never among them while others last. Without
 * memory, returns NO_MEMORY, and the k are all the first logit. */
static inline int64_t best_logits(const float *logits, int64_t count, int64_t k, float *values, int64_t *ids) {
  int64_t span = count / (GROUPS * k); /* vectors whose lanes are a group each */
  if (span < 1) span = 1;
  float *maxima = room_for((__int128)count + LANES, sizeof(float));
  struct entry *found = room_for(count, sizeof *found);
  int64_t status = maxima && found ? DONE : NO_MEMORY, groups = 0, number = 0;
  if (status != DONE) goto end;
  for (int64_t from = 0; from < count; from += span * LANES) {
    vec top = splat(-INFINITY);
    int64_t to = from + span * LANES < count ? from + span * LANES : count, i = from;
    for (; i + LANES <= to; i += LANES) top = larger(load(logits + i), top);
    for (; i < to; i++)
      if (logits[i] > top[i - to + LANES]) top[i - to + LANES] = logits[i];
    store(maxima + groups, top);
    groups += LANES;
  }
  float bound = groups >= k ? kth_largest(maxima, groups, k) : -INFINITY;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (uint32_t bits = lanes_from(load(logits + i), bound); bits; bits &= bits - 1) {
      int64_t index = i + __builtin_ctz(bits);
      found[number++] = (struct entry){logits[index], index};
    }
  for (; i < count; i++)
    if (logits[i] >= bound) found[number++] = (struct entry){logits[i], i};
  qsort(found, number, sizeof *found, by_value);
end:
  for (int64_t n = 0; n < k; n++) {
    values[n] = n < number ? found[n].value : -INFINITY;
    ids[n] = n < number ? found[n].index : 0;
  }
  free(found);
  free(maxima);
  return status;
}

#endif
