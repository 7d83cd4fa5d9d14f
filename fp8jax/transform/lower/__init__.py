"""The operations in FP8 that products become."""
