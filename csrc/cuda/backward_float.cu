#define GEOT_TYPE float
#include "backward.inc"
