#define GEOT_TYPE Half
#include "launch_backward.cuh"
