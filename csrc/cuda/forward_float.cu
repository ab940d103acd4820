#define GEOT_TYPE float
#include "forward.inc"
