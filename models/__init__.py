"""Networks to prune: a graph builder, published architectures, tricky fixtures, fetched models."""
