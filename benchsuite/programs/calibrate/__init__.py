"""Small measurements of links and gradients, which the cost model and virtual clock are fitted to."""
