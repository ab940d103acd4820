#define GEOT_TYPE float
#include "launch_backward.cuh"
