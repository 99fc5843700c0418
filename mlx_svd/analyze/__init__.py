"""Where a model loses quality when ranks are cut: spectra, projections, ranks, depth."""
