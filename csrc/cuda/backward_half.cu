#define GEOT_TYPE Half
#include "backward.inc"
