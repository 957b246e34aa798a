/* What follows the base logits of a block, on a CPU: a chain or a tree of drafts for every request, in one call.
 *
 * The float32 twin of `head_rollout` and `head_tree` in heads.py, which explain the mathematics. A chain is a tree of
 * width 1, so there is one loop over depths. One team of threads runs it: the head's weights are divided among the
 * threads by rows, and each row is read once for all prefixes. A prefix's numbers are computed in the same order
 * whatever stands beside it.
 *
 * Built by build.py and called by bindings.py, which checks the arguments.
 */
#include <math.h>

#include "selection.h"

#if LANES == 16
#define SHARING 2 /* vectors that a weight is multiplied with at once: their sums fill the registers */
#else
#define SHARING 1
#endif
#define ROWS 8  /* weights at once: independent sums that keep the multipliers busy */
#define SKIPPED (4 * LANES) /* logits that are passed over together if none of them is among the best */

struct head { /* rows of every matrix are contiguous */
  int64_t hidden, state, low_rank;
  int64_t pure_prefix;        /* depths that the head leaves as they are */
  int64_t tokens;
  const float *input_gates;   /* [3 * state, hidden]: reset, update, new */
  const float *state_gates;   /* [3 * state, state] */
  const float *to_low_rank;   /* [low_rank, hidden + state] */
  const float *correction;    /* [vocabulary, low_rank] */
  const float *embeddings;    /* [tokens, hidden] */
  const int64_t *token_ids;   /* [vocabulary], rows of `embeddings`; NULL if they are the same */
  float scale;                /* of embeddings */
};

struct rollout { /* shapes as in heads.py */
  const struct head *head;    /* NULL leaves all base logits as they are; slots and anchors are then not read */
  const float *slots;         /* [requests, depths, hidden] */
  const float *logits;        /* [requests, depths, vocabulary] */
  const float *anchors;       /* [requests, hidden], embedded */
  int64_t requests, depths, vocabulary;
  int64_t candidates;         /* K; the vocabulary if all are */
  float threshold;            /* log probability below which prefixes are not extended */
  const int64_t *widths;      /* [depths], prefixes of each depth at most */
  const float *temperatures;  /* [requests], of sampled chains; NULL chooses */
  const double *uniform;      /* [requests, depths] */
  int64_t *kept;              /* [depths], prefixes of each depth */
  int64_t room;               /* the sum of the widths; below, a depth's prefixes follow those of the depth before */
  int64_t *choices, *parents; /* [requests, room], indices into the logits, and into the prefixes of a request */
  float *scores;              /* [requests, room], log probabilities; of sampled chains, of the most probable token */
  int64_t budget;             /* at the end, so many prefixes are left of a request, the best; 0 leaves all */
  int64_t *num_drafts;        /* [requests], how many were left */
  int64_t *ids;               /* [requests, depths, K], candidates, the best first; NULL if all are */
  float *probs;               /* [requests, depths, K], of sampled chains */
};

const struct member head_layout[] = {SIZE(head), AT(head, hidden), AT(head, state), AT(head, low_rank),
    AT(head, pure_prefix), AT(head, tokens), AT(head, input_gates), AT(head, state_gates), AT(head, to_low_rank),
    AT(head, correction), AT(head, embeddings), AT(head, token_ids), AT(head, scale), {0}};
const struct member rollout_layout[] = {SIZE(rollout), AT(rollout, head), AT(rollout, slots), AT(rollout, logits),
    AT(rollout, anchors), AT(rollout, requests), AT(rollout, depths), AT(rollout, vocabulary),
    AT(rollout, candidates), AT(rollout, threshold), AT(rollout, widths), AT(rollout, temperatures),
    AT(rollout, uniform), AT(rollout, kept), AT(rollout, room), AT(rollout, choices), AT(rollout, parents),
    AT(rollout, scores), AT(rollout, budget), AT(rollout, num_drafts), AT(rollout, ids), AT(rollout, probs), {0}};

/* Depths whose base logits stay as they are. */
static int64_t pure_depths(const struct rollout *w) {
  return w->head && w->head->pure_prefix < w->depths ? w->head->pure_prefix : w->depths;
}

/* What threads share on the way. Prefixes of one depth stand side by side: request, then place in it. */
struct scratch {
  float *from_slots;          /* [requests, depths, low_rank] */
  float *base;                /* [requests, depths, K], logits of the candidates */
  float *states, *next;       /* [prefixes, state] */
  float *from_input, *from_state; /* [prefixes, 3 * state] */
  float *low_rank;            /* [prefixes, low_rank] */
  float *final;               /* [prefixes, K] */
  const float **rows;         /* [prefixes or slots], what is multiplied next */
  int64_t status;             /* why the results are worth nothing, unless it is DONE */
};

static void fail(struct scratch *s, int64_t status) {
#pragma omp atomic write
  s->status = status;
}

/* ---- products ---- */

/* out[n] = x[n] times LANES rows, for n < count. */
ALWAYS_INLINE void multiply_rows(const int count, const float *const *x, const float *const *rows, int64_t width,
                                 vec *out) {
  vec sums[SHARING][LANES];
  for (int first = 0; first < LANES; first += ROWS) {
    const float *row[ROWS];
    for (int k = 0; k < ROWS; k++) {
      row[k] = rows[first + k];
      for (int n = 0; n < count; n++) sums[n][first + k] = splat(0.0f);
    }
    for (int64_t i = 0; i < width; i += LANES) {
      vec part[SHARING];
      for (int n = 0; n < count; n++) part[n] = load(x[n] + i);
#pragma GCC unroll 8
      for (int k = 0; k < ROWS; k++) {
        vec weight = load(row[k] + i);
        for (int n = 0; n < count; n++) sums[n][first + k] = fma_lanes(part[n], weight, sums[n][first + k]);
      }
    }
  }
  for (int n = 0; n < count; n++) out[n] = sum_each(sums[n]);
}

/* The same for any number: y[n, 0..present] = x[n] times `present` <= LANES rows. */
static void multiply(const float *const *x, int64_t count, const float *const *rows, int64_t present, int64_t width,
                     float *y, int64_t stride) {
  int64_t n = 0;
  for (; n + SHARING <= count; n += SHARING) {
    vec out[SHARING];
    multiply_rows(SHARING, x + n, rows, width, out);
    for (int s = 0; s < SHARING; s++) memcpy(y + (n + s) * stride, out + s, present * sizeof(float));
  }
  for (; n < count; n++) {
    vec out[1];
    multiply_rows(1, x + n, rows, width, out);
    memcpy(y + n * stride, out, present * sizeof(float));
  }
}

/* y[count, outputs] = x[count][width] times a weight whose rows lie every `stride`. Shared among the team. */
static void products(const float *weight, int64_t stride, int64_t width, int64_t outputs, const float *const *x,
                     int64_t count, float *y) {
#pragma omp for schedule(static)
  for (int64_t first = 0; first < outputs; first += LANES) {
    int64_t present = outputs - first < LANES ? outputs - first : LANES;
    const float *rows[LANES];
    for (int64_t k = 0; k < LANES; k++) rows[k] = weight + (first + (k < present ? k : 0)) * stride;
    multiply(x, count, rows, present, width, y + first, outputs);
  }
}

/* ---- phases, each shared among the team ---- */

static const float *base_of(const struct rollout *w, const struct scratch *s, int64_t slot) {
  return w->ids ? s->base + slot * w->candidates : w->logits + slot * w->vocabulary;
}

/* Candidates of all slots, and the slots' share of the low-rank layer. */
static void prepare(const struct rollout *w, struct scratch *s) {
  const struct head *h = w->head;
  int64_t slots = w->requests * w->depths;
  if (w->ids) {
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < slots; i++)
      if (best_logits(w->logits + i * w->vocabulary, w->vocabulary, w->candidates, s->base + i * w->candidates,
                      w->ids + i * w->candidates))
        fail(s, NO_MEMORY);
  }
  if (pure_depths(w) < w->depths) {
#pragma omp single
    for (int64_t i = 0; i < slots; i++) s->rows[i] = w->slots + i * h->hidden;
    products(h->to_low_rank, h->hidden + h->state, h->hidden, h->low_rank, s->rows, slots, s->from_slots);
  }
}

ALWAYS_INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp_lanes(-x)); }
ALWAYS_INLINE vec tanh_lanes(vec x) { return 1.0f - 2.0f / (exp_lanes(2.0f * x) + 1.0f); }

/* The states of `count` prefixes of each request: each consumes its last token, or the anchor if `first` is -1. */
static void step(const struct rollout *w, struct scratch *s, int64_t first, int64_t count, int64_t parents_first,
                 int64_t parents_count) {
  const struct head *h = w->head;
  int64_t prefixes = w->requests * count, width = h->state;
  int64_t starts = first < 0;
#pragma omp single
  for (int64_t n = 0; n < prefixes; n++) {
    int64_t request = n / count;
    if (starts) {
      s->rows[n] = w->anchors + request * h->hidden;
    } else {
      int64_t choice = w->choices[request * w->room + first + n % count];
      int64_t token = h->token_ids ? h->token_ids[choice] : choice;
      if (token < 0 || token >= h->tokens) {
        fail(s, BAD_INDEX);
        token = 0;
      }
      s->rows[n] = h->embeddings + token * h->hidden;
    }
  }
  products(h->input_gates, h->hidden, h->hidden, 3 * width, s->rows, prefixes, s->from_input);
  if (!starts) {
#pragma omp single
    for (int64_t n = 0; n < prefixes; n++) {
      int64_t request = n / count, parent = w->parents[request * w->room + first + n % count] - parents_first;
      s->rows[n] = s->states + (request * parents_count + parent) * width;
    }
    products(h->state_gates, width, width, 3 * width, s->rows, prefixes, s->from_state);
  }
  float scale = starts ? 1.0f : h->scale;
#pragma omp for schedule(static)
  for (int64_t n = 0; n < prefixes; n++) {
    const float *input = s->from_input + 3 * n * width, *state = s->from_state + 3 * n * width;
    for (int64_t i = 0; i < width; i += LANES) {
      vec gates[3], before = splat(0.0f), of_state[3] = {before, before, before};
      for (int g = 0; g < 3; g++) {
        gates[g] = load(input + g * width + i) * scale;
        if (!starts) of_state[g] = load(state + g * width + i);
      }
      if (!starts) before = load(s->rows[n] + i);
      vec reset = sigmoid(gates[0] + of_state[0]), update = sigmoid(gates[1] + of_state[1]);
      vec new = tanh_lanes(fma_lanes(reset, of_state[2], gates[2]));
      store(s->next + n * width + i, fma_lanes(update, before - new, new));
    }
  }
#pragma omp single
  {
    float *old = s->states;
    s->states = s->next;
    s->next = old;
  }
}

/* final[prefixes, K] = base logits of a depth, corrected for each of the `count` prefixes of each request. */
static void correct(const struct rollout *w, struct scratch *s, int64_t depth, int64_t count) {
  const struct head *h = w->head;
  int64_t prefixes = w->requests * count;
#pragma omp single
  for (int64_t n = 0; n < prefixes; n++) s->rows[n] = s->states + n * h->state;
  products(h->to_low_rank + h->hidden, h->hidden + h->state, h->state, h->low_rank, s->rows, prefixes, s->low_rank);
#pragma omp for schedule(static)
  for (int64_t n = 0; n < prefixes; n++) {
    float *u = s->low_rank + n * h->low_rank;
    const float *of_slot = s->from_slots + (n / count * w->depths + depth) * h->low_rank;
    for (int64_t i = 0; i < h->low_rank; i += LANES) {
      vec x = load(u + i) + load(of_slot + i);
      store(u + i, x * sigmoid(x));
    }
    s->rows[n] = u;
  }
#pragma omp for schedule(static) collapse(2)
  for (int64_t r = 0; r < w->requests; r++)
    for (int64_t first = 0; first < w->candidates; first += LANES) {
      int64_t present = w->candidates - first < LANES ? w->candidates - first : LANES, slot = r * w->depths + depth;
      const float *rows[LANES], *base = base_of(w, s, slot) + first;
      const int64_t *ids = w->ids ? w->ids + slot * w->candidates + first : NULL;
      for (int64_t k = 0; k < LANES; k++) {
        int64_t place = k < present ? k : 0;
        rows[k] = h->correction + (ids ? ids[place] : first + place) * h->low_rank;
      }
      float *y = s->final + r * count * w->candidates + first;
      multiply(s->rows + r * count, count, rows, present, h->low_rank, y, w->candidates);
      for (int64_t n = 0; n < count; n++)
        for (int64_t k = 0; k < present; k++) y[n * w->candidates + k] += base[k];
    }
}

/* exp((x - top) / temperature) is written to `weights` unless that is NULL; returns the sum. */
static float exponentials(const float *x, int64_t count, float top, float temperature, float *weights) {
  vec total = splat(0.0f);
  for (int64_t i = 0; i < count; i += LANES) {
    int64_t present = count - i < LANES ? count - i : LANES;
    vec some = splat(-INFINITY);
    if (present == LANES) some = load(x + i);
    else memcpy(&some, x + i, present * sizeof(float));
    vec weight = exp_lanes((some - top) / temperature);
    total += weight;
    if (weights) memcpy(weights + i, &weight, present * sizeof(float));
  }
  return sum_lanes(total);
}

static float largest_of(const float *x, int64_t count) {
  vec top = splat(-INFINITY);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) top = larger(load(x + i), top);
  float largest = largest_lane(top);
  for (; i < count; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

/* One of `count` by inverse-transform sampling (`draw` in heads.py), and the probabilities it was drawn with. */
static int64_t sample(const float *logits, int64_t count, float top, float temperature, double uniform, float *probs) {
  int64_t place = 0;
  if (temperature == 0.0f) {
    memset(probs, 0, count * sizeof(float));
    while (place + 1 < count && logits[place] != top) place++;
    probs[place] = 1.0f;
    return place;
  }
  float inverse = 1.0f / exponentials(logits, count, top, temperature, probs);
  double total = 0.0, sum = 0.0;
  for (int64_t i = 0; i < count; i++) total += probs[i] *= inverse;
  for (int64_t i = 0; i < count; i++) {
    sum += probs[i];
    if (probs[i] > 0.0f) place = i; /* one that can be drawn, should rounding leave nothing for the rest */
    if (sum > uniform * total) break;
  }
  return place;
}

/* The `keep` most probable of a request's children, the most probable first, from `first` on in the results. */
static void choose_children(const struct rollout *w, const struct scratch *s, int64_t r, int64_t depth, int64_t before,
                            int64_t count, int64_t first, int64_t keep) {
  int64_t *choices = w->choices + r * w->room + first, *parents = w->parents + r * w->room + first;
  float *scores = w->scores + r * w->room + first, *above = w->scores + r * w->room + before;
  int64_t slot = r * w->depths + depth, found = 0;
  const int64_t *ids = w->ids ? w->ids + slot * w->candidates : NULL;
  for (int64_t n = 0; n < count; n++) {
    int pure = depth < pure_depths(w);
    const float *logits = pure ? base_of(w, s, slot) : s->final + (r * count + n) * w->candidates;
    float top = largest_of(logits, w->candidates);
    float of_top = (depth ? above[n] : 0.0f) - logf(exponentials(logits, w->candidates, top, 1.0f, NULL));
    if (w->temperatures) {
      int64_t place = sample(logits, w->candidates, top, w->temperatures[r], w->uniform[slot],
                             w->probs + slot * w->candidates);
      choices[0] = ids ? ids[place] : place;
      parents[0] = before;
      scores[0] = of_top;
      return;
    }
    for (int64_t from = 0; from < w->candidates; from += SKIPPED) {
      int64_t to = from + SKIPPED < w->candidates ? from + SKIPPED : w->candidates;
      if (found == keep && !(largest_of(logits + from, to - from) - top + of_top > scores[keep - 1])) continue;
      for (int64_t k = from; k < to; k++) {
        float score = logits[k] - top + of_top;
        if (found == keep && !(score > scores[keep - 1])) continue;
        int64_t place = found < keep ? found++ : keep - 1;
        for (; place > 0 && score > scores[place - 1]; place--) {
          scores[place] = scores[place - 1];
          choices[place] = choices[place - 1];
          parents[place] = parents[place - 1];
        }
        scores[place] = score;
        choices[place] = ids ? ids[k] : k;
        parents[place] = before + n;
      }
    }
  }
}

/* How many of `count` prefixes of a depth, which are sorted, reach the threshold in any request. */
static int64_t worth(const struct rollout *w, int64_t first, int64_t count) {
  int64_t most = 0;
  for (int64_t r = 0; r < w->requests; r++)
    while (most < count && w->scores[r * w->room + first + most] >= w->threshold) most++;
  return most;
}

/* The best prefixes of a request from the threshold on, in their order, with parents renumbered; rows end in nothing. */
static void keep_best(const struct rollout *w, struct scratch *s, int64_t r, int64_t total) {
  int64_t *choices = w->choices + r * w->room, *parents = w->parents + r * w->room, number = 0;
  float *scores = w->scores + r * w->room;
  struct entry *ranked = room_for(total, sizeof *ranked);
  int64_t *places = room_for(total, sizeof *places);
  if (!ranked || !places) {
    fail(s, NO_MEMORY);
    total = 0;
  }
  for (int64_t i = 0; i < total; i++) ranked[i] = (struct entry){isnan(scores[i]) ? -INFINITY : scores[i], i};
  qsort(ranked, total, sizeof *ranked, by_value); /* a parent stands before a child that is as probable */
  for (int64_t i = 0; i < total; i++)
    places[ranked[i].index] = i < w->budget && ranked[i].value >= w->threshold && ranked[i].value > -INFINITY;
  for (int64_t i = 0; i < total; i++) {
    if (!places[i]) continue;
    choices[number] = choices[i];
    parents[number] = parents[i] < 0 ? -1 : places[parents[i]];
    scores[number] = scores[i];
    places[i] = number++;
  }
  w->num_drafts[r] = number;
  for (; number < total; number++) choices[number] = 0, parents[number] = -1, scores[number] = -INFINITY;
  free(places);
  free(ranked);
}

static void grow(const struct rollout *w, struct scratch *s) {
  int64_t before = -1, count = 1, first = 0; /* of the depth above: its first prefix, and how many they are */
  prepare(w, s);
  if (pure_depths(w) < w->depths) step(w, s, -1, 1, -1, 1);
  for (int64_t depth = 0; depth < w->depths; depth++) {
    if (depth >= pure_depths(w)) correct(w, s, depth, count);
    int64_t keep = w->widths[depth] < count * w->candidates ? w->widths[depth] : count * w->candidates;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < w->requests; r++) choose_children(w, s, r, depth, before, count, first, keep);
    if (w->threshold > -INFINITY) keep = worth(w, first, keep); /* by every thread, which all see the same */
#pragma omp single
    w->kept[depth] = keep;
    if (keep == 0) break;
    if (depth + 1 < w->depths && pure_depths(w) < w->depths) step(w, s, first, keep, before, count);
    before = first, count = keep, first += keep;
  }
  if (w->budget == 0) return;
#pragma omp for schedule(static)
  for (int64_t r = 0; r < w->requests; r++) keep_best(w, s, r, first);
}

static void *part_of(char **from, int64_t bytes) {
  char *start = *from;
  *from += (bytes + 63) / 64 * 64;
  return start;
}

int64_t head_rollout(const struct rollout *w) {
  const struct head *h = w->head;
  int64_t low_rank = h ? h->low_rank : 0, state = h ? h->state : 0; /* without a head nothing needs them */
  int64_t widest = 1, slots = w->requests * w->depths;
  for (int64_t depth = 0; depth < w->depths; depth++)
    if (w->widths[depth] > widest) widest = w->widths[depth];
  int64_t prefixes = w->requests * widest, most = prefixes > slots ? prefixes : slots;
  __int128 floats = (__int128)slots * (low_rank + w->candidates) +
                    (__int128)prefixes * (8 * state + low_rank + w->candidates);
  char *memory = room_for(4 * floats + most * sizeof(float *) + 16 * 64, 1), *from = memory;
  if (!memory) return NO_MEMORY;
  struct scratch s = {
      .from_slots = part_of(&from, 4 * slots * low_rank),
      .base = part_of(&from, 4 * slots * w->candidates),
      .states = part_of(&from, 4 * prefixes * state),
      .next = part_of(&from, 4 * prefixes * state),
      .from_input = part_of(&from, 12 * prefixes * state),
      .from_state = part_of(&from, 12 * prefixes * state),
      .low_rank = part_of(&from, 4 * prefixes * low_rank),
      .final = part_of(&from, 4 * prefixes * w->candidates),
      .rows = part_of(&from, most * sizeof(float *)),
  };
#pragma omp parallel
  grow(w, &s);
  free(memory);
  return s.status;
}
