"""Low-rank KV caches: spectra of keys and values, bases for them, caches that store projections."""
