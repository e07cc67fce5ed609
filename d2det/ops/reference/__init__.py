"""Reference implementations: plain PyTorch, any device, no host synchronisation on the hot path.

They are what the compiled kernels are compared with, and what runs where there are none.
"""
