// How entries (a token with one of its experts) are cut for products with their experts' weights.
#pragma once
#include "device.cuh"

// A run of entries of one expert, from place `first` on; expert -1: nothing to do.
struct ExpertTile { i32 expert, first; };
