"""Outputs of layers that see the timestep or the prompt alone, kept in tables instead of their weights.

Temporal Feature Matters (TFMQ-DM, arXiv 2311.16503, 2407.19547) observes that a network's temporal features are a finite set
which does not depend on the picture. A diffusion transformer's modulations are exactly that.
"""
