"""How good a model is: predictions, honest baselines on the same rows, figures with intervals."""
