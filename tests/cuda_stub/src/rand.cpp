// libcurand: the provider is linked with it and calls nothing of it.
#include "stub.h"

EXPORT int curandGetVersion(int* version) {
  *version = 10400;
  return 0;
}
