#define GEOT_TYPE BFloat16
#include "backward.inc"
