"""Refine-Control: make big ControlNets small, and prove what was lost (arXiv 2509.22139)."""

__version__ = "0.1.0"
