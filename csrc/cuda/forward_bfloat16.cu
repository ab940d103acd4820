#define GEOT_TYPE BFloat16
#include "forward.inc"
