#define GEOT_TYPE double
#include "backward.inc"
