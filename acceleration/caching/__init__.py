"""Feature caching: indicator -> policy -> forecaster at a granularity, over a store of snapshots."""
