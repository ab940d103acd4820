#define GEOT_TYPE BFloat16
#include "launch_backward.cuh"
