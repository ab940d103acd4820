#define GEOT_TYPE Half
#include "launch_forward.cuh"
