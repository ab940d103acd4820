#define GEOT_TYPE double
#include "launch_backward.cuh"
