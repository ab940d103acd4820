#define GEOT_TYPE float
#include "launch_forward.cuh"
