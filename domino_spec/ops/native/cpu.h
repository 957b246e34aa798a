/* What the files of C share: what an entry returns, room for scratch, and steps of a decoder pass that layers.c joins.
 *
 * Sizes of tensors are compared in bindings.py before an entry is called; numbers that stand in tensors (rows, labels,
 * token ids) are compared in C, which reads them anyway.
 */
#ifndef CPU_H
#define CPU_H
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/* What an entry that can fail returns; bindings.py makes an exception of it. */
enum status {
  DONE,
  NO_MEMORY,
  BAD_INDEX /* a number in a tensor of indices is out of its range; nothing was read or written there */
};

/* A struct that Python fills as bindings.py lays it out: the size under no name, where each member begins, then NULL.
 * The two are compared when the library is loaded. */
struct member {
  const char *name;
  int64_t offset;
};
#define SIZE(type) {"", sizeof(struct type)}
#define AT(type, member) {#member, offsetof(struct type, member)}

/* Room for so many values of `size` bytes; NULL if there is none. The caller multiplies in 128 bits, so that no product
 * of sizes wraps. */
static inline void *room_for(__int128 values, int64_t size) {
  return values < 0 || values > INT64_MAX / size ? NULL : malloc(values ? values * size : 1);
}

void linear(const float *x, int64_t rows, int64_t inputs, const float *panels, const float *bias, int64_t outputs,
            float *transposed, float *y);
void rms_norm(const float *x, int64_t rows, int64_t stride, int64_t groups, int64_t width, const float *weight,
              float eps, float *y);
void rotate(float *x, int64_t rows, int64_t stride, int64_t heads, int64_t width, int64_t rotary, const float *cos,
            const float *sin);
void silu_mul(const float *x, int64_t rows, int64_t width, float *y);
int64_t attend(const float *query, int64_t query_stride, const float *keys, const float *values,
               int64_t request_stride, int64_t head_stride, const uint8_t *seen, int64_t requests, int64_t tokens,
               int64_t heads, int64_t kv_heads, int64_t extent, int64_t width, float scale, float *y);

#endif
