#define GEOT_TYPE float
#include "second_backward.inc"
