/* A CUDA driver that runs nothing: it prints each launch of a kernel, so that a test sees what JAX's launcher passes. */

#include <stdio.h>

typedef int Result; /* 0 is success */

Result cuStreamIsCapturing(void *stream, int *status) { return *status = 0; }
Result cuStreamGetCtx(void *stream, void **context) { return *context = (void *)1, 0; }
Result cuCtxPushCurrent_v2(void *context) { return 0; }
Result cuCtxPopCurrent_v2(void **context) { return 0; }
Result cuModuleLoadData(void **module, const void *image) {
  const char *bytes = image;
  printf("module %.3s\n", bytes + 1);
  return *module = (void *)2, 0;
}
Result cuModuleGetFunction(void **function, void *module, const char *name) {
  printf("function %s\n", name);
  return *function = (void *)3, 0;
}
Result cuMemAllocAsync(void **pointer, size_t bytes, void *stream) {
  printf("allocated %zu\n", bytes);
  return *pointer = (void *)4, 0;
}
Result cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void *stream, void **parameters, void **extra) {
  printf("launch %u %u %u %u %u %u %u\n", gx, gy, gz, bx, by, bz, shared);
  for (int i = 0; i < ARRAYS; ++i) printf("pointer %p\n", *(void **)parameters[i]);
  for (int i = ARRAYS; i < ARRAYS + SCALARS; ++i) printf("integer %d\n", *(int *)parameters[i]);
  for (int i = ARRAYS + SCALARS; i < PARAMETERS; ++i) printf("scratch %p\n", *(void **)parameters[i]);
  return fflush(stdout);
}
