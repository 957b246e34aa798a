/* Steps of a decoder pass that cpu.c holds and layers.c joins. */
#ifndef CPU_H
#define CPU_H
#include <stdint.h>

void linear(const float *x, int64_t rows, int64_t inputs, const float *panels, const float *bias, int64_t outputs,
            float *turned, float *y);
void rms_norm(const float *x, int64_t rows, int64_t stride, int64_t groups, int64_t width, const float *weight,
              float eps, float *y);
void rotate(float *x, int64_t rows, int64_t stride, int64_t heads, int64_t width, int64_t rotary, const float *cos,
            const float *sin);
void silu_mul(const float *x, int64_t rows, int64_t width, float *y);
void attend(const float *query, int64_t query_stride, const float *keys, const float *values, int64_t request_stride,
            int64_t head_stride, const uint8_t *seen, int64_t requests, int64_t tokens, int64_t heads,
            int64_t kv_heads, int64_t extent, int64_t width, float scale, float *y);

#endif
