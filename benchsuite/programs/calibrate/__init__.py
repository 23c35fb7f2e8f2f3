"""Small measurements of links and gradients, which cost model and virtual clock are fitted to."""
