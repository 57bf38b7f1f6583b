"""Reports what ART logs to Weights & Biases. There is nothing to import from here: installing it is using it."""
