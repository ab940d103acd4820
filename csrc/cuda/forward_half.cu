#define GEOT_TYPE Half
#include "forward.inc"
