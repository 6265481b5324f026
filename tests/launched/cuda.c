/* Takes the place of libcuda.so.1, through which Triton launches: no kernel runs, and the last launch is kept. */

#include <stdint.h>
#include <string.h>

enum { MOST_VALUES = 32, MOST_THREADS = 0, COMPUTE_MAJOR = 75, COMPUTE_MINOR = 76 };

struct config {
  uint32_t grid[3], block[3], shared_bytes;
  void *stream;
};

struct launch {
  uint64_t grid[3], threads, shared_bytes, stream, kernel, values[MOST_VALUES];
} launch;

int num_values, sizes[MOST_VALUES]; /* of a kernel's arguments in bytes, which CUDA knows from its machine code */

int cuLaunchKernelEx(const struct config *config, void *kernel, void **values, void **extra) {
  (void)extra;
  memset(&launch, 0, sizeof launch);
  for (int i = 0; i < 3; i++) launch.grid[i] = config->grid[i];
  launch.threads = config->block[0];
  launch.shared_bytes = config->shared_bytes;
  launch.stream = (uint64_t)config->stream;
  launch.kernel = (uint64_t)kernel;
  for (int i = 0; i < num_values; i++) memcpy(&launch.values[i], values[i], sizes[i]);
  return 0;
}

int cuPointerGetAttribute(uint64_t *found, int attribute, uint64_t address) {
  return (void)attribute, *found = address, 0;
}

int cuModuleGetFunction(void **kernel, void *module, const char *name) {
  static char kernels[1 << 10];
  static int num_kernels;
  return (void)module, (void)name, *kernel = &kernels[num_kernels++], 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  return (void)device, *value = attribute == COMPUTE_MAJOR ? 9 : attribute == COMPUTE_MINOR ? 0 : 1 << 16, 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *kernel) {
  return (void)kernel, *value = attribute == MOST_THREADS ? 1024 : 0, 0;
}

int cuModuleLoadData(void **module, const void *code) { return (void)code, *module = &launch, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return (void)device, *context = &launch, 0; }
int cuCtxGetCurrent(void **context) { return *context = &launch, 0; }
int cuDeviceGet(int *device, int number) { return *device = number, 0; }
int cuGetErrorString(int error, const char **text) { return (void)error, *text = "an error", 0; }

/* What else Triton links. */
int cuCtxGetDevice(void) { return 0; }
int cuCtxGetLimit(void) { return 0; }
int cuCtxSetCurrent(void) { return 0; }
int cuCtxSetLimit(void) { return 0; }
int cuDriverGetVersion(void) { return 0; }
int cuFuncSetAttribute(void) { return 0; }
int cuFuncSetCacheConfig(void) { return 0; }
int cuModuleUnload(void) { return 0; }
int cuOccupancyMaxActiveClusters(void) { return 0; }
int cuPointerGetAttributes(void) { return 0; }
int cuStreamIsCapturing(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
