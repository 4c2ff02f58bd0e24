"""Kernels: arrays in, arrays out. Nothing here knows a module."""
