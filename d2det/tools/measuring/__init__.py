"""Measuring calls: times taken in turn, peak memory, and what they were measured with."""
