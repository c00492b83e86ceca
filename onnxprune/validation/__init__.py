"""Is it right: judges a result from outside, given the original, the pruned model and the plan."""
