// What the bindings of all ops read of torch: g++ reads it once for all of them (setup.py).
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
