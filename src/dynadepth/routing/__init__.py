"""The mechanism, free of any method: decisions, granularities, targets, routed sublayers and the cache they need."""
