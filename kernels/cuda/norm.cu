// Norms of stretches of `width` values, a block each; a row may hold several stretches (norms of heads).
//
//   rms:    x / sqrt(mean(x^2) + eps) * gain                                    (Zhang and Sennrich 2019)
//   layer:  (x - mean) / sqrt(mean((x - mean)^2) + eps) * gain + bias            (Ba, Kiros and Hinton 2016)
#include "device.cuh"

extern "C" __global__ void rms_norm(float *y /* (stretches, width) */, const float *x /* (stretches, width) */,
                                    const float *gain /* (width) */, i32 width, float eps) {
    __shared__ float scratch[32];
    const float *from = x + (i64)block_x() * width;
    float sum = 0.0f;
    for (i32 i = thread_x(); i < width; i += threads_x()) sum = fma_(from[i], from[i], sum);
    float scale = 1.0f / sqrt_(block_sum(sum, scratch) / (float)width + eps);
    for (i32 i = thread_x(); i < width; i += threads_x()) y[(i64)block_x() * width + i] = from[i] * scale * gain[i];
}

extern "C" __global__ void layer_norm(float *y /* (stretches, width) */, const float *x /* (stretches, width) */,
                                      const float *gain /* (width) */, const float *bias /* (width) */, i32 width, float eps) {
    __shared__ float scratch[32];
    const float *from = x + (i64)block_x() * width;
    float sum = 0.0f, square = 0.0f;
    for (i32 i = thread_x(); i < width; i += threads_x()) sum += from[i];
    float mean = block_sum(sum, scratch) / (float)width;
    for (i32 i = thread_x(); i < width; i += threads_x()) square = fma_(from[i] - mean, from[i] - mean, square);
    float scale = 1.0f / sqrt_(block_sum(square, scratch) / (float)width + eps);
    for (i32 i = thread_x(); i < width; i += threads_x())
        y[(i64)block_x() * width + i] = (from[i] - mean) * scale * gain[i] + bias[i];
}
