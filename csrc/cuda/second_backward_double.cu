#define GEOT_TYPE double
#include "second_backward.inc"
