"""Whole-solve kernels: bodies written once over Refs (`body.py`), and the runners that take them to a platform."""
