#define GEOT_TYPE double
#include "launch_second_backward.cuh"
