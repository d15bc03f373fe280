"""Faster implementations of layers, each tested to be equal to the plain one."""
