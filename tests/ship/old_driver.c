/* A libcuda that says which CUDA it is for (VERSION), and can do nothing else. */
#include <string.h>

enum { kNoDevice = 100 };

int cuDriverGetVersion(int *version) {
  *version = VERSION;
  return 0;
}

int cuInit(unsigned flags) { return kNoDevice; }

static int other(void) { return kNoDevice; }

int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, void *status) {
  *function = (void *)other;
  if (!strcmp(name, "cuDriverGetVersion")) *function = (void *)cuDriverGetVersion;
  if (!strcmp(name, "cuInit")) *function = (void *)cuInit;
  if (!strncmp(name, "cuGetProcAddress", 16)) *function = (void *)cuGetProcAddress_v2;
  return 0;
}

int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
