#define GEOT_TYPE double
#include "forward.inc"
