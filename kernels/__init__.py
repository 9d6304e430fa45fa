"""CUDA sources, one .cu file per family of operations; they know nothing of models."""
