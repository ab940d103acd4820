#define GEOT_TYPE double
#include "launch_forward.cuh"
