#define GEOT_TYPE float
#include "launch_second_backward.cuh"
