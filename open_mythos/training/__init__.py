"""Training: data, objective, optimiser, checkpoints, evaluation. Import the submodule you need."""
